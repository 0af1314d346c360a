# Entry from a boot loader: 32-bit protected mode, paging off, flat segments, no stack, interrupts off.
#
# Two entry points, one path: say on COM1 who called, check for long mode, identity-map the first 4 GiB by 2 MiB
# pages, enter long mode, call Rust. EBX holds the loader's information block all the way.

# Multiboot2 specification, section 3.1.1: the header, in the first 32 KiB of the file, 8-aligned.
.section .boot.multiboot2, "a", @progbits
.balign 8
mb2_header:
    .long 0xe85250d6                                # magic
    .long 0                                         # architecture: 32-bit protected mode of i386
    .long mb2_header_end - mb2_header
    .long -(0xe85250d6 + (mb2_header_end - mb2_header))
    # Information request (section 3.1.6), optional: modules, memory map, framebuffer, RSDP old and
    # new, and for the boot report the loader's name and the EFI system table.
    .balign 8
mb2_request:
    .short 1, 1
    .long mb2_request_end - mb2_request
    .long 2, 3, 6, 8, 12, 14, 15
mb2_request_end:
    # Framebuffer, optional (section 3.1.10), with a size that every screen has and 32 bits a pixel, which GRUB tries
    # first; any other, and the loader's text mode, will do.
    .balign 8
    .short 5, 1
    .long 20, 1024, 768, 32
    # Modules on page boundaries (section 3.1.12).
    .balign 8
    .short 6, 0
    .long 8
    # End of tags.
    .balign 8
    .short 0, 0
    .long 8
mb2_header_end:

# XEN_ELFNOTE_PHYS32_ENTRY (Xen public/elfnote.h, 18): where a PVH loader jumps.
.section .note.Xen, "a", @note
.balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad _start_pvh

.section .boot.text, "ax", @progbits
.code32

.global _start_multiboot2
_start_multiboot2:
    cli
    cld
    mov $__boot_stack_top, %esp
    mov %eax, %ebp
    call serial_init
    mov $0, %edi
    mov $said_multiboot2, %esi
    cmp $0x36d76289, %ebp                           # Multiboot2, section 3.3
    je entered
    mov $no_protocol, %esi
    jmp refuse

.global _start_pvh
_start_pvh:
    cli
    cld
    mov $__boot_stack_top, %esp
    call serial_init
    mov $1, %edi
    mov $said_pvh, %esi

# ESI: what to say; EDI: protocol for Rust; EBX: information block.
entered:
    call print
    mov %edi, %ebp

    # CPUID exists when EFLAGS.ID can be toggled (Intel SDM vol. 1, 20.1.2).
    pushf
    pop %eax
    mov %eax, %ecx
    xor $(1 << 21), %eax
    push %eax
    popf
    pushf
    pop %eax
    push %ecx
    popf
    mov $no_long_mode, %esi
    xor %ecx, %eax
    test $(1 << 21), %eax
    jz refuse

    # Long mode is CPUID 8000_0001h EDX[29].
    push %ebx
    mov $0x80000000, %eax
    cpuid
    cmp $0x80000001, %eax
    jb 1f
    mov $0x80000001, %eax
    cpuid
    bt $29, %edx
    jc 2f
1:  mov $no_long_mode, %esi
    jmp refuse
2:  pop %ebx

    # Loaders zero .bss; one that does not would cost days. Nothing lives on the stack here.
    mov $__bss_start, %edi
    mov $__bss_end, %ecx
    sub %edi, %ecx
    shr $2, %ecx
    xor %eax, %eax
    rep stosl

    # Page tables: one PML4 entry, four PDPT entries, four directories of 512 pages of 2 MiB.
    movl $(boot_pdpt + 3), boot_pml4                # 3: present, writable
    mov $boot_pdpt, %edi
    mov $(boot_directories + 3), %eax
    mov $4, %ecx
3:  mov %eax, (%edi)
    add $0x1000, %eax
    add $8, %edi
    loop 3b
    mov $boot_directories, %edi
    mov $0x83, %eax                                 # present, writable, 2 MiB
    mov $2048, %ecx
4:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loop 4b

    # AMD APM vol. 2, 14.6: PAE, CR3, EFER.LME, then paging.
    mov %cr4, %eax
    or $(1 << 5), %eax
    mov %eax, %cr4
    mov $boot_pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $(1 << 8), %eax
    wrmsr
    mov %cr0, %eax
    or $((1 << 31) | (1 << 16)), %eax               # PG, WP
    mov %eax, %cr0
    lgdt boot_gdt_pointer
    ljmp $8, $long_mode

# Prints ESI, the whole end of the run, and stops.
refuse:
    push %esi
    mov $said_error, %esi
    call print
    pop %esi
    call print
    mov $said_end, %esi
    call print
5:  hlt
    jmp 5b

# COM1 to 115200 baud, 8 data bits, no parity, one stop bit, FIFO on. Clobbers EAX, EDX, ESI.
serial_init:
    mov $serial_setup, %esi
6:  lodsb
    test %al, %al
    jz 7f
    movzbl %al, %edx
    add $(0x3f8 - 1), %edx
    lodsb
    out %al, %dx
    jmp 6b
7:  ret

# Prints the string at ESI. A port that never becomes ready, or is absent (reads ones), delays but does not stop.
# Clobbers EAX, ECX, EDX, ESI.
print:
    lodsb
    test %al, %al
    jz 9f
    mov %al, %ah
    mov $0x4000, %ecx
    mov $(0x3f8 + 5), %edx
8:  in %dx, %al
    test $0x20, %al
    loopz 8b
    mov %ah, %al
    mov $0x3f8, %edx
    out %al, %dx
    jmp print
9:  ret

.code64
long_mode:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    mov $__boot_stack_top, %esp
    mov %ebp, %edi                                  # protocol
    mov %ebx, %esi                                  # information block
    xor %ebp, %ebp                                  # ends the chain of frames
    call umbra_enter
    ud2

.section .boot.rodata, "a", @progbits
# Pairs of (register + 1, value), ended by zero: interrupts off, divisor 1, 8n1, FIFO, DTR and RTS.
serial_setup:
    .byte 1 + 1, 0, 1 + 3, 0x80, 1 + 0, 1, 1 + 1, 0, 1 + 3, 3, 1 + 2, 0xc7, 1 + 4, 3, 0
said_multiboot2:
    .asciz "umbra: entered by Multiboot2\r\n"
said_pvh:
    .asciz "umbra: entered by PVH\r\n"
said_error:
    .asciz "umbra: error: "
no_protocol:
    .asciz "entered at the Multiboot2 entry point without its magic in EAX; load Umbra by Multiboot2 or by PVH"
no_long_mode:
    .asciz "this CPU has no long mode; Umbra needs a 64-bit x86 CPU"
said_end:
    .asciz "\r\numbra: end: status 65\r\n"

# Null, 64-bit code, data; accessed bits set, so that loading a segment never writes here.
.balign 8
boot_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
boot_gdt_pointer:
    .short 23
    .long boot_gdt

.section .bss.boot_tables, "aw", @nobits
.balign 4096
boot_pml4:
    .skip 4096
boot_pdpt:
    .skip 4096
boot_directories:
    .skip 4 * 4096
.text
