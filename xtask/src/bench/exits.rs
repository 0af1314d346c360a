//! `bench exits`: what an exit costs, counted in instructions by a test guest while the emulator counts for it.

use std::process::ExitCode;

use anyhow::Result;

use super::grouped;
use super::guest::{self, virtualization, Cost};
use crate::emulator::Kind;
use crate::say;

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

/// Boots the guest that measures, and prints what it reports.
pub(super) fn bench(options: &Options) -> Result<ExitCode> {
    let Options { json, emulator, cpu } = options;
    let log = guest::run("bench_exits", "page_size = \"4K\"\n", *emulator, cpu.as_deref())?;
    let costs = costs_in(&log)?;
    if *json {
        println!("{}", to_json(&costs));
    } else {
        let on = virtualization(&log);
        print!("{}", table(&costs, &format!("on {}, {on}", emulator.name()), *emulator));
        say!(
            "cache and TLB misses are not in these figures: {} counts instructions, it does not time",
            emulator.name()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// The costs in the guest's lines, in the order of [`OPERATIONS`].
fn costs_in(log: &str) -> Result<Vec<Cost>> {
    guest::costs_in(log, &OPERATIONS.map(|operation| operation.key))
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
