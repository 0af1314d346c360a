//! The shadow kind: tables of Umbra's own that say what a guest's tables say.
//!
//! A *shadow page* stands for one table of the guest as read in one role, or (a *direct* one) for a run of guest
//! frames below a guest's huge page. Every operation takes the VM's exclusive guard and the kind by unique reference,
//! so nothing here runs beside anything else of the VM but its guests.
mod check;
mod compose;
mod fault;
mod huge;
mod log;
mod lowest;
mod mmio;
mod near;
mod nested;
mod pages;
mod roots;
mod sites;
mod sync;
mod write;
mod zap;

pub use check::ShadowCheck;
pub use fault::ShadowFault;
pub(crate) use near::Near;
pub use near::NearFault;
pub use roots::NoShadowRoot;
pub use write::WalkMarks;
pub use zap::ZapProgress;

use super::counters::Counters;
use super::flush::{Flush, Freed, Issued};
use super::MmuKind;
use crate::addr::{Gfn, Gpa, Pfn};
use crate::cpu::CpuId;
use crate::format::{EntryFormat, Pae};
use crate::level::{Level, ENTRIES};
use crate::memory::{Backing, Exclusive, Generation, Held, Quiescent, Shootdown, Space, VmMemory};
use crate::mutant::{self, FlushSite, Mutant};
use crate::role::{PageRole, PagingMode, RoleFlags};
use crate::tables::{TableFrame, TableMemory, TablePage};

/// No page, no entry: the end of a chain.
const NONE: u32 = u32::MAX;

/// What an entry of a shadow page is noted as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    Nothing,
    /// A leaf, in the reverse map under the frame it was installed with: it cannot be taken out under another.
    Leaf(Gfn),
    /// A link to this shadow page, among the page's parents.
    Link(u32),
    /// A note that this frame is device memory, in no chain.
    Device(Gfn),
}

/// The note of one entry, a member of one chain.
#[derive(Clone, Copy, Debug)]
struct Note {
    kept: Kept,
    next: u32,
    previous: u32,
    /// The guest's entry that a leaf of a lowest table says no more than; zero, which says nothing, if that is not
    /// known.
    seen: u64,
}

impl Note {
    const EMPTY: Self = Self { kept: Kept::Nothing, next: NONE, previous: NONE, seen: 0 };
}

/// What is known of a shadow page beside its table: memory for one page of the quota.
#[derive(Debug)]
pub struct ShadowPage {
    frame: Pfn,
    /// The guest's table, or the first frame that a direct page maps.
    gfn: Gfn,
    /// `None` for a page that is not in use.
    role: Option<PageRole>,
    /// The PDPTEs that a page above PAE's directories stands for.
    pdptes: [u64; 4],
    generation: u64,
    /// How many hold it as a root.
    roots: u32,
    /// Links to it.
    parents: u32,
    /// Next page in the bucket, or among the free or the dying ones.
    next: u32,
    /// The operation that used it last.
    used: u64,
    /// Writes to its table are tracked on its behalf. Of a page that shadows a table neither this nor the next is so
    /// only if it is a root whose slot was taken away.
    tracked: bool,
    /// The guest writes to its table without an exit.
    unsync: bool,
    /// It is there because a huge page must not be executable.
    split: bool,
    /// Entries below which something may be unsync.
    stale: [u64; 8],
    /// Emulated writes since it was last used.
    writes: u8,
    /// The operation that was the first of those.
    since: u64,
    notes: [Note; ENTRIES],
}

impl ShadowPage {
    /// Whether something below the page, or its own table, may be unsync.
    #[inline]
    fn is_stale(&self) -> bool {
        self.unsync || self.stale.iter().fold(0, |all, word| all | word) != 0
    }

    /// Whether these are the PDPTEs that it stands for.
    #[inline]
    fn has_pdptes(&self, pdptes: &[u64; 4]) -> bool {
        self.pdptes.iter().zip(pdptes).fold(0, |differs, (ours, theirs)| differs | (ours ^ theirs)) == 0
    }

    /// A page that is not in use.
    pub const UNUSED: Self = Self {
        frame: Pfn::new_truncate(0),
        gfn: Gfn::new_truncate(0),
        role: None,
        pdptes: [0; 4],
        generation: 0,
        roots: 0,
        parents: NONE,
        next: NONE,
        used: 0,
        tracked: false,
        unsync: false,
        split: false,
        stale: [0; 8],
        writes: 0,
        since: 0,
        notes: [Note::EMPTY; ENTRIES],
    };
}

/// Heads of the chains of frames with one hash.
#[derive(Clone, Copy, Debug)]
pub struct ShadowBucket {
    pages: u32,
    leaves: u32,
}

impl ShadowBucket {
    /// A bucket with nothing in it.
    pub const EMPTY: Self = Self { pages: NONE, leaves: NONE };
}

/// Memory for what a shadow kind has to remember; it fixes the page quota.
#[derive(Debug)]
pub struct ShadowStore<'s> {
    /// As many shadow pages as there can be; 32 are enough for anything to work.
    pub pages: &'s mut [ShadowPage],
    /// Buckets of the page cache and the reverse map; best as many as there are pages, at least one.
    pub buckets: &'s mut [ShadowBucket],
}

/// What the shadow kind has beside a format and tables.
#[derive(Debug)]
pub struct Shadow<'s> {
    store: ShadowStore<'s>,
    /// Entries of roots with three levels.
    pae: Pae,
    free: u32,
    /// Pages that were zapped and whose flush is not requested yet.
    dying: u32,
    unsync: usize,
    /// Pages that are there for their fetches.
    splits: u64,
    /// Huge pages are not executable.
    no_huge_execute: bool,
    /// The epoch that notes about device memory are of, plus one; zero while none are made.
    mmio_epoch: u64,
    /// A translation was taken away since the last flush was requested.
    pending: bool,
    /// The same of what a guest's own flush has taken away: that vCPU has it no more, and others may have it until they
    /// flush or the host takes something away.
    owed: bool,
    /// What this operation requested.
    issued: Option<Issued>,
    /// Until this is acknowledged, some TLB may permit writes to a page that is shadowed.
    barrier: Generation,
    /// The newest barrier that is known to be acknowledged.
    acknowledged: Generation,
    /// Counts operations.
    now: u64,
    /// The lowest page that a near fault has used last, and the operation that was: of the pages above nothing is noted.
    last_near: (u32, u64),
    /// Counts links that went: while it stays the same, an address is translated by the same lowest page.
    unlinked: u64,
    /// The lowest page that the last fault has mapped something in, if it has.
    last: u32,
    cpu: CpuId,
}

/// The shadow kind of a VM.
pub type ShadowMmu<'s, F, M> = MmuKind<F, M, Shadow<'s>>;

/// What an operation did, and the flush it requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "kick the CPUs that the flush names"]
pub struct ShadowDone<T> {
    /// The outcome.
    pub outcome: T,
    /// Kick these CPUs; `None` if nothing was taken away.
    pub issued: Option<Issued>,
}

/// Why an operation stops early; everything is as whole as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    NeedTables,
    /// A flush has to be acknowledged first.
    Wait,
    /// All pages of the quota are in use by roots and this operation.
    Full,
    /// The slot of the guest's table has no memory for notes.
    Untrackable(Gfn),
}

impl<'s, F: EntryFormat, M: TableMemory> ShadowMmu<'s, F, M> {
    /// A shadow kind for the VM whose memory is `memory`. `format` is the one the CPU walks in long mode, or in its
    /// second stage; `pae` is for roots of three levels. `None` if the store is too small.
    pub fn new<B>(
        memory: &VmMemory<B>,
        format: F,
        pae: Pae,
        tables: M,
        store: ShadowStore<'s>,
    ) -> Option<Self> {
        let count = u32::try_from(store.pages.len()).ok()?;
        if count < 8 || count > NONE / ENTRIES as u32 || store.buckets.is_empty() {
            return None;
        }
        for (index, page) in store.pages.iter_mut().enumerate() {
            *page = ShadowPage::UNUSED;
            page.next = if index + 1 == count as usize { NONE } else { index as u32 + 1 };
        }
        store.buckets.fill(ShadowBucket::EMPTY);
        let ops = Shadow {
            store,
            pae,
            free: 0,
            dying: NONE,
            unsync: 0,
            splits: 0,
            no_huge_execute: false,
            mmio_epoch: 0,
            pending: false,
            owed: false,
            issued: None,
            barrier: Generation(0),
            acknowledged: Generation(0),
            now: 0,
            last_near: (NONE, 0),
            unlinked: 0,
            last: NONE,
            cpu: CpuId::BOOT,
        };
        Some(Self { vm: memory.id(), format, tables, freed: Freed::new(), counters: Counters::new(), ops })
    }

    /// How many shadow pages are unsync.
    pub const fn unsync_pages(&self) -> usize {
        self.ops.unsync
    }

    /// Takes the kind apart and gives every table page to `free`. As for the direct kind: no CPU is in the guest on its
    /// tables, and each flushes the tags it used with them.
    pub fn dismantle(self, mut free: impl FnMut(TablePage)) {
        let proof = Quiescent::dismantled();
        self.release_freed(&mut free);
        for page in self.ops.store.pages.iter().filter(|page| page.role.is_some()) {
            free(self.zeroed(page.frame, &proof));
        }
    }

    /// Every operation starts here.
    #[inline]
    fn begin<'m, B: Backing + 'm>(&mut self, guard: &Exclusive<'m, B>) {
        self.ops.cpu = self.admit(guard);
        assert!(guard.is_complete(), "a guard that does not name the direct kind of its VM");
        debug_assert!(!self.ops.pending, "an operation has ended without asking for its flush");
        self.ops.now += 1;
    }

    /// One on behalf of a guest that has flushed an address ends here: it asked for no more than a flush of its own.
    #[inline(always)]
    fn done_flush(&mut self) {
        self.ops.owed |= core::mem::take(&mut self.ops.pending);
    }

    /// Every other one ends here.
    fn done<'m, T, B: Backing + 'm>(&mut self, guard: &Exclusive<'m, B>, outcome: T) -> ShadowDone<T> {
        let _ = self.settle(guard);
        ShadowDone { outcome, issued: self.ops.issued.take() }
    }

    /// Ends an operation whose caller relies on nothing of the kind being left: it is told of what others took away,
    /// too, while some CPU may still have it.
    fn done_surely<'m, T, B: Backing + 'm>(&mut self, guard: &Exclusive<'m, B>, outcome: T) -> ShadowDone<T> {
        let settled = self.settle(guard);
        let issued = self.ops.issued.take();
        let generation = self.ops.barrier;
        let owed = || Issued { generation, kick: Held::<B>::memory(guard).shootdown().laggards(generation) };
        ShadowDone { outcome, issued: issued.or_else(|| (!settled).then(owed)) }
    }

    /// Requests the flush of all that was taken away; whether every CPU has acknowledged it.
    #[inline]
    fn settle<'m, B: Backing + 'm>(&mut self, guard: &Exclusive<'m, B>) -> bool {
        self.ops.pending |= core::mem::take(&mut self.ops.owed) && !mutant::is(Mutant::OwedForgotten);
        if self.ops.pending || self.ops.dying != NONE {
            self.request_flush(Held::<B>::memory(guard).shootdown());
        }
        self.is_settled(guard)
    }

    /// Whether every CPU has acknowledged the last flush that was requested.
    #[inline]
    fn is_settled<'m, B: Backing + 'm>(&mut self, guard: &Exclusive<'m, B>) -> bool {
        // What was acknowledged once stays so.
        if self.ops.acknowledged < self.ops.barrier {
            if !Held::<B>::memory(guard).shootdown().is_acknowledged(self.ops.barrier) {
                return false;
            }
            self.ops.acknowledged = self.ops.barrier;
        }
        true
    }

    #[inline(never)]
    fn request_flush(&mut self, shootdown: &Shootdown) {
        let mut flush = Flush::new(&self.format, &self.tables, &self.freed, shootdown);
        flush.note_if(core::mem::take(&mut self.ops.pending));
        while let Some(page) = self.ops.store.pages.get_mut(self.ops.dying as usize) {
            flush.adopt(TableFrame::linked(page.frame), FlushSite::ShadowPage);
            let index = core::mem::replace(&mut self.ops.dying, page.next);
            page.next = core::mem::replace(&mut self.ops.free, index);
        }
        if let Some(issued) = flush.issue() {
            self.ops.barrier = issued.generation;
            self.ops.issued = Some(issued);
        }
    }

    fn page(&self, index: u32) -> &ShadowPage {
        &self.ops.store.pages[index as usize]
    }

    fn page_mut(&mut self, index: u32) -> &mut ShadowPage {
        &mut self.ops.store.pages[index as usize]
    }
}

/// The page and the index of an entry's number.
const fn split(entry: u32) -> (u32, usize) {
    (entry / ENTRIES as u32, entry as usize % ENTRIES)
}

/// The number of an entry.
const fn number(page: u32, index: usize) -> u32 {
    page * ENTRIES as u32 + index as u32
}

/// Whether entries of a page with this role stand for entries of a table of the guest; in others they map guest
/// frames, or lead down to the guest's root.
fn shadows(role: &PageRole) -> bool {
    !role.direct && !is_above(role)
}

/// Whether the page is above what the guest has tables for. PAE's four pointers are no table: the processor keeps their
/// values.
fn is_above(role: &PageRole) -> bool {
    let Some(guest) = role.base.guest().filter(|_| !role.direct) else { return false };
    match guest.mode() {
        PagingMode::Pae => role.level >= Level::L3,
        _ => guest.top().is_some_and(|top| role.level > top),
    }
}

/// Whether the page belongs to a shadow of nested tables.
fn is_nested(role: &PageRole) -> bool {
    role.base.guest().is_some_and(|guest| guest.is_ept() || guest.flags().contains(RoleFlags::NESTED))
}

/// Whether the guest's entries have four bytes.
fn is_short(role: &PageRole) -> bool {
    role.base.guest().is_some_and(|guest| guest.mode() == PagingMode::TwoLevel)
}

/// Where the guest's entry is that the one at `index` stands for.
fn guest_entry(page: &ShadowPage, role: &PageRole, index: usize) -> Gpa {
    let offset = if !is_short(role) {
        index * 8
    } else if role.level == Level::L2 {
        (usize::from(role.quadrant) * ENTRIES + index) / 2 * 4
    } else {
        (usize::from(role.quadrant) * ENTRIES + index) * 4
    };
    Gpa::new_truncate(page.gfn.gpa().bits() + offset as u64 % 4096)
}

/// Whose memory the pages of the role map, and shadow.
const fn space(role: &PageRole) -> Space {
    Space::of(role.base.vcpu().smm)
}

/// The guest's entry at `at`, in a table that a page of this role shadows.
fn read_guest<B: Backing>(memory: &VmMemory<B>, at: Gpa, role: &PageRole) -> Option<u64> {
    let ram = memory.find_slot(space(role), at)?.ram();
    if is_short(role) {
        memory.backing().load_u32(&ram).ok().map(u64::from)
    } else {
        memory.backing().load_u64(&ram).ok()
    }
}
