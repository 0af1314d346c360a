//! A guest under a shadow kind: its memory, two vCPUs on two CPUs, the processor over the shadow with its TLB, and the
//! reference beside it.
mod memory;
mod seen;
mod tlb;

use std::collections::{HashMap, HashSet};

use mmu::{
    CpuId, CpuRole, Cr4, Entered, Gfn, Gpa, Gva, Invpcid, Issued, Level, Mmu, NoShadowRoot, Npt, NptHost,
    Pae, PaeHost, PageSize, PagingContext, PagingState, Requests, Root, ShadowFault, ShadowMmu, SlotFlags,
    TableCache, TagFlush, Tags, VmMemory, WalkError, WalkRegs, ZapProgress,
};

use memory::{lend, Loan};
pub use memory::{memory, slot, store, NotedRam, MOVED, PAGES, SLOTS};
use seen::{page, Seen};
use tlb::{top, walk_shadow, Tlb};

use super::flat::FlatRam;
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
    entered: Option<Entered<'static, NotedRam>>,
    seen: HashSet<Seen>,
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
    /// By CPU, vCPU and the number of the vCPU's tag.
    tlbs: HashMap<(usize, usize, u8), Tlb>,
    /// Whether the second slot is there, and read-only.
    slot: Option<bool>,
    loan: Loan,
}

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    At(u64),
    Fault(u32),
    Device,
    Emulated(u64),
}

impl World {
    pub fn new(m: Machine, quota: usize, addresses: Vec<u64>, setup: impl Fn(&FlatRam)) -> Self {
        Self::with(m, quota, addresses, Tags::One, setup)
    }

    pub fn with(m: Machine, quota: usize, addresses: Vec<u64>, tags: Tags, setup: impl Fn(&FlatRam)) -> Self {
        let (loan, memory, store) = lend(quota);
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
            tlbs: HashMap::new(),
            slot: Some(false),
            loan,
        };
        for number in 0..2 {
            let state = world.state(&m, 0);
            let mmu = Mmu::shadow(state, registers(&m).1, Level::L4, true, tags);
            let root = mmu.root();
            let on = CpuId::new(number).unwrap();
            let (pdptes, seen) = (state.pdptes, HashSet::new());
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
            self.ram().get(at).filter(|_| !hole)
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

    /// Something happens to the vCPU's registers or translations: `act` tells the crate, `flushed` says what an
    /// architectural TLB loses. Some events load PDPTEs.
    pub fn event(
        &mut self,
        vcpu: usize,
        m: Machine,
        cr4: u64,
        loads: bool,
        act: impl FnOnce(&mut Mmu, &PagingState) -> Requests,
        flushed: impl Fn(&Seen) -> bool,
    ) {
        let mut state = self.state(&m, cr4);
        if !loads {
            state.pdptes = self.vcpus[vcpu].pdptes;
        }
        let vcpu = &mut self.vcpus[vcpu];
        vcpu.entered = None;
        (vcpu.m, vcpu.cr4, vcpu.pdptes) = (m, cr4, state.pdptes);
        let _ = act(&mut vcpu.mmu, &state);
        vcpu.seen.retain(|seen| !flushed(seen));
        self.remember();
    }

    /// Other registers, set from outside: all translations go.
    pub fn switch(&mut self, vcpu: usize, m: Machine) {
        let cr4 = self.vcpus[vcpu].cr4;
        self.event(vcpu, m, cr4, true, |mmu, state| mmu.set_from_outside(*state, registers(&m).1), |_| true);
        self.carry_out(vcpu);
    }

    /// All of the guest's translations go.
    pub fn flush(&mut self, vcpu: usize) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        self.event(vcpu, m, cr4, false, |mmu, _| mmu.flush_guest(), |_| true);
        self.carry_out(vcpu);
    }

    /// MOV to CR3. Without PCIDs, or without NOFLUSH, the translations of the PCID that is loaded go.
    pub fn mov_to_cr3(&mut self, vcpu: usize, cr3: u64, no_flush: bool) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let keep = no_flush && cr4 & PCIDE != 0;
        let pcid = if cr4 & PCIDE != 0 { cr3 as u16 & 0xfff } else { 0 };
        let value = cr3 | u64::from(no_flush) << 63;
        self.event(
            vcpu,
            Machine { cr3, ..m },
            cr4,
            true,
            |mmu, state| mmu.mov_to_cr3(value, state.pdptes),
            |seen| !keep && seen.pcid == pcid,
        );
    }

    /// MOV to CR0: a change of PG takes all translations. In a guest that has EFER.LME, long mode follows PG.
    pub fn mov_to_cr0(&mut self, vcpu: usize, pg: bool, wp: bool, long: bool) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let all = pg != m.pg;
        self.event(
            vcpu,
            Machine { pg, wp, lma: long && pg, ..m },
            cr4,
            all,
            |mmu, state| mmu.mov_to_cr0(state.regs.cr0, state.regs.efer, state.pdptes),
            |_| all,
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
        self.event(
            vcpu,
            new,
            cr4,
            all || current,
            |mmu, state| mmu.mov_to_cr4(state.regs.cr4, state.pdptes),
            |seen| all || current && seen.pcid == old.2,
        );
    }

    /// WRMSR to EFER.
    pub fn wrmsr_efer(&mut self, vcpu: usize, nxe: bool) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let new = Machine { nxe, ..m };
        self.event(vcpu, new, cr4, false, |mmu, state| mmu.wrmsr_efer(state.regs.efer), |_| false);
    }

    pub fn invlpg(&mut self, vcpu: usize, va: u64) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let pcid = self.vcpus[vcpu].pcid();
        let at = page(&m, va);
        let flushed = |seen: &Seen| seen.page == at && seen.pcid == pcid;
        self.event(vcpu, m, cr4, false, |mmu, _| mmu.invlpg(Gva::new(va)), flushed);
    }

    pub fn invpcid(&mut self, vcpu: usize, what: Invpcid) {
        let Vcpu { m, cr4, .. } = self.vcpus[vcpu];
        let flushed = |seen: &Seen| match what {
            Invpcid::Address { pcid, address } => seen.pcid == pcid && seen.page == page(&m, address.bits()),
            Invpcid::Single { pcid } => seen.pcid == pcid,
            Invpcid::All | Invpcid::AllButGlobal => true,
        };
        self.event(vcpu, m, cr4, false, |mmu, _| mmu.invpcid(what), flushed);
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
        self.event(vcpu, m, 0, true, |mmu, _| mmu.init(), |_| true);
    }

    /// The vCPU runs on another CPU.
    pub fn migrate(&mut self, vcpu: usize, on: usize) {
        self.vcpus[vcpu].entered = None;
        self.vcpus[vcpu].on = CpuId::new(on).unwrap();
    }

    /// Notes where every access leads now, for every vCPU.
    pub fn remember(&mut self) {
        let fixed = |at: u64| self.slot == Some(true) && (16..32).contains(&(at >> 12));
        let mut found = vec![];
        for vcpu in &self.vcpus {
            let word = self.word();
            let word = loaded(&vcpu.m, &vcpu.pdptes, &word);
            let look = |&va: &u64| Seen::look(&vcpu.m, &word, &fixed, vcpu.pcid(), va);
            found.push(self.addresses.iter().filter_map(look).collect::<Vec<_>>());
        }
        for (vcpu, found) in self.vcpus.iter_mut().zip(found) {
            vcpu.seen.extend(found);
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
    pub fn zap(&mut self, range: mmu::GfnRange) {
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
        let range = memory::slot(1, SlotFlags::empty()).range;
        let start = Gfn::new_truncate(SLOTS[1].0);
        let memory = self.memory;
        let mut guard = memory.exclusive(CPU);
        match (before, slot) {
            (None, None) => {}
            (None, Some(read_only)) => {
                memory.backing().clear_notes(1);
                guard.insert_slot(&memory::slot(1, flags(read_only))).unwrap();
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
            let walk_regs = WalkRegs { pdptes: Some(self.vcpus[vcpu].pdptes), ..regs(&m) };
            let found = context.walk(&self.memory.shared(CPU), &walk_regs, Gva::new(va), access(what, who));
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
        let fits = |seen: &&Seen| seen.pcid == pcid && seen.page == page(m, va) && seen.frame == at >> 12;
        let known = seen.iter().filter(fits).any(|seen| seen.permits(m, what, who));
        assert!(
            known,
            "A3, C1: {what:?} {who:?} at {va:#x} reaches {at:#x}; now: {:x?}",
            self.guest_walk(vcpu, va, what, who)
        );
        let second = (16..32).contains(&(at >> 12));
        assert!(!second || self.slot.is_some(), "C3: memory that was taken away");
        assert!(!second || what != What::Write || self.slot == Some(false), "C2: read-only memory");
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

    /// C1 to C3: a tag that a guest runs with holds nothing but what its tables say.
    fn check_tlbs(&self) {
        for (number, vcpu) in self.vcpus.iter().enumerate() {
            if vcpu.entered.is_some() {
                if let Some(tlb) = self.tlbs.get(&(vcpu.on.number(), number, vcpu.mmu.slot())) {
                    tlb.check(&self.tables, !vcpu.m.lma, vcpu.root);
                }
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
        unsafe { self.loan.end() };
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
