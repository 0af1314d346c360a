//! 8254 programmable interval timer: three 16-bit counters on a 1.193182 MHz clock.
//!
//! Source: Intel 8254 data sheet (231164-005). Channel 0 drives IRQ0, channel 1 once refreshed memory, channel 2
//! drives the speaker and is the only one whose GATE software controls (port 0x61).
//!
//! Nothing ticks here: a counter is the clock pulse at which its count was loaded, and its output and count are
//! closed formulas of the time. A pause of any length costs the same.
//!
//! Catch-up: however many periods passed since channel 0 was last looked at, they make one rising edge of IRQ0.
//! The missed ticks are gone, as they are on hardware when interrupts stay off for more than a period.
//!
//! Defined where the data sheet is silent: count 1 in modes 2 and 3 (illegal there) keeps OUT high; a BCD digit
//! above 9 counts its weight; in mode 4 a strobe ends when GATE falls. A counter that nobody has programmed is
//! idle with OUT high, so a guest that never uses the timer costs no events.

use super::clock;

/// Counter 0's port; 1 and 2 follow.
pub const COUNTER0: u16 = 0x40;
/// Control word register.
pub const CONTROL: u16 = 0x43;

const ACCESS_LSB: u8 = 1;
const ACCESS_MSB: u8 = 2;
const STATUS_OUT: u8 = 1 << 7;
const STATUS_NULL: u8 = 1 << 6;
/// Control word after reset: access LSB then MSB, mode 3, binary.
const RESET_CONTROL: u8 = 0x36;
/// Clock pulses before the VM's reset, so that a load can lie in the past of time 0.
const TICK_BASE: u64 = 1 << 20;
/// No tick of any real time is beyond this.
const TICK_MAX: u64 = TICK_BASE + clock::PIT.ticks(u64::MAX);

fn ticks(now_ns: u64) -> u64 {
    TICK_BASE + clock::PIT.ticks(now_ns)
}

fn ns(tick: u64) -> u64 {
    clock::PIT.ns(tick.saturating_sub(TICK_BASE))
}

/// Output and count that hold until the next load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// OUT.
    pub out: bool,
    /// The counting element as a guest reads it.
    pub count: u16,
}

/// What a counting element does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// Not counting: no count yet, half a count in mode 0, or no trigger yet in modes 1 and 5.
    Idle {
        /// What shows.
        held: Held,
    },
    /// Loaded with `n` at clock pulse `load` (which may be the next one) and counting since.
    Counting {
        /// Clock pulse of the load.
        load: u64,
        /// Count loaded, 1 to 65536.
        n: u32,
        /// What shows before `load`.
        before: Held,
    },
    /// As counting, but GATE is low since `elapsed` pulses after the load.
    Paused {
        /// Clock pulse of the load.
        load: u64,
        /// Count loaded.
        n: u32,
        /// What shows before `load`.
        before: Held,
        /// Pulses counted.
        elapsed: u64,
    },
}

/// One counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterState {
    /// Bits 5 to 0 of the last control word: access, mode, BCD.
    pub control: u8,
    /// Count register.
    pub cr: u16,
    /// A whole count was written since the control word.
    pub cr_valid: bool,
    /// NULL COUNT: what was written last has not reached the counting element.
    pub null: bool,
    /// The count register waits for the end of a period or for a trigger.
    pub reload: bool,
    /// First byte of a two-byte count.
    pub write_low: Option<u8>,
    /// The next read of a two-byte count is its high byte.
    pub read_high: bool,
    /// Latched count.
    pub count_latch: Option<u16>,
    /// Latched status.
    pub status_latch: Option<u8>,
    /// GATE input.
    pub gate: bool,
    /// The counting element.
    pub run: Run,
    /// The clock pulse up to which rising edges of OUT are accounted for.
    pub seen: u64,
}

impl CounterState {
    const fn new(gate: bool) -> Self {
        Self {
            control: RESET_CONTROL,
            cr: 0,
            cr_valid: false,
            null: true,
            reload: false,
            write_low: None,
            read_high: false,
            count_latch: None,
            status_latch: None,
            gate,
            run: Run::Idle { held: Held { out: true, count: 0 } },
            seen: TICK_BASE,
        }
    }

    /// Mode 0 to 5; modes 6 and 7 are 2 and 3.
    const fn mode(&self) -> u8 {
        let mode = (self.control >> 1) & 7;
        if mode > 5 {
            mode - 4
        } else {
            mode
        }
    }

    const fn is_bcd(&self) -> bool {
        self.control & 1 != 0
    }

    /// Modes 2 and 3: a new count waits for the end of the (half) period.
    const fn is_periodic(&self) -> bool {
        matches!(self.mode(), 2 | 3)
    }

    /// Modes 1 and 5: a rising GATE starts the count.
    const fn is_triggered(&self) -> bool {
        matches!(self.mode(), 1 | 5)
    }

    /// How many values the counting element takes before it wraps.
    const fn wrap(&self) -> u32 {
        if self.is_bcd() {
            10_000
        } else {
            0x1_0000
        }
    }

    /// The count that the count register stands for: 0 is the largest.
    fn count(&self) -> u32 {
        let cr = u32::from(self.cr);
        let n = if self.is_bcd() {
            (cr & 15) + ((cr >> 4) & 15) * 10 + ((cr >> 8) & 15) * 100 + (cr >> 12) * 1000
        } else {
            cr
        };
        if n == 0 {
            self.wrap()
        } else {
            n
        }
    }

    /// A value of the counting element as it is read.
    fn encode(&self, value: u32) -> u16 {
        let value = value % self.wrap();
        let encoded = if self.is_bcd() {
            (value % 10) | ((value / 10 % 10) << 4) | ((value / 100 % 10) << 8) | ((value / 1000) << 12)
        } else {
            value
        };
        encoded as u16
    }

    /// OUT, `elapsed` pulses after a load with `n`.
    fn out_after(&self, n: u32, elapsed: u64) -> bool {
        let n = u64::from(n);
        match self.mode() {
            0 | 1 => elapsed >= n,
            2 => n == 1 || elapsed % n != n - 1,
            3 => elapsed % n < n.div_ceil(2),
            _ => elapsed != n,
        }
    }

    /// The counting element, `elapsed` pulses after a load with `n`.
    fn count_after(&self, n: u32, elapsed: u64) -> u16 {
        let period = (elapsed % u64::from(n)) as u32;
        let value = match self.mode() {
            2 => n - period,
            3 => {
                // Counts down by two from the even part of n, once per half period.
                let half = n.div_ceil(2);
                (n & !1) - 2 * if period < half { period } else { period - half }
            }
            _ => {
                let wrap = u64::from(self.wrap());
                ((u64::from(n) + wrap - elapsed % wrap) % wrap) as u32
            }
        };
        self.encode(value)
    }

    fn out(&self, tick: u64) -> bool {
        match self.run {
            Run::Idle { held } => held.out,
            Run::Counting { load, before, .. } if tick < load => before.out,
            Run::Counting { load, n, .. } => self.out_after(n, tick - load),
            Run::Paused { .. } if self.is_periodic() => true,
            Run::Paused { load, before, .. } if tick < load => before.out,
            Run::Paused { n, elapsed, .. } => self.out_after(n, elapsed),
        }
    }

    fn counting_element(&self, tick: u64) -> u16 {
        match self.run {
            Run::Idle { held } => held.count,
            Run::Counting { load, before, .. } | Run::Paused { load, before, .. } if tick < load => {
                before.count
            }
            Run::Counting { load, n, .. } => self.count_after(n, tick - load),
            Run::Paused { n, elapsed, .. } => self.count_after(n, elapsed),
        }
    }

    fn held(&self, tick: u64) -> Held {
        Held { out: self.out(tick), count: self.counting_element(tick) }
    }

    /// The first pulse after `tick` at which OUT rises, as long as nobody touches the counter and no count waits.
    fn next_rise(&self, tick: u64) -> Option<u64> {
        let Run::Counting { load, n, before } = self.run else { return None };
        if tick < load && !before.out && self.out_after(n, 0) {
            return Some(load);
        }
        let elapsed = tick.saturating_sub(load);
        let n = u64::from(n);
        let rise = match self.mode() {
            2 | 3 if n == 1 => return None,
            2 | 3 => (elapsed / n + 1) * n,
            0 | 1 => n,
            _ => n + 1,
        };
        (rise > elapsed).then_some(load + rise)
    }

    /// The pulse after `tick` at which a waiting count is loaded without a trigger.
    fn next_load(&self, tick: u64) -> Option<u64> {
        let Run::Counting { load, n, .. } = self.run else { return None };
        if !self.reload || !self.is_periodic() {
            return None;
        }
        let elapsed = tick.saturating_sub(load);
        let n = u64::from(n);
        let period = elapsed / n * n;
        let half = n.div_ceil(2);
        Some(load + if self.mode() == 3 && elapsed - period < half { period + half } else { period + n })
    }

    /// Brings the counter to `tick`; true if OUT rose on the way.
    fn sync(&mut self, tick: u64) -> bool {
        let tick = tick.max(self.seen);
        let mut rose = false;
        if let Some(end) = self.next_load(self.seen).filter(|&end| end <= tick) {
            rose = self.next_rise(self.seen).is_some_and(|rise| rise <= end);
            self.load_at_end(end);
            self.seen = end;
        }
        rose |= self.next_rise(self.seen).is_some_and(|rise| rise <= tick);
        self.seen = tick;
        if let Run::Counting { load, .. } | Run::Paused { load, .. } = self.run {
            self.null &= tick < load || self.reload;
        }
        rose
    }

    /// Loads the waiting count at `end`, where a period (mode 2) or half of one (mode 3) has ended.
    fn load_at_end(&mut self, end: u64) {
        let Run::Counting { load, n: old, before } = self.run else { return };
        let n = self.count();
        // A low half that begins is the tail of a period whose high half would have been of the new length.
        let high_half =
            if (end - load).is_multiple_of(u64::from(old)) { 0 } else { u64::from(n.div_ceil(2)) };
        self.run = Run::Counting { load: end.saturating_sub(high_half), n, before };
        self.reload = false;
    }

    /// Loads the count register at the next pulse.
    fn start(&mut self, tick: u64, before: Held) {
        let (load, n) = (tick + 1, self.count());
        self.reload = false;
        self.run = if self.gate || self.is_triggered() {
            Run::Counting { load, n, before }
        } else {
            Run::Paused { load, n, before, elapsed: 0 }
        };
    }

    fn write_control(&mut self, control: u8, tick: u64) {
        let count = self.counting_element(tick);
        self.control = control & 0x3f;
        let out = self.mode() != 0;
        *self = Self {
            control: self.control,
            cr: self.cr,
            run: Run::Idle { held: Held { out, count } },
            seen: self.seen,
            ..Self::new(self.gate)
        };
    }

    fn write_count(&mut self, value: u8, tick: u64) {
        self.cr = match ((self.control >> 4) & 3, self.write_low.take()) {
            (ACCESS_LSB, _) => value.into(),
            (ACCESS_MSB, _) => u16::from(value) << 8,
            (_, Some(low)) => u16::from_le_bytes([low, value]),
            (_, None) => {
                self.write_low = Some(value);
                if self.mode() == 0 {
                    let held = Held { out: false, ..self.held(tick) };
                    self.run = Run::Idle { held };
                }
                return;
            }
        };
        self.cr_valid = true;
        self.null = true;
        let held = self.held(tick);
        match self.mode() {
            0 => self.start(tick, Held { out: false, ..held }),
            4 => self.start(tick, held),
            _ => {
                let (count, periodic) = (self.count(), self.is_periodic());
                match &mut self.run {
                    // The load that is due at the next pulse takes the newest count.
                    Run::Counting { load, n, .. } | Run::Paused { load, n, .. } if tick < *load => *n = count,
                    Run::Idle { .. } if periodic => self.start(tick, held),
                    Run::Idle { .. } => {}
                    _ => self.reload = true,
                }
            }
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.status_latch.take() {
            return status;
        }
        let [low, high] = self.count_latch.unwrap_or_else(|| self.counting_element(tick)).to_le_bytes();
        match (self.control >> 4) & 3 {
            ACCESS_LSB => {
                self.count_latch = None;
                low
            }
            ACCESS_MSB => {
                self.count_latch = None;
                high
            }
            _ if self.read_high => {
                self.read_high = false;
                self.count_latch = None;
                high
            }
            _ => {
                self.read_high = true;
                low
            }
        }
    }

    fn latch_count(&mut self, tick: u64) {
        if self.count_latch.is_none() {
            self.count_latch = Some(self.counting_element(tick));
        }
    }

    fn latch_status(&mut self, tick: u64) {
        if self.status_latch.is_none() {
            let out = if self.out(tick) { STATUS_OUT } else { 0 };
            let null = if self.null { STATUS_NULL } else { 0 };
            self.status_latch = Some(out | null | self.control);
        }
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode(), gate) {
            (1 | 5, true) => {
                if self.cr_valid {
                    self.start(tick, self.held(tick));
                }
            }
            (1 | 5, false) => {}
            (_, true) => self.resume(tick),
            (_, false) => self.pause(tick),
        }
    }

    fn pause(&mut self, tick: u64) {
        let Run::Counting { load, n, before } = self.run else { return };
        let mut elapsed = tick.saturating_sub(load);
        if self.mode() == 4 && elapsed == u64::from(n) {
            // The strobe does not wait for GATE; one wrap later the count is the same and the strobe over.
            elapsed += u64::from(self.wrap());
        }
        self.run = Run::Paused { load, n, before, elapsed };
    }

    fn resume(&mut self, tick: u64) {
        let Run::Paused { load, n, before, elapsed } = self.run else { return };
        if self.is_periodic() {
            self.start(tick, self.held(tick));
        } else {
            let load = if tick < load { load } else { tick.saturating_sub(elapsed) };
            self.run = Run::Counting { load, n, before };
        }
    }

    /// A state that some stranger filled in, made one whose arithmetic cannot overflow.
    fn sanitized(mut self) -> Self {
        self.control &= 0x3f;
        self.seen = self.seen.clamp(TICK_BASE, TICK_MAX);
        let max_load = self.seen + 1;
        match &mut self.run {
            Run::Idle { .. } => {}
            Run::Counting { load, n, .. } => {
                *load = (*load).min(max_load);
                *n = (*n).clamp(1, 0x1_0000);
            }
            Run::Paused { load, n, elapsed, .. } => {
                *load = (*load).min(max_load);
                *n = (*n).clamp(1, 0x1_0000);
                *elapsed = (*elapsed).min(self.seen);
            }
        }
        self
    }
}

/// Everything the timer remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PitState {
    /// The three counters.
    pub counters: [CounterState; 3],
}

/// The timer.
#[derive(Clone, Debug)]
pub struct Pit {
    counters: [CounterState; 3],
    /// Channel 0's OUT rose and nobody has asked yet.
    rose: bool,
    /// Channel 0's OUT when last looked at.
    irq: bool,
}

impl Pit {
    /// Three idle counters, GATE of channel 2 low.
    pub const fn new() -> Self {
        let counters = [CounterState::new(true), CounterState::new(true), CounterState::new(false)];
        Self { counters, rose: false, irq: true }
    }

    /// Reads port 0x40 to 0x43. The control register cannot be read: all ones.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        let index = usize::from(port.wrapping_sub(COUNTER0));
        if index > 2 {
            return 0xff;
        }
        let tick = self.sync(index, now_ns);
        self.counters[index].read(tick)
    }

    /// Writes port 0x40 to 0x43.
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        if port == CONTROL {
            self.write_control(value, now_ns);
        } else if let index @ 0..=2 = usize::from(port.wrapping_sub(COUNTER0)) {
            let tick = self.sync(index, now_ns);
            self.counters[index].write_count(value, tick);
            self.note_irq();
        }
    }

    fn write_control(&mut self, value: u8, now_ns: u64) {
        let index = usize::from(value >> 6);
        if index == 3 {
            // Read-back: bits 5 and 4 low ask for count and status, bits 3 to 1 choose counters.
            for index in (0..3).filter(|i| value & (2 << i) != 0) {
                let tick = self.sync(index, now_ns);
                if value & 0x20 == 0 {
                    self.counters[index].latch_count(tick);
                }
                if value & 0x10 == 0 {
                    self.counters[index].latch_status(tick);
                }
            }
            return;
        }
        let tick = self.sync(index, now_ns);
        if value & 0x30 == 0 {
            self.counters[index].latch_count(tick);
        } else {
            self.counters[index].write_control(value, tick);
            self.note_irq();
        }
    }

    /// Drives channel 2's GATE.
    pub fn set_gate2(&mut self, gate: bool, now_ns: u64) {
        let tick = self.sync(2, now_ns);
        self.counters[2].set_gate(gate, tick);
    }

    /// Channel 2's OUT.
    pub fn out2(&mut self, now_ns: u64) -> bool {
        let tick = self.sync(2, now_ns);
        self.counters[2].out(tick)
    }

    /// Brings channel 0 up to date.
    pub fn advance(&mut self, now_ns: u64) {
        self.sync(0, now_ns);
    }

    fn sync(&mut self, index: usize, now_ns: u64) -> u64 {
        let rose = self.counters[index].sync(ticks(now_ns));
        // Time that seems to go backwards stands still.
        let tick = self.counters[index].seen;
        if index == 0 {
            self.rose |= rose;
            self.irq = self.counters[0].out(tick);
        }
        tick
    }

    /// After a write: channel 0's OUT may have changed at once.
    fn note_irq(&mut self) {
        let out = self.counters[0].out(self.counters[0].seen);
        self.rose |= out && !self.irq;
        self.irq = out;
    }

    /// IRQ0: channel 0's OUT when last brought up to date.
    pub fn irq(&self) -> bool {
        self.irq
    }

    /// Whether IRQ0 rose since the last call, be it for ever so short: at most one edge is kept.
    pub fn take_edge(&mut self) -> bool {
        core::mem::take(&mut self.rose)
    }

    /// When IRQ0 rises next, or when that has to be worked out anew.
    pub fn next_event(&self) -> Option<u64> {
        let counter = &self.counters[0];
        let tick = match (counter.next_rise(counter.seen), counter.next_load(counter.seen)) {
            (Some(rise), Some(load)) => rise.min(load),
            (rise, load) => rise.or(load)?,
        };
        Some(ns(tick))
    }

    /// What must be kept to continue later.
    pub fn save(&self) -> PitState {
        PitState { counters: self.counters }
    }

    /// Continues from `state`, whatever it holds.
    pub fn restore(&mut self, state: &PitState) {
        self.counters = state.counters.map(CounterState::sanitized);
        self.rose = false;
        self.irq = self.counters[0].out(self.counters[0].seen);
    }
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The middle of clock pulse `tick`, counted from time 0.
    fn at(tick: u64) -> u64 {
        clock::PIT.ns(tick) + 100
    }

    fn program(pit: &mut Pit, channel: u16, control: u8, count: u16, now: u64) {
        pit.write(CONTROL, (channel as u8) << 6 | 0x30 | control, now);
        pit.write(COUNTER0 + channel, count as u8, now);
        pit.write(COUNTER0 + channel, (count >> 8) as u8, now);
    }

    fn latched(pit: &mut Pit, channel: u16, now: u64) -> u16 {
        pit.write(CONTROL, (channel as u8) << 6, now);
        let low = pit.read(COUNTER0 + channel, now);
        u16::from_le_bytes([low, pit.read(COUNTER0 + channel, now)])
    }

    #[test]
    fn idle_until_programmed() {
        let mut pit = Pit::new();
        pit.advance(u64::MAX);
        assert_eq!(pit.next_event(), None);
        assert!(!pit.take_edge());
        assert_eq!(pit.read(CONTROL, 0), 0xff);
    }

    #[test]
    fn linux_periodic_tick() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x04, 4772, at(0)); // HZ=250, mode 2
        assert!(!pit.take_edge());
        for period in 1..=1000 {
            let event = pit.next_event().unwrap();
            assert_eq!(event, clock::PIT.ns(1 + 4772 * period));
            pit.advance(event - 1);
            assert!(!pit.take_edge());
            pit.advance(event);
            assert!(pit.take_edge() && !pit.take_edge());
        }
    }

    #[test]
    fn a_long_pause_makes_one_edge() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x06, 2, at(0));
        pit.advance(u64::MAX / 2);
        assert!(pit.take_edge() && !pit.take_edge());
        assert!(pit.next_event().unwrap() > u64::MAX / 2);
    }

    #[test]
    fn one_shot_mode0_fires_once() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x00, 100, at(0));
        assert!(!pit.irq());
        assert_eq!(pit.next_event(), Some(clock::PIT.ns(101)));
        pit.advance(at(101));
        assert!(pit.irq() && pit.take_edge());
        assert_eq!(pit.next_event(), None);
        assert_eq!(latched(&mut pit, 0, at(102)), 0xffff, "wraps and goes on");
    }

    #[test]
    fn calibration_through_channel_2() {
        // Linux: gate on, mode 0, count, then poll OUT2.
        let mut pit = Pit::new();
        pit.set_gate2(true, at(0));
        program(&mut pit, 2, 0x00, 11931, at(0));
        assert!(!pit.out2(at(11931)));
        assert!(pit.out2(at(11932)));
        // quick_pit_calibrate reads the MSB of a free-running count.
        program(&mut pit, 2, 0x00, 0xffff, at(20_000));
        assert_eq!(latched(&mut pit, 2, at(20_001 + 0x1ff)), 0xfe00);
    }

    #[test]
    fn latches_hold_and_read_back_latches_both() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x04, 1000, at(0));
        pit.write(CONTROL, 0xc2, at(1)); // status and count of channel 0
        pit.write(CONTROL, 0xd2, at(700)); // count again: ignored, still latched
        assert_eq!(pit.read(COUNTER0, at(800)), 0xb4, "OUT, loaded, both bytes, mode 2, binary");
        assert_eq!(pit.read(COUNTER0, at(801)), (1000u16 & 0xff) as u8);
        assert_eq!(pit.read(COUNTER0, at(802)), (1000u16 >> 8) as u8);
        assert_eq!(latched(&mut pit, 0, at(1001)), 1000);
        assert_eq!(latched(&mut pit, 0, at(1000)), 1000, "time that goes backwards stands still");
    }

    #[test]
    fn single_byte_access_and_null_count() {
        let mut pit = Pit::new();
        pit.write(CONTROL, 0x14, at(0)); // channel 0, LSB, mode 2
        pit.write(COUNTER0, 50, at(0));
        pit.write(CONTROL, 0xe2, at(0));
        assert_eq!(pit.read(COUNTER0, at(0)), 0xd4, "null count until the next clock pulse");
        assert_eq!(pit.read(COUNTER0, at(1)), 50);
        pit.write(CONTROL, 0x24, at(2)); // MSB only
        pit.write(COUNTER0, 1, at(2));
        assert_eq!(pit.read(COUNTER0, at(3)), 1);
        assert_eq!(pit.read(COUNTER0, at(4)), 0);
    }

    #[test]
    fn save_restore_continues() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 0x04, 1000, at(0));
        pit.advance(at(500));
        let mut other = Pit::new();
        other.restore(&pit.save());
        assert_eq!(other.save(), pit.save());
        assert_eq!(other.next_event(), pit.next_event());
        assert_eq!(latched(&mut other, 0, at(600)), latched(&mut pit, 0, at(600)));
    }

    /// The counter of the data sheet, clocked pulse by pulse.
    #[derive(Clone, Debug)]
    struct Model {
        mode: u8,
        bcd: bool,
        cr: Option<u32>,
        low: Option<u8>,
        gate: bool,
        ce: u32,
        out: bool,
        /// A load happens at the next pulse.
        load: bool,
        /// The count register holds what was not loaded yet.
        null: bool,
        counting: bool,
        /// The end of the count has been signalled (modes 0, 1, 4, 5).
        done: bool,
        /// A strobe is being given.
        strobe: bool,
        /// The count loaded is odd (mode 3) or its value.
        n: u32,
        left: u32,
        /// What a control word found in the counting element stays readable until the next load.
        shown: Option<u16>,
    }

    impl Model {
        fn wrap(&self) -> u32 {
            if self.bcd {
                10_000
            } else {
                65_536
            }
        }

        fn control(&mut self, mode: u8, bcd: bool) {
            let shown = Some(self.read());
            *self = Model { mode, bcd, gate: self.gate, shown, out: mode != 0, ..Model::new() };
        }

        fn new() -> Self {
            Model {
                mode: 3,
                bcd: false,
                cr: None,
                low: None,
                gate: false,
                ce: 0,
                out: true,
                load: false,
                null: true,
                counting: false,
                done: false,
                strobe: false,
                n: 0,
                left: 0,
                shown: None,
            }
        }

        fn write(&mut self, byte: u8) {
            let Some(low) = self.low.take() else {
                self.low = Some(byte);
                if self.mode == 0 {
                    self.out = false;
                    self.counting = false;
                    self.load = false;
                }
                return;
            };
            let raw = u32::from(u16::from_le_bytes([low, byte]));
            let first = self.cr.is_none();
            let n = if self.bcd {
                (0..4).map(|digit| (raw >> (4 * digit) & 15) * 10u32.pow(digit)).sum()
            } else {
                raw
            };
            self.cr = Some(if n == 0 { self.wrap() } else { n });
            self.null = true;
            match self.mode {
                0 => {
                    self.out = false;
                    self.load = true;
                }
                4 => self.load = true,
                2 | 3 if first => self.load = true,
                _ => {}
            }
        }

        fn set_gate(&mut self, gate: bool) {
            let rising = gate && !self.gate;
            self.gate = gate;
            match self.mode {
                1 | 5 if rising && self.cr.is_some() => self.load = true,
                2 | 3 if rising && self.cr.is_some() => self.load = true,
                2 | 3 if !gate => self.out = true,
                _ => {}
            }
        }

        fn load_now(&mut self) {
            let n = self.cr.unwrap();
            self.null = false;
            self.shown = None;
            self.n = n;
            self.ce = if self.mode == 3 { n & !1 } else { n } % self.wrap();
            self.counting = true;
            self.done = false;
        }

        /// Pulses of the half period that begins (mode 3).
        fn begin_half(&mut self) {
            self.left = if self.out { self.n.div_ceil(2) } else { self.n / 2 };
            if self.left == 0 {
                self.out = true;
                self.left = 1;
            }
        }

        fn clock(&mut self) {
            if self.strobe {
                self.strobe = false;
                self.out = true;
            }
            if self.load {
                self.load = false;
                self.load_now();
                match self.mode {
                    1 => self.out = false,
                    2 => self.left = self.n,
                    3 => {
                        self.out = true;
                        self.begin_half();
                    }
                    _ => {}
                }
                return;
            }
            if !self.counting || (!self.gate && !matches!(self.mode, 1 | 5)) {
                return;
            }
            match self.mode {
                2 => {
                    self.left -= 1;
                    if self.left == 0 {
                        self.load_now();
                        self.left = self.n;
                    }
                    self.ce = self.left % self.wrap();
                    self.out = self.left != 1 || self.n == 1;
                }
                3 => {
                    self.left -= 1;
                    self.ce = (self.ce + self.wrap() - 2) % self.wrap();
                    if self.left == 0 {
                        self.out = !self.out || self.n == 1;
                        self.load_now();
                        self.begin_half();
                    }
                }
                _ => {
                    self.ce = (self.ce % self.wrap() + self.wrap() - 1) % self.wrap();
                    // A count beyond the wrap (invalid BCD) reaches its end later than zero.
                    self.n = self.n.saturating_sub(1);
                    if self.n == 0 && !self.done {
                        self.done = true;
                        if self.mode >= 4 {
                            self.out = false;
                            self.strobe = true;
                        } else {
                            self.out = true;
                        }
                    }
                }
            }
        }

        fn read(&self) -> u16 {
            if let Some(shown) = self.shown {
                shown
            } else if self.bcd {
                let v = self.ce;
                ((v % 10) | ((v / 10 % 10) << 4) | ((v / 100 % 10) << 8) | ((v / 1000 % 10) << 12)) as u16
            } else {
                self.ce as u16
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Control(u8, bool),
        Write(u8),
        Count(u16),
        Gate(bool),
        Clock(u32),
    }

    fn op() -> impl Strategy<Value = Op> {
        let count = prop_oneof![6 => 1..40u16, 1 => Just(0), 1 => any::<u16>()];
        let clocks = prop_oneof![8 => 1..50u32, 1 => 9_000..70_000u32];
        prop_oneof![
            2 => (0..6u8, any::<bool>()).prop_map(|(mode, bcd)| Op::Control(mode, bcd)),
            1 => (0..4u8).prop_map(Op::Write),
            4 => count.prop_map(Op::Count),
            3 => any::<bool>().prop_map(Op::Gate),
            8 => clocks.prop_map(Op::Clock),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn agrees_with_the_clocked_model(ops in prop::collection::vec(op(), 1..40)) {
            // Channel 2 for the gate, channel 0 (gate always high) beside it for edges and events.
            let mut pit = Pit::new();
            let mut gated = Model::new();
            let mut free = Model { gate: true, ..Model::new() };
            let mut tick = 0u64;
            for op in ops {
                let now = at(tick);
                match op {
                    Op::Control(mode, bcd) => {
                        let control = 0x30 | mode << 1 | u8::from(bcd);
                        pit.write(CONTROL, 0x80 | control, now);
                        let before = free.out;
                        pit.write(CONTROL, control, now);
                        gated.control(mode, bcd);
                        free.control(mode, bcd);
                        prop_assert_eq!(pit.take_edge(), free.out && !before);
                    }
                    Op::Write(byte) => {
                        for (channel, model) in [(2, &mut gated), (0, &mut free)] {
                            pit.write(COUNTER0 + channel, byte, now);
                            model.write(byte);
                        }
                    }
                    Op::Count(count) => {
                        for (channel, model) in [(2, &mut gated), (0, &mut free)] {
                            for byte in count.to_le_bytes() {
                                pit.write(COUNTER0 + channel, byte, now);
                                model.write(byte);
                            }
                        }
                    }
                    Op::Gate(gate) => {
                        pit.set_gate2(gate, now);
                        gated.set_gate(gate);
                    }
                    Op::Clock(pulses) => {
                        // Follow the promised events; no edge may come before one.
                        let end = tick + u64::from(pulses);
                        let event = pit.next_event();
                        let mut rose_at = None;
                        while tick < end {
                            gated.clock();
                            let before = free.out;
                            free.clock();
                            tick += 1;
                            if free.out && !before && rose_at.is_none() {
                                rose_at = Some(tick);
                            }
                        }
                        if let Some(rose_at) = rose_at {
                            prop_assert!(event.is_some_and(|ns| ns <= clock::PIT.ns(rose_at)));
                        }
                        pit.advance(at(tick));
                        prop_assert_eq!(pit.take_edge(), rose_at.is_some());
                    }
                }
                let now = at(tick);
                for (channel, model) in [(2u16, &gated), (0, &free)] {
                    prop_assert_eq!(latched_fresh(&pit, channel, now), model.read(), "count of {}", channel);
                    let (out, null) = status(&pit, channel, now);
                    prop_assert_eq!(null, model.null, "null count of {}", channel);
                    // The one liberty: a mode 4 strobe may end with GATE instead of with the clock pulse.
                    if !(model.mode == 4 && model.strobe && !model.gate) {
                        prop_assert_eq!(out, model.out, "OUT of {}", channel);
                    }
                }
            }
        }

        #[test]
        fn restored_garbage_is_harmless(
            control in any::<u8>(), cr in any::<u16>(), load in any::<u64>(), n in any::<u32>(),
            elapsed in any::<u64>(), seen in any::<u64>(), flags in any::<u8>(), now in any::<u64>()
        ) {
            let before = Held { out: flags & 1 != 0, count: cr };
            let run = if flags & 2 != 0 {
                Run::Counting { load, n, before }
            } else {
                Run::Paused { load, n, before, elapsed }
            };
            let gate = flags & 4 != 0;
            let reload = flags & 8 != 0;
            let state = CounterState { control, cr, run, seen, gate, reload, cr_valid: true, ..CounterState::new(gate) };
            let mut pit = Pit::new();
            pit.restore(&PitState { counters: [state; 3] });
            for now in [now, now.saturating_add(1_000_000), u64::MAX] {
                pit.advance(now);
                pit.next_event();
                pit.out2(now);
                pit.set_gate2(!gate, now);
                pit.set_gate2(gate, now);
                pit.read(COUNTER0, now);
                pit.write(CONTROL, 0xc0, now);
                pit.write(COUNTER0, 7, now);
                pit.write(COUNTER0, 0, now);
            }
        }
    }

    /// Reads a count through a copy, so that half-read or half-written state is not disturbed.
    fn latched_fresh(pit: &Pit, channel: u16, now: u64) -> u16 {
        let mut pit = pit.clone();
        pit.counters[usize::from(channel)].read_high = false;
        latched(&mut pit, channel, now)
    }

    fn status(pit: &Pit, channel: u16, now: u64) -> (bool, bool) {
        let mut pit = pit.clone();
        pit.write(CONTROL, 0xe0 | 2 << channel, now);
        let status = pit.read(COUNTER0 + channel, now);
        (status & STATUS_OUT != 0, status & STATUS_NULL != 0)
    }
}
