//! Linux in the cache, as a guest and as a hypervisor: Debian's cloud kernel, its modules of KVM and BusyBox, downloaded by
//! apt and unpacked without being installed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};

use super::apt::Apt;
use crate::exec::CommandLine;
use crate::guest::{KvmHost, Linux};
use crate::{paths, say};

/// A package without files that depends on the kernel of the day.
pub(super) const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";

const BUSYBOX_PACKAGE: &str = "busybox-static";

/// The files in the cache's folder.
const KERNEL: &str = "vmlinuz";
const BUSYBOX: &str = "busybox";
/// KVM on AMD and what it needs, in the order in which they are loaded.
const MODULES: [&str; 3] = ["irqbypass.ko", "kvm.ko", "kvm-amd.ko"];
/// `SHA256  NAME` lines, as `sha256sum -c` reads them, after a comment line with the packages.
const MANIFEST: &str = "SHA256SUMS";

/// The Linux guest in the cache, or why there is none.
pub(super) fn cached() -> Result<Linux, String> {
    cached_in(&folder().map_err(|error| error.to_string())?)
}

fn folder() -> Result<PathBuf> {
    Ok(paths::cache_dir()?.join("linux"))
}

/// Linux with KVM in the cache, or why there is none.
pub(super) fn cached_with_kvm() -> Result<KvmHost, String> {
    with_kvm_in(&folder().map_err(|error| error.to_string())?)
}

fn cached_in(folder: &Path) -> Result<Linux, String> {
    check(folder, &[KERNEL, BUSYBOX])?;
    Ok(Linux { kernel: folder.join(KERNEL), busybox: folder.join(BUSYBOX) })
}

fn with_kvm_in(folder: &Path) -> Result<KvmHost, String> {
    let linux = cached_in(folder)?;
    check(folder, &MODULES)?;
    Ok(KvmHost { linux, modules: MODULES.iter().map(|name| folder.join(name)).collect() })
}

/// Holds the files `names` in the folder against the manifest.
fn check(folder: &Path, names: &[&str]) -> Result<(), String> {
    let Ok(manifest) = fs::read_to_string(folder.join(MANIFEST)) else {
        return Err(format!("it is not in the cache ({})", folder.display()));
    };
    for name in names {
        let path = folder.join(name);
        let line =
            hash_line(&path, name).map_err(|_| format!("{} is missing from the cache", path.display()))?;
        if !manifest.lines().any(|known| known == line) {
            return Err(format!("{} is not the file that was downloaded", path.display()));
        }
    }
    Ok(())
}

fn hash_line(path: &Path, name: &str) -> Result<String> {
    let mut hash = Sha256::new();
    std::io::copy(&mut File::open(path)?, &mut hash)?;
    let digits: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{digits}  {name}"))
}

/// Downloads the packages and puts their files into the cache, all at once. The caller holds setup's lock.
pub(super) fn download(apt: &Apt) -> Result<()> {
    let folder = folder()?;
    let work = folder.with_file_name("linux.unfinished");
    if work.exists() {
        // Left by a setup that was killed; the lock says that it is nobody's.
        fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("cannot create {}", work.display()))?;
    let result = download_into(apt, &work).and_then(|()| {
        // What was there did not pass the check, or it would not be downloaded again.
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        fs::rename(work.join("done"), &folder).with_context(|| format!("cannot create {}", folder.display()))
    });
    // Whatever is left of the work is of no use to anybody.
    let _ = fs::remove_dir_all(&work);
    result
}

fn download_into(apt: &Apt, work: &Path) -> Result<()> {
    let kernel_package = apt
        .dependencies(KERNEL_METAPACKAGE)?
        .into_iter()
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("the package {KERNEL_METAPACKAGE} depends on no kernel"))?;
    say!("downloading {kernel_package} and {BUSYBOX_PACKAGE}; nothing is installed");
    let done = work.join("done");
    fs::create_dir(&done)?;
    let kernel = unpack(apt, &kernel_package, work)?;
    let vmlinuz = file_starting_with(&kernel.join("boot"), "vmlinuz-")?;
    fs::rename(vmlinuz, done.join(KERNEL))?;
    let mut names = vec![KERNEL, BUSYBOX];
    for name in MODULES {
        // Debian 13 compresses modules; BusyBox's insmod knows by its first bytes that one is. A guest needs none of them, so
        // a kernel without them is kept.
        let module = match find_below(&kernel, name)? {
            None => find_below(&kernel, &format!("{name}.xz"))?,
            found => found,
        };
        if let Some(module) = module {
            fs::rename(module, done.join(name))?;
            names.push(name);
        }
    }
    let busybox = unpack(apt, BUSYBOX_PACKAGE, work)?;
    let program =
        ["bin/busybox", "usr/bin/busybox"].into_iter().map(|name| busybox.join(name)).find(|p| p.is_file());
    let program = program.with_context(|| format!("the package {BUSYBOX_PACKAGE} holds no busybox"))?;
    fs::rename(program, done.join(BUSYBOX))?;
    let mut manifest = format!("# {kernel_package} {BUSYBOX_PACKAGE}\n");
    for name in names {
        manifest += &format!("{}\n", hash_line(&done.join(name), name)?);
    }
    fs::write(done.join(MANIFEST), manifest)?;
    cached_in(&done).map(|_| ()).map_err(anyhow::Error::msg)
}

/// Downloads a package and unpacks it into a folder of its name.
fn unpack(apt: &Apt, package: &str, work: &Path) -> Result<PathBuf> {
    apt.download(package, work)?;
    let archive = file_starting_with(work, &format!("{package}_"))?;
    let folder = work.join(package);
    CommandLine::new("dpkg-deb").arg("-x").arg(archive).arg(&folder).run_quietly()?;
    Ok(folder)
}

fn file_starting_with(folder: &Path, start: &str) -> Result<PathBuf> {
    let entries = folder.read_dir().with_context(|| format!("cannot list {}", folder.display()))?;
    let found = entries.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(start));
    match found {
        Some(entry) => Ok(entry.path()),
        None => bail!("{} holds no {start}…", folder.display()),
    }
}

/// The file `name` in the folder or below it.
fn find_below(folder: &Path, name: &str) -> Result<Option<PathBuf>> {
    let entries = folder.read_dir().with_context(|| format!("cannot list {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find_below(&entry.path(), name)? {
                return Ok(Some(found));
            }
        } else if entry.file_name() == name {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_downloaded_files_count() {
        let folder = std::env::temp_dir().join(format!("umbra-linux-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        assert!(cached_in(&folder).unwrap_err().contains("not in the cache"));
        fs::write(folder.join(KERNEL), "abc").unwrap();
        fs::write(folder.join(BUSYBOX), "").unwrap();
        // The hash of "abc" is in FIPS 180-2, B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  vmlinuz";
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  busybox";
        fs::write(folder.join(MANIFEST), format!("# packages\n{abc}\n{empty}\n")).unwrap();
        assert_eq!(cached_in(&folder).unwrap().kernel, folder.join(KERNEL));
        fs::write(folder.join(KERNEL), "ab").unwrap();
        assert!(cached_in(&folder).unwrap_err().contains("not the file that was downloaded"));
        fs::remove_file(folder.join(BUSYBOX)).unwrap();
        fs::write(folder.join(KERNEL), "abc").unwrap();
        assert!(cached_in(&folder).unwrap_err().contains("missing"));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn kvm_is_the_kernel_with_all_its_modules() {
        let folder = std::env::temp_dir().join(format!("umbra-kvm-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let mut manifest = String::new();
        for name in [KERNEL, BUSYBOX].into_iter().chain(MODULES) {
            assert!(with_kvm_in(&folder).is_err(), "without {name}");
            fs::write(folder.join(name), name).unwrap();
            manifest += &format!("{}\n", hash_line(&folder.join(name), name).unwrap());
            fs::write(folder.join(MANIFEST), &manifest).unwrap();
        }
        let host = with_kvm_in(&folder).unwrap();
        assert_eq!(host.linux, cached_in(&folder).unwrap());
        assert_eq!(host.modules.last(), Some(&folder.join("kvm-amd.ko")));
        fs::write(folder.join("kvm.ko"), "other").unwrap();
        assert!(with_kvm_in(&folder).unwrap_err().contains("kvm.ko is not the file that was downloaded"));
        assert!(cached_in(&folder).is_ok(), "a guest needs no module");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_file_is_found_however_deep_it_is() {
        let folder = std::env::temp_dir().join(format!("umbra-below-{}", std::process::id()));
        fs::create_dir_all(folder.join("a/b")).unwrap();
        fs::write(folder.join("a/b/kvm.ko"), "").unwrap();
        assert_eq!(find_below(&folder, "kvm.ko").unwrap(), Some(folder.join("a/b/kvm.ko")));
        assert_eq!(find_below(&folder, "kvm").unwrap(), None);
        fs::remove_dir_all(folder).unwrap();
    }
}
