//! Exact conversions between the VM's nanoseconds and the crystals of a PC, so that all timers share one clock.
//!
//! A PC divides one 14.318180 MHz crystal (315/22 MHz): by 12 for the 8254, by 4 for the ACPI timer. Both rates
//! are ratios of small integers, so no rounding error ever accumulates and the two never drift apart.

/// Counts of a clock that ticks `mul` times in `div` nanoseconds.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    mul: u64,
    div: u64,
}

/// Input clock of the 8254: 105/88 MHz = 1.193182 MHz.
pub const PIT: Rate = Rate { mul: 21, div: 17_600 };
/// ACPI power-management timer: 315/88 MHz = 3.579545 MHz.
pub const PM_TIMER: Rate = Rate { mul: 63, div: 17_600 };
/// Crystal of the real-time clock: 32.768 kHz.
pub const RTC: Rate = Rate { mul: 512, div: 15_625_000 };

impl Rate {
    /// Whole ticks that have passed at `ns`. Never overflows.
    #[inline]
    pub const fn ticks(self, ns: u64) -> u64 {
        (ns / self.div) * self.mul + (ns % self.div) * self.mul / self.div
    }

    /// The first nanosecond at which `ticks` have passed; saturates at the end of time.
    #[inline]
    pub const fn ns(self, ticks: u64) -> u64 {
        let whole = (ticks / self.mul).saturating_mul(self.div);
        whole.saturating_add(((ticks % self.mul) * self.div).div_ceil(self.mul))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_the_nominal_frequencies() {
        const HOUR_NS: u64 = 3_600_000_000_000;
        assert_eq!(PIT.ticks(HOUR_NS), 1_193_181_818_181 * 36 / 10_000);
        assert_eq!(PM_TIMER.ticks(HOUR_NS), 3_579_545_454_545 * 36 / 10_000);
        assert_eq!(RTC.ticks(HOUR_NS), 32_768 * 3600);
    }

    #[test]
    fn ns_is_the_first_moment_of_a_tick() {
        for rate in [PIT, PM_TIMER, RTC] {
            for tick in [0, 1, 2, 20, 21, 22, 62, 63, 64, 65_535, 1 << 40] {
                let ns = rate.ns(tick);
                assert_eq!(rate.ticks(ns), tick);
                assert!(ns == 0 || rate.ticks(ns - 1) < tick);
            }
            assert_eq!(rate.ns(u64::MAX), u64::MAX);
            rate.ticks(u64::MAX);
        }
    }
}
