//! Rules for the host-state area. SDM vol. 3, 27.2.2 to 27.2.4.
use super::{
    broken, pat_is_valid, Settings, CR0_WP, CR4_CET, CR4_PAE, EFER_LMA, EFER_LME, EFER_RESERVED,
    PERF_GLOBAL_RESERVED, S_CET_RESERVED, S_CET_TRACKING,
};
use crate::hw::vmx::capabilities::VmxCapabilities;
use crate::hw::vmx::controls::ExitControls;
use crate::hw::vmx::vmcs::{self, Field16, FieldNatural, Fields};

/// The first broken rule.
pub(super) fn error(
    fields: &impl Fields,
    settings: &Settings,
    capabilities: &VmxCapabilities,
) -> Option<&'static str> {
    control_registers(fields, capabilities)
        .or_else(|| msrs(fields, settings, capabilities))
        .or_else(|| segments(fields, capabilities))
        .or_else(|| address_space(fields, settings, capabilities))
}

fn control_registers(fields: &impl Fields, capabilities: &VmxCapabilities) -> Option<&'static str> {
    let cr0 = fields.read(vmcs::HOST_CR0);
    let cr4 = fields.read(vmcs::HOST_CR4);
    broken! {
        capabilities.cr0_fixed0 & !cr0 != 0 =>
            "host CR0: a bit is 0 that must be 1 in VMX operation (27.2.2)";
        cr0 & !capabilities.cr0_fixed1 != 0 =>
            "host CR0: a bit is 1 that must be 0 in VMX operation (27.2.2)";
        capabilities.cr4_fixed0 & !cr4 != 0 =>
            "host CR4: a bit is 0 that must be 1 in VMX operation (27.2.2)";
        cr4 & !capabilities.cr4_fixed1 != 0 =>
            "host CR4: a bit is 1 that must be 0 in VMX operation (27.2.2)";
        cr4 & CR4_CET != 0 && cr0 & CR0_WP == 0 => "host CR4: CET needs CR0.WP (27.2.2)";
        fields.read(vmcs::HOST_CR3) & capabilities.cr3_reserved() != 0 =>
            "host CR3: beyond the physical-address width (27.2.2)";
    }
    None
}

fn msrs(fields: &impl Fields, settings: &Settings, capabilities: &VmxCapabilities) -> Option<&'static str> {
    let canonical = |field: FieldNatural| capabilities.is_canonical(fields.read(field));
    let exit = settings.exit;
    broken! {
        !canonical(vmcs::HOST_SYSENTER_ESP) => "host IA32_SYSENTER_ESP: not canonical (27.2.2)";
        !canonical(vmcs::HOST_SYSENTER_EIP) => "host IA32_SYSENTER_EIP: not canonical (27.2.2)";
        exit.contains(ExitControls::LOAD_PERF_GLOBAL_CTRL)
            && fields.read(vmcs::HOST_PERF_GLOBAL_CTRL) & PERF_GLOBAL_RESERVED != 0 =>
            "host IA32_PERF_GLOBAL_CTRL: a reserved bit is 1 (27.2.2)";
        exit.contains(ExitControls::LOAD_PAT) && !pat_is_valid(fields.read(vmcs::HOST_PAT)) =>
            "host IA32_PAT: a byte is not a memory type (27.2.2)";
        exit.contains(ExitControls::LOAD_PKRS) && fields.read(vmcs::HOST_PKRS) >> 32 != 0 =>
            "host IA32_PKRS: bits 63:32 must be 0 (27.2.2)";
    }
    if exit.contains(ExitControls::LOAD_EFER) {
        let efer = fields.read(vmcs::HOST_EFER);
        let long = exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE);
        broken! {
            efer & EFER_RESERVED != 0 => "host IA32_EFER: a reserved bit is 1 (27.2.2)";
            (efer & EFER_LMA != 0) != long || (efer & EFER_LME != 0) != long =>
                "host IA32_EFER: LMA and LME must be what host address-space size is (27.2.2)";
        }
    }
    if exit.contains(ExitControls::LOAD_CET) {
        let s_cet = fields.read(vmcs::HOST_S_CET);
        broken! {
            !capabilities.is_canonical(s_cet) || !canonical(vmcs::HOST_INTERRUPT_SSP_TABLE) =>
                "host CET state: an address is not canonical (27.2.2)";
            s_cet & S_CET_RESERVED != 0 || s_cet & S_CET_TRACKING == S_CET_TRACKING =>
                "host IA32_S_CET: a reserved bit is 1, or both SUPPRESS and TRACKER are (27.2.2)";
            !canonical(vmcs::HOST_SSP) || fields.read(vmcs::HOST_SSP) & 3 != 0 =>
                "host SSP: not canonical or not aligned (27.2.2)";
        }
    }
    None
}

fn segments(fields: &impl Fields, capabilities: &VmxCapabilities) -> Option<&'static str> {
    let canonical = |field: FieldNatural| capabilities.is_canonical(fields.read(field));
    // RPL and TI are bits 2:0.
    let privileged = |field: Field16| fields.read(field) & 7 == 0;
    broken! {
        !privileged(vmcs::HOST_CS_SELECTOR) => "host CS: RPL and TI must be 0 (27.2.3)";
        !privileged(vmcs::HOST_SS_SELECTOR) => "host SS: RPL and TI must be 0 (27.2.3)";
        !privileged(vmcs::HOST_DS_SELECTOR) => "host DS: RPL and TI must be 0 (27.2.3)";
        !privileged(vmcs::HOST_ES_SELECTOR) => "host ES: RPL and TI must be 0 (27.2.3)";
        !privileged(vmcs::HOST_FS_SELECTOR) => "host FS: RPL and TI must be 0 (27.2.3)";
        !privileged(vmcs::HOST_GS_SELECTOR) => "host GS: RPL and TI must be 0 (27.2.3)";
        !privileged(vmcs::HOST_TR_SELECTOR) => "host TR: RPL and TI must be 0 (27.2.3)";
        fields.read(vmcs::HOST_CS_SELECTOR) == 0 => "host CS: the selector must not be null (27.2.3)";
        fields.read(vmcs::HOST_TR_SELECTOR) == 0 => "host TR: the selector must not be null (27.2.3)";
        !canonical(vmcs::HOST_FS_BASE) => "host FS: the base is not canonical (27.2.3)";
        !canonical(vmcs::HOST_GS_BASE) => "host GS: the base is not canonical (27.2.3)";
        !canonical(vmcs::HOST_GDTR_BASE) => "host GDTR: the base is not canonical (27.2.3)";
        !canonical(vmcs::HOST_IDTR_BASE) => "host IDTR: the base is not canonical (27.2.3)";
        !canonical(vmcs::HOST_TR_BASE) => "host TR: the base is not canonical (27.2.3)";
    }
    None
}

/// Umbra runs in 64-bit mode, so a host of another mode is refused whole, and its own rules never apply.
fn address_space(
    fields: &impl Fields,
    settings: &Settings,
    capabilities: &VmxCapabilities,
) -> Option<&'static str> {
    broken! {
        !settings.exit.contains(ExitControls::HOST_ADDRESS_SPACE_SIZE) =>
            "host address-space size: must be 1 in IA-32e mode (27.2.4)";
        fields.read(vmcs::HOST_CR4) & CR4_PAE == 0 => "host CR4: PAE must be 1 (27.2.4)";
        !capabilities.is_canonical(fields.read(vmcs::HOST_RIP)) => "host RIP: not canonical (27.2.4)";
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::sample::{capabilities, expect, Table};
    use super::*;

    fn check(table: &Table) -> Option<&'static str> {
        error(table, &table.settings(), &capabilities())
    }

    const NOT_CANONICAL: u64 = 1 << 47;

    fn load(table: &mut Table, control: ExitControls) {
        table.or(vmcs::EXIT_CONTROLS, control.bits());
    }

    #[test]
    fn control_registers_and_msrs() {
        expect(
            &Table::long_mode(),
            check,
            &[
                ("host CR0: a bit is 0", |t| t.clear(vmcs::HOST_CR0, 0x20u64)),
                ("host CR0: a bit is 1", |t| t.or(vmcs::HOST_CR0, 1u64 << 32)),
                ("host CR4: a bit is 0", |t| t.clear(vmcs::HOST_CR4, 0x2000u64)),
                ("host CR4: a bit is 1", |t| t.or(vmcs::HOST_CR4, 1u64 << 31)),
                ("host CR4: CET", |t| {
                    t.or(vmcs::HOST_CR4, CR4_CET);
                    t.clear(vmcs::HOST_CR0, CR0_WP);
                }),
                ("host CR3", |t| t.or(vmcs::HOST_CR3, 1u64 << 39)),
                ("host IA32_SYSENTER_ESP", |t| t.set(vmcs::HOST_SYSENTER_ESP, NOT_CANONICAL)),
                ("host IA32_SYSENTER_EIP", |t| t.set(vmcs::HOST_SYSENTER_EIP, NOT_CANONICAL)),
                ("host IA32_PERF_GLOBAL_CTRL", |t| {
                    load(t, ExitControls::LOAD_PERF_GLOBAL_CTRL);
                    t.set(vmcs::HOST_PERF_GLOBAL_CTRL, 1u64 << 31);
                }),
                ("host IA32_PAT", |t| t.set(vmcs::HOST_PAT, 2u64)),
                ("host IA32_PKRS", |t| {
                    load(t, ExitControls::LOAD_PKRS);
                    t.set(vmcs::HOST_PKRS, 1u64 << 32);
                }),
                ("host IA32_EFER: a reserved", |t| t.or(vmcs::HOST_EFER, 2u64)),
                ("host IA32_EFER: LMA", |t| t.clear(vmcs::HOST_EFER, EFER_LME)),
                ("host IA32_EFER: LMA", |t| t.clear(vmcs::HOST_EFER, EFER_LMA)),
            ],
        );
    }

    #[test]
    fn control_flow_enforcement() {
        let mut valid = Table::long_mode();
        load(&mut valid, ExitControls::LOAD_CET);
        for field in [vmcs::HOST_S_CET, vmcs::HOST_SSP, vmcs::HOST_INTERRUPT_SSP_TABLE] {
            valid.set(field, 0u64);
        }
        expect(
            &valid,
            check,
            &[
                ("host CET state", |t| t.set(vmcs::HOST_S_CET, NOT_CANONICAL)),
                ("host CET state", |t| t.set(vmcs::HOST_INTERRUPT_SSP_TABLE, NOT_CANONICAL)),
                ("host IA32_S_CET", |t| t.set(vmcs::HOST_S_CET, 0x40u64)),
                ("host IA32_S_CET", |t| t.set(vmcs::HOST_S_CET, 0xc00u64)),
                ("host SSP", |t| t.set(vmcs::HOST_SSP, 2u64)),
            ],
        );
    }

    #[test]
    fn segments_and_address_space() {
        expect(
            &Table::long_mode(),
            check,
            &[
                ("host CS: RPL", |t| t.set(vmcs::HOST_CS_SELECTOR, 9u16)),
                ("host SS: RPL", |t| t.set(vmcs::HOST_SS_SELECTOR, 3u16)),
                ("host DS: RPL", |t| t.set(vmcs::HOST_DS_SELECTOR, 4u16)),
                ("host ES: RPL", |t| t.set(vmcs::HOST_ES_SELECTOR, 2u16)),
                ("host FS: RPL", |t| t.set(vmcs::HOST_FS_SELECTOR, 1u16)),
                ("host GS: RPL", |t| t.set(vmcs::HOST_GS_SELECTOR, 1u16)),
                ("host TR: RPL", |t| t.set(vmcs::HOST_TR_SELECTOR, 0x2cu16)),
                ("host CS: the selector", |t| t.set(vmcs::HOST_CS_SELECTOR, 0u16)),
                ("host TR: the selector", |t| t.set(vmcs::HOST_TR_SELECTOR, 0u16)),
                ("host FS: the base", |t| t.set(vmcs::HOST_FS_BASE, NOT_CANONICAL)),
                ("host GS: the base", |t| t.set(vmcs::HOST_GS_BASE, NOT_CANONICAL)),
                ("host GDTR: the base", |t| t.set(vmcs::HOST_GDTR_BASE, NOT_CANONICAL)),
                ("host IDTR: the base", |t| t.set(vmcs::HOST_IDTR_BASE, NOT_CANONICAL)),
                ("host TR: the base", |t| t.set(vmcs::HOST_TR_BASE, NOT_CANONICAL)),
                ("host address-space size", |t| {
                    t.clear(vmcs::EXIT_CONTROLS, ExitControls::HOST_ADDRESS_SPACE_SIZE.bits());
                    t.clear(vmcs::HOST_EFER, EFER_LMA | EFER_LME);
                }),
                ("host CR4: PAE", |t| t.clear(vmcs::HOST_CR4, CR4_PAE)),
                ("host RIP", |t| t.set(vmcs::HOST_RIP, NOT_CANONICAL)),
            ],
        );
    }
}
