//! Multiboot2: what GRUB leaves behind. Multiboot2 specification 2.0, section 3.6.

use bootloader_api::info::{FrameBufferInfo, PixelFormat};
use multiboot2::{BootInformation, FramebufferField, FramebufferTag, FramebufferType, MemoryArea, TagType};

use crate::handover::{Error, Handover, Physical, TEXT_MODE};
use crate::regions::LIMIT;

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

    out.map.reserve(at, u64::from(total_size));
    for area in info.memory_map_tag().ok_or(Error::NoMemoryMap)?.memory_areas() {
        out.map.add_e820(area.start_address(), area.size(), area.typ().val());
    }
    for module in info.module_tags() {
        let (start, end) = (u64::from(module.start_address()), u64::from(module.end_address()));
        out.add_module(start, end.checked_sub(start).ok_or(Error::Malformed("module", start))?);
    }
    // The tags hold copies of the RSDP, so the copy's address is what counts; the newer one is preferred.
    let rsdp_tag = info
        .rsdp_v2_tag()
        .map(|tag| core::ptr::from_ref(tag).addr())
        .or_else(|| info.rsdp_v1_tag().map(|tag| core::ptr::from_ref(tag).addr()));
    out.rsdp = rsdp_tag.map(|tag| at + (tag - block.as_ptr().addr() + TAG_HEADER) as u64);
    out.loader.protocol = "multiboot2";
    out.loader.efi_system_table = info.efi_sdt64_tag().map(|tag| tag.sdt_address() as u64);
    if let Some(Ok(name)) = info.boot_loader_name_tag().map(|tag| tag.name()) {
        out.loader.set_name(name);
    }
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
                && (size - TAG_HEADER - MAP_HEADER).is_multiple_of(entry)
                && payload.starts_with(&(entry as u32).to_le_bytes())
        }
        // Ends with a NUL at least.
        TagType::BootLoaderName => size > TAG_HEADER,
        TagType::Efi64 => size >= TAG_HEADER + 8,
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

/// Geometry of a direct-colour framebuffer or of text mode. Palettes are of no use to a kernel.
fn framebuffer(tag: &FramebufferTag) -> Option<(u64, FrameBufferInfo)> {
    let bytes_per_pixel = usize::from(tag.bpp().div_ceil(8));
    let pixel_format = match tag.buffer_type() {
        Ok(FramebufferType::RGB { red, green, blue }) => pixel_format(&red, &green, &blue),
        Ok(FramebufferType::Text) if bytes_per_pixel == 2 => TEXT_MODE,
        _ => return None,
    };
    let (width, height, pitch) = (tag.width() as usize, tag.height() as usize, tag.pitch() as usize);
    if bytes_per_pixel == 0 || pitch / bytes_per_pixel < width {
        return None;
    }
    let byte_len = pitch.checked_mul(height)?;
    // Somewhere, and all of it within the address space: `BootInfo` shows it as a slice.
    let end = tag.address().checked_add(byte_len as u64).filter(|end| *end <= LIMIT)?;
    if tag.address() == 0 || end == tag.address() {
        return None;
    }
    let info = FrameBufferInfo {
        byte_len,
        width,
        height,
        pixel_format,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::is_text_mode;
    use crate::testing::Memory;
    use proptest::prelude::*;
    use std::vec::Vec;

    const BASE: u64 = 0x8_c000;
    const MAP: u32 = 6;
    const MODULE: u32 = 3;
    const RSDP_OLD: u32 = 14;
    const RSDP_NEW: u32 = 15;
    const FRAMEBUFFER: u32 = 8;

    /// An information block of the given tags and an end tag.
    fn block(tags: &[(u32, Vec<u8>)]) -> Memory {
        let mut bytes = vec![0; 8];
        for (tag_type, payload) in tags.iter().chain([&(0, vec![])]) {
            bytes.extend(tag_type.to_le_bytes());
            bytes.extend((payload.len() as u32 + 8).to_le_bytes());
            bytes.extend(payload);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        let mut memory = Memory::new(BASE, bytes.len());
        memory.put(BASE, &bytes);
        memory
    }

    fn words(fields: &[u32]) -> Vec<u8> {
        fields.iter().flat_map(|field| field.to_le_bytes()).collect()
    }

    fn map() -> (u32, Vec<u8>) {
        (MAP, words(&[24, 0, 0, 0, 0x9_fc00, 0, 1, 0, 0x10_0000, 0, 0x1000_0000, 0, 1, 0]))
    }

    fn module(start: u32, end: u32) -> (u32, Vec<u8>) {
        let mut payload = words(&[start, end]);
        payload.extend(b"bundle\0");
        (MODULE, payload)
    }

    fn framebuffer_tag(bpp: u8, kind: u8, rest: &[u8]) -> (u32, Vec<u8>) {
        let mut payload = words(&[0xc000_0000, 0, 3328, 800, 600]);
        payload.extend([bpp, kind, 0, 0]);
        payload.extend(rest);
        (FRAMEBUFFER, payload)
    }

    fn read_tags(tags: &[(u32, Vec<u8>)]) -> Result<Handover, Error> {
        let mut handover = Handover::new();
        read(&block(tags), BASE, &mut handover).map(|()| handover)
    }

    const MALFORMED: Error = Error::Malformed(BLOCK, BASE);

    #[test]
    fn everything_that_grub_passes_is_found() {
        let (old, new) = ((RSDP_OLD, vec![0; 20]), (RSDP_NEW, vec![0; 36]));
        let tags = [map(), old, new, module(0x1a_5000, 0x1a_5006), module(0x1b_0000, 0x1b_1000)];
        let handover = read_tags(&tags).unwrap();
        assert!(handover.map.has_usable());
        assert_eq!(handover.ramdisk, Some((0x1a_5000, 6)));
        // Block header 8, map tag 64, old RSDP tag 28 padded to 32, then the header of the new one.
        assert_eq!(handover.rsdp, Some(BASE + 8 + 64 + 32 + 8));
    }

    #[test]
    fn the_loader_is_known_by_name_and_firmware() {
        let name = (2, b"GRUB 2.06\0".to_vec());
        let efi = (12, 0x3f7e_c018u64.to_le_bytes().to_vec());
        let loader = read_tags(&[map(), name, efi]).unwrap().loader;
        assert_eq!((loader.protocol, loader.name()), ("multiboot2", "GRUB 2.06"));
        assert_eq!(loader.efi_system_table, Some(0x3f7e_c018));
        let mut long = "é".repeat(40).into_bytes();
        long.push(0);
        let loader = read_tags(&[map(), (2, long)]).unwrap().loader;
        assert_eq!((loader.name(), loader.efi_system_table), (&"é".repeat(32)[..], None));
    }

    #[test]
    fn an_old_rsdp_will_do() {
        let handover = read_tags(&[map(), (RSDP_OLD, vec![0; 20])]).unwrap();
        assert_eq!(handover.rsdp, Some(BASE + 8 + 64 + 8));
    }

    #[test]
    fn framebuffers_of_direct_colour_are_taken() {
        let bgr = framebuffer_tag(32, 1, &[16, 8, 8, 8, 0, 8]);
        let (start, info) = read_tags(&[map(), bgr]).unwrap().framebuffer.unwrap();
        assert_eq!((start, info.width, info.height, info.stride), (0xc000_0000, 800, 600, 832));
        assert_eq!((info.byte_len, info.bytes_per_pixel), (3328 * 600, 4));
        assert_eq!(info.pixel_format, PixelFormat::Bgr);

        let high_colour = framebuffer_tag(16, 1, &[11, 5, 5, 6, 0, 5]);
        let (_, info) = read_tags(&[map(), high_colour]).unwrap().framebuffer.unwrap();
        let unknown = PixelFormat::Unknown { red_position: 11, green_position: 5, blue_position: 0 };
        assert_eq!(info.pixel_format, unknown);
    }

    #[test]
    fn text_mode_is_taken() {
        let mut payload = words(&[0xb_8000, 0, 160, 80, 25]);
        payload.extend([16, 2, 0, 0]);
        let (start, info) = read_tags(&[map(), (FRAMEBUFFER, payload)]).unwrap().framebuffer.unwrap();
        assert_eq!((start, info.width, info.height, info.stride), (0xb_8000, 80, 25, 80));
        assert!(is_text_mode(&info) && info.byte_len == 4000);
    }

    #[test]
    fn other_framebuffers_are_left() {
        for tag in [
            framebuffer_tag(8, 2, &[]),
            framebuffer_tag(8, 0, &[1, 0, 1, 2, 3]),
            framebuffer_tag(0, 1, &[0; 6]),
            framebuffer_tag(64, 1, &[0; 6]),
        ] {
            assert!(read_tags(&[map(), tag]).unwrap().framebuffer.is_none());
        }
    }

    #[test]
    fn framebuffers_that_can_be_nowhere_are_left() {
        let at = |address: u64, pitch: u32, height: u32| {
            let mut payload = address.to_le_bytes().to_vec();
            payload.extend(words(&[pitch, 800, height]));
            payload.extend([32, 1, 0, 0, 16, 8, 8, 8, 0, 8]);
            read_tags(&[map(), (FRAMEBUFFER, payload)]).unwrap().framebuffer
        };
        assert!(at(0xfd00_0000, 3200, 600).is_some());
        for (address, pitch, height) in [
            (0, 3200, 600),
            (u64::MAX - 5, 3200, 600),
            (1 << 52, 3200, 600),
            (0xfd00_0000, u32::MAX, u32::MAX),
            (0xfd00_0000, 3200, 0),
        ] {
            assert!(at(address, pitch, height).is_none(), "{address:#x}");
        }
    }

    #[test]
    fn broken_tags_are_refused() {
        for tag in [
            (MODULE, vec![0; 7]),
            (MAP, words(&[24])),
            (MAP, words(&[24, 0, 0])),
            (MAP, words(&[16, 0, 0, 0, 0, 0])),
            (RSDP_OLD, vec![0; 19]),
            (RSDP_NEW, vec![0; 35]),
            (FRAMEBUFFER, vec![0; 23]),
            (2, vec![]),
            (12, vec![0; 7]),
            framebuffer_tag(32, 1, &[0; 5]),
            framebuffer_tag(8, 0, &[2, 0, 1, 2, 3]),
        ] {
            assert_eq!(read_tags(std::slice::from_ref(&tag)).err(), Some(MALFORMED), "{tag:?}");
        }
    }

    #[test]
    fn broken_blocks_are_refused() {
        assert_eq!(read_tags(&[]).err(), Some(Error::NoMemoryMap));
        assert_eq!(read_tags(&[map(), module(2, 1)]).err(), Some(Error::Malformed("module", 2)));

        let read_sized = |size: u32| {
            let mut memory = block(&[map()]);
            memory.put(BASE, &size.to_le_bytes());
            read(&memory, BASE, &mut Handover::new()).err()
        };
        assert_eq!(read_sized(4), Some(MALFORMED));
        assert_eq!(read_sized(72), Some(MALFORMED));
        assert_eq!(read_sized(0x1000), Some(Error::OutOfReach(BLOCK, BASE)));
        assert_eq!(
            read(&block(&[]), BASE + 4, &mut Handover::new()),
            Err(Error::Malformed(BLOCK, BASE + 4)),
            "a misaligned block"
        );
    }

    proptest! {
        #[test]
        fn any_tags_are_read_or_refused(
            tags in prop::collection::vec((0u32..22, prop::collection::vec(any::<u8>(), 0..80)), 0..8),
        ) {
            let _ = read_tags(&tags);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 4..200)) {
            let mut memory = Memory::new(BASE, bytes.len());
            memory.put(BASE, &bytes);
            memory.put(BASE, &(bytes.len() as u32 & !7).to_le_bytes());
            let _ = read(&memory, BASE, &mut Handover::new());
        }
    }
}
