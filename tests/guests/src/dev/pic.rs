//! The two 8259A interrupt controllers. Intel 8259A datasheet.
use crate::cpu::{inb, outb};

/// Vector of IRQ 0 after `init`.
pub const BASE: u8 = 0x20;

const MASTER: u16 = 0x20;
const SLAVE: u16 = 0xa0;

/// ICW1 to ICW4: cascade on IRQ 2, vectors from `BASE`, all masked.
pub fn init() {
    init_with(BASE, BASE + 8, 1);
}

/// The same with chosen vectors and ICW4.
pub fn init_with(master: u8, slave: u8, icw4: u8) {
    outb(MASTER, 0x11);
    outb(SLAVE, 0x11);
    outb(MASTER + 1, master);
    outb(SLAVE + 1, slave);
    outb(MASTER + 1, 4);
    outb(SLAVE + 1, 2);
    outb(MASTER + 1, icw4);
    outb(SLAVE + 1, icw4);
    mask_all();
}

/// Masks all lines.
pub fn mask_all() {
    set_mask(0xffff);
}

/// Writes both mask registers, IRQ 0 in bit 0.
pub fn set_mask(mask: u16) {
    outb(MASTER + 1, mask as u8);
    outb(SLAVE + 1, (mask >> 8) as u8);
}

/// Unmasks one line, and the cascade where needed.
pub fn unmask(irq: u8) {
    set_mask(mask() & !(1 << irq) & if irq >= 8 { !4 } else { 0xffff });
}

/// Both mask registers.
pub fn mask() -> u16 {
    u16::from(inb(MASTER + 1)) | u16::from(inb(SLAVE + 1)) << 8
}

/// Interrupt request registers (OCW3, read IRR).
pub fn irr() -> u16 {
    read(0x0a)
}

/// In-service registers (OCW3, read ISR).
pub fn isr() -> u16 {
    read(0x0b)
}

fn read(ocw3: u8) -> u16 {
    outb(MASTER, ocw3);
    outb(SLAVE, ocw3);
    u16::from(inb(MASTER)) | u16::from(inb(SLAVE)) << 8
}

/// Non-specific EOI.
pub fn eoi(irq: u8) {
    if irq >= 8 {
        outb(SLAVE, 0x20);
    }
    outb(MASTER, 0x20);
}
