//! Huge pages that are not executable, against processors that can be made to fail by instruction fetches from a page
//! whose size changes (CVE-2018-12207, "iTLB multihit").
//!
//! A fetch from such a page faults and gets a table of 4 KiB pages, of which the one is executable. That table is noted in
//! the link to it; recovery takes noted tables away again, some at a time, for the guest to have its huge pages back where it
//! no longer fetches.
use super::direct::DirectMmu;
use super::flush::Flush;
use super::sweep::{Operation, Sweep};
use crate::addr::GfnRange;
use crate::format::EntryFormat;
use crate::memory::{Backing, Exclusive, Held};
use crate::mutant::{self, Mutant};
use crate::sync::Ordering;
use crate::tables::TableMemory;

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// Makes huge pages not executable from now on, or executable again. Returns what to [`zap`](Self::zap), so that the
    /// pages that are there follow; `None` if the format cannot forbid fetches.
    pub fn forbid_huge_execute<B>(&self, guard: &mut Exclusive<'_, B>, forbid: bool) -> Option<Sweep> {
        self.admit(guard);
        if !self.format.can_forbid_fetches() {
            return None;
        }
        self.ops.no_huge_execute.store(forbid, Ordering::Relaxed);
        if !mutant::is(Mutant::ForbidKeepsResolved) {
            guard.make_stale();
        }
        Some(Sweep::over(GfnRange::ALL))
    }

    /// Whether huge pages are not executable.
    #[inline]
    pub fn forbids_huge_execute(&self) -> bool {
        self.ops.no_huge_execute.load(Ordering::Relaxed)
    }

    /// Tables that are there because a huge page must not be executable.
    pub fn execute_splits(&self) -> u64 {
        self.ops.splits.load(Ordering::Relaxed)
    }

    /// Takes one in `ratio` of those tables away (at least one), the first that `sweep` meets, so that their pages can be
    /// mapped huge again. One sweep goes through many calls: begin anew when it is done. Tables of logged slots stay.
    pub fn recover_huge_pages<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
        ratio: u64,
    ) -> Flush<'a, F, M> {
        let ratio = if mutant::is(Mutant::RecoverAll) { 1 } else { ratio.max(1) };
        let limit = self.execute_splits().div_ceil(ratio);
        self.sweep(guard, sweep, Operation::Recover { limit })
    }

    /// Links with a note come, or go.
    pub(super) fn count_splits(&self, change: i64) {
        self.ops.splits.fetch_add(change as u64, Ordering::Relaxed);
    }
}
