//! The shadow kind: faults, emulated writes to the guest's tables, and changes of its root. A nested fault is the same on a
//! shadow of L1's nested tables.
use std::cell::UnsafeCell;
use std::hint::black_box;

use mmu::{
    Access, AccessKind, Address, CpuRole, Cr0, Cr4, Efer, Gpa, GuestCpu, Gva, Level, Mmu, NGpa, Npt, NptHost,
    Pae, PaeHost, PageSize, PagingContext, PagingRegs, PagingState, PhysTables, Root, RootRole, ShadowBucket,
    ShadowFault, ShadowMmu, ShadowPage, ShadowStore, TableCache, Tags, VcpuMode, VmMemory, WalkRegs,
};

use crate::meter::Meter;
use crate::pool::Pool;
use crate::ram::{Ram, CPU};

/// The guest's two address spaces: a root each, at these addresses, and the same tables below.
const ROOTS: [u64; 2] = [0x1000, 0x2000];
/// Tables of its lowest level, from this address on. Their entries map the frames behind them.
const LEAVES: u64 = 0x5000;
const TABLES: u64 = 8;
/// Frames of the guest, and how many of them are tables and have contents.
const PAGES: u64 = 8192;
const CONTENTS: u64 = 16;
/// The first frame that the tables map.
const FIRST: u64 = 512;

/// One page in so many is used by the guest: each of them faults, for the kind maps what was used around a fault.
const APART: u64 = 8;
/// Those pages that are not the first ones of their tables.
const FAULTS: u64 = TABLES * (512 / APART - 1);

const QUOTA: usize = 64;

/// The pages of [`FAULTS`].
fn pages() -> impl Iterator<Item = u64> {
    (0..TABLES * 512).step_by(APART as usize).filter(|page| page % 512 != 0)
}

/// Memory for the one shadow kind that there is at a time.
struct Store(UnsafeCell<(Vec<ShadowPage>, Vec<ShadowBucket>)>);

impl Store {
    fn new() -> Self {
        let pages = (0..QUOTA).map(|_| ShadowPage::UNUSED).collect();
        Self(UnsafeCell::new((pages, vec![ShadowBucket::EMPTY; QUOTA])))
    }

    /// # Safety
    ///
    /// Nothing uses what was lent before, and the store outlives what is lent.
    unsafe fn lend(&self) -> ShadowStore<'static> {
        // SAFETY: as promised.
        let (pages, buckets) = unsafe { &mut *self.0.get() };
        ShadowStore { pages, buckets }
    }
}

/// What the guest's CPU is.
const CPU_MODEL: GuestCpu = GuestCpu { max_phys_addr: 46, gib_pages: true, pse36: true, amd: true };

/// Whose tables are shadowed: a guest's own, or those that it keeps for its guest.
#[derive(Clone, Copy)]
enum Reading {
    Guest,
    Nested,
}

impl Reading {
    fn role(self) -> CpuRole {
        let regs = PagingRegs { cr0: Cr0::PG | Cr0::WP, cr4: Cr4::PAE, efer: Efer::LMA | Efer::NXE };
        match self {
            Self::Guest => CpuRole::new(&regs, &CPU_MODEL),
            Self::Nested => CpuRole::nested(&regs, &CPU_MODEL, false),
        }
    }
}

struct World {
    memory: VmMemory<Ram>,
    kind: ShadowMmu<'static, Npt, PhysTables>,
    cache: TableCache,
    root: Root,
}

impl World {
    fn new(store: &Store, reading: Reading) -> Self {
        let pool = Pool::common();
        pool.reset();
        let ram = Ram::new(PAGES, CONTENTS, PageSize::Size4K);
        for root in ROOTS {
            ram.set(root, 0x3067);
        }
        ram.set(0x3000, 0x4067);
        for table in 0..TABLES {
            let at = LEAVES + table * 0x1000;
            ram.set(0x4000 + table * 8, at | 0x67);
            for page in 0..512 {
                let used = if page % APART == 0 { 0x60 } else { 0 };
                ram.set(at + page * 8, (FIRST + table * 512 + page) << 12 | 7 | used);
            }
        }
        let memory = ram.into_memory();
        let host =
            NptHost { five_level: false, max_phys_addr: 48, no_execute: true, largest: PageSize::Size2M };
        // SAFETY: table pages are ordinary memory of this process, at their own address.
        let tables = unsafe { PhysTables::new(0) };
        // SAFETY: the kind before this one is gone, and the caller's store stays until all worlds are.
        let store = unsafe { store.lend() };
        let pae = Pae::new(&PaeHost { max_phys_addr: 48 });
        let mut kind =
            ShadowMmu::new(&memory, Npt::new(&host), pae, tables, store).expect("the store is large enough");
        let mut cache = TableCache::new();
        pool.fill(&mut cache);
        let root = root_of(&memory, &mut kind, &mut cache, reading, ROOTS[0]);
        pool.fill(&mut cache);
        Self { memory, kind, cache, root }
    }

    /// With the first page of each table shadowed, or all that are used.
    fn shadowed<A: Address>(mut self, context: &PagingContext<A, Gpa>, all: bool) -> Self {
        for page in (0..TABLES * 512).step_by(if all { APART as usize } else { 512 }) {
            assert_eq!(self.fault(context, page), ShadowFault::Mapped);
            Pool::common().fill(&mut self.cache);
        }
        self
    }

    /// A page fault's whole way: the walk of the guest's tables, and what its shadow becomes.
    #[inline(always)]
    fn fault<A: Address>(&mut self, context: &PagingContext<A, Gpa>, page: u64) -> ShadowFault {
        let (regs, access) =
            (WalkRegs { cr3: ROOTS[0], ..WalkRegs::default() }, Access::at_cpl(AccessKind::Write, 3));
        let address = black_box(A::from_bits_truncate(page << 12));
        let found = context.walk(&self.memory.shared(CPU), &regs, address, access);
        let walk = found.expect("the tables permit everything");
        let mut guard = self.memory.exclusive(CPU);
        self.kind.fault(&mut guard, &mut self.cache, self.root, &walk, address, access).outcome
    }
}

fn root_of(
    memory: &VmMemory<Ram>,
    kind: &mut ShadowMmu<'static, Npt, PhysTables>,
    cache: &mut TableCache,
    reading: Reading,
    cr3: u64,
) -> Root {
    let role = RootRole::shadow(black_box(reading.role()), Level::L4, VcpuMode::default(), true);
    let mut guard = memory.exclusive(CPU);
    kind.get_root(&mut guard, cache, role, black_box(cr3), [0; 4]).outcome.expect("there is room")
}

const GUEST: Reading = Reading::Guest;

fn faults<A: Address>(meter: Meter<'_>, reading: Reading) {
    let store = Store::new();
    let context = PagingContext::<A, Gpa>::new(reading.role());
    meter.measure(
        FAULTS,
        || World::new(&store, reading).shadowed(&context, false),
        |world| {
            for page in pages() {
                assert_eq!(world.fault(&context, page), ShadowFault::Mapped);
            }
        },
    );
}

/// A page fault that the guest's tables permit, with the walk of those, the shadow's tables present.
pub(crate) fn fault(meter: Meter<'_>) {
    faults::<Gva>(meter, GUEST);
}

/// The same for L2: a nested page fault that L1's tables permit.
pub(crate) fn nested_fault(meter: Meter<'_>) {
    faults::<NGpa>(meter, Reading::Nested);
}

/// A write to an entry of a shadowed table that was emulated: the store, and what its shadow becomes.
pub(crate) fn entry_write(meter: Meter<'_>) {
    let store = Store::new();
    let context = PagingContext::<Gva, Gpa>::new(GUEST.role());
    meter.measure(
        FAULTS,
        || World::new(&store, GUEST).shadowed(&context, true),
        |world| {
            for page in pages() {
                let at = black_box(Gpa::new_truncate(LEAVES + page * 8));
                let entry = (FIRST + page) << 12 | 0x65;
                world.memory.shared(CPU).write(at, &entry.to_le_bytes()).expect("it is RAM");
                let _ = world.kind.track_write(&mut world.memory.exclusive(CPU), at, 8);
            }
        },
    );
}

/// A vCPU whose registers change, and its roots.
struct Switching {
    world: World,
    mmu: Mmu,
}

impl Switching {
    fn new(store: &Store) -> Self {
        let mut world = World::new(store, GUEST);
        world.kind.put_root(&mut world.memory.exclusive(CPU), world.root);
        let regs =
            PagingRegs { cr0: Cr0::PG | Cr0::WP, cr4: Cr4::PAE | Cr4::PCIDE, efer: Efer::LMA | Efer::NXE };
        let state = PagingState { regs, cr3: ROOTS[0], ..PagingState::RESET };
        let mmu = Mmu::shadow(state, CPU_MODEL, Level::L4, true, Tags::PerRoot);
        let mut switching = Self { world, mmu };
        switching.carry_out();
        switching
    }

    /// What the event left to be done: nothing, where a root is kept that is up to date.
    #[inline(always)]
    fn carry_out(&mut self) {
        if self.mmu.has_work() {
            let World { memory, kind, cache, .. } = &mut self.world;
            Pool::common().fill(cache);
            let done = self.mmu.carry_out(kind, &mut memory.exclusive(CPU), cache);
            assert!(done.outcome.is_ok());
        }
    }

    #[inline(always)]
    fn load_cr3(&mut self, value: u64) {
        let _ = self.mmu.mov_to_cr3(black_box(value), [0; 4]);
        self.carry_out();
    }

    #[inline(always)]
    fn load_cr0(&mut self, cr0: Cr0) {
        let _ = self.mmu.mov_to_cr0(black_box(cr0), Efer::LMA | Efer::NXE, [0; 4]);
        self.carry_out();
    }
}

/// Events in one measurement.
const SWITCHES: u64 = 1000;

/// Bit 63 of the operand of MOV to CR3: translations are kept.
const KEEP: u64 = 1 << 63;

fn cr3_switches(meter: Meter<'_>, order: u64) {
    let store = Store::new();
    let prepare = || {
        let mut switching = Switching::new(&store);
        [1, 0].into_iter().for_each(|of| switching.load_cr3(ROOTS[of] | of as u64));
        switching
    };
    meter.measure(SWITCHES, prepare, |switching| {
        for turn in 1..=SWITCHES {
            let of = turn % 2;
            switching.load_cr3(ROOTS[of as usize] | of | order);
        }
    });
}

/// MOV to CR3 to an address space that was run before, its translations kept (PCIDs, bit 63).
pub(crate) fn cr3_switch(meter: Meter<'_>) {
    cr3_switches(meter, KEEP);
}

/// The same with its translations flushed, so that its shadow is brought up to date.
pub(crate) fn cr3_flush(meter: Meter<'_>) {
    cr3_switches(meter, 0);
}

/// CR0.WP changes, and both roles were run before.
pub(crate) fn wp_toggle(meter: Meter<'_>) {
    let store = Store::new();
    let states = [Cr0::PG | Cr0::WP, Cr0::PG];
    let prepare = || {
        let mut switching = Switching::new(&store);
        [1, 0].into_iter().for_each(|of| switching.load_cr0(states[of]));
        switching
    };
    meter.measure(SWITCHES, prepare, |switching| {
        for turn in 1..=SWITCHES {
            switching.load_cr0(states[turn as usize % 2]);
        }
    });
}
