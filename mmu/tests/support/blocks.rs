//! Guest memory without contents, for the direct kind: which host frame each page is in. A slot's cookie is the frame of
//! its first page; an invalidated 2 MiB block moves elsewhere.
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use mmu::{AccessKind, Backing, NoPage, PageSize, Pfn, RamAddr, Resolved, SlotNotes};

/// How far a block moves each time.
pub const MOVE: u64 = 1 << 20;

thread_local! {
    static AFTER_RESOLVE: RefCell<Option<Box<dyn FnOnce()>>> = const { RefCell::new(None) };
}

/// Runs `action` when this thread's next request has found its frame and not returned yet: another CPU at the worst moment.
pub fn after_resolve(action: impl FnOnce() + 'static) {
    AFTER_RESOLVE.set(Some(Box::new(action)));
}

#[derive(Default)]
pub struct Blocks {
    state: Mutex<State>,
    notes: [OnceLock<Notes>; 16],
}

/// Memory for notes about the slot with one cookie.
struct Notes {
    cookie: u64,
    dirty: Vec<AtomicU64>,
    tracks: Vec<AtomicU32>,
    tracked_in: [Vec<AtomicU32>; 2],
}

struct State {
    moves: HashMap<u64, u64>,
    largest: PageSize,
    retries: usize,
}

impl Default for State {
    fn default() -> Self {
        Self { moves: HashMap::new(), largest: PageSize::Size1G, retries: 0 }
    }
}

impl Blocks {
    /// Provides zeroed memory for notes about a slot.
    pub fn provide_notes(&self, cookie: u64, start: u64, pages: u64) {
        let blocks = |shift: u32| ((start + pages - 1) >> shift) - (start >> shift) + 1;
        let counts = |count: u64| (0..count).map(|_| AtomicU32::new(0)).collect();
        let new = || Notes {
            cookie,
            dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            tracks: counts(pages),
            tracked_in: [counts(blocks(9)), counts(blocks(18))],
        };
        let place = self.notes.iter().find(|notes| notes.get().is_none_or(|notes| notes.cookie == cookie));
        let notes = place.expect("a free place").get_or_init(new);
        notes.dirty.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        for counts in [&notes.tracks, &notes.tracked_in[0], &notes.tracked_in[1]] {
            counts.iter().for_each(|count| count.store(0, Ordering::Relaxed));
        }
    }

    /// Pages that are tracked in the 2 MiB or 1 GiB block number `block` of the slot with `cookie`.
    pub fn tracked_in(&self, cookie: u64, size: PageSize, block: usize) -> u32 {
        let counts = Backing::notes(self, cookie).tracked_in[if size == PageSize::Size2M { 0 } else { 1 }];
        counts[block].load(Ordering::Relaxed)
    }

    /// The frame behind page `page` (from the slot's start) at `gfn`.
    pub fn frame(&self, cookie: u64, page: u64, gfn: u64) -> u64 {
        let moves = self.state.lock().unwrap().moves.get(&(gfn >> 9)).copied().unwrap_or(0);
        cookie + page + moves * MOVE
    }

    pub fn move_block(&self, gfn: u64) {
        *self.state.lock().unwrap().moves.entry(gfn >> 9).or_default() += 1;
    }

    /// Grants no larger pages from now on.
    pub fn set_largest(&self, size: PageSize) {
        self.state.lock().unwrap().largest = size;
    }

    /// Refuses the next `count` requests.
    pub fn refuse(&self, count: usize) {
        self.state.lock().unwrap().retries = count;
    }
}

impl Backing for Blocks {
    fn resolve(&self, at: &RamAddr, want: PageSize, _: AccessKind) -> Resolved {
        let gfn = at.gfn().number();
        let mut state = self.state.lock().unwrap();
        if state.retries > 0 {
            state.retries -= 1;
            return Resolved::Retry;
        }
        let mut size = want.min(state.largest);
        // A gigabyte of which a part has moved is contiguous no more.
        if state.moves.keys().any(|block| block >> 9 == gfn >> 18) {
            size = size.min(PageSize::Size2M);
        }
        drop(state);
        let first = gfn & !(size.pages() - 1);
        let inside = gfn - first;
        let pfn = self.frame(at.cookie, at.slot_page(), gfn) - inside;
        if let Some(action) = AFTER_RESOLVE.take() {
            action();
        }
        Resolved::Ram { pfn: Pfn::new_truncate(pfn), size }
    }

    fn notes(&self, cookie: u64) -> SlotNotes<'_> {
        let found = self.notes.iter().filter_map(OnceLock::get).find(|notes| notes.cookie == cookie);
        found.map_or(SlotNotes::default(), |notes| SlotNotes {
            dirty: &notes.dirty,
            tracks: &notes.tracks,
            tracked_in: [&notes.tracked_in[0], &notes.tracked_in[1]],
        })
    }

    fn read(&self, _: &RamAddr, _: &mut [u8]) -> Result<(), NoPage> {
        Err(NoPage)
    }
    fn write(&self, _: &RamAddr, _: &[u8]) -> Result<(), NoPage> {
        Ok(())
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
