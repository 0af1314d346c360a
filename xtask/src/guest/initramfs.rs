//! The Linux guest's initramfs: BusyBox, a console without a login, and the scenario script.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cpio::Archive;

/// The files beside BusyBox: path, whether it is executed, contents.
const FILES: [(&str, bool, &str); 5] = [
    ("init", true, include_str!("files/init")),
    ("etc/inittab", false, include_str!("files/inittab")),
    ("etc/profile", false, include_str!("files/profile")),
    ("etc/rc", true, include_str!("files/rc")),
    ("root/scenario.sh", true, include_str!("files/scenario.sh")),
];

/// The archive, made with the BusyBox at `busybox`.
pub fn build(busybox: &Path) -> Result<Vec<u8>> {
    let program = fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    let mut archive = Archive::new();
    for folder in
        ["bin", "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "usr/bin", "usr/sbin"]
    {
        archive.directory(folder);
    }
    // Linux opens the console for the first process before anything can mount devtmpfs.
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    archive.file("bin/busybox", true, &program)?;
    archive.symlink("bin/sh", "busybox");
    for (name, executable, text) in FILES {
        archive.file(name, executable, text.as_bytes())?;
    }
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::PROMPT;

    #[test]
    fn the_archive_holds_what_linux_starts() {
        let dir = std::env::temp_dir().join(format!("umbra-initramfs-{}", std::process::id()));
        fs::write(&dir, "BUSYBOX PROGRAM").unwrap();
        let archive = build(&dir).unwrap();
        fs::remove_file(&dir).unwrap();
        let text = String::from_utf8_lossy(&archive);
        for part in ["\0init\0", "bin/busybox\0", "BUSYBOX PROGRAM", "dev/console\0", "root/scenario.sh\0"] {
            assert!(text.contains(part.trim_start_matches('\0')), "{part}");
        }
        assert!(build(Path::new("/nonexistent/busybox")).is_err());
    }

    #[test]
    fn the_prompt_is_the_documented_one() {
        let profile = FILES.iter().find(|(name, ..)| *name == "etc/profile").unwrap().2;
        assert!(profile.contains(&format!("PS1='{PROMPT}'")));
    }

    #[test]
    fn scripts_are_valid_shell() {
        for (name, executable, text) in FILES {
            if !executable {
                continue;
            }
            assert!(text.starts_with("#!/bin/sh\n") || text.starts_with("#!/bin/busybox sh\n"), "{name}");
            let path = std::env::temp_dir().join(format!("umbra-script-{}", std::process::id()));
            fs::write(&path, text).unwrap();
            let checked = std::process::Command::new("sh").arg("-n").arg(&path).status().unwrap();
            fs::remove_file(&path).unwrap();
            assert!(checked.success(), "{name}");
        }
    }
}
