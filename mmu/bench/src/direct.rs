//! The direct kind: faults one by one, and population of a gigabyte.
use std::hint::black_box;

use mmu::{
    AccessKind, DirectMmu, FaultOutcome, Gfn, GfnRange, Npt, NptHost, PageSize, PhysTables, PopulateProgress,
    Sweep, TableCache, VmMemory,
};

use crate::meter::Meter;
use crate::pool::Pool;
use crate::ram::{Ram, CPU, GIB};

/// The kind that is measured.
pub(crate) type Kind = DirectMmu<Npt, PhysTables>;

/// Tables that the faults of one measurement go into; the first page of each is mapped beforehand.
pub(crate) const TABLES: u64 = 8;

/// Faults in one measurement.
pub(crate) const FAULTS: u64 = TABLES * 511;

/// A VM with a gigabyte.
pub(crate) struct Vm {
    pub(crate) memory: VmMemory<Ram>,
    pub(crate) kind: Kind,
    pub(crate) cache: TableCache,
}

/// A kind with a root from `pool`.
pub(crate) fn kind(memory: &VmMemory<Ram>, pool: &Pool) -> Kind {
    let host = NptHost { five_level: false, max_phys_addr: 48, no_execute: true, largest: PageSize::Size1G };
    // SAFETY: table pages are ordinary memory of this process, at their own address.
    let tables = unsafe { PhysTables::new(0) };
    DirectMmu::new(memory, Npt::new(&host), tables, pool.table_page(), 40, PageSize::Size1G)
}

impl Vm {
    /// With nothing mapped, in pages of at most `largest`.
    pub(crate) fn new(largest: PageSize) -> Self {
        let pool = Pool::common();
        pool.reset();
        let memory = Ram::new(GIB, 0, largest).into_memory();
        let kind = kind(&memory, pool);
        let mut cache = TableCache::new();
        pool.fill(&mut cache);
        Self { memory, kind, cache }
    }

    /// With the first page of each table mapped, or all pages.
    fn with_tables(all: bool) -> Self {
        let mut vm = Self::new(PageSize::Size4K);
        for gfn in (0..TABLES * 512).step_by(if all { 1 } else { 512 }) {
            assert_eq!(vm.fault(gfn), FaultOutcome::Mapped);
            Pool::common().fill(&mut vm.cache);
        }
        vm
    }

    #[inline(always)]
    fn fault(&mut self, gfn: u64) -> FaultOutcome {
        let gpa = black_box(Gfn::new_truncate(gfn).gpa());
        self.kind.fault(&self.memory.shared(CPU), &mut self.cache, gpa, AccessKind::Write)
    }

    /// Maps the gigabyte ahead of its faults.
    #[inline(never)]
    pub(crate) fn populate(&mut self) {
        let mut left = GfnRange::new(Gfn::default(), GIB).expect("fits");
        while !left.is_empty() {
            let root = self.kind.root();
            let shared = self.memory.shared(CPU);
            let progress = self.kind.populate(&shared, &mut self.cache, root, &mut left);
            drop(shared);
            assert!(matches!(progress, PopulateProgress::Batch | PopulateProgress::NeedTables));
            Pool::common().fill(&mut self.cache);
        }
    }
}

/// Frames of the pages that faults map.
pub(crate) fn fault_frames() -> impl Iterator<Item = u64> {
    (0..TABLES).flat_map(|table| (1..512).map(move |page| table * 512 + page))
}

/// A fault on a page that is not mapped, its table present.
pub(crate) fn fault(meter: Meter<'_>) {
    meter.measure(
        FAULTS,
        || Vm::with_tables(false),
        |vm| fault_frames().for_each(|gfn| assert_eq!(vm.fault(gfn), FaultOutcome::Mapped)),
    );
}

/// A fault on a page that is mapped already.
pub(crate) fn spurious(meter: Meter<'_>) {
    meter.measure(
        FAULTS,
        || Vm::with_tables(true),
        |vm| fault_frames().for_each(|gfn| assert_eq!(vm.fault(gfn), FaultOutcome::Spurious)),
    );
}

/// The first write to a page after it was write-protected.
pub(crate) fn fast(meter: Meter<'_>) {
    let prepare = || {
        let vm = Vm::with_tables(true);
        let mut sweep = Sweep::over(GfnRange::new(Gfn::default(), GIB).expect("fits"));
        while !sweep.is_done() {
            drop(vm.kind.write_protect(&vm.memory.shared(CPU), &mut sweep));
        }
        vm
    };
    meter.measure(FAULTS, prepare, |vm| {
        for gfn in fault_frames() {
            let (root, gpa) = (vm.kind.root(), black_box(Gfn::new_truncate(gfn).gpa()));
            let shared = vm.memory.shared(CPU);
            let outcome = vm.kind.fast_fault(&shared, &mut vm.cache, root, gpa, AccessKind::Write);
            assert_eq!(outcome, Some(FaultOutcome::Mapped));
        }
    });
}

fn populate(meter: Meter<'_>, largest: PageSize) {
    meter.measure(1, || Vm::new(largest), Vm::populate);
}

/// A gigabyte in pages of 4 KiB.
pub(crate) fn populate_4k(meter: Meter<'_>) {
    populate(meter, PageSize::Size4K);
}

/// A gigabyte in pages of 2 MiB.
pub(crate) fn populate_2m(meter: Meter<'_>) {
    populate(meter, PageSize::Size2M);
}

/// A gigabyte in one page.
pub(crate) fn populate_1g(meter: Meter<'_>) {
    populate(meter, PageSize::Size1G);
}

/// Prints what the tables of a populated gigabyte take, by page size: `mmu-host memory SIZE BYTES`.
pub(crate) fn table_bytes() {
    for (name, largest) in [("4k", PageSize::Size4K), ("2m", PageSize::Size2M), ("1g", PageSize::Size1G)] {
        let mut vm = Vm::new(largest);
        vm.populate();
        let counts = vm.kind.page_counts();
        assert_eq!(counts.of(largest) * largest.pages(), GIB);
        println!("mmu-host memory {name} {}", counts.tables * mmu::PAGE_SIZE);
    }
}
