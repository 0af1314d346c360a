//! Interrupts and exceptions through the IVT or IDT, as INT n causes them or as they are delivered in the guest's
//! place. Intel SDM vol. 2 (INT n) and vol. 3, 6.10 to 6.14, 21.1.4 and 21.3; AMD APM vol. 2, 8.6 to 8.9.
use super::change::{Change, Stack, GP, NP};
use super::cpu::{Access, AccessKind, Cpu, Fault, Mode};
use super::execute::{Execution, Flow};
use super::far::arrive;
use super::flags::{iopl, AC, IF, IOPL, NT, RF, TF, VIF, VM};
use super::segment::{is_null, system_type, Descriptor};
use super::task::{self, TaskSwitch};
use super::Outcome;
use crate::hw::{Event, SegmentName, TaskSwitchCause};
use crate::vm::control_regs::CR4_VME;

/// General detect, in DR7: cleared when a #DB is delivered.
const DR7_GD: u64 = 1 << 13;
const DB: u8 = 1;
const NMI: u8 = 2;
/// Offset in the TSS of the offset of the I/O permission map, before which lies the interrupt redirection map.
const IO_MAP_BASE: u64 = 0x66;
const REDIRECTION_BYTES: u64 = 32;

/// Delivers `event` before the instruction at RIP.
pub(super) fn deliver<C: Cpu>(cpu: &mut C, event: Event) -> Result<Outcome, Fault> {
    let (vector, error_code) = match event {
        Event::Interrupt(vector) => (vector, None),
        Event::Nmi => (NMI, None),
        Event::Exception(vector, error_code) => (vector, error_code),
    };
    let mut change = Change::new(cpu);
    change.external = 1;
    if let Some(selector) = change.interrupt(vector, false, error_code)? {
        let next_rip = change.state.rip;
        let switch =
            TaskSwitch { selector, cause: TaskSwitchCause::Gate, next_rip, error_code, external: true };
        return task::switch(change.cpu, &switch);
    }
    if event == Event::Exception(DB, None) {
        change.state.dr7 &= !DR7_GD;
    }
    change.commit()?.clear_interrupt_shadow();
    Ok(Outcome::Done { trap: false })
}

impl<C: Cpu> Change<'_, C> {
    /// Enters the handler of `vector`, to return to RIP. `software`: by an instruction whose right to use the gate is
    /// checked. The answer is the task whose affair it is.
    fn interrupt(
        &mut self,
        vector: u8,
        software: bool,
        error_code: Option<u32>,
    ) -> Result<Option<u16>, Fault> {
        if self.mode == Mode::Real {
            self.interrupt_real(vector)?;
            return Ok(None);
        }
        let code = u32::from(vector) << 3 | 2;
        let gate = self.gate(vector, code)?;
        let interrupt = matches!(gate.kind(), system_type::INTERRUPT_GATE | system_type::INTERRUPT_GATE_16);
        let known = match gate.kind() {
            system_type::INTERRUPT_GATE | system_type::TRAP_GATE => true,
            system_type::INTERRUPT_GATE_16 | system_type::TRAP_GATE_16 | system_type::TASK_GATE => {
                !self.long_mode()
            }
            _ => false,
        };
        if gate.is_segment() || !known || (software && gate.dpl() < self.cpl) {
            return Err(self.fault(GP, code));
        }
        if !gate.is_present() {
            return Err(self.fault(NP, code));
        }
        let selector = gate.gate_selector();
        if gate.kind() == system_type::TASK_GATE {
            return Ok(Some(selector));
        }
        let handler = self.handler(selector)?;
        let level = if handler.is_conforming() { self.cpl } else { handler.dpl() };
        let size = if self.long_mode() { 8 } else { gate.gate_size() };
        let (old_code, rip) = (self.segment(SegmentName::Cs).selector, self.state.rip);
        let mut stack = self.handler_stack(&gate, level, size)?;
        self.push(&mut stack, size, self.state.rflags)?;
        self.push(&mut stack, size, old_code.into())?;
        self.push(&mut stack, size, rip)?;
        if let Some(error_code) = error_code {
            self.push(&mut stack, size, error_code.into())?;
        }
        if self.mode == Mode::Vm86 {
            for name in [SegmentName::Es, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs] {
                self.unload_segment(name, 0);
            }
        }
        self.load_code(selector, &handler, level, gate.gate_offset())?;
        self.rsp = stack.pointer;
        self.state.rflags &= !(TF | NT | RF | VM | if interrupt { IF } else { 0 });
        Ok(None)
    }

    /// The IDT's entry for `vector`.
    fn gate(&mut self, vector: u8, code: u32) -> Result<Descriptor, Fault> {
        let size = if self.long_mode() { 16 } else { 8 };
        let offset = u64::from(vector) * u64::from(size);
        let idtr = self.state.idtr;
        let inside = offset + u64::from(size) - 1 <= u64::from(idtr.limit);
        let linear = if inside { self.table_address(idtr.base, offset, size) } else { None };
        let linear = linear.ok_or_else(|| self.fault(GP, code))?;
        let low = self.read_system(linear, 8)?;
        let high = if size == 16 { self.read_system(linear + 8, 8)? & 0xffff_ffff } else { 0 };
        Ok(Descriptor { low, high, linear })
    }

    /// The code segment that a gate of the IDT names.
    fn handler(&mut self, selector: u16) -> Result<Descriptor, Fault> {
        if is_null(selector) {
            return Err(self.fault(GP, 0));
        }
        let handler = self.descriptor(selector, GP)?;
        let width_fits = !self.long_mode() || (handler.is_long() && !self.is_contradictory(&handler));
        // Virtual-8086 mode is left for level 0 only.
        let leaves_vm86 = self.mode != Mode::Vm86 || (!handler.is_conforming() && handler.dpl() == 0);
        if !handler.is_code() || handler.dpl() > self.cpl || !width_fits || !leaves_vm86 {
            return Err(self.selector_fault(GP, selector));
        }
        if !handler.is_present() {
            return Err(self.selector_fault(NP, selector));
        }
        Ok(handler)
    }

    /// The stack of a handler at `level`, with what is pushed there of the old stack.
    fn handler_stack(&mut self, gate: &Descriptor, level: u8, size: u8) -> Result<Stack, Fault> {
        let mut old = self.stack();
        let old_segments = self.state.segments;
        let mut stack;
        if self.long_mode() {
            let ist = (gate.low >> 32 & 7) as u8;
            if level < self.cpl || ist != 0 {
                stack = self.inner_stack(level, ist)?;
            } else {
                old.width = 8;
                stack = old;
            }
            stack.pointer &= !0xf;
        } else if level < self.cpl {
            stack = self.inner_stack(level, 0)?;
            if self.mode == Mode::Vm86 {
                for name in [SegmentName::Gs, SegmentName::Fs, SegmentName::Ds, SegmentName::Es] {
                    self.push(&mut stack, size, old_segments[name as usize].selector.into())?;
                }
            }
        } else {
            return Ok(old);
        }
        self.push(&mut stack, size, old.segment.selector.into())?;
        self.push(&mut stack, size, old.pointer)?;
        Ok(stack)
    }

    /// An interrupt in real mode.
    fn interrupt_real(&mut self, vector: u8) -> Result<(), Fault> {
        let offset = u64::from(vector) << 2;
        let idtr = self.state.idtr;
        let inside = offset + 3 <= u64::from(idtr.limit);
        let linear = if inside { self.table_address(idtr.base, offset, 4) } else { None };
        let linear = linear.ok_or_else(|| self.fault(GP, 0))?;
        let entry = self.read_system(linear, 4)?;
        let flags = self.state.rflags;
        self.enter_8086_handler(entry, flags)?;
        self.state.rflags &= !(IF | TF | AC | RF);
        Ok(())
    }

    /// Goes to the far pointer `entry`, to return to CS:IP with `flags`.
    fn enter_8086_handler(&mut self, entry: u64, flags: u64) -> Result<(), Fault> {
        let (code, rip) = (self.segment(SegmentName::Cs).selector, self.state.rip);
        let mut stack = self.stack();
        self.push(&mut stack, 2, flags)?;
        self.push(&mut stack, 2, code.into())?;
        self.push(&mut stack, 2, rip)?;
        self.load_8086_code((entry >> 16) as u16, entry & 0xffff)?;
        self.rsp = stack.pointer;
        Ok(())
    }

    /// INT n in virtual-8086 mode, if it stays there; false: it goes through the IDT. SDM vol. 3, 21.3.3.
    fn interrupt_vm86(&mut self, vector: u8) -> Result<bool, Fault> {
        let rflags = self.state.rflags;
        let open = iopl(rflags) == 3;
        if self.state.cr4 & CR4_VME == 0 || self.is_unredirected(vector)? {
            return if open { Ok(false) } else { Err(self.fault(GP, 0)) };
        }
        let entry =
            self.cpu.read(u64::from(vector) << 2, 4, Access { kind: AccessKind::Read, sole: false })?;
        let virtual_if = if rflags & VIF != 0 { IF } else { 0 };
        let flags = if open { rflags } else { rflags & !IF | IOPL | virtual_if };
        self.enter_8086_handler(entry, flags)?;
        self.state.rflags &= !(TF | RF | NT | if open { IF } else { VIF });
        Ok(true)
    }

    /// The vector's bit in the interrupt redirection map.
    fn is_unredirected(&mut self, vector: u8) -> Result<bool, Fault> {
        let tr = self.state.tr;
        let mut field = |offset: u64, size: u8| {
            let end = offset.checked_add(u64::from(size) - 1);
            let inside = end.is_some_and(|end| end <= u64::from(tr.limit));
            let linear = if inside { self.table_address(tr.base, offset, size) } else { None };
            let linear = linear.ok_or_else(|| self.fault(GP, 0))?;
            self.read_system(linear, size)
        };
        let map = field(IO_MAP_BASE, 2)?.wrapping_sub(REDIRECTION_BYTES);
        let byte = field(map.wrapping_add(u64::from(vector >> 3)), 1)?;
        Ok(byte >> (vector & 7) & 1 != 0)
    }
}

impl<C: Cpu> Execution<'_, C> {
    /// INT n.
    pub(super) fn software_interrupt(&mut self) -> Result<Flow, Fault> {
        let vector = self.insn.imm as u8;
        if self.mode == Mode::Vm86 {
            let next_rip = self.next_rip();
            let mut change = Change::new(self.cpu);
            change.state.rip = next_rip;
            change.state.rflags &= !RF;
            if change.interrupt_vm86(vector)? {
                return arrive(change);
            }
        }
        self.trap_to(vector, true)
    }

    /// INT3, INTO, INT1 (`software` false) and INT n outside virtual-8086 mode.
    pub(super) fn trap_to(&mut self, vector: u8, software: bool) -> Result<Flow, Fault> {
        let next_rip = self.next_rip();
        let mut change = Change::new(self.cpu);
        change.state.rip = next_rip;
        change.state.rflags &= !RF;
        change.external = u32::from(!software);
        match change.interrupt(vector, software, None)? {
            Some(selector) => {
                let external = !software;
                let cause = TaskSwitchCause::Gate;
                let switch = TaskSwitch { selector, cause, next_rip, error_code: None, external };
                task::switch(self.cpu, &switch).map(Flow::Ended)
            }
            None => {
                change.commit()?.clear_interrupt_shadow();
                // TF was cleared on the way: no trap.
                Ok(Flow::Ended(Outcome::Done { trap: false }))
            }
        }
    }
}
