//! Address spaces: a processor in system-management mode sees other memory than otherwise (Intel SDM vol. 3, 33.4.2; AMD APM
//! vol. 2, 10.2.5).
use bitflags::bitflags;

use crate::addr::Gfn;

/// Which of a VM's address spaces an address is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Space {
    /// What vCPUs see, and devices.
    #[default]
    Normal = 0,
    /// What vCPUs in system-management mode see.
    Smm = 1,
}

bitflags! {
    /// A set of address spaces.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Spaces: u8 {
        /// [`Space::Normal`].
        const NORMAL = 1 << Space::Normal as u8;
        /// [`Space::Smm`].
        const SMM = 1 << Space::Smm as u8;
    }
}

impl Space {
    /// Every space.
    pub const ALL: [Self; 2] = [Self::Normal, Self::Smm];

    /// The space that a vCPU sees.
    #[inline]
    pub const fn of(smm: bool) -> Self {
        if smm {
            Self::Smm
        } else {
            Self::Normal
        }
    }

    /// `gfn` in this space.
    #[inline]
    pub const fn at(self, gfn: Gfn) -> SpaceGfn {
        SpaceGfn { space: self, gfn }
    }
}

impl From<Space> for Spaces {
    #[inline]
    fn from(space: Space) -> Self {
        Self::from_bits_retain(1 << space as u8)
    }
}

/// A guest frame of one space. A slot that is visible in both is named by its start in either; a frame that comes without a
/// space is of the normal one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SpaceGfn {
    /// The space.
    pub space: Space,
    /// The frame.
    pub gfn: Gfn,
}

impl From<Gfn> for SpaceGfn {
    #[inline]
    fn from(gfn: Gfn) -> Self {
        Space::Normal.at(gfn)
    }
}
