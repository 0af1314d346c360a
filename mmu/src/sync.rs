//! The atomics that order one CPU's work against another's. `tests/loom.rs` compiles the crate's sources with a model
//! checker's in their place, so what is modelled is what runs.
//!
//! Where two CPUs each write one word and then read the other's (store buffering), the accesses are relaxed and stand
//! around a `fence(SeqCst)`: model and hardware agree about that, which `tests/loom.rs` proves first.
pub(crate) use core::hint::spin_loop;
pub(crate) use core::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64, Ordering};
