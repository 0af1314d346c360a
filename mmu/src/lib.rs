//! Every way a guest address becomes a host address: page-table kinds, roles, walkers.
//!
//! Pure: no privileged instruction, no allocation, no vendor's control structure. Whoever uses it brings the memory.
//!
//! # How the parts meet
//!
//! ```text
//! VmMemory<B>   per VM: slots, invalidation sequence, guards, flush generations; B: Backing is the guest's memory
//! DirectMmu     per VM: tables that map guest-physical to host-physical memory (an MmuKind)
//! Mmu           per vCPU and kind: role, the roots it keeps, what is due, and whether its TLB tag is behind
//! VcpuMmus      per vCPU: the two Mmus of one that can run L2, and its walks
//! TableCache    per vCPU: table pages got beforehand, fault counters
//! PagingContext per role: how the guest's own tables are read, by emulation
//! RootRole      per role: which tables of Umbra's can serve a vCPU in that role
//! ```
//!
//! What an entry of a kind's tables means is its [`EntryFormat`]: [`Npt`] for SVM (and long mode), [`Pae`] for 32-bit
//! guests, [`Ept`] for VMX, where the CPU is given
//! [`Ept::pointer`] of the root instead of its address. Code that serves a fault is the same for both.
//!
//! A vCPU's loop, with interrupts off:
//!
//! ```text
//! while cache.missing() > 0 { cache.push(zeroed page)? }
//! let entered = mmu.enter(&memory, cpu);              // flush the tag on the way in if entered.flush() says so
//! run the guest on entered.root();
//! drop(entered);                                      // it has exited
//! let guard = memory.shared(cpu);
//! match direct.fault(&guard, &mut cache, gpa, NpfInfo::from_bits(exit_info_1).access()) {
//!     Mapped | Spurious | Retry => run on,
//!     Mmio(gpa) | ReadOnly(gpa) => emulate: context.translate(&guard, &regs, rip, fetch)?, guard.read(..), ...
//!     NeedTables => fill the cache, OutOfRange(gpa) => the guest used an address that its CPU does not have,
//! }
//! ```
//!
//! If the processor says that the page is there, [`fast_fault`](DirectMmu::fast_fault) comes before the fault: it gives back
//! what logging or aging took. A vCPU whose root [became obsolete](Entered::is_obsolete) takes the root of now.
//!
//! [`populate`](DirectMmu::populate) maps a range ahead of its faults.
//!
//! Taking translations away ([`MmuKind::zap`](DirectMmu::zap), [`write_protect`](DirectMmu::write_protect)) works in
//! batches on a [`Sweep`] and returns a [`Flush`]: [`issue`](Flush::issue) it, kick the CPUs it names, and the host memory
//! is free when the generation [is acknowledged](Shootdown::is_acknowledged). Dropped, it is done by the next entry of
//! each vCPU. Table pages come back from [`MmuKind::reclaim`].
//!
//! # Walks
//!
//! A [`CpuRole`] says how a guest's tables are read: its own ([`CpuRole::new`]), those that an L1 keeps for L2 in AMD's format
//! ([`CpuRole::nested`]) or in Intel's ([`CpuRole::ept`]). A [`PagingContext`] is made from it once, and then walks:
//! [`translate`](PagingContext::translate) for emulation, [`walk`](PagingContext::walk) for a shadow of the tables, which
//! tells each entry, its place and the rights of its parents. Entries are reached through a [`TableSource`]: the slots, or
//! [`NestedTables`] for the tables of L2; [`NestedWalk`] makes both stages. [`Observed`] reports what walks mark.
//!
//! A walk that fails gives a [`FaultInfo`], which is rendered where it is needed as a [`PageFaultCode`], an [`EptExit`] or an
//! [`NpfInfo`].
//!
//! # L2
//!
//! An L2 on nested tables of L1 runs on a root of [`VcpuMmus::tdp12_mmu`]. L1's nested paging is a [`Tdp12`], made at VM entry;
//! [`VcpuMmus::enter_l2`] finds the root. An exit of the second stage is an [`L2Exit`]:
//!
//! ```text
//! let walked = tdp12.walk_exit(&memory.shared(cpu), &exit, &observer);
//! let done = mmus.l2_fault(&tdp12, &mut shadow, &mut memory.exclusive(cpu).beside(&direct), &mut cache, &walked);
//! match done.outcome {
//!     L2Fault::ToL1(fault) => L1 gets fault.ept_exit() or fault.npf_info(),
//!     L2Fault::LogFull => L1 gets "page-modification log full",
//!     L2Fault::Here(fault) => as for any shadow: run on, or emulate L2's instruction,
//! }
//! ```
//!
//! What L1 does to translations of L2 is an event of its [`L2Tag`], whose [`L2Request`] goes to [`VcpuMmus::apply`]. A write of
//! L1 that the direct kind refuses for a shadowed table is emulated and [followed](ShadowMmu::track_write), or
//! [let through](ShadowMmu::let_write) from then on.
//!
//! # What may be relied on
//!
//! - **No function of a kind takes a vCPU**, and no mask is global: formats are values.
//! - **Lock modes are types.** Direct operations ask for any [`Held`] guard and change entries by compare-exchange only;
//!   slots, roots, tracking, the start of a log or an invalidation, and collapsing ask for [`Exclusive`].
//! - **A fault takes no lock, allocates nothing, and is never half done.**
//! - **A table page leaves the crate only when no CPU can reach it**: not while an operation that may have seen it runs, not
//!   while a CPU is in the guest that has not acknowledged the flush.
//! - **Nothing a guest does panics here** or loops without bound: walks restart a bounded number of times
//!   ([`WalkError::Contended`]), faults give up ([`FaultOutcome::Retry`]), sweeps come in batches.
//! - Unsafe code is in one module (`tables/phys.rs`), with its argument; a test counts.
//!
//! # What the types exclude
//!
//! CVE-2022-45869: a fault, which holds the shared guard, cannot call what must have the VM for itself.
//!
//! ```compile_fail,E0308
//! # use mmu::*;
//! fn f<'m, F: EntryFormat, M: TableMemory, B: Backing>(
//!     kind: &'m DirectMmu<F, M>, guard: &Shared<'m, B>, sweep: &mut Sweep,
//! ) {
//!     drop(kind.collapse(guard, sweep));
//! }
//! ```
//!
//! ```
//! # use mmu::*;
//! fn f<'m, F: EntryFormat, M: TableMemory, B: Backing>(
//!     kind: &'m DirectMmu<F, M>, guard: &Exclusive<'m, B>, sweep: &mut Sweep,
//! ) {
//!     drop(kind.collapse(guard, sweep));
//! }
//! ```
//!
//! A guard stays on its CPU:
//!
//! ```compile_fail,E0277
//! # use mmu::*;
//! fn is_send<T: Send>() {}
//! is_send::<Shared<'static, ()>>();
//! ```
//!
//! An obligation is spent once, and its pages are nowhere else:
//!
//! ```compile_fail,E0382
//! # use mmu::*;
//! fn f<F: EntryFormat, M: TableMemory>(flush: Flush<'_, F, M>) {
//!     let issued = flush.issue();
//!     let again = flush.issue();
//! }
//! ```
//!
//! A table page is in one place, and none is made of a table that is linked somewhere; those come out of
//! [`MmuKind::reclaim`], which asks for proof that nobody reaches them, and [`MmuKind::dismantle`](DirectMmu::dismantle),
//! which consumes the kind.
//!
//! ```compile_fail,E0599
//! # use mmu::*;
//! fn f(page: TablePage) -> (TablePage, TablePage) {
//!     (page.clone(), page)
//! }
//! ```
//!
//! ```compile_fail,E0624
//! # use mmu::*;
//! fn f(frame: &TableFrame) -> TablePage {
//!     TablePage::owned(frame.pfn())
//! }
//! ```
//!
//! A walker of the wrong stage (the guest's own address where a guest-physical one belongs):
//!
//! ```compile_fail,E0308
//! # use mmu::*;
//! fn f<'m, F: EntryFormat, M: TableMemory, B: Backing>(
//!     kind: &'m DirectMmu<F, M>, guard: &Shared<'m, B>, cache: &mut TableCache, at: NGpa,
//! ) {
//!     let _ = kind.fault(guard, cache, at, AccessKind::Read);
//! }
//! ```
//!
//! # The sketch
//!
//! Names of Paolo Bonzini's sketch for KVM (November 2021), and what they are here:
//!
//! | sketch | here |
//! |---|---|
//! | `struct kvm_mmu_kind` | [`MmuKind`]`<F, M, O>`: format, table memory, and in `O` what one kind's operations need |
//! | `kvm_arch.direct_mmu` | [`DirectMmu`], which is `MmuKind<F, M, Direct>` |
//! | `kvm_vcpu_arch.shadow_mmu` | [`ShadowMmu`], which is `MmuKind<F, M, Shadow>`, per VM and not per vCPU |
//! | `struct kvm_mmu` | [`Mmu`] |
//! | `root_mmu`, `tdp12_mmu` | [`VcpuMmus::root_mmu`] and [`VcpuMmus::tdp12_mmu`], each an [`Mmu`] with a TLB tag of its own |
//! | `cpu_role`, `root_role` (KVM) | [`CpuRole`], [`RootRole`]; `kvm_mmu_page_role` is [`PageRole`] |
//! | `mmu` (pointer to one of them) | [`VcpuMmus::mmu`], which chooses by an enum, [`Running`]: no pointer into oneself |
//! | `struct kvm_paging_context` | [`PagingContext`]`<In, Out>` |
//! | `root_walk`, `walk01` | one type and one value, `PagingContext<Gva, Gpa>`: they never differ |
//! | `walk12` | `PagingContext<Gva, NGpa>`, reading entries through [`NestedTables`] |
//! | (the walk of EPT12/NPT12) `tdp12_walk` | `PagingContext<NGpa, Gpa>`, of a [`Tdp12`]: L1's nested paging as VM entry found it |
//! | `walk` (pointer to one of them) | [`VcpuMmus::walk`], an enum: the stages are types |
//! | `prev_roots`, `pae_root`, `pml4_root`, `pml5_root` (KVM) | one cache of roots of every kind, found by [`RootKey`] |
//! | `nested_mmu`, `walk_mmu` | do not exist |
//! | `shadow_zero_check` | [`EntryFormat::shadow_zero_check`]: of a format value, so per kind; no vCPU |
//! | `kvm_mmu_reset_context` | does not exist: registers, SMM and CPUID are in the key, so a change finds another root, or takes one |
//! | `KVM_REQ_TLB_FLUSH_GUEST`, `_CURRENT`, `KVM_REQ_MMU_SYNC` | [`Requests`], which each event returns, and [`Mmu::carry_out`] |
#![cfg_attr(not(any(test, mutants)), no_std)]
#![deny(unsafe_code)]

mod access;
mod addr;
mod cpu;
mod format;
mod kind;
mod level;
mod memory;
mod mutant;
mod nested;
mod role;
mod sync;
mod tables;
mod vcpu;
mod walk;

pub use access::{Access, AccessKind, Agent, Prot};
pub use addr::{
    Address, Gfn, GfnRange, Gpa, Gva, Hpa, NGpa, Ngfn, NonCanonical, Pfn, Stage, TooWide, VaWidth,
    MAX_PHYSICAL_BITS, PAGE_SHIFT, PAGE_SIZE,
};
pub use cpu::{CpuId, CpuSet, MAX_CPUS};
pub use format::{
    Entry, EntryFormat, Ept, EptHost, Leaf, MemoryType, Mmio, MmioGeneration, Npt, NptHost, Pae, PaeHost,
    Writability,
};
pub use kind::{
    Beside, Direct, DirectMmu, DirectRole, FaultOutcome, Flush, Issued, MmuKind, NearFault, NoRoot,
    NoShadowRoot, PageCounts, PopulateProgress, Resolution, Root, Shadow, ShadowBucket, ShadowCheck,
    ShadowDone, ShadowFault, ShadowMmu, ShadowPage, ShadowStore, SplitProgress, Sweep, WalkMarks,
    ZapProgress, MAX_ROOTS,
};
pub use level::{Level, PageSize, ENTRIES};
pub use memory::{
    Backing, DirtyLog, Exclusive, Generation, Held, Invalidation, InvalidationSeq, LogBy, NoPage, NotRam,
    RamAddr, Resolved, Shared, Shootdown, Slot, SlotError, SlotFlags, SlotNotes, Space, SpaceGfn, SpaceView,
    Spaces, VmMemory, MAX_SLOTS,
};
#[cfg(mutants)]
pub use mutant::{MutantInfo, MUTANTS, VARIABLE};
pub use nested::{
    BadNestedRoot, Invvpid, L2Exit, L2Fault, L2Request, L2Tag, L2Walk, Roots, TableAddress, Tdp12, TlbControl,
};
pub use role::{
    BadEptPointer, BaseRole, Caching, CpuRole, Cr0, Cr4, Efer, GuestCpu, GuestEpt, PageRole, PagingMode,
    PagingRegs, PatTypes, RoleFlags, RootRole, VcpuMode,
};
pub use tables::{
    EntryCell, FaultStats, HwEntry, PhysTables, TableCache, TableFrame, TableMemory, TablePage,
};
pub use vcpu::{
    BadInvpcid, Entered, GuestTag, Invpcid, Mmu, PagingState, Requests, RootKey, RootSet, Running, Sync,
    TagFlush, Tags, VcpuMmus, Walk,
};
pub use walk::{
    BelowError, Cause, EptExit, EptViolation, FaultInfo, GuestWalk, Linear, LogFull, MarkObserver,
    NestedTables, NestedWalk, NpfInfo, Observed, PageFaultCode, PagingContext, PdpteError, Place,
    TableSource, Translation, Update, WalkError, WalkRegs, WalkStep,
};
