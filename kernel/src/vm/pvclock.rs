//! The paravirtual clock of KVM guests: the rate of the TSC and the wall clock, told by a structure in guest memory.
//!
//! On AMD a kernel has no other way to learn the rate than to measure it against the 8254 or the ACPI timer, which
//! fails where exits are slow, as they are in an emulator: then the TSC is "unstable" and all time-keeping exits. The
//! interface is that of Linux, Documentation/virt/kvm/x86/{cpuid,msr}.rst; what is offered is the clock alone.

/// First CPUID leaf of the interface. Kernels look for its signature at every multiple of 100h from 4000_0000h on.
pub const CPUID_BASE: u32 = 0x4000_0100;
/// Signature in EBX, ECX, EDX of the first leaf.
pub const SIGNATURE: [u8; 12] = *b"KVMKVMKVM\0\0\0";
/// EAX of the second leaf: the MSRs below exist (bit 3), and the clock is the same on all vCPUs (bit 24).
pub const FEATURES: u32 = 1 << 3 | 1 << 24;

/// MSR_KVM_WALL_CLOCK_NEW: a write says where to put the wall-clock time of the VM's start, once.
pub const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
/// MSR_KVM_SYSTEM_TIME_NEW: bit 0 enables, the rest is where the vCPU's clock structure lies.
pub const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// Enable bit of [`MSR_SYSTEM_TIME`].
pub const ENABLE: u64 = 1;

/// Flag of the clock structure: the TSCs of all vCPUs agree.
const TSC_STABLE: u8 = 1;

/// How ticks become nanoseconds: `((ticks << shift) * mul) >> 32`, a negative shift being one to the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Scale {
    mul: u32,
    shift: i8,
}

impl Scale {
    /// The scale of a TSC of `khz`, its multiplier between 2^31 and 2^32. `khz` is between 1 and 10^9.
    fn new(khz: u64) -> Self {
        let hz = u128::from(khz.clamp(1, 1_000_000_000)) * 1000;
        let mut shift = 0i8;
        // A billion times 2^32 has 62 bits, so shifts of up to 64 lose nothing.
        let mul = |shift: i8| {
            let numerator = 1_000_000_000u128 << 32;
            if shift <= 0 {
                (numerator << -shift) / hz
            } else {
                numerator / (hz << shift)
            }
        };
        while mul(shift) >> 32 != 0 {
            shift += 1;
        }
        while mul(shift) >> 31 == 0 {
            shift -= 1;
        }
        Self { mul: mul(shift) as u32, shift }
    }
}

/// The clock structure (`struct pvclock_vcpu_time_info`) of a vCPU whose TSC runs at `khz` and was `tsc_at_start` when
/// the VM's clock was zero. It holds as long as the TSC is not written, so its version never has to change while the
/// guest reads it.
pub fn system_time(khz: u64, tsc_at_start: u64) -> [u8; 32] {
    let scale = Scale::new(khz);
    let mut info = [0; 32];
    info[0..4].copy_from_slice(&2u32.to_le_bytes());
    info[8..16].copy_from_slice(&tsc_at_start.to_le_bytes());
    // Bytes 16 to 23: the time in nanoseconds at that TSC, zero.
    info[24..28].copy_from_slice(&scale.mul.to_le_bytes());
    info[28] = scale.shift as u8;
    info[29] = TSC_STABLE;
    info
}

/// The wall-clock structure (`struct pvclock_wall_clock`): the time at which the VM's clock was zero.
pub fn wall_clock(epoch_s: u64) -> [u8; 12] {
    let mut info = [0; 12];
    info[0..4].copy_from_slice(&2u32.to_le_bytes());
    info[4..8].copy_from_slice(&(epoch_s as u32).to_le_bytes());
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a guest computes.
    fn nanoseconds(scale: Scale, ticks: u64) -> u64 {
        let ticks = if scale.shift < 0 { ticks >> -scale.shift } else { ticks << scale.shift };
        ((u128::from(ticks) * u128::from(scale.mul)) >> 32) as u64
    }

    /// How Linux computes the rate.
    fn khz(scale: Scale) -> u64 {
        let khz = (1_000_000u64 << 32) / u64::from(scale.mul);
        if scale.shift < 0 {
            khz << -scale.shift
        } else {
            khz >> scale.shift
        }
    }

    #[test]
    fn a_second_of_ticks_is_a_second() {
        for rate in [1_000_000u64, 2_596_134, 3_700_000, 999_999, 400_000, 100_000, 5_000_000] {
            let scale = Scale::new(rate);
            assert!(scale.mul >> 31 == 1, "{scale:?}");
            assert!(nanoseconds(scale, rate * 1000).abs_diff(1_000_000_000) <= 8, "{rate}");
            assert!(khz(scale).abs_diff(rate) <= 1 + rate / 1_000_000, "{rate}: {}", khz(scale));
        }
        assert_eq!(Scale::new(1_000_000), Scale { mul: 1 << 31, shift: 1 });
    }

    #[test]
    fn absurd_rates_make_some_scale() {
        for rate in [0, 1, 1_000_000_000, u64::MAX] {
            assert!(Scale::new(rate).mul >> 31 == 1);
        }
    }

    #[test]
    fn the_structures_are_where_guests_look() {
        let info = system_time(1_000_000, 0x1122_3344_5566_7788);
        assert_eq!(info[0], 2, "an even version");
        assert_eq!(info[8..16], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(info[16..24], [0; 8]);
        assert_eq!((info[28], info[29]), (1, 1));
        assert_eq!(wall_clock(0x6543_2100)[4..8], [0x00, 0x21, 0x43, 0x65]);
    }
}
