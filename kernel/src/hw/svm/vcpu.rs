//! A vCPU under SVM: its VMCB, the registers that the VMCB does not hold, its TLB tag.
#![allow(unsafe_code)] // The VMCB is shared with the processor, and entering a guest is unsafe.

use super::cpu::{with_this_cpu, Svm, SvmCpu};
use super::entry;
use super::exit::{
    code, decode, encode_event, interrupted_event, task_switch, EVENT_VALID, INTERCEPTED_EXCEPTIONS,
};
use super::nmi::NmiBlock;
use super::vmcb::{Intercepts, TlbControl, Vmcb, VmcbSegment};
use crate::hw::shadowed::ControlRegisters;
use crate::hw::tag::Tag;
use crate::hw::{
    gpr, CpuState, Event, Exit, HwVcpu, OutOfMemory, Segment, SegmentName, TableRegister, TaskSwitch,
    TaskSwitchCause, Translation,
};
use crate::mm::{self, FrameSize, Zone};
use crate::vm::control_regs::{CR0_WP, CR4_PGE};
use core::ptr::NonNull;
use x86_64::PhysAddr;

/// EFER.SVME, always set while a guest runs and never shown to it (APM 15.5.1).
const EFER_SVME: u64 = 1 << 12;
const RFLAGS_IF: u64 = 1 << 9;
/// SYSENTER_CS, the lowest MSR that VMLOAD and VMSAVE move.
const FIRST_SWITCHED_MSR: u32 = 0x174;
/// Bits in the sets of intercepted accesses to control registers.
const CR0: u16 = 1 << 0;
const CR3: u16 = 1 << 3;
const CR4: u16 = 1 << 4;
const CR8: u16 = 1 << 8;
/// #PF in the set of intercepted exceptions.
const PAGE_FAULT: u32 = 1 << 14;
/// INVPCID in word 5 of the intercepts. APM table B-1.
const INVPCID: u32 = 1 << 2;

/// The exit's code and information.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    code: u64,
    info_1: u64,
    info_2: u64,
}

/// No CPU's epoch.
const UNSETTLED: u64 = u64::MAX;

/// A vCPU under SVM.
#[derive(Debug)]
pub struct SvmVcpu {
    gprs: [u64; 16],
    /// Points to the VMCB through the physical map; owned.
    vmcb: NonNull<Vmcb>,
    vmcb_pa: PhysAddr,
    svm: Svm,
    /// Index of the CPU it last ran on, whose caches may hold its state.
    cpu: usize,
    tag: Tag,
    /// The [epoch](SvmCpu::epoch) that the tag is good in; [`UNSETTLED`] if something has to be flushed first.
    settled: u64,
    nmi: NmiBlock,
    /// Where the guest's control registers are: in the VMCB, or, if shadows translate, in a page of the same layout that no
    /// processor sees. So reading one costs the same in both cases.
    own: NonNull<Vmcb>,
    /// That page: the control registers of the VMCB follow from those in it.
    shadowed: Option<PhysAddr>,
    /// The guest's PDPTE registers in that case.
    pdptes: [u64; 4],
    /// Times that the control registers were changed in that case.
    changes: u64,
}

// SAFETY: the VMCB belongs to this vCPU alone, wherever it runs.
unsafe impl Send for SvmVcpu {}

impl SvmVcpu {
    pub(super) fn new(svm: Svm, translation: Translation) -> Result<Self, OutOfMemory> {
        let vmcb_pa = mm::alloc(FrameSize::Size4K, Zone::Any).ok_or(OutOfMemory)?;
        let vmcb = NonNull::new(mm::phys_to_virt(vmcb_pa).cast::<Vmcb>()).ok_or(OutOfMemory)?;
        // SAFETY: the frame is ours, page-aligned, and all zeroes is a valid VMCB.
        unsafe { mm::phys::zero(vmcb_pa, 4096) };
        let (mut own, mut shadowed) = (vmcb, None);
        if translation == Translation::Shadow {
            let Some(page) = mm::alloc_zeroed(FrameSize::Size4K, Zone::Any) else {
                mm::free(vmcb_pa, FrameSize::Size4K);
                return Err(OutOfMemory);
            };
            own = NonNull::new(mm::phys_to_virt(page).cast::<Vmcb>()).ok_or(OutOfMemory)?;
            shadowed = Some(page);
        }
        let mut vcpu = Self {
            gprs: [0; 16],
            vmcb,
            vmcb_pa,
            svm,
            cpu: usize::MAX,
            tag: Tag::default(),
            settled: UNSETTLED,
            nmi: NmiBlock::default(),
            own,
            shadowed,
            pdptes: [0; 4],
            changes: 0,
        };
        let vmcb = vcpu.vmcb_mut();
        vmcb.set_intercepts(
            Intercepts::INTR
                | Intercepts::NMI
                | Intercepts::SMI
                | Intercepts::INIT
                | Intercepts::RDPMC
                | Intercepts::CPUID
                | Intercepts::RSM
                | Intercepts::INVD
                | Intercepts::WBINVD
                | Intercepts::HLT
                | Intercepts::INVLPGA
                | Intercepts::IO
                | Intercepts::MSR
                | Intercepts::FERR_FREEZE
                | Intercepts::SHUTDOWN
                | Intercepts::VMRUN
                | Intercepts::VMMCALL
                | Intercepts::VMLOAD
                | Intercepts::VMSAVE
                | Intercepts::STGI
                | Intercepts::CLGI
                | Intercepts::SKINIT
                | Intercepts::MONITOR
                | Intercepts::MWAIT
                | Intercepts::XSETBV
                | Intercepts::RDPRU,
        );
        vmcb.set_exceptions(INTERCEPTED_EXCEPTIONS);
        if svm.pause_filter {
            // A spinning guest exits after 3,000 PAUSEs that follow each other within 128 cycles.
            vmcb.set_pause_filter(3_000, 128);
            vmcb.intercept(Intercepts::PAUSE, true);
        }
        vmcb.set_permission_maps(svm.iopm.as_u64(), svm.msrpm.as_u64());
        vmcb.enable_interrupt_masking();
        vmcb.set_g_pat(0x0007_0406_0007_0406);
        match translation {
            Translation::TwoStages(root) => {
                vmcb.enable_nested_paging();
                vmcb.set_n_cr3(root);
            }
            Translation::Shadow => vcpu.intercept_translation(),
        }
        vcpu.load_state(&CpuState::reset());
        Ok(vcpu)
    }

    #[inline]
    fn vmcb(&self) -> &Vmcb {
        // SAFETY: the pointer is to our own page, valid while `self` lives; the processor writes it only
        // inside `run`, which holds `&mut self`.
        unsafe { self.vmcb.as_ref() }
    }

    /// What has the guest's control registers.
    #[inline]
    fn own(&self) -> &Vmcb {
        // SAFETY: as in `vmcb`; no processor writes the page, if it is another.
        unsafe { self.own.as_ref() }
    }

    #[inline]
    fn vmcb_mut(&mut self) -> &mut Vmcb {
        // SAFETY: as in `vmcb`, and `&mut self` makes the reference unique.
        unsafe { self.vmcb.as_mut() }
    }

    /// Makes everything exit that tells the guest's tables or asks for their translations.
    fn intercept_translation(&mut self) {
        let invpcid = self.svm.invpcid;
        let vmcb = self.vmcb_mut();
        vmcb.set_exceptions(vmcb.exceptions() | PAGE_FAULT);
        vmcb.set_cr_writes(vmcb.cr_writes() | CR0 | CR3 | CR4);
        // A task switch loads CR3.
        vmcb.intercept(Intercepts::INVLPG | Intercepts::TASK_SWITCH, true);
        if invpcid {
            vmcb.set_more_intercepts(INVPCID);
        }
    }

    /// What the guest wrote to its control registers.
    fn controls(&self) -> ControlRegisters {
        ControlRegisters { cr0: self.cr0(), cr3: self.cr3(), cr4: self.cr4(), efer: self.efer() }
    }

    /// What has the guest's control registers, to be changed where shadows translate.
    #[inline]
    fn own_mut(&mut self) -> &mut Vmcb {
        debug_assert!(self.shadowed.is_some());
        // SAFETY: as in `own`, and `&mut self` makes the reference unique: in a vCPU whose addresses shadows translate it is
        // not the VMCB.
        unsafe { self.own.as_mut() }
    }

    /// Changes the guest's control registers where shadows translate: `change` gets them.
    fn change_controls(&mut self, change: impl FnOnce(&mut ControlRegisters)) {
        let mut guest = self.controls();
        change(&mut guest);
        self.changes += 1;
        let own = self.own_mut();
        own.set_cr0(guest.cr0);
        own.set_cr3(guest.cr3);
        own.set_cr4(guest.cr4);
        own.set_efer(guest.efer);
        let vmcb = self.vmcb_mut();
        let given = guest.for_processor(vmcb.cr3());
        vmcb.set_cr0(given.cr0);
        vmcb.set_cr4(given.cr4);
        vmcb.set_efer(given.efer | EFER_SVME);
        let differs = |bit, ours, theirs| if ours == theirs { 0 } else { bit };
        let reads = CR3 | differs(CR0, given.cr0, guest.cr0) | differs(CR4, given.cr4, guest.cr4);
        if vmcb.cr_reads() != reads {
            vmcb.set_cr_reads(reads);
        }
    }

    /// What EXITINTINFO adds to a task switch: it was an event's, through a task gate. What hardware delivers returns to the
    /// instruction itself, INT n, INT3 and INTO behind it.
    #[cold]
    fn task_switch(&self, info_1: u64, info_2: u64) -> Exit {
        let switch = task_switch(info_1, info_2);
        let info = self.vmcb().control.exit_int_info;
        if info & EVENT_VALID == 0 {
            return Exit::TaskSwitch(switch);
        }
        let next_rip = interrupted_event(info).map(|_| self.rip());
        Exit::TaskSwitch(TaskSwitch { cause: TaskSwitchCause::Gate, next_rip, ..switch })
    }

    /// Makes every write of CR4 exit: this CPU has bits of it that the guest may not set.
    pub(super) fn intercept_cr4_writes(&mut self) {
        let vmcb = self.vmcb_mut();
        vmcb.set_cr_writes(vmcb.cr_writes() | CR4);
    }

    /// Whether an exit was about the end of an NMI handler and nothing else.
    #[cold]
    fn ended_nmi_handler(&mut self, exit_code: u64) -> bool {
        let mut nmi = self.nmi;
        let vmcb = self.vmcb_mut();
        let ended = if exit_code == u64::from(code::IRET) {
            nmi = NmiBlock::at_iret(vmcb);
            true
        } else {
            exit_code == u64::from(code::DEBUG) && nmi.swallows_debug(vmcb)
        };
        self.nmi = nmi;
        ended
    }

    /// Moves to this CPU, or flushes the tag, or takes a new one; false if no guest can run here.
    #[cold]
    #[inline(never)]
    fn settle(&mut self, cpu: usize, state: &mut SvmCpu) -> bool {
        if self.cpu != cpu {
            if state.host_state.is_null() {
                return false;
            }
            self.cpu = cpu;
            self.tag = Tag::default();
            self.vmcb_mut().mark_all_dirty();
        }
        if self.svm.flush_by_asid && state.asids.is_current(self.tag) {
            self.vmcb_mut().control.tlb_control = TlbControl::ThisGuest as u8;
        } else {
            let allocation = state.allocate(cpu);
            self.tag = allocation.tag;
            let vmcb = self.vmcb_mut();
            vmcb.set_asid(allocation.tag.number);
            if allocation.flush_all {
                vmcb.control.tlb_control = TlbControl::All as u8;
            }
        }
        self.settled = state.epoch;
        true
    }
}

impl Drop for SvmVcpu {
    fn drop(&mut self) {
        mm::free(self.vmcb_pa, FrameSize::Size4K);
        if let Some(page) = self.shadowed {
            mm::free(page, FrameSize::Size4K);
        }
    }
}

fn to_vmcb(segment: Segment) -> VmcbSegment {
    let Segment { selector, attributes, limit, base } = segment;
    VmcbSegment { selector, attrib: attributes, limit, base }
}

fn from_vmcb(segment: VmcbSegment) -> Segment {
    let VmcbSegment { selector, attrib, limit, base } = segment;
    Segment { selector, attributes: attrib, limit, base }
}

fn table_to_vmcb(table: TableRegister) -> VmcbSegment {
    VmcbSegment { limit: u32::from(table.limit), base: table.base, ..VmcbSegment::default() }
}

fn table_from_vmcb(table: VmcbSegment) -> TableRegister {
    TableRegister { base: table.base, limit: table.limit as u16 }
}

impl HwVcpu for SvmVcpu {
    fn keeps_pdptes(&self) -> bool {
        self.shadowed.is_some()
    }

    #[inline]
    fn gprs(&self) -> &[u64; 16] {
        &self.gprs
    }

    #[inline]
    fn gprs_mut(&mut self) -> &mut [u64; 16] {
        &mut self.gprs
    }

    type Ended = Ended;

    #[inline(always)]
    fn run(&mut self, cpu: usize) -> Ended {
        // SAFETY: the trait's contract: `cpu` is this CPU, and interrupts are off.
        let host = unsafe {
            with_this_cpu(cpu, |state| {
                (self.settled == state.epoch || self.settle(cpu, state)).then_some(state.host_state)
            })
        };
        let Some(host) = host.flatten() else {
            return Ended { code: code::NOT_ENABLED.into(), info_1: 0, info_2: 0 };
        };
        let (rax, rsp) = (self.gprs[gpr::RAX], self.gprs[gpr::RSP]);
        let save = &mut self.vmcb_mut().save;
        save.rax = rax;
        save.rsp = rsp;
        // SAFETY: SVM is enabled here, since this CPU has its state; callers keep interrupts off; the VMCB, its
        // tables and maps are this guest's; the tag was flushed as `settle` says.
        unsafe { entry::enter(&raw mut self.gprs, self.vmcb_pa.as_u64(), host.as_u64()) };
        let vmcb = self.vmcb_mut();
        vmcb.mark_all_clean();
        vmcb.control.event_inj = 0;
        vmcb.control.tlb_control = TlbControl::Nothing as u8;
        let (rax, rsp) = (vmcb.save.rax, vmcb.save.rsp);
        let control = &vmcb.control;
        let ended =
            Ended { code: control.exit_code, info_1: control.exit_info_1, info_2: control.exit_info_2 };
        self.gprs[gpr::RAX] = rax;
        self.gprs[gpr::RSP] = rsp;
        ended
    }

    #[inline(always)]
    fn exit(&mut self, ended: Ended) -> Exit {
        let Ended { code, info_1, info_2 } = ended;
        // Comparisons of what `decode` looks at become part of its table.
        match code as u32 {
            code::IRET | code::DEBUG if self.nmi != NmiBlock::Open && self.ended_nmi_handler(code) => {
                Exit::NmiWindow
            }
            code::TASK_SWITCH => self.task_switch(info_1, info_2),
            _ => decode(code, info_1, info_2),
        }
    }

    #[inline]
    fn rip(&self) -> u64 {
        self.vmcb().save.rip
    }
    #[inline]
    fn set_rip(&mut self, rip: u64) {
        self.vmcb_mut().save.rip = rip;
    }
    #[inline]
    fn rflags(&self) -> u64 {
        self.vmcb().save.rflags
    }
    fn set_rflags(&mut self, rflags: u64) {
        self.vmcb_mut().save.rflags = rflags;
    }
    #[inline]
    fn cr0(&self) -> u64 {
        self.own().cr0()
    }
    fn set_cr0(&mut self, cr0: u64) {
        match self.shadowed {
            Some(_) => self.change_controls(|guest| guest.cr0 = cr0),
            None => self.vmcb_mut().set_cr0(cr0),
        }
    }
    #[inline]
    fn control_stamp(&self) -> u64 {
        self.changes
    }
    #[inline]
    fn set_write_protection(&mut self, cr0: u64) {
        self.own_mut().set_cr0(cr0);
        // The processor's CR0.WP is always set: where the guest's is not, reads have to be told.
        let vmcb = self.vmcb_mut();
        let told = if cr0 & CR0_WP == 0 { CR0 } else { 0 };
        vmcb.set_cr_reads(vmcb.cr_reads() & !CR0 | told);
    }
    fn cr2(&self) -> u64 {
        self.vmcb().cr2()
    }
    fn pdptes(&self) -> Option<[u64; 4]> {
        (self.shadowed.is_some() && self.controls().uses_pdptes()).then_some(self.pdptes)
    }
    fn set_pdptes(&mut self, pdptes: [u64; 4]) {
        self.pdptes = pdptes;
    }
    fn set_cr2(&mut self, cr2: u64) {
        self.vmcb_mut().set_cr2(cr2);
        entry::set_cr2(cr2);
    }
    #[inline]
    fn cr3(&self) -> u64 {
        self.own().cr3()
    }
    fn set_cr3(&mut self, cr3: u64) {
        match self.shadowed {
            // The processor is given another, whatever this one is.
            Some(_) => self.own_mut().set_cr3(cr3),
            None => self.vmcb_mut().set_cr3(cr3),
        }
    }
    #[inline]
    fn cr4(&self) -> u64 {
        self.own().cr4()
    }
    fn set_cr4(&mut self, cr4: u64) {
        match self.shadowed {
            Some(_) => self.change_controls(|guest| guest.cr4 = cr4),
            None => self.vmcb_mut().set_cr4(cr4),
        }
    }
    #[inline]
    fn set_global_pages(&mut self, cr4: u64) {
        self.own_mut().set_cr4(cr4);
        // The processor has the same bit.
        let vmcb = self.vmcb_mut();
        vmcb.set_cr4(vmcb.cr4() & !CR4_PGE | cr4 & CR4_PGE);
    }
    #[inline]
    fn cr8(&self) -> u8 {
        self.vmcb().v_tpr()
    }
    #[inline]
    fn set_cr8(&mut self, tpr: u8) {
        self.vmcb_mut().set_v_tpr(tpr);
    }
    #[inline]
    fn efer(&self) -> u64 {
        self.own().efer() & !EFER_SVME
    }
    fn set_efer(&mut self, efer: u64) {
        match self.shadowed {
            Some(_) => self.change_controls(|guest| guest.efer = efer),
            None => self.vmcb_mut().set_efer(efer | EFER_SVME),
        }
    }
    fn dr6(&self) -> u64 {
        self.vmcb().dr6()
    }
    fn set_dr6(&mut self, dr6: u64) {
        self.vmcb_mut().set_dr6(dr6);
    }
    fn dr7(&self) -> u64 {
        self.vmcb().dr7()
    }
    #[inline]
    fn cpl(&self) -> u8 {
        self.vmcb().cpl()
    }

    #[inline]
    fn tr_attributes(&self) -> u16 {
        from_vmcb(self.vmcb().save.tr).attributes
    }

    #[inline]
    fn segment(&self, name: SegmentName) -> Segment {
        let vmcb = self.vmcb();
        from_vmcb(match name {
            SegmentName::Es => vmcb.es(),
            SegmentName::Cs => vmcb.cs(),
            SegmentName::Ss => vmcb.ss(),
            SegmentName::Ds => vmcb.ds(),
            SegmentName::Fs => vmcb.save.fs,
            SegmentName::Gs => vmcb.save.gs,
        })
    }

    #[inline]
    fn switched_msr(&self, msr: u32) -> Option<u64> {
        if msr < FIRST_SWITCHED_MSR {
            return None;
        }
        let save = &self.vmcb().save;
        Some(match msr {
            0x174 => save.sysenter_cs,
            0x175 => save.sysenter_esp,
            0x176 => save.sysenter_eip,
            0xc000_0081 => save.star,
            0xc000_0082 => save.lstar,
            0xc000_0083 => save.cstar,
            0xc000_0084 => save.sfmask,
            0xc000_0100 => save.fs.base,
            0xc000_0101 => save.gs.base,
            0xc000_0102 => save.kernel_gs_base,
            _ => return None,
        })
    }

    #[inline]
    fn set_switched_msr(&mut self, msr: u32, value: u64) -> bool {
        // Most that are not switched lie below those that are.
        if msr < FIRST_SWITCHED_MSR {
            return false;
        }
        let save = &mut self.vmcb_mut().save;
        *match msr {
            0x174 => &mut save.sysenter_cs,
            0x175 => &mut save.sysenter_esp,
            0x176 => &mut save.sysenter_eip,
            0xc000_0081 => &mut save.star,
            0xc000_0082 => &mut save.lstar,
            0xc000_0083 => &mut save.cstar,
            0xc000_0084 => &mut save.sfmask,
            0xc000_0100 => &mut save.fs.base,
            0xc000_0101 => &mut save.gs.base,
            0xc000_0102 => &mut save.kernel_gs_base,
            _ => return false,
        } = value;
        true
    }

    fn set_pat(&mut self, pat: u64) {
        self.vmcb_mut().set_g_pat(pat);
    }
    fn set_tsc_offset(&mut self, offset: u64) {
        self.vmcb_mut().set_tsc_offset(offset);
    }

    fn state(&self) -> CpuState {
        use SegmentName::{Cs, Ds, Es, Fs, Gs, Ss};
        let vmcb = self.vmcb();
        CpuState {
            segments: [Es, Cs, Ss, Ds, Fs, Gs].map(|name| self.segment(name)),
            ldtr: from_vmcb(vmcb.save.ldtr),
            tr: from_vmcb(vmcb.save.tr),
            gdtr: table_from_vmcb(vmcb.gdtr()),
            idtr: table_from_vmcb(vmcb.idtr()),
            cr0: self.cr0(),
            cr2: vmcb.cr2(),
            cr3: self.cr3(),
            cr4: self.cr4(),
            efer: self.efer(),
            dr6: vmcb.dr6(),
            dr7: vmcb.dr7(),
            rflags: vmcb.save.rflags,
            rip: vmcb.save.rip,
        }
    }

    fn set_state(&mut self, state: &CpuState) {
        let vmcb = self.vmcb_mut();
        let [es, cs, ss, ds, fs, gs] = state.segments.map(to_vmcb);
        vmcb.set_es(es);
        vmcb.set_cs(cs);
        vmcb.set_ss(ss);
        vmcb.set_ds(ds);
        vmcb.save.fs = fs;
        vmcb.save.gs = gs;
        vmcb.save.ldtr = to_vmcb(state.ldtr);
        vmcb.save.tr = to_vmcb(state.tr);
        vmcb.set_gdtr(table_to_vmcb(state.gdtr));
        vmcb.set_idtr(table_to_vmcb(state.idtr));
        // CPL is SS.DPL, bits 6:5 of the attributes; real mode runs at 0.
        let protected = state.cr0 & 1 != 0;
        vmcb.set_cpl(if protected { (ss.attrib >> 5 & 3) as u8 } else { 0 });
        vmcb.set_cr2(state.cr2);
        vmcb.set_dr6(state.dr6);
        vmcb.set_dr7(state.dr7);
        vmcb.save.rflags = state.rflags;
        vmcb.save.rip = state.rip;
        let CpuState { cr0, cr3, cr4, efer, .. } = *state;
        if self.shadowed.is_some() {
            self.change_controls(|guest| *guest = ControlRegisters { cr0, cr3, cr4, efer });
        } else {
            let vmcb = self.vmcb_mut();
            vmcb.set_cr0(cr0);
            vmcb.set_cr3(cr3);
            vmcb.set_cr4(cr4);
            vmcb.set_efer(efer | EFER_SVME);
        }
        self.settled = UNSETTLED;
    }

    fn load_state(&mut self, state: &CpuState) {
        self.set_state(state);
        self.set_nmis_blocked(false);
        let vmcb = self.vmcb_mut();
        vmcb.control.interrupt_shadow = 0;
        vmcb.control.event_inj = 0;
        vmcb.control.exit_int_info = 0;
        vmcb.request_interrupt_window(false);
    }

    fn exit_insn_bytes(&self) -> &[u8] {
        let control = &self.vmcb().control;
        &control.insn_bytes[..usize::from(control.insn_len & 0xf)]
    }

    #[inline]
    fn exit_next_rip(&self) -> Option<u64> {
        self.svm.nrips.then(|| self.vmcb().control.next_rip).filter(|&rip| rip != 0)
    }

    #[inline]
    fn interrupts_open(&self) -> bool {
        let vmcb = self.vmcb();
        vmcb.save.rflags & RFLAGS_IF != 0
            && vmcb.control.interrupt_shadow & 1 == 0
            && vmcb.control.event_inj == 0
    }
    #[inline]
    fn in_shadow(&self) -> bool {
        self.vmcb().control.interrupt_shadow & 1 != 0
    }
    fn restore_shadow(&mut self) {
        self.vmcb_mut().control.interrupt_shadow |= 1;
    }
    #[inline]
    fn clear_shadow(&mut self) {
        self.vmcb_mut().control.interrupt_shadow = 0;
    }
    #[inline]
    fn end_instruction(&mut self, next_rip: u64) -> u64 {
        let vmcb = self.vmcb_mut();
        vmcb.save.rip = next_rip;
        vmcb.control.interrupt_shadow = 0;
        vmcb.save.rflags
    }
    #[inline]
    fn inject(&mut self, event: Event) {
        if event == Event::Nmi {
            self.set_nmis_blocked(true);
        }
        self.vmcb_mut().control.event_inj = encode_event(event);
    }
    #[inline]
    fn injecting(&self) -> bool {
        self.vmcb().control.event_inj != 0
    }
    #[inline]
    fn take_interrupted_event(&mut self) -> Option<Event> {
        // Each exit writes the field (APM 15.7.2), and it is asked for once.
        let info = self.vmcb().control.exit_int_info;
        if info & EVENT_VALID == 0 {
            return None;
        }
        let event = interrupted_event(info);
        if event == Some(Event::Nmi) {
            self.set_nmis_blocked(false);
        }
        event
    }
    fn request_interrupt_window(&mut self, on: bool) {
        self.vmcb_mut().request_interrupt_window(on);
        // CR8 must not be written while V_IRQ is set: see `intercept_cr8_writes`.
        let cr_writes = self.vmcb().cr_writes();
        if on && cr_writes & CR8 == 0 {
            self.vmcb_mut().set_cr_writes(cr_writes | CR8);
        }
    }
    fn nmis_blocked(&self) -> bool {
        self.nmi.blocks(self.vmcb())
    }
    fn set_nmis_blocked(&mut self, blocked: bool) {
        self.nmi = if blocked { NmiBlock::Blocked } else { NmiBlock::Open };
        self.vmcb_mut().intercept(Intercepts::IRET, blocked);
    }
    #[inline]
    fn request_nmi_window(&mut self, on: bool) {
        if self.nmi == NmiBlock::Open {
            // Another event goes first: look again when it has been delivered, or is about to be.
            if on {
                self.request_interrupt_window(true);
            }
        } else {
            let mut nmi = self.nmi;
            nmi.prepare_entry(self.vmcb_mut(), on);
            self.nmi = nmi;
        }
    }
    #[inline]
    fn intercept_cr8_writes(&mut self, on: bool) {
        // QEMU's TCG aborts when a guest writes CR8 while V_IRQ is pending, so then the write always exits.
        let vmcb = self.vmcb_mut();
        let old = vmcb.cr_writes();
        let new = if on || vmcb.v_irq() { old | CR8 } else { old & !CR8 };
        if new != old {
            vmcb.set_cr_writes(new);
        }
    }

    fn set_root(&mut self, root: u64) {
        if self.shadowed.is_some() {
            self.vmcb_mut().set_cr3(root);
        } else {
            self.vmcb_mut().set_n_cr3(root);
            self.settled = UNSETTLED;
        }
    }
    fn flush_page(&mut self, linear: u64) {
        // A tag that is not valid here, or is about to be flushed, has nothing to lose; if it is another vCPU's by now,
        // that one walks its tables once more.
        if self.settled != UNSETTLED {
            // SAFETY: SVM is enabled on the CPU that runs a vCPU, and the number is one of its ASIDs.
            unsafe { entry::invalidate_page(linear, self.tag.number) };
        }
    }
    fn flush_tlb(&mut self) {
        self.settled = UNSETTLED;
    }
}
