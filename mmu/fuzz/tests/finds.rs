//! Inputs that once found something find nothing any more, and each target stands an input without a shape.
use std::fs;
use std::path::{Path, PathBuf};

use mmu_fuzz::TARGETS;

fn entries(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut all: Vec<_> =
        fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

fn names(folder: &str) -> Vec<String> {
    entries(folder).iter().map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn kept_finds_find_nothing() {
    for target in TARGETS {
        for path in entries(&format!("finds/{}", target.name)) {
            eprintln!("{}", path.display());
            (target.run)(&fs::read(path).unwrap());
        }
    }
}

#[test]
fn any_bytes_are_an_input() {
    for target in TARGETS {
        for byte in [0, 1, 0x67, 0xff] {
            for len in [0, 1, 100, 700] {
                (target.run)(&vec![byte; len]);
            }
        }
        let counting: Vec<u8> = (0..700u32).map(|n| ((n * n) >> 3) as u8).collect();
        (target.run)(&counting);
    }
}

#[test]
fn each_target_is_a_file_of_its_name() {
    let mut targets: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    targets.sort();
    assert_eq!(names("src/targets"), targets);
    for name in names("finds") {
        assert!(targets.contains(&name.as_str()), "finds of {name}");
    }
}
