//! The Linux guest's initramfs: BusyBox, a console without a login, and the scenario script.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use boot::bundle::Writer;

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
    let mut archive = Writer::new();
    for folder in
        ["bin", "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "usr/bin", "usr/sbin"]
    {
        archive.directory(folder, 0o755)?;
    }
    // Linux opens the console for the first process before anything can mount devtmpfs.
    archive.char_device("dev/console", 0o600, 5, 1)?;
    archive.char_device("dev/null", 0o666, 1, 3)?;
    archive.file("bin/busybox", 0o755, &program)?;
    archive.symlink("bin/sh", "busybox")?;
    for (name, executable, text) in FILES {
        archive.file(name, if executable { 0o755 } else { 0o644 }, text.as_bytes())?;
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
        let archive = boot::bundle::Bundle::new(&archive).unwrap();
        assert_eq!(archive.file("bin/busybox"), Some(&b"BUSYBOX PROGRAM"[..]));
        assert!(archive.file("init").is_some_and(|script| script.starts_with(b"#!/bin/busybox sh")));
        for name in ["bin/sh", "dev/console", "proc", "root/scenario.sh"] {
            assert!(archive.entries().any(|entry| entry.name == name), "{name}");
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
