//! The root pointer: where the table of tables is. ACPI 6.5 section 5.2.5.

use super::bytes::{sums_to_zero, u32_at, u64_at, u8_at};
use core::fmt;

/// Bytes of the ACPI 1.0 structure.
const V1_BYTES: usize = 20;
/// Bytes of the ACPI 2.0 structure.
pub const V2_BYTES: usize = 36;
/// Where and how far apart the structure may lie in low memory (section 5.2.5.1).
const ALIGNMENT: usize = 16;

/// A checked root pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rsdp {
    /// 0 for ACPI 1.0, 2 since.
    pub revision: u8,
    /// Physical address of the RSDT, or 0.
    pub rsdt: u32,
    /// Physical address of the XSDT, or 0.
    pub xsdt: u64,
}

/// What is wrong with a root pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RsdpError {
    /// Not `RSD PTR `, or too short.
    Signature,
    /// The bytes do not add up to zero.
    Checksum,
    /// It points nowhere.
    NoTable,
}

impl fmt::Display for RsdpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RsdpError::Signature => "no RSDP there",
            RsdpError::Checksum => "the RSDP's checksum is wrong",
            RsdpError::NoTable => "the RSDP names neither XSDT nor RSDT",
        })
    }
}

impl Rsdp {
    /// Reads the structure at the start of `bytes`. One whose extended part is broken counts as ACPI 1.0.
    pub fn parse(bytes: &[u8]) -> Result<Self, RsdpError> {
        let v1 = bytes.get(..V1_BYTES).filter(|b| b.starts_with(b"RSD PTR ")).ok_or(RsdpError::Signature)?;
        if !sums_to_zero(v1) {
            return Err(RsdpError::Checksum);
        }
        let rsdt = u32_at(bytes, 16).unwrap_or(0);
        let revision = u8_at(bytes, 15).unwrap_or(0);
        let extended = bytes.get(..V2_BYTES).filter(|b| revision >= 2 && sums_to_zero(b));
        let xsdt = extended.and_then(|b| u64_at(b, 24)).unwrap_or(0);
        match (xsdt, rsdt) {
            (0, 0) => Err(RsdpError::NoTable),
            (0, _) => Ok(Self { revision: 0, rsdt, xsdt: 0 }),
            _ => Ok(Self { revision, rsdt, xsdt }),
        }
    }

    /// Searches an area of low memory and returns where the structure begins.
    pub fn search(area: &[u8]) -> Option<(usize, Self)> {
        (0..area.len()).step_by(ALIGNMENT).find_map(|at| Some((at, Self::parse(&area[at..]).ok()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rsdp(revision: u8, rsdt: u32, xsdt: u64) -> [u8; V2_BYTES] {
        let mut b = [0; V2_BYTES];
        b[..8].copy_from_slice(b"RSD PTR ");
        b[15] = revision;
        b[16..20].copy_from_slice(&rsdt.to_le_bytes());
        b[20] = V2_BYTES as u8;
        b[24..32].copy_from_slice(&xsdt.to_le_bytes());
        b[8] = 0u8.wrapping_sub(b[..20].iter().fold(0, |s: u8, x| s.wrapping_add(*x)));
        b[32] = 0u8.wrapping_sub(b.iter().fold(0, |s: u8, x| s.wrapping_add(*x)));
        b
    }

    #[test]
    fn both_revisions_are_read() {
        assert_eq!(Rsdp::parse(&rsdp(0, 0x1000, 7)), Ok(Rsdp { revision: 0, rsdt: 0x1000, xsdt: 0 }));
        assert_eq!(Rsdp::parse(&rsdp(0, 0x1000, 7)[..20]), Ok(Rsdp { revision: 0, rsdt: 0x1000, xsdt: 0 }));
        assert_eq!(Rsdp::parse(&rsdp(2, 0x1000, 7)), Ok(Rsdp { revision: 2, rsdt: 0x1000, xsdt: 7 }));
    }

    #[test]
    fn broken_ones_are_refused_or_downgraded() {
        let good = rsdp(2, 0x1000, 7);
        assert_eq!(Rsdp::parse(&[]), Err(RsdpError::Signature));
        assert_eq!(Rsdp::parse(&good[..19]), Err(RsdpError::Signature));
        for at in 0..20 {
            let mut bad = good;
            bad[at] ^= 1;
            assert!(Rsdp::parse(&bad).is_err(), "byte {at}");
        }
        let mut bad = good;
        bad[25] ^= 1;
        assert_eq!(Rsdp::parse(&bad), Ok(Rsdp { revision: 0, rsdt: 0x1000, xsdt: 0 }));
        assert_eq!(Rsdp::parse(&rsdp(2, 0, 0)), Err(RsdpError::NoTable));
        assert_eq!(
            Rsdp::parse(&rsdp(2, 0x1000, 0)).unwrap().revision,
            0,
            "an empty XSDT address means the RSDT"
        );
    }

    #[test]
    fn low_memory_is_searched_on_16_byte_steps() {
        let mut area = vec![0; 4096];
        area[100..136].copy_from_slice(&rsdp(2, 1, 1));
        assert_eq!(Rsdp::search(&area), None);
        area[4060..4096].copy_from_slice(&rsdp(2, 1, 1));
        area[4048..4084].copy_from_slice(&rsdp(0, 9, 0));
        assert_eq!(Rsdp::search(&area).unwrap(), (4048, Rsdp { revision: 0, rsdt: 9, xsdt: 0 }));
        assert_eq!(Rsdp::search(&[]), None);
    }
}
