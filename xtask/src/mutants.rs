//! `test --mutants`: every mutant of `mmu` meets the tests, and each must be caught.
//!
//! One build has them all (`mmu/src/mutant`); a variable says which one a process has. First the tests run without any
//! and must pass. Then each mutant meets those that are said, or by its name obliged, to catch it, and then, if it may be
//! caught by any, the rest, the quickest first.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use crate::exec::{wait_within, CommandLine};
use crate::{paths, say};

/// Names the mutant that a test process has: `mmu::VARIABLE`.
const VARIABLE: &str = "MMU_MUTANT";
/// The test program that names the mutants.
const LIST: &str = "mutants";
/// A test program is taken to hang after this, and ten times what it takes without a mutant.
const PATIENCE: Duration = Duration::from_secs(60);

/// What random tests must do: the same each time, without looking for a smaller case, and without keeping what they find.
const PROPTEST: [(&str, &str); 3] = [
    ("PROPTEST_RNG_SEED", "1"),
    ("PROPTEST_MAX_SHRINK_ITERS", "0"),
    ("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1"),
];

/// One mutant.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mutant {
    name: String,
    /// It brings a bug of old back, which the test that is named after the bug must catch. Up to a dot, its name is the bug's.
    bug: bool,
    /// Parts of the names of tests that are likely to catch it.
    by: Vec<String>,
}

/// A test program and the tests in it.
#[derive(Clone, Debug)]
struct Program {
    name: String,
    path: PathBuf,
    tests: Vec<String>,
    /// How long all of it takes without a mutant.
    time: Duration,
}

/// How a run of some tests ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Passed,
    /// The first test that failed.
    Failed(String),
    /// The program broke off without naming a test.
    BrokeOff,
    Hung,
}

/// Builds, runs, and prints `N mutants, N caught, 0 missed` as the last line.
pub fn run(filter: Option<&str>) -> Result<ExitCode> {
    let (mutants, missed) = meet(filter)?;
    Ok(ExitCode::from(u8::from(!missed.is_empty() || mutants == 0)))
}

/// The same; how many mutants there were, and the names of those that were missed.
pub(crate) fn meet(filter: Option<&str>) -> Result<(usize, Vec<String>)> {
    let (mutants, mut programs) = build()?;
    for program in &mut programs {
        program.tests = program.list()?;
    }
    let start = Instant::now();
    for program in &mut programs {
        let start = Instant::now();
        let end = program.run(None, &[])?;
        if end != End::Passed {
            bail!("without a mutant, {} has: {end:?}", program.name);
        }
        program.time = start.elapsed();
    }
    programs.sort_by_key(|program| program.time);
    let mutants: Vec<_> =
        mutants.into_iter().filter(|mutant| filter.is_none_or(|part| mutant.name.contains(part))).collect();
    say!("{} mutants meet the tests, which take {:.1} s", mutants.len(), start.elapsed().as_secs_f64());
    let missed = meet_all(&mutants, &programs)?;
    let (all, not) = (mutants.len(), missed.len());
    println!("{all} mutants, {} caught, {not} missed", all - not);
    Ok((all, missed))
}

/// The mutants, and the test programs that have them.
fn build() -> Result<(Vec<Mutant>, Vec<Program>)> {
    let line = CommandLine::new("cargo")
        .args(["test", "-p", "mmu", "--lib", "--tests", "--no-run", "--target-dir", "target/mutants"])
        .env("RUSTFLAGS", "--cfg mutants")
        // Nobody looks for a line in a failure that is expected.
        .env("CARGO_PROFILE_DEV_DEBUG", "false")
        .dir(paths::workspace_root());
    say!("{line}");
    let output =
        line.command().stdin(Stdio::null()).output().with_context(|| format!("cannot start `{line}`"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("`{line}` failed ({}):\n{}", output.status, text.trim_end());
    }
    let (lists, programs): (Vec<_>, Vec<_>) =
        text.lines().filter_map(program).partition(|program| program.name == LIST);
    let [list] = &lists[..] else { bail!("`{line}` built no test program `{LIST}`") };
    let names = CommandLine::new(&list.path).read()?;
    Ok((names.lines().filter_map(mutant).collect(), programs))
}

/// Reads a line of cargo's: `  Executable tests/direct.rs (/target/debug/deps/direct-0123456789abcdef)`.
fn program(line: &str) -> Option<Program> {
    let (_, path) = line.trim().strip_prefix("Executable ")?.strip_suffix(')')?.rsplit_once('(')?;
    let path = paths::workspace_root().join(path);
    let (name, _hash) = path.file_name()?.to_str()?.rsplit_once('-')?;
    Some(Program { name: name.to_owned(), path: path.clone(), tests: vec![], time: Duration::ZERO })
}

/// Reads a line of the list: `mutant NAME TEST TEST …` or `bug NAME`.
fn mutant(line: &str) -> Option<Mutant> {
    let mut words = line.split_whitespace();
    let bug = match words.next()? {
        "mutant" => false,
        "bug" => true,
        _ => return None,
    };
    Some(Mutant { bug, name: words.next()?.to_owned(), by: words.map(str::to_owned).collect() })
}

/// Lets every mutant meet the tests, on all CPUs; the names of those that were missed.
fn meet_all(mutants: &[Mutant], programs: &[Program]) -> Result<Vec<String>> {
    let next = AtomicUsize::new(0);
    let missed = Mutex::new(Ok(vec![]));
    let ended = |how: Result<String>| {
        let mut missed = missed.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut *missed, how) {
            (Ok(names), Ok(name)) => names.push(name),
            (missed, Err(why)) => *missed = Err(why),
            (Err(_), _) => {}
        }
    };
    let work = || {
        while let Some(mutant) = mutants.get(next.fetch_add(1, Ordering::Relaxed)) {
            match mutant.meet(programs) {
                Ok(Some(by)) => println!("caught {} by {by}", mutant.name),
                Ok(None) => {
                    println!("MISSED {}", mutant.name);
                    ended(Ok(mutant.name.clone()));
                }
                Err(why) => return ended(Err(why)),
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    missed.into_inner().unwrap_or_else(PoisonError::into_inner)
}

impl Mutant {
    /// What the test must have in its name that catches it: what the bug is known by, a commit without saying that it is one.
    fn known_by(&self) -> Option<&str> {
        let bug = self.name.split('.').next().unwrap_or_default();
        self.bug.then(|| bug.strip_prefix("commit_").unwrap_or(bug))
    }

    /// What catches it.
    fn meet(&self, programs: &[Program]) -> Result<Option<String>> {
        let parts: BTreeSet<&str> = match self.known_by() {
            Some(bug) => [bug].into(),
            None => self.by.iter().map(String::as_str).collect(),
        };
        for program in programs {
            let named = |test: &&String| parts.iter().any(|part| test.contains(part));
            let tests: Vec<&str> = program.tests.iter().filter(named).map(String::as_str).collect();
            if !tests.is_empty() {
                if let Some(by) = program.catches(&self.name, &tests)? {
                    return Ok(Some(by));
                }
            }
        }
        if self.bug {
            return Ok(None);
        }
        for program in programs {
            if let Some(by) = program.catches(&self.name, &[])? {
                return Ok(Some(by));
            }
        }
        Ok(None)
    }
}

impl Program {
    fn list(&self) -> Result<Vec<String>> {
        let text = CommandLine::new(&self.path).arg("--list").read()?;
        Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
    }

    /// What of these tests (of all, if none is named) catches the mutant.
    fn catches(&self, mutant: &str, tests: &[&str]) -> Result<Option<String>> {
        Ok(match self.run(Some(mutant), tests)? {
            End::Passed => None,
            End::Failed(test) => Some(format!("{} {test}", self.name)),
            End::BrokeOff => Some(format!("{}, which broke off", self.name)),
            End::Hung => Some(format!("{}, which hung", self.name)),
        })
    }

    fn run(&self, mutant: Option<&str>, tests: &[&str]) -> Result<End> {
        let mut line = CommandLine::new(&self.path).env(VARIABLE, mutant.unwrap_or_default());
        line = PROPTEST.iter().fold(line, |line, (name, value)| line.env(name, value));
        if !tests.is_empty() {
            line = line.arg("--exact").args(tests);
        }
        let mut child = line
            .dir(Path::new(paths::workspace_root()).join("mmu"))
            .command()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", self.path.display()))?;
        // Read beside the waiting: a test that says much must not wait for a reader.
        let mut stdout = child.stdout.take().context("a test program has no standard output")?;
        let reader = thread::spawn(move || {
            let mut bytes = vec![];
            let _ = stdout.read_to_end(&mut bytes);
            bytes
        });
        let Some(status) = wait_within(child, PATIENCE + 10 * self.time)? else { return Ok(End::Hung) };
        let bytes = reader.join().unwrap_or_default();
        Ok(if status.success() { End::Passed } else { failure(&String::from_utf8_lossy(&bytes)) })
    }
}

/// What the output of a test program that failed says about it.
fn failure(text: &str) -> End {
    text.lines()
        .find_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED"))
        .map_or(End::BrokeOff, |test| End::Failed(test.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Mutant {
        Mutant { name: name.into(), bug: false, by: vec![] }
    }

    #[test]
    fn programs_and_mutants_are_read() {
        let line = "  Executable unittests src/lib.rs (target/mutants/debug/deps/mmu-95f546c2e7c791e7)";
        let found = program(line).unwrap();
        assert_eq!(found.name, "mmu");
        assert!(found.path.ends_with("target/mutants/debug/deps/mmu-95f546c2e7c791e7"));
        assert!(program("   Compiling mmu v0.1.0 (/umbra/mmu)").is_none());
        let expected = Mutant { name: "flush_zap".into(), bug: false, by: vec!["c1".into(), "c2".into()] };
        assert_eq!(mutant("mutant flush_zap c1 c2"), Some(expected));
        assert_eq!(mutant("mutant flush_zap"), Some(named("flush_zap")));
        assert_eq!(mutant("bug cve_1"), Some(Mutant { bug: true, ..named("cve_1") }));
        assert_eq!(mutant("running 1 test"), None);
    }

    #[test]
    fn a_bug_of_old_is_caught_by_the_test_with_its_name() {
        let bug = |name| Mutant { bug: true, ..named(name) };
        assert_eq!(bug("cve_2021_38198").known_by(), Some("cve_2021_38198"));
        assert_eq!(bug("commit_ef057cbf825e.collapse").known_by(), Some("ef057cbf825e"));
        assert_eq!(named("flush_zap").known_by(), None);
    }

    #[test]
    fn the_first_failure_is_named() {
        let text = "running 2 tests\ntest a::b ... ok\ntest a::c ... FAILED\ntest a::d ... FAILED\n";
        assert_eq!(failure(text), End::Failed("a::c".into()));
        assert_eq!(failure("running 2 tests\n"), End::BrokeOff);
    }

    #[test]
    fn a_program_that_fails_catches() {
        let program = |path: &str| Program {
            name: "p".into(),
            path: path.into(),
            tests: vec!["cve_2021_38198_shown".into()],
            time: Duration::ZERO,
        };
        let (good, bad) = (program("true"), program("false"));
        assert_eq!(named("x").meet(core::slice::from_ref(&good)).unwrap(), None);
        assert_eq!(named("x").meet(&[good, bad.clone()]).unwrap(), Some("p, which broke off".into()));
        let bug = |name| Mutant { bug: true, ..named(name) };
        assert!(bug("cve_2021_38198.a").meet(core::slice::from_ref(&bad)).unwrap().is_some());
        assert_eq!(bug("cve_2021_1").meet(&[bad]).unwrap(), None, "no test has its name");
    }
}
