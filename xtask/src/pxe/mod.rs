//! `pxe`: a tree from which machines boot Umbra over the network, and its server.

pub mod boot_image;
mod interface;
pub mod key;
mod progress;
mod serve;
mod server;
pub mod tree;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{bail, Result};

pub use self::key::{Key, MachineFile};
pub use self::server::{Protocol, Server};
use self::tree::Contents;
use crate::bundle::Bundle;
use crate::guest::description::{self, Request};
use crate::setup::{self, Component};
use crate::{build, paths, say, sys};

/// The command line of `pxe`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where the tree goes: a folder that is new, empty or of an earlier `pxe` [default: target/pxe]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// What machines without a folder of their own boot: an umbra.toml or a bundle [default: what an earlier tree at DIR
    /// has, else the guest that `run` boots]
    #[arg(long, value_name = "FILE")]
    pub bundle: Option<PathBuf>,
    /// What one machine boots; KEY is mac:52:54:00:12:34:56, uuid:… or serial:…; may be repeated
    #[arg(long = "machine", value_name = "KEY=FILE")]
    pub machines: Vec<MachineFile>,
    /// The TFTP server that the tree is for: tftp://192.0.2.1/FOLDER or an address alone [default: the one that GRUB came from;
    /// with --serve this machine]
    #[arg(long, value_name = "URL", value_parser = Server::tftp)]
    pub server: Option<Server>,
    /// Load Umbra and the bundles by HTTP, which is faster, from where a server has the tree: http://192.0.2.1/FOLDER
    #[arg(long, value_name = "URL", value_parser = Server::http)]
    pub http: Option<Server>,
    /// Serve the tree on this network interface until Ctrl-C, beside the DHCP server that is there
    #[arg(long, value_name = "IFACE", num_args = 0..=1, default_missing_value = "")]
    pub serve: Option<String>,
}

impl Options {
    /// Refuses, before anything is installed or built, what cannot work; the address to serve at.
    fn check(&self, out: &Path) -> Result<Option<std::net::Ipv4Addr>> {
        for (i, machine) in self.machines.iter().enumerate() {
            if let Some(other) = self.machines[..i].iter().find(|other| other.key == machine.key) {
                bail!(
                    "--machine names {} twice, with {} and {}; leave one out",
                    machine.key,
                    paths::display(&other.file),
                    paths::display(&machine.file)
                );
            }
        }
        tree::check(out)?;
        let Some(name) = &self.serve else { return Ok(None) };
        let address = interface::address(name, &interface::all()?)?;
        if !sys::is_root() {
            bail!("only root can serve DHCP and TFTP; run it as root, such as by: sudo env \"PATH=$PATH\" cargo xtask pxe --serve {name}");
        }
        Ok(Some(address))
    }
}

/// Writes the tree, prints what is in it and, if asked to, serves it.
pub fn pxe(options: &Options) -> Result<ExitCode> {
    let out = options.out.clone().unwrap_or_else(|| paths::target_dir().join("pxe"));
    let address = options.check(&out)?;
    // Read before anything is built, so that a mistake in them is told at once.
    let given = options.bundle.as_deref().map(archive).transpose()?;
    let machines = options
        .machines
        .iter()
        .map(|machine| Ok((machine.key.clone(), archive(&machine.file)?)))
        .collect::<Result<Vec<_>>>()?;
    let wants_guest = given.is_none() && !tree::has_default(&out);
    let mut needed = vec![Component::Target, Component::Grub];
    needed.extend(wants_guest.then_some(Component::Linux));
    needed.extend(address.is_some().then_some(Component::Dnsmasq));
    let ready = setup::ensure(&needed)?;
    let images = build::build(ready.compiler()?)?;
    let default = if wants_guest {
        let dir = paths::target_dir().join("pxe-guest");
        Some(archive_of(description::write(&Request::default(), ready.linux.as_ref(), &dir)?)?)
    } else {
        given
    };
    let server = options.server.clone().or_else(|| address.map(Server::from));
    let http = options.http.clone();
    let files = tree::write(&out, &Contents { umbra: &images.umbra, server, http, default, machines })?;
    for file in &files {
        let kept = if file.kept { "  (kept)" } else { "" };
        println!("{:>12} bytes  sha256 {}  {}{kept}", file.size_bytes, file.sha256, file.path);
    }
    say!("the tree is {}", paths::display(&out));
    if let Some((name, address)) = options.serve.as_ref().zip(address) {
        serve::serve(name, address, &out.canonicalize()?)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn archive(file: &Path) -> Result<Vec<u8>> {
    archive_of(Bundle::load(file)?)
}

/// With a manifest: TFTP notices little of what goes wrong on the way.
fn archive_of(bundle: Bundle) -> Result<Vec<u8>> {
    bundle.with_manifest().archive()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn parse(args: &[&str]) -> Result<Options, String> {
        Cli::try_parse_from(["pxe"].iter().chain(args))
            .map(|cli| cli.options)
            .map_err(|error| error.to_string())
    }

    fn refusal(args: &[&str]) -> String {
        parse(args).unwrap().check(Path::new("/nonexistent/tree")).unwrap_err().to_string()
    }

    #[test]
    fn machines_are_named_once() {
        let options = parse(&["--machine", "serial:A=a.toml", "--machine", "MAC:52:54:00:00:00:01=b.toml"]);
        assert!(options.unwrap().check(Path::new("/nonexistent/tree")).unwrap().is_none());
        let error = refusal(&["--machine", "serial:A=a.toml", "--machine", "Serial:a=b.toml"]);
        assert_eq!(error, "--machine names serial:a twice, with a.toml and b.toml; leave one out");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (args, words) in [
            (&["--machine", "mac:1=x"][..], "is not a MAC address"),
            (&["--machine", "x"], "names no machine"),
            (&["--server", "http://x"], "is not TFTP"),
            (&["--http", "tftp://x"], "is not HTTP"),
        ] {
            let error = parse(args).err().unwrap();
            assert!(error.contains(words), "{args:?}: {error}");
        }
    }

    #[test]
    fn nothing_is_served_on_an_interface_that_is_not_named() {
        assert!(refusal(&["--serve"]).starts_with("--serve wants the interface to serve on; "));
        assert!(refusal(&["--serve", "no-such-0"]).starts_with("there is no interface \"no-such-0\"; "));
        assert!(refusal(&["--serve", "lo"]).starts_with("lo is the loopback"));
    }
}
