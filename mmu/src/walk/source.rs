//! The stage below a walk: where the entries of a guest's tables are read and marked.
use super::context::{PagingContext, Translation, WalkRegs};
use super::fault::{Cause, FaultInfo, Linear, Place, WalkError};
use crate::access::{Access, AccessKind, Prot};
use crate::addr::{Address, Gpa, Gva, NGpa};
use crate::memory::{Backing, NotRam, Shared, Space, SpaceView};
use crate::mutant::{self, Mutant};
use crate::role::RoleFlags;

/// Why an entry cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BelowError {
    /// It lies outside RAM.
    NotRam,
    /// The stage below has a fault of its own.
    Fault(FaultInfo),
    /// The stage below could not finish in a bounded number of tries.
    Contended,
    /// The stage below logs what it marks dirty, and the log is full.
    LogFull,
}

/// What became of an entry that was to be marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    /// It has the new value.
    Done,
    /// It lies in a read-only slot, and stays what it is.
    ReadOnly,
    /// The guest has changed it since it was read.
    Changed,
}

/// The log of pages that nested tables mark dirty is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogFull;

/// Access to the entries of a guest's tables, by the addresses the tables use.
pub trait TableSource<A: Address> {
    /// Reads an 8-byte entry; `at` is a multiple of eight.
    fn read_u64(&self, at: A) -> Result<u64, BelowError>;
    /// Reads a 4-byte entry; `at` is a multiple of four.
    fn read_u32(&self, at: A) -> Result<u32, BelowError>;
    /// Reads a PDPTE for its register: no step of a walk, so a read whatever a walk is.
    #[inline]
    fn read_pdpte(&self, at: A) -> Result<u64, BelowError> {
        self.read_u64(at)
    }
    /// Replaces an 8-byte entry if it still is `current`.
    fn update_u64(&self, at: A, current: u64, new: u64) -> Result<Update, BelowError>;
    /// Replaces a 4-byte entry if it still is `current`.
    fn update_u32(&self, at: A, current: u32, new: u32) -> Result<Update, BelowError>;
    /// Called before a leaf of extended page tables gets its dirty flag, and before anything is marked: L1's page-modification
    /// log (Intel SDM vol. 3, 29.3.6) takes the guest-physical address of the page.
    #[inline]
    fn log_dirty(&self, _page: NGpa) -> Result<(), LogFull> {
        Ok(())
    }
}

/// L1's tables, and those of an L2 without nested paging: straight from the slots that the space sees.
impl<B: Backing> TableSource<Gpa> for SpaceView<'_, B> {
    #[inline(always)]
    fn read_u64(&self, at: Gpa) -> Result<u64, BelowError> {
        self.load_u64(at).map_err(|NotRam { .. }| BelowError::NotRam)
    }

    #[inline]
    fn read_u32(&self, at: Gpa) -> Result<u32, BelowError> {
        self.load_u32(at).map_err(|NotRam { .. }| BelowError::NotRam)
    }

    fn update_u64(&self, at: Gpa, current: u64, new: u64) -> Result<Update, BelowError> {
        match self.compare_exchange_u64(at, current, new) {
            Ok(found) => Ok(Update::after(found == current)),
            Err(NotRam { .. }) => self.read_u64(at).map(|found| Update::refused(found == current)),
        }
    }

    fn update_u32(&self, at: Gpa, current: u32, new: u32) -> Result<Update, BelowError> {
        match self.compare_exchange_u32(at, current, new) {
            Ok(found) => Ok(Update::after(found == current)),
            Err(NotRam { .. }) => self.read_u32(at).map(|found| Update::refused(found == current)),
        }
    }
}

/// The same in the normal space.
impl<B: Backing> TableSource<Gpa> for Shared<'_, B> {
    #[inline(always)]
    fn read_u64(&self, at: Gpa) -> Result<u64, BelowError> {
        self.in_space(Space::Normal).read_u64(at)
    }

    #[inline]
    fn read_u32(&self, at: Gpa) -> Result<u32, BelowError> {
        self.in_space(Space::Normal).read_u32(at)
    }

    fn update_u64(&self, at: Gpa, current: u64, new: u64) -> Result<Update, BelowError> {
        self.in_space(Space::Normal).update_u64(at, current, new)
    }

    fn update_u32(&self, at: Gpa, current: u32, new: u32) -> Result<Update, BelowError> {
        self.in_space(Space::Normal).update_u32(at, current, new)
    }
}

impl Update {
    /// An exchange was made, if the entry was `unchanged`.
    #[inline]
    pub const fn after(unchanged: bool) -> Self {
        if unchanged {
            Self::Done
        } else {
            Self::Changed
        }
    }

    const fn refused(unchanged: bool) -> Self {
        if unchanged {
            Self::ReadOnly
        } else {
            Self::Changed
        }
    }
}

/// Told of each entry that a walk has marked: dirty log and write tracking.
pub trait MarkObserver {
    /// `bytes` bytes at `at` were written.
    fn marked(&self, at: Gpa, bytes: usize);
    /// As [`TableSource::log_dirty`].
    #[inline]
    fn log_dirty(&self, _page: NGpa) -> Result<(), LogFull> {
        Ok(())
    }
}

/// L1's memory, with somebody who wants to know what walks write there. Under [`NestedTables`] it sees both stages' marks, by
/// the addresses of L1.
#[derive(Clone, Copy, Debug)]
pub struct Observed<'w, S, O> {
    /// L1's memory.
    pub memory: &'w S,
    /// Who is told.
    pub observer: &'w O,
}

impl<S: TableSource<Gpa>, O: MarkObserver> TableSource<Gpa> for Observed<'_, S, O> {
    #[inline]
    fn read_u64(&self, at: Gpa) -> Result<u64, BelowError> {
        self.memory.read_u64(at)
    }

    #[inline]
    fn read_u32(&self, at: Gpa) -> Result<u32, BelowError> {
        self.memory.read_u32(at)
    }

    fn update_u64(&self, at: Gpa, current: u64, new: u64) -> Result<Update, BelowError> {
        let update = self.memory.update_u64(at, current, new)?;
        if update == Update::Done {
            self.observer.marked(at, 8);
        }
        Ok(update)
    }

    fn update_u32(&self, at: Gpa, current: u32, new: u32) -> Result<Update, BelowError> {
        let update = self.memory.update_u32(at, current, new)?;
        if update == Update::Done {
            self.observer.marked(at, 4);
        }
        Ok(update)
    }

    fn log_dirty(&self, page: NGpa) -> Result<(), LogFull> {
        self.observer.log_dirty(page)
    }
}

/// L2's tables under nested paging: each entry is reached through the tables that L1 keeps for L2 (the sketch's `walk12`
/// reading through `tdp12_walk`).
///
/// The processor reads them by user accesses that count as writes, whether it marks them or not (AMD APM vol. 2, 15.25.6;
/// Intel SDM vol. 3, 29.3.3.2); with extended page tables that keep no accessed and dirty flags, only marking is a write.
#[derive(Debug)]
pub struct NestedTables<'w, S> {
    /// How L1's nested tables are read.
    pub context: &'w PagingContext<NGpa, Gpa>,
    /// Their root: L1's NCR3, or the EPT pointer.
    pub regs: WalkRegs,
    /// L1's memory.
    pub memory: &'w S,
}

impl<S: TableSource<Gpa>> NestedTables<'_, S> {
    #[inline]
    fn locate(&self, at: NGpa, kind: AccessKind) -> Result<Gpa, BelowError> {
        match self.context.translate(self.memory, &self.regs, at, Access::user(kind)) {
            Ok(translation) => Ok(translation.address),
            Err(error) => Err(into_below(error)),
        }
    }

    #[inline]
    fn locate_to_read(&self, at: NGpa) -> Result<Gpa, BelowError> {
        let writes = self.context.role().keeps_accessed_dirty() && !mutant::is(Mutant::TablesReadForReading);
        self.locate(at, if writes { AccessKind::Write } else { AccessKind::Read })
    }
}

#[cold]
fn into_below(error: WalkError) -> BelowError {
    match error {
        WalkError::Fault(_) if mutant::is(Mutant::RootOfL2Unmapped) => BelowError::NotRam,
        WalkError::Fault(fault) if mutant::is(Mutant::AlwaysFinal) => BelowError::Fault(fault),
        WalkError::Fault(fault) => BelowError::Fault(FaultInfo { place: Place::TableWalk, ..fault }),
        WalkError::Contended => BelowError::Contended,
        WalkError::LogFull => BelowError::LogFull,
    }
}

impl<S: TableSource<Gpa>> TableSource<NGpa> for NestedTables<'_, S> {
    fn read_u64(&self, at: NGpa) -> Result<u64, BelowError> {
        self.memory.read_u64(self.locate_to_read(at)?)
    }

    fn read_u32(&self, at: NGpa) -> Result<u32, BelowError> {
        self.memory.read_u32(self.locate_to_read(at)?)
    }

    fn read_pdpte(&self, at: NGpa) -> Result<u64, BelowError> {
        self.memory.read_u64(self.locate(at, AccessKind::Read)?)
    }

    fn update_u64(&self, at: NGpa, current: u64, new: u64) -> Result<Update, BelowError> {
        self.memory.update_u64(self.locate(at, AccessKind::Write)?, current, new)
    }

    fn update_u32(&self, at: NGpa, current: u32, new: u32) -> Result<Update, BelowError> {
        self.memory.update_u32(self.locate(at, AccessKind::Write)?, current, new)
    }
}

/// Both stages of L2 under nested paging: from its linear addresses to L1's guest-physical ones.
#[derive(Debug)]
pub struct NestedWalk<'w, S> {
    /// How L2's own tables are read.
    pub context: &'w PagingContext<Gva, NGpa>,
    /// L2's registers.
    pub regs: WalkRegs,
    /// L1's nested tables.
    pub tables: NestedTables<'w, S>,
}

impl<S: TableSource<Gpa>> NestedWalk<'_, S> {
    /// Translates `address` for `access`, as [`PagingContext::translate`] does: what the result permits, and its page, is
    /// what both stages agree on.
    ///
    /// A fault says by its stage whose tables caused it: L2's own, and L2 gets a page fault; or L1's, and L1 gets an exit.
    pub fn translate(&self, address: Gva, access: Access) -> Result<Translation<Gpa>, WalkError> {
        let linear = self.context.translate(&self.tables, &self.regs, address, access)?;
        let NestedTables { context, regs, memory } = &self.tables;
        let below =
            context.translate(*memory, regs, linear.address, context.final_access(access, linear.prot));
        match below {
            Ok(found) => Ok(Translation {
                page_bytes: if mutant::is(Mutant::PageOfSecondStage) {
                    found.page_bytes
                } else {
                    found.page_bytes.min(linear.page_bytes)
                },
                prot: both(linear.prot, found.prot, context),
                ..found
            }),
            Err(WalkError::Fault(fault)) => Err(WalkError::Fault(FaultInfo {
                linear: Some(Linear { address: self.context.linear(address), prot: linear.prot }),
                ..fault
            })),
            Err(other) => Err(other),
        }
    }
}

/// What two stages permit together. The second has no say in who is a user; which of its fetch bits counts follows from the
/// first.
fn both(linear: Prot, below: Prot, context: &PagingContext<NGpa, Gpa>) -> Prot {
    let mut below = below;
    if context.role().flags().contains(RoleFlags::MODE_BASED_EXECUTE) && linear.contains(Prot::USER) {
        below.set(Prot::EXECUTE, below.contains(Prot::EXECUTE_USER));
    }
    if mutant::is(Mutant::SecondStageAlone) {
        return below | linear & Prot::USER;
    }
    linear & (below | Prot::USER)
}

impl BelowError {
    /// The error of a walk that could not reach an entry; `fault` says where it was.
    #[cold]
    pub(super) fn into_walk(self, fault: FaultInfo) -> WalkError {
        match self {
            Self::NotRam => WalkError::Fault(FaultInfo { cause: Cause::NoTable, ..fault }),
            Self::Fault(below) => {
                // What it was all about, unless a stage in between has said so already.
                let linear = Linear { address: Gva::new(fault.address), prot: Prot::empty() };
                WalkError::Fault(FaultInfo { linear: Some(below.linear.unwrap_or(linear)), ..below })
            }
            Self::Contended => WalkError::Contended,
            Self::LogFull => WalkError::LogFull,
        }
    }
}
