//! PVH: what `qemu -kernel` and other VMMs leave behind. Xen, public/arch-x86/hvm/start_info.h.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::handover::{Error, Handover, Physical};

/// "xEn3" with the top bit of "E" set.
const MAGIC: u32 = 0x336e_c578;
/// The memory map came with version 1.
const VERSION_WITH_MAP: u32 = 1;
/// No machine has more modules or regions of memory.
const MAX_ENTRIES: u32 = 1 << 16;
/// A command line is not looked at, only kept; a longer one is cut.
const MAX_COMMAND_LINE: u64 = 4096;

/// `struct hvm_start_info`, version 1.
#[derive(FromBytes, Immutable, KnownLayout)]
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
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Module {
    address: u64,
    size: u64,
    command_line: u64,
    reserved: u64,
}
const _: () = assert!(size_of::<Module>() == 32);

/// `struct hvm_memmap_table_entry`; types are those of e820.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    e820_type: u32,
    reserved: u32,
}
const _: () = assert!(size_of::<MapEntry>() == 24);

/// Reads the start_info at physical address `at` and what it points to.
pub fn read(memory: &impl Physical, at: u64, out: &mut Handover) -> Result<(), Error> {
    let info: StartInfo = copy(memory, "PVH start_info", at)?;
    if info.magic != MAGIC {
        return Err(Error::Malformed("PVH start_info", at));
    }
    if info.version < VERSION_WITH_MAP {
        return Err(Error::NoMemoryMap);
    }
    out.map.reserve(at, size_of::<StartInfo>() as u64);
    for entry_at in table::<MapEntry>(&mut *out, "PVH memory map", info.map, info.map_entries)? {
        let entry: MapEntry = copy(memory, "PVH memory map", entry_at)?;
        out.map.add_e820(entry.address, entry.size, entry.e820_type);
    }
    reserve_string(memory, info.command_line, out);
    for entry_at in table::<Module>(&mut *out, "PVH module list", info.modules, info.module_count)? {
        let module: Module = copy(memory, "PVH module list", entry_at)?;
        reserve_string(memory, module.command_line, out);
        out.add_module(module.address, module.size);
    }
    out.loader.protocol = "pvh";
    out.rsdp = (info.rsdp != 0).then_some(info.rsdp);
    Ok(())
}

/// Reserves a table and yields the addresses of its entries.
fn table<T>(
    out: &mut Handover,
    what: &'static str,
    at: u64,
    count: u32,
) -> Result<impl Iterator<Item = u64>, Error> {
    let size = size_of::<T>() as u64;
    if count > MAX_ENTRIES {
        return Err(Error::Malformed(what, at));
    }
    let len = u64::from(count) * size;
    let end = at.checked_add(len).ok_or(Error::OutOfReach(what, at))?;
    out.map.reserve(at, len);
    Ok((at..end).step_by(size_of::<T>()))
}

fn copy<T: FromBytes>(memory: &impl Physical, what: &'static str, at: u64) -> Result<T, Error> {
    let bytes = memory.bytes(at, size_of::<T>()).ok_or(Error::OutOfReach(what, at))?;
    T::read_from_bytes(bytes).map_err(|_| Error::OutOfReach(what, at))
}

fn reserve_string(memory: &impl Physical, at: u64, out: &mut Handover) {
    if at == 0 {
        return;
    }
    let is_text = |offset: &u64| {
        at.checked_add(*offset).and_then(|at| memory.bytes(at, 1)).is_some_and(|byte| byte != [0])
    };
    let len = (0..MAX_COMMAND_LINE).take_while(is_text).count() as u64;
    out.map.reserve(at, len + 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Memory;
    use proptest::prelude::*;
    use std::vec::Vec;

    const BASE: u64 = 0x1_0000;
    const MODULES: u64 = BASE + 0x100;
    const MAP: u64 = BASE + 0x200;
    const TEXT: u64 = BASE + 0x800;

    fn words(fields: &[u64]) -> Vec<u8> {
        fields.iter().flat_map(|field| field.to_le_bytes()).collect()
    }

    fn start_info(version: u32, module_count: u32, map_entries: u32) -> Vec<u8> {
        let mut bytes = words(&[
            u64::from(version) << 32 | u64::from(MAGIC),
            u64::from(module_count) << 32,
            MODULES,
            TEXT,
            0xf_59a0,
            MAP,
        ]);
        bytes.extend(words(&[u64::from(map_entries)]));
        bytes
    }

    fn machine() -> Memory {
        let mut memory = Memory::new(BASE, 0x1000);
        memory.put(BASE, &start_info(1, 2, 2));
        memory.put(MODULES, &words(&[0x80_0000, 0x1234, TEXT + 8, 0, 0x90_0000, 1, 0, 0]));
        memory.put(MAP, &words(&[0, 0x9_fc00, 1, 0x10_0000, 0xff0_0000, 1]));
        memory.put(TEXT, b"quiet\0");
        memory
    }

    #[test]
    fn everything_that_qemu_passes_is_found() {
        let mut handover = Handover::new();
        read(&machine(), BASE, &mut handover).unwrap();
        assert_eq!(handover.rsdp, Some(0xf_59a0));
        assert_eq!(handover.ramdisk, Some((0x80_0000, 0x1234)));
        assert!(handover.map.has_usable());
    }

    #[test]
    fn what_the_loader_left_is_kept() {
        let mut handover = Handover::new();
        read(&machine(), BASE, &mut handover).unwrap();
        let image = crate::handover::Image {
            start: 0x20_0000,
            end: 0x30_0000,
            stack_bottom: 0x2e_0000,
            stack_top: 0x2f_0000,
        };
        let storage = Box::leak(Box::new([crate::regions::NO_REGION; crate::regions::OUTPUT_REGIONS]));
        let info = crate::handover::boot_info(&mut handover, &image, storage).unwrap();
        let kept: Vec<_> = info
            .memory_regions
            .iter()
            .filter(|region| region.kind == bootloader_api::info::MemoryRegionKind::Bootloader)
            .map(|region| (region.start, region.end))
            .collect();
        assert_eq!(
            kept,
            [(BASE, BASE + 0x1000), (0x20_0000, 0x30_0000), (0x80_0000, 0x80_2000), (0x90_0000, 0x90_1000)]
        );
        assert_eq!((info.kernel_addr, info.kernel_len), (0x20_0000, 0x10_0000));
        assert_eq!((info.kernel_stack_bottom, info.kernel_stack_len), (0x2e_0000, 0x1_0000));
        assert_eq!(info.ramdisk_addr.into_option(), Some(0x80_0000));
        assert_eq!(info.ramdisk_len, 0x1234);
        assert_eq!(info.physical_memory_offset.into_option(), Some(0));
        assert_eq!(info.rsdp_addr.into_option(), Some(0xf_59a0));
        assert!(info.framebuffer.into_option().is_none());
    }

    #[test]
    fn a_map_without_memory_is_refused() {
        let mut memory = machine();
        memory.put(BASE, &start_info(1, 0, 0));
        let mut handover = Handover::new();
        read(&memory, BASE, &mut handover).unwrap();
        let image = crate::handover::Image { start: 0, end: 0, stack_bottom: 0, stack_top: 0 };
        let storage = Box::leak(Box::new([crate::regions::NO_REGION; crate::regions::OUTPUT_REGIONS]));
        let refused = crate::handover::boot_info(&mut handover, &image, storage);
        assert_eq!(refused.err(), Some(Error::NoMemoryMap));
    }

    #[test]
    fn broken_information_is_refused() {
        let read_with = |bytes: &[u8]| {
            let mut memory = machine();
            memory.put(BASE, bytes);
            read(&memory, BASE, &mut Handover::new())
        };
        assert_eq!(read_with(&[0]), Err(Error::Malformed("PVH start_info", BASE)));
        assert_eq!(read_with(&start_info(0, 0, 0)), Err(Error::NoMemoryMap));
        assert_eq!(read_with(&start_info(1, 0, 4000)), Err(Error::OutOfReach("PVH memory map", 0x1_0ff8)));
        assert_eq!(read_with(&start_info(1, 0, 70_000)), Err(Error::Malformed("PVH memory map", MAP)));
        assert_eq!(read(&machine(), 8, &mut Handover::new()), Err(Error::OutOfReach("PVH start_info", 8)));
    }

    #[test]
    fn an_endless_command_line_is_cut() {
        let mut memory = machine();
        memory.put(TEXT, &[b'x'; 0x800]);
        assert_eq!(read(&memory, BASE, &mut Handover::new()), Ok(()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 48), module_count: u32) {
            let mut memory = machine();
            memory.put(BASE + 12, &module_count.to_le_bytes());
            memory.put(BASE + 16, &bytes[..40]);
            let _ = read(&memory, BASE, &mut Handover::new());
        }
    }
}
