//! Sets of physical address ranges: sorted, disjoint, merged, of bounded size and without a heap.

use arrayvec::ArrayVec;
use core::fmt;

/// Size of a small page and of a frame.
pub const PAGE_SIZE: u64 = 4096;

/// Most ranges one set can hold. Firmware maps have a few dozen entries.
const CAPACITY: usize = 256;

/// A half-open range of physical addresses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// First address beyond the range.
    pub end: u64,
}

impl Range {
    /// The range `start..end`; an end below the start makes it empty.
    pub const fn new(start: u64, end: u64) -> Self {
        Self { start, end: if end < start { start } else { end } }
    }

    /// The range of `len` bytes from `start`, cut off at the end of the address space.
    pub const fn from_len(start: u64, len: u64) -> Self {
        Self { start, end: start.saturating_add(len) }
    }

    /// Size in bytes.
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether the range holds no address.
    pub const fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Whether all of `other` lies in this range.
    pub const fn contains(&self, other: Range) -> bool {
        other.start >= self.start && other.end <= self.end
    }

    /// What both ranges share.
    pub fn intersect(&self, other: Range) -> Range {
        Range::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The whole pages inside the range.
    pub const fn shrink_to_pages(&self) -> Range {
        let start = match self.start.checked_add(PAGE_SIZE - 1) {
            Some(start) => start & !(PAGE_SIZE - 1),
            None => return Range { start: self.start, end: self.start },
        };
        Range::new(start, self.end & !(PAGE_SIZE - 1))
    }

    /// The pages the range touches. The last page of the address space cannot be named by a half-open range.
    pub const fn grow_to_pages(&self) -> Range {
        let end = self.end.saturating_add(PAGE_SIZE - 1) & !(PAGE_SIZE - 1);
        Range::new(self.start & !(PAGE_SIZE - 1), end)
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// The set is full; nothing was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A set of addresses, kept as sorted disjoint ranges that do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: ArrayVec<Range, CAPACITY>,
}

impl RangeSet {
    /// The empty set.
    pub const fn new() -> Self {
        Self { ranges: ArrayVec::new_const() }
    }

    /// The ranges in ascending order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = Range> + '_ {
        self.ranges.iter().copied()
    }

    /// Sum of all range sizes in bytes.
    pub fn total(&self) -> u64 {
        self.iter().map(|range| range.len()).sum()
    }

    /// Whether every address of `range` is in the set; true for an empty range.
    pub fn contains(&self, range: Range) -> bool {
        let after = self.ranges.partition_point(|r| r.start <= range.start);
        range.is_empty() || (after > 0 && self.ranges[after - 1].contains(range))
    }

    /// Adds `range`.
    pub fn insert(&mut self, range: Range) -> Result<(), Full> {
        if range.is_empty() {
            return Ok(());
        }
        // Everything that overlaps or touches the new range becomes part of it.
        let first = self.ranges.partition_point(|r| r.end < range.start);
        let last = self.ranges.partition_point(|r| r.start <= range.end);
        if first == last {
            return self.ranges.try_insert(first, range).map_err(|_| Full);
        }
        let merged =
            Range::new(range.start.min(self.ranges[first].start), range.end.max(self.ranges[last - 1].end));
        self.ranges[first] = merged;
        self.ranges.drain(first + 1..last);
        Ok(())
    }

    /// Adds `range`; where there is no room, in place of the smallest ranges if they are smaller. [`Full`] says that
    /// something was lost.
    pub fn insert_or_replace(&mut self, range: Range) -> Result<(), Full> {
        if self.insert(range).is_ok() {
            return Ok(());
        }
        let smallest =
            self.iter().min_by_key(|range| range.len()).filter(|smallest| smallest.len() < range.len());
        if let Some(smallest) = smallest {
            self.remove(smallest);
            let _ = self.insert(range);
        }
        Err(Full)
    }

    /// Takes out what is not in `other`, and says whether there was any.
    pub fn keep_within(&mut self, other: &RangeSet) -> bool {
        let outside = |set: &Self| {
            set.iter().find_map(|range| {
                if other.contains(range) {
                    return None;
                }
                // The first gap of `other` within the range.
                let mut at = range.start;
                for inside in
                    other.iter().map(|inside| inside.intersect(range)).filter(|inside| !inside.is_empty())
                {
                    if inside.start > at {
                        return Some(Range::new(at, inside.start));
                    }
                    at = inside.end;
                }
                Some(Range::new(at, range.end))
            })
        };
        let mut found = false;
        while let Some(gap) = outside(self) {
            self.remove(gap);
            found = true;
        }
        found
    }

    /// Takes `range` out. Where the set cannot hold both halves of a split range, the smaller half goes too, so
    /// that nothing of `range` is ever left.
    pub fn remove(&mut self, range: Range) {
        if range.is_empty() {
            return;
        }
        let first = self.ranges.partition_point(|r| r.end <= range.start);
        let last = self.ranges.partition_point(|r| r.start < range.end);
        if first >= last {
            return;
        }
        let before = Range::new(self.ranges[first].start, range.start);
        let after = Range::new(range.end, self.ranges[last - 1].end);
        self.ranges.drain(first..last);
        let (larger, smaller) = if before.len() >= after.len() { (before, after) } else { (after, before) };
        for part in [larger, smaller] {
            let _ = self.insert(part);
        }
    }

    /// Takes `len` bytes, aligned to `align` (a power of two), from the end of the largest range within `within`.
    pub fn take(&mut self, len: u64, align: u64, within: Range) -> Option<Range> {
        debug_assert!(align.is_power_of_two());
        let candidate = self.iter().map(|range| range.intersect(within)).max_by_key(|range| range.len())?;
        let start = candidate.end.checked_sub(len)? & !(align - 1);
        if start < candidate.start || len == 0 {
            return None;
        }
        let taken = Range::from_len(start, len);
        self.remove(taken);
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set(ranges: &[(u64, u64)]) -> RangeSet {
        let mut set = RangeSet::new();
        for &(start, end) in ranges {
            set.insert(Range::new(start, end)).unwrap();
        }
        set
    }

    #[test]
    fn touching_and_overlapping_ranges_become_one() {
        assert_eq!(set(&[(10, 20), (20, 30), (5, 11)]), set(&[(5, 30)]));
        assert_eq!(set(&[(10, 20), (30, 40), (0, 50)]), set(&[(0, 50)]));
        assert_eq!(set(&[(10, 20), (22, 30)]).iter().count(), 2);
    }

    #[test]
    fn removal_splits() {
        let mut s = set(&[(0, 100)]);
        s.remove(Range::new(40, 50));
        assert_eq!(s, set(&[(0, 40), (50, 100)]));
        s.remove(Range::new(0, 60));
        assert_eq!(s, set(&[(60, 100)]));
    }

    #[test]
    fn a_full_set_loses_memory_rather_than_a_reservation() {
        let mut s = RangeSet::new();
        for i in 0..CAPACITY as u64 {
            s.insert(Range::from_len(i * 100, 90)).unwrap();
        }
        assert_eq!(s.insert(Range::from_len(CAPACITY as u64 * 100, 1)), Err(Full));
        s.remove(Range::new(10, 20));
        assert!(!s.contains(Range::new(10, 11)) && !s.contains(Range::new(0, 1)));
        assert!(s.contains(Range::new(20, 90)));
    }

    #[test]
    fn a_full_set_prefers_the_larger() {
        let mut s = RangeSet::new();
        for i in 0..CAPACITY as u64 {
            s.insert(Range::from_len(i * 100, 50 + i % 7)).unwrap();
        }
        let large = Range::from_len(1 << 20, 1000);
        assert_eq!(s.insert_or_replace(large), Err(Full));
        assert!(s.contains(large) && !s.contains(Range::from_len(0, 50)));
        assert_eq!(s.insert_or_replace(Range::from_len(1 << 30, 1)), Err(Full));
        assert!(!s.contains(Range::from_len(1 << 30, 1)));
        assert_eq!(
            s.insert_or_replace(Range::from_len(100, 60)),
            Ok(()),
            "one that grows another needs no room"
        );
    }

    #[test]
    fn a_set_can_be_kept_within_another() {
        let mut s = set(&[(0, 100), (200, 300), (400, 500)]);
        assert!(s.keep_within(&set(&[(10, 20), (30, 250), (400, 600)])));
        assert_eq!(s, set(&[(10, 20), (30, 100), (200, 250), (400, 500)]));
        assert!(!s.keep_within(&set(&[(0, 1000)])));
        assert!(s.keep_within(&set(&[])));
        assert_eq!(s, set(&[]));
    }

    #[test]
    fn pages_are_rounded_inward_and_outward() {
        assert_eq!(Range::new(1, 0x2fff).shrink_to_pages(), Range::new(0x1000, 0x2000));
        assert!(Range::new(1, 0xfff).shrink_to_pages().is_empty());
        assert!(Range::new(u64::MAX - 5, u64::MAX).shrink_to_pages().is_empty());
        assert_eq!(Range::new(0x1fff, 0x2001).grow_to_pages(), Range::new(0x1000, 0x3000));
    }

    #[test]
    fn take_is_aligned_and_inside() {
        let mut s = set(&[(0x1000, 0x9000), (0x10_0000, 0x90_0000), (0x1_0000_0000, 0x9_0000_0000)]);
        let below_4g = Range::new(0x10_0000, 1 << 32);
        let taken = s.take(0x3000, 0x4000, below_4g).unwrap();
        assert_eq!(taken, Range::from_len(0x8f_c000, 0x3000));
        assert!(!s.contains(Range::from_len(taken.start, 1)));
        assert_eq!(s.take(0x1000_0000, 0x1000, below_4g), None);
        assert_eq!(s.take(0, 0x1000, below_4g), None);
    }

    proptest! {
        #[test]
        fn agrees_with_a_set_of_numbers(ops in prop::collection::vec((any::<bool>(), 0u64..200, 0u64..40), 0..60)) {
            let mut ranges = RangeSet::new();
            let mut model = BTreeSet::new();
            for (insert, start, len) in ops {
                let range = Range::from_len(start, len);
                if insert {
                    ranges.insert(range).unwrap();
                    model.extend(start..start + len);
                } else {
                    ranges.remove(range);
                    for n in start..start + len {
                        model.remove(&n);
                    }
                }
                let listed: BTreeSet<u64> = ranges.iter().flat_map(|r| r.start..r.end).collect();
                prop_assert_eq!(&listed, &model);
                prop_assert_eq!(ranges.total(), model.len() as u64);
                let all: Vec<Range> = ranges.iter().collect();
                prop_assert!(all.windows(2).all(|w| w[0].end < w[1].start));
            }
        }
    }
}
