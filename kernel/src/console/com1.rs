//! COM1 as the log's backend and the guests' terminal. Works before the heap, and in panics and NMIs.
// Port I/O, and taking a lock away from a CPU that will never give it back.
#![allow(unsafe_code)]

use super::lines::{Lines, Sink};
use crate::sync::IrqMutex;
use core::fmt;
use log::{Level, LevelFilter, Log, Metadata, Record};
use uart_16550::backend::PioBackend;
use uart_16550::spec::registers::LSR;
use uart_16550::{BaudRate, Config, Uart16550};

/// First port of COM1.
const BASE: u16 = 0x3f8;
/// A full FIFO takes 1.4 ms at 115200 baud and a port read about a microsecond; a port that is busy for much longer
/// is stuck: its reader went away, or it is broken.
const POLLS: u32 = 1 << 22;

static CONSOLE: IrqMutex<Lines<Com1>> = IrqMutex::new(Lines::new(Com1 { uart: None, stuck: false }));

struct Com1 {
    /// Nothing where there is no port.
    uart: Option<Uart16550<PioBackend>>,
    /// It took nothing for so long that output is dropped until it does.
    stuck: bool,
}

impl Sink for Com1 {
    fn put(&mut self, mut bytes: &[u8]) {
        let Some(uart) = &mut self.uart else { return };
        let mut polls = if self.stuck { 0 } else { POLLS };
        while !bytes.is_empty() {
            match uart.send_bytes(bytes) {
                0 if polls == 0 => {
                    self.stuck = true;
                    return;
                }
                0 => polls -= 1,
                sent => {
                    bytes = &bytes[sent..];
                    polls = POLLS;
                    self.stuck = false;
                }
            }
        }
    }
}

/// Initialises COM1, if there is one, and makes it the log. Once, on the boot CPU.
pub fn init() {
    const CONFIG: Config = Config { baud_rate: BaudRate::Baud115200, ..Config::DEFAULT };
    // SAFETY: COM1 has these ports by convention, and after the entry stub only this module uses them.
    let uart = unsafe { Uart16550::new_port(BASE) }.ok();
    CONSOLE.lock().sink().uart = uart.and_then(|mut uart| uart.init(CONFIG).is_ok().then_some(uart));
    // Fails only when there is a logger, which would be this one.
    let _ = log::set_logger(&Backend);
    log::set_max_level(LevelFilter::Info);
}

/// Sends raw bytes, as guests do.
pub fn write_bytes(bytes: &[u8]) {
    CONSOLE.lock().raw(bytes);
}

/// Sends the parts as one line of its own.
pub fn write_line(parts: &[&[u8]]) {
    CONSOLE.lock().line(parts);
}

/// A byte that was typed, if there is one.
pub fn read_byte() -> Option<u8> {
    CONSOLE.lock().sink().uart.as_mut()?.try_receive_byte().ok()
}

/// Prints one message of Umbra's own.
pub fn print(message: fmt::Arguments<'_>) {
    CONSOLE.lock().message("", message);
}

/// Prints one message if the console is free or soon will be: for NMI handlers, which may have interrupted its user.
pub fn try_print(message: fmt::Arguments<'_>) -> bool {
    CONSOLE.try_lock(1000).map(|mut console| console.message("", message)).is_some()
}

/// Makes the console usable although its user may have died in the middle of a message.
///
/// # Safety
/// The other CPUs have been told to stop for good.
pub unsafe fn break_lock() {
    if CONSOLE.try_lock(POLLS).is_none() {
        // SAFETY: the holder is this CPU, which will not return to it, or one that has stopped.
        unsafe { CONSOLE.force_unlock() };
    }
}

/// Waits, not for ever, until everything has left the port: a machine that goes off takes the rest with it.
pub fn flush() {
    let mut console = CONSOLE.lock();
    let Some(uart) = console.sink().uart.as_mut() else { return };
    for _ in 0..POLLS {
        if uart.lsr().contains(LSR::TRANSMITTER_EMPTY) {
            return;
        }
    }
}

struct Backend;

impl Log for Backend {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let label = match record.level() {
                Level::Error => "error: ",
                Level::Warn => "warning: ",
                Level::Info => "",
                Level::Debug => "debug: ",
                Level::Trace => "trace: ",
            };
            CONSOLE.lock().message(label, *record.args());
        }
    }

    fn flush(&self) {}
}
