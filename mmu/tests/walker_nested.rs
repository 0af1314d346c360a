//! Walks of L2 addresses through both stages against the two reference walks: EPT12 and NPT12, all of their rights, and where
//! exactly a walk failed.
mod support;

use mmu::{
    Access, AccessKind, BelowError, CpuId, CpuRole, EptExit, Gpa, Gva, NGpa, NestedTables, NestedWalk,
    PagingContext, PdpteError, Prot, VmMemory, WalkError, WalkRegs,
};
use support::flat::FlatRam;
use support::manual::guest::{accesses, context, memory, registers, BASE, RAM_BYTES};
use support::manual::nested::{found, Below, End};
use support::manual::{ept, Machine, What, Who};

/// L1's tables for L2 at 0x1000 to 0x4000, one entry each on the upper levels; L2's own at L2 address 0x10000 on, which are at
/// 0x5000 to 0x7000 of L1, where each has an entry for [`VA`].
const ROOT: u64 = 0x1000;
const LEAVES: u64 = 0x4000;
const L2_CR3: u64 = 0x10000;
const VA: u64 = 5 << 30 | 7 << 21 | 9 << 12 | 0x123;
const L2_PAGE: u64 = 0x18;
const L1_PAGE: u64 = 0x28;
/// L2's tables by L2 frame; the first two levels share one page.
const L2_TABLES: [(u64, u64); 3] = [(0x10, 0x5000), (0x11, 0x6000), (0x12, 0x7000)];
/// L2's entries for [`VA`], where L1 sees them.
const L2_ENTRIES: [u64; 4] = [0x5000, 0x5000 + 5 * 8, 0x6000 + 7 * 8, 0x7000 + 9 * 8];

/// Memory with all tables, their rights full. `link` and `leaf` are L1's entries without an address.
fn world(link: u64, leaf: u64) -> VmMemory<FlatRam> {
    let memory = memory();
    let ram = memory.backing();
    for table in [0x1000, 0x2000, 0x3000] {
        ram.set(table, (table + 0x1000) | link);
    }
    for (page, at) in L2_TABLES {
        ram.set(LEAVES + page * 8, at | leaf);
    }
    ram.set(LEAVES + L2_PAGE * 8, L1_PAGE << 12 | leaf);
    // L2's top two levels are one table, which refers to itself.
    ram.set(L2_ENTRIES[0], L2_CR3 | 7);
    for (entry, table) in [(1, 0x11), (2, 0x12), (3, L2_PAGE)] {
        ram.set(L2_ENTRIES[entry], table << 12 | 7);
    }
    memory
}

const EPT: ept::Machine = ept::Machine {
    levels: 4,
    execute_only: true,
    mode_based: false,
    accessed_dirty: true,
    mib_pages: true,
    gib_pages: true,
    maxphyaddr: 46,
    root: ROOT,
};

/// L1 as its nested tables are read: CR0.WP set, SMAP and protection keys off.
const NPT: Machine = Machine { cr3: ROOT, ..BASE };

fn belows() -> Vec<Below> {
    let mut all = vec![];
    for bits in 0..8u32 {
        all.push(Below::Ept(ept::Machine {
            mode_based: bits & 1 != 0,
            accessed_dirty: bits & 2 != 0,
            execute_only: bits & 4 != 0,
            ..EPT
        }));
    }
    for bits in 0..4u32 {
        all.push(Below::Npt(Machine { nxe: bits & 1 != 0, smep: bits & 2 != 0, ..NPT }));
    }
    all
}

/// Rights of an entry of L1, from four bits; accessed and dirty are set by a fifth.
fn entry(below: &Below, bits: u64) -> u64 {
    match below {
        Below::Ept(_) => bits & 7 | (bits & 8) << 7 | if bits & 16 != 0 { 0x300 } else { 0 },
        Below::Npt(_) => bits & 7 | (bits & 8) << 60 | if bits & 16 != 0 { 0x60 } else { 0 },
    }
}

fn kind_of_leaf(below: &Below) -> (u64, u64) {
    match below {
        Below::Ept(_) => (0x407, 0x437),
        Below::Npt(_) => (7, 7),
    }
}

/// One case in fresh memory, each way: the same end, the same memory afterwards.
fn compare(below: &Below, l2: &Machine, change: &dyn Fn(&FlatRam), what: What, who: Who) {
    let (link, leaf) = kind_of_leaf(below);
    let (one, other) = (world(link, leaf), world(link, leaf));
    change(one.backing());
    change(other.backing());
    let (expected, _) = below.end(one.backing(), l2, VA, what, who);
    let got = found(&other, below, l2, VA, what, who);
    assert_eq!(got, expected, "{below:?} {l2:?} {what:?} {who:?}");
    for at in (0..RAM_BYTES).step_by(8) {
        assert_eq!(other.backing().get(at), one.backing().get(at), "{below:?} {what:?} {who:?} at {at:#x}");
    }
}

/// A1 for L2, G1, G3: all rights of L1's leaf of the page, times all of L2's leaf.
#[test]
fn g1_rights_of_both_leaves() {
    for below in belows() {
        for smep in [false, true] {
            let l2 = Machine { cr3: L2_CR3, smep, ..BASE };
            for bits in 0..1u64 << 9 {
                let change = |ram: &FlatRam| {
                    let leaf = kind_of_leaf(&below).1 & 0x38;
                    ram.set(LEAVES + L2_PAGE * 8, L1_PAGE << 12 | entry(&below, bits) | leaf);
                    let rights = bits >> 5;
                    ram.set(L2_ENTRIES[3], L2_PAGE << 12 | rights & 7 | (rights & 8) << 60 | 0x20);
                };
                for (what, who) in accesses() {
                    compare(&below, &l2, &change, what, who);
                }
            }
        }
    }
}

/// G3, G4: all rights of L1's leaf of each table of L2, with and without marks to make.
#[test]
fn g3_rights_of_the_leaves_of_tables() {
    for below in belows() {
        let l2 = Machine { cr3: L2_CR3, ..BASE };
        for (page, at) in L2_TABLES {
            for bits in 0..1u64 << 7 {
                let change = |ram: &FlatRam| {
                    let leaf = kind_of_leaf(&below).1 & 0x38;
                    ram.set(LEAVES + page * 8, at | entry(&below, bits) | leaf);
                    for l2 in L2_ENTRIES {
                        ram.set(l2, ram.get(l2).unwrap() | (bits >> 5) << 5);
                    }
                };
                for (what, who) in accesses() {
                    compare(&below, &l2, &change, what, who);
                }
            }
        }
    }
}

/// G2: every bit of each entry of L1 on the way, one at a time: L1's own MAXPHYADDR and features decide.
#[test]
fn g2_every_bit_of_the_entries_of_l1() {
    for below in belows() {
        let l2 = Machine { cr3: L2_CR3, ..BASE };
        let leaves = [0x10, 0x11, 0x12, L2_PAGE].map(|page| LEAVES + page * 8);
        for at in [0x1000, 0x2000, 0x3000].into_iter().chain(leaves) {
            for bit in 0..64 {
                let change = |ram: &FlatRam| ram.set(at, ram.get(at).unwrap() ^ 1 << bit);
                for (what, who) in
                    [(What::Read, Who::User), (What::Write, Who::Supervisor), (What::Fetch, Who::User)]
                {
                    compare(&below, &l2, &change, what, who);
                }
            }
        }
    }
}

/// CVE-2026-46032: L2's root where L1's tables have nothing.
#[test]
fn cve_2026_46032_a_root_of_l2_that_is_not_mapped() {
    for below in belows() {
        for cr3 in [0x15000, 1 << 40, 1 << 46, 1 << 51] {
            let l2 = Machine { cr3, ..BASE };
            for (what, who) in accesses() {
                compare(&below, &l2, &|_| {}, what, who);
            }
        }
    }
}

/// G7, ee6268ba3a68: an L1 with 32-bit paging, with and without PAE. L2 addresses above 4 GiB have no entry there.
#[test]
fn commit_ee6268ba3a68_nested_tables_of_a_32_bit_l1() {
    let memory = memory();
    let ram = memory.backing();
    ram.set(0x1000, 0x2001);
    ram.set(0x2000, 0x3067);
    ram.set(0x3000 + 9 * 8, 0x4067);
    let pae = Machine { lma: false, ..NPT };
    check_short(&memory, &pae);
    ram.set_u32(0x1000, 0x2067);
    ram.set_u32(0x2000 + 9 * 4, 0x4067);
    check_short(&memory, &Machine { pae: false, pse: true, ..pae });
}

fn check_short(memory: &VmMemory<FlatRam>, m: &Machine) {
    let (regs, cpu) = registers(m);
    let tables = PagingContext::<NGpa, Gpa>::new(CpuRole::nested(&regs, &cpu, false));
    let shared = memory.shared(CpuId::BOOT);
    let ncr3 = WalkRegs { cr3: ROOT, ..WalkRegs::default() };
    let read = Access::user(AccessKind::Read);
    let at = |gpa| tables.translate(&shared, &ncr3, NGpa::new_truncate(gpa), read);
    assert_eq!(at(0x9123).unwrap().address.bits(), 0x4123);
    let Err(WalkError::Fault(fault)) = at(0x1_0000_9123) else { panic!("no alias of 0x9123") };
    assert_eq!(fault.npf_info().bits(), 0x1_0000_0004);
    assert_eq!(fault.address, 0x1_0000_9123);
}

/// P16: a load of PDPTE registers reads, also where a walk counts as a write, and a violation has no linear address.
#[test]
fn g7_loads_of_pdptes_through_ept() {
    let (tables, root) = Below::Ept(EPT).context();
    let memory = world(7, 0x37);
    let l2 = context(&Machine { lma: false, ..BASE });
    let l2 = PagingContext::<Gva, NGpa>::new(l2.role());
    let load = |leaf: u64| {
        memory.backing().set(LEAVES + 0x10 * 8, 0x5000 | leaf);
        (0..4).for_each(|index| memory.backing().set(0x5000 + index * 8, 0x11001));
        let shared = memory.shared(CpuId::BOOT);
        let regs = WalkRegs { cr3: root, ..WalkRegs::default() };
        l2.load_pdptes(&NestedTables { context: &tables, regs, memory: &shared }, L2_CR3)
    };
    assert_eq!(load(0x31), Ok([0x11001; 4]));
    assert_eq!(memory.backing().get(LEAVES + 0x10 * 8), Some(0x5131), "accessed, not dirty");
    let Err(PdpteError::Unreachable(BelowError::Fault(fault))) = load(0) else { panic!("not present") };
    assert_eq!(fault.address, L2_CR3);
    let EptExit::Violation(info) = fault.ept_exit() else { panic!("nothing is misconfigured") };
    assert_eq!(info.bits(), 1);
}

/// L2 without paging: its addresses are a user's, under mode-based execute control and in the advanced information (Intel SDM
/// vol. 3, 28.2.1).
#[test]
fn g7_l2_without_paging() {
    let below = Below::Ept(ept::Machine { mode_based: true, ..EPT });
    let l2 = Machine { pg: false, lma: false, ..BASE };
    let memory = world(0x407, 0x437);
    let leaf = LEAVES + 9 * 8;
    let (tables, root) = below.context();
    let (regs, cpu) = registers(&l2);
    let l2_context = PagingContext::<Gva, NGpa>::new(CpuRole::new(&regs, &cpu));
    let shared = memory.shared(CpuId::BOOT);
    let regs = WalkRegs { cr3: root, ..WalkRegs::default() };
    let walk = NestedWalk {
        context: &l2_context,
        regs: WalkRegs::default(),
        tables: NestedTables { context: &tables, regs, memory: &shared },
    };
    let fetch = || walk.translate(Gva::new(0x9123), Access::at_cpl(AccessKind::Execute, 0));
    memory.backing().set(leaf, 0x8000 | 0x430 | 1);
    assert_eq!(fetch().unwrap().address.bits(), 0x8123);
    memory.backing().set(leaf, 0x8000 | 0x030 | 5);
    let Err(WalkError::Fault(fault)) = fetch() else { panic!("only supervisor addresses are executable") };
    let EptExit::Violation(info) = fault.ept_exit() else { panic!("nothing is misconfigured") };
    assert_eq!(info.bits(), 0x7ac, "fetch; readable, executable; linear address, final; user, writable");
}

/// Outside long mode an exit has a linear address of 32 bits, wherever the walk failed.
#[test]
fn exits_of_a_32_bit_l2_have_32_bit_linear_addresses() {
    let l2 = Machine { cr3: L2_CR3, lma: false, pae: false, ..BASE };
    for below in belows() {
        let leaf = kind_of_leaf(&below).1;
        let read_only = leaf & !2;
        // L1 permits nothing, or no writes: of the page, of the table, and where the table is marked.
        for (page, leaf) in [(L2_PAGE, 0), (0x12, 0), (L2_PAGE, read_only), (0x12, read_only)] {
            let memory = world(kind_of_leaf(&below).0, kind_of_leaf(&below).1);
            let ram = memory.backing();
            ram.set_u32(0x5000 + 5 * 4, 0x12007);
            ram.set_u32(0x7000 + 7 * 4, (L2_PAGE as u32) << 12 | 7);
            let at = if page == L2_PAGE { L1_PAGE << 12 } else { 0x7000 };
            ram.set(LEAVES + page * 8, at | leaf);
            let va = 0xabcd_0000_0000 | 5 << 22 | 7 << 12;
            let (expected, _) = below.end(ram, &l2, va, What::Write, Who::User);
            assert_eq!(found(&memory, &below, &l2, va, What::Write, Who::User), expected);
            assert!(matches!(expected, End::ToL1(..)), "{below:?} {page:#x} {leaf:#x}: {expected:?}");
        }
    }
}

/// What both stages permit, and the smaller of their pages.
#[test]
fn the_result_is_what_both_stages_agree_on() {
    let memory = world(7, 7);
    let ram = memory.backing();
    ram.set(LEAVES + L2_PAGE * 8, L1_PAGE << 12 | 5);
    let (tables, root) = Below::Npt(NPT).context();
    let l2 = context(&Machine { cr3: L2_CR3, ..BASE });
    let l2 = PagingContext::<Gva, NGpa>::new(l2.role());
    let shared = memory.shared(CpuId::BOOT);
    let regs = WalkRegs { cr3: root, ..WalkRegs::default() };
    let walk = NestedWalk {
        context: &l2,
        regs: WalkRegs { cr3: L2_CR3, ..WalkRegs::default() },
        tables: NestedTables { context: &tables, regs, memory: &shared },
    };
    let read = Access::at_cpl(AccessKind::Read, 3);
    let found = walk.translate(Gva::new(VA), read).unwrap();
    assert_eq!(found.prot, Prot::READ | Prot::USER | Prot::EXECUTE);
    assert_eq!(found.page_bytes, 0x1000);
    ram.set(LEAVES + L2_PAGE * 8, L1_PAGE << 12 | 7);
    ram.set(L2_ENTRIES[3], L2_PAGE << 12 | 5);
    assert_eq!(walk.translate(Gva::new(VA), read).unwrap().prot, Prot::READ | Prot::USER | Prot::EXECUTE);
    // A large page of L2 in small pages of L1 is a small page.
    ram.set(L2_ENTRIES[2], 0x80 | 7);
    ram.set(LEAVES + 9 * 8, 0x6000 | 7);
    let found = walk.translate(Gva::new(VA), read).unwrap();
    assert_eq!((found.address.bits(), found.page_bytes), (0x6123, 0x1000));
    // And so is a small page of L2 in a large page of L1.
    ram.set(L2_ENTRIES[2], 0x12 << 12 | 7);
    ram.set(L2_ENTRIES[3], 0x205 << 12 | 7);
    ram.set(0x3008, 0x80 | 7);
    let found = walk.translate(Gva::new(VA), read).unwrap();
    assert_eq!((found.address.bits(), found.page_bytes), (0x5123, 0x1000));
}
