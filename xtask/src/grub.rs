//! What GRUB is told, the text of its configuration files, and what it is made of.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::exec::{find_program, CommandLine};

/// The modules that every core image of ours has within: those that the configurations use, and a few commands for a
/// person at GRUB's prompt. With all of them in the core nothing else of GRUB need be found when it starts.
pub const MODULES: [&str; 25] = [
    "all_video",
    "boot",
    "cat",
    "configfile",
    "cpuid",
    "echo",
    "fat",
    "gfxterm",
    "halt",
    "iso9660",
    "ls",
    "minicmd",
    "multiboot2",
    "normal",
    "part_gpt",
    "part_msdos",
    "rdmsr",
    "reboot",
    "search",
    "search_fs_file",
    "serial",
    "sleep",
    "terminal",
    "test",
    "wrmsr",
];

/// GRUB's maker of core images, by the names that distributions give it.
pub fn mkimage() -> Option<&'static str> {
    ["grub-mkimage", "grub2-mkimage"].into_iter().find(|name| find_program(name).is_some())
}

/// The folder with GRUB's modules for `platform`, such as `i386-pc`.
pub fn platform_folder(platform: &str) -> Result<PathBuf> {
    let places = ["/usr/lib/grub", "/usr/share/grub2", "/usr/local/lib/grub"];
    let folder = places.iter().map(|place| Path::new(place).join(platform)).find(|folder| folder.is_dir());
    folder.with_context(|| {
        format!("GRUB's modules for {platform} are not installed; `cargo xtask setup` installs or names them")
    })
}

/// Makes the core image `output` in the format `format` of GRUB's `platform`, with [`MODULES`] and `more` within. It
/// executes `config` before anything else, and looks for its own files at `prefix`. The same GRUB makes the same bytes.
pub fn make_core(
    (platform, format): (&str, &str),
    (config, prefix): (&str, &str),
    more: &[&str],
    output: &Path,
) -> Result<()> {
    let mkimage = mkimage().context("grub-mkimage is not installed; `cargo xtask setup` installs it")?;
    let config_file = output.with_extension("early.cfg");
    fs::write(&config_file, config).with_context(|| format!("cannot write {}", config_file.display()))?;
    CommandLine::new(mkimage)
        .arg("-d")
        .arg(platform_folder(platform)?)
        .args(["-O", format, "-p", prefix, "-c"])
        .arg(&config_file)
        .arg("-o")
        .arg(output)
        .args(MODULES)
        .args(more)
        .run_quietly()?;
    Ok(fs::remove_file(config_file)?)
}

/// What the core of an image does first: it finds the medium that has the file `marker`, wherever the firmware has put
/// it, and takes its configuration from there.
pub fn find_image_cfg(marker: &str) -> String {
    format!("search --no-floppy --set=root --file {marker}\nset prefix=($root)/boot/grub\n")
}

/// The configuration of an image: GRUB talks on the serial line where there is one, and starts Umbra at once, after the
/// command `first`. What it cannot read it says on the screen as well.
pub fn image_cfg(first: &str) -> String {
    let menu = "\
if serial --unit=0 --speed=115200; then
    set with_serial=yes
    terminal_input serial console
    terminal_output serial
fi
set timeout=0
set default=0
function say {
    if [ \"$with_serial\" = yes ]; then
        terminal_output console
        echo \"umbra: $1\"
        terminal_output serial
    fi
    echo \"umbra: $1\"
}
menuentry \"Umbra\" {
    say \"GRUB loads Umbra and its bundle\"
    if multiboot2 /boot/umbra; then
        if module2 /boot/bundle.cpio; then
            boot
        fi
    fi
    say \"this medium cannot be read; write the image to it again, or take another (Esc: GRUB's menu)\"
    sleep --interruptible 3600
}
";
    menu.replace("    say \"GRUB loads", &format!("    {first}\n    say \"GRUB loads"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_menu_loads_what_the_image_holds() {
        for line in ["multiboot2 /boot/umbra;", "module2 /boot/bundle.cpio;", "set timeout=0\n"] {
            assert!(image_cfg("").contains(line), "{line}");
        }
        assert!(image_cfg("wrmsr 1 2").contains("{\n    wrmsr 1 2\n    say "));
    }
}
