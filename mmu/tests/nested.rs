//! Walks of L2 addresses through L1's nested tables: two stages, and the exact cause of a fault in either.
mod support;

use std::cell::RefCell;

use mmu::{
    Access, AccessKind, Cause, CpuId, CpuRole, Cr0, Cr4, Efer, EptExit, EptViolation, FaultInfo, Gfn,
    GfnRange, Gpa, GuestCpu, GuestEpt, Gva, Level, MarkObserver, NGpa, NestedTables, NestedWalk, NpfInfo,
    Observed, PageFaultCode, PagingContext, PagingRegs, Place, Shared, Slot, SlotFlags, Stage, Translation,
    VmMemory, WalkError, WalkRegs,
};
use support::flat::FlatRam;

const CPU: GuestCpu = GuestCpu { max_phys_addr: 46, gib_pages: true, pse36: true, amd: true };

/// Nested tables at 0x1000, one page each; L2's own at L2 address 0x10000, which is L1 address 0x20000.
const NCR3: u64 = 0x1000;
const NPTES: u64 = 0x4000;
const L2_CR3: u64 = 0x10000;
const L2_PTE: u64 = 0x23000 + 9 * 8;
const VA: u64 = 3 << 39 | 5 << 30 | 7 << 21 | 9 << 12 | 0x123;
/// The L2 page of [`VA`], and where L1 puts it.
const L2_PAGE: u64 = 0x18;
const L1_PAGE: u64 = 0x28;

struct World {
    memory: VmMemory<FlatRam>,
    nested: PagingContext<NGpa, Gpa>,
    l2: PagingContext<Gva, NGpa>,
}

fn role(efer: Efer, cr4: Cr4) -> PagingRegs {
    PagingRegs { cr0: Cr0::PG | Cr0::WP, cr4: cr4 | Cr4::PAE, efer: efer | Efer::LMA }
}

impl World {
    fn new(l1: PagingRegs) -> Self {
        let memory = VmMemory::new(FlatRam::new(0x40000));
        let range = GfnRange::new(Gfn::default(), 0x40).unwrap();
        let slot = Slot::new(range, SlotFlags::empty(), 0);
        memory.exclusive(CpuId::BOOT).insert_slot(&slot).unwrap();
        let ram = memory.backing();
        for table in [0x1000, 0x2000, 0x3000] {
            ram.set(table, (table + 0x1000) | 7);
        }
        for page in 0..0x20u64 {
            ram.set(NPTES + page * 8, (page + 0x10) << 12 | 7);
        }
        for (step, index) in [3u64, 5, 7].into_iter().enumerate() {
            let step = step as u64;
            ram.set(0x20000 + step * 0x1000 + index * 8, (L2_CR3 + (step + 1) * 0x1000) | 7);
        }
        ram.set(L2_PTE, L2_PAGE << 12 | 7);
        let l2 = CpuRole::new(&role(Efer::NXE, Cr4::SMEP), &CPU);
        Self {
            memory,
            nested: PagingContext::new(CpuRole::nested(&l1, &CPU, false)),
            l2: PagingContext::new(l2),
        }
    }

    fn tables<'w>(&'w self, shared: &'w Shared<'w, FlatRam>) -> NestedTables<'w, Shared<'w, FlatRam>> {
        NestedTables { context: &self.nested, regs: ncr3(), memory: shared }
    }

    /// Both stages, as an access of L2 makes them.
    fn access(&self, kind: AccessKind) -> Result<Translation<Gpa>, FaultInfo> {
        let shared = self.memory.shared(CpuId::BOOT);
        let regs = WalkRegs { cr3: L2_CR3, ..WalkRegs::default() };
        let l2 = self.l2.translate(&self.tables(&shared), &regs, Gva::new(VA), Access::at_cpl(kind, 3));
        let last = l2.and_then(|l2| self.nested.translate(&shared, &ncr3(), l2.address, Access::user(kind)));
        last.map_err(|error| match error {
            WalkError::Fault(fault) => fault,
            _ => panic!("nobody else is here"),
        })
    }

    fn change(&self, at: u64, change: impl Fn(u64) -> u64) {
        let ram = self.memory.backing();
        ram.set(at, change(ram.get(at).unwrap()));
    }
}

fn ncr3() -> WalkRegs {
    WalkRegs { cr3: NCR3, ..WalkRegs::default() }
}

fn npf(world: &World, kind: AccessKind) -> u64 {
    let fault = world.access(kind).unwrap_err();
    assert_eq!(fault.stage, Stage::NGpa);
    fault.npf_info().bits()
}

const L1: (Efer, Cr4) = (Efer::NXE, Cr4::empty());

#[test]
fn both_stages_translate_and_mark() {
    let world = World::new(role(L1.0, L1.1));
    let found = world.access(AccessKind::Write).unwrap();
    assert_eq!(found.address.bits(), L1_PAGE << 12 | 0x123);
    let ram = world.memory.backing();
    assert_eq!(ram.get(L2_PTE), Some(L2_PAGE << 12 | 0x67), "L2's leaf: accessed and dirty");
    assert_eq!(ram.get(NPTES + L2_PAGE * 8), Some(L1_PAGE << 12 | 0x67));
    // L2's tables count as written, for their accessed bits may be.
    assert_eq!(ram.get(NPTES + 0x10 * 8), Some(0x20067));
    assert_eq!(ram.get(NPTES + 0x13 * 8), Some(0x23067));
    assert_eq!(ram.get(NPTES + 0x14 * 8), Some(0x24007), "untouched");
    assert_eq!(ram.get(0x1000), Some(0x2027));
}

/// EXITINFO1 as kvm-unit-tests' svm_npt expects it.
#[test]
fn golden_npf_exit_info_1() {
    let leaf = NPTES + L2_PAGE * 8;
    let table = NPTES + 0x13 * 8;
    let case = |at, kind, change: fn(u64) -> u64| {
        let world = World::new(role(L1.0, L1.1));
        world.change(at, change);
        npf(&world, kind)
    };
    assert_eq!(case(leaf, AccessKind::Read, |e| e & !1), 0x1_0000_0004, "not present");
    assert_eq!(case(leaf, AccessKind::Execute, |e| e | 1 << 63), 0x1_0000_0015, "NX");
    assert_eq!(case(leaf, AccessKind::Read, |e| e & !4), 0x1_0000_0005, "supervisor page");
    assert_eq!(case(leaf, AccessKind::Write, |e| e & !2), 0x1_0000_0007, "write to a read-only page");
    assert_eq!(case(table, AccessKind::Read, |e| e & !2), 0x2_0000_0007, "walk of a read-only table");
    assert_eq!(case(0x1000, AccessKind::Read, |e| e | 1 << 8), 0x2_0000_000f, "reserved bit in the PML4E");
    assert_eq!(case(0x2000, AccessKind::Read, |e| e | 1 << 51), 0x2_0000_000f, "reserved bit in the PDPE");
    assert_eq!(case(leaf, AccessKind::Read, |e| e | 1 << 50), 0x1_0000_000d, "reserved bit in the PTE");
    assert_eq!(case(leaf, AccessKind::Execute, |e| e | 1 << 50), 0x1_0000_001d, "the same, by a fetch");
    // A fetch shows only if L1 has NX on.
    let world = World::new(role(Efer::empty(), Cr4::empty()));
    world.change(leaf, |e| e | 1 << 50);
    assert_eq!(npf(&world, AccessKind::Execute), 0x1_0000_000d);
}

/// 20260121004906.2373989-2: the cause of a nested fault is not always the final access.
#[test]
fn nested_fault_provenance_final_or_table_walk() {
    for (page, place) in [(0x10, Place::TableWalk), (0x12, Place::TableWalk), (L2_PAGE, Place::Final)] {
        let world = World::new(role(L1.0, L1.1));
        world.change(NPTES + page * 8, |_| 0);
        let fault = world.access(AccessKind::Read).unwrap_err();
        assert_eq!((fault.stage, fault.place, fault.cause), (Stage::NGpa, place, Cause::NotPresent));
        assert_eq!(fault.address >> 12, page);
        assert_eq!(fault.level, Level::L1);
    }
}

/// The world with extended page tables instead: L1's entries for L2's page, for the table with its leaf, and L2's leaf.
fn ept_exit(
    (page, table, l2_leaf): (u64, u64, u64),
    (accessed_dirty, execute_only): (bool, bool),
    kind: AccessKind,
) -> Result<u64, EptExit> {
    let world = World::new(role(L1.0, L1.1));
    let ram = world.memory.backing();
    for at in [0x1000, 0x2000, 0x3000] {
        ram.set(at, (at + 0x1000) | 7);
    }
    for page in 0..0x20u64 {
        ram.set(NPTES + page * 8, (page + 0x10) << 12 | 0x37);
    }
    ram.set(NPTES + L2_PAGE * 8, L1_PAGE << 12 | page);
    ram.set(NPTES + 0x13 * 8, 0x23000 | table);
    ram.set(L2_PTE, L2_PAGE << 12 | l2_leaf);
    let cpu = GuestEpt {
        max_phys_addr: 46,
        execute_only,
        five_level: false,
        mib_pages: true,
        gib_pages: true,
        accessed_dirty: true,
        advanced_info: false,
        mode_based_execute: false,
    };
    let pointer = NCR3 | 0x1e | u64::from(accessed_dirty) << 6;
    let context = PagingContext::new(CpuRole::ept(pointer, &cpu).unwrap());
    let shared = world.memory.shared(CpuId::BOOT);
    let regs = WalkRegs { cr3: pointer, ..WalkRegs::default() };
    let walk = NestedWalk {
        context: &world.l2,
        regs: WalkRegs { cr3: L2_CR3, ..WalkRegs::default() },
        tables: NestedTables { context: &context, regs, memory: &shared },
    };
    match walk.translate(Gva::new(VA), Access::at_cpl(kind, 3)) {
        Ok(found) => Ok(found.address.bits()),
        Err(WalkError::Fault(fault)) => Err(fault.ept_exit()),
        Err(_) => panic!("nobody else is here"),
    }
}

/// Exit qualifications as kvm-unit-tests' ept_access_test_* expect them, for the page itself; bits 8:7 are set in all.
/// d95c55687e11: an entry that permits fetches alone is not readable. 0780516a18f8: bits 5:3 are read, write, fetch.
/// d0164c161923: bits 8:7 say that there is a linear address, and that the access was to its translation.
#[test]
fn commits_d95c55687e11_0780516a18f8_d0164c161923_golden_exit_qualifications() {
    use AccessKind::{Execute, Read, Write};
    let violation = |bits| Err(EptExit::Violation(EptViolation::from_bits(bits).unwrap()));
    let misconfigured = Err(EptExit::Misconfiguration);
    let fine = Ok(L1_PAGE << 12 | 0x123);
    let case = |rights: u64, kind| ept_exit((0x30 | rights, 0x37, 0x67), (false, true), kind);
    for (rights, read, write, execute) in [
        (0, violation(0x181), violation(0x182), violation(0x184)),
        (1, fine, violation(0x18a), violation(0x18c)),
        (2, misconfigured, misconfigured, misconfigured),
        (3, fine, fine, violation(0x19c)),
        (4, violation(0x1a1), violation(0x1a2), fine),
        (5, fine, violation(0x1aa), fine),
        (6, misconfigured, misconfigured, misconfigured),
        (7, fine, fine, fine),
    ] {
        assert_eq!(case(rights, Read), read, "{rights:#b}");
        assert_eq!(case(rights, Write), write, "{rights:#b}");
        assert_eq!(case(rights, Execute), execute, "{rights:#b}");
    }
    assert_eq!(ept_exit((0x34, 0x37, 0x67), (false, false), Read), misconfigured, "no execute-only pages");
}

/// The same for a table of L2, ept_access_test_paddr_*: bit 8 is clear. With accessed and dirty flags a walk is a write, and
/// reads as well; without, marking an entry is one.
#[test]
fn golden_exit_qualifications_of_table_walks() {
    use AccessKind::{Execute, Read, Write};
    let violation = |bits| Err(EptExit::Violation(EptViolation::from_bits(bits).unwrap()));
    let fine = Ok(L1_PAGE << 12 | 0x123);
    let case =
        |rights: u64, l2_leaf, flags, kind| ept_exit((0x37, 0x30 | rights, l2_leaf), (flags, true), kind);
    for kind in [Read, Write, Execute] {
        assert_eq!(case(0, 0x67, false, kind), violation(0x81), "not present, {kind:?}");
        assert_eq!(case(0, 0x67, true, kind), violation(0x83), "not present, with flags, {kind:?}");
        assert_eq!(case(1, 0x07, false, kind), violation(0x8b), "an accessed bit to set, {kind:?}");
        assert_eq!(case(5, 0x07, false, kind), violation(0xab), "the same, executable, {kind:?}");
        assert_eq!(case(1, 0x67, false, kind), fine, "nothing to set, {kind:?}");
        assert_eq!(case(1, 0x67, true, kind), violation(0x8b), "a walk is a write, {kind:?}");
        assert_eq!(case(3, 0x07, true, kind), fine, "{kind:?}");
        assert_eq!(case(2, 0x67, false, kind), Err(EptExit::Misconfiguration), "{kind:?}");
    }
    assert_eq!(case(1, 0x27, false, Read), fine);
    assert_eq!(case(1, 0x27, false, Write), violation(0x8b), "a dirty bit to set");
    assert_eq!(case(1, 0x27, false, Execute), fine);
}

/// Guest mode execute trap, as kvm-unit-tests' npt_gmet expects it: the U bit of the code is clear.
#[test]
fn golden_npf_exit_info_1_of_guest_mode_execute_trap() {
    let world = World::new(role(L1.0, L1.1));
    world.change(L2_PTE, |entry| entry & !4);
    let fetch = |trap, l1_leaf: u64, cpl| {
        let nested = PagingContext::new(CpuRole::nested(&role(L1.0, L1.1), &CPU, trap));
        world.change(NPTES + L2_PAGE * 8, |_| L1_PAGE << 12 | l1_leaf);
        let shared = world.memory.shared(CpuId::BOOT);
        let walk = NestedWalk {
            context: &world.l2,
            regs: WalkRegs { cr3: L2_CR3, ..WalkRegs::default() },
            tables: NestedTables { context: &nested, regs: ncr3(), memory: &shared },
        };
        match walk.translate(Gva::new(VA), Access::at_cpl(AccessKind::Execute, cpl)) {
            Ok(_) => None,
            Err(WalkError::Fault(fault)) => Some(fault.npf_info().bits()),
            Err(_) => panic!("nobody else is here"),
        }
    };
    assert_eq!(fetch(true, 7, 0), Some(0x1_0000_0011));
    assert_eq!(fetch(true, 3, 0), None, "a supervisor's page");
    assert_eq!(fetch(false, 7, 0), None);
    assert_eq!(fetch(false, 3, 0), Some(0x1_0000_0015), "without it every access is a user's");
}

/// H1: what walks mark is reported by L1's addresses, of both stages, each before it counts.
#[test]
fn h1_marks_of_both_stages_are_reported() {
    #[derive(Default)]
    struct Log(RefCell<Vec<u64>>);
    impl MarkObserver for Log {
        fn marked(&self, at: Gpa, bytes: usize) {
            assert_eq!(bytes, 8);
            self.0.borrow_mut().push(at.bits());
        }
    }
    let world = World::new(role(L1.0, L1.1));
    let log = Log::default();
    let shared = world.memory.shared(CpuId::BOOT);
    let observed = Observed { memory: &shared, observer: &log };
    let walk = NestedWalk {
        context: &world.l2,
        regs: WalkRegs { cr3: L2_CR3, ..WalkRegs::default() },
        tables: NestedTables { context: &world.nested, regs: ncr3(), memory: &observed },
    };
    let before: Vec<_> = (0..0x40000).step_by(8).map(|at| world.memory.backing().get(at)).collect();
    walk.translate(Gva::new(VA), Access::at_cpl(AccessKind::Write, 3)).unwrap();
    let changed = (0..0x40000).step_by(8).zip(before);
    let changed = changed.filter(|&(at, word)| world.memory.backing().get(at) != word).map(|(at, _)| at);
    let mut reported = log.0.borrow().clone();
    reported.sort_unstable();
    assert!(changed.eq(reported), "each once");
    log.0.borrow_mut().clear();
    walk.translate(Gva::new(VA), Access::at_cpl(AccessKind::Write, 3)).unwrap();
    assert!(log.0.borrow().is_empty(), "nothing is left to be marked");
}

/// A fault of L2's own tables is L2's, whatever L1's tables permit.
#[test]
fn a_fault_of_the_first_stage_is_a_page_fault() {
    let world = World::new(role(L1.0, L1.1));
    world.change(L2_PTE, |entry| entry & !2);
    let fault = world.access(AccessKind::Write).unwrap_err();
    assert_eq!((fault.stage, fault.address, fault.level), (Stage::Gva, VA, Level::L1));
    assert_eq!(fault.page_fault_code(), PageFaultCode::PRESENT | PageFaultCode::WRITE | PageFaultCode::USER);
    assert_eq!(world.memory.backing().get(L2_PTE), Some(L2_PAGE << 12 | 5), "nothing is marked");
}

/// CR0.WP, SMAP, SMEP and protection keys of L1 do not change how its nested tables are read.
#[test]
fn nested_tables_are_read_as_user_accesses() {
    let plain = CpuRole::nested(&role(Efer::NXE, Cr4::empty()), &CPU, false);
    for cr4 in [Cr4::SMEP, Cr4::SMAP, Cr4::PKE] {
        assert_eq!(CpuRole::nested(&role(Efer::NXE, cr4), &CPU, false), plain);
    }
    let no_wp = PagingRegs { cr0: Cr0::empty(), ..role(Efer::NXE, Cr4::empty()) };
    assert_eq!(CpuRole::nested(&no_wp, &CPU, false), plain);
}

#[test]
fn exit_info_1_reads_back() {
    for bits in [0x1_0000_0004u64, 0x1_0000_0015, 0x2_0000_0007, 0x2_0000_000f] {
        assert_eq!(NpfInfo::from_bits(bits).bits(), bits);
    }
    let write = NpfInfo::from_bits(0x2_0000_0006);
    assert_eq!((write.access(), write.place), (AccessKind::Write, Place::TableWalk));
    assert_eq!(NpfInfo::from_bits(0x1_0000_0014).access(), AccessKind::Execute);
    assert_eq!(NpfInfo::from_bits(0x1_0000_0004).access(), AccessKind::Read);
    assert_eq!(NpfInfo::from_bits(u64::MAX).code, PageFaultCode::all());
}
