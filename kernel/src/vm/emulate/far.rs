//! Far transfers: JMP, CALL, RET and IRET between segments and privilege levels, through call gates and to tasks.
//! Intel SDM vol. 2 (CALL, IRET, JMP, RET) and vol. 3, 5.8; AMD APM vol. 2, 4.11 and 8.7 to 8.9.
use super::change::{Change, Stack, GP, NP, TS};
use super::cpu::{AccessKind, Cpu, Fault, Mode};
use super::decode::{DecodedInsn, Operand};
use super::execute::{Execution, Flow};
use super::flags::{self, iopl, mask, DEFINED, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM};
use super::segment::{is_null, rpl, system_type, Descriptor};
use super::task::TaskSwitch;
use super::Outcome;
use crate::hw::{Segment, SegmentName, TaskSwitchCause};
use crate::vm::control_regs::CR4_VME;

/// Where a far transfer leads through a system descriptor.
enum Target {
    CallGate(Descriptor),
    Task(u16),
}

impl<C: Cpu> Change<'_, C> {
    /// The code segment `selector` may be entered directly from here.
    fn check_direct(&self, selector: u16, descriptor: &Descriptor) -> Result<(), Fault> {
        let privileged = if descriptor.is_conforming() {
            descriptor.dpl() <= self.cpl
        } else {
            rpl(selector) <= self.cpl && descriptor.dpl() == self.cpl
        };
        if !descriptor.is_code() || !privileged || self.is_contradictory(descriptor) {
            return Err(self.selector_fault(GP, selector));
        }
        self.check_present(selector, descriptor)
    }

    fn check_present(&self, selector: u16, descriptor: &Descriptor) -> Result<(), Fault> {
        if descriptor.is_present() {
            Ok(())
        } else {
            Err(self.selector_fault(NP, selector))
        }
    }

    /// A jump or call within real or virtual-8086 mode.
    pub(super) fn load_8086_code(&mut self, selector: u16, offset: u64) -> Result<(), Fault> {
        self.load_8086_segment(SegmentName::Cs, selector);
        if offset > u64::from(self.segment(SegmentName::Cs).limit) {
            return Err(self.fault(GP, 0));
        }
        self.state.rip = offset;
        Ok(())
    }

    /// What a selector of a far jump or call names that is no code segment.
    fn system_target(&mut self, selector: u16, descriptor: Descriptor) -> Result<Target, Fault> {
        use system_type::{CALL_GATE, CALL_GATE_16, TASK_GATE, TSS, TSS_16};
        let kind = descriptor.kind();
        let known = match kind {
            CALL_GATE => true,
            CALL_GATE_16 | TASK_GATE | TSS | TSS_16 => !self.long_mode(),
            _ => false,
        };
        if descriptor.is_segment() || !known || descriptor.dpl() < self.cpl.max(rpl(selector)) {
            return Err(self.selector_fault(GP, selector));
        }
        self.check_present(selector, &descriptor)?;
        Ok(match kind {
            TASK_GATE => Target::Task(descriptor.gate_selector()),
            TSS | TSS_16 => Target::Task(selector),
            _ => Target::CallGate(self.widen(descriptor, selector, GP)?),
        })
    }

    /// The code segment that a call gate names.
    fn gate_code(&mut self, gate: &Descriptor, call: bool) -> Result<(u16, Descriptor), Fault> {
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(self.fault(GP, 0));
        }
        let code = self.descriptor(selector, GP)?;
        let level_fits = code.dpl() == self.cpl || code.is_conforming() || call;
        let width_fits = !self.long_mode() || (code.is_long() && !self.is_contradictory(&code));
        if !code.is_code() || code.dpl() > self.cpl || !level_fits || !width_fits {
            return Err(self.selector_fault(GP, selector));
        }
        self.check_present(selector, &code)?;
        Ok((selector, code))
    }

    /// JMP to another segment. The answer is the task that it leads to.
    fn jump_far(&mut self, selector: u16, offset: u64) -> Result<Option<u16>, Fault> {
        if self.is_8086() {
            self.load_8086_code(selector, offset)?;
            return Ok(None);
        }
        if is_null(selector) {
            return Err(self.fault(GP, 0));
        }
        let descriptor = self.descriptor(selector, GP)?;
        if descriptor.is_code() {
            self.check_direct(selector, &descriptor)?;
            self.load_code(selector, &descriptor, self.cpl, offset)?;
            return Ok(None);
        }
        match self.system_target(selector, descriptor)? {
            Target::Task(task) => Ok(Some(task)),
            Target::CallGate(gate) => {
                let (selector, code) = self.gate_code(&gate, false)?;
                self.load_code(selector, &code, self.cpl, gate.gate_offset())?;
                Ok(None)
            }
        }
    }

    /// CALL to another segment: `size` bytes wide, to be returned from to `next`.
    fn call_far(&mut self, selector: u16, offset: u64, size: u8, next: u64) -> Result<Option<u16>, Fault> {
        let old_code = u64::from(self.segment(SegmentName::Cs).selector);
        let mut stack = self.stack();
        if self.is_8086() {
            self.push(&mut stack, size, old_code)?;
            self.push(&mut stack, size, next)?;
            self.load_8086_code(selector, offset)?;
            self.rsp = stack.pointer;
            return Ok(None);
        }
        if is_null(selector) {
            return Err(self.fault(GP, 0));
        }
        let descriptor = self.descriptor(selector, GP)?;
        if descriptor.is_code() {
            self.check_direct(selector, &descriptor)?;
            self.push(&mut stack, size, old_code)?;
            self.push(&mut stack, size, next)?;
            self.load_code(selector, &descriptor, self.cpl, offset)?;
            self.rsp = stack.pointer;
            return Ok(None);
        }
        let gate = match self.system_target(selector, descriptor)? {
            Target::Task(task) => return Ok(Some(task)),
            Target::CallGate(gate) => gate,
        };
        let (selector, code) = self.gate_code(&gate, true)?;
        let size = if self.long_mode() { 8 } else { gate.gate_size() };
        let mut level = self.cpl;
        if !code.is_conforming() && code.dpl() < self.cpl {
            level = code.dpl();
            stack = self.call_inward(&gate, level, size)?;
        } else if self.long_mode() {
            stack.width = 8;
        }
        self.push(&mut stack, size, old_code)?;
        self.push(&mut stack, size, next)?;
        self.load_code(selector, &code, level, gate.gate_offset())?;
        self.rsp = stack.pointer;
        Ok(None)
    }

    /// Switches to the stack of the inner `level` for a call gate, and copies the parameters there.
    fn call_inward(&mut self, gate: &Descriptor, level: u8, size: u8) -> Result<Stack, Fault> {
        let old = self.stack();
        let mut stack = self.inner_stack(level, 0)?;
        let mut parameters = [0; 31];
        let count = if self.long_mode() { 0 } else { (gate.low >> 32 & 0x1f) as usize };
        let parameters = &mut parameters[..count];
        for (index, parameter) in parameters.iter_mut().enumerate() {
            *parameter = self.peek(&old, index as u64 * u64::from(size), size)?;
        }
        self.push(&mut stack, size, old.segment.selector.into())?;
        self.push(&mut stack, size, old.pointer)?;
        for parameter in parameters.iter().rev() {
            self.push(&mut stack, size, *parameter)?;
        }
        Ok(stack)
    }

    /// Loads SS for the inner `level` from the TSS and answers with its stack, or in long mode with that of `ist`
    /// unless it is 0. SDM vol. 3, 5.8.5, 7.2.1 and 7.7.
    pub(super) fn inner_stack(&mut self, level: u8, ist: u8) -> Result<Stack, Fault> {
        let tr = self.state.tr;
        let field = |offset: u64, size: u64| {
            let end = offset + size - 1;
            (tr.attributes & 0x80 != 0 && end <= u64::from(tr.limit)).then_some(offset)
        };
        let invalid = self.selector_fault(TS, tr.selector);
        if self.long_mode() {
            let offset = match ist {
                0 => 4 + 8 * u64::from(level),
                _ => 0x1c + 8 * u64::from(ist),
            };
            let offset = field(offset, 8).ok_or(invalid)?;
            let linear = self.table_address(tr.base, offset, 8).ok_or(invalid)?;
            let pointer = self.read_system(linear, 8)?;
            let code = u32::from(self.segment(SegmentName::Ss).selector & !3);
            if level != self.cpl {
                self.set_null_stack(level.into(), level);
            }
            let segment = self.segment(SegmentName::Ss);
            let code = if level == self.cpl { code } else { 0 };
            return Ok(Stack { segment, width: 8, pointer, level, code });
        }
        let (offset, size) = if tr.attributes & 8 != 0 {
            (4 + 8 * u64::from(level), 4)
        } else {
            (2 + 4 * u64::from(level), 2)
        };
        let offset = field(offset, u64::from(size) + 2).ok_or(invalid)?;
        let pointer_at = self.table_address(tr.base, offset, size).ok_or(invalid)?;
        let selector_at = self.table_address(tr.base, offset + u64::from(size), 2).ok_or(invalid)?;
        let pointer = self.read_system(pointer_at, size)?;
        let selector = self.read_system(selector_at, 2)? as u16;
        self.load_stack_segment(selector, level, TS, false)?;
        let segment = self.segment(SegmentName::Ss);
        let width = if segment.attributes & Segment::DEFAULT_32 != 0 { 4 } else { 2 };
        Ok(Stack { segment, width, pointer, level, code: u32::from(selector & !3) })
    }

    /// Returns to `offset` in code segment `selector`, both already popped from `stack`, and releases `release` bytes
    /// of parameters. `whole`: the stack is on the stack even if the level stays the same.
    fn return_far(
        &mut self,
        selector: u16,
        offset: u64,
        mut stack: Stack,
        size: u8,
        release: u64,
        whole: bool,
    ) -> Result<(), Fault> {
        if is_null(selector) {
            return Err(self.fault(GP, 0));
        }
        let code = self.descriptor(selector, GP)?;
        let level = rpl(selector);
        let privileged =
            if code.is_conforming() { code.dpl() <= level } else { code.dpl() == level } && level >= self.cpl;
        if !code.is_code() || !privileged || self.is_contradictory(&code) {
            return Err(self.selector_fault(GP, selector));
        }
        self.check_present(selector, &code)?;
        let long = self.long_mode() && code.is_long();
        stack.advance(release);
        if level == self.cpl && !whole {
            self.load_code(selector, &code, level, offset)?;
            self.rsp = stack.pointer;
            return Ok(());
        }
        let pointer = self.pop(&mut stack, size)?;
        let stack_selector = self.pop(&mut stack, size)? as u16;
        self.load_stack_segment(stack_selector, level, GP, long && level < 3)?;
        self.load_code(selector, &code, level, offset)?;
        let width = match self.segment(SegmentName::Ss).attributes & Segment::DEFAULT_32 {
            _ if long => 8,
            0 => 2,
            _ => 4,
        };
        let mut outer = Stack { width, pointer: self.rsp, ..stack };
        outer.point(pointer.wrapping_add(release));
        self.rsp = outer.pointer;
        if level > self.cpl {
            self.drop_inner_segments(level);
        }
        Ok(())
    }

    /// RET to another segment.
    fn ret_far(&mut self, size: u8, release: u64) -> Result<(), Fault> {
        let mut stack = self.stack();
        let offset = self.pop(&mut stack, size)?;
        let selector = self.pop(&mut stack, size)? as u16;
        if self.is_8086() {
            self.load_8086_code(selector, offset)?;
            stack.advance(release);
            self.rsp = stack.pointer;
            return Ok(());
        }
        self.return_far(selector, offset, stack, size, release, false)
    }

    /// IRET. The answer is the task that it returns to.
    fn interrupt_return(&mut self, size: u8) -> Result<Option<u16>, Fault> {
        let rflags = self.state.rflags;
        let mut stack = self.stack();
        if self.mode == Mode::Vm86 {
            self.return_in_vm86(stack, size)?;
            return Ok(None);
        }
        if self.mode != Mode::Real && rflags & NT != 0 {
            if self.long_mode() {
                return Err(self.fault(GP, 0));
            }
            let tr = self.state.tr;
            let link = self.table_address(tr.base, 0, 2).ok_or_else(|| self.fault(GP, 0))?;
            return Ok(Some(self.read_system(link, 2)? as u16));
        }
        let offset = self.pop(&mut stack, size)?;
        let selector = self.pop(&mut stack, size)? as u16;
        let image = self.pop(&mut stack, size)?;
        if self.mode == Mode::Real {
            self.load_8086_code(selector, offset)?;
            self.rsp = stack.pointer;
            // VM, VIF and VIP stay.
            let kept = if size == 2 { !mask(2) & !RF } else { VM | VIF | VIP };
            self.state.rflags = rflags & kept | image & DEFINED & !kept & mask(size) | 2;
            return Ok(None);
        }
        if image & VM != 0 && size == 4 && self.cpl == 0 && !self.long_mode() {
            self.return_to_vm86(selector, offset, image, stack)?;
            return Ok(None);
        }
        self.return_far(selector, offset, stack, size, 0, self.mode == Mode::Long64)?;
        self.state.rflags = self.returned_flags(image, size);
        Ok(None)
    }

    /// RFLAGS after an IRET in protected mode that popped `image`: what the level before it may change.
    fn returned_flags(&self, image: u64, size: u8) -> u64 {
        let rflags = self.state.rflags;
        let mut changed = flags::STATUS | TF | flags::DF | NT;
        if size >= 4 {
            changed |= RF | flags::AC | ID;
        }
        if self.cpl <= iopl(rflags) {
            changed |= IF;
        }
        if self.cpl == 0 {
            changed |= IOPL;
            if size >= 4 {
                changed |= VIF | VIP;
            }
        }
        rflags & !changed & !RF | image & changed | 2
    }

    /// IRET in virtual-8086 mode. SDM vol. 3, 21.2.7 and 21.3.
    fn return_in_vm86(&mut self, mut stack: Stack, size: u8) -> Result<(), Fault> {
        let rflags = self.state.rflags;
        let virtual_interrupts = iopl(rflags) < 3;
        if virtual_interrupts && (self.state.cr4 & CR4_VME == 0 || size != 2) {
            return Err(self.fault(GP, 0));
        }
        let offset = self.pop(&mut stack, size)?;
        let selector = self.pop(&mut stack, size)? as u16;
        let image = self.pop(&mut stack, size)?;
        let mut changed = flags::STATUS | TF | flags::DF | NT;
        let mut virtual_flag = rflags & VIF;
        if virtual_interrupts {
            if image & TF != 0 || (image & IF != 0 && rflags & VIP != 0) {
                return Err(self.fault(GP, 0));
            }
            virtual_flag = if image & IF != 0 { VIF } else { 0 };
        } else {
            changed |= IF;
        }
        if size >= 4 {
            changed |= RF | flags::AC | ID;
        }
        self.load_8086_code(selector, offset)?;
        self.rsp = stack.pointer;
        self.state.rflags = rflags & !changed & !RF & !VIF | image & changed | virtual_flag | 2;
        Ok(())
    }

    /// IRET from level 0 to virtual-8086 mode. SDM vol. 3, 21.2.5.
    fn return_to_vm86(
        &mut self,
        selector: u16,
        offset: u64,
        image: u64,
        mut stack: Stack,
    ) -> Result<(), Fault> {
        let pointer = self.pop(&mut stack, 4)?;
        for name in [SegmentName::Ss, SegmentName::Es, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs] {
            let selector = self.pop(&mut stack, 4)? as u16;
            *self.segment_mut(name) = Segment::real_mode(selector, 0xf3);
        }
        *self.segment_mut(SegmentName::Cs) = Segment::real_mode(selector, 0xf3);
        if offset > 0xffff {
            return Err(self.fault(GP, 0));
        }
        self.state.rip = offset;
        self.rsp = pointer;
        self.state.rflags = image & DEFINED | 2;
        Ok(())
    }
}

impl<C: Cpu> Execution<'_, C> {
    /// Selector and offset of a far pointer, immediate or in memory.
    pub(super) fn far_pointer(&mut self) -> Result<(u16, u64), Fault> {
        let DecodedInsn { size, imm, .. } = *self.insn;
        if self.insn.src == Operand::Imm {
            return Ok(((imm >> 32) as u16, imm & mask(4)));
        }
        let seg = self.insn.mem.seg;
        let offset = self.offset(0);
        let behind = offset.wrapping_add(size.into()) & mask(self.insn.mem.size);
        let pointer_at = self.linear(seg, offset, size, AccessKind::Read)?;
        let selector_at = self.linear(seg, behind, 2, AccessKind::Read)?;
        let pointer = self.load(pointer_at, size, AccessKind::Read)?;
        Ok((self.load(selector_at, 2, AccessKind::Read)? as u16, pointer))
    }

    pub(super) fn far_jump(&mut self) -> Result<Flow, Fault> {
        let (selector, offset) = self.far_pointer()?;
        let next_rip = self.next_rip();
        let mut change = Change::new(self.cpu);
        match change.jump_far(selector, offset)? {
            Some(task) => self.switch_task(task, TaskSwitchCause::Jump, next_rip),
            None => arrive(change),
        }
    }

    pub(super) fn far_call(&mut self) -> Result<Flow, Fault> {
        let (selector, offset) = self.far_pointer()?;
        let next_rip = self.next_rip();
        let size = self.insn.size;
        let mut change = Change::new(self.cpu);
        match change.call_far(selector, offset, size, next_rip)? {
            Some(task) => self.switch_task(task, TaskSwitchCause::Call, next_rip),
            None => arrive(change),
        }
    }

    pub(super) fn far_return(&mut self) -> Result<Flow, Fault> {
        let DecodedInsn { size, imm, .. } = *self.insn;
        let mut change = Change::new(self.cpu);
        change.ret_far(size, imm)?;
        arrive(change)
    }

    pub(super) fn interrupt_return(&mut self) -> Result<Flow, Fault> {
        let next_rip = self.next_rip();
        let size = self.insn.size;
        let mut change = Change::new(self.cpu);
        let flow = match change.interrupt_return(size)? {
            Some(task) => self.switch_task(task, TaskSwitchCause::Iret, next_rip)?,
            None => {
                // RF is what was popped.
                let trap = change.cpu.rflags() & TF != 0;
                change.commit()?.clear_interrupt_shadow();
                Flow::Ended(Outcome::Done { trap })
            }
        };
        self.cpu.unblock_nmi();
        Ok(flow)
    }

    /// Leaves for another task.
    pub(super) fn switch_task(
        &mut self,
        selector: u16,
        cause: TaskSwitchCause,
        next_rip: u64,
    ) -> Result<Flow, Fault> {
        let switch = TaskSwitch { selector, cause, next_rip, error_code: None, external: false };
        super::task::switch(self.cpu, &switch).map(Flow::Ended)
    }
}

/// Completes a far transfer other than IRET: RF and the interrupt shadow end, and TF as it was before traps.
pub(super) fn arrive<C: Cpu>(mut change: Change<'_, C>) -> Result<Flow, Fault> {
    let trap = change.cpu.rflags() & TF != 0;
    change.state.rflags &= !RF;
    change.commit()?.clear_interrupt_shadow();
    Ok(Flow::Ended(Outcome::Done { trap }))
}
