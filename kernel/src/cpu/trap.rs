//! Exceptions and interrupts: the stubs behind the interrupt descriptor table, and what each vector does.
// Entry points that the processor calls.
#![allow(unsafe_code)]

use super::{backtrace, lapic, msr, percpu};
use crate::hw;
use crate::{console, mm, power};
use core::arch::naked_asm;
use core::mem::size_of;
use core::sync::atomic::Ordering;
use x86_64::registers::control::{Cr2, Cr3};

/// #DB.
const DEBUG: u8 = 1;
/// #PF.
pub const PAGE_FAULT: u8 = 14;
/// Non-maskable interrupt.
pub const NMI: u8 = 2;
/// #DF.
pub const DOUBLE_FAULT: u8 = 8;
/// #GP.
pub const GENERAL_PROTECTION: u8 = 13;
/// #MC.
pub const MACHINE_CHECK: u8 = 18;
/// First vector that is no exception.
const FIRST_INTERRUPT: u8 = 32;
/// Where the 8259s, all inputs masked, would send a spurious interrupt: 16 vectors.
pub const LEGACY: u8 = 0x20;
/// The local APIC's timer.
pub const TIMER: u8 = 0xf0;
/// Wakes a CPU to look at its mailbox.
pub const WAKE: u8 = 0xf1;
/// The local APIC's error interrupt.
pub const APIC_ERROR: u8 = 0xf2;
/// The local APIC's spurious interrupt; its low four bits are ones on old processors.
pub const SPURIOUS: u8 = 0xff;

/// Exceptions that push an error code, one bit each. AMD APM vol. 2 section 8.2.
const WITH_ERROR_CODE: u64 =
    1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21 | 1 << 29 | 1 << 30;
/// Bytes of one stub.
const STUB_BYTES: u64 = 16;

/// The interrupted code's registers as the stubs push them.
#[derive(Clone, Debug)]
#[repr(C)]
#[allow(missing_docs)] // Each field is the register of its name.
pub struct TrapFrame {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    pub vector: u64,
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

// The processor aligns the stack to 16 bytes first, so it is aligned again when `dispatch` is called.
const _: () = assert!(size_of::<TrapFrame>().is_multiple_of(16));

/// Address of the stub of `vector`.
pub(super) fn stub(vector: u8) -> u64 {
    stubs as *const () as u64 + u64::from(vector) * STUB_BYTES
}

/// 256 stubs: each pushes a zero where the processor pushes no error code, then its vector.
#[unsafe(naked)]
extern "C" fn stubs() {
    naked_asm!(
        ".set umbra_vector, 0",
        ".rept 256",
        ".balign {size}",
        ".if umbra_vector < 32",
        ".if !(({with_error_code} >> umbra_vector) & 1)",
        "push 0",
        ".endif",
        ".else",
        "push 0",
        ".endif",
        "push umbra_vector",
        "jmp {common}",
        ".set umbra_vector, umbra_vector + 1",
        ".endr",
        size = const STUB_BYTES,
        with_error_code = const WITH_ERROR_CODE,
        common = sym common,
    )
}

#[unsafe(naked)]
extern "C" fn common() {
    naked_asm!(
        "cld",
        "push rax",
        "push rbx",
        "push rcx",
        "push rdx",
        "push rsi",
        "push rdi",
        "push rbp",
        "push r8",
        "push r9",
        "push r10",
        "push r11",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov rdi, rsp",
        "call {dispatch}",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop r11",
        "pop r10",
        "pop r9",
        "pop r8",
        "pop rbp",
        "pop rdi",
        "pop rsi",
        "pop rdx",
        "pop rcx",
        "pop rbx",
        "pop rax",
        "add rsp, 16",
        "iretq",
        dispatch = sym dispatch,
    )
}

/// Every exception and interrupt ends up here. Handlers set a flag and end the interrupt; whoever runs on the CPU
/// looks at the flag.
extern "C" fn dispatch(frame: &mut TrapFrame) {
    match frame.vector as u8 {
        NMI => nmi(),
        DEBUG if hw::is_stray_debug_trap(frame.rip) => {}
        GENERAL_PROTECTION if msr::recover(frame) => {}
        vector if vector < FIRST_INTERRUPT => exception(frame),
        TIMER => {
            percpu::this().timer_fired.store(true, Ordering::Relaxed);
            lapic::eoi();
        }
        WAKE => lapic::eoi(),
        APIC_ERROR => {
            lapic::clear_error();
            lapic::eoi();
        }
        // Neither a spurious interrupt of the local APIC nor one of the 8259s takes an EOI.
        SPURIOUS | LEGACY..0x30 => {}
        _ => {
            percpu::this().unexpected_interrupts.fetch_add(1, Ordering::Relaxed);
            lapic::eoi();
        }
    }
}

/// What an NMI means: that another CPU ends the run, or trouble in the hardware.
pub fn nmi() {
    power::stop_if_asked();
    console::try_print(format_args!("warning: NMI on CPU {}, going on", percpu::number()));
}

/// An exception in Umbra itself: the end of the run, with all there is to know.
#[cold]
fn exception(frame: &TrapFrame) -> ! {
    let cr2 = Cr2::read_raw();
    power::begin_emergency();
    let vector = frame.vector as u8;
    console::print(format_args!(
        "exception {} ({}) on CPU {}, error code {:#x}{}",
        vector,
        name(vector),
        percpu::number(),
        frame.error_code,
        if mm::is_stack_guard(cr2) && matches!(vector, PAGE_FAULT | DOUBLE_FAULT) {
            ": the stack overflowed"
        } else {
            ""
        },
    ));
    console::print(format_args!(
        "  rip {:#018x} cs {:#06x} rflags {:#x}\n  rsp {:#018x} ss {:#06x}\n  cr2 {cr2:#018x} cr3 {:#x}",
        frame.rip,
        frame.cs,
        frame.rflags,
        frame.rsp,
        frame.ss,
        Cr3::read().0.start_address(),
    ));
    console::print(format_args!(
        "  rax {:#018x} rbx {:#018x} rcx {:#018x} rdx {:#018x}\n  rsi {:#018x} rdi {:#018x} rbp {:#018x} r8  {:#018x}",
        frame.rax, frame.rbx, frame.rcx, frame.rdx, frame.rsi, frame.rdi, frame.rbp, frame.r8,
    ));
    console::print(format_args!(
        "  r9  {:#018x} r10 {:#018x} r11 {:#018x} r12 {:#018x}\n  r13 {:#018x} r14 {:#018x} r15 {:#018x}",
        frame.r9, frame.r10, frame.r11, frame.r12, frame.r13, frame.r14, frame.r15,
    ));
    backtrace::print(frame.rbp);
    power::end(power::PANIC)
}

/// AMD APM vol. 2 table 8-1, Intel SDM vol. 3 table 6-1.
fn name(vector: u8) -> &'static str {
    const NAMES: [&str; 32] = [
        "#DE divide error",
        "#DB debug",
        "NMI",
        "#BP breakpoint",
        "#OF overflow",
        "#BR bound range",
        "#UD invalid opcode",
        "#NM device not available",
        "#DF double fault",
        "coprocessor segment overrun",
        "#TS invalid TSS",
        "#NP segment not present",
        "#SS stack fault",
        "#GP general protection",
        "#PF page fault",
        "reserved",
        "#MF x87",
        "#AC alignment check",
        "#MC machine check",
        "#XF SIMD",
        "#VE virtualization",
        "#CP control protection",
        "reserved",
        "reserved",
        "reserved",
        "reserved",
        "reserved",
        "reserved",
        "#HV hypervisor injection",
        "#VC VMM communication",
        "#SX security",
        "reserved",
    ];
    NAMES.get(usize::from(vector)).copied().unwrap_or("interrupt")
}
