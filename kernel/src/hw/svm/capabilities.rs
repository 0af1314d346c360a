//! What a CPU's SVM offers, what of it Umbra uses, and whether firmware lets it be turned on. Pure.

use crate::cpu::features::Svm;
use crate::hw::{Capabilities, Capability};

/// VM_CR: LOCK, which makes itself and the next one read-only. APM vol. 2, 15.30.1.
const LOCK: u64 = 1 << 3;
/// VM_CR: SVMDIS, with which EFER.SVME cannot be set.
const SVMDIS: u64 = 1 << 4;

/// Whether SVM can be turned on, by the MSR VM_CR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmCr {
    /// It can.
    Usable,
    /// It can after this value was written.
    MustWrite(u64),
    /// Firmware has locked it off.
    LockedOff,
}

/// What the value of VM_CR allows.
pub fn vm_cr(value: u64) -> VmCr {
    match (value & SVMDIS != 0, value & LOCK != 0) {
        (false, _) => VmCr::Usable,
        (true, false) => VmCr::MustWrite(value & !SVMDIS),
        (true, true) => VmCr::LockedOff,
    }
}

/// The capabilities by name.
pub fn list(svm: &Svm) -> Capabilities {
    let pause_filter = svm.pause_filter && svm.pause_filter_threshold;
    Capabilities::from_iter([
        ("npt", Capability::used(svm.npt)),
        ("nrips", Capability::used(svm.nrips)),
        ("flush-by-asid", Capability::used(svm.flush_by_asid)),
        ("clean-bits", Capability::used(svm.vmcb_clean)),
        ("decode-assists", Capability::used(svm.decode_assists)),
        ("pause-filter", Capability::used(pause_filter)),
        ("tsc-scaling", Capability::unused(svm.tsc_rate_msr)),
        ("avic", Capability::unused(svm.avic)),
        ("vgif", Capability::unused(svm.vgif)),
        ("virtual-vmsave", Capability::unused(svm.vmsave_virtualization)),
        ("lbr-virtualization", Capability::unused(svm.lbr)),
        ("spec-ctrl", Capability::unused(svm.spec_ctrl)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn svm_is_off_only_where_it_is_locked() {
        assert_eq!(vm_cr(0), VmCr::Usable);
        assert_eq!(vm_cr(LOCK), VmCr::Usable);
        assert_eq!(vm_cr(SVMDIS | 2), VmCr::MustWrite(2));
        assert_eq!(vm_cr(SVMDIS | LOCK), VmCr::LockedOff);
    }

    #[test]
    fn capabilities_are_listed_by_what_becomes_of_them() {
        let svm = Svm { npt: true, vgif: true, pause_filter: true, ..Svm::default() };
        let list = list(&svm);
        let of = |name| list.iter().find(|(other, _)| *other == name).unwrap().1;
        assert_eq!(
            [of("npt"), of("vgif"), of("nrips"), of("pause-filter")],
            [Capability::Used, Capability::Unused, Capability::Missing, Capability::Missing]
        );
    }
}
