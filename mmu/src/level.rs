//! Levels of a page table and the page sizes that leaves have.
use crate::addr::PAGE_SHIFT;

/// Entries in a table page of the 64-bit formats.
pub const ENTRIES: usize = 512;
/// Address bits that one level of a 64-bit format translates.
pub(crate) const INDEX_BITS: u32 = 9;

/// Level of a table in a 64-bit format, counted from the page upwards (AMD APM vol. 2, 5.3.3).
///
/// Invariant by construction: one of five. A level never comes from arithmetic on guest data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// Page table: its entries map 4 KiB.
    L1 = 1,
    /// Page directory: its entries cover 2 MiB.
    L2 = 2,
    /// Page-directory pointer table: its entries cover 1 GiB.
    L3 = 3,
    /// Page-map level 4: its entries cover 512 GiB.
    L4 = 4,
    /// Page-map level 5: its entries cover 256 TiB.
    L5 = 5,
}

impl Level {
    /// The level below, where the entries of a table at this level lead.
    #[inline]
    pub const fn down(self) -> Option<Self> {
        match self {
            Self::L1 => None,
            Self::L2 => Some(Self::L1),
            Self::L3 => Some(Self::L2),
            Self::L4 => Some(Self::L3),
            Self::L5 => Some(Self::L4),
        }
    }

    /// All levels, the lowest first.
    pub(crate) const ALL: [Self; 5] = [Self::L1, Self::L2, Self::L3, Self::L4, Self::L5];

    /// Lowest address bit that this level's index comes from.
    #[inline]
    pub const fn shift(self) -> u32 {
        PAGE_SHIFT + (self as u32 - 1) * INDEX_BITS
    }

    /// Lowest bit of a frame number that this level's index comes from.
    #[inline]
    pub(crate) const fn frame_shift(self) -> u32 {
        self.shift() - PAGE_SHIFT
    }

    /// The level whose index comes from bit `shift` of a frame number.
    #[inline]
    pub(crate) const fn at_frame_shift(shift: u32) -> Self {
        match shift / INDEX_BITS {
            0 => Self::L1,
            1 => Self::L2,
            2 => Self::L3,
            3 => Self::L4,
            _ => Self::L5,
        }
    }

    /// 4 KiB frames that one entry covers.
    #[inline]
    pub const fn pages(self) -> u64 {
        1 << self.frame_shift()
    }

    /// Index of the entry for frame number `frame` in a table at this level.
    #[inline]
    pub const fn index(self, frame: u64) -> usize {
        (frame >> self.frame_shift()) as usize % ENTRIES
    }

    /// Position in a table indexed by level: 0 for the lowest.
    #[inline]
    pub const fn ordinal(self) -> usize {
        self as usize - 1
    }

    /// Size of a leaf at this level; there are none above L3.
    #[inline]
    pub const fn page_size(self) -> Option<PageSize> {
        match self {
            Self::L1 => Some(PageSize::Size4K),
            Self::L2 => Some(PageSize::Size2M),
            Self::L3 => Some(PageSize::Size1G),
            Self::L4 | Self::L5 => None,
        }
    }
}

/// Size of a page that a leaf of a 64-bit format maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl PageSize {
    /// Level of the table whose leaves have this size.
    #[inline]
    pub const fn level(self) -> Level {
        match self {
            Self::Size4K => Level::L1,
            Self::Size2M => Level::L2,
            Self::Size1G => Level::L3,
        }
    }

    /// 4 KiB frames in the page.
    #[inline]
    pub const fn pages(self) -> u64 {
        self.level().pages()
    }

    /// Bytes in the page.
    #[inline]
    pub const fn bytes(self) -> u64 {
        1 << self.level().shift()
    }

    /// The next smaller size.
    #[inline]
    pub const fn smaller(self) -> Option<Self> {
        match self {
            Self::Size4K => None,
            Self::Size2M => Some(Self::Size4K),
            Self::Size1G => Some(Self::Size2M),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shifts_and_sizes() {
        assert_eq!(Level::L1.shift(), 12);
        assert_eq!(Level::L5.shift(), 48);
        assert_eq!(PageSize::Size2M.pages(), 512);
        assert_eq!(PageSize::Size1G.bytes(), 1 << 30);
        assert_eq!(Level::L4.index(0x0000_7fff_ffff_f000 >> 12), 255);
        assert_eq!(Level::L1.index(u64::MAX), 511);
        assert!(Level::ALL.into_iter().all(|level| Level::at_frame_shift(level.frame_shift()) == level));
    }
}
