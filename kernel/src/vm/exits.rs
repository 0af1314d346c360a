//! What each exit does. Vendor-neutral; the hot ones are CPUID, MSRs, ports, page faults, HLT.

use super::breakpoints;
use super::control_regs::{
    self, GeneralProtection, CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_DE, CR4_PCIDE, CR4_PGE,
};
use super::cpuid::{CpuState as CpuidState, CpuidLeaf, Vendor as CpuVendor};
use super::emulate::{self, Attributes, Fault, KnownOperand, Mode, Outcome};
use super::events::{DR6_BS, SINGLE_STEP};
use super::exceptions::{DB, GP, PF, UD};
use super::guest::{Board, Guest};
use super::msr::{index, switched_is_valid, Gp, MsrContext, MsrEffect, MsrState, EFER_LMA};
use super::paging::{PageFault, Resolution, PF_FETCH, PF_USER};
use super::pvclock;
use super::report::{End, StopReason};
use super::vcpu::{Activity, Core, Vcpu};
use super::view::View;
use super::{invlpg, mov_cr};
use crate::cpu::tsc;
use crate::devices::apic_bus::{ApicSink, Requests};
use crate::devices::chipset::ChipsetEvent;
use crate::devices::lapic::{ApicAction, Deadline, X2APIC_MSR_FIRST, X2APIC_MSR_LAST};
use crate::hw::extended;
use crate::hw::gpr::{RAX, RBX, RCX, RDX};
use crate::hw::{
    CpuPageFault, CpuState, Event, Exit, FaultCause, HwVcpu, Invlpg, PortAccess, PortKind, SecondStageFault,
    SegmentName, TaskSwitch, TaskSwitchCause, Vendor,
};

const CS_LONG: u16 = crate::hw::Segment::LONG;
/// Exits after which a vCPU looks whether its time is up, whatever the exits were.
pub(super) const ATTENTION_INTERVAL: u64 = 1024;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;

const CPUID: [u8; 2] = [0x0f, 0xa2];
const RDMSR: [u8; 2] = [0x0f, 0x32];
const WRMSR: [u8; 2] = [0x0f, 0x30];

/// Instruction bytes at RIP, as far as they could be fetched.
pub(super) type InsnBytes = ([u8; 16], usize);

impl<V: Vendor> Vcpu<V> {
    /// Handles an exit. Whatever cannot be handled ends the VM.
    #[inline(always)]
    pub(super) fn handle(&mut self, guest: &Guest<V>, exit: Exit) {
        match exit {
            Exit::Cpuid => self.cpuid(guest),
            Exit::Msr { write: true } => self.wrmsr(guest),
            Exit::Msr { write: false } => self.rdmsr(guest),
            Exit::Port(access) if access.kind.contains(PortKind::STRING) => self.emulate(guest, None),
            Exit::Port(access) => self.port(guest, access),
            Exit::SecondStage(fault) => self.second_stage_fault(guest, fault),
            Exit::Hlt => {
                if self.skip_rare(guest) {
                    self.core.activity = Activity::Halted;
                    self.core.attention = true;
                }
            }
            Exit::HostInterrupt => {
                crate::cpu::interrupts::let_in();
                self.core.attention = true;
            }
            Exit::InterruptWindow | Exit::NmiWindow | Exit::Deadline => self.core.attention = true,
            Exit::Pause => {
                self.skip_rare(guest);
                self.core.gives_way = true;
                self.core.attention = true;
            }
            Exit::PageFault(fault) => self.page_fault(guest, fault),
            Exit::InvalidatePage(invlpg) => self.invalidate_page(guest, invlpg),
            Exit::ReadCr { cr, gpr } => self.read_cr(guest, cr, gpr),
            Exit::WriteCr { cr, gpr } => self.write_cr(guest, cr, gpr),
            Exit::Emulate => {
                // The next instruction may have to be emulated as well: no entry opens a window in between.
                self.core.attention = true;
                self.emulate(guest, None);
            }
            Exit::TaskSwitch(switch) => self.task_switch(guest, switch),
            Exit::Xsetbv => self.xsetbv(guest),
            Exit::CacheFlush => {
                // Both need CPL 0, which the processor checked before the intercept (APM table 15-7).
                self.skip_rare(guest);
            }
            Exit::ApicEoi(vector) => self.core.apic_eoi(guest, vector),
            Exit::ApicWrite { register, value } => {
                let msr = X2APIC_MSR_FIRST + u32::from(register);
                // The processor has checked what raises an exception, and completed the instruction.
                let _ = self.core.write_msr(guest, msr, value.into());
            }
            Exit::DirtyLogFull => {
                self.stop(
                    guest,
                    StopReason::InvalidState("the log of dirty pages is full, but was not asked for"),
                );
            }
            Exit::Undefined => self.raise(guest, UD, None),
            Exit::Refused => self.raise(guest, GP, Some(0)),
            Exit::Exception(vector, error_code) => self.raise(guest, vector, error_code),
            Exit::MachineCheck => {
                // The host's handler decides whether Umbra can go on; this VM cannot.
                crate::cpu::machine_check::acknowledge();
                self.stop(guest, StopReason::MachineCheck);
            }
            Exit::NoTableMemory => self.stop(guest, StopReason::NoTableMemory),
            Exit::Shutdown => self.stop(guest, StopReason::TripleFault),
            Exit::InvalidState(why) => self.stop(guest, StopReason::InvalidState(why)),
            Exit::Unknown(code) => self.stop(guest, StopReason::UnknownExit(code)),
        }
    }

    /// Raises an exception in the guest.
    pub(super) fn raise(&mut self, guest: &Guest<V>, vector: u8, error_code: Option<u32>) {
        self.core.attention = true;
        // Real mode pushes no error codes (APM vol. 2, 8.4.1).
        let error_code = error_code.filter(|_| self.core.hw.cr0() & CR0_PE != 0);
        if self.core.events.raise(vector, error_code).is_err() {
            self.stop(guest, StopReason::TripleFault);
        }
    }

    /// The same of an exception with an error code. If nothing else waits, the next entry delivers it without a look
    /// at anything else.
    #[inline]
    fn raise_at_once(&mut self, guest: &Guest<V>, vector: u8, error_code: u32) {
        let core = &mut self.core;
        // Where the hardware might not deliver it, or the processor's state is not as it says, there is more to do.
        let plain = core.hw.efer() & EFER_LMA != 0 && !core.hw.in_shadow();
        if plain && !core.attention && core.events.is_idle() {
            core.hw.inject(Event::Exception(vector, Some(error_code)));
        } else {
            self.raise(guest, vector, Some(error_code));
        }
    }

    /// Goes on behind the intercepted instruction, which is `opcode` and mostly no more. False if it could not be fetched
    /// again; then the guest takes the fault of that fetch, and the instruction has no effect.
    #[inline(always)]
    fn skip(&mut self, guest: &Guest<V>, opcode: [u8; 2]) -> bool {
        let core = &self.core;
        let rip = core.hw.rip();
        let next = match core.hw.exit_next_rip() {
            Some(next) => core.cut(next),
            None if core.is_at(guest, rip, opcode) => rip.wrapping_add(opcode.len() as u64),
            None => return self.skip_rare(guest),
        };
        self.finish(guest, next);
        true
    }

    /// The same of any instruction, out of the way of the exits that are to be fast.
    #[cold]
    #[inline(never)]
    fn skip_rare(&mut self, guest: &Guest<V>) -> bool {
        let next = match self.core.hw.exit_next_rip() {
            Some(next) => Some(self.core.cut(next)),
            None => self.find_next_rip(guest),
        };
        match next {
            Some(next) => {
                self.finish(guest, next);
                true
            }
            None => false,
        }
    }

    /// Where the instruction at RIP ends, which is `opcode` and mostly no more.
    #[inline(always)]
    fn next_rip(&mut self, guest: &Guest<V>, opcode: [u8; 2]) -> Option<u64> {
        if let Some(next) = self.core.hw.exit_next_rip() {
            return Some(self.core.cut(next));
        }
        let rip = self.core.hw.rip();
        if self.core.is_at(guest, rip, opcode) {
            return Some(rip.wrapping_add(opcode.len() as u64));
        }
        self.find_next_rip(guest)
    }

    /// Where the instruction at RIP ends, found by reading it.
    #[inline(never)]
    fn find_next_rip(&mut self, guest: &Guest<V>) -> Option<u64> {
        let (bytes, len) = match self.core.fetch(guest) {
            Ok(fetched) => fetched,
            Err(fault) => {
                self.refuse(guest, fault);
                return None;
            }
        };
        match self.emulator.insn_len(self.core.mode(), &bytes[..len]) {
            Ok(insn_len) => Some(self.core.cut(self.core.hw.rip().wrapping_add(u64::from(insn_len)))),
            Err(_) => {
                // Another vCPU changed the code since the exit: let the guest run into what is there now.
                self.core.attention = true;
                None
            }
        }
    }

    /// What the processor does when an instruction completes: RIP, RF, the shadow, the single-step trap. The next RIP is as
    /// wide as the mode.
    #[inline(always)]
    fn finish(&mut self, guest: &Guest<V>, next_rip: u64) {
        let rflags = self.core.hw.end_instruction(next_rip);
        if rflags & (RFLAGS_TF | RFLAGS_RF) != 0 {
            self.finish_flags(guest, rflags);
        }
    }

    #[cold]
    #[inline(never)]
    fn finish_flags(&mut self, guest: &Guest<V>, rflags: u64) {
        self.core.hw.set_rflags(rflags & !RFLAGS_RF);
        if rflags & RFLAGS_TF != 0 {
            self.trap_single_step(guest);
        }
    }

    #[cold]
    fn trap_single_step(&mut self, guest: &Guest<V>) {
        let dr6 = self.core.hw.dr6();
        self.core.hw.set_dr6(dr6 | DR6_BS);
        self.raise(guest, SINGLE_STEP.0, SINGLE_STEP.1);
    }

    #[inline]
    fn cpuid(&mut self, guest: &Guest<V>) {
        let gprs = self.core.hw.gprs();
        let (leaf, subleaf) = (gprs[RAX] as u32, gprs[RCX] as u32);
        if !self.skip(guest, CPUID) {
            return;
        }
        let CpuidLeaf { eax, ebx, ecx, edx } =
            guest.cpuid.lookup(leaf, subleaf, &self.core.cpuid_state(leaf));
        let gprs = self.core.hw.gprs_mut();
        gprs[RAX] = u64::from(eax);
        gprs[RBX] = u64::from(ebx);
        gprs[RCX] = u64::from(ecx);
        gprs[RDX] = u64::from(edx);
    }
}

impl<V: Vendor> Vcpu<V> {
    #[inline]
    fn rdmsr(&mut self, guest: &Guest<V>) {
        let msr = self.core.hw.gprs()[RCX] as u32;
        match self.core.read_msr(guest, msr) {
            Ok(value) => {
                if self.skip(guest, RDMSR) {
                    let gprs = self.core.hw.gprs_mut();
                    gprs[RAX] = value & 0xffff_ffff;
                    gprs[RDX] = value >> 32;
                }
            }
            Err(_) => self.raise(guest, GP, Some(0)),
        }
    }

    #[inline]
    fn wrmsr(&mut self, guest: &Guest<V>) {
        let gprs = self.core.hw.gprs();
        let (msr, value) = (gprs[RCX] as u32, gprs[RDX] << 32 | gprs[RAX] & 0xffff_ffff);
        // The length is found first: a fetch that faults must leave the MSR alone.
        let Some(next) = self.next_rip(guest, WRMSR) else { return };
        match self.core.write_msr(guest, msr, value) {
            Ok(()) => self.finish(guest, next),
            Err(_) => self.raise(guest, GP, Some(0)),
        }
    }

    #[inline]
    fn port(&mut self, guest: &Guest<V>, access: PortAccess) {
        if access.kind.contains(PortKind::IN) {
            let value = u64::from(self.core.port_in(guest, access.port, access.size));
            let rax = &mut self.core.hw.gprs_mut()[RAX];
            *rax = match access.size {
                1 => *rax & !0xff | value & 0xff,
                2 => *rax & !0xffff | value & 0xffff,
                _ => value & 0xffff_ffff,
            };
        } else {
            let value = self.core.hw.gprs()[RAX] as u32;
            self.core.port_out(guest, access.port, access.size, value);
        }
        // The hardware's next RIP is already as wide as the mode.
        self.finish(guest, access.next_rip);
        if self.core.hw.dr7() & breakpoints::ENABLED != 0 {
            self.trap_io_breakpoints(guest, access);
        }
    }

    /// The debug trap of I/O breakpoints on a port that was accessed in the guest's place.
    #[cold]
    fn trap_io_breakpoints(&mut self, guest: &Guest<V>, access: PortAccess) {
        if self.core.hw.cr4() & CR4_DE == 0 {
            return;
        }
        let addresses = extended::breakpoint_addresses();
        let hit = breakpoints::io_hits(self.core.hw.dr7(), &addresses, access.port, access.size);
        if hit != 0 {
            let dr6 = self.core.hw.dr6();
            self.core.hw.set_dr6(dr6 & !0xf | hit);
            if !self.core.events.exception_waits() {
                self.raise(guest, DB, None);
            }
        }
    }

    fn second_stage_fault(&mut self, guest: &Guest<V>, fault: SecondStageFault) {
        // An address beyond the guest's own width may be beyond what the tables can map, too: that is the guest's doing.
        if fault.cause.contains(FaultCause::RESERVED) && fault.gpa >> guest.cpuid.caps().phys_bits == 0 {
            return self.stop(guest, StopReason::CorruptTables { gpa: fault.gpa });
        }
        match self.core.paging.resolve(&guest.memory, &fault) {
            Resolution::Mapped => {}
            Resolution::NoTableMemory => self.stop(guest, StopReason::NoTableMemory),
            Resolution::Device if self.core.events.delivery_was_interrupted() => {
                self.stop(guest, StopReason::DeliveryOutsideRam { gpa: fault.gpa });
            }
            Resolution::Device
                if fault.cause & (FaultCause::EXECUTE | FaultCause::TABLE_WALK) == FaultCause::EXECUTE =>
            {
                self.stop(guest, StopReason::FetchOutsideRam { gpa: fault.gpa });
            }
            Resolution::Device => {
                let write = fault.cause.contains(FaultCause::WRITE);
                let known = KnownOperand { gpa: fault.gpa, linear: fault.linear, write };
                self.emulate(guest, (!fault.cause.contains(FaultCause::TABLE_WALK)).then_some(known));
            }
        }
    }

    /// A page fault of the processor's on shadow tables.
    #[inline(never)]
    fn page_fault(&mut self, guest: &Guest<V>, fault: CpuPageFault) {
        let (code, linear) = (u32::from(fault.code), fault.linear);
        let core = &mut self.core;
        match core.paging.page_fault(&guest.memory, &core.hw, code, linear) {
            PageFault::Mapped => {}
            PageFault::Guest(fault) => self.refuse(guest, fault),
            PageFault::Told(code) => {
                self.core.hw.set_cr2(linear);
                self.raise_at_once(guest, PF, code);
            }
            PageFault::NoTableMemory => self.stop(guest, StopReason::NoTableMemory),
            PageFault::TableOutsideRam => {
                self.stop(guest, StopReason::Unsupported("page tables of the guest outside its RAM"));
            }
            PageFault::Device { gpa, .. } if core.events.delivery_was_interrupted() => {
                self.stop(guest, StopReason::DeliveryOutsideRam { gpa });
            }
            PageFault::Device { gpa, .. } if code & PF_FETCH != 0 => {
                self.stop(guest, StopReason::FetchOutsideRam { gpa });
            }
            PageFault::Device { gpa, write } => {
                let known = KnownOperand { gpa, linear: Some(linear), write };
                // An access of the processor's own is not the instruction's operand.
                let operand = code & PF_USER != 0 || core.hw.cpl() != 3;
                self.emulate(guest, operand.then_some(known));
            }
            PageFault::DespiteKey if core.events.delivery_was_interrupted() => {
                self.stop(
                    guest,
                    StopReason::Unsupported("an event's delivery to a page that a protection key guards"),
                );
            }
            PageFault::DespiteKey => self.emulate(guest, None),
            // What the processor does by itself cannot be emulated.
            PageFault::Table { gpa } if core.events.delivery_was_interrupted() => {
                guest.memory.stop_shadowing(core.paging.host_cpu(), gpa);
            }
            PageFault::Table { gpa } => self.write_to_table(guest, gpa),
        }
    }

    /// The instruction at RIP writes to a table that is shadowed. One that the emulator does not do, the guest does by
    /// itself, when nothing shadows the page any more; unless it has just tried.
    fn write_to_table(&mut self, guest: &Guest<V>, gpa: u64) {
        let Some(outcome) = self.run_emulator(guest, None) else { return };
        let at = (self.core.hw.rip(), gpa);
        match outcome {
            Outcome::Unsupported { .. } if self.core.unshadowed != at => {
                self.core.unshadowed = at;
                guest.memory.stop_shadowing(self.core.paging.host_cpu(), gpa);
            }
            outcome => self.settle(guest, outcome),
        }
    }

    /// Emulates the instruction at RIP. `known` is what the fault said about its operand.
    fn emulate(&mut self, guest: &Guest<V>, known: Option<KnownOperand>) {
        if let Some(outcome) = self.run_emulator(guest, known) {
            self.settle(guest, outcome);
        }
    }

    /// The same, up to the point where the outcome is known; none if there is nothing left to do.
    #[inline]
    fn run_emulator(&mut self, guest: &Guest<V>, known: Option<KnownOperand>) -> Option<Outcome> {
        self.core.hw.prepare_emulation();
        let mut bytes = [0; 16];
        let saved = self.core.hw.exit_insn_bytes();
        let len = if saved.is_empty() {
            match self.core.fetch(guest) {
                Ok((fetched, len)) => {
                    bytes = fetched;
                    len
                }
                Err(fault) => {
                    self.refuse(guest, fault);
                    return None;
                }
            }
        } else {
            let len = saved.len();
            bytes[..len].copy_from_slice(saved);
            len
        };
        let mut view = View { core: &mut self.core, guest, known };
        match self.emulator.emulate(&mut view, &bytes[..len]) {
            Outcome::Truncated => {
                self.fetch_rest(guest, len);
                None
            }
            outcome => Some(outcome),
        }
    }

    /// Acts on what became of an emulated instruction, delivery or task switch.
    #[inline]
    fn settle(&mut self, guest: &Guest<V>, outcome: Outcome) {
        match outcome {
            Outcome::Done { trap } | Outcome::Continue { trap } => {
                if trap {
                    self.trap_single_step(guest);
                }
            }
            Outcome::Exception(exception) => self.refuse(guest, Fault::Exception(exception)),
            Outcome::Retry | Outcome::Stop | Outcome::Truncated => self.core.attention = true,
            // A program of the guest's must not be able to end its VM.
            Outcome::Unsupported { .. } if self.core.hw.cpl() == 3 => self.raise(guest, UD, None),
            Outcome::Unsupported { reason } => self.stop(guest, StopReason::Unsupported(reason)),
        }
    }

    /// The instruction goes on behind what could be fetched: raise the fault of the next page's fetch.
    fn fetch_rest(&mut self, guest: &Guest<V>, have: usize) {
        match self.core.probe_fetch(guest, have as u64) {
            Err(fault) => self.refuse(guest, fault),
            // It can be fetched by now: run the instruction again.
            Ok(()) => self.core.attention = true,
        }
    }

    /// Acts on a refused access.
    fn refuse(&mut self, guest: &Guest<V>, fault: Fault) {
        match fault {
            Fault::Exception(exception) => {
                if let Some(cr2) = exception.cr2 {
                    self.core.hw.set_cr2(cr2);
                    if self.core.paging.is_shadowed() {
                        self.core.paging.guest_faulted(&guest.memory, cr2);
                    }
                }
                self.raise(guest, exception.vector, exception.error_code);
            }
            Fault::Retry | Fault::Stop => self.core.attention = true,
            Fault::Unsupported(reason) => self.stop(guest, StopReason::Unsupported(reason)),
        }
    }

    /// INVLPG.
    #[inline(never)]
    fn invalidate_page(&mut self, guest: &Guest<V>, invlpg: Invlpg) {
        let rip = self.core.hw.rip();
        let beginning = self.core.peek_in_turns(guest, rip).and_then(invlpg::parse_beginning);
        let Some((register, length)) = beginning else { return self.invalidate_fetched(guest, invlpg) };
        let linear = self.core.hw.gprs()[register];
        self.core.paging.invalidate_page(&guest.memory, linear);
        self.finish(guest, rip.wrapping_add(length));
    }

    /// The same of an INVLPG that has to be fetched, or that the hardware has told of.
    #[inline(never)]
    fn invalidate_fetched(&mut self, guest: &Guest<V>, invlpg: Invlpg) {
        match self.invlpg_operand(guest, invlpg) {
            Some((linear, next)) => {
                self.core.invalidate_page(guest, linear);
                self.finish(guest, next);
            }
            None => self.emulate(guest, None),
        }
    }

    /// Operand and next RIP of the INVLPG at RIP, if the hardware told them or it has one of the usual forms.
    fn invlpg_operand(&mut self, guest: &Guest<V>, invlpg: Invlpg) -> Option<(u64, u64)> {
        let long = self.core.mode() == Mode::Long64;
        if let (true, Some(next)) = (invlpg.known, self.core.hw.exit_next_rip()) {
            return Some((invlpg.linear, self.core.cut(next)));
        }
        if !long {
            return None;
        }
        let (bytes, len) = self.core.fetch_in_turns(guest).ok()?;
        let hw = &self.core.hw;
        let (linear, length) =
            invlpg::parse(&bytes, hw.gprs(), hw.rip()).filter(|&(_, length)| length <= len)?;
        Some((linear, hw.rip().wrapping_add(length as u64)))
    }

    /// MOV from control register `cr`, to general-purpose register `gpr` where the hardware named it.
    #[inline(never)]
    fn read_cr(&mut self, guest: &Guest<V>, cr: u8, gpr: Option<u8>) {
        let core = &self.core;
        let (rip, next) = (core.hw.rip(), core.hw.exit_next_rip());
        let operand = match gpr.zip(next) {
            Some((gpr, next)) => Some((usize::from(gpr & 15), core.cut(next))),
            None => core
                .peek_in_turns(guest, rip)
                .and_then(|code| mov_cr::parse_beginning(code, mov_cr::FROM_CR))
                .map(|(register, length)| (register, rip.wrapping_add(length))),
        };
        // SMSW, too, reads CR0.
        let Some((register, next)) = operand else { return self.emulate(guest, None) };
        let value = match cr {
            0 => core.hw.cr0(),
            3 => core.hw.cr3(),
            4 => core.hw.cr4(),
            _ => return self.raise(guest, UD, None),
        };
        let long = core.mode() == Mode::Long64;
        self.core.hw.gprs_mut()[register] = if long { value } else { value & 0xffff_ffff };
        self.finish(guest, next);
    }

    /// MOV to control register `cr`, from general-purpose register `gpr` where the hardware named it.
    #[inline(always)]
    fn write_cr(&mut self, guest: &Guest<V>, cr: u8, gpr: Option<u8>) {
        match cr {
            0 => self.write_paging_cr::<0>(guest, gpr),
            3 => self.write_paging_cr::<3>(guest, gpr),
            4 => self.write_paging_cr::<4>(guest, gpr),
            _ => {
                if let Some((value, next)) = self.mov_to_cr_operand(guest, gpr, None) {
                    self.write_cr_anew(guest, cr, value, next);
                }
            }
        }
    }

    /// The same of a register that kernels on shadow tables write all the time.
    #[inline(never)]
    fn write_paging_cr<const CR: u8>(&mut self, guest: &Guest<V>, gpr: Option<u8>) {
        let rip = self.core.hw.rip();
        let peeked = self.core.peek_in_turns(guest, rip);
        let (value, next);
        match peeked.and_then(|code| mov_cr::parse_plain(code, mov_cr::TO_CR)) {
            Some(register) => (value, next) = (self.core.hw.gprs()[register], rip.wrapping_add(3)),
            None => {
                let Some(operand) = self.mov_to_cr_operand(guest, gpr, peeked) else { return };
                (value, next) = operand;
                if !(self.core.paging.is_shadowed() && self.core.hw.efer() & EFER_LMA != 0) {
                    return self.write_cr_anew(guest, CR, value, next);
                }
            }
        }
        // One place for both, so that the compiler makes it part of this.
        if self.core.goes_back(guest, CR, value) {
            self.finish(guest, next);
        } else {
            self.write_cr_anew(guest, CR, value, next);
        }
    }

    /// The same with its value and next RIP, if it is none of the writes that kernels make all the time.
    #[inline(never)]
    fn write_cr_anew(&mut self, guest: &Guest<V>, cr: u8, value: u64, next: u64) {
        let written = match cr {
            8 => control_regs::write_cr8(value).map(|tpr| {
                self.core.hw.set_cr8(tpr);
                self.core.attention = true;
            }),
            _ => self.core.write_control_register(guest, cr, value),
        };
        match written {
            Ok(()) => self.finish(guest, next),
            Err(GeneralProtection) => self.raise(guest, GP, Some(0)),
        }
    }

    /// Value and next RIP of the MOV to a control register at RIP. What a peek found was not enough.
    #[inline(never)]
    fn mov_to_cr_operand(
        &mut self,
        guest: &Guest<V>,
        gpr: Option<u8>,
        peeked: Option<u32>,
    ) -> Option<(u64, u64)> {
        if let Some((register, length)) = peeked.and_then(|code| mov_cr::parse_beginning(code, mov_cr::TO_CR))
        {
            let hw = &self.core.hw;
            return Some((hw.gprs()[register], hw.rip().wrapping_add(length)));
        }
        let long = self.core.mode() == Mode::Long64;
        let (register, next) = match (gpr, self.core.hw.exit_next_rip()) {
            (Some(register), Some(next)) => (usize::from(register & 15), next),
            _ => {
                let (bytes, len) = match self.core.fetch_in_turns(guest) {
                    Ok(fetched) => fetched,
                    Err(fault) => {
                        self.refuse(guest, fault);
                        return None;
                    }
                };
                let Some((register, insn_len)) = mov_cr::parse(&bytes[..len], long) else {
                    // CLTS and LMSW write CR0, too; or another vCPU changed the code since the exit.
                    self.emulate(guest, None);
                    return None;
                };
                (register, self.core.hw.rip().wrapping_add(insn_len as u64))
            }
        };
        let value = self.core.hw.gprs()[register];
        Some((if long { value } else { value & 0xffff_ffff }, self.core.cut(next)))
    }

    /// A hardware task switch. An event that came through a task gate is delivered by it.
    #[cold]
    fn task_switch(&mut self, guest: &Guest<V>, switch: TaskSwitch) {
        let TaskSwitch { selector, cause, next_rip } = switch;
        let Some(next_rip) = next_rip.or_else(|| self.find_next_rip(guest)) else { return };
        let event = match cause {
            TaskSwitchCause::Gate => self.core.events.take_interrupted(),
            TaskSwitchCause::Call | TaskSwitchCause::Iret | TaskSwitchCause::Jump => None,
        };
        let error_code = match event {
            Some(Event::Exception(_, error_code)) => error_code,
            _ => None,
        };
        let switch = emulate::TaskSwitch { selector, cause, next_rip, error_code, external: event.is_some() };
        let old_task = self.core.hw.state().tr;
        let mut view = View { core: &mut self.core, guest, known: None };
        let outcome = self.emulator.task_switch(&mut view, switch);
        let switched = matches!(outcome, Outcome::Done { .. }) || self.core.hw.state().tr != old_task;
        match (switched, event) {
            // An exception behind the commit point is the new task's, and the event was delivered.
            (true, Some(Event::Nmi)) => self.core.hw.set_nmis_blocked(true),
            (true, None) if cause == TaskSwitchCause::Iret => self.core.hw.set_nmis_blocked(false),
            (true, _) | (false, None) => {}
            (false, Some(event)) => self.core.events.interrupted(event),
        }
        self.core.attention = true;
        self.settle(guest, outcome);
    }

    /// Delivers an event that the hardware cannot deliver in real mode, where no task gate can be in the way. False if
    /// something else has to be done before the guest goes on.
    #[cold]
    pub(super) fn deliver(&mut self, guest: &Guest<V>, event: Event) -> bool {
        let mut view = View { core: &mut self.core, guest, known: None };
        let outcome = self.emulator.deliver(&mut view, event);
        if matches!(outcome, Outcome::Done { .. }) {
            if event == Event::Nmi {
                self.core.hw.set_nmis_blocked(true);
            }
            return true;
        }
        // What went wrong meets the event, as it does when the hardware delivers it.
        self.core.events.interrupted(event);
        self.core.attention = true;
        self.settle(guest, outcome);
        false
    }

    fn xsetbv(&mut self, guest: &Guest<V>) {
        let gprs = self.core.hw.gprs();
        let (register, value) = (gprs[RCX] as u32, gprs[RDX] << 32 | gprs[RAX] & 0xffff_ffff);
        // The intercept may come before the check of the privilege level.
        if self.core.hw.cpl() != 0 || register != 0 || !guest.cpuid.caps().xcr0_is_valid(value) {
            return self.raise(guest, GP, Some(0));
        }
        if self.skip_rare(guest) {
            self.core.extended.set_xcr0(value);
        }
    }
}

impl<V: Vendor> Core<V> {
    /// Runs the guest until it exits, with this CPU's translations up to date.
    #[inline(always)]
    pub(super) fn enter(&mut self, guest: &Guest<V>) -> Exit {
        let ended = match self.paging.run(&guest.memory, &mut self.hw) {
            Ok(ended) => ended,
            Err(exit) => return exit,
        };
        self.exits_left -= 1;
        if self.exits_left == 0 {
            self.look_up();
        }
        if let Some(event) = self.hw.take_interrupted_event() {
            self.delivery_interrupted(event);
        }
        self.hw.exit(ended)
    }

    /// Whatever a guest finds to exit for without end, it does not keep the CPU.
    #[cold]
    #[inline(never)]
    fn look_up(&mut self) {
        self.exits_before += ATTENTION_INTERVAL;
        self.exits_left = ATTENTION_INTERVAL;
        self.attention = true;
    }

    #[cold]
    #[inline(never)]
    fn delivery_interrupted(&mut self, event: Event) {
        self.events.interrupted(event);
        self.attention = true;
    }

    /// Exits since reset.
    fn exits(&self) -> u64 {
        self.exits_before + (ATTENTION_INTERVAL - self.exits_left)
    }

    /// `rip` as wide as the mode has it.
    #[inline(always)]
    fn cut(&self, rip: u64) -> u64 {
        let long = self.hw.efer() & EFER_LMA != 0 && self.hw.cs_attributes() & CS_LONG != 0;
        if long {
            rip
        } else {
            rip & 0xffff_ffff
        }
    }

    /// The guest's TSC at the host's TSC `host`.
    #[inline]
    pub(super) fn guest_tsc(&self, guest: &Guest<V>, host: u64) -> u64 {
        guest.clock.guest_tsc(host, self.msrs.tsc_adjust)
    }

    /// Execution mode.
    #[inline]
    pub(super) fn mode(&self) -> Mode {
        let cs = Attributes(self.hw.cs_attributes());
        Mode::of(self.hw.cr0(), self.hw.efer(), self.hw.rflags(), cs)
    }

    /// What a CPUID result depends on.
    #[inline]
    pub(super) fn cpuid_state(&self, leaf: u32) -> CpuidState {
        CpuidState {
            apic_id: self.index as u8,
            apic_enabled: self.lapic.is_enabled(),
            cr4: self.hw.cr4(),
            // Only leaf 0Dh depends on it.
            xcr0: if leaf == 0xd { self.extended.xcr0() } else { 1 },
            // Only leaf 8000_0001h does.
            long64: leaf == 0x8000_0001 && self.mode() == Mode::Long64,
        }
    }

    /// Runs `access` on the MSRs with everything it needs to know.
    #[inline]
    fn with_msrs<R>(
        &mut self,
        guest: &Guest<V>,
        msr: u32,
        access: impl FnOnce(&mut MsrState, &mut MsrContext<'_>) -> R,
    ) -> R {
        if matches!(msr, X2APIC_MSR_FIRST..=X2APIC_MSR_LAST)
            || self.hw.has_virtual_apic() && matches!(msr, index::APIC_BASE | index::TSC_DEADLINE)
        {
            self.reclaim_apic();
        }
        // TSC_ADJUST is written often and needs no time.
        let (now_ns, tsc) = if msr == index::TSC_ADJUST {
            (0, 0)
        } else {
            let now = tsc::read();
            (guest.clock.ns(now), guest.clock.guest_tsc(now, self.msrs.tsc_adjust))
        };
        let mut context = MsrContext {
            caps: guest.cpuid.caps(),
            now_ns,
            tsc,
            efer: self.hw.efer(),
            paging: self.hw.cr0() & CR0_PG != 0,
            exits: self.exits(),
            lapic: &mut self.lapic,
        };
        access(&mut self.msrs, &mut context)
    }

    #[inline]
    pub(super) fn read_msr(&mut self, guest: &Guest<V>, msr: u32) -> Result<u64, Gp> {
        match self.hw.switched_msr(msr) {
            Some(value) => Ok(value),
            None if msr == pvclock::MSR_SYSTEM_TIME => Ok(self.system_time),
            None if msr == pvclock::MSR_WALL_CLOCK => Ok(self.wall_clock),
            None => match self.with_msrs(guest, msr, |msrs, context| msrs.read(msr, context)) {
                Err(Gp) if msr == index::PKRS => self.extended.pkrs().map(u64::from).ok_or(Gp),
                read => read,
            },
        }
    }

    #[inline]
    pub(super) fn write_msr(&mut self, guest: &Guest<V>, msr: u32, value: u64) -> Result<(), Gp> {
        if !switched_is_valid(msr, value, guest.cpuid.caps()) {
            return Err(Gp);
        }
        if self.hw.set_switched_msr(msr, value) {
            return Ok(());
        }
        let effect = match self.with_msrs(guest, msr, |msrs, context| msrs.write(msr, value, context)) {
            Ok(effect) => effect,
            Err(Gp) => return self.write_other_msr(guest, msr, value),
        };
        match effect {
            MsrEffect::None => {
                // A deadline may have been set.
                self.attention |= msr == index::TSC_DEADLINE;
            }
            MsrEffect::Efer(efer) => {
                self.hw.set_efer(efer);
                if self.paging.is_shadowed() {
                    self.paging.efer_written(&self.hw);
                }
            }
            MsrEffect::Pat(pat) => self.hw.set_pat(pat),
            MsrEffect::TscOffset(_) => {
                self.hw.set_tsc_offset(guest.clock.tsc_offset(self.msrs.tsc_adjust));
                // A deadline on the guest's TSC has moved in time.
                self.attention |= matches!(self.lapic.next_event(), Some(Deadline::Tsc(_)));
                if self.system_time & pvclock::ENABLE != 0 {
                    // The memory was there when the guest named it; if it is gone, so is the clock.
                    let _ = self.show_clock(guest, self.system_time);
                }
            }
            MsrEffect::TscAux(value) => self.extended.set_tsc_aux(u64::from(value)),
            MsrEffect::ApicBase => {
                self.hw.set_cr8(self.lapic.cr8());
                (self.apic_enabled, self.attention) = (true, true);
            }
            MsrEffect::Apic(action) => self.apic_action(guest, action),
        }
        if matches!(msr, X2APIC_MSR_FIRST..=X2APIC_MSR_LAST) {
            self.hw.set_cr8(self.lapic.cr8());
            (self.apic_enabled, self.attention) = (true, true);
        }
        Ok(())
    }

    /// WRMSR of what [`MsrState`] does not know: the clock's registers, and, by the emulator, IA32_PKRS, which is not
    /// intercepted.
    #[cold]
    fn write_other_msr(&mut self, guest: &Guest<V>, msr: u32, value: u64) -> Result<(), Gp> {
        match msr {
            pvclock::MSR_WALL_CLOCK | pvclock::MSR_SYSTEM_TIME => self.write_clock_msr(guest, msr, value),
            index::PKRS => self.write_pkrs(value),
            _ => Err(Gp),
        }
    }

    fn write_pkrs(&mut self, value: u64) -> Result<(), Gp> {
        let value = u32::try_from(value).map_err(|_| Gp)?;
        if self.extended.set_pkrs(value) {
            Ok(())
        } else {
            Err(Gp)
        }
    }

    /// Puts a structure of the paravirtual clock where the guest wants it; #GP where there is no RAM.
    fn write_clock_msr(&mut self, guest: &Guest<V>, msr: u32, value: u64) -> Result<(), Gp> {
        if msr == pvclock::MSR_WALL_CLOCK {
            let info = pvclock::wall_clock(guest.epoch_s);
            guest.memory.write(self.paging.host_cpu(), value, &info).map_err(|_| Gp)?;
            self.wall_clock = value;
            return Ok(());
        }
        self.show_clock(guest, value)?;
        self.system_time = value;
        Ok(())
    }

    /// Writes the vCPU's clock structure as `system_time` says.
    fn show_clock(&self, guest: &Guest<V>, system_time: u64) -> Result<(), Gp> {
        if system_time & pvclock::ENABLE == 0 {
            return Ok(());
        }
        let info = pvclock::system_time(guest.clock.rate().khz(), self.msrs.tsc_adjust);
        let at = system_time & !pvclock::ENABLE;
        guest.memory.write(self.paging.host_cpu(), at, &info).map_err(|_| Gp)
    }

    /// Linear address of the next instruction byte plus `ahead`.
    #[inline(always)]
    fn linear_rip(&self, ahead: u64) -> u64 {
        let rip = self.hw.rip().wrapping_add(ahead);
        if self.mode() == Mode::Long64 {
            rip
        } else {
            self.hw.segment(SegmentName::Cs).base.wrapping_add(rip) & 0xffff_ffff
        }
    }

    /// Instruction bytes at RIP, as the processor would fetch them.
    #[inline(always)]
    pub(super) fn fetch(&mut self, guest: &Guest<V>) -> Result<InsnBytes, Fault> {
        let linear = self.linear_rip(0);
        self.paging.fetch(&guest.memory, &self.hw, linear)
    }

    /// The same for exits that are made in turns, if [`peek_in_turns`](Self::peek_in_turns) does not do.
    fn fetch_in_turns(&mut self, guest: &Guest<V>) -> Result<InsnBytes, Fault> {
        let linear = self.linear_rip(0);
        self.paging.fetch_in_turns(&guest.memory, &self.hw, linear)
    }

    /// Whether the instruction at RIP, which is `rip`, is `opcode` in 64-bit code that the last instruction was fetched from.
    #[inline(never)]
    fn is_at(&self, guest: &Guest<V>, rip: u64, opcode: [u8; 2]) -> bool {
        self.hw.cs_attributes() & CS_LONG != 0
            && self.paging.peek(&guest.memory, &self.hw, rip) == Some(opcode)
    }

    /// The first four bytes of a supervisor's instruction at RIP, the first one lowest, in 64-bit code that
    /// [`fetch_in_turns`](Self::fetch_in_turns) fetched from.
    #[inline(always)]
    fn peek_in_turns(&self, guest: &Guest<V>, rip: u64) -> Option<u32> {
        if self.hw.cs_attributes() & CS_LONG == 0 || self.hw.cpl() != 0 {
            return None;
        }
        self.paging.peek_in_turns(&guest.memory, &self.hw, rip).map(u32::from_le_bytes)
    }

    /// Whether the byte `ahead` of RIP can be fetched.
    fn probe_fetch(&mut self, guest: &Guest<V>, ahead: u64) -> Result<(), Fault> {
        let linear = self.linear_rip(ahead);
        self.paging.fetch(&guest.memory, &self.hw, linear).map(|_| ())
    }

    /// Instruction bytes for a report; none if they cannot be read.
    pub(super) fn fetch_for_report(&mut self, guest: &Guest<V>) -> ([u8; 15], u8) {
        match self.fetch(guest) {
            Ok((bytes, len)) => (core::array::from_fn(|index| bytes[index]), len as u8),
            Err(_) => ([0; 15], 0),
        }
    }

    /// The control registers as a write of one of them finds them.
    pub(super) fn control_registers(&self) -> control_regs::Now {
        control_regs::Now {
            cr0: self.hw.cr0(),
            cr3: self.hw.cr3(),
            cr4: self.hw.cr4(),
            efer: self.hw.efer(),
            cs_long: self.hw.cs_attributes() & CS_LONG != 0,
            tr_attributes: self.hw.tr_attributes(),
        }
    }

    /// What the guest's CPU allows in control registers.
    pub(super) fn control_limits(guest: &Guest<V>) -> control_regs::Limits {
        let caps = guest.cpuid.caps();
        control_regs::Limits { cr4: caps.cr4, phys_bits: caps.phys_bits, amd: caps.vendor == CpuVendor::Amd }
    }

    /// MOV to CR0, CR3 or CR4, whatever it changes.
    pub(super) fn write_control_register(
        &mut self,
        guest: &Guest<V>,
        cr: u8,
        value: u64,
    ) -> Result<(), GeneralProtection> {
        let (now, limits) = (self.control_registers(), Self::control_limits(guest));
        let change = match cr {
            0 => control_regs::write_cr0(&now, value, &limits),
            3 => control_regs::write_cr3(&now, value, &limits),
            4 => control_regs::write_cr4(&now, value, &limits),
            _ => Err(GeneralProtection),
        }?;
        self.apply(guest, &now, &change)
    }

    /// The writes that kernels make all the time, on shadow tables in long mode: another address space, CR0.WP and
    /// CR4.PGE off and on. Whether it was one, and is done.
    #[inline(always)]
    fn goes_back(&mut self, guest: &Guest<V>, cr: u8, value: u64) -> bool {
        let (hw, efer) = (&self.hw, self.hw.efer());
        let only = |old: u64, bit: u64| (value ^ old) & !bit == 0;
        match cr {
            0 if only(hw.cr0(), CR0_WP) && hw.cr4() & CR4_CET == 0 => {
                let goes = self.paging.goes_back_cr0(&guest.memory, value, efer);
                if goes {
                    self.hw.set_write_protection(value);
                }
                goes
            }
            3 => {
                let pcids = hw.cr4() & CR4_PCIDE != 0;
                let cr3 = if pcids { value & !control_regs::CR3_NO_FLUSH } else { value };
                let goes = cr3 & control_regs::physical_reserved(guest.cpuid.caps().phys_bits) == 0
                    && self.paging.goes_back_cr3(&guest.memory, value);
                if goes && cr3 != self.hw.cr3() {
                    self.hw.set_cr3(cr3);
                }
                goes
            }
            4 if only(hw.cr4(), CR4_PGE) && value & !guest.cpuid.caps().cr4 == 0 => {
                let goes = self.paging.goes_back_cr4(&guest.memory, value);
                if goes {
                    self.hw.set_global_pages(value);
                }
                goes
            }
            _ => false,
        }
    }

    /// Makes a write of a control register take effect; #GP for PDPTEs that the processor would refuse.
    pub(super) fn apply(
        &mut self,
        guest: &Guest<V>,
        now: &control_regs::Now,
        change: &control_regs::Change,
    ) -> Result<(), GeneralProtection> {
        if change.load_pdptes && self.hw.keeps_pdptes() {
            let pdptes = self.read_pdptes(guest, change.cr3);
            if !control_regs::pdptes_are_valid(&pdptes, guest.cpuid.caps().phys_bits) {
                return Err(GeneralProtection);
            }
            self.hw.set_pdptes(pdptes);
        }
        if change.cr3 != now.cr3 {
            self.hw.set_cr3(change.cr3);
        }
        if change.cr4 != now.cr4 {
            self.hw.set_cr4(change.cr4);
        }
        if change.efer != now.efer {
            self.hw.set_efer(change.efer);
        }
        if change.cr0 != now.cr0 {
            self.hw.set_cr0(change.cr0);
        }
        if self.paging.is_shadowed() {
            self.tell_of(now, change);
        } else if change.flush != control_regs::Flush::None {
            // Flushing all covers each case.
            self.hw.flush_tlb();
        }
        Ok(())
    }

    /// Tells the shadow tables' side which registers were written.
    fn tell_of(&mut self, now: &control_regs::Now, change: &control_regs::Change) {
        if (change.cr0, change.efer) != (now.cr0, now.efer) {
            self.paging.cr0_written(&self.hw);
        } else if change.cr4 != now.cr4 {
            self.paging.cr4_written(&self.hw);
        } else if change.cr3 != now.cr3 || change.flush != control_regs::Flush::None {
            self.paging.cr3_written(&self.hw, change.flush == control_regs::Flush::None);
        }
    }

    /// INVLPG.
    #[inline]
    pub(super) fn invalidate_page(&mut self, guest: &Guest<V>, linear: u64) {
        if self.paging.is_shadowed() {
            self.paging.invalidate_page(&guest.memory, linear);
        } else {
            self.hw.flush_tlb();
        }
    }

    /// INVPCID with checked operands.
    pub(super) fn invalidate_context(&mut self, kind: u8, pcid: u16, linear: u64) {
        if self.paging.is_shadowed() {
            self.paging.invalidate_context(kind, pcid, linear);
        } else {
            self.hw.flush_tlb();
        }
    }

    /// All translations become invalid.
    pub(super) fn invalidate_all(&mut self) {
        if self.paging.is_shadowed() {
            self.paging.invalidate_all();
        } else {
            self.hw.flush_tlb();
        }
    }

    /// Replaces the state as INIT does.
    pub(super) fn load_state(&mut self, state: &CpuState) {
        self.hw.load_state(state);
        if self.paging.is_shadowed() {
            self.paging.state_replaced(&self.hw);
        }
    }

    /// Replaces the state as a far transfer or a task switch does.
    pub(super) fn set_state(&mut self, state: &CpuState) {
        let registers = |hw: &V::Vcpu| (hw.cr0(), hw.cr3(), hw.cr4(), hw.efer());
        let before = registers(&self.hw);
        self.hw.set_state(state);
        if self.paging.is_shadowed() && registers(&self.hw) != before {
            self.paging.state_replaced(&self.hw);
        }
    }

    /// The four PDPTEs at `cr3`; all ones where there is no RAM.
    pub(super) fn read_pdptes(&self, guest: &Guest<V>, cr3: u64) -> [u64; 4] {
        let mut bytes = [0xff; 32];
        let at = control_regs::pdpte_address(cr3);
        if guest.memory.read(self.paging.host_cpu(), at, &mut bytes).is_err() {
            bytes = [0xff; 32];
        }
        core::array::from_fn(|n| u64::from_le_bytes(core::array::from_fn(|byte| bytes[8 * n + byte])))
    }

    /// Obeys what other CPUs ask of this one.
    pub(super) fn obey(&mut self, guest: &Guest<V>, requests: Requests) {
        if requests.init() {
            self.init(guest);
        }
        if requests.nmi() && self.activity != Activity::WaitForSipi {
            self.events.raise_nmi();
        }
        // SMIs are dropped: this machine has no SMM, as FADT.SMI_CMD = 0 says.
        if let (Some(vector), Activity::WaitForSipi) = (requests.sipi(), self.activity) {
            self.load_state(&CpuState::startup(vector));
            self.activity = Activity::Running;
        }
    }

    /// INIT (SDM vol. 3, table 9-1): registers reset, but not x87, SSE, MTRRs, TSC and the like.
    fn init(&mut self, guest: &Guest<V>) {
        self.load_state(&CpuState::reset());
        self.extended.clear_breakpoints();
        *self.hw.gprs_mut() = [0; 16];
        self.hw.gprs_mut()[RDX] = u64::from(guest.cpuid.lookup(1, 0, &self.cpuid_state(1)).eax);
        self.lapic.init_reset();
        self.events.reset();
        self.hw.set_cr8(0);
        // The bootstrap processor would start at the reset vector, where there is no firmware: it waits as well.
        self.activity = Activity::WaitForSipi;
    }

    /// IN of 1, 2 or 4 bytes.
    #[inline(always)]
    pub(super) fn port_in(&mut self, guest: &Guest<V>, port: u16, size: u8) -> u32 {
        let now = guest.clock.ns(tsc::read());
        let mut board = guest.board.lock();
        let value = board.chipset.port_read(port, size, now);
        self.notice(guest, &mut board, now);
        value
    }

    /// OUT of 1, 2 or 4 bytes.
    #[inline(always)]
    pub(super) fn port_out(&mut self, guest: &Guest<V>, port: u16, size: u8, value: u32) {
        let now = guest.clock.ns(tsc::read());
        let mut board = guest.board.lock();
        let event = if size == 1 {
            board.chipset.port_write_byte(port, value as u8, now)
        } else {
            self.port_out_wide(guest, &mut board, port, size, value, now)
        };
        if board.chipset.com1_has_output() {
            board.chipset.com1_take_output(&mut |byte| guest.output.put(byte));
            // The console takes its time; it is this vCPU's time.
            self.attention = true;
        }
        self.notice(guest, &mut board, now);
        drop(board);
        if let Some(event) = event {
            self.chipset_event(guest, event);
        }
    }

    /// OUT of 2 or 4 bytes, which may begin a DMA.
    #[inline(never)]
    fn port_out_wide(
        &self,
        guest: &Guest<V>,
        board: &mut Board,
        port: u16,
        size: u8,
        value: u32,
        now: u64,
    ) -> Option<ChipsetEvent> {
        let ram = guest.memory.for_devices(self.paging.host_cpu());
        board.chipset.port_write(port, size, value, now, &ram)
    }

    /// After an access to the chipset: its lines go to the I/O APIC, and if it looks different now, this vCPU looks
    /// again before its next entry. The 8259s' interrupt is vCPU 0's.
    #[inline]
    fn notice(&mut self, guest: &Guest<V>, board: &mut Board, now: u64) {
        if board.lines_changed() {
            guest.with_sink(&mut self.woken, |sink| board.update_lines(sink));
        }
        if board.outlook_changed(now) {
            self.attention = true;
            if self.index != 0 {
                self.woken.0 |= 1;
            }
        }
    }

    #[cold]
    fn chipset_event(&mut self, guest: &Guest<V>, event: ChipsetEvent) {
        self.attention = true;
        guest.end(match event {
            ChipsetEvent::PowerOff => End::PoweredOff,
            ChipsetEvent::Reset => End::Reset,
            ChipsetEvent::Exit(value) => End::ExitPort(value),
        });
    }

    /// Brings the local APIC up to date with what the guest did to it without an exit. If the hardware had it, it has it
    /// no more; the next entry lends it again.
    #[inline]
    pub(super) fn reclaim_apic(&mut self) {
        if self.hw.has_virtual_apic() && core::mem::take(&mut self.apic_lent) {
            self.hw.reclaim_apic(&mut self.lapic);
            self.attention = true;
        } else {
            self.lapic.set_cr8(self.hw.cr8());
        }
    }

    /// The guest ended a level-triggered interrupt while the hardware has the local APIC.
    fn apic_eoi(&mut self, guest: &Guest<V>, vector: u8) {
        self.reclaim_apic();
        let action = self.lapic.ended(vector);
        self.apic_action(guest, action);
    }

    /// Does what a local APIC access asks for.
    #[inline]
    pub(super) fn apic_action(&mut self, guest: &Guest<V>, action: ApicAction) {
        match action {
            ApicAction::None => {}
            ApicAction::Eoi(vector) => {
                let mut board = guest.board.lock();
                guest.with_sink(&mut self.woken, |sink| board.ioapic.eoi(vector, sink));
            }
            ApicAction::Send(message) => {
                guest.with_sink(&mut self.woken, |sink| sink.send(message));
            }
        }
    }
}
