//! The Umbra hypervisor: everything above the entry stubs. Modules that need privileged instructions exist only
//! on the bare-metal target; the rest is also built and tested on the host.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod devices;
pub mod mm;
pub mod vm;
