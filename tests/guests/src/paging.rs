//! Builds and edits four-level page tables. All memory is identity-mapped, so a table's address is its pointer.
use crate::cpu::{cr3, has, invlpg, peek, poke, set_cr3};
use crate::frames;

/// Page-table entry bits. AMD APM vol. 2, 5.4.
pub const P: u64 = 1;
/// Writable.
pub const W: u64 = 1 << 1;
/// User.
pub const U: u64 = 1 << 2;
/// Write-through.
pub const PWT: u64 = 1 << 3;
/// Cache disable.
pub const PCD: u64 = 1 << 4;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// Large page, at levels 2 and 3.
pub const PS: u64 = 1 << 7;
/// Global.
pub const G: u64 = 1 << 8;
/// No execute.
pub const NX: u64 = 1 << 63;
/// The address field.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A region that the boot tables leave unmapped, for cases to map as they like: PML4 slot 1.
pub const PLAYGROUND: u64 = 0x80_0000_0000;

/// Page-fault error code bits. AMD APM vol. 2, 8.4.2.
pub const E_P: u64 = 1;
/// The access was a write.
pub const E_W: u64 = 1 << 1;
/// The access came from user mode.
pub const E_U: u64 = 1 << 2;
/// A reserved bit was set.
pub const E_RSVD: u64 = 1 << 3;
/// The access was an instruction fetch.
pub const E_I: u64 = 1 << 4;
/// A protection key forbids it.
pub const E_PK: u64 = 1 << 5;

/// An address space by its PML4.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    /// Physical address of the PML4.
    pub root: u64,
}

impl Space {
    /// The one in CR3.
    pub fn current() -> Space {
        Space { root: cr3() & ADDRESS }
    }

    /// A new one that shares everything the current one maps at its top level.
    pub fn fork() -> Space {
        let root = frames::page();
        for slot in 0..512 {
            poke(root + slot * 8, peek::<u64>(Space::current().root + slot * 8));
        }
        Space { root }
    }

    /// A copy of this one with its own tables for the first 512 GiB down to the page directories, so that pages below
    /// 4 GiB can be remapped without touching the standard tables.
    pub fn isolated(&self) -> Space {
        let copy = |from: u64| {
            let to = frames::page();
            for slot in 0..512 {
                poke(to + slot * 8, peek::<u64>(from + slot * 8));
            }
            to
        };
        let root = copy(self.root);
        let third = copy(peek::<u64>(root) & ADDRESS);
        poke(root, third | P | W | U);
        for slot in 0..512 {
            let entry: u64 = peek(third + slot * 8);
            if entry & P != 0 && entry & PS == 0 {
                poke(third + slot * 8, copy(entry & ADDRESS) | P | W | U);
            }
        }
        Space { root }
    }

    /// Loads it.
    pub fn activate(&self) {
        set_cr3(self.root);
    }

    /// The address of the entry that maps `address` at `level` (1: 4K, 2: 2M, 3: 1G, 4: PML4 entry), making tables
    /// above it. A large page in the way is split.
    pub fn entry(&self, address: u64, level: u32) -> u64 {
        let mut table = self.root;
        let mut at = 4;
        loop {
            let entry = table + (address >> (12 + 9 * (at - 1)) & 511) * 8;
            if at == level {
                return entry;
            }
            let value: u64 = peek(entry);
            if value & P == 0 {
                poke(entry, frames::page() | P | W | U);
            } else if value & PS != 0 && at <= 3 {
                let split = frames::page();
                let step = 1u64 << (12 + 9 * (at - 2));
                let leaf = if at == 2 { value & !PS } else { value };
                for slot in 0..512 {
                    poke(split + slot * 8, leaf + slot * step);
                }
                poke(entry, split | P | W | U);
                if Space::current().root == self.root {
                    set_cr3(self.root);
                }
            }
            table = peek::<u64>(entry) & ADDRESS;
            at -= 1;
        }
    }

    /// Maps one page of `level` at `address` to `frame` with `flags`, and drops the old translation.
    pub fn map(&self, address: u64, frame: u64, level: u32, flags: u64) {
        let large = if level > 1 { PS } else { 0 };
        self.set(address, level, frame | flags | large);
    }

    /// Maps a fresh zeroed 4K page at `address` and returns its frame.
    pub fn map_new(&self, address: u64, flags: u64) -> u64 {
        let frame = frames::page();
        self.map(address, frame, 1, flags);
        frame
    }

    /// Reads the entry of `address` at `level`.
    pub fn get(&self, address: u64, level: u32) -> u64 {
        peek(self.entry(address, level))
    }

    /// Writes the entry of `address` at `level` and drops the old translation.
    pub fn set(&self, address: u64, level: u32, value: u64) {
        poke(self.entry(address, level), value);
        invlpg(address);
    }
}

/// Whether 1 GiB pages exist.
pub fn has_1g() -> bool {
    has(0x8000_0001, 0, |leaf| leaf.edx, 26)
}
