//! What only shadows of L1's nested tables need.
use super::{number, Kept, NoShadowRoot, ShadowDone, ShadowMmu, Stop};
use crate::addr::{Gfn, NGpa};
use crate::format::EntryFormat;
use crate::kind::Root;
use crate::level::Level;
use crate::memory::{Backing, Exclusive, Held};
use crate::role::{PageRole, RootRole, VcpuMode};
use crate::tables::{TableCache, TableMemory};

/// What stands for a root table that is not there: no table of a guest lies in the last frame.
const NOWHERE: Gfn = Gfn::new_truncate(u64::MAX);

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// A root with nothing in it, of `level`, for L2 when [`get_root`](Self::get_root) says that L1's root table is
    /// unreachable. VM entry accepts such a pointer, and each access of L2 faults: the walk says what L1 is told. A fault
    /// that finds the table after all says that this is [no root](super::ShadowFault::NoRoot) for it.
    pub fn get_empty_root<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        level: Level,
        vcpu: VcpuMode,
    ) -> ShadowDone<Result<Root, NoShadowRoot>> {
        self.begin(guard);
        let role = RootRole::direct(level, vcpu, false).page();
        let outcome = match self.get_page(guard, cache, NOWHERE, &role, &[0; 4]) {
            Ok(page) => {
                let generation = Held::<B>::memory(guard).root_generation();
                self.page_mut(page).roots += 1;
                Ok(Root::of_shadow(self.page(page).frame.hpa(), level, page as usize, generation))
            }
            Err(Stop::NeedTables) => Err(NoShadowRoot::NeedTables),
            Err(Stop::Wait) => Err(NoShadowRoot::Wait),
            Err(Stop::Full) => Err(NoShadowRoot::Full),
            Err(Stop::Untrackable(gfn)) => Err(NoShadowRoot::Unreachable(gfn)),
        };
        self.done(guard, outcome)
    }

    /// Whether the page is a root that nothing may be mapped into.
    pub(super) fn is_empty_root(&self, page: u32) -> bool {
        let page = self.page(page);
        page.gfn == NOWHERE && page.role.is_some_and(|role| role.direct)
    }

    /// L1, which runs on the direct kind, writes to `gfn`, and the write was refused because the page is tracked: lets it write
    /// without exits from now on, if the page is nothing but lowest tables of its nested ones. `false` if the write has to be
    /// emulated.
    pub fn let_write<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        gfn: Gfn,
    ) -> ShadowDone<bool> {
        self.begin(guard);
        let free = self.try_unsync(guard, gfn);
        self.done(guard, free)
    }

    /// Whether the processor keeps accessed and dirty flags in a page with this role. It does not for L2 on extended page
    /// tables whose pointer has them off, be the format one that has such flags: then A says nothing, and stays set.
    pub(super) fn keeps_flags(&self, role: &PageRole) -> bool {
        let ept = role.base.guest().is_some_and(|guest| guest.is_ept());
        !ept || role.base.accessed_dirty() || !self.format.has_dirty_bits()
    }

    /// A leaf for a page with this role, as one that was not used, if that can ever be told from one that was.
    pub(super) fn aged(&self, role: &PageRole, value: u64) -> u64 {
        if self.keeps_flags(role) {
            self.format.make_old(value)
        } else {
            value
        }
    }

    /// L1 gets an exit for `address` of L2: by itself that invalidates what any TLB of the vCPU says of the address (Intel SDM
    /// vol. 3, 29.4.3.1), so L1 may change its entry for it in any way without another word. Call it for every root that the
    /// vCPU keeps for the same table.
    pub fn forget_address<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        root: Root,
        address: NGpa,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        let mut at = self.root_page(guard, root);
        while let Some((page, role)) = at.and_then(|page| Some((page, self.role(page)?))) {
            let entry = number(page, role.level.index(address.ngfn().number()));
            at = match self.note(entry).kept {
                Kept::Link(child) => Some(child),
                Kept::Leaf(_) | Kept::Device(_) => {
                    self.drop_entry(memory, entry);
                    None
                }
                Kept::Nothing => None,
            };
        }
        self.done(guard, ())
    }
}
