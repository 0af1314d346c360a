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

    /// The host's TSC at a deadline of a vCPU with this TSC_ADJUST, seen from the host's TSC `now`.
    #[inline]
    pub const fn host_tsc_of(&self, deadline: Deadline, adjust: u64, now: u64) -> u64 {
        match deadline {
            Deadline::Ns(ns) => self.host_tsc_of_ns(ns),
            // The same unsigned comparison by which the local APIC decides that the deadline has passed: a guest can
            // set its TSC to anything, and what is due here must expire there.
            Deadline::Tsc(tsc) => now.saturating_add(tsc.saturating_sub(self.guest_tsc(now, adjust))),
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
        assert_eq!(CLOCK.host_tsc_of(Deadline::Ns(u64::MAX), 0, 0), u64::MAX);
    }

    #[test]
    fn tsc_deadlines_follow_tsc_adjust() {
        for adjust in [0, 5_000, u64::MAX - 10] {
            let host = 7_000_000;
            let deadline = Deadline::Tsc(CLOCK.guest_tsc(host, adjust));
            assert_eq!(CLOCK.host_tsc_of(deadline, adjust, 6_000_000), host);
        }
    }

    #[test]
    fn a_deadline_is_due_exactly_when_the_guests_tsc_has_reached_it() {
        let now = 9_000_000;
        for adjust in [0, 1 << 40, 1000u64.wrapping_neg(), u64::MAX / 2] {
            for deadline in [1, 500, 1 << 50, u64::MAX - 500, u64::MAX] {
                let due = CLOCK.guest_tsc(now, adjust) >= deadline;
                let host = CLOCK.host_tsc_of(Deadline::Tsc(deadline), adjust, now);
                assert_eq!(host <= now, due, "adjust {adjust:#x}, deadline {deadline:#x}");
            }
        }
    }
}
