//! Runs scenarios, several at once, and keeps the logs of those that fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::Instant;

use xtask::{emulator, exec, grub, paths, setup};

use crate::cases::{is_failure, Case, Cases, Verdict};
use crate::context::Ctx;
use crate::scenario::{Need, Scenario};

/// How much of a failed scenario's console is printed.
const TAIL_LINES: usize = 25;

/// How many cases ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Tally {
    fn add(&mut self, cases: &Cases) {
        self.passed += cases.count(|verdict| *verdict == Verdict::Passed);
        self.failed += cases.count(is_failure);
        self.skipped += cases.count(|verdict| matches!(verdict, Verdict::Skipped(_)));
    }
}

/// Half of the processors: an emulated machine keeps one busy, and clocks are compared.
pub(crate) fn default_jobs() -> usize {
    std::thread::available_parallelism().map_or(1, |cpus| (cpus.get() / 2).max(1))
}

/// Runs `scenarios`, printing each one's cases when it has ended. What needs one of `without` is skipped.
pub(crate) fn run(scenarios: &[Scenario], jobs: usize, without: &[Need]) -> Tally {
    let next = AtomicUsize::new(0);
    let tally = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        for _ in 0..jobs.min(scenarios.len()) {
            scope.spawn(|| {
                while let Some(scenario) = scenarios.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let start = Instant::now();
                    let dir = log_dir(scenario);
                    let cases = run_one(scenario, &dir, without);
                    // Held while printing, so that scenarios do not mix their lines.
                    let mut tally = tally.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    tally.add(&cases);
                    print(scenario, &cases, start.elapsed().as_secs_f32(), &dir);
                }
            });
        }
    });
    let tally = *tally.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if tally.skipped > 0 {
        println!("{} skipped, for the reasons above", tally.skipped);
    }
    tally
}

fn log_dir(scenario: &Scenario) -> PathBuf {
    paths::target_dir().join("scenario-logs").join(&scenario.name)
}

fn run_one(scenario: &Scenario, dir: &Path, without: &[Need]) -> Cases {
    for need in &scenario.needs {
        if without.contains(need) {
            return Cases::skipped(format!("this machine cannot have it: {need:?}"));
        }
        if let Err(why) = is_met(*need) {
            return Cases::failed(why);
        }
    }
    let prepared = if dir.exists() { fs::remove_dir_all(dir) } else { Ok(()) };
    if let Err(error) = prepared.and_then(|()| fs::create_dir_all(dir)) {
        return Cases::failed(format!("cannot empty {}: {error}", dir.display()));
    }
    let cases = scenario.run(&Ctx::new(dir.to_path_buf(), scenario.limit));
    if cases.count(is_failure) == 0 {
        // A log that cannot be removed does no harm.
        let _ = fs::remove_dir_all(dir);
    }
    cases
}

fn is_met(need: Need) -> Result<(), String> {
    let met = match need {
        Need::Linux => return setup::linux_guest().map(drop),
        Need::Grub => grub::mkimage().is_some(),
        Need::Uefi => emulator::uefi_files().is_some(),
        Need::Bochs => exec::find_program("bochs").is_some(),
    };
    if met {
        Ok(())
    } else {
        Err(format!("{need:?} is not installed; `cargo xtask setup` does that"))
    }
}

fn print(scenario: &Scenario, cases: &Cases, seconds: f32, dir: &Path) {
    for case in &cases.0 {
        println!("{}", line(&scenario.name, case));
    }
    if cases.0.len() > 1 || seconds > 5.0 {
        println!("   {} took {seconds:.1} s", scenario.name);
    }
    if cases.count(is_failure) > 0 {
        let log = dir.join("console.log");
        if let Ok(mut file) = fs::File::open(&log) {
            println!("   the end of {}:", paths::display(&log));
            for line in exec::tail(&mut file, TAIL_LINES).lines() {
                println!("   | {}", printable(line));
            }
        }
    }
}

/// A guest's escape sequences must not reach the terminal of whoever reads the results.
fn printable(line: &str) -> String {
    line.chars().map(|c| if c.is_control() && c != '\t' { '·' } else { c }).collect()
}

fn line(scenario: &str, case: &Case) -> String {
    let separator = if case.name.is_empty() { "" } else { "/" };
    let name = format!("{scenario}{separator}{}", case.name);
    match &case.verdict {
        Verdict::Passed => format!("ok {name}"),
        Verdict::Failed(why) => format!("FAIL {name}: {why}"),
        Verdict::Skipped(why) => format!("skip {name}: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_counted() {
        let mut tally = Tally::default();
        tally.add(&Cases::reported_in("ok a\nok b\nFAIL c: x\nskip d: y\ndone 2 passed, 1 failed\n"));
        tally.add(&Cases::failed("hung"));
        assert_eq!(tally, Tally { passed: 2, failed: 2, skipped: 1 });
    }

    #[test]
    fn a_case_is_named_after_its_scenario() {
        let cases = Cases::reported_in("ok a\nFAIL b: why\n");
        let lines: Vec<_> = cases.0.iter().map(|case| line("cpuid", case)).collect();
        assert_eq!(lines[..2], ["ok cpuid/a", "FAIL cpuid/b: why"]);
        assert!(lines[2].starts_with("FAIL cpuid: it never finished"));
        assert_eq!(printable("a\x1b[2Jb"), "a·[2Jb");
    }

    #[test]
    fn a_need_that_cannot_be_met_here_is_a_skip_with_a_reason() {
        let scenario = Scenario::new("never", |_| unreachable!()).needs(&[Need::Bochs]);
        let cases = run_one(&scenario, Path::new("/nonexistent"), &[Need::Bochs]);
        assert!(matches!(&cases.0[0].verdict, Verdict::Skipped(why) if why.contains("Bochs")));
    }

    #[test]
    fn an_error_is_a_failure_and_keeps_the_folder() {
        let dir = std::env::temp_dir().join(format!("umbra-scenario-{}", std::process::id()));
        let cases = run_one(&Scenario::new("bad", |_| anyhow::bail!("boom")), &dir, &[]);
        assert_eq!(cases, Cases::failed("boom"));
        assert!(dir.is_dir());
        let cases = run_one(&Scenario::new("good", |_| Ok(Cases::passed())), &dir, &[]);
        assert_eq!(cases, Cases::passed());
        assert!(!dir.exists());
    }
}
