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

    /// Waits until the console shows a match of `regex` after the last one found, and returns it. `^` and `$` match
    /// where lines start and end; an unfinished line, such as a prompt, has no end.
    pub fn expect(&mut self, regex: &str, timeout: Duration) -> Result<String> {
        let compiled = line_regex(regex)?;
        let deadline = Instant::now() + timeout;
        loop {
            if let Some((found, end)) = self.text.find_ended(&compiled, self.position) {
                self.position = end;
                return Ok(found);
            }
            if let Some(status) = self.text.end_status() {
                bail!("Umbra ended with status {status} before /{regex}/ was seen");
            }
            if let Some(status) = self.emulator.ended() {
                bail!("the emulator ended ({status}) before /{regex}/ was seen{}", self.complaint());
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
        let powered_off =
            self.emulator.ended().is_some_and(|status| status.success() || self.bochs_powered_off());
        Ok(Outcome { status: self.text.end_status(), powered_off, log: self.log() })
    }

    fn pump(&mut self, deadline: Instant) -> Result<()> {
        let mut output = Vec::new();
        self.emulator.wait(&[], &mut output, deadline.saturating_duration_since(Instant::now()))?;
        self.file.write_all(&output).context("cannot write the console's log")?;
        self.text.push(&output);
        Ok(())
    }

    /// Bochs takes a power-off for a panic and fails, but says what it was.
    fn bochs_powered_off(&self) -> bool {
        let text = File::open(&self.messages).map(|mut file| exec::tail(&mut file, 10)).unwrap_or_default();
        text.contains("soft power off") || text.contains("Shutdown")
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    /// A machine whose emulator is the shell script `script`, which finds the serial line on its standard input and output.
    fn machine(name: &str, script: &str) -> Machine {
        let dir = std::env::temp_dir().join(format!("umbra-session-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let program = dir.join("emulator");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let umbra: PathBuf = dir.join("umbra");
        fs::write(&umbra, "").unwrap();
        Machine { program: Some(program), umbra, ..Machine::new(dir) }
    }

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn a_conversation() {
        let script = "printf 'umbra: hello\\r\\nname? '; read name; printf 'hello %s\\r\\n' \"$name\"
                      echo 'umbra: end: status 5'";
        let machine = machine("talk", script);
        let mut session = Session::start(&machine, &Bundle::new("x")).unwrap();
        assert_eq!(session.expect("^name[?] ", SOON).unwrap(), "name? ");
        session.send("Kilroy\n").unwrap();
        assert_eq!(
            session.expect("^name[?] hello .*$", SOON).unwrap_err().to_string().split(' ').next(),
            Some("Umbra")
        );
        assert!(session.log().contains("hello Kilroy"));
        let outcome = session.finish(SOON).unwrap();
        assert_eq!((outcome.status, outcome.powered_off), (Some(5), true));
        assert_eq!(
            fs::read(machine.dir.join("console.log")).unwrap().iter().filter(|b| **b == b'\r').count(),
            2
        );
        fs::remove_dir_all(&machine.dir).unwrap();
    }

    #[test]
    fn an_emulator_that_ends_early_is_noticed_with_its_complaint() {
        let machine = machine("dies", "echo 'umbra: hello'; echo 'cannot do that' >&2; exit 3");
        let mut session = Session::start(&machine, &Bundle::new("")).unwrap();
        let error = session.expect("never", SOON).unwrap_err().to_string();
        assert!(error.contains("ended") && error.contains("cannot do that"), "{error}");
        let outcome = session.finish(SOON).unwrap();
        assert_eq!((outcome.status, outcome.powered_off), (None, false));
        assert_eq!(outcome.log, "umbra: hello\n");
        fs::remove_dir_all(&machine.dir).unwrap();
    }

    #[test]
    fn bochs_fails_when_it_powers_off() {
        for (complaint, powered_off) in
            [("[ACPI  ] ACPI control: soft power off", true), ("[CPU0  ] triple fault", false)]
        {
            let machine =
                machine("bochs", &format!("echo 'umbra: end: status 0'; echo '{complaint}' >&2; exit 1"));
            let outcome = Session::start(&machine, &Bundle::new("")).unwrap().finish(SOON).unwrap();
            assert_eq!(outcome.powered_off, powered_off);
            fs::remove_dir_all(&machine.dir).unwrap();
        }
    }

    #[test]
    fn a_machine_that_hangs_is_given_up_and_killed() {
        let machine = machine("hangs", "echo $$; exec sleep 1000");
        let mut session = Session::start(&machine, &Bundle::new("")).unwrap();
        let pid = session.expect("^[0-9]+$", SOON).unwrap();
        assert!(session
            .expect("more", Duration::from_millis(50))
            .unwrap_err()
            .to_string()
            .contains("not seen"));
        assert!(session.finish(Duration::from_millis(50)).unwrap_err().to_string().contains("did not end"));
        let alive = std::process::Command::new("kill")
            .args(["-0", &pid])
            .stderr(std::process::Stdio::null())
            .status();
        assert!(!alive.unwrap().success());
        fs::remove_dir_all(&machine.dir).unwrap();
    }

    #[test]
    fn a_machine_that_stays_on_after_the_end_did_not_power_off() {
        let machine = machine("stays", "echo 'umbra: end: status 0'; exec sleep 1000");
        let outcome = Session::start(&machine, &Bundle::new("")).unwrap().finish(SOON).unwrap();
        assert_eq!((outcome.status, outcome.powered_off), (Some(0), false));
        fs::remove_dir_all(&machine.dir).unwrap();
    }

    #[test]
    fn a_wrong_machine_is_not_started() {
        let machine = machine("wrong", "exit 0");
        fs::remove_file(&machine.umbra).unwrap();
        let error = Session::start(&machine, &Bundle::new("")).unwrap_err().to_string();
        assert!(error.contains("cargo xtask build"), "{error}");
        fs::remove_dir_all(&machine.dir).unwrap();
    }
}
