//! Slots: which guest-physical ranges are RAM, in which address spaces.
use core::sync::atomic::{AtomicU64, Ordering};

use bitflags::bitflags;

use super::{Space, SpaceGfn, Spaces};
use crate::addr::{Gfn, GfnRange, Gpa, PAGE_SHIFT};
use crate::mutant::{self, Mutant};

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
///
/// One that is visible in both spaces is one slot: what is logged and tracked of its pages is so in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The guest frames.
    pub range: GfnRange,
    /// What may be done with them.
    pub flags: SlotFlags,
    /// For the backing alone: says which of its memory this is, for instance a host address or an index. Also the name of
    /// the notes about its pages, so no two slots that have any share it.
    pub cookie: u64,
    /// Who sees it; at least one.
    pub spaces: Spaces,
}

impl Slot {
    /// A slot that is visible in both spaces.
    pub const fn new(range: GfnRange, flags: SlotFlags, cookie: u64) -> Self {
        Self { range, flags, cookie, spaces: Spaces::all() }
    }

    /// The same, visible in `space` alone.
    #[must_use]
    pub fn only_in(self, space: Space) -> Self {
        Self { spaces: space.into(), ..self }
    }

    /// Whether the two cannot both be there: they share a frame in a space.
    fn collides(&self, other: &Self) -> bool {
        self.spaces.intersects(other.spaces) && self.range.overlaps(other.range)
    }
}

/// A slot that cannot be added, or is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotError {
    /// The range has no page, or nobody would see it.
    Empty,
    /// The range shares frames with this slot, in a space that sees both.
    Overlap(Slot),
    /// [`MAX_SLOTS`] slots exist.
    Full,
    /// No slot of the space starts at this frame (or holds it, where any frame will do).
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
    /// Length in bytes as each space sees it: zero where the slot is not visible, and all zero for a cell without slot.
    bytes: [AtomicU64; 2],
    flags: AtomicU64,
    cookie: AtomicU64,
}

impl SlotCells {
    const fn new() -> Self {
        Self {
            start: AtomicU64::new(0),
            bytes: [const { AtomicU64::new(0) }; 2],
            flags: AtomicU64::new(0),
            cookie: AtomicU64::new(0),
        }
    }

    #[inline(always)]
    fn find(&self, space: Space, gpa: Gpa) -> Option<SlotHit<'_>> {
        let slot_offset = gpa.bits().wrapping_sub(self.start.load(Ordering::Relaxed));
        let slot_bytes = self.bytes_in(space);
        (slot_offset < slot_bytes).then_some(SlotHit { cells: self, gpa, slot_offset, slot_bytes })
    }

    #[inline(always)]
    fn bytes_in(&self, space: Space) -> u64 {
        self.bytes[space as usize].load(Ordering::Relaxed)
    }

    /// Who sees the slot; nobody, if there is none.
    fn spaces(&self) -> Spaces {
        let seen = Space::ALL.into_iter().filter(|&space| self.bytes_in(space) != 0);
        seen.fold(Spaces::empty(), |spaces, space| spaces | space.into())
    }

    fn get(&self) -> Option<Slot> {
        let start = Gpa::new_truncate(self.start.load(Ordering::Relaxed)).gfn();
        let bytes = self.bytes_in(Space::Normal).max(self.bytes_in(Space::Smm));
        let range = GfnRange::new(start, bytes >> PAGE_SHIFT).ok()?;
        let flags = SlotFlags::from_bits_truncate(self.flags.load(Ordering::Relaxed));
        let cookie = self.cookie.load(Ordering::Relaxed);
        (!range.is_empty()).then_some(Slot { range, flags, cookie, spaces: self.spaces() })
    }

    fn set(&self, slot: Option<&Slot>) {
        let (start, pages) = slot.map_or((0, 0), |slot| (slot.range.start(), slot.range.pages()));
        self.start.store(start << PAGE_SHIFT, Ordering::Relaxed);
        for space in Space::ALL {
            let seen = slot.is_some_and(|slot| slot.spaces.contains(space.into()));
            self.bytes[space as usize].store(if seen { pages << PAGE_SHIFT } else { 0 }, Ordering::Relaxed);
        }
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

    /// The same slot `bytes` on; not beyond the page.
    #[inline(always)]
    pub(crate) fn forward(&self, bytes: u64) -> Self {
        let gpa = Gpa::new_truncate(self.gpa.bits() + bytes);
        Self { gpa, slot_offset: self.slot_offset + bytes, ..*self }
    }

    /// The slot's flags.
    #[inline(always)]
    pub(crate) fn flags(&self) -> SlotFlags {
        SlotFlags::from_bits_retain(self.cells.flags.load(Ordering::Relaxed))
    }

    /// Changes the slot's flags. The caller has the VM for itself.
    pub(super) fn set_flags(&self, flags: SlotFlags) {
        self.cells.flags.store(flags.bits(), Ordering::Relaxed);
    }

    /// The slot.
    pub(super) fn slot(&self) -> Option<Slot> {
        self.cells.get()
    }

    /// Who sees the slot.
    pub(crate) fn spaces(&self) -> Spaces {
        self.cells.spaces()
    }

    /// Whether both are in one slot.
    fn is_beside(&self, other: &Self) -> bool {
        core::ptr::eq(self.cells, other.cells)
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
        (before <= self.slot_offset || mutant::is(Mutant::BlockBeforeSlot))
            && (bytes - before <= self.slot_bytes - self.slot_offset || mutant::is(Mutant::BlockBeyondSlot))
    }
}

/// The slots of a VM: those that the normal space sees, then those that it does not, each sorted, then cells without slot.
/// So a search of the normal space never meets a slot that it does not see.
#[derive(Debug)]
pub(crate) struct Slots {
    cells: [SlotCells; MAX_SLOTS],
}

impl Slots {
    pub(crate) const fn new() -> Self {
        Self { cells: [const { SlotCells::new() }; MAX_SLOTS] }
    }

    /// The place in RAM that `gpa` names in `space`. RAM is almost always below the PCI hole or above it: the first two slots
    /// are looked at on the spot.
    #[inline(always)]
    pub(crate) fn find(&self, space: Space, gpa: Gpa) -> Option<SlotHit<'_>> {
        let [first, second, rest @ ..] = &self.cells;
        if let Some(found) = first.find(space, gpa) {
            return Some(found);
        }
        if let Some(found) = second.find(space, gpa) {
            return Some(found);
        }
        Self::find_among(rest, space, gpa)
    }

    #[inline(never)]
    fn find_among(cells: &[SlotCells], space: Space, gpa: Gpa) -> Option<SlotHit<'_>> {
        let seen = match space {
            Space::Normal => Spaces::NORMAL,
            Space::Smm => Spaces::all(),
        };
        cells
            .iter()
            .take_while(|cells| cells.spaces().intersects(seen))
            .find_map(|cells| cells.find(space, gpa))
    }

    /// The places in RAM that `gpa` names in whatever space: one for each slot that holds it, at most two.
    pub(crate) fn find_all(&self, gpa: Gpa) -> impl Iterator<Item = SlotHit<'_>> + Clone {
        let normal = self.find(Space::Normal, gpa);
        let other = self.find(Space::Smm, gpa);
        let other = other.filter(|hit| !normal.is_some_and(|normal| normal.is_beside(hit)));
        normal.into_iter().chain(other)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Slot> + '_ {
        self.cells.iter().map_while(SlotCells::get)
    }

    /// Adds a slot. The caller has the VM for itself.
    pub(crate) fn insert(&self, slot: &Slot) -> Result<(), SlotError> {
        let count = self.check(slot)?;
        let order = |slot: &Slot| (!slot.spaces.contains(Spaces::NORMAL), slot.range.start());
        let place = self.iter().position(|other| order(&other) > order(slot)).unwrap_or(count);
        for index in (place..count).rev() {
            self.cells[index + 1].set(self.cells[index].get().as_ref());
        }
        self.cells[place].set(Some(slot));
        Ok(())
    }

    /// Whether `slot` can be added; says how many there are.
    pub(super) fn check(&self, slot: &Slot) -> Result<usize, SlotError> {
        if slot.range.is_empty() || slot.spaces.is_empty() {
            return Err(SlotError::Empty);
        }
        if let Some(other) = self.iter().find(|other| other.collides(slot)) {
            return Err(SlotError::Overlap(other));
        }
        let count = self.iter().count();
        if count == MAX_SLOTS {
            return Err(SlotError::Full);
        }
        Ok(count)
    }

    /// Removes the slot that starts at `start`. The caller has the VM for itself.
    pub(crate) fn remove(&self, start: SpaceGfn) -> Result<Slot, SlotError> {
        let (place, slot) = self.at(start)?;
        for index in place..MAX_SLOTS {
            let next = self.cells.get(index + 1).and_then(SlotCells::get);
            self.cells[index].set(next.as_ref());
        }
        Ok(slot)
    }

    /// Changes the flags of the slot that starts at `start` and says what it was. The caller has the VM for itself.
    pub(crate) fn set_flags(&self, start: SpaceGfn, flags: SlotFlags) -> Result<Slot, SlotError> {
        let (place, slot) = self.at(start)?;
        self.cells[place].flags.store(flags.bits(), Ordering::Relaxed);
        Ok(slot)
    }

    /// The slot that starts at `start`.
    pub(crate) fn get(&self, start: SpaceGfn) -> Result<Slot, SlotError> {
        Ok(self.at(start)?.1)
    }

    fn at(&self, start: SpaceGfn) -> Result<(usize, Slot), SlotError> {
        self.iter()
            .enumerate()
            .find(|(_, slot)| {
                slot.spaces.contains(start.space.into()) && slot.range.start() == start.gfn.number()
            })
            .ok_or(SlotError::NotFound(start.gfn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(start: u64, pages: u64) -> Slot {
        let range = GfnRange::new(Gfn::new_truncate(start), pages).unwrap();
        Slot::new(range, SlotFlags::empty(), start)
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
        assert_eq!(slots.remove(Gfn::new_truncate(60).into()), Ok(slot(60, 1)));
        assert_eq!(
            slots.remove(Gfn::new_truncate(61).into()),
            Err(SlotError::NotFound(Gfn::new_truncate(61)))
        );
        assert!(slots.find(Space::Normal, gpa(60)).is_none());
        assert_eq!(slots.find(Space::Normal, gpa(109)).unwrap().ram().slot_page(), 9);
        assert!(slots.find(Space::Normal, gpa(110)).is_none());
    }

    #[test]
    fn a_full_table_refuses_and_keeps_what_it_has() {
        let slots = Slots::new();
        for index in 0..MAX_SLOTS as u64 {
            slots.insert(&slot(index * 2, 1)).unwrap();
        }
        assert_eq!(slots.insert(&slot(1000, 1)), Err(SlotError::Full));
        assert_eq!(slots.iter().count(), MAX_SLOTS);
        assert!(slots.find(Space::Normal, gpa(1000)).is_none());
        assert!(slots.find(Space::Normal, gpa(62)).is_some());
    }

    /// CVE-2024-26991 and the huge page outside its slot: a block is judged against both ends of the slot.
    #[test]
    fn cve_2024_26991_block_straddling_a_slot_boundary_does_not_fit() {
        let slots = Slots::new();
        slots.insert(&slot(0x201, 0x400)).unwrap();
        let fits = |gfn| slots.find(Space::Normal, gpa(gfn)).unwrap().block_fits(512 * 4096);
        assert!(!fits(0x201), "the head of its block is outside");
        assert!(fits(0x400) && fits(0x5ff));
        assert!(!fits(0x600), "the tail of its block is outside");
        slots.insert(&slot(0, 1)).unwrap();
        assert!(!fits(0));
    }

    #[test]
    fn slots_overlap_if_and_only_if_they_share_no_space() {
        let slots = Slots::new();
        let smm = |start, pages| Slot { cookie: 1000 + start, ..slot(start, pages) }.only_in(Space::Smm);
        let normal = |start, pages| slot(start, pages).only_in(Space::Normal);
        slots.insert(&slot(0, 0xa0)).unwrap();
        slots.insert(&smm(0xa0, 0x20)).unwrap();
        assert_eq!(slots.insert(&smm(0x9f, 1)), Err(SlotError::Overlap(slot(0, 0xa0))));
        assert_eq!(slots.insert(&slot(0xb0, 1)), Err(SlotError::Overlap(smm(0xa0, 0x20))));
        assert_eq!(slots.insert(&Slot { spaces: Spaces::empty(), ..slot(0x200, 1) }), Err(SlotError::Empty));
        slots.insert(&normal(0xa0, 8)).unwrap();
        slots.insert(&slot(0x100, 0x100)).unwrap();
        let cookie = |space, gfn| slots.find(space, gpa(gfn)).map(|hit| hit.ram().cookie);
        assert_eq!([cookie(Space::Normal, 0xa1), cookie(Space::Smm, 0xa1)], [Some(0xa0), Some(1000 + 0xa0)]);
        assert_eq!([cookie(Space::Normal, 0xa8), cookie(Space::Smm, 0xa8)], [None, Some(1000 + 0xa0)]);
        assert_eq!([cookie(Space::Normal, 0x1ff), cookie(Space::Smm, 0x1ff)], [Some(0x100); 2]);
        let all = |gfn| slots.find_all(gpa(gfn)).map(|hit| hit.ram().cookie).collect::<Vec<_>>();
        assert_eq!([all(0xa0), all(0xa8), all(0x10)], [vec![0xa0, 1000 + 0xa0], vec![1000 + 0xa0], vec![0]]);
        // Each is named by its start in a space that sees it.
        let at = Gfn::new_truncate(0xa0);
        assert_eq!(slots.get(Space::Smm.at(Gfn::new_truncate(0x100))), Ok(slot(0x100, 0x100)));
        assert_eq!(slots.remove(at.into()), Ok(normal(0xa0, 8)));
        assert_eq!(slots.remove(at.into()), Err(SlotError::NotFound(at)));
        assert_eq!(slots.remove(Space::Smm.at(at)), Ok(smm(0xa0, 0x20)));
        assert_eq!(slots.iter().map(|slot| slot.range.start()).collect::<Vec<_>>(), [0, 0x100]);
    }

    /// The rule of CVE-2024-26991, space by space: what another space holds in the block does not matter.
    #[test]
    fn a_block_is_judged_by_the_slot_of_its_space() {
        let slots = Slots::new();
        slots.insert(&slot(0, 0x400).only_in(Space::Normal)).unwrap();
        slots.insert(&slot(0, 0xa0).only_in(Space::Smm)).unwrap();
        let fits = |space| slots.find(space, gpa(0x10)).unwrap().block_fits(512 * 4096);
        assert!(fits(Space::Normal) && !fits(Space::Smm));
    }
}
