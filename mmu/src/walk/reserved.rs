//! Bits of a guest's entries that must be zero (AMD APM vol. 2, 5.3; Intel SDM vol. 3, tables 4-4 to 4-20 and 29-1 to 29-7).
use crate::addr::{MAX_PHYSICAL_BITS, PAGE_SHIFT};
use crate::role::{CpuRole, PagingMode, RoleFlags};

/// Bit 7, which makes an entry of level 2 or 3 a leaf.
const LARGE: u64 = 1 << 7;
/// Bit 63.
const NO_EXECUTE: u64 = 1 << 63;

/// Reserved bits by level (from 0) and by bit 7; bit 0, always set, stands for entries that are not present.
pub(super) type Reserved = [[u64; 2]; 5];

/// Bits `high` down to `low`.
const fn bits(high: u32, low: u32) -> u64 {
    if high < low {
        return 0;
    }
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// The reserved bits in a role.
///
/// An entry is wrong if `(entry ^ 1) & mask` is not zero; EPT has no present bit, and there the masks are the reserved bits
/// alone.
pub(super) const fn reserved(role: &CpuRole) -> Reserved {
    let mut masks = role_bits(role);
    if role.is_ept() {
        return masks;
    }
    let mut level = 0;
    while level < masks.len() {
        masks[level][0] |= 1;
        masks[level][1] |= 1;
        level += 1;
    }
    masks
}

/// The same of entries in lowest tables alone.
#[inline]
pub(super) const fn lowest_reserved(role: &CpuRole) -> u64 {
    let address = bits(MAX_PHYSICAL_BITS - 1, role.max_phys_addr());
    let no_execute = if role.flags().contains(RoleFlags::NX) { 0 } else { NO_EXECUTE };
    match role.mode() {
        PagingMode::Unpaged | PagingMode::TwoLevel => 1,
        PagingMode::Pae => address | bits(62, MAX_PHYSICAL_BITS) | no_execute | 1,
        PagingMode::FourLevel | PagingMode::FiveLevel => address | no_execute | 1,
        PagingMode::EptFourLevel | PagingMode::EptFiveLevel => address,
    }
}

const fn role_bits(role: &CpuRole) -> Reserved {
    let address = bits(MAX_PHYSICAL_BITS - 1, role.max_phys_addr());
    let no_execute = if role.flags().contains(RoleFlags::NX) { 0 } else { NO_EXECUTE };
    match role.mode() {
        PagingMode::Unpaged => [[0; 2]; 5],
        PagingMode::TwoLevel => {
            let mut large = bits(21, 13);
            if role.flags().contains(RoleFlags::PSE36) {
                // Bits 20:13 are address bits 39:32, as far as the CPU has those: SDM table 4-4.
                let width = if role.max_phys_addr() < 40 { role.max_phys_addr() } else { 40 };
                large = bits(21, width - 32 + 13);
            }
            let large = if role.flags().contains(RoleFlags::PSE) { large } else { 0 };
            [[0; 2], [0, large], [0; 2], [0; 2], [0; 2]]
        }
        PagingMode::Pae => {
            // Bits 62:52 are no free bits here, and a PDPTE has few at all.
            let high = address | bits(62, MAX_PHYSICAL_BITS) | no_execute;
            // Bit 5 should be reserved as well, but QEMU's TCG sets it as it walks, and ignores it.
            let pdpte = address | bits(63, MAX_PHYSICAL_BITS) | bits(8, 6) | bits(2, 1);
            [[high; 2], [high, high | bits(20, 13)], [pdpte; 2], [0; 2], [0; 2]]
        }
        PagingMode::FourLevel | PagingMode::FiveLevel => {
            let high = address | no_execute;
            let gib = if role.flags().contains(RoleFlags::GIB_PAGES) { bits(29, 13) } else { LARGE };
            let top = high | LARGE | if role.flags().contains(RoleFlags::AMD) { 1 << 8 } else { 0 };
            [[high; 2], [high, high | bits(20, 13)], [high, high | gib], [top; 2], [top; 2]]
        }
        PagingMode::EptFourLevel | PagingMode::EptFiveLevel => {
            // Links have neither memory type nor IPAT; above level 3 bit 7 is reserved as well, as it is where the CPU has no
            // page of that size.
            let link = address | bits(6, 3);
            let mib = if role.flags().contains(RoleFlags::MIB_PAGES) { bits(20, 12) } else { LARGE };
            let gib = if role.flags().contains(RoleFlags::GIB_PAGES) { bits(29, 12) } else { LARGE };
            let top = link | LARGE;
            [[address; 2], [link, address | mib], [link, address | gib], [top; 2], [top; 2]]
        }
    }
}

const _: () = assert!(bits(20, 13) >> PAGE_SHIFT == 0x1fe && bits(4, 5) == 0);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::role::{Cr0, Cr4, Efer, GuestCpu, GuestEpt, PagingRegs};

    #[test]
    fn lowest_tables_have_the_bits_of_all_tables() {
        let cpu = GuestCpu { max_phys_addr: 40, gib_pages: true, pse36: true, amd: true };
        let role = |cr0, cr4, efer| CpuRole::new(&PagingRegs { cr0, cr4, efer }, &cpu);
        let ept = GuestEpt {
            max_phys_addr: 40,
            execute_only: false,
            five_level: false,
            mib_pages: true,
            gib_pages: true,
            accessed_dirty: true,
            advanced_info: false,
            mode_based_execute: false,
        };
        let mut roles = vec![CpuRole::ept(0x1e, &ept).unwrap()];
        for (cr4, efer) in [
            (Cr4::PSE, Efer::empty()),
            (Cr4::PAE, Efer::empty()),
            (Cr4::PAE, Efer::LMA),
            (Cr4::PAE | Cr4::LA57, Efer::LMA),
        ] {
            roles.extend([efer, efer | Efer::NXE].map(|efer| role(Cr0::PG, cr4, efer)));
        }
        for role in roles {
            assert_eq!(lowest_reserved(&role), reserved(&role)[0][0], "{role:?}");
        }
    }
}
