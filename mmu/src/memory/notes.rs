//! What the crate notes of single pages of a slot, in memory that the backing provides.
use crate::addr::Gfn;
use crate::level::PageSize;
use crate::sync::{AtomicU32, AtomicU64, Ordering};

/// Memory for notes about a slot's pages. What it is for decides what has to be there; an empty slice means that the slot
/// cannot have the feature.
///
/// All zero when the slot is inserted, and the crate's alone until it is removed.
#[derive(Clone, Copy, Debug, Default)]
pub struct SlotNotes<'b> {
    /// For the dirty log: one bit a page, the slot's first page in bit 0 of the first word.
    pub dirty: &'b [AtomicU64],
    /// For write tracking: how many track each page.
    pub tracks: &'b [AtomicU32],
    /// For write tracking: how many pages are tracked in each 2 MiB block that the slot has a part of, and in each 1 GiB.
    pub tracked_in: [&'b [AtomicU32]; 2],
}

/// Pages that one word of the dirty log stands for.
pub(crate) const PAGES_PER_WORD: u64 = 64;

impl<'b> SlotNotes<'b> {
    /// Whether the dirty log of a slot of `pages` pages fits.
    pub(crate) fn can_log(&self, pages: u64) -> bool {
        self.dirty.len() as u64 >= pages.div_ceil(PAGES_PER_WORD)
    }

    /// Whether `gfn` is tracked, in a slot that starts at `start`.
    #[inline]
    pub(crate) fn is_tracked(&self, start: Gfn, gfn: Gfn) -> bool {
        let page = gfn.number() - start.number();
        self.tracks.get(page as usize).is_some_and(|count| count.load(Ordering::Relaxed) != 0)
    }

    /// How many pages are tracked in the block of `size` around `gfn`, in a slot that starts at `start`. Blocks without a
    /// count, above the slot's end or of a slot that cannot be tracked, have none.
    #[inline]
    pub(crate) fn tracked_in(&self, start: Gfn, gfn: Gfn, size: PageSize) -> Option<&'b AtomicU32> {
        let counts = match size {
            PageSize::Size4K => return None,
            PageSize::Size2M => self.tracked_in[0],
            PageSize::Size1G => self.tracked_in[1],
        };
        let shift = size.level().frame_shift();
        counts.get(((gfn.number() >> shift) - (start.number() >> shift)) as usize)
    }

    /// The word of the dirty log with page `page` of the slot, and the page's bit.
    #[inline]
    pub(crate) fn dirty_word(&self, page: u64) -> Option<(&'b AtomicU64, u64)> {
        let word = self.dirty.get((page / PAGES_PER_WORD) as usize)?;
        Some((word, 1 << (page % PAGES_PER_WORD)))
    }
}
