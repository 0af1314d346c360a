//! A scripted conversation with a machine, for tests and benchmarks.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};

use super::console::{line_regex, Text};
use super::machine::Machine;
use super::process::{Emulator, Messages};
use crate::bundle::Bundle;
use crate::exec;

/// How long the machine may take to power itself off after Umbra's last line.
const POWER_OFF_GRACE: Duration = Duration::from_secs(5);

/// A machine and what has been said to it. The emulator is killed when this is dropped.
#[derive(Debug)]
pub struct Session {
    emulator: Emulator,
    text: Text,
    /// Where the next search starts.
    position: usize,
    /// `console.log` in the machine's folder: what the console showed, as far as it got.
    file: File,
    messages: std::path::PathBuf,
}

/// How a machine's run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status in Umbra's last line; `None` if the emulator ended without one.
    pub status: Option<u8>,
    /// Whether the emulator ended by itself, which is how a machine's power-off shows.
    pub powered_off: bool,
    /// The console's text.
    pub log: String,
}

impl Session {
    /// Starts the machine with the bundle.
    pub fn start(machine: &Machine, bundle: &Bundle) -> Result<Self> {
        let emulator = Emulator::start(machine, bundle, Messages::Filed)?;
        let path = machine.dir.join("console.log");
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        let messages = machine.dir.join("emulator.log");
        Ok(Self { emulator, text: Text::new(), position: 0, file, messages })
    }

    /// Waits until the console shows a match of `regex` after the last one found, and returns it. `^` and `$` match at
    /// the ends of lines.
    pub fn expect(&mut self, regex: &str, timeout: Duration) -> Result<String> {
        let compiled = line_regex(regex)?;
        let deadline = Instant::now() + timeout;
        loop {
            if let Some((found, end)) = self.text.find(&compiled, self.position) {
                self.position = end;
                return Ok(found);
            }
            if let Some(status) = self.emulator.ended() {
                bail!("the emulator ended ({status}) before /{regex}/ was seen{}", self.complaint());
            }
            if let Some(status) = self.text.end_status() {
                bail!("Umbra ended with status {status} before /{regex}/ was seen");
            }
            if Instant::now() >= deadline {
                bail!("/{regex}/ was not seen within {} s", timeout.as_secs_f32());
            }
            self.pump(deadline)?;
        }
    }

    /// Types `text`.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.emulator.send(text.as_bytes());
        self.pump(Instant::now())
    }

    /// The console's text so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(self.text.since(0)).into_owned()
    }

    /// Waits until the run ends by itself.
    pub fn finish(mut self, timeout: Duration) -> Result<Outcome> {
        let deadline = Instant::now() + timeout;
        while self.emulator.ended().is_none() && self.text.end_status().is_none() {
            if Instant::now() >= deadline {
                bail!("the run did not end within {} s", timeout.as_secs_f32());
            }
            self.pump(deadline)?;
        }
        let deadline = Instant::now() + POWER_OFF_GRACE;
        while self.emulator.ended().is_none() && Instant::now() < deadline {
            self.pump(deadline)?;
        }
        let powered_off = self.emulator.ended().is_some_and(|status| status.success());
        Ok(Outcome { status: self.text.end_status(), powered_off, log: self.log() })
    }

    fn pump(&mut self, deadline: Instant) -> Result<()> {
        let mut output = Vec::new();
        self.emulator.wait(&[], &mut output, deadline.saturating_duration_since(Instant::now()))?;
        self.file.write_all(&output).context("cannot write the console's log")?;
        self.text.push(&output);
        Ok(())
    }

    /// What the emulator itself had to say.
    fn complaint(&self) -> String {
        let text = File::open(&self.messages).map(|mut file| exec::tail(&mut file, 3)).unwrap_or_default();
        if text.is_empty() {
            text
        } else {
            format!(": {text}")
        }
    }
}
