//! The operand of INVLPG in 64-bit mode, for CPUs whose exit does not name it (no decode assists).

/// Number of RSP, which as an index in SIB means none.
const NO_INDEX: usize = 4;
/// Number of RBP, which as a base without displacement means one of 32 bits and no register.
const NO_BASE: usize = 5;
/// The opcode's bytes and a ModRM without displacement, the first one lowest.
const INVLPG: u32 = 0x38_010f;
/// REX with the highest bit of the register with the address.
const REX_B: u8 = 0x41;

/// The number of the register with the address, and the length, of an INVLPG that has no displacement and no prefix but
/// REX.B. `code` has its first four bytes, the first one lowest.
#[inline(always)]
pub fn parse_beginning(code: u32) -> Option<(usize, u64)> {
    let register = |code: u32| {
        let register = (code >> 16 & 7) as usize;
        (code & 0xf8_ffff == INVLPG && register & 6 != NO_INDEX & NO_BASE).then_some(register)
    };
    if let Some(register) = register(code) {
        return Some((register, 3));
    }
    register(code >> 8).filter(|_| code as u8 == REX_B).map(|register| (register | 8, 4))
}

/// The linear address that the INVLPG at the start of `bytes` names, and the instruction's length. `rip` is where it begins.
///
/// None if it is something else, or has a prefix other than REX. The segment is DS or SS, which begin at zero.
pub fn parse(bytes: &[u8], gprs: &[u64; 16], rip: u64) -> Option<(u64, usize)> {
    let (rex, bytes_before, bytes) = match *bytes {
        [rex @ 0x40..=0x4f, 0x0f, 0x01, ref rest @ ..] => (usize::from(rex), 3, rest),
        [0x0f, 0x01, ref rest @ ..] => (0, 2, rest),
        _ => return None,
    };
    let (&modrm, mut rest) = bytes.split_first()?;
    if modrm >> 3 & 7 != 7 || modrm >> 6 == 3 {
        return None;
    }
    let (x, b) = ((rex & 2) << 2, (rex & 1) << 3);
    let (mode, rm) = (modrm >> 6, usize::from(modrm & 7));
    let mut length = bytes_before + 1;
    let mut relative = false;
    let mut address = 0;
    let mut base = Some(rm | b);
    if rm == NO_INDEX {
        let (&sib, after) = rest.split_first()?;
        (rest, length) = (after, length + 1);
        let (scale, index) = (sib >> 6, usize::from(sib >> 3 & 7) | x);
        if index != NO_INDEX {
            address = gprs[index] << scale;
        }
        base = Some(usize::from(sib & 7) | b).filter(|_| mode != 0 || sib & 7 != NO_BASE as u8);
    } else if rm == NO_BASE && mode == 0 {
        (base, relative) = (None, true);
    }
    let displacement = match mode {
        1 => {
            length += 1;
            i64::from(*rest.first()? as i8)
        }
        2 => {
            length += 4;
            i64::from(i32::from_le_bytes(*rest.first_chunk()?))
        }
        _ if base.is_none() => {
            length += 4;
            i64::from(i32::from_le_bytes(*rest.first_chunk()?))
        }
        _ => 0,
    };
    if relative {
        address = rip.wrapping_add(length as u64);
    } else if let Some(base) = base {
        address = gprs[base].wrapping_add(address);
    }
    Some((address.wrapping_add_signed(displacement), length))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIP: u64 = 0x1000;

    fn operand(bytes: &[u8]) -> Option<(u64, usize)> {
        let gprs = core::array::from_fn(|number| (number as u64 + 1) << 16);
        let mut padded = [0; 16];
        padded[..bytes.len()].copy_from_slice(bytes);
        // Padding may complete an instruction, bytes that are missing may not.
        let (operand, length) = parse(&padded, &gprs, RIP)?;
        (length <= bytes.len()).then_some((operand, length))
    }

    #[test]
    fn the_beginning_says_what_the_whole_does() {
        let gprs = core::array::from_fn(|number| (number as u64 + 1) << 16);
        let mut parsed = 0;
        for prefix in [&[][..], &[0x41], &[0x40], &[0x66]] {
            for modrm in 0..=0xff {
                let mut bytes = [0; 16];
                let code = [prefix, &[0x0f, 0x01, modrm]].concat();
                bytes[..code.len()].copy_from_slice(&code);
                let beginning = u32::from_le_bytes(*bytes.first_chunk().unwrap());
                if let Some((register, length)) = parse_beginning(beginning) {
                    assert_eq!(
                        parse(&bytes, &gprs, RIP),
                        Some((gprs[register], length as usize)),
                        "{code:x?}"
                    );
                    parsed += 1;
                }
            }
        }
        assert_eq!(parsed, 12, "six registers without REX, six with REX.B");
        assert_eq!(parse_beginning(0x22_0f01), None);
    }

    #[test]
    fn every_form_of_address() {
        assert_eq!(operand(&[0x0f, 0x01, 0x3f]), Some((0x8_0000, 3)), "[rdi]");
        assert_eq!(operand(&[0x41, 0x0f, 0x01, 0x3f]), Some((0x10_0000, 4)), "[r15]");
        assert_eq!(operand(&[0x0f, 0x01, 0x78, 0xf0]), Some((0xfff0, 4)), "[rax-16]");
        assert_eq!(operand(&[0x0f, 0x01, 0xb8, 0, 0, 1, 0]), Some((0x2_0000, 7)), "[rax+0x10000]");
        assert_eq!(operand(&[0x0f, 0x01, 0x3d, 0x10, 0, 0, 0]), Some((RIP + 7 + 0x10, 7)), "[rip+16]");
        assert_eq!(operand(&[0x0f, 0x01, 0x3c, 0x24]), Some((0x5_0000, 4)), "[rsp]");
        assert_eq!(operand(&[0x0f, 0x01, 0x3c, 0xc8]), Some((0x1_0000 + (0x2_0000 << 3), 4)), "[rax+rcx*8]");
        assert_eq!(operand(&[0x42, 0x0f, 0x01, 0x3c, 0x20]), Some((0x1_0000 + 0xd_0000, 5)), "[rax+r12]");
        let disp = [0xff, 0xff, 0xff, 0xff];
        let absolute = [&[0x0f, 0x01, 0x3c, 0x25][..], &disp].concat();
        assert_eq!(operand(&absolute), Some((u64::MAX, 8)), "[-1]");
        assert_eq!(operand(&[0x0f, 0x01, 0x7d, 0]), Some((0x6_0000, 4)), "[rbp]");
    }

    #[test]
    fn other_bytes_are_refused() {
        for insn in [
            &[0x0f, 0x01, 0xff][..],
            &[0x0f, 0x01, 0x37],
            &[0x64, 0x0f, 0x01, 0x3f],
            &[0x67, 0x0f, 0x01, 0x3f],
            &[0x0f, 0x01],
            &[0x0f, 0x01, 0x3c],
            &[0x0f, 0x01, 0xb8, 0, 0, 0],
            &[],
        ] {
            assert_eq!(operand(insn), None, "{insn:x?}");
        }
    }
}
