//! The smallest guests: a few instructions in a Multiboot 1 file.

/// Where the code is loaded and entered, in 32-bit protected mode without paging (Multiboot 0.6.96, 3.2).
pub(crate) const ENTRY: u32 = 0x10_1000;

/// Multiboot 0.6.96, 3.1.2: magic, no flags, and what makes the sum zero.
const HEADER: [u32; 3] = [0x1bad_b002, 0, 0x1bad_b002_u32.wrapping_neg()];

/// An ELF32 file (System V ABI, chapter 4 and 5) with one segment at [`ENTRY`] that holds `code`, then the header.
pub(crate) fn multiboot(code: &[u8]) -> Vec<u8> {
    const OFFSET: usize = 0x1000;
    let mut segment = code.to_vec();
    segment.resize(segment.len().next_multiple_of(4), 0x90);
    segment.extend(HEADER.iter().flat_map(|word| word.to_le_bytes()));
    let len = segment.len() as u32;

    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    // executable, 386
    file.extend([2u16, 3].iter().flat_map(|half| half.to_le_bytes()));
    // version, entry, program headers after this header, no sections, no flags
    file.extend([1, ENTRY, 52, 0, 0].iter().flat_map(|word: &u32| word.to_le_bytes()));
    // size of this header, size and number of program headers, no sections
    file.extend([52u16, 32, 1, 40, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    // load: offset, virtual and physical address, size in file and memory, rwx, alignment
    let program = [1, OFFSET as u32, ENTRY, ENTRY, len, len, 7, OFFSET as u32];
    file.extend(program.iter().flat_map(|word| word.to_le_bytes()));
    file.resize(OFFSET, 0);
    file.extend_from_slice(&segment);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(file: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(file[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_file_is_what_multiboot_wants() {
        let file = multiboot(&[0xf4]);
        assert_eq!((word(&file, 24), word(&file, 28)), (ENTRY, 52));
        let (offset, address, size) = (word(&file, 56) as usize, word(&file, 64), word(&file, 68) as usize);
        assert_eq!((address, offset + size), (ENTRY, file.len()));
        assert_eq!(file[offset], 0xf4);
        let header = (0..8192 - 12).step_by(4).find(|at| word(&file, *at) == HEADER[0]).unwrap();
        let sum = (0..3).map(|n| word(&file, header + 4 * n)).fold(0, u32::wrapping_add);
        assert_eq!(sum, 0);
    }
}
