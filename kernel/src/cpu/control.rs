//! Control registers: the same on every CPU, set before anything else runs on it.
// Control registers decide what every memory access means.
#![allow(unsafe_code)]

use super::features::Features;
use super::msr;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags, Efer, EferFlags};

/// The PAT after reset (AMD APM vol. 2 section 7.8.2): WB, WT, UC-, UC, and again, but write-combining in entry 5. Page
/// tables count on entries 0, 3 and 5, nested page tables (which have no entries from 4 on) on 0, 1 and 3.
const PAT: u64 = 0x0007_0106_0007_0406;

/// Sets this CPU's control registers for Umbra: write protection and no-execute on, the protections that the
/// processor has, and the FPU usable, since guests' registers are saved with it.
pub fn init(features: &Features) {
    let mut cr4 = Cr4::read();
    for (has, flag) in [
        (features.pge, Cr4Flags::PAGE_GLOBAL),
        (features.mce, Cr4Flags::MACHINE_CHECK_EXCEPTION),
        (features.smep, Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION),
        (features.smap, Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION),
        (features.umip, Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION),
        (features.fxsr, Cr4Flags::OSFXSR | Cr4Flags::OSXMMEXCPT_ENABLE),
        (features.xsave.is_some(), Cr4Flags::OSXSAVE),
        // For RDPKRU and for XSAVE of guests' PKRU; Umbra itself has no user pages.
        (features.pku, Cr4Flags::PROTECTION_KEY_USER),
    ] {
        cr4.set(flag, has);
    }
    let mut cr0 = Cr0::read();
    cr0.insert(Cr0Flags::WRITE_PROTECT | Cr0Flags::NUMERIC_ERROR | Cr0Flags::MONITOR_COPROCESSOR);
    cr0.remove(
        Cr0Flags::EMULATE_COPROCESSOR
            | Cr0Flags::TASK_SWITCHED
            | Cr0Flags::ALIGNMENT_MASK
            | Cr0Flags::NOT_WRITE_THROUGH
            | Cr0Flags::CACHE_DISABLE,
    );
    // SAFETY: no bit changes how the addresses in use are translated, the image's text stays readable and
    // executable to the supervisor, and NX is set in no table yet unless the processor has it.
    unsafe {
        Cr4::write(cr4);
        Cr0::write(cr0);
        if features.nx {
            Efer::update(|efer| efer.insert(EferFlags::NO_EXECUTE_ENABLE));
        }
        if features.pat {
            msr::write(msr::PAT, PAT);
        }
        if features.xsave.is_some_and(|xsave| xsave.xsaves) {
            // Guests have no supervisor states, and nothing switches the register.
            msr::write(msr::XSS, 0);
        }
    }
}
