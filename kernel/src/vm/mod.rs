//! Virtual machines: memory, loading, vCPUs, exits, CPUID and MSR policy, instruction emulation.

pub mod acpi_tables;
pub mod breakpoints;
pub mod clock;
pub mod control_regs;
pub mod cpuid;
pub mod emulate;
pub mod events;
pub mod exceptions;
pub mod invlpg;
pub mod layout;
pub mod load;
pub mod mov_cr;
pub mod msr;
pub mod notes;
pub mod pvclock;
pub mod ram;
pub mod report;

#[cfg(target_os = "none")]
mod exits;
#[cfg(target_os = "none")]
mod fetch;
#[cfg(target_os = "none")]
pub mod guest;
#[cfg(target_os = "none")]
pub mod instance;
#[cfg(target_os = "none")]
pub mod memory;
#[cfg(target_os = "none")]
mod output;
#[cfg(target_os = "none")]
pub mod paging;
#[cfg(target_os = "none")]
mod shadow;
#[cfg(target_os = "none")]
mod start;
#[cfg(target_os = "none")]
pub mod vcpu;
#[cfg(target_os = "none")]
mod view;

#[cfg(target_os = "none")]
pub use start::start;
