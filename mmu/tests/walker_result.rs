//! What a walk tells a shadow of the tables: entries, places, the rights of the parents, what a clean leaf permits.
mod support;

use std::cell::Cell;

use mmu::{
    Access, AccessKind, BelowError, Cause, CpuId, Gpa, GuestWalk, Gva, Level, PagingContext, Prot, SlotFlags,
    TableSource, Update, VmMemory, WalkError,
};
use support::flat::FlatRam;
use support::manual::guest::{
    access, context, flags, link, memory, places, regs, slotted, BASE, RAM_BYTES, VA,
};
use support::manual::{Machine, What, Who};

fn walk(memory: &VmMemory<FlatRam>, m: &Machine, va: u64, what: What) -> GuestWalk<Gpa> {
    let shared = memory.shared(CpuId::BOOT);
    context(m).walk(&shared, &regs(m), Gva::new(va), access(what, Who::Supervisor)).unwrap()
}

/// Rights of an entry with these bits.
fn rights(entry: u64) -> Prot {
    let mut prot = Prot::READ;
    prot.set(Prot::WRITE, entry & 2 != 0);
    prot.set(Prot::USER, entry & 4 != 0);
    prot.set(Prot::EXECUTE, entry >> 63 == 0);
    prot
}

/// CVE-2021-38198: each level has the rights of its parents, and of nothing below: all rights of all four levels.
#[test]
fn cve_2021_38198_each_step_has_the_rights_of_its_parents_alone() {
    let memory = memory();
    let places = places(4);
    for bits in 0..1u64 << 12 {
        // Present always; three rights a level.
        let entries = [0u32, 3, 6, 9].map(|shift| flags((bits >> shift & 7) << 1) | 1);
        link(&memory, &places, &entries);
        let walk = walk(&memory, &BASE, VA, What::Read);
        let mut parents = Prot::UNPAGED;
        assert_eq!(walk.steps().len(), 4);
        for (position, step) in walk.steps().iter().enumerate() {
            assert_eq!(step.at.bits(), places[position]);
            assert_eq!(step.entry, memory.backing().get(places[position]).unwrap());
            assert_eq!(step.parents, parents, "{bits:#b} at {:?}", step.level);
            assert_eq!(Some(step), walk.step(step.level));
            parents &= rights(entries[position]);
        }
        assert_eq!(walk.translation.prot, parents);
        assert_eq!(walk.shadow_prot, parents, "the leaf is dirty");
    }
}

#[test]
fn levels_of_every_mode() {
    let memory = memory();
    let ram = memory.backing();
    let levels = |walk: &GuestWalk<Gpa>| walk.steps().iter().map(|step| step.level as u8).collect::<Vec<_>>();
    let m = Machine { la57: true, ..BASE };
    link(&memory, &places(5), &[0x67; 5]);
    let found = walk(&memory, &m, VA, What::Read);
    assert_eq!((levels(&found), found.level), (vec![5, 4, 3, 2, 1], Level::L1));
    link(&memory, &places(4), &[0x67; 4]);
    ram.set(places(4)[2], 0x67 | 0x180 | 9 << 59);
    let found = walk(&memory, &BASE, VA, What::Read);
    assert_eq!((levels(&found), found.level), (vec![4, 3, 2], Level::L2));
    assert_eq!((found.key, found.global, found.dirty), (9, true, true));
    ram.set(places(4)[1], 0x67 | 0x80);
    let found = walk(&memory, &BASE, VA, What::Read);
    assert_eq!((levels(&found), found.level), (vec![4, 3], Level::L3));
    assert_eq!((found.key, found.global), (0, false));
    // PAE: the PDPTE is no step.
    let pae = Machine { lma: false, ..BASE };
    ram.set(0x1000, 0x2001);
    ram.set(0x2000, 0x3067);
    ram.set(0x3000, 0x4067);
    let found = walk(&memory, &pae, 0x123, What::Read);
    assert_eq!((levels(&found), found.pdpte), (vec![2, 1], Some(0x2001)));
    assert_eq!(found.step(Level::L2).unwrap().parents, Prot::UNPAGED);
    // Four-byte entries.
    let short = Machine { pae: false, pse: true, ..pae };
    ram.set_u32(0x1004, 0x0000_21e7);
    let found = walk(&memory, &short, 0x40_0123, What::Read);
    assert_eq!((levels(&found), found.level, found.global), (vec![2], Level::L2, true));
    assert_eq!(found.step(Level::L2).map(|step| (step.at.bits(), step.entry)), Some((0x1004, 0x21e7)));
    let unpaged = Machine { pg: false, ..pae };
    let found = walk(&memory, &unpaged, 0x123, What::Read);
    assert_eq!((levels(&found), found.shadow_prot, found.dirty), (vec![], Prot::UNPAGED, true));
}

/// F4: a clean leaf permits no write before it is dirty, in any mode; a write makes it dirty, and the steps say so.
#[test]
fn f4_a_clean_leaf_is_shadowed_read_only() {
    let memory = memory();
    let places = places(4);
    for large in [false, true] {
        let reset = || {
            link(&memory, &places, &[7; 4]);
            if large {
                memory.backing().set(places[2], 0x87);
            }
        };
        let leaf = if large { places[2] } else { places[3] };
        reset();
        for what in [What::Read, What::Fetch] {
            let found = walk(&memory, &BASE, VA, what);
            assert!(found.translation.prot.contains(Prot::WRITE), "the tables permit it");
            assert!(!found.dirty && !found.shadow_prot.contains(Prot::WRITE));
            assert_eq!(found.shadow_prot | Prot::WRITE, found.translation.prot);
            let last = found.steps().last().unwrap();
            assert_eq!((last.at.bits(), Some(last.entry)), (leaf, memory.backing().get(leaf)));
            assert_eq!(last.entry & 0x60, 0x20);
        }
        reset();
        let found = walk(&memory, &BASE, VA, What::Write);
        assert!(found.dirty && found.shadow_prot.contains(Prot::WRITE));
        for step in found.steps() {
            assert_eq!(Some(step.entry), memory.backing().get(step.at.bits()), "as it is in memory");
        }
    }
}

/// In read-only memory a leaf cannot be made dirty: steps have the entries as they are; a write is a write all the same.
#[test]
fn steps_of_tables_in_read_only_memory_are_not_marked() {
    let memory = slotted(FlatRam::new(RAM_BYTES as usize), SlotFlags::READ_ONLY);
    link(&memory, &places(4), &[7; 4]);
    let found = walk(&memory, &BASE, VA, What::Write);
    assert!(found.steps().iter().all(|step| step.entry & 0x60 == 0));
    assert!(!found.dirty && found.shadow_prot.contains(Prot::WRITE));
    assert!(!walk(&memory, &BASE, VA, What::Read).shadow_prot.contains(Prot::WRITE));
}

/// Tables whose memory goes away while they are walked.
struct Vanishing<'r> {
    ram: &'r FlatRam,
    gone: Cell<bool>,
}

impl Vanishing<'_> {
    fn get(&self, at: Gpa) -> Result<u64, BelowError> {
        let word = self.ram.get(at.bits()).filter(|_| !self.gone.get());
        word.ok_or(BelowError::NotRam)
    }
}

impl TableSource<Gpa> for Vanishing<'_> {
    fn read_u64(&self, at: Gpa) -> Result<u64, BelowError> {
        self.get(at)
    }
    fn read_u32(&self, _: Gpa) -> Result<u32, BelowError> {
        panic!("entries have eight bytes here");
    }
    fn update_u64(&self, at: Gpa, _: u64, _: u64) -> Result<Update, BelowError> {
        self.gone.set(true);
        self.get(at).map(|_| Update::Done)
    }
    fn update_u32(&self, _: Gpa, _: u32, _: u32) -> Result<Update, BelowError> {
        panic!("entries have eight bytes here");
    }
}

/// CVE-2022-1158, F3: entries are marked by their guest-physical address, through whatever is there now. If nothing is, the
/// walk fails like one that found no table, and nothing is written.
#[test]
fn cve_2022_1158_memory_that_goes_during_the_walk_is_not_written() {
    let memory = memory();
    link(&memory, &places(4), &[7; 4]);
    let tables = Vanishing { ram: memory.backing(), gone: Cell::new(false) };
    let context: PagingContext<Gva, Gpa> = context(&BASE);
    let found = context.translate(&tables, &regs(&BASE), Gva::new(VA), Access::at_cpl(AccessKind::Write, 3));
    let Err(WalkError::Fault(fault)) = found else { panic!("{found:?}") };
    assert_eq!((fault.cause, fault.level, fault.page_fault_code().bits()), (Cause::NoTable, Level::L4, 6));
    assert!(places(4).iter().all(|&at| memory.backing().get(at).unwrap() & 0x60 == 0));
}

/// Without NXE, and with four-byte entries, everything is executable, and the result says so.
#[test]
fn pages_are_executable_where_nothing_can_forbid_it() {
    let memory = memory();
    link(&memory, &places(4), &[0x67; 4]);
    for nxe in [false, true] {
        let found = walk(&memory, &Machine { nxe, ..BASE }, VA, What::Read);
        assert_eq!(found.translation.prot, Prot::UNPAGED);
        assert!(found.steps().iter().all(|step| step.parents == Prot::UNPAGED));
    }
    memory.backing().set(0x1000, 0x67 | 0x80);
    for nxe in [false, true] {
        let m = Machine { lma: false, pae: false, pse: true, nxe, ..BASE };
        assert_eq!(walk(&memory, &m, 0x123, What::Read).translation.prot, Prot::UNPAGED);
    }
}
