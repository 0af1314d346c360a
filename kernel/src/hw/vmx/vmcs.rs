//! The fields of a VMCS: encodings, widths and groups. SDM vol. 3, 25.11.2 and appendix B.
//!
//! A field's type says how wide it is, so VMREAD and VMWRITE need no casts; that encoding, width and group
//! agree is checked when this compiles.
use core::marker::PhantomData;

/// A field of a VMCS that holds a `W`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field<W>(u32, PhantomData<W>);

/// A 16-bit field.
pub type Field16 = Field<u16>;
/// A 32-bit field.
pub type Field32 = Field<u32>;
/// A 64-bit field.
pub type Field64 = Field<u64>;
/// A field as wide as the processor's registers.
pub type FieldNatural = Field<Natural>;

/// Width of a register: 64 bits here, yet a width of its own in encodings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Natural {}

/// What a field can be as wide as. SDM vol. 3, table 25-21: bits 14:13 of an encoding.
pub trait Width: sealed::Sealed + Copy {
    /// What such a field holds.
    type Value: Copy + Into<u64> + PartialEq + core::fmt::Debug;
    /// Bits 14:13 of the encoding.
    const CODE: u32;
    /// The part of a VMREAD's result that is the field's; the processor clears the rest (25.11.2).
    fn truncate(raw: u64) -> Self::Value;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for u16 {}
    impl Sealed for u32 {}
    impl Sealed for u64 {}
    impl Sealed for super::Natural {}
}

impl Width for u16 {
    type Value = u16;
    const CODE: u32 = 0;
    #[inline]
    fn truncate(raw: u64) -> u16 {
        raw as u16
    }
}

impl Width for u64 {
    type Value = u64;
    const CODE: u32 = 1;
    #[inline]
    fn truncate(raw: u64) -> u64 {
        raw
    }
}

impl Width for u32 {
    type Value = u32;
    const CODE: u32 = 2;
    #[inline]
    fn truncate(raw: u64) -> u32 {
        raw as u32
    }
}

impl Width for Natural {
    type Value = u64;
    const CODE: u32 = 3;
    #[inline]
    fn truncate(raw: u64) -> u64 {
        raw
    }
}

/// The group of a field: bits 11:10 of its encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FieldType {
    /// What the hypervisor asks for.
    Control = 0,
    /// What an exit reports; VMWRITE may refuse it.
    ReadOnly = 1,
    /// What entries load and exits save.
    Guest = 2,
    /// What exits load.
    Host = 3,
}

impl Field<Natural> {
    /// A field by its encoding. VMREAD and VMWRITE of a register's width reach fields of every width.
    #[cfg(any(test, target_os = "none"))]
    #[inline]
    pub(super) const fn from_encoding(encoding: u32) -> Self {
        Self(encoding, PhantomData)
    }
}

impl<W> Field<W> {
    /// The encoding, as VMREAD and VMWRITE take it.
    #[inline]
    pub const fn encoding(self) -> u32 {
        self.0
    }

    /// The group that the field is in.
    pub const fn field_type(self) -> FieldType {
        match self.0 >> 10 & 3 {
            0 => FieldType::Control,
            1 => FieldType::ReadOnly,
            2 => FieldType::Guest,
            _ => FieldType::Host,
        }
    }
}

/// Where VMCS fields are read from: the processor's current VMCS, or a test's table.
pub trait Fields {
    /// The value of `field`.
    fn read<W: Width>(&self, field: Field<W>) -> W::Value;
}

/// Whether `encoding` is that of a fully accessed field of that width and group (table 25-21): bit 0 is the
/// access type, bits 9:1 the index, bits 12 and 31:15 are reserved.
const fn agrees(encoding: u32, width: u32, group: FieldType) -> bool {
    encoding & !0x3fe == width << 13 | (group as u32) << 10
}

macro_rules! fields {
    ($width:ty, $group:expr; $($(#[$doc:meta])* $name:ident = $encoding:literal;)*) => {
        $(
            $(#[$doc])*
            pub const $name: Field<$width> = Field($encoding, PhantomData);
            const _: () = assert!(agrees($encoding, <$width as Width>::CODE, $group));
        )*
    };
}

/// The four fields of a guest segment register.
#[derive(Clone, Copy, Debug)]
pub struct SegmentFields {
    /// Selector.
    pub selector: Field16,
    /// Base.
    pub base: FieldNatural,
    /// Limit.
    pub limit: Field32,
    /// Access rights.
    pub access_rights: Field32,
}

/// The fields of guest segment register `n`: ES, CS, SS, DS, FS, GS (as [`crate::hw::SegmentName`] has them),
/// LDTR and TR. Appendix B numbers each of the four in that order.
pub const GUEST_SEGMENTS: [SegmentFields; 8] = {
    let mut fields = [SegmentFields {
        selector: GUEST_ES_SELECTOR,
        base: GUEST_ES_BASE,
        limit: GUEST_ES_LIMIT,
        access_rights: GUEST_ES_ACCESS_RIGHTS,
    }; 8];
    let mut n = 0;
    while n < 8 {
        let step = 2 * n as u32;
        fields[n].selector.0 += step;
        fields[n].base.0 += step;
        fields[n].limit.0 += step;
        fields[n].access_rights.0 += step;
        n += 1;
    }
    fields
};

/// Index of LDTR in [`GUEST_SEGMENTS`].
pub const LDTR: usize = 6;
/// Index of TR in [`GUEST_SEGMENTS`].
pub const TR: usize = 7;

const _: () = {
    assert!(GUEST_SEGMENTS[TR].selector.0 == GUEST_TR_SELECTOR.0);
    assert!(GUEST_SEGMENTS[TR].base.0 == GUEST_TR_BASE.0);
    assert!(GUEST_SEGMENTS[TR].limit.0 == GUEST_TR_LIMIT.0);
    assert!(GUEST_SEGMENTS[TR].access_rights.0 == GUEST_TR_ACCESS_RIGHTS.0);
    assert!(GUEST_SEGMENTS[LDTR].base.0 == GUEST_LDTR_BASE.0);
};

// 16-bit control fields: SDM vol. 3, B.1.
fields! {
    u16, FieldType::Control;
    /// Virtual-processor identifier.
    VPID = 0x0000;
    /// Posted-interrupt notification vector.
    POSTED_INTERRUPT_VECTOR = 0x0002;
    /// EPTP index.
    EPTP_INDEX = 0x0004;
    /// HLAT prefix size.
    HLAT_PREFIX_SIZE = 0x0006;
    /// Last index of the PID-pointer table.
    LAST_PID_POINTER_INDEX = 0x0008;
}

// 16-bit guest-state fields: SDM vol. 3, B.1.
fields! {
    u16, FieldType::Guest;
    /// Guest ES selector.
    GUEST_ES_SELECTOR = 0x0800;
    /// Guest CS selector.
    GUEST_CS_SELECTOR = 0x0802;
    /// Guest SS selector.
    GUEST_SS_SELECTOR = 0x0804;
    /// Guest DS selector.
    GUEST_DS_SELECTOR = 0x0806;
    /// Guest FS selector.
    GUEST_FS_SELECTOR = 0x0808;
    /// Guest GS selector.
    GUEST_GS_SELECTOR = 0x080a;
    /// Guest LDTR selector.
    GUEST_LDTR_SELECTOR = 0x080c;
    /// Guest TR selector.
    GUEST_TR_SELECTOR = 0x080e;
    /// RVI in bits 7:0, SVI in bits 15:8.
    GUEST_INTERRUPT_STATUS = 0x0810;
    /// Next free entry of the page-modification log.
    PML_INDEX = 0x0812;
    /// Guest user-interrupt notification vector.
    GUEST_UINV = 0x0814;
}

// 16-bit host-state fields: SDM vol. 3, B.1.
fields! {
    u16, FieldType::Host;
    /// Host ES selector.
    HOST_ES_SELECTOR = 0x0c00;
    /// Host CS selector.
    HOST_CS_SELECTOR = 0x0c02;
    /// Host SS selector.
    HOST_SS_SELECTOR = 0x0c04;
    /// Host DS selector.
    HOST_DS_SELECTOR = 0x0c06;
    /// Host FS selector.
    HOST_FS_SELECTOR = 0x0c08;
    /// Host GS selector.
    HOST_GS_SELECTOR = 0x0c0a;
    /// Host TR selector.
    HOST_TR_SELECTOR = 0x0c0c;
}

// 64-bit control fields: SDM vol. 3, B.2.
fields! {
    u64, FieldType::Control;
    /// Address of the I/O bitmap for ports 0 to 7fffh.
    IO_BITMAP_A = 0x2000;
    /// Address of the I/O bitmap for ports 8000h to ffffh.
    IO_BITMAP_B = 0x2002;
    /// Address of the MSR bitmaps.
    MSR_BITMAPS = 0x2004;
    /// Address of the VM-exit MSR-store area.
    EXIT_MSR_STORE_ADDRESS = 0x2006;
    /// Address of the VM-exit MSR-load area.
    EXIT_MSR_LOAD_ADDRESS = 0x2008;
    /// Address of the VM-entry MSR-load area.
    ENTRY_MSR_LOAD_ADDRESS = 0x200a;
    /// Executive-VMCS pointer.
    EXECUTIVE_VMCS_POINTER = 0x200c;
    /// Address of the page-modification log.
    PML_ADDRESS = 0x200e;
    /// Added to the TSC when the guest reads it.
    TSC_OFFSET = 0x2010;
    /// Address of the virtual-APIC page.
    VIRTUAL_APIC_ADDRESS = 0x2012;
    /// Address of the APIC-access page.
    APIC_ACCESS_ADDRESS = 0x2014;
    /// Address of the posted-interrupt descriptor.
    POSTED_INTERRUPT_DESCRIPTOR = 0x2016;
    /// VM functions that the guest may call.
    VM_FUNCTION_CONTROLS = 0x2018;
    /// EPT pointer.
    EPT_POINTER = 0x201a;
    /// EOI-exit bitmap, vectors 0 to 63.
    EOI_EXIT_BITMAP_0 = 0x201c;
    /// EOI-exit bitmap, vectors 64 to 127.
    EOI_EXIT_BITMAP_1 = 0x201e;
    /// EOI-exit bitmap, vectors 128 to 191.
    EOI_EXIT_BITMAP_2 = 0x2020;
    /// EOI-exit bitmap, vectors 192 to 255.
    EOI_EXIT_BITMAP_3 = 0x2022;
    /// Address of the EPTP list.
    EPTP_LIST_ADDRESS = 0x2024;
    /// Address of the VMREAD bitmap.
    VMREAD_BITMAP = 0x2026;
    /// Address of the VMWRITE bitmap.
    VMWRITE_BITMAP = 0x2028;
    /// Address of the virtualization-exception information.
    VIRTUALIZATION_EXCEPTION_ADDRESS = 0x202a;
    /// XSS-exiting bitmap of XSAVES and XRSTORS.
    XSS_EXITING_BITMAP = 0x202c;
    /// ENCLS-exiting bitmap.
    ENCLS_EXITING_BITMAP = 0x202e;
    /// Sub-page-permission-table pointer.
    SUB_PAGE_PERMISSION_POINTER = 0x2030;
    /// TSC multiplier.
    TSC_MULTIPLIER = 0x2032;
    /// Tertiary processor-based VM-execution controls.
    TERTIARY_CONTROLS = 0x2034;
    /// ENCLV-exiting bitmap.
    ENCLV_EXITING_BITMAP = 0x2036;
    /// Address of the low PASID directory.
    LOW_PASID_DIRECTORY = 0x2038;
    /// Address of the high PASID directory.
    HIGH_PASID_DIRECTORY = 0x203a;
    /// Shared EPT pointer.
    SHARED_EPT_POINTER = 0x203c;
    /// PCONFIG-exiting bitmap.
    PCONFIG_EXITING_BITMAP = 0x203e;
    /// Hypervisor-managed linear-address translation pointer.
    HLAT_POINTER = 0x2040;
    /// Address of the PID-pointer table.
    PID_POINTER_TABLE = 0x2042;
    /// Secondary VM-exit controls.
    SECONDARY_EXIT_CONTROLS = 0x2044;
    /// Bits of IA32_SPEC_CTRL that the guest cannot change.
    SPEC_CTRL_MASK = 0x204a;
    /// IA32_SPEC_CTRL as the guest reads it.
    SPEC_CTRL_SHADOW = 0x204c;
}

// 64-bit read-only data fields: SDM vol. 3, B.2.
fields! {
    u64, FieldType::ReadOnly;
    /// Guest-physical address of an EPT violation or misconfiguration.
    GUEST_PHYSICAL_ADDRESS = 0x2400;
}

// 64-bit guest-state fields: SDM vol. 3, B.2.
fields! {
    u64, FieldType::Guest;
    /// VMCS link pointer; all ones without VMCS shadowing.
    VMCS_LINK_POINTER = 0x2800;
    /// Guest IA32_DEBUGCTL.
    GUEST_DEBUGCTL = 0x2802;
    /// Guest IA32_PAT.
    GUEST_PAT = 0x2804;
    /// Guest IA32_EFER.
    GUEST_EFER = 0x2806;
    /// Guest IA32_PERF_GLOBAL_CTRL.
    GUEST_PERF_GLOBAL_CTRL = 0x2808;
    /// Guest PDPTE 0.
    GUEST_PDPTE_0 = 0x280a;
    /// Guest PDPTE 1.
    GUEST_PDPTE_1 = 0x280c;
    /// Guest PDPTE 2.
    GUEST_PDPTE_2 = 0x280e;
    /// Guest PDPTE 3.
    GUEST_PDPTE_3 = 0x2810;
    /// Guest IA32_BNDCFGS.
    GUEST_BNDCFGS = 0x2812;
    /// Guest IA32_RTIT_CTL.
    GUEST_RTIT_CTL = 0x2814;
    /// Guest IA32_LBR_CTL.
    GUEST_LBR_CTL = 0x2816;
    /// Guest IA32_PKRS.
    GUEST_PKRS = 0x2818;
}

// 64-bit host-state fields: SDM vol. 3, B.2.
fields! {
    u64, FieldType::Host;
    /// Host IA32_PAT.
    HOST_PAT = 0x2c00;
    /// Host IA32_EFER.
    HOST_EFER = 0x2c02;
    /// Host IA32_PERF_GLOBAL_CTRL.
    HOST_PERF_GLOBAL_CTRL = 0x2c04;
    /// Host IA32_PKRS.
    HOST_PKRS = 0x2c06;
}

// 32-bit control fields: SDM vol. 3, B.3.
fields! {
    u32, FieldType::Control;
    /// Pin-based VM-execution controls.
    PIN_CONTROLS = 0x4000;
    /// Primary processor-based VM-execution controls.
    PRIMARY_CONTROLS = 0x4002;
    /// Exceptions that exit, one bit a vector.
    EXCEPTION_BITMAP = 0x4004;
    /// Page-fault error-code mask.
    PAGE_FAULT_ERROR_MASK = 0x4006;
    /// Page-fault error-code match.
    PAGE_FAULT_ERROR_MATCH = 0x4008;
    /// Number of CR3-target values in use.
    CR3_TARGET_COUNT = 0x400a;
    /// Primary VM-exit controls.
    EXIT_CONTROLS = 0x400c;
    /// Entries in the VM-exit MSR-store area.
    EXIT_MSR_STORE_COUNT = 0x400e;
    /// Entries in the VM-exit MSR-load area.
    EXIT_MSR_LOAD_COUNT = 0x4010;
    /// VM-entry controls.
    ENTRY_CONTROLS = 0x4012;
    /// Entries in the VM-entry MSR-load area.
    ENTRY_MSR_LOAD_COUNT = 0x4014;
    /// VM-entry interruption information: the event that the entry delivers.
    ENTRY_INTERRUPTION = 0x4016;
    /// Error code of that event.
    ENTRY_EXCEPTION_ERROR = 0x4018;
    /// Length of the instruction that raised that event, for software events.
    ENTRY_INSTRUCTION_LENGTH = 0x401a;
    /// A virtual TPR below this exits.
    TPR_THRESHOLD = 0x401c;
    /// Secondary processor-based VM-execution controls.
    SECONDARY_CONTROLS = 0x401e;
    /// PAUSEs further apart than this do not count as one loop, in TSC ticks.
    PLE_GAP = 0x4020;
    /// Longest PAUSE loop without an exit, in TSC ticks.
    PLE_WINDOW = 0x4022;
    /// Instruction-timeout control.
    INSTRUCTION_TIMEOUT = 0x4024;
}

// 32-bit read-only data fields: SDM vol. 3, B.3.
fields! {
    u32, FieldType::ReadOnly;
    /// VM-instruction error.
    INSTRUCTION_ERROR = 0x4400;
    /// Exit reason.
    EXIT_REASON = 0x4402;
    /// VM-exit interruption information: the exception or interrupt that exited.
    EXIT_INTERRUPTION = 0x4404;
    /// Error code of that exception.
    EXIT_INTERRUPTION_ERROR = 0x4406;
    /// IDT-vectoring information: the event whose delivery the exit interrupted.
    IDT_VECTORING = 0x4408;
    /// Error code of that event.
    IDT_VECTORING_ERROR = 0x440a;
    /// Length of the instruction that exited.
    EXIT_INSTRUCTION_LENGTH = 0x440c;
    /// Operands of the instruction that exited.
    EXIT_INSTRUCTION_INFORMATION = 0x440e;
}

// 32-bit guest-state fields: SDM vol. 3, B.3.
fields! {
    u32, FieldType::Guest;
    /// Guest ES limit.
    GUEST_ES_LIMIT = 0x4800;
    /// Guest CS limit.
    GUEST_CS_LIMIT = 0x4802;
    /// Guest SS limit.
    GUEST_SS_LIMIT = 0x4804;
    /// Guest DS limit.
    GUEST_DS_LIMIT = 0x4806;
    /// Guest FS limit.
    GUEST_FS_LIMIT = 0x4808;
    /// Guest GS limit.
    GUEST_GS_LIMIT = 0x480a;
    /// Guest LDTR limit.
    GUEST_LDTR_LIMIT = 0x480c;
    /// Guest TR limit.
    GUEST_TR_LIMIT = 0x480e;
    /// Guest GDTR limit.
    GUEST_GDTR_LIMIT = 0x4810;
    /// Guest IDTR limit.
    GUEST_IDTR_LIMIT = 0x4812;
    /// Guest ES access rights.
    GUEST_ES_ACCESS_RIGHTS = 0x4814;
    /// Guest CS access rights.
    GUEST_CS_ACCESS_RIGHTS = 0x4816;
    /// Guest SS access rights.
    GUEST_SS_ACCESS_RIGHTS = 0x4818;
    /// Guest DS access rights.
    GUEST_DS_ACCESS_RIGHTS = 0x481a;
    /// Guest FS access rights.
    GUEST_FS_ACCESS_RIGHTS = 0x481c;
    /// Guest GS access rights.
    GUEST_GS_ACCESS_RIGHTS = 0x481e;
    /// Guest LDTR access rights.
    GUEST_LDTR_ACCESS_RIGHTS = 0x4820;
    /// Guest TR access rights.
    GUEST_TR_ACCESS_RIGHTS = 0x4822;
    /// Guest interruptibility state.
    GUEST_INTERRUPTIBILITY = 0x4824;
    /// Guest activity state.
    GUEST_ACTIVITY = 0x4826;
    /// Guest SMBASE.
    GUEST_SMBASE = 0x4828;
    /// Guest IA32_SYSENTER_CS.
    GUEST_SYSENTER_CS = 0x482a;
    /// VMX-preemption timer.
    PREEMPTION_TIMER = 0x482e;
}

// 32-bit host-state fields: SDM vol. 3, B.3.
fields! {
    u32, FieldType::Host;
    /// Host IA32_SYSENTER_CS.
    HOST_SYSENTER_CS = 0x4c00;
}

// Natural-width control fields: SDM vol. 3, B.4.
fields! {
    Natural, FieldType::Control;
    /// Bits of CR0 that belong to the host.
    CR0_MASK = 0x6000;
    /// Bits of CR4 that belong to the host.
    CR4_MASK = 0x6002;
    /// What the guest reads in the host's bits of CR0.
    CR0_SHADOW = 0x6004;
    /// What the guest reads in the host's bits of CR4.
    CR4_SHADOW = 0x6006;
    /// CR3-target value 0.
    CR3_TARGET_0 = 0x6008;
    /// CR3-target value 1.
    CR3_TARGET_1 = 0x600a;
    /// CR3-target value 2.
    CR3_TARGET_2 = 0x600c;
    /// CR3-target value 3.
    CR3_TARGET_3 = 0x600e;
}

// Natural-width read-only data fields: SDM vol. 3, B.4.
fields! {
    Natural, FieldType::ReadOnly;
    /// Exit qualification.
    EXIT_QUALIFICATION = 0x6400;
    /// RCX before a string I/O instruction that an SMI interrupted.
    IO_RCX = 0x6402;
    /// RSI before it.
    IO_RSI = 0x6404;
    /// RDI before it.
    IO_RDI = 0x6406;
    /// RIP of it.
    IO_RIP = 0x6408;
    /// Guest linear address.
    GUEST_LINEAR_ADDRESS = 0x640a;
}

// Natural-width guest-state fields: SDM vol. 3, B.4.
fields! {
    Natural, FieldType::Guest;
    /// Guest CR0.
    GUEST_CR0 = 0x6800;
    /// Guest CR3.
    GUEST_CR3 = 0x6802;
    /// Guest CR4.
    GUEST_CR4 = 0x6804;
    /// Guest ES base.
    GUEST_ES_BASE = 0x6806;
    /// Guest CS base.
    GUEST_CS_BASE = 0x6808;
    /// Guest SS base.
    GUEST_SS_BASE = 0x680a;
    /// Guest DS base.
    GUEST_DS_BASE = 0x680c;
    /// Guest FS base.
    GUEST_FS_BASE = 0x680e;
    /// Guest GS base.
    GUEST_GS_BASE = 0x6810;
    /// Guest LDTR base.
    GUEST_LDTR_BASE = 0x6812;
    /// Guest TR base.
    GUEST_TR_BASE = 0x6814;
    /// Guest GDTR base.
    GUEST_GDTR_BASE = 0x6816;
    /// Guest IDTR base.
    GUEST_IDTR_BASE = 0x6818;
    /// Guest DR7.
    GUEST_DR7 = 0x681a;
    /// Guest RSP.
    GUEST_RSP = 0x681c;
    /// Guest RIP.
    GUEST_RIP = 0x681e;
    /// Guest RFLAGS.
    GUEST_RFLAGS = 0x6820;
    /// Guest pending debug exceptions.
    GUEST_PENDING_DEBUG = 0x6822;
    /// Guest IA32_SYSENTER_ESP.
    GUEST_SYSENTER_ESP = 0x6824;
    /// Guest IA32_SYSENTER_EIP.
    GUEST_SYSENTER_EIP = 0x6826;
    /// Guest IA32_S_CET.
    GUEST_S_CET = 0x6828;
    /// Guest SSP.
    GUEST_SSP = 0x682a;
    /// Guest IA32_INTERRUPT_SSP_TABLE_ADDR.
    GUEST_INTERRUPT_SSP_TABLE = 0x682c;
}

// Natural-width host-state fields: SDM vol. 3, B.4.
fields! {
    Natural, FieldType::Host;
    /// Host CR0.
    HOST_CR0 = 0x6c00;
    /// Host CR3.
    HOST_CR3 = 0x6c02;
    /// Host CR4.
    HOST_CR4 = 0x6c04;
    /// Host FS base.
    HOST_FS_BASE = 0x6c06;
    /// Host GS base.
    HOST_GS_BASE = 0x6c08;
    /// Host TR base.
    HOST_TR_BASE = 0x6c0a;
    /// Host GDTR base.
    HOST_GDTR_BASE = 0x6c0c;
    /// Host IDTR base.
    HOST_IDTR_BASE = 0x6c0e;
    /// Host IA32_SYSENTER_ESP.
    HOST_SYSENTER_ESP = 0x6c10;
    /// Host IA32_SYSENTER_EIP.
    HOST_SYSENTER_EIP = 0x6c12;
    /// Host RSP.
    HOST_RSP = 0x6c14;
    /// Host RIP.
    HOST_RIP = 0x6c16;
    /// Host IA32_S_CET.
    HOST_S_CET = 0x6c18;
    /// Host SSP.
    HOST_SSP = 0x6c1a;
    /// Host IA32_INTERRUPT_SSP_TABLE_ADDR.
    HOST_INTERRUPT_SSP_TABLE = 0x6c1c;
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_that_disagree_are_found() {
        assert!(agrees(0x681e, Natural::CODE, FieldType::Guest));
        for (encoding, width, group) in [
            (0x681f, Natural::CODE, FieldType::Guest),
            (0x681e, u32::CODE, FieldType::Guest),
            (0x681e, Natural::CODE, FieldType::Host),
            (0x781e, Natural::CODE, FieldType::Guest),
            (0xe81e, Natural::CODE, FieldType::Guest),
        ] {
            assert!(!agrees(encoding, width, group), "{encoding:#x}");
        }
    }

    #[test]
    fn fields_know_their_group() {
        assert_eq!(VPID.field_type(), FieldType::Control);
        assert_eq!(EXIT_REASON.field_type(), FieldType::ReadOnly);
        assert_eq!(GUEST_RIP.field_type(), FieldType::Guest);
        assert_eq!(HOST_RIP.field_type(), FieldType::Host);
    }

    #[test]
    fn segments_are_numbered_as_instructions_encode_them() {
        use crate::hw::SegmentName;
        for (name, selector, base, limit, rights) in [
            (SegmentName::Cs, GUEST_CS_SELECTOR, GUEST_CS_BASE, GUEST_CS_LIMIT, GUEST_CS_ACCESS_RIGHTS),
            (SegmentName::Ss, GUEST_SS_SELECTOR, GUEST_SS_BASE, GUEST_SS_LIMIT, GUEST_SS_ACCESS_RIGHTS),
            (SegmentName::Gs, GUEST_GS_SELECTOR, GUEST_GS_BASE, GUEST_GS_LIMIT, GUEST_GS_ACCESS_RIGHTS),
        ] {
            let fields = GUEST_SEGMENTS[name as usize];
            assert_eq!(fields.selector, selector);
            assert_eq!(fields.base, base);
            assert_eq!(fields.limit, limit);
            assert_eq!(fields.access_rights, rights);
        }
    }

    #[test]
    fn values_are_cut_to_the_fields_width() {
        assert_eq!(u16::truncate(0x1_2345_6789), 0x6789);
        assert_eq!(u32::truncate(0x1_2345_6789), 0x2345_6789);
        assert_eq!(Natural::truncate(u64::MAX), u64::MAX);
    }
}
