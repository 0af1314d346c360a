//! The boot sequence: from the entry stub's hands to a machine that Umbra owns. Each stage is named before it starts.
// Leaves the entry stub's stack and reads the boot bundle by physical address.
#![allow(unsafe_code)]

use crate::acpi;
use crate::cpu::features::Features;
use crate::cpu::{self, compaction, control, lapic, legacy_pic, smp, tsc, PerCpu};
use crate::machine::Machine;
use crate::mm::map::{Kind, MemoryMap, MemorySummary};
use crate::mm::ranges::{Range, RangeSet};
use crate::{console, mm, power};
use boot::entry::loader;
use bootloader_api::info::MemoryRegionKind;
use bootloader_api::BootInfo;
use core::arch::asm;
use spin::Once;
use x86_64::PhysAddr;

const MIB: u64 = 1 << 20;

/// What the first half of the boot sequence leaves for the second.
struct Early {
    memory: MemorySummary,
    low_memory: RangeSet,
    rsdp_addr: Option<u64>,
    /// Address and length of the boot bundle.
    ramdisk: Option<(u64, u64)>,
}

static EARLY: Once<Early> = Once::new();

/// Takes over from the entry stub: 64-bit mode, the first 4 GiB identity-mapped, interrupts off, one CPU.
pub fn start(boot_info: &'static mut BootInfo) -> ! {
    console::init(boot_info);
    log::info!("Umbra {}", env!("CARGO_PKG_VERSION"));
    cpu::init_boot_cpu();

    log::info!("CPU features");
    let features = cpu::features();
    log::info!("  {features}");
    require(features);
    control::init(features);
    if !compaction::is_sound() {
        log::warn!("XSAVEC does not work as the manuals say: guests see neither it nor XSAVES");
    }

    log::info!("memory map");
    let (mut map, memory) = memory_map(boot_info, features);
    let low_memory = low_memory(&map);

    log::info!("page tables");
    let tables = console::while_remapping(|framebuffer| mm::init_paging(&mut map, features, framebuffer));
    if let Err(error) = tables {
        power::halt_with_error(format_args!("the page tables could not be made: {error}"));
    }
    report_page_tables();

    log::info!("heap");
    if mm::init_frames(&mut map).and_then(|()| mm::heap::init()).is_none() {
        too_small(&memory);
    }
    log::info!("  {} MiB in free frames", mm::free_bytes() / MIB);

    let ramdisk = boot_info.ramdisk_addr.into_option().map(|at| (at, boot_info.ramdisk_len));
    let rsdp_addr = boot_info.rsdp_addr.into_option();
    EARLY.call_once(|| Early { memory, low_memory, rsdp_addr, ramdisk });
    let Some(stack) = mm::alloc_stack(smp::STACK_BYTES).filter(|_| smp::init_boot_cpu_stacks().is_some())
    else {
        too_small(&memory);
    };
    // SAFETY: a new stack, and nothing of the old one is used again: `own_machine` takes all it needs from `EARLY`.
    unsafe {
        asm!("xor ebp, ebp", "mov rsp, {}", "call {}", "ud2", in(reg) stack.as_u64(), sym own_machine, options(noreturn))
    }
}

/// The second half, on a stack with a guard page, with a heap.
extern "C" fn own_machine() -> ! {
    let Some(Early { memory, low_memory, rsdp_addr, ramdisk }) = EARLY.get() else {
        unreachable!("`start` sets it");
    };

    let features = cpu::features();

    log::info!("ACPI");
    let acpi = acpi::discover(*rsdp_addr);
    report_acpi(&acpi);
    if let Some(base) = acpi.serial_console {
        console::add_serial(base);
    }
    if !acpi.absent().i8042 {
        console::add_keyboard();
    }
    if let Some(how) = acpi.power_off() {
        power::set_power_off(how);
    }

    log::info!("interrupts");
    legacy_pic::disable();
    if let Err(error) = lapic::init(features) {
        power::halt_with_error(format_args!("{error}"));
    }
    log::info!(
        "  local APIC {} in {} mode",
        lapic::id(),
        if lapic::is_x2apic() { "x2APIC" } else { "xAPIC" }
    );

    log::info!("timers");
    let Some(calibration) = tsc::calibrate(features, &acpi) else {
        power::halt_with_error(format_args!(
            "the time-stamp counter's rate is unknown: neither HPET, ACPI PM timer nor PIT counts, and CPUID does not tell"
        ));
    };
    log::info!("  TSC: {calibration}");
    match lapic::calibrate_timer() {
        Some(khz) => log::info!("  local APIC timer: {khz} kHz"),
        None if lapic::has_tsc_deadline() => log::info!("  local APIC timer: TSC deadlines"),
        None => power::halt_with_error(format_args!("the local APIC's timer does not count")),
    }

    log::info!("processors");
    let cpus_online = smp::start_all(acpi.madt.as_ref(), low_memory, per_cpu_init);
    log::info!("  {cpus_online} of {} started", cpu::all().len());
    check_page_tables();

    let ramdisk = ramdisk.map_or(&[][..], |(at, len)| ramdisk_bytes(at, len));
    let machine = Machine { features, memory: *memory, acpi, tsc: calibration, cpus_online, ramdisk };
    crate::vm::start(&machine)
}

/// Runs once on each CPU, in its own area and on its own stack, before it takes work.
fn per_cpu_init(_cpu: &'static PerCpu) {}

/// What Umbra cannot do without.
fn require(features: &Features) {
    if !features.nx {
        power::halt_with_error(format_args!(
            "this CPU has no NX (or the firmware hides it); switch on \"execute disable\" in the firmware's setup"
        ));
    }
}

fn memory_map(boot_info: &BootInfo, features: &Features) -> (MemoryMap, MemorySummary) {
    let regions = boot_info.memory_regions.iter().map(|region| {
        let kind = match region.kind {
            MemoryRegionKind::Usable => Kind::Usable,
            MemoryRegionKind::Bootloader => Kind::Occupied,
            _ => Kind::Reserved,
        };
        (Range::new(region.start, region.end), kind)
    });
    // What the loader placed must be kept even if its map forgot it.
    let image = (Range::from_len(boot_info.kernel_addr, boot_info.kernel_len), Kind::Occupied);
    let ramdisk_start = boot_info.ramdisk_addr.into_option().unwrap_or(0);
    let ramdisk = Range::from_len(ramdisk_start, boot_info.ramdisk_len).grow_to_pages();
    let regions = regions.chain([image, (ramdisk, Kind::Occupied)]);

    let limit = (1 << features.physical_address_bits).min(mm::PHYSMAP_BYTES);
    let map = MemoryMap::from_regions(regions, limit);
    if map.truncated || loader().map_is_cut {
        log::warn!("the memory map has too many regions; some memory is not used");
    }
    let memory = map.summary();
    for range in map.usable.iter() {
        log::info!("  {:#014x}..{:#014x} {} KiB free", range.start, range.end, range.len() / 1024);
    }
    log::info!(
        "  {} MiB of memory, {} MiB free, {} MiB of that below 4 GiB",
        mib(memory.ram_bytes),
        mib(memory.usable_bytes),
        mib(memory.usable_below_4g_bytes),
    );
    if memory.ram_bytes < mm::MINIMUM_BYTES {
        too_small(&memory);
    }
    (map, memory)
}

/// Free memory below 1 MiB, where new CPUs start.
fn low_memory(map: &MemoryMap) -> RangeSet {
    let mut low = map.usable.clone();
    low.remove(Range::new(MIB, u64::MAX));
    low
}

/// Megabytes as people name them: the firmware keeps some KiB for itself.
fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(MIB)
}

fn too_small(memory: &MemorySummary) -> ! {
    power::halt_with_error(format_args!(
        "this machine has {} MiB of usable memory; Umbra needs at least {} MiB, and its guests' memory besides",
        mib(memory.ram_bytes),
        mm::MINIMUM_BYTES / MIB,
    ))
}

fn report_page_tables() {
    let mappings = check_page_tables();
    log::info!("page tables: {mappings} mappings, none both writable and executable");
}

/// Reads the tables that are in use; ends the run if they break the rule.
fn check_page_tables() -> u64 {
    let audit = mm::audit();
    if let Some(virt) = audit.writable_executable.or(audit.user) {
        power::halt_with_error(format_args!("{}, at {virt:#x}; please report this", mm::PAGE_TABLE_ERROR));
    }
    audit.mappings
}

fn report_acpi(acpi: &acpi::Acpi) {
    match &acpi.madt {
        Some(madt) => log::info!(
            "  MADT: {} processors enabled, {} I/O APICs, local APIC at {:#x}",
            madt.processors.iter().filter(|p| p.enabled).count(),
            madt.io_apics.len(),
            madt.local_apic,
        ),
        None => log::warn!("ACPI: no MADT, so only the boot CPU is used"),
    }
    if acpi.madt.as_ref().is_some_and(|madt| madt.malformed) {
        log::warn!("ACPI: the MADT is malformed; what could be read is used");
    }
    if let Some(at) = acpi.hpet {
        log::info!("  HPET at {at:#x}");
    }
    for segment in &acpi.pci_segments {
        log::info!(
            "  PCI segment {}: buses {} to {} at {:#x}",
            segment.segment,
            segment.first_bus,
            segment.last_bus,
            segment.address,
        );
    }
    if acpi.power_off().is_none() {
        log::warn!("ACPI: no way to power off; the machine will halt at the end");
    }
}

/// The boot bundle, through the physical map.
fn ramdisk_bytes(at: u64, len: u64) -> &'static [u8] {
    let readable = PhysAddr::try_new(at).ok().filter(|phys| mm::map_firmware(*phys, len).is_some());
    match readable {
        // SAFETY: mapped, and kept out of the free memory, so nothing writes it.
        Some(phys) => unsafe { mm::phys::slice(phys, len as usize) },
        None => power::halt_with_error(format_args!(
            "the loader put the boot bundle at {at:#x}, where no memory can be"
        )),
    }
}
