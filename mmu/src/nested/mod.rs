//! L2 under nested paging: EPT12 over EPT01, NPT12 over NPT01.
//!
//! ```text
//! Tdp12    L1's nested paging for one run of L2: the sketch's tdp12_walk, and what a root is found by
//! L2Exit   what the processor says about an access of L2 that its second stage refused
//! L2Fault  what becomes of it: an exit that L1 gets, or a leaf
//! L2Tag    whose translations the TLB tag of L2 may hold; what each event asks for is an L2Request
//! ```
//!
//! L2 runs on a root of the shadow kind, which says what L1's tables and Umbra's slots permit together. An L2 without nested
//! paging runs on the direct kind: its tables, and those that L1 may shadow for it, are ordinary guest tables, and the
//! processor walks them by itself.
//!
//! # What L1 can be offered
//!
//! Rights are composed in entries that the processor reads, so L1 gets only what the host's entries can say:
//! [`GuestEpt::limited_to`]. Mode-based execute control, and guest mode execute trap of SVM, need the host's own control, on
//! for L2 exactly when L1 has it on.
//!
//! # What ends a translation
//!
//! An event of L1 that invalidates translations of its nested tables (INVEPT, or on SVM any flush of an ASID) *syncs* the
//! roots it names, and flushes the tag that L2 runs on them with. An event about linear addresses (INVVPID, and on SVM the
//! same flushes) is the processor's matter, on that tag. On VMX a flush of all that the tag holds is one of its guest-physical
//! translations, too, of every EPT pointer that the vCPU has run L2 with: these are tagged by the pointer's table alone.
mod events;
mod fault;
mod tables;

pub use events::{Invvpid, L2Request, L2Tag, Roots, TlbControl};
pub use fault::{L2Exit, L2Fault, L2Walk};
pub use tables::{BadNestedRoot, TableAddress, Tdp12};
