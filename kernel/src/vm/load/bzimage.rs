//! Linux's bzImage by its 64-bit boot protocol. Linux Documentation/arch/x86/boot.rst and zero-page.rst.
use super::entry::EntryState;
use super::low::LowMemory;
use super::{align_up, e820, field, Error, Format, Loaded, Problem, Request, KERNEL_MIN, PAGE};
use crate::vm::ram::GuestRam;

/// Offsets in the file's first sectors, which are those in `boot_params` too.
mod header {
    pub(super) const SETUP_SECTS: usize = 0x1f1;
    pub(super) const SYSSIZE: usize = 0x1f4;
    pub(super) const VID_MODE: usize = 0x1fa;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    /// The byte after a jump: what it skips is the rest of the header.
    pub(super) const JUMP_DISTANCE: usize = 0x201;
    pub(super) const MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const CODE32_START: usize = 0x214;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const RELOCATABLE_KERNEL: usize = 0x234;
    pub(super) const XLOADFLAGS: usize = 0x236;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const PREF_ADDRESS: usize = 0x258;
    pub(super) const INIT_SIZE: usize = 0x260;
    /// All of the above.
    pub(super) const MIN_END: usize = 0x264;
    /// No header reaches further: other fields of `boot_params` begin.
    pub(super) const MAX_END: usize = 0x290;
}

/// Offsets in `boot_params` outside of the header.
mod params {
    pub(super) const ACPI_RSDP_ADDR: usize = 0x70;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const E820_TABLE: usize = 0x2d0;
    pub(super) const SIZE: usize = 4096;
}

const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// The first version with `xloadflags`.
const VERSION_MIN: u16 = 0x020c;
/// The kernel has an entry point for 64-bit mode at offset 0x200.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;
/// A loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;
/// The protected-mode code is loaded high, as any bzImage's.
const LOADED_HIGH: u8 = 1;
const VID_MODE_NORMAL: u16 = 0xffff;
const E820_ENTRY: usize = 20;

/// Whether the file has the marks of a bzImage of any version.
pub fn is_bzimage(bytes: &[u8]) -> bool {
    field::u16(bytes, header::BOOT_FLAG) == Some(BOOT_FLAG) && field::u32(bytes, header::MAGIC) == Some(MAGIC)
}

/// What the setup header says.
struct Header<'a> {
    /// The header itself, to be handed to the kernel.
    bytes: &'a [u8],
    /// The protected-mode kernel.
    payload: &'a [u8],
    /// Where the kernel wants to be.
    load_address: u64,
    /// Memory it needs there before it looks at the memory map.
    init_size: u64,
    /// Highest address of the RAM disk's last byte.
    initrd_addr_max: u64,
    /// Longest command line, without NUL.
    cmdline_size: u64,
}

impl<'a> Header<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, Problem> {
        let len = file.len() as u64;
        let cut_short = |promised: u64| Problem::CutShort { promised, len };
        let no_header = || cut_short(header::MAX_END as u64);

        let version = field::u16(file, header::VERSION).ok_or_else(no_header)?;
        if version < VERSION_MIN {
            return Err(Problem::OldProtocol(version));
        }
        let sixteen = |offset| field::u16(file, offset).ok_or_else(no_header);
        let thirty_two = |offset| field::u32(file, offset).map(u64::from).ok_or_else(no_header);
        if sixteen(header::XLOADFLAGS)? & XLF_KERNEL_64 == 0 {
            return Err(Problem::No64BitEntry);
        }

        let [setup_sects, _] = sixteen(header::SETUP_SECTS)?.to_le_bytes();
        let setup_sects = if setup_sects == 0 { 4 } else { u64::from(setup_sects) };
        let payload_start = (setup_sects + 1) * SECTOR;
        let payload_end = payload_start + thirty_two(header::SYSSIZE)? * 16;
        let payload =
            file.get(payload_start as usize..payload_end as usize).ok_or_else(|| cut_short(payload_end))?;
        if payload.len() as u64 <= ENTRY_64 {
            return Err(Problem::BadField("syssize", payload.len() as u64 / 16));
        }

        let [_, jump_distance] = sixteen(header::JUMP_DISTANCE - 1)?.to_le_bytes();
        let end = (header::MAGIC + usize::from(jump_distance)).min(header::MAX_END);
        if end < header::MIN_END {
            return Err(Problem::BadField("the length of the setup header", u64::from(jump_distance)));
        }
        let bytes = file.get(header::SETUP_SECTS..end).ok_or_else(no_header)?;
        let pref_address = field::u64(file, header::PREF_ADDRESS).ok_or_else(no_header)?;
        let load_address = load_address(
            pref_address,
            thirty_two(header::KERNEL_ALIGNMENT)?,
            sixteen(header::RELOCATABLE_KERNEL)? & 0xff != 0,
        )?;
        Ok(Self {
            bytes,
            payload,
            load_address,
            init_size: thirty_two(header::INIT_SIZE)?.max(payload.len() as u64),
            initrd_addr_max: thirty_two(header::INITRD_ADDR_MAX)?,
            cmdline_size: thirty_two(header::CMDLINE_SIZE)?,
        })
    }
}

/// Where the kernel goes: where it prefers. A relocatable one could go elsewhere, but moves itself up to its preferred
/// address if loaded below, so that nothing is won.
fn load_address(preferred: u64, alignment: u64, relocatable: bool) -> Result<u64, Problem> {
    if !relocatable {
        return if preferred < KERNEL_MIN { Err(Problem::TooLow(preferred)) } else { Ok(preferred) };
    }
    if !alignment.is_power_of_two() {
        return Err(Problem::BadField("kernel_alignment", alignment));
    }
    align_up(preferred.max(KERNEL_MIN), alignment).ok_or(Problem::BadField("pref_address", preferred))
}

/// Loads kernel, RAM disk, parameters and command line.
pub fn load<'a>(request: &Request<'a>, ram: &impl GuestRam) -> Result<Loaded, Error<'a>> {
    let of_kernel = |problem: Problem| problem.of(request.kernel);
    if !request.modules.is_empty() {
        return Err(of_kernel(Problem::ModulesNotTaken));
    }
    let header = Header::parse(request.kernel.bytes).map_err(of_kernel)?;
    let ram_end = request.low_ram_end();
    let kernel_end = header.load_address.checked_add(header.init_size);
    let kernel_end = kernel_end
        .filter(|&end| end <= ram_end)
        .ok_or(Problem::NeedsMemory { end: kernel_end.unwrap_or(u64::MAX), ram_end })
        .map_err(of_kernel)?;
    ram.write(header.load_address, header.payload).map_err(|bad| of_kernel(bad.into()))?;

    let initrd = match request.initrd {
        None => 0..0,
        Some(file) => {
            let len = file.bytes.len() as u64;
            let highest_end = ram_end.min(header.initrd_addr_max.saturating_add(1));
            let start = highest_end.checked_sub(len).map(|start| start & !(PAGE - 1));
            let start = start.filter(|&start| start >= kernel_end);
            let start = start.ok_or_else(|| Problem::DoesNotFit { len }.of(file))?;
            ram.write(start, file.bytes).map_err(|bad| Problem::Ram(bad).of(file))?;
            start..start + len
        }
    };

    let mut low = LowMemory::new(ram);
    let entry = enter(request, &header, &initrd, &mut low).map_err(of_kernel)?;
    Ok(Loaded {
        format: Format::BzImage,
        entry,
        kernel: header.load_address..kernel_end,
        modules: initrd,
        boot_information: low.used(),
    })
}

/// Writes what the kernel finds when it starts.
fn enter(
    request: &Request<'_>,
    header: &Header<'_>,
    initrd: &core::ops::Range<u64>,
    low: &mut LowMemory<'_, impl GuestRam>,
) -> Result<EntryState, Problem> {
    let len = request.cmdline.len() as u64;
    if len > header.cmdline_size {
        return Err(Problem::CmdlineTooLong { len, max: header.cmdline_size });
    }
    let state = EntryState::long(low, header.load_address + ENTRY_64)?;
    let cmdline = low.put_text(&[request.cmdline])?;

    let mut params = [0; params::SIZE];
    let mut put = |offset: usize, bytes: &[u8]| params[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(header::SETUP_SECTS, header.bytes);
    put(header::VID_MODE, &VID_MODE_NORMAL.to_le_bytes());
    put(header::TYPE_OF_LOADER, &[UNDEFINED_LOADER]);
    // `Header::parse` has seen that the header reaches further than this.
    put(header::LOADFLAGS, &[header.bytes[header::LOADFLAGS - header::SETUP_SECTS] | LOADED_HIGH]);
    // All of these are below 4 GiB, so that their extensions for the upper halves stay zero.
    put(header::CODE32_START, &(header.load_address as u32).to_le_bytes());
    put(header::RAMDISK_IMAGE, &(initrd.start as u32).to_le_bytes());
    put(header::RAMDISK_SIZE, &((initrd.end - initrd.start) as u32).to_le_bytes());
    put(header::CMD_LINE_PTR, &(cmdline as u32).to_le_bytes());
    put(params::ACPI_RSDP_ADDR, &request.rsdp.to_le_bytes());
    let map = e820::map(request.ram_bytes);
    put(params::E820_ENTRIES, &[map.len() as u8]);
    for (index, entry) in map.iter().enumerate() {
        let at = params::E820_TABLE + index * E820_ENTRY;
        put(at, &entry.start.to_le_bytes());
        put(at + 8, &entry.len.to_le_bytes());
        put(at + 16, &entry.kind.to_le_bytes());
    }
    let params = low.put(&params, PAGE)?;
    Ok(EntryState { rsi: params, ..state })
}
