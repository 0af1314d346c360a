//! Registers that entries and exits leave alone: CR2, DR6 and the MSRs of SYSCALL and SWAPGS. While a vCPU is on a CPU they
//! are in that CPU's registers, which the kernel does not use; a change of vCPUs moves them.
#![allow(unsafe_code)] // Register moves that the compiler does not know.

use crate::cpu::msr;
use core::arch::asm;

/// STAR, LSTAR, CSTAR, SFMASK and KERNEL_GS_BASE, whose numbers are not all in a row.
const MSRS: [u32; 5] = [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102];

/// The registers of one vCPU.
#[derive(Debug)]
pub(super) struct Registers {
    /// The values, while the vCPU is on no CPU.
    msrs: [u64; MSRS.len()],
    cr2: u64,
    dr6: u64,
    /// The vCPU is on this CPU: the values are in the registers.
    loaded: bool,
}

impl Registers {
    /// Registers after a reset.
    pub(super) const fn new() -> Self {
        Self { msrs: [0; MSRS.len()], cr2: 0, dr6: 0xffff_0ff0, loaded: false }
    }

    /// Puts the values into this CPU's registers.
    pub(super) fn load(&mut self) {
        self.loaded = true;
        for (index, value) in MSRS.into_iter().zip(self.msrs) {
            // SAFETY: the MSRs exist on every CPU with long mode, and the kernel uses none of them. The guest's own WRMSR or
            // `set_msr` has checked the value.
            unsafe { msr::write(index, value) };
        }
        write_cr2(self.cr2);
        write_dr6(self.dr6);
    }

    /// Takes the values out of this CPU's registers.
    pub(super) fn save(&mut self) {
        for (index, value) in MSRS.into_iter().zip(&mut self.msrs) {
            // SAFETY: as in `load`.
            *value = unsafe { msr::read(index) };
        }
        (self.cr2, self.dr6) = (read_cr2(), read_dr6());
        self.loaded = false;
    }

    /// The MSR's value; None if it is not among these.
    pub(super) fn msr(&self, index: u32) -> Option<u64> {
        let at = MSRS.iter().position(|&msr| msr == index)?;
        // SAFETY: as in `load`.
        Some(if self.loaded { unsafe { msr::read(index) } } else { self.msrs[at] })
    }

    /// Sets the MSR, to a value that the caller has checked; false if it is not among these.
    pub(super) fn set_msr(&mut self, index: u32, value: u64) -> bool {
        let Some(at) = MSRS.iter().position(|&msr| msr == index) else { return false };
        if self.loaded {
            // SAFETY: as in `load`; a value that the processor refuses changes nothing.
            unsafe { msr::try_write(index, value) };
        } else {
            self.msrs[at] = value;
        }
        true
    }

    pub(super) fn cr2(&self) -> u64 {
        if self.loaded {
            read_cr2()
        } else {
            self.cr2
        }
    }

    pub(super) fn set_cr2(&mut self, value: u64) {
        if self.loaded {
            write_cr2(value);
        } else {
            self.cr2 = value;
        }
    }

    pub(super) fn dr6(&self) -> u64 {
        if self.loaded {
            read_dr6()
        } else {
            self.dr6
        }
    }

    pub(super) fn set_dr6(&mut self, value: u64) {
        if self.loaded {
            write_dr6(value);
        } else {
            self.dr6 = value;
        }
    }
}

fn read_cr2() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

fn write_cr2(value: u64) {
    // SAFETY: CR2 says something only in a page-fault handler, and the kernel's report of its own fault reads it there.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

fn read_dr6() -> u64 {
    let value;
    // SAFETY: reads a register; DR7.GD is clear in the host (SDM vol. 3, 28.5.1).
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

fn write_dr6(value: u64) {
    // SAFETY: the kernel does not use DR6. The high half, which must be zero, is dropped.
    unsafe {
        asm!("mov dr6, {}", in(reg) value & 0xffff_ffff, options(nomem, nostack, preserves_flags));
    };
}
