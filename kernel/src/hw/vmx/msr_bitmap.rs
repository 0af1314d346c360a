//! The MSR bitmaps. SDM vol. 3, 25.6.9.
use core::ops::RangeInclusive;

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
    allow_read(bitmaps, msr);
    allow_write(bitmaps, msr);
}

/// Lets the guest read an MSR without an exit; see [`allow`].
fn allow_read(bitmaps: &mut [u8; BYTES], msr: u32) {
    let (byte, bit) = position(msr).expect("an MSR that the bitmaps cover");
    bitmaps[byte] &= !(1 << bit);
}

/// Lets the guest write an MSR without an exit; see [`allow`].
fn allow_write(bitmaps: &mut [u8; BYTES], msr: u32) {
    let (byte, bit) = position(msr).expect("an MSR that the bitmaps cover");
    bitmaps[byte + 0x800] &= !(1 << bit);
}

/// x2APIC registers that read right from an exported page: ID, version; TPR; PPR; LDR; ISR, TMR, IRR (SDM vol. 3, table
/// 11-6, 30.5).
const APIC_READS: [RangeInclusive<u32>; 5] =
    [0x802..=0x803, 0x808..=0x808, 0x80a..=0x80a, 0x80d..=0x80d, 0x810..=0x827];
/// x2APIC registers whose writes the processor carries out by itself: TPR, EOI, self-IPI.
const APIC_WRITES: [u32; 3] = [0x808, 0x80b, 0x83f];

/// Bitmaps that all guests share: every MSR exits but those that the hardware or a change of vCPUs switches, IA32_PKRS with
/// `supervisor_keys` among them; with `virtual_apic`, those of the local APIC that the processor knows do not exit either.
pub fn bitmaps(virtual_apic: bool, supervisor_keys: bool) -> [u8; BYTES] {
    let mut bitmaps = [0xff; BYTES];
    for msr in crate::vm::msr::passthrough(supervisor_keys) {
        allow(&mut bitmaps, msr);
    }
    if virtual_apic {
        APIC_READS.into_iter().flatten().for_each(|msr| allow_read(&mut bitmaps, msr));
        APIC_WRITES.into_iter().for_each(|msr| allow_write(&mut bitmaps, msr));
    }
    bitmaps
}

/// [`bitmaps`] where the processor finds them.
#[cfg(target_os = "none")]
pub(super) fn for_all_guests(virtual_apic: bool, supervisor_keys: bool) -> x86_64::PhysAddr {
    use crate::mm::{self, FrameSize, Zone};

    let frame = mm::alloc(FrameSize::Size4K, Zone::Any).expect("memory for the MSR bitmaps at boot");
    write(frame, &bitmaps(virtual_apic, supervisor_keys));
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
    fn a_virtual_apic_opens_its_own_registers_alone() {
        let (closed, open) = (bitmaps(false, false), bitmaps(true, false));
        let exits = |bitmaps: &[u8; BYTES], msr: u32, write: usize| {
            let (byte, bit) = position(msr).unwrap();
            bitmaps[byte + write * 0x800] >> bit & 1 != 0
        };
        for msr in 0..0x2000 {
            let [read, write] = [0, 1].map(|write| exits(&closed, msr, write) != exits(&open, msr, write));
            // Of ISR, TMR, IRR: 24 registers.
            let readable =
                matches!(msr, 0x802 | 0x803 | 0x808 | 0x80a | 0x80d) || (0x810..0x828).contains(&msr);
            assert_eq!((read, write), (readable, matches!(msr, 0x808 | 0x80b | 0x83f)), "{msr:#x}");
        }
        assert!(exits(&closed, 0x808, 0) && exits(&closed, 0x80b, 1) && !exits(&closed, 0x174, 0));
        // Registers that only the model knows: ICR, LVT and counts; and IA32_APIC_BASE, IA32_TSC_DEADLINE.
        for msr in (0x828..=0x83e).chain([0x1b, 0x6e0]) {
            assert!(exits(&open, msr, 0) && exits(&open, msr, 1), "{msr:#x}");
        }
    }

    #[test]
    fn supervisor_keys_open_their_register_alone() {
        let mut with = bitmaps(false, true);
        assert_ne!(with, bitmaps(false, false));
        // IA32_PKRS is 6E1h.
        with[0x6e1 / 8] |= 1 << 1;
        with[0x800 + 0x6e1 / 8] |= 1 << 1;
        assert_eq!(with, bitmaps(false, false));
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
