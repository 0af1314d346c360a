//! The command line of `cargo xtask`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::bench::Bench;
use crate::setup::{self, Component};
use crate::{bench, build, bundle, check, fuzz, image, miri, pxe, run, test};

/// Umbra's developer commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Install what is missing: compiler, emulators, image tools, the Linux guest
    Setup {
        /// Only report what is missing (status 1 if anything is)
        #[arg(long)]
        check: bool,
    },
    /// Build Umbra and the test guests
    Build,
    /// Make a boot bundle from an umbra.toml, or list one
    Bundle(bundle::Options),
    /// Make a bootable image for BIOS and UEFI
    Image(image::Options),
    /// Write the tree from which machines boot over the network, and serve it
    Pxe(pxe::Options),
    /// Boot Umbra with a guest whose console is this terminal
    Run(run::Options),
    /// Run every test, on the host and in emulators; the last line is `N passed, N failed`
    Test(test::Options),
    /// Run the fuzz targets of `mmu`, for ten minutes each (status 1 if there is a finding)
    Fuzz(fuzz::Options),
    /// Run the tests of `mmu`'s unsafe code and threads under Miri (installs it if need be)
    Miri,
    /// Measure what operations cost
    #[command(subcommand)]
    Bench(Bench),
    /// Check formatting, lints and documentation
    Check,
}

impl Cli {
    /// Does what was asked for; the exit status.
    pub fn execute(self) -> Result<ExitCode> {
        match self.command {
            Command::Setup { check } => setup::setup(check),
            Command::Build => {
                let images = build::build(setup::ensure(&[Component::Target])?.compiler()?)?;
                println!("{}", images.umbra.display());
                Ok(ExitCode::SUCCESS)
            }
            Command::Bundle(options) => {
                bundle::bundle(&options)?;
                Ok(ExitCode::SUCCESS)
            }
            Command::Image(options) => {
                println!("{}", image::make(&options)?.display());
                Ok(ExitCode::SUCCESS)
            }
            Command::Pxe(options) => pxe::pxe(&options),
            Command::Run(options) => run::run(&options),
            Command::Test(options) => test::test(&options),
            Command::Fuzz(options) => fuzz::fuzz(&options),
            Command::Miri => miri::miri(),
            Command::Bench(which) => bench::bench(&which),
            Command::Check => check::check(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_command_is_understood() {
        for args in [
            &["setup", "--check"][..],
            &["build"],
            &["image", "--bundle", "umbra.toml", "-o", "umbra.iso"],
            &["image", "--bundle", "umbra.toml", "--manifest"],
            &["bundle", "umbra.toml", "-o", "bundle.cpio", "--manifest"],
            &["bundle", "--list", "bundle.cpio"],
            &["run", "--uefi", "--medium", "usb"],
            &["pxe", "--out", "tree", "--machine", "mac:52:54:00:12:34:56=umbra.toml"],
            &["pxe", "--serve", "eth0"],
            &["run", "--vm", "umbra.toml", "--until", "login:", "--timeout", "60"],
            &["test", "--long", "--filter", "boot"],
            &["test", "--mutants"],
            &["fuzz"],
            &["fuzz", "walk", "--time", "60", "--random"],
            &["miri"],
            &["bench", "exits", "--json"],
            &["bench", "exits", "--emulator", "bochs", "--cpu", "ryzen"],
            &["bench", "mmu", "--json"],
            &["bench", "mmu", "--kvm"],
            &["bench", "mmu-host"],
            &["bench", "mmu-host", "--json"],
            &["check"],
        ] {
            assert!(Cli::try_parse_from(["cargo xtask"].iter().chain(args)).is_ok(), "{args:?}");
        }
        for args in [
            &[][..],
            &["bench"],
            &["bundle"],
            &["bundle", "--list", "bundle.cpio", "umbra.toml"],
            &["fly"],
            &["test", "--what"],
            &["bench", "mmu-host", "--emulator", "qemu"],
            &["fuzz", "--time", "long"],
        ] {
            assert!(Cli::try_parse_from(["cargo xtask"].iter().chain(args)).is_err(), "{args:?}");
        }
    }
}
