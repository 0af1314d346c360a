//! From a firmware's memory map and a list of things to keep to the kernel's map: sorted, disjoint, page-aligned.

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};

/// How many entries, firmware's and reservations together, a [`MemoryMap`] keeps. Real machines stay below 200; of a map
/// with more, what belongs together is merged, and then the smallest pieces of memory are given up.
pub const INPUT_REGIONS: usize = 512;
/// How many regions can come out: n overlapping intervals have 2n bounds.
pub const OUTPUT_REGIONS: usize = 2 * INPUT_REGIONS;

/// Regions begin and end on pages.
const PAGE: u64 = 4096;
/// No x86-64 CPU has wider physical addresses. AMD APM vol. 2, section 5.1.
pub(crate) const LIMIT: u64 = 1 << 52;

/// A place for a region, all zeros, so that a static array of them takes no room in the image.
pub const NO_REGION: MemoryRegion = MemoryRegion { start: 0, end: 0, kind: MemoryRegionKind::Usable };

/// Physical memory as the loader describes it, in any order and with any overlaps.
///
/// Where entries overlap, what keeps more out wins: a firmware's reservation over ours, ours over usable memory. However
/// many entries there are, none that keeps something out is lost.
#[derive(Debug)]
pub struct MemoryMap {
    entries: [MemoryRegion; INPUT_REGIONS],
    len: usize,
    /// Memory was given up because there are too many entries.
    cut: bool,
}

impl MemoryMap {
    /// A map without entries.
    pub const fn new() -> Self {
        Self { entries: [NO_REGION; INPUT_REGIONS], len: 0, cut: false }
    }

    /// Adds one entry of the firmware's map, by its e820 type: 1 is RAM, all else is not ours.
    pub fn add_e820(&mut self, start: u64, len: u64, e820_type: u32) {
        const RAM: u32 = 1;
        let kind = match e820_type {
            RAM => MemoryRegionKind::Usable,
            other => MemoryRegionKind::UnknownBios(other),
        };
        self.add(start, len, kind);
    }

    /// Keeps a range out of the usable memory, for something that a loader put there.
    pub fn reserve(&mut self, start: u64, len: u64) {
        self.add(start, len, MemoryRegionKind::Bootloader);
    }

    /// Whether memory was given up because there are too many entries.
    pub fn is_cut(&self) -> bool {
        self.cut
    }

    fn add(&mut self, start: u64, len: u64, kind: MemoryRegionKind) {
        if len == 0 {
            return;
        }
        let last_page = |address: u64| address & !(PAGE - 1);
        let next_page = |address: u64| last_page(address.saturating_add(PAGE - 1));
        let end = start.saturating_add(len);
        // A page that is RAM only in part is not usable.
        let (start, end) = match kind {
            MemoryRegionKind::Usable => (next_page(start), last_page(end)),
            _ => (last_page(start), next_page(end)),
        };
        let end = end.min(LIMIT);
        if start >= end {
            return;
        }
        if self.len == self.entries.len() {
            self.make_room();
        }
        if let Some(entry) = self.entries.get_mut(self.len) {
            *entry = MemoryRegion { start, end, kind };
            self.len += 1;
        }
    }

    /// Replaces the entries by fewer that say the same, or less memory.
    fn make_room(&mut self) {
        let mut regions = [NO_REGION; OUTPUT_REGIONS];
        let mut count = self.write_regions(&mut regions);
        while count > INPUT_REGIONS - ROOM {
            self.cut = true;
            count = give_up(&mut regions[..count]);
        }
        self.entries[..count].copy_from_slice(&regions[..count]);
        self.len = count;
    }

    fn entries(&self) -> &[MemoryRegion] {
        &self.entries[..self.len]
    }

    /// Whether any entry is usable memory, whatever else overlaps it.
    pub fn has_usable(&self) -> bool {
        self.entries().iter().any(|entry| entry.kind == MemoryRegionKind::Usable)
    }

    /// Writes the sorted, disjoint regions, neighbours of one kind merged, and returns how many there are.
    pub fn write_regions(&self, out: &mut [MemoryRegion; OUTPUT_REGIONS]) -> usize {
        let mut bounds = [0; 2 * INPUT_REGIONS];
        for (pair, entry) in bounds.chunks_exact_mut(2).zip(self.entries()) {
            pair.copy_from_slice(&[entry.start, entry.end]);
        }
        let bounds = &mut bounds[..2 * self.len];
        bounds.sort_unstable();

        let mut count = 0;
        for pair in bounds.windows(2) {
            let (start, end) = (pair[0], pair[1]);
            let covering = self.entries().iter().filter(|entry| entry.start <= start && end <= entry.end);
            let Some(kind) = covering.map(|entry| entry.kind).max_by_key(strictness) else { continue };
            if start == end {
                continue;
            }
            match out[..count].last_mut() {
                Some(last) if last.end == start && last.kind == kind => last.end = end,
                _ => {
                    out[count] = MemoryRegion { start, end, kind };
                    count += 1;
                }
            }
        }
        count
    }
}

/// How many entries are made free at once, so that a map of thousands of entries is not gone through for each.
const ROOM: usize = 64;

/// Gives up what costs least: the smallest piece of usable memory, or the gap between two regions without such memory
/// between them, which become one. Returns how many regions there are then.
fn give_up(regions: &mut [MemoryRegion]) -> usize {
    let is_usable = |region: &MemoryRegion| region.kind == MemoryRegionKind::Usable;
    let usable = regions.iter().enumerate().filter(|(_, region)| is_usable(region));
    let smallest = usable.map(|(index, region)| (region.end - region.start, index)).min();
    let pairs = regions.windows(2).enumerate().filter(|(_, pair)| !pair.iter().any(is_usable));
    let nearest = pairs.map(|(index, pair)| (pair[1].start - pair[0].end, index)).min();
    let at = match (smallest, nearest) {
        (Some((len, at)), Some((gap, _))) if len < gap => at,
        (_, Some((_, at))) => {
            // The stricter kind for both and for what lies between.
            let (first, second) = (regions[at], regions[at + 1]);
            let kind = [first.kind, second.kind].into_iter().max_by_key(strictness).unwrap_or(first.kind);
            regions[at + 1] = MemoryRegion { start: first.start, end: second.end, kind };
            at
        }
        (Some((_, at)), None) => at,
        // Two regions at least make a pair or hold usable memory; with fewer nothing needs to be given up.
        (None, None) => return regions.len(),
    };
    regions.copy_within(at + 1.., at);
    regions.len() - 1
}

impl Default for MemoryMap {
    fn default() -> Self {
        Self::new()
    }
}

/// Which of two kinds wins where both are claimed: the greater.
fn strictness(kind: &MemoryRegionKind) -> (u8, u32) {
    match *kind {
        MemoryRegionKind::Usable => (0, 0),
        MemoryRegionKind::Bootloader => (1, 0),
        MemoryRegionKind::UnknownBios(tag) => (2, tag),
        MemoryRegionKind::UnknownUefi(tag) => (3, tag),
        _ => (4, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::boxed::Box;
    use std::vec::Vec;

    fn regions(map: &MemoryMap) -> Vec<(u64, u64, MemoryRegionKind)> {
        let mut out = Box::new([NO_REGION; OUTPUT_REGIONS]);
        let count = map.write_regions(&mut out);
        out[..count].iter().map(|region| (region.start, region.end, region.kind)).collect()
    }

    use MemoryRegionKind::{Bootloader, UnknownBios, Usable};

    #[test]
    fn an_empty_map_has_no_regions() {
        let map = MemoryMap::new();
        assert_eq!(regions(&map), []);
        assert!(!map.has_usable());
    }

    #[test]
    fn a_reservation_splits_usable_memory() {
        let mut map = MemoryMap::new();
        map.add_e820(0x10_0000, 0x70_0000, 1);
        map.reserve(0x20_0000, 0x1_0000);
        assert_eq!(
            regions(&map),
            [
                (0x10_0000, 0x20_0000, Usable),
                (0x20_0000, 0x21_0000, Bootloader),
                (0x21_0000, 0x80_0000, Usable)
            ]
        );
    }

    #[test]
    fn unsorted_and_overlapping_entries_keep_the_strictest_kind() {
        let mut map = MemoryMap::new();
        map.add_e820(0x8000, 0x8000, 2);
        map.add_e820(0x4000, 0x8000, 1);
        map.add_e820(0x4000, 0x1000, 1);
        map.reserve(0x7000, 0x2000);
        assert_eq!(
            regions(&map),
            [(0x4000, 0x7000, Usable), (0x7000, 0x8000, Bootloader), (0x8000, 0x1_0000, UnknownBios(2))]
        );
    }

    #[test]
    fn pages_that_are_usable_in_part_are_not_usable() {
        let mut map = MemoryMap::new();
        map.add_e820(0x10, 0x9_fc00 - 0x10, 1);
        map.add_e820(0x9_fc00, 0x400, 2);
        map.reserve(0x5005, 1);
        assert_eq!(
            regions(&map),
            [
                (0x1000, 0x5000, Usable),
                (0x5000, 0x6000, Bootloader),
                (0x6000, 0x9_f000, Usable),
                (0x9_f000, 0xa_0000, UnknownBios(2))
            ]
        );
    }

    #[test]
    fn neighbours_of_one_kind_merge() {
        let mut map = MemoryMap::new();
        map.add_e820(0x2000, 0x1000, 1);
        map.add_e820(0x1000, 0x1000, 1);
        map.add_e820(0x3000, 0x1000, 3);
        assert_eq!(regions(&map), [(0x1000, 0x3000, Usable), (0x3000, 0x4000, UnknownBios(3))]);
    }

    #[test]
    fn empty_wrapping_and_impossible_entries_are_cut() {
        let mut map = MemoryMap::new();
        map.add_e820(0x1000, 0, 1);
        map.add_e820(u64::MAX, u64::MAX, 1);
        map.add_e820(LIMIT, 0x1000, 2);
        assert_eq!(regions(&map), []);
        map.add_e820(LIMIT - 0x2000, u64::MAX, 1);
        assert_eq!(regions(&map), [(LIMIT - 0x2000, LIMIT, Usable)]);
    }

    #[test]
    fn memory_above_4_gib_is_kept() {
        let mut map = MemoryMap::new();
        map.add_e820(1 << 32, 1 << 40, 1);
        assert_eq!(regions(&map), [(1 << 32, (1 << 32) + (1 << 40), Usable)]);
    }

    #[test]
    fn a_full_map_still_comes_out_whole() {
        let mut map = MemoryMap::new();
        // Staggered overlaps of different kinds, the worst case for the number of regions.
        for n in 0..INPUT_REGIONS as u64 {
            map.add_e820(n * 0x2000, 0x3000, 2 + n as u32 % 2);
        }
        assert!(!map.is_cut() && regions(&map).len() >= INPUT_REGIONS);
        map.reserve(0x1000_0000, 1);
        assert!(regions(&map).len() <= INPUT_REGIONS);
        let model =
            |page: u64| (page / 0x1000).is_multiple_of(2) || page < INPUT_REGIONS as u64 * 0x2000 + 0x1000;
        for page in (0..INPUT_REGIONS as u64 * 0x2000 + 0x1000).step_by(PAGE as usize) {
            let reserved = regions(&map).iter().any(|(start, end, _)| (*start..*end).contains(&page));
            assert!(reserved == model(page), "{page:#x}");
        }
    }

    #[test]
    fn thousands_of_entries_that_belong_together_lose_nothing() {
        let mut map = MemoryMap::new();
        for n in (0..4000).rev() {
            map.add_e820(0x10_0000 + n * 0x1000, 0x1000, 1);
        }
        assert_eq!(regions(&map), [(0x10_0000, 0x10_0000 + 4000 * 0x1000, Usable)]);
        assert!(!map.is_cut());
    }

    #[test]
    fn of_thousands_of_entries_the_largest_memory_is_kept() {
        let mut map = MemoryMap::new();
        map.add_e820(1 << 32, 1 << 36, 1);
        for n in 0..5000 {
            map.add_e820(n * 0x3000, 0x1000, 1);
            map.add_e820(n * 0x3000 + 0x1000, 0x1000, 2);
        }
        let regions = regions(&map);
        assert!(map.is_cut() && regions.contains(&(1 << 32, (1 << 32) + (1 << 36), Usable)));
        for n in 0..5000 {
            let page = n * 0x3000 + 0x1000;
            assert!(regions
                .iter()
                .any(|(start, end, kind)| (*start..*end).contains(&page) && *kind != Usable));
        }
    }

    /// What the map must say of the page at `page`, straight from the definition.
    fn model(entries: &[(u64, u64, u32)], page: u64) -> Option<MemoryRegionKind> {
        let (start, end) = (page, page + PAGE);
        let kinds = entries.iter().filter_map(|&(at, len, what)| {
            let overlaps = len != 0 && at < end && start < at + len;
            let covers = at <= start && end <= at + len;
            match what {
                0 => overlaps.then_some(Bootloader),
                1 => covers.then_some(Usable),
                other => overlaps.then_some(UnknownBios(other)),
            }
        });
        kinds.max_by_key(strictness)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_page_is_what_the_definition_says(
            entries in prop::collection::vec((0u64..0x4_0000, 0u64..0x2_0000, 0u32..5), 0..90),
        ) {
            let mut map = MemoryMap::new();
            for &(at, len, what) in &entries {
                match what {
                    0 => map.reserve(at, len),
                    what => map.add_e820(at, len, what),
                }
            }
            let regions = regions(&map);
            for page in (0..0x6_0000).step_by(PAGE as usize) {
                let found = regions.iter().find(|(start, end, _)| (*start..*end).contains(&page));
                prop_assert_eq!(found.map(|region| region.2), model(&entries, page), "page {:#x}", page);
            }
        }

        #[test]
        fn however_many_entries_nothing_that_is_kept_out_becomes_usable(
            entries in prop::collection::vec((0u64..0x200, 1u64..4, 0u32..4), 0..1200),
        ) {
            let mut map = MemoryMap::new();
            let mut truth = vec![Some(1); 0x210];
            let mut covered = vec![false; 0x210];
            for &(page, pages, what) in &entries {
                // Every other page, so that little merges.
                let (start, len) = (page * 2 * PAGE, pages * PAGE);
                match what {
                    0 => map.reserve(start, len),
                    what => map.add_e820(start, len, what),
                }
                for n in page..page + pages.div_ceil(2) {
                    covered[n as usize] = true;
                    truth[n as usize] = truth[n as usize].filter(|_| what == 1);
                }
            }
            for (start, end, kind) in regions(&map) {
                if kind == Usable {
                    for page in (start..end).step_by(PAGE as usize).filter(|page| page % (2 * PAGE) == 0) {
                        let n = (page / (2 * PAGE)) as usize;
                        prop_assert!(covered[n] && truth[n].is_some(), "{:#x} is kept out", page);
                    }
                }
            }
        }

        #[test]
        fn any_map_comes_out_sorted_disjoint_and_aligned(
            entries in prop::collection::vec((any::<u64>(), any::<u64>(), 0u32..6), 0..120),
        ) {
            let mut map = MemoryMap::new();
            for &(at, len, what) in &entries {
                map.add_e820(at, len, what);
            }
            let regions = regions(&map);
            for &(start, end, _) in &regions {
                prop_assert!(start < end && end <= LIMIT && start % PAGE == 0 && end % PAGE == 0);
            }
            for pair in regions.windows(2) {
                prop_assert!(pair[0].1 < pair[1].0 || (pair[0].1 == pair[1].0 && pair[0].2 != pair[1].2));
            }
        }
    }
}
