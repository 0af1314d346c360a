//! A guest under a shadow kind: its memory, two vCPUs on two CPUs, the processor over the shadow with its TLB, and the
//! reference beside it.
mod memory;
mod seen;
mod tlb;

use std::collections::HashMap;

use mmu::{
    Access, CpuId, CpuRole, Cr4, Entered, Exclusive, Gfn, GfnRange, Gpa, Gva, Invpcid, Issued, Level, Mmu,
    NearFault, NoShadowRoot, Npt, NptHost, Pae, PaeHost, PageSize, PagingContext, PagingState, Requests,
    Root, ShadowDone, ShadowFault, ShadowMmu, SlotFlags, TableCache, TagFlush, Tags, VmMemory, WalkError,
    WalkRegs, ZapProgress,
};

pub use memory::{memory, memory_of, slot, store, NotedRam, MOVED, ONE_SLOT, PAGES, SLOTS};
use seen::{page, Remembered};
use tlb::{top, walk_shadow, Tlb};

use super::flat::FlatRam;
use super::lent::{Lent, LentStore};
use super::manual::guest::{access, registers, regs};
use super::manual::{walk, Machine, What, Who};
use super::tables::HostTables;

pub const CPU: CpuId = CpuId::BOOT;
const PCIDE: u64 = 1 << 17;
const PGE: u64 = 1 << 7;

pub type Kind = ShadowMmu<'static, Npt, HostTables>;

pub struct Vcpu {
    pub m: Machine,
    /// The root that it ran on last.
    pub root: Root,
    pub mmu: Mmu,
    /// CR4 bits that the reference walk has no use for.
    pub cr4: u64,
    pdptes: [u64; 4],
    on: CpuId,
    entered: Option<Entered<'static>>,
    seen: Remembered,
}

impl Vcpu {
    fn pcid(&self) -> u16 {
        if self.cr4 & PCIDE != 0 {
            self.m.cr3 as u16 & 0xfff
        } else {
            0
        }
    }
}

/// What the processor does beside an access as it must.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// It uses a translation that the TLB has.
    pub hit: bool,
    /// It begins the walk where the paging-structure caches know to.
    pub resume: bool,
    /// It keeps what it found.
    pub keep: bool,
    /// And it looks up another address on its own account.
    pub ahead: Option<usize>,
}

pub struct World {
    pub memory: &'static VmMemory<NotedRam>,
    pub kind: Kind,
    pub tables: HostTables,
    pub cache: TableCache,
    pub vcpus: Vec<Vcpu>,
    pub addresses: Vec<u64>,
    pub emulated: usize,
    /// Faults and invalidations that took no walk.
    pub done_near: usize,
    /// Faults always take a walk, as after something changed by nobody who says so.
    pub walks: bool,
    /// How often a short way was asked for: each third time it is not tried.
    pub tries: usize,
    /// By CPU, vCPU and the number of the vCPU's tag.
    tlbs: HashMap<(usize, usize, u8), Tlb>,
    /// Whether the second slot is there, and read-only.
    slot: Option<bool>,
    /// Addresses that no other slot has at the moment, and those that are read-only.
    pub hidden: std::ops::Range<u64>,
    pub fixed: std::ops::Range<u64>,
    lent_memory: Lent<VmMemory<NotedRam>>,
    lent_store: LentStore,
}

/// What an architectural TLB loses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loses {
    Nothing,
    Pcid(u16),
    Page(u16, u64),
    All,
}

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    At(u64),
    Fault(u32),
    Device,
    Emulated(u64),
}

/// Accesses by what a page permits.
const ALL: [(What, Who); 6] = [
    (What::Read, Who::User),
    (What::Write, Who::User),
    (What::Fetch, Who::User),
    (What::Read, Who::Supervisor),
    (What::Write, Who::Supervisor),
    (What::Fetch, Who::Supervisor),
];

/// What was done on behalf of one vCPU asks for no flush of others.
fn own(outcome: ()) -> ShadowDone<()> {
    ShadowDone { outcome, issued: None }
}

impl World {
    pub fn new(m: Machine, quota: usize, addresses: Vec<u64>, setup: impl Fn(&FlatRam)) -> Self {
        Self::over(ONE_SLOT, m, quota, addresses, Tags::One, setup)
    }

    /// A world with a slot that comes and goes.
    pub fn with(m: Machine, quota: usize, addresses: Vec<u64>, tags: Tags, setup: impl Fn(&FlatRam)) -> Self {
        Self::over(SLOTS, m, quota, addresses, tags, setup)
    }

    pub fn over(
        slots: &[(u64, u64)],
        m: Machine,
        quota: usize,
        addresses: Vec<u64>,
        tags: Tags,
        setup: impl Fn(&FlatRam),
    ) -> Self {
        let (lent_memory, memory) = Lent::new(Box::new(memory_of(slots)));
        let memory: &'static _ = memory;
        let (lent_store, store) = LentStore::new(quota);
        setup(&memory.backing().flat);
        let tables = HostTables::new(quota + 64);
        let host =
            NptHost { five_level: m.la57, max_phys_addr: 46, no_execute: true, largest: PageSize::Size2M };
        let pae = Pae::new(&PaeHost { max_phys_addr: 46 });
        let kind = Kind::new(memory, Npt::new(&host), pae, tables.clone(), store).unwrap();
        let mut world = Self {
            memory,
            kind,
            tables,
            cache: TableCache::new(),
            vcpus: vec![],
            addresses,
            emulated: 0,
            done_near: 0,
            tries: 0,
            walks: false,
            tlbs: HashMap::new(),
            slot: Some(false),
            hidden: 0..0,
            fixed: 0..0,
            lent_memory,
            lent_store,
        };
        for number in 0..2 {
            let state = world.state(&m, 0);
            let mmu = Mmu::shadow(state, registers(&m).1, Level::L4, true, tags);
            let root = mmu.root();
            let on = CpuId::new(number).unwrap();
            let (pdptes, seen) = (state.pdptes, Remembered::default());
            world.vcpus.push(Vcpu { m, root, mmu, cr4: 0, pdptes, on, entered: None, seen });
            world.carry_out(number);
        }
        world.remember();
        world
    }

    pub fn ram(&self) -> &FlatRam {
        &self.memory.backing().flat
    }

    /// The registers as the crate takes them, with the PDPTEs that the processor would load now.
    fn state(&self, m: &Machine, cr4: u64) -> PagingState {
        let (mut regs, _) = registers(m);
        regs.cr4 |= Cr4::from_bits_retain(cr4);
        PagingState { regs, cr3: m.cr3, pdptes: self.load_pdptes(m), smm: false }
    }

    fn load_pdptes(&self, m: &Machine) -> [u64; 4] {
        let word = self.word();
        [0, 1, 2, 3].map(|index| word((m.cr3 & 0xffff_ffe0) + index * 8).unwrap_or(0))
    }

    /// Reads guest memory as far as there are slots.
    fn word(&self) -> impl Fn(u64) -> Option<u64> + use<'_> {
        move |at| {
            let hole = self.slot.is_none() && (16..32).contains(&(at >> 12));
            self.ram().get(at).filter(|_| !hole && !self.hidden.contains(&at))
        }
    }

    /// What the guest's tables say for `vcpu`: PDPTEs are those that it has loaded.
    fn guest_walk(&self, vcpu: usize, va: u64, what: What, who: Who) -> Result<super::manual::Reached, u32> {
        let Vcpu { m, pdptes, .. } = &self.vcpus[vcpu];
        walk(m, &loaded(m, pdptes, &self.word()), va, what, who)
    }

    /// Makes the vCPU on each of these CPUs exit.
    pub fn kick(&mut self, issued: Option<Issued>) {
        let Some(issued) = issued else { return };
        for vcpu in &mut self.vcpus {
            if issued.kick.contains(vcpu.on) {
                vcpu.entered = None;
            }
        }
    }

    /// Carries out what is due for the vCPU.
    pub fn carry_out(&mut self, vcpu: usize) {
        self.vcpus[vcpu].entered = None;
        for _ in 0..16 {
            self.tables.fill(&mut self.cache);
            let Self { kind, cache, vcpus, memory, .. } = self;
            let mut guard = memory.exclusive(vcpus[vcpu].on);
            let done = vcpus[vcpu].mmu.carry_out(kind, &mut guard, cache);
            if done.outcome == Err(NoShadowRoot::Full) {
                assert!(vcpus[1 - vcpu].mmu.shed_root(kind, &mut guard), "the quota is large enough");
            }
            drop(guard);
            self.kick(done.issued);
            self.check();
            if done.outcome == Err(NoShadowRoot::Wait) {
                self.vcpus.iter_mut().for_each(|vcpu| vcpu.entered = None);
            }
            if done.outcome.is_ok() {
                self.vcpus[vcpu].root = self.vcpus[vcpu].mmu.root();
                return;
            }
        }
        panic!("A4: no root");
    }

    /// The vCPU is in the guest, on a root of now.
    fn enter(&mut self, vcpu: usize) {
        let on = self.vcpus[vcpu].on;
        if self.vcpus[vcpu].entered.is_some() {
            return;
        }
        for other in &mut self.vcpus {
            if other.on == on {
                other.entered = None;
            }
        }
        for _ in 0..4 {
            let entered = self.vcpus[vcpu].mmu.enter(self.memory, on);
            if entered.is_obsolete() {
                drop(entered);
                self.carry_out(vcpu);
                continue;
            }
            let (slot, legacy) = (self.vcpus[vcpu].mmu.slot(), !self.vcpus[vcpu].m.lma);
            let tlb = self.tlbs.entry((on.number(), vcpu, slot)).or_default();
            match entered.flush() {
                TagFlush::None => {}
                TagFlush::Address(va) => tlb.flush_page(va.bits(), legacy),
                TagFlush::All => tlb.flush(),
            }
            self.vcpus[vcpu].root = entered.root();
            self.vcpus[vcpu].entered = Some(entered);
            self.check_tlbs();
            return;
        }
        panic!("D7: the vCPU cannot be entered");
    }

    fn tlb(&mut self, vcpu: usize) -> &mut Tlb {
        let Vcpu { on, mmu, .. } = &self.vcpus[vcpu];
        let tag = (on.number(), vcpu, mmu.slot());
        self.tlbs.entry(tag).or_default()
    }

    /// Something happens to the vCPU's registers or translations: `act` tells the crate. Some events load PDPTEs.
    pub fn event(
        &mut self,
        vcpu: usize,
        m: Machine,
        cr4: u64,
        loads: bool,
        act: impl FnOnce(&mut Mmu, &PagingState) -> Requests,
        loses: Loses,
    ) {
        let mut state = self.state(&m, cr4);
        if !loads {
            state.pdptes = self.vcpus[vcpu].pdptes;
        }
        let vcpu = &mut self.vcpus[vcpu];
        vcpu.entered = None;
        (vcpu.m, vcpu.cr4, vcpu.pdptes) = (m, cr4, state.pdptes);
        let _ = act(&mut vcpu.mmu, &state);
        match loses {
            Loses::Nothing => {}
            Loses::Pcid(pcid) => vcpu.seen.flush(|of| of == pcid),
            Loses::Page(pcid, page) => vcpu.seen.flush_page(pcid, page),
            Loses::All => vcpu.seen.flush(|_| true),
        }
        self.remember();
    }

    /// Other registers, set from outside: all translations go.
    pub fn switch(&mut self, vcpu: usize, m: Machine) {
        let cr4 = self.vcpus[vcpu].cr4;
        self.event(
            vcpu,
            m,
            cr4,
            true,
            |mmu, state| mmu.set_from_outside(*state, registers(&m).1),
            Loses::All,
        );
        self.carry_out(vcpu);
    }

    /// All of the guest's translations go.
    pub fn flush(&mut self, vcpu: usize) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        self.event(vcpu, m, cr4, false, |mmu, _| mmu.flush_guest(), Loses::All);
        self.carry_out(vcpu);
    }

    /// MOV to CR3. Without PCIDs, or without NOFLUSH, the translations of the PCID that is loaded go.
    pub fn mov_to_cr3(&mut self, vcpu: usize, cr3: u64, no_flush: bool) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let keep = no_flush && cr4 & PCIDE != 0;
        let pcid = if cr4 & PCIDE != 0 { cr3 as u16 & 0xfff } else { 0 };
        let value = cr3 | u64::from(no_flush) << 63;
        let seen = self.near(vcpu, |mmu, kind, guard| mmu.mov_to_seen_cr3(kind, guard, value));
        self.event(
            vcpu,
            Machine { cr3, ..m },
            cr4,
            true,
            |mmu, state| if seen { Requests::NONE } else { mmu.mov_to_cr3(value, state.pdptes) },
            if keep { Loses::Nothing } else { Loses::Pcid(pcid) },
        );
    }

    /// MOV to CR0: a change of PG takes all translations. In a guest that has EFER.LME, long mode follows PG.
    pub fn mov_to_cr0(&mut self, vcpu: usize, pg: bool, wp: bool, long: bool) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let all = pg != m.pg;
        let new = Machine { pg, wp, lma: long && pg, ..m };
        let regs = self.state(&new, cr4).regs;
        let seen = self.near(vcpu, |mmu, kind, guard| {
            let done = regs.efer == mmu.state().regs.efer && mmu.mov_to_cr0_wp(regs.cr0);
            done.then_some(own(())).or_else(|| mmu.mov_to_seen_cr0(kind, guard, regs.cr0, regs.efer))
        });
        self.event(
            vcpu,
            new,
            cr4,
            all,
            |mmu, state| match seen {
                true => Requests::NONE,
                false => mmu.mov_to_cr0(state.regs.cr0, state.regs.efer, state.pdptes),
            },
            if all { Loses::All } else { Loses::Nothing },
        );
    }

    /// MOV to CR4.
    pub fn mov_to_cr4(&mut self, vcpu: usize, new: Machine, cr4: u64) {
        let old = (self.vcpus[vcpu].m, self.vcpus[vcpu].cr4, self.vcpus[vcpu].pcid());
        let changed = old.1 ^ cr4;
        let all = changed & PGE != 0
            || changed & old.1 & PCIDE != 0
            || old.0.pae != new.pae
            || old.0.pse != new.pse
            || !old.0.pke && new.pke;
        let current = !old.0.smep && new.smep;
        let regs = self.state(&new, cr4).regs;
        let seen = self.near(vcpu, |mmu, kind, guard| mmu.mov_to_seen_cr4(kind, guard, regs.cr4));
        self.event(
            vcpu,
            new,
            cr4,
            all || current,
            |mmu, state| if seen { Requests::NONE } else { mmu.mov_to_cr4(state.regs.cr4, state.pdptes) },
            if all {
                Loses::All
            } else if current {
                Loses::Pcid(old.2)
            } else {
                Loses::Nothing
            },
        );
    }

    /// WRMSR to EFER.
    pub fn wrmsr_efer(&mut self, vcpu: usize, nxe: bool) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let new = Machine { nxe, ..m };
        self.event(vcpu, new, cr4, false, |mmu, state| mmu.wrmsr_efer(state.regs.efer), Loses::Nothing);
    }

    pub fn invlpg(&mut self, vcpu: usize, va: u64) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let pcid = self.vcpus[vcpu].pcid();
        let at = page(&m, va);
        let near = self.near(vcpu, |mmu, kind, guard| mmu.invlpg_at_once(kind, guard, Gva::new(va)).map(own));
        let act = |mmu: &mut Mmu, _: &PagingState| match near {
            true => Requests::NONE,
            false => mmu.invlpg(Gva::new(va)),
        };
        self.event(vcpu, m, cr4, false, act, Loses::Page(pcid, at));
    }

    pub fn invpcid(&mut self, vcpu: usize, what: Invpcid) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let loses = match what {
            Invpcid::Address { pcid, address } => Loses::Page(pcid, page(&m, address.bits())),
            Invpcid::Single { pcid } => Loses::Pcid(pcid),
            Invpcid::All | Invpcid::AllButGlobal => Loses::All,
        };
        self.event(vcpu, m, cr4, false, |mmu, _| mmu.invpcid(what), loses);
    }

    /// A page fault is delivered, of which the crate is told if it does not know.
    fn page_fault(&mut self, vcpu: usize, va: u64, told: bool) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let lost = Loses::Page(self.vcpus[vcpu].pcid(), page(&m, va));
        let told = told
            || self.near(vcpu, |mmu, kind, guard| mmu.page_fault_at_once(kind, guard, Gva::new(va)).map(own));
        let act = |mmu: &mut Mmu, _: &PagingState| match told {
            true => Requests::NONE,
            false => mmu.page_fault(Gva::new(va)),
        };
        self.event(vcpu, m, cr4, false, act, lost);
    }

    /// INIT: CR0.PG is clear, and so is everything else.
    pub fn init(&mut self, vcpu: usize) {
        let old = self.vcpus[vcpu].m;
        let m = Machine {
            pg: false,
            wp: false,
            pae: false,
            pse: false,
            la57: false,
            smep: false,
            smap: false,
            pke: false,
            pks: false,
            lma: false,
            nxe: false,
            cr3: 0,
            ..old
        };
        self.event(vcpu, m, 0, true, |mmu, _| mmu.init(), Loses::All);
    }

    /// The vCPU runs on another CPU.
    pub fn migrate(&mut self, vcpu: usize, on: usize) {
        self.vcpus[vcpu].entered = None;
        self.vcpus[vcpu].on = CpuId::new(on).unwrap();
    }

    /// Notes where every access leads now, for every vCPU.
    pub fn remember(&mut self) {
        let read_only = self.slot == Some(true);
        let range = self.fixed.clone();
        let fixed = move |at: u64| range.contains(&at) || read_only && (16..32).contains(&(at >> 12));
        for number in 0..self.vcpus.len() {
            let mut seen = std::mem::take(&mut self.vcpus[number].seen);
            {
                let vcpu = &self.vcpus[number];
                let word = self.word();
                let word = loaded(&vcpu.m, &vcpu.pdptes, &word);
                for &va in &self.addresses {
                    seen.look(&vcpu.m, &word, &fixed, vcpu.pcid(), va);
                }
            }
            self.vcpus[number].seen = seen;
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
        self.memory.shared(CPU).write(Gpa::new_truncate(at), &bytes[..len.min(8)]).unwrap();
        let done = self.kind.track_write(&mut self.memory.exclusive(CPU), Gpa::new_truncate(at), len);
        self.kick(done.issued);
        self.remember();
    }

    /// Zaps a range, in batches.
    pub fn zap(&mut self, range: GfnRange) {
        let mut progress = ZapProgress::default();
        while !progress.is_done() {
            let done = self.kind.zap(&mut self.memory.exclusive(CPU), range, &mut progress);
            self.kick(done.issued);
        }
    }

    pub fn invalidate_all(&mut self) {
        let done = self.kind.invalidate_all(&mut self.memory.exclusive(CPU));
        self.kick(done.issued);
        assert!(self.vcpus.iter().all(|vcpu| vcpu.entered.is_none()), "D7: a vCPU runs on an obsolete root");
    }

    pub fn zap_obsolete(&mut self) {
        let mut progress = ZapProgress::default();
        while !progress.is_done() {
            let done = self.kind.zap_obsolete(&mut self.memory.exclusive(CPU), &mut progress);
            self.kick(done.issued);
        }
    }

    /// The second slot goes, comes back, or changes its flags: `None`, or whether it is read-only.
    pub fn change_slot(&mut self, slot: Option<bool>) {
        let before = std::mem::replace(&mut self.slot, slot);
        let flags = |read_only| if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
        let range = memory::slot(SLOTS[1], SlotFlags::empty()).range;
        let start = Gfn::new_truncate(SLOTS[1].0);
        let memory = self.memory;
        let mut guard = memory.exclusive(CPU);
        match (before, slot) {
            (None, None) => {}
            (None, Some(read_only)) => {
                memory.backing().clear_notes(1);
                guard.insert_slot(&memory::slot(SLOTS[1], flags(read_only))).unwrap();
            }
            (Some(_), None) => drop(guard.remove_slot(start).unwrap()),
            (Some(_), Some(read_only)) => {
                let _ = guard.set_slot_flags(start, flags(read_only)).unwrap();
            }
        }
        let mut issued = None;
        if before.is_some() {
            let mut progress = ZapProgress::default();
            while !progress.is_done() {
                issued = self.kind.zap(&mut guard, range, &mut progress).issued.or(issued);
            }
        }
        drop(guard);
        self.kick(issued);
        self.remember();
    }

    /// The entry of the shadow that maps `va`, in tables of long mode.
    pub fn shadow_leaf(&self, vcpu: usize, va: u64) -> u64 {
        let root = self.vcpus[vcpu].root;
        let (mut table, mut level) = (root.hpa.pfn().number(), root.level as u32);
        loop {
            let entry = self.tables.peek(table, (va >> (12 + 9 * (level - 1)) & 511) as usize).expect("C3");
            if level == 1 || entry >> 7 & 1 == 1 {
                return entry;
            }
            (table, level) = ((entry & 0x000f_ffff_ffff_f000) >> 12, level - 1);
        }
    }

    /// What the processor finds in the shadow, without its TLB; CR0.WP and EFER.NXE are set, SMEP and SMAP the guest's.
    pub fn hardware(&self, vcpu: usize, va: u64, what: What, who: Who) -> Option<u64> {
        let Vcpu { m, root, .. } = &self.vcpus[vcpu];
        let found = walk_shadow(&self.tables, !m.lma, top(*root), va, None).0?;
        found.rights.permit(m, what, who).then_some(found.frame << 12 | va & 0xfff)
    }

    /// The same with its TLB, and what that may do.
    fn processor(&mut self, vcpu: usize, va: u64, what: What, who: Who, how: How) -> Option<u64> {
        let Vcpu { m, root, .. } = self.vcpus[vcpu];
        let legacy = !m.lma;
        let ahead = how.ahead.and_then(|ahead| self.addresses.get(ahead)).copied();
        if let Some(ahead) = ahead {
            let (found, stood) = walk_shadow(&self.tables, legacy, top(root), ahead, Some(false));
            let tlb = self.tlb(vcpu);
            tlb.insert_structures(ahead, legacy, &stood);
            if let Some(found) = found {
                tlb.insert(found);
            }
        }
        let hit = self.tlb(vcpu).find(va, legacy).filter(|_| how.hit);
        let found = hit.or_else(|| {
            let resumed = self.tlb(vcpu).stand(va, legacy).filter(|_| how.resume);
            let from = resumed.unwrap_or(top(root));
            let (found, stood) = walk_shadow(&self.tables, legacy, from, va, Some(false));
            if how.keep {
                self.tlb(vcpu).insert_structures(va, legacy, &stood);
                if let Some(found) = found {
                    self.tlb(vcpu).insert(found);
                }
            }
            found
        });
        let found = found.filter(|found| found.rights.permit(&m, what, who));
        if found.is_none() {
            // Page faults take away what the TLB has of the address (Intel SDM vol. 3, 4.10.4.1).
            self.tlb(vcpu).flush_page(va, legacy);
        } else if what == What::Write && hit.is_none() {
            let _ = walk_shadow(&self.tables, legacy, top(root), va, Some(true));
        }
        found.map(|found| found.frame << 12 | va & 0xfff)
    }

    /// A1 to A4: an access as the guest makes it, by a processor without a TLB.
    pub fn access(&mut self, vcpu: usize, va: u64, what: What, who: Who) -> Ended {
        // Tests that change something by hand kick nobody.
        self.vcpus[vcpu].entered = None;
        self.access_as(vcpu, va, what, who, How::default())
    }

    /// A1 to A4, C1: an access as the guest makes it.
    pub fn access_as(&mut self, vcpu: usize, va: u64, what: What, who: Who, mut how: How) -> Ended {
        for _ in 0..16 {
            self.enter(vcpu);
            let m = self.vcpus[vcpu].m;
            if let Some(at) = self.processor(vcpu, va, what, who, how) {
                assert_eq!(at & 0xfff, va & 0xfff, "A1");
                self.assert_seen(vcpu, va, what, who, at);
                return Ended::At(at);
            }
            how.ahead = None;
            self.vcpus[vcpu].entered = None;
            self.tables.fill(&mut self.cache);
            let (paging, cpu) = registers(&m);
            let context = PagingContext::<Gva, Gpa>::new(CpuRole::new(&paging, &cpu));
            let expected = self.guest_walk(vcpu, va, what, who);
            match (self.fault_near(vcpu, &context, va, access(what, who)), &expected) {
                (None, _) => {}
                (Some(NearFault::Mapped), Ok(_)) => {
                    self.remember();
                    self.check();
                    continue;
                }
                (Some(NearFault::Guest(delivered)), &Err(code)) => {
                    assert_eq!(delivered.bits(), code, "A2");
                    self.page_fault(vcpu, va, true);
                    return Ended::Fault(code);
                }
                (Some(found), expected) => panic!("A2: {found:?} where {expected:x?} is expected"),
            }
            let walk_regs = WalkRegs { pdptes: Some(self.vcpus[vcpu].pdptes), ..regs(&m) };
            let found = context.walk(&self.memory.shared(CPU), &walk_regs, Gva::new(va), access(what, who));
            let walked = match (found, expected) {
                (Ok(walked), Ok(expected)) => {
                    assert_eq!(walked.translation.address.bits(), expected.address, "A1");
                    walked
                }
                (Err(WalkError::Fault(fault)), Err(code)) => {
                    let delivered = fault.page_fault_code();
                    assert_eq!(delivered.bits(), code, "A2");
                    self.page_fault(vcpu, va, false);
                    return Ended::Fault(code);
                }
                (found, expected) => panic!("A2: {found:?} where {expected:x?} is expected"),
            };
            self.remember();
            let Self { kind, cache, vcpus, memory, .. } = self;
            let mut guard = memory.exclusive(vcpus[vcpu].on);
            let done =
                vcpus[vcpu].mmu.fault(kind, &mut guard, cache, &walked, Gva::new(va), access(what, who));
            drop(guard);
            self.kick(done.issued);
            self.check();
            match done.outcome {
                ShadowFault::Mapped | ShadowFault::Spurious | ShadowFault::Retry | ShadowFault::NoRoot => {}
                // Tests that take something away by hand kick nobody.
                ShadowFault::Wait => self.vcpus.iter_mut().for_each(|vcpu| vcpu.entered = None),
                ShadowFault::Mmio(_) | ShadowFault::ReadOnly(_) => return Ended::Device,
                ShadowFault::WriteTracked(gpa) => {
                    assert_eq!(gpa, walked.translation.address);
                    self.emulated += 1;
                    return Ended::Emulated(gpa.bits());
                }
                ShadowFault::Full => {
                    let Self { kind, vcpus, memory, .. } = self;
                    let mut guard = memory.exclusive(CPU);
                    assert!(vcpus[1 - vcpu].mmu.shed_root(kind, &mut guard), "the quota is large enough");
                }
                other => panic!("{other:?}"),
            }
        }
        panic!("A4: livelock at {va:#x}, {what:?} {who:?}");
    }

    /// A3, C1: whatever an access reached, the guest's tables have allowed it since they were flushed.
    fn assert_seen(&self, vcpu: usize, va: u64, what: What, who: Who, at: u64) {
        let Vcpu { m, seen, .. } = &self.vcpus[vcpu];
        let pcid = self.vcpus[vcpu].pcid();
        let known = seen.permit(m, pcid, page(m, va), at >> 12, what, who);
        assert!(
            known,
            "A3, C1: {what:?} {who:?} at {va:#x} reaches {at:#x}; now: {:x?}",
            self.guest_walk(vcpu, va, what, who)
        );
        let second = (16..32).contains(&(at >> 12));
        assert!(!second || self.slot.is_some(), "C3: memory that was taken away");
        assert!(!second || what != What::Write || self.slot == Some(false), "C2: read-only memory");
    }

    /// Whether the guest's tables have allowed the access to frame `gfn` since they were flushed.
    pub fn is_seen(&self, vcpu: usize, va: u64, what: What, who: Who, gfn: u64) -> bool {
        let Vcpu { m, seen, .. } = &self.vcpus[vcpu];
        seen.permit(m, self.vcpus[vcpu].pcid(), page(m, va), gfn, what, who)
    }

    /// Whether the fault was handled near the last one, without a walk.
    fn fault_near(
        &mut self,
        vcpu: usize,
        context: &PagingContext<Gva, Gpa>,
        va: u64,
        access: Access,
    ) -> Option<NearFault> {
        let regs = WalkRegs { pdptes: Some(self.vcpus[vcpu].pdptes), ..regs(&self.vcpus[vcpu].m) };
        let mut outcome = None;
        self.near(vcpu, |mmu, kind, guard| {
            outcome = mmu.fault_near(kind, guard, context, &regs, Gva::new(va), access);
            outcome.map(|_| own(()))
        });
        outcome
    }

    /// What is tried before the whole way, two times of three, unless a test says otherwise; whether it was done.
    fn near(
        &mut self,
        vcpu: usize,
        act: impl FnOnce(&mut Mmu, &mut Kind, &mut Exclusive<'static, NotedRam>) -> Option<ShadowDone<()>>,
    ) -> bool {
        let Self { kind, vcpus, memory, .. } = self;
        let vcpu = &mut vcpus[vcpu];
        vcpu.entered = None;
        self.tries += 1;
        if self.walks || self.tries.is_multiple_of(3) {
            return false;
        }
        let mut guard = memory.exclusive(vcpu.on);
        let done = act(&mut vcpu.mmu, kind, &mut guard);
        drop(guard);
        let Some(done) = done else { return false };
        self.done_near += 1;
        self.kick(done.issued);
        true
    }

    /// A guest's store of an entry through its own map of memory at `va`.
    pub fn guest_store(&mut self, vcpu: usize, va: u64, entry: u64) -> Ended {
        self.guest_store_as(vcpu, va, 8, entry, How::default())
    }

    pub fn guest_store_as(&mut self, vcpu: usize, va: u64, len: u64, entry: u64, how: How) -> Ended {
        let ended = self.access_as(vcpu, va, What::Write, Who::Supervisor, how);
        match ended {
            Ended::At(at) if at / 8 < PAGES * 512 && len == 4 => {
                self.ram().set_u32(at & !3, entry as u32);
                self.remember();
            }
            Ended::At(at) if at / 8 < PAGES * 512 => self.store(at & !7, entry),
            Ended::Emulated(at) => self.emulate(at & !(len - 1), len as usize, entry),
            _ => {}
        }
        ended
    }

    /// C1 to C3: a tag that a guest runs with holds nothing but what the guest may use, and no table that is gone.
    fn check_tlbs(&self) {
        for (number, vcpu) in self.vcpus.iter().enumerate().filter(|(_, vcpu)| vcpu.entered.is_some()) {
            let tag = (vcpu.on.number(), number, vcpu.mmu.slot());
            let Some(tlb) = self.tlbs.get(&tag) else { continue };
            tlb.check(&self.tables);
            for cached in tlb.pages() {
                let accesses = ALL.iter().filter(|&&(what, who)| cached.rights.permit(&vcpu.m, what, who));
                for &(what, who) in accesses {
                    self.assert_seen(number, cached.page << 12, what, who, cached.frame << 12);
                }
                let gfn = Gfn::new_truncate(cached.frame);
                let tracked = self.memory.shared(CPU).is_write_tracked(gfn);
                assert!(!tracked || !cached.rights.writable, "C2: a TLB can write to the table in {gfn:?}");
            }
        }
    }

    pub fn check(&self) {
        if let Err(broken) = self.kind.check(&self.memory.exclusive(CPU)) {
            panic!("{broken}");
        }
        let _ = self.kind.reclaim(self.memory, usize::MAX, |page| self.tables.release(page));
        self.check_tlbs();
    }

    /// C3: no table page is lost.
    #[allow(unsafe_code)] // Gives back what was lent, at the end of all.
    pub fn finish(mut self) {
        self.check();
        for vcpu in 0..2 {
            let Self { kind, vcpus, memory, .. } = &mut self;
            vcpus[vcpu].entered = None;
            let _ = vcpus[vcpu].mmu.unload(kind, &mut memory.exclusive(CPU));
        }
        self.check();
        self.tables.drain(&mut self.cache);
        self.kind.dismantle(|page| self.tables.release(page));
        assert_eq!(self.tables.in_use(), 0);
        // SAFETY: the kind is dismantled, and no vCPU is entered.
        unsafe {
            self.lent_store.take_back();
            drop(self.lent_memory.take_back());
        }
    }
}

/// Reads of the PDPTEs' place give those that are loaded.
fn loaded<'a>(
    m: &Machine,
    pdptes: &'a [u64; 4],
    word: &'a dyn Fn(u64) -> Option<u64>,
) -> impl Fn(u64) -> Option<u64> + 'a {
    let pae = m.pg && m.pae && !m.lma;
    let first = m.cr3 & 0xffff_ffe0;
    move |at| {
        if pae && (first..first + 32).contains(&at) {
            Some(pdptes[(at - first) as usize / 8])
        } else {
            word(at)
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
        self.zap(range);
    }
}
