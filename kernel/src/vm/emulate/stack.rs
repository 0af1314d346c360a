//! Stack operations and indirect near branches.
use super::cpu::{AccessKind, Cpu, Fault, Mode};
use super::decode::{DecodedInsn, Gpr, Operand, Seg};
use super::execute::{Execution, Flow};
use super::flags::mask;

impl<C: Cpu> Execution<'_, C> {
    /// Width of the stack pointer in bytes: 8 in 64-bit mode, else by SS.B.
    fn stack_size(&self) -> u8 {
        match self.mode {
            Mode::Long64 => 8,
            _ if self.cpu.segment(Seg::Ss).attributes.big() => 4,
            _ => 2,
        }
    }

    /// Writes `value` below the stack pointer and moves it.
    fn push_value(&mut self, size: u8, value: u64) -> Result<(), Fault> {
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

    pub(super) fn pop(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let width = self.stack_size();
        let top = self.cpu.gpr(Gpr::Rsp) & mask(width);
        let source = self.linear(Seg::Ss, top, size, AccessKind::Read)?;
        let value = self.load(source, size, AccessKind::Read)?;
        if dst == Operand::Mem {
            // An address based on RSP uses its value after the pop. AMD APM vol. 3, POP.
            let offset = self.offset(size.into());
            let linear = self.linear(self.insn.mem.seg, offset, size, AccessKind::Write)?;
            self.store(linear, size, value)?;
        }
        self.set_register(Gpr::Rsp, width, top.wrapping_add(size.into()));
        if dst != Operand::Mem {
            // POP RSP: the popped value wins.
            self.write_operand(dst, size, value)?;
        }
        Ok(())
    }

    pub(super) fn call(&mut self) -> Result<Flow, Fault> {
        let size = self.insn.size;
        let target = self.branch_target()?;
        self.push_value(size, self.next_rip())?;
        Ok(Flow::To(target))
    }

    pub(super) fn jump(&mut self) -> Result<Flow, Fault> {
        Ok(Flow::To(self.branch_target()?))
    }

    /// Where an indirect near branch goes, if code may lie there.
    fn branch_target(&mut self) -> Result<u64, Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let target = self.read_operand(dst, size)?;
        let valid = match self.mode {
            Mode::Long64 => self.canonical(target),
            _ => target <= u64::from(self.cpu.segment(Seg::Cs).limit),
        };
        if valid {
            Ok(target)
        } else {
            Err(self.general_protection().into())
        }
    }
}
