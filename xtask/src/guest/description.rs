//! The guest of those who bring no umbra.toml: writes one, beside copies of the files it names.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{initramfs, Linux};
use crate::build::Images;
use crate::bundle::{toml_string, Bundle};
use crate::run::MmuMode;
use crate::{paths, say};

/// What is asked of a guest; without a kernel it is Linux from the cache, or the demo guest.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The kernel.
    pub kernel: Option<PathBuf>,
    /// The initial ramdisk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: Option<String>,
    /// How its addresses are translated.
    pub mmu: MmuMode,
}

/// The Linux guest's command line: the console.
pub const LINUX_CMDLINE: &str = "console=ttyS0";

/// Writes the guest into the folder `dir`, from where it can be run again and varied with `run --vm`.
pub fn write(request: &Request, linux: Option<&Linux>, dir: &Path) -> Result<Bundle> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut guest = Guest {
        name: "linux",
        kernel: "kernel",
        initrd: request.initrd.is_some(),
        cmdline: LINUX_CMDLINE,
        exit_port: false,
        mmu: request.mmu,
    };
    match (&request.kernel, linux) {
        (Some(kernel), _) => {
            guest.name = "guest";
            guest.exit_port = is_multiboot(&copy(kernel, &dir.join("kernel"))?);
        }
        (None, Some(linux)) => {
            copy(&linux.kernel, &dir.join("kernel"))?;
            if !guest.initrd {
                guest.initrd = true;
                let path = dir.join("initrd");
                fs::write(&path, initramfs::build(&linux.busybox)?)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        (None, None) => {
            say!("Linux is not here to be a guest, so the built-in demo guest is booted");
            guest = Guest { name: "demo", cmdline: "", ..guest };
            copy(&Images::places().guest("demo"), &dir.join("kernel"))?;
        }
    }
    if let Some(initrd) = &request.initrd {
        copy(initrd, &dir.join("initrd"))?;
    }
    if let Some(cmdline) = &request.cmdline {
        guest.cmdline = cmdline;
    }
    let config = dir.join("umbra.toml");
    fs::write(&config, guest.toml()).with_context(|| format!("cannot write {}", config.display()))?;
    say!("the guest is described in {}", paths::display(&config));
    Bundle::load(&config)
}

fn copy(from: &Path, to: &Path) -> Result<Vec<u8>> {
    // Read and written, not copied: a copy would take over a read-only mode, and the next run could not replace it.
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", paths::display(from)))?;
    fs::write(to, &bytes).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(bytes)
}

/// Whether `file` is a Multiboot 1 program: magic, flags and a checksum that makes their sum zero, in its first 8 KiB
/// (Multiboot Specification 0.6.96, 3.1). Such programs are mostly tests, which end by the exit port as in QEMU.
fn is_multiboot(file: &[u8]) -> bool {
    const MAGIC: u32 = 0x1bad_b002;
    let head = file.get(..8192).unwrap_or(file);
    let words: Vec<u32> =
        head.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect();
    words.windows(3).any(|header| {
        header[0] == MAGIC && header.iter().fold(0u32, |sum, &word| sum.wrapping_add(word)) == 0
    })
}

#[derive(Clone, Copy)]
struct Guest<'a> {
    name: &'a str,
    kernel: &'a str,
    initrd: bool,
    cmdline: &'a str,
    exit_port: bool,
    mmu: MmuMode,
}

impl Guest<'_> {
    fn toml(&self) -> String {
        let initrd = if self.initrd { "initrd = \"initrd\"\n" } else { "" };
        let exit_port = if self.exit_port { "exit_port = 0xf4\n" } else { "" };
        let mmu = match self.mmu {
            MmuMode::Direct => "",
            MmuMode::Shadow => "mmu = \"shadow\"\n",
        };
        format!(
            "# Written by `cargo xtask`, anew each time.\n\
             [[vm]]\nname = {}\nmemory = \"512M\"\nkernel = {}\n{initrd}cmdline = {}\n{exit_port}{mmu}",
            toml_string(self.name),
            toml_string(self.kernel),
            toml_string(self.cmdline)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_says_what_was_asked_for() {
        let guest = Guest {
            name: "linux",
            kernel: "kernel",
            initrd: true,
            cmdline: "console=ttyS0 a=\"b c\"",
            exit_port: false,
            mmu: MmuMode::Direct,
        };
        let text = guest.toml();
        assert!(text.ends_with(
            "[[vm]]\nname = \"linux\"\nmemory = \"512M\"\nkernel = \"kernel\"\ninitrd = \"initrd\"\n\
             cmdline = \"console=ttyS0 a=\\\"b c\\\"\"\n"
        ));
        assert!(!Guest { initrd: false, ..guest }.toml().contains("initrd"));
        assert!(Guest { exit_port: true, ..guest }.toml().ends_with("exit_port = 0xf4\n"));
        assert!(Guest { mmu: MmuMode::Shadow, ..guest }.toml().ends_with("mmu = \"shadow\"\n"));
    }

    #[test]
    fn multiboot_programs_are_known_by_a_whole_header() {
        let file = |at: usize, words: [u32; 3]| {
            let mut bytes = vec![0; 9000];
            for (index, word) in words.into_iter().enumerate() {
                bytes[at + 4 * index..][..4].copy_from_slice(&word.to_le_bytes());
            }
            bytes
        };
        let header = [0x1bad_b002, 3, 0u32.wrapping_sub(0x1bad_b002 + 3)];
        assert!(is_multiboot(&file(0x1000, header)));
        assert!(!is_multiboot(&file(0x1002, header)), "not aligned");
        assert!(!is_multiboot(&file(8188, header)), "too late");
        assert!(!is_multiboot(&file(0, [0x1bad_b002, 3, 0])), "wrong checksum");
        assert!(!is_multiboot(b"\x7fELF"));
    }
}
