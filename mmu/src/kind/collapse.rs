//! Collapsing small pages of the direct kind into huge ones: what a dirty log, a partial zap or a moved block left behind.
use super::direct::DirectMmu;
use super::flush::Flush;
use super::sweep::Sweep;
use crate::access::AccessKind;
use crate::addr::Gfn;
use crate::format::{Entry, EntryFormat, Leaf, Writability};
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, Exclusive, Held};
use crate::mutant::{self, FlushSite, Mutant};
use crate::tables::{EntryCell, TableFrame, TableMemory};

/// Tables that one batch looks at before it returns.
const BATCH: usize = 16;

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Replaces tables of pages that are one contiguous block by one huge page, where a fault would map it so: the block
    /// lies in its slot, which is not logged, nothing in it is tracked, the backing has it in one piece, and it is not
    /// split for its fetches. Pages that are not mapped yet become so.
    ///
    /// Asks for the exclusive guard: whoever changes a page must not do so in a table that is being replaced. The batches
    /// are short.
    pub fn collapse<'a, B: Backing>(
        &'a self,
        guard: &Exclusive<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.admit(guard);
        let mut flush = self.obligation(Held::<B>::memory(guard));
        for _ in 0..BATCH {
            if sweep.is_done() {
                return flush;
            }
            let beyond = sweep.at_end() || sweep.next() >> (self.format.input_bits() - 12) != 0;
            let index = sweep.root();
            if beyond || self.swept_table(sweep).is_none() {
                sweep.next_root();
                continue;
            }
            let gfn = sweep.next();
            // Each table that ends here has been looked into from its start: now it can be judged as a whole.
            let mut end = gfn + 1;
            for level in [Level::L1, Level::L2] {
                let Some(parent) = self.parent_of(index, gfn, level) else { continue };
                let pages = level.pages() * ENTRIES as u64;
                let block_end = (gfn | (pages - 1)) + 1;
                if level == Level::L1 || end == block_end || end >= sweep.range().end() {
                    self.collapse_table(guard, index, gfn, parent, &mut flush);
                }
                if level == Level::L1 {
                    end = block_end;
                }
            }
            if end == gfn + 1 {
                // There was no table of the lowest level.
                let Some(root) = self.ops.roots.table(index) else { continue };
                let place = self.find(root, gfn);
                end = (gfn | (place.level.pages() - 1)) + 1;
                let pages = Level::L2.pages() * ENTRIES as u64;
                let last = (gfn | (pages - 1)) + 1 == end || end >= sweep.range().end();
                if let Some(parent) = self.parent_of(index, gfn, Level::L2).filter(|_| last) {
                    self.collapse_table(guard, index, gfn, parent, &mut flush);
                }
            }
            sweep.advance(end);
        }
        flush
    }

    /// The table that has the link to the table at `level` on the way to `gfn`, the link, and what it links to.
    fn parent_of(&self, index: usize, gfn: u64, level: Level) -> Option<Parent> {
        let mut table = self.ops.roots.table(index)?;
        let mut at = self.format.top();
        loop {
            let entry = self.cell(&table, at.index(gfn)).load();
            let child = TableFrame::linked(self.format.link(entry).filter(|_| at > Level::L1)?);
            let below = at.down()?;
            if below == level {
                return Some(Parent { table, entry, child, level: at });
            }
            (table, at) = (child, below);
        }
    }

    fn collapse_table<'a, B: Backing>(
        &'a self,
        guard: &Exclusive<'a, B>,
        index: usize,
        gfn: u64,
        parent: Parent,
        flush: &mut Flush<'a, F, M>,
    ) {
        let cpu = Held::<B>::cpu(guard);
        let Some(root) = self.roots().find(|root| self.live(guard.memory(), *root) == Some(index)) else {
            return;
        };
        let Some(size) = parent.level.page_size().filter(|&size| size <= self.largest()) else { return };
        if self.format.has_split_note(parent.entry) && !mutant::is(Mutant::CollapseSplit) {
            return;
        }
        let base = gfn & !(size.pages() - 1);
        let at = Gfn::new_truncate(gfn);
        let Ok(resolution) = self.resolve_on(guard, root, at.gpa(), AccessKind::Read) else { return };
        let stale = guard.memory().invalidations().is_stale(resolution.sequence(), at, size);
        if stale || resolution.size() < size {
            return;
        }
        let huge = resolution.leaf(size);
        if !huge.pfn.number().is_multiple_of(size.pages()) {
            return;
        }
        let Some(writability) = self.common_writability(&parent, &huge, gfn, base) else { return };
        let entry = self.format.make_leaf(&Leaf { writability, ..huge });
        let below = parent.child;
        if self.cell(&parent.table, parent.level.index(gfn)).compare_exchange(parent.entry, entry).is_err() {
            return;
        }
        self.counters.leaves(cpu, parent.level, 1);
        let Some(level) = parent.level.down() else { return };
        let frozen = self.format.make_frozen(0);
        for index in 0..ENTRIES {
            let old = self.cell(&below, index).swap(frozen);
            if self.format.entry(old, level) == Entry::Leaf {
                self.counters.leaves(cpu, level, -1);
            }
        }
        self.counters.tables(cpu, -1);
        // The table is owed, and with it a flush that also covers a W that went, where one of the pages is watched.
        flush.adopt(below, FlushSite::Collapse);
    }

    /// What the leaves of a table permit about writes, if all of them are parts of `huge`; `None` if one is not, or none
    /// is there. A page that is watched keeps the whole block watched: the next write lifts it.
    fn common_writability(&self, parent: &Parent, huge: &Leaf, gfn: u64, base: u64) -> Option<Writability> {
        let level = parent.level.down()?;
        let mut common = None;
        for index in 0..ENTRIES {
            let entry = self.cell(&parent.child, index).load();
            match self.format.entry(entry, level) {
                Entry::Empty | Entry::Mmio => continue,
                Entry::Leaf => {}
                Entry::Table(_) | Entry::Frozen => return None,
            }
            let leaf = self.format.leaf(entry, level)?;
            let first = base + index as u64 * level.pages();
            let expected = huge.pfn.number() + (first - (gfn & !(huge.size.pages() - 1)));
            let moved = leaf.pfn.number() != expected && !mutant::is(Mutant::CollapseOtherFrame);
            if moved || leaf.memory_type != huge.memory_type {
                return None;
            }
            let wanted = (huge.writability, leaf.writability);
            common = Some(match (wanted, common) {
                ((Writability::ReadOnly, Writability::ReadOnly), _) => Writability::ReadOnly,
                ((Writability::Writable, Writability::Writable), None | Some(Writability::Writable)) => {
                    Writability::Writable
                }
                ((Writability::Writable, Writability::Writable | Writability::Watched), _) => {
                    if mutant::is(Mutant::CollapseWatched) {
                        Writability::Writable
                    } else {
                        Writability::Watched
                    }
                }
                _ => return None,
            });
        }
        common
    }
}

/// Where a table hangs.
struct Parent {
    table: TableFrame,
    entry: u64,
    child: TableFrame,
    level: Level,
}
