//! The VM's clock: one time base, the host's TSC, behind every timer that the guest can read.
use crate::cpu::clock::Rate;
use crate::devices::lapic::Deadline;

/// Time since a VM's reset. The guest's TSC starts at zero there, plus what each vCPU adds by TSC_ADJUST.
#[derive(Clone, Copy, Debug)]
pub struct VmClock {
    rate: Rate,
    /// The host's TSC at the reset.
    base: u64,
}

impl VmClock {
    /// A clock that starts at the host's TSC `base`, which runs at `rate`.
    pub const fn new(rate: Rate, base: u64) -> Self {
        Self { rate, base }
    }

    /// Rate of the TSC.
    pub const fn rate(&self) -> Rate {
        self.rate
    }

    /// Nanoseconds since the reset at the host's TSC `host`.
    #[inline]
    pub const fn ns(&self, host: u64) -> u64 {
        self.rate.ns(host.wrapping_sub(self.base))
    }

    /// What hardware adds to the host's TSC when a vCPU with this TSC_ADJUST reads its own.
    #[inline]
    pub const fn tsc_offset(&self, adjust: u64) -> u64 {
        adjust.wrapping_sub(self.base)
    }

    /// The TSC that a vCPU with this TSC_ADJUST reads at the host's TSC `host`.
    #[inline]
    pub const fn guest_tsc(&self, host: u64, adjust: u64) -> u64 {
        host.wrapping_add(self.tsc_offset(adjust))
    }

    /// The host's TSC at `ns` nanoseconds, or just after.
    #[inline]
    pub const fn host_tsc_of_ns(&self, ns: u64) -> u64 {
        self.base.saturating_add(self.rate.ticks(ns).saturating_add(1))
    }

    /// The host's TSC at a deadline of a vCPU with this TSC_ADJUST.
    #[inline]
    pub const fn host_tsc_of(&self, deadline: Deadline, adjust: u64) -> u64 {
        match deadline {
            Deadline::Ns(ns) => self.host_tsc_of_ns(ns),
            Deadline::Tsc(tsc) => {
                let since_reset = tsc.wrapping_sub(adjust);
                // A deadline before the reset, or in another age of the counter: as the guest's comparison
                // is on its own TSC, the nearest end is right.
                match self.base.checked_add(since_reset) {
                    Some(host) => host,
                    None => u64::MAX,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: VmClock = VmClock::new(Rate::from_khz(2_500_000), 1_000_000);

    #[test]
    fn the_guest_starts_at_zero() {
        assert_eq!(CLOCK.ns(1_000_000), 0);
        assert_eq!(CLOCK.guest_tsc(1_000_000, 0), 0);
        assert_eq!(CLOCK.ns(1_000_000 + 2_501), 1_000);
    }

    #[test]
    fn a_deadline_is_never_early() {
        for ns in [0, 1, 2, 399, 400, 1_000_000_007, 1 << 50] {
            assert!(CLOCK.ns(CLOCK.host_tsc_of_ns(ns)) >= ns);
        }
        assert_eq!(CLOCK.host_tsc_of(Deadline::Ns(u64::MAX), 0), u64::MAX);
    }

    #[test]
    fn tsc_deadlines_follow_tsc_adjust() {
        for adjust in [0, 5_000, u64::MAX - 10] {
            let host = 7_000_000;
            let deadline = Deadline::Tsc(CLOCK.guest_tsc(host, adjust));
            assert_eq!(CLOCK.host_tsc_of(deadline, adjust), host);
        }
    }
}
