//! Interrupts and exceptions: the IDT, what arrived and in which order, and `catch`, which turns a fault into a value.
use crate::cpu::{cr2, inb, outb};
use crate::dev::lapic;
use crate::machine::{CODE64, DATA};
use crate::{exec, report, Racy};
use core::arch::global_asm;
use core::fmt;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU8, AtomicUsize, Ordering::SeqCst};

/// Exception vectors. AMD APM vol. 2, 8.2.
pub const DE: u8 = 0;
/// Debug.
pub const DB: u8 = 1;
/// Non-maskable interrupt.
pub const NMI: u8 = 2;
/// Breakpoint.
pub const BP: u8 = 3;
/// Overflow.
pub const OF: u8 = 4;
/// Bound range.
pub const BR: u8 = 5;
/// Invalid opcode.
pub const UD: u8 = 6;
/// Device not available.
pub const NM: u8 = 7;
/// Double fault.
pub const DF: u8 = 8;
/// Invalid TSS.
pub const TS: u8 = 10;
/// Segment not present.
pub const NP: u8 = 11;
/// Stack.
pub const SS: u8 = 12;
/// General protection.
pub const GP: u8 = 13;
/// Page fault.
pub const PF: u8 = 14;
/// x87 floating point.
pub const MF: u8 = 16;
/// Alignment check.
pub const AC: u8 = 17;
/// SIMD floating point.
pub const XM: u8 = 19;

/// The interrupted context, as the entry stubs push it.
#[repr(C)]
#[derive(Debug)]
#[allow(missing_docs)]
pub struct Frame {
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
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
}

/// What a caught exception looked like.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Fault {
    /// Vector.
    pub vector: u8,
    /// Error code; 0 for exceptions without one.
    pub error: u64,
    /// Saved RIP.
    pub rip: u64,
    /// CR2 at the time.
    pub cr2: u64,
    /// Saved CS.
    pub cs: u64,
    /// Saved RFLAGS.
    pub rflags: u64,
    /// Saved RSP.
    pub rsp: u64,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}({:#x}) at {:#x}", Name(self.vector), self.error, self.rip)?;
        if self.vector == PF {
            write!(f, " cr2 {:#x}", self.cr2)?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A vector by its name.
pub struct Name(pub u8);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 20] = [
            "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "9", "#TS", "#NP", "#SS", "#GP",
            "#PF", "15", "#MF", "#AC", "#MC", "#XM",
        ];
        match NAMES.get(usize::from(self.0)) {
            Some(name) => f.write_str(name),
            None => write!(f, "vector {:#x}", self.0),
        }
    }
}

/// Who wants to hear that an interrupt was handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Eoi {
    /// Nobody: software interrupts, exceptions, ExtINT handled by the case itself.
    None,
    /// The local APIC.
    Lapic,
    /// The master 8259.
    Master,
    /// Both 8259s.
    Slave,
}

/// A handler runs with interrupts off, after the arrival was counted and before the EOI.
pub type Handler = fn(&mut Frame);

static HANDLERS: [AtomicUsize; 256] = [const { AtomicUsize::new(0) }; 256];
static EOIS: [AtomicU8; 256] = [const { AtomicU8::new(0) }; 256];
static COUNTS: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];
static ORDER: [AtomicU8; 64] = [const { AtomicU8::new(0) }; 64];
static ORDER_LEN: AtomicUsize = AtomicUsize::new(0);

/// Installs a handler for `vector` until the next `reset`.
pub fn on(vector: u8, eoi: Eoi, handler: Handler) {
    EOIS[usize::from(vector)].store(eoi as u8, SeqCst);
    HANDLERS[usize::from(vector)].store(handler as usize, SeqCst);
}

/// Expects `vector` without doing anything but counting it.
pub fn expect(vector: u8, eoi: Eoi) {
    on(vector, eoi, |_| {});
}

/// How often `vector` arrived since the last `reset`.
pub fn count(vector: u8) -> u32 {
    COUNTS[usize::from(vector)].load(SeqCst)
}

/// The vectors that arrived since the last `reset`, oldest first (at most 64), and how many.
pub fn order() -> ([u8; 64], usize) {
    let len = ORDER_LEN.load(SeqCst).min(64);
    (core::array::from_fn(|index| ORDER[index].load(SeqCst)), len)
}

/// Forgets all handlers and all arrivals, and loads the standard IDT.
pub fn reset() {
    for vector in 0..256 {
        if HANDLERS[vector].load(SeqCst) != 0 {
            HANDLERS[vector].store(0, SeqCst);
            EOIS[vector].store(0, SeqCst);
        }
        COUNTS[vector].store(0, SeqCst);
    }
    ORDER_LEN.store(0, SeqCst);
    fill();
    load();
}

struct Recovery {
    rsp: u64,
    fault: Fault,
    previous: *mut Recovery,
}

static RECOVERY: AtomicPtr<Recovery> = AtomicPtr::new(core::ptr::null_mut());

extern "C" {
    fn guest_try(call: extern "C" fn(*mut u8), argument: *mut u8, rsp: *mut u64) -> u64;
    fn guest_try_recover();
    fn trap_stubs();
}

global_asm!(
    r#"
    .global guest_try
guest_try:
    push rbp
    push rbx
    push r12
    push r13
    push r14
    push r15
    pushfq
    mov [rdx], rsp
    mov rax, rdi
    mov rdi, rsi
    call rax
    add rsp, 8
    xor eax, eax
    jmp 2f
    .global guest_try_recover
guest_try_recover:
    popfq
    mov eax, 1
2:  pop r15
    pop r14
    pop r13
    pop r12
    pop rbx
    pop rbp
    ret

    .global trap_stubs
    .balign 16
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    .byte 0x6a, 0                            /* push 0 where the processor pushes no error code */
    .endif
    .byte 0x68                               /* push imm32 */
    .long vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
    push rax
    push rbx
    push rcx
    push rdx
    push rsi
    push rdi
    push rbp
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    mov rbp, rsp
    and rsp, -16
    call {dispatch}
    mov rsp, rbp
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rbp
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rbx
    pop rax
    add rsp, 16
    iretq
    "#,
    dispatch = sym dispatch,
);

/// Runs `call`. An exception in it (that has no handler of its own) ends it and becomes the result.
///
/// The stack, the callee-saved registers and RFLAGS are those of the caller again afterwards; destructors of
/// `call`'s frames do not run.
pub fn catch<R>(call: impl FnOnce() -> R) -> Result<R, Fault> {
    struct Call<F, R> {
        call: Option<F>,
        result: MaybeUninit<R>,
    }
    extern "C" fn run<F: FnOnce() -> R, R>(argument: *mut u8) {
        // SAFETY: `catch` passes the address of its `Call<F, R>`, which outlives this call.
        let state = unsafe { &mut *argument.cast::<Call<F, R>>() };
        if let Some(call) = state.call.take() {
            state.result.write(call());
        }
    }
    fn thunk<F: FnOnce() -> R, R>(_: &Call<F, R>) -> extern "C" fn(*mut u8) {
        run::<F, R>
    }
    let mut state = Call { call: Some(call), result: MaybeUninit::uninit() };
    let mut recovery = Recovery { rsp: 0, fault: Fault::default(), previous: RECOVERY.load(SeqCst) };
    let recovery = &raw mut recovery;
    RECOVERY.store(recovery, SeqCst);
    // SAFETY: both pointers outlive the call. On a fault `dispatch` unwinds to `guest_try_recover` with the stack
    // that `guest_try` saved, so that it returns exactly once either way.
    unsafe {
        let faulted = guest_try(thunk(&state), (&raw mut state).cast(), &raw mut (*recovery).rsp);
        RECOVERY.store((*recovery).previous, SeqCst);
        if faulted == 0 {
            Ok(state.result.assume_init())
        } else {
            Err((*recovery).fault)
        }
    }
}

static LAST: Racy<[u64; 22]> = Racy::new([0; 22]);

/// The whole context of the exception that last ended a `catch`.
pub fn last_frame() -> Frame {
    // SAFETY: `Frame` is 22 words, copied as such by `unwind`; nobody writes while no exception unwinds.
    unsafe { core::mem::transmute(LAST.get().read()) }
}

/// Ends the innermost `catch` with what is in `frame`: for handlers that decide to.
pub fn unwind(frame: &mut Frame) -> bool {
    let recovery = RECOVERY.load(SeqCst);
    if recovery.is_null() {
        return false;
    }
    let fault = Fault {
        vector: frame.vector as u8,
        error: frame.error,
        rip: frame.rip,
        cr2: cr2(),
        cs: frame.cs,
        rflags: frame.rflags,
        rsp: frame.rsp,
    };
    // SAFETY: the pointer is that of a `catch` further down this stack; a frame is 22 words.
    unsafe {
        LAST.get().write((frame as *const Frame).cast::<[u64; 22]>().read());
        (*recovery).fault = fault;
        frame.rsp = (*recovery).rsp;
    }
    frame.rip = guest_try_recover as *const () as u64;
    frame.cs = CODE64.into();
    frame.ss = DATA.into();
    frame.rflags = 2;
    true
}

extern "C" fn dispatch(frame: &mut Frame) {
    let vector = frame.vector as usize & 0xff;
    COUNTS[vector].fetch_add(1, SeqCst);
    let at = ORDER_LEN.fetch_add(1, SeqCst);
    if let Some(slot) = ORDER.get(at) {
        slot.store(vector as u8, SeqCst);
    }
    let handler = HANDLERS[vector].load(SeqCst);
    if handler != 0 {
        // SAFETY: only `on` stores here, and it stores a `Handler`.
        let handler: Handler = unsafe { core::mem::transmute(handler) };
        handler(frame);
        eoi(EOIS[vector].load(SeqCst));
    } else if vector < 32 {
        // A `catch` belongs to the first processor; a fault of another is nobody's.
        if (crate::smp::started() && crate::smp::index() != 0) || !unwind(frame) {
            let fault = Fault {
                vector: vector as u8,
                error: frame.error,
                rip: frame.rip,
                cr2: cr2(),
                ..Fault::default()
            };
            report::abort(format_args!("trap: expected none outside a case, got {fault}"));
        }
    } else if lapic::in_service(vector as u8) {
        lapic::eoi();
    } else if (0x20..0x30).contains(&vector) {
        eoi(if vector < 0x28 { Eoi::Master } else { Eoi::Slave } as u8);
    }
}

fn eoi(kind: u8) {
    if kind == Eoi::Lapic as u8 {
        lapic::eoi();
    }
    if kind == Eoi::Slave as u8 {
        outb(0xa0, 0x20);
    }
    if kind == Eoi::Slave as u8 || kind == Eoi::Master as u8 {
        outb(0x20, 0x20);
        // A read between, as old chips want it; harmless on new ones.
        inb(0x21);
    }
}

/// Error code of a fault on the gate of `vector`: its number in the selector field and the IDT bit. AMD APM vol. 2,
/// 8.4.1. TCG counts in gates of 16 bytes instead of selectors of 8.
pub fn idt_error(vector: u8) -> u64 {
    u64::from(vector) * if crate::platform::tcg() { 16 } else { 8 } + 2
}

/// One gate of a 64-bit IDT. AMD APM vol. 2, 4.8.4.
#[repr(C, align(16))]
#[derive(Clone, Copy)]
pub struct Gate([u64; 2]);

impl Gate {
    /// An interrupt gate (type 14) to `target` with a privilege level and an IST slot.
    pub fn interrupt(target: u64, dpl: u8, ist: u8) -> Gate {
        Gate::new(target, 0x8e, dpl, ist)
    }

    /// A gate with a given type byte (0x8e interrupt, 0x8f trap, 0x0e not present).
    pub fn new(target: u64, kind: u8, dpl: u8, ist: u8) -> Gate {
        let attributes = u64::from(kind) | u64::from(dpl) << 5;
        let low = target & 0xffff
            | u64::from(CODE64) << 16
            | u64::from(ist) << 32
            | attributes << 40
            | (target >> 16 & 0xffff) << 48;
        Gate([low, target >> 32])
    }
}

/// A full IDT; page-aligned so that a case can unmap it.
#[repr(C, align(4096))]
pub struct Idt(pub [Gate; 256]);

static IDT: Racy<Idt> = Racy::new(Idt([Gate([0; 2]); 256]));

/// Address of the standard IDT.
pub fn idt() -> u64 {
    IDT.addr()
}

/// Address of the entry stub of `vector`.
pub fn stub(vector: u8) -> u64 {
    trap_stubs as *const () as u64 + 16 * u64::from(vector)
}

/// Replaces the gate of `vector` until the next `reset`.
pub fn gate(vector: u8, gate: Gate) {
    // SAFETY: the IDT is plain memory; no reference to it exists.
    unsafe { (&raw mut (*IDT.get()).0[usize::from(vector)]).write_volatile(gate) }
}

/// Lets `vector` arrive on stack `ist` of the TSS (0: no switch).
pub fn ist(vector: u8, ist: u8) {
    gate(vector, Gate::interrupt(stub(vector), 0, ist));
}

fn fill() {
    for vector in 0..=255 {
        // #DF always has a stack of its own: whatever caused it may have taken the current one.
        ist(vector, u8::from(vector == DF));
    }
}

/// Loads the standard IDT.
pub fn load() {
    load_idt(idt(), 4095);
}

/// Loads an IDT register.
pub fn load_idt(base: u64, limit: u16) {
    let pointer = pseudo_descriptor(base, limit);
    exec!("lidt [{}]", in(reg) &pointer, options(nostack));
}

/// The ten bytes that LGDT and LIDT read.
pub fn pseudo_descriptor(base: u64, limit: u16) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&limit.to_le_bytes());
    bytes[2..].copy_from_slice(&base.to_le_bytes());
    bytes
}

/// Makes the standard IDT and loads it.
pub fn init() {
    fill();
    load();
}
