//! Reference walk of the tables that the crate makes, as the processor walks them (AMD APM vol. 2, 15.25), and a check of
//! the whole tree. Reads raw memory only.
use std::collections::HashSet;

use super::tables::HostTables;

/// A translation that the processor may use, and cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    pub pfn: u64,
    pub writable: bool,
    /// Guest frames that one TLB entry covers, and the first of them.
    pub first: u64,
    pub pages: u64,
    /// Frames of the tables on the way.
    pub tables: Vec<u64>,
}

pub struct Walker<'t> {
    pub tables: &'t HostTables,
    pub root: u64,
    pub levels: u32,
    pub maxphyaddr: u32,
    pub nxe: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub leaves: [u64; 3],
    pub tables: u64,
}

impl Walker<'_> {
    /// A nested walk for `gfn`; `None` is a nested page fault. Sets A on the way and D on a write, as the processor does.
    pub fn walk(&self, gfn: u64, write: bool, fetch: bool) -> Option<Hit> {
        let (mut table, mut path) = (self.root, vec![]);
        let (mut writable, mut executable) = (true, true);
        let mut steps = vec![];
        for level in (1..=self.levels).rev() {
            path.push(table);
            let index = (gfn >> (9 * (level - 1)) & 511) as usize;
            let entry = self.tables.peek(table, index).expect("the walk stays in table memory");
            if entry & 1 == 0 {
                return None;
            }
            assert!(self.is_sane(entry, level), "reserved bits: level {level}, entry {entry:#x}");
            // The whole walk is a user access.
            assert_eq!(entry & 4, 4, "U=0 at level {level}");
            writable &= entry & 2 != 0;
            executable &= entry >> 63 == 0;
            steps.push((table, index));
            if level == 1 || entry & 0x80 != 0 {
                if write && !writable || fetch && !executable {
                    return None;
                }
                for &(table, index) in &steps {
                    self.tables.mark(table, index, 0x20);
                }
                if write {
                    self.tables.mark(table, index, 0x40);
                }
                let pages = 1u64 << (9 * (level - 1));
                let pfn = ((entry & 0x000f_ffff_ffff_f000) >> 12) + (gfn & (pages - 1));
                return Some(Hit { pfn, writable, first: gfn & !(pages - 1), pages, tables: path });
            }
            table = (entry & 0x000f_ffff_ffff_f000) >> 12;
        }
        unreachable!("level 1 is a leaf")
    }

    fn is_sane(&self, entry: u64, level: u32) -> bool {
        let any = |low: u32, high: u32| low <= high && (low..=high).any(|bit| entry >> bit & 1 == 1);
        let large = entry & 0x80 != 0;
        !any(self.maxphyaddr, 51)
            && (self.nxe || !any(63, 63))
            && match level {
                4 | 5 => !any(7, 8),
                3 if large => !any(13, 29),
                2 if large => !any(13, 20),
                _ => true,
            }
    }

    /// Visits the whole tree: every entry sane, every table reached once, every leaf as `leaf(gfn, pages, entry)` wants
    /// it. Counts what is there.
    pub fn check(&self, leaf: &mut dyn FnMut(u64, u64, u64)) -> Tally {
        let mut tally = Tally::default();
        let mut seen = HashSet::new();
        self.check_table(self.root, self.levels, 0, &mut seen, &mut tally, leaf);
        tally
    }

    fn check_table(
        &self,
        table: u64,
        level: u32,
        base: u64,
        seen: &mut HashSet<u64>,
        tally: &mut Tally,
        leaf: &mut dyn FnMut(u64, u64, u64),
    ) {
        assert!(seen.insert(table), "D2: table {table:#x} is linked twice");
        tally.tables += 1;
        let pages = 1u64 << (9 * (level - 1));
        for index in 0..512 {
            let entry = self.tables.peek(table, index as usize).expect("B4: a link leads to a table page");
            let gfn = base + index * pages;
            if entry & 1 == 0 {
                assert_eq!(entry, 0, "B5: nothing but zero is not present in a live tree");
                continue;
            }
            assert!(self.is_sane(entry, level), "B1: level {level}, entry {entry:#x}");
            assert_eq!(entry >> 11 & 1, 1, "B5: present entries carry the MMU-present bit");
            if level == 1 || entry & 0x80 != 0 {
                // PWT, PCD and PAT choose the first memory type, write-back.
                let pat = if level == 1 { 0x80 } else { 0x1000 };
                assert_eq!(entry & (0x18 | pat), 0, "level {level}, entry {entry:#x}");
                let triple = (entry >> 9 & 1, entry >> 10 & 1, entry >> 1 & 1);
                let legal = [(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)];
                assert!(legal.contains(&triple), "B2: {triple:?}");
                tally.leaves[level as usize - 1] += 1;
                leaf(gfn, pages, entry);
            } else {
                assert_eq!(entry & 7, 7, "B4: links permit everything");
                assert_eq!(entry >> 63, 0, "B4: links permit everything");
                let below = (entry & 0x000f_ffff_ffff_f000) >> 12;
                self.check_table(below, level - 1, gfn, seen, tally, leaf);
            }
        }
    }
}
