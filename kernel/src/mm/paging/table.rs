//! Builds four-level page tables: maps, unmaps, looks up. Pure: where tables live is behind [`TableFrames`].

use super::entry::{Attributes, Entry, ENTRIES};
use core::fmt;

/// Levels of Umbra's own tables; level 1 maps 4 KiB pages.
pub const LEVELS: u32 = 4;

/// Access to table memory by physical address, and new tables.
pub trait TableFrames {
    /// Entry `index` of the table at physical address `table`.
    fn load(&self, table: u64, index: usize) -> Entry;
    /// Stores entry `index` of the table at physical address `table`.
    fn store(&mut self, table: u64, index: usize, entry: Entry);
    /// Physical address of a new table, all entries empty.
    fn new_table(&mut self) -> Option<u64>;
}

/// Why a mapping was not made. What was mapped before the failing page stays mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapError {
    /// No memory for a table.
    OutOfMemory,
    /// This virtual address is mapped already.
    AlreadyMapped(u64),
    /// An address or the length is no multiple of 4 KiB, or the range leaves the address space.
    BadRange,
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MapError::OutOfMemory => write!(f, "no memory for a page table"),
            MapError::AlreadyMapped(virt) => write!(f, "virtual address {virt:#x} is mapped already"),
            MapError::BadRange => write!(f, "a range to map is misaligned or out of bounds"),
        }
    }
}

/// Where a virtual address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Physical address of the byte.
    pub phys: u64,
    /// Level of the page.
    pub level: u32,
    /// Its attributes.
    pub attributes: Attributes,
}

/// Size of a page of `level` in bytes.
pub const fn page_bytes(level: u32) -> u64 {
    1 << (12 + 9 * (level - 1))
}

/// Index into the table of `level` for `virt`.
pub const fn index_of(virt: u64, level: u32) -> usize {
    (virt >> (12 + 9 * (level - 1))) as usize % ENTRIES
}

/// Page tables under one root.
#[derive(Clone, Copy, Debug)]
pub struct PageTables {
    root: u64,
    /// Largest page that may be used: 2, or 3 where the processor has 1 GiB pages.
    max_level: u32,
}

impl PageTables {
    /// Tables with an empty root.
    pub fn new(frames: &mut impl TableFrames, has_1g_pages: bool) -> Result<Self, MapError> {
        let root = frames.new_table().ok_or(MapError::OutOfMemory)?;
        Ok(Self { root, max_level: if has_1g_pages { 3 } else { 2 } })
    }

    /// Physical address of the root, for CR3.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Maps `len` bytes from `virt` to `phys` with the largest pages that fit.
    pub fn map(
        &self,
        frames: &mut impl TableFrames,
        virt: u64,
        phys: u64,
        len: u64,
        attributes: Attributes,
    ) -> Result<(), MapError> {
        self.map_range(frames, virt, phys, len, attributes, false)
    }

    /// Like [`map`](Self::map), but leaves alone what is mapped already.
    pub fn map_missing(
        &self,
        frames: &mut impl TableFrames,
        virt: u64,
        phys: u64,
        len: u64,
        attributes: Attributes,
    ) -> Result<(), MapError> {
        self.map_range(frames, virt, phys, len, attributes, true)
    }

    fn map_range(
        &self,
        frames: &mut impl TableFrames,
        virt: u64,
        phys: u64,
        len: u64,
        attributes: Attributes,
        skip_mapped: bool,
    ) -> Result<(), MapError> {
        if !(virt | phys | len).is_multiple_of(page_bytes(1)) {
            return Err(MapError::BadRange);
        }
        phys.checked_add(len).filter(|&end| end <= 1 << 52).ok_or(MapError::BadRange)?;
        virt.checked_add(len).ok_or(MapError::BadRange)?;
        let mut done = 0;
        while done < len {
            let (virt, phys) = (virt + done, phys + done);
            let level = (1..=self.max_level)
                .rev()
                .find(|&l| (virt | phys) % page_bytes(l) == 0 && page_bytes(l) <= len - done)
                .unwrap_or(1);
            done += match self.map_page(frames, virt, phys, level, attributes)? {
                Placed::New(bytes) => bytes,
                Placed::Occupied(bytes) if skip_mapped => bytes,
                Placed::Occupied(_) => return Err(MapError::AlreadyMapped(virt)),
            };
        }
        Ok(())
    }

    /// Maps one page of at most `wanted` level: smaller where a table of smaller pages exists already.
    fn map_page(
        &self,
        frames: &mut impl TableFrames,
        virt: u64,
        phys: u64,
        wanted: u32,
        attributes: Attributes,
    ) -> Result<Placed, MapError> {
        let mut table = self.root;
        let mut level = LEVELS;
        loop {
            let index = index_of(virt, level);
            let entry = frames.load(table, index);
            if entry.is_present() && entry.is_page(level) {
                return Ok(Placed::Occupied(page_bytes(level) - virt % page_bytes(level)));
            }
            if !entry.is_present() && level <= wanted {
                frames.store(table, index, Entry::page(phys, level, attributes));
                return Ok(Placed::New(page_bytes(level)));
            }
            table = if entry.is_present() {
                entry.addr(level)
            } else {
                let new = frames.new_table().ok_or(MapError::OutOfMemory)?;
                frames.store(table, index, Entry::table(new));
                new
            };
            level -= 1;
        }
    }

    /// Removes the 4 KiB page at `virt`; false when there is none. The caller flushes TLBs.
    pub fn unmap_small(&self, frames: &mut impl TableFrames, virt: u64) -> bool {
        let mut table = self.root;
        for level in (2..=LEVELS).rev() {
            let entry = frames.load(table, index_of(virt, level));
            if !entry.is_present() || entry.is_page(level) {
                return false;
            }
            table = entry.addr(level);
        }
        let index = index_of(virt, 1);
        let mapped = frames.load(table, index).is_present();
        frames.store(table, index, Entry::EMPTY);
        mapped
    }

    /// Where `virt` leads.
    pub fn translate(&self, frames: &impl TableFrames, virt: u64) -> Option<Translation> {
        let mut table = self.root;
        for level in (1..=LEVELS).rev() {
            let entry = frames.load(table, index_of(virt, level));
            if !entry.is_present() {
                return None;
            }
            if entry.is_page(level) {
                let phys = entry.addr(level) + virt % page_bytes(level);
                return Some(Translation { phys, level, attributes: entry.attributes() });
            }
            table = entry.addr(level);
        }
        None
    }
}

/// What `map_page` found, and the bytes from the address on that are mapped now.
enum Placed {
    New(u64),
    Occupied(u64),
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::entry::{Access, Caching};
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// Tables in ordinary memory.
    #[derive(Default)]
    pub(crate) struct Fake {
        tables: HashMap<u64, [u64; ENTRIES]>,
        pub(crate) limit: Option<usize>,
    }

    impl TableFrames for Fake {
        fn load(&self, table: u64, index: usize) -> Entry {
            Entry(self.tables[&table][index])
        }
        fn store(&mut self, table: u64, index: usize, entry: Entry) {
            self.tables.get_mut(&table).expect("a store outside of tables")[index] = entry.0;
        }
        fn new_table(&mut self) -> Option<u64> {
            if self.limit.is_some_and(|limit| self.tables.len() >= limit) {
                return None;
            }
            let addr = (self.tables.len() as u64 + 1) << 12;
            self.tables.insert(addr, [0; ENTRIES]);
            Some(addr)
        }
    }

    const RW: Attributes = Attributes::memory(Access::ReadWrite);
    const PHYSMAP: u64 = 0xffff_8000_0000_0000;

    #[test]
    fn the_largest_pages_that_fit_are_used() {
        for (has_1g, levels) in [(true, 3), (false, 2)] {
            let mut fake = Fake::default();
            let tables = PageTables::new(&mut fake, has_1g).unwrap();
            tables.map(&mut fake, PHYSMAP + (1 << 30), 1 << 30, (1 << 30) + (2 << 20) + 4096, RW).unwrap();
            let level = |virt| tables.translate(&fake, virt).map(|t| t.level);
            assert_eq!(level(PHYSMAP + (1 << 30)), Some(levels));
            assert_eq!(level(PHYSMAP + (2 << 30)), Some(2));
            assert_eq!(level(PHYSMAP + (2 << 30) + (2 << 20)), Some(1));
            assert_eq!(level(PHYSMAP + (2 << 30) + (2 << 20) + 4096), None);
            assert_eq!(level(0), None);
        }
    }

    #[test]
    fn offsets_limit_the_page_size() {
        let mut fake = Fake::default();
        let tables = PageTables::new(&mut fake, true).unwrap();
        tables.map(&mut fake, 0x20_1000, 0x40_0000, 0x40_0000, RW).unwrap();
        let t = tables.translate(&fake, 0x30_1234).unwrap();
        assert_eq!((t.phys, t.level), (0x50_0234, 1));
    }

    #[test]
    fn nothing_is_mapped_twice() {
        let mut fake = Fake::default();
        let tables = PageTables::new(&mut fake, true).unwrap();
        tables.map(&mut fake, 0x20_0000, 0x20_0000, 0x20_0000, RW).unwrap();
        let again = tables.map(&mut fake, 0x30_0000, 0, 0x1000, RW);
        assert_eq!(again, Err(MapError::AlreadyMapped(0x30_0000)));
        tables.map_missing(&mut fake, 0x10_0000, 0x10_0000, 0x40_0000, Attributes::DEVICE).unwrap();
        assert_eq!(tables.translate(&fake, 0x30_0000).unwrap().attributes, RW);
        assert_eq!(tables.translate(&fake, 0x1f_f000).unwrap().attributes.caching, Caching::Uncached);
        assert_eq!(tables.translate(&fake, 0x40_0000).unwrap().phys, 0x40_0000);
        assert_eq!(tables.translate(&fake, 0x50_0000), None);
    }

    #[test]
    fn bad_ranges_and_missing_memory_are_errors() {
        let mut fake = Fake::default();
        let tables = PageTables::new(&mut fake, true).unwrap();
        for (virt, phys, len) in [
            (1, 0, 0x1000),
            (0, 1, 0x1000),
            (0, 0, 1),
            (!0xfff, 0, 0x2000),
            (0, 1 << 52, 0x1000),
            (0, !0xfff, 0x1000),
        ] {
            assert_eq!(tables.map(&mut fake, virt, phys, len, RW), Err(MapError::BadRange));
        }
        fake.limit = Some(2);
        assert_eq!(tables.map(&mut fake, 0, 0, 0x1000, RW), Err(MapError::OutOfMemory));
    }

    #[test]
    fn small_pages_can_be_unmapped() {
        let mut fake = Fake::default();
        let tables = PageTables::new(&mut fake, true).unwrap();
        tables.map(&mut fake, 0x8000, 0x8000, 0x1000, Attributes::memory(Access::ReadExecute)).unwrap();
        assert!(!tables.unmap_small(&mut fake, 0x9000));
        assert!(tables.unmap_small(&mut fake, 0x8000));
        assert!(!tables.unmap_small(&mut fake, 0x8000));
        assert_eq!(tables.translate(&fake, 0x8000), None);
        tables.map(&mut fake, 0x20_0000, 0, 0x20_0000, RW).unwrap();
        assert!(!tables.unmap_small(&mut fake, 0x20_0000), "a large page stays");
    }

    proptest! {
        #[test]
        fn translates_every_page_as_mapped(
            first in 0u64..2000, frame in 0u64..2000, pages in 1u64..3000, large in any::<bool>(), shift in 0u32..2,
        ) {
            let mut fake = Fake::default();
            let tables = PageTables::new(&mut fake, large).unwrap();
            // Half of the cases are aligned alike and can use large pages.
            let (virt, phys) = (first << (12 + 9 * shift), frame << (12 + 9 * shift));
            tables.map(&mut fake, virt, phys, pages << 12, RW).unwrap();
            for page in 0..pages {
                let t = tables.translate(&fake, virt + (page << 12) + 7).unwrap();
                prop_assert_eq!(t.phys, phys + (page << 12) + 7);
            }
            prop_assert_eq!(tables.translate(&fake, virt + (pages << 12)), None);
            if virt > 0 {
                prop_assert_eq!(tables.translate(&fake, virt - 1), None);
            }
        }
    }
}
