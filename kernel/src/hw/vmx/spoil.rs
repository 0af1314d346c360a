//! A VMCS field that is made wrong on purpose, so that tests can see how a refused entry is reported.
//!
//! Tests find the symbol in a copy of Umbra's file and put an encoding and a value there. The file that is built and
//! shipped has zeros, and then nothing is spoilt.
#![allow(unsafe_code)] // A symbol that the linker must keep, and its volatile read.

use super::region::Region;
use core::ptr::addr_of;

/// Encoding of the field, zero for none, and the value that it gets before each vCPU's first entry.
#[used]
#[unsafe(no_mangle)]
static UMBRA_SPOILT_VMCS_FIELD: [u64; 2] = [0; 2];

/// Spoils the field that the file asks for.
pub(super) fn apply(region: &Region) {
    // SAFETY: a static of this crate. The read is volatile because the file may have been changed since it was linked.
    let [encoding, value] = unsafe { addr_of!(UMBRA_SPOILT_VMCS_FIELD).read_volatile() };
    if encoding != 0 {
        log::warn!("VMCS field {encoding:#x} is {value:#x} for a test");
        region.spoil(encoding as u32, value);
    }
}
