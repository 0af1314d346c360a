//! The serial port as the entry stub left it: enough to say why the kernel never started.
use core::arch::asm;
use core::fmt;

const DATA: u16 = 0x3f8;
const LINE_STATUS: u16 = DATA + 5;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// A character takes 87 µs at 115200 baud, a port read about one: give up long after, for a port that is stuck.
const POLLS: u32 = 0x4000;

/// COM1, initialised by the stub.
pub(super) struct Com1;

impl fmt::Write for Com1 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                put(b'\r');
            }
            put(byte);
        }
        Ok(())
    }
}

fn put(byte: u8) {
    for _ in 0..POLLS {
        let status: u8;
        // SAFETY: reads the 16550's line status, which has no side effect on memory.
        unsafe { asm!("in al, dx", out("al") status, in("dx") LINE_STATUS, options(nomem, nostack)) };
        if status & TRANSMITTER_EMPTY != 0 {
            break;
        }
    }
    // SAFETY: hands one byte to the 16550's transmitter.
    unsafe { asm!("out dx, al", in("al") byte, in("dx") DATA, options(nomem, nostack)) };
}
