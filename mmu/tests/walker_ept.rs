//! Walks of L1's extended page tables against the reference walk: complete products, every bit, every mark.
mod support;

use std::cell::RefCell;

use mmu::{
    Access, AccessKind, CpuId, EptExit, Gpa, Level, LogFull, MarkObserver, NGpa, Observed, PagingContext,
    Prot, RootRole, VcpuMode, VmMemory, WalkError, WalkRegs,
};
use support::flat::FlatRam;
use support::manual::ept::{walk, Failed, Machine, Op, OPS};
use support::manual::ept_guest::{compare, context, found, pointer};
use support::manual::guest::{memory, RAM_BYTES};

const BASE: Machine = Machine {
    levels: 4,
    execute_only: true,
    mode_based: false,
    accessed_dirty: true,
    mib_pages: true,
    gib_pages: true,
    maxphyaddr: 46,
    root: 0x1000,
};

/// An L2 address that uses another index at each level, and has none of bits 51:48 set.
const GPA: u64 = 3 << 39 | 5 << 30 | 7 << 21 | 9 << 12 | 0x123;
/// Accessed and dirty, as leaves and links have them.
const MARKED: u64 = 0x300;
const WRITE_BACK: u64 = 6 << 3;

fn places(levels: u64) -> Vec<u64> {
    let indexes = [0u64, 3, 5, 7, 9];
    (0..levels).map(|step| (step + 1) * 0x1000 + indexes[(5 - levels + step) as usize] * 8).collect()
}

fn link(memory: &VmMemory<FlatRam>, places: &[u64], flags: &[u64]) {
    for (step, (&place, &flags)) in places.iter().zip(flags).enumerate() {
        memory.backing().set(place, ((step as u64 + 2) * 0x1000) | flags);
    }
}

/// Read, write, execute and user execute, from four bits.
fn rights(bits: u64) -> u64 {
    bits & 7 | (bits & 8) << 7
}

fn machines() -> impl Iterator<Item = Machine> {
    (0..8u32).map(|bits| Machine {
        execute_only: bits & 1 != 0,
        mode_based: bits & 2 != 0,
        accessed_dirty: bits & 4 != 0,
        ..BASE
    })
}

/// All combinations of the four rights on all four levels; each control, each access.
#[test]
fn ept_exhaustive() {
    let memory = memory();
    let places = places(4);
    for m in machines() {
        let context = context(&m);
        for bits in 0..1u64 << 16 {
            let entry = |shift: u32| rights(bits >> shift) | MARKED;
            link(&memory, &places, &[entry(0), entry(4), entry(8), entry(12) | WRITE_BACK]);
            for op in OPS {
                compare_result(&memory, &context, &m, op);
            }
        }
    }
}

/// Compares results alone: for entries that have all their marks.
fn compare_result(memory: &VmMemory<FlatRam>, context: &PagingContext<NGpa, Gpa>, m: &Machine, op: Op) {
    let ram = memory.backing();
    let expected = walk(m, &|at| ram.get(at), GPA, op);
    match (expected, found(memory, context, m, GPA, op)) {
        (Ok(expected), Ok(found)) => assert_eq!((expected.address, expected.page_bytes), found),
        (Err(Failed::Misconfiguration), Err(EptExit::Misconfiguration)) => {}
        (Err(Failed::Violation(rights)), Err(EptExit::Violation(info))) => {
            assert_eq!(info.bits() & 0x78, rights, "{m:?} {op:?}");
        }
        (expected, found) => panic!("{m:?} {op:?}: expected {expected:x?}, found {found:x?}"),
    }
}

/// kut ept_access_test_reserved_bits, ept_access_test_ignored_bits; CVE-2017-12188: every level, large or not, every memory
/// type, every bit; each CPU.
#[test]
fn cve_2017_12188_every_bit_of_every_entry_of_ept() {
    let memory = memory();
    for levels in [4u32, 5] {
        let places = places(u64::from(levels));
        for bits in 0..32u32 {
            let m = Machine {
                levels,
                execute_only: bits & 1 != 0,
                mode_based: bits & 2 != 0,
                mib_pages: bits & 4 != 0,
                gib_pages: bits & 8 != 0,
                maxphyaddr: if bits & 16 != 0 { 39 } else { 52 },
                ..BASE
            };
            let context = context(&m);
            for level in 0..levels as usize {
                for large in [0, 0x80] {
                    for memory_type in [0u64, 1, 4, 6] {
                        for bit in 0..64 {
                            let mut entries = [7; 5];
                            entries[levels as usize - 1] |= WRITE_BACK;
                            link(&memory, &places, &entries[..levels as usize]);
                            let entry = memory.backing().get(places[level]).unwrap();
                            let leaf = large != 0 || level + 1 == levels as usize;
                            let entry = if large != 0 { entry & 0xfff } else { entry };
                            let entry = if leaf { entry & !0x38 | memory_type << 3 } else { entry };
                            memory.backing().set(places[level], (entry | large) ^ 1 << bit);
                            compare(&memory, &context, &m, GPA, Op::Read);
                        }
                    }
                }
            }
        }
    }
}

/// F1, F4 of EPT: accessed on every level, dirty on a written leaf; nothing without bit 6 of the pointer, nothing on a fault.
#[test]
fn ept_accessed_and_dirty_flags() {
    let memory = memory();
    let places = places(4);
    for m in machines() {
        let context = context(&m);
        for bits in 0..32u64 {
            for rights in [7u64, 5, 3, 0x407] {
                let flag = |step: u64| (bits >> step & 1) << 8;
                let leaf = rights | WRITE_BACK | flag(3) | (bits >> 4) << 9;
                link(&memory, &places, &[flag(0) | 7, flag(1) | 7, flag(2) | 7, leaf]);
                for op in OPS {
                    compare(&memory, &context, &m, GPA, op);
                }
            }
        }
    }
}

/// Four levels translate 48 bits: a higher address has no entry, and is no alias of a low one.
#[test]
fn ept_addresses_beyond_the_tables() {
    let memory = memory();
    link(&memory, &places(4), &[7, 7, 7, 7 | WRITE_BACK]);
    for bit in 48..52 {
        compare(&memory, &context(&BASE), &BASE, GPA | 1 << bit, Op::Read);
    }
    let m = Machine { levels: 5, ..BASE };
    link(&memory, &places(5), &[7, 7, 7, 7, 7 | WRITE_BACK]);
    for bit in 48..52 {
        compare(&memory, &context(&m), &m, GPA | 1 << bit, Op::Read);
    }
    compare(&memory, &context(&m), &m, GPA, Op::Write);
}

/// A table outside RAM.
#[test]
fn ept_tables_outside_ram() {
    let memory = memory();
    let places = places(4);
    for level in 0..3 {
        link(&memory, &places, &[7, 7, 7, 7 | WRITE_BACK]);
        memory.backing().set(places[level], RAM_BYTES | 7);
        for op in OPS {
            compare(&memory, &context(&BASE), &BASE, GPA, op);
        }
    }
}

/// L1's page-modification log.
#[derive(Default)]
struct Log {
    pages: RefCell<Vec<u64>>,
    marked: RefCell<Vec<(u64, usize)>>,
    full: bool,
}

impl MarkObserver for Log {
    fn marked(&self, at: Gpa, bytes: usize) {
        assert!(!self.pages.borrow().is_empty() || self.full, "the log comes before the mark");
        self.marked.borrow_mut().push((at.bits(), bytes));
    }
    fn log_dirty(&self, page: NGpa) -> Result<(), LogFull> {
        if self.full {
            return Err(LogFull);
        }
        self.pages.borrow_mut().push(page.bits());
        Ok(())
    }
}

/// F5: the log gets the page before its leaf is dirty; a full log stops the access with nothing changed.
#[test]
fn f5_the_page_modification_log_comes_before_the_dirty_flag() {
    let memory = memory();
    let places = places(4);
    let regs = WalkRegs { cr3: pointer(&BASE), ..WalkRegs::default() };
    let walk = |log: &Log, kind| {
        let shared = memory.shared(CpuId::BOOT);
        let observed = Observed { memory: &shared, observer: log };
        context(&BASE).translate(&observed, &regs, NGpa::new_truncate(GPA), Access::user(kind))
    };
    let reset = || link(&memory, &places, &[7 | 0x100, 7, 7, 7 | WRITE_BACK]);
    reset();
    let full = Log { full: true, ..Log::default() };
    assert_eq!(walk(&full, AccessKind::Write), Err(WalkError::LogFull));
    let untouched: Vec<u64> = places.iter().map(|&at| memory.backing().get(at).unwrap() & 0x300).collect();
    assert_eq!(untouched, [0x100, 0, 0, 0]);
    // A read makes nothing dirty.
    assert!(walk(&full, AccessKind::Read).is_ok());
    reset();
    let log = Log::default();
    assert!(walk(&log, AccessKind::Write).is_ok());
    assert_eq!(*log.pages.borrow(), [GPA & !0xfff]);
    let marked: Vec<(u64, usize)> = places[1..].iter().map(|&at| (at, 8)).collect();
    assert_eq!(*log.marked.borrow(), marked);
    // Dirty already: not logged again.
    assert!(walk(&log, AccessKind::Write).is_ok());
    assert_eq!(log.pages.borrow().len(), 1);
}

/// What a shadow of L1's tables is made from: rights of the parents, and the first ones are those of the root's role. A clean
/// leaf hides its writes if there are dirty flags at all.
#[test]
fn steps_of_ept_and_their_parents() {
    let memory = memory();
    let places = places(4);
    for m in machines() {
        let context = context(&m);
        let shared = memory.shared(CpuId::BOOT);
        let regs = WalkRegs { cr3: pointer(&m), ..WalkRegs::default() };
        for bits in 0..1u64 << 12 {
            let entries = [0u32, 4, 8].map(|shift| rights(bits >> shift) | 1);
            link(&memory, &places, &[entries[0], entries[1], entries[2], 0x407 | WRITE_BACK]);
            let read = Access::user(AccessKind::Read);
            let walk = context.walk(&shared, &regs, NGpa::new_truncate(GPA), read).unwrap();
            let root = RootRole::shadow(context.role(), Level::L4, VcpuMode::default(), true).page();
            assert_eq!(walk.steps()[0].parents, root.access);
            let mut parents = root.access;
            for (step, entry) in walk.steps().iter().zip(entries.into_iter().chain([0x407])) {
                assert_eq!(step.parents, parents);
                assert_eq!(step.entry & 0x100 != 0, m.accessed_dirty);
                let mut own = Prot::empty();
                own.set(Prot::READ, entry & 1 != 0);
                own.set(Prot::WRITE, entry & 2 != 0);
                own.set(Prot::EXECUTE, entry & 4 != 0);
                own.set(Prot::EXECUTE_USER, entry & 0x400 != 0);
                parents &= own;
            }
            assert_eq!(walk.translation.prot, parents);
            let hidden = if m.accessed_dirty { Prot::WRITE } else { Prot::empty() };
            assert_eq!(walk.shadow_prot, parents - hidden);
        }
    }
}
