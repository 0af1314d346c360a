//! Lock modes as types: what may run beside what is in each function's signature.
use core::marker::PhantomData;

use super::{
    shootdown::Seat, Backing, Invalidation, InvalidationSeq, RamAddr, Slot, SlotError, SlotFlags, Space,
    SpaceGfn, SpaceView, VmMemory,
};
use crate::addr::{GfnRange, Gpa};
use crate::cpu::CpuId;
use crate::kind::{Beside, Sweep};
use crate::sync::Ordering;

/// Proof that either guard of a VM is held. Direct operations ask for this much: they are safe beside one another.
pub trait Held<'m, B>: sealed::Sealed {
    /// The memory the guard is of.
    fn memory(&self) -> &'m VmMemory<B>;
    /// The CPU that holds the guard.
    fn cpu(&self) -> CpuId;
}

mod sealed {
    pub trait Sealed {}
}

/// The shared guard: any number of CPUs walk, fault and sweep. While it lives, no slot changes, no invalidation begins,
/// and no table page that its CPU could have seen is given back.
///
/// What takes an address and no space means the normal one; [`in_space`](Self::in_space) says another.
#[derive(Debug)]
pub struct Shared<'m, B> {
    memory: &'m VmMemory<B>,
    cpu: CpuId,
    seat: &'m Seat,
    /// A guard stays on its CPU.
    _not_send: PhantomData<*const ()>,
}

impl<'m, B> Shared<'m, B> {
    #[inline]
    pub(super) fn take(memory: &'m VmMemory<B>, cpu: CpuId) -> Self {
        let seat = memory.shootdown.begin_walk(cpu);
        Self { memory, cpu, seat, _not_send: PhantomData }
    }

    /// Guest memory as `space` sees it.
    #[inline(always)]
    pub const fn in_space(&self, space: Space) -> SpaceView<'_, B> {
        SpaceView::of(self.memory, space)
    }

    /// The place in RAM that `gpa` names.
    #[inline(always)]
    pub fn ram(&self, gpa: Gpa) -> Option<RamAddr> {
        self.in_space(Space::Normal).ram(gpa)
    }

    /// The moment that slots and backing are in, if nothing is being invalidated: while it stays the same, what the
    /// backing said of a page still holds.
    #[inline]
    pub fn settled(&self) -> Option<InvalidationSeq> {
        self.memory.invalidations.settled()
    }

    /// What the kernel put behind the slots.
    #[inline]
    pub fn backing(&self) -> &'m B {
        self.memory.backing()
    }

    /// All slots: those that the normal space sees, lowest first, then the others.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.memory.slots.iter()
    }
}

impl<B> Drop for Shared<'_, B> {
    #[inline]
    fn drop(&mut self) {
        self.seat.end_walk();
    }
}

impl<B> sealed::Sealed for Shared<'_, B> {}
impl<'m, B> Held<'m, B> for Shared<'m, B> {
    #[inline]
    fn memory(&self) -> &'m VmMemory<B> {
        self.memory
    }
    #[inline]
    fn cpu(&self) -> CpuId {
        self.cpu
    }
}

/// The exclusive guard: nobody else walks, faults or sweeps. Guests keep running.
#[derive(Debug)]
pub struct Exclusive<'m, B> {
    memory: &'m VmMemory<B>,
    cpu: CpuId,
    /// The direct kind of the VM, if the holder has said which it is.
    beside: Option<&'m dyn Beside<B>>,
    _not_send: PhantomData<*const ()>,
}

impl<'m, B> Exclusive<'m, B> {
    pub(super) fn take(memory: &'m VmMemory<B>, cpu: CpuId) -> Self {
        memory.shootdown.lock();
        Self { memory, cpu, beside: None, _not_send: PhantomData }
    }

    /// Names the direct kind of the VM. In a VM that has one, the shadow kind works under no other guard: what it has
    /// tracked is protected there at once, so that no write to a shadowed table can be missed.
    pub fn beside(self, direct: &'m impl Beside<B>) -> Self {
        let mut guard = self;
        guard.beside = Some(direct);
        guard
    }

    /// The direct kind that is named.
    pub(crate) const fn direct(&self) -> Option<&'m dyn Beside<B>> {
        self.beside
    }

    /// Whether every kind follows what is tracked under this guard.
    pub(crate) fn is_complete(&self) -> bool {
        self.memory.direct_kinds() == u64::from(self.beside.is_some())
    }

    /// Adds a slot. Nothing is mapped there yet, so nothing has to be zapped. Its flags are what the caller may choose:
    /// logging has its own functions, and so has tracking, except that pages which are tracked in another space are so in
    /// the new slot, too.
    pub fn insert_slot(&mut self, slot: &Slot) -> Result<(), SlotError>
    where
        B: Backing,
    {
        self.memory.slots.check(slot)?;
        let mut flags = slot.flags.intersection(SlotFlags::CHOICE);
        if self.memory.inherit_tracks(slot)? {
            flags |= SlotFlags::TRACKED;
        }
        self.memory.slots.insert(&Slot { flags, ..*slot })?;
        self.memory.advance_slots();
        Ok(())
    }

    /// Removes the slot that starts at `start`, and says what to zap in every kind before this guard is given up.
    pub fn remove_slot(&mut self, start: impl Into<SpaceGfn>) -> Result<Sweep, SlotError> {
        let slot = self.memory.slots.remove(start.into())?;
        self.memory.count_logged(slot.flags, SlotFlags::empty());
        self.memory.advance_slots();
        Ok(Sweep::over_slot(&slot))
    }

    /// Changes the flags of the slot that starts at `start`, and says what to zap in every kind before this guard is
    /// given up. Logging and tracking go on.
    pub fn set_slot_flags(
        &mut self,
        start: impl Into<SpaceGfn>,
        flags: SlotFlags,
    ) -> Result<Sweep, SlotError> {
        let start = start.into();
        let slot = self.memory.slots.get(start)?;
        let flags = slot.flags.difference(SlotFlags::CHOICE) | flags.intersection(SlotFlags::CHOICE);
        self.memory.set_flags(start, flags)?;
        self.memory.advance_slots();
        Ok(Sweep::over_slot(&slot))
    }

    /// Makes every root of every kind obsolete: no vCPU enters on one, no fault maps into one. See
    /// [`invalidate_all`](crate::DirectMmu::invalidate_all).
    pub(crate) fn retire_roots(&mut self) {
        let generation = self.memory.root_generation() + 1;
        self.memory.root_generation.store(generation, Ordering::Relaxed);
        self.make_stale();
    }

    /// What was resolved so far is not mapped any more.
    pub(crate) fn make_stale(&mut self) {
        self.memory.invalidations.advance();
    }

    /// Announces that the backing of `range` is about to change. Until the returned value is dropped, no fault maps a
    /// page of the range; zap it in every kind, and flush, before changing the backing.
    pub fn begin_invalidation(&mut self, range: GfnRange) -> Invalidation<'m> {
        self.memory.invalidations.begin(range)
    }

    /// The sequence number of the backing as it is now.
    pub fn invalidation_seq(&self) -> InvalidationSeq {
        self.memory.invalidations.sequence()
    }
}

impl<B> Drop for Exclusive<'_, B> {
    fn drop(&mut self) {
        self.memory.shootdown.unlock();
    }
}

impl<B> sealed::Sealed for Exclusive<'_, B> {}
impl<'m, B> Held<'m, B> for Exclusive<'m, B> {
    fn memory(&self) -> &'m VmMemory<B> {
        self.memory
    }
    fn cpu(&self) -> CpuId {
        self.cpu
    }
}
