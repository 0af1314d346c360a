//! The invalidation sequence: a frame that was resolved before its backing changed is never mapped afterwards.
use crate::addr::{Gfn, GfnRange};
use crate::level::PageSize;
use crate::mutant::{self, Mutant};
use crate::sync::{AtomicU64, Ordering};

/// A moment in the life of the backing, taken before a frame is resolved and compared when it is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidationSeq(u64);

/// Invalidations in progress and the number of those that ended.
///
/// They begin under the exclusive guard, so a holder of either guard never sees one begin; they may end at any time.
#[derive(Debug)]
pub(crate) struct Invalidations {
    sequence: AtomicU64,
    in_progress: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

impl Invalidations {
    pub(super) fn new() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            in_progress: AtomicU64::new(0),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
        }
    }

    #[inline]
    pub(crate) fn sequence(&self) -> InvalidationSeq {
        InvalidationSeq(self.sequence.load(Ordering::Acquire))
    }

    /// The moment that the backing is in, if no invalidation is in progress anywhere.
    #[inline]
    pub(crate) fn settled(&self) -> Option<InvalidationSeq> {
        (self.in_progress.load(Ordering::Acquire) == 0).then(|| self.sequence())
    }

    /// Whether an invalidation is in progress anywhere. Under a guard none begins.
    #[inline]
    pub(crate) fn any_in_progress(&self) -> bool {
        self.in_progress.load(Ordering::Acquire) != 0
    }

    /// Whether something that was resolved at `then` may no longer be mapped in the block of `size` around `gfn`.
    #[inline]
    pub(crate) fn is_stale(&self, then: InvalidationSeq, gfn: Gfn, size: PageSize) -> bool {
        if mutant::is(Mutant::NeverStale) {
            return false;
        }
        // In this order: an invalidation that ends in between has raised the sequence before it left the count.
        if self.in_progress.load(Ordering::Acquire) != 0 {
            let start = self.start.load(Ordering::Relaxed);
            let end = self.end.load(Ordering::Relaxed);
            let first = gfn.number() & !(size.pages() - 1);
            if start < first + size.pages() && first < end {
                return true;
            }
        }
        self.sequence() != then && !mutant::is(Mutant::StaleInstalled)
    }

    /// Everything resolved so far is stale. The caller has the VM for itself.
    pub(super) fn advance(&self) {
        self.sequence.fetch_add(1, Ordering::Release);
    }

    /// The caller has the VM for itself.
    pub(super) fn begin(&self, range: GfnRange) -> Invalidation<'_> {
        let (mut start, mut end) = (range.start(), range.end());
        if self.in_progress.fetch_add(1, Ordering::Acquire) != 0 && !mutant::is(Mutant::InvalidationsApart) {
            start = start.min(self.start.load(Ordering::Relaxed));
            end = end.max(self.end.load(Ordering::Relaxed));
        }
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        Invalidation { of: self }
    }
}

/// An invalidation in progress; dropping it ends it.
#[derive(Debug)]
#[must_use = "dropping an invalidation ends it"]
pub struct Invalidation<'m> {
    of: &'m Invalidations,
}

impl Drop for Invalidation<'_> {
    fn drop(&mut self) {
        if !mutant::is(Mutant::InvalidationEndsQuietly) {
            self.of.advance();
        }
        self.of.in_progress.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: PageSize = PageSize::Size4K;

    fn gfn(number: u64) -> Gfn {
        Gfn::new_truncate(number)
    }

    fn range(start: u64, pages: u64) -> GfnRange {
        GfnRange::new(gfn(start), pages).unwrap()
    }

    #[test]
    fn a_snapshot_taken_before_or_during_is_stale_for_good() {
        let all = Invalidations::new();
        let before = all.sequence();
        assert!(!all.is_stale(before, gfn(5), SMALL));
        let invalidation = all.begin(range(5, 1));
        let during = all.sequence();
        assert!(all.is_stale(before, gfn(5), SMALL) && all.is_stale(during, gfn(5), SMALL));
        assert!(!all.is_stale(during, gfn(6), SMALL), "other pages go on");
        assert!(all.is_stale(during, gfn(6), PageSize::Size2M), "but not as one with this one");
        assert!(!all.is_stale(during, gfn(512), PageSize::Size2M));
        drop(invalidation);
        assert!(all.is_stale(before, gfn(5), SMALL) && all.is_stale(during, gfn(5), SMALL));
        assert!(!all.is_stale(all.sequence(), gfn(5), SMALL));
    }

    #[test]
    fn the_backing_is_settled_only_while_nothing_invalidates() {
        let all = Invalidations::new();
        let before = all.settled();
        assert!(before.is_some());
        let invalidation = all.begin(range(5, 1));
        assert_eq!(all.settled(), None);
        drop(invalidation);
        assert!(all.settled().is_some() && all.settled() != before);
        let now = all.settled();
        all.advance();
        assert_ne!(all.settled(), now, "a change of the slots counts, too");
    }

    #[test]
    fn overlapping_invalidations_cover_both_ranges() {
        let all = Invalidations::new();
        let first = all.begin(range(10, 1));
        let second = all.begin(range(20, 1));
        drop(first);
        assert!(all.is_stale(all.sequence(), gfn(10), SMALL) && all.is_stale(all.sequence(), gfn(20), SMALL));
        drop(second);
        assert!(!all.is_stale(all.sequence(), gfn(20), SMALL));
    }
}
