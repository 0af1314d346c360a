//! Fuzz targets of the `mmu` crate: each is a function of bytes that panics at a find. `cargo xtask fuzz` runs them; finds that
//! were kept (`finds/TARGET/`) are run again by every `cargo test`.
//!
//! A target compares the crate with the reference models of its own tests, which are included from there.
#![allow(clippy::duplicate_mod)] // Each test that is included brings its support along.

mod guest;
mod input;

/// What the crate's tests share, for the targets that need no more.
#[path = "../../tests/support/mod.rs"]
mod support;

/// A fuzz target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its file.
    pub name: &'static str,
    /// Runs it on one input.
    pub run: fn(&[u8]),
}

/// Declares the targets: each a file in `targets/` with a function `run`.
macro_rules! targets {
    ($($name:ident)*) => {
        mod targets {
            $(pub(crate) mod $name;)*
        }
        /// All targets.
        pub const TARGETS: &[Target] =
            &[$(Target { name: stringify!($name), run: targets::$name::run }),*];
    };
}

targets! { direct_ops ept_walk nested_ops nested_walk shadow_ops walk }

/// The target called `name`.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().copied().find(|target| target.name == name)
}
