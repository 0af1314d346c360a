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
    while_remapping, write_bytes, write_line, Devices,
};
