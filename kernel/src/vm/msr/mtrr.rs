//! Memory-type range registers: eight variable ranges, the fixed ranges, write-combining (Intel SDM vol. 3, 12.11; AMD
//! APM vol. 2, 7.7). Checked and kept, not enforced.
use super::{check, index as msr, Gp};

/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write-combining; no SMRR.
const CAP: u64 = 1 << 10 | 1 << 8 | VARIABLE as u64;
const VARIABLE: usize = 8;
const FIXED: usize = 11;

/// IA32_MTRR_DEF_TYPE after reset: enabled, write-back.
const DEF_TYPE_RESET: u64 = 0x806;
/// IA32_MTRR_DEF_TYPE: type, fixed ranges enabled, all enabled.
const DEF_TYPE_DEFINED: u64 = 0xff | 1 << 10 | 1 << 11;
/// IA32_MTRR_PHYSMASKn: the range is valid.
const MASK_VALID: u64 = 1 << 11;
const PAGE_OFFSET: u64 = 0xfff;

/// A variable range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VariableRange {
    /// IA32_MTRR_PHYSBASEn.
    pub base: u64,
    /// IA32_MTRR_PHYSMASKn.
    pub mask: u64,
}

/// The MTRRs of one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mtrrs {
    /// IA32_MTRR_DEF_TYPE.
    pub def_type: u64,
    /// The fixed ranges: one of 64 KiB steps, two of 16 KiB, eight of 4 KiB.
    pub fixed: [u64; FIXED],
    /// The variable ranges.
    pub variable: [VariableRange; VARIABLE],
}

impl Mtrrs {
    pub(super) const fn new() -> Self {
        Self {
            def_type: DEF_TYPE_RESET,
            fixed: [0; FIXED],
            variable: [VariableRange { base: 0, mask: 0 }; VARIABLE],
        }
    }

    pub(super) fn sanitize(&mut self, phys_bits: u8) {
        if !def_type_is_valid(self.def_type) {
            self.def_type = DEF_TYPE_RESET;
        }
        for fixed in &mut self.fixed {
            if !fixed_is_valid(*fixed) {
                *fixed = 0;
            }
        }
        for range in &mut self.variable {
            if !base_is_valid(range.base, phys_bits) || !mask_is_valid(range.mask, phys_bits) {
                *range = VariableRange::default();
            }
        }
    }

    /// The value of an MTRR; `None` if `msr` is none.
    pub(super) fn read(&self, msr: u32) -> Option<u64> {
        match msr {
            msr::MTRR_CAP => Some(CAP),
            msr::MTRR_DEF_TYPE => Some(self.def_type),
            msr::MTRR_PHYS_FIRST..=msr::MTRR_PHYS_LAST => {
                let range = self.variable.get((msr - msr::MTRR_PHYS_FIRST) as usize / 2)?;
                Some(if msr & 1 == 0 { range.base } else { range.mask })
            }
            _ => self.fixed.get(fixed_index(msr)?).copied(),
        }
    }

    /// Writes an MTRR; `None` if `msr` is none.
    pub(super) fn write(&mut self, msr: u32, value: u64, phys_bits: u8) -> Option<Result<(), Gp>> {
        let (place, valid) = match msr {
            msr::MTRR_CAP => return Some(Err(Gp)),
            msr::MTRR_DEF_TYPE => (&mut self.def_type, def_type_is_valid(value)),
            msr::MTRR_PHYS_FIRST..=msr::MTRR_PHYS_LAST => {
                let range = self.variable.get_mut((msr - msr::MTRR_PHYS_FIRST) as usize / 2)?;
                if msr & 1 == 0 {
                    (&mut range.base, base_is_valid(value, phys_bits))
                } else {
                    (&mut range.mask, mask_is_valid(value, phys_bits))
                }
            }
            _ => (self.fixed.get_mut(fixed_index(msr)?)?, fixed_is_valid(value)),
        };
        if valid {
            *place = value;
        }
        Some(check(valid))
    }
}

const fn fixed_index(msr: u32) -> Option<usize> {
    match msr {
        msr::MTRR_FIX_64K => Some(0),
        msr::MTRR_FIX_16K_FIRST..=msr::MTRR_FIX_16K_LAST => {
            Some(1 + (msr - msr::MTRR_FIX_16K_FIRST) as usize)
        }
        msr::MTRR_FIX_4K_FIRST..=msr::MTRR_FIX_4K_LAST => Some(3 + (msr - msr::MTRR_FIX_4K_FIRST) as usize),
        _ => None,
    }
}

/// UC, WC, WT, WP, WB (SDM table 12-8).
const fn is_type(value: u8) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

const fn above(phys_bits: u8) -> u64 {
    if phys_bits < 64 {
        u64::MAX << phys_bits
    } else {
        0
    }
}

const fn def_type_is_valid(value: u64) -> bool {
    value & !DEF_TYPE_DEFINED == 0 && is_type(value as u8)
}

const fn base_is_valid(value: u64, phys_bits: u8) -> bool {
    value & (above(phys_bits) | PAGE_OFFSET & !0xff) == 0 && is_type(value as u8)
}

const fn mask_is_valid(value: u64, phys_bits: u8) -> bool {
    value & (above(phys_bits) | PAGE_OFFSET & !MASK_VALID) == 0
}

fn fixed_is_valid(value: u64) -> bool {
    value.to_le_bytes().into_iter().all(is_type)
}
