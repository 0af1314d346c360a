//! Walks of a guest's own page tables, as emulation makes them.
mod context;
mod entry;
mod fault;
mod permission;
mod quick;
mod reserved;
mod result;
mod source;
mod walker;

pub use context::{PagingContext, PdpteError, Translation, WalkRegs};
pub(crate) use entry::{LowestEntries, LowestEntry};
pub use fault::{Cause, EptExit, EptViolation, FaultInfo, Linear, NpfInfo, PageFaultCode, Place, WalkError};
pub use result::{GuestWalk, WalkStep};
pub use source::{
    BelowError, LogFull, MarkObserver, NestedTables, NestedWalk, Observed, TableSource, Update,
};
