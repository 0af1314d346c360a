//! From exit reasons to the vendor-neutral [`Exit`]. SDM vol. 3, 28.2 and appendix C.
#![allow(unsafe_code)] // A host NMI that became an exit is handed to its handler.

use super::cache::{Hot, AT_COMPLETION};
use super::controls::Interruptibility;
use super::event::{TYPE_PRIVILEGED_EXCEPTION, TYPE_SHIFT, VALID};
use super::exit::{
    reason, CrAccess, EptViolation, Interruption, IoAccess, TaskSwitch as Switch, TaskSwitchSource,
};
use super::real_mode::Form;
use super::region::Current;
use super::vcpu::VmxVcpu;
use super::vmcs::{self, Fields};
use crate::hw::{
    CpuPageFault, Exit, FaultCause, HwVcpu, Invlpg, SecondStageFault, TaskSwitch, TaskSwitchCause,
};

const BREAKPOINT: u8 = 3;
const OVERFLOW: u8 = 4;
const DEBUG: u8 = 1;
const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;
const MACHINE_CHECK: u8 = 18;
/// DR6: what a debug exception reports anew each time, B3 to B0 and BD, BS, BT.
const DR6_CAUSES: u64 = 0xf | 7 << 13;
/// DR7.GD: general detection.
const DR7_GD: u64 = 1 << 13;

/// Decodes the exit of `vcpu` with this basic reason.
#[inline(always)]
pub(super) fn exit(vcpu: &mut VmxVcpu, vmcs: Current, basic: u16) -> Exit {
    vcpu.length = 0;
    match basic {
        reason::EPT_VIOLATION => second_stage(vcpu, vmcs),
        reason::IO => {
            instruction(vcpu, vmcs);
            vcpu.cache.fill([Hot::Dr7], &vmcs);
            let access = IoAccess::from(vmcs.read(vmcs::EXIT_QUALIFICATION));
            Exit::Port(access.port_access(next_rip(vcpu, vcpu.length)))
        }
        reason::RDMSR => {
            instruction(vcpu, vmcs);
            vcpu.cache.fill([Hot::Cr0], &vmcs);
            Exit::Msr { write: false }
        }
        reason::WRMSR => {
            instruction(vcpu, vmcs);
            vcpu.cache.fill([Hot::Cr0], &vmcs);
            Exit::Msr { write: true }
        }
        reason::CPUID => {
            instruction(vcpu, vmcs);
            vcpu.cache.fill([Hot::Cr4], &vmcs);
            Exit::Cpuid
        }
        reason::HLT => {
            instruction(vcpu, vmcs);
            Exit::Hlt
        }
        reason::INTERRUPT_WINDOW => Exit::InterruptWindow,
        reason::NMI_WINDOW => Exit::NmiWindow,
        reason::PREEMPTION_TIMER => Exit::Deadline,
        reason::CR_ACCESS => {
            instruction(vcpu, vmcs);
            match CrAccess::from(vmcs.read(vmcs::EXIT_QUALIFICATION)) {
                CrAccess::Write { cr, register } => Exit::WriteCr { cr, gpr: Some(register) },
                CrAccess::Read { cr, register } => Exit::ReadCr { cr, gpr: Some(register) },
                CrAccess::Clts | CrAccess::Lmsw(_) => Exit::Emulate,
            }
        }
        reason::INVLPG => {
            instruction(vcpu, vmcs);
            Exit::InvalidatePage(Invlpg { known: true, linear: vmcs.read(vmcs::EXIT_QUALIFICATION) })
        }
        reason::VIRTUALIZED_EOI => {
            // A trap: RIP is behind the instruction (SDM vol. 3, 30.1.4).
            Exit::ApicEoi(vmcs.read(vmcs::EXIT_QUALIFICATION) as u8)
        }
        reason::EXCEPTION_OR_NMI => exception_or_nmi(vcpu),
        _ => rare(vcpu, basic),
    }
}

#[cold]
#[inline(never)]
fn rare(vcpu: &mut VmxVcpu, basic: u16) -> Exit {
    vcpu.length = vcpu.region.read(vmcs::EXIT_INSTRUCTION_LENGTH).into();
    vcpu.timer_runs = 0;
    match basic {
        reason::PAUSE => Exit::Pause,
        reason::XSETBV => Exit::Xsetbv,
        reason::INVD | reason::WBINVD => Exit::CacheFlush,
        reason::RDPMC => Exit::Refused,
        reason::EXTERNAL_INTERRUPT | reason::INIT | reason::SIPI | reason::IO_SMI | reason::OTHER_SMI => {
            Exit::HostInterrupt
        }
        reason::TRIPLE_FAULT => Exit::Shutdown,
        reason::TASK_SWITCH => task_switch(vcpu),
        reason::EPT_MISCONFIGURATION => {
            // Nothing but the address is reported.
            vcpu.length = 0;
            let gpa = vcpu.region.read(vmcs::GUEST_PHYSICAL_ADDRESS);
            Exit::SecondStage(SecondStageFault { gpa, linear: None, cause: FaultCause::RESERVED })
        }
        reason::APIC_WRITE => {
            // A trap, too; the value is in the page (SDM vol. 3, 30.4.3.3).
            vcpu.length = 0;
            let offset = vcpu.region.read(vmcs::EXIT_QUALIFICATION) as u16;
            Exit::ApicWrite { register: (offset >> 4) as u8, value: vcpu.apic_page_word(offset) }
        }
        reason::LOG_FULL => {
            vcpu.length = 0;
            // The same bit as that of an EPT violation.
            let violation = EptViolation::from(vcpu.region.read(vmcs::EXIT_QUALIFICATION));
            if violation.nmi_unblocking() && vcpu.vectoring & VALID == 0 {
                block_nmis_again(vcpu);
            }
            Exit::DirtyLogFull
        }
        reason::MOV_DR
        | reason::INVPCID
        | reason::RDTSC
        | reason::RDTSCP
        | reason::GDTR_OR_IDTR
        | reason::LDTR_OR_TR => Exit::Emulate,
        reason::GETSEC
        | reason::RSM
        | reason::VMCALL..=reason::VMXON
        | reason::MWAIT
        | reason::MONITOR
        | reason::INVEPT
        | reason::INVVPID
        | reason::VMFUNC
        | reason::ENCLS
        | reason::ENCLV
        | reason::XSAVES
        | reason::XRSTORS
        | reason::PCONFIG
        | reason::UMWAIT
        | reason::TPAUSE
        | reason::LOADIWKEY
        | reason::SEAMCALL
        | reason::TDCALL => Exit::Undefined,
        other => Exit::Unknown(other.into()),
    }
}

/// Reads what the end of the instruction that exited needs.
#[inline(always)]
fn instruction(vcpu: &mut VmxVcpu, vmcs: Current) {
    vcpu.length = vmcs.read(vmcs::EXIT_INSTRUCTION_LENGTH).into();
    vcpu.cache.fill(AT_COMPLETION, &vmcs);
}

/// Where the instruction that exited ends, being `length` bytes long.
#[inline]
fn next_rip(vcpu: &VmxVcpu, length: u64) -> u64 {
    let next = vcpu.rip().wrapping_add(length);
    // Outside 64-bit mode RIP has 32 bits. CS.L is bit 13 of its access rights, and counts in long mode alone.
    let long = vcpu.efer() & crate::vm::msr::EFER_LMA != 0
        && vcpu.cache.get(Hot::CsRights, &vcpu.region) & u64::from(super::access_rights::LONG) != 0;
    if long {
        next
    } else {
        next & 0xffff_ffff
    }
}

/// NMIs are blocked again if an IRET had unblocked them when it exited (SDM vol. 3, 28.2.3): it will be executed again.
fn block_nmis_again(vcpu: &mut VmxVcpu) {
    let state = vcpu.interruptibility();
    vcpu.set_interruptibility(state | Interruptibility::NMI);
}

#[inline(always)]
fn second_stage(vcpu: &mut VmxVcpu, vmcs: Current) -> Exit {
    // Pages may have to be zeroed.
    vcpu.timer_runs = 0;
    let violation = EptViolation::from(vmcs.read(vmcs::EXIT_QUALIFICATION));
    if violation.nmi_unblocking() && vcpu.vectoring & VALID == 0 {
        block_nmis_again(vcpu);
    }
    let gpa = vmcs.read(vmcs::GUEST_PHYSICAL_ADDRESS);
    let linear = violation.has_linear_address().then(|| vmcs.read(vmcs::GUEST_LINEAR_ADDRESS));
    Exit::SecondStage(SecondStageFault { gpa, linear, cause: violation.cause() })
}

#[cold]
fn exception_or_nmi(vcpu: &mut VmxVcpu) -> Exit {
    let info = vcpu.region.read(vmcs::EXIT_INTERRUPTION);
    let interruption = Interruption::new(info, vcpu.region.read(vmcs::EXIT_INTERRUPTION_ERROR));
    if interruption.is_nmi() {
        host_nmi();
        return Exit::HostInterrupt;
    }
    let Some((vector, error)) = interruption.exception() else { return Exit::Unknown(u64::from(info) << 32) };
    if interruption.nmi_unblocking() && vcpu.vectoring & VALID == 0 {
        block_nmis_again(vcpu);
    }
    match vector {
        PAGE_FAULT if vcpu.controls.shadow() => {
            let linear = vcpu.region.read(vmcs::EXIT_QUALIFICATION);
            Exit::PageFault(CpuPageFault { code: error.unwrap_or(0) as u16, linear })
        }
        MACHINE_CHECK => Exit::MachineCheck,
        DEBUG => {
            if info >> TYPE_SHIFT & 7 == TYPE_PRIVILEGED_EXCEPTION {
                // INT1 is a trap: its handler returns behind it, but the exit leaves RIP at it (SDM vol. 3, 28.3.3).
                let next = next_rip(vcpu, vcpu.region.read(vmcs::EXIT_INSTRUCTION_LENGTH).into());
                vcpu.set_rip(next);
                vcpu.clear_shadow();
            }
            // The exit forgets a step that was pending, which an entry in a shadow wants to see (27.3.1.5).
            vcpu.settle_shadow();
            // The exit comes before DR6 is written; the qualification says what would be (SDM vol. 3, table 28-1).
            let causes = vcpu.region.read(vmcs::EXIT_QUALIFICATION) & DR6_CAUSES;
            let dr6 = vcpu.dr6();
            vcpu.set_dr6(dr6 & !0xf | causes);
            // Nor is general detection off yet, as it is in the handler.
            let dr7 = vcpu.dr7();
            if dr7 & DR7_GD != 0 {
                vcpu.cache.set(Hot::Dr7, dr7 & !DR7_GD);
            }
            Exit::Exception(DEBUG, None)
        }
        // Real mode as virtual-8086 mode: what only CPL 0 may do is #GP there, and INT3 and INTO are to return behind
        // themselves. The emulator knows what the guest gets.
        GENERAL_PROTECTION | BREAKPOINT | OVERFLOW if vcpu.form == Form::Vm86 => Exit::Emulate,
        _ => Exit::Exception(vector, error),
    }
}

/// Hands an NMI that ended the guest's run to the host's handler. Its IRET ends the blocking of NMIs, which the exit left
/// behind (SDM vol. 3, 28.5.5).
fn host_nmi() {
    // SAFETY: the IDT's gate for NMIs is that of the hardware's own.
    unsafe { core::arch::asm!("int 2") };
}

#[cold]
fn task_switch(vcpu: &mut VmxVcpu) -> Exit {
    let Switch { selector, source } = Switch::from(vcpu.region.read(vmcs::EXIT_QUALIFICATION));
    let cause = match source {
        TaskSwitchSource::Call => TaskSwitchCause::Call,
        TaskSwitchSource::Iret => TaskSwitchCause::Iret,
        TaskSwitchSource::Jmp => TaskSwitchCause::Jump,
        TaskSwitchSource::TaskGate => TaskSwitchCause::Gate,
    };
    // An interrupt or a fault comes back to the instruction itself; INT n, INT3 and INTO behind it (28.2.1).
    let by_hardware = matches!(vcpu.vectoring >> TYPE_SHIFT & 7, 0 | 2 | 3);
    let stays = source == TaskSwitchSource::TaskGate && vcpu.vectoring & VALID != 0 && by_hardware;
    let next_rip = if stays { vcpu.rip() } else { next_rip(vcpu, vcpu.length) };
    Exit::TaskSwitch(TaskSwitch { selector, cause, next_rip: Some(next_rip) })
}
