//! Slots: which guest-physical ranges are RAM.
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bitflags::bitflags;

use crate::addr::{Gfn, GfnRange};

/// Slots one VM can have.
pub const MAX_SLOTS: usize = 32;

bitflags! {
    /// Properties of a slot.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct SlotFlags: u64 {
        /// Reads and fetches only; a write is not RAM but an access to emulate.
        const READ_ONLY = 1 << 0;
    }
}

/// A run of guest-physical pages that is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The guest frames.
    pub range: GfnRange,
    /// What may be done with them.
    pub flags: SlotFlags,
    /// For the backing alone: says which of its memory this is, for instance a host address or an index.
    pub cookie: u64,
}

/// A slot that cannot be added, or is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotError {
    /// The range has no page.
    Empty,
    /// The range shares frames with this slot.
    Overlap(Slot),
    /// [`MAX_SLOTS`] slots exist.
    Full,
    /// No slot starts at this frame.
    NotFound(Gfn),
}

/// Cells rather than fields, so that walks read them while holding no more than a shared guard. They change only under
/// the exclusive guard, so relaxed accesses are enough: taking either guard orders them.
#[derive(Debug, Default)]
struct SlotCells {
    start: AtomicU64,
    pages: AtomicU64,
    flags: AtomicU64,
    cookie: AtomicU64,
}

impl SlotCells {
    const fn new() -> Self {
        Self {
            start: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            flags: AtomicU64::new(0),
            cookie: AtomicU64::new(0),
        }
    }

    fn get(&self) -> Slot {
        let start = Gfn::new_truncate(self.start.load(Ordering::Relaxed));
        let range = GfnRange::new(start, self.pages.load(Ordering::Relaxed));
        Slot {
            range: range.unwrap_or(GfnRange::ALL),
            flags: SlotFlags::from_bits_truncate(self.flags.load(Ordering::Relaxed)),
            cookie: self.cookie.load(Ordering::Relaxed),
        }
    }

    fn set(&self, slot: &Slot) {
        self.start.store(slot.range.start(), Ordering::Relaxed);
        self.pages.store(slot.range.pages(), Ordering::Relaxed);
        self.flags.store(slot.flags.bits(), Ordering::Relaxed);
        self.cookie.store(slot.cookie, Ordering::Relaxed);
    }
}

/// A guest frame that was found in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotPage {
    /// The frame.
    pub gfn: Gfn,
    /// Frames from the slot's first one to `gfn`.
    pub page: u64,
    /// Frames in the slot.
    pub pages: u64,
    /// The slot's flags.
    pub flags: SlotFlags,
    /// The slot's cookie.
    pub cookie: u64,
}

impl SlotPage {
    /// Whether the naturally aligned block of `pages` (a power of two) guest frames around this one lies in the slot.
    #[inline]
    pub(crate) fn block_fits(&self, pages: u64) -> bool {
        let before = self.gfn.number() & (pages - 1);
        before <= self.page && pages - before <= self.pages - self.page
    }
}

/// The slots of a VM: sorted, without overlap.
#[derive(Debug)]
pub(crate) struct Slots {
    count: AtomicUsize,
    cells: [SlotCells; MAX_SLOTS],
}

impl Slots {
    pub(crate) const fn new() -> Self {
        Self { count: AtomicUsize::new(0), cells: [const { SlotCells::new() }; MAX_SLOTS] }
    }

    #[inline]
    fn live(&self) -> &[SlotCells] {
        self.cells.get(..self.count.load(Ordering::Relaxed)).unwrap_or(&self.cells)
    }

    /// The slot that holds `gfn`. Almost always one of the first two: a linear search of a sorted array.
    #[inline]
    pub(crate) fn find(&self, gfn: Gfn) -> Option<SlotPage> {
        for cells in self.live() {
            let page = gfn.number().wrapping_sub(cells.start.load(Ordering::Relaxed));
            let pages = cells.pages.load(Ordering::Relaxed);
            if page < pages {
                let flags = SlotFlags::from_bits_retain(cells.flags.load(Ordering::Relaxed));
                let cookie = cells.cookie.load(Ordering::Relaxed);
                return Some(SlotPage { gfn, page, pages, flags, cookie });
            }
        }
        None
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        self.live().iter().map(SlotCells::get)
    }

    /// Adds a slot. The caller has the VM for itself.
    pub(crate) fn insert(&self, slot: &Slot) -> Result<(), SlotError> {
        if slot.range.is_empty() {
            return Err(SlotError::Empty);
        }
        if let Some(other) = self.iter().find(|other| other.range.overlaps(slot.range)) {
            return Err(SlotError::Overlap(other));
        }
        let count = self.count.load(Ordering::Relaxed);
        if count >= MAX_SLOTS {
            return Err(SlotError::Full);
        }
        let place = self.iter().position(|other| other.range.start() > slot.range.start()).unwrap_or(count);
        for index in (place..count).rev() {
            self.cells[index + 1].set(&self.cells[index].get());
        }
        self.cells[place].set(slot);
        self.count.store(count + 1, Ordering::Relaxed);
        Ok(())
    }

    /// Removes the slot that starts at `start`. The caller has the VM for itself.
    pub(crate) fn remove(&self, start: Gfn) -> Result<Slot, SlotError> {
        let (place, slot) = self.at(start)?;
        let count = self.live().len();
        for index in place + 1..count {
            self.cells[index - 1].set(&self.cells[index].get());
        }
        self.count.store(count - 1, Ordering::Relaxed);
        Ok(slot)
    }

    /// Changes the flags of the slot that starts at `start`. The caller has the VM for itself.
    pub(crate) fn set_flags(&self, start: Gfn, flags: SlotFlags) -> Result<Slot, SlotError> {
        let (place, slot) = self.at(start)?;
        self.cells[place].flags.store(flags.bits(), Ordering::Relaxed);
        Ok(slot)
    }

    fn at(&self, start: Gfn) -> Result<(usize, Slot), SlotError> {
        self.iter()
            .enumerate()
            .find(|(_, slot)| slot.range.start() == start.number())
            .ok_or(SlotError::NotFound(start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(start: u64, pages: u64) -> Slot {
        let range = GfnRange::new(Gfn::new_truncate(start), pages).unwrap();
        Slot { range, flags: SlotFlags::empty(), cookie: start }
    }

    #[test]
    fn slots_stay_sorted_and_never_overlap() {
        let slots = Slots::new();
        for start in [100, 0, 50, 200] {
            slots.insert(&slot(start, 10)).unwrap();
        }
        assert_eq!(slots.insert(&slot(45, 6)), Err(SlotError::Overlap(slot(50, 10))));
        assert_eq!(slots.insert(&slot(59, 1)), Err(SlotError::Overlap(slot(50, 10))));
        assert_eq!(slots.insert(&slot(60, 0)), Err(SlotError::Empty));
        slots.insert(&slot(60, 1)).unwrap();
        let starts: Vec<u64> = slots.iter().map(|slot| slot.range.start()).collect();
        assert_eq!(starts, [0, 50, 60, 100, 200]);
        assert_eq!(slots.remove(Gfn::new_truncate(60)), Ok(slot(60, 1)));
        assert_eq!(slots.remove(Gfn::new_truncate(61)), Err(SlotError::NotFound(Gfn::new_truncate(61))));
        assert_eq!(slots.find(Gfn::new_truncate(60)), None);
        assert_eq!(slots.find(Gfn::new_truncate(109)).unwrap().page, 9);
        assert_eq!(slots.find(Gfn::new_truncate(110)), None);
    }

    #[test]
    fn a_full_table_refuses_and_keeps_what_it_has() {
        let slots = Slots::new();
        for index in 0..MAX_SLOTS as u64 {
            slots.insert(&slot(index * 2, 1)).unwrap();
        }
        assert_eq!(slots.insert(&slot(1000, 1)), Err(SlotError::Full));
        assert_eq!(slots.iter().count(), MAX_SLOTS);
        assert!(slots.find(Gfn::new_truncate(62)).is_some());
    }

    /// CVE-2024-26991 and the huge page outside its slot: a block is judged against both ends of the slot.
    #[test]
    fn cve_2024_26991_block_straddling_a_slot_boundary_does_not_fit() {
        let slots = Slots::new();
        slots.insert(&slot(0x201, 0x400)).unwrap();
        let fits = |gfn| slots.find(Gfn::new_truncate(gfn)).unwrap().block_fits(512);
        assert!(!fits(0x201), "the head of its block is outside");
        assert!(fits(0x400) && fits(0x5ff));
        assert!(!fits(0x600), "the tail of its block is outside");
        slots.insert(&slot(0, 1)).unwrap();
        assert!(!fits(0));
    }
}
