//! Made-up Multiboot 1 kernels.
use super::elf::CONTENTS;
use super::*;
use crate::vm::load::entry::Mode;

const ADDRESSES: u32 = 1 << 16;
const START: u32 = 2 << 20;
/// Where the header is in a flat image.
const HEADER: usize = 0x20;

/// Magic, flags and checksum.
pub(crate) fn header(flags: u32) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    [magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags)].map(u32::to_le_bytes).concat()
}

/// A 32-bit ELF with a header at the start of its text.
pub(crate) fn elf32() -> Vec<u8> {
    let text = [header(3), vec![0x90; 0x100]].concat();
    let size = text.len() as u64;
    super::elf::elf(false, &[[1, CONTENTS as u64, START.into(), size, 0x1000, 0x1000]], &text)
}

/// An image without any format, with these addresses: header, load, load end, bss end, entry.
fn flat_at(addresses: [u32; 5]) -> Vec<u8> {
    let addresses = addresses.map(u32::to_le_bytes).concat();
    [vec![0x11; HEADER], header(ADDRESSES), addresses, vec![0x22; 0x1000]].concat()
}

pub(crate) fn flat() -> Vec<u8> {
    flat_at([START + 0x10, START, START + 0x800, START + 0x2000, START + 0x40])
}

#[test]
fn a_multiboot_kernel_finds_what_the_specification_promises() {
    let (kernel, ram) = (elf32(), VecRam::new(32 << 20));
    let modules = [
        Module { file: File { name: "one", bytes: b"first" }, cmdline: "one x y" },
        Module { file: File { name: "two", bytes: &[2; 4097] }, cmdline: "two" },
    ];
    let request = Request { modules: &modules, ..request(&kernel, &ram) };
    let loaded = load(&request, &ram).unwrap();
    check_placement(&loaded, 32 << 20);
    assert_eq!(loaded.format, Format::Multiboot1);
    assert_eq!(loaded.kernel, START.into()..u64::from(START) + 0x1000);
    assert_eq!(ram.bytes(START.into(), 12), header(3));
    assert_eq!(ram.bytes(u64::from(START) + 0x10c, 0xef4), [0; 0xef4]);

    let EntryState { mode, rip, rax, rbx: info, cr0, cs, .. } = loaded.entry;
    assert_eq!((mode, rip, rax, cr0), (Mode::Protected32, 2 * MIB + 0x10, 0x2bad_b002, 0x11));
    assert_eq!((cs.attributes, cs.limit, cs.base), (0xc9b, u32::MAX, 0));
    let field = |offset: u64| ram.u32(info + offset);
    assert_eq!(field(0), 0b10_0100_1101);
    assert_eq!((field(4), field(8)), (639, 31 << 10));
    assert_eq!(ram.text(field(16).into()), "vmlinuz console=ttyS0");
    assert_eq!(ram.text(field(64).into()), "Umbra");

    assert_eq!(field(20), 2);
    let module = |index: u64| {
        let at = u64::from(field(24)) + index * 16;
        let (start, end) = (ram.u32(at), ram.u32(at + 4));
        assert_eq!((start % 4096, ram.u32(at + 12)), (0, 0));
        (ram.bytes(start.into(), (end - start) as usize), ram.text(ram.u32(at + 8).into()))
    };
    assert_eq!(module(0), (b"first".to_vec(), "one x y".into()));
    assert_eq!(module(1), (vec![2; 4097], "two".into()));

    let (mut at, end) = (u64::from(field(48)), u64::from(field(48) + field(44)));
    let mut map = vec![];
    while at < end {
        map.push(e820::Entry { start: ram.u64(at + 4), len: ram.u64(at + 12), kind: ram.u32(at + 20) });
        at += u64::from(ram.u32(at)) + 4;
    }
    assert_eq!(map, e820::map(32 << 20).to_vec());
}

#[test]
fn an_empty_command_line_is_the_name_alone() {
    let (kernel, ram) = (elf32(), VecRam::new(32 << 20));
    let loaded = load(&Request { cmdline: "", ..request(&kernel, &ram) }, &ram).unwrap();
    assert_eq!(ram.text(ram.u32(loaded.entry.rbx + 16).into()), "vmlinuz");
}

#[test]
fn a_flat_image_goes_where_its_header_says() {
    let (kernel, ram) = (flat(), VecRam::new(32 << 20));
    let loaded = load(&request(&kernel, &ram), &ram).unwrap();
    let start = u64::from(START);
    // The header is at 0x20 in the file and 0x10 in memory: the first 0x10 bytes are not loaded.
    assert_eq!(loaded.kernel, start..start + 0x2000);
    assert_eq!(ram.bytes(start, 0x800), kernel[0x10..0x810]);
    assert_eq!(ram.bytes(start + 0x800, 0x1800), [0; 0x1800]);
    assert_eq!(loaded.entry.rip, start + 0x40);

    let whole = flat_at([START + 0x20, START, 0, 0, START]);
    let loaded = load(&request(&whole, &ram), &ram).unwrap();
    assert_eq!(loaded.kernel, start..start + whole.len() as u64);
}

#[test]
fn the_header_is_looked_for_in_the_first_8_kib() {
    let at = |offset: usize| [vec![0; offset], header(ADDRESSES)].concat();
    assert!(multiboot1_header(&at(0)) && multiboot1_header(&at(8180)));
    assert!(!multiboot1_header(&at(8184)) && !multiboot1_header(&at(8192)) && !multiboot1_header(&at(2)));
    assert!(!multiboot1_header(&patched(&at(0), 8, [0])));
}

fn multiboot1_header(bytes: &[u8]) -> bool {
    crate::vm::load::multiboot1::Header::find(bytes).is_some()
}

#[test]
fn broken_images_are_refused_with_a_sentence() {
    for (kernel, sentence) in [
        (
            [header(ADDRESSES | 8), vec![0; 100]].concat(),
            "demands unknown features by its Multiboot flags 0x10008",
        ),
        (header(ADDRESSES), "is cut short: its header promises 16 bytes, the file has 12"),
        (flat_at([START, START - 0x30, 0, 0, START]), "is damaged: load_addr cannot be 0x1fffd0"),
        (flat_at([START, START + 4, 0, 0, START]), "is damaged: load_addr cannot be 0x200004"),
        (
            flat_at([0x9_0000, 0x9_0000, 0, 0, 0x9_0000]),
            "wants to be loaded at 0x90000; only addresses from 1 MiB up are free",
        ),
        (flat_at([START, START, START - 1, 0, START]), "is damaged: load_end_addr cannot be 0x1fffff"),
        (
            flat_at([START, START, START + 0x10_0000, 0, START]),
            "is cut short: its header promises 1048608 bytes, the file has 4160",
        ),
        (
            flat_at([START, START, 0, u32::MAX, START]),
            "needs memory up to 4096M, and the VM has it up to 32M; raise its memory",
        ),
        (
            flat_at([START, START, 0, 0, START - 1]),
            "is damaged: its entry point 0x1fffff is outside of what it loads",
        ),
    ] {
        assert_eq!(refusal(&kernel), format!("\"vmlinuz\" {sentence}"));
    }
}
