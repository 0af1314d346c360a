//! Direct faults: find the memory, then map it, beside any number of other CPUs.
use core::sync::atomic::Ordering;

use super::direct::DirectMmu;
use crate::access::AccessKind;
use crate::addr::{Gfn, Gpa, Pfn};
use crate::format::{Entry, EntryFormat, Leaf, Writability};
use crate::level::{Level, PageSize, ENTRIES, INDEX_BITS};
use crate::memory::{Backing, Held, InvalidationSeq, Resolved, SlotFlags};
use crate::tables::{EntryCell, TableCache, TableFrame, TableMemory};

/// How a fault ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "says whether the access must be emulated"]
pub enum FaultOutcome {
    /// The access is permitted now.
    Mapped,
    /// The access was permitted already: another CPU was faster, or the TLB was behind.
    Spurious,
    /// Another CPU, an invalidation or the backing is in the way: let the guest fault again.
    Retry,
    /// There is no RAM here: emulate the access.
    Mmio(Gpa),
    /// A write to a read-only slot: emulate the access.
    ReadOnly(Gpa),
    /// The cache has too few table pages: fill it and fault again. Nothing has been changed.
    NeedTables,
    /// The guest has no physical address this high; for the guest it is a reserved bit in its page tables.
    OutOfRange(Gpa),
}

/// Memory found for a guest page and not mapped yet. It may outlive the guard under which it was found; when the memory
/// behind the page has changed in the meantime, it is refused.
#[derive(Debug)]
pub struct Resolution {
    gfn: Gfn,
    read_only: bool,
    access: AccessKind,
    /// First frame of the block of `size`.
    block: Pfn,
    size: PageSize,
    sequence: InvalidationSeq,
}

/// Times that an entry may change under a fault's hands before it gives up; each time another CPU got on.
const MAX_RACES: usize = 8;

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Handles a second-stage fault of an access of kind `access` at `gpa`.
    ///
    /// Takes no lock and allocates nothing; `cache` holds the table pages that may be needed and counts the outcome.
    #[inline]
    pub fn fault<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        gpa: Gpa,
        access: AccessKind,
    ) -> FaultOutcome {
        let outcome = match self.resolve(guard, gpa, access) {
            Ok(resolution) => self.install(guard, cache, &resolution),
            Err(outcome) => outcome,
        };
        let stats = &mut cache.stats;
        let counter = match outcome {
            FaultOutcome::Mapped => &mut stats.mapped,
            FaultOutcome::Spurious => &mut stats.spurious,
            FaultOutcome::Retry => &mut stats.retry,
            FaultOutcome::Mmio(_) => &mut stats.mmio,
            FaultOutcome::ReadOnly(_) => &mut stats.read_only,
            FaultOutcome::NeedTables => &mut stats.need_tables,
            FaultOutcome::OutOfRange(_) => &mut stats.out_of_range,
        };
        *counter += 1;
        outcome
    }

    /// The first half of a fault: finds, or has the backing allocate, the memory for `gpa`.
    #[inline]
    pub fn resolve<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        gpa: Gpa,
        access: AccessKind,
    ) -> Result<Resolution, FaultOutcome> {
        if !self.reaches(gpa) {
            return Err(FaultOutcome::OutOfRange(gpa));
        }
        let memory = guard.memory();
        let Some(slot) = memory.find_slot(gpa) else {
            return Err(FaultOutcome::Mmio(gpa));
        };
        let read_only = slot.flags().contains(SlotFlags::READ_ONLY);
        if access == AccessKind::Write && read_only {
            return Err(FaultOutcome::ReadOnly(gpa));
        }
        let sequence = memory.invalidations().sequence();
        let mut want = self.largest();
        while !slot.block_fits(want.bytes()) {
            match want.smaller() {
                Some(smaller) => want = smaller,
                None => break,
            }
        }
        let at = slot.ram();
        match memory.backing().resolve(&at, want, access) {
            Resolved::Ram { pfn, size } => Ok(Resolution {
                gfn: gpa.gfn(),
                read_only,
                access,
                block: pfn,
                size: size.min(want),
                sequence,
            }),
            Resolved::Retry => Err(FaultOutcome::Retry),
            Resolved::Absent => Err(FaultOutcome::Mmio(gpa)),
        }
    }

    /// The second half of a fault: maps what was found.
    #[inline]
    pub fn install<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        resolution: &Resolution,
    ) -> FaultOutcome {
        let cpu = self.admit(guard);
        if guard.memory().invalidations().is_stale(resolution.sequence, resolution.gfn) {
            return FaultOutcome::Retry;
        }
        // Nearly always the tables are there, and the entry for the page is empty.
        let gfn = resolution.gfn.number();
        let (table, shift, entry) = self.descend(gfn);
        if shift == 0 && entry == 0 {
            let leaf = self.format.make_leaf(&resolution.leaf(PageSize::Size4K));
            if self.cell(&table, Level::L1.index(gfn)).compare_exchange(0, leaf).is_ok() {
                self.counters.leaves(cpu, Level::L1, 1);
                return FaultOutcome::Mapped;
            }
        }
        self.install_anywhere(guard, cache, resolution)
    }

    /// The general case of [`install`](Self::install): any size, tables missing, something there already.
    #[inline(never)]
    fn install_anywhere<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        resolution: &Resolution,
    ) -> FaultOutcome {
        let cpu = guard.cpu();
        let gfn = resolution.gfn.number();
        for _ in 0..MAX_RACES {
            let place = self.find(gfn);
            let cell = self.cell(&place.table, place.level.index(gfn));
            match place.kind {
                Entry::Empty | Entry::Mmio => {
                    // Frames are found by their place in the block, so a block that is not as aligned as the backing
                    // says is mapped in smaller pages, not wrongly.
                    let mut leaf = resolution.leaf(resolution.size);
                    while leaf.size.level() > place.level
                        || !leaf.pfn.number().is_multiple_of(leaf.size.pages())
                    {
                        match leaf.size.smaller() {
                            Some(smaller) => leaf = resolution.leaf(smaller),
                            None => break,
                        }
                    }
                    let depth = place.level.ordinal() - leaf.size.level().ordinal();
                    let Some(entry) = self.build(cache, gfn, &leaf, depth) else {
                        return FaultOutcome::NeedTables;
                    };
                    match cell.compare_exchange(place.entry, entry) {
                        Ok(()) => {
                            cache.consume(depth);
                            if depth > 0 {
                                self.counters.tables(cpu, depth as i64);
                            }
                            self.counters.leaves(cpu, leaf.size.level(), 1);
                            return FaultOutcome::Mapped;
                        }
                        Err(_) => self.unbuild(cache, gfn, &leaf, depth),
                    }
                }
                Entry::Leaf if self.format.permits(place.entry, resolution.access) => {
                    return FaultOutcome::Spurious;
                }
                Entry::Leaf => match self.relax(guard, &place, cell, resolution.access) {
                    Some(outcome) => return outcome,
                    None => continue,
                },
                // The table was taken out of the tree on the way to it.
                Entry::Frozen | Entry::Table(_) => return FaultOutcome::Retry,
            }
        }
        FaultOutcome::Retry
    }

    /// The entry at which a descent towards `gfn` ends, with all that is known of it.
    #[inline]
    pub(super) fn find(&self, gfn: u64) -> Place {
        let (table, shift, entry) = self.descend(gfn);
        let level = Level::at_frame_shift(shift);
        Place { kind: self.format.entry(entry, level), table, level, entry }
    }

    /// Descends towards `gfn` as far as there are tables: the last table, its level as the lowest bit of its index in
    /// the frame number, and the entry that is no link.
    #[inline]
    fn descend(&self, gfn: u64) -> (TableFrame, u32, u64) {
        let mut table = self.root_table();
        // Counting in bits rather than levels keeps the loop free of branches by level.
        let mut shift = self.format.top().frame_shift();
        loop {
            let entry = self.cell(&table, (gfn >> shift) as usize % ENTRIES).load();
            match self.format.link(entry) {
                Some(child) if shift > 0 => {
                    // Pairs with the release fence in `build`: the child's entries are seen as they were published.
                    M::Cell::fence(Ordering::Acquire);
                    table = TableFrame::linked(child);
                    shift -= INDEX_BITS;
                }
                _ => return (table, shift, entry),
            }
        }
    }

    /// Prepares the entry that maps `leaf` through `depth` new tables, which stay in the cache; `None` if it has fewer.
    #[inline]
    fn build(&self, cache: &TableCache, gfn: u64, leaf: &Leaf, depth: usize) -> Option<u64> {
        let mut entry = self.format.make_leaf(leaf);
        if depth > 0 {
            let mut level = leaf.size.level();
            for &page in cache.peek(depth)? {
                self.cell(&TableFrame::linked(page), level.index(gfn)).store(entry);
                level = level_above(level);
                entry = self.format.make_table(page, level);
            }
            M::Cell::fence(Ordering::Release);
        }
        Some(entry)
    }

    /// Makes the tables in the cache that [`build`](Self::build) used empty again.
    #[cold]
    fn unbuild(&self, cache: &TableCache, gfn: u64, leaf: &Leaf, depth: usize) {
        let mut level = leaf.size.level();
        for &page in cache.peek(depth).unwrap_or_default() {
            self.cell(&TableFrame::linked(page), level.index(gfn)).store(0);
            level = level_above(level);
        }
    }

    /// A leaf is there and forbids the access. `None`: look again.
    #[cold]
    fn relax<'m, B: 'm>(
        &self,
        guard: &impl Held<'m, B>,
        place: &Place,
        cell: &M::Cell,
        access: AccessKind,
    ) -> Option<FaultOutcome> {
        let watched = self.format.writability(place.entry) == Some(Writability::Watched);
        if access == AccessKind::Write && watched {
            let writable = self.format.with_writability(place.entry, Writability::Writable);
            return cell.compare_exchange(place.entry, writable).ok().map(|()| FaultOutcome::Mapped);
        }
        // It says something else than its slot does. Never change a leaf into one of another page: take it away.
        if cell.compare_exchange(place.entry, 0).is_ok() {
            self.counters.leaves(guard.cpu(), place.level, -1);
            let mut flush = self.obligation(guard.memory());
            flush.note();
        }
        None
    }
}

/// Where a descent ended: at an entry that is no link.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) table: TableFrame,
    pub(super) level: Level,
    pub(super) entry: u64,
    pub(super) kind: Entry,
}

impl Resolution {
    /// The leaf that maps the part of the block around the page that has `size`.
    #[inline]
    fn leaf(&self, size: PageSize) -> Leaf {
        let writability = if self.read_only { Writability::ReadOnly } else { Writability::Writable };
        let inside = self.gfn.number() & (self.size.pages() - 1) & !(size.pages() - 1);
        let pfn = Pfn::new_truncate(self.block.number() + inside);
        Leaf::ram(pfn, size, writability)
    }
}

/// The level above; a chain of new tables ends below the root, so there always is one.
#[inline]
const fn level_above(level: Level) -> Level {
    match level {
        Level::L1 => Level::L2,
        Level::L2 => Level::L3,
        Level::L3 => Level::L4,
        Level::L4 | Level::L5 => Level::L5,
    }
}
