//! L2 over a shadow of L1's nested tables: rights, memory types, logs, past bugs of others, and what a new start keeps.
mod support;

use std::cell::RefCell;

use mmu::{
    Gpa, GuestEpt, Gva, L2Exit, L2Fault, LogBy, LogFull, MarkObserver, MemoryType, NGpa, PageSize, Place,
    ShadowFault, Stage,
};
use support::l1::{belows, ept_setup, npt_setup, pae_setup, short_setup, EPT, L2, L2_UNPAGED, NPT};
use support::machines::{Amd, Intel, Machine as Host, AMD, INTEL};
use support::manual::{ept, Machine, What, Who};
use support::nested::{Ended, Unheard, World};
use support::two_stage::{Below, Exit};

const VMX: Intel = Intel { mode_based_execute: false, ..INTEL };

fn vmx(m: ept::Machine) -> World<Intel> {
    let host = Intel { mode_based_execute: m.mode_based, ..INTEL };
    let below = Below::Ept(m);
    let mut world = World::new(host, below, L2, true, 64, ept_setup);
    world.belows = belows(below);
    world
}

fn svm(m: Machine) -> World<Amd> {
    World::new(AMD, Below::Npt(m), L2, true, 64, npt_setup)
}

fn entry(page: u64) -> u64 {
    0x4000 + page * 8
}

/// L1 stores an entry and flushes.
fn set(world: &mut World<Intel>, at: u64, value: u64) {
    world.l1_store(0, at, 8, value);
    world.invept(0, None);
}

fn every_access<H: Host>(world: &mut World<H>) -> Vec<Ended> {
    let mut ended = vec![];
    for va in world.linear.clone() {
        for what in [What::Read, What::Write, What::Fetch] {
            for who in [Who::Supervisor, Who::User] {
                for vcpu in 0..2 {
                    ended.push(world.access(vcpu, va, what, who, true));
                }
            }
        }
    }
    ended
}

/// A1 for L2, G1: all rights of a leaf of EPT12 with and without what a processor can have; each access ends as both
/// references say.
#[test]
fn g1_all_rights_of_a_leaf() {
    for (mode_based, execute_only) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut world = vmx(ept::Machine { mode_based, execute_only, ..EPT });
        for rights in 0..16u64 {
            set(&mut world, entry(6), 70 << 12 | 0x330 | rights & 7 | (rights & 8) << 7);
            for what in [What::Read, What::Write, What::Fetch] {
                for who in [Who::Supervisor, Who::User] {
                    world.access(0, 0x6000, what, who, true);
                    // Page 4 is a supervisor's.
                    set(&mut world, entry(4), 70 << 12 | 0x330 | rights & 7 | (rights & 8) << 7);
                    world.access(0, 0x4000, what, who, true);
                }
            }
        }
        world.finish();
    }
}

/// d95c55687e11: an entry that permits fetches alone is shadowed by one that does.
#[test]
fn commit_d95c55687e11_execute_only_pages_hide_reads_from_l2() {
    let mut world = vmx(EPT);
    set(&mut world, entry(6), 70 << 12 | 0x334);
    let access = |world: &mut World<Intel>, what| world.access(0, 0x6000, what, Who::User, true);
    assert_eq!(access(&mut world, What::Fetch), Ended::At(70 << 12));
    assert_eq!(access(&mut world, What::Read), Ended::ToL1(0x6000, Exit::Violation(0x7a1)));
    assert_eq!(access(&mut world, What::Fetch), Ended::At(70 << 12));
    // Above it, too: then what is below can only be fetched, and after a sync still.
    set(&mut world, 0x3010, 0x5004);
    world.access(0, 30 << 12, What::Fetch, Who::User, true);
    world.l1_store(0, 0x5008, 8, 70 << 12 | 0x331);
    world.invept(0, None);
    assert!(matches!(world.access(0, 31 << 12, What::Read, Who::User, true), Ended::ToL1(..)));
    assert!(matches!(world.access(0, 31 << 12, What::Fetch, Who::User, true), Ended::ToL1(..)));
    world.finish();
}

/// d95c55687e11, B3: a leaf whose rights shrink to none by a sync is gone, and not readable.
#[test]
fn commit_d95c55687e11_a_leaf_without_rights_is_no_leaf() {
    let mut world = vmx(EPT);
    set(&mut world, 0x3010, 0x5004);
    assert_eq!(world.access(0, 31 << 12, What::Fetch, Who::User, true), Ended::At(81 << 12));
    // Odd: the table is written without exits from now on.
    world.l1_store(0, 0x5008, 8, 81 << 12 | 0x333);
    world.invept(0, None);
    for what in [What::Read, What::Write, What::Fetch] {
        assert!(matches!(world.access(0, 31 << 12, what, Who::User, false), Ended::ToL1(..)), "{what:?}");
    }
    world.finish();
}

/// 0780516a18f8, d0164c161923: exit qualifications through the whole flow: bits 5:3 are read, write, fetch; 8:7 tell the final
/// access from a walk of L2's tables.
#[test]
fn commits_0780516a18f8_d0164c161923_exit_qualifications() {
    let mut world = vmx(EPT);
    let access = |world: &mut World<Intel>, what| world.access(0, 0x6000, what, Who::User, true);
    for (rights, what, bits) in [
        (0x331u64, What::Write, 0x78a),
        (0x331, What::Fetch, 0x78c),
        (0x333, What::Fetch, 0x79c),
        (0x335, What::Write, 0x7aa),
        (0x334, What::Write, 0x7a2),
        (0x330, What::Read, 0x781),
    ] {
        set(&mut world, entry(6), 70 << 12 | rights);
        assert_eq!(
            access(&mut world, what),
            Ended::ToL1(0x6000, Exit::Violation(bits)),
            "{rights:#x} {what:?}"
        );
    }
    // L2's lowest table, which walks write to.
    set(&mut world, entry(0x1b), 35 << 12 | 0x335);
    assert_eq!(access(&mut world, What::Read), Ended::ToL1(0x1b030, Exit::Violation(0xab)));
    set(&mut world, entry(0x1b), 35 << 12 | 0x332);
    assert_eq!(access(&mut world, What::Read), Ended::ToL1(0x1b030, Exit::Misconfiguration));
    world.finish();
}

/// 20260121004906.2373989-2: EXITINFO1 of nested faults through the whole flow, final and table walk.
#[test]
fn nested_fault_provenance_20260121004906_through_a_shadow() {
    let mut world = svm(NPT);
    let ended = |world: &mut World<Amd>, at: u64, value: u64, what| {
        let old = world.ram().get(at).unwrap();
        world.l1_store(0, at, 8, value);
        world.leave_l2(0);
        world.enter_l2(0, mmu::TlbControl::Asid);
        let ended = world.access(0, 0x6000, what, Who::User, true);
        world.l1_store(0, at, 8, old);
        world.enter_l2(0, mmu::TlbControl::Asid);
        match ended {
            Ended::ToL1(_, Exit::NestedPageFault(bits)) => bits,
            other => panic!("{other:?}"),
        }
    };
    let (leaf, table) = (entry(6), entry(0x1b));
    assert_eq!(ended(&mut world, leaf, 70 << 12 | 0x66, What::Read), 0x1_0000_0004, "not present");
    assert_eq!(ended(&mut world, leaf, 1 << 63 | 70 << 12 | 0x67, What::Fetch), 0x1_0000_0015, "NX");
    assert_eq!(ended(&mut world, leaf, 70 << 12 | 0x63, What::Read), 0x1_0000_0005, "U/S");
    assert_eq!(ended(&mut world, leaf, 70 << 12 | 0x65, What::Write), 0x1_0000_0007, "read-only");
    assert_eq!(
        ended(&mut world, table, 35 << 12 | 0x65, What::Read),
        0x2_0000_0007,
        "walk of a read-only table"
    );
    assert_eq!(ended(&mut world, 0x1000, 0x2000 | 0x167, What::Read), 0x2_0000_000f, "reserved, PML4E");
    assert_eq!(ended(&mut world, 0x2000, 1 << 51 | 0x3067, What::Read), 0x2_0000_000f, "reserved, PDPE");
    assert_eq!(
        ended(&mut world, leaf, 1 << 51 | 70 << 12 | 0x67, What::Read),
        0x1_0000_000d,
        "reserved, PTE"
    );
    world.finish();
}

/// CVE-2017-12188: every level of EPT12, the large bit, and each reserved bit: nothing but what the manual says.
#[test]
fn cve_2017_12188_every_level_and_bit_through_a_shadow() {
    let mut world = vmx(EPT);
    for at in [0x1000, 0x2000, 0x3000, 0x3008, 0x3010, entry(6)] {
        let old = world.ram().get(at).unwrap();
        for bit in 0..64 {
            for large in [old, old | 1 << 7] {
                world.l1_store(0, at, 8, large ^ 1 << bit);
                world.invept(0, None);
                for va in [0x6000, 28 << 12, 30 << 12] {
                    // Frames of L1 that leaves of this kind would reach are not in the reference's list.
                    if at == entry(6) || bit < 12 {
                        world.access(0, va, What::Read, Who::User, false);
                    }
                }
            }
        }
        world.l1_store(0, at, 8, old);
        world.invept(0, None);
    }
    world.finish();
}

/// G1: the leaf for L2 has the memory type of EPT12's, and its word about PAT.
#[test]
fn g1_memory_types_of_extended_page_tables() {
    let types = [
        (0, MemoryType::Uncacheable),
        (1, MemoryType::WriteCombining),
        (4, MemoryType::WriteThrough),
        (5, MemoryType::WriteProtected),
        (6, MemoryType::WriteBack),
    ];
    let mut world = vmx(EPT);
    for (number, memory_type) in types {
        for ignore in [0, 1 << 6] {
            for (at, page, old) in [(entry(6), 6, 70u64 << 12), (0x3008, 28, 0x20_0080)] {
                set(&mut world, at, old | 0x307 | number << 3 | ignore);
                world.access(0, page << 12, What::Read, Who::User, true);
                let leaf = world.leaf(0, if page == 28 { 0x20_0000 } else { page << 12 });
                assert_eq!((leaf.memory_type, leaf.ignore_pat), (memory_type, ignore != 0));
            }
        }
    }
    world.finish();
}

/// G1: a type that changes in a table that is written without exits is another leaf after INVEPT; small pages for a large one
/// have its type, and another's are others.
#[test]
fn g1_a_memory_type_that_changes() {
    let mut world = vmx(EPT);
    let read = |world: &mut World<Intel>, page: u64| world.access(0, page << 12, What::Read, Who::User, true);
    read(&mut world, 7);
    world.l1_store(0, entry(7), 8, 71 << 12 | 0x307);
    world.invept(0, None);
    read(&mut world, 7);
    assert_eq!(world.leaf(0, 7 << 12).memory_type, MemoryType::Uncacheable);
    // The host moves a frame of the block, which so is mapped in pieces.
    world.move_frame(520);
    for number in [6u64, 0, 6] {
        set(&mut world, 0x3008, 0x20_0080 | 0x307 | number << 3);
        for page in [28, 29] {
            read(&mut world, page);
            let leaf = world.leaf(0, (512 + page - 28) << 12);
            assert_eq!(leaf.size, PageSize::Size4K);
            assert_eq!(leaf.memory_type == MemoryType::WriteBack, number == 6);
        }
    }
    world.finish();
}

/// P21: nested tables of SVM choose from L1's PAT; the shadow says the same by the host's, or something stricter.
#[test]
fn p21_memory_types_of_nested_tables_come_from_the_pat_of_l1() {
    let mut world = svm(NPT);
    let table = [
        (0x67u64, MemoryType::WriteBack),
        (0x6f, MemoryType::WriteThrough),
        (0x77, MemoryType::Uncacheable),
        (0x7f, MemoryType::Uncacheable),
        (0xe7, MemoryType::WriteBack),
        (0xef, MemoryType::WriteThrough),
    ];
    for (flags, memory_type) in table {
        world.l1_store(0, entry(6), 8, 70 << 12 | flags);
        world.enter_l2(0, mmu::TlbControl::Asid);
        world.access(0, 0x6000, What::Read, Who::User, true);
        assert_eq!(world.leaf(0, 0x6000).memory_type, memory_type, "{flags:#x}");
    }
    world.finish();
}

/// Page sizes: what L1's entry and the backing both permit.
#[test]
fn a_large_page_of_l1_is_as_large_as_the_host_permits() {
    let mut world = vmx(EPT);
    let read = |world: &mut World<Intel>| world.access(0, 28 << 12, What::Read, Who::User, true);
    read(&mut world);
    assert_eq!(world.leaf(0, 0x20_0000).size, PageSize::Size2M);
    world.move_frame(600);
    read(&mut world);
    assert_eq!(world.leaf(0, 0x20_0000).size, PageSize::Size4K);
    world.finish();
}

/// F4: a clean entry of EPT12 is not writable in the shadow; a write sets D, and without flags there is none to set.
#[test]
fn f4_clean_entries_of_extended_page_tables() {
    for accessed_dirty in [true, false] {
        let mut world = vmx(ept::Machine { accessed_dirty, ..EPT });
        set(&mut world, entry(6), 70 << 12 | 0x37);
        world.access(0, 0x6000, What::Read, Who::User, true);
        let flags = |world: &World<Intel>| world.ram().get(entry(6)).unwrap() & 0x300;
        let writable = |world: &World<Intel>| {
            let op = support::two_stage::Op { what: What::Write, user: true };
            world.shadowed(0).frame(0x6000, op).is_ok()
        };
        assert_eq!(
            (flags(&world), writable(&world)),
            if accessed_dirty { (0x100, false) } else { (0, true) }
        );
        world.access(0, 0x6000, What::Write, Who::User, true);
        assert_eq!((flags(&world), writable(&world)), (if accessed_dirty { 0x300 } else { 0 }, true));
        // L1 takes D back, and flushes.
        world.l1_store(0, entry(6), 8, 70 << 12 | 0x137);
        world.invept(0, None);
        world.access(0, 0x6000, What::Read, Who::User, true);
        assert_eq!(writable(&world), !accessed_dirty);
        world.finish();
    }
}

/// F5: L1's page-modification log hears of a page before EPT12 is marked; if it is full, L1 gets that exit and nothing is.
#[test]
fn f5_the_log_of_l1_comes_before_the_mark() {
    struct Log {
        room: usize,
        pages: RefCell<Vec<u64>>,
    }
    impl MarkObserver for Log {
        fn marked(&self, _: Gpa, _: usize) {}
        fn log_dirty(&self, page: NGpa) -> Result<(), LogFull> {
            let mut pages = self.pages.borrow_mut();
            if pages.len() == self.room {
                return Err(LogFull);
            }
            pages.push(page.bits());
            Ok(())
        }
    }
    let mut world = vmx(EPT);
    set(&mut world, entry(6), 70 << 12 | 0x37);
    world.access(0, 0x7000, What::Read, Who::User, true);
    let exit = L2Exit::from_ept(NGpa::new_truncate(0x6123), 0x182, Gva::new(0x6123));
    let full = Log { room: 0, pages: RefCell::default() };
    assert_eq!(world.l2_fault(0, &exit, &full), L2Fault::LogFull);
    assert_eq!(world.ram().get(entry(6)), Some(70 << 12 | 0x37), "nothing is marked");
    let log = Log { room: 1, pages: RefCell::default() };
    assert_eq!(world.l2_fault(0, &exit, &log), L2Fault::Here(ShadowFault::Mapped));
    assert_eq!(*log.pages.borrow(), [0x6000]);
    assert_eq!(world.l2_fault(0, &exit, &log), L2Fault::Here(ShadowFault::Spurious), "dirty already");
    world.finish();
}

/// "KVM: x86/mmu: clear dirty: write-protect L2 SPTEs": with the log of L1 kept by the processor's dirty bits, what L2 writes is
/// logged as well, and again after each harvest. H1, H2.
#[test]
fn clear_dirty_2021_writes_of_l2_are_logged_in_either_way() {
    for by in [LogBy::DirtyBits, LogBy::WriteProtection] {
        let mut world = vmx(EPT);
        every_access(&mut world);
        world.start_log(by);
        for _ in 0..3 {
            world.access(0, 0x6000, What::Write, Who::User, true);
            world.access(1, 28 << 12, What::Write, Who::User, true);
            world.l1_access(0, 80 << 12, What::Write, false);
            let log = world.harvest();
            for gfn in [70, 512] {
                assert!(log.contains(&gfn), "{by:?}: {log:?}");
            }
            assert!(log.iter().all(|gfn| [70, 80, 512].contains(gfn) || *gfn < 64), "H3: {log:?}");
        }
        world.finish();
    }
}

/// H1: marks that the walk makes in L1's tables are writes to L1's memory.
#[test]
fn h1_marks_in_l1s_tables_are_logged() {
    let mut world = vmx(EPT);
    world.start_log(LogBy::WriteProtection);
    world.put(entry(6), 8, 70 << 12 | 0x37);
    world.harvest();
    world.access(0, 0x6000, What::Read, Who::User, true);
    assert!(world.harvest().contains(&4));
    world.finish();
}

/// CVE-2023-30456: an L2 in long mode without PAE is read as some mode, and its tables like others.
#[test]
fn cve_2023_30456_l2_in_long_mode_without_pae() {
    let l2 = Machine { pae: false, ..L2 };
    let mut world = World::new(VMX, Below::Ept(EPT), l2, true, 64, ept_setup);
    assert_eq!(world.access(0, 0x6000, What::Read, Who::User, true), Ended::At(70 << 12));
    world.finish();
}

/// 464af6fc2b1d: without nested tables of its own L2 runs on the direct kind, and a flush that it asks for is of that, whatever
/// nested tables another L2 had.
#[test]
fn commit_464af6fc2b1d_an_l2_without_nested_tables_has_no_part_in_them() {
    let mut world = vmx(EPT);
    world.access(0, 0x6000, What::Read, Who::User, true);
    world.leave_l2(0);
    let mmus = &mut world.vcpus[0].mmus;
    assert_eq!(mmus.running(), mmu::Running::Root);
    let root = mmus.tdp12_mmu.root();
    let _ = mmus.mmu_mut().flush_guest();
    assert_eq!(mmus.tdp12_mmu.root(), root, "nothing is due there");
    assert!(!mmus.tdp12_mmu.has_work());
    world.finish();
}

/// G6: roots are caches. All of them dropped, as by a start elsewhere with the same memory, nothing changes for L1 or L2.
#[test]
fn g6_a_new_start_changes_nothing() {
    fn check<H: Host>(mut world: World<H>, mut twin: World<H>) {
        let size = if world.linear.len() > 32 { 27 } else { 32 };
        // What happened before the start.
        every_access(&mut world);
        for page in [3u64, 5, 8, 11] {
            let old = world.ram().get(entry(page)).unwrap();
            world.l1_store(0, entry(page), 8, old & !2);
        }
        for vcpu in 0..2 {
            world.leave_l2(vcpu);
            world.flush_nested(vcpu, None);
        }
        for at in (0..support::nested::FRAMES << 12).step_by(8) {
            twin.ram().set(at, world.ram().get(at).unwrap());
        }
        twin.remember();
        let mut seed = 12345u64;
        for _ in 0..1000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let va = world.linear[(seed >> 33) as usize % size];
            let what = [What::Read, What::Write, What::Fetch][(seed >> 40) as usize % 3];
            let who = [Who::User, Who::Supervisor][(seed >> 45) as usize % 2];
            let vcpu = (seed >> 50) as usize % 2;
            let ended = world.access(vcpu, va, what, who, true);
            assert_eq!(twin.access(vcpu, va, what, who, true), ended, "{va:#x} {what:?} {who:?}");
        }
        for at in (0..support::nested::FRAMES << 12).step_by(8) {
            assert_eq!(twin.ram().get(at), world.ram().get(at), "{at:#x}");
        }
        world.finish();
        twin.finish();
    }
    check(vmx(EPT), vmx(EPT));
    check(svm(NPT), svm(NPT));
}

/// What the host's entries cannot say is not offered.
#[test]
fn what_the_host_lacks_is_not_offered_to_l1() {
    let all = GuestEpt {
        max_phys_addr: 46,
        execute_only: true,
        five_level: true,
        mib_pages: true,
        gib_pages: true,
        accessed_dirty: true,
        advanced_info: true,
        mode_based_execute: true,
    };
    let host = mmu::EptHost {
        five_level: true,
        max_phys_addr: 46,
        largest: PageSize::Size2M,
        accessed_dirty: true,
        execute_only: true,
        mode_based_execute: true,
    };
    assert_eq!(all.limited_to(&host, true), all);
    let without = all.limited_to(&host, false);
    assert!(!without.mode_based_execute && !without.advanced_info, "who fetches is not known");
    let host = mmu::EptHost {
        five_level: false,
        accessed_dirty: false,
        execute_only: false,
        mode_based_execute: false,
        ..host
    };
    let plain = all.limited_to(&host, true);
    assert!(!plain.execute_only && !plain.five_level && !plain.accessed_dirty && !plain.mode_based_execute);
    assert!(plain.mib_pages && plain.gib_pages, "small pages stand in for them");
}

/// An exit as the processor reports it.
#[test]
fn exits_of_l2_as_reported() {
    let at = NGpa::new_truncate(0x1000);
    let walk = L2Exit::from_ept(at, 0x83, Gva::new(5));
    assert_eq!((walk.place, walk.access.kind), (Place::TableWalk, mmu::AccessKind::Write));
    let none = L2Exit::from_ept(at, 1, Gva::new(5));
    assert_eq!((none.place, none.linear), (Place::Final, None), "a load of PDPTEs");
    let fetch = L2Exit::from_ept(at, 0x184, Gva::new(5));
    assert_eq!(fetch.access.agent, mmu::Agent::Supervisor);
    assert_eq!(L2Exit::from_ept(at, 0x384, Gva::new(5)).access.agent, mmu::Agent::User);
    let fetch = L2Exit::from_npf(at, 0x1_0000_0011);
    assert_eq!((fetch.place, fetch.access.agent), (Place::Final, mmu::Agent::Supervisor));
    assert_eq!(L2Exit::from_npf(at, 0x2_0000_0006).place, Place::TableWalk);
}

/// G2 for L1s with 32-bit paging: L2's addresses beyond 4 GiB are L1's to know.
#[test]
fn commit_ee6268ba3a68_addresses_beyond_4_gib() {
    for (pae, setup) in [(true, pae_setup as fn(&_)), (false, short_setup)] {
        let below = Machine { lma: false, pae, pse: !pae, ..NPT };
        let mut world = World::new(AMD, Below::Npt(below), L2_UNPAGED, true, 64, setup);
        assert_eq!(world.access(0, 0x1008, What::Read, Who::User, true), Ended::At(65 << 12 | 8));
        let exit = L2Exit::from_npf(NGpa::new_truncate(1 << 32 | 0x1000), 0x1_0000_0006);
        let L2Fault::ToL1(fault) = world.l2_fault(0, &exit, &Unheard) else { panic!("there is no alias") };
        assert_eq!((fault.stage, fault.address), (Stage::NGpa, 1 << 32 | 0x1000));
        assert_eq!(fault.npf_info().bits(), 0x1_0000_0006);
        world.finish();
    }
}
