//! Write tracking: pages whose writes must be emulated, because a kind shadows what the guest keeps there. It is above the
//! kinds, their roots and the address spaces, so none can be forgotten.
//!
//! What is tracked is a frame number, whatever space sees the page: where two slots hold it, one for each space, it is tracked
//! in both, and the counts of both are the same. A slot that comes later takes them over.
use super::{Backing, Exclusive, Held, Shared, Slot, SlotError, SlotFlags, SlotHit, VmMemory};
use crate::addr::{Gfn, GfnRange};
use crate::kind::Sweep;
use crate::level::PageSize;
use crate::mutant::{self, Mutant};
use crate::sync::{AtomicU32, Ordering};

/// Sizes that a tracked page forbids.
const LARGE: [PageSize; 2] = [PageSize::Size2M, PageSize::Size1G];

impl<'m, B: Backing> Exclusive<'m, B> {
    /// One more wants every write to `gfn` emulated, in every space. Returns what to `track` in
    /// every kind, before the guard is given up; nothing, if the page was tracked already. An error changes nothing.
    pub fn track_writes(&mut self, gfn: Gfn) -> Result<Sweep, SlotError> {
        let memory = Held::<B>::memory(self);
        let slots = memory.slots.find_all(gfn.gpa());
        slots.clone().try_for_each(|hit| memory.count_of(&hit).map(drop))?;
        let mut before = None;
        for hit in slots.take(if mutant::is(Mutant::TrackOneSpace) { 1 } else { usize::MAX }) {
            let count = memory.count_of(&hit)?;
            let tracked = count.load(Ordering::Relaxed);
            before = before.max(Some(tracked));
            count.store(tracked.saturating_add(1), Ordering::Relaxed);
            if tracked == 0 {
                memory.count_in_blocks(&hit, |pages| pages + 1);
                memory.set_flags_of(&hit, hit.flags() | SlotFlags::TRACKED);
            }
        }
        match before {
            None => Err(SlotError::NotFound(gfn)),
            Some(0) => Ok(Sweep::over(GfnRange::of(gfn))),
            Some(_) => Ok(Sweep::over(GfnRange::EMPTY)),
        }
    }

    /// One fewer wants the writes to `gfn` emulated. Returns what may be `untrack`ed in every
    /// kind; what is not, the next write to the page does.
    pub fn untrack_writes(&mut self, gfn: Gfn) -> Result<Sweep, SlotError> {
        let memory = Held::<B>::memory(self);
        let mut left = None;
        for hit in memory.slots.find_all(gfn.gpa()) {
            let count = memory.count_of(&hit)?;
            let Some(after) = count.load(Ordering::Relaxed).checked_sub(1) else { continue };
            let after = if mutant::is(Mutant::UntrackedByOne) { 0 } else { after };
            left = left.max(Some(after));
            count.store(after, Ordering::Relaxed);
            if after == 0 {
                memory.count_in_blocks(&hit, |pages| pages.saturating_sub(1));
            }
        }
        match left {
            None => Err(SlotError::NotFound(gfn)),
            Some(0) => Ok(Sweep::over(GfnRange::of(gfn))),
            Some(_) => Ok(Sweep::over(GfnRange::EMPTY)),
        }
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
    /// Whether writes to `gfn` must be emulated, in whatever space.
    pub fn is_write_tracked(&self, gfn: Gfn) -> bool {
        self.memory().is_tracked_anywhere(gfn)
    }
}

impl<B: Backing> VmMemory<B> {
    /// How many track the page.
    fn count_of(&self, hit: &SlotHit<'_>) -> Result<&AtomicU32, SlotError> {
        let at = hit.ram();
        let missing = || hit.slot().map_or(SlotError::NotFound(at.gfn()), SlotError::NoNotes);
        self.backing().notes(at.cookie).tracks.get(at.slot_page() as usize).ok_or_else(missing)
    }

    /// The page is tracked from now on, or no more: changes the counts of the blocks around it.
    fn count_in_blocks(&self, hit: &SlotHit<'_>, change: impl Fn(u32) -> u32) {
        let at = hit.ram();
        let notes = self.backing().notes(at.cookie);
        for size in LARGE {
            if let Some(count) = notes.tracked_in(hit.slot_start(), at.gfn(), size) {
                count.store(change(count.load(Ordering::Relaxed)), Ordering::Relaxed);
            }
        }
    }

    /// Notes what is tracked of the frames of `slot`, which is about to be added, in slots of another space; whether there
    /// is anything. The time it takes depends on how many blocks of those slots there are, and on the tracked pages.
    pub(super) fn inherit_tracks(&self, slot: &Slot) -> Result<bool, SlotError> {
        let mut any = false;
        let others = self
            .slots
            .iter()
            .filter(|other| other.flags.contains(SlotFlags::TRACKED) && other.range.overlaps(slot.range));
        for other in others {
            let (from, into) = (self.backing().notes(other.cookie), self.backing().notes(slot.cookie));
            let end = other.range.end().min(slot.range.end());
            let mut next = other.range.start().max(slot.range.start());
            let (from_start, start) =
                (Gfn::new_truncate(other.range.start()), Gfn::new_truncate(slot.range.start()));
            while next < end {
                let gfn = Gfn::new_truncate(next);
                let free = LARGE.into_iter().rev().find(|&size| {
                    let tracked = from.tracked_in(from_start, gfn, size);
                    tracked.is_some_and(|count| count.load(Ordering::Relaxed) == 0)
                });
                if let Some(size) = free {
                    next = (next | (size.pages() - 1)) + 1;
                    continue;
                }
                let page = |first: Gfn| (next - first.number()) as usize;
                let count =
                    from.tracks.get(page(from_start)).map_or(0, |count| count.load(Ordering::Relaxed));
                if count != 0 {
                    // All of them fit, or the first does not.
                    let fits = into.tracks.len() as u64 >= slot.range.pages();
                    let place =
                        into.tracks.get(page(start)).filter(|_| fits).ok_or(SlotError::NoNotes(*slot))?;
                    place.store(count, Ordering::Relaxed);
                    for size in LARGE {
                        if let Some(count) = into.tracked_in(start, gfn, size) {
                            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                        }
                    }
                    any = true;
                }
                next += 1;
            }
        }
        Ok(any)
    }

    /// Whether writes to the page must be emulated.
    #[inline(always)]
    pub(crate) fn is_tracked(&self, hit: &SlotHit<'_>) -> bool {
        let flags = hit.flags();
        flags.contains(SlotFlags::TRACKED)
            && self.backing().notes(hit.ram().cookie).is_tracked(hit.slot_start(), hit.ram().gfn())
    }

    /// Whether writes to `gfn` must be emulated in some space.
    pub(crate) fn is_tracked_anywhere(&self, gfn: Gfn) -> bool {
        self.slots.find_all(gfn.gpa()).any(|hit| self.is_tracked(&hit))
    }

    /// Whether writes to `gfn` must be emulated in every space that has it.
    pub(crate) fn is_tracked_everywhere(&self, gfn: Gfn) -> bool {
        self.slots.find_all(gfn.gpa()).all(|hit| self.is_tracked(&hit))
    }

    /// Whether the block of `size` around the page may be mapped as one: it lies in the slot, nothing in it is tracked,
    /// and the slot is not logged, for a log is by 4 KiB.
    #[inline]
    pub(crate) fn allows(&self, hit: &SlotHit<'_>, size: PageSize) -> bool {
        (hit.block_fits(size.bytes()) || mutant::is(Mutant::CollapseBeyondSlot))
            && (size == PageSize::Size4K
                || !hit.flags().intersects(SlotFlags::DIRTY_LOG | SlotFlags::TRACKED)
                || self.allows_despite_flags(hit, size))
    }

    #[cold]
    fn allows_despite_flags(&self, hit: &SlotHit<'_>, size: PageSize) -> bool {
        let at = hit.ram();
        let notes = self.backing().notes(at.cookie);
        let tracked = notes.tracked_in(hit.slot_start(), at.gfn(), size);
        (!hit.flags().contains(SlotFlags::DIRTY_LOG) || mutant::is(Mutant::HugeLogged))
            && (tracked.is_none_or(|count| count.load(Ordering::Relaxed) == 0)
                || mutant::is(Mutant::HugeTracked))
    }
}
