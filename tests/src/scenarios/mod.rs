//! All scenarios, in the order in which they run: from the machine up to Linux.

mod bad_input;
mod boot;
mod consoles;
mod guests;
mod image;
mod linux;
mod paging_digest;
mod pxe;
mod refused_entries;
mod unusual;

use crate::scenario::Scenario;

/// The registry.
pub(crate) fn all() -> Vec<Scenario> {
    let folders = [
        boot::all(),
        consoles::all(),
        unusual::all(),
        bad_input::all(),
        guests::all(),
        paging_digest::all(),
        refused_entries::all(),
        image::all(),
        linux::all(),
        pxe::all(),
    ];
    folders.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_good_for_folders() {
        let all = super::all();
        let names: BTreeSet<_> = all.iter().map(|scenario| &scenario.name).collect();
        assert_eq!(names.len(), all.len());
        for name in names {
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{name}");
        }
    }
}
