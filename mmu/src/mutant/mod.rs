//! Mutants: slips of a kind that has been made before, each at one place, which the tests must notice.
//!
//! In a build with `--cfg mutants` the variable [`VARIABLE`] names the one that a process is to have; in any other build
//! there are none, and no trace of them. `cargo xtask test --mutants` lets every mutant meet the tests.
//!
//! Some bring back a bug that another hypervisor had. Their names begin with what the bug is known by (a CVE, a commit), up to
//! a dot, and a test with that in its name must catch them; `tests/past_bugs.rs` has the table. The others say which tests are
//! likely to catch them, and any may.

/// Declares mutants: `Variant = "name" by ["part of a test's name", ...];`, and bugs of old: `Variant = "row.more";`.
macro_rules! mutants {
    (
        flushes { $($(#[$flush_doc:meta])* $site:ident = $flush:literal by [$($flush_test:literal),* $(,)?];)* }
        bugs { $($(#[$bug_doc:meta])* $bug:ident = $row:literal;)* }
        slips { $($(#[$slip_doc:meta])* $mutant:ident = $slip:literal by [$($slip_test:literal),* $(,)?];)* }
    ) => {
        /// A place where something is taken away that a TLB may have: the flush that it asks for can be dropped there.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum FlushSite {
            $($(#[$flush_doc])* $site,)*
        }

        /// A slip.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Mutant {
            $($(#[$bug_doc])* $bug,)*
            $($(#[$slip_doc])* $mutant,)*
        }

        /// Every mutant, flushes first.
        #[cfg(mutants)]
        pub const MUTANTS: &[super::MutantInfo] = &[
            $(super::MutantInfo { name: $flush, by: &[$($flush_test),*], row: false },)*
            $(super::MutantInfo { name: $row, by: &[], row: true },)*
            $(super::MutantInfo { name: $slip, by: &[$($slip_test),*], row: false },)*
        ];

        #[cfg(mutants)]
        pub(super) const FLUSHES: usize = [$(FlushSite::$site),*].len();
    };
}

mod list;

#[cfg(mutants)]
use list::FLUSHES;
#[cfg(mutants)]
pub use list::MUTANTS;
pub(crate) use list::{FlushSite, Mutant};

/// What the outside knows of a mutant.
#[cfg(mutants)]
#[derive(Clone, Copy, Debug)]
pub struct MutantInfo {
    /// Its name.
    pub name: &'static str,
    /// Parts of the names of tests that are likely to catch it.
    pub by: &'static [&'static str],
    /// It brings a bug of old back: up to a dot, the name is that of the row.
    pub row: bool,
}

/// Names the mutant that a process has; none, if it is not set.
#[cfg(mutants)]
pub const VARIABLE: &str = "MMU_MUTANT";

/// Whether this process has `mutant`.
#[cfg(not(mutants))]
#[inline(always)]
pub(crate) const fn is(mutant: Mutant) -> bool {
    let _ = mutant;
    false
}

/// Whether this process has the mutant that drops the flush of `site`.
#[cfg(not(mutants))]
#[inline(always)]
pub(crate) const fn drops(site: FlushSite) -> bool {
    let _ = site;
    false
}

/// Whether this process has `mutant`.
#[cfg(mutants)]
pub(crate) fn is(mutant: Mutant) -> bool {
    chosen() == Some(FLUSHES + mutant as usize)
}

/// Whether this process has the mutant that drops the flush of `site`.
#[cfg(mutants)]
pub(crate) fn drops(site: FlushSite) -> bool {
    chosen() == Some(site as usize)
}

/// The place in [`MUTANTS`] of the one that this process has.
#[cfg(mutants)]
fn chosen() -> Option<usize> {
    static CHOSEN: std::sync::OnceLock<Option<usize>> = std::sync::OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let name = std::env::var(VARIABLE).ok().filter(|name| !name.is_empty())?;
        let place = MUTANTS.iter().position(|mutant| mutant.name == name);
        Some(place.unwrap_or_else(|| panic!("no mutant `{name}`")))
    })
}
