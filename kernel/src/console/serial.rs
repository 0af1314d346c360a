//! A serial port as an output of the console and its keyboard.
// Port I/O.
#![allow(unsafe_code)]

use uart_16550::backend::PioBackend;
use uart_16550::spec::registers::LSR;
use uart_16550::{BaudRate, Config, Uart16550};

/// First port of COM1.
pub(super) const COM1: u16 = 0x3f8;
/// First port of COM2.
pub(super) const COM2: u16 = 0x2f8;
/// A full FIFO takes 1.4 ms at 115200 baud and a port read about a microsecond; a port that is busy for much longer
/// is stuck: its reader went away, or it is broken.
pub(super) const POLLS: u32 = 1 << 22;

/// A port that may not be there.
pub(super) struct Serial {
    uart: Option<Uart16550<PioBackend>>,
    /// Its first port, if it is there.
    base: Option<u16>,
    /// It took nothing for so long that output is dropped until it does.
    stuck: bool,
}

impl Serial {
    /// No port.
    pub(super) const fn absent() -> Self {
        Self { uart: None, base: None, stuck: false }
    }

    /// The port whose registers begin at `base`, set to 115200 baud, 8N1; absent where nothing answers.
    pub(super) fn open(base: u16) -> Self {
        const CONFIG: Config = Config { baud_rate: BaudRate::Baud115200, ..Config::DEFAULT };
        // SAFETY: COM1 and COM2 have their ports by convention, another one is named by the firmware for this purpose;
        // after the entry stub only this module uses them.
        let uart = unsafe { Uart16550::new_port(base) }.ok();
        let uart = uart.and_then(|mut uart| uart.init(CONFIG).is_ok().then_some(uart));
        Self { base: uart.is_some().then_some(base), uart, stuck: false }
    }

    /// Its first port, if it is there.
    pub(super) fn base(&self) -> Option<u16> {
        self.base
    }

    /// Sends bytes, or drops them where the port does not take them.
    pub(super) fn put(&mut self, mut bytes: &[u8]) {
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

    /// A byte that has arrived.
    #[inline]
    pub(super) fn read(&mut self) -> Option<u8> {
        self.uart.as_mut()?.try_receive_byte().ok()
    }

    /// Waits, not for ever, until everything has left the port.
    pub(super) fn flush(&mut self) {
        let Some(uart) = &mut self.uart else { return };
        for _ in 0..POLLS {
            if uart.lsr().contains(LSR::TRANSMITTER_EMPTY) {
                return;
            }
        }
    }
}
