//! Guest memory without contents, for the direct kind: which host frame each page is in. A slot's cookie is the frame of
//! its first page; an invalidated 2 MiB block moves elsewhere.
use std::collections::HashMap;
use std::sync::Mutex;

use mmu::{AccessKind, Backing, NoPage, PageSize, Pfn, RamAddr, Resolved};

/// How far a block moves each time.
pub const MOVE: u64 = 1 << 20;

#[derive(Default)]
pub struct Blocks {
    state: Mutex<State>,
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
        Resolved::Ram { pfn: Pfn::new_truncate(pfn), size }
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
