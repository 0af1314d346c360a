//! The MSR and I/O permission maps. AMD APM vol. 2, 15.10.1 and 15.11.

/// Size of the MSR permission map in bytes: two bits an MSR, four ranges of 2 KiB, the last one reserved.
pub const MSRPM_BYTES: usize = 0x2000;
/// Size of the I/O permission map in bytes: one bit a port, and one page so that an access at the last port
/// finds bits for its upper bytes.
pub const IOPM_BYTES: usize = 0x3000;

/// First MSR of each 8,192-MSR range and the byte offset of its bits in the map.
const MSR_RANGES: [(u32, usize); 3] = [(0, 0x000), (0xc000_0000, 0x800), (0xc001_0000, 0x1000)];

/// Byte offset and bit of an MSR's read-intercept bit; the write bit is the next one. None if the map has no
/// place for the MSR, which then always exits.
fn position(msr: u32) -> Option<(usize, u32)> {
    MSR_RANGES.iter().find_map(|&(first, offset)| {
        let index = msr.wrapping_sub(first);
        (index < 0x2000).then(|| (offset + index as usize / 4, index % 4 * 2))
    })
}

/// Lets the guest read or write an MSR without an exit.
///
/// # Panics
/// If the map has no place for `msr`: the caller names constants.
pub fn allow_msr(map: &mut [u8; MSRPM_BYTES], msr: u32, read: bool, write: bool) {
    let (byte, bit) = position(msr).expect("an MSR that the permission map covers");
    map[byte] &= !(u8::from(read) << bit | u8::from(write) << (bit + 1));
}

/// Whether an access would exit.
pub fn intercepts_msr(map: &[u8; MSRPM_BYTES], msr: u32, write: bool) -> bool {
    position(msr).is_none_or(|(byte, bit)| map[byte] >> (bit + u32::from(write)) & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_msr_changes_only_its_two_bits() {
        for msr in [0u32, 0x10, 0x1fff, 0xc000_0080, 0xc000_0100, 0xc000_1fff, 0xc001_0117, 0xc001_1fff] {
            for (read, write) in [(true, false), (false, true), (true, true)] {
                let mut map = [0xff; MSRPM_BYTES];
                allow_msr(&mut map, msr, read, write);
                let cleared: u32 = map.iter().map(|byte| byte.count_zeros()).sum();
                assert_eq!(cleared, u32::from(read) + u32::from(write));
                assert_eq!(intercepts_msr(&map, msr, false), !read);
                assert_eq!(intercepts_msr(&map, msr, true), !write);
            }
        }
    }

    #[test]
    fn the_manuals_example_positions() {
        // C000_0080 is 0x80 MSRs into the second range: byte 0x800 + 0x20, bits 1:0.
        assert_eq!(position(0xc000_0080), Some((0x820, 0)));
        assert_eq!(position(0xc000_0102), Some((0x840, 4)));
        assert_eq!(position(0x174), Some((0x5d, 0)));
    }

    #[test]
    fn msrs_outside_the_ranges_always_exit() {
        let map = [0; MSRPM_BYTES];
        for msr in [0x2000, 0x4000_0000, 0xbfff_ffff, 0xc000_2000, 0xc001_2000, u32::MAX] {
            assert!(intercepts_msr(&map, msr, false) && intercepts_msr(&map, msr, true));
        }
    }
}
