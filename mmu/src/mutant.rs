//! Mutants: slips of a kind that has been made before, each at one place, which the tests must notice.
//!
//! In a build with `--cfg mutants` the variable [`VARIABLE`] names the one that a process is to have; in any other build
//! there are none, and no trace of them. `cargo xtask test --mutants` lets every mutant meet the tests.
//!
//! A name that begins with a row of the table of past bugs (`cve_2021_38198`, perhaps with more after a dot) must be caught
//! by a test that is named after the row; `tests/past_bugs.rs` has the table. The others say which tests are likely to catch
//! them, and any may.

/// Declares mutants: `Variant = "name" by ["part of a test's name", ...];`.
macro_rules! mutants {
    (
        flushes { $($(#[$flush_doc:meta])* $site:ident = $flush:literal by [$($flush_test:literal),* $(,)?];)* }
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
            $($(#[$slip_doc])* $mutant,)*
        }

        /// Every mutant, flushes first: its name, and parts of the names of tests that are likely to catch it.
        #[cfg(mutants)]
        pub const MUTANTS: &[(&str, &[&str])] = &[
            $(($flush, &[$($flush_test),*]),)*
            $(($slip, &[$($slip_test),*]),)*
        ];

        #[cfg(mutants)]
        const FLUSHES: usize = [$(FlushSite::$site),*].len();
    };
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
        let place = MUTANTS.iter().position(|&(known, _)| known == name);
        Some(place.unwrap_or_else(|| panic!("no mutant `{name}`")))
    })
}

mutants! {
    flushes {
        /// A leaf of the direct kind is zapped.
        Zap = "flush_zap" by ["c1_flush"];
        /// A leaf is write-protected.
        Protect = "flush_protect" by ["write_protection_is_lifted"];
        /// A page is tracked.
        Track = "flush_track" by ["tracked_pages"];
        /// A huge page goes because a page of it is tracked.
        TrackHuge = "flush_track_huge" by ["d4_tracked_pages"];
        /// D is taken from a leaf, for the processor to note the next write.
        RearmClean = "flush_rearm_clean" by ["h2_a_write_after_clearing"];
        /// W is taken from a leaf, for the next write to be logged.
        RearmProtect = "flush_rearm_protect" by ["h2_a_write_after_clearing"];
        /// D of a leaf moves to the log.
        Collect = "flush_collect" by ["h1_a_log_misses_no_write"];
        /// A fault takes away a leaf that disagrees with its slot.
        Disagreement = "flush_disagreement" by ["d8_a_leaf_that_disagrees"];
        /// All roots become obsolete.
        InvalidateAll = "flush_invalidate_all" by ["d7_invalidating_all"];
        /// A table is unlinked that was zapped, or made for the fetches from a huge page.
        Unlink = "flush_unlink" by ["c3_tables_come_back"];
        /// A table gives way to a huge page.
        Collapse = "flush_collapse" by ["b7_collapse_keeps"];
        /// The shadow kind takes a translation away.
        Shadow = "flush_shadow" by [];
        /// The shadow kind takes a table out.
        ShadowPage = "flush_shadow_page" by [];
    }
    slips {
    }
}
