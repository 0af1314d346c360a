//! What an event asks for, as values.
use bitflags::bitflags;

use crate::addr::Gva;

/// What of the vCPU's TLB tag (ASID or VPID) must be flushed before it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a tag that is not flushed keeps old translations"]
pub enum TagFlush {
    /// What the tag holds is current.
    None,
    /// The translations of this address must go.
    Address(Gva),
    /// Everything the tag holds must go.
    All,
}

bitflags! {
    /// Some of the roots that a vCPU keeps.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct RootSet: u8 {
        /// The one it runs on.
        const CURRENT = 1 << 0;
        /// The one before.
        const PREVIOUS_0 = 1 << 1;
        /// The one before that.
        const PREVIOUS_1 = 1 << 2;
        /// The one used least lately.
        const PREVIOUS_2 = 1 << 3;
    }
}

/// How much of a root has to be brought up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// The translation of one address.
    Address(Gva),
    /// All of it.
    All,
}

/// What an event asks for. The [`Mmu`](super::Mmu) remembers it: no entry succeeds before
/// [`carry_out`](super::Mmu::carry_out) has done what concerns the current root, and a previous root is synced before
/// it is run on again. So whoever drops this loses time, never correctness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "ask for `carry_out` if there is work, before the vCPU runs on"]
pub struct Requests {
    /// No root is cached for what the vCPU is now: one has to be taken from the kind.
    pub load: bool,
    /// Roots that have to be synced, and how much of them.
    pub sync: Option<(Sync, RootSet)>,
    /// What has to be flushed from the hardware's TLB: the root is another one, or the guest's flush covers the
    /// current root. (A kind need not flush when the guest makes an entry say less: not before the guest does.)
    pub flush: TagFlush,
}

impl Requests {
    /// Nothing to do.
    pub const NONE: Self = Self { load: false, sync: None, flush: TagFlush::None };

    /// Whether [`carry_out`](super::Mmu::carry_out) has to be called before the next entry.
    pub fn is_work(&self) -> bool {
        let current = |&(how, roots): &(Sync, RootSet)| match how {
            Sync::Address(_) => !roots.is_empty(),
            Sync::All => roots.contains(RootSet::CURRENT),
        };
        self.load || self.sync.as_ref().is_some_and(current)
    }
}
