//! What Linux needs to run a guest under KVM, in one archive: BusyBox, the modules, this host's QEMU and the guest.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use boot::bundle::Writer;

use crate::exec::{find_program, CommandLine};
use crate::guest::KvmHost;

const QEMU: &str = "qemu-system-x86_64";

/// What QEMU's PC has in its flash, and what it puts beside it to load a Multiboot kernel.
const FIRMWARE: [&str; 3] = ["bios-256k.bin", "kvmvapic.bin", "multiboot_dma.bin"];

const INIT: &str = include_str!("init");

/// QEMU as it is installed here: names in the archive, and the files.
#[derive(Clone, Debug)]
pub(super) struct Qemu(Vec<(String, PathBuf)>);

impl Qemu {
    /// The program, the libraries it is linked with, and its firmware.
    pub(super) fn find() -> Result<Self> {
        let program =
            find_program(QEMU).with_context(|| format!("there is no program {QEMU} on the path"))?;
        let libraries =
            CommandLine::new("ldd").arg(&program).read().context("KVM's QEMU needs its libraries")?;
        let mut files = libraries_in(&libraries)?;
        let folders = CommandLine::new(&program).args(["-L", "help"]).read()?;
        for name in FIRMWARE {
            let path = folders.lines().map(|folder| Path::new(folder).join(name)).find(|path| path.is_file());
            let path = path.with_context(|| format!("QEMU's {name} is in none of its folders"))?;
            files.push((format!("firmware/{name}"), path));
        }
        files.push(("bin/qemu".into(), program));
        Ok(Self(files))
    }
}

/// The libraries in the output of `ldd`, all in `lib` but for the loader, which the program names by its path.
fn libraries_in(text: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    for line in text.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[..] {
            [name, "=>", "not", "found"] => bail!("QEMU's library {name} is not installed"),
            [name, "=>", path, _] => files.push((format!("lib/{name}"), path.into())),
            [path, _] if path.starts_with('/') => files.push((path[1..].to_owned(), path.into())),
            // What the kernel itself maps into each process.
            _ => {}
        }
    }
    Ok(files)
}

/// The archive with the Multiboot kernel `guest`.
pub(super) fn build(host: &KvmHost, qemu: &Qemu, guest: &Path) -> Result<Vec<u8>> {
    let mut files = qemu.0.clone();
    files.push(("bin/busybox".into(), host.linux.busybox.clone()));
    files.push(("guest".into(), guest.to_path_buf()));
    for module in &host.modules {
        let name = module.file_name().context("a module has no name")?;
        files.push((format!("lib/modules/{}", name.to_string_lossy()), module.clone()));
    }
    let mut archive = Writer::new();
    for folder in folders_of(&files) {
        archive.directory(&folder, 0o755)?;
    }
    // Linux opens the console for the first process before anything can mount devtmpfs.
    archive.char_device("dev/console", 0o600, 5, 1)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    for (name, path) in files {
        let data = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        archive.file(&name, 0o755, &data)?;
    }
    Ok(archive.finish())
}

/// The folders that Linux and BusyBox want, and those of the files, each after the one it is in.
fn folders_of(files: &[(String, PathBuf)]) -> Vec<String> {
    let mut folders: Vec<String> =
        ["bin", "dev", "proc", "sbin", "sys", "tmp", "usr", "usr/bin", "usr/sbin"].map(str::to_owned).into();
    for (name, _) in files {
        let end_of = name.match_indices('/').map(|(at, _)| name[..at].to_owned());
        for folder in end_of {
            if !folders.contains(&folder) {
                folders.push(folder);
            }
        }
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Linux;

    #[test]
    fn libraries_are_read() {
        let text = "\tlinux-vdso.so.1 (0x00007ffe)\n\tlibz.so.1 => /lib/x/libz.so.1 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let file = |name: &str, path: &str| (name.to_owned(), PathBuf::from(path));
        assert_eq!(
            libraries_in(text).unwrap(),
            [
                file("lib/libz.so.1", "/lib/x/libz.so.1"),
                file("lib64/ld-linux-x86-64.so.2", "/lib64/ld-linux-x86-64.so.2")
            ]
        );
        assert!(libraries_in("\tstatically linked\n").unwrap().is_empty());
        let error = libraries_in("\tlibz.so.1 => not found\n").unwrap_err().to_string();
        assert_eq!(error, "QEMU's library libz.so.1 is not installed");
    }

    #[test]
    fn the_archive_holds_each_file_after_its_folders() {
        let dir = std::env::temp_dir().join(format!("umbra-kvm-initramfs-{}", std::process::id()));
        fs::write(&dir, "FILE").unwrap();
        let host = KvmHost {
            linux: Linux { kernel: dir.clone(), busybox: dir.clone() },
            modules: vec![dir.clone()],
        };
        let qemu = Qemu(vec![("lib64/x/ld.so".into(), dir.clone())]);
        let archive = build(&host, &qemu, &dir).unwrap();
        fs::remove_file(&dir).unwrap();
        let archive = boot::bundle::Bundle::new(&archive).unwrap();
        let names: Vec<_> = archive.entries().map(|entry| entry.name).collect();
        let at =
            |name: &str| names.iter().position(|known| *known == name).unwrap_or_else(|| panic!("{name}"));
        assert!(at("lib64") < at("lib64/x") && at("lib64/x") < at("lib64/x/ld.so"));
        assert!(at("lib/modules") < names.len() && at("bin") < at("bin/busybox"));
        assert_eq!(archive.file("guest"), Some(&b"FILE"[..]));
        assert_eq!(archive.file("init"), Some(INIT.as_bytes()));
        assert!(build(&host, &qemu, &dir).is_err(), "without the files");
    }

    #[test]
    fn the_script_is_valid_shell() {
        let mut shell = std::process::Command::new("sh")
            .args(["-n", "-s"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut shell.stdin.take().unwrap(), INIT.as_bytes()).unwrap();
        assert!(shell.wait().unwrap().success());
    }
}
