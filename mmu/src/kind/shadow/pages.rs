//! Shadow pages: the cache of them, the chains that every entry is in, and how pages come and go.
use super::sites::FlushSite;
use super::{is_above, is_nested, number, shadows, split, Kept, Note, ShadowMmu, ShadowPage, Stop, NONE};
use crate::access::AccessKind;
use crate::addr::{Gfn, Pfn};
use crate::format::{EntryFormat, Writability};
use crate::level::{Level, PageSize, ENTRIES};
use crate::memory::{Backing, Exclusive, Held, Pages};
use crate::mutant::{self, Mutant};
use crate::role::PageRole;
use crate::tables::{EntryCell, TableCache, TableFrame, TableMemory};

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    pub(super) fn bucket(&self, gfn: Gfn) -> usize {
        let hash = gfn.number().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        hash as usize % self.ops.store.buckets.len()
    }

    /// The first page in the chain that pages for `gfn` are in.
    pub(super) fn first_page(&self, gfn: Gfn) -> u32 {
        self.ops.store.buckets[self.bucket(gfn)].pages
    }

    /// The first entry in the chain that leaves for `gfn` are in.
    pub(super) fn first_leaf(&self, gfn: Gfn) -> u32 {
        self.ops.store.buckets[self.bucket(gfn)].leaves
    }

    pub(super) fn note(&self, entry: u32) -> &Note {
        let (page, index) = split(entry);
        &self.page(page).notes[index]
    }

    fn note_mut(&mut self, entry: u32) -> &mut Note {
        let (page, index) = split(entry);
        &mut self.page_mut(page).notes[index]
    }

    /// The value of an entry.
    pub(super) fn value(&self, entry: u32) -> u64 {
        let (page, index) = split(entry);
        self.cell(&TableFrame::linked(self.page(page).frame), index).load()
    }

    /// Gives an entry a value, and says what it had: the processor may have marked it at the last moment.
    pub(super) fn write(&mut self, entry: u32, value: u64) -> u64 {
        let (page, index) = split(entry);
        self.cell(&TableFrame::linked(self.page(page).frame), index).swap(value)
    }

    /// Changes the value of an entry, and says what it was. The processor marks entries meanwhile; what it marks is
    /// kept.
    pub(super) fn edit(&mut self, entry: u32, change: impl Fn(u64) -> u64) -> u64 {
        let (page, index) = split(entry);
        let table = TableFrame::linked(self.page(page).frame);
        let cell = self.cell(&table, index);
        let mut value = cell.load();
        // It can set A and D, each once.
        while let Err(found) = cell.compare_exchange(value, change(value)) {
            value = found;
        }
        value
    }

    /// The role of a page in use; a page that is not has a role that nothing asks for.
    pub(super) fn role(&self, page: u32) -> Option<PageRole> {
        self.page(page).role
    }

    fn head_mut(&mut self, kept: Kept) -> Option<&mut u32> {
        match kept {
            Kept::Nothing | Kept::Device(_) => None,
            Kept::Leaf(gfn) => {
                let bucket = self.bucket(gfn);
                Some(&mut self.ops.store.buckets[bucket].leaves)
            }
            Kept::Link(child) => Some(&mut self.page_mut(child).parents),
        }
    }

    /// Puts an empty entry into the chain of what it becomes.
    #[inline(always)]
    fn enter_chain(&mut self, entry: u32, kept: Kept) {
        let Some(head) = self.head_mut(kept) else { return };
        let next = core::mem::replace(head, entry);
        if next != NONE {
            self.note_mut(next).previous = entry;
        }
        *self.note_mut(entry) = Note { kept, next, previous: NONE, seen: 0 };
    }

    fn leave_chain(&mut self, entry: u32) {
        let Note { kept, next, previous, .. } = core::mem::replace(self.note_mut(entry), Note::EMPTY);
        if next != NONE {
            self.note_mut(next).previous = previous;
        }
        if previous != NONE {
            self.note_mut(previous).next = next;
        } else if let Some(head) = self.head_mut(kept) {
            *head = next;
        }
    }

    /// Takes away what an entry says. A dirty bit that is how the page is logged goes into the log.
    pub(super) fn drop_entry(&mut self, pages: &dyn Pages, entry: u32) {
        let (page, index) = split(entry);
        let kept = self.note(entry).kept;
        if kept == Kept::Nothing {
            return;
        }
        self.leave_chain(entry);
        let old = self.write(entry, 0);
        match kept {
            Kept::Nothing | Kept::Device(_) => {}
            Kept::Leaf(gfn) => {
                if let Some(role) = &self.page(page).role {
                    self.counters.leaves(self.ops.cpu, role.level, -1);
                    self.lose_dirty(pages, role, gfn, old);
                }
                self.took_away(FlushSite::ShadowDropLeaf);
            }
            Kept::Link(_) => {
                self.page_mut(page).stale[index / 64] &= !(1 << (index % 64));
                self.ops.unlinked += 1;
            }
        }
    }

    /// Makes an empty entry a link.
    pub(super) fn link(&mut self, entry: u32, child: u32) {
        let (page, _) = split(entry);
        let (frame, below) = (self.page(child).frame, self.page(child));
        let unsync = below.is_stale();
        let Some((role, top)) = self.role(page).map(|role| (role, self.is_legacy_root(page))) else { return };
        let value = if top {
            self.ops.pae.make_table(frame, role.level)
        } else {
            self.format.make_table(frame, role.level)
        };
        self.enter_chain(entry, Kept::Link(child));
        self.write(entry, value);
        let forgets = mutant::is(Mutant::LinkForgetsUnsync) || mutant::is(Mutant::LinkedUnsynced);
        if unsync && !forgets {
            self.mark_parents(child);
        }
    }

    /// Whether the page is a root of three levels, whose entries are PAE's pointers.
    pub(super) fn is_legacy_root(&self, page: u32) -> bool {
        let page = self.page(page);
        page.role.is_some_and(|role| {
            role.level == Level::L3 && !is_nested(&role) && (is_above(&role) || role.base.guest().is_none())
        })
    }

    /// Makes an empty entry the leaf `value` for the page at `gfn`.
    #[inline(always)]
    pub(super) fn map(&mut self, entry: u32, gfn: Gfn, value: u64) {
        self.enter_chain(entry, Kept::Leaf(gfn));
        self.write(entry, value);
        if let Some(role) = &self.page(split(entry).0).role {
            self.counters.leaves(self.ops.cpu, role.level, 1);
        }
    }

    /// Gives a leaf another value for the same page of memory.
    pub(super) fn replace(&mut self, pages: &dyn Pages, entry: u32, gfn: Gfn, value: u64, site: FlushSite) {
        let old = self.write(entry, value);
        if let Some(role) = self.role(split(entry).0).filter(|_| !self.format.is_dirty(value)) {
            self.lose_dirty(pages, &role, gfn, old);
        }
        if self.format.may_be_cached_writable(old) && !self.format.permits(value, AccessKind::Write) {
            self.took_away(site);
        }
    }

    /// Notes what a leaf of a lowest table was made from, or compared with.
    #[inline]
    pub(super) fn note_seen(&mut self, entry: u32, raw: u64) {
        self.note_mut(entry).seen = raw;
    }

    /// Notes that an empty entry is for device memory.
    pub(super) fn remember_device(&mut self, entry: u32, gfn: Gfn) {
        self.note_mut(entry).kept = Kept::Device(gfn);
    }

    /// Whatever is below `page` may be unsync: its ancestors know.
    pub(super) fn mark_parents(&mut self, page: u32) {
        let mut link = self.page(page).parents;
        while link != NONE {
            let (parent, index) = split(link);
            link = self.note(link).next;
            let (word, bit) = (index / 64, 1 << (index % 64));
            if self.page(parent).stale[word] & bit == 0 {
                self.page_mut(parent).stale[word] |= bit;
                // One level up each time, five at most.
                self.mark_parents(parent);
            }
        }
    }

    /// Takes write permission for `gfn` out of every leaf; huge pages around it go.
    pub(super) fn write_protect_gfn(&mut self, pages: &dyn Pages, gfn: Gfn) {
        self.leaves_of(gfn, |kind, entry, level| {
            if level != Level::L1 && !mutant::is(Mutant::ShadowedHuge) {
                kind.drop_entry(pages, entry);
                return;
            }
            let old = kind.value(entry);
            if matches!(kind.format.writability(old), Some(Writability::Writable | Writability::Watched)) {
                let format = kind.format;
                kind.edit(entry, |value| format.with_writability(value, Writability::Tracked));
            }
            if kind.format.may_be_cached_writable(old) {
                kind.took_away(FlushSite::ShadowProtect);
            }
        });
    }

    /// Calls `visit` with each leaf that maps `gfn`, of whatever size, and its level. The leaf may be dropped.
    pub(super) fn leaves_of(&mut self, gfn: Gfn, mut visit: impl FnMut(&mut Self, u32, Level)) {
        for size in [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G] {
            let first = Gfn::new_truncate(gfn.number() & !(size.pages() - 1));
            let mut entry = self.first_leaf(first);
            while entry != NONE {
                let next = self.note(entry).next;
                let level = self.role(split(entry).0).map(|role| role.level);
                if self.note(entry).kept == Kept::Leaf(first) && level == Some(size.level()) {
                    visit(self, entry, size.level());
                }
                entry = next;
            }
        }
    }

    /// The page with this key, if there is one of now.
    pub(super) fn find_page(
        &self,
        generation: u64,
        gfn: Gfn,
        role: &PageRole,
        pdptes: &[u64; 4],
    ) -> Option<u32> {
        let mut index = self.first_page(gfn);
        while index != NONE {
            let page = self.page(index);
            if self.is_page(index, generation, gfn, role, pdptes) {
                return Some(index);
            }
            index = page.next;
        }
        None
    }

    /// Whether the page has this key.
    pub(super) fn is_page(
        &self,
        index: u32,
        generation: u64,
        gfn: Gfn,
        role: &PageRole,
        pdptes: &[u64; 4],
    ) -> bool {
        let page = self.page(index);
        page.gfn == gfn
            && (page.generation == generation || mutant::is(Mutant::ObsoleteReused))
            && page.role.as_ref().is_some_and(|found| found.is_same(role))
            && (page.has_pdptes(pdptes) || mutant::is(Mutant::PointersIgnored))
    }

    /// Marks a page as in use by this operation.
    pub(super) fn touch(&mut self, index: u32) {
        let now = self.ops.now;
        let page = self.page_mut(index);
        (page.used, page.writes) = (now, 0);
    }

    /// The page with this key, made if need be. A page that shadows a table has the table's writes tracked.
    pub(super) fn get_page<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        gfn: Gfn,
        role: &PageRole,
        pdptes: &[u64; 4],
    ) -> Result<u32, Stop> {
        let memory = Held::<B>::memory(guard);
        let generation = memory.root_generation();
        let found = self.find_page(generation, gfn, role, pdptes);
        let index = match found {
            Some(index) => index,
            None => {
                if cache.peek(1).is_none() {
                    return Err(Stop::NeedTables);
                }
                if self.ops.free == NONE {
                    self.recycle(guard)?;
                }
                self.ops.free
            }
        };
        let follows =
            shadows(role) && !mutant::is(Mutant::ShadowUntracked) && (found.is_none() || self.is_lost(index));
        if follows {
            self.track(guard, gfn)?;
        }
        if found.is_none() {
            let Some(frame) = cache.peek(1).and_then(|pages| pages.first().copied()) else {
                return Err(Stop::NeedTables);
            };
            cache.consume(1);
            self.insert(index, frame, generation, gfn, role, pdptes);
        }
        self.touch(index);
        if follows {
            self.page_mut(index).tracked = true;
            self.write_protect_gfn(memory, gfn);
            if !self.settle(guard) {
                return Err(Stop::Wait);
            }
        }
        Ok(index)
    }

    /// Whether nobody notices writes to the table of this page: a root whose slot was taken away.
    pub(super) fn is_lost(&self, index: u32) -> bool {
        let page = self.page(index);
        !page.tracked && !page.unsync && page.role.as_ref().is_some_and(shadows)
    }

    /// Has the writes to a table emulated, whatever kind the guest runs on.
    pub(super) fn track<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        gfn: Gfn,
    ) -> Result<(), Stop> {
        match guard.track_beside(gfn) {
            Ok(flushed) => {
                if flushed {
                    self.took_away(FlushSite::ShadowBeside);
                }
                Ok(())
            }
            Err(_) => Err(Stop::Untrackable(gfn)),
        }
    }

    /// The page does not need its table's writes any more.
    pub(super) fn untrack_page<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, index: u32) {
        if core::mem::take(&mut self.page_mut(index).tracked) {
            // The slot may be gone, and its counts with it.
            guard.untrack_beside(self.page(index).gfn);
        }
    }

    fn insert(
        &mut self,
        index: u32,
        frame: Pfn,
        generation: u64,
        gfn: Gfn,
        role: &PageRole,
        pdptes: &[u64; 4],
    ) {
        let bucket = self.bucket(gfn);
        let now = self.ops.now;
        let next = core::mem::replace(&mut self.ops.store.buckets[bucket].pages, index);
        let page = self.page_mut(index);
        let free = page.next;
        let notes = page.notes;
        *page = ShadowPage {
            frame,
            gfn,
            role: Some(*role),
            pdptes: *pdptes,
            generation,
            next,
            used: now,
            notes,
            ..ShadowPage::UNUSED
        };
        self.ops.free = free;
        self.counters.tables(self.ops.cpu, 1);
    }

    /// Frees the page that was not used for longest.
    fn recycle<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>) -> Result<(), Stop> {
        let now = self.ops.now;
        let pages = self.ops.store.pages.iter().enumerate();
        let oldest = pages
            .filter(|(_, page)| {
                page.role.is_some()
                    && page.roots == 0
                    && (page.used != now || mutant::is(Mutant::RecycleInUse))
            })
            .min_by_key(|(_, page)| page.used)
            .map(|(index, _)| index as u32);
        self.zap_page(guard, oldest.ok_or(Stop::Full)?);
        self.settle(guard);
        Ok(())
    }

    /// Takes a page away, with its entries and all links to it. One that is a root stays, empty: so it is right again.
    pub(super) fn zap_page<'m, B: Backing + 'm>(&mut self, guard: &mut Exclusive<'m, B>, index: u32) {
        if self.role(index).is_none() {
            return;
        }
        let memory = Held::<B>::memory(guard);
        while self.page(index).parents != NONE && !mutant::is(Mutant::ZapLeavesParents) {
            self.drop_entry(memory, self.page(index).parents);
        }
        for entry in 0..ENTRIES {
            self.drop_entry(memory, number(index, entry));
        }
        self.page_mut(index).writes = 0;
        if self.page(index).roots != 0 {
            return;
        }
        if self.page(index).unsync {
            self.ops.unsync -= 1;
        }
        self.untrack_page(guard, index);
        self.ops.splits -= u64::from(self.page(index).split);
        self.leave_bucket(index);
        let frozen = self.format.make_frozen(0);
        for entry in 0..ENTRIES {
            self.write(number(index, entry), frozen);
        }
        let dying = core::mem::replace(&mut self.ops.dying, index);
        let page = self.page_mut(index);
        (page.role, page.next) = (None, dying);
        self.counters.tables(self.ops.cpu, -1);
    }

    fn leave_bucket(&mut self, index: u32) {
        let (bucket, next) = (self.bucket(self.page(index).gfn), self.page(index).next);
        let mut at = self.ops.store.buckets[bucket].pages;
        if at == index {
            self.ops.store.buckets[bucket].pages = next;
            return;
        }
        while at != NONE {
            let after = self.page(at).next;
            if after == index {
                self.page_mut(at).next = next;
                return;
            }
            at = after;
        }
    }
}
