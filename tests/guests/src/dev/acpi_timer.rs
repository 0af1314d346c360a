//! The ACPI power-management timer. ACPI 6.5, 4.8.2.1.
use crate::cpu::inl;

/// Its rate in Hz.
pub const HZ: u64 = 3_579_545;
/// Its port, on QEMU's q35 after firmware ran and on Umbra.
pub const PORT: u16 = 0x608;

/// The count; 24 or 32 bits wide.
pub fn read() -> u32 {
    inl(PORT)
}

/// Ticks from `start` to `end`, right for both widths as long as less than 4 seconds passed.
pub fn elapsed(start: u32, end: u32) -> u32 {
    end.wrapping_sub(start) & 0xff_ffff
}
