//! Rules for the guest-state area: control registers, MSRs, descriptor tables, RIP, RFLAGS, PDPTEs.
//! SDM vol. 3, 27.3.1.
use super::state::{GuestState, RFLAGS_IF, RFLAGS_VM};
use super::{
    broken, non_register, pat_is_valid, segments, CR0_PE, CR0_PG, CR0_WP, CR4_CET, CR4_PAE, CR4_PCIDE,
    EFER_LMA, EFER_LME, EFER_RESERVED, PERF_GLOBAL_RESERVED, S_CET_RESERVED, S_CET_TRACKING,
};
use crate::hw::vmx::capabilities::VmxCapabilities;
use crate::hw::vmx::event::{TYPE_INTERRUPT, TYPE_SHIFT, VALID};

/// The first rule that an entry with this state breaks, if any.
pub fn guest_state_error(
    state: &GuestState,
    capabilities: &VmxCapabilities,
    unrestricted: bool,
) -> Option<&'static str> {
    control_registers(state, capabilities, unrestricted)
        .or_else(|| msrs(state, capabilities))
        .or_else(|| rare_msrs(state, capabilities))
        .or_else(|| segments::error(state, capabilities, unrestricted))
        .or_else(|| descriptor_tables(state, capabilities))
        .or_else(|| rip_and_rflags(state, capabilities))
        .or_else(|| non_register::error(state, capabilities))
        .or_else(|| pdptes(state, capabilities))
}

fn control_registers(
    state: &GuestState,
    capabilities: &VmxCapabilities,
    unrestricted: bool,
) -> Option<&'static str> {
    let GuestState { cr0, cr4, long_mode, .. } = *state;
    broken! {
        !unrestricted && cr0 & CR0_PE == 0 =>
            "guest CR0: PE is 0, which only an unrestricted guest may have (27.3.1.1)";
        !unrestricted && cr0 & CR0_PG == 0 =>
            "guest CR0: PG is 0, which only an unrestricted guest may have (27.3.1.1)";
        capabilities.guest_cr0_fixed0(unrestricted) & !cr0 != 0 =>
            "guest CR0: a bit is 0 that must be 1 in VMX operation (27.3.1.1)";
        cr0 & !capabilities.cr0_fixed1 != 0 =>
            "guest CR0: a bit is 1 that must be 0 in VMX operation (27.3.1.1)";
        cr0 & (CR0_PG | CR0_PE) == CR0_PG => "guest CR0: PG needs PE (27.3.1.1)";
        capabilities.cr4_fixed0 & !cr4 != 0 =>
            "guest CR4: a bit is 0 that must be 1 in VMX operation (27.3.1.1)";
        cr4 & !capabilities.cr4_fixed1 != 0 =>
            "guest CR4: a bit is 1 that must be 0 in VMX operation (27.3.1.1)";
        cr4 & CR4_CET != 0 && cr0 & CR0_WP == 0 => "guest CR4: CET needs CR0.WP (27.3.1.1)";
        long_mode && cr0 & CR0_PG == 0 => "guest CR0: PG must be 1 in IA-32e mode (27.3.1.1)";
        long_mode && cr4 & CR4_PAE == 0 => "guest CR4: PAE must be 1 in IA-32e mode (27.3.1.1)";
        !long_mode && cr4 & CR4_PCIDE != 0 => "guest CR4: PCIDE must be 0 outside IA-32e mode (27.3.1.1)";
        state.cr3 & capabilities.cr3_reserved() != 0 =>
            "guest CR3: beyond the physical-address width (27.3.1.1)";
    }
    None
}

fn msrs(state: &GuestState, capabilities: &VmxCapabilities) -> Option<&'static str> {
    /// Bits 5:3 and 63:16 of IA32_DEBUGCTL.
    const DEBUGCTL_RESERVED: u64 = u64::MAX << 16 | 0x38;
    if let Some((dr7, debugctl)) = state.debug {
        broken! {
            debugctl & DEBUGCTL_RESERVED != 0 => "guest IA32_DEBUGCTL: a reserved bit is 1 (27.3.1.1)";
            dr7 >> 32 != 0 => "guest DR7: bits 63:32 must be 0 (27.3.1.1)";
        }
    }
    broken! {
        !capabilities.is_canonical(state.sysenter_esp) =>
            "guest IA32_SYSENTER_ESP: not canonical (27.3.1.1)";
        !capabilities.is_canonical(state.sysenter_eip) =>
            "guest IA32_SYSENTER_EIP: not canonical (27.3.1.1)";
        state.pat.is_some_and(|pat| !pat_is_valid(pat)) =>
            "guest IA32_PAT: a byte is not a memory type (27.3.1.1)";
    }
    if let Some(efer) = state.efer {
        let lma = efer & EFER_LMA != 0;
        broken! {
            efer & EFER_RESERVED != 0 => "guest IA32_EFER: a reserved bit is 1 (27.3.1.1)";
            lma != state.long_mode => "guest IA32_EFER: LMA must be what IA-32e mode guest is (27.3.1.1)";
            state.cr0 & CR0_PG != 0 && lma != (efer & EFER_LME != 0) =>
                "guest IA32_EFER: LMA must be LME while CR0.PG is 1 (27.3.1.1)";
        }
    }
    None
}

/// MSRs that Umbra leaves alone.
fn rare_msrs(state: &GuestState, capabilities: &VmxCapabilities) -> Option<&'static str> {
    /// Bits 11:2 of IA32_BNDCFGS.
    const BNDCFGS_RESERVED: u64 = 0xffc;
    /// Bits of IA32_RTIT_CTL that no CPU has.
    const RTIT_CTL_RESERVED: u64 = 0x7f << 48 | 1 << 63;
    /// Bits 15:4 and 63:23 of IA32_LBR_CTL.
    const LBR_CTL_RESERVED: u64 = u64::MAX << 23 | 0xfff0;
    let has = |msr: Option<u64>, bits: u64| msr.is_some_and(|value| value & bits != 0);
    broken! {
        has(state.perf_global_ctrl, PERF_GLOBAL_RESERVED) =>
            "guest IA32_PERF_GLOBAL_CTRL: a reserved bit is 1 (27.3.1.1)";
        has(state.bndcfgs, BNDCFGS_RESERVED) => "guest IA32_BNDCFGS: a reserved bit is 1 (27.3.1.1)";
        state.bndcfgs.is_some_and(|value| !capabilities.is_canonical(value & !0xfff)) =>
            "guest IA32_BNDCFGS: the address is not canonical (27.3.1.1)";
        has(state.rtit_ctl, RTIT_CTL_RESERVED) => "guest IA32_RTIT_CTL: a reserved bit is 1 (27.3.1.1)";
        has(state.lbr_ctl, LBR_CTL_RESERVED) => "guest IA32_LBR_CTL: a reserved bit is 1 (27.3.1.1)";
        has(state.pkrs, u64::MAX << 32) => "guest IA32_PKRS: bits 63:32 must be 0 (27.3.1.1)";
        state.uinv.is_some_and(|vector| vector > 0xff) =>
            "guest UINV: bits 15:8 must be 0 (27.3.1.1)";
    }
    if let Some([s_cet, ssp, table]) = state.cet {
        broken! {
            !capabilities.is_canonical(s_cet) || !capabilities.is_canonical(table) =>
                "guest CET state: an address is not canonical (27.3.1.1)";
            s_cet & S_CET_RESERVED != 0 || s_cet & S_CET_TRACKING == S_CET_TRACKING =>
                "guest IA32_S_CET: a reserved bit is 1, or both SUPPRESS and TRACKER are (27.3.1.1)";
            ssp & 3 != 0 => "guest SSP: bits 1:0 must be 0 (27.3.1.4)";
            !state.in_64_bit_mode() && ssp >> 32 != 0 =>
                "guest SSP: bits 63:32 must be 0 outside 64-bit mode (27.3.1.4)";
            !capabilities.is_canonical(ssp) => "guest SSP: not canonical (27.3.1.4)";
        }
    }
    None
}

fn descriptor_tables(state: &GuestState, capabilities: &VmxCapabilities) -> Option<&'static str> {
    broken! {
        !capabilities.is_canonical(state.gdtr.base) => "guest GDTR: the base is not canonical (27.3.1.3)";
        !capabilities.is_canonical(state.idtr.base) => "guest IDTR: the base is not canonical (27.3.1.3)";
        state.gdtr.limit > 0xffff => "guest GDTR: bits 31:16 of the limit must be 0 (27.3.1.3)";
        state.idtr.limit > 0xffff => "guest IDTR: bits 31:16 of the limit must be 0 (27.3.1.3)";
    }
    None
}

fn rip_and_rflags(state: &GuestState, capabilities: &VmxCapabilities) -> Option<&'static str> {
    /// Bits 63:22, 15, 5 and 3.
    const RFLAGS_ZERO: u64 = u64::MAX << 22 | 1 << 15 | 1 << 5 | 1 << 3;
    let GuestState { rip, rflags, .. } = *state;
    // Bits from the linear-address width on must be alike; unlike in a canonical address, the one below need
    // not be.
    let above = rip as i64 >> capabilities.linear_address_bits;
    broken! {
        !state.in_64_bit_mode() && rip >> 32 != 0 =>
            "guest RIP: bits 63:32 must be 0 outside 64-bit mode (27.3.1.4)";
        above != 0 && above != -1 => "guest RIP: beyond the linear-address width (27.3.1.4)";
        rflags & RFLAGS_ZERO != 0 => "guest RFLAGS: a reserved bit is 1 (27.3.1.4)";
        rflags & 2 == 0 => "guest RFLAGS: bit 1 must be 1 (27.3.1.4)";
        rflags & RFLAGS_VM != 0 && state.long_mode => "guest RFLAGS: VM must be 0 in IA-32e mode (27.3.1.4)";
        rflags & RFLAGS_VM != 0 && state.cr0 & CR0_PE == 0 =>
            "guest RFLAGS: VM must be 0 in real mode (27.3.1.4)";
        rflags & RFLAGS_IF == 0
            && state.injection & VALID != 0
            && state.injection >> TYPE_SHIFT & 7 == TYPE_INTERRUPT =>
            "guest RFLAGS: IF must be 1 to inject an external interrupt (27.3.1.4)";
    }
    None
}

fn pdptes(state: &GuestState, capabilities: &VmxCapabilities) -> Option<&'static str> {
    let pae = !state.long_mode && state.cr0 & CR0_PG != 0 && state.cr4 & CR4_PAE != 0;
    // Bits 2:1 and 8:5, and all beyond the physical-address width.
    let reserved = u64::MAX << capabilities.physical_address_bits | 0x1e6;
    let entries = state.pdptes.filter(|_| pae)?;
    entries
        .iter()
        .any(|entry| entry & 1 != 0 && entry & reserved != 0)
        .then_some("guest PDPTEs: a reserved bit of a present one is 1 (27.3.1.6)")
}

#[cfg(test)]
mod tests {
    use super::super::sample::{expect, pae, plain_error, protected_mode, virtual_8086, Table};
    use super::*;
    use crate::hw::vmx::controls::EntryControls;
    use crate::hw::vmx::vmcs;
    use crate::hw::CpuState;

    const NOT_CANONICAL: u64 = 1 << 47;

    fn load(table: &mut Table, control: EntryControls) {
        table.or(vmcs::ENTRY_CONTROLS, control.bits());
    }

    #[test]
    fn control_and_debug_registers() {
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[
                ("guest CR0: a bit is 0", |t| t.clear(vmcs::GUEST_CR0, 0x20u64)),
                ("guest CR0: a bit is 1", |t| t.or(vmcs::GUEST_CR0, 1u64 << 32)),
                ("guest CR0: PG needs PE", |t| t.clear(vmcs::GUEST_CR0, CR0_PE)),
                ("guest CR4: a bit is 0", |t| t.clear(vmcs::GUEST_CR4, 0x2000u64)),
                ("guest CR4: a bit is 1", |t| t.or(vmcs::GUEST_CR4, 1u64 << 31)),
                ("guest CR4: CET", |t| t.or(vmcs::GUEST_CR4, CR4_CET)),
                ("guest CR0: PG must be 1", |t| t.clear(vmcs::GUEST_CR0, CR0_PG)),
                ("guest CR4: PAE", |t| t.clear(vmcs::GUEST_CR4, CR4_PAE)),
                ("guest CR3", |t| t.or(vmcs::GUEST_CR3, 1u64 << 63)),
                ("guest DR7", |t| t.or(vmcs::GUEST_DR7, 1u64 << 32)),
                ("guest IA32_DEBUGCTL", |t| t.set(vmcs::GUEST_DEBUGCTL, 1u64 << 16)),
            ],
        );
        expect(
            &Table::of(&protected_mode(), false),
            Table::guest_error,
            &[
                ("guest CR0: PE is 0", |t| t.clear(vmcs::GUEST_CR0, CR0_PE | CR0_PG)),
                ("guest CR0: PG is 0", |t| t.clear(vmcs::GUEST_CR0, CR0_PG)),
                ("guest CR4: PCIDE", |t| t.or(vmcs::GUEST_CR4, CR4_PCIDE)),
            ],
        );
    }

    #[test]
    fn msrs_that_umbra_switches() {
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[
                ("guest IA32_SYSENTER_ESP", |t| t.set(vmcs::GUEST_SYSENTER_ESP, NOT_CANONICAL)),
                ("guest IA32_SYSENTER_EIP", |t| t.set(vmcs::GUEST_SYSENTER_EIP, NOT_CANONICAL)),
                ("guest IA32_PAT", |t| t.set(vmcs::GUEST_PAT, 3u64)),
                ("guest IA32_EFER: a reserved", |t| t.or(vmcs::GUEST_EFER, 1u64 << 12)),
                ("guest IA32_EFER: LMA must be what", |t| t.clear(vmcs::GUEST_EFER, EFER_LMA)),
                ("guest IA32_EFER: LMA must be LME", |t| t.clear(vmcs::GUEST_EFER, EFER_LME)),
            ],
        );
        // A guest that has set LME and not yet turned paging on.
        let waiting = CpuState { efer: EFER_LME, ..CpuState::reset() };
        assert_eq!(plain_error(&waiting, true), None);
    }

    #[test]
    fn msrs_that_umbra_leaves_alone() {
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[
                ("guest IA32_PERF_GLOBAL_CTRL", |t| {
                    load(t, EntryControls::LOAD_PERF_GLOBAL_CTRL);
                    t.set(vmcs::GUEST_PERF_GLOBAL_CTRL, 1u64 << 63);
                }),
                ("guest IA32_BNDCFGS: a reserved", |t| {
                    load(t, EntryControls::LOAD_BNDCFGS);
                    t.set(vmcs::GUEST_BNDCFGS, 4u64);
                }),
                ("guest IA32_BNDCFGS: the address", |t| {
                    load(t, EntryControls::LOAD_BNDCFGS);
                    t.set(vmcs::GUEST_BNDCFGS, NOT_CANONICAL);
                }),
                ("guest IA32_RTIT_CTL", |t| {
                    load(t, EntryControls::LOAD_RTIT_CTL);
                    t.set(vmcs::GUEST_RTIT_CTL, 1u64 << 63);
                }),
                ("guest IA32_LBR_CTL", |t| {
                    load(t, EntryControls::LOAD_LBR_CTL);
                    t.set(vmcs::GUEST_LBR_CTL, 0x10u64);
                }),
                ("guest IA32_PKRS", |t| {
                    load(t, EntryControls::LOAD_PKRS);
                    t.set(vmcs::GUEST_PKRS, 1u64 << 32);
                }),
                ("guest UINV", |t| {
                    load(t, EntryControls::LOAD_UINV);
                    t.set(vmcs::GUEST_UINV, 0x100u16);
                }),
            ],
        );
    }

    #[test]
    fn control_flow_enforcement() {
        for (state, in_long_mode) in [(super::super::sample::long_mode(), true), (protected_mode(), false)] {
            let mut valid = Table::of(&state, true);
            load(&mut valid, EntryControls::LOAD_CET);
            for field in [vmcs::GUEST_S_CET, vmcs::GUEST_SSP, vmcs::GUEST_INTERRUPT_SSP_TABLE] {
                valid.set(field, 0u64);
            }
            expect(
                &valid,
                Table::guest_error,
                &[
                    ("guest CET state", |t| t.set(vmcs::GUEST_S_CET, NOT_CANONICAL)),
                    ("guest CET state", |t| t.set(vmcs::GUEST_INTERRUPT_SSP_TABLE, NOT_CANONICAL)),
                    ("guest IA32_S_CET", |t| t.set(vmcs::GUEST_S_CET, 0x200u64)),
                    ("guest IA32_S_CET", |t| t.set(vmcs::GUEST_S_CET, 0xc00u64)),
                    ("guest SSP: bits 1:0", |t| t.set(vmcs::GUEST_SSP, 1u64)),
                ],
            );
            valid.set(vmcs::GUEST_SSP, NOT_CANONICAL);
            let words = if in_long_mode { "guest SSP: not canonical" } else { "guest SSP: bits 63:32" };
            assert!(valid.guest_error().unwrap().starts_with(words));
        }
    }

    #[test]
    fn descriptor_tables_rip_and_rflags() {
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[
                ("guest GDTR: the base", |t| t.set(vmcs::GUEST_GDTR_BASE, NOT_CANONICAL)),
                ("guest IDTR: the base", |t| t.set(vmcs::GUEST_IDTR_BASE, NOT_CANONICAL)),
                ("guest GDTR: bits 31:16", |t| t.set(vmcs::GUEST_GDTR_LIMIT, 0x1_0000u32)),
                ("guest IDTR: bits 31:16", |t| t.set(vmcs::GUEST_IDTR_LIMIT, 0x1_0000u32)),
                ("guest RIP: beyond", |t| t.set(vmcs::GUEST_RIP, 1u64 << 48)),
                ("guest RFLAGS: a reserved", |t| t.or(vmcs::GUEST_RFLAGS, 1u64 << 63)),
                ("guest RFLAGS: a reserved", |t| t.or(vmcs::GUEST_RFLAGS, 1u64 << 15)),
                ("guest RFLAGS: bit 1", |t| t.clear(vmcs::GUEST_RFLAGS, 2u64)),
                ("guest RFLAGS: IF", |t| t.set(vmcs::ENTRY_INTERRUPTION, 0x8000_0020u32)),
            ],
        );
        let mut last = Table::long_mode();
        last.set(vmcs::GUEST_RIP, NOT_CANONICAL);
        assert_eq!(last.guest_error(), None, "RIP after the last instruction of the lower half");
        expect(
            &Table::of(&protected_mode(), true),
            Table::guest_error,
            &[("guest RIP: bits 63:32", |t| t.set(vmcs::GUEST_RIP, 1u64 << 32))],
        );
        expect(
            &Table::of(&virtual_8086(), true),
            Table::guest_error,
            &[
                ("guest RFLAGS: VM must be 0 in real", |t| t.clear(vmcs::GUEST_CR0, CR0_PE | CR0_PG)),
                ("guest RFLAGS: VM must be 0 in IA-32e", |t| {
                    load(t, EntryControls::IA32E_GUEST);
                    t.or(vmcs::GUEST_CR4, CR4_PAE);
                    t.set(vmcs::GUEST_EFER, EFER_LME | EFER_LMA);
                }),
            ],
        );
    }

    #[test]
    fn page_directory_pointers() {
        expect(
            &Table::of(&pae(), true),
            Table::guest_error,
            &[
                ("guest PDPTEs", |t| t.set(vmcs::GUEST_PDPTE_0, 0x5003u64)),
                ("guest PDPTEs", |t| t.set(vmcs::GUEST_PDPTE_3, 1u64 << 39 | 1)),
            ],
        );
        let mut absent = Table::of(&pae(), true);
        absent.set(vmcs::GUEST_PDPTE_1, u64::MAX - 1);
        assert_eq!(absent.guest_error(), None);
        let mut unused = Table::long_mode();
        unused.set(vmcs::GUEST_PDPTE_1, u64::MAX);
        assert_eq!(unused.guest_error(), None, "only PAE has them");
    }
}
