//! A segment's access rights as a VMCS holds them. SDM vol. 3, table 25-2.
use crate::hw::Segment;

/// Type, in bits 3:0.
pub const TYPE: u32 = 0xf;
/// S: code or data; clear for a system segment.
pub const CODE_OR_DATA: u32 = 1 << 4;
/// DPL, in bits 6:5.
pub const DPL_SHIFT: u32 = 5;
/// P.
pub const PRESENT: u32 = 1 << 7;
/// AVL.
pub const AVAILABLE: u32 = 1 << 12;
/// L, of CS only.
pub const LONG: u32 = 1 << 13;
/// D/B.
pub const DEFAULT_BIG: u32 = 1 << 14;
/// G.
pub const GRANULARITY: u32 = 1 << 15;
/// Unusable: a null selector was loaded, or nothing since a task switch.
pub const UNUSABLE: u32 = 1 << 16;
/// Bits 31:17 and 11:8, which must be zero in a usable segment.
pub const RESERVED: u32 = !0x1_f0ff;

/// Bit P where [`Segment`] has it.
const ATTRIBUTE_PRESENT: u16 = 1 << 7;

/// `segment`'s attributes as a VMCS holds them. One that is not present is unusable; it keeps its DPL, for
/// SS's is the CPL.
#[inline]
pub const fn to_access_rights(segment: &Segment) -> u32 {
    let attributes = segment.attributes as u32;
    let unusable = if segment.attributes & ATTRIBUTE_PRESENT == 0 { UNUSABLE } else { 0 };
    attributes & 0xff | (attributes & 0xf00) << 4 | unusable
}

/// Attributes of a [`Segment`] from access rights. An unusable segment is not present.
#[inline]
pub const fn from_access_rights(rights: u32) -> u16 {
    let attributes = (rights & 0xff | rights >> 4 & 0xf00) as u16;
    if rights & UNUSABLE == 0 {
        attributes
    } else {
        attributes & !ATTRIBUTE_PRESENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(attributes: u16) -> u32 {
        to_access_rights(&Segment { attributes, ..Segment::default() })
    }

    #[test]
    fn attributes_survive_the_round_trip() {
        for attributes in 0..0x1000 {
            let there = rights(attributes);
            assert_eq!(there & RESERVED, 0);
            assert_eq!(from_access_rights(there), attributes, "{attributes:#x}");
        }
    }

    #[test]
    fn segments_that_every_system_has() {
        assert_eq!(rights(0xa9b), 0xa09b, "64-bit code");
        assert_eq!(rights(0xc93), 0xc093, "flat data");
        assert_eq!(rights(0x8b), 0x8b, "busy TSS");
        assert_eq!(rights(0x9b), 0x9b, "real-mode code");
        assert_eq!(rights(0), UNUSABLE, "null");
        assert_eq!(rights(Segment::LONG), LONG | UNUSABLE);
        assert_eq!(rights(Segment::DEFAULT_32), DEFAULT_BIG | UNUSABLE);
    }

    #[test]
    fn unusable_segments_are_not_present_and_keep_their_dpl() {
        assert_eq!(from_access_rights(UNUSABLE | 0xc0f3), 0xc73);
        assert_eq!(from_access_rights(u32::MAX), 0xf7f);
    }
}
