//! The virtual machine control block: layout, intercept bits, clean bits. AMD APM vol. 2, appendix B.
//!
//! Fields that the processor may keep cached between two VMRUNs of one VMCB are written through setters that
//! clear the clean bit of their group (APM 15.15); everything else is a plain field.
use bitflags::bitflags;
use core::mem::{offset_of, size_of};

bitflags! {
    /// Intercepts of control-area words 3 and 4 as one 64-bit set: bits 31:0 are offset 0x00c, bits 63:32 are
    /// offset 0x010. APM table B-1.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Intercepts: u64 {
        /// Physical maskable interrupt.
        const INTR = 1 << 0;
        /// Physical NMI.
        const NMI = 1 << 1;
        /// Physical SMI.
        const SMI = 1 << 2;
        /// Physical INIT.
        const INIT = 1 << 3;
        /// Virtual interrupt about to be taken: the interrupt window.
        const VINTR = 1 << 4;
        /// RDPMC.
        const RDPMC = 1 << 15;
        /// CPUID.
        const CPUID = 1 << 18;
        /// RSM.
        const RSM = 1 << 19;
        /// IRET: the NMI window.
        const IRET = 1 << 20;
        /// INVD.
        const INVD = 1 << 22;
        /// PAUSE.
        const PAUSE = 1 << 23;
        /// HLT.
        const HLT = 1 << 24;
        /// INVLPG.
        const INVLPG = 1 << 25;
        /// INVLPGA.
        const INVLPGA = 1 << 26;
        /// Port access selected by the I/O permission map.
        const IO = 1 << 27;
        /// MSR access selected by the MSR permission map.
        const MSR = 1 << 28;
        /// Hardware task switch.
        const TASK_SWITCH = 1 << 29;
        /// FERR freeze of legacy x87 error handling.
        const FERR_FREEZE = 1 << 30;
        /// Shutdown (triple fault).
        const SHUTDOWN = 1 << 31;
        /// VMRUN; VMRUN fails unless this is set.
        const VMRUN = 1 << 32;
        /// VMMCALL.
        const VMMCALL = 1 << 33;
        /// VMLOAD.
        const VMLOAD = 1 << 34;
        /// VMSAVE.
        const VMSAVE = 1 << 35;
        /// STGI.
        const STGI = 1 << 36;
        /// CLGI.
        const CLGI = 1 << 37;
        /// SKINIT.
        const SKINIT = 1 << 38;
        /// ICEBP (INT1).
        const ICEBP = 1 << 40;
        /// WBINVD.
        const WBINVD = 1 << 41;
        /// MONITOR.
        const MONITOR = 1 << 42;
        /// MWAIT.
        const MWAIT = 1 << 43;
        /// MWAIT if armed.
        const MWAIT_ARMED = 1 << 44;
        /// XSETBV.
        const XSETBV = 1 << 45;
        /// RDPRU.
        const RDPRU = 1 << 46;
    }
}

bitflags! {
    /// VMCB clean bits: state that has not changed since the last #VMEXIT from this VMCB. APM 15.15.3.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Clean: u32 {
        /// Intercepts, TSC offset, pause filter.
        const INTERCEPTS = 1 << 0;
        /// Addresses of the I/O and MSR permission maps.
        const PERMISSION_MAPS = 1 << 1;
        /// ASID.
        const ASID = 1 << 2;
        /// V_TPR, V_IRQ, V_INTR_PRIO, V_IGN_TPR, V_INTR_MASKING, V_INTR_VECTOR.
        const TPR = 1 << 3;
        /// Nested paging: nCR3 and G_PAT.
        const NP = 1 << 4;
        /// CR0, CR3, CR4, EFER.
        const CR = 1 << 5;
        /// DR6, DR7.
        const DR = 1 << 6;
        /// GDTR and IDTR.
        const DT = 1 << 7;
        /// CS, DS, ES, SS and CPL.
        const SEG = 1 << 8;
        /// CR2.
        const CR2 = 1 << 9;
    }
}

/// Control area of the VMCB. APM table B-1.
#[repr(C)]
#[derive(Debug)]
pub struct Control {
    intercept_cr_read: u16,
    intercept_cr_write: u16,
    intercept_dr_read: u16,
    intercept_dr_write: u16,
    intercept_exceptions: u32,
    intercepts: [u32; 2],
    more_intercepts: u32,
    _reserved_018: [u8; 0x03c - 0x018],
    pause_filter_threshold: u16,
    pause_filter_count: u16,
    iopm_base_pa: u64,
    msrpm_base_pa: u64,
    tsc_offset: u64,
    guest_asid: u32,
    /// TLB_CONTROL: what VMRUN flushes before entry. See [`TlbControl`]. Never cached.
    pub tlb_control: u8,
    _reserved_05d: [u8; 3],
    vintr: u64,
    /// Bit 0: the guest is in an interrupt shadow (after STI or MOV SS); bit 1: its virtual interrupt mask.
    pub interrupt_shadow: u64,
    /// EXITCODE. QEMU reports -1 as 32 bits, so only the low half is meaningful.
    pub exit_code: u64,
    /// EXITINFO1.
    pub exit_info_1: u64,
    /// EXITINFO2.
    pub exit_info_2: u64,
    /// EXITINTINFO: the event whose delivery the exit interrupted.
    pub exit_int_info: u64,
    /// NP_ENABLE (bit 0) and the SEV bits, which stay zero.
    np_enable: u64,
    _avic_apic_bar: u64,
    _ghcb: u64,
    /// EVENTINJ: the event that VMRUN delivers.
    pub event_inj: u64,
    n_cr3: u64,
    _lbr_virtualization: u64,
    clean: u32,
    _reserved_0c4: u32,
    /// Next sequential instruction pointer, where CPUID offers NRIPS.
    pub next_rip: u64,
    /// Number of guest instruction bytes that follow, where CPUID offers decode assists.
    pub insn_len: u8,
    /// Guest instruction bytes at a nested page fault or intercepted #PF.
    pub insn_bytes: [u8; 15],
    _reserved_0e0: [u8; 0x400 - 0x0e0],
}

/// A segment register as the VMCB holds it; `attrib` packs descriptor bits 55:52 and 47:40. APM 15.5.1.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmcbSegment {
    /// Selector.
    pub selector: u16,
    /// Type, S, DPL, P in bits 7:0; AVL, L, D/B, G in bits 11:8.
    pub attrib: u16,
    /// Limit in bytes, already scaled by the granularity bit.
    pub limit: u32,
    /// Base address.
    pub base: u64,
}

/// State save area of the VMCB. APM table B-2.
#[repr(C)]
#[derive(Debug)]
pub struct Save {
    es: VmcbSegment,
    cs: VmcbSegment,
    ss: VmcbSegment,
    ds: VmcbSegment,
    /// FS: moved by VMLOAD and VMSAVE, never cached.
    pub fs: VmcbSegment,
    /// GS: moved by VMLOAD and VMSAVE, never cached.
    pub gs: VmcbSegment,
    gdtr: VmcbSegment,
    /// LDTR: moved by VMLOAD and VMSAVE.
    pub ldtr: VmcbSegment,
    idtr: VmcbSegment,
    /// TR: moved by VMLOAD and VMSAVE.
    pub tr: VmcbSegment,
    _reserved_0a0: [u8; 0x0cb - 0x0a0],
    cpl: u8,
    _reserved_0cc: u32,
    efer: u64,
    _reserved_0d8: [u8; 0x148 - 0x0d8],
    cr4: u64,
    cr3: u64,
    cr0: u64,
    dr7: u64,
    dr6: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    _reserved_180: [u8; 0x1d8 - 0x180],
    /// RSP.
    pub rsp: u64,
    _shadow_stack: [u64; 3],
    /// RAX.
    pub rax: u64,
    /// STAR: moved by VMLOAD and VMSAVE, as are the next seven.
    pub star: u64,
    /// LSTAR.
    pub lstar: u64,
    /// CSTAR.
    pub cstar: u64,
    /// SFMASK.
    pub sfmask: u64,
    /// KernelGSBase.
    pub kernel_gs_base: u64,
    /// SYSENTER_CS.
    pub sysenter_cs: u64,
    /// SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// SYSENTER_EIP.
    pub sysenter_eip: u64,
    cr2: u64,
    _reserved_248: [u8; 0x268 - 0x248],
    g_pat: u64,
    _dbgctl: u64,
    _last_branch: [u64; 4],
    _reserved_298: [u8; 0xc00 - 0x298],
}

/// A virtual machine control block: one 4 KiB page that VMRUN takes by physical address.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Vmcb {
    /// Control area.
    pub control: Control,
    /// State save area.
    pub save: Save,
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096);
    assert!(size_of::<VmcbSegment>() == 16);
    assert!(offset_of!(Vmcb, save) == 0x400);
    assert!(offset_of!(Control, intercept_exceptions) == 0x008);
    assert!(offset_of!(Control, intercepts) == 0x00c);
    assert!(offset_of!(Control, pause_filter_threshold) == 0x03c);
    assert!(offset_of!(Control, iopm_base_pa) == 0x040);
    assert!(offset_of!(Control, tsc_offset) == 0x050);
    assert!(offset_of!(Control, guest_asid) == 0x058);
    assert!(offset_of!(Control, tlb_control) == 0x05c);
    assert!(offset_of!(Control, vintr) == 0x060);
    assert!(offset_of!(Control, interrupt_shadow) == 0x068);
    assert!(offset_of!(Control, exit_code) == 0x070);
    assert!(offset_of!(Control, exit_int_info) == 0x088);
    assert!(offset_of!(Control, np_enable) == 0x090);
    assert!(offset_of!(Control, event_inj) == 0x0a8);
    assert!(offset_of!(Control, n_cr3) == 0x0b0);
    assert!(offset_of!(Control, clean) == 0x0c0);
    assert!(offset_of!(Control, next_rip) == 0x0c8);
    assert!(offset_of!(Control, insn_len) == 0x0d0);
    assert!(offset_of!(Save, gdtr) == 0x060);
    assert!(offset_of!(Save, tr) == 0x090);
    assert!(offset_of!(Save, cpl) == 0x0cb);
    assert!(offset_of!(Save, efer) == 0x0d0);
    assert!(offset_of!(Save, cr4) == 0x148);
    assert!(offset_of!(Save, cr0) == 0x158);
    assert!(offset_of!(Save, dr7) == 0x160);
    assert!(offset_of!(Save, rflags) == 0x170);
    assert!(offset_of!(Save, rip) == 0x178);
    assert!(offset_of!(Save, rsp) == 0x1d8);
    assert!(offset_of!(Save, rax) == 0x1f8);
    assert!(offset_of!(Save, star) == 0x200);
    assert!(offset_of!(Save, sysenter_eip) == 0x238);
    assert!(offset_of!(Save, cr2) == 0x240);
    assert!(offset_of!(Save, g_pat) == 0x268);
};

/// TLB_CONTROL values. APM 15.16.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TlbControl {
    /// Flush nothing.
    Nothing = 0,
    /// Flush the entire TLB, all ASIDs.
    All = 1,
    /// Flush this guest's entries, where CPUID offers FlushByAsid.
    ThisGuest = 3,
}

/// V_TPR, bits 7:0 of the virtual-interrupt word. APM 15.21.
const V_TPR_MASK: u64 = 0xff;
/// V_IRQ: a virtual interrupt is pending.
const V_IRQ: u64 = 1 << 8;
/// V_INTR_PRIO, bits 19:16.
const V_INTR_PRIO_SHIFT: u32 = 16;
/// V_IGN_TPR: the pending virtual interrupt ignores V_TPR.
const V_IGN_TPR: u64 = 1 << 20;
/// V_INTR_MASKING: the guest's IF and TPR mask virtual interrupts only.
const V_INTR_MASKING: u64 = 1 << 24;

macro_rules! cached_fields {
    ($($(#[$doc:meta])* $get:ident $set:ident: $ty:ty = $area:ident.$field:ident, $group:ident;)*) => {
        $(
            $(#[$doc])*
            #[inline]
            pub fn $get(&self) -> $ty {
                self.$area.$field
            }
            /// Sets the field and marks its clean group dirty.
            #[inline]
            pub fn $set(&mut self, value: $ty) {
                self.$area.$field = value;
                self.mark_dirty(Clean::$group);
            }
        )*
    };
}

impl Vmcb {
    cached_fields! {
        /// CR0.
        cr0 set_cr0: u64 = save.cr0, CR;
        /// CR3.
        cr3 set_cr3: u64 = save.cr3, CR;
        /// CR4.
        cr4 set_cr4: u64 = save.cr4, CR;
        /// EFER as the processor uses it: SVME is always set here and hidden from the guest.
        efer set_efer: u64 = save.efer, CR;
        /// CR2.
        cr2 set_cr2: u64 = save.cr2, CR2;
        /// DR6.
        dr6 set_dr6: u64 = save.dr6, DR;
        /// DR7.
        dr7 set_dr7: u64 = save.dr7, DR;
        /// ES.
        es set_es: VmcbSegment = save.es, SEG;
        /// CS.
        cs set_cs: VmcbSegment = save.cs, SEG;
        /// SS.
        ss set_ss: VmcbSegment = save.ss, SEG;
        /// DS.
        ds set_ds: VmcbSegment = save.ds, SEG;
        /// CPL.
        cpl set_cpl: u8 = save.cpl, SEG;
        /// GDTR: base and limit only.
        gdtr set_gdtr: VmcbSegment = save.gdtr, DT;
        /// IDTR: base and limit only.
        idtr set_idtr: VmcbSegment = save.idtr, DT;
        /// Guest PAT, used with nested paging.
        g_pat set_g_pat: u64 = save.g_pat, NP;
        /// Root of the nested page table.
        n_cr3 set_n_cr3: u64 = control.n_cr3, NP;
        /// ASID; zero is the host's and makes VMRUN fail.
        asid set_asid: u32 = control.guest_asid, ASID;
        /// Added to the TSC when the guest reads it.
        tsc_offset set_tsc_offset: u64 = control.tsc_offset, INTERCEPTS;
        /// Intercepted exception vectors, one bit each.
        exceptions set_exceptions: u32 = control.intercept_exceptions, INTERCEPTS;
        /// Intercepted reads of CR0 to CR15, one bit each.
        cr_reads set_cr_reads: u16 = control.intercept_cr_read, INTERCEPTS;
        /// Word 5 of the intercepts: INVLPGB, INVPCID and others (APM table B-1, offset 0x014).
        more_intercepts set_more_intercepts: u32 = control.more_intercepts, INTERCEPTS;
        /// Intercepted writes of CR0 to CR15, one bit each.
        cr_writes set_cr_writes: u16 = control.intercept_cr_write, INTERCEPTS;
    }

    /// Marks groups of state as changed since the last exit.
    #[inline]
    pub fn mark_dirty(&mut self, groups: Clean) {
        self.control.clean &= !groups.bits();
    }

    /// Marks everything dirty: a first entry, or an entry on another CPU.
    pub fn mark_all_dirty(&mut self) {
        self.control.clean = 0;
    }

    /// Marks everything clean, as it is right after an exit.
    #[inline]
    pub fn mark_all_clean(&mut self) {
        self.control.clean = Clean::all().bits();
    }

    /// Groups that the next VMRUN may take from the processor's cache.
    pub fn clean(&self) -> Clean {
        Clean::from_bits_truncate(self.control.clean)
    }

    /// The set of intercepted instructions and events.
    pub fn intercepts(&self) -> Intercepts {
        let [low, high] = self.control.intercepts;
        Intercepts::from_bits_retain(u64::from(high) << 32 | u64::from(low))
    }

    /// Replaces the set of intercepted instructions and events.
    pub fn set_intercepts(&mut self, set: Intercepts) {
        self.control.intercepts = [set.bits() as u32, (set.bits() >> 32) as u32];
        self.mark_dirty(Clean::INTERCEPTS);
    }

    /// Adds to or removes from the set of intercepts; writes nothing when the set already is so.
    #[inline]
    pub fn intercept(&mut self, set: Intercepts, on: bool) {
        let old = self.intercepts();
        let new = if on { old | set } else { old - set };
        if new != old {
            self.set_intercepts(new);
        }
    }

    /// Sets the addresses of the I/O and MSR permission maps.
    pub fn set_permission_maps(&mut self, iopm: u64, msrpm: u64) {
        self.control.iopm_base_pa = iopm;
        self.control.msrpm_base_pa = msrpm;
        self.mark_dirty(Clean::PERMISSION_MAPS);
    }

    /// Turns nested paging on (APM 15.25.3).
    pub fn enable_nested_paging(&mut self) {
        self.control.np_enable = 1;
        self.mark_dirty(Clean::NP);
    }

    /// Sets the PAUSE filter: exits after `count` PAUSEs spaced by less than `threshold` cycles (APM 15.14.4).
    pub fn set_pause_filter(&mut self, count: u16, threshold: u16) {
        self.control.pause_filter_count = count;
        self.control.pause_filter_threshold = threshold;
        self.mark_dirty(Clean::INTERCEPTS);
    }

    /// Makes the guest's RFLAGS.IF and CR8 mask virtual interrupts only (APM 15.21.1).
    pub fn enable_interrupt_masking(&mut self) {
        self.control.vintr |= V_INTR_MASKING;
        self.mark_dirty(Clean::TPR);
    }

    /// The guest's CR8 (task priority, 0 to 15).
    #[inline]
    pub fn v_tpr(&self) -> u8 {
        (self.control.vintr & V_TPR_MASK) as u8
    }

    /// Sets the guest's CR8.
    #[inline]
    pub fn set_v_tpr(&mut self, tpr: u8) {
        let new = self.control.vintr & !V_TPR_MASK | u64::from(tpr & 0xf);
        if new != self.control.vintr {
            self.control.vintr = new;
            self.mark_dirty(Clean::TPR);
        }
    }

    /// Whether a virtual interrupt is pending in hardware.
    #[inline]
    pub fn v_irq(&self) -> bool {
        self.control.vintr & V_IRQ != 0
    }

    /// Requests an exit as soon as the guest can take an interrupt, or withdraws the request. The virtual
    /// interrupt has the highest priority and ignores V_TPR; it is never delivered, for VINTR is intercepted.
    pub fn request_interrupt_window(&mut self, on: bool) {
        let bits = V_IRQ | V_IGN_TPR | 0xf << V_INTR_PRIO_SHIFT;
        let new = if on { self.control.vintr | bits } else { self.control.vintr & !bits };
        if new != self.control.vintr {
            self.control.vintr = new;
            self.mark_dirty(Clean::TPR);
        }
        self.intercept(Intercepts::VINTR, on);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use alloc::boxed::Box;

    #[allow(unsafe_code)]
    pub(in crate::hw::svm) fn zeroed() -> Box<Vmcb> {
        // SAFETY: a VMCB is plain integers, for which all-zero is a valid value.
        unsafe { Box::<Vmcb>::new_zeroed().assume_init() }
    }

    #[test]
    fn setters_clear_exactly_their_clean_bit() {
        let mut vmcb = zeroed();
        type Setter = fn(&mut Vmcb);
        let cases: [(Setter, Clean); 9] = [
            (|v| v.set_cr0(1), Clean::CR),
            (|v| v.set_efer(1), Clean::CR),
            (|v| v.set_cr2(1), Clean::CR2),
            (|v| v.set_dr7(1), Clean::DR),
            (|v| v.set_cs(VmcbSegment::default()), Clean::SEG),
            (|v| v.set_idtr(VmcbSegment::default()), Clean::DT),
            (|v| v.set_n_cr3(0x1000), Clean::NP),
            (|v| v.set_asid(3), Clean::ASID),
            (|v| v.set_tsc_offset(5), Clean::INTERCEPTS),
        ];
        for (set, group) in cases {
            vmcb.mark_all_clean();
            set(&mut vmcb);
            assert_eq!(vmcb.clean(), Clean::all() - group);
        }
    }

    #[test]
    fn unchanged_state_stays_clean() {
        let mut vmcb = zeroed();
        vmcb.set_v_tpr(5);
        vmcb.intercept(Intercepts::HLT, true);
        vmcb.mark_all_clean();
        vmcb.set_v_tpr(5);
        vmcb.intercept(Intercepts::HLT, true);
        vmcb.request_interrupt_window(false);
        assert_eq!(vmcb.clean(), Clean::all());
    }

    #[test]
    fn interrupt_window_leaves_the_tpr_alone() {
        let mut vmcb = zeroed();
        vmcb.enable_interrupt_masking();
        vmcb.set_v_tpr(9);
        vmcb.request_interrupt_window(true);
        assert!(vmcb.v_irq() && vmcb.intercepts().contains(Intercepts::VINTR));
        assert_eq!(vmcb.v_tpr(), 9);
        vmcb.request_interrupt_window(false);
        assert!(!vmcb.v_irq() && !vmcb.intercepts().contains(Intercepts::VINTR));
        assert_eq!(vmcb.v_tpr(), 9);
    }

    #[test]
    fn intercept_words_are_at_their_offsets() {
        let mut vmcb = zeroed();
        vmcb.set_intercepts(Intercepts::VMRUN | Intercepts::CPUID);
        assert_eq!(vmcb.control.intercepts, [1 << 18, 1]);
    }
}
