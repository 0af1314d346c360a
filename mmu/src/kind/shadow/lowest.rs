//! A lowest table of the guest as its shadow reads it: what is needed for each entry is found once for all of them.
use super::{is_short, shadows, space, ShadowMmu};
use crate::addr::{Gfn, PAGE_SIZE};
use crate::format::EntryFormat;
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, SlotFlags, SlotHit, VmMemory};
use crate::role::{CpuRole, PageRole};
use crate::tables::TableMemory;
use crate::walk::LowestEntries;
use core::sync::atomic::{AtomicU64, Ordering};

/// What follows from a lowest shadow page alone, as long as the page is what it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lowest {
    /// Number of the shadow page.
    pub(super) page: u32,
    /// The role of the shadow page.
    pub(super) role: PageRole,
    /// Whose entries they are.
    pub(super) guest: CpuRole,
    /// How they are read.
    pub(super) entries: LowestEntries,
    /// The guest's table.
    table: Gfn,
    /// Bytes of an entry, as a shift, and the number of the one behind the first entry of the shadow.
    entry_shift: u32,
    first: usize,
}

/// The table that a lowest shadow page stands for.
pub(super) struct LowestTable<'t, 'm, B> {
    pub(super) memory: &'m VmMemory<B>,
    pub(super) lowest: &'t Lowest,
    /// Where the table is, if it is in RAM.
    place: Option<SlotHit<'m>>,
    /// All of it, if its entries are words and the backing has them in one place.
    words: Option<&'m [AtomicU64; ENTRIES]>,
}

impl Lowest {
    /// The table, where it is now.
    #[inline(always)]
    pub(super) fn find<'m, B: Backing>(&self, memory: &'m VmMemory<B>) -> LowestTable<'_, 'm, B> {
        let place = memory.find_slot(space(&self.role), self.table.gpa());
        let whole = place.filter(|_| self.is_whole());
        let words = whole.and_then(|place| memory.backing().words(&place.ram()));
        LowestTable { memory, lowest: self, place, words }
    }

    /// Whether entries have eight bytes, so that the shadow page stands for all of the table.
    pub(super) const fn is_whole(&self) -> bool {
        self.entry_shift == 3
    }
}

impl<'m, B: Backing> LowestTable<'_, 'm, B> {
    /// Where the entry behind the one at `index` of the shadow page is.
    #[inline]
    fn place(&self, index: usize) -> Option<SlotHit<'m>> {
        let place = self.place.as_ref()?;
        let offset = ((self.lowest.first + index) << self.lowest.entry_shift) as u64;
        Some(place.forward(offset % PAGE_SIZE))
    }

    /// The entries from the one behind `first` of the shadow page on; zero where there is none. `first` and their
    /// number are such that they lie in one page.
    #[inline]
    pub(super) fn read_some<const N: usize>(&self, first: usize) -> [u64; N] {
        match self.words.and_then(|words| words.get(first..)?.first_chunk::<N>()) {
            Some(words) => words.each_ref().map(|word| word.load(Ordering::Acquire)),
            None => core::array::from_fn(|index| self.read(first + index).unwrap_or(0)),
        }
    }

    /// The entry behind the one at `index` of the shadow page.
    #[inline(always)]
    pub(super) fn read(&self, index: usize) -> Option<u64> {
        match self.words {
            Some(words) => Some(words[index % ENTRIES].load(Ordering::Acquire)),
            None => self.read_by_itself(index),
        }
    }

    /// Replaces the entry of eight bytes behind the one at `index` of the shadow page if it is `current`; whether it was,
    /// and may be written.
    #[inline(always)]
    pub(super) fn mark(&self, index: usize, current: u64, new: u64) -> bool {
        if self.place.as_ref().is_none_or(|place| place.flags().contains(SlotFlags::READ_ONLY)) {
            return false;
        }
        match (self.words, self.place(index)) {
            (Some(words), _) => words[index % ENTRIES]
                .compare_exchange(current, new, Ordering::SeqCst, Ordering::Acquire)
                .is_ok(),
            (None, Some(at)) => {
                self.memory.backing().compare_exchange_u64(&at.ram(), current, new) == Ok(current)
            }
            (None, None) => false,
        }
    }

    #[inline(never)]
    fn read_by_itself(&self, index: usize) -> Option<u64> {
        let at = self.place(index)?;
        if self.lowest.is_whole() {
            self.memory.backing().load_u64(&at.ram()).ok()
        } else {
            self.memory.backing().load_u32(&at.ram()).ok().map(u64::from)
        }
    }
}

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// The guest's table behind `page`; `None` if that is no shadow of a lowest table.
    #[inline(always)]
    pub(super) fn lowest(&self, page: u32) -> Option<Lowest> {
        let this = self.page(page);
        let role = this.role.filter(|role| role.level == Level::L1 && shadows(role))?;
        let guest = role.base.guest()?;
        let short = is_short(&role);
        Some(Lowest {
            page,
            role,
            guest,
            entries: LowestEntries::new(&guest),
            table: this.gfn,
            entry_shift: if short { 2 } else { 3 },
            first: if short { usize::from(role.quadrant) * ENTRIES } else { 0 },
        })
    }
}
