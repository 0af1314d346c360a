//! Leaves long mode, runs a payload in another mode, and comes back.
//!
//! The way down: 64-bit, compatibility mode, protected mode without paging, then what the mode wants. The way back is
//! the same for all. The switching code is copied to low memory so that real mode reaches it.
use crate::cpu::{peek, poke, FLAG_IF};
use crate::exec;
use crate::frames::PAGE;
use crate::machine::{self, CODE16, CODE32, CODE64, DATA, DATA16};
use crate::trap::{catch, Fault};
use core::arch::global_asm;

/// Where payloads are copied to and entered: offset 0x8000, segment 0 in real mode.
pub const PAYLOAD: u32 = 0x8000;
/// Memory that payloads may use.
pub const SCRATCH: u32 = 0x9800;

const BLOB: u64 = 0x7000;
const CONTEXT: u64 = 0x6000;
/// Page tables for the 32-bit modes.
const TABLES: u64 = 0x1_0000;
const IDT32: u64 = 0x1_8000;
/// Gates in that IDT: the exceptions, and as many that are empty.
const GATES32: u64 = 64;

/// A mode to run in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real mode: 16-bit payload.
    Real,
    /// Protected mode without paging: 32-bit payload, like all below.
    Protected,
    /// Two-level paging with 4 KiB pages.
    Paged,
    /// Two-level paging with 4 MiB pages.
    Pse,
    /// Three-level paging.
    Pae,
    /// Compatibility mode in long mode.
    Compat,
}

impl Mode {
    /// All modes with 32-bit payloads.
    pub const ALL_32: [Mode; 5] = [Mode::Protected, Mode::Paged, Mode::Pse, Mode::Pae, Mode::Compat];
}

/// General registers in and out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct Registers {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
    pub edi: u32,
    pub ebp: u32,
}

/// What memory at `CONTEXT` looks like; the assembly below knows the offsets.
#[repr(C)]
struct Context {
    rsp: u64,
    cr0: u32,
    cr3: u32,
    cr4: u32,
    kind: u32,
    registers: Registers,
    eflags: u32,
    vector: u32,
    error: u32,
    eip: u32,
    cr2: u32,
    back_cr0: u32,
    back_cr3: u32,
    back_cr4: u32,
    gdtr: [u16; 5],
    idtr: [u16; 5],
    idt32: [u16; 5],
    ivt: [u16; 5],
    payload: u32,
}
const _: () = {
    assert!(core::mem::offset_of!(Context, registers) == 24);
    assert!(core::mem::offset_of!(Context, eflags) == 52);
    assert!(core::mem::offset_of!(Context, vector) == 56);
    assert!(core::mem::offset_of!(Context, back_cr0) == 72);
    assert!(core::mem::offset_of!(Context, gdtr) == 84);
    assert!(core::mem::offset_of!(Context, idtr) == 94);
    assert!(core::mem::offset_of!(Context, idt32) == 104);
    assert!(core::mem::offset_of!(Context, ivt) == 114);
    assert!(core::mem::offset_of!(Context, payload) == 124);
};

const KIND_REAL: u32 = 0;
const KIND_32: u32 = 1;
const KIND_COMPAT: u32 = 2;
const NO_VECTOR: u32 = !0;

extern "C" {
    static modes_blob: u8;
    static modes_blob_end: u8;
    static modes_stubs32: u8;
    static modes_stubs16: u8;
}

global_asm!(
    r#"
    .section .rodata.modes, "a"
    .set CTX, {context}
    .set REGS, CTX + 24
    .balign 16
    .global modes_blob
modes_blob:
    .code64
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    pushfq
    cli
    mov [CTX], rsp
    sgdt [CTX + 84]
    sidt [CTX + 94]
    push {code32}
    .byte 0x68                               /* push imm32 */
    .long (modes_32 - modes_blob + {blob})
    retfq

    .code32
modes_32:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    mov esp, CTX - 16
    cmp dword ptr [CTX + 20], {kind_compat}
    je 1f
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, ~0x100
    wrmsr
    mov eax, [CTX + 16]
    mov cr4, eax
    mov eax, [CTX + 12]
    mov cr3, eax
    cmp dword ptr [CTX + 20], {kind_real}
    je modes_to_real
    lidt [CTX + 104]
    mov eax, [CTX + 8]
    mov cr0, eax
    jmp 1f
1:  mov eax, [REGS]
    mov ebx, [REGS + 4]
    mov ecx, [REGS + 8]
    mov edx, [REGS + 12]
    mov esi, [REGS + 16]
    mov edi, [REGS + 20]
    mov ebp, [REGS + 24]
    call dword ptr [CTX + 124]
    cli
    cld
    mov [REGS], eax
    mov [REGS + 4], ebx
    mov [REGS + 8], ecx
    mov [REGS + 12], edx
    mov [REGS + 16], esi
    mov [REGS + 20], edi
    mov [REGS + 24], ebp
    pushfd
    pop dword ptr [CTX + 52]

modes_back:
    cmp dword ptr [CTX + 20], {kind_compat}
    je 2f
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov eax, [CTX + 80]
    mov cr4, eax
    mov eax, [CTX + 76]
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, [CTX + 72]
    mov cr0, eax
2:  .byte 0xea
    .long (modes_64 - modes_blob + {blob})
    .word {code64}

    .code64
modes_64:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov rsp, [CTX]
    lgdt [CTX + 84]
    lidt [CTX + 94]
    popfq
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

    /* Exceptions in the 32-bit modes: vector and error code on the stack, then what the processor pushed. */
    .code32
    .balign 8
modes_stubs32:
    .global modes_stubs32
    .set vector, 0
    .rept 32
    .balign 8
    .if (vector == 8) || ((vector >= 10) && (vector <= 14)) || (vector == 17) || (vector == 21)
    .else
    .byte 0x6a, 0
    .endif
    .byte 0x6a, vector
    .byte 0xeb
    .byte modes_exception32 - . - 1
    .if vector == 14
    .skip 0
    .endif
    .set vector, vector + 1
    .if vector == 16
    jmp modes_after16
modes_exception32:
    jmp modes_exception32_far
modes_after16:
    .endif
    .endr

modes_exception32_far:
    /* From virtual-8086 mode the data segments are null. */
    push eax
    mov eax, {data}
    mov ds, eax
    mov es, eax
    pop eax
    mov [REGS], eax
    mov [REGS + 4], ebx
    mov [REGS + 8], ecx
    mov [REGS + 12], edx
    mov [REGS + 16], esi
    mov [REGS + 20], edi
    mov [REGS + 24], ebp
    pop dword ptr [CTX + 56]
    pop dword ptr [CTX + 60]
    pop dword ptr [CTX + 64]
    pop eax
    pop dword ptr [CTX + 52]
    mov eax, cr2
    mov [CTX + 68], eax
    mov eax, {data}
    mov ss, eax
    mov fs, eax
    mov gs, eax
    mov esp, CTX - 16
    cld
    jmp modes_back

modes_to_real:
    lidt [CTX + 114]
    .byte 0xea
    .long (modes_16p - modes_blob + {blob})
    .word {code16}
    .code16
modes_16p:
    mov ax, {data16}
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov fs, ax
    mov gs, ax
    mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    .byte 0xea
    .word (modes_16 - modes_blob + {blob}), 0
modes_16:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov fs, ax
    mov gs, ax
    mov sp, CTX - 16
    mov eax, [REGS]
    mov ebx, [REGS + 4]
    mov ecx, [REGS + 8]
    mov edx, [REGS + 12]
    mov esi, [REGS + 16]
    mov edi, [REGS + 20]
    mov ebp, [REGS + 24]
    call word ptr [CTX + 124]
    cli
    cld
    push ax
    xor ax, ax
    mov ds, ax
    pop ax
    mov [REGS], eax
    mov [REGS + 4], ebx
    mov [REGS + 8], ecx
    mov [REGS + 12], edx
    mov [REGS + 16], esi
    mov [REGS + 20], edi
    mov [REGS + 24], ebp
    pushfd
    pop dword ptr [CTX + 52]
modes_back16:
    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long (modes_back32 - modes_blob + {blob})
    .word {code32}
    .code32
modes_back32:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    mov esp, CTX - 16
    jmp modes_back

    /* Exceptions in real mode: five bytes a vector, PUSH and JMP. */
    .code16
    .global modes_stubs16
modes_stubs16:
    .set vector, 0
    .rept 32
    .byte 0x6a, vector
    .byte 0xe9
    .word modes_exception16 - . - 2
    .set vector, vector + 1
    .endr
modes_exception16:
    push ax
    xor ax, ax
    mov ds, ax
    pop ax
    mov [REGS], eax
    mov [REGS + 4], ebx
    mov [REGS + 8], ecx
    mov [REGS + 12], edx
    mov [REGS + 16], esi
    mov [REGS + 20], edi
    mov [REGS + 24], ebp
    xor eax, eax
    pop ax
    mov [CTX + 56], eax
    pop ax
    mov [CTX + 64], eax
    mov sp, CTX - 16
    cld
    jmp modes_back16

    .global modes_blob_end
modes_blob_end:
    .code64
    .text
    "#,
    context = const CONTEXT,
    blob = const BLOB,
    code16 = const CODE16,
    code32 = const CODE32,
    code64 = const CODE64,
    data = const DATA,
    data16 = const DATA16,
    kind_real = const KIND_REAL,
    kind_compat = const KIND_COMPAT,
);

/// What a payload did.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Registers at its end or at its fault.
    pub registers: Registers,
    /// Flags then.
    pub eflags: u32,
    /// The exception that ended it. RIP is IP or EIP.
    pub fault: Option<Fault>,
}

/// An assembled payload: everything between two labels.
#[derive(Clone, Copy, Debug)]
pub struct Payload {
    start: *const u8,
    end: *const u8,
}

impl Payload {
    /// From the addresses of its first byte and of the byte behind its last.
    pub const fn new(start: *const u8, end: *const u8) -> Payload {
        Payload { start, end }
    }
}

/// Defines a payload: a name, 16 or 32, and its assembly. It is entered with CALL and ends with RET; labels count from
/// `here` as they lie at [`PAYLOAD`]: write `(label - NAME_start + 0x8000)` for an address.
#[macro_export]
macro_rules! payload {
    ($name:ident, $start:ident, $end:ident, $bits:literal, $($asm:literal),+ $(,)?) => {
        core::arch::global_asm!(
            ".section .rodata.payload, \"a\"",
            concat!(".global ", stringify!($start)),
            concat!(".global ", stringify!($end)),
            concat!(stringify!($start), ":"),
            concat!(".code", $bits),
            $($asm,)+
            concat!(stringify!($end), ":"),
            ".code64",
            ".text",
        );
        extern "C" {
            static $start: u8;
            static $end: u8;
        }
        fn $name() -> $crate::modes::Payload {
            $crate::modes::Payload::new(&raw const $start, &raw const $end)
        }
    };
}

fn context() -> *mut Context {
    CONTEXT as *mut Context
}

fn copy(from: *const u8, to: u64, len: u64) {
    (0..len).for_each(|at| poke(to + at, peek::<u8>(from as u64 + at)));
}

fn install() {
    let (blob, end) = (&raw const modes_blob, &raw const modes_blob_end);
    copy(blob, BLOB, end as u64 - blob as u64);
    // 32-bit interrupt gates. AMD APM vol. 2, 4.7.4.
    let stubs32 = &raw const modes_stubs32 as u64 - blob as u64 + BLOB;
    let mut at = stubs32;
    for vector in 0..32u64 {
        poke(IDT32 + vector * 8, at as u32 & 0xffff | u32::from(CODE32) << 16);
        poke(IDT32 + vector * 8 + 4, at as u32 & 0xffff_0000 | 0x8e00);
        at += 8;
        // The common jump sits behind the sixteenth stub.
        if vector == 15 {
            at = stubs32 + STUBS32_SECOND_HALF;
        }
    }
    (32..GATES32).for_each(|vector| poke(IDT32 + vector * 8, 0u64));
    // Real-mode vectors: segment 0.
    let stubs16 = &raw const modes_stubs16 as u64 - blob as u64 + BLOB;
    for vector in 0..32u64 {
        poke(vector * 4, (stubs16 + vector * 5) as u32);
    }
}

/// Sixteen stubs of eight bytes, the common jump and its detour, rounded up to the stubs' alignment.
const STUBS32_SECOND_HALF: u64 = 16 * 8 + 8;

/// Identity tables for a 32-bit mode: the first 4 MiB and the APICs at least, all of 4 GiB with large pages.
fn tables(mode: Mode) -> u64 {
    const FLAGS: u32 = 7;
    (0..8 * PAGE / 8).for_each(|word| poke(TABLES + word * 8, 0u64));
    let table = |index: u64| TABLES + index * PAGE;
    match mode {
        Mode::Paged => {
            let devices = 0xfec0_0000u32;
            for page in 0..1024u32 {
                poke(table(1) + u64::from(page) * 4, page << 12 | FLAGS);
                poke(table(2) + u64::from(page) * 4, (devices + (page << 12)) | FLAGS | 0x10);
            }
            poke(table(0), table(1) as u32 | FLAGS);
            poke(table(0) + u64::from(devices >> 22) * 4, table(2) as u32 | FLAGS);
        }
        Mode::Pse => {
            (0..1024u32).for_each(|page| poke(table(0) + u64::from(page) * 4, page << 22 | FLAGS | 0x80));
        }
        Mode::Pae => {
            for quarter in 0..4u64 {
                poke(table(0) + quarter * 8, table(1 + quarter) | 1);
                for page in 0..512u64 {
                    poke(
                        table(1 + quarter) + page * 8,
                        ((quarter << 30) + (page << 21)) | u64::from(FLAGS) | 0x80,
                    );
                }
            }
        }
        Mode::Real | Mode::Protected | Mode::Compat => {}
    }
    TABLES
}

/// The address of the page tables of `Paged`, `Pse` and `Pae`, for payloads that change them.
pub fn page_directory() -> u64 {
    TABLES
}

/// Runs `payload` in `mode`.
pub fn run(mode: Mode, payload: Payload, registers: Registers) -> Outcome {
    let cr3 = prepare(mode, payload);
    run_prepared(mode, registers, cr3)
}

/// Makes everything ready for [`run_prepared`] and returns the address of the page tables, for cases that change
/// something of it first.
pub fn prepare(mode: Mode, payload: Payload) -> u64 {
    install();
    copy(payload.start, PAYLOAD.into(), payload.end as u64 - payload.start as u64);
    tables(mode)
}

/// Replaces a gate of the IDT of the 32-bit modes until the next [`prepare`]. `vector` is below 64.
pub fn set_gate32(vector: u8, gate: u64) {
    poke(IDT32 + u64::from(vector) * 8, gate);
}

/// Runs what is at [`PAYLOAD`] already with the page tables as they are.
pub fn run_prepared(mode: Mode, registers: Registers, cr3: u64) -> Outcome {
    // PE, ET, NE; WP and PG with paging.
    let (kind, cr0, cr4) = match mode {
        Mode::Real => (KIND_REAL, 0x30, 0),
        Mode::Protected => (KIND_32, 0x31, 0),
        Mode::Paged => (KIND_32, 0x8001_0031, 0),
        Mode::Pse => (KIND_32, 0x8001_0031, 1 << 4),
        Mode::Pae => (KIND_32, 0x8001_0031, 1 << 5),
        Mode::Compat => (KIND_COMPAT, 0, 0),
    };
    go(kind, [cr0, cr3 as u32, cr4], registers, [machine::base_cr0(), crate::cpu::cr3(), crate::cpu::cr4()])
}

/// The same in a mode with paging, with values of CR0 and CR4 of one's own.
pub fn run_controls(mode: Mode, registers: Registers, cr3: u64, cr0: u64, cr4: u64) -> Outcome {
    let kind = if mode == Mode::Compat { KIND_COMPAT } else { KIND_32 };
    let back = [machine::base_cr0(), crate::cpu::cr3(), crate::cpu::cr4()];
    go(kind, [cr0 as u32, cr3 as u32, cr4 as u32], registers, back)
}

/// Leaves long mode and enters it again with another CR3 and CR4: the only way to change the number of levels.
pub fn switch_paging(cr3: u64, cr4: u64) {
    install();
    poke(PAYLOAD.into(), 0xc3u8);
    go(KIND_32, [0x31, 0, 0], Registers::default(), [machine::base_cr0(), cr3, cr4]);
}

fn go(kind: u32, [cr0, cr3, cr4]: [u32; 3], registers: Registers, back: [u64; 3]) -> Outcome {
    let pseudo = |base: u64, limit: u16| [limit, base as u16, (base >> 16) as u16, 0, 0];
    // SAFETY: low memory belongs to this module while a payload runs; the context is plain data.
    unsafe {
        context().write(Context {
            rsp: 0,
            cr0,
            cr3,
            cr4,
            kind,
            registers,
            eflags: 0,
            vector: NO_VECTOR,
            error: 0,
            eip: 0,
            cr2: 0,
            back_cr0: back[0] as u32,
            back_cr3: back[1] as u32,
            back_cr4: back[2] as u32,
            gdtr: [0; 5],
            idtr: [0; 5],
            idt32: pseudo(IDT32, GATES32 as u16 * 8 - 1),
            ivt: pseudo(0, 0x3ff),
            payload: PAYLOAD,
        });
    }
    // In compatibility mode exceptions arrive through the 64-bit IDT and end this `catch`.
    let caught = catch(|| {
        exec!("call {}", in(reg) BLOB, out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _)
    });
    // SAFETY: as above.
    let after = unsafe { context().read() };
    let mut fault = caught.err();
    let mut registers = after.registers;
    if fault.is_some() {
        let frame = crate::trap::last_frame();
        registers = Registers {
            eax: frame.rax as u32,
            ebx: frame.rbx as u32,
            ecx: frame.rcx as u32,
            edx: frame.rdx as u32,
            esi: frame.rsi as u32,
            edi: frame.rdi as u32,
            ebp: frame.rbp as u32,
        };
    } else if after.vector != NO_VECTOR {
        fault = Some(Fault {
            vector: after.vector as u8,
            error: after.error.into(),
            rip: after.eip.into(),
            cr2: after.cr2.into(),
            ..Fault::default()
        });
    }
    Outcome { registers, eflags: after.eflags & !(FLAG_IF as u32), fault }
}
