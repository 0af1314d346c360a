//! What all formats put into an entry for device memory: guest frame and generation.
use super::FRAME;
use crate::addr::{Gfn, PAGE_SHIFT};

/// When an entry for device memory was made, as a number of 19 bits: it is honoured only in the same generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MmioGeneration(u32);

impl MmioGeneration {
    /// Bits that an entry has room for.
    pub const BITS: u32 = 19;

    /// The low bits of `generation`.
    #[inline]
    pub const fn new_truncate(generation: u64) -> Self {
        Self((generation & ((1 << Self::BITS) - 1)) as u32)
    }

    /// The generation as a number.
    #[inline]
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// What an entry for device memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mmio {
    /// The guest frame.
    pub gfn: Gfn,
    /// Whether the guest's own tables permit writes there (the direct kind always says so).
    pub write: bool,
    /// Whether they permit user-mode accesses.
    pub user: bool,
    /// The generation that the entry is of.
    pub generation: MmioGeneration,
}

/// Generation bits 7:0 in entry bits 10:3.
const LOW: u32 = 3;
/// Generation bits 18:8 in entry bits 62:52.
const HIGH: u32 = 52;
/// The highest address bit, which marks the entry where no other bit does.
pub(super) const MARK: u64 = 1 << 51;

/// Frame and generation as entry bits; `None` for a frame above 2^39. The frame is inverted, which sets [`MARK`]: a
/// processor that speculates past the entry (L1TF) finds an address that no memory has.
#[inline]
pub(super) fn encode(gfn: Gfn, generation: MmioGeneration) -> Option<u64> {
    let frame = !(gfn.number() << PAGE_SHIFT) & FRAME;
    let generation = u64::from(generation.number());
    (frame & MARK != 0).then_some(frame | (generation & 0xff) << LOW | (generation >> 8) << HIGH)
}

/// Frame and generation of an entry that [`encode`] made.
#[inline]
pub(super) fn decode(entry: u64) -> (Gfn, MmioGeneration) {
    let generation = entry >> LOW & 0xff | (entry >> HIGH & 0x7ff) << 8;
    (Gfn::new_truncate((!entry & FRAME) >> PAGE_SHIFT), MmioGeneration::new_truncate(generation))
}
