//! Rules for the control fields. SDM vol. 3, 27.2.1.
use super::{broken, Settings, CR0_PE};
use crate::hw::vmx::capabilities::{EptVpid, VmxCapabilities, WRITE_BACK};
use crate::hw::vmx::controls::{EntryControls, ExitControls, Pin, Primary, Secondary};
use crate::hw::vmx::event::{
    has_error_code, ERROR_CODE, TYPE_EXCEPTION, TYPE_NMI, TYPE_OTHER, TYPE_PRIVILEGED_EXCEPTION, TYPE_SHIFT,
    TYPE_SOFTWARE_EXCEPTION, TYPE_SOFTWARE_INTERRUPT, VALID,
};
use crate::hw::vmx::vmcs::{self, Field32, Field64, Fields};

/// The first broken rule.
pub(super) fn error(
    fields: &impl Fields,
    settings: &Settings,
    capabilities: &VmxCapabilities,
) -> Option<&'static str> {
    reserved(settings, capabilities)
        .or_else(|| execution(fields, settings, capabilities))
        .or_else(|| apic(fields, settings, capabilities))
        .or_else(|| second_stage(fields, settings, capabilities))
        .or_else(|| exit(fields, settings, capabilities))
        .or_else(|| entry(fields, settings, capabilities))
}

/// Whether controls break their capability MSR: a bit that must be 1 is 0, or the other way round.
const fn illegal(controls: u32, allowed: u64) -> bool {
    allowed as u32 & !controls != 0 || controls & !((allowed >> 32) as u32) != 0
}

fn reserved(settings: &Settings, capabilities: &VmxCapabilities) -> Option<&'static str> {
    broken! {
        illegal(settings.pin.bits(), capabilities.pin) =>
            "pin-based controls: a bit has a value that the CPU does not support (27.2.1.1)";
        illegal(settings.primary.bits(), capabilities.primary) =>
            "primary controls: a bit has a value that the CPU does not support (27.2.1.1)";
        illegal(settings.secondary.bits(), capabilities.secondary & u64::MAX << 32) =>
            "secondary controls: a bit has a value that the CPU does not support (27.2.1.1)";
        illegal(settings.exit.bits(), capabilities.exit) =>
            "VM-exit controls: a bit has a value that the CPU does not support (27.2.1.2)";
        illegal(settings.entry.bits(), capabilities.entry) =>
            "VM-entry controls: a bit has a value that the CPU does not support (27.2.1.3)";
    }
    None
}

fn execution(
    fields: &impl Fields,
    settings: &Settings,
    capabilities: &VmxCapabilities,
) -> Option<&'static str> {
    let Settings { pin, primary, secondary, .. } = *settings;
    let page = |field: Field64| capabilities.is_address(fields.read(field), 12);
    broken! {
        fields.read(vmcs::CR3_TARGET_COUNT) > capabilities.cr3_targets() =>
            "CR3-target count: more than the CPU supports (27.2.1.1)";
        primary.contains(Primary::IO_BITMAPS) && !(page(vmcs::IO_BITMAP_A) && page(vmcs::IO_BITMAP_B)) =>
            "I/O bitmaps: an address is not of a page (27.2.1.1)";
        primary.contains(Primary::MSR_BITMAPS) && !page(vmcs::MSR_BITMAPS) =>
            "MSR bitmaps: the address is not of a page (27.2.1.1)";
        pin.contains(Pin::VIRTUAL_NMIS) && !pin.contains(Pin::NMI_EXITING) =>
            "virtual NMIs: need NMI exiting (27.2.1.1)";
        primary.contains(Primary::NMI_WINDOW_EXITING) && !pin.contains(Pin::VIRTUAL_NMIS) =>
            "NMI-window exiting: needs virtual NMIs (27.2.1.1)";
        secondary.contains(Secondary::VPID) && fields.read(vmcs::VPID) == 0 =>
            "VPID: must not be zero (27.2.1.1)";
        secondary.contains(Secondary::VMCS_SHADOWING)
            && !(page(vmcs::VMREAD_BITMAP) && page(vmcs::VMWRITE_BITMAP)) =>
            "VMCS shadowing: an address of the VMREAD and VMWRITE bitmaps is not of a page (27.2.1.1)";
    }
    None
}

/// APIC virtualization and posted interrupts.
fn apic(fields: &impl Fields, settings: &Settings, capabilities: &VmxCapabilities) -> Option<&'static str> {
    let Settings { pin, primary, secondary, exit, .. } = *settings;
    let page = |field: Field64| capabilities.is_address(fields.read(field), 12);
    let needing_shadow = Secondary::VIRTUALIZE_X2APIC
        | Secondary::APIC_REGISTER_VIRTUALIZATION
        | Secondary::VIRTUAL_INTERRUPT_DELIVERY;
    let delivery = secondary.contains(Secondary::VIRTUAL_INTERRUPT_DELIVERY);
    if primary.contains(Primary::TPR_SHADOW) {
        broken! {
            !page(vmcs::VIRTUAL_APIC_ADDRESS) => "virtual-APIC page: the address is not of a page (27.2.1.1)";
            !delivery && fields.read(vmcs::TPR_THRESHOLD) > 0xf =>
                "TPR threshold: bits 31:4 must be 0 (27.2.1.1)";
        }
    }
    broken! {
        !primary.contains(Primary::TPR_SHADOW) && secondary.intersects(needing_shadow) =>
            "TPR shadow: x2APIC mode and the other APIC virtualization need it (27.2.1.1)";
        secondary.contains(Secondary::VIRTUALIZE_APIC_ACCESSES) && !page(vmcs::APIC_ACCESS_ADDRESS) =>
            "APIC-access page: the address is not of a page (27.2.1.1)";
        secondary.contains(Secondary::VIRTUALIZE_X2APIC | Secondary::VIRTUALIZE_APIC_ACCESSES) =>
            "virtualize x2APIC mode: excludes virtualize APIC accesses (27.2.1.1)";
        delivery && !pin.contains(Pin::EXTERNAL_INTERRUPT_EXITING) =>
            "virtual-interrupt delivery: needs external-interrupt exiting (27.2.1.1)";
    }
    if pin.contains(Pin::POSTED_INTERRUPTS) {
        broken! {
            !delivery => "posted interrupts: need virtual-interrupt delivery (27.2.1.1)";
            !exit.contains(ExitControls::ACKNOWLEDGE_INTERRUPT) =>
                "posted interrupts: need acknowledge interrupt on exit (27.2.1.1)";
            fields.read(vmcs::POSTED_INTERRUPT_VECTOR) > 0xff =>
                "posted interrupts: the notification vector is above 255 (27.2.1.1)";
            !capabilities.is_address(fields.read(vmcs::POSTED_INTERRUPT_DESCRIPTOR), 6) =>
                "posted interrupts: the descriptor's address is not of 64 aligned bytes (27.2.1.1)";
        }
    }
    None
}

/// EPT and what builds on it.
fn second_stage(
    fields: &impl Fields,
    settings: &Settings,
    capabilities: &VmxCapabilities,
) -> Option<&'static str> {
    let Settings { secondary, exit, entry, .. } = *settings;
    let page = |field: Field64| capabilities.is_address(fields.read(field), 12);
    let ept = secondary.contains(Secondary::EPT);
    if ept {
        let pointer = fields.read(vmcs::EPT_POINTER);
        broken! {
            !memory_type_is_supported(pointer as u8 & 7, capabilities) =>
                "EPT pointer: the CPU does not support the memory type (27.2.1.1)";
            !levels_are_supported(pointer, capabilities) =>
                "EPT pointer: the CPU does not support the number of levels (27.2.1.1)";
            pointer & 1 << 6 != 0 && !capabilities.ept_vpid.contains(EptVpid::ACCESSED_DIRTY) =>
                "EPT pointer: the CPU has no accessed and dirty bits in EPT entries (27.2.1.1)";
            pointer & 1 << 7 != 0 && !capabilities.ept_vpid.contains(EptVpid::SUPERVISOR_SHADOW_STACK) =>
                "EPT pointer: the CPU has no supervisor shadow-stack control (27.2.1.1)";
            pointer & 0xf00 != 0 => "EPT pointer: bits 11:8 must be 0 (27.2.1.1)";
            pointer >> capabilities.physical_address_bits != 0 =>
                "EPT pointer: the address is beyond the physical-address width (27.2.1.1)";
        }
    }
    broken! {
        !ept && secondary.contains(Secondary::PAGE_MODIFICATION_LOG) =>
            "page-modification log: needs EPT (27.2.1.1)";
        secondary.contains(Secondary::PAGE_MODIFICATION_LOG) && !page(vmcs::PML_ADDRESS) =>
            "page-modification log: the address is not of a page (27.2.1.1)";
        !ept && secondary.contains(Secondary::UNRESTRICTED_GUEST) =>
            "unrestricted guest: needs EPT (27.2.1.1)";
        !ept && secondary.contains(Secondary::MODE_BASED_EXECUTE) =>
            "mode-based execute control: needs EPT (27.2.1.1)";
        !ept && secondary.contains(Secondary::SUB_PAGE_WRITE_PERMISSIONS) =>
            "sub-page write permissions: need EPT (27.2.1.1)";
        secondary.contains(Secondary::SUB_PAGE_WRITE_PERMISSIONS) && !page(vmcs::SUB_PAGE_PERMISSION_POINTER) =>
            "sub-page write permissions: the table's address is not of a page (27.2.1.1)";
        secondary.contains(Secondary::VIRTUALIZATION_EXCEPTIONS)
            && !page(vmcs::VIRTUALIZATION_EXCEPTION_ADDRESS) =>
            "virtualization exceptions: the information's address is not of a page (27.2.1.1)";
        !ept && secondary.contains(Secondary::PT_GUEST_PHYSICAL) =>
            "processor trace with guest-physical addresses: needs EPT (27.2.1.1)";
        secondary.contains(Secondary::PT_GUEST_PHYSICAL)
            && !(entry.contains(EntryControls::LOAD_RTIT_CTL) && exit.contains(ExitControls::CLEAR_RTIT_CTL)) =>
            "processor trace with guest-physical addresses: needs IA32_RTIT_CTL switched (27.2.1.1)";
    }
    if secondary.contains(Secondary::VM_FUNCTIONS) {
        let functions = fields.read(vmcs::VM_FUNCTION_CONTROLS);
        broken! {
            functions & !capabilities.vmfunc != 0 => "VM functions: one is on that the CPU lacks (27.2.1.1)";
            functions & 1 != 0 && !ept => "EPTP switching: needs EPT (27.2.1.1)";
            functions & 1 != 0 && !page(vmcs::EPTP_LIST_ADDRESS) =>
                "EPTP switching: the list's address is not of a page (27.2.1.1)";
        }
    }
    None
}

fn memory_type_is_supported(kind: u8, capabilities: &VmxCapabilities) -> bool {
    match kind {
        0 => capabilities.ept_vpid.contains(EptVpid::UNCACHED),
        WRITE_BACK => capabilities.ept_vpid.contains(EptVpid::WRITE_BACK),
        _ => false,
    }
}

fn levels_are_supported(pointer: u64, capabilities: &VmxCapabilities) -> bool {
    match (pointer >> 3 & 7) + 1 {
        4 => capabilities.ept_vpid.contains(EptVpid::FOUR_LEVELS),
        5 => capabilities.ept_vpid.contains(EptVpid::FIVE_LEVELS),
        _ => false,
    }
}

/// Whether an MSR area of 16-byte entries is empty, or aligned and within the physical-address width.
fn msr_area_is_valid(
    fields: &impl Fields,
    capabilities: &VmxCapabilities,
    count: Field32,
    address: Field64,
) -> bool {
    let count = u64::from(fields.read(count));
    let first = fields.read(address);
    count == 0
        || capabilities.is_address(first, 4) && capabilities.is_address(first.wrapping_add(count * 16 - 1), 0)
}

fn exit(fields: &impl Fields, settings: &Settings, capabilities: &VmxCapabilities) -> Option<&'static str> {
    let area = |count, address| msr_area_is_valid(fields, capabilities, count, address);
    broken! {
        settings.exit.contains(ExitControls::SAVE_PREEMPTION_TIMER)
            && !settings.pin.contains(Pin::PREEMPTION_TIMER) =>
            "save VMX-preemption timer: the timer is not activated (27.2.1.2)";
        !area(vmcs::EXIT_MSR_STORE_COUNT, vmcs::EXIT_MSR_STORE_ADDRESS) =>
            "VM-exit MSR-store area: not aligned, or beyond the physical-address width (27.2.1.2)";
        !area(vmcs::EXIT_MSR_LOAD_COUNT, vmcs::EXIT_MSR_LOAD_ADDRESS) =>
            "VM-exit MSR-load area: not aligned, or beyond the physical-address width (27.2.1.2)";
    }
    None
}

fn entry(fields: &impl Fields, settings: &Settings, capabilities: &VmxCapabilities) -> Option<&'static str> {
    broken! {
        !msr_area_is_valid(fields, capabilities, vmcs::ENTRY_MSR_LOAD_COUNT, vmcs::ENTRY_MSR_LOAD_ADDRESS) =>
            "VM-entry MSR-load area: not aligned, or beyond the physical-address width (27.2.1.3)";
        settings.entry.contains(EntryControls::ENTRY_TO_SMM) =>
            "entry to SMM: only possible in SMM (27.2.1.3)";
        settings.entry.contains(EntryControls::DEACTIVATE_DUAL_MONITOR) =>
            "deactivate dual-monitor treatment: only possible in SMM (27.2.1.3)";
    }
    let info = fields.read(vmcs::ENTRY_INTERRUPTION);
    if info & VALID == 0 {
        return None;
    }
    injection(fields, capabilities, info)
}

/// Rules for an event that the entry delivers.
fn injection(fields: &impl Fields, capabilities: &VmxCapabilities, info: u32) -> Option<&'static str> {
    let vector = info as u8;
    let kind = info >> TYPE_SHIFT & 7;
    let has_error = info & ERROR_CODE != 0;
    let trap_flag = capabilities.primary >> 32 & u64::from(Primary::MONITOR_TRAP_FLAG.bits()) != 0;
    // An error code is pushed in protected mode alone, by hardware exceptions, and by all that normally do so
    // unless the CPU leaves that free.
    let protected = fields.read(vmcs::GUEST_CR0) & CR0_PE != 0;
    let may_have_error =
        kind == TYPE_EXCEPTION && protected && (capabilities.error_code_is_free() || has_error_code(vector));
    let must_have_error = may_have_error && !capabilities.error_code_is_free();
    broken! {
        kind == 1 || kind == TYPE_OTHER && !trap_flag => "injected event: the type is reserved (27.2.1.3)";
        kind == TYPE_NMI && vector != 2 => "injected event: the vector of an NMI must be 2 (27.2.1.3)";
        kind == TYPE_EXCEPTION && vector > 31 =>
            "injected event: the vector of a hardware exception must be at most 31 (27.2.1.3)";
        kind == TYPE_OTHER && vector != 0 =>
            "injected event: the vector of another event must be 0 (27.2.1.3)";
        has_error && !may_have_error => "injected event: it must not have an error code (27.2.1.3)";
        !has_error && must_have_error => "injected event: it must have an error code (27.2.1.3)";
        info & 0x7fff_f000 != 0 => "injected event: bits 30:12 must be 0 (27.2.1.3)";
        has_error && fields.read(vmcs::ENTRY_EXCEPTION_ERROR) > 0xffff =>
            "injected event: bits 31:16 of the error code must be 0 (27.2.1.3)";
    }
    if matches!(kind, TYPE_SOFTWARE_INTERRUPT | TYPE_PRIVILEGED_EXCEPTION | TYPE_SOFTWARE_EXCEPTION) {
        let shortest = if capabilities.injects_zero_length() { 0 } else { 1 };
        let length = fields.read(vmcs::ENTRY_INSTRUCTION_LENGTH);
        broken! {
            !(shortest..=15).contains(&length) =>
                "injected event: the length of the instruction is impossible (27.2.1.3)";
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::sample::{capabilities, expect, Table};
    use super::*;
    use Primary as P;
    use Secondary as S;

    fn check(table: &Table) -> Option<&'static str> {
        error(table, &table.settings(), &capabilities())
    }

    fn primary(table: &mut Table, set: Primary) {
        table.or(vmcs::PRIMARY_CONTROLS, set.bits());
    }

    #[test]
    fn reserved_bits_and_execution_controls() {
        expect(
            &Table::long_mode(),
            check,
            &[
                ("pin-based controls", |t| t.or(vmcs::PIN_CONTROLS, 1u32 << 20)),
                ("pin-based controls", |t| t.clear(vmcs::PIN_CONTROLS, 2u32)),
                ("primary controls", |t| t.clear(vmcs::PRIMARY_CONTROLS, 1u32 << 26)),
                ("primary controls", |t| t.or(vmcs::PRIMARY_CONTROLS, 1u32)),
                ("secondary controls", |t| t.or(vmcs::SECONDARY_CONTROLS, 1u32 << 29)),
                ("VM-exit controls", |t| t.clear(vmcs::EXIT_CONTROLS, 1u32)),
                ("VM-entry controls", |t| t.or(vmcs::ENTRY_CONTROLS, 1u32 << 31)),
                ("CR3-target count", |t| t.set(vmcs::CR3_TARGET_COUNT, 5u32)),
                ("I/O bitmaps", |t| {
                    primary(t, P::IO_BITMAPS);
                    t.set(vmcs::IO_BITMAP_A, 0x1000u64);
                    t.set(vmcs::IO_BITMAP_B, 0x1800u64);
                }),
                ("MSR bitmaps", |t| t.set(vmcs::MSR_BITMAPS, 1u64 << 39)),
                ("virtual NMIs", |t| t.clear(vmcs::PIN_CONTROLS, Pin::NMI_EXITING.bits())),
                ("NMI-window exiting", |t| {
                    primary(t, P::NMI_WINDOW_EXITING);
                    t.clear(vmcs::PIN_CONTROLS, Pin::VIRTUAL_NMIS.bits());
                }),
                ("VPID", |t| t.set(vmcs::VPID, 0u16)),
                ("VMCS shadowing", |t| {
                    t.secondary(S::VMCS_SHADOWING);
                    t.set(vmcs::VMREAD_BITMAP, 0x1000u64);
                    t.set(vmcs::VMWRITE_BITMAP, 1u64);
                }),
            ],
        );
    }

    #[test]
    fn without_secondary_controls_their_field_is_not_looked_at() {
        let mut table = Table::long_mode();
        table.clear(vmcs::PRIMARY_CONTROLS, P::SECONDARY_CONTROLS.bits());
        table.set(vmcs::SECONDARY_CONTROLS, u32::MAX);
        assert_eq!(check(&table), None);
    }

    #[test]
    fn apic_virtualization_and_posted_interrupts() {
        expect(
            &Table::long_mode(),
            check,
            &[
                ("virtual-APIC page", |t| t.set(vmcs::VIRTUAL_APIC_ADDRESS, 0x3008u64)),
                ("TPR threshold", |t| t.set(vmcs::TPR_THRESHOLD, 0x10u32)),
                ("TPR shadow", |t| {
                    t.secondary(S::VIRTUALIZE_X2APIC);
                    t.clear(vmcs::PRIMARY_CONTROLS, P::TPR_SHADOW.bits());
                }),
                ("APIC-access page", |t| {
                    t.secondary(S::VIRTUALIZE_APIC_ACCESSES);
                    t.set(vmcs::APIC_ACCESS_ADDRESS, 0xfee0_0001u64);
                }),
                ("virtualize x2APIC mode", |t| {
                    t.secondary(S::VIRTUALIZE_APIC_ACCESSES | S::VIRTUALIZE_X2APIC);
                    t.set(vmcs::APIC_ACCESS_ADDRESS, 0xfee0_0000u64);
                }),
                ("virtual-interrupt delivery", |t| {
                    t.secondary(S::VIRTUAL_INTERRUPT_DELIVERY);
                    t.clear(vmcs::PIN_CONTROLS, Pin::EXTERNAL_INTERRUPT_EXITING.bits());
                }),
                ("posted interrupts: need virtual-interrupt", |t| {
                    t.or(vmcs::PIN_CONTROLS, Pin::POSTED_INTERRUPTS.bits());
                }),
            ],
        );
        let mut posted = Table::long_mode();
        posted.secondary(S::VIRTUAL_INTERRUPT_DELIVERY);
        posted.or(vmcs::PIN_CONTROLS, Pin::POSTED_INTERRUPTS.bits());
        posted.or(vmcs::EXIT_CONTROLS, ExitControls::ACKNOWLEDGE_INTERRUPT.bits());
        posted.set(vmcs::POSTED_INTERRUPT_VECTOR, 0xf2u16);
        posted.set(vmcs::POSTED_INTERRUPT_DESCRIPTOR, 0x40u64);
        expect(
            &posted,
            check,
            &[
                ("posted interrupts: need acknowledge", |t| {
                    t.clear(vmcs::EXIT_CONTROLS, ExitControls::ACKNOWLEDGE_INTERRUPT.bits());
                }),
                ("posted interrupts: the notification", |t| t.set(vmcs::POSTED_INTERRUPT_VECTOR, 0x100u16)),
                ("posted interrupts: the descriptor", |t| t.set(vmcs::POSTED_INTERRUPT_DESCRIPTOR, 0x20u64)),
            ],
        );
    }

    #[test]
    fn ept_and_what_builds_on_it() {
        expect(
            &Table::long_mode(),
            check,
            &[
                ("EPT pointer: the CPU does not support the memory type", |t| {
                    t.set(vmcs::EPT_POINTER, 0x401cu64)
                }),
                ("EPT pointer: the CPU does not support the memory type", |t| {
                    t.set(vmcs::EPT_POINTER, 0x401du64)
                }),
                ("EPT pointer: the CPU does not support the number", |t| t.set(vmcs::EPT_POINTER, 0x4026u64)),
                ("EPT pointer: the CPU has no supervisor", |t| t.or(vmcs::EPT_POINTER, 0x80u64)),
                ("EPT pointer: bits 11:8", |t| t.or(vmcs::EPT_POINTER, 0x100u64)),
                ("EPT pointer: the address", |t| t.or(vmcs::EPT_POINTER, 1u64 << 39)),
                ("page-modification log: needs", |t| {
                    t.without_ept();
                    t.secondary(S::PAGE_MODIFICATION_LOG);
                }),
                ("page-modification log: the address", |t| {
                    t.secondary(S::PAGE_MODIFICATION_LOG);
                    t.set(vmcs::PML_ADDRESS, 8u64);
                }),
                ("unrestricted guest", |t| t.clear(vmcs::SECONDARY_CONTROLS, S::EPT.bits())),
                ("mode-based execute", |t| {
                    t.without_ept();
                    t.secondary(S::MODE_BASED_EXECUTE);
                }),
                ("sub-page write permissions: need", |t| {
                    t.without_ept();
                    t.secondary(S::SUB_PAGE_WRITE_PERMISSIONS);
                }),
                ("sub-page write permissions: the table", |t| {
                    t.secondary(S::SUB_PAGE_WRITE_PERMISSIONS);
                    t.set(vmcs::SUB_PAGE_PERMISSION_POINTER, 1u64);
                }),
                ("virtualization exceptions", |t| {
                    t.secondary(S::VIRTUALIZATION_EXCEPTIONS);
                    t.set(vmcs::VIRTUALIZATION_EXCEPTION_ADDRESS, 1u64);
                }),
                ("processor trace with guest-physical addresses: needs EPT", |t| {
                    t.without_ept();
                    t.secondary(S::PT_GUEST_PHYSICAL);
                }),
                ("processor trace with guest-physical addresses: needs IA32_RTIT_CTL", |t| {
                    t.secondary(S::PT_GUEST_PHYSICAL);
                }),
                ("VM functions", |t| {
                    t.secondary(S::VM_FUNCTIONS);
                    t.set(vmcs::VM_FUNCTION_CONTROLS, 2u64);
                }),
                ("EPTP switching: needs", |t| {
                    t.without_ept();
                    t.secondary(S::VM_FUNCTIONS);
                    t.set(vmcs::VM_FUNCTION_CONTROLS, 1u64);
                }),
                ("EPTP switching: the list", |t| {
                    t.secondary(S::VM_FUNCTIONS);
                    t.set(vmcs::VM_FUNCTION_CONTROLS, 1u64);
                    t.set(vmcs::EPTP_LIST_ADDRESS, 1u64);
                }),
            ],
        );
        let mut table = Table::long_mode();
        table.or(vmcs::EPT_POINTER, 0x40u64);
        assert_eq!(check(&table), None, "accessed and dirty bits");
        let mut older = capabilities();
        older.ept_vpid -= EptVpid::ACCESSED_DIRTY;
        let said = error(&table, &table.settings(), &older).unwrap();
        assert!(said.starts_with("EPT pointer: the CPU has no accessed"));
    }

    #[test]
    fn exit_and_entry_controls() {
        expect(
            &Table::long_mode(),
            check,
            &[
                ("save VMX-preemption timer", |t| {
                    t.or(vmcs::EXIT_CONTROLS, ExitControls::SAVE_PREEMPTION_TIMER.bits());
                }),
                ("VM-exit MSR-store area", |t| {
                    t.set(vmcs::EXIT_MSR_STORE_COUNT, 1u32);
                    t.set(vmcs::EXIT_MSR_STORE_ADDRESS, 0x1008u64);
                }),
                ("VM-exit MSR-load area", |t| {
                    t.set(vmcs::EXIT_MSR_LOAD_COUNT, 2u32);
                    t.set(vmcs::EXIT_MSR_LOAD_ADDRESS, (1u64 << 39) - 16);
                }),
                ("VM-entry MSR-load area", |t| {
                    t.set(vmcs::ENTRY_MSR_LOAD_COUNT, u32::MAX);
                    t.set(vmcs::ENTRY_MSR_LOAD_ADDRESS, !0xfu64);
                }),
                ("entry to SMM", |t| t.or(vmcs::ENTRY_CONTROLS, EntryControls::ENTRY_TO_SMM.bits())),
                ("deactivate dual-monitor", |t| {
                    t.or(vmcs::ENTRY_CONTROLS, EntryControls::DEACTIVATE_DUAL_MONITOR.bits());
                }),
            ],
        );
        let mut areas = Table::long_mode();
        areas.set(vmcs::EXIT_MSR_LOAD_COUNT, 1u32);
        areas.set(vmcs::EXIT_MSR_LOAD_ADDRESS, (1u64 << 39) - 16);
        assert_eq!(check(&areas), None, "the last bytes of memory");
    }

    #[test]
    fn injected_events() {
        let mut valid = Table::long_mode();
        valid.set(vmcs::ENTRY_INTERRUPTION, 0x8000_0b0eu32);
        valid.set(vmcs::ENTRY_EXCEPTION_ERROR, 7u32);
        valid.set(vmcs::ENTRY_INSTRUCTION_LENGTH, 0u32);
        expect(
            &valid,
            check,
            &[
                ("injected event: the type", |t| t.set(vmcs::ENTRY_INTERRUPTION, 0x8000_0120u32)),
                ("injected event: the vector of an NMI", |t| t.set(vmcs::ENTRY_INTERRUPTION, 0x8000_0203u32)),
                ("injected event: the vector of a hardware", |t| {
                    t.set(vmcs::ENTRY_INTERRUPTION, 0x8000_0320u32)
                }),
                ("injected event: the vector of another", |t| {
                    t.set(vmcs::ENTRY_INTERRUPTION, 0x8000_0701u32)
                }),
                ("injected event: it must not", |t| t.set(vmcs::ENTRY_INTERRUPTION, 0x8000_0b06u32)),
                ("injected event: it must not", |t| t.set(vmcs::ENTRY_INTERRUPTION, 0x8000_0820u32)),
                ("injected event: it must not", |t| t.clear(vmcs::GUEST_CR0, 1u64)),
                ("injected event: it must have", |t| t.clear(vmcs::ENTRY_INTERRUPTION, 0x800u32)),
                ("injected event: bits 30:12", |t| t.or(vmcs::ENTRY_INTERRUPTION, 1u32 << 12)),
                ("injected event: bits 31:16", |t| t.set(vmcs::ENTRY_EXCEPTION_ERROR, 0x1_0000u32)),
                ("injected event: the length", |t| {
                    t.set(vmcs::ENTRY_INTERRUPTION, 0x8000_0480u32);
                    t.set(vmcs::ENTRY_INSTRUCTION_LENGTH, 16u32);
                }),
            ],
        );
        for info in [0x8000_0031u32, 0x8000_0202, 0x8000_0306, 0x8000_0480, 0x8000_0501, 0x8000_0700] {
            valid.set(vmcs::ENTRY_INTERRUPTION, info);
            assert_eq!(check(&valid), None, "{info:#x}");
        }
    }

    #[test]
    fn older_and_newer_rules_for_injected_events() {
        let mut table = Table::long_mode();
        table.set(vmcs::ENTRY_INSTRUCTION_LENGTH, 0u32);
        let mut cpu = capabilities();
        cpu.misc &= !(1 << 30);
        cpu.primary &= !(u64::from(P::MONITOR_TRAP_FLAG.bits()) << 32);
        for (info, words) in [(0x8000_0480u32, "the length"), (0x8000_0700, "the type")] {
            table.set(vmcs::ENTRY_INTERRUPTION, info);
            assert!(error(&table, &table.settings(), &cpu).unwrap().contains(words));
        }
        cpu.basic |= 1 << 56;
        for info in [0x8000_030du32, 0x8000_0b15] {
            table.set(vmcs::ENTRY_INTERRUPTION, info);
            table.set(vmcs::ENTRY_EXCEPTION_ERROR, 0u32);
            assert_eq!(error(&table, &table.settings(), &cpu), None, "error codes are free");
        }
    }
}
