//! The guest of those who bring no umbra.toml: writes one, beside copies of the files it names.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{initramfs, Linux};
use crate::build::Images;
use crate::bundle::{toml_string, Bundle};
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
}

/// Writes the guest into the folder `dir`, from where it can be run again and varied with `run --vm`.
pub fn write(request: &Request, linux: Option<&Linux>, dir: &Path) -> Result<Bundle> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let mut guest =
        Guest { name: "linux", kernel: "kernel", initrd: request.initrd.is_some(), cmdline: "console=ttyS0" };
    match (&request.kernel, linux) {
        (Some(kernel), _) => {
            guest.name = "guest";
            copy(kernel, &dir.join("kernel"))?;
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

fn copy(from: &Path, to: &Path) -> Result<()> {
    // Read and written, not copied: a copy would take over a read-only mode, and the next run could not replace it.
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", paths::display(from)))?;
    fs::write(to, bytes).with_context(|| format!("cannot write {}", to.display()))
}

struct Guest<'a> {
    name: &'a str,
    kernel: &'a str,
    initrd: bool,
    cmdline: &'a str,
}

impl Guest<'_> {
    fn toml(&self) -> String {
        let initrd = if self.initrd { "initrd = \"initrd\"\n" } else { "" };
        format!(
            "# Written by `cargo xtask`, anew each time.\n\
             [[vm]]\nname = {}\nmemory = \"512M\"\nkernel = {}\n{initrd}cmdline = {}\n",
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
        let guest =
            Guest { name: "linux", kernel: "kernel", initrd: true, cmdline: "console=ttyS0 a=\"b c\"" };
        let text = guest.toml();
        assert!(text.ends_with(
            "[[vm]]\nname = \"linux\"\nmemory = \"512M\"\nkernel = \"kernel\"\ninitrd = \"initrd\"\n\
             cmdline = \"console=ttyS0 a=\\\"b c\\\"\"\n"
        ));
        assert!(!Guest { initrd: false, ..guest }.toml().contains("initrd"));
    }
}
