//! Bits of the VMX control fields, and of the guest's interruptibility and activity. SDM vol. 3, 25.4 to
//! 25.8.
use bitflags::bitflags;

bitflags! {
    /// Pin-based VM-execution controls. SDM vol. 3, table 25-5.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Pin: u32 {
        /// External interrupts exit.
        const EXTERNAL_INTERRUPT_EXITING = 1 << 0;
        /// NMIs exit.
        const NMI_EXITING = 1 << 3;
        /// The guest's NMI blocking is virtual.
        const VIRTUAL_NMIS = 1 << 5;
        /// The VMX-preemption timer counts down.
        const PREEMPTION_TIMER = 1 << 6;
        /// Posted interrupts.
        const POSTED_INTERRUPTS = 1 << 7;
    }

    /// Primary processor-based VM-execution controls. SDM vol. 3, table 25-6.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Primary: u32 {
        /// Exit as soon as the guest can take an interrupt.
        const INTERRUPT_WINDOW_EXITING = 1 << 2;
        /// TSC reads are offset.
        const TSC_OFFSETTING = 1 << 3;
        /// HLT exits.
        const HLT_EXITING = 1 << 7;
        /// INVLPG exits.
        const INVLPG_EXITING = 1 << 9;
        /// MWAIT exits.
        const MWAIT_EXITING = 1 << 10;
        /// RDPMC exits.
        const RDPMC_EXITING = 1 << 11;
        /// RDTSC and RDTSCP exit.
        const RDTSC_EXITING = 1 << 12;
        /// MOV to CR3 exits.
        const CR3_LOAD_EXITING = 1 << 15;
        /// MOV from CR3 exits.
        const CR3_STORE_EXITING = 1 << 16;
        /// The tertiary controls are in use.
        const TERTIARY_CONTROLS = 1 << 17;
        /// MOV to CR8 exits.
        const CR8_LOAD_EXITING = 1 << 19;
        /// MOV from CR8 exits.
        const CR8_STORE_EXITING = 1 << 20;
        /// CR8 is the TPR of the virtual-APIC page.
        const TPR_SHADOW = 1 << 21;
        /// Exit as soon as no virtual NMI is blocked.
        const NMI_WINDOW_EXITING = 1 << 22;
        /// MOV to and from debug registers exits.
        const MOV_DR_EXITING = 1 << 23;
        /// All I/O instructions exit.
        const UNCONDITIONAL_IO_EXITING = 1 << 24;
        /// I/O instructions exit as the I/O bitmaps say.
        const IO_BITMAPS = 1 << 25;
        /// Exit after each instruction.
        const MONITOR_TRAP_FLAG = 1 << 27;
        /// RDMSR and WRMSR exit as the MSR bitmaps say.
        const MSR_BITMAPS = 1 << 28;
        /// MONITOR exits.
        const MONITOR_EXITING = 1 << 29;
        /// PAUSE exits.
        const PAUSE_EXITING = 1 << 30;
        /// The secondary controls are in use.
        const SECONDARY_CONTROLS = 1 << 31;
    }

    /// Secondary processor-based VM-execution controls. SDM vol. 3, table 25-7.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Secondary: u32 {
        /// Accesses of the APIC-access page are special.
        const VIRTUALIZE_APIC_ACCESSES = 1 << 0;
        /// EPT.
        const EPT = 1 << 1;
        /// LGDT, SGDT, LIDT and their kin exit.
        const DESCRIPTOR_TABLE_EXITING = 1 << 2;
        /// The guest has RDTSCP.
        const RDTSCP = 1 << 3;
        /// The x2APIC's TPR, EOI and self-IPI are virtual.
        const VIRTUALIZE_X2APIC = 1 << 4;
        /// VPID.
        const VPID = 1 << 5;
        /// WBINVD and WBNOINVD exit.
        const WBINVD_EXITING = 1 << 6;
        /// The guest may run unpaged, and in real mode.
        const UNRESTRICTED_GUEST = 1 << 7;
        /// Reads of most APIC registers are virtual.
        const APIC_REGISTER_VIRTUALIZATION = 1 << 8;
        /// Pending virtual interrupts are delivered by the processor.
        const VIRTUAL_INTERRUPT_DELIVERY = 1 << 9;
        /// PAUSE loops exit.
        const PAUSE_LOOP_EXITING = 1 << 10;
        /// RDRAND exits.
        const RDRAND_EXITING = 1 << 11;
        /// The guest has INVPCID.
        const INVPCID = 1 << 12;
        /// The guest has VMFUNC.
        const VM_FUNCTIONS = 1 << 13;
        /// VMREAD and VMWRITE of the guest use a shadow VMCS.
        const VMCS_SHADOWING = 1 << 14;
        /// ENCLS exits as its bitmap says.
        const ENCLS_EXITING = 1 << 15;
        /// RDSEED exits.
        const RDSEED_EXITING = 1 << 16;
        /// Page-modification logging.
        const PAGE_MODIFICATION_LOG = 1 << 17;
        /// EPT violations may become #VE.
        const VIRTUALIZATION_EXCEPTIONS = 1 << 18;
        /// Hides the guest from processor trace.
        const CONCEAL_FROM_PT = 1 << 19;
        /// The guest has XSAVES and XRSTORS.
        const XSAVES = 1 << 20;
        /// PASID translation.
        const PASID_TRANSLATION = 1 << 21;
        /// EPT has an execute permission for user and one for supervisor addresses.
        const MODE_BASED_EXECUTE = 1 << 22;
        /// Sub-page write permissions.
        const SUB_PAGE_WRITE_PERMISSIONS = 1 << 23;
        /// Processor trace uses guest-physical addresses.
        const PT_GUEST_PHYSICAL = 1 << 24;
        /// TSC reads are scaled.
        const TSC_SCALING = 1 << 25;
        /// The guest has TPAUSE, UMONITOR and UMWAIT.
        const USER_WAIT = 1 << 26;
        /// The guest has PCONFIG.
        const PCONFIG = 1 << 27;
        /// ENCLV exits as its bitmap says.
        const ENCLV_EXITING = 1 << 28;
        /// Bus locks exit.
        const BUS_LOCK_DETECTION = 1 << 30;
        /// Instructions that take too long exit.
        const INSTRUCTION_TIMEOUT = 1 << 31;
    }

    /// Primary VM-exit controls. SDM vol. 3, table 25-13.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ExitControls: u32 {
        /// DR7 and IA32_DEBUGCTL are saved.
        const SAVE_DEBUG_CONTROLS = 1 << 2;
        /// The host runs in 64-bit mode.
        const HOST_ADDRESS_SPACE_SIZE = 1 << 9;
        /// IA32_PERF_GLOBAL_CTRL is loaded.
        const LOAD_PERF_GLOBAL_CTRL = 1 << 12;
        /// The interrupt that exits is acknowledged and its vector reported.
        const ACKNOWLEDGE_INTERRUPT = 1 << 15;
        /// IA32_PAT is saved.
        const SAVE_PAT = 1 << 18;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 19;
        /// IA32_EFER is saved.
        const SAVE_EFER = 1 << 20;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 21;
        /// What is left of the VMX-preemption timer is saved.
        const SAVE_PREEMPTION_TIMER = 1 << 22;
        /// IA32_BNDCFGS is cleared.
        const CLEAR_BNDCFGS = 1 << 23;
        /// Hides exits from processor trace.
        const CONCEAL_FROM_PT = 1 << 24;
        /// IA32_RTIT_CTL is cleared.
        const CLEAR_RTIT_CTL = 1 << 25;
        /// IA32_LBR_CTL is cleared.
        const CLEAR_LBR_CTL = 1 << 26;
        /// The user-interrupt notification vector is cleared.
        const CLEAR_UINV = 1 << 27;
        /// CET state is loaded.
        const LOAD_CET = 1 << 28;
        /// IA32_PKRS is loaded.
        const LOAD_PKRS = 1 << 29;
        /// IA32_PERF_GLOBAL_CTRL is saved.
        const SAVE_PERF_GLOBAL_CTRL = 1 << 30;
        /// The secondary VM-exit controls are in use.
        const SECONDARY_CONTROLS = 1 << 31;
    }

    /// VM-entry controls. SDM vol. 3, table 25-15.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct EntryControls: u32 {
        /// DR7 and IA32_DEBUGCTL are loaded.
        const LOAD_DEBUG_CONTROLS = 1 << 2;
        /// The guest is in IA-32e mode.
        const IA32E_GUEST = 1 << 9;
        /// The entry is one to SMM.
        const ENTRY_TO_SMM = 1 << 10;
        /// Turns the dual-monitor treatment of SMIs off.
        const DEACTIVATE_DUAL_MONITOR = 1 << 11;
        /// IA32_PERF_GLOBAL_CTRL is loaded.
        const LOAD_PERF_GLOBAL_CTRL = 1 << 13;
        /// IA32_PAT is loaded.
        const LOAD_PAT = 1 << 14;
        /// IA32_EFER is loaded.
        const LOAD_EFER = 1 << 15;
        /// IA32_BNDCFGS is loaded.
        const LOAD_BNDCFGS = 1 << 16;
        /// Hides entries from processor trace.
        const CONCEAL_FROM_PT = 1 << 17;
        /// IA32_RTIT_CTL is loaded.
        const LOAD_RTIT_CTL = 1 << 18;
        /// The user-interrupt notification vector is loaded.
        const LOAD_UINV = 1 << 19;
        /// CET state is loaded.
        const LOAD_CET = 1 << 20;
        /// IA32_LBR_CTL is loaded.
        const LOAD_LBR_CTL = 1 << 21;
        /// IA32_PKRS is loaded.
        const LOAD_PKRS = 1 << 22;
    }

    /// Guest interruptibility state. SDM vol. 3, table 25-3.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Interruptibility: u32 {
        /// The shadow of STI.
        const STI = 1 << 0;
        /// The shadow of MOV SS or POP SS.
        const MOV_SS = 1 << 1;
        /// SMIs are blocked.
        const SMI = 1 << 2;
        /// NMIs are blocked; virtual ones, with virtual NMIs.
        const NMI = 1 << 3;
        /// The exit interrupted an enclave.
        const ENCLAVE = 1 << 4;
    }
}

/// Guest activity state. SDM vol. 3, 25.4.2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Activity {
    /// Executing instructions.
    #[default]
    Active = 0,
    /// HLT.
    Hlt = 1,
    /// Shutdown: a triple fault.
    Shutdown = 2,
    /// Waiting for SIPI.
    WaitForSipi = 3,
}

impl Activity {
    /// The state that a VMCS field names, if there is such.
    pub const fn from_field(field: u32) -> Option<Self> {
        match field {
            0 => Some(Self::Active),
            1 => Some(Self::Hlt),
            2 => Some(Self::Shutdown),
            3 => Some(Self::WaitForSipi),
            _ => None,
        }
    }
}

/// Exception bitmap: #DB.
pub const EXCEPTION_DEBUG: u32 = 1 << 1;
/// Exception bitmap: #UD.
pub const EXCEPTION_INVALID_OPCODE: u32 = 1 << 6;
/// Exception bitmap: #GP.
pub const EXCEPTION_GENERAL_PROTECTION: u32 = 1 << 13;
/// Exception bitmap: #PF.
pub const EXCEPTION_PAGE_FAULT: u32 = 1 << 14;
/// Exception bitmap: #AC.
pub const EXCEPTION_ALIGNMENT_CHECK: u32 = 1 << 17;
/// Exception bitmap: #MC.
pub const EXCEPTION_MACHINE_CHECK: u32 = 1 << 18;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activities_are_those_of_the_manual() {
        for n in 0..4 {
            assert_eq!(Activity::from_field(n).map(|activity| activity as u32), Some(n));
        }
        assert_eq!(Activity::from_field(4), None);
    }

    #[test]
    fn required_one_bits_have_no_name() {
        // Reserved bits that are 1 on every CPU: they come from the capability MSRs (SDM vol. 3, A.3 to A.5).
        assert!(!Pin::all().intersects(Pin::from_bits_retain(0x16)));
        assert!(!Primary::all().intersects(Primary::from_bits_retain(1 << 26 | 1 << 1 | 0x70)));
    }
}
