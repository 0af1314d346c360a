//! A stretch of made-up physical memory for the tests of what loaders leave behind.
use std::vec;
use std::vec::Vec;

use zerocopy::IntoBytes;

use crate::handover::Physical;

/// Memory from `base` on, 8-aligned like the real thing.
pub(crate) struct Memory {
    base: u64,
    words: Vec<u64>,
}

impl Memory {
    pub(crate) fn new(base: u64, len: usize) -> Self {
        Self { base, words: vec![0; len.div_ceil(8)] }
    }

    /// Puts `bytes` at the physical address `at`.
    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        let offset = (at - self.base) as usize;
        self.words.as_mut_bytes()[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

impl Physical for Memory {
    fn bytes(&self, at: u64, len: usize) -> Option<&[u8]> {
        let offset = usize::try_from(at.checked_sub(self.base)?).ok()?;
        self.words.as_bytes().get(offset..offset.checked_add(len)?)
    }
}
