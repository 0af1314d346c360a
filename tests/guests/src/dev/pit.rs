//! The 8254 interval timer and its gate at port 0x61. Intel 8254 datasheet.
use crate::cpu::{inb, outb};

/// Input clock in Hz.
pub const HZ: u64 = 1_193_182;

const DATA: u16 = 0x40;
const CONTROL: u16 = 0x43;
const PORT_B: u16 = 0x61;

/// Programs `channel` with `mode` and a 16-bit count (0 means 65536).
pub fn program(channel: u8, mode: u8, count: u16) {
    outb(CONTROL, channel << 6 | 3 << 4 | mode << 1);
    outb(DATA + u16::from(channel), count as u8);
    outb(DATA + u16::from(channel), (count >> 8) as u8);
}

/// Latches and reads the current count.
pub fn read(channel: u8) -> u16 {
    outb(CONTROL, channel << 6);
    let low = inb(DATA + u16::from(channel));
    let high = inb(DATA + u16::from(channel));
    u16::from(low) | u16::from(high) << 8
}

/// Read-back: the status byte of `channel`.
pub fn status(channel: u8) -> u8 {
    outb(CONTROL, 0xe0 | 2 << channel);
    inb(DATA + u16::from(channel))
}

/// Stops channel 0: mode 0 without a count never fires.
pub fn stop() {
    outb(CONTROL, 0x30);
}

/// Sets the gate of channel 2 (port 0x61 bit 0), speaker off.
pub fn gate2(on: bool) {
    outb(PORT_B, inb(PORT_B) & 0x0c | u8::from(on));
}

/// Output of channel 2 (port 0x61 bit 5).
pub fn out2() -> bool {
    inb(PORT_B) & 0x20 != 0
}
