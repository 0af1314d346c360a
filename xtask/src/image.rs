//! Bootable images: a hybrid ISO that starts on BIOS and UEFI, from CD, disk or USB, with GRUB.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

use crate::bundle::Bundle;
use crate::exec::{find_program, CommandLine};
use crate::guest::description::{self, Request};
use crate::setup::{self, Component};
use crate::{build, grub, paths, say};

/// The command line of `image`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The umbra.toml of the image's virtual machines [default: the guest that `run` boots]
    #[arg(long, value_name = "FILE.toml")]
    pub bundle: Option<PathBuf>,
    /// Where the image goes [default: target/umbra.iso]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Builds Umbra and writes a bootable image; its path.
pub fn make(options: &Options) -> Result<PathBuf> {
    // Read before anything is built, so that a mistake in it is told at once.
    let given = options.bundle.as_deref().map(Bundle::load).transpose()?;
    let iso = options.output.clone().unwrap_or_else(|| paths::target_dir().join("umbra.iso"));
    if iso.is_dir() {
        bail!("{} is a folder; name a file for the image", paths::display(&iso));
    }
    let mut needed = vec![Component::Target, Component::Grub];
    if given.is_none() {
        needed.push(Component::Linux);
    }
    let ready = setup::ensure(&needed)?;
    let images = build::build(ready.compiler()?)?;
    let dir = paths::target_dir().join("image");
    let bundle = match given {
        Some(bundle) => bundle,
        None => description::write(&Request::default(), ready.linux.as_ref(), &dir.join("guest"))?,
    };
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let archive = dir.join("bundle.cpio");
    fs::write(&archive, bundle.archive()?).with_context(|| format!("cannot write {}", archive.display()))?;
    write_iso(&images.umbra, &archive, "", &dir.join("iso"), &iso)?;
    say!("the image starts from CD, disk or USB, on BIOS and UEFI");
    Ok(iso)
}

/// GRUB's image maker, by the names that distributions give it.
pub fn grub_mkrescue() -> Option<&'static str> {
    ["grub-mkrescue", "grub2-mkrescue"].into_iter().find(|name| find_program(name).is_some())
}

/// Writes a hybrid ISO with `umbra` and the archive `bundle` to `iso`, using the folder `work`, which is emptied first.
/// GRUB executes the command `first` before it loads them.
pub fn write_iso(umbra: &Path, bundle: &Path, first: &str, work: &Path, iso: &Path) -> Result<()> {
    let Some(mkrescue) = grub_mkrescue() else {
        bail!("grub-mkrescue is not installed; `cargo xtask setup` installs it");
    };
    if work.exists() {
        fs::remove_dir_all(work).with_context(|| format!("cannot empty {}", work.display()))?;
    }
    let boot = work.join("boot");
    fs::create_dir_all(boot.join("grub")).with_context(|| format!("cannot create {}", boot.display()))?;
    fs::write(boot.join("grub/grub.cfg"), grub::image_cfg(first))?;
    fs::copy(umbra, boot.join("umbra")).with_context(|| format!("cannot read {}", umbra.display()))?;
    fs::copy(bundle, boot.join("bundle.cpio"))
        .with_context(|| format!("cannot read {}", bundle.display()))?;
    // Written beside the image and renamed, so that a failure leaves no half an image.
    let unfinished = iso.with_extension("unfinished");
    CommandLine::new(mkrescue).arg("-o").arg(&unfinished).arg(work).run_quietly()?;
    fs::rename(&unfinished, iso).with_context(|| format!("cannot write {}", iso.display()))?;
    fs::remove_dir_all(work)?;
    Ok(())
}
