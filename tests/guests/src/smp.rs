//! Starts the other processors and gives them work.
use crate::dev::lapic;
use crate::machine::{self, CODE32, CODE64, DATA};
use crate::prelude::*;
use crate::{exec, frames, trap};
use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst};

/// More processors than any scenario has.
pub const MAX: usize = 64;
const STACK_SIZE: u64 = 16 << 10;
/// Page of the start-up code; its number is the SIPI's vector.
const TRAMPOLINE: u64 = 0x8000;
const LONG: u64 = 20_000_000_000;

static JOBS: [AtomicUsize; MAX] = [const { AtomicUsize::new(0) }; MAX];
static APIC_IDS: [AtomicU32; MAX] = [const { AtomicU32::new(0) }; MAX];
static ONLINE: AtomicUsize = AtomicUsize::new(0);
static STARTED: AtomicBool = AtomicBool::new(false);

/// Work for a processor: its index, from 1 for the first that came up.
pub type Job = fn(usize);

extern "C" {
    static smp_trampoline: u8;
    static smp_trampoline_end: u8;
}

/// Parameters behind the code, at fixed offsets from the trampoline's page.
const PARAMETERS: u64 = TRAMPOLINE + 0x800;

global_asm!(
    r#"
    .section .rodata.smp, "a"
    .set PARAMETERS, {parameters}
    .global smp_trampoline
smp_trampoline:
    .code16
    cli
    cld
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0x0f, 0x01, 0x16             /* lgdt with a 32-bit base */
    .word PARAMETERS
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long (smp_32 - smp_trampoline + {trampoline})
    .word {code32}
    .code32
smp_32:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, [PARAMETERS + 24]
    mov cr4, eax
    mov eax, [PARAMETERS + 16]
    mov cr3, eax
    mov ecx, 0xc0000080
    mov eax, [PARAMETERS + 32]
    xor edx, edx
    wrmsr
    mov eax, [PARAMETERS + 40]
    mov cr0, eax
    .byte 0xea
    .long (smp_64 - smp_trampoline + {trampoline})
    .word {code64}
    .code64
smp_64:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov edi, 1
    lock xadd [PARAMETERS + 48], edi
    mov eax, edi
    inc eax
    imul rax, rax, {stack_size}
    add rax, [PARAMETERS + 56]
    mov rsp, rax
    xor ebp, ebp
    mov rax, [PARAMETERS + 64]
    call rax
    ud2
    .global smp_trampoline_end
smp_trampoline_end:
    .text
    "#,
    parameters = const PARAMETERS,
    trampoline = const TRAMPOLINE,
    code32 = const CODE32,
    code64 = const CODE64,
    data = const DATA,
    stack_size = const STACK_SIZE,
);

/// First Rust code of a processor; `index` counts from 0 in order of arrival.
extern "C" fn arrive(index: u32) -> ! {
    trap::load();
    lapic::enable();
    lapic::write(lapic::SVR, 0x100 | u32::from(lapic::SPURIOUS));
    lapic::write(lapic::TPR, 0);
    let index = index as usize + 1;
    if index < MAX {
        APIC_IDS[index].store(lapic::id(), SeqCst);
    }
    ONLINE.fetch_add(1, SeqCst);
    loop {
        let job = JOBS[index.min(MAX - 1)].load(SeqCst);
        if job != 0 {
            // SAFETY: only `give` stores here, and it stores a `Job`.
            let job: Job = unsafe { core::mem::transmute(job) };
            job(index);
            JOBS[index].store(0, SeqCst);
        }
        exec!("pause");
    }
}

/// Sends INIT and two SIPIs to all others; says how many came within a while. AMD APM vol. 2, 16.8 has the sequence.
pub fn start(expected: usize) -> usize {
    let (code, end) = (&raw const smp_trampoline as u64, &raw const smp_trampoline_end as u64);
    (0..end - code).for_each(|at| poke(TRAMPOLINE + at, peek::<u8>(code + at)));
    let stacks = frames::untouched(STACK_SIZE * (MAX as u64 + 1), 4096);
    let gdtr = trap::pseudo_descriptor(machine::gdt(), 16 * 8 - 1);
    gdtr.iter().enumerate().for_each(|(at, &byte)| poke(PARAMETERS + at as u64, byte));
    poke(PARAMETERS + 16, cr3());
    poke(PARAMETERS + 24, cr4());
    poke(PARAMETERS + 32, rdmsr(MSR_EFER) & !0x400);
    poke(PARAMETERS + 40, cr0());
    poke(PARAMETERS + 48, 0u64);
    poke(PARAMETERS + 56, stacks);
    poke(PARAMETERS + 64, arrive as *const () as u64);
    STARTED.store(true, SeqCst);
    lapic::ipi(0, lapic::OTHERS | lapic::MODE_INIT | lapic::ASSERT);
    delay(10_000_000);
    for _ in 0..2 {
        lapic::ipi(0, lapic::OTHERS | lapic::MODE_STARTUP | lapic::ASSERT | (TRAMPOLINE >> 12) as u32);
        wait_until(200_000_000, || ONLINE.load(SeqCst) >= expected);
    }
    wait_until(LONG, || ONLINE.load(SeqCst) >= expected);
    online()
}

/// Restarts the processor with index `index` by INIT and SIPI; it gets a new index.
pub fn restart(index: usize) -> bool {
    let before = online();
    let id = apic_id(index);
    lapic::ipi(id, lapic::MODE_INIT | lapic::ASSERT);
    delay(10_000_000);
    lapic::ipi(id, lapic::MODE_STARTUP | lapic::ASSERT | (TRAMPOLINE >> 12) as u32);
    wait_until(LONG, || online() > before)
}

/// Arrivals so far: the others, and again each that was restarted.
pub fn online() -> usize {
    ONLINE.load(SeqCst)
}

/// Whether other processors may be running.
pub fn started() -> bool {
    STARTED.load(SeqCst)
}

/// The APIC id of a processor by its index.
pub fn apic_id(index: usize) -> u32 {
    APIC_IDS[index].load(SeqCst)
}

/// Gives `job` to a processor.
pub fn give(index: usize, job: Job) {
    JOBS[index].store(job as usize, SeqCst);
}

/// Waits until a processor has finished its job.
pub fn finished(index: usize) -> bool {
    wait_until(LONG, || JOBS[index].load(SeqCst) == 0)
}

/// The index of the processor this runs on; 0 is the first one.
pub fn index() -> usize {
    let id = lapic::id();
    // The latest arrival with this id: a restarted processor has a new index.
    (1..=online().min(MAX - 1)).rev().find(|&index| apic_id(index) == id).unwrap_or(0)
}
