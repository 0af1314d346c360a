//! The machine's real-time clock, read once to set the clocks of VMs. MC146818A data sheet.

/// Registers as the clock shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Registers {
    second: u8,
    minute: u8,
    hour: u8,
    day: u8,
    month: u8,
    year: u8,
    /// Register B.
    format: u8,
}

/// Register B: values are binary, not BCD.
const BINARY: u8 = 1 << 2;
/// Register B: hours count to 24.
const HOURS_24: u8 = 1 << 1;
/// Hours in 12-hour mode: afternoon.
const PM: u8 = 1 << 7;

impl Registers {
    /// Seconds since 1970, in this century; None if the registers make no date.
    fn seconds(&self) -> Option<u64> {
        let value = |raw: u8| {
            if self.format & BINARY != 0 {
                raw
            } else {
                (raw >> 4) * 10 + (raw & 0xf)
            }
        };
        let mut hour = value(self.hour & !PM);
        if self.format & HOURS_24 == 0 {
            hour = hour % 12 + if self.hour & PM != 0 { 12 } else { 0 };
        } else {
            hour = value(self.hour);
        }
        let (second, minute) = (value(self.second), value(self.minute));
        let (day, month, year) = (value(self.day), value(self.month), value(self.year));
        let valid = second < 60
            && minute < 60
            && hour < 24
            && (1..=31).contains(&day)
            && (1..=12).contains(&month)
            && year < 100;
        if !valid {
            return None;
        }
        let days = days_since_1970(2000 + u64::from(year), u64::from(month), u64::from(day));
        Some(((days * 24 + u64::from(hour)) * 60 + u64::from(minute)) * 60 + u64::from(second))
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, by counting in years that begin in March.
fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days_in_year = (153 * month + 2) / 5 + day - 1;
    // 719,468 days lie between 0000-03-01 and 1970-01-01.
    year * 365 + year / 4 - year / 100 + year / 400 + days_in_year - 719_468
}

/// Reads the clock: seconds since 1970, or 0 if it shows no valid time, or if there is none.
#[cfg(target_os = "none")]
pub fn read(absent: bool) -> u64 {
    if absent {
        return 0;
    }
    // An update takes 2 ms at most (t_BUC and t_UC); a clock that never ends one is not waited for.
    for _ in 0..100_000 {
        if register(0x0a) & 0x80 == 0 {
            let now = snapshot();
            if now == snapshot() {
                return now.seconds().unwrap_or(0);
            }
        }
    }
    0
}

#[cfg(target_os = "none")]
fn snapshot() -> Registers {
    Registers {
        second: register(0),
        minute: register(2),
        hour: register(4),
        day: register(7),
        month: register(8),
        year: register(9),
        format: register(0x0b),
    }
}

#[cfg(target_os = "none")]
#[allow(unsafe_code)] // Two ports.
fn register(index: u8) -> u8 {
    use x86_64::instructions::port::Port;
    // SAFETY: reads of these registers change nothing; bit 7 of the index keeps NMIs as they are (enabled).
    unsafe {
        Port::<u8>::new(0x70).write(index);
        Port::<u8>::new(0x71).read()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BCD: Registers = Registers {
        second: 0x56,
        minute: 0x34,
        hour: 0x12,
        day: 0x22,
        month: 0x11,
        year: 0x26,
        format: HOURS_24,
    };

    #[test]
    fn bcd_and_binary_show_the_same_time() {
        let binary = Registers {
            second: 56,
            minute: 34,
            hour: 12,
            day: 22,
            month: 11,
            year: 26,
            format: HOURS_24 | BINARY,
        };
        assert_eq!(BCD.seconds(), Some(1_795_350_896));
        assert_eq!(binary.seconds(), BCD.seconds());
    }

    #[test]
    fn twelve_hour_clocks() {
        let at = |hour| Registers { hour, format: 0, ..BCD }.seconds().unwrap() / 3600 % 24;
        assert_eq!((at(0x12), at(0x01), at(0x92), at(0x81), at(0x91)), (0, 1, 12, 13, 23));
    }

    #[test]
    fn leap_days_count() {
        assert_eq!(days_since_1970(1970, 1, 1), 0);
        assert_eq!(days_since_1970(2000, 3, 1) - days_since_1970(2000, 2, 28), 2);
        assert_eq!(days_since_1970(2100, 3, 1) - days_since_1970(2100, 2, 28), 1);
        assert_eq!(days_since_1970(2024, 2, 29), 19_782);
    }

    #[test]
    fn nonsense_is_no_date() {
        for bad in [
            Registers { month: 0x13, ..BCD },
            Registers { day: 0, ..BCD },
            Registers { second: 0x60, ..BCD },
            Registers { year: 0xff, ..BCD },
        ] {
            assert_eq!(bad.seconds(), None);
        }
    }
}
