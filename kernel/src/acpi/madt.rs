//! Processors and interrupt controllers. ACPI 6.5 section 5.2.12.

use super::bytes::{u16_at, u32_at, u64_at, u8_at};
use alloc::vec::Vec;

/// Where the list of structures begins.
const FIRST: usize = 44;
/// More processors, or controllers, than any machine has; those beyond are not looked at.
const MAX_LISTED: usize = 4096;

/// The multiple APIC description table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Madt {
    /// Physical address of the local APICs' registers.
    pub local_apic: u64,
    /// The machine also has two 8259s.
    pub has_8259: bool,
    /// Processors in the table's order, also those that are disabled.
    pub processors: Vec<Processor>,
    /// I/O APICs.
    pub io_apics: Vec<IoApic>,
    /// ISA interrupts that do not arrive at the input of their number.
    pub overrides: Vec<Override>,
    /// A structure was cut off or too short; what came before it counts.
    pub malformed: bool,
}

/// One logical processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    /// Local APIC or x2APIC id.
    pub apic_id: u32,
    /// ACPI processor UID.
    pub uid: u32,
    /// Usable.
    pub enabled: bool,
    /// May become usable by hot plug.
    pub online_capable: bool,
}

/// One I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Its id.
    pub id: u8,
    /// Physical address of its registers.
    pub address: u32,
    /// First global system interrupt.
    pub gsi_base: u32,
}

/// An interrupt source override.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Override {
    /// ISA interrupt.
    pub irq: u8,
    /// Global system interrupt that it arrives at.
    pub gsi: u32,
    /// MPS INTI flags: polarity and trigger mode.
    pub flags: u16,
}

impl Madt {
    /// Reads the table, header included.
    pub fn parse(table: &[u8]) -> Option<Self> {
        let mut madt = Self {
            local_apic: u64::from(u32_at(table, 36)?),
            has_8259: u32_at(table, 40)? & 1 != 0,
            ..Self::default()
        };
        let mut rest = table.get(FIRST..)?;
        while !rest.is_empty() {
            let len = u8_at(rest, 1).map_or(0, usize::from);
            let Some(structure) = rest.get(..len).filter(|s| s.len() >= 2) else {
                madt.malformed = true;
                break;
            };
            madt.malformed |= madt.add(structure).is_none();
            rest = &rest[len..];
        }
        Some(madt)
    }

    /// Takes in one structure; `None` if it is too short for its type.
    fn add(&mut self, s: &[u8]) -> Option<()> {
        match s[0] {
            // Section 5.2.12.2, processor local APIC. The id of all ones is the broadcast, and no processor's.
            0 if u8_at(s, 3)? == 0xff => _ = u32_at(s, 4)?,
            0 => self.add_processor(u32::from(u8_at(s, 3)?), u32::from(u8_at(s, 2)?), u32_at(s, 4)?),
            // Section 5.2.12.3.
            1 => {
                let io_apic = IoApic { id: u8_at(s, 2)?, address: u32_at(s, 4)?, gsi_base: u32_at(s, 8)? };
                add(&mut self.io_apics, io_apic);
            }
            // Section 5.2.12.5.
            2 => {
                let moved = Override { irq: u8_at(s, 3)?, gsi: u32_at(s, 4)?, flags: u16_at(s, 8)? };
                add(&mut self.overrides, moved);
            }
            // Section 5.2.12.8, local APIC address override.
            5 => self.local_apic = u64_at(s, 4)?,
            // Section 5.2.12.12, processor local x2APIC.
            9 => self.add_processor(u32_at(s, 4)?, u32_at(s, 12)?, u32_at(s, 8)?),
            _ => {}
        }
        Some(())
    }

    /// Some firmware lists a processor by both kinds of structure: the first counts, but "enabled" in either does.
    fn add_processor(&mut self, apic_id: u32, uid: u32, flags: u32) {
        let new = Processor { apic_id, uid, enabled: flags & 1 != 0, online_capable: flags & 2 != 0 };
        match self.processors.iter_mut().find(|p| p.apic_id == apic_id) {
            Some(old) => old.enabled |= new.enabled,
            // As above.
            None if apic_id == u32::MAX => {}
            None => add(&mut self.processors, new),
        }
    }
}

/// Adds to a list that no table makes endless.
fn add<T>(list: &mut Vec<T>, new: T) {
    if list.len() < MAX_LISTED {
        list.push(new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn madt(structures: &[&[u8]]) -> Vec<u8> {
        let mut table = vec![0; FIRST];
        table[36..40].copy_from_slice(&0xfee0_0000u32.to_le_bytes());
        table[40] = 1;
        structures.iter().for_each(|s| table.extend_from_slice(s));
        table
    }

    const CPU0: &[u8] = &[0, 8, 0, 0, 1, 0, 0, 0];
    const CPU1: &[u8] = &[0, 8, 1, 4, 1, 0, 0, 0];
    const DISABLED: &[u8] = &[0, 8, 2, 6, 2, 0, 0, 0];
    const X2: &[u8] = &[9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0];

    #[test]
    fn processors_of_both_kinds_are_listed_in_order() {
        let m = Madt::parse(&madt(&[CPU0, CPU1, DISABLED, X2])).unwrap();
        let list: Vec<_> =
            m.processors.iter().map(|p| (p.apic_id, p.uid, p.enabled, p.online_capable)).collect();
        assert_eq!(
            list,
            [(0, 0, true, false), (4, 1, true, false), (6, 2, false, true), (256, 7, true, false)]
        );
        assert_eq!((m.local_apic, m.has_8259, m.malformed), (0xfee0_0000, true, false));
    }

    #[test]
    fn a_processor_listed_twice_counts_once() {
        let x2_of_cpu1 = [9, 16, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0];
        let m = Madt::parse(&madt(&[CPU0, CPU1, &x2_of_cpu1])).unwrap();
        assert_eq!(m.processors.len(), 2);
    }

    #[test]
    fn broadcast_ids_are_no_processors() {
        let all_ones = [0, 8, 9, 0xff, 1, 0, 0, 0];
        let x2_all_ones = [9, 16, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 1, 0, 0, 0];
        let x2_of_255 = [9, 16, 0, 0, 0xff, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0];
        let m = Madt::parse(&madt(&[&all_ones, &x2_all_ones, CPU0, &x2_of_255])).unwrap();
        let ids: Vec<_> = m.processors.iter().map(|p| p.apic_id).collect();
        assert_eq!((ids, m.malformed), (vec![0, 255], false), "255 is an x2APIC's id like any other");
    }

    #[test]
    fn what_is_disabled_once_and_enabled_once_is_enabled() {
        let disabled_cpu1 = [0, 8, 1, 4, 0, 0, 0, 0];
        for order in [[CPU1, &disabled_cpu1], [&disabled_cpu1, CPU1]] {
            let m = Madt::parse(&madt(&order)).unwrap();
            assert_eq!((m.processors.len(), m.processors[0].enabled), (1, true));
        }
    }

    #[test]
    fn endless_tables_are_cut() {
        let mut table = madt(&[]);
        for n in 0..10_000u32 {
            table.extend([9, 16, 0, 0]);
            table.extend(n.to_le_bytes());
            table.extend([1, 0, 0, 0, 0, 0, 0, 0]);
            table.extend([1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        }
        let m = Madt::parse(&table).unwrap();
        assert_eq!((m.processors.len(), m.io_apics.len()), (MAX_LISTED, MAX_LISTED));
    }

    #[test]
    fn controllers_and_overrides_are_read() {
        let io = [1, 12, 2, 0, 0, 0, 0xc0, 0xfe, 0x18, 0, 0, 0];
        let irq0 = [2, 10, 0, 0, 2, 0, 0, 0, 5, 0];
        let moved = [5, 12, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
        let unknown = [0x80, 3, 9];
        let m = Madt::parse(&madt(&[&io, &irq0, &moved, &unknown, CPU0])).unwrap();
        assert_eq!(m.io_apics, [IoApic { id: 2, address: 0xfec0_0000, gsi_base: 24 }]);
        assert_eq!(m.overrides, [Override { irq: 0, gsi: 2, flags: 5 }]);
        assert_eq!(m.local_apic, 1 << 32);
        assert_eq!(m.processors.len(), 1);
        assert!(!m.malformed);
    }

    #[test]
    fn broken_structures_end_the_list_but_not_the_machine() {
        for bad in [&[0u8, 0][..], &[0, 1], &[0], &[0, 200, 0], &[9, 4, 0, 0]] {
            let m = Madt::parse(&madt(&[CPU0, bad])).unwrap();
            assert!(m.malformed, "{bad:?}");
            assert_eq!(m.processors.len(), 1);
        }
        assert_eq!(Madt::parse(&[0; 43]), None);
    }
}
