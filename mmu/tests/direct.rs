//! The direct kind, case by case.
mod support;

use mmu::{
    AccessKind, CpuId, DirectMmu, FaultOutcome, Gfn, LogBy, PageCounts, PageSize, Slot, SlotFlags,
    SplitProgress, Sweep, TableCache, TagFlush, VmMemory,
};
use support::blocks::{after_resolve, Blocks, MOVE};
use support::hardware::Walker;
use support::machines::{on_every_machine, Host, Machine, AMD, HOST};
use support::tables::{interfere, interfere_after_loads, HostTables};
use support::vm::{gpa, mmu_of, range, Vm, CPU, GIB, RW};

on_every_machine! {
    every_outcome_is_reported_and_counted,
    the_page_size_follows_from_alignment_slot_and_backing,
    a_block_that_is_less_aligned_than_granted_is_mapped_in_small_pages,
    the_format_and_the_kind_limit_the_page_size,
    five_levels_map_what_four_cannot_reach,
    too_few_tables_change_nothing,
    write_protection_is_lifted_by_the_next_write,
    zap_takes_what_it_covers_and_gives_the_tables_back,
    zapping_part_of_a_huge_page_takes_all_of_it,
    long_sweeps_come_in_batches,
    b7_split_keeps_every_translation,
    a_split_without_tables_stops_and_goes_on,
    c3_tables_come_back_only_after_every_cpu_acknowledged,
    a_walk_under_way_holds_tables_back,
    a_dropped_flush_is_sticky,
    joined_obligations_cost_one_generation_and_keep_all_pages,
    e1_a_resolution_does_not_survive_an_invalidation,
    e1_no_page_reaches_into_an_invalidation,
    e1_the_moment_of_a_resolution_is_before_it,
    e6_a_fault_puts_nothing_into_a_table_that_was_taken_out,
    cve_2026_23401_mmio_where_a_slot_was,
    d8_a_leaf_that_disagrees_with_its_slot_is_zapped_not_changed,
    a_lost_race_leaves_nothing_in_the_cache,
    a_split_that_loses_a_race_leaves_nothing_in_the_cache,
    phys_tables_over_real_memory,
}

fn every_outcome_is_reported_and_counted<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 1024, RW, 0x1_0000), (2048, 16, SlotFlags::READ_ONLY, 0x2_0000)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    assert_eq!(vm.fault(5, AccessKind::Read), FaultOutcome::Mapped);
    assert_eq!(vm.fault(5, AccessKind::Write), FaultOutcome::Spurious, "mapped writable at once");
    assert_eq!(vm.fault(1024, AccessKind::Read), FaultOutcome::Mmio(gpa(1024)));
    assert_eq!(vm.fault(2050, AccessKind::Write), FaultOutcome::ReadOnly(gpa(2050)));
    assert_eq!(vm.fault(2050, AccessKind::Execute), FaultOutcome::Mapped);
    assert_eq!(vm.hit(2050), None);
    assert_eq!(vm.walker().walk(2050, false, true).unwrap().pfn, 0x2_0002);
    assert_eq!(vm.fault(1 << 34, AccessKind::Read), FaultOutcome::OutOfRange(gpa(1 << 34)));
    assert_eq!(vm.fault((1 << 34) - 1, AccessKind::Read), FaultOutcome::Mmio(gpa((1 << 34) - 1)));
    vm.memory.backing().refuse(1);
    assert_eq!(vm.fault(6, AccessKind::Read), FaultOutcome::Retry);
    vm.tables.drain(&mut vm.cache);
    let cold = vm.kind.fault(&vm.memory.shared(CPU), &mut vm.cache, gpa(600), AccessKind::Read);
    assert_eq!(cold, FaultOutcome::NeedTables);
    let stats = *vm.cache.stats();
    assert_eq!((stats.mapped, stats.spurious, stats.mmio, stats.read_only), (2, 1, 2, 1));
    assert_eq!((stats.retry, stats.need_tables, stats.out_of_range), (1, 1, 1));
    vm.finish();
}

fn the_page_size_follows_from_alignment_slot_and_backing<M: Machine>(machine: M) {
    // The slot starts in the middle of a gigabyte and of a 2 MiB block, and ends so too.
    let start = GIB - 1024 - 5;
    let mut vm = Vm::new(machine, &[(start, 2 * GIB, RW, 8 * GIB + start)]);
    vm.map(start);
    assert_eq!(vm.hit(start), Some((8 * GIB + start, 1)), "the head of its block is outside the slot");
    vm.map(GIB - 1024);
    assert_eq!(vm.hit(GIB - 1023), Some((9 * GIB - 1023, 512)));
    vm.map(GIB + 77);
    assert_eq!(vm.hit(2 * GIB - 1), Some((10 * GIB - 1, GIB)));
    vm.map(start + 2 * GIB - 1);
    assert_eq!(vm.hit(start + 2 * GIB - 1).unwrap().1, 1, "the tail of its block is outside the slot");
    assert_eq!(vm.check().leaves, [2, 1, 1]);
    vm.finish();
}

fn a_block_that_is_less_aligned_than_granted_is_mapped_in_small_pages<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB + 512), (4 * GIB, GIB, RW, 16 * GIB + 3)]);
    vm.map(700);
    assert_eq!(vm.hit(700), Some((8 * GIB + 512 + 700, 512)));
    vm.map(4 * GIB + 700);
    assert_eq!(vm.hit(4 * GIB + 700), Some((16 * GIB + 3 + 700, 1)));
    vm.finish();
}

fn the_format_and_the_kind_limit_the_page_size<M: Machine>(machine: M) {
    for largest in [PageSize::Size4K, PageSize::Size2M] {
        let mut vm = Vm::new(machine.on(Host { largest, ..HOST }), &[(0, GIB, RW, 8 * GIB)]);
        assert_eq!(vm.kind.largest(), largest);
        vm.map(1000);
        assert_eq!(vm.hit(1000), Some((8 * GIB + 1000, largest.pages())));
        vm.finish();
    }
}

fn five_levels_map_what_four_cannot_reach<M: Machine>(machine: M) {
    let far = 1 << 38;
    let slots = [(far, 512, RW, 0x4_0000)];
    for (five_level, outcome) in
        [(false, FaultOutcome::OutOfRange(gpa(far + 3))), (true, FaultOutcome::Mapped)]
    {
        let memory = VmMemory::new(Blocks::default());
        let (start, pages, flags, cookie) = slots[0];
        memory.exclusive(CPU).insert_slot(&Slot::new(range(start, pages), flags, cookie)).unwrap();
        let tables = HostTables::new(16);
        let machine = machine.on(Host { five_level, max_phys_addr: 52, ..HOST });
        let format = machine.format();
        let kind = DirectMmu::new(&memory, format, tables.clone(), tables.allocate(), 52, PageSize::Size1G);
        let mut cache = TableCache::new();
        tables.fill(&mut cache);
        assert_eq!(kind.fault(&memory.shared(CPU), &mut cache, gpa(far + 3), AccessKind::Write), outcome);
        if five_level {
            let root = kind.root().hpa.pfn().number();
            let walker = Walker { tables: &tables, root, machine };
            assert_eq!(walker.walk(far + 3, true, true).unwrap().pfn, 0x4_0003);
        }
        tables.drain(&mut cache);
        kind.dismantle(|page| tables.release(page));
        assert_eq!(tables.in_use(), 0);
    }
}

/// Whatever the cache lacks, nothing is half done: the fault succeeds with exactly the tables it needs, or changes nothing.
fn too_few_tables_change_nothing<M: Machine>(machine: M) {
    for have in 0..4 {
        let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
        vm.memory.backing().set_largest(PageSize::Size4K);
        vm.tables.drain(&mut vm.cache);
        for _ in 0..have {
            vm.cache.push(vm.tables.allocate()).unwrap();
        }
        let outcome = vm.kind.fault(&vm.memory.shared(CPU), &mut vm.cache, gpa(1), AccessKind::Read);
        if have < 3 {
            assert_eq!(outcome, FaultOutcome::NeedTables);
            assert_eq!(vm.cache.missing(), 4 - have);
            assert_eq!(vm.check(), PageCounts { leaves: [0; 3], tables: 1 });
        } else {
            assert_eq!(outcome, FaultOutcome::Mapped);
            assert_eq!(vm.cache.missing(), 4);
            assert_eq!(vm.check(), PageCounts { leaves: [1, 0, 0], tables: 4 });
        }
        vm.finish();
    }
}

fn write_protection_is_lifted_by_the_next_write<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    (0..20).for_each(|gfn| vm.map(gfn));
    let mut sweep = Sweep::over(range(5, 10));
    let flush = vm.kind.write_protect(&vm.memory.shared(CPU), &mut sweep);
    assert!(sweep.is_done() && flush.is_needed());
    drop(flush);
    assert_eq!(vm.hit(7), None);
    assert!(vm.walker().walk(7, false, true).is_some() && vm.hit(4).is_some() && vm.hit(15).is_some());
    assert_eq!(vm.fault(7, AccessKind::Read), FaultOutcome::Spurious);
    assert_eq!(vm.fault(7, AccessKind::Write), FaultOutcome::Mapped);
    assert_eq!(vm.hit(7), Some((8 * GIB + 7, 1)));
    let flush = vm.kind.write_protect(&vm.memory.shared(CPU), &mut Sweep::over(range(5, 2)));
    assert!(!flush.is_needed(), "they were protected already");
    drop(flush);
    let flush = vm.kind.write_unprotect(&vm.memory.shared(CPU), &mut Sweep::over(range(0, 100)));
    assert!(!flush.is_needed(), "C1: an upgrade needs no flush");
    drop(flush);
    (0..20).for_each(|gfn| assert!(vm.hit(gfn).is_some()));
    vm.finish();
}

fn zap_takes_what_it_covers_and_gives_the_tables_back<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 4 * GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    for gfn in [0, 1, 511, 512, 1023, 1024, GIB, 2 * GIB - 1, 2 * GIB] {
        vm.map(gfn);
    }
    let before = vm.check();
    vm.zap(1, 1023);
    for (gfn, there) in [(0, true), (1, false), (511, false), (512, false), (1023, false), (1024, true)] {
        assert_eq!(vm.hit(gfn).is_some(), there, "{gfn}");
    }
    assert_eq!(vm.check().tables, before.tables - 1, "only the table for 512..1024 is covered");
    vm.zap(GIB, GIB);
    assert_eq!(vm.hit(GIB), None);
    assert_eq!(vm.hit(2 * GIB).unwrap().0, 10 * GIB);
    assert_eq!(vm.reclaim(), 1 + 3, "two tables and their directory");
    vm.zap(0, 1 << 40);
    assert_eq!(vm.check(), PageCounts { leaves: [0; 3], tables: 1 });
    vm.finish();
}

fn zapping_part_of_a_huge_page_takes_all_of_it<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.map(0);
    vm.zap(1000, 1);
    assert_eq!(vm.hit(0), None);
    vm.map(0);
    vm.finish();
}

/// Long work runs in bounded batches, also when they end in the middle of a table.
fn long_sweeps_come_in_batches<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    (0..20_000).for_each(|gfn| vm.map(gfn));
    let mut sweep = Sweep::over(range(0, GIB));
    let mut batches = 0;
    while !sweep.is_done() {
        drop(vm.kind.write_protect(&vm.memory.shared(CPU), &mut sweep));
        batches += 1;
    }
    assert!((5..20).contains(&batches), "{batches}");
    assert!((0..20_000).all(|gfn| vm.hit(gfn).is_none()));
    let mut sweep = Sweep::over(range(0, GIB));
    let mut batches = 0;
    while !sweep.is_done() {
        drop(vm.kind.zap(&vm.memory.shared(CPU), &mut sweep));
        batches += 1;
        vm.check();
    }
    assert!(batches >= 5, "{batches}");
    assert_eq!(vm.check(), PageCounts { leaves: [0; 3], tables: 2 });
    vm.finish();
}

/// B7 (its first half): a split changes no translation, whatever the state of the huge page.
fn b7_split_keeps_every_translation<M: Machine>(machine: M) {
    for flags in [RW, SlotFlags::READ_ONLY] {
        let mut vm = Vm::new(machine, &[(0, GIB, flags, 8 * GIB)]);
        assert_eq!(vm.fault(1000, AccessKind::Read), FaultOutcome::Mapped);
        let before = vm.walker().walk(1000, false, true).unwrap();
        let dirty = vm.leaf(1000).unwrap().dirty;
        assert_eq!(before.pages, GIB);
        let mut sweep = Sweep::over(range(1000, 30));
        while !sweep.is_done() {
            let progress = vm.kind.split(&vm.memory.shared(CPU), &mut vm.cache, &mut sweep, PageSize::Size4K);
            if progress == SplitProgress::NeedTables {
                vm.tables.fill(&mut vm.cache);
            }
        }
        // Blocks 512..1024 and 1024..1536 in 4 KiB, the rest in 2 MiB.
        assert_eq!(vm.check().leaves, [1024, 510, 0]);
        for gfn in [0, 511, 512, 1000, 1535, 1536, GIB - 1] {
            let hit = vm.walker().walk(gfn, false, true).unwrap();
            assert_eq!(hit.pfn, 8 * GIB + gfn);
            assert_eq!((hit.writable, vm.leaf(gfn).unwrap().dirty), (before.writable, dirty));
            assert_eq!(hit.pages, if (512..1536).contains(&gfn) { 1 } else { 512 });
        }
        vm.finish();
    }
}

fn a_split_without_tables_stops_and_goes_on<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.map(0);
    vm.tables.drain(&mut vm.cache);
    let mut sweep = Sweep::over(range(0, GIB));
    let split = |vm: &mut Vm<M>, sweep: &mut Sweep| {
        vm.kind.split(&vm.memory.shared(CPU), &mut vm.cache, sweep, PageSize::Size2M)
    };
    assert_eq!(split(&mut vm, &mut sweep), SplitProgress::NeedTables);
    assert!(!sweep.is_done());
    vm.tables.fill(&mut vm.cache);
    while !sweep.is_done() {
        assert_eq!(split(&mut vm, &mut sweep), SplitProgress::Batch);
    }
    assert_eq!(vm.check(), PageCounts { leaves: [0, 512, 0], tables: 3 });
    vm.finish();
}

/// C3: a freed table stays table memory until the CPU that could have it cached has flushed.
fn c3_tables_come_back_only_after_every_cpu_acknowledged<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    vm.map(0);
    let (mut first, mut second) = (mmu_of(&vm), mmu_of(&vm));
    let other = CpuId::new(5).unwrap();
    let on_boot = first.enter(&vm.memory, CPU);
    let on_other = second.enter(&vm.memory, other);
    let issued = vm.kind.zap(&vm.memory.shared(CPU), &mut Sweep::over(range(0, GIB))).issue().unwrap();
    assert!(issued.kick.contains(CPU) && issued.kick.contains(other));
    assert_eq!(issued.kick.iter().count(), 2);
    assert_eq!(vm.reclaim(), 0);
    drop(on_boot);
    assert_eq!(vm.reclaim(), 0);
    assert!(!vm.memory.shootdown().is_acknowledged(issued.generation));
    drop(on_other);
    let again = second.enter(&vm.memory, other);
    assert_eq!(again.flush(), TagFlush::All);
    assert_eq!(vm.reclaim(), 2);
    drop(again);
    vm.finish();
}

/// A walk that is under way holds the pages back as a guest does; without that, the walk would read a page of another use.
fn a_walk_under_way_holds_tables_back<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    vm.map(0);
    let walk = vm.memory.shared(CpuId::new(3).unwrap());
    vm.zap(0, GIB);
    assert_eq!(vm.reclaim(), 0);
    drop(walk);
    assert_eq!(vm.reclaim(), 2);
    vm.finish();
}

/// Decision 3: a dropped obligation is not lost. The next entry flushes, and then the pages come back.
fn a_dropped_flush_is_sticky<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    let mut mmu = mmu_of(&vm);
    vm.map(0);
    drop(mmu.enter(&vm.memory, CPU));
    assert_eq!(mmu.enter(&vm.memory, CPU).flush(), TagFlush::None);
    drop(vm.kind.zap(&vm.memory.shared(CPU), &mut Sweep::over(range(0, 1))));
    assert_eq!(mmu.enter(&vm.memory, CPU).flush(), TagFlush::All);
    assert_eq!(mmu.enter(&vm.memory, CPU).flush(), TagFlush::None);
    vm.finish();
}

fn joined_obligations_cost_one_generation_and_keep_all_pages<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 4 * GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size4K);
    [0, GIB, 2 * GIB].into_iter().for_each(|gfn| vm.map(gfn));
    let before = vm.memory.shootdown().requested();
    let shared = vm.memory.shared(CPU);
    let zap = |gfn| vm.kind.zap(&shared, &mut Sweep::over(range(gfn, GIB)));
    let flush = zap(0).join(zap(GIB)).join(zap(3 * GIB)).join(zap(2 * GIB));
    drop(shared);
    let issued = flush.issue().unwrap();
    assert!(issued.kick.is_empty());
    assert!(before < issued.generation && vm.memory.shootdown().requested() == issued.generation);
    assert_eq!(vm.kind.reclaim(&vm.memory, 4, |page| vm.tables.release(page)), 4, "as many as asked for");
    assert_eq!(vm.reclaim(), 2);
    // One that asks for nothing takes over what the other asks for.
    vm.map(0);
    let shared = vm.memory.shared(CPU);
    let nothing = vm.kind.zap(&shared, &mut Sweep::over(range(GIB, 1)));
    assert!(nothing.join(vm.kind.zap(&shared, &mut Sweep::over(range(0, 1)))).issue().is_some());
    drop(shared);
    vm.finish();
}

/// E1: what was resolved before the backing changed is not mapped afterwards, also when guards came and went.
fn e1_a_resolution_does_not_survive_an_invalidation<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    vm.memory.backing().set_largest(PageSize::Size2M);
    let mut cache = core::mem::take(&mut vm.cache);
    let resolve = |vm: &Vm<M>| vm.kind.resolve(&vm.memory.shared(CPU), gpa(700), AccessKind::Write).unwrap();
    let install =
        |cache: &mut TableCache, resolution| vm.kind.install(&vm.memory.shared(CPU), cache, &resolution);
    let before = resolve(&vm);
    let invalidation = vm.memory.exclusive(CPU).begin_invalidation(range(512, 512));
    assert_eq!(install(&mut cache, before), FaultOutcome::Retry);
    let during = resolve(&vm);
    assert_eq!(install(&mut cache, during), FaultOutcome::Retry);
    let during = resolve(&vm);
    vm.memory.backing().move_block(700);
    drop(invalidation);
    assert_eq!(install(&mut cache, during), FaultOutcome::Retry);
    let after = resolve(&vm);
    assert_eq!(install(&mut cache, after), FaultOutcome::Mapped);
    assert_eq!(vm.hit(700), Some((8 * GIB + 700 + MOVE, 512)));
    vm.cache = cache;
    vm.finish();
}

/// E1: a huge page around a block that is being taken away would map that, too. The pages beside it go on, small.
fn e1_no_page_reaches_into_an_invalidation<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB)]);
    let mut cache = core::mem::take(&mut vm.cache);
    let before = vm.kind.resolve(&vm.memory.shared(CPU), gpa(5), AccessKind::Write).unwrap();
    let invalidation = vm.memory.exclusive(CPU).begin_invalidation(range(700, 1));
    assert_eq!(vm.kind.install(&vm.memory.shared(CPU), &mut cache, &before), FaultOutcome::Retry);
    let outcome = vm.kind.fault(&vm.memory.shared(CPU), &mut cache, gpa(699), AccessKind::Write);
    assert_eq!(outcome, FaultOutcome::Mapped);
    assert_eq!((vm.hit(699), vm.hit(700)), (Some((8 * GIB + 699, 1)), None));
    drop(invalidation);
    vm.cache = cache;
    vm.finish();
}

/// E1: an invalidation ends, and the memory moves, while the backing answers with what it was.
fn e1_the_moment_of_a_resolution_is_before_it<M: Machine>(machine: M) {
    let vm: &'static mut Vm<M> = Box::leak(Box::new(Vm::new(machine, &[(0, GIB, RW, 8 * GIB)])));
    let mut cache = core::mem::take(&mut vm.cache);
    let vm: &'static Vm<M> = vm;
    let invalidation = vm.memory.exclusive(CPU).begin_invalidation(range(512, 512));
    after_resolve(move || {
        vm.memory.backing().move_block(700);
        drop(invalidation);
    });
    let mut fault = || vm.kind.fault(&vm.memory.shared(CPU), &mut cache, gpa(700), AccessKind::Write);
    assert_eq!((fault(), vm.hit(700)), (FaultOutcome::Retry, None));
    assert_eq!(fault(), FaultOutcome::Mapped);
    assert_eq!(vm.hit(700).unwrap().0, 8 * GIB + 700 + MOVE);
}

/// E6: a table is taken out between a fault's look at the link and its look at the entry. The fault finds the entry frozen.
fn e6_a_fault_puts_nothing_into_a_table_that_was_taken_out<M: Machine>(machine: M) {
    let vm: &'static mut Vm<M> = Box::leak(Box::new(Vm::new(machine, &[(0, GIB, RW, 8 * GIB)])));
    vm.memory.backing().set_largest(PageSize::Size4K);
    // The first write to a page of a logged slot is not the hot path's, which looks once more.
    let _ = vm.memory.exclusive(CPU).start_dirty_log(Gfn::default(), LogBy::WriteProtection).unwrap();
    vm.map(3);
    let mut cache = core::mem::take(&mut vm.cache);
    let vm: &'static Vm<M> = vm;
    let levels = vm.machine.levels() as usize;
    interfere_after_loads(2 * levels - 1, move || vm.zap(0, 512));
    let mut fault = || vm.kind.fault(&vm.memory.shared(CPU), &mut cache, gpa(5), AccessKind::Write);
    assert_eq!((fault(), vm.hit(5)), (FaultOutcome::Retry, None));
    assert_eq!(vm.check().leaves, [0; 3]);
    assert_eq!(fault(), FaultOutcome::Mapped);
    assert_eq!((vm.check().leaves, vm.hit(5)), ([1, 0, 0], Some((8 * GIB + 5, 1))));
}

/// I2, I3: a slot that is taken away takes its mappings along, and what follows there is what the new slots say.
fn cve_2026_23401_mmio_where_a_slot_was<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, GIB, RW, 8 * GIB), (GIB, 512, RW, 32 * GIB)]);
    vm.map(GIB + 5);
    let resolution = vm.kind.resolve(&vm.memory.shared(CPU), gpa(GIB + 6), AccessKind::Write).unwrap();
    {
        let mut exclusive = vm.memory.exclusive(CPU);
        let mut sweep = exclusive.remove_slot(Gfn::new_truncate(GIB)).unwrap();
        while !sweep.is_done() {
            drop(vm.kind.zap(&exclusive, &mut sweep));
        }
    }
    assert_eq!(vm.hit(GIB + 5), None);
    assert_eq!(vm.kind.install(&vm.memory.shared(CPU), &mut vm.cache, &resolution), FaultOutcome::Retry);
    assert_eq!(vm.fault(GIB + 5, AccessKind::Read), FaultOutcome::Mmio(gpa(GIB + 5)));
    assert_eq!(vm.check(), PageCounts { leaves: [0; 3], tables: vm.check().tables });
    let slot = Slot::new(range(GIB, 512), SlotFlags::READ_ONLY, 64 * GIB);
    vm.memory.exclusive(CPU).insert_slot(&slot).unwrap();
    assert_eq!(vm.fault(GIB + 5, AccessKind::Read), FaultOutcome::Mapped);
    assert_eq!(vm.walker().walk(GIB + 5, false, false).unwrap().pfn, 64 * GIB + 5);
    vm.finish();
}

/// D8: a leaf never turns into one of another page. A leaf that disagrees with its slot goes away first, with a flush.
fn d8_a_leaf_that_disagrees_with_its_slot_is_zapped_not_changed<M: Machine>(machine: M) {
    let mut vm = Vm::new(machine, &[(0, 512, SlotFlags::READ_ONLY, 8 * GIB)]);
    assert_eq!(vm.fault(3, AccessKind::Read), FaultOutcome::Mapped);
    let sweep = vm.memory.exclusive(CPU).set_slot_flags(Gfn::default(), RW).unwrap();
    assert_eq!(sweep, Sweep::over(range(0, 512)));
    // The zap that the sweep asks for is left out: the fault notices.
    let before = vm.memory.shootdown().requested();
    assert_eq!(vm.fault(3, AccessKind::Write), FaultOutcome::Mapped);
    assert!(vm.memory.shootdown().requested() > before);
    assert_eq!(vm.hit(3), Some((8 * GIB + 3, 512)));
    vm.finish();
}

/// Another CPU maps a page of the same 1 GiB between this fault's look and its compare-exchange. What this fault had
/// prepared in its table pages does not stay there, to turn up at another address.
fn a_lost_race_leaves_nothing_in_the_cache<M: Machine>(machine: M) {
    let vm: &'static Vm<M> = Box::leak(Box::new(Vm::new(machine, &[(0, 2 * GIB, RW, 8 * GIB)])));
    vm.memory.backing().set_largest(PageSize::Size4K);
    let (mut mine, mut next) = (TableCache::new(), TableCache::new());
    vm.tables.fill(&mut mine);
    vm.tables.fill(&mut next);
    let fault = |cpu, cache: &mut TableCache, gfn| {
        vm.kind.fault(&vm.memory.shared(CpuId::new(cpu).unwrap()), cache, gpa(gfn), AccessKind::Write)
    };
    for (gfn, theirs) in [(3, 5), (GIB + 700, GIB + 700)] {
        interfere(move || {
            let mut cache = TableCache::new();
            vm.tables.fill(&mut cache);
            let shared = vm.memory.shared(CpuId::new(1).unwrap());
            assert_eq!(
                vm.kind.fault(&shared, &mut cache, gpa(theirs), AccessKind::Write),
                FaultOutcome::Mapped
            );
            drop(shared);
            vm.tables.drain(&mut cache);
        });
        let outcome = if gfn == theirs { FaultOutcome::Spurious } else { FaultOutcome::Mapped };
        assert_eq!(fault(0, &mut mine, gfn), outcome);
        vm.tables.drain(&mut mine);
        vm.tables.fill(&mut mine); // A page that is allocated again must be empty.
    }
    assert_eq!(fault(0, &mut next, 600), FaultOutcome::Mapped);
    let hits = [3, 5, 600, GIB + 700].map(|gfn| vm.hit(gfn));
    assert_eq!(hits, [3, 5, 600, GIB + 700].map(|gfn| Some((8 * GIB + gfn, 1))));
    assert_eq!(vm.check().leaves, [4, 0, 0]);
}

/// The same for a split: the huge page is zapped while its small pages are being prepared.
fn a_split_that_loses_a_race_leaves_nothing_in_the_cache<M: Machine>(machine: M) {
    let vm: &'static Vm<M> = Box::leak(Box::new(Vm::new(machine, &[(0, GIB, RW, 8 * GIB)])));
    let mut cache = TableCache::new();
    vm.tables.fill(&mut cache);
    let shared = vm.memory.shared(CPU);
    assert_eq!(vm.kind.fault(&shared, &mut cache, gpa(0), AccessKind::Write), FaultOutcome::Mapped);
    interfere(move || vm.zap(0, 1));
    let mut sweep = Sweep::over(range(0, GIB));
    while !sweep.is_done() {
        assert_eq!(vm.kind.split(&shared, &mut cache, &mut sweep, PageSize::Size4K), SplitProgress::Batch);
    }
    assert_eq!(vm.check().leaves, [0; 3]);
    vm.tables.drain(&mut cache);
    vm.tables.fill(&mut cache); // A page that is allocated again must be empty.
}

#[test]
#[should_panic(expected = "a guard of another VM")]
fn a_guard_of_another_vm_is_refused() {
    let vm = Vm::new(AMD, &[]);
    let other = Vm::new(AMD, &[]);
    drop(vm.kind.zap(&other.memory.shared(CPU), &mut Sweep::over(range(0, 1))));
}

/// The crate over real addresses: a "direct map" with offset zero over memory from the host's allocator.
#[allow(unsafe_code)] // This test is about the unsafe constructors.
fn phys_tables_over_real_memory<M: Machine>(machine: M) {
    use mmu::{Pfn, PhysTables, TablePage};
    use std::alloc::{alloc_zeroed, dealloc, Layout};

    let layout = Layout::from_size_align(4096, 4096).unwrap();
    let allocate = || {
        // SAFETY: the layout is not empty; the frame is fresh, zeroed, and given back only after the kind is gone.
        unsafe {
            TablePage::from_frame(Pfn::new(alloc_zeroed(layout).expose_provenance() as u64 >> 12).unwrap())
        }
    };
    let free = |page: TablePage| {
        let address = page.into_frame().hpa().bits() as usize;
        // SAFETY: it came from `allocate`.
        unsafe { dealloc(std::ptr::with_exposed_provenance_mut(address), layout) }
    };
    let memory = VmMemory::new(Blocks::default());
    memory.exclusive(CPU).insert_slot(&Slot::new(range(0, GIB), RW, 8 * GIB)).unwrap();
    memory.backing().set_largest(PageSize::Size4K);
    let format = machine.on(Host { max_phys_addr: 52, ..HOST }).format();
    // SAFETY: the frames are the addresses that the allocator gave.
    let tables = unsafe { PhysTables::new(0) };
    let kind = DirectMmu::new(&memory, format, tables, allocate(), 46, PageSize::Size1G);
    let mut cache = TableCache::new();
    // In the interpreter pages have their price.
    let pages = if cfg!(miri) { 1100 } else { 2000 };
    for gfn in 0..pages {
        while cache.missing() > 0 {
            cache.push(allocate()).unwrap();
        }
        let shared = memory.shared(CPU);
        assert_eq!(kind.fault(&shared, &mut cache, gpa(gfn), AccessKind::Write), FaultOutcome::Mapped);
    }
    assert_eq!(kind.page_counts(), PageCounts { leaves: [pages, 0, 0], tables: 1 + 2 + pages.div_ceil(512) });
    drop(kind.zap(&memory.shared(CPU), &mut Sweep::over(range(0, 1024))));
    assert_eq!(kind.reclaim(&memory, usize::MAX, free), 2);
    while let Some(page) = cache.pop() {
        free(page);
    }
    kind.dismantle(free);
}
