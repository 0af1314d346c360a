//! Scenarios that boot Umbra in an emulator and judge what it does.

mod cases;
mod context;
mod header;
mod payload;
mod runner;
mod scenario;
mod scenarios;
mod screen;

use std::process::ExitCode;

use clap::Parser;

use crate::scenario::Need;

/// Boots Umbra in emulators and judges what it does; `cargo xtask test` builds everything first and runs this.
#[derive(Parser)]
struct Options {
    /// Run only scenarios whose name contains this
    #[arg(long, default_value = "")]
    filter: String,
    /// Run the long ones too
    #[arg(long)]
    long: bool,
    /// Only list them
    #[arg(long)]
    list: bool,
    /// How many run at once [default: half of the processors]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,
    /// Skip what needs this, which the machine cannot have
    #[arg(long, value_enum)]
    without: Vec<Need>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let chosen: Vec<_> = scenarios::all()
        .into_iter()
        .filter(|scenario| scenario.name.contains(&options.filter) && (options.long || !scenario.long))
        .collect();
    if options.list {
        for scenario in &chosen {
            println!("{}", scenario.name);
        }
        return ExitCode::SUCCESS;
    }
    let jobs = options.jobs.map_or_else(runner::default_jobs, usize::from);
    let tally = runner::run(&chosen, jobs, &options.without);
    println!("scenarios: {} passed, {} failed", tally.passed, tally.failed);
    ExitCode::from(u8::from(tally.failed != 0))
}
