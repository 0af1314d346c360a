//! The components: what they are for, how their absence shows, and the packages that bring them.

use std::path::Path;

use super::host::{Host, PackageManager};
use crate::toolchain::{self, Compiler};

/// Something a command needs on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// A compiler for the bare-metal target.
    Target,
    /// QEMU and its BIOS.
    Qemu,
    /// QEMU's UEFI firmware.
    Uefi,
    /// Bochs and its BIOS.
    Bochs,
    /// What makes a bootable image.
    Grub,
    /// What answers machines that boot over the network.
    Dnsmasq,
    /// The Linux guest.
    Linux,
    /// Linux with KVM, to be measured beside Umbra.
    Kvm,
    /// What counts the instructions of a program.
    Valgrind,
    /// The linter of Debian's compiler, where that is the one that builds for the bare-metal target.
    Clippy,
}

impl Component {
    /// All that running and testing need.
    pub const ALL: [Self; 7] =
        [Self::Target, Self::Qemu, Self::Uefi, Self::Bochs, Self::Grub, Self::Dnsmasq, Self::Linux];

    /// Its name, and what it is for.
    pub fn describe(self) -> (&'static str, &'static str) {
        match self {
            Self::Target => ("compiler for x86_64-unknown-none", "it builds Umbra and the test guests"),
            Self::Qemu => ("QEMU", "it emulates the machine that Umbra runs on"),
            Self::Uefi => ("UEFI firmware", "it starts images as a UEFI machine does"),
            Self::Bochs => ("Bochs", "it is the second emulator that Umbra is tested in"),
            Self::Grub => ("GRUB's image tools", "they make bootable images"),
            Self::Dnsmasq => {
                ("dnsmasq", "it serves machines that boot over the network, for `pxe --serve` and its test")
            }
            Self::Linux => ("Linux guest", "it is the guest that `run` boots"),
            Self::Kvm => ("Linux with KVM", "it is measured by `bench mmu --kvm`"),
            Self::Valgrind => ("valgrind", "it counts instructions of `bench mmu-host`"),
            Self::Clippy => ("clippy for Debian's compiler", "it checks the bare-metal crates"),
        }
    }

    /// Why the component cannot be used, if it cannot.
    pub(super) fn missing(self, host: &impl Host) -> Option<String> {
        let no_program =
            |name: &str| (!host.has_program(name)).then(|| format!("there is no program {name} on the path"));
        let no_file = |path: &str| (!host.exists(Path::new(path))).then(|| format!("there is no {path}"));
        match self {
            Self::Target => host
                .compiler()
                .is_none()
                .then(|| "neither the Rust toolchain nor Debian's compiler can build for it".into()),
            Self::Qemu => no_program("qemu-system-x86_64"),
            Self::Uefi => (!host.has_uefi()).then(|| "there is no OVMF in any of the usual places".into()),
            Self::Bochs => no_program("bochs").or_else(|| {
                let debian = host.package_manager() == Some(PackageManager::Apt);
                let files = ["/usr/share/bochs/BIOS-bochs-latest", "/usr/share/bochs/VGABIOS-lgpl-latest"];
                files.into_iter().filter(|_| debian).find_map(no_file)
            }),
            Self::Grub => {
                if !host.has_mkimage() {
                    return Some("there is no program grub-mkimage on the path".into());
                }
                let debian = host.package_manager() == Some(PackageManager::Apt);
                let folders = ["/usr/lib/grub/i386-pc", "/usr/lib/grub/x86_64-efi"];
                ["xorriso", "mformat"]
                    .into_iter()
                    .find_map(no_program)
                    .or_else(|| folders.into_iter().filter(|_| debian).find_map(no_file))
            }
            Self::Dnsmasq => no_program("dnsmasq"),
            Self::Linux => host.linux().err(),
            Self::Kvm => host.kvm().err(),
            Self::Valgrind => no_program("valgrind"),
            Self::Clippy if host.compiler() == Some(Compiler::Debian) => no_file("/usr/bin/cargo-clippy"),
            // rustup brings its own.
            Self::Clippy => None,
        }
    }

    /// The packages that bring it. Where a list is empty, another component's packages do, or there are none.
    pub(super) fn packages(self, manager: PackageManager) -> &'static [&'static str] {
        use PackageManager::{Apt, Brew, Dnf, Pacman};
        match (self, manager) {
            (Self::Target, Apt) => &toolchain::DEBIAN_PACKAGES,
            (Self::Target, Dnf) => &["rust-std-static-x86_64-unknown-none"],
            (Self::Target, Pacman | Brew) => &["rustup"],
            (Self::Qemu, Apt) => &["qemu-system-x86", "seabios"],
            (Self::Qemu, Dnf) => &["qemu-system-x86-core", "seabios-bin"],
            (Self::Qemu, Pacman) => &["qemu-system-x86", "seabios"],
            (Self::Qemu, Brew) | (Self::Uefi, Brew) => &["qemu"],
            (Self::Uefi, Apt) => &["ovmf"],
            (Self::Uefi, Dnf | Pacman) => &["edk2-ovmf"],
            (Self::Bochs, Apt) => &["bochs", "bochsbios", "vgabios", "bochs-term"],
            (Self::Bochs, Dnf | Pacman | Brew) => &["bochs"],
            (Self::Grub, Apt) => &["grub-pc-bin", "grub-efi-amd64-bin", "grub-common", "xorriso", "mtools"],
            (Self::Grub, Dnf) => {
                &["grub2-tools", "grub2-pc-modules", "grub2-efi-x64-modules", "xorriso", "mtools"]
            }
            (Self::Grub, Pacman) => &["grub", "libisoburn", "mtools"],
            (Self::Grub, Brew) => &["i686-elf-grub", "x86_64-elf-grub", "xorriso", "mtools"],
            // The program without the service: nothing starts by itself.
            (Self::Dnsmasq, Apt) => &["dnsmasq-base"],
            (Self::Dnsmasq, Dnf | Pacman | Brew) => &["dnsmasq"],
            // Downloaded and unpacked into the cache, not installed; see `linux`.
            (Self::Linux | Self::Kvm, _) => &[],
            (Self::Valgrind, Apt | Dnf | Pacman) => &["valgrind"],
            (Self::Valgrind, Brew) => &[],
            (Self::Clippy, Apt) => &["rust-web-clippy"],
            (Self::Clippy, _) => &[],
        }
    }
}
