//! `check`: formatting, lints and documentation, for the host and for the bare-metal target.

use std::process::ExitCode;

use anyhow::Result;

use crate::exec::CommandLine;
use crate::setup::{self, Component};
use crate::toolchain::Compiler;
use crate::{paths, say};

/// The crates that run without an operating system.
const BARE_METAL_CRATES: [&str; 4] = ["mmu", "boot", "kernel", "guests"];

/// Runs all checks, also after one has failed.
pub fn check() -> Result<ExitCode> {
    let compiler = setup::ensure(&[Component::Target, Component::Clippy])?.compiler()?;
    let mut failed = Vec::new();
    for (name, line) in checks(compiler) {
        if let Err(error) = line.run_on_stderr() {
            say!("{error:#}");
            failed.push(name);
        }
    }
    if failed.is_empty() {
        say!("all checks passed");
        return Ok(ExitCode::SUCCESS);
    }
    say!("failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

fn checks(compiler: Compiler) -> [(&'static str, CommandLine); 4] {
    let host = |args: &[&str]| CommandLine::new("cargo").args(args).dir(paths::workspace_root());
    let bare_metal =
        BARE_METAL_CRATES.iter().fold(compiler.cargo("clippy"), |line, name| line.args(["-p", name]));
    [
        ("formatting", host(&["fmt", "--all", "--check"])),
        // The default members are the crates that the host can build; --all-targets has their tests too.
        ("lints of the host's crates", host(&["clippy", "--all-targets", "--", "-D", "warnings"])),
        ("lints of the bare-metal crates", bare_metal.args(["--", "-D", "warnings"])),
        ("documentation", host(&["doc", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lints_are_errors_everywhere() {
        for compiler in [Compiler::WithTarget, Compiler::Debian] {
            let checks = checks(compiler);
            for (name, line) in &checks[1..] {
                assert!(line.to_string().contains("-D warnings"), "{name}: {line}");
            }
            let bare_metal = checks[2].1.to_string();
            assert!(
                bare_metal.contains("clippy") && bare_metal.contains("-p kernel -p guests"),
                "{bare_metal}"
            );
        }
    }
}
