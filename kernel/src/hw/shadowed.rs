//! Control registers of a guest whose addresses are translated by shadow tables alone, without a second stage: what the
//! guest wrote, and what the processor is given in its place.
//!
//! The processor always pages, on tables of eight-byte entries: three levels below 4 GiB outside long mode, else four or
//! five. It always heeds read-only pages and no-execute bits; what a guest without CR0.WP or EFER.NXE expects is in the
//! tables themselves.
use crate::vm::control_regs::{uses_pdptes, CR0_PG, CR0_WP, CR4_LA57, CR4_PAE, CR4_PCIDE, CR4_SMEP};
use crate::vm::msr::{EFER_LMA, EFER_LME};
use mmu::{Npt, NptHost, Pae, PaeHost};

/// CR4: supervisor-mode access prevention.
const CR4_SMAP: u64 = 1 << 21;
/// CR4: protection keys of user pages, and of the supervisor's.
const CR4_PKE: u64 = 1 << 22;
const CR4_PKS: u64 = 1 << 24;
/// EFER: no-execute.
const EFER_NXE: u64 = 1 << 11;

/// What the processor is given of tables.
#[derive(Clone, Copy, Debug)]
pub struct ShadowFormat {
    /// Tables of long mode.
    pub long: Npt,
    /// Roots of three levels.
    pub pae: Pae,
}

impl ShadowFormat {
    /// The formats of a CPU.
    pub fn new(host: &NptHost) -> Self {
        Self { long: Npt::new(host), pae: Pae::new(&PaeHost { max_phys_addr: host.max_phys_addr }) }
    }
}

/// CR0, CR3, CR4 and EFER.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControlRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

impl ControlRegisters {
    /// PAE paging outside long mode.
    #[must_use]
    pub const fn uses_pdptes(&self) -> bool {
        uses_pdptes(self.cr0, self.cr4, self.efer)
    }

    /// What the processor runs with while the guest's registers are these; `root` is the shadow table for CR3.
    #[must_use]
    pub const fn for_processor(&self, root: u64) -> Self {
        let paging = self.cr0 & CR0_PG != 0;
        // Without paging these have no effect on the guest, but would have one on the tables that stand in for it.
        let paged_only = if paging { 0 } else { CR4_SMEP | CR4_SMAP | CR4_PKE | CR4_PKS | CR4_LA57 };
        // LME with the paging that is always on would be long mode.
        let long_only = if self.efer & EFER_LMA != 0 { 0 } else { EFER_LME };
        Self {
            cr0: self.cr0 | CR0_PG | CR0_WP,
            cr3: root,
            cr4: (self.cr4 | CR4_PAE) & !(CR4_PCIDE | paged_only),
            efer: (self.efer | EFER_NXE) & !long_only,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::control_regs::CR0_PE;

    const ROOT: u64 = 0x5000;

    fn given(cr0: u64, cr4: u64, efer: u64) -> ControlRegisters {
        ControlRegisters { cr0, cr3: 0x1234_5000, cr4, efer }.for_processor(ROOT)
    }

    #[test]
    fn the_processor_always_pages_and_protects() {
        for cr0 in [0, CR0_PE, CR0_PE | CR0_PG, CR0_PE | CR0_PG | CR0_WP] {
            let given = given(cr0, 0, 0);
            assert_eq!(given.cr0, cr0 | CR0_PG | CR0_WP);
            assert_eq!((given.cr3, given.cr4, given.efer), (ROOT, CR4_PAE, EFER_NXE));
        }
    }

    #[test]
    fn long_mode_is_the_guests_own() {
        let long = EFER_LME | EFER_LMA;
        assert_eq!(given(CR0_PE | CR0_PG, CR4_PAE, long).efer, long | EFER_NXE);
        assert_eq!(given(CR0_PE, CR4_PAE, EFER_LME).efer, EFER_NXE, "enabled, but not active yet");
    }

    #[test]
    fn what_needs_paging_waits_for_it() {
        let all = CR4_SMEP | CR4_SMAP | CR4_PKE | CR4_PKS | CR4_LA57;
        assert_eq!(given(CR0_PE, all, 0).cr4, CR4_PAE);
        assert_eq!(given(CR0_PE | CR0_PG, all | CR4_PCIDE, 0).cr4, CR4_PAE | all, "but never PCIDs");
    }
}
