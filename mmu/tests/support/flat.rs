//! Guest memory with contents, for walks: one array of words; a slot's cookie is the word its first byte is in.
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use mmu::{AccessKind, Backing, NoPage, PageSize, Pfn, RamAddr, Resolved};

pub struct FlatRam {
    words: Vec<AtomicU64>,
    /// How many compare-exchanges were tried, and before which of them `interfere` acts.
    pub exchanges: AtomicUsize,
    /// Called before each compare-exchange: a guest that writes at the worst moment.
    pub interfere: Option<fn(&FlatRam, usize)>,
}

impl FlatRam {
    pub fn new(bytes: usize) -> Self {
        Self {
            words: (0..bytes / 8).map(|_| AtomicU64::new(0)).collect(),
            exchanges: AtomicUsize::new(0),
            interfere: None,
        }
    }

    pub fn get(&self, address: u64) -> Option<u64> {
        Some(self.words.get(address as usize / 8)?.load(Ordering::SeqCst))
    }

    pub fn set(&self, address: u64, word: u64) {
        self.words[address as usize / 8].store(word, Ordering::SeqCst);
    }

    pub fn set_u32(&self, address: u64, value: u32) {
        let shift = (address & 4) * 8;
        let word = self.get(address).unwrap() & !(0xffff_ffff << shift) | u64::from(value) << shift;
        self.set(address, word);
    }

    pub fn get_u32(&self, address: u64) -> Option<u32> {
        Some((self.get(address)? >> ((address & 4) * 8)) as u32)
    }

    fn word(&self, at: &RamAddr) -> Result<&AtomicU64, NoPage> {
        self.words.get((at.cookie + at.slot_offset / 8) as usize).ok_or(NoPage)
    }

    fn before_exchange(&self) {
        let count = self.exchanges.fetch_add(1, Ordering::SeqCst);
        if let Some(interfere) = self.interfere {
            interfere(self, count);
        }
    }
}

impl Backing for FlatRam {
    fn resolve(&self, at: &RamAddr, _: PageSize, _: AccessKind) -> Resolved {
        let pfn = Pfn::new_truncate(at.cookie / 512 + at.slot_page());
        Resolved::Ram { pfn, size: PageSize::Size4K }
    }

    fn read(&self, at: &RamAddr, buf: &mut [u8]) -> Result<(), NoPage> {
        assert!(at.gpa.page_offset() as usize + buf.len() <= 4096, "an access stays in its page");
        for (index, byte) in buf.iter_mut().enumerate() {
            let at = RamAddr { slot_offset: at.slot_offset + index as u64, ..*at };
            *byte = self.word(&at)?.load(Ordering::SeqCst).to_le_bytes()[at.slot_offset as usize % 8];
        }
        Ok(())
    }

    fn write(&self, at: &RamAddr, data: &[u8]) -> Result<(), NoPage> {
        assert!(at.gpa.page_offset() as usize + data.len() <= 4096, "an access stays in its page");
        for (index, byte) in data.iter().enumerate() {
            let at = RamAddr { slot_offset: at.slot_offset + index as u64, ..*at };
            let word = self.word(&at)?;
            let mut bytes = word.load(Ordering::SeqCst).to_le_bytes();
            bytes[at.slot_offset as usize % 8] = *byte;
            word.store(u64::from_le_bytes(bytes), Ordering::SeqCst);
        }
        Ok(())
    }

    fn load_u32(&self, at: &RamAddr) -> Result<u32, NoPage> {
        assert_eq!(at.slot_offset % 4, 0);
        Ok((self.word(at)?.load(Ordering::SeqCst) >> ((at.slot_offset & 4) * 8)) as u32)
    }

    fn load_u64(&self, at: &RamAddr) -> Result<u64, NoPage> {
        assert_eq!(at.slot_offset % 8, 0);
        Ok(self.word(at)?.load(Ordering::SeqCst))
    }

    fn words(&self, at: &RamAddr) -> Option<&[AtomicU64; 512]> {
        let first = (at.cookie + at.slot_page() * 512) as usize;
        self.words.get(first..)?.first_chunk()
    }

    fn compare_exchange_u32(&self, at: &RamAddr, current: u32, new: u32) -> Result<u32, NoPage> {
        assert_eq!(at.slot_offset % 4, 0);
        self.before_exchange();
        let word = self.word(at)?;
        let shift = (at.slot_offset & 4) * 8;
        let old = word.load(Ordering::SeqCst);
        let found = (old >> shift) as u32;
        if found == current {
            word.store(old & !(0xffff_ffff << shift) | u64::from(new) << shift, Ordering::SeqCst);
        }
        Ok(found)
    }

    fn compare_exchange_u64(&self, at: &RamAddr, current: u64, new: u64) -> Result<u64, NoPage> {
        assert_eq!(at.slot_offset % 8, 0);
        self.before_exchange();
        match self.word(at)?.compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(found) | Err(found) => Ok(found),
        }
    }
}
