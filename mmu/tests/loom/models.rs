//! The models, and a main that runs them the way the test harness would.
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool as Flag, AtomicU64 as Plain, Ordering as Std};
use std::sync::{Arc, Mutex};

use loom::thread;

use crate::access::AccessKind;
use crate::addr::{Gfn, GfnRange, Pfn};
use crate::cpu::CpuId;
use crate::format::{Entry, EntryFormat, Npt, NptHost, Writability};
use crate::kind::{DirectMmu, FaultOutcome, PopulateProgress, Sweep};
use crate::level::{Level, PageSize, ENTRIES};
use crate::memory::{Backing, LogBy, NoPage, RamAddr, Resolved, Slot, SlotFlags, SlotNotes, VmMemory};
use crate::role::{CpuRole, Cr0, Cr4, Efer, GuestCpu, PagingRegs};
use crate::sync::{fence, AtomicU64, Ordering};
use crate::tables::{EntryCell, TableCache, TableFrame, TableMemory, TablePage};
use crate::vcpu::Mmu;

/// Executions that were looked at so far.
static EXECUTIONS: Plain = Plain::new(0);

/// Preemptions per execution: what bounds a model. More than two have not shown anything that two do not.
const PREEMPTIONS: usize = 5;

const MODELS: [(&str, fn()); 14] = [
    ("litmus_fences_order_relaxed_accesses", litmus_fences_order_relaxed_accesses),
    ("litmus_without_fences_both_can_miss", litmus_without_fences_both_can_miss),
    ("concurrent_populate", concurrent_populate),
    ("populate_of_neighbours_without_tables", populate_of_neighbours_without_tables),
    ("a_chain_appears_whole", a_chain_appears_whole),
    ("populate_against_zap_and_reclaim", populate_against_zap_and_reclaim),
    ("a_range_is_populated_beside_a_fault", a_range_is_populated_beside_a_fault),
    ("a_range_is_populated_against_zap_and_reclaim", a_range_is_populated_against_zap_and_reclaim),
    ("fast_fault_against_write_protection", fast_fault_against_write_protection),
    ("fast_fault_against_the_dirty_log", fast_fault_against_the_dirty_log),
    ("frozen_entries_take_no_page", frozen_entries_take_no_page),
    ("invalidation_against_fault", invalidation_against_fault),
    ("entry_against_shootdown", entry_against_shootdown),
    ("entry_against_obsolete_roots", entry_against_obsolete_roots),
];

pub fn main() {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let wanted = |name: &str| filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()));
    let (mut passed, mut failed) = (0, 0);
    for (name, model) in MODELS.into_iter().filter(|(name, _)| wanted(name)) {
        let (begin, before) = (std::time::Instant::now(), EXECUTIONS.load(Std::Relaxed));
        match catch_unwind(AssertUnwindSafe(model)) {
            Ok(()) => {
                passed += 1;
                println!("test {name} ... ok");
            }
            Err(_) => {
                failed += 1;
                println!("test {name} ... FAILED");
            }
        }
        eprintln!("    {} executions, {:.1?}", EXECUTIONS.load(Std::Relaxed) - before, begin.elapsed());
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "test result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out"
    );
    std::process::exit(i32::from(failed != 0));
}

fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.max_branches = 20_000;
    builder.check(move || {
        EXECUTIONS.fetch_add(1, Std::Relaxed);
        model();
    });
}

/// Entries per table that the checker knows; the others are only there.
const MODELLED: usize = 2;
/// Frame number of the first table.
const FIRST: u64 = 0x100;

enum Cell {
    Modelled(AtomicU64),
    Plain(Plain),
}

impl EntryCell for Cell {
    fn load(&self) -> u64 {
        match self {
            Self::Modelled(cell) => cell.load(Ordering::Relaxed),
            Self::Plain(cell) => cell.load(Std::Relaxed),
        }
    }
    fn store(&self, entry: u64) {
        match self {
            Self::Modelled(cell) => cell.store(entry, Ordering::Relaxed),
            Self::Plain(cell) => cell.store(entry, Std::Relaxed),
        }
    }
    fn swap(&self, entry: u64) -> u64 {
        match self {
            Self::Modelled(cell) => cell.swap(entry, Ordering::Relaxed),
            Self::Plain(cell) => cell.swap(entry, Std::Relaxed),
        }
    }
    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        match self {
            Self::Modelled(cell) => {
                cell.compare_exchange(current, new, Ordering::Relaxed, Ordering::Relaxed).map(drop)
            }
            Self::Plain(cell) => cell.compare_exchange(current, new, Std::Relaxed, Std::Relaxed).map(drop),
        }
    }
    fn fence(order: core::sync::atomic::Ordering) {
        fence(order);
    }
}

/// Pages of tables; an access to one that was given back stops the model.
#[derive(Clone)]
struct Tables(Arc<Vec<(Vec<Cell>, Flag)>>);

impl Tables {
    fn new(count: usize) -> Self {
        let cell = |index| match index < MODELLED {
            true => Cell::Modelled(AtomicU64::new(0)),
            false => Cell::Plain(Plain::new(0)),
        };
        let page = || ((0..ENTRIES).map(cell).collect(), Flag::new(true));
        Self(Arc::new((0..count).map(|_| page()).collect()))
    }

    fn page(&self, index: usize) -> TablePage {
        TablePage::owned(Pfn::new_truncate(FIRST + index as u64))
    }

    fn release(&self, page: TablePage) {
        let page = &self.0[(page.into_frame().number() - FIRST) as usize];
        assert!(page.1.swap(false, Std::SeqCst), "given back twice");
    }
}

impl TableMemory for Tables {
    type Cell = Cell;

    fn cell<'a>(&'a self, table: &'a TableFrame, index: usize) -> &'a Cell {
        let page = &self.0[(table.pfn().number() - FIRST) as usize];
        assert!(page.1.load(Std::SeqCst), "C3: an entry of a page that was given back");
        &page.0[index]
    }
}

/// Memory of which every page is in the frame `frame` plus its number; the dirty log is the checker's.
struct Ram {
    frame: Plain,
    dirty: [AtomicU64; 1],
}

impl Backing for Ram {
    fn resolve(&self, at: &RamAddr, _: PageSize, _: AccessKind) -> Resolved {
        let pfn = Pfn::new_truncate(self.frame.load(Std::SeqCst) + at.slot_page());
        Resolved::Ram { pfn, size: PageSize::Size4K }
    }
    fn notes(&self, _: u64) -> SlotNotes<'_> {
        SlotNotes { dirty: &self.dirty, ..SlotNotes::default() }
    }
    fn read(&self, _: &RamAddr, _: &mut [u8]) -> Result<(), NoPage> {
        Err(NoPage)
    }
    fn write(&self, _: &RamAddr, _: &[u8]) -> Result<(), NoPage> {
        Err(NoPage)
    }
    fn load_u32(&self, _: &RamAddr) -> Result<u32, NoPage> {
        Err(NoPage)
    }
    fn load_u64(&self, _: &RamAddr) -> Result<u64, NoPage> {
        Err(NoPage)
    }
    fn compare_exchange_u32(&self, _: &RamAddr, _: u32, _: u32) -> Result<u32, NoPage> {
        Err(NoPage)
    }
    fn compare_exchange_u64(&self, _: &RamAddr, _: u64, _: u64) -> Result<u64, NoPage> {
        Err(NoPage)
    }
}

const FRAME: u64 = 0x1_0000;

struct Vm {
    memory: VmMemory<Ram>,
    kind: DirectMmu<Npt, Tables>,
    tables: Tables,
    next: Mutex<usize>,
}

fn cpu(number: usize) -> CpuId {
    CpuId::new(number).unwrap()
}

fn range(start: u64, pages: u64) -> GfnRange {
    GfnRange::new(Gfn::new_truncate(start), pages).unwrap()
}

impl Vm {
    fn new(pages: usize) -> Arc<Self> {
        let ram = Ram { frame: Plain::new(FRAME), dirty: [AtomicU64::new(0)] };
        let memory = VmMemory::new(ram);
        let slot = Slot::new(range(0, 64), SlotFlags::empty(), 0);
        memory.exclusive(cpu(0)).insert_slot(&slot).unwrap();
        let host =
            NptHost { five_level: false, max_phys_addr: 46, no_execute: true, largest: PageSize::Size4K };
        let tables = Tables::new(pages);
        let kind =
            DirectMmu::new(&memory, Npt::new(&host), tables.clone(), tables.page(0), 46, PageSize::Size4K);
        Arc::new(Self { memory, kind, tables, next: Mutex::new(1) })
    }

    fn cache(&self, pages: usize) -> TableCache {
        let mut cache = TableCache::new();
        let mut next = self.next.lock().unwrap();
        for _ in 0..pages {
            cache.push(self.tables.page(*next)).unwrap();
            *next += 1;
        }
        cache
    }

    fn fault(&self, on: usize, cache: &mut TableCache, gfn: u64, access: AccessKind) -> FaultOutcome {
        self.kind.fault(&self.memory.shared(cpu(on)), cache, Gfn::new_truncate(gfn).gpa(), access)
    }

    /// Maps these pages, before anything runs beside.
    fn populate(&self, gfns: &[u64]) {
        let mut cache = self.cache(3);
        for &gfn in gfns {
            assert_eq!(self.fault(0, &mut cache, gfn, AccessKind::Write), FaultOutcome::Mapped);
        }
    }

    /// One batch over the first pages.
    fn populate_range(&self, on: usize, cache: &mut TableCache, pages: u64) -> (PopulateProgress, bool) {
        let mut left = range(0, pages);
        let shared = self.memory.shared(cpu(on));
        let progress = self.kind.populate(&shared, cache, self.kind.root(), &mut left);
        (progress, left.is_empty())
    }

    /// The leaf for `gfn`, as a processor finds it.
    fn leaf(&self, gfn: u64) -> Option<u64> {
        let format = self.kind.format();
        let (mut table, mut level) = (self.kind.root().hpa.pfn(), self.kind.root().level);
        loop {
            let entry = self.tables.cell(&TableFrame::linked(table), level.index(gfn)).load();
            match format.entry(entry, level) {
                Entry::Table(child) => {
                    fence(Ordering::Acquire);
                    (table, level) = (child, level.down().unwrap());
                }
                Entry::Leaf => return Some(entry),
                Entry::Empty | Entry::Frozen | Entry::Mmio => return None,
            }
        }
    }

    fn mapped(&self) -> u64 {
        (0..MODELLED as u64).filter(|&gfn| self.leaf(gfn).is_some()).count() as u64
    }

    /// D4: what the counters say is what the tree has.
    fn check(&self) {
        assert_eq!(self.kind.page_counts().leaves[0], self.mapped(), "D4");
    }
}

/// Store buffering: two CPUs each write one word and read the other's. With fences, one of them sees the other.
fn litmus_fences_order_relaxed_accesses() {
    explore(|| {
        let words = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let other = {
            let words = words.clone();
            thread::spawn(move || {
                words[0].store(1, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                words[1].load(Ordering::Relaxed)
            })
        };
        words[1].store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let here = words[0].load(Ordering::Relaxed);
        assert!(here == 1 || other.join().unwrap() == 1, "both missed");
    });
}

/// The same without: both can miss, and the checker knows. (Otherwise the models below prove nothing about fences.)
fn litmus_without_fences_both_can_miss() {
    let missed = Arc::new(Flag::new(false));
    let seen = missed.clone();
    explore(move || {
        let words = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let other = {
            let words = words.clone();
            thread::spawn(move || {
                words[0].store(1, Ordering::Relaxed);
                words[1].load(Ordering::Relaxed)
            })
        };
        words[1].store(1, Ordering::Relaxed);
        let here = words[0].load(Ordering::Relaxed);
        if here == 0 && other.join().unwrap() == 0 {
            seen.store(true, Std::SeqCst);
        }
    });
    assert!(missed.load(Std::SeqCst));
}

/// Two CPUs map the same page, with tables there: one does, the other finds it done.
fn concurrent_populate() {
    explore(|| {
        let vm = Vm::new(5);
        vm.populate(&[1]);
        let there = vm.clone();
        let other = thread::spawn(move || there.fault(1, &mut TableCache::new(), 0, AccessKind::Write));
        let here = vm.fault(0, &mut TableCache::new(), 0, AccessKind::Write);
        let outcomes = [here, other.join().unwrap()];
        assert_eq!(
            outcomes.iter().filter(|&&outcome| outcome == FaultOutcome::Mapped).count(),
            1,
            "{outcomes:?}"
        );
        assert!(outcomes.contains(&FaultOutcome::Spurious), "{outcomes:?}");
        vm.check();
    });
}

/// Two CPUs map neighbours where not even tables are: both pages end up mapped under the same tables, and who lost has its
/// pages back, empty.
fn populate_of_neighbours_without_tables() {
    explore(|| {
        let vm = Vm::new(7);
        let (mut mine, mut theirs) = (vm.cache(3), vm.cache(3));
        let there = vm.clone();
        let other = thread::spawn(move || {
            let outcome = there.fault(1, &mut theirs, 1, AccessKind::Write);
            (outcome, theirs)
        });
        assert_eq!(vm.fault(0, &mut mine, 0, AccessKind::Write), FaultOutcome::Mapped);
        let (outcome, mut theirs) = other.join().unwrap();
        assert_eq!(outcome, FaultOutcome::Mapped);
        assert_eq!(vm.kind.page_counts().tables, 4);
        assert_eq!(vm.mapped(), 2);
        vm.check();
        let mut kept = 0;
        for page in std::iter::from_fn(|| mine.pop().or_else(|| theirs.pop())) {
            let frame = page.into_frame();
            kept += 1;
            for index in 0..ENTRIES {
                assert_eq!(vm.tables.cell(&TableFrame::linked(frame), index).load(), 0, "left behind");
            }
        }
        assert_eq!(kept, 3);
    });
}

/// Who finds the link to new tables finds what is in them.
fn a_chain_appears_whole() {
    explore(|| {
        let vm = Vm::new(4);
        let mut cache = vm.cache(3);
        let there = vm.clone();
        let other = thread::spawn(move || {
            let root = there.kind.root();
            let entry = there.tables.cell(&TableFrame::linked(root.hpa.pfn()), 0).load();
            fence(Ordering::Acquire);
            let linked = there.kind.format().link(entry).is_some();
            assert!(!linked || there.leaf(0).is_some(), "half of a chain");
        });
        assert_eq!(vm.fault(0, &mut cache, 0, AccessKind::Write), FaultOutcome::Mapped);
        other.join().unwrap();
        vm.check();
    });
}

/// One CPU maps a page while the other zaps the range and gives back the tables nobody can reach.
fn populate_against_zap_and_reclaim() {
    explore(|| {
        let vm = Vm::new(5);
        vm.populate(&[1]);
        let there = vm.clone();
        let other = thread::spawn(move || {
            let mut sweep = Sweep::over(range(0, 512));
            drop(there.kind.zap(&there.memory.shared(cpu(1)), &mut sweep));
            there.kind.reclaim(&there.memory, usize::MAX, |page| there.tables.release(page));
        });
        let outcome = vm.fault(0, &mut TableCache::new(), 0, AccessKind::Write);
        assert!(
            matches!(outcome, FaultOutcome::Mapped | FaultOutcome::Retry | FaultOutcome::NeedTables),
            "{outcome:?}"
        );
        other.join().unwrap();
        vm.check();
        vm.kind.reclaim(&vm.memory, usize::MAX, |page| vm.tables.release(page));
        assert_eq!(vm.kind.page_counts().tables, 3, "the table of leaves is gone");
        assert_eq!(vm.mapped(), 0, "what was mapped before the zap ended went with it");
    });
}

/// A range is populated where no tables are, while another CPU maps one of its pages: all are mapped under the same tables,
/// and who lost has its pages back, empty.
fn a_range_is_populated_beside_a_fault() {
    explore(|| {
        let vm = Vm::new(7);
        let (mut mine, mut theirs) = (vm.cache(3), vm.cache(3));
        let there = vm.clone();
        let other = thread::spawn(move || {
            let outcome = there.fault(1, &mut theirs, 1, AccessKind::Write);
            (outcome, theirs)
        });
        assert_eq!(vm.populate_range(0, &mut mine, 2), (PopulateProgress::Batch, true));
        let (outcome, mut theirs) = other.join().unwrap();
        assert!(matches!(outcome, FaultOutcome::Mapped | FaultOutcome::Spurious), "{outcome:?}");
        assert_eq!(vm.kind.page_counts().tables, 4);
        assert_eq!(vm.mapped(), 2);
        vm.check();
        let mut kept = 0;
        for page in std::iter::from_fn(|| mine.pop().or_else(|| theirs.pop())) {
            let frame = page.into_frame();
            kept += 1;
            for index in 0..ENTRIES {
                assert_eq!(vm.tables.cell(&TableFrame::linked(frame), index).load(), 0, "left behind");
            }
        }
        assert_eq!(kept, 3);
    });
}

/// One CPU populates a range while the other zaps it and gives back the tables nobody can reach.
fn a_range_is_populated_against_zap_and_reclaim() {
    explore(|| {
        let vm = Vm::new(5);
        vm.populate(&[1]);
        let there = vm.clone();
        let other = thread::spawn(move || {
            let mut sweep = Sweep::over(range(0, 512));
            drop(there.kind.zap(&there.memory.shared(cpu(1)), &mut sweep));
            there.kind.reclaim(&there.memory, usize::MAX, |page| there.tables.release(page));
        });
        let (progress, done) = vm.populate_range(0, &mut TableCache::new(), 1);
        let whole = (progress, done) == (PopulateProgress::Batch, true);
        let stopped = matches!(progress, PopulateProgress::NeedTables | PopulateProgress::Retry);
        assert!(whole || stopped, "{progress:?}");
        other.join().unwrap();
        vm.check();
        vm.kind.reclaim(&vm.memory, usize::MAX, |page| vm.tables.release(page));
        assert_eq!(vm.kind.page_counts().tables, 3, "the table of leaves is gone");
        assert_eq!(vm.mapped(), 0, "what was mapped before the zap ended went with it");
    });
}

/// A fast fault restores W while the page is being tracked: whoever is second wins, and never is W back after that.
fn fast_fault_against_write_protection() {
    explore(|| {
        let vm = Vm::new(4);
        vm.populate(&[0]);
        drop(vm.kind.write_protect(&vm.memory.shared(cpu(0)), &mut Sweep::over(range(0, 1))));
        let there = vm.clone();
        let other = thread::spawn(move || {
            let flush = there.kind.track(&there.memory.shared(cpu(1)), &mut Sweep::over(range(0, 1)));
            assert!(flush.is_needed(), "C2: a TLB may have W");
        });
        let root = vm.kind.root();
        let gpa = Gfn::default().gpa();
        let fast = vm.kind.fast_fault(
            &vm.memory.shared(cpu(0)),
            &mut TableCache::new(),
            root,
            gpa,
            AccessKind::Write,
        );
        assert!(matches!(fast, Some(FaultOutcome::Mapped) | None), "{fast:?}");
        other.join().unwrap();
        let leaf = vm.leaf(0).unwrap();
        assert_eq!(vm.kind.format().writability(leaf), Some(Writability::Tracked), "E4");
        vm.check();
    });
}

/// A write fault against whoever clears the log's bit and arms the page again: if the page can be written afterwards, its
/// bit is set.
fn fast_fault_against_the_dirty_log() {
    explore(|| {
        let vm = Vm::new(4);
        vm.populate(&[0]);
        let mut sweep =
            vm.memory.exclusive(cpu(0)).start_dirty_log(Gfn::default(), LogBy::WriteProtection).unwrap();
        drop(vm.kind.rearm(&vm.memory.shared(cpu(0)), &mut sweep));
        let there = vm.clone();
        let other = thread::spawn(move || {
            let shared = there.memory.shared(cpu(1));
            let was = shared.dirty_log(Gfn::default()).unwrap().clear(0, 1);
            drop(there.kind.rearm_pages(&shared, Gfn::default(), 1));
            was
        });
        let root = vm.kind.root();
        let gpa = Gfn::default().gpa();
        let fast = vm.kind.fast_fault(
            &vm.memory.shared(cpu(0)),
            &mut TableCache::new(),
            root,
            gpa,
            AccessKind::Write,
        );
        let was = other.join().unwrap();
        let writable = vm.kind.format().permits(vm.leaf(0).unwrap(), AccessKind::Write);
        let logged = vm.memory.shared(cpu(0)).dirty_log(Gfn::default()).unwrap().read(0) & 1;
        assert!(!writable || logged == 1, "H1");
        assert!(fast.is_none() || was | logged == 1, "H1: the guest may have written");
    });
}

/// A table leaves the tree while a CPU is about to put a page into it: the page is in the tree, or nowhere.
fn frozen_entries_take_no_page() {
    explore(|| {
        let vm = Vm::new(8);
        vm.populate(&[1]);
        let mut cache = vm.cache(3);
        let there = vm.clone();
        let other = thread::spawn(move || {
            drop(there.kind.zap(&there.memory.shared(cpu(1)), &mut Sweep::over(range(0, 512))));
        });
        let outcome = vm.fault(0, &mut cache, 0, AccessKind::Write);
        other.join().unwrap();
        match outcome {
            FaultOutcome::Mapped => {}
            // E6: it met a frozen entry and left it alone.
            FaultOutcome::Retry => assert_eq!(vm.leaf(0), None),
            _ => panic!("{outcome:?}"),
        }
        vm.check();
        vm.kind.reclaim(&vm.memory, usize::MAX, |page| vm.tables.release(page));
    });
}

/// E1: a page that was resolved before its backing changed is not mapped after that.
fn invalidation_against_fault() {
    explore(|| {
        let vm = Vm::new(4);
        vm.populate(&[1]);
        let there = vm.clone();
        let other = thread::spawn(move || {
            let invalidation = there.memory.exclusive(cpu(1)).begin_invalidation(range(0, 1));
            drop(there.kind.zap(&there.memory.shared(cpu(1)), &mut Sweep::over(range(0, 1))));
            there.memory.backing().frame.store(2 * FRAME, Std::SeqCst);
            drop(invalidation);
        });
        let gpa = Gfn::default().gpa();
        let found = vm.kind.resolve(&vm.memory.shared(cpu(0)), gpa, AccessKind::Write);
        if let Ok(resolution) = found {
            let outcome = vm.kind.install(&vm.memory.shared(cpu(0)), &mut TableCache::new(), &resolution);
            assert!(matches!(outcome, FaultOutcome::Mapped | FaultOutcome::Retry), "{outcome:?}");
        }
        other.join().unwrap();
        if let Some(leaf) = vm.leaf(0) {
            let leaf = vm.kind.format().leaf(leaf, Level::L1).unwrap();
            assert_eq!(leaf.pfn.number(), 2 * FRAME, "E1: the frame that was taken away");
        }
        vm.check();
    });
}

fn mmu(vm: &Vm) -> Mmu {
    let regs = PagingRegs { cr0: Cr0::PG, cr4: Cr4::PAE, efer: Efer::LMA };
    let guest = GuestCpu { max_phys_addr: 46, gib_pages: true, pse36: true, amd: true };
    Mmu::new(CpuRole::new(&regs, &guest), vm.kind.root())
}

/// C3: a processor walks the tables in the guest while another CPU takes them away: none is given back under its feet.
fn entry_against_shootdown() {
    explore(|| {
        let vm = Vm::new(4);
        vm.populate(&[0]);
        let there = vm.clone();
        let mut vcpu = mmu(&vm);
        let other = thread::spawn(move || {
            let entered = vcpu.enter(&there.memory, cpu(1));
            // The processor's walk: a page that was given back would stop the model.
            let found = there.leaf(0);
            drop(entered);
            found
        });
        let mut sweep = Sweep::over(range(0, 512));
        let issued = vm.kind.zap(&vm.memory.shared(cpu(0)), &mut sweep).issue();
        assert!(issued.is_some());
        vm.kind.reclaim(&vm.memory, usize::MAX, |page| vm.tables.release(page));
        other.join().unwrap();
        assert_eq!(vm.leaf(0), None);
    });
}

/// D7: a vCPU enters while all roots become obsolete: it notices, or it is seen in the guest and kicked.
fn entry_against_obsolete_roots() {
    explore(|| {
        let vm = Vm::new(2);
        let there = vm.clone();
        let mut vcpu = mmu(&vm);
        let other = thread::spawn(move || {
            let entered = vcpu.enter(&there.memory, cpu(1));
            let obsolete = entered.is_obsolete();
            // In the guest until it is kicked: it does not leave by itself.
            std::mem::forget(entered);
            obsolete
        });
        let page = vm.tables.page(1);
        let issued = vm
            .kind
            .invalidate_all(&mut vm.memory.exclusive(cpu(0)), page)
            .unwrap_or_else(|_| panic!("there is a place"))
            .issue()
            .unwrap();
        let kicked = issued.kick.contains(cpu(1));
        assert!(kicked || other.join().unwrap(), "D7");
    });
}
