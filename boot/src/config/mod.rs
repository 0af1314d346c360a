//! The schema of umbra.toml, checked by the same code on the host before an image is written and again at boot.
//!
//! Every error is one sentence that begins with file, line and column and says what would be right.

mod depth;
mod error;
mod raw;
mod read;
mod size;

use alloc::string::String;
use alloc::vec::Vec;

pub use error::{Error, Position};
pub use size::{parse_size, SizeError};

use crate::bundle::Bundle;

/// Name of the configuration in a bundle.
pub const FILE_NAME: &str = "umbra.toml";
/// A longer file is refused unread: the heap that parses it at boot is small.
pub const MAX_FILE_BYTES: usize = 64 << 10;
/// Most virtual CPUs a VM can have.
pub const MAX_VCPUS: u32 = 64;
/// Least memory a VM can have, in bytes.
pub const MIN_MEMORY: u64 = 1 << 20;
/// Most memory a VM can have, in bytes: what 46 bits of physical address reach.
pub const MAX_MEMORY: u64 = 1 << 46;
/// A VM's memory is a multiple of this many bytes.
pub const MEMORY_GRANULE: u64 = 4096;
/// Longest name of a VM, in bytes.
pub const MAX_NAME: usize = 64;
/// Longest command line, in bytes: COMMAND_LINE_SIZE of Linux on x86 without the NUL.
pub const MAX_CMDLINE: usize = 2047;

/// A whole umbra.toml.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What happens when the last VM has ended.
    pub at_end: AtEnd,
    /// What the console is made of, as far as the machine has it; at least one.
    pub console: Vec<Console>,
    /// The VMs in the file's order; at least one.
    pub vms: Vec<Vm>,
    /// The name that errors give the file.
    file: String,
}

/// What the machine does when the last VM has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtEnd {
    /// Powers off.
    #[default]
    PowerOff,
    /// Stays on, CPUs halted.
    Halt,
}

/// A device of the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// The first serial port, or the one that the firmware names in its place.
    Com1,
    /// The second serial port.
    Com2,
    /// The screen, as the boot loader left it, and the keyboard.
    Framebuffer,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Its name, unique in the file: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// How many virtual CPUs it has, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// Its memory in bytes, a multiple of [`MEMORY_GRANULE`] from [`MIN_MEMORY`] to [`MAX_MEMORY`].
    pub memory_bytes: u64,
    /// The program to boot.
    pub kernel: FileName,
    /// An initial RAM disk.
    pub initrd: Option<FileName>,
    /// Modules of a Multiboot program.
    pub modules: Vec<Module>,
    /// The kernel's command line, without NUL.
    pub cmdline: String,
    /// How its guest-physical addresses are mapped.
    pub mmu: MmuMode,
    /// Whether it may itself run virtual machines.
    pub nested: bool,
    /// Largest page that backs its memory.
    pub page_size: PageSize,
    /// Port of the exit device, if it has one.
    pub exit_port: Option<u16>,
    /// What a reset does.
    pub on_reset: OnReset,
    /// Whether COM1 is wired to the console.
    pub console: bool,
}

/// The name of a file in the bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileName {
    /// The name as written.
    pub name: String,
    /// Where it is written.
    position: Position,
    /// The key it is the value of.
    key: &'static str,
}

/// A module of a Multiboot program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The file: the first word of the text.
    pub file: FileName,
    /// The whole text, which the program sees: file name and arguments.
    pub cmdline: String,
}

/// How a VM's guest-physical addresses are mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MmuMode {
    /// By the second stage of the hardware: NPT or EPT.
    #[default]
    Direct,
    /// By shadows of the guest's own page tables.
    Shadow,
}

/// Largest page that backs a VM's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageSize {
    /// Up to 2 MiB.
    #[default]
    Auto,
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB, where CPU and alignment allow it.
    Size1G,
}

/// What a VM's reset does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnReset {
    /// Loads and starts it again.
    #[default]
    Restart,
    /// Ends it.
    Stop,
}

impl Config {
    /// Reads the text of an umbra.toml; `file` is its name in errors.
    pub fn parse(file: &str, text: &str) -> Result<Self, Error> {
        read::config(file, text)
    }

    /// Reads the bundle's umbra.toml and checks that the files it names are there.
    pub fn load(bundle: &Bundle<'_>) -> Result<Self, Error> {
        let bytes = bundle
            .file(FILE_NAME)
            .ok_or_else(|| Error::whole_file(FILE_NAME, error::NOT_IN_BUNDLE.into()))?;
        let text = core::str::from_utf8(bytes).map_err(|error| Error::not_utf8(FILE_NAME, bytes, error))?;
        let config = Self::parse(FILE_NAME, text)?;
        config.check_files(bundle)?;
        Ok(config)
    }

    /// Checks that the bundle has every file that a VM names.
    pub fn check_files(&self, bundle: &Bundle<'_>) -> Result<(), Error> {
        match self.files().find(|file| bundle.file(&file.name).is_none()) {
            Some(missing) => Err(missing.not_found(&self.file)),
            None => Ok(()),
        }
    }

    /// Every file that a VM names: what a bundle must hold beside umbra.toml.
    pub fn files(&self) -> impl Iterator<Item = &FileName> {
        self.vms.iter().flat_map(Vm::files)
    }

    /// The error for a named file that cannot be had.
    pub fn file_not_found(&self, file: &FileName) -> Error {
        file.not_found(&self.file)
    }
}

impl Vm {
    /// The files that it names.
    pub fn files(&self) -> impl Iterator<Item = &FileName> {
        core::iter::once(&self.kernel)
            .chain(&self.initrd)
            .chain(self.modules.iter().map(|module| &module.file))
    }
}

impl FileName {
    /// Where it is written.
    pub fn position(&self) -> Position {
        self.position
    }

    fn not_found(&self, config_file: &str) -> Error {
        let Self { name, position, key } = self;
        let message =
            alloc::format!("{key} names {name:?}, which is not in the bundle; add it or correct the name");
        Error::at(config_file, *position, message)
    }
}

#[cfg(test)]
mod tests;
