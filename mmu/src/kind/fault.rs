//! Direct faults: find the memory, then map it, beside any number of other CPUs.
use bitflags::bitflags;

use super::direct::DirectMmu;
use super::roots::Root;
use crate::access::AccessKind;
use crate::addr::{Gfn, Gpa, Pfn};
use crate::format::{Entry, EntryFormat, Leaf, Writability};
use crate::level::{Level, PageSize, ENTRIES, INDEX_BITS};
use crate::memory::{Backing, Held, InvalidationSeq, Resolved, SlotFlags, SlotHit, Space, VmMemory};
use crate::mutant::{self, FlushSite, Mutant};
use crate::sync::Ordering;
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
    /// A write to a page whose writes are tracked: emulate the access.
    WriteTracked(Gpa),
    /// The cache has too few table pages: fill it and fault again. Nothing has been changed.
    NeedTables,
    /// The guest has no physical address this high; for the guest it is a reserved bit in its page tables.
    OutOfRange(Gpa),
}

/// Memory found for a guest page and not mapped yet. It may outlive the guard under which it was found; when the memory
/// behind the page has changed in the meantime, it is refused.
#[derive(Debug)]
pub struct Resolution {
    /// The space of the root.
    space: Space,
    gfn: Gfn,
    /// The root's table. It stays the root's as long as `sequence` is current.
    root: Pfn,
    access: AccessKind,
    policy: Policy,
    /// First frame of the block of `size`.
    block: Pfn,
    size: PageSize,
    sequence: InvalidationSeq,
}

bitflags! {
    /// How a page is mapped, by what its slot and the kind have switched on. Without any: writable, in any size.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Policy: u8 {
        /// Never written: the slot is read-only.
        const READ_ONLY = 1 << 0;
        /// Never written: the page is tracked.
        const TRACKED = 1 << 1;
        /// Not written yet: the first write faults.
        const WATCHED = 1 << 2;
        /// Without D, so that the processor notes the first write.
        const CLEAN = 1 << 3;
        /// The slot is logged, and the page counts as written from now on.
        const LOG_WRITE = 1 << 4;
        /// Huge pages are not executable.
        const NO_HUGE_EXECUTE = 1 << 5;
        /// The page could have been mapped huge, but must be executable.
        const SPLIT = 1 << 6;
    }
}

impl Policy {
    pub(super) const fn writability(self) -> Writability {
        if self.contains(Self::READ_ONLY) {
            Writability::ReadOnly
        } else if self.contains(Self::TRACKED) {
            Writability::Tracked
        } else if self.contains(Self::WATCHED) {
            Writability::Watched
        } else {
            Writability::Writable
        }
    }
}

/// Times that an entry may change under a fault's hands before it gives up; each time another CPU got on.
const MAX_RACES: usize = 8;

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Handles a second-stage fault of an access of kind `access` at `gpa`, on the root of the empty role.
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
        let found = self.resolve(guard, gpa, access);
        if let Err(FaultOutcome::Mmio(gpa)) = found {
            self.note_mmio(guard, self.root(), gpa);
        }
        self.finish(guard, cache, found)
    }

    /// The same on `root`. If that is obsolete, the outcome is [`Retry`](FaultOutcome::Retry): the vCPU finds out when it
    /// enters.
    #[inline]
    pub fn fault_on<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        root: Root,
        gpa: Gpa,
        access: AccessKind,
    ) -> FaultOutcome {
        let found = self.resolve_on(guard, root, gpa, access);
        if let Err(FaultOutcome::Mmio(gpa)) = found {
            self.note_mmio(guard, root, gpa);
        }
        self.finish(guard, cache, found)
    }

    #[inline]
    fn finish<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        found: Result<Resolution, FaultOutcome>,
    ) -> FaultOutcome {
        let outcome = match found {
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
            FaultOutcome::WriteTracked(_) => &mut stats.write_tracked,
            FaultOutcome::NeedTables => &mut stats.need_tables,
            FaultOutcome::OutOfRange(_) => &mut stats.out_of_range,
        };
        *counter += 1;
        outcome
    }

    /// The first half of a fault: finds, or has the backing allocate, the memory for `gpa`, for the root of the empty role.
    #[inline]
    pub fn resolve<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        gpa: Gpa,
        access: AccessKind,
    ) -> Result<Resolution, FaultOutcome> {
        let root = self.first_root(guard.memory());
        self.resolve_under(guard, root, Space::Normal, gpa, access)
    }

    /// The same for `root`.
    #[inline]
    pub fn resolve_on<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        root: Root,
        gpa: Gpa,
        access: AccessKind,
    ) -> Result<Resolution, FaultOutcome> {
        let table = self.live_table(guard.memory(), root);
        self.resolve_under(guard, table, root.space(), gpa, access)
    }

    #[inline]
    fn resolve_under<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        root: Option<TableFrame>,
        space: Space,
        gpa: Gpa,
        access: AccessKind,
    ) -> Result<Resolution, FaultOutcome> {
        if !self.reaches(gpa) {
            return Err(FaultOutcome::OutOfRange(gpa));
        }
        let memory = guard.memory();
        let Some(root) = root else { return Err(FaultOutcome::Retry) };
        let Some(slot) = memory.find_slot(space, gpa) else {
            return Err(FaultOutcome::Mmio(gpa));
        };
        let mut policy = Policy::empty();
        if !slot.flags().is_empty() {
            policy = self.policy(memory, &slot, access)?;
        }
        let sequence = memory.invalidations().sequence();
        let mut want = self.largest();
        // While memory is taken away somewhere, no page may reach there.
        let in_progress =
            memory.invalidations().any_in_progress() && !mutant::is(Mutant::HugeIntoInvalidation);
        if want != PageSize::Size4K && in_progress {
            want = PageSize::Size4K;
        }
        // A page always fits its slot.
        while want != PageSize::Size4K && !memory.allows(&slot, want) {
            match want.smaller() {
                Some(smaller) => want = smaller,
                None => break,
            }
        }
        let at = slot.ram();
        match memory.backing().resolve(&at, want, access) {
            Resolved::Ram { pfn, size } => {
                let mut size = size.min(want);
                let mut block = pfn;
                if size != PageSize::Size4K && self.forbids_huge_execute() {
                    policy.insert(Policy::NO_HUGE_EXECUTE);
                    if access == AccessKind::Execute && !mutant::is(Mutant::FetchKeepsHuge) {
                        policy.insert(Policy::SPLIT);
                        let inside = gpa.gfn().number() & (size.pages() - 1);
                        block = Pfn::new_truncate(pfn.number() + inside);
                        size = PageSize::Size4K;
                    }
                }
                let (gfn, root) = (gpa.gfn(), root.pfn());
                let late = mutant::is(Mutant::SequenceAfterResolve);
                let sequence = if late { memory.invalidations().sequence() } else { sequence };
                Ok(Resolution { space, gfn, root, access, policy, block, size, sequence })
            }
            Resolved::Retry => Err(FaultOutcome::Retry),
            Resolved::Absent => Err(FaultOutcome::Mmio(gpa)),
        }
    }

    /// How a page of a slot with flags is mapped.
    #[cold]
    pub(super) fn policy<B: Backing>(
        &self,
        memory: &VmMemory<B>,
        slot: &SlotHit<'_>,
        access: AccessKind,
    ) -> Result<Policy, FaultOutcome> {
        let (flags, gpa, write) = (slot.flags(), slot.ram().gpa, access == AccessKind::Write);
        if flags.contains(SlotFlags::READ_ONLY) {
            let read_only =
                if mutant::is(Mutant::ReadOnlySlotWritable) { Policy::empty() } else { Policy::READ_ONLY };
            return if write { Err(FaultOutcome::ReadOnly(gpa)) } else { Ok(read_only) };
        }
        if memory.is_tracked(slot) && (write || !mutant::is(Mutant::TrackedWritable)) {
            return if write { Err(FaultOutcome::WriteTracked(gpa)) } else { Ok(Policy::TRACKED) };
        }
        let by_dirty_bits = flags.contains(SlotFlags::DIRTY_BITS) && self.format.has_dirty_bits();
        Ok(match (flags.contains(SlotFlags::DIRTY_LOG), write) {
            (false, _) => Policy::empty(),
            (true, true) => Policy::LOG_WRITE,
            (true, false) if by_dirty_bits => Policy::CLEAN,
            (true, false) if mutant::is(Mutant::LoggedReadWritable) => Policy::empty(),
            (true, false) => Policy::WATCHED,
        })
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
        let memory = guard.memory();
        if memory.invalidations().is_stale(resolution.sequence, resolution.gfn, resolution.size) {
            return FaultOutcome::Retry;
        }
        // Nearly always the tables are there, and the entry for the page is empty.
        let gfn = resolution.gfn.number();
        let (table, shift, entry) = self.descend(TableFrame::linked(resolution.root), gfn);
        if shift == 0 && entry == 0 && resolution.policy.is_empty() {
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
        let (cpu, memory) = (guard.cpu(), guard.memory());
        let gfn = resolution.gfn.number();
        for _ in 0..MAX_RACES {
            let place = self.find(TableFrame::linked(resolution.root), gfn);
            let cell = self.cell(&place.table, place.level.index(gfn));
            match place.kind {
                Entry::Frozen if !mutant::is(Mutant::FrozenOverwritten) => return FaultOutcome::Retry,
                Entry::Empty | Entry::Mmio | Entry::Frozen => {
                    // Frames are found by their place in the block, so a block that is not as aligned as the backing
                    // says is mapped in smaller pages, not wrongly.
                    let mut leaf = resolution.leaf(resolution.size);
                    while leaf.size.level() > place.level
                        || !leaf.pfn.number().is_multiple_of(leaf.size.pages())
                            && !mutant::is(Mutant::MisalignedHuge)
                    {
                        match leaf.size.smaller() {
                            Some(smaller) => leaf = resolution.leaf(smaller),
                            None => break,
                        }
                    }
                    let depth = place.level.ordinal() - leaf.size.level().ordinal();
                    let Some(entry) = self.build(cache, gfn, resolution, &leaf, depth) else {
                        return FaultOutcome::NeedTables;
                    };
                    let early = mutant::is(Mutant::NoteBeforeMapping);
                    if early && resolution.policy.contains(Policy::LOG_WRITE) {
                        memory.note_write(resolution.space, resolution.gfn);
                    }
                    match cell.compare_exchange(place.entry, entry) {
                        Ok(()) => {
                            cache.consume(depth);
                            if depth > 0 {
                                self.counters.tables(cpu, depth as i64);
                            }
                            self.counters.leaves(cpu, leaf.size.level(), 1);
                            if resolution.notes_split(place.level, depth) {
                                self.count_splits(1);
                            }
                            if resolution.policy.contains(Policy::LOG_WRITE) && !early {
                                memory.note_write(resolution.space, resolution.gfn);
                            }
                            return FaultOutcome::Mapped;
                        }
                        Err(_) if mutant::is(Mutant::UnbuildForgotten) => {}
                        Err(_) => self.unbuild(cache, gfn, &leaf, depth),
                    }
                }
                Entry::Leaf if self.format.permits(place.entry, resolution.access) => {
                    return FaultOutcome::Spurious;
                }
                Entry::Leaf => match self.relax(guard, &place, cell, resolution) {
                    Some(outcome) => return outcome,
                    None => continue,
                },
                // The table was taken out of the tree on the way to it.
                Entry::Table(_) => return FaultOutcome::Retry,
            }
        }
        FaultOutcome::Retry
    }

    /// The entry at which a descent towards `gfn` ends, with all that is known of it.
    #[inline]
    pub(super) fn find(&self, root: TableFrame, gfn: u64) -> Place {
        let (table, shift, entry) = self.descend(root, gfn);
        let level = Level::at_frame_shift(shift);
        Place { kind: self.format.entry(entry, level), table, level, entry }
    }

    /// Descends towards `gfn` as far as there are tables: the last table, its level as the lowest bit of its index in
    /// the frame number, and the entry that is no link.
    #[inline]
    pub(super) fn descend(&self, root: TableFrame, gfn: u64) -> (TableFrame, u32, u64) {
        let mut table = root;
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
    fn build(
        &self,
        cache: &TableCache,
        gfn: u64,
        resolution: &Resolution,
        leaf: &Leaf,
        depth: usize,
    ) -> Option<u64> {
        let mut entry = self.format.make_leaf(leaf);
        if resolution.policy.contains(Policy::CLEAN) && !mutant::is(Mutant::ResolvedDirty) {
            entry = self.format.without_dirty(entry);
        }
        if depth > 0 {
            let mut level = leaf.size.level();
            for &page in cache.peek(depth)? {
                self.cell(&TableFrame::linked(page), level.index(gfn)).store(entry);
                level = level_above(level);
                entry = self.format.make_table(page, level);
                if resolution.policy.contains(Policy::SPLIT) && level == Level::L2 {
                    entry = self.format.with_split_note(entry);
                }
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
    fn relax<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        place: &Place,
        cell: &M::Cell,
        resolution: &Resolution,
    ) -> Option<FaultOutcome> {
        let memory = guard.memory();
        let logged = resolution.policy.contains(Policy::LOG_WRITE);
        if let Some(new) = self.upgrade(place.entry, place.level, resolution.access, logged) {
            let early = mutant::is(Mutant::NoteBeforeRelaxing);
            if logged && early {
                memory.note_write(resolution.space, resolution.gfn);
            }
            cell.compare_exchange(place.entry, new).ok()?;
            if logged && !early {
                memory.note_write(resolution.space, resolution.gfn);
            }
            return Some(FaultOutcome::Mapped);
        }
        // It says something else than its slot does, or is larger than it may be now. Never change a leaf into one of
        // another page: take it away.
        if mutant::is(Mutant::LeafChangesPage) {
            let leaf = resolution.leaf(place.level.page_size().unwrap_or(PageSize::Size4K));
            return cell
                .compare_exchange(place.entry, self.format.make_leaf(&leaf))
                .map(|()| FaultOutcome::Mapped)
                .ok();
        }
        if cell.compare_exchange(place.entry, 0).is_ok() {
            self.counters.leaves(guard.cpu(), place.level, -1);
            self.note_dirty_leaf(memory, place.entry, place.level, resolution.space.at(resolution.gfn));
            let mut flush = self.obligation(memory);
            flush.note(FlushSite::Disagreement);
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
    pub(super) fn leaf(&self, size: PageSize) -> Leaf {
        let inside = self.gfn.number() & (self.size.pages() - 1) & !(size.pages() - 1);
        let pfn = Pfn::new_truncate(self.block.number() + inside);
        let forbidden = self.policy.contains(Policy::NO_HUGE_EXECUTE) && size != PageSize::Size4K;
        let execute = !forbidden || mutant::is(Mutant::HugeExecutable);
        Leaf::ram(pfn, size, self.policy.writability()).with_execute(execute)
    }

    /// The size of the block that was found.
    pub(super) const fn size(&self) -> PageSize {
        self.size
    }

    /// When it was found.
    pub(super) const fn sequence(&self) -> InvalidationSeq {
        self.sequence
    }

    /// Whether the chain of `depth` new tables below an entry at `level` has the link that notes a split.
    const fn notes_split(&self, level: Level, depth: usize) -> bool {
        self.policy.contains(Policy::SPLIT) && depth > 0 && level as u32 >= Level::L2 as u32
    }
}

/// The level above; a chain of new tables ends below the root, so there always is one.
#[inline]
pub(super) const fn level_above(level: Level) -> Level {
    match level {
        Level::L1 => Level::L2,
        Level::L2 => Level::L3,
        Level::L3 => Level::L4,
        Level::L4 | Level::L5 => Level::L5,
    }
}
