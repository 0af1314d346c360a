//! The dirty log in shadows: which leaves let writes go unnoticed, and how that is taken back.
//!
//! A slot that is logged by dirty bits has its leaves marked by the processor, and collected by frame: the reverse map knows
//! the frame of each. Shadows of nested tables are write-protected all the same, for where dirty bits come as a list from the
//! processor (page-modification log), it would list L2's addresses (Intel SDM vol. 3, 29.3.6).
use super::sites::FlushSite;
use super::zap::{Met, ZapProgress};
use super::{is_nested, space, split, ShadowDone, ShadowMmu};
use crate::addr::{Gfn, GfnRange};
use crate::format::{EntryFormat, Writability};
use crate::kind::Sweep;
use crate::level::Level;
use crate::memory::{Backing, Exclusive, Held, LogBy, Pages, SpaceGfn};
use crate::mutant::{self, Mutant};
use crate::role::PageRole;
use crate::tables::TableMemory;

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// Arms the pages of a slot, as the beginning of its log asks for, so that the next write to each is logged: by write
    /// protection, or by taking D away. Huge pages go. After the flush no write goes unnoticed.
    pub fn rearm<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        sweep: &Sweep,
        progress: &mut ZapProgress,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        for index in self.batch(progress) {
            self.each_leaf(index, sweep.range(), |kind, met| {
                if sweep.spaces().contains(space(&met.role).into()) {
                    kind.rearm_leaf(memory, &met);
                }
            });
        }
        self.done_surely(guard, ())
    }

    /// Arms those of the 64 pages from `first` on, all of one slot, that have a bit in `mask`: what
    /// [`DirtyLog::clear`](crate::DirtyLog::clear) returned.
    pub fn rearm_pages<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        first: impl Into<SpaceGfn>,
        mask: u64,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        let first = first.into();
        let hit = memory.find_slot(first.space, first.gfn.gpa());
        let spaces = hit.map_or(first.space.into(), |hit| hit.spaces());
        for bit in (0..u64::BITS).filter(|bit| mask >> bit & 1 != 0) {
            let Ok(gfn) = Gfn::new(first.gfn.number() + u64::from(bit)) else { break };
            self.leaves_of(gfn, |kind, entry, _| {
                let role = kind.role(split(entry).0);
                if let Some(role) = role.filter(|role| spaces.contains(space(role).into())) {
                    kind.rearm_leaf(memory, &Met { entry, gfn, role });
                }
            });
        }
        self.done_surely(guard, ())
    }

    /// Moves the dirty bits of the range into the log, where the slot is logged by them.
    pub fn collect_dirty<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        range: GfnRange,
        progress: &mut ZapProgress,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        for index in self.batch(progress) {
            self.each_leaf(index, range, |kind, met| {
                let by_bits = kind.logged_by(memory, &met.role, met.gfn) == Some(LogBy::DirtyBits);
                if by_bits && !met.is_huge() && kind.clean(&met) {
                    memory.note_dirty_bit(space(&met.role).at(met.gfn));
                }
            });
        }
        self.done_surely(guard, ())
    }

    fn rearm_leaf(&mut self, pages: &dyn Pages, met: &Met) {
        match self.logged_by(pages, &met.role, met.gfn) {
            // A write that the bit tells of came before the page is copied.
            Some(LogBy::DirtyBits) if !met.is_huge() => drop(self.clean(met)),
            _ => self.watch(pages, met, FlushSite::ShadowRearm),
        }
    }

    /// Takes D from a leaf; whether it was set.
    fn clean(&mut self, met: &Met) -> bool {
        let dirty = self.format.is_dirty(self.value(met.entry));
        if dirty {
            let format = self.format;
            self.edit(met.entry, |value| format.without_dirty(value));
            self.took_away(FlushSite::ShadowRearm);
        }
        dirty
    }

    /// How writes to `gfn` through a page with this role are noticed.
    pub(super) fn logged_by(&self, pages: &dyn Pages, role: &PageRole, gfn: Gfn) -> Option<LogBy> {
        let by = pages.logged_by(space(role).at(gfn))?;
        let marks =
            self.format.has_dirty_bits() && (!is_nested(role) || mutant::is(Mutant::NestedByDirtyBits));
        Some(if marks { by } else { LogBy::WriteProtection })
    }

    /// The value of a new leaf of 4 KiB that nobody has written to yet, so that the first write is noticed.
    pub(super) fn armed(&self, pages: &dyn Pages, role: &PageRole, gfn: Gfn, value: u64) -> u64 {
        if self.format.writability(value) != Some(Writability::Writable) || mutant::is(Mutant::ShadowUnarmed)
        {
            return value;
        }
        match self.logged_by(pages, role, gfn) {
            None => value,
            Some(LogBy::DirtyBits) => self.format.without_dirty(value),
            Some(LogBy::WriteProtection) => {
                self.format.with_writability(self.format.without_dirty(value), Writability::Watched)
            }
        }
    }

    /// A leaf with the value `old` is gone, or its D: if that is how the slot is logged, the log takes the place of D.
    pub(super) fn lose_dirty(&self, pages: &dyn Pages, role: &PageRole, gfn: Gfn, old: u64) {
        if role.level == Level::L1
            && self.format.is_dirty(old)
            && !is_nested(role)
            && !mutant::is(Mutant::ShadowDirtyLost)
        {
            pages.note_dirty_bit(space(role).at(gfn));
        }
    }
}
