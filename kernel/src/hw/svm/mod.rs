//! AMD SVM with nested paging. AMD APM vol. 2, chapter 15.

pub mod capabilities;
pub mod exit;
#[cfg(any(test, target_os = "none"))]
mod nmi;
pub mod permission_map;
pub mod vmcb;

#[cfg(target_os = "none")]
mod cpu;
#[cfg(target_os = "none")]
mod entry;
#[cfg(target_os = "none")]
mod vcpu;

#[cfg(target_os = "none")]
pub use cpu::Svm;
#[cfg(target_os = "none")]
pub use entry::is_stray_debug_trap;
