//! QEMU's firmware configuration device. QEMU, docs/specs/fw_cfg.
use crate::cpu::{inb, outw};

/// Selector port; the data port is the next one.
pub const PORT: u16 = 0x510;
/// "QEMU".
pub const SIGNATURE: u16 = 0x00;
/// Features: bit 0 traditional interface, bit 1 DMA.
pub const ID: u16 = 0x01;
/// RAM size in bytes, 64-bit.
pub const RAM_SIZE: u16 = 0x03;
/// Number of CPUs, 16-bit.
pub const CPUS: u16 = 0x05;
/// File directory; its numbers are big-endian.
pub const DIRECTORY: u16 = 0x19;

/// Selects an item and reads its first bytes.
pub fn read<const N: usize>(item: u16) -> [u8; N] {
    outw(PORT, item);
    core::array::from_fn(|_| inb(PORT + 1))
}

/// Whether the device is there.
pub fn present() -> bool {
    read::<4>(SIGNATURE) == *b"QEMU"
}

/// Number of CPUs.
pub fn cpus() -> u16 {
    u16::from_le_bytes(read(CPUS))
}

/// RAM size in bytes.
pub fn ram_size() -> u64 {
    u64::from_le_bytes(read(RAM_SIZE))
}

/// One file of the directory.
#[derive(Clone, Copy, Debug)]
pub struct File {
    /// Length in bytes.
    pub size: u32,
    /// Item number.
    pub select: u16,
    /// NUL-padded name.
    pub name: [u8; 56],
}

/// Calls `each` for every file; returns how many the directory says it has.
pub fn files(mut each: impl FnMut(&File)) -> u32 {
    outw(PORT, DIRECTORY);
    fn take<const N: usize>() -> [u8; N] {
        core::array::from_fn(|_| inb(PORT + 1))
    }
    let count = u32::from_be_bytes(take());
    for _ in 0..count.min(1000) {
        let size = u32::from_be_bytes(take());
        let select = u16::from_be_bytes(take());
        let _reserved: [u8; 2] = take();
        each(&File { size, select, name: take() });
    }
    count
}
