//! Exit reasons, and what exit qualifications and event information say. SDM vol. 3, 28.2 and appendix C.
use super::event::{self, ERROR_CODE, TYPE_INTERRUPT, TYPE_NMI, TYPE_SHIFT, VALID};
use crate::hw::{Event, FaultCause, PortAccess, PortKind};

/// Basic exit reasons. SDM vol. 3, table C-1.
pub mod reason {
    /// Exception or NMI.
    pub const EXCEPTION_OR_NMI: u16 = 0;
    /// External interrupt.
    pub const EXTERNAL_INTERRUPT: u16 = 1;
    /// Triple fault.
    pub const TRIPLE_FAULT: u16 = 2;
    /// INIT.
    pub const INIT: u16 = 3;
    /// Startup IPI.
    pub const SIPI: u16 = 4;
    /// SMI right after an I/O instruction.
    pub const IO_SMI: u16 = 5;
    /// SMI.
    pub const OTHER_SMI: u16 = 6;
    /// Interrupt window.
    pub const INTERRUPT_WINDOW: u16 = 7;
    /// NMI window.
    pub const NMI_WINDOW: u16 = 8;
    /// Task switch.
    pub const TASK_SWITCH: u16 = 9;
    /// CPUID.
    pub const CPUID: u16 = 10;
    /// GETSEC.
    pub const GETSEC: u16 = 11;
    /// HLT.
    pub const HLT: u16 = 12;
    /// INVD.
    pub const INVD: u16 = 13;
    /// INVLPG.
    pub const INVLPG: u16 = 14;
    /// RDPMC.
    pub const RDPMC: u16 = 15;
    /// RDTSC.
    pub const RDTSC: u16 = 16;
    /// RSM.
    pub const RSM: u16 = 17;
    /// VMCALL.
    pub const VMCALL: u16 = 18;
    /// VMCLEAR; the other VMX instructions follow.
    pub const VMCLEAR: u16 = 19;
    /// VMLAUNCH.
    pub const VMLAUNCH: u16 = 20;
    /// VMPTRLD.
    pub const VMPTRLD: u16 = 21;
    /// VMPTRST.
    pub const VMPTRST: u16 = 22;
    /// VMREAD.
    pub const VMREAD: u16 = 23;
    /// VMRESUME.
    pub const VMRESUME: u16 = 24;
    /// VMWRITE.
    pub const VMWRITE: u16 = 25;
    /// VMXOFF.
    pub const VMXOFF: u16 = 26;
    /// VMXON.
    pub const VMXON: u16 = 27;
    /// Control-register access.
    pub const CR_ACCESS: u16 = 28;
    /// MOV to or from a debug register.
    pub const MOV_DR: u16 = 29;
    /// I/O instruction.
    pub const IO: u16 = 30;
    /// RDMSR.
    pub const RDMSR: u16 = 31;
    /// WRMSR.
    pub const WRMSR: u16 = 32;
    /// Entry failure: guest state.
    pub const INVALID_GUEST_STATE: u16 = 33;
    /// Entry failure: MSR loading.
    pub const MSR_LOADING: u16 = 34;
    /// MWAIT.
    pub const MWAIT: u16 = 36;
    /// Monitor trap flag.
    pub const MONITOR_TRAP_FLAG: u16 = 37;
    /// MONITOR.
    pub const MONITOR: u16 = 39;
    /// PAUSE.
    pub const PAUSE: u16 = 40;
    /// Entry failure: machine check.
    pub const ENTRY_MACHINE_CHECK: u16 = 41;
    /// TPR below threshold.
    pub const TPR_BELOW_THRESHOLD: u16 = 43;
    /// Access of the APIC-access page.
    pub const APIC_ACCESS: u16 = 44;
    /// Virtualized EOI.
    pub const VIRTUALIZED_EOI: u16 = 45;
    /// LGDT, LIDT, SGDT or SIDT.
    pub const GDTR_OR_IDTR: u16 = 46;
    /// LLDT, LTR, SLDT or STR.
    pub const LDTR_OR_TR: u16 = 47;
    /// EPT violation.
    pub const EPT_VIOLATION: u16 = 48;
    /// EPT misconfiguration.
    pub const EPT_MISCONFIGURATION: u16 = 49;
    /// INVEPT.
    pub const INVEPT: u16 = 50;
    /// RDTSCP.
    pub const RDTSCP: u16 = 51;
    /// VMX-preemption timer.
    pub const PREEMPTION_TIMER: u16 = 52;
    /// INVVPID.
    pub const INVVPID: u16 = 53;
    /// WBINVD or WBNOINVD.
    pub const WBINVD: u16 = 54;
    /// XSETBV.
    pub const XSETBV: u16 = 55;
    /// Write to the virtual-APIC page.
    pub const APIC_WRITE: u16 = 56;
    /// RDRAND.
    pub const RDRAND: u16 = 57;
    /// INVPCID.
    pub const INVPCID: u16 = 58;
    /// VMFUNC.
    pub const VMFUNC: u16 = 59;
    /// ENCLS.
    pub const ENCLS: u16 = 60;
    /// RDSEED.
    pub const RDSEED: u16 = 61;
    /// Page-modification log full.
    pub const LOG_FULL: u16 = 62;
    /// XSAVES.
    pub const XSAVES: u16 = 63;
    /// XRSTORS.
    pub const XRSTORS: u16 = 64;
    /// PCONFIG.
    pub const PCONFIG: u16 = 65;
    /// Sub-page-permission event.
    pub const SUB_PAGE_PERMISSION: u16 = 66;
    /// UMWAIT.
    pub const UMWAIT: u16 = 67;
    /// TPAUSE.
    pub const TPAUSE: u16 = 68;
    /// LOADIWKEY.
    pub const LOADIWKEY: u16 = 69;
    /// ENCLV.
    pub const ENCLV: u16 = 70;
    /// ENQCMD whose PASID has no translation.
    pub const ENQCMD: u16 = 72;
    /// ENQCMDS whose PASID has no translation.
    pub const ENQCMDS: u16 = 73;
    /// Bus lock.
    pub const BUS_LOCK: u16 = 74;
    /// Instruction timeout.
    pub const INSTRUCTION_TIMEOUT: u16 = 75;
    /// SEAMCALL.
    pub const SEAMCALL: u16 = 76;
    /// TDCALL.
    pub const TDCALL: u16 = 77;
    /// RDMSRLIST.
    pub const RDMSRLIST: u16 = 78;
    /// WRMSRLIST.
    pub const WRMSRLIST: u16 = 79;
}

/// The exit-reason field. SDM vol. 3, table 25-18.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitReason(pub u32);

impl ExitReason {
    /// The basic exit reason, one of [`reason`].
    #[inline]
    pub const fn basic(self) -> u16 {
        self.0 as u16
    }

    /// Whether the entry failed: the guest did not run.
    #[inline]
    pub const fn entry_failed(self) -> bool {
        self.0 >> 31 != 0
    }
}

/// An access of a control register. SDM vol. 3, table 28-3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrAccess {
    /// MOV to CR `cr` from general-purpose register `register`.
    Write {
        /// Number of the control register: 0, 3, 4 or 8.
        cr: u8,
        /// Index of the general-purpose register.
        register: u8,
    },
    /// MOV from CR `cr` to general-purpose register `register`.
    Read {
        /// Number of the control register: 3 or 8.
        cr: u8,
        /// Index of the general-purpose register.
        register: u8,
    },
    /// CLTS.
    Clts,
    /// LMSW with this operand.
    Lmsw(u16),
}

impl From<u64> for CrAccess {
    #[inline]
    fn from(qualification: u64) -> Self {
        let cr = (qualification & 0xf) as u8;
        let register = (qualification >> 8 & 0xf) as u8;
        match qualification >> 4 & 3 {
            0 => Self::Write { cr, register },
            1 => Self::Read { cr, register },
            2 => Self::Clts,
            _ => Self::Lmsw((qualification >> 16) as u16),
        }
    }
}

/// A MOV to or from a debug register. SDM vol. 3, table 28-4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrAccess {
    /// Number of the debug register.
    pub dr: u8,
    /// MOV from it; else to it.
    pub read: bool,
    /// Index of the general-purpose register.
    pub register: u8,
}

impl From<u64> for DrAccess {
    #[inline]
    fn from(qualification: u64) -> Self {
        Self {
            dr: (qualification & 7) as u8,
            read: qualification & 1 << 4 != 0,
            register: (qualification >> 8 & 0xf) as u8,
        }
    }
}

/// An I/O instruction. SDM vol. 3, table 28-5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAccess {
    /// Port number.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub size: u8,
    /// Direction, and whether it is INS or OUTS.
    pub kind: PortKind,
    /// REP prefix.
    pub repeated: bool,
}

impl From<u64> for IoAccess {
    #[inline]
    fn from(qualification: u64) -> Self {
        let input = if qualification & 1 << 3 != 0 { PortKind::IN } else { PortKind::empty() };
        let string = if qualification & 1 << 4 != 0 { PortKind::STRING } else { PortKind::empty() };
        Self {
            port: (qualification >> 16) as u16,
            // 0, 1 and 3: one less than the size. Others are not used.
            size: (qualification & 3) as u8 + 1,
            kind: input.union(string),
            repeated: qualification & 1 << 5 != 0,
        }
    }
}

impl IoAccess {
    /// The access as [`crate::hw::Exit::Port`] has it.
    #[inline]
    pub const fn port_access(self, next_rip: u64) -> PortAccess {
        PortAccess { port: self.port, size: self.size, kind: self.kind, next_rip }
    }
}

/// An EPT violation. SDM vol. 3, table 28-7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EptViolation(u64);

impl From<u64> for EptViolation {
    #[inline]
    fn from(qualification: u64) -> Self {
        Self(qualification)
    }
}

impl EptViolation {
    const READ: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const FETCH: u64 = 1 << 2;
    /// Read, write, execute: what the EPT entries allow together. Execution for user addresses has bit 6, which is undefined
    /// without mode-based execute control, and with it tells nothing new: entries allow both kinds or none.
    const ALLOWED: u64 = 0b111 << 3;
    const LINEAR_ADDRESS_VALID: u64 = 1 << 7;
    const FINAL_ADDRESS: u64 = 1 << 8;
    const NMI_UNBLOCKING: u64 = 1 << 12;

    /// What happened, in neutral terms. A walk that sets accessed and dirty bits reports a read and a write.
    #[inline]
    pub const fn cause(self) -> FaultCause {
        let mut cause = FaultCause::empty();
        if self.0 & Self::ALLOWED != 0 {
            cause = cause.union(FaultCause::PRESENT);
        }
        if self.0 & Self::WRITE != 0 {
            cause = cause.union(FaultCause::WRITE);
        }
        if self.0 & Self::FETCH != 0 {
            cause = cause.union(FaultCause::EXECUTE);
        }
        // A load of PDPTEs by MOV to CR has no linear address: an access of the guest's tables too.
        if self.0 & Self::LINEAR_ADDRESS_VALID == 0 || self.0 & Self::FINAL_ADDRESS == 0 {
            cause = cause.union(FaultCause::TABLE_WALK);
        }
        cause
    }

    /// Whether the access was a data read.
    #[inline]
    pub const fn is_read(self) -> bool {
        self.0 & Self::READ != 0
    }

    /// Whether the guest-linear-address field is valid.
    #[inline]
    pub const fn has_linear_address(self) -> bool {
        self.0 & Self::LINEAR_ADDRESS_VALID != 0
    }

    /// Whether an IRET had unblocked NMIs before it hit this: blocking must be set again, unless an event was
    /// being delivered (28.2.3). A page-modification-log exit has the bit in the same place.
    #[inline]
    pub const fn nmi_unblocking(self) -> bool {
        self.0 & Self::NMI_UNBLOCKING != 0
    }
}

/// What asked for a task switch. SDM vol. 3, table 28-2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSwitchSource {
    /// CALL.
    Call,
    /// IRET.
    Iret,
    /// JMP.
    Jmp,
    /// A task gate in the IDT.
    TaskGate,
}

/// A task switch. SDM vol. 3, table 28-2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// Selector of the TSS of the new task.
    pub selector: u16,
    /// What asked for it.
    pub source: TaskSwitchSource,
}

impl From<u64> for TaskSwitch {
    #[inline]
    fn from(qualification: u64) -> Self {
        let source = match qualification >> 30 & 3 {
            0 => TaskSwitchSource::Call,
            1 => TaskSwitchSource::Iret,
            2 => TaskSwitchSource::Jmp,
            _ => TaskSwitchSource::TaskGate,
        };
        Self { selector: qualification as u16, source }
    }
}

/// How the APIC-access page was accessed. SDM vol. 3, table 28-6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicAccessKind {
    /// A data read of an instruction.
    Read,
    /// A data write of an instruction.
    Write,
    /// An instruction fetch.
    Fetch,
    /// An access during event delivery.
    Delivery,
    /// One by guest-physical address: during event delivery, or anything else.
    Physical,
    /// A value that the manual reserves.
    Reserved(u8),
}

/// An access of the APIC-access page. SDM vol. 3, table 28-6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicAccess {
    /// Offset in the page; not defined for [`ApicAccessKind::Physical`].
    pub offset: u16,
    /// How.
    pub kind: ApicAccessKind,
}

impl From<u64> for ApicAccess {
    #[inline]
    fn from(qualification: u64) -> Self {
        let kind = match qualification >> 12 & 0xf {
            0 => ApicAccessKind::Read,
            1 => ApicAccessKind::Write,
            2 => ApicAccessKind::Fetch,
            3 => ApicAccessKind::Delivery,
            10 | 15 => ApicAccessKind::Physical,
            kind => ApicAccessKind::Reserved(kind as u8),
        };
        Self { offset: (qualification & 0xfff) as u16, kind }
    }
}

/// VM-exit interruption information: the exception or interrupt that exited. SDM vol. 3, table 25-19.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interruption {
    info: u32,
    error: u32,
}

impl Interruption {
    /// NMI unblocking due to IRET.
    const NMI_UNBLOCKING: u32 = 1 << 12;

    /// From the information and error-code fields.
    #[inline]
    pub const fn new(info: u32, error: u32) -> Self {
        Self { info, error }
    }

    /// Vector of an exception, hardware's or software's, with its error code; none for an NMI, an interrupt
    /// or if the field is not valid.
    #[inline]
    pub const fn exception(self) -> Option<(u8, Option<u32>)> {
        match self.info >> TYPE_SHIFT & 7 {
            _ if self.info & VALID == 0 => None,
            TYPE_INTERRUPT | TYPE_NMI => None,
            _ if self.info & ERROR_CODE != 0 => Some((self.info as u8, Some(self.error))),
            _ => Some((self.info as u8, None)),
        }
    }

    /// Whether an NMI exited.
    #[inline]
    pub const fn is_nmi(self) -> bool {
        self.info & VALID != 0 && self.info >> TYPE_SHIFT & 7 == TYPE_NMI
    }

    /// Whether an IRET had unblocked NMIs before it raised this exception: blocking must be set again. The
    /// bit says nothing if an event was being delivered (IDT-vectoring information is valid) or for #DF
    /// (28.2.2).
    #[inline]
    pub const fn nmi_unblocking(self) -> bool {
        const DOUBLE_FAULT: u32 = 8;
        self.info & (VALID | Self::NMI_UNBLOCKING) == VALID | Self::NMI_UNBLOCKING
            && self.info & 0xff != DOUBLE_FAULT
    }
}

/// Decodes IDT-vectoring information (SDM vol. 3, table 25-20): the event whose delivery the exit
/// interrupted. INT n, INT1, INT3 and INTO give none: their events are raised again when the guest executes
/// the instruction again, for RIP still points to it (28.3.3).
#[inline]
pub const fn interrupted_event(info: u32, error: u32) -> Option<Event> {
    // The fields have one format (tables 25-17 and 25-20), and the types that are not injected again are not decoded.
    event::decode(info, error)
}

#[cfg(test)]
mod tests {
    use super::super::event;
    use super::*;

    #[test]
    fn reasons_tell_a_failed_entry() {
        assert_eq!(ExitReason(0x8000_0021).basic(), reason::INVALID_GUEST_STATE);
        assert!(ExitReason(0x8000_0021).entry_failed());
        assert!(!ExitReason(reason::HLT.into()).entry_failed());
        // Bits 27 and 29: enclave mode, exit from VMX root operation.
        assert_eq!(ExitReason(0x2800_000c).basic(), reason::HLT);
    }

    #[test]
    fn control_register_accesses() {
        assert_eq!(CrAccess::from(0x300), CrAccess::Write { cr: 0, register: 3 });
        assert_eq!(CrAccess::from(0xf08), CrAccess::Write { cr: 8, register: 15 });
        assert_eq!(CrAccess::from(0x713), CrAccess::Read { cr: 3, register: 7 });
        assert_eq!(CrAccess::from(0x20), CrAccess::Clts);
        assert_eq!(CrAccess::from(0x1234_0030), CrAccess::Lmsw(0x1234));
        assert_eq!(CrAccess::from(0x1234_0070), CrAccess::Lmsw(0x1234), "memory operand");
    }

    #[test]
    fn debug_register_accesses() {
        assert_eq!(DrAccess::from(0x107), DrAccess { dr: 7, read: false, register: 1 });
        assert_eq!(DrAccess::from(0xe16), DrAccess { dr: 6, read: true, register: 14 });
    }

    #[test]
    fn io_accesses_of_every_size_and_direction() {
        let out = IoAccess { port: 0x3f8, size: 1, kind: PortKind::empty(), repeated: false };
        assert_eq!(IoAccess::from(0x03f8_0000), out);
        assert_eq!(IoAccess::from(0x03f8_0040), out, "immediate operand");
        let input = IoAccess::from(0x0cfc_000b);
        assert_eq!((input.port, input.size, input.kind), (0xcfc, 4, PortKind::IN));
        let string = IoAccess::from(0xffff_0039);
        assert_eq!(string, IoAccess { port: 0xffff, size: 2, kind: PortKind::all(), repeated: true });
        assert_eq!(
            out.port_access(7),
            PortAccess { port: 0x3f8, size: 1, kind: PortKind::empty(), next_rip: 7 }
        );
    }

    #[test]
    fn ept_violations() {
        let cause = |qualification| EptViolation::from(qualification).cause();
        assert_eq!(cause(0x181), FaultCause::empty(), "read of nothing");
        assert_eq!(cause(0x182), FaultCause::WRITE);
        assert_eq!(cause(0x184), FaultCause::EXECUTE);
        assert_eq!(
            cause(0x1aa),
            FaultCause::PRESENT | FaultCause::WRITE,
            "write where read and execute are allowed"
        );
        assert_eq!(cause(0x1a2), FaultCause::PRESENT | FaultCause::WRITE, "execute-only");
        assert_eq!(cause(0x1c1), FaultCause::empty(), "bit 6 may be anything");
        assert_eq!(
            cause(0x0ab),
            FaultCause::PRESENT | FaultCause::WRITE | FaultCause::TABLE_WALK,
            "accessed bit of the guest's tables"
        );
        assert_eq!(cause(0x001), FaultCause::TABLE_WALK, "PDPTEs at MOV to CR3");
        assert!(EptViolation::from(0x181).is_read() && EptViolation::from(0x181).has_linear_address());
        assert!(!EptViolation::from(0x181).nmi_unblocking() && EptViolation::from(0x1181).nmi_unblocking());
        assert!(!EptViolation::from(1).has_linear_address());
    }

    #[test]
    fn task_switches() {
        for (bits, source) in [
            (0u64, TaskSwitchSource::Call),
            (1, TaskSwitchSource::Iret),
            (2, TaskSwitchSource::Jmp),
            (3, TaskSwitchSource::TaskGate),
        ] {
            assert_eq!(TaskSwitch::from(bits << 30 | 0x48), TaskSwitch { selector: 0x48, source });
        }
    }

    #[test]
    fn apic_accesses() {
        assert_eq!(ApicAccess::from(0x0b0), ApicAccess { offset: 0xb0, kind: ApicAccessKind::Read });
        assert_eq!(ApicAccess::from(0x10b0), ApicAccess { offset: 0xb0, kind: ApicAccessKind::Write });
        for (kind, expected) in [
            (2u64, ApicAccessKind::Fetch),
            (3, ApicAccessKind::Delivery),
            (10, ApicAccessKind::Physical),
            (15, ApicAccessKind::Physical),
            (4, ApicAccessKind::Reserved(4)),
        ] {
            assert_eq!(ApicAccess::from(kind << 12).kind, expected);
        }
    }

    #[test]
    fn exceptions_that_exit() {
        assert_eq!(Interruption::new(0x8000_0b0e, 2).exception(), Some((14, Some(2))));
        assert_eq!(Interruption::new(0x8000_0306, 2).exception(), Some((6, None)));
        assert_eq!(Interruption::new(0x8000_0603, 0).exception(), Some((3, None)), "INT3");
        assert_eq!(Interruption::new(0x8000_0501, 0).exception(), Some((1, None)), "INT1");
        assert_eq!(Interruption::new(0x8000_0202, 0).exception(), None);
        assert_eq!(Interruption::new(0x8000_0031, 0).exception(), None, "acknowledged interrupt");
        assert_eq!(Interruption::new(0x0000_0b0e, 0).exception(), None, "not valid");
        assert!(Interruption::new(0x8000_0202, 0).is_nmi() && !Interruption::new(0x202, 0).is_nmi());
        assert!(!Interruption::new(0x8000_0302, 0).is_nmi());
        assert!(Interruption::new(0x8000_1b0e, 0).nmi_unblocking());
        assert!(!Interruption::new(0x8000_0b0e, 0).nmi_unblocking());
        assert!(!Interruption::new(0x8000_1b08, 0).nmi_unblocking(), "not defined for a double fault");
    }

    #[test]
    fn interrupted_events_are_injected_again() {
        for event in [
            Event::Interrupt(0x20),
            Event::Nmi,
            Event::Exception(14, Some(0x1f)),
            Event::Exception(6, None),
            Event::Exception(1, None),
        ] {
            let (info, error) = event::encode(event, true);
            assert_eq!(interrupted_event(info, error), Some(event));
        }
        // Bit 12 is not defined there.
        assert_eq!(interrupted_event(0x8000_1031, 0), Some(Event::Interrupt(0x31)));
    }

    #[test]
    fn soft_events_are_executed_again_not_injected_again() {
        for info in [0x8000_0480, 0x8000_0501, 0x8000_0603, 0x8000_0604, 0x8000_0700, 0x0000_0020] {
            assert_eq!(interrupted_event(info, 0), None, "{info:#x}");
        }
    }
}
