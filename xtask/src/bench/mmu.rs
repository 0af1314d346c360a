//! `bench mmu`: what a guest's own paging costs, on nested page tables and on shadow tables, counted in instructions and
//! exits by a test guest.

use std::process::ExitCode;

use anyhow::{bail, Result};

use super::grouped;
use super::guest::{self, virtualization, Cost};
use super::kvm::Kvm;
use crate::emulator::Kind;
use crate::say;

/// The command line of `bench mmu`.
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
    /// Measures KVM, too, in the same emulator, in place of the figures known for it
    #[arg(long)]
    kvm: bool,
}

/// An operation; what it costs under KVM in QEMU, with nested and with shadow paging: Linux 6.1 with `mitigations=off` on
/// QEMU 7.2, as another guest's RDTSC counts; and what it may cost here with shadow tables.
struct Operation {
    key: &'static str,
    name: &'static str,
    kvm: [u64; 2],
    target: Cost,
}

const fn operation(key: &'static str, name: &'static str, kvm: [u64; 2], target: [u64; 2]) -> Operation {
    Operation { key, name, kvm, target: Cost { instructions: target[0], exits: target[1] } }
}

const OPERATIONS: [Operation; 11] = [
    operation("first_touch", "first touch of a mapped page", [4, 5_026], [1_200, 1]),
    operation("remap_invlpg_touch", "remap, INVLPG, touch", [99, 9_273], [1_500, 2]),
    operation("invlpg", "INVLPG", [3, 3_450], [700, 1]),
    operation("cr3_reload", "CR3 reload", [12, 6_526], [700, 1]),
    operation("cr3_switch_pair", "CR3 switch pair, a touch each", [23, 6_980], [1_500, 2]),
    operation("guest_pf", "page fault, not present", [251, 15_316], [2_800, 4]),
    operation("cow", "copy-on-write fault", [257, 20_851], [3_300, 5]),
    operation("fork_page", "fork-like copy, a page", [259, 13_644], [2_000, 3]),
    operation("map_touch_unmap_page", "map, touch, unmap, a page", [243, 10_076], [1_700, 2]),
    operation("cr0_wp_toggle", "CR0.WP toggle pair", [8_904, 11_087], [1_100, 2]),
    operation("cr4_pge_toggle", "CR4.PGE toggle pair", [7_590, 7_765], [1_300, 2]),
];

/// The two ways, as umbra.toml and the keys of JSON have them.
const WAYS: [&str; 2] = ["direct", "shadow"];

/// The keys of JSON for KVM's.
const KVM_WAYS: [&str; 2] = ["kvm_npt", "kvm_shadow"];

/// Boots the guest that measures once for each way, and prints what it reports.
pub(super) fn bench(options: &Options) -> Result<ExitCode> {
    let Options { json, emulator, cpu, kvm } = options;
    if *kvm && *emulator != Kind::Qemu {
        bail!("KVM is measured in QEMU only; leave out --kvm or --emulator bochs");
    }
    let kvm = kvm.then(Kvm::ensure).transpose()?;
    let keys = OPERATIONS.map(|operation| operation.key);
    let mut costs = Vec::new();
    let mut on = "";
    for way in WAYS {
        let log = guest::run("bench_mmu", &format!("mmu = \"{way}\"\n"), *emulator, cpu.as_deref())?;
        costs.push(guest::costs_in(&log, &keys)?);
        on = virtualization(&log);
    }
    let rows = in_pairs(&costs[0], &costs[1]);
    let kvm = kvm.map(|kvm| kvm.run("bench_mmu", &keys, cpu.as_deref())).transpose()?;
    let kvm = kvm.map(|[nested, shadow]| in_pairs(&nested, &shadow));
    if *json {
        println!("{}", to_json(&rows, kvm.as_deref()));
    } else {
        let beside = match &kvm {
            _ if *emulator != Kind::Qemu => Beside::Nothing,
            None => Beside::Known,
            Some(kvm) => Beside::Measured(kvm),
        };
        print!("{}", table(&rows, &format!("on {}, {on}", emulator.name()), &beside));
        say!(
            "cache and TLB misses are not in these figures: {} counts instructions, it does not time",
            emulator.name()
        );
    }
    if let Some(why) = exits_in(&rows) {
        say!("{why}");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn in_pairs(one: &[Cost], other: &[Cost]) -> Vec<[Cost; 2]> {
    one.iter().zip(other).map(|(&one, &other)| [one, other]).collect()
}

/// What a guest's paging must not do: exit where there is a second stage.
fn exits_in(rows: &[[Cost; 2]]) -> Option<String> {
    let exiting = OPERATIONS.iter().zip(rows).filter(|(_, [direct, _])| direct.exits != 0);
    let keys: Vec<_> = exiting.map(|(operation, _)| operation.key).collect();
    (!keys.is_empty()).then(|| format!("with nested paging nothing may exit, but {} did", keys.join(", ")))
}

/// The same of the log of the guest `bench_mmu`, run with nested paging.
pub fn exits_in_log(log: &str) -> Result<Option<String>> {
    let costs = guest::costs_in(log, &OPERATIONS.map(|operation| operation.key))?;
    let rows: Vec<_> = costs.into_iter().map(|cost| [cost, cost]).collect();
    Ok(exits_in(&rows))
}

/// What is above its target in the log of the guest `bench_mmu`, run with shadow paging while QEMU counts instructions.
pub fn above_target_in_log(log: &str) -> Result<Option<String>> {
    let costs = guest::costs_in(log, &OPERATIONS.map(|operation| operation.key))?;
    let above = OPERATIONS.iter().zip(costs).filter(|(Operation { target, .. }, cost)| {
        cost.instructions > target.instructions || cost.exits > target.exits
    });
    let said: Vec<_> = above
        .map(|(Operation { key, target, .. }, cost)| {
            format!(
                "{key} takes {} instructions and {} exits where {} and {} are allowed",
                cost.instructions, cost.exits, target.instructions, target.exits
            )
        })
        .collect();
    Ok((!said.is_empty()).then(|| said.join(", ")))
}

/// One line, its keys in the table's order; KVM's after Umbra's, if they were measured.
fn to_json(rows: &[[Cost; 2]], kvm: Option<&[[Cost; 2]]>) -> String {
    let cost = |way: &str, cost: &Cost| {
        format!(r#""{way}":{{"instructions":{},"exits":{}}}"#, cost.instructions, cost.exits)
    };
    let pair = |ways: [&str; 2], [one, other]: &[Cost; 2]| [cost(ways[0], one), cost(ways[1], other)];
    let member = |(at, (operation, row)): (usize, (&Operation, &[Cost; 2]))| {
        let mut costs = pair(WAYS, row).to_vec();
        costs.extend(kvm.map(|kvm| pair(KVM_WAYS, &kvm[at])).into_iter().flatten());
        format!(r#""{}":{{{}}}"#, operation.key, costs.join(","))
    };
    let members: Vec<_> = OPERATIONS.iter().zip(rows).enumerate().map(member).collect();
    format!("{{{}}}", members.join(","))
}

/// What stands beside Umbra's costs. KVM's, and the targets, are for QEMU and stand beside those only.
enum Beside<'a> {
    Nothing,
    /// The targets, and the figures of [`OPERATIONS`].
    Known,
    /// The targets, and what was measured in the same run.
    Measured(&'a [[Cost; 2]]),
}

/// The costs under a line that says what they were counted `on`.
fn table(rows: &[[Cost; 2]], on: &str, beside: &Beside<'_>) -> String {
    let mut text = format!(
        "{on}\n{:<30} {:>8} {:>5} {:>8} {:>5}",
        "operation: instructions, exits", "direct", "", "shadow", ""
    );
    text += &match beside {
        Beside::Nothing => String::new(),
        Beside::Known => format!(" {:>8} {:>5}   {:>8} {:>8}", "target", "", "KVM npt", "no npt"),
        Beside::Measured(_) => {
            format!(" {:>8} {:>5}   {:>8} {:>5} {:>8}", "target", "", "KVM npt", "", "no npt")
        }
    };
    text.truncate(text.trim_end().len());
    text.push('\n');
    for (at, (operation, [direct, shadow])) in OPERATIONS.iter().zip(rows).enumerate() {
        let cost = |cost: &Cost| format!(" {:>8} {:>5}", grouped(cost.instructions), cost.exits);
        text += &format!("{:<30}{}{}", operation.name, cost(direct), cost(shadow));
        text += &match beside {
            Beside::Nothing => String::new(),
            Beside::Known => {
                let [nested, without] = operation.kvm.map(grouped);
                format!("{}   {nested:>8} {without:>8}", cost(&operation.target))
            }
            Beside::Measured(kvm) => {
                let [nested, without] = &kvm[at];
                format!("{}  {}{}", cost(&operation.target), cost(nested), cost(without))
            }
        };
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};

    fn rows() -> Vec<[Cost; 2]> {
        let cost = |instructions, exits| Cost { instructions, exits };
        (0..OPERATIONS.len() as u64).map(|n| [cost(n, 0), cost(1000 + n, 1)]).collect()
    }

    #[test]
    fn json_is_one_line_with_every_key() {
        let json = to_json(&rows(), None);
        assert!(!json.contains('\n'));
        let value: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            value["invlpg"],
            json!({ "direct": { "instructions": 2, "exits": 0 }, "shadow": { "instructions": 1002, "exits": 1 } })
        );
        assert_eq!(value.as_object().unwrap().len(), OPERATIONS.len());
    }

    #[test]
    fn kvm_has_members_of_its_own_in_json() {
        let kvm = rows().into_iter().map(|[one, other]| [other, one]).collect::<Vec<_>>();
        let value: Value = serde_json::from_str(&to_json(&rows(), Some(&kvm))).unwrap();
        assert_eq!(value["invlpg"]["kvm_npt"], json!({ "instructions": 1002, "exits": 1 }));
        assert_eq!(value["invlpg"]["kvm_shadow"], value["invlpg"]["direct"]);
        assert!(value.as_object().unwrap().values().all(|member| member.as_object().unwrap().len() == 4));
    }

    #[test]
    fn an_exit_with_nested_paging_is_an_error() {
        let mut rows = rows();
        assert_eq!(exits_in(&rows), None);
        rows[10][0].exits = 2;
        assert!(exits_in(&rows).unwrap().contains("cr4_pge_toggle"));
        let line = |(n, operation): (usize, &Operation)| {
            format!("bench {} instructions=3 exits={}\n", operation.key, u8::from(n == 2))
        };
        let log: String = OPERATIONS.iter().enumerate().map(line).collect();
        assert!(exits_in_log(&log).unwrap().unwrap().contains("but invlpg did"));
        assert!(exits_in_log("").is_err());
    }

    #[test]
    fn what_is_above_its_target_is_named() {
        let log = |more: u64| -> String {
            let line = |Operation { key, target, .. }: &Operation| {
                let more = if *key == "cow" { more } else { 0 };
                format!("bench {key} instructions={} exits={}\n", target.instructions + more, target.exits)
            };
            OPERATIONS.iter().map(line).collect()
        };
        assert_eq!(above_target_in_log(&log(0)).unwrap(), None);
        let said = above_target_in_log(&log(1)).unwrap();
        assert_eq!(
            said.as_deref(),
            Some("cow takes 3301 instructions and 5 exits where 3300 and 5 are allowed")
        );
        assert!(above_target_in_log("").is_err());
    }

    #[test]
    fn the_table_has_a_line_for_each_operation() {
        let text = table(&rows(), "on QEMU, SVM", &Beside::Known);
        assert_eq!(text.lines().count(), 2 + OPERATIONS.len());
        let line = text.lines().find(|line| line.starts_with("INVLPG")).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words, ["INVLPG", "2", "0", "1,002", "1", "700", "1", "3", "3,450"]);
        let text = table(&rows(), "on QEMU, SVM", &Beside::Measured(&rows()));
        let line = text.lines().find(|line| line.starts_with("INVLPG")).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words, ["INVLPG", "2", "0", "1,002", "1", "700", "1", "2", "0", "1,002", "1"]);
        let text = table(&rows(), "on Bochs, VMX", &Beside::Nothing);
        assert!(!text.contains("KVM") && text.lines().all(|line| line == line.trim_end()), "{text}");
    }
}
