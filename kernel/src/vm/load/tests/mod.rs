//! Loaders against made-up kernels and made-up RAM.
mod bzimage;
mod elf;
mod multiboot1;

use std::cell::RefCell;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::vm::ram::BadGpa;

/// RAM from address 0 on, all ones where nobody has written.
pub(super) struct VecRam(RefCell<Vec<u8>>);

impl VecRam {
    pub(super) fn new(len: usize) -> Self {
        Self(RefCell::new(vec![0xff; len]))
    }

    pub(super) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(gpa, &mut bytes).unwrap();
        bytes
    }

    pub(super) fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.bytes(gpa, 4).try_into().unwrap())
    }

    pub(super) fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes(gpa, 8).try_into().unwrap())
    }

    /// The NUL-terminated text at `gpa`.
    pub(super) fn text(&self, gpa: u64) -> String {
        let ram = self.0.borrow();
        let bytes = ram[gpa as usize..].iter().copied().take_while(|&byte| byte != 0).collect();
        String::from_utf8(bytes).unwrap()
    }

    fn range(&self, gpa: u64, len: usize) -> Result<Range<usize>, BadGpa> {
        let start = usize::try_from(gpa).map_err(|_| BadGpa { gpa, len })?;
        let end = start.checked_add(len).filter(|&end| end <= self.0.borrow().len());
        Ok(start..end.ok_or(BadGpa { gpa, len })?)
    }
}

impl GuestRam for VecRam {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), BadGpa> {
        buf.copy_from_slice(&self.0.borrow()[self.range(gpa, buf.len())?]);
        Ok(())
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), BadGpa> {
        let range = self.range(gpa, data.len())?;
        self.0.borrow_mut()[range].copy_from_slice(data);
        Ok(())
    }
}

pub(super) const MIB: u64 = 1 << 20;
pub(super) const RSDP: u64 = layout::ACPI_START;

/// A request for a VM with `ram` and nothing but a kernel.
pub(super) fn request<'a>(kernel: &'a [u8], ram: &VecRam) -> Request<'a> {
    Request {
        kernel: File { name: "vmlinuz", bytes: kernel },
        initrd: None,
        modules: &[],
        cmdline: "console=ttyS0",
        ram_bytes: ram.0.borrow().len() as u64,
        rsdp: RSDP,
    }
}

/// The sentence that refusing this kernel in a VM of 32 MiB gives.
pub(super) fn refusal(kernel: &[u8]) -> String {
    let ram = VecRam::new(32 << 20);
    load(&request(kernel, &ram), &ram).expect_err("this kernel should be refused").to_string()
}

/// `bytes` with `value` put at `offset`.
pub(super) fn patched<const N: usize>(bytes: &[u8], offset: usize, value: [u8; N]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[offset..offset + N].copy_from_slice(&value);
    bytes
}

/// What holds for everything that was loaded, whoever made the file.
pub(super) fn check_placement(loaded: &Loaded, ram_bytes: u64) {
    let Loaded { kernel, modules, boot_information, entry, .. } = loaded;
    assert!(boot_information.end <= layout::LOW_RAM_END);
    assert!(kernel.start >= MIB && kernel.end <= ram_bytes.min(layout::PCI_HOLE_START));
    assert!(kernel.contains(&entry.rip));
    assert!(modules.is_empty() || modules.start >= kernel.end && modules.end <= ram_bytes);
    assert!(boot_information.contains(&entry.gdtr.base));
}

#[test]
fn formats_are_told_apart() {
    assert_eq!(Format::detect(&bzimage::image()), Some(Format::BzImage));
    assert_eq!(Format::detect(&elf::pvh64()), Some(Format::Pvh));
    assert_eq!(Format::detect(&multiboot1::elf32()), Some(Format::Multiboot1));
    assert_eq!(Format::detect(&multiboot1::flat()), Some(Format::Multiboot1));
    // A Multiboot 1 header in a 64-bit ELF is not what counts.
    let both = [elf::pvh64(), multiboot1::header(0)].concat();
    assert_eq!(Format::detect(&both), Some(Format::Pvh));
    for bytes in [&b""[..], b"MZ", b"\x7fEL", &[0; 10_000]] {
        assert_eq!(Format::detect(bytes), None);
    }
    assert_eq!(
        refusal(b"#!/bin/sh"),
        "\"vmlinuz\" is not a kernel that can be booted; it must be a Linux bzImage, an ELF with a PVH note or \
         a Multiboot 1 image"
    );
}

#[test]
fn guest_ram_that_is_not_there_is_an_error() {
    let (kernel, ram) = (bzimage::image(), VecRam::new(4 << 20));
    let request = Request { ram_bytes: 64 << 20, ..request(&kernel, &ram) };
    assert_eq!(
        load(&request, &ram).unwrap_err().to_string(),
        "\"vmlinuz\" cannot be loaded: guest-physical range 0x1000000+0x1000 is not RAM"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a file says, it is loaded to where it may be, or refused.
    #[test]
    fn damaged_kernels_are_loaded_within_bounds_or_refused(
        which in 0usize..5,
        damage in prop::collection::vec((0usize..0x300, any::<[u8; 4]>()), 0..6),
        cut in prop::option::of(0usize..6000),
    ) {
        let kernels =
            [bzimage::image(), elf::pvh64(), elf::pvh32(), multiboot1::elf32(), multiboot1::flat()];
        let mut kernel = kernels[which].clone();
        for (offset, bytes) in damage {
            // The headers of a bzImage are half a kilobyte in.
            let offset = if which == 0 { offset + 0x1e0 } else { offset };
            if offset + 4 <= kernel.len() {
                kernel = patched(&kernel, offset, bytes);
            }
        }
        kernel.truncate(cut.unwrap_or(usize::MAX));
        let ram = VecRam::new(24 << 20);
        let initrd = File { name: "initrd", bytes: &[7; 5000] };
        let request = Request { initrd: Some(initrd), ..request(&kernel, &ram) };
        match load(&request, &ram) {
            Ok(loaded) => check_placement(&loaded, 24 << 20),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    #[test]
    fn any_bytes_are_loaded_or_refused(
        magic in prop::sample::select(vec![&b""[..], b"\x7fELF\x01\x01\x01", b"\x7fELF\x02\x01\x01"]),
        bytes in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let ram = VecRam::new(2 << 20);
        let kernel = [magic, &bytes].concat();
        let _ = load(&request(&kernel, &ram), &ram);
    }
}
