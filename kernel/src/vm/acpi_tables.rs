//! The ACPI tables of a guest, which tell it what the chipset is and where.
//!
//! Source: ACPI 6.5: RSDP 5.2.5.3, XSDT 5.2.8, FADT 5.2.9, FACS 5.2.10, MADT 5.2.12; MCFG: PCI Firmware
//! Specification 3.2, table 4-2. What is built here describes `devices::chipset` and `layout`, nothing else: every
//! address comes from there.
//!
//! - SMI_CMD is 0, so the guest finds the machine in ACPI mode and never asks for a hand-over.
//! - There is no power and no sleep button, no keyboard controller, no VGA and no general-purpose event.
//! - IRQ0 arrives at I/O APIC input 2; the SCI is level triggered and active high.

use super::layout::{
    ACPI_END, ACPI_START, ECAM_SIZE, ECAM_START, FW_CFG_PORT, IOAPIC_START, LAPIC_START, PCI_HOLE_START,
    PM1A_CNT, PM1A_EVT, PM_TMR, RESET_PORT, S5_SLP_TYP, SCI_IRQ,
};
use super::ram::{BadGpa, GuestRam};
use crate::devices::chipset::COM1;
use crate::devices::{pci, pic, rtc, sysctl};
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, Interrupt, Memory32Fixed, Name, Package, Path,
    ResourceTemplate, Scope, IO,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{self, AccessSize, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use alloc::format;
use alloc::vec::Vec;
use core::fmt;

const OEM_ID: [u8; 6] = *b"UMBRA ";
const OEM_TABLE_ID: [u8; 8] = *b"UMBRAVM ";
const OEM_REVISION: u32 = 1;

/// Value that resets when written to the reset register.
const RESET_VALUE: u8 = 0x06;
/// FADT IAPC_BOOT_ARCH: ISA devices exist, no VGA, no PCIe active state power management. Bit 1 (8042) is clear.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2 | 1 << 4;
/// Latencies above these mean that there is no C2 and no C3 state.
const NO_C2_LATENCY_US: u16 = 101;
const NO_C3_LATENCY_US: u16 = 1001;

/// MADT flag: the PC also has 8259s.
const PCAT_COMPAT: u32 = 1 << 0;
/// MADT entries for APIC ids that a byte can hold; 255 is the broadcast.
const XAPIC_IDS: u32 = 255;
const APIC_ENABLED: u32 = 1 << 0;
/// MPS INTI flags: as the bus says; and active high, level triggered.
const INTI_CONFORMS: u16 = 0;
const INTI_HIGH_LEVEL: u16 = 0b11 << 2 | 0b01;
/// Most CPUs that the tables can name.
const MAX_CPUS: u32 = 0x1000;

const COM1_IRQ: u32 = 4;
const RTC_IRQ: u32 = 8;

/// Why there are no tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AcpiError {
    /// More CPUs than the tables can name; how many.
    TooManyCpus(u32),
    /// The tables do not fit into their area; where they would end.
    NoRoom(u64),
    /// The area is not RAM.
    NotRam(BadGpa),
}

impl fmt::Display for AcpiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManyCpus(cpus) => {
                write!(f, "ACPI tables for {cpus} CPUs; at most {MAX_CPUS} can be named")
            }
            Self::NoRoom(end) => write!(f, "ACPI tables would end at {end:#x}, beyond {ACPI_END:#x}"),
            Self::NotRam(bad) => write!(f, "no RAM for ACPI tables: {bad}"),
        }
    }
}

/// Writes the tables of a VM with `cpus` CPUs (APIC ids 0 to `cpus` - 1) to `ACPI_START`; returns the address of
/// the RSDP. Allocates: meant for the time before the VM runs.
pub fn write_tables(ram: &dyn GuestRam, cpus: u32) -> Result<u64, AcpiError> {
    if cpus > MAX_CPUS {
        return Err(AcpiError::TooManyCpus(cpus));
    }
    let mut area = Area { ram, next: ACPI_START + Rsdp::len() as u64 };
    let facs = area.place(&bytes(&FACS::new()), 64)?;
    let dsdt = area.place(dsdt(cpus).as_slice(), 16)?;
    let fadt = area.place(&fadt(facs, dsdt), 16)?;
    let madt = area.place(madt(cpus).as_slice(), 16)?;
    let mcfg = area.place(&mcfg(), 16)?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = area.place(&bytes(&xsdt), 16)?;
    ram.write(ACPI_START, &bytes(&Rsdp::new(OEM_ID, xsdt))).map_err(AcpiError::NotRam)?;
    Ok(ACPI_START)
}

/// The part of the area that is still free.
struct Area<'a> {
    ram: &'a dyn GuestRam,
    next: u64,
}

impl Area<'_> {
    /// Copies a table to the next address that is a multiple of `align`; returns the address.
    fn place(&mut self, table: &[u8], align: u64) -> Result<u64, AcpiError> {
        let start = self.next.next_multiple_of(align);
        let end = start + table.len() as u64;
        if end > ACPI_END {
            return Err(AcpiError::NoRoom(end));
        }
        self.ram.write(start, table).map_err(AcpiError::NotRam)?;
        self.next = end;
        Ok(start)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A register block in I/O space.
fn io_block(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(gas::AddressSpace::SystemIo, bits, 0, access, port.into())
}

fn fadt(facs: u64, dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    // The area lies below 1 MiB, so both halves of each pair can tell. FIRMWARE_CTRL and its X form exclude each
    // other.
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = u16::from(SCI_IRQ).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = io_block(PM1A_EVT, 32, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(PM1A_CNT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = io_block(PM1A_CNT, 16, AccessSize::WordAccess);
    fadt.pm_tmr_blk = u32::from(PM_TMR).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = io_block(PM_TMR, 32, AccessSize::DwordAccess);
    fadt.p_lvl2_lat = NO_C2_LATENCY_US.into();
    fadt.p_lvl3_lat = NO_C3_LATENCY_US.into();
    fadt.century = rtc::CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = io_block(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    bytes(&fadt.finalize())
}

fn madt(cpus: u32) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, LAPIC_START as u32);
    madt.write_u32(40, PCAT_COMPAT);
    let mut entries = Vec::new();
    for id in 0..cpus {
        if id < XAPIC_IDS {
            // Processor local APIC: type 0, UID, APIC id, flags.
            entries.extend_from_slice(&[0, 8, id as u8, id as u8]);
            entries.extend_from_slice(&APIC_ENABLED.to_le_bytes());
        } else {
            // Processor local x2APIC: type 9, APIC id, flags, UID.
            entries.extend_from_slice(&[9, 16, 0, 0]);
            for field in [id, APIC_ENABLED, id] {
                entries.extend_from_slice(&field.to_le_bytes());
            }
        }
    }
    // I/O APIC: type 1, id, address, first global interrupt.
    entries.extend_from_slice(&[1, 12, 0, 0]);
    entries.extend_from_slice(&(IOAPIC_START as u32).to_le_bytes());
    entries.extend_from_slice(&0u32.to_le_bytes());
    // Interrupt source overrides: type 2, ISA bus, IRQ, global interrupt, flags.
    for (irq, gsi, flags) in [(0, 2, INTI_CONFORMS), (SCI_IRQ, u32::from(SCI_IRQ), INTI_HIGH_LEVEL)] {
        entries.extend_from_slice(&[2, 10, 0, irq]);
        entries.extend_from_slice(&gsi.to_le_bytes());
        entries.extend_from_slice(&flags.to_le_bytes());
    }
    // NMI at LINT1 of every CPU: type 4, UID (all), flags, pin; type 10 for CPUs with an x2APIC entry.
    entries.extend_from_slice(&[4, 6, 0xff]);
    entries.extend_from_slice(&INTI_CONFORMS.to_le_bytes());
    entries.push(1);
    if cpus > XAPIC_IDS {
        entries.extend_from_slice(&[10, 12]);
        entries.extend_from_slice(&INTI_CONFORMS.to_le_bytes());
        entries.extend_from_slice(&u32::MAX.to_le_bytes());
        entries.extend_from_slice(&[1, 0, 0, 0]);
    }
    madt.append_slice(&entries);
    madt
}

fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, last_bus());
    bytes(&mcfg)
}

/// The last PCI bus that ECAM reaches: 1 MiB is one bus.
const fn last_bus() -> u8 {
    (ECAM_SIZE / (1 << 20) - 1) as u8
}

/// The differentiated system description table: sleep state, CPUs, host bridge, and what sits behind ISA ports.
fn dsdt(cpus: u32) -> Sdt {
    let s5: [&dyn Aml; 4] = [&S5_SLP_TYP, &S5_SLP_TYP, &0u8, &0u8];
    let s5 = Name::new(Path::new("\\_S5_"), &Package::new(s5.to_vec()));
    let devices: Vec<RawAml> = (0..cpus).map(cpu).chain([host_bridge(), motherboard()]).collect();
    let scope = Scope::new(Path::new("\\_SB_"), devices.iter().map(|device| device as &dyn Aml).collect());
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&bytes(&s5));
    dsdt.append_slice(&bytes(&scope));
    dsdt
}

/// The device of a CPU, whose UID is the one in the MADT.
fn cpu(id: u32) -> RawAml {
    device(&format!("C{id:03X}"), &[&name("_HID", &"ACPI0007"), &name("_UID", &id)])
}

fn host_bridge() -> RawAml {
    let memory = |start: u64, end: u64| {
        let cacheable = AddressSpaceCacheable::NotCacheable;
        AddressSpace::new_memory(cacheable, true, start as u32, (end - 1) as u32, None)
    };
    let windows = resources(&[
        &AddressSpace::new_bus_number(0u16, last_bus().into()),
        &ports(pci::CONFIG_ADDRESS, 8),
        &AddressSpace::new_io(0u16, 0xcf7, None),
        &AddressSpace::new_io(0xd00u16, 0xffff, None),
        &memory(PCI_HOLE_START, ECAM_START),
        &memory(ECAM_START + ECAM_SIZE, IOAPIC_START),
    ]);
    device(
        "PCI0",
        &[
            &name("_HID", &EISAName::new("PNP0A08")),
            &name("_CID", &EISAName::new("PNP0A03")),
            &name("_UID", &0u8),
            &name("_SEG", &0u8),
            &name("_BBN", &0u8),
            &name("_CRS", &windows),
            &isa_device("COM1", &EISAName::new("PNP0501"), 1, &[&ports(COM1, 8), &isa_irq(COM1_IRQ)]),
            &isa_device("RTC_", &EISAName::new("PNP0B00"), 0, &[&ports(rtc::INDEX, 2), &isa_irq(RTC_IRQ)]),
            &isa_device("FWCF", &"QEMU0002", 0, &[&ports(FW_CFG_PORT, 12)]),
        ],
    )
}

/// What no driver claims: ECAM (without this Linux does not trust the MCFG) and the system ports.
fn motherboard() -> RawAml {
    isa_device(
        "MBRD",
        &EISAName::new("PNP0C02"),
        0,
        &[
            &Memory32Fixed::new(true, ECAM_START as u32, ECAM_SIZE as u32),
            &ports(PM1A_EVT, (PM_TMR + 4 - PM1A_EVT) as u8),
            &ports(pic::ELCR_MASTER, 2),
            &ports(sysctl::PORT_B, 1),
            &ports(sysctl::POST, 1),
            &ports(sysctl::PORT_A, 1),
        ],
    )
}

/// A device that is present and works, with fixed resources.
fn isa_device(id: &str, hid: &dyn Aml, uid: u8, fixed: &[&dyn Aml]) -> RawAml {
    let status = 0x0fu8;
    device(
        id,
        &[&name("_HID", hid), &name("_UID", &uid), &name("_STA", &status), &name("_CRS", &resources(fixed))],
    )
}

/// An ISA interrupt: edge triggered, active high, not shared.
fn isa_irq(irq: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, irq)
}

/// `len` I/O ports from `first`.
fn ports(first: u16, len: u8) -> IO {
    IO::new(first, first, 1, len)
}

fn name(name: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(name), value)
}

fn device(id: &str, children: &[&dyn Aml]) -> RawAml {
    RawAml(bytes(&Device::new(Path::new(id), children.to_vec())))
}

fn resources(items: &[&dyn Aml]) -> RawAml {
    RawAml(bytes(&ResourceTemplate::new(items.to_vec())))
}

/// AML that is encoded already, so that it can outlive what it was made from.
struct RawAml(Vec<u8>);

impl Aml for RawAml {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Ram;

    /// Tables found by walking memory as a guest does.
    struct Found {
        ram: Vec<u8>,
        tables: Vec<(usize, usize)>,
    }

    impl Found {
        fn u16(&self, at: usize) -> u16 {
            u16::from_le_bytes(self.ram[at..at + 2].try_into().unwrap())
        }

        fn u32(&self, at: usize) -> u32 {
            u32::from_le_bytes(self.ram[at..at + 4].try_into().unwrap())
        }

        fn u64(&self, at: usize) -> u64 {
            u64::from_le_bytes(self.ram[at..at + 8].try_into().unwrap())
        }

        fn sum(&self, at: usize, len: usize) -> u8 {
            self.ram[at..at + len].iter().fold(0, |sum, &byte| sum.wrapping_add(byte))
        }

        /// Notes a range and checks that it lies in the area.
        fn claim(&mut self, at: usize, len: usize) {
            assert!(at as u64 >= ACPI_START && (at + len) as u64 <= ACPI_END, "{at:#x}+{len:#x}");
            self.tables.push((at, len));
        }

        fn table(&mut self, at: u64, signature: &[u8; 4]) -> usize {
            let at = at as usize;
            assert_eq!(&self.ram[at..at + 4], signature);
            let len = self.u32(at + 4) as usize;
            assert_eq!(self.sum(at, len), 0, "checksum of {}", String::from_utf8_lossy(signature));
            self.claim(at, len);
            at
        }

        fn slice(&self, at: usize) -> &[u8] {
            &self.ram[at..at + self.u32(at + 4) as usize]
        }
    }

    struct Tables {
        found: Found,
        fadt: usize,
        madt: usize,
        mcfg: usize,
        dsdt: usize,
        facs: usize,
    }

    fn walk(cpus: u32) -> Tables {
        let ram = Ram::new(ACPI_END as usize);
        let rsdp = write_tables(&ram, cpus).unwrap() as usize;
        let mut found = Found { ram: ram.0.into_inner(), tables: Vec::new() };
        assert_eq!(rsdp % 16, 0);
        assert_eq!(&found.ram[rsdp..rsdp + 8], b"RSD PTR ");
        assert_eq!((found.sum(rsdp, 20), found.sum(rsdp, 36)), (0, 0));
        assert_eq!((found.ram[rsdp + 15], found.u32(rsdp + 20)), (2, 36));
        found.claim(rsdp, 36);
        let xsdt = found.table(found.u64(rsdp + 24), b"XSDT");
        assert_eq!(found.u32(xsdt + 4), 36 + 3 * 8);
        let fadt = found.table(found.u64(xsdt + 36), b"FACP");
        let madt = found.table(found.u64(xsdt + 44), b"APIC");
        let mcfg = found.table(found.u64(xsdt + 52), b"MCFG");
        assert_eq!(u64::from(found.u32(fadt + 40)), found.u64(fadt + 140), "both DSDT pointers");
        let dsdt = found.table(found.u64(fadt + 140), b"DSDT");
        let facs = found.u32(fadt + 36) as usize;
        assert_eq!(&found.ram[facs..facs + 4], b"FACS");
        found.claim(facs, found.u32(facs + 4) as usize);
        let mut ranges = found.tables.clone();
        ranges.sort();
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "tables overlap");
        Tables { found, fadt, madt, mcfg, dsdt, facs }
    }

    #[test]
    fn every_pointer_leads_to_a_sound_table() {
        for cpus in [0, 1, 2, 64, 255, 256, 1000] {
            let t = walk(cpus);
            assert_eq!(t.facs % 64, 0);
            assert_eq!(t.found.u32(t.facs + 4), 64);
        }
    }

    #[test]
    fn fadt_says_what_the_chipset_is() {
        let Tables { found, fadt, .. } = walk(1);
        assert_eq!(found.u32(fadt + 4), 276);
        assert_eq!(found.u16(fadt + 46), 9, "SCI_INT");
        assert_eq!(found.u32(fadt + 48), 0, "SMI_CMD");
        assert_eq!((found.ram[fadt + 52], found.ram[fadt + 53]), (0, 0), "ACPI_ENABLE, ACPI_DISABLE");
        assert_eq!((found.u32(fadt + 56), found.u32(fadt + 60)), (0x600, 0));
        assert_eq!((found.u32(fadt + 64), found.u32(fadt + 68)), (0x604, 0));
        assert_eq!((found.u32(fadt + 76), found.u32(fadt + 80)), (0x608, 0));
        assert_eq!(found.ram[fadt + 88..fadt + 94], [4, 2, 0, 4, 0, 0], "block lengths");
        assert!(found.u16(fadt + 96) > 100 && found.u16(fadt + 98) > 1000, "neither C2 nor C3");
        assert_eq!(found.ram[fadt + 108], 0x32, "century");
        let boot_arch = found.u16(fadt + 109);
        assert_eq!((boot_arch & 1, boot_arch & 2, boot_arch & 0x20), (1, 0, 0), "ISA, no 8042, an RTC");
        let flags = found.u32(fadt + 112);
        for bit in [0, 2, 4, 5, 8, 10] {
            assert_ne!(flags & 1 << bit, 0, "flag {bit}");
        }
        assert_eq!(flags & 1 << 20, 0, "not hardware-reduced");
        assert_eq!(found.ram[fadt + 116..fadt + 120], [1, 8, 0, 1], "reset register: I/O, a byte");
        assert_eq!((found.u64(fadt + 120), found.ram[fadt + 128]), (0xcf9, 6));
        assert_eq!(found.u64(fadt + 132), 0, "X_FIRMWARE_CTRL");
        for (at, bits, port) in [(148, 32, 0x600), (172, 16, 0x604), (208, 32, 0x608)] {
            assert_eq!((found.ram[fadt + at], found.ram[fadt + at + 1]), (1, bits));
            assert_eq!(found.u64(fadt + at + 4), port);
        }
    }

    /// Type and body of each MADT entry.
    fn madt_entries(t: &Tables) -> Vec<(u8, &[u8])> {
        let mut rest = &t.found.slice(t.madt)[44..];
        let mut entries = Vec::new();
        while let [kind, len, ..] = *rest {
            let (entry, tail) = rest.split_at(len.into());
            entries.push((kind, &entry[2..]));
            rest = tail;
        }
        entries
    }

    #[test]
    fn madt_lists_cpus_and_overrides() {
        let t = walk(2);
        assert_eq!(t.found.u32(t.madt + 36), 0xfee0_0000);
        assert_eq!(t.found.u32(t.madt + 40), 1, "PCAT_COMPAT");
        let expected: [(u8, &[u8]); 6] = [
            (0, &[0, 0, 1, 0, 0, 0]),
            (0, &[1, 1, 1, 0, 0, 0]),
            (1, &[0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]),
            (2, &[0, 0, 2, 0, 0, 0, 0, 0]),
            (2, &[0, 9, 9, 0, 0, 0, 0x0d, 0]),
            (4, &[0xff, 0, 0, 1]),
        ];
        assert_eq!(madt_entries(&t), expected);
    }

    #[test]
    fn apic_ids_from_255_are_x2apic_entries() {
        let t = walk(257);
        let entries = madt_entries(&t);
        let count = |kind| entries.iter().filter(|&&(k, _)| k == kind).count();
        assert_eq!((count(0), count(9), count(10)), (255, 2, 1));
        assert_eq!(entries[256], (9, [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0].as_slice()));
    }

    #[test]
    fn mcfg_names_the_ecam_window() {
        let Tables { found, mcfg, .. } = walk(1);
        assert_eq!(found.u32(mcfg + 4), 60);
        assert_eq!(found.u64(mcfg + 44), ECAM_START);
        assert_eq!(found.ram[mcfg + 52..mcfg + 56], [0, 0, 0, 0], "segment 0, bus 0 only");
    }

    #[test]
    fn dsdt_has_sleep_state_and_devices() {
        let t = walk(3);
        let dsdt = t.found.slice(t.dsdt);
        let has = |needle: &[u8]| dsdt.windows(needle.len()).any(|window| window == needle);
        assert!(has(b"\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x05"), "_S5_ is Package {{5, 5, ..}}");
        for name in ["PCI0", "COM1", "RTC_", "FWCF", "MBRD", "C000", "C001", "C002"] {
            assert!(has(name.as_bytes()), "{name}");
        }
        assert!(!has(b"C003"));
        assert!(has(&[0x47, 1, 0xf8, 0x03, 0xf8, 0x03, 1, 8]), "COM1's ports");
        assert!(has(&[0x89, 6, 0, 0x03, 1, 4, 0, 0, 0]), "COM1's interrupt: edge, active high");
        assert!(has(&[0x86, 9, 0, 1, 0, 0, 0, 0xe0, 0, 0, 0x10, 0]), "ECAM is reserved");
    }

    #[test]
    fn too_much_is_an_error() {
        let ram = Ram::new(ACPI_END as usize);
        assert_eq!(write_tables(&ram, 0x1001), Err(AcpiError::TooManyCpus(0x1001)));
        assert!(matches!(write_tables(&ram, 0x1000), Err(AcpiError::NoRoom(end)) if end > ACPI_END));
        let small = Ram::new(ACPI_START as usize + 128);
        assert!(matches!(write_tables(&small, 1), Err(AcpiError::NotRam(_))));
    }

    /// Writes the tables where a disassembler finds them: `UMBRA_ACPI_DUMP=dir cargo test -p kernel acpi_dump`.
    #[test]
    fn acpi_dump() {
        let t = walk(2);
        for (name, at) in [("facp", t.fadt), ("apic", t.madt), ("mcfg", t.mcfg), ("dsdt", t.dsdt)] {
            let table = t.found.slice(at);
            assert!(table.len() >= 36);
            if let Some(dir) = std::env::var_os("UMBRA_ACPI_DUMP") {
                std::fs::write(std::path::Path::new(&dir).join(format!("{name}.dat")), table).unwrap();
            }
        }
    }
}
