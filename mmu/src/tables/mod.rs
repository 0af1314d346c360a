//! Table memory: where page-table entries live, without saying what an entry is or how a page is reached.
//!
//! Entries are accessed relaxed; where order matters the crate puts an explicit [`EntryCell::fence`], so that a model
//! checker sees the same program as the hardware does.
mod cache;
mod phys;

use core::sync::atomic::Ordering;

pub use cache::{FaultStats, TableCache};
pub use phys::{HwEntry, PhysTables};

use crate::addr::Pfn;

/// One page-table entry that other CPUs, and the table walker of each CPU, read and write at the same time.
///
/// All three accesses are single-copy atomic and relaxed.
pub trait EntryCell {
    /// Reads the entry.
    fn load(&self) -> u64;
    /// Overwrites the entry, whatever it holds. Only for entries that nobody else can reach.
    fn store(&self, entry: u64);
    /// Overwrites the entry and says what it held.
    fn swap(&self, entry: u64) -> u64;
    /// Replaces `current` by `new`; otherwise says what the entry holds instead.
    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64>;
    /// Orders accesses around it, as `core::sync::atomic::fence` does.
    fn fence(order: Ordering);
}

/// Memory that table pages are in.
pub trait TableMemory {
    /// One entry of a table.
    type Cell: EntryCell;
    /// Entry `index` (below 512) of `table`.
    fn cell<'a>(&'a self, table: &'a TableFrame, index: usize) -> &'a Self::Cell;
}

/// Names a table page that is linked into a tree, or is about to be.
///
/// Only this crate makes one, each operation its own, and a reference obtained through it does not outlive it; an
/// operation lives inside a guard. So holding one means: the page is table memory, and stays it meanwhile.
#[derive(Debug)]
pub struct TableFrame(Pfn);

impl TableFrame {
    /// The table that a non-leaf entry points to.
    #[inline]
    pub(crate) const fn linked(pfn: Pfn) -> Self {
        Self(pfn)
    }

    /// Frame of the page.
    #[inline]
    pub const fn pfn(&self) -> Pfn {
        self.0
    }
}

/// A table page that belongs to whoever holds this: zero-filled, linked nowhere.
///
/// Not `Clone`: a page is in one cache, one tree or one obligation. It is made by [`TablePage::from_frame`] and leaves
/// the crate again by [`TablePage::into_frame`]; one that is dropped is leaked.
#[derive(Debug)]
#[must_use = "a dropped table page is leaked"]
pub struct TablePage(Pfn);

impl TablePage {
    /// Gives the frame back to its allocator.
    #[inline]
    pub const fn into_frame(self) -> Pfn {
        self.0
    }

    #[inline]
    pub(crate) const fn owned(pfn: Pfn) -> Self {
        Self(pfn)
    }
}
