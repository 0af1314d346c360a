//! Why a guest cannot be loaded.
use core::fmt;

use super::File;
use crate::vm::ram::BadGpa;

/// A file and what is wrong with it. The configuration or the file is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error<'a> {
    /// Name of the file.
    pub file: &'a str,
    /// What is wrong with it.
    pub problem: Problem,
}

/// What is wrong with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Neither a bzImage nor an ELF nor Multiboot.
    UnknownFormat,
    /// The file has fewer bytes than its own headers promise.
    CutShort {
        /// Bytes promised.
        promised: u64,
        /// Bytes there are.
        len: u64,
    },
    /// A bzImage whose boot protocol lacks the 64-bit entry: its version, as in 0x020c.
    OldProtocol(u16),
    /// A bzImage for 32-bit CPUs only.
    No64BitEntry,
    /// A header field with an impossible value: its name and the value.
    BadField(&'static str, u64),
    /// An ELF file that is not a little-endian x86 executable, or has broken headers.
    BadElf,
    /// An ELF file that somebody would have to relocate first.
    PositionIndependent,
    /// A 64-bit ELF without the note that says where to enter it.
    NoPvhNote,
    /// A Multiboot header asks for features that nobody defined: its flags.
    MultibootFlags(u32),
    /// Something would be loaded below 1 MiB, at this address.
    TooLow(u64),
    /// The entry point is outside of what is loaded.
    BadEntry(u64),
    /// The kernel needs RAM up to this address, and the VM's RAM below the PCI hole ends at that one.
    NeedsMemory {
        /// Where the kernel ends.
        end: u64,
        /// Where the RAM ends.
        ram_end: u64,
    },
    /// A RAM disk or module of so many bytes does not fit beside the kernel.
    DoesNotFit {
        /// Its length.
        len: u64,
    },
    /// The command line is longer than the kernel takes.
    CmdlineTooLong {
        /// Its length in bytes.
        len: u64,
        /// What the kernel takes.
        max: u64,
    },
    /// Command lines and tables do not fit below 640 KiB.
    TooMuchInformation,
    /// Linux takes one RAM disk and no modules.
    ModulesNotTaken,
    /// Guest RAM has a hole where it should not; the caller's description of it is wrong.
    Ram(BadGpa),
}

impl Problem {
    pub(super) fn of(self, file: File<'_>) -> Error<'_> {
        Error { file: file.name, problem: self }
    }
}

impl From<BadGpa> for Problem {
    fn from(bad: BadGpa) -> Self {
        Self::Ram(bad)
    }
}

impl fmt::Display for Error<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, problem } = self;
        match *problem {
            Problem::UnknownFormat => write!(
                f,
                "{file:?} is not a kernel that can be booted; it must be a Linux bzImage, an ELF with a PVH note \
                 or a Multiboot 1 image"
            ),
            Problem::CutShort { promised, len } => {
                write!(f, "{file:?} is cut short: its header promises {promised} bytes, the file has {len}")
            }
            Problem::OldProtocol(version) => write!(
                f,
                "{file:?} speaks boot protocol {}.{:02}; Linux 3.8 or newer, with 2.12 or newer, is needed",
                version >> 8,
                version & 0xff
            ),
            Problem::No64BitEntry => write!(f, "{file:?} is a 32-bit kernel; a 64-bit one is needed"),
            Problem::BadField(field, value) => {
                write!(f, "{file:?} is damaged: {field} cannot be {value:#x}")
            }
            Problem::BadElf => write!(f, "{file:?} is not a sound ELF executable for x86"),
            Problem::PositionIndependent => {
                write!(f, "{file:?} is a position-independent executable; link it at a fixed address")
            }
            Problem::NoPvhNote => write!(
                f,
                "{file:?} is an ELF file without a PVH note or a Multiboot 1 header, so nobody knows how to enter it"
            ),
            Problem::MultibootFlags(flags) => {
                write!(f, "{file:?} demands unknown features by its Multiboot flags {flags:#x}")
            }
            Problem::TooLow(address) => {
                write!(f, "{file:?} wants to be loaded at {address:#x}; only addresses from 1 MiB up are free")
            }
            Problem::BadEntry(address) => {
                write!(f, "{file:?} is damaged: its entry point {address:#x} is outside of what it loads")
            }
            Problem::NeedsMemory { end, ram_end } => write!(
                f,
                "{file:?} needs memory up to {}M, and the VM has it up to {}M; raise its memory",
                end.div_ceil(1 << 20),
                ram_end >> 20
            ),
            Problem::DoesNotFit { len } => {
                write!(f, "{file:?} has {len} bytes and does not fit into the VM beside the kernel; raise its memory")
            }
            Problem::CmdlineTooLong { len, max } => {
                write!(f, "{file:?} takes a command line of {max} bytes, this one has {len}; shorten it")
            }
            Problem::TooMuchInformation => {
                write!(f, "the command lines and modules for {file:?} do not fit below 640 KiB; shorten them")
            }
            Problem::ModulesNotTaken => {
                write!(f, "{file:?} is Linux, which takes no modules; give it one initrd")
            }
            Problem::Ram(bad) => write!(f, "{file:?} cannot be loaded: {bad}"),
        }
    }
}

impl core::error::Error for Error<'_> {}
