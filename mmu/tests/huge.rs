//! Huge pages, roots and notes about device memory in the direct kind, case by case.
mod support;

use mmu::{
    AccessKind, CpuId, DirectRole, EntryFormat, FaultOutcome, Gfn, GfnRange, NoRoot, PageSize, Slot,
    SlotFlags, SplitProgress, Sweep, TableCache, TagFlush, MAX_ROOTS,
};
use support::hardware::Exit;
use support::machines::{on_every_machine, Machine, PAE};
use support::vm::{gpa, mmu_of, range, Vm, CPU, GIB, RW};

on_every_machine! {
    b7_collapse_undoes_a_split_of_any_depth,
    b7_collapse_keeps_what_the_small_pages_permit,
    c3_a_collapsed_table_comes_back_only_after_every_cpu_acknowledged,
    commit_ef057cbf825e_collapse_stays_inside_the_slot,
    a_block_that_moved_is_not_collapsed,
    cve_2018_12207_huge_pages_are_not_executable,
    recovery_takes_a_share_of_the_split_pages,
    recovery_spares_logged_slots,
    a_split_of_a_page_that_must_not_be_executable_is,
    every_role_has_its_root,
    d7_invalidating_all_leaves_the_old_roots_behind,
    d7_a_root_that_is_held_is_not_freed,
    a_put_root_is_refused,
    roots_come_to_an_end_without_harm,
    i1_a_note_holds_for_its_generation,
    i1_a_wrap_forgets_before_it_repeats,
    cve_2026_23401_a_note_never_replaces_a_page,
    cve_2021_22543_nothing_is_mapped_once_its_backing_changes,
    cve_2026_23402_a_leaf_never_changes_its_frame,
}

fn split_to<M: Machine>(vm: &mut Vm<M>, size: PageSize, start: u64, pages: u64) {
    let mut sweep = Sweep::over(range(start, pages));
    while !sweep.is_done() {
        let progress = vm.kind.split(&vm.memory.shared(CPU), &mut vm.cache, &mut sweep, size);
        if progress == SplitProgress::NeedTables {
            vm.tables.fill(&mut vm.cache);
        }
    }
    vm.tables.fill(&mut vm.cache);
}

fn b7_collapse_undoes_a_split_of_any_depth<M: Machine>(machine: M) {
    for flags in [RW, SlotFlags::READ_ONLY] {
        let mut vm = Vm::new(machine, &[(0, 2 * GIB, flags, 8 * GIB)]);
        assert_eq!(vm.fault(1000, AccessKind::Read), FaultOutcome::Mapped);
        let before = vm.walker().walk(1000, false, true).unwrap();
        split_to(&mut vm, PageSize::Size2M, 0, GIB);
        split_to(&mut vm, PageSize::Size4K, 1000, 700);
        assert_eq!(vm.check().leaves[2], 0);
        // Only a part of the gigabyte: as far as it can be judged.
        vm.collapse(Sweep::over(range(512, 512)));
        assert_eq!(vm.check().leaves, [2 * 512, 510, 0], "the other tables are still there");
        vm.collapse(Sweep::over(range(0, GIB)));
        assert_eq!(vm.check().leaves, [0, 0, 1]);
        let after = vm.walker().walk(1000, false, true).unwrap();
        assert_eq!((after.pfn, after.pages, after.writable), (before.pfn, GIB, before.writable));
        assert_eq!(vm.reclaim(), 1 + 3);
        vm.finish();
    }
}

/// B3: one page that is watched, or tracked, is not made writable along with the others.
fn b7_collapse_keeps_what_the_small_pages_permit<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    (0..100).for_each(|gfn| vm.map(gfn));
    vm.run(Sweep::over(range(7, 1)), |shared, sweep| vm.kind.write_protect(shared, sweep));
    vm.memory.backing().set_largest(PageSize::Size2M);
    vm.collapse(Sweep::over(range(0, 512)));
    let leaf = vm.leaf(7).unwrap();
    assert_eq!((leaf.pages, leaf.rights.write, leaf.mmu_writable), (512, false, true));
    assert_eq!(vm.fault(7, AccessKind::Write), FaultOutcome::Mapped);
    assert!(vm.hit(7).is_some());
    assert_eq!(vm.hit(300), Some((8 * GIB + 300, 512)), "pages that were not mapped are now");
    vm.finish();
}

/// C3: the table that a huge page took the place of stays table memory until the CPU that may walk it has flushed.
fn c3_a_collapsed_table_comes_back_only_after_every_cpu_acknowledged<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size2M);
    vm.map(0);
    split_to(&mut vm, PageSize::Size4K, 0, 512);
    let mut mmu = mmu_of(&vm);
    let entered = mmu.enter(&vm.memory, CPU);
    vm.collapse(Sweep::over(range(0, 512)));
    assert_eq!(vm.hit(0), Some((8 * GIB, 512)));
    assert_eq!(vm.reclaim(), 0);
    drop(entered);
    assert_eq!(mmu.enter(&vm.memory, CPU).flush(), TagFlush::All);
    assert_eq!(vm.reclaim(), 1);
    vm.finish();
}

/// ef057cbf825e, CVE-2024-26991: a block that is partly outside its slot stays small, at both ends, also in tiny slots.
fn commit_ef057cbf825e_collapse_stays_inside_the_slot<M: Machine>(machine: M) {
    let slots = [(5, 1000, RW, 8 * GIB + 5), (1536, 512, RW, 8 * GIB + 1536), (2048, 3, RW, 8 * GIB + 2048)];
    let mut vm = Vm::new(machine, &slots);
    vm.memory.backing().set_largest(PageSize::Size4K);
    for (start, pages, ..) in slots {
        (start..start + pages).for_each(|gfn| vm.map(gfn));
    }
    vm.memory.backing().set_largest(PageSize::Size1G);
    vm.collapse(Sweep::over(GfnRange::ALL));
    for (gfn, pages) in [(5, 1), (511, 1), (512, 1), (1004, 1), (1536, 512), (2048, 1), (2050, 1)] {
        assert_eq!(vm.hit(gfn), Some((8 * GIB + gfn, pages)));
    }
    vm.finish();
}

fn a_block_that_moved_is_not_collapsed<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.map(0);
    split_to(&mut vm, PageSize::Size2M, 0, GIB);
    let invalidation = vm.memory.exclusive(CPU).begin_invalidation(range(512, 512));
    vm.zap(512, 512);
    vm.collapse(Sweep::over(range(0, GIB)));
    assert_eq!(vm.check().leaves, [0, 511, 0], "E1: not during an invalidation");
    vm.memory.backing().move_block(700);
    drop(invalidation);
    vm.map(700);
    vm.collapse(Sweep::over(range(0, GIB)));
    assert_eq!(vm.check().leaves, [0, 512, 0], "the gigabyte is in pieces");
    vm.finish();
}

fn no_huge_execute<M: Machine>(vm: &Vm<M>, forbid: bool) {
    let mut exclusive = vm.memory.exclusive(CPU);
    let mut sweep = vm.kind.forbid_huge_execute(&mut exclusive, forbid).unwrap();
    while !sweep.is_done() {
        drop(vm.kind.zap(&exclusive, &mut sweep));
    }
}

/// B6.
fn check_huge<M: Machine>(vm: &Vm<M>) {
    vm.walker().check(&mut |leaf| {
        assert_eq!(leaf.rights.execute, [leaf.pages == 1; 2], "B6: {leaf:?}");
    });
    vm.check();
}

fn cve_2018_12207_huge_pages_are_not_executable<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 2 * GIB, RW, 8 * GIB)]);
    assert_eq!(vm.fault(3, AccessKind::Execute), FaultOutcome::Mapped);
    assert_eq!(vm.leaf(3).unwrap().pages, GIB);
    let before = vm.kind.resolve(&vm.memory.shared(CPU), gpa(GIB + 3), AccessKind::Write).unwrap();
    no_huge_execute(&vm, true);
    assert_eq!(vm.leaf(3).map(|leaf| leaf.pages), None);
    let outcome = vm.kind.install(&vm.memory.shared(CPU), &mut vm.cache, &before);
    assert_eq!(outcome, FaultOutcome::Retry, "it was found when huge pages were executable");
    vm.map(3);
    check_huge(&vm);
    assert_eq!(vm.hit(3), Some((8 * GIB + 3, GIB)));
    assert_eq!(vm.fault(700, AccessKind::Execute), FaultOutcome::Mapped);
    assert!(vm.walker().walk(700, true, true).is_some());
    assert_eq!((vm.leaf(700).unwrap().pages, vm.kind.execute_splits()), (1, 1));
    vm.map(3);
    assert_eq!(vm.leaf(3).unwrap().pages, 512, "its neighbours are as large as they can be");
    assert_eq!(vm.fault(701, AccessKind::Read), FaultOutcome::Mapped);
    assert_eq!(vm.fault(702, AccessKind::Execute), FaultOutcome::Mapped);
    assert_eq!(vm.fault(5, AccessKind::Execute), FaultOutcome::Mapped);
    check_huge(&vm);
    assert_eq!(vm.kind.execute_splits(), 2);
    vm.collapse(Sweep::over(range(0, GIB)));
    assert_eq!(vm.leaf(700).unwrap().pages, 1, "recovery's affair");
    vm.zap(0, 512);
    assert_eq!(vm.kind.execute_splits(), 1, "D4");
    no_huge_execute(&vm, false);
    assert_eq!(vm.kind.execute_splits(), 0, "D4");
    assert_eq!(vm.fault(700, AccessKind::Execute), FaultOutcome::Mapped);
    assert_eq!(vm.leaf(700).unwrap().pages, GIB);
    vm.finish();
}

fn recovery_takes_a_share_of_the_split_pages<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size2M);
    no_huge_execute(&vm, true);
    (0..20)
        .for_each(|block| assert_eq!(vm.fault(block * 512 + 9, AccessKind::Execute), FaultOutcome::Mapped));
    assert_eq!(vm.kind.execute_splits(), 20);
    let mut sweep = Sweep::over(GfnRange::ALL);
    let recover = |vm: &Vm<M>, sweep: &mut Sweep, ratio| {
        let flush = vm.kind.recover_huge_pages(&vm.memory.shared(CPU), sweep, ratio);
        (flush.is_needed(), vm.kind.execute_splits())
    };
    assert_eq!(recover(&vm, &mut sweep, 10), (true, 18));
    assert_eq!(recover(&vm, &mut sweep, 3), (true, 12));
    assert_eq!(vm.leaf(9).map(|leaf| leaf.pages), None);
    vm.map(9);
    assert_eq!(vm.leaf(9).unwrap().pages, 512, "huge again");
    while recover(&vm, &mut sweep, 1).0 {}
    assert_eq!(vm.kind.execute_splits(), 0);
    check_huge(&vm);
    vm.finish();
}

fn recovery_spares_logged_slots<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 512, RW, 8 * GIB), (512, 512, RW, 9 * GIB)]);
    no_huge_execute(&vm, true);
    [5, 600].into_iter().for_each(|gfn| assert_eq!(vm.fault(gfn, AccessKind::Execute), FaultOutcome::Mapped));
    let _ = vm.memory.exclusive(CPU).start_dirty_log(Gfn::default(), mmu::LogBy::WriteProtection).unwrap();
    let mut sweep = Sweep::over(GfnRange::ALL);
    while !sweep.is_done() {
        drop(vm.kind.recover_huge_pages(&vm.memory.shared(CPU), &mut sweep, 1));
    }
    assert_eq!(vm.kind.execute_splits(), 1);
    assert!(vm.leaf(5).is_some() && vm.leaf(600).is_none());
    vm.finish();
}

fn a_split_of_a_page_that_must_not_be_executable_is<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    no_huge_execute(&vm, true);
    vm.map(0);
    split_to(&mut vm, PageSize::Size4K, 600, 1);
    check_huge(&vm);
    assert!(vm.walker().walk(601, true, true).is_some());
    vm.finish();
}

fn every_role_has_its_root<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    let get = |vm: &mut Vm<M>, role| {
        let root = vm.kind.get_root(&mut vm.memory.exclusive(CPU), &mut vm.cache, role);
        vm.tables.fill(&mut vm.cache);
        root.unwrap()
    };
    let (smm, guest) = (get(&mut vm, DirectRole::SMM), get(&mut vm, DirectRole::GUEST_MODE));
    assert_eq!(get(&mut vm, DirectRole::SMM), smm, "D9");
    assert_eq!(get(&mut vm, DirectRole::empty()), vm.kind.root(), "D9");
    assert!(smm != guest && smm != vm.kind.root() && guest != vm.kind.root(), "D9");
    vm.map(3);
    let outcome = vm.kind.fault_on(&vm.memory.shared(CPU), &mut vm.cache, guest, gpa(3), AccessKind::Write);
    assert_eq!(outcome, FaultOutcome::Mapped);
    assert_eq!(vm.check().leaves, [0, 0, 2]);
    let mut mmu = mmu_of(&vm);
    drop(mmu.enter(&vm.memory, CPU));
    assert_eq!(mmu.set_root(smm), TagFlush::All, "C4");
    // Put twice, got twice.
    let zap =
        |vm: &Vm<M>| vm.run(Sweep::over(GfnRange::ALL), |shared, sweep| vm.kind.zap_obsolete(shared, sweep));
    vm.kind.put_root(&mut vm.memory.exclusive(CPU), smm);
    assert!(!zap(&vm));
    vm.kind.put_root(&mut vm.memory.exclusive(CPU), smm);
    assert!(zap(&vm));
    assert_eq!(vm.kind.roots().count(), 2);
    vm.kind.put_root(&mut vm.memory.exclusive(CPU), guest);
    zap(&vm);
    assert_eq!(vm.check().leaves, [0, 0, 1]);
    vm.tables.drain(&mut vm.cache);
    assert_eq!(vm.reclaim(), 2 + 1);
    vm.finish();
}

fn d7_invalidating_all_leaves_the_old_roots_behind<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    (0..5000).for_each(|gfn| vm.map(gfn));
    let mut mmu = mmu_of(&vm);
    let entered = mmu.enter(&vm.memory, CPU);
    let resolution = vm.kind.resolve(&vm.memory.shared(CPU), gpa(9000), AccessKind::Write).unwrap();
    let old = vm.kind.root();
    let page = vm.tables.allocate();
    let other = CpuId::new(1).unwrap();
    let issued = vm.kind.invalidate_all(&mut vm.memory.exclusive(other), page).unwrap().issue().unwrap();
    assert!(issued.kick.contains(CPU), "the vCPU that runs on it is kicked");
    drop(entered);
    assert!(mmu.enter(&vm.memory, CPU).is_obsolete());
    assert!(vm.walker().walk(0, false, false).is_none(), "nothing is left at once");
    // Neither an old resolution nor the old root is mapped into.
    let outcome = vm.kind.install(&vm.memory.shared(CPU), &mut vm.cache, &resolution);
    assert_eq!(outcome, FaultOutcome::Retry);
    let outcome = vm.kind.fault_on(&vm.memory.shared(CPU), &mut vm.cache, old, gpa(1), AccessKind::Read);
    assert_eq!(outcome, FaultOutcome::Retry);
    let outcome = vm.kind.fast_fault(&vm.memory.shared(CPU), &mut vm.cache, old, gpa(1), AccessKind::Read);
    assert_eq!(outcome, None);
    // Ranges are zapped there all the same: somebody may still run on it.
    vm.zap(0, 16);
    let before = vm.check();
    assert_eq!(before.leaves, [5000 - 16, 0, 0]);
    let _ = mmu.set_root(vm.kind.root());
    assert!(!mmu.enter(&vm.memory, CPU).is_obsolete());
    vm.map(5);
    let mut sweep = Sweep::over(GfnRange::ALL);
    let mut batches = 0;
    while !sweep.is_done() {
        drop(vm.kind.zap_obsolete(&vm.memory.shared(CPU), &mut sweep));
        batches += 1;
        vm.check();
    }
    assert!(batches > 1);
    assert_eq!((vm.check().leaves, vm.kind.roots().count()), ([1, 0, 0], 1));
    vm.finish();
}

fn d7_a_root_that_is_held_is_not_freed<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    let get = |vm: &mut Vm<M>, role| {
        let root = vm.kind.get_root(&mut vm.memory.exclusive(CPU), &mut vm.cache, role).unwrap();
        vm.tables.fill(&mut vm.cache);
        root
    };
    let held = get(&mut vm, DirectRole::empty());
    assert_eq!(held, vm.kind.root());
    let smm = get(&mut vm, DirectRole::SMM);
    vm.map(5);
    let page = vm.tables.allocate();
    drop(vm.kind.invalidate_all(&mut vm.memory.exclusive(CPU), page).unwrap());
    for root in [held, smm] {
        let outcome = vm.kind.fault_on(&vm.memory.shared(CPU), &mut vm.cache, root, gpa(5), AccessKind::Read);
        assert_eq!(outcome, FaultOutcome::Retry);
    }
    vm.kind.put_root(&mut vm.memory.exclusive(CPU), smm);
    let zap =
        |vm: &Vm<M>| vm.run(Sweep::over(GfnRange::ALL), |shared, sweep| vm.kind.zap_obsolete(shared, sweep));
    zap(&vm);
    assert_eq!((vm.check().leaves, vm.kind.roots().count()), ([0; 3], 2), "emptied, not freed");
    vm.kind.put_root(&mut vm.memory.exclusive(CPU), held);
    zap(&vm);
    assert_eq!(vm.kind.roots().count(), 1);
    vm.finish();
}

/// A name of a root that is gone opens nothing, also when the same role has a root again.
fn a_put_root_is_refused<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    let get = |vm: &mut Vm<M>| {
        let root = vm.kind.get_root(&mut vm.memory.exclusive(CPU), &mut vm.cache, DirectRole::SMM).unwrap();
        vm.tables.fill(&mut vm.cache);
        root
    };
    let first = get(&mut vm);
    let resolution = vm.kind.resolve_on(&vm.memory.shared(CPU), first, gpa(1), AccessKind::Write).unwrap();
    vm.kind.put_root(&mut vm.memory.exclusive(CPU), first);
    assert_eq!(vm.kind.install(&vm.memory.shared(CPU), &mut vm.cache, &resolution), FaultOutcome::Retry);
    let outcome = vm.kind.fault_on(&vm.memory.shared(CPU), &mut vm.cache, first, gpa(1), AccessKind::Write);
    assert_eq!(outcome, FaultOutcome::Retry);
    let second = get(&mut vm);
    assert_ne!(first, second);
    vm.kind.put_root(&mut vm.memory.exclusive(CPU), first);
    assert_eq!(get(&mut vm), second, "the late put was of the one that is gone");
    vm.finish();
}

fn roots_come_to_an_end_without_harm<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    for _ in 1..MAX_ROOTS {
        let page = vm.tables.allocate();
        drop(vm.kind.invalidate_all(&mut vm.memory.exclusive(CPU), page).unwrap());
    }
    let page = vm.tables.allocate();
    let refused = vm.kind.invalidate_all(&mut vm.memory.exclusive(CPU), page).err();
    vm.tables.release(refused.expect("there is no place"));
    let full = vm.kind.get_root(&mut vm.memory.exclusive(CPU), &mut vm.cache, DirectRole::SMM);
    assert_eq!(full, Err(NoRoot::Full));
    vm.map(5);
    vm.run(Sweep::over(GfnRange::ALL), |shared, sweep| vm.kind.zap_obsolete(shared, sweep));
    assert_eq!(vm.kind.roots().count(), 1);
    vm.tables.drain(&mut vm.cache);
    let empty = vm.kind.get_root(&mut vm.memory.exclusive(CPU), &mut vm.cache, DirectRole::SMM);
    assert_eq!(empty, Err(NoRoot::NeedTables));
    vm.finish();
}

fn slot(start: u64, pages: u64) -> Slot {
    Slot::new(range(start, pages), RW, 16 * GIB)
}

fn i1_a_note_holds_for_its_generation<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 512, RW, 8 * GIB)]);
    let cached = |vm: &Vm<M>, gfn| {
        let found = vm.kind.cached_mmio(&vm.memory.shared(CPU), vm.kind.root(), gpa(gfn));
        found.map(|mmio| mmio.gfn.number())
    };
    vm.map(5);
    assert_eq!(vm.fault(600, AccessKind::Read), FaultOutcome::Mmio(gpa(600)));
    assert_eq!(cached(&vm, 600), None, "off at first");
    vm.kind.cache_mmio(&vm.memory.shared(CPU));
    assert_eq!(vm.fault(600, AccessKind::Read), FaultOutcome::Mmio(gpa(600)));
    assert_eq!((cached(&vm, 600), cached(&vm, 601), cached(&vm, 5)), (Some(600), None, None));
    assert_eq!(vm.walker().try_walk(600, false, false), Err(Exit::Misconfiguration));
    vm.check();
    // I2: a slot comes; the note is void before anything is done about it, and goes when the page is mapped.
    vm.memory.exclusive(CPU).insert_slot(&slot(512, 512)).unwrap();
    assert_eq!(cached(&vm, 600), None);
    assert_eq!(vm.fault(600, AccessKind::Write), FaultOutcome::Mapped);
    assert_eq!(vm.hit(600), Some((16 * GIB + 88, 512)));
    assert_eq!(vm.fault(5000, AccessKind::Read), FaultOutcome::Mmio(gpa(5000)));
    assert_eq!(cached(&vm, 5000), Some(5000));
    vm.run(Sweep::over(GfnRange::ALL), |shared, sweep| vm.kind.forget_mmio(shared, sweep));
    assert_eq!(cached(&vm, 5000), None);
    assert_eq!(vm.fault(1 << 34, AccessKind::Read), FaultOutcome::OutOfRange(gpa(1 << 34)));
    vm.kind.stop_caching_mmio();
    assert_eq!(vm.fault(5000, AccessKind::Read), FaultOutcome::Mmio(gpa(5000)));
    assert_eq!(cached(&vm, 5000), None);
    vm.finish();
}

fn i1_a_wrap_forgets_before_it_repeats<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 512, RW, 8 * GIB)]);
    vm.map(5);
    vm.kind.cache_mmio(&vm.memory.shared(CPU));
    let _ = vm.fault(600, AccessKind::Read);
    let cached = |vm: &Vm<M>| vm.kind.cached_mmio(&vm.memory.shared(CPU), vm.kind.root(), gpa(600)).is_some();
    assert!(cached(&vm));
    let mut exclusive = vm.memory.exclusive(CPU);
    for _ in 0..1 << 18 {
        exclusive.insert_slot(&slot(1 << 20, 1)).unwrap();
        let _ = exclusive.remove_slot(Gfn::new_truncate(1 << 20)).unwrap();
    }
    drop(exclusive);
    assert!(!cached(&vm), "the same number, but not the same generation");
    let _ = vm.fault(600, AccessKind::Read);
    assert!(!cached(&vm) && !vm.kind.caches_mmio(&vm.memory), "none are made either");
    vm.run(Sweep::over(GfnRange::ALL), |shared, sweep| vm.kind.forget_mmio(shared, sweep));
    vm.kind.cache_mmio(&vm.memory.shared(CPU));
    assert!(!cached(&vm));
    let _ = vm.fault(600, AccessKind::Read);
    assert!(cached(&vm));
    vm.finish();
}

/// I3: where a page is mapped, even one that its slot has left behind, no note is put over it.
fn cve_2026_23401_a_note_never_replaces_a_page<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 512, RW, 8 * GIB), (512, 512, RW, 9 * GIB)]);
    vm.map(5);
    vm.map(600);
    vm.kind.cache_mmio(&vm.memory.shared(CPU));
    // The zap that removing a slot asks for comes late.
    let mut sweep = vm.memory.exclusive(CPU).remove_slot(Gfn::new_truncate(512)).unwrap();
    assert_eq!(vm.fault(600, AccessKind::Read), FaultOutcome::Mmio(gpa(600)));
    assert!(vm.leaf(600).is_some());
    assert_eq!(vm.check().leaves, [0, 2, 0], "D4");
    while !sweep.is_done() {
        drop(vm.kind.zap(&vm.memory.shared(CPU), &mut sweep));
    }
    assert_eq!(vm.fault(600, AccessKind::Read), FaultOutcome::Mmio(gpa(600)));
    assert!(vm.kind.cached_mmio(&vm.memory.shared(CPU), vm.kind.root(), gpa(600)).is_some());
    vm.finish();
}

/// The host takes memory away that nobody counts: from the beginning of the invalidation on, nothing maps it.
fn cve_2021_22543_nothing_is_mapped_once_its_backing_changes<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 1024, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    (0..1024).for_each(|gfn| vm.map(gfn));
    vm.run(Sweep::over(range(0, 1024)), |shared, sweep| vm.kind.write_protect(shared, sweep));
    let mut cache = core::mem::take(&mut vm.cache);
    let mut fault = |gfn, access| vm.kind.fault(&vm.memory.shared(CPU), &mut cache, gpa(gfn), access);
    let invalidation = vm.memory.exclusive(CPU).begin_invalidation(range(0, 512));
    vm.zap(0, 512);
    for access in [AccessKind::Read, AccessKind::Write, AccessKind::Execute] {
        assert_eq!(fault(7, access), FaultOutcome::Retry);
        let (root, mut none) = (vm.kind.root(), TableCache::new());
        let fast = vm.kind.fast_fault(&vm.memory.shared(CPU), &mut none, root, gpa(7), access);
        assert_eq!(fast, None, "the fast path makes no mapping");
    }
    vm.collapse(Sweep::over(range(0, 1024)));
    assert_eq!(vm.leaf(7).map(|leaf| leaf.pfn), None);
    assert_eq!(fault(700, AccessKind::Write), FaultOutcome::Mapped, "other pages go on");
    vm.memory.backing().move_block(7);
    drop(invalidation);
    vm.cache = cache;
    vm.map(7);
    assert_ne!(vm.hit(7).unwrap().0, 8 * GIB + 7);
    vm.finish();
}

/// D8: the frame behind a page changes (without the invalidation that it should have): no operation turns the leaf of
/// the one frame into a leaf of the other.
fn cve_2026_23402_a_leaf_never_changes_its_frame<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 512, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    (0..512).for_each(|gfn| vm.map(gfn));
    vm.memory.backing().move_block(7);
    assert_eq!(vm.fault(7, AccessKind::Write), FaultOutcome::Spurious);
    vm.memory.backing().set_largest(PageSize::Size2M);
    vm.collapse(Sweep::over(range(0, 512)));
    assert_eq!(vm.hit(7), Some((8 * GIB + 7, 1)), "collapsing compares frames");
    vm.finish();
}

/// The direct kind in legacy PAE tables, as a shadow of a guest without paging has them.
#[test]
fn pae_tables_map_four_gigabytes() {
    let mut vm = Vm::new(PAE, &[(0, GIB, RW, 2 * GIB), (4 * GIB - 512, 1024, RW, 8 * GIB - 512)]);
    assert!(!vm.kind.format().has_size(PageSize::Size1G));
    vm.map(5);
    vm.map(GIB - 1);
    vm.map(4 * GIB - 1);
    assert_eq!(vm.hit(5), Some((2 * GIB + 5, 512)));
    assert_eq!(vm.hit(4 * GIB - 1), Some((8 * GIB - 1, 512)));
    assert_eq!(vm.fault(4 * GIB, AccessKind::Read), FaultOutcome::OutOfRange(gpa(4 * GIB)));
    split_to(&mut vm, PageSize::Size4K, 0, GIB);
    vm.kind.cache_mmio(&vm.memory.shared(CPU));
    assert_eq!(vm.fault(GIB + 1, AccessKind::Read), FaultOutcome::Mmio(gpa(GIB + 1)));
    vm.run(Sweep::over(range(0, 100)), |shared, sweep| vm.kind.write_protect(shared, sweep));
    assert_eq!(vm.hit(5), None);
    assert_eq!(vm.fault(5, AccessKind::Write), FaultOutcome::Mapped);
    vm.collapse(Sweep::over(range(0, GIB)));
    vm.check();
    vm.zap(0, 4 * GIB);
    assert_eq!(vm.check().leaves, [0; 3]);
    vm.finish();
}
