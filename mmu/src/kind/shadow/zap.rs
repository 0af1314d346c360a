//! Taking shadow pages and leaves away: by range of guest frames, and all at once by generation.
use super::{number, shadows, Kept, ShadowDone, ShadowMmu};
use crate::addr::{Gfn, GfnRange};
use crate::format::EntryFormat;
use crate::level::ENTRIES;
use crate::memory::{Backing, Exclusive, Held};
use crate::tables::TableMemory;

/// Shadow pages that one batch looks at.
const BATCH: usize = 16;

/// How far a zap has come. Begin with the default.
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
        for _ in 0..BATCH {
            let Some(page) = self.ops.store.pages.get(progress.next) else {
                progress.done = true;
                break;
            };
            let index = progress.next as u32;
            progress.next += 1;
            let Some(role) = page.role else { continue };
            if shadows(&role) && range.contains(page.gfn) {
                self.zap_page(guard, index);
                self.hollow_out(guard, index);
            }
            let pages = role.level.pages();
            for entry in (0..ENTRIES).map(|entry| number(index, entry)) {
                let Kept::Leaf(gfn) = self.note(entry).kept else { continue };
                if GfnRange::new(gfn, pages).is_ok_and(|leaf| leaf.overlaps(range)) {
                    self.drop_entry(entry);
                }
            }
        }
        self.done(guard, ())
    }

    /// Makes every root of the VM obsolete: no vCPU enters on one, no fault maps into one. The pages go by
    /// [`zap_obsolete`](Self::zap_obsolete).
    pub fn invalidate_all<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>) -> ShadowDone<()> {
        self.begin(guard);
        guard.retire_roots();
        self.ops.pending = true;
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
        for _ in 0..BATCH {
            let Some(page) = self.ops.store.pages.get(progress.next) else {
                progress.done = true;
                break;
            };
            let obsolete = page.role.is_some() && page.generation != generation;
            if obsolete {
                self.zap_page(guard, progress.next as u32);
            }
            progress.next += 1;
        }
        self.done(guard, ())
    }

    /// Frames that leaves map, for checks.
    pub(super) fn leaf_of(&self, entry: u32) -> Option<Gfn> {
        match self.note(entry).kept {
            Kept::Leaf(gfn) => Some(gfn),
            _ => None,
        }
    }
}
