//! Roots: ordinary shadow pages that somebody holds, of every kind, PAE's and unpaged ones included.
use super::{is_above, ShadowDone, ShadowMmu, Stop};
use crate::addr::{Gfn, Gpa};
use crate::format::EntryFormat;
use crate::kind::Root;
use crate::memory::{Backing, Exclusive, Held};
use crate::role::{PagingMode, RootRole};
use crate::tables::{TableCache, TableMemory};

/// Why there is no root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoShadowRoot {
    /// The cache is empty: fill it and ask again.
    NeedTables,
    /// A flush has to be acknowledged first: kick the CPUs that it names, and ask again.
    Wait,
    /// The page quota is used up by roots.
    Full,
    /// The guest's root table lies outside RAM, and [an empty root](ShadowMmu::get_empty_root) serves; or where its writes
    /// cannot be tracked, for its slot has no memory for notes.
    Unreachable(Gfn),
}

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// The root that shadows the tables at `cr3` in this role, up to date. A share of it: [put](Self::put_root) it once.
    ///
    /// With PAE the four pointers are the key, for the processor loads them once: a guest that changes them in memory gets
    /// another root by its next MOV to CR3.
    pub fn get_root<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        role: RootRole,
        cr3: u64,
        pdptes: [u64; 4],
    ) -> ShadowDone<Result<Root, NoShadowRoot>> {
        self.begin(guard);
        let page_role = role.page();
        let guest = page_role.base.guest();
        let pae = is_above(&page_role) && guest.is_some_and(|guest| guest.mode() == PagingMode::Pae);
        let (gfn, pdptes) = if role.is_direct() {
            (Gfn::new_truncate(0), [0; 4])
        } else if pae {
            let mix = pdptes.iter().fold(0u64, |mix, pdpte| (mix ^ pdpte).rotate_left(13));
            (Gfn::new_truncate(mix), pdptes)
        } else {
            (Gpa::new_truncate(cr3).gfn(), [0; 4])
        };
        let outcome = match self.get_page(guard, cache, gfn, &page_role, &pdptes) {
            Ok(page) => {
                self.sync_tree(guard, page);
                let generation = Held::<B>::memory(guard).root_generation();
                self.page_mut(page).roots += 1;
                Ok(Root::of_shadow(self.page(page).frame.hpa(), role.level(), page as usize, generation))
            }
            Err(Stop::NeedTables) => Err(NoShadowRoot::NeedTables),
            Err(Stop::Wait) => Err(NoShadowRoot::Wait),
            Err(Stop::Full) => Err(NoShadowRoot::Full),
            Err(Stop::Untrackable(gfn)) => Err(NoShadowRoot::Unreachable(gfn)),
        };
        self.done(guard, outcome)
    }

    /// Gives a share of a root back. It stays in the page cache until its place is needed.
    pub fn put_root<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, root: Root) {
        self.begin(guard);
        if let Some(page) = self.holder(root) {
            self.page_mut(page).roots -= 1;
        }
    }

    /// The page that `root` names, of whatever generation.
    fn holder(&self, root: Root) -> Option<u32> {
        let index = u32::try_from(root.index()).ok()?;
        let page = self.ops.store.pages.get(root.index())?;
        let same = page.frame.hpa() == root.hpa && page.generation == root.generation();
        (same && page.role.is_some() && page.roots != 0).then_some(index)
    }

    /// The page of a root that may be run on.
    pub(super) fn root_page<'m, B: Backing + 'm>(&self, guard: &Exclusive<'m, B>, root: Root) -> Option<u32> {
        let generation = Held::<B>::memory(guard).root_generation();
        self.holder(root).filter(|&page| root.generation() == generation && !self.is_lost(page))
    }
}
