//! Guest memory of the shadow tests: three slots, each with notes of its own.
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mmu::{
    AccessKind, Backing, CpuId, Gfn, GfnRange, NoPage, PageSize, Pfn, RamAddr, Resolved, ShadowBucket,
    ShadowPage, ShadowStore, Slot, SlotFlags, SlotNotes, VmMemory,
};

use super::super::flat::FlatRam;
use super::super::lent::Lent;

pub const PAGES: u64 = 1024;
/// Host frames are guest frames plus this.
pub const MOVED: u64 = 1 << 20;
/// First page and number of pages of each slot. The second is what comes and goes.
pub const SLOTS: [(u64, u64); 3] = [(0, 16), (16, 16), (32, PAGES - 32)];

struct Notes {
    dirty: Vec<AtomicU64>,
    tracks: Vec<AtomicU32>,
    blocks: [Vec<AtomicU32>; 2],
}

pub struct NotedRam {
    pub flat: FlatRam,
    notes: [Notes; 3],
}

impl NotedRam {
    /// A slot's notes are all zero when it is inserted.
    pub fn clear_notes(&self, slot: usize) {
        let Notes { dirty, tracks, blocks } = &self.notes[slot];
        dirty.iter().for_each(|word| word.store(0, Ordering::SeqCst));
        tracks.iter().chain(blocks.iter().flatten()).for_each(|count| count.store(0, Ordering::SeqCst));
    }
}

impl Backing for NotedRam {
    fn resolve(&self, at: &RamAddr, want: PageSize, _: AccessKind) -> Resolved {
        let size = want.min(PageSize::Size2M);
        let gfn = at.gfn().number() & !(size.pages() - 1);
        Resolved::Ram { pfn: Pfn::new_truncate(gfn + MOVED), size }
    }
    fn notes(&self, cookie: u64) -> SlotNotes<'_> {
        let slot = SLOTS.iter().position(|&(first, _)| first * 512 == cookie).expect("a slot's cookie");
        let Notes { dirty, tracks, blocks } = &self.notes[slot];
        SlotNotes { dirty, tracks, tracked_in: [&blocks[0][..], &blocks[1][..]] }
    }
    fn read(&self, at: &RamAddr, buf: &mut [u8]) -> Result<(), NoPage> {
        self.flat.read(at, buf)
    }
    fn write(&self, at: &RamAddr, data: &[u8]) -> Result<(), NoPage> {
        self.flat.write(at, data)
    }
    fn load_u32(&self, at: &RamAddr) -> Result<u32, NoPage> {
        self.flat.load_u32(at)
    }
    fn load_u64(&self, at: &RamAddr) -> Result<u64, NoPage> {
        self.flat.load_u64(at)
    }
    fn compare_exchange_u32(&self, at: &RamAddr, current: u32, new: u32) -> Result<u32, NoPage> {
        self.flat.compare_exchange_u32(at, current, new)
    }
    fn compare_exchange_u64(&self, at: &RamAddr, current: u64, new: u64) -> Result<u64, NoPage> {
        self.flat.compare_exchange_u64(at, current, new)
    }
}

pub fn slot(number: usize, flags: SlotFlags) -> Slot {
    let (first, pages) = SLOTS[number];
    let range = GfnRange::new(Gfn::new_truncate(first), pages).unwrap();
    Slot { range, flags, cookie: first * 512 }
}

pub fn memory() -> VmMemory<NotedRam> {
    let counts = |count| (0..count).map(|_| AtomicU32::new(0)).collect::<Vec<_>>();
    let notes = SLOTS.map(|(_, pages)| Notes {
        dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        tracks: counts(pages),
        blocks: [counts(PAGES / 512), counts(1)],
    });
    let memory = VmMemory::new(NotedRam { flat: FlatRam::new(PAGES as usize * 4096), notes });
    for number in 0..SLOTS.len() {
        memory.exclusive(CpuId::BOOT).insert_slot(&slot(number, SlotFlags::empty())).unwrap();
    }
    memory
}

pub fn store(pages: usize) -> ShadowStore<'static> {
    let pages: Vec<ShadowPage> = (0..pages).map(|_| ShadowPage::UNUSED).collect();
    let buckets = vec![ShadowBucket::EMPTY; pages.len() / 2 + 1];
    ShadowStore { pages: Vec::leak(pages), buckets: Vec::leak(buckets) }
}

/// What a world's kind borrows.
pub struct Loan {
    memory: Lent<VmMemory<NotedRam>>,
    pages: Lent<[ShadowPage]>,
    buckets: Lent<[ShadowBucket]>,
}

/// Memory with its three slots, and a store of so many pages.
pub fn lend(pages: usize) -> (Loan, &'static VmMemory<NotedRam>, ShadowStore<'static>) {
    let (memory, lent_memory) = Lent::new(Box::new(memory()));
    let (pages, lent_pages) = Lent::new((0..pages).map(|_| ShadowPage::UNUSED).collect::<Box<[_]>>());
    let (buckets, lent_buckets) =
        Lent::new(vec![ShadowBucket::EMPTY; lent_pages.len() / 2 + 1].into_boxed_slice());
    (Loan { memory, pages, buckets }, lent_memory, ShadowStore { pages: lent_pages, buckets: lent_buckets })
}

impl Loan {
    /// Frees everything.
    ///
    /// # Safety
    ///
    /// The kind and all guards are gone.
    #[allow(unsafe_code)] // See `Lent`.
    pub unsafe fn end(self) {
        // SAFETY: nothing but the kind and guards referred to them.
        unsafe {
            self.memory.take_back();
            self.pages.take_back();
            self.buckets.take_back();
        }
    }
}
