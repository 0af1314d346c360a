//! Two address spaces, normal and SMM, in the direct kind and for accesses by the hypervisor, case by case.
mod support;

use mmu::{
    AccessKind, DirectRole, FaultOutcome, Gfn, GfnRange, LogBy, NotRam, PageSize, Root, Slot, SlotError,
    Space, SpaceGfn, Spaces, Sweep,
};
use support::hardware::Walker;
use support::machines::{on_every_machine, Machine};
use support::vm::{gpa, range, Vm, CPU, GIB, RW};

on_every_machine! {
    each_root_maps_what_its_space_sees,
    a_slot_that_goes_takes_the_leaves_of_its_spaces_only,
    a_slot_that_goes_is_swept_out_of_roots_that_are_put,
    b7_huge_pages_follow_from_the_slot_of_the_roots_space,
    h1_each_slot_has_its_own_log,
    h1_arming_one_slot_loses_nothing_of_another,
    h1_the_fast_path_logs_in_the_space_of_its_root,
    h1_a_slot_in_both_spaces_has_one_log,
    commit_0f38453cdb2e_tracking_a_frame_covers_both_spaces,
    commit_0f38453cdb2e_a_slot_that_comes_later_is_tracked_where_the_other_is,
    i1_a_note_of_one_space_says_nothing_of_the_other,
}

/// What SMM alone sees: 32 pages in the middle of the second 2 MiB block.
const SMRAM: u64 = 512 + 0xa0;
const SMRAM_PAGES: u64 = 0x20;
/// A block that each space has of its own, in one piece.
const OWN: u64 = 1024;
const SHARED: u64 = 4096;

const NORMAL_AT: u64 = 8 * GIB;
const SMRAM_AT: u64 = 16 * GIB + SMRAM;
const OWN_AT: u64 = 24 * GIB + OWN;

/// A VM with RAM for both spaces from 4096 on, and below it for each of its own. The second root is that of SMM.
fn two<M: Machine>(machine: M) -> (Vm<M>, Root) {
    let mut vm = Vm::new(machine, &[(SHARED, 1024, RW, 32 * GIB + SHARED)]);
    for slot in [
        Slot::new(range(0, 2048), RW, NORMAL_AT).only_in(Space::Normal),
        Slot::new(range(SMRAM, SMRAM_PAGES), RW, SMRAM_AT).only_in(Space::Smm),
        Slot::new(range(OWN, 512), RW, OWN_AT).only_in(Space::Smm),
    ] {
        insert(&vm, &slot);
    }
    let smm = vm.kind.get_root(&mut vm.memory.exclusive(CPU), &mut vm.cache, DirectRole::SMM).unwrap();
    vm.tables.fill(&mut vm.cache);
    (vm, smm)
}

fn insert<M: Machine>(vm: &Vm<M>, slot: &Slot) {
    vm.memory.backing().provide_notes(slot.cookie, slot.range.start(), slot.range.pages());
    vm.memory.exclusive(CPU).insert_slot(slot).unwrap();
}

fn fault<M: Machine>(vm: &mut Vm<M>, root: Root, gfn: u64, access: AccessKind) -> FaultOutcome {
    let outcome = vm.kind.fault_on(&vm.memory.shared(CPU), &mut vm.cache, root, gpa(gfn), access);
    vm.tables.fill(&mut vm.cache);
    outcome
}

fn write<M: Machine>(vm: &mut Vm<M>, root: Root, gfn: u64) {
    assert_eq!(fault(vm, root, gfn, AccessKind::Write), FaultOutcome::Mapped);
}

/// Frame and page size that the processor finds on `root`, for a write or a read.
fn hit<M: Machine>(vm: &Vm<M>, root: Root, gfn: u64, write: bool) -> Option<(u64, u64)> {
    let walker = Walker { root: root.hpa.pfn().number(), ..vm.walker() };
    walker.walk(gfn, write, false).map(|hit| (hit.pfn, hit.pages))
}

fn zap<M: Machine>(vm: &Vm<M>, sweep: Sweep) {
    vm.run(sweep, |shared, sweep| vm.kind.zap(shared, sweep));
}

fn at(gfn: u64) -> Gfn {
    Gfn::new_truncate(gfn)
}

fn each_root_maps_what_its_space_sees<M: Machine>(machine: M) {
    let (mut vm, smm) = two(machine);
    let normal = vm.kind.root();
    for (root, gfn) in
        [(normal, SMRAM), (smm, SMRAM), (smm, OWN), (normal, OWN), (normal, SHARED), (smm, SHARED)]
    {
        write(&mut vm, root, gfn);
    }
    assert_eq!(hit(&vm, normal, SMRAM, true), Some((NORMAL_AT + SMRAM, 512)));
    assert_eq!(hit(&vm, smm, SMRAM, true), Some((SMRAM_AT, 1)), "no more than the slot");
    assert_eq!(hit(&vm, smm, OWN, true), Some((OWN_AT, 512)));
    assert_eq!(hit(&vm, normal, OWN, true), Some((NORMAL_AT + OWN, 512)));
    assert_eq!(hit(&vm, smm, SHARED, true), hit(&vm, normal, SHARED, true));
    // Beside the slots of SMM there is nothing for it.
    assert_eq!(fault(&mut vm, smm, 5, AccessKind::Read), FaultOutcome::Mmio(gpa(5)));
    assert_eq!(fault(&mut vm, smm, SMRAM - 1, AccessKind::Read), FaultOutcome::Mmio(gpa(SMRAM - 1)));
    assert_eq!(fault(&mut vm, normal, 5, AccessKind::Read), FaultOutcome::Mapped);
    zap(&vm, Sweep::over(range(SMRAM, 1)).within(Spaces::SMM));
    assert_eq!(hit(&vm, smm, SMRAM, false), None);
    assert!(hit(&vm, normal, SMRAM, false).is_some(), "only the roots of SMM were swept");
    zap(&vm, Sweep::over(GfnRange::ALL));
    assert_eq!(vm.check().leaves, [0; 3]);
    vm.finish();
}

fn a_slot_that_goes_takes_the_leaves_of_its_spaces_only<M: Machine>(machine: M) {
    let (mut vm, smm) = two(machine);
    let normal = vm.kind.root();
    for (root, gfn) in [(normal, OWN), (smm, OWN), (normal, SHARED), (smm, SHARED)] {
        write(&mut vm, root, gfn);
    }
    let removed = vm.memory.exclusive(CPU).remove_slot(Space::Smm.at(at(OWN))).unwrap();
    zap(&vm, removed);
    assert_eq!((hit(&vm, smm, OWN, false), hit(&vm, normal, OWN, false).is_some()), (None, true));
    assert_eq!(fault(&mut vm, smm, OWN, AccessKind::Read), FaultOutcome::Mmio(gpa(OWN)));
    let removed = vm.memory.exclusive(CPU).remove_slot(Space::Smm.at(at(SHARED))).unwrap();
    zap(&vm, removed);
    assert_eq!((hit(&vm, smm, SHARED, false), hit(&vm, normal, SHARED, false)), (None, None));
    let again = vm.memory.exclusive(CPU).remove_slot(at(SHARED));
    assert_eq!(again, Err(SlotError::NotFound(at(SHARED))), "it was one slot");
    vm.finish();
}

/// A vCPU may still run on a root that was put: it is of its space until it is gone.
fn a_slot_that_goes_is_swept_out_of_roots_that_are_put<M: Machine>(machine: M) {
    let (mut vm, smm) = two(machine);
    write(&mut vm, smm, OWN);
    vm.kind.put_root(&mut vm.memory.exclusive(CPU), smm);
    let removed = vm.memory.exclusive(CPU).remove_slot(Space::Smm.at(at(OWN))).unwrap();
    zap(&vm, removed);
    assert_eq!(hit(&vm, smm, OWN, false), None);
    vm.run(Sweep::over(GfnRange::ALL), |shared, sweep| vm.kind.zap_obsolete(shared, sweep));
    vm.finish();
}

fn b7_huge_pages_follow_from_the_slot_of_the_roots_space<M: Machine>(machine: M) {
    let (mut vm, smm) = two(machine);
    let normal = vm.kind.root();
    let sizes = |vm: &Vm<M>| {
        [OWN + 9, SMRAM].map(|gfn| [normal, smm].map(|root| hit(vm, root, gfn, true).unwrap().1))
    };
    for gfn in [OWN + 9, SMRAM] {
        write(&mut vm, normal, gfn);
        write(&mut vm, smm, gfn);
    }
    assert_eq!(sizes(&vm), [[512, 512], [512, 1]]);
    vm.split(Sweep::over(range(OWN, 512)).within(Spaces::SMM));
    assert_eq!(sizes(&vm), [[512, 1], [512, 1]]);
    vm.split(Sweep::over(range(0, 2048)));
    assert_eq!(sizes(&vm), [[1, 1], [1, 1]]);
    vm.collapse(Sweep::over(range(0, 2048)).within(Spaces::NORMAL));
    assert_eq!(sizes(&vm), [[512, 1], [512, 1]]);
    vm.collapse(Sweep::over(range(0, 2048)));
    assert_eq!(sizes(&vm), [[512, 512], [512, 1]]);
    assert_eq!(hit(&vm, smm, OWN + 9, true), Some((OWN_AT + 9, 512)));
    vm.finish();
}

/// What the log of the slot at `start` has; takes it out and arms the pages again.
fn harvest<M: Machine>(vm: &Vm<M>, space: Space, start: u64, pages: u64) -> Vec<u64> {
    let sweep = Sweep::over(range(start, pages)).within(space.into());
    vm.run(sweep, |shared, sweep| vm.kind.collect_dirty(shared, sweep));
    let shared = vm.memory.shared(CPU);
    let log = shared.dirty_log(space.at(at(start))).unwrap();
    let mut found = vec![];
    for word in 0..log.words() {
        let mask = log.clear(word, u64::MAX);
        let first = log.frames(word).unwrap().start();
        found.extend((0..64).filter(|bit| mask >> bit & 1 != 0).map(|bit| first + bit));
        drop(vm.kind.rearm_pages(&shared, space.at(at(first)), mask));
    }
    found
}

/// Begins to log by 4 KiB, in each slot that starts here.
fn start_logs<M: Machine>(vm: &Vm<M>, starts: &[SpaceGfn], by: LogBy) {
    vm.memory.backing().set_largest(PageSize::Size4K);
    for &start in starts {
        let started = vm.memory.exclusive(CPU).start_dirty_log(start, by).unwrap();
        vm.run(started, |shared, sweep| vm.kind.rearm(shared, sweep));
    }
}

fn h1_arming_one_slot_loses_nothing_of_another<M: Machine>(machine: M) {
    let (mut vm, smm) = two(machine);
    start_logs(&vm, &[Space::Smm.at(at(OWN)), at(0).into()], LogBy::DirtyBits);
    assert_eq!(fault(&mut vm, smm, OWN + 2, AccessKind::Read), FaultOutcome::Mapped);
    // Nothing but D tells of this write, where there is D.
    if hit(&vm, smm, OWN + 2, true).is_none() {
        write(&mut vm, smm, OWN + 2);
    }
    // A sweep that says no space is over the slot of the normal one, one that says SMM over the other.
    vm.run(Sweep::over(range(0, 2048)), |shared, sweep| vm.kind.rearm(shared, sweep));
    assert_eq!(harvest(&vm, Space::Smm, OWN, 512), [OWN + 2]);
    assert_eq!(hit(&vm, smm, OWN + 2, false), Some((OWN_AT + 2, 1)));
    vm.finish();
}

fn h1_the_fast_path_logs_in_the_space_of_its_root<M: Machine>(machine: M) {
    let (mut vm, smm) = two(machine);
    start_logs(&vm, &[Space::Smm.at(at(OWN))], LogBy::WriteProtection);
    assert_eq!(fault(&mut vm, smm, OWN + 1, AccessKind::Read), FaultOutcome::Mapped);
    let shared = vm.memory.shared(CPU);
    let fast = vm.kind.fast_fault(&shared, &mut vm.cache, smm, gpa(OWN + 1), AccessKind::Write);
    assert_eq!(fast, Some(FaultOutcome::Mapped));
    drop(shared);
    assert_eq!(harvest(&vm, Space::Smm, OWN, 512), [OWN + 1]);
    vm.finish();
}

/// The logs of two slots with the same frames, by either way: what is noted of one is not noted of the other, nor lost by
/// arming the other.
fn h1_each_slot_has_its_own_log<M: Machine>(machine: M) {
    for by in [LogBy::WriteProtection, LogBy::DirtyBits] {
        let (mut vm, smm) = two(machine);
        start_logs(&vm, &[Space::Smm.at(at(OWN)), at(0).into()], by);
        let normal = vm.kind.root();
        write(&mut vm, normal, OWN + 1);
        write(&mut vm, smm, OWN + 2);
        for root in [normal, smm] {
            // Written by way of the leaf, which D alone tells.
            assert_eq!(fault(&mut vm, root, OWN + 3, AccessKind::Read), FaultOutcome::Mapped);
            let walker = Walker { root: root.hpa.pfn().number(), ..vm.walker() };
            if walker.walk(OWN + 3, true, false).is_none() {
                write(&mut vm, root, OWN + 3);
            }
        }
        assert_eq!(harvest(&vm, Space::Smm, OWN, 512), [OWN + 2, OWN + 3]);
        assert_eq!(harvest(&vm, Space::Smm, OWN, 512), [0; 0]);
        assert_eq!(harvest(&vm, Space::Normal, 0, 2048), [OWN + 1, OWN + 3]);
        let shared = vm.memory.shared(CPU);
        shared.in_space(Space::Smm).write(gpa(OWN + 7), &[1]).unwrap();
        shared.in_space(Space::Smm).log_dirty([at(OWN + 9)]);
        shared.write(gpa(OWN + 8), &[1]).unwrap();
        drop(shared);
        assert_eq!(harvest(&vm, Space::Normal, 0, 2048), [OWN + 8]);
        assert_eq!(harvest(&vm, Space::Smm, OWN, 512), [OWN + 7, OWN + 9]);
        let stopped = vm.memory.exclusive(CPU).stop_dirty_log(Space::Smm.at(at(OWN))).unwrap();
        assert_eq!(stopped, Sweep::over(range(OWN, 512)).within(Spaces::SMM));
        assert!(vm.memory.shared(CPU).dirty_log(at(0)).is_some());
        vm.finish();
    }
}

fn h1_a_slot_in_both_spaces_has_one_log<M: Machine>(machine: M) {
    for by in [LogBy::WriteProtection, LogBy::DirtyBits] {
        let (mut vm, smm) = two(machine);
        vm.memory.backing().set_largest(PageSize::Size4K);
        let normal = vm.kind.root();
        for gfn in [1, 2, 3] {
            write(&mut vm, normal, SHARED + gfn);
            write(&mut vm, smm, SHARED + gfn);
        }
        let started = vm.memory.exclusive(CPU).start_dirty_log(Space::Smm.at(at(SHARED)), by).unwrap();
        vm.run(started, |shared, sweep| vm.kind.rearm(shared, sweep));
        let collect = |vm: &Vm<M>| {
            let sweep = Sweep::over(range(SHARED, 1024));
            vm.run(sweep, |shared, sweep| vm.kind.collect_dirty(shared, sweep));
            vm.harvest(SHARED)
        };
        for round in 0..2 {
            assert_eq!(collect(&vm), [0; 0], "{round}: armed in both");
            for (root, gfn) in [(normal, SHARED + 1), (smm, SHARED + 2)] {
                // By dirty bits the leaf is writable already, and D is what tells of the write.
                let walker = Walker { root: root.hpa.pfn().number(), ..vm.walker() };
                if walker.walk(gfn, true, false).is_none() {
                    write(&mut vm, root, gfn);
                }
            }
            assert_eq!(collect(&vm), [SHARED + 1, SHARED + 2], "{round}");
        }
        vm.finish();
    }
}

fn track<M: Machine>(vm: &Vm<M>, gfn: u64) {
    let mut exclusive = vm.memory.exclusive(CPU);
    let mut sweep = exclusive.track_writes(at(gfn)).unwrap();
    while !sweep.is_done() {
        drop(vm.kind.track(&exclusive, &mut sweep));
    }
}

fn commit_0f38453cdb2e_tracking_a_frame_covers_both_spaces<M: Machine>(machine: M) {
    let (mut vm, smm) = two(machine);
    let normal = vm.kind.root();
    for gfn in [OWN + 5, SHARED + 5, SMRAM + 5] {
        write(&mut vm, normal, gfn);
        write(&mut vm, smm, gfn);
        track(&vm, gfn);
        track(&vm, gfn);
        for root in [normal, smm] {
            assert_eq!(hit(&vm, root, gfn, true), None, "D6");
            assert_eq!(fault(&mut vm, root, gfn, AccessKind::Write), FaultOutcome::WriteTracked(gpa(gfn)));
            let read = fault(&mut vm, root, gfn, AccessKind::Read);
            assert!(matches!(read, FaultOutcome::Mapped | FaultOutcome::Spurious), "{read:?}");
            assert_eq!(hit(&vm, root, gfn, false).unwrap().1, 1, "D4: its block is not huge in either");
        }
        let untrack = || vm.memory.exclusive(CPU).untrack_writes(at(gfn));
        assert!(untrack().unwrap().range().is_empty());
        assert!(vm.memory.shared(CPU).is_write_tracked(at(gfn)));
        assert_eq!(untrack().unwrap().range(), range(gfn, 1));
        assert_eq!(untrack(), Err(SlotError::NotFound(at(gfn))), "as often as it was tracked");
        for root in [normal, smm] {
            write(&mut vm, root, gfn);
        }
    }
    // Where one space alone has the frame, it is tracked there.
    track(&vm, 5);
    assert_eq!(fault(&mut vm, normal, 5, AccessKind::Write), FaultOutcome::WriteTracked(gpa(5)));
    assert_eq!(fault(&mut vm, smm, 5, AccessKind::Write), FaultOutcome::Mmio(gpa(5)));
    vm.finish();
}

fn commit_0f38453cdb2e_a_slot_that_comes_later_is_tracked_where_the_other_is<M: Machine>(machine: M) {
    let (mut vm, smm) = two(machine);
    let (first, last) = (OWN + 512, 2047);
    for gfn in [first, last, last, OWN - 1] {
        track(&vm, gfn);
    }
    let slot = Slot::new(range(first, 600), RW, 40 * GIB + first).only_in(Space::Smm);
    let refused = vm.memory.exclusive(CPU).insert_slot(&slot);
    assert_eq!(refused, Err(SlotError::NoNotes(slot)), "what cannot be tracked is not added");
    insert(&vm, &slot);
    for gfn in [first, last] {
        assert_eq!(fault(&mut vm, smm, gfn, AccessKind::Write), FaultOutcome::WriteTracked(gpa(gfn)));
    }
    assert_eq!(vm.memory.backing().tracked_in(slot.cookie, PageSize::Size2M, 0), 2);
    write(&mut vm, smm, first + 1);
    write(&mut vm, smm, 2048);
    // The counts are the same from here on.
    for gfn in [first, last] {
        let _ = vm.memory.exclusive(CPU).untrack_writes(at(gfn)).unwrap();
    }
    write(&mut vm, smm, first);
    assert_eq!(fault(&mut vm, smm, last, AccessKind::Write), FaultOutcome::WriteTracked(gpa(last)));
    assert!(!vm.memory.exclusive(CPU).untrack_writes(at(last)).unwrap().range().is_empty());
    write(&mut vm, smm, last);
    vm.finish();
}

fn i1_a_note_of_one_space_says_nothing_of_the_other<M: Machine>(machine: M) {
    let (mut vm, smm) = two(machine);
    let normal = vm.kind.root();
    vm.kind.cache_mmio(&vm.memory.shared(CPU));
    write(&mut vm, smm, SMRAM + 1);
    write(&mut vm, normal, 7);
    assert_eq!(fault(&mut vm, smm, SMRAM - 1, AccessKind::Read), FaultOutcome::Mmio(gpa(SMRAM - 1)));
    let noted = |root| vm.kind.cached_mmio(&vm.memory.shared(CPU), root, gpa(SMRAM - 1)).is_some();
    assert_eq!([noted(smm), noted(normal)], [true, false]);
    write(&mut vm, normal, SMRAM - 1);
    vm.finish();
}

#[test]
fn accesses_of_the_hypervisor_say_their_space() {
    use mmu::{BelowError, SlotFlags, TableSource, Update, VmMemory};
    use support::flat::FlatRam;

    let memory = VmMemory::new(FlatRam::new(8 * 4096));
    let page = |start, pages, at: u64| Slot::new(range(start, pages), RW, at * 512);
    for slot in [
        page(0, 1, 0),
        page(1, 1, 1).only_in(Space::Normal),
        page(1, 2, 2).only_in(Space::Smm),
        Slot { flags: SlotFlags::READ_ONLY, ..page(3, 1, 4) },
    ] {
        memory.exclusive(CPU).insert_slot(&slot).unwrap();
    }
    let shared = memory.shared(CPU);
    let smm = shared.in_space(Space::Smm);
    assert_eq!((smm.space(), shared.in_space(Space::Normal).space()), (Space::Smm, Space::Normal));
    // Across a boundary, in each space on its way.
    shared.write(gpa(0).checked_add(0xffc).unwrap(), &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    smm.write(gpa(0).checked_add(0xffc).unwrap(), &[11, 12, 13, 14, 15, 16, 17, 18]).unwrap();
    assert_eq!(shared.load_u64(gpa(1)), Ok(0x0807_0605));
    assert_eq!(smm.load_u64(gpa(1)), Ok(0x1211_100f));
    assert_eq!((shared.load_u32(gpa(0)), smm.load_u32(gpa(2))), (Ok(0), Ok(0)));
    assert_eq!(shared.load_u32(gpa(2)), Err(NotRam { gpa: gpa(2), len: 4 }));
    let mut both = [0; 8];
    smm.read(gpa(0).checked_add(0xffc).unwrap(), &mut both).unwrap();
    assert_eq!(both, [11, 12, 13, 14, 15, 16, 17, 18]);
    assert!(smm.writable(gpa(2)).is_some() && shared.writable(gpa(2)).is_none());
    assert_eq!(smm.ram(gpa(2)).map(|ram| ram.slot_offset), Some(4096));
    // As the tables of a walk.
    assert_eq!((smm.read_u64(gpa(2)), shared.read_u64(gpa(2))), (Ok(0), Err(BelowError::NotRam)));
    assert_eq!(smm.update_u64(gpa(1), 0x1211_100f, 9), Ok(Update::Done));
    assert_eq!(shared.update_u64(gpa(1), 9, 10), Ok(Update::Changed));
    assert_eq!(smm.update_u32(gpa(3), 0, 1), Ok(Update::ReadOnly));
    assert_eq!((smm.read_u32(gpa(1)), shared.read_u32(gpa(1))), (Ok(9), Ok(0x0807_0605)));
}
