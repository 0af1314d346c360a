//! `cargo xtask pxe --serve` beside another DHCP server, for emulated machines in a network of their own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use xtask::emulator::{Boot, Link, Machine, Network};

use super::namespace::{Lan, BRIDGE, SERVER, TAP};
use super::{boot, demo, machine, run_demo};
use crate::cases::Cases;
use crate::context::Ctx;

/// The size of a file in a bundle that no guest needs, so that loading takes a while.
const PADDING: usize = 64 << 20;

/// The machine whose bundle that is.
const WITH_LARGE: &str = "52:54:00:00:00:0c";

pub(super) fn serve(ctx: &Ctx) -> Result<Cases> {
    let lan = match Lan::new()? {
        Ok(lan) => lan,
        Err(why) => return Ok(Cases::skipped(format!("there can be no network namespace here: {why}"))),
    };
    let (small, large) = (ctx.dir.join("small.cpio"), ctx.dir.join("large.cpio"));
    fs::write(&small, demo(ctx, "served")?.archive()?)?;
    fs::write(&large, demo(ctx, "large")?.file("padding", vec![0; PADDING]).archive()?)?;
    let mut server = Running::start(ctx, &lan, &small, &format!("mac:{WITH_LARGE}={}", large.display()))?;
    server.expect(ctx, &format!("serving on {BRIDGE} at {SERVER}"))?;
    let program = Some(lan.qemu(&ctx.dir)?);
    let on_tap = |boot, mac: &str| Machine {
        program: program.clone(),
        ..machine(ctx, boot, Network { mac: mac.into(), ..Network::new(Link::Tap(TAP.into())) })
    };

    let bios = "52:54:00:00:00:0a";
    run_demo(boot(ctx, &on_tap(Boot::Pxe, bios))?, "served")?;
    let uefi = "52:54:00:00:00:0b";
    run_demo(boot(ctx, &on_tap(Boot::PxeUefi, uefi))?, "served")?;
    for line in [
        format!("{bios}: asks how to boot (BIOS, iPXE)"),
        format!("{bios}: is told to load boot.ipxe"),
        format!("{bios}: has grub-bios.0"),
        format!("{bios}: has machines/default/bundle.cpio: done, Umbra starts"),
        format!("{uefi}: asks how to boot (UEFI)"),
        format!("{uefi}: is told to load grub-x64.efi"),
        format!("{uefi}: has umbra"),
        format!("{uefi}: has machines/default/bundle.cpio: done, Umbra starts"),
    ] {
        server.expect(ctx, &line)?;
    }

    // The server goes while a machine loads: what has come of the bundle is not booted.
    let folder = format!("machines/mac-{}", WITH_LARGE.replace(':', "-"));
    let mut vm = boot(ctx, &on_tap(Boot::Pxe, WITH_LARGE))?;
    vm.expect(&format!("^umbra: loading {folder}/bundle.cpio$"))?;
    server.interrupt(ctx)?;
    vm.expect(&format!("^umbra: cannot load {folder}/bundle.cpio\\s+from\\s+tftp://{SERVER};"))?;
    ensure!(!vm.log().contains("umbra: entered by"), "Umbra was started with a part of the bundle");
    Ok(Cases::passed())
}

/// The command while it runs.
struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn start(ctx: &Ctx, lan: &Lan, bundle: &Path, machine: &str) -> Result<Self> {
        let path = ctx.dir.join("serve.log");
        let line = lan
            .ours
            .command("cargo")
            .args(["xtask", "pxe", "--serve", BRIDGE, "--out"])
            .arg(ctx.dir.join("served"))
            .arg("--bundle")
            .arg(bundle)
            .args(["--machine", machine]);
        let log = File::create(&path)?;
        let child = line
            .command()
            .current_dir(xtask::paths::workspace_root())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start `{line}`"))?;
        Ok(Self { child, log: path })
    }

    /// Waits until the command has printed `text`.
    fn expect(&mut self, ctx: &Ctx, text: &str) -> Result<()> {
        let end = Instant::now() + ctx.remaining();
        loop {
            let log = String::from_utf8_lossy(&fs::read(&self.log)?).into_owned();
            if log.contains(text) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("`pxe --serve` ended ({status}) before it said `{text}`:\n{log}");
            }
            if Instant::now() >= end {
                bail!("`pxe --serve` does not say `{text}`:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What Ctrl-C does.
    fn interrupt(mut self, ctx: &Ctx) -> Result<()> {
        let pid = self.child.id().to_string();
        ensure!(Command::new("kill").args(["-INT", &pid]).status()?.success(), "the command is gone");
        self.expect(ctx, "nothing is served any more")?;
        let end = Instant::now() + ctx.remaining();
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < end, "the command does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        let status = self.child.wait()?;
        ensure!(status.success(), "the command ended with {status}");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already; its server ends with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
