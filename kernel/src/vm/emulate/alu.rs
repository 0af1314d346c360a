//! Arithmetic, logic, shifts, bit tests and scans, on registers and memory.
use super::cpu::{Access, AccessKind, Cpu, Exception, Fault};
use super::decode::{Alu, BitOp, DecodedInsn, Gpr, Operand, Scan, Unary};
use super::execute::Execution;
use super::flags::{self, bits, mask, sign_extend, Flagged, Shift, AF, CF, OF, PF, SF, STATUS, ZF};

/// How often a locked operation is tried against other vCPUs before the guest is entered again.
const LOCK_ATTEMPTS: u32 = 64;

impl<C: Cpu> Execution<'_, C> {
    /// Replaces the destination operand by `f` of it; `f` also yields the status flags.
    pub(super) fn update(&mut self, f: impl Fn(u64) -> Flagged) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let status = if dst == Operand::Mem {
            let linear = self.operand_address(size, AccessKind::ReadModify)?;
            self.update_memory(linear, size, f)?.1
        } else {
            let (result, status) = f(self.read_operand(dst, size)?);
            self.write_operand(dst, size, result)?;
            status
        };
        self.set_status(status);
        Ok(())
    }

    /// Replaces `size` bytes of memory by `f` of them, atomically if the instruction is locked. Returns the old value
    /// and the status flags.
    pub(super) fn update_memory(
        &mut self,
        linear: u64,
        size: u8,
        f: impl Fn(u64) -> Flagged,
    ) -> Result<Flagged, Fault> {
        for _ in 0..LOCK_ATTEMPTS {
            let old = self.load(linear, size, AccessKind::ReadModify)?;
            let (new, status) = f(old);
            if !self.insn.locked {
                self.store(linear, size, new)?;
                return Ok((old, status));
            }
            let access = Access { kind: AccessKind::Write, sole: self.sole };
            let new = new & mask(size);
            if self.cpu.compare_exchange(linear, size, old.into(), new.into(), access)? {
                return Ok((old, status));
            }
        }
        Err(Fault::Retry)
    }

    pub(super) fn alu(&mut self, alu: Alu) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, src_size, .. } = *self.insn;
        let carry = self.cpu.rflags() & CF != 0;
        if alu == Alu::Cmp {
            let left = self.read_operand(dst, size)?;
            let right = self.read_operand(src, src_size)?;
            self.set_status(flags::sub(left, right, false, size).1);
            return Ok(());
        }
        let right = self.read_operand(src, src_size)?;
        self.update(|left| match alu {
            Alu::Add => flags::add(left, right, false, size),
            Alu::Adc => flags::add(left, right, carry, size),
            Alu::Sub | Alu::Cmp => flags::sub(left, right, false, size),
            Alu::Sbb => flags::sub(left, right, carry, size),
            Alu::And => flags::logic(left & right, size),
            Alu::Or => flags::logic(left | right, size),
            Alu::Xor => flags::logic(left ^ right, size),
        })
    }

    pub(super) fn test(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, src_size, .. } = *self.insn;
        let result = self.read_operand(dst, size)? & self.read_operand(src, src_size)?;
        self.set_status(flags::logic(result, size).1);
        Ok(())
    }

    pub(super) fn unary(&mut self, unary: Unary) -> Result<(), Fault> {
        let size = self.insn.size;
        let old = self.cpu.rflags();
        let keep_carry = |(result, status): Flagged| (result, status & !CF | old & CF);
        self.update(|value| match unary {
            Unary::Inc => keep_carry(flags::add(value, 1, false, size)),
            Unary::Dec => keep_carry(flags::sub(value, 1, false, size)),
            Unary::Not => (!value & mask(size), old),
            Unary::Neg => flags::sub(0, value, false, size),
        })
    }

    pub(super) fn shift(&mut self, shift: Shift) -> Result<(), Fault> {
        let DecodedInsn { src, size, .. } = *self.insn;
        let count = self.read_operand(src, 1)?;
        let old = self.cpu.rflags();
        self.update(|value| flags::shift(shift, value, count, size, old))
    }

    pub(super) fn double_shift(&mut self, left: bool) -> Result<(), Fault> {
        let DecodedInsn { src, third, size, .. } = *self.insn;
        let fill = self.read_operand(src, size)?;
        let count = self.read_operand(third, 1)?;
        let old = self.cpu.rflags();
        self.update(|value| flags::double_shift(left, value, fill, count, size, old))
    }

    /// BT, BTS, BTR, BTC. CF is the bit; the other flags (undefined but for ZF) stay.
    pub(super) fn bit(&mut self, op: BitOp) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let index = self.read_operand(src, size)?;
        let within = index & u64::from(bits(size) - 1);
        let old = self.cpu.rflags();
        let apply = |value: u64| {
            let bit = 1 << within;
            let result = match op {
                BitOp::Test => value,
                BitOp::Set => value | bit,
                BitOp::Reset => value & !bit,
                BitOp::Complement => value ^ bit,
            };
            (result, old & !CF | u64::from(value & bit != 0))
        };
        if dst != Operand::Mem {
            if op == BitOp::Test {
                let status = apply(self.read_operand(dst, size)?).1;
                self.set_status(status);
                return Ok(());
            }
            return self.update(apply);
        }
        // A register's bit offset is signed and reaches beyond the operand, in steps of the operand's size.
        let mut offset = self.offset(0);
        if src != Operand::Imm {
            let operands = sign_extend(index, size) as i64 >> bits(size).trailing_zeros();
            offset = offset.wrapping_add((operands as u64).wrapping_mul(u64::from(size)));
            offset &= mask(self.insn.mem.size);
        }
        let kind = if op == BitOp::Test { AccessKind::Read } else { AccessKind::ReadModify };
        let linear = self.linear(self.insn.mem.seg, offset, size, kind)?;
        let status = if op == BitOp::Test {
            apply(self.load(linear, size, kind)?).1
        } else {
            self.update_memory(linear, size, apply)?.1
        };
        self.set_status(status);
        Ok(())
    }

    /// BSF, BSR (a zero source leaves the destination, as AMD defines it), TZCNT, LZCNT, POPCNT. Undefined flags stay,
    /// except that POPCNT clears all but ZF.
    pub(super) fn scan(&mut self, scan: Scan) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let value = self.read_operand(src, size)?;
        let old = self.cpu.rflags();
        let zero = |condition: bool| if condition { ZF } else { 0 };
        let leading = value.leading_zeros() - (64 - bits(size));
        let trailing = value.trailing_zeros().min(bits(size));
        let (result, status) = match scan {
            Scan::Bsf | Scan::Bsr if value == 0 => {
                self.set_status(old | ZF);
                return Ok(());
            }
            Scan::Bsf => (trailing, old & !ZF),
            Scan::Bsr => (bits(size) - 1 - leading, old & !ZF),
            Scan::Tzcnt | Scan::Lzcnt => {
                let count = if scan == Scan::Tzcnt { trailing } else { leading };
                (count, old & !(CF | ZF) | u64::from(value == 0) | zero(count == 0))
            }
            Scan::Popcnt => (value.count_ones(), old & !STATUS | zero(value == 0)),
        };
        self.write_operand(dst, size, u64::from(result))?;
        self.set_status(status);
        Ok(())
    }

    /// MUL and one-operand IMUL. CF and OF: the upper half is significant. SF, ZF, AF and PF (undefined) stay.
    pub(super) fn multiply_wide(&mut self, signed: bool) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let right = self.read_operand(dst, size)?;
        let left = self.cpu.gpr(Gpr::Rax) & mask(size);
        let (product, significant) = if signed {
            let product =
                i128::from(sign_extend(left, size) as i64) * i128::from(sign_extend(right, size) as i64);
            (product as u128, product != i128::from(sign_extend(product as u64, size) as i64))
        } else {
            let product = u128::from(left) * u128::from(right);
            (product, product >> bits(size) != 0)
        };
        self.set_wide(size, product);
        self.set_multiplied(significant);
        Ok(())
    }

    /// Two- and three-operand IMUL; flags as [`Self::multiply_wide`].
    pub(super) fn multiply(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, third, size, .. } = *self.insn;
        let left = self.read_operand(src, size)?;
        let right = self.read_operand(if third == Operand::None { dst } else { third }, size)?;
        let product =
            i128::from(sign_extend(left, size) as i64) * i128::from(sign_extend(right, size) as i64);
        self.write_operand(dst, size, product as u64)?;
        self.set_multiplied(product != i128::from(sign_extend(product as u64, size) as i64));
        Ok(())
    }

    fn set_multiplied(&mut self, significant: bool) {
        let rest = self.cpu.rflags() & (SF | ZF | AF | PF);
        self.set_status(rest | if significant { CF | OF } else { 0 });
    }

    /// DIV and IDIV. All status flags (undefined) stay.
    pub(super) fn divide(&mut self, signed: bool) -> Result<(), Fault> {
        let DecodedInsn { dst, size, .. } = *self.insn;
        let divisor = self.read_operand(dst, size)?;
        let dividend = self.wide(size);
        let (quotient, remainder) = if signed {
            let unused = 128 - 2 * bits(size);
            let dividend = (dividend << unused) as i128 >> unused;
            let divisor = i128::from(sign_extend(divisor, size) as i64);
            // None: by zero, or i128::MIN by -1.
            let (Some(quotient), Some(remainder)) =
                (dividend.checked_div(divisor), dividend.checked_rem(divisor))
            else {
                return Err(Exception::DIVIDE.into());
            };
            if quotient != i128::from(sign_extend(quotient as u64, size) as i64) {
                return Err(Exception::DIVIDE.into());
            }
            (quotient as u64, remainder as u64)
        } else {
            let divisor = u128::from(divisor);
            let (Some(quotient), Some(remainder)) =
                (dividend.checked_div(divisor), dividend.checked_rem(divisor))
            else {
                return Err(Exception::DIVIDE.into());
            };
            if quotient > u128::from(mask(size)) {
                return Err(Exception::DIVIDE.into());
            }
            (quotient as u64, remainder as u64)
        };
        let both = u128::from(quotient & mask(size)) | u128::from(remainder & mask(size)) << bits(size);
        self.set_wide(size, both);
        Ok(())
    }

    /// The accumulator pair of multiplication and division: AX, DX:AX, EDX:EAX or RDX:RAX.
    fn wide(&self, size: u8) -> u128 {
        let (rax, rdx) = (self.cpu.gpr(Gpr::Rax), self.cpu.gpr(Gpr::Rdx));
        match size {
            1 => u128::from(rax & mask(2)),
            _ => u128::from(rdx & mask(size)) << bits(size) | u128::from(rax & mask(size)),
        }
    }

    fn set_wide(&mut self, size: u8, value: u128) {
        if size == 1 {
            self.set_register(Gpr::Rax, 2, value as u64);
        } else {
            self.set_register(Gpr::Rax, size, value as u64);
            self.set_register(Gpr::Rdx, size, (value >> bits(size)) as u64);
        }
    }
}
