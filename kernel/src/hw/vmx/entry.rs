//! The world switch: VMLAUNCH, VMRESUME, and where an exit lands.
#![allow(unsafe_code)] // The switch itself is assembly.

use super::vmcs::HOST_RSP;
use core::arch::naked_asm;

/// [`enter`]: the guest ran and has exited.
pub(super) const EXITED: u64 = 0;
/// [`enter`]: VMfailInvalid.
pub(super) const FAILED_INVALID: u64 = 1;
/// [`enter`]: VMfailValid.
pub(super) const FAILED_VALID: u64 = 2;

/// Runs the guest of the current VMCS until it exits: by VMRESUME if it was `launched`, else by VMLAUNCH.
///
/// `gprs` holds the guest's registers in encoding order; RSP is in the VMCS. The host's RIP in the VMCS is [`landing`].
/// Everything else of the host is loaded by the exit, but the limits of GDTR and IDTR, which become 64 KiB (SDM vol. 3,
/// 28.5.2): Umbra names no descriptor beyond its own, and its IDT is complete.
///
/// # Safety
/// This CPU is in VMX operation, the current VMCS is whole, its host state is that of this CPU; interrupts are off; its EPT
/// tables and bitmaps belong to the guest; the guest's translations were flushed as its tables require.
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn enter(gprs: *mut [u64; 16], launched: bool) -> u64 {
    naked_asm!(
        "push rbp",
        "push rbx",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdi",
        "mov eax, {host_rsp}",
        "vmwrite rax, rsp",
        // MOV leaves the flags alone.
        "test sil, sil",
        "mov rax, [rdi + 8*0]",
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
        "jz 2f",
        "vmresume",
        "jmp 3f",
        "2:",
        "vmlaunch",
        "3:",
        // Not entered: CF is VMfailInvalid, ZF is VMfailValid. POP and MOV leave them alone.
        "pop rdi",
        "mov eax, {invalid}",
        "jc 4f",
        "mov eax, {valid}",
        "4:",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
        host_rsp = const HOST_RSP.encoding(),
        invalid = const FAILED_INVALID,
        valid = const FAILED_VALID,
    )
}

/// Where an exit goes on, with the stack as [`enter`] left it: [rsp] is `gprs`. RFLAGS is 2 (SDM vol. 3, 28.5.3).
#[unsafe(naked)]
pub(super) unsafe extern "sysv64" fn landing() {
    naked_asm!(
        "push rax",
        "mov rax, [rsp + 8]",
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
        "pop rcx",
        "mov [rax], rcx",
        "add rsp, 8",
        "xor eax, eax",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbx",
        "pop rbp",
        "ret",
    )
}

const _: () = assert!(EXITED == 0, "`landing` clears RAX");
