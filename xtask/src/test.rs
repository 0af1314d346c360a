//! `test`: the host's tests, the models, then the emulator scenarios, and one line that adds them up.

use std::io::{BufRead, BufReader};
use std::process::{ExitCode, ExitStatus, Stdio};

use anyhow::{Context, Result};

use crate::exec::CommandLine;
use crate::setup::{self, Component};
use crate::{build, mutants, paths, say};

/// The crates with tests that run on the host.
const HOST_CRATES: [&str; 6] = ["mmu", "mmu-fuzz", "boot", "kernel", "xtask", "tests"];

/// The command line of `test`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Run the long scenarios too
    #[arg(long)]
    pub long: bool,
    /// Run only the tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub filter: Option<String>,
    /// Run only the mutants of `mmu` (those whose name contains the filter); the last line is `N mutants, N caught, N missed`
    #[arg(long, conflicts_with = "long")]
    pub mutants: bool,
}

/// What a part of the tests came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: usize,
    failed: usize,
    /// What failed, by name.
    names: Vec<String>,
}

/// Sets up and builds what is missing, runs everything, and prints `N passed, N failed` as the last line.
pub fn test(options: &Options) -> Result<ExitCode> {
    if options.mutants {
        return mutants::run(options.filter.as_deref());
    }
    let ready = setup::ensure(&Component::ALL)?;
    build::build(ready.compiler()?)?;
    let mut tally = host_tests(options)?;
    tally.add(models(options)?);
    if options.filter.is_none() {
        tally.add(mutants()?);
    }
    tally.add(scenarios(options, setup::linux_is_possible())?);
    if !tally.names.is_empty() {
        println!("\nfailed:");
        for name in &tally.names {
            println!("    {name}");
        }
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(ExitCode::from(u8::from(tally.failed != 0)))
}

fn host_tests(options: &Options) -> Result<Tally> {
    let mut line = CommandLine::new("cargo").args(["test", "--no-fail-fast"]);
    for name in HOST_CRATES {
        line = line.args(["-p", name]);
    }
    if let Some(filter) = &options.filter {
        line = line.args(["--", filter]);
    }
    let mut tally = Tally::default();
    let status = stream(&line.dir(paths::workspace_root()), |line| tally.read_host_line(line))?;
    tally.must_explain(status, "the host's tests could not be built or broke off");
    Ok(tally)
}

/// The models of `mmu`'s lock-free protocols: built their own way, so in a folder of their own.
fn models(options: &Options) -> Result<Tally> {
    let mut line = CommandLine::new("cargo")
        .args(["test", "-p", "mmu", "--test", "loom", "--release", "--target-dir", "target/loom"])
        .env("RUSTFLAGS", "--cfg loom");
    if let Some(filter) = &options.filter {
        line = line.args(["--", filter]);
    }
    let mut tally = Tally::default();
    let status = stream(&line.dir(paths::workspace_root()), |line| tally.read_host_line(line))?;
    tally.must_explain(status, "the models could not be built or broke off");
    Ok(tally)
}

/// The mutants of `mmu`, each of which is a test of the tests.
fn mutants() -> Result<Tally> {
    let (all, missed) = mutants::meet(None)?;
    let names = missed.iter().map(|name| format!("mutant {name}")).collect();
    Ok(Tally { passed: all - missed.len(), failed: missed.len(), names })
}

fn scenarios(options: &Options, linux_is_possible: bool) -> Result<Tally> {
    let mut line =
        CommandLine::new("cargo").args(["run", "--quiet", "-p", "tests", "--bin", "scenarios", "--"]);
    if options.long {
        line = line.arg("--long");
    }
    if let Some(filter) = &options.filter {
        line = line.args(["--filter", filter]);
    }
    if !linux_is_possible {
        line = line.args(["--without", "linux"]);
    }
    let mut tally = Tally::default();
    let mut summary = None;
    let status = stream(&line.dir(paths::workspace_root()), |line| {
        tally.read_scenario_line(line);
        summary = scenario_summary(line).or(summary.take());
    })?;
    tally.must_agree(summary);
    tally.must_explain(status, "the scenarios broke off");
    Ok(tally)
}

/// Runs a command and shows each line of its standard output as it comes.
fn stream(line: &CommandLine, mut look: impl FnMut(&str)) -> Result<ExitStatus> {
    say!("{line}");
    let mut child = line
        .command()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let stdout = child.stdout.take().context("the command has no standard output")?;
    for text in BufReader::new(stdout).split(b'\n') {
        let text = text.context("cannot read the command's output")?;
        let text = String::from_utf8_lossy(&text);
        println!("{text}");
        look(&text);
    }
    child.wait().with_context(|| format!("cannot wait for `{line}`"))
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.names.extend(other.names);
    }

    /// Reads a line of cargo's test harness: `test result: ok. 3 passed; 0 failed; …` or `test NAME ... FAILED`.
    fn read_host_line(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            let count = |word: &str| {
                let part = result.split([';', '.']).map(str::trim).find_map(|part| part.strip_suffix(word));
                part.and_then(|number| number.trim().parse::<usize>().ok()).unwrap_or_default()
            };
            self.passed += count(" passed");
            self.failed += count(" failed");
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.names.push(name.to_owned());
        }
    }

    /// Reads a line of the scenario runner: `ok NAME` or `FAIL NAME: WHY`.
    fn read_scenario_line(&mut self, line: &str) {
        if line.starts_with("ok ") {
            self.passed += 1;
        } else if let Some(rest) = line.strip_prefix("FAIL ") {
            self.failed += 1;
            self.names.push(rest.to_owned());
        }
    }

    /// The runner's own count is the second opinion on ours.
    fn must_agree(&mut self, summary: Option<(usize, usize)>) {
        if summary != Some((self.passed, self.failed)) {
            self.failed += 1;
            self.names.push(match summary {
                Some((passed, failed)) => {
                    format!("the scenario runner counts {passed} passed and {failed} failed")
                }
                None => "the scenario runner did not reach its end".into(),
            });
        }
    }

    /// A command that fails without a failed test is itself a failure.
    fn must_explain(&mut self, status: ExitStatus, otherwise: &str) {
        if !status.success() && self.failed == 0 {
            self.failed += 1;
            self.names.push(format!("{otherwise} ({status})"));
        }
    }
}

fn scenario_summary(line: &str) -> Option<(usize, usize)> {
    let (passed, failed) =
        line.strip_prefix("scenarios: ")?.strip_suffix(" failed")?.split_once(" passed, ")?;
    Some((passed.parse().ok()?, failed.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn host(lines: &[&str]) -> Tally {
        let mut tally = Tally::default();
        lines.iter().for_each(|line| tally.read_host_line(line));
        tally
    }

    #[test]
    fn the_test_harness_is_understood() {
        let tally = host(&[
            "running 3 tests",
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 2 passed; 1 failed; 4 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "test result: ok. 10 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.50s",
        ]);
        assert_eq!(tally, Tally { passed: 12, failed: 1, names: vec!["a::c".into()] });
    }

    #[test]
    fn a_command_that_breaks_off_is_a_failure() {
        let mut tally = host(&["error: could not compile"]);
        tally.must_explain(ExitStatus::from_raw(101 << 8), "not built");
        assert_eq!(tally.failed, 1);
        assert!(tally.names[0].starts_with("not built"));
        let mut explained = Tally { failed: 2, ..Tally::default() };
        explained.must_explain(ExitStatus::from_raw(101 << 8), "not built");
        assert_eq!(explained.failed, 2);
        let mut good = Tally::default();
        good.must_explain(ExitStatus::from_raw(0), "not built");
        assert_eq!(good, Tally::default());
    }

    #[test]
    fn scenarios_are_counted_twice() {
        let mut tally = Tally::default();
        for line in ["ok a", "ok b/c", "FAIL d: why", "skip e: no", "   | ok not a case"] {
            tally.read_scenario_line(line);
        }
        assert_eq!((tally.passed, tally.failed), (2, 1));
        assert_eq!(tally.names, ["d: why"]);
        tally.must_agree(scenario_summary("scenarios: 2 passed, 1 failed"));
        assert_eq!(tally.failed, 1);
        tally.must_agree(None);
        assert_eq!(tally.failed, 2);
        tally.must_agree(scenario_summary("scenarios: 3 passed, 1 failed"));
        assert_eq!(tally.failed, 3);
    }

    #[test]
    fn output_is_read_line_by_line() {
        let mut lines = Vec::new();
        let line = CommandLine::new("sh").args(["-c", "printf 'a\\nb'; exit 3"]);
        let status = stream(&line, |line| lines.push(line.to_owned())).unwrap();
        assert_eq!(lines, ["a", "b"]);
        assert_eq!(status.code(), Some(3));
    }
}
