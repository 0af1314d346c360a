//! Umbra starts over the network: on a BIOS and on UEFI, each machine with its own bundle, and with one sentence for
//! what is missing. Nothing leaves the host: QEMU's own network leads nowhere, and so do the namespaces of `serve`.

mod namespace;
mod serve;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Result};
use xtask::bundle::Bundle;
use xtask::emulator::{Boot, Link, Machine, Network};
use xtask::exec::CommandLine;
use xtask::pxe::boot_image;
use xtask::pxe::tree::{self, Contents};
use xtask::pxe::{Key, Server};

use super::linux;
use crate::cases::Cases;
use crate::context::{Ctx, Vm};
use crate::scenario::{Need, Scenario};

pub(super) fn all() -> Vec<Scenario> {
    let scenarios = vec![
        Scenario::new("pxe_tree", whole_tree),
        Scenario::new("pxe_ipxe_linux", |ctx| linux_shell(ctx, Boot::Pxe)).needs(&[Need::Linux]).limit(600),
        Scenario::new("pxe_uefi_linux", |ctx| linux_shell(ctx, Boot::PxeUefi))
            .needs(&[Need::Linux, Need::Uefi])
            .limit(600),
        Scenario::new("pxe_bios", plain_bios).limit(180),
        Scenario::new("pxe_machines", machines).needs(&[Need::Uefi]).limit(600),
        Scenario::new("pxe_umbra_missing", |ctx| missing(ctx, "umbra")).limit(180),
        Scenario::new("pxe_bundle_missing", |ctx| missing(ctx, "machines/default/bundle.cpio")).limit(180),
        Scenario::new("pxe_configuration_missing", |ctx| missing(ctx, "grub.cfg")).limit(180),
        Scenario::new("pxe_ipxe_image_missing", ipxe_image_missing).limit(180),
        Scenario::new("pxe_timeout", timeout).limit(300),
        Scenario::new("pxe_serve", serve::serve).needs(&[Need::Uefi]).limit(400),
    ];
    scenarios.into_iter().map(|scenario| scenario.needs(&[Need::Grub])).collect()
}

/// A bundle with the demo guest under the name `name`.
fn demo(ctx: &Ctx, name: &str) -> Result<Bundle> {
    let config = format!("[[vm]]\nname = \"{name}\"\nmemory = \"32M\"\nkernel = \"demo\"\n");
    Bundle::new(config).file_from("demo", &ctx.images.guest("demo"))
}

/// A tree with a bundle for each of the machines, and one for the others.
fn tree(ctx: &Ctx, default: &Bundle, machines: &[(&str, Bundle)], server: Option<Server>) -> Result<PathBuf> {
    let out = ctx.dir.join("tree");
    let machines = machines
        .iter()
        .map(|(key, bundle)| Ok((key.parse::<Key>().map_err(anyhow::Error::msg)?, bundle.archive()?)))
        .collect::<Result<_>>()?;
    let default = Some(default.archive()?);
    tree::write(&out, &Contents { umbra: &ctx.images.umbra, server, http: None, default, machines })?;
    Ok(out)
}

/// The same contents are the same files; what an administrator has added stays; an error changes nothing.
fn whole_tree(ctx: &Ctx) -> Result<Cases> {
    let out = tree(ctx, &demo(ctx, "demo")?, &[("serial:A", demo(ctx, "a")?)], None)?;
    let first = files(&out)?;
    let again = tree(ctx, &demo(ctx, "demo")?, &[("serial:A", demo(ctx, "a")?)], None)?;
    ensure!(files(&again)? == first, "the same contents make other files");
    let sums = CommandLine::new("sha256sum").args(["--check", "--strict", "--quiet", tree::SUMS]).dir(&out);
    sums.run_quietly()?;

    let added = out.join(tree::MACHINES).join("mac-52-54-00-00-00-01");
    fs::create_dir(&added)?;
    fs::copy(out.join("machines/serial-a/bundle.cpio"), added.join(tree::BUNDLE))?;
    let listed = tree::write(
        &out,
        &Contents { umbra: &ctx.images.umbra, server: None, http: None, default: None, machines: vec![] },
    )?;
    let kept = listed.iter().filter(|file| file.kept).map(|file| file.path.as_str());
    ensure!(
        kept.eq([
            "machines/default/bundle.cpio",
            "machines/mac-52-54-00-00-00-01/bundle.cpio",
            "machines/serial-a/bundle.cpio"
        ]),
        "not every machine's bundle was kept: {listed:?}"
    );
    sums.run_quietly()?;

    let before = files(&out)?;
    let no_umbra = ctx.dir.join("nothing");
    let contents = Contents { umbra: &no_umbra, server: None, http: None, default: None, machines: vec![] };
    ensure!(tree::write(&out, &contents).is_err(), "a tree without Umbra was written");
    ensure!(files(&out)? == before, "a failure has changed the tree");
    ensure!(fs::read_dir(&ctx.dir)?.count() == 1, "a failure has left something beside the tree");
    Ok(Cases::passed())
}

/// Every file below `dir`, by its path, with what is in it.
fn files(dir: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else {
            found.insert(path.clone(), fs::read(&path)?);
        }
    }
    Ok(found)
}

/// The usual machine, on a network.
fn machine(ctx: &Ctx, boot: Boot, network: Network) -> Machine {
    Machine { boot, network: Some(network), ..ctx.machine() }
}

/// Boots a machine that finds everything in its network.
fn boot(ctx: &Ctx, machine: &Machine) -> Result<Vm> {
    ctx.boot(machine, &Bundle::new(""))
}

fn linux_shell(ctx: &Ctx, boot_by: Boot) -> Result<Cases> {
    let tree = tree(ctx, &linux::bundle(ctx, "")?, &[], None)?;
    let mut vm = boot(ctx, &machine(ctx, boot_by, Network::user(tree)))?;
    vm.expect("umbra: loading machines/default/bundle.cpio")?;
    linux::reach_shell(&mut vm)?;
    linux::compute(&mut vm)?;
    linux::power_off(vm)?;
    Ok(Cases::passed())
}

/// Waits for the demo guest `name`, and has it switch off; what GRUB said before.
fn run_demo(mut vm: Vm, name: &str) -> Result<String> {
    vm.expect(&format!("^umbra: vm \"{name}\": 1 vCPU"))?;
    vm.expect("^demo> ")?;
    vm.type_line("poweroff")?;
    vm.expect(&format!("^umbra: vm \"{name}\": powered off$"))?;
    Ok(vm.end_with(0)?.log)
}

/// A BIOS that loads GRUB itself, as one without iPXE does.
fn plain_bios(ctx: &Ctx) -> Result<Cases> {
    let tree = tree(ctx, &demo(ctx, "plain")?, &[], None)?;
    let network = Network::new(Link::User { tree, boot_file: Some(boot_image::BIOS.into()) });
    let log = run_demo(boot(ctx, &machine(ctx, Boot::Pxe, network))?, "plain")?;
    ensure!(log.contains("umbra: GRUB loads from tftp://10.0.2.2"), "GRUB does not say where it loads from");
    ensure!(!log.contains("umbra: error"), "there is an error in the log of a good run");
    Ok(Cases::passed())
}

const UUID: &str = "0a1b2c3d-0001-4002-8003-aabbccddeeff";

/// One tree, and machines that differ in one thing each. Each takes the bundle of its first key that the tree has. BIOS and
/// UEFI are asked for the keys by different means.
fn machines(ctx: &Ctx) -> Result<Cases> {
    let own = [
        ("mac:52:54:00:00:00:0A", demo(ctx, "mac-a")?),
        ("mac:52:54:00:00:00:0B", demo(ctx, "mac-b")?),
        (&*format!("uuid:{UUID}"), demo(ctx, "uuid")?),
        ("serial:ACME-7.x", demo(ctx, "serial")?),
    ];
    let tree = tree(ctx, &demo(ctx, "others")?, &own, None)?;
    let network = |mac: &str, uuid: Option<&str>, serial: Option<&str>| Network {
        mac: mac.into(),
        uuid: uuid.map(Into::into),
        serial: serial.map(Into::into),
        ..Network::user(&tree)
    };
    for (boot_by, guest, folder, network) in [
        (
            Boot::Pxe,
            "mac-a",
            "mac-52-54-00-00-00-0a",
            network("52:54:00:00:00:0a", Some(UUID), Some("ACME-7.x")),
        ),
        (Boot::PxeUefi, "mac-b", "mac-52-54-00-00-00-0b", network("52:54:00:00:00:0b", None, None)),
        (
            Boot::PxeUefi,
            "uuid",
            &format!("uuid-{UUID}"),
            network("52:54:00:00:00:01", Some(UUID), Some("ACME-7.x")),
        ),
        (Boot::Pxe, "serial", "serial-acme-7.x", network("52:54:00:00:00:01", None, Some(" Acme-7.X "))),
        (Boot::PxeUefi, "others", "default", network("52:54:00:00:00:01", None, Some("ACME 7"))),
    ] {
        let log = run_demo(boot(ctx, &machine(ctx, boot_by, network))?, guest)?;
        let line = format!("umbra: loading machines/{folder}/bundle.cpio");
        ensure!(log.contains(&line), "GRUB does not say `{line}`");
    }
    Ok(Cases::passed())
}

/// A tree without `file`: GRUB names it and the server, and tries again.
fn missing(ctx: &Ctx, file: &str) -> Result<Cases> {
    let tree = tree(ctx, &demo(ctx, "demo")?, &[], None)?;
    fs::remove_file(tree.join(file))?;
    let mut vm = boot(ctx, &machine(ctx, Boot::Pxe, Network::user(&tree)))?;
    vm.expect(&format!("^umbra: cannot load {file}\\s+from\\s+tftp://10.0.2.2;\\s+again\\s+in"))?;
    // An administrator puts it there, and need not touch the machine.
    let demo = self::tree(ctx, &demo(ctx, "demo")?, &[], None)?;
    ensure!(demo.join(file).is_file(), "the tree is not whole again");
    run_demo(vm, "demo")?;
    Ok(Cases::passed())
}

/// A tree without GRUB: iPXE says so, on the screen.
fn ipxe_image_missing(ctx: &Ctx) -> Result<Cases> {
    let tree = tree(ctx, &demo(ctx, "demo")?, &[], None)?;
    fs::remove_file(tree.join(boot_image::BIOS))?;
    let network = Network { screen_on_serial: true, ..Network::user(tree) };
    let mut vm = boot(ctx, &machine(ctx, Boot::Pxe, network))?;
    for _ in 0..2 {
        vm.expect("umbra: cannot load grub-bios.0 from server 10.0.2.2")?;
    }
    Ok(Cases::passed())
}

/// A server that never answers: QEMU's name server is there, but serves no files.
fn timeout(ctx: &Ctx) -> Result<Cases> {
    let server = "tftp://10.0.2.3".parse().map_err(anyhow::Error::msg)?;
    let tree = tree(ctx, &demo(ctx, "demo")?, &[], Some(server))?;
    let mut vm = boot(ctx, &machine(ctx, Boot::Pxe, Network::user(tree)))?;
    vm.expect("^umbra: GRUB loads from tftp://10.0.2.3$")?;
    vm.expect("^umbra: cannot load grub.cfg\\s+from\\s+tftp://10.0.2.3;\\s+again\\s+in")?;
    Ok(Cases::passed())
}
