//! The page-attribute table of L1, which entries of its nested tables choose their memory type from.
use crate::format::MemoryType;

/// The eight memory types of a PAT register (AMD APM vol. 2, 7.8.2), as far as they decide what a shadow says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PatTypes(
    /// Three bits for each entry.
    u32,
);

impl PatTypes {
    /// Write-back, whatever is chosen.
    pub const WRITE_BACK: Self = Self(0);

    /// The types in the PAT register `pat`. What has no type, or is uncacheable but for an MTRR that says otherwise, is
    /// uncacheable.
    pub const fn new(pat: u64) -> Self {
        let mut types = 0;
        let mut index = 0;
        while index < 8 {
            let number = match pat >> (8 * index) & 7 {
                6 => 0,
                4 => 1,
                1 => 2,
                5 => 3,
                _ => 4,
            };
            types |= number << (3 * index);
            index += 1;
        }
        Self(types)
    }

    /// The type at `index`: PWT is bit 0 of it, PCD bit 1, PAT bit 2.
    pub const fn at(self, index: u32) -> MemoryType {
        match self.0 >> (3 * (index % 8)) & 7 {
            0 => MemoryType::WriteBack,
            1 => MemoryType::WriteThrough,
            2 => MemoryType::WriteCombining,
            3 => MemoryType::WriteProtected,
            _ => MemoryType::Uncacheable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_types_after_power_on() {
        let types = PatTypes::new(0x0007_0406_0007_0406);
        let [wb, wt, uc] = [MemoryType::WriteBack, MemoryType::WriteThrough, MemoryType::Uncacheable];
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 7].map(|index| types.at(index)), [wb, wt, uc, uc, wb, wt, uc, uc]);
        let others = PatTypes::new(0x0501);
        assert_eq!(
            [0, 1].map(|index| others.at(index)),
            [MemoryType::WriteCombining, MemoryType::WriteProtected]
        );
        assert_eq!(PatTypes::new(0x0606_0606_0606_0606), PatTypes::WRITE_BACK);
    }
}
