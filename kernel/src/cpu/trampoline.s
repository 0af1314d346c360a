# Start-up code of a CPU: real mode to long mode within one page below 1 MiB, copied there and patched by smp.rs.
# The page is mapped for reading and execution only once paging is on. Intel SDM vol. 3 section 9.4, AMD APM vol. 2
# section 14.6.

.section .rodata.trampoline, "a", @progbits
.global umbra_trampoline
.global umbra_trampoline_data
.global umbra_trampoline_end

.code16
.balign 16
umbra_trampoline:
    cli
    cld
    mov %cs, %ax
    mov %ax, %ds
    # EBX: the page's physical address.
    xor %ebx, %ebx
    mov %cs, %bx
    shl $4, %ebx
    lgdtl (t_gdt_pointer - umbra_trampoline)
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl *(t_jump32 - umbra_trampoline)

.code32
t_protected:
    mov $16, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov (t_cr4 - umbra_trampoline)(%ebx), %eax
    mov %eax, %cr4
    mov (t_cr3 - umbra_trampoline)(%ebx), %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or (t_efer - umbra_trampoline)(%ebx), %eax
    wrmsr
    mov (t_cr0 - umbra_trampoline)(%ebx), %eax
    mov %eax, %cr0
    ljmp *(t_jump64 - umbra_trampoline)(%ebx)

.code64
t_long:
    mov %ebx, %ebx
    mov (t_stack - umbra_trampoline)(%rbx), %rsp
    mov (t_cpu - umbra_trampoline)(%rbx), %rdi
    mov (t_entry - umbra_trampoline)(%rbx), %rax
    xor %ebp, %ebp
    call *%rax
    ud2

.balign 16
t_gdt:
    # Null, 32-bit code, data, 64-bit code; accessed, since the page is read-only by then.
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff

# Patched by smp.rs, in the order of `struct Data` there.
.balign 16
umbra_trampoline_data:
t_gdt_pointer:
    .short 31
    .long t_gdt - umbra_trampoline
    .short 0
t_jump32:
    .long t_protected - umbra_trampoline
    .short 8, 0
t_jump64:
    .long t_long - umbra_trampoline
    .short 24, 0
t_cr0:
    .long 0
t_cr3:
    .long 0
t_cr4:
    .long 0
t_efer:
    .long 0
t_stack:
    .quad 0
t_cpu:
    .quad 0
t_entry:
    .quad 0
umbra_trampoline_end:
.text
.code64
