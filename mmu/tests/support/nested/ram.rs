//! The memory of an L1: contents, notes about its slots, and what the host has moved.
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::Mutex;

use mmu::{
    AccessKind, Backing, Gfn, GfnRange, NoPage, PageSize, Pfn, RamAddr, Resolved, Slot, SlotFlags, SlotNotes,
    VmMemory,
};

use super::super::flat::FlatRam;
use super::{CPU, FRAMES, MOVED, SLOTS};

/// Memory of L1: contents, notes about its slots, and which blocks the host has moved.
pub struct Ram {
    pub flat: FlatRam,
    notes: Vec<Notes>,
    pub(super) moves: Mutex<HashMap<u64, u64>>,
}

struct Notes {
    dirty: Vec<AtomicU64>,
    tracks: Vec<AtomicU32>,
    blocks: [Vec<AtomicU32>; 2],
}

impl Ram {
    /// The host frame behind a frame of L1.
    pub fn frame(&self, gfn: u64) -> u64 {
        gfn + MOVED * (1 + self.moves.lock().unwrap().get(&gfn).copied().unwrap_or(0))
    }
}

impl Backing for Ram {
    fn resolve(&self, at: &RamAddr, want: PageSize, _: AccessKind) -> Resolved {
        let size = want.min(PageSize::Size2M);
        let first = at.gfn().number() & !(size.pages() - 1);
        let whole = (first..first + size.pages()).all(|gfn| self.frame(gfn) == gfn + MOVED);
        if size == PageSize::Size2M && whole {
            return Resolved::Ram { pfn: Pfn::new_truncate(first + MOVED), size };
        }
        Resolved::Ram { pfn: Pfn::new_truncate(self.frame(at.gfn().number())), size: PageSize::Size4K }
    }
    fn notes(&self, cookie: u64) -> SlotNotes<'_> {
        let index = SLOTS.iter().position(|slot| slot.0 * 512 == cookie).unwrap();
        let Notes { dirty, tracks, blocks } = &self.notes[index];
        SlotNotes { dirty, tracks, tracked_in: [&blocks[0], &blocks[1]] }
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

pub fn slot(index: usize) -> Slot {
    let (start, pages, read_only) = SLOTS[index];
    let range = GfnRange::new(Gfn::new_truncate(start), pages).unwrap();
    let flags = if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
    Slot::new(range, flags, start * 512)
}

pub(super) fn memory() -> VmMemory<Ram> {
    let counts = |count: u64| (0..count).map(|_| AtomicU32::new(0)).collect::<Vec<_>>();
    let notes = |&(_, pages, _): &(u64, u64, bool)| Notes {
        dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        tracks: counts(pages),
        blocks: [counts(pages / 512 + 2), counts(2)],
    };
    let flat = FlatRam::new(FRAMES as usize * 4096);
    let moves = Mutex::default();
    let memory = VmMemory::new(Ram { flat, notes: SLOTS.iter().map(notes).collect(), moves });
    for index in 0..SLOTS.len() {
        memory.exclusive(CPU).insert_slot(&slot(index)).unwrap();
    }
    memory
}
