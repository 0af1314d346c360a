//! Huge pages of shadows: when small ones may become huge again, and huge ones that are not executable (CVE-2018-12207, "iTLB
//! multihit").
//!
//! A guest's huge page is shadowed by a huge leaf, or by *direct* pages: where a table lies in it, the slot is logged, the
//! backing is in pieces, or it must be executable. A direct page that is not needed any more is dropped, and the next fault
//! maps the block as one.
use super::zap::ZapProgress;
use super::{space, Kept, ShadowDone, ShadowMmu, ShadowPage};
use crate::access::AccessKind;
use crate::addr::GfnRange;
use crate::format::EntryFormat;
use crate::level::{Level, PageSize};
use crate::memory::{Backing, Exclusive, Held, Pages, Resolved, VmMemory};
use crate::mutant::{self, Mutant};
use crate::tables::TableMemory;

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// Drops the direct pages of the range that one huge page can take the place of: when a log has ended, or writes to a page
    /// are not tracked any more. In batches.
    pub fn collapse<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        range: GfnRange,
        progress: &mut ZapProgress,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        for index in self.batch(progress) {
            let page = self.page(index);
            let Some(size) = self.block_of(index) else { continue };
            let inside = GfnRange::new(page.gfn, size.pages()).is_ok_and(|block| block.overlaps(range));
            if inside
                && !page.split
                && (mutant::is(Mutant::ShadowCollapseLogged) || self.can_be_huge(memory, page, size))
            {
                self.zap_page(guard, index);
            }
        }
        self.done(guard, ())
    }

    /// Makes huge pages not executable from now on, or executable again. Returns what to [`zap`](Self::zap), so that the pages
    /// that are there follow; `None` if the format cannot forbid fetches.
    pub fn forbid_huge_execute<'m, B: Backing + 'm>(
        &mut self,
        guard: &Exclusive<'m, B>,
        forbid: bool,
    ) -> Option<GfnRange> {
        self.begin(guard);
        if !self.format.can_forbid_fetches() {
            return None;
        }
        self.ops.no_huge_execute = forbid;
        Some(GfnRange::ALL)
    }

    /// Whether huge pages are not executable.
    pub const fn forbids_huge_execute(&self) -> bool {
        self.ops.no_huge_execute
    }

    /// Pages that are there because a huge page must not be executable.
    pub const fn execute_splits(&self) -> u64 {
        self.ops.splits
    }

    /// Drops one in `ratio` of those pages (at least one), the first that come, so that their blocks can be huge again where
    /// the guest no longer fetches. One progress goes through many calls: begin anew when it is done. Pages of logged slots
    /// stay.
    pub fn recover_huge_pages<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        ratio: u64,
        progress: &mut ZapProgress,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        let mut left = self.ops.splits.div_ceil(ratio.max(1));
        for index in self.batch(progress) {
            let page = self.page(index);
            let logged = memory.is_logging()
                && page.role.is_some_and(|role| memory.logged_by(space(&role).at(page.gfn)).is_some());
            if page.role.is_some() && page.split && (!logged || mutant::is(Mutant::ShadowRecoverLogged)) {
                self.zap_page(guard, index);
                left -= 1;
                if left == 0 {
                    progress.go_on_after(index);
                    break;
                }
            }
        }
        self.done(guard, ())
    }

    /// The size of the huge page that a direct page stands for a part of, if it does. A root's own page is none.
    pub(super) fn block_of(&self, index: u32) -> Option<PageSize> {
        let page = self.page(index);
        let role = page.role.filter(|role| role.direct && page.roots == 0)?;
        let size = match role.level {
            Level::L1 => PageSize::Size2M,
            Level::L2 => PageSize::Size1G,
            _ => return None,
        };
        let legacy = size == PageSize::Size1G && self.is_legacy(index);
        (self.format.has_size(size) && !legacy).then_some(size)
    }

    fn can_be_huge<B: Backing>(&self, memory: &VmMemory<B>, page: &ShadowPage, size: PageSize) -> bool {
        let hit = page.role.and_then(|role| memory.find_slot(space(&role), page.gfn.gpa()));
        let Some(hit) = hit.filter(|hit| memory.allows(hit, size)) else { return false };
        let settled = memory.invalidations().settled().is_some();
        let block = memory.backing().resolve(&hit.ram(), size, AccessKind::Read);
        let whole = matches!(block, Resolved::Ram { pfn, size: found }
            if found == size && pfn.number().is_multiple_of(size.pages()));
        settled && whole
    }

    /// Whether small pages are below the entry because of the fetches, so that a huge leaf does not take their place: fetches
    /// and other accesses would drive each other away.
    pub(super) fn is_split(&self, entry: u32) -> bool {
        matches!(self.note(entry).kept, Kept::Link(child) if self.page(child).split)
    }

    /// Marks a direct page on the way to a page that is small for its fetches.
    pub(super) fn mark_split(&mut self, index: u32) {
        if !core::mem::replace(&mut self.page_mut(index).split, true) {
            self.ops.splits += 1;
        }
    }
}
