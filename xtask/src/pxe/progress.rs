//! What dnsmasq logs, as one line for each step of each machine.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use super::tree;

/// Follows the log, line by line.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The folder of the tree, as dnsmasq writes it before the files' names.
    root: String,
    /// What is known of the request that dnsmasq is logging.
    firmware: Option<&'static str>,
    ipxe: bool,
    mac: String,
    /// Which machine has which address.
    machines: BTreeMap<Ipv4Addr, String>,
    /// The last line, which is not said twice: firmware asks again and again.
    last: String,
}

impl Progress {
    pub(super) fn new(root: &str) -> Self {
        Self { root: format!("{}/", root.trim_end_matches('/')), ..Self::default() }
    }

    /// What a line of the log means to a person, if anything. `neighbour` finds the MAC address of an IPv4 address.
    pub(super) fn line(
        &mut self,
        line: &str,
        neighbour: impl FnOnce(Ipv4Addr) -> Option<String>,
    ) -> Option<String> {
        let (part, text) = line.split_once("]: ").or_else(|| line.split_once(": "))?;
        let said = if part.starts_with("dnsmasq-dhcp") {
            // Every line about a request begins with its number.
            self.dhcp(text.split_once(' ')?.1)
        } else if part.starts_with("dnsmasq-tftp") {
            self.tftp(text, neighbour)
        } else {
            None
        }?;
        if said == self.last {
            return None;
        }
        self.last.clone_from(&said);
        Some(said)
    }

    fn dhcp(&mut self, text: &str) -> Option<String> {
        if text.starts_with("available DHCP subnet") {
            self.firmware = None;
            self.ipxe = false;
        } else if let Some(class) = text.strip_prefix("vendor class: ") {
            self.firmware = firmware(class);
        } else if let Some(class) = text.strip_prefix("user class: ") {
            self.ipxe = class.trim() == "iPXE";
        } else if let Some((_, rest)) = text.strip_prefix("PXE(").and_then(|rest| rest.split_once(") ")) {
            return self.asked(rest);
        } else if let Some(file) = text.strip_prefix("bootfile name: ") {
            return Some(format!("{}: is told to load {file}", self.mac));
        }
        None
    }

    /// `[ADDRESS] MAC proxy`, or a file in the place of `proxy` when the machine asks again for its name.
    fn asked(&mut self, text: &str) -> Option<String> {
        let mut words = text.split_whitespace().peekable();
        let address = words.peek()?.parse().ok();
        if address.is_some() {
            words.next();
        }
        self.mac = words.next()?.to_owned();
        if let Some(address) = address {
            self.machines.insert(address, self.mac.clone());
        }
        if words.next()? != "proxy" {
            return None;
        }
        let firmware = self.firmware.unwrap_or("unknown firmware");
        let client = if self.ipxe { ", iPXE" } else { "" };
        Some(format!("{}: asks how to boot ({firmware}{client})", self.mac))
    }

    fn tftp(&mut self, text: &str, neighbour: impl FnOnce(Ipv4Addr) -> Option<String>) -> Option<String> {
        let (what, address) = text.rsplit_once(' ')?;
        let address: Ipv4Addr = address.parse().ok()?;
        let who = match self.machines.get(&address) {
            Some(mac) => mac.clone(),
            None => {
                let who = neighbour(address).unwrap_or_else(|| address.to_string());
                self.machines.insert(address, who.clone());
                who
            }
        };
        let named = |path: &str| path.strip_prefix(&self.root).unwrap_or(path).to_owned();
        let between = |before, after| what.strip_prefix(before)?.strip_suffix(after);
        let said = if let Some(path) = between("sent ", " to") {
            match named(path) {
                file if is_bundle(&file) => format!("has {file}: done, Umbra starts"),
                file => format!("has {file}"),
            }
        } else if let Some(path) = between("file ", " not found for") {
            match named(path) {
                // How GRUB looks which folder is the machine's.
                file if is_bundle(&file) => format!("has no {file} of its own"),
                file => format!("asks for {file}, which is not there"),
            }
        } else if let Some(path) = between("failed sending ", " to") {
            format!("broke off loading {}", named(path))
        } else if what.starts_with("error ") {
            // Firmware asks for a file's size and hangs up; so does GRUB when it looks whether a file is there.
            return None;
        } else {
            what.to_owned()
        };
        Some(format!("{who}: {said}"))
    }
}

fn is_bundle(file: &str) -> bool {
    file.starts_with(tree::MACHINES) && file.ends_with(tree::BUNDLE)
}

/// The firmware by the architecture in its vendor class, `PXEClient:Arch:00007:…` (RFC 4578, 2.1, and IANA's list).
fn firmware(class: &str) -> Option<&'static str> {
    match class.split("Arch:").nth(1)?.get(..5)?.parse().ok()? {
        0 => Some("BIOS"),
        7 | 9 => Some("UEFI"),
        16 => Some("UEFI, HTTP"),
        6 => Some("32-bit UEFI, which cannot boot Umbra"),
        10 | 11 => Some("ARM, which cannot boot Umbra"),
        _ => None,
    }
}

/// The MAC address behind an IPv4 address, by the kernel's table in the format of `/proc/net/arp`.
pub(super) fn neighbour(table: &str, address: Ipv4Addr) -> Option<String> {
    let address = address.to_string();
    let line = table.lines().find(|line| line.split_whitespace().next() == Some(&address))?;
    line.split_whitespace().nth(3).filter(|mac| *mac != "00:00:00:00:00:00").map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lines: &[&str]) -> Vec<String> {
        let mut progress = Progress::new("/srv/umbra");
        let mac = |_| Some("52:54:00:00:00:01".to_owned());
        lines.iter().filter_map(|line| progress.line(line, mac)).collect()
    }

    #[test]
    fn a_bios_with_ipxe_is_followed_to_the_end() {
        let lines = [
            "dnsmasq-dhcp[8679]: 3168581937 available DHCP subnet: 192.0.2.1/255.255.255.0",
            "dnsmasq-dhcp[8679]: 3168581937 vendor class: PXEClient:Arch:00000:UNDI:002001",
            "dnsmasq-dhcp[8679]: 3168581937 user class: iPXE",
            "dnsmasq-dhcp[8679]: 3168581937 PXE(br0) 52:54:00:12:34:56 proxy",
            "dnsmasq-dhcp[8679]: 3168581937 tags: ipxe, br0",
            "dnsmasq-dhcp[8679]: 0 available DHCP subnet: 192.0.2.1/255.255.255.0",
            "dnsmasq-dhcp[8679]: 0 vendor class: PXEClient",
            "dnsmasq-dhcp[8679]: 0 user class: iPXE",
            "dnsmasq-dhcp[8679]: 0 PXE(br0) 192.0.2.157 52:54:00:12:34:56 boot.ipxe",
            "dnsmasq-dhcp[8679]: 0 bootfile name: boot.ipxe",
            "dnsmasq-tftp[8679]: sent /srv/umbra/boot.ipxe to 192.0.2.157",
            "dnsmasq-tftp[8679]: error 0 TFTP Aborted received from 192.0.2.157",
            "dnsmasq-tftp[8679]: file /srv/umbra/machines/mac-52-54-00-12-34-56/bundle.cpio not found for 192.0.2.157",
            "dnsmasq-tftp[8679]: sent /srv/umbra/umbra to 192.0.2.157",
            "dnsmasq-tftp[8679]: sent /srv/umbra/machines/default/bundle.cpio to 192.0.2.157",
        ];
        assert_eq!(
            told(&lines),
            [
                "52:54:00:12:34:56: asks how to boot (BIOS, iPXE)",
                "52:54:00:12:34:56: is told to load boot.ipxe",
                "52:54:00:12:34:56: has boot.ipxe",
                "52:54:00:12:34:56: has no machines/mac-52-54-00-12-34-56/bundle.cpio of its own",
                "52:54:00:12:34:56: has umbra",
                "52:54:00:12:34:56: has machines/default/bundle.cpio: done, Umbra starts",
            ]
        );
    }

    #[test]
    fn a_uefi_is_known_by_its_architecture() {
        let lines = [
            "dnsmasq-dhcp[1]: 7 available DHCP subnet: 192.0.2.1/255.255.255.0",
            "dnsmasq-dhcp[1]: 7 vendor class: PXEClient:Arch:00007:UNDI:003000",
            "dnsmasq-dhcp[1]: 7 PXE(br0) 52:54:00:00:00:01 proxy",
            "dnsmasq-dhcp[1]: 7 PXE(br0) 52:54:00:00:00:01 proxy",
            "dnsmasq-dhcp[1]: 7 bootfile name: grub-x64.efi",
            "dnsmasq-tftp[1]: error 8 User aborted the transfer received from 192.0.2.9",
            "dnsmasq-tftp[1]: sent /srv/umbra/grub-x64.efi to 192.0.2.9",
            "dnsmasq-tftp[1]: failed sending /srv/umbra/umbra to 192.0.2.9",
            "dnsmasq-tftp[1]: file /srv/umbra/pxelinux.0 not found for 192.0.2.9",
        ];
        assert_eq!(
            told(&lines),
            [
                "52:54:00:00:00:01: asks how to boot (UEFI)",
                "52:54:00:00:00:01: is told to load grub-x64.efi",
                "52:54:00:00:00:01: has grub-x64.efi",
                "52:54:00:00:00:01: broke off loading umbra",
                "52:54:00:00:00:01: asks for pxelinux.0, which is not there",
            ]
        );
    }

    #[test]
    fn firmware_does_not_hide_behind_the_one_before() {
        let lines = [
            "dnsmasq-dhcp[1]: 7 vendor class: PXEClient:Arch:00006:UNDI:003000",
            "dnsmasq-dhcp[1]: 7 PXE(br0) 52:54:00:00:00:01 proxy",
            "dnsmasq-dhcp[1]: 8 available DHCP subnet: 192.0.2.1/255.255.255.0",
            "dnsmasq-dhcp[1]: 8 vendor class: PXEClient",
            "dnsmasq-dhcp[1]: 8 PXE(br0) 52:54:00:00:00:02 proxy",
        ];
        assert_eq!(
            told(&lines),
            [
                "52:54:00:00:00:01: asks how to boot (32-bit UEFI, which cannot boot Umbra)",
                "52:54:00:00:00:02: asks how to boot (unknown firmware)",
            ]
        );
    }

    #[test]
    fn other_lines_say_nothing() {
        let lines = [
            "",
            "dnsmasq[8679]: started, version 2.90 DNS disabled",
            "dnsmasq-dhcp[8679]: DHCP, proxy on subnet 192.0.2.1",
            "dnsmasq-tftp[8679]: TFTP root is /srv/umbra",
            "dnsmasq-dhcp[1]: 7 PXE(",
            "dnsmasq-dhcp[1]: x",
            "dnsmasq-tftp[1]: sent",
        ];
        assert_eq!(told(&lines), [""; 0]);
    }

    #[test]
    fn neighbours_are_read_from_the_kernels_table() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
                     192.0.2.9        0x1         0x2         52:54:00:00:00:01     *        br0\n\
                     192.0.2.10       0x1         0x0         00:00:00:00:00:00     *        br0\n";
        let of = |last| neighbour(table, Ipv4Addr::new(192, 0, 2, last));
        assert_eq!(of(9).as_deref(), Some("52:54:00:00:00:01"));
        assert_eq!((of(10), of(11)), (None, None));
    }
}
