//! Bootable images: every firmware starts one from every medium and gets to a guest's shell, and the same inputs always
//! make the same image.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use xtask::bundle::Bundle;
use xtask::emulator::{Boot, Machine, Medium};
use xtask::image::write_iso;
use xtask::paths;

use super::linux;
use crate::cases::Cases;
use crate::context::Ctx;
use crate::scenario::{Need, Scenario};

pub(super) fn all() -> Vec<Scenario> {
    let starts = [
        ("image_cd_bios", Boot::Iso, Medium::Cd),
        ("image_usb_bios", Boot::Iso, Medium::Usb),
        ("image_disk_bios", Boot::Iso, Medium::Disk),
        ("image_cd_uefi", Boot::Uefi, Medium::Cd),
        ("image_usb_uefi", Boot::Uefi, Medium::Usb),
        ("image_disk_uefi", Boot::Uefi, Medium::Disk),
    ];
    let starts = starts.into_iter().map(|(name, boot, medium)| {
        let needs: &[Need] = if boot == Boot::Uefi { &[Need::Uefi] } else { &[] };
        Scenario::new(name, move |ctx| linux::shell(ctx, &Machine { boot, medium, ..ctx.machine() }))
            .needs(&[Need::Linux, Need::Grub])
            .needs(needs)
            .limit(600)
    });
    starts
        .chain([
            Scenario::new("image_cut_short", cut_short).needs(&[Need::Grub]),
            Scenario::new("image_is_reproducible", reproducible).needs(&[Need::Grub]),
            Scenario::new("image_names_no_folder", |ctx| names_no_folder(&ctx.images.umbra)),
        ])
        .collect()
}

/// A stick on which the end of the bundle is missing: GRUB says so, and does not start what it has.
fn cut_short(ctx: &Ctx) -> Result<Cases> {
    let bundle = Bundle::new("").file("large", vec![0; 32 << 20]);
    let machine =
        Machine { boot: Boot::Iso, medium: Medium::Usb, image_bytes: Some(24 << 20), ..ctx.machine() };
    let mut vm = ctx.boot(&machine, &bundle)?;
    vm.expect("umbra: GRUB loads Umbra and its bundle")?;
    vm.expect("umbra: this medium cannot be read; write the image to it again")?;
    Ok(Cases::passed())
}

/// Two images made of the same files, in different folders and so long apart that every clock in them, FAT's of two
/// seconds included, would show it. A third, of other files, shows that there is something to compare.
fn reproducible(ctx: &Ctx) -> Result<Cases> {
    let make = |folder: &str, bundle: &str| -> Result<Vec<u8>> {
        let dir = ctx.dir.join(folder);
        fs::create_dir_all(&dir)?;
        let (umbra, archive, iso) = (dir.join("an-umbra"), dir.join("a-bundle"), dir.join("x.iso"));
        fs::write(&umbra, fs::read(&ctx.images.umbra)?)?;
        fs::write(&archive, bundle)?;
        write_iso(&umbra, &archive, "", &dir.join("work"), &iso)?;
        fs::read(&iso).context("the image cannot be read")
    };
    let first = make("one", "a bundle")?;
    thread::sleep(Duration::from_millis(2100));
    let second = make("another folder, farther/down", "a bundle")?;
    let differs = first.iter().zip(&second).position(|(one, other)| one != other);
    ensure!(differs.is_none(), "the images differ at byte {}", differs.unwrap_or_default());
    ensure!(first.len() == second.len(), "the images have {} and {} bytes", first.len(), second.len());
    ensure!(make("other", "other bundle")? != first, "images of different bundles are the same");
    Ok(Cases::passed())
}

/// What names a folder of this machine would come out different on another one.
fn names_no_folder(umbra: &Path) -> Result<Cases> {
    let bytes = fs::read(umbra)?;
    let mut folders = vec![paths::workspace_root().to_path_buf()];
    folders.extend(
        ["CARGO_HOME", "HOME"].iter().filter_map(|name| Some(Path::new(&std::env::var_os(name)?).into())),
    );
    for folder in folders.iter().filter(|folder| folder.components().count() > 1) {
        let inside = format!("{}/", folder.display());
        let found = bytes.windows(inside.len()).position(|window| window == inside.as_bytes());
        ensure!(found.is_none(), "{} names {inside} at byte {}", umbra.display(), found.unwrap_or_default());
    }
    // Paths there are, for reports of panics: of this project, and of the crates it is made of.
    for path in ["kernel/src/", "/cargo/registry/"] {
        ensure!(bytes.windows(path.len()).any(|window| window == path.as_bytes()), "no {path} is named");
    }
    Ok(Cases::passed())
}
