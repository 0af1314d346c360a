//! Range operations of the direct kind, in batches of bounded length: zap, write-protect, track, log, age.
use super::direct::DirectMmu;
use super::flush::Flush;
use super::roots::MAX_ROOTS;
use crate::addr::{Gfn, GfnRange};
use crate::cpu::CpuId;
use crate::format::{Entry, EntryFormat, Writability};
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, Held, LogBy, Pages, Slot, Space, SpaceGfn, Spaces};
use crate::mutant::{self, FlushSite, Mutant};
use crate::sync::Ordering;
use crate::tables::{EntryCell, TableFrame, TableMemory};

/// Entries that one batch looks at before it returns.
const BATCH: usize = 4096;

/// A range operation in progress, under one root after the other.
///
/// Each call of an operation does a bounded amount of work and moves the sweep on; call until [`is_done`](Self::is_done),
/// giving up the guard in between as often as latency asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a sweep does nothing until it is passed to an operation"]
pub struct Sweep {
    range: GfnRange,
    /// Whose roots.
    spaces: Spaces,
    root: usize,
    next: u64,
}

impl Sweep {
    /// A sweep that has all of `range` before it, under the roots of every space.
    pub const fn over(range: GfnRange) -> Self {
        Self { range, spaces: Spaces::all(), root: 0, next: range.start() }
    }

    /// The same, under the roots of `spaces` alone.
    pub const fn within(self, spaces: Spaces) -> Self {
        Self { spaces, ..self }
    }

    /// A sweep over what can be mapped of a slot.
    pub(crate) const fn over_slot(slot: &Slot) -> Self {
        Self::over(slot.range).within(slot.spaces)
    }

    /// The whole range.
    pub const fn range(&self) -> GfnRange {
        self.range
    }

    /// Whose roots.
    pub(super) const fn spaces(&self) -> Spaces {
        self.spaces
    }

    /// Whether the end of the range was reached under every root.
    pub const fn is_done(&self) -> bool {
        self.root >= MAX_ROOTS || self.range.is_empty()
    }

    /// The root it is at.
    pub(super) const fn root(&self) -> usize {
        self.root
    }

    /// Whether the end of the range was reached under this root.
    pub(super) const fn at_end(&self) -> bool {
        self.next >= self.range.end()
    }

    /// First frame that was not looked at yet, under this root.
    pub(super) const fn next(&self) -> u64 {
        self.next
    }

    /// Everything below `gfn` was looked at.
    pub(super) fn advance(&mut self, gfn: u64) {
        self.next = self.next.max(gfn);
    }

    /// Goes on to the next root.
    pub(super) fn next_root(&mut self) {
        self.root += 1;
        self.next = self.range.start();
    }

    /// Whether the whole block of `pages` frames from `first` on belongs to the range.
    fn covers(&self, first: u64, pages: u64) -> bool {
        self.range.start() <= first && first + pages <= self.range.end()
    }
}

/// What one visit of a range does to leaves and tables.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Zap,
    /// Zap, under obsolete roots only, and their roots with it.
    Dismantle,
    Protect,
    Unprotect,
    Track,
    Untrack,
    /// Make the next write to be noted, by this way.
    Rearm(LogBy),
    /// Move dirty bits into the log.
    Collect,
    Age,
    TestYoung,
    ForgetMmio,
    /// Take tables away that are there because of the fetches, at most so many.
    Recover {
        limit: u64,
    },
}

/// What a sweep carries from entry to entry.
struct Visit<'v, 'a, F: EntryFormat, M: TableMemory> {
    operation: Operation,
    sweep: &'v mut Sweep,
    flush: &'v mut Flush<'a, F, M>,
    pages: &'v dyn Pages,
    /// That of the root.
    space: Space,
    cpu: CpuId,
    budget: usize,
    /// Whether a leaf was young.
    young: bool,
}

impl<F: EntryFormat, M: TableMemory> Visit<'_, '_, F, M> {
    /// The frame as the root has it.
    fn at(&self, gfn: u64) -> SpaceGfn {
        self.space.at(Gfn::new_truncate(gfn))
    }
}

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Takes the mappings of the range away, and the tables that the range covers wholly.
    ///
    /// A huge page that the range covers in part goes as a whole: what is still wanted of it faults again.
    pub fn zap<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Zap)
    }

    /// Write-protects the range so that the next write to each page faults; that fault makes the page writable again
    /// and ends as [`Mapped`](super::FaultOutcome::Mapped).
    ///
    /// Pages are protected in the size they are mapped with; [`split`](Self::split) first to notice writes by 4 KiB.
    pub fn write_protect<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Protect)
    }

    /// Takes back [`write_protect`](Self::write_protect), where the slot is not logged. More permission needs no flush: the
    /// obligation is empty, unless another operation is joined to it.
    pub fn write_unprotect<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Unprotect)
    }

    /// Protects pages whose writes must be emulated from now on: what
    /// [`track_writes`](crate::Exclusive::track_writes) returned. A huge page goes.
    pub fn track<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Track)
    }

    /// Lets writes make the pages writable again that nobody [tracks](crate::Exclusive::untrack_writes) any more.
    pub fn untrack<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Untrack)
    }

    /// Arms the pages of the range, all of one slot, so that the next write to each is logged: by write protection, or
    /// by taking D away. Huge pages are write-protected in any case. After the flush no write goes unnoticed.
    ///
    /// It is the slot that the first of the sweep's spaces has there, and only roots of spaces that see it are swept: what
    /// another slot has noted of the same frames in its leaves is not to be lost.
    pub fn rearm<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        let start = Gfn::new_truncate(sweep.range().start());
        let found = Space::ALL.into_iter().filter(|&space| sweep.spaces.contains(space.into()));
        let found = found.map(|space| space.at(start)).find_map(|at| Some((at, self.spaces_of(guard, at)?)));
        let mut by = LogBy::WriteProtection;
        if let Some((at, spaces)) = found {
            by = self.log_by(guard, at);
            sweep.spaces &= spaces;
        }
        self.sweep(guard, sweep, Operation::Rearm(by))
    }

    /// Arms those of the 64 pages from `first` on, all of one slot, that have a bit in `mask`: what
    /// [`DirtyLog::clear`](crate::DirtyLog::clear) returned.
    pub fn rearm_pages<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        first: impl Into<SpaceGfn>,
        mask: u64,
    ) -> Flush<'a, F, M> {
        let first = first.into();
        let by = self.log_by(guard, first);
        let mut flush = self.obligation(guard.memory());
        let spaces = self.spaces_of(guard, first).unwrap_or(first.space.into());
        let mut left = mask;
        while left != 0 {
            // Neighbours at once: a log is seldom of single pages.
            let start = left.trailing_zeros();
            let pages = (left >> start).trailing_ones();
            left &= u64::MAX.checked_shl(start + pages).unwrap_or(0);
            let run = Gfn::new(first.gfn.number() + u64::from(start));
            let Ok(run) = run.and_then(|gfn| GfnRange::new(gfn, pages.into())) else { break };
            let mut sweep = Sweep::over(run).within(spaces);
            while !sweep.is_done() {
                self.sweep_into(guard, &mut sweep, Operation::Rearm(by), &mut flush);
            }
        }
        flush
    }

    /// Moves the dirty bits of the range into the log, where the slot is logged by them.
    pub fn collect_dirty<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Collect)
    }

    /// Makes the pages of a batch old and says whether any was young. Never flushes: a page that is used by way of a TLB
    /// alone may be taken for unused.
    pub fn test_and_clear_young<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> bool {
        let mut flush = self.obligation(guard.memory());
        self.sweep_into(guard, sweep, Operation::Age, &mut flush)
    }

    /// Says whether any page of a batch is young, and changes nothing.
    pub fn test_young<'a, B: Backing + 'a>(&'a self, guard: &impl Held<'a, B>, sweep: &mut Sweep) -> bool {
        let mut flush = self.obligation(guard.memory());
        self.sweep_into(guard, sweep, Operation::TestYoung, &mut flush)
    }

    /// How writes to the slot of the frame are noticed by these tables.
    fn log_by<'a, B: Backing + 'a>(&self, guard: &impl Held<'a, B>, at: SpaceGfn) -> LogBy {
        match guard.memory().logged_by(at) {
            Some(LogBy::DirtyBits) if self.format.has_dirty_bits() => LogBy::DirtyBits,
            _ => LogBy::WriteProtection,
        }
    }

    /// Who sees the slot of the frame.
    fn spaces_of<'a, B: Backing + 'a>(&self, guard: &impl Held<'a, B>, at: SpaceGfn) -> Option<Spaces> {
        guard.memory().find_slot(at.space, at.gfn.gpa()).map(|hit| hit.spaces())
    }

    /// The table of the root that `sweep` is at, if that is one to be swept.
    pub(super) fn swept_table(&self, sweep: &Sweep) -> Option<TableFrame> {
        let wanted = sweep.spaces.contains(self.ops.roots.space(sweep.root()).into());
        self.ops.roots.table(sweep.root()).filter(|_| wanted)
    }

    pub(super) fn sweep<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
        operation: Operation,
    ) -> Flush<'a, F, M> {
        let mut flush = self.obligation(guard.memory());
        self.sweep_into(guard, sweep, operation, &mut flush);
        flush
    }

    fn sweep_into<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
        operation: Operation,
        flush: &mut Flush<'a, F, M>,
    ) -> bool {
        let cpu = self.admit(guard);
        let memory = guard.memory();
        let space = Space::Normal;
        let mut visit =
            Visit { operation, sweep, flush, pages: memory, space, cpu, budget: BATCH, young: false };
        while !visit.sweep.is_done() {
            let index = visit.sweep.root();
            visit.space = self.ops.roots.space(index);
            let only = operation == Operation::Track && index != 0 && mutant::is(Mutant::TrackFirstRootOnly);
            let wanted = !only && (operation != Operation::Dismantle || self.is_obsolete(memory, index));
            if let Some(root) = self.swept_table(visit.sweep).filter(|_| wanted) {
                self.visit(&root, self.format.top(), 0, &mut visit);
                if visit.budget == 0 {
                    break;
                }
                if operation == Operation::Dismantle {
                    if let Some(root) = self.drop_root(index) {
                        self.retire(root, self.format.top(), 0, &mut visit);
                    }
                }
            }
            // Also when the range goes on beyond what the root translates.
            visit.sweep.next_root();
        }
        visit.young
    }

    /// Visits the entries of `table`, which translates the frames from `base` on. When it returns, the sweep has passed
    /// the table, or the budget is spent.
    fn visit(&self, table: &TableFrame, level: Level, base: u64, visit: &mut Visit<'_, '_, F, M>) {
        let pages = level.pages();
        let first_index = (visit.sweep.next().saturating_sub(base) / pages) as usize;
        for index in first_index..ENTRIES {
            let first = base + index as u64 * pages;
            if visit.sweep.at_end() || visit.budget == 0 {
                return;
            }
            if self.visit_entry(table, level, index, first, visit) {
                visit.sweep.advance(first + pages);
            }
        }
    }

    /// Visits one entry until it is as the operation wants it; `false` if the budget is spent before that.
    fn visit_entry(
        &self,
        table: &TableFrame,
        level: Level,
        index: usize,
        first: u64,
        visit: &mut Visit<'_, '_, F, M>,
    ) -> bool {
        let cell = self.cell(table, index);
        let end = first + level.pages();
        loop {
            let Some(budget) = visit.budget.checked_sub(1) else { return false };
            visit.budget = budget;
            let entry = cell.load();
            match (self.format.entry(entry, level), level.down()) {
                (Entry::Leaf, _) => {
                    if self.visit_leaf(cell, entry, level, first, visit) {
                        return true;
                    }
                }
                (Entry::Table(child), Some(below)) => {
                    M::Cell::fence(Ordering::Acquire);
                    let child = TableFrame::linked(child);
                    let unlink = match visit.operation {
                        Operation::Zap | Operation::Dismantle => {
                            visit.sweep.covers(first, level.pages()) || mutant::is(Mutant::ZapTooMuch)
                        }
                        Operation::Recover { .. } => self.may_recover(entry, first, visit),
                        _ => false,
                    };
                    // A table of leaves goes at once, the others when they have been emptied.
                    if !unlink || below != Level::L1 {
                        self.visit(&child, below, first, visit);
                        if !visit.sweep.at_end() && visit.sweep.next() < end {
                            return false;
                        }
                    }
                    if !unlink {
                        return true;
                    }
                    if cell.compare_exchange(entry, 0).is_ok() {
                        self.forget_link(entry);
                        self.retire(child, below, first, visit);
                        if let Operation::Recover { limit } = &mut visit.operation {
                            *limit -= 1;
                            if *limit == 0 {
                                visit.sweep.advance(end);
                                visit.budget = 0;
                            }
                        }
                        return true;
                    }
                }
                (Entry::Mmio, _) if visit.operation == Operation::ForgetMmio => {
                    if cell.compare_exchange(entry, 0).is_ok() {
                        return true;
                    }
                }
                // Nothing here, or the table was taken out of the tree meanwhile, and its leaves with it.
                _ => return true,
            }
        }
    }

    /// Whether the link `entry` is one to take away for huge pages to come back.
    fn may_recover(&self, entry: u64, first: u64, visit: &Visit<'_, '_, F, M>) -> bool {
        let left = matches!(visit.operation, Operation::Recover { limit } if limit > 0);
        let logged = visit.pages.logged_by(visit.at(first)).is_some();
        left && self.format.has_split_note(entry) && (!logged || mutant::is(Mutant::RecoverLogged))
    }

    /// `false`: the entry changed, look again.
    fn visit_leaf(
        &self,
        cell: &M::Cell,
        entry: u64,
        level: Level,
        first: u64,
        visit: &mut Visit<'_, '_, F, M>,
    ) -> bool {
        let format = &self.format;
        let writability = format.writability(entry);
        let as_writable = |new| format.with_writability(entry, new);
        // What becomes of the leaf, and for what TLBs must hear of it.
        let (new, flush) = match (visit.operation, writability) {
            (Operation::Zap | Operation::Dismantle, _) => (0, Some(FlushSite::Zap)),
            (Operation::Protect, Some(Writability::Writable | Writability::Watched)) => {
                let stale = format.may_be_cached_writable(entry);
                match stale {
                    true => (as_writable(Writability::Watched), Some(FlushSite::Protect)),
                    false => (entry, None),
                }
            }
            (Operation::Unprotect, Some(Writability::Tracked)) if mutant::is(Mutant::UnprotectTracked) => {
                (as_writable(Writability::Writable), None)
            }
            (Operation::Unprotect, Some(Writability::Watched)) => {
                let logged =
                    visit.pages.logged_by(visit.at(first)).is_some() && !mutant::is(Mutant::UnprotectLogged);
                (if logged { entry } else { as_writable(Writability::Writable) }, None)
            }
            // From here on, whoever asks wants to be sure, also of what somebody else protected and has not flushed yet.
            (Operation::Track, Some(Writability::Writable | Writability::Watched)) => match level {
                Level::L1 => (as_writable(Writability::Tracked), Some(FlushSite::Track)),
                _ => (0, Some(FlushSite::TrackHuge)),
            },
            (Operation::Untrack, Some(Writability::Tracked)) => (as_writable(Writability::Watched), None),
            (Operation::Rearm(LogBy::DirtyBits), Some(Writability::Writable)) if level == Level::L1 => {
                (format.without_dirty(entry), Some(FlushSite::RearmClean))
            }
            (Operation::Rearm(by), Some(Writability::Writable | Writability::Watched)) => {
                let watched = as_writable(Writability::Watched);
                let clean = by == LogBy::DirtyBits;
                let new = if clean { format.without_dirty(watched) } else { watched };
                (new, Some(FlushSite::RearmProtect))
            }
            (Operation::Collect, _) if level == Level::L1 && format.is_dirty(entry) => {
                match visit.pages.logged_by(visit.at(first)) {
                    Some(LogBy::DirtyBits) => (format.without_dirty(entry), Some(FlushSite::Collect)),
                    _ => (entry, None),
                }
            }
            (Operation::Age, _) => {
                visit.young |= format.is_young(entry);
                (format.make_old(entry), mutant::is(Mutant::AgingFlushes).then_some(FlushSite::Zap))
            }
            (Operation::TestYoung, _) => {
                visit.young |= format.is_young(entry);
                (entry, None)
            }
            _ => (entry, None),
        };
        if mutant::is(Mutant::StoreOverFlags) {
            // Between the look and the store, as another CPU would see it.
            let _ = cell.compare_exchange(entry, entry);
            cell.store(new);
        } else if new != entry && cell.compare_exchange(entry, new).is_err() {
            return false;
        }
        if new == 0 {
            self.counters.leaves(visit.cpu, level, -1);
        }
        let lost = new == 0 && mutant::is(Mutant::ZappedDirtyLost);
        if !lost && (new == 0 || visit.operation == Operation::Collect && new != entry) {
            self.note_dirty_leaf(visit.pages, entry, level, visit.at(first));
        }
        if let Some(site) = flush {
            visit.flush.note(site);
        }
        true
    }

    /// The leaf `entry` for a frame is gone, or its D: if that is how the slot is logged, the log takes the place of D.
    pub(super) fn note_dirty_leaf(&self, pages: &dyn Pages, entry: u64, level: Level, at: SpaceGfn) {
        if level == Level::L1 && self.format.is_dirty(entry) {
            pages.note_dirty_bit(at);
        }
    }

    /// The link `entry` is gone.
    pub(super) fn forget_link(&self, entry: u64) {
        if self.format.has_split_note(entry) {
            self.count_splits(-1);
        }
    }

    /// Freezes every entry of a table that was just unlinked, so that whoever still walks it puts nothing there, and
    /// hands it to the obligation. At most one table of each level below: it was emptied before, but a fault may have
    /// put something back.
    fn retire(&self, table: TableFrame, level: Level, base: u64, visit: &mut Visit<'_, '_, F, M>) {
        let frozen = if mutant::is(Mutant::NotFrozen) { 0 } else { self.format.make_frozen(0) };
        for index in 0..ENTRIES {
            let entry = self.cell(&table, index).swap(frozen);
            let first = base + index as u64 * level.pages();
            match (self.format.entry(entry, level), level.down()) {
                (Entry::Leaf, _) => {
                    self.counters.leaves(visit.cpu, level, -1);
                    if !mutant::is(Mutant::RetiredDirtyLost) {
                        self.note_dirty_leaf(visit.pages, entry, level, visit.at(first));
                    }
                }
                (Entry::Table(child), Some(below)) => {
                    self.forget_link(entry);
                    self.retire(TableFrame::linked(child), below, first, visit);
                }
                _ => {}
            }
        }
        visit.budget = visit.budget.saturating_sub(ENTRIES);
        self.counters.tables(visit.cpu, -1);
        visit.flush.adopt(table, FlushSite::Unlink);
    }
}
