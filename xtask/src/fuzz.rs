//! `fuzz`: runs the fuzz targets of `mmu`, under libFuzzer where it can be built, else on random bytes.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use anyhow::{bail, ensure, Context, Result};

use crate::exec::{find_program, CommandLine};
use crate::{paths, say};

/// The longest input in bytes: tables for every mode, or a few hundred operations.
const MAX_BYTES: u32 = 2048;
/// An input that runs for so many seconds hangs.
const LIMIT_SECONDS: u32 = 60;
/// How long a find is made smaller.
const MINIMIZE_SECONDS: u64 = 60;

/// What the compiler adds for libFuzzer: counters of covered edges, and the operands of comparisons. Stable compilers have it;
/// it is not in the instrumented crates' own hands, so build scripts and procedural macros go without (`--target`).
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                        -Cllvm-args=-sanitizer-coverage-pc-table \
                        -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";

/// The command line of `fuzz`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The target [default: each in turn]
    pub target: Option<String>,
    /// How long to run a target
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub time: u64,
    /// Take random bytes, also where libFuzzer can be built
    #[arg(long)]
    pub random: bool,
}

/// What makes the inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Engine {
    /// libFuzzer, which keeps inputs that reach new code and changes them.
    LibFuzzer(PathBuf),
    /// Bytes without guidance.
    Random(PathBuf),
}

/// What a target's output says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Report {
    runs: Option<u64>,
    find: Option<PathBuf>,
}

/// Runs one target or all. The last line of each is `fuzz: TARGET: N runs, no finding`, or names the input that found something.
pub fn fuzz(options: &Options) -> Result<ExitCode> {
    let all = target_names(&paths::workspace_root().join("mmu/fuzz/src/targets"))?;
    let chosen = match &options.target {
        None => all,
        Some(name) if all.contains(name) => vec![name.clone()],
        Some(name) => bail!("there is no fuzz target `{name}`; there are {}", all.join(", ")),
    };
    let engine = Engine::build(options.random)?;
    let mut clean = true;
    for name in &chosen {
        clean &= engine.run(name, options.time)?;
    }
    Ok(ExitCode::from(u8::from(!clean)))
}

/// The targets are the files of their folder.
fn target_names(folder: &Path) -> Result<Vec<String>> {
    let entries = folder.read_dir().with_context(|| format!("cannot list {}", folder.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".rs").map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

impl Engine {
    /// Builds libFuzzer, or the next best thing, and says which and why.
    fn build(random: bool) -> Result<Self> {
        let why = if random {
            "--random asks for it".to_owned()
        } else if !cfg!(target_os = "linux") {
            "libFuzzer is used on Linux only".to_owned()
        } else if std::env::var_os("CXX").is_none() && find_program("c++").is_none() {
            "libFuzzer is built from source and there is no C++ compiler (c++)".to_owned()
        } else {
            match Self::build_libfuzzer() {
                Ok(engine) => return Ok(engine),
                Err(error) => format!("libFuzzer cannot be built: {error:#}"),
            }
        };
        say!("fuzzing with random bytes: {why}");
        let dir = paths::target_dir();
        build_line("fuzz-random", &dir).run_on_stderr()?;
        Ok(Self::Random(dir.join("fuzz/fuzz-random")))
    }

    fn build_libfuzzer() -> Result<Self> {
        let host = host_triple()?;
        say!("fuzzing with libFuzzer, guided by coverage");
        // A folder of its own: other flags build everything anew.
        let dir = paths::target_dir().join("fuzz-coverage");
        build_line("fuzz-libfuzzer", &dir)
            .args(["--features", "libfuzzer", "--target", &host])
            .env("RUSTFLAGS", COVERAGE)
            .run_on_stderr()?;
        Ok(Self::LibFuzzer(dir.join(host).join("fuzz/fuzz-libfuzzer")))
    }

    /// Runs the target `name`; whether it found nothing.
    fn run(&self, name: &str, seconds: u64) -> Result<bool> {
        let finds = paths::target_dir().join("fuzz-finds").join(name);
        fs::create_dir_all(&finds).with_context(|| format!("cannot create {}", finds.display()))?;
        let line = match self {
            Self::LibFuzzer(program) => {
                let corpus = paths::cache_dir()?.join("fuzz").join(name);
                fs::create_dir_all(&corpus).with_context(|| format!("cannot create {}", corpus.display()))?;
                libfuzzer_line(program, name, seconds, &finds, &corpus)
            }
            Self::Random(program) => {
                CommandLine::new(program).arg(name).arg(seconds.to_string()).arg(finds.join("random"))
            }
        };
        let (report, ended_well) = watch(&line)?;
        let runs = report.runs.map_or("an unknown number of".to_owned(), |runs| runs.to_string());
        let Some(find) = report.find else {
            ensure!(ended_well, "`{line}` broke off and left no input");
            println!("fuzz: {name}: {runs} runs, no finding");
            return Ok(true);
        };
        let find = self.minimize(name, &find).unwrap_or(find);
        say!("to keep it as a test, copy it to mmu/fuzz/finds/{name}/ and run `cargo test -p mmu-fuzz`");
        println!("fuzz: {name}: a finding after {runs} runs, with the input {}", paths::display(&find));
        Ok(false)
    }

    /// A smaller input that fails too, if there is one.
    fn minimize(&self, name: &str, find: &Path) -> Option<PathBuf> {
        let Self::LibFuzzer(program) = self else { return None };
        let smaller = find.with_extension("min");
        let _ = fs::remove_file(&smaller);
        let mut exact = std::ffi::OsString::from("-exact_artifact_path=");
        exact.push(&smaller);
        say!("making the input smaller, for {MINIMIZE_SECONDS} s at most");
        // It ends with an error either way.
        let _ = CommandLine::new(program)
            .env("FUZZ_TARGET", name)
            .args(["-minimize_crash=1", &format!("-max_total_time={MINIMIZE_SECONDS}")])
            .arg(exact)
            .arg(find)
            .run_quietly();
        smaller.is_file().then_some(smaller)
    }
}

fn build_line(bin: &str, dir: &Path) -> CommandLine {
    CommandLine::new("cargo")
        .args(["build", "--profile", "fuzz", "-p", "mmu-fuzz", "--bin", bin, "--target-dir"])
        .arg(dir)
        .dir(paths::workspace_root())
}

fn libfuzzer_line(program: &Path, name: &str, seconds: u64, finds: &Path, corpus: &Path) -> CommandLine {
    CommandLine::new(program)
        .env("FUZZ_TARGET", name)
        .args([format!("-max_total_time={seconds}"), format!("-max_len={MAX_BYTES}")])
        // Short inputs have few operations or few tables: no reason to begin with them.
        .arg("-len_control=0")
        .args([format!("-timeout={LIMIT_SECONDS}"), "-print_final_stats=1".to_owned()])
        .arg(format!("-artifact_prefix={}/", finds.display()))
        .arg(corpus)
}

/// `host: TRIPLE` in what `rustc -vV` says.
fn host_triple() -> Result<String> {
    let text = CommandLine::new("rustc").arg("-vV").dir(paths::workspace_root()).read()?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("`rustc -vV` names no host")?.trim().to_owned())
}

/// Runs a command and shows its standard error as it comes; what that said, and whether the command succeeded.
fn watch(line: &CommandLine) -> Result<(Report, bool)> {
    say!("{line}");
    let mut child = line
        .command()
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`"))?;
    let stderr = child.stderr.take().context("the command has no standard error")?;
    let mut report = Report::default();
    for text in BufReader::new(stderr).split(b'\n') {
        let text = text.context("cannot read the command's output")?;
        let text = String::from_utf8_lossy(&text);
        eprintln!("{text}");
        report.read_line(&text);
    }
    let status = child.wait().with_context(|| format!("cannot wait for `{line}`"))?;
    Ok((report, status.success()))
}

impl Report {
    /// Reads a line of either engine.
    fn read_line(&mut self, line: &str) {
        let after = |text: &str| line.split_once(text).map(|(_, rest)| rest.trim());
        let runs = after("stat::number_of_executed_units:").or_else(|| line.strip_prefix("runs: "));
        self.runs = runs.and_then(|runs| runs.parse().ok()).or(self.runs);
        let find = after("Test unit written to ").or_else(|| after("; the input is "));
        self.find = find.map(PathBuf::from).or(self.find.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(lines: &[&str]) -> Report {
        let mut report = Report::default();
        lines.iter().for_each(|line| report.read_line(line));
        report
    }

    #[test]
    fn both_engines_are_understood() {
        let clean =
            report(&["#2\tINITED cov: 5", "stat::number_of_executed_units: 198738", "stat::peak_rss_mb: 28"]);
        assert_eq!(clean, Report { runs: Some(198_738), find: None });
        let found = report(&[
            "thread '<unnamed>' panicked at x",
            "artifact_prefix='/t/walk/'; Test unit written to /t/walk/crash-e2",
            "stat::number_of_executed_units: 7",
        ]);
        assert_eq!(found, Report { runs: Some(7), find: Some("/t/walk/crash-e2".into()) });
        assert_eq!(report(&["#64 after 1 s", "runs: 100"]), Report { runs: Some(100), find: None });
        let found = report(&["the target panicked; the input is /t/walk/random"]);
        assert_eq!(found, Report { runs: None, find: Some("/t/walk/random".into()) });
    }

    #[test]
    fn targets_are_files() {
        let names = target_names(&paths::workspace_root().join("mmu/fuzz/src/targets")).unwrap();
        assert!(names.contains(&"walk".to_owned()) && names.is_sorted(), "{names:?}");
        assert!(target_names(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn an_unknown_target_is_an_error_that_names_the_others() {
        let error = fuzz(&Options { target: Some("fly".into()), time: 1, random: true }).unwrap_err();
        assert!(error.to_string().contains("`fly`") && error.to_string().contains("walk"), "{error}");
    }

    #[test]
    fn libfuzzer_is_told_where_everything_goes() {
        let line = libfuzzer_line(Path::new("/b"), "walk", 5, Path::new("/t/walk"), Path::new("/c/walk"));
        let text = line.to_string();
        assert!(text.starts_with("FUZZ_TARGET=walk /b -max_total_time=5 "), "{text}");
        assert!(text.ends_with(" -artifact_prefix=/t/walk/ /c/walk"), "{text}");
    }
}
