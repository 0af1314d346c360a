//! The processor's random numbers. Umbra needs none; guests whose instructions are emulated do.
#![allow(unsafe_code)] // instructions that not every CPU has

use core::arch::asm;
use core::arch::x86_64::__cpuid_count;

/// RDRAND: 64 random bits; `None` if there are none at the moment, or no such instruction.
pub fn random() -> Option<u64> {
    /// CPUID 1 ECX (SDM vol. 2, CPUID).
    const RDRAND: u32 = 1 << 30;
    if __cpuid_count(1, 0).ecx & RDRAND == 0 {
        return None;
    }
    let (value, ok): (u64, u8);
    // SAFETY: the instruction exists, and changes nothing but a register and flags.
    unsafe { asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack)) };
    (ok != 0).then_some(value)
}

/// RDSEED: 64 bits of entropy; `None` if there are none at the moment, or no such instruction.
pub fn seed() -> Option<u64> {
    /// CPUID 7 EBX.
    const RDSEED: u32 = 1 << 18;
    if __cpuid_count(0, 0).eax < 7 || __cpuid_count(7, 0).ebx & RDSEED == 0 {
        return None;
    }
    let (value, ok): (u64, u8);
    // SAFETY: the instruction exists, and changes nothing but a register and flags.
    unsafe { asm!("rdseed {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nomem, nostack)) };
    (ok != 0).then_some(value)
}
