//! The one module with unsafe code: it turns a table page's frame number into a reference.
//!
//! Soundness, in four steps. (1) A frame enters the crate only by [`TablePage::from_frame`], whose caller promises that
//! it is RAM that nothing else uses, and [`PhysTables::new`]'s caller promises that all such RAM is mapped, writable, at
//! a constant offset. (2) A [`TableFrame`] is made only by this crate, from an entry of a live tree or from an owned
//! page, and cannot be copied; the reference made from it does not outlive it. (3) A frame leaves the crate only as a
//! `TablePage` from a cache, from dismantling a kind (which consumes the kind) or from reclamation, which waits until no
//! operation that could have seen the page linked is still running (see [`Shootdown`](crate::Shootdown)). (4) All
//! accesses are atomic, so the hardware walker setting accessed and dirty bits is no data race.
#![allow(unsafe_code)]
use core::sync::atomic::{fence, AtomicU64, Ordering};

use super::{EntryCell, TableFrame, TableMemory, TablePage};
use crate::addr::Pfn;
use crate::level::ENTRIES;

/// A page-table entry in memory.
#[repr(transparent)]
#[derive(Debug, Default)]
pub struct HwEntry(AtomicU64);

impl HwEntry {
    /// A cell that holds `entry`.
    pub const fn new(entry: u64) -> Self {
        Self(AtomicU64::new(entry))
    }
}

impl EntryCell for HwEntry {
    #[inline]
    fn load(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    #[inline]
    fn store(&self, entry: u64) {
        self.0.store(entry, Ordering::Relaxed);
    }
    #[inline]
    fn swap(&self, entry: u64) -> u64 {
        self.0.swap(entry, Ordering::Relaxed)
    }
    #[inline]
    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        self.0.compare_exchange(current, new, Ordering::Relaxed, Ordering::Relaxed).map(drop)
    }
    #[inline]
    fn fence(order: Ordering) {
        fence(order);
    }
}

/// Table memory reached through a direct map: physical address plus a constant.
#[derive(Debug)]
pub struct PhysTables {
    offset: u64,
}

impl PhysTables {
    /// Table memory whose frames are mapped at their physical address plus `offset`.
    ///
    /// # Safety
    ///
    /// As long as this value lives, every frame that is handed to a kind over it (as a [`TablePage`]) is mapped there,
    /// readable and writable, as write-back memory.
    #[inline]
    pub const unsafe fn new(offset: u64) -> Self {
        Self { offset }
    }
}

impl TableMemory for PhysTables {
    type Cell = HwEntry;

    #[inline]
    fn cell<'a>(&'a self, table: &'a TableFrame, index: usize) -> &'a HwEntry {
        let address = self.offset.wrapping_add(table.pfn().hpa().bits());
        let page = core::ptr::with_exposed_provenance::<[HwEntry; ENTRIES]>(address as usize);
        // SAFETY: by steps 1 to 3 above the page is mapped here, is table memory as long as `table` lives, is page
        // aligned, and any bit pattern is an entry; by step 4 shared access is all there ever is.
        let page = unsafe { &*page };
        &page[index % ENTRIES]
    }
}

impl TablePage {
    /// Makes frame `pfn` a table page.
    ///
    /// # Safety
    ///
    /// The frame is RAM, filled with zeros, that nothing else uses until [`TablePage::into_frame`] gives it back, and
    /// is reachable through the [`TableMemory`] of the kind it will be used for.
    #[inline]
    pub const unsafe fn from_frame(pfn: Pfn) -> Self {
        Self::owned(pfn)
    }
}

const _: () = assert!(size_of::<[HwEntry; ENTRIES]>() == 4096);
