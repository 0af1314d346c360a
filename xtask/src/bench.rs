//! `bench exits`: what an exit costs, counted in instructions by a test guest while QEMU counts for it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::bundle::Bundle;
use crate::emulator::{Icount, Machine, Session};
use crate::setup::{self, Component};
use crate::{build, paths, say};

/// The guest needs seconds; a guest that hangs must not.
const LIMIT: Duration = Duration::from_secs(600);

/// The command line of `bench`.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Bench {
    /// Instructions and exits per operation of a guest
    Exits {
        /// One line of JSON on standard output
        #[arg(long)]
        json: bool,
    },
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

/// Runs a benchmark.
pub fn bench(bench: &Bench) -> Result<ExitCode> {
    let Bench::Exits { json } = bench;
    let ready = setup::ensure(&[Component::Target, Component::Qemu])?;
    let images = build::build(ready.compiler()?)?;
    let config = "[[vm]]\nname = \"bench\"\nmemory = \"64M\"\nkernel = \"bench_exits\"\npage_size = \"4K\"\n\
                  exit_port = 0xf4\non_reset = \"stop\"\n";
    let bundle = Bundle::new(config).file_from("bench_exits", &images.guest("bench_exits"))?;
    let dir = paths::target_dir().join("bench");
    let machine = Machine { icount: Icount::On, ..Machine::new(&dir) };
    let outcome = Session::start(&machine, &bundle)?.finish(LIMIT)?;
    let costs = costs_in(&outcome.log).with_context(|| {
        format!("the benchmark failed; its log is {}", paths::display(&dir.join("console.log")))
    })?;
    if *json {
        println!("{}", to_json(&costs));
    } else {
        print!("{}", table(&costs));
        say!("instructions are exact, cache and TLB misses are not in them: QEMU counts, it does not time");
    }
    Ok(ExitCode::SUCCESS)
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

fn table(costs: &[Cost]) -> String {
    let mut text =
        format!("{:<26} {:>12} {:>6}   {}\n", "operation", "instructions", "exits", "KVM's instructions");
    for (operation, cost) in OPERATIONS.iter().zip(costs) {
        let line = format!(
            "{:<26} {:>12} {:>6}   {}",
            operation.name,
            grouped(cost.instructions),
            cost.exits,
            operation.kvm
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
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
        let text = table(&costs_in(&log()).unwrap());
        assert_eq!(text.lines().count(), 1 + OPERATIONS.len());
        assert!(text.contains("CPUID                             1,234      1   2,984\n"), "{text}");
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!((grouped(0), grouped(999)), ("0".into(), "999".into()));
    }
}
