//! The heap: starts small and grows by frames as it must, up to a bound.
// Implements the global allocator over raw memory.
#![allow(unsafe_code)]

use super::frames::FrameSize;
use super::live::{free_bytes, map_new};
use super::HEAP;
use crate::sync::IrqMutex;
use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{null_mut, NonNull};
use linked_list_allocator::Heap;
use x86_64::VirtAddr;

/// Size at start.
const INITIAL_BYTES: u64 = 1 << 20;
/// Size it never grows beyond; nor does it ever take more than half of the frames that are free. Guests' memory does
/// not come from the heap.
const MAX_BYTES: u64 = 1 << 32;
/// The heap grows by multiples of this.
const STEP: u64 = 256 << 10;

#[global_allocator]
static ALLOCATOR: Growing = Growing(IrqMutex::new(State { heap: Heap::empty(), mapped: 0 }));

struct Growing(IrqMutex<State>);

struct State {
    heap: Heap,
    /// Bytes from `HEAP` on that are mapped.
    mapped: u64,
}

/// Makes the heap. Once, after the frame allocator.
pub fn init() -> Option<()> {
    let mut state = ALLOCATOR.0.lock();
    let mapped = state.map(INITIAL_BYTES);
    // SAFETY: the heap is empty and `mapped` bytes from `HEAP` on are new memory that nothing else uses.
    unsafe { state.heap.init(HEAP as *mut u8, mapped as usize) };
    (mapped == INITIAL_BYTES).then_some(())
}

/// Bytes in use and bytes mapped.
pub fn usage() -> (u64, u64) {
    let state = ALLOCATOR.0.lock();
    (state.heap.used() as u64, state.mapped)
}

impl State {
    /// Maps up to `bytes` more and returns how many.
    fn map(&mut self, bytes: u64) -> u64 {
        let mut done = 0;
        while done < bytes && self.mapped < MAX_BYTES {
            let at = VirtAddr::new(HEAP + self.mapped);
            let large = at.is_aligned(FrameSize::Size2M.bytes()) && bytes - done >= FrameSize::Size2M.bytes();
            let size = match large {
                true if map_new(at, FrameSize::Size2M).is_some() => FrameSize::Size2M,
                _ if map_new(at, FrameSize::Size4K).is_some() => FrameSize::Size4K,
                _ => break,
            };
            self.mapped += size.bytes();
            done += size.bytes();
        }
        done
    }

    fn alloc(&mut self, layout: Layout) -> Option<NonNull<u8>> {
        if let Ok(at) = self.heap.allocate_first_fit(layout) {
            return Some(at);
        }
        // The alignment and the allocator's own bookkeeping come on top.
        let wanted = (layout.size() as u64).checked_add(layout.align() as u64)?.checked_add(64)?;
        let step = wanted.checked_next_multiple_of(STEP)?;
        // What is mapped stays mapped, so nothing is mapped for a request that cannot be met.
        if step > MAX_BYTES - self.mapped || step > free_bytes() / 2 {
            return None;
        }
        let grown = self.map(step);
        // SAFETY: the new bytes follow the old ones and are new memory.
        unsafe { self.heap.extend(grown as usize) };
        self.heap.allocate_first_fit(layout).ok()
    }
}

// SAFETY: a linked-list heap behind a lock; each allocation lies in memory that only this heap uses.
unsafe impl GlobalAlloc for Growing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let mut state = self.0.lock();
        if state.mapped == 0 {
            return null_mut();
        }
        state.alloc(layout).map_or(null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if let Some(ptr) = NonNull::new(ptr) {
            // SAFETY: the caller passes what `alloc` returned for this layout.
            unsafe { self.0.lock().heap.deallocate(ptr, layout) };
        }
    }
}
