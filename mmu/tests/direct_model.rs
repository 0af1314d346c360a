//! The direct kind under random sequences of operations, against a model of the slots, a model TLB and the tables as the
//! hardware reads them. The names in the checks are the invariants they stand for.
pub(crate) mod support;

use std::collections::{HashMap, HashSet};

use mmu::{
    AccessKind, CpuId, CpuRole, Cr0, Cr4, DirectMmu, DirectRole, Efer, Entered, FaultOutcome, Flush,
    Generation, Gfn, GfnRange, GuestCpu, LogBy, Mmu, NoRoot, PageCounts, PageSize, PagingRegs,
    PopulateProgress, Root, Shared, Slot, SlotFlags, Space, SpaceGfn, Spaces, SplitProgress, Sweep,
    TableCache, TagFlush, VmMemory,
};
use proptest::prelude::*;
use support::blocks::Blocks;
use support::hardware::{Exit, Found, Tally, Walker};
use support::machines::{on_every_machine, Host, Machine, HOST};
use support::tables::HostTables;

pub(crate) const GIB: u64 = 1 << 18;
pub(crate) const CPUS: usize = 3;
pub(crate) const VCPUS: usize = 2;

/// Slots that the sequences add and remove: (first frame, frames, frame behind the first). Where one is only seen by one
/// space, see `SPACES`.
pub(crate) const SLOTS: [(u64, u64, u64); 7] = [
    (0, 3 * 512, 64 * GIB),
    // Starts and ends inside a 2 MiB block, aligned like its backing.
    (2048 + 7, 1024, 80 * GIB + 2048 + 7),
    // Aligned unlike its backing.
    (8192, 1024, 96 * GIB + 1),
    // Crosses a gigabyte and holds one.
    (GIB - 512, GIB + 1024, 128 * GIB - 512),
    // Backed by 2 MiB pages only.
    (4 * GIB, GIB, 160 * GIB + 512),
    // What SMM sees in the place of a block of the first slot, and more that starts and ends inside a block.
    (512, 512, 192 * GIB + 512),
    (1024 + 100, 600, 224 * GIB + 1024 + 100),
];

/// Who sees them.
const SPACES: [Spaces; SLOTS.len()] =
    [Spaces::NORMAL, Spaces::all(), Spaces::all(), Spaces::all(), Spaces::NORMAL, Spaces::SMM, Spaces::SMM];

/// The slots that are logged: those without a gigabyte, so that splitting them is quick.
pub(crate) const LOGGED: [usize; 5] = [0, 1, 2, 5, 6];

/// The space that a vCPU sees: the second one is in system-management mode.
fn space_of(vcpu: usize) -> Space {
    Space::of(vcpu == 1)
}

/// A slot's start, in a space that sees it.
fn start_of(slot: usize) -> SpaceGfn {
    Space::of(!SPACES[slot].contains(Spaces::NORMAL)).at(Gfn::new(SLOTS[slot].0).unwrap())
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
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
    Populate { vcpu: usize, gfn: u64, pages: u64 },
    Reclaim { limit: usize },
    StartLog { slot: usize, dirty_bits: bool, all_set: bool, split: bool },
    StopLog { slot: usize },
    Harvest { slot: usize },
    Age { gfn: u64, pages: u64 },
    Collapse { gfn: u64, pages: u64 },
    Track { gfn: u64 },
    Untrack { gfn: u64, restore: bool },
    ForbidHugeExecute { forbid: bool },
    Recover { ratio: u64 },
    InvalidateAll,
    ZapObsolete { batches: usize },
    CacheMmio { on: bool },
}

fn gfns() -> impl Strategy<Value = u64> {
    let inside = (0..SLOTS.len(), 0..1600u64).prop_map(|(slot, offset)| {
        let (start, pages, _) = SLOTS[slot];
        start + offset % pages
    });
    let last = (0..SLOTS.len(), 0..3u64).prop_map(|(slot, after)| SLOTS[slot].0 + SLOTS[slot].1 - 2 + after);
    // What happens in a row often has to concern the same page to show anything.
    let hot = (0..3usize, 0..3usize).prop_map(|(slot, index)| SLOTS[slot].0 + [1, 600, 700][index]);
    prop_oneof![12 => hot, 8 => inside, 2 => last, 1 => 0..6 * GIB]
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
        2 => (0..VCPUS, gfns(), 1..2000u64).prop_map(|(vcpu, gfn, pages)| Op::Populate { vcpu, gfn, pages }),
        2 => (1..20usize).prop_map(|limit| Op::Reclaim { limit }),
        18 => features(),
    ]
}

fn features() -> impl Strategy<Value = Op> {
    let slots = 0..SLOTS.len();
    prop_oneof![
        3 => (prop::sample::select(&LOGGED[..]), any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|(slot, dirty_bits, all_set, split)| Op::StartLog { slot, dirty_bits, all_set, split }),
        1 => slots.prop_map(|slot| Op::StopLog { slot }),
        4 => prop::sample::select(&LOGGED[..]).prop_map(|slot| Op::Harvest { slot }),
        2 => (gfns(), spans()).prop_map(|(gfn, pages)| Op::Age { gfn, pages }),
        2 => (gfns(), spans()).prop_map(|(gfn, pages)| Op::Collapse { gfn, pages }),
        2 => gfns().prop_map(|gfn| Op::Track { gfn }),
        2 => (gfns(), any::<bool>()).prop_map(|(gfn, restore)| Op::Untrack { gfn, restore }),
        1 => any::<bool>().prop_map(|forbid| Op::ForbidHugeExecute { forbid }),
        1 => (1..4u64).prop_map(|ratio| Op::Recover { ratio }),
        1 => Just(Op::InvalidateAll),
        2 => (1..3usize).prop_map(|batches| Op::ZapObsolete { batches }),
        1 => any::<bool>().prop_map(|on| Op::CacheMmio { on }),
    ]
}

/// A cached translation, with the tables that led to it (the paging-structure caches).
#[derive(Debug)]
struct Cached {
    first: u64,
    pages: u64,
    pfn: u64,
    writable: bool,
    /// D was set when it was cached: another write does not look at the leaf.
    dirty: bool,
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
    /// Which are logged, and whether by dirty bits.
    logged: [Option<bool>; SLOTS.len()],
    /// Slots whose huge pages have been protected since the log began.
    armed: [bool; SLOTS.len()],
    /// Pages of logged slots that were written since the last harvest: slot and frame.
    written: HashSet<(usize, u64)>,
    tracked: HashMap<u64, u32>,
    no_huge_execute: bool,
    vcpus: Vec<Mmu>,
    running: Vec<Option<(usize, Entered<'m>)>>,
    tlb: HashMap<(usize, usize), Vec<Cached>>,
}

fn cpu(number: usize) -> CpuId {
    CpuId::new(number).unwrap()
}

fn range(gfn: u64, pages: u64) -> GfnRange {
    GfnRange::new(Gfn::new(gfn).unwrap(), pages).unwrap()
}

impl<'m, M: Machine> World<'m, M> {
    /// The frame behind `gfn` and whether it is read-only, as the slots that the space sees say.
    fn expected(&self, space: Space, gfn: u64) -> Option<(u64, bool)> {
        let slot = self.slot_of(space, gfn)?;
        let (start, _, cookie) = SLOTS[slot];
        Some((self.memory.backing().frame(cookie, gfn - start, gfn), self.slots[slot]?))
    }

    /// The slot of `gfn`.
    fn slot_of(&self, space: Space, gfn: u64) -> Option<usize> {
        (0..SLOTS.len()).find(|&slot| {
            let (start, pages, _) = SLOTS[slot];
            let seen = self.slots[slot].is_some() && SPACES[slot].contains(space.into());
            seen && (start..start + pages).contains(&gfn)
        })
    }

    /// Whether any space has a slot of `gfn`.
    fn has_slot(&self, gfn: u64) -> bool {
        Space::ALL.into_iter().any(|space| self.slot_of(space, gfn).is_some())
    }

    fn walker(&self, root: Root) -> Walker<'m, M> {
        Walker { tables: self.tables, root: root.hpa.pfn().number(), machine: self.machine }
    }

    /// Runs the batches of an operation, and sees to the flush at once.
    fn flush_all(
        &mut self,
        mut sweep: Sweep,
        mut batch: impl FnMut(&Shared<'m, Blocks>, &mut Sweep) -> Flush<'m, M::Format, HostTables>,
    ) {
        while !sweep.is_done() {
            let flush = batch(&self.memory.shared(cpu(2)), &mut sweep);
            self.settle(flush);
        }
    }

    /// Issues the flush and kicks whom it names. What TLBs had is on notice, if there was anything to flush.
    fn settle(&mut self, flush: Flush<'m, M::Format, HostTables>) {
        let Some(issued) = flush.issue() else { return };
        for slot in &mut self.running {
            let kicked = slot.as_ref().is_some_and(|&(on, _)| issued.kick.contains(cpu(on)));
            if kicked {
                *slot = None;
            }
        }
        assert!(self.memory.shootdown().is_acknowledged(issued.generation), "kicks are enough");
        self.doom(Spaces::all(), 0, 1 << 40, false, issued.generation);
    }

    /// The log's words of a slot.
    fn log_word(&self, slot: usize, gfn: u64) -> bool {
        let (start, ..) = SLOTS[slot];
        let shared = self.memory.shared(cpu(2));
        let log = shared.dirty_log(start_of(slot)).expect("logged");
        let page = gfn - start;
        log.read((page / 64) as usize) >> (page % 64) & 1 != 0
    }

    fn start_log(&mut self, slot: usize, dirty_bits: bool, all_set: bool, split: bool) {
        let start = start_of(slot);
        let by = if dirty_bits { LogBy::DirtyBits } else { LogBy::WriteProtection };
        let started = match all_set {
            true => self.memory.exclusive(cpu(0)).start_dirty_log_all_set(start, by),
            false => self.memory.exclusive(cpu(0)).start_dirty_log(start, by),
        };
        assert_eq!(started.is_ok(), self.slots[slot].is_some());
        let Ok(sweep) = started else { return };
        if split {
            self.split(sweep.clone(), PageSize::Size4K);
        }
        if !all_set {
            let kind = self.kind;
            self.flush_all(sweep, |shared, sweep| kind.rearm(shared, sweep));
        }
        self.logged[slot] = Some(dirty_bits);
        self.armed[slot] = !all_set;
        self.forget_written(slot);
    }

    fn forget_written(&mut self, slot: usize) {
        self.written.retain(|&(written, _)| written != slot);
    }

    fn stop_log(&mut self, slot: usize) {
        let stopped = self.memory.exclusive(cpu(0)).stop_dirty_log(start_of(slot));
        assert_eq!(stopped.is_ok(), self.slots[slot].is_some());
        self.logged[slot] = None;
        self.forget_written(slot);
    }

    /// H1, H3: what was written is in the log, and what is in it was writable.
    fn harvest(&mut self, slot: usize) {
        if self.logged[slot].is_none() {
            return;
        }
        let (start, pages, _) = SLOTS[slot];
        let kind = self.kind;
        let first = start_of(slot);
        self.flush_all(Sweep::over(range(start, pages)), |shared, sweep| kind.collect_dirty(shared, sweep));
        let shared = self.memory.shared(cpu(2));
        let log = shared.dirty_log(first).expect("logged");
        let mut flushes = vec![];
        let mut found = HashSet::new();
        for index in 0..log.words() {
            let frames = log.frames(index).unwrap();
            let mask = log.clear(index, u64::MAX);
            if mask != 0 {
                let at = Gfn::new(frames.start()).unwrap();
                flushes.push(kind.rearm_pages(&shared, first.space.at(at), mask));
            }
            found.extend((0..64).filter(|bit| mask >> bit & 1 != 0).map(|bit| frames.start() + bit));
        }
        drop(shared);
        for flush in flushes {
            self.settle(flush);
        }
        assert!(found.iter().all(|gfn| (start..start + pages).contains(gfn)), "H3");
        let missed = self.written.iter().find(|&(written, gfn)| *written == slot && !found.contains(gfn));
        assert_eq!(missed, None, "H1");
        self.armed[slot] = true;
        self.forget_written(slot);
    }

    fn split(&mut self, mut sweep: Sweep, size: PageSize) {
        while !sweep.is_done() {
            let shared = self.memory.shared(cpu(0));
            let progress = self.kind.split(&shared, &mut self.cache, &mut sweep, size);
            if progress == SplitProgress::NeedTables {
                self.tables.fill(&mut self.cache);
            }
        }
        self.tables.fill(&mut self.cache);
    }

    fn track(&mut self, gfn: u64) {
        let kind = self.kind;
        let mut exclusive = self.memory.exclusive(cpu(0));
        let tracked = exclusive.track_writes(Gfn::new(gfn).unwrap());
        assert_eq!(tracked.is_ok(), self.has_slot(gfn));
        let Ok(mut sweep) = tracked else { return };
        let mut flushes = vec![];
        while !sweep.is_done() {
            flushes.push(kind.track(&exclusive, &mut sweep));
        }
        drop(exclusive);
        *self.tracked.entry(gfn).or_default() += 1;
        for flush in flushes {
            self.settle(flush);
        }
    }

    fn untrack(&mut self, gfn: u64, restore: bool) {
        let count = self.tracked.get(&gfn).copied().unwrap_or(0);
        let mut exclusive = self.memory.exclusive(cpu(0));
        let untracked = exclusive.untrack_writes(Gfn::new(gfn).unwrap());
        assert_eq!(untracked.is_ok(), count != 0);
        let Ok(mut sweep) = untracked else { return };
        while restore && !sweep.is_done() {
            assert!(!self.kind.untrack(&exclusive, &mut sweep).is_needed(), "C1");
        }
        self.tracked.insert(gfn, count - 1);
        self.tracked.retain(|_, count| *count != 0);
    }

    fn is_tracked(&self, gfn: u64) -> bool {
        self.tracked.contains_key(&gfn)
    }

    /// The slot is gone, and what was noted of its pages, unless another space has them, too.
    fn forget_slot(&mut self, slot: usize) {
        self.logged[slot] = None;
        self.forget_written(slot);
        let mut tracked = std::mem::take(&mut self.tracked);
        tracked.retain(|&gfn, _| self.has_slot(gfn));
        self.tracked = tracked;
    }

    fn invalidate_all(&mut self) {
        let page = self.tables.allocate();
        let done = self.kind.invalidate_all(&mut self.memory.exclusive(cpu(0)), page);
        match done {
            Ok(flush) => self.settle(flush),
            Err(page) => {
                self.tables.release(page);
                self.zap_obsolete(usize::MAX);
            }
        }
    }

    /// (What TLBs have of obsolete roots is on notice since they became so.)
    fn zap_obsolete(&mut self, batches: usize) {
        let mut sweep = Sweep::over(GfnRange::ALL);
        for _ in 0..batches {
            if sweep.is_done() {
                break;
            }
            drop(self.kind.zap_obsolete(&self.memory.shared(cpu(2)), &mut sweep));
        }
    }

    /// The root of now for a vCPU.
    fn new_root(&mut self, vcpu: usize) -> Root {
        if space_of(vcpu) == Space::Normal {
            return self.kind.root();
        }
        self.kind.put_root(&mut self.memory.exclusive(cpu(0)), self.vcpus[vcpu].root());
        loop {
            let got =
                self.kind.get_root(&mut self.memory.exclusive(cpu(0)), &mut self.cache, DirectRole::SMM);
            self.tables.fill(&mut self.cache);
            match got {
                Ok(root) => return root,
                Err(NoRoot::Full) => self.zap_obsolete(usize::MAX),
                Err(NoRoot::NeedTables) => {}
            }
        }
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
            Op::Split { gfn, pages, size } => self.split(Sweep::over(range(gfn, pages)), size),
            Op::InsertSlot { slot, read_only } => self.insert_slot(slot, read_only),
            Op::RemoveSlot { slot } => {
                let kind = self.kind;
                let mut exclusive = self.memory.exclusive(cpu(0));
                let swept = exclusive.remove_slot(start_of(slot));
                assert_eq!(swept.is_ok(), self.slots[slot].take().is_some());
                self.forget_slot(slot);
                let Ok(mut sweep) = swept else { return };
                while !sweep.is_done() {
                    drop(kind.zap(&exclusive, &mut sweep));
                }
                drop(exclusive);
                self.doom_slot(slot);
            }
            Op::SetFlags { slot, read_only } => {
                let kind = self.kind;
                let mut exclusive = self.memory.exclusive(cpu(0));
                let swept = exclusive.set_slot_flags(start_of(slot), flags(read_only));
                assert_eq!(swept.is_ok(), self.slots[slot].is_some());
                let Ok(mut sweep) = swept else { return };
                self.slots[slot] = Some(read_only);
                while !sweep.is_done() {
                    drop(kind.zap(&exclusive, &mut sweep));
                }
                drop(exclusive);
                self.doom_slot(slot);
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
            Op::Populate { vcpu, gfn, pages } => self.populate(vcpu, gfn, pages),
            Op::Reclaim { limit } => self.reclaim(limit),
            Op::StartLog { slot, dirty_bits, all_set, split } => {
                self.start_log(slot, dirty_bits, all_set, split);
            }
            Op::StopLog { slot } => self.stop_log(slot),
            Op::Harvest { slot } => self.harvest(slot),
            Op::Age { gfn, pages } => {
                let before = self.memory.shootdown().requested();
                let mut sweep = Sweep::over(range(gfn, pages));
                while !sweep.is_done() {
                    let _ = self.kind.test_and_clear_young(&self.memory.shared(cpu(1)), &mut sweep);
                }
                assert_eq!(self.memory.shootdown().requested(), before, "H5");
                let young =
                    self.kind.test_young(&self.memory.shared(cpu(1)), &mut Sweep::over(range(gfn, 1)));
                assert!(!young, "H5");
            }
            Op::Collapse { gfn, pages } => {
                let mut sweep = Sweep::over(range(gfn, pages));
                while !sweep.is_done() {
                    let flush = self.kind.collapse(&self.memory.exclusive(cpu(2)), &mut sweep);
                    self.settle(flush);
                }
            }
            Op::Track { gfn } => self.track(gfn),
            Op::Untrack { gfn, restore } => self.untrack(gfn, restore),
            Op::ForbidHugeExecute { forbid } => {
                let swept = self.kind.forbid_huge_execute(&mut self.memory.exclusive(cpu(0)), forbid);
                self.no_huge_execute = forbid;
                let kind = self.kind;
                self.flush_all(swept.unwrap(), |shared, sweep| kind.zap(shared, sweep));
            }
            Op::Recover { ratio } => {
                let mut sweep = Sweep::over(GfnRange::ALL);
                let flush = self.kind.recover_huge_pages(&self.memory.shared(cpu(2)), &mut sweep, ratio);
                self.settle(flush);
            }
            Op::InvalidateAll => self.invalidate_all(),
            Op::ZapObsolete { batches } => self.zap_obsolete(batches),
            Op::CacheMmio { on } => match on {
                true => self.kind.cache_mmio(&self.memory.shared(cpu(0))),
                false => self.kind.stop_caching_mmio(),
            },
        }
    }

    fn enter(&mut self, vcpu: usize, on: usize) {
        if self.running.iter().flatten().any(|&(busy, _)| busy == on) {
            return;
        }
        self.running[vcpu] = None;
        let mut entered = self.vcpus[vcpu].enter(self.memory, cpu(on));
        if entered.is_obsolete() {
            drop(entered);
            let root = self.new_root(vcpu);
            let _ = self.vcpus[vcpu].set_root(root);
            entered = self.vcpus[vcpu].enter(self.memory, cpu(on));
            assert!(!entered.is_obsolete(), "D7");
        }
        let cached = self.tlb.entry((on, vcpu)).or_default();
        match entered.flush() {
            TagFlush::All | TagFlush::Address(_) => cached.clear(),
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
        let space = space_of(vcpu);
        let expected = self.expected(space, gfn);
        if use_tlb {
            let cached = self.tlb[&(on, vcpu)].iter().find(|cached| {
                (cached.first..cached.first + cached.pages).contains(&gfn)
                    && (cached.writable && cached.dirty || !write)
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
                        assert!(!(write && self.is_tracked(gfn)), "D6");
                    }
                }
                if write {
                    self.note_write(space, gfn);
                }
                return;
            }
        }
        // A4: a bounded number of faults, then the access succeeds or must be emulated.
        for _ in 0..8 {
            let (root, gpa) = (self.vcpus[vcpu].root(), Gfn::new(gfn).unwrap().gpa());
            let walked = self.walker(root).try_walk(gfn, write, kind == AccessKind::Execute);
            if walked == Err(Exit::Misconfiguration)
                && self.kind.cached_mmio(&self.memory.shared(cpu(on)), root, gpa).is_some()
            {
                return assert_eq!(expected, None, "I1");
            }
            if let Ok(hit) = walked {
                let (pfn, read_only) = expected.expect("A3: mapped, but no slot");
                assert_eq!(hit.pfn, pfn, "A1");
                assert!(!(hit.writable && read_only), "B3");
                assert!(!(hit.writable && self.is_tracked(gfn)), "D6");
                if write {
                    self.note_write(space, gfn);
                }
                let base = hit.pfn - (gfn - hit.first);
                let cached = Cached {
                    first: hit.first,
                    pages: hit.pages,
                    pfn: base,
                    writable: hit.writable,
                    dirty: write || self.machine.flags().1 == 0,
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
            let shared = self.memory.shared(cpu(on));
            let fast = self.kind.fast_fault(&shared, &mut self.cache, root, gpa, kind);
            let outcome =
                fast.unwrap_or_else(|| self.kind.fault_on(&shared, &mut self.cache, root, gpa, kind));
            drop(shared);
            self.tables.fill(&mut self.cache);
            match (outcome, expected) {
                (FaultOutcome::Mmio(at), None) => return assert_eq!(at, gpa),
                (FaultOutcome::ReadOnly(at), Some((_, true))) if write => return assert_eq!(at, gpa),
                (FaultOutcome::WriteTracked(at), Some((_, false))) if write && self.is_tracked(gfn) => {
                    return assert_eq!(at, gpa);
                }
                (FaultOutcome::Mapped | FaultOutcome::Spurious, Some(_)) => {}
                _ => panic!("A2: {outcome:?} where {expected:?} is expected"),
            }
            self.enter(vcpu, on);
        }
        panic!("A4: livelock");
    }

    /// A guest has written the page.
    fn note_write(&mut self, space: Space, gfn: u64) {
        if let Some(slot) = self.slot_of(space, gfn).filter(|&slot| self.logged[slot].is_some()) {
            self.written.insert((slot, gfn));
        }
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
        self.doom(Spaces::all(), gfn, pages, protect, self.memory.shootdown().requested());
    }

    /// What vCPUs that see the slot have of it is on notice.
    fn doom_slot(&mut self, slot: usize) {
        let (start, pages, _) = SLOTS[slot];
        self.doom(SPACES[slot], start, pages, false, self.memory.shootdown().requested());
    }

    /// Cached translations of the range (those that permit writes, if it was only protected) are on notice.
    fn doom(&mut self, spaces: Spaces, gfn: u64, pages: u64, writable_only: bool, generation: Generation) {
        let tlbs = self.tlb.iter_mut().filter(|&(&(_, vcpu), _)| spaces.contains(space_of(vcpu).into()));
        for cached in tlbs.flat_map(|(_, cached)| cached) {
            let meets = cached.first < gfn + pages && gfn < cached.first + cached.pages;
            if meets && (cached.writable || !writable_only) && cached.doomed.is_none() {
                cached.doomed = Some(generation);
            }
        }
    }

    fn insert_slot(&mut self, slot: usize, read_only: bool) {
        let (start, pages, cookie) = SLOTS[slot];
        let new = Slot { spaces: SPACES[slot], ..Slot::new(range(start, pages), flags(read_only), cookie) };
        if self.slots[slot].is_none() {
            self.memory.backing().provide_notes(cookie, start, pages);
        }
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
        if self.expected(Space::Normal, gfn).is_some() {
            let gpa = Gfn::new(gfn).unwrap().gpa();
            let outcome =
                self.kind.fault(&self.memory.shared(cpu(1)), &mut self.cache, gpa, AccessKind::Read);
            assert_eq!(outcome, FaultOutcome::Retry, "E1");
        }
        self.memory.backing().move_block(gfn);
        drop(invalidation);
    }

    /// Maps a range ahead of its faults. What it maps is judged as the rest of the tree is; here, that it maps all.
    fn populate(&mut self, vcpu: usize, gfn: u64, pages: u64) {
        let (root, mut left) = (self.vcpus[vcpu].root(), range(gfn, pages));
        let stopped = loop {
            let shared = self.memory.shared(cpu(1));
            let progress = self.kind.populate(&shared, &mut self.cache, root, &mut left);
            drop(shared);
            self.tables.fill(&mut self.cache);
            if progress != PopulateProgress::NeedTables
                && (progress != PopulateProgress::Batch || left.is_empty())
            {
                break progress;
            }
        };
        let obsolete = self.kind.roots().all(|live| live != root) || {
            let mut mmu = Mmu::new(self.vcpus[vcpu].role(), root);
            mmu.enter(self.memory, cpu(CPUS)).is_obsolete()
        };
        match stopped {
            PopulateProgress::Batch => assert!(left.is_empty()),
            PopulateProgress::Retry => assert!(obsolete, "A4"),
            PopulateProgress::NotRam(at) => {
                let first = Gfn::new(left.start()).unwrap();
                assert_eq!((at, self.expected(space_of(vcpu), left.start())), (first.gpa(), None), "A2");
            }
            other => panic!("A2: {other:?}"),
        }
        if left.start() > gfn {
            let mut mapped = 0;
            self.walker(root).check(&mut |leaf| {
                let (first, end) = (leaf.gfn.max(gfn), (leaf.gfn + leaf.pages).min(left.start()));
                mapped += end.saturating_sub(first);
            });
            assert_eq!(mapped, left.start() - gfn, "every page on the way is mapped");
        }
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

    /// B3, B6, D6, H1, H4 of one leaf.
    fn check_leaf(&self, space: Space, leaf: &Found) {
        for probe in [0, leaf.pages / 2, leaf.pages - 1] {
            let expected = self.expected(space, leaf.gfn + probe);
            let (want, read_only) = expected.expect("B3: a leaf outside its slot");
            assert_eq!(leaf.pfn + probe, want, "A1, D8");
            assert_eq!(!leaf.host_writable, read_only, "B3: host-writable follows the slot");
        }
        let executable = leaf.pages == 1 || !self.no_huge_execute;
        assert_eq!((leaf.rights.read, leaf.rights.execute), (true, [executable; 2]), "B6");
        let tracked = self.tracked.keys().any(|&gfn| (leaf.gfn..leaf.gfn + leaf.pages).contains(&gfn));
        assert!(!(tracked && (leaf.pages != 1 && leaf.host_writable || leaf.mmu_writable)), "D6: {leaf:?}");
        let Some(slot) = self.slot_of(space, leaf.gfn) else { return };
        let Some(dirty_bits) = self.logged[slot].filter(|_| leaf.rights.write) else { return };
        assert!(leaf.pages == 1 || !self.armed[slot], "H4: {leaf:?}");
        if leaf.pages == 1 && !(dirty_bits && self.machine.flags().1 != 0) {
            assert!(self.log_word(slot, leaf.gfn), "H1: {leaf:?} can be written unnoticed");
        }
    }

    /// The whole tree, after each operation.
    fn check(&self) {
        let mut sum = Tally::default();
        for root in self.kind.roots() {
            let tally = self.walker(root).check(&mut |leaf| self.check_leaf(root.space(), leaf));
            sum.tables += tally.tables;
            sum.splits += tally.splits;
            sum.leaves.iter_mut().zip(tally.leaves).for_each(|(sum, leaves)| *sum += leaves);
        }
        let counts = PageCounts { leaves: sum.leaves, tables: sum.tables };
        assert_eq!(self.kind.execute_splits(), sum.splits, "D4");
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

pub(crate) fn run<M: Machine>(machine: M, five_level: bool, largest: PageSize, ops: &[Op]) {
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
        logged: [None; SLOTS.len()],
        armed: [false; SLOTS.len()],
        written: HashSet::new(),
        tracked: HashMap::new(),
        no_huge_execute: false,
        vcpus: (0..VCPUS).map(|_| Mmu::new(role, kind.root())).collect(),
        running: (0..VCPUS).map(|_| None).collect(),
        tlb: HashMap::new(),
    };
    tables.fill(&mut world.cache);
    let smm = kind.get_root(&mut memory.exclusive(cpu(0)), &mut world.cache, DirectRole::SMM).unwrap();
    let _ = world.vcpus[1].set_root(smm);
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
