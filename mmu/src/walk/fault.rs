//! Fault information: one struct, rendered to an error code only at the edge.
use bitflags::bitflags;

use crate::access::{Access, AccessKind, Agent, Prot};
use crate::addr::{Gva, Stage};
use crate::level::Level;
use crate::mutant::{self, Mutant};
use crate::role::{CpuRole, RoleFlags};

/// Why a walk failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An entry is not present.
    NotPresent,
    /// An entry has a reserved bit set; of EPT, it is misconfigured.
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

/// The linear address that a fault of the second stage goes back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// The address.
    pub address: Gva,
    /// What the guest's own tables permit there: known once they have been walked, that is in [`Place::Final`].
    pub prot: Prot,
}

/// A fault of one stage: everything that is known, and nothing of how it is reported.
///
/// The edge renders it as what the guest's CPU has: [`page_fault_code`](Self::page_fault_code),
/// [`ept_exit`](Self::ept_exit) or [`npf_info`](Self::npf_info).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultInfo {
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
    /// What the entries read so far permit, the failing one included if it is present. An entry of EPT that is not present
    /// permits nothing.
    pub found: Prot,
    /// A protection key forbids the access.
    pub key_denied: bool,
    /// The linear address behind it all, if the stage is a second one and there is one. A load of PDPTEs has none.
    pub linear: Option<Linear>,
    /// How the stage's tables were read.
    pub role: CpuRole,
}

/// A walk that did not reach its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// The guest gets a fault.
    Fault(FaultInfo),
    /// The guest changed its tables during the walk, again and again: let it run on and repeat the access.
    Contended,
    /// L1 logs the pages that its nested tables mark dirty, and its log is full: L1 gets that exit. Nothing was changed.
    LogFull,
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

impl PageFaultCode {
    /// What a code says of the access, in tables that are read in `role`.
    #[inline]
    pub(super) fn of(access: Access, role: CpuRole) -> Self {
        let mut code = Self::empty();
        code.set(Self::WRITE, access.kind == AccessKind::Write);
        code.set(Self::USER, access.agent == Agent::User);
        code.set(
            Self::FETCH,
            access.kind == AccessKind::Execute
                && (role.reports_fetches() || mutant::is(Mutant::FetchAlwaysReported)),
        );
        code
    }
}

impl FaultInfo {
    /// The fault as a #PF error code.
    pub fn page_fault_code(&self) -> PageFaultCode {
        let mut code = PageFaultCode::of(self.access, self.role);
        let present = matches!(self.cause, Cause::Reserved | Cause::Protection);
        code.set(PageFaultCode::PRESENT, present);
        code.set(PageFaultCode::RESERVED, self.cause == Cause::Reserved);
        code.set(PageFaultCode::KEY, self.key_denied);
        code
    }

    /// The fault as EXITINFO1 of a nested page fault.
    pub fn npf_info(&self) -> NpfInfo {
        NpfInfo { code: self.page_fault_code(), place: self.place }
    }

    /// The fault as the VM exit that L1's extended page tables make (Intel SDM vol. 3, 29.3.3).
    pub fn ept_exit(&self) -> EptExit {
        if self.cause == Cause::Reserved {
            return EptExit::Misconfiguration;
        }
        let mut found = self.found;
        if self.cause == Cause::NoTable {
            found = Prot::empty();
        }
        let mut info = EptViolation::empty();
        let table_walk = self.place == Place::TableWalk;
        let write = self.access.kind == AccessKind::Write;
        // What marks an entry of the guest's tables reads it as well.
        info.set(EptViolation::READ, self.access.kind == AccessKind::Read || (table_walk && write));
        info.set(EptViolation::WRITE, write);
        info.set(EptViolation::FETCH, self.access.kind == AccessKind::Execute);
        let (read, write) = if mutant::is(Mutant::QualificationOrder) {
            (Prot::WRITE, Prot::READ)
        } else {
            (Prot::READ, Prot::WRITE)
        };
        info.set(EptViolation::READABLE, found.contains(read));
        info.set(EptViolation::WRITABLE, found.contains(write));
        info.set(EptViolation::EXECUTABLE, found.contains(Prot::EXECUTE));
        info.set(EptViolation::USER_EXECUTABLE, found.contains(Prot::EXECUTE_USER));
        if let Some(linear) = self.linear {
            info.insert(EptViolation::LINEAR_VALID);
            if !table_walk && !mutant::is(Mutant::LinearNeverFinal) {
                info.insert(EptViolation::LINEAR_FINAL);
                if self.role.flags().contains(RoleFlags::ADVANCED_INFO) {
                    info.set(EptViolation::LINEAR_USER, linear.prot.contains(Prot::USER));
                    info.set(EptViolation::LINEAR_WRITABLE, linear.prot.contains(Prot::WRITE));
                    info.set(EptViolation::LINEAR_NO_EXECUTE, !linear.prot.contains(Prot::EXECUTE));
                }
            }
        }
        EptExit::Violation(info)
    }
}

/// A VM exit that extended page tables make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EptExit {
    /// EPT violation, basic exit reason 48, with this exit qualification. The linear and the guest-physical address go with
    /// it.
    Violation(EptViolation),
    /// EPT misconfiguration, basic exit reason 49. Its exit qualification is zero, and the guest-physical address goes with
    /// it.
    Misconfiguration,
}

bitflags! {
    /// Exit qualification of an EPT violation (Intel SDM vol. 3, table 28-7). Bit 12, NMI unblocking, is a matter of the
    /// instruction and left to whoever reports the exit.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct EptViolation: u64 {
        /// The access was a data read.
        const READ = 1 << 0;
        /// The access was a data write.
        const WRITE = 1 << 1;
        /// The access was a fetch.
        const FETCH = 1 << 2;
        /// All entries permit reads.
        const READABLE = 1 << 3;
        /// All entries permit writes.
        const WRITABLE = 1 << 4;
        /// All entries permit fetches, with mode-based execute control those of supervisor-mode addresses.
        const EXECUTABLE = 1 << 5;
        /// All entries permit fetches of user-mode addresses: with mode-based execute control.
        const USER_EXECUTABLE = 1 << 6;
        /// There is a linear address.
        const LINEAR_VALID = 1 << 7;
        /// The access was to what the linear address translates to, not to an entry on the way.
        const LINEAR_FINAL = 1 << 8;
        /// The linear address is a user-mode address: with advanced information, as the next two.
        const LINEAR_USER = 1 << 9;
        /// The linear address can be written.
        const LINEAR_WRITABLE = 1 << 10;
        /// Nothing can be fetched from the linear address.
        const LINEAR_NO_EXECUTE = 1 << 11;
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
