//! QEMU's firmware configuration interface: a guest selects an item by number and reads its bytes.
//!
//! Source: QEMU's documentation, "QEMU Firmware Configuration (fw_cfg) Device" (docs/specs/fw_cfg). The selector
//! is a 16-bit port (little-endian), data an 8-bit port beside it, and the DMA address two 32-bit ports
//! (big-endian) of which the second starts the transfer. Items cannot be written. An item that does not exist, and
//! what lies beyond an item's end, reads as zeros.

use crate::vm::layout::FW_CFG_PORT;
use crate::vm::ram::GuestRam;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

/// Selector port, 16 bits, write only.
pub const SELECTOR: u16 = FW_CFG_PORT;
/// Data port, 8 bits.
pub const DATA: u16 = FW_CFG_PORT + 1;
/// DMA address, most significant half.
pub const DMA_HIGH: u16 = FW_CFG_PORT + 4;
/// DMA address, least significant half; writing it starts the transfer.
pub const DMA_LOW: u16 = FW_CFG_PORT + 8;
/// Last port.
pub const LAST: u16 = FW_CFG_PORT + 11;

const KEY_SIGNATURE: u16 = 0x00;
const KEY_ID: u16 = 0x01;
const KEY_RAM_SIZE: u16 = 0x03;
const KEY_NB_CPUS: u16 = 0x05;
const KEY_MAX_CPUS: u16 = 0x0f;
const KEY_FILE_DIR: u16 = 0x19;
const KEY_FILE_FIRST: u16 = 0x20;

const SIGNATURE: [u8; 4] = *b"QEMU";
/// What the DMA address reads as.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// Traditional interface and DMA.
const ID: u32 = 0b11;

const DMA_ERROR: u32 = 1 << 0;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;
/// control, length, address: 4, 4 and 8 bytes.
const DMA_DESCRIPTOR_LEN: usize = 16;
/// Zeros that one transfer may ask for beyond an item's end. More is an error, so that no guest can make one exit
/// last as long as filling its whole memory takes.
const DMA_MAX_PADDING: u64 = 64 << 10;

/// Longest file name, its NUL included.
const NAME_LEN: usize = 56;
const DIR_ENTRY_LEN: usize = 64;
/// How many files a VM may have.
const MAX_FILES: usize = 256;

/// Why a file cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FwCfgError {
    /// The name is empty, longer than 55 bytes or holds a NUL; its length.
    BadName(usize),
    /// There is such a file already.
    Duplicate,
    /// There are 256 files already.
    TooMany,
    /// The data is longer than 4 GiB; its length.
    TooLong(usize),
}

impl fmt::Display for FwCfgError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadName(len) => write!(f, "a fw_cfg file name has 1 to 55 bytes and no NUL, not {len}"),
            Self::Duplicate => write!(f, "a fw_cfg file of that name exists already"),
            Self::TooMany => write!(f, "a VM has at most {MAX_FILES} fw_cfg files"),
            Self::TooLong(len) => write!(f, "a fw_cfg file has less than 4 GiB, not {len:#x} bytes"),
        }
    }
}

/// Everything the guest-visible side remembers; the items are configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FwCfgState {
    /// Selected item.
    pub key: u16,
    /// Next byte of the item.
    pub offset: u32,
    /// High half of the DMA address.
    pub dma_high: u32,
}

/// The firmware configuration device.
#[derive(Clone, Debug)]
pub struct FwCfg {
    state: FwCfgState,
    ram_size: [u8; 8],
    cpus: [u8; 2],
    /// Built when a file is added: big-endian count, then 64 bytes per file.
    directory: Vec<u8>,
    files: Vec<Box<[u8]>>,
}

impl FwCfg {
    /// A device without files, for a VM with `ram_bytes` of RAM and `cpus` CPUs.
    pub fn new(ram_bytes: u64, cpus: u16) -> Self {
        Self {
            state: FwCfgState { key: KEY_SIGNATURE, offset: 0, dma_high: 0 },
            ram_size: ram_bytes.to_le_bytes(),
            cpus: cpus.to_le_bytes(),
            directory: alloc::vec![0; 4],
            files: Vec::new(),
        }
    }

    /// Adds a file. Meant for the time before the VM runs: it allocates.
    pub fn add_file(&mut self, name: &str, data: Box<[u8]>) -> Result<(), FwCfgError> {
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() >= NAME_LEN || bytes.contains(&0) {
            return Err(FwCfgError::BadName(bytes.len()));
        }
        let mut padded = [0; NAME_LEN];
        padded[..bytes.len()].copy_from_slice(bytes);
        if self.directory[4..].chunks_exact(DIR_ENTRY_LEN).any(|entry| entry[8..] == padded) {
            return Err(FwCfgError::Duplicate);
        }
        if self.files.len() >= MAX_FILES {
            return Err(FwCfgError::TooMany);
        }
        let len = u32::try_from(data.len()).map_err(|_| FwCfgError::TooLong(data.len()))?;
        let key = KEY_FILE_FIRST + self.files.len() as u16;
        self.files.push(data);
        self.directory[..4].copy_from_slice(&(self.files.len() as u32).to_be_bytes());
        self.directory.extend_from_slice(&len.to_be_bytes());
        self.directory.extend_from_slice(&key.to_be_bytes());
        self.directory.extend_from_slice(&[0; 2]);
        self.directory.extend_from_slice(&padded);
        Ok(())
    }

    /// Selects an item.
    pub fn select(&mut self, key: u16) {
        self.state.key = key;
        self.state.offset = 0;
    }

    /// Reads one of the device's ports, a byte wide.
    pub fn read(&mut self, port: u16) -> u8 {
        match port {
            DATA => {
                let byte = self.item().get(self.state.offset as usize).copied().unwrap_or(0);
                self.state.offset = self.state.offset.saturating_add(1);
                byte
            }
            DMA_HIGH..=LAST => DMA_SIGNATURE[usize::from(port - DMA_HIGH)],
            _ => 0xff,
        }
    }

    /// Writes half of the DMA address (a little-endian port access of a big-endian number); the low half, at
    /// `DMA_LOW`, starts the transfer.
    pub fn write_dma(&mut self, port: u16, value: u32, ram: &dyn GuestRam) {
        let value = value.swap_bytes();
        if port == DMA_HIGH {
            self.state.dma_high = value;
        } else {
            let descriptor = u64::from(self.state.dma_high) << 32 | u64::from(value);
            self.state.dma_high = 0;
            self.transfer(descriptor, ram);
        }
    }

    /// The selected item's bytes. Bit 14 (write) and bit 15 (architecture-specific) of a key name other items,
    /// none of which exist.
    fn item(&self) -> &[u8] {
        match self.state.key {
            KEY_SIGNATURE => &SIGNATURE,
            KEY_ID => const { &ID.to_le_bytes() },
            KEY_RAM_SIZE => &self.ram_size,
            KEY_NB_CPUS | KEY_MAX_CPUS => &self.cpus,
            KEY_FILE_DIR => &self.directory,
            key => {
                let file =
                    key.checked_sub(KEY_FILE_FIRST).and_then(|index| self.files.get(usize::from(index)));
                file.map_or(&[], |data| data)
            }
        }
    }

    /// Does what the descriptor at `gpa` asks and writes the outcome into its control field.
    fn transfer(&mut self, gpa: u64, ram: &dyn GuestRam) {
        let mut descriptor = [0; DMA_DESCRIPTOR_LEN];
        let outcome = match ram.read(gpa, &mut descriptor) {
            Ok(()) => {
                let [c0, c1, c2, c3, l0, l1, l2, l3, address @ ..] = descriptor;
                let control = u32::from_be_bytes([c0, c1, c2, c3]);
                let len = u32::from_be_bytes([l0, l1, l2, l3]);
                if control & DMA_SELECT != 0 {
                    self.select((control >> 16) as u16);
                }
                self.run(control, len, u64::from_be_bytes(address), ram)
            }
            Err(_) => DMA_ERROR,
        };
        // A descriptor outside RAM has nobody to tell.
        let _ = ram.write(gpa, &outcome.to_be_bytes());
    }

    /// Returns the control field to write back: 0 or an error.
    fn run(&mut self, control: u32, len: u32, gpa: u64, ram: &dyn GuestRam) -> u32 {
        if control & DMA_READ != 0 {
            let offset = self.state.offset as usize;
            let rest = self.item().get(offset..).unwrap_or(&[]);
            let (data, padding) = match rest.get(..len as usize) {
                Some(data) => (data, 0),
                None => (rest, u64::from(len) - rest.len() as u64),
            };
            if padding > DMA_MAX_PADDING {
                return DMA_ERROR;
            }
            let done = ram.write(gpa, data).is_ok() && write_zeros(ram, gpa, data.len() as u64, padding);
            if !done {
                return DMA_ERROR;
            }
        } else if control & DMA_WRITE != 0 {
            return DMA_ERROR;
        } else if control & DMA_SKIP == 0 {
            return 0;
        }
        self.state.offset = self.state.offset.saturating_add(len);
        0
    }

    /// What must be kept to continue later.
    pub fn save(&self) -> FwCfgState {
        self.state
    }

    /// Continues from `state`, whatever it holds.
    pub fn restore(&mut self, state: &FwCfgState) {
        self.state = *state;
    }
}

/// Fills `len` bytes at `gpa + skip` with zeros.
fn write_zeros(ram: &dyn GuestRam, gpa: u64, skip: u64, len: u64) -> bool {
    const ZEROS: [u8; 256] = [0; 256];
    let mut done = 0;
    while done < len {
        let chunk = (len - done).min(ZEROS.len() as u64);
        let Some(at) = gpa.checked_add(skip + done) else { return false };
        if ram.write(at, &ZEROS[..chunk as usize]).is_err() {
            return false;
        }
        done += chunk;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Ram;
    use proptest::prelude::*;

    fn fw_cfg() -> FwCfg {
        let mut f = FwCfg::new(0x1_2345_6000, 3);
        f.add_file("etc/hello", b"hello, guest".as_slice().into()).unwrap();
        f.add_file("opt/empty", Box::default()).unwrap();
        f
    }

    fn read<const N: usize>(f: &mut FwCfg) -> [u8; N] {
        core::array::from_fn(|_| f.read(DATA))
    }

    fn item<const N: usize>(f: &mut FwCfg, key: u16) -> [u8; N] {
        f.select(key);
        read(f)
    }

    /// Runs one DMA transfer with its descriptor at 0x10; returns the control field.
    fn dma(f: &mut FwCfg, ram: &Ram, control: u32, len: u32, gpa: u64) -> u32 {
        let mut descriptor = control.to_be_bytes().to_vec();
        descriptor.extend(len.to_be_bytes());
        descriptor.extend(gpa.to_be_bytes());
        ram.write(0x10, &descriptor).unwrap();
        f.write_dma(DMA_HIGH, 0, ram);
        f.write_dma(DMA_LOW, 0x10u32.swap_bytes(), ram);
        let mut control = [0; 4];
        ram.read(0x10, &mut control).unwrap();
        u32::from_be_bytes(control)
    }

    #[test]
    fn fixed_items() {
        let mut f = fw_cfg();
        assert_eq!(&item::<4>(&mut f, 0), b"QEMU");
        assert_eq!(item::<4>(&mut f, 1), 3u32.to_le_bytes());
        assert_eq!(item::<8>(&mut f, 3), 0x1_2345_6000u64.to_le_bytes());
        assert_eq!(item::<2>(&mut f, 5), [3, 0]);
        assert_eq!(item::<2>(&mut f, 15), [3, 0]);
        for missing in [2, 0x1f, 0x22, 0x4000, 0x8000, 0xffff] {
            assert_eq!(item::<4>(&mut f, missing), [0; 4]);
        }
        assert_eq!(f.read(SELECTOR), 0xff);
    }

    #[test]
    fn directory_is_big_endian_and_leads_to_the_files() {
        let mut f = fw_cfg();
        let dir: [u8; 132] = item(&mut f, KEY_FILE_DIR);
        assert_eq!(dir[..4], [0, 0, 0, 2]);
        assert_eq!(dir[4..12], [0, 0, 0, 12, 0, 0x20, 0, 0]);
        assert_eq!(&dir[12..22], b"etc/hello\0");
        assert_eq!(dir[68..76], [0, 0, 0, 0, 0, 0x21, 0, 0]);
        assert_eq!(&item::<14>(&mut f, 0x20), b"hello, guest\0\0", "zeros beyond the end");
        assert_eq!(&read::<2>(&mut f), &[0, 0]);
    }

    #[test]
    fn bad_files_are_refused() {
        let mut f = fw_cfg();
        assert_eq!(f.add_file("etc/hello", Box::default()), Err(FwCfgError::Duplicate));
        assert_eq!(f.add_file("", Box::default()), Err(FwCfgError::BadName(0)));
        assert_eq!(f.add_file(&"x".repeat(56), Box::default()), Err(FwCfgError::BadName(56)));
        assert_eq!(f.add_file("a\0b", Box::default()), Err(FwCfgError::BadName(3)));
        f.add_file(&"x".repeat(55), Box::default()).unwrap();
        for i in 3..MAX_FILES {
            f.add_file(&format!("{i}"), Box::default()).unwrap();
        }
        assert_eq!(f.add_file("one more", Box::default()), Err(FwCfgError::TooMany));
    }

    #[test]
    fn dma_signature_and_read() {
        let mut f = fw_cfg();
        let signature: Vec<u8> = (DMA_HIGH..=LAST).map(|port| f.read(port)).collect();
        assert_eq!(signature, b"QEMU CFG");
        let ram = Ram::new(0x1000);
        assert_eq!(dma(&mut f, &ram, 0x20 << 16 | DMA_SELECT | DMA_READ, 5, 0x100), 0);
        assert_eq!(dma(&mut f, &ram, DMA_SKIP, 2, 0), 0);
        assert_eq!(dma(&mut f, &ram, DMA_READ, 8, 0x105), 0);
        assert_eq!(ram.0.borrow()[0x100..0x10e], *b"helloguest\0\0\0\xcc");
        assert_eq!(dma(&mut f, &ram, 0x20 << 16 | DMA_SELECT, 0, 0), 0, "select alone");
        assert_eq!(f.read(DATA), b'h');
    }

    #[test]
    fn dma_high_half_counts_once() {
        let mut f = fw_cfg();
        let ram = Ram::new(0x1000);
        f.write_dma(DMA_HIGH, 1u32.swap_bytes(), &ram);
        assert_eq!(f.save().dma_high, 1);
        f.write_dma(DMA_LOW, 0x10u32.swap_bytes(), &ram);
        assert!(ram.0.borrow().iter().all(|&b| b == 0xcc), "4 GiB + 0x10 is not RAM");
        assert_eq!(f.save().dma_high, 0);
    }

    #[test]
    fn dma_errors() {
        let mut f = fw_cfg();
        let ram = Ram::new(0x1000);
        f.select(0x20);
        assert_eq!(dma(&mut f, &ram, DMA_READ, 12, 0xff8), DMA_ERROR, "target leaves RAM");
        assert_eq!(dma(&mut f, &ram, DMA_READ, 12, u64::MAX - 4), DMA_ERROR);
        assert_eq!(dma(&mut f, &ram, DMA_READ, 13, 0xff4), DMA_ERROR, "padding leaves RAM");
        assert_eq!(dma(&mut f, &ram, DMA_READ, u32::MAX, 0), DMA_ERROR, "too much padding");
        assert_eq!(dma(&mut f, &ram, DMA_WRITE, 4, 0x100), DMA_ERROR, "items cannot be written");
        assert_eq!(f.save().offset, 0, "an error moves nothing");
        assert_eq!(dma(&mut f, &ram, DMA_SKIP, u32::MAX, 0), 0);
        assert_eq!(dma(&mut f, &ram, DMA_SKIP, u32::MAX, 0), 0);
        assert_eq!(f.read(DATA), 0);
    }

    proptest! {
        #[test]
        fn any_descriptor_and_state_is_harmless(
            key in any::<u16>(), offset in any::<u32>(), control in any::<u32>(),
            len in prop_oneof![0..100u32, any::<u32>()], gpa in prop_oneof![0..0x1100u64, any::<u64>()],
            at in prop_oneof![0..0x1010u32, any::<u32>()], high in 0..2u32
        ) {
            let mut f = fw_cfg();
            f.restore(&FwCfgState { key, offset, dma_high: high });
            let ram = Ram::new(0x1000);
            dma(&mut f, &ram, control, len, gpa);
            f.write_dma(DMA_HIGH, high.swap_bytes(), &ram);
            f.write_dma(DMA_LOW, at.swap_bytes(), &ram);
            f.read(DATA);
        }
    }
}
