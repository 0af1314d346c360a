//! Faults and invalidations in the table that was used last: as long as nothing above it changes, no walk is needed.
//!
//! Writes to the tables above a lowest one are tracked, so as long as the links of the shadow stand, the guest's
//! entries above say what they said when the links were made. What is left of a walk is its last entry.
use super::compose::caching;
use super::fault::AROUND;
use super::lowest::{Lowest, LowestTable};
use super::sites::FlushSite;
use super::{is_nested, number, space, Issued, Kept, Note, ShadowDone, ShadowMmu};
use crate::access::{Access, AccessKind, Prot};
use crate::addr::{Gpa, Gva};
use crate::format::{EntryFormat, Writability};
use crate::kind::Root;
use crate::level::{Level, PageSize};
use crate::memory::{Backing, Exclusive, Held, Resolved, SlotFlags};
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

impl Near {
    /// Whether this is about `address` below `root`.
    #[inline(always)]
    pub(crate) fn is_for(&self, root: Root, address: Gva) -> bool {
        self.region == region(address) && self.root == root
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
    /// that the guest's entry may be marked.
    #[inline]
    pub(crate) fn fault_near<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        near: &Near,
        context: &PagingContext<Gva, Gpa>,
        regs: &WalkRegs,
        address: Gva,
        access: Access,
    ) -> Option<ShadowDone<NearFault>> {
        self.begin(guard);
        debug_assert!(!self.ops.pending, "an operation has ended without asking for its flush");
        let memory = Held::<B>::memory(guard);
        let quiet = self.is_still(guard, near)
            && !memory.invalidations().any_in_progress()
            && !memory.is_logging()
            // What was protected before must be so on every CPU, or what is read now may change unseen.
            && self.settle(guard);
        if !quiet {
            return None;
        }
        self.ops.last_near = (near.lowest.page, self.ops.now);
        let table = near.lowest.find(memory);
        let index = Level::L1.index(address.bits() >> 12);
        let first = index & !(AROUND - 1);
        let mut entries = table.read_some::<AROUND>(first);
        let raw = entries[index % AROUND];
        let marked = match context.last_step(regs, access, near.lowest.role.access, raw) {
            Ok(marked) => marked,
            Err(None) => return None,
            Err(Some(code)) => return Some(ShadowDone { outcome: NearFault::Guest(code), issued: None }),
        };
        if marked != raw {
            let place = table.place(index)?;
            let writable = !place.flags().contains(SlotFlags::READ_ONLY);
            let found = writable.then(|| memory.backing().compare_exchange_u64(&place.ram(), raw, marked));
            found?.ok().filter(|&found| found == raw)?;
        }
        self.install_near(&table, index, marked, access.kind)?;
        self.touch(near.lowest.page);
        // Nobody asks for this one again.
        entries[index % AROUND] = 0;
        if entries.iter().any(|&raw| near.lowest.entries.is_accessed(raw)) {
            self.prefetch_some(&table, first, &entries);
        }
        Some(ShadowDone { outcome: NearFault::Mapped, issued: self.issue(guard) })
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
        let found = entries.read(raw)?;
        let hit = memory.find_slot(space(role), found.page)?;
        if hit.flags().contains(SlotFlags::READ_ONLY) && !mutant::is(Mutant::NearReadOnly)
            || memory.is_tracked(&hit) && !mutant::is(Mutant::NearTracked)
        {
            return None;
        }
        let resolved = memory.backing().resolve(&hit.ram(), PageSize::Size4K, kind);
        let Resolved::Ram { pfn, .. } = resolved else { return None };
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
        let (entry, gfn) = (number(*page, index), found.page.gfn());
        match self.note(entry).kept {
            Kept::Nothing => self.map(entry, gfn, value),
            Kept::Leaf(same) if same == gfn => {
                let old = self.value(entry);
                if old == value || self.format.leaf(old, Level::L1)?.pfn != pfn {
                    return None;
                }
                self.replace(memory, entry, gfn, value, FlushSite::ShadowReplace);
            }
            _ => return None,
        }
        self.note_seen(entry, raw);
        Some(())
    }

    /// Whether anything is noted for `address`, after a fault there.
    #[inline]
    pub(crate) fn has_leaf(&self, near: &Near, address: Gva) -> bool {
        self.note(number(near.lowest.page, Level::L1.index(address.bits() >> 12))).kept != Kept::Nothing
    }

    /// Brings the leaf for `address` up to date, whatever else is below the root; `false` if that takes a walk. What
    /// was taken away is to be [issued](Self::issue).
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
            let Note { kept, seen, .. } = *self.note(number(near.lowest.page, index));
            if raw != seen || raw == 0 {
                self.renew(&table, index, kept, raw);
            }
        }
        true
    }

    /// The guest has flushed an entry that is `raw` now, and was not. What the guest has used of it before is mapped
    /// at once: most often it is about to be used.
    #[inline(never)]
    fn renew<B: Backing>(&mut self, table: &LowestTable<'_, '_, B>, index: usize, kept: Kept, raw: u64) {
        let (memory, lowest) = (table.memory, table.lowest);
        let entry = number(lowest.page, index);
        let used = lowest.entries.is_accessed(raw) || mutant::is(Mutant::RenewUnused);
        let quiet = !memory.invalidations().any_in_progress()
            && !memory.is_logging()
            && self.ops.acknowledged >= self.ops.barrier;
        match (lowest.entries.read(raw).filter(|_| used), kept) {
            (None, Kept::Nothing) => return,
            (None, _) => return self.drop_entry(memory, entry),
            (Some(_), Kept::Device(_) | Kept::Link(_)) => return self.sync_from(table, index),
            (Some(_), _) if !quiet => return self.sync_from(table, index),
            (Some(found), Kept::Leaf(gfn)) if found.page.gfn() != gfn => self.drop_entry(memory, entry),
            (Some(_), _) => {}
        }
        // If it is not to be mapped so, what is there says no more than the entry all the same.
        if self.install_near(table, index, raw, AccessKind::Read).is_none() {
            self.sync_from(table, index);
        }
    }

    /// Requests the flush of what was taken away, if anything was.
    #[inline(always)]
    pub(crate) fn issue<'m, B: Backing + 'm>(&mut self, guard: &Exclusive<'m, B>) -> Option<Issued> {
        if !self.ops.pending {
            return None;
        }
        let _ = self.settle(guard);
        self.ops.issued.take()
    }
}
