//! Finds the tables in the machine's memory.
// Reads the firmware's memory.
#![allow(unsafe_code)]

use super::{Acpi, FirmwareMemory, Rsdp, RSDP_BYTES};
use crate::mm;
use core::ptr::NonNull;
use x86_64::PhysAddr;

/// Where the BIOS data area keeps the segment of the extended BIOS data area.
const EBDA_POINTER: u64 = 0x40e;
/// The BIOS read-only memory that may hold an RSDP. ACPI 6.5 section 5.2.5.1.
const BIOS_AREA: (u64, usize) = (0xe_0000, 0x2_0000);

/// Memory of the firmware, mapped as it is asked for.
#[derive(Clone, Copy)]
struct Mapped;

impl FirmwareMemory for Mapped {
    fn map(&self, phys: u64, len: usize) -> Option<NonNull<u8>> {
        let at = mm::map_firmware(PhysAddr::try_new(phys).ok()?, len as u64)?;
        NonNull::new(at.cast_mut())
    }
}

impl Mapped {
    fn bytes(&self, phys: u64, len: usize) -> Option<&'static [u8]> {
        let at = self.map(phys, len)?;
        // SAFETY: mapped for ever, and the firmware writes its tables no more.
        Some(unsafe { core::slice::from_raw_parts(at.as_ptr(), len) })
    }
}

/// Memory of the firmware's, or `None` where there is none.
pub fn bytes(phys: u64, len: usize) -> Option<&'static [u8]> {
    Mapped.bytes(phys, len)
}

/// Reads the tables that the loader's RSDP or one found in low memory leads to.
pub fn discover(rsdp_addr: Option<u64>) -> Acpi {
    match from_loader(rsdp_addr).or_else(search) {
        Some((at, rsdp)) => {
            log::info!("ACPI: RSDP at {at:#x}, revision {}", rsdp.revision);
            Acpi::read(Mapped, &rsdp)
        }
        None => {
            log::warn!("ACPI: no RSDP; going on with one processor and without power-off");
            Acpi::default()
        }
    }
}

fn from_loader(rsdp_addr: Option<u64>) -> Option<(u64, Rsdp)> {
    let at = rsdp_addr?;
    match Rsdp::parse(Mapped.bytes(at, RSDP_BYTES)?) {
        Ok(rsdp) => Some((at, rsdp)),
        Err(error) => {
            log::warn!("ACPI: the loader said {at:#x}, but {error}; searching low memory");
            None
        }
    }
}

fn search() -> Option<(u64, Rsdp)> {
    let segment = Mapped.bytes(EBDA_POINTER, 2).map_or(0, |b| u64::from(u16::from_le_bytes([b[0], b[1]])));
    let ebda = (0x400..0xa000).contains(&segment).then_some((segment << 4, 1024));
    ebda.into_iter().chain([BIOS_AREA]).find_map(|(start, len)| {
        let (offset, rsdp) = Rsdp::search(Mapped.bytes(start, len)?)?;
        Some((start + offset as u64, rsdp))
    })
}
