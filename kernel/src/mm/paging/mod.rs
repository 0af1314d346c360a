//! Umbra's own page tables. See the submodules for the pure parts.

pub mod audit;
pub mod entry;
pub mod table;
