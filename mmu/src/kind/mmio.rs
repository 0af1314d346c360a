//! Notes in the tables that a guest frame is no RAM, so that the next access there is told from its exit alone.
//!
//! A note is of one generation of the slots. Generations wrap at 2^19; an *epoch* is the time between two wraps. Notes are
//! made and honoured only in the epoch that the kind was switched on in, so one of an earlier epoch is never taken for
//! current.
use super::direct::DirectMmu;
use super::flush::Flush;
use super::roots::Root;
use super::sweep::{Operation, Sweep};
use crate::addr::Gpa;
use crate::format::{Entry, EntryFormat, Mmio, MmioGeneration};
use crate::memory::{mmio_epoch, Backing, Held, VmMemory};
use crate::mutant::{self, Mutant};
use crate::sync::Ordering;
use crate::tables::{EntryCell, TableMemory};

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Notes are made from now on, until the slots have changed 2^19 times: then, or to begin, sweep away what there is
    /// with [`forget_mmio`](Self::forget_mmio) and call this again. Off at first.
    pub fn cache_mmio<'m, B: 'm>(&self, guard: &impl Held<'m, B>) {
        self.admit(guard);
        let epoch = mmio_epoch(guard.memory().slot_generation());
        self.ops.mmio_epoch.store(epoch + 1, Ordering::Relaxed);
    }

    /// No notes are made or honoured from now on.
    pub fn stop_caching_mmio(&self) {
        self.ops.mmio_epoch.store(0, Ordering::Relaxed);
    }

    /// Whether notes are made and honoured.
    pub fn caches_mmio<B>(&self, memory: &VmMemory<B>) -> bool {
        let epoch = self.ops.mmio_epoch.load(Ordering::Relaxed);
        epoch == mmio_epoch(memory.slot_generation()) + 1 || epoch != 0 && mutant::is(Mutant::EpochIgnored)
    }

    /// Takes all notes away, in batches. No TLB has one, so the obligation is empty.
    pub fn forget_mmio<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::ForgetMmio)
    }

    /// What was noted about `gpa` on `root`, if it still holds: there is no RAM, emulate the access. For exits by which
    /// the processor says that an entry is malformed; without an answer, they are faults like others.
    #[inline]
    pub fn cached_mmio<'m, B: 'm>(&self, guard: &impl Held<'m, B>, root: Root, gpa: Gpa) -> Option<Mmio> {
        self.admit(guard);
        let memory = guard.memory();
        if !self.reaches(gpa) || !self.caches_mmio(memory) {
            return None;
        }
        let root = self.live_table(memory, root)?;
        let (_, _, entry) = self.descend(root, gpa.gfn().number());
        let generation = MmioGeneration::new_truncate(memory.slot_generation());
        self.format.mmio(entry).filter(|mmio| {
            mmio.gfn == gpa.gfn() && (mmio.generation == generation || mutant::is(Mutant::OldNoteHonoured))
        })
    }

    /// Notes that there is no RAM at `gpa`, where the descent ends: notes cost no tables. Never in the root, which a CPU
    /// may have read beforehand, and never over anything that is present.
    #[inline]
    pub(super) fn note_mmio<'m, B: 'm>(&self, guard: &impl Held<'m, B>, root: Root, gpa: Gpa) {
        if self.caches_mmio(guard.memory()) && self.reaches(gpa) {
            self.make_note(guard.memory(), root, gpa);
        }
    }

    #[cold]
    fn make_note<B>(&self, memory: &VmMemory<B>, root: Root, gpa: Gpa) {
        let gfn = gpa.gfn();
        let generation = MmioGeneration::new_truncate(memory.slot_generation());
        let Some(entry) = self.format.make_mmio(&Mmio { gfn, write: true, user: true, generation }) else {
            return;
        };
        let Some(root) = self.live_table(memory, root) else { return };
        let place = self.find(root, gfn.number());
        let over = place.kind == Entry::Leaf && mutant::is(Mutant::NoteOverPage);
        if (over || matches!(place.kind, Entry::Empty | Entry::Mmio)) && place.level != self.format.top() {
            // If it is lost, somebody knew better.
            let _ =
                self.cell(&place.table, place.level.index(gfn.number())).compare_exchange(place.entry, entry);
        }
    }
}
