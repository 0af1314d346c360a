//! Memory by physical address, through the physical map.
// Raw access to frames whose ownership the type system does not see.
#![allow(unsafe_code)]

use super::PHYSMAP;
use core::arch::asm;
use x86_64::PhysAddr;

/// Where the physical map has `addr`. Valid to use only for memory and for what `map_mmio` or `map_firmware` mapped.
#[inline]
pub fn phys_to_virt(addr: PhysAddr) -> *mut u8 {
    (PHYSMAP + addr.as_u64()) as *mut u8
}

/// Fills `len` bytes from `addr` with zeros; both are multiples of 8.
///
/// # Safety
/// The range is RAM that the caller owns.
#[inline]
pub unsafe fn zero(addr: PhysAddr, len: u64) {
    debug_assert!(addr.is_aligned(8u64) && len.is_multiple_of(8));
    // SAFETY: the physical map covers all RAM, and the caller owns the range.
    unsafe {
        asm!(
            "rep stosq",
            inout("rcx") len / 8 => _,
            inout("rdi") phys_to_virt(addr) => _,
            in("rax") 0u64,
            options(nostack, preserves_flags),
        );
    }
}

/// Copies memory at `addr` into `buf`.
///
/// # Safety
/// The range is mapped RAM that is not written meanwhile, except by guests, whose races are theirs.
#[inline]
pub unsafe fn read(addr: PhysAddr, buf: &mut [u8]) {
    // SAFETY: promised by the caller; `buf` is memory of Umbra's own and does not overlap.
    unsafe { core::ptr::copy_nonoverlapping(phys_to_virt(addr), buf.as_mut_ptr(), buf.len()) }
}

/// Copies `data` to memory at `addr`.
///
/// # Safety
/// The range is RAM that the caller owns.
#[inline]
pub unsafe fn write(addr: PhysAddr, data: &[u8]) {
    // SAFETY: promised by the caller; `data` is memory of Umbra's own and does not overlap.
    unsafe { core::ptr::copy_nonoverlapping(data.as_ptr(), phys_to_virt(addr), data.len()) }
}

/// Memory as a slice for as long as the machine runs.
///
/// # Safety
/// The range is mapped and never written again.
pub unsafe fn slice(addr: PhysAddr, len: usize) -> &'static [u8] {
    // SAFETY: promised by the caller.
    unsafe { core::slice::from_raw_parts(phys_to_virt(addr), len) }
}
