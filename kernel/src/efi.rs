//! The little of UEFI that Umbra reads: where the firmware lists its tables. UEFI 2.10, sections 4.3 and 4.6. Pure.

/// Bytes of the system table.
pub const SYSTEM_TABLE_BYTES: usize = 120;
/// Bytes of an entry of the configuration table: a GUID and a pointer.
pub const ENTRY_BYTES: usize = 24;
/// No firmware has more.
const MAX_ENTRIES: u64 = 256;

/// SMBIOS3_TABLE_GUID, f2fd1544-9794-4a2c-992e-e5bbcf20e394.
const SMBIOS3: [u8; 16] =
    [0x44, 0x15, 0xfd, 0xf2, 0x94, 0x97, 0x2c, 0x4a, 0x99, 0x2e, 0xe5, 0xbb, 0xcf, 0x20, 0xe3, 0x94];
/// SMBIOS_TABLE_GUID, eb9d2d31-2d88-11d3-9a16-0090273fc14d.
const SMBIOS: [u8; 16] =
    [0x31, 0x2d, 0x9d, 0xeb, 0x88, 0x2d, 0xd3, 0x11, 0x9a, 0x16, 0x00, 0x90, 0x27, 0x3f, 0xc1, 0x4d];

/// Physical address and number of entries of the configuration table that the system table names.
pub fn configuration_table(system_table: &[u8]) -> Option<(u64, usize)> {
    let number = |at: usize| Some(u64::from_le_bytes(*system_table.get(at..)?.first_chunk()?));
    let (count, address) = (number(104)?, number(112)?);
    let sane = system_table.starts_with(b"IBI SYST") && address != 0 && count <= MAX_ENTRIES;
    sane.then_some((address, count as usize))
}

/// Physical address of the SMBIOS entry point among the entries; the newer kind is preferred.
pub fn smbios(entries: &[u8]) -> Option<u64> {
    let find = |guid: [u8; 16]| {
        let entry = entries.chunks_exact(ENTRY_BYTES).find(|entry| entry.starts_with(&guid))?;
        Some(u64::from_le_bytes(*entry[16..].first_chunk()?))
    };
    find(SMBIOS3).or_else(|| find(SMBIOS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_table_is_found() {
        let mut table = vec![0; SYSTEM_TABLE_BYTES];
        table[..8].copy_from_slice(b"IBI SYST");
        table[104] = 9;
        table[112..120].copy_from_slice(&0x3f5_e000u64.to_le_bytes());
        assert_eq!(configuration_table(&table), Some((0x3f5_e000, 9)));
        table[105] = 2;
        assert_eq!(configuration_table(&table), None, "too many");
        assert_eq!(configuration_table(&table[..119]), None);
        table[105] = 0;
        table[0] = 0;
        assert_eq!(configuration_table(&table), None);
    }

    #[test]
    fn the_newer_entry_point_is_preferred() {
        let entry = |guid: [u8; 16], address: u64| [&guid[..], &address.to_le_bytes()].concat();
        let both = [entry([7; 16], 1), entry(SMBIOS, 2), entry(SMBIOS3, 3)].concat();
        assert_eq!(smbios(&both), Some(3));
        assert_eq!(smbios(&both[..48]), Some(2));
        assert_eq!(smbios(&both[..47]), None);
    }
}
