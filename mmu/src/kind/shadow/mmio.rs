//! Notes in shadows that an address leads to device memory, so that the next access is told from its exit alone, without a
//! walk of the guest's tables.
//!
//! A note says what those tables permit as they are, and is brought up to date, or goes, when a leaf in its place would. Like
//! the direct kind's it is of one generation of the slots, and notes of an earlier epoch are never honoured.
use super::zap::ZapProgress;
use super::{number, split, Kept, ShadowMmu};
use crate::access::{Access, AccessKind, Agent, Prot};
use crate::addr::{Address, Gfn, Gpa};
use crate::format::{EntryFormat, Mmio, MmioGeneration};
use crate::kind::Root;
use crate::level::{Level, ENTRIES};
use crate::memory::{mmio_epoch, Backing, Exclusive, Held, VmMemory};
use crate::mutant::{self, Mutant};
use crate::role::{CpuRole, RoleFlags};
use crate::tables::TableMemory;

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// Notes are made from now on, until the slots have changed 2^19 times: then, or to begin, sweep away what there is with
    /// [`forget_mmio`](Self::forget_mmio) and call this again. Off at first.
    pub fn cache_mmio<'m, B: Backing + 'm>(&mut self, guard: &Exclusive<'m, B>) {
        self.begin(guard);
        self.ops.mmio_epoch = mmio_epoch(Held::<B>::memory(guard).slot_generation()) + 1;
    }

    /// No notes are made or honoured from now on.
    pub const fn stop_caching_mmio(&mut self) {
        self.ops.mmio_epoch = 0;
    }

    /// Whether notes are made and honoured.
    pub fn caches_mmio<B>(&self, memory: &VmMemory<B>) -> bool {
        self.ops.mmio_epoch == mmio_epoch(memory.slot_generation()) + 1
            || self.ops.mmio_epoch != 0 && mutant::is(Mutant::ShadowEpochIgnored)
    }

    /// Takes the notes away, in batches. No TLB has one, so nothing is flushed.
    pub fn forget_mmio<'m, B: Backing + 'm>(&mut self, guard: &Exclusive<'m, B>, progress: &mut ZapProgress) {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        for entry in self.batch(progress).flat_map(|page| (0..ENTRIES).map(move |index| number(page, index)))
        {
            if matches!(self.note(entry).kept, Kept::Device(_)) {
                self.drop_entry(memory, entry);
            }
        }
    }

    /// Where in device memory `access` leads at `address`, if a note says so that still holds, and says that the guest's own
    /// tables permit the access. For exits by which the processor says that an entry is malformed; without an answer, they are
    /// faults like others.
    ///
    /// `role` is the vCPU's. Where more than the tables decides (SMAP, protection keys, a clear CR0.WP), there is no answer.
    pub fn mmio_at<'m, B: Backing + 'm>(
        &self,
        guard: &Exclusive<'m, B>,
        root: Root,
        role: &CpuRole,
        address: impl Address,
        access: Access,
    ) -> Option<Gpa> {
        let memory = Held::<B>::memory(guard);
        let mut page = self.root_page(guard, root)?;
        if !self.caches_mmio(memory) || access.kind == AccessKind::Execute {
            return None;
        }
        let entry = loop {
            let index = self.role(page)?.level.index(address.bits() >> 12);
            match self.note(number(page, index)).kept {
                Kept::Link(child) => page = child,
                Kept::Device(_) => break number(page, index),
                Kept::Nothing | Kept::Leaf(_) => return None,
            }
        };
        let generation = MmioGeneration::new_truncate(memory.slot_generation());
        let note = self
            .format
            .mmio(self.value(entry))
            .filter(|note| note.generation == generation || mutant::is(Mutant::ShadowOldNote))?;
        let keys = if note.user { RoleFlags::PKE } else { RoleFlags::PKS };
        let by_user = access.agent == Agent::User;
        let has_users = !role.is_ept() && role.top().is_some();
        let permitted =
            (access.kind == AccessKind::Read || note.write || mutant::is(Mutant::ShadowNoteForWrites))
                && (!has_users || note.user == by_user && !role.flags().contains(keys));
        let inside = address.bits() & 0xfff;
        permitted.then(|| Gpa::new_truncate(note.gfn.gpa().bits() | inside))
    }

    /// Notes at the entry of a lowest page that there is no RAM at `gfn`, where the guest's tables permit `prot`. What was
    /// there goes first, with its record: a note never takes the place of a leaf that is still in the reverse map.
    pub(super) fn note_mmio<B: Backing>(&mut self, memory: &VmMemory<B>, entry: u32, gfn: Gfn, prot: Prot) {
        if !mutant::is(Mutant::ShadowNoteOverLeaf) {
            self.drop_entry(memory, entry);
        }
        if let Some(value) = self.mmio_value(memory, entry, gfn, prot) {
            self.remember_device(entry, gfn);
            self.write(entry, value);
        }
    }

    /// The note for `gfn`; `None` if the format cannot say what is permitted, or nothing is noted.
    fn mmio_value<B: Backing>(&self, memory: &VmMemory<B>, entry: u32, gfn: Gfn, prot: Prot) -> Option<u64> {
        let role = self.role(split(entry).0).filter(|role| role.level == Level::L1)?;
        let generation = MmioGeneration::new_truncate(memory.slot_generation());
        let ept = role.base.guest().is_some_and(|guest| guest.is_ept());
        let (write, user) = (prot.contains(Prot::WRITE), ept || prot.contains(Prot::USER));
        let value = self.format.make_mmio(&Mmio { gfn, write, user, generation })?;
        let kept = self.format.mmio(value)?;
        let readable = prot.contains(Prot::READ) && self.caches_mmio(memory);
        (readable && (kept.write, kept.user) == (write, user)).then_some(value)
    }
}
