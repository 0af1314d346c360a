//! Lengths of the instructions that are intercepted most, without the general decoder.

/// Length of an instruction in its plain encoding, without redundant prefixes, the same in every mode.
#[inline]
pub(super) fn plain(bytes: &[u8]) -> Option<u8> {
    match *bytes {
        // HLT
        [0xf4, ..] => Some(1),
        // CPUID; WRMSR, RDTSC, RDMSR, RDPMC; CLTS; INVD, WBINVD
        [0x0f, 0xa2 | 0x30..=0x33 | 0x06 | 0x08 | 0x09, ..] => Some(2),
        // VMCALL, MONITOR, MWAIT, XGETBV, XSETBV, VMMCALL, RDTSCP
        [0x0f, 0x01, 0xc1 | 0xc8 | 0xc9 | 0xd0 | 0xd1 | 0xd9 | 0xf9, ..] => Some(3),
        // AMD's CR8 outside 64-bit mode: LOCK MOV to and from CR0 (APM vol. 3, MOV CRn). Not in the general decoder.
        [0xf0, 0x0f, 0x20 | 0x22, modrm, ..] if modrm >> 3 & 7 == 0 => Some(4),
        // PAUSE
        [0xf3, 0x90, ..] => Some(2),
        _ => None,
    }
}
