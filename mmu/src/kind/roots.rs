//! Roots of the direct kind: one for each role in use, counted, and obsolete all at once.
//!
//! Roots come and go under the exclusive guard, so under any guard they stand still. What operations on a range do, they do
//! under every root, obsolete ones included, until those have been zapped: a vCPU may still run on one.
use bitflags::bitflags;

use super::direct::DirectMmu;
use super::flush::Flush;
use super::sweep::{Operation, Sweep};
use crate::addr::{Hpa, Pfn};
use crate::format::EntryFormat;
use crate::level::Level;
use crate::memory::{Backing, Exclusive, Held, Space, VmMemory};
use crate::mutant::{self, FlushSite, Mutant};
use crate::sync::{AtomicU64, Ordering};
use crate::tables::{TableCache, TableFrame, TableMemory, TablePage};

/// Roots that a kind can have, obsolete ones included.
pub const MAX_ROOTS: usize = 8;

bitflags! {
    /// What, of a vCPU's state, gives it a root of its own in the direct kind.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct DirectRole: u8 {
        /// System-management mode, which can see other memory.
        const SMM = 1 << 0;
        /// The vCPU runs a guest of its guest.
        const GUEST_MODE = 1 << 1;
    }
}

/// A root that the CPU can be pointed at: NCR3, an EPT pointer, or CR3 without its low bits.
///
/// It is a name, not a share: whoever [gets](DirectMmu::get_root) a root [puts](DirectMmu::put_root) it once, when no vCPU
/// enters on it any more. A name whose root is gone is refused everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// Address of the root table.
    pub hpa: Hpa,
    /// Level of the root table: how deep the CPU walks.
    pub level: Level,
    /// Where the kind keeps it.
    index: usize,
    /// Role and generation.
    key: u64,
}

/// Why there is no root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoot {
    /// The cache is empty: fill it and ask again.
    NeedTables,
    /// [`MAX_ROOTS`] exist: [zap](DirectMmu::zap_obsolete) the obsolete ones.
    Full,
}

impl DirectRole {
    /// The space whose slots a root of this role maps.
    #[inline]
    pub const fn space(self) -> Space {
        Space::of(self.contains(Self::SMM))
    }
}

/// Role in bits 7:0, generation above.
const fn key(role: DirectRole, generation: u64) -> u64 {
    generation << 8 | role.bits() as u64
}

/// The role in a key.
#[inline]
const fn role_of(key: u64) -> DirectRole {
    DirectRole::from_bits_retain(key as u8)
}

/// A generation that never comes: of a root that was put for the last time.
const DEAD: u64 = u64::MAX >> 8;

impl Root {
    /// No root: of a generation that never comes, so that no vCPU enters on it.
    pub(crate) const NONE: Self = Self {
        hpa: Hpa::new_truncate(0),
        level: Level::L4,
        index: usize::MAX,
        key: key(DirectRole::empty(), DEAD),
    };

    /// The generation that the root is of.
    #[inline]
    pub(crate) const fn generation(&self) -> u64 {
        self.key >> 8
    }

    /// The space whose slots it maps, if it is one of the direct kind.
    #[inline]
    pub const fn space(&self) -> Space {
        role_of(self.key).space()
    }

    /// A root of the shadow kind, which keeps it at `index`.
    pub(super) const fn of_shadow(hpa: Hpa, level: Level, index: usize, generation: u64) -> Self {
        Self { hpa, level, index, key: key(DirectRole::empty(), generation) }
    }

    /// Where its kind keeps it.
    pub(super) const fn index(&self) -> usize {
        self.index
    }

    /// A root for tests of what only compares them.
    #[cfg(test)]
    pub(crate) const fn for_tests(address: u64, generation: u64) -> Self {
        let role = DirectRole::empty();
        Self { hpa: Hpa::new_truncate(address), level: Level::L4, index: 0, key: key(role, generation) }
    }
}

#[derive(Debug)]
struct RootCell {
    /// Frame number of the table plus one; zero for none.
    table: AtomicU64,
    key: AtomicU64,
    count: AtomicU64,
}

/// The roots of a kind. The first is that of the empty role, which the kind itself holds.
#[derive(Debug)]
pub(super) struct Roots {
    cells: [RootCell; MAX_ROOTS],
}

impl Roots {
    pub(super) fn new(root: TablePage, generation: u64) -> Self {
        let cell =
            |_| RootCell { table: AtomicU64::new(0), key: AtomicU64::new(0), count: AtomicU64::new(0) };
        let roots = Self { cells: core::array::from_fn(cell) };
        roots.set(0, root.into_frame(), key(DirectRole::empty(), generation), 1);
        roots
    }

    fn set(&self, index: usize, table: Pfn, key: u64, count: u64) {
        let cell = &self.cells[index];
        cell.key.store(key, Ordering::Relaxed);
        cell.count.store(count, Ordering::Relaxed);
        // Release: a sweep that finds the table finds it empty.
        cell.table.store(table.number() + 1, Ordering::Release);
    }

    /// The table of root `index`.
    #[inline]
    pub(super) fn table(&self, index: usize) -> Option<TableFrame> {
        let number = self.cells.get(index)?.table.load(Ordering::Acquire).checked_sub(1)?;
        Some(TableFrame::linked(Pfn::new_truncate(number)))
    }

    /// The space whose slots root `index` maps: also when the root is obsolete.
    pub(super) fn space(&self, index: usize) -> Space {
        let cell = self.cells.get(index);
        cell.map_or(Space::Normal, |cell| role_of(cell.key.load(Ordering::Relaxed)).space())
    }

    fn get(&self, index: usize, level: Level) -> Option<Root> {
        let key = self.cells.get(index)?.key.load(Ordering::Relaxed);
        Some(Root { hpa: self.table(index)?.pfn().hpa(), level, index, key })
    }

    fn free_cell(&self) -> Option<usize> {
        self.cells.iter().position(|cell| cell.table.load(Ordering::Relaxed) == 0)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = TableFrame> + '_ {
        (0..MAX_ROOTS).filter_map(|index| self.table(index))
    }
}

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// The root of the empty role: what the CPU is pointed at.
    #[inline]
    pub fn root(&self) -> Root {
        let cell = &self.ops.roots.cells[0];
        let table = cell.table.load(Ordering::Relaxed).saturating_sub(1);
        let key = cell.key.load(Ordering::Relaxed);
        Root { hpa: Pfn::new_truncate(table).hpa(), level: self.format.top(), index: 0, key }
    }

    /// Every root there is, obsolete ones included.
    pub fn roots(&self) -> impl Iterator<Item = Root> + '_ {
        (0..MAX_ROOTS).filter_map(|index| self.ops.roots.get(index, self.format.top()))
    }

    /// The place of `root`, if faults may map into it.
    #[inline]
    pub(super) fn live<B>(&self, memory: &VmMemory<B>, root: Root) -> Option<usize> {
        let cell = self.ops.roots.cells.get(root.index)?;
        let current = root.generation() == memory.root_generation() || mutant::is(Mutant::ObsoleteRootLive);
        (current && cell.key.load(Ordering::Relaxed) == root.key).then_some(root.index)
    }

    /// The table of `root`, if faults may map into it.
    #[inline]
    pub(super) fn live_table<B>(&self, memory: &VmMemory<B>, root: Root) -> Option<TableFrame> {
        self.ops.roots.table(self.live(memory, root)?)
    }

    /// The table of the root of the empty role, unless that is obsolete because of another kind.
    #[inline]
    pub(super) fn first_root<B>(&self, memory: &VmMemory<B>) -> Option<TableFrame> {
        let cell = &self.ops.roots.cells[0];
        if cell.key.load(Ordering::Relaxed) != key(DirectRole::empty(), memory.root_generation()) {
            return None;
        }
        self.ops.roots.table(0)
    }

    /// The root for `role`, made if there is none (from a page of `cache`); one more holds it.
    pub fn get_root<B>(
        &self,
        guard: &mut Exclusive<'_, B>,
        cache: &mut TableCache,
        role: DirectRole,
    ) -> Result<Root, NoRoot> {
        let cpu = self.admit(guard);
        let memory = Held::<B>::memory(guard);
        let wanted = key(role, memory.root_generation());
        let top = self.format.top();
        if let Some(root) =
            self.roots().find(|root| root.key == wanted || mutant::is(Mutant::RootOfOtherRole))
        {
            self.ops.roots.cells[root.index].count.fetch_add(1, Ordering::Relaxed);
            return Ok(root);
        }
        let index = self.ops.roots.free_cell().ok_or(NoRoot::Full)?;
        let &[page] = cache.peek(1).ok_or(NoRoot::NeedTables)? else { return Err(NoRoot::NeedTables) };
        cache.consume(1);
        self.ops.roots.set(index, page, wanted, 1);
        self.counters.tables(cpu, 1);
        Ok(Root { hpa: page.hpa(), level: top, index, key: wanted })
    }

    /// One fewer holds `root`. When nobody does, it becomes obsolete: [`zap_obsolete`](Self::zap_obsolete) takes it apart.
    /// A root that is gone already is no matter.
    pub fn put_root<B>(&self, guard: &mut Exclusive<'_, B>, root: Root) {
        self.admit(guard);
        let found = self.ops.roots.cells.iter().find(|cell| {
            cell.table.load(Ordering::Relaxed) == root.hpa.pfn().number() + 1
                && cell.key.load(Ordering::Relaxed) == root.key
        });
        let Some(cell) = found else { return };
        let count = cell.count.load(Ordering::Relaxed).saturating_sub(1);
        cell.count.store(count, Ordering::Relaxed);
        if count == 0
            && !mutant::is(Mutant::PutRootStaysLive)
            && root.generation() == Held::<B>::memory(guard).root_generation()
        {
            // What is left of it still is of its space.
            cell.key.store(key(role_of(root.key), DEAD), Ordering::Relaxed);
            guard.make_stale();
        }
    }

    /// Takes everything away at once: every root is obsolete from now on, and the empty role has a new one, `root`.
    ///
    /// Issue the returned flush, so that CPUs leave the old roots, and then take those apart by
    /// [`zap_obsolete`](Self::zap_obsolete) at leisure. vCPUs find out by
    /// [`Entered::is_obsolete`](crate::Entered::is_obsolete). Gives the page back if [`MAX_ROOTS`] exist.
    pub fn invalidate_all<'a, B>(
        &'a self,
        guard: &mut Exclusive<'a, B>,
        root: TablePage,
    ) -> Result<Flush<'a, F, M>, TablePage> {
        let cpu = self.admit(guard);
        let roots = &self.ops.roots;
        let (Some(old), Some(index)) = (roots.table(0), roots.free_cell()) else { return Err(root) };
        let first = &roots.cells[0];
        // The kind's own hold is on the new one.
        let count = first.count.load(Ordering::Relaxed).saturating_sub(1);
        roots.set(index, old.pfn(), first.key.load(Ordering::Relaxed), count);
        guard.retire_roots();
        let memory = Held::<B>::memory(guard);
        roots.set(0, root.into_frame(), key(DirectRole::empty(), memory.root_generation()), 1);
        self.counters.tables(cpu, 1);
        let mut flush = self.obligation(memory);
        flush.note(FlushSite::InvalidateAll);
        Ok(flush)
    }

    /// Takes obsolete roots apart, in batches; `sweep` is over [`GfnRange::ALL`](crate::GfnRange::ALL). A root goes with
    /// the last of its tables, and only when nobody holds it.
    pub fn zap_obsolete<'a, B: Backing + 'a>(
        &'a self,
        guard: &impl Held<'a, B>,
        sweep: &mut Sweep,
    ) -> Flush<'a, F, M> {
        self.sweep(guard, sweep, Operation::Dismantle)
    }

    /// Whether root `index` is one to take apart.
    pub(super) fn is_obsolete<B>(&self, memory: &VmMemory<B>, index: usize) -> bool {
        let cell = &self.ops.roots.cells[index];
        cell.key.load(Ordering::Relaxed) >> 8 != memory.root_generation()
    }

    /// Forgets root `index`, which is obsolete and empty, and says what its table was; `None` if somebody holds it.
    pub(super) fn drop_root(&self, index: usize) -> Option<TableFrame> {
        let cell = &self.ops.roots.cells[index];
        if cell.count.load(Ordering::Relaxed) != 0 && !mutant::is(Mutant::HeldRootDropped) {
            return None;
        }
        let table = cell.table.swap(0, Ordering::AcqRel).checked_sub(1)?;
        Some(TableFrame::linked(Pfn::new_truncate(table)))
    }
}
