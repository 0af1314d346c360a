//! The network that a machine in QEMU boots from.

use std::path::PathBuf;

use super::machine::Boot;
use super::qemu::in_a_list;
use crate::exec::CommandLine;
use crate::pxe::boot_image;

/// What is at the other end of the machine's network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// QEMU's own network: a DHCP and a TFTP server for this machine alone, and no way out.
    User {
        /// The folder that TFTP serves.
        tree: PathBuf,
        /// The file that DHCP names; `None` takes the one for the machine's firmware.
        boot_file: Option<String>,
    },
    /// A tap device of this host, with whoever is there.
    Tap(String),
}

/// The machine's network card, and what it is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Where the card leads.
    pub link: Link,
    /// The card's address.
    pub mac: String,
    /// The machine's UUID.
    pub uuid: Option<String>,
    /// The machine's serial number.
    pub serial: Option<String>,
    /// The BIOS shows its screen, and with it that of iPXE, on the serial line.
    pub screen_on_serial: bool,
}

impl Network {
    /// QEMU's own network with the tree at `tree`.
    pub fn user(tree: impl Into<PathBuf>) -> Self {
        Self::new(Link::User { tree: tree.into(), boot_file: None })
    }

    /// The network behind `link`, for a machine that nothing else is known of.
    pub fn new(link: Link) -> Self {
        Self { link, mac: "52:54:00:12:34:56".into(), uuid: None, serial: None, screen_on_serial: false }
    }

    /// What QEMU is told. The card's own boot program is iPXE on a BIOS; UEFI has a driver, and a boot program of its own.
    pub(super) fn add_to(&self, line: CommandLine, boot: Boot) -> CommandLine {
        let (file, rom) = match boot {
            Boot::PxeUefi => (boot_image::UEFI, ",romfile="),
            _ => (boot_image::IPXE, ""),
        };
        let backend = match &self.link {
            Link::User { tree, boot_file } => {
                let file = boot_file.as_deref().unwrap_or(file);
                format!("user,id=net0,restrict=on,ipv6=off,tftp={},bootfile={file}", in_a_list(tree))
            }
            Link::Tap(name) => format!("tap,id=net0,ifname={name},script=no,downscript=no"),
        };
        let known: String = [("uuid", &self.uuid), ("serial", &self.serial)]
            .iter()
            .filter_map(|(key, value)| Some(format!(",{key}={}", value.as_ref()?)))
            .collect();
        let mut line = line
            .args(["-netdev", &backend])
            .args(["-device", &format!("virtio-net-pci,netdev=net0,mac={},bootindex=0{rom}", self.mac)]);
        if !known.is_empty() {
            line = line.args(["-smbios", &format!("type=1{known}")]);
        }
        if self.screen_on_serial && boot == Boot::Pxe {
            line = line.args(["-machine", "graphics=off"]);
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(network: &Network, boot: Boot) -> String {
        network.add_to(CommandLine::new("qemu"), boot).to_string()
    }

    #[test]
    fn a_bios_gets_ipxe_and_its_script() {
        assert_eq!(
            shown(&Network::user("/t/a,b"), Boot::Pxe),
            "qemu -netdev user,id=net0,restrict=on,ipv6=off,tftp=/t/a,,b,bootfile=boot.ipxe \
             -device virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56,bootindex=0"
        );
    }

    #[test]
    fn uefi_boots_by_itself() {
        let line = shown(&Network::user("/t"), Boot::PxeUefi);
        assert!(line.contains("bootfile=grub-x64.efi ") && line.ends_with(",bootindex=0,romfile="), "{line}");
    }

    #[test]
    fn a_machine_is_known_by_what_it_is_given() {
        let network = Network {
            mac: "52:54:00:00:00:01".into(),
            serial: Some("A-1".into()),
            screen_on_serial: true,
            ..Network::new(Link::Tap("tap0".into()))
        };
        let line = shown(&network, Boot::Pxe);
        for word in [
            "tap,id=net0,ifname=tap0,script=no,downscript=no",
            "mac=52:54:00:00:00:01",
            "-smbios type=1,serial=A-1",
            "-machine graphics=off",
        ] {
            assert!(line.contains(word), "{word}: {line}");
        }
        let network = Network { uuid: Some("0a1b2c3d-0001-0002-0003-aabbccddeeff".into()), ..network };
        assert!(shown(&network, Boot::Pxe).contains("uuid=0a1b2c3d-0001-0002-0003-aabbccddeeff,serial=A-1"));
        assert!(!shown(&network, Boot::PxeUefi).contains("graphics=off"));
    }

    #[test]
    fn a_boot_file_can_be_named() {
        let link = Link::User { tree: "/t".into(), boot_file: Some("grub-bios.0".into()) };
        assert!(shown(&Network::new(link), Boot::Pxe).contains("bootfile=grub-bios.0"));
    }
}
