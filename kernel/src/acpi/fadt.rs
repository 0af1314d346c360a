//! Fixed hardware: power management registers and timer. ACPI 6.5 section 5.2.9.

use super::bytes::{u16_at, u32_at, u64_at, u8_at};

/// The fixed ACPI description table, as far as Umbra uses it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fadt {
    /// Physical address of the DSDT, or 0.
    pub dsdt: u64,
    /// Port and value that switch to ACPI mode, where the machine has another mode.
    pub acpi_enable: Option<(u16, u8)>,
    /// Port of the PM1a control register.
    pub pm1a_control: Option<u16>,
    /// Port of the PM1b control register.
    pub pm1b_control: Option<u16>,
    /// Port of the power management timer.
    pub pm_timer: Option<u16>,
    /// The timer has 32 bits, not 24.
    pub pm_timer_32bit: bool,
    /// Devices of old PCs that this machine does not have.
    pub absent: Absent,
}

/// Devices of old PCs of which the firmware says that they are not there, so that nobody touches their ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Absent {
    /// No i8042 with its keyboard.
    pub i8042: bool,
    /// No CMOS clock.
    pub rtc: bool,
    /// None of the fixed hardware of ACPI, such as the power management timer.
    pub fixed_hardware: bool,
}

impl Fadt {
    /// Reads the table, header included, of any revision.
    pub fn parse(t: &[u8]) -> Option<Self> {
        const RTC_ABSENT: u16 = 1 << 5;
        const I8042: u16 = 1 << 1;
        const PM_TIMER_32BIT: u32 = 1 << 8;
        const HARDWARE_REDUCED: u32 = 1 << 20;
        let flags = u32_at(t, 112)?;
        let fixed_hardware = flags & HARDWARE_REDUCED == 0;
        // IAPC_BOOT_ARCH (section 5.2.9.3) came with revision 3; a machine of before has everything.
        let has_boot_flags = u8_at(t, 8)? >= 3;
        let boot_flags = u16_at(t, 109).filter(|_| has_boot_flags).unwrap_or(I8042);
        let enable = (u32_at(t, 48)?, u8_at(t, 52)?);
        Some(Self {
            dsdt: u64_at(t, 140).filter(|x| *x != 0).or(u32_at(t, 40).map(u64::from)).unwrap_or(0),
            acpi_enable: match enable {
                (0, _) | (_, 0) => None,
                (port, value) => u16::try_from(port).ok().map(|port| (port, value)),
            },
            pm1a_control: port(t, 172, 64).filter(|_| fixed_hardware),
            pm1b_control: port(t, 184, 68).filter(|_| fixed_hardware),
            pm_timer: port(t, 208, 76).filter(|_| fixed_hardware),
            pm_timer_32bit: flags & PM_TIMER_32BIT != 0,
            absent: Absent {
                i8042: boot_flags & I8042 == 0,
                rtc: boot_flags & RTC_ABSENT != 0,
                fixed_hardware: !fixed_hardware,
            },
        })
    }
}

/// The port of a register: from its generic address (section 5.2.3.2) if that is set and lies in I/O space, else
/// from the old field.
fn port(t: &[u8], generic: usize, old: usize) -> Option<u16> {
    const SYSTEM_IO: u8 = 1;
    let extended = u64_at(t, generic + 4).filter(|a| *a != 0);
    let address = match extended {
        Some(address) if u8_at(t, generic) == Some(SYSTEM_IO) => address,
        Some(_) => return None,
        None => u64::from(u32_at(t, old)?),
    };
    u16::try_from(address).ok().filter(|port| *port != 0)
}

/// Reads a SLP_TYP from the DSDT's `\_S5_`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SleepType {
    /// For PM1a.
    pub a: u8,
    /// For PM1b.
    pub b: u8,
}

/// Finds `Name (\_S5_, Package () {a, b, ..})` in AML without an interpreter: the name as an object's name, then a
/// package whose first two elements are small constants. ACPI 6.5 sections 7.4.2 and 20.2.
pub fn sleep_type_s5(aml: &[u8]) -> Option<SleepType> {
    const NAME_OP: u8 = 0x08;
    const PACKAGE_OP: u8 = 0x12;
    let name = b"_S5_";
    aml.windows(name.len()).enumerate().filter(|(_, window)| window == name).find_map(|(at, _)| {
        let before = &aml[..at];
        if !before.ends_with(&[NAME_OP]) && !before.ends_with(&[NAME_OP, b'\\']) {
            return None;
        }
        let package = aml[at + name.len()..].strip_prefix(&[PACKAGE_OP])?;
        // PkgLength: the top two bits of its first byte count the bytes that follow (section 20.2.4).
        let length_bytes = 1 + usize::from(package.first()? >> 6);
        let elements = package.get(length_bytes..)?;
        let count = *elements.first()?;
        let (a, rest) = small_constant(&elements[1..])?;
        let b = if count >= 2 { small_constant(rest).map_or(a, |(b, _)| b) } else { a };
        (count >= 1 && a < 8 && b < 8).then_some(SleepType { a, b })
    })
}

/// An integer constant below 256, and what follows it (section 20.2.3).
fn small_constant(aml: &[u8]) -> Option<(u8, &[u8])> {
    let (value, len) = match *aml.first()? {
        0x00 => (0, 1),
        0x01 => (1, 1),
        0x0a => (u32::from(u8_at(aml, 1)?), 2),
        0x0b => (u32::from(u16_at(aml, 1)?), 3),
        0x0c => (u32_at(aml, 1)?, 5),
        _ => return None,
    };
    Some((u8::try_from(value).ok()?, &aml[len..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fadt(len: usize) -> Vec<u8> {
        let mut t = vec![0; len];
        for (at, value) in [(40, 0x7fe_0000u32), (48, 0xb2), (64, 0x604), (76, 0x608), (112, 1 << 8)] {
            t[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        t[52] = 2;
        t
    }

    fn set_generic(t: &mut [u8], at: usize, space: u8, address: u64) {
        t[at] = space;
        t[at + 4..at + 12].copy_from_slice(&address.to_le_bytes());
    }

    #[test]
    fn the_first_revision_is_read() {
        let f = Fadt::parse(&fadt(116)).unwrap();
        let expected = Fadt {
            dsdt: 0x7fe_0000,
            acpi_enable: Some((0xb2, 2)),
            pm1a_control: Some(0x604),
            pm1b_control: None,
            pm_timer: Some(0x608),
            pm_timer_32bit: true,
            absent: Absent::default(),
        };
        assert_eq!(f, expected);
        assert_eq!(Fadt::parse(&fadt(116)[..115]), None);
    }

    #[test]
    fn extended_addresses_win_when_they_are_ports() {
        let mut t = fadt(276);
        assert_eq!(Fadt::parse(&t).unwrap().pm1a_control, Some(0x604), "all zeros mean the old field");
        t[140..148].copy_from_slice(&0x1_0000_0000u64.to_le_bytes());
        set_generic(&mut t, 172, 1, 0x404);
        set_generic(&mut t, 208, 0, 0xfed0_0000);
        let f = Fadt::parse(&t).unwrap();
        assert_eq!((f.dsdt, f.pm1a_control, f.pm_timer), (1 << 32, Some(0x404), None));
        set_generic(&mut t, 172, 1, 0x10_0000);
        assert_eq!(Fadt::parse(&t).unwrap().pm1a_control, None);
    }

    #[test]
    fn absent_devices_are_told_since_revision_3() {
        let absent = |t: &[u8]| Fadt::parse(t).unwrap().absent;
        let mut t = fadt(276);
        t[109] = 1 << 5;
        assert_eq!(absent(&t), Absent::default(), "reserved in revision 1");
        t[8] = 3;
        assert_eq!(absent(&t), Absent { i8042: true, rtc: true, fixed_hardware: false });
        t[109] = 1 << 1;
        assert_eq!(absent(&t), Absent::default());
    }

    #[test]
    fn a_hardware_reduced_machine_has_no_fixed_hardware() {
        let mut t = fadt(276);
        t[112..116].copy_from_slice(&(1u32 << 20).to_le_bytes());
        let f = Fadt::parse(&t).unwrap();
        assert!(f.absent.fixed_hardware && f.pm_timer.is_none() && f.pm1a_control.is_none());
    }

    #[test]
    fn a_machine_without_legacy_mode_needs_no_switch() {
        let mut t = fadt(116);
        t[48] = 0;
        assert_eq!(Fadt::parse(&t).unwrap().acpi_enable, None);
    }

    #[test]
    fn s5_is_found_in_its_forms() {
        let zeros = b"junk\x08_S5_\x12\x06\x04\x00\x00\x00\x00more";
        assert_eq!(sleep_type_s5(zeros), Some(SleepType { a: 0, b: 0 }));
        let bytes = b"\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x07\x00\x00";
        assert_eq!(sleep_type_s5(bytes), Some(SleepType { a: 5, b: 7 }));
        let one_element = b"\x08_S5_\x12\x04\x01\x0a\x05";
        assert_eq!(sleep_type_s5(one_element), Some(SleepType { a: 5, b: 5 }));
        let long_length = b"\x08_S5_\x12\x4a\x00\x02\x0b\x03\x00\x01";
        assert_eq!(sleep_type_s5(long_length), Some(SleepType { a: 3, b: 1 }));
    }

    #[test]
    fn what_only_looks_like_s5_is_not_taken() {
        for aml in [
            &b"_S5_\x12\x06\x04\x00\x00"[..],
            b"\x08_S5_\x11\x06\x04\x00\x00",
            b"\x08_S5_\x12\x06\x04\x0a\x99\x00",
            b"\x08_S5_\x12\x06\x00",
            b"\x08_S5_\x12",
            b"\x08_S5_",
            b"\x08_S5_\x12\xff",
            b"",
        ] {
            assert_eq!(sleep_type_s5(aml), None, "{aml:?}");
        }
        let second = b"\x10_S5_ \x08_S5_\x12\x06\x04\x01\x01";
        assert_eq!(sleep_type_s5(second), Some(SleepType { a: 1, b: 1 }));
    }
}
