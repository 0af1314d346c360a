//! Entries of a guest's lowest tables, one by one: what a shadow of such a table is brought up to date from.
use super::context::positive_form;
use super::reserved::lowest_reserved;
use super::walker::{prot, prot_by_ept, ACCESSED, DIRTY, EPT_ACCESSED, EPT_DIRTY, PRESENT, WRITE};
use crate::access::Prot;
use crate::addr::Gpa;
use crate::mutant::{self, Mutant};
use crate::role::{CpuRole, RoleFlags};

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

/// How entries of a lowest table are read in a role: of a [`PagingContext`](super::PagingContext) what they take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LowestEntries {
    role: CpuRole,
    /// As in the context.
    wrong: u64,
    flip: u64,
    implied: Prot,
    /// The accessed bit; zero if there is none.
    accessed: u64,
}

/// The accessed bit in tables that are read in `role`; zero if they have none.
const fn accessed_bit(role: &CpuRole) -> u64 {
    if !role.is_ept() {
        ACCESSED
    } else if role.keeps_accessed_dirty() {
        EPT_ACCESSED
    } else {
        0
    }
}

impl LowestEntries {
    /// How they are read in `role`.
    #[inline]
    pub(crate) const fn new(role: &CpuRole) -> Self {
        let (flip, implied) = positive_form(role);
        Self { role: *role, wrong: lowest_reserved(role), accessed: accessed_bit(role), flip, implied }
    }

    /// Whether `raw` says that its page was used; what else it says is not looked at.
    #[inline(always)]
    pub(crate) const fn is_accessed(&self, raw: u64) -> bool {
        raw & self.accessed == self.accessed
    }

    /// Whether `before` and `raw` map a page in the same way, but for one permitting writes and the other not.
    #[inline(always)]
    pub(crate) fn differ_by_write(&self, before: u64, raw: u64) -> bool {
        let more = if mutant::is(Mutant::DifferByMore) { !PRESENT } else { WRITE };
        (before ^ raw) & !more == 0 && (before & raw) & PRESENT != 0 && !self.role.is_ept()
    }

    /// Whether `raw`, which maps a page and is none of EPT, permits writes and was written: only then a leaf has W.
    #[inline(always)]
    pub(crate) const fn is_written(&self, raw: u64) -> bool {
        raw & (WRITE | DIRTY) == WRITE | DIRTY
    }

    /// What `raw` says; `None` if it is not present or has a reserved bit set.
    #[inline]
    pub(crate) fn read(&self, raw: u64) -> Option<LowestEntry> {
        let page = Gpa::new_truncate(raw & !0xfff);
        let accessed = self.is_accessed(raw);
        if self.role.is_ept() {
            let prot = prot_by_ept(&self.role, raw);
            let hides_reads = !prot.contains(Prot::READ)
                && (prot.contains(Prot::WRITE) || !self.role.flags().contains(RoleFlags::EXECUTE_ONLY));
            let unknown_type = matches!(raw >> 3 & 7, 2 | 3 | 7);
            let wrong = raw & self.wrong != 0;
            let dirty = !self.role.keeps_accessed_dirty() || raw & EPT_DIRTY != 0;
            return (!prot.is_empty() && !hides_reads && !unknown_type && !wrong).then_some(LowestEntry {
                page,
                prot,
                accessed,
                dirty,
            });
        }
        let positive = raw ^ self.flip;
        (positive & self.wrong == 0).then(|| LowestEntry {
            page,
            prot: prot(positive, self.implied),
            accessed,
            dirty: raw & DIRTY != 0,
        })
    }
}
