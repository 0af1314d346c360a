//! The same by other crates: what one would take from crates.io instead.
pub(crate) mod multiarch;
pub(crate) mod offset;
