//! Installs and downloads Debian packages.

use std::cell::Cell;
use std::path::Path;

use anyhow::{bail, Context, Result};

use super::host::{Host, Rights};
use crate::exec::CommandLine;
use crate::say;

/// apt, as this user can use it. The lists are updated at most once.
pub(super) struct Apt {
    rights: Rights,
    stale: Cell<bool>,
    updated: Cell<bool>,
}

impl Apt {
    pub(super) fn new(host: &impl Host) -> Self {
        Self { rights: host.rights(), stale: Cell::new(host.lists_are_stale()), updated: Cell::new(false) }
    }

    /// Installs `packages`.
    pub(super) fn install(&self, packages: &[&str]) -> Result<()> {
        self.with_lists(|| {
            self.privileged("apt-get")?
                .args(["install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"])
                .args(packages)
                .run_on_stderr()
        })
    }

    /// Downloads the one package `name` into the folder `dir`, which needs no privilege; apt checks its signed hash.
    pub(super) fn download(&self, name: &str, dir: &Path) -> Result<()> {
        self.with_lists(|| self.apt("apt-get").arg("download").arg(name).dir(dir).run_on_stderr())
    }

    /// The packages on which `name` depends.
    pub(super) fn dependencies(&self, name: &str) -> Result<Vec<String>> {
        self.with_lists(|| {
            let text = CommandLine::new("apt-cache").args(["depends", "--important", name]).read()?;
            let found = dependencies_in(&text);
            if found.is_empty() {
                bail!("apt knows no package {name} with dependencies");
            }
            Ok(found)
        })
    }

    /// Does `work` with lists that are fresh enough; if it fails with old ones, updates them and tries once more.
    fn with_lists<T>(&self, work: impl Fn() -> Result<T>) -> Result<T> {
        if self.stale.get() && !self.updated.get() {
            if self.rights == Rights::None {
                say!("apt's lists are old, but this user cannot update them");
            } else if let Err(error) = self.update() {
                say!("going on with apt's old lists: {error:#}");
            }
        }
        let first = work();
        match first {
            Err(error) if !self.updated.get() && self.rights != Rights::None => {
                say!("updating apt's lists, since that failed: {error:#}");
                self.update()?;
                work()
            }
            Err(error) if self.rights == Rights::None => {
                Err(error).context("if apt does not know the package, run: sudo apt-get update")
            }
            other => other,
        }
    }

    fn update(&self) -> Result<()> {
        self.updated.set(true);
        self.privileged("apt-get")?.args(["update", "-o", "DPkg::Lock::Timeout=300"]).run_on_stderr()
    }

    /// A command line of `program` for this user.
    fn apt(&self, program: &str) -> CommandLine {
        let line = CommandLine::new(program);
        if self.rights == Rights::Root {
            // As root, apt downloads as the user _apt, which may not write into our cache.
            line.args(["-o", "APT::Sandbox::User=root"])
        } else {
            line
        }
    }

    fn privileged(&self, program: &str) -> Result<CommandLine> {
        Ok(match self.rights {
            Rights::Root => CommandLine::new(program).env("DEBIAN_FRONTEND", "noninteractive"),
            Rights::Sudo => {
                CommandLine::new("sudo").args(["-n", "env", "DEBIAN_FRONTEND=noninteractive", program])
            }
            Rights::None => bail!("this user cannot install packages"),
        })
    }
}

/// Whether apt's lists hold the package.
pub(super) fn knows(package: &str) -> bool {
    CommandLine::new("apt-cache").args(["show", "--quiet", package]).read().is_ok_and(|text| !text.is_empty())
}

/// The names after `Depends:` in the output of `apt-cache depends`.
fn dependencies_in(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .map(|name| name.trim().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n |Depends: a\n  Suggests: b\n";
        assert_eq!(dependencies_in(text), ["linux-image-6.1.0-56-cloud-amd64"]);
        assert!(dependencies_in("").is_empty());
    }

    #[test]
    fn privileges_change_the_command() {
        let apt = |rights| Apt { rights, stale: Cell::new(false), updated: Cell::new(false) };
        let line = apt(Rights::Root).privileged("apt-get").unwrap().to_string();
        assert_eq!(line, "DEBIAN_FRONTEND=noninteractive apt-get");
        let line = apt(Rights::Sudo).privileged("apt-get").unwrap().to_string();
        assert_eq!(line, "sudo -n env DEBIAN_FRONTEND=noninteractive apt-get");
        assert!(apt(Rights::None).privileged("apt-get").is_err());
        assert_eq!(apt(Rights::Sudo).apt("apt-get").to_string(), "apt-get");
    }
}
