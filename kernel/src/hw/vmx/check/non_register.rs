//! Rules for the guest's non-register state: activity, interruptibility, pending debug exceptions, link
//! pointer. SDM vol. 3, 27.3.1.5.
use super::broken;
use super::state::{GuestState, PENDING_BS, RFLAGS_IF, RFLAGS_TF, SS};
use crate::hw::vmx::capabilities::VmxCapabilities;
use crate::hw::vmx::controls::{Activity, Interruptibility};
use crate::hw::vmx::event::{TYPE_EXCEPTION, TYPE_INTERRUPT, TYPE_NMI, TYPE_OTHER, TYPE_SHIFT, VALID};

/// The first broken rule.
pub(super) fn error(state: &GuestState, capabilities: &VmxCapabilities) -> Option<&'static str> {
    activity(state, capabilities)
        .or_else(|| interruptibility(state))
        .or_else(|| pending_debug(state))
        .or_else(|| link_pointer(state, capabilities))
}

/// Type of the event that the entry delivers.
fn injected_type(state: &GuestState) -> Option<u32> {
    (state.injection & VALID != 0).then_some(state.injection >> TYPE_SHIFT & 7)
}

fn is_in_shadow(state: &GuestState) -> bool {
    Interruptibility::from_bits_retain(state.interruptibility)
        .intersects(Interruptibility::STI | Interruptibility::MOV_SS)
}

fn activity(state: &GuestState, capabilities: &VmxCapabilities) -> Option<&'static str> {
    broken! {
        !capabilities.has_activity(state.activity) =>
            "guest activity state: one that the CPU does not support (27.3.1.5)";
        state.activity == Activity::Hlt as u32 && state.segments[SS].dpl() != 0 =>
            "guest activity state: HLT needs CPL 0 (27.3.1.5)";
        state.activity != Activity::Active as u32 && is_in_shadow(state) =>
            "guest activity state: must be active in the shadow of STI or MOV SS (27.3.1.5)";
        injected_type(state).is_some_and(|kind| !can_deliver(state, kind)) =>
            "guest activity state: the injected event cannot be delivered in it (27.3.1.5)";
    }
    None
}

/// Whether an event of that type may be injected into the activity state.
fn can_deliver(state: &GuestState, kind: u32) -> bool {
    const DEBUG: u8 = 1;
    const MACHINE_CHECK: u8 = 18;
    let vector = state.injection as u8;
    match Activity::from_field(state.activity) {
        Some(Activity::Active) | None => true,
        Some(Activity::Hlt) => match kind {
            TYPE_INTERRUPT | TYPE_NMI | TYPE_OTHER => true,
            TYPE_EXCEPTION => matches!(vector, DEBUG | MACHINE_CHECK),
            _ => false,
        },
        Some(Activity::Shutdown) => kind == TYPE_NMI || kind == TYPE_EXCEPTION && vector == MACHINE_CHECK,
        Some(Activity::WaitForSipi) => false,
    }
}

fn interruptibility(state: &GuestState) -> Option<&'static str> {
    let blocking = Interruptibility::from_bits_retain(state.interruptibility);
    let injected = injected_type(state);
    broken! {
        !Interruptibility::all().contains(blocking) =>
            "guest interruptibility: bits 31:5 must be 0 (27.3.1.5)";
        blocking.contains(Interruptibility::STI | Interruptibility::MOV_SS) =>
            "guest interruptibility: the shadows of STI and MOV SS exclude each other (27.3.1.5)";
        blocking.contains(Interruptibility::STI) && state.rflags & RFLAGS_IF == 0 =>
            "guest interruptibility: the shadow of STI needs RFLAGS.IF (27.3.1.5)";
        injected == Some(TYPE_INTERRUPT) && is_in_shadow(state) =>
            "guest interruptibility: no external interrupt can be injected in a shadow (27.3.1.5)";
        injected == Some(TYPE_NMI) && blocking.contains(Interruptibility::MOV_SS) =>
            "guest interruptibility: no NMI can be injected in the shadow of MOV SS (27.3.1.5)";
        blocking.contains(Interruptibility::SMI) =>
            "guest interruptibility: SMIs cannot be blocked outside SMM (27.3.1.5)";
        injected == Some(TYPE_NMI) && state.virtual_nmis && blocking.contains(Interruptibility::NMI) =>
            "guest interruptibility: no virtual NMI can be injected while they are blocked (27.3.1.5)";
        blocking.contains(Interruptibility::ENCLAVE | Interruptibility::MOV_SS) =>
            "guest interruptibility: no shadow of MOV SS can follow an enclave (27.3.1.5)";
    }
    None
}

fn pending_debug(state: &GuestState) -> Option<&'static str> {
    /// Bits 10:4, 13, 15 and 63:17; bit 11 is that of bus locks on newer CPUs.
    const RESERVED: u64 = u64::MAX << 17 | 1 << 15 | 1 << 13 | 0x7f0;
    /// A breakpoint was enabled and met.
    const ENABLED_BREAKPOINT: u64 = 1 << 12;
    /// A debug exception in a transactional region.
    const RTM: u64 = 1 << 16;
    /// What may not go with RTM: all but it and the enabled breakpoint.
    const NOT_WITH_RTM: u64 = !(RTM | ENABLED_BREAKPOINT);
    /// IA32_DEBUGCTL.BTF: single-stepping on branches.
    const BTF: u64 = 1 << 1;
    let pending = state.pending_debug;
    let branches_only = state.debug.is_some_and(|(_, debugctl)| debugctl & BTF != 0);
    let steps = state.rflags & RFLAGS_TF != 0 && !branches_only;
    let held = is_in_shadow(state) || state.activity == Activity::Hlt as u32;
    let mov_ss = state.interruptibility & Interruptibility::MOV_SS.bits() != 0;
    broken! {
        pending & RESERVED != 0 => "guest pending debug exceptions: a reserved bit is 1 (27.3.1.5)";
        held && steps && pending & PENDING_BS == 0 =>
            "guest pending debug exceptions: BS must be 1 in a shadow or HLT while TF single-steps (27.3.1.5)";
        held && !steps && pending & PENDING_BS != 0 =>
            "guest pending debug exceptions: BS must be 0 in a shadow or HLT without single step (27.3.1.5)";
        pending & RTM != 0 && (pending & NOT_WITH_RTM != 0 || pending & ENABLED_BREAKPOINT == 0 || mov_ss) =>
            "guest pending debug exceptions: RTM excludes the others and the shadow of MOV SS (27.3.1.5)";
    }
    None
}

fn link_pointer(state: &GuestState, capabilities: &VmxCapabilities) -> Option<&'static str> {
    broken! {
        state.link_pointer != u64::MAX && !capabilities.is_address(state.link_pointer, 12) =>
            "VMCS link pointer: neither all ones nor the address of a page (27.3.1.5)";
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::sample::{capabilities, compatibility_mode, expect, long_mode, Table};
    use super::super::{guest_state_error, GuestState};
    use super::*;
    use crate::hw::vmx::vmcs;
    use crate::hw::CpuState;

    fn inject(table: &mut Table, info: u32) {
        table.set(vmcs::ENTRY_INTERRUPTION, info);
        table.or(vmcs::GUEST_RFLAGS, RFLAGS_IF);
    }

    #[test]
    fn activity_states() {
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[
                ("guest activity state: one that", |t| t.set(vmcs::GUEST_ACTIVITY, 4u32)),
                ("guest activity state: must be active", |t| {
                    t.set(vmcs::GUEST_ACTIVITY, 1u32);
                    t.set(vmcs::GUEST_INTERRUPTIBILITY, 2u32);
                }),
                ("guest activity state: the injected", |t| {
                    t.set(vmcs::GUEST_ACTIVITY, 1u32);
                    inject(t, 0x8000_0306);
                }),
                ("guest activity state: the injected", |t| {
                    t.set(vmcs::GUEST_ACTIVITY, 1u32);
                    inject(t, 0x8000_0480);
                }),
                ("guest activity state: the injected", |t| {
                    t.set(vmcs::GUEST_ACTIVITY, 2u32);
                    inject(t, 0x8000_0020);
                }),
                ("guest activity state: the injected", |t| {
                    t.set(vmcs::GUEST_ACTIVITY, 3u32);
                    inject(t, 0x8000_0202);
                }),
            ],
        );
        expect(
            &Table::of(&compatibility_mode(), true),
            Table::guest_error,
            &[("guest activity state: HLT needs", |t| t.set(vmcs::GUEST_ACTIVITY, 1u32))],
        );
    }

    #[test]
    fn events_that_wake_a_halted_guest() {
        for (activity, events) in [
            (1u32, &[0x8000_0020u32, 0x8000_0202, 0x8000_0301, 0x8000_0312, 0x8000_0700][..]),
            (2, &[0x8000_0202, 0x8000_0312][..]),
        ] {
            for &event in events {
                let mut table = Table::long_mode();
                table.set(vmcs::GUEST_ACTIVITY, activity);
                inject(&mut table, event);
                assert_eq!(table.guest_error(), None, "{event:#x}");
            }
        }
    }

    #[test]
    fn interruptibility_states() {
        let mut valid = Table::long_mode();
        valid.or(vmcs::GUEST_RFLAGS, RFLAGS_IF);
        expect(
            &valid,
            Table::guest_error,
            &[
                ("guest interruptibility: bits 31:5", |t| t.set(vmcs::GUEST_INTERRUPTIBILITY, 0x20u32)),
                ("guest interruptibility: the shadows", |t| t.set(vmcs::GUEST_INTERRUPTIBILITY, 3u32)),
                ("guest interruptibility: the shadow of STI", |t| {
                    t.set(vmcs::GUEST_INTERRUPTIBILITY, 1u32);
                    t.clear(vmcs::GUEST_RFLAGS, RFLAGS_IF);
                }),
                ("guest interruptibility: no external", |t| {
                    t.set(vmcs::GUEST_INTERRUPTIBILITY, 1u32);
                    inject(t, 0x8000_0020);
                }),
                ("guest interruptibility: no external", |t| {
                    t.set(vmcs::GUEST_INTERRUPTIBILITY, 2u32);
                    inject(t, 0x8000_0020);
                }),
                ("guest interruptibility: no NMI", |t| {
                    t.set(vmcs::GUEST_INTERRUPTIBILITY, 2u32);
                    inject(t, 0x8000_0202);
                }),
                ("guest interruptibility: SMIs", |t| t.set(vmcs::GUEST_INTERRUPTIBILITY, 4u32)),
                ("guest interruptibility: no virtual NMI", |t| {
                    t.set(vmcs::GUEST_INTERRUPTIBILITY, 8u32);
                    inject(t, 0x8000_0202);
                }),
                ("guest interruptibility: no shadow", |t| t.set(vmcs::GUEST_INTERRUPTIBILITY, 0x12u32)),
            ],
        );
        for blocking in [1u32, 2, 8, 9, 0x10] {
            valid.set(vmcs::GUEST_INTERRUPTIBILITY, blocking);
            assert_eq!(valid.guest_error(), None, "{blocking}");
        }
    }

    #[test]
    fn pending_debug_exceptions() {
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[
                ("guest pending debug exceptions: a reserved", |t| t.set(vmcs::GUEST_PENDING_DEBUG, 0x10u64)),
                ("guest pending debug exceptions: a reserved", |t| {
                    t.set(vmcs::GUEST_PENDING_DEBUG, 1u64 << 17)
                }),
                ("guest pending debug exceptions: BS must be 1", |t| {
                    t.or(vmcs::GUEST_RFLAGS, RFLAGS_TF);
                    t.set(vmcs::GUEST_INTERRUPTIBILITY, 2u32);
                }),
                ("guest pending debug exceptions: BS must be 0", |t| {
                    t.set(vmcs::GUEST_PENDING_DEBUG, PENDING_BS);
                    t.set(vmcs::GUEST_ACTIVITY, 1u32);
                }),
                ("guest pending debug exceptions: BS must be 0", |t| {
                    t.or(vmcs::GUEST_RFLAGS, RFLAGS_TF);
                    t.set(vmcs::GUEST_DEBUGCTL, 2u64);
                    t.set(vmcs::GUEST_PENDING_DEBUG, PENDING_BS);
                    t.set(vmcs::GUEST_INTERRUPTIBILITY, 2u32);
                }),
                ("guest pending debug exceptions: RTM", |t| t.set(vmcs::GUEST_PENDING_DEBUG, 1u64 << 16)),
                ("guest pending debug exceptions: RTM", |t| {
                    t.set(vmcs::GUEST_PENDING_DEBUG, 1u64 << 16 | 1 << 12);
                    t.set(vmcs::GUEST_INTERRUPTIBILITY, 2u32);
                }),
            ],
        );
        let mut table = Table::long_mode();
        for pending in [PENDING_BS, 1u64 << 16 | 1 << 12, 0x100f] {
            table.set(vmcs::GUEST_PENDING_DEBUG, pending);
            assert_eq!(table.guest_error(), None, "{pending:#x}");
        }
    }

    #[test]
    fn a_guest_that_single_steps_in_a_shadow_can_be_entered() {
        let state = CpuState { rflags: 2 | RFLAGS_TF | RFLAGS_IF, ..long_mode() };
        for (blocking, activity) in [
            (Interruptibility::empty(), Activity::Active),
            (Interruptibility::STI, Activity::Active),
            (Interruptibility::MOV_SS, Activity::Active),
            (Interruptibility::empty(), Activity::Hlt),
        ] {
            let plain = GuestState::of_guest(&state, &capabilities(), blocking, activity);
            assert_eq!(guest_state_error(&plain, &capabilities(), false), None);
        }
    }

    #[test]
    fn link_pointers() {
        expect(
            &Table::long_mode(),
            Table::guest_error,
            &[
                ("VMCS link pointer", |t| t.set(vmcs::VMCS_LINK_POINTER, 1u64)),
                ("VMCS link pointer", |t| t.set(vmcs::VMCS_LINK_POINTER, 1u64 << 39)),
            ],
        );
    }
}
