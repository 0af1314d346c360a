//! Physical memory, Umbra's own address space and heap.
//!
//! Address space: the image at its link address (text R-X, rodata R--, data and bss RW-); all RAM from [`PHYSMAP`]
//! on (RW-, the image's text and rodata R--) with device registers mapped among it on request; stacks from [`STACKS`]
//! on, each between unmapped pages; the heap from [`HEAP`] on. Nothing else.

pub mod frames;
pub mod map;
pub mod paging;
pub mod ranges;

#[cfg(target_os = "none")]
pub mod heap;
#[cfg(target_os = "none")]
mod image;
#[cfg(target_os = "none")]
mod live;
#[cfg(target_os = "none")]
pub mod phys;
#[cfg(target_os = "none")]
mod stacks;

pub use frames::{FrameSize, Zone};
pub use x86_64::PhysAddr;

#[cfg(target_os = "none")]
pub use {
    image::is_text,
    live::{
        alloc, alloc_contiguous, alloc_zeroed, audit, free, free_bytes, free_contiguous, init_frames,
        init_paging, map_firmware, map_low_page, map_mmio, total_bytes, unmap_low_page, PAGE_TABLE_ERROR,
    },
    phys::phys_to_virt,
    stacks::{alloc_stack, is_stack, is_stack_guard},
};

/// Where the physical map begins.
pub const PHYSMAP: u64 = 0xffff_8000_0000_0000;
/// Size of the physical map's window: memory beyond 64 TiB is not used.
pub const PHYSMAP_BYTES: u64 = 1 << 46;
/// Where stacks lie.
pub const STACKS: u64 = PHYSMAP + PHYSMAP_BYTES;
/// Where the heap lies.
pub const HEAP: u64 = STACKS + (1 << 44);
/// The least memory that Umbra starts with.
pub const MINIMUM_BYTES: u64 = 96 << 20;
