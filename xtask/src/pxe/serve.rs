//! Serves a tree with dnsmasq, in the foreground: answers to machines that ask how to boot, beside the DHCP server that
//! gives them their addresses, and TFTP.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};
use nix::unistd::{Gid, Group, Uid, User};

use super::boot_image::{BIOS, IPXE, UEFI};
use super::progress::{self, Progress};
use crate::exec::CommandLine;
use crate::say;
use crate::sys::{self, Signals, Watch};

/// The client architectures of DHCP's option 93 (RFC 4578, 2.1, with IANA's correction) and what they load.
const ARCHITECTURES: [(u16, &str); 3] = [(0, BIOS), (7, UEFI), (9, UEFI)];

/// dnsmasq's command line: nothing from the machine's own configuration, one interface, no names, no addresses.
pub(super) fn command_line(interface: &str, address: Ipv4Addr, tree: &Path) -> Result<CommandLine> {
    let (user, group) = owner(tree)?;
    let root = tree.to_str().filter(|path| !path.contains(','));
    let root = root.context("dnsmasq cannot serve a folder whose path has a comma or is not UTF-8")?;
    let mut line = CommandLine::new("dnsmasq")
        .args(["--keep-in-foreground", "--conf-file=/dev/null", "--pid-file", "--leasefile-ro", "--port=0"])
        .args(["--log-facility=-", "--log-dhcp"])
        .args([format!("--user={user}"), format!("--group={group}")])
        .args([
            format!("--interface={interface}"),
            "--except-interface=lo".into(),
            "--bind-interfaces".into(),
        ])
        .args(["--enable-tftp".to_owned(), format!("--tftp-root={root}")])
        .args([format!("--dhcp-range={address},proxy"), "--dhcp-no-override".into()])
        // iPXE says so by its own option, or by its user class.
        .args(["--dhcp-match=set:ipxe,175", "--dhcp-userclass=set:ipxe,iPXE", "--pxe-prompt=Umbra,0"]);
    for (architecture, file) in ARCHITECTURES {
        line = line
            .arg(format!("--pxe-service=tag:ipxe,{architecture},Umbra,{IPXE}"))
            .arg(format!("--pxe-service=tag:!ipxe,{architecture},Umbra,{file}"));
    }
    Ok(line)
}

/// Whose the tree is: as that user dnsmasq can read it, and need not stay root.
fn owner(tree: &Path) -> Result<(String, String)> {
    let data = tree.metadata().with_context(|| format!("cannot read {}", tree.display()))?;
    let user = User::from_uid(Uid::from_raw(data.uid()))?.context("the owner of the tree has no name")?;
    let group = Group::from_gid(Gid::from_raw(data.gid()))?.context("the tree's group has no name")?;
    Ok((user.name, group.name))
}

/// Serves until a signal comes, and prints what each machine does.
pub(super) fn serve(interface: &str, address: Ipv4Addr, tree: &Path) -> Result<()> {
    let line = command_line(interface, address, tree)?;
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let mut server = Server::start(&line)?;
    let mut progress = Progress::new(&tree.display().to_string());
    let neighbour = |address| progress::neighbour(&fs::read_to_string("/proc/net/arp").ok()?, address);
    loop {
        let mut watches =
            [Watch::new(server.log.as_fd(), true, false), Watch::new(signals.as_fd(), true, false)];
        sys::poll(&mut watches, Duration::from_secs(60)).context("cannot wait for dnsmasq")?;
        if signals.take().is_some() {
            say!("ended; nothing is served any more");
            return Ok(());
        }
        let (lines, ended) = server.lines()?;
        for line in &lines {
            if line.starts_with("dnsmasq: ") {
                server.complaint.clone_from(line);
            }
            if line.contains("]: started,") {
                say!("serving on {interface} at {address}; machines may be switched on; Ctrl-C ends it");
            }
            if let Some(said) = progress.line(line, neighbour) {
                println!("{said}");
            }
        }
        if ended {
            let status = server.child.wait().context("cannot wait for dnsmasq")?;
            let why = server.complaint.trim().trim_start_matches("dnsmasq: ");
            bail!("dnsmasq ended ({status}): {why}");
        }
    }
}

/// dnsmasq while it runs; it is ended when this is dropped.
struct Server {
    child: Child,
    log: File,
    /// What has been read of a line that is not complete yet.
    partial: Vec<u8>,
    /// Its last words about itself.
    complaint: String,
}

impl Server {
    fn start(line: &CommandLine) -> Result<Self> {
        say!("{line}");
        let mut command = line.command();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        sys::die_with_parent(&mut command);
        let mut child = command
            .spawn()
            .with_context(|| "cannot start dnsmasq; `cargo xtask setup` installs it".to_owned())?;
        let log = File::from(OwnedFd::from(child.stderr.take().context("dnsmasq has no log")?));
        sys::set_nonblocking(log.as_raw_fd())?;
        Ok(Self { child, log, partial: Vec::new(), complaint: String::new() })
    }

    /// The lines that have come, and whether there will be no more.
    fn lines(&mut self) -> Result<(Vec<String>, bool)> {
        let mut buffer = [0; 4096];
        let ended = loop {
            match self.log.read(&mut buffer) {
                Ok(0) => break true,
                Ok(len) => self.partial.extend_from_slice(&buffer[..len]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    break false;
                }
                Err(error) => return Err(error).context("cannot read dnsmasq's log"),
            }
        };
        let complete = match self.partial.iter().rposition(|byte| *byte == b'\n') {
            Some(_) if ended => self.partial.len(),
            Some(end) => end + 1,
            None if ended => self.partial.len(),
            None => 0,
        };
        let text: Vec<u8> = self.partial.drain(..complete).collect();
        Ok((String::from_utf8_lossy(&text).lines().map(str::to_owned).collect(), ended))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_its_file_and_nothing_else_is_served() {
        let line = command_line("eth1", Ipv4Addr::new(192, 0, 2, 1), &std::env::temp_dir()).unwrap();
        for arg in [
            "--conf-file=/dev/null",
            "--port=0",
            "--interface=eth1",
            "--bind-interfaces",
            "--dhcp-range=192.0.2.1,proxy",
            "--pxe-service=tag:ipxe,0,Umbra,boot.ipxe",
            "--pxe-service=tag:ipxe,7,Umbra,boot.ipxe",
            "--pxe-service=tag:!ipxe,0,Umbra,grub-bios.0",
            "--pxe-service=tag:!ipxe,7,Umbra,grub-x64.efi",
            "--pxe-service=tag:!ipxe,9,Umbra,grub-x64.efi",
        ] {
            assert!(line.has_arg(arg), "{arg}: {line}");
        }
        assert!(command_line("eth1", Ipv4Addr::LOCALHOST, Path::new("/nonexistent,x")).is_err());
    }

    #[test]
    fn the_log_comes_line_by_line() {
        let line = CommandLine::new("sh").args(["-c", "printf 'a\\nb\\nlast' >&2"]);
        let mut server = Server::start(&line).unwrap();
        let mut all = Vec::new();
        loop {
            let mut watches = [Watch::new(server.log.as_fd(), true, false)];
            sys::poll(&mut watches, Duration::from_secs(10)).unwrap();
            let (lines, ended) = server.lines().unwrap();
            all.extend(lines);
            if ended {
                break;
            }
        }
        assert_eq!(all, ["a", "b", "last"]);
    }
}
