//! The I/O APIC. Intel 82093AA datasheet.
use crate::cpu::{peek, poke};

/// Its address.
pub const BASE: u64 = 0xfec0_0000;
/// Index register.
pub const REGSEL: u64 = BASE;
/// Data window.
pub const WIN: u64 = BASE + 0x10;

/// Redirection entry: masked.
pub const MASKED: u64 = 1 << 16;
/// Redirection entry: level-triggered.
pub const LEVEL: u64 = 1 << 15;
/// Redirection entry: remote IRR.
pub const REMOTE_IRR: u64 = 1 << 14;
/// Redirection entry: active low.
pub const LOW: u64 = 1 << 13;

/// Reads a register.
pub fn read(index: u32) -> u32 {
    poke(REGSEL, index);
    peek(WIN)
}

/// Writes a register.
pub fn write(index: u32, value: u32) {
    poke(REGSEL, index);
    poke(WIN, value);
}

/// Number of pins.
pub fn pins() -> u32 {
    (read(1) >> 16 & 0xff) + 1
}

/// Reads a redirection entry.
pub fn entry(pin: u32) -> u64 {
    u64::from(read(0x10 + 2 * pin)) | u64::from(read(0x11 + 2 * pin)) << 32
}

/// Writes a redirection entry, masked while its halves differ.
pub fn set_entry(pin: u32, value: u64) {
    write(0x10 + 2 * pin, MASKED as u32);
    write(0x11 + 2 * pin, (value >> 32) as u32);
    write(0x10 + 2 * pin, value as u32);
}

/// Masks all pins that are not masked.
pub fn mask_all() {
    for pin in 0..pins() {
        if u64::from(read(0x10 + 2 * pin)) & MASKED == 0 {
            set_entry(pin, MASKED);
        }
    }
}
