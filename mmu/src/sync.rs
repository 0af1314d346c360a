//! The atomics that order one CPU's work against another's. `tests/loom.rs` compiles the crate's sources with a model
//! checker's in their place, so what is modelled is what runs.
//!
//! Where two CPUs each write one word and then read the other's (store buffering), the accesses are relaxed and stand
//! around a `fence(SeqCst)`: model and hardware agree about that, which `tests/loom.rs` proves first.
pub(crate) use core::hint::spin_loop;
pub(crate) use core::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64, Ordering};

/// A `fence(SeqCst)` right after an atomic read-modify-write. On x86-64 that is a locked instruction, across which no load
/// and no store moves (Intel SDM vol. 3, 9.2.3.9; AMD APM vol. 2, 7.2), so there only the compiler needs to be told; another
/// locked instruction would cost as much again.
#[inline(always)]
pub(crate) fn fence_after_update() {
    if cfg!(all(target_arch = "x86_64", not(miri))) {
        core::sync::atomic::compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}
