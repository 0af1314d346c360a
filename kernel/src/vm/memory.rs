//! The host memory behind a guest's RAM: reserved when the VM is made, zeroed when it is first used.
//!
//! RAM is one range from address zero up to the PCI hole and, if it is larger, a second one from 4 GiB. Each is
//! backed by 2 MiB frames, or by 1 GiB frames where the VM asks for them. A *granule* is what is zeroed at once
//! and the largest page that a fault may map before its neighbours have been used: 4 KiB or 2 MiB. A granule is
//! given to the guest only after it was zeroed, so nothing of another VM or of the host can be read through it.
#![allow(unsafe_code)] // Copying to and from guest memory, which is never a Rust reference.

use super::layout::{PCI_HOLE_END, PCI_HOLE_START};
use super::notes::{Notes, NotesLayout};
use super::ram::{BadGpa, GuestRam};
use crate::hw::{GuestPage, OutOfMemory};
use crate::mm::{self, FrameSize, Zone};
use alloc::vec::Vec;
use core::fmt;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicU8, Ordering};
use mmu::{
    AccessKind, Backing, GfnRange, Gpa, Hpa, NoPage, PageSize, RamAddr, Resolved, Slot, SlotFlags, SlotNotes,
    ENTRIES,
};
use x86_64::PhysAddr;

const PAGE_SIZE: u64 = 4096;
const CHUNK: u64 = FrameSize::Size2M.bytes();
const GIGA: u64 = FrameSize::Size1G.bytes();

/// The granule has not been used yet: it holds whatever the frame held before.
const UNUSED: u8 = 0;
/// Somebody is zeroing it.
const ZEROING: u8 = 1;
/// It belongs to the guest.
const READY: u8 = 2;

/// The host cannot back this much guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotEnoughMemory {
    /// What was asked for, in bytes.
    pub wanted: u64,
    /// What the host has free, in bytes.
    pub free: u64,
}

impl fmt::Display for NotEnoughMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1 << 20;
        write!(
            f,
            "memory = \"{}M\" is more than this machine can give, which has {} MiB free; \
             write a smaller size or start it with more memory",
            self.wanted / MIB,
            self.free / MIB
        )
    }
}

/// One range of RAM.
#[derive(Debug)]
struct Range {
    start: u64,
    bytes: u64,
    chunks: Vec<Chunk>,
    granules: Vec<AtomicU8>,
    /// log2 of the granule's size.
    granule_shift: u32,
    notes: NoteFrames,
}

/// 2 MiB of a range.
#[derive(Debug)]
struct Chunk {
    /// Host address; bit 0 marks a chunk that is part of a 1 GiB frame.
    host: u64,
    /// Granules in it that are not ready: most often there are none, and nobody has to look at which they are.
    unready: AtomicU32,
}

/// The frames that notes about a range's pages are in.
#[derive(Debug)]
struct NoteFrames {
    layout: NotesLayout,
    /// Of no meaning if the layout has nothing.
    start: PhysAddr,
}

impl NoteFrames {
    /// Takes adjacent frames for notes, all zero.
    fn reserve(layout: NotesLayout) -> Result<Self, OutOfFrames> {
        let bytes = layout.bytes();
        if bytes == 0 {
            return Ok(Self { layout, start: PhysAddr::zero() });
        }
        let start = mm::alloc_contiguous(bytes).ok_or(OutOfFrames)?;
        // SAFETY: the frames were just handed out, and there are whole ones.
        unsafe { mm::phys::zero(start, bytes.next_multiple_of(PAGE_SIZE)) };
        Ok(Self { layout, start })
    }

    #[inline(always)]
    fn get(&self) -> SlotNotes<'_> {
        let (words, counts) = (self.layout.words(), self.layout.counts());
        if words + counts == 0 {
            return SlotNotes::default();
        }
        let first = mm::phys_to_virt(self.start);
        // SAFETY: the frames hold so many words and, after them, so many counts; they are aligned to a page, were zeroed,
        // live as long as `self` and are accessed in no other way.
        let (words, counts) = unsafe {
            let words = core::slice::from_raw_parts(first.cast::<AtomicU64>(), words);
            let counts = first.add(size_of_val(words)).cast::<AtomicU32>();
            (words, core::slice::from_raw_parts(counts, self.layout.counts()))
        };
        self.layout.notes(words, counts)
    }
}

impl Drop for NoteFrames {
    fn drop(&mut self) {
        if self.layout.bytes() != 0 {
            mm::free_contiguous(self.start, self.layout.bytes());
        }
    }
}

const IN_GIGA_FRAME: u64 = 1;

/// All RAM of a VM, and the pages that the hardware needs in it.
#[derive(Debug)]
pub struct HostMemory {
    ranges: Vec<Range>,
    granule: FrameSize,
    fixed: Vec<FixedPage>,
}

/// A page that the guest can read and execute, but not write.
#[derive(Debug)]
struct FixedPage {
    gpa: u64,
    frame: PhysAddr,
}

impl Drop for FixedPage {
    fn drop(&mut self) {
        mm::free(self.frame, FrameSize::Size4K);
    }
}

/// The cookie of the slot of fixed page n is this plus n; those of ranges of RAM are below.
const FIXED: u64 = 1 << 32;

/// Start and size of the ranges that `bytes` of RAM make, up to the PCI hole and from 4 GiB.
pub fn ram_ranges(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let low = bytes.min(PCI_HOLE_START);
    [(0, low), (PCI_HOLE_END, bytes - low)].into_iter().filter(|&(_, bytes)| bytes != 0)
}

impl HostMemory {
    /// Reserves `bytes` for a guest whose pages are at most `page_size` large, and memory for `notes` about them.
    pub fn reserve(bytes: u64, page_size: FrameSize, notes: Notes) -> Result<Self, NotEnoughMemory> {
        let refused = NotEnoughMemory { wanted: bytes, free: mm::free_bytes() };
        let layouts = ram_ranges(bytes).map(|(start, bytes)| NotesLayout::new(notes, start, bytes).bytes());
        let beside: u64 = layouts.map(|bytes| bytes.next_multiple_of(PAGE_SIZE)).sum();
        let needed = refused.wanted.checked_next_multiple_of(CHUNK).and_then(|ram| ram.checked_add(beside));
        if needed.is_none_or(|needed| needed > refused.free) {
            return Err(refused);
        }
        let granule = page_size.min(FrameSize::Size2M);
        let mut memory = Self { ranges: Vec::new(), granule, fixed: Vec::new() };
        for (start, bytes) in ram_ranges(bytes) {
            // Before the RAM, which may leave no adjacent frames.
            let notes =
                NoteFrames::reserve(NotesLayout::new(notes, start, bytes)).map_err(|OutOfFrames| refused)?;
            // Whatever was reserved so far is given back by `Drop` when a later step fails.
            let range = Range {
                start,
                bytes,
                chunks: Vec::new(),
                granules: Vec::new(),
                granule_shift: granule.bytes().trailing_zeros(),
                notes,
            };
            memory.ranges.push(range);
            let range = memory.ranges.last_mut().expect("just pushed");
            range.fill(page_size, granule).map_err(|OutOfFrames| refused)?;
        }
        if page_size == FrameSize::Size1G {
            memory.zero_all();
        }
        Ok(memory)
    }

    /// Adds pages that the hardware needs beside the RAM.
    pub fn add_fixed_pages(&mut self, pages: &[GuestPage]) -> Result<(), OutOfMemory> {
        self.fixed.try_reserve_exact(pages.len()).map_err(|_| OutOfMemory)?;
        for page in pages {
            let frame = mm::alloc_zeroed(FrameSize::Size4K, Zone::Any).ok_or(OutOfMemory)?;
            // SAFETY: a new frame in the physical map, which nothing else knows yet.
            let content = unsafe { &mut *mm::phys_to_virt(frame).cast::<[u8; 4096]>() };
            (page.fill)(content);
            self.fixed.push(FixedPage { gpa: page.gpa, frame });
        }
        Ok(())
    }

    /// Zeroes everything now, so that 1 GiB pages can be mapped at the first fault.
    fn zero_all(&self) {
        for range in &self.ranges {
            for offset in (0..range.bytes).step_by(CHUNK as usize) {
                range.host(offset);
            }
        }
    }

    #[inline]
    fn range(&self, gpa: u64) -> Option<(&Range, u64)> {
        self.ranges.iter().find_map(|range| {
            let offset = gpa.wrapping_sub(range.start);
            (offset < range.bytes).then_some((range, offset))
        })
    }

    /// Host address of guest RAM at `gpa`, good for accesses up to the end of its 4 KiB page.
    #[inline]
    pub fn host(&self, gpa: u64) -> Option<PhysAddr> {
        let (range, offset) = self.range(gpa)?;
        Some(PhysAddr::new(range.host(offset)))
    }

    /// Splits an access at page boundaries and calls `copy` with each part's host pointer and range in the buffer.
    fn for_each_part(
        &self,
        gpa: u64,
        len: usize,
        mut copy: impl FnMut(*mut u8, core::ops::Range<usize>),
    ) -> Result<(), BadGpa> {
        let bad = BadGpa { gpa, len };
        let end = gpa.checked_add(len as u64).ok_or(bad)?;
        let mut page = gpa & !0xfff;
        while page < end {
            self.range(page).ok_or(bad)?;
            page += 0x1000;
        }
        let mut done = 0;
        while done < len {
            let at = gpa + done as u64;
            let part = (len - done).min((0x1000 - (at & 0xfff)) as usize);
            let host = self.host(at).ok_or(bad)?;
            copy(mm::phys_to_virt(host), done..done + part);
            done += part;
        }
        Ok(())
    }
}

/// The frame allocator, or the heap that lists its frames, has nothing left.
struct OutOfFrames;

impl Range {
    fn fill(&mut self, page_size: FrameSize, granule: FrameSize) -> Result<(), OutOfFrames> {
        let chunks = self.bytes.div_ceil(CHUNK) as usize;
        let granules = self.bytes.div_ceil(granule.bytes()) as usize;
        self.chunks.try_reserve_exact(chunks).map_err(|_| OutOfFrames)?;
        self.granules.try_reserve_exact(granules).map_err(|_| OutOfFrames)?;
        self.granules.resize_with(granules, || AtomicU8::new(UNUSED));
        let in_chunk = (CHUNK / granule.bytes()) as usize;
        while self.chunks.len() < chunks {
            let at = self.chunks.len() as u64 * CHUNK;
            let giga_fits =
                page_size == FrameSize::Size1G && at.is_multiple_of(GIGA) && self.bytes - at >= GIGA;
            let giga = giga_fits.then(|| mm::alloc(FrameSize::Size1G, Zone::Any)).flatten();
            let (frame, parts, mark) = match giga {
                Some(frame) => (frame, GIGA / CHUNK, IN_GIGA_FRAME),
                None => (mm::alloc(FrameSize::Size2M, Zone::Any).ok_or(OutOfFrames)?, 1, 0),
            };
            for part in 0..parts {
                let unready = (granules - self.chunks.len() * in_chunk).min(in_chunk) as u32;
                let host = (frame.as_u64() + part * CHUNK) | mark;
                self.chunks.push(Chunk { host, unready: AtomicU32::new(unready) });
            }
        }
        Ok(())
    }

    /// Host address that backs `offset`, which is zeroed by now.
    #[inline(always)]
    fn host(&self, offset: u64) -> u64 {
        let chunk = &self.chunks[(offset / CHUNK) as usize];
        if chunk.unready.load(Ordering::Acquire) != 0 {
            self.make_ready(offset, chunk);
        }
        chunk.frame() + offset % CHUNK
    }

    /// Zeroes the granule of `offset`, in `chunk`, if nobody has; waits if somebody does so now.
    #[inline(never)]
    fn make_ready(&self, offset: u64, chunk: &Chunk) {
        let state = &self.granules[(offset >> self.granule_shift) as usize];
        if state.load(Ordering::Acquire) == READY {
            return;
        }
        if state.compare_exchange(UNUSED, ZEROING, Ordering::Acquire, Ordering::Acquire).is_ok() {
            let in_granule = offset & ((1 << self.granule_shift) - 1);
            let start = chunk.frame() + offset % CHUNK - in_granule;
            // SAFETY: the granule lies in frames that this range owns, and ZEROING makes us its only user.
            unsafe { mm::phys::zero(PhysAddr::new(start), 1 << self.granule_shift) };
            state.store(READY, Ordering::Release);
            // Release: whoever finds none left sees all of them zeroed.
            chunk.unready.fetch_sub(1, Ordering::Release);
        } else {
            // Another CPU zeroes it with interrupts off: at most some hundred microseconds.
            while state.load(Ordering::Acquire) != READY {
                spin_loop();
            }
        }
    }

    /// Whether the gibibyte around `offset` is one host frame, wholly inside the range, and zeroed.
    fn giga_is_ready(&self, offset: u64, granule: FrameSize) -> bool {
        let first = (offset / GIGA * (GIGA / CHUNK)) as usize;
        let end = first + (GIGA / CHUNK) as usize;
        granule == FrameSize::Size2M
            && self.bytes / GIGA > offset / GIGA
            && self.chunks[first].host & IN_GIGA_FRAME != 0
            && self.chunks[first..end].iter().all(|chunk| chunk.unready.load(Ordering::Acquire) == 0)
    }
}

impl Chunk {
    /// Host address without the mark.
    #[inline(always)]
    const fn frame(&self) -> u64 {
        self.host & !IN_GIGA_FRAME
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        let mut next = 0;
        while let Some(chunk) = self.chunks.get(next) {
            let giga = chunk.host & IN_GIGA_FRAME != 0;
            let size = if giga { FrameSize::Size1G } else { FrameSize::Size2M };
            mm::free(PhysAddr::new(chunk.frame()), size);
            next += (size.bytes() / CHUNK) as usize;
        }
    }
}

/// A copy to or from guest memory by raw pointer: the guest may change it meanwhile, so no reference is ever made,
/// and what was read is data of a stranger.
impl GuestRam for HostMemory {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), BadGpa> {
        self.for_each_part(gpa, buf.len(), |host, range| {
            let part = &mut buf[range];
            // SAFETY: `host` is guest RAM up to the end of its page, mapped in the physical map, and never overlaps
            // Rust objects.
            unsafe { core::ptr::copy_nonoverlapping(host, part.as_mut_ptr(), part.len()) };
        })
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), BadGpa> {
        self.for_each_part(gpa, data.len(), |host, range| {
            let part = &data[range];
            // SAFETY: as in `read`.
            unsafe { core::ptr::copy_nonoverlapping(part.as_ptr(), host, part.len()) };
        })
    }
}

impl HostMemory {
    /// End of RAM below 4 GiB, and above it (0 if there is none).
    pub fn tops(&self) -> (u64, u64) {
        let end = |index: usize| self.ranges.get(index).map_or(0, |range| range.start + range.bytes);
        (end(0), end(1))
    }

    /// Slots that show this memory to the guest; the cookie is the index of the range.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        let ram = self.ranges.iter().enumerate().filter_map(|(index, range)| {
            let frames = GfnRange::new(Gpa::new(range.start).ok()?.gfn(), range.bytes / PAGE_SIZE).ok()?;
            Some(Slot::new(frames, SlotFlags::empty(), index as u64))
        });
        let fixed = self.fixed.iter().enumerate().filter_map(|(index, page)| {
            let frames = GfnRange::new(Gpa::new(page.gpa).ok()?.gfn(), 1).ok()?;
            Some(Slot::new(frames, SlotFlags::READ_ONLY, FIXED + index as u64))
        });
        ram.chain(fixed)
    }

    /// The frame of the fixed page that a slot named, if it did.
    #[cold]
    fn fixed_frame(&self, at: &RamAddr) -> Option<PhysAddr> {
        let index = at.cookie.checked_sub(FIXED)?;
        self.fixed.get(index as usize).filter(|_| at.slot_offset < PAGE_SIZE).map(|page| page.frame)
    }

    /// Pointer to a place that a slot named, good up to the end of its page.
    #[inline(always)]
    fn at(&self, at: &RamAddr) -> Result<*mut u8, NoPage> {
        let Some(range) = self.ranges.get(at.cookie as usize) else {
            let frame = self.fixed_frame(at).ok_or(NoPage)?;
            return Ok(mm::phys_to_virt(frame + at.slot_offset));
        };
        let offset = at.slot_offset;
        if offset >= range.bytes {
            return Err(NoPage);
        }
        Ok(mm::phys_to_virt(PhysAddr::new(range.host(offset))))
    }

    /// The same, for readers that keep it while the backing stays the same.
    pub fn pointer(&self, at: &RamAddr) -> Option<*const u8> {
        self.at(at).ok().map(<*mut u8>::cast_const)
    }

    /// The same as an atomic; the caller keeps to natural alignment.
    #[inline]
    fn atomic_u64(&self, at: &RamAddr) -> Result<&AtomicU64, NoPage> {
        let place = self.at(at)?.cast::<u64>();
        if !place.is_aligned() {
            return Err(NoPage);
        }
        // SAFETY: aligned, in guest RAM that lives as long as `self`; guest memory is only accessed atomically or by
        // copying through raw pointers, like memory shared with another process.
        Ok(unsafe { AtomicU64::from_ptr(place) })
    }

    #[inline]
    fn atomic_u32(&self, at: &RamAddr) -> Result<&AtomicU32, NoPage> {
        let place = self.at(at)?.cast::<u32>();
        if !place.is_aligned() {
            return Err(NoPage);
        }
        // SAFETY: as in `atomic_u64`.
        Ok(unsafe { AtomicU32::from_ptr(place) })
    }
}

impl Backing for HostMemory {
    #[inline(always)]
    fn resolve(&self, at: &RamAddr, want: PageSize, _: AccessKind) -> Resolved {
        let Some(range) = self.ranges.get(at.cookie as usize) else {
            return self.fixed_frame(at).map_or(Resolved::Absent, |frame| Resolved::Ram {
                pfn: Hpa::new_truncate(frame.as_u64()).pfn(),
                size: PageSize::Size4K,
            });
        };
        let offset = at.slot_offset;
        if offset >= range.bytes {
            return Resolved::Absent;
        }
        let host = range.host(offset);
        let size = match want {
            PageSize::Size1G if range.giga_is_ready(offset, self.granule) => PageSize::Size1G,
            PageSize::Size1G | PageSize::Size2M if self.granule == FrameSize::Size2M => PageSize::Size2M,
            _ => PageSize::Size4K,
        };
        Resolved::Ram { pfn: Hpa::new_truncate(host & !(size.bytes() - 1)).pfn(), size }
    }

    /// Of RAM; fixed pages have none, for they are never written.
    #[inline(always)]
    fn notes(&self, cookie: u64) -> SlotNotes<'_> {
        self.ranges.get(cookie as usize).map_or(SlotNotes::default(), |range| range.notes.get())
    }

    #[inline]
    fn read(&self, at: &RamAddr, buf: &mut [u8]) -> Result<(), NoPage> {
        let host = self.at(at)?;
        // SAFETY: the place and the length lie in one page of guest RAM.
        unsafe { core::ptr::copy_nonoverlapping(host, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    #[inline]
    fn write(&self, at: &RamAddr, data: &[u8]) -> Result<(), NoPage> {
        let host = self.at(at)?;
        // SAFETY: as in `read`.
        unsafe { core::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()) };
        Ok(())
    }

    #[inline]
    fn load_u32(&self, at: &RamAddr) -> Result<u32, NoPage> {
        Ok(self.atomic_u32(at)?.load(Ordering::Acquire))
    }

    #[inline]
    fn load_u64(&self, at: &RamAddr) -> Result<u64, NoPage> {
        Ok(self.atomic_u64(at)?.load(Ordering::Acquire))
    }

    #[inline(always)]
    fn words(&self, at: &RamAddr) -> Option<&[AtomicU64; ENTRIES]> {
        let page = RamAddr { slot_offset: at.slot_offset & !(PAGE_SIZE - 1), ..*at };
        let first = self.at(&page).ok()?;
        // SAFETY: as in `atomic_u64`; `at` is good up to the end of a page, and that is where this one begins.
        Some(unsafe { &*first.cast::<[AtomicU64; ENTRIES]>() })
    }

    fn compare_exchange_u32(&self, at: &RamAddr, current: u32, new: u32) -> Result<u32, NoPage> {
        let cell = self.atomic_u32(at)?;
        Ok(cell
            .compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst)
            .unwrap_or_else(|found| found))
    }

    fn compare_exchange_u64(&self, at: &RamAddr, current: u64, new: u64) -> Result<u64, NoPage> {
        let cell = self.atomic_u64(at)?;
        Ok(cell
            .compare_exchange(current, new, Ordering::SeqCst, Ordering::SeqCst)
            .unwrap_or_else(|found| found))
    }
}
