//! Conversion between nanoseconds and time-stamp counter ticks without overflow or division. Pure.

use core::fmt;

/// A factor as a fixed-point number: `mantissa / 2^shift`, the mantissa with its top bit set, so that the relative
/// error is below 2^-63.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Factor {
    mantissa: u64,
    shift: u32,
}

impl Factor {
    /// `numerator / denominator`, both between 1 and 2^32.
    const fn new(numerator: u64, denominator: u64) -> Self {
        // At least 2^64, so normalising only ever drops bits.
        let quotient = ((numerator as u128) << 96) / denominator as u128;
        let excess = 64 - quotient.leading_zeros();
        Self { mantissa: (quotient >> excess) as u64, shift: 96 - excess }
    }

    /// The factor times `value`, rounded down, at most `u64::MAX`.
    #[inline]
    const fn apply(self, value: u64) -> u64 {
        let product = (value as u128 * self.mantissa as u128) >> self.shift;
        if product > u64::MAX as u128 {
            u64::MAX
        } else {
            product as u64
        }
    }
}

/// The rate of a time-stamp counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    khz: u64,
    ticks_per_ns: Factor,
    ns_per_tick: Factor,
}

impl Rate {
    /// A counter of `khz` thousand ticks a second, taken as 1 when zero and as 1 THz when faster.
    pub const fn from_khz(khz: u64) -> Self {
        let khz = match khz {
            0 => 1,
            1..=1_000_000_000 => khz,
            _ => 1_000_000_000,
        };
        Self { khz, ticks_per_ns: Factor::new(khz, 1_000_000), ns_per_tick: Factor::new(1_000_000, khz) }
    }

    /// Thousand ticks a second.
    pub const fn khz(self) -> u64 {
        self.khz
    }

    /// How many ticks `ns` nanoseconds take, rounded down; saturates.
    #[inline]
    pub const fn ticks(self, ns: u64) -> u64 {
        self.ticks_per_ns.apply(ns)
    }

    /// How many nanoseconds `ticks` take, rounded down; saturates.
    #[inline]
    pub const fn ns(self, ticks: u64) -> u64 {
        self.ns_per_tick.apply(ticks)
    }
}

/// What told the rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Calibration {
    /// The rate.
    pub rate: Rate,
    /// What it was measured against; nothing where no other timer counts, and CPUID alone is believed.
    pub timer: Option<&'static str>,
    /// CPUID's value was taken.
    pub from_cpuid: bool,
}

impl fmt::Display for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let khz = self.rate.khz();
        match (self.from_cpuid, self.timer) {
            (true, Some(timer)) => write!(f, "{khz} kHz (CPUID, confirmed by {timer})"),
            (false, Some(timer)) => write!(f, "{khz} kHz (measured against {timer})"),
            (_, None) => write!(f, "{khz} kHz (CPUID alone)"),
        }
    }
}

/// A measured frequency, rounded to whole MHz when it is that close that the difference is the measurement's: an
/// emulator's counter runs at exactly 1 GHz, a processor's often at a multiple of 100 MHz.
pub const fn round_khz(khz: u64) -> u64 {
    const TOLERANCE_PPM: u64 = 20;
    let mhz = khz.saturating_add(500) / 1000 * 1000;
    if mhz != 0 && khz.abs_diff(mhz).saturating_mul(1_000_000) <= mhz.saturating_mul(TOLERANCE_PPM) {
        mhz
    } else {
        khz
    }
}

/// The frequency in kHz of a counter that advanced by `ticks` while a reference advanced by `elapsed` ticks of
/// `femtoseconds_per_tick` each. `None` when nothing moved or the result is absurd.
pub fn measured_khz(ticks: u64, elapsed: u64, femtoseconds_per_tick: u64) -> Option<u64> {
    const FEMTOSECONDS_PER_MILLISECOND: u128 = 1_000_000_000_000;
    let femtoseconds = u128::from(elapsed) * u128::from(femtoseconds_per_tick);
    let khz = (u128::from(ticks) * FEMTOSECONDS_PER_MILLISECOND).checked_div(femtoseconds)?;
    u64::try_from(khz).ok().filter(|khz| *khz != 0)
}

impl Calibration {
    /// From the timer that counted and the frequency in kHz that it measured, if one did, and the one that CPUID tells, if it
    /// does.
    pub fn new(measured: Option<(&'static str, u64)>, from_cpuid: Option<u64>) -> Option<Self> {
        let (timer, (khz, from_cpuid)) = match measured {
            Some((timer, measured)) => (Some(timer), believed_khz(measured, from_cpuid)),
            None => (None, (from_cpuid.filter(|khz| *khz != 0)?, true)),
        };
        Some(Self { rate: Rate::from_khz(khz), timer, from_cpuid })
    }
}

/// The frequency to believe: CPUID's, if there is one and the measurement confirms it to a thousandth, else the
/// measured one. The flag says that it is CPUID's.
pub fn believed_khz(measured: u64, from_cpuid: Option<u64>) -> (u64, bool) {
    match from_cpuid {
        Some(khz) if khz.abs_diff(measured) <= measured / 1000 => (khz, true),
        _ => (round_khz(measured), false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_gigahertz_counter_counts_nanoseconds() {
        let rate = Rate::from_khz(1_000_000);
        for n in [0, 1, 999, 1 << 40, u64::MAX] {
            assert_eq!((rate.ticks(n), rate.ns(n)), (n, n));
        }
    }

    #[test]
    fn absurd_rates_and_values_saturate() {
        assert_eq!(Rate::from_khz(0).khz(), 1);
        assert_eq!(Rate::from_khz(u64::MAX).khz(), 1_000_000_000);
        assert_eq!(Rate::from_khz(3_000_000).ticks(u64::MAX), u64::MAX);
        assert_eq!(Rate::from_khz(1).ns(u64::MAX), u64::MAX);
        assert_eq!(Rate::from_khz(1).ns(3), 3_000_000);
    }

    #[test]
    fn rounding_stays_within_the_measurement() {
        assert_eq!(round_khz(999_990), 1_000_000);
        assert_eq!(round_khz(1_000_021), 1_000_021);
        assert_eq!(round_khz(2_994_375), 2_994_375);
        assert_eq!(round_khz(2_400_040), 2_400_000);
        assert_eq!(round_khz(0), 0);
    }

    #[test]
    fn frequencies_are_ticks_over_time() {
        // 50 ms of an HPET of 10 ns and a counter of 1 GHz.
        assert_eq!(measured_khz(50_000_000, 5_000_000, 10_000_000), Some(1_000_000));
        // 50 ms of the PM timer.
        let khz = measured_khz(150_000_000, 178_977, 1_000_000_000_000_000 / 3_579_545).unwrap();
        assert!(khz.abs_diff(3_000_000) < 50, "{khz}");
        assert_eq!(measured_khz(0, 1, 1), None);
        assert_eq!(measured_khz(1, 0, 1), None);
        assert_eq!(measured_khz(u64::MAX, 1, 1), None);
    }

    #[test]
    fn without_a_timer_cpuid_has_to_do() {
        let shown = |measured, cpuid| Calibration::new(measured, cpuid).map(|found| found.to_string());
        let measured = Some(("HPET", 2_994_000));
        assert_eq!(shown(measured, None).unwrap(), "2994000 kHz (measured against HPET)");
        assert_eq!(shown(measured, Some(2_994_375)).unwrap(), "2994375 kHz (CPUID, confirmed by HPET)");
        assert_eq!(shown(None, Some(2_994_375)).unwrap(), "2994375 kHz (CPUID alone)");
        assert_eq!((shown(None, None), shown(None, Some(0))), (None, None));
    }

    #[test]
    fn cpuid_is_believed_when_confirmed() {
        assert_eq!(believed_khz(2_994_000, Some(2_994_375)), (2_994_375, true));
        assert_eq!(believed_khz(2_600_010, Some(2_994_375)), (2_600_000, false));
        assert_eq!(believed_khz(999_990, None), (1_000_000, false));
    }

    proptest! {
        #[test]
        fn agrees_with_exact_arithmetic(khz in 1u64..=1_000_000_000, value in any::<u64>()) {
            let rate = Rate::from_khz(khz);
            let clip = |n: u128| n.min(u64::MAX as u128) as u64;
            let ticks = clip(u128::from(value) * u128::from(khz) / 1_000_000);
            let ns = clip(u128::from(value) * 1_000_000 / u128::from(khz));
            // One unit for the rounding, and 2^-62 of the result for the factor.
            prop_assert!(ticks.abs_diff(rate.ticks(value)) <= 1 + (ticks >> 62), "{} {}", ticks, rate.ticks(value));
            prop_assert!(ns.abs_diff(rate.ns(value)) <= 1 + (ns >> 62), "{} {}", ns, rate.ns(value));
        }

        #[test]
        fn time_there_and_back_loses_less_than_a_tick(khz in 100_000u64..10_000_000, ns in 0u64..1 << 53) {
            let rate = Rate::from_khz(khz);
            let back = rate.ns(rate.ticks(ns));
            prop_assert!(back <= ns && ns - back <= 2 + 1_000_000 / khz + 1, "{} {}", ns, back);
        }
    }
}
