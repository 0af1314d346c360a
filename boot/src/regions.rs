//! From a firmware's memory map and a list of things to keep to the kernel's map: sorted, disjoint, page-aligned.

use core::fmt;

use bootloader_api::info::{MemoryRegion, MemoryRegionKind};

/// How many entries, firmware's and reservations together, a [`MemoryMap`] takes. Real machines stay below 200.
pub const INPUT_REGIONS: usize = 512;
/// How many regions can come out: n overlapping intervals have 2n bounds.
pub const OUTPUT_REGIONS: usize = 2 * INPUT_REGIONS;

/// Regions begin and end on pages.
const PAGE: u64 = 4096;
/// No x86-64 CPU has wider physical addresses. AMD APM vol. 2, section 5.1.
const LIMIT: u64 = 1 << 52;

/// A place for a region, all zeros, so that a static array of them takes no room in the image.
pub const NO_REGION: MemoryRegion = MemoryRegion { start: 0, end: 0, kind: MemoryRegionKind::Usable };

/// The memory map has more entries than [`INPUT_REGIONS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyRegions;

impl fmt::Display for TooManyRegions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the firmware's memory map has more entries than the {INPUT_REGIONS} that Umbra can take")
    }
}

/// Physical memory as the loader describes it, in any order and with any overlaps.
///
/// Where entries overlap, what keeps more out wins: a firmware's reservation over ours, ours over usable memory.
#[derive(Debug)]
pub struct MemoryMap {
    entries: [MemoryRegion; INPUT_REGIONS],
    len: usize,
}

impl MemoryMap {
    /// A map without entries.
    pub const fn new() -> Self {
        Self { entries: [NO_REGION; INPUT_REGIONS], len: 0 }
    }

    /// Adds one entry of the firmware's map, by its e820 type: 1 is RAM, all else is not ours.
    pub fn add_e820(&mut self, start: u64, len: u64, e820_type: u32) -> Result<(), TooManyRegions> {
        const RAM: u32 = 1;
        let kind = match e820_type {
            RAM => MemoryRegionKind::Usable,
            other => MemoryRegionKind::UnknownBios(other),
        };
        self.add(start, len, kind)
    }

    /// Keeps a range out of the usable memory, for something that a loader put there.
    pub fn reserve(&mut self, start: u64, len: u64) -> Result<(), TooManyRegions> {
        self.add(start, len, MemoryRegionKind::Bootloader)
    }

    fn add(&mut self, start: u64, len: u64, kind: MemoryRegionKind) -> Result<(), TooManyRegions> {
        if len == 0 {
            return Ok(());
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
            return Ok(());
        }
        *self.entries.get_mut(self.len).ok_or(TooManyRegions)? = MemoryRegion { start, end, kind };
        self.len += 1;
        Ok(())
    }

    fn entries(&self) -> &[MemoryRegion] {
        &self.entries[..self.len]
    }

    /// Bytes of usable memory, were nothing else in the way. For telling an empty map from a good one.
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
