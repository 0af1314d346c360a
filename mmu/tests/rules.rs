//! Rules about the crate itself: where unsafe code may be, and what it may depend on.
use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

fn manifest() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn exactly_one_module_has_unsafe_code() {
    let mut all = vec![];
    sources(&manifest().join("src"), &mut all);
    assert!(all.len() > 20, "the sources were found");
    let with_unsafe: Vec<_> = all
        .iter()
        .filter(|path| {
            let text = fs::read_to_string(path).unwrap();
            let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
            code.into_iter().any(|line| {
                line.contains("allow(unsafe_code)")
                    || line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == "unsafe")
            })
        })
        .map(|path| path.strip_prefix(manifest()).unwrap().to_path_buf())
        .collect();
    assert_eq!(with_unsafe, [PathBuf::from("src/tables/phys.rs")]);
    let root = fs::read_to_string(manifest().join("src/lib.rs")).unwrap();
    assert!(root.contains("#![deny(unsafe_code)]"));
}

#[test]
fn the_only_dependency_is_bitflags() {
    let text = fs::read_to_string(manifest().join("Cargo.toml")).unwrap();
    let mut section = "";
    let mut dependencies = vec![];
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if line.starts_with('[') {
            section = line;
            // Neither target-specific nor inline tables: a dependency is one line of one section. The models of
            // `tests/loom.rs` bring the checker, and only to themselves.
            let models = line == "[target.'cfg(loom)'.dev-dependencies]";
            assert!(models || !line.contains("dependencies.") && !line.contains("target."), "{line}");
        } else if section == "[dependencies]" || section == "[build-dependencies]" {
            dependencies.push(line.split(['=', '.', ' ']).next().unwrap());
        }
    }
    assert_eq!(dependencies, ["bitflags"]);
}
