//! Slots: which guest-physical ranges are RAM.
use core::sync::atomic::{AtomicU64, Ordering};

use bitflags::bitflags;

use crate::addr::{Gfn, GfnRange, Gpa, PAGE_SHIFT};

/// Slots one VM can have.
pub const MAX_SLOTS: usize = 32;

bitflags! {
    /// Properties of a slot.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct SlotFlags: u64 {
        /// Reads and fetches only; a write is not RAM but an access to emulate.
        const READ_ONLY = 1 << 0;
        /// Writes are logged.
        const DIRTY_LOG = 1 << 1;
        /// They are logged by the dirty bits of leaves.
        const DIRTY_BITS = 1 << 2;
        /// Writes to some page were tracked at some time.
        const TRACKED = 1 << 3;
        /// What is up to whoever makes the slot.
        const CHOICE = Self::READ_ONLY.bits();
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
    /// No slot starts at this frame (or holds it, where any frame will do).
    NotFound(Gfn),
    /// The backing has no memory for notes about the pages of this slot.
    NoNotes(Slot),
}

// Not the atomics of `crate::sync`: nothing here orders anything.
/// Cells rather than fields, so that walks read them while holding no more than a shared guard. They change only under
/// the exclusive guard, so relaxed accesses are enough: taking either guard orders them.
#[derive(Debug)]
struct SlotCells {
    /// Address of the first byte.
    start: AtomicU64,
    /// Length in bytes; zero for a cell without slot.
    bytes: AtomicU64,
    flags: AtomicU64,
    cookie: AtomicU64,
}

impl SlotCells {
    const fn new() -> Self {
        Self {
            start: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            flags: AtomicU64::new(0),
            cookie: AtomicU64::new(0),
        }
    }

    #[inline(always)]
    fn find(&self, gpa: Gpa) -> Option<SlotHit<'_>> {
        let slot_offset = gpa.bits().wrapping_sub(self.start.load(Ordering::Relaxed));
        let slot_bytes = self.bytes.load(Ordering::Relaxed);
        (slot_offset < slot_bytes).then_some(SlotHit { cells: self, gpa, slot_offset, slot_bytes })
    }

    fn get(&self) -> Option<Slot> {
        let start = Gpa::new_truncate(self.start.load(Ordering::Relaxed)).gfn();
        let range = GfnRange::new(start, self.bytes.load(Ordering::Relaxed) >> PAGE_SHIFT).ok()?;
        let flags = SlotFlags::from_bits_truncate(self.flags.load(Ordering::Relaxed));
        let slot = Slot { range, flags, cookie: self.cookie.load(Ordering::Relaxed) };
        (!range.is_empty()).then_some(slot)
    }

    fn set(&self, slot: Option<&Slot>) {
        let (start, pages) = slot.map_or((0, 0), |slot| (slot.range.start(), slot.range.pages()));
        self.start.store(start << PAGE_SHIFT, Ordering::Relaxed);
        self.bytes.store(pages << PAGE_SHIFT, Ordering::Relaxed);
        self.flags.store(slot.map_or(0, |slot| slot.flags.bits()), Ordering::Relaxed);
        self.cookie.store(slot.map_or(0, |slot| slot.cookie), Ordering::Relaxed);
    }
}

/// A place in guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamAddr {
    /// The guest-physical address.
    pub gpa: Gpa,
    /// Bytes from the start of the slot.
    pub slot_offset: u64,
    /// The slot's cookie.
    pub cookie: u64,
}

impl RamAddr {
    /// The guest frame.
    #[inline]
    pub const fn gfn(&self) -> Gfn {
        self.gpa.gfn()
    }

    /// Frames from the slot's first one to this one.
    #[inline]
    pub const fn slot_page(&self) -> u64 {
        self.slot_offset >> PAGE_SHIFT
    }
}

/// An address that was found in a slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlotHit<'s> {
    cells: &'s SlotCells,
    gpa: Gpa,
    slot_offset: u64,
    slot_bytes: u64,
}

impl SlotHit<'_> {
    /// The place as the backing sees it.
    #[inline(always)]
    pub(crate) fn ram(&self) -> RamAddr {
        let cookie = self.cells.cookie.load(Ordering::Relaxed);
        RamAddr { gpa: self.gpa, slot_offset: self.slot_offset, cookie }
    }

    /// The same slot at another of its addresses.
    #[inline(always)]
    pub(crate) fn at(&self, gpa: Gpa) -> Self {
        let slot_offset = self.slot_offset.wrapping_add(gpa.bits().wrapping_sub(self.gpa.bits()));
        Self { gpa, slot_offset, ..*self }
    }

    /// The slot's flags.
    #[inline(always)]
    pub(crate) fn flags(&self) -> SlotFlags {
        SlotFlags::from_bits_retain(self.cells.flags.load(Ordering::Relaxed))
    }

    /// The slot's first frame.
    #[inline]
    pub(crate) fn slot_start(&self) -> Gfn {
        Gpa::new_truncate(self.gpa.bits() - self.slot_offset).gfn()
    }

    /// The first address after the slot.
    pub(crate) fn slot_end(&self) -> u64 {
        self.gpa.bits() + (self.slot_bytes - self.slot_offset)
    }

    /// Whether the naturally aligned block of `bytes` (a power of two) around the address lies in the slot.
    #[inline]
    pub(crate) fn block_fits(&self, bytes: u64) -> bool {
        let before = self.gpa.bits() & (bytes - 1);
        before <= self.slot_offset && bytes - before <= self.slot_bytes - self.slot_offset
    }
}

/// The slots of a VM: sorted, without overlap, then cells without slot.
#[derive(Debug)]
pub(crate) struct Slots {
    cells: [SlotCells; MAX_SLOTS],
}

impl Slots {
    pub(crate) const fn new() -> Self {
        Self { cells: [const { SlotCells::new() }; MAX_SLOTS] }
    }

    /// The place in RAM that `gpa` names. RAM is almost always below the PCI hole or above it: the first two slots are
    /// looked at on the spot.
    #[inline(always)]
    pub(crate) fn find(&self, gpa: Gpa) -> Option<SlotHit<'_>> {
        let [first, second, rest @ ..] = &self.cells;
        if let Some(found) = first.find(gpa) {
            return Some(found);
        }
        if let Some(found) = second.find(gpa) {
            return Some(found);
        }
        Self::find_among(rest, gpa)
    }

    #[inline(never)]
    fn find_among(cells: &[SlotCells], gpa: Gpa) -> Option<SlotHit<'_>> {
        cells
            .iter()
            .take_while(|cells| cells.bytes.load(Ordering::Relaxed) != 0)
            .find_map(|cells| cells.find(gpa))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        self.cells.iter().map_while(SlotCells::get)
    }

    /// Adds a slot. The caller has the VM for itself.
    pub(crate) fn insert(&self, slot: &Slot) -> Result<(), SlotError> {
        if slot.range.is_empty() {
            return Err(SlotError::Empty);
        }
        if let Some(other) = self.iter().find(|other| other.range.overlaps(slot.range)) {
            return Err(SlotError::Overlap(other));
        }
        let count = self.iter().count();
        if count == MAX_SLOTS {
            return Err(SlotError::Full);
        }
        let place = self.iter().position(|other| other.range.start() > slot.range.start()).unwrap_or(count);
        for index in (place..count).rev() {
            self.cells[index + 1].set(self.cells[index].get().as_ref());
        }
        self.cells[place].set(Some(slot));
        Ok(())
    }

    /// Removes the slot that starts at `start`. The caller has the VM for itself.
    pub(crate) fn remove(&self, start: Gfn) -> Result<Slot, SlotError> {
        let (place, slot) = self.at(start)?;
        for index in place..MAX_SLOTS {
            let next = self.cells.get(index + 1).and_then(SlotCells::get);
            self.cells[index].set(next.as_ref());
        }
        Ok(slot)
    }

    /// Changes the flags of the slot that starts at `start` and says what it was. The caller has the VM for itself.
    pub(crate) fn set_flags(&self, start: Gfn, flags: SlotFlags) -> Result<Slot, SlotError> {
        let (place, slot) = self.at(start)?;
        self.cells[place].flags.store(flags.bits(), Ordering::Relaxed);
        Ok(slot)
    }

    /// The slot that starts at `start`.
    pub(crate) fn get(&self, start: Gfn) -> Result<Slot, SlotError> {
        Ok(self.at(start)?.1)
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

    fn gpa(gfn: u64) -> Gpa {
        Gfn::new_truncate(gfn).gpa()
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
        assert!(slots.find(gpa(60)).is_none());
        assert_eq!(slots.find(gpa(109)).unwrap().ram().slot_page(), 9);
        assert!(slots.find(gpa(110)).is_none());
    }

    #[test]
    fn a_full_table_refuses_and_keeps_what_it_has() {
        let slots = Slots::new();
        for index in 0..MAX_SLOTS as u64 {
            slots.insert(&slot(index * 2, 1)).unwrap();
        }
        assert_eq!(slots.insert(&slot(1000, 1)), Err(SlotError::Full));
        assert_eq!(slots.iter().count(), MAX_SLOTS);
        assert!(slots.find(gpa(1000)).is_none());
        assert!(slots.find(gpa(62)).is_some());
    }

    /// CVE-2024-26991 and the huge page outside its slot: a block is judged against both ends of the slot.
    #[test]
    fn cve_2024_26991_block_straddling_a_slot_boundary_does_not_fit() {
        let slots = Slots::new();
        slots.insert(&slot(0x201, 0x400)).unwrap();
        let fits = |gfn| slots.find(gpa(gfn)).unwrap().block_fits(512 * 4096);
        assert!(!fits(0x201), "the head of its block is outside");
        assert!(fits(0x400) && fits(0x5ff));
        assert!(!fits(0x600), "the tail of its block is outside");
        slots.insert(&slot(0, 1)).unwrap();
        assert!(!fits(0));
    }
}
