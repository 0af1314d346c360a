//! Guest state that neither VMRUN nor VM entry switches: x87, SSE, AVX and the rest of XSAVE's components
//! (PKRU among them), XCR0, IA32_PKRS, DR0 to DR3, TSC_AUX. It stays in the registers across exits, for the kernel uses none
//! of it, and is switched eagerly when another vCPU gets the CPU. (Lazy switching leaks between guests.)
#![allow(unsafe_code)] // Saving and restoring processor state is what this module is for.

use super::{cr4, OutOfMemory};
use crate::cpu::features::Features;
use crate::mm::{self, FrameSize, Zone};
use crate::vm::msr::index::PKRS;
use core::arch::asm;
use x86_64::registers::model_specific::Msr;
use x86_64::PhysAddr;

/// IA32_TSC_AUX, read by RDTSCP and RDPID.
const MSR_TSC_AUX: u32 = 0xc000_0103;
/// Offset of MXCSR in the legacy region of the save area, and its value after reset (SDM vol. 1, 10.5.1.2).
const MXCSR_OFFSET: usize = 24;
const MXCSR_RESET: u32 = 0x1f80;
/// What the x87 unit loads to forget its pointers.
static ZERO: u32 = 0;
/// Offset of FCW and its value after reset.
const FCW_RESET: u16 = 0x40;

/// XCR0 bits and the save area's size, as this machine has them.
#[derive(Clone, Copy, Debug)]
pub struct XsaveFacts {
    /// All components that XCR0 can enable here; 0 without XSAVE.
    pub components: u64,
    /// Size in bytes of an area for all of them.
    area_bytes: u32,
    /// RDTSCP, and so TSC_AUX, exists.
    pub tsc_aux: bool,
    /// Protection keys of supervisor pages, and so IA32_PKRS, exist.
    pks: bool,
    /// FXRSTOR and XRSTOR leave the last x87 instruction's pointers as they are unless an exception is pending
    /// (CVE-2006-1056): AMD CPUs without CPUID 8000_0008h EBX[2].
    leaks_x87_pointers: bool,
}

impl XsaveFacts {
    /// Takes them from CPUID.
    pub fn detect(features: &Features) -> Self {
        let (components, area_bytes) =
            features.xsave.map_or((0, 512), |xsave| (xsave.xcr0, xsave.area_bytes));
        let amd = matches!(features.vendor.as_str(), "AuthenticAMD" | "HygonGenuine");
        let restores_pointers = core::arch::x86_64::__cpuid(0x8000_0008).ebx & 1 << 2 != 0;
        Self {
            components,
            area_bytes,
            tsc_aux: features.rdtscp,
            pks: cr4::of_this_cpu() & cr4::PKS != 0,
            leaks_x87_pointers: amd && !restores_pointers,
        }
    }
}

/// The switched state of one vCPU while it is not on a CPU, and what XCR0 it has while it is.
#[derive(Debug)]
pub struct ExtendedState {
    area: PhysAddr,
    size: FrameSize,
    facts: XsaveFacts,
    xcr0: u64,
    debug: [u64; 4],
    tsc_aux: u64,
    pkrs: u32,
}

impl ExtendedState {
    /// State as after reset.
    pub fn new(facts: XsaveFacts) -> Result<Self, OutOfMemory> {
        // AMX alone makes the area larger than a page.
        let size = if facts.area_bytes > 4096 { FrameSize::Size2M } else { FrameSize::Size4K };
        let area = mm::alloc(size, Zone::Any).ok_or(OutOfMemory)?;
        let mut state = Self { area, size, facts, xcr0: 1, debug: [0; 4], tsc_aux: 0, pkrs: 0 };
        state.reset();
        Ok(state)
    }

    /// Returns to the state after power-up. The vCPU must not be on a CPU.
    pub fn reset(&mut self) {
        (self.xcr0, self.debug, self.tsc_aux, self.pkrs) = (1, [0; 4], 0, 0);
        // SAFETY: the area is ours. XRSTOR takes zeroed components as their initial state, but loads MXCSR from
        // memory; FXRSTOR also takes FCW from there.
        unsafe {
            mm::phys::zero(self.area, self.size.bytes());
            let area = mm::phys_to_virt(self.area);
            area.cast::<u16>().write(FCW_RESET);
            area.add(MXCSR_OFFSET).cast::<u32>().write(MXCSR_RESET);
        }
    }

    /// Clears DR0 to DR3 of the vCPU that is on this CPU, as INIT does.
    pub fn clear_breakpoints(&mut self) {
        self.debug = [0; 4];
        // SAFETY: registers that the kernel does not use.
        unsafe {
            asm!("mov dr0, {0}", "mov dr1, {0}", "mov dr2, {0}", "mov dr3, {0}", in(reg) 0u64,
                 options(nomem, nostack));
        }
    }

    /// XCR0 of the vCPU that is on this CPU. Read from the register: QEMU's TCG lets a guest set it without the exit
    /// that was asked for.
    pub fn xcr0(&self) -> u64 {
        if self.facts.components == 0 {
            return self.xcr0;
        }
        // SAFETY: with XSAVE, CR4.OSXSAVE is set here.
        unsafe { xgetbv() }
    }

    /// Sets XCR0 of the vCPU that is on this CPU; the caller has checked the value against the CPU's components.
    pub fn set_xcr0(&mut self, value: u64) {
        self.xcr0 = value;
        // SAFETY: the caller offers only components that exist, and consistent ones.
        unsafe { xsetbv(value) };
    }

    /// TSC_AUX of the guest.
    pub fn tsc_aux(&self) -> u64 {
        self.tsc_aux
    }

    /// Sets TSC_AUX of the vCPU that is on this CPU.
    pub fn set_tsc_aux(&mut self, value: u64) {
        self.tsc_aux = value;
        if self.facts.tsc_aux {
            // SAFETY: the MSR exists; the kernel does not use it.
            unsafe { Msr::new(MSR_TSC_AUX).write(value & 0xffff_ffff) };
        }
    }

    /// IA32_PKRS of the vCPU that is on this CPU, if the CPU has it. A guest reads and writes it without an exit; this is
    /// for instructions that are emulated.
    #[cold]
    pub fn pkrs(&self) -> Option<u32> {
        self.facts.pks.then(pkrs)
    }

    /// Sets IA32_PKRS of the vCPU that is on this CPU; false if the CPU has none.
    #[cold]
    pub fn set_pkrs(&mut self, value: u32) -> bool {
        if self.facts.pks {
            // SAFETY: the MSR exists and takes any 32 bits; with CR4.PKS clear, as in the host, it has no effect.
            unsafe { Msr::new(PKRS).write(value.into()) };
        }
        self.facts.pks
    }

    /// Puts this vCPU's state into the registers. Interrupts are off, and the state of the vCPU that was on this
    /// CPU before has been saved.
    pub fn load(&self) {
        let area = mm::phys_to_virt(self.area);
        // SAFETY: the area was written by `reset` or `save` with the same components enabled, so XRSTOR's checks
        // pass; nothing in the kernel lives in this state.
        unsafe {
            if self.facts.leaks_x87_pointers {
                // An x87 load of Umbra's own takes the place of the other vCPU's last instruction.
                asm!("fnclex", "emms", "fild dword ptr [{}]", in(reg) &raw const ZERO, options(nostack, readonly));
            }
            if self.facts.components == 0 {
                asm!("fxrstor64 [{}]", in(reg) area, options(nostack, readonly));
            } else {
                xsetbv(self.facts.components);
                asm!("xrstor64 [{}]", in(reg) area, in("eax") self.facts.components as u32,
                     in("edx") (self.facts.components >> 32) as u32, options(nostack, readonly));
                xsetbv(self.xcr0);
            }
            let [dr0, dr1, dr2, dr3] = self.debug;
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
                 in(reg) dr0, in(reg) dr1, in(reg) dr2, in(reg) dr3, options(nomem, nostack));
            if self.facts.tsc_aux {
                Msr::new(MSR_TSC_AUX).write(self.tsc_aux & 0xffff_ffff);
            }
            if self.facts.pks {
                Msr::new(PKRS).write(self.pkrs.into());
            }
        }
    }

    /// Takes the state of the vCPU that is on this CPU out of the registers.
    pub fn save(&mut self) {
        let area = mm::phys_to_virt(self.area);
        // SAFETY: the area is ours, 64-byte aligned and large enough for all components.
        unsafe {
            if self.facts.components == 0 {
                asm!("fxsave64 [{}]", in(reg) area, options(nostack));
            } else {
                self.xcr0 = xgetbv();
                xsetbv(self.facts.components);
                asm!("xsave64 [{}]", in(reg) area, in("eax") self.facts.components as u32,
                     in("edx") (self.facts.components >> 32) as u32, options(nostack));
            }
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
                 out(reg) self.debug[0], out(reg) self.debug[1], out(reg) self.debug[2], out(reg) self.debug[3],
                 options(nomem, nostack));
        }
        if self.facts.pks {
            self.pkrs = pkrs();
        }
    }
}

impl Drop for ExtendedState {
    fn drop(&mut self) {
        mm::free(self.area, self.size);
    }
}

/// Reads XCR0.
///
/// # Safety
/// CR4.OSXSAVE is set.
unsafe fn xgetbv() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller's promise.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes XCR0.
///
/// # Safety
/// CR4.OSXSAVE is set and `value` enables only components that this CPU has, in a combination that it allows.
unsafe fn xsetbv(value: u64) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32,
             options(nomem, nostack, preserves_flags));
    }
}

/// DR0 to DR3 of the vCPU that is on this CPU.
pub fn breakpoint_addresses() -> [u64; 4] {
    let (dr0, dr1, dr2, dr3);
    // SAFETY: reads of registers that the kernel does not use.
    unsafe {
        asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
             out(reg) dr0, out(reg) dr1, out(reg) dr2, out(reg) dr3, options(nomem, nostack));
    }
    [dr0, dr1, dr2, dr3]
}

/// Sets DR0 to DR3 (`index`) of the vCPU that is on this CPU.
pub fn set_breakpoint_address(index: u8, address: u64) {
    // SAFETY: writes of registers that the kernel does not use; the host's DR7 enables none of them.
    unsafe {
        match index & 3 {
            0 => asm!("mov dr0, {}", in(reg) address, options(nomem, nostack)),
            1 => asm!("mov dr1, {}", in(reg) address, options(nomem, nostack)),
            2 => asm!("mov dr2, {}", in(reg) address, options(nomem, nostack)),
            _ => asm!("mov dr3, {}", in(reg) address, options(nomem, nostack)),
        }
    }
}

/// PKRU of the vCPU that is on this CPU. Only for CPUs with protection keys, where Umbra keeps CR4.PKE set: it has
/// no user pages that PKRU could restrict.
#[inline]
pub fn pkru() -> u32 {
    let value: u32;
    // SAFETY: CR4.PKE is set, so RDPKRU exists; it reads a register.
    unsafe {
        asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _, options(nomem, nostack, preserves_flags));
    }
    value
}

/// IA32_PKRS of the vCPU that is on this CPU. Only for CPUs with protection keys of supervisor pages; Umbra itself keeps
/// CR4.PKS clear, so that the value is the guest's alone. Intel SDM vol. 4, table 2-2.
pub fn pkrs() -> u32 {
    // SAFETY: the MSR exists, and reading it has no effect.
    unsafe { Msr::new(PKRS).read() as u32 }
}

/// Status word: an unmasked exception is pending.
const X87_PENDING: u16 = 1 << 7;

/// The part of an FXSAVE image that is looked at here: all of it, with the control word first (SDM vol. 1, 10.5.1).
#[repr(C, align(16))]
struct FxsaveImage {
    control: u16,
    rest: [u8; 510],
}
const _: () = assert!(size_of::<FxsaveImage>() == 512);

/// FNINIT on the vCPU that is on this CPU.
pub fn x87_initialize() {
    // SAFETY: the kernel uses no x87 state, and its CR0 has EM and TS clear. The instruction does not wait for a
    // pending exception.
    unsafe { asm!("fninit", options(nomem, nostack)) };
}

/// FNCLEX on the vCPU that is on this CPU.
pub fn x87_clear_exceptions() {
    // SAFETY: as in `x87_initialize`.
    unsafe { asm!("fnclex", options(nomem, nostack)) };
}

/// The x87 status word of the vCPU that is on this CPU.
pub fn x87_status() -> u16 {
    let status: u16;
    // SAFETY: as in `x87_initialize`; reads only.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    status
}

/// The x87 control word of the vCPU that is on this CPU.
pub fn x87_control() -> u16 {
    let mut control: u16 = 0;
    // SAFETY: as in `x87_initialize`; writes two bytes that are ours.
    unsafe { asm!("fnstcw [{}]", in(reg) &raw mut control, options(nostack, preserves_flags)) };
    control
}

/// Loads the x87 control word of the vCPU that is on this CPU. An exception of the guest's that is pending, or that
/// becomes so by this, stays pending.
pub fn x87_load_control(control: u16) {
    if x87_status() & X87_PENDING == 0 {
        // SAFETY: nothing is pending, so FLDCW raises nothing; what it unmasks is for the next x87 instruction.
        unsafe { asm!("fldcw [{}]", in(reg) &raw const control, options(nostack, readonly)) };
        return;
    }
    let mut image = FxsaveImage { control: 0, rest: [0; 510] };
    // SAFETY: FXSAVE and FXRSTOR take no pending exception and move all of the unit's state while one is pending.
    // The image is ours, aligned and large enough, and goes back as it came but for the control word.
    unsafe {
        asm!("fxsave64 [{}]", in(reg) &raw mut image, options(nostack, preserves_flags));
        image.control = control;
        asm!("fxrstor64 [{}]", in(reg) &raw const image, options(nostack, preserves_flags, readonly));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On the host's own x87 unit, which test code does not use otherwise.
    #[test]
    fn the_control_word_is_loaded_over_a_pending_exception() {
        const ALL_MASKED: u16 = 0x37f;
        const DIVISION_UNMASKED: u16 = 0x37b;
        const DIVIDED_BY_ZERO: u16 = 1 << 2;
        x87_initialize();
        assert_eq!((x87_control(), x87_status()), (ALL_MASKED, 0));
        x87_load_control(DIVISION_UNMASKED);
        assert_eq!(x87_control(), DIVISION_UNMASKED);
        // SAFETY: one division by zero on an initialized unit; the exception stays pending until it is cleared.
        unsafe { asm!("fld1", "fldz", "fdivp", options(nomem, nostack)) };
        assert_eq!(x87_status() & (X87_PENDING | DIVIDED_BY_ZERO), X87_PENDING | DIVIDED_BY_ZERO);
        x87_load_control(ALL_MASKED);
        assert_eq!(x87_control(), ALL_MASKED);
        assert_eq!(x87_status() & (X87_PENDING | DIVIDED_BY_ZERO), DIVIDED_BY_ZERO);
        // Unmasking makes it pending again, and raises nothing here.
        x87_load_control(DIVISION_UNMASKED);
        assert_eq!(x87_status() & X87_PENDING, X87_PENDING);
        x87_clear_exceptions();
        assert_eq!(x87_status() & (X87_PENDING | DIVIDED_BY_ZERO), 0);
        x87_initialize();
    }
}

macro_rules! move_vector {
    ($index:expr, $form:literal, $pointer:expr, $($number:literal)*) => {
        match $index & 15 {
            $(
                // SAFETY: sixteen bytes at the pointer are the caller's own; the register is the guest's, and is what is asked
                // for. The upper part of a wider register stays as it is.
                $number => unsafe {
                    asm!(concat!("movups ", $form), pointer = in(reg) $pointer, number = const $number,
                         options(nostack, preserves_flags))
                },
            )*
            _ => {}
        }
    };
}

/// The low 128 bits of the guest's vector register `index`.
pub fn vector(index: u8) -> u128 {
    let mut value = 0u128;
    let pointer = &raw mut value;
    move_vector!(index, "[{pointer}], xmm{number}", pointer, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    value
}

/// Sets them; the rest of a wider register stays as it is.
pub fn set_vector(index: u8, value: u128) {
    let pointer = &raw const value;
    move_vector!(index, "xmm{number}, [{pointer}]", pointer, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
}
