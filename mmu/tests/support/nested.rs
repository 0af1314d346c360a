//! An L1 with L2s: its memory, two vCPUs of it, the processors over the shadow of its nested tables, and the reference
//! beside them.
mod events;
mod host;
mod ram;

use std::cell::RefCell;
use std::collections::HashSet;

use mmu::{
    AccessKind, CpuId, CpuRole, DirectMmu, EntryFormat, EptExit, Exclusive, FaultInfo, FaultOutcome, Gfn,
    Gpa, GuestEpt, Gva, L2Exit, L2Fault, L2Request, L2Tag, Leaf, Level, MarkObserver, Mmu, NGpa,
    NoShadowRoot, Pae, PaeHost, PageSize, PagingState, ShadowFault, ShadowMmu, SlotFlags, TableCache,
    TagFlush, Tags, Tdp12, TlbControl, VcpuMmus, VmMemory,
};

use super::flat::FlatRam;
use super::lent::{Lent, LentStore};
use super::machines::Machine as Host;
use super::manual::guest::registers;
use super::manual::{Machine, What, Who};
use super::tables::HostTables;
use super::two_stage::{Below, End, Exit, Op, Shadowed, Tag, Tlb, Told, OPS};

use ram::memory;
pub use ram::{slot, Ram};

pub const CPU: CpuId = CpuId::BOOT;
/// Host frames are guest frames plus multiples of this.
pub const MOVED: u64 = 1 << 20;
/// Slots: frames, and whether they are read-only. Between them is nothing.
pub const SLOTS: [(u64, u64, bool); 3] = [(0, 1024, false), (1040, 8, true), (1056, 16, false)];
pub const FRAMES: u64 = 1072;
/// L2's own tables, by L2 frame, and where L1 has put them.
pub const L2_TABLES: [(u64, u64); 4] = [(0x18, 32), (0x19, 33), (0x1a, 34), (0x1b, 35)];
pub const L2_CR3: u64 = 0x18000;

/// Nobody asks; L1 logs no dirty pages.
pub struct Unheard;
impl MarkObserver for Unheard {
    fn marked(&self, _: Gpa, _: usize) {}
}

/// A context that translations of L2's addresses are cached in: the EPT root, or the ASID with an NCR3.
type Context = (u16, u64);

pub struct Vcpu {
    pub mmus: VcpuMmus,
    pub tag: L2Tag,
    pub below: Below,
    /// VPID12 (none if zero) or ASID12 of the L2 that runs, or ran last.
    pub name: u16,
    pub l2: Machine,
    pub in_l2: bool,
    pub tlb: Tlb,
    /// Where each access of L2 has led since it was flushed last, by context, as far as L1's tables permitted it.
    nested: HashSet<(Context, u64, Op, u64)>,
    /// By name of L2, page and access: through which page of L2 it has led.
    linear: HashSet<(u16, u64, What, Who, u64, Op)>,
    /// Contexts that translations may have been cached in since their last flush.
    live: HashSet<Context>,
}

pub struct World<H: Host> {
    pub host: H,
    pub memory: &'static VmMemory<Ram>,
    pub kind: ShadowMmu<'static, H::Format, HostTables>,
    /// What L1 runs on.
    pub direct: &'static DirectMmu<H::Format, HostTables>,
    pub tables: HostTables,
    pub cache: TableCache,
    pub vcpus: Vec<Vcpu>,
    /// Linear addresses of L2, and its physical ones.
    pub linear: Vec<u64>,
    pub physical: Vec<u64>,
    /// What L1's tables can be read as.
    pub belows: Vec<Below>,
    pub own_tags: bool,
    /// The slots that are there.
    pub present: [bool; 3],
    pub emulated: usize,
    /// Exits that L1 saw, and faults that it did not.
    pub to_l1: usize,
    pub here: usize,
    pub flushes: usize,
    lent_memory: Lent<VmMemory<Ram>>,
    lent_direct: Lent<DirectMmu<H::Format, HostTables>>,
    lent_store: LentStore,
}

/// How an access of L2 ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    At(u64),
    PageFault(u32),
    ToL1(u64, Exit),
    Device(u64),
    ReadOnly(u64),
    Emulated(u64),
}

const WHATS: [(What, Who); 6] = [
    (What::Read, Who::User),
    (What::Write, Who::User),
    (What::Fetch, Who::User),
    (What::Read, Who::Supervisor),
    (What::Write, Who::Supervisor),
    (What::Fetch, Who::Supervisor),
];

impl<H: Host> World<H> {
    pub fn new(
        host: H,
        below: Below,
        l2: Machine,
        own_tags: bool,
        quota: usize,
        setup: fn(&FlatRam),
    ) -> Self {
        let (lent_memory, memory) = Lent::new(Box::new(memory()));
        let memory: &'static _ = memory;
        setup(&memory.backing().flat);
        let tables = HostTables::new(quota + 256);
        let direct =
            DirectMmu::new(memory, host.format(), tables.clone(), tables.allocate(), 46, PageSize::Size2M);
        let (lent_direct, direct) = Lent::new(Box::new(direct));
        let (lent_store, store) = LentStore::new(quota);
        let pae = Pae::new(&PaeHost { max_phys_addr: 46 });
        let kind = ShadowMmu::new(memory, host.format(), pae, tables.clone(), store).unwrap();
        let physical = (0..28).chain([512, 513, 1023, 1024, 1025]).map(|page| page << 12).collect();
        let mut world = Self {
            host,
            memory,
            kind,
            direct,
            tables,
            cache: TableCache::new(),
            vcpus: vec![],
            linear: l2_addresses(&l2),
            physical,
            belows: vec![below],
            own_tags,
            present: [true; 3],
            emulated: 0,
            to_l1: 0,
            here: 0,
            flushes: 0,
            lent_memory,
            lent_direct,
            lent_store,
        };
        for _ in 0..2 {
            let vcpu = world.vcpu(below, l2);
            world.vcpus.push(vcpu);
        }
        world.remember();
        world
    }

    pub fn exclusive(&self) -> Exclusive<'static, Ram> {
        exclusive(self.memory, self.direct)
    }

    fn is_ept(&self) -> bool {
        matches!(self.belows[0], Below::Ept(_))
    }

    fn vcpu(&self, below: Below, l2: Machine) -> Vcpu {
        let (_, cpu) =
            registers(&Machine { maxphyaddr: 46, gib_pages: true, amd: true, ..Machine::default() });
        let host = if self.host.levels() == 5 { Level::L5 } else { Level::L4 };
        let state = PagingState::RESET;
        let role = CpuRole::new(&state.regs, &cpu);
        let tdp12_mmu = Mmu::shadow(state, cpu, host, self.host.flags().0 != 0, Tags::One);
        let (regs, cpu2) = registers(&l2);
        let nested = tdp12(&below).context().role();
        let mmus = VcpuMmus::new(
            Mmu::shadow(state, cpu, host, true, Tags::One),
            tdp12_mmu,
            role,
            CpuRole::new(&regs, &cpu2),
            nested,
        );
        Vcpu {
            mmus,
            tag: L2Tag::new(self.own_tags),
            below,
            name: 1,
            l2,
            in_l2: false,
            tlb: Tlb::default(),
            nested: HashSet::new(),
            linear: HashSet::new(),
            live: HashSet::new(),
        }
    }

    pub fn ram(&self) -> &FlatRam {
        &self.memory.backing().flat
    }

    /// What L1 reads at an address: nothing outside its slots.
    fn word(&self, at: u64) -> Option<u64> {
        self.slot_of(at >> 12).and_then(|_| self.ram().get(at))
    }

    /// The slot of a frame of L1.
    fn slot_of(&self, gfn: u64) -> Option<usize> {
        let holds = |&(index, (start, pages, _)): &(usize, (u64, u64, bool))| {
            self.present[index] && gfn >= start && gfn < start + pages
        };
        SLOTS.iter().copied().enumerate().find(holds).map(|(index, _)| index)
    }

    pub fn context(&self, vcpu: usize) -> Context {
        let Vcpu { below, name, .. } = &self.vcpus[vcpu];
        (if self.is_ept() { 0 } else { *name }, below.root() & !0xfff)
    }

    pub fn tag(&self, l2: bool) -> Tag {
        match (self.own_tags, l2) {
            (false, _) => Tag::Shared,
            (true, true) => Tag::L2,
            (true, false) => Tag::L1,
        }
    }

    /// Notes where every access leads now, in every context that counts.
    pub fn remember(&mut self) {
        let word = |at: u64| self.word(at);
        let told = Told { table_walk: false, bits: 0 };
        let mut nested = vec![];
        for below in &self.belows {
            for &page in &self.physical {
                for op in OPS {
                    if let Ok(found) = below.locate(&word, page, op, told) {
                        nested.push((below.root() & !0xfff, page >> 12, op, found.address >> 12));
                    }
                }
            }
        }
        let mut linear = vec![];
        for vcpu in &self.vcpus {
            let mut found = vec![];
            for &va in &self.linear {
                for (what, who) in WHATS {
                    let second = |gpa: u64, op, told| {
                        let op = if told_is_walk(&told) { Op { what: What::Read, user: true } } else { op };
                        match vcpu.below.locate(&word, gpa, op, told) {
                            Ok(found) => Ok(found.address),
                            // What L2's tables alone say.
                            Err(exit) if told_is_walk(&told) => Err(exit),
                            Err(_) => Ok(0),
                        }
                    };
                    if let End::At(_, gpa, op) = vcpu.below.both(self.ram(), &vcpu.l2, &second, va, what, who)
                    {
                        found.push((va >> 12, what, who, gpa >> 12, op));
                    }
                }
            }
            linear.push(found);
        }
        for (vcpu, linear) in self.vcpus.iter_mut().zip(linear) {
            for &(name, root) in &vcpu.live {
                let here = nested.iter().filter(|found| found.0 == root);
                vcpu.nested.extend(here.map(|&(_, page, op, to)| ((name, root), page, op, to)));
            }
            for (page, what, who, to, op) in linear {
                for name in [0, 1, 2] {
                    vcpu.linear.insert((name, page, what, who, to, op));
                }
            }
        }
    }

    /// Whether what a CPU has found was where L2's address led at some time since the last flush that covers it.
    fn is_legal(&self, vcpu: usize, (va, what, who): (u64, What, Who), gfn: u64, ngfn: Option<u64>) -> bool {
        let Vcpu { nested, linear, name, live, .. } = &self.vcpus[vcpu];
        let (asid, root) = self.context(vcpu);
        let ept = self.is_ept();
        let contexts = live.iter().filter(|context| context.0 == asid && (!ept || context.1 == root));
        let contexts: Vec<_> = contexts.collect();
        linear.iter().any(|&(of, page, what2, who2, to, op)| {
            (of, page, what2, who2) == (*name, va >> 12, what, who)
                && ngfn.is_none_or(|ngfn| ngfn == to)
                && contexts.iter().any(|&&context| nested.contains(&(context, to, op, gfn)))
        })
    }

    /// Carries out what an event asked for.
    pub fn apply(&mut self, vcpu: usize, request: L2Request) {
        let _ = self.vcpus[vcpu].mmus.apply(request);
    }

    /// Whatever is due before L2 runs, and the entry: the TLB is flushed as that says.
    fn ready(&mut self, vcpu: usize) {
        for round in 0.. {
            assert!(round < 12, "A4: no root");
            let entered = {
                let entered = self.vcpus[vcpu].mmus.tdp12_mmu.enter(self.memory, cpu(vcpu));
                (entered.is_obsolete(), entered.flush())
            };
            self.flush(vcpu, true, entered.1);
            if !entered.0 {
                return;
            }
            self.tables.fill(&mut self.cache);
            let mut guard = exclusive(self.memory, self.direct);
            let mmu = &mut self.vcpus[vcpu].mmus.tdp12_mmu;
            let done = mmu.carry_out(&mut self.kind, &mut guard, &mut self.cache);
            match done.outcome {
                Ok(()) | Err(NoShadowRoot::NeedTables | NoShadowRoot::Wait) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
    }

    fn flush(&mut self, vcpu: usize, l2: bool, flush: TagFlush) {
        let tag = self.tag(l2);
        let tlb = &mut self.vcpus[vcpu].tlb;
        match flush {
            TagFlush::None => {}
            TagFlush::Address(address) => tlb.flush_page(tag, address.bits() >> 12),
            TagFlush::All => {
                tlb.flush(tag);
                self.flushes += 1;
            }
        }
    }

    pub fn shadowed(&self, vcpu: usize) -> Shadowed<'_, H> {
        let v = &self.vcpus[vcpu];
        let root = v.mmus.tdp12_mmu.root();
        let role = v.mmus.tdp12_mmu.root_role();
        let told_apart = match v.below {
            Below::Ept(m) => m.mode_based,
            Below::Npt(m) => m.smep,
        };
        Shadowed {
            host: self.host,
            tables: &self.tables,
            root: root.hpa.pfn().number(),
            level: root.level as u32,
            flags: role.base().accessed_dirty(),
            told_apart,
        }
    }

    /// The processor: where an access leads, as a frame of the host, or the exit it makes. With `cached` it uses its TLB.
    fn hardware(&mut self, vcpu: usize, va: u64, what: What, who: Who, cached: bool) -> (End, Option<u64>) {
        let tag = self.tag(true);
        let ept = self.is_ept();
        let root = if ept { self.shadowed(vcpu).root } else { 0 };
        if cached {
            if let Some((frame, op)) = self.vcpus[vcpu].tlb.combined(tag, root, va >> 12, what, who) {
                return (End::At(frame << 12 | va & 0xfff, u64::MAX, op), None);
            }
        }
        let kept = RefCell::new(vec![]);
        let v = &self.vcpus[vcpu];
        let shadowed = self.shadowed(vcpu);
        let second = |gpa: u64, op: Op, told: Told| {
            let cached = v.tlb.guest_physical(tag, root, gpa >> 12, op).filter(|_| cached);
            let frame = match cached.map_or_else(|| shadowed.frame(gpa, op), Ok) {
                Ok(frame) => frame,
                Err(_) => return Err(self.reported(op, told)),
            };
            kept.borrow_mut().push((gpa >> 12, op, frame));
            // Contents are by L1's frames.
            let gfn = if told.table_walk { frame % MOVED } else { frame };
            Ok(gfn << 12 | gpa & 0xfff)
        };
        let end = v.below.both(self.ram(), &v.l2, &second, va, what, who);
        let tlb = &mut self.vcpus[vcpu].tlb;
        for (page, op, frame) in kept.into_inner() {
            tlb.keep_guest_physical(tag, root, page, op, frame);
        }
        if let End::At(at, gpa, op) = end {
            tlb.keep(tag, root, va >> 12, (what, who), (at >> 12, op));
            return (end, Some(gpa >> 12));
        }
        (end, None)
    }

    /// An exit as the processor reports it, but for what only Umbra's own entries say.
    fn reported(&self, op: Op, told: Told) -> Exit {
        if self.is_ept() {
            let bits = match op.what {
                What::Read => 1,
                What::Write if told.table_walk => 3,
                What::Write => 2,
                What::Fetch => 4,
            };
            return Exit::Violation(bits | told.bits);
        }
        let write = u64::from(op.what == What::Write) << 1;
        let fetch = u64::from(op.what == What::Fetch) << 4;
        let place = if told.table_walk { 2u64 << 32 } else { 1 << 32 };
        Exit::NestedPageFault(place | write | fetch | u64::from(op.user) << 2)
    }

    /// A1 to A4 for L2, G1 to G4: an access of it as it makes it.
    ///
    /// What the TLB says of L2's tables may be old, and a fault with it: then the access is tried without.
    pub fn access(&mut self, vcpu: usize, va: u64, what: What, who: Who, mut cached: bool) -> Ended {
        for _ in 0..40 {
            self.enter_l2(vcpu, TlbControl::Nothing);
            self.ready(vcpu);
            let (end, ngfn) = self.hardware(vcpu, va, what, who, cached);
            let (gpa, exit) = match end {
                End::At(at, ..) => return self.reached(vcpu, (va, what, who), at, ngfn),
                End::PageFault(code) => {
                    let expected = self.expected(vcpu, va, what, who);
                    if cached && expected != End::PageFault(code) {
                        cached = false;
                        continue;
                    }
                    assert_eq!(expected, End::PageFault(code), "A2: {va:#x} {what:?} {who:?}");
                    return Ended::PageFault(code);
                }
                End::ToL1(gpa, exit) => (gpa, exit),
            };
            let (tag, root) = (self.tag(true), if self.is_ept() { self.shadowed(vcpu).root } else { 0 });
            self.vcpus[vcpu].tlb.violated(tag, root, gpa >> 12, va >> 12);
            let at = NGpa::new_truncate(gpa);
            let exit = match exit {
                Exit::Violation(bits) => L2Exit::from_ept(at, bits, Gva::new(va)),
                Exit::NestedPageFault(bits) => L2Exit::from_npf(at, bits),
                Exit::Misconfiguration => unreachable!("reported as a violation"),
            };
            let expected = self.expected(vcpu, va, what, who);
            match self.l2_fault(vcpu, &exit, &Unheard) {
                L2Fault::ToL1(fault) => {
                    let told = Ended::ToL1(fault.address, self.rendered(&fault));
                    if cached && !matches!(expected, End::ToL1(gpa, exit) if Ended::ToL1(gpa, exit) == told) {
                        cached = false;
                        continue;
                    }
                    let End::ToL1(gpa, exit) = expected else {
                        panic!("G4: L1 gets {told:x?} where {expected:x?} is expected");
                    };
                    assert_eq!(told, Ended::ToL1(gpa, exit), "G2, G3: {va:#x} {what:?} {who:?}");
                    // What the TLB has of other linear addresses that lead through the page may outlive the exit (Intel SDM
                    // vol. 3, 29.4.3.1): only L1's flushes end it.
                    self.to_l1 += 1;
                    self.remember();
                    self.check();
                    self.leave_l2(vcpu);
                    return told;
                }
                L2Fault::LogFull => panic!("L1 logs nothing"),
                L2Fault::Here(fault) => {
                    self.remember();
                    self.check();
                    self.here += 1;
                    let table_walk = exit.place == mmu::Place::TableWalk;
                    let leads = match (&expected, table_walk) {
                        (End::At(at, ..), _) => Some(*at),
                        (_, true) => None,
                        _ if cached => None,
                        (other, false) => panic!("G4: {other:x?} was L1's to know, {fault:?}"),
                    };
                    match fault {
                        ShadowFault::Mapped | ShadowFault::Spurious | ShadowFault::Retry => {}
                        ShadowFault::Wait | ShadowFault::NoRoot | ShadowFault::NeedTables => {}
                        ShadowFault::Mmio(gpa) => {
                            assert_eq!(self.slot_of(gpa.bits() >> 12), None);
                            assert!(leads.is_none_or(|leads| leads == gpa.bits()));
                            return Ended::Device(gpa.bits());
                        }
                        ShadowFault::ReadOnly(gpa) => {
                            let slot = self.slot_of(gpa.bits() >> 12).unwrap();
                            assert!(SLOTS[slot].2);
                            return Ended::ReadOnly(gpa.bits());
                        }
                        ShadowFault::WriteTracked(gpa) => {
                            assert!(self.memory.shared(CPU).is_write_tracked(gpa.gfn()));
                            self.emulated += 1;
                            return Ended::Emulated(gpa.bits());
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
        panic!("A4: livelock at {va:#x}, {what:?} {who:?}");
    }

    /// What L1's tables say now.
    pub fn expected(&self, vcpu: usize, va: u64, what: What, who: Who) -> End {
        let Vcpu { below, l2, .. } = &self.vcpus[vcpu];
        let word = |at: u64| self.word(at);
        let second = |gpa: u64, op, told| below.locate(&word, gpa, op, told).map(|found| found.address);
        below.both(self.ram(), l2, &second, va, what, who)
    }

    pub fn rendered(&self, fault: &FaultInfo) -> Exit {
        if !self.is_ept() {
            return Exit::NestedPageFault(fault.npf_info().bits());
        }
        match fault.ept_exit() {
            EptExit::Violation(info) => Exit::Violation(info.bits()),
            EptExit::Misconfiguration => Exit::Misconfiguration,
        }
    }

    pub fn l2_fault(&mut self, vcpu: usize, exit: &L2Exit, log: &impl MarkObserver) -> L2Fault {
        self.tables.fill(&mut self.cache);
        let tdp12 = tdp12(&self.vcpus[vcpu].below);
        let walked = tdp12.walk_exit(&self.memory.shared(CPU), exit, log);
        let mut guard = exclusive(self.memory, self.direct);
        let mmus = &mut self.vcpus[vcpu].mmus;
        mmus.l2_fault(&tdp12, &mut self.kind, &mut guard, &mut self.cache, &walked).outcome
    }

    /// An access has reached a frame of the host: it is one that L2's address leads to, or led to since the last flush.
    fn reached(
        &mut self,
        vcpu: usize,
        (va, what, who): (u64, What, Who),
        at: u64,
        ngfn: Option<u64>,
    ) -> Ended {
        let frame = at >> 12;
        let gfn = frame % MOVED;
        let case = format!("{what:?} {who:?} at {va:#x} reaches frame {gfn:#x}");
        assert_eq!(self.memory.backing().frame(gfn), frame, "C3: {case}: the host has moved it");
        let slot = self.slot_of(gfn).unwrap_or_else(|| panic!("I2: {case}: no slot"));
        assert!(
            self.is_legal(vcpu, (va, what, who), gfn, ngfn),
            "A3, C5, C6: {case} by {ngfn:x?}; now {:x?}",
            self.expected(vcpu, va, what, who)
        );
        self.written(what, slot, gfn, true);
        Ended::At(gfn << 12 | va & 0xfff)
    }

    /// What has to hold when a processor has written without an exit.
    fn written(&self, what: What, slot: usize, gfn: u64, in_l2: bool) {
        if what != What::Write {
            return;
        }
        assert!(!SLOTS[slot].2, "G1: frame {gfn:#x} is read-only");
        let shared = self.memory.shared(CPU);
        assert!(!shared.is_write_tracked(Gfn::new_truncate(gfn)), "D6: frame {gfn:#x}");
        let by_bits = shared.slots().any(|slot| slot.flags.contains(SlotFlags::DIRTY_BITS));
        if by_bits && !in_l2 {
            return;
        }
        if let Some(log) = shared.dirty_log(Gfn::new_truncate(SLOTS[slot].0)) {
            let page = gfn - SLOTS[slot].0;
            assert!(log.read(page as usize / 64) >> (page % 64) & 1 == 1, "H1: frame {gfn:#x}");
        }
    }

    /// L1 stores an entry of its tables; it is not in L2 then.
    pub fn l1_store(&mut self, vcpu: usize, at: u64, len: usize, entry: u64) {
        // Every other entry makes the table one that is written without exits.
        match self.l1_access(vcpu, at, What::Write, at / 8 % 2 == 1) {
            Ended::At(_) => {
                if len == 8 {
                    self.ram().set(at, entry);
                } else {
                    self.ram().set_u32(at, entry as u32);
                }
                self.remember();
            }
            _ => self.put(at, len, entry),
        }
    }

    /// A store by emulation.
    pub fn put(&mut self, at: u64, len: usize, entry: u64) {
        let gpa = Gpa::new_truncate(at);
        self.memory.shared(CPU).write(gpa, &entry.to_le_bytes()[..len]).unwrap();
        let _ = self.kind.track_write(&mut exclusive(self.memory, self.direct), gpa, len);
        self.remember();
        self.check();
    }

    /// C6, D6: an access of L1 itself, on the direct kind and with its own tag. With `unsync` it may write to lowest tables
    /// without exits from then on.
    pub fn l1_access(&mut self, vcpu: usize, gpa: u64, what: What, unsync: bool) -> Ended {
        self.leave_l2(vcpu);
        let op = Op { what, user: true };
        let tag = self.tag(false);
        for _ in 0..12 {
            let entered = {
                let entered = self.vcpus[vcpu].mmus.root_mmu.enter(self.memory, cpu(vcpu));
                (entered.is_obsolete(), entered.flush())
            };
            self.flush(vcpu, false, entered.1);
            if entered.0 {
                let _ = self.vcpus[vcpu].mmus.root_mmu.set_root(self.direct.root());
                continue;
            }
            let root = self.direct.root();
            let walked = Shadowed {
                host: self.host,
                tables: &self.tables,
                root: root.hpa.pfn().number(),
                level: root.level as u32,
                flags: true,
                told_apart: false,
            };
            let context = if self.is_ept() { walked.root } else { 0 };
            let cached = self.vcpus[vcpu].tlb.guest_physical(tag, context, gpa >> 12, op);
            if let Ok(frame) = cached.map_or_else(|| walked.frame(gpa, op), Ok) {
                let tlb = &mut self.vcpus[vcpu].tlb;
                tlb.keep_guest_physical(tag, context, gpa >> 12, op, frame);
                assert_eq!(frame, self.memory.backing().frame(gpa >> 12), "C3, C6: L1 at {gpa:#x}");
                let slot = self.slot_of(gpa >> 12).expect("I2");
                self.written(what, slot, gpa >> 12, false);
                return Ended::At(gpa);
            }
            let kind = match what {
                What::Read => AccessKind::Read,
                What::Write => AccessKind::Write,
                What::Fetch => AccessKind::Execute,
            };
            self.tables.fill(&mut self.cache);
            let shared = self.memory.shared(CPU);
            let outcome = self.direct.fault(&shared, &mut self.cache, Gpa::new_truncate(gpa), kind);
            drop(shared);
            match outcome {
                FaultOutcome::Mapped | FaultOutcome::Spurious | FaultOutcome::Retry => {}
                FaultOutcome::NeedTables => {}
                FaultOutcome::Mmio(at) => return Ended::Device(at.bits()),
                FaultOutcome::ReadOnly(at) => return Ended::ReadOnly(at.bits()),
                FaultOutcome::WriteTracked(at) => {
                    let mut guard = exclusive(self.memory, self.direct);
                    if !unsync || !self.kind.let_write(&mut guard, at.gfn()).outcome {
                        return Ended::Emulated(at.bits());
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        panic!("A4: livelock of L1 at {gpa:#x}");
    }

    /// L2 stores through its linear address.
    pub fn l2_store(&mut self, vcpu: usize, va: u64, entry: u64) -> Ended {
        let ended = self.access(vcpu, va, What::Write, Who::Supervisor, true);
        match ended {
            Ended::At(at) => {
                self.ram().set(at & !7, entry);
                self.remember();
            }
            Ended::Emulated(at) => self.put(at & !7, 8, entry),
            _ => {}
        }
        ended
    }

    /// What the shadow says of an address of L2.
    pub fn leaf(&self, vcpu: usize, gpa: u64) -> Leaf {
        let shadowed = self.shadowed(vcpu);
        let mut table = shadowed.root;
        for level in (1..=shadowed.level).rev() {
            let entry = self.tables.peek(table, (gpa >> (12 + 9 * (level - 1)) & 511) as usize).unwrap();
            let of = [Level::L1, Level::L2, Level::L3, Level::L4, Level::L5][level as usize - 1];
            if let Some(leaf) = self.kind.format().leaf(entry, of) {
                return leaf;
            }
            table = (entry & 0x000f_ffff_ffff_f000) >> 12;
        }
        panic!("nothing is mapped at {gpa:#x}");
    }

    /// Flushes all that L1 can of its nested tables.
    pub fn flush_nested(&mut self, vcpu: usize, pointer: Option<u64>) {
        if self.is_ept() {
            self.invept(vcpu, pointer);
        } else {
            self.enter_l2(vcpu, TlbControl::Everything);
            self.leave_l2(vcpu);
        }
    }

    /// Loads all that L2 may reach now into the TLB, as a processor may at any time.
    pub fn speculate(&mut self, vcpu: usize) {
        self.enter_l2(vcpu, TlbControl::Nothing);
        self.ready(vcpu);
        for va in self.linear.clone() {
            for (what, who) in WHATS {
                let _ = self.hardware(vcpu, va, what, who, true);
            }
        }
    }

    pub fn check(&self) {
        if let Err(broken) = self.kind.check(&self.exclusive()) {
            panic!("{broken}");
        }
        let _ = self.kind.reclaim(self.memory, usize::MAX, |page| self.tables.release(page));
        let _ = self.direct.reclaim(self.memory, usize::MAX, |page| self.tables.release(page));
    }

    /// C3: no table page is lost.
    #[allow(unsafe_code)] // Takes back what was lent, at the end of all.
    pub fn finish(mut self) {
        self.check();
        self.tables.drain(&mut self.cache);
        self.kind.dismantle(|page| self.tables.release(page));
        let direct = self.direct.page_counts().tables as usize;
        assert_eq!(self.tables.in_use(), direct, "but for the direct kind's");
        // SAFETY: the shadow kind is dismantled; nothing else refers to the direct one and to memory, but the world itself.
        let (memory, direct) = unsafe {
            self.lent_store.take_back();
            (self.lent_memory.take_back(), self.lent_direct.take_back())
        };
        direct.dismantle(|page| self.tables.release(page));
        assert_eq!(self.tables.in_use(), 0);
        drop(memory);
    }
}

/// The exclusive guard, which names the direct kind.
fn exclusive<F: EntryFormat>(
    memory: &'static VmMemory<Ram>,
    direct: &'static DirectMmu<F, HostTables>,
) -> Exclusive<'static, Ram> {
    memory.exclusive(CPU).beside(direct)
}

fn told_is_walk(told: &Told) -> bool {
    told.table_walk
}

fn cpu(vcpu: usize) -> CpuId {
    CpuId::new(vcpu).unwrap()
}

/// L1's nested paging as the crate sees it.
pub fn tdp12(below: &Below) -> Tdp12 {
    match below {
        Below::Ept(m) => {
            let cpu = GuestEpt {
                max_phys_addr: m.maxphyaddr as u8,
                execute_only: m.execute_only,
                five_level: true,
                mib_pages: m.mib_pages,
                gib_pages: m.gib_pages,
                accessed_dirty: true,
                advanced_info: true,
                mode_based_execute: m.mode_based,
            };
            let length = u64::from(m.levels - 1) << 3;
            let pointer = m.root | length | 6 | u64::from(m.accessed_dirty) << 6;
            Tdp12::ept(pointer, &cpu).unwrap()
        }
        Below::Npt(m) => {
            let (regs, cpu) = registers(m);
            Tdp12::npt(m.cr3, &regs, 0x0007_0406_0007_0406, &cpu, m.smep).unwrap()
        }
    }
}

/// What L2 accesses: with paging, what its tables map; without, its physical addresses.
fn l2_addresses(l2: &Machine) -> Vec<u64> {
    if !l2.pg {
        return (0..28).chain([512, 513, 1023, 1024, 1025, 1 << 20]).map(|page| page << 12 | 8).collect();
    }
    (0..32).map(|page| page << 12 | 8).collect()
}
