//! The VMX instructions that work on a VMCS or on a TLB. SDM vol. 3, chapter 31.
#![allow(unsafe_code)] // Each is one instruction that the compiler does not know.

use super::vmcs::{Field, Width};
use core::arch::asm;
use x86_64::PhysAddr;

/// How a VMX instruction failed (SDM vol. 3, 31.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// VMfailInvalid: there is no current VMCS.
    Invalid,
    /// VMfailValid: the VM-instruction error field says why.
    Valid,
}

/// Runs one instruction and turns CF and ZF into an answer.
macro_rules! vmx_instruction {
    ($text:literal, $($operands:tt)*) => {{
        let (invalid, valid): (u8, u8);
        asm!($text, "setc {invalid}", "setz {valid}", invalid = out(reg_byte) invalid, valid = out(reg_byte) valid,
             $($operands)*, options(nostack));
        match (invalid, valid) {
            (0, 0) => Ok(()),
            (0, _) => Err(Failure::Valid),
            _ => Err(Failure::Invalid),
        }
    }};
}

/// Enters VMX operation with the VMXON region at `region`.
///
/// # Safety
/// CR0, CR4 and IA32_FEATURE_CONTROL are as VMX wants them; the region is ours, with the revision identifier in it, and
/// stays the processor's from now on.
pub(super) unsafe fn vmxon(region: PhysAddr) -> Result<(), Failure> {
    let region = region.as_u64();
    // SAFETY: promised by the caller.
    unsafe { vmx_instruction!("vmxon [{region}]", region = in(reg) &raw const region) }
}

/// Writes what this CPU caches of the VMCS back to memory, and leaves it neither active nor launched.
///
/// # Safety
/// This CPU is in VMX operation; the region is that of a VMCS.
pub(super) unsafe fn vmclear(region: PhysAddr) -> Result<(), Failure> {
    let region = region.as_u64();
    // SAFETY: promised by the caller.
    unsafe { vmx_instruction!("vmclear [{region}]", region = in(reg) &raw const region) }
}

/// Makes the VMCS active and current on this CPU.
///
/// # Safety
/// This CPU is in VMX operation; the region is that of a VMCS which is active on no other CPU.
pub(super) unsafe fn vmptrld(region: PhysAddr) -> Result<(), Failure> {
    let region = region.as_u64();
    // SAFETY: promised by the caller.
    unsafe { vmx_instruction!("vmptrld [{region}]", region = in(reg) &raw const region) }
}

/// Reads a field of the current VMCS; zero where the processor has no such field.
///
/// # Safety
/// This CPU is in VMX operation.
#[inline(always)]
pub(super) unsafe fn vmread<W: Width>(field: Field<W>) -> W::Value {
    let value: u64;
    // SAFETY: promised by the caller; a failure leaves the register as it was, zero.
    unsafe {
        asm!("vmread {value}, {field}", value = inout(reg) 0u64 => value, field = in(reg) u64::from(field.encoding()),
             options(nostack, nomem));
    }
    W::truncate(value)
}

/// Writes a field of the current VMCS.
///
/// # Safety
/// This CPU is in VMX operation, and what the value makes the processor do at the next entry or exit is sound.
#[inline(always)]
pub(super) unsafe fn vmwrite<W: Width>(field: Field<W>, value: impl Into<u64>) -> Result<(), Failure> {
    let (field, value) = (u64::from(field.encoding()), value.into());
    // SAFETY: promised by the caller.
    unsafe { vmx_instruction!("vmwrite {field}, {value}", field = in(reg) field, value = in(reg) value) }
}

/// The same, where a failure would be Umbra's own mistake: only debug builds look whether there is one.
///
/// # Safety
/// As for [`vmwrite`].
#[inline(always)]
pub(super) unsafe fn vmwrite_sure<W: Width>(field: Field<W>, value: impl Into<u64>) {
    if cfg!(debug_assertions) {
        // SAFETY: promised by the caller.
        let outcome = unsafe { vmwrite(field, value) };
        assert!(outcome.is_ok(), "VMCS field {:#x}: {outcome:?}", field.encoding());
    } else {
        // SAFETY: promised by the caller.
        unsafe {
            asm!("vmwrite {field}, {value}", field = in(reg) u64::from(field.encoding()), value = in(reg) value.into(),
                 options(nostack));
        }
    }
}

/// Which translations INVEPT removes (SDM vol. 3, INVEPT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum InveptScope {
    /// Those of one EPT pointer, under all VPIDs.
    Single = 1,
    /// All guest-physical and combined translations.
    All = 2,
}

/// Removes translations that came from EPT.
///
/// # Safety
/// This CPU is in VMX operation and has that kind of INVEPT.
pub(super) unsafe fn invept(scope: InveptScope, eptp: u64) -> Result<(), Failure> {
    let descriptor = [eptp, 0];
    // SAFETY: promised by the caller.
    unsafe {
        vmx_instruction!("invept {scope}, [{descriptor}]", scope = in(reg) scope as u64,
                         descriptor = in(reg) &raw const descriptor)
    }
}

/// Which translations INVVPID removes (SDM vol. 3, INVVPID).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InvvpidScope {
    /// Those of one linear address of one VPID.
    Address(u16, u64),
    /// All of one VPID.
    Single(u16),
    /// All of all VPIDs but the host's.
    All,
}

/// Removes linear and combined translations.
///
/// # Safety
/// This CPU is in VMX operation and has that kind of INVVPID.
pub(super) unsafe fn invvpid(scope: InvvpidScope) -> Result<(), Failure> {
    let (kind, vpid, linear) = match scope {
        InvvpidScope::Address(vpid, linear) => (0u64, vpid, linear),
        InvvpidScope::Single(vpid) => (1, vpid, 0),
        InvvpidScope::All => (2, 0, 0),
    };
    let descriptor = [u64::from(vpid), linear];
    // SAFETY: promised by the caller.
    unsafe {
        vmx_instruction!("invvpid {kind}, [{descriptor}]", kind = in(reg) kind,
                         descriptor = in(reg) &raw const descriptor)
    }
}
