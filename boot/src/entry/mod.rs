//! Bare-metal entry: the 32-bit stub in `stub.s`, then Rust up to the kernel's `_start`.
// The stub is assembly, and what the loader left is read by physical address.
#![allow(unsafe_code)]

mod serial;

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::fmt::Write;
use core::mem::MaybeUninit;

use bootloader_api::info::MemoryRegion;
use bootloader_api::BootInfo;

use crate::handover::{self, Handover, Image, Loader, Physical, OUTPUT_REGIONS};
use crate::regions::NO_REGION;
use crate::{multiboot2, pvh};
use serial::Com1;

global_asm!(include_str!("stub.s"), options(att_syntax));

/// What the stub says about who jumped to it.
const BY_MULTIBOOT2: u32 = 0;
/// See [`BY_MULTIBOOT2`].
const BY_PVH: u32 = 1;

extern "C" {
    // Bounds from the linker script; only their addresses mean anything.
    static __kernel_start: u8;
    static __kernel_end: u8;
    static __boot_stack_bottom: u8;
    static __boot_stack_top: u8;

    /// What `bootloader_api::entry_point!` exports in the kernel.
    #[allow(improper_ctypes)] // The macro checks that both sides have this type.
    fn _start(boot_info: &'static mut BootInfo) -> !;
}

/// Memory that the boot CPU alone uses, once, before the kernel runs.
struct BootOnly<T>(UnsafeCell<T>);

// SAFETY: only `enter` touches it, which the stub calls once, on the boot CPU.
unsafe impl<T> Sync for BootOnly<T> {}

static HANDOVER: BootOnly<MaybeUninit<Handover>> = BootOnly(UnsafeCell::new(MaybeUninit::uninit()));
static REGIONS: BootOnly<[MemoryRegion; OUTPUT_REGIONS]> =
    BootOnly(UnsafeCell::new([NO_REGION; OUTPUT_REGIONS]));
static LOADER: BootOnly<Loader> = BootOnly(UnsafeCell::new(Loader::unknown()));
static BOOT_INFO: BootOnly<Option<BootInfo>> = BootOnly(UnsafeCell::new(None));

/// Called by the stub in long mode, with the first 4 GiB identity-mapped, on the boot stack.
#[unsafe(no_mangle)]
extern "C" fn umbra_enter(protocol: u32, info: u32) -> ! {
    let info = u64::from(info);
    // SAFETY: see `BootOnly`; the stub calls this function once.
    let (handover, regions, slot) =
        unsafe { (&mut *HANDOVER.0.get(), &mut *REGIONS.0.get(), &mut *BOOT_INFO.0.get()) };
    let handover = handover.write(Handover::new());
    let read = match protocol {
        BY_MULTIBOOT2 => multiboot2::read(&IdentityMap, info, handover),
        BY_PVH => pvh::read(&IdentityMap, info, handover),
        _ => refuse(format_args!("the entry stub named an unknown boot protocol, {protocol}")),
    };
    let boot_info = read.and_then(|()| handover::boot_info(handover, &image(), regions));
    // SAFETY: see `BootOnly`; `loader` is for the kernel, which does not run yet.
    unsafe { *LOADER.0.get() = handover.loader };
    match boot_info {
        // SAFETY: the symbol is the kernel's entry point, of this very type by `entry_point!`.
        Ok(boot_info) => unsafe { _start(slot.insert(boot_info)) },
        Err(error) => refuse(format_args!("{error}")),
    }
}

/// Who loaded the kernel.
pub fn loader() -> &'static Loader {
    // SAFETY: written once, before the kernel runs, which alone asks.
    unsafe { &*LOADER.0.get() }
}

fn image() -> Image {
    Image {
        start: &raw const __kernel_start as u64,
        end: &raw const __kernel_end as u64,
        stack_bottom: &raw const __boot_stack_bottom as u64,
        stack_top: &raw const __boot_stack_top as u64,
    }
}

/// The first 4 GiB as the stub mapped them, without address zero.
struct IdentityMap;

impl Physical for IdentityMap {
    fn bytes(&self, at: u64, len: usize) -> Option<&[u8]> {
        const MAPPED: core::ops::Range<u64> = 1..1 << 32;
        let end = at.checked_add(len as u64)?;
        // SAFETY: the range is mapped, and what a loader left there is written by nobody while it is read here.
        (MAPPED.contains(&at) && end <= MAPPED.end)
            .then(|| unsafe { core::slice::from_raw_parts(at as *const u8, len) })
    }
}

/// Says why Umbra does not start, and stops. Nothing that could power the machine off is known yet.
fn refuse(why: core::fmt::Arguments<'_>) -> ! {
    let mut out = Com1;
    // Writing to a serial port that is absent or stuck is bounded and cannot fail.
    let _ = writeln!(out, "umbra: error: {why}");
    let _ = writeln!(out, "umbra: end: status 65");
    loop {
        // SAFETY: the stub entered with interrupts off; halting touches no memory.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
