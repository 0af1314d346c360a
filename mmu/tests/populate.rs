//! Population ahead of faults: what it maps is what read faults would, at once and beside everything else.
mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use mmu::{
    AccessKind, CpuId, FaultOutcome, Gfn, GfnRange, LogBy, PageSize, PopulateProgress, Slot, SlotFlags,
    Sweep, TableCache,
};
use support::blocks::MOVE;
use support::hardware::Found;
use support::machines::{on_every_machine, Host, Machine, HOST};
use support::tables::interfere;
use support::vm::{gpa, range, Vm, CPU, GIB, RW};

on_every_machine! {
    populated_pages_are_those_that_read_faults_map,
    pages_that_are_mapped_stay_as_they_are,
    batches_are_bounded_and_go_on_where_they_stopped,
    too_few_tables_change_nothing,
    what_is_in_the_way_is_said,
    e1_nothing_is_populated_under_an_invalidation,
    h1_a_populated_page_is_not_logged_and_its_first_write_is,
    d6_tracked_pages_are_populated_write_protected,
    huge_pages_are_populated_without_execution_where_that_is_forbidden,
    a_note_of_device_memory_gives_way,
    a_lost_race_for_a_table_leaves_nothing_in_the_cache,
    a_lost_race_for_an_entry_goes_on_behind_it,
    a_table_that_is_taken_away_is_not_filled,
    populate_beside_populate_zap_and_reclaim,
}

/// Populates until the range is done or something is in the way.
fn populate<M: Machine>(vm: &Vm<M>, start: u64, pages: u64) -> PopulateProgress {
    let (mut left, mut cache) = (range(start, pages), TableCache::new());
    let progress = loop {
        vm.tables.fill(&mut cache);
        let progress = vm.kind.populate(&vm.memory.shared(CPU), &mut cache, vm.kind.root(), &mut left);
        match progress {
            PopulateProgress::NeedTables => assert!(cache.missing() > 0),
            PopulateProgress::Batch if !left.is_empty() => {}
            _ => break progress,
        }
    };
    vm.tables.drain(&mut cache);
    progress
}

fn leaves<M: Machine>(vm: &Vm<M>) -> Vec<Found> {
    let mut found = vec![];
    vm.walker().check(&mut |leaf| found.push(*leaf));
    found
}

type Slots = [(u64, u64, SlotFlags, u64)];

fn populated_pages_are_those_that_read_faults_map<M: Machine>(machine: M) {
    let odd = GIB - 1024 - 5;
    let worlds: [&Slots; 5] = [
        &[(0, 2048, RW, 0x1_0000)],
        &[(odd, GIB + 1024 + 600, RW, 8 * GIB + odd)],
        // Less aligned than granted: in 2 MiB, and in 4 KiB.
        &[(0, GIB, RW, 8 * GIB + 512)],
        &[(0, 4096, RW, 8 * GIB + 3)],
        // Neighbours, one of them read-only.
        &[(7, 1500, RW, 0x1_0007), (1507, 2000, SlotFlags::READ_ONLY, 0x2_0003)],
    ];
    for slots in worlds {
        for largest in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
            if slots[0].1 >= GIB && largest == PageSize::Size4K {
                continue;
            }
            let one = Vm::new(machine, slots);
            let mut other = Vm::new(machine, slots);
            for vm in [&one, &other] {
                vm.memory.backing().set_largest(largest);
            }
            for &(start, pages, ..) in slots {
                assert_eq!(populate(&one, start, pages), PopulateProgress::Batch);
                let mut gfn = start;
                while gfn < start + pages {
                    let _ = other.fault(gfn, AccessKind::Read);
                    let hit = other.walker().walk(gfn, false, false).expect("mapped");
                    gfn = hit.first + hit.pages;
                }
            }
            assert_eq!(leaves(&one), leaves(&other), "{slots:x?} {largest:?}");
            assert_eq!(one.check(), other.check());
            one.finish();
            other.finish();
        }
    }
}

fn pages_that_are_mapped_stay_as_they_are<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 4 * 512, RW, 0x10_0000)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    vm.map(700);
    vm.run(Sweep::over(range(700, 1)), |shared, sweep| vm.kind.write_protect(shared, sweep));
    vm.memory.backing().set_largest(PageSize::Size2M);
    vm.map(512 * 3 + 5);
    assert_eq!(populate(&vm, 0, 4 * 512), PopulateProgress::Batch);
    assert_eq!(vm.hit(700), None, "still protected");
    assert_eq!(vm.hit(701), Some((0x10_0000 + 701, 1)), "beside it, by the table that was there");
    assert_eq!(vm.check().leaves, [512, 3, 0]);
    // Once more changes nothing.
    let before = leaves(&vm);
    assert_eq!(populate(&vm, 0, 4 * 512), PopulateProgress::Batch);
    assert_eq!(leaves(&vm), before);
    vm.finish();
}

fn batches_are_bounded_and_go_on_where_they_stopped<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    // Tables for all first, so that nothing else ends a batch.
    for gfn in (0..GIB / 8).step_by(512) {
        vm.map(gfn);
    }
    let (mut left, mut batches) = (range(0, GIB / 8), 0);
    while !left.is_empty() {
        let before = left;
        let root = vm.kind.root();
        let progress = vm.kind.populate(&vm.memory.shared(CPU), &mut vm.cache, root, &mut left);
        assert_eq!(progress, PopulateProgress::Batch);
        let done = left.start() - before.start();
        assert!(left.end() == before.end() && (1..=4096 + 512).contains(&done), "{done}");
        batches += 1;
    }
    assert!(batches >= GIB / 8 / (4096 + 512), "{batches}");
    assert_eq!(vm.check().leaves, [GIB / 8, 0, 0]);
    vm.finish();
}

fn too_few_tables_change_nothing<M: Machine>(machine: M) {
    for have in 0..4 {
        let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
        vm.memory.backing().set_largest(PageSize::Size4K);
        vm.tables.drain(&mut vm.cache);
        for _ in 0..have {
            vm.cache.push(vm.tables.allocate()).unwrap();
        }
        let mut left = range(100, 2000);
        let root = vm.kind.root();
        let progress = vm.kind.populate(&vm.memory.shared(CPU), &mut vm.cache, root, &mut left);
        assert_eq!(progress, PopulateProgress::NeedTables);
        let (next, tables, leaves) = if have == 3 { (512, 4, 412) } else { (100, 1, 0) };
        assert_eq!((left.start(), left.end()), (next, 2100));
        let counts = vm.check();
        assert_eq!((counts.tables, counts.leaves), (tables, [leaves, 0, 0]));
        assert_eq!(populate(&vm, 100, 2000), PopulateProgress::Batch);
        assert_eq!(vm.check().leaves, [2000, 0, 0]);
        vm.finish();
    }
}

fn what_is_in_the_way_is_said<M: Machine>(machine: M) {
    let mut vm = Vm::new(
        machine.on(Host { largest: PageSize::Size4K, ..HOST }),
        &[(0, 20, RW, 0x1000), (30, 10, RW, 0x2000)],
    );
    assert_eq!(populate(&vm, 0, 40), PopulateProgress::NotRam(gpa(20)));
    assert_eq!(vm.check().leaves, [20, 0, 0]);
    assert_eq!(populate(&vm, 30, 20), PopulateProgress::NotRam(gpa(40)));
    assert_eq!(vm.check().leaves, [30, 0, 0]);
    assert_eq!(populate(&vm, 1 << 34, 1), PopulateProgress::OutOfRange(gpa(1 << 34)));
    assert_eq!(populate(&vm, 5, 0), PopulateProgress::Batch, "nothing is soon done");
    vm.zap(0, 40);
    vm.memory.backing().refuse(1);
    assert_eq!(populate(&vm, 0, 20), PopulateProgress::Retry);
    assert_eq!(vm.check().leaves, [0; 3]);
    // An obsolete root is populated no more.
    let old = vm.kind.root();
    let page = vm.tables.allocate();
    drop(vm.kind.invalidate_all(&mut vm.memory.exclusive(CPU), page).unwrap());
    let mut left = range(0, 20);
    let progress = vm.kind.populate(&vm.memory.shared(CPU), &mut vm.cache, old, &mut left);
    assert_eq!((progress, left), (PopulateProgress::Retry, range(0, 20)));
    vm.run(Sweep::over(GfnRange::ALL), |shared, sweep| vm.kind.zap_obsolete(shared, sweep));
    vm.reclaim();
    vm.finish();
}

fn e1_nothing_is_populated_under_an_invalidation<M: Machine>(machine: M) {
    let vm = Vm::new(machine, &[(0, 4 * 512, RW, 0x10_0000)]);
    let invalidation = vm.memory.exclusive(CPU).begin_invalidation(range(1024, 512));
    assert_eq!(populate(&vm, 0, 4 * 512), PopulateProgress::Retry);
    assert_eq!(vm.check().leaves, [1024, 0, 0], "up to there, in small pages");
    assert_eq!(populate(&vm, 1536, 512), PopulateProgress::Batch, "and behind");
    vm.memory.backing().move_block(1024);
    drop(invalidation);
    assert_eq!(populate(&vm, 0, 4 * 512), PopulateProgress::Batch);
    assert_eq!(vm.hit(1030), Some((0x10_0000 + MOVE + 1030, 512)));
    assert_eq!(vm.check().leaves, [1536, 1, 0]);
    vm.finish();
}

fn h1_a_populated_page_is_not_logged_and_its_first_write_is<M: Machine>(machine: M) {
    for by in [LogBy::WriteProtection, LogBy::DirtyBits] {
        let mut vm = Vm::new(machine, &[(0, 1024, RW, 0x10_0000)]);
        let sweep = vm.memory.exclusive(CPU).start_dirty_log(Gfn::default(), by).unwrap();
        vm.run(sweep, |shared, sweep| vm.kind.rearm(shared, sweep));
        assert_eq!(populate(&vm, 0, 1024), PopulateProgress::Batch);
        assert_eq!(vm.check().leaves, [1024, 0, 0], "H4: a log is by 4 KiB");
        vm.run(Sweep::over(range(0, 1024)), |shared, sweep| vm.kind.collect_dirty(shared, sweep));
        assert_eq!(vm.harvest(0), []);
        let (_, dirty) = vm.machine.flags();
        if by == LogBy::WriteProtection || dirty == 0 {
            assert_eq!(vm.hit(600), None, "the write is noticed by its fault");
            assert_eq!(vm.fault(600, AccessKind::Write), FaultOutcome::Mapped);
        } else {
            assert_eq!(vm.leaf(600).map(|leaf| leaf.dirty), Some(false), "the write is noticed by D");
            assert!(vm.hit(600).is_some(), "which the walk sets");
            vm.run(Sweep::over(range(0, 1024)), |shared, sweep| vm.kind.collect_dirty(shared, sweep));
        }
        assert_eq!(vm.harvest(0), [600]);
        vm.finish();
    }
}

fn d6_tracked_pages_are_populated_write_protected<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 2048, RW, 0x10_0000)]);
    for gfn in [600, 601] {
        let mut exclusive = vm.memory.exclusive(CPU);
        let mut sweep = exclusive.track_writes(Gfn::new_truncate(gfn)).unwrap();
        while !sweep.is_done() {
            drop(vm.kind.track(&exclusive, &mut sweep));
        }
    }
    assert_eq!(populate(&vm, 0, 2048), PopulateProgress::Batch);
    assert_eq!(vm.check().leaves, [512, 3, 0], "no huge page with a tracked page in it");
    let (tracked, free) = (vm.leaf(600).unwrap(), vm.leaf(599).unwrap());
    assert!(!tracked.rights.write && !tracked.mmu_writable && tracked.host_writable);
    assert!(free.rights.write && vm.hit(602).is_some());
    assert_eq!(vm.fault(601, AccessKind::Write), FaultOutcome::WriteTracked(gpa(601)));
    vm.finish();
}

fn huge_pages_are_populated_without_execution_where_that_is_forbidden<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 1024 + 100, RW, 0x10_0000)]);
    let Some(sweep) = vm.kind.forbid_huge_execute(&mut vm.memory.exclusive(CPU), true) else { return };
    vm.run(sweep, |shared, sweep| vm.kind.zap(shared, sweep));
    assert_eq!(populate(&vm, 0, 1024 + 100), PopulateProgress::Batch);
    assert_eq!(vm.check().leaves, [100, 2, 0]);
    assert_eq!(vm.leaf(5).unwrap().rights.execute, [false; 2], "huge");
    assert_eq!(vm.leaf(1030).unwrap().rights.execute, [true; 2], "small");
    assert_eq!(vm.fault(5, AccessKind::Execute), FaultOutcome::Mapped);
    assert_eq!(populate(&vm, 0, 512), PopulateProgress::Batch);
    assert!(vm.leaf(5).unwrap().rights.execute[0] && vm.leaf(6).unwrap().pages == 1);
    vm.finish();
}

fn a_note_of_device_memory_gives_way<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 100, RW, 0x10_0000)]);
    vm.kind.cache_mmio(&vm.memory.shared(CPU));
    vm.map(0);
    for gfn in [300, 301, 5000] {
        assert_eq!(vm.fault(gfn, AccessKind::Read), FaultOutcome::Mmio(gpa(gfn)));
    }
    let slot = Slot::new(range(256, 8192), RW, 0x20_0100);
    vm.memory.exclusive(CPU).insert_slot(&slot).unwrap();
    assert_eq!(populate(&vm, 256, 8192), PopulateProgress::Batch);
    assert_eq!(vm.hit(301), Some((0x20_0100 + 45, 1)));
    assert_eq!(vm.hit(5000).map(|(pfn, _)| pfn), Some(0x20_0100 + 5000 - 256));
    vm.finish();
}

/// A VM that another CPU, which comes at the worst moment, shares.
fn shared_vm<M: Machine>(machine: M) -> &'static mut Vm<M> {
    let vm = Box::leak(Box::new(Vm::new(machine, &[(0, GIB, RW, 8 * GIB)])));
    vm.memory.backing().set_largest(PageSize::Size4K);
    vm
}

/// What the other CPU does: maps a page.
fn map_from_another_cpu<M: Machine>(vm: &Vm<M>, gfn: u64) {
    let mut cache = TableCache::new();
    vm.tables.fill(&mut cache);
    let shared = vm.memory.shared(CpuId::new(1).unwrap());
    let outcome = vm.kind.fault(&shared, &mut cache, gpa(gfn), AccessKind::Write);
    assert_eq!(outcome, FaultOutcome::Mapped);
    drop(shared);
    vm.tables.drain(&mut cache);
}

/// One batch with a cache of its own, which is drained afterwards: a page that is allocated again must be empty.
fn populate_once<M: Machine>(vm: &Vm<M>, left: &mut GfnRange) -> PopulateProgress {
    let mut cache = TableCache::new();
    vm.tables.fill(&mut cache);
    let progress = vm.kind.populate(&vm.memory.shared(CPU), &mut cache, vm.kind.root(), left);
    vm.tables.drain(&mut cache);
    vm.tables.fill(&mut cache);
    vm.tables.drain(&mut cache);
    progress
}

fn a_lost_race_for_a_table_leaves_nothing_in_the_cache<M: Machine>(machine: M) {
    let vm: &'static Vm<M> = shared_vm(machine);
    interfere(move || map_from_another_cpu(vm, 9));
    let mut left = range(0, 512);
    assert_eq!(populate_once(vm, &mut left), PopulateProgress::Batch);
    let counts = vm.check();
    assert!(left.is_empty() && counts.tables == 4 && counts.leaves == [512, 0, 0], "{left:?} {counts:?}");
}

fn a_lost_race_for_an_entry_goes_on_behind_it<M: Machine>(machine: M) {
    let vm: &'static Vm<M> = shared_vm(machine);
    map_from_another_cpu(vm, 100);
    for first in [0, 200] {
        interfere(move || map_from_another_cpu(vm, first));
        let mut left = range(first, 50);
        assert_eq!(populate_once(vm, &mut left), PopulateProgress::Batch);
        assert!(left.is_empty());
    }
    assert_eq!(vm.check().leaves, [101, 0, 0]);
}

/// The table is unlinked and frozen while it is being filled: nothing is put there, and the pages get another.
fn a_table_that_is_taken_away_is_not_filled<M: Machine>(machine: M) {
    let vm: &'static Vm<M> = shared_vm(machine);
    map_from_another_cpu(vm, 100);
    interfere(move || vm.zap(0, 512));
    let mut left = range(0, 512);
    assert_eq!(populate_once(vm, &mut left), PopulateProgress::Batch);
    assert!(left.is_empty());
    assert_eq!(vm.check().leaves, [512, 0, 0]);
    assert_eq!(vm.reclaim(), 1);
}

/// Real threads: nothing is lost, nothing freed too early, nothing mapped twice.
fn populate_beside_populate_zap_and_reclaim<M: Machine>(machine: M) {
    const PAGES: u64 = 8 * 512;
    let vm = Vm::new(machine, &[(0, PAGES, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    let done = AtomicBool::new(false);
    let populate = |cpu: usize| {
        let cpu = CpuId::new(cpu).unwrap();
        let mut cache = TableCache::new();
        let mut left = range(0, PAGES);
        while !left.is_empty() {
            vm.tables.fill(&mut cache);
            let shared = vm.memory.shared(cpu);
            let progress = vm.kind.populate(&shared, &mut cache, vm.kind.root(), &mut left);
            assert!(!matches!(progress, PopulateProgress::NotRam(_) | PopulateProgress::OutOfRange(_)));
        }
        vm.tables.drain(&mut cache);
    };
    std::thread::scope(|scope| {
        let populating: Vec<_> =
            (0..2).map(|cpu| scope.spawn(move || (0..30).for_each(|_| populate(cpu)))).collect();
        scope.spawn(|| {
            let mut turn = 0;
            while !done.load(Ordering::SeqCst) {
                turn += 1;
                let (start, pages) = [(0, PAGES), (512, 512), (1000, 1000)][turn % 3];
                let mut sweep = Sweep::over(range(start, pages));
                while !sweep.is_done() {
                    drop(vm.kind.zap(&vm.memory.shared(CpuId::new(2).unwrap()), &mut sweep));
                }
                vm.reclaim();
            }
        });
        for thread in populating {
            thread.join().unwrap();
        }
        done.store(true, Ordering::SeqCst);
    });
    populate(0);
    assert_eq!(vm.check().leaves, [PAGES, 0, 0]);
    assert!(leaves(&vm).iter().all(|leaf| leaf.pfn == 8 * GIB + leaf.gfn));
    vm.reclaim();
    vm.finish();
}
