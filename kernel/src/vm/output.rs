//! What a VM writes to COM1 on its way to the console.
//!
//! The VM with the focus writes to the console as it comes. What the others write is kept until a line is complete
//! and then shown as one line that names its VM.

use crate::console;
use alloc::string::String;
use arrayvec::ArrayVec;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Mutex;

/// Longest line of a VM without the focus; longer ones are shown in parts.
const LINE_BYTES: usize = 240;

/// COM1's way to the console.
pub struct Output {
    name: String,
    connected: bool,
    focused: AtomicBool,
    line: Mutex<ArrayVec<u8, LINE_BYTES>>,
}

impl Output {
    /// Output of the VM `name`, which goes nowhere unless `connected`.
    pub fn new(name: &str, connected: bool) -> Self {
        Self {
            name: name.into(),
            connected,
            focused: AtomicBool::new(false),
            line: Mutex::new(ArrayVec::new()),
        }
    }

    /// The guest wrote a byte.
    #[inline]
    pub fn put(&self, byte: u8) {
        if self.focused.load(Ordering::Relaxed) {
            console::write_bytes(&[byte]);
        } else if self.connected {
            self.keep(byte);
        }
    }

    fn keep(&self, byte: u8) {
        let mut line = self.line.lock();
        match byte {
            b'\n' => self.show(&mut line),
            b'\r' => {}
            _ => {
                if line.try_push(byte).is_err() {
                    self.show(&mut line);
                    line.push(byte);
                }
            }
        }
    }

    fn show(&self, line: &mut ArrayVec<u8, LINE_BYTES>) {
        console::write_line(&[b"[", self.name.as_bytes(), b"] ", line]);
        line.clear();
    }

    /// Gives the VM the focus or takes it away.
    pub fn set_focus(&self, focused: bool) {
        if focused {
            self.flush();
        }
        self.focused.store(focused && self.connected, Ordering::Relaxed);
    }

    /// Shows what is kept of an incomplete line.
    pub fn flush(&self) {
        let mut line = self.line.lock();
        if !line.is_empty() {
            self.show(&mut line);
        }
    }
}
