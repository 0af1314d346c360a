//! What setup asks about the machine it runs on, behind a trait so that its decisions can be tested.

use std::path::Path;
use std::time::{Duration, SystemTime};

use super::linux;
use crate::emulator;
use crate::exec::{find_program, CommandLine};
use crate::guest::{KvmHost, Linux};
use crate::toolchain::{self, Compiler};
use crate::{grub, sys};

/// A program that installs packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PackageManager {
    /// Debian's; the only one that setup drives itself.
    Apt,
    /// Fedora's.
    Dnf,
    /// Arch's.
    Pacman,
    /// Homebrew.
    Brew,
}

impl PackageManager {
    /// What a person types to install `packages`.
    pub(super) fn install_command(self, packages: &[&str]) -> String {
        let packages = packages.join(" ");
        match self {
            Self::Apt => format!("sudo apt-get install -y --no-install-recommends {packages}"),
            Self::Dnf => format!("sudo dnf install {packages}"),
            Self::Pacman => format!("sudo pacman -S --needed {packages}"),
            Self::Brew => format!("brew install {packages}"),
        }
    }
}

/// How packages can be installed by this user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    /// This is the superuser.
    Root,
    /// sudo works without a question.
    Sudo,
    /// Not at all.
    None,
}

/// The machine, as far as setup wants to know it.
pub(super) trait Host {
    /// Whether the program is on the path.
    fn has_program(&self, name: &str) -> bool;
    /// Whether the file or folder exists.
    fn exists(&self, path: &Path) -> bool;
    /// The compiler that can be used as things are.
    fn compiler(&self) -> Option<Compiler>;
    /// Whether QEMU's UEFI firmware is there.
    fn has_uefi(&self) -> bool;
    /// Whether one of the names of grub-mkimage is on the path.
    fn has_mkimage(&self) -> bool;
    /// The Linux guest in the cache, or why there is none.
    fn linux(&self) -> Result<Linux, String>;
    /// Linux with KVM in the cache, or why there is none.
    fn kvm(&self) -> Result<KvmHost, String>;
    /// The package manager.
    fn package_manager(&self) -> Option<PackageManager>;
    /// How packages can be installed.
    fn rights(&self) -> Rights;
    /// Whether the package manager's lists are too old to be relied on.
    fn lists_are_stale(&self) -> bool;
}

/// This machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct ThisHost;

impl Host for ThisHost {
    fn has_program(&self, name: &str) -> bool {
        find_program(name).is_some()
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn compiler(&self) -> Option<Compiler> {
        toolchain::installed()
    }

    fn has_uefi(&self) -> bool {
        emulator::uefi_files().is_some()
    }

    fn has_mkimage(&self) -> bool {
        grub::mkimage().is_some()
    }

    fn linux(&self) -> Result<Linux, String> {
        linux::cached()
    }

    fn kvm(&self) -> Result<KvmHost, String> {
        linux::cached_with_kvm()
    }

    fn package_manager(&self) -> Option<PackageManager> {
        [
            ("apt-get", PackageManager::Apt),
            ("dnf", PackageManager::Dnf),
            ("pacman", PackageManager::Pacman),
            ("brew", PackageManager::Brew),
        ]
        .into_iter()
        .find_map(|(program, manager)| find_program(program).map(|_| manager))
    }

    fn rights(&self) -> Rights {
        if sys::is_root() {
            Rights::Root
        } else if find_program("sudo").is_some()
            && CommandLine::new("sudo").args(["-n", "true"]).read().is_ok()
        {
            Rights::Sudo
        } else {
            Rights::None
        }
    }

    fn lists_are_stale(&self) -> bool {
        let a_day = Duration::from_secs(24 * 60 * 60);
        let Ok(entries) = Path::new("/var/lib/apt/lists").read_dir() else { return true };
        let newest = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().contains("Release"))
            .filter_map(|entry| entry.metadata().ok()?.modified().ok())
            .max();
        // An unreadable or future date counts as fresh: an installation that fails updates the lists anyway.
        newest.is_none_or(|date| SystemTime::now().duration_since(date).is_ok_and(|age| age > a_day))
    }
}
