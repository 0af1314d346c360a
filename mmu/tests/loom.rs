//! The lock-free protocols under a model checker: every interleaving of two or three CPUs, with every value that a relaxed
//! load may see.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p mmu --test loom --release`, with a part of a name to run some. Built otherwise,
//! there is nothing in it. What is modelled is the crate's own source, compiled here with the checker's atomics in the
//! place of [`sync`]'s, over table memory whose first entries are the checker's.
#![cfg_attr(loom, allow(dead_code, missing_docs, unreachable_pub, unused_imports, clippy::all))]

#[cfg(loom)]
#[path = "../src/access.rs"]
mod access;
#[cfg(loom)]
#[path = "../src/addr.rs"]
mod addr;
#[cfg(loom)]
#[path = "../src/cpu.rs"]
mod cpu;
#[cfg(loom)]
#[path = "../src/format/mod.rs"]
mod format;
#[cfg(loom)]
#[path = "../src/kind/mod.rs"]
mod kind;
#[cfg(loom)]
#[path = "../src/level.rs"]
mod level;
#[cfg(loom)]
#[path = "../src/memory/mod.rs"]
mod memory;
#[cfg(loom)]
#[path = "loom/models.rs"]
mod models;
#[cfg(loom)]
#[path = "../src/mutant/mod.rs"]
mod mutant;
#[cfg(loom)]
#[path = "../src/nested/mod.rs"]
mod nested;
#[cfg(loom)]
#[path = "../src/role/mod.rs"]
mod role;
#[cfg(loom)]
#[path = "../src/tables/mod.rs"]
mod tables;
#[cfg(loom)]
#[path = "../src/vcpu/mod.rs"]
mod vcpu;
#[cfg(loom)]
#[path = "../src/walk/mod.rs"]
mod walk;

/// The checker's atomics, under the names of `src/sync.rs`.
#[cfg(loom)]
mod sync {
    pub(crate) use loom::hint::spin_loop;
    pub(crate) use loom::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64, Ordering};
    pub(crate) fn fence_after_update() {
        fence(Ordering::SeqCst);
    }
}

#[cfg(not(loom))]
fn main() {}

#[cfg(loom)]
fn main() {
    models::main();
}
