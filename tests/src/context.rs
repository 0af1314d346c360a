//! What a scenario is given: a folder, a deadline, machines to boot.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, Result};
use xtask::build::Images;
use xtask::bundle::Bundle;
use xtask::emulator::{Acceleration, BochsCpu, Boot, Kind, Machine, Outcome, Session};
use xtask::guest::Linux;
use xtask::size::Size;

/// The surroundings of one scenario.
pub(crate) struct Ctx {
    /// Its folder: what its machines start from, and the console's log.
    pub(crate) dir: PathBuf,
    /// What was built.
    pub(crate) images: Images,
    deadline: Instant,
}

impl Ctx {
    pub(crate) fn new(dir: PathBuf, limit: Duration) -> Self {
        Self { dir, images: Images::places(), deadline: Instant::now() + limit }
    }

    /// The usual machine: QEMU, one CPU, 1 GiB.
    pub(crate) fn machine(&self) -> Machine {
        Machine { memory: Size::mib(1024), ..Machine::new(&self.dir) }
    }

    /// Bochs with this processor, one CPU and 512 MiB.
    pub(crate) fn bochs(&self, cpu: BochsCpu) -> Machine {
        Machine {
            kind: Kind::Bochs,
            boot: Boot::Iso,
            cpu: Some(cpu.model().into()),
            memory: Size::mib(512),
            ..self.machine()
        }
    }

    /// Boots a machine.
    pub(crate) fn boot(&self, machine: &Machine, bundle: &Bundle) -> Result<Vm> {
        Ok(Vm { session: Session::start(machine, bundle)?, deadline: self.deadline })
    }

    /// What is left of the scenario's time.
    pub(crate) fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// The Linux guest; the runner has made sure that it is there.
    pub(crate) fn linux(&self) -> Result<Linux> {
        xtask::setup::linux_guest().map_err(anyhow::Error::msg)
    }
}

/// A machine that runs Umbra. All waiting ends at the scenario's deadline.
pub(crate) struct Vm {
    session: Session,
    deadline: Instant,
}

impl Vm {
    /// Waits for a match on the console, after the last one. `^` and `$` are the ends of a line.
    pub(crate) fn expect(&mut self, regex: &str) -> Result<String> {
        self.session.expect(regex, self.remaining())
    }

    /// Types text.
    pub(crate) fn type_text(&mut self, text: &str) -> Result<()> {
        self.session.send(text)
    }

    /// Types a line.
    pub(crate) fn type_line(&mut self, line: &str) -> Result<()> {
        self.session.send(&format!("{line}\r"))
    }

    /// The console's text so far.
    pub(crate) fn log(&self) -> String {
        self.session.log()
    }

    /// What is left of the scenario's time.
    pub(crate) fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Waits until the run ends.
    pub(crate) fn end(self) -> Result<Outcome> {
        let remaining = self.remaining();
        self.session.finish(remaining)
    }

    /// Waits until the run ends, which must be with `status` and with the machine switched off.
    pub(crate) fn end_with(self, status: u8) -> Result<Outcome> {
        let outcome = self.end()?;
        match outcome.status {
            Some(got) if got != status => bail!("the run ended with status {got} instead of {status}"),
            Some(_) if !outcome.powered_off => {
                bail!("Umbra ended, but the machine did not switch itself off")
            }
            Some(_) => Ok(outcome),
            None => bail!("the emulator ended without Umbra's last line"),
        }
    }
}

/// The word by which the test guests know the emulator underneath and its peculiarities; none for a real processor.
pub(crate) fn platform_word(machine: &Machine) -> &'static str {
    match (machine.kind, machine.acceleration) {
        (Kind::Qemu, Acceleration::Tcg) => "tcg",
        (Kind::Qemu, Acceleration::Kvm) => "",
        (Kind::Bochs, _) if machine.cpu.as_deref() == Some(BochsCpu::Ryzen.model()) => "bochs-svm",
        (Kind::Bochs, _) => "bochs-vmx",
    }
}
