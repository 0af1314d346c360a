//! What an L1 keeps in its memory: two roots of nested tables that share some, in each format, and the tables of its L2.
use super::flat::FlatRam;
use super::manual::guest::BASE;
use super::manual::{ept, Machine};
use super::nested::{L2_CR3, L2_TABLES};
use super::two_stage::Below;

/// Frames of L1 that the two trees consist of, the lowest tables last.
pub const ROOT_A: u64 = 0x1000;
pub const ROOT_B: u64 = 0x6000;
pub const ROOT_A5: u64 = 0xa000;
pub const ROOT_B5: u64 = 0xb000;
pub const LOWEST: [u64; 3] = [0x4000, 0x9000, 0x5000];

pub const EPT: ept::Machine = ept::Machine {
    levels: 4,
    execute_only: true,
    mode_based: false,
    accessed_dirty: true,
    mib_pages: true,
    gib_pages: true,
    maxphyaddr: 46,
    root: ROOT_A,
};

/// L1 in long mode as its nested tables are read.
pub const NPT: Machine = Machine { cr3: ROOT_A, ..BASE };

/// An L2 with four levels, and one without paging.
pub const L2: Machine = Machine { cr3: L2_CR3, ..BASE };
pub const L2_UNPAGED: Machine = Machine { pg: false, lma: false, ..BASE };

/// The tree A maps 28 pages of L2, a 2 MiB page, and the table 0x5000; B other 28 pages, and the same table. `leaf` are the
/// bits of a leaf without an address.
fn trees(ram: &FlatRam, link: u64, leaf: u64) {
    for (root, base) in [(ROOT_A, 64u64), (ROOT_B, 96)] {
        let at = |level: u64| root + level * 0x1000;
        for level in 0..3 {
            ram.set(at(level), at(level + 1) | link);
        }
        // B's lowest table is 0x9000, and A's 0x4000.
        for page in 0..16 {
            ram.set(at(3) + page * 8, (base + page) << 12 | leaf);
        }
        for page in 16..20 {
            ram.set(at(3) + page * 8, (1040 + page - 16) << 12 | leaf);
        }
        // L1's own tables, a slot that comes and goes, and a place without memory.
        for (page, gfn) in [(20, 4), (21, 3), (22, 1056), (23, 1030)] {
            ram.set(at(3) + page * 8, gfn << 12 | leaf);
        }
        for (page, gfn) in L2_TABLES {
            ram.set(at(3) + page * 8, gfn << 12 | leaf);
        }
        ram.set(at(2) + 16, 0x5000 | link);
    }
    ram.set(ROOT_A + 0x2008, 0x20_0000 | 0x80 | leaf);
    for page in 0..8u64 {
        ram.set(0x5000 + page * 8, (80 + page) << 12 | leaf);
    }
}

/// L2's own tables, accessed and dirty: pages one to one, some with fewer rights.
fn l2_tables(ram: &FlatRam) {
    for level in 0..3 {
        ram.set((32 + level) << 12, (L2_TABLES[level as usize + 1].0) << 12 | 0x67);
    }
    for page in 0..28u64 {
        let flags = match page {
            2 => 0x65,
            3 => 1 << 63 | 0x67,
            4 => 0x63,
            5 => 0,
            _ => 0x67,
        };
        ram.set((35 << 12) | (page * 8), page << 12 | flags);
    }
    for (page, to) in [(28u64, 512u64), (29, 513), (30, 1024), (31, 1025)] {
        ram.set((35 << 12) | (page * 8), to << 12 | 0x67);
    }
}

/// Bits 10 of leaves and links count only with mode-based execute control.
pub fn ept_setup(ram: &FlatRam) {
    trees(ram, 0x407, 0x337 | 0x400);
    l2_tables(ram);
}

/// The same under a level more.
pub fn ept5_setup(ram: &FlatRam) {
    ept_setup(ram);
    ram.set(ROOT_A5, ROOT_A | 0x407);
    ram.set(ROOT_B5, ROOT_B | 0x407);
}

pub fn npt_setup(ram: &FlatRam) {
    trees(ram, 0x67, 0x67);
    l2_tables(ram);
}

/// A 32-bit L1, whose tables have four-byte entries: a directory at A, with a table and a page of 4 MiB; a table more at B's.
pub fn short_setup(ram: &FlatRam) {
    for (root, base) in [(ROOT_A, 64u32), (ROOT_B, 96)] {
        let table = if root == ROOT_A { 0x4000u32 } else { 0x9000 };
        ram.set_u32(root, table | 0x67);
        ram.set_u32(root + 4, 0x5067);
        ram.set_u32(root + 8, 0x00e7);
        for page in 0..28 {
            ram.set_u32(u64::from(table) + page * 4, (base + page as u32) << 12 | 0x67);
        }
        for page in 512..514 {
            ram.set_u32(u64::from(table) + page * 4, (base + page as u32 - 512) << 12 | 0x67);
        }
        ram.set_u32(u64::from(table) + 1023 * 4, 0x1_0000 | 0x67);
    }
    for page in 0..8u64 {
        ram.set_u32(0x5000 + page * 4, (80 + page as u32) << 12 | 0x67);
    }
}

/// A 32-bit L1 with PAE: four pointers at A, then as in long mode.
pub fn pae_setup(ram: &FlatRam) {
    for (root, base) in [(ROOT_A, 64u64), (ROOT_B, 96)] {
        ram.set(root, (root + 0x2000) | 1);
        ram.set(root + 8, 0);
        ram.set(root + 0x2000, (root + 0x3000) | 0x67);
        for page in 0..28 {
            ram.set(root + 0x3000 + page * 8, (base + page) << 12 | 0x67);
        }
        ram.set(root + 0x2008, 0x20_00e7);
        ram.set(root + 0x2010, 0x5067);
    }
    for page in 0..8u64 {
        ram.set(0x5000 + page * 8, (80 + page) << 12 | 0x67);
    }
}

/// All that L1 runs L2 with: both roots, and (of EPT) both settings of the flags.
pub fn belows(below: Below) -> Vec<Below> {
    match below {
        Below::Ept(m) => {
            let of = |root, accessed_dirty| Below::Ept(ept::Machine { root, accessed_dirty, ..m });
            let flags = m.accessed_dirty;
            let (a, b) = if m.levels == 5 { (ROOT_A5, ROOT_B5) } else { (ROOT_A, ROOT_B) };
            vec![of(a, flags), of(b, flags), of(a, false)]
        }
        Below::Npt(m) => [ROOT_A, ROOT_B].map(|cr3| Below::Npt(Machine { cr3, ..m })).to_vec(),
    }
}
