//! The firmware's ACPI tables. What is broken is named in the log and does without; nothing here can panic.
// Gives the acpi crate the firmware's memory as pointers.
#![allow(unsafe_code)]

mod bytes;
mod fadt;
mod list;
mod madt;
mod rsdp;
mod tables;

#[cfg(target_os = "none")]
mod firmware;

pub use fadt::{sleep_type_s5, Absent, Fadt, SleepType};
pub use list::TableInfo;
pub use madt::{IoApic, Madt, Override, Processor};
pub use rsdp::{Rsdp, RsdpError, V2_BYTES as RSDP_BYTES};
pub use tables::{hpet, mcfg, spcr, PciSegment};

#[cfg(target_os = "none")]
pub use firmware::{bytes as firmware_bytes, discover};

use ::acpi::sdt::{SdtHeader, Signature};
use ::acpi::{AcpiError, AcpiHandler, AcpiResult, AcpiTable, AcpiTables, PhysicalMapping};
use alloc::vec::Vec;
use core::mem::size_of;
use core::ptr::NonNull;

/// No sane table is larger.
const MAX_TABLE_BYTES: usize = 16 << 20;

/// What the tables say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acpi {
    /// Processors and interrupt controllers.
    pub madt: Option<Madt>,
    /// Fixed hardware.
    pub fadt: Option<Fadt>,
    /// Physical address of the HPET.
    pub hpet: Option<u64>,
    /// PCI Express configuration spaces.
    pub pci_segments: Vec<PciSegment>,
    /// How to enter S5.
    pub s5: Option<SleepType>,
    /// First port of the firmware's serial console.
    pub serial_console: Option<u16>,
    /// Every table there is.
    pub tables: Vec<TableInfo>,
}

/// All it takes to switch the machine off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerOff {
    /// Port of PM1a control.
    pub pm1a_control: u16,
    /// Port of PM1b control.
    pub pm1b_control: Option<u16>,
    /// What to write there.
    pub sleep_type: SleepType,
    /// Port and value that switch to ACPI mode first.
    pub acpi_enable: Option<(u16, u8)>,
}

impl Acpi {
    /// Reads the tables that `rsdp` leads to. Tables that are absent or broken leave their fields empty.
    pub fn read<M: FirmwareMemory>(memory: M, rsdp: &Rsdp) -> Self {
        let list = list::list(&memory, rsdp);
        let memory = Handler(memory);
        let (revision, root) = match rsdp.xsdt {
            0 => (0, u64::from(rsdp.rsdt)),
            xsdt => (rsdp.revision, xsdt),
        };
        // SAFETY: the handler maps whatever is really there, and zeros otherwise.
        let tables = match unsafe { AcpiTables::from_rsdt(memory.clone(), revision, root as usize) } {
            Ok(tables) => tables,
            Err(error) => {
                log::warn!("ACPI: the table of tables at {root:#x} is broken: {error:?}");
                return Self { tables: list, ..Self::default() };
            }
        };
        let fadt = find::<M, FadtTable>(&tables).and_then(|t| Fadt::parse(t.bytes()));
        let dsdt = fadt.filter(|fadt| fadt.dsdt != 0).and_then(|fadt| memory.table::<DsdtTable>(fadt.dsdt));
        Self {
            madt: find::<M, MadtTable>(&tables).and_then(|t| Madt::parse(t.bytes())),
            hpet: find::<M, HpetTable>(&tables).and_then(|t| hpet(t.bytes())),
            pci_segments: find::<M, McfgTable>(&tables).map_or(Vec::new(), |t| mcfg(t.bytes())),
            serial_console: find::<M, SpcrTable>(&tables).and_then(|t| spcr(t.bytes())),
            tables: list,
            s5: dsdt.and_then(|t| sleep_type_s5(t.bytes().get(size_of::<SdtHeader>()..)?)),
            fadt,
        }
    }

    /// The devices of old PCs that the machine lacks; none if the tables do not tell.
    pub fn absent(&self) -> Absent {
        self.fadt.map_or(Absent::default(), |fadt| fadt.absent)
    }

    /// How to switch the machine off, if the tables tell.
    pub fn power_off(&self) -> Option<PowerOff> {
        let fadt = self.fadt?;
        Some(PowerOff {
            pm1a_control: fadt.pm1a_control?,
            pm1b_control: fadt.pm1b_control,
            sleep_type: self.s5?,
            acpi_enable: fadt.acpi_enable,
        })
    }
}

/// The firmware's memory.
pub trait FirmwareMemory: Clone {
    /// Where `len` bytes from `phys` on can be read from now on, or `None` if there is no such memory.
    fn map(&self, phys: u64, len: usize) -> Option<NonNull<u8>>;
}

/// Answers the acpi crate's requests, whatever they ask for: what cannot be mapped, or claims an absurd length, reads
/// as zeros, which are no valid table.
#[derive(Clone)]
struct Handler<M>(M);

/// Zeros as large as any fixed structure the crate asks for.
#[repr(align(16))]
struct Zeros([u8; 4096]);
static ZEROS: Zeros = Zeros([0; 4096]);

impl<M: FirmwareMemory> Handler<M> {
    /// The memory at `phys`; a table's header only if its length is one a table can have and all of it is there.
    fn checked(&self, phys: u64, len: usize) -> Option<NonNull<u8>> {
        let at = self.0.map(phys, len)?;
        if len == size_of::<SdtHeader>() {
            // SAFETY: `map` made `len` bytes readable.
            let header = unsafe { core::slice::from_raw_parts(at.as_ptr(), len) };
            let claimed = tables::length(header)? as usize;
            if !(size_of::<SdtHeader>()..=MAX_TABLE_BYTES).contains(&claimed) {
                return None;
            }
            self.0.map(phys, claimed)?;
        }
        Some(at)
    }

    /// A table by its address, for the DSDT, which no list names. Its checksum counts.
    fn table<T: AcpiTable>(&self, phys: u64) -> Option<PhysicalMapping<Self, T>> {
        // SAFETY: `map_physical_region` bears any address.
        let header = unsafe { self.map_physical_region::<SdtHeader>(phys as usize, size_of::<SdtHeader>()) };
        let length = header.length as usize;
        if header.signature != T::SIGNATURE || length < size_of::<T>() {
            log::warn!("ACPI: no {} at {phys:#x}", T::SIGNATURE);
            return None;
        }
        // SAFETY: as above; a table's first part was checked to have this length.
        let table = unsafe { self.map_physical_region::<T>(phys as usize, length) };
        match table.get().validate() {
            Ok(()) => Some(table),
            Err(error) => {
                log::warn!("ACPI: the {} at {phys:#x} is broken: {error:?}", T::SIGNATURE);
                None
            }
        }
    }
}

impl<M: FirmwareMemory> AcpiHandler for Handler<M> {
    unsafe fn map_physical_region<T>(
        &self,
        physical_address: usize,
        size: usize,
    ) -> PhysicalMapping<Self, T> {
        let zeros = NonNull::from(&ZEROS.0).cast::<u8>();
        // The crate validates a table over its whole length before anything else reads it, and takes that length
        // from a header that `checked` has seen.
        let (at, size) = match self.checked(physical_address as u64, size) {
            Some(at) => (at, size),
            None => (zeros, size.min(ZEROS.0.len())),
        };
        // SAFETY: `size` bytes at `at` are readable for ever.
        unsafe { PhysicalMapping::new(physical_address, at.cast(), size, size, self.clone()) }
    }

    fn unmap_physical_region<T>(_region: &PhysicalMapping<Self, T>) {}
}

/// A table as bytes: nothing of it is believed before a parser has looked.
trait Table: AcpiTable {}

macro_rules! table {
    ($name:ident, $signature:ident) => {
        #[repr(transparent)]
        struct $name {
            header: SdtHeader,
        }

        // SAFETY: only the header, which every table has.
        unsafe impl AcpiTable for $name {
            const SIGNATURE: Signature = Signature::$signature;

            fn header(&self) -> &SdtHeader {
                &self.header
            }
        }

        impl Table for $name {}
    };
}

table!(MadtTable, MADT);
table!(FadtTable, FADT);
table!(HpetTable, HPET);
table!(McfgTable, MCFG);
table!(SpcrTable, SPCR);
table!(DsdtTable, DSDT);

/// All bytes of a validated table.
trait Bytes {
    fn bytes(&self) -> &[u8];
}

impl<M: FirmwareMemory, T: Table> Bytes for PhysicalMapping<Handler<M>, T> {
    fn bytes(&self) -> &[u8] {
        // SAFETY: the whole region was mapped and checksummed.
        unsafe { core::slice::from_raw_parts(self.virtual_start().as_ptr().cast(), self.region_length()) }
    }
}

fn find<M: FirmwareMemory, T: Table>(
    tables: &AcpiTables<Handler<M>>,
) -> Option<PhysicalMapping<Handler<M>, T>> {
    let found: AcpiResult<_> = tables.find_table::<T>();
    match found {
        Ok(table) => Some(table),
        Err(AcpiError::TableMissing(_)) => None,
        Err(error) => {
            log::warn!("ACPI: the {} is broken: {error:?}", T::SIGNATURE);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::sync::Arc;

    /// Regions of memory by address.
    #[derive(Clone, Default)]
    struct Fake(Arc<BTreeMap<u64, Vec<u8>>>);

    impl FirmwareMemory for Fake {
        fn map(&self, phys: u64, len: usize) -> Option<NonNull<u8>> {
            let (start, bytes) = self.0.range(..=phys).next_back()?;
            let bytes = bytes.get((phys - start) as usize..)?.get(..len)?;
            NonNull::new(bytes.as_ptr().cast_mut())
        }
    }

    fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut t = vec![0; 36];
        t[..4].copy_from_slice(signature);
        t.extend_from_slice(body);
        let len = t.len() as u32;
        t[4..8].copy_from_slice(&len.to_le_bytes());
        t[8] = 1;
        fix(t)
    }

    fn fix(mut t: Vec<u8>) -> Vec<u8> {
        t[9] = 0;
        t[9] = 0u8.wrapping_sub(t.iter().fold(0, |s: u8, x| s.wrapping_add(*x)));
        t
    }

    const XSDT: u64 = 0x1000;
    const RSDP: Rsdp = Rsdp { revision: 2, rsdt: 0, xsdt: XSDT };

    fn machine() -> BTreeMap<u64, Vec<u8>> {
        let mut fadt = vec![0; 80];
        fadt[4..8].copy_from_slice(&0x5000u32.to_le_bytes());
        fadt[28..32].copy_from_slice(&0x604u32.to_le_bytes());
        let mut madt = vec![0; 8];
        madt.extend([0, 8, 0, 0, 1, 0, 0, 0]);
        let mut hpet = vec![0; 20];
        hpet[8..16].copy_from_slice(&0xfed0_0000u64.to_le_bytes());
        let pointers: Vec<u8> = [0x2000u64, 0x3000, 0x4000].iter().flat_map(|a| a.to_le_bytes()).collect();
        [
            (XSDT, table(b"XSDT", &pointers)),
            (0x2000, table(b"FACP", &fadt)),
            (0x3000, table(b"APIC", &madt)),
            (0x4000, table(b"HPET", &hpet)),
            (0x5000, table(b"DSDT", b"\x08_S5_\x12\x06\x04\x0a\x05\x00\x00")),
        ]
        .into()
    }

    fn read(machine: BTreeMap<u64, Vec<u8>>) -> Acpi {
        Acpi::read(Fake(Arc::new(machine)), &RSDP)
    }

    #[test]
    fn a_whole_machine_is_read() {
        let acpi = read(machine());
        assert_eq!(acpi.madt.as_ref().unwrap().processors.len(), 1);
        assert_eq!(acpi.hpet, Some(0xfed0_0000));
        assert_eq!(acpi.s5, Some(SleepType { a: 5, b: 0 }));
        let power_off = acpi.power_off().unwrap();
        assert_eq!((power_off.pm1a_control, power_off.acpi_enable), (0x604, None));
        assert!(acpi.pci_segments.is_empty() && acpi.serial_console.is_none());
        let listed: Vec<_> = acpi.tables.iter().map(|t| (&t.signature, t.address, t.checksum_ok)).collect();
        assert_eq!(
            listed,
            [
                (b"XSDT", XSDT, true),
                (b"FACP", 0x2000, true),
                (b"DSDT", 0x5000, true),
                (b"APIC", 0x3000, true),
                (b"HPET", 0x4000, true)
            ]
        );
    }

    #[test]
    fn acpi_1_uses_32_bit_pointers() {
        let mut m = machine();
        let pointers: Vec<u8> = [0x3000u32, 0x4000].iter().flat_map(|a| a.to_le_bytes()).collect();
        m.insert(0x8000, table(b"RSDT", &pointers));
        let acpi = Acpi::read(Fake(Arc::new(m)), &Rsdp { revision: 0, rsdt: 0x8000, xsdt: 0 });
        assert!(acpi.madt.is_some() && acpi.fadt.is_none() && acpi.power_off().is_none());
    }

    #[test]
    fn one_broken_table_leaves_the_others() {
        for at in [0x2000u64, 0x3000, 0x4000, 0x5000] {
            let mut m = machine();
            m.get_mut(&at).unwrap()[20] ^= 1;
            let acpi = read(m);
            assert_eq!(acpi.fadt.is_some(), at != 0x2000);
            assert_eq!(acpi.madt.is_some(), at != 0x3000);
            assert_eq!(acpi.hpet.is_some(), at != 0x4000);
            assert_eq!(acpi.s5.is_some(), at != 0x5000 && at != 0x2000);
            assert!(acpi.tables.iter().all(|table| table.checksum_ok == (table.address != at)), "{at:#x}");
        }
    }

    #[test]
    fn absurd_lengths_and_addresses_are_survived() {
        for at in [XSDT, 0x2000, 0x3000, 0x5000] {
            for length in [0u32, 1, 35, 36, 37, 4097, 1 << 24, u32::MAX] {
                let mut m = machine();
                let t = m.get_mut(&at).unwrap();
                t[4..8].copy_from_slice(&length.to_le_bytes());
                let t = fix(t.clone());
                m.insert(at, t);
                let acpi = read(m);
                assert!(acpi.madt.is_none() || at != XSDT);
            }
        }
        for root in [0u64, 1, 0x9999_9999, u64::MAX] {
            let rsdp = Rsdp { xsdt: root.max(1), ..RSDP };
            assert_eq!(Acpi::read(Fake(Arc::new(machine())), &rsdp), Acpi::default());
        }
        let mut m = machine();
        let pointers: Vec<u8> =
            [0u64, u64::MAX, 0x3000, 0x1234].iter().flat_map(|a| a.to_le_bytes()).collect();
        m.insert(XSDT, table(b"XSDT", &pointers[..30]));
        assert!(read(m).madt.is_some());
    }
}
