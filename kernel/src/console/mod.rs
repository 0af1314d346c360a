//! The console: serial ports and a screen, shared by the log and by guests.

pub mod keys;
pub mod lines;
pub mod screen;

#[cfg(target_os = "none")]
mod framebuffer;
#[cfg(target_os = "none")]
mod keyboard;
#[cfg(target_os = "none")]
mod outputs;
#[cfg(target_os = "none")]
mod serial;

#[cfg(target_os = "none")]
pub use outputs::{
    add_keyboard, add_serial, break_lock, choose, devices, flush, init, print, read_byte, try_print,
    while_remapping, write_bytes, write_line,
};

/// What there is of a console.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// First port of the first serial port.
    pub com1: Option<u16>,
    /// First port of the second one.
    pub com2: Option<u16>,
    /// The screen.
    pub screen: Option<ScreenInfo>,
    /// Whether a keyboard is asked.
    pub keyboard: bool,
}

/// A screen in short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScreenInfo {
    /// Physical address of its memory.
    pub address: u64,
    /// Name of its format.
    pub mode: &'static str,
    /// Columns of text.
    pub columns: usize,
    /// Rows of text.
    pub rows: usize,
}
