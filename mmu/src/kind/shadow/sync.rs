//! Unsync pages: lowest tables that the guest writes to without exits, and how their shadows catch up.
use super::compose::caching;
use super::lowest::{Lowest, LowestTable};
use super::sites::FlushSite;
use super::{number, shadows, space, Issued, Kept, Note, ShadowDone, ShadowMmu, ShadowPage, NONE};
use crate::access::Prot;
use crate::addr::{Address, Gfn};
use crate::format::{EntryFormat, Writability};
use crate::kind::Root;
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, Exclusive, Held};
use crate::mutant::{self, Mutant};
use crate::tables::TableMemory;
use crate::walk::LowestEntry;

/// Pages that may be unsync at a time: it bounds the work of a sync.
const MAX_UNSYNC: usize = 256;

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// Brings everything below `root` up to date: what a flush of all the guest's translations asks for (MOV to CR3,
    /// INVPCID, CR4.PGE). The vCPU's tag has to be flushed as well.
    pub fn sync_root<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        root: Root,
    ) -> ShadowDone<()> {
        self.begin(guard);
        if let Some(page) = self.root_page(guard, root) {
            self.sync_tree(guard, page);
        }
        self.done(guard, ())
    }

    /// [`sync_root`](Self::sync_root) of a root that is held and of now.
    #[inline(always)]
    pub(crate) fn sync_held<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        root: Root,
    ) -> Option<Issued> {
        let stale = self.ops.store.pages.get(root.index()).is_none_or(ShadowPage::is_stale);
        if stale {
            self.sync_root(guard, root).issued
        } else {
            None
        }
    }

    /// Brings the translation of one address below `root` up to date: INVLPG, which concerns every root that the vCPU
    /// keeps, for global pages are not told apart. The address has to be flushed from the vCPU's tag as well; other
    /// vCPUs may have what was taken away until they flush, or until an operation requests the flush that is owed.
    pub fn sync_address<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        root: Root,
        address: impl Address,
    ) {
        self.begin(guard);
        let at = self.root_page(guard, root).and_then(|page| self.unsync_at(page, address));
        if let Some((page, index)) = at {
            self.sync_entry(guard, page, index);
        }
        self.done_flush();
    }

    /// The entry of an unsync page that translates the address below `page`. Ancestors know where there may be one.
    fn unsync_at(&self, mut page: u32, address: impl Address) -> Option<(u32, usize)> {
        let frame = address.bits() >> 12;
        loop {
            let this = self.page(page);
            let index = this.role.as_ref()?.level.index(frame);
            match this.notes[index].kept {
                Kept::Link(child) if this.stale[index / 64] >> (index % 64) & 1 != 0 => page = child,
                Kept::Leaf(_) | Kept::Device(_) if this.unsync => return Some((page, index)),
                _ => return None,
            }
        }
    }

    /// Lets the guest write to `gfn` without exits, if the kind shadows it as nothing but lowest tables; `false` if
    /// writes still have to be emulated.
    pub(super) fn try_unsync<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, gfn: Gfn) -> bool {
        let mut count = 0;
        let mut index = self.first_page(gfn);
        while index != NONE {
            let page = self.page(index);
            if let Some(role) = page.role.filter(|role| page.gfn == gfn && shadows(role)) {
                if role.level != Level::L1 && !mutant::is(Mutant::UpperUnsync) {
                    return false;
                }
                count += usize::from(!page.unsync);
            }
            index = page.next;
        }
        if self.ops.unsync + count > MAX_UNSYNC {
            return false;
        }
        index = self.first_page(gfn);
        while index != NONE {
            let page = self.page(index);
            let next = page.next;
            if page.gfn == gfn && !page.unsync && page.role.is_some_and(|role| shadows(&role)) {
                self.page_mut(index).unsync = true;
                self.ops.unsync += 1;
                self.untrack_page(guard, index);
                if !mutant::is(Mutant::UnsyncParentsUnmarked) {
                    self.mark_parents(index);
                }
            }
            index = next;
        }
        let memory = Held::<B>::memory(guard);
        // Where it is tracked, it is so in every space.
        !memory.is_tracked_anywhere(gfn)
    }

    /// Syncs what is unsync below `page`, and it itself. Goes down one level each time.
    pub(super) fn sync_tree<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, page: u32) {
        if !self.page(page).is_stale() {
            return;
        }
        if self.page(page).unsync {
            self.sync_page(guard, page);
        }
        for word in 0..if mutant::is(Mutant::SyncThisPageOnly) { 0 } else { 8 } {
            let mut rest = self.page(page).stale[word];
            while rest != 0 {
                let bit = rest & rest.wrapping_neg();
                rest &= !bit;
                let index = word * 64 + bit.trailing_zeros() as usize;
                let clean = match self.note(number(page, index)).kept {
                    Kept::Link(child) => {
                        self.sync_tree(guard, child);
                        !self.page(child).is_stale()
                    }
                    _ => true,
                };
                if clean {
                    self.page_mut(page).stale[word] &= !bit;
                }
            }
        }
    }

    /// Brings an unsync page up to date, and has its writes tracked again if no TLB permits them any more.
    fn sync_page<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, page: u32) {
        let gfn = self.page(page).gfn;
        if self.track(guard, gfn).is_ok() {
            self.page_mut(page).tracked = true;
            self.write_protect_gfn(Held::<B>::memory(guard), gfn);
            if self.settle(guard) {
                self.page_mut(page).unsync = false;
                self.ops.unsync -= 1;
            } else {
                self.untrack_page(guard, page);
            }
        }
        if let Some(lowest) = self.lowest(page) {
            let table = lowest.find(Held::<B>::memory(guard));
            for index in 0..ENTRIES {
                self.sync_from(&table, index);
            }
        }
    }

    /// Makes a leaf of a lowest page say no more than the guest's entry does.
    pub(super) fn sync_entry<'m, B: Backing + 'm>(
        &mut self,
        guard: &Exclusive<'m, B>,
        page: u32,
        index: usize,
    ) {
        if let Some(lowest) = self.lowest(page) {
            self.sync_from(&lowest.find(Held::<B>::memory(guard)), index);
        }
    }

    /// Makes a leaf of a lowest page say no more than the guest's entry does: permissions only ever shrink here. A
    /// note about device memory says afterwards what the entry does.
    #[inline(always)]
    pub(super) fn sync_from<B: Backing>(&mut self, table: &LowestTable<'_, '_, B>, index: usize) {
        let Note { kept, seen, .. } = *self.note(number(table.lowest.page, index));
        if let Kept::Leaf(gfn) | Kept::Device(gfn) = kept {
            let raw = table.read(index).unwrap_or(0);
            if (raw != seen || raw == 0) && !mutant::is(Mutant::SeenChanged) {
                let by_write = table.lowest.entries.differ_by_write(seen, raw);
                if !(by_write && self.protect(table, index, kept, raw)) {
                    self.sync_changed(table, index, gfn, raw);
                }
            }
        }
    }

    /// Takes W out of a leaf that otherwise says what the guest's entry `raw` does, if that one has no W: copying an address
    /// space does that to all of it. `false` if it is no leaf of which only that can be said.
    #[inline(always)]
    pub(super) fn protect<B: Backing>(
        &mut self,
        table: &LowestTable<'_, '_, B>,
        index: usize,
        kept: Kept,
        raw: u64,
    ) -> bool {
        let entry = number(table.lowest.page, index);
        let (Kept::Leaf(gfn), value) = (kept, self.value(entry)) else { return false };
        if self.format.is_access_tracked(value) {
            return false;
        }
        let writable =
            matches!(self.format.writability(value), Some(Writability::Writable | Writability::Watched));
        if writable && !table.lowest.entries.is_written(raw) {
            let new = self.format.with_writability(value, Writability::Tracked);
            self.replace(table.memory, entry, gfn, new, FlushSite::ShadowSync);
        }
        self.note_seen(entry, raw);
        true
    }

    /// The same where the guest's entry is `raw`, which may be another than before.
    #[inline(never)]
    fn sync_changed<B: Backing>(&mut self, table: &LowestTable<'_, '_, B>, index: usize, gfn: Gfn, raw: u64) {
        let (memory, Lowest { page, role, guest, entries, .. }) = (table.memory, table.lowest);
        let entry = number(*page, index);
        let same = |found: &LowestEntry| {
            (found.accessed || mutant::is(Mutant::SyncUnused))
                && (found.page.gfn() == gfn || mutant::is(Mutant::SyncOtherFrame))
        };
        let Some(found) = entries.read(raw).filter(same) else {
            return self.drop_entry(memory, entry);
        };
        let mut prot = role.access & found.prot;
        if !found.dirty && !mutant::is(Mutant::SyncKeepsWrite) {
            prot.remove(Prot::WRITE);
        }
        if matches!(self.note(entry).kept, Kept::Device(_)) {
            return match memory.find_slot(space(role), gfn.gpa()) {
                Some(_) => self.drop_entry(memory, entry),
                None => self.note_mmio(memory, entry, gfn, prot),
            };
        }
        let value = self.value(entry);
        let Some(old) = self.format.leaf(value, Level::L1) else { return self.drop_entry(memory, entry) };
        let mut leaf = old;
        let says = (prot, caching(Some(guest), raw, Level::L1));
        let now = self.compose(Some(guest), says, (leaf.pfn, leaf.size), leaf.writability);
        // Under SMEP, SMAP or protection keys a user's page is not more than the supervisor's, but another.
        if now.user && !leaf.user && !mutant::is(Mutant::SyncKeepsSupervisor) {
            return self.drop_entry(memory, entry);
        }
        leaf.user &= now.user;
        leaf.execute &= now.execute;
        leaf.execute_user &= now.execute_user;
        leaf.read &= now.read;
        leaf.key = now.key;
        if !self.can_say(&leaf) || (now.memory_type, now.ignore_pat) != (leaf.memory_type, leaf.ignore_pat) {
            return self.drop_entry(memory, entry);
        }
        if !prot.contains(Prot::WRITE) && leaf.writability != Writability::ReadOnly {
            leaf.writability = Writability::Tracked;
        }
        let restricted = (old.user ^ leaf.user)
            | (old.execute ^ leaf.execute)
            | (old.execute_user ^ leaf.execute_user)
            | (old.read ^ leaf.read);
        if restricted || old.key != leaf.key || old.writability != leaf.writability {
            let new = self.marked_like(value, self.format.make_leaf(&leaf));
            self.replace(memory, entry, gfn, new, FlushSite::ShadowSync);
        }
        self.note_seen(entry, raw);
    }

    /// The leaf `new` with no more marks than `old` has.
    fn marked_like(&self, old: u64, new: u64) -> u64 {
        let new = if self.format.is_dirty(old) { new } else { self.format.without_dirty(new) };
        if self.format.is_young(old) {
            new
        } else {
            self.format.make_old(new)
        }
    }
}
