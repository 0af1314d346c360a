//! `bench mmu-host`: what the hot paths of `mmu` cost on the host, in instructions (by callgrind) and time (by criterion), beside
//! crates that do the same. The crate `mmu-bench` does the work; here it is run, read and judged.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{bail, Context, Result};

use super::grouped;
use crate::exec::CommandLine;
use crate::setup::{self, Component};
use crate::{paths, say};

/// The command line of `bench mmu-host`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// One line of JSON on standard output
    #[arg(long)]
    json: bool,
}

/// A case of `mmu-bench`.
struct Case {
    key: &'static str,
    name: &'static str,
    /// Whether the other crates do it, too.
    peers: bool,
}

const UMBRA: &str = "umbra";
/// What a user of crates.io would take instead.
const PEERS: [&str; 2] = ["x86_64", "page_table_multiarch"];

const CASES: [Case; 15] = [
    Case { key: "walk", name: "walk of 4 levels, by slots", peers: true },
    Case { key: "walk_flat", name: "walk of 4 levels, flat memory", peers: false },
    Case { key: "fault_4k", name: "direct fault, 4K", peers: true },
    Case { key: "fault_spurious", name: "direct fault, mapped already", peers: false },
    Case { key: "fault_fast", name: "first write, by the fast path", peers: false },
    Case { key: "populate_4k", name: "populate 1 GiB by 4K", peers: true },
    Case { key: "populate_2m", name: "populate 1 GiB by 2M", peers: true },
    Case { key: "populate_1g", name: "populate 1 GiB by 1G", peers: true },
    Case { key: "harvest", name: "dirty-log harvest of 1 GiB", peers: false },
    Case { key: "shadow_fault", name: "shadow fault, with its walk", peers: false },
    Case { key: "gpte_write", name: "emulated gPTE write", peers: false },
    Case { key: "cr3_switch", name: "CR3 switch, root cached", peers: false },
    Case { key: "cr3_flush", name: "the same, flushed and synced", peers: false },
    Case { key: "wp_toggle", name: "CR0.WP toggle, root cached", peers: false },
    Case { key: "nested_fault", name: "nested fault, with its walk", peers: false },
];

/// What one operation costs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Cost {
    instructions: f64,
    nanoseconds: f64,
}

/// Everything that was measured.
#[derive(Clone, Debug, Default, PartialEq)]
struct Measured {
    /// By case and whose it is.
    costs: BTreeMap<(String, String), Cost>,
    /// Bytes of the tables of a populated gigabyte, by page size.
    table_bytes: BTreeMap<String, u64>,
    /// Nanoseconds that a fixed amount of work takes, by whose it is and the number of threads.
    parallel: BTreeMap<(String, u32), u64>,
}

/// A target, what came of it, and whether that is enough.
struct Verdict {
    key: &'static str,
    name: String,
    found: String,
    met: bool,
}

/// Runs all cases and prints a table, or a line of JSON.
pub(super) fn bench(options: &Options) -> Result<ExitCode> {
    setup::ensure(&[Component::Valgrind])?;
    CommandLine::new("cargo")
        .args(["build", "--release", "-p", "mmu-bench"])
        .dir(paths::workspace_root())
        .run_on_stderr()?;
    let program = paths::target_dir().join("release/mmu-bench");
    let measured = measure(&program)?;
    let machine = machine();
    if options.json {
        println!("{}", to_json(&measured, &machine));
    } else {
        print!("{}", table(&measured, &machine));
        say!("instructions are exact; times depend on what else the machine does");
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(program: &Path) -> Result<Measured> {
    let mut measured = Measured::default();
    for case in &CASES {
        say!("counting {}", case.name);
        for who in subjects(case) {
            let text = callgrind(program, case.key, who).read()?;
            let instructions = instructions_in(&text)
                .with_context(|| format!("callgrind counted nothing for `{}` of `{who}`", case.key))?;
            let cost = Cost { instructions, nanoseconds: 0.0 };
            measured.costs.insert((case.key.into(), who.into()), cost);
        }
    }
    say!("timing: takes about a minute");
    let folder = paths::target_dir().join("bench/mmu-host");
    measured.read_times(&CommandLine::new(program).arg("time").arg(folder).read()?)?;
    measured.read_lines(&CommandLine::new(program).arg("memory").read()?)?;
    measured.read_lines(&CommandLine::new(program).arg("parallel").read()?)?;
    Ok(measured)
}

fn subjects(case: &Case) -> impl Iterator<Item = &'static str> {
    let peers = case.peers;
    [UMBRA].into_iter().chain(PEERS.into_iter().filter(move |_| peers))
}

/// Counts inside one function of the program; the report comes with the program's own output.
fn callgrind(program: &Path, key: &str, who: &str) -> CommandLine {
    CommandLine::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--log-fd=1"])
        .args(["--toggle-collect=*measured_operations*"])
        .arg(program)
        .args(["count", key, who])
}

/// Instructions of one operation: what callgrind collected, by the operations that the program says it was.
fn instructions_in(text: &str) -> Option<f64> {
    let collected = text.lines().find_map(|line| line.split_once("Collected :"))?.1;
    let collected: u64 = collected.trim().replace(',', "").parse().ok()?;
    Some(collected as f64 / operations_in(text.lines())?).filter(|&each| each > 0.0)
}

fn operations_in<'t>(mut lines: impl Iterator<Item = &'t str>) -> Option<f64> {
    let operations = lines.find_map(|line| line.trim_end().strip_prefix("mmu-host operations "))?;
    operations.parse().ok().filter(|&operations: &f64| operations > 0.0)
}

impl Measured {
    fn cost(&self, key: &str, who: &str) -> Cost {
        self.costs.get(&(key.into(), who.into())).copied().unwrap_or_default()
    }

    /// Reads pairs of lines, `mmu-host operations N` and `mmu-host time CASE WHO NANOSECONDS`.
    fn read_times(&mut self, text: &str) -> Result<()> {
        let mut operations = None;
        for line in text.lines() {
            operations = operations_in([line].into_iter()).or(operations);
            let Some(rest) = line.trim_end().strip_prefix("mmu-host time ") else { continue };
            let words: Vec<&str> = rest.split(' ').collect();
            let read = match (&words[..], operations.take()) {
                ([key, who, all], Some(operations)) => {
                    all.parse::<f64>().ok().map(|all| ((*key, *who), all / operations))
                }
                _ => None,
            };
            let Some(((key, who), nanoseconds)) = read else { bail!("`{line}` is no measurement") };
            match self.costs.get_mut(&(key.into(), who.into())) {
                Some(cost) => cost.nanoseconds = nanoseconds,
                None => bail!("`{key}` of `{who}` is no case of this benchmark"),
            }
        }
        match self.costs.iter().find(|(_, cost)| cost.nanoseconds == 0.0) {
            Some(((key, who), _)) => bail!("there is no time for `{key}` of `{who}`"),
            None => Ok(()),
        }
    }

    /// Reads the lines `mmu-host memory SIZE BYTES` and `mmu-host parallel WHO THREADS NANOSECONDS`.
    fn read_lines(&mut self, text: &str) -> Result<()> {
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["mmu-host", "memory", size, bytes] => {
                    self.table_bytes.insert(size.into(), bytes.parse().context("bytes are a number")?);
                }
                ["mmu-host", "parallel", who, threads, time] => {
                    let threads = threads.parse().context("threads are a number")?;
                    self.parallel.insert((who.into(), threads), time.parse().context("a time is a number")?);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// How much faster `threads` threads are than one.
    fn gain(&self, who: &str, threads: u32) -> f64 {
        let time = |threads| self.parallel.get(&(who.into(), threads)).copied().unwrap_or(0) as f64;
        time(1) / time(threads).max(1.0)
    }

    fn verdicts(&self) -> Vec<Verdict> {
        let instructions = |key, who| self.cost(key, who).instructions;
        let mut all = Vec::new();
        for (key, most) in [("walk", 140.0), ("walk_flat", 100.0)] {
            let found = instructions(key, UMBRA);
            let name = format!("{} in at most {most} instructions", name_of(key));
            all.push(Verdict { key, name, found: format!("{found:.0}"), met: found <= most });
        }
        let factor = instructions("fault_4k", UMBRA) / instructions("fault_4k", PEERS[0]);
        all.push(Verdict {
            key: "fault_4k",
            name: "direct fault in at most twice the instructions of OffsetPageTable::map_to".into(),
            found: format!("{factor:.2} times"),
            met: factor <= 2.0,
        });
        for key in ["populate_4k", "populate_2m", "populate_1g"] {
            let best = PEERS.map(|who| instructions(key, who)).into_iter().fold(f64::INFINITY, f64::min);
            let share = instructions(key, UMBRA) / best;
            let name = format!("{} in fewer instructions than either crate", name_of(key));
            all.push(Verdict { key, name, found: format!("{share:.2} of the better"), met: share < 1.0 });
        }
        let share = self.gain(UMBRA, 2) / self.gain("private", 2);
        all.push(Verdict {
            key: "parallel",
            name: "two threads gain at least 0.85 of what private memory gains".into(),
            found: format!("{share:.2}"),
            met: share >= 0.85,
        });
        for (key, size, most) in [("tables_4k", "4k", (21 << 20) / 10), ("tables_1g", "1g", 8 << 10)] {
            let bytes = self.table_bytes.get(size).copied().unwrap_or(u64::MAX);
            let name =
                format!("tables of 1 GiB by {} in at most {} bytes", size.to_uppercase(), grouped(most));
            all.push(Verdict { key, name, found: grouped(bytes), met: bytes <= most });
        }
        all
    }
}

fn name_of(key: &str) -> &'static str {
    CASES.iter().find(|case| case.key == key).map_or("", |case| case.name)
}

/// The processor and the compiler.
fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("an unknown processor", |(_, model)| model.trim());
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let compiler = CommandLine::new("rustc").arg("--version").read().unwrap_or_default();
    format!("{model}, {cpus} CPUs, {}", compiler.split(" (").next().unwrap_or_default().trim())
}

/// One line, its cases in the table's order.
fn to_json(measured: &Measured, machine: &str) -> String {
    let object = |members: Vec<String>| format!("{{{}}}", members.join(","));
    let mut members = vec![format!(r#""machine":"{}""#, machine.replace(['"', '\\'], "'"))];
    for case in &CASES {
        let costs = subjects(case).map(|who| {
            let Cost { instructions, nanoseconds } = measured.cost(case.key, who);
            format!(r#""{who}":{{"instructions":{instructions:.1},"ns":{nanoseconds:.2}}}"#)
        });
        members.push(format!(r#""{}":{}"#, case.key, object(costs.collect())));
    }
    let bytes = measured.table_bytes.iter().map(|(size, bytes)| format!(r#""{size}":{bytes}"#));
    members.push(format!(r#""table_bytes":{}"#, object(bytes.collect())));
    let parallel = [UMBRA, "private"].map(|who| {
        let times = measured.parallel.iter().filter(|((of, _), _)| of == who);
        let times = times.map(|((_, threads), time)| format!(r#""{threads}":{time}"#));
        format!(r#""{who}":{}"#, object(times.collect()))
    });
    members.push(format!(r#""parallel_ns":{}"#, object(parallel.into())));
    let verdicts = measured.verdicts();
    let verdicts = verdicts.iter().map(|verdict| format!(r#""{}":{}"#, verdict.key, verdict.met));
    members.push(format!(r#""targets":{}"#, object(verdicts.collect())));
    object(members)
}

/// The same to be read.
fn table(measured: &Measured, machine: &str) -> String {
    let line = |name: &str, columns: [String; 6]| {
        let columns: String = columns.iter().map(|column| format!(" {column:>12}")).collect();
        format!("{}\n", format!("{name:<30}{columns}").trim_end())
    };
    let heads = ["umbra", "ns", "x86_64", "ns", "multiarch", "ns"];
    let mut text =
        format!("on {machine}\n") + &line("operation (instructions, time)", heads.map(str::to_owned));
    for case in &CASES {
        let mut columns = [const { String::new() }; 6];
        for (at, who) in subjects(case).enumerate() {
            let cost = measured.cost(case.key, who);
            columns[2 * at] = grouped(cost.instructions.round() as u64);
            columns[2 * at + 1] = match cost.nanoseconds {
                short if short < 1000.0 => format!("{short:.1}"),
                long => grouped(long.round() as u64),
            };
        }
        text += &line(case.name, columns);
    }
    for (size, bytes) in &measured.table_bytes {
        text += &format!("tables of 1 GiB by {:<11} {:>12} bytes\n", size.to_uppercase(), grouped(*bytes));
    }
    for ((who, threads), time) in &measured.parallel {
        let gain = measured.gain(who, *threads);
        text += &format!("parallel, {who}, {threads} threads: {} ns, gain {gain:.2}\n", grouped(*time));
    }
    for Verdict { name, found, met, .. } in measured.verdicts() {
        text += &format!("{}: {name}: {found}\n", if met { "met" } else { "missed" });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};

    const REPORT: &str = "==7== Callgrind, a call-graph generating cache profiler\nmmu-host operations 100\n\
                          ==7== Events    : Ir\n==7== Collected : 11600\n==7==\n";

    /// All cases: 100 instructions and a time of 50 ns, other crates 120 and 60.
    fn measured() -> Measured {
        let mut measured = Measured::default();
        let mut times = "Benchmarking walk/umbra: Warming up\n".to_owned();
        for case in &CASES {
            for who in subjects(case) {
                let (instructions, time) = if who == UMBRA { (100.0, 500) } else { (120.0, 600) };
                let cost = Cost { instructions, nanoseconds: 0.0 };
                measured.costs.insert((case.key.into(), who.into()), cost);
                times += &format!("mmu-host operations 10\nmmu-host time {} {who} {time}.0\n", case.key);
            }
        }
        measured.read_times(&times).unwrap();
        measured
            .read_lines(
                "mmu-host memory 4k 2109440\nmmu-host memory 2m 12288\nmmu-host memory 1g 8192\n\
                 mmu-host parallel umbra 1 1000\nmmu-host parallel umbra 2 550\nmmu-host parallel umbra 4 600\n\
                 mmu-host parallel private 1 2000\nmmu-host parallel private 2 1000\n",
            )
            .unwrap();
        measured
    }

    #[test]
    fn callgrinds_report_becomes_instructions_of_one_operation() {
        assert_eq!(instructions_in(REPORT), Some(116.0));
        assert_eq!(instructions_in(&REPORT.replace("11600", "1,160,000")), Some(11600.0));
        for broken in [
            REPORT.replace("11600", "0"),
            REPORT.replace("Collected", "Selected"),
            REPORT.replace("operations 100", "operations 0"),
            REPORT.replace("operations 100", "operations many"),
            REPORT.replace("mmu-host", "host"),
        ] {
            assert_eq!(instructions_in(&broken), None, "{broken}");
        }
    }

    #[test]
    fn callgrind_counts_one_function_of_one_case() {
        let line = callgrind(Path::new("mmu-bench"), "walk", "x86_64").to_string();
        assert!(line.starts_with("valgrind --tool=callgrind"), "{line}");
        assert!(line.contains("measured_operations"), "{line}");
        assert!(line.ends_with("mmu-bench count walk x86_64"), "{line}");
    }

    #[test]
    fn times_are_of_one_operation() {
        assert_eq!(measured().cost("walk", UMBRA), Cost { instructions: 100.0, nanoseconds: 50.0 });
        assert_eq!(measured().cost("fault_4k", "x86_64").nanoseconds, 60.0);
        let mut broken = measured();
        for text in [
            "mmu-host time walk umbra 1.0\n",
            "mmu-host operations 1\nmmu-host time walk umbra fast\n",
            "mmu-host operations 1\nmmu-host time fly umbra 1.0\n",
            "mmu-host operations 1\nmmu-host time walk 1.0\n",
        ] {
            assert!(broken.read_times(text).is_err(), "{text}");
        }
        broken.costs.insert(("walk".into(), "other".into()), Cost::default());
        assert!(broken.read_times("").unwrap_err().to_string().contains("no time for `walk` of `other`"));
    }

    #[test]
    fn targets_are_judged() {
        let met = |measured: &Measured| -> Vec<bool> { measured.verdicts().iter().map(|v| v.met).collect() };
        let mut measured = measured();
        assert_eq!(met(&measured), [true; 9]);
        for case in &CASES {
            let cost = Cost { instructions: 241.0, nanoseconds: 1.0 };
            measured.costs.insert((case.key.into(), UMBRA.into()), cost);
        }
        measured
            .read_lines(
                "mmu-host parallel umbra 2 800\nmmu-host memory 4k 2300000\nmmu-host memory 1g 8193\n",
            )
            .unwrap();
        assert_eq!(met(&measured), [false; 9]);
        assert!(measured.read_lines("mmu-host memory 4k many\n").is_err());
    }

    #[test]
    fn json_is_one_line_with_every_case_and_verdict() {
        let text = to_json(&measured(), "a \"fast\" machine");
        assert!(!text.contains('\n'));
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["walk"]["umbra"], json!({ "instructions": 100.0, "ns": 50.0 }));
        assert_eq!(value["walk"]["page_table_multiarch"]["ns"], json!(60.0));
        assert_eq!(value["table_bytes"]["2m"], json!(12288));
        assert_eq!(value["parallel_ns"]["umbra"]["4"], json!(600));
        assert_eq!(value["targets"]["parallel"], json!(true));
        assert!(CASES.iter().all(|case| value[case.key]["umbra"].is_object()));
        assert_eq!(value["targets"].as_object().unwrap().len(), measured().verdicts().len());
    }

    #[test]
    fn the_table_has_a_line_for_each_case_and_verdict() {
        let text = table(&measured(), "a machine");
        assert!(text.starts_with("on a machine\n"), "{text}");
        assert_eq!(text.lines().count(), 2 + CASES.len() + 3 + 5 + 9, "{text}");
        assert!(text.contains("parallel, umbra, 2 threads: 550 ns, gain 1.82\n"), "{text}");
        assert!(
            text.contains("met: two threads gain at least 0.85 of what private memory gains: 0.91\n"),
            "{text}"
        );
    }
}
