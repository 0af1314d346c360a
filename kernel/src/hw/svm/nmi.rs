//! Whether the guest's NMI handler runs, on processors without virtual NMIs: found by intercepting IRET. AMD APM
//! vol. 2, 15.21.9.
//!
//! An NMI that waits for the end of the handler is let in by stepping over that one IRET with RFLAGS.TF.
use super::vmcb::{Intercepts, Vmcb};

const RFLAGS_TF: u64 = 1 << 8;
/// DR6.BS: single step.
const DR6_BS: u64 = 1 << 14;

/// How far the current NMI handler is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum NmiBlock {
    /// No NMI handler runs.
    #[default]
    Open,
    /// An NMI was delivered and no IRET executed since.
    Blocked,
    /// The IRET at `rip` is about to execute; `step` if TF was set to stop right after it, with the guest's own
    /// TF in `guest_tf`.
    AtIret { rip: u64, step: bool, guest_tf: bool },
}

impl NmiBlock {
    /// An intercepted IRET is about to execute, which ends the handler.
    pub(super) fn at_iret(vmcb: &mut Vmcb) -> Self {
        vmcb.intercept(Intercepts::IRET, false);
        Self::AtIret { rip: vmcb.save.rip, step: false, guest_tf: false }
    }

    /// Whether an NMI has to wait.
    #[inline]
    pub(super) fn blocks(&self, vmcb: &Vmcb) -> bool {
        match *self {
            Self::Open => false,
            Self::Blocked => true,
            // The IRET has executed once RIP is elsewhere.
            Self::AtIret { rip, .. } => vmcb.save.rip == rip,
        }
    }

    /// Forgets a handler that has ended; if an NMI `waits` for that, makes sure that the guest stops right after its IRET.
    pub(super) fn prepare_entry(&mut self, vmcb: &mut Vmcb, waits: bool) {
        let Self::AtIret { rip, step, .. } = *self else { return };
        if vmcb.save.rip != rip {
            *self = Self::Open;
        } else if waits && !step {
            let rflags = vmcb.save.rflags;
            vmcb.save.rflags |= RFLAGS_TF;
            *self = Self::AtIret { rip, step: true, guest_tf: rflags & RFLAGS_TF != 0 };
        }
    }

    /// A debug exception exited. True if it was our own step over an IRET, which the guest must not see.
    pub(super) fn swallows_debug(&mut self, vmcb: &mut Vmcb) -> bool {
        let Self::AtIret { step: true, guest_tf, .. } = *self else { return false };
        *self = Self::Open;
        let dr6 = vmcb.dr6();
        if guest_tf || dr6 & 0xf != 0 {
            return false;
        }
        vmcb.set_dr6(dr6 & !DR6_BS);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::vmcb::tests::zeroed;
    use super::*;

    #[test]
    fn a_waiting_nmi_steps_over_the_iret() {
        let mut vmcb = zeroed();
        vmcb.intercept(Intercepts::IRET, true);
        vmcb.save.rip = 0x1234;
        assert!(NmiBlock::Blocked.blocks(&vmcb));
        let mut block = NmiBlock::at_iret(&mut vmcb);
        assert!(block.blocks(&vmcb) && !vmcb.intercepts().contains(Intercepts::IRET));
        block.prepare_entry(&mut vmcb, true);
        assert_eq!(vmcb.save.rflags & RFLAGS_TF, RFLAGS_TF, "one step over the IRET");
        // The IRET popped flags without TF.
        (vmcb.save.rip, vmcb.save.rflags) = (0x5678, 2);
        vmcb.set_dr6(0xffff_0ff0 | DR6_BS);
        assert!(block.swallows_debug(&mut vmcb));
        assert_eq!(vmcb.dr6(), 0xffff_0ff0);
        assert!(!block.blocks(&vmcb));
    }

    #[test]
    fn an_iret_without_a_waiting_nmi_needs_no_step() {
        let mut vmcb = zeroed();
        let mut block = NmiBlock::at_iret(&mut vmcb);
        block.prepare_entry(&mut vmcb, false);
        assert_eq!(vmcb.save.rflags & RFLAGS_TF, 0);
        vmcb.save.rip += 2;
        assert!(!block.blocks(&vmcb), "also before the next entry, so that an NMI wakes a CPU that halted");
        block.prepare_entry(&mut vmcb, true);
        assert_eq!((block, vmcb.save.rflags & RFLAGS_TF), (NmiBlock::Open, 0));
    }

    #[test]
    fn a_guest_that_steps_itself_sees_its_own_trap() {
        let mut vmcb = zeroed();
        vmcb.save.rflags = RFLAGS_TF;
        let mut block = NmiBlock::at_iret(&mut vmcb);
        block.prepare_entry(&mut vmcb, true);
        assert!(!block.swallows_debug(&mut vmcb));
        assert_eq!(block, NmiBlock::Open);
    }

    #[test]
    fn a_breakpoint_on_the_iret_is_the_guests() {
        let mut vmcb = zeroed();
        let mut block = NmiBlock::at_iret(&mut vmcb);
        block.prepare_entry(&mut vmcb, true);
        vmcb.set_dr6(0xffff_0ff0 | DR6_BS | 1);
        assert!(!block.swallows_debug(&mut vmcb));
    }
}
