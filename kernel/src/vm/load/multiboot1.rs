//! Multiboot 1: 32-bit ELF, or any file whose header tells where it goes. Multiboot specification 0.6.96.
use core::ops::Range;

use super::elf::Executable;
use super::entry::EntryState;
use super::low::LowMemory;
use super::{
    e820, field, load_modules, write_zeros, Error, Format, Loaded, Module, Problem, Request, KERNEL_MIN,
};
use crate::vm::layout;
use crate::vm::ram::GuestRam;

/// Magic of the header (section 3.1.2).
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header is within so many bytes of the file's start, 4-aligned (3.1).
const SEARCHED: usize = 8192;
/// What EAX holds when the kernel starts (3.2).
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// Flags 0 to 15 must be obeyed; these are the known ones: page-aligned modules, memory information, video mode.
/// Modules are always aligned, memory is always told, and a video mode is a wish.
const KNOWN_DEMANDS: u32 = 0x7;
const DEMANDS: u32 = 0xffff;
/// The header has the addresses of section 3.1.3.
const HAS_ADDRESSES: u32 = 1 << 16;

/// Flags of the information (3.3): which of its fields are valid.
mod valid {
    pub(super) const MEMORY: u32 = 1 << 0;
    pub(super) const CMDLINE: u32 = 1 << 2;
    pub(super) const MODULES: u32 = 1 << 3;
    pub(super) const MAP: u32 = 1 << 6;
    pub(super) const LOADER_NAME: u32 = 1 << 9;
}

/// Length of the information, and the offsets of the fields that are filled (3.3).
mod info {
    pub(super) const SIZE: usize = 116;
    pub(super) const FLAGS: usize = 0;
    pub(super) const MEM_LOWER: usize = 4;
    pub(super) const MEM_UPPER: usize = 8;
    pub(super) const CMDLINE: usize = 16;
    pub(super) const MODS_COUNT: usize = 20;
    pub(super) const MODS_ADDR: usize = 24;
    pub(super) const MMAP_LENGTH: usize = 44;
    pub(super) const MMAP_ADDR: usize = 48;
    pub(super) const BOOT_LOADER_NAME: usize = 64;
}

/// Length of a module's entry: start, end, text, reserved.
const MODULE_ENTRY: u64 = 16;
/// Length of a map entry without the field that holds this very number.
const MAP_ENTRY: u32 = 20;

/// A Multiboot 1 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where it is in the file.
    offset: usize,
    flags: u32,
}

impl Header {
    /// Finds the header: the first place where magic and checksum are right.
    pub fn find(bytes: &[u8]) -> Option<Self> {
        let searched = &bytes[..bytes.len().min(SEARCHED)];
        (0..searched.len()).step_by(4).find_map(|offset| {
            let magic = field::u32(searched, offset)?;
            let flags = field::u32(searched, offset + 4)?;
            let checksum = field::u32(searched, offset + 8)?;
            let is_header = magic == HEADER_MAGIC && magic.wrapping_add(flags).wrapping_add(checksum) == 0;
            is_header.then_some(Self { offset, flags })
        })
    }

    /// Whether the header itself says where the file goes.
    pub fn has_addresses(&self) -> bool {
        self.flags & HAS_ADDRESSES != 0
    }

    /// Loads a file by the addresses in its header. Returns the loaded range and the entry point.
    fn load_by_addresses(
        &self,
        request: &Request<'_>,
        ram: &impl GuestRam,
    ) -> Result<(Range<u64>, u64), Problem> {
        let file = request.kernel.bytes;
        let len = file.len() as u64;
        let address = |index: usize| {
            let offset = self.offset + 12 + index * 4;
            let cut_short = Problem::CutShort { promised: offset as u64 + 4, len };
            field::u32(file, offset).map(u64::from).ok_or(cut_short)
        };
        let (header_addr, start, load_end, bss_end, entry) =
            (address(0)?, address(1)?, address(2)?, address(3)?, address(4)?);

        if start < KERNEL_MIN {
            return Err(Problem::TooLow(start));
        }
        // The text begins as far before the header in the file as it does in memory.
        let before_header = header_addr.checked_sub(start);
        let file_start = before_header.and_then(|before| (self.offset as u64).checked_sub(before));
        let file_start = file_start.ok_or(Problem::BadField("load_addr", start))?;
        let size = match load_end {
            0 => len - file_start,
            end => end.checked_sub(start).ok_or(Problem::BadField("load_end_addr", end))?,
        };
        let promised = file_start + size;
        if promised > len {
            return Err(Problem::CutShort { promised, len });
        }
        let (data_end, ram_end) = (start + size, request.low_ram_end());
        let end = data_end.max(bss_end);
        if end > ram_end {
            return Err(Problem::NeedsMemory { end, ram_end });
        }
        ram.write(start, &file[file_start as usize..promised as usize])?;
        write_zeros(ram, data_end..end)?;
        Ok((start..end, entry))
    }
}

/// Loads a Multiboot 1 kernel.
pub fn load<'a>(request: &Request<'a>, ram: &impl GuestRam) -> Result<Loaded, Error<'a>> {
    let of_kernel = |problem: Problem| problem.of(request.kernel);
    let header = Header::find(request.kernel.bytes).ok_or(of_kernel(Problem::UnknownFormat))?;
    if header.flags & DEMANDS & !KNOWN_DEMANDS != 0 {
        return Err(of_kernel(Problem::MultibootFlags(header.flags)));
    }
    let (kernel, eip) = if header.has_addresses() {
        header.load_by_addresses(request, ram).map_err(of_kernel)?
    } else {
        let executable = Executable::parse(request.kernel.bytes).map_err(of_kernel)?;
        (executable.load(request, ram).map_err(of_kernel)?, executable.entry())
    };
    if !kernel.contains(&eip) {
        return Err(of_kernel(Problem::BadEntry(eip)));
    }

    let mut low = LowMemory::new(ram);
    let entry = EntryState::protected(&mut low, eip).map_err(of_kernel)?;
    let module_count = request.all_modules().count() as u64;
    let list = low.reserve(module_count * MODULE_ENTRY, 4).map_err(of_kernel)?;
    let mut next = list;
    let modules = load_modules(request, ram, kernel.end, |range, Module { cmdline, .. }| {
        let text = low.put_text(&[cmdline])?;
        // Modules and texts are below 4 GiB.
        let fields = [range.start as u32, range.end as u32, text as u32, 0].map(u32::to_le_bytes);
        low.write(next, fields.as_flattened())?;
        next += MODULE_ENTRY;
        Ok(())
    })?;
    let information = put_information(request, &mut low, (list, module_count)).map_err(of_kernel)?;
    Ok(Loaded {
        format: Format::Multiboot1,
        entry: EntryState { rax: LOADER_MAGIC, rbx: information, ..entry },
        kernel,
        modules,
        boot_information: low.used(),
    })
}

fn put_information(
    request: &Request<'_>,
    low: &mut LowMemory<'_, impl GuestRam>,
    (modules, module_count): (u64, u64),
) -> Result<u64, Problem> {
    // The kernel's own name comes first, as its argument zero.
    let separator = if request.cmdline.is_empty() { "" } else { " " };
    let cmdline = low.put_text(&[request.kernel.name, separator, request.cmdline])?;
    let loader_name = low.put_text(&["Umbra"])?;

    let map = e820::map(request.ram_bytes);
    let map_len = map.len() as u32 * (4 + MAP_ENTRY);
    let map_at = low.reserve(map_len.into(), 4)?;
    for (at, entry) in (map_at..).step_by(4 + MAP_ENTRY as usize).zip(&map) {
        let mut bytes = [0; 4 + MAP_ENTRY as usize];
        bytes[..4].copy_from_slice(&MAP_ENTRY.to_le_bytes());
        bytes[4..12].copy_from_slice(&entry.start.to_le_bytes());
        bytes[12..20].copy_from_slice(&entry.len.to_le_bytes());
        bytes[20..].copy_from_slice(&entry.kind.to_le_bytes());
        low.write(at, &bytes)?;
    }

    let mut bytes = [0; info::SIZE];
    let mut put = |offset: usize, value: u64| {
        bytes[offset..offset + 4].copy_from_slice(&(value as u32).to_le_bytes());
    };
    let flags = valid::MEMORY | valid::CMDLINE | valid::MODULES | valid::MAP | valid::LOADER_NAME;
    put(info::FLAGS, flags.into());
    put(info::MEM_LOWER, layout::LOW_RAM_END >> 10);
    put(info::MEM_UPPER, request.low_ram_end().saturating_sub(KERNEL_MIN) >> 10);
    put(info::CMDLINE, cmdline);
    put(info::MODS_COUNT, module_count);
    put(info::MODS_ADDR, modules);
    put(info::MMAP_LENGTH, map_len.into());
    put(info::MMAP_ADDR, map_at);
    put(info::BOOT_LOADER_NAME, loader_name);
    low.put(&bytes, 4)
}
