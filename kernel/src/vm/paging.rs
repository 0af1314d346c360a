//! Where the kernel meets the `mmu` crate: a VM's memory with its direct kind, a vCPU's run state and walks.
#![allow(unsafe_code)] // Frames become table pages here, and the physical map becomes table memory.

use super::emulate::{Exception, Fault};
use super::fetch::{FetchCache, Recorder};
use super::memory::HostMemory;
use crate::hw::{Exit, FaultCause, HwVcpu, OutOfMemory, SecondStageFault, Vendor};
use crate::mm::{self, FrameSize, Zone};
use mmu::{
    Access, AccessKind, CpuId, CpuRole, Cr0, Cr4, DirectMmu, Efer, Entered, FaultOutcome, Gpa, GuestCpu, Gva,
    Mmu, NotRam, PageSize, PagingContext, PagingRegs, Pfn, PhysTables, Shared, TableCache, TablePage,
    TagFlush, VmMemory, WalkError, WalkRegs,
};
use x86_64::PhysAddr;

/// Times that a fault is tried again while another CPU is in the way, before the guest runs on and faults anew.
const FAULT_TRIES: usize = 4;
/// Longest instruction (APM vol. 3, 1.1).
const MAX_INSN_BYTES: usize = 15;

/// Guest-physical memory of a VM and the tables that map it: the sketch's `direct_mmu` lives here.
pub struct GuestMemory<V: Vendor> {
    vm: VmMemory<HostMemory>,
    /// Taken out only to be dismantled.
    direct: Option<DirectMmu<V::Format, PhysTables>>,
}

/// The CPU that runs this, as the `mmu` crate counts.
#[inline]
fn this_cpu() -> CpuId {
    CpuId::new(crate::cpu::number()).unwrap_or(CpuId::BOOT)
}

fn table_page() -> Option<TablePage> {
    let frame = mm::alloc(FrameSize::Size4K, Zone::Any)?;
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
    /// Makes `ram` the memory of a VM whose physical addresses have `guest_bits` bits.
    pub fn new(vendor: &V, ram: HostMemory, guest_bits: u8, largest: PageSize) -> Result<Self, OutOfMemory> {
        let vm = VmMemory::new(ram);
        {
            let mut exclusive = vm.exclusive(this_cpu());
            for slot in vm.backing().slots() {
                exclusive.insert_slot(&slot).map_err(|_| OutOfMemory)?;
            }
        }
        let root = table_page().ok_or(OutOfMemory)?;
        // SAFETY: the physical map covers all RAM at a constant offset, write-back, for as long as Umbra runs.
        let tables = unsafe { PhysTables::new(mm::PHYSMAP) };
        let direct = DirectMmu::new(&vm, vendor.format(), tables, root, u32::from(guest_bits), largest);
        Ok(Self { vm, direct: Some(direct) })
    }

    /// The RAM, for loaders and devices.
    pub fn ram(&self) -> &HostMemory {
        self.vm.backing()
    }

    #[inline]
    fn direct(&self) -> &DirectMmu<V::Format, PhysTables> {
        self.direct.as_ref().expect("taken out by `drop` only")
    }

    /// Physical address of the root of the second-stage tables.
    pub fn root(&self) -> u64 {
        self.direct().root().hpa.bits()
    }

    /// Pages mapped, by size, and tables in use.
    pub fn page_counts(&self) -> mmu::PageCounts {
        self.direct().page_counts()
    }

    /// Copies out of guest RAM. `cpu` is the CPU that runs this, here and below.
    #[inline]
    pub fn read(&self, cpu: CpuId, gpa: u64, buf: &mut [u8]) -> Result<(), NotRam> {
        self.vm.shared(cpu).read(Gpa::new_truncate(gpa), buf)
    }

    /// Copies into guest RAM.
    #[inline]
    pub fn write(&self, cpu: CpuId, gpa: u64, data: &[u8]) -> Result<(), NotRam> {
        self.vm.shared(cpu).write(Gpa::new_truncate(gpa), data)
    }

    /// Atomically replaces `old` by `new` in guest RAM, inside one page; false if something else was there. None
    /// where this needs an atomic operation that the stage below has not got: the guest can do it itself.
    pub fn compare_exchange(&self, cpu: CpuId, gpa: u64, size: u8, old: u64, new: u64) -> Option<bool> {
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
        if let Some(direct) = self.direct.take() {
            direct.dismantle(free_table_page);
        }
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
    cpu: GuestCpu,
    /// The last instruction fetch.
    fetches: FetchCache,
    /// The CPU that the vCPU runs on.
    host_cpu: CpuId,
}

impl Paging {
    /// The paging state of a vCPU of a VM with this memory.
    pub fn new<V: Vendor>(memory: &GuestMemory<V>, cpu: GuestCpu) -> Result<Self, OutOfMemory> {
        let role =
            CpuRole::new(&PagingRegs { cr0: Cr0::empty(), cr4: Cr4::empty(), efer: Efer::empty() }, &cpu);
        let mut paging = Self {
            mmu: Mmu::new(role, memory.direct().root()),
            cache: TableCache::new(),
            context: PagingContext::new(role),
            registers: (0, 0, 0),
            cpu,
            fetches: FetchCache::new(),
            host_cpu: this_cpu(),
        };
        paging.top_up()?;
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
    fn top_up(&mut self) -> Result<(), OutOfMemory> {
        while self.cache.missing() > 0 {
            let page = table_page().ok_or(OutOfMemory)?;
            if let Err(page) = self.cache.push(page) {
                free_table_page(page);
                break;
            }
        }
        Ok(())
    }

    /// Runs the vCPU until it exits, its translations up to date.
    #[inline(always)]
    pub fn run<V: Vendor>(&mut self, memory: &GuestMemory<V>, hw: &mut V::Vcpu) -> Exit {
        let mut entered = self.mmu.enter(&memory.vm, self.host_cpu);
        while entered.is_obsolete() {
            drop(entered);
            entered = self.enter_on_new_root(memory);
            hw.set_root(entered.root().hpa.bits());
        }
        if entered.flush() != TagFlush::None {
            hw.flush_tlb();
        }
        hw.run(self.host_cpu.number())
    }

    /// Enters on the root of now.
    #[cold]
    fn enter_on_new_root<'m, V: Vendor>(&mut self, memory: &'m GuestMemory<V>) -> Entered<'m, HostMemory> {
        let root = {
            let _shared = memory.vm.shared(self.host_cpu);
            memory.direct().root()
        };
        // What follows remembers the flush.
        let _ = self.mmu.set_root(root);
        self.mmu.enter(&memory.vm, self.host_cpu)
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
                    if self.top_up().is_err() {
                        return Resolution::NoTableMemory;
                    }
                }
            }
        }
        Resolution::Mapped
    }

    /// Where an access of guest-physical address `gpa` leads. A `write` to read-only memory is a device's affair: nobody's.
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

    /// Copies instruction bytes at linear address `linear`: up to fifteen, fewer if the next page cannot be
    /// fetched from. Fails if not even the first byte can be. The sixteenth byte is not meant to be used.
    #[inline(always)]
    pub fn fetch<V: Vendor>(
        &mut self,
        memory: &GuestMemory<V>,
        hw: &V::Vcpu,
        linear: u64,
    ) -> Result<([u8; 16], usize), Fault> {
        self.refresh(hw);
        let shared = memory.vm.shared(self.host_cpu);
        match self.fetches.read(&shared, linear, hw.cr3(), hw.cpl()) {
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
        let regs = walk_regs(hw);
        let access = Access::at_cpl(AccessKind::Execute, hw.cpl());
        let recorder = Recorder::new(shared);
        let first = self.context.translate(&recorder, &regs, Gva::new(linear), access).map_err(into_fault)?;
        self.fetches.keep(shared, &recorder, linear, regs.cr3, hw.cpl(), first.address.gfn().gpa());
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
        let registers = (hw.cr0(), hw.cr4(), hw.efer());
        if registers != self.registers {
            self.rebuild(registers);
        }
    }

    #[cold]
    fn rebuild(&mut self, registers: (u64, u64, u64)) {
        self.registers = registers;
        self.fetches.clear();
        let (cr0, cr4, efer) = registers;
        let regs = PagingRegs {
            cr0: Cr0::from_bits_retain(cr0),
            cr4: Cr4::from_bits_retain(cr4),
            efer: Efer::from_bits_retain(efer),
        };
        let role = CpuRole::new(&regs, &self.cpu);
        self.mmu.set_role(role);
        if role != self.context.role() {
            self.context = PagingContext::new(role);
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

#[inline]
fn walk_regs<H: HwVcpu>(hw: &H) -> WalkRegs {
    const RFLAGS_AC: u64 = 1 << 18;
    const CR4_PKE: u64 = 1 << 22;
    // PKRU is in the register while its vCPU is on this CPU.
    let pkru = if hw.cr4() & CR4_PKE != 0 { crate::hw::extended::pkru() } else { 0 };
    WalkRegs {
        cr3: hw.cr3(),
        pkru,
        ac: hw.rflags() & RFLAGS_AC != 0,
        pdptes: hw.pdptes(),
        ..WalkRegs::default()
    }
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
