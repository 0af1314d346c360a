//! Unsync pages: lowest tables that the guest writes to without exits, and how their shadows catch up.
use super::{guest_entry, number, read_guest, shadows, Kept, ShadowDone, ShadowMmu, NONE};
use crate::access::{AccessKind, Prot};
use crate::addr::{Address, Gfn, Gpa, Gva};
use crate::format::{EntryFormat, Writability};
use crate::kind::Root;
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, Exclusive, Held};
use crate::tables::TableMemory;
use crate::walk::PagingContext;

/// Pages that may be unsync at a time: it bounds the work of a sync.
const MAX_UNSYNC: usize = 256;

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// Brings everything below `root` up to date: what a flush of all the guest's translations asks for (MOV to CR3, INVPCID,
    /// CR4.PGE). The vCPU's tag has to be flushed as well.
    pub fn sync_root<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        root: Root,
    ) -> ShadowDone<()> {
        self.begin(guard);
        if let Some(page) = self.root_page(guard, root) {
            self.sync_tree(guard, page);
        }
        self.done(guard, ())
    }

    /// Brings the translation of one address below `root` up to date: INVLPG, which concerns every root that the vCPU keeps,
    /// for global pages are not told apart. The address has to be flushed from the vCPU's tag as well.
    pub fn sync_address<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        root: Root,
        address: impl Address,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let mut at = self.root_page(guard, root);
        while let Some((page, role)) = at.and_then(|page| Some((page, self.role(page)?))) {
            let index = role.level.index(address.bits() >> 12);
            at = match self.note(number(page, index)).kept {
                Kept::Link(child) => Some(child),
                Kept::Leaf(_) if self.page(page).unsync => {
                    self.sync_entry(guard, page, index);
                    None
                }
                _ => None,
            };
        }
        self.done(guard, ())
    }

    /// Lets the guest write to `gfn` without exits, if the kind shadows it as nothing but lowest tables; `false` if writes
    /// still have to be emulated.
    pub(super) fn try_unsync<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, gfn: Gfn) -> bool {
        let mut count = 0;
        let mut index = self.first_page(gfn);
        while index != NONE {
            let page = self.page(index);
            if let Some(role) = page.role.filter(|role| page.gfn == gfn && shadows(role)) {
                if role.level != Level::L1 {
                    return false;
                }
                count += usize::from(!page.unsync);
            }
            index = page.next;
        }
        if self.ops.unsync + count > MAX_UNSYNC {
            return false;
        }
        index = self.first_page(gfn);
        while index != NONE {
            let page = self.page(index);
            let next = page.next;
            if page.gfn == gfn && !page.unsync && page.role.is_some_and(|role| shadows(&role)) {
                self.page_mut(index).unsync = true;
                self.ops.unsync += 1;
                let _ = guard.untrack_writes(gfn);
                self.mark_parents(index);
            }
            index = next;
        }
        let memory = Held::<B>::memory(guard);
        // Where it is tracked, it is so in every space.
        !memory.is_tracked_anywhere(gfn)
    }

    /// Syncs what is unsync below `page`, and it itself. Goes down one level each time.
    pub(super) fn sync_tree<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, page: u32) {
        if self.page(page).unsync {
            self.sync_page(guard, page);
        }
        for word in 0..8 {
            let mut rest = self.page(page).stale[word];
            while rest != 0 {
                let bit = rest & rest.wrapping_neg();
                rest &= !bit;
                let index = word * 64 + bit.trailing_zeros() as usize;
                let clean = match self.note(number(page, index)).kept {
                    Kept::Link(child) => {
                        self.sync_tree(guard, child);
                        !self.page(child).unsync && self.page(child).stale == [0; 8]
                    }
                    _ => true,
                };
                if clean {
                    self.page_mut(page).stale[word] &= !bit;
                }
            }
        }
    }

    /// Brings an unsync page up to date, and has its writes tracked again if no TLB permits them any more.
    fn sync_page<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, page: u32) {
        let gfn = self.page(page).gfn;
        if guard.track_writes(gfn).is_ok() {
            self.write_protect_gfn(gfn);
            if self.settle(guard) {
                self.page_mut(page).unsync = false;
                self.ops.unsync -= 1;
            } else {
                let _ = guard.untrack_writes(gfn);
            }
        }
        for index in 0..ENTRIES {
            self.sync_entry(guard, page, index);
        }
    }

    /// Makes a leaf of a lowest page say no more than the guest's entry does: permissions only ever shrink here.
    fn sync_entry<'m, B: Backing + 'm>(&mut self, guard: &Exclusive<'m, B>, page: u32, index: usize) {
        let entry = number(page, index);
        let (Kept::Leaf(gfn), Some(role)) = (self.note(entry).kept, self.role(page)) else { return };
        let Some(guest) = role.base.guest().filter(|_| role.level == Level::L1 && !role.direct) else {
            return;
        };
        let at = guest_entry(self.page(page), &role, index);
        let context = PagingContext::<Gva, Gpa>::new(guest);
        let raw = read_guest(Held::<B>::memory(guard), at, &role);
        let found = raw.and_then(|raw| context.lowest_entry(raw));
        let value = self.value(entry);
        let (Some(found), Some(mut leaf)) = (found, self.format.leaf(value, Level::L1)) else {
            return self.drop_entry(entry);
        };
        if !found.accessed || found.page.gfn() != gfn {
            return self.drop_entry(entry);
        }
        let prot = role.access & found.prot;
        if !guest.is_ept() {
            leaf.user &= prot.contains(Prot::USER);
        }
        leaf.execute &= prot.contains(Prot::EXECUTE);
        leaf.read &= prot.contains(Prot::READ);
        let writes = prot.contains(Prot::WRITE) && found.dirty;
        if !writes && self.format.permits(value, AccessKind::Write) {
            leaf.writability = Writability::Tracked;
        }
        if self.format.leaf(value, Level::L1) != Some(leaf) {
            self.write(entry, self.format.make_leaf(&leaf));
            self.ops.pending = true;
        }
    }
}
