//! A running emulator: its process, and its serial line as two files.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::machine::{Kind, Machine};
use crate::bundle::Bundle;
use crate::exec::CommandLine;
use crate::say;
use crate::sys::{self, Watch};

/// How the emulator's own messages reach people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Messages {
    /// On standard error.
    Shown,
    /// In the file `emulator.log` of the machine's folder.
    Filed,
}

/// An emulator that runs a machine. It is killed when this is dropped.
#[derive(Debug)]
pub struct Emulator {
    child: Child,
    line: CommandLine,
    to_guest: File,
    from_guest: File,
    /// Our copy of the emulator's end of a pseudo terminal.
    slave: Option<File>,
    queue: VecDeque<u8>,
    pace: Pace,
    next_write: Instant,
    ended: Option<ExitStatus>,
}

/// How fast a serial line can be fed without losing bytes.
#[derive(Clone, Copy, Debug)]
struct Pace {
    bytes: usize,
    gap: Duration,
}

impl Pace {
    fn of(kind: Kind) -> Self {
        match kind {
            // QEMU reads its standard input only while the UART's FIFO has room.
            Kind::Qemu => Self { bytes: 4096, gap: Duration::ZERO },
            // Bochs reads a byte per character time, whether there is room or not.
            Kind::Bochs => Self { bytes: 8, gap: Duration::from_millis(20) },
        }
    }
}

impl Emulator {
    /// Writes the machine's files, shows the command line and starts it.
    pub fn start(machine: &Machine, bundle: &Bundle, messages: Messages) -> Result<Self> {
        machine.prepare(bundle)?;
        let log = || {
            let path = machine.dir.join("emulator.log");
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))
        };
        match machine.kind {
            Kind::Qemu => {
                let line = machine.command_line("stdio")?;
                let stderr = match messages {
                    Messages::Shown => Stdio::inherit(),
                    Messages::Filed => log()?.into(),
                };
                let mut child = spawn(&line, Stdio::piped(), Stdio::piped(), stderr)?;
                let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
                let (stdin, stdout) = stdin.zip(stdout).context("the emulator has no serial line")?;
                let to_guest = File::from(OwnedFd::from(stdin));
                let from_guest = File::from(OwnedFd::from(stdout));
                Self::new(machine.kind, child, line, to_guest, from_guest, None)
            }
            Kind::Bochs => {
                let pty = sys::open_pty().context("cannot open a pseudo terminal")?;
                let line = machine.command_line(&pty.path)?;
                let log = log()?;
                let child = spawn(&line, Stdio::null(), log.try_clone()?.into(), log.into())?;
                say!("(by hand, `tty` prints the name of the terminal to put after dev=)");
                let from_guest = pty.master.try_clone()?;
                Self::new(machine.kind, child, line, pty.master, from_guest, Some(pty.slave))
            }
        }
    }

    fn new(
        kind: Kind,
        child: Child,
        line: CommandLine,
        to_guest: File,
        from_guest: File,
        slave: Option<File>,
    ) -> Result<Self> {
        let emulator = Self {
            child,
            line,
            to_guest,
            from_guest,
            slave,
            queue: VecDeque::new(),
            pace: Pace::of(kind),
            next_write: Instant::now(),
            ended: None,
        };
        sys::set_nonblocking(emulator.to_guest.as_raw_fd())?;
        sys::set_nonblocking(emulator.from_guest.as_raw_fd())?;
        Ok(emulator)
    }

    /// The command line it was started with.
    pub fn command_line(&self) -> &CommandLine {
        &self.line
    }

    /// Queues bytes for the guest; [`Emulator::wait`] sends them as fast as the serial line takes them.
    pub fn send(&mut self, bytes: &[u8]) {
        self.queue.extend(bytes);
    }

    /// How many bytes have not been sent yet.
    pub fn unsent(&self) -> usize {
        self.queue.len()
    }

    /// Waits at most `timeout` until the machine has written something, which is appended to `output`, or until one of
    /// `others` can be read, or until the emulator has ended. Tells which of `others` can be read.
    pub fn wait(
        &mut self,
        others: &[BorrowedFd<'_>],
        output: &mut Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<bool>> {
        // Bochs's serial line never hangs up while we hold its other end, so the process is asked now and then.
        let mut timeout = timeout.min(Duration::from_millis(100));
        let now = Instant::now();
        let may_write = !self.queue.is_empty() && self.ended.is_none();
        let write = may_write && now >= self.next_write;
        if may_write && !write {
            timeout = timeout.min(self.next_write - now);
        }
        let mut watches = vec![
            Watch::new(self.from_guest.as_fd(), self.ended.is_none(), false),
            Watch::new(self.to_guest.as_fd(), false, write),
        ];
        watches.extend(others.iter().map(|fd| Watch::new(*fd, true, false)));
        sys::poll(&mut watches, timeout).context("cannot wait for the emulator")?;
        let (readable, writable) = (watches[0].readable(), watches[1].writable());
        let others = watches[2..].iter().map(Watch::readable).collect();
        if writable {
            self.write_some()?;
        }
        // The process is asked before its output is read: what is read then is all there was.
        let exited = self.child.try_wait().context("cannot ask for the emulator's state")?;
        let closed = (readable || exited.is_some()) && self.read_all(output)?;
        if let Some(status) = exited {
            self.ended = Some(status);
            self.slave = None;
        } else if closed {
            // It has closed its serial line but not ended yet: do not spin until it has.
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(others)
    }

    /// How the emulator ended, if it has.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.ended
    }

    fn write_some(&mut self) -> Result<()> {
        let (front, _) = self.queue.as_slices();
        let some = &front[..front.len().min(self.pace.bytes)];
        match self.to_guest.write(some) {
            Ok(sent) => {
                self.queue.drain(..sent);
                self.next_write = Instant::now() + self.pace.gap;
            }
            Err(error) if is_not_now(&error) => {}
            // The emulator is ending; there is nobody left to type for.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.queue.clear(),
            Err(error) => return Err(error).context("cannot write to the serial line"),
        }
        Ok(())
    }

    /// Reads what there is; whether the line is closed.
    fn read_all(&mut self, output: &mut Vec<u8>) -> Result<bool> {
        let mut buffer = [0; 4096];
        // Bounded: a machine that prints without end must not keep us from the other files.
        for _ in 0..64 {
            match self.from_guest.read(&mut buffer) {
                Ok(0) => return Ok(true),
                Ok(len) => output.extend_from_slice(&buffer[..len]),
                Err(error) if is_not_now(&error) => return Ok(false),
                // What a pseudo terminal reports when its other end is closed.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(true),
                Err(error) => return Err(error).context("cannot read the serial line"),
            }
        }
        Ok(false)
    }
}

fn is_not_now(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn spawn(line: &CommandLine, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> Result<Child> {
    say!("{line}");
    let mut command = line.command();
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    sys::die_with_parent(&mut command);
    command.spawn().with_context(|| {
        format!("cannot start {}; `cargo xtask setup` installs it", line.program().to_string_lossy())
    })
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // Both fail only when the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
