//! Physical memory: a bump allocator over the largest RAM range below 4 GiB. Nothing is ever given back.
use crate::cpu::poke;
use crate::multiboot::Boot;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Size of a page.
pub const PAGE: u64 = 4096;
/// Size of a large page.
pub const PAGE_2M: u64 = 2 << 20;

static NEXT: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);

extern "C" {
    static __image_end: u8;
}

/// Chooses the pool: the largest RAM range, without the image, the modules and the Multiboot information.
pub fn init(boot: &Boot) {
    let mut floor = &raw const __image_end as u64;
    floor = floor.max(u64::from(boot.info) + PAGE);
    for module in boot.modules() {
        floor = floor.max(module.end);
    }
    floor = floor.next_multiple_of(PAGE_2M);
    let (mut next, mut end) = (0, 0);
    for range in boot.ranges().iter().filter(|range| range.kind == 1) {
        let start = range.start.max(floor);
        let stop = range.start.saturating_add(range.len).min(1 << 32);
        if stop > start && stop - start > end - next {
            (next, end) = (start, stop);
        }
    }
    NEXT.store(next, Relaxed);
    END.store(end, Relaxed);
}

/// How many bytes the pool still has.
pub fn left() -> u64 {
    END.load(Relaxed) - NEXT.load(Relaxed)
}

/// Takes `size` bytes at a multiple of `align`, untouched: whatever the machine had there is there still.
pub fn untouched(size: u64, align: u64) -> u64 {
    let start = NEXT.load(Relaxed).next_multiple_of(align);
    let end = start + size.next_multiple_of(PAGE);
    assert!(
        end <= END.load(Relaxed),
        "out of memory: give the guest more than {} MiB",
        END.load(Relaxed) >> 20
    );
    NEXT.store(end, Relaxed);
    start
}

/// Takes one zeroed page.
pub fn page() -> u64 {
    pages(1)
}

/// Takes `count` zeroed pages in a row.
pub fn pages(count: u64) -> u64 {
    let start = untouched(count * PAGE, PAGE);
    for word in 0..count * PAGE / 8 {
        poke(start + word * 8, 0u64);
    }
    start
}
