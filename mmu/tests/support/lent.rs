//! Memory that a test lends as if for ever, and takes back at its end: a fuzz target runs it a million times.
#![allow(unsafe_code)] // The borrow checker cannot know that a model is at its end.

use mmu::{ShadowBucket, ShadowPage, ShadowStore};

/// A box that is referred to as `'static`. It leaks if it is not taken back.
pub struct Lent<T: ?Sized>(*mut T);

impl<T: ?Sized> Lent<T> {
    pub fn new(what: Box<T>) -> (Self, &'static mut T) {
        let what = Box::into_raw(what);
        // SAFETY: it was a box, and stays allocated until `take_back`, whose caller answers for the reference.
        (Self(what), unsafe { &mut *what })
    }

    /// Gives it back.
    ///
    /// # Safety
    ///
    /// Nobody uses the reference any more, nor what was made from it.
    pub unsafe fn take_back(self) -> Box<T> {
        // SAFETY: it came from a box, and by the caller's promise nothing else refers to it.
        unsafe { Box::from_raw(self.0) }
    }
}

/// The store of a shadow kind.
pub struct LentStore {
    pages: Lent<[ShadowPage]>,
    buckets: Lent<[ShadowBucket]>,
}

impl LentStore {
    pub fn new(quota: usize) -> (Self, ShadowStore<'static>) {
        let all: Box<[_]> = (0..quota).map(|_| ShadowPage::UNUSED).collect();
        let (pages, lent_pages) = Lent::new(all);
        let (buckets, lent_buckets) = Lent::new(vec![ShadowBucket::EMPTY; quota / 2 + 1].into_boxed_slice());
        (Self { pages, buckets }, ShadowStore { pages: lent_pages, buckets: lent_buckets })
    }

    /// Frees it.
    ///
    /// # Safety
    ///
    /// The kind is gone.
    pub unsafe fn take_back(self) {
        // SAFETY: the kind had the only references.
        unsafe { drop((self.pages.take_back(), self.buckets.take_back())) };
    }
}
