//! The frame allocator: which 4 KiB, 2 MiB and 1 GiB frames of the machine's memory are free.
//!
//! One bit a frame, a count of free frames for each 2 MiB block, and a summary for each 1 GiB chunk that holds any
//! memory. A block whose count is 512 is a free 2 MiB frame and a chunk of 512 such blocks a free 1 GiB frame, so
//! coalescing is counting. The books take 33 KiB for each chunk (0.003 %), lie apart from the memory they describe,
//! and holes in the physical address space cost nothing. No frame below 1 MiB is ever managed.

use super::ranges::{Range, RangeSet, PAGE_SIZE};
use x86_64::PhysAddr;

/// Frames in a 2 MiB block, and blocks in a 1 GiB chunk.
const FANOUT: usize = 512;
/// Frames in a 1 GiB chunk.
const CHUNK_FRAMES: u64 = (FANOUT * FANOUT) as u64;
/// `count` of a block that is wholly free.
const WHOLE: u16 = FANOUT as u16;
/// Bitmap words of one block.
const BLOCK_WORDS: usize = FANOUT / 64;
/// First address that is managed.
const LOWEST: u64 = 1 << 20;
/// Chunks with a lower index lie below 4 GiB.
const CHUNKS_BELOW_4G: u64 = 4;

/// Sizes of frames; each is naturally aligned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FrameSize {
    /// 4 KiB.
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl FrameSize {
    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            FrameSize::Size4K => PAGE_SIZE,
            FrameSize::Size2M => PAGE_SIZE * FANOUT as u64,
            FrameSize::Size1G => PAGE_SIZE * CHUNK_FRAMES,
        }
    }
}

/// Where a frame may lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zone {
    /// Anywhere; memory above 4 GiB is taken first.
    Any,
    /// Below 4 GiB, as PAE roots and 32-bit start-up code need.
    Below4G,
}

/// A frame was freed that is free already, that the allocator never owned, or that is not aligned: a bug of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadFree {
    /// The address that was to be freed.
    pub addr: u64,
}

/// What is known of one 1 GiB chunk without looking into it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Summary {
    /// Physical address divided by 1 GiB.
    index: u64,
    /// Free frames.
    free: u32,
    /// Blocks that are wholly free.
    whole: u16,
    /// Blocks that are neither wholly free nor wholly used.
    partial: u16,
}

/// The books of one 1 GiB chunk. All zeros is a valid value: nothing free.
#[repr(C)]
pub struct Chunk {
    /// Free frames of each block.
    counts: [u16; FANOUT],
    /// One bit a frame, set when free.
    bitmap: [u64; FANOUT * BLOCK_WORDS],
}

impl Chunk {
    /// A chunk without free frames.
    pub const EMPTY: Chunk = Chunk { counts: [0; FANOUT], bitmap: [0; FANOUT * BLOCK_WORDS] };

    fn block_words(&mut self, block: usize) -> &mut [u64] {
        &mut self.bitmap[block * BLOCK_WORDS..(block + 1) * BLOCK_WORDS]
    }
}

/// How many chunks (and summaries) an allocator over `ranges` needs.
pub fn chunks_needed(ranges: &RangeSet) -> usize {
    chunk_indices(ranges).count()
}

fn chunk_indices(ranges: &RangeSet) -> impl Iterator<Item = u64> + '_ {
    let chunk_bytes = FrameSize::Size1G.bytes();
    let mut next = 0;
    ranges.iter().filter_map(managed_part).flat_map(move |range| {
        let first = (range.start / chunk_bytes).max(next);
        let end = range.end.div_ceil(chunk_bytes);
        next = end.max(next);
        first..end
    })
}

fn managed_part(range: Range) -> Option<Range> {
    let range = range.shrink_to_pages().intersect(Range::new(LOWEST, u64::MAX));
    (!range.is_empty()).then_some(range)
}

/// The allocator. Its books are lent to it, so it works before there is a heap and in ordinary tests.
pub struct FrameAllocator<'a> {
    managed: RangeSet,
    summaries: &'a mut [Summary],
    chunks: &'a mut [Chunk],
    free_frames: u64,
    total_frames: u64,
    /// Where the last small frame was found: chunk and block.
    hint: (usize, usize),
}

impl<'a> FrameAllocator<'a> {
    /// An allocator that owns the whole pages of `ranges` from 1 MiB up, all of them free. `None` when there are
    /// fewer than [`chunks_needed`] books.
    pub fn new(ranges: &RangeSet, summaries: &'a mut [Summary], chunks: &'a mut [Chunk]) -> Option<Self> {
        let needed = chunks_needed(ranges);
        let summaries = summaries.get_mut(..needed)?;
        let chunks = chunks.get_mut(..needed)?;
        for (summary, index) in summaries.iter_mut().zip(chunk_indices(ranges)) {
            *summary = Summary { index, ..Summary::default() };
        }
        for chunk in chunks.iter_mut() {
            chunk.counts.fill(0);
            chunk.bitmap.fill(0);
        }
        let managed = RangeSet::new();
        let mut this = Self { managed, summaries, chunks, free_frames: 0, total_frames: 0, hint: (0, 0) };
        for range in ranges.iter().filter_map(managed_part) {
            this.managed.insert(range).ok()?;
            this.mark_free(range.start / PAGE_SIZE, range.len() / PAGE_SIZE);
        }
        this.total_frames = this.free_frames;
        Some(this)
    }

    /// Bytes in free frames.
    pub fn free_bytes(&self) -> u64 {
        self.free_frames * PAGE_SIZE
    }

    /// Bytes in all frames, free or not.
    pub fn total_bytes(&self) -> u64 {
        self.total_frames * PAGE_SIZE
    }

    /// Takes a frame. Its content is whatever was there before.
    pub fn alloc(&mut self, size: FrameSize, zone: Zone) -> Option<PhysAddr> {
        let frame = match size {
            FrameSize::Size4K => self.take_small(zone)?,
            FrameSize::Size2M => self.take_block(zone)?,
            FrameSize::Size1G => self.take_chunk(zone)?,
        };
        Some(PhysAddr::new(frame * PAGE_SIZE))
    }

    /// Returns a frame of `alloc`.
    pub fn free(&mut self, addr: PhysAddr, size: FrameSize) -> Result<(), BadFree> {
        if !addr.is_aligned(size.bytes()) {
            return Err(BadFree { addr: addr.as_u64() });
        }
        self.free_contiguous(addr, size.bytes())
    }

    /// Takes adjacent frames that hold `bytes`, aligned to a page.
    pub fn alloc_contiguous(&mut self, bytes: u64) -> Option<PhysAddr> {
        let frames = bytes.div_ceil(PAGE_SIZE);
        if frames == 0 || frames > self.free_frames {
            return None;
        }
        let high = self.first_chunk_above_4g();
        let start = self.find_run(high, frames).or_else(|| self.find_run(0, frames))?;
        self.mark_used(start, frames);
        Some(PhysAddr::new(start * PAGE_SIZE))
    }

    /// Returns the frames of `alloc_contiguous`, or several adjacent frames at once.
    pub fn free_contiguous(&mut self, addr: PhysAddr, bytes: u64) -> Result<(), BadFree> {
        let bad = BadFree { addr: addr.as_u64() };
        let range = Range::from_len(addr.as_u64(), bytes).grow_to_pages();
        if !addr.is_aligned(PAGE_SIZE) || bytes == 0 || !self.managed.contains(range) {
            return Err(bad);
        }
        let (frame, frames) = (range.start / PAGE_SIZE, range.len() / PAGE_SIZE);
        if !self.is_used(frame, frames) {
            return Err(bad);
        }
        self.mark_free(frame, frames);
        Ok(())
    }

    /// Chunks from here on lie above 4 GiB.
    fn first_chunk_above_4g(&self) -> usize {
        self.summaries.partition_point(|s| s.index < CHUNKS_BELOW_4G)
    }

    /// The best chunk of `zone` by `rank` (lower is better, `None` is unfit). Chunks above 4 GiB come first where
    /// they are allowed at all.
    fn best_chunk(&self, zone: Zone, rank: impl Fn(&Summary) -> Option<u8>) -> Option<usize> {
        let split = self.first_chunk_above_4g();
        let best_of = |first: usize, end: usize| {
            let mut best = None;
            for chunk in (first..end).rev() {
                match rank(&self.summaries[chunk]) {
                    Some(0) => return Some(chunk),
                    Some(r) if best.is_none_or(|(b, _)| r < b) => best = Some((r, chunk)),
                    _ => {}
                }
            }
            best.map(|(_, chunk)| chunk)
        };
        let high = match zone {
            Zone::Any => best_of(split, self.summaries.len()),
            Zone::Below4G => None,
        };
        high.or_else(|| best_of(0, split))
    }

    fn take_small(&mut self, zone: Zone) -> Option<u64> {
        let (chunk, block) = match self.hinted(zone) {
            Some(place) => place,
            None => {
                let chunk = self.best_chunk(zone, |s| match s {
                    s if s.partial > 0 => Some(0),
                    s if s.whole > 0 => Some(if s.whole < WHOLE { 1 } else { 2 }),
                    _ => None,
                })?;
                let counts = &self.chunks[chunk].counts;
                let partial = counts.iter().position(|&n| n > 0 && n < WHOLE);
                let block = partial.or_else(|| counts.iter().rposition(|&n| n == WHOLE))?;
                (chunk, block)
            }
        };
        self.hint = (chunk, block);
        let words = self.chunks[chunk].block_words(block);
        let word = words.iter().position(|&w| w != 0)?;
        let bit = words[word].trailing_zeros() as usize;
        words[word] &= words[word] - 1;
        self.set_count(chunk, block, self.chunks[chunk].counts[block] - 1);
        Some(self.frame_of(chunk, block) + (word * 64 + bit) as u64)
    }

    /// The block of the last small frame, if it still has one and `zone` allows it.
    fn hinted(&self, zone: Zone) -> Option<(usize, usize)> {
        let (chunk, block) = self.hint;
        let summary = self.summaries.get(chunk)?;
        let count = self.chunks[chunk].counts[block];
        let allowed = match zone {
            // A block below 4 GiB is second choice as long as there are frames above.
            Zone::Any => summary.index >= CHUNKS_BELOW_4G || self.summaries.last()?.index < CHUNKS_BELOW_4G,
            Zone::Below4G => summary.index < CHUNKS_BELOW_4G,
        };
        (allowed && count > 0 && count < WHOLE).then_some((chunk, block))
    }

    fn take_block(&mut self, zone: Zone) -> Option<u64> {
        let chunk = self.best_chunk(zone, |s| match s.whole {
            0 => None,
            WHOLE => Some(1),
            _ => Some(0),
        })?;
        let block = self.chunks[chunk].counts.iter().rposition(|&n| n == WHOLE)?;
        let frame = self.frame_of(chunk, block);
        self.mark_used(frame, FANOUT as u64);
        Some(frame)
    }

    fn take_chunk(&mut self, zone: Zone) -> Option<u64> {
        let chunk = self.best_chunk(zone, |s| (s.whole == WHOLE).then_some(0))?;
        let frame = self.frame_of(chunk, 0);
        self.mark_used(frame, CHUNK_FRAMES);
        Some(frame)
    }

    /// First frame of the first run of `frames` free frames in the chunks from `first_chunk` on.
    fn find_run(&self, first_chunk: usize, frames: u64) -> Option<u64> {
        let (mut start, mut len) = (0, 0);
        for chunk in first_chunk..self.chunks.len() {
            for (block, &count) in self.chunks[chunk].counts.iter().enumerate() {
                let base = self.frame_of(chunk, block);
                if start + len != base {
                    len = 0;
                }
                match count {
                    0 => len = 0,
                    WHOLE => {
                        start = if len == 0 { base } else { start };
                        len += FANOUT as u64;
                    }
                    _ => {
                        for i in 0..FANOUT {
                            let word = self.chunks[chunk].bitmap[block * BLOCK_WORDS + i / 64];
                            if word >> (i % 64) & 1 == 0 {
                                len = 0;
                                continue;
                            }
                            start = if len == 0 { base + i as u64 } else { start };
                            len += 1;
                            if len >= frames {
                                return Some(start);
                            }
                        }
                    }
                }
                if len >= frames {
                    return Some(start);
                }
            }
        }
        None
    }

    fn is_used(&mut self, frame: u64, frames: u64) -> bool {
        let mut used = true;
        self.for_each_word(frame, frames, |word, mask| {
            used &= *word & mask == 0;
        });
        used
    }

    fn mark_used(&mut self, frame: u64, frames: u64) {
        self.for_each_word(frame, frames, |word, mask| {
            debug_assert_eq!(*word & mask, mask, "a used frame was handed out");
            *word &= !mask;
        });
    }

    fn mark_free(&mut self, frame: u64, frames: u64) {
        self.for_each_word(frame, frames, |word, mask| *word |= mask);
    }

    /// Calls `change` with each bitmap word of the run and the mask of its bits in the run, and keeps the counts.
    fn for_each_word(&mut self, frame: u64, frames: u64, mut change: impl FnMut(&mut u64, u64)) {
        let end = frame + frames;
        let mut at = frame;
        while at < end {
            let Ok(chunk) = self.summaries.binary_search_by_key(&(at / CHUNK_FRAMES), |s| s.index) else {
                debug_assert!(false, "frame {at:#x} has no books");
                return;
            };
            let offset = (at % CHUNK_FRAMES) as usize;
            let (block, first) = (offset / FANOUT, offset % FANOUT);
            let last = (first as u64 + (end - at)).min(FANOUT as u64) as usize;
            let mut count = self.chunks[chunk].counts[block];
            for (i, word) in self.chunks[chunk].block_words(block).iter_mut().enumerate() {
                let low = first.clamp(i * 64, i * 64 + 64) - i * 64;
                let high = last.clamp(i * 64, i * 64 + 64) - i * 64;
                if low == high {
                    continue;
                }
                let mask = (u64::MAX >> (64 - (high - low))) << low;
                let before = word.count_ones() as u16;
                change(word, mask);
                count = count + word.count_ones() as u16 - before;
            }
            self.set_count(chunk, block, count);
            at += (last - first) as u64;
        }
    }

    fn set_count(&mut self, chunk: usize, block: usize, new: u16) {
        let old = core::mem::replace(&mut self.chunks[chunk].counts[block], new);
        let summary = &mut self.summaries[chunk];
        match old {
            0 => {}
            WHOLE => summary.whole -= 1,
            _ => summary.partial -= 1,
        }
        match new {
            0 => {}
            WHOLE => summary.whole += 1,
            _ => summary.partial += 1,
        }
        summary.free = summary.free + u32::from(new) - u32::from(old);
        self.free_frames = self.free_frames + u64::from(new) - u64::from(old);
    }

    fn frame_of(&self, chunk: usize, block: usize) -> u64 {
        self.summaries[chunk].index * CHUNK_FRAMES + (block * FANOUT) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use FrameSize::*;

    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;

    fn set(ranges: &[(u64, u64)]) -> RangeSet {
        let mut set = RangeSet::new();
        for &(start, end) in ranges {
            set.insert(Range::new(start, end)).unwrap();
        }
        set
    }

    fn with<R>(ranges: &[(u64, u64)], test: impl FnOnce(&mut FrameAllocator<'_>) -> R) -> R {
        let ranges = set(ranges);
        let needed = chunks_needed(&ranges);
        let mut summaries = vec![Summary::default(); needed];
        let mut chunks: Vec<Chunk> = (0..needed).map(|_| Chunk::EMPTY).collect();
        test(&mut FrameAllocator::new(&ranges, &mut summaries, &mut chunks).unwrap())
    }

    /// The summaries and counts say what the bitmap says.
    fn check_books(frames: &FrameAllocator<'_>) {
        let mut free = 0;
        for (summary, chunk) in frames.summaries.iter().zip(frames.chunks.iter()) {
            let counts: Vec<u16> = chunk
                .bitmap
                .chunks(BLOCK_WORDS)
                .map(|b| b.iter().map(|w| w.count_ones() as u16).sum())
                .collect();
            assert_eq!(counts[..], chunk.counts[..]);
            assert_eq!(summary.whole as usize, counts.iter().filter(|&&n| n == WHOLE).count());
            assert_eq!(summary.partial as usize, counts.iter().filter(|&&n| n > 0 && n < WHOLE).count());
            assert_eq!(summary.free, counts.iter().map(|&n| u32::from(n)).sum::<u32>());
            free += u64::from(summary.free);
        }
        assert_eq!(frames.free_frames, free);
    }

    #[test]
    fn nothing_below_1m_is_managed() {
        with(&[(0, 0x9_f000), (M, M + 0x3000)], |f| {
            assert_eq!(f.free_bytes(), 0x3000);
            while let Some(addr) = f.alloc(Size4K, Zone::Any) {
                assert!(addr.as_u64() >= M);
            }
            assert_eq!(f.free_bytes(), 0);
        });
    }

    #[test]
    fn large_frames_are_naturally_aligned_and_come_back() {
        with(&[(M, 3 * G)], |f| {
            let total = f.free_bytes();
            let a = f.alloc(Size1G, Zone::Any).unwrap();
            let b = f.alloc(Size1G, Zone::Any).unwrap();
            assert!(a.is_aligned(G) && b.is_aligned(G) && a != b);
            assert_eq!(f.alloc(Size1G, Zone::Any), None, "the first gigabyte lacks its first megabyte");
            f.free(a, Size1G).unwrap();
            let small: Vec<_> = (0..3).map(|_| f.alloc(Size4K, Zone::Any).unwrap()).collect();
            assert_eq!(f.alloc(Size1G, Zone::Any), Some(a), "small frames come from a broken chunk");
            f.free(a, Size1G).unwrap();
            f.free(b, Size1G).unwrap();
            for addr in small {
                f.free(addr, Size4K).unwrap();
            }
            assert_eq!(f.free_bytes(), total);
            check_books(f);
        });
    }

    #[test]
    fn a_block_coalesces_from_small_frames() {
        with(&[(2 * M, 4 * M)], |f| {
            let all: Vec<_> = (0..512).map(|_| f.alloc(Size4K, Zone::Any).unwrap()).collect();
            assert_eq!(f.alloc(Size4K, Zone::Any), None);
            for addr in &all[1..] {
                f.free(*addr, Size4K).unwrap();
            }
            assert_eq!(f.alloc(Size2M, Zone::Any), None);
            f.free(all[0], Size4K).unwrap();
            assert_eq!(f.alloc(Size2M, Zone::Any), Some(PhysAddr::new(2 * M)));
        });
    }

    #[test]
    fn zones_are_kept() {
        with(&[(M, 2 * G), (4 * G, 5 * G)], |f| {
            assert!(f.alloc(Size4K, Zone::Any).unwrap().as_u64() >= 4 * G);
            assert!(f.alloc(Size4K, Zone::Below4G).unwrap().as_u64() < 4 * G);
            assert!(f.alloc(Size4K, Zone::Any).unwrap().as_u64() >= 4 * G);
            assert!(f.alloc(Size2M, Zone::Below4G).unwrap().as_u64() < 4 * G);
            assert!(f.alloc_contiguous(12 << 10).unwrap().as_u64() >= 4 * G);
            while f.alloc(Size2M, Zone::Any).is_some() {}
            while f.alloc(Size4K, Zone::Any).is_some() {}
            assert_eq!(f.free_bytes(), 0);
        });
    }

    #[test]
    fn contiguous_runs_cross_blocks_and_chunks_but_not_holes() {
        with(&[(G - 3 * PAGE_SIZE, G + 2 * PAGE_SIZE), (G + 3 * PAGE_SIZE, G + 6 * PAGE_SIZE)], |f| {
            let run = f.alloc_contiguous(5 * PAGE_SIZE - 1).unwrap();
            assert_eq!(run.as_u64(), G - 3 * PAGE_SIZE);
            assert_eq!(f.alloc_contiguous(4 * PAGE_SIZE), None);
            assert_eq!(f.alloc_contiguous(0), None);
            assert_eq!(f.alloc_contiguous(u64::MAX), None);
            f.free_contiguous(run, 5 * PAGE_SIZE).unwrap();
            assert_eq!(f.free_bytes(), 8 * PAGE_SIZE);
            check_books(f);
        });
        with(&[(3 * G, 4 * G), (9 * G, 10 * G)], |f| {
            assert_eq!(f.alloc_contiguous(G + PAGE_SIZE), None, "a hole lies between");
        });
    }

    #[test]
    fn bad_frees_are_refused() {
        with(&[(M, 8 * M)], |f| {
            let addr = f.alloc(Size4K, Zone::Any).unwrap();
            assert!(f.free(addr + 8u64, Size4K).is_err());
            f.free(addr, Size4K).unwrap();
            assert_eq!(f.free(addr, Size4K), Err(BadFree { addr: addr.as_u64() }));
            assert!(f.free(PhysAddr::new(0x8000), Size4K).is_err(), "below 1 MiB");
            assert!(f.free(PhysAddr::new(8 * M), Size4K).is_err(), "not memory");
            assert!(f.free(PhysAddr::new(6 * M + 0x1000), Size2M).is_err(), "not aligned");
            assert!(f.free(PhysAddr::new(6 * M), Size2M).is_err(), "free already");
            check_books(f);
        });
    }

    #[test]
    fn terabytes_cost_little_and_holes_nothing() {
        let far = 40 << 40;
        let ranges = set(&[(M, 3 * G), (4 * G, 1 << 40), (far, far + G)]);
        assert_eq!(chunks_needed(&ranges), 3 + 1020 + 1);
        assert!(core::mem::size_of::<Chunk>() + core::mem::size_of::<Summary>() < 34 << 10);
        with(&[(M, 3 * G), (far, far + G)], |f| {
            assert_eq!(f.alloc(Size1G, Zone::Any), Some(PhysAddr::new(far)));
        });
    }

    #[test]
    fn odd_maps() {
        // Fragments smaller than a page, one page at the end of a chunk, ranges that share a chunk.
        with(
            &[
                (M + 1, M + 0xfff),
                (G - PAGE_SIZE, G),
                (G + 0x1800, G + 0x3800),
                (G + 5 * M, G + 5 * M + 0x1000),
            ],
            |f| {
                assert_eq!(f.summaries.len(), 2);
                assert_eq!(f.total_bytes(), 3 * PAGE_SIZE);
                check_books(f);
            },
        );
        with(&[], |f| assert_eq!(f.alloc(Size4K, Zone::Any), None));
        assert!(FrameAllocator::new(&set(&[(M, G)]), &mut [], &mut []).is_none());
    }

    #[derive(Clone, Debug)]
    enum Op {
        Alloc(FrameSize, Zone),
        Contiguous(u64),
        Free(prop::sample::Index),
    }

    fn ops() -> impl Strategy<Value = Op> {
        let size = prop_oneof![4 => Just(Size4K), 3 => Just(Size2M), 1 => Just(Size1G)];
        let zone = prop_oneof![Just(Zone::Any), Just(Zone::Below4G)];
        prop_oneof![
            4 => (size, zone).prop_map(|(s, z)| Op::Alloc(s, z)),
            1 => (1u64..3000).prop_map(Op::Contiguous),
            4 => any::<prop::sample::Index>().prop_map(Op::Free),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn agrees_with_a_set_of_frames(ops in prop::collection::vec(ops(), 1..80), low in 0u64..600, odd in 0u64..9000) {
            // A gigabyte with a ragged start, a short piece below 4 GiB and one whole gigabyte above.
            let map = [(2 * G + low * PAGE_SIZE, 3 * G + 5 * M + odd), (4 * G, 5 * G + 3 * PAGE_SIZE)];
            with(&map, |f| {
                // The model is a set of ranges, which has its own test against a set of numbers.
                let mut free = RangeSet::new();
                for &(start, end) in &map {
                    free.insert(Range::new(start, end).shrink_to_pages()).unwrap();
                }
                let mut held: Vec<Range> = Vec::new();
                for op in ops {
                    match op {
                        Op::Alloc(size, zone) => {
                            let limit = if zone == Zone::Any { u64::MAX } else { 4 * G };
                            match f.alloc(size, zone) {
                                Some(addr) => {
                                    let range = Range::from_len(addr.as_u64(), size.bytes());
                                    prop_assert!(addr.is_aligned(size.bytes()) && range.end <= limit);
                                    prop_assert!(free.contains(range), "{:?} handed out twice", range);
                                    free.remove(range);
                                    held.push(range);
                                }
                                None => {
                                    let fits = |r: Range| {
                                        r.start.next_multiple_of(size.bytes()) + size.bytes() <= r.end.min(limit)
                                    };
                                    prop_assert!(!free.iter().any(fits));
                                }
                            }
                        }
                        Op::Contiguous(frames) => {
                            let bytes = frames * PAGE_SIZE;
                            match f.alloc_contiguous(bytes) {
                                Some(addr) => {
                                    let range = Range::from_len(addr.as_u64(), bytes);
                                    prop_assert!(free.contains(range));
                                    free.remove(range);
                                    held.push(range);
                                }
                                None => prop_assert!(!free.iter().any(|r| r.len() >= bytes)),
                            }
                        }
                        Op::Free(index) if !held.is_empty() => {
                            let range = held.swap_remove(index.index(held.len()));
                            let addr = PhysAddr::new(range.start);
                            f.free_contiguous(addr, range.len()).unwrap();
                            free.insert(range).unwrap();
                            prop_assert!(f.free_contiguous(addr, PAGE_SIZE).is_err());
                        }
                        Op::Free(_) => {}
                    }
                    prop_assert_eq!(f.free_bytes(), free.total());
                }
                check_books(f);
                Ok(())
            })?;
        }
    }
}
