//! Integer instructions that fit no other group: LEA, sign extensions of the accumulator, byte swaps and table
//! look-ups, BOUND, cache-line instructions, the time-stamp counter, random numbers.
use super::cpu::{Access, AccessKind, Cpu, Exception, Fault};
use super::decode::{DecodedInsn, Gpr};
use super::execute::Execution;
use super::flags::{bits, mask, sign_extend, CF};
use crate::vm::control_regs::CR4_TSD;

impl<C: Cpu> Execution<'_, C> {
    /// LEA: the offset, without any check.
    pub(super) fn load_address(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        self.write_operand(dst, size, self.offset(0))
    }

    /// BSWAP. Of a 16-bit register (undefined) processors make zero.
    pub(super) fn swap_bytes(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let value = self.read_operand(dst, size)?;
        let swapped = if size == 2 { 0 } else { value.swap_bytes() >> (64 - bits(size)) };
        self.write_operand(dst, size, swapped)
    }

    /// CBW, CWDE, CDQE.
    pub(super) fn widen(&mut self) {
        let size = self.insn.size;
        let value = sign_extend(self.cpu.gpr(Gpr::Rax), size / 2);
        self.set_register(Gpr::Rax, size, value);
    }

    /// CWD, CDQ, CQO.
    pub(super) fn widen_pair(&mut self) {
        let size = self.insn.size;
        let negative = sign_extend(self.cpu.gpr(Gpr::Rax), size) >> 63 != 0;
        self.set_register(Gpr::Rdx, size, if negative { u64::MAX } else { 0 });
    }

    /// XLAT: AL is replaced by the byte at that index behind RBX.
    pub(super) fn translate_byte(&mut self) -> Result<(), Fault> {
        let al = self.cpu.gpr(Gpr::Rax) & 0xff;
        let offset = self.offset(0).wrapping_add(al) & mask(self.insn.mem.size);
        let linear = self.linear(self.insn.mem.seg, offset, 1, AccessKind::Read)?;
        let value = self.load(linear, 1, AccessKind::Read)?;
        self.set_register(Gpr::Rax, 1, value);
        Ok(())
    }

    /// BOUND: #BR unless the signed index lies between the two bounds in memory.
    pub(super) fn bound(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let linear = self.operand_address(2 * size, AccessKind::Read)?;
        let pair = self.load(linear, 2 * size, AccessKind::Read)?;
        let signed = |value: u64| sign_extend(value, size) as i64;
        let index = signed(self.read_operand(dst, size)?);
        if (signed(pair)..=signed(pair >> bits(size))).contains(&index) {
            Ok(())
        } else {
            Err(Exception::BOUND_RANGE.into())
        }
    }

    /// SALC, undocumented: all bits of AL become CF.
    pub(super) fn set_al_by_carry(&mut self) {
        let carry = self.cpu.rflags() & CF != 0;
        self.set_register(Gpr::Rax, 1, if carry { 0xff } else { 0 });
    }

    /// CLFLUSH, CLFLUSHOPT, CLWB: caches are coherent here, so only the faults of a read matter.
    pub(super) fn cache_line(&mut self) -> Result<(), Fault> {
        let linear = self.operand_address(1, AccessKind::Read)?;
        self.cpu.probe_read(linear, 1, Access { kind: AccessKind::Read, sole: self.sole })
    }

    /// RDTSC, and RDTSCP (`with_aux`), which loads TSC_AUX into ECX.
    pub(super) fn read_tsc(&mut self, with_aux: bool) -> Result<(), Fault> {
        let aux = self.cpu.tsc_aux();
        if with_aux && aux.is_none() {
            return Err(Exception::INVALID_OPCODE.into());
        }
        if self.cpu.cpl() > 0 && self.cpu.cr4() & CR4_TSD != 0 {
            return Err(self.general_protection().into());
        }
        let tsc = self.cpu.tsc();
        self.set_register(Gpr::Rax, 4, tsc);
        self.set_register(Gpr::Rdx, 4, tsc >> 32);
        if let (true, Some(aux)) = (with_aux, aux) {
            self.set_register(Gpr::Rcx, 4, aux.into());
        }
        Ok(())
    }

    /// RDRAND and RDSEED. CF: there was a number; otherwise the result is 0. The other status flags are cleared.
    pub(super) fn random(&mut self, seed: bool) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        if !self.cpu.has_random(seed) {
            return Err(Exception::INVALID_OPCODE.into());
        }
        let number = self.cpu.random(seed);
        self.write_operand(dst, size, number.unwrap_or(0))?;
        self.set_status(if number.is_some() { CF } else { 0 });
        Ok(())
    }
}
