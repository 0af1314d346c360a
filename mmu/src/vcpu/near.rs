//! What is done at once, with nothing to be remembered; near the last faults without a walk.
use super::requests::Sync;
use super::Mmu;
use crate::access::Access;
use crate::addr::{Gpa, Gva};
use crate::format::EntryFormat;
use crate::kind::{Near, NearFault, ShadowMmu};
use crate::memory::{Backing, Exclusive};
use crate::mutant::{self, FlushSite};
use crate::tables::TableMemory;
use crate::walk::{PagingContext, WalkRegs};

impl Mmu {
    /// What is known about the table that translates `address`, if a fault was in it lately.
    #[inline(always)]
    fn near(&self, address: Gva) -> Option<&Near> {
        let [last, before] = &self.roots.current()?.near;
        let is_for = |near: &&Near| near.is_for(self.root, address);
        last.as_ref().filter(is_for).or_else(|| before.as_ref().filter(is_for))
    }

    /// A fault of an access near the last one: the walk and what follows from it, if that is a leaf to be made or a
    /// fault of the guest's. `None` if it takes more: then nothing has happened that the walk would not do anyway.
    ///
    /// `context` and `regs` are those of the vCPU's registers. The fault is [told](Self::page_fault) already.
    #[inline]
    pub fn fault_near<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        context: &PagingContext<Gva, Gpa>,
        regs: &WalkRegs,
        address: Gva,
        access: Access,
    ) -> Option<NearFault> {
        if self.unprotected.is_pending {
            return None;
        }
        let near = self.near(address)?;
        let (outcome, had_leaf) = kind.fault_near(guard, near, context, regs, address, access)?;
        if matches!(outcome, NearFault::Guest(_)) && !mutant::drops(FlushSite::PageFault) {
            if had_leaf {
                self.forget(address);
            } else {
                // The fault itself took the address from the tag, which cannot have found it in the root again.
                self.leave_behind(address);
            }
        }
        Some(outcome)
    }

    /// [`invlpg`](Self::invlpg), together with what it asks for; the entry flushes the address. `None` if there is
    /// more to be done first: then nothing has happened.
    #[inline]
    pub fn invlpg_at_once<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        address: Gva,
    ) -> Option<()> {
        match self.near(address) {
            Some(near) if kind.sync_near(guard, near, address) => {}
            _ => return self.flush_at_once(kind, guard, address, FlushSite::Invlpg),
        }
        if !mutant::drops(FlushSite::Invlpg) {
            self.forget(address);
        }
        Some(())
    }

    /// [`page_fault`](Self::page_fault), in the same way.
    pub fn page_fault_at_once<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        address: Gva,
    ) -> Option<()> {
        self.flush_at_once(kind, guard, address, FlushSite::PageFault)
    }

    /// Both, wherever the address is.
    #[inline(never)]
    fn flush_at_once<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        address: Gva,
        site: FlushSite,
    ) -> Option<()> {
        if self.has_work() {
            return None;
        }
        // INVLPG may name one that is not canonical, which has no translation.
        if self.role.check_canonical(address).is_err() || mutant::drops(site) {
            return Some(());
        }
        match self.near(address) {
            Some(near) if kind.sync_near(guard, near, address) => {}
            _ => kind.sync_address(guard, self.root, address),
        }
        self.forget(address);
        Some(())
    }

    /// The current root is up to date for `address`, which the guest has flushed: the others are behind, and so is
    /// the tag.
    #[inline]
    fn forget(&mut self, address: Gva) {
        self.leave_behind(address);
        if !mutant::drops(FlushSite::BehindAddress) {
            let _ = self.flush_address(address);
        }
    }

    /// The previous roots of whoever runs are behind by `address`.
    #[inline]
    fn leave_behind(&mut self, address: Gva) {
        let context = self.context;
        self.roots.mark_from(1, Sync::Address(address), |key| key.tag().context == context);
    }
}
