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
pub(super) fn join(emulator: Emulator, limits: &Limits) -> Result<End> {
    let signals = Signals::catch().context("cannot catch signals")?;
    let stdin = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    // The terminal is raw as long as this lives.
    let mut _raw = None;
    let input = if stdin.is_terminal() {
        say!("the terminal is now the guest's console: {}", chord::HELP);
        _raw = Some(RawMode::enter(stdin.as_raw_fd()).context("cannot use the terminal")?);
        Input::Keys(Chords::default())
    } else {
        Input::Script(Script::new(Instant::now()))
    };
    let deadline = limits.timeout.map(|timeout| Instant::now() + timeout);
    let text = Text::new();
    let mut conversation = Conversation { emulator, signals, stdin, input, text, limits, deadline };
    let end = conversation.hold();
    if !conversation.text.unfinished_line().is_empty() {
        // What is printed after the run starts on a line of its own.
        println!();
    }
    end
}

struct Conversation<'a> {
    emulator: Emulator,
    signals: Signals,
    stdin: File,
    input: Input,
    text: Text,
    limits: &'a Limits,
    deadline: Option<Instant>,
}

impl Conversation<'_> {
    fn hold(&mut self) -> Result<End> {
        loop {
            let (searched, has_input) = self.listen()?;
            if let Some(end) = self.end(searched)? {
                return Ok(end);
            }
            if has_input && self.read_input() {
                return Ok(End::Left);
            }
            if let Input::Script(script) = &mut self.input {
                if self.emulator.unsent() == 0 {
                    if let Some(line) = script.next(&self.text, Instant::now()) {
                        self.emulator.send(&line);
                    }
                }
            }
        }
    }

    /// Waits for something to happen and shows what the machine has printed. Returns where in the text a search for it
    /// starts, and whether there is input.
    fn listen(&mut self) -> Result<(usize, bool)> {
        let wants_input = match &self.input {
            Input::Keys(_) => true,
            Input::Script(script) => script.wants_more(),
            Input::Nothing => false,
        };
        let mut watched = vec![self.signals.as_fd()];
        if wants_input {
            watched.push(self.stdin.as_fd());
        }
        let limit = self.deadline.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
        let mut output = Vec::new();
        let ready = self.emulator.wait(&watched, &mut output, limit)?;
        let searched = self.text.line_start();
        self.text.push(&output);
        show(&output)?;
        Ok((searched, ready.get(1) == Some(&true)))
    }

    /// What ends the run now, if anything does; what is waited for may be in the text from `searched` on.
    fn end(&mut self, searched: usize) -> Result<Option<End>> {
        if let Some(signal) = self.signals.take() {
            return Ok(Some(End::Signal(signal)));
        }
        if self.limits.until.as_ref().is_some_and(|regex| self.text.find(regex, searched).is_some()) {
            return Ok(Some(End::Seen));
        }
        if let Some(status) = self.text.end_status() {
            self.show_the_rest()?;
            return Ok(Some(End::Umbra(status)));
        }
        if let Some(status) = self.emulator.ended() {
            return Ok(Some(End::Emulator(status)));
        }
        Ok(self.deadline.is_some_and(|end| Instant::now() >= end).then_some(End::TimedOut))
    }

    /// Takes what has been typed. Whether the user leaves.
    fn read_input(&mut self) -> bool {
        let mut buffer = [0; 4096];
        // An input that cannot be read has ended.
        let len = self.stdin.read(&mut buffer).unwrap_or(0);
        match &mut self.input {
            Input::Keys(_) if len == 0 => self.input = Input::Nothing,
            Input::Keys(chords) => {
                let mut keys = Vec::new();
                if chords.filter(&buffer[..len], &mut keys) {
                    return true;
                }
                self.emulator.send(&keys);
            }
            Input::Script(script) => script.supply(&buffer[..len], Instant::now()),
            Input::Nothing => {}
        }
        false
    }

    /// Umbra has said its last line; what the machine prints while it powers off still belongs to the run.
    fn show_the_rest(&mut self) -> Result<()> {
        let deadline = Instant::now() + POWER_OFF_GRACE;
        let mut output = Vec::new();
        while self.emulator.ended().is_none() && Instant::now() < deadline {
            self.emulator.wait(&[], &mut output, deadline.saturating_duration_since(Instant::now()))?;
        }
        show(&output)
    }
}

fn show(output: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(output).and_then(|()| stdout.flush()).context("cannot write the console's output")
}
