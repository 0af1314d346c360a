//! PVH: what `qemu -kernel` and other VMMs leave behind. Xen, public/arch-x86/hvm/start_info.h.

use core::mem::size_of;

use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::handover::{Error, Handover, Physical};

/// "xEn3" with the top bit of "E" set.
const MAGIC: u32 = 0x336e_c578;
/// The memory map came with version 1.
const VERSION_WITH_MAP: u32 = 1;
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
    out.map.reserve(at, size_of::<StartInfo>() as u64)?;
    for entry_at in table::<MapEntry>(&mut *out, "PVH memory map", info.map, info.map_entries)? {
        let entry: MapEntry = copy(memory, "PVH memory map", entry_at)?;
        out.map.add_e820(entry.address, entry.size, entry.e820_type)?;
    }
    reserve_string(memory, info.command_line, out)?;
    for entry_at in table::<Module>(&mut *out, "PVH module list", info.modules, info.module_count)? {
        let module: Module = copy(memory, "PVH module list", entry_at)?;
        reserve_string(memory, module.command_line, out)?;
        out.add_module(module.address, module.size)?;
    }
    out.rsdp = (info.rsdp != 0).then_some(info.rsdp);
    Ok(())
}

/// Reserves a table and yields the addresses of its entries. Its length needs no bound: reading past what can be
/// reached, or adding more than the map takes, ends the loop.
fn table<T>(
    out: &mut Handover,
    what: &'static str,
    at: u64,
    count: u32,
) -> Result<impl Iterator<Item = u64>, Error> {
    let size = size_of::<T>() as u64;
    let len = u64::from(count) * size;
    let end = at.checked_add(len).ok_or(Error::OutOfReach(what, at))?;
    out.map.reserve(at, len)?;
    Ok((at..end).step_by(size_of::<T>()))
}

fn copy<T: FromBytes>(memory: &impl Physical, what: &'static str, at: u64) -> Result<T, Error> {
    let bytes = memory.bytes(at, size_of::<T>()).ok_or(Error::OutOfReach(what, at))?;
    T::read_from_bytes(bytes).map_err(|_| Error::OutOfReach(what, at))
}

fn reserve_string(memory: &impl Physical, at: u64, out: &mut Handover) -> Result<(), Error> {
    if at == 0 {
        return Ok(());
    }
    let is_text = |offset: &u64| {
        at.checked_add(*offset).and_then(|at| memory.bytes(at, 1)).is_some_and(|byte| byte != [0])
    };
    let len = (0..MAX_COMMAND_LINE).take_while(is_text).count() as u64;
    Ok(out.map.reserve(at, len + 1)?)
}
