//! Page counters of a kind, one cache line a CPU.
// Statistics: not the atomics of `crate::sync`, for nothing here orders anything.
use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::{CpuId, MAX_CPUS};
use crate::level::{Level, PageSize};

/// What a kind has mapped and what that costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Leaves by size: 4 KiB, 2 MiB, 1 GiB.
    pub leaves: [u64; 3],
    /// Table pages in the tree, the root included.
    pub tables: u64,
}

impl PageCounts {
    /// Leaves of one size.
    pub const fn of(&self, size: PageSize) -> u64 {
        self.leaves[size.level().ordinal()]
    }
}

/// Differences, wrapping: what one CPU maps another may zap. Only the sum means something.
#[derive(Debug, Default)]
#[repr(align(64))]
struct CpuCounters {
    leaves: [AtomicU64; 3],
    tables: AtomicU64,
}

impl CpuCounters {
    const fn new() -> Self {
        Self { leaves: [const { AtomicU64::new(0) }; 3], tables: AtomicU64::new(0) }
    }
}

#[derive(Debug)]
pub(super) struct Counters {
    cpus: [CpuCounters; MAX_CPUS],
}

impl Counters {
    pub(super) const fn new() -> Self {
        Self { cpus: [const { CpuCounters::new() }; MAX_CPUS] }
    }

    /// Counts leaves of tables at `level` in or out.
    #[inline]
    pub(super) fn leaves(&self, cpu: CpuId, level: Level, change: i64) {
        if let Some(counter) = self.cpus[cpu.number()].leaves.get(level.ordinal()) {
            add(counter, change);
        }
    }

    /// Counts tables in or out.
    #[inline]
    pub(super) fn tables(&self, cpu: CpuId, change: i64) {
        add(&self.cpus[cpu.number()].tables, change);
    }

    pub(super) fn sum(&self) -> PageCounts {
        let mut sum = PageCounts::default();
        for cpu in &self.cpus {
            for (total, counter) in sum.leaves.iter_mut().zip(&cpu.leaves) {
                *total = total.wrapping_add(counter.load(Ordering::Relaxed));
            }
            sum.tables = sum.tables.wrapping_add(cpu.tables.load(Ordering::Relaxed));
        }
        sum
    }
}

/// No locked add, for the line is one CPU's, and that holds one guard at a time: a wrong CPU number costs a count.
#[inline]
fn add(counter: &AtomicU64, change: i64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(change as u64), Ordering::Relaxed);
}
