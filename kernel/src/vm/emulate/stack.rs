//! PUSH, POP, and what all stack operations share.
use super::cpu::{AccessKind, Cpu, Fault, Mode};
use super::decode::{DecodedInsn, Gpr, Operand, Seg};
use super::execute::Execution;
use super::flags::mask;

impl<C: Cpu> Execution<'_, C> {
    /// Width of the stack pointer in bytes: 8 in 64-bit mode, else by SS.B.
    pub(super) fn stack_size(&self) -> u8 {
        match self.mode {
            Mode::Long64 => 8,
            _ if self.cpu.segment(Seg::Ss).attributes.big() => 4,
            _ => 2,
        }
    }

    /// Writes `value` below the stack pointer and moves it.
    pub(super) fn push_value(&mut self, size: u8, value: u64) -> Result<(), Fault> {
        let width = self.stack_size();
        let top = self.cpu.gpr(Gpr::Rsp).wrapping_sub(size.into()) & mask(width);
        let linear = self.linear(Seg::Ss, top, size, AccessKind::Write)?;
        self.store(linear, size, value)?;
        self.set_register(Gpr::Rsp, width, top);
        Ok(())
    }

    pub(super) fn push(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let value = self.read_operand(dst, size)?;
        self.push_value(size, value)
    }

    /// Reads `size` bytes at the top of the stack, which does not move yet. Returns them and the stack pointer.
    pub(super) fn peek_value(&mut self, size: u8) -> Result<(u64, u64), Fault> {
        let top = self.cpu.gpr(Gpr::Rsp) & mask(self.stack_size());
        let source = self.linear(Seg::Ss, top, size, AccessKind::Read)?;
        Ok((self.load(source, size, AccessKind::Read)?, top))
    }

    pub(super) fn pop(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let (value, top) = self.peek_value(size)?;
        if dst == Operand::Mem {
            // An address based on RSP uses its value after the pop. AMD APM vol. 3, POP.
            let offset = self.offset(size.into());
            let linear = self.linear(self.insn.mem.seg, offset, size, AccessKind::Write)?;
            self.store(linear, size, value)?;
        }
        self.set_register(Gpr::Rsp, self.stack_size(), top.wrapping_add(size.into()));
        if dst != Operand::Mem {
            // POP RSP: the popped value wins.
            self.write_operand(dst, size, value)?;
        }
        Ok(())
    }
}
