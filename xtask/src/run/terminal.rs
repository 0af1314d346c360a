//! Joins the terminal (or a pipe) with the machine's console until something ends the run.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use regex::bytes::Regex;

use super::chord::{self, Chords};
use super::script::Script;
use crate::emulator::{Emulator, Text};
use crate::say;
use crate::sys::{RawMode, Signals};

/// How long the machine may take to power itself off after Umbra's last line.
const POWER_OFF_GRACE: Duration = Duration::from_secs(1);

/// When to stop watching.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits {
    /// The console shows a match.
    pub(super) until: Option<Regex>,
    /// This much time has passed.
    pub(super) timeout: Option<Duration>,
}

/// What ended the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Umbra, with this status.
    Umbra(u8),
    /// The emulator ended without Umbra's last line.
    Emulator(ExitStatus),
    /// What was waited for has been seen.
    Seen,
    /// The time is over.
    TimedOut,
    /// The user left.
    Left,
    /// A signal came.
    Signal(i32),
}

enum Input {
    /// Typed at a terminal.
    Keys(Chords),
    Script(Script),
    Nothing,
}

/// Shows the machine's console on standard output and types standard input into it.
pub(super) fn join(mut emulator: Emulator, limits: &Limits) -> Result<End> {
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let mut stdin = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    // The terminal is raw as long as this lives.
    let mut _raw = None;
    let mut input = if stdin.is_terminal() {
        say!("the terminal is now the guest's console: {}", chord::HELP);
        _raw = Some(RawMode::enter(stdin.as_raw_fd()).context("cannot use the terminal")?);
        Input::Keys(Chords::default())
    } else {
        Input::Script(Script::new(Instant::now()))
    };
    let deadline = limits.timeout.map(|timeout| Instant::now() + timeout);
    let mut stdout = std::io::stdout();
    let mut text = Text::new();
    let mut output = Vec::new();
    loop {
        let wants_input = match &input {
            Input::Keys(_) => true,
            Input::Script(script) => script.wants_more(),
            Input::Nothing => false,
        };
        let mut watched = vec![signals.as_fd()];
        if wants_input {
            watched.push(stdin.as_fd());
        }
        let limit = deadline.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
        let ready = emulator.wait(&watched, &mut output, limit)?;
        let searched = text.line_start();
        text.push(&output);
        stdout
            .write_all(&output)
            .and_then(|()| stdout.flush())
            .context("cannot write the console's output")?;
        output.clear();

        if let Some(signal) = signals.take() {
            return Ok(End::Signal(signal));
        }
        if limits.until.as_ref().is_some_and(|regex| text.find(regex, searched).is_some()) {
            return Ok(End::Seen);
        }
        if let Some(status) = text.end_status() {
            show_the_rest(&mut emulator, &mut stdout)?;
            return Ok(End::Umbra(status));
        }
        if let Some(status) = emulator.ended() {
            return Ok(End::Emulator(status));
        }
        if deadline.is_some_and(|end| Instant::now() >= end) {
            return Ok(End::TimedOut);
        }
        if ready.get(1) == Some(&true) {
            let mut buffer = [0; 4096];
            // An input that cannot be read has ended.
            let len = stdin.read(&mut buffer).unwrap_or(0);
            match &mut input {
                Input::Keys(_) if len == 0 => input = Input::Nothing,
                Input::Keys(chords) => {
                    let mut keys = Vec::new();
                    if chords.filter(&buffer[..len], &mut keys) {
                        return Ok(End::Left);
                    }
                    emulator.send(&keys);
                }
                Input::Script(script) => script.supply(&buffer[..len], Instant::now()),
                Input::Nothing => {}
            }
        }
        if let Input::Script(script) = &mut input {
            if emulator.unsent() == 0 {
                if let Some(line) = script.next(&text, Instant::now()) {
                    emulator.send(&line);
                }
            }
        }
    }
}

/// Umbra has said its last line; what the machine prints while it powers off still belongs to the run.
fn show_the_rest(emulator: &mut Emulator, stdout: &mut impl Write) -> Result<()> {
    let deadline = Instant::now() + POWER_OFF_GRACE;
    let mut output = Vec::new();
    while emulator.ended().is_none() && Instant::now() < deadline {
        emulator.wait(&[], &mut output, deadline.saturating_duration_since(Instant::now()))?;
    }
    stdout.write_all(&output).and_then(|()| stdout.flush()).context("cannot write the console's output")
}
