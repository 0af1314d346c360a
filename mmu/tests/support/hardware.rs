//! Reference walk of the tables that the crate makes, as the processor walks them (AMD APM vol. 2, 15.25; Intel SDM vol. 3,
//! 29.3), and a check of the whole tree. Reads raw memory only.
use std::collections::HashSet;

use super::machines::{Machine, Reading, Rights};
use super::tables::HostTables;

/// Frame number field of an entry, the same for all machines.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// A translation that the processor may use, and cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    pub pfn: u64,
    pub readable: bool,
    pub writable: bool,
    /// Guest frames that one TLB entry covers, and the first of them.
    pub first: u64,
    pub pages: u64,
    /// Frames of the tables on the way.
    pub tables: Vec<u64>,
}

/// Why a walk finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Nothing there, or not permitted: a nested page fault, an EPT violation.
    Violation,
    /// A reserved bit or value on the way: a nested page fault with the RSV bit, an EPT misconfiguration.
    Misconfiguration,
}

pub struct Walker<'t, M> {
    pub tables: &'t HostTables,
    pub root: u64,
    pub machine: M,
}

/// A leaf of the tree, as the processor and the notes in it have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub gfn: u64,
    pub pages: u64,
    pub pfn: u64,
    pub rights: Rights,
    pub host_writable: bool,
    /// A fault may set W.
    pub mmu_writable: bool,
    /// A, or not access-tracked.
    pub young: bool,
    /// D; `false` if the machine has none.
    pub dirty: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub leaves: [u64; 3],
    pub tables: u64,
    /// Links that are noted as splits for the sake of fetches.
    pub splits: u64,
    /// Notes about device memory.
    pub mmio: u64,
}

impl<M: Machine> Walker<'_, M> {
    /// A walk for `gfn` over tables that are sound; `None` is a violation.
    pub fn walk(&self, gfn: u64, write: bool, fetch: bool) -> Option<Hit> {
        match self.try_walk(gfn, write, fetch) {
            Ok(hit) => Some(hit),
            Err(Exit::Violation) => None,
            Err(Exit::Misconfiguration) => panic!("B1: reserved bits on the way to {gfn:#x}"),
        }
    }

    /// A walk for `gfn`: a fetch, a write, or else a read. Sets A on the way and D on a write, as the processor does.
    /// A reserved bit anywhere on the way counts before a right that is missing.
    pub fn try_walk(&self, gfn: u64, write: bool, fetch: bool) -> Result<Hit, Exit> {
        let (mut table, mut path) = (self.root, vec![]);
        let mut rights = Rights::ALL;
        let mut steps = vec![];
        for level in (1..=self.machine.levels()).rev() {
            path.push(table);
            let index = (gfn >> (9 * (level - 1)) & 511) as usize;
            let entry = self.tables.peek(table, index).expect("the walk stays in table memory");
            steps.push((table, index));
            match self.machine.read(entry, level) {
                Reading::Absent => return Err(Exit::Violation),
                Reading::Malformed => return Err(Exit::Misconfiguration),
                Reading::Link(here) => {
                    rights = rights.and(here);
                    table = (entry & FRAME) >> 12;
                }
                Reading::Page(here) => {
                    rights = rights.and(here);
                    let [supervisor, user] = rights.execute;
                    assert_eq!(supervisor, user, "fetches are permitted in both modes or in none");
                    let permitted = match (write, fetch) {
                        (true, true) => rights.write && supervisor,
                        (true, false) => rights.write,
                        (false, true) => supervisor,
                        (false, false) => rights.read,
                    };
                    if !permitted {
                        return Err(Exit::Violation);
                    }
                    let (accessed, dirty) = self.machine.flags();
                    for &(table, index) in &steps {
                        let pdpte = self.machine.levels() == 3 && table == self.root;
                        self.tables.mark(table, index, if pdpte { 0 } else { accessed });
                    }
                    if write {
                        let (table, index) = steps[steps.len() - 1];
                        self.tables.mark(table, index, dirty);
                    }
                    let pages = 1u64 << (9 * (level - 1));
                    let first = gfn & !(pages - 1);
                    let pfn = ((entry & FRAME) >> 12) + (gfn - first);
                    let Rights { read: readable, write: writable, .. } = rights;
                    return Ok(Hit { pfn, readable, writable, first, pages, tables: path });
                }
            }
        }
        unreachable!("level 1 has no links")
    }

    /// Visits the whole tree: every entry sane, every table reached once, every leaf as `leaf` wants it. Counts what is
    /// there.
    pub fn check(&self, leaf: &mut dyn FnMut(&Found)) -> Tally {
        let mut tally = Tally::default();
        let mut seen = HashSet::new();
        self.check_table(self.root, self.machine.levels(), 0, &mut seen, &mut tally, leaf);
        tally
    }

    fn check_table(
        &self,
        table: u64,
        level: u32,
        base: u64,
        seen: &mut HashSet<u64>,
        tally: &mut Tally,
        leaf: &mut dyn FnMut(&Found),
    ) {
        assert!(seen.insert(table), "D2: table {table:#x} is linked twice");
        tally.tables += 1;
        let pages = 1u64 << (9 * (level - 1));
        for index in 0..512 {
            let entry = self.tables.peek(table, index as usize).expect("B4: a link leads to a table page");
            let gfn = base + index * pages;
            let aside = self.machine.aside(entry);
            let entry = aside.unwrap_or(entry);
            let pfn = (entry & FRAME) >> 12;
            let reading = self.machine.read(entry, level);
            match reading {
                Reading::Absent => {
                    assert_eq!(entry, 0, "B5: nothing but zero is not present in a live tree");
                }
                Reading::Malformed => {
                    assert_eq!(entry >> 11 & 1, 0, "B1: level {level}, entry {entry:#x}");
                    assert_eq!(entry >> 51 & 1, 1, "B5: L1TF");
                    assert!(level < self.machine.levels(), "I3: no note in the root");
                    tally.mmio += 1;
                }
                _ if entry >> 11 & 1 == 0 => panic!("B5: present entries carry the MMU-present bit"),
                Reading::Link(rights) => {
                    assert_eq!(rights, Rights::ALL, "B4: links permit everything");
                    tally.splits += u64::from(self.machine.notes(entry).0);
                    self.check_table(pfn, level - 1, gfn, seen, tally, leaf);
                }
                Reading::Page(rights) => {
                    assert!(self.machine.is_write_back(entry, level), "level {level}, entry {entry:#x}");
                    let (host_writable, mmu_writable) = self.machine.notes(entry);
                    let triple = [host_writable, mmu_writable, rights.write].map(u8::from);
                    let legal = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]];
                    assert!(legal.contains(&triple), "B2: {triple:?}");
                    tally.leaves[level as usize - 1] += 1;
                    let (accessed, dirty) = self.machine.flags();
                    let young = aside.is_none() && (accessed == 0 || entry & accessed != 0);
                    let dirty = entry & dirty != 0;
                    leaf(&Found { gfn, pages, pfn, rights, host_writable, mmu_writable, young, dirty });
                }
            }
        }
    }
}
