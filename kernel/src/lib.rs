//! The Umbra hypervisor: everything above the entry stubs. Modules that need privileged instructions exist only
//! on the bare-metal target; the rest is also built and tested on the host.
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod devices;
pub mod mm;
pub mod vm;

/// Takes over from the entry stub. The identity map of the first 4 GiB and the boot stack are in use.
#[cfg(target_os = "none")]
pub fn start(boot_info: &'static mut bootloader_api::BootInfo) -> ! {
    use core::fmt::Write;
    struct Com1;
    impl Write for Com1 {
        fn write_str(&mut self, text: &str) -> core::fmt::Result {
            for byte in text.bytes() {
                let mut data = x86_64::instructions::port::PortWriteOnly::new(0x3f8);
                // SAFETY: one byte to the serial port's transmitter.
                #[allow(unsafe_code)]
                unsafe {
                    data.write(byte)
                }
            }
            Ok(())
        }
    }
    let _ = writeln!(Com1, "umbra: kernel {:#x}+{:#x}", boot_info.kernel_addr, boot_info.kernel_len);
    let _ = writeln!(Com1, "umbra: rsdp {:?}", boot_info.rsdp_addr);
    let _ = writeln!(Com1, "umbra: ramdisk {:?}+{:#x}", boot_info.ramdisk_addr, boot_info.ramdisk_len);
    let _ =
        writeln!(Com1, "umbra: stack {:#x}+{:#x}", boot_info.kernel_stack_bottom, boot_info.kernel_stack_len);
    for region in boot_info.memory_regions.iter() {
        let _ = writeln!(Com1, "umbra: {:#014x}..{:#014x} {:?}", region.start, region.end, region.kind);
    }
    let _ = writeln!(Com1, "umbra: end: status 0");
    loop {
        x86_64::instructions::hlt();
    }
}

#[cfg(target_os = "none")]
#[global_allocator]
static HEAP: linked_list_allocator::LockedHeap = linked_list_allocator::LockedHeap::empty();

#[cfg(target_os = "none")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        x86_64::instructions::hlt();
    }
}
