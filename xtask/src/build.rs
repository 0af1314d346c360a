//! Builds Umbra and the test guests for the bare-metal target.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

use crate::elf32;
use crate::toolchain::{self, Compiler};
use crate::{paths, say};

/// Where the built images are.
#[derive(Clone, Debug)]
pub struct Images {
    /// Umbra itself: an ELF64 file with a PVH note and a Multiboot2 header.
    pub umbra: PathBuf,
    /// The folder of the test guests, `NAME.elf` each, Multiboot 1 kernels in ELF32.
    pub guests: PathBuf,
}

impl Images {
    /// The places of the images, whether they have been built or not.
    pub fn places() -> Self {
        let target = paths::target_dir();
        Self {
            umbra: target.join(toolchain::BARE_METAL).join("release/umbra"),
            guests: target.join("guests"),
        }
    }

    /// The test guest `name`.
    pub fn guest(&self, name: &str) -> PathBuf {
        self.guests.join(name).with_extension("elf")
    }
}

/// Builds everything that runs without an operating system.
pub fn build(compiler: Compiler) -> Result<Images> {
    say!("building Umbra and the test guests with {}", compiler.describe());
    compiler.cargo("build").args(["--release", "-p", "kernel", "-p", "guests"]).run_on_stderr()?;
    let images = Images::places();
    if !images.umbra.is_file() {
        bail!("the build ended well but left no {}", images.umbra.display());
    }
    fs::create_dir_all(&images.guests)
        .with_context(|| format!("cannot create {}", images.guests.display()))?;
    for name in guest_names(&paths::workspace_root().join("tests/guests/src/bin"))? {
        let elf64 = images.umbra.with_file_name(&name);
        let elf32 = images.guest(&name);
        elf32::convert(&elf64, &elf32)
            .with_context(|| format!("cannot make the Multiboot file of the test guest `{name}`"))?;
    }
    Ok(images)
}

/// The test guests are the binaries of the crate `guests`.
fn guest_names(bins: &Path) -> Result<Vec<String>> {
    let entries = bins.read_dir().with_context(|| format!("cannot list {}", bins.display()))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            match name.strip_suffix(".rs") {
                Some(name) => Some(name.to_owned()),
                None => entry.path().join("main.rs").is_file().then_some(name),
            }
        })
        .collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_the_binaries_of_their_crate() {
        let dir = std::env::temp_dir().join(format!("umbra-bins-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        for folder in ["paging", "shared"] {
            fs::create_dir_all(dir.join(folder)).unwrap();
        }
        for file in ["mmio.rs", "cpuid.rs", "notes.txt", "paging/main.rs"] {
            fs::write(dir.join(file), "").unwrap();
        }
        assert_eq!(guest_names(&dir).unwrap(), ["cpuid", "mmio", "paging"]);
        fs::remove_dir_all(&dir).unwrap();
        assert!(guest_names(&dir).is_err());
    }
}
