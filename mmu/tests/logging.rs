//! The direct kind's fast path, dirty log, write tracking and aging, case by case.
mod support;

use mmu::{AccessKind, CpuId, FaultOutcome, Gfn, LogBy, PageSize, SlotError, SlotFlags, Sweep};
use support::machines::{on_every_machine, Machine, AMD, PLAIN_INTEL};
use support::tables::interfere;
use support::vm::{gpa, range, Vm, CPU, GIB, RW};

on_every_machine! {
    the_fast_path_gives_back_and_nothing_else,
    the_fast_path_leaves_huge_pages_of_a_logged_slot_protected,
    h1_a_log_misses_no_write,
    h1_all_set_needs_no_protection_before_the_first_clear,
    h1_what_a_zap_takes_from_the_tables_is_in_the_log,
    h2_a_write_after_clearing_is_logged_again,
    h1_a_harvest_during_a_fault_leaves_its_write_to_the_next,
    h1_unprotecting_is_not_for_a_logged_slot,
    h4_a_logged_slot_has_no_huge_writable_page,
    logging_ends_with_huge_pages,
    h1_writes_of_the_hypervisor_are_logged,
    a_log_needs_memory_and_is_not_the_callers_flag,
    h5_aging_finds_what_was_used_and_never_flushes,
    c2_protecting_an_old_page_flushes_the_write_that_aging_left,
    b8_a_write_to_an_old_page_restores_it,
    tracked_pages_are_written_by_emulation_only,
    commit_0f38453cdb2e_tracking_holds_under_every_root,
    d4_tracked_pages_forbid_huge_ones_and_no_longer,
    e5_a_dirty_bit_set_at_the_worst_moment_is_not_lost,
    e4_a_fast_fault_loses_to_whoever_protects,
}

fn fast<M: Machine>(vm: &mut Vm<M>, gfn: u64, access: AccessKind) -> Option<FaultOutcome> {
    vm.kind.fast_fault(&vm.memory.shared(CPU), &mut vm.cache, vm.kind.root(), gpa(gfn), access)
}

fn small<M: Machine>(machine: M) -> Vm<M> {
    let vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    vm
}

fn start<M: Machine>(vm: &mut Vm<M>, by: LogBy) {
    let sweep = vm.memory.exclusive(CPU).start_dirty_log(Gfn::default(), by).unwrap();
    vm.split(sweep.clone());
    vm.run(sweep, |shared, sweep| vm.kind.rearm(shared, sweep));
}

const WAYS: [LogBy; 2] = [LogBy::WriteProtection, LogBy::DirtyBits];

/// What the processor's own log would have: frames whose D it has just set.
fn write<M: Machine>(vm: &mut Vm<M>, gfn: u64) {
    let before = vm.leaf(gfn).is_some_and(|leaf| leaf.dirty);
    for _ in 0..3 {
        if vm.hit(gfn).is_some() {
            if !before && vm.machine.flags().1 != 0 {
                vm.memory.shared(CPU).log_dirty([Gfn::new_truncate(gfn)]);
            }
            return;
        }
        assert!(matches!(vm.fault(gfn, AccessKind::Write), FaultOutcome::Mapped | FaultOutcome::Spurious));
    }
    panic!("A4");
}

fn the_fast_path_gives_back_and_nothing_else<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 1024, RW, 0x1_0000), (2048, 16, SlotFlags::READ_ONLY, 0x2_0000)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    assert_eq!(fast(&mut vm, 1, AccessKind::Write), None, "nothing is there");
    vm.map(1);
    assert_eq!(fast(&mut vm, 1, AccessKind::Write), Some(FaultOutcome::Spurious));
    vm.run(Sweep::over(range(0, 1024)), |shared, sweep| vm.kind.write_protect(shared, sweep));
    assert_eq!(vm.hit(1), None);
    assert_eq!(fast(&mut vm, 1, AccessKind::Read), Some(FaultOutcome::Spurious));
    assert_eq!(fast(&mut vm, 1, AccessKind::Write), Some(FaultOutcome::Mapped));
    assert_eq!(vm.hit(1), Some((0x1_0001, 1)));
    assert_eq!(vm.fault(2050, AccessKind::Read), FaultOutcome::Mapped);
    assert_eq!(fast(&mut vm, 2050, AccessKind::Write), None, "a read-only slot is the slow path's");
    assert_eq!(fast(&mut vm, 1 << 34, AccessKind::Read), None);
    assert_eq!(vm.cache.stats().fast, 3);
    vm.finish();
}

fn the_fast_path_leaves_huge_pages_of_a_logged_slot_protected<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.map(5);
    let sweep = vm.memory.exclusive(CPU).start_dirty_log(Gfn::default(), LogBy::WriteProtection).unwrap();
    vm.run(sweep, |shared, sweep| vm.kind.rearm(shared, sweep));
    assert_eq!(vm.leaf(5).unwrap().pages, GIB, "not split beforehand");
    assert_eq!(fast(&mut vm, 5, AccessKind::Write), None);
    assert_eq!(vm.fault(5, AccessKind::Write), FaultOutcome::Mapped);
    assert_eq!(vm.leaf(5).unwrap().pages, 1, "the slow path maps the one page");
    assert_eq!(vm.harvest(0), [5]);
    vm.finish();
}

/// H1, H3: exactly what was written is in the log, by either way, whoever wrote it.
fn h1_a_log_misses_no_write<M: Machine>(machine: M) {
    for by in WAYS {
        let mut vm = Vm::new(machine, &[(0, 4096, RW, 8 * GIB)]);
        vm.map(0);
        start(&mut vm, by);
        assert_eq!(vm.harvest(0), []);
        for gfn in [3, 64, 511, 512, 4095] {
            write(&mut vm, gfn);
        }
        assert_eq!(vm.fault(700, AccessKind::Read), FaultOutcome::Mapped);
        assert_eq!(vm.harvest(0), [3, 64, 511, 512, 4095]);
        assert_eq!(vm.harvest(0), []);
        vm.zap(2048, 1024);
        assert_eq!(vm.fault(2049, AccessKind::Read), FaultOutcome::Mapped, "read is not written");
        assert_eq!(vm.fault(2050, AccessKind::Write), FaultOutcome::Mapped);
        assert_eq!(vm.harvest(0), [2050]);
        write(&mut vm, 2049);
        assert_eq!(vm.harvest(0), [2049]);
        vm.finish();
    }
}

fn h1_all_set_needs_no_protection_before_the_first_clear<M: Machine>(machine: M) {
    for by in WAYS {
        let mut vm = Vm::new(machine, &[(0, 1000, RW, 8 * GIB)]);
        vm.map(0);
        vm.map(600);
        let _ = vm.memory.exclusive(CPU).start_dirty_log_all_set(Gfn::default(), by).unwrap();
        assert!(vm.hit(600).is_some(), "nothing is protected yet");
        let shared = vm.memory.shared(CPU);
        let log = shared.dirty_log(Gfn::default()).unwrap();
        assert_eq!((log.words(), log.read(0), log.read(15)), (16, u64::MAX, (1 << 40) - 1));
        assert_eq!(log.frames(15).unwrap(), range(960, 40));
        assert_eq!(log.frames(16), None);
        assert_eq!(log.clear(0, 0xf0), 0xf0, "by range and mask");
        assert_eq!(log.read(0), !0xf0);
        drop(vm.kind.rearm_pages(&shared, Gfn::default(), 0xf0));
        drop(shared);
        write(&mut vm, 5);
        let shared = vm.memory.shared(CPU);
        assert_eq!(shared.dirty_log(Gfn::default()).unwrap().read(0), !0xd0);
        drop(shared);
        vm.finish();
    }
}

/// Where the dirty bits are collected from the tables, no way of losing a leaf loses its bit.
fn h1_what_a_zap_takes_from_the_tables_is_in_the_log<M: Machine>(machine: M) {
    if !mmu::EntryFormat::has_dirty_bits(&machine.format()) {
        return;
    }
    let mut vm = small(machine);
    (0..2000).for_each(|gfn| vm.map(gfn));
    start(&mut vm, LogBy::DirtyBits);
    for gfn in [7, 600, 1500] {
        assert!(vm.hit(gfn).is_some(), "W stays");
    }
    // One leaf, then a whole table; the third is collected.
    vm.zap(7, 1);
    vm.zap(512, 512);
    assert!(vm.run(Sweep::over(range(0, 2000)), |shared, sweep| vm.kind.collect_dirty(shared, sweep)));
    assert!(!vm.run(Sweep::over(range(0, 2000)), |shared, sweep| vm.kind.collect_dirty(shared, sweep)));
    assert_eq!(vm.harvest(0), [7, 600, 1500]);
    vm.finish();
}

fn h2_a_write_after_clearing_is_logged_again<M: Machine>(machine: M) {
    for by in WAYS {
        let mut vm = small(machine);
        vm.map(9);
        start(&mut vm, by);
        for _ in 0..3 {
            write(&mut vm, 9);
            write(&mut vm, 9);
            assert_eq!(vm.harvest(0), [9]);
        }
        vm.finish();
    }
}

/// H4: whatever was mapped before, and whatever faults come, writable pages of a logged slot are small. Both ways agree.
fn h4_a_logged_slot_has_no_huge_writable_page<M: Machine>(machine: M) {
    for (by, eager) in [(WAYS[0], true), (WAYS[0], false), (WAYS[1], true), (WAYS[1], false)] {
        let mut vm = Vm::new(machine, &[(0, 4096, RW, 8 * GIB)]);
        vm.map(1);
        let sweep = vm.memory.exclusive(CPU).start_dirty_log(Gfn::default(), by).unwrap();
        if eager {
            vm.split(sweep.clone());
        }
        assert!(vm.run(sweep, |shared, sweep| vm.kind.rearm(shared, sweep)), "whoever asks is sure");
        for gfn in [0, 5, 2048, 4095] {
            write(&mut vm, gfn);
            vm.walker().check(&mut |leaf| assert!(leaf.pages == 1 || !leaf.rights.write));
        }
        assert_eq!(vm.harvest(0), [0, 5, 2048, 4095]);
        vm.finish();
    }
}

/// B7, its second half: what was split for the log is collapsed after it, to the page there was.
fn logging_ends_with_huge_pages<M: Machine>(machine: M) {
    for by in WAYS {
        let mut vm = Vm::new(machine, &[(512, 2048, RW, 8 * GIB)]);
        (512..2560).step_by(512).for_each(|gfn| vm.map(gfn));
        let sweep = vm.memory.exclusive(CPU).start_dirty_log(Gfn::new_truncate(512), by).unwrap();
        vm.split(sweep.clone());
        vm.run(sweep, |shared, sweep| vm.kind.rearm(shared, sweep));
        write(&mut vm, 577);
        let log_on = range(0, GIB);
        vm.collapse(Sweep::over(log_on));
        assert_eq!(vm.check().leaves, [2048, 0, 0], "not while it is logged");
        let sweep = vm.memory.exclusive(CPU).stop_dirty_log(Gfn::new_truncate(512)).unwrap();
        assert!(vm.memory.shared(CPU).dirty_log(Gfn::new_truncate(512)).is_none());
        vm.run(sweep.clone(), |shared, sweep| vm.kind.write_unprotect(shared, sweep));
        vm.collapse(sweep);
        assert_eq!(vm.check().leaves, [0, 4, 0], "{by:?}");
        assert_eq!(vm.hit(577), Some((8 * GIB + 65, 512)));
        assert_eq!(vm.reclaim(), 4, "the tables come back");
        vm.finish();
    }
}

/// H1: the log is harvested just before a fault makes the page writable. The write is in the next harvest: it is noted after
/// the fact.
fn h1_a_harvest_during_a_fault_leaves_its_write_to_the_next<M: Machine>(machine: M) {
    let vm: &'static mut Vm<M> = Box::leak(Box::new(small(machine)));
    start(vm, LogBy::WriteProtection);
    for gfn in [3, 4] {
        assert_eq!(vm.fault(gfn, AccessKind::Read), FaultOutcome::Mapped);
    }
    let mut cache = core::mem::take(&mut vm.cache);
    let vm: &'static Vm<M> = vm;
    // A leaf that is relaxed, by the slow and by the fast path, and one that is made.
    for (gfn, by_fast_path) in [(3, false), (4, true), (5, false)] {
        interfere(move || assert_eq!(vm.harvest(0), []));
        let (shared, write) = (vm.memory.shared(CPU), AccessKind::Write);
        let outcome = if by_fast_path {
            vm.kind.fast_fault(&shared, &mut cache, vm.kind.root(), gpa(gfn), write).unwrap()
        } else {
            vm.kind.fault(&shared, &mut cache, gpa(gfn), write)
        };
        drop(shared);
        assert_eq!(outcome, FaultOutcome::Mapped);
        assert!(vm.hit(gfn).is_some());
        assert_eq!(vm.harvest(0), [gfn]);
    }
}

fn h1_unprotecting_is_not_for_a_logged_slot<M: Machine>(machine: M) {
    let mut vm = small(machine);
    vm.map(3);
    start(&mut vm, LogBy::WriteProtection);
    vm.run(Sweep::over(range(0, 16)), |shared, sweep| vm.kind.write_unprotect(shared, sweep));
    assert_eq!(vm.hit(3), None);
    vm.finish();
}

fn h1_writes_of_the_hypervisor_are_logged<M: Machine>(machine: M) {
    let mut vm = small(machine);
    start(&mut vm, LogBy::WriteProtection);
    vm.memory.shared(CPU).write(gpa(40), &[1; 5000]).unwrap();
    assert_eq!(vm.harvest(0), [40, 41]);
    vm.finish();
}

fn a_log_needs_memory_and_is_not_the_callers_flag<M: Machine>(machine: M) {
    let vm = Vm::new(machine, &[(0, 512, SlotFlags::all(), 8 * GIB)]);
    let flags = |vm: &Vm<M>| vm.memory.shared(CPU).slots().next().unwrap().flags;
    assert_eq!(flags(&vm), SlotFlags::READ_ONLY);
    let mut exclusive = vm.memory.exclusive(CPU);
    assert_eq!(
        exclusive.start_dirty_log(Gfn::new_truncate(5), WAYS[0]),
        Err(SlotError::NotFound(Gfn::new_truncate(5)))
    );
    let slot = mmu::Slot::new(range(1024, 512), RW, 16 * GIB);
    exclusive.insert_slot(&slot).unwrap();
    assert_eq!(exclusive.start_dirty_log(Gfn::new_truncate(1024), WAYS[0]), Err(SlotError::NoNotes(slot)));
    let _ = exclusive.start_dirty_log(Gfn::default(), WAYS[1]).unwrap();
    let _ = exclusive.set_slot_flags(Gfn::default(), RW).unwrap();
    drop(exclusive);
    assert_eq!(flags(&vm), SlotFlags::DIRTY_LOG | SlotFlags::DIRTY_BITS, "the log goes on");
    let _ = vm.memory.exclusive(CPU).remove_slot(Gfn::default()).unwrap();
    assert!(vm.memory.shared(CPU).dirty_log(Gfn::default()).is_none());
    vm.finish();
}

fn h5_aging_finds_what_was_used_and_never_flushes<M: Machine>(machine: M) {
    let mut vm = small(machine);
    (0..100).for_each(|gfn| vm.map(gfn));
    let before = vm.memory.shootdown().requested();
    let age = |vm: &Vm<M>, start, pages| {
        let mut sweep = Sweep::over(range(start, pages));
        let mut young = false;
        while !sweep.is_done() {
            young |= vm.kind.test_and_clear_young(&vm.memory.shared(CPU), &mut sweep);
        }
        young
    };
    assert!(age(&vm, 0, 100) && !age(&vm, 0, 100));
    assert_eq!(vm.fault(50, AccessKind::Read), {
        let spurious = vm.machine.flags().0 != 0;
        if spurious {
            FaultOutcome::Spurious
        } else {
            FaultOutcome::Mapped
        }
    });
    assert!(vm.walker().walk(50, false, true).is_some(), "fetches come back with reads");
    assert!(vm.kind.test_young(&vm.memory.shared(CPU), &mut Sweep::over(range(50, 1))));
    assert!(!age(&vm, 0, 50) && !age(&vm, 51, 49) && age(&vm, 50, 1));
    assert_eq!(vm.memory.shootdown().requested(), before, "aging never flushes");
    vm.check();
    vm.finish();
}

/// C2: aging takes W without a flush where there are no accessed bits; a TLB may still have it. So the page counts as
/// writable for whoever protects it, until that was flushed.
fn c2_protecting_an_old_page_flushes_the_write_that_aging_left<M: Machine>(machine: M) {
    let mut vm = small(machine);
    vm.map(3);
    let _ = vm.kind.test_and_clear_young(&vm.memory.shared(CPU), &mut Sweep::over(range(3, 1)));
    // Brought back by a read: still not flushed.
    let _ = vm.fault(3, AccessKind::Read);
    let protect =
        |vm: &Vm<M>| vm.run(Sweep::over(range(3, 1)), |shared, sweep| vm.kind.write_protect(shared, sweep));
    assert!(protect(&vm), "some TLB may still have W");
    assert!(!protect(&vm), "not any more");
    vm.finish();
}

fn b8_a_write_to_an_old_page_restores_it<M: Machine>(machine: M) {
    let mut vm = small(machine);
    for gfn in [3, 4] {
        vm.map(gfn);
        let _ = vm.kind.test_and_clear_young(&vm.memory.shared(CPU), &mut Sweep::over(range(gfn, 1)));
        assert!(!vm.leaf(gfn).unwrap().young);
        let tracked = vm.hit(gfn).is_none();
        assert_eq!(tracked, vm.machine.flags().0 == 0);
        let outcome = match gfn {
            3 => fast(&mut vm, gfn, AccessKind::Write).unwrap(),
            _ => vm.fault(gfn, AccessKind::Write),
        };
        assert_eq!(outcome, if tracked { FaultOutcome::Mapped } else { FaultOutcome::Spurious });
        assert_eq!(vm.hit(gfn), Some((8 * GIB + gfn, 1)));
        assert!(vm.walker().walk(gfn, false, true).is_some());
    }
    vm.check();
    vm.finish();
}

fn track<M: Machine>(vm: &Vm<M>, gfn: u64) -> bool {
    let mut exclusive = vm.memory.exclusive(CPU);
    let mut sweep = exclusive.track_writes(Gfn::new_truncate(gfn)).unwrap();
    let mut needed = false;
    while !sweep.is_done() {
        needed |= vm.kind.track(&exclusive, &mut sweep).is_needed();
    }
    needed
}

fn untrack<M: Machine>(vm: &Vm<M>, gfn: u64, restore: bool) {
    let mut exclusive = vm.memory.exclusive(CPU);
    let mut sweep = exclusive.untrack_writes(Gfn::new_truncate(gfn)).unwrap();
    while restore && !sweep.is_done() {
        assert!(!vm.kind.untrack(&exclusive, &mut sweep).is_needed());
    }
}

fn tracked_pages_are_written_by_emulation_only<M: Machine>(machine: M) {
    let mut vm = small(machine);
    vm.map(5);
    vm.map(6);
    assert!(track(&vm, 5) && !track(&vm, 5), "twice costs one flush");
    assert!(vm.memory.shared(CPU).is_write_tracked(Gfn::new_truncate(5)));
    assert_eq!(vm.hit(5), None);
    assert!(vm.walker().walk(5, false, false).is_some() && vm.hit(6).is_some());
    for _ in 0..2 {
        assert_eq!(fast(&mut vm, 5, AccessKind::Write), None);
        assert_eq!(vm.fault(5, AccessKind::Write), FaultOutcome::WriteTracked(gpa(5)));
        assert_eq!(vm.fault(5, AccessKind::Read), FaultOutcome::Spurious);
        vm.run(Sweep::over(range(0, 16)), |shared, sweep| vm.kind.write_unprotect(shared, sweep));
        assert_eq!(vm.hit(5), None, "unprotecting is for watched pages");
        untrack(&vm, 5, true);
        if !vm.memory.shared(CPU).is_write_tracked(Gfn::new_truncate(5)) {
            break;
        }
    }
    assert_eq!(fast(&mut vm, 5, AccessKind::Write), Some(FaultOutcome::Mapped));
    assert!(vm.memory.exclusive(CPU).untrack_writes(Gfn::new_truncate(5)).is_err(), "nobody tracks it");
    // Tracked before it is mapped; untracked without a word to the kind.
    track(&vm, 9);
    assert_eq!(vm.fault(9, AccessKind::Execute), FaultOutcome::Mapped);
    assert_eq!(vm.fault(9, AccessKind::Write), FaultOutcome::WriteTracked(gpa(9)));
    untrack(&vm, 9, false);
    assert_eq!(vm.fault(9, AccessKind::Write), FaultOutcome::Mapped);
    assert!(vm.hit(9).is_some());
    vm.finish();
}

/// 0f38453cdb2e: a page is tracked, logged and zapped under every root there is, whatever role the root is for.
fn commit_0f38453cdb2e_tracking_holds_under_every_root<M: Machine>(machine: M) {
    let mut vm = small(machine);
    let smm = vm.kind.get_root(&mut vm.memory.exclusive(CPU), &mut vm.cache, mmu::DirectRole::SMM).unwrap();
    vm.tables.fill(&mut vm.cache);
    let on_smm = |vm: &mut Vm<M>, access| {
        let outcome = vm.kind.fault_on(&vm.memory.shared(CPU), &mut vm.cache, smm, gpa(5), access);
        vm.tables.fill(&mut vm.cache);
        outcome
    };
    vm.map(5);
    assert_eq!(on_smm(&mut vm, AccessKind::Write), FaultOutcome::Mapped, "its own tables");
    track(&vm, 5);
    for root in [vm.kind.root(), smm] {
        let walker = support::hardware::Walker { root: root.hpa.pfn().number(), ..vm.walker() };
        assert!(walker.walk(5, true, false).is_none(), "D6");
        assert!(walker.walk(5, false, false).is_some());
    }
    assert_eq!(on_smm(&mut vm, AccessKind::Write), FaultOutcome::WriteTracked(gpa(5)));
    vm.zap(0, 16);
    assert_eq!(vm.check().leaves, [0; 3]);
    vm.finish();
}

/// D4 and ef057cbf825e: the largest page follows from the tracked pages of its block, at the slot's edges too.
fn d4_tracked_pages_forbid_huge_ones_and_no_longer<M: Machine>(machine: M) {
    // Starts and ends inside a gigabyte and a 2 MiB block.
    let first = GIB + 512 + 3;
    let mut vm = Vm::new(machine, &[(first, 2 * GIB, RW, 8 * GIB + first)]);
    let backing = |vm: &Vm<M>, size, block| vm.memory.backing().tracked_in(8 * GIB + first, size, block);
    for gfn in [first, first + 1, 2 * GIB + 700, first + 2 * GIB - 1] {
        track(&vm, gfn);
    }
    assert_eq!([0, 1, 2].map(|block| backing(&vm, PageSize::Size1G, block)), [2, 1, 1]);
    assert_eq!(backing(&vm, PageSize::Size2M, 0), 2);
    vm.map(2 * GIB + 701);
    vm.map(2 * GIB + 3000);
    assert_eq!(vm.hit(2 * GIB + 701).unwrap().1, 1);
    assert_eq!(vm.hit(2 * GIB + 3000).unwrap().1, 512);
    vm.collapse(Sweep::over(range(0, 4 * GIB)));
    assert_eq!(vm.hit(2 * GIB + 701).unwrap().1, 1, "not while it is tracked");
    untrack(&vm, 2 * GIB + 700, true);
    assert_eq!([0, 1, 2].map(|block| backing(&vm, PageSize::Size1G, block)), [2, 0, 1]);
    vm.collapse(Sweep::over(range(0, 4 * GIB)));
    assert_eq!(vm.hit(2 * GIB + 701), Some((10 * GIB + 701, GIB)));
    // A huge page goes when one of its pages is tracked.
    assert!(track(&vm, 3 * GIB - 1));
    assert_eq!(vm.hit(2 * GIB + 701), None);
    vm.finish();
}

/// "Fix atomicity of TDP updates": the processor sets D between a look at the leaf and the exchange. It stays.
#[allow(clippy::needless_pass_by_value)]
fn e5_a_dirty_bit_set_at_the_worst_moment_is_not_lost<M: Machine>(machine: M) {
    if !mmu::EntryFormat::has_dirty_bits(&machine.format()) {
        return;
    }
    let vm: &'static mut Vm<M> = Box::leak(Box::new(small(machine)));
    vm.map(3);
    start(vm, LogBy::DirtyBits);
    assert!(!vm.leaf(3).unwrap().dirty);
    let vm: &'static Vm<M> = vm;
    interfere(move || assert!(vm.hit(3).is_some(), "the guest writes"));
    let _ = vm.kind.test_and_clear_young(&vm.memory.shared(CPU), &mut Sweep::over(range(3, 1)));
    assert!(vm.leaf(3).unwrap().dirty, "aging keeps D");
    vm.run(Sweep::over(range(3, 1)), |shared, sweep| vm.kind.collect_dirty(shared, sweep));
    assert_eq!(vm.harvest(0), [3]);
}

/// E4: the leaf is tracked between a fast fault's look and its exchange.
fn e4_a_fast_fault_loses_to_whoever_protects<M: Machine>(machine: M) {
    let vm: &'static mut Vm<M> = Box::leak(Box::new(small(machine)));
    vm.map(3);
    vm.run(Sweep::over(range(3, 1)), |shared, sweep| vm.kind.write_protect(shared, sweep));
    let mut cache = core::mem::take(&mut vm.cache);
    let vm: &'static Vm<M> = vm;
    // (The same sweep that tracking asks for; the count is of no matter here.)
    let other = CpuId::new(1).unwrap();
    interfere(move || drop(vm.kind.track(&vm.memory.shared(other), &mut Sweep::over(range(3, 1)))));
    let root = vm.kind.root();
    let outcome = vm.kind.fast_fault(&vm.memory.shared(CPU), &mut cache, root, gpa(3), AccessKind::Write);
    assert_eq!(outcome, None);
    assert_eq!(vm.hit(3), None);
}

/// Two formats of one VM: a write is logged whichever kind maps it.
#[test]
fn one_log_serves_kinds_of_two_formats() {
    let mut vm = small(AMD);
    let format = PLAIN_INTEL.format();
    let tables = vm.tables.clone();
    let other = mmu::DirectMmu::new(&vm.memory, format, tables, vm.tables.allocate(), 46, PageSize::Size4K);
    start(&mut vm, LogBy::WriteProtection);
    let outcome = other.fault(&vm.memory.shared(CPU), &mut vm.cache, gpa(6), AccessKind::Write);
    assert_eq!(outcome, FaultOutcome::Mapped);
    vm.tables.fill(&mut vm.cache);
    write(&mut vm, 5);
    assert_eq!(vm.harvest(0), [5, 6]);
    other.dismantle(|page| vm.tables.release(page));
    vm.finish();
}
