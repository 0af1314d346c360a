//! The Umbra hypervisor: everything above the entry stubs. Modules that need privileged instructions exist only
//! on the bare-metal target; the rest is also built and tested on the host.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod acpi;
pub mod console;
pub mod cpu;
pub mod devices;
pub mod efi;
#[cfg(any(test, target_os = "none"))]
pub mod host_clock;
pub mod hw;
pub mod machine;
pub mod mm;
pub mod report;
pub mod smbios;
pub mod vm;

#[cfg(target_os = "none")]
mod panic;
#[cfg(target_os = "none")]
pub mod power;
#[cfg(target_os = "none")]
pub mod sched;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
pub mod sync;

#[cfg(target_os = "none")]
pub use start::start;
