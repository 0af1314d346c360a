//! What a loader needs to know of a VM, from its section in umbra.toml and the bundle's files.
use alloc::vec::Vec;

use boot::bundle::Bundle;
use boot::config::{FileName, Vm};

use super::{File, Module, Request};

/// The modules that `vm` names.
pub fn modules<'a>(vm: &'a Vm, bundle: &Bundle<'a>) -> Vec<Module<'a>> {
    vm.modules
        .iter()
        .map(|module| Module { file: file(bundle, &module.file), cmdline: &module.cmdline })
        .collect()
}

/// What is to be loaded for `vm`, with the `modules` that it names. The RSDP will be at `rsdp`.
pub fn request<'a>(vm: &'a Vm, bundle: &Bundle<'a>, modules: &'a [Module<'a>], rsdp: u64) -> Request<'a> {
    Request {
        kernel: file(bundle, &vm.kernel),
        initrd: vm.initrd.as_ref().map(|initrd| file(bundle, initrd)),
        modules,
        cmdline: &vm.cmdline,
        ram_bytes: vm.memory_bytes,
        rsdp,
    }
}

/// A file that the configuration names; `Config::load` has seen that it is there.
fn file<'a>(bundle: &Bundle<'a>, file: &'a FileName) -> File<'a> {
    File { name: &file.name, bytes: bundle.file(&file.name).unwrap_or_default() }
}
