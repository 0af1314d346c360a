//! The fast half of faults on a page that is mapped: permission that was taken away to be told of its next use comes back
//! by one compare-exchange, without a look at slots or backing.
use super::direct::DirectMmu;
use super::fault::FaultOutcome;
use super::roots::Root;
use crate::access::AccessKind;
use crate::addr::Gpa;
use crate::format::{Entry, EntryFormat, Writability};
use crate::level::Level;
use crate::memory::{Backing, Held, Pages};
use crate::mutant::{self, Mutant};
use crate::tables::{EntryCell, TableCache, TableMemory};

/// Times that an entry may change under a fast fault's hands.
const TRIES: usize = 4;

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Handles a fault, if that takes no more than giving a leaf back what was taken from it: W of a watched page, or what
    /// aging put aside. `None` says nothing about the access: [`fault_on`](Self::fault_on) does.
    ///
    /// Worth trying when the processor says that the page is present, or when pages are aged in a format without accessed
    /// bits.
    #[inline]
    pub fn fast_fault<'m, B: Backing + 'm>(
        &self,
        guard: &impl Held<'m, B>,
        cache: &mut TableCache,
        root: Root,
        gpa: Gpa,
        access: AccessKind,
    ) -> Option<FaultOutcome> {
        self.admit(guard);
        let memory = guard.memory();
        if !self.reaches(gpa) {
            return None;
        }
        let index = self.live(memory, root)?;
        let at = root.space().at(gpa.gfn());
        let logged = access == AccessKind::Write
            && !mutant::is(Mutant::FastForgetsLog)
            && memory.is_logging()
            && memory.logged_by(at).is_some();
        for _ in 0..TRIES {
            let place = self.find(self.ops.roots.table(index)?, gpa.gfn().number());
            if place.kind != Entry::Leaf {
                return None;
            }
            if self.format.permits(place.entry, access) {
                cache.stats.spurious += 1;
                cache.stats.fast += 1;
                return Some(FaultOutcome::Spurious);
            }
            let new = self.upgrade(place.entry, place.level, access, logged)?;
            let cell = self.cell(&place.table, place.level.index(gpa.gfn().number()));
            let early = mutant::is(Mutant::FastNoteBefore);
            if logged && early {
                memory.note_write(at.space, at.gfn);
            }
            if cell.compare_exchange(place.entry, new).is_ok() {
                if logged && !early {
                    memory.note_write(at.space, at.gfn);
                }
                cache.stats.mapped += 1;
                cache.stats.fast += 1;
                return Some(FaultOutcome::Mapped);
            }
        }
        None
    }

    /// The leaf `entry` with as much of what was taken from it as the access needs, if that is enough. A huge page of a
    /// logged slot stays protected: its small pages are logged one by one.
    #[inline]
    pub(super) fn upgrade(&self, entry: u64, level: Level, access: AccessKind, logged: bool) -> Option<u64> {
        let mut new = self.format.restore(entry);
        if access == AccessKind::Write {
            let huge = level != Level::L1 && !mutant::is(Mutant::HugeLoggedWritable);
            let found = self.format.writability(new);
            let tracked = found == Some(Writability::Tracked) && mutant::is(Mutant::FastLiftsTracked);
            if found != Some(Writability::Watched) && !tracked || logged && huge {
                return None;
            }
            new = self.format.with_writability(new, Writability::Writable);
        }
        self.format.permits(new, access).then_some(new)
    }
}
