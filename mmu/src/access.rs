//! What an access is, and what a translation permits.
use bitflags::bitflags;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AccessKind {
    /// Data read.
    Read = 0,
    /// Data write, or a read that is part of a read-modify-write.
    Write = 1,
    /// Instruction fetch.
    Execute = 2,
}

/// On whose behalf an access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Agent {
    /// Code at CPL 3, and every access that nested paging makes (AMD APM vol. 2, 15.25.6).
    User,
    /// Code at CPL 0 to 2, by an explicit operand: RFLAGS.AC can suspend SMAP for it.
    Supervisor,
    /// The processor itself (descriptor tables, TSS, ...): supervisor at any CPL, never suspended by RFLAGS.AC
    /// (Intel SDM vol. 3, 4.6.1).
    Implicit,
}

/// An access: what, and on whose behalf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// What the access does.
    pub kind: AccessKind,
    /// On whose behalf.
    pub agent: Agent,
}

impl Access {
    /// An explicit access of an instruction that runs at privilege level `cpl`.
    #[inline]
    pub const fn at_cpl(kind: AccessKind, cpl: u8) -> Self {
        Self { kind, agent: if cpl == 3 { Agent::User } else { Agent::Supervisor } }
    }

    /// An access that the processor makes by itself.
    #[inline]
    pub const fn implicit(kind: AccessKind) -> Self {
        Self { kind, agent: Agent::Implicit }
    }

    /// An access as nested paging makes it.
    #[inline]
    pub const fn user(kind: AccessKind) -> Self {
        Self { kind, agent: Agent::User }
    }
}

bitflags! {
    /// What a translation permits: the AND of all levels.
    ///
    /// The order is that of bits 63, 1 and 2 of an entry, turned left by two: see `PagingContext::prot`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Prot: u8 {
        /// Data reads: only EPT can say no.
        const READ = 1 << 0;
        /// Instruction fetches; with mode-based execute control those through supervisor-mode linear addresses.
        const EXECUTE = 1 << 1;
        /// Fetches through user-mode linear addresses: only EPT with mode-based execute control tells them apart, and sets
        /// it.
        const EXECUTE_USER = 1 << 2;
        /// Writes (subject to CR0.WP for supervisor accesses).
        const WRITE = 1 << 3;
        /// User accesses. EPT has no such bit, and never sets it.
        const USER = 1 << 4;
    }
}

impl Prot {
    /// What no paging at all permits.
    pub const UNPAGED: Self = Self::READ.union(Self::WRITE).union(Self::USER).union(Self::EXECUTE);
}
