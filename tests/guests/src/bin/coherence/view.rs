//! CPUID as the cases want it: bits by name, vendors, ranges.
use guests::prelude::*;

/// Registers by number.
pub(crate) const A: usize = 0;
/// EBX.
pub(crate) const B: usize = 1;
/// ECX.
pub(crate) const C: usize = 2;
/// EDX.
pub(crate) const D: usize = 3;
/// Leaf 8000_0001h.
pub(crate) const EXT1: u32 = 0x8000_0001;
/// Leaf 8000_0008h.
pub(crate) const EXT8: u32 = 0x8000_0008;

/// A bit of CPUID: leaf, subleaf, register, number.
pub(crate) type Bit = (u32, u32, usize, u32);

/// A leaf as numbered registers; zeros beyond the highest leaf, whatever the vendor answers there.
pub(crate) fn leaf(leaf: u32, subleaf: u32) -> [u32; 4] {
    if leaf > cpuid(leaf & 0x8000_0000, 0).eax {
        return [0; 4];
    }
    let regs = cpuid(leaf, subleaf);
    [regs.eax, regs.ebx, regs.ecx, regs.edx]
}

/// Whether a bit is set.
pub(crate) fn bit((number, subleaf, register, bit): Bit) -> bool {
    // Subleaves of leaf 7 end where subleaf 0 says.
    (number != 7 || subleaf == 0 || leaf(7, 0)[A] >= subleaf)
        && leaf(number, subleaf)[register] >> bit & 1 != 0
}

/// Whether any of some bits is set.
pub(crate) fn any(bits: &[Bit]) -> bool {
    bits.iter().any(|&one| bit(one))
}

fn vendor() -> [u8; 12] {
    let leaf = cpuid(0, 0);
    let mut name = [0; 12];
    for (at, word) in [leaf.ebx, leaf.edx, leaf.ecx].into_iter().enumerate() {
        name[at * 4..][..4].copy_from_slice(&word.to_le_bytes());
    }
    name
}

/// Whether Intel's manual applies.
pub(crate) fn intel() -> bool {
    matches!(&vendor(), b"GenuineIntel" | b"CentaurHauls" | b"  Shanghai  ")
}

/// Whether AMD's does.
pub(crate) fn amd() -> bool {
    matches!(&vendor(), b"AuthenticAMD" | b"HygonGenuine")
}
