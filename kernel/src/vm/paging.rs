//! Where the kernel meets the `mmu` crate: a VM's memory with its direct kind, a vCPU's run state and walks.
#![allow(unsafe_code)] // Frames become table pages here, and the physical map becomes table memory.

use super::control_regs::{CR0_WP, CR4_PGE};
use super::emulate::{Exception, Fault};
use super::fetch::{FetchCache, Recorder, NO_STAMP};
use super::memory::HostMemory;
use super::msr::EFER_LMA;
use super::ram::{BadGpa, GuestRam};
use super::shadow::{Kind, Shadow};
use crate::hw::extended;
use crate::hw::{Exit, FaultCause, HwVcpu, OutOfMemory, SecondStageFault, Translation, Vendor};
use crate::mm::{self, FrameSize, Zone};
use mmu::{
    Access, AccessKind, Agent, CpuId, CpuRole, Cr0, Cr4, DirectMmu, Efer, Exclusive, FaultOutcome, Gfn,
    GfnRange, Gpa, GuestCpu, GuestWalk, Gva, Invpcid, Level, Mmu, NearFault, NoShadowRoot, NotRam, PageSize,
    PagingContext, PagingRegs, PagingState, Pfn, PhysTables, RoleFlags, ShadowFault, Shared, TableCache,
    TablePage, TagFlush, Tags, VmMemory, WalkError, WalkRegs, ZapProgress,
};
use x86_64::PhysAddr;

/// Times that a fault is tried again while another CPU is in the way, before the guest runs on and faults anew.
const FAULT_TRIES: usize = 4;
/// Longest instruction (APM vol. 3, 1.1).
const MAX_INSN_BYTES: usize = 15;

/// Guest-physical memory of a VM and the tables that map it: the sketch's `direct_mmu` and `shadow_mmu` live here.
pub struct GuestMemory<V: Vendor> {
    vm: VmMemory<HostMemory>,
    /// Taken out only to be dismantled.
    tables: Option<Tables<V>>,
}

/// The kind that a VM's vCPUs run on.
#[expect(clippy::large_enum_variant, reason = "one for each VM, and the large variant is the frequent one")]
enum Tables<V: Vendor> {
    /// Second-stage tables.
    Direct(DirectMmu<V::Format, PhysTables>),
    /// Shadows of the guest's own tables, where there is no second stage.
    Shadow(Shadow),
}

/// The CPU that runs this, as the `mmu` crate counts.
#[inline]
fn this_cpu() -> CpuId {
    CpuId::new(crate::cpu::number()).unwrap_or(CpuId::BOOT)
}

fn table_page(zone: Zone) -> Option<TablePage> {
    let frame = mm::alloc(FrameSize::Size4K, zone)?;
    // SAFETY: the frame is ours, in the physical map, and zeroed here.
    unsafe {
        mm::phys::zero(frame, 4096);
        Some(TablePage::from_frame(Pfn::new_truncate(frame.as_u64() >> 12)))
    }
}

fn free_table_page(page: TablePage) {
    mm::free(PhysAddr::new(page.into_frame().number() << 12), FrameSize::Size4K);
}

impl<V: Vendor> GuestMemory<V> {
    /// Makes `ram` the memory of a VM whose physical addresses have `guest_bits` bits. With `shadow` there is no second
    /// stage.
    pub fn new(
        vendor: &V,
        ram: HostMemory,
        guest_bits: u8,
        largest: PageSize,
        shadow: bool,
    ) -> Result<Self, OutOfMemory> {
        let ram_bytes = ram.slots().map(|slot| slot.range.pages() * 4096).sum();
        let vm = VmMemory::on_cpus(ram, crate::cpu::all().len());
        {
            let mut exclusive = vm.exclusive(this_cpu());
            for slot in vm.backing().slots() {
                exclusive.insert_slot(&slot).map_err(|_| OutOfMemory)?;
            }
        }
        // SAFETY: the physical map covers all RAM at a constant offset, write-back, for as long as Umbra runs.
        let frames = unsafe { PhysTables::new(mm::PHYSMAP) };
        let tables = if shadow {
            Tables::Shadow(Shadow::new(&vm, &vendor.shadow_format(), frames, ram_bytes)?)
        } else {
            let root = table_page(Zone::Any).ok_or(OutOfMemory)?;
            let bits = u32::from(guest_bits);
            Tables::Direct(DirectMmu::new(&vm, vendor.format(), frames, root, bits, largest))
        };
        Ok(Self { vm, tables: Some(tables) })
    }

    /// The RAM, for loaders and devices.
    pub fn ram(&self) -> &HostMemory {
        self.vm.backing()
    }

    #[inline]
    fn tables(&self) -> &Tables<V> {
        self.tables.as_ref().expect("taken out by `drop` only")
    }

    /// The tables of a VM whose vCPUs have second-stage faults.
    #[inline]
    fn direct(&self) -> &DirectMmu<V::Format, PhysTables> {
        match self.tables() {
            Tables::Direct(direct) => direct,
            Tables::Shadow(_) => unreachable!("no second stage"),
        }
    }

    #[inline]
    fn shadow(&self) -> Option<&Shadow> {
        match self.tables() {
            Tables::Direct(_) => None,
            Tables::Shadow(shadow) => Some(shadow),
        }
    }

    /// How the VM's vCPUs translate.
    pub fn translation(&self) -> Translation {
        match self.tables() {
            Tables::Direct(direct) => Translation::TwoStages(direct.root().hpa.bits()),
            Tables::Shadow(_) => Translation::Shadow,
        }
    }

    /// Frames for the VM's tables: those of PAE are found by 32 bits (Intel SDM vol. 3, 4.4.1).
    fn zone(&self) -> Zone {
        match self.tables() {
            Tables::Direct(_) => Zone::Any,
            Tables::Shadow(_) => Zone::Below4G,
        }
    }

    /// Pages mapped, by size, and tables in use.
    pub fn page_counts(&self) -> mmu::PageCounts {
        match self.tables() {
            Tables::Direct(direct) => direct.page_counts(),
            Tables::Shadow(shadow) => shadow.with(&self.vm, this_cpu(), |kind, _| kind.page_counts()),
        }
    }

    /// Copies out of guest RAM. `cpu` is the CPU that runs this, here and below.
    #[inline]
    pub fn read(&self, cpu: CpuId, gpa: u64, buf: &mut [u8]) -> Result<(), NotRam> {
        self.vm.shared(cpu).read(Gpa::new_truncate(gpa), buf)
    }

    /// Copies into guest RAM.
    #[inline]
    pub fn write(&self, cpu: CpuId, gpa: u64, data: &[u8]) -> Result<(), NotRam> {
        self.vm.shared(cpu).write(Gpa::new_truncate(gpa), data)?;
        self.written(cpu, gpa, data.len());
        Ok(())
    }

    /// After `len` bytes at `gpa` were written in the guest's place: if there is a table that is shadowed, its shadow
    /// follows.
    #[inline]
    fn written(&self, cpu: CpuId, gpa: u64, len: usize) {
        if let Some(shadow) = self.shadow() {
            let tracked = {
                let shared = self.vm.shared(cpu);
                let last = gpa.saturating_add(len.saturating_sub(1) as u64);
                (gpa >> 12..=last >> 12).any(|gfn| shared.is_write_tracked(Gfn::new_truncate(gfn)))
            };
            if tracked {
                let _ = shadow.with(&self.vm, cpu, |kind, guard| {
                    // No other CPU runs guests, so there is none to kick.
                    kind.track_write(guard, Gpa::new_truncate(gpa), len)
                });
            }
        }
    }

    /// Lets the guest write to the page of `gpa` by itself: whatever shadows it is dropped.
    #[cold]
    pub fn stop_shadowing(&self, cpu: CpuId, gpa: u64) {
        if let Some(shadow) = self.shadow() {
            let range = GfnRange::of(Gpa::new_truncate(gpa).gfn());
            let mut progress = ZapProgress::default();
            while !progress.is_done() {
                let _ = shadow.with(&self.vm, cpu, |kind, guard| kind.zap(guard, range, &mut progress));
            }
        }
    }

    /// The RAM as a device sees it that copies there while the guest runs.
    pub fn for_devices(&self, cpu: CpuId) -> DeviceView<'_, V> {
        DeviceView { memory: self, cpu }
    }

    /// Atomically replaces `old` by `new` in guest RAM, inside one page; false if something else was there. None
    /// where this needs an atomic operation that the stage below has not got: the guest can do it itself.
    pub fn compare_exchange(&self, cpu: CpuId, gpa: u64, size: u8, old: u64, new: u64) -> Option<bool> {
        let exchanged = self.try_exchange(cpu, gpa, size, old, new);
        if exchanged == Some(true) {
            self.written(cpu, gpa, size.into());
        }
        exchanged
    }

    fn try_exchange(&self, cpu: CpuId, gpa: u64, size: u8, old: u64, new: u64) -> Option<bool> {
        let shared = self.vm.shared(cpu);
        let at = |gpa| Gpa::new_truncate(gpa);
        match size {
            8 if gpa.is_multiple_of(8) => {
                shared.compare_exchange_u64(at(gpa), old, new).ok().map(|found| found == old)
            }
            4 if gpa.is_multiple_of(4) => {
                let found = shared.compare_exchange_u32(at(gpa), old as u32, new as u32).ok()?;
                Some(found == old as u32)
            }
            1 | 2 if gpa % 4 + u64::from(size) <= 4 => {
                let (word, shift) = (gpa & !3, gpa % 4 * 8);
                let mask = (u32::MAX >> (32 - 8 * u32::from(size))) << shift;
                let found = shared.load_u32(at(word)).ok()?;
                if found & mask != (old as u32) << shift & mask {
                    return Some(false);
                }
                let replaced = found & !mask | (new as u32) << shift & mask;
                // A neighbour's change makes the exchange fail like a change of the operand: it is tried again.
                Some(shared.compare_exchange_u32(at(word), found, replaced).ok()? == found)
            }
            _ => None,
        }
    }
}

impl<V: Vendor> Drop for GuestMemory<V> {
    fn drop(&mut self) {
        match self.tables.take() {
            Some(Tables::Direct(direct)) => direct.dismantle(free_table_page),
            Some(Tables::Shadow(shadow)) => shadow.dismantle(free_table_page),
            None => {}
        }
    }
}

/// See [`GuestMemory::for_devices`].
pub struct DeviceView<'m, V: Vendor> {
    memory: &'m GuestMemory<V>,
    cpu: CpuId,
}

impl<V: Vendor> GuestRam for DeviceView<'_, V> {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), BadGpa> {
        self.memory.ram().read(gpa, buf)
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), BadGpa> {
        self.memory.ram().write(gpa, data)?;
        self.memory.written(self.cpu, gpa, data.len());
        Ok(())
    }
}

/// What became of a second-stage fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The guest goes on.
    Mapped,
    /// There is no RAM: the access is a device's.
    Device,
    /// The host has no memory for tables.
    NoTableMemory,
}

/// What became of a page fault of the processor's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageFault {
    /// The guest goes on.
    Mapped,
    /// The guest's own tables forbid the access.
    Guest(Fault),
    /// The same, with this error code; the `mmu` crate knows.
    Told(u32),
    /// There is no RAM, or a write met RAM that is read-only.
    Device {
        /// Guest-physical address.
        gpa: u64,
        /// A write.
        write: bool,
    },
    /// A write to a table that is shadowed, in RAM.
    Table {
        /// Guest-physical address.
        gpa: u64,
    },
    /// The guest may make the access, but the processor never will: without CR0.WP a protection key does not hold
    /// back the supervisor's writes, and on shadow tables the processor's CR0.WP is set.
    DespiteKey,
    /// A table of the guest lies where its writes cannot be followed.
    TableOutsideRam,
    /// The host has no memory for tables.
    NoTableMemory,
}

/// CR4: protection keys of user pages, and of the supervisor's.
const CR4_PKE: u64 = 1 << 22;
const CR4_PKS: u64 = 1 << 24;
/// #PF error codes: write, user, instruction fetch. Intel SDM vol. 3, 4.7.
const PF_PRESENT: u32 = 1 << 0;
const PF_WRITE: u32 = 1 << 1;
const PF_KEY: u32 = 1 << 5;
pub(super) const PF_USER: u32 = 1 << 2;
pub(super) const PF_FETCH: u32 = 1 << 4;

/// Where an access leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// RAM at this guest-physical address.
    Ram(u64),
    /// Anything else at this guest-physical address.
    Device(u64),
}

/// A vCPU's part of the MMU: its run state, its table cache, the context in which its own tables are read.
pub struct Paging {
    mmu: Mmu,
    cache: TableCache,
    context: PagingContext<Gva, Gpa>,
    /// CR0, CR4 and EFER that the context was made from.
    registers: (u64, u64, u64),
    /// The [stamp](HwVcpu::control_stamp) of these registers, if they have one.
    stamp: u64,
    /// The context before: kernels switch CR0.WP and CR4.SMAP back and forth.
    previous: PagingContext<Gva, Gpa>,
    cpu: GuestCpu,
    /// The last instruction fetches.
    fetches: FetchCache,
    /// CR0, CR4 and EFER that the last one was made with, as far as they concern it.
    fetched_with: (u64, u64, u64),
    /// RIP and address of a supervisor's access that faulted last though the tables permit it.
    spurious: Option<(u64, u64)>,
    /// The CPU that the vCPU runs on.
    host_cpu: CpuId,
    /// The root that the hardware was given.
    root: u64,
}

impl Paging {
    /// The paging state of a vCPU of a VM with this memory.
    pub fn new<V: Vendor>(memory: &GuestMemory<V>, cpu: GuestCpu) -> Result<Self, OutOfMemory> {
        let role = CpuRole::new(&PagingState::RESET.regs, &cpu);
        let mmu = match memory.tables() {
            Tables::Direct(direct) => Mmu::new(role, direct.root()),
            // The depth is that of nested tables' shadows, which there are none of; the processor keeps accessed and
            // dirty bits in every table.
            Tables::Shadow(_) => Mmu::shadow(PagingState::RESET, cpu, Level::L4, true, Tags::One),
        };
        let mut paging = Self {
            mmu,
            cache: TableCache::new(),
            context: PagingContext::new(role),
            registers: (0, 0, 0),
            stamp: NO_STAMP,
            previous: PagingContext::new(role),
            cpu,
            fetches: FetchCache::new(),
            fetched_with: (0, 0, 0),
            spurious: None,
            host_cpu: this_cpu(),
            root: match memory.translation() {
                Translation::TwoStages(root) => root,
                Translation::Shadow => 0,
            },
        };
        paging.top_up(memory)?;
        Ok(paging)
    }

    /// The CPU that the vCPU runs on.
    #[inline]
    pub fn host_cpu(&self) -> CpuId {
        self.host_cpu
    }

    /// The vCPU runs on this CPU from now on.
    pub fn move_here(&mut self) {
        self.host_cpu = CpuId::new(crate::cpu::this().index()).unwrap_or(CpuId::BOOT);
    }

    /// Fills the table cache.
    fn top_up<V: Vendor>(&mut self, memory: &GuestMemory<V>) -> Result<(), OutOfMemory> {
        if let Some(shadow) = memory.shadow() {
            // Pages that nobody reaches any more first.
            let cache = &mut self.cache;
            shadow.with(&memory.vm, self.host_cpu, |kind, _| {
                kind.reclaim(&memory.vm, usize::MAX, |page| {
                    if let Err(page) = cache.push(page) {
                        free_table_page(page);
                    }
                })
            });
        }
        while self.cache.missing() > 0 {
            let page = table_page(memory.zone()).ok_or(OutOfMemory)?;
            if let Err(page) = self.cache.push(page) {
                free_table_page(page);
                break;
            }
        }
        Ok(())
    }

    /// Runs the vCPU until it exits, its translations up to date. The reason, if it is not entered.
    #[inline(always)]
    pub fn run<V: Vendor>(
        &mut self,
        memory: &GuestMemory<V>,
        hw: &mut V::Vcpu,
    ) -> Result<<V::Vcpu as HwVcpu>::Ended, Exit> {
        let mut entered = self.mmu.enter(&memory.vm, self.host_cpu);
        while entered.is_obsolete() {
            drop(entered);
            self.take_new_root(memory)?;
            entered = self.mmu.enter(&memory.vm, self.host_cpu);
        }
        // Another root is always a flush as well, for all have one tag.
        if entered.flush() != TagFlush::None {
            Self::obey(&mut self.root, entered.root().hpa.bits(), entered.flush(), hw);
        }
        Ok(hw.run(self.host_cpu.number()))
    }

    /// Gives the hardware the root that is entered on, and flushes.
    #[cold]
    fn obey<H: HwVcpu>(given: &mut u64, root: u64, flush: TagFlush, hw: &mut H) {
        if core::mem::replace(given, root) != root {
            hw.set_root(root);
        }
        match flush {
            TagFlush::None => {}
            TagFlush::Address(linear) => hw.flush_page(linear.bits()),
            TagFlush::All => hw.flush_tlb(),
        }
    }

    /// Takes the root of now; if that cannot be, what to do instead of an entry.
    #[cold]
    fn take_new_root<V: Vendor>(&mut self, memory: &GuestMemory<V>) -> Result<(), Exit> {
        let Some(shadow) = memory.shadow() else {
            let root = {
                let _shared = memory.vm.shared(self.host_cpu);
                memory.direct().root()
            };
            // What follows remembers the flush.
            let _ = self.mmu.set_root(root);
            return Ok(());
        };
        for _ in 0..FAULT_TRIES {
            let done = shadow.with(&memory.vm, self.host_cpu, |kind, guard| {
                self.mmu.carry_out(kind, guard, &mut self.cache)
            });
            match done.outcome {
                Ok(()) => return Ok(()),
                Err(NoShadowRoot::NeedTables) => {
                    self.top_up(memory).map_err(|OutOfMemory| Exit::NoTableMemory)?
                }
                // No other CPU runs guests: it is acknowledged by now.
                Err(NoShadowRoot::Wait) => {}
                Err(NoShadowRoot::Full) => return Err(Exit::NoTableMemory),
                Err(NoShadowRoot::Unreachable(_)) => {
                    return Err(Exit::InvalidState("the guest's page tables begin outside its RAM"))
                }
            }
        }
        // Look at what else is due, and try again.
        Err(Exit::HostInterrupt)
    }

    /// Handles a second-stage fault.
    #[inline]
    pub fn resolve<V: Vendor>(&mut self, memory: &GuestMemory<V>, fault: &SecondStageFault) -> Resolution {
        let gpa = Gpa::new_truncate(fault.gpa);
        let access = if fault.cause.contains(FaultCause::WRITE) {
            AccessKind::Write
        } else if fault.cause.contains(FaultCause::EXECUTE) {
            AccessKind::Execute
        } else {
            AccessKind::Read
        };
        let root = self.mmu.root();
        // A page that is there and forbids the access is most often one that waits for its next use.
        if fault.cause.contains(FaultCause::PRESENT) {
            let shared = memory.vm.shared(self.host_cpu);
            if memory.direct().fast_fault(&shared, &mut self.cache, root, gpa, access).is_some() {
                return Resolution::Mapped;
            }
        }
        for _ in 0..FAULT_TRIES {
            match memory.direct().fault_on(
                &memory.vm.shared(self.host_cpu),
                &mut self.cache,
                root,
                gpa,
                access,
            ) {
                FaultOutcome::Mapped | FaultOutcome::Spurious => break,
                FaultOutcome::Retry => {}
                FaultOutcome::Mmio(_)
                | FaultOutcome::ReadOnly(_)
                | FaultOutcome::WriteTracked(_)
                | FaultOutcome::OutOfRange(_) => return Resolution::Device,
                FaultOutcome::NeedTables => {
                    if self.top_up(memory).is_err() {
                        return Resolution::NoTableMemory;
                    }
                }
            }
        }
        Resolution::Mapped
    }

    /// Handles a page fault of the processor's, where shadow tables translate.
    #[inline(always)]
    pub fn page_fault<V: Vendor>(
        &mut self,
        memory: &GuestMemory<V>,
        hw: &V::Vcpu,
        code: u32,
        linear: u64,
    ) -> PageFault {
        let Some(shadow) = memory.shadow() else { return PageFault::Mapped };
        let kind = if code & PF_FETCH != 0 {
            AccessKind::Execute
        } else if code & PF_WRITE != 0 {
            AccessKind::Write
        } else {
            AccessKind::Read
        };
        let agent = match (code & PF_USER != 0, hw.cpl()) {
            (true, _) => Agent::User,
            (false, 3) => Agent::Implicit,
            (false, _) => Agent::Supervisor,
        };
        let access = Access { kind, agent };
        self.refresh(hw);
        let regs = rights(hw);
        let near = shadow.with(&memory.vm, self.host_cpu, |kind, guard| {
            self.mmu.fault_near(kind, guard, &self.context, &regs, Gva::new(linear), access)
        });
        match near {
            Some(NearFault::Mapped) => {
                self.spurious = None;
                PageFault::Mapped
            }
            Some(NearFault::Guest(code)) => {
                self.spurious = None;
                PageFault::Told(code.bits())
            }
            None => self.page_fault_by_walk(memory, hw, code, linear, access),
        }
    }

    /// The same by a walk of the guest's tables.
    #[inline(never)]
    fn page_fault_by_walk<V: Vendor>(
        &mut self,
        memory: &GuestMemory<V>,
        hw: &V::Vcpu,
        code: u32,
        linear: u64,
        mut access: Access,
    ) -> PageFault {
        let Some(shadow) = memory.shadow() else { return PageFault::Mapped };
        let regs = walk_regs(hw);
        for _ in 0..FAULT_TRIES {
            if self.mmu.has_work() {
                // The root went away in the meantime: it is taken anew at the entry, and the access faults again.
                return PageFault::Mapped;
            }
            let walk: GuestWalk<Gpa> =
                match self.context.walk(&memory.vm.shared(self.host_cpu), &regs, Gva::new(linear), access) {
                    Ok(walk) => walk,
                    Err(error) => {
                        self.spurious = None;
                        return PageFault::Guest(into_fault(error));
                    }
                };
            let done = shadow.with(&memory.vm, self.host_cpu, |kind, guard| {
                self.mmu.fault(kind, guard, &mut self.cache, &walk, Gva::new(linear), access)
            });
            let write = access.kind == AccessKind::Write;
            match done.outcome {
                ShadowFault::Spurious
                    if code & PF_KEY != 0
                        || code & PF_PRESENT != 0
                            && access.agent == Agent::Supervisor
                            && self.heeds_smap() =>
                {
                    // The tables permit an access by an operand, and yet it faulted. Another vCPU may just have
                    // mapped the page; if the same access faults again, its key is in the way, or it is one of the
                    // processor's own, which RFLAGS.AC does not concern.
                    let at = (hw.rip(), linear);
                    if self.spurious.replace(at) != Some(at) {
                        return PageFault::Mapped;
                    }
                    self.spurious = None;
                    if code & PF_KEY != 0 {
                        return PageFault::DespiteKey;
                    }
                    access.agent = Agent::Implicit;
                }
                ShadowFault::Mapped | ShadowFault::Spurious | ShadowFault::NoRoot | ShadowFault::Wait => {
                    self.spurious = None;
                    return PageFault::Mapped;
                }
                ShadowFault::Retry => {}
                ShadowFault::Mmio(gpa) | ShadowFault::ReadOnly(gpa) => {
                    return PageFault::Device { gpa: gpa.bits(), write };
                }
                ShadowFault::WriteTracked(gpa) => return PageFault::Table { gpa: gpa.bits() },
                ShadowFault::NeedTables => {
                    if self.top_up(memory).is_err() {
                        return PageFault::NoTableMemory;
                    }
                }
                ShadowFault::Full => return PageFault::NoTableMemory,
                ShadowFault::Untrackable(_) => return PageFault::TableOutsideRam,
            }
        }
        PageFault::Mapped
    }

    /// Whether SMAP is in force.
    fn heeds_smap(&self) -> bool {
        self.context.role().flags().contains(RoleFlags::SMAP)
    }

    /// Whether the vCPU's own tables are shadowed, so that what changes them must be told.
    #[inline]
    pub fn is_shadowed(&self) -> bool {
        self.mmu.is_shadow()
    }

    /// MOV to CR3; `keep` says that the translations of the PCID stay.
    pub fn cr3_written<H: HwVcpu>(&mut self, hw: &H, keep: bool) {
        const NO_FLUSH: u64 = 1 << 63;
        let order = if keep { NO_FLUSH } else { 0 };
        // Here and below: the request is remembered, and carried out before the next entry.
        let _ = self.mmu.mov_to_cr3(hw.cr3() | order, hw.pdptes().unwrap_or_default());
    }

    /// MOV to CR0, CLTS or LMSW.
    pub fn cr0_written<H: HwVcpu>(&mut self, hw: &H) {
        let (cr0, efer) = (Cr0::from_bits_retain(hw.cr0()), Efer::from_bits_retain(hw.efer()));
        let _ = self.mmu.mov_to_cr0(cr0, efer, hw.pdptes().unwrap_or_default());
    }

    /// MOV to CR4.
    pub fn cr4_written<H: HwVcpu>(&mut self, hw: &H) {
        let cr4 = Cr4::from_bits_retain(hw.cr4());
        let _ = self.mmu.mov_to_cr4(cr4, hw.pdptes().unwrap_or_default());
    }

    /// CR3, CR0 or CR4 that lead back to a root, in long mode. Each is in order; if it was followed, the register is
    /// left to be set.
    #[inline]
    pub fn goes_back_cr3<V: Vendor>(&mut self, memory: &GuestMemory<V>, value: u64) -> bool {
        self.at_once(memory, |mmu, kind, guard| mmu.mov_to_seen_cr3(kind, guard, value))
    }

    /// See [`goes_back_cr3`](Self::goes_back_cr3); of CR0 nothing but WP is another.
    #[inline]
    pub fn goes_back_cr0<V: Vendor>(&mut self, memory: &GuestMemory<V>, value: u64, efer: u64) -> bool {
        let (cr0, efer) = (Cr0::from_bits_retain(value), Efer::from_bits_retain(efer));
        self.mmu.mov_to_cr0_wp(cr0)
            || self.at_once(memory, |mmu, kind, guard| mmu.mov_to_seen_cr0(kind, guard, cr0, efer))
    }

    /// See [`goes_back_cr3`](Self::goes_back_cr3); of CR4 nothing but PGE is another.
    #[inline]
    pub fn goes_back_cr4<V: Vendor>(&mut self, memory: &GuestMemory<V>, value: u64) -> bool {
        let cr4 = Cr4::from_bits_retain(value);
        self.at_once(memory, |mmu, kind, guard| mmu.mov_to_seen_cr4(kind, guard, cr4))
    }

    /// Tries what is done with an event at once, if it can be; whether it was.
    #[inline(always)]
    fn at_once<V: Vendor, T>(
        &mut self,
        memory: &GuestMemory<V>,
        act: impl FnOnce(&mut Mmu, &mut Kind, &mut Exclusive<'_, HostMemory>) -> Option<T>,
    ) -> bool {
        let Some(shadow) = memory.shadow() else { return false };
        // No other CPU runs guests, so there is none to kick.
        shadow.with(&memory.vm, self.host_cpu, |kind, guard| act(&mut self.mmu, kind, guard)).is_some()
    }

    /// WRMSR to EFER.
    pub fn efer_written<H: HwVcpu>(&mut self, hw: &H) {
        let _ = self.mmu.wrmsr_efer(Efer::from_bits_retain(hw.efer()));
    }

    /// The whole state was replaced: at the start, by INIT, by a task switch.
    pub fn state_replaced<H: HwVcpu>(&mut self, hw: &H) {
        let state = PagingState {
            regs: paging_regs(hw),
            cr3: hw.cr3(),
            pdptes: hw.pdptes().unwrap_or_default(),
            smm: false,
        };
        let _ = self.mmu.set_from_outside(state, self.cpu);
    }

    /// The guest gets a page fault with this error code.
    pub fn guest_faulted<V: Vendor>(&mut self, memory: &GuestMemory<V>, linear: u64) {
        let address = Gva::new(linear);
        if !self.at_once(memory, |mmu, kind, guard| mmu.page_fault_at_once(kind, guard, address)) {
            let _ = self.mmu.page_fault(address);
        }
    }

    /// INVLPG.
    #[inline]
    pub fn invalidate_page<V: Vendor>(&mut self, memory: &GuestMemory<V>, linear: u64) {
        let address = Gva::new(linear);
        if self.at_once(memory, |mmu, kind, guard| mmu.invlpg_at_once(kind, guard, address)) {
            return;
        }
        let _ = self.mmu.invlpg(address);
    }

    /// INVPCID with checked operands.
    pub fn invalidate_context(&mut self, kind: u8, pcid: u16, linear: u64) {
        let _ = self.mmu.invpcid(match kind {
            0 => Invpcid::Address { pcid, address: Gva::new(linear) },
            1 => Invpcid::Single { pcid },
            2 => Invpcid::All,
            _ => Invpcid::AllButGlobal,
        });
    }

    /// All translations of the guest go.
    pub fn invalidate_all(&mut self) {
        let _ = self.mmu.flush_guest();
    }

    /// Where an access of guest-physical address `gpa` leads. A `write` to read-only memory is a device's affair:
    /// nobody's.
    #[inline]
    pub fn place<V: Vendor>(&self, memory: &GuestMemory<V>, gpa: u64, write: bool) -> Place {
        let (shared, at) = (memory.vm.shared(self.host_cpu), Gpa::new_truncate(gpa));
        match if write { shared.writable(at) } else { shared.ram(at) } {
            Some(_) => Place::Ram(gpa),
            None => Place::Device(gpa),
        }
    }

    /// Walks the guest's own tables.
    #[inline]
    pub fn translate<V: Vendor>(
        &mut self,
        memory: &GuestMemory<V>,
        hw: &V::Vcpu,
        linear: u64,
        access: Access,
    ) -> Result<u64, Fault> {
        self.refresh(hw);
        let regs = walk_regs(hw);
        self.context
            .translate(&memory.vm.shared(self.host_cpu), &regs, Gva::new(linear), access)
            .map(|translation| translation.address.bits())
            .map_err(into_fault)
    }

    /// The first bytes of the instruction at `linear`, if the last [`fetch`](Self::fetch) found them in their page, in this
    /// address space and with the registers as they are, and would again; in long mode.
    #[inline(always)]
    pub fn peek<V: Vendor, const N: usize>(
        &self,
        memory: &GuestMemory<V>,
        hw: &V::Vcpu,
        linear: u64,
    ) -> Option<[u8; N]> {
        let registers = fetch_registers(hw);
        if registers != self.fetched_with || registers.2 & EFER_LMA == 0 {
            return None;
        }
        self.fetches.read(|| memory.vm.shared(self.host_cpu), linear, hw.cr3(), hw.cpl())
    }

    /// The same with the last two [fetches in turns](Self::fetch_in_turns), for a supervisor.
    #[inline(always)]
    pub fn peek_in_turns<V: Vendor, const N: usize>(
        &self,
        memory: &GuestMemory<V>,
        hw: &V::Vcpu,
        linear: u64,
    ) -> Option<[u8; N]> {
        let shared = || memory.vm.shared(self.host_cpu);
        self.fetches.read_in_turns(shared, linear, hw.cr3(), hw.control_stamp())
    }

    /// What [`fetch`](Self::fetch) does, for exits that code and a handler of its faults make in turns.
    #[inline(never)]
    pub fn fetch_in_turns<V: Vendor>(
        &mut self,
        memory: &GuestMemory<V>,
        hw: &V::Vcpu,
        linear: u64,
    ) -> Result<([u8; 16], usize), Fault> {
        let fetched = self.fetch(memory, hw, linear);
        let stamp = hw.control_stamp();
        self.fetches.vouch(if hw.efer() & EFER_LMA == 0 || stamp == 0 { NO_STAMP } else { stamp });
        fetched
    }

    /// Copies instruction bytes at linear address `linear`: up to fifteen, fewer if the next page cannot be
    /// fetched from. Fails if not even the first byte can be. The sixteenth byte is not meant to be used.
    #[inline(always)]
    pub fn fetch<V: Vendor>(
        &mut self,
        memory: &GuestMemory<V>,
        hw: &V::Vcpu,
        linear: u64,
    ) -> Result<([u8; 16], usize), Fault> {
        let registers = fetch_registers(hw);
        if registers != self.fetched_with {
            self.fetched_with = registers;
            self.refresh(hw);
        }
        let shared = || memory.vm.shared(self.host_cpu);
        match self.fetches.read(shared, linear, hw.cr3(), hw.cpl()) {
            Some(bytes) => Ok((bytes, MAX_INSN_BYTES)),
            None => self.fetch_otherwise(memory, hw, linear),
        }
    }

    #[inline(never)]
    fn fetch_otherwise<V: Vendor>(
        &mut self,
        memory: &GuestMemory<V>,
        hw: &V::Vcpu,
        linear: u64,
    ) -> Result<([u8; 16], usize), Fault> {
        let shared = memory.vm.shared(self.host_cpu);
        match self.fetches.read_other(&shared, linear, hw.cr3(), hw.cpl()) {
            Some(bytes) => Ok((bytes, MAX_INSN_BYTES)),
            None => self.fetch_by_walk(&shared, hw, linear),
        }
    }

    #[cold]
    fn fetch_by_walk<H: HwVcpu>(
        &mut self,
        shared: &Shared<'_, HostMemory>,
        hw: &H,
        linear: u64,
    ) -> Result<([u8; 16], usize), Fault> {
        self.refresh(hw);
        let regs = walk_regs(hw);
        let access = Access::at_cpl(AccessKind::Execute, hw.cpl());
        let recorder = Recorder::new(shared);
        let first = self.context.translate(&recorder, &regs, Gva::new(linear), access).map_err(into_fault)?;
        // Pointers in registers are not among the entries that a walk can be repeated by.
        if regs.pdptes.is_none() {
            self.fetches.keep(shared, &recorder, linear, regs.cr3, hw.cpl(), first.address.gfn().gpa());
        }
        let mut bytes = [0; 16];
        let room = (0x1000 - (linear & 0xfff)).min(MAX_INSN_BYTES as u64) as usize;
        let (now, later) = bytes[..MAX_INSN_BYTES].split_at_mut(room);
        // Code in device memory has no bytes.
        shared.read(first.address, now).map_err(|NotRam { .. }| Fault::Unsupported("code outside RAM"))?;
        if later.is_empty() {
            return Ok((bytes, MAX_INSN_BYTES));
        }
        let next = Gva::new(linear.wrapping_add(room as u64));
        let second = self.context.translate(shared, &regs, next, access);
        let have_all = second.is_ok_and(|second| shared.read(second.address, later).is_ok());
        Ok((bytes, if have_all { MAX_INSN_BYTES } else { room }))
    }

    /// Makes the context that of the registers as they are now.
    #[inline]
    fn refresh<H: HwVcpu>(&mut self, hw: &H) {
        // What the number leaves open is CR0.WP, and CR4.PGE, which no context depends on.
        let (cr0, stamp) = (hw.cr0(), hw.control_stamp());
        if stamp == self.stamp && cr0 == self.registers.0 {
            return;
        }
        let registers = (cr0, hw.cr4(), hw.efer());
        if registers != self.registers {
            self.rebuild(registers);
        }
        if stamp != 0 {
            self.stamp = stamp;
        }
    }

    #[cold]
    fn rebuild(&mut self, registers: (u64, u64, u64)) {
        self.registers = registers;
        let role = if self.mmu.is_shadow() {
            // It is told of every change.
            self.mmu.role()
        } else {
            let role = CpuRole::new(&to_paging_regs(registers), &self.cpu);
            self.mmu.set_role(role);
            role
        };
        let before = self.context.role();
        if role == before {
            return;
        }
        core::mem::swap(&mut self.context, &mut self.previous);
        if role != self.context.role() {
            self.context = PagingContext::new(role);
        }
        // What CR0.WP concerns is no fetch.
        let fetches = |role: CpuRole| (role.mode(), role.flags().difference(RoleFlags::WP));
        if fetches(role) != fetches(before) {
            self.fetches.clear();
        }
    }
}

impl Drop for Paging {
    fn drop(&mut self) {
        while let Some(page) = self.cache.pop() {
            free_table_page(page);
        }
    }
}

/// CR0, CR4 and EFER as far as they concern fetches: two bits are no such, and kernels switch them back and forth.
#[inline(always)]
fn fetch_registers<H: HwVcpu>(hw: &H) -> (u64, u64, u64) {
    (hw.cr0() & !CR0_WP, hw.cr4() & !CR4_PGE, hw.efer())
}

/// CR0, CR4 and EFER for the `mmu` crate.
fn to_paging_regs((cr0, cr4, efer): (u64, u64, u64)) -> PagingRegs {
    PagingRegs {
        cr0: Cr0::from_bits_retain(cr0),
        cr4: Cr4::from_bits_retain(cr4),
        efer: Efer::from_bits_retain(efer),
    }
}

fn paging_regs<H: HwVcpu>(hw: &H) -> PagingRegs {
    to_paging_regs((hw.cr0(), hw.cr4(), hw.efer()))
}

#[inline]
fn walk_regs<H: HwVcpu>(hw: &H) -> WalkRegs {
    WalkRegs { cr3: hw.cr3(), pdptes: hw.pdptes(), ..rights(hw) }
}

/// Of the registers for a walk, those that say what an access may do.
#[inline]
fn rights<H: HwVcpu>(hw: &H) -> WalkRegs {
    const RFLAGS_AC: u64 = 1 << 18;
    let cr4 = hw.cr4();
    let (pkru, pkrs) = if cr4 & (CR4_PKE | CR4_PKS) != 0 { key_rights(cr4) } else { (0, 0) };
    WalkRegs { cr3: 0, pkru, pkrs, ac: hw.rflags() & RFLAGS_AC != 0, pdptes: None }
}

/// PKRU and IA32_PKRS, which are in their registers while the vCPU is on this CPU.
#[cold]
fn key_rights(cr4: u64) -> (u32, u32) {
    let pkru = if cr4 & CR4_PKE != 0 { extended::pkru() } else { 0 };
    let pkrs = if cr4 & CR4_PKS != 0 { extended::pkrs() } else { 0 };
    (pkru, pkrs)
}

#[cold]
fn into_fault(error: WalkError) -> Fault {
    match error {
        WalkError::Fault(fault) => {
            Fault::Exception(Exception::page_fault(fault.page_fault_code().bits(), fault.address))
        }
        // There is no log in a VM's own tables.
        WalkError::Contended | WalkError::LogFull => Fault::Retry,
    }
}
