//! Whether Umbra will take a bundle: its own checks and its own loaders, on the host.

use anyhow::{anyhow, Result};
use boot::bundle::manifest::Manifest;
use boot::bundle::Bundle;
use boot::config::{Config, Vm};
use kernel::vm::layout;
use kernel::vm::load::{self, Format};
use kernel::vm::ram::{BadGpa, GuestRam};

/// Holds the bundle against its manifest, if it has one: how many files it lists.
pub(super) fn manifest(bundle: &Bundle<'_>) -> Result<Option<usize>> {
    let Some(manifest) = Manifest::of(bundle) else { return Ok(None) };
    manifest.verify(bundle, |_, _| {}).map(Some).map_err(|error| anyhow!("{error}"))
}

/// Loads each VM as Umbra will, and returns what their kernels are. `shown` is the configuration's name in errors.
pub(super) fn kernels(shown: &str, config: &Config, bundle: &Bundle<'_>) -> Result<Vec<Format>> {
    config.vms.iter().map(|vm| kernel(shown, vm, bundle)).collect()
}

fn kernel(shown: &str, vm: &Vm, bundle: &Bundle<'_>) -> Result<Format> {
    let modules = load::configured::modules(vm, bundle);
    let request = load::configured::request(vm, bundle, &modules, layout::ACPI_START);
    match load::load(&request, &Unwritten { len: vm.memory_bytes }) {
        Ok(loaded) => Ok(loaded.format),
        Err(error) => {
            let file = vm.files().find(|file| file.name == error.file).unwrap_or(&vm.kernel);
            Err(anyhow!("{shown}:{}: vm {:?}: {error}", file.position(), vm.name))
        }
    }
}

/// A VM's RAM that takes everything and keeps nothing.
struct Unwritten {
    len: u64,
}

impl Unwritten {
    /// RAM has a hole below 4 GiB, where the PCI devices are.
    fn check(&self, gpa: u64, len: usize) -> Result<(), BadGpa> {
        let low_end = self.len.min(layout::PCI_HOLE_START);
        let high_end = layout::PCI_HOLE_END + (self.len - low_end);
        let end = gpa.checked_add(len as u64).ok_or(BadGpa { gpa, len })?;
        let is_ram = end <= low_end || gpa >= layout::PCI_HOLE_END && end <= high_end;
        is_ram.then_some(()).ok_or(BadGpa { gpa, len })
    }
}

impl GuestRam for Unwritten {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), BadGpa> {
        self.check(gpa, buf.len())?;
        buf.fill(0);
        Ok(())
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), BadGpa> {
        self.check(gpa, data.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_ends_where_the_vms_does() {
        let ram = Unwritten { len: 16 << 20 };
        assert!(ram.write((16 << 20) - 4, &[0; 4]).is_ok());
        assert!(ram.write((16 << 20) - 3, &[0; 4]).is_err());
        assert!(ram.write(u64::MAX, &[0; 4]).is_err());
        assert!(ram.read(layout::PCI_HOLE_END, &mut [0; 4]).is_err());
        let large = Unwritten { len: 4 << 30 };
        assert!(large.write(layout::PCI_HOLE_START - 4, &[0; 4]).is_ok());
        assert!(large.write(layout::PCI_HOLE_START, &[0; 4]).is_err());
        assert!(large.read(layout::PCI_HOLE_END + (1 << 30) - 4, &mut [0; 4]).is_ok());
        assert!(large.read(layout::PCI_HOLE_END + (1 << 30), &mut [0; 4]).is_err());
    }
}
