//! The machine's memory map: what firmware and loader reported, made consistent.

use super::ranges::{Full, Range, RangeSet};

/// What a region of the firmware's map is to Umbra.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Free memory.
    Usable,
    /// Memory that holds something of ours: the image, the ramdisk, boot information.
    Occupied,
    /// Not ours: firmware, ACPI tables, devices, or unknown.
    Reserved,
}

/// Memory sorted by use. Where regions of the firmware's map overlap, the stricter kind wins.
#[derive(Debug, Default)]
pub struct MemoryMap {
    /// Free memory.
    pub usable: RangeSet,
    /// All memory that is ours, free or occupied: what the physical map covers.
    pub ram: RangeSet,
    /// Whether regions were lost because the map has too many.
    pub truncated: bool,
}

/// Sizes for the log and for [`Machine`](crate::machine::Machine).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemorySummary {
    /// All memory that is ours, in bytes.
    pub ram_bytes: u64,
    /// The part of it that was free when Umbra was entered.
    pub usable_bytes: u64,
    /// The part of the free memory that lies below 4 GiB.
    pub usable_below_4g_bytes: u64,
    /// The largest range of the free memory.
    pub largest_bytes: u64,
}

impl MemoryMap {
    /// The empty map.
    pub const fn new() -> Self {
        Self { usable: RangeSet::new(), ram: RangeSet::new(), truncated: false }
    }

    /// The map that `regions` describe. Addresses from `limit` on are ignored.
    pub fn from_regions(regions: impl Iterator<Item = (Range, Kind)> + Clone, limit: u64) -> Self {
        let mut map = Self::new();
        let within = Range::new(0, limit);
        for (range, kind) in regions.clone() {
            let range = range.intersect(within);
            let usable = if kind == Kind::Usable { map.usable.insert_or_replace(range) } else { Ok(()) };
            let ram = if kind != Kind::Reserved { map.ram.insert_or_replace(range) } else { Ok(()) };
            map.truncated |= usable == Err(Full) || ram == Err(Full);
        }
        for (range, kind) in regions.clone() {
            if kind != Kind::Usable {
                map.usable.remove(range);
            }
        }
        for (range, _) in regions.filter(|(_, kind)| *kind == Kind::Reserved) {
            map.ram.remove(range);
        }
        // A set that overflows may lose what the other keeps; what is free must be mapped, too.
        map.truncated |= map.usable.keep_within(&map.ram);
        map
    }

    /// Sizes of the parts.
    pub fn summary(&self) -> MemorySummary {
        let below_4g = Range::new(0, 1 << 32);
        MemorySummary {
            ram_bytes: self.ram.total(),
            usable_bytes: self.usable.total(),
            usable_below_4g_bytes: self.usable.iter().map(|r| r.intersect(below_4g).len()).sum(),
            largest_bytes: self.usable.iter().map(|r| r.len()).max().unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_stricter_kind_wins_whatever_the_order() {
        let regions = [
            (Range::new(0x10_0000, 0x800_0000), Kind::Usable),
            (Range::new(0x20_0000, 0x40_0000), Kind::Occupied),
            (Range::new(0x30_0800, 0x50_0000), Kind::Reserved),
            (Range::new(0x700_0000, 0x900_0000), Kind::Usable),
        ];
        let forward = MemoryMap::from_regions(regions.into_iter(), u64::MAX);
        let backward = MemoryMap::from_regions(regions.into_iter().rev(), u64::MAX);
        assert_eq!((&forward.usable, &forward.ram), (&backward.usable, &backward.ram));
        assert!(!forward.usable.contains(Range::new(0x20_0000, 0x20_0001)));
        assert!(forward.ram.contains(Range::new(0x20_0000, 0x30_0800)));
        assert!(!forward.ram.contains(Range::new(0x30_0800, 0x30_0801)));
        // 1..2 MiB and 5..144 MiB.
        assert_eq!(forward.summary().usable_bytes, (1 + 139) << 20);
    }

    #[test]
    fn memory_beyond_the_limit_is_ignored() {
        let regions = [(Range::new(0, u64::MAX), Kind::Usable)];
        let map = MemoryMap::from_regions(regions.into_iter(), 1 << 33);
        assert_eq!(map.summary().usable_bytes, 1 << 33);
        assert_eq!(map.summary().usable_below_4g_bytes, 1 << 32);
        assert_eq!(map.summary().largest_bytes, 1 << 33);
    }

    /// Any map, so crowded at times that the sets overflow.
    fn any_regions() -> impl Strategy<Value = Vec<(Range, Kind)>> {
        let kind = prop_oneof![3 => Just(Kind::Usable), 1 => Just(Kind::Occupied), 2 => Just(Kind::Reserved)];
        let crowded = (0u64..4000, 1u64..4, kind.clone())
            .prop_map(|(page, pages, kind)| (Range::from_len(page * 0x1000, pages * 0x1000), kind));
        let any = (any::<u64>(), any::<u64>(), kind)
            .prop_map(|(start, len, kind)| (Range::from_len(start, len), kind));
        prop::collection::vec(prop_oneof![9 => crowded, 1 => any], 0..1500)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_map_makes_memory_of_what_is_not(regions in any_regions(), bits in 20u32..52) {
            let limit = 1 << bits;
            let map = MemoryMap::from_regions(regions.iter().copied(), limit);
            for range in map.usable.iter() {
                prop_assert!(range.end <= limit);
                prop_assert!(map.ram.contains(range), "{:?} is free but not mapped", range);
                for (other, kind) in &regions {
                    prop_assert!(*kind == Kind::Usable || range.intersect(*other).is_empty(), "{:?}", other);
                }
            }
        }

        #[test]
        fn the_largest_memory_is_kept(small in 1usize..900, at in 0usize..900) {
            let mut regions: Vec<_> =
                (0..small as u64).map(|n| (Range::from_len(n * 0x2000, 0x1000), Kind::Usable)).collect();
            let large = Range::new(1 << 32, 1 << 36);
            regions.insert(at.min(small), (large, Kind::Usable));
            prop_assert!(MemoryMap::from_regions(regions.into_iter(), u64::MAX).usable.contains(large));
        }
    }

    #[test]
    fn a_map_with_too_many_regions_says_so() {
        let regions = (0..1000u64).map(|i| (Range::from_len(i * 0x10000, 0x1000), Kind::Usable));
        let map = MemoryMap::from_regions(regions, u64::MAX);
        assert!(map.truncated);
        assert!(map.summary().usable_bytes > 0);
    }
}
