//! The small guests of `tests/guests`: each reports its cases on the console.

use std::fs;

use anyhow::{bail, ensure, Context, Result};
use xtask::bench::mmu;
use xtask::bundle::Bundle;
use xtask::emulator::{BochsCpu, Icount, Machine};
use xtask::paths;

use crate::cases::{is_failure, Cases};
use crate::context::{platform_word, Ctx};
use crate::payload;
use crate::scenario::{Need, Scenario};

/// Guests that hold a conversation, measure, compare or misbehave, and are not judged by their cases alone.
const WITHOUT_CASES: [&str; 5] = ["demo", "bench_exits", "bench_mmu", "garbage", "paging_digest"];

/// What a guest writes to its exit port when all cases passed is 0, and comes back as isa-debug-exit's status.
const ALL_PASSED: u8 = 1;

/// Bochs's processors that every guest runs on: SVM; VMX; VMX without unrestricted guest.
const IN_BOCHS: [(&str, BochsCpu); 3] =
    [("ryzen", BochsCpu::Ryzen), ("skylake", BochsCpu::SkylakeX), ("lynnfield", BochsCpu::Lynnfield)];

/// Those on which every guest also runs on shadow tables: SVM; VMX; VMX without EPT.
const SHADOWED_IN_BOCHS: [(&str, BochsCpu); 3] =
    [("ryzen", BochsCpu::Ryzen), ("skylake", BochsCpu::SkylakeX), ("penryn", BochsCpu::Penryn)];

/// QEMU's TCG does not intercept task switches, and loads CR3 itself: with shadow tables a guest must not switch tasks there.
const NOT_SHADOWED_IN_QEMU: [&str; 1] = ["tasks"];

/// Shadow tables, as umbra.toml asks for them.
const SHADOW: &str = "mmu = \"shadow\"";

/// Guests about interrupts, which also run with their local APICs in x2APIC mode: emulated on SVM, by the processor on one
/// of Bochs's, emulated on the other.
const WITH_X2APIC: [&str; 3] = ["events", "smp", "timers"];

/// Bochs's processors for those, and whether the processor delivers their interrupts.
const X2APIC_IN_BOCHS: [(&str, BochsCpu, bool); 2] =
    [("skylake", BochsCpu::SkylakeX, true), ("arrandale", BochsCpu::Arrandale, false)];

/// Ways in which the guest `garbage` misbehaves: a name and its command line.
const MISDEEDS: [(&str, &str); 8] = [
    ("jump", "jump"),
    ("jump_noise", "jump noise"),
    ("triple_fault", "triple"),
    ("wild_1", "wild seed=1"),
    ("wild_2", "wild seed=2"),
    ("wild_3", "wild seed=3"),
    ("flood", "flood"),
    ("hostile_npt", "hostile-npt"),
];

/// Those that are also tried on shadow tables in QEMU, and in Bochs.
const SHADOWED_MISDEEDS: [&str; 5] = ["jump", "wild_1", "wild_2", "flood", "hostile_npt"];
const SHADOWED_MISDEED_IN_BOCHS: &str = "jump";

/// Places for a page-map level 4 that is none, which leave a guest no way to handle its fault.
const BAD_ROOTS: [&str; 5] = ["cr3-in-mmio", "cr3-in-lapic", "cr3-in-hole", "cr3-beyond-ram", "cr3-in-rom"];

/// One scenario for each guest with cases and each largest page that may back its memory, one for each guest and each
/// of Bochs's processors, one for each misdeed.
pub(super) fn all() -> Vec<Scenario> {
    let mut all = Vec::new();
    let with_cases = names().into_iter().filter(|name| !WITHOUT_CASES.contains(&name.as_str()));
    let with_cases: Vec<_> = with_cases.collect();
    for name in &with_cases {
        for config in ["page_size = \"4K\"", "page_size = \"auto\"", SHADOW] {
            if config == SHADOW && NOT_SHADOWED_IN_QEMU.contains(&name.as_str()) {
                continue;
            }
            let guest = name.clone();
            let scenario = move |ctx: &Ctx| report(ctx, &ctx.machine(), &guest, config, "");
            let word = config.split('"').nth(1).unwrap_or_default();
            all.push(Scenario::new(format!("guest_{name}_{word}"), scenario).limit(240));
        }
    }
    for (model, cpu) in IN_BOCHS {
        for name in &with_cases {
            let guest = name.clone();
            let scenario = move |ctx: &Ctx| report(ctx, &ctx.bochs(cpu), &guest, "", "");
            let scenario = Scenario::new(format!("bochs_{model}_{name}"), scenario);
            all.push(scenario.needs(&[Need::Grub, Need::Bochs]).limit(240));
        }
    }
    for (model, cpu) in SHADOWED_IN_BOCHS {
        for name in &with_cases {
            let guest = name.clone();
            let words = if cpu == BochsCpu::Penryn { "no-preemption-timer" } else { "" };
            let scenario = move |ctx: &Ctx| report(ctx, &ctx.bochs(cpu), &guest, SHADOW, words);
            let scenario = Scenario::new(format!("bochs_{model}_{name}_shadow"), scenario);
            all.push(scenario.needs(&[Need::Grub, Need::Bochs]).limit(240));
        }
    }
    for (word, config) in [("direct", ""), ("shadow", SHADOW)] {
        // Its processors are each a processor of the machine.
        let scenario = move |ctx: &Ctx| {
            let machine = Machine { cpus: 4, ..ctx.machine() };
            report(ctx, &machine, "hostile_paging", config, "")
        };
        all.push(Scenario::new(format!("guest_hostile_paging_{word}_4_cpus"), scenario).limit(240));
    }
    for name in WITH_X2APIC {
        let scenario = move |ctx: &Ctx| report(ctx, &ctx.machine(), name, "", "x2apic");
        all.push(Scenario::new(format!("guest_{name}_x2apic"), scenario).limit(240));
        for (model, cpu, virtual_apic) in X2APIC_IN_BOCHS {
            let words = if virtual_apic { "x2apic virtual-apic" } else { "x2apic" };
            let scenario = move |ctx: &Ctx| report(ctx, &ctx.bochs(cpu), name, "", words);
            let scenario = Scenario::new(format!("bochs_{model}_{name}_x2apic"), scenario);
            all.push(scenario.needs(&[Need::Grub, Need::Bochs]).limit(240));
        }
    }
    all.push(Scenario::new("direct_paging_takes_no_exits", |ctx| no_exits(ctx, &ctx.machine())).limit(240));
    let in_bochs = Scenario::new("bochs_skylake_direct_paging_takes_no_exits", |ctx| {
        no_exits(ctx, &ctx.bochs(BochsCpu::SkylakeX))
    });
    all.push(in_bochs.needs(&[Need::Grub, Need::Bochs]).limit(240));
    all.push(Scenario::new("shadow_paging_costs_what_it_may", costs_on_shadows).limit(240));
    all.push(Scenario::new("other_vms_go_on", other_vms_go_on).limit(240));
    for (name, cmdline) in MISDEEDS {
        let scenario = move |ctx: &Ctx| misdeed(ctx, &ctx.machine(), cmdline, "");
        all.push(Scenario::new(format!("garbage_{name}"), scenario).limit(240));
        if SHADOWED_MISDEEDS.contains(&name) {
            let scenario = move |ctx: &Ctx| misdeed(ctx, &ctx.machine(), cmdline, SHADOW);
            all.push(Scenario::new(format!("garbage_{name}_shadow"), scenario).limit(240));
        }
        if name == SHADOWED_MISDEED_IN_BOCHS {
            let scenario = move |ctx: &Ctx| misdeed(ctx, &ctx.bochs(BochsCpu::SkylakeX), cmdline, SHADOW);
            let scenario = Scenario::new(format!("bochs_skylake_garbage_{name}_shadow"), scenario);
            all.push(scenario.needs(&[Need::Grub, Need::Bochs]).limit(240));
        }
    }
    all.push(Scenario::new("bad_roots_shadow", bad_roots).limit(240));
    let reserved = Scenario::new("bochs_penryn_root_in_reserved_pages", |ctx| {
        let reason = "the guest's page tables begin outside its RAM";
        bad_root(ctx, &ctx.bochs(BochsCpu::Penryn), "cr3-in-reserved-pages", reason)
    });
    all.push(reserved.needs(&[Need::Grub, Need::Bochs]).limit(240));
    all
}

/// The guests are the binaries of their crate.
fn names() -> Vec<String> {
    let bins = paths::workspace_root().join("tests/guests/src/bin");
    let mut names: Vec<String> = fs::read_dir(bins)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

fn report(ctx: &Ctx, machine: &Machine, guest: &str, config: &str, more_words: &str) -> Result<Cases> {
    let mut words = format!("{} {more_words}", platform_word(machine));
    if config == SHADOW {
        words.push_str(" shadow");
    }
    let mut more = format!("{config}\n");
    let mut bundle_files = Vec::new();
    match guest {
        // What this guest wants to find is described at its top.
        "fwcfg_multiboot" => {
            words.push_str(" cmdline-test key=value");
            more.push_str("modules = [\"module-a first\", \"module-b second one\"]\n");
            let text = b"umbra module".repeat(1000);
            bundle_files = vec![("module-a", text[..5000].to_vec()), ("module-b", text[..12].to_vec())];
        }
        "smp" | "hostile_paging" => more.push_str("vcpus = 4\n"),
        _ => {}
    }
    let mut bundle = bundle(ctx, guest, &words, &more)?;
    for (name, data) in bundle_files {
        bundle = bundle.file(name, data);
    }
    let outcome = ctx.boot(machine, &bundle)?.end()?;
    let mut cases = Cases::reported_in(&outcome.log);
    let failed = cases.count(is_failure) > 0;
    cases.require(failed || outcome.status == Some(ALL_PASSED), || {
        format!("the run ended with {:?} instead of status {ALL_PASSED}", outcome.status)
    });
    Ok(cases)
}

/// With nested paging a guest's own paging is the processor's affair: nothing that `bench mmu` counts exits.
fn no_exits(ctx: &Ctx, machine: &Machine) -> Result<Cases> {
    bench_mmu(ctx, machine, "mmu = \"direct\"", mmu::exits_in_log)
}

/// Counted by the emulator, and so the same each time: what a guest's own paging costs on shadow tables.
fn costs_on_shadows(ctx: &Ctx) -> Result<Cases> {
    let machine = Machine { icount: Icount::On, cpus: 1, ..ctx.machine() };
    bench_mmu(ctx, &machine, SHADOW, mmu::above_target_in_log)
}

/// Runs the guest of `bench mmu`, in whose log `wrong` finds what must not be there.
fn bench_mmu(
    ctx: &Ctx,
    machine: &Machine,
    config: &str,
    wrong: fn(&str) -> Result<Option<String>>,
) -> Result<Cases> {
    let bundle = bundle(ctx, "bench_mmu", platform_word(machine), config)?;
    match wrong(&ctx.boot(machine, &bundle)?.end()?.log)? {
        Some(why) => bail!("{why}"),
        None => Ok(Cases::passed()),
    }
}

/// Beside a VM that triple-faults, one that never stops computing and one that resets itself again and again, a guest
/// passes its cases as if it were alone.
fn other_vms_go_on(ctx: &Ctx) -> Result<Cases> {
    let mut config = String::from(
        "[[vm]]\nname = \"good\"\nmemory = \"64M\"\nkernel = \"good\"\ncmdline = \"tcg\"\nexit_port = 0xf4\n",
    );
    for name in ["faulty", "busy", "restless"] {
        config += &format!("[[vm]]\nname = \"{name}\"\nmemory = \"16M\"\nkernel = \"{name}\"\n");
    }
    let bundle = Bundle::new(config)
        .file_from("good", &ctx.images.guest("port_mmio"))?
        // UD2, which without an interrupt table is a triple fault
        .file("faulty", payload::multiboot(&[0x0f, 0x0b]))
        // jmp $
        .file("busy", payload::multiboot(&[0xeb, 0xfe]))
        // mov dx, 0xcf9; mov al, 6; out dx, al
        .file("restless", payload::multiboot(&[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0xfe]));
    let mut vm = ctx.boot(&ctx.machine(), &bundle)?;
    vm.expect("^umbra: vm \"faulty\": stopped: triple fault")?;
    vm.expect("^umbra: vm \"restless\": reset")?;
    vm.expect("^umbra: vm \"good\": exit port wrote 0x00")?;
    let log = vm.log();
    let mut cases = Cases::reported_in(&log);
    cases.require(!log.contains("umbra: panic"), || "Umbra itself panicked".into());
    Ok(cases)
}

pub(super) fn bundle(ctx: &Ctx, guest: &str, cmdline: &str, more: &str) -> Result<Bundle> {
    let config = format!(
        "[[vm]]\nname = \"{guest}\"\nmemory = \"64M\"\nkernel = \"{guest}\"\ncmdline = \"{}\"\n\
         exit_port = 0xf4\non_reset = \"stop\"\n{more}",
        cmdline.trim()
    );
    Bundle::new(config).file_from(guest, &ctx.images.guest(guest))
}

/// Whatever the guest does and however it ends, Umbra lives to say so.
fn misdeed(ctx: &Ctx, machine: &Machine, cmdline: &str, config: &str) -> Result<Cases> {
    let shadow = if config == SHADOW { "shadow" } else { "" };
    let words = format!("{} {shadow} {cmdline}", platform_word(machine));
    let outcome = ctx.boot(machine, &bundle(ctx, "garbage", &words, &format!("{config}\n"))?)?.end()?;
    ensure!(!outcome.log.contains("umbra: panic"), "Umbra itself panicked");
    let ended = outcome.log.lines().any(|line| line.starts_with("umbra: vm \"garbage\": "));
    ensure!(ended, "Umbra does not say how the guest ended");
    match outcome.status {
        Some(0..=64) | Some(67..) => Ok(Cases::passed()),
        Some(status) => bail!("Umbra ended with status {status}"),
        None => bail!("the machine died with the guest"),
    }
}

/// A root where no table can be is one whose every walk faults: with the first fetch that is a triple fault, and the VM's end
/// alone.
fn bad_roots(ctx: &Ctx) -> Result<Cases> {
    for variant in BAD_ROOTS {
        let machine = Machine { dir: ctx.dir.join(variant), ..ctx.machine() };
        bad_root(ctx, &machine, variant, "triple fault")?;
    }
    Ok(Cases::passed())
}

/// On shadow tables a guest with a root in this place is stopped for this reason.
fn bad_root(ctx: &Ctx, machine: &Machine, variant: &str, reason: &str) -> Result<Cases> {
    let words = format!("{} shadow hostile-npt variant={variant}", platform_word(machine));
    let vm = ctx.boot(machine, &bundle(ctx, "garbage", &words, &format!("{SHADOW}\n"))?)?;
    let log = vm.end_with(64)?.log;
    let ended = log.lines().find(|line| line.starts_with("umbra: vm \"garbage\": stopped: "));
    let ended = ended.with_context(|| format!("{variant}: Umbra does not say how the guest ended"))?;
    ensure!(ended.contains(reason), "{variant}: `{ended}` is not for \"{reason}\"");
    Ok(Cases::passed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_guest_is_known() {
        assert!(!names().is_empty());
    }
}
