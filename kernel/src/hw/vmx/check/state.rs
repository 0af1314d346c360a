//! A guest's state as plain values, with what of the controls says which rules apply to it.
use super::Settings;
use crate::hw::vmx::access_rights::{to_access_rights, DPL_SHIFT, LONG, PRESENT, TYPE, UNUSABLE};
use crate::hw::vmx::capabilities::VmxCapabilities;
use crate::hw::vmx::controls::{Activity, EntryControls, Interruptibility, Pin, Secondary};
use crate::hw::vmx::vmcs::{self, Fields, GUEST_SEGMENTS};
use crate::hw::{CpuState, Segment};

/// A segment register as the VMCS holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestSegment {
    /// Selector.
    pub selector: u16,
    /// Base.
    pub base: u64,
    /// Limit.
    pub limit: u32,
    /// Access rights.
    pub rights: u32,
}

impl From<&Segment> for GuestSegment {
    fn from(segment: &Segment) -> Self {
        Self {
            selector: segment.selector,
            base: segment.base,
            limit: segment.limit,
            rights: to_access_rights(segment),
        }
    }
}

impl GuestSegment {
    pub(super) fn usable(&self) -> bool {
        self.rights & UNUSABLE == 0
    }

    pub(super) fn kind(&self) -> u32 {
        self.rights & TYPE
    }

    pub(super) fn dpl(&self) -> u32 {
        self.rights >> DPL_SHIFT & 3
    }

    pub(super) fn rpl(&self) -> u32 {
        u32::from(self.selector & 3)
    }

    pub(super) fn present(&self) -> bool {
        self.rights & PRESENT != 0
    }
}

/// GDTR or IDTR as the VMCS holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestTable {
    /// Base.
    pub base: u64,
    /// Limit, of 32 bits although only 16 are used.
    pub limit: u32,
}

/// A guest's state as the rules of an entry see it. A part that is `None` is not loaded by the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestState {
    /// ES, CS, SS, DS, FS, GS, LDTR, TR.
    pub segments: [GuestSegment; 8],
    /// GDTR.
    pub gdtr: GuestTable,
    /// IDTR.
    pub idtr: GuestTable,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// DR7 and IA32_DEBUGCTL.
    pub debug: Option<(u64, u64)>,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_PERF_GLOBAL_CTRL.
    pub perf_global_ctrl: Option<u64>,
    /// IA32_PAT.
    pub pat: Option<u64>,
    /// IA32_EFER.
    pub efer: Option<u64>,
    /// IA32_BNDCFGS.
    pub bndcfgs: Option<u64>,
    /// IA32_RTIT_CTL.
    pub rtit_ctl: Option<u64>,
    /// IA32_LBR_CTL.
    pub lbr_ctl: Option<u64>,
    /// IA32_PKRS.
    pub pkrs: Option<u64>,
    /// User-interrupt notification vector.
    pub uinv: Option<u16>,
    /// IA32_S_CET, SSP and IA32_INTERRUPT_SSP_TABLE_ADDR.
    pub cet: Option<[u64; 3]>,
    /// PDPTEs, with EPT.
    pub pdptes: Option<[u64; 4]>,
    /// Activity state.
    pub activity: u32,
    /// Interruptibility state.
    pub interruptibility: u32,
    /// Pending debug exceptions.
    pub pending_debug: u64,
    /// VMCS link pointer.
    pub link_pointer: u64,
    /// The "IA-32e mode guest" control.
    pub long_mode: bool,
    /// The "virtual NMIs" control.
    pub virtual_nmis: bool,
    /// Interruption information of the event that the entry delivers.
    pub injection: u32,
}

impl GuestState {
    /// The state in a VMCS. Reads only fields that the controls say are used, for others may not exist.
    pub(super) fn read(fields: &impl Fields, settings: &Settings) -> Self {
        let entry = settings.entry;
        let when = |control: EntryControls, field| entry.contains(control).then(|| fields.read(field));
        Self {
            segments: GUEST_SEGMENTS.map(|segment| GuestSegment {
                selector: fields.read(segment.selector),
                base: fields.read(segment.base),
                limit: fields.read(segment.limit),
                rights: fields.read(segment.access_rights),
            }),
            gdtr: GuestTable {
                base: fields.read(vmcs::GUEST_GDTR_BASE),
                limit: fields.read(vmcs::GUEST_GDTR_LIMIT),
            },
            idtr: GuestTable {
                base: fields.read(vmcs::GUEST_IDTR_BASE),
                limit: fields.read(vmcs::GUEST_IDTR_LIMIT),
            },
            cr0: fields.read(vmcs::GUEST_CR0),
            cr3: fields.read(vmcs::GUEST_CR3),
            cr4: fields.read(vmcs::GUEST_CR4),
            rip: fields.read(vmcs::GUEST_RIP),
            rflags: fields.read(vmcs::GUEST_RFLAGS),
            debug: entry
                .contains(EntryControls::LOAD_DEBUG_CONTROLS)
                .then(|| (fields.read(vmcs::GUEST_DR7), fields.read(vmcs::GUEST_DEBUGCTL))),
            sysenter_esp: fields.read(vmcs::GUEST_SYSENTER_ESP),
            sysenter_eip: fields.read(vmcs::GUEST_SYSENTER_EIP),
            perf_global_ctrl: when(EntryControls::LOAD_PERF_GLOBAL_CTRL, vmcs::GUEST_PERF_GLOBAL_CTRL),
            pat: when(EntryControls::LOAD_PAT, vmcs::GUEST_PAT),
            efer: when(EntryControls::LOAD_EFER, vmcs::GUEST_EFER),
            bndcfgs: when(EntryControls::LOAD_BNDCFGS, vmcs::GUEST_BNDCFGS),
            rtit_ctl: when(EntryControls::LOAD_RTIT_CTL, vmcs::GUEST_RTIT_CTL),
            lbr_ctl: when(EntryControls::LOAD_LBR_CTL, vmcs::GUEST_LBR_CTL),
            pkrs: when(EntryControls::LOAD_PKRS, vmcs::GUEST_PKRS),
            uinv: entry.contains(EntryControls::LOAD_UINV).then(|| fields.read(vmcs::GUEST_UINV)),
            cet: entry.contains(EntryControls::LOAD_CET).then(|| {
                [vmcs::GUEST_S_CET, vmcs::GUEST_SSP, vmcs::GUEST_INTERRUPT_SSP_TABLE]
                    .map(|field| fields.read(field))
            }),
            pdptes: settings.secondary.contains(Secondary::EPT).then(|| {
                [vmcs::GUEST_PDPTE_0, vmcs::GUEST_PDPTE_1, vmcs::GUEST_PDPTE_2, vmcs::GUEST_PDPTE_3]
                    .map(|field| fields.read(field))
            }),
            activity: fields.read(vmcs::GUEST_ACTIVITY),
            interruptibility: fields.read(vmcs::GUEST_INTERRUPTIBILITY),
            pending_debug: fields.read(vmcs::GUEST_PENDING_DEBUG),
            link_pointer: fields.read(vmcs::VMCS_LINK_POINTER),
            long_mode: entry.contains(EntryControls::IA32E_GUEST),
            virtual_nmis: settings.pin.contains(Pin::VIRTUAL_NMIS),
            injection: fields.read(vmcs::ENTRY_INTERRUPTION),
        }
    }

    /// The state that an entry of a guest in `state` would load, without an event to deliver. Fixed bits that
    /// a guest does not notice (CR0.NE, CR4.VMXE) are set, but not PE and PG: a guest without them can be
    /// entered as it is only if unrestricted.
    pub fn of_guest(
        state: &CpuState,
        capabilities: &VmxCapabilities,
        interruptibility: Interruptibility,
        activity: Activity,
    ) -> Self {
        let [es, cs, ss, ds, fs, gs] = &state.segments;
        Self {
            segments: [es, cs, ss, ds, fs, gs, &state.ldtr, &state.tr].map(GuestSegment::from),
            gdtr: GuestTable { base: state.gdtr.base, limit: state.gdtr.limit.into() },
            idtr: GuestTable { base: state.idtr.base, limit: state.idtr.limit.into() },
            cr0: state.cr0 | capabilities.guest_cr0_fixed0(true),
            cr3: state.cr3,
            cr4: state.cr4 | capabilities.cr4_fixed0,
            rip: state.rip,
            rflags: state.rflags,
            debug: Some((state.dr7, 0)),
            sysenter_esp: 0,
            sysenter_eip: 0,
            perf_global_ctrl: None,
            pat: None,
            efer: Some(state.efer),
            bndcfgs: None,
            rtit_ctl: None,
            lbr_ctl: None,
            pkrs: None,
            uinv: None,
            cet: None,
            pdptes: None,
            activity: activity as u32,
            interruptibility: interruptibility.bits(),
            pending_debug: single_step_pending(state.rflags, interruptibility, activity),
            link_pointer: u64::MAX,
            long_mode: state.efer & super::EFER_LMA != 0,
            virtual_nmis: false,
            injection: 0,
        }
    }

    /// Whether the guest will be in virtual-8086 mode.
    pub(super) fn virtual_8086(&self) -> bool {
        self.rflags & RFLAGS_VM != 0
    }

    /// Whether the guest will be in 64-bit mode.
    pub(super) fn in_64_bit_mode(&self) -> bool {
        self.long_mode && self.segments[CS].rights & LONG != 0
    }
}

/// Index of CS in [`GuestState::segments`].
pub(super) const CS: usize = 1;
/// Index of SS.
pub(super) const SS: usize = 2;

/// RFLAGS.TF.
pub(super) const RFLAGS_TF: u64 = 1 << 8;
/// RFLAGS.IF.
pub(super) const RFLAGS_IF: u64 = 1 << 9;
/// RFLAGS.VM.
pub(super) const RFLAGS_VM: u64 = 1 << 17;
/// BS of the pending debug exceptions: a single step.
pub(super) const PENDING_BS: u64 = 1 << 14;

/// Pending debug exceptions as an entry wants them: a guest that single-steps and is in a shadow, or halted,
/// has its step pending (27.3.1.5). IA32_DEBUGCTL.BTF, which would change that, is taken to be 0.
pub const fn single_step_pending(rflags: u64, interruptibility: Interruptibility, activity: Activity) -> u64 {
    let held = interruptibility.intersects(Interruptibility::STI.union(Interruptibility::MOV_SS))
        || matches!(activity, Activity::Hlt);
    if held && rflags & RFLAGS_TF != 0 {
        PENDING_BS
    } else {
        0
    }
}
