//! What a VMCS needs before its first entry, and the host's state on the CPU that runs it.
#![allow(unsafe_code)] // Reads of the registers that make the host's state.

use super::cache::FieldsMut;
use super::choice::{Controls, APIC_VIRTUALIZATION};
use super::controls::{
    ExitControls, Primary, Secondary, EXCEPTION_ALIGNMENT_CHECK, EXCEPTION_DEBUG, EXCEPTION_MACHINE_CHECK,
};
use super::cpu::Machine;
use super::dirty_log;
use super::entry::landing;
use super::msr_area::MsrAreas;
use super::region::Region;
use super::vmcs;
use crate::cpu::descriptors::{CODE, DATA, TASK};
use crate::cpu::msr;
use x86_64::instructions::tables::{sgdt, sidt};
use x86_64::registers::control::{Cr0, Cr3, Cr4};
use x86_64::PhysAddr;

/// #DB, #AC and #MC. The first two can be raised by their own delivery, without end and without an interrupt window
/// (CVE-2015-8104, CVE-2015-5307).
pub(super) const INTERCEPTED_EXCEPTIONS: u32 =
    EXCEPTION_DEBUG | EXCEPTION_ALIGNMENT_CHECK | EXCEPTION_MACHINE_CHECK;
/// A PAUSE loop exits after this many TSC ticks, if no two PAUSEs are further apart than the other (SDM vol. 3, 26.1.3).
const PAUSE_LOOP_TICKS: u32 = 1 << 16;
const PAUSE_GAP_TICKS: u32 = 128;
/// No VMCS is linked (SDM vol. 3, 25.4.2).
const NO_LINK: u64 = u64::MAX;

/// Writes every control field but those that [`super::vcpu::VmxVcpu`] changes as it runs.
pub(super) fn write_controls(
    region: &Region,
    machine: &Machine,
    controls: &Controls,
    eptp: u64,
    apic_page: PhysAddr,
    areas: &MsrAreas,
) {
    region.set(vmcs::PIN_CONTROLS, controls.pin.bits());
    region.set(vmcs::EXIT_CONTROLS, controls.exit.bits());
    region.set(vmcs::EXCEPTION_BITMAP, INTERCEPTED_EXCEPTIONS);
    // All page faults behave alike: none exits unless the bitmap says so.
    region.set(vmcs::PAGE_FAULT_ERROR_MASK, 0);
    region.set(vmcs::PAGE_FAULT_ERROR_MATCH, 0);
    region.set(vmcs::CR3_TARGET_COUNT, 0);
    write_secondary(region, machine, controls.secondary);
    if !controls.shadow() {
        region.set(vmcs::EPT_POINTER, eptp);
    }
    if controls.primary.contains(Primary::IO_BITMAPS) {
        region.set(vmcs::IO_BITMAP_A, machine.io_bitmaps.as_u64());
        region.set(vmcs::IO_BITMAP_B, machine.io_bitmaps.as_u64() + 4096);
    }
    if controls.primary.contains(Primary::TPR_SHADOW) {
        region.set(vmcs::VIRTUAL_APIC_ADDRESS, apic_page.as_u64());
        region.set(vmcs::TPR_THRESHOLD, 0);
    }
    if controls.secondary.contains(Secondary::PAUSE_LOOP_EXITING) {
        region.set(vmcs::PLE_GAP, PAUSE_GAP_TICKS);
        region.set(vmcs::PLE_WINDOW, PAUSE_LOOP_TICKS);
    }
    if controls.secondary.contains(Secondary::XSAVES) {
        // IA32_XSS is zero in every guest, and a bit that is not set there makes no exit.
        region.set(vmcs::XSS_EXITING_BITMAP, u64::MAX);
    }
    if controls.secondary.contains(Secondary::ENCLS_EXITING) {
        region.set(vmcs::ENCLS_EXITING_BITMAP, u64::MAX);
    }
    region.set(vmcs::EXIT_MSR_STORE_COUNT, 0);
    region.set(vmcs::EXIT_MSR_LOAD_COUNT, areas.len());
    region.set(vmcs::ENTRY_MSR_LOAD_COUNT, areas.len());
    if let Some((guest, host)) = areas.addresses() {
        region.set(vmcs::ENTRY_MSR_LOAD_ADDRESS, guest.as_u64());
        region.set(vmcs::EXIT_MSR_LOAD_ADDRESS, host.as_u64());
    }
    region.set(vmcs::ENTRY_INTERRUPTION, 0);
    region.set(vmcs::VMCS_LINK_POINTER, NO_LINK);
    region.set(vmcs::GUEST_DEBUGCTL, 0);
    region.set(vmcs::GUEST_ACTIVITY, 0);
    region.set(vmcs::GUEST_PENDING_DEBUG, 0);
    region.set(vmcs::GUEST_SYSENTER_CS, 0);
    region.set(vmcs::GUEST_SYSENTER_ESP, 0);
    region.set(vmcs::GUEST_SYSENTER_EIP, 0);
}

/// Writes the secondary controls, and which MSRs exit under them.
pub(super) fn write_secondary(region: &Region, machine: &Machine, secondary: Secondary) {
    let virtual_apic = secondary.contains(APIC_VIRTUALIZATION);
    let msr_bitmap = if virtual_apic { machine.apic_msr_bitmap } else { machine.msr_bitmap };
    region.set(vmcs::SECONDARY_CONTROLS, secondary.bits());
    region.set(vmcs::MSR_BITMAPS, msr_bitmap.as_u64());
}

/// Gives the processor a log for pages that become dirty, which the vCPU keeps as long as the control is on.
pub(super) fn write_dirty_log(region: &Region, log: PhysAddr) {
    region.set(vmcs::PML_ADDRESS, log.as_u64());
    region.set(vmcs::PML_INDEX, dirty_log::EMPTY);
}

/// Writes what an exit on this CPU loads (SDM vol. 3, 25.5 and 28.5).
pub(super) fn write_host_state(region: &Region, exit: ExitControls) {
    // SAFETY: reads of registers that every CPU with long mode has.
    let (gs_base, fs_base, efer, pat) =
        unsafe { (msr::read(msr::GS_BASE), msr::read(FS_BASE), msr::read(msr::EFER), msr::read(msr::PAT)) };
    region.set(vmcs::HOST_CR0, Cr0::read_raw());
    region.set(vmcs::HOST_CR3, Cr3::read_raw().0.start_address().as_u64());
    region.set(vmcs::HOST_CR4, Cr4::read_raw());
    region.set(vmcs::HOST_CS_SELECTOR, CODE);
    region.set(vmcs::HOST_SS_SELECTOR, DATA);
    region.set(vmcs::HOST_DS_SELECTOR, DATA);
    region.set(vmcs::HOST_ES_SELECTOR, DATA);
    region.set(vmcs::HOST_FS_SELECTOR, 0);
    region.set(vmcs::HOST_GS_SELECTOR, 0);
    region.set(vmcs::HOST_TR_SELECTOR, TASK);
    region.set(vmcs::HOST_FS_BASE, fs_base);
    region.set(vmcs::HOST_GS_BASE, gs_base);
    region.set(vmcs::HOST_TR_BASE, crate::cpu::this().task_state_address());
    region.set(vmcs::HOST_GDTR_BASE, sgdt().base.as_u64());
    region.set(vmcs::HOST_IDTR_BASE, sidt().base.as_u64());
    region.set(vmcs::HOST_SYSENTER_CS, 0);
    region.set(vmcs::HOST_SYSENTER_ESP, 0);
    region.set(vmcs::HOST_SYSENTER_EIP, 0);
    // These fields exist only with their controls; without, the MSR areas do it.
    if exit.contains(ExitControls::LOAD_EFER) {
        region.set(vmcs::HOST_EFER, efer);
    }
    if exit.contains(ExitControls::LOAD_PAT) {
        region.set(vmcs::HOST_PAT, pat);
    }
    region.set(vmcs::HOST_RIP, landing as *const () as u64);
}

/// IA32_FS_BASE.
const FS_BASE: u32 = 0xc000_0100;
