//! Faults and invalidations in the table that was used last: as long as nothing above it changes, no walk is needed.
//!
//! Writes to the tables above a lowest one are tracked, so as long as the links of the shadow stand, the guest's
//! entries above say what they said when the links were made. What is left of a walk is its last entry.
use super::compose::caching;
use super::lowest::{Lowest, LowestTable};
use super::sites::FlushSite;
use super::{is_nested, number, space, Kept, Note, ShadowMmu};
use crate::access::{Access, AccessKind, Prot};
use crate::addr::{Gpa, Gva};
use crate::format::{EntryFormat, Writability};
use crate::kind::Root;
use crate::level::{Level, PageSize};
use crate::memory::{Backing, Exclusive, Held, Resolved, SlotFlags, SlotHit, VmMemory};
use crate::mutant::{self, Mutant};
use crate::role::RoleFlags;
use crate::tables::TableMemory;
use crate::walk::{PageFaultCode, PagingContext, WalkRegs};

/// A lowest page below a root, for the addresses that it translates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Near {
    root: Root,
    /// The addresses, less the bits that the page translates.
    region: u64,
    /// [`Shadow::unlinked`](super::Shadow) when it was found.
    unlinked: u64,
    lowest: Lowest,
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NearFault {
    /// The shadow permits the access now.
    Mapped,
    /// The guest's tables do not: it gets a page fault with this code.
    Guest(PageFaultCode),
}

/// The part of an address that is the same for all that one lowest table translates.
#[inline(always)]
const fn region(address: Gva) -> u64 {
    address.bits() >> 21
}

/// Whether nobody has to notice writes to the page, as long as no slot is logged.
#[inline(always)]
fn is_written_freely<B: Backing>(memory: &VmMemory<B>, hit: &SlotHit<'_>) -> bool {
    (!hit.flags().contains(SlotFlags::READ_ONLY) || mutant::is(Mutant::NearReadOnly))
        && (!memory.is_tracked(hit) || mutant::is(Mutant::NearTracked))
}

impl Near {
    /// Whether this is about `address` below `root`.
    #[inline(always)]
    pub(crate) fn is_for(&self, root: Root, address: Gva) -> bool {
        // It is kept with its root, so the vCPU runs on that one, or on none.
        self.region == region(address) && self.root.hpa == root.hpa
    }

    /// Whether both are about the same addresses.
    pub(crate) fn is_beside(&self, other: &Self) -> bool {
        (self.region, self.root) == (other.region, other.root)
    }
}

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// The page in which a fault of `address` below `root` has just mapped something, if it is one that all faults
    /// but rare ones can be handled in by themselves.
    pub(crate) fn near(&self, root: Root, address: Gva) -> Option<Near> {
        let lowest =
            self.ops.store.pages.get(self.ops.last as usize).and_then(|_| self.lowest(self.ops.last))?;
        let plain = lowest.is_whole()
            && !is_nested(&lowest.role)
            // Without WP, what a leaf says depends on who faults.
            && lowest.guest.flags().contains(RoleFlags::WP);
        plain.then_some(Near { root, region: region(address), unlinked: self.ops.unlinked, lowest })
    }

    /// Whether the page still is what translates those addresses.
    #[inline(always)]
    fn is_still<'m, B: Backing + 'm>(&self, guard: &Exclusive<'m, B>, near: &Near) -> bool {
        (self.ops.unlinked == near.unlinked || mutant::is(Mutant::NearUnlinked))
            && near.root.generation() == Held::<B>::memory(guard).root_generation()
    }

    /// Handles a fault, whose walk `context` reads; `None` if there is more to it: then nothing has happened, but
    /// that the guest's entry may be marked. If the fault is the guest's, it has taken the address away, and whether there
    /// was anything to take away is said, too.
    #[inline]
    pub(crate) fn fault_near<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        near: &Near,
        context: &PagingContext<Gva, Gpa>,
        regs: &WalkRegs,
        address: Gva,
        access: Access,
    ) -> Option<(NearFault, bool)> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        // What was protected before must be so on every CPU, or what is read now may change unseen.
        if !(self.is_still(guard, near) && self.is_settled(guard) && self.is_quiet(memory)) {
            return None;
        }
        self.ops.last_near = (near.lowest.page, self.ops.now);
        let table = near.lowest.find(memory);
        let index = Level::L1.index(address.bits() >> 12);
        let raw = table.read(index)?;
        let marked = match context.last_step(regs, access, near.lowest.role.access, raw) {
            Ok(marked) => marked,
            Err(None) => return None,
            Err(Some(code)) => {
                let had_leaf = self.flush_near(&table, index, raw) != Kept::Nothing;
                return Some((NearFault::Guest(code), had_leaf));
            }
        };
        if marked != raw && !table.mark(index, raw, marked) {
            return None;
        }
        self.install_near(&table, index, marked, access.kind)?;
        self.touch(near.lowest.page);
        // What the guest has not used before is most often new, and what it has used around it is there.
        if near.lowest.entries.is_accessed(raw) {
            self.prefetch_around(&table, index);
        }
        self.done_flush();
        Some((NearFault::Mapped, true))
    }

    /// Makes the leaf for `raw`, which permits the access and is marked; `None` if that takes more than that.
    #[inline(always)]
    fn install_near<B: Backing>(
        &mut self,
        table: &LowestTable<'_, '_, B>,
        index: usize,
        raw: u64,
        kind: AccessKind,
    ) -> Option<()> {
        let (memory, Lowest { page, role, guest, entries, .. }) = (table.memory, table.lowest);
        let (entry, found) = (number(*page, index), entries.read(raw)?);
        let hit = memory.find_slot(space(role), found.page)?;
        if !is_written_freely(memory, &hit) {
            return None;
        }
        let (gfn, kept) = (found.page.gfn(), self.note(entry).kept);
        let (pfn, old) = match kept {
            Kept::Nothing => {
                let resolved = memory.backing().resolve(&hit.ram(), PageSize::Size4K, kind);
                let Resolved::Ram { pfn, .. } = resolved else { return None };
                (pfn, None)
            }
            // Resolved when it was made, and nothing has been invalidated since.
            Kept::Leaf(same) if same == gfn => {
                let old = self.value(entry);
                (self.format.leaf(old, Level::L1)?.pfn, Some(old))
            }
            _ => return None,
        };
        let mut prot = role.access & found.prot;
        // A clean leaf was not written: the first write is to be noticed.
        if !found.dirty && !mutant::is(Mutant::NearClean) {
            prot.remove(Prot::WRITE);
        }
        let writability =
            if prot.contains(Prot::WRITE) { Writability::Writable } else { Writability::Tracked };
        let says = (prot, caching(Some(guest), raw, Level::L1));
        let value =
            self.format.make_leaf(&self.compose(Some(guest), says, (pfn, PageSize::Size4K), writability));
        match old {
            None => self.map(entry, gfn, value),
            Some(old) if old == value => return None,
            Some(_) => self.replace(memory, entry, gfn, value, FlushSite::ShadowReplace),
        }
        self.note_seen(entry, raw);
        Some(())
    }

    /// Brings the leaf for `address` up to date, whatever else is below the root; `false` if that takes a walk.
    #[inline(always)]
    pub(crate) fn sync_near<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        near: &Near,
        address: Gva,
    ) -> bool {
        if !self.is_still(guard, near) {
            return false;
        }
        self.begin(guard);
        if self.page(near.lowest.page).unsync {
            let table = near.lowest.find(Held::<B>::memory(guard));
            let index = Level::L1.index(address.bits() >> 12);
            let raw = table.read(index).unwrap_or(0);
            self.flush_near(&table, index, raw);
        }
        true
    }

    /// The guest has flushed the address behind an entry that is `raw`; what was noted of it.
    #[inline(always)]
    fn flush_near<B: Backing>(&mut self, table: &LowestTable<'_, '_, B>, index: usize, raw: u64) -> Kept {
        let (entry, entries) = (number(table.lowest.page, index), &table.lowest.entries);
        let Note { kept, seen, .. } = *self.note(entry);
        if raw != seen || raw == 0 {
            if !entries.is_accessed(raw) && !mutant::is(Mutant::RenewUnused) {
                self.drop_entry(table.memory, entry);
            } else if !(entries.differ_by_write(seen, raw) && self.renew_write(table, index, kept, raw)) {
                self.renew(table, index, kept, raw);
            }
            self.done_flush();
        }
        kept
    }

    /// The same where the entry differs from what it was by W alone. `false` if there is more to it than another W in
    /// the leaf.
    #[inline]
    fn renew_write<B: Backing>(
        &mut self,
        table: &LowestTable<'_, '_, B>,
        index: usize,
        kept: Kept,
        raw: u64,
    ) -> bool {
        let (memory, Lowest { page, role, entries, .. }) = (table.memory, table.lowest);
        if !entries.is_written(raw) {
            return self.protect(table, index, kept, raw);
        }
        let (entry, Kept::Leaf(gfn)) = (number(*page, index), kept) else { return false };
        let value = self.value(entry);
        let Some(hit) = memory.find_slot(space(role), gfn.gpa()) else { return false };
        let may = role.access.contains(Prot::WRITE)
            && self.is_quiet(memory)
            && self.format.writability(value) == Some(Writability::Tracked)
            && !self.format.is_access_tracked(value)
            && is_written_freely(memory, &hit);
        if may {
            self.write(entry, self.format.with_writability(value, Writability::Writable));
            self.note_seen(entry, raw);
        }
        may
    }

    /// Whether leaves can be made without a closer look at what else is going on.
    #[inline(always)]
    fn is_quiet<B: Backing>(&self, memory: &VmMemory<B>) -> bool {
        !memory.invalidations().any_in_progress()
            && !memory.is_logging()
            && self.ops.acknowledged >= self.ops.barrier
    }

    /// The guest has flushed an entry that is `raw` now, and was not. It has used it before, so it is mapped at once: most
    /// often it is about to be used.
    #[inline(never)]
    fn renew<B: Backing>(&mut self, table: &LowestTable<'_, '_, B>, index: usize, kept: Kept, raw: u64) {
        let (memory, lowest) = (table.memory, table.lowest);
        let entry = number(lowest.page, index);
        match (lowest.entries.read(raw), kept) {
            (None, Kept::Nothing) => return,
            (None, _) => return self.drop_entry(memory, entry),
            (Some(_), Kept::Device(_) | Kept::Link(_)) => return self.sync_from(table, index),
            (Some(_), _) if !self.is_quiet(memory) => return self.sync_from(table, index),
            (Some(found), Kept::Leaf(gfn)) if found.page.gfn() != gfn => self.drop_entry(memory, entry),
            (Some(_), _) => {}
        }
        // If it is not to be mapped so, what is there says no more than the entry all the same.
        if self.install_near(table, index, raw, AccessKind::Read).is_none() {
            self.sync_from(table, index);
        }
    }
}
