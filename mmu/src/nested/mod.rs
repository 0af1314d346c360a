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
//! A TLB holds nothing that the shadow has not said since the last flush of its tag. So an event of L1 that invalidates
//! translations of its nested tables (INVEPT, or on SVM any flush of an ASID) *syncs* the roots it names, and the sync itself
//! requests a flush if it took anything away. An event about linear addresses (INVVPID, and on SVM the same flushes) is the
//! processor's matter, on the tag that L2 runs with.
mod events;
mod fault;
mod tables;

pub use events::{Invvpid, L2Request, L2Tag, Roots, TlbControl};
pub use fault::{L2Exit, L2Fault, L2Walk};
pub use tables::{BadNestedRoot, TableAddress, Tdp12};
