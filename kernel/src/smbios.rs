//! The machine's maker, model and serial number, from the firmware's SMBIOS tables. DMTF DSP0134, 3.7. Pure.

use arrayvec::ArrayString;

/// Longest text that is kept.
const MAX_TEXT: usize = 64;
/// The tables of large machines have some ten KiB.
const MAX_TABLE_BYTES: usize = 1 << 20;
/// Where a BIOS leaves the entry point, and on what steps (sections 5.2.1 and 5.2.2).
pub const BIOS_AREA: (u64, usize) = (0xf_0000, 0x1_0000);
const STEP: usize = 16;
/// Bytes that hold either entry point.
pub const ENTRY_BYTES: usize = 32;

/// Text of the tables, as much as fits.
pub type Text = ArrayString<MAX_TEXT>;

/// What the system information structure (section 7.2) says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct System {
    /// Who made the machine.
    pub manufacturer: Text,
    /// Its model.
    pub product: Text,
    /// Its serial number.
    pub serial: Text,
    /// Its UUID, in the order in which it is written; `None` if it was never set.
    pub uuid: Option<[u8; 16]>,
}

/// Physical address and length of the structures that an entry point leads to.
pub fn entry_point(bytes: &[u8]) -> Option<(u64, usize)> {
    let sums = |len: usize| Some(bytes.get(..len)?.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)));
    if bytes.starts_with(b"_SM3_") {
        let len = usize::from(*bytes.get(6)?);
        let max = u32::from_le_bytes(*bytes.get(12..)?.first_chunk()?) as usize;
        let address = u64::from_le_bytes(*bytes.get(16..)?.first_chunk()?);
        return (len >= 24 && sums(len)? == 0).then_some((address, max.min(MAX_TABLE_BYTES)));
    }
    if bytes.starts_with(b"_SM_") {
        let len = usize::from(*bytes.get(5)?);
        let table_len = u16::from_le_bytes(*bytes.get(0x16..)?.first_chunk()?);
        let address = u32::from_le_bytes(*bytes.get(0x18..)?.first_chunk()?);
        // One version of the specification had the length wrong by one.
        return (len >= 0x1e && sums(len)? == 0).then_some((u64::from(address), usize::from(table_len)));
    }
    None
}

/// Looks for an entry point in a BIOS's memory; the newer kind is preferred.
pub fn search(area: &[u8]) -> Option<(u64, usize)> {
    let all = || (0..area.len()).step_by(STEP).map(|at| &area[at..]);
    let newer = all().filter(|bytes| bytes.starts_with(b"_SM3_")).find_map(entry_point);
    newer.or_else(|| all().find_map(entry_point))
}

/// The system information among the structures.
pub fn system(mut table: &[u8]) -> Option<System> {
    const SYSTEM: u8 = 1;
    const END: u8 = 127;
    // Each is a formatted part of its length, then strings with a NUL each, then one more NUL (section 6.1).
    while let [kind, len, ..] = *table {
        let len = usize::from(len);
        if len < 4 || kind == END {
            return None;
        }
        let formatted = table.get(..len)?;
        let rest = table.get(len..)?;
        if kind == SYSTEM {
            return Some(System {
                manufacturer: text(formatted, rest, 4),
                product: text(formatted, rest, 5),
                serial: text(formatted, rest, 7),
                uuid: uuid(formatted),
            });
        }
        let end = rest.windows(2).position(|pair| pair == [0, 0])?;
        table = &rest[end + 2..];
    }
    None
}

/// The string whose number is at `offset`; empty if there is none.
fn text(formatted: &[u8], strings: &[u8], offset: usize) -> Text {
    let mut out = Text::new();
    let number = usize::from(formatted.get(offset).copied().unwrap_or(0));
    let string =
        strings.split(|byte| *byte == 0).take_while(|string| !string.is_empty()).nth(number.wrapping_sub(1));
    for &byte in string.unwrap_or_default() {
        let shown = if byte.is_ascii_graphic() || byte == b' ' { char::from(byte) } else { '?' };
        if out.try_push(shown).is_err() {
            break;
        }
    }
    let trimmed = out.trim_end().len();
    out.truncate(trimmed);
    out
}

/// The UUID, whose first three fields are little-endian in the table (section 7.2.1).
fn uuid(formatted: &[u8]) -> Option<[u8; 16]> {
    let mut uuid: [u8; 16] = *formatted.get(8..)?.first_chunk()?;
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    (uuid != [0; 16] && uuid != [0xff; 16]).then_some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with_sum(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
        bytes[at] = 0;
        bytes[at] = 0u8.wrapping_sub(bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)));
        bytes
    }

    fn old_entry() -> Vec<u8> {
        let mut bytes = vec![0; 0x1f];
        bytes[..4].copy_from_slice(b"_SM_");
        bytes[5] = 0x1f;
        bytes[0x16..0x18].copy_from_slice(&300u16.to_le_bytes());
        bytes[0x18..0x1c].copy_from_slice(&0xf_5a00u32.to_le_bytes());
        with_sum(bytes, 4)
    }

    fn new_entry() -> Vec<u8> {
        let mut bytes = vec![0; 24];
        bytes[..5].copy_from_slice(b"_SM3_");
        bytes[6] = 24;
        bytes[12..16].copy_from_slice(&500u32.to_le_bytes());
        bytes[16..24].copy_from_slice(&0x7_f00d_0000u64.to_le_bytes());
        with_sum(bytes, 5)
    }

    fn table() -> Vec<u8> {
        let mut table = b"\x00\x06\x00\x00\x01\x02SeaBIOS\x001.16\x00\x00".to_vec();
        // A structure without strings ends with two NULs all the same.
        table.extend(b"\x03\x04\x01\x00\x00\x00");
        table.extend(b"\x01\x1b\x02\x00\x01\x02\x00\x03");
        table.extend((0..16).collect::<Vec<u8>>());
        table.extend(b"\x06\x00\x00QEMU\x00Standard PC (Q35)  \x00S\xff1\x00\x00");
        table.extend(b"\x7f\x04\x00\x00\x00\x00");
        table
    }

    #[test]
    fn entry_points_of_both_kinds_are_found() {
        let mut area = vec![0; 0x1000];
        area[0x20..0x3f].copy_from_slice(&old_entry());
        assert_eq!(search(&area), Some((0xf_5a00, 300)));
        area[0x100..0x118].copy_from_slice(&new_entry());
        assert_eq!(search(&area), Some((0x7_f00d_0000, 500)));
        area[0x107] ^= 1;
        assert_eq!(search(&area), Some((0xf_5a00, 300)), "a broken one does not count");
        assert_eq!(search(&[]), None);
    }

    #[test]
    fn the_system_is_named() {
        let system = system(&table()).unwrap();
        assert_eq!((&system.manufacturer[..], &system.product[..]), ("QEMU", "Standard PC (Q35)"));
        assert_eq!(&system.serial[..], "S?1");
        assert_eq!(system.uuid, Some([3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15]));
    }

    #[test]
    fn a_machine_may_have_no_names() {
        let mut table = b"\x01\x08\x02\x00\x00\x00\x00\x00\x00\x00".to_vec();
        assert_eq!(system(&table), Some(System::default()));
        table[0] = 2;
        assert_eq!(system(&table), None);
        let mut unset = vec![1, 0x1b, 0, 0, 9, 9, 9, 9];
        unset.resize(0x1b + 2, 0xff);
        assert_eq!(system(&unset).unwrap(), System::default(), "numbers of strings that are not there");
    }

    proptest! {
        #[test]
        fn any_bytes_are_borne(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0usize..200) {
            let _ = search(&bytes);
            let _ = system(&bytes);
            let mut table = table();
            let at = at % table.len();
            table[at] = table[at].wrapping_add(bytes.first().copied().unwrap_or(1));
            let _ = system(&table);
        }
    }
}
