//! The dirty log: which pages of a slot were written. It is above the kinds: whatever writes, notes it here.
//!
//! A slot is logged either by write protection (the first write to a page faults, and the fault notes it) or by the dirty
//! bits that the processor sets in leaves; those are collected from the tables, or come as a list from the processor's page
//! modification log. Reading and clearing are separate: a bit is cleared *before* the page is armed again
//! ([`rearm`](crate::DirectMmu::rearm)), and whoever copies the page does so after that, so no write is lost.
use super::notes::PAGES_PER_WORD;
use super::{
    Backing, Exclusive, Held, Shared, SlotError, SlotFlags, SlotNotes, Space, SpaceGfn, SpaceView, VmMemory,
};
use crate::addr::{Gfn, GfnRange};
use crate::kind::Sweep;
use crate::mutant::{self, Mutant};
use crate::sync::{AtomicU64, Ordering};

/// How writes to a logged slot are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogBy {
    /// Leaves lose W; the fault of the first write notes the page.
    WriteProtection,
    /// Leaves lose D; the processor notes the page. In a kind whose format has no D, by write protection.
    DirtyBits,
}

/// The log of one slot.
#[derive(Clone, Copy, Debug)]
pub struct DirtyLog<'m> {
    range: GfnRange,
    words: &'m [AtomicU64],
}

impl DirtyLog<'_> {
    /// The slot's frames. Bit `b` of word `w` stands for frame number `64 w + b` from the start.
    pub const fn range(&self) -> GfnRange {
        self.range
    }

    /// How many words the log has.
    pub const fn words(&self) -> usize {
        self.words.len()
    }

    /// Word `index` as it is.
    pub fn read(&self, index: usize) -> u64 {
        self.words.get(index).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Clears the bits of `mask` in word `index` and says which of them were set: those pages have to be armed again, in
    /// every kind ([`rearm`](crate::DirectMmu::rearm)), before they are copied.
    pub fn clear(&self, index: usize, mask: u64) -> u64 {
        self.words.get(index).map_or(0, |word| {
            let kept = if mutant::is(Mutant::ClearKeepsBits) { 0 } else { !mask };
            word.fetch_and(kept, Ordering::AcqRel) & mask
        })
    }

    /// The frames that word `index` stands for, and only those that the slot has.
    pub fn frames(&self, index: usize) -> Option<GfnRange> {
        let first = (index as u64).checked_mul(PAGES_PER_WORD).filter(|&page| page < self.range.pages())?;
        let pages = (self.range.pages() - first).min(PAGES_PER_WORD);
        GfnRange::new(Gfn::new_truncate(self.range.start() + first), pages).ok()
    }
}

impl<'m, B: Backing> Exclusive<'m, B> {
    /// Begins to log writes to the slot that starts at `start`, with nothing logged yet.
    ///
    /// Returns what to split to 4 KiB (if that is not left to the faults) and to
    /// [`rearm`](crate::DirectMmu::rearm), in every kind; the flush of that is the moment the log begins.
    pub fn start_dirty_log(&mut self, start: impl Into<SpaceGfn>, by: LogBy) -> Result<Sweep, SlotError> {
        self.start_log(start.into(), by, 0)
    }

    /// The same with every page logged: nothing has to be armed before it is cleared for the first time. (The sweep may
    /// be used to split beforehand.)
    pub fn start_dirty_log_all_set(
        &mut self,
        start: impl Into<SpaceGfn>,
        by: LogBy,
    ) -> Result<Sweep, SlotError> {
        self.start_log(start.into(), by, u64::MAX)
    }

    fn start_log(&mut self, start: SpaceGfn, by: LogBy, fill: u64) -> Result<Sweep, SlotError> {
        let memory = Held::<B>::memory(self);
        let slot = memory.slots.get(start)?;
        let notes = memory.backing().notes(slot.cookie);
        if !notes.can_log(slot.range.pages()) {
            return Err(SlotError::NoNotes(slot));
        }
        let mut left = slot.range.pages();
        for word in notes.dirty {
            let bits = if left >= PAGES_PER_WORD || mutant::is(Mutant::LogBeyondSlot) {
                u64::MAX
            } else {
                (1 << left) - 1
            };
            left = left.saturating_sub(PAGES_PER_WORD);
            word.store(fill & bits, Ordering::Relaxed);
        }
        let mut flags = slot.flags.difference(SlotFlags::DIRTY_BITS) | SlotFlags::DIRTY_LOG;
        if by == LogBy::DirtyBits {
            flags |= SlotFlags::DIRTY_BITS;
        }
        memory.set_flags(start, flags)?;
        Ok(Sweep::over_slot(&slot))
    }

    /// Ends the log of the slot that starts at `start`; what it says stays readable nowhere. Returns what may be made
    /// writable again and [collapsed](crate::DirectMmu::collapse) into huge pages.
    pub fn stop_dirty_log(&mut self, start: impl Into<SpaceGfn>) -> Result<Sweep, SlotError> {
        let start = start.into();
        let memory = Held::<B>::memory(self);
        let slot = memory.slots.get(start)?;
        memory.set_flags(start, slot.flags.difference(SlotFlags::DIRTY_LOG | SlotFlags::DIRTY_BITS))?;
        Ok(Sweep::over_slot(&slot))
    }
}

impl<'m, B: Backing> Shared<'m, B> {
    /// The log of the slot that starts at `start`, if it is logged. It is read under the guard it came from: when that is
    /// gone, the slot may be.
    pub fn dirty_log(&self, start: impl Into<SpaceGfn>) -> Option<DirtyLog<'_>> {
        let memory: &'m VmMemory<B> = self.memory();
        let slot = memory.slots.get(start.into()).ok()?;
        let SlotNotes { dirty, .. } = memory.backing().notes(slot.cookie);
        let words = dirty.get(..slot.range.pages().div_ceil(PAGES_PER_WORD) as usize)?;
        slot.flags.contains(SlotFlags::DIRTY_LOG).then_some(DirtyLog { range: slot.range, words })
    }

    /// [`SpaceView::log_dirty`] in the normal space.
    pub fn log_dirty(&self, frames: impl IntoIterator<Item = Gfn>) {
        self.in_space(Space::Normal).log_dirty(frames);
    }
}

impl<B: Backing> SpaceView<'_, B> {
    /// Notes that the frames were written: what the processor put into its page-modification log, for instance. Frames
    /// that no logged slot has are ignored.
    pub fn log_dirty(&self, frames: impl IntoIterator<Item = Gfn>) {
        for gfn in frames {
            self.memory().note_write(self.space(), gfn);
        }
    }
}

/// What operations on tables ask about pages, whatever the backing is.
pub(crate) trait Pages {
    /// The leaf of the frame loses a dirty bit: notes the write, if that is how the slot is logged.
    fn note_dirty_bit(&self, at: SpaceGfn);
    /// Whether the slot of the frame is logged, and whether by dirty bits.
    fn logged_by(&self, at: SpaceGfn) -> Option<LogBy>;
}

impl<B: Backing> Pages for VmMemory<B> {
    fn note_dirty_bit(&self, at: SpaceGfn) {
        if self.is_logging() && self.logged_by(at) == Some(LogBy::DirtyBits) {
            self.note_logged_write(at.space, at.gfn);
        }
    }

    fn logged_by(&self, at: SpaceGfn) -> Option<LogBy> {
        let flags = self.find_slot(at.space, at.gfn.gpa())?.flags();
        match (flags.contains(SlotFlags::DIRTY_LOG), flags.contains(SlotFlags::DIRTY_BITS)) {
            (false, _) => None,
            (true, false) => Some(LogBy::WriteProtection),
            (true, true) => Some(LogBy::DirtyBits),
        }
    }
}

impl<B: Backing> VmMemory<B> {
    /// Notes that `gfn` of `space` was written, or may be from now on: after the fact, so that whoever clears the bit first and arms
    /// the page then cannot miss it.
    #[inline]
    pub(crate) fn note_write(&self, space: Space, gfn: Gfn) {
        if self.is_logging() {
            self.note_logged_write(space, gfn);
        }
    }

    /// Whether the log has `gfn` as written.
    pub(crate) fn is_logged(&self, space: Space, gfn: Gfn) -> bool {
        self.find_slot(space, gfn.gpa()).is_some_and(|hit| {
            let at = hit.ram();
            let found = self.backing().notes(at.cookie).dirty_word(at.slot_page());
            found.is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
        })
    }

    #[inline(never)]
    fn note_logged_write(&self, space: Space, gfn: Gfn) {
        let Some(hit) = self.find_slot(space, gfn.gpa()) else { return };
        if hit.flags().contains(SlotFlags::DIRTY_LOG) {
            let at = hit.ram();
            if let Some((word, bit)) = self.backing().notes(at.cookie).dirty_word(at.slot_page()) {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }
}
