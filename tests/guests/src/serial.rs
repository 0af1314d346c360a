//! COM1 output by polling, and the `print!`/`println!` macros on top of it.
use crate::cpu::{inb, outb};
use core::fmt;

const COM1: u16 = 0x3f8;
/// Line status register: transmitter holding register empty, data ready. National PC16550D, table II.
const LSR: u16 = COM1 + 5;
const LSR_THRE: u8 = 0x20;
const LSR_DR: u8 = 0x01;

/// 115200 8N1, FIFO on, no interrupts.
pub fn init() {
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 0x80);
    outb(COM1, 1);
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 3);
    outb(COM1 + 2, 0xc7);
    outb(COM1 + 4, 3);
}

/// Sends one byte; gives up waiting after a while so that a dead UART cannot hang the guest in silence.
pub fn put(byte: u8) {
    for _ in 0..1_000_000 {
        if inb(LSR) & LSR_THRE != 0 {
            break;
        }
    }
    outb(COM1, byte);
}

/// Takes one received byte, if there is one.
pub fn get() -> Option<u8> {
    (inb(LSR) & LSR_DR != 0).then(|| inb(COM1))
}

/// The console as a `fmt::Write`.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(put);
        Ok(())
    }
}

/// Prints to COM1.
#[macro_export]
macro_rules! print {
    ($($arg:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::serial::Console, format_args!($($arg)*));
    }};
}

/// Prints a line to COM1.
#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($arg:tt)*) => { $crate::print!("{}\n", format_args!($($arg)*)) };
}
