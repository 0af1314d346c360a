//! Model-specific registers, and accesses that survive a register that does not exist.
// RDMSR and WRMSR, and a #GP that is part of the plan.
#![allow(unsafe_code)]

use super::trap::TrapFrame;
use core::arch::{asm, naked_asm};

/// IA32_APIC_BASE.
pub const APIC_BASE: u32 = 0x1b;
/// IA32_PAT.
pub const PAT: u32 = 0x277;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_XSS.
pub const XSS: u32 = 0xda0;
/// First register of a local APIC in x2APIC mode.
pub const X2APIC: u32 = 0x800;
/// EFER.
pub const EFER: u32 = 0xc000_0080;
/// GS base.
pub const GS_BASE: u32 = 0xc000_0101;

/// Reads `msr`.
///
/// # Safety
/// The register exists and reading it has no effect that matters.
#[inline]
pub unsafe fn read(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: promised by the caller.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes `msr`.
///
/// # Safety
/// The register exists and `value` keeps this CPU in a state that Rust code can run in.
#[inline]
pub unsafe fn write(msr: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: promised by the caller. No `nomem`: some writes order or change memory accesses.
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high, options(nostack)) };
}

/// Reads `msr` if there is such a register.
///
/// # Safety
/// Reading the register has no effect that matters. Traps are set up.
pub unsafe fn try_read(msr: u32) -> Option<u64> {
    let mut ok = 1u64;
    let value: u64;
    // SAFETY: promised by the caller; a #GP at `read_at` is turned into an answer by `recover`.
    unsafe {
        asm!("call {f}", f = sym read_at, inout("rdi") ok, in("ecx") msr, out("rax") value, out("rdx") _);
    }
    (ok != 0).then_some(value)
}

/// Writes `msr`; false if there is no such register or it does not take this value.
///
/// # Safety
/// `value` keeps this CPU in a state that Rust code can run in. Traps are set up.
pub unsafe fn try_write(msr: u32, value: u64) -> bool {
    let mut ok = 1u64;
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: promised by the caller; a #GP at `write_at` is turned into an answer by `recover`.
    unsafe {
        asm!("call {f}", f = sym write_at, inout("rdi") ok, in("ecx") msr, in("eax") low, in("edx") high);
    }
    ok != 0
}

/// RDMSR as the first instruction, so that its address is the function's.
#[unsafe(naked)]
extern "C" fn read_at() {
    naked_asm!("rdmsr", "shl rdx, 32", "or rax, rdx", "ret")
}

/// WRMSR as the first instruction.
#[unsafe(naked)]
extern "C" fn write_at() {
    naked_asm!("wrmsr", "ret")
}

/// Where a recovered access goes on: clears the flag in RDI.
#[unsafe(naked)]
extern "C" fn failed() {
    naked_asm!("xor edi, edi", "ret")
}

/// Whether the #GP of `frame` came from `try_read` or `try_write`, which then goes on.
pub(super) fn recover(frame: &mut TrapFrame) -> bool {
    let planned = frame.rip == read_at as *const () as u64 || frame.rip == write_at as *const () as u64;
    if planned {
        frame.rip = failed as *const () as u64;
    }
    planned
}
