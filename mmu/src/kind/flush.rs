//! Flush obligations: what was taken away, and who must hear of it before its memory is used again.
use super::MmuKind;
use crate::addr::Pfn;
use crate::cpu::CpuSet;
use crate::format::EntryFormat;
use crate::level::ENTRIES;
use crate::memory::{Generation, Quiescent, Shootdown, VmMemory};
use crate::mutant::{self, FlushSite, Mutant};
use crate::sync::{AtomicU64, Ordering};
use crate::tables::{EntryCell, TableFrame, TableMemory, TablePage};

/// A translation, or a table, was taken away: some TLB may still have it.
///
/// The obligation owns the table pages that were taken out. [`issue`](Self::issue) requests the flush and says which CPUs
/// to kick; dropping the obligation requests it as well, only nobody is kicked, so a guest that runs on keeps its old
/// translations until it next exits. Either way the request is sticky: no vCPU of the VM enters the guest again without
/// flushing its tag, and the pages come out of [`MmuKind::reclaim`] when no CPU can reach them any more.
#[derive(Debug)]
#[must_use = "issue the flush, or drop it on purpose to let the next entry do it"]
pub struct Flush<'a, F: EntryFormat, M: TableMemory> {
    format: &'a F,
    tables: &'a M,
    freed: &'a Freed,
    shootdown: &'a Shootdown,
    /// Whether any translation was taken away.
    needed: bool,
    /// The pages, linked through their first entry.
    chain: Option<Chain>,
}

/// A run of frozen table pages, each naming the next.
#[derive(Debug)]
struct Chain {
    first: Pfn,
    last: Pfn,
}

/// What an obligation turned into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "kick these CPUs"]
pub struct Issued {
    /// The old translations are gone once this is acknowledged ([`Shootdown::is_acknowledged`]).
    pub generation: Generation,
    /// CPUs that are in the guest with old translations and must be made to exit.
    pub kick: CpuSet,
}

impl<'a, F: EntryFormat, M: TableMemory> Flush<'a, F, M> {
    #[inline]
    pub(super) fn new(format: &'a F, tables: &'a M, freed: &'a Freed, shootdown: &'a Shootdown) -> Self {
        Self { format, tables, freed, shootdown, needed: false, chain: None }
    }

    /// Whether there is anything to flush.
    pub const fn is_needed(&self) -> bool {
        self.needed || self.chain.is_some()
    }

    /// Requests the flush; `None` if nothing was taken away.
    pub fn issue(mut self) -> Option<Issued> {
        let generation = self.fold()?;
        Some(Issued { generation, kick: self.shootdown.laggards(generation) })
    }

    /// One obligation for both, so that several operations on a kind cost one flush. An obligation of another kind is
    /// not joined but folded by itself.
    pub fn join(mut self, mut other: Self) -> Self {
        if core::ptr::eq(self.freed, other.freed) {
            let theirs = core::mem::take(&mut other.needed);
            self.needed |= theirs && !mutant::is(Mutant::JoinForgets);
            if let Some(theirs) = other.chain.take() {
                self.chain = Some(match self.chain.take() {
                    Some(ours) => {
                        set_next(self.format, self.tables, ours.last, Some(theirs.first));
                        Chain { first: ours.first, last: theirs.last }
                    }
                    None => theirs,
                });
            }
        }
        self
    }

    /// A translation was taken away at `site`.
    #[inline]
    pub(super) fn note(&mut self, site: FlushSite) {
        self.needed |= !mutant::drops(site);
    }

    /// Something was taken away, if it is so: at a site that has had its say.
    pub(super) fn note_if(&mut self, taken: bool) {
        self.needed |= taken;
    }

    /// Takes over a table that was unlinked at `site` and whose entries are all frozen.
    pub(super) fn adopt(&mut self, table: TableFrame, site: FlushSite) {
        self.note(site);
        let pfn = table.pfn();
        self.chain = Some(Chain::prepend(self.chain.take(), self.format, self.tables, pfn));
    }

    fn fold(&mut self) -> Option<Generation> {
        if !self.is_needed() {
            return None;
        }
        // A mutant may own tables and ask for no flush.
        let asks = core::mem::take(&mut self.needed);
        let generation = if asks { self.shootdown.request() } else { self.shootdown.requested() };
        if let Some(chain) = self.chain.take() {
            let mut page = Some(chain.first);
            while let Some(pfn) = page {
                let frozen = self.format.make_frozen(generation.0);
                self.tables.cell(&TableFrame::linked(pfn), STAMP).store(frozen);
                page = next(self.format, self.tables, pfn);
            }
            self.freed.push(self.format, self.tables, &chain);
        }
        Some(generation)
    }
}

impl<F: EntryFormat, M: TableMemory> Drop for Flush<'_, F, M> {
    fn drop(&mut self) {
        if mutant::is(Mutant::DropForgets) {
            return;
        }
        self.fold();
    }
}

/// Entry of a freed page that names the next one.
const NEXT: usize = 0;
/// Entry of a freed page that says which generation must be acknowledged.
const STAMP: usize = 1;

impl Chain {
    /// The chain with `page` put in front.
    fn prepend<F: EntryFormat, M: TableMemory>(
        chain: Option<Self>,
        format: &F,
        tables: &M,
        page: Pfn,
    ) -> Self {
        set_next(format, tables, page, chain.as_ref().map(|chain| chain.first));
        Self { first: page, last: chain.map_or(page, |chain| chain.last) }
    }
}

/// Makes `page` name the next one, or itself if it is the last.
fn set_next<F: EntryFormat, M: TableMemory>(format: &F, tables: &M, page: Pfn, next: Option<Pfn>) {
    let frozen = format.make_frozen(next.unwrap_or(page).number());
    tables.cell(&TableFrame::linked(page), NEXT).store(frozen);
}

/// The page that `page` names.
fn next<F: EntryFormat, M: TableMemory>(format: &F, tables: &M, page: Pfn) -> Option<Pfn> {
    let entry = tables.cell(&TableFrame::linked(page), NEXT).load();
    Some(Pfn::new_truncate(format.frozen_payload(entry))).filter(|&next| next != page)
}

/// Table pages that wait for their generation: a lock-free stack that is only ever pushed to, or taken whole.
#[derive(Debug)]
pub(super) struct Freed {
    /// Frame number plus one; zero is empty.
    first: AtomicU64,
}

impl Freed {
    pub(super) fn new() -> Self {
        Self { first: AtomicU64::new(0) }
    }

    fn push<F: EntryFormat, M: TableMemory>(&self, format: &F, tables: &M, chain: &Chain) {
        let mut head = self.first.load(Ordering::Relaxed);
        loop {
            set_next(format, tables, chain.last, head.checked_sub(1).map(Pfn::new_truncate));
            let new = chain.first.number() + 1;
            match self.first.compare_exchange_weak(head, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(found) => head = found,
            }
        }
    }

    fn take(&self) -> Option<Pfn> {
        self.first.swap(0, Ordering::Acquire).checked_sub(1).map(Pfn::new_truncate)
    }
}

impl<F: EntryFormat, M: TableMemory, O> MmuKind<F, M, O> {
    /// Gives at most `limit` freed pages that no CPU can reach any more to `free`; says how many.
    ///
    /// Call it outside the hot path. Pages whose generation is not acknowledged yet stay for the next call.
    pub fn reclaim<B>(&self, memory: &VmMemory<B>, limit: usize, mut free: impl FnMut(TablePage)) -> usize {
        assert!(memory.id() == self.vm, "memory of another VM");
        let mut given = 0;
        let mut page = self.freed.take();
        // Generations come in any order on the stack, but few differ: ask only when the stamp changes.
        let mut asked: Option<(Generation, Option<Quiescent>)> = None;
        let mut kept: Option<Chain> = None;
        while let Some(pfn) = page {
            page = next(&self.format, &self.tables, pfn);
            let entry = self.cell(&TableFrame::linked(pfn), STAMP).load();
            let stamp = Generation(self.format.frozen_payload(entry));
            let quiescent = match asked.take() {
                Some((generation, answer)) if generation == stamp => answer,
                _ => memory.shootdown().quiescent(stamp),
            };
            match &quiescent {
                Some(quiescent) if given < limit => {
                    free(self.zeroed(pfn, quiescent));
                    given += 1;
                }
                _ => kept = Some(Chain::prepend(kept, &self.format, &self.tables, pfn)),
            }
            asked = Some((stamp, quiescent));
        }
        if let Some(chain) = kept {
            self.freed.push(&self.format, &self.tables, &chain);
        }
        given
    }

    /// Gives every freed page to `free`, when nothing can reach one because the kind is being dismantled.
    pub(super) fn release_freed(&self, free: &mut impl FnMut(TablePage)) {
        let mut page = self.freed.take();
        while let Some(pfn) = page {
            page = next(&self.format, &self.tables, pfn);
            free(self.zeroed(pfn, &Quiescent::dismantled()));
        }
    }

    /// Page `pfn`, which nobody reaches any more, made like new: the one way from a linked table to a free page.
    pub(super) fn zeroed(&self, pfn: Pfn, _: &Quiescent) -> TablePage {
        let table = TableFrame::linked(pfn);
        for index in 0..ENTRIES {
            self.cell(&table, index).store(0);
        }
        TablePage::owned(pfn)
    }
}
