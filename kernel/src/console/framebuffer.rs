//! The framebuffer that the boot loader left: whether it can be used, and its memory.
// Writes to a device's memory.
#![allow(unsafe_code)]

use super::screen::format::{Kind, Layout, Unfit};
use super::screen::paint::Pixels;
use crate::mm::ranges::Range;
use crate::mm::PHYSMAP_BYTES;
use boot::handover::is_text_mode;
use bootloader_api::info::MemoryRegionKind;
use bootloader_api::BootInfo;
use core::arch::x86_64::_mm_mfence;

/// What the entry stub has mapped at its own address.
const IDENTITY: Range = Range::new(1, 1 << 32);
/// Where VGA has its text. IBM VGA reference: the window of 128 KiB, of which text mode uses the second half.
const VGA_TEXT: Range = Range::new(0xb_0000, 0xc_0000);

/// The loader's framebuffer, checked: its layout and where it lies in physical memory. `None` without one.
pub(super) fn find(boot_info: &BootInfo) -> Option<Result<(Layout, Range), Unfit>> {
    let framebuffer = boot_info.framebuffer.as_ref()?;
    let info = framebuffer.info();
    let layout = match Layout::of(&info, is_text_mode(&info)) {
        Ok(layout) => layout,
        Err(unfit) => return Some(Err(unfit)),
    };
    let at = framebuffer.buffer().as_ptr() as u64;
    let range = Range::from_len(at, layout.bytes() as u64);
    let within = match layout.kind {
        Kind::Pixels { .. } => Range::new(1, PHYSMAP_BYTES),
        Kind::Text => VGA_TEXT,
    };
    // What the map calls memory is not a device's, whatever the loader says, and would be written over.
    let is_memory = |kind| matches!(kind, MemoryRegionKind::Usable | MemoryRegionKind::Bootloader);
    let mut memory = boot_info.memory_regions.iter().filter(|region| is_memory(region.kind));
    let in_memory = memory
        .any(|region| !range.grow_to_pages().intersect(Range::new(region.start, region.end)).is_empty());
    if range.len() != layout.bytes() as u64 || !within.contains(range) || in_memory {
        return Some(Err(Unfit::Place(at)));
    }
    Some(Ok((layout, range)))
}

/// A framebuffer's memory, mapped.
pub(super) struct Mapped {
    at: *mut u8,
    len: usize,
}

// SAFETY: the pointer is to a device's memory, which is the same for every CPU; the console's lock lets one use it.
unsafe impl Send for Mapped {}

impl Mapped {
    /// The memory through the entry stub's mappings, if it lies in them. They end with Umbra's own page tables.
    pub(super) fn by_identity(range: Range) -> Option<Self> {
        IDENTITY.contains(range).then_some(Self { at: range.start as *mut u8, len: range.len() as usize })
    }

    /// `len` bytes of memory that is mapped at `at` for good.
    ///
    /// # Safety
    /// They are, for writing, and are a framebuffer's.
    pub(super) unsafe fn at(at: *mut u8, len: usize) -> Self {
        Self { at, len }
    }

    /// Makes what was written reach the screen: write-combining memory may keep it until then.
    pub(super) fn settle() {
        // SAFETY: MFENCE is part of every 64-bit processor.
        unsafe { _mm_mfence() };
    }
}

impl Pixels for Mapped {
    fn write(&mut self, offset: usize, bytes: &[u8]) {
        if offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len) {
            // SAFETY: within the memory that is mapped, and nothing of Rust's lies in it.
            unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.add(offset), bytes.len()) };
        }
    }
}
