//! A change of the CPU's state, put together piece by piece and made at once when nothing of it can fault any more.
use super::address::is_canonical;
use super::cpu::{Access, AccessKind, Cpu, Exception, Fault, Mode};
use super::decode::Gpr;
use super::flags::{self, mask};
use super::segment::Descriptor;
use crate::hw::{CpuState, Segment, SegmentName};
use crate::vm::control_regs::CR0_AM;
use crate::vm::msr::EFER_LMA;

/// #TS, invalid TSS.
pub(super) const TS: u8 = 10;
/// #NP, segment not present.
pub(super) const NP: u8 = 11;
/// #SS, stack fault.
pub(super) const SS: u8 = 12;
/// #GP, general protection.
pub(super) const GP: u8 = 13;

/// A call gate copies up to 31 parameters beside SS, the stack pointer, CS and the instruction pointer.
const WRITES: usize = 36;
/// CS, SS and, of one instruction, no more than one data segment or system descriptor beside them.
const MARKS: usize = 8;

/// A write that is still to be done.
#[derive(Clone, Copy)]
struct Write {
    linear: u64,
    size: u8,
    value: u64,
    kind: AccessKind,
}

/// Byte 5 of a descriptor, whose type is to become `new`: accessed or busy.
#[derive(Clone, Copy)]
struct Mark {
    linear: u64,
    old: u8,
    new: u8,
}

/// A stack that is pushed to or popped from.
#[derive(Clone, Copy)]
pub(super) struct Stack {
    /// Its segment.
    pub(super) segment: Segment,
    /// Width of the stack pointer in bytes.
    pub(super) width: u8,
    /// The stack pointer, as wide as the register.
    pub(super) pointer: u64,
    /// Privilege level whose stack it is.
    pub(super) level: u8,
    /// Error code of its #SS, EXT apart.
    pub(super) code: u32,
}

impl Stack {
    /// Moves the pointer by `bytes`, wrapping at its width.
    pub(super) fn advance(&mut self, bytes: u64) {
        self.point(self.pointer.wrapping_add(bytes));
    }

    /// Sets the part of the pointer that the width covers.
    pub(super) fn point(&mut self, offset: u64) {
        self.pointer = match self.width {
            8 => offset,
            4 => offset & mask(4),
            _ => self.pointer & !mask(2) | offset & mask(2),
        };
    }
}

/// See the module.
pub(super) struct Change<'a, C> {
    pub(super) cpu: &'a mut C,
    /// Execution mode before.
    pub(super) mode: Mode,
    /// Privilege level before.
    pub(super) cpl: u8,
    /// The state as it will be.
    pub(super) state: CpuState,
    /// RSP as it will be.
    pub(super) rsp: u64,
    /// EXT of error codes: 1 while an event from outside the program is delivered.
    pub(super) external: u32,
    writes: [Option<Write>; WRITES],
    marks: [Option<Mark>; MARKS],
    /// The descriptor of the task that is left, which is no longer busy.
    left: Option<Mark>,
}

impl<'a, C: Cpu> Change<'a, C> {
    /// Nothing changed so far.
    pub(super) fn new(cpu: &'a mut C) -> Self {
        let (mode, cpl, state, rsp) = (cpu.mode(), cpu.cpl(), cpu.state(), cpu.gpr(Gpr::Rsp));
        Self {
            cpu,
            mode,
            cpl,
            state,
            rsp,
            external: 0,
            writes: [None; WRITES],
            marks: [None; MARKS],
            left: None,
        }
    }

    /// The CPU is in long mode, as it was before.
    pub(super) fn long_mode(&self) -> bool {
        self.state.efer & EFER_LMA != 0
    }

    /// Real or virtual-8086 mode before.
    pub(super) fn is_8086(&self) -> bool {
        matches!(self.mode, Mode::Real | Mode::Vm86)
    }

    pub(super) fn segment(&self, name: SegmentName) -> Segment {
        self.state.segments[name as usize]
    }

    pub(super) fn segment_mut(&mut self, name: SegmentName) -> &mut Segment {
        &mut self.state.segments[name as usize]
    }

    /// An exception with an error code, to which EXT is added.
    #[cold]
    pub(super) fn fault(&self, vector: u8, code: u32) -> Fault {
        let error_code = (self.mode != Mode::Real).then_some(code | self.external);
        Exception { vector, error_code, cr2: None }.into()
    }

    /// An exception whose error code names `selector`.
    #[cold]
    pub(super) fn selector_fault(&self, vector: u8, selector: u16) -> Fault {
        self.fault(vector, u32::from(selector & !3))
    }

    /// Linear address of `size` bytes at `offset` from the base of a system table; `None` beyond all addresses.
    pub(super) fn table_address(&self, base: u64, offset: u64, size: u8) -> Option<u64> {
        let last = u64::from(size) - 1;
        if self.long_mode() {
            let linear = base.wrapping_add(offset);
            let end = linear.checked_add(last)?;
            (self.canonical(linear) && self.canonical(end)).then_some(linear)
        } else {
            let linear = base.wrapping_add(offset) & mask(4);
            (linear + last <= mask(4)).then_some(linear)
        }
    }

    /// Whether an address is the sign extension of its implemented bits.
    pub(super) fn canonical(&self, linear: u64) -> bool {
        is_canonical(linear, self.cpu.linear_bits())
    }

    /// Reads a piece of a system table.
    pub(super) fn read_system(&mut self, linear: u64, size: u8) -> Result<u64, Fault> {
        self.cpu.read(linear, size, Access { kind: AccessKind::System, sole: false })
    }

    /// The stack that the CPU uses before the change.
    pub(super) fn stack(&self) -> Stack {
        let segment = self.segment(SegmentName::Ss);
        let width = match self.mode {
            Mode::Long64 => 8,
            _ if segment.attributes & Segment::DEFAULT_32 != 0 => 4,
            _ => 2,
        };
        Stack { segment, width, pointer: self.rsp, level: self.cpl, code: 0 }
    }

    /// Linear address of `size` bytes at `offset` in `stack`, or its #SS.
    fn stack_address(&self, stack: &Stack, offset: u64, size: u8) -> Result<u64, Fault> {
        let last = u64::from(size) - 1;
        let linear = if stack.width == 8 {
            let valid = offset.checked_add(last).is_some_and(|end| self.canonical(end));
            (valid && self.canonical(offset)).then_some(offset)
        } else {
            let Segment { attributes, limit, base, .. } = stack.segment;
            let end = offset + last;
            let expands_down = attributes & 0xc == 4;
            let top = if attributes & Segment::DEFAULT_32 != 0 { mask(4) } else { mask(2) };
            let inside =
                if expands_down { offset > u64::from(limit) && end <= top } else { end <= u64::from(limit) };
            let usable = self.mode == Mode::Real || attributes & 0x80 != 0;
            let linear = base.wrapping_add(offset) & mask(4);
            (inside && usable && linear + last <= mask(4)).then_some(linear)
        };
        let linear = linear.ok_or_else(|| self.fault(SS, stack.code))?;
        let checked = stack.level == 3 && self.state.rflags & flags::AC != 0 && self.state.cr0 & CR0_AM != 0;
        if checked && linear & last != 0 {
            return Err(Exception { vector: 17, error_code: Some(0), cr2: None }.into());
        }
        Ok(linear)
    }

    /// Pushes the low `size` bytes of `value`.
    pub(super) fn push(&mut self, stack: &mut Stack, size: u8, value: u64) -> Result<(), Fault> {
        let top = stack.pointer.wrapping_sub(size.into()) & mask(stack.width);
        let linear = self.stack_address(stack, top, size)?;
        let kind = if stack.level == self.cpl { AccessKind::Write } else { AccessKind::WriteAs(stack.level) };
        self.write(linear, size, value, kind)?;
        stack.point(top);
        Ok(())
    }

    /// Pops `size` bytes.
    pub(super) fn pop(&mut self, stack: &mut Stack, size: u8) -> Result<u64, Fault> {
        let value = self.peek(stack, 0, size)?;
        stack.advance(size.into());
        Ok(value)
    }

    /// Reads `size` bytes `above` the top of the stack.
    pub(super) fn peek(&mut self, stack: &Stack, above: u64, size: u8) -> Result<u64, Fault> {
        let offset = stack.pointer.wrapping_add(above) & mask(stack.width);
        let linear = self.stack_address(stack, offset, size)?;
        self.cpu.read(linear, size, Access { kind: AccessKind::Read, sole: false })
    }

    /// Plans a write.
    pub(super) fn write(&mut self, linear: u64, size: u8, value: u64, kind: AccessKind) -> Result<(), Fault> {
        let slot = self.writes.iter_mut().find(|slot| slot.is_none());
        let slot = slot.ok_or(Fault::Unsupported("too many writes of one instruction"))?;
        *slot = Some(Write { linear, size, value: value & mask(size), kind });
        Ok(())
    }

    /// Plans to set bits in the type of `descriptor`, if they are not set already.
    pub(super) fn mark(&mut self, descriptor: &Descriptor, bits: u8) -> Result<(), Fault> {
        let old = (descriptor.low >> 40) as u8;
        if old & bits == bits {
            return Ok(());
        }
        let mark = Mark { linear: descriptor.linear.wrapping_add(5), old, new: old | bits };
        let slot = self.marks.iter_mut().find(|slot| {
            // The same descriptor for two segment registers is marked once.
            slot.is_none_or(|known| known.linear == mark.linear)
        });
        *slot.ok_or(Fault::Unsupported("too many descriptors of one instruction"))? = Some(mark);
        Ok(())
    }

    /// Plans to clear the busy bit of the task that is left.
    pub(super) fn leave_task(&mut self, descriptor: &Descriptor) {
        let old = (descriptor.low >> 40) as u8;
        let linear = descriptor.linear.wrapping_add(5);
        self.left = Some(Mark { linear, old, new: old & !super::segment::BUSY });
    }

    /// Makes the change. Translations are tried before anything is written, so a fault has no effect.
    pub(super) fn commit(self) -> Result<&'a mut C, Fault> {
        let access = |kind| Access { kind, sole: false };
        for write in self.writes.iter().flatten() {
            self.cpu.probe_write(write.linear, write.size, access(write.kind))?;
        }
        for mark in self.marks.iter().chain([&self.left]).flatten() {
            self.cpu.probe_write(mark.linear, 1, access(AccessKind::SystemWrite))?;
        }
        for mark in self.marks.iter().flatten() {
            let (old, new) = (u128::from(mark.old), u128::from(mark.new));
            // If another CPU was faster, everything is looked at again. A bit that was set meanwhile does no harm.
            if !self.cpu.compare_exchange(mark.linear, 1, old, new, access(AccessKind::SystemWrite))? {
                return Err(Fault::Retry);
            }
        }
        if let Some(mark) = self.left {
            // If another CPU changed the descriptor meanwhile, that is what it holds now.
            let (old, new) = (u128::from(mark.old), u128::from(mark.new));
            self.cpu.compare_exchange(mark.linear, 1, old, new, access(AccessKind::SystemWrite))?;
        }
        for write in self.writes.iter().flatten() {
            self.cpu.write(write.linear, write.size, write.value, access(write.kind))?;
        }
        self.cpu.set_state(&self.state);
        self.cpu.set_gpr(Gpr::Rsp, self.rsp);
        Ok(self.cpu)
    }
}
