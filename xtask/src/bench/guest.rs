//! Benchmarks that a test guest makes: it counts, while the emulator counts for it, and reports in lines of its console.

use std::time::Duration;

use anyhow::{bail, Context, Result};

use crate::bundle::Bundle;
use crate::emulator::{check_model, Boot, Icount, Kind, Machine, Session};
use crate::setup::{self, Component};
use crate::size::Size;
use crate::{build, paths};

/// The guest needs seconds; a guest that hangs must not.
const LIMIT: Duration = Duration::from_secs(600);

/// What one operation costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cost {
    pub(super) instructions: u64,
    pub(super) exits: u64,
}

/// Boots the guest `name`, described by these lines of umbra.toml beside the usual ones; what the console showed.
pub(super) fn run(name: &str, more: &str, emulator: Kind, cpu: Option<&str>) -> Result<String> {
    let needed = match emulator {
        Kind::Qemu => &[Component::Target, Component::Qemu][..],
        Kind::Bochs => &[Component::Target, Component::Bochs, Component::Grub],
    };
    let ready = setup::ensure(needed)?;
    if let Some(model) = cpu {
        check_model(emulator, model)?;
    }
    let images = build::build(ready.compiler()?)?;
    let config = format!(
        "[[vm]]\nname = \"bench\"\nmemory = \"64M\"\nkernel = \"{name}\"\nexit_port = 0xf4\non_reset = \"stop\"\n{more}"
    );
    let bundle = Bundle::new(config).file_from(name, &images.guest(name))?;
    let dir = paths::target_dir().join("bench");
    let machine = Machine { cpu: cpu.map(str::to_owned), ..machine(emulator, Machine::new(&dir)) };
    let log = Session::start(&machine, &bundle)?.finish(LIMIT)?.log;
    if !log.lines().any(|line| line.trim_end() == "done") {
        bail!("the benchmark failed; its log is {}", paths::display(&dir.join("console.log")));
    }
    Ok(log)
}

/// A machine that counts instructions: QEMU when it is told to, Bochs always.
fn machine(emulator: Kind, plain: Machine) -> Machine {
    match emulator {
        Kind::Qemu => Machine { icount: Icount::On, ..plain },
        Kind::Bochs => Machine { kind: Kind::Bochs, boot: Boot::Iso, memory: Size::mib(512), ..plain },
    }
}

/// What Umbra says it uses.
pub(super) fn virtualization(log: &str) -> &'static str {
    let uses = |word: &str| log.lines().any(|line| line.starts_with("umbra: ") && line.contains(word));
    ["SVM with nested paging", "VMX with EPT"]
        .into_iter()
        .find(|name| uses(name))
        .or_else(|| ["VMX", "SVM"].into_iter().find(|name| uses(name)))
        .unwrap_or("virtualization unknown")
}

/// The costs in the guest's lines `bench KEY instructions=N exits=N`, in the order of `keys`; each once.
pub(super) fn costs_in(log: &str, keys: &[&str]) -> Result<Vec<Cost>> {
    let mut found = vec![None; keys.len()];
    for line in log.lines() {
        let Some((key, cost)) = cost_in(line) else { continue };
        let Some(at) = keys.iter().position(|known| *known == key) else {
            bail!("the guest reports `{key}`, which is no operation of this benchmark");
        };
        if found[at].replace(cost).is_some() {
            bail!("the guest reports `{key}` twice");
        }
    }
    let missing: Vec<_> =
        keys.iter().zip(&found).filter(|(_, cost)| cost.is_none()).map(|(k, _)| *k).collect();
    found
        .into_iter()
        .collect::<Option<_>>()
        .with_context(|| format!("the guest did not report {}", missing.join(", ")))
}

fn cost_in(line: &str) -> Option<(&str, Cost)> {
    let mut words = line.trim_end().strip_prefix("bench ")?.split(' ');
    let key = words.next()?;
    let instructions = words.next()?.strip_prefix("instructions=")?.parse().ok()?;
    let exits = words.next()?.strip_prefix("exits=")?.parse().ok()?;
    words.next().is_none().then_some((key, Cost { instructions, exits }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 2] = ["cpuid", "hlt_wake"];
    const LOG: &str =
        "umbra: hello\r\nbench hlt_wake instructions=7 exits=3\r\nbench cpuid instructions=1234 exits=1\r\ndone\r\n";

    #[test]
    fn the_guests_lines_become_costs() {
        let costs = costs_in(LOG, &KEYS).unwrap();
        assert_eq!(costs, [Cost { instructions: 1234, exits: 1 }, Cost { instructions: 7, exits: 3 }]);
    }

    #[test]
    fn a_benchmark_is_whole_or_an_error() {
        let error = |log: &str| costs_in(log, &KEYS).unwrap_err().to_string();
        assert!(error("bench cpuid instructions=1 exits=1\n").contains("did not report hlt_wake"));
        assert!(error(&format!("{LOG}bench cpuid instructions=1 exits=1\n")).contains("twice"));
        assert!(error(&format!("{LOG}bench vmcall instructions=1 exits=1\n")).contains("no operation"));
        for line in
            ["bench cpuid", "bench cpuid instructions=x exits=1", "bench cpuid instructions=1 exits=1 more=2"]
        {
            assert_eq!(cost_in(line), None, "{line}");
        }
    }

    #[test]
    fn the_log_says_what_was_measured() {
        let log =
            |words: &str| format!("umbra: hello\r\numbra:   {words} on 1 of 1 CPUs: 16 ASIDs\r\nbench x\r\n");
        assert_eq!(virtualization(&log("SVM with nested paging")), "SVM with nested paging");
        assert_eq!(virtualization(&log("VMX with EPT")), "VMX with EPT");
        assert_eq!(virtualization(&log("VMX, EPT")), "VMX");
        assert_eq!(virtualization(""), "virtualization unknown");
    }
}
