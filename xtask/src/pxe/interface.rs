//! The network interfaces of this machine, to serve on one of them.

use std::net::Ipv4Addr;

use anyhow::{bail, Context, Result};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

/// One of the machine's network interfaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    /// Its first IPv4 address.
    pub(super) address: Option<Ipv4Addr>,
    pub(super) loopback: bool,
}

/// All interfaces, in the system's order.
pub(super) fn all() -> Result<Vec<Interface>> {
    let mut all: Vec<Interface> = Vec::new();
    for entry in getifaddrs().context("cannot list the network interfaces")? {
        let address = entry.address.as_ref().and_then(|a| a.as_sockaddr_in()).map(|a| a.ip());
        match all.iter_mut().find(|known| known.name == entry.interface_name) {
            Some(known) => known.address = known.address.or(address),
            None => all.push(Interface {
                loopback: entry.flags.contains(InterfaceFlags::IFF_LOOPBACK),
                name: entry.interface_name,
                address,
            }),
        }
    }
    Ok(all)
}

/// The address to serve at on the interface `name`, or why that cannot be.
pub(super) fn address(name: &str, all: &[Interface]) -> Result<Ipv4Addr> {
    let listed = || match all.iter().filter(|interface| !interface.loopback).map(shown).collect::<Vec<_>>() {
        names if names.is_empty() => "this machine has none but the loopback".to_owned(),
        names => format!("there are {}", names.join(", ")),
    };
    if name.is_empty() {
        bail!("--serve wants the interface to serve on; {}", listed());
    }
    let Some(interface) = all.iter().find(|interface| interface.name == name) else {
        bail!("there is no interface {name:?}; {}", listed());
    };
    if interface.loopback {
        bail!("{name} is the loopback, on which no other machine is; {}", listed());
    }
    interface.address.with_context(|| {
        format!("{name} has no IPv4 address, which machines need to reach it; give it one; {}", listed())
    })
}

fn shown(interface: &Interface) -> String {
    match interface.address {
        Some(address) => format!("{} ({address})", interface.name),
        None => format!("{} (no IPv4 address)", interface.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_interface_that_machines_can_reach_is_taken() {
        let interface = |name: &str, address: Option<[u8; 4]>, loopback| Interface {
            name: name.into(),
            address: address.map(Into::into),
            loopback,
        };
        let all = [
            interface("lo", Some([127, 0, 0, 1]), true),
            interface("eth0", Some([192, 0, 2, 7]), false),
            interface("eth1", None, false),
        ];
        assert_eq!(address("eth0", &all).unwrap(), Ipv4Addr::new(192, 0, 2, 7));
        for (name, words) in [
            ("", "wants the interface"),
            ("eth9", "no interface \"eth9\""),
            ("lo", "is the loopback"),
            ("eth1", "has no IPv4 address"),
        ] {
            let error = address(name, &all).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert!(error.ends_with("there are eth0 (192.0.2.7), eth1 (no IPv4 address)"), "{error}");
        }
        assert!(address("x", &all[..1]).unwrap_err().to_string().ends_with("none but the loopback"));
    }

    #[test]
    fn this_machine_has_a_loopback() {
        assert!(all().unwrap().iter().any(|interface| interface.loopback));
    }
}
