//! What the hot paths cost, in instructions: runs one of them so many times, for a counter to watch.
//!
//! `valgrind --tool=callgrind target/release/examples/cost WHAT COUNT` prints instructions collected; the difference
//! between two counts, divided, is the cost of one, ten instructions of the loop around a walk included. WHAT is `walk`
//! (four levels, A bits set, one slot), `flat` (the same over a bare array), `fault` (4 KiB, tables present), `spurious`
//! (the same, mapped already), `fast` (W given back by the fast path, with its share of the sweep that took it) or
//! `guard`.
#![allow(unsafe_code)] // It makes table pages and reads guest memory, as a kernel does.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use mmu::{
    Access, AccessKind, Backing, BelowError, CpuId, CpuRole, Cr0, Cr4, DirectMmu, Efer, FaultOutcome, Gfn,
    GfnRange, Gpa, GuestCpu, Gva, HwEntry, NoPage, Npt, NptHost, PageSize, PagingContext, PagingRegs, Pfn,
    PhysTables, RamAddr, Resolved, Slot, SlotFlags, Sweep, TableCache, TablePage, TableSource, Update,
    VmMemory, WalkRegs, ENTRIES,
};

/// Guest memory in one array. The slot's cookie is the address of its first byte, as with a kernel's direct map.
struct Flat {
    _words: Vec<AtomicU64>,
    start: u64,
    bytes: u64,
}

impl Flat {
    /// The word at a place that a slot vouches for.
    #[inline]
    fn word(&self, at: &RamAddr) -> &AtomicU64 {
        let address = at.cookie + at.slot_offset;
        // SAFETY: the walks of this program stay in the tables of `machine`, which the array holds.
        unsafe { &*std::ptr::with_exposed_provenance(address as usize) }
    }
}

impl Backing for Flat {
    #[inline]
    fn resolve(&self, at: &RamAddr, _: PageSize, _: AccessKind) -> Resolved {
        let pfn = Pfn::new_truncate((at.cookie >> 12) + at.slot_page());
        Resolved::Ram { pfn, size: PageSize::Size4K }
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
    #[inline]
    fn load_u64(&self, at: &RamAddr) -> Result<u64, NoPage> {
        Ok(self.word(at).load(Ordering::Relaxed))
    }
    fn compare_exchange_u32(&self, _: &RamAddr, _: u32, _: u32) -> Result<u32, NoPage> {
        Err(NoPage)
    }
    fn compare_exchange_u64(&self, _: &RamAddr, _: u64, _: u64) -> Result<u64, NoPage> {
        Err(NoPage)
    }
}

/// The array without slots.
impl TableSource<Gpa> for Flat {
    #[inline]
    fn read_u64(&self, at: Gpa) -> Result<u64, BelowError> {
        if at.bits() >= self.bytes {
            return Err(BelowError::NotRam);
        }
        let address = self.start + at.bits();
        // SAFETY: the address is a multiple of eight inside the array.
        let word: &AtomicU64 = unsafe { &*std::ptr::with_exposed_provenance(address as usize) };
        Ok(word.load(Ordering::Relaxed))
    }
    fn read_u32(&self, _: Gpa) -> Result<u32, BelowError> {
        Err(BelowError::NotRam)
    }
    fn update_u64(&self, _: Gpa, _: u64, _: u64) -> Result<Update, BelowError> {
        Err(BelowError::NotRam)
    }
    fn update_u32(&self, _: Gpa, _: u32, _: u32) -> Result<Update, BelowError> {
        Err(BelowError::NotRam)
    }
}

/// A zeroed page, never given back.
fn table_page() -> TablePage {
    #[repr(align(4096))]
    struct Page([HwEntry; ENTRIES]);
    let page = Box::leak(Box::new(Page([const { HwEntry::new(0) }; ENTRIES])));
    let address = page.0.as_ptr().expose_provenance() as u64;
    // SAFETY: the page is fresh, zeroed and leaked; its address stands for its frame, with a direct map at zero.
    unsafe { TablePage::from_frame(Pfn::new(address >> 12).expect("user addresses fit")) }
}

const PAGES: u64 = 1 << 20;

fn machine() -> VmMemory<Flat> {
    let words: Vec<_> = (0..0x8000 / 8).map(|_| AtomicU64::new(0)).collect();
    for (at, entry) in [(0x1018, 0x2067), (0x2028, 0x3067), (0x3038, 0x4067), (0x4048, 0x5067u64)] {
        words[at / 8].store(entry, Ordering::Relaxed);
    }
    let cookie = words.as_ptr().expose_provenance() as u64;
    let flat = Flat { start: cookie, bytes: words.len() as u64 * 8, _words: words };
    let memory = VmMemory::new(flat);
    let range = GfnRange::new(Gfn::default(), PAGES).expect("fits");
    let slot = Slot::new(range, SlotFlags::empty(), cookie);
    memory.exclusive(CpuId::BOOT).insert_slot(&slot).expect("the first slot");
    memory
}

fn context() -> PagingContext<Gva, Gpa> {
    let regs = PagingRegs {
        cr0: Cr0::PG | Cr0::WP,
        cr4: Cr4::PAE | Cr4::SMEP | Cr4::SMAP,
        efer: Efer::LMA | Efer::NXE,
    };
    let cpu = GuestCpu { max_phys_addr: 46, gib_pages: true, pse36: true, amd: true };
    PagingContext::new(CpuRole::new(&regs, &cpu))
}

const VA: Gva = Gva::new(3 << 39 | 5 << 30 | 7 << 21 | 9 << 12 | 0x123);
const FETCH: Access = Access::at_cpl(AccessKind::Execute, 3);

#[inline(never)]
fn walk<S: TableSource<Gpa>>(tables: &S, context: &PagingContext<Gva, Gpa>, regs: &WalkRegs, va: Gva) -> u64 {
    context.translate(tables, regs, va, FETCH).map_or(0, |found| found.address.bits())
}

type Kind = DirectMmu<Npt, PhysTables>;

#[inline(never)]
fn fault(kind: &Kind, memory: &VmMemory<Flat>, cache: &mut TableCache, gfn: u64) -> FaultOutcome {
    kind.fault(&memory.shared(CpuId::BOOT), cache, Gfn::new_truncate(gfn).gpa(), AccessKind::Write)
}

#[inline(never)]
fn fast(kind: &Kind, memory: &VmMemory<Flat>, cache: &mut TableCache, gfn: u64) -> Option<FaultOutcome> {
    let shared = memory.shared(CpuId::BOOT);
    kind.fast_fault(&shared, cache, kind.root(), Gfn::new_truncate(gfn).gpa(), AccessKind::Write)
}

#[inline(never)]
fn guard(memory: &VmMemory<Flat>) {
    black_box(&memory.shared(CpuId::BOOT));
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_default();
    let count: u64 = arguments.next().and_then(|count| count.parse().ok()).unwrap_or(1);
    let memory = machine();
    let regs = WalkRegs { cr3: 0x1000, ..WalkRegs::default() };
    let context = context();
    // Nothing of the walk may be computed beforehand.
    let (context, regs, va) = black_box((&context, &regs, VA));
    match what.as_str() {
        "walk" => {
            let shared = memory.shared(CpuId::BOOT);
            for _ in 0..count {
                assert_eq!(walk(&shared, context, regs, va), 0x5123);
            }
        }
        "flat" => {
            for _ in 0..count {
                assert_eq!(walk(memory.backing(), context, regs, va), 0x5123);
            }
        }
        "fault" | "spurious" => {
            let host =
                NptHost { five_level: false, max_phys_addr: 48, no_execute: true, largest: PageSize::Size4K };
            // SAFETY: table pages are ordinary memory of this process, at their own address.
            let tables = unsafe { PhysTables::new(0) };
            let kind = DirectMmu::new(&memory, Npt::new(&host), tables, table_page(), 40, PageSize::Size4K);
            let mut cache = TableCache::new();
            // The tables for all pages first, so that the counted faults find them.
            for gfn in (0..count.min(PAGES)).step_by(512) {
                while cache.missing() > 0 {
                    cache.push(table_page()).expect("a page is missing");
                }
                assert_eq!(fault(&kind, &memory, &mut cache, gfn), FaultOutcome::Mapped);
            }
            for gfn in (0..count.min(PAGES)).filter(|gfn| gfn % 512 != 0) {
                let (gfn, outcome) = match what.as_str() {
                    "fault" => (gfn, FaultOutcome::Mapped),
                    _ => (0, FaultOutcome::Spurious),
                };
                assert_eq!(fault(&kind, &memory, &mut cache, gfn), outcome);
            }
        }
        "fast" => {
            let host =
                NptHost { five_level: false, max_phys_addr: 48, no_execute: true, largest: PageSize::Size4K };
            // SAFETY: table pages are ordinary memory of this process, at their own address.
            let tables = unsafe { PhysTables::new(0) };
            let kind = DirectMmu::new(&memory, Npt::new(&host), tables, table_page(), 40, PageSize::Size4K);
            let mut cache = TableCache::new();
            while cache.missing() > 0 {
                cache.push(table_page()).expect("a page is missing");
            }
            for gfn in 0..512 {
                assert_eq!(fault(&kind, &memory, &mut cache, gfn), FaultOutcome::Mapped);
            }
            for turn in 0..count {
                let gfn = turn % 512;
                if gfn == 0 {
                    let all = GfnRange::new(Gfn::default(), 512).expect("fits");
                    drop(kind.write_protect(&memory.shared(CpuId::BOOT), &mut Sweep::over(all)));
                }
                assert_eq!(fast(&kind, &memory, &mut cache, gfn), Some(FaultOutcome::Mapped));
            }
        }
        "guard" => (0..count).for_each(|_| guard(&memory)),
        _ => eprintln!("usage: cost walk|flat|fault|spurious|fast|guard COUNT"),
    }
}
