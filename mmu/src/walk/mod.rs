//! Walks of a guest's own page tables, as emulation makes them.
mod context;
mod fault;
mod permission;
mod reserved;
mod source;
mod walker;

pub use context::{PagingContext, Translation, WalkRegs};
pub use fault::{Cause, Fault, NpfInfo, PageFaultCode, Place, WalkError};
pub use source::{BelowError, NestedTables, TableSource};
