//! A cell for statics that the processor or several of our own contexts share.
use core::cell::UnsafeCell;

/// A static that hands out raw pointers only; who writes when is up to the code around it.
#[repr(transparent)]
pub struct Racy<T>(UnsafeCell<T>);

// SAFETY: the cell gives out raw pointers only, so it can be named from every context; each dereference has to
// justify itself.
unsafe impl<T> Sync for Racy<T> {}

impl<T> Racy<T> {
    /// Wraps `value`.
    pub const fn new(value: T) -> Racy<T> {
        Racy(UnsafeCell::new(value))
    }

    /// The address of the value.
    pub const fn get(&self) -> *mut T {
        self.0.get()
    }

    /// The address of the value as a number; memory is identity-mapped.
    pub fn addr(&self) -> u64 {
        self.0.get() as u64
    }
}
