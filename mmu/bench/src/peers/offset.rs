//! `x86_64`'s `OffsetPageTable`, the offset zero.
use std::hint::black_box;

use x86_64::structures::paging::mapper::{Mapper, OffsetPageTable, Translate};
use x86_64::structures::paging::{
    FrameAllocator, Page, PageTable, PageTableFlags, PhysFrame, Size1GiB, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use crate::direct::{fault_frames, FAULTS, TABLES};
use crate::meter::Meter;
use crate::pool::Pool;
use crate::ram::{GIB, MOVED};
use crate::walk::{VA, WALKS};

struct Frames;

// SAFETY: the pool hands each page out once.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    #[inline]
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        Some(PhysFrame::containing_address(PhysAddr::new(Pool::common().take()?)))
    }
}

type Table = OffsetPageTable<'static>;

/// With nothing mapped.
fn table() -> Table {
    Pool::common().reset();
    let address = Pool::common().take().expect("the first page");
    let root: *mut PageTable = std::ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: the page is the pool's, nothing else uses it until the pool is reset, and any bits are a table.
    let root = unsafe { &mut *root };
    root.zero();
    // SAFETY: frames are at their own address.
    unsafe { OffsetPageTable::new(root, VirtAddr::zero()) }
}

fn flags() -> PageTableFlags {
    PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE
}

#[inline(always)]
fn map_4k(table: &mut Table, gfn: u64) {
    let page = Page::<Size4KiB>::containing_address(black_box(VirtAddr::new(gfn << 12)));
    let frame = PhysFrame::containing_address(PhysAddr::new((gfn + MOVED) << 12));
    // SAFETY: no processor uses the table.
    unsafe { table.map_to(page, frame, flags(), &mut Frames) }.expect("nothing is there").ignore();
}

/// A translation by way of four levels.
pub(crate) fn walk(meter: Meter<'_>) {
    let prepare = || {
        let mut table = table();
        let page = Page::<Size4KiB>::containing_address(VirtAddr::new(VA));
        let frame = PhysFrame::containing_address(PhysAddr::new(0x5000));
        // SAFETY: no processor uses the table.
        unsafe { table.map_to(page, frame, flags(), &mut Frames) }.expect("nothing is there").ignore();
        table
    };
    meter.measure(WALKS, prepare, |table| {
        for _ in 0..WALKS {
            let found = table.translate_addr(black_box(VirtAddr::new(VA)));
            assert!(found.is_some_and(|found| found.as_u64() == 0x5123));
        }
    });
}

/// Maps pages one by one, their tables present.
pub(crate) fn map(meter: Meter<'_>) {
    let prepare = || {
        let mut table = table();
        (0..TABLES).for_each(|index| map_4k(&mut table, index * 512));
        table
    };
    meter.measure(FAULTS, prepare, |table| fault_frames().for_each(|gfn| map_4k(table, gfn)));
}

/// A gigabyte in pages of 4 KiB.
pub(crate) fn populate_4k(meter: Meter<'_>) {
    meter.measure(1, table, |table| (0..GIB).for_each(|gfn| map_4k(table, gfn)));
}

/// A gigabyte in pages of 2 MiB.
pub(crate) fn populate_2m(meter: Meter<'_>) {
    meter.measure(1, table, |table| {
        for gfn in (0..GIB).step_by(512) {
            let page = Page::<Size2MiB>::containing_address(black_box(VirtAddr::new(gfn << 12)));
            let frame = PhysFrame::containing_address(PhysAddr::new((gfn + MOVED) << 12));
            // SAFETY: no processor uses the table.
            unsafe { table.map_to(page, frame, flags(), &mut Frames) }.expect("nothing is there").ignore();
        }
    });
}

/// A gigabyte in one page.
pub(crate) fn populate_1g(meter: Meter<'_>) {
    meter.measure(1, table, |table| {
        let page = Page::<Size1GiB>::containing_address(black_box(VirtAddr::new(0)));
        let frame = PhysFrame::containing_address(PhysAddr::new(MOVED << 12));
        // SAFETY: no processor uses the table.
        unsafe { table.map_to(page, frame, flags(), &mut Frames) }.expect("nothing is there").ignore();
    });
}
