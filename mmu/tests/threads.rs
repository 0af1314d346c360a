//! The direct kind under real threads: faults beside faults, sweeps and reclamation.
mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Barrier;

use mmu::{
    AccessKind, CpuId, DirectMmu, FaultOutcome, Gfn, GfnRange, PageCounts, PageSize, Slot, SlotFlags, Sweep,
    TableCache, VmMemory,
};
use support::blocks::Blocks;
use support::hardware::Walker;
use support::machines::{on_every_machine, Machine};
use support::tables::HostTables;

const GIB: u64 = 1 << 18;

on_every_machine! {
    two_threads_populate_the_same_range,
    populate_against_zap_and_reclaim,
    slots_change_under_faulting_threads,
}

struct Vm<M: Machine> {
    machine: M,
    memory: VmMemory<Blocks>,
    kind: DirectMmu<M::Format, HostTables>,
    tables: HostTables,
}

impl<M: Machine> Vm<M> {
    fn new(machine: M, largest: PageSize) -> Self {
        let memory = VmMemory::new(Blocks::default());
        let range = GfnRange::new(Gfn::default(), 4 * GIB).unwrap();
        let slot = Slot::new(range, SlotFlags::empty(), 8 * GIB);
        memory.exclusive(CpuId::BOOT).insert_slot(&slot).unwrap();
        let tables = HostTables::new(2048);
        let kind = DirectMmu::new(&memory, machine.format(), tables.clone(), tables.allocate(), 46, largest);
        Self { machine, memory, kind, tables }
    }

    fn fault(&self, cpu: CpuId, cache: &mut TableCache, gfn: u64) -> FaultOutcome {
        self.tables.fill(cache);
        let gpa = Gfn::new_truncate(gfn).gpa();
        self.kind.fault(&self.memory.shared(cpu), cache, gpa, AccessKind::Write)
    }

    /// Tables, counters and pool agree; afterwards nothing is left.
    fn finish(self, mapped: impl Iterator<Item = u64>) -> PageCounts {
        let root = self.kind.root().hpa.pfn().number();
        let walker = Walker { tables: &self.tables, root, machine: self.machine };
        let tally = walker.check(&mut |leaf| assert_eq!(leaf.pfn, 8 * GIB + leaf.gfn));
        let counts = PageCounts { leaves: tally.leaves, tables: tally.tables };
        assert_eq!(self.kind.page_counts(), counts, "D4");
        for gfn in mapped {
            assert_eq!(walker.walk(gfn, true, true).expect("mapped").pfn, 8 * GIB + gfn);
        }
        self.kind.reclaim(&self.memory, usize::MAX, |page| self.tables.release(page));
        assert_eq!(self.tables.in_use() as u64, counts.tables, "no table page is lost");
        self.kind.dismantle(|page| self.tables.release(page));
        assert_eq!(self.tables.in_use(), 0);
        counts
    }
}

/// Two threads fault the same pages in the same order: one maps each page, the other finds it mapped.
fn two_threads_populate_the_same_range<M: Machine>(machine: M) {
    const PAGES: u64 = 8192;
    for largest in [PageSize::Size4K, PageSize::Size2M] {
        let vm = Vm::new(machine, largest);
        let start = Barrier::new(2);
        let (mapped, spurious) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for cpu in 0..2 {
                let (vm, start, mapped, spurious) = (&vm, &start, &mapped, &spurious);
                scope.spawn(move || {
                    let cpu = CpuId::new(cpu).unwrap();
                    let mut cache = TableCache::new();
                    start.wait();
                    for gfn in 0..PAGES {
                        while vm.fault(cpu, &mut cache, gfn) == FaultOutcome::Retry {}
                    }
                    mapped.fetch_add(cache.stats().mapped, Ordering::SeqCst);
                    spurious.fetch_add(cache.stats().spurious, Ordering::SeqCst);
                    vm.tables.drain(&mut cache);
                });
            }
        });
        let leaves = PAGES / largest.pages();
        assert_eq!(mapped.into_inner(), leaves, "each page is mapped once");
        assert_eq!(spurious.into_inner(), 2 * PAGES - leaves);
        let counts = vm.finish(0..PAGES);
        assert_eq!(counts.of(largest), leaves);
    }
}

/// Two threads fault while a third zaps, protects and reclaims: nothing is lost, nothing is freed too early (the table
/// memory stops at any entry of a page that was given back).
fn populate_against_zap_and_reclaim<M: Machine>(machine: M) {
    let vm = Vm::new(machine, PageSize::Size4K);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let faulters: Vec<_> = (0..2)
            .map(|number| {
                let vm = &vm;
                scope.spawn(move || {
                    let cpu = CpuId::new(number).unwrap();
                    let mut cache = TableCache::new();
                    let mut random = 0x9e37_79b9_7f4a_7c15u64 ^ number as u64;
                    for _ in 0..60_000 {
                        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let gfn = (random >> 33) % 4096 + (random >> 60 & 1) * GIB;
                        let outcome = vm.fault(cpu, &mut cache, gfn);
                        assert!(!matches!(outcome, FaultOutcome::NeedTables | FaultOutcome::Mmio(_)));
                    }
                    vm.tables.drain(&mut cache);
                })
            })
            .collect();
        let (vm, done) = (&vm, &done);
        scope.spawn(move || {
            let cpu = CpuId::new(2).unwrap();
            let mut turn = 0u64;
            while !done.load(Ordering::SeqCst) {
                turn += 1;
                let (start, pages) = [(0, 4 * GIB), (512, 512), (1000, 1000), (GIB, GIB)][turn as usize % 4];
                let mut sweep = Sweep::over(GfnRange::new(Gfn::new_truncate(start), pages).unwrap());
                while !sweep.is_done() {
                    let shared = vm.memory.shared(cpu);
                    drop(match turn % 3 {
                        0 => vm.kind.write_protect(&shared, &mut sweep),
                        _ => vm.kind.zap(&shared, &mut sweep),
                    });
                }
                vm.kind.reclaim(&vm.memory, usize::MAX, |page| vm.tables.release(page));
            }
        });
        for faulter in faulters {
            faulter.join().unwrap();
        }
        done.store(true, Ordering::SeqCst);
    });
    vm.finish(std::iter::empty());
}

/// The exclusive guard waits for the shared ones, and shared ones for it.
#[test]
fn the_exclusive_guard_excludes() {
    let memory = VmMemory::new(Blocks::default());
    let (first, second) = (CpuId::new(0).unwrap(), CpuId::new(1).unwrap());
    let moment = || std::thread::sleep(std::time::Duration::from_millis(50));
    let taken = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let shared = memory.shared(first);
        scope.spawn(|| {
            let exclusive = memory.exclusive(second);
            taken.store(true, Ordering::SeqCst);
            moment();
            taken.store(false, Ordering::SeqCst);
            drop(exclusive);
        });
        moment();
        assert!(!taken.load(Ordering::SeqCst), "taken beside a shared guard");
        drop(shared);
        while !taken.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        let shared = memory.shared(first);
        assert!(!taken.load(Ordering::SeqCst), "shared beside the exclusive one");
        drop(shared);
    });
}

/// The exclusive guard really is: slots come and go under faulting threads, and no fault sees a half-made change.
fn slots_change_under_faulting_threads<M: Machine>(machine: M) {
    let vm = Vm::new(machine, PageSize::Size4K);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (vm, done) = (&vm, &done);
            scope.spawn(move || {
                let cpu = CpuId::new(number).unwrap();
                let mut cache = TableCache::new();
                let mut gfn = 0;
                while !done.load(Ordering::SeqCst) {
                    gfn = (gfn + 1) % 2000;
                    let outcome = vm.fault(cpu, &mut cache, 4 * GIB + gfn);
                    let fine = matches!(
                        outcome,
                        FaultOutcome::Mapped
                            | FaultOutcome::Spurious
                            | FaultOutcome::Mmio(_)
                            | FaultOutcome::Retry
                    );
                    assert!(fine, "{outcome:?}");
                }
                vm.tables.drain(&mut cache);
            });
        }
        let cpu = CpuId::new(2).unwrap();
        let start = Gfn::new_truncate(4 * GIB);
        let range = GfnRange::new(start, 2000).unwrap();
        for _ in 0..300 {
            let slot = Slot::new(range, SlotFlags::empty(), 12 * GIB);
            vm.memory.exclusive(cpu).insert_slot(&slot).unwrap();
            std::thread::yield_now();
            let mut exclusive = vm.memory.exclusive(cpu);
            let mut sweep = exclusive.remove_slot(start).unwrap();
            while !sweep.is_done() {
                drop(vm.kind.zap(&exclusive, &mut sweep));
            }
            let counts = vm.kind.page_counts();
            assert_eq!(counts.leaves, [0; 3], "I2: nothing of the slot is left when the guard goes");
        }
        done.store(true, Ordering::SeqCst);
    });
    vm.finish(std::iter::empty());
}
