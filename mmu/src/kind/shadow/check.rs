//! A check of everything a shadow kind holds, for tests: nothing is taken from what it maintains that can be counted anew.
use super::{guest_entry, is_above, number, read_guest, shadows, space, split, Kept, ShadowMmu, NONE};
use crate::access::{AccessKind, Prot};
use crate::addr::{Gpa, Gva};
use crate::format::{Entry, EntryFormat};
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, Exclusive, Held};
use crate::tables::TableMemory;
use crate::walk::PagingContext;

/// What a check found to be in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowCheck {
    /// Shadow pages.
    pub pages: usize,
    /// Leaves.
    pub leaves: usize,
}

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// Checks the invariants of the whole kind; the name of the first that does not hold. Slow: for tests.
    pub fn check<'m, B: Backing + 'm>(&self, guard: &Exclusive<'m, B>) -> Result<ShadowCheck, &'static str> {
        let memory = Held::<B>::memory(guard);
        let mut found = ShadowCheck::default();
        let mut unsync = 0;
        let (mut kept, mut chained) = (0usize, 0usize);
        for bucket in self.ops.store.buckets.iter() {
            let mut entry = bucket.leaves;
            while entry != NONE {
                chained += 1;
                self.leaf_of(entry).ok_or("D1: a record without a leaf")?;
                entry = self.note(entry).next;
            }
        }
        for index in 0..self.ops.store.pages.len() as u32 {
            let page = self.page(index);
            let Some(role) = page.role else { continue };
            found.pages += 1;
            unsync += usize::from(page.unsync);
            if page.unsync && (role.level != Level::L1 || !shadows(&role)) {
                return Err("D5: an unsync page that is no lowest shadow");
            }
            let mut parent = page.parents;
            while parent != NONE {
                if self.note(parent).kept != Kept::Link(index) {
                    return Err("D2: a parent that does not link here");
                }
                let (above, at) = split(parent);
                let marked = self.page(above).stale[at / 64] >> (at % 64) & 1 == 1;
                if (page.unsync || page.stale != [0; 8]) && !marked {
                    return Err("D5: an ancestor does not know");
                }
                chained += 1;
                parent = self.note(parent).next;
            }
            if shadows(&role) && !page.unsync && !memory.is_tracked_everywhere(page.gfn) {
                return Err("D6: a shadowed table is not tracked");
            }
            for at in 0..ENTRIES {
                let entry = number(index, at);
                let value = self.value(entry);
                let is = self.format.entry(value, role.level);
                match (self.note(entry).kept, is) {
                    (Kept::Nothing, Entry::Empty) => continue,
                    (Kept::Link(child), Entry::Table(frame)) => {
                        let below = self.page(child);
                        let child_role = below.role.ok_or("D2: a link to a page that is gone")?;
                        if frame != below.frame || child_role.level != role.level.down().ok_or("B4")? {
                            return Err("B4: a link leads elsewhere");
                        }
                        if role.child(at, child_role.access, child_role.direct) != Some(child_role) {
                            return Err("D3: a child of another role");
                        }
                        if is_above(&role)
                            && !is_above(&child_role)
                            && role.level != Level::L3
                            && below.gfn != page.gfn
                        {
                            return Err("D3: a root for another table");
                        }
                    }
                    (Kept::Leaf(gfn), Entry::Leaf) => {
                        found.leaves += 1;
                        if !self.format.shadow_zero_check(value, role.level) {
                            return Err("B1");
                        }
                        self.format.writability(value).ok_or("B2")?;
                        let hit =
                            memory.find_slot(space(&role), gfn.gpa()).ok_or("I2: a leaf without a slot")?;
                        if self.format.permits(value, AccessKind::Write) && memory.is_tracked(&hit) {
                            return Err("D6: a tracked page can be written");
                        }
                        self.check_leaf(memory, index, at, value, gfn.gpa())?;
                    }
                    _ => return Err("D1, D2: an entry and its note differ"),
                }
                kept += 1;
            }
        }
        if kept != chained {
            return Err("D1, D2: chains and entries differ");
        }
        let counts = self.page_counts();
        if counts.tables as usize != found.pages || counts.leaves.iter().sum::<u64>() as usize != found.leaves
        {
            return Err("D4: counters");
        }
        if unsync != self.ops.unsync {
            return Err("D4: unsync pages");
        }
        Ok(found)
    }

    /// B3: a leaf of a page that is in sync says no more than the guest's entry.
    fn check_leaf<B: Backing>(
        &self,
        memory: &crate::memory::VmMemory<B>,
        index: u32,
        at: usize,
        value: u64,
        gpa: Gpa,
    ) -> Result<(), &'static str> {
        let page = self.page(index);
        let Some(role) = page.role.filter(|role| role.level == Level::L1 && shadows(role) && !page.unsync)
        else {
            return Ok(());
        };
        let Some(guest) = role.base.guest() else { return Ok(()) };
        let raw = read_guest(memory, guest_entry(page, &role, at), &role);
        let context = PagingContext::<Gva, Gpa>::new(guest);
        let found = raw.and_then(|raw| context.lowest_entry(raw)).ok_or("A3: a leaf for an absent entry")?;
        let leaf = self.format.leaf(value, Level::L1).ok_or("B1")?;
        let prot = role.access & found.prot;
        let user = leaf.user && !guest.is_ept();
        let writes = self.format.permits(value, AccessKind::Write);
        if found.page.gfn() != gpa.gfn() {
            return Err("A1: a leaf for another page");
        }
        if (user && !prot.contains(Prot::USER)) || (leaf.execute && !prot.contains(Prot::EXECUTE)) {
            return Err("B3: more than the guest permits");
        }
        // Without CR0.WP a supervisor's page may be writable although the guest's entry is not.
        if writes && user && !(prot.contains(Prot::WRITE)) {
            return Err("B3: writable for a user");
        }
        if writes && !found.dirty {
            return Err("F4: a clean entry can be written");
        }
        Ok(())
    }
}
