//! The MC146818 real-time clock and CMOS memory. Motorola MC146818A datasheet.
use crate::cpu::{inb, outb, wait_until};

/// Register A: divider, rate, update in progress.
pub const A: u8 = 0x0a;
/// Register B: interrupt enables, format.
pub const B: u8 = 0x0b;
/// Register C: interrupt flags; reading clears them.
pub const C: u8 = 0x0c;
/// Register D: valid.
pub const D: u8 = 0x0d;

/// Reads a register.
pub fn read(index: u8) -> u8 {
    outb(0x70, index);
    inb(0x71)
}

/// Writes a register.
pub fn write(index: u8, value: u8) {
    outb(0x70, index);
    outb(0x71, value);
}

/// Whether an update is in progress.
pub fn updating() -> bool {
    read(A) & 0x80 != 0
}

/// Seconds of the day, read consistently; `None` when the clock never settles.
pub fn seconds_of_day() -> Option<u32> {
    for _ in 0..10 {
        if !wait_until(10_000_000_000, || !updating()) {
            return None;
        }
        let sample = || [read(0), read(2), read(4)];
        let first = sample();
        if first == sample() && !updating() {
            let b = read(B);
            let number = |raw: u8| u32::from(if b & 4 != 0 { raw } else { (raw >> 4) * 10 + (raw & 15) });
            let hour = if b & 2 != 0 {
                number(first[2])
            } else {
                number(first[2] & 0x7f) % 12 + if first[2] & 0x80 != 0 { 12 } else { 0 }
            };
            return Some(hour * 3600 + number(first[1]) * 60 + number(first[0]));
        }
    }
    None
}
