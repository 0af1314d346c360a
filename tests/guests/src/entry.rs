//! Multiboot 1 header, the 32-bit entry stub into long mode, and the hand-over to Rust.
use crate::{frames, machine, multiboot, platform, report, serial, trap, Racy};
use core::arch::global_asm;

/// Value of EAX at entry that a Multiboot 1 loader promises. Multiboot specification 0.6.96, 3.2.
pub const MULTIBOOT_MAGIC: u32 = 0x2bad_b002;

/// Six tables: PML4, PDPT and four page directories that map the first 4 GiB by 2 MiB pages.
#[repr(C, align(4096))]
pub struct BootTables(pub [[u64; 512]; 6]);

/// The page tables the guest starts with; 3 to 4 GiB is mapped uncached because devices live there.
pub static BOOT_TABLES: Racy<BootTables> = Racy::new(BootTables([[0; 512]; 6]));

#[repr(C, align(16))]
struct Stack([u8; 64 << 10]);
static STACK: Racy<Stack> = Racy::new(Stack([0; 64 << 10]));

extern "Rust" {
    fn guest_main();
}

global_asm!(
    r#"
    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 3, -(0x1badb002 + 3)   /* page-aligned modules, memory information */

    .section .text.entry, "ax"
    .code32
    .global _start32
_start32:
    cli
    cld
    lea esp, [{stack} + {stack_size}]
    mov ebp, eax
    mov esi, ebx
    /* PML4[0] -> PDPT, PDPT[0..4] -> the page directories. */
    lea edi, [{tables}]
    lea eax, [edi + 0x1003]
    mov [edi], eax
    lea eax, [edi + 0x2003]
    mov [edi + 0x1000], eax
    add eax, 0x1000
    mov [edi + 0x1008], eax
    add eax, 0x1000
    mov [edi + 0x1010], eax
    add eax, 0x1000
    mov [edi + 0x1018], eax
    /* 2048 entries of 2 MiB: present, writable, large; the last 512 uncached. */
    xor ecx, ecx
2:  mov eax, ecx
    shl eax, 21
    or eax, 0x83
    cmp ecx, 1536
    jb 3f
    or eax, 0x18
3:  mov [edi + ecx * 8 + 0x2000], eax
    inc ecx
    cmp ecx, 2048
    jb 2b
    mov cr3, edi
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, 0x80000001
    cpuid
    mov edi, edx
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    bt edi, 20                               /* NX */
    jnc 4f
    or eax, 0x800
4:  wrmsr
    mov eax, cr0
    or eax, 0x80010021                       /* PG, WP, NE, PE */
    and eax, 0x9fffffff                      /* not CD, not NW */
    mov cr0, eax
    lgdt [5f]
    push 8
    lea eax, [6f]
    push eax
    retf
    .balign 8
5:  .word 7 * 8 - 1
    .long 7f
    .balign 8
7:  .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0, 0, 0, 0
    .code64
6:  mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    lea rsp, [{stack} + {stack_size}]
    mov edi, ebp
    xor ebp, ebp
    call {enter}
    ud2
    .text
    "#,
    stack = sym STACK,
    stack_size = const core::mem::size_of::<Stack>(),
    tables = sym BOOT_TABLES,
    enter = sym enter,
);

/// First Rust code: EDI is the loader's magic, ESI the Multiboot information.
extern "C" fn enter(magic: u32, info: u32) -> ! {
    serial::init();
    let boot = multiboot::init(magic, info);
    frames::init(boot);
    trap::init();
    machine::init();
    platform::init();
    // SAFETY: `main!` defines the function with this signature.
    unsafe { guest_main() };
    report::finish()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    report::abort(format_args!("panic: expected none, got {info}"))
}
