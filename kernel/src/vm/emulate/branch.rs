//! Near branches: JMP, CALL and RET, conditional jumps, loops. The target is checked before anything changes.
use super::cpu::{Cpu, Fault, Mode};
use super::decode::{DecodedInsn, Gpr, Loop, Operand, Seg};
use super::execute::{Execution, Flow};
use super::flags::{mask, ZF};

impl<C: Cpu> Execution<'_, C> {
    pub(super) fn call(&mut self) -> Result<Flow, Fault> {
        let size = self.insn.size;
        let target = self.branch_target()?;
        self.push_value(size, self.next_rip())?;
        Ok(Flow::To(target))
    }

    pub(super) fn jump(&mut self) -> Result<Flow, Fault> {
        Ok(Flow::To(self.branch_target()?))
    }

    pub(super) fn jump_if(&mut self, taken: bool) -> Result<Flow, Fault> {
        if taken {
            self.jump()
        } else {
            Ok(Flow::Next)
        }
    }

    /// LOOP, LOOPE, LOOPNE, and JCXZ, which only looks at the count. No flag changes.
    pub(super) fn count_and_jump(&mut self, kind: Loop) -> Result<Flow, Fault> {
        let width = self.insn.mem.size;
        let count = self.cpu.gpr(Gpr::Rcx) & mask(width);
        if kind == Loop::IfZero {
            return self.jump_if(count == 0);
        }
        let count = count.wrapping_sub(1) & mask(width);
        let equal = self.cpu.rflags() & ZF != 0;
        let taken = count != 0
            && match kind {
                Loop::WhileEqual => equal,
                Loop::WhileNotEqual => !equal,
                Loop::IfZero | Loop::Always => true,
            };
        let flow = self.jump_if(taken)?;
        self.set_register(Gpr::Rcx, width, count);
        Ok(flow)
    }

    /// RET, which also releases as many bytes of arguments as its immediate says.
    pub(super) fn ret(&mut self) -> Result<Flow, Fault> {
        let DecodedInsn { size, imm, .. } = *self.insn;
        let (target, top) = self.peek_value(size)?;
        let target = self.checked_target(target)?;
        let top = top.wrapping_add(size.into()).wrapping_add(imm);
        self.set_register(Gpr::Rsp, self.stack_size(), top);
        Ok(Flow::To(target))
    }

    /// Where a JMP or CALL goes. The sum of a relative branch is cut to the operand size.
    fn branch_target(&mut self) -> Result<u64, Fault> {
        let DecodedInsn { dst, size, imm, .. } = *self.insn;
        let target = match dst {
            Operand::Near => self.cpu.rip().wrapping_add(imm) & mask(size),
            _ => self.read_operand(dst, size)?,
        };
        self.checked_target(target)
    }

    /// #GP(0) unless code may lie at `target`: within CS, or at a canonical address in 64-bit mode.
    fn checked_target(&self, target: u64) -> Result<u64, Fault> {
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
