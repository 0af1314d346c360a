//! ELF executables: segments for every protocol that uses ELF, and PVH, which enters where a note says.
//! ELF specification; Xen docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h.
use core::ops::Range;

use elf::abi;
use elf::endian::LittleEndian;
use elf::note::Note;
use elf::parse::ParseError;
use elf::segment::ProgramHeader;
use elf::ElfBytes;
use zerocopy::{Immutable, IntoBytes};

use super::entry::EntryState;
use super::low::LowMemory;
use super::{e820, load_modules, write_zeros, Error, Format, Loaded, Module, Problem, Request, KERNEL_MIN};
use crate::vm::ram::GuestRam;

/// The note that holds the address of the 32-bit entry point: name and type.
const NOTE_NAME: &[u8] = b"Xen\0";
const XEN_ELFNOTE_PHYS32_ENTRY: u64 = 18;
/// Magic of `hvm_start_info`.
const MAGIC: u32 = 0x336e_c578;

/// `struct hvm_start_info`, version 1.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    map: u64,
    map_entries: u32,
    reserved: u32,
}
const _: () = assert!(size_of::<StartInfo>() == 56);

/// `struct hvm_modlist_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ModuleEntry {
    address: u64,
    size: u64,
    command_line: u64,
    reserved: u64,
}
const _: () = assert!(size_of::<ModuleEntry>() == 32);

/// `struct hvm_memmap_table_entry`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}
const _: () = assert!(size_of::<MapEntry>() == 24);

/// Whether the file is an ELF file of any kind.
pub fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(&abi::ELFMAGIC)
}

/// Whether the file is an ELF file of the 32-bit class.
pub fn is_elf32(bytes: &[u8]) -> bool {
    is_elf(bytes) && bytes.get(abi::EI_CLASS) == Some(&abi::ELFCLASS32)
}

/// An executable for x86.
pub(super) struct Executable<'a> {
    file: &'a [u8],
    elf: ElfBytes<'a, LittleEndian>,
}

impl<'a> Executable<'a> {
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, Problem> {
        if file.get(abi::EI_DATA) != Some(&abi::ELFDATA2LSB) {
            return Err(Problem::BadElf);
        }
        let elf = ElfBytes::minimal_parse(file).map_err(|error| problem(file, error))?;
        let header = &elf.ehdr;
        if header.e_type == abi::ET_DYN {
            return Err(Problem::PositionIndependent);
        }
        // A 64-bit program may come in a 32-bit ELF, for Multiboot loaders that know no other.
        if header.e_type != abi::ET_EXEC || ![abi::EM_386, abi::EM_X86_64].contains(&header.e_machine) {
            return Err(Problem::BadElf);
        }
        Ok(Self { file, elf })
    }

    /// Entry point of the ELF header.
    pub(super) fn entry(&self) -> u64 {
        self.elf.ehdr.e_entry
    }

    fn segments(&self) -> impl Iterator<Item = ProgramHeader> + use<'a> {
        self.elf.segments().into_iter().flatten()
    }

    /// Loads the segments at their physical addresses and returns the range from the first to the last.
    pub(super) fn load(&self, request: &Request<'_>, ram: &impl GuestRam) -> Result<Range<u64>, Problem> {
        let mut all: Option<Range<u64>> = None;
        let ram_end = request.low_ram_end();
        for segment in
            self.segments().filter(|segment| segment.p_type == abi::PT_LOAD && segment.p_memsz != 0)
        {
            let ProgramHeader { p_offset, p_filesz, p_memsz, p_paddr: start, .. } = segment;
            let (len, promised) = (self.file.len() as u64, p_offset.saturating_add(p_filesz));
            if promised > len {
                return Err(Problem::CutShort { promised, len });
            }
            if p_filesz > p_memsz {
                return Err(Problem::BadField("the file size of a segment", p_filesz));
            }
            if start < KERNEL_MIN {
                return Err(Problem::TooLow(start));
            }
            let end = start.saturating_add(p_memsz);
            if end > ram_end {
                return Err(Problem::NeedsMemory { end, ram_end });
            }
            ram.write(start, &self.file[p_offset as usize..promised as usize])?;
            write_zeros(ram, start + p_filesz..end)?;
            let before = all.unwrap_or(start..end);
            all = Some(before.start.min(start)..before.end.max(end));
        }
        all.ok_or(Problem::BadElf)
    }

    /// The address in the PVH note.
    fn pvh_entry(&self) -> Result<u64, Problem> {
        for segment in self.segments().filter(|segment| segment.p_type == abi::PT_NOTE) {
            let notes =
                self.elf.segment_data_as_notes(&segment).map_err(|error| problem(self.file, error))?;
            for note in notes {
                let Note::Unknown(note) = note else { continue };
                if note.n_type != XEN_ELFNOTE_PHYS32_ENTRY || note.name != NOTE_NAME {
                    continue;
                }
                return match *note.desc {
                    [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => Ok(u32::from_le_bytes([a, b, c, d]).into()),
                    ref other => Err(Problem::BadField("the size of the PVH note", other.len() as u64)),
                };
            }
        }
        Err(Problem::NoPvhNote)
    }
}

fn problem(file: &[u8], error: ParseError) -> Problem {
    match error {
        ParseError::SliceReadError((_, end)) if end > file.len() => {
            Problem::CutShort { promised: end as u64, len: file.len() as u64 }
        }
        _ => Problem::BadElf,
    }
}

/// Loads an ELF with a PVH note.
pub fn load<'a>(request: &Request<'a>, ram: &impl GuestRam) -> Result<Loaded, Error<'a>> {
    let of_kernel = |problem: Problem| problem.of(request.kernel);
    let executable = Executable::parse(request.kernel.bytes).map_err(of_kernel)?;
    let eip = executable.pvh_entry().map_err(of_kernel)?;
    let kernel = executable.load(request, ram).map_err(of_kernel)?;
    if !kernel.contains(&eip) {
        return Err(of_kernel(Problem::BadEntry(eip)));
    }

    let mut low = LowMemory::new(ram);
    let entry = EntryState::protected(&mut low, eip).map_err(of_kernel)?;
    let module_count = request.all_modules().count();
    let list = low.reserve((module_count * size_of::<ModuleEntry>()) as u64, 8).map_err(of_kernel)?;
    let mut next = list;
    let modules = load_modules(request, ram, kernel.end, |range, Module { cmdline, .. }| {
        let entry = ModuleEntry {
            address: range.start,
            size: range.end - range.start,
            command_line: low.put_text(&[cmdline])?,
            reserved: 0,
        };
        low.write(next, entry.as_bytes())?;
        next += size_of::<ModuleEntry>() as u64;
        Ok(())
    })?;
    let info = put_start_info(request, &mut low, (list, module_count)).map_err(of_kernel)?;
    Ok(Loaded {
        format: Format::Pvh,
        entry: EntryState { rbx: info, ..entry },
        kernel,
        modules,
        boot_information: low.used(),
    })
}

fn put_start_info(
    request: &Request<'_>,
    low: &mut LowMemory<'_, impl GuestRam>,
    (modules, module_count): (u64, usize),
) -> Result<u64, Problem> {
    let command_line = low.put_text(&[request.cmdline])?;
    let map = e820::map(request.ram_bytes);
    let map_at = low.reserve((map.len() * size_of::<MapEntry>()) as u64, 8)?;
    for (at, e820::Entry { start, len, kind }) in
        (map_at..).step_by(size_of::<MapEntry>()).zip(map.iter().copied())
    {
        let entry = MapEntry { address: start, size: len, kind, reserved: 0 };
        low.write(at, entry.as_bytes())?;
    }
    let info = StartInfo {
        magic: MAGIC,
        version: 1,
        flags: 0,
        module_count: module_count as u32,
        modules: if module_count == 0 { 0 } else { modules },
        command_line,
        rsdp: request.rsdp,
        map: map_at,
        map_entries: map.len() as u32,
        reserved: 0,
    };
    low.put(info.as_bytes(), 8)
}
