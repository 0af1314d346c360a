//! Drives an emulated machine: one description, one command line, a console to read and write, and an end.

mod accel;
mod bochs;
mod console;
mod cpu;
mod firmware;
mod hardware;
mod machine;
mod network;
mod process;
mod qemu;
mod session;

pub use accel::{Accel, Acceleration};
pub use console::{end_status, line_regex, Text};
pub use cpu::{check_model, BochsCpu};
pub use firmware::uefi_files;
pub use hardware::Hardware;
pub use machine::{Boot, Icount, Kind, Machine, Medium, Vmx};
pub use network::{Link, Network};
pub use process::{Emulator, Messages};
pub use session::{Outcome, Session};
