//! Writes to tables that are shadowed which no entry of a shadow has permitted: by emulation, by devices, by walks.
use core::cell::Cell;

use super::sites::FlushSite;
use super::{is_short, number, shadows, split, ShadowDone, ShadowMmu, NONE};
use crate::addr::{Gpa, PAGE_SIZE};
use crate::format::EntryFormat;
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, Exclusive, Held};
use crate::mutant::{self, Mutant};
use crate::role::PageRole;
use crate::tables::TableMemory;
use crate::walk::MarkObserver;

/// Writes to a table, without a use of it in between, after which it is no longer taken for one.
const FLOOD: u8 = 3;
/// Links that are looked at for whether a table is in use.
const LOOKS_ABOVE: u32 = 32;

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

    /// Follows what walks have marked: call it when a walk under [`WalkMarks`] has ended, before its result is used.
    ///
    /// In a table that is shadowed as what the walk took it for, a mark only permits more. But one frame can be
    /// tables of several kinds, and what is an accessed bit in one may be part of an address in another.
    pub fn track_marks<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        marks: &WalkMarks,
    ) -> ShadowDone<()> {
        self.begin(guard);
        let memory = Held::<B>::memory(guard);
        for (at, bytes) in marks.iter() {
            let mut index = self.first_page(at.gfn());
            while index != NONE {
                let page = self.page(index);
                let next = page.next;
                if let Some(role) = page.role.filter(|role| page.gfn == at.gfn() && shadows(role)) {
                    for entry in self.entries_at(index, &role, at, bytes) {
                        if role.level == Level::L1 {
                            self.sync_entry(guard, index, entry);
                        } else {
                            self.drop_entry(memory, number(index, entry));
                        }
                    }
                }
                index = next;
            }
        }
        if marks.overflowed.get() && !mutant::is(Mutant::MarksForgotten) {
            guard.retire_roots();
            self.took_away(FlushSite::ShadowRetire);
        }
        self.done(guard, ())
    }

    fn track_in_page<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, at: Gpa, len: u64) {
        let memory = Held::<B>::memory(guard);
        let gfn = at.gfn();
        let mut index = self.first_page(gfn);
        while index != NONE {
            let page = self.page(index);
            let next = page.next;
            if let Some(role) = page.role.filter(|role| page.gfn == gfn && shadows(role)) {
                let entry_bytes = entry_bytes(&role);
                let first = at.bits() & !(entry_bytes - 1);
                let crosses = first != (at.bits() + len - 1) & !(entry_bytes - 1);
                // One byte at the start of an entry is how some guests set flags.
                let partial = len < 4 && !(len == 1 && at.bits() == first);
                let flooded = self.count_write(index) >= FLOOD
                    && role.level != Level::L1
                    && !mutant::is(Mutant::FloodIgnored);
                let partial = partial && !mutant::is(Mutant::PartialIgnored);
                let crosses = crosses && !mutant::is(Mutant::StraddleIgnored);
                let len = if mutant::is(Mutant::StraddleIgnored) { 1 } else { len };
                if crosses || partial || flooded {
                    self.zap_page(guard, index);
                } else {
                    let whole = at.bits() == first && len == entry_bytes;
                    for entry in self.entries_at(index, &role, at, len) {
                        if mutant::is(Mutant::PartialIgnored) && !whole {
                            break;
                        }
                        self.drop_entry(memory, number(index, entry));
                        if whole && !self.is_lost(index) {
                            self.prefetch_entry(memory, index, entry);
                        }
                    }
                }
            }
            index = next;
        }
    }

    /// Counts an emulated write to the table of a page; how many that makes since the table was last used.
    fn count_write(&mut self, index: u32) -> u8 {
        let now = self.ops.now;
        let (last, when) = self.ops.last_near;
        let page = self.page(index);
        let used = page.writes != 0 && when > page.since && self.is_below(last, index, &mut { LOOKS_ABOVE });
        let page = self.page_mut(index);
        if page.writes == 0 || used {
            (page.writes, page.since) = (0, now);
        }
        page.writes = page.writes.saturating_add(1);
        page.writes
    }

    /// Whether a link below the page at `above` leads to the one at `page`, as far as that is found out by so many
    /// looks.
    fn is_below(&self, page: u32, above: u32, looks: &mut u32) -> bool {
        let Some(page) = self.ops.store.pages.get(page as usize) else { return false };
        let mut link = page.parents;
        while link != NONE && *looks != 0 {
            *looks -= 1;
            let (parent, _) = split(link);
            // One level up each time, five at most.
            if parent == above || self.is_below(parent, above, looks) {
                return true;
            }
            link = self.note(link).next;
        }
        false
    }

    /// The entries of a page that stand for what is in `len` bytes at `at`. An entry of four bytes stands for two in
    /// the shadow of a directory.
    fn entries_at(&self, index: u32, role: &PageRole, at: Gpa, len: u64) -> impl Iterator<Item = usize> {
        let (size, end) = (entry_bytes(role), at.bits() + len);
        let page = self.page(index);
        let base = page.gfn.gpa().bits();
        // Both are bounded by the table.
        let first = (at.bits().max(base) - base) / size;
        let last = (end.min(base + PAGE_SIZE) - base).div_ceil(size);
        let (scale, skip) = match (is_short(role), role.level) {
            (false, _) => (1, 0),
            (true, Level::L2) if mutant::is(Mutant::OneOfTwoEntries) => {
                (1, u64::from(role.quadrant) * ENTRIES as u64)
            }
            (true, Level::L2) => (2, u64::from(role.quadrant) * ENTRIES as u64),
            (true, _) => (1, u64::from(role.quadrant) * ENTRIES as u64),
        };
        (first * scale..last * scale).filter_map(move |entry| {
            let entry = entry.checked_sub(skip)?;
            (entry < ENTRIES as u64).then_some(entry as usize)
        })
    }
}

/// Bytes of one of the guest's entries.
fn entry_bytes(role: &PageRole) -> u64 {
    if is_short(role) {
        4
    } else {
        8
    }
}

/// Marks that are kept: a nested walk of five levels in both stages has 35 entries.
const MAX_MARKS: usize = 48;

/// What walks have marked in guest memory, for [`track_marks`](ShadowMmu::track_marks): the observer of an
/// [`Observed`](crate::Observed) source. (The dirty log hears of each mark from the memory itself.)
#[derive(Debug)]
pub struct WalkMarks {
    marks: [Cell<(u64, u64)>; MAX_MARKS],
    len: Cell<usize>,
    overflowed: Cell<bool>,
}

impl WalkMarks {
    /// Nothing is marked.
    pub const fn new() -> Self {
        Self {
            marks: [const { Cell::new((0, 0)) }; MAX_MARKS],
            len: Cell::new(0),
            overflowed: Cell::new(false),
        }
    }

    /// Whether nothing was marked, so that there is nothing to follow.
    pub const fn is_empty(&self) -> bool {
        self.len.get() == 0
    }

    fn iter(&self) -> impl Iterator<Item = (Gpa, u64)> + '_ {
        let marks = self.marks.iter().take(self.len.get()).map(Cell::get);
        marks.map(|(at, bytes)| (Gpa::new_truncate(at), bytes))
    }
}

impl Default for WalkMarks {
    fn default() -> Self {
        Self::new()
    }
}

impl MarkObserver for WalkMarks {
    fn marked(&self, at: Gpa, bytes: usize) {
        match self.marks.get(self.len.get()) {
            Some(mark) => {
                mark.set((at.bits(), bytes as u64));
                self.len.set(self.len.get() + 1);
            }
            None => self.overflowed.set(true),
        }
    }
}
