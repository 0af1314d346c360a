//! What a machine's firmware loads from the network: GRUB with everything it needs within, for BIOS and for UEFI, and
//! the scripts around it.

use std::path::Path;

use anyhow::{Context, Result};

use super::server::Server;
use crate::exec::CommandLine;
use crate::grub;

/// GRUB's image for a BIOS. The name ends in `.0`, by which boot loaders know a program for PXE (PXE 2.1, 2.2).
pub const BIOS: &str = "grub-bios.0";
/// GRUB's image for UEFI on x86-64.
pub const UEFI: &str = "grub-x64.efi";
/// The script for iPXE.
pub const IPXE: &str = "boot.ipxe";

/// The modules that the two scripts use, and those that find a screen for Umbra. All of them are in the image, so nothing
/// else of GRUB's need be loaded.
const MODULES: [&str; 21] = [
    "all_video",
    "boot",
    "configfile",
    "echo",
    "eval",
    "http",
    "memdisk",
    "multiboot2",
    "net",
    "normal",
    "reboot",
    "regexp",
    "serial",
    "sleep",
    "smbios",
    "tar",
    "terminal",
    "test",
    "tftp",
    "tr",
    "true",
];

/// Where GRUB looks for its configuration in the archive that an image carries; grub-mkimage knows no other place.
const START_CFG: &str = "boot/grub/grub.cfg";

/// The script inside GRUB's images. Without a server it asks the one that the image came from.
fn start_cfg(server: Option<&Server>) -> String {
    fill(include_str!("files/start.cfg"), server, "")
}

/// What chooses the machine's folder and boots; with `http` Umbra and the bundle come from there.
pub(super) fn grub_cfg(http: Option<&Server>) -> String {
    let template = include_str!("files/grub.cfg").replace("@HTTP@", http.map_or("", |http| &http.host));
    fill(&template, http, "")
}

/// iPXE's script.
pub(super) fn ipxe(server: Option<&Server>) -> String {
    fill(include_str!("files/boot.ipxe"), server, "${next-server}")
}

fn fill(template: &str, server: Option<&Server>, unknown: &str) -> String {
    let (host, folder) = server.map_or((unknown, ""), |server| (&server.host, &server.folder));
    template.replace("@SERVER@", host).replace("@FOLDER@", folder)
}

/// Writes both of GRUB's images into the folder `dir`.
pub(super) fn write(server: Option<&Server>, dir: &Path) -> Result<()> {
    let program =
        grub::mkimage().context("grub-mkimage is not installed; `cargo xtask setup` installs it")?;
    let archive = dir.join("start.tar");
    std::fs::write(&archive, start_archive(server)?)
        .with_context(|| format!("cannot write {}", archive.display()))?;
    for (name, platform, format, network) in
        [(BIOS, "i386-pc", "i386-pc-pxe", "pxe"), (UEFI, "x86_64-efi", "x86_64-efi", "efinet")]
    {
        CommandLine::new(program)
            .arg("--directory")
            .arg(grub::platform_folder(platform)?)
            .args(["--format", format, "--memdisk"])
            .arg(&archive)
            .arg("--output")
            .arg(dir.join(name))
            .args(MODULES)
            .arg(network)
            .run_quietly()?;
    }
    std::fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))
}

/// The archive within the images: a tar file, the same at any time and for any user.
fn start_archive(server: Option<&Server>) -> Result<Vec<u8>> {
    let text = start_cfg(server);
    let mut header = tar::Header::new_ustar();
    header.set_size(text.len() as u64);
    header.set_mode(0o644);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, START_CFG, text.as_bytes())?;
    Ok(archive.into_inner()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_written_into_the_scripts() {
        let server: Server = "tftp://192.0.2.1/umbra".parse().unwrap();
        let text = start_cfg(Some(&server));
        for line in ["set server=\"192.0.2.1\"\n", "set folder=\"/umbra\"\n"] {
            assert!(text.contains(line), "{line}");
        }
        assert!(start_cfg(None).contains("set server=\"\"\n"));
        assert!(ipxe(Some(&server)).contains("from server 192.0.2.1 "));
        assert!(ipxe(None).contains("from server ${next-server} "));
        let http: Server = "http://192.0.2.9/umbra".parse().unwrap();
        assert!(grub_cfg(Some(&http)).contains("set files=\"(http,192.0.2.9)/umbra\"\n"));
        assert!(grub_cfg(None).contains("if [ -n \"\" ]; then\n"));
        for server in [None, Some(&server)] {
            for text in [start_cfg(server), grub_cfg(server), ipxe(server)] {
                assert!(!text.contains('@'), "{text}");
            }
        }
    }

    #[test]
    fn scripts_name_the_images_of_the_tree() {
        for name in [BIOS, UEFI] {
            assert!(ipxe(None).contains(name), "{name}");
        }
        assert!(ipxe(None).starts_with("#!ipxe\n"));
    }

    /// Each command of the scripts needs a module within the image: nothing else is there to load it from.
    #[test]
    fn commands_are_in_the_image() {
        let keywords =
            ["if", "then", "else", "fi", "for", "do", "done", "function", "set", "say", "source", "}"];
        for text in [start_cfg(None), grub_cfg(None)] {
            for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'))
            {
                let word = line.trim_start_matches("if ").split([' ', ';']).next().unwrap_or_default();
                let module = match word {
                    "[" => "test",
                    "module2" => "multiboot2",
                    "terminal_input" | "terminal_output" => "terminal",
                    word => word,
                };
                assert!(keywords.contains(&word) || MODULES.contains(&module), "{line}");
            }
        }
    }

    #[test]
    fn the_archive_is_the_same_each_time() {
        let archive = start_archive(None).unwrap();
        assert_eq!(archive, start_archive(None).unwrap());
        let mut entries = tar::Archive::new(&archive[..]);
        let entry = entries.entries().unwrap().next().unwrap().unwrap();
        assert_eq!(entry.path().unwrap(), Path::new(START_CFG));
        assert_eq!(entry.header().mtime().unwrap(), 0);
    }
}
