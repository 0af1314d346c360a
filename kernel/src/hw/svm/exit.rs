//! From #VMEXIT codes to the vendor-neutral [`Exit`]. AMD APM vol. 2, appendix C.
use crate::hw::{CpuPageFault, Event, Exit, FaultCause, Invlpg, PortAccess, PortKind, SecondStageFault};
#[cfg(any(target_os = "none", test))]
use crate::hw::{TaskSwitch, TaskSwitchCause};

/// Exit codes. APM table C-1.
pub mod code {
    /// Read of CR0; CRn is this plus n.
    pub const CR0_READ: u32 = 0x00;
    /// Read of CR3.
    pub const CR3_READ: u32 = 0x03;
    /// Read of CR4.
    pub const CR4_READ: u32 = 0x04;
    /// Read of CR15.
    pub const CR15_READ: u32 = 0x0f;
    /// Write of CR0; CRn is this plus n.
    pub const CR0_WRITE: u32 = 0x10;
    /// Write of CR3.
    pub const CR3_WRITE: u32 = 0x13;
    /// Write of CR4.
    pub const CR4_WRITE: u32 = 0x14;
    /// Write of CR8.
    pub const CR8_WRITE: u32 = 0x18;
    /// Write of CR15.
    pub const CR15_WRITE: u32 = 0x1f;
    /// Exception vector 0; vector n is this plus n.
    pub const EXCEPTION: u32 = 0x40;
    /// #DB.
    pub const DEBUG: u32 = EXCEPTION + 1;
    /// #PF.
    pub const PAGE_FAULT: u32 = EXCEPTION + 14;
    /// Exception vector 31.
    pub const EXCEPTION_LAST: u32 = 0x5f;
    /// Physical interrupt.
    pub const INTR: u32 = 0x60;
    /// Physical NMI.
    pub const NMI: u32 = 0x61;
    /// Physical SMI.
    pub const SMI: u32 = 0x62;
    /// Physical INIT.
    pub const INIT: u32 = 0x63;
    /// Interrupt window.
    pub const VINTR: u32 = 0x64;
    /// RDPMC.
    pub const RDPMC: u32 = 0x6f;
    /// CPUID.
    pub const CPUID: u32 = 0x72;
    /// RSM.
    pub const RSM: u32 = 0x73;
    /// IRET.
    pub const IRET: u32 = 0x74;
    /// INVD.
    pub const INVD: u32 = 0x76;
    /// PAUSE.
    pub const PAUSE: u32 = 0x77;
    /// HLT.
    pub const HLT: u32 = 0x78;
    /// INVLPG.
    pub const INVLPG: u32 = 0x79;
    /// INVLPGA.
    pub const INVLPGA: u32 = 0x7a;
    /// Port access.
    pub const IOIO: u32 = 0x7b;
    /// MSR access.
    pub const MSR: u32 = 0x7c;
    /// Hardware task switch.
    pub const TASK_SWITCH: u32 = 0x7d;
    /// FERR freeze.
    pub const FERR_FREEZE: u32 = 0x7e;
    /// Shutdown.
    pub const SHUTDOWN: u32 = 0x7f;
    /// VMRUN.
    pub const VMRUN: u32 = 0x80;
    /// VMMCALL.
    pub const VMMCALL: u32 = 0x81;
    /// SKINIT.
    pub const SKINIT: u32 = 0x86;
    /// ICEBP.
    pub const ICEBP: u32 = 0x88;
    /// WBINVD.
    pub const WBINVD: u32 = 0x89;
    /// MONITOR.
    pub const MONITOR: u32 = 0x8a;
    /// MWAIT, conditional form one above.
    pub const MWAIT: u32 = 0x8b;
    /// MWAIT, if the monitor is armed.
    pub const MWAIT_ARMED: u32 = 0x8c;
    /// XSETBV.
    pub const XSETBV: u32 = 0x8d;
    /// RDPRU.
    pub const RDPRU: u32 = 0x8e;
    /// INVPCID.
    pub const INVPCID: u32 = 0xa2;
    /// Nested page fault.
    pub const NPF: u32 = 0x400;
    /// Invalid guest state, as the low half of -1.
    pub const INVALID: u32 = u32::MAX;
    /// Nobody's code but ours: no run was tried, for the CPU is not prepared.
    pub const NOT_ENABLED: u32 = 0x7fff_ffff;
}

/// #DB, #AC and #MC: the exceptions that Umbra intercepts. The first two can be raised by their own delivery,
/// without end and without an interrupt window (CVE-2015-8104, CVE-2015-5307).
pub const INTERCEPTED_EXCEPTIONS: u32 = 1 << DEBUG | 1 << ALIGNMENT_CHECK | 1 << MACHINE_CHECK;
const DEBUG: u8 = 1;
const ALIGNMENT_CHECK: u8 = 17;
const MACHINE_CHECK: u8 = 18;

/// Decodes an exit from its code and the two words of exit information.
#[inline(always)]
pub fn decode(exit_code: u64, info_1: u64, info_2: u64) -> Exit {
    match exit_code as u32 {
        code::NPF => Exit::SecondStage(nested_page_fault(info_1, info_2)),
        code::IOIO => Exit::Port(port_access(info_1, info_2)),
        code::MSR => Exit::Msr { write: info_1 & 1 != 0 },
        code::CPUID => Exit::Cpuid,
        code::HLT => Exit::Hlt,
        code::VINTR => Exit::InterruptWindow,
        code::INTR | code::NMI | code::SMI | code::INIT | code::FERR_FREEZE => Exit::HostInterrupt,
        code::PAUSE => Exit::Pause,
        // The vCPU looks at the code itself, too.
        code::IRET => Exit::NmiWindow,
        // Those that there are: single values go into one table, a range takes comparisons.
        code @ (code::CR0_WRITE | code::CR3_WRITE | code::CR4_WRITE | code::CR8_WRITE) => {
            Exit::WriteCr { cr: (code - code::CR0_WRITE) as u8, gpr: None }
        }
        code::PAGE_FAULT => Exit::PageFault(CpuPageFault { code: info_1 as u16, linear: info_2 }),
        // EXITINFO1 holds the address only with decode assists (APM 15.8.1): zero else, as for address zero.
        code::INVLPG => Exit::InvalidatePage(Invlpg { known: false, linear: 0 }),
        code @ (code::CR0_READ | code::CR3_READ | code::CR4_READ) => {
            Exit::ReadCr { cr: (code - code::CR0_READ) as u8, gpr: None }
        }
        code::INVPCID => Exit::Emulate,
        code @ code::EXCEPTION..=code::EXCEPTION_LAST => exception((code - code::EXCEPTION) as u8, info_1),
        code::XSETBV => Exit::Xsetbv,
        code::INVD | code::WBINVD => Exit::CacheFlush,
        code::RDPMC => Exit::Refused,
        code @ code::CR0_WRITE..=code::CR15_WRITE => {
            Exit::WriteCr { cr: (code - code::CR0_WRITE) as u8, gpr: None }
        }
        code @ code::CR0_READ..=code::CR15_READ => {
            Exit::ReadCr { cr: (code - code::CR0_READ) as u8, gpr: None }
        }
        code::RSM
        | code::INVLPGA
        | code::VMRUN..=code::SKINIT
        | code::MONITOR
        | code::MWAIT
        | code::MWAIT_ARMED
        | code::RDPRU => Exit::Undefined,
        code::SHUTDOWN => Exit::Shutdown,
        code::INVALID => Exit::InvalidState("VMRUN refused the guest's state"),
        code::NOT_ENABLED => Exit::InvalidState("SVM is not enabled on this CPU"),
        _ => Exit::Unknown(exit_code),
    }
}

fn exception(vector: u8, error_code: u64) -> Exit {
    match vector {
        MACHINE_CHECK => Exit::MachineCheck,
        // EXITINFO1 holds the error code of those that have one (APM 15.12).
        8 | 10..=14 | 17 | 21 | 29 | 30 => Exit::Exception(vector, Some(error_code as u32)),
        _ => Exit::Exception(vector, None),
    }
}

/// EXITINFO1 of a nested page fault: a #PF error code, bit 32 the final address, bit 33 a table walk. APM 15.25.6.
#[inline(always)]
fn nested_page_fault(info: u64, gpa: u64) -> SecondStageFault {
    let table_walk = (info >> 33 & 1) as u8 * FaultCause::TABLE_WALK.bits();
    let code = FaultCause::all().bits() & !FaultCause::TABLE_WALK.bits() & info as u8;
    SecondStageFault { gpa, linear: None, cause: FaultCause::from_bits_retain(code | table_walk) }
}

/// EXITINFO1 and EXITINFO2 of a task switch: the new TSS, and in bits 36 and 38 whether IRET or a far jump started it. What
/// neither did, CALL or the delivery of an event through a task gate did; the second shows in EXITINTINFO. APM 15.14.1.
#[cfg(any(target_os = "none", test))]
pub(super) fn task_switch(info_1: u64, info_2: u64) -> TaskSwitch {
    let cause = if info_2 >> 36 & 1 != 0 {
        TaskSwitchCause::Iret
    } else if info_2 >> 38 & 1 != 0 {
        TaskSwitchCause::Jump
    } else {
        TaskSwitchCause::Call
    };
    TaskSwitch { selector: info_1 as u16, cause, next_rip: None }
}

/// EXITINFO1 and EXITINFO2 of a port access. APM 15.10.2.
#[inline(always)]
fn port_access(info: u64, next_rip: u64) -> PortAccess {
    PortAccess {
        port: (info >> 16) as u16,
        // SZ32, SZ16, SZ8 are bits 6, 5, 4: as a number 4, 2, 1.
        size: (info >> 4 & 7) as u8,
        // Bit 0 is the direction, bit 2 says string: where `PortKind` has them.
        kind: PortKind::from_bits_truncate(info as u8),
        next_rip,
    }
}

/// Valid bit of EVENTINJ and EXITINTINFO. APM 15.20.
pub(super) const EVENT_VALID: u64 = 1 << 31;
/// An error code is in bits 63:32.
const EVENT_ERROR_VALID: u64 = 1 << 11;
const TYPE_INTERRUPT: u64 = 0;
const TYPE_NMI: u64 = 2;
const TYPE_EXCEPTION: u64 = 3;

/// Encodes an event for EVENTINJ.
#[inline]
pub fn encode_event(event: Event) -> u64 {
    match event {
        Event::Interrupt(vector) => EVENT_VALID | TYPE_INTERRUPT << 8 | u64::from(vector),
        Event::Nmi => EVENT_VALID | TYPE_NMI << 8 | 2,
        Event::Exception(vector, None) => EVENT_VALID | TYPE_EXCEPTION << 8 | u64::from(vector),
        Event::Exception(vector, Some(error)) => {
            EVENT_VALID | EVENT_ERROR_VALID | TYPE_EXCEPTION << 8 | u64::from(vector) | u64::from(error) << 32
        }
    }
}

/// Decodes EXITINTINFO. Software interrupts, and #BP and #OF which only software raises, give none: they are
/// raised again when the guest executes their instruction again, for RIP still points to it.
#[inline]
pub fn interrupted_event(info: u64) -> Option<Event> {
    if info & EVENT_VALID == 0 {
        return None;
    }
    let vector = info as u8;
    match info >> 8 & 7 {
        TYPE_INTERRUPT => Some(Event::Interrupt(vector)),
        TYPE_NMI => Some(Event::Nmi),
        TYPE_EXCEPTION if vector != 3 && vector != 4 => {
            Some(Event::Exception(vector, (info & EVENT_ERROR_VALID != 0).then_some((info >> 32) as u32)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_accesses_of_every_size_and_direction() {
        // OUT DX, AL to 0x3f8: size bit 4; IN EAX: bit 6 and bit 0; REP INSW: bits 5, 3, 2, 0.
        let out = decode(0x7b, 0x03f8 << 16 | 1 << 4, 0x1001);
        assert_eq!(
            out,
            Exit::Port(PortAccess { port: 0x3f8, size: 1, kind: PortKind::empty(), next_rip: 0x1001 })
        );
        let Exit::Port(input) = decode(0x7b, 0x0cfc << 16 | 1 << 6 | 1, 2) else { panic!() };
        assert_eq!((input.kind, input.size), (PortKind::IN, 4));
        let Exit::Port(string) = decode(0x7b, 0xffff << 16 | 1 << 5 | 0b1101, 2) else { panic!() };
        assert_eq!((string.kind, string.size, string.port), (PortKind::all(), 2, 0xffff));
    }

    #[test]
    fn invalid_state_arrives_as_32_or_64_bits() {
        for code in [u64::MAX, 0xffff_ffff] {
            assert!(matches!(decode(code, 0, 0), Exit::InvalidState(_)));
        }
    }

    #[test]
    fn nested_page_fault_causes() {
        let write_in_walk = decode(0x400, 0x2_0000_0007, 0xfee0_0000);
        assert_eq!(
            write_in_walk,
            Exit::SecondStage(SecondStageFault {
                gpa: 0xfee0_0000,
                linear: None,
                cause: FaultCause::PRESENT | FaultCause::WRITE | FaultCause::TABLE_WALK,
            })
        );
        let Exit::SecondStage(fetch) = decode(0x400, 0x1_0000_0014, 0) else { panic!() };
        assert_eq!(fetch.cause, FaultCause::EXECUTE);
    }

    #[test]
    fn events_survive_the_round_trip() {
        for event in [
            Event::Interrupt(0x20),
            Event::Interrupt(255),
            Event::Nmi,
            Event::Exception(14, Some(0x1f)),
            Event::Exception(6, None),
            Event::Exception(13, Some(u32::MAX)),
        ] {
            assert_eq!(interrupted_event(encode_event(event)), Some(event));
        }
    }

    #[test]
    fn soft_events_are_executed_again_not_injected_again() {
        let software_interrupt = EVENT_VALID | 4 << 8 | 0x80;
        assert_eq!(interrupted_event(software_interrupt), None);
        assert_eq!(interrupted_event(encode_event(Event::Exception(3, None))), None);
        assert_eq!(interrupted_event(encode_event(Event::Exception(4, None))), None);
        assert_eq!(interrupted_event(0x20), None, "not valid");
    }

    #[test]
    fn virtualization_instructions_do_not_exist_for_the_guest() {
        for code in 0x80..=0x86 {
            assert_eq!(decode(code, 0, 0), Exit::Undefined);
        }
    }

    #[test]
    fn a_task_switch_tells_its_cause() {
        for (info_2, cause) in [
            (1 << 36, TaskSwitchCause::Iret),
            (1 << 38, TaskSwitchCause::Jump),
            (1 << 44, TaskSwitchCause::Call),
        ] {
            assert_eq!(task_switch(0x48, info_2), TaskSwitch { selector: 0x48, cause, next_rip: None });
        }
    }

    #[test]
    fn exits_of_shadow_tables() {
        assert_eq!(decode(0x4e, 7, 0x1234), Exit::PageFault(CpuPageFault { code: 7, linear: 0x1234 }));
        assert_eq!(decode(3, 0, 0), Exit::ReadCr { cr: 3, gpr: None });
        assert_eq!(decode(0x79, 0, 0), Exit::InvalidatePage(Invlpg { known: false, linear: 0 }));
        assert_eq!(decode(0xa2, 0, 0), Exit::Emulate);
    }

    #[test]
    fn no_exit_code_panics() {
        for code in (0..0x500).chain([u64::MAX - 1, u64::MAX, 1 << 40]) {
            decode(code, u64::MAX, u64::MAX);
            decode(code, 0, 0);
        }
    }
}
