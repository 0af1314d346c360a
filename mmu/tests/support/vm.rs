//! A VM for tests of the direct kind, case by case.
use mmu::{
    AccessKind, CpuId, CpuRole, Cr0, Cr4, DirectMmu, Efer, FaultOutcome, Flush, Gfn, GfnRange, Gpa, GuestCpu,
    Mmu, PageCounts, PageSize, PagingRegs, Shared, Slot, SlotFlags, SplitProgress, Sweep, TableCache,
    VmMemory,
};

use super::blocks::Blocks;
use super::hardware::{Found, Tally, Walker};
use super::machines::Machine;
use super::tables::HostTables;

pub const CPU: CpuId = CpuId::BOOT;
pub const RW: SlotFlags = SlotFlags::empty();
pub const GIB: u64 = 1 << 18;

pub struct Vm<M: Machine> {
    pub machine: M,
    pub memory: VmMemory<Blocks>,
    pub kind: DirectMmu<M::Format, HostTables>,
    pub tables: HostTables,
    pub cache: TableCache,
}

impl<M: Machine> Vm<M> {
    pub fn new(machine: M, slots: &[(u64, u64, SlotFlags, u64)]) -> Self {
        let memory = VmMemory::new(Blocks::default());
        for &(start, pages, flags, cookie) in slots {
            let slot = Slot::new(range(start, pages), flags, cookie);
            memory.backing().provide_notes(cookie, start, pages);
            memory.exclusive(CPU).insert_slot(&slot).unwrap();
        }
        let tables = HostTables::new(2048);
        let root = tables.allocate();
        let kind = DirectMmu::new(&memory, machine.format(), tables.clone(), root, 46, PageSize::Size1G);
        let mut cache = TableCache::new();
        tables.fill(&mut cache);
        Self { machine, memory, kind, tables, cache }
    }

    pub fn fault(&mut self, gfn: u64, access: AccessKind) -> FaultOutcome {
        let outcome = self.kind.fault(&self.memory.shared(CPU), &mut self.cache, gpa(gfn), access);
        self.tables.fill(&mut self.cache);
        outcome
    }

    pub fn map(&mut self, gfn: u64) {
        assert_eq!(self.fault(gfn, AccessKind::Write), FaultOutcome::Mapped);
    }

    pub fn walker(&self) -> Walker<'_, M> {
        let root = self.kind.root();
        assert_eq!(root.level as u32, self.machine.levels());
        Walker { tables: &self.tables, root: root.hpa.pfn().number(), machine: self.machine }
    }

    /// Frame and page size that the hardware finds, for a write.
    pub fn hit(&self, gfn: u64) -> Option<(u64, u64)> {
        self.walker().walk(gfn, true, false).map(|hit| (hit.pfn, hit.pages))
    }

    /// D4: the counters equal a scan; no table page is lost.
    pub fn check(&self) -> PageCounts {
        let mut sum = Tally::default();
        for root in self.kind.roots() {
            let walker = Walker { root: root.hpa.pfn().number(), ..self.walker() };
            let tally = walker.check(&mut |_| {});
            sum.tables += tally.tables;
            sum.splits += tally.splits;
            for (sum, leaves) in sum.leaves.iter_mut().zip(tally.leaves) {
                *sum += leaves;
            }
        }
        let counts = self.kind.page_counts();
        assert_eq!(counts, PageCounts { leaves: sum.leaves, tables: sum.tables });
        assert_eq!(self.kind.execute_splits(), sum.splits);
        counts
    }

    pub fn zap(&self, start: u64, pages: u64) {
        let mut sweep = Sweep::over(range(start, pages));
        while !sweep.is_done() {
            drop(self.kind.zap(&self.memory.shared(CPU), &mut sweep));
        }
    }

    pub fn reclaim(&self) -> usize {
        self.kind.reclaim(&self.memory, usize::MAX, |page| self.tables.release(page))
    }

    /// The leaf for `gfn` as the tree has it, under the root of the empty role.
    pub fn leaf(&self, gfn: u64) -> Option<Found> {
        let mut found = None;
        self.walker().check(&mut |leaf| {
            if (leaf.gfn..leaf.gfn + leaf.pages).contains(&gfn) {
                found = Some(*leaf);
            }
        });
        found
    }

    /// Runs batches of an operation over `sweep` to its end; whether any of them asked for a flush.
    pub fn run<'a>(
        &'a self,
        mut sweep: Sweep,
        batch: impl Fn(&Shared<'a, Blocks>, &mut Sweep) -> Flush<'a, M::Format, HostTables>,
    ) -> bool {
        let mut needed = false;
        while !sweep.is_done() {
            needed |= batch(&self.memory.shared(CPU), &mut sweep).is_needed();
        }
        needed
    }

    /// Splits all of a range to 4 KiB.
    pub fn split(&mut self, mut sweep: Sweep) {
        while !sweep.is_done() {
            let shared = self.memory.shared(CPU);
            let progress = self.kind.split(&shared, &mut self.cache, &mut sweep, PageSize::Size4K);
            drop(shared);
            if progress == SplitProgress::NeedTables {
                self.tables.fill(&mut self.cache);
            }
        }
        self.tables.fill(&mut self.cache);
    }

    /// Collapses what can be.
    pub fn collapse(&self, mut sweep: Sweep) {
        while !sweep.is_done() {
            drop(self.kind.collapse(&self.memory.exclusive(CPU), &mut sweep));
        }
    }

    /// The frames that the log of the slot at `start` has, and takes them out.
    pub fn harvest(&self, start: u64) -> Vec<u64> {
        let shared = self.memory.shared(CPU);
        let log = shared.dirty_log(Gfn::new_truncate(start)).expect("logged");
        let mut found = vec![];
        for index in 0..log.words() {
            let frames = log.frames(index).unwrap();
            let mask = log.clear(index, u64::MAX);
            found.extend((0..64).filter(|bit| mask >> bit & 1 != 0).map(|bit| frames.start() + bit));
            drop(self.kind.rearm_pages(&shared, Gfn::new_truncate(frames.start()), mask));
        }
        found
    }

    /// No table page is left anywhere when the kind is gone.
    pub fn finish(mut self) {
        self.check();
        self.tables.drain(&mut self.cache);
        self.kind.dismantle(|page| self.tables.release(page));
        assert_eq!(self.tables.in_use(), 0);
    }
}

pub fn range(start: u64, pages: u64) -> GfnRange {
    GfnRange::new(Gfn::new(start).unwrap(), pages).unwrap()
}

pub fn gpa(gfn: u64) -> Gpa {
    Gfn::new_truncate(gfn).gpa()
}

pub fn mmu_of<M: Machine>(vm: &Vm<M>) -> Mmu {
    let regs = PagingRegs { cr0: Cr0::PG, cr4: Cr4::PAE, efer: Efer::LMA };
    let cpu = GuestCpu { max_phys_addr: 46, gib_pages: true, pse36: true, amd: true };
    Mmu::new(CpuRole::new(&regs, &cpu), vm.kind.root())
}
