//! Memory that a test lends as if for ever, and takes back at its end: a fuzz target runs it a million times.
#![allow(unsafe_code)] // The borrow checker cannot know that a model is at its end.

/// A box that is referred to as `'static`. It leaks if it is not taken back.
pub struct Lent<T: ?Sized>(*mut T);

impl<T: ?Sized> Lent<T> {
    pub fn new(what: Box<T>) -> (Self, &'static mut T) {
        let what = Box::into_raw(what);
        // SAFETY: it was a box, and stays allocated until `take_back`, whose caller answers for the reference.
        (Self(what), unsafe { &mut *what })
    }

    /// Frees it.
    ///
    /// # Safety
    ///
    /// Nobody uses the reference any more, nor what was made from it.
    pub unsafe fn take_back(self) {
        // SAFETY: it came from a box, and by the caller's promise nothing else refers to it.
        drop(unsafe { Box::from_raw(self.0) });
    }
}
