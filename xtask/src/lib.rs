//! Every developer command, as a library: the emulator tests in `tests` share the driver, the bundle and the
//! build with the commands a person types.
#![deny(unsafe_code)]

pub mod bench;
pub mod build;
pub mod bundle;
pub mod check;
pub mod cli;
pub mod elf32;
pub mod emulator;
pub mod exec;
pub mod fuzz;
pub mod grub;
pub mod guest;
pub mod image;
pub mod miri;
pub mod mutants;
pub mod paths;
pub mod pxe;
pub mod run;
pub mod setup;
pub mod size;
mod sys;
pub mod test;
pub mod toolchain;

/// Prints one line on standard error, marked as coming from xtask: standard output belongs to the guest's console
/// and to results.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => { eprintln!("xtask: {}", format_args!($($arg)*)) };
}
