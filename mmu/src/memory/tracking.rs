//! Write tracking: pages whose writes must be emulated, because a kind shadows what the guest keeps there. It is above the
//! kinds and their roots, so none can be forgotten.
use super::{Backing, Exclusive, Held, Shared, SlotError, SlotFlags, SlotHit, SlotNotes, VmMemory};
use crate::addr::{Gfn, GfnRange};
use crate::kind::Sweep;
use crate::level::PageSize;
use crate::sync::Ordering;

/// Sizes that a tracked page forbids.
const LARGE: [PageSize; 2] = [PageSize::Size2M, PageSize::Size1G];

impl<'m, B: Backing> Exclusive<'m, B> {
    /// One more wants every write to `gfn` emulated. Returns what to [`track`](crate::DirectMmu::track) in every kind,
    /// before the guard is given up; nothing, if the page was tracked already.
    pub fn track_writes(&mut self, gfn: Gfn) -> Result<Sweep, SlotError> {
        let memory = Held::<B>::memory(self);
        let (hit, notes) = memory.notes_at(gfn)?;
        let start = hit.slot_start();
        let page = (gfn.number() - start.number()) as usize;
        let count = notes.tracks.get(page).ok_or(SlotError::NotFound(gfn))?;
        let before = count.load(Ordering::Relaxed);
        count.store(before.saturating_add(1), Ordering::Relaxed);
        if before != 0 {
            return Ok(Sweep::over(GfnRange::EMPTY));
        }
        for size in LARGE {
            if let Some(count) = notes.tracked_in(start, gfn, size) {
                count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
        }
        memory.set_flags(start, hit.flags() | SlotFlags::TRACKED)?;
        Ok(Sweep::over(GfnRange::of(gfn)))
    }

    /// One fewer wants the writes to `gfn` emulated. Returns what may be [`untrack`](crate::DirectMmu::untrack)ed in every
    /// kind; what is not, the next write to the page does.
    pub fn untrack_writes(&mut self, gfn: Gfn) -> Result<Sweep, SlotError> {
        let memory = Held::<B>::memory(self);
        let (hit, notes) = memory.notes_at(gfn)?;
        let start = hit.slot_start();
        let page = (gfn.number() - start.number()) as usize;
        let count = notes.tracks.get(page).ok_or(SlotError::NotFound(gfn))?;
        let after = count.load(Ordering::Relaxed).checked_sub(1).ok_or(SlotError::NotFound(gfn))?;
        count.store(after, Ordering::Relaxed);
        if after != 0 {
            return Ok(Sweep::over(GfnRange::EMPTY));
        }
        for size in LARGE {
            if let Some(count) = notes.tracked_in(start, gfn, size) {
                count.store(count.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
            }
        }
        Ok(Sweep::over(GfnRange::of(gfn)))
    }
}

impl<B: Backing> Exclusive<'_, B> {
    /// [`track_writes`](Self::track_writes), carried out in the direct kind beside; whether a translation was taken away
    /// there, and a flush requested.
    pub(crate) fn track_beside(&mut self, gfn: Gfn) -> Result<bool, SlotError> {
        let sweep = self.track_writes(gfn)?;
        Ok(self.direct().is_some_and(|direct| direct.carry_out(self, sweep, true)))
    }

    /// [`untrack_writes`](Self::untrack_writes), carried out in the direct kind beside.
    pub(crate) fn untrack_beside(&mut self, gfn: Gfn) {
        if let (Ok(sweep), Some(direct)) = (self.untrack_writes(gfn), self.direct()) {
            direct.carry_out(self, sweep, false);
        }
    }
}

impl<B: Backing> Shared<'_, B> {
    /// Whether writes to `gfn` must be emulated.
    pub fn is_write_tracked(&self, gfn: Gfn) -> bool {
        self.memory().find_slot(gfn.gpa()).is_some_and(|hit| self.memory().is_tracked(&hit))
    }
}

impl<B: Backing> VmMemory<B> {
    fn notes_at(&self, gfn: Gfn) -> Result<(SlotHit<'_>, SlotNotes<'_>), SlotError> {
        let hit = self.find_slot(gfn.gpa()).ok_or(SlotError::NotFound(gfn))?;
        let notes = self.backing().notes(hit.ram().cookie);
        Ok((hit, notes))
    }

    /// Whether writes to the page must be emulated.
    #[inline]
    pub(crate) fn is_tracked(&self, hit: &SlotHit<'_>) -> bool {
        let flags = hit.flags();
        flags.contains(SlotFlags::TRACKED)
            && self.backing().notes(hit.ram().cookie).is_tracked(hit.slot_start(), hit.ram().gfn())
    }

    /// Whether the block of `size` around the page may be mapped as one: it lies in the slot, nothing in it is tracked,
    /// and the slot is not logged, for a log is by 4 KiB.
    #[inline]
    pub(crate) fn allows(&self, hit: &SlotHit<'_>, size: PageSize) -> bool {
        hit.block_fits(size.bytes())
            && (size == PageSize::Size4K
                || !hit.flags().intersects(SlotFlags::DIRTY_LOG | SlotFlags::TRACKED)
                || self.allows_despite_flags(hit, size))
    }

    #[cold]
    fn allows_despite_flags(&self, hit: &SlotHit<'_>, size: PageSize) -> bool {
        let at = hit.ram();
        let notes = self.backing().notes(at.cookie);
        let tracked = notes.tracked_in(hit.slot_start(), at.gfn(), size);
        !hit.flags().contains(SlotFlags::DIRTY_LOG)
            && tracked.is_none_or(|count| count.load(Ordering::Relaxed) == 0)
    }
}
