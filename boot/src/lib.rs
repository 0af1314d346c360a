//! How Umbra is entered and configured: entry stubs, the boot bundle, the schema of umbra.toml.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
