//! Tags of one physical CPU's TLB: SVM's ASIDs (AMD APM vol. 2, 15.16) and VMX's VPIDs (Intel SDM vol. 3, 29.1).
//!
//! Numbers belong to a CPU: a tag is a pair of generation and number, valid on the CPU that gave it while its
//! generation lasts. When the numbers run out, a new generation begins and the first entry in it flushes all.

/// A tag in one CPU's TLB. The default tag is valid nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    /// Generation of the allocator that gave the tag; 0 is never current.
    pub generation: u64,
    /// ASID or VPID, 1 or above when valid.
    pub number: u32,
}

/// Hands out tags on one CPU.
#[derive(Debug)]
pub struct TagAllocator {
    generation: u64,
    next: u32,
    /// Number of tags the CPU has, the host's zero included.
    count: u32,
}

/// A freshly allocated tag, and whether the whole TLB must be flushed at the entry that first uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// The tag.
    pub tag: Tag,
    /// A new generation began: entries of the old one may still be cached under any number.
    pub flush_all: bool,
}

impl TagAllocator {
    /// An allocator for a CPU with `count` tags (at least 2: the host's and one for guests). Its first
    /// allocation asks for a flush, since what ran before on this CPU is unknown.
    pub const fn new(count: u32) -> Self {
        Self { generation: 0, next: count, count }
    }

    /// Whether `tag` may still be used here.
    #[inline]
    pub fn is_current(&self, tag: Tag) -> bool {
        tag.generation == self.generation && tag.number != 0
    }

    /// Gives a tag that no entry of this CPU's TLB carries once `flush_all` has been obeyed.
    pub fn allocate(&mut self) -> Allocation {
        let flush_all = self.next >= self.count;
        if flush_all {
            self.generation += 1;
            self.next = 1;
        }
        let tag = Tag { generation: self.generation, number: self.next };
        self.next += 1;
        Allocation { tag, flush_all }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_default_tag_is_never_current() {
        let mut tags = TagAllocator::new(16);
        assert!(!tags.is_current(Tag::default()));
        tags.allocate();
        assert!(!tags.is_current(Tag::default()));
    }

    #[test]
    fn a_generation_never_repeats_a_tag_and_never_gives_the_hosts() {
        for count in [2, 3, 16, 32768] {
            let mut tags = TagAllocator::new(count);
            let mut seen = HashSet::new();
            for _ in 0..70_000 {
                let a = tags.allocate();
                if a.flush_all {
                    seen.clear();
                }
                assert!(a.tag.number >= 1 && a.tag.number < count);
                assert!(seen.insert(a.tag.number), "tag reused without a flush");
                assert!(tags.is_current(a.tag));
            }
        }
    }

    #[test]
    fn running_out_invalidates_every_older_tag() {
        let mut tags = TagAllocator::new(3);
        let first = tags.allocate();
        let second = tags.allocate();
        assert!(first.flush_all && !second.flush_all);
        let third = tags.allocate();
        assert!(third.flush_all);
        assert!(!tags.is_current(first.tag) && !tags.is_current(second.tag));
    }
}
