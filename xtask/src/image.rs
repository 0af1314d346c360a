//! Bootable images: a hybrid ISO that starts on BIOS and UEFI, from CD, disk or USB, with GRUB.

use std::fs;
use std::path::Path;

use anyhow::{bail, Context, Result};

use crate::exec::{find_program, CommandLine};

/// GRUB talks on the serial line where there is one, and starts Umbra at once.
const GRUB_CFG: &str = "\
if serial --unit=0 --speed=115200; then
    terminal_input serial console
    terminal_output serial console
fi
set timeout=0
set default=0
menuentry \"Umbra\" {
    multiboot2 /boot/umbra
    module2 /boot/bundle.cpio
}
";

/// GRUB's image maker, by the names that distributions give it.
pub fn grub_mkrescue() -> Option<&'static str> {
    ["grub-mkrescue", "grub2-mkrescue"].into_iter().find(|name| find_program(name).is_some())
}

/// Writes a hybrid ISO with `umbra` and the archive `bundle` to `iso`, using the folder `work`, which is emptied first.
pub fn write_iso(umbra: &Path, bundle: &Path, work: &Path, iso: &Path) -> Result<()> {
    let Some(mkrescue) = grub_mkrescue() else {
        bail!("grub-mkrescue is not installed; `cargo xtask setup` installs it");
    };
    if work.exists() {
        fs::remove_dir_all(work).with_context(|| format!("cannot empty {}", work.display()))?;
    }
    let boot = work.join("boot");
    fs::create_dir_all(boot.join("grub")).with_context(|| format!("cannot create {}", boot.display()))?;
    fs::write(boot.join("grub/grub.cfg"), GRUB_CFG)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_menu_loads_what_the_image_holds() {
        for line in ["multiboot2 /boot/umbra\n", "module2 /boot/bundle.cpio\n", "set timeout=0\n"] {
            assert!(GRUB_CFG.contains(line), "{line}");
        }
    }
}
