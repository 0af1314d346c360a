//! The register operand of MOV to a control register, for CPUs whose exit does not name it (no decode assists).

/// Number of the general-purpose register that `insn`, a whole MOV CRn, r, reads. None if it is something else.
/// The control register itself was named by the exit.
pub fn source_register(insn: &[u8], long_mode: bool) -> Option<usize> {
    let mut rex_b = 0;
    let mut bytes = insn.iter().copied();
    loop {
        match bytes.next()? {
            // Segment, size and address overrides, LOCK (as CR8's old encoding) and REP prefixes.
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3 => rex_b = 0,
            rex @ 0x40..=0x4f if long_mode => rex_b = usize::from(rex & 1) << 3,
            0x0f => break,
            _ => return None,
        }
    }
    if bytes.next()? != 0x22 {
        return None;
    }
    // ModRM.mod is ignored: the operand is always a register (APM vol. 3, MOV CRn).
    let modrm = bytes.next()?;
    Some(usize::from(modrm & 7) | rex_b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_with_and_without_rex() {
        assert_eq!(source_register(&[0x44, 0x0f, 0x22, 0xc0], true), Some(0), "mov cr8, rax");
        assert_eq!(source_register(&[0x45, 0x0f, 0x22, 0xc7], true), Some(15), "mov cr8, r15");
        assert_eq!(source_register(&[0x0f, 0x22, 0xe3], false), Some(3), "mov cr4, ebx");
        assert_eq!(source_register(&[0xf0, 0x0f, 0x22, 0xc1], false), Some(1), "lock mov cr0, ecx");
        assert_eq!(source_register(&[0x41, 0x66, 0x0f, 0x22, 0xe0], true), Some(0), "REX must come last");
    }

    #[test]
    fn other_bytes_are_refused() {
        for insn in [&[0x0f, 0x20, 0xe0][..], &[0x45, 0x0f, 0x22, 0xc7], &[0x0f], &[0x0f, 0x22], &[], &[0x66; 15]] {
            assert_eq!(source_register(insn, false), None, "{insn:x?}");
        }
    }
}
