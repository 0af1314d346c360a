//! The crate `mmu` depends on nothing but what is listed here: it runs, is tested and fuzzed anywhere.

use serde_json::Value;
use xtask::exec::CommandLine;
use xtask::paths;

/// What `mmu` may use.
const ALLOWED: [&str; 1] = ["bitflags"];
/// What its tests may use beside that.
const ALLOWED_IN_TESTS: [&str; 2] = ["loom", "proptest"];

/// The packages in `mmu`'s manifest, for any target and with any feature, and whether only tests use them.
fn dependencies() -> Vec<(String, bool)> {
    let text = CommandLine::new("cargo")
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .dir(paths::workspace_root())
        .read()
        .unwrap();
    let metadata: Value = serde_json::from_str(&text).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let mmu = packages.iter().find(|package| package["name"] == "mmu").unwrap();
    let name = |dependency: &Value| dependency["name"].as_str().unwrap().to_owned();
    let dependencies = mmu["dependencies"].as_array().unwrap();
    dependencies.iter().map(|dependency| (name(dependency), dependency["kind"] == "dev")).collect()
}

#[test]
fn mmu_uses_only_what_is_allowed() {
    let all = dependencies();
    // Otherwise this test looks at nothing.
    assert!(!all.is_empty());
    for (name, only_tests) in all {
        let allowed =
            ALLOWED.contains(&name.as_str()) || only_tests && ALLOWED_IN_TESTS.contains(&name.as_str());
        assert!(allowed, "mmu must not depend on {name}");
    }
}

#[test]
fn mmu_has_no_build_script_and_no_std() {
    let root = paths::workspace_root().join("mmu");
    assert!(!root.join("build.rs").exists());
    let source = std::fs::read_to_string(root.join("src/lib.rs")).unwrap();
    assert!(source.lines().any(|line| line.starts_with("#![") && line.contains("no_std")));
}
