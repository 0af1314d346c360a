//! How Umbra is entered and configured: entry stubs, the boot bundle, the schema of umbra.toml.
//!
//! Two boot protocols lead into one 32-bit stub (`entry`, bare metal only). [`multiboot2`] and [`pvh`] read what
//! the loader left into one [`handover::Handover`]; from it [`handover`] makes the `bootloader_api::BootInfo` that
//! the kernel sees, so the kernel never knows who loaded it.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

extern crate alloc;

pub mod bundle;
pub mod config;
#[cfg(target_os = "none")]
pub mod entry;
pub mod handover;
pub mod multiboot2;
pub mod pvh;
pub mod regions;
#[cfg(test)]
mod testing;
