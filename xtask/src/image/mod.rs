//! Bootable images: a hybrid ISO that starts on BIOS and UEFI, from CD, disk or USB, with GRUB.

mod iso;

use std::fs;
use std::path::PathBuf;

use anyhow::{bail, Context, Result};

pub use iso::write_iso;

use crate::bundle::{self, Bundle};
use crate::guest::description::{self, Request};
use crate::setup::{self, Component};
use crate::{build, paths, say};

/// The command line of `image`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The image's virtual machines: an umbra.toml, or a bundle made before [default: the guest that `run` boots]
    #[arg(long, value_name = "FILE")]
    pub bundle: Option<PathBuf>,
    /// Add SHA256SUMS, a manifest of all files, which Umbra verifies at boot, to the bundle (one made before stays as it
    /// is)
    #[arg(long)]
    pub manifest: bool,
    /// Where the image goes [default: target/umbra.iso]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Builds Umbra and writes a bootable image, and says what is in it; its path.
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
    let archive = if options.manifest { bundle.with_manifest() } else { bundle }.archive()?;
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let archive_file = dir.join("bundle.cpio");
    fs::write(&archive_file, &archive).with_context(|| format!("cannot write {}", archive_file.display()))?;
    say!("writing the image");
    write_iso(&images.umbra, &archive_file, "", &dir.join("iso"), &iso)?;

    say!("the image holds");
    let read = |path| fs::read(path).with_context(|| format!("cannot read {}", paths::display(path)));
    say!("{}", bundle::file_line("/boot/umbra", &read(&images.umbra)?));
    bundle::list("/boot/bundle.cpio", &archive, |line| say!("{line}"))?;
    say!("it starts from CD, disk or USB, on BIOS and UEFI:");
    say!("{}", bundle::file_line(&paths::display(&iso), &read(&iso)?));
    Ok(iso)
}
