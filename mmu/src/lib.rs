//! Every way a guest address becomes a host address: page-table kinds, roles, walkers.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

mod access;
mod addr;
mod cpu;
mod format;
mod kind;
mod level;
mod memory;
mod role;
mod tables;
mod vcpu;
mod walk;

pub use access::{Access, AccessKind, Agent, Prot};
pub use addr::{
    Address, Gfn, GfnRange, Gpa, Gva, Hpa, NGpa, Ngfn, NonCanonical, Pfn, Stage, TooWide, VaWidth,
    MAX_PHYSICAL_BITS, PAGE_SHIFT, PAGE_SIZE,
};
pub use cpu::{CpuId, CpuSet, MAX_CPUS};
pub use format::{Entry, EntryFormat, Leaf, Npt, NptHost, Writability};
pub use kind::{
    Direct, DirectMmu, FaultOutcome, Flush, Issued, MmuKind, PageCounts, Resolution, Root, SplitProgress,
    Sweep,
};
pub use level::{Level, PageSize, ENTRIES};
pub use memory::{
    Backing, Exclusive, Generation, Held, Invalidation, InvalidationSeq, NoPage, NotRam, RamAddr, Resolved,
    Shared, Shootdown, Slot, SlotError, SlotFlags, VmMemory, MAX_SLOTS,
};
pub use role::{CpuRole, Cr0, Cr4, Efer, GuestCpu, PagingMode, PagingRegs, RoleFlags};
pub use tables::{
    EntryCell, FaultStats, HwEntry, PhysTables, TableCache, TableFrame, TableMemory, TablePage,
};
pub use vcpu::{Entered, Mmu, TagFlush};
pub use walk::{
    BelowError, Cause, Fault, NestedTables, NpfInfo, PageFaultCode, PagingContext, Place, TableSource,
    Translation, WalkError, WalkRegs,
};
