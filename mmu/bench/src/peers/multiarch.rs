//! `page_table_multiarch`, with x86-64's entries. Its own metadata for x86-64 executes INVLPG, which a program may not.
use std::hint::black_box;

use memory_addr::{PhysAddr, VirtAddr};
use page_table_entry::x86_64::X64PTE;
use page_table_multiarch::{MappingFlags, PageSize, PageTable64, PagingHandler, PagingMetaData};

use crate::direct::{fault_frames, FAULTS, TABLES};
use crate::meter::Meter;
use crate::pool::Pool;
use crate::ram::{GIB, MOVED};
use crate::walk::{VA, WALKS};

struct FourLevels;

impl PagingMetaData for FourLevels {
    const LEVELS: usize = 4;
    const PA_MAX_BITS: usize = 52;
    const VA_MAX_BITS: usize = 48;
    type VirtAddr = VirtAddr;
    #[inline]
    fn flush_tlb(_: Option<VirtAddr>) {}
}

struct Frames;

impl PagingHandler for Frames {
    #[inline]
    fn alloc_frames(count: usize, _: usize) -> Option<PhysAddr> {
        assert_eq!(count, 1);
        Some(PhysAddr::from_usize(Pool::common().take()? as usize))
    }
    fn dealloc_frames(_: PhysAddr, _: usize) {}
    #[inline]
    fn phys_to_virt(address: PhysAddr) -> VirtAddr {
        VirtAddr::from_usize(address.as_usize())
    }
}

type Table = PageTable64<FourLevels, X64PTE, Frames>;

/// With nothing mapped.
fn table() -> Table {
    Pool::common().reset();
    Table::try_new().expect("the first page")
}

fn flags() -> MappingFlags {
    MappingFlags::READ | MappingFlags::WRITE | MappingFlags::EXECUTE | MappingFlags::USER
}

fn virt(gfn: u64) -> VirtAddr {
    black_box(VirtAddr::from_usize((gfn << 12) as usize))
}

fn phys(gfn: u64) -> PhysAddr {
    PhysAddr::from_usize(((gfn + MOVED) << 12) as usize)
}

/// A translation by way of four levels.
pub(crate) fn walk(meter: Meter<'_>) {
    let prepare = || {
        let mut table = table();
        let (at, frame) = (VirtAddr::from_usize(VA as usize & !0xfff), PhysAddr::from_usize(0x5000));
        table.cursor().map(at, frame, PageSize::Size4K, flags()).expect("nothing is there");
        table
    };
    meter.measure(WALKS, prepare, |table| {
        for _ in 0..WALKS {
            let found = table.query(black_box(VirtAddr::from_usize(VA as usize)));
            assert!(found.is_ok_and(|(at, ..)| at.as_usize() == 0x5123));
        }
    });
}

/// Maps pages one by one, their tables present.
pub(crate) fn map(meter: Meter<'_>) {
    #[inline(always)]
    fn map(table: &mut Table, gfn: u64) {
        table.cursor().map(virt(gfn), phys(gfn), PageSize::Size4K, flags()).expect("nothing is there");
    }
    let prepare = || {
        let mut table = table();
        (0..TABLES).for_each(|index| map(&mut table, index * 512));
        table
    };
    meter.measure(FAULTS, prepare, |table| fault_frames().for_each(|gfn| map(table, gfn)));
}

/// A gigabyte, whose frames begin `offset` frames behind an aligned one.
fn populate(meter: Meter<'_>, huge: bool, offset: u64) {
    meter.measure(1, table, |table| {
        let frame = |at: VirtAddr| phys((at.as_usize() >> 12) as u64 + offset);
        let region = table.cursor().map_region(virt(0), frame, (GIB << 12) as usize, flags(), huge);
        region.expect("nothing is there");
    });
}

/// A gigabyte in pages of 4 KiB.
pub(crate) fn populate_4k(meter: Meter<'_>) {
    populate(meter, false, 0);
}

/// A gigabyte in pages of 2 MiB.
pub(crate) fn populate_2m(meter: Meter<'_>) {
    populate(meter, true, 512);
}

/// A gigabyte in one page.
pub(crate) fn populate_1g(meter: Meter<'_>) {
    populate(meter, true, 0);
}
