//! Later additions to the integer instructions: BMI1 and BMI2, ADX, CRC32.
use super::cpu::{Cpu, Exception, Fault};
use super::decode::{Bmi, DecodedInsn, Gpr};
use super::execute::Execution;
use super::flags::{bits, logic, mask, sign_extend, CF, OF, SF, ZF};

/// CRC-32C's polynomial, bits reversed.
const CASTAGNOLI: u64 = 0x82f6_3b78;

impl<C: Cpu> Execution<'_, C> {
    /// ADCX and ADOX: an addition whose carry is CF, or OF (`overflow`); no other flag changes.
    pub(super) fn add_carry(&mut self, overflow: bool) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let flag = if overflow { OF } else { CF };
        let old = self.cpu.rflags();
        let right = self.read_operand(src, size)?;
        let left = self.read_operand(dst, size)?;
        let sum = u128::from(left) + u128::from(right) + u128::from(old & flag != 0);
        self.write_operand(dst, size, sum as u64)?;
        self.set_status(if sum >> bits(size) != 0 { old | flag } else { old & !flag });
        Ok(())
    }

    /// CRC32: the source's bytes, lowest first, into a CRC-32C.
    pub(super) fn crc32(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, src_size, .. } = *self.insn;
        let data = self.read_operand(src, src_size)?;
        let crc = self.read_operand(dst, 4)?;
        // The low 32 bits of the remainder so far and the data share one shift register.
        let mut rest = u128::from(crc) ^ u128::from(data);
        for _ in 0..bits(src_size) {
            let low = rest & 1;
            rest >>= 1;
            if low != 0 {
                rest ^= u128::from(CASTAGNOLI);
            }
        }
        self.write_operand(dst, size, rest as u64 & mask(4))
    }

    /// BMI1 and BMI2. Real and virtual-8086 mode have no VEX prefixes.
    pub(super) fn bmi(&mut self, bmi: Bmi) -> Result<(), Fault> {
        if self.mode.is_8086() {
            return Err(Exception::INVALID_OPCODE.into());
        }
        let DecodedInsn { dst, src, third, size, .. } = *self.insn;
        let width = u64::from(bits(size));
        // Only one of the two may be memory.
        let first = self.read_operand(src, size)?;
        let second = self.read_operand(third, size)?;
        let count = (second & (width - 1)) as u32;
        let (result, flags) = match bmi {
            Bmi::Andn => with_flags(!first & second, false, size),
            Bmi::Bextr => {
                let (start, len) = (second & 0xff, second >> 8 & 0xff);
                let shifted = if start < 64 { first >> start } else { 0 };
                let result = if len < 64 { shifted & ((1 << len) - 1) } else { shifted };
                // SF is undefined.
                with_flags(result, false, size)
            }
            Bmi::Blsi => with_flags(first & first.wrapping_neg(), first != 0, size),
            Bmi::Blsmsk => with_flags(first ^ first.wrapping_sub(1), first == 0, size),
            Bmi::Blsr => with_flags(first & first.wrapping_sub(1), first == 0, size),
            Bmi::Bzhi => {
                let index = second & 0xff;
                let result = if index < width { first & ((1 << index) - 1) } else { first };
                with_flags(result, index >= width, size)
            }
            Bmi::Pdep => (deposit(first, second), None),
            Bmi::Pext => (extract(first, second), None),
            Bmi::Mulx => {
                let multiplier = self.cpu.gpr(Gpr::Rdx) & mask(size);
                let product = u128::from(multiplier) * u128::from(second);
                // If both halves go to one register, the upper one stays.
                self.write_operand(src, size, product as u64)?;
                ((product >> bits(size)) as u64, None)
            }
            Bmi::Rorx => {
                let twice = u128::from(first) << width | u128::from(first);
                ((twice >> count) as u64, None)
            }
            Bmi::Sarx => ((sign_extend(first, size) as i64 >> count) as u64, None),
            Bmi::Shlx => (first << count, None),
            Bmi::Shrx => (first >> count, None),
        };
        self.write_operand(dst, size, result)?;
        if let Some(flags) = flags {
            self.set_status(flags);
        }
        Ok(())
    }
}

/// A result with SF and ZF by it, CF as given, OF clear.
fn with_flags(result: u64, carry: bool, size: u8) -> (u64, Option<u64>) {
    let (result, status) = logic(result, size);
    (result, Some(status & (SF | ZF) | if carry { CF } else { 0 }))
}

/// PDEP: the low bits of `value` to the places that `places` has set.
fn deposit(value: u64, mut places: u64) -> u64 {
    let mut result = 0;
    let mut bit = 0;
    while places != 0 {
        let lowest = places & places.wrapping_neg();
        if value >> bit & 1 != 0 {
            result |= lowest;
        }
        places ^= lowest;
        bit += 1;
    }
    result
}

/// PEXT: the bits of `value` at the places that `places` has set, packed.
fn extract(value: u64, mut places: u64) -> u64 {
    let mut result = 0;
    let mut bit = 0;
    while places != 0 {
        let lowest = places & places.wrapping_neg();
        if value & lowest != 0 {
            result |= 1 << bit;
        }
        places ^= lowest;
        bit += 1;
    }
    result
}
