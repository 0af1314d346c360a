//! Whether XSAVEC puts state where the compacted format has it (Intel SDM vol. 1, 13.4.3), and where XRSTOR looks for it.
//!
//! Tried rather than believed: an emulator that lays AVX state over the legacy region and the header (Bochs 2.7) makes
//! guests lose registers at their own context switches.
// Executes XSAVEC, which is what this module is about.
#![allow(unsafe_code)]

use core::arch::asm;

/// x87, SSE and AVX state, as XCR0 and the instruction's mask have them.
const COMPONENTS: u64 = 7;
/// Where the header, and AVX state, which is the first component behind it, start; as indices of 64-bit words.
const HEADER: usize = 512 / 8;
const AVX: usize = 576 / 8;
/// XCOMP_BV: the compacted format.
const COMPACTED: u64 = 1 << 63;

/// An area for x87, SSE and AVX state.
#[repr(C, align(64))]
struct Area([u64; 832 / 8]);

/// Tries it on this CPU, once, before any guest runs: it changes vector registers. True without XSAVEC or AVX, for then
/// no guest compacts anything.
#[cfg(target_os = "none")]
pub fn is_sound() -> bool {
    use x86_64::registers::xcontrol::XCr0;
    static SOUND: spin::Once<bool> = spin::Once::new();
    *SOUND.call_once(|| {
        let xsave = super::features().xsave;
        if !xsave.is_some_and(|xsave| xsave.xsavec && xsave.xcr0 & COMPONENTS == COMPONENTS) {
            return true;
        }
        let xcr0 = XCr0::read_raw();
        // SAFETY: CR4.OSXSAVE is set where there is XSAVE, and the three components exist. What XCR0 was goes back.
        unsafe {
            XCr0::write_raw(COMPONENTS);
            let sound = try_xsavec();
            XCr0::write_raw(xcr0);
            sound
        }
    })
}

/// Fills one half of one AVX register, saves, and looks where it went.
///
/// # Safety
/// There is XSAVEC, XCR0 enables x87, SSE and AVX state, and nobody else's values are in the vector registers.
unsafe fn try_xsavec() -> bool {
    let mut area = Area([0; 832 / 8]);
    // SAFETY: the caller's promises; the area is aligned and large enough for the three components.
    unsafe {
        asm!(
            "vzeroall",
            "vpcmpeqd xmm1, xmm1, xmm1",
            "vinsertf128 ymm0, ymm0, xmm1, 1",
            "xsavec64 [{area}]",
            "vzeroall",
            area = in(reg) &raw mut area,
            in("eax") COMPONENTS as u32,
            in("edx") 0,
            clobber_abi("C"),
            options(nostack)
        );
    }
    let Area(words) = area;
    words[HEADER] & 1 << 2 != 0
        && words[HEADER + 1] == COMPACTED | COMPONENTS
        && words[HEADER + 2..AVX].iter().all(|&word| word == 0)
        && words[AVX..AVX + 4] == [u64::MAX, u64::MAX, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::is_x86_feature_detected;

    /// On the host's own CPU, if it can.
    #[test]
    fn a_real_cpu_compacts_as_the_manuals_say() {
        if is_x86_feature_detected!("avx") && is_x86_feature_detected!("xsavec") {
            // SAFETY: detection includes that the operating system has enabled AVX, and the assembly names what it
            // changes.
            assert!(unsafe { try_xsavec() });
        }
    }
}
