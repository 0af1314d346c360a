//! Kinds: what is needed to operate on page tables. A kind belongs to a VM and never sees a vCPU.
mod beside;
mod collapse;
mod counters;
mod direct;
mod fast;
mod fault;
mod flush;
mod mmio;
mod nx;
mod populate;
mod roots;
mod shadow;
mod split;
mod sweep;

pub use beside::Beside;
pub use counters::PageCounts;
pub use direct::{Direct, DirectMmu};
pub use fault::{FaultOutcome, Resolution};
pub use flush::{Flush, Issued};
pub use populate::PopulateProgress;
pub use roots::{DirectRole, NoRoot, Root, MAX_ROOTS};
pub(crate) use shadow::Near;
pub use shadow::{
    NearFault, NoShadowRoot, Shadow, ShadowBucket, ShadowCheck, ShadowDone, ShadowFault, ShadowMmu,
    ShadowPage, ShadowStore, WalkMarks, ZapProgress,
};
pub use split::SplitProgress;
pub use sweep::Sweep;

use crate::cpu::CpuId;
use crate::format::EntryFormat;
use crate::memory::{Held, VmId, VmMemory};
use crate::tables::{TableFrame, TableMemory};
use counters::Counters;
use flush::Freed;

/// Page tables of one VM: the format of their entries, the memory they are in, and (in `O`) what distinguishes this
/// kind's operations from another's.
///
/// Entries change by compare-exchange only, so that every operation that takes a [`Held`] guard runs beside every other.
/// A table that leaves the tree is frozen entry by entry; who still walks it finds nothing to change.
#[derive(Debug)]
pub struct MmuKind<F, M, O> {
    vm: VmId,
    format: F,
    tables: M,
    freed: Freed,
    counters: Counters,
    ops: O,
}

impl<F: EntryFormat, M: TableMemory, O> MmuKind<F, M, O> {
    /// The format of the entries.
    pub const fn format(&self) -> &F {
        &self.format
    }

    /// The memory the tables are in.
    pub const fn tables(&self) -> &M {
        &self.tables
    }

    /// Pages mapped and tables in use, summed over all CPUs. Exact when no operation is running.
    pub fn page_counts(&self) -> PageCounts {
        self.counters.sum()
    }

    /// The entry at `index` of `table`.
    #[inline]
    fn cell<'a>(&'a self, table: &'a TableFrame, index: usize) -> &'a M::Cell {
        self.tables.cell(table, index)
    }

    /// The CPU of `guard`, which must be a guard of this kind's VM: what protects the tables is that VM's protocol.
    #[inline]
    fn admit<'m, B: 'm>(&self, guard: &impl Held<'m, B>) -> CpuId {
        assert!(guard.memory().id() == self.vm, "a guard of another VM");
        guard.cpu()
    }

    /// Starts a flush obligation towards `memory`'s CPUs.
    #[inline]
    fn obligation<'a, B: 'a>(&'a self, memory: &'a VmMemory<B>) -> Flush<'a, F, M> {
        Flush::new(&self.format, &self.tables, &self.freed, memory.shootdown())
    }
}
