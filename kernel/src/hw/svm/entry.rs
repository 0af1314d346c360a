//! The world switch: VMRUN and the state around it that the processor leaves to software.
#![allow(unsafe_code)] // The switch itself is assembly.

use core::arch::{asm, naked_asm};

extern "C" {
    /// The instruction behind VMRUN.
    fn umbra_after_vmrun();
}

/// Whether a #DB at `rip` is one that the guest left behind: some processors deliver a debug trap of the guest's last
/// instruction before #VMEXIT to the host (AMD revision guide for family 10h, 41322, erratum 246; also Bochs 2.7). It
/// is to be ignored, and it comes while FS, GS and TR are still the guest's.
pub fn is_stray_debug_trap(rip: u64) -> bool {
    rip == umbra_after_vmrun as *const () as u64
}

/// Invalidates the translations of the page of `linear` that are tagged with `asid` (APM vol. 3, INVLPGA).
///
/// # Safety
/// SVM is enabled on this CPU, and `asid` is not the host's, or is zero where nothing is to be kept.
pub(super) unsafe fn invalidate_page(linear: u64, asid: u32) {
    // SAFETY: the caller's promise; translations alone are taken away.
    unsafe { asm!("invlpga rax, ecx", in("rax") linear, in("ecx") asid, options(nostack, preserves_flags)) };
}

/// Sets CR2, which VMRUN loads from the VMCB (APM vol. 2, 15.5.1): Bochs 2.7 enters the guest with the register as it is.
pub(super) fn set_cr2(value: u64) {
    // SAFETY: CR2 says something only in a page-fault handler, and the kernel's report of its own fault reads it there.
    unsafe { asm!("mov cr2, {}", in(reg) value, options(nomem, nostack, preserves_flags)) };
}

/// Runs the guest of the VMCB at physical address `vmcb` until it exits.
///
/// `gprs` holds the guest's registers in encoding order; RAX and RSP are in the VMCB. FS, GS, TR, LDTR and the
/// system-call MSRs are the host's again on return, loaded from the VMCB-shaped page at physical address `host`.
///
/// Interrupts: GIF is clear from before the guest's GS is loaded until the host's is back (APM 15.17), so no
/// handler ever runs on guest state. IF is set inside, because with V_INTR_MASKING the host's IF decides
/// whether physical interrupts end the guest's run (APM 15.21.1); they stay pending on return, with IF clear.
///
/// # Safety
/// SVM is enabled on this CPU, with a valid VM_HSAVE_PA; interrupts are off; `vmcb` and `host` are physical
/// addresses of a VMCB and of a page filled by VMSAVE on this CPU; the VMCB's second-stage tables and permission
/// maps belong to the guest; the guest's tag was flushed as its tables require.
#[inline(always)]
pub(super) unsafe fn enter(gprs: *mut [u64; 16], vmcb: u64, host: u64) {
    // SAFETY: the caller's promise. RBX and RBP are kept, all other registers are named, and the stack is as it was. The
    // caller saves what it still needs, which is less than a function would have to.
    unsafe {
        asm!(
            "call {switch}",
            switch = sym switch,
            inout("rax") vmcb => _,
            inout("rdx") host => _,
            inout("rdi") gprs => _,
            out("rcx") _, out("rsi") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
}

/// What [`enter`] calls, with the VMCB in RAX, the host's page in RDX and the registers in RDI.
#[unsafe(naked)]
unsafe extern "sysv64" fn switch() {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push rdi",
        "push rdx",
        "clgi",
        "sti",
        "mov rcx, [rdi + 8*1]",
        "mov rdx, [rdi + 8*2]",
        "mov rbx, [rdi + 8*3]",
        "mov rbp, [rdi + 8*5]",
        "mov rsi, [rdi + 8*6]",
        "mov r8,  [rdi + 8*8]",
        "mov r9,  [rdi + 8*9]",
        "mov r10, [rdi + 8*10]",
        "mov r11, [rdi + 8*11]",
        "mov r12, [rdi + 8*12]",
        "mov r13, [rdi + 8*13]",
        "mov r14, [rdi + 8*14]",
        "mov r15, [rdi + 8*15]",
        "mov rdi, [rdi + 8*7]",
        "vmload rax",
        "vmrun rax",
        ".global umbra_after_vmrun",
        "umbra_after_vmrun:",
        "vmsave rax",
        // RSP and RAX are the host's again: `host` is on the stack, and below it `gprs`.
        "pop rax",
        "vmload rax",
        "pop rax",
        "mov [rax + 8*1], rcx",
        "mov [rax + 8*2], rdx",
        "mov [rax + 8*3], rbx",
        "mov [rax + 8*5], rbp",
        "mov [rax + 8*6], rsi",
        "mov [rax + 8*7], rdi",
        "mov [rax + 8*8], r8",
        "mov [rax + 8*9], r9",
        "mov [rax + 8*10], r10",
        "mov [rax + 8*11], r11",
        "mov [rax + 8*12], r12",
        "mov [rax + 8*13], r13",
        "mov [rax + 8*14], r14",
        "mov [rax + 8*15], r15",
        "cli",
        "stgi",
        // The direction flag is the guest's no more (VMRUN saved RFLAGS), but the ABI wants it clear.
        "cld",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}
