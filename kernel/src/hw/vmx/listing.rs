//! The capabilities of a CPU's VMX by name, and what of them Umbra uses. Pure.

use super::capabilities::{EptVpid, VmxCapabilities};
use super::choice::Controls;
use super::controls::{Pin, Primary, Secondary};
use crate::hw::{Capabilities, Capability};

/// The capabilities by name, where guests run with `controls`; `accessed_dirty` says whether EPT keeps those flags.
pub fn list(vmx: &VmxCapabilities, controls: &Controls, accessed_dirty: bool) -> Capabilities {
    let ept = vmx.ept_vpid;
    let secondary = |control: Secondary| {
        let may = vmx.secondary >> 32 & u64::from(control.bits()) != 0;
        Capability::of(may, (controls.secondary | controls.offered).contains(control))
    };
    let pin = |control: Pin, used| Capability::of(vmx.pin >> 32 & u64::from(control.bits()) != 0, used);
    let tpr_shadow = vmx.primary >> 32 & u64::from(Primary::TPR_SHADOW.bits()) != 0;
    // The log of modified pages is offered and waits for someone who wants it.
    let log = vmx.secondary >> 32 & u64::from(Secondary::PAGE_MODIFICATION_LOG.bits()) != 0;
    Capabilities::from_iter([
        ("ept", secondary(Secondary::EPT)),
        ("ept-accessed-dirty", Capability::of(ept.contains(EptVpid::ACCESSED_DIRTY), accessed_dirty)),
        ("ept-1g", Capability::used(ept.contains(EptVpid::PAGES_1G))),
        ("ept-execute-only", Capability::used(ept.contains(EptVpid::EXECUTE_ONLY))),
        ("vpid", secondary(Secondary::VPID)),
        ("unrestricted-guest", secondary(Secondary::UNRESTRICTED_GUEST)),
        ("tpr-shadow", Capability::of(tpr_shadow, controls.primary.contains(Primary::TPR_SHADOW))),
        ("apic-registers", secondary(Secondary::APIC_REGISTER_VIRTUALIZATION)),
        ("virtual-interrupts", secondary(Secondary::VIRTUAL_INTERRUPT_DELIVERY)),
        ("virtual-nmis", pin(Pin::VIRTUAL_NMIS, controls.pin.contains(Pin::VIRTUAL_NMIS))),
        ("preemption-timer", pin(Pin::PREEMPTION_TIMER, controls.preemption_timer)),
        ("posted-interrupts", pin(Pin::POSTED_INTERRUPTS, false)),
        ("mode-based-execute", secondary(Secondary::MODE_BASED_EXECUTE)),
        ("page-modification-log", Capability::unused(log)),
        ("tsc-scaling", secondary(Secondary::TSC_SCALING)),
        ("pause-loop", secondary(Secondary::PAUSE_LOOP_EXITING)),
        ("vmcs-shadowing", secondary(Secondary::VMCS_SHADOWING)),
    ])
}

#[cfg(test)]
mod tests {
    use super::super::capabilities::samples::{cpu, NEHALEM, SKYLAKE};
    use super::super::choice::{examine, Mode};
    use super::*;

    #[test]
    fn real_cpus_are_told_apart() {
        let of = |registers: &[u64; 18], name: &str| {
            let vmx = cpu(registers);
            let controls = examine(&vmx, Mode::Unrestricted).unwrap();
            let list = list(&vmx, &controls, vmx.ept_vpid.contains(EptVpid::ACCESSED_DIRTY));
            list.iter().find(|(other, _)| *other == name).unwrap().1
        };
        assert_eq!(of(&SKYLAKE, "ept"), Capability::Used);
        assert_eq!(of(&SKYLAKE, "ept-accessed-dirty"), Capability::Used);
        assert_eq!(of(&SKYLAKE, "vmcs-shadowing"), Capability::Unused);
        assert_eq!(of(&NEHALEM, "ept-accessed-dirty"), Capability::Missing);
        assert_eq!(of(&NEHALEM, "unrestricted-guest"), Capability::Missing);
    }
}
