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
    if len == PAGE_BYTES && addr.is_aligned(PAGE_BYTES) {
        // SAFETY: the caller's promise.
        return unsafe { zero_page(addr) };
    }
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

/// Size of the pages that most faults bring in.
const PAGE_BYTES: u64 = 4096;

/// Fills one page with zeros, sixteen bytes at a time: half the stores of REP STOSQ, and none of its start-up cost,
/// which counts for a single page.
///
/// XMM0 may hold a guest's value, so it is put back. (The kernel is compiled without SSE; CR4.OSFXSR is set on every
/// CPU, and CR0.TS and CR0.EM never are.)
///
/// # Safety
/// The page is RAM that the caller owns.
#[inline]
unsafe fn zero_page(addr: PhysAddr) {
    let mut xmm0 = [0u8; 16];
    let start = phys_to_virt(addr);
    // SAFETY: the physical map covers all RAM, the caller owns the page, and the register is as before.
    unsafe {
        asm!(
            "movups [{save}], xmm0",
            "xorps xmm0, xmm0",
            "2:",
            ".set step, 0",
            ".rept 32",
            "movaps [{at} + step], xmm0",
            ".set step, step + 16",
            ".endr",
            "add {at}, 512",
            "cmp {at}, {end}",
            "jne 2b",
            "movups xmm0, [{save}]",
            at = inout(reg) start => _,
            end = in(reg) start.add(PAGE_BYTES as usize),
            save = in(reg) &raw mut xmm0,
            options(nostack),
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
