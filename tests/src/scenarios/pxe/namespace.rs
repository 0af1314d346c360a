//! A network of its own: two network namespaces, in one of them a bridge with a tap device for an emulated machine.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{bail, ensure, Context, Result};
use xtask::exec::{find_program, CommandLine};

/// The bridge, on which the server under test listens.
pub(super) const BRIDGE: &str = "br0";
/// The bridge's address.
pub(super) const SERVER: &str = "192.0.2.1";
/// The emulated machine's end.
pub(super) const TAP: &str = "tap0";

/// A network namespace. It exists as long as a process in it, and that one as long as we hold its input, however this
/// process ends.
pub(super) struct Namespace(Child);

impl Namespace {
    /// A new namespace, or why this user or this machine cannot have one.
    fn new() -> Result<Self, String> {
        for program in ["unshare", "nsenter", "ip", "dnsmasq"] {
            if find_program(program).is_none() {
                return Err(format!("there is no program {program} on the path"));
            }
        }
        // Tried before it is kept: the process that keeps it cannot tell why it fails.
        CommandLine::new("unshare")
            .args(["--net", "true"])
            .run_quietly()
            .map_err(|error| format!("{error:#}").replace('\n', " "))?;
        let mut keeper = Command::new("unshare");
        keeper.args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null());
        keeper.spawn().map(Self).map_err(|error| error.to_string())
    }

    /// `program` as it runs in the namespace.
    pub(super) fn command(&self, program: &str) -> CommandLine {
        CommandLine::new("nsenter").args(["--net", "--target", &self.0.id().to_string(), program])
    }

    fn ip(&self, arguments: &str) -> Result<()> {
        self.command("ip").args(arguments.split(' ')).run_quietly()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The two namespaces: ours with the bridge, and that of the DHCP server that is there already.
pub(super) struct Lan {
    pub(super) ours: Namespace,
    dhcp: Child,
    _theirs: Namespace,
}

impl Lan {
    /// The network, or why this machine cannot have it.
    pub(super) fn new() -> Result<Result<Self, String>> {
        let (ours, theirs) = match (Namespace::new(), Namespace::new()) {
            (Ok(ours), Ok(theirs)) => (ours, theirs),
            (Err(why), _) | (_, Err(why)) => return Ok(Err(why)),
        };
        wait_for(&ours)?;
        wait_for(&theirs)?;
        // A kernel without one of these devices cannot have the network.
        for arguments in [
            format!("tuntap add {TAP} mode tap"),
            format!("link add {BRIDGE} type bridge"),
            format!("link add veth0 type veth peer name veth1 netns {}", theirs.0.id()),
        ] {
            if let Err(error) = ours.ip(&arguments) {
                return Ok(Err(format!("{error:#}").replace('\n', " ")));
            }
        }
        for arguments in [
            format!("addr add {SERVER}/24 dev {BRIDGE}"),
            format!("link set {TAP} master {BRIDGE} up"),
            format!("link set veth0 master {BRIDGE} up"),
            format!("link set {BRIDGE} up"),
        ] {
            ours.ip(&arguments)?;
        }
        theirs.ip("addr add 192.0.2.2/24 dev veth1")?;
        theirs.ip("link set veth1 up")?;
        // A DHCP server that knows nothing of Umbra.
        let line = theirs.command("dnsmasq").args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--pid-file",
            "--leasefile-ro",
            "--port=0",
            "--log-facility=-",
            "--user=root",
            "--interface=veth1",
            "--except-interface=lo",
            "--bind-interfaces",
            "--no-ping",
            "--dhcp-range=192.0.2.100,192.0.2.200,255.255.255.0,1h",
        ]);
        let dhcp = line.command().stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        let dhcp = dhcp.with_context(|| format!("cannot start `{line}`"))?;
        Ok(Ok(Self { ours, dhcp, _theirs: theirs }))
    }

    /// Writes a program into `dir` that starts QEMU in our namespace.
    pub(super) fn qemu(&self, dir: &Path) -> Result<PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        let path = dir.join("qemu");
        let script = format!("#!/bin/sh\nexec {} \"$@\"\n", self.ours.command("qemu-system-x86_64"));
        std::fs::write(&path, script)?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
        Ok(path)
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.dhcp.kill();
        let _ = self.dhcp.wait();
    }
}

/// Waits until the process is in its own namespace: before, a command for it would change this machine's network.
fn wait_for(namespace: &Namespace) -> Result<()> {
    let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    let own = link("self")?;
    for _ in 0..500 {
        if link(&namespace.0.id().to_string())? != own {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    ensure!(link("self")? == own, "the namespace of this process has changed");
    bail!("the namespace did not come to be")
}
