//! A VM's guest-physical memory: slots, invalidation, guest memory access, and the guards under which all of it, and
//! every page-table operation, happens. What concerns all kinds of a VM lives here, above them.
mod access;
mod backing;
mod guard;
mod invalidation;
mod shootdown;
mod slots;

use core::sync::atomic::{AtomicU64, Ordering};

pub use access::NotRam;
pub use backing::{Backing, NoPage, Resolved};
pub use guard::{Exclusive, Held, Shared};
pub use invalidation::{Invalidation, InvalidationSeq};
pub use shootdown::{Generation, Shootdown};
pub use slots::{RamAddr, Slot, SlotError, SlotFlags, MAX_SLOTS};

use crate::addr::Gpa;
use crate::cpu::CpuId;
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
    slots: Slots,
    invalidations: Invalidations,
    shootdown: Shootdown,
}

impl<B> VmMemory<B> {
    /// Memory without slots.
    pub fn new(backing: B) -> Self {
        Self {
            id: VmId::next(),
            backing,
            slots: Slots::new(),
            invalidations: Invalidations::new(),
            shootdown: Shootdown::new(),
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

    /// The slot that holds `gpa`. Stable under a guard.
    #[inline(always)]
    pub(crate) fn find_slot(&self, gpa: Gpa) -> Option<SlotHit<'_>> {
        self.slots.find(gpa)
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

/// Which VM a kind belongs to, so that a guard of another VM is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VmId(u64);

impl VmId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}
