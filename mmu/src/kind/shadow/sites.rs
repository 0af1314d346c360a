//! Where the shadow kind takes something away that TLBs may still have. What is not named here needs no flush: notes about
//! device memory, permission that is given, aging.
use super::ShadowMmu;
use crate::format::EntryFormat;
use crate::tables::TableMemory;

/// A reason to flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlushSite {
    /// A leaf is gone, and its record in the reverse map: whoever asks for its frame later does not find it.
    DropLeaf,
    /// A link is gone: what was below it is found by no sync any more.
    DropLink,
    /// A leaf lost W, for its frame is shadowed or to be noticed.
    Protect,
    /// A leaf lost W, for the guest's entry has.
    Sync,
    /// A leaf without W took the place of one with it.
    Replace,
    /// A leaf lost W or D, so that the next write is logged.
    Rearm,
    /// All roots became obsolete: who runs on one has to leave it.
    Retire,
    /// The direct kind beside this one took something away.
    Beside,
}

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// The one place where an operation notes that TLBs must be flushed.
    pub(super) fn took_away(&mut self, _site: FlushSite) {
        self.ops.pending = true;
    }
}
