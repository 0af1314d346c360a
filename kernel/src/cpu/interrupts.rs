//! Letting host interrupts in, from code that otherwise runs with interrupts off.
// Changes of the interrupt flag around one instruction.
#![allow(unsafe_code)]

use core::arch::asm;

/// Takes the interrupts that are pending now, then goes on with interrupts off as before.
#[inline]
pub fn let_in() {
    // SAFETY: handlers only set flags and end the interrupt. STI's shadow covers the NOP; interrupts come after it.
    unsafe { asm!("sti", "nop", "cli", options(nostack)) };
}

/// Halts until an interrupt comes, takes it, and goes on with interrupts off as before. An interrupt that is pending
/// already ends it at once.
#[inline]
pub fn wait() {
    // SAFETY: as above; STI's shadow covers HLT, so no interrupt is lost between the two.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}
