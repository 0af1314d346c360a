//! Walks the chain of frame pointers. Every address is checked before it is read, so that a broken stack costs
//! lines, not another fault.
// Reads stack memory by address.
#![allow(unsafe_code)]

use crate::{console, mm};

/// More frames than any sane call chain has.
const MAX_FRAMES: usize = 32;

/// Prints the return addresses from the frame at `rbp` up.
pub fn print(mut rbp: u64) {
    for depth in 0..MAX_FRAMES {
        if !rbp.is_multiple_of(8) || !mm::is_stack(rbp, 16) {
            return;
        }
        // SAFETY: both words lie in a mapped stack of Umbra's.
        let (next, return_address) =
            unsafe { ((rbp as *const u64).read_volatile(), (rbp as *const u64).add(1).read_volatile()) };
        if !mm::is_text(return_address) {
            return;
        }
        console::print(format_args!("  #{depth:<2} {return_address:#x}"));
        // Stacks grow down, so callers' frames lie higher.
        if next <= rbp {
            return;
        }
        rbp = next;
    }
}

/// The frame pointer of the caller.
#[inline(always)]
pub fn frame_pointer() -> u64 {
    let rbp: u64;
    // SAFETY: copies a register.
    unsafe { core::arch::asm!("mov {}, rbp", out(reg) rbp, options(nomem, nostack, preserves_flags)) };
    rbp
}
