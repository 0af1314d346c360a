//! Machines that are not like most: without devices that PCs have, with processors that are not there, with an APIC that
//! the firmware left in another mode.

use anyhow::{ensure, Result};
use xtask::emulator::{BochsCpu, Boot, Hardware, Machine};

use super::boot::{demo_bundle, demo_log};
use crate::cases::Cases;
use crate::context::Ctx;
use crate::scenario::{Need, Scenario};

pub(super) fn all() -> Vec<Scenario> {
    vec![
        Scenario::new("machine_without_ecam", |ctx| {
            says(ctx, &board(ctx, "pc"), &["report: pci: ecam=none", "hpet=0xfed00000"])
        }),
        Scenario::new("machine_without_hpet", |ctx| {
            says(ctx, &board(ctx, "q35,hpet=off"), &["tsc-source=\"the ACPI PM timer\"", "hpet=none"])
        }),
        Scenario::new("machine_without_power_off", without_power_off),
        Scenario::new("machine_without_legacy_devices", |ctx| {
            says(ctx, &board(ctx, "q35,hpet=off,pic=off,pit=off,i8042=off,vmport=off"), &["i8042=no"])
        }),
        Scenario::new("machine_with_absent_cpus", |ctx| {
            let hardware = Hardware { absent_cpus: 5, ..Hardware::default() };
            let machine = Machine { cpus: 3, hardware, ..ctx.machine() };
            says(ctx, &machine, &["listed=8 enabled=3 online=3"])
        }),
        Scenario::new("machine_in_x2apic_mode", |ctx| {
            // IA32_APIC_BASE: enabled, bootstrap processor, x2APIC mode.
            let hardware = Hardware { grub_command: "wrmsr 0x1b 0xfee00d00", ..Hardware::default() };
            let machine = Machine { cpus: 2, hardware, ..ctx.bochs(BochsCpu::SkylakeX) };
            says(ctx, &machine, &["local-apic=x2apic", "enabled=2 online=2"])
        })
        .needs(&[Need::Grub, Need::Bochs])
        .limit(300),
        Scenario::new("report_uefi", |ctx| {
            let machine = Machine { boot: Boot::Uefi, ..ctx.machine() };
            says(
                ctx,
                &machine,
                &["firmware: kind=uefi protocol=multiboot2 loader=\"GRUB", "manufacturer=\"QEMU\""],
            )
        })
        .needs(&[Need::Grub, Need::Uefi])
        .limit(120),
        Scenario::new("report_svm", |ctx| {
            let words = [
                "kind=bios protocol=pvh",
                "virtualization: kind=\"SVM with nested paging\" tlb-tags=16 used=npt",
            ];
            says(ctx, &ctx.machine(), &words)
        }),
        Scenario::new("report_vmx", |ctx| {
            let words =
                ["virtualization: kind=\"VMX with EPT\" tlb-tags=65536 used=ept,", "vendor=GenuineIntel"];
            says(ctx, &ctx.bochs(BochsCpu::SkylakeX), &words)
        })
        .needs(&[Need::Grub, Need::Bochs])
        .limit(300),
    ]
}

fn board(ctx: &Ctx, board: &'static str) -> Machine {
    Machine { hardware: Hardware { board, ..Hardware::default() }, ..ctx.machine() }
}

/// Without QEMU's tables the BIOS makes some of its own, which know no way to switch off: the machine stays on, and says so.
fn without_power_off(ctx: &Ctx) -> Result<Cases> {
    let mut vm = ctx.boot(&board(ctx, "q35,acpi=off,hpet=off"), &demo_bundle(ctx, "")?)?;
    vm.expect("^umbra: warning: ACPI: no way to power off")?;
    vm.expect("^demo> ")?;
    vm.type_line("poweroff")?;
    let outcome = vm.end()?;
    ensure!(outcome.status == Some(0) && !outcome.powered_off, "{:?}", outcome.status);
    Ok(Cases::passed())
}

/// Runs the demo guest, whose machine's report must be whole and have all `words`.
fn says(ctx: &Ctx, machine: &Machine, words: &[&str]) -> Result<Cases> {
    let log = demo_log(ctx, machine)?;
    let report: Vec<_> = log.lines().filter(|line| line.starts_with("umbra: report: ")).collect();
    ensure!(
        report.first().is_some_and(|line| line.starts_with("umbra: report: begin: format=1 ")),
        "no report"
    );
    let end = format!("umbra: report: end: lines={}", report.len() - 2);
    ensure!(report.last() == Some(&end.as_str()), "{:?} is not {end}", report.last());
    for word in words {
        ensure!(report.iter().any(|line| line.contains(word)), "no line of the report says {word}");
    }
    Ok(Cases::passed())
}
