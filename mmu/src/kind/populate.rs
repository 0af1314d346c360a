//! Populating a range of the direct kind ahead of its faults: one descent for each table, not one for each page.
//!
//! What a fault does in two halves, for a page, is done here under one guard, for as many pages as one table maps. Under a
//! guard neither a slot changes nor an invalidation begins, so what was asked once holds for all of them.
use super::direct::DirectMmu;
use super::fault::{level_above, Place, Policy, Resolution};
use super::roots::Root;
use crate::access::AccessKind;
use crate::addr::{Gfn, GfnRange, Gpa, Pfn};
use crate::format::{Entry, EntryFormat};
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
    /// Does a bounded amount of work: call until `left` is empty, giving up the guard in between. Safe beside faults and
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
        let slot = memory.find_slot(gpa).ok_or(Stopped::For(PopulateProgress::NotRam(gpa)))?;
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
        let mut policy = Policy::empty();
        if !slot.flags().is_empty() {
            policy = self.read_policy(memory, &slot)?;
        }
        let mut found = Resolution {
            gfn: first,
            root: root.hpa.pfn(),
            access: AccessKind::Read,
            policy,
            block: Pfn::new_truncate(0),
            size: want,
            sequence,
        };
        (found.block, found.size) = match memory.backing().resolve(&slot.ram(), want, AccessKind::Read) {
            Resolved::Ram { pfn, size } => (pfn, size.min(want)),
            Resolved::Retry => return Err(Stopped::For(PopulateProgress::Retry)),
            Resolved::Absent => return Err(Stopped::For(PopulateProgress::NotRam(gpa))),
        };
        if self.forbids_huge_execute() {
            found.policy.insert(Policy::NO_HUGE_EXECUTE);
        }
        // As faults do: a block that is not as aligned as the backing says is mapped in smaller pages, and so is one
        // where there is a table already.
        let mut size = found.size;
        while size.level() > place.level || !found.leaf(size).pfn.number().is_multiple_of(size.pages()) {
            match size.smaller() {
                Some(smaller) => size = smaller,
                None => break,
            }
        }
        // The table that will have the leaves maps no further than this.
        let table_pages = size.pages() * ENTRIES as u64;
        let end = end.min((first.number() | (table_pages - 1)) + 1);
        let run = Run { found, size, slot, each: slot.flags().contains(SlotFlags::TRACKED), end };
        if place.level == size.level() {
            self.fill_shared(guard, &place, run)
        } else {
            self.fill_new(guard, cache, &place, run)
        }
    }

    /// Maps the run by a table that others may change at the same time: entry by entry.
    fn fill_shared<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        place: &Place,
        mut run: Run<'_>,
    ) -> Result<u64, Stopped> {
        let (level, mut gfn, mut mapped) = (place.level, run.found.gfn.number(), 0);
        while gfn < run.end {
            let cell = self.cell(&place.table, level.index(gfn));
            let old = cell.load();
            if old != 0 && self.format.entry(old, level) != Entry::Mmio {
                // Already mapped, or the table is no more; the next descent tells them apart.
                break;
            }
            let Some(entry) = self.next_leaf(guard.memory(), &mut run, gfn) else { break };
            if cell.compare_exchange(old, entry).is_err() {
                break;
            }
            mapped += 1;
            gfn = block_end(gfn, level);
        }
        self.counters.leaves(guard.cpu(), level, mapped);
        if mapped == 0 {
            return Err(Stopped::Raced);
        }
        Ok(gfn)
    }

    /// Maps the run by a new table, and links that in when it is complete.
    fn fill_new<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        place: &Place,
        mut run: Run<'_>,
    ) -> Result<u64, Stopped> {
        let first = run.found.gfn.number();
        let (bottom, depth) = (run.size.level(), place.level.ordinal() - run.size.level().ordinal());
        let pages = cache.peek(depth).ok_or(Stopped::For(PopulateProgress::NeedTables))?;
        let [lowest, above @ ..] = pages else { return Err(Stopped::Raced) };
        let lowest = TableFrame::linked(*lowest);
        let (mut gfn, mut mapped) = (first, 0);
        while gfn < run.end {
            let Some(entry) = self.next_leaf(guard.memory(), &mut run, gfn) else { break };
            self.cell(&lowest, bottom.index(gfn)).store(entry);
            mapped += 1;
            gfn = block_end(gfn, bottom);
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
        self.counters.leaves(guard.cpu(), bottom, mapped);
        Ok(gfn)
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

    /// The leaf for `gfn`, a page of the run: from the block that was found last, or from what the backing has next.
    /// `None` ends the run.
    #[inline(always)]
    fn next_leaf<B: Backing>(&self, memory: &VmMemory<B>, run: &mut Run<'_>, gfn: u64) -> Option<u64> {
        let found = &mut run.found;
        let inside = gfn ^ found.gfn.number() < found.size.pages();
        found.gfn = Gfn::new_truncate(gfn);
        if !inside {
            let ahead = run.slot.at(found.gfn.gpa());
            if run.size != PageSize::Size4K && !memory.allows(&ahead, run.size) {
                return None;
            }
            let Resolved::Ram { pfn, size } =
                memory.backing().resolve(&ahead.ram(), run.size, AccessKind::Read)
            else {
                return None;
            };
            if size < run.size || !pfn.number().is_multiple_of(run.size.pages()) {
                return None;
            }
            (found.block, found.size) = (pfn, run.size);
        }
        if run.each {
            let policy = self.read_policy(memory, &run.slot.at(found.gfn.gpa())).ok()?;
            found.policy = found.policy & Policy::NO_HUGE_EXECUTE | policy;
        }
        let entry = self.format.make_leaf(&found.leaf(run.size));
        Some(if found.policy.contains(Policy::CLEAN) { self.format.without_dirty(entry) } else { entry })
    }

    /// How a page of a slot with flags is mapped that nobody writes yet.
    fn read_policy<B: Backing>(&self, memory: &VmMemory<B>, slot: &SlotHit<'_>) -> Result<Policy, Stopped> {
        self.policy(memory, slot, AccessKind::Read).map_err(|_| Stopped::For(PopulateProgress::Retry))
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
    /// The block that was found last, and the page it was found for.
    found: Resolution,
    size: PageSize,
    /// The slot, at the first page.
    slot: SlotHit<'s>,
    /// Whether pages of the slot differ in what is permitted.
    each: bool,
    /// The first frame after the run.
    end: u64,
}

/// The first frame after the block that an entry at `level` has for `gfn`.
#[inline]
const fn block_end(gfn: u64, level: Level) -> u64 {
    (gfn | (level.pages() - 1)) + 1
}
