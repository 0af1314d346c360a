//! The stage below a walk: where the entries of a guest's tables are read and marked.
use super::context::{PagingContext, WalkRegs};
use super::fault::{Cause, Fault, Place, WalkError};
use crate::access::{Access, AccessKind};
use crate::addr::{Address, Gpa, NGpa};
use crate::memory::{Backing, NotRam, Shared};

/// Why an entry cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BelowError {
    /// It lies outside RAM.
    NotRam,
    /// The stage below has a fault of its own.
    Fault(Fault),
    /// The stage below could not finish in a bounded number of tries.
    Contended,
}

/// Access to the entries of a guest's tables, by the addresses the tables use.
pub trait TableSource<A: Address> {
    /// Reads an 8-byte entry; `at` is a multiple of eight.
    fn read_u64(&self, at: A) -> Result<u64, BelowError>;
    /// Reads a 4-byte entry; `at` is a multiple of four.
    fn read_u32(&self, at: A) -> Result<u32, BelowError>;
    /// Replaces an 8-byte entry if it still is `current`. In a read-only slot nothing happens, and that is success.
    fn update_u64(&self, at: A, current: u64, new: u64) -> Result<bool, BelowError>;
    /// Replaces a 4-byte entry if it still is `current`. In a read-only slot nothing happens, and that is success.
    fn update_u32(&self, at: A, current: u32, new: u32) -> Result<bool, BelowError>;
}

/// L1's tables, and those of an L2 without nested paging: straight from the slots.
impl<B: Backing> TableSource<Gpa> for Shared<'_, B> {
    #[inline]
    fn read_u64(&self, at: Gpa) -> Result<u64, BelowError> {
        self.load_u64(at).map_err(|NotRam { .. }| BelowError::NotRam)
    }

    #[inline]
    fn read_u32(&self, at: Gpa) -> Result<u32, BelowError> {
        self.load_u32(at).map_err(|NotRam { .. }| BelowError::NotRam)
    }

    fn update_u64(&self, at: Gpa, current: u64, new: u64) -> Result<bool, BelowError> {
        match self.compare_exchange_u64(at, current, new) {
            Ok(found) => Ok(found == current),
            Err(_) => self.read_u64(at).map(|found| found == current),
        }
    }

    fn update_u32(&self, at: Gpa, current: u32, new: u32) -> Result<bool, BelowError> {
        match self.compare_exchange_u32(at, current, new) {
            Ok(found) => Ok(found == current),
            Err(_) => self.read_u32(at).map(|found| found == current),
        }
    }
}

/// L2's tables under nested paging: each entry is reached through the tables that L1 keeps for L2 (the sketch's `walk12`
/// reading through `tdp12_walk`).
///
/// The processor reads and marks them by user accesses that count as writes (AMD APM vol. 2, 15.25.6).
#[derive(Debug)]
pub struct NestedTables<'w, S> {
    /// How L1's nested tables are read.
    pub context: &'w PagingContext<NGpa, Gpa>,
    /// Their root: L1's NCR3.
    pub regs: WalkRegs,
    /// L1's memory.
    pub memory: &'w S,
}

impl<S: TableSource<Gpa>> NestedTables<'_, S> {
    fn locate(&self, at: NGpa) -> Result<Gpa, BelowError> {
        let access = Access::user(AccessKind::Write);
        match self.context.translate(self.memory, &self.regs, at, access) {
            Ok(translation) => Ok(translation.address),
            Err(WalkError::Fault(fault)) => {
                Err(BelowError::Fault(Fault { place: Place::TableWalk, ..fault }))
            }
            Err(WalkError::Contended) => Err(BelowError::Contended),
        }
    }
}

impl<S: TableSource<Gpa>> TableSource<NGpa> for NestedTables<'_, S> {
    fn read_u64(&self, at: NGpa) -> Result<u64, BelowError> {
        self.memory.read_u64(self.locate(at)?)
    }

    fn read_u32(&self, at: NGpa) -> Result<u32, BelowError> {
        self.memory.read_u32(self.locate(at)?)
    }

    fn update_u64(&self, at: NGpa, current: u64, new: u64) -> Result<bool, BelowError> {
        self.memory.update_u64(self.locate(at)?, current, new)
    }

    fn update_u32(&self, at: NGpa, current: u32, new: u32) -> Result<bool, BelowError> {
        self.memory.update_u32(self.locate(at)?, current, new)
    }
}

impl BelowError {
    /// The error of a walk that could not reach an entry; `fault` says where it was.
    #[cold]
    pub(super) fn into_walk(self, fault: Fault) -> WalkError {
        match self {
            Self::NotRam => WalkError::Fault(Fault { cause: Cause::NoTable, ..fault }),
            Self::Fault(below) => WalkError::Fault(below),
            Self::Contended => WalkError::Contended,
        }
    }
}
