//! Multiboot2: what GRUB leaves behind. Multiboot2 specification 2.0, section 3.6.

use bootloader_api::info::{FrameBufferInfo, PixelFormat};
use multiboot2::{BootInformation, FramebufferField, FramebufferTag, FramebufferType, MemoryArea, TagType};

use crate::handover::{Error, Handover, Physical};

/// What errors call the information block.
const BLOCK: &str = "Multiboot2 information";
/// Tag header: type and size.
const TAG_HEADER: usize = 8;

/// Reads the information block at physical address `at`.
pub fn read(memory: &impl Physical, at: u64, out: &mut Handover) -> Result<(), Error> {
    let out_of_reach = Error::OutOfReach(BLOCK, at);
    let malformed = Error::Malformed(BLOCK, at);

    let head = memory.bytes(at, 4).ok_or(out_of_reach)?;
    let total_size = head.try_into().map(u32::from_le_bytes).map_err(|_| out_of_reach)?;
    let block = memory.bytes(at, total_size as usize).ok_or(out_of_reach)?;
    let info = load(block).ok_or(malformed)?;
    if !info
        .tags()
        .all(|tag| is_well_formed(tag.header().typ.into(), tag.header().size as usize, tag.payload()))
    {
        return Err(malformed);
    }

    out.map.reserve(at, u64::from(total_size))?;
    for area in info.memory_map_tag().ok_or(Error::NoMemoryMap)?.memory_areas() {
        out.map.add_e820(area.start_address(), area.size(), area.typ().val())?;
    }
    for module in info.module_tags() {
        let (start, end) = (u64::from(module.start_address()), u64::from(module.end_address()));
        out.add_module(start, end.checked_sub(start).ok_or(Error::Malformed("module", start))?)?;
    }
    // The tags hold copies of the RSDP, so the copy's address is what counts; the newer one is preferred.
    let rsdp_tag = info
        .rsdp_v2_tag()
        .map(|tag| core::ptr::from_ref(tag).addr())
        .or_else(|| info.rsdp_v1_tag().map(|tag| core::ptr::from_ref(tag).addr()));
    out.rsdp = rsdp_tag.map(|tag| at + (tag - block.as_ptr().addr() + TAG_HEADER) as u64);
    out.framebuffer = match info.framebuffer_tag() {
        Some(Ok(tag)) => framebuffer(tag),
        _ => None,
    };
    Ok(())
}

#[allow(unsafe_code)] // The crate's one constructor takes a pointer.
fn load(block: &[u8]) -> Option<BootInformation<'_>> {
    // Null and misaligned pointers are refused by `load` itself.
    // SAFETY: `block` is a borrowed slice of at least the eight bytes of the header, checked here, and of the whole
    // size that the header promises, which the caller took from it.
    (block.len() >= 8).then(|| unsafe { BootInformation::load(block.as_ptr().cast()) }.ok())?
}

/// Whether a tag is as long as its type demands, so that the accessors used here find what they read.
fn is_well_formed(tag_type: TagType, size: usize, payload: &[u8]) -> bool {
    const MAP_HEADER: usize = 8;
    match tag_type {
        TagType::Module => size >= TAG_HEADER + 8,
        TagType::Mmap => {
            let entry = size_of::<MemoryArea>();
            size >= TAG_HEADER + MAP_HEADER
                && (size - TAG_HEADER - MAP_HEADER) % entry == 0
                && payload.starts_with(&(entry as u32).to_le_bytes())
        }
        TagType::AcpiV1 => size >= TAG_HEADER + 20,
        TagType::AcpiV2 => size >= TAG_HEADER + 36,
        TagType::Framebuffer => {
            const TYPE: usize = 21;
            const COLOURS: usize = 24;
            match payload.get(TYPE) {
                // Indexed: a count, then that many colours of three bytes.
                Some(0) => payload.get(COLOURS..COLOURS + 2).is_some_and(|count| {
                    payload.len() >= COLOURS + 2 + 3 * usize::from(u16::from_le_bytes([count[0], count[1]]))
                }),
                // Direct colour: three pairs of position and size.
                Some(1) => payload.len() >= COLOURS + 6,
                Some(_) => payload.len() >= COLOURS,
                None => false,
            }
        }
        _ => true,
    }
}

/// Geometry of a direct-colour framebuffer. Text mode and palettes are of no use to a kernel.
fn framebuffer(tag: &FramebufferTag) -> Option<(u64, FrameBufferInfo)> {
    let Ok(FramebufferType::RGB { red, green, blue }) = tag.buffer_type() else { return None };
    let bytes_per_pixel = usize::from(tag.bpp().div_ceil(8));
    let (width, height, pitch) = (tag.width() as usize, tag.height() as usize, tag.pitch() as usize);
    if bytes_per_pixel == 0 || pitch / bytes_per_pixel < width {
        return None;
    }
    let info = FrameBufferInfo {
        byte_len: pitch.checked_mul(height)?,
        width,
        height,
        pixel_format: pixel_format(&red, &green, &blue),
        bytes_per_pixel,
        stride: pitch / bytes_per_pixel,
    };
    Some((tag.address(), info))
}

fn pixel_format(red: &FramebufferField, green: &FramebufferField, blue: &FramebufferField) -> PixelFormat {
    let whole_bytes = [red, green, blue].iter().all(|field| field.size == 8);
    match (red.position, green.position, blue.position) {
        (0, 8, 16) if whole_bytes => PixelFormat::Rgb,
        (16, 8, 0) if whole_bytes => PixelFormat::Bgr,
        (red_position, green_position, blue_position) => {
            PixelFormat::Unknown { red_position, green_position, blue_position }
        }
    }
}
