//! Guest memory: its first part is there to be read and written, the rest is frames without contents.
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mmu::{
    AccessKind, Backing, BelowError, CpuId, Gfn, GfnRange, Gpa, NoPage, PageSize, Pfn, RamAddr, Resolved,
    Slot, SlotFlags, SlotNotes, TableSource, Update, VmMemory,
};

/// The CPU that everything with one thread runs on.
pub(crate) const CPU: CpuId = CpuId::BOOT;

/// Frames of a gigabyte.
pub(crate) const GIB: u64 = 1 << 18;

/// Frames of the host are those of the guest plus this: as aligned as the largest page.
pub(crate) const MOVED: u64 = GIB << 4;

/// Guest memory with contents from frame 0 on. Its slot's cookie is the address of the first byte, as with a kernel's direct
/// map.
pub(crate) struct Ram {
    words: Vec<AtomicU64>,
    start: u64,
    largest: PageSize,
    dirty: Vec<AtomicU64>,
    tracks: Vec<AtomicU32>,
    tracked_in: [Vec<AtomicU32>; 2],
}

impl Ram {
    /// `pages` frames of memory, the first `contents` of them with contents, given in pages of at most `largest`.
    pub(crate) fn new(pages: u64, contents: u64, largest: PageSize) -> Self {
        let words: Vec<_> = (0..contents * 512).map(|_| AtomicU64::new(0)).collect();
        let counts = |count: u64| (0..count).map(|_| AtomicU32::new(0)).collect::<Vec<_>>();
        Self {
            start: words.as_ptr().expose_provenance() as u64,
            words,
            largest,
            dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            tracks: counts(pages),
            tracked_in: [counts(pages.div_ceil(512)), counts(pages.div_ceil(GIB))],
        }
    }

    /// Memory of a VM with one slot, from frame 0 on.
    pub(crate) fn into_memory(self) -> VmMemory<Self> {
        let pages = self.tracks.len() as u64;
        let range = GfnRange::new(Gfn::default(), pages).expect("fits");
        let slot = Slot::new(range, SlotFlags::empty(), self.start);
        let memory = VmMemory::new(self);
        memory.exclusive(CPU).insert_slot(&slot).expect("the first slot");
        memory
    }

    /// Writes a word.
    pub(crate) fn set(&self, address: u64, word: u64) {
        self.words[address as usize / 8].store(word, Ordering::Relaxed);
    }

    /// The word at a place that a slot vouches for.
    #[inline]
    fn word(&self, at: &RamAddr) -> &AtomicU64 {
        debug_assert!(at.slot_offset / 8 < self.words.len() as u64);
        let address = at.cookie + at.slot_offset;
        // SAFETY: tables and what is written are in the part with contents.
        unsafe { &*std::ptr::with_exposed_provenance(address as usize) }
    }
}

impl Backing for Ram {
    #[inline]
    fn resolve(&self, at: &RamAddr, want: PageSize, _: AccessKind) -> Resolved {
        let size = want.min(self.largest);
        let first = at.gfn().number() & !(size.pages() - 1);
        Resolved::Ram { pfn: Pfn::new_truncate(first + MOVED), size }
    }
    fn notes(&self, _: u64) -> SlotNotes<'_> {
        let tracked_in = [&self.tracked_in[0][..], &self.tracked_in[1][..]];
        SlotNotes { dirty: &self.dirty, tracks: &self.tracks, tracked_in }
    }
    fn read(&self, _: &RamAddr, _: &mut [u8]) -> Result<(), NoPage> {
        Err(NoPage)
    }
    fn write(&self, at: &RamAddr, data: &[u8]) -> Result<(), NoPage> {
        let word = data.try_into().map_err(|_| NoPage)?;
        self.word(at).store(u64::from_le_bytes(word), Ordering::Relaxed);
        Ok(())
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
    fn compare_exchange_u64(&self, at: &RamAddr, current: u64, new: u64) -> Result<u64, NoPage> {
        match self.word(at).compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(found) | Err(found) => Ok(found),
        }
    }
}

/// The contents without slots.
impl TableSource<Gpa> for Ram {
    #[inline]
    fn read_u64(&self, at: Gpa) -> Result<u64, BelowError> {
        if at.bits() >= self.words.len() as u64 * 8 {
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
