//! The list of all tables, good or broken, for the boot report. ACPI 6.5 sections 5.2.6 to 5.2.8.
// Reads the firmware's memory.
#![allow(unsafe_code)]

use super::bytes::{sums_to_zero, u32_at, u64_at, u8_at};
use super::{tables, FirmwareMemory, Rsdp, MAX_TABLE_BYTES};
use alloc::vec::Vec;

/// Bytes of the header that all tables have.
const HEADER_BYTES: usize = 36;
/// More tables than any machine has.
const MAX_TABLES: usize = 256;

/// What a table's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableInfo {
    /// Physical address.
    pub address: u64,
    /// Signature, such as `FACP`.
    pub signature: [u8; 4],
    /// Length in bytes, header included.
    pub length: u32,
    /// Revision of the table's layout.
    pub revision: u8,
    /// Who made it.
    pub oem: [u8; 6],
    /// The maker's name of it.
    pub oem_table: [u8; 8],
    /// Whether all its bytes can be read and add up to zero.
    pub checksum_ok: bool,
}

/// All tables that `rsdp` leads to: the table of tables, those it names, and the DSDT.
pub(super) fn list<M: FirmwareMemory>(memory: &M, rsdp: &Rsdp) -> Vec<TableInfo> {
    let (root, pointer_bytes) = match rsdp.xsdt {
        0 => (u64::from(rsdp.rsdt), 4),
        xsdt => (xsdt, 8),
    };
    let Some((info, bytes)) = table(memory, root) else { return Vec::new() };
    let mut all = Vec::from([info]);
    let pointers = bytes.get(HEADER_BYTES..).unwrap_or_default().chunks_exact(pointer_bytes);
    for pointer in pointers.take(MAX_TABLES) {
        let address = match pointer_bytes {
            4 => u32_at(pointer, 0).map(u64::from),
            _ => u64_at(pointer, 0),
        };
        let Some((info, bytes)) = address.and_then(|address| table(memory, address)) else { continue };
        all.push(info);
        if &info.signature == b"FACP" {
            let long = u64_at(bytes, 140).filter(|address| *address != 0);
            let dsdt = long.or(u32_at(bytes, 40).map(u64::from));
            all.extend(dsdt.and_then(|address| table(memory, address)).map(|(info, _)| info));
        }
    }
    all
}

/// The table at an address: its header, and as much of it as can be read.
fn table<M: FirmwareMemory>(memory: &M, address: u64) -> Option<(TableInfo, &[u8])> {
    let read = |len: usize| {
        let at = memory.map(address, len)?;
        // SAFETY: `map` made `len` bytes readable, and the firmware writes its tables no more.
        Some(unsafe { core::slice::from_raw_parts(at.as_ptr(), len) })
    };
    let header = read(HEADER_BYTES).filter(|_| address != 0)?;
    let length = tables::length(header)?;
    let whole = (HEADER_BYTES..=MAX_TABLE_BYTES).contains(&(length as usize));
    let bytes = if whole { read(length as usize) } else { None };
    let info = TableInfo {
        address,
        signature: *header.first_chunk()?,
        length,
        revision: u8_at(header, 8)?,
        oem: *header[10..].first_chunk()?,
        oem_table: *header[16..].first_chunk()?,
        checksum_ok: bytes.is_some_and(sums_to_zero),
    };
    Some((info, bytes.unwrap_or(header)))
}
