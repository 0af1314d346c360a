//! Entries of a guest's lowest tables, one by one: what a shadow of such a table is brought up to date from.
use super::context::PagingContext;
use super::walker::{ACCESSED, DIRTY, EPT_ACCESSED, EPT_DIRTY};
use crate::access::Prot;
use crate::addr::{Address, Gpa};
use crate::level::Level;
use crate::role::RoleFlags;

/// An entry of a page table that maps a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LowestEntry {
    /// First address of the page.
    pub(crate) page: Gpa,
    /// What this entry alone permits.
    pub(crate) prot: Prot,
    pub(crate) accessed: bool,
    pub(crate) dirty: bool,
}

impl<In: Address, Out: Address> PagingContext<In, Out> {
    /// What `raw`, in a table of the lowest level, says; `None` if it is not present or has a reserved bit set.
    pub(crate) fn lowest_entry(&self, raw: u64) -> Option<LowestEntry> {
        let page = Gpa::new_truncate(raw & !0xfff);
        if self.role().is_ept() {
            let prot = self.prot_by_ept(raw);
            let hides_reads = !prot.contains(Prot::READ)
                && (prot.contains(Prot::WRITE) || !self.role().flags().contains(RoleFlags::EXECUTE_ONLY));
            let unknown_type = matches!(raw >> 3 & 7, 2 | 3 | 7);
            let wrong = raw & self.wrong[Level::L1.ordinal()][0] != 0;
            let keeps = self.role().keeps_accessed_dirty();
            return (!prot.is_empty() && !hides_reads && !unknown_type && !wrong).then_some(LowestEntry {
                page,
                prot,
                accessed: !keeps || raw & EPT_ACCESSED != 0,
                dirty: !keeps || raw & EPT_DIRTY != 0,
            });
        }
        let positive = raw ^ self.flip;
        (positive & self.wrong[Level::L1.ordinal()][0] == 0).then(|| LowestEntry {
            page,
            prot: self.prot(positive),
            accessed: raw & ACCESSED != 0,
            dirty: raw & DIRTY != 0,
        })
    }
}
