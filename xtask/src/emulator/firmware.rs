//! Where distributions keep the UEFI firmware for QEMU.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What to say when it is nowhere.
pub(super) const NO_UEFI: &str =
    "no UEFI firmware for QEMU was found; `cargo xtask setup` installs it or names its package";

/// Code and an empty variable store, by distribution.
const PLACES: [(&str, &str); 8] = [
    // Debian
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    // Fedora
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    // Arch
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
    // Homebrew on Apple silicon, on Intel, and QEMU's own `make install`
    ("/opt/homebrew/share/qemu/edk2-x86_64-code.fd", "/opt/homebrew/share/qemu/edk2-i386-vars.fd"),
    ("/usr/local/share/qemu/edk2-x86_64-code.fd", "/usr/local/share/qemu/edk2-i386-vars.fd"),
    ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
];

/// The two halves of the firmware.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UefiFiles {
    /// The code, which is only read.
    pub code: PathBuf,
    /// An empty variable store, to be copied.
    pub variables: PathBuf,
}

/// The UEFI firmware of this host.
pub fn uefi_files() -> Option<UefiFiles> {
    first_present(|path| path.is_file())
}

fn first_present(present: impl Fn(&Path) -> bool) -> Option<UefiFiles> {
    PLACES
        .iter()
        .map(|(code, variables)| UefiFiles { code: code.into(), variables: variables.into() })
        .find(|files| present(&files.code) && present(&files.variables))
}

/// Copies the empty variable store to `to`: the firmware writes into it.
pub(super) fn copy_variables(to: &Path) -> Result<()> {
    let from = uefi_files().context(NO_UEFI)?.variables;
    // Read and written, not copied: the packaged file's mode may be read-only.
    let empty = fs::read(&from).with_context(|| format!("cannot read {}", from.display()))?;
    fs::write(to, empty).with_context(|| format!("cannot write {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_halves_come_from_the_same_place() {
        let fedora = first_present(|path| path.starts_with("/usr/share/edk2/ovmf")).unwrap();
        assert_eq!(fedora.code, Path::new("/usr/share/edk2/ovmf/OVMF_CODE.fd"));
        assert_eq!(fedora.variables, Path::new("/usr/share/edk2/ovmf/OVMF_VARS.fd"));
        assert_eq!(first_present(|path| path.ends_with("OVMF_CODE.fd")), None);
        assert_eq!(first_present(|_| false), None);
    }
}
