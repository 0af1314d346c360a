//! A guest under a shadow kind: its memory, two vCPUs, the processor over the shadow, and the reference beside it.
use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use mmu::{
    AccessKind, Backing, CpuId, CpuRole, Gfn, GfnRange, Gva, Level, Mmu, NoPage, Npt, NptHost, Pae, PaeHost,
    PageSize, PagingContext, Pfn, RamAddr, Resolved, Root, RootRole, ShadowBucket, ShadowFault, ShadowMmu,
    ShadowPage, ShadowStore, Slot, SlotFlags, SlotNotes, TableCache, VcpuMode, VmMemory, WalkError,
};

use super::flat::FlatRam;
use super::manual::guest::{access, registers, regs};
use super::manual::{walk, Machine, What, Who};
use super::tables::HostTables;

pub const CPU: CpuId = CpuId::BOOT;
pub const PAGES: u64 = 1024;
/// Host frames are guest frames plus this.
pub const MOVED: u64 = 1 << 20;

pub struct NotedRam {
    pub flat: FlatRam,
    dirty: Vec<AtomicU64>,
    tracks: Vec<AtomicU32>,
    blocks: [Vec<AtomicU32>; 2],
}

impl Backing for NotedRam {
    fn resolve(&self, at: &RamAddr, want: PageSize, _: AccessKind) -> Resolved {
        let size = want.min(PageSize::Size2M);
        let gfn = at.gfn().number() & !(size.pages() - 1);
        Resolved::Ram { pfn: Pfn::new_truncate(gfn + MOVED), size }
    }
    /// A cookie is the word of memory that the slot starts with; its frames are those of the memory.
    fn notes(&self, cookie: u64) -> SlotNotes<'_> {
        let page = cookie as usize / 512;
        let tracked_in = [&self.blocks[0][page / 512..], &self.blocks[1][page / 512..]];
        SlotNotes { dirty: &self.dirty[page / 64..], tracks: &self.tracks[page..], tracked_in }
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

pub fn memory() -> VmMemory<NotedRam> {
    let counts = |count| (0..count).map(|_| AtomicU32::new(0)).collect::<Vec<_>>();
    let memory = VmMemory::new(NotedRam {
        flat: FlatRam::new(PAGES as usize * 4096),
        dirty: (0..PAGES / 64).map(|_| AtomicU64::new(0)).collect(),
        tracks: counts(PAGES),
        blocks: [counts(PAGES / 512), counts(PAGES / 512)],
    });
    let range = GfnRange::new(Gfn::default(), PAGES).unwrap();
    memory.exclusive(CPU).insert_slot(&Slot::new(range, SlotFlags::empty(), 0)).unwrap();
    memory
}

pub fn store(pages: usize) -> ShadowStore<'static> {
    let pages: Vec<ShadowPage> = (0..pages).map(|_| ShadowPage::UNUSED).collect();
    let buckets = vec![ShadowBucket::EMPTY; pages.len() / 2 + 1];
    ShadowStore { pages: Vec::leak(pages), buckets: Vec::leak(buckets) }
}

pub type Kind = ShadowMmu<'static, Npt, HostTables>;

pub struct Vcpu {
    pub m: Machine,
    pub root: Root,
    /// By page: where each access has led to since its translation was flushed last, as far as it was permitted.
    pub allowed: HashSet<(u64, What2, u64)>,
}

/// Kind and agent of an access, as numbers.
pub type What2 = (u8, u8);

pub struct World {
    pub memory: &'static VmMemory<NotedRam>,
    pub kind: Kind,
    pub tables: HostTables,
    pub cache: TableCache,
    pub vcpus: Vec<Vcpu>,
    pub addresses: Vec<u64>,
    pub emulated: usize,
    /// Addresses that no slot has at the moment, although there is memory.
    pub hidden: std::ops::Range<u64>,
}

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    At(u64),
    Fault(u32),
    Device,
    Emulated(u64),
}

const ALL: [(What, Who); 6] = [
    (What::Read, Who::User),
    (What::Write, Who::User),
    (What::Fetch, Who::User),
    (What::Read, Who::Supervisor),
    (What::Write, Who::Supervisor),
    (What::Fetch, Who::Supervisor),
];

impl World {
    pub fn new(m: Machine, quota: usize, addresses: Vec<u64>, setup: impl Fn(&FlatRam)) -> Self {
        let memory: &'static _ = Box::leak(Box::new(memory()));
        setup(&memory.backing().flat);
        let tables = HostTables::new(quota + 64);
        let host =
            NptHost { five_level: m.la57, max_phys_addr: 46, no_execute: true, largest: PageSize::Size2M };
        let pae = Pae::new(&PaeHost { max_phys_addr: 46 });
        let kind = Kind::new(memory, Npt::new(&host), pae, tables.clone(), store(quota)).unwrap();
        let mut world = Self {
            memory,
            kind,
            tables,
            cache: TableCache::new(),
            vcpus: vec![],
            addresses,
            emulated: 0,
            hidden: 0..0,
        };
        for _ in 0..2 {
            let root = world.root(&m);
            world.vcpus.push(Vcpu { m, root, allowed: HashSet::new() });
        }
        world.remember();
        world
    }

    pub fn ram(&self) -> &FlatRam {
        &self.memory.backing().flat
    }

    fn word(&self, at: u64) -> Option<u64> {
        if self.hidden.contains(&at) {
            return None;
        }
        self.ram().get(at)
    }

    fn pdptes(&self, m: &Machine) -> [u64; 4] {
        [0, 1, 2, 3].map(|index| self.ram().get((m.cr3 & 0xffff_ffe0) + index * 8).unwrap_or(0))
    }

    fn root(&mut self, m: &Machine) -> Root {
        self.tables.fill(&mut self.cache);
        let (paging, cpu) = registers(m);
        let role = RootRole::shadow(CpuRole::new(&paging, &cpu), Level::L4, VcpuMode::default(), true);
        let pdptes = self.pdptes(m);
        let mut guard = self.memory.exclusive(CPU);
        self.kind.get_root(&mut guard, &mut self.cache, role, m.cr3, pdptes).outcome.unwrap()
    }

    /// Another CR3 or role: the root follows, and all translations are flushed.
    pub fn switch(&mut self, vcpu: usize, m: Machine) {
        let new = self.root(&m);
        let old = std::mem::replace(&mut self.vcpus[vcpu].root, new);
        self.vcpus[vcpu].m = m;
        self.kind.put_root(&mut self.memory.exclusive(CPU), old);
        self.flush(vcpu);
    }

    pub fn flush(&mut self, vcpu: usize) {
        let root = self.vcpus[vcpu].root;
        let _ = self.kind.sync_root(&mut self.memory.exclusive(CPU), root);
        self.vcpus[vcpu].allowed.clear();
        self.remember();
    }

    pub fn invlpg(&mut self, vcpu: usize, va: u64) {
        let root = self.vcpus[vcpu].root;
        let _ = self.kind.sync_address(&mut self.memory.exclusive(CPU), root, Gva::new(va));
        self.vcpus[vcpu].allowed.retain(|&(page, _, _)| page != va >> 12);
        self.remember();
    }

    /// Notes where every access leads now, for every vCPU.
    fn remember(&mut self) {
        let (ram, hidden) = (&self.memory.backing().flat, &self.hidden);
        let word = |at| if hidden.contains(&at) { None } else { ram.get(at) };
        for vcpu in &mut self.vcpus {
            for &va in &self.addresses {
                for (what, who) in ALL {
                    if let Ok(found) = walk(&vcpu.m, &word, va, what, who) {
                        vcpu.allowed.insert((va >> 12, (what as u8, who as u8), found.address >> 12));
                    }
                }
            }
        }
    }

    /// A store to guest memory that nobody tells the kind of, but that is allowed to happen.
    pub fn store(&mut self, at: u64, entry: u64) {
        self.ram().set(at, entry);
        self.remember();
    }

    /// A store by emulation.
    pub fn emulate(&mut self, at: u64, len: usize, entry: u64) {
        let bytes = entry.to_le_bytes();
        self.memory.shared(CPU).write(mmu::Gpa::new_truncate(at), &bytes[..len.min(8)]).unwrap();
        let _ = self.kind.track_write(&mut self.memory.exclusive(CPU), mmu::Gpa::new_truncate(at), len);
        self.remember();
    }

    /// What the processor finds in the shadow; CR0.WP and EFER.NXE are set, SMEP and SMAP the guest's.
    pub fn hardware(&self, vcpu: usize, va: u64, what: What, who: Who) -> Option<u64> {
        let Vcpu { m, root, .. } = &self.vcpus[vcpu];
        let legacy = !m.lma;
        let (mut table, mut level) = (root.hpa.pfn().number(), root.level as u32);
        let (mut writable, mut user, mut executable) = (true, true, true);
        loop {
            let entry = self.tables.peek(table, (va >> (12 + 9 * (level - 1)) & 511) as usize).expect("C3");
            // Not present, or a note about device memory: malformed by its highest address bit.
            if entry & 1 == 0 || entry & (1 << 11 | 1 << 51) == 1 << 51 {
                return None;
            }
            let pdpte = legacy && level == 3;
            assert!(entry >> 46 & 0x3f == 0, "B1");
            assert!(!pdpte || entry & 0x1e6 == 0, "B1: PDPTE {entry:#x}");
            if !pdpte {
                writable &= entry >> 1 & 1 == 1;
                user &= entry >> 2 & 1 == 1;
                executable &= entry >> 63 == 0;
            }
            let frame = (entry & 0x000f_ffff_ffff_f000) >> 12;
            if level == 1 || (!pdpte && entry >> 7 & 1 == 1) {
                let by_user = who == Who::User;
                let permitted = match what {
                    What::Read => {
                        if by_user {
                            user
                        } else {
                            !(user && m.smap)
                        }
                    }
                    What::Write => writable && if by_user { user } else { !(user && m.smap) },
                    What::Fetch => executable && if by_user { user } else { !(user && m.smep) },
                };
                let pages = 1u64 << (9 * (level - 1));
                let page = frame + (va >> 12 & (pages - 1));
                return permitted.then_some(((page - MOVED) << 12) | va & 0xfff);
            }
            (table, level) = (frame, level - 1);
        }
    }

    /// A1 to A4: an access as the guest makes it.
    pub fn access(&mut self, vcpu: usize, va: u64, what: What, who: Who) -> Ended {
        for _ in 0..12 {
            let m = self.vcpus[vcpu].m;
            // D7: no vCPU enters on an obsolete root.
            let (paging, cpu) = registers(&m);
            let mut mmu = Mmu::new(CpuRole::new(&paging, &cpu), self.vcpus[vcpu].root);
            if mmu.enter(self.memory, CPU).is_obsolete() {
                self.switch(vcpu, m);
            }
            if let Some(at) = self.hardware(vcpu, va, what, who) {
                let known = self.vcpus[vcpu].allowed.contains(&(va >> 12, (what as u8, who as u8), at >> 12));
                assert_eq!(at & 0xfff, va & 0xfff, "A1");
                assert!(
                    known,
                    "A3: {what:?} {who:?} at {va:#x} reaches {at:#x}; now: {:x?}",
                    walk(&m, &|at| self.word(at), va, what, who)
                );
                return Ended::At(at);
            }
            self.tables.fill(&mut self.cache);
            let (paging, cpu) = registers(&m);
            let context = PagingContext::<Gva, mmu::Gpa>::new(CpuRole::new(&paging, &cpu));
            let expected = walk(&m, &|at| self.word(at), va, what, who);
            let found = context.walk(&self.memory.shared(CPU), &regs(&m), Gva::new(va), access(what, who));
            let walked = match (found, expected) {
                (Ok(walked), Ok(expected)) => {
                    assert_eq!(walked.translation.address.bits(), expected.address, "A1");
                    walked
                }
                (Err(WalkError::Fault(fault)), Err(code)) => {
                    assert_eq!(fault.page_fault_code().bits(), code, "A2");
                    return Ended::Fault(code);
                }
                (found, expected) => panic!("A2: {found:?} where {expected:x?} is expected"),
            };
            self.remember();
            let root = self.vcpus[vcpu].root;
            let mut guard = self.memory.exclusive(CPU);
            let done =
                self.kind.fault(&mut guard, &mut self.cache, root, &walked, Gva::new(va), access(what, who));
            drop(guard);
            self.check();
            match done.outcome {
                ShadowFault::Mapped | ShadowFault::Spurious | ShadowFault::Retry => {}
                ShadowFault::Mmio(_) | ShadowFault::ReadOnly(_) => return Ended::Device,
                ShadowFault::WriteTracked(gpa) => {
                    assert_eq!(gpa, walked.translation.address);
                    self.emulated += 1;
                    return Ended::Emulated(gpa.bits());
                }
                ShadowFault::NoRoot => {
                    let m = self.vcpus[vcpu].m;
                    self.switch(vcpu, m);
                }
                other => panic!("{other:?}"),
            }
        }
        panic!("A4: livelock at {va:#x}, {what:?} {who:?}");
    }

    /// A guest's store of an entry through its own map of memory at `va`.
    pub fn guest_store(&mut self, vcpu: usize, va: u64, entry: u64) -> Ended {
        let ended = self.access(vcpu, va, What::Write, Who::Supervisor);
        match ended {
            Ended::At(at) if at / 8 < PAGES * 512 => self.store(at & !7, entry),
            Ended::Emulated(at) => self.emulate(at & !7, 8, entry),
            _ => {}
        }
        ended
    }

    pub fn check(&self) {
        if let Err(broken) = self.kind.check(&self.memory.exclusive(CPU)) {
            panic!("{broken}");
        }
        let _ = self.kind.reclaim(self.memory, usize::MAX, |page| self.tables.release(page));
    }

    /// C3: no table page is lost.
    pub fn finish(mut self) {
        self.check();
        self.tables.drain(&mut self.cache);
        self.kind.dismantle(|page| self.tables.release(page));
        assert_eq!(self.tables.in_use(), 0);
    }
}

impl NotedRam {
    /// Memory for notes is all zero when a slot is inserted.
    pub fn zero_notes(&self, from: u64) {
        let from = from as usize;
        self.tracks[from..].iter().for_each(|count| count.store(0, Ordering::SeqCst));
        for blocks in &self.blocks {
            blocks[from / 512..].iter().for_each(|count| count.store(0, Ordering::SeqCst));
        }
    }
}

/// What operations over ranges need: a batch after the other, to the end.
pub fn sweep(mut batch: impl FnMut(&mut mmu::ZapProgress)) {
    let mut progress = mmu::ZapProgress::default();
    while !progress.is_done() {
        batch(&mut progress);
    }
}

impl World {
    /// The table and the index of the leaf that the processor finds for `va`, and the leaf.
    pub fn leaf(&self, vcpu: usize, va: u64) -> Option<(u64, usize, u64)> {
        let root = self.vcpus[vcpu].root;
        let (mut table, mut level) = (root.hpa.pfn().number(), root.level as u32);
        loop {
            let index = (va >> (12 + 9 * (level - 1)) & 511) as usize;
            let entry = self.tables.peek(table, index).expect("C3");
            if entry & 1 == 0 {
                return None;
            }
            if level == 1 || (level < 4 && entry >> 7 & 1 == 1) {
                return Some((table, index, entry));
            }
            (table, level) = ((entry & 0x000f_ffff_ffff_f000) >> 12, level - 1);
        }
    }

    /// An access as the guest makes it, with the marks that the processor leaves in the shadow.
    pub fn use_page(&mut self, vcpu: usize, va: u64, what: What, who: Who) -> Ended {
        let ended = self.access(vcpu, va, what, who);
        if let (Ended::At(_), Some((table, index, _))) = (ended, self.leaf(vcpu, va)) {
            self.tables.mark(table, index, if what == What::Write { 0x60 } else { 0x20 });
        }
        ended
    }

    /// Begins the log of the slot at frame 0.
    pub fn start_log(&mut self, by: mmu::LogBy) {
        let slot = self.memory.exclusive(CPU).start_dirty_log(Gfn::default(), by).unwrap();
        sweep(|progress| {
            let _ = self.kind.rearm(&mut self.memory.exclusive(CPU), &slot, progress);
        });
        self.check();
    }

    /// The frames that the log of the slot at frame 0 has, and takes them out.
    pub fn harvest(&mut self, by: mmu::LogBy) -> Vec<u64> {
        let all = GfnRange::new(Gfn::default(), PAGES).unwrap();
        if by == mmu::LogBy::DirtyBits {
            sweep(|progress| {
                let _ = self.kind.collect_dirty(&mut self.memory.exclusive(CPU), all, progress);
            });
        }
        let mut found = vec![];
        for index in 0..PAGES as usize / 64 {
            let mask = self.memory.shared(CPU).dirty_log(Gfn::default()).unwrap().clear(index, u64::MAX);
            let first = index as u64 * 64;
            let mut guard = self.memory.exclusive(CPU);
            let _ = self.kind.rearm_pages(&mut guard, Gfn::new_truncate(first), mask);
            found.extend((0..64).filter(|bit| mask >> bit & 1 != 0).map(|bit| first + bit));
        }
        self.check();
        found
    }

    pub fn zap_range(&mut self, range: GfnRange) {
        sweep(|progress| {
            let _ = self.kind.zap(&mut self.memory.exclusive(CPU), range, progress);
        });
    }
}
