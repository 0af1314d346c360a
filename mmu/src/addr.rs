//! Addresses and frame numbers, one type a stage, so that the wrong walker does not compile.
use core::fmt;

/// Bits of a physical address that x86-64 can ever have (AMD APM vol. 2, 5.1; Intel SDM vol. 3, 4.1.4).
pub const MAX_PHYSICAL_BITS: u32 = 52;
/// Bits of an address that lie inside a 4 KiB page.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// Every bit a physical address may have.
const PHYSICAL_MASK: u64 = (1 << MAX_PHYSICAL_BITS) - 1;
/// Every bit a frame number may have.
const FRAME_MASK: u64 = PHYSICAL_MASK >> PAGE_SHIFT;

/// Which address a walk starts from: the stage that a fault belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Linear addresses, translated by CR3's tables.
    Gva,
    /// L2 guest-physical addresses, translated by the tables that L1 keeps for L2.
    NGpa,
    /// L1 guest-physical addresses, translated by slots and by Umbra's own tables.
    Gpa,
    /// Host-physical addresses, translated by nobody.
    Hpa,
}

mod sealed {
    pub trait Sealed {}
}

/// An address of one stage: a walker goes from one `Address` type to another.
pub trait Address: sealed::Sealed + Copy + Eq + Ord + fmt::Debug {
    /// The stage this type stands for.
    const STAGE: Stage;
    /// The address as a number.
    fn bits(self) -> u64;
    /// The address with bits that the stage cannot have cut off.
    fn from_bits_truncate(bits: u64) -> Self;
}

/// A number that is too wide for the address or frame type it was meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooWide(
    /// The rejected value.
    pub u64,
);

impl fmt::Display for TooWide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} does not fit a {MAX_PHYSICAL_BITS}-bit physical address", self.0)
    }
}

macro_rules! physical {
    ($(#[$doc:meta])* $name:ident, $frame:ident, $to_frame:ident) => {
        $(#[$doc])*
        ///
        /// Invariant: bits 63:52 are zero.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address, or the number back when it has more than 52 bits.
            #[inline]
            pub const fn new(bits: u64) -> Result<Self, TooWide> {
                if bits & !PHYSICAL_MASK == 0 { Ok(Self(bits)) } else { Err(TooWide(bits)) }
            }

            /// The address with bits 63:52 cut off.
            #[inline]
            pub const fn new_truncate(bits: u64) -> Self {
                Self(bits & PHYSICAL_MASK)
            }

            /// The address as a number.
            #[inline]
            pub const fn bits(self) -> u64 {
                self.0
            }

            /// The frame that holds this address.
            #[inline]
            pub const fn $to_frame(self) -> $frame {
                $frame(self.0 >> PAGE_SHIFT)
            }

            /// Offset inside the 4 KiB page.
            #[inline]
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }

            /// The address `bytes` further on, unless it leaves the 52-bit space.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(bits) if bits & !PHYSICAL_MASK == 0 => Some(Self(bits)),
                    _ => None,
                }
            }
        }

        impl sealed::Sealed for $name {}
        impl Address for $name {
            const STAGE: Stage = Stage::$name;
            #[inline]
            fn bits(self) -> u64 {
                self.0
            }
            #[inline]
            fn from_bits_truncate(bits: u64) -> Self {
                Self::new_truncate(bits)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }
    };
}

macro_rules! frame {
    ($(#[$doc:meta])* $name:ident, $address:ident, $start:ident) => {
        $(#[$doc])*
        ///
        /// Invariant: less than 2^40, so that the address of the frame fits 52 bits.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The frame number, or the number back when it has more than 40 bits.
            #[inline]
            pub const fn new(number: u64) -> Result<Self, TooWide> {
                if number & !FRAME_MASK == 0 { Ok(Self(number)) } else { Err(TooWide(number)) }
            }

            /// The frame number with bits 63:40 cut off.
            #[inline]
            pub const fn new_truncate(number: u64) -> Self {
                Self(number & FRAME_MASK)
            }

            /// The frame number as a number.
            #[inline]
            pub const fn number(self) -> u64 {
                self.0
            }

            /// The address of the frame's first byte.
            #[inline]
            pub const fn $start(self) -> $address {
                $address(self.0 << PAGE_SHIFT)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }
    };
}

physical! {
    /// An L2 guest-physical address: what L2's own tables produce and L1's nested tables translate.
    NGpa, Ngfn, ngfn
}
physical! {
    /// A guest-physical address (of L1): what slots and the direct kind translate.
    Gpa, Gfn, gfn
}
physical! {
    /// A host-physical address.
    Hpa, Pfn, pfn
}
frame! {
    /// Number of an L2 guest-physical 4 KiB frame.
    Ngfn, NGpa, ngpa
}
frame! {
    /// Number of a guest-physical 4 KiB frame.
    Gfn, Gpa, gpa
}
frame! {
    /// Number of a host-physical 4 KiB frame.
    Pfn, Hpa, hpa
}

/// A linear address, as an instruction produces it after segmentation.
///
/// Any 64-bit value: whether it is canonical depends on the paging mode (AMD APM vol. 2, 5.3.1), so that is a question
/// ([`Gva::is_canonical`]) and not an invariant. Modes without long mode use bits 31:0 only.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Gva(u64);

/// A linear address that is not canonical for the width it was checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonCanonical(
    /// The rejected value.
    pub u64,
);

impl Gva {
    /// The linear address with this value.
    #[inline]
    pub const fn new(bits: u64) -> Self {
        Self(bits)
    }

    /// The address, or the number back when bits above `width` do not repeat bit `width - 1`.
    #[inline]
    pub const fn new_canonical(bits: u64, width: VaWidth) -> Result<Self, NonCanonical> {
        let gva = Self::new_truncate(bits, width);
        if gva.0 == bits {
            Ok(gva)
        } else {
            Err(NonCanonical(bits))
        }
    }

    /// The address made canonical by repeating bit `width - 1` in the bits above it.
    #[inline]
    pub const fn new_truncate(bits: u64, width: VaWidth) -> Self {
        let unused = 64 - width as u32;
        Self((((bits << unused) as i64) >> unused) as u64)
    }

    /// Whether the bits above `width` repeat bit `width - 1`.
    #[inline]
    pub const fn is_canonical(self, width: VaWidth) -> bool {
        Self::new_truncate(self.0, width).0 == self.0
    }

    /// The address as a number.
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }
}

impl sealed::Sealed for Gva {}
impl Address for Gva {
    const STAGE: Stage = Stage::Gva;
    #[inline]
    fn bits(self) -> u64 {
        self.0
    }
    #[inline]
    fn from_bits_truncate(bits: u64) -> Self {
        Self(bits)
    }
}

impl fmt::Debug for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gva({:#x})", self.0)
    }
}
impl fmt::LowerHex for Gva {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

/// Bits of a linear address that paging translates in long mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum VaWidth {
    /// Four-level paging.
    Bits48 = 48,
    /// Five-level paging (CR4.LA57).
    Bits57 = 57,
}

/// A run of guest frames, `start..end`.
///
/// Invariant: `start <= end <= 2^40`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GfnRange {
    start: u64,
    end: u64,
}

impl GfnRange {
    /// All guest frames there can be.
    pub const ALL: Self = Self { start: 0, end: FRAME_MASK + 1 };

    /// No frame.
    pub const EMPTY: Self = Self { start: 0, end: 0 };

    /// One frame.
    #[inline]
    pub const fn of(gfn: Gfn) -> Self {
        Self { start: gfn.0, end: gfn.0 + 1 }
    }

    /// `pages` frames from `start` on, or the end back when it lies beyond the 52-bit space.
    pub const fn new(start: Gfn, pages: u64) -> Result<Self, TooWide> {
        match start.0.checked_add(pages) {
            Some(end) if end <= FRAME_MASK + 1 => Ok(Self { start: start.0, end }),
            _ => Err(TooWide(start.0.wrapping_add(pages))),
        }
    }

    /// Number of the first frame.
    #[inline]
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Number of the first frame after the range (2^40 at most, which is no [`Gfn`]).
    #[inline]
    pub const fn end(self) -> u64 {
        self.end
    }

    /// How many frames there are.
    #[inline]
    pub const fn pages(self) -> u64 {
        self.end - self.start
    }

    /// Whether the range has no frame.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether the range holds `gfn`.
    #[inline]
    pub const fn contains(self, gfn: Gfn) -> bool {
        gfn.0.wrapping_sub(self.start) < self.end - self.start
    }

    /// The range without its frames below `gfn`.
    #[inline]
    pub(crate) const fn from(self, gfn: u64) -> Self {
        let start = if gfn < self.start {
            self.start
        } else if gfn > self.end {
            self.end
        } else {
            gfn
        };
        Self { start, end: self.end }
    }

    /// Whether the two ranges have a frame in common.
    #[inline]
    pub const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

const _: () = assert!(size_of::<Gpa>() == 8 && size_of::<Gva>() == 8 && size_of::<Pfn>() == 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn physical_addresses_keep_52_bits() {
        assert_eq!(Gpa::new(1 << 52), Err(TooWide(1 << 52)));
        assert_eq!(Gpa::new_truncate(u64::MAX).bits(), (1 << 52) - 1);
        assert_eq!(Gpa::new_truncate(u64::MAX).checked_add(1), None);
        assert_eq!(Gpa::new_truncate(0x1234).gfn(), Gfn::new_truncate(1));
        assert_eq!(Pfn::new_truncate(u64::MAX).hpa().bits(), ((1 << 52) - 1) & !0xfff);
        assert_eq!(Pfn::new(1 << 40), Err(TooWide(1 << 40)));
    }

    #[test]
    fn canonical_form_follows_the_width() {
        let top = 0xffff_8000_0000_0000;
        assert!(Gva::new(top).is_canonical(VaWidth::Bits48));
        assert!(!Gva::new(0x8000_0000_0000).is_canonical(VaWidth::Bits48));
        assert!(Gva::new(0x8000_0000_0000).is_canonical(VaWidth::Bits57));
        assert_eq!(Gva::new_truncate(0x8000_0000_0000, VaWidth::Bits48), Gva::new(top));
        assert_eq!(Gva::new_canonical(1 << 63, VaWidth::Bits57), Err(NonCanonical(1 << 63)));
    }

    #[test]
    fn ranges_end_within_the_address_space() {
        let last = Gfn::new_truncate(u64::MAX);
        let range = GfnRange::new(last, 1).unwrap();
        assert!(range.contains(last) && !range.contains(Gfn::default()));
        assert!(GfnRange::new(last, 2).is_err());
        assert!(GfnRange::new(last, u64::MAX).is_err());
        assert!(GfnRange::ALL.overlaps(range));
        assert!(!GfnRange::new(Gfn::default(), 0).unwrap().contains(Gfn::default()));
    }
}
