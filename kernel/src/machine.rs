//! The machine that Umbra found and owns, as the virtual machines' code sees it.

use crate::acpi::Acpi;
use crate::cpu::clock::Calibration;
use crate::cpu::features::Features;
use crate::mm::map::MemorySummary;

/// Everything the boot sequence learnt. It never changes afterwards.
#[derive(Debug)]
pub struct Machine {
    /// What the processors can do.
    pub features: &'static Features,
    /// Sizes of memory.
    pub memory: MemorySummary,
    /// What the firmware's tables say.
    pub acpi: Acpi,
    /// Rate of the time-stamp counter, and what told it.
    pub tsc: Calibration,
    /// CPUs that run Umbra, the boot CPU included.
    pub cpus_online: usize,
    /// The boot bundle; empty when none was loaded.
    pub ramdisk: &'static [u8],
}
