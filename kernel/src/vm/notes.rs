//! How much memory the notes about a guest's pages take, and what lies where in it. Pure; the frames are `memory`'s.
//!
//! For each range of RAM there is one run of memory, zeroed: words of the dirty log (a bit a page), then counts of four
//! bytes for write tracking: of the 2 MiB blocks, of the 1 GiB blocks, of the pages. A log takes 32 KiB for each GiB of
//! RAM, tracking 1 MiB and 2 KiB (0.1 %): memory that a VM has only if it needs it. As small a count as one byte would
//! not do, for a guest decides how many shadows one of its tables has.
use bitflags::bitflags;
use core::sync::atomic::{AtomicU32, AtomicU64};
use mmu::SlotNotes;

bitflags! {
    /// What may be noted of a VM's pages.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Notes: u8 {
        /// That they were written: the dirty log.
        const LOG = 1 << 0;
        /// How many want their writes emulated: what the shadow kind asks for.
        const TRACK = 1 << 1;
    }
}

const PAGE_SHIFT: u32 = 12;
/// Frames of a 2 MiB and of a 1 GiB block, as powers of two.
const BLOCK_SHIFTS: [u32; 2] = [9, 18];

/// Where the notes about one range of RAM lie in their memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NotesLayout {
    /// Words of the dirty log.
    words: usize,
    /// Counts for 2 MiB blocks and for 1 GiB blocks.
    blocks: [usize; 2],
    /// Counts for pages.
    pages: usize,
}

impl NotesLayout {
    /// For `what` of the pages of `bytes` of RAM from guest-physical address `start` on; both are multiples of a page.
    pub fn new(what: Notes, start: u64, bytes: u64) -> Self {
        let (first, pages) = (start >> PAGE_SHIFT, bytes >> PAGE_SHIFT);
        let mut layout = Self::default();
        if pages == 0 {
            return layout;
        }
        if what.contains(Notes::LOG) {
            layout.words = pages.div_ceil(u64::from(u64::BITS)) as usize;
        }
        if what.contains(Notes::TRACK) {
            let last = first + (pages - 1);
            layout.blocks = BLOCK_SHIFTS.map(|shift| ((last >> shift) - (first >> shift) + 1) as usize);
            layout.pages = pages as usize;
        }
        layout
    }

    /// Words at the start of the memory.
    pub const fn words(&self) -> usize {
        self.words
    }

    /// Counts that follow them.
    pub const fn counts(&self) -> usize {
        self.blocks[0] + self.blocks[1] + self.pages
    }

    /// Size of all in bytes.
    pub const fn bytes(&self) -> u64 {
        (self.words * size_of::<AtomicU64>() + self.counts() * size_of::<AtomicU32>()) as u64
    }

    /// The notes in their memory: as many words and counts as were said. Of less memory, there are no notes.
    #[inline]
    pub fn notes<'n>(&self, words: &'n [AtomicU64], counts: &'n [AtomicU32]) -> SlotNotes<'n> {
        let [small, large] = self.blocks;
        let parts = counts.split_at_checked(small).and_then(|(small, rest)| {
            let (large, tracks) = rest.split_at_checked(large)?;
            Some((small, large, tracks))
        });
        let Some((small, large, tracks)) = parts else { return SlotNotes::default() };
        SlotNotes { dirty: words, tracks, tracked_in: [small, large] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn memory(layout: &NotesLayout) -> (Vec<AtomicU64>, Vec<AtomicU32>) {
        let words = (0..layout.words()).map(|_| AtomicU64::new(0)).collect();
        (words, (0..layout.counts()).map(|_| AtomicU32::new(0)).collect())
    }

    #[test]
    fn nothing_is_taken_that_was_not_asked_for() {
        let bytes = |what| NotesLayout::new(what, 0, GIB).bytes();
        assert_eq!(bytes(Notes::empty()), 0);
        assert_eq!(bytes(Notes::LOG), 32 << 10);
        assert_eq!(bytes(Notes::TRACK), MIB + 512 * 4 + 4);
        assert_eq!(bytes(Notes::all()), bytes(Notes::LOG) + bytes(Notes::TRACK));
        assert_eq!(NotesLayout::new(Notes::all(), 4 * GIB, 0), NotesLayout::default());
    }

    /// As many of each as the crate counts for a slot, wherever that begins and ends.
    #[test]
    fn the_parts_are_as_long_as_the_slot_needs() {
        for (start, bytes) in [
            (0, 4096),
            (0, 640 << 10),
            (0, 3 * GIB),
            (4 * GIB, 5 * GIB + 6 * MIB),
            (2 * MIB - 4096, 8192),
            (GIB - 4096, GIB + 8192),
            (63 * 4096, 65 * 4096),
        ] {
            let layout = NotesLayout::new(Notes::all(), start, bytes);
            let (words, counts) = memory(&layout);
            let notes = layout.notes(&words, &counts);
            let pages: Vec<u64> = (start >> 12..(start + bytes) >> 12).collect();
            let blocks =
                |shift: u32| pages.iter().map(|page| page >> shift).collect::<std::collections::HashSet<_>>();
            assert_eq!(notes.tracks.len(), pages.len());
            assert_eq!(notes.dirty.len(), pages.len().div_ceil(64));
            assert_eq!(notes.tracked_in.map(<[_]>::len), [blocks(9).len(), blocks(18).len()]);
            assert_eq!(layout.bytes() as usize, size_of_val(&words[..]) + size_of_val(&counts[..]));
        }
    }

    #[test]
    fn the_parts_do_not_overlap() {
        let layout = NotesLayout::new(Notes::all(), GIB - 4096, 3 * MIB);
        let (words, counts) = memory(&layout);
        let notes = layout.notes(&words, &counts);
        let all: Vec<*const AtomicU32> = [notes.tracked_in[0], notes.tracked_in[1], notes.tracks]
            .into_iter()
            .flat_map(|part| part.iter().map(core::ptr::from_ref))
            .collect();
        let expected: Vec<*const AtomicU32> = counts.iter().map(core::ptr::from_ref).collect();
        assert_eq!(all, expected);
    }

    /// The largest VM there can be: more than the physical map shows.
    #[test]
    fn the_largest_vm_does_not_overflow() {
        let layout = NotesLayout::new(Notes::all(), 4 * GIB, 1 << 48);
        assert_eq!(layout.words() as u64, 1 << 30);
        assert_eq!(layout.bytes(), (1 << 33) + 4 * ((1 << 36) + (1 << 27) + (1 << 18)));
    }

    #[test]
    fn too_little_memory_is_no_notes() {
        let layout = NotesLayout::new(Notes::TRACK, 0, GIB);
        let (words, counts) = memory(&layout);
        assert!(layout.notes(&words, &counts[..511]).tracks.is_empty());
        let log = NotesLayout::new(Notes::LOG, 0, GIB);
        let (words, counts) = memory(&log);
        let notes = log.notes(&words, &counts);
        assert_eq!((notes.dirty.len(), notes.tracks.len()), (4096, 0));
    }
}
