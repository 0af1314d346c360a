//! `bundle`: builds one, or lists one.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

use super::{is_archive, list, read, Bundle};
use crate::{paths, say};

/// The command line of `bundle`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The umbra.toml that describes the virtual machines (the files it names are looked for beside it)
    #[arg(value_name = "FILE.toml", required_unless_present = "list")]
    pub config: Option<PathBuf>,
    /// Where the bundle goes [default: target/bundle.cpio]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Add SHA256SUMS, a manifest of all files, which Umbra verifies at boot
    #[arg(long)]
    pub manifest: bool,
    /// Say what is in this bundle and whether Umbra will take it (status 1 if not)
    #[arg(long, value_name = "BUNDLE", conflicts_with_all = ["config", "output", "manifest"])]
    pub list: Option<PathBuf>,
}

/// Builds a bundle and prints its path, or prints what is in one.
pub fn bundle(options: &Options) -> Result<()> {
    match (&options.list, &options.config) {
        (Some(path), _) => {
            let bytes = read(path)?;
            list(&paths::display(path), &bytes, |line| println!("{line}"))
        }
        (None, Some(config)) => {
            let output = options.output.clone().unwrap_or_else(|| paths::target_dir().join("bundle.cpio"));
            build(config, &output, options.manifest)?;
            println!("{}", output.display());
            Ok(())
        }
        (None, None) => bail!("name an umbra.toml, or a bundle with --list"),
    }
}

fn build(config: &Path, output: &Path, manifest: bool) -> Result<()> {
    if is_archive(&read(config)?) {
        let shown = paths::display(config);
        bail!("{shown} is a bundle already; `cargo xtask bundle --list {shown}` says what is in it");
    }
    if output.is_dir() {
        bail!("{} is a folder; name a file for the bundle", paths::display(output));
    }
    let bundle = Bundle::load(config)?;
    let archive = if manifest { bundle.with_manifest() } else { bundle }.archive()?;
    if let Some(folder) = output.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", paths::display(folder)))?;
    }
    // Written beside it and renamed, so that a failure leaves no half a bundle.
    let unfinished = output.with_extension("unfinished");
    fs::write(&unfinished, &archive)
        .with_context(|| format!("cannot write {}", paths::display(&unfinished)))?;
    fs::rename(&unfinished, output).with_context(|| format!("cannot write {}", paths::display(output)))?;
    list(&paths::display(output), &archive, |line| say!("{line}"))
}
