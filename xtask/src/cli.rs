//! The command line of `cargo xtask`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::setup::{self, Component};
use crate::{build, image, run};

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
    /// Make a bootable image for BIOS and UEFI
    Image(image::Options),
    /// Boot Umbra with a guest whose console is this terminal
    Run(run::Options),
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
            Command::Image(options) => {
                println!("{}", image::make(&options)?.display());
                Ok(ExitCode::SUCCESS)
            }
            Command::Run(options) => run::run(&options),
        }
    }
}
