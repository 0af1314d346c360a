//! Which bits of CR4 a processor has: those that a guest could set there unless told otherwise.
//! AMD APM vol. 2, 3.1.3; Intel SDM vol. 3, 2.5.

/// A CPUID output register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Protection keys of supervisor pages.
pub const PKS: u64 = 1 << 24;

/// CR4 bits, and the CPUID bit (leaf, subleaf, register, bit) that says that the processor has them.
const BITS: [(u64, u32, u32, Register, u32); 24] = [
    (1 << 0 | 1 << 1, 1, 0, Edx, 1), // VME, PVI
    (1 << 2, 1, 0, Edx, 4),          // TSD
    (1 << 3, 1, 0, Edx, 2),          // DE
    (1 << 4, 1, 0, Edx, 3),          // PSE
    (1 << 5, 1, 0, Edx, 6),          // PAE
    (1 << 6, 1, 0, Edx, 7),          // MCE
    (1 << 7, 1, 0, Edx, 13),         // PGE
    (1 << 9, 1, 0, Edx, 24),         // OSFXSR
    (1 << 10, 1, 0, Edx, 25),        // OSXMMEXCPT
    (1 << 11, 7, 0, Ecx, 2),         // UMIP
    (1 << 12, 7, 0, Ecx, 16),        // LA57
    (1 << 13, 1, 0, Ecx, 5),         // VMXE
    (1 << 14, 1, 0, Ecx, 6),         // SMXE
    (1 << 16, 7, 0, Ebx, 0),         // FSGSBASE
    (1 << 17, 1, 0, Ecx, 17),        // PCIDE
    (1 << 18, 1, 0, Ecx, 26),        // OSXSAVE
    (1 << 19, 7, 0, Ecx, 23),        // KL
    (1 << 20, 7, 0, Ebx, 7),         // SMEP
    (1 << 21, 7, 0, Ebx, 20),        // SMAP
    (1 << 22, 7, 0, Ecx, 3),         // PKE
    (1 << 23, 7, 0, Ecx, 7),         // CET
    (PKS, 7, 0, Ecx, 31),
    (1 << 25, 7, 0, Edx, 5),  // UINTR
    (1 << 28, 7, 1, Eax, 26), // LAM_SUP
];
/// PCE has no CPUID bit.
const ALWAYS: u64 = 1 << 8;

/// The bits, given a way to read CPUID.
pub fn supported(cpuid: impl Fn(u32, u32, Register) -> u32) -> u64 {
    let has = |&&(_, leaf, subleaf, register, bit): &&(u64, u32, u32, Register, u32)| {
        cpuid(leaf, subleaf, register) >> bit & 1 != 0
    };
    BITS.iter().filter(has).fold(ALWAYS, |bits, entry| bits | entry.0)
}

/// The bits of the processor that runs this.
#[cfg(target_os = "none")]
pub fn of_this_cpu() -> u64 {
    use core::arch::x86_64::__cpuid_count;
    let max_leaf = __cpuid_count(0, 0).eax;
    supported(|leaf, subleaf, register| {
        if leaf > max_leaf {
            return 0;
        }
        let result = __cpuid_count(leaf, subleaf);
        match register {
            Eax => result.eax,
            Ebx => result.ebx,
            Ecx => result.ecx,
            Edx => result.edx,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cpuid_bit_gives_its_bits_of_cr4() {
        assert_eq!(supported(|_, _, _| 0), 1 << 8);
        let all = supported(|_, _, _| u32::MAX);
        assert_eq!(all, 0x13ff_7fff, "all but the undefined bits 15, 26, 27 and 29 to 63");
        let smep =
            |leaf, subleaf, register| if (leaf, subleaf, register) == (7, 0, Ebx) { 1 << 7 } else { 0 };
        assert_eq!(supported(smep), 1 << 20 | 1 << 8);
    }
}
