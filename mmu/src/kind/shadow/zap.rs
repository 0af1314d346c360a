//! Operations over ranges of guest frames, in batches of pages of the quota; and taking everything away by generation.
use super::sites::FlushSite;
use super::{number, shadows, space, Kept, ShadowDone, ShadowMmu};
use crate::addr::{Gfn, GfnRange};
use crate::format::{EntryFormat, Writability};
use crate::kind::Sweep;
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, Exclusive, Held, Pages};
use crate::role::PageRole;
use crate::tables::TableMemory;

/// Shadow pages that one batch looks at.
const BATCH: usize = 16;

/// How far a zap, or another operation over a range, has come. Begin with the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZapProgress {
    next: usize,
    done: bool,
}

impl ZapProgress {
    /// Whether all was looked at.
    pub const fn is_done(&self) -> bool {
        self.done
    }

    /// The batch ended early, with page `index`.
    pub(super) const fn go_on_after(&mut self, index: u32) {
        self.next = index as usize + 1;
        self.done = false;
    }
}

/// A leaf that an operation over a range has met.
pub(super) struct Met {
    pub(super) entry: u32,
    /// The frame it maps, or the first one.
    pub(super) gfn: Gfn,
    /// The role of its page.
    pub(super) role: PageRole,
}

impl Met {
    pub(super) fn is_huge(&self) -> bool {
        self.role.level != Level::L1
    }
}

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// Takes the leaves of the range away, and the shadows of tables in it: for slots that change and backing that moves.
    /// Works in batches, whose number depends on the page quota alone.
    pub fn zap<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        range: GfnRange,
        progress: &mut ZapProgress,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        for index in self.batch(progress) {
            let page = self.page(index);
            if page.role.is_some_and(|role| shadows(&role)) && range.contains(page.gfn) {
                self.zap_page(guard, index);
                // A root that is left over is not to be run on: its table may be no RAM any more.
                self.untrack_page(guard, index);
            }
            self.each_leaf(index, range, |kind, met| kind.drop_entry(memory, met.entry));
        }
        self.done_surely(guard, ())
    }

    /// Write-protects the range so that the next write to each page faults, and is permitted again by that fault. Huge
    /// pages go.
    pub fn write_protect<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        range: GfnRange,
        progress: &mut ZapProgress,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        for index in self.batch(progress) {
            self.each_leaf(index, range, |kind, met| kind.watch(memory, &met, FlushSite::ShadowProtect));
        }
        self.done_surely(guard, ())
    }

    /// Takes back [`write_protect`](Self::write_protect) without waiting for faults, where the slot is not logged. More
    /// permission needs no flush.
    pub fn write_unprotect<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        range: GfnRange,
        progress: &mut ZapProgress,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        for index in self.batch(progress) {
            self.each_leaf(index, range, |kind, met| {
                let watched = kind.format.writability(kind.value(met.entry)) == Some(Writability::Watched);
                if watched && memory.logged_by(space(&met.role).at(met.gfn)).is_none() {
                    let format = kind.format;
                    kind.edit(met.entry, |value| format.with_writability(value, Writability::Writable));
                }
            });
        }
        self.done(guard, ())
    }

    /// Protects pages whose writes must be emulated from now on because somebody else
    /// [wants it](Exclusive::track_writes). The kind itself follows what it tracks on its own.
    pub fn track_range<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        sweep: Sweep,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        for gfn in sweep.range().start()..sweep.range().end() {
            self.write_protect_gfn(memory, Gfn::new_truncate(gfn));
        }
        self.done_surely(guard, ())
    }

    /// Makes the leaves of a batch old and says whether any was young. Never flushes: a page that is used by way of a TLB
    /// alone may be taken for unused. Where the processor keeps no flags, every leaf is young.
    pub fn test_and_clear_young<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        range: GfnRange,
        progress: &mut ZapProgress,
    ) -> bool {
        self.begin(guard);
        let mut young = false;
        for index in self.batch(progress) {
            self.each_leaf(index, range, |kind, met| {
                let format = kind.format;
                young |= !kind.keeps_flags(&met.role)
                    || format.is_young(kind.edit(met.entry, |value| format.make_old(value)));
            });
        }
        young
    }

    /// Says whether any leaf of a batch is young, and changes nothing.
    pub fn test_young<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        range: GfnRange,
        progress: &mut ZapProgress,
    ) -> bool {
        self.begin(guard);
        let mut young = false;
        for index in self.batch(progress) {
            self.each_leaf(index, range, |kind, met| young |= kind.format.is_young(kind.value(met.entry)));
        }
        young
    }

    /// Makes every root of the VM obsolete: no vCPU enters on one, no fault maps into one. The pages go by
    /// [`zap_obsolete`](Self::zap_obsolete).
    pub fn invalidate_all<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>) -> ShadowDone<()> {
        self.begin(guard);
        guard.retire_roots();
        self.took_away(FlushSite::ShadowRetire);
        self.done(guard, ())
    }

    /// Frees pages of earlier generations that no vCPU holds as a root, in batches.
    pub fn zap_obsolete<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        progress: &mut ZapProgress,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let generation = Held::<B>::memory(guard).root_generation();
        for index in self.batch(progress) {
            if self.role(index).is_some() && self.page(index).generation != generation {
                self.zap_page(guard, index);
            }
        }
        self.done(guard, ())
    }

    /// The pages of the next batch, whether they are in use or not.
    pub(super) fn batch(&self, progress: &mut ZapProgress) -> core::ops::Range<u32> {
        let pages = self.ops.store.pages.len();
        let first = progress.next.min(pages);
        progress.next = (first + BATCH).min(pages);
        progress.done = progress.next == pages;
        first as u32..progress.next as u32
    }

    /// Calls `visit` with each leaf of a page that maps some frame of the range.
    pub(super) fn each_leaf(&mut self, index: u32, range: GfnRange, mut visit: impl FnMut(&mut Self, Met)) {
        let Some(role) = self.role(index) else { return };
        for entry in (0..ENTRIES).map(|entry| number(index, entry)) {
            let Kept::Leaf(gfn) = self.note(entry).kept else { continue };
            if GfnRange::new(gfn, role.level.pages()).is_ok_and(|leaf| leaf.overlaps(range)) {
                visit(self, Met { entry, gfn, role });
            }
        }
    }

    /// Has the next write to a page noticed: takes W away. Huge pages go.
    pub(super) fn watch(&mut self, pages: &dyn Pages, met: &Met, site: FlushSite) {
        if met.is_huge() {
            return self.drop_entry(pages, met.entry);
        }
        let old = self.value(met.entry);
        if self.format.may_be_cached_writable(old) {
            let format = self.format;
            self.edit(met.entry, |value| format.with_writability(value, Writability::Watched));
            self.took_away(site);
        }
    }
}
