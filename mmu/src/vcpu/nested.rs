//! A vCPU's two [`Mmu`]s and its walks: which of them counts depends on whether L1 or L2 runs.
use super::key::{GuestTag, RootKey};
use super::requests::{Requests, Sync, TagFlush};
use super::roots::ROOTS;
use super::{Mmu, Serves};
use crate::addr::{Gpa, Gva, NGpa};
use crate::kind::Root;
use crate::nested::TableAddress;
use crate::role::{CpuRole, RootRole, VcpuMode};
use crate::walk::PagingContext;

/// Who runs, as far as it decides which tables translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Running {
    /// L1; or an L2 that L1 gives no nested tables, whose own tables are L1's affair or, like L1's, a shadow's.
    Root,
    /// L2 on nested tables of L1.
    Tdp12,
}

/// The two MMUs of a vCPU, and the contexts in which the guests' own tables are read: the sketch's part of `vcpu_arch`.
/// What was a pointer into oneself there is an enum here.
#[derive(Debug)]
pub struct VcpuMmus {
    /// For L1: a direct kind, or a shadow of its own tables. It also serves an L2 without nested tables.
    pub root_mmu: Mmu,
    /// For L2: a shadow of L1's nested tables. It has a hardware tag of its own, so that neither entries nor exits of
    /// L2 flush one.
    pub tdp12_mmu: Mmu,
    /// How whoever [`Running::Root`] stands for has its own tables read.
    pub walk01: PagingContext<Gva, Gpa>,
    /// How L2 has its own tables read, when it has nested ones beneath.
    pub walk12: PagingContext<Gva, NGpa>,
    /// How L1's nested tables are read.
    pub tdp12_walk: PagingContext<NGpa, Gpa>,
    running: Running,
}

/// The walk of linear addresses: of L1's or of L2's. The stage it ends in is a type.
#[derive(Clone, Copy, Debug)]
pub enum Walk<'a> {
    /// To guest-physical addresses.
    L1(&'a PagingContext<Gva, Gpa>),
    /// To L2's physical addresses, which [`tdp12_walk`](VcpuMmus::tdp12_walk) takes on.
    L2(&'a PagingContext<Gva, NGpa>),
}

impl VcpuMmus {
    /// L1 runs.
    pub const fn new(root_mmu: Mmu, tdp12_mmu: Mmu, l1: CpuRole, l2: CpuRole, nested: CpuRole) -> Self {
        Self {
            root_mmu,
            tdp12_mmu,
            walk01: PagingContext::new(l1),
            walk12: PagingContext::new(l2),
            tdp12_walk: PagingContext::new(nested),
            running: Running::Root,
        }
    }

    /// Who runs.
    pub const fn running(&self) -> Running {
        self.running
    }

    /// The one that the vCPU runs with: the sketch's `mmu`.
    #[inline]
    pub const fn mmu(&self) -> &Mmu {
        match self.running {
            Running::Root => &self.root_mmu,
            Running::Tdp12 => &self.tdp12_mmu,
        }
    }

    /// The same, to change.
    #[inline]
    pub const fn mmu_mut(&mut self) -> &mut Mmu {
        match self.running {
            Running::Root => &mut self.root_mmu,
            Running::Tdp12 => &mut self.tdp12_mmu,
        }
    }

    /// How the linear addresses of whoever runs are translated: the sketch's `walk`.
    #[inline]
    pub const fn walk(&self) -> Walk<'_> {
        match self.running {
            Running::Root => Walk::L1(&self.walk01),
            Running::Tdp12 => Walk::L2(&self.walk12),
        }
    }

    /// L2 runs on the nested tables that `tdp12_mmu` was [told](Mmu::set_nested) of. The requests are those of its
    /// root; of what L1 asked to flush at the entry, tell it by its own events.
    pub fn enter_nested(&mut self, role: CpuRole, pointer: u64, pdptes: [u64; 4], context: u16) -> Requests {
        self.running = Running::Tdp12;
        if self.tdp12_walk.role() != role {
            self.tdp12_walk = PagingContext::new(role);
        }
        self.tdp12_mmu.set_nested(role, pointer, pdptes, context)
    }

    /// L1 runs again, on the root that it had: nothing follows, for L2 had another tag.
    pub fn leave_nested(&mut self) -> Requests {
        self.running = Running::Root;
        Requests { load: self.root_mmu.has_work(), ..Requests::NONE }
    }
}

impl Mmu {
    /// L2 runs on nested tables of L1, which are read in this role: nCR3 and `context` the ASID, or an EPT pointer and
    /// `context` zero, for nothing that goes by VPIDs takes guest-physical translations (Intel SDM vol. 3, 29.4.3.1).
    /// Another pointer or role is another root, found again like any other.
    pub fn set_nested(&mut self, role: CpuRole, pointer: u64, pdptes: [u64; 4], context: u16) -> Requests {
        let Serves::Shadow { host, accessed_dirty } = self.serves else { return Requests::NONE };
        self.context = context;
        self.mode = VcpuMode { nested: true, ..self.mode };
        let root_role = RootRole::shadow(role, host, self.mode, accessed_dirty);
        let key = RootKey::new(root_role, pointer, pdptes, GuestTag { context, pcid: 0 });
        self.nested = Some(key);
        let (load, flush) = self.select(key);
        self.settle_root();
        let flush = if load { TagFlush::All } else { flush };
        let behind = self.roots.current().and_then(|current| current.behind);
        Requests { load, sync: behind.map(|how| (how, super::RootSet::CURRENT)), flush }
    }

    /// PAE's pointers of L1's nested tables have changed: they are memory and not registers, and part of the key.
    pub(crate) fn set_nested_pointers(&mut self, pdptes: [u64; 4]) {
        if let Some(key) = self.nested {
            self.nested = Some(RootKey::new(key.role(), key.pointer(), pdptes, key.tag()));
        }
    }

    /// Roots that `covers` are behind L1's nested tables.
    pub(crate) fn roots_behind(&mut self, covers: impl Fn(&RootKey) -> bool) -> Requests {
        let (marked, flush) = self.fall_behind(Sync::All, covers);
        self.settle_root();
        let sync = (!marked.is_empty()).then_some((Sync::All, marked));
        Requests { load: self.roots.current().is_none(), sync, flush }
    }

    /// The roots that are kept for L1's table at this address, the current one first.
    pub(crate) fn roots_for(&self, table: TableAddress) -> [Option<Root>; ROOTS] {
        self.roots.roots(|key| TableAddress::new(key.pointer()) == table)
    }
}
