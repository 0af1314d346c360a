//! Boot information in low memory: tables, parameters and texts, one behind the other.
use core::ops::Range;

use super::{align_up, Problem, PAGE};
use crate::vm::layout;
use crate::vm::ram::GuestRam;

/// Boot information begins above the page that real mode's vectors and the BIOS data area would use.
const START: u64 = 0x1000;

/// Hands out the RAM below 640 KiB.
pub(super) struct LowMemory<'r, R> {
    ram: &'r R,
    next: u64,
}

impl<'r, R: GuestRam> LowMemory<'r, R> {
    /// All of it is free.
    pub(super) fn new(ram: &'r R) -> Self {
        Self { ram, next: START }
    }

    /// Finds room, a multiple of `alignment` (a power of two), without writing to it.
    pub(super) fn reserve(&mut self, len: u64, alignment: u64) -> Result<u64, Problem> {
        let at = align_up(self.next, alignment).ok_or(Problem::TooMuchInformation)?;
        let end = at.checked_add(len).filter(|&end| end <= layout::LOW_RAM_END);
        self.next = end.ok_or(Problem::TooMuchInformation)?;
        Ok(at)
    }

    /// Places `bytes` and returns their guest-physical address.
    pub(super) fn put(&mut self, bytes: &[u8], alignment: u64) -> Result<u64, Problem> {
        let at = self.reserve(bytes.len() as u64, alignment)?;
        self.ram.write(at, bytes)?;
        Ok(at)
    }

    /// Writes into room that was reserved.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Problem> {
        Ok(self.ram.write(at, bytes)?)
    }

    /// Places the parts as one text ended by NUL.
    pub(super) fn put_text(&mut self, parts: &[&str]) -> Result<u64, Problem> {
        let start = self.next;
        for part in parts {
            self.put(part.as_bytes(), 1)?;
        }
        self.put(&[0], 1)?;
        Ok(start)
    }

    /// Places page tables that map the first 4 GiB to themselves by pages of 2 MiB, and returns CR3.
    /// AMD APM vol. 2, 5.3.
    pub(super) fn put_identity_map(&mut self) -> Result<u64, Problem> {
        const PRESENT_WRITABLE: u64 = 0x3;
        const LARGE: u64 = 1 << 7;
        let pml4 = self.reserve(6 * PAGE, PAGE)?;
        let pdpt = pml4 + PAGE;
        let directories = pdpt + PAGE;

        let table = |entries: &mut dyn Iterator<Item = u64>| {
            let mut table = [0; PAGE as usize];
            for (slot, entry) in table.chunks_exact_mut(8).zip(entries) {
                slot.copy_from_slice(&entry.to_le_bytes());
            }
            table
        };
        self.ram.write(pml4, &table(&mut core::iter::once(pdpt | PRESENT_WRITABLE)))?;
        let directory = |index: u64| directories + index * PAGE;
        self.ram.write(pdpt, &table(&mut (0..4).map(|index| directory(index) | PRESENT_WRITABLE)))?;
        for index in 0..4 {
            let mut pages = (0..512).map(|page| ((index * 512 + page) << 21) | LARGE | PRESENT_WRITABLE);
            self.ram.write(directory(index), &table(&mut pages))?;
        }
        Ok(pml4)
    }

    /// What has been handed out.
    pub(super) fn used(&self) -> Range<u64> {
        START..self.next
    }
}
