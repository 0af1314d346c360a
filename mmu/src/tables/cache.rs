//! What a vCPU brings to a fault: table pages got beforehand, and its fault counters.
use super::TablePage;
use crate::addr::Pfn;

/// Table pages that a fault can need at most: one for each level below a five-level root.
const CAPACITY: usize = 4;

/// Table pages for faults, topped up outside the fault path so that a fault never allocates.
///
/// ```text
/// while cache.missing() > 0 { cache.push(allocate_zeroed_page()?) }
/// ```
///
/// Pages still inside when it is dropped are leaked: [`pop`](Self::pop) them first.
#[derive(Debug, Default)]
pub struct TableCache {
    pages: [Pfn; CAPACITY],
    len: usize,
    pub(crate) stats: FaultStats,
}

impl TableCache {
    /// An empty cache.
    pub const fn new() -> Self {
        Self { pages: [Pfn::new_truncate(0); CAPACITY], len: 0, stats: FaultStats::ZERO }
    }

    /// How many pages are missing from a full cache.
    #[inline]
    pub const fn missing(&self) -> usize {
        CAPACITY - self.len
    }

    /// Adds a page; gives it back when the cache is full.
    #[inline]
    pub fn push(&mut self, page: TablePage) -> Result<(), TablePage> {
        match self.pages.get_mut(self.len) {
            Some(place) => {
                *place = page.into_frame();
                self.len += 1;
                Ok(())
            }
            None => Err(page),
        }
    }

    /// Takes a page out, to give it back to the allocator.
    #[inline]
    pub fn pop(&mut self) -> Option<TablePage> {
        let len = self.len.checked_sub(1)?;
        let pfn = *self.pages.get(len)?;
        self.len = len;
        Some(TablePage::owned(pfn))
    }

    /// Counters of the faults that used this cache.
    #[inline]
    pub const fn stats(&self) -> &FaultStats {
        &self.stats
    }

    /// The `count` pages that would be taken next, still in the cache; `None` if there are fewer.
    #[inline]
    pub(crate) fn peek(&self, count: usize) -> Option<&[Pfn]> {
        let start = self.len.checked_sub(count)?;
        self.pages.get(start..self.len)
    }

    /// Forgets the `count` pages that [`peek`](Self::peek) showed: they are in a tree now.
    #[inline]
    pub(crate) fn consume(&mut self, count: usize) {
        self.len -= count.min(self.len);
    }
}

/// How faults ended, counted by vCPU so that counting shares no cache line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultStats {
    /// A mapping was made or its write permission restored.
    pub mapped: u64,
    /// Of these and of the spurious ones, those that the fast path handled.
    pub fast: u64,
    /// The mapping was there already.
    pub spurious: u64,
    /// Another CPU or an invalidation was in the way.
    pub retry: u64,
    /// No slot: the access must be emulated.
    pub mmio: u64,
    /// A write to a read-only slot.
    pub read_only: u64,
    /// A write to a page whose writes are tracked.
    pub write_tracked: u64,
    /// The cache had too few pages.
    pub need_tables: u64,
    /// The address was beyond the guest's physical address space.
    pub out_of_range: u64,
}

impl FaultStats {
    const ZERO: Self = Self {
        mapped: 0,
        fast: 0,
        spurious: 0,
        retry: 0,
        mmio: 0,
        read_only: 0,
        write_tracked: 0,
        need_tables: 0,
        out_of_range: 0,
    };
}
