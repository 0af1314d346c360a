//! Splitting huge pages of the direct kind into smaller ones, without taking a translation away.
use super::direct::DirectMmu;
use super::sweep::Sweep;
use crate::format::{Entry, EntryFormat};
use crate::level::{Level, PageSize, ENTRIES};
use crate::memory::Held;
use crate::mutant::{self, Mutant};
use crate::sync::Ordering;
use crate::tables::{EntryCell, TableCache, TableFrame, TableMemory};

/// How far a split got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a split may need more table pages"]
pub enum SplitProgress {
    /// The batch is finished; the sweep says whether that was the last.
    Batch,
    /// The cache is empty: fill it and call again.
    NeedTables,
}

/// Places that one batch looks at before it returns.
const BATCH: usize = 64;

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Splits the huge pages that the sweep meets until none is larger than `size`.
    ///
    /// Needs no flush: the small pages translate as the huge one did. (A CPU may hold both; both are right.)
    pub fn split<'m, B: 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        sweep: &mut Sweep,
        size: PageSize,
    ) -> SplitProgress {
        let cpu = self.admit(guard);
        for _ in 0..BATCH {
            if sweep.is_done() {
                return SplitProgress::Batch;
            }
            let root = self.swept_table(sweep);
            let beyond = sweep.at_end() || sweep.next() >> (self.format.input_bits() - 12) != 0;
            let Some(root) = root.filter(|_| !beyond) else {
                sweep.next_root();
                continue;
            };
            let gfn = sweep.next();
            let place = self.find(root, gfn);
            if place.kind != Entry::Leaf || place.level <= size.level() {
                // Nothing to split up to the end of what this entry covers.
                sweep.advance((gfn | (place.level.pages() - 1)) + 1);
                continue;
            }
            let (Some(&[page]), Some(below)) = (cache.peek(1), place.level.down()) else {
                return SplitProgress::NeedTables;
            };
            let table = TableFrame::linked(page);
            // The huge page was not executable for its size alone.
            let executable =
                below == Level::L1 && self.forbids_huge_execute() && !mutant::is(Mutant::SplitKeepsNx);
            for index in 0..ENTRIES {
                let mut small = self.format.make_small(place.entry, place.level, index).unwrap_or(0);
                if executable {
                    small = self.format.with_execute(small, true);
                }
                self.cell(&table, index).store(small);
            }
            M::Cell::fence(Ordering::Release);
            let cell = self.cell(&place.table, place.level.index(gfn));
            if cell.compare_exchange(place.entry, self.format.make_table(page, place.level)).is_ok() {
                cache.consume(1);
                self.counters.tables(cpu, 1);
                self.counters.leaves(cpu, place.level, -1);
                self.counters.leaves(cpu, below, ENTRIES as i64);
            } else {
                // Something changed: look at the place again, with the page as empty as before.
                for index in 0..if mutant::is(Mutant::SplitNotCleaned) { 0 } else { ENTRIES } {
                    self.cell(&table, index).store(0);
                }
            }
        }
        SplitProgress::Batch
    }
}
