//! What a root of a vCPU is found by: everything that decides which of Umbra's tables the vCPU runs on.
use crate::addr::Gpa;
use crate::role::{Cr0, Cr4, Efer, PagingMode, PagingRegs, RootRole};

/// The registers of a vCPU that decide how its linear addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingState {
    /// CR0, CR4, EFER.
    pub regs: PagingRegs,
    /// CR3, without the bit that MOV to CR3 takes for an order.
    pub cr3: u64,
    /// The PDPTEs that the processor has loaded, with PAE (Intel SDM vol. 3, 4.4.1).
    pub pdptes: [u64; 4],
    /// System-management mode.
    pub smm: bool,
}

impl PagingState {
    /// After RESET or INIT (Intel SDM vol. 3, table 10-1; AMD APM vol. 2, table 14-1): no paging, whatever was before.
    pub const RESET: Self = Self {
        regs: PagingRegs { cr0: Cr0::empty(), cr4: Cr4::empty(), efer: Efer::empty() },
        cr3: 0,
        pdptes: [0; 4],
        smm: false,
    };

    /// The process-context identifier: CR3's low twelve bits if CR4.PCIDE is set, else 000H (Intel SDM vol. 3, 4.10.1).
    pub fn pcid(&self) -> u16 {
        if self.regs.cr4.contains(Cr4::PCIDE) {
            self.cr3 as u16 & 0xfff
        } else {
            0
        }
    }
}

/// Whether the PDPTEs are equal.
#[inline]
pub(super) fn are_same(some: &[u64; 4], others: &[u64; 4]) -> bool {
    some.iter().zip(others).fold(0, |differs, (one, other)| differs | (one ^ other)) == 0
}

/// The guest's own name for what it may flush by itself. Two tags share no translation as far as the guest knows, so
/// a root is up to date for one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct GuestTag {
    /// L1's name for L2: the VPID or the ASID; zero for L1 itself, and where L1's flushes go by the table's address
    /// alone (extended page tables: Intel SDM vol. 3, 29.4).
    pub context: u16,
    /// The PCID; zero for nested tables.
    pub pcid: u16,
}

/// The key of a root. What does not decide is zero, so equal keys are equal roots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RootKey {
    /// Where the guest's top table is.
    pointer: u64,
    tag: GuestTag,
    role: RootRole,
    pdptes: [u64; 4],
}

impl RootKey {
    /// The key of the root for `role` over the table that `pointer` names: CR3, nCR3 or an EPT pointer. A direct root
    /// has no pointer, and of PAE the four PDPTEs are the key, for the processor reads them once.
    pub fn new(role: RootRole, pointer: u64, pdptes: [u64; 4], tag: GuestTag) -> Self {
        let Some(guest) = role.base().guest().filter(|_| !role.is_direct()) else {
            return Self { role, pointer: 0, pdptes: [0; 4], tag: GuestTag::default() };
        };
        if guest.mode() == PagingMode::Pae {
            return Self { role, pointer: 0, pdptes, tag };
        }
        let wide = if guest.mode() == PagingMode::TwoLevel { pointer & 0xffff_ffff } else { pointer };
        Self { role, pointer: Gpa::new_truncate(wide).gfn().gpa().bits(), pdptes: [0; 4], tag }
    }

    /// Whether both are equal: what differs most often is looked at first.
    #[inline]
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.pointer == other.pointer
            && self.tag == other.tag
            && self.role == other.role
            && are_same(&self.pdptes, &other.pdptes)
    }

    /// The role.
    pub const fn role(&self) -> RootRole {
        self.role
    }

    /// Address of the guest's top table; zero if there is none, or with PAE.
    pub const fn pointer(&self) -> u64 {
        self.pointer
    }

    /// PAE's pointers.
    pub const fn pdptes(&self) -> [u64; 4] {
        self.pdptes
    }

    /// The guest's tag.
    pub const fn tag(&self) -> GuestTag {
        self.tag
    }
}
