//! L1's nested paging, as VM entry found it.
use crate::addr::{Gpa, NGpa};
use crate::format::EptHost;
use crate::level::Level;
use crate::memory::{Backing, Shared};
use crate::role::{BadEptPointer, CpuRole, GuestCpu, GuestEpt, PagingMode, PagingRegs, RootRole, VcpuMode};
use crate::walk::{PagingContext, WalkRegs};

/// How L1's nested tables are read while L2 runs: made at VM entry and not changed until the exit to L1, for L1's registers do
/// not change meanwhile.
#[derive(Clone, Debug)]
pub struct Tdp12 {
    context: PagingContext<NGpa, Gpa>,
    pointer: u64,
}

/// The table that an EPT pointer or NCR3 names: all that translations are tagged with, and so all that an invalidation of
/// them names. Page-walk length, memory type and flags of a pointer are no part of it (Intel SDM vol. 3, 29.4.2: EP4TA).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TableAddress(u64);

/// An NCR3 that VMRUN refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadNestedRoot(
    /// The rejected value.
    pub u64,
);

impl TableAddress {
    /// Of an EPT pointer, or an NCR3.
    #[inline]
    pub const fn new(pointer: u64) -> Self {
        Self(pointer & 0x000f_ffff_ffff_f000)
    }
}

impl Tdp12 {
    /// Extended page tables under `pointer`, if VM entry accepts that. It may name a table that L1 has no memory for: then
    /// walks fail as at an entry that is not present.
    pub fn ept(pointer: u64, cpu: &GuestEpt) -> Result<Self, BadEptPointer> {
        Ok(Self { context: PagingContext::new(CpuRole::ept(pointer, cpu)?), pointer })
    }

    /// Nested tables of SVM under `ncr3`. `host` and `pat` are what VMRUN saved of L1, whose mode decides how they are read
    /// and whose PAT register how their pages are cached. `execute_trap` is guest mode execute trap, which L1 has only if
    /// the host's processor does.
    pub fn npt(
        ncr3: u64,
        host: &PagingRegs,
        pat: u64,
        cpu: &GuestCpu,
        execute_trap: bool,
    ) -> Result<Self, BadNestedRoot> {
        let role = CpuRole::nested(host, cpu, execute_trap).with_host_pat(pat);
        // VMRUN takes NCR3 as MOV to CR3 takes CR3 (AMD APM vol. 2, 15.25.3).
        if ncr3 >> role.max_phys_addr() != 0 {
            return Err(BadNestedRoot(ncr3));
        }
        Ok(Self { context: PagingContext::new(role), pointer: ncr3 })
    }

    /// The walker: the sketch's `tdp12_walk`.
    #[inline]
    pub const fn context(&self) -> &PagingContext<NGpa, Gpa> {
        &self.context
    }

    /// What a walk starts from. PAE's pointers are read from memory, by each walk.
    #[inline]
    pub const fn regs(&self) -> WalkRegs {
        WalkRegs { cr3: self.pointer, pkru: 0, pkrs: 0, ac: false, pdptes: None }
    }

    /// The EPT pointer, or NCR3.
    #[inline]
    pub const fn pointer(&self) -> u64 {
        self.pointer
    }

    /// What translations are tagged with.
    #[inline]
    pub const fn table(&self) -> TableAddress {
        TableAddress::new(self.pointer)
    }

    /// The role of the root that L2 runs on. `host` is the number of levels that the processor walks under SVM;
    /// `accessed_dirty` whether it keeps such flags in a second stage.
    pub fn root_role(&self, host: Level, smm: bool, accessed_dirty: bool) -> RootRole {
        RootRole::shadow(self.context.role(), host, VcpuMode { smm, nested: true }, accessed_dirty)
    }

    /// PAE's pointers as they are now, which the root's key consists of; zero, as if not present, where L1 has no memory, and
    /// in the other modes. They are memory and no registers, so a fault may find that they have changed, and ask for another
    /// root.
    pub fn pdptes<B: Backing>(&self, guard: &Shared<'_, B>) -> [u64; 4] {
        if self.context.role().mode() != PagingMode::Pae {
            return [0; 4];
        }
        let first = self.pointer & 0xffff_ffe0;
        [0, 8, 16, 24].map(|offset| guard.load_u64(Gpa::new_truncate(first + offset)).unwrap_or(0))
    }
}

impl GuestEpt {
    /// Of what L1 is to be offered, what can be composed with the tables of `host`; `advanced_info` is the host's capability
    /// bit 22.
    ///
    /// What a host's entries cannot say would be permitted to L2 or never work. Whether a fetch goes through a user's linear
    /// address is known from the exit alone, so mode-based execute control needs the advanced information, too.
    #[must_use]
    pub const fn limited_to(self, host: &EptHost, advanced_info: bool) -> Self {
        Self {
            execute_only: self.execute_only && host.execute_only,
            five_level: self.five_level && host.five_level,
            accessed_dirty: self.accessed_dirty && host.accessed_dirty,
            advanced_info: self.advanced_info && advanced_info,
            mode_based_execute: self.mode_based_execute && host.mode_based_execute && advanced_info,
            ..self
        }
    }
}
