//! A VM's guest-physical memory: slots, invalidation, guest memory access, and the guards under which all of it, and
//! every page-table operation, happens. What concerns all kinds of a VM lives here, above them.
mod access;
mod backing;
mod dirty;
mod guard;
mod invalidation;
mod notes;
mod shootdown;
mod slots;
mod space;
mod tracking;
mod view;

pub use access::NotRam;
pub use backing::{Backing, NoPage, Resolved};
pub(crate) use dirty::Pages;
pub use dirty::{DirtyLog, LogBy};
pub use guard::{Exclusive, Held, Shared};
pub use invalidation::{Invalidation, InvalidationSeq};
pub use notes::SlotNotes;
pub use shootdown::{Generation, Shootdown};
pub(crate) use shootdown::{Quiescent, Seat};
pub use slots::{RamAddr, Slot, SlotError, SlotFlags, MAX_SLOTS};
pub use space::{Space, SpaceGfn, Spaces};
pub use view::SpaceView;

use crate::addr::Gpa;
use crate::cpu::{CpuId, MAX_CPUS};
use crate::format::MmioGeneration;
use crate::mutant::{self, Mutant};
use crate::sync::{AtomicU64, Ordering};
use invalidation::Invalidations;
pub(crate) use slots::SlotHit;
use slots::Slots;

/// Guest-physical memory of one VM.
///
/// Nothing can be done with it but taking a guard: [`shared`](Self::shared) for faults, walks, range operations and
/// access to guest memory, on any number of CPUs at once; [`exclusive`](Self::exclusive) to change the slots or to begin
/// an invalidation. A guard is held with interrupts off, briefly, and never while entering the guest.
#[derive(Debug)]
pub struct VmMemory<B> {
    id: VmId,
    backing: B,
    pub(crate) slots: Slots,
    invalidations: Invalidations,
    shootdown: Shootdown,
    /// Slots that are logged.
    logged: AtomicU64,
    /// Changes of the slots.
    slot_generation: AtomicU64,
    /// Times that all roots were made obsolete.
    root_generation: AtomicU64,
    /// Direct kinds of the VM, which have to follow what is tracked.
    direct_kinds: AtomicU64,
}

impl<B> VmMemory<B> {
    /// Memory without slots.
    pub fn new(backing: B) -> Self {
        Self::on_cpus(backing, MAX_CPUS)
    }

    /// The same for a VM that runs on CPUs with numbers below `cpus` alone: taking the exclusive guard and waiting for
    /// flushes take time by their number.
    pub fn on_cpus(backing: B, cpus: usize) -> Self {
        Self {
            id: VmId::next(),
            backing,
            slots: Slots::new(),
            invalidations: Invalidations::new(),
            shootdown: Shootdown::new(cpus),
            logged: AtomicU64::new(0),
            slot_generation: AtomicU64::new(0),
            root_generation: AtomicU64::new(0),
            direct_kinds: AtomicU64::new(0),
        }
    }

    /// What the kernel put behind the slots.
    pub const fn backing(&self) -> &B {
        &self.backing
    }

    /// Flush generations of this VM.
    pub const fn shootdown(&self) -> &Shootdown {
        &self.shootdown
    }

    /// Takes the shared guard on `cpu`, the CPU that runs this. Waits while another CPU holds the exclusive one, or is
    /// waiting for it; so a CPU that holds a guard passes that on instead of taking a second one, which might wait for
    /// itself.
    #[inline]
    pub fn shared(&self, cpu: CpuId) -> Shared<'_, B> {
        Shared::take(self, cpu)
    }

    /// Takes the exclusive guard on `cpu`, the CPU that runs this, which must hold no other guard of this VM: it waits
    /// until all are gone.
    pub fn exclusive(&self, cpu: CpuId) -> Exclusive<'_, B> {
        Exclusive::take(self, cpu)
    }

    /// The slot that holds `gpa` in `space`. Stable under a guard.
    #[inline(always)]
    pub(crate) fn find_slot(&self, space: Space, gpa: Gpa) -> Option<SlotHit<'_>> {
        self.slots.find(space, gpa)
    }

    /// Whether any slot is logged.
    #[inline]
    pub(crate) fn is_logging(&self) -> bool {
        self.logged.load(Ordering::Relaxed) != 0
    }

    /// Changes the flags of the slot that starts at `start`. What was resolved before is stale. The caller has the VM for
    /// itself.
    fn set_flags(&self, start: SpaceGfn, flags: SlotFlags) -> Result<Slot, SlotError> {
        let slot = self.slots.set_flags(start, flags)?;
        self.count_logged(slot.flags, flags);
        self.invalidations.advance();
        Ok(slot)
    }

    /// The same of the slot that was found.
    fn set_flags_of(&self, hit: &SlotHit<'_>, flags: SlotFlags) {
        self.count_logged(hit.flags(), flags);
        hit.set_flags(flags);
        self.invalidations.advance();
    }

    /// A slot's flags change. The caller has the VM for itself.
    fn count_logged(&self, before: SlotFlags, after: SlotFlags) {
        let logged = |flags: SlotFlags| u64::from(flags.contains(SlotFlags::DIRTY_LOG));
        let count = self.logged.load(Ordering::Relaxed) + logged(after) - logged(before);
        self.logged.store(count, Ordering::Relaxed);
    }

    /// How often the slots have changed: what was noted about device memory before the last time does not count.
    #[inline]
    pub(crate) fn slot_generation(&self) -> u64 {
        self.slot_generation.load(Ordering::Relaxed)
    }

    /// The slots have changed. The caller has the VM for itself.
    fn advance_slots(&self) {
        self.slot_generation.store(self.slot_generation() + 1, Ordering::Relaxed);
        if !mutant::is(Mutant::SlotChangeKeepsResolved) {
            self.invalidations.advance();
        }
    }

    /// The generation of roots that may be run on. Stable under a guard.
    #[inline]
    pub(crate) fn root_generation(&self) -> u64 {
        self.root_generation.load(Ordering::Relaxed)
    }

    /// A direct kind is made for the VM.
    pub(crate) fn count_direct_kind(&self) {
        self.direct_kinds.fetch_add(1, Ordering::Relaxed);
    }

    /// Direct kinds that the VM has.
    pub(crate) fn direct_kinds(&self) -> u64 {
        self.direct_kinds.load(Ordering::Relaxed)
    }

    #[inline]
    pub(crate) const fn invalidations(&self) -> &Invalidations {
        &self.invalidations
    }

    #[inline]
    pub(crate) const fn id(&self) -> VmId {
        self.id
    }
}

/// An epoch of slot generations: in one, no two generations of an MMIO entry are the same.
#[inline]
pub(crate) const fn mmio_epoch(slot_generation: u64) -> u64 {
    slot_generation >> MmioGeneration::BITS
}

/// Which VM a kind belongs to, so that a guard of another VM is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VmId(u64);

impl VmId {
    fn next() -> Self {
        static NEXT: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}
