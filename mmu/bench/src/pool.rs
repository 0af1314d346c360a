//! Table pages: host memory, whose addresses stand for frames (a direct map at zero). Nobody gives one back; a measurement
//! takes from the start again.
use std::arch::x86_64::{__m128i, _mm_setzero_si128};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;

use mmu::{Pfn, TableCache, TablePage, PAGE_SIZE};

/// A run of pages that are handed out in order.
pub(crate) struct Pool {
    start: u64,
    pages: u64,
    next: AtomicU64,
}

#[derive(Clone)]
#[repr(align(4096))]
struct Page(#[allow(dead_code)] [u8; PAGE_SIZE as usize]);

impl Pool {
    /// A pool of `pages` pages, never freed.
    pub(crate) fn new(pages: u64) -> Self {
        let memory = Box::leak(vec![Page([0; PAGE_SIZE as usize]); pages as usize].into_boxed_slice());
        Self { start: memory.as_mut_ptr().expose_provenance() as u64, pages, next: AtomicU64::new(0) }
    }

    /// The pool of everything that has but one thread. A gigabyte takes 515 pages, in the format of any crate.
    pub(crate) fn common() -> &'static Self {
        static POOL: OnceLock<Pool> = OnceLock::new();
        POOL.get_or_init(|| Self::new(1024))
    }

    /// All pages are free again: what was made of them is used no more.
    pub(crate) fn reset(&self) {
        self.next.store(0, Ordering::Relaxed);
    }

    /// The address of a page with anything in it.
    #[inline]
    pub(crate) fn take(&self) -> Option<u64> {
        let next = self.next.load(Ordering::Relaxed);
        self.next.store(next + 1, Ordering::Relaxed);
        (next < self.pages).then_some(self.start + next * PAGE_SIZE)
    }

    /// A page of zeros, as a table of `mmu`.
    #[inline]
    pub(crate) fn table_page(&self) -> TablePage {
        let address = self.take().expect("the pool is large enough");
        zero(address);
        // SAFETY: so it does nothing else, and its address stands for its frame.
        unsafe { TablePage::from_frame(Pfn::new_truncate(address / PAGE_SIZE)) }
    }

    /// Fills a cache up.
    #[inline]
    pub(crate) fn fill(&self, cache: &mut TableCache) {
        while cache.missing() > 0 {
            cache.push(self.table_page()).expect("a page is missing");
        }
    }
}

/// Fills a page of the pool with zeros as Umbra's kernel does, sixteen bytes an instruction. (A string instruction would
/// count as one for each byte.)
#[inline]
fn zero(address: u64) {
    let page: *mut __m128i = std::ptr::with_exposed_provenance_mut(address as usize);
    for at in 0..PAGE_SIZE as usize / size_of::<__m128i>() {
        // SAFETY: the pool owns the page, and hands it out once until it is reset.
        unsafe { page.add(at).write_volatile(_mm_setzero_si128()) };
    }
}
