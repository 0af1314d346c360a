//! Debian's Linux as a guest: a shell that computes, the scenario script, the ways to end.

use std::process::Stdio;
use std::time::Instant;

use anyhow::{ensure, Context, Result};
use xtask::bundle::Bundle;
use xtask::emulator::{BochsCpu, Machine};
use xtask::exec::{wait_within, CommandLine};
use xtask::guest::description::LINUX_CMDLINE;
use xtask::guest::{initramfs, PROMPT};
use xtask::size::Size;

use crate::cases::Cases;
use crate::context::{Ctx, Vm};
use crate::scenario::{Need, Scenario};

pub(super) fn all() -> Vec<Scenario> {
    let scenarios = vec![
        Scenario::new("linux", |ctx| script(ctx, &ctx.machine(), "")).limit(600),
        Scenario::new("linux_shadow", |ctx| script(ctx, &ctx.machine(), "mmu = \"shadow\"\n")).limit(600),
        Scenario::new("linux_reboot", reboot).limit(600),
        Scenario::new("linux_piped", piped).limit(600),
        Scenario::new("linux_bochs_vmx", bochs).needs(&[Need::Grub, Need::Bochs]).limit(900),
        Scenario::new("linux_bochs_vmx_script", |ctx| script(ctx, &bochs_vmx(ctx, BochsCpu::SkylakeX), ""))
            .needs(&[Need::Grub, Need::Bochs])
            .limit(3600)
            .long(),
    ];
    scenarios.into_iter().map(|scenario| scenario.needs(&[Need::Linux])).collect()
}

/// Boots Linux up to its prompt.
fn boot(ctx: &Ctx, machine: &Machine) -> Result<Vm> {
    boot_with(ctx, machine, "")
}

/// The same with more lines of umbra.toml.
fn boot_with(ctx: &Ctx, machine: &Machine, more: &str) -> Result<Vm> {
    let mut vm = ctx.boot(machine, &bundle(ctx, more)?)?;
    reach_shell(&mut vm)?;
    Ok(vm)
}

/// A bundle with Linux, and more lines of umbra.toml.
pub(super) fn bundle(ctx: &Ctx, more: &str) -> Result<Bundle> {
    let linux = ctx.linux()?;
    let config = format!(
        "[[vm]]\nname = \"linux\"\nmemory = \"512M\"\nkernel = \"vmlinuz\"\ninitrd = \"initrd\"\ncmdline = \"{LINUX_CMDLINE}\"\n{more}"
    );
    Ok(Bundle::new(config)
        .file_from("vmlinuz", &linux.kernel)?
        .file("initrd", initramfs::build(&linux.busybox)?))
}

/// Waits for the shell.
pub(super) fn reach_shell(vm: &mut Vm) -> Result<()> {
    vm.expect("^umbra: ")?;
    vm.expect("Linux version ")?;
    vm.expect(&format!("^{PROMPT}"))?;
    Ok(())
}

/// The shell takes input and computes.
pub(super) fn compute(vm: &mut Vm) -> Result<()> {
    vm.type_line("echo $((6*7))")?;
    vm.expect("^42$")?;
    vm.expect(&format!("^{PROMPT}"))?;
    Ok(())
}

pub(super) fn power_off(mut vm: Vm) -> Result<String> {
    vm.type_line("poweroff")?;
    vm.expect("^umbra: vm \"linux\": powered off$")?;
    Ok(vm.end_with(0)?.log)
}

/// Runs the script in Linux, described by `more` lines of umbra.toml.
fn script(ctx: &Ctx, machine: &Machine, more: &str) -> Result<Cases> {
    let mut vm = boot_with(ctx, machine, more)?;
    compute(&mut vm)?;
    let before = vm.log().len();
    vm.type_line("/root/scenario.sh")?;
    vm.expect("^done .*$")?;
    let mut cases = Cases::reported_in(&vm.log()[before..]);
    vm.expect(&format!("^{PROMPT}"))?;
    if let Err(error) = power_off(vm) {
        cases.require(false, || format!("{error:#}"));
    }
    Ok(cases)
}

fn reboot(ctx: &Ctx) -> Result<Cases> {
    let mut vm = boot(ctx, &ctx.machine())?;
    vm.type_line("reboot")?;
    vm.expect("^umbra: vm \"linux\": reset")?;
    vm.expect("Linux version ")?;
    vm.expect(&format!("^{PROMPT}"))?;
    compute(&mut vm)?;
    power_off(vm)?;
    Ok(Cases::passed())
}

/// Boots Linux in the machine, has its shell compute and switches it off.
pub(super) fn shell(ctx: &Ctx, machine: &Machine) -> Result<Cases> {
    let mut vm = boot(ctx, machine)?;
    compute(&mut vm)?;
    power_off(vm)?;
    Ok(Cases::passed())
}

/// The only emulated VMX, and a slow one: with AVX2, or with AVX-512 as well.
fn bochs_vmx(ctx: &Ctx, cpu: BochsCpu) -> Machine {
    Machine { memory: Size::mib(1024), ..ctx.bochs(cpu) }
}

/// Says how long the shell took to appear.
fn bochs(ctx: &Ctx) -> Result<Cases> {
    let start = Instant::now();
    let mut vm = boot(ctx, &bochs_vmx(ctx, BochsCpu::Haswell))?;
    println!("   linux_bochs_vmx reached its shell after {:.0} s", start.elapsed().as_secs_f32());
    compute(&mut vm)?;
    power_off(vm)?;
    Ok(Cases::passed())
}

/// `cargo xtask run` itself, its input a pipe that ends long before the guest has booted.
fn piped(ctx: &Ctx) -> Result<Cases> {
    let line = CommandLine::new("cargo").args(["xtask", "run", "--timeout", "500"]);
    let log = std::fs::File::create(ctx.dir.join("console.log"))?;
    let mut child = line
        .command()
        .current_dir(xtask::paths::workspace_root())
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let mut stdin = child.stdin.take().context("the command has no standard input")?;
    std::io::Write::write_all(&mut stdin, b"echo $((6*7))\npoweroff\n")?;
    drop(stdin);
    let status = wait_within(child, ctx.remaining())?.context("the command did not end")?;
    let log = String::from_utf8_lossy(&std::fs::read(ctx.dir.join("console.log"))?).replace('\r', "");
    ensure!(status.success(), "`{line}` ended with {status}");
    ensure!(log.lines().any(|line| line == "42"), "the shell did not print 42");
    Ok(Cases::passed())
}
