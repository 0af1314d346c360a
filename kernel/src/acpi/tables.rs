//! Small tables: HPET (IA-PC HPET specification 1.0a section 3.2.4), MCFG (PCI firmware specification 3.3
//! section 4.1.2) and SPCR (Microsoft, serial port console redirection table, revision 4).

use super::bytes::{u16_at, u32_at, u64_at, u8_at};
use alloc::vec::Vec;

/// Physical address of the high-precision event timer's registers, if the table has one in memory.
pub fn hpet(t: &[u8]) -> Option<u64> {
    const SYSTEM_MEMORY: u8 = 0;
    let address = u64_at(t, 44)?;
    (u8_at(t, 40)? == SYSTEM_MEMORY && address != 0 && address % 4096 == 0).then_some(address)
}

/// First port of the serial port that the firmware uses as console, if it is one like COM1 and in I/O space.
pub fn spcr(t: &[u8]) -> Option<u16> {
    const SYSTEM_IO: u8 = 1;
    /// 16550, its subset of before, and one that is described by its generic address.
    const INTERFACES: [u8; 3] = [0, 1, 0x12];
    let known = INTERFACES.contains(&u8_at(t, 36)?) && u8_at(t, 40)? == SYSTEM_IO;
    let port = u16::try_from(u64_at(t, 44)?).ok()?;
    // Eight registers follow each other.
    (known && port != 0 && port <= u16::MAX - 7).then_some(port)
}

/// PCI Express configuration space of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciSegment {
    /// Physical address that bus 0 would have.
    pub address: u64,
    /// Segment number.
    pub segment: u16,
    /// First bus.
    pub first_bus: u8,
    /// Last bus.
    pub last_bus: u8,
}

/// The segments of an MCFG; entries that make no sense are left out.
pub fn mcfg(t: &[u8]) -> Vec<PciSegment> {
    const FIRST: usize = 44;
    const ENTRY_BYTES: usize = 16;
    let entries = t.get(FIRST..).unwrap_or_default();
    let entry = |e: &[u8]| {
        let segment = PciSegment {
            address: u64_at(e, 0)?,
            segment: u16_at(e, 8)?,
            first_bus: u8_at(e, 10)?,
            last_bus: u8_at(e, 11)?,
        };
        let sane = segment.address != 0
            && segment.address.is_multiple_of(1 << 20)
            && segment.first_bus <= segment.last_bus;
        sane.then_some(segment)
    };
    entries.chunks_exact(ENTRY_BYTES).filter_map(entry).collect()
}

/// Length that a table's header claims.
pub(super) fn length(header: &[u8]) -> Option<u32> {
    u32_at(header, 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hpet_is_in_memory_or_absent() {
        let mut t = vec![0; 56];
        t[44..52].copy_from_slice(&0xfed0_0000u64.to_le_bytes());
        assert_eq!(hpet(&t), Some(0xfed0_0000));
        t[40] = 1;
        assert_eq!(hpet(&t), None, "in I/O space");
        t[40] = 0;
        t[44] = 1;
        assert_eq!(hpet(&t), None, "misaligned");
        assert_eq!(hpet(&t[..51]), None);
    }

    #[test]
    fn a_console_is_a_16550_in_io_space() {
        let table = |interface: u8, space: u8, address: u64| {
            let mut t = vec![0; 80];
            (t[36], t[40]) = (interface, space);
            t[44..52].copy_from_slice(&address.to_le_bytes());
            t
        };
        assert_eq!(spcr(&table(0, 1, 0x3f8)), Some(0x3f8));
        assert_eq!(spcr(&table(0x12, 1, 0xe060)), Some(0xe060));
        for (interface, space, address) in
            [(3, 1, 0x3f8), (0, 0, 0xfe03_0000), (0, 1, 0), (0, 1, 0x1_0000), (0, 1, 0xfff9)]
        {
            assert_eq!(spcr(&table(interface, space, address)), None);
        }
        assert_eq!(spcr(&table(0, 1, 0x3f8)[..51]), None);
    }

    #[test]
    fn mcfg_entries_are_checked() {
        let entry = |address: u64, segment: u16, first: u8, last: u8| {
            let mut e = address.to_le_bytes().to_vec();
            e.extend(segment.to_le_bytes());
            e.extend([first, last, 0, 0, 0, 0]);
            e
        };
        let mut t = vec![0; 44];
        t.extend(entry(0xb000_0000, 0, 0, 255));
        t.extend(entry(0, 1, 0, 255));
        t.extend(entry(0xc000_0000, 2, 9, 3));
        t.extend(&entry(0xc000_0000, 3, 0, 3)[..15]);
        assert_eq!(mcfg(&t), [PciSegment { address: 0xb000_0000, segment: 0, first_bus: 0, last_bus: 255 }]);
        assert_eq!(mcfg(&[]), []);
    }
}
