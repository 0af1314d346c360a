//! What a loader hands over, in one form for both protocols, and the `bootloader_api::BootInfo` made from it.

use core::fmt;

use bootloader_api::info::{FrameBuffer, FrameBufferInfo, MemoryRegion, Optional, PixelFormat};
use bootloader_api::BootInfo;

use crate::regions::MemoryMap;
pub use crate::regions::OUTPUT_REGIONS;

/// Access to physical memory while a loader's information is read.
pub trait Physical {
    /// The `len` bytes at the physical address `at`, or `None` if they cannot be reached.
    fn bytes(&self, at: u64, len: usize) -> Option<&[u8]>;
}

/// How `BootInfo`, which knows pixels alone, says that the screen is in VGA's text mode: its "pixels" are characters of two
/// bytes, and no pixel has colours there.
pub const TEXT_MODE: PixelFormat =
    PixelFormat::Unknown { red_position: u8::MAX, green_position: u8::MAX, blue_position: u8::MAX };

/// Whether a framebuffer is the memory of VGA's text mode; see [`TEXT_MODE`].
pub fn is_text_mode(info: &FrameBufferInfo) -> bool {
    info.pixel_format == TEXT_MODE && info.bytes_per_pixel == 2
}

/// What a loader left in memory.
#[derive(Debug)]
pub struct Handover {
    /// The firmware's memory map, with everything the loader placed reserved.
    pub map: MemoryMap,
    /// Physical address of the ACPI RSDP, or of a copy of it.
    pub rsdp: Option<u64>,
    /// The boot bundle: physical address and length in bytes.
    pub ramdisk: Option<(u64, u64)>,
    /// A linear framebuffer, or the memory of VGA's text mode: physical address and geometry.
    pub framebuffer: Option<(u64, FrameBufferInfo)>,
    /// Who loaded the kernel.
    pub loader: Loader,
}

/// Who loaded the kernel, and on which firmware: for reports, since `BootInfo` has no place for it.
#[derive(Clone, Copy, Debug)]
pub struct Loader {
    /// The protocol's name; empty if it is not known.
    pub protocol: &'static str,
    /// The firmware's memory map had too many entries, and some memory was given up.
    pub map_is_cut: bool,
    /// Physical address of the EFI system table, which UEFI has and a BIOS has not.
    pub efi_system_table: Option<u64>,
    name: [u8; MAX_LOADER_NAME],
    name_len: usize,
}

/// Longest name of a loader that is kept.
const MAX_LOADER_NAME: usize = 64;

impl Loader {
    /// An unknown loader.
    pub const fn unknown() -> Self {
        Self {
            protocol: "",
            map_is_cut: false,
            efi_system_table: None,
            name: [0; MAX_LOADER_NAME],
            name_len: 0,
        }
    }

    /// The loader's own name, cut if it is long; empty if it is not known.
    pub fn name(&self) -> &str {
        core::str::from_utf8(&self.name[..self.name_len]).unwrap_or_default()
    }

    /// Notes the loader's own name.
    pub(crate) fn set_name(&mut self, name: &str) {
        let end = (0..=name.len().min(MAX_LOADER_NAME)).rev().find(|end| name.is_char_boundary(*end));
        self.name_len = end.unwrap_or(0);
        self.name[..self.name_len].copy_from_slice(&name.as_bytes()[..self.name_len]);
    }
}

impl Handover {
    /// Nothing handed over yet.
    pub const fn new() -> Self {
        Self {
            map: MemoryMap::new(),
            rsdp: None,
            ramdisk: None,
            framebuffer: None,
            loader: Loader::unknown(),
        }
    }

    /// Notes a module: memory to keep, and the first one is the bundle.
    pub(crate) fn add_module(&mut self, start: u64, len: u64) {
        self.map.reserve(start, len);
        if self.ramdisk.is_none() && len != 0 {
            self.ramdisk = Some((start, len));
        }
    }
}

impl Default for Handover {
    fn default() -> Self {
        Self::new()
    }
}

/// Why what the loader left cannot be used. The loader or the firmware is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Something is outside the memory that can be read: what, and its address.
    OutOfReach(&'static str, u64),
    /// Something does not have the form its protocol demands: what, and its address.
    Malformed(&'static str, u64),
    /// No usable memory is described.
    NoMemoryMap,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::OutOfReach(what, at) => {
                write!(f, "the boot loader put the {what} at {at:#x}, outside the first 4 GiB of memory")
            }
            Self::Malformed(what, at) => write!(f, "the boot loader's {what} at {at:#x} is malformed"),
            Self::NoMemoryMap => {
                write!(
                    f,
                    "the boot loader passed no memory map with usable memory; use GRUB 2 or a newer loader"
                )
            }
        }
    }
}

/// Where Umbra itself is: physical addresses, which are its virtual addresses too.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// First byte of the image.
    pub start: u64,
    /// End of the image, .bss and boot stack included.
    pub end: u64,
    /// Lowest address of the boot stack.
    pub stack_bottom: u64,
    /// Where the boot stack begins to grow down.
    pub stack_top: u64,
}

/// Makes the `BootInfo` of a kernel that runs identity-mapped; `storage` holds its regions.
pub fn boot_info(
    handover: &mut Handover,
    image: &Image,
    storage: &'static mut [MemoryRegion; OUTPUT_REGIONS],
) -> Result<BootInfo, Error> {
    if !handover.map.has_usable() {
        return Err(Error::NoMemoryMap);
    }
    handover.map.reserve(image.start, image.end.saturating_sub(image.start));
    let count = handover.map.write_regions(storage);
    handover.loader.map_is_cut = handover.map.is_cut();

    let mut info = BootInfo::new((&mut storage[..count]).into());
    info.framebuffer = handover.framebuffer.map(framebuffer).into();
    info.physical_memory_offset = Optional::Some(0);
    info.rsdp_addr = handover.rsdp.into();
    if let Some((start, len)) = handover.ramdisk {
        info.ramdisk_addr = Optional::Some(start);
        info.ramdisk_len = len;
    }
    info.kernel_addr = image.start;
    info.kernel_len = image.end.saturating_sub(image.start);
    info.kernel_image_offset = image.start;
    info.kernel_stack_bottom = image.stack_bottom;
    info.kernel_stack_len = image.stack_top.saturating_sub(image.stack_bottom);
    Ok(info)
}

#[allow(unsafe_code)] // A framebuffer is memory that only the loader's word describes.
fn framebuffer((start, info): (u64, FrameBufferInfo)) -> FrameBuffer {
    // SAFETY: the loader says that this memory is the framebuffer, and nothing else here refers to it.
    unsafe { FrameBuffer::new(start, info) }
}
