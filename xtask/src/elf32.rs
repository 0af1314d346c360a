//! Rewrites a static ELF64 as the ELF32 that Multiboot 1 loaders want.
//!
//! Rust's bare-metal target makes ELF64; Multiboot 1 (and `qemu -kernel` with it) loads ELF32 only. The segments,
//! the entry point and the addresses stay as they are; sections and symbols are left out.
use anyhow::{bail, ensure, Context, Result};
use std::fs;
use std::path::Path;

/// Magic of the Multiboot 1 header. Multiboot specification 0.6.96, 3.1.2.
const MULTIBOOT_MAGIC: u32 = 0x1bad_b002;
/// The header must lie within this many bytes from the start of the file. Same, 3.1.
const MULTIBOOT_WINDOW: usize = 8192;
/// File offset of the first segment, and the alignment of all.
const ALIGN: usize = 4096;

/// System V ABI, chapter 4 and 5: sizes and values of the two classes.
const EHDR32: usize = 52;
const PHDR32: usize = 32;
const EHDR64: usize = 64;
const PHDR64: usize = 56;
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const ET_EXEC: u16 = 2;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;

/// Converts the file `input` and writes the result to `output`.
pub fn convert(input: &Path, output: &Path) -> Result<()> {
    let elf = fs::read(input).with_context(|| format!("cannot read {}", input.display()))?;
    let converted = convert_bytes(&elf)
        .with_context(|| format!("{} cannot become a Multiboot payload", input.display()))?;
    fs::write(output, converted).with_context(|| format!("cannot write {}", output.display()))
}

/// One loadable segment.
struct Segment<'a> {
    flags: u32,
    address: u32,
    data: &'a [u8],
    memory_size: u32,
}

/// Converts an ELF64 image in memory.
pub fn convert_bytes(elf: &[u8]) -> Result<Vec<u8>> {
    ensure!(elf.get(..4) == Some(b"\x7fELF"), "it is not an ELF file");
    ensure!(elf.get(4) == Some(&2), "it is not a 64-bit ELF file");
    ensure!(elf.get(5) == Some(&1), "it is not little-endian");
    ensure!(elf.len() >= EHDR64, "it ends inside the ELF header");
    let machine = u16_at(elf, 18)?;
    ensure!(machine == EM_X86_64, "it is for machine type {machine}, not for x86-64");
    let kind = u16_at(elf, 16)?;
    ensure!(
        kind == ET_EXEC,
        "it is not linked at fixed addresses (ELF type {kind}); build it with relocation-model=static"
    );
    let entry = u64_at(elf, 24)?;
    let segments = segments(elf)?;
    ensure!(!segments.is_empty(), "it has nothing to load");
    let entry32 =
        u32::try_from(entry).with_context(|| format!("its entry point {entry:#x} is above 4 GiB"))?;
    ensure!(
        segments.iter().any(|s| entry32.wrapping_sub(s.address) < s.memory_size),
        "its entry point {entry:#x} is in no segment"
    );
    let image = write(entry32, &segments)?;
    ensure!(
        has_multiboot_header(&image),
        "it has no valid Multiboot header in its first {MULTIBOOT_WINDOW} bytes; link section .multiboot first"
    );
    Ok(image)
}

fn segments(elf: &[u8]) -> Result<Vec<Segment<'_>>> {
    let table = usize::try_from(u64_at(elf, 32)?).context("its program headers are out of reach")?;
    let entry_size = usize::from(u16_at(elf, 54)?);
    let count = usize::from(u16_at(elf, 56)?);
    ensure!(
        count == 0 || entry_size >= PHDR64,
        "its program headers have {entry_size} bytes, {PHDR64} are needed"
    );
    let mut segments = Vec::new();
    for index in 0..count {
        let at = index
            .checked_mul(entry_size)
            .and_then(|offset| offset.checked_add(table))
            .context("its program headers are out of reach")?;
        match u32_at(elf, at)? {
            PT_LOAD => {}
            PT_DYNAMIC | PT_INTERP => bail!("it is dynamically linked; link it statically"),
            _ => continue,
        }
        let flags = u32_at(elf, at + 4)?;
        let offset = u64_at(elf, at + 8)?;
        let address = u64_at(elf, at + 24)?;
        let file_size = u64_at(elf, at + 32)?;
        let memory_size = u64_at(elf, at + 40)?;
        if memory_size == 0 {
            continue;
        }
        ensure!(file_size <= memory_size, "segment {index} is larger in the file than in memory");
        let end = address.checked_add(memory_size).filter(|&end| end <= 1 << 32);
        ensure!(end.is_some(), "segment {index} at {address:#x} does not end below 4 GiB");
        let data = usize::try_from(offset)
            .ok()
            .zip(usize::try_from(file_size).ok())
            .and_then(|(offset, size)| elf.get(offset..offset.checked_add(size)?))
            .with_context(|| format!("segment {index} reaches beyond the end of the file"))?;
        // Both fit: `end` was checked above, and a segment of all 4 GiB has no 32-bit size.
        let memory_size = u32::try_from(memory_size).context("a segment has 4 GiB")?;
        segments.push(Segment { flags, address: u32::try_from(address)?, data, memory_size });
    }
    segments.sort_by_key(|segment| segment.address);
    for pair in segments.windows(2) {
        ensure!(
            pair[0].memory_size <= pair[1].address - pair[0].address,
            "segments at {:#x} and {:#x} overlap",
            pair[0].address,
            pair[1].address
        );
    }
    Ok(segments)
}

fn write(entry: u32, segments: &[Segment<'_>]) -> Result<Vec<u8>> {
    let headers = EHDR32 + PHDR32 * segments.len();
    ensure!(headers <= ALIGN, "it has {} segments, too many for one page of headers", segments.len());
    let mut image = Vec::new();
    image.extend(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    put16(&mut image, &[ET_EXEC, EM_386]);
    put32(&mut image, &[1, entry, EHDR32 as u32, 0, 0]);
    put16(&mut image, &[EHDR32 as u16, PHDR32 as u16, segments.len() as u16, 0, 0, 0]);
    let mut offset = ALIGN;
    for segment in segments {
        let file_size = u32::try_from(segment.data.len())?;
        let file_offset = u32::try_from(offset).context("it is larger than 4 GiB")?;
        let address = segment.address;
        put32(
            &mut image,
            &[
                PT_LOAD,
                file_offset,
                address,
                address,
                file_size,
                segment.memory_size,
                segment.flags,
                ALIGN as u32,
            ],
        );
        offset = (offset + segment.data.len()).next_multiple_of(ALIGN);
    }
    for segment in segments {
        image.resize(image.len().next_multiple_of(ALIGN), 0);
        image.extend(segment.data);
    }
    Ok(image)
}

fn has_multiboot_header(image: &[u8]) -> bool {
    let window = &image[..image.len().min(MULTIBOOT_WINDOW)];
    window.chunks_exact(4).zip(window.chunks_exact(4).skip(1)).zip(window.chunks_exact(4).skip(2)).any(
        |((magic, flags), checksum)| {
            let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            word(magic) == MULTIBOOT_MAGIC
                && word(magic).wrapping_add(word(flags)).wrapping_add(word(checksum)) == 0
        },
    )
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    at.checked_add(N)
        .and_then(|end| bytes.get(at..end))
        .and_then(|slice| slice.try_into().ok())
        .with_context(|| format!("it ends before offset {at:#x}"))
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    Ok(u16::from_le_bytes(bytes_at(bytes, at)?))
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    Ok(u32::from_le_bytes(bytes_at(bytes, at)?))
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64> {
    Ok(u64::from_le_bytes(bytes_at(bytes, at)?))
}

fn put16(image: &mut Vec<u8>, values: &[u16]) {
    values.iter().for_each(|value| image.extend(value.to_le_bytes()));
}

fn put32(image: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|value| image.extend(value.to_le_bytes()));
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Program {
        kind: u32,
        address: u64,
        data: Vec<u8>,
        memory_size: u64,
    }

    fn header_bytes() -> Vec<u8> {
        let mut data = vec![0x90; 64];
        put32(&mut data, &[MULTIBOOT_MAGIC, 3, 0u32.wrapping_sub(MULTIBOOT_MAGIC + 3)]);
        data
    }

    fn text() -> Program {
        Program { kind: PT_LOAD, address: 0x10_0000, data: header_bytes(), memory_size: 76 }
    }

    fn bss() -> Program {
        Program { kind: PT_LOAD, address: 0x10_1000, data: vec![1, 2, 3], memory_size: 0x5000 }
    }

    fn elf64(entry: u64, programs: &[Program]) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        put16(&mut elf, &[ET_EXEC, EM_X86_64]);
        put32(&mut elf, &[1]);
        for value in [entry, EHDR64 as u64, 0] {
            elf.extend(value.to_le_bytes());
        }
        put32(&mut elf, &[0]);
        put16(&mut elf, &[EHDR64 as u16, PHDR64 as u16, programs.len() as u16, 0, 0, 0]);
        let mut offset = EHDR64 + PHDR64 * programs.len();
        for program in programs {
            put32(&mut elf, &[program.kind, 6]);
            let size = program.data.len() as u64;
            for value in [offset as u64, program.address, program.address, size, program.memory_size, 4096] {
                elf.extend(value.to_le_bytes());
            }
            offset += program.data.len();
        }
        programs.iter().for_each(|program| elf.extend(&program.data));
        elf
    }

    fn error(elf: &[u8]) -> String {
        format!("{:#}", convert_bytes(elf).expect_err("must be refused"))
    }

    #[test]
    fn keeps_entry_addresses_and_contents() {
        // Given out of order: the result is sorted, so that the header's segment comes first.
        let image = convert_bytes(&elf64(0x10_0004, &[bss(), text()])).unwrap();
        assert_eq!(&image[..7], b"\x7fELF\x01\x01\x01");
        assert_eq!(u16_at(&image, 16).unwrap(), ET_EXEC);
        assert_eq!(u16_at(&image, 18).unwrap(), EM_386);
        assert_eq!(u32_at(&image, 24).unwrap(), 0x10_0004);
        assert_eq!(u16_at(&image, 44).unwrap(), 2);
        let header =
            |index: usize, field: usize| u32_at(&image, EHDR32 + PHDR32 * index + 4 * field).unwrap();
        let first: Vec<u32> = (0..8).map(|field| header(0, field)).collect();
        assert_eq!(first, [PT_LOAD, 0x1000, 0x10_0000, 0x10_0000, 76, 76, 6, 0x1000]);
        let second: Vec<u32> = (0..8).map(|field| header(1, field)).collect();
        assert_eq!(second, [PT_LOAD, 0x2000, 0x10_1000, 0x10_1000, 3, 0x5000, 6, 0x1000]);
        assert_eq!(&image[0x1000..0x1000 + 76], header_bytes());
        assert_eq!(&image[0x2000..], [1, 2, 3]);
    }

    #[test]
    fn notes_are_left_out() {
        let note = Program { kind: 4, address: 0, data: vec![0; 16], memory_size: 16 };
        let image = convert_bytes(&elf64(0x10_0000, &[note, text()])).unwrap();
        assert_eq!(u16_at(&image, 44).unwrap(), 1);
    }

    #[test]
    fn every_truncation_is_an_error_and_none_panics() {
        let elf = elf64(0x10_0000, &[text(), bss()]);
        for len in 0..elf.len() {
            assert!(convert_bytes(&elf[..len]).is_err(), "{len} bytes of {} were accepted", elf.len());
        }
    }

    #[test]
    fn every_header_byte_may_be_garbage() {
        let elf = elf64(0x10_0000, &[text(), bss()]);
        for at in 0..EHDR64 + 2 * PHDR64 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut broken = elf.clone();
                broken[at] = value;
                // The result does not matter, only that there is one.
                let _ = convert_bytes(&broken);
            }
        }
    }

    #[test]
    fn refusals_are_sentences() {
        let good = elf64(0x10_0000, &[text()]);
        let with = |at: usize, bytes: &[u8]| {
            let mut elf = good.clone();
            elf[at..at + bytes.len()].copy_from_slice(bytes);
            elf
        };
        assert_eq!(error(b"#!/bin/sh"), "it is not an ELF file");
        assert_eq!(error(&with(4, &[1])), "it is not a 64-bit ELF file");
        assert_eq!(error(&with(5, &[2])), "it is not little-endian");
        assert_eq!(error(&with(18, &[183, 0])), "it is for machine type 183, not for x86-64");
        assert!(error(&with(16, &[3, 0])).contains("relocation-model=static"));
        assert!(error(&elf64(0x10_0000, &[])).contains("nothing to load"));
        assert!(error(&elf64(0x20_0000, &[text()])).contains("is in no segment"));
        assert!(error(&elf64(1 << 40, &[text()])).contains("is above 4 GiB"));
        let high = Program { address: 0xffff_f000, memory_size: 0x2000, ..text() };
        assert!(error(&elf64(0xffff_f000, &[high])).contains("does not end below 4 GiB"));
        let swollen = Program { memory_size: 8, ..text() };
        assert!(error(&elf64(0x10_0000, &[swollen])).contains("larger in the file than in memory"));
        let dynamic = Program { kind: PT_DYNAMIC, ..text() };
        assert!(error(&elf64(0x10_0000, &[dynamic])).contains("dynamically linked"));
        let twin = Program { address: 0x10_0040, ..text() };
        assert!(error(&elf64(0x10_0000, &[text(), twin])).contains("overlap"));
        let plain = Program { data: vec![0x90; 76], ..text() };
        assert!(error(&elf64(0x10_0000, &[plain])).contains("no valid Multiboot header"));
    }

    #[test]
    fn a_wrong_checksum_is_no_header() {
        let mut program = text();
        program.data[72] ^= 1;
        assert!(error(&elf64(0x10_0000, &[program])).contains("no valid Multiboot header"));
    }

    #[test]
    fn files_are_named_in_errors() {
        let missing = Path::new("/nonexistent/guest.elf");
        let message = format!("{:#}", convert(missing, missing).unwrap_err());
        assert!(message.starts_with("cannot read /nonexistent/guest.elf: "), "{message}");
    }
}
