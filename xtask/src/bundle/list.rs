//! What is in a bundle, in lines for a person: its files, whether its manifest is right, its virtual machines.

use anyhow::{Context, Result};
use boot::bundle::manifest::{self, Digest};
use boot::bundle::{plain, Bundle, Entry, Kind};
use boot::config::{Config, Vm, FILE_NAME};
use kernel::vm::load::Format;

use super::check;
use crate::size::Size;

/// Prints line by line what is in `archive`, whose name is `shown`. What Umbra would refuse is the error, after the lines
/// that could still be said.
pub fn list(shown: &str, archive: &[u8], mut print: impl FnMut(&str)) -> Result<()> {
    print(&file_line(shown, archive));
    let bundle = Bundle::new(archive).with_context(|| shown.to_owned())?;
    let config = Config::load(&bundle);
    for entry in bundle.entries() {
        print(&format!("  {}", entry_line(&entry, config.as_ref().ok())));
    }
    match check::manifest(&bundle).with_context(|| shown.to_owned())? {
        Some(files) => {
            print(&format!("manifest: all {files} files are as {} lists them", manifest::FILE_NAME))
        }
        None => print(&format!("manifest: none ({})", manifest::FILE_NAME)),
    }
    let config = config.with_context(|| shown.to_owned())?;
    let kernels = check::kernels(FILE_NAME, &config, &bundle).with_context(|| shown.to_owned())?;
    for (vm, kernel) in config.vms.iter().zip(kernels) {
        print(&vm_line(vm, kernel));
    }
    Ok(())
}

/// A file's size, digest and name, in columns. A name that a terminal would obey is quoted.
pub fn file_line(name: &str, data: &[u8]) -> String {
    let quoted = if name.contains(char::is_control) { format!("{name:?}") } else { name.to_owned() };
    format!("{:>12} bytes  sha256 {}  {quoted}", data.len(), Digest::of(data))
}

fn entry_line(entry: &Entry<'_>, config: Option<&Config>) -> String {
    let name = entry.name;
    if entry.kind != Kind::File {
        return format!("{name:?} is no file and is not used");
    }
    let needed = |config: &Config| {
        [FILE_NAME, manifest::FILE_NAME].contains(&name)
            || config.files().any(|file| plain(&file.name) == name)
    };
    let unused = if config.is_none_or(needed) { "" } else { " (no VM names it)" };
    format!("{}{unused}", file_line(name, entry.data))
}

fn vm_line(vm: &Vm, kernel: Format) -> String {
    let vcpus = if vm.vcpus == 1 { "1 vCPU".to_owned() } else { format!("{} vCPUs", vm.vcpus) };
    let mut line = format!(
        "vm {:?}: {vcpus}, {} of memory, {kernel} {:?}",
        vm.name,
        Size::of_bytes(vm.memory_bytes),
        vm.kernel.name
    );
    if let Some(initrd) = &vm.initrd {
        line += &format!(", initrd {:?}", initrd.name);
    }
    for module in &vm.modules {
        line += &format!(", module {:?}", module.file.name);
    }
    line
}
