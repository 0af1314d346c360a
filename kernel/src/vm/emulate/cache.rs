//! The decode cache: a direct-mapped table from (code size, instruction bytes) to decoded instructions.
//!
//! The key is everything decoding depends on, so an entry never goes stale: changed code has other bytes. (A cache by
//! address would have to know of every write to code and of every INVLPG.)
use super::decode::{DecodeError, DecodedInsn, MAX_LEN};
use alloc::boxed::Box;
use alloc::collections::TryReserveError;
use alloc::vec::Vec;

/// Number of instructions a cache holds.
pub const ENTRIES: usize = 256;

/// Up to fifteen instruction bytes, zero-padded, and in the last byte their number and the code size. A shorter
/// fetch is another key than a longer one that continues with zeros.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    low: u64,
    high: u64,
}

impl Key {
    /// No fetch has this key: its length is 0.
    const NONE: Self = Self { low: 0, high: 0 };

    #[inline]
    fn new(bitness: u32, bytes: &[u8]) -> Self {
        let mut key = [0; 16];
        let len = if let Some(whole) = bytes.first_chunk::<MAX_LEN>() {
            key[..MAX_LEN].copy_from_slice(whole);
            MAX_LEN
        } else {
            key[..bytes.len()].copy_from_slice(bytes);
            bytes.len()
        };
        key[15] = len as u8 | bitness as u8; // bitness is 0x10, 0x20 or 0x40, the length below 0x10
        let key = u128::from_le_bytes(key);
        Self { low: key as u64, high: (key >> 64) as u64 }
    }

    #[inline]
    fn slot(self) -> usize {
        let mixed = (self.low ^ self.high.rotate_left(29)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 56) as usize % ENTRIES
    }
}

#[derive(Clone, Copy)]
struct Entry {
    key: Key,
    insn: DecodedInsn,
}

const _: () = assert!(size_of::<Entry>() <= 64, "an entry fits a cache line");

/// Decoded instructions of one vCPU. Its memory is allocated once.
pub struct DecodeCache {
    entries: Box<[Entry]>,
    misses: u64,
}

impl DecodeCache {
    /// An empty cache. Also makes the decoder build its tables, so that no later call allocates.
    pub fn new() -> Result<Self, TryReserveError> {
        let nop = DecodedInsn::decode(64, &[0x90]).unwrap_or(DecodedInsn::EMPTY);
        let mut entries = Vec::new();
        entries.try_reserve_exact(ENTRIES)?;
        entries.resize(ENTRIES, Entry { key: Key::NONE, insn: nop });
        Ok(Self { entries: entries.into_boxed_slice(), misses: 0 })
    }

    /// The instruction that `bytes` (of which up to 15 count) begin with as code of `bitness` 16, 32 or 64.
    /// Rejected bytes are not remembered.
    #[inline]
    pub fn lookup(&mut self, bitness: u32, bytes: &[u8]) -> Result<&DecodedInsn, DecodeError> {
        let key = Key::new(bitness, bytes);
        let entry = &mut self.entries[key.slot()];
        if entry.key != key {
            let insn = decode(bitness, bytes, &mut self.misses)?;
            *entry = Entry { key, insn };
        }
        Ok(&entry.insn)
    }

    /// How many lookups had to decode.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.misses
    }
}

#[cold]
#[inline(never)]
fn decode(bitness: u32, bytes: &[u8], misses: &mut u64) -> Result<DecodedInsn, DecodeError> {
    *misses += 1;
    DecodedInsn::decode(bitness, bytes)
}
