//! Where the shadow kind takes something away that TLBs may still have. What is not named here needs no flush: links (their
//! tables are owed a flush when they go) and other rights than W, for a guest's own flush is one of its tag; notes about
//! device memory, permission that is given, aging.
use super::ShadowMmu;
use crate::format::EntryFormat;
use crate::mutant;
pub(super) use crate::mutant::FlushSite;
use crate::tables::TableMemory;

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// The one place where an operation notes that TLBs must be flushed.
    pub(super) fn took_away(&mut self, site: FlushSite) {
        self.ops.pending |= !mutant::drops(site);
    }
}
