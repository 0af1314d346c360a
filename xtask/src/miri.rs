//! `miri`: the tests of `mmu` that meet its unsafe code or run in threads, under the interpreter that finds undefined behaviour.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::exec::{find_program, CommandLine};
use crate::{paths, say};

/// Only nightly toolchains have Miri.
const TOOLCHAIN: &str = "nightly";

/// Downloads must not wait for ever.
const RUSTUP_LIMIT: Duration = Duration::from_secs(300);

/// The runs: a target of cargo, and which of its tests. What is pure arithmetic over large products is left out, since the
/// interpreter takes hours for it and cannot find more in it than a run can.
const RUNS: [(&[&str], &[&str]); 3] = [
    (&["--lib"], &["--skip", "format::"]),
    (&["--test", "direct"], &["amd::phys_tables_over_real_memory"]),
    (&["--test", "threads"], &["the_exclusive_guard_excludes"]),
];

/// Runs them all, also after one has failed. Where Miri cannot be had, says why, and fails.
pub fn miri() -> Result<ExitCode> {
    ensure_miri()?;
    let mut failed = Vec::new();
    for (target, tests) in RUNS {
        if let Err(error) = line(target, tests).run_on_stderr() {
            say!("{error:#}");
            failed.push(target.join(" "));
        }
    }
    match &failed[..] {
        [] => {
            println!("miri: {} runs, nothing found", RUNS.len());
            Ok(ExitCode::SUCCESS)
        }
        _ => {
            println!("miri: failed: {}", failed.join(", "));
            Ok(ExitCode::FAILURE)
        }
    }
}

fn line(target: &[&str], tests: &[&str]) -> CommandLine {
    nightly(&["miri", "test", "-p", "mmu", "--target-dir", "target/miri"])
        .args(target)
        .arg("--")
        .args(tests)
        // Table pages are addresses in entries: integers that become pointers again.
        .env("MIRIFLAGS", "-Zmiri-permissive-provenance")
}

fn nightly(args: &[&str]) -> CommandLine {
    let toolchain = format!("+{TOOLCHAIN}");
    CommandLine::new("cargo").arg(toolchain).args(args).dir(paths::workspace_root())
}

/// Installs what is missing: the toolchain, the interpreter, the source of the standard library that it interprets.
fn ensure_miri() -> Result<()> {
    if is_complete() {
        return Ok(());
    }
    if find_program("rustup").is_none() {
        bail!("Miri comes with rustup's nightly toolchains, and there is no rustup");
    }
    let rustup = CommandLine::new("rustup");
    let install = if has_toolchain() {
        say!("Miri or the source of the standard library is missing from the {TOOLCHAIN} toolchain");
        rustup.args(["component", "add", "miri", "rust-src", "--toolchain", TOOLCHAIN])
    } else {
        say!("there is no {TOOLCHAIN} toolchain, which Miri takes");
        let toolchain = ["toolchain", "install", TOOLCHAIN, "--profile", "minimal"];
        rustup.args(toolchain).args(["--component", "miri", "--component", "rust-src"])
    };
    install.run_within(RUSTUP_LIMIT).context("Miri cannot be installed")?;
    if !is_complete() {
        bail!("rustup has added Miri, but `cargo +{TOOLCHAIN} miri` does not run");
    }
    Ok(())
}

fn has_toolchain() -> bool {
    CommandLine::new("rustup").args(["run", TOOLCHAIN, "rustc", "--version"]).read().is_ok()
}

fn is_complete() -> bool {
    let sysroot = CommandLine::new("rustup").args(["run", TOOLCHAIN, "rustc", "--print", "sysroot"]).read();
    let has_source =
        |dir: String| Path::new(dir.trim()).join("lib/rustlib/src/rust/library/Cargo.toml").is_file();
    sysroot.is_ok_and(has_source) && nightly(&["miri", "--version"]).read().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_a_command_of_the_nightly_toolchain() {
        let (target, tests) = RUNS[1];
        let text = line(target, tests).to_string();
        let end = "cargo +nightly miri test -p mmu --target-dir target/miri --test direct -- \
                   amd::phys_tables_over_real_memory";
        assert!(text.ends_with(end) && text.contains("MIRIFLAGS=-Zmiri-permissive-provenance "), "{text}");
    }

    #[test]
    fn tests_that_are_run_exist() {
        for (target, tests) in RUNS {
            let [_, file] = target else { continue };
            let path = paths::workspace_root().join(format!("mmu/tests/{file}.rs"));
            let text = std::fs::read_to_string(path).unwrap();
            for test in tests {
                let name = test.rsplit("::").next().unwrap();
                assert!(text.contains(&format!("fn {name}")), "{test}");
            }
        }
    }
}
