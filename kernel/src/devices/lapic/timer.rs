//! The local APIC's timer: a down counter at bus-clock rate behind a divider, or a TSC deadline (Intel SDM vol. 3,
//! 11.5.4). Nothing ticks: the state is the moment at which the counter reaches zero.

/// The shortest interval between two interrupts of a periodic timer. A guest may program periods down to one
/// nanosecond; each interrupt costs the host an exit, so shorter periods lose interrupts instead.
pub const MIN_PERIODIC_INTERVAL_NS: u64 = 200_000;

/// When a local APIC next wants to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// Nanoseconds on the VM's clock.
    Ns(u64),
    /// A value of the guest's TSC.
    Tsc(u64),
}

/// What the counter does at zero: LVT timer register bits 18:17.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TimerMode {
    /// Stays there.
    #[default]
    OneShot,
    /// Reloads the initial count.
    Periodic,
    /// There is no counter but a TSC value to wait for (SDM 11.5.4.1).
    TscDeadline,
    /// The reserved encoding: nothing runs.
    Reserved,
}

impl TimerMode {
    /// Decodes the mode from the LVT timer register.
    #[inline]
    pub const fn from_lvt(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            2 => Self::TscDeadline,
            _ => Self::Reserved,
        }
    }

    const fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// The timer's registers and its deadline. The bus clock is 1 GHz: one tick before the divider is 1 ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timer {
    mode: TimerMode,
    initial: u32,
    /// Divide configuration register; bits 0, 1 and 3.
    divide: u32,
    /// Log2 of the divider.
    shift: u8,
    /// When the counter reaches zero; `None` when it stands still.
    zero_at_ns: Option<u64>,
    /// IA32_TSC_DEADLINE; 0 is disarmed.
    tsc_deadline: u64,
}

/// Bits of the divide configuration register that exist.
pub(super) const DIVIDE_MASK: u32 = 0b1011;

impl Timer {
    /// The state after reset: stopped, divide by two (the register reads 0).
    pub const fn new() -> Self {
        Self { mode: TimerMode::OneShot, initial: 0, divide: 0, shift: 1, zero_at_ns: None, tsc_deadline: 0 }
    }

    /// Makes the invariants hold after a restore from bytes of doubtful origin.
    pub fn sanitize(&mut self) {
        self.divide &= DIVIDE_MASK;
        self.shift = shift_of(self.divide);
        if self.initial == 0 || !self.mode.counts() {
            self.zero_at_ns = None;
        }
        if self.mode != TimerMode::TscDeadline {
            self.tsc_deadline = 0;
        }
    }

    /// When the timer next expires.
    #[inline]
    pub fn next_event(&self) -> Option<Deadline> {
        match self.mode {
            TimerMode::TscDeadline if self.tsc_deadline != 0 => Some(Deadline::Tsc(self.tsc_deadline)),
            _ => self.zero_at_ns.map(Deadline::Ns),
        }
    }

    /// Brings the timer to this moment. Answers whether it expired, however often.
    #[inline]
    pub fn expire(&mut self, now_ns: u64, tsc: u64) -> bool {
        if self.tsc_deadline != 0 {
            if tsc < self.tsc_deadline {
                return false;
            }
            self.tsc_deadline = 0;
            return true;
        }
        match self.zero_at_ns {
            Some(zero) if now_ns >= zero => {
                self.zero_at_ns =
                    if self.mode == TimerMode::Periodic { Some(self.next_zero(zero, now_ns)) } else { None };
                true
            }
            _ => false,
        }
    }

    /// The first reload boundary after `zero` that is past `now_ns` and not too soon.
    fn next_zero(&self, zero: u64, now_ns: u64) -> u64 {
        let period = self.period_ns();
        let pause = if period < MIN_PERIODIC_INTERVAL_NS { MIN_PERIODIC_INTERVAL_NS } else { 1 };
        let earliest = now_ns.saturating_add(pause);
        let next = zero.saturating_add(period);
        if next >= earliest {
            return next;
        }
        // Some boundaries were missed: they make one interrupt.
        let periods = (earliest - zero).div_ceil(period);
        zero.saturating_add(periods.saturating_mul(period))
    }

    /// Length of one round; at least 1, at most 2^39.
    #[inline]
    fn period_ns(&self) -> u64 {
        (u64::from(self.initial) << self.shift).max(1)
    }

    /// Time until the counter reaches zero, 0 when it stands still.
    #[inline]
    fn remaining_ns(&self, now_ns: u64) -> u64 {
        let remaining = self.zero_at_ns.map_or(0, |zero| zero.saturating_sub(now_ns));
        let period = self.period_ns();
        if remaining <= period {
            return remaining;
        }
        // Interrupts are being skipped, but the counter still goes round.
        (remaining - 1) % period + 1
    }

    /// The current-count register. The caller has expired the timer up to `now_ns`.
    #[inline]
    pub fn current_count(&self, now_ns: u64) -> u32 {
        let ticks = (self.remaining_ns(now_ns) + (1 << self.shift) - 1) >> self.shift;
        // At most `initial`, since the remainder is at most one period.
        ticks as u32
    }

    /// The initial-count register.
    #[inline]
    pub const fn initial_count(&self) -> u32 {
        self.initial
    }

    /// Writes the initial count, which starts the counter, or stops it with 0. Ignored in TSC-deadline mode.
    #[inline]
    pub fn set_initial_count(&mut self, count: u32, now_ns: u64) {
        if self.mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = count;
        self.zero_at_ns = (count != 0 && self.mode.counts()).then(|| now_ns.saturating_add(self.period_ns()));
    }

    /// The divide configuration register.
    pub const fn divide(&self) -> u32 {
        self.divide
    }

    /// Writes the divide configuration; a running counter goes on from its present count at the new rate.
    pub fn set_divide(&mut self, value: u32, now_ns: u64) {
        let count = self.current_count(now_ns);
        self.divide = value & DIVIDE_MASK;
        self.shift = shift_of(self.divide);
        if self.zero_at_ns.is_some() {
            self.zero_at_ns = Some(now_ns.saturating_add(u64::from(count) << self.shift));
        }
    }

    /// Follows the LVT's mode. A change between the counter and the TSC deadline disarms both (SDM 11.5.4.1).
    pub fn set_mode(&mut self, mode: TimerMode, now_ns: u64) {
        if mode == self.mode {
            return;
        }
        if self.mode.counts() && mode.counts() {
            if self.zero_at_ns.is_some() {
                self.zero_at_ns = Some(now_ns.saturating_add(self.remaining_ns(now_ns)));
            }
        } else {
            self.initial = 0;
            self.zero_at_ns = None;
            self.tsc_deadline = 0;
        }
        self.mode = mode;
    }

    /// IA32_TSC_DEADLINE: 0 when disarmed and in other modes.
    #[inline]
    pub const fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Writes IA32_TSC_DEADLINE; ignored outside TSC-deadline mode.
    #[inline]
    pub fn set_tsc_deadline(&mut self, deadline: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.tsc_deadline = deadline;
        }
    }
}

/// Log2 of the divider that a divide configuration means: 000 is 2, 110 is 128, 111 is 1 (SDM figure 11-10).
const fn shift_of(divide: u32) -> u8 {
    let code = divide & 3 | divide >> 1 & 4;
    (code as u8 + 1) & 7
}
