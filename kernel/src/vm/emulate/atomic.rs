//! Exchanges: XCHG, XADD, CMPXCHG, CMPXCHG8B and CMPXCHG16B.
use super::cpu::{Access, AccessKind, Cpu, Fault};
use super::decode::{DecodedInsn, Gpr, Operand};
use super::execute::Execution;
use super::flags::{self, bits, mask, ZF};

impl<C: Cpu> Execution<'_, C> {
    pub(super) fn exchange(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let new = self.read_operand(src, size)?;
        let old = if dst == Operand::Mem {
            let linear = self.operand_address(size, AccessKind::ReadModify)?;
            self.update_memory(linear, size, |_| (new, 0))?.0
        } else {
            let old = self.read_operand(dst, size)?;
            self.write_operand(dst, size, new)?;
            old
        };
        self.write_operand(src, size, old)
    }

    pub(super) fn exchange_add(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let addend = self.read_operand(src, size)?;
        let status = if dst == Operand::Mem {
            let linear = self.operand_address(size, AccessKind::ReadModify)?;
            let (old, status) =
                self.update_memory(linear, size, |value| flags::add(value, addend, false, size))?;
            self.write_operand(src, size, old)?;
            status
        } else {
            // The sum is written last: it wins if both operands are one register.
            let old = self.read_operand(dst, size)?;
            let (sum, status) = flags::add(old, addend, false, size);
            self.write_operand(src, size, old)?;
            self.write_operand(dst, size, sum)?;
            status
        };
        self.set_status(status);
        Ok(())
    }

    /// CMPXCHG. Memory is written in either case, as the processor does; a failed comparison writes back what was read.
    pub(super) fn compare_exchange(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let expected = self.cpu.gpr(Gpr::Rax) & mask(size);
        let new = self.read_operand(src, size)?;
        let old = if dst == Operand::Mem {
            let linear = self.operand_address(size, AccessKind::ReadModify)?;
            let old = self.load(linear, size, AccessKind::ReadModify)?;
            let new = if old == expected { new } else { old };
            self.commit(linear, size, old.into(), new.into())?;
            old
        } else {
            let old = self.read_operand(dst, size)?;
            if old == expected {
                self.write_operand(dst, size, new)?;
            }
            old
        };
        if old != expected {
            self.set_register(Gpr::Rax, size, old);
        }
        self.set_status(flags::sub(expected, old, false, size).1);
        Ok(())
    }

    /// CMPXCHG8B and CMPXCHG16B: only ZF changes. The 16-byte operand must be aligned.
    pub(super) fn compare_exchange_pair(&mut self) -> Result<(), Fault> {
        let size = self.insn.size;
        let half = size / 2;
        let linear = self.operand_address(size, AccessKind::ReadModify)?;
        if size == 16 && linear & 15 != 0 {
            return Err(self.general_protection().into());
        }
        let pair =
            |low: u64, high: u64| u128::from(low & mask(half)) | u128::from(high & mask(half)) << bits(half);
        let expected = pair(self.cpu.gpr(Gpr::Rax), self.cpu.gpr(Gpr::Rdx));
        let new = pair(self.cpu.gpr(Gpr::Rbx), self.cpu.gpr(Gpr::Rcx));
        let old = if size == 8 {
            u128::from(self.load(linear, 8, AccessKind::ReadModify)?)
        } else {
            // Two reads that may straddle another vCPU's write: the exchange below finds out.
            let low = self.load(linear, 8, AccessKind::ReadModify)?;
            pair(low, self.load(linear + 8, 8, AccessKind::ReadModify)?)
        };
        let equal = old == expected;
        self.commit(linear, size, old, if equal { new } else { old })?;
        if !equal {
            self.set_register(Gpr::Rax, half, old as u64);
            self.set_register(Gpr::Rdx, half, (old >> bits(half)) as u64);
        }
        let rflags = self.cpu.rflags();
        self.set_status(rflags & !ZF | if equal { ZF } else { 0 });
        Ok(())
    }

    /// Replaces what was just read. If another vCPU was faster, the guest executes the instruction again.
    fn commit(&mut self, linear: u64, size: u8, old: u128, new: u128) -> Result<(), Fault> {
        let access = Access { kind: AccessKind::Write, sole: self.sole };
        if self.cpu.compare_exchange(linear, size, old, new, access)? {
            Ok(())
        } else {
            Err(Fault::Retry)
        }
    }
}
