//! Finds the facts of the boot report on the machine itself.
// Reads a register of the processor.
#![allow(unsafe_code)]

use super::Facts;
use crate::acpi::firmware_bytes;
use crate::cpu::{lapic, msr};
use crate::hw::Vendor;
use crate::machine::Machine;
use crate::smbios::{self, System};
use crate::{console, efi, mm};
use boot::entry::loader;
use raw_cpuid::native_cpuid::cpuid_count;

/// Prints the report of this machine, on which guests run under `vendor`.
pub fn print<V: Vendor>(machine: &Machine, vendor: &V) {
    let loader = loader();
    let system = system(loader.efi_system_table);
    let facts = Facts {
        features: machine.features,
        microcode: microcode(&machine.features.vendor),
        cpus_online: machine.cpus_online,
        virtualization: vendor.name(),
        capabilities: &vendor.capabilities(),
        tlb_tags: vendor.tlb_tags(),
        memory: &machine.memory,
        free_bytes: mm::free_bytes(),
        acpi: &machine.acpi,
        tsc_khz: machine.tsc.rate.khz(),
        tsc_timer: machine.tsc.timer,
        x2apic: lapic::is_x2apic(),
        tsc_deadline: lapic::has_tsc_deadline(),
        console: &console::devices(),
        protocol: loader.protocol,
        loader: loader.name(),
        uefi: loader.efi_system_table.is_some(),
        system: system.as_ref(),
    };
    facts.write(&mut |line| log::info!("{line}"));
}

/// The machine by name, from where UEFI or a BIOS has its tables.
fn system(efi_system_table: Option<u64>) -> Option<System> {
    let from_efi = || {
        let (entries, count) =
            efi::configuration_table(firmware_bytes(efi_system_table?, efi::SYSTEM_TABLE_BYTES)?)?;
        let at = efi::smbios(firmware_bytes(entries, count * efi::ENTRY_BYTES)?)?;
        smbios::entry_point(firmware_bytes(at, smbios::ENTRY_BYTES)?)
    };
    let from_bios = || smbios::search(firmware_bytes(smbios::BIOS_AREA.0, smbios::BIOS_AREA.1)?);
    let (address, len) = from_efi().or_else(from_bios)?;
    smbios::system(firmware_bytes(address, len)?)
}

/// Revision of the microcode: IA32_BIOS_SIGN_ID (Intel SDM vol. 3, 10.11.7.1), PATCH_LEVEL with AMD.
fn microcode(vendor: &str) -> Option<u64> {
    const MSR_BIOS_SIGN_ID: u32 = 0x8b;
    // SAFETY: reading it has no effect; Intel has it written with zero first, and CPUID put the revision there.
    unsafe {
        if vendor == "GenuineIntel" && msr::try_write(MSR_BIOS_SIGN_ID, 0) {
            let _ = cpuid_count(1, 0);
            return msr::try_read(MSR_BIOS_SIGN_ID).map(|value| value >> 32);
        }
        msr::try_read(MSR_BIOS_SIGN_ID).map(|value| value & 0xffff_ffff)
    }
}
