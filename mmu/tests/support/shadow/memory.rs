//! Guest memory of the shadow tests: one slot, or several, each with notes of its own.
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mmu::{
    AccessKind, Backing, CpuId, Gfn, GfnRange, NoPage, PageSize, Pfn, RamAddr, Resolved, ShadowBucket,
    ShadowPage, ShadowStore, Slot, SlotFlags, SlotNotes, VmMemory,
};

use super::super::flat::FlatRam;

pub const PAGES: u64 = 1024;
/// Host frames are guest frames plus this.
pub const MOVED: u64 = 1 << 20;
/// First page and number of pages of each slot. One for all, or three, of which the second comes and goes.
pub const ONE_SLOT: &[(u64, u64)] = &[(0, PAGES)];
pub const SLOTS: &[(u64, u64)] = &[(0, 16), (16, 16), (32, PAGES - 32)];

struct Notes {
    cookie: u64,
    dirty: Vec<AtomicU64>,
    tracks: Vec<AtomicU32>,
    blocks: [Vec<AtomicU32>; 2],
}

pub struct NotedRam {
    pub flat: FlatRam,
    notes: Vec<Notes>,
}

impl NotedRam {
    /// A slot's notes are all zero when it is inserted.
    pub fn clear_notes(&self, slot: usize) {
        let Notes { dirty, tracks, blocks, .. } = &self.notes[slot];
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
        let found = self.notes.iter().find(|notes| notes.cookie == cookie);
        found.map_or(SlotNotes::default(), |Notes { dirty, tracks, blocks, .. }| SlotNotes {
            dirty,
            tracks,
            tracked_in: [&blocks[0][..], &blocks[1][..]],
        })
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
    fn words(&self, at: &RamAddr) -> Option<&[AtomicU64; 512]> {
        self.flat.words(at)
    }
    fn compare_exchange_u32(&self, at: &RamAddr, current: u32, new: u32) -> Result<u32, NoPage> {
        self.flat.compare_exchange_u32(at, current, new)
    }
    fn compare_exchange_u64(&self, at: &RamAddr, current: u64, new: u64) -> Result<u64, NoPage> {
        self.flat.compare_exchange_u64(at, current, new)
    }
}

pub fn slot((first, pages): (u64, u64), flags: SlotFlags) -> Slot {
    let range = GfnRange::new(Gfn::new_truncate(first), pages).unwrap();
    Slot::new(range, flags, first * 512)
}

pub fn memory() -> VmMemory<NotedRam> {
    memory_of(ONE_SLOT)
}

pub fn memory_of(slots: &[(u64, u64)]) -> VmMemory<NotedRam> {
    let counts = |count| (0..count).map(|_| AtomicU32::new(0)).collect::<Vec<_>>();
    let notes = |&(first, pages): &(u64, u64)| Notes {
        cookie: first * 512,
        dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        tracks: counts(pages),
        blocks: [counts(PAGES / 512), counts(1)],
    };
    let notes = slots.iter().map(notes).collect();
    let memory = VmMemory::new(NotedRam { flat: FlatRam::new(PAGES as usize * 4096), notes });
    for &at in slots {
        memory.exclusive(CpuId::BOOT).insert_slot(&slot(at, SlotFlags::empty())).unwrap();
    }
    memory
}

pub fn store(pages: usize) -> ShadowStore<'static> {
    let pages: Vec<ShadowPage> = (0..pages).map(|_| ShadowPage::UNUSED).collect();
    let buckets = vec![ShadowBucket::EMPTY; pages.len() / 2 + 1];
    ShadowStore { pages: Vec::leak(pages), buckets: Vec::leak(buckets) }
}
