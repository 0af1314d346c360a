//! A vCPU under VMX: its VMCS, the registers that the VMCS does not hold, its TLB tag.
#![allow(unsafe_code)] // Entering a guest is unsafe.

use super::access_rights::{from_access_rights, to_access_rights};
use super::cache::{Cache, FieldsMut, Hot, AT_COMPLETION, IN_EMULATION};
use super::capabilities::{cr0_for_hardware, cr4_for_hardware, EptVpid};
use super::check::{explain, guest_state_error, Failure, GuestState};
use super::choice::{Controls, APIC_VIRTUALIZATION, CR3_EXITING};
use super::controls::{
    Activity, EntryControls, ExitControls, Interruptibility, Pin, Primary, Secondary, EXCEPTION_PAGE_FAULT,
};
use super::cpu::{with_this_cpu, Machine, Vmx};
use super::exit::{interrupted_event, ExitReason};
use super::instructions::{invept, invvpid, InveptScope, InvvpidScope};
use super::msr_area::MsrAreas;
use super::real_mode::{self, Form};
use super::region::{Current, Region};
use super::registers::Registers;
use super::vmcs::{self, Fields, GUEST_SEGMENTS, LDTR, TR};
use super::{decode, dirty_log, entry, event, setup, spoil};
use crate::cpu::{msr, tsc};
use crate::devices::lapic::{ApicPage, LocalApic, VectorSet};
use crate::hw::tag::{Tag, TagAllocator};
use crate::hw::{
    gpr, CpuState, Event, Exit, HwVcpu, OutOfMemory, Segment, SegmentName, TableRegister, Translation,
};
use crate::mm::{self, FrameSize, Zone};
use crate::vm::msr::{EFER_LMA, PAT_RESET};
use x86_64::PhysAddr;

const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_IF: u64 = 1 << 9;
const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// CR4.MCE: the host's, so that a machine check is always an exit and never a shutdown of the guest.
const CR4_MCE: u64 = 1 << 6;
/// CR4.VMXE: fixed to 1 in VMX operation, and hidden.
const CR4_VMXE: u64 = 1 << 13;
/// The guest changes MP, EM, TS, WP and AM of CR0 without an exit. The others are the host's: PE and PG because EFER.LMA
/// and the form in which the VMCS holds the state follow from them, CD, NW and NE because the hardware has others.
const CR0_OWN: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 16 | 1 << 18;
/// CR0.WP: what shadow tables permit goes for all.
const CR0_WP: u64 = 1 << 16;
const CR4_PCIDE: u64 = 1 << 17;
/// PSE, PAE, PGE, LA57, PCIDE, SMEP, SMAP, PKE and PKS.
const CR4_OF_TABLES: u64 =
    1 << 4 | CR4_PAE | 1 << 7 | 1 << 12 | CR4_PCIDE | 1 << 20 | 1 << 21 | 1 << 22 | 1 << 24;
const EFER_NXE: u64 = 1 << 11;
/// CR0.CD and CR0.NW: an entry does not load them (SDM vol. 3, 27.3.2.1), and caches stay on.
const CR0_CACHE: u64 = 1 << 29 | 1 << 30;
/// Pending debug exceptions: single step (SDM vol. 3, table 25-4).
const PENDING_STEP: u64 = 1 << 14;
/// TPR in the virtual-APIC page (SDM vol. 3, 30.1.1): CR8 is its bits 7:4.
const APIC_PAGE_TPR: u64 = 0x80;

/// Entries after which the VMX-preemption timer is set anew. In between it counts on from what the exit saved (SDM vol. 3,
/// 26.5.1), so it stands still while the host runs, and expires late by what this many exits take. Exits that may take long,
/// as those for second-stage faults do, set it anew at once, and so does everything after which a vCPU looks for events.
const TIMER_RUNS: u8 = 16;

/// A vCPU under VMX.
#[derive(Debug)]
pub struct VmxVcpu {
    gprs: [u64; 16],
    pub(super) region: Region,
    pub(super) cache: Cache,
    pub(super) registers: Registers,
    areas: MsrAreas,
    apic_page: PhysAddr,
    machine: &'static Machine,
    vmx: Vmx,
    pub(super) controls: &'static Controls,
    eptp: u64,
    /// Bits of CR4 that the guest may set.
    cr4_allowed: u64,
    /// Bits of CR0 and CR4 that are the host's in this form.
    cr0_mask: u64,
    cr4_mask: u64,
    /// What the guest reads in those.
    cr0_shadow: u64,
    cr4_shadow: u64,
    /// EFER as the guest sees it. It changes only by exits, for CR0.PG is the host's.
    efer: u64,
    /// How the VMCS holds the guest's state.
    pub(super) form: Form,
    /// Without unrestricted guest: the state was changed by software, so it may need another form, or have none.
    unsettled: bool,
    /// The guest's CR3 while the VMCS has that of identity tables, or of a shadow.
    own_cr3: u64,
    /// The guest's PDPTE registers, where shadow tables translate.
    pdptes: [u64; 4],
    /// Attributes of ES to GS, and the LDTR and TR, while the VMCS has those of virtual-8086 mode.
    real_attributes: [u16; 6],
    real_tr: Segment,
    /// IOPL in that time.
    real_iopl: u64,
    /// Without TPR shadow.
    cr8: u8,
    pin: Pin,
    primary: Primary,
    /// Primary controls that the VMCS has.
    primary_written: Primary,
    /// Entry controls for the next entry, and those that the VMCS has.
    entry: EntryControls,
    entry_written: EntryControls,
    /// Whether the processor can have the local APIC.
    virtual_apic: bool,
    /// Secondary controls for the next entry, and those that the VMCS has.
    secondary: Secondary,
    secondary_written: Secondary,
    /// Vectors whose EOI exits, as the VMCS has them.
    eoi_exits: Option<VectorSet>,
    /// The page-modification log, while there is one.
    dirty_log: Option<PhysAddr>,
    /// What the next entry delivers.
    injection: Option<Event>,
    /// The last exit's information about a delivery that it interrupted, until someone takes it.
    pub(super) vectoring: u32,
    /// RSP as the VMCS has it.
    rsp: u64,
    deadline: Option<u64>,
    /// Entries that go on with what the exit saved of the timer, before it is set anew.
    pub(super) timer_runs: u8,
    /// Index of the CPU it last ran on, whose state the VMCS has as the host's.
    cpu: usize,
    tag: Tag,
    flush: bool,
    /// Length of the instruction that exited, 0 if the last exit has none.
    pub(super) length: u64,
}

// SAFETY: the VMCS and the pages belong to this vCPU alone, wherever it runs.
unsafe impl Send for VmxVcpu {}

impl VmxVcpu {
    pub(super) fn new(
        vmx: Vmx,
        controls: &'static Controls,
        translation: Translation,
        cr4_allowed: u64,
    ) -> Result<Self, OutOfMemory> {
        let machine = vmx.machine();
        let eptp = match translation {
            Translation::TwoStages(root) => vmx.eptp(root),
            Translation::Shadow => 0,
        };
        let areas = MsrAreas::new(controls)?;
        let region = Region::new(machine.capabilities.revision())?;
        let apic_page = mm::alloc_zeroed(FrameSize::Size4K, Zone::Any).ok_or(OutOfMemory)?;
        setup::write_controls(&region, machine, controls, eptp, apic_page, &areas);
        let mut vcpu = Self {
            gprs: [0; 16],
            region,
            cache: Cache::default(),
            registers: Registers::new(),
            areas,
            apic_page,
            machine,
            vmx,
            controls,
            eptp,
            cr4_allowed,
            cr0_mask: u64::MAX,
            cr4_mask: u64::MAX,
            cr0_shadow: 0,
            cr4_shadow: 0,
            efer: 0,
            form: Form::Own,
            unsettled: false,
            own_cr3: 0,
            pdptes: [0; 4],
            real_attributes: [0; 6],
            real_tr: Segment::default(),
            real_iopl: 0,
            cr8: 0,
            pin: controls.pin,
            primary: controls.primary,
            primary_written: Primary::empty(),
            entry: controls.entry,
            entry_written: EntryControls::empty(),
            virtual_apic: controls.can_virtualize_apic(),
            secondary: controls.secondary,
            secondary_written: controls.secondary,
            eoi_exits: None,
            dirty_log: None,
            injection: None,
            vectoring: 0,
            rsp: 0,
            deadline: None,
            timer_runs: 0,
            cpu: usize::MAX,
            tag: Tag::default(),
            flush: true,
            length: 0,
        };
        vcpu.region.set(vmcs::GUEST_RSP, 0);
        vcpu.set_pat(PAT_RESET);
        vcpu.write_form_masks();
        vcpu.load_state(&CpuState::reset());
        Ok(vcpu)
    }

    /// Moves to this CPU, or takes a new tag, or flushes the old one.
    #[cold]
    #[inline(never)]
    fn retag(&mut self, cpu: usize, vpids: &mut TagAllocator) {
        let capabilities = self.machine.capabilities.ept_vpid;
        if self.cpu != cpu {
            self.cpu = cpu;
            self.tag = Tag::default();
            setup::write_host_state(&self.region, self.controls.exit);
            self.areas.set_host();
        }
        if !vpids.is_current(self.tag) {
            let allocation = vpids.allocate();
            self.tag = allocation.tag;
            if self.controls.secondary.contains(Secondary::VPID) {
                self.region.set(vmcs::VPID, allocation.tag.number as u16);
                if allocation.flush_all {
                    // SAFETY: VMX is on, and VPIDs are used only with this kind of INVVPID.
                    let flushed = unsafe { invvpid(InvvpidScope::All) };
                    debug_assert!(flushed.is_ok());
                }
            }
        }
        self.flush = false;
        if self.controls.shadow() {
            return self.flush_tag();
        }
        // An EPT pointer may have been another VM's on this CPU, so a new tag flushes, too.
        let scope = if capabilities.contains(EptVpid::INVEPT_SINGLE) {
            InveptScope::Single
        } else {
            InveptScope::All
        };
        // SAFETY: VMX is on, and the CPU has that kind of INVEPT, for it has one.
        let flushed = unsafe { invept(scope, self.eptp) };
        debug_assert!(flushed.is_ok());
    }

    /// Flushes what the tag holds. Without tags every entry and exit does.
    fn flush_tag(&mut self) {
        if !self.controls.secondary.contains(Secondary::VPID) {
            return;
        }
        let single = self.machine.capabilities.ept_vpid.contains(EptVpid::INVVPID_SINGLE);
        let vpid = self.tag.number as u16;
        let scope = if single { InvvpidScope::Single(vpid) } else { InvvpidScope::All };
        // SAFETY: VMX is on, the CPU has that kind of INVVPID, for VPIDs are used only with the second, and the tag is one.
        let flushed = unsafe { invvpid(scope) };
        debug_assert!(flushed.is_ok());
    }

    /// Sets who owns which bits of CR0 and CR4, and which exceptions exit, in this form.
    fn write_form_masks(&mut self) {
        // Shadow tables follow from what is in these.
        let (cr0_own, cr4_of_tables) =
            if self.controls.shadow() { (CR0_OWN & !CR0_WP, CR4_OF_TABLES) } else { (CR0_OWN, 0) };
        (self.cr0_mask, self.cr4_mask) = match self.form {
            Form::Own => (!cr0_own, !self.cr4_allowed | CR4_MCE | CR4_VMXE | cr4_of_tables),
            Form::Unpaged => (!cr0_own, u64::MAX),
            Form::Vm86 => (u64::MAX, u64::MAX),
        };
        self.region.set(vmcs::CR0_MASK, self.cr0_mask);
        self.region.set(vmcs::CR4_MASK, self.cr4_mask);
        let page_fault = if self.controls.shadow() { EXCEPTION_PAGE_FAULT } else { 0 };
        let exceptions =
            if self.form == Form::Vm86 { u32::MAX } else { setup::INTERCEPTED_EXCEPTIONS | page_fault };
        self.region.set(vmcs::EXCEPTION_BITMAP, exceptions);
        // CPUs that cannot run CR3 accesses free have these bits fixed; then they exit in each form.
        let cr3 = CR3_EXITING - Primary::from_bits_retain(self.machine.capabilities.primary as u32);
        self.primary.set(cr3, self.form != Form::Own || self.controls.shadow());
    }

    /// Brings the VMCS into a form that can be entered; false if there is none.
    #[inline]
    fn settle_form(&mut self) -> bool {
        // What the guest itself makes of an enterable state is one.
        !self.unsettled || self.settle_restricted_form()
    }

    #[cold]
    #[inline(never)]
    fn settle_restricted_form(&mut self) -> bool {
        let state = self.state();
        let Some(form) = real_mode::form(&state) else { return false };
        if form != Form::Vm86 && self.is_refused(form, &state) {
            return false;
        }
        if form != self.form {
            self.write_state(form, &state);
        }
        self.unsettled = false;
        true
    }

    /// Whether an entry in this form would refuse the state, as it does between the switch to protected mode and the loads
    /// of segments that follow.
    fn is_refused(&self, form: Form, state: &CpuState) -> bool {
        let entered = CpuState {
            cr0: real_mode::cr0(state.cr0, form),
            cr4: real_mode::cr4(state.cr4, form),
            efer: real_mode::efer(state.efer, form),
            ..state.clone()
        };
        let capabilities = &self.machine.capabilities;
        let judged =
            GuestState::of_guest(&entered, capabilities, Interruptibility::empty(), Activity::Active);
        guest_state_error(&judged, capabilities, false).is_some()
    }

    /// Writes what was set since the last entry.
    #[inline(always)]
    fn write_back(&mut self, vmcs: Current) {
        if self.cache.is_dirty([Hot::Interruptibility, Hot::Rflags]) {
            self.settle_shadow();
        }
        self.cache.write_back(&vmcs);
        if self.primary != self.primary_written {
            vmcs.set(vmcs::PRIMARY_CONTROLS, self.primary.bits());
            self.primary_written = self.primary;
        }
        if self.secondary != self.secondary_written {
            setup::write_secondary(&self.region, self.machine, self.secondary);
            self.secondary_written = self.secondary;
        }
        if self.entry != self.entry_written {
            vmcs.set(vmcs::ENTRY_CONTROLS, self.entry.bits());
            self.entry_written = self.entry;
        }
        if self.injection.is_some() {
            self.write_injection(vmcs);
        }
        if self.gprs[gpr::RSP] != self.rsp {
            self.rsp = self.gprs[gpr::RSP];
            vmcs.set(vmcs::GUEST_RSP, self.rsp);
        }
    }

    #[inline(never)]
    fn write_injection(&mut self, vmcs: Current) {
        if let Some(event) = self.injection.take() {
            let (info, error) = event::encode(event, self.cr0_shadow & CR0_PE != 0);
            vmcs.set(vmcs::ENTRY_INTERRUPTION, info);
            vmcs.set(vmcs::ENTRY_EXCEPTION_ERROR, error);
        }
    }

    /// Makes the shadow and what is pending agree with RFLAGS, as entries demand (SDM vol. 3, 27.3.1.5).
    #[inline(never)]
    pub(super) fn settle_shadow(&mut self) {
        let rflags = self.cache.get(Hot::Rflags, &self.region);
        let mut state = self.interruptibility();
        if rflags & RFLAGS_IF == 0 {
            state.remove(Interruptibility::STI);
        }
        self.cache.set(Hot::Interruptibility, state.bits().into());
        let shadow = state.intersects(Interruptibility::STI | Interruptibility::MOV_SS);
        let step = if shadow && rflags & RFLAGS_TF != 0 { PENDING_STEP } else { 0 };
        let pending = self.region.read(vmcs::GUEST_PENDING_DEBUG);
        if shadow && pending & PENDING_STEP != step {
            self.region.set(vmcs::GUEST_PENDING_DEBUG, pending & !PENDING_STEP | step);
        }
    }

    /// Starts the VMX-preemption timer, if there is a deadline for it.
    #[inline(never)]
    fn start_timer(&mut self, vmcs: Current) {
        self.timer_runs = TIMER_RUNS - 1;
        let Some(deadline) = self.deadline else { return };
        let ticks =
            deadline.saturating_sub(tsc::read()) >> self.machine.capabilities.preemption_timer_shift();
        // One that is too far away expires early, and the caller sets it again.
        vmcs.set(vmcs::PREEMPTION_TIMER, ticks.min(u32::MAX.into()) as u32);
    }

    #[inline]
    pub(super) fn interruptibility(&self) -> Interruptibility {
        Interruptibility::from_bits_retain(self.cache.get(Hot::Interruptibility, &self.region) as u32)
    }

    pub(super) fn set_interruptibility(&mut self, state: Interruptibility) {
        self.cache.set(Hot::Interruptibility, state.bits().into());
    }

    /// Sets EFER and what depends on it.
    fn write_efer(&mut self, form: Form, efer: u64) {
        self.efer = efer;
        self.entry.set(EntryControls::IA32E_GUEST, efer & EFER_LMA != 0 && form == Form::Own);
        let no_execute = if self.controls.shadow() { EFER_NXE } else { 0 };
        let hardware = real_mode::efer(efer, form) | no_execute;
        if self.controls.entry.contains(EntryControls::LOAD_EFER) {
            self.region.set(vmcs::GUEST_EFER, hardware);
        }
        self.areas.set_guest(msr::EFER, hardware);
    }

    fn write_cr0(&mut self, form: Form, cr0: u64) {
        self.cr0_shadow = cr0;
        let machine = self.machine;
        let protect = if self.controls.shadow() { CR0_WP } else { 0 };
        let hardware = real_mode::cr0(cr0, form) & !CR0_CACHE | protect;
        self.cache
            .set(Hot::Cr0, cr0_for_hardware(hardware, &machine.capabilities, self.controls.unrestricted()));
        self.region.set(vmcs::CR0_SHADOW, cr0);
    }

    fn write_cr4(&mut self, form: Form, cr4: u64) {
        self.cr4_shadow = cr4;
        let host_mce = self.machine.host_cr4 & CR4_MCE;
        let mut hardware = real_mode::cr4(cr4, form) & !CR4_MCE | host_mce;
        if self.controls.shadow() {
            hardware = hardware & !CR4_PCIDE | CR4_PAE;
        }
        self.cache.set(Hot::Cr4, cr4_for_hardware(hardware, &self.machine.capabilities));
        self.region.set(vmcs::CR4_SHADOW, cr4);
    }

    fn write_segment(&mut self, index: usize, segment: &Segment) {
        let fields = &GUEST_SEGMENTS[index];
        self.region.set(fields.selector, segment.selector);
        self.region.set(fields.base, segment.base);
        self.region.set(fields.limit, segment.limit);
        self.write_rights(index, to_access_rights(segment));
    }

    fn write_rights(&mut self, index: usize, rights: u32) {
        if index == SegmentName::Cs as usize {
            self.cache.set(Hot::CsRights, rights.into());
        } else if index == SegmentName::Ss as usize {
            self.cache.set(Hot::SsRights, rights.into());
        } else {
            self.region.set(GUEST_SEGMENTS[index].access_rights, rights);
        }
    }

    /// A segment as the VMCS has it.
    fn read_segment(&self, index: usize) -> Segment {
        let fields = &GUEST_SEGMENTS[index];
        let rights = if index == SegmentName::Cs as usize {
            self.cache.get(Hot::CsRights, &self.region) as u32
        } else if index == SegmentName::Ss as usize {
            self.cache.get(Hot::SsRights, &self.region) as u32
        } else {
            self.region.read(fields.access_rights)
        };
        Segment {
            selector: self.region.read(fields.selector),
            attributes: from_access_rights(rights),
            limit: self.region.read(fields.limit),
            base: self.region.read(fields.base),
        }
    }

    /// Writes `state` in the form `form`.
    fn write_state(&mut self, form: Form, state: &CpuState) {
        self.form = form;
        self.write_form_masks();
        self.write_cr0(form, state.cr0);
        self.write_cr4(form, state.cr4);
        self.write_efer(form, state.efer);
        self.own_cr3 = state.cr3;
        if !self.controls.shadow() {
            let cr3 = if form == Form::Own { state.cr3 } else { real_mode::IDENTITY_TABLE };
            self.cache.set(Hot::Cr3, cr3);
        }
        self.registers.set_cr2(state.cr2);
        self.registers.set_dr6(state.dr6);
        self.cache.set(Hot::Dr7, state.dr7);
        self.cache.set(Hot::Rip, state.rip);
        self.region.set(vmcs::GUEST_GDTR_BASE, state.gdtr.base);
        self.region.set(vmcs::GUEST_GDTR_LIMIT, state.gdtr.limit.into());
        self.region.set(vmcs::GUEST_IDTR_BASE, state.idtr.base);
        self.region.set(vmcs::GUEST_IDTR_LIMIT, state.idtr.limit.into());
        self.write_segment(LDTR, &state.ldtr);
        if form == Form::Vm86 {
            self.real_attributes = state.segments.map(|segment| segment.attributes);
            self.real_tr = state.tr;
            self.real_iopl = state.rflags & real_mode::RFLAGS_IOPL;
            self.cache.set(Hot::Rflags, real_mode::to_vm86_flags(state.rflags));
            for (index, segment) in state.segments.iter().enumerate() {
                self.write_segment(index, segment);
                self.write_rights(index, real_mode::VM86_RIGHTS);
            }
            let task = Segment {
                selector: 8,
                attributes: 0,
                limit: real_mode::TASK_STATE_LIMIT,
                base: real_mode::TASK_STATE,
            };
            self.write_segment(TR, &task);
            self.write_rights(TR, real_mode::TASK_RIGHTS);
        } else {
            self.cache.set(Hot::Rflags, state.rflags);
            for (index, segment) in state.segments.iter().enumerate() {
                self.write_segment(index, segment);
            }
            self.write_segment(TR, &state.tr);
        }
    }

    /// The virtual-APIC page.
    #[inline]
    fn apic_page(&mut self) -> &mut ApicPage {
        // SAFETY: the frame is this vCPU's own, and stays so as long as it lives. It has the size and alignment of the type,
        // which takes any bytes. The processor touches it only while the guest runs, and then nobody has a reference.
        unsafe { &mut *mm::phys_to_virt(self.apic_page).cast::<ApicPage>() }
    }

    /// The register at `offset` of the virtual-APIC page.
    pub(super) fn apic_page_word(&self, offset: u16) -> u32 {
        let at = self.apic_page + u64::from(offset & 0xff0);
        // SAFETY: the page is ours, and the processor writes it only while the guest runs.
        unsafe { mm::phys_to_virt(at).cast::<u32>().read_volatile() }
    }

    /// The entry failed before the guest's state was looked at (SDM vol. 3, 27.2).
    #[cold]
    fn not_entered(&mut self, how: u64) -> Exit {
        if how == entry::FAILED_INVALID {
            return Exit::InvalidState("the processor has no current VMCS");
        }
        let number = self.region.read(vmcs::INSTRUCTION_ERROR);
        Exit::InvalidState(explain(&self.region, &self.machine.capabilities, Failure::Instruction(number)))
    }

    /// What the last exit tells.
    #[inline(always)]
    fn exit(&mut self, vmcs: Current) -> Exit {
        let reason = ExitReason(vmcs.read(vmcs::EXIT_REASON));
        if reason.entry_failed() {
            return self.entry_failed(reason);
        }
        self.region.set_launched();
        self.vectoring = vmcs.read(vmcs::IDT_VECTORING);
        decode::exit(self, vmcs, reason.basic())
    }

    /// The entry failed while the guest's state was loaded (SDM vol. 3, 27.8).
    #[cold]
    fn entry_failed(&mut self, reason: ExitReason) -> Exit {
        use super::exit::reason as basic;
        self.vectoring = 0;
        match reason.basic() {
            basic::ENTRY_MACHINE_CHECK => Exit::MachineCheck,
            basic::MSR_LOADING => Exit::InvalidState("an entry of the VM-entry MSR-load area was refused"),
            _ => Exit::InvalidState(explain(&self.region, &self.machine.capabilities, Failure::Exit(reason))),
        }
    }
}

impl Drop for VmxVcpu {
    fn drop(&mut self) {
        mm::free(self.apic_page, FrameSize::Size4K);
        if let Some(log) = self.dirty_log {
            mm::free(log, FrameSize::Size4K);
        }
    }
}

impl HwVcpu for VmxVcpu {
    fn keeps_pdptes(&self) -> bool {
        true
    }

    #[inline]
    fn gprs(&self) -> &[u64; 16] {
        &self.gprs
    }

    #[inline]
    fn gprs_mut(&mut self) -> &mut [u64; 16] {
        &mut self.gprs
    }

    type Ended = Exit;

    #[inline(always)]
    fn exit(&mut self, ended: Exit) -> Exit {
        ended
    }

    #[inline(always)]
    fn run(&mut self, cpu: usize) -> Exit {
        if !self.settle_form() {
            return Exit::Emulate;
        }
        // SAFETY: `cpu` is this CPU, and interrupts are off until this returns; nothing here touches another region.
        let vmcs = unsafe { self.region.current_on(cpu) };
        // SAFETY: the trait's contract: `cpu` is this CPU, and interrupts are off.
        let enabled = unsafe {
            with_this_cpu(cpu, |state| {
                if self.cpu != cpu || self.flush || !state.vpids.is_current(self.tag) {
                    self.retag(cpu, &mut state.vpids);
                }
            })
        };
        if enabled.is_none() {
            return Exit::InvalidState("VMX is not enabled on this CPU");
        }
        self.write_back(vmcs);
        if self.timer_runs == 0 {
            self.start_timer(vmcs);
        } else {
            self.timer_runs -= 1;
        }
        if !self.region.launched() {
            spoil::apply(&self.region);
        }
        // SAFETY: VMX is on, since this CPU has its state; callers keep interrupts off; the VMCS is whole, current and has this
        // CPU's state as the host's (`retag`); its tables and bitmaps are this guest's; what was asked for was flushed.
        let how = unsafe { entry::enter(&raw mut self.gprs, self.region.launched()) };
        self.cache.forget();
        if how != entry::EXITED {
            return self.not_entered(how);
        }
        self.rsp = vmcs.read(vmcs::GUEST_RSP);
        self.gprs[gpr::RSP] = self.rsp;
        self.exit(vmcs)
    }

    #[inline]
    fn rip(&self) -> u64 {
        self.cache.get(Hot::Rip, &self.region)
    }
    #[inline]
    fn set_rip(&mut self, rip: u64) {
        self.cache.set(Hot::Rip, rip);
    }
    #[inline]
    fn rflags(&self) -> u64 {
        let rflags = self.cache.get(Hot::Rflags, &self.region);
        if self.form == Form::Vm86 {
            return real_mode::from_vm86_flags(rflags, self.real_iopl);
        }
        rflags
    }
    fn set_rflags(&mut self, rflags: u64) {
        if self.form == Form::Vm86 {
            self.real_iopl = rflags & real_mode::RFLAGS_IOPL;
            self.cache.set(Hot::Rflags, real_mode::to_vm86_flags(rflags));
        } else {
            self.cache.set(Hot::Rflags, rflags);
        }
    }
    #[inline]
    fn cr0(&self) -> u64 {
        self.cache.get(Hot::Cr0, &self.region) & !self.cr0_mask | self.cr0_shadow & self.cr0_mask
    }
    fn set_cr0(&mut self, cr0: u64) {
        const MODE: u64 = CR0_PE | CR0_PG;
        if (cr0 ^ self.cr0_shadow) & MODE != 0 && !self.controls.unrestricted() {
            let state = CpuState { cr0, ..self.state() };
            self.set_state(&state);
        } else {
            self.write_cr0(self.form, cr0);
        }
    }
    fn set_write_protection(&mut self, cr0: u64) {
        // The processor's CR0.WP is always set, and the guest's own bits are where they were.
        self.cr0_shadow = cr0;
        self.region.set(vmcs::CR0_SHADOW, cr0);
    }
    fn cr2(&self) -> u64 {
        self.registers.cr2()
    }
    fn pdptes(&self) -> Option<[u64; 4]> {
        let paged = self.cr0_shadow & CR0_PG != 0 && self.cr4() & CR4_PAE != 0 && self.efer & EFER_LMA == 0;
        if self.controls.shadow() {
            return paged.then_some(self.pdptes);
        }
        paged.then(|| {
            [vmcs::GUEST_PDPTE_0, vmcs::GUEST_PDPTE_1, vmcs::GUEST_PDPTE_2, vmcs::GUEST_PDPTE_3]
                .map(|field| self.region.read(field))
        })
    }
    fn set_pdptes(&mut self, pdptes: [u64; 4]) {
        if self.controls.shadow() {
            self.pdptes = pdptes;
            return;
        }
        let fields = [vmcs::GUEST_PDPTE_0, vmcs::GUEST_PDPTE_1, vmcs::GUEST_PDPTE_2, vmcs::GUEST_PDPTE_3];
        for (field, pdpte) in fields.into_iter().zip(pdptes) {
            self.region.set(field, pdpte);
        }
    }
    fn set_cr2(&mut self, cr2: u64) {
        self.registers.set_cr2(cr2);
    }
    #[inline]
    fn cr3(&self) -> u64 {
        if self.form == Form::Own && !self.controls.shadow() {
            self.cache.get(Hot::Cr3, &self.region)
        } else {
            self.own_cr3
        }
    }
    fn set_cr3(&mut self, cr3: u64) {
        self.own_cr3 = cr3;
        if self.form == Form::Own && !self.controls.shadow() {
            self.cache.set(Hot::Cr3, cr3);
        }
    }
    #[inline]
    fn cr4(&self) -> u64 {
        self.cache.get(Hot::Cr4, &self.region) & !self.cr4_mask | self.cr4_shadow & self.cr4_mask
    }
    fn set_cr4(&mut self, cr4: u64) {
        self.write_cr4(self.form, cr4);
    }
    #[inline]
    fn cr8(&self) -> u8 {
        if !self.primary.contains(Primary::TPR_SHADOW) {
            return self.cr8;
        }
        // SAFETY: the page is ours, and the processor writes it only while the guest runs.
        let tpr = unsafe { mm::phys_to_virt(self.apic_page + APIC_PAGE_TPR).read_volatile() };
        tpr >> 4
    }
    #[inline]
    fn set_cr8(&mut self, tpr: u8) {
        self.cr8 = tpr & 0xf;
        // SAFETY: as in `cr8`.
        unsafe { mm::phys_to_virt(self.apic_page + APIC_PAGE_TPR).write_volatile(self.cr8 << 4) };
    }
    #[inline]
    fn efer(&self) -> u64 {
        self.efer
    }
    fn set_efer(&mut self, efer: u64) {
        self.write_efer(self.form, efer);
    }
    fn dr6(&self) -> u64 {
        self.registers.dr6()
    }
    fn set_dr6(&mut self, dr6: u64) {
        self.registers.set_dr6(dr6);
    }
    fn dr7(&self) -> u64 {
        self.cache.get(Hot::Dr7, &self.region)
    }
    #[inline]
    fn cpl(&self) -> u8 {
        if self.cr0_shadow & CR0_PE == 0 {
            return 0;
        }
        // SS.DPL is the CPL in each mode, bits 6:5.
        (self.cache.get(Hot::SsRights, &self.region) >> 5 & 3) as u8
    }
    #[inline]
    fn segment(&self, name: SegmentName) -> Segment {
        let mut segment = self.read_segment(name as usize);
        if self.form == Form::Vm86 {
            segment.attributes = self.real_attributes[name as usize];
        }
        segment
    }
    #[inline]
    fn cs_attributes(&self) -> u16 {
        if self.form == Form::Vm86 {
            return self.real_attributes[SegmentName::Cs as usize];
        }
        from_access_rights(self.cache.get(Hot::CsRights, &self.region) as u32)
    }
    #[inline]
    fn prepare_emulation(&mut self) {
        // SAFETY: interrupts are off while a vCPU is run, and nothing here touches another region.
        let vmcs = unsafe { self.region.current() };
        self.cache.fill(AT_COMPLETION, &vmcs);
        self.cache.fill(IN_EMULATION, &vmcs);
    }
    #[inline]
    fn switched_msr(&self, msr: u32) -> Option<u64> {
        match msr {
            0x174 => Some(self.region.read(vmcs::GUEST_SYSENTER_CS).into()),
            0x175 => Some(self.region.read(vmcs::GUEST_SYSENTER_ESP)),
            0x176 => Some(self.region.read(vmcs::GUEST_SYSENTER_EIP)),
            0xc000_0100 => Some(self.region.read(vmcs::GUEST_FS_BASE)),
            0xc000_0101 => Some(self.region.read(vmcs::GUEST_GS_BASE)),
            0xc000_0081..=0xc000_0102 => self.registers.msr(msr),
            _ => None,
        }
    }
    #[inline]
    fn set_switched_msr(&mut self, msr: u32, value: u64) -> bool {
        match msr {
            0x174 => self.region.set(vmcs::GUEST_SYSENTER_CS, value as u32),
            0x175 => self.region.set(vmcs::GUEST_SYSENTER_ESP, value),
            0x176 => self.region.set(vmcs::GUEST_SYSENTER_EIP, value),
            0xc000_0100 => self.region.set(vmcs::GUEST_FS_BASE, value),
            0xc000_0101 => self.region.set(vmcs::GUEST_GS_BASE, value),
            0xc000_0081..=0xc000_0102 => return self.registers.set_msr(msr, value),
            _ => return false,
        }
        true
    }
    fn set_pat(&mut self, pat: u64) {
        // Shadow tables are made for the usual types, and the guest's own have no say there.
        let pat = if self.controls.shadow() { PAT_RESET } else { pat };
        if self.controls.entry.contains(EntryControls::LOAD_PAT) {
            self.region.set(vmcs::GUEST_PAT, pat);
        }
        self.areas.set_guest(msr::PAT, pat);
    }
    fn set_tsc_offset(&mut self, offset: u64) {
        self.region.set(vmcs::TSC_OFFSET, offset);
    }

    fn state(&self) -> CpuState {
        use SegmentName::{Cs, Ds, Es, Fs, Gs, Ss};
        let table = |base, limit: u32| TableRegister { base, limit: limit as u16 };
        CpuState {
            segments: [Es, Cs, Ss, Ds, Fs, Gs].map(|name| self.segment(name)),
            ldtr: self.read_segment(LDTR),
            tr: if self.form == Form::Vm86 { self.real_tr } else { self.read_segment(TR) },
            gdtr: table(self.region.read(vmcs::GUEST_GDTR_BASE), self.region.read(vmcs::GUEST_GDTR_LIMIT)),
            idtr: table(self.region.read(vmcs::GUEST_IDTR_BASE), self.region.read(vmcs::GUEST_IDTR_LIMIT)),
            cr0: self.cr0(),
            cr2: self.cr2(),
            cr3: self.cr3(),
            cr4: self.cr4(),
            efer: self.efer,
            dr6: self.dr6(),
            dr7: self.dr7(),
            rflags: self.rflags(),
            rip: self.rip(),
        }
    }

    fn set_state(&mut self, state: &CpuState) {
        // Not necessarily a form that can be entered: `settle_form` finds that.
        self.write_state(Form::Own, state);
        self.unsettled = !self.controls.unrestricted();
        self.flush = true;
    }

    fn load_state(&mut self, state: &CpuState) {
        self.set_state(state);
        self.set_interruptibility(Interruptibility::empty());
        self.region.set(vmcs::GUEST_PENDING_DEBUG, 0);
        self.injection = None;
        self.vectoring = 0;
        self.primary.remove(Primary::INTERRUPT_WINDOW_EXITING | Primary::NMI_WINDOW_EXITING);
    }

    fn switch_in(&mut self) {
        self.registers.load();
    }
    fn switch_out(&mut self) {
        self.registers.save();
    }

    fn exit_insn_bytes(&self) -> &[u8] {
        &[]
    }

    #[inline]
    fn exit_next_rip(&self) -> Option<u64> {
        (self.length != 0).then(|| self.rip().wrapping_add(self.length))
    }

    #[inline]
    fn interrupts_open(&self) -> bool {
        self.cache.get(Hot::Rflags, &self.region) & RFLAGS_IF != 0
            && !self.in_shadow()
            && self.injection.is_none()
    }
    #[inline]
    fn in_shadow(&self) -> bool {
        self.interruptibility().intersects(Interruptibility::STI | Interruptibility::MOV_SS)
    }
    fn restore_shadow(&mut self) {
        // The shadow of STI needs IF set; that of MOV SS holds back the same, and more.
        let open = self.cache.get(Hot::Rflags, &self.region) & RFLAGS_IF != 0;
        let shadow = if open { Interruptibility::STI } else { Interruptibility::MOV_SS };
        let others = self.interruptibility() - (Interruptibility::STI | Interruptibility::MOV_SS);
        self.set_interruptibility(others | shadow);
    }
    #[inline]
    fn clear_shadow(&mut self) {
        let state = self.interruptibility();
        let shadow = Interruptibility::STI | Interruptibility::MOV_SS;
        if state.intersects(shadow) {
            self.set_interruptibility(state - shadow);
        }
    }
    #[inline]
    fn inject(&mut self, event: Event) {
        self.injection = Some(event);
    }
    #[inline]
    fn injecting(&self) -> bool {
        self.injection.is_some()
    }
    #[inline]
    fn take_undeliverable(&mut self) -> Option<Event> {
        if self.injection.is_none() || self.controls.unrestricted() {
            return None;
        }
        let by_hardware = self.cr0_shadow & CR0_PE != 0 && self.settle_form();
        if by_hardware {
            return None;
        }
        let event = self.injection.take();
        if matches!(event, Some(Event::Exception(1, _))) {
            // The step that is delivered now is not pending any more.
            self.region.set(vmcs::GUEST_PENDING_DEBUG, 0);
        }
        event
    }
    #[inline]
    fn take_interrupted_event(&mut self) -> Option<Event> {
        if self.vectoring & event::VALID == 0 {
            return None;
        }
        let error = self.region.read(vmcs::IDT_VECTORING_ERROR);
        let event = interrupted_event(core::mem::take(&mut self.vectoring), error);
        if event == Some(Event::Nmi) {
            self.set_nmis_blocked(false);
        }
        event
    }
    #[inline]
    fn request_interrupt_window(&mut self, on: bool) {
        self.primary.set(Primary::INTERRUPT_WINDOW_EXITING, on);
    }
    #[inline]
    fn nmis_blocked(&self) -> bool {
        self.interruptibility().contains(Interruptibility::NMI)
    }
    fn set_nmis_blocked(&mut self, blocked: bool) {
        let mut state = self.interruptibility();
        state.set(Interruptibility::NMI, blocked);
        self.set_interruptibility(state);
    }
    #[inline]
    fn request_nmi_window(&mut self, on: bool) {
        // In the shadow of STI the window counts as open (SDM vol. 3, 26.2), but an NMI may not be injected there (27.3.1.5). The
        // caller looks again soon after a shadow.
        let in_shadow = self.interruptibility().contains(Interruptibility::STI);
        self.primary.set(Primary::NMI_WINDOW_EXITING, on && !in_shadow);
    }
    #[inline]
    fn intercept_cr8_writes(&mut self, on: bool) {
        let always = !self.primary.contains(Primary::TPR_SHADOW);
        self.primary.set(Primary::CR8_LOAD_EXITING, on || always);
    }
    fn set_deadline(&mut self, tsc: u64) -> bool {
        if !self.controls.preemption_timer {
            return false;
        }
        // A timer that may count at a wrong rate ends runs early, or late: the other timer must be there, too.
        let reliable = self.machine.timer_is_reliable;
        if self.deadline.is_none() {
            self.pin.insert(Pin::PREEMPTION_TIMER);
            self.region.set(vmcs::PIN_CONTROLS, self.pin.bits());
            let exit = self.controls.exit | ExitControls::SAVE_PREEMPTION_TIMER;
            self.region.set(vmcs::EXIT_CONTROLS, exit.bits());
        }
        self.deadline = Some(tsc);
        self.timer_runs = 0;
        reliable
    }

    #[inline]
    fn has_virtual_apic(&self) -> bool {
        self.virtual_apic
    }
    fn lend_apic(&mut self, apic: &LocalApic) {
        let exported = apic.export(self.apic_page());
        // Requesting virtual interrupt below, servicing virtual interrupt above (SDM vol. 3, 25.4.2).
        let status = u16::from_le_bytes([exported.requested, exported.in_service]);
        self.region.set(vmcs::GUEST_INTERRUPT_STATUS, status);
        if self.eoi_exits != Some(exported.level) {
            self.eoi_exits = Some(exported.level);
            let fields = [
                vmcs::EOI_EXIT_BITMAP_0,
                vmcs::EOI_EXIT_BITMAP_1,
                vmcs::EOI_EXIT_BITMAP_2,
                vmcs::EOI_EXIT_BITMAP_3,
            ];
            for (field, vectors) in fields.into_iter().zip(exported.level.0) {
                self.region.set(field, vectors);
            }
        }
        self.secondary.insert(APIC_VIRTUALIZATION);
    }
    fn reclaim_apic(&mut self, apic: &mut LocalApic) {
        apic.import(self.apic_page());
        self.secondary.remove(APIC_VIRTUALIZATION);
    }

    fn set_dirty_log(&mut self, on: bool) -> bool {
        if !self.machine.can_log_dirty_pages(self.controls) {
            return false;
        }
        if on && self.dirty_log.is_none() {
            let Some(log) = mm::alloc_zeroed(FrameSize::Size4K, Zone::Any) else { return false };
            setup::write_dirty_log(&self.region, log);
            self.dirty_log = Some(log);
        }
        self.secondary.set(Secondary::PAGE_MODIFICATION_LOG, on);
        if !on {
            if let Some(log) = self.dirty_log.take() {
                // The control is off before the next entry, so the processor writes there no more.
                mm::free(log, FrameSize::Size4K);
            }
        }
        true
    }
    fn drain_dirty_log(&mut self, each: &mut impl FnMut(u64)) {
        let Some(log) = self.dirty_log else { return };
        let entry = |slot: usize| {
            // SAFETY: the page is ours and has 512 entries; the processor writes it only while the guest runs.
            unsafe { mm::phys_to_virt(log).cast::<u64>().add(slot % dirty_log::ENTRIES).read_volatile() }
        };
        let index = self.region.read(vmcs::PML_INDEX);
        if index != dirty_log::EMPTY {
            self.region.set(vmcs::PML_INDEX, dirty_log::EMPTY);
            dirty_log::drain(index, entry, each);
        }
    }

    fn set_root(&mut self, root: u64) {
        if self.controls.shadow() {
            self.cache.set(Hot::Cr3, root);
            return;
        }
        self.eptp = self.vmx.eptp(root);
        self.region.set(vmcs::EPT_POINTER, self.eptp);
        self.flush = true;
    }
    fn flush_page(&mut self, linear: u64) {
        let tagged = self.controls.secondary.contains(Secondary::VPID);
        if tagged && !self.flush {
            if self.machine.capabilities.ept_vpid.contains(EptVpid::INVVPID_ADDRESS) && self.tag.number != 0 {
                // SAFETY: a vCPU is run where VMX is on, and the CPU has that kind of INVVPID. It fails for an address that is
                // not canonical, and of those there are no translations. If the tag is another vCPU's by now, that one walks
                // its tables once more.
                let _ = unsafe { invvpid(InvvpidScope::Address(self.tag.number as u16, linear)) };
            } else {
                self.flush = true;
            }
        }
    }
    fn flush_tlb(&mut self) {
        self.flush = true;
    }
}
