//! A spin lock that keeps interrupts off while it is held, so that an interrupt handler cannot wait for its own CPU.

use core::ops::{Deref, DerefMut};
use spin::mutex::{SpinMutex, SpinMutexGuard};
use x86_64::instructions::interrupts;

/// A value behind a spin lock whose holder runs with interrupts off. NMIs still come: their handler only tries.
pub struct IrqMutex<T> {
    inner: SpinMutex<T>,
}

impl<T> IrqMutex<T> {
    /// A free lock around `value`.
    pub const fn new(value: T) -> Self {
        Self { inner: SpinMutex::new(value) }
    }

    /// Waits for the lock.
    pub fn lock(&self) -> IrqGuard<'_, T> {
        let restore = RestoreInterrupts::disable();
        IrqGuard { guard: self.inner.lock(), _restore: restore }
    }

    /// Tries `attempts` times.
    pub fn try_lock(&self, attempts: u32) -> Option<IrqGuard<'_, T>> {
        let restore = RestoreInterrupts::disable();
        for _ in 0..attempts {
            if let Some(guard) = self.inner.try_lock() {
                return Some(IrqGuard { guard, _restore: restore });
            }
            core::hint::spin_loop();
        }
        None
    }

    /// Frees a lock whose holder will never run again.
    ///
    /// # Safety
    /// No CPU may go on using a guard of this lock.
    #[allow(unsafe_code)] // Hands the promise on to the lock inside.
    pub unsafe fn force_unlock(&self) {
        // SAFETY: promised by the caller.
        unsafe { self.inner.force_unlock() }
    }
}

/// Access to the value; the lock is free and interrupts are as before once this is dropped.
pub struct IrqGuard<'a, T> {
    // Dropped in this order: first the lock, then interrupts.
    guard: SpinMutexGuard<'a, T>,
    _restore: RestoreInterrupts,
}

impl<T> Deref for IrqGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for IrqGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

struct RestoreInterrupts {
    were_enabled: bool,
}

impl RestoreInterrupts {
    fn disable() -> Self {
        let were_enabled = interrupts::are_enabled();
        if were_enabled {
            interrupts::disable();
        }
        Self { were_enabled }
    }
}

impl Drop for RestoreInterrupts {
    fn drop(&mut self) {
        if self.were_enabled {
            interrupts::enable();
        }
    }
}
