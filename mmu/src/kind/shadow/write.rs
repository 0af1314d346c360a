//! Emulated writes to tables that are shadowed.
use super::{guest_entry, is_short, number, shadows, ShadowDone, ShadowMmu, NONE};
use crate::addr::{Gpa, PAGE_SIZE};
use crate::format::EntryFormat;
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, Exclusive};
use crate::tables::TableMemory;

/// Writes to a table, without a use of it in between, after which it is no longer taken for one.
const FLOOD: u8 = 3;

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// `len` bytes at `gpa` were written on the hypervisor's side: by emulation, by a device, by whoever else has no entry of
    /// the guest's own for it. Call it after the write, whatever is thought to be there.
    pub fn track_write<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        gpa: Gpa,
        len: usize,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let (mut at, mut rest) = (gpa, len as u64);
        while rest != 0 {
            let now = rest.min(PAGE_SIZE - at.page_offset());
            self.track_in_page(guard, at, now);
            rest -= now;
            let Some(next) = at.checked_add(now) else { break };
            at = next;
        }
        self.done(guard, ())
    }

    fn track_in_page<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, at: Gpa, len: u64) {
        let gfn = at.gfn();
        let mut index = self.first_page(gfn);
        while index != NONE {
            let page = self.page(index);
            let next = page.next;
            if let Some(role) = page.role.filter(|role| page.gfn == gfn && shadows(role)) {
                let entry_bytes = if is_short(&role) { 4 } else { 8 };
                let first = at.bits() & !(entry_bytes - 1);
                let crosses = first != (at.bits() + len - 1) & !(entry_bytes - 1);
                // One byte at the start of an entry is how some guests set flags.
                let partial = len < 4 && !(len == 1 && at.bits() == first);
                let page = self.page_mut(index);
                page.writes = page.writes.saturating_add(1);
                let flooded = role.level != Level::L1 && page.writes >= FLOOD;
                if crosses || partial || flooded {
                    self.zap_page(guard, index);
                } else {
                    // An entry of four bytes stands for two in the shadow of a directory, which is two pages.
                    for entry in 0..ENTRIES {
                        if guest_entry(self.page(index), &role, entry).bits() == first {
                            self.drop_entry(number(index, entry));
                        }
                    }
                }
            }
            index = next;
        }
    }
}
