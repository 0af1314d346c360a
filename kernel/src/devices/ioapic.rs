//! I/O APIC: 24 interrupt pins, each turned into a message on the interrupt bus by a redirection entry.
//!
//! An Intel 82093AA as later chipsets have it: version 0x20, that is with the EOI register, and with 8-bit
//! destinations in physical mode too. Software that knows version 0x11 only sees nothing new. There is no bus to
//! arbitrate for, so messages leave at once: the delivery status bit always reads 0.
//!
//! Intel 82093AA datasheet (290566), section 3; ICH9 datasheet, section 13.5.
use super::apic_bus::{ApicMessage, ApicSink, DeliveryMode, Destination, Trigger};

/// Number of interrupt pins.
pub const PINS: usize = 24;

// ---- Registers ----

/// Index register, offset in the register page.
const IOREGSEL: u32 = 0x00;
/// Data register.
const IOWIN: u32 = 0x10;
/// EOI register: writing a vector ends it, as the broadcast of a local APIC does.
const IOEOI: u32 = 0x40;

/// Indirect register: APIC ID in bits 27:24.
const IOAPICID: u8 = 0x00;
/// Indirect register: version, and the number of the last pin in bits 23:16.
const IOAPICVER: u8 = 0x01;
/// Indirect register: arbitration ID in bits 27:24.
const IOAPICARB: u8 = 0x02;
/// First of the redirection entries, two registers each.
const IOREDTBL: u8 = 0x10;
const IOREDTBL_LAST: u8 = IOREDTBL + 2 * PINS as u8 - 1;

const ID_MASK: u32 = 0x0f00_0000;
const VERSION: u32 = (PINS as u32 - 1) << 16 | 0x20;

/// A redirection entry (82093AA 3.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry(u64);

impl Entry {
    const LOGICAL: u64 = 1 << 11;
    const ACTIVE_LOW: u64 = 1 << 13;
    const REMOTE_IRR: u64 = 1 << 14;
    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;
    /// What software may write: not delivery status, remote IRR or the reserved bits.
    const WRITABLE: u64 = 0xff00_0000_0001_afff;
    const RESET: Self = Self(Self::MASKED);

    #[inline]
    const fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    #[inline]
    const fn vector(self) -> u8 {
        self.0 as u8
    }

    #[inline]
    const fn mode(self) -> Option<DeliveryMode> {
        DeliveryMode::from_bits((self.0 >> 8) as u32)
    }

    /// Level triggered, and of a mode that can be: NMI, SMI, INIT and ExtINT are edges even if programmed as
    /// levels.
    #[inline]
    const fn is_level(self) -> bool {
        self.has(Self::LEVEL)
            && matches!(self.mode(), Some(DeliveryMode::Fixed | DeliveryMode::LowestPriority))
    }

    #[inline]
    fn message(self) -> Option<ApicMessage> {
        Some(ApicMessage {
            destination: Destination::from_u8((self.0 >> 56) as u8, self.has(Self::LOGICAL)),
            // Start-up is reserved in a redirection entry.
            mode: self.mode().filter(|mode| *mode != DeliveryMode::StartUp)?,
            trigger: if self.is_level() { Trigger::Level } else { Trigger::Edge },
            vector: self.vector(),
        })
    }
}

// ---- State ----

/// Everything that a save keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoApicState {
    /// Index register.
    pub select: u8,
    /// ID register.
    pub id: u32,
    /// Redirection entries.
    pub redirection: [u64; PINS],
    /// Level at each pin, one bit a pin.
    pub lines: u32,
}

// ---- Device ----

/// An I/O APIC.
#[derive(Clone, Debug)]
pub struct IoApic {
    select: u8,
    id: u32,
    entries: [Entry; PINS],
    lines: u32,
    /// Pins whose entry has remote IRR set, so that an EOI that concerns nobody costs one compare.
    in_service: u32,
}

impl IoApic {
    /// An I/O APIC after reset: all pins masked, all lines low.
    pub const fn new() -> Self {
        Self { select: 0, id: 0, entries: [Entry::RESET; PINS], lines: 0, in_service: 0 }
    }

    /// Hardware reset. The lines are not the I/O APIC's to change.
    pub fn reset(&mut self) {
        *self = Self { lines: self.lines, ..Self::new() };
    }

    /// Sets the level at `pin`: `true` is a high voltage, so a line that is programmed active low idles high. Pins
    /// that do not exist are ignored.
    #[inline]
    pub fn set_line(&mut self, pin: usize, level: bool, sink: &mut impl ApicSink) {
        let Some(&entry) = self.entries.get(pin) else { return };
        let bit = 1 << pin;
        if (self.lines & bit != 0) == level {
            return;
        }
        self.lines ^= bit;
        if level == entry.has(Entry::ACTIVE_LOW) {
            return;
        }
        if entry.is_level() {
            self.poll_level(pin, sink);
        } else if !entry.has(Entry::MASKED) {
            // An edge at a masked pin is lost (82093AA 3.2.4, "Interrupt Mask").
            if let Some(message) = entry.message() {
                sink.send(message);
            }
        }
    }

    /// A local APIC ended the level-triggered interrupt `vector`: lines that still ask for it ask again.
    #[inline]
    pub fn eoi(&mut self, vector: u8, sink: &mut impl ApicSink) {
        let mut pins = self.in_service;
        while pins != 0 {
            let pin = pins.trailing_zeros() as usize;
            pins &= pins - 1;
            if self.entries[pin].vector() == vector {
                self.clear_remote_irr(pin);
                self.poll_level(pin, sink);
            }
        }
    }

    /// Offers again what no local APIC took (none was enabled): call when a local APIC's state has changed.
    pub fn retry(&mut self, sink: &mut impl ApicSink) {
        for pin in 0..PINS {
            self.poll_level(pin, sink);
        }
    }

    /// Reads `size` bytes (1, 2, 4, 8) at `offset` of the register page. A register is the low four bytes of its
    /// 16-byte slot; everything else reads zero.
    #[inline]
    pub fn read(&self, offset: u32, size: u8) -> u64 {
        let value = match offset & 0xff0 {
            IOREGSEL => u32::from(self.select),
            IOWIN => self.read_register(self.select),
            _ => 0,
        };
        let bytes = u64::from(value).checked_shr((offset & 0xf) * 8).unwrap_or(0);
        match size {
            1 => bytes & 0xff,
            2 => bytes & 0xffff,
            4 => bytes & 0xffff_ffff,
            _ => bytes,
        }
    }

    /// Writes `size` bytes at `offset` of the register page. Bytes of a register that a narrow write leaves out
    /// keep their value; bytes outside a register go nowhere.
    #[inline]
    pub fn write(&mut self, offset: u32, size: u8, value: u64, sink: &mut impl ApicSink) {
        let first = (offset & 0xf) * 8;
        if first >= 32 {
            return;
        }
        let mask = (u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8))) << first) as u32;
        let value = (value << first) as u32 & mask;
        match offset & 0xff0 {
            IOREGSEL => self.select = (u32::from(self.select) & !mask | value) as u8,
            IOWIN => {
                let value = self.read_register(self.select) & !mask | value;
                self.write_register(self.select, value, sink);
            }
            IOEOI if first == 0 => self.eoi(value as u8, sink),
            _ => {}
        }
    }

    /// Whether an unmasked pin sends something that reaches a CPU whose RFLAGS.IF is clear: NMI, SMI or INIT.
    pub fn has_unmaskable_pin(&self) -> bool {
        self.entries.iter().any(|entry| entry.0 & Entry::MASKED == 0 && matches!(entry.0 >> 8 & 7, 2 | 4 | 5))
    }

    /// The state to save.
    pub fn save(&self) -> IoApicState {
        IoApicState {
            select: self.select,
            id: self.id,
            redirection: self.entries.map(|entry| entry.0),
            lines: self.lines,
        }
    }

    /// Takes over a saved state; impossible values in it become possible ones. Sends nothing.
    pub fn restore(&mut self, state: &IoApicState) {
        self.select = state.select;
        self.id = state.id & ID_MASK;
        self.lines = state.lines & ((1 << PINS) - 1);
        self.in_service = 0;
        for (pin, (entry, saved)) in self.entries.iter_mut().zip(state.redirection).enumerate() {
            *entry = Entry(saved & Entry::WRITABLE);
            if saved & Entry::REMOTE_IRR != 0 && entry.is_level() {
                entry.0 |= Entry::REMOTE_IRR;
                self.in_service |= 1 << pin;
            }
        }
    }

    fn read_register(&self, index: u8) -> u32 {
        match index {
            IOAPICID | IOAPICARB => self.id,
            IOAPICVER => VERSION,
            IOREDTBL..=IOREDTBL_LAST => {
                let index = index - IOREDTBL;
                (self.entries[usize::from(index >> 1)].0 >> ((index & 1) * 32)) as u32
            }
            _ => 0,
        }
    }

    fn write_register(&mut self, index: u8, value: u32, sink: &mut impl ApicSink) {
        match index {
            IOAPICID => self.id = value & ID_MASK,
            IOREDTBL..=IOREDTBL_LAST => {
                let index = index - IOREDTBL;
                let pin = usize::from(index >> 1);
                let shift = (index & 1) * 32;
                let old = self.entries[pin].0;
                let half = 0xffff_ffff << shift & Entry::WRITABLE;
                self.entries[pin] = Entry(old & !half | u64::from(value) << shift & half);
                if !self.entries[pin].is_level() {
                    // Software clears a stuck remote IRR by way of edge mode.
                    self.clear_remote_irr(pin);
                }
                self.poll_level(pin, sink);
            }
            _ => {}
        }
    }

    fn clear_remote_irr(&mut self, pin: usize) {
        self.entries[pin].0 &= !Entry::REMOTE_IRR;
        self.in_service &= !(1 << pin);
    }

    /// Sends the interrupt of a level-triggered pin that is asserted, unmasked and not waiting for an EOI. Remote IRR
    /// is set when a local APIC took it.
    fn poll_level(&mut self, pin: usize, sink: &mut impl ApicSink) {
        let entry = self.entries[pin];
        let asserted = (self.lines >> pin & 1 != 0) != entry.has(Entry::ACTIVE_LOW);
        if !asserted || !entry.is_level() || entry.has(Entry::MASKED | Entry::REMOTE_IRR) {
            return;
        }
        let Some(message) = entry.message() else { return };
        if sink.send(message) {
            self.entries[pin].0 |= Entry::REMOTE_IRR;
            self.in_service |= 1 << pin;
        }
    }
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests;
