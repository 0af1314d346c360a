//! The processor over the shadow: its walk, and a TLB that keeps whatever it is not told to drop.
use mmu::Root;

use super::super::manual::{Machine, What, Who};
use super::super::tables::HostTables;
use super::memory::MOVED;

/// What the entries down to some point permit. CR0.WP and EFER.NXE are set whenever a guest runs on a shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    pub writable: bool,
    pub user: bool,
    pub executable: bool,
}

impl Rights {
    const ALL: Self = Self { writable: true, user: true, executable: true };

    /// Intel SDM vol. 3, 4.6.1, with CR0.WP: SMEP and SMAP are the guest's, and off while it does not page.
    pub fn permit(self, m: &Machine, what: What, who: Who) -> bool {
        let (smep, smap) = (m.pg && m.smep, m.pg && m.smap);
        let of_user = who == Who::User;
        match what {
            What::Read if of_user => self.user,
            What::Write if of_user => self.user && self.writable,
            What::Fetch if of_user => self.user && self.executable,
            What::Read => !(self.user && smap),
            What::Write => self.writable && !(self.user && smap),
            What::Fetch => self.executable && !(self.user && smep),
        }
    }
}

/// Where a walk stands: about to read a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stand {
    table: u64,
    level: u32,
    rights: Rights,
}

/// A translation of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cached {
    pub page: u64,
    /// The guest's frame.
    pub frame: u64,
    pub rights: Rights,
}

/// Bits of an address that the tables see.
fn seen(va: u64, legacy: bool) -> u64 {
    if legacy {
        va & 0xffff_ffff
    } else {
        va
    }
}

/// What the entries with an index above this level's share.
fn prefix(va: u64, level: u32) -> u64 {
    va >> (12 + 9 * level)
}

/// The processor's walk from `from` on: the translation, and where it stood at each level.
pub fn walk_shadow(
    tables: &HostTables,
    legacy: bool,
    from: Stand,
    va: u64,
    marks: Option<bool>,
) -> (Option<Cached>, Vec<Stand>) {
    let va = seen(va, legacy);
    let mut at = from;
    let mut stood = vec![];
    loop {
        let index = (va >> (12 + 9 * (at.level - 1)) & 511) as usize;
        let entry = tables.peek(at.table, index).expect("C3: a walk of a table that was freed");
        // Not present, or a note about device memory: malformed by its highest address bit.
        if entry & 1 == 0 || entry & (1 << 11 | 1 << 51) == 1 << 51 {
            return (None, stood);
        }
        let pdpte = legacy && at.level == 3;
        assert!(entry >> 46 & 0x3f == 0, "B1");
        assert!(!pdpte || entry & 0x1e6 == 0, "B1: PDPTE {entry:#x}");
        if !pdpte {
            at.rights.writable &= entry >> 1 & 1 == 1;
            at.rights.user &= entry >> 2 & 1 == 1;
            at.rights.executable &= entry >> 63 == 0;
        }
        let frame = (entry & 0x000f_ffff_ffff_f000) >> 12;
        if at.level == 1 || (!pdpte && entry >> 7 & 1 == 1) {
            if let Some(dirty) = marks {
                tables.mark(at.table, index, if dirty { 0x60 } else { 0x20 });
            }
            let pages = 1u64 << (9 * (at.level - 1));
            let page = frame + (va >> 12 & (pages - 1));
            let rights = at.rights;
            return (Some(Cached { page: va >> 12, frame: page - MOVED, rights }), stood);
        }
        at = Stand { table: frame, level: at.level - 1, rights: at.rights };
        stood.push(at);
    }
}

/// Where a walk from `root` begins.
pub fn top(root: Root) -> Stand {
    Stand { table: root.hpa.pfn().number(), level: root.level as u32, rights: Rights::ALL }
}

/// What a CPU keeps under one tag.
#[derive(Clone, Debug, Default)]
pub struct Tlb {
    pages: Vec<Cached>,
    /// The paging-structure caches: where walks with these upper bits stood.
    structures: Vec<(u64, Stand)>,
}

impl Tlb {
    pub fn flush(&mut self) {
        *self = Self::default();
    }

    /// INVLPG, and what a page fault does by itself: the address, and all paging structures.
    pub fn flush_page(&mut self, va: u64, legacy: bool) {
        self.pages.retain(|cached| cached.page != seen(va, legacy) >> 12);
        self.structures.clear();
    }

    pub fn find(&self, va: u64, legacy: bool) -> Option<Cached> {
        self.pages.iter().find(|cached| cached.page == seen(va, legacy) >> 12).copied()
    }

    /// The deepest place that the paging-structure caches know for the address.
    pub fn stand(&self, va: u64, legacy: bool) -> Option<Stand> {
        let va = seen(va, legacy);
        let known = self.structures.iter().filter(|(at, stand)| *at == prefix(va, stand.level));
        known.map(|&(_, stand)| stand).min_by_key(|stand| stand.level)
    }

    pub fn insert(&mut self, cached: Cached) {
        self.pages.retain(|old| old.page != cached.page);
        self.pages.push(cached);
    }

    pub fn insert_structures(&mut self, va: u64, legacy: bool, stood: &[Stand]) {
        for &stand in stood {
            let at = prefix(seen(va, legacy), stand.level);
            self.structures.retain(|(old, known)| (*old, known.level) != (at, stand.level));
            self.structures.push((at, stand));
        }
    }

    /// C3: no paging-structure cache names a table that is gone.
    pub fn check(&self, tables: &HostTables) {
        for (_, stand) in &self.structures {
            assert!(tables.peek(stand.table, 0).is_some(), "C3: {stand:x?} is of a table that was freed");
        }
    }

    pub fn pages(&self) -> &[Cached] {
        &self.pages
    }
}
