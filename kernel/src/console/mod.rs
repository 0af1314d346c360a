//! The console: COM1, shared by the log and by guests.

pub mod lines;

#[cfg(target_os = "none")]
mod com1;

#[cfg(target_os = "none")]
pub use com1::{break_lock, flush, init, print, read_byte, try_print, write_bytes, write_line};
