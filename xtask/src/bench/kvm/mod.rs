//! KVM in Umbra's place: the same guest in the same emulator, under Debian's Linux as the hypervisor, on nested page tables
//! and on shadow tables.

mod initramfs;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, Context, Result};

use self::initramfs::Qemu;
use super::guest::{self, Cost};
use crate::build::Images;
use crate::bundle::Bundle;
use crate::emulator::{Boot, Icount, Machine, Session};
use crate::guest::KvmHost;
use crate::setup::{self, Component};
use crate::{paths, say};

/// Linux boots in seconds and the guest runs in seconds, four times.
const LIMIT: Duration = Duration::from_secs(600);

/// What begins the lines of a way's measurement: nested paging, shadow paging.
const WAYS: [&str; 2] = ["npt=Y ", "npt=N "];

/// How often the guest reads the exit counter for an operation: twice to know what reading costs, then before and after the
/// rounds. KVM has no such MSR, so each read exits and shows in the trace.
const READS: usize = 4;

/// KVM, ready to run.
pub(super) struct Kvm {
    host: KvmHost,
    qemu: Qemu,
}

impl Kvm {
    /// Finds what is needed, and installs what is missing.
    pub(super) fn ensure() -> Result<Self> {
        let ready = setup::ensure(&[Component::Qemu, Component::Kvm])?;
        Ok(Self { host: ready.kvm()?.clone(), qemu: Qemu::find()? })
    }

    /// What the operations `keys` of the guest `name` cost, which has been built: with nested and with shadow paging.
    pub(super) fn run(&self, name: &str, keys: &[&str], cpu: Option<&str>) -> Result<[Vec<Cost>; 2]> {
        say!("KVM: Linux boots, then the guest twice for each way of paging; this takes about half a minute");
        let dir = paths::target_dir().join("bench/kvm");
        let log = self.boot(name, dir.clone(), cpu);
        let costs = log.and_then(|log| {
            let [nested, shadow] = WAYS.map(|way| costs_in(&log, way, keys));
            Ok([nested?, shadow?])
        });
        costs.with_context(|| {
            format!("KVM was not measured (its log is {})", paths::display(&dir.join("console.log")))
        })
    }

    /// Boots Linux and says what it says; what the console showed.
    fn boot(&self, name: &str, dir: PathBuf, cpu: Option<&str>) -> Result<String> {
        let initramfs = initramfs::build(&self.host, &self.qemu, &Images::places().guest(name))?;
        let machine = Machine {
            boot: Boot::Linux,
            umbra: self.host.linux.kernel.clone(),
            icount: Icount::On,
            cpu: cpu.map(str::to_owned),
            ..Machine::new(dir)
        };
        let mut session = Session::start(&machine, &Bundle::unchecked(initramfs))?;
        loop {
            let line = session.expect("^kvm: .*$", LIMIT)?;
            let step = line.trim_end().trim_start_matches("kvm: ");
            if step == "end" {
                break;
            }
            if let Some(why) = step.strip_prefix("failed: ") {
                bail!("{why}");
            }
            say!("KVM: {step}");
        }
        Ok(session.finish(LIMIT)?.log)
    }
}

/// The costs in the lines of the log that begin with `way`.
fn costs_in(log: &str, way: &str, keys: &[&str]) -> Result<Vec<Cost>> {
    let lines: Vec<&str> = log.lines().filter_map(|line| line.strip_prefix(way)).collect();
    let mut costs = guest::costs_in(&lines.join("\n"), keys)?;
    let traced = lines.iter().find_map(|line| line.strip_prefix("exits ")).context("no exits were traced")?;
    for ((cost, key), exits) in costs.iter_mut().zip(keys).zip(exits_in(traced, keys.len())?) {
        cost.exits = (exits + rounds(key) / 2) / rounds(key);
    }
    Ok(costs)
}

/// How many exits each of the last `operations` made in all its rounds: of the numbers for the reads of the counter, the one
/// for each last read. Those before them are of the guest's start.
fn exits_in(traced: &str, operations: usize) -> Result<Vec<u64>> {
    let numbers = traced.split_whitespace().map(str::parse).collect::<Result<Vec<u64>, _>>();
    let numbers = numbers.with_context(|| format!("`{traced}` are no numbers of exits"))?;
    let Some(start) = numbers.len().checked_sub(READS * operations) else {
        bail!("the trace has {} reads of the exit counter, not {READS} an operation", numbers.len());
    };
    Ok(numbers[start..].chunks_exact(READS).map(|reads| reads[READS - 1]).collect())
}

/// The rounds over which the guest takes an operation's average: what is for a page, over a table's 512 pages.
fn rounds(key: &str) -> u64 {
    if key.ends_with("_page") {
        512
    } else {
        256
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 2] = ["invlpg", "fork_page"];
    const LOG: &str = "kvm: loading\r\nnpt=Y bench invlpg instructions=3 exits=0\r\n\
                       npt=Y bench fork_page instructions=13 exits=0\r\nnpt=Y done\r\n\
                       npt=Y exits 577 2 0 80 0 0 1 90 0 0 0\r\n\
                       npt=N bench invlpg instructions=3450 exits=0\r\n\
                       npt=N bench fork_page instructions=13644 exits=0\r\nnpt=N done\r\n\
                       npt=N exits 456 62 0 0 257 335 0 0 1026\r\nkvm: end\r\n";

    #[test]
    fn each_way_has_its_costs() {
        let cost = |instructions, exits| Cost { instructions, exits };
        assert_eq!(costs_in(LOG, WAYS[0], &KEYS).unwrap(), [cost(3, 0), cost(13, 0)]);
        assert_eq!(costs_in(LOG, WAYS[1], &KEYS).unwrap(), [cost(3450, 1), cost(13644, 2)]);
    }

    #[test]
    fn a_measurement_is_whole_or_an_error() {
        let error = |log: &str| format!("{:#}", costs_in(log, WAYS[1], &KEYS).unwrap_err());
        assert!(
            error("npt=Y bench invlpg instructions=3 exits=0\n").contains("did not report invlpg, fork_page")
        );
        assert_eq!(error(&LOG.replace("npt=N exits", "npt=X exits")), "no exits were traced");
        assert!(error(&LOG.replace("456 62 0 0 257", "257")).contains("has 5 reads"));
        assert!(error(&LOG.replace("1026", "many")).contains("are no numbers of exits"));
    }
}
