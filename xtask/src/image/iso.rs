//! The image itself: a file that a firmware takes for a CD and, written to a disk or a stick, for a disk with an EFI system
//! partition. The same inputs and the same programs give the same bytes, at any time and in any folder.
//!
//! What would differ is fixed: times are [`TIME`], and the numbers that tell disks apart come from a hash of what is
//! packed. By that hash GRUB finds its image again among others.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::exec::CommandLine;
use crate::grub;

/// The time that everything in an image bears, in seconds since 1970: the start of 2026. The variable of the same
/// meaning takes its place. https://reproducible-builds.org/specs/source-date-epoch
const TIME: &str = "1767225600";
const TIME_VARIABLE: &str = "SOURCE_DATE_EPOCH";
/// The partition type of an EFI system partition. UEFI specification 2.10, 5.3.3.
const EFI_SYSTEM_PARTITION: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";

/// Writes a hybrid ISO with `umbra` and the archive `bundle` to `iso`, using the folder `work`, which is emptied first.
/// GRUB executes the command `first` before it loads them.
pub fn write_iso(umbra: &Path, bundle: &Path, first: &str, work: &Path, iso: &Path) -> Result<()> {
    let time = time()?;
    if work.exists() {
        fs::remove_dir_all(work).with_context(|| format!("cannot empty {}", work.display()))?;
    }
    let tree = work.join("tree");
    let grub_dir = tree.join("boot/grub");
    fs::create_dir_all(&grub_dir).with_context(|| format!("cannot create {}", grub_dir.display()))?;
    let config = grub::image_cfg(first);
    fs::write(grub_dir.join("grub.cfg"), &config)?;
    let mut hash = Sha256::new_with_prefix(&config);
    for (from, name) in [(umbra, "umbra"), (bundle, "bundle.cpio")] {
        let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes);
        fs::write(tree.join("boot").join(name), &bytes)?;
    }
    let identity = Identity::new(hash.finalize().into());
    fs::write(tree.join(identity.marker()), "")?;

    let early = grub::find_image_cfg(&format!("/{}", identity.marker()));
    let core =
        |platform, more, output: &Path| grub::make_core(platform, (&early, "/boot/grub"), more, output);
    core(("i386-pc", "i386-pc-eltorito"), &["biosdisk"], &grub_dir.join("bios.img"))?;
    core(("x86_64-efi", "x86_64-efi"), &[], &work.join("bootx64.efi"))?;
    write_efi_partition(work, &time, &identity)?;

    // Written beside the image and renamed, so that a failure leaves no half an image.
    let unfinished = iso.with_extension("unfinished");
    xorriso(&time, &identity)?
        .arg("-o")
        .arg(std::path::absolute(&unfinished)?)
        .arg("tree")
        .dir(work)
        .run_quietly()?;
    fs::rename(&unfinished, iso).with_context(|| format!("cannot write {}", iso.display()))?;
    fs::remove_dir_all(work)?;
    Ok(())
}

/// `efi.img` in the folder `work`: a FAT file system, in the size of a floppy, with the loader that a UEFI firmware looks
/// for on removable media. UEFI specification 2.10, 3.5.1.1.
fn write_efi_partition(work: &Path, time: &str, identity: &Identity) -> Result<()> {
    let tool = |program: &str| reproducible(program, time).args(["-i", "efi.img"]).dir(work);
    tool("mformat").args(["-C", "-f", "2880", "-N", &identity.serial(), "::"]).run_quietly()?;
    tool("mmd").args(["::EFI", "::EFI/BOOT"]).run_quietly()?;
    tool("mcopy").args(["bootx64.efi", "::EFI/BOOT/BOOTX64.EFI"]).run_quietly()
}

/// xorriso's command line but for input and output. El Torito has an entry for each firmware. The first sectors are an
/// MBR whose code starts GRUB on a BIOS, an MBR partition table with one active entry, without which some of them take no
/// disk for bootable, and a GPT with the EFI system partition, which lies behind the ISO file system.
fn xorriso(time: &str, identity: &Identity) -> Result<CommandLine> {
    let mbr = grub::platform_folder("i386-pc")?.join("boot_hybrid.img");
    // Level 3 lets a bundle be larger than 4 GiB; Rock Ridge keeps names as they are, and owners out.
    Ok(reproducible("xorriso", time)
        .args(["-no_rc", "-as", "mkisofs", "-quiet", "-iso-level", "3", "-r", "-V", "UMBRA"])
        .args(["--gpt_disk_guid", &identity.guid(), "--set_all_file_dates", &format!("={time}")])
        .args(["-b", "boot/grub/bios.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"])
        .arg("--grub2-boot-info")
        .arg("--grub2-mbr")
        .arg(mbr)
        .args(["--mbr-force-bootable", "-partition_offset", "16"])
        .args(["-append_partition", "2", EFI_SYSTEM_PARTITION, "efi.img", "-appended_part_as_gpt"])
        // What GRUB needs to say anything comes first, as in a copy that broke off.
        .args(["--sort-weight", "0", "/", "--sort-weight", "1", "/boot/grub"])
        .args(["-eltorito-alt-boot", "-e", "--interval:appended_partition_2:all::", "-no-emul-boot"]))
}

/// A program that takes its time from the variable, in no time zone, and no settings from the user's own folder.
fn reproducible(program: &str, time: &str) -> CommandLine {
    CommandLine::new(program).env(TIME_VARIABLE, time).env("TZ", "UTC").env("HOME", ".")
}

fn time() -> Result<String> {
    match std::env::var_os(TIME_VARIABLE) {
        Some(time) => checked_time(&time.to_string_lossy()),
        None => Ok(TIME.into()),
    }
}

/// FAT knows no time before 1980 and the programs none far ahead; what they would do with others is their affair.
fn checked_time(text: &str) -> Result<String> {
    let seconds = text.parse::<u64>().ok().filter(|seconds| (315_532_800..4_102_444_800).contains(seconds));
    let seconds = seconds.with_context(|| {
        format!(
            "{TIME_VARIABLE} = {text:?} is not a time in seconds since 1970, from 1980 to 2099; unset it or write one, \
             such as {TIME}"
        )
    })?;
    Ok(seconds.to_string())
}

/// The numbers that tell an image from others: all from the hash of what it holds.
struct Identity {
    hash: [u8; 32],
}

impl Identity {
    fn new(hash: [u8; 32]) -> Self {
        Self { hash }
    }

    /// The file by which GRUB knows its image.
    fn marker(&self) -> String {
        format!("boot/grub/{}.id", hex(&self.hash[..8]))
    }

    /// The serial number of a FAT file system.
    fn serial(&self) -> String {
        hex(&self.hash[8..12])
    }

    /// A GUID of version 8, whose bits but for version and variant are anyone's choice. RFC 9562, 5.8.
    fn guid(&self) -> String {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.hash[16..]);
        bytes[6] = bytes[6] & 0x0f | 0x80;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        hex(&bytes)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_of_the_hash() {
        let hash = std::array::from_fn(|index| index as u8);
        let identity = Identity::new(hash);
        assert_eq!(identity.marker(), "boot/grub/0001020304050607.id");
        assert_eq!(identity.serial(), "08090a0b");
        assert_eq!(identity.guid(), "101112131415861798191a1b1c1d1e1f");
        assert_eq!(&Identity::new([0xff; 32]).guid()[12..17], "8fffb");
    }

    #[test]
    fn times_are_seconds() {
        assert_eq!(checked_time(TIME).unwrap(), TIME);
        for text in ["", "yesterday", "-1", "0", "99999999999", "2026-01-01"] {
            let error = checked_time(text).unwrap_err().to_string();
            assert!(error.starts_with(&format!("SOURCE_DATE_EPOCH = {text:?} is not")), "{error}");
        }
    }
}
