//! Stacks between unmapped pages, so that an overflow is a fault and not a corruption.

use super::frames::FrameSize;
use super::live::{is_mapped, map_new};
use super::ranges::{Range, PAGE_SIZE};
use super::{image, STACKS};
use core::sync::atomic::{AtomicU64, Ordering};
use x86_64::VirtAddr;

/// Each stack has a slot of this size and ends where its slot ends; the rest of the slot is its guard.
const SLOT: u64 = 1 << 20;
/// Most stacks.
const SLOTS: u64 = 1 << 16;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Makes a stack of `bytes` (a multiple of 4 KiB, at most 512 KiB) and returns its top. Stacks are never freed.
pub fn alloc_stack(bytes: u64) -> Option<VirtAddr> {
    debug_assert!(bytes.is_multiple_of(PAGE_SIZE) && bytes <= SLOT / 2);
    let slot = NEXT.fetch_add(1, Ordering::Relaxed);
    if slot >= SLOTS {
        return None;
    }
    let top = STACKS + (slot + 1) * SLOT;
    for page in 1..=bytes / PAGE_SIZE {
        map_new(VirtAddr::new(top - page * PAGE_SIZE), FrameSize::Size4K)?;
    }
    Some(VirtAddr::new(top))
}

fn window() -> Range {
    Range::from_len(STACKS, SLOT * SLOTS)
}

/// Whether `len` bytes at `addr` lie in a stack and can be read.
pub fn is_stack(addr: u64, len: u64) -> bool {
    let range = Range::from_len(addr, len);
    image::boot_stack().contains(range)
        || (len > 0 && window().contains(range) && is_mapped(addr) && is_mapped(range.end - 1))
}

/// Whether `addr` lies in the unmapped part below a stack.
pub fn is_stack_guard(addr: u64) -> bool {
    let range = Range::from_len(addr, 1);
    image::boot_stack_guard().contains(range) || (window().contains(range) && !is_mapped(addr))
}
