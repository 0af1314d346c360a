//! The host's one-shot timer, armed only when the deadline changes.
use crate::cpu::{self, interrupts, lapic, tsc};
use core::sync::atomic::Ordering;

/// This CPU's timer.
#[derive(Debug)]
pub struct HostTimer {
    /// Deadline that the hardware has; `u64::MAX` if none.
    armed: u64,
}

impl HostTimer {
    /// A timer that is not armed.
    pub(super) const fn new() -> Self {
        Self { armed: u64::MAX }
    }

    /// Makes the timer interrupt at `deadline`, in the host's TSC, or at once if that has passed.
    #[inline]
    pub fn arm(&mut self, deadline: u64) {
        // The hardware has the deadline no more when it has passed, or when it fired early, as a counter that was
        // calibrated may.
        let fired = cpu::this().timer_fired.swap(false, Ordering::Relaxed);
        if fired || deadline != self.armed || deadline <= tsc::read() {
            lapic::arm(deadline);
            self.armed = deadline;
        }
    }

    /// Halts this CPU until `deadline` or any interrupt.
    pub fn idle_until(&mut self, deadline: u64) {
        self.arm(deadline);
        interrupts::wait();
    }
}
