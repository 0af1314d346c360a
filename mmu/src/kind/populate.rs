//! Populating a range of the direct kind ahead of its faults: one descent for each table, not one for each page.
//!
//! What a fault does in two halves, for a page, is done here under one guard, for as many pages as one table maps. Under a
//! guard neither a slot changes nor an invalidation begins, so what was asked once holds for all of them.
use super::direct::DirectMmu;
use super::fault::{level_above, Place, Policy};
use super::roots::Root;
use crate::access::AccessKind;
use crate::addr::{Gfn, GfnRange, Gpa, Pfn};
use crate::format::{Entry, EntryFormat, Leaf};
use crate::level::{Level, PageSize, ENTRIES};
use crate::memory::{Backing, Held, Resolved, SlotFlags, SlotHit, VmMemory};
use crate::sync::Ordering;
use crate::tables::{EntryCell, TableCache, TableFrame, TableMemory};

/// How far a population got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a population may need more table pages, or not get on"]
pub enum PopulateProgress {
    /// The batch is finished; what is left of the range says whether that was the last.
    Batch,
    /// The cache has too few pages: fill it and call again.
    NeedTables,
    /// Another CPU, an invalidation or the backing is in the way of the first page that is left, or the root is obsolete.
    Retry,
    /// The first page that is left is no RAM.
    NotRam(Gpa),
    /// The guest has no physical address as high as the first page that is left.
    OutOfRange(Gpa),
}

/// Entries that one batch looks at before it returns, and as many again as one table has.
const BATCH: usize = 4096;

/// Times that one batch may find a table changed under its hands.
const MAX_RACES: usize = 8;

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Maps the pages of a range that are not mapped, in the sizes that a read fault would map them in, and moves the
    /// start of `left` on to the first page that was not looked at. Pages that are mapped stay as they are.
    ///
    /// The slots are those that the space of the root sees. Does a bounded amount of work: call until `left` is empty, giving up the guard in between. Safe beside faults and
    /// sweeps on other CPUs. As nobody accesses the pages yet, nothing is logged as written, and pages of logged slots are
    /// mapped so that their first write is.
    pub fn populate<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        root: Root,
        left: &mut GfnRange,
    ) -> PopulateProgress {
        self.admit(guard);
        let (mut budget, mut races) = (BATCH, 0);
        while !left.is_empty() && budget > 0 {
            let next = match self.populate_run(guard, cache, root, *left) {
                Ok(next) => next,
                Err(Stopped::Raced) if races < MAX_RACES => {
                    races += 1;
                    continue;
                }
                Err(Stopped::Raced) => return PopulateProgress::Retry,
                Err(Stopped::For(progress)) => return progress,
            };
            // Also a run that is short costs a descent.
            let looked_at = (next - left.start()).clamp(8, ENTRIES as u64);
            budget = budget.saturating_sub(looked_at as usize);
            *left = left.from(next);
        }
        PopulateProgress::Batch
    }

    /// Maps pages from the start of `left` on, as far as one table and one slot go; says where it stopped.
    fn populate_run<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        root: Root,
        left: GfnRange,
    ) -> Result<u64, Stopped> {
        let first = Gfn::new_truncate(left.start());
        let gpa = first.gpa();
        if !self.reaches(gpa) {
            return Err(Stopped::For(PopulateProgress::OutOfRange(gpa)));
        }
        let memory = guard.memory();
        let table = self.live_table(memory, root).ok_or(Stopped::For(PopulateProgress::Retry))?;
        let slot = memory.find_slot(root.space(), gpa).ok_or(Stopped::For(PopulateProgress::NotRam(gpa)))?;
        let place = self.find(table, first.number());
        match place.kind {
            Entry::Empty | Entry::Mmio => {}
            Entry::Leaf => return Ok(block_end(first.number(), place.level)),
            Entry::Frozen | Entry::Table(_) => return Err(Stopped::Raced),
        }
        let sequence = memory.invalidations().sequence();
        let mut end = left.end().min(slot.slot_end() >> 12);
        let mut want = self.largest();
        // While memory is taken away somewhere, pages are mapped one by one, and none of those.
        if memory.invalidations().any_in_progress() {
            if memory.invalidations().is_stale(sequence, first, PageSize::Size4K) {
                return Err(Stopped::For(PopulateProgress::Retry));
            }
            (want, end) = (PageSize::Size4K, first.number() + 1);
        }
        // A page always fits its slot.
        while want != PageSize::Size4K && !memory.allows(&slot, want) {
            match want.smaller() {
                Some(smaller) => want = smaller,
                None => break,
            }
        }
        let (block, found) = match memory.backing().resolve(&slot.ram(), want, AccessKind::Read) {
            Resolved::Ram { pfn, size } => (pfn.number(), size.min(want)),
            Resolved::Retry => return Err(Stopped::For(PopulateProgress::Retry)),
            Resolved::Absent => return Err(Stopped::For(PopulateProgress::NotRam(gpa))),
        };
        // As faults do: a block that is not as aligned as the backing says is mapped in smaller pages, and so is one
        // where there is a table already.
        let block_start = first.number() & !(found.pages() - 1);
        let moved = block.wrapping_sub(block_start);
        let mut size = found;
        while size.level() > place.level || moved & (size.pages() - 1) != 0 {
            match size.smaller() {
                Some(smaller) => size = smaller,
                None => break,
            }
        }
        // The table that will have the leaves maps no further than this.
        let table_pages = size.pages() * ENTRIES as u64;
        let run = Run {
            slot,
            leaf: self.ahead_leaf(memory, &slot, size)?,
            each: slot.flags().contains(SlotFlags::TRACKED),
            next: first.number() & !(size.pages() - 1),
            end: end.min((first.number() | (table_pages - 1)) + 1),
            moved,
            block_end: block_start + found.pages(),
        };
        match (place.level == size.level(), size) {
            // The sizes by name, for the loops to know them.
            (true, PageSize::Size4K) => self.fill_shared(guard, &place, run, PageSize::Size4K),
            (true, _) => self.fill_shared(guard, &place, run, size),
            (false, PageSize::Size4K) => self.fill_new(guard, cache, &place, run, PageSize::Size4K),
            (false, _) => self.fill_new(guard, cache, &place, run, size),
        }
    }

    /// Maps the run by a table that others may change at the same time: entry by entry.
    #[inline(always)]
    fn fill_shared<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        place: &Place,
        mut run: Run<'_>,
        size: PageSize,
    ) -> Result<u64, Stopped> {
        let (level, mut mapped) = (size.level(), 0);
        while run.next < run.end {
            let cell = self.cell(&place.table, level.index(run.next));
            let old = cell.load();
            if old != 0 && self.format.entry(old, level) != Entry::Mmio {
                // Already mapped, or the table is no more; the next descent tells them apart.
                break;
            }
            let Some(entry) = self.next_leaf(guard.memory(), &mut run, size) else { break };
            if cell.compare_exchange(old, entry).is_err() {
                break;
            }
            mapped += 1;
            run.next += size.pages();
        }
        self.counters.leaves(guard.cpu(), level, mapped);
        if mapped == 0 {
            return Err(Stopped::Raced);
        }
        Ok(run.next)
    }

    /// Maps the run by a new table, and links that in when it is complete.
    #[inline(always)]
    fn fill_new<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        place: &Place,
        mut run: Run<'_>,
        size: PageSize,
    ) -> Result<u64, Stopped> {
        let (first, bottom) = (run.next, size.level());
        let depth = place.level.ordinal() - bottom.ordinal();
        let pages = cache.peek(depth).ok_or(Stopped::For(PopulateProgress::NeedTables))?;
        let [lowest, above @ ..] = pages else { return Err(Stopped::Raced) };
        let lowest = TableFrame::linked(*lowest);
        while run.next < run.end {
            let Some(entry) = self.next_leaf(guard.memory(), &mut run, size) else { break };
            self.cell(&lowest, bottom.index(run.next)).store(entry);
            run.next += size.pages();
        }
        let mut level = level_above(bottom);
        let mut link = self.format.make_table(lowest.pfn(), level);
        for &page in above {
            self.cell(&TableFrame::linked(page), level.index(first)).store(link);
            level = level_above(level);
            link = self.format.make_table(page, level);
        }
        // Pairs with the acquire fence of a descent: who finds the link finds all of this.
        M::Cell::fence(Ordering::Release);
        let cell = self.cell(&place.table, place.level.index(first));
        if cell.compare_exchange(place.entry, link).is_err() {
            self.empty_again(pages, bottom, first);
            return Err(Stopped::Raced);
        }
        cache.consume(depth);
        self.counters.tables(guard.cpu(), depth as i64);
        self.counters.leaves(guard.cpu(), bottom, ((run.next - first) / size.pages()) as i64);
        Ok(run.next)
    }

    /// Makes the tables empty again that were not linked in.
    #[cold]
    fn empty_again(&self, pages: &[Pfn], bottom: Level, gfn: u64) {
        let mut level = bottom;
        for &page in pages {
            let table = TableFrame::linked(page);
            if level == bottom {
                (0..ENTRIES).for_each(|index| self.cell(&table, index).store(0));
            } else {
                self.cell(&table, level.index(gfn)).store(0);
            }
            level = level_above(level);
        }
    }

    /// The leaf for the next page of the run: from the block that was found last, or from what the backing has next.
    /// `None` ends the run.
    #[inline(always)]
    fn next_leaf<B: Backing>(&self, memory: &VmMemory<B>, run: &mut Run<'_>, size: PageSize) -> Option<u64> {
        let gfn = Gfn::new_truncate(run.next);
        if run.next >= run.block_end {
            let ahead = run.slot.at(gfn.gpa());
            if size != PageSize::Size4K && !memory.allows(&ahead, size) {
                return None;
            }
            match memory.backing().resolve(&ahead.ram(), size, AccessKind::Read) {
                Resolved::Ram { pfn, size: found }
                    if found >= size && pfn.number().is_multiple_of(size.pages()) =>
                {
                    run.moved = pfn.number().wrapping_sub(run.next);
                    run.block_end = run.next + size.pages();
                }
                _ => return None,
            }
        }
        if run.each {
            run.leaf = self.ahead_leaf(memory, &run.slot.at(gfn.gpa()), size).ok()?;
        }
        // Leaves of ordinary memory differ in their frame alone.
        Some(run.leaf | Pfn::new_truncate(run.next.wrapping_add(run.moved)).hpa().bits())
    }

    /// The leaf, of frame zero, for a page of `size` at the place in the slot: as nobody uses it yet.
    fn ahead_leaf<B: Backing>(
        &self,
        memory: &VmMemory<B>,
        slot: &SlotHit<'_>,
        size: PageSize,
    ) -> Result<u64, Stopped> {
        let mut policy = Policy::empty();
        if !slot.flags().is_empty() {
            let found = self.policy(memory, slot, AccessKind::Read);
            policy = found.map_err(|_| Stopped::For(PopulateProgress::Retry))?;
        }
        let execute = size == PageSize::Size4K || !self.forbids_huge_execute();
        let leaf = Leaf::ram(Pfn::new_truncate(0), size, policy.writability()).with_execute(execute);
        let entry = self.format.make_leaf(&leaf);
        Ok(if policy.contains(Policy::CLEAN) { self.format.without_dirty(entry) } else { entry })
    }
}

/// Why a run was not mapped.
enum Stopped {
    /// Something changed: look again.
    Raced,
    For(PopulateProgress),
}

/// Neighbouring pages of one size in one slot, mapped by neighbouring entries of one table.
struct Run<'s> {
    /// The slot, at the first page.
    slot: SlotHit<'s>,
    /// The leaf of a page, but for its frame.
    leaf: u64,
    /// Whether pages of the slot differ in what is permitted.
    each: bool,
    /// First guest frame of the next page.
    next: u64,
    /// The first one after the run.
    end: u64,
    /// Host frames less guest frames in the block that was found last, and where that ends.
    moved: u64,
    block_end: u64,
}

/// The first frame after the block that an entry at `level` has for `gfn`.
#[inline]
const fn block_end(gfn: u64, level: Level) -> u64 {
    (gfn | (level.pages() - 1)) + 1
}
