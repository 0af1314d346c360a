//! Fault information: one struct, rendered to an error code only at the edge.
use bitflags::bitflags;

use crate::access::{Access, AccessKind, Agent, Prot};
use crate::addr::Stage;
use crate::level::Level;

/// Why a walk failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An entry is not present.
    NotPresent,
    /// An entry has a reserved bit set.
    Reserved,
    /// The translation forbids the access.
    Protection,
    /// A table lies outside RAM. Reported like an entry that is not present.
    NoTable,
}

/// What was being translated when a second stage failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The address that the access is to.
    Final,
    /// The address of an entry of the guest's own tables.
    TableWalk,
}

/// A fault of one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The stage whose tables failed: who gets to see the fault.
    pub stage: Stage,
    /// The address that stage was asked for: CR2, or the guest-physical address of a nested fault.
    pub address: u64,
    /// Level of the table whose entry failed; for a protection fault, of the leaf.
    pub level: Level,
    /// The access that stage was asked for.
    pub access: Access,
    /// What was being translated.
    pub place: Place,
    /// Why it failed.
    pub cause: Cause,
    /// What the entries read so far permit, the failing one included if it is present.
    pub found: Prot,
    /// A protection key forbids the access.
    pub key_denied: bool,
    /// Fetches show in the error code ([`CpuRole::reports_fetches`](crate::CpuRole::reports_fetches)).
    pub reports_fetches: bool,
}

/// A walk that did not reach its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// The guest gets a fault.
    Fault(Fault),
    /// The guest changed its tables during the walk, again and again: let it run on and repeat the access.
    Contended,
}

bitflags! {
    /// Page-fault error code (AMD APM vol. 2, 8.4.2; Intel SDM vol. 3, 4.7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PageFaultCode: u32 {
        /// P: every entry was present.
        const PRESENT = 1 << 0;
        /// R/W: a write.
        const WRITE = 1 << 1;
        /// U/S: a user access.
        const USER = 1 << 2;
        /// RSV: a reserved bit.
        const RESERVED = 1 << 3;
        /// I/D: a fetch.
        const FETCH = 1 << 4;
        /// PK: a protection key.
        const KEY = 1 << 5;
    }
}

impl Fault {
    /// The fault as a #PF error code.
    pub fn page_fault_code(&self) -> PageFaultCode {
        let mut code = PageFaultCode::empty();
        let present = matches!(self.cause, Cause::Reserved | Cause::Protection);
        code.set(PageFaultCode::PRESENT, present);
        code.set(PageFaultCode::WRITE, self.access.kind == AccessKind::Write);
        code.set(PageFaultCode::USER, self.access.agent == Agent::User);
        code.set(PageFaultCode::RESERVED, self.cause == Cause::Reserved);
        code.set(PageFaultCode::FETCH, self.access.kind == AccessKind::Execute && self.reports_fetches);
        code.set(PageFaultCode::KEY, self.key_denied);
        code
    }

    /// The fault as EXITINFO1 of a nested page fault.
    pub fn npf_info(&self) -> NpfInfo {
        NpfInfo { code: self.page_fault_code(), place: self.place }
    }
}

/// EXITINFO1 of a nested page fault (AMD APM vol. 2, 15.25.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NpfInfo {
    /// Bits 31:0, an error code.
    pub code: PageFaultCode,
    /// Bits 33:32.
    pub place: Place,
}

impl NpfInfo {
    /// Bit 32: the fault is in the translation of the final address.
    const FINAL: u64 = 1 << 32;
    /// Bit 33: the fault is in the translation of the guest's tables.
    const TABLE_WALK: u64 = 1 << 33;

    /// What hardware reported. Bits without meaning are dropped.
    #[inline]
    pub const fn from_bits(exit_info_1: u64) -> Self {
        let place = if exit_info_1 & Self::TABLE_WALK != 0 { Place::TableWalk } else { Place::Final };
        Self { code: PageFaultCode::from_bits_truncate(exit_info_1 as u32), place }
    }

    /// The value as hardware reports it.
    pub const fn bits(self) -> u64 {
        let place = match self.place {
            Place::Final => Self::FINAL,
            Place::TableWalk => Self::TABLE_WALK,
        };
        place | self.code.bits() as u64
    }

    /// What the access did.
    #[inline]
    pub const fn access(self) -> AccessKind {
        if self.code.contains(PageFaultCode::WRITE) {
            AccessKind::Write
        } else if self.code.contains(PageFaultCode::FETCH) {
            AccessKind::Execute
        } else {
            AccessKind::Read
        }
    }
}
