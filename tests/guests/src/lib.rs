//! What every test guest shares: entry, console, case reporting, traps, page tables, devices and mode switches.
//!
//! A guest is a Multiboot 1 payload. It runs unchanged on a bare emulator, which is how each case was validated,
//! and as a guest of Umbra. It prints one line per case (`ok NAME`, `FAIL NAME: expected …, got …` or
//! `skip NAME: reason`), then `done N passed, N failed`, and writes 0 or 1 to port 0xf4. Nothing else counts as
//! success: a guest that hangs or dies never prints `done`.
//!
//! Words on the command line: `only=PREFIX` runs the cases whose name begins so, `trace` names each case before
//! it starts, `tcg` says that the processor underneath is QEMU's TCG (see [`platform`]), `bochs-svm` and `bochs-vmx`
//! that it is Bochs, `cr-writes-intercepted` that bad writes of CR3 and CR4 never reach it.
//!
//! Privileged wrappers here are safe functions on purpose. A test guest owns its whole machine and wrecking it is
//! often the point; wrong use fails a case, not a system.
#![no_std]
// Entry code, descriptor tables and raw memory are what this library is about.
#![allow(unsafe_code)]
// Taking any assembly is what `exec!` is for.
#![allow(clippy::macro_metavars_in_unsafe)]

pub mod cpu;
pub mod dev;
pub mod entry;
pub mod frames;
pub mod machine;
pub mod modes;
pub mod multiboot;
pub mod paging;
pub mod platform;
pub mod report;
pub mod serial;
pub mod smp;
pub mod trap;
pub mod user;

/// The processor's instructions and registers, which nearly every case is about.
pub mod prelude {
    pub use crate::cpu::*;
}

mod racy;
pub use racy::Racy;

/// Runs one `asm!` block. See the macro's body for why that is sound enough for a test guest.
#[macro_export]
macro_rules! exec {
    ($($body:tt)*) => {{
        // SAFETY: a test guest runs alone on a machine that it owns. Each block names the registers it changes;
        // memory it writes was allocated for the case, and what the instruction does to the machine is what the
        // case is about. `machine::baseline` puts control state back after the case.
        unsafe { core::arch::asm!($($body)*) }
    }};
}

/// Names the function that runs when the machine is set up; the program ends when it returns.
#[macro_export]
macro_rules! main {
    ($run:path) => {
        #[no_mangle]
        extern "Rust" fn guest_main() {
            let run: fn() = $run;
            run()
        }
    };
}
