//! The direct kind under random sequences of operations, against a model of the slots, a model TLB and the tables as the
//! hardware reads them. The names in the checks are the invariants they stand for.
mod support;

use std::collections::HashMap;

use mmu::{
    AccessKind, CpuId, CpuRole, Cr0, Cr4, DirectMmu, Efer, Entered, FaultOutcome, Flush, Generation, Gfn,
    GfnRange, GuestCpu, Mmu, PageCounts, PageSize, PagingRegs, Slot, SlotFlags, SplitProgress, Sweep,
    TableCache, TagFlush, VmMemory,
};
use proptest::prelude::*;
use support::blocks::Blocks;
use support::hardware::Walker;
use support::machines::{on_every_machine, Host, Machine, HOST};
use support::tables::HostTables;

const GIB: u64 = 1 << 18;
const CPUS: usize = 3;
const VCPUS: usize = 2;

/// Slots that the sequences add and remove: (first frame, frames, frame behind the first).
const SLOTS: [(u64, u64, u64); 5] = [
    (0, 3 * 512, 64 * GIB),
    // Starts and ends inside a 2 MiB block, aligned like its backing.
    (2048 + 7, 1024, 80 * GIB + 2048 + 7),
    // Aligned unlike its backing.
    (8192, 1024, 96 * GIB + 1),
    // Crosses a gigabyte and holds one.
    (GIB - 512, GIB + 1024, 128 * GIB - 512),
    // Backed by 2 MiB pages only.
    (4 * GIB, GIB, 160 * GIB + 512),
];

#[derive(Clone, Debug)]
enum Op {
    Enter { vcpu: usize, cpu: usize },
    Exit { vcpu: usize },
    Access { vcpu: usize, gfn: u64, kind: AccessKind, use_tlb: bool },
    Zap { gfn: u64, pages: u64, issue: bool },
    Protect { gfn: u64, pages: u64, issue: bool },
    Unprotect { gfn: u64, pages: u64 },
    Split { gfn: u64, pages: u64, size: PageSize },
    InsertSlot { slot: usize, read_only: bool },
    RemoveSlot { slot: usize },
    SetFlags { slot: usize, read_only: bool },
    Grant { size: PageSize },
    Invalidate { gfn: u64 },
    LateInstall { gfn: u64, invalidate: bool },
    Reclaim { limit: usize },
}

fn gfns() -> impl Strategy<Value = u64> {
    let inside = (0..SLOTS.len(), 0..1600u64).prop_map(|(slot, offset)| {
        let (start, pages, _) = SLOTS[slot];
        start + offset % pages
    });
    let last = (0..SLOTS.len(), 0..3u64).prop_map(|(slot, after)| SLOTS[slot].0 + SLOTS[slot].1 - 2 + after);
    prop_oneof![8 => inside, 2 => last, 1 => 0..6 * GIB]
}

fn spans() -> impl Strategy<Value = u64> {
    prop_oneof![Just(1), Just(512), 1..2000u64, Just(GIB), Just(8 * GIB)]
}

fn sizes() -> impl Strategy<Value = PageSize> {
    prop_oneof![Just(PageSize::Size4K), Just(PageSize::Size2M), Just(PageSize::Size1G)]
}

fn kinds() -> impl Strategy<Value = AccessKind> {
    prop_oneof![Just(AccessKind::Read), Just(AccessKind::Write), Just(AccessKind::Execute)]
}

fn ops() -> impl Strategy<Value = Op> {
    let (vcpus, cpus, slots) = (0..VCPUS, 0..CPUS, 0..SLOTS.len());
    prop_oneof![
        4 => (vcpus.clone(), cpus).prop_map(|(vcpu, cpu)| Op::Enter { vcpu, cpu }),
        2 => vcpus.clone().prop_map(|vcpu| Op::Exit { vcpu }),
        16 => (vcpus, gfns(), kinds(), any::<bool>())
            .prop_map(|(vcpu, gfn, kind, use_tlb)| Op::Access { vcpu, gfn, kind, use_tlb }),
        2 => (gfns(), spans(), any::<bool>()).prop_map(|(gfn, pages, issue)| Op::Zap { gfn, pages, issue }),
        2 => (gfns(), spans(), any::<bool>()).prop_map(|(gfn, pages, issue)| Op::Protect { gfn, pages, issue }),
        1 => (gfns(), spans()).prop_map(|(gfn, pages)| Op::Unprotect { gfn, pages }),
        1 => (gfns(), 1..2000u64, sizes()).prop_map(|(gfn, pages, size)| Op::Split { gfn, pages, size }),
        2 => (slots.clone(), any::<bool>()).prop_map(|(slot, read_only)| Op::InsertSlot { slot, read_only }),
        1 => slots.clone().prop_map(|slot| Op::RemoveSlot { slot }),
        1 => (slots, any::<bool>()).prop_map(|(slot, read_only)| Op::SetFlags { slot, read_only }),
        1 => sizes().prop_map(|size| Op::Grant { size }),
        1 => gfns().prop_map(|gfn| Op::Invalidate { gfn }),
        1 => (gfns(), any::<bool>()).prop_map(|(gfn, invalidate)| Op::LateInstall { gfn, invalidate }),
        2 => (1..20usize).prop_map(|limit| Op::Reclaim { limit }),
    ]
}

/// A cached translation, with the tables that led to it (the paging-structure caches).
#[derive(Debug)]
struct Cached {
    first: u64,
    pages: u64,
    pfn: u64,
    writable: bool,
    tables: Vec<u64>,
    /// What it says was taken away; legal to use only until this is acknowledged.
    doomed: Option<Generation>,
}

struct World<'m, M: Machine> {
    machine: M,
    memory: &'m VmMemory<Blocks>,
    kind: &'m DirectMmu<M::Format, HostTables>,
    tables: &'m HostTables,
    cache: TableCache,
    /// The slots as they should be: read-only or not.
    slots: [Option<bool>; SLOTS.len()],
    vcpus: Vec<Mmu>,
    running: Vec<Option<(usize, Entered<'m, Blocks>)>>,
    tlb: HashMap<(usize, usize), Vec<Cached>>,
}

fn cpu(number: usize) -> CpuId {
    CpuId::new(number).unwrap()
}

fn range(gfn: u64, pages: u64) -> GfnRange {
    GfnRange::new(Gfn::new(gfn).unwrap(), pages).unwrap()
}

impl<'m, M: Machine> World<'m, M> {
    /// The frame behind `gfn` and whether it is read-only, as the slots say.
    fn expected(&self, gfn: u64) -> Option<(u64, bool)> {
        SLOTS.iter().zip(self.slots).find_map(|(&(start, pages, cookie), slot)| {
            let read_only = slot?;
            let page = gfn.checked_sub(start).filter(|&page| page < pages)?;
            Some((self.memory.backing().frame(cookie, page, gfn), read_only))
        })
    }

    fn walker(&self) -> Walker<'m, M> {
        let root = self.kind.root();
        Walker { tables: self.tables, root: root.hpa.pfn().number(), machine: self.machine }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Enter { vcpu, cpu } => self.enter(vcpu, cpu),
            Op::Exit { vcpu } => self.running[vcpu] = None,
            Op::Access { vcpu, gfn, kind, use_tlb } => self.access(vcpu, gfn, kind, use_tlb),
            Op::Zap { gfn, pages, issue } => self.sweep(gfn, pages, issue, false),
            Op::Protect { gfn, pages, issue } => self.sweep(gfn, pages, issue, true),
            Op::Unprotect { gfn, pages } => {
                let mut sweep = Sweep::over(range(gfn, pages));
                while !sweep.is_done() {
                    let flush = self.kind.write_unprotect(&self.memory.shared(cpu(0)), &mut sweep);
                    assert!(!flush.is_needed(), "C1");
                }
            }
            Op::Split { gfn, pages, size } => {
                let mut sweep = Sweep::over(range(gfn, pages));
                while !sweep.is_done() {
                    let shared = self.memory.shared(cpu(0));
                    if self.kind.split(&shared, &mut self.cache, &mut sweep, size)
                        == SplitProgress::NeedTables
                    {
                        self.tables.fill(&mut self.cache);
                    }
                }
                self.tables.fill(&mut self.cache);
            }
            Op::InsertSlot { slot, read_only } => self.insert_slot(slot, read_only),
            Op::RemoveSlot { slot } => {
                let start = Gfn::new(SLOTS[slot].0).unwrap();
                let kind = self.kind;
                let mut exclusive = self.memory.exclusive(cpu(0));
                let swept = exclusive.remove_slot(start);
                assert_eq!(swept.is_ok(), self.slots[slot].take().is_some());
                let Ok(mut sweep) = swept else { return };
                while !sweep.is_done() {
                    drop(kind.zap(&exclusive, &mut sweep));
                }
                drop(exclusive);
                self.doom(SLOTS[slot].0, SLOTS[slot].1, false, self.memory.shootdown().requested());
            }
            Op::SetFlags { slot, read_only } => {
                let start = Gfn::new(SLOTS[slot].0).unwrap();
                let kind = self.kind;
                let mut exclusive = self.memory.exclusive(cpu(0));
                let swept = exclusive.set_slot_flags(start, flags(read_only));
                assert_eq!(swept.is_ok(), self.slots[slot].is_some());
                let Ok(mut sweep) = swept else { return };
                self.slots[slot] = Some(read_only);
                while !sweep.is_done() {
                    drop(kind.zap(&exclusive, &mut sweep));
                }
                drop(exclusive);
                self.doom(SLOTS[slot].0, SLOTS[slot].1, false, self.memory.shootdown().requested());
            }
            Op::Grant { size } => self.memory.backing().set_largest(size),
            Op::Invalidate { gfn } => self.invalidate(gfn),
            Op::LateInstall { gfn, invalidate } => {
                let found = {
                    let shared = self.memory.shared(cpu(1));
                    self.kind.resolve(&shared, Gfn::new(gfn).unwrap().gpa(), AccessKind::Write)
                };
                if invalidate {
                    self.invalidate(gfn);
                }
                if let Ok(resolution) = found {
                    let shared = self.memory.shared(cpu(1));
                    let outcome = self.kind.install(&shared, &mut self.cache, &resolution);
                    assert!(!invalidate || outcome == FaultOutcome::Retry, "E1: {outcome:?}");
                    self.tables.fill(&mut self.cache);
                }
            }
            Op::Reclaim { limit } => self.reclaim(limit),
        }
    }

    fn enter(&mut self, vcpu: usize, on: usize) {
        if self.running.iter().flatten().any(|&(busy, _)| busy == on) {
            return;
        }
        self.running[vcpu] = None;
        let entered = self.vcpus[vcpu].enter(self.memory, cpu(on));
        let cached = self.tlb.entry((on, vcpu)).or_default();
        match entered.flush() {
            TagFlush::All => cached.clear(),
            TagFlush::None => {
                // Everything that was taken away before this entry is gone from the tag.
                let stale = cached.iter().find(|cached| cached.doomed.is_some());
                assert!(stale.is_none(), "C1: {stale:?} survives an entry");
            }
        }
        self.running[vcpu] = Some((on, entered));
    }

    fn access(&mut self, vcpu: usize, gfn: u64, kind: AccessKind, use_tlb: bool) {
        let write = kind == AccessKind::Write;
        let Some(&(on, _)) = self.running[vcpu].as_ref() else { return };
        let expected = self.expected(gfn);
        if use_tlb {
            let cached = self.tlb[&(on, vcpu)].iter().find(|cached| {
                (cached.first..cached.first + cached.pages).contains(&gfn) && (cached.writable || !write)
            });
            if let Some(cached) = cached {
                match cached.doomed {
                    Some(generation) => {
                        let acknowledged = self.memory.shootdown().is_acknowledged(generation);
                        assert!(!acknowledged, "C2, C3: {cached:?} is used after its flush");
                    }
                    None => {
                        let (pfn, read_only) = expected.expect("A3: a cached translation has a slot");
                        assert_eq!(cached.pfn + gfn - cached.first, pfn, "A1");
                        assert!(!(write && read_only), "A3");
                    }
                }
                return;
            }
        }
        // A4: a bounded number of faults, then the access succeeds or must be emulated.
        for _ in 0..8 {
            if let Some(hit) = self.walker().walk(gfn, write, kind == AccessKind::Execute) {
                let (pfn, read_only) = expected.expect("A3: mapped, but no slot");
                assert_eq!(hit.pfn, pfn, "A1");
                assert!(!(hit.writable && read_only), "B3");
                let base = hit.pfn - (gfn - hit.first);
                let cached = Cached {
                    first: hit.first,
                    pages: hit.pages,
                    pfn: base,
                    writable: hit.writable,
                    tables: hit.tables,
                    doomed: None,
                };
                // C8: what the walk found replaces what the TLB had for the page.
                let tlb = self.tlb.get_mut(&(on, vcpu)).unwrap();
                tlb.retain(|old| {
                    old.first != cached.first || old.pages != cached.pages || old.doomed.is_some()
                });
                tlb.push(cached);
                return;
            }
            self.running[vcpu] = None;
            let gpa = Gfn::new(gfn).unwrap().gpa();
            let outcome = self.kind.fault(&self.memory.shared(cpu(on)), &mut self.cache, gpa, kind);
            self.tables.fill(&mut self.cache);
            match (outcome, expected) {
                (FaultOutcome::Mmio(at), None) => return assert_eq!(at, gpa),
                (FaultOutcome::ReadOnly(at), Some((_, true))) if write => return assert_eq!(at, gpa),
                (FaultOutcome::Mapped | FaultOutcome::Spurious, Some(_)) => {}
                _ => panic!("A2: {outcome:?} where {expected:?} is expected"),
            }
            self.enter(vcpu, on);
        }
        panic!("A4: livelock");
    }

    fn sweep(&mut self, gfn: u64, pages: u64, issue: bool, protect: bool) {
        let mut sweep = Sweep::over(range(gfn, pages));
        let mut all: Option<Flush<'m, M::Format, HostTables>> = None;
        while !sweep.is_done() {
            let shared = self.memory.shared(cpu(2));
            let flush = match protect {
                true => self.kind.write_protect(&shared, &mut sweep),
                false => self.kind.zap(&shared, &mut sweep),
            };
            all = Some(match all {
                Some(joined) => joined.join(flush),
                None => flush,
            });
        }
        let Some(flush) = all else { return };
        if issue {
            if let Some(issued) = flush.issue() {
                for slot in &mut self.running {
                    let kicked = slot.as_ref().is_some_and(|&(on, _)| issued.kick.contains(cpu(on)));
                    if kicked {
                        *slot = None;
                    }
                }
                assert!(self.memory.shootdown().is_acknowledged(issued.generation), "kicks are enough");
            }
        } else {
            drop(flush);
        }
        self.doom(gfn, pages, protect, self.memory.shootdown().requested());
    }

    /// Cached translations of the range (those that permit writes, if it was only protected) are on notice.
    fn doom(&mut self, gfn: u64, pages: u64, writable_only: bool, generation: Generation) {
        for cached in self.tlb.values_mut().flatten() {
            let meets = cached.first < gfn + pages && gfn < cached.first + cached.pages;
            if meets && (cached.writable || !writable_only) && cached.doomed.is_none() {
                cached.doomed = Some(generation);
            }
        }
    }

    fn insert_slot(&mut self, slot: usize, read_only: bool) {
        let (start, pages, cookie) = SLOTS[slot];
        let new = Slot { range: range(start, pages), flags: flags(read_only), cookie };
        let inserted = self.memory.exclusive(cpu(0)).insert_slot(&new);
        assert_eq!(inserted.is_ok(), self.slots[slot].is_none());
        if inserted.is_ok() {
            self.slots[slot] = Some(read_only);
        }
    }

    /// The host takes the 2 MiB block around `gfn` away and puts other frames there.
    fn invalidate(&mut self, gfn: u64) {
        let first = gfn & !511;
        let invalidation = self.memory.exclusive(cpu(0)).begin_invalidation(range(first, 512));
        self.sweep(first, 512, true, false);
        if self.expected(gfn).is_some() {
            let gpa = Gfn::new(gfn).unwrap().gpa();
            let outcome =
                self.kind.fault(&self.memory.shared(cpu(1)), &mut self.cache, gpa, AccessKind::Read);
            assert_eq!(outcome, FaultOutcome::Retry, "E1");
        }
        self.memory.backing().move_block(gfn);
        drop(invalidation);
    }

    fn reclaim(&mut self, limit: usize) {
        let mut freed = vec![];
        let given = self.kind.reclaim(self.memory, limit, |page| freed.push(page));
        assert!(given == freed.len() && given <= limit);
        for page in freed {
            let pfn = page.into_frame();
            for (vcpu, running) in self.running.iter().enumerate() {
                let Some(&(on, _)) = running.as_ref() else { continue };
                let used = self.tlb[&(on, vcpu)].iter().find(|cached| cached.tables.contains(&pfn.number()));
                assert!(used.is_none(), "C3: {pfn:?} is freed under {used:?}");
            }
            self.tables.release_frame(pfn);
        }
    }

    fn into_cache(self) -> TableCache {
        self.cache
    }

    /// The whole tree, after each operation.
    fn check(&self) {
        let tally = self.walker().check(&mut |leaf| {
            for probe in [0, leaf.pages / 2, leaf.pages - 1] {
                let expected = self.expected(leaf.gfn + probe);
                let (want, read_only) = expected.expect("B3: a leaf outside its slot");
                assert_eq!(leaf.pfn + probe, want, "A1, D8");
                assert_eq!(!leaf.host_writable, read_only, "B3: host-writable follows the slot");
            }
            assert_eq!((leaf.rights.read, leaf.rights.execute), (true, [true; 2]));
        });
        let counts = PageCounts { leaves: tally.leaves, tables: tally.tables };
        assert_eq!(self.kind.page_counts(), counts, "D4");
    }
}

fn flags(read_only: bool) -> SlotFlags {
    if read_only {
        SlotFlags::READ_ONLY
    } else {
        SlotFlags::empty()
    }
}

fn run<M: Machine>(machine: M, five_level: bool, largest: PageSize, ops: &[Op]) {
    let memory = VmMemory::new(Blocks::default());
    let tables = HostTables::new(4096);
    let machine = machine.on(Host { five_level, ..HOST });
    let kind = DirectMmu::new(&memory, machine.format(), tables.clone(), tables.allocate(), 46, largest);
    let regs = PagingRegs { cr0: Cr0::PG, cr4: Cr4::PAE, efer: Efer::LMA };
    let guest = GuestCpu { max_phys_addr: 46, gib_pages: true, pse36: true, amd: true };
    let role = CpuRole::new(&regs, &guest);
    let mut world = World {
        machine,
        memory: &memory,
        kind: &kind,
        tables: &tables,
        cache: TableCache::new(),
        slots: [None; SLOTS.len()],
        vcpus: (0..VCPUS).map(|_| Mmu::new(role, kind.root())).collect(),
        running: (0..VCPUS).map(|_| None).collect(),
        tlb: HashMap::new(),
    };
    tables.fill(&mut world.cache);
    for slot in 0..SLOTS.len() {
        world.insert_slot(slot, slot == 1);
    }
    for op in ops {
        world.apply(op);
        world.check();
    }
    world.running.fill_with(|| None);
    world.reclaim(usize::MAX);
    let mut cache = world.into_cache();
    assert_eq!(tables.in_use() as u64, kind.page_counts().tables + 4, "no table page is lost");
    tables.drain(&mut cache);
    kind.dismantle(|page| tables.release(page));
    assert_eq!(tables.in_use(), 0, "no table page is lost");
}

fn any_sequence_of_operations<M: Machine>(machine: M) {
    let config = ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(
        five_level: bool,
        largest in sizes(),
        ops in prop::collection::vec(ops(), 1..120),
    )| run(machine, five_level, largest, &ops));
}

on_every_machine!(any_sequence_of_operations);
