//! Walks of L2 addresses through L1's nested tables: two stages, and the exact cause of a fault in either.
mod support;

use mmu::{
    Access, AccessKind, Cause, CpuId, CpuRole, Cr0, Cr4, Efer, FaultInfo, Gfn, GfnRange, Gpa, GuestCpu, Gva,
    Level, NGpa, NestedTables, NpfInfo, PageFaultCode, PagingContext, PagingRegs, Place, Shared, Slot,
    SlotFlags, Stage, Translation, VmMemory, WalkError, WalkRegs,
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
        let slot = Slot { range, flags: SlotFlags::empty(), cookie: 0 };
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
