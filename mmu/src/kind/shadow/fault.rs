//! Faults: a walk of the guest's tables goes in, its shadow comes out.
use super::compose::caching;
use super::lowest::{Lowest, LowestTable};
use super::sites::FlushSite;
use super::{
    guest_entry, is_above, is_nested, number, read_guest, shadows, space, Kept, ShadowDone, ShadowMmu, Stop,
    NONE,
};
use crate::access::{Access, AccessKind, Agent, Prot};
use crate::addr::{Address, Gfn, Gpa, Pfn};
use crate::format::{EntryFormat, Writability};
use crate::kind::Root;
use crate::level::{Level, PageSize};
use crate::memory::{Backing, Exclusive, Held, Resolved, SlotFlags, VmMemory};
use crate::mutant::{self, Mutant};
use crate::role::{Caching, CpuRole, PageRole, RoleFlags};
use crate::tables::{TableCache, TableMemory};
use crate::walk::GuestWalk;

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowFault {
    /// The shadow permits the access now.
    Mapped,
    /// It did before: the TLB was behind.
    Spurious,
    /// The guest has changed an entry since the walk, or the backing is in the way: walk and fault again.
    Retry,
    /// Some CPU may still write to a table that is shadowed from now on: kick the CPUs that the flush names, and
    /// fault again once it is acknowledged. The guest may be entered meanwhile.
    Wait,
    /// There is no RAM here: emulate the access.
    Mmio(Gpa),
    /// A write to a read-only slot: emulate the access.
    ReadOnly(Gpa),
    /// A write to a table that is shadowed, or one that no shadow can permit: emulate it, then [say
    /// so](ShadowMmu::track_write).
    WriteTracked(Gpa),
    /// The cache has too few table pages: fill it and fault again.
    NeedTables,
    /// The root is obsolete or gone: get another one.
    NoRoot,
    /// The page quota is used up by roots.
    Full,
    /// The slot of this table has no memory for notes, so it cannot be shadowed.
    Untrackable(Gfn),
}

impl From<Stop> for ShadowFault {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::NeedTables => Self::NeedTables,
            Stop::Wait => Self::Wait,
            Stop::Full => Self::Full,
            Stop::Untrackable(gfn) => Self::Untrackable(gfn),
        }
    }
}

/// The leaf that a fault is to make, and what a direct page on the way to it is for.
struct Goal {
    gfn: Gfn,
    block: Pfn,
    block_size: PageSize,
    size: PageSize,
    prot: Prot,
    caching: Caching,
    writability: Writability,
    /// The access is a write.
    write: bool,
    /// The page could be huge, but is to be executable.
    split: bool,
}

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// Handles a fault of `access` at `address`, which `walk` has found to be permitted by the guest's tables: the
    /// guest's own page faults never get here. The address is a linear one, or (of a shadow of nested tables) one of
    /// L2's physical addresses.
    pub fn fault<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        root: Root,
        walk: &GuestWalk<Gpa>,
        address: impl Address,
        access: Access,
    ) -> ShadowDone<ShadowFault> {
        self.begin(guard);
        self.ops.last = NONE;
        let outcome = self.try_fault(guard, cache, root, walk, address, access).unwrap_or_else(|stop| stop);
        self.done(guard, outcome)
    }

    fn try_fault<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        root: Root,
        walk: &GuestWalk<Gpa>,
        address: impl Address,
        access: Access,
    ) -> Result<ShadowFault, ShadowFault> {
        let mut page = self.root_page(guard, root).ok_or(ShadowFault::NoRoot)?;
        // What was protected before must be so on every CPU, or what is read now may change unseen. What is owed can wait for
        // the end: a guest that owes ever more would keep other vCPUs waiting.
        if !self.is_settled(guard) {
            return Err(ShadowFault::Wait);
        }
        let root_role = self.role(page).filter(|_| !self.is_empty_root(page)).ok_or(ShadowFault::NoRoot)?;
        let gpa = walk.translation.address;
        let prot = shadow_prot(&root_role, walk, access);
        let frame = address.bits() >> 12;
        self.touch(page);
        page = self.follow(page, walk, frame);
        // Shadowing a table takes huge pages and writes away, so the tables come first.
        while let Some(role) = self.role(page) {
            let step = walk.step(role.level);
            let ends = role.direct || (!is_above(&role) && step.is_none_or(|step| step.level == walk.level));
            if ends {
                break;
            }
            let index = role.level.index(frame);
            let (gfn, access) = self.child_table(page, &role, walk, index)?;
            let child = role.child(index, access, false).ok_or(ShadowFault::Retry)?;
            page = self.descend_to(guard, cache, walk, page, index, gfn, &child)?;
            page = self.follow(page, walk, frame);
        }
        if cannot_be_shadowed(&root_role, walk, access) {
            let ram = Held::<B>::memory(guard).find_slot(space(&root_role), gpa).is_some();
            return Err(if ram { ShadowFault::WriteTracked(gpa) } else { ShadowFault::Mmio(gpa) });
        }
        let mut goal = match self.goal(guard, page, gpa, prot, walk, access.kind) {
            Err(ShadowFault::Mmio(gpa)) => {
                self.make_note(guard, cache, walk, page, frame, gpa);
                return Err(ShadowFault::Mmio(gpa));
            }
            goal => goal?,
        };
        while let Some(role) = self.role(page) {
            let index = role.level.index(frame);
            if role.level <= goal.size.level() {
                match goal.size.smaller().filter(|_| self.is_split(number(page, index))) {
                    Some(smaller) => (goal.size, goal.split) = (smaller, true),
                    None => break,
                }
            }
            page =
                self.descend_direct(guard, cache, walk, page, index, goal.gfn, (goal.prot, goal.caching))?;
            if goal.split && self.block_of(page).is_some_and(|size| size <= goal.block_size) {
                self.mark_split(page);
            }
        }
        self.install(guard, walk, page, frame, &goal)
    }

    /// Follows the links below `page` as far as they lead where the walk went.
    ///
    /// Writes to the tables above the lowest are tracked, so a link says what the guest's entry does: unless that is
    /// being changed right now, on the hypervisor's side, and the change is reported only after this. Nothing else of
    /// the page that a link leads to can differ from what would be linked now: all but these follows from the page
    /// above.
    fn follow(&mut self, mut page: u32, walk: &GuestWalk<Gpa>, frame: u64) -> u32 {
        let now = self.ops.now;
        for pair in walk.steps().windows(2) {
            let [step, below] = pair else { break };
            let this = self.page(page);
            let Some(role) = this.role.as_ref().filter(|role| role.level == step.level && !role.direct)
            else {
                continue;
            };
            let Kept::Link(there) = this.notes[role.level.index(frame)].kept else { break };
            if this.gfn != step.at.gfn() {
                break;
            }
            let child = self.page_mut(there);
            let same = child.gfn == below.at.gfn()
                && child.role.as_ref().is_some_and(|role| role.access == below.parents && !role.direct);
            if !same {
                break;
            }
            (child.used, child.writes) = (now, 0);
            page = there;
        }
        page
    }

    /// Goes down through the entry at `index` to the direct page for the part of the guest's huge page with `gfn`.
    #[expect(clippy::too_many_arguments, reason = "one step of a fault, which carries all of these")]
    fn descend_direct<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        walk: &GuestWalk<Gpa>,
        page: u32,
        index: usize,
        gfn: Gfn,
        (prot, caching): (Prot, Caching),
    ) -> Result<u32, ShadowFault> {
        let role = self.role(page).ok_or(ShadowFault::Retry)?;
        let first = Gfn::new_truncate(gfn.number() & !(role.level.pages() - 1));
        let shared = mutant::is(Mutant::HugeShadowShared);
        let child = role
            .child(index, if shared { role.access } else { prot }, true)
            .ok_or(ShadowFault::Retry)?
            .cached(caching);
        self.descend_to(guard, cache, walk, page, index, first, &child)
    }

    /// Notes that there is no RAM at `gpa`, if notes are made. What it takes may be missing: then it is noted another
    /// time.
    fn make_note<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        walk: &GuestWalk<Gpa>,
        mut page: u32,
        frame: u64,
        gpa: Gpa,
    ) {
        let memory = Held::<B>::memory(guard);
        while self.caches_mmio(memory) {
            let Some(role) = self.role(page) else { return };
            let index = role.level.index(frame);
            if role.level == Level::L1 {
                if self.unchanged(memory, walk, page, index).is_ok() {
                    self.note_mmio(memory, number(page, index), gpa.gfn(), walk.shadow_prot);
                }
                return;
            }
            let says = (walk.shadow_prot, walk_caching(role.base.guest().as_ref(), walk));
            match self.descend_direct(guard, cache, walk, page, index, gpa.gfn(), says) {
                Ok(below) => page = below,
                Err(_) => return,
            }
        }
    }

    /// The guest's table below the entry at `index`, and what the guest permits down to it.
    fn child_table(
        &self,
        page: u32,
        role: &PageRole,
        walk: &GuestWalk<Gpa>,
        index: usize,
    ) -> Result<(Gfn, Prot), ShadowFault> {
        if !is_above(role) {
            let below = role.level.down().and_then(|below| walk.step(below)).ok_or(ShadowFault::Retry)?;
            let upper = mutant::is(Mutant::ShadowOfUpperLevels);
            return Ok((below.at.gfn(), if upper { role.access } else { below.parents }));
        }
        if role.level == Level::L3 {
            if let Some(pdpte) = walk.pdpte {
                let kept = self.page(page).pdptes.get(index).copied();
                let gfn = Gpa::new_truncate(pdpte).gfn();
                // Without registers for them the guest changes its pointers by a store: another root stands for them
                // then.
                return if kept == Some(pdpte) { Ok((gfn, role.access)) } else { Err(ShadowFault::NoRoot) };
            }
        }
        Ok((self.page(page).gfn, role.access))
    }

    /// Goes down through the entry at `index` to the page for `gfn` with role `child`, which is linked there if it is
    /// not.
    #[expect(clippy::too_many_arguments, reason = "one step of a fault, which carries all of these")]
    fn descend_to<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        walk: &GuestWalk<Gpa>,
        page: u32,
        index: usize,
        gfn: Gfn,
        child: &PageRole,
    ) -> Result<u32, ShadowFault> {
        let entry = number(page, index);
        let memory = Held::<B>::memory(guard);
        let pdptes = if is_above(child) { self.page(page).pdptes } else { [0; 4] };
        let found = match self.note(entry).kept {
            // A link is followed only if it leads to the very page that would be linked now.
            Kept::Link(there)
                if self.is_page(there, memory.root_generation(), gfn, child, &pdptes)
                    || mutant::is(Mutant::LinkOfOtherTable) && self.role(there) == Some(*child)
                    || mutant::is(Mutant::LinkOfOtherRole) && self.page(there).gfn == gfn =>
            {
                self.touch(there);
                there
            }
            _ => self.get_page(guard, cache, gfn, child, &pdptes)?,
        };
        if self.note(entry).kept == Kept::Link(found) {
            self.unchanged(memory, walk, page, index)?;
            return Ok(found);
        }
        self.drop_entry(memory, entry);
        // The guest need not flush when an entry becomes present, so what is linked has to be up to date.
        if !mutant::is(Mutant::LinkedUnsynced) {
            self.sync_tree(guard, found);
        }
        // Only now: the table is protected, or known to be unsync.
        self.unchanged(memory, walk, page, index)?;
        self.link(entry, found);
        Ok(found)
    }

    /// Whether the guest's entry behind the one at `index` still is what the walk saw.
    fn unchanged<B: Backing>(
        &self,
        memory: &VmMemory<B>,
        walk: &GuestWalk<Gpa>,
        page: u32,
        index: usize,
    ) -> Result<(), ShadowFault> {
        let Some(role) = self.role(page) else { return Err(ShadowFault::Retry) };
        if role.direct || is_above(&role) || mutant::is(Mutant::StaleEntryShadowed) {
            return Ok(());
        }
        let at = guest_entry(self.page(page), &role, index);
        let step = walk.step(role.level).filter(|step| step.at == at);
        match (step, read_guest(memory, at, &role)) {
            (Some(step), Some(entry)) if step.entry == entry => Ok(()),
            _ => Err(ShadowFault::Retry),
        }
    }

    /// What is to be mapped.
    fn goal<'m, B: Backing + 'm>(
        &mut self,
        guard: &mut Exclusive<'m, B>,
        page: u32,
        gpa: Gpa,
        prot: Prot,
        walk: &GuestWalk<Gpa>,
        kind: AccessKind,
    ) -> Result<Goal, ShadowFault> {
        let memory = Held::<B>::memory(guard);
        let role = self.role(page).ok_or(ShadowFault::NoRoot)?;
        let space = space(&role);
        let hit = memory.find_slot(space, gpa).ok_or(ShadowFault::Mmio(gpa))?;
        let write = kind == AccessKind::Write;
        let read_only = hit.flags().contains(SlotFlags::READ_ONLY);
        if write && read_only {
            return Err(ShadowFault::ReadOnly(gpa));
        }
        let mut tracked = memory.is_tracked(&hit);
        // The slot's flags and counts are read where they are, so what changes here is seen below.
        if write && tracked {
            tracked = !self.try_unsync(guard, gpa.gfn());
            if tracked {
                return Err(ShadowFault::WriteTracked(gpa));
            }
        }
        let sequence = memory.invalidations().sequence();
        let fits = |size: PageSize| {
            size.bytes() <= walk.translation.page_bytes
                && size.level() <= role.level
                && self.format.has_size(size)
                && (size < PageSize::Size1G || !self.is_legacy(page))
                && memory.allows(&hit, size)
        };
        let want = [PageSize::Size1G, PageSize::Size2M].into_iter().find(|&size| fits(size));
        let want = want.unwrap_or(PageSize::Size4K);
        let (block, block_size) = match memory.backing().resolve(&hit.ram(), want, kind) {
            Resolved::Ram { pfn, size } => (pfn, size.min(want)),
            Resolved::Retry => return Err(ShadowFault::Retry),
            Resolved::Absent => return Err(ShadowFault::Mmio(gpa)),
        };
        if memory.invalidations().is_stale(sequence, gpa.gfn(), block_size) {
            return Err(ShadowFault::Retry);
        }
        let mut size = block_size;
        let split = self.ops.no_huge_execute && kind == AccessKind::Execute && size != PageSize::Size4K;
        if split {
            size = PageSize::Size4K;
        }
        while let Some(smaller) =
            size.smaller().filter(|_| !fits(size) || !block.number().is_multiple_of(size.pages()))
        {
            size = smaller;
        }
        let writability = if read_only && !mutant::is(Mutant::ShadowReadOnlyWritable) {
            Writability::ReadOnly
        } else if tracked || !prot.contains(Prot::WRITE) {
            Writability::Tracked
        } else {
            Writability::Writable
        };
        let caching = walk_caching(role.base.guest().as_ref(), walk);
        Ok(Goal { gfn: gpa.gfn(), block, block_size, size, prot, caching, writability, write, split })
    }

    /// Whether the page belongs to a tree of three levels.
    pub(super) fn is_legacy(&self, page: u32) -> bool {
        self.role(page).is_some_and(|role| {
            let short = role.base.guest().is_none_or(|guest| guest.va_width().is_none());
            short && !is_nested(&role)
        })
    }

    fn install<'m, B: Backing + 'm>(
        &mut self,
        guard: &Exclusive<'m, B>,
        walk: &GuestWalk<Gpa>,
        page: u32,
        frame: u64,
        goal: &Goal,
    ) -> Result<ShadowFault, ShadowFault> {
        let level = goal.size.level();
        let index = level.index(frame);
        let entry = number(page, index);
        let inside = goal.gfn.number() & (goal.block_size.pages() - 1) & !(goal.size.pages() - 1);
        let first = Gfn::new_truncate(goal.gfn.number() & !(goal.size.pages() - 1));
        let pfn = Pfn::new_truncate(goal.block.number() + inside);
        let Some(role) = self.role(page) else { return Err(ShadowFault::Retry) };
        let guest = role.base.guest();
        let says = (goal.prot, goal.caching);
        let mut leaf = self.compose(guest.as_ref(), says, (pfn, goal.size), goal.writability);
        if level != Level::L1 && self.ops.no_huge_execute && !mutant::is(Mutant::ShadowHugeExecutable) {
            leaf = leaf.with_execute(false);
        }
        if !self.can_say(&leaf) {
            return Err(ShadowFault::Retry);
        }
        let memory = Held::<B>::memory(guard);
        self.unchanged(memory, walk, page, index)?;
        let mut value = self.format.make_leaf(&leaf);
        if !goal.write {
            value = self.armed(memory, &role, first, value);
        }
        let kept = self.note(entry).kept;
        let any = matches!(kept, Kept::Leaf(_)) && mutant::is(Mutant::ShadowChangesFrame);
        let mapped = (any || kept == Kept::Leaf(first)).then(|| self.value(entry));
        match mapped
            .and_then(|old| Some((old, self.format.leaf(old, level)?, self.format.leaf(value, level)?)))
        {
            Some((old, found, wanted)) if found == wanted && !self.format.is_access_tracked(old) => {
                return Ok(ShadowFault::Spurious);
            }
            Some((_, found, wanted))
                if (found.pfn == wanted.pfn || mutant::is(Mutant::ShadowChangesFrame))
                    && (found.memory_type, found.ignore_pat) == (wanted.memory_type, wanted.ignore_pat) =>
            {
                self.replace(memory, entry, first, value, FlushSite::ShadowReplace);
            }
            // Another page, if anything: take it away, never change it into this.
            _ => {
                self.drop_entry(memory, entry);
                self.map(entry, first, value);
            }
        }
        if goal.write && !mutant::is(Mutant::ShadowWriteUnlogged) {
            memory.note_write(space(&role), goal.gfn);
        }
        if level == Level::L1 {
            if let Some(step) = walk.step(Level::L1).filter(|_| shadows(&role)) {
                self.note_seen(entry, step.entry);
            }
            self.ops.last = page;
            self.prefetch(memory, page, index);
        }
        Ok(ShadowFault::Mapped)
    }

    /// Maps what the guest has used before of the entries around the one at `index`.
    fn prefetch<B: Backing>(&mut self, memory: &VmMemory<B>, page: u32, index: usize) {
        if memory.invalidations().any_in_progress() {
            return;
        }
        let Some(lowest) = self.lowest(page) else { return };
        self.prefetch_around(&lowest.find(memory), index);
    }

    /// The same while no invalidation is in progress.
    #[inline(always)]
    pub(super) fn prefetch_around<B: Backing>(&mut self, table: &LowestTable<'_, '_, B>, index: usize) {
        let first = index & !(AROUND - 1);
        for (at, &raw) in table.read_some::<AROUND>(first).iter().enumerate() {
            self.prefetch_from(table, first + at, raw);
        }
    }

    /// Maps what the guest's entry at `index` of a lowest table leads to, as not accessed, if the guest has used it
    /// before and nothing is there. In a logged slot, the first write is still to come.
    pub(super) fn prefetch_entry<B: Backing>(&mut self, memory: &VmMemory<B>, page: u32, index: usize) {
        if memory.invalidations().any_in_progress() {
            return;
        }
        if let Some(lowest) = self.lowest(page) {
            let table = lowest.find(memory);
            if let Some(raw) = table.read(index) {
                self.prefetch_from(&table, index, raw);
            }
        }
    }

    /// The same with the entry `raw`, while no invalidation is in progress.
    #[inline(always)]
    fn prefetch_from<B: Backing>(&mut self, table: &LowestTable<'_, '_, B>, index: usize, raw: u64) {
        let used = table.lowest.entries.is_accessed(raw) || mutant::is(Mutant::PrefetchUnused);
        if used && self.note(number(table.lowest.page, index)).kept == Kept::Nothing {
            self.map_used(table, index, raw);
        }
    }

    /// Maps what the entry `raw` leads to, which the guest has used.
    #[inline(never)]
    fn map_used<B: Backing>(&mut self, table: &LowestTable<'_, '_, B>, index: usize, raw: u64) {
        let (memory, Lowest { page, role, guest, entries, .. }) = (table.memory, table.lowest);
        let Some(found) = entries.read(raw) else { return };
        let prot = role.access & found.prot;
        let Some(hit) = memory.find_slot(space(role), found.page).filter(|_| !prot.is_empty()) else {
            return;
        };
        let resolved = memory.backing().resolve(&hit.ram(), PageSize::Size4K, AccessKind::Read);
        let Resolved::Ram { pfn, .. } = resolved else { return };
        let writes = prot.contains(Prot::WRITE)
            && (found.dirty || mutant::is(Mutant::PrefetchClean))
            && (!memory.is_tracked(&hit) || mutant::is(Mutant::PrefetchTracked));
        let writability = if hit.flags().contains(SlotFlags::READ_ONLY) {
            Writability::ReadOnly
        } else if writes {
            Writability::Writable
        } else {
            Writability::Tracked
        };
        let says = (prot, caching(Some(guest), raw, Level::L1));
        let leaf = self.compose(Some(guest), says, (pfn, PageSize::Size4K), writability);
        if !self.can_say(&leaf) {
            return;
        }
        let gfn = found.page.gfn();
        let value = self.armed(memory, role, gfn, self.format.make_leaf(&leaf));
        let entry = number(*page, index);
        self.map(entry, gfn, self.aged(role, value));
        self.note_seen(entry, raw);
    }
}

/// How the leaf of a walk wants its page cached.
fn walk_caching(guest: Option<&CpuRole>, walk: &GuestWalk<Gpa>) -> Caching {
    caching(guest, walk.steps().last().map_or(0, |step| step.entry), walk.level)
}

/// Entries of which a fault maps those that the guest has used.
const AROUND: usize = 8;

/// Whether the access is one that no entry can permit without permitting too much: a supervisor's write, with CR0.WP
/// clear, to a read-only page of the user. As a supervisor's page it would be out of reach for SMAP, which was
/// suspended, and for PKRU, and within that of IA32_PKRS.
fn cannot_be_shadowed(root: &PageRole, walk: &GuestWalk<Gpa>, access: Access) -> bool {
    let flags = root.base.guest().map_or(RoleFlags::empty(), |guest| guest.flags());
    let forced = access.kind == AccessKind::Write && access.agent != Agent::User;
    forced
        && !mutant::is(Mutant::SmapHole)
        && !flags.contains(RoleFlags::WP)
        && flags.intersects(RoleFlags::SMAP | RoleFlags::PKE | RoleFlags::PKS)
        && walk.shadow_prot.contains(Prot::USER)
        && !walk.shadow_prot.contains(Prot::WRITE)
}

/// What the leaf for an access permits.
///
/// The shadow always runs with CR0.WP set. A supervisor's write to a read-only page, which the guest's clear CR0.WP
/// permits, makes the page a writable one of the supervisor, until a user's access comes; what SMEP forbade as a
/// user's page stays forbidden.
fn shadow_prot(root: &PageRole, walk: &GuestWalk<Gpa>, access: Access) -> Prot {
    let mut prot = walk.shadow_prot;
    let Some(guest) = root.base.guest() else { return prot };
    let by_supervisor = access.kind == AccessKind::Write && access.agent != Agent::User;
    if guest.is_ept() {
        return prot;
    }
    if by_supervisor && !prot.contains(Prot::WRITE) && !guest.flags().contains(RoleFlags::WP) {
        if prot.contains(Prot::USER) && guest.flags().contains(RoleFlags::SMEP) {
            prot.remove(Prot::EXECUTE);
        }
        prot.insert(Prot::WRITE);
        if !mutant::is(Mutant::ShadowUserPageKept) {
            prot.remove(Prot::USER);
        }
    }
    prot
}
