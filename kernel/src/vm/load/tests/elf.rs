//! Made-up ELF executables, with PVH notes and without.
use super::*;
use crate::vm::load::entry::Mode;

const ENTRY: u64 = 2 * MIB + 0x10;

/// Offset of the first program header, and the length of each.
const fn headers(wide: bool) -> (usize, usize) {
    if wide {
        (64, 56)
    } else {
        (52, 32)
    }
}

/// An executable of either class with these program headers: type, offset, address, file size, memory size, align.
pub(super) fn elf(wide: bool, segments: &[[u64; 6]], contents: &[u8]) -> Vec<u8> {
    let (phoff, phentsize) = headers(wide);
    let word = |value: u64| value.to_le_bytes()[..if wide { 8 } else { 4 }].to_vec();
    let mut out = vec![0x7f, b'E', b'L', b'F', if wide { 2 } else { 1 }, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    out.extend([2, 0, if wide { 62 } else { 3 }, 0, 1, 0, 0, 0]);
    out.extend([word(ENTRY), word(phoff as u64), word(0)].concat());
    out.extend([0; 4]);
    out.extend(
        [phoff as u16, phentsize as u16, segments.len() as u16, 0, 0, 0].map(u16::to_le_bytes).concat(),
    );
    for &[kind, offset, address, file_size, size, align] in segments {
        let kind = (kind as u32).to_le_bytes().to_vec();
        let flags = 7u32.to_le_bytes().to_vec();
        let sizes = [word(file_size), word(size)];
        out.extend(
            match wide {
                true => [
                    vec![kind, flags, word(offset), word(!address), word(address)],
                    sizes.to_vec(),
                    vec![word(align)],
                ],
                false => [
                    vec![kind, word(offset), word(!address), word(address)],
                    sizes.to_vec(),
                    vec![flags, word(align)],
                ],
            }
            .concat()
            .concat(),
        );
    }
    out.resize(CONTENTS, 0);
    out.extend(contents);
    out
}

/// Where the contents begin in the file.
pub(super) const CONTENTS: usize = 0x400;

/// A note of another owner, then the PVH note with a description of `width` bytes.
fn notes(width: usize) -> Vec<u8> {
    let mut notes = [4u32, 3, 18].map(u32::to_le_bytes).concat();
    notes.extend(b"Abc\0one\0");
    notes.extend([4, width as u32, 18].map(u32::to_le_bytes).concat());
    notes.extend(b"Xen\0");
    notes.extend(&ENTRY.to_le_bytes()[..width.min(8)]);
    notes.resize(0x40, 0);
    notes
}

/// Notes at CONTENTS, then text of 0x1000 bytes for 2 MiB, with 0x2345 bytes of memory.
fn with_notes(wide: bool, notes: &[u8]) -> Vec<u8> {
    let offset = CONTENTS as u64;
    let segments = [
        [4, offset, 0, 0x40, 0x40, 4],
        [1, offset + 0x40, 2 * MIB, 0x1000, 0x2345, 0x1000],
        [1, offset, 3 * MIB, 0, 0x10, 0x1000],
        [1, offset, 0, 0, 0, 0x1000],
    ];
    elf(wide, &segments, &[notes, &[0x90; 0x1000]].concat())
}

pub(crate) fn pvh64() -> Vec<u8> {
    with_notes(true, &notes(8))
}

pub(crate) fn pvh32() -> Vec<u8> {
    with_notes(false, &notes(4))
}

#[test]
fn a_pvh_kernel_finds_what_the_protocol_promises() {
    for kernel in [pvh64(), pvh32()] {
        let ram = VecRam::new(32 << 20);
        let initrd = File { name: "initrd.img", bytes: &[1; 5000] };
        let modules = [Module { file: File { name: "extra", bytes: b"data" }, cmdline: "extra a=b" }];
        let request = Request { initrd: Some(initrd), modules: &modules, ..request(&kernel, &ram) };
        let loaded = load(&request, &ram).unwrap();
        check_placement(&loaded, 32 << 20);
        assert_eq!(loaded.format, Format::Pvh);
        assert_eq!(loaded.kernel, 2 * MIB..3 * MIB + 0x10);
        assert_eq!(ram.bytes(2 * MIB, 0x2345), [vec![0x90; 0x1000], vec![0; 0x1345]].concat());
        assert_eq!(ram.bytes(2 * MIB + 0x2345, 1), [0xff]);
        assert_eq!(ram.bytes(3 * MIB, 0x10), [0; 0x10]);

        let EntryState { mode, rip, cr0, cr3, cr4, efer, cs, data, tr, rbx, gdtr, .. } = loaded.entry;
        assert_eq!((mode, rip, cr0, cr3, cr4, efer), (Mode::Protected32, ENTRY, 0x11, 0, 0, 0));
        assert_eq!((cs.attributes, data.attributes, tr.attributes, tr.limit), (0xc9b, 0xc93, 0x8b, 0x67));
        assert_eq!(ram.u64(gdtr.base + 0x10), 0x00cf_9b00_0000_ffff);

        let info = rbx;
        assert_eq!((ram.u32(info), ram.u32(info + 4), ram.u32(info + 12)), (0x336e_c578, 1, 2));
        assert_eq!(ram.text(ram.u64(info + 24)), "console=ttyS0");
        assert_eq!(ram.u64(info + 32), RSDP);
        let list = ram.u64(info + 16);
        let module = |index: u64| {
            let at = list + index * 32;
            (ram.bytes(ram.u64(at), ram.u64(at + 8) as usize), ram.text(ram.u64(at + 16)))
        };
        assert_eq!(module(0), (vec![1; 5000], "initrd.img".into()));
        assert_eq!(module(1), (b"data".to_vec(), "extra a=b".into()));
        assert_eq!(ram.u64(list) % 4096, 0);
        let map_at = ram.u64(info + 40);
        let map: Vec<_> = (0..u64::from(ram.u32(info + 48)))
            .map(|index| map_at + index * 24)
            .map(|at| e820::Entry { start: ram.u64(at), len: ram.u64(at + 8), kind: ram.u32(at + 16) })
            .collect();
        assert_eq!(map, e820::map(32 << 20).to_vec());
    }
}

#[test]
fn a_kernel_alone_gets_no_modules() {
    let (kernel, ram) = (pvh64(), VecRam::new(32 << 20));
    let loaded = load(&request(&kernel, &ram), &ram).unwrap();
    assert!(loaded.modules.is_empty());
    assert_eq!((ram.u32(loaded.entry.rbx + 12), ram.u64(loaded.entry.rbx + 16)), (0, 0));
}

#[test]
fn broken_executables_are_refused_with_a_sentence() {
    let kernel = pvh64();
    // The second program header, that of the text.
    let (phoff, phentsize) = headers(true);
    let text = phoff + phentsize;
    let (offset, address, file_size, size) = (text + 8, text + 24, text + 32, text + 40);
    let wide = |value: u64| value.to_le_bytes();
    let unsound = "is not a sound ELF executable for x86";
    let no_note =
        "is an ELF file without a PVH note or a Multiboot 1 header, so nobody knows how to enter it";
    for (kernel, sentence) in [
        (kernel[..5000].to_vec(), "is cut short: its header promises 5184 bytes, the file has 5000"),
        (kernel[..100].to_vec(), "is cut short: its header promises 288 bytes, the file has 100"),
        (kernel[..7].to_vec(), "is cut short: its header promises 16 bytes, the file has 7"),
        (kernel[..4].to_vec(), unsound),
        (patched(&kernel, 5, [2]), unsound),
        (patched(&kernel, 18, [183, 0]), unsound),
        (patched(&kernel, 16, [1, 0]), unsound),
        (patched(&kernel, 54, [1, 0]), unsound),
        (patched(&kernel, 16, [3, 0]), "is a position-independent executable; link it at a fixed address"),
        (patched(&kernel, phoff, [6]), no_note),
        (with_notes(true, &[0; 0x40]), no_note),
        (with_notes(true, &notes(6)), "is damaged: the size of the PVH note cannot be 0x6"),
        (
            patched(&kernel, CONTENTS + 36, wide(1 << 32 | ENTRY)),
            "is damaged: the size of the PVH note cannot be 0x8",
        ),
        (
            patched(&kernel, CONTENTS + 36, wide(4 * MIB)),
            "is damaged: its entry point 0x400000 is outside of what it loads",
        ),
        (
            patched(&kernel, address, wide(0xf_f000)),
            "wants to be loaded at 0xff000; only addresses from 1 MiB up are free",
        ),
        (
            patched(&kernel, address, wide(u64::MAX)),
            "needs memory up to 17592186044416M, and the VM has it up to 32M; raise its memory",
        ),
        (
            patched(&kernel, size, wide(64 * MIB)),
            "needs memory up to 66M, and the VM has it up to 32M; raise its memory",
        ),
        (patched(&kernel, size, wide(0xfff)), "is damaged: the file size of a segment cannot be 0x1000"),
        (
            patched(&kernel, offset, wide(u64::MAX)),
            "is cut short: its header promises 18446744073709551615 bytes, the file has 5184",
        ),
        (
            patched(&kernel, file_size, wide(0x2000)),
            "is cut short: its header promises 9280 bytes, the file has 5184",
        ),
    ] {
        assert_eq!(refusal(&kernel), format!("\"vmlinuz\" {sentence}"));
    }
}

#[test]
fn modules_that_do_not_fit_are_refused() {
    let (kernel, ram) = (pvh64(), VecRam::new(4 << 20));
    let big = vec![0; 1 << 20];
    let modules = [Module { file: File { name: "big", bytes: &big }, cmdline: "big" }];
    let error = load(&Request { modules: &modules, ..request(&kernel, &ram) }, &ram).unwrap_err();
    assert_eq!(
        error.to_string(),
        "\"big\" has 1048576 bytes and does not fit into the VM beside the kernel; raise its memory"
    );
    let text = "x".repeat(300_000);
    let modules = [Module { file: File { name: "m", bytes: b"" }, cmdline: &text }; 3];
    let error = load(&Request { modules: &modules, ..request(&kernel, &ram) }, &ram).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the command lines and modules for \"vmlinuz\" do not fit below 640 KiB; shorten them"
    );
}
