//! Umbra starts by each of its ways in, says so from the first moment, runs the demo guest and switches off.

use anyhow::{ensure, Result};
use xtask::bundle::Bundle;
use xtask::emulator::{BochsCpu, Boot, Machine};
use xtask::size::Size;

use crate::cases::Cases;
use crate::context::Ctx;
use crate::scenario::{Need, Scenario};

pub(super) fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("boot_pvh", |ctx| demo(ctx, &ctx.machine())),
        Scenario::new("boot_pvh_four_cpus", |ctx| {
            let machine = Machine { cpus: 4, ..ctx.machine() };
            demo(ctx, &machine)
        }),
        Scenario::new("boot_pvh_memory_above_4g", |ctx| {
            let machine = Machine { memory: Size::mib(5 * 1024), ..ctx.machine() };
            demo(ctx, &machine)
        }),
        Scenario::new("boot_iso_bios", |ctx| {
            let machine = Machine { boot: Boot::Iso, ..ctx.machine() };
            demo(ctx, &machine)
        })
        .needs(&[Need::Grub]),
        Scenario::new("boot_iso_uefi", |ctx| {
            let machine = Machine { boot: Boot::Uefi, ..ctx.machine() };
            demo(ctx, &machine)
        })
        .needs(&[Need::Grub, Need::Uefi])
        .limit(120),
        Scenario::new("boot_iso_bochs", |ctx| demo(ctx, &ctx.bochs(BochsCpu::Ryzen)))
            .needs(&[Need::Grub, Need::Bochs])
            .limit(300),
        Scenario::new("boot_iso_bochs_vmx", vmx).needs(&[Need::Grub, Need::Bochs]).limit(300),
        Scenario::new("halt_at_end", halt_at_end),
    ]
}

/// A bundle with the demo guest.
pub(super) fn demo_bundle(ctx: &Ctx, umbra: &str) -> Result<Bundle> {
    let config = format!("{umbra}\n[[vm]]\nname = \"demo\"\nmemory = \"32M\"\nkernel = \"demo\"\n");
    Bundle::new(config).file_from("demo", &ctx.images.guest("demo"))
}

fn demo(ctx: &Ctx, machine: &Machine) -> Result<Cases> {
    demo_log(ctx, machine)?;
    Ok(Cases::passed())
}

/// Umbra names what it runs on.
fn vmx(ctx: &Ctx) -> Result<Cases> {
    let log = demo_log(ctx, &Machine { cpus: 2, ..ctx.bochs(BochsCpu::SkylakeX) })?;
    for word in ["VMX", "EPT", "on 2 of 2 CPUs"] {
        ensure!(
            log.lines().any(|line| line.starts_with("umbra: ") && line.contains(word)),
            "no line of Umbra's says {word}"
        );
    }
    Ok(Cases::passed())
}

/// Boots the demo guest, talks to it and has it switch off; the whole log.
pub(super) fn demo_log(ctx: &Ctx, machine: &Machine) -> Result<String> {
    let mut vm = ctx.boot(machine, &demo_bundle(ctx, "")?)?;
    // GRUB leaves the cursor anywhere, so Umbra's first words need not begin a line.
    vm.expect("umbra: ")?;
    vm.expect("^demo> ")?;
    vm.type_line("help")?;
    vm.expect("poweroff")?;
    vm.expect("^demo> ")?;
    vm.type_line("poweroff")?;
    vm.expect("^umbra: vm \"demo\": powered off$")?;
    let outcome = vm.end_with(0)?;
    ensure!(!outcome.log.contains("umbra: error"), "there is an error in the log of a good run");
    Ok(outcome.log)
}

/// `at_end = "halt"` leaves the machine on after the last line.
fn halt_at_end(ctx: &Ctx) -> Result<Cases> {
    let mut vm = ctx.boot(&ctx.machine(), &demo_bundle(ctx, "[umbra]\nat_end = \"halt\"")?)?;
    vm.expect("^demo> ")?;
    vm.type_line("poweroff")?;
    let outcome = vm.end()?;
    ensure!(outcome.status == Some(0), "the run ended with {:?} instead of status 0", outcome.status);
    ensure!(!outcome.powered_off, "the machine switched itself off");
    Ok(Cases::passed())
}
