//! `bench exits`: what an exit costs, counted in instructions by a test guest while the emulator counts for it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use super::grouped;
use crate::bundle::Bundle;
use crate::emulator::{check_model, Boot, Icount, Kind, Machine, Session};
use crate::setup::{self, Component};
use crate::size::Size;
use crate::{build, paths, say};

/// The guest needs seconds; a guest that hangs must not.
const LIMIT: Duration = Duration::from_secs(600);

/// The command line of `bench exits`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// One line of JSON on standard output
    #[arg(long)]
    json: bool,
    /// The emulator: QEMU for SVM, Bochs for VMX
    #[arg(long, value_enum, default_value_t)]
    emulator: Kind,
    /// The emulator's processor [default: the one that offers most]
    #[arg(long, value_name = "MODEL")]
    cpu: Option<String>,
}

/// An operation, and what it costs under KVM in the same emulator, where that is known: Linux 6.1 with
/// `mitigations=off` and nested paging on QEMU 7.2, as the guest's RDTSC counts.
struct Operation {
    key: &'static str,
    name: &'static str,
    kvm: &'static str,
}

const OPERATIONS: [Operation; 9] = [
    Operation { key: "cpuid", name: "CPUID", kvm: "2,984" },
    Operation { key: "rdmsr", name: "RDMSR", kvm: "2,972" },
    Operation { key: "wrmsr", name: "WRMSR", kvm: "3,802" },
    Operation { key: "port_in", name: "IN from a kernel device", kvm: "1,520" },
    Operation { key: "port_out", name: "OUT to a kernel device", kvm: "-" },
    Operation { key: "mmio_read", name: "MMIO read", kvm: "-" },
    Operation { key: "mmio_write", name: "MMIO write", kvm: "7,782 (3,794 by its fast path)" },
    Operation { key: "hlt_wake", name: "wake-up from HLT", kvm: "" },
    Operation { key: "npf_4k", name: "4K nested page fault", kvm: "" },
];

/// What one operation costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cost {
    instructions: u64,
    exits: u64,
}

/// Boots the guest that measures, and prints what it reports.
pub(super) fn bench(options: &Options) -> Result<ExitCode> {
    let Options { json, emulator, cpu } = options;
    let needed = match emulator {
        Kind::Qemu => &[Component::Target, Component::Qemu][..],
        Kind::Bochs => &[Component::Target, Component::Bochs, Component::Grub],
    };
    let ready = setup::ensure(needed)?;
    if let Some(model) = cpu {
        check_model(*emulator, model)?;
    }
    let images = build::build(ready.compiler()?)?;
    let config = "[[vm]]\nname = \"bench\"\nmemory = \"64M\"\nkernel = \"bench_exits\"\npage_size = \"4K\"\n\
                  exit_port = 0xf4\non_reset = \"stop\"\n";
    let bundle = Bundle::new(config).file_from("bench_exits", &images.guest("bench_exits"))?;
    let dir = paths::target_dir().join("bench");
    let machine = Machine { cpu: cpu.clone(), ..machine(*emulator, Machine::new(&dir)) };
    let outcome = Session::start(&machine, &bundle)?.finish(LIMIT)?;
    let costs = costs_in(&outcome.log).with_context(|| {
        format!("the benchmark failed; its log is {}", paths::display(&dir.join("console.log")))
    })?;
    if *json {
        println!("{}", to_json(&costs));
    } else {
        let on = virtualization(&outcome.log);
        print!("{}", table(&costs, &format!("on {}, {on}", emulator.name()), *emulator));
        say!(
            "cache and TLB misses are not in these figures: {} counts instructions, it does not time",
            emulator.name()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// A machine that counts instructions: QEMU when it is told to, Bochs always.
fn machine(emulator: Kind, plain: Machine) -> Machine {
    match emulator {
        Kind::Qemu => Machine { icount: Icount::On, ..plain },
        Kind::Bochs => Machine { kind: Kind::Bochs, boot: Boot::Iso, memory: Size::mib(512), ..plain },
    }
}

/// What Umbra says it uses.
fn virtualization(log: &str) -> &'static str {
    let uses = |word: &str| log.lines().any(|line| line.starts_with("umbra: ") && line.contains(word));
    ["SVM with nested paging", "VMX with EPT"]
        .into_iter()
        .find(|name| uses(name))
        .or_else(|| ["VMX", "SVM"].into_iter().find(|name| uses(name)))
        .unwrap_or("virtualization unknown")
}

/// The costs in the guest's lines `bench KEY instructions=N exits=N`, in the order of [`OPERATIONS`]; each once.
fn costs_in(log: &str) -> Result<[Cost; OPERATIONS.len()]> {
    let mut found = [None; OPERATIONS.len()];
    for line in log.lines() {
        let Some((key, cost)) = cost_in(line) else { continue };
        let Some(at) = OPERATIONS.iter().position(|operation| operation.key == key) else {
            bail!("the guest reports `{key}`, which is no operation of this benchmark");
        };
        if found[at].replace(cost).is_some() {
            bail!("the guest reports `{key}` twice");
        }
    }
    let missing: Vec<_> =
        OPERATIONS.iter().zip(&found).filter(|(_, cost)| cost.is_none()).map(|(o, _)| o.key).collect();
    if !missing.is_empty() {
        bail!("the guest did not report {}", missing.join(", "));
    }
    Ok(found.map(|cost| cost.unwrap_or(Cost { instructions: 0, exits: 0 })))
}

fn cost_in(line: &str) -> Option<(&str, Cost)> {
    let mut words = line.trim_end().strip_prefix("bench ")?.split(' ');
    let key = words.next()?;
    let instructions = words.next()?.strip_prefix("instructions=")?.parse().ok()?;
    let exits = words.next()?.strip_prefix("exits=")?.parse().ok()?;
    words.next().is_none().then_some((key, Cost { instructions, exits }))
}

/// One line, its keys in the table's order.
fn to_json(costs: &[Cost]) -> String {
    let member = |(operation, cost): (&Operation, &Cost)| {
        format!(r#""{}":{{"instructions":{},"exits":{}}}"#, operation.key, cost.instructions, cost.exits)
    };
    let members: Vec<_> = OPERATIONS.iter().zip(costs).map(member).collect();
    format!("{{{}}}", members.join(","))
}

/// The costs under a line that says what they were counted `on`. KVM's were counted in QEMU and stand beside those only.
fn table(costs: &[Cost], on: &str, emulator: Kind) -> String {
    let beside = |text: &'static str| if emulator == Kind::Qemu { text } else { "" };
    let line = |name: &str, instructions: &str, exits: &str, kvm: &str| {
        let line = format!("{name:<26} {instructions:>12} {exits:>6}   {kvm}");
        format!("{}\n", line.trim_end())
    };
    let mut text =
        format!("{on}\n") + &line("operation", "instructions", "exits", beside("KVM's instructions"));
    for (operation, cost) in OPERATIONS.iter().zip(costs) {
        let (instructions, exits) = (grouped(cost.instructions), cost.exits.to_string());
        text += &line(operation.name, &instructions, &exits, beside(operation.kvm));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};

    fn log() -> String {
        let lines = OPERATIONS.iter().enumerate();
        lines.map(|(n, o)| format!("bench {} instructions={} exits=1\r\n", o.key, 100 * n + 1234)).collect()
    }

    #[test]
    fn the_guests_lines_become_costs() {
        let costs = costs_in(&format!("umbra: something\n{}done 9 passed, 0 failed\n", log())).unwrap();
        assert_eq!(costs[0], Cost { instructions: 1234, exits: 1 });
        assert_eq!(costs[8], Cost { instructions: 2034, exits: 1 });
    }

    #[test]
    fn a_benchmark_is_whole_or_an_error() {
        let text = log();
        let without_hlt: String =
            text.lines().filter(|l| !l.contains("hlt_wake")).map(|l| format!("{l}\n")).collect();
        assert!(costs_in(&without_hlt).unwrap_err().to_string().contains("did not report hlt_wake"));
        assert!(costs_in(&format!("{text}bench cpuid instructions=1 exits=1\n"))
            .unwrap_err()
            .to_string()
            .contains("twice"));
        assert!(costs_in(&format!("{text}bench vmcall instructions=1 exits=1\n")).is_err());
        for line in
            ["bench cpuid", "bench cpuid instructions=x exits=1", "bench cpuid instructions=1 exits=1 more=2"]
        {
            assert_eq!(cost_in(line), None, "{line}");
        }
    }

    #[test]
    fn the_log_says_what_was_measured() {
        let log =
            |words: &str| format!("umbra: hello\r\numbra:   {words} on 1 of 1 CPUs: 16 ASIDs\r\nbench x\r\n");
        assert_eq!(virtualization(&log("SVM with nested paging")), "SVM with nested paging");
        assert_eq!(virtualization(&log("VMX with EPT")), "VMX with EPT");
        assert_eq!(virtualization(&log("VMX, EPT")), "VMX");
        assert_eq!(virtualization(""), "virtualization unknown");
    }

    #[test]
    fn json_is_one_line_with_every_key() {
        let json = to_json(&costs_in(&log()).unwrap());
        assert!(!json.contains('\n'));
        assert!(json.starts_with(r#"{"cpuid":{"instructions":1234,"exits":1},"rdmsr":"#), "{json}");
        let value: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["cpuid"], json!({ "instructions": 1234, "exits": 1 }));
        assert_eq!(value.as_object().unwrap().len(), OPERATIONS.len());
    }

    #[test]
    fn the_table_has_a_line_for_each_operation() {
        let costs = costs_in(&log()).unwrap();
        let text = table(&costs, "on QEMU, SVM", Kind::Qemu);
        assert_eq!(text.lines().count(), 2 + OPERATIONS.len());
        assert!(text.starts_with("on QEMU, SVM\n"), "{text}");
        assert!(text.contains("CPUID                             1,234      1   2,984\n"), "{text}");
        let text = table(&costs, "on Bochs, VMX", Kind::Bochs);
        assert!(text.contains("CPUID                             1,234      1\n"), "{text}");
        assert!(!text.contains("KVM"), "{text}");
    }
}
