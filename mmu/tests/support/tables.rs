//! Table memory on the host that knows which frames are table pages at the moment, and stops at any other.
#![allow(unsafe_code)] // Table pages are made here, as a kernel's frame allocator makes them.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use mmu::{EntryCell, HwEntry, Pfn, TableCache, TableFrame, TableMemory, TablePage, ENTRIES};

/// Frame number of the first page: not zero, so that a lost base shows.
pub const FIRST_PFN: u64 = 0x7_0000;

/// What another CPU does.
type Action = Box<dyn FnOnce()>;

thread_local! {
    static INTERFERE: RefCell<Option<Action>> = const { RefCell::new(None) };
    static INTERFERE_LOAD: RefCell<Option<(usize, Action)>> = const { RefCell::new(None) };
}

/// Runs `action` just before this thread's next compare-exchange of an entry: another CPU at the worst moment.
pub fn interfere(action: impl FnOnce() + 'static) {
    INTERFERE.set(Some(Box::new(action)));
}

/// Runs `action` just before the load of an entry that follows after `loads` others of this thread.
pub fn interfere_after_loads(loads: usize, action: impl FnOnce() + 'static) {
    INTERFERE_LOAD.set(Some((loads, Box::new(action))));
}

/// An entry whose loads and compare-exchanges can be interfered with.
pub struct Cell(HwEntry);

impl EntryCell for Cell {
    fn load(&self) -> u64 {
        match INTERFERE_LOAD.take() {
            Some((0, action)) => action(),
            Some((loads, action)) => INTERFERE_LOAD.set(Some((loads - 1, action))),
            None => {}
        }
        self.0.load()
    }
    fn store(&self, entry: u64) {
        self.0.store(entry);
    }
    fn swap(&self, entry: u64) -> u64 {
        self.0.swap(entry)
    }
    fn compare_exchange(&self, current: u64, new: u64) -> Result<(), u64> {
        if let Some(action) = INTERFERE.take() {
            action();
        }
        self.0.compare_exchange(current, new)
    }
    fn fence(order: Ordering) {
        HwEntry::fence(order);
    }
}

struct Page {
    entries: [Cell; ENTRIES],
    in_use: AtomicBool,
}

/// A pool of table pages, shared by the kind (as its table memory) and the test (as its allocator). A page is made when it is
/// used first.
#[derive(Clone)]
pub struct HostTables {
    pages: Arc<Vec<OnceLock<Box<Page>>>>,
    free: Arc<Mutex<Vec<u64>>>,
}

impl HostTables {
    pub fn new(count: usize) -> Self {
        Self {
            pages: Arc::new((0..count).map(|_| OnceLock::new()).collect()),
            free: Arc::new(Mutex::new((0..count as u64).rev().collect())),
        }
    }

    pub fn allocate(&self) -> TablePage {
        let index = self.free.lock().unwrap().pop().expect("the pool is large enough");
        let new =
            || Page { entries: [const { Cell(HwEntry::new(0)) }; ENTRIES], in_use: AtomicBool::new(false) };
        let page = self.pages[index as usize].get_or_init(|| Box::new(new()));
        assert!(!page.in_use.swap(true, Ordering::SeqCst));
        assert!(page.entries.iter().all(|entry| entry.load() == 0), "pages come back zeroed");
        // SAFETY: the pool maps every frame it hands out, and hands out each once.
        unsafe { TablePage::from_frame(Pfn::new_truncate(FIRST_PFN + index)) }
    }

    pub fn release(&self, page: TablePage) {
        self.release_frame(page.into_frame());
    }

    pub fn release_frame(&self, pfn: Pfn) {
        let index = pfn.number() - FIRST_PFN;
        assert!(self.page(index).in_use.swap(false, Ordering::SeqCst));
        self.free.lock().unwrap().push(index);
    }

    pub fn fill(&self, cache: &mut TableCache) {
        while cache.missing() > 0 {
            cache.push(self.allocate()).unwrap();
        }
    }

    pub fn drain(&self, cache: &mut TableCache) {
        while let Some(page) = cache.pop() {
            self.release(page);
        }
    }

    fn page(&self, index: u64) -> &Page {
        self.pages[index as usize].get().expect("a page that was handed out")
    }

    pub fn in_use(&self) -> usize {
        self.pages.iter().filter_map(OnceLock::get).filter(|page| page.in_use.load(Ordering::SeqCst)).count()
    }

    /// The entry at `index` of the table in frame `pfn`; `None` if that is no table page.
    pub fn peek(&self, pfn: u64, index: usize) -> Option<u64> {
        let page = self.pages.get(pfn.checked_sub(FIRST_PFN)? as usize)?.get()?;
        page.in_use.load(Ordering::SeqCst).then(|| page.entries[index].load())
    }

    /// The entry at `index` of the table in frame `pfn`, as the hardware walker sets A and D.
    pub fn mark(&self, pfn: u64, index: usize, bits: u64) {
        let entry = &self.page(pfn - FIRST_PFN).entries[index];
        let old = entry.load();
        entry.compare_exchange(old, old | bits).unwrap();
    }
}

impl TableMemory for HostTables {
    type Cell = Cell;

    fn cell<'a>(&'a self, table: &'a TableFrame, index: usize) -> &'a Cell {
        let page = self.page(table.pfn().number() - FIRST_PFN);
        assert!(page.in_use.load(Ordering::SeqCst), "an entry of a page that was given back");
        &page.entries[index]
    }
}
