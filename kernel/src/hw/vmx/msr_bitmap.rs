//! The MSR bitmaps. SDM vol. 3, 25.6.9.

/// Size of the four bitmaps in bytes: reads of low and high MSRs, then writes of them, 1 KiB each.
pub const BYTES: usize = 0x1000;

/// Byte offset and bit of an MSR in the bitmap of reads; that of writes is 2 KiB further. None if the bitmaps have no
/// place for the MSR, which then always exits.
const fn position(msr: u32) -> Option<(usize, u32)> {
    let (index, offset) = match msr {
        0..=0x1fff => (msr, 0),
        0xc000_0000..=0xc000_1fff => (msr & 0x1fff, 0x400),
        _ => return None,
    };
    Some((offset + index as usize / 8, index % 8))
}

/// Lets the guest read and write an MSR without an exit.
///
/// # Panics
/// If the bitmaps have no place for `msr`: the caller names constants.
pub fn allow(bitmaps: &mut [u8; BYTES], msr: u32) {
    let (byte, bit) = position(msr).expect("an MSR that the bitmaps cover");
    bitmaps[byte] &= !(1 << bit);
    bitmaps[byte + 0x800] &= !(1 << bit);
}

/// Bitmaps that all guests share: every MSR exits but those that the hardware or a change of vCPUs switches.
#[cfg(target_os = "none")]
pub(super) fn for_all_guests() -> x86_64::PhysAddr {
    use crate::mm::{self, FrameSize, Zone};

    let mut bitmaps = [0xff; BYTES];
    for msr in crate::vm::msr::PASSTHROUGH {
        allow(&mut bitmaps, msr);
    }
    let frame = mm::alloc(FrameSize::Size4K, Zone::Any).expect("memory for the MSR bitmaps at boot");
    write(frame, &bitmaps);
    frame
}

#[cfg(target_os = "none")]
#[allow(unsafe_code)] // The bitmaps are shared with the processor.
fn write(frame: x86_64::PhysAddr, bitmaps: &[u8; BYTES]) {
    // SAFETY: a new frame, which nothing else knows.
    unsafe { crate::mm::phys::write(frame, bitmaps) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_msr_changes_only_its_two_bits() {
        for msr in [0u32, 0x10, 0x174, 0x1fff, 0xc000_0000, 0xc000_0080, 0xc000_0102, 0xc000_1fff] {
            let mut bitmaps = [0xff; BYTES];
            allow(&mut bitmaps, msr);
            assert_eq!(bitmaps.iter().map(|byte| byte.count_zeros()).sum::<u32>(), 2, "{msr:#x}");
        }
    }

    #[test]
    fn positions_of_the_manual() {
        assert_eq!(position(0x174), Some((0x2e, 4)));
        assert_eq!(position(0xc000_0102), Some((0x400 + 0x20, 2)));
        for outside in [0x2000, 0x4000_0100, 0xbfff_ffff, 0xc000_2000, 0xc001_0000, u32::MAX] {
            assert_eq!(position(outside), None);
        }
    }
}
