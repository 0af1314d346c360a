//! Intel VMX with EPT. SDM vol. 3, chapters 24 to 31.

pub mod access_rights;
pub mod capabilities;
pub mod check;
pub mod choice;
pub mod controls;
pub mod dirty_log;
pub mod event;
pub mod exit;
pub mod instruction_error;
pub mod listing;
pub mod msr_bitmap;
pub mod real_mode;
pub mod vmcs;

#[cfg(any(test, target_os = "none"))]
mod cache;
#[cfg(target_os = "none")]
mod cpu;
#[cfg(target_os = "none")]
mod decode;
#[cfg(target_os = "none")]
mod entry;
#[cfg(target_os = "none")]
mod instructions;
#[cfg(target_os = "none")]
mod msr_area;
#[cfg(target_os = "none")]
mod region;
#[cfg(target_os = "none")]
mod registers;
#[cfg(target_os = "none")]
mod setup;
#[cfg(target_os = "none")]
mod spoil;
#[cfg(target_os = "none")]
mod vcpu;

#[cfg(target_os = "none")]
pub use cpu::Vmx;
