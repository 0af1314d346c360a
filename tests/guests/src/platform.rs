//! What the guest runs on: Umbra or a bare emulator, and which emulator executes its instructions.
//!
//! TCG departs from the architecture in a few places. They show through Umbra too, since Umbra does not emulate
//! what the processor executes; a case about one of them asks [`tcg`] and says what is wrong. Bochs departs in others,
//! nearly all of them in its SVM: the command line names it with `bochs-svm` or `bochs-vmx`, and a processor without
//! VMX-preemption timer with `no-preemption-timer`.
use crate::cpu::{cpuid, peek};
use crate::multiboot;
use crate::paging::{Space, E_P, E_RSVD, P, PLAYGROUND, W};
use crate::trap::catch;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Hypervisor leaf 0x4000_0000: EBX, ECX, EDX spell the name. Microsoft TLFS 2.4 has the convention.
pub const UMBRA_SIGNATURE: [u8; 12] = *b"UmbraUmbraUm";

/// Umbra's exit counter, an MSR of its own: the number of exits of this vCPU so far.
pub const MSR_EXIT_COUNT: u32 = 0x4000_0100;

static TCG: AtomicBool = AtomicBool::new(false);

/// The hypervisor signature, or zeros when CPUID says there is none.
pub fn signature() -> [u8; 12] {
    let mut name = [0; 12];
    if cpuid(1, 0).ecx >> 31 != 0 {
        let leaf = cpuid(0x4000_0000, 0);
        for (index, word) in [leaf.ebx, leaf.ecx, leaf.edx].into_iter().enumerate() {
            name[index * 4..][..4].copy_from_slice(&word.to_le_bytes());
        }
    }
    name
}

/// Whether Umbra is underneath.
pub fn umbra() -> bool {
    signature() == UMBRA_SIGNATURE
}

/// Whether QEMU's TCG is the whole platform, so that its CPUID, MSRs and devices answer, not Umbra's.
pub fn bare_tcg() -> bool {
    signature() == *b"TCGTCGTCGTCG"
}

/// Whether QEMU's TCG executes the instructions, with or without Umbra between.
pub fn tcg() -> bool {
    TCG.load(Relaxed)
}

/// Whether Bochs executes the instructions, under a hypervisor that uses its SVM.
pub fn bochs_svm() -> bool {
    multiboot::boot().word("bochs-svm")
}

/// Whether Bochs executes the instructions, under a hypervisor that uses its VMX.
pub fn bochs_vmx() -> bool {
    multiboot::boot().word("bochs-vmx")
}

/// Whether the processor has no VMX-preemption timer, so that a hypervisor depends on interrupts.
pub fn no_preemption_timer() -> bool {
    multiboot::boot().word("no-preemption-timer")
}

/// Whether a hypervisor translates by shadow tables: then it, and not the processor, reads the guest's own tables, and it
/// takes every write of a control register.
pub fn shadow() -> bool {
    multiboot::boot().word("shadow")
}

/// The error code of a read that meets a reserved bit: TCG leaves P out though the entry is present.
pub fn reserved_bit_error() -> u64 {
    if tcg() && !shadow() {
        E_RSVD
    } else {
        E_RSVD | E_P
    }
}

/// Finds out about TCG: by its signature, by the command line, or by its best known error.
pub fn init() {
    let found = bare_tcg() || multiboot::boot().word("tcg") || reserved_bit_fault_lacks_p();
    TCG.store(found, Relaxed);
}

/// A reserved bit in a present entry faults with P and RSVD set; TCG leaves P out.
fn reserved_bit_fault_lacks_p() -> bool {
    let space = Space::current();
    // Bit 51 is an address bit only where physical addresses have 52 bits.
    if crate::machine::physical_bits() == 52 {
        return false;
    }
    space.map(PLAYGROUND, 1 << 51, 1, P | W);
    let fault = catch(|| peek::<u8>(PLAYGROUND));
    space.set(PLAYGROUND, 1, 0);
    fault.is_err_and(|fault| fault.error & E_P == 0)
}

/// Whether a MOV to CR3 or CR4 with a reserved bit must not be tried: on QEMU 7.2's TCG the processor stops there for
/// good, without #GP. A hypervisor that intercepts the write and checks it is safe; the command line says so with
/// `cr-writes-intercepted`.
pub fn bad_cr_write_hangs() -> bool {
    tcg() && !shadow() && !multiboot::boot().word("cr-writes-intercepted")
}
