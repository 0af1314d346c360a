//! A made-up bzImage, whole and broken.
use super::*;
use crate::vm::load::entry::Mode;

const PREFERRED: u64 = 16 * MIB;
const INIT_SIZE: u32 = 0x30_0000;
const SECTORS: u8 = 3;

/// A bzImage with three setup sectors and a payload of 4 KiB.
pub(crate) fn image() -> Vec<u8> {
    let mut image = vec![0; (usize::from(SECTORS) + 1) * 512];
    let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[SECTORS]);
    put(0x1f4, &256u32.to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x200, &[0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[0x80]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &PREFERRED.to_le_bytes());
    put(0x260, &INIT_SIZE.to_le_bytes());
    image.extend((0..4096).map(|byte| byte as u8));
    image
}

#[test]
fn linux_finds_what_its_boot_protocol_promises() {
    let (image, ram) = (image(), VecRam::new(64 << 20));
    let initrd = File { name: "initrd.img", bytes: &[0x5a; 10_000] };
    let request = Request { initrd: Some(initrd), ..request(&image, &ram) };
    let loaded = load(&request, &ram).unwrap();
    check_placement(&loaded, 64 << 20);
    assert_eq!(loaded.format, Format::BzImage);
    assert_eq!(loaded.kernel, PREFERRED..PREFERRED + u64::from(INIT_SIZE));
    assert_eq!(ram.bytes(PREFERRED, 4096), image[2048..]);

    // As high as possible, on a page boundary.
    assert_eq!(loaded.modules, 64 * MIB - 12_288..64 * MIB - 12_288 + 10_000);
    assert_eq!(ram.bytes(loaded.modules.start, 10_000), initrd.bytes);

    let EntryState { mode, rip, rsi, cr0, cr4, efer, rflags, cs, data, gdtr, .. } = loaded.entry;
    assert_eq!((mode, rip, rflags), (Mode::Long64, PREFERRED + 0x200, 2));
    assert_eq!((cr0, cr4, efer), (0x8000_0011, 0x20, 0x500));
    assert_eq!((cs.selector, cs.attributes, data.selector, data.attributes), (0x10, 0xa9b, 0x18, 0xc93));
    assert_eq!(
        (ram.u64(gdtr.base + 0x10), ram.u64(gdtr.base + 0x18)),
        (0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff)
    );

    let params = rsi;
    assert_eq!(params % 4096, 0);
    let header_end = 0x202 + 0x6a;
    assert_eq!(ram.bytes(params + 0x1f1, 9), image[0x1f1..0x1fa]);
    assert_eq!(ram.bytes(params + 0x22c, header_end - 0x22c), image[0x22c..header_end]);
    assert_eq!(ram.bytes(params + 0x210, 2), [0xff, 0x81]);
    assert_eq!(ram.u32(params + 0x214), PREFERRED as u32);
    assert_eq!(ram.u32(params + 0x218), loaded.modules.start as u32);
    assert_eq!(ram.u32(params + 0x21c), 10_000);
    assert_eq!(ram.text(ram.u32(params + 0x228).into()), "console=ttyS0");
    assert_eq!(ram.u64(params + 0x70), RSDP);
    // Nothing that Linux would take for an answer: screen, EFI, upper halves.
    assert_eq!(ram.bytes(params, 0x70), [0; 0x70]);
    assert_eq!(ram.bytes(params + 0xc0, 0x1e8 - 0xc0), [0; 0x1e8 - 0xc0]);

    let entries = ram.bytes(params + 0x1e8, 1)[0];
    let map: Vec<_> = (0..u64::from(entries))
        .map(|index| params + 0x2d0 + index * 20)
        .map(|at| e820::Entry { start: ram.u64(at), len: ram.u64(at + 8), kind: ram.u32(at + 16) })
        .collect();
    assert_eq!(map, e820::map(64 << 20).to_vec());
}

#[test]
fn the_first_4_gib_are_identity_mapped() {
    let (image, ram) = (image(), VecRam::new(32 << 20));
    let cr3 = load(&request(&image, &ram), &ram).unwrap().entry.cr3;
    let translate = |address: u64| {
        let mut table = cr3;
        for shift in [39, 30] {
            let entry = ram.u64(table + (address >> shift & 511) * 8);
            if entry & 1 == 0 {
                return None;
            }
            table = entry & !0xfff;
        }
        let entry = ram.u64(table + (address >> 21 & 511) * 8);
        assert_eq!(entry & 0x83, 0x83);
        Some((entry & !0x1f_ffff) + (address & 0x1f_ffff))
    };
    for address in [0, 0x1234, 16 * MIB, 0x4000_0000, 0x7fff_ffff, 0xbfff_f000, 0xffff_ffff] {
        assert_eq!(translate(address), Some(address));
    }
    assert_eq!(translate(1 << 32), None);
    assert_eq!(translate(1 << 39), None);
}

#[test]
fn setup_sectors_of_zero_mean_four() {
    let mut image = image();
    image.splice(2048..2048, [0; 512]);
    let (image, ram) = (patched(&image, 0x1f1, [0]), VecRam::new(32 << 20));
    load(&request(&image, &ram), &ram).unwrap();
    assert_eq!(ram.bytes(PREFERRED, 4096), image[2560..]);
}

#[test]
fn a_relocatable_kernel_is_aligned_and_others_are_not_moved() {
    let ram = VecRam::new(32 << 20);
    let odd = patched(&image(), 0x258, (PREFERRED + 1).to_le_bytes());
    assert_eq!(load(&request(&odd, &ram), &ram).unwrap().kernel.start, PREFERRED + 2 * MIB);
    let low = patched(&image(), 0x258, 0u64.to_le_bytes());
    assert_eq!(load(&request(&low, &ram), &ram).unwrap().kernel.start, 2 * MIB);
    let fixed = patched(&odd, 0x234, [0]);
    assert_eq!(load(&request(&fixed, &ram), &ram).unwrap().kernel.start, PREFERRED + 1);
}

#[test]
fn the_initrd_stays_below_the_kernels_limit() {
    let limited = patched(&image(), 0x22c, (24 * MIB as u32 - 1).to_le_bytes());
    let ram = VecRam::new(64 << 20);
    let initrd = File { name: "initrd.img", bytes: &[1; 4096] };
    let loaded = load(&Request { initrd: Some(initrd), ..request(&limited, &ram) }, &ram).unwrap();
    assert_eq!(loaded.modules, 24 * MIB - 4096..24 * MIB);
}

#[test]
fn an_initrd_that_would_hit_the_kernel_is_refused() {
    let (image, ram) = (image(), VecRam::new(20 << 20));
    let big = vec![1; 2 << 20];
    let initrd = File { name: "initrd.img", bytes: &big };
    let error = load(&Request { initrd: Some(initrd), ..request(&image, &ram) }, &ram).unwrap_err();
    assert_eq!(
        error.to_string(),
        "\"initrd.img\" has 2097152 bytes and does not fit into the VM beside the kernel; raise its memory"
    );
}

#[test]
fn broken_images_are_refused_with_a_sentence() {
    let image = image();
    for (kernel, sentence) in [
        (image[..6000].to_vec(), "is cut short: its header promises 6144 bytes, the file has 6000"),
        (image[..0x210].to_vec(), "is cut short: its header promises 656 bytes, the file has 528"),
        (
            patched(&image, 0x1f4, u32::MAX.to_le_bytes()),
            "is cut short: its header promises 68719478768 bytes, the file has 6144",
        ),
        (patched(&image, 0x1f4, 32u32.to_le_bytes()), "is damaged: syssize cannot be 0x20"),
        (
            patched(&image, 0x206, 0x0209u16.to_le_bytes()),
            "speaks boot protocol 2.09; Linux 3.8 or newer, with 2.12 or newer, is needed",
        ),
        (patched(&image, 0x236, [0xfe, 0xff]), "is a 32-bit kernel; a 64-bit one is needed"),
        (patched(&image, 0x230, 3u32.to_le_bytes()), "is damaged: kernel_alignment cannot be 0x3"),
        (patched(&image, 0x230, [0; 4]), "is damaged: kernel_alignment cannot be 0x0"),
        (
            patched(&image, 0x258, u64::MAX.to_le_bytes()),
            "is damaged: pref_address cannot be 0xffffffffffffffff",
        ),
        (patched(&image, 0x201, [0x10]), "is damaged: the length of the setup header cannot be 0x10"),
        (
            patched(&image, 0x258, (40 * MIB).to_le_bytes()),
            "needs memory up to 43M, and the VM has it up to 32M; raise its memory",
        ),
        (
            patched(&patched(&image, 0x234, [0]), 0x258, 0x9_0000u64.to_le_bytes()),
            "wants to be loaded at 0x90000; only addresses from 1 MiB up are free",
        ),
        (
            patched(&image, 0x238, 5u32.to_le_bytes()),
            "takes a command line of 5 bytes, this one has 13; shorten it",
        ),
    ] {
        assert_eq!(refusal(&kernel), format!("\"vmlinuz\" {sentence}"));
    }
}

#[test]
fn modules_are_not_for_linux() {
    let (image, ram) = (image(), VecRam::new(32 << 20));
    let modules = [Module { file: File { name: "m", bytes: b"" }, cmdline: "m" }];
    let error = load(&Request { modules: &modules, ..request(&image, &ram) }, &ram).unwrap_err();
    assert_eq!(error.to_string(), "\"vmlinuz\" is Linux, which takes no modules; give it one initrd");
}

#[test]
fn a_command_line_that_fills_low_memory_is_refused() {
    let (image, ram) = (patched(&image(), 0x238, u32::MAX.to_le_bytes()), VecRam::new(32 << 20));
    let long = "x".repeat(700_000);
    let error = load(&Request { cmdline: &long, ..request(&image, &ram) }, &ram).unwrap_err();
    assert_eq!(error.problem, Problem::TooMuchInformation);
}
