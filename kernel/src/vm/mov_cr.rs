//! The register operand of MOV to and from a control register, for CPUs whose exit does not name it (no decode assists).

/// Longest instruction.
const MAX_LEN: usize = 15;
/// MOV CRn, r; of the opcode's bytes the first one is the lowest.
pub const TO_CR: u16 = 0x220f;
/// MOV r, CRn.
pub const FROM_CR: u16 = 0x200f;
/// REX with the highest bit of ModRM.rm.
const REX_B: u8 = 0x41;

/// Number of the general-purpose register of the MOV with `opcode` that `code` begins with, if there is no prefix; then the
/// instruction has three bytes. `code` is the first four, the first one lowest.
#[inline(always)]
pub fn parse_plain(code: u32, opcode: u16) -> Option<usize> {
    (code as u16 == opcode).then_some((code >> 16 & 7) as usize)
}

/// The same with the length, also of a 64-bit one with REX.B.
#[inline]
pub fn parse_beginning(code: u32, opcode: u16) -> Option<(usize, u64)> {
    match parse_plain(code, opcode) {
        Some(register) => Some((register, 3)),
        None if code as u8 == REX_B => parse_plain(code >> 8, opcode).map(|register| (register | 8, 4)),
        None => None,
    }
}

/// Number of the general-purpose register that the MOV CRn, r at the start of `bytes` reads, and the instruction's
/// length. None if it is something else. Which control register it is was said by the exit.
#[inline]
pub fn parse(bytes: &[u8], long_mode: bool) -> Option<(usize, usize)> {
    match *bytes {
        // Without prefix, as almost always.
        [0x0f, 0x22, modrm, ..] => Some((usize::from(modrm & 7), 3)),
        _ => parse_any(bytes, long_mode),
    }
}

fn parse_any(bytes: &[u8], long_mode: bool) -> Option<(usize, usize)> {
    let mut rex_b = 0;
    for (at, &byte) in bytes.iter().enumerate().take(MAX_LEN - 2) {
        match byte {
            // Segment, size and address overrides, LOCK (as CR8's old encoding) and REP prefixes.
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3 => rex_b = 0,
            rex @ 0x40..=0x4f if long_mode => rex_b = usize::from(rex & 1) << 3,
            0x0f => {
                let [0x22, modrm] = *bytes.get(at + 1..at + 3)? else { return None };
                // ModRM.mod is ignored: the operand is always a register (APM vol. 3, MOV CRn).
                return Some((usize::from(modrm & 7) | rex_b, at + 3));
            }
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_with_and_without_rex() {
        assert_eq!(parse(&[0x44, 0x0f, 0x22, 0xc0], true), Some((0, 4)), "mov cr8, rax");
        assert_eq!(parse(&[0x45, 0x0f, 0x22, 0xc7], true), Some((15, 4)), "mov cr8, r15");
        assert_eq!(parse(&[0x0f, 0x22, 0xe3], false), Some((3, 3)), "mov cr4, ebx");
        assert_eq!(parse(&[0xf0, 0x0f, 0x22, 0xc1], false), Some((1, 4)), "lock mov cr0, ecx");
        assert_eq!(parse(&[0x41, 0x66, 0x0f, 0x22, 0xe0], true), Some((0, 5)), "REX must come last");
    }

    #[test]
    fn the_beginning_says_what_the_whole_does() {
        let mut parsed = 0;
        for prefix in [&[][..], &[0x41], &[0x40], &[0x66], &[0xf0]] {
            for modrm in 0..=0xff {
                let code = [prefix, &[0x0f, 0x22, modrm, 0]].concat();
                let beginning = u32::from_le_bytes(*code.first_chunk().unwrap());
                if let Some((register, length)) = parse_beginning(beginning, TO_CR) {
                    assert_eq!(parse(&code, true), Some((register, length as usize)), "{code:x?}");
                    parsed += 1;
                }
            }
        }
        assert_eq!(parsed, 512, "all registers, whatever ModRM.mod is");
        assert_eq!(parse_beginning(0xc0_200f, TO_CR), None, "a read");
        assert_eq!(parse_beginning(0xd9_200f, FROM_CR), Some((1, 3)), "mov rcx, cr3");
        assert_eq!(parse_beginning(0xdc20_0f41, FROM_CR), Some((12, 4)), "mov r12, cr3");
    }

    #[test]
    fn other_bytes_are_refused() {
        for insn in
            [&[0x0f, 0x20, 0xe0][..], &[0x45, 0x0f, 0x22, 0xc7], &[0x0f], &[0x0f, 0x22], &[], &[0x66; 15]]
        {
            assert_eq!(parse(insn, false), None, "{insn:x?}");
        }
    }
}
