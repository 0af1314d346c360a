//! CMOS: the MC146818A real-time clock and its battery-backed memory.
//!
//! Source: Motorola MC146818A data sheet; the century byte at 0x32 is the one that the FADT names; the memory-size
//! bytes are those of every PC BIOS since the AT, plus the RTC memory map that QEMU's firmware reads (0x34, 0x5b).
//!
//! The clock does not tick: the time is a formula of the VM's clock, and register C's flags are worked out when
//! somebody looks or when one that is enabled as an interrupt falls due. While SET is on, or the divider is held
//! in reset, the ten time bytes are plain memory; they become the time when the clock runs again. Nonsense in them
//! is brought into range then.

use super::clock;

/// Index port; bit 7 masks NMI, of which a VM has none. Reads all ones.
pub const INDEX: u16 = 0x70;
/// Data port.
pub const DATA: u16 = 0x71;

const SECONDS: usize = 0x00;
const SECONDS_ALARM: usize = 0x01;
const MINUTES: usize = 0x02;
const MINUTES_ALARM: usize = 0x03;
const HOURS: usize = 0x04;
const HOURS_ALARM: usize = 0x05;
const DAY_OF_WEEK: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;
/// The century byte, for the FADT.
pub const CENTURY: u8 = 0x32;

const A_UIP: u8 = 1 << 7;
const A_DIVIDER: u8 = 7 << 4;
/// Divider values above this hold the clock in reset (or test it).
const A_DIVIDER_RUNS: u8 = 2 << 4;
const A_RATE: u8 = 0xf;

const B_SET: u8 = 1 << 7;
const B_UIE: u8 = 1 << 4;
const B_BINARY: u8 = 1 << 2;
const B_24H: u8 = 1 << 1;

const C_IRQF: u8 = 1 << 7;
const C_PF: u8 = 1 << 6;
const C_AF: u8 = 1 << 5;
const C_UF: u8 = 1 << 4;
const C_FLAGS: u8 = C_PF | C_AF | C_UF;

/// Valid RAM and time.
const D_VRT: u8 = 1 << 7;

const HOUR_PM: u8 = 1 << 7;
/// Alarm bytes from here up match everything.
const DONT_CARE: u8 = 0xc0;

const SECOND_NS: i64 = 1_000_000_000;
/// Update in progress: 244 us of warning and the 1984 us update cycle of a 32.768 kHz time base.
const UIP_NS: i64 = 244_000 + 1_984_000;
const DAY_S: i64 = 86_400;
/// Time is kept within the years 0 to 9999, which four digits can show.
const MIN_TIME_S: i64 = days_from_civil(0, 1, 1) * DAY_S;
const MAX_TIME_S: i64 = days_from_civil(10_000, 1, 1) * DAY_S - 1;

/// Everything the clock remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RtcState {
    /// The 128 bytes. Time bytes are current only while the clock stands; register C only after an update.
    pub bytes: [u8; 128],
    /// Selected byte.
    pub index: u8,
    /// Some moment (nanoseconds of the VM's clock) at which a second began.
    pub base_ns: i64,
    /// The time at `base_ns`, in seconds since 1970.
    pub base_s: i64,
    /// Register C is up to date until here.
    pub seen_ns: i64,
}

/// What the memory-size bytes tell.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// RAM from address 0 to the PCI hole, in bytes.
    pub below_4g: u64,
    /// RAM from 4 GiB up, in bytes.
    pub above_4g: u64,
}

/// A real-time clock.
#[derive(Clone, Debug)]
pub struct Rtc {
    state: RtcState,
}

impl Rtc {
    /// A clock that shows `epoch_s` (seconds since 1970) at time 0, set up as a PC's firmware does: 24 hours, BCD.
    pub fn new(epoch_s: u64, memory: Memory, cpus: u32) -> Self {
        let mut bytes = [0; 128];
        bytes[REG_A] = A_DIVIDER_RUNS | 6;
        bytes[REG_B] = B_24H;
        bytes[REG_D] = D_VRT;
        store_memory_size(&mut bytes, memory);
        bytes[0x5f] = cpus.saturating_sub(1).min(255) as u8;
        let sum: u16 = bytes[0x10..=0x2d].iter().map(|&b| u16::from(b)).sum();
        bytes[0x2e..=0x2f].copy_from_slice(&sum.to_be_bytes());
        let base_s = i64::try_from(epoch_s).unwrap_or(MAX_TIME_S).min(MAX_TIME_S);
        Self { state: RtcState { bytes, index: 0, base_ns: 0, base_s, seen_ns: 0 } }
    }

    /// Reads port 0x70 or 0x71.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        if port != DATA {
            return 0xff;
        }
        let now = clamp_ns(now_ns);
        let index = usize::from(self.state.index);
        match index {
            REG_A => self.state.bytes[REG_A] | if self.is_updating(now) { A_UIP } else { 0 },
            REG_C => {
                self.update_flags(now);
                let value = self.state.bytes[REG_C] | if self.irq() { C_IRQF } else { 0 };
                self.state.bytes[REG_C] = 0;
                value
            }
            _ => {
                if is_time(index) {
                    self.show_time(now);
                }
                self.state.bytes[index]
            }
        }
    }

    /// Writes port 0x70 or 0x71.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        if port != DATA {
            self.state.index = value & 0x7f;
            return;
        }
        let now = clamp_ns(now_ns);
        self.update_flags(now);
        let index = usize::from(self.state.index);
        match index {
            REG_A | REG_B => self.write_control(index, value, now),
            REG_C | REG_D => {}
            _ if is_time(index) => {
                self.show_time(now);
                self.state.bytes[index] = value;
                if self.is_running() {
                    let base_ns = self.second_began(now);
                    self.take_time(base_ns);
                }
            }
            _ => self.state.bytes[index] = value,
        }
    }

    /// Registers A and B decide whether the clock runs and how its bytes are written.
    fn write_control(&mut self, index: usize, value: u8, now: i64) {
        let ran = self.is_running();
        let was_reset = self.is_divider_reset();
        if ran {
            self.show_time(now);
        }
        self.state.bytes[index] = match index {
            REG_A => value & !A_UIP,
            // Setting SET clears UIE.
            _ if value & B_SET != 0 => value & !B_UIE,
            _ => value,
        };
        if was_reset && !self.is_divider_reset() {
            // The first update comes half a second after the divider starts.
            self.state.base_ns = now - SECOND_NS / 2;
        }
        if self.is_running() && !ran {
            let base_ns = self.second_began(now);
            self.take_time(base_ns);
        }
    }

    fn is_divider_reset(&self) -> bool {
        self.state.bytes[REG_A] & A_DIVIDER > A_DIVIDER_RUNS
    }

    /// Whether the time advances.
    fn is_running(&self) -> bool {
        !self.is_divider_reset() && self.state.bytes[REG_B] & B_SET == 0
    }

    /// The last moment at or before `now` at which a second began.
    fn second_began(&self, now: i64) -> i64 {
        now - now.saturating_sub(self.state.base_ns).rem_euclid(SECOND_NS)
    }

    /// Seconds since 1970 while the clock runs.
    fn time_s(&self, now: i64) -> i64 {
        let passed = now.saturating_sub(self.state.base_ns).div_euclid(SECOND_NS);
        (self.state.base_s + passed).clamp(MIN_TIME_S, MAX_TIME_S)
    }

    fn is_updating(&self, now: i64) -> bool {
        self.is_running() && now - self.second_began(now) >= SECOND_NS - UIP_NS
    }

    /// Writes the time into the time bytes, if the clock runs.
    fn show_time(&mut self, now: i64) {
        if !self.is_running() {
            return;
        }
        let time = self.time_s(now);
        let (days, second) = (time.div_euclid(DAY_S), time.rem_euclid(DAY_S));
        let (year, month, day) = civil_from_days(days);
        // 1 January 1970 was a Thursday; Sunday is day 1.
        let weekday = (days + 4).rem_euclid(7) + 1;
        let fields = [
            (SECONDS, second % 60),
            (MINUTES, second / 60 % 60),
            (DAY_OF_WEEK, weekday),
            (DAY, day),
            (MONTH, month),
            (YEAR, year % 100),
            (usize::from(CENTURY), year / 100),
        ];
        for (index, value) in fields {
            self.state.bytes[index] = self.encode(value as u8);
        }
        self.state.bytes[HOURS] = self.encode_hour((second / 3600) as u8);
    }

    /// Makes the time bytes the time that began at `base_ns`.
    fn take_time(&mut self, base_ns: i64) {
        let field = |index: usize, min: i64, max: i64| {
            i64::from(self.decode(self.state.bytes[index]).unwrap_or(0)).clamp(min, max)
        };
        let year = field(usize::from(CENTURY), 0, 99) * 100 + field(YEAR, 0, 99);
        let month = field(MONTH, 1, 12);
        let day = field(DAY, 1, days_in_month(year, month));
        let hour = i64::from(self.decode_hour(self.state.bytes[HOURS]).unwrap_or(0));
        let second = hour * 3600 + field(MINUTES, 0, 59) * 60 + field(SECONDS, 0, 59);
        self.state.base_s = days_from_civil(year, month, day) * DAY_S + second;
        self.state.base_ns = base_ns;
    }

    fn encode(&self, value: u8) -> u8 {
        if self.state.bytes[REG_B] & B_BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    /// None if a digit is not one.
    fn decode(&self, byte: u8) -> Option<u8> {
        if self.state.bytes[REG_B] & B_BINARY != 0 {
            return Some(byte);
        }
        (byte & 15 < 10 && byte >> 4 < 10).then_some((byte >> 4) * 10 + (byte & 15))
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.state.bytes[REG_B] & B_24H != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    /// Hour of the day, 0 to 23.
    fn decode_hour(&self, byte: u8) -> Option<u8> {
        if self.state.bytes[REG_B] & B_24H != 0 {
            return self.decode(byte).filter(|&hour| hour < 24);
        }
        let hour = self.decode(byte & !HOUR_PM).filter(|hour| (1..=12).contains(hour))?;
        Some(hour % 12 + if byte & HOUR_PM != 0 { 12 } else { 0 })
    }

    /// Period of the periodic flag, as a power of two of crystal pulses.
    fn periodic_shift(&self) -> Option<u32> {
        match self.state.bytes[REG_A] & A_RATE {
            0 => None,
            // Rates 1 and 2 stand for 256 Hz and 128 Hz with a 32.768 kHz time base.
            rate @ 1..=2 => Some(u32::from(rate) + 6),
            rate => Some(u32::from(rate) - 1),
        }
        .filter(|_| !self.is_divider_reset())
    }

    /// When the periodic flag is set next after `now`.
    fn next_periodic(&self, now: i64) -> Option<i64> {
        let shift = self.periodic_shift()?;
        let began = self.second_began(now);
        let pulses = clock::RTC.ticks((now - began) as u64);
        let next = ((pulses >> shift) + 1) << shift;
        // Every period divides a second, so the pattern starts anew with each.
        Some(began.saturating_add(clock::RTC.ns(next) as i64))
    }

    /// When the time is updated next after `now`.
    fn next_update(&self, now: i64) -> Option<i64> {
        self.is_running().then(|| self.second_began(now).saturating_add(SECOND_NS))
    }

    /// When the alarm strikes next after `now`.
    fn next_alarm(&self, now: i64) -> Option<i64> {
        if !self.is_running() {
            return None;
        }
        let bytes = &self.state.bytes;
        let pattern = |index: usize, decoded: Option<u8>| {
            if bytes[index] >= DONT_CARE {
                Some(None)
            } else {
                decoded.map(Some)
            }
        };
        let hour = pattern(HOURS_ALARM, self.decode_hour(bytes[HOURS_ALARM]))?;
        let minute = pattern(MINUTES_ALARM, self.decode(bytes[MINUTES_ALARM]).filter(|&m| m < 60))?;
        let second = pattern(SECONDS_ALARM, self.decode(bytes[SECONDS_ALARM]).filter(|&s| s < 60))?;
        let from = (self.time_s(now) + 1).rem_euclid(DAY_S) as u32;
        let wait = match next_match(from, hour, minute, second) {
            Some(at) => at - from,
            None => DAY_S as u32 - from + next_match(0, hour, minute, second)?,
        };
        Some(self.second_began(now).saturating_add((i64::from(wait) + 1) * SECOND_NS))
    }

    /// Sets the flags of register C for all that happened until `now`.
    fn update_flags(&mut self, now: i64) {
        let seen = self.state.seen_ns;
        if now <= seen {
            return;
        }
        let mut flags = self.state.bytes[REG_C];
        for (flag, next) in [
            (C_PF, self.next_periodic(seen)),
            (C_UF, self.next_update(seen)),
            (C_AF, if flags & C_AF == 0 { self.next_alarm(seen) } else { None }),
        ] {
            if next.is_some_and(|at| at <= now) {
                flags |= flag;
            }
        }
        self.state.bytes[REG_C] = flags;
        self.state.seen_ns = now;
    }

    /// Brings the interrupt flags up to date.
    pub fn advance(&mut self, now_ns: u64) {
        self.update_flags(clamp_ns(now_ns));
    }

    /// IRQ8: an enabled flag is set; reading register C ends it.
    pub fn irq(&self) -> bool {
        self.state.bytes[REG_B] & self.state.bytes[REG_C] & C_FLAGS != 0
    }

    /// When the line rises. While it is high nothing can happen, so an interrupt that is not served costs nothing.
    pub fn next_event(&self, now_ns: u64) -> Option<u64> {
        let enabled = self.state.bytes[REG_B] & C_FLAGS;
        if enabled == 0 || self.irq() {
            return None;
        }
        let now = clamp_ns(now_ns).max(self.state.seen_ns);
        let due = |flag: u8, next: Option<i64>| next.filter(|_| enabled & flag != 0);
        [
            due(C_PF, self.next_periodic(now)),
            due(C_UF, self.next_update(now)),
            due(C_AF, self.next_alarm(now)),
        ]
        .into_iter()
        .flatten()
        .min()
        .map(|at| at.max(0) as u64)
    }

    /// What must be kept to continue later.
    pub fn save(&self) -> RtcState {
        self.state
    }

    /// Continues from `state`, whatever it holds.
    pub fn restore(&mut self, state: &RtcState) {
        let mut state = *state;
        state.index &= 0x7f;
        state.bytes[REG_A] &= !A_UIP;
        state.bytes[REG_C] &= C_FLAGS;
        state.bytes[REG_D] = D_VRT;
        state.base_ns = state.base_ns.clamp(-SECOND_NS, i64::MAX / 2);
        state.base_s = state.base_s.clamp(MIN_TIME_S, MAX_TIME_S);
        state.seen_ns = state.seen_ns.clamp(0, i64::MAX / 2);
        self.state = state;
    }
}

/// The VM's clock as a signed number, so that a second may have begun before time 0. Stops after 146 years.
fn clamp_ns(now_ns: u64) -> i64 {
    i64::try_from(now_ns).unwrap_or(i64::MAX).min(i64::MAX / 2)
}

fn is_time(index: usize) -> bool {
    matches!(index, SECONDS | MINUTES | HOURS | DAY_OF_WEEK | DAY | MONTH | YEAR)
        || index == usize::from(CENTURY)
}

/// The first second of the day, from `from` on, that fits; `None` in the pattern fits everything.
fn next_match(from: u32, hour: Option<u8>, minute: Option<u8>, second: Option<u8>) -> Option<u32> {
    let fits = |pattern: Option<u8>, value: u32| pattern.is_none_or(|p| u32::from(p) == value);
    for h in (from / 3600..24).filter(|&h| fits(hour, h)) {
        let in_hour = from.saturating_sub(h * 3600);
        for m in (in_hour / 60..60).filter(|&m| fits(minute, m)) {
            let in_minute = in_hour.saturating_sub(m * 60);
            let s = second.map_or(in_minute, u32::from);
            if s >= in_minute {
                return Some(h * 3600 + m * 60 + s);
            }
        }
    }
    None
}

/// Base memory, extended memory up to 64 MiB, RAM from 16 MiB to 4 GiB, RAM above 4 GiB.
fn store_memory_size(bytes: &mut [u8; 128], memory: Memory) {
    const MIB: u64 = 1 << 20;
    const BASE_KIB: u16 = 640;
    let above_1m_kib = (memory.below_4g.saturating_sub(MIB) >> 10).min(0xffff) as u16;
    let above_16m = (memory.below_4g.saturating_sub(16 * MIB) >> 16).min(0xffff) as u16;
    let above_4g = (memory.above_4g >> 16).min(0xff_ffff) as u32;
    bytes[0x15..0x17].copy_from_slice(&BASE_KIB.to_le_bytes());
    bytes[0x17..0x19].copy_from_slice(&above_1m_kib.to_le_bytes());
    bytes[0x30..0x32].copy_from_slice(&above_1m_kib.to_le_bytes());
    bytes[0x34..0x36].copy_from_slice(&above_16m.to_le_bytes());
    bytes[0x5b..0x5e].copy_from_slice(&above_4g.to_le_bytes()[..3]);
}

fn days_in_month(year: i64, month: i64) -> i64 {
    let (next_year, next_month) = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
    days_from_civil(next_year, next_month, 1) - days_from_civil(year, month, 1)
}

/// Days from 1 January 1970 to a date of the Gregorian calendar; years are counted from 1 March.
const fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let since_march = (month + 9) % 12;
    let day_of_year = (153 * since_march + 2) / 5 + day - 1;
    year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + day_of_year - 719_468
}

/// Year, month and day of a number of days since 1 January 1970.
const fn civil_from_days(days: i64) -> (i64, i64, i64) {
    const CYCLE: i64 = 400 * 365 + 97;
    const CENTURY: i64 = 100 * 365 + 24;
    const LEAP_CYCLE: i64 = 4 * 365 + 1;
    let since_march_0 = days + 719_468;
    let mut day = since_march_0.rem_euclid(CYCLE);
    // The last century of a cycle and the last year of four are a day longer: they have no successor.
    let century = if day / CENTURY > 3 { 3 } else { day / CENTURY };
    day -= century * CENTURY;
    let leap_cycle = day / LEAP_CYCLE;
    day -= leap_cycle * LEAP_CYCLE;
    let year_of_four = if day / 365 > 3 { 3 } else { day / 365 };
    day -= year_of_four * 365;
    let year = since_march_0.div_euclid(CYCLE) * 400 + century * 100 + leap_cycle * 4 + year_of_four;
    let since_march = (5 * day + 2) / 153;
    let day_of_month = day - (153 * since_march + 2) / 5 + 1;
    if since_march < 10 {
        (year, since_march + 3, day_of_month)
    } else {
        (year + 1, since_march - 9, day_of_month)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const S: u64 = 1_000_000_000;
    const MEMORY: Memory = Memory { below_4g: 0xc000_0000, above_4g: 5 << 30 };
    /// Saturday, 31 December 2022, 23:59:58.
    const NEW_YEARS_EVE: u64 = 1_672_531_198;

    fn rtc() -> Rtc {
        Rtc::new(NEW_YEARS_EVE, MEMORY, 4)
    }

    fn get(rtc: &mut Rtc, index: usize, now: u64) -> u8 {
        rtc.write(INDEX, 0x80 | index as u8, now);
        rtc.read(DATA, now)
    }

    fn set(rtc: &mut Rtc, index: usize, value: u8, now: u64) {
        rtc.write(INDEX, index as u8, now);
        rtc.write(DATA, value, now);
    }

    /// Century, year, month, day, weekday, hours, minutes, seconds, as bytes.
    fn time(rtc: &mut Rtc, now: u64) -> [u8; 8] {
        [usize::from(CENTURY), YEAR, MONTH, DAY, DAY_OF_WEEK, HOURS, MINUTES, SECONDS]
            .map(|i| get(rtc, i, now))
    }

    #[test]
    fn shows_the_time_and_rolls_over() {
        let mut r = rtc();
        assert_eq!(time(&mut r, 0), [0x20, 0x22, 0x12, 0x31, 7, 0x23, 0x59, 0x58]);
        assert_eq!(time(&mut r, 2 * S - 1), [0x20, 0x22, 0x12, 0x31, 7, 0x23, 0x59, 0x59]);
        assert_eq!(time(&mut r, 2 * S), [0x20, 0x23, 0x01, 0x01, 1, 0x00, 0x00, 0x00]);
        set(&mut r, REG_B, B_BINARY, 2 * S);
        assert_eq!(time(&mut r, 2 * S), [20, 23, 1, 1, 1, 12, 0, 0], "12 AM, binary");
        assert_eq!(get(&mut r, HOURS, 2 * S + 15 * 3600 * S), 3 | HOUR_PM);
        assert_eq!(get(&mut r, REG_D, 0), 0x80);
        assert_eq!(r.read(INDEX, 0), 0xff);
    }

    #[test]
    fn calendar_agrees_with_counting() {
        let (mut year, mut month, mut day) = (1599, 12, 31);
        let start = days_from_civil(year, month, day);
        for days in start..start + 150_000 {
            assert_eq!(civil_from_days(days), (year, month, day));
            assert_eq!(days_from_civil(year, month, day), days);
            let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
            let length =
                [31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31][month as usize - 1];
            assert_eq!(days_in_month(year, month), length);
            day += 1;
            if day > length {
                (month, day) = (month + 1, 1);
            }
            if month > 12 {
                (year, month) = (year + 1, 1);
            }
        }
        assert_eq!(days_from_civil(1970, 1, 1), 0);
    }

    #[test]
    fn uip_covers_the_end_of_each_second() {
        let mut r = rtc();
        assert_eq!(get(&mut r, REG_A, S - 2_228_001), 0x26);
        assert_eq!(get(&mut r, REG_A, S - 2_228_000), 0xa6);
        assert_eq!(get(&mut r, REG_A, S - 1), 0xa6);
        assert_eq!(get(&mut r, REG_A, S), 0x26);
        set(&mut r, REG_B, B_SET | B_24H, S);
        assert_eq!(get(&mut r, REG_A, 2 * S - 1), 0x26, "no update while SET");
    }

    #[test]
    fn setting_the_time_as_linux_does() {
        let mut r = rtc();
        let now = 700_000_000;
        set(&mut r, REG_B, B_SET | B_24H, now);
        set(&mut r, REG_A, 0x76, now); // divider reset
        for (index, value) in
            [(YEAR, 0x24), (MONTH, 0x02), (DAY, 0x29), (HOURS, 0x12), (MINUTES, 0x34), (SECONDS, 0x56)]
        {
            set(&mut r, index, value, now);
        }
        assert_eq!(get(&mut r, SECONDS, now + 5 * S), 0x56, "stands still");
        set(&mut r, REG_B, B_24H, now + 5 * S);
        set(&mut r, REG_A, 0x26, now + 5 * S);
        let start = now + 5 * S;
        assert_eq!(time(&mut r, start + S / 2 - 1), [0x20, 0x24, 0x02, 0x29, 5, 0x12, 0x34, 0x56]);
        assert_eq!(get(&mut r, SECONDS, start + S / 2), 0x57, "the first update comes after half a second");
    }

    #[test]
    fn a_single_byte_can_be_changed_while_running() {
        let mut r = rtc();
        set(&mut r, MINUTES, 0x10, S / 4);
        assert_eq!(time(&mut r, S), [0x20, 0x22, 0x12, 0x31, 7, 0x23, 0x10, 0x59], "the phase is kept");
        set(&mut r, usize::from(CENTURY), 0x19, S);
        assert_eq!(time(&mut r, S), [0x19, 0x22, 0x12, 0x31, 1, 0x23, 0x10, 0x59]);
        set(&mut r, MONTH, 0xee, S);
        set(&mut r, SECONDS, 0x99, S);
        assert_eq!(
            time(&mut r, S),
            [0x19, 0x22, 0x01, 0x31, 3, 0x23, 0x10, 0x59],
            "nonsense is brought into range"
        );
    }

    #[test]
    fn update_ended_interrupt() {
        let mut r = rtc();
        set(&mut r, REG_B, B_24H | B_UIE, 100);
        assert_eq!(r.next_event(100), Some(S));
        r.advance(S - 1);
        assert!(!r.irq());
        r.advance(S);
        assert!(r.irq());
        assert_eq!(r.next_event(S), None, "nothing new until register C is read");
        assert_eq!(get(&mut r, REG_C, S) & (C_IRQF | C_UF | C_AF), C_IRQF | C_UF);
        assert!(!r.irq());
        assert_eq!(get(&mut r, REG_C, S) & C_IRQF, 0);
        assert_eq!(r.next_event(S), Some(2 * S));
        set(&mut r, REG_B, B_24H | B_UIE | B_SET, S);
        assert_eq!(get(&mut r, REG_B, S), B_24H | B_SET, "SET clears UIE");
    }

    #[test]
    fn periodic_interrupt_rates() {
        for (rate, hz) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (13, 8), (15, 2)] {
            let mut r = rtc();
            set(&mut r, REG_A, 0x20 | rate, 0);
            set(&mut r, REG_B, B_24H | C_PF, 0);
            let mut now = 0;
            for _ in 0..hz {
                now = r.next_event(now).unwrap();
                r.advance(now);
                assert!(r.irq());
                assert_eq!(get(&mut r, REG_C, now) & (C_PF | C_IRQF), C_PF | C_IRQF);
            }
            assert_eq!(now, S, "rate {rate}");
        }
        let mut r = rtc();
        set(&mut r, REG_A, 0x20, 0);
        set(&mut r, REG_B, B_24H | C_PF, 0);
        assert_eq!(r.next_event(0), None);
    }

    #[test]
    fn alarm_matches_and_respects_dont_care() {
        let mut r = rtc();
        set(&mut r, HOURS_ALARM, 0x00, 0);
        set(&mut r, MINUTES_ALARM, 0xff, 0);
        set(&mut r, SECONDS_ALARM, 0x05, 0);
        set(&mut r, REG_B, B_24H | C_AF, 0);
        assert_eq!(r.next_event(0), Some(7 * S), "00:00:05, two seconds to midnight");
        r.advance(7 * S);
        assert_eq!(get(&mut r, REG_C, 7 * S) & (C_AF | C_IRQF), C_AF | C_IRQF);
        assert_eq!(r.next_event(7 * S), Some(67 * S), "every minute of that hour");
        let last = (2 + 59 * 60 + 5) * S;
        assert_eq!(r.next_event(last), Some(last + (23 * 3600 + 60) * S), "then tomorrow");
        set(&mut r, SECONDS_ALARM, 0x7a, 8 * S);
        assert_eq!(r.next_event(8 * S), None, "no such second");
    }

    #[test]
    fn memory_sizes_and_checksum() {
        let mut r = rtc();
        let mut word = |index| u16::from_le_bytes([get(&mut r, index, 0), get(&mut r, index + 1, 0)]);
        assert_eq!((word(0x15), word(0x17), word(0x30)), (640, 0xffff, 0xffff));
        assert_eq!(u64::from(word(0x34)) << 16, 0xc000_0000 - (16 << 20));
        assert_eq!((u64::from(word(0x5b)) | u64::from(word(0x5d) & 0xff) << 16) << 16, 5 << 30);
        assert_eq!(word(0x5e) >> 8, 3);
        let sum: u16 = (0x10..=0x2d).map(|i| u16::from(get(&mut r, i, 0))).sum();
        assert_eq!([get(&mut r, 0x2e, 0), get(&mut r, 0x2f, 0)], sum.to_be_bytes());
        let mut small = Rtc::new(0, Memory { below_4g: 1 << 20, above_4g: 0 }, 1);
        assert_eq!((get(&mut small, 0x17, 0), get(&mut small, 0x34, 0)), (0, 0));
        set(&mut small, 0x0f, 0x0a, 0);
        assert_eq!(get(&mut small, 0x0f, 0), 0x0a, "plain memory");
    }

    #[test]
    fn save_restore_continues() {
        let mut r = rtc();
        set(&mut r, REG_B, B_24H | B_UIE, 0);
        let mut other = Rtc::new(0, MEMORY, 1);
        other.restore(&r.save());
        assert_eq!(other.save(), r.save());
        assert_eq!(other.next_event(5), r.next_event(5));
        assert_eq!(time(&mut other, 9 * S), time(&mut r, 9 * S));
    }

    proptest! {
        #[test]
        fn next_match_is_the_first_second_that_fits(
            from in 0..86_400u32, h in prop::option::of(0..24u8), m in prop::option::of(0..60u8),
            s in prop::option::of(0..60u8)
        ) {
            let fits = |at: &u32| {
                h.is_none_or(|h| u32::from(h) == at / 3600)
                    && m.is_none_or(|m| u32::from(m) == at / 60 % 60)
                    && s.is_none_or(|s| u32::from(s) == at % 60)
            };
            prop_assert_eq!(next_match(from, h, m, s), (from..86_400).find(fits));
        }

        #[test]
        fn restored_garbage_and_any_access_is_harmless(
            seed in any::<[u8; 32]>(), base_ns in any::<i64>(), base_s in any::<i64>(), seen_ns in any::<i64>(),
            accesses in prop::collection::vec((any::<bool>(), any::<u8>(), any::<u64>()), 0..60)
        ) {
            let mut bytes = [0; 128];
            bytes[..32].copy_from_slice(&seed);
            let mut r = rtc();
            r.restore(&RtcState { bytes, index: seed[0], base_ns, base_s, seen_ns });
            for (data, value, now) in accesses {
                let port = if data { DATA } else { INDEX };
                r.write(port, value, now);
                r.read(DATA, now);
                r.advance(now);
                r.next_event(now);
            }
        }

        #[test]
        fn written_time_reads_back(
            century in 16..30u8, year in 0..100u8, month in 1..13u8, day in 1..29u8, hour in 0..24u8,
            minute in 0..60u8, second in 0..60u8, b in 0..4u8
        ) {
            let mut r = rtc();
            let mode = b << 1;
            set(&mut r, REG_B, B_SET | mode, 0);
            let hour_byte = r.encode_hour(hour);
            let fields = [
                (usize::from(CENTURY), r.encode(century)), (YEAR, r.encode(year)), (MONTH, r.encode(month)),
                (DAY, r.encode(day)), (HOURS, hour_byte), (MINUTES, r.encode(minute)), (SECONDS, r.encode(second)),
            ];
            for (index, value) in fields {
                set(&mut r, index, value, 0);
            }
            set(&mut r, REG_B, mode, 0);
            for (index, value) in fields {
                prop_assert_eq!(get(&mut r, index, S - 1), value);
            }
        }
    }
}
