//! What a CPU's VMX can do, from its capability MSRs. SDM vol. 3, appendix A.
use bitflags::bitflags;

/// IA32_FEATURE_CONTROL. SDM vol. 3, 24.7.
pub const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// IA32_VMX_BASIC, the first of the capability MSRs. A.1.
pub const MSR_VMX_BASIC: u32 = 0x480;
/// IA32_VMX_PINBASED_CTLS. A.3.1.
pub const MSR_VMX_PIN: u32 = 0x481;
/// IA32_VMX_PROCBASED_CTLS. A.3.2.
pub const MSR_VMX_PRIMARY: u32 = 0x482;
/// IA32_VMX_EXIT_CTLS. A.4.1.
pub const MSR_VMX_EXIT: u32 = 0x483;
/// IA32_VMX_ENTRY_CTLS. A.5.
pub const MSR_VMX_ENTRY: u32 = 0x484;
/// IA32_VMX_MISC. A.6.
pub const MSR_VMX_MISC: u32 = 0x485;
/// IA32_VMX_CR0_FIXED0: the bits that must be 1. A.7.
pub const MSR_VMX_CR0_FIXED0: u32 = 0x486;
/// IA32_VMX_CR0_FIXED1: the bits that may be 1. A.7.
pub const MSR_VMX_CR0_FIXED1: u32 = 0x487;
/// IA32_VMX_CR4_FIXED0. A.8.
pub const MSR_VMX_CR4_FIXED0: u32 = 0x488;
/// IA32_VMX_CR4_FIXED1. A.8.
pub const MSR_VMX_CR4_FIXED1: u32 = 0x489;
/// IA32_VMX_VMCS_ENUM. A.9.
pub const MSR_VMX_VMCS_ENUM: u32 = 0x48a;
/// IA32_VMX_PROCBASED_CTLS2. A.3.3.
pub const MSR_VMX_SECONDARY: u32 = 0x48b;
/// IA32_VMX_EPT_VPID_CAP. A.10.
pub const MSR_VMX_EPT_VPID: u32 = 0x48c;
/// IA32_VMX_TRUE_PINBASED_CTLS; those of the primary, exit and entry controls follow. A.3 to A.5.
pub const MSR_VMX_TRUE_PIN: u32 = 0x48d;
/// IA32_VMX_VMFUNC. A.11.
pub const MSR_VMX_VMFUNC: u32 = 0x491;

/// Memory type write-back, in IA32_VMX_BASIC and the EPT pointer.
pub const WRITE_BACK: u8 = 6;

/// PE and PG: the bits of CR0 that a guest may clear with the "unrestricted guest" control (SDM vol. 3, A.7).
const CR0_UNRESTRICTED: u64 = 1 << 31 | 1;

bitflags! {
    /// EPT and VPID capabilities: IA32_VMX_EPT_VPID_CAP. SDM vol. 3, A.10.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct EptVpid: u64 {
        /// EPT entries may allow execution alone.
        const EXECUTE_ONLY = 1 << 0;
        /// Four levels of EPT.
        const FOUR_LEVELS = 1 << 6;
        /// Five levels of EPT.
        const FIVE_LEVELS = 1 << 7;
        /// EPT structures may be uncached.
        const UNCACHED = 1 << 8;
        /// EPT structures may be write-back.
        const WRITE_BACK = 1 << 14;
        /// 2 MiB pages.
        const PAGES_2M = 1 << 16;
        /// 1 GiB pages.
        const PAGES_1G = 1 << 17;
        /// INVEPT.
        const INVEPT = 1 << 20;
        /// Accessed and dirty bits in EPT entries.
        const ACCESSED_DIRTY = 1 << 21;
        /// EPT violations report the guest's own permissions.
        const ADVANCED_VIOLATION_INFO = 1 << 22;
        /// Supervisor shadow-stack control.
        const SUPERVISOR_SHADOW_STACK = 1 << 23;
        /// INVEPT of one context.
        const INVEPT_SINGLE = 1 << 25;
        /// INVEPT of all contexts.
        const INVEPT_ALL = 1 << 26;
        /// INVVPID.
        const INVVPID = 1 << 32;
        /// INVVPID of one address.
        const INVVPID_ADDRESS = 1 << 40;
        /// INVVPID of one VPID.
        const INVVPID_SINGLE = 1 << 41;
        /// INVVPID of all VPIDs.
        const INVVPID_ALL = 1 << 42;
        /// INVVPID of one VPID but for global translations.
        const INVVPID_SINGLE_KEEPING_GLOBALS = 1 << 43;
    }
}

/// What a CPU's VMX can do. All CPUs of a machine are expected to have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmxCapabilities {
    /// IA32_VMX_BASIC.
    pub basic: u64,
    /// Allowed settings of the pin-based controls: those that must be 1 in bits 31:0, those that may in
    /// 63:32. From the TRUE variant of the MSR where there is one, as the next three.
    pub pin: u64,
    /// Allowed settings of the primary processor-based controls.
    pub primary: u64,
    /// Allowed settings of the secondary processor-based controls; zero if the CPU has none.
    pub secondary: u64,
    /// Allowed settings of the VM-exit controls.
    pub exit: u64,
    /// Allowed settings of the VM-entry controls.
    pub entry: u64,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// Bits of CR0 that must be 1 in VMX operation.
    pub cr0_fixed0: u64,
    /// Bits of CR0 that may be 1.
    pub cr0_fixed1: u64,
    /// Bits of CR4 that must be 1.
    pub cr4_fixed0: u64,
    /// Bits of CR4 that may be 1.
    pub cr4_fixed1: u64,
    /// IA32_VMX_VMCS_ENUM.
    pub vmcs_enum: u64,
    /// EPT and VPID; empty if the CPU has neither.
    pub ept_vpid: EptVpid,
    /// IA32_VMX_VMFUNC; zero if the CPU has no VM functions.
    pub vmfunc: u64,
    /// Physical-address width, from CPUID.
    pub physical_address_bits: u8,
    /// Linear-address width, from CPUID: 48 or 57.
    pub linear_address_bits: u8,
}

impl VmxCapabilities {
    /// Reads the capability MSRs that exist, each once. The widths are those of CPUID 8000_0008h.
    pub fn read(read_msr: impl Fn(u32) -> u64, physical_address_bits: u8, linear_address_bits: u8) -> Self {
        let basic = read_msr(MSR_VMX_BASIC);
        let has_true = basic & BASIC_TRUE_CONTROLS != 0;
        let control = |n: u32| read_msr(if has_true { MSR_VMX_TRUE_PIN } else { MSR_VMX_PIN } + n);
        let primary = control(1);
        // The secondary controls' MSR exists if they can be activated, that of EPT and VPID if either exists,
        // that of VM functions if those exist (A.3.3, A.10, A.11).
        let secondary = if may(primary, 31) { read_msr(MSR_VMX_SECONDARY) } else { 0 };
        let ept_vpid = if may(secondary, 1) || may(secondary, 5) { read_msr(MSR_VMX_EPT_VPID) } else { 0 };
        let vmfunc = if may(secondary, 13) { read_msr(MSR_VMX_VMFUNC) } else { 0 };
        Self {
            basic,
            pin: control(0),
            primary,
            secondary,
            exit: control(2),
            entry: control(3),
            misc: read_msr(MSR_VMX_MISC),
            cr0_fixed0: read_msr(MSR_VMX_CR0_FIXED0),
            cr0_fixed1: read_msr(MSR_VMX_CR0_FIXED1),
            cr4_fixed0: read_msr(MSR_VMX_CR4_FIXED0),
            cr4_fixed1: read_msr(MSR_VMX_CR4_FIXED1),
            vmcs_enum: read_msr(MSR_VMX_VMCS_ENUM),
            ept_vpid: EptVpid::from_bits_retain(ept_vpid),
            vmfunc,
            physical_address_bits,
            linear_address_bits,
        }
    }

    /// The identifier that VMXON and VMCS regions start with.
    pub fn revision(&self) -> u32 {
        self.basic as u32 & 0x7fff_ffff
    }

    /// Size of VMXON and VMCS regions, at most 4 KiB.
    pub fn region_bytes(&self) -> usize {
        (self.basic >> 32) as usize & 0x1fff
    }

    /// Memory type in which the processor accesses the VMCS and what it points to.
    pub fn memory_type(&self) -> u8 {
        (self.basic >> 50) as u8 & 0xf
    }

    /// Whether all addresses that VMX structures hold are limited to 32 bits.
    pub fn addresses_are_32_bits(&self) -> bool {
        self.basic >> 48 & 1 != 0
    }

    /// Whether exits of INS and OUTS report their operands.
    pub fn reports_string_io(&self) -> bool {
        self.basic >> 54 & 1 != 0
    }

    /// Whether an injected hardware exception may have an error code, or none, whatever its vector.
    pub fn error_code_is_free(&self) -> bool {
        self.basic >> 56 & 1 != 0
    }

    /// Shift of the VMX-preemption timer: it counts down once in 2 to the power of this TSC ticks.
    pub fn preemption_timer_shift(&self) -> u32 {
        self.misc as u32 & 0x1f
    }

    /// Whether exits store EFER.LMA into the "IA-32e mode guest" control, as they do with unrestricted
    /// guests.
    pub fn exit_stores_lma(&self) -> bool {
        self.misc >> 5 & 1 != 0
    }

    /// Whether a guest may be entered in activity state `n`: 1 HLT, 2 shutdown, 3 wait-for-SIPI.
    pub fn has_activity(&self, n: u32) -> bool {
        n == 0 || n < 4 && self.misc >> (5 + n) & 1 != 0
    }

    /// Number of CR3-target values.
    pub fn cr3_targets(&self) -> u32 {
        (self.misc >> 16) as u32 & 0x1ff
    }

    /// Most entries that an MSR area should have.
    pub fn msr_area_entries(&self) -> u32 {
        512 * ((self.misc >> 25) as u32 & 7) + 512
    }

    /// Whether software events may be injected with an instruction length of zero.
    pub fn injects_zero_length(&self) -> bool {
        self.misc >> 30 & 1 != 0
    }

    /// Whether the CPU can run guests unpaged and in real mode.
    pub fn unrestricted_guest(&self) -> bool {
        may(self.secondary, 7)
    }

    /// Bits of CR0 that must be 1 in a guest.
    pub fn guest_cr0_fixed0(&self, unrestricted: bool) -> u64 {
        if unrestricted {
            self.cr0_fixed0 & !CR0_UNRESTRICTED
        } else {
            self.cr0_fixed0
        }
    }
}

/// BASIC: the TRUE variants of the control MSRs exist, so that controls which are 1 by default may be 0
/// (A.2).
const BASIC_TRUE_CONTROLS: u64 = 1 << 55;

/// Whether control `bit` may be 1.
const fn may(allowed: u64, bit: u32) -> bool {
    allowed >> (32 + bit) & 1 != 0
}

/// `guest_cr0` with the bits that VMX operation fixes (SDM vol. 3, 24.8 and A.7): what the guest's CR0 field
/// takes while the read shadow holds `guest_cr0`.
#[inline]
pub fn cr0_for_hardware(guest_cr0: u64, capabilities: &VmxCapabilities, unrestricted: bool) -> u64 {
    (guest_cr0 | capabilities.guest_cr0_fixed0(unrestricted)) & capabilities.cr0_fixed1
}

/// `guest_cr4` with the bits that VMX operation fixes (SDM vol. 3, 24.8 and A.8).
#[inline]
pub fn cr4_for_hardware(guest_cr4: u64, capabilities: &VmxCapabilities) -> u64 {
    (guest_cr4 | capabilities.cr4_fixed0) & capabilities.cr4_fixed1
}

/// Whether a processor with this signature (CPUID 1 EAX) is one whose VMX-preemption timer counts at a wrong rate, by its
/// specification update: AAJ124, AAK139, AAM126, AAN92, AAO65, AAP86, AAT59, BA86, BC81, BD73 and BV68.
pub const fn has_faulty_preemption_timer(signature: u32) -> bool {
    matches!(
        signature,
        0x0001_06a0 | 0x0001_06a1 | 0x0001_06a4 | 0x0001_06a5 | 0x0001_06e5 // Nehalem
            | 0x0002_0652 | 0x0002_0655 // Westmere
            | 0x0002_06e6 // Nehalem-EX
            | 0x0003_06a8 // Ivy Bridge
    )
}

/// What IA32_FEATURE_CONTROL says of VMXON. SDM vol. 3, 24.7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureControl {
    /// VMXON works.
    Usable,
    /// VMXON works once this value, which locks the MSR, is written to it.
    MustLock(u64),
    /// The firmware locked the MSR with VMX off: only its setup can change that.
    LockedOff,
}

/// The MSR is locked; VMXON wants that.
const FEATURE_LOCK: u64 = 1 << 0;
/// VMXON works in SMX operation.
const FEATURE_INSIDE_SMX: u64 = 1 << 1;
/// VMXON works outside SMX operation.
const FEATURE_OUTSIDE_SMX: u64 = 1 << 2;

/// Judges a value of [`MSR_FEATURE_CONTROL`] for a CPU that is in SMX operation or, as usual, not.
pub fn feature_control(msr_value: u64, in_smx: bool) -> FeatureControl {
    let wanted = if in_smx { FEATURE_INSIDE_SMX } else { FEATURE_OUTSIDE_SMX };
    match (msr_value & FEATURE_LOCK != 0, msr_value & wanted != 0) {
        (true, true) => FeatureControl::Usable,
        (true, false) => FeatureControl::LockedOff,
        (false, _) => FeatureControl::MustLock(msr_value | wanted | FEATURE_LOCK),
    }
}

/// Capabilities of CPUs to test with.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    /// A CPU by its capability MSRs from 480h on.
    pub(crate) fn cpu(msrs: &[u64; 18]) -> VmxCapabilities {
        VmxCapabilities::read(|msr| msrs[(msr - MSR_VMX_BASIC) as usize], 39, 48)
    }

    /// EPT and VPID, but no unrestricted guest: the first generation that has them.
    pub(crate) const NEHALEM: [u64; 18] = [
        0x00da_0400_0000_000e,
        0x0000_007f_0000_0016,
        0xfff9_fffe_0401_e172,
        0x007f_ffff_0003_6dff,
        0x0000_ffff_0000_11ff,
        0x0000_0000_0004_01c5,
        0x8000_0021,
        0xffff_ffff,
        0x0000_2000,
        0x0000_67ff,
        0x0000_002c,
        0x0000_007f_0000_0000,
        0x0000_0f01_0611_4141,
        0x0000_007f_0000_0016,
        0xfff9_fffe_0400_6172,
        0x007f_ffff_0003_6dfb,
        0x0000_ffff_0000_11fb,
        0,
    ];

    /// A desktop CPU of 2015.
    pub(crate) const SKYLAKE: [u64; 18] = [
        0x00da_0400_0000_0004,
        0x0000_007f_0000_0016,
        0xfff9_fffe_0401_e172,
        0x01ff_ffff_0003_6dff,
        0x0003_ffff_0000_11ff,
        0x0000_0000_7004_c1e7,
        0x8000_0021,
        0xffff_ffff,
        0x0000_2000,
        0x0037_67ff,
        0x0000_002e,
        0x005f_fcff_0000_0000,
        0x0000_0f01_0673_4141,
        0x0000_007f_0000_0016,
        0xfff9_fffe_0400_6172,
        0x01ff_ffff_0003_6dfb,
        0x0003_ffff_0000_11fb,
        1,
    ];

    /// An emulated CPU: another revision, no processor trace, no EPT A/D.
    pub(crate) const EMULATED: [u64; 18] = [
        0x00d8_1000_0000_002b,
        0x0000_007f_0000_0016,
        0xfdf9_fffe_0401_e172,
        0x007f_ffff_0003_6dff,
        0x0000_ffff_0000_11ff,
        0x0000_0000_6004_01e0,
        0x8000_0021,
        0xffff_ffff,
        0x0000_2000,
        0x0037_27ff,
        0x0000_002e,
        0x0012_77ff_0000_0000,
        0x0000_0f01_0613_4141,
        0x0000_007f_0000_0016,
        0xfdf9_fffe_0400_6172,
        0x007f_ffff_0003_6dfb,
        0x0000_ffff_0000_11fb,
        1,
    ];

    /// The first generation of VMX: neither EPT nor VPID nor TRUE controls.
    pub(crate) const FIRST: [u64; 18] = [
        0x001a_0400_0000_0007,
        0x0000_001f_0000_0016,
        0x77b9_fffe_0401_e172,
        0x0003_efff_0003_6dff,
        0x0000_1fff_0000_11ff,
        0x0000_0000_0004_0000,
        0x8000_0021,
        0xffff_ffff,
        0x0000_2000,
        0x0000_27ff,
        0x0000_002c,
        0,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
}

#[cfg(test)]
mod tests {
    use super::samples::{cpu, EMULATED, FIRST, NEHALEM, SKYLAKE};
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn only_msrs_that_exist_are_read() {
        let read = |msrs: &[u64; 18]| {
            let seen = RefCell::new(std::vec::Vec::new());
            VmxCapabilities::read(
                |msr| {
                    seen.borrow_mut().push(msr);
                    msrs[(msr - MSR_VMX_BASIC) as usize]
                },
                36,
                48,
            );
            let mut seen = seen.into_inner();
            seen.sort_unstable();
            seen
        };
        assert_eq!(read(&FIRST), (0x480..=0x48a).collect::<std::vec::Vec<_>>());
        let skylake = read(&SKYLAKE);
        assert!([0x48b, 0x48c, 0x48d, 0x48e, 0x48f, 0x490, 0x491].iter().all(|msr| skylake.contains(msr)));
        assert!([0x481, 0x482, 0x483, 0x484].iter().all(|msr| !skylake.contains(msr)));
        assert!(skylake.windows(2).all(|pair| pair[0] != pair[1]), "each once");
        assert!(!read(&NEHALEM).contains(&0x491), "no VM functions");
    }

    #[test]
    fn the_preemption_timer_is_not_trusted_where_it_counts_wrong() {
        assert!(has_faulty_preemption_timer(0x0001_06e5) && has_faulty_preemption_timer(0x0003_06a8));
        assert!(!has_faulty_preemption_timer(0x0003_06a9) && !has_faulty_preemption_timer(0x0005_0654));
    }

    #[test]
    fn basic_and_misc_of_real_cpus() {
        let skylake = cpu(&SKYLAKE);
        assert_eq!((skylake.revision(), skylake.region_bytes(), skylake.memory_type()), (4, 1024, 6));
        assert!(skylake.reports_string_io() && !skylake.addresses_are_32_bits());
        assert!(!skylake.error_code_is_free());
        assert_eq!(skylake.preemption_timer_shift(), 7);
        assert_eq!((skylake.cr3_targets(), skylake.msr_area_entries()), (4, 512));
        assert!(skylake.exit_stores_lma() && skylake.injects_zero_length());
        assert!((0..4).all(|n| skylake.has_activity(n)) && !skylake.has_activity(4));
        let emulated = cpu(&EMULATED);
        assert_eq!((emulated.revision(), emulated.region_bytes(), emulated.memory_type()), (0x2b, 4096, 6));
        assert!(!cpu(&FIRST).has_activity(1) && cpu(&FIRST).has_activity(0));
    }

    #[test]
    fn ept_and_vpid_of_real_cpus() {
        let nehalem = cpu(&NEHALEM).ept_vpid;
        assert!(nehalem.contains(
            EptVpid::EXECUTE_ONLY
                | EptVpid::FOUR_LEVELS
                | EptVpid::WRITE_BACK
                | EptVpid::UNCACHED
                | EptVpid::PAGES_2M
                | EptVpid::INVEPT
                | EptVpid::INVEPT_SINGLE
                | EptVpid::INVEPT_ALL
                | EptVpid::INVVPID
                | EptVpid::INVVPID_ADDRESS
                | EptVpid::INVVPID_SINGLE
                | EptVpid::INVVPID_ALL
                | EptVpid::INVVPID_SINGLE_KEEPING_GLOBALS
        ));
        assert!(!nehalem.intersects(EptVpid::PAGES_1G | EptVpid::ACCESSED_DIRTY | EptVpid::FIVE_LEVELS));
        let skylake = cpu(&SKYLAKE).ept_vpid;
        assert!(
            skylake.contains(EptVpid::PAGES_1G | EptVpid::ACCESSED_DIRTY | EptVpid::ADVANCED_VIOLATION_INFO)
        );
        assert_eq!(cpu(&FIRST).ept_vpid, EptVpid::empty());
    }

    #[test]
    fn fixed_bits_leave_the_guest_only_what_it_may_have() {
        let skylake = cpu(&SKYLAKE);
        assert_eq!(cr0_for_hardware(0x6000_0010, &skylake, true), 0x6000_0030, "NE alone");
        assert_eq!(cr0_for_hardware(0x6000_0010, &skylake, false), 0xe000_0031, "PG, NE and PE");
        assert_eq!(cr0_for_hardware(1 << 32 | 0x8005_003b, &skylake, true), 0x8005_003b);
        assert_eq!(cr4_for_hardware(0, &skylake), 0x2000, "VMXE");
        assert_eq!(cr4_for_hardware(0x2_06f8, &cpu(&NEHALEM)), 0x26f8, "no PCIDE");
    }

    #[test]
    fn feature_control_in_all_its_states() {
        for (value, in_smx, expected) in [
            (0, false, FeatureControl::MustLock(5)),
            (0, true, FeatureControl::MustLock(3)),
            (4, false, FeatureControl::MustLock(5)),
            (2, false, FeatureControl::MustLock(7)),
            (1, false, FeatureControl::LockedOff),
            (3, false, FeatureControl::LockedOff),
            (3, true, FeatureControl::Usable),
            (5, false, FeatureControl::Usable),
            (5, true, FeatureControl::LockedOff),
            (0x10_0000, false, FeatureControl::MustLock(0x10_0005)),
        ] {
            assert_eq!(feature_control(value, in_smx), expected, "{value:#x} {in_smx}");
        }
    }
}
