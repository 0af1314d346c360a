//! The host's one-shot timer, armed only when the deadline changes.
use crate::cpu::{interrupts, lapic, tsc};

/// This CPU's timer.
#[derive(Debug)]
pub struct HostTimer {
    /// Deadline that the hardware has; `u64::MAX` if none.
    armed: u64,
}

impl HostTimer {
    /// A timer that is not armed.
    pub const fn new() -> Self {
        Self { armed: u64::MAX }
    }

    /// Makes the timer interrupt at `deadline`, in the host's TSC, or at once if that has passed.
    #[inline]
    pub fn arm(&mut self, deadline: u64) {
        // A deadline that has passed has fired, so the hardware no longer has it.
        if deadline != self.armed || deadline <= tsc::read() {
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
