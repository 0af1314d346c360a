//! PCI configuration space: mechanism #1, the memory-mapped mechanism, and one device, the host bridge at 00:00.0.
//!
//! Sources: PCI Local Bus Specification 3.0, section 3.2.2.3.2 (configuration mechanism #1) and chapter 6 (header);
//! PCI Express Base Specification, section 7.2.2 (ECAM). The bridge is an Intel 82G33 (memory controller hub of
//! the ICH9 generation), whose ids every operating system has met. Software can change its interrupt line register
//! alone, which means nothing (PCI 3.0, 6.2.4); functions that do not exist read all ones.

use crate::vm::layout::{ECAM_SIZE, ECAM_START};

/// CONFIG_ADDRESS; only 32-bit accesses reach it.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// CONFIG_DATA, four bytes.
pub const CONFIG_DATA: u16 = 0xcfc;
/// Last port of CONFIG_DATA.
pub const CONFIG_DATA_LAST: u16 = CONFIG_DATA + 3;

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Bits of CONFIG_ADDRESS that exist: enable, bus, device, function, doubleword.
const ADDRESS_MASK: u32 = 0x80ff_fffc;
/// Configuration space that mechanism #1 reaches.
const HEADER_LEN: u64 = 256;

/// Vendor and device: Intel 82G33.
const ID: u32 = 0x29c0_8086;
/// Memory space and bus master are on for good; status: fast back-to-back capable, no capability list.
const COMMAND_STATUS: u32 = 0x0080_0006;
/// Host bridge, revision 2.
const CLASS_REVISION: u32 = 0x0600_0002;
/// Subsystem vendor and id of Intel's own boards.
const SUBSYSTEM: u32 = 0x29c0_8086;
/// Offset of the interrupt line register.
const INTERRUPT_LINE: u64 = 0x3c;

/// Everything the configuration mechanism remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciState {
    /// CONFIG_ADDRESS.
    pub address: u32,
    /// Interrupt line register of the host bridge.
    pub interrupt_line: u8,
}

/// PCI configuration space.
#[derive(Clone, Debug)]
pub struct Pci {
    state: PciState,
}

impl Pci {
    /// After reset.
    pub const fn new() -> Self {
        Self { state: PciState { address: 0, interrupt_line: 0 } }
    }

    /// Reads CONFIG_ADDRESS.
    pub fn address(&self) -> u32 {
        self.state.address
    }

    /// Writes CONFIG_ADDRESS.
    pub fn set_address(&mut self, value: u32) {
        self.state.address = value & ADDRESS_MASK;
    }

    /// Reads one byte of CONFIG_DATA, `port` from 0xCFC to 0xCFF.
    pub fn read_data(&self, port: u16) -> u8 {
        if self.state.address & ADDRESS_ENABLE == 0 {
            return 0xff;
        }
        let function = (self.state.address >> 8) & 0xffff;
        let offset = self.state.address & 0xfc | u32::from(port & 3);
        self.config_byte(function, offset.into())
    }

    /// Writes one byte of CONFIG_DATA, `port` from 0xCFC to 0xCFF.
    pub fn write_data(&mut self, port: u16, value: u8) {
        if self.state.address & ADDRESS_ENABLE != 0 {
            let function = (self.state.address >> 8) & 0xffff;
            let offset = self.state.address & 0xfc | u32::from(port & 3);
            self.set_config_byte(function, offset.into(), value);
        }
    }

    /// Reads `size` bytes (1 to 8) of the memory-mapped space; `None` if `gpa` is not in it.
    pub fn read_ecam(&self, gpa: u64, size: u8) -> Option<u64> {
        let start = gpa.checked_sub(ECAM_START).filter(|&offset| offset < ECAM_SIZE)?;
        let mut bytes = [0xff; 8];
        for (offset, byte) in (start..ECAM_SIZE).zip(bytes.iter_mut().take(size.into())) {
            *byte = self.config_byte((offset >> 12) as u32, offset & 0xfff);
        }
        Some(u64::from_le_bytes(bytes) & (u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)))))
    }

    /// Writes the low `size` bytes (1 to 8) of `value` to the memory-mapped space; false if `gpa` is not in it.
    pub fn write_ecam(&mut self, gpa: u64, size: u8, value: u64) -> bool {
        let Some(start) = gpa.checked_sub(ECAM_START).filter(|&offset| offset < ECAM_SIZE) else {
            return false;
        };
        for (offset, byte) in (start..ECAM_SIZE).zip(value.to_le_bytes().into_iter().take(size.into())) {
            self.set_config_byte((offset >> 12) as u32, offset & 0xfff, byte);
        }
        true
    }

    /// A byte of the configuration space of `function` (bus, device, function). The bridge is a conventional PCI
    /// device: its space ends after 256 bytes, and what lies beyond reads all ones.
    fn config_byte(&self, function: u32, offset: u64) -> u8 {
        if function != 0 || offset >= HEADER_LEN {
            return 0xff;
        }
        let dword: u32 = match offset & 0xfc {
            0x00 => ID,
            0x04 => COMMAND_STATUS,
            0x08 => CLASS_REVISION,
            0x2c => SUBSYSTEM,
            INTERRUPT_LINE => u32::from(self.state.interrupt_line),
            _ => 0,
        };
        dword.to_le_bytes()[(offset & 3) as usize]
    }

    fn set_config_byte(&mut self, function: u32, offset: u64, value: u8) {
        if function == 0 && offset == INTERRUPT_LINE {
            self.state.interrupt_line = value;
        }
    }

    /// What must be kept to continue later.
    pub fn save(&self) -> PciState {
        self.state
    }

    /// Continues from `state`, whatever it holds.
    pub fn restore(&mut self, state: &PciState) {
        self.set_address(state.address);
        self.state.interrupt_line = state.interrupt_line;
    }
}

impl Default for Pci {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dword(pci: &mut Pci, address: u32) -> u32 {
        pci.set_address(address);
        u32::from_le_bytes([0, 1, 2, 3].map(|i| pci.read_data(CONFIG_DATA + i)))
    }

    #[test]
    fn address_reads_back() {
        let mut pci = Pci::new();
        pci.set_address(0x8000_0000);
        assert_eq!(pci.address(), 0x8000_0000, "how Linux finds mechanism #1");
        pci.set_address(u32::MAX);
        assert_eq!(pci.address(), 0x80ff_fffc);
    }

    #[test]
    fn host_bridge_and_nothing_else() {
        let mut pci = Pci::new();
        assert_eq!(dword(&mut pci, 0x8000_0000), 0x29c0_8086);
        assert_eq!(dword(&mut pci, 0x8000_0008) >> 8, 0x06_0000);
        assert_eq!(dword(&mut pci, 0x8000_000c), 0, "header type 0, single function");
        assert_eq!(dword(&mut pci, 0x8000_0010), 0, "no BAR");
        assert_eq!(dword(&mut pci, 0x0000_0000), u32::MAX, "not enabled");
        for function in 1..=0xffff {
            assert_eq!(dword(&mut pci, 0x8000_0000 | function << 8), u32::MAX);
        }
    }

    #[test]
    fn ecam_shows_the_same_space_in_every_size() {
        let pci = Pci::new();
        assert_eq!(pci.read_ecam(ECAM_START, 4), Some(0x29c0_8086));
        assert_eq!(pci.read_ecam(ECAM_START, 2), Some(0x8086));
        assert_eq!(pci.read_ecam(ECAM_START + 2, 2), Some(0x29c0));
        assert_eq!(pci.read_ecam(ECAM_START + 11, 1), Some(0x06));
        assert_eq!(pci.read_ecam(ECAM_START, 8), Some(0x0080_0006_29c0_8086));
        assert_eq!(pci.read_ecam(ECAM_START + 0x100, 4), Some(0xffff_ffff), "no extended space");
        assert_eq!(pci.read_ecam(ECAM_START + 0x1000, 8), Some(u64::MAX), "no function 1");
        assert_eq!(pci.read_ecam(ECAM_START + ECAM_SIZE - 1, 8), Some(u64::MAX));
        assert_eq!(pci.read_ecam(ECAM_START + ECAM_SIZE, 4), None);
        assert_eq!(pci.read_ecam(ECAM_START - 1, 4), None);
    }

    #[test]
    fn the_interrupt_line_holds_a_byte_whichever_way_it_is_written() {
        let mut pci = Pci::new();
        pci.set_address(0x8000_003c);
        pci.write_data(CONFIG_DATA, 0x5a);
        pci.write_data(CONFIG_DATA + 1, 0xff);
        assert_eq!(pci.read_ecam(ECAM_START + 0x3c, 4), Some(0x5a), "the interrupt pin stays none");
        assert!(pci.write_ecam(ECAM_START + 0x38, 8, 0x77_ffff_ffff));
        assert_eq!(pci.read_ecam(ECAM_START + 0x38, 8), Some(0x77_0000_0000));
        assert!(pci.write_ecam(ECAM_START + ECAM_SIZE - 1, 8, 0), "cut off at the end");
        assert!(!pci.write_ecam(ECAM_START - 1, 1, 0) && !pci.write_ecam(ECAM_START + ECAM_SIZE, 1, 0));
        pci.set_address(0x3c);
        pci.write_data(CONFIG_DATA, 1);
        assert_eq!(pci.read_ecam(ECAM_START + 0x3c, 1), Some(0x77), "not enabled");
    }

    #[test]
    fn save_restore_survives_garbage() {
        let mut pci = Pci::new();
        pci.restore(&PciState { address: u32::MAX, interrupt_line: 9 });
        assert_eq!(pci.save(), PciState { address: 0x80ff_fffc, interrupt_line: 9 });
    }
}
