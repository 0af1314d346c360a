//! A check of everything a shadow kind holds, for tests: nothing is taken from what it maintains that can be counted anew.
use super::compose::caching;
use super::{guest_entry, is_above, number, read_guest, shadows, space, split, Kept, ShadowMmu, NONE};
use crate::access::{AccessKind, Prot};
use crate::addr::{Gfn, Gpa};
use crate::format::{Entry, EntryFormat};
use crate::level::{Level, PageSize, ENTRIES};
use crate::memory::{Backing, Exclusive, Held, LogBy, Resolved, SlotFlags, VmMemory};
use crate::role::{PageRole, RoleFlags};
use crate::sync::Ordering;
use crate::tables::TableMemory;
use crate::walk::LowestEntries;

/// What a check found to be in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowCheck {
    /// Shadow pages.
    pub pages: usize,
    /// Leaves.
    pub leaves: usize,
    /// Notes about device memory.
    pub notes: usize,
}

/// What the check itself counts.
#[derive(Default)]
struct Seen {
    found: ShadowCheck,
    unsync: usize,
    splits: u64,
    tracked: usize,
    /// Entries that belong to a chain, and those that chains have.
    kept: usize,
    chained: usize,
}

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// Checks the invariants of the whole kind; the name of the first that does not hold. Slow: for tests.
    pub fn check<'m, B: Backing + 'm>(&self, guard: &Exclusive<'m, B>) -> Result<ShadowCheck, &'static str> {
        let memory = Held::<B>::memory(guard);
        let mut seen = Seen::default();
        self.check_chains(&mut seen)?;
        for index in 0..self.ops.store.pages.len() as u32 {
            match self.page(index).role {
                Some(role) => self.check_page(memory, index, &role, &mut seen)?,
                None => self.check_unused(index)?,
            }
        }
        if seen.kept != seen.chained {
            return Err("D1, D2: chains and entries differ");
        }
        let counts = self.page_counts();
        let leaves = counts.leaves.iter().sum::<u64>() as usize;
        if (counts.tables as usize, leaves) != (seen.found.pages, seen.found.leaves) {
            return Err("D4: counters");
        }
        if (seen.unsync, seen.splits) != (self.ops.unsync, self.ops.splits) {
            return Err("D4: unsync pages, or split ones");
        }
        self.check_tracking(memory, seen.tracked)?;
        Ok(seen.found)
    }

    /// D1: each record of the reverse map is of a leaf, in the bucket of its frame. D3: each page is in the bucket of its own.
    fn check_chains(&self, seen: &mut Seen) -> Result<(), &'static str> {
        let mut cached = 0;
        for (number, bucket) in self.ops.store.buckets.iter().enumerate() {
            let mut entry = bucket.leaves;
            while entry != NONE {
                seen.chained += 1;
                match self.note(entry).kept {
                    Kept::Leaf(gfn) if self.bucket(gfn) == number => {}
                    _ => return Err("D1: a record without a leaf"),
                }
                entry = self.note(entry).next;
            }
            let mut page = bucket.pages;
            while page != NONE {
                cached += 1;
                if self.role(page).is_none() || self.bucket(self.page(page).gfn) != number {
                    return Err("D10: a page that is gone can be found");
                }
                page = self.page(page).next;
            }
        }
        let used = self.ops.store.pages.iter().filter(|page| page.role.is_some()).count();
        if cached != used {
            return Err("D3: a page that cannot be found");
        }
        Ok(())
    }

    /// D10: of a page that is gone nothing is left.
    fn check_unused(&self, index: u32) -> Result<(), &'static str> {
        let page = self.page(index);
        let empty = page.notes.iter().all(|note| note.kept == Kept::Nothing);
        if page.parents != NONE || page.roots != 0 || page.tracked || !empty {
            return Err("D10: a page that is gone is in use");
        }
        Ok(())
    }

    fn check_page<B: Backing>(
        &self,
        memory: &VmMemory<B>,
        index: u32,
        role: &PageRole,
        seen: &mut Seen,
    ) -> Result<(), &'static str> {
        let page = self.page(index);
        seen.found.pages += 1;
        seen.unsync += usize::from(page.unsync);
        seen.splits += u64::from(page.split);
        seen.tracked += usize::from(page.tracked);
        if page.generation > memory.root_generation() {
            return Err("D7: a page of a generation to come");
        }
        if page.unsync && (role.level != Level::L1 || !shadows(role) || page.tracked) {
            return Err("D5: an unsync page that is no lowest shadow");
        }
        if page.split && !role.direct {
            return Err("B6: a table of the guest is no split");
        }
        let mut parent = page.parents;
        while parent != NONE {
            if self.note(parent).kept != Kept::Link(index) {
                return Err("D2: a parent that does not link here");
            }
            let (above, at) = split(parent);
            let marked = self.page(above).stale[at / 64] >> (at % 64) & 1 == 1;
            if (page.unsync || page.stale != [0; 8]) && !marked {
                return Err("D5: an ancestor does not know");
            }
            seen.chained += 1;
            parent = self.note(parent).next;
        }
        if page.tracked && !memory.is_tracked_everywhere(page.gfn) {
            return Err("D6: a shadowed table is not tracked");
        }
        let lost = self.is_lost(index);
        for at in 0..ENTRIES {
            let entry = number(index, at);
            let (value, kept) = (self.value(entry), self.note(entry).kept);
            if lost && kept != Kept::Nothing {
                return Err("D6: a table that nobody tracks has a shadow");
            }
            match (kept, self.format.entry(value, role.level)) {
                (Kept::Nothing, Entry::Empty) => {}
                (Kept::Link(child), Entry::Table(frame)) => {
                    seen.kept += 1;
                    self.check_link(index, role, at, child)?;
                    if frame != self.page(child).frame {
                        return Err("B4: a link leads elsewhere");
                    }
                }
                (Kept::Leaf(gfn), Entry::Leaf) => {
                    seen.kept += 1;
                    seen.found.leaves += 1;
                    self.check_leaf(memory, role, value, gfn)?;
                    self.check_against_guest(memory, index, at, value, gfn.gpa())?;
                }
                (Kept::Device(gfn), Entry::Mmio) => {
                    seen.found.notes += 1;
                    if role.level != Level::L1 || self.format.mmio(value).map(|note| note.gfn) != Some(gfn) {
                        return Err("I1: a note for other memory");
                    }
                }
                _ => return Err("D1, D2, I3: an entry and its note differ"),
            }
        }
        Ok(())
    }

    /// B4: a link permits everything. D3: it leads to the page that would be linked now.
    fn check_link(&self, index: u32, role: &PageRole, at: usize, child: u32) -> Result<(), &'static str> {
        let (page, below) = (self.page(index), self.page(child));
        let child_role = below.role.ok_or("D2, D10: a link to a page that is gone")?;
        if Some(child_role.level) != role.level.down() {
            return Err("B4: a link to another level");
        }
        let value = self.value(number(index, at));
        let top = self.is_legacy_root(index);
        let table = if top {
            self.ops.pae.make_table(below.frame, role.level)
        } else {
            self.format.make_table(below.frame, role.level)
        };
        if value & table != table {
            return Err("B4: a link that restricts");
        }
        if role.child(at, child_role.access, child_role.direct).map(|child| child.cached(child_role.caching))
            != Some(child_role)
        {
            return Err("D3: a child of another role");
        }
        let leads_on = is_above(role) && !is_above(&child_role) && role.level != Level::L3;
        if leads_on && below.gfn != page.gfn {
            return Err("D3: a root for another table");
        }
        if role.direct && below.gfn.number() != page.gfn.number() + at as u64 * role.level.pages() {
            return Err("D3: a direct page for another block");
        }
        if below.generation != page.generation {
            return Err("D7: a child of another generation");
        }
        Ok(())
    }

    /// What holds for every leaf, whatever the guest's entry says.
    fn check_leaf<B: Backing>(
        &self,
        memory: &VmMemory<B>,
        role: &PageRole,
        value: u64,
        gfn: Gfn,
    ) -> Result<(), &'static str> {
        let present = self.format.restore(value);
        if !self.format.shadow_zero_check(present, role.level) {
            return Err("B1");
        }
        self.format.writability(value).ok_or("B2")?;
        let leaf = self.format.leaf(value, role.level).ok_or("B1: a leaf that is not made here")?;
        let hit = memory.find_slot(space(role), gfn.gpa()).ok_or("I2: a leaf without a slot")?;
        let writes = self.format.permits(value, AccessKind::Write);
        let huge = leaf.size != PageSize::Size4K;
        if writes && memory.is_tracked(&hit) {
            return Err("D6: a tracked page can be written");
        }
        if writes && hit.flags().contains(SlotFlags::READ_ONLY) {
            return Err("B3: a read-only slot can be written");
        }
        if huge && !hit.block_fits(leaf.size.bytes()) {
            return Err("D4: a huge page outside its slot");
        }
        if huge && leaf.execute && self.ops.no_huge_execute {
            return Err("B6: a huge page is executable");
        }
        // H1: what can be written, and would not be noticed, is in the log.
        if let Some(by) = self.logged_by(memory, role, gfn).filter(|_| writes) {
            if by == LogBy::WriteProtection && !memory.is_logged(space(role), gfn) {
                return Err("H1: a page can be written without being logged");
            }
        }
        let block = memory.backing().resolve(&hit.ram(), leaf.size, AccessKind::Read);
        match block {
            Resolved::Ram { pfn, size } if memory.invalidations().settled().is_some() => {
                let first = pfn.number() + (gfn.number() & (size.pages() - 1));
                if leaf.pfn.number() != first {
                    return Err("D8: a leaf for another frame");
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// B3: a leaf of a page that is in sync says no more than the guest's entry.
    fn check_against_guest<B: Backing>(
        &self,
        memory: &VmMemory<B>,
        index: u32,
        at: usize,
        value: u64,
        gpa: Gpa,
    ) -> Result<(), &'static str> {
        let page = self.page(index);
        let Some(role) = page.role.filter(|role| role.level == Level::L1 && shadows(role) && !page.unsync)
        else {
            return Ok(());
        };
        let Some(guest) = role.base.guest() else { return Ok(()) };
        let raw = read_guest(memory, guest_entry(page, &role, at), &role);
        let entries = LowestEntries::new(&guest);
        let found = raw.and_then(|raw| entries.read(raw)).ok_or("A3: a leaf for an absent entry")?;
        let leaf = self.format.leaf(value, Level::L1).ok_or("B1")?;
        let prot = role.access & found.prot;
        let caching = caching(Some(&guest), raw.unwrap_or(0), Level::L1);
        let limit = self.compose(Some(&guest), (prot, caching), (leaf.pfn, leaf.size), leaf.writability);
        if (leaf.read && !limit.read) || (leaf.execute_user && !limit.execute_user) {
            return Err("B3, G1: more than L1 permits");
        }
        if (leaf.memory_type, leaf.ignore_pat) != (limit.memory_type, limit.ignore_pat) {
            return Err("G1: another memory type");
        }
        let user = leaf.user && !guest.is_ept();
        let writes = self.format.permits(value, AccessKind::Write);
        if found.page.gfn() != gpa.gfn() {
            return Err("A1: a leaf for another page");
        }
        if (user && !prot.contains(Prot::USER)) || (leaf.execute && !prot.contains(Prot::EXECUTE)) {
            return Err("B3: more than the guest permits");
        }
        if !leaf.user && limit.user && guest.flags().contains(RoleFlags::WP) {
            return Err("B3: the supervisor's for a user's");
        }
        // Without CR0.WP a supervisor's page may be writable although the guest's entry is not.
        if writes && (user || guest.is_ept()) && !prot.contains(Prot::WRITE) {
            return Err("B3: writable for a user");
        }
        if writes && !found.dirty {
            return Err("F4: a clean entry can be written");
        }
        Ok(())
    }

    /// D4: counts of tracked pages, by page and by block. Others may track, too, but nobody tracks less.
    fn check_tracking<B: Backing>(&self, memory: &VmMemory<B>, tracked: usize) -> Result<(), &'static str> {
        let mut pages = 0;
        for slot in memory.slots.iter() {
            let notes = memory.backing().notes(slot.cookie);
            let start = Gfn::new_truncate(slot.range.start());
            let count = slot.range.pages() as usize;
            let tracks = notes.tracks.get(..count).unwrap_or(notes.tracks);
            pages += tracks.iter().map(|count| count.load(Ordering::Relaxed) as usize).sum::<usize>();
            for (counts, size) in notes.tracked_in.iter().zip([PageSize::Size2M, PageSize::Size1G]) {
                let shift = size.level().frame_shift();
                let blocks = ((slot.range.end() - 1) >> shift) - (start.number() >> shift) + 1;
                for (block, count) in counts.iter().enumerate().take(blocks as usize) {
                    let inside = |page: usize| {
                        ((start.number() + page as u64) >> shift) - (start.number() >> shift) == block as u64
                    };
                    let found = tracks
                        .iter()
                        .enumerate()
                        .filter(|(page, count)| inside(*page) && count.load(Ordering::Relaxed) != 0)
                        .count();
                    if count.load(Ordering::Relaxed) as usize != found {
                        return Err("D4: tracked pages in a block");
                    }
                }
            }
        }
        if pages < tracked {
            return Err("D4: tracked pages");
        }
        Ok(())
    }
}
