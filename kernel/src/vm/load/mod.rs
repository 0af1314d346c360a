//! Guest loaders: from the files of a VM to guest memory and the first state of its boot CPU.
//!
//! Files are hostile: whatever they say, a loader writes only to guest RAM and ends with a sentence or a bootable
//! guest. Where things go:
//!
//! | guest-physical | what |
//! |---|---|
//! | 0x1000 to 640 KiB | boot information: GDT, page tables, parameters, command line (`low::LowMemory`) |
//! | 1 MiB up | the kernel, where it wants to be |
//! | behind it, or at the end of low RAM | RAM disk and modules |

pub mod bzimage;
pub mod configured;
pub mod e820;
pub mod elf;
pub mod entry;
mod error;
mod low;
pub mod multiboot1;

use core::fmt;
use core::ops::Range;

use super::layout;
use super::ram::GuestRam;
pub use entry::{EntryState, Mode, Segment, TableRegister};
pub use error::{Error, Problem};

/// A file with the name that errors give it.
#[derive(Clone, Copy, Debug)]
pub struct File<'a> {
    /// Its name in umbra.toml.
    pub name: &'a str,
    /// Its contents.
    pub bytes: &'a [u8],
}

/// A file that the guest gets beside its kernel, with a text of its own.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// The file.
    pub file: File<'a>,
    /// What the guest is told about it: usually name and arguments.
    pub cmdline: &'a str,
}

/// All that a loader needs to know of a VM.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The kernel; its format is detected.
    pub kernel: File<'a>,
    /// Linux's initial RAM disk; to other kernels the first module.
    pub initrd: Option<File<'a>>,
    /// Further modules, for Multiboot and PVH.
    pub modules: &'a [Module<'a>],
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The VM's RAM in bytes, PCI hole not counted.
    pub ram_bytes: u64,
    /// Guest-physical address of the ACPI RSDP.
    pub rsdp: u64,
}

/// What is where after loading, and how to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// What the kernel is.
    pub format: Format,
    /// First state of the boot CPU.
    pub entry: EntryState,
    /// The kernel with the memory it needs at once.
    pub kernel: Range<u64>,
    /// RAM disk and modules; empty if there are none.
    pub modules: Range<u64>,
    /// Boot information: needed until the guest has read it.
    pub boot_information: Range<u64>,
}

/// Kinds of kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Linux, by its 64-bit boot protocol.
    BzImage,
    /// ELF with a PVH entry note.
    Pvh,
    /// Multiboot 1.
    Multiboot1,
}

impl Format {
    /// What the file is, by its magic numbers, or `None`. A 64-bit ELF with both a PVH note and a Multiboot 1
    /// header is PVH, since Multiboot 1 knows 32-bit ELF only.
    pub fn detect(bytes: &[u8]) -> Option<Self> {
        if bzimage::is_bzimage(bytes) {
            return Some(Self::BzImage);
        }
        match multiboot1::Header::find(bytes) {
            Some(header) if header.has_addresses() || elf::is_elf32(bytes) => Some(Self::Multiboot1),
            _ => elf::is_elf(bytes).then_some(Self::Pvh),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BzImage => "Linux bzImage",
            Self::Pvh => "ELF with PVH entry",
            Self::Multiboot1 => "Multiboot 1 image",
        })
    }
}

/// Loads a VM's kernel and modules into its RAM.
pub fn load<'a>(request: &Request<'a>, ram: &impl GuestRam) -> Result<Loaded, Error<'a>> {
    match Format::detect(request.kernel.bytes) {
        Some(Format::BzImage) => bzimage::load(request, ram),
        Some(Format::Pvh) => elf::load(request, ram),
        Some(Format::Multiboot1) => multiboot1::load(request, ram),
        None => Err(Problem::UnknownFormat.of(request.kernel)),
    }
}

impl<'a> Request<'a> {
    /// RAM disk and modules in the order in which a kernel that knows only modules gets them.
    fn all_modules(&self) -> impl Iterator<Item = Module<'a>> + Clone + use<'a> {
        let initrd = self.initrd.map(|file| Module { file, cmdline: file.name });
        initrd.into_iter().chain(self.modules.iter().copied())
    }

    /// End of the RAM below the PCI hole.
    fn low_ram_end(&self) -> u64 {
        self.ram_bytes.min(layout::PCI_HOLE_START)
    }
}

/// Page granularity of everything that is placed.
const PAGE: u64 = 4096;
/// Kernels are loaded from here on: below are boot information, video memory and firmware tables.
const KERNEL_MIN: u64 = 1 << 20;

/// `address` rounded up to a multiple of `alignment`, a power of two.
fn align_up(address: u64, alignment: u64) -> Option<u64> {
    address.checked_add(alignment - 1).map(|address| address & !(alignment - 1))
}

/// Writes zeros. The caller has checked the range against the size of the RAM.
fn write_zeros(ram: &impl GuestRam, range: Range<u64>) -> Result<(), Problem> {
    const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
    let mut gpa = range.start;
    while gpa < range.end {
        let len = (range.end - gpa).min(PAGE);
        ram.write(gpa, &ZEROS[..len as usize])?;
        gpa += len;
    }
    Ok(())
}

/// Places the modules one behind the other on page boundaries from `start` on, calls `note` with each one's range
/// and text, and returns the range of all.
fn load_modules<'a>(
    request: &Request<'a>,
    ram: &impl GuestRam,
    start: u64,
    mut note: impl FnMut(Range<u64>, Module<'a>) -> Result<(), Problem>,
) -> Result<Range<u64>, Error<'a>> {
    let mut end = start;
    for module in request.all_modules() {
        let file = module.file;
        let does_not_fit = || Problem::DoesNotFit { len: file.bytes.len() as u64 }.of(file);
        let at = align_up(end, PAGE).ok_or_else(does_not_fit)?;
        end = at.checked_add(file.bytes.len() as u64).ok_or_else(does_not_fit)?;
        if end > request.low_ram_end() {
            return Err(does_not_fit());
        }
        ram.write(at, file.bytes).map_err(|bad| Problem::Ram(bad).of(file))?;
        note(at..end, module).map_err(|problem| problem.of(request.kernel))?;
    }
    Ok(start..end)
}

/// Little-endian fields of a file's header.
mod field {
    pub(super) fn u16(bytes: &[u8], offset: usize) -> Option<u16> {
        Some(u16::from_le_bytes(bytes.get(offset..offset.checked_add(2)?)?.try_into().ok()?))
    }

    pub(super) fn u32(bytes: &[u8], offset: usize) -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
    }

    pub(super) fn u64(bytes: &[u8], offset: usize) -> Option<u64> {
        Some(u64::from_le_bytes(bytes.get(offset..offset.checked_add(8)?)?.try_into().ok()?))
    }
}

#[cfg(test)]
mod tests;
