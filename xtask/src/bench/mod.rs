//! `bench`: what operations cost.

mod exits;
mod guest;
mod kvm;
pub mod mmu;
mod mmu_host;

use std::process::ExitCode;

use anyhow::Result;

/// The command line of `bench`.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Bench {
    /// Instructions and exits per operation of a guest
    Exits(exits::Options),
    /// Instructions and exits per operation of a guest on its own page tables, direct and shadow
    Mmu(mmu::Options),
    /// Instructions and time of the MMU's operations on the host, beside crates that do the same
    MmuHost(mmu_host::Options),
}

/// Runs a benchmark.
pub fn bench(bench: &Bench) -> Result<ExitCode> {
    match bench {
        Bench::Exits(options) => exits::bench(options),
        Bench::Mmu(options) => mmu::bench(options),
        Bench::MmuHost(options) => mmu_host::bench(options),
    }
}

/// `1234567` as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped_by_three() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!((grouped(0), grouped(999)), ("0".into(), "999".into()));
    }
}
