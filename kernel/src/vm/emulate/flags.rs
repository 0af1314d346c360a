//! Status flags and the arithmetic that sets them, exact for every operand size. AMD APM vol. 1, 3.1.4.
//!
//! Where the manuals leave a flag undefined the emulator does what AMD's Zen processors were seen to do, where that
//! follows a rule: logical operations clear AF, shifts set it, OF of a longer shift is that of its last step, bit
//! tests and multiplications leave theirs alone. Divisions and bit scans leave theirs alone too, which no
//! processor does.

/// Carry.
pub const CF: u64 = 1 << 0;
/// Parity of the low byte.
pub const PF: u64 = 1 << 2;
/// Auxiliary carry, out of bit 3.
pub const AF: u64 = 1 << 4;
/// Zero.
pub const ZF: u64 = 1 << 6;
/// Sign.
pub const SF: u64 = 1 << 7;
/// Trap: single-step.
pub const TF: u64 = 1 << 8;
/// Interrupt enable.
pub const IF: u64 = 1 << 9;
/// Direction of string instructions.
pub const DF: u64 = 1 << 10;
/// Overflow.
pub const OF: u64 = 1 << 11;
/// I/O privilege level, two bits.
pub const IOPL: u64 = 3 << 12;
/// Nested task.
pub const NT: u64 = 1 << 14;
/// Resume: instruction breakpoints are ignored for one instruction.
pub const RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub const VM: u64 = 1 << 17;
/// Alignment check.
pub const AC: u64 = 1 << 18;
/// Virtual interrupt enable, of virtual-8086 mode extensions.
pub const VIF: u64 = 1 << 19;
/// Virtual interrupt pending.
pub const VIP: u64 = 1 << 20;
/// CPUID can be used if this can be changed.
pub const ID: u64 = 1 << 21;
/// Bits of RFLAGS that exist and may be cleared.
pub const DEFINED: u64 = 0x3f_7fd5;
/// The six flags that arithmetic sets.
pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;

/// I/O privilege level, RFLAGS bits 13:12.
#[must_use]
pub fn iopl(rflags: u64) -> u8 {
    (rflags >> 12 & 3) as u8
}

/// Ones in the low `size` bytes; all ones from 8 on.
#[inline]
pub(super) fn mask(size: u8) -> u64 {
    u64::MAX.wrapping_shr(64_u32.wrapping_sub(bits(size)))
}

/// Number of bits in `size` bytes.
#[inline]
pub(super) fn bits(size: u8) -> u32 {
    8 * u32::from(size)
}

/// The top bit of a value of `size` bytes.
#[inline]
pub(super) fn sign_bit(size: u8) -> u64 {
    mask(size) ^ (mask(size) >> 1)
}

/// Sign-extends the low `size` bytes to 64 bits.
#[inline]
pub(super) fn sign_extend(value: u64, size: u8) -> u64 {
    let shift = 64_u32.wrapping_sub(bits(size));
    (value.wrapping_shl(shift) as i64).wrapping_shr(shift) as u64
}

/// SF, ZF and PF of a result.
#[inline]
pub(super) fn szp(result: u64, size: u8) -> u64 {
    let low = (result ^ (result >> 4)) & 0xf;
    let mut flags = (0x9669 >> low & 1) << 2; // bit n of the constant: nibble n has even parity
    if result & mask(size) == 0 {
        flags |= ZF;
    }
    if result & sign_bit(size) != 0 {
        flags |= SF;
    }
    flags
}

fn when(flag: u64, condition: bool) -> u64 {
    if condition {
        flag
    } else {
        0
    }
}

/// A result and the status flags it sets.
pub(super) type Flagged = (u64, u64);

/// `a + b + carry` and its six flags.
pub(super) fn add(a: u64, b: u64, carry: bool, size: u8) -> Flagged {
    let result = a.wrapping_add(b).wrapping_add(u64::from(carry)) & mask(size);
    let carries = (a & b) | ((a | b) & !result);
    let flags = szp(result, size)
        | when(CF, carries & sign_bit(size) != 0)
        | when(AF, carries & 8 != 0)
        | when(OF, (a ^ result) & (b ^ result) & sign_bit(size) != 0);
    (result, flags)
}

/// `a - b - borrow` and its six flags.
pub(super) fn sub(a: u64, b: u64, borrow: bool, size: u8) -> Flagged {
    let result = a.wrapping_sub(b).wrapping_sub(u64::from(borrow)) & mask(size);
    let borrows = (!a & b) | ((!a | b) & result);
    let flags = szp(result, size)
        | when(CF, borrows & sign_bit(size) != 0)
        | when(AF, borrows & 8 != 0)
        | when(OF, (a ^ b) & (a ^ result) & sign_bit(size) != 0);
    (result, flags)
}

/// Flags of AND, OR, XOR, TEST: CF and OF clear, AF (undefined) clear.
pub(super) fn logic(result: u64, size: u8) -> Flagged {
    (result & mask(size), szp(result, size))
}

/// Which shift or rotate. The discriminant is the /reg field of opcodes C0, C1, D0 to D3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    /// Rotate left.
    Rol,
    /// Rotate right.
    Ror,
    /// Rotate left through carry.
    Rcl,
    /// Rotate right through carry.
    Rcr,
    /// Shift left.
    Shl,
    /// Shift right, zeros in.
    Shr,
    /// Shift right, sign in.
    Sar,
}

/// Shifts `value` by `count` (masked to 5 bits, 6 for 8-byte operands), starting from `old` flags.
///
/// OF is defined for counts of one. CF of SHL and SHR beyond the operand's width (undefined) is 0.
pub(super) fn shift(op: Shift, value: u64, count: u64, size: u8, old: u64) -> Flagged {
    let bits = bits(size);
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    let value = value & mask(size);
    if count == 0 {
        return (value, old);
    }
    let wide = u128::from(value);
    let sign = |v: u64| v & sign_bit(size) != 0;
    match op {
        Shift::Rol | Shift::Ror => {
            let left = if op == Shift::Rol { count % bits } else { (bits - count % bits) % bits };
            let result = ((wide << left | wide << left >> bits) as u64) & mask(size);
            let (cf, of) = if op == Shift::Rol {
                let cf = result & 1 != 0;
                (cf, cf ^ sign(result))
            } else {
                (sign(result), sign(result) ^ (result & (sign_bit(size) >> 1) != 0))
            };
            (result, old & !(CF | OF) | when(CF, cf) | when(OF, of))
        }
        Shift::Rcl | Shift::Rcr => {
            // The carry is bit `bits` of a ring of bits + 1 (at most 65, so u128).
            let ring = bits + 1;
            let count = count % ring;
            if count == 0 {
                let of = match op {
                    Shift::Rcl => sign(value) ^ (old & CF != 0),
                    _ => sign(value) ^ (value & (sign_bit(size) >> 1) != 0),
                };
                return (value, old & !OF | when(OF, of));
            }
            let whole = wide | u128::from(old & CF) << bits;
            let left = if op == Shift::Rcl { count } else { ring - count };
            let turned = (whole << left | whole >> (ring - left)) & ((1 << ring) - 1);
            let result = turned as u64 & mask(size);
            let cf = turned >> bits & 1 != 0;
            let of = match op {
                Shift::Rcl => sign(result) ^ cf,
                _ => sign(result) ^ (result & (sign_bit(size) >> 1) != 0),
            };
            (result, old & !(CF | OF) | when(CF, cf) | when(OF, of))
        }
        Shift::Shl => {
            let shifted = wide << count;
            let result = shifted as u64 & mask(size);
            let cf = shifted >> bits & 1 != 0;
            let flags = AF | szp(result, size) | when(CF, cf) | when(OF, cf ^ sign(result));
            (result, old & !STATUS | flags)
        }
        Shift::Shr => {
            let result = (wide >> count) as u64;
            let cf = wide >> (count - 1) & 1 != 0;
            let before = (wide >> (count - 1)) as u64;
            (result, old & !STATUS | AF | szp(result, size) | when(CF, cf) | when(OF, sign(before)))
        }
        Shift::Sar => {
            let extended = sign_extend(value, size) as i64;
            let result = (extended >> count) as u64 & mask(size);
            let cf = extended >> (count - 1) & 1 != 0;
            (result, old & !STATUS | AF | szp(result, size) | when(CF, cf))
        }
    }
}

/// SHLD (`left`) or SHRD: shifts `value` and fills with bits of `fill`. A count beyond the operand's width (16-bit
/// operands only; result and flags undefined) continues into `value` again.
pub(super) fn double_shift(left: bool, value: u64, fill: u64, count: u64, size: u8, old: u64) -> Flagged {
    let bits = bits(size);
    let count = (count & if size == 8 { 63 } else { 31 }) as u32;
    let value = value & mask(size);
    if count == 0 {
        return (value, old);
    }
    let (value128, fill128) = (u128::from(value), u128::from(fill & mask(size)));
    let (result, cf) = if left {
        let whole = value128 << bits | fill128;
        if count <= bits {
            ((whole << count >> bits) as u64 & mask(size), whole >> (2 * bits - count) & 1 != 0)
        } else {
            let whole = fill128 << bits | value128;
            let count = count - bits;
            ((whole << count >> bits) as u64 & mask(size), whole >> (2 * bits - count) & 1 != 0)
        }
    } else {
        let whole = fill128 << bits | value128;
        if count <= bits {
            ((whole >> count) as u64 & mask(size), whole >> (count - 1) & 1 != 0)
        } else {
            let whole = value128 << bits | fill128;
            let count = count - bits;
            ((whole >> count) as u64 & mask(size), whole >> (count - 1) & 1 != 0)
        }
    };
    let sign = result & sign_bit(size) != 0;
    let of = sign ^ if left { cf } else { result & (sign_bit(size) >> 1) != 0 };
    (result, old & !STATUS | AF | szp(result, size) | when(CF, cf) | when(OF, of))
}

/// Whether condition `code` (low four bits of Jcc, SETcc, CMOVcc) holds.
pub(super) fn condition(code: u8, flags: u64) -> bool {
    let is = |flag: u64| flags & flag != 0;
    let holds = match code >> 1 & 7 {
        0 => is(OF),
        1 => is(CF),
        2 => is(ZF),
        3 => is(CF) || is(ZF),
        4 => is(SF),
        5 => is(PF),
        6 => is(SF) != is(OF),
        _ => is(ZF) || is(SF) != is(OF),
    };
    holds != (code & 1 != 0)
}
