//! CR0.WP, cleared and set again: most often nothing happens in between that would need another root.
use super::Mmu;
use crate::mutant::{self, Mutant};
use crate::role::Cr0;

/// Times that WP is cleared with a switch of roots after it was needed once.
const SWITCHES: u8 = 16;

/// How CR0.WP was cleared.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unprotected {
    /// WP is clear, but the vCPU runs on the root for WP set.
    pub(super) is_pending: bool,
    /// How often to switch at once, for the last time without led to a fault.
    switches: u8,
}

impl Mmu {
    /// [`mov_to_cr0`](Self::mov_to_cr0) that changes nothing but WP, as far as nothing has to be done for it; `false`
    /// if something has: then nothing has happened.
    ///
    /// With WP cleared the vCPU runs on, on the root that it has: that one permits less than the guest's tables do now.
    /// The first fault switches to the one that permits as much, but most often WP is set before there is one.
    #[inline]
    pub fn mov_to_cr0_wp(&mut self, cr0: Cr0) -> bool {
        let (old, on) = (self.state.regs.cr0, cr0.contains(Cr0::WP));
        if ((cr0 ^ old) & (Cr0::WP | Cr0::PG)) != Cr0::WP || !self.is_plain() {
            return false;
        }
        if on {
            if !self.unprotected.is_pending && !mutant::is(Mutant::UnprotectedRootKept) {
                return false;
            }
        } else if self.unprotected.switches != 0 {
            self.unprotected.switches -= 1;
            return false;
        }
        self.unprotected.is_pending = !on;
        self.state.regs.cr0 = cr0;
        self.role = self.role.with_write_protect(on);
        true
    }

    /// There is a fault. If it may be one of the root for WP set alone, switches to the one for WP clear; whether the
    /// vCPU has a root after that.
    #[inline]
    pub(super) fn settle_write_protect(&mut self) -> bool {
        if self.unprotected.is_pending && !mutant::is(Mutant::UnprotectedFaultKept) {
            self.unprotected.switches = SWITCHES;
            let _ = self.flush_nothing();
        }
        !self.has_work()
    }
}
