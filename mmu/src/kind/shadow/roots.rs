//! Roots: ordinary shadow pages that somebody holds, of every kind, PAE's and unpaged ones included.
use super::{is_above, shadows, ShadowDone, ShadowMmu, Stop};
use crate::addr::{Gfn, Gpa};
use crate::format::EntryFormat;
use crate::kind::Root;
use crate::memory::{Backing, Exclusive, Held};
use crate::role::{PageRole, PagingMode, RootRole};
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
    /// The guest's root table lies where its writes cannot be tracked: its slot has no memory for notes.
    Unreachable(Gfn),
}

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// The root that shadows the tables at `cr3` in this role, up to date. A share of it: [put](Self::put_root) it once.
    ///
    /// With PAE the four pointers are the key, for the processor loads them once: a guest that changes them in memory gets
    /// another root by its next MOV to CR3.
    ///
    /// A root table outside RAM is legal: each access of the guest is a page fault then, which its walk finds. What such a
    /// vCPU runs on maps nothing, and [`fault`](Self::fault) refuses it, so the tables are looked for again when a walk succeeds.
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
        let mut got = self.get_page(guard, cache, gfn, &page_role, &pdptes);
        if matches!(got, Err(Stop::Untrackable(_))) && Held::<B>::memory(guard).find_slot(gfn.gpa()).is_none()
        {
            got = self.get_page(guard, cache, gfn, &hollow(&page_role), &pdptes);
        }
        let outcome = match got {
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

    /// A root that was emptied because the slot of its table changed stands for nothing from now on, and its holders
    /// [put](Self::put_root) it when they find out: the table may be another one, or none.
    pub(super) fn hollow_out<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, index: u32) {
        let page = self.page_mut(index);
        if let Some(role) = page.role.filter(|role| page.roots != 0 && shadows(role)) {
            page.role = Some(hollow(&role));
            // The slot may be gone, and its counts with it.
            let _ = guard.untrack_writes(self.page(index).gfn);
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
        let page = self.holder(root)?;
        let now = root.generation() == Held::<B>::memory(guard).root_generation();
        (now && !self.page(page).role.is_some_and(|role| is_hollow(&role))).then_some(page)
    }
}

/// The role of a root that maps nothing, in the place of one with this role: no page that maps anything has both flags.
fn hollow(role: &PageRole) -> PageRole {
    PageRole { direct: true, passthrough: true, ..*role }
}

fn is_hollow(role: &PageRole) -> bool {
    role.direct && role.passthrough
}
