//! The page-modification log: 512 guest-physical addresses of pages that became dirty. SDM vol. 3, 29.3.6.

/// Entries of a log, eight bytes each: one page.
pub const ENTRIES: usize = 512;
/// The PML index of an empty log: the processor writes there next, and counts down.
pub const EMPTY: u16 = ENTRIES as u16 - 1;

/// Calls `each` with every guest-physical page address of a log whose PML index is `index`, the oldest first. `entry` reads
/// one entry.
#[inline]
pub fn drain(index: u16, entry: impl Fn(usize) -> u64, each: &mut impl FnMut(u64)) {
    // Behind the last entry, number 0, the index wraps around.
    let first = if index > EMPTY { 0 } else { usize::from(index) + 1 };
    for slot in (first..ENTRIES).rev() {
        each(entry(slot) & !0xfff);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    /// A processor that logs `pages` into a log of ones; the index afterwards and the entries.
    fn log(pages: &[u64]) -> (u16, [u64; ENTRIES]) {
        let (mut index, mut entries) = (EMPTY, [u64::MAX; ENTRIES]);
        for page in pages {
            entries[usize::from(index)] = *page;
            index = index.wrapping_sub(1);
        }
        (index, entries)
    }

    #[test]
    fn every_logged_page_comes_out_once_in_order() {
        for count in [0, 1, 2, 511, 512] {
            let pages: Vec<u64> = (1..=count).map(|n| n << 12).collect();
            let (index, entries) = log(&pages);
            let mut drained = Vec::new();
            drain(index, |slot| entries[slot], &mut |gpa| drained.push(gpa));
            assert_eq!(drained, pages);
        }
    }

    #[test]
    fn a_full_log_has_an_index_outside() {
        assert_eq!(log(&[0; ENTRIES]).0, u16::MAX);
    }
}
