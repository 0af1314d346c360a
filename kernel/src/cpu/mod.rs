//! The processors: features, descriptor tables, exceptions, local APIC, time, and bringing up all of them.

pub mod clock;
#[cfg(any(target_os = "none", test))]
pub mod compaction;
pub mod features;

#[cfg(target_os = "none")]
pub mod backtrace;
#[cfg(target_os = "none")]
pub mod control;
#[cfg(target_os = "none")]
pub mod descriptors;
#[cfg(target_os = "none")]
pub mod interrupts;
#[cfg(target_os = "none")]
pub mod lapic;
#[cfg(target_os = "none")]
pub mod legacy_pic;
#[cfg(target_os = "none")]
pub mod machine_check;
#[cfg(target_os = "none")]
pub mod mailbox;
#[cfg(target_os = "none")]
pub mod msr;
#[cfg(target_os = "none")]
pub mod percpu;
pub mod random;
#[cfg(target_os = "none")]
pub mod smp;
#[cfg(target_os = "none")]
pub mod trap;
#[cfg(target_os = "none")]
pub mod tsc;

#[cfg(target_os = "none")]
pub use percpu::{all, init_boot_cpu, number, this, PerCpu};

/// What the processors can do, read once, on the boot CPU.
#[cfg(target_os = "none")]
pub fn features() -> &'static features::Features {
    static FEATURES: spin::Once<features::Features> = spin::Once::new();
    FEATURES.call_once(features::Features::detect)
}
