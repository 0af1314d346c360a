//! A function to run on another CPU: one slot for each CPU.

use crate::sync::IrqMutex;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A function for another CPU and its argument.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// Runs on the other CPU, interrupts off.
    pub run: fn(usize),
    /// What it is given.
    pub arg: usize,
}

/// One CPU's slot.
pub struct Mailbox {
    slot: IrqMutex<Option<Call>>,
    posted: AtomicU64,
    done: AtomicU64,
    /// A call runs. It may not run another, or tickets would be done out of order.
    running: AtomicBool,
}

impl Default for Mailbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Mailbox {
    /// An empty slot.
    pub const fn new() -> Self {
        Self {
            slot: IrqMutex::new(None),
            posted: AtomicU64::new(0),
            done: AtomicU64::new(0),
            running: AtomicBool::new(false),
        }
    }

    /// Puts a call in and returns its ticket; `None` while the last one waits.
    pub fn post(&self, call: Call) -> Option<u64> {
        let mut slot = self.slot.lock();
        if slot.is_some() {
            return None;
        }
        *slot = Some(call);
        Some(self.posted.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Whether the call with this ticket has returned.
    pub fn is_done(&self, ticket: u64) -> bool {
        self.done.load(Ordering::Acquire) >= ticket
    }

    /// Runs the call that waits, if there is one. By the CPU that owns the slot.
    pub fn run(&self) -> bool {
        if self.running.swap(true, Ordering::Acquire) {
            return false;
        }
        // Taken out first, so that the slot is free while the function runs.
        let call = self.slot.lock().take();
        if let Some(call) = call {
            (call.run)(call.arg);
            self.done.fetch_add(1, Ordering::Release);
        }
        self.running.store(false, Ordering::Release);
        call.is_some()
    }
}
