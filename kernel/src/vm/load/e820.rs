//! The memory map that guests are told, in e820 types. ACPI specification, 15.
use arrayvec::ArrayVec;

use crate::vm::layout;

/// Usable memory.
pub const RAM: u32 = 1;
/// Not usable.
pub const RESERVED: u32 = 2;

/// One range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// [`RAM`] or [`RESERVED`].
    pub kind: u32,
}

/// The map of a VM with `ram_bytes` of RAM: ascending, disjoint, no entry empty.
pub fn map(ram_bytes: u64) -> ArrayVec<Entry, 7> {
    let low_end = ram_bytes.min(layout::PCI_HOLE_START);
    let high_len = ram_bytes - low_end;
    let mib = 1 << 20;
    let ranges = [
        (0, low_end.min(layout::LOW_RAM_END), RAM),
        // The extended BIOS data area, then video memory and ROMs, then the ACPI tables.
        (layout::LOW_RAM_END, layout::ROM_START, RESERVED),
        (layout::ROM_START, layout::ACPI_START, RESERVED),
        (layout::ACPI_START, layout::ACPI_END, RESERVED),
        (mib, low_end, RAM),
        // Linux uses MCFG only if the memory map agrees.
        (layout::ECAM_START, layout::ECAM_START + layout::ECAM_SIZE, RESERVED),
        (layout::PCI_HOLE_END, layout::PCI_HOLE_END.saturating_add(high_len), RAM),
    ];
    ranges
        .into_iter()
        .filter(|(start, end, _)| start < end)
        .map(|(start, end, kind)| Entry { start, len: end - start, kind })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn ram(ram_bytes: u64) -> Vec<(u64, u64)> {
        map(ram_bytes)
            .iter()
            .filter(|entry| entry.kind == RAM)
            .map(|entry| (entry.start, entry.len))
            .collect()
    }

    #[test]
    fn small_vms_end_below_the_hole() {
        assert_eq!(ram(1 << 20), [(0, 0x9_fc00)]);
        assert_eq!(ram(512 << 20), [(0, 0x9_fc00), (1 << 20, 511 << 20)]);
        assert_eq!(ram(3 << 30), [(0, 0x9_fc00), (1 << 20, (3 << 30) - (1 << 20))]);
    }

    #[test]
    fn big_vms_continue_at_4_gib() {
        assert_eq!(ram(5 << 30), [(0, 0x9_fc00), (1 << 20, (3 << 30) - (1 << 20)), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn firmware_tables_and_configuration_space_are_reserved() {
        let is_reserved = |address: u64| {
            map(1 << 30).iter().any(|entry| {
                entry.kind == RESERVED && (entry.start..entry.start + entry.len).contains(&address)
            })
        };
        for address in [0x9_fc00, 0xa_0000, 0xc_0000, 0xe_0000, 0xf_ffff, layout::ECAM_START] {
            assert!(is_reserved(address), "{address:#x}");
        }
    }

    proptest! {
        #[test]
        fn any_map_is_ascending_and_disjoint(ram_bytes: u64) {
            let map = map(ram_bytes);
            prop_assert!(map.iter().all(|entry| entry.len != 0));
            for pair in map.windows(2) {
                prop_assert!(pair[0].start + pair[0].len <= pair[1].start);
            }
        }
    }
}
