//! The bugs that another hypervisor's MMU has had, and what keeps each out of this one: a test with the bug's name, which
//! fails on a mutant that has the bug (`src/mutant`, `cargo xtask test --mutants`); a type; or that there is nothing here
//! that could have it. This checks that the tests and the mutants are there.
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

enum Kept {
    /// A test with this in its name, and a mutant whose name begins with it.
    Caught,
    /// The types: the crate's documentation has an example that does not compile.
    Excluded(&'static str),
    /// It does not apply.
    Absent(&'static str),
}
use Kept::{Absent, Caught, Excluded};

/// By what each is known, and what went wrong.
const BUGS: &[(&str, &str, Kept)] = &[
    ("cve_2021_38198", "a shared table was shadowed with the rights of the wrong levels", Caught),
    ("cve_2022_1789", "INVPCID without paging called a hook that was not there", Caught),
    (
        "cve_2022_45869",
        "a fault under the read lock recycled shadow pages",
        Excluded("E0308: what takes pages away asks for the exclusive guard"),
    ),
    ("cve_2022_1158", "accessed bits were written to memory that had been freed", Caught),
    ("cve_2021_22543", "memory without a count of its users was mapped after it was freed", Caught),
    ("cve_2017_12188", "the level of a nested walk went beyond its array", Caught),
    ("cve_2018_12207", "fetches from a huge page that changes its size stop the machine", Caught),
    ("cve_2018_3620", "entries that are not present named memory (L1TF; also CVE-2018-3646)", Caught),
    ("cve_2024_26991", "counts of a range that straddles its slot were looked up outside", Caught),
    ("commit_ef057cbf825e", "the largest size was asked for a block outside the slot", Caught),
    ("cve_2026_23401", "an entry for device memory was put over a page", Caught),
    ("cve_2026_23402", "a guest could change the frame behind a leaf and be taken for a bug", Caught),
    ("cve_2026_46113", "a link was followed to the shadow of another table", Caught),
    ("cve_2026_53359", "a link was followed to a shadow of another role", Caught),
    (
        "invalid_child",
        "a child inherited that its parent was dying",
        Absent("a role has no such bit: a dying page has no role at all"),
    ),
    ("commit_0f38453cdb2e", "a page was tracked in one address space of two", Caught),
    (
        "cve_2026_46131",
        "a flush of Hyper-V's interface used a nested translation that L2 has not (also 464af6fc2b1d)",
        Absent("Umbra does not offer Hyper-V's interface"),
    ),
    ("cve_2026_46032", "a root of L1 that cannot be read was not noticed on the way out of L2", Caught),
    ("commit_d0164c161923", "an EPT violation did not say that the linear address is the final one", Caught),
    ("nested_fault_provenance", "a nested fault always said that the address is the final one", Caught),
    ("commit_65855ed8b034", "an unsync table was linked to a new parent and not synced", Caught),
    ("commit_d28c6cfbbc5e", "huge entries with different rights shared a shadow", Caught),
    ("commit_5fd5387c89ec", "huge entries, clean and dirty, shared a shadow", Caught),
    ("commit_3ddf6c06e13e", "a prefetched entry gave a wrong error code", Caught),
    ("commit_e09e90a5", "small pages in the place of a huge one were wrong", Caught),
    ("commit_f7d9c7b7b902", "an entry that had changed before its table was tracked was shadowed", Caught),
    ("e5_a_dirty_bit", "an update that was no exchange lost what the processor had set", Caught),
    ("commit_0780516a18f8", "the exit qualification had the rights in another order", Caught),
    ("commit_d95c55687e11", "an entry of EPT for fetches alone could be read", Caught),
    ("commit_5f0b819995e1", "NX of a shadow was taken for reserved", Caught),
    ("commit_6c6ab524cfae", "NX of nested tables was taken for reserved", Caught),
    ("toggled_cr0_wp", "a walk of the emulator did not see that the guest had changed CR0.WP", Caught),
    ("pcide_toggle", "roots of before were used after CR4.PCIDE was set", Caught),
    ("commit_4346db6e6e7a", "registers set from outside did not flush", Caught),
    ("stale_guest_flush", "roots that are not current missed a flush", Caught),
    ("commit_03a6e84069d1", "INIT left the role of before", Caught),
    ("commit_ee6268ba3a68", "nested tables of a 32-bit L1 had no root", Caught),
    ("clear_dirty_l2", "what L2 wrote was not logged by the processor", Caught),
    ("cve_2023_30456", "long mode was entered without PAE", Caught),
    ("cve_2022_39189", "a vCPU that was not running missed a flush", Caught),
    ("misaligned_writes", "an emulated write over two entries was taken for one", Caught),
];

fn read(folder: &Path, into: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push_str(&fs::read_to_string(path).unwrap());
        }
    }
}

/// What lines begin with, after `fn`: the names of all tests are among it, those that a macro makes as well.
fn functions() -> HashSet<String> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut text = String::new();
    read(&root.join("src"), &mut text);
    read(&root.join("tests"), &mut text);
    let name = |line: &str| {
        let line = line.trim_start();
        let rest = line.strip_prefix("fn ").unwrap_or(line);
        rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default().to_owned()
    };
    text.lines().map(name).collect()
}

/// The names of mutants that bring a bug back, up to the dot.
fn mutants() -> HashSet<String> {
    let text =
        fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/mutant/list.rs")).unwrap();
    let bugs = text.split("\n    bugs {").nth(1).unwrap().split("\n    }").next().unwrap();
    let names = bugs.lines().filter_map(|line| line.trim().split('"').nth(1));
    names.map(|name| name.split('.').next().unwrap().to_owned()).collect()
}

#[test]
fn every_bug_of_old_has_a_test_and_a_mutant() {
    let (functions, mutants) = (functions(), mutants());
    let documentation =
        fs::read_to_string(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let mut missing = vec![];
    for (name, what, kept) in BUGS {
        let known_by = name.strip_prefix("commit_").unwrap_or(name);
        let tested = functions.iter().any(|function| function.contains(known_by));
        match kept {
            Caught if !tested => missing.push(format!("{name} ({what}): no test")),
            Caught if !mutants.contains(*name) => missing.push(format!("{name} ({what}): no mutant")),
            Caught => {}
            Excluded(_) if !documentation.contains(&name.replace('_', "-").to_uppercase()) => {
                missing.push(format!("{name} ({what}): no example"));
            }
            Excluded(why) | Absent(why) => assert!(!why.is_empty() && !mutants.contains(*name)),
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn every_mutant_of_a_bug_is_in_the_table() {
    let known: HashSet<&str> = BUGS.iter().map(|(name, ..)| *name).collect();
    assert_eq!(known.len(), BUGS.len(), "twice");
    for mutant in mutants() {
        assert!(known.contains(mutant.as_str()), "{mutant}");
    }
}
