//! The shadow kind's dirty log, write protection and aging, case by case.
mod support;

use mmu::{
    CpuRole, Cr0, Cr4, Efer, Gfn, GfnRange, Gpa, GuestCpu, Gva, LogBy, Mmu, NGpa, Observed, PagingContext,
    PagingRegs, WalkMarks, WalkRegs,
};
use support::flat::FlatRam;
use support::manual::guest::{registers, BASE};
use support::manual::{Machine, What, Who};
use support::shadow::{sweep, Ended, World, CPU, PAGES};
use support::tables::interfere;

const WAYS: [LogBy; 2] = [LogBy::WriteProtection, LogBy::DirtyBits];

/// Four levels from 0x1000 on; 64 pages one to one, a 2 MiB page after them.
fn guest(ram: &FlatRam) {
    ram.set(0x1000, 0x2067);
    ram.set(0x2000, 0x3067);
    ram.set(0x3000, 0x4067);
    ram.set(0x3008, 0x20_0000 | 0xe7);
    for page in 0..64 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
    }
}

fn world() -> World {
    let addresses = (0..64).map(|page| page << 12 | 8).chain([0x20_0000, 0x23_4568]).collect();
    World::new(BASE, 64, addresses, guest)
}

fn all() -> GfnRange {
    GfnRange::new(Gfn::default(), PAGES).unwrap()
}

fn write(world: &mut World, page: u64) {
    let va = page << 12 | if page < 64 { 8 } else { 0x568 };
    assert_eq!(world.use_page(0, va, What::Write, Who::User), Ended::At(va));
}

fn read(world: &mut World, page: u64) {
    let va = page << 12 | 8;
    assert_eq!(world.use_page(0, va, What::Read, Who::User), Ended::At(va));
}

/// H1, H3: exactly what was written is in the log, by either way.
#[test]
fn h1_a_log_misses_no_write() {
    for by in WAYS {
        let mut world = world();
        for page in [0x20, 0x21, 0x28, 0x234] {
            write(&mut world, page);
        }
        world.start_log(by);
        assert_eq!(world.harvest(by), []);
        for page in [0x20, 0x28, 0x234] {
            write(&mut world, page);
        }
        read(&mut world, 0x21);
        read(&mut world, 0x30);
        assert_eq!(world.harvest(by), [0x20, 0x28, 0x234], "{by:?}");
        assert_eq!(world.harvest(by), []);
        world.finish();
    }
}

/// H2: a page whose bit was cleared is logged by its next write, again and again.
#[test]
fn h2_a_write_after_clearing_is_logged_again() {
    for by in WAYS {
        let mut world = world();
        world.start_log(by);
        for _ in 0..3 {
            write(&mut world, 0x20);
            write(&mut world, 0x20);
            assert_eq!(world.harvest(by), [0x20], "{by:?}");
        }
        world.finish();
    }
}

/// H4: huge leaves of a logged slot go, and none comes back; both ways agree.
#[test]
fn h4_a_logged_slot_has_no_huge_leaf() {
    for by in WAYS {
        let mut world = world();
        write(&mut world, 0x234);
        assert_eq!(world.kind.page_counts().leaves[1], 1);
        world.start_log(by);
        assert_eq!(world.kind.page_counts().leaves[1], 0);
        write(&mut world, 0x234);
        assert_eq!(world.kind.page_counts().leaves[1], 0);
        assert_eq!(world.harvest(by), [0x234]);
        world.finish();
    }
}

/// A log that begins with all bits set protects nothing before a bit is cleared, and then a huge page goes, too.
#[test]
fn h1_all_set_needs_no_protection_before_the_first_clear() {
    for by in WAYS {
        let mut world = world();
        write(&mut world, 0x20);
        write(&mut world, 0x234);
        let _ = world.memory.exclusive(CPU).start_dirty_log_all_set(Gfn::default(), by).unwrap();
        world.check();
        assert!(world.hardware(0, 0x2_0008, What::Write, Who::User).is_some());
        assert_eq!(world.harvest(by).len(), PAGES as usize);
        assert_eq!(world.kind.page_counts().leaves[1], 0);
        write(&mut world, 0x234);
        assert_eq!(world.harvest(by), [0x234]);
        world.finish();
    }
}

/// H1: neighbours that are mapped beforehand, and leaves that come with an emulated write, let no write go unnoticed.
#[test]
fn h1_a_prefetched_leaf_logs_its_first_write() {
    for by in WAYS {
        let mut world = world();
        world.start_log(by);
        read(&mut world, 0x20);
        assert!(world.leaf(0, 0x2_1008).is_some(), "prefetched");
        world.emulate(0x4000 + 0x22 * 8, 8, 0x2_2067);
        assert!(world.leaf(0, 0x2_2008).is_some());
        world.harvest(by);
        for page in [0x21, 0x22] {
            write(&mut world, page);
        }
        assert_eq!(world.harvest(by), [0x21, 0x22], "{by:?}");
        world.finish();
    }
}

/// H1: a table that is written without exits is logged like any page, and so are the pages its sync leaves.
#[test]
fn h1_unsync_tables_and_what_they_map_are_logged() {
    for by in WAYS {
        let mut world = world();
        world.start_log(by);
        write(&mut world, 0x20);
        world.harvest(by);
        let at = 0x4000 + 0x20 * 8;
        let ended = world.use_page(0, at, What::Write, Who::Supervisor);
        assert_eq!(ended, Ended::At(at));
        world.store(at, 1 << 63 | 0x2_0067);
        assert_eq!(world.harvest(by), [4]);
        world.flush(0);
        world.flush(1);
        world.check();
        write(&mut world, 0x20);
        assert_eq!(world.harvest(by), [0x20], "the leaf that lost its fetches, {by:?}");
        assert_eq!(world.use_page(0, at, What::Write, Who::Supervisor), Ended::At(at));
        assert_eq!(world.harvest(by), [4]);
        world.finish();
    }
}

/// H1: where the log is kept by dirty bits, no way of losing a leaf loses its bit.
#[test]
fn h1_a_leaf_that_goes_leaves_its_dirty_bit_in_the_log() {
    let by = LogBy::DirtyBits;
    let mut world = world();
    for page in 0x20..0x28 {
        write(&mut world, page);
    }
    world.start_log(by);
    for page in 0x20..0x28 {
        assert!(world.hardware(0, page << 12, What::Write, Who::User).is_some(), "W stays");
        write(&mut world, page);
    }
    // A zap, an emulated write, a sync, a page that goes as a whole.
    world.zap_range(GfnRange::of(Gfn::new_truncate(0x20)));
    world.emulate(0x4000 + 0x21 * 8, 8, 0x3_0067);
    let at = 0x4000 + 0x22 * 8;
    assert_eq!(world.access(0, at, What::Write, Who::Supervisor), Ended::At(at));
    world.store(at, 0x3_1067);
    world.invlpg(0, 0x2_2008);
    let _ = world.kind.invalidate_all(&mut world.memory.exclusive(CPU));
    for vcpu in 0..2 {
        world.access(vcpu, 0x20_0000, What::Read, Who::User);
    }
    sweep(|progress| {
        let _ = world.kind.zap_obsolete(&mut world.memory.exclusive(CPU), progress);
    });
    let found = world.harvest(by);
    for page in 0x20..0x28 {
        assert!(found.contains(&page), "{page:#x} in {found:x?}");
    }
    world.finish();
}

/// E5: a dirty bit that the processor sets while the leaf is being protected is kept.
#[test]
fn e5_a_dirty_bit_set_at_the_worst_moment_is_not_lost() {
    let by = LogBy::DirtyBits;
    let mut world = world();
    write(&mut world, 0x20);
    world.start_log(by);
    let (table, index, _) = world.leaf(0, 0x2_0008).unwrap();
    let tables = world.tables.clone();
    interfere(move || tables.mark(table, index, 0x60));
    sweep(|progress| {
        let _ = world.kind.test_and_clear_young(&mut world.memory.exclusive(CPU), all(), progress);
    });
    assert_eq!(world.harvest(by), [0x20]);
    world.finish();
}

/// B7: when the log ends, what was small for it is huge again.
#[test]
fn logging_ends_with_huge_pages() {
    for by in WAYS {
        let mut world = world();
        world.start_log(by);
        write(&mut world, 0x20);
        read(&mut world, 0x21);
        write(&mut world, 0x234);
        let before = world.kind.page_counts().tables;
        let collapse = |world: &mut World| {
            sweep(|progress| {
                let _ = world.kind.collapse(&mut world.memory.exclusive(CPU), all(), progress);
            });
            world.check();
        };
        collapse(&mut world);
        assert_eq!(world.kind.page_counts().tables, before, "not while it is logged");
        let _ = world.memory.exclusive(CPU).stop_dirty_log(Gfn::default()).unwrap();
        sweep(|progress| {
            let _ = world.kind.write_unprotect(&mut world.memory.exclusive(CPU), all(), progress);
        });
        let writable = world.hardware(0, 0x2_1008, What::Write, Who::User).is_some();
        assert!(writable, "without a fault, {by:?}");
        collapse(&mut world);
        assert_eq!(world.kind.page_counts().tables, before - 1);
        write(&mut world, 0x234);
        assert_eq!(world.kind.page_counts().leaves[1], 1);
        world.finish();
    }
}

/// C2: whoever protects, arms or zaps is told of CPUs that have not flushed yet, also if somebody else took W away.
#[test]
fn c2_who_asks_to_be_sure_is_told_of_flushes_that_are_under_way() {
    let mut world = world();
    let (paging, cpu) = registers(&BASE);
    let other = mmu::CpuId::new(1).unwrap();
    let mut mmu = Mmu::new(CpuRole::new(&paging, &cpu), world.vcpus[1].root);
    write(&mut world, 0x20);
    let entered = mmu.enter(world.memory, other);
    world.emulate(0x4000 + 0x20 * 8, 8, 0);
    let range = GfnRange::of(Gfn::new_truncate(0x20));
    let mut issued = vec![];
    sweep(|progress| {
        issued.push(world.kind.zap(&mut world.memory.exclusive(CPU), range, progress).issued);
        issued.push(world.kind.write_protect(&mut world.memory.exclusive(CPU), range, progress).issued);
    });
    issued.push(world.kind.rearm_pages(&mut world.memory.exclusive(CPU), Gfn::new_truncate(0x20), 1).issued);
    assert!(issued.iter().all(|issued| issued.is_some_and(|issued| issued.kick.contains(other))));
    drop(entered);
    let done = world.kind.rearm_pages(&mut world.memory.exclusive(CPU), Gfn::new_truncate(0x20), 1);
    assert_eq!(done.issued, None);
    world.finish();
}

/// A range that is write-protected faults once on each page, and no more.
#[test]
fn a_protected_range_is_written_after_a_fault() {
    let mut world = world();
    for page in [0x20, 0x21, 0x234] {
        write(&mut world, page);
    }
    sweep(|progress| {
        let _ = world.kind.write_protect(&mut world.memory.exclusive(CPU), all(), progress);
    });
    for va in [0x2_0008, 0x2_1008, 0x23_4568] {
        assert_eq!(world.hardware(0, va, What::Write, Who::User), None);
        assert_eq!(world.access(0, va, What::Write, Who::User), Ended::At(va));
    }
    world.finish();
}

/// More permission for the same page needs no flush, and less W does.
#[test]
fn c1_permission_upgrades_flush_nothing() {
    let mut world = world();
    world.store(0x4000 + 0x20 * 8, 0x2_0027);
    world.flush(0);
    read(&mut world, 0x20);
    let before = world.memory.shootdown().requested();
    write(&mut world, 0x20);
    assert_eq!(world.memory.shootdown().requested(), before);
    sweep(|progress| {
        let _ = world.kind.write_protect(&mut world.memory.exclusive(CPU), all(), progress);
    });
    assert!(world.memory.shootdown().requested() > before);
    world.finish();
}

/// H5: aging finds what was used, and never flushes.
#[test]
fn h5_aging_finds_what_was_used_and_never_flushes() {
    let mut world = world();
    for page in [0x20, 0x28] {
        read(&mut world, page);
    }
    let before = world.memory.shootdown().requested();
    let young = |world: &mut World, page: u64, clear: bool| {
        let range = GfnRange::of(Gfn::new_truncate(page));
        let mut found = false;
        sweep(|progress| {
            let mut guard = world.memory.exclusive(CPU);
            found |= match clear {
                true => world.kind.test_and_clear_young(&mut guard, range, progress),
                false => world.kind.test_young(&mut guard, range, progress),
            };
        });
        found
    };
    assert!(young(&mut world, 0x20, false) && young(&mut world, 0x20, true));
    assert!(!young(&mut world, 0x20, true), "old now");
    assert!(!young(&mut world, 0x21, false), "B9: a prefetched page was not used");
    read(&mut world, 0x20);
    assert!(young(&mut world, 0x20, false) && young(&mut world, 0x28, true));
    assert_eq!(world.memory.shootdown().requested(), before);
    world.finish();
}

/// A mark in a table that is one of another format, too, is followed: the accessed flag of an extended page-table entry is a
/// reserved bit of AMD's top level.
#[test]
fn h1_marks_in_a_table_of_two_formats_are_followed() {
    let mut world = world();
    read(&mut world, 0x20);
    let marks = WalkMarks::new();
    world.ram().set(0x1000, 0x2167);
    mmu::MarkObserver::marked(&marks, Gpa::new_truncate(0x1000), 8);
    let _ = world.kind.track_marks(&mut world.memory.exclusive(CPU), &marks);
    assert_eq!(world.hardware(0, 0x2_0008, What::Read, Who::User), None);
    // In a lowest table the leaf goes as well, if it says too much now.
    world.ram().set(0x1000, 0x2067);
    read(&mut world, 0x20);
    let (at, marks) = (0x4000 + 0x20 * 8, WalkMarks::new());
    world.ram().set(at, 1 << 50 | 0x2_0067);
    mmu::MarkObserver::marked(&marks, Gpa::new_truncate(at), 8);
    let _ = world.kind.track_marks(&mut world.memory.exclusive(CPU), &marks);
    assert_eq!(world.hardware(0, 0x2_0008, What::Read, Who::User), None);
    world.finish();
}

/// More marks than there is room for cost all roots, and nothing is missed.
#[test]
fn h1_marks_that_are_too_many_are_not_forgotten() {
    let mut world = world();
    read(&mut world, 0x20);
    let marks = WalkMarks::new();
    for _ in 0..1000 {
        mmu::MarkObserver::marked(&marks, Gpa::new_truncate(0x8000), 8);
    }
    let before = world.vcpus[0].root;
    let _ = world.kind.track_marks(&mut world.memory.exclusive(CPU), &marks);
    read(&mut world, 0x20);
    assert_ne!(world.vcpus[0].root, before);
    world.finish();
}

/// H1: what walks mark is written memory.
#[test]
fn h1_marks_of_walks_are_logged() {
    let by = LogBy::WriteProtection;
    let mut world = world();
    world.start_log(by);
    world.ram().set(0x4000 + 0x20 * 8, 0x2_0007);
    read(&mut world, 0x20);
    assert_eq!(world.harvest(by), [4]);
    world.finish();
}

/// Marks in a table of the format that the walk took it for only permit more: nothing of the shadow goes.
#[test]
fn marks_of_the_own_format_take_nothing_away() {
    let mut world = world();
    world.store(0x4000 + 0x20 * 8, 0x2_0027);
    world.flush(0);
    read(&mut world, 0x20);
    let before = world.memory.shootdown().requested();
    let (paging, cpu) = registers(&BASE);
    let context = PagingContext::<Gva, Gpa>::new(CpuRole::new(&paging, &cpu));
    let marks = WalkMarks::new();
    {
        let shared = world.memory.shared(CPU);
        let source = Observed { memory: &shared, observer: &marks };
        let regs = WalkRegs { cr3: 0x1000, ..WalkRegs::default() };
        let access = mmu::Access::user(mmu::AccessKind::Write);
        context.walk(&source, &regs, Gva::new(0x2_0008), access).unwrap();
    }
    assert!(!marks.is_empty());
    let _ = world.kind.track_marks(&mut world.memory.exclusive(CPU), &marks);
    assert!(world.hardware(0, 0x2_0008, What::Read, Who::User).is_some());
    assert_eq!(world.memory.shootdown().requested(), before);
    world.finish();
}

/// "Clear dirty: write-protect L2's entries": L2's writes are logged by write protection whatever the log is by, for where the
/// processor makes a list, it lists L2's addresses.
#[test]
fn commit_2021_clear_dirty_l2_writes_are_logged_by_write_protection() {
    for by in WAYS {
        let mut world = world();
        let regs = PagingRegs { cr0: Cr0::PG | Cr0::WP, cr4: Cr4::PAE, efer: Efer::LMA | Efer::NXE };
        let cpu = GuestCpu { max_phys_addr: 46, gib_pages: true, pse36: true, amd: true };
        let role = CpuRole::nested(&regs, &cpu, false);
        let vcpu = mmu::VcpuMode { smm: false, nested: true };
        let root_role = mmu::RootRole::shadow(role, mmu::Level::L4, vcpu, true);
        world.tables.fill(&mut world.cache);
        let got = {
            let mut guard = world.memory.exclusive(CPU);
            world.kind.get_root(&mut guard, &mut world.cache, root_role, 0x1000, [0; 4]).outcome
        };
        let old = std::mem::replace(&mut world.vcpus[0].root, got.unwrap());
        world.kind.put_root(&mut world.memory.exclusive(CPU), old);
        let context = PagingContext::<NGpa, Gpa>::new(role);
        let walk_regs = WalkRegs { cr3: 0x1000, ..WalkRegs::default() };
        let go = |world: &mut World, page: u64, kind| {
            let (at, access) = (NGpa::new_truncate(page << 12), mmu::Access::user(kind));
            world.tables.fill(&mut world.cache);
            let walk = context.walk(&world.memory.shared(CPU), &walk_regs, at, access).unwrap();
            let root = world.vcpus[0].root;
            let mut guard = world.memory.exclusive(CPU);
            let done = world.kind.fault(&mut guard, &mut world.cache, root, &walk, at, access);
            assert!(matches!(done.outcome, mmu::ShadowFault::Mapped | mmu::ShadowFault::Spurious));
        };
        go(&mut world, 0x20, mmu::AccessKind::Write);
        world.start_log(by);
        let writable =
            |world: &World, page: u64| world.hardware(0, page << 12, What::Write, Who::User).is_some();
        assert!(!writable(&world, 0x20), "armed, {by:?}");
        go(&mut world, 0x21, mmu::AccessKind::Read);
        assert!(!writable(&world, 0x21));
        for page in [0x20, 0x21] {
            go(&mut world, page, mmu::AccessKind::Write);
            assert!(writable(&world, page));
        }
        assert_eq!(world.harvest(by), [0x20, 0x21]);
        assert!(!writable(&world, 0x20));
        world.finish();
    }
}

/// PAE's tables, and those of 32-bit guests, keep dirty bits like long mode's.
#[test]
fn h1_every_paging_mode_logs() {
    let long = BASE;
    let pae = Machine { lma: false, cr3: 0x1020, ..BASE };
    let unpaged = Machine { pg: false, lma: false, ..BASE };
    for (m, by) in [long, pae, unpaged].into_iter().flat_map(|m| WAYS.map(|by| (m, by))) {
        let addresses = (0..64).map(|page| page << 12 | 8).chain([0x20_0000, 0x23_4568]).collect();
        let mut world = World::new(m, 64, addresses, |ram| {
            guest(ram);
            ram.set(0x1020, 0x3001);
        });
        write(&mut world, 0x20);
        world.start_log(by);
        world.harvest(by);
        write(&mut world, 0x20);
        assert_eq!(world.harvest(by), [0x20], "{m:?} {by:?}");
        world.finish();
    }
}
