//! AMD SVM with nested paging. AMD APM vol. 2, chapter 15.

pub mod asid;
pub mod exit;
pub mod permission_map;
pub mod vmcb;

#[cfg(target_os = "none")]
mod cpu;
#[cfg(target_os = "none")]
mod entry;
#[cfg(target_os = "none")]
mod vcpu;

#[cfg(target_os = "none")]
pub use cpu::{enable_on_this_cpu, Svm};
#[cfg(target_os = "none")]
pub use entry::is_stray_debug_trap;
