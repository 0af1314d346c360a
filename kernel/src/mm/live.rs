//! The machine's memory while Umbra runs: the one frame allocator and the one set of page tables.
// Makes the tables that decide what every address means.
#![allow(unsafe_code)]

use super::frames::{chunks_needed, BadFree, Chunk, FrameAllocator, FrameSize, Summary, Zone};
use super::map::MemoryMap;
use super::paging::audit::{self, Audit};
use super::paging::entry::{Access, Attributes, Caching, Entry, ENTRIES};
use super::paging::table::{MapError, PageTables, TableFrames};
use super::ranges::{Range, PAGE_SIZE};
use super::{image, phys, phys_to_virt, PHYSMAP, PHYSMAP_BYTES};
use crate::cpu::features::Features;
use crate::sync::IrqMutex;
use core::mem::size_of;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::{PhysFrame, Size4KiB};
use x86_64::{PhysAddr, VirtAddr};

/// What is said when the live page tables break the rule.
pub const PAGE_TABLE_ERROR: &str = "Umbra's own page tables have a page that is both writable and executable";

static FRAMES: IrqMutex<Option<FrameAllocator<'static>>> = IrqMutex::new(None);
static TABLES: IrqMutex<Option<PageTables>> = IrqMutex::new(None);

/// Memory that tables and books may come from before the frame allocator: what the entry stub mapped and 32-bit
/// start-up code can reach.
const EARLY: Range = Range::new(1 << 20, 1 << 32);

/// Takes a frame. Its content is whatever was there before.
pub fn alloc(size: FrameSize, zone: Zone) -> Option<PhysAddr> {
    FRAMES.lock().as_mut()?.alloc(size, zone)
}

/// Takes a frame full of zeros.
pub fn alloc_zeroed(size: FrameSize, zone: Zone) -> Option<PhysAddr> {
    let frame = alloc(size, zone)?;
    // SAFETY: the frame was just handed out.
    unsafe { phys::zero(frame, size.bytes()) };
    Some(frame)
}

/// Takes adjacent 4 KiB frames that hold `bytes`.
pub fn alloc_contiguous(bytes: u64) -> Option<PhysAddr> {
    FRAMES.lock().as_mut()?.alloc_contiguous(bytes)
}

/// Returns a frame of [`alloc`].
///
/// # Panics
/// When it is no frame that was handed out: a bug in Umbra that must not go on.
pub fn free(addr: PhysAddr, size: FrameSize) {
    checked(|frames| frames.free(addr, size));
}

/// Returns the frames of [`alloc_contiguous`].
///
/// # Panics
/// Like [`free`].
pub fn free_contiguous(addr: PhysAddr, bytes: u64) {
    checked(|frames| frames.free_contiguous(addr, bytes));
}

fn checked(free: impl FnOnce(&mut FrameAllocator<'_>) -> Result<(), BadFree>) {
    let result = FRAMES.lock().as_mut().map(free);
    if let Some(Err(BadFree { addr })) = result {
        panic!("frame {addr:#x} was freed but was not in use");
    }
}

/// Bytes in free frames.
pub fn free_bytes() -> u64 {
    FRAMES.lock().as_ref().map_or(0, |frames| frames.free_bytes())
}

/// Bytes in all frames, free or not.
pub fn total_bytes() -> u64 {
    FRAMES.lock().as_ref().map_or(0, |frames| frames.total_bytes())
}

/// Builds Umbra's page tables and makes this CPU use them. Runs once, in the entry stub's identity map; takes memory
/// for tables from `map`. Returns where `framebuffer`, a device's memory, is mapped from then on; it may be empty.
pub fn init_paging(
    map: &mut MemoryMap,
    features: &Features,
    framebuffer: Range,
) -> Result<Option<*mut u8>, MapError> {
    let ram = map.ram.clone();
    let mut frames = Early { map };
    let tables = PageTables::new(&mut frames, features.pages_1g)?;
    let read_only = Range::new(image::text().start, image::rodata().end);

    let parts = [
        (image::text(), Access::ReadExecute),
        (image::rodata(), Access::Read),
        (image::data(), Access::ReadWrite),
        (image::bss_below_guard(), Access::ReadWrite),
        (image::boot_stack(), Access::ReadWrite),
        (image::above_boot_stack(), Access::ReadWrite),
    ];
    for (range, access) in parts {
        tables.map(&mut frames, range.start, range.start, range.len(), Attributes::memory(access))?;
    }

    let mut physmap = |range: Range, access| {
        let range = range.shrink_to_pages();
        tables.map(&mut frames, PHYSMAP + range.start, range.start, range.len(), Attributes::memory(access))
    };
    for range in ram.iter() {
        physmap(range.intersect(Range::new(0, read_only.start)), Access::ReadWrite)?;
        physmap(range.intersect(read_only), Access::Read)?;
        physmap(range.intersect(Range::new(read_only.end, u64::MAX)), Access::ReadWrite)?;
    }

    // It is not worth a refusal to boot.
    let pages = framebuffer.grow_to_pages();
    let shown = !framebuffer.is_empty()
        && tables
            .map_missing(
                &mut frames,
                PHYSMAP + pages.start,
                pages.start,
                pages.len(),
                Attributes::FRAMEBUFFER,
            )
            .is_ok()
        && tables
            .translate(&frames, PHYSMAP + framebuffer.start)
            .is_some_and(|found| found.attributes == Attributes::FRAMEBUFFER);

    *TABLES.lock() = Some(tables);
    let root = PhysFrame::<Size4KiB>::containing_address(PhysAddr::new(tables.root()));
    // SAFETY: the tables map the image, with the code that runs and the stack in use, where it is.
    unsafe { Cr3::write(root, Cr3Flags::empty()) };
    Ok(shown.then(|| phys_to_virt(PhysAddr::new(framebuffer.start))))
}

/// Hands all free memory of `map` to the frame allocator. Runs once, after [`init_paging`].
pub fn init_frames(map: &mut MemoryMap) -> Option<()> {
    // Taking the books away can only make the map need fewer of them.
    let count = chunks_needed(&map.usable);
    let summaries = map.usable.take((count * size_of::<Summary>()) as u64, PAGE_SIZE, EARLY)?;
    let chunks = map.usable.take((count * size_of::<Chunk>()) as u64, PAGE_SIZE, EARLY)?;
    // SAFETY: both ranges are RAM that nothing else uses from now on, and any bits are valid in these types.
    let (summaries, chunks) = unsafe {
        let at = |range: Range| phys_to_virt(PhysAddr::new(range.start));
        (
            core::slice::from_raw_parts_mut(at(summaries).cast::<Summary>(), count),
            core::slice::from_raw_parts_mut(at(chunks).cast::<Chunk>(), count),
        )
    };
    *FRAMES.lock() = Some(FrameAllocator::new(&map.usable, summaries, chunks)?);
    Some(())
}

/// Maps device registers, uncached, and returns where they are. `None` when the range is memory of Umbra's, lies
/// beyond the physical map, or no table could be had.
pub fn map_mmio(phys: PhysAddr, len: u64) -> Option<*mut u8> {
    map_foreign(phys, len, Attributes::DEVICE)?;
    let tables = (*TABLES.lock())?;
    let caching = tables.translate(&Live, PHYSMAP + phys.as_u64())?.attributes.caching;
    (caching == Caching::Uncached).then(|| phys_to_virt(phys))
}

/// Maps a table of the firmware's for reading, where it is not part of the physical map already.
pub fn map_firmware(phys: PhysAddr, len: u64) -> Option<*const u8> {
    map_foreign(phys, len, Attributes::memory(Access::Read))?;
    Some(phys_to_virt(phys).cast_const())
}

fn map_foreign(phys: PhysAddr, len: u64, attributes: Attributes) -> Option<()> {
    let range = Range::from_len(phys.as_u64(), len.max(1)).grow_to_pages();
    if !Range::new(0, PHYSMAP_BYTES).contains(range) {
        return None;
    }
    let tables = TABLES.lock();
    tables.as_ref()?.map_missing(&mut Live, PHYSMAP + range.start, range.start, range.len(), attributes).ok()
}

/// Maps a page below 1 MiB at its own address for reading and execution: start-up code of other CPUs.
pub fn map_low_page(phys: PhysAddr) -> Result<(), MapError> {
    let at = phys.as_u64();
    let tables = TABLES.lock();
    let tables = tables.as_ref().ok_or(MapError::OutOfMemory)?;
    tables.map(&mut Live, at, at, PAGE_SIZE, Attributes::memory(Access::ReadExecute))
}

/// Unmaps the page again; every CPU that used it has to flush its TLB.
pub fn unmap_low_page(phys: PhysAddr) {
    if let Some(tables) = TABLES.lock().as_ref() {
        tables.unmap_small(&mut Live, phys.as_u64());
    }
}

/// Maps new memory at `virt` and returns how much: `size`, or nothing.
pub(super) fn map_new(virt: VirtAddr, size: FrameSize) -> Option<()> {
    let frame = alloc(size, Zone::Any)?;
    let attributes = Attributes::memory(Access::ReadWrite);
    let tables = TABLES.lock();
    let mapped = tables.as_ref()?.map(&mut Live, virt.as_u64(), frame.as_u64(), size.bytes(), attributes);
    drop(tables);
    if mapped.is_err() {
        free(frame, size);
    }
    mapped.ok()
}

/// Whether `virt` is mapped in Umbra's tables.
pub(super) fn is_mapped(virt: u64) -> bool {
    // Exceptions ask too, so do not wait for ever.
    let tables = TABLES.try_lock(1000).and_then(|tables| *tables);
    tables.is_some_and(|tables| tables.translate(&Live, virt).is_some())
}

/// Audits the tables that CR3 of this CPU names.
pub fn audit() -> Audit {
    let _tables = TABLES.lock();
    audit::audit(&Live, Cr3::read().0.start_address().as_u64())
}

/// Tables during boot: identity-mapped, new ones cut from the memory map.
struct Early<'a> {
    map: &'a mut MemoryMap,
}

impl TableFrames for Early<'_> {
    fn load(&self, table: u64, index: usize) -> Entry {
        // SAFETY: a table of `new_table`, in the identity map.
        Entry(unsafe { (table as *const u64).add(index % ENTRIES).read_volatile() })
    }

    fn store(&mut self, table: u64, index: usize, entry: Entry) {
        // SAFETY: as above.
        unsafe { (table as *mut u64).add(index % ENTRIES).write_volatile(entry.0) };
    }

    fn new_table(&mut self) -> Option<u64> {
        let at = self.map.usable.take(PAGE_SIZE, PAGE_SIZE, EARLY)?.start;
        // SAFETY: RAM below 4 GiB, identity-mapped, that nothing else uses from now on.
        unsafe { core::ptr::write_bytes(at as *mut u8, 0, PAGE_SIZE as usize) };
        Some(at)
    }
}

/// Tables while Umbra runs: in the physical map, new ones from the frame allocator.
struct Live;

impl TableFrames for Live {
    fn load(&self, table: u64, index: usize) -> Entry {
        let entry = phys_to_virt(PhysAddr::new(table)).cast::<u64>();
        // SAFETY: page tables are RAM and stay tables for ever.
        Entry(unsafe { entry.add(index % ENTRIES).read_volatile() })
    }

    fn store(&mut self, table: u64, index: usize, entry: Entry) {
        let at = phys_to_virt(PhysAddr::new(table)).cast::<u64>();
        // SAFETY: as above; the lock on the tables is held.
        unsafe { at.add(index % ENTRIES).write_volatile(entry.0) };
    }

    fn new_table(&mut self) -> Option<u64> {
        alloc_zeroed(FrameSize::Size4K, Zone::Any).map(PhysAddr::as_u64)
    }
}
