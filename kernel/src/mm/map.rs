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
            let usable = if kind == Kind::Usable { map.usable.insert(range) } else { Ok(()) };
            let ram = if kind != Kind::Reserved { map.ram.insert(range) } else { Ok(()) };
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

    #[test]
    fn a_map_with_too_many_regions_says_so() {
        let regions = (0..1000u64).map(|i| (Range::from_len(i * 0x10000, 0x1000), Kind::Usable));
        let map = MemoryMap::from_regions(regions, u64::MAX);
        assert!(map.truncated);
        assert!(map.summary().usable_bytes > 0);
    }
}
