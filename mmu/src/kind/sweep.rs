//! Range operations of the direct kind: zap, write-protect, in batches of bounded length.
use super::direct::DirectMmu;
use super::flush::Flush;
use crate::addr::GfnRange;
use crate::cpu::CpuId;
use crate::format::{Entry, EntryFormat, Writability};
use crate::level::{Level, ENTRIES};
use crate::memory::Held;
use crate::tables::{EntryCell, TableFrame, TableMemory};

/// Entries that one batch looks at before it returns.
const BATCH: usize = 4096;

/// A range operation in progress.
///
/// Each call of an operation does a bounded amount of work and moves the sweep on; call until [`is_done`](Self::is_done),
/// giving up the guard in between as often as latency asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a sweep does nothing until it is passed to an operation"]
pub struct Sweep {
    range: GfnRange,
    next: u64,
}

impl Sweep {
    /// A sweep that has all of `range` before it.
    pub const fn over(range: GfnRange) -> Self {
        Self { range, next: range.start() }
    }

    /// The whole range.
    pub const fn range(&self) -> GfnRange {
        self.range
    }

    /// Whether the end of the range was reached.
    pub const fn is_done(&self) -> bool {
        self.next >= self.range.end()
    }

    /// First frame that was not looked at yet.
    pub(super) const fn next(&self) -> u64 {
        self.next
    }

    /// Everything below `gfn` was looked at.
    pub(super) fn advance(&mut self, gfn: u64) {
        self.next = self.next.max(gfn);
    }

    /// Whether the whole block of `pages` frames from `first` on belongs to the range.
    fn covers(&self, first: u64, pages: u64) -> bool {
        self.range.start() <= first && first + pages <= self.range.end()
    }
}

/// What one visit of a range does to leaves and tables.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operation {
    Zap,
    Protect,
    Unprotect,
}

/// What a sweep carries from entry to entry.
struct Visit<'v, 'a, F: EntryFormat, M: TableMemory> {
    operation: Operation,
    sweep: &'v mut Sweep,
    flush: &'v mut Flush<'a, F, M>,
    cpu: CpuId,
    budget: usize,
}

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Takes the mappings of the range away, and the tables that the range covers wholly.
    ///
    /// A huge page that the range covers in part goes as a whole: what is still wanted of it faults again.
    pub fn zap<'a, B: 'a>(&'a self, guard: &impl Held<'a, B>, sweep: &mut Sweep) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Zap)
    }

    /// Write-protects the range so that the next write to each page faults; that fault makes the page writable again
    /// and ends as [`Mapped`](super::FaultOutcome::Mapped).
    ///
    /// Pages are protected in the size they are mapped with; [`split`](Self::split) first to notice writes by 4 KiB.
    pub fn write_protect<'a, B: 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Protect)
    }

    /// Takes back [`write_protect`](Self::write_protect). More permission needs no flush: the obligation is empty, unless
    /// another operation is joined to it.
    pub fn write_unprotect<'a, B: 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Unprotect)
    }

    fn sweep<'a, B: 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
        operation: Operation,
    ) -> Flush<'a, F, M> {
        let cpu = self.admit(guard);
        let mut flush = self.obligation(guard.memory());
        let mut visit = Visit { operation, sweep, flush: &mut flush, cpu, budget: BATCH };
        self.visit(&self.root_table(), self.format.top(), 0, &mut visit);
        if visit.budget > 0 {
            // Also when the range goes on beyond what the root translates.
            let end = visit.sweep.range.end();
            visit.sweep.advance(end);
        }
        flush
    }

    /// Visits the entries of `table`, which translates the frames from `base` on. When it returns, the sweep has passed
    /// the table, or the budget is spent.
    fn visit(&self, table: &TableFrame, level: Level, base: u64, visit: &mut Visit<'_, '_, F, M>) {
        let pages = level.pages();
        let first_index = (visit.sweep.next().saturating_sub(base) / pages) as usize;
        for index in first_index..ENTRIES {
            let first = base + index as u64 * pages;
            if visit.sweep.is_done() || visit.budget == 0 {
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
                    if self.visit_leaf(cell, entry, level, visit) {
                        return true;
                    }
                }
                (Entry::Table(child), Some(below)) => {
                    M::Cell::fence(core::sync::atomic::Ordering::Acquire);
                    let child = TableFrame::linked(child);
                    let unlink =
                        visit.operation == Operation::Zap && visit.sweep.covers(first, level.pages());
                    // A table of leaves goes at once, the others when they have been emptied.
                    if !unlink || below != Level::L1 {
                        self.visit(&child, below, first, visit);
                        if !visit.sweep.is_done() && visit.sweep.next() < end {
                            return false;
                        }
                    }
                    if !unlink {
                        return true;
                    }
                    if cell.compare_exchange(entry, 0).is_ok() {
                        self.retire(child, below, visit);
                        return true;
                    }
                }
                // Nothing here, or the table was taken out of the tree meanwhile, and its leaves with it.
                _ => return true,
            }
        }
    }

    /// `false`: the entry changed, look again.
    fn visit_leaf(&self, cell: &M::Cell, entry: u64, level: Level, visit: &mut Visit<'_, '_, F, M>) -> bool {
        let writability = self.format.writability(entry);
        let new = match (visit.operation, writability) {
            (Operation::Zap, _) => 0,
            (Operation::Protect, Some(Writability::Writable)) => {
                self.format.with_writability(entry, Writability::Watched)
            }
            (Operation::Unprotect, Some(Writability::Watched)) => {
                self.format.with_writability(entry, Writability::Writable)
            }
            _ => return true,
        };
        if cell.compare_exchange(entry, new).is_err() {
            return false;
        }
        match visit.operation {
            Operation::Zap => {
                self.counters.leaves(visit.cpu, level, -1);
                visit.flush.note();
            }
            Operation::Protect => visit.flush.note(),
            Operation::Unprotect => {}
        }
        true
    }

    /// Freezes every entry of a table that was just unlinked, so that whoever still walks it puts nothing there, and
    /// hands it to the obligation. At most one table of each level below: it was emptied before, but a fault may have
    /// put something back.
    fn retire(&self, table: TableFrame, level: Level, visit: &mut Visit<'_, '_, F, M>) {
        let frozen = self.format.make_frozen(0);
        for index in 0..ENTRIES {
            let entry = self.cell(&table, index).swap(frozen);
            match (self.format.entry(entry, level), level.down()) {
                (Entry::Leaf, _) => self.counters.leaves(visit.cpu, level, -1),
                (Entry::Table(child), Some(below)) => self.retire(TableFrame::linked(child), below, visit),
                _ => {}
            }
        }
        visit.budget = visit.budget.saturating_sub(ENTRIES);
        self.counters.tables(visit.cpu, -1);
        visit.flush.adopt(table);
    }
}
