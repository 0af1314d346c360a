//! Real mode in detail: what a BIOS or a boot loader does, and what a hypervisor that runs it in virtual-8086 mode could
//! get wrong.
#![no_std]
#![no_main]
// Payloads are assembled into statics whose addresses are taken.
#![allow(unsafe_code)]
use guests::dev::{pic, pit};
use guests::modes::{self, Mode, Payload, Registers, PAYLOAD, SCRATCH};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{Fault, GP, SS, UD};
use guests::{machine, main, payload};

main!(run);

const NONE: Registers = Registers { eax: 0, ebx: 0, ecx: 0, edx: 0, esi: 0, edi: 0, ebp: 0 };

payload!(
    flags,
    flags_start,
    flags_end,
    "16",
    // All of IOPL and NT can be set and cleared; bit 15 reads as 0, bit 1 as 1.
    "push 0x7000",
    "popf",
    "pushf",
    "pop ax",
    "push 0x0000",
    "popf",
    "pushf",
    "pop bx",
    "push 0xffff & ~0x100",
    "popf",
    "cli",
    "cld",
    "pushf",
    "pop cx",
    "push 0x2",
    "popf",
    // The 32-bit forms; VM and RF cannot be set.
    ".byte 0x66, 0x68",
    ".long 0x00273002",
    "popfd",
    "pushfd",
    "pop edx",
    "push 0x2",
    "popf",
    ".byte 0x66, 0x68",
    ".long 2",
    "popfd",
    "ret"
);
payload!(
    int_flags,
    int_flags_start,
    int_flags_end,
    "16",
    ".byte 0xc7, 0x06",
    ".word 0x60 * 4, (1f - int_flags_start + 0x8000)",
    "mov word ptr [0x60 * 4 + 2], 0",
    "push 0x7202",
    "popf",
    "mov si, sp",
    "int 0x60",
    "2: pushf",
    "pop dx",
    "cli",
    "push 2",
    "popf",
    "sub si, bp",
    ".byte 0xbf",
    ".word (2b - int_flags_start + 0x8000)",
    "ret",
    // AX: flags here; BX, CX: flags and IP that were pushed.
    "1: pushf",
    "pop ax",
    "mov bp, sp",
    "mov cx, [bp]",
    "mov bx, [bp + 4]",
    "iret"
);
payload!(
    thousand,
    thousand_start,
    thousand_end,
    "16",
    ".byte 0xc7, 0x06",
    ".word 0x61 * 4, (1f - thousand_start)",
    "mov word ptr [0x61 * 4 + 2], 0x0800",
    "xor eax, eax",
    "mov cx, 1000",
    "sti",
    "2: int 0x61",
    "loop 2b",
    "cli",
    "mov bx, cs",
    "ret",
    "1: inc eax",
    "sti",
    "iret"
);
payload!(stack_limit, stack_limit_start, stack_limit_end, "16", "mov bp, 0xffff", "mov ax, [bp]", "ret");
payload!(write_limit, write_limit_start, write_limit_end, "16", "mov bx, 0xfffd", "mov [bx], eax", "ret");
payload!(wide_offset, wide_offset_start, wide_offset_end, "16", "mov ebx, 0x10000", "mov al, [ebx]", "ret");
payload!(
    last_byte,
    last_byte_start,
    last_byte_end,
    "16",
    "mov bx, 0xffff",
    "mov al, [bx]",
    "mov bx, 0xfffe",
    "mov cx, [bx]",
    "ret"
);
payload!(
    far,
    far_start,
    far_end,
    "16",
    // JMP far, CALL far with 16-bit and 32-bit operands, directly and through memory.
    ".byte 0xea",
    ".word (1f - far_start), 0x0800",
    "1: mov ax, cs",
    ".byte 0x66, 0x9a",
    ".long (3f - far_start + 0x7000)",
    ".word 0x0100",
    ".byte 0xc7, 0x06",
    ".word 0x9800, (4f - far_start + 0x4000)",
    "mov word ptr [0x9802], 0x0400",
    ".byte 0xff, 0x1e",
    ".word 0x9800",
    // RETF n takes parameters off the stack.
    "mov si, sp",
    "push 1",
    "push 2",
    ".byte 0x9a",
    ".word (5f - far_start), 0x0800",
    "sub si, sp",
    ".byte 0xea",
    ".word (2f - far_start + 0x8000), 0",
    "2: mov di, cs",
    "ret",
    "3: mov bx, cs",
    ".byte 0x66, 0xcb",
    "4: mov cx, cs",
    ".byte 0xcb",
    "5: mov dx, cs",
    ".byte 0xca",
    ".word 4"
);
payload!(
    tables,
    tables_start,
    tables_end,
    "16",
    // SGDT and SIDT store a full base; LGDT with a 16-bit operand loads 24 bits of it.
    "sgdt [0x9800]",
    "sidt [0x9808]",
    "mov word ptr [0x9810], 0x77",
    "mov dword ptr [0x9812], 0x12345678",
    ".byte 0x0f, 0x01, 0x16, 0x10, 0x98",
    "sgdt [0x9818]",
    ".byte 0x66, 0x0f, 0x01, 0x16, 0x10, 0x98",
    // TCG stores 24 bits with a 16-bit operand.
    ".byte 0x66, 0x0f, 0x01, 0x06, 0x20, 0x98",
    ".byte 0x66, 0x0f, 0x01, 0x16, 0x00, 0x98",
    "ret"
);
payload!(
    moved_ivt,
    moved_ivt_start,
    moved_ivt_end,
    "16",
    // A copy of the table at 0xA000, in which INT 62h leads elsewhere.
    "cld",
    "xor si, si",
    "mov di, 0xa000",
    "mov cx, 0x200",
    "rep movsw",
    ".byte 0xc7, 0x06",
    ".word 0xa000 + 0x62 * 4, (1f - moved_ivt_start + 0x8000)",
    "mov word ptr [0xa000 + 0x62 * 4 + 2], 0",
    ".byte 0xc7, 0x06",
    ".word 0x62 * 4, (2f - moved_ivt_start + 0x8000)",
    "mov word ptr [0x62 * 4 + 2], 0",
    "mov word ptr [0x9800], 0x3ff",
    "mov dword ptr [0x9802], 0xa000",
    "xor eax, eax",
    "xor ebx, ebx",
    "lidt [0x9800]",
    "int 0x62",
    "mov dword ptr [0x9802], 0",
    "lidt [0x9800]",
    "int 0x62",
    "ret",
    "1: inc ax",
    "iret",
    "2: inc bx",
    "iret"
);
payload!(
    short_ivt,
    short_ivt_start,
    short_ivt_end,
    "16",
    // A table that ends behind #GP: INT 20h is beyond it.
    "mov word ptr [0x9800], 14 * 4 - 1",
    "mov dword ptr [0x9802], 0",
    "lidt [0x9800]",
    "int 0x20",
    "ret"
);
payload!(
    machine_registers,
    machine_registers_start,
    machine_registers_end,
    "16",
    "mov ecx, 0x277",
    "rdmsr",
    "mov esi, eax",
    "wrmsr",
    "rdtsc",
    "mov edi, eax",
    "rdtsc",
    "sub eax, edi",
    "mov edi, eax",
    "mov eax, 0x12345678",
    "mov dr0, eax",
    "xor eax, eax",
    "mov ebx, dr0",
    "mov dr0, eax",
    "mov eax, cr0",
    "mov edx, cr3",
    "mov ebp, cr4",
    "ret"
);
payload!(bad_msr, bad_msr_start, bad_msr_end, "16", "nop", "mov ecx, 0x1234567", "rdmsr", "ret");
payload!(
    cr0_ways,
    cr0_ways_start,
    cr0_ways_end,
    "16",
    // SMSW, CLTS, LMSW of TS and MP; LMSW into protected mode, which only MOV can leave.
    "smsw ax",
    "mov bx, 0xa",
    "lmsw bx",
    "smsw bx",
    "clts",
    "smsw cx",
    "mov dx, 1",
    "lmsw dx",
    "xor dx, dx",
    "lmsw dx",
    "smsw dx",
    "mov esi, cr0",
    "and esi, ~1",
    "mov cr0, esi",
    "smsw si",
    "ret"
);
payload!(
    cache_bits,
    cache_bits_start,
    cache_bits_end,
    "16",
    "mov eax, cr0",
    "mov edx, eax",
    "or eax, 0x40000000",
    "mov cr0, eax",
    "mov ebx, cr0",
    "or eax, 0x60000000",
    "mov cr0, eax",
    "mov ecx, cr0",
    "mov cr0, edx",
    "ret"
);
payload!(
    nw_alone,
    nw_alone_start,
    nw_alone_end,
    "16",
    "mov eax, cr0",
    "or eax, 0x20000000",
    "mov cr0, eax",
    "ret"
);
payload!(
    big_segments,
    big_segments_start,
    big_segments_end,
    "16",
    // All of ES, FS and GS big, then timer interrupts, software interrupts and segment loads between accesses above 1 MiB.
    ".byte 0xc7, 0x06",
    ".word 0x20 * 4, (7f - big_segments_start + 0x8000)",
    "mov word ptr [0x20 * 4 + 2], 0",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    "jmp 1f",
    "1: mov bx, 0x10",
    "mov es, bx",
    "mov fs, bx",
    "mov gs, bx",
    "and al, 0xfe",
    "mov cr0, eax",
    "jmp 2f",
    "2: xor ebp, ebp",
    "xor ebx, ebx",
    "3: sti",
    "mov ecx, 64",
    "xor edi, edi",
    "add edi, esi",
    "4: mov gs:[edi], ebx",
    "cmp gs:[edi], ebx",
    "jne 5f",
    "inc ebx",
    "add edi, 4",
    // The selector changes, and with it the base; the limit stays.
    "mov ax, 0x100",
    "mov es, ax",
    "mov eax, es:[edi - 0x1000 - 4]",
    "inc eax",
    "cmp eax, ebx",
    "jne 5f",
    "dec cx",
    "jnz 4b",
    "cli",
    "cmp bp, 3",
    "jb 3b",
    "5: cli",
    "xor ax, ax",
    "mov es, ax",
    "mov fs, ax",
    "mov gs, ax",
    "ret",
    "7: inc bp",
    "push ax",
    "mov al, 0x20",
    "out 0x20, al",
    "pop ax",
    "iret"
);
payload!(
    in_and_out,
    in_and_out_start,
    in_and_out_end,
    "16",
    // Protected mode entered and left many times; DS comes back with the limit of protected mode each time.
    "mov cx, 200",
    "xor ebx, ebx",
    "1: mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    "jmp 2f",
    "2: mov dx, 0x10",
    "mov gs, dx",
    "and al, 0xfe",
    "mov cr0, eax",
    "jmp 3f",
    "3: add ebx, gs:[esi]",
    "xor dx, dx",
    "mov gs, dx",
    "add ebx, gs:[esi]",
    "loop 1b",
    "ret"
);
payload!(
    stale_selector,
    stale_selector_start,
    stale_selector_end,
    "16",
    // The selector that protected mode left in FS has protected mode's base still, 0x9800; loaded anew, it is a paragraph.
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    "jmp 1f",
    "1: mov fs, cx",
    "and al, 0xfe",
    "mov cr0, eax",
    "jmp 2f",
    "2: mov edx, fs:[0x10]",
    "push fs",
    "pop fs",
    "mov ebx, fs:[0x10]",
    "xor ax, ax",
    "mov fs, ax",
    "mov eax, edx",
    "ret"
);
payload!(
    strings,
    strings_start,
    strings_end,
    "16",
    // REP with CX, and with ECX and 32-bit addresses; the segment of the source overridden; OUTS and INS; backwards.
    "cld",
    "mov ax, 0x980",
    "mov es, ax",
    "xor di, di",
    "mov al, 0x5a",
    "mov cx, 16",
    "rep stosb",
    "xor ax, ax",
    "mov es, ax",
    "mov esi, 0x9800",
    "mov edi, 0x9900",
    "mov ecx, 4",
    ".byte 0xf3, 0x66, 0x67, 0xa5",
    "mov eax, edi",
    "std",
    "mov si, 0x990f",
    "mov di, 0x9a0f",
    "mov cx, 16",
    "rep movsb",
    "mov bx, di",
    "mov edx, 0x80",
    "mov si, 0x980f",
    "mov cx, 16",
    "rep outsb",
    "cld",
    "mov bp, si",
    "mov dx, 0x21",
    "mov di, 0x9b00",
    "mov cx, 3",
    "rep insb",
    "ret"
);
payload!(
    modifies,
    modifies_start,
    modifies_end,
    "16",
    // The immediate of a MOV is counted up, a NOP becomes INC BX.
    "xor bx, bx",
    "mov cx, 300",
    ".byte 0xbf",
    ".word (1f - modifies_start + 0x8001)",
    "1: mov ax, 0x1000",
    "inc word ptr [di]",
    "loop 1b",
    "mov word ptr [di + 11], 0x9043",
    "jmp 2f",
    "2: nop",
    "nop",
    "ret"
);
payload!(
    addresses,
    addresses_start,
    addresses_end,
    "16",
    // 32-bit addressing with SIB, LEA, MOVZX, PUSHAD, ENTER and LEAVE.
    "mov eax, 0x4000",
    "mov ecx, 0x1600",
    "mov dword ptr [eax + ecx * 4 + 4], 0x89abcdef",
    "mov ebx, [0x9804]",
    "movzx edx, byte ptr [0x9806]",
    "lea esi, [eax + ecx * 2 + 0x12345]",
    "pushad",
    "mov bp, sp",
    "mov edi, [bp + 28]",
    "mov [bp], edi",
    "popad",
    "mov bp, 0x1111",
    "enter 8, 0",
    "leave",
    "ret"
);

payload!(lldt16, lldt16_start, lldt16_end, "16", "nop", ".byte 0x0f, 0x00, 0xd0", "ret");

fn run() {
    flag_cases();
    transfers();
    registers();
    segments();
    data();
}

fn good(t: &mut Case, payload: Payload, registers: Registers) -> Registers {
    let outcome = modes::run(Mode::Real, payload, registers);
    t.check(outcome.fault.is_none(), format_args!("no fault, got {:?}", outcome.fault));
    outcome.registers
}

fn bad(t: &mut Case, payload: Payload, vector: u8, ip: u32) -> Fault {
    let outcome = modes::run(Mode::Real, payload, NONE);
    let fault = t.faults("the payload", outcome.fault.map_or(Ok(()), Err), vector, None);
    t.eq("IP", fault.rip, PAYLOAD + ip);
    fault
}

fn flag_cases() {
    case("flags.pushf_and_popf", |t| {
        let got = good(t, flags(), NONE);
        t.eq("IOPL and NT set", got.eax & 0xffff, 0x7002u32);
        // Virtual-8086 mode, which has to do for real mode on old processors with VMX, keeps its IOPL.
        let kept = if guests::platform::bochs_vmx() { 0x3000 } else { 0 };
        t.eq("all clear", got.ebx & 0xffff & !kept, 2u32);
        t.eq("all set but TF, IF and DF", got.ecx & 0xffff, 0x78d7u32);
        t.eq("without VM and RF in 32 bits", got.edx, 0x24_3002u32);
    });
    case("flags.int_and_iret", |t| {
        let got = good(t, int_flags(), NONE);
        t.eq("IF inside", got.eax & 0x200, 0u32);
        t.eq("IOPL and NT inside", got.eax & 0x7000, 0x7000u32);
        t.eq("pushed flags", got.ebx & 0xffff, 0x7202u32);
        t.eq("pushed IP", got.ecx & 0xffff, got.edi & 0xffff);
        t.eq("flags afterwards", got.edx & 0xffff, 0x7202u32);
        t.eq("bytes pushed", got.esi & 0xffff, 6u32);
    });
    case("flags.thousand_interrupts", |t| {
        let got = good(t, thousand(), NONE);
        t.eq("calls", got.eax, 1000u32);
        t.eq("CS afterwards", got.ebx & 0xffff, 0u32);
    });
}

fn transfers() {
    case("far.jumps_calls_returns", |t| {
        let got = good(t, far(), NONE);
        t.eq("CS behind JMP", got.eax & 0xffff, 0x800u32);
        t.eq("CS behind CALL with a 32-bit operand", got.ebx & 0xffff, 0x100u32);
        t.eq("CS behind CALL through memory", got.ecx & 0xffff, 0x400u32);
        t.eq("CS in a call with parameters", got.edx & 0xffff, 0x800u32);
        t.eq("stack afterwards", got.esi & 0xffff, 0u32);
        t.eq("CS at the end", got.edi & 0xffff, 0u32);
    });
    case("tables.lgdt_sgdt_sidt", |t| {
        let got = modes::run(Mode::Real, tables(), NONE);
        t.check(got.fault.is_none(), format_args!("no fault, got {:?}", got.fault));
        let at = u64::from(SCRATCH);
        t.eq("limit of the GDT", peek::<u16>(at), 127u16);
        t.eq("its base", peek::<u32>(at + 2), machine::gdt() as u32);
        t.eq("limit of the table of interrupts", peek::<u16>(at + 8), 0x3ffu16);
        t.eq("its base", peek::<u32>(at + 10), 0u32);
        t.eq("a limit loaded", peek::<u16>(at + 0x18), 0x77u16);
        t.eq("24 bits of a base", peek::<u32>(at + 0x1a), 0x34_5678u32);
        t.eq("32 bits of a base", peek::<u32>(at + 0x22), 0x1234_5678u32);
    });
    case("tables.lidt_elsewhere", |t| {
        let got = good(t, moved_ivt(), NONE);
        t.eq("by the table at A000h", got.eax & 0xffff, 1u32);
        t.eq("by the table at 0", got.ebx & 0xffff, 1u32);
    });
    case("tables.vector_beyond_the_limit", |t| {
        bad(t, short_ivt(), GP, 20);
    });
}

fn registers() {
    case("registers.msr_tsc_dr_cr", |t| {
        let pat = rdmsr(MSR_PAT) as u32;
        let got = good(t, machine_registers(), NONE);
        t.eq("PAT", got.esi, pat);
        t.check(got.edi != 0, format_args!("a TSC that advances, got none"));
        t.eq("DR0", got.ebx, 0x1234_5678u32);
        t.eq("CR0 without ET and WP", got.eax & !0x1_0010, 0x20u32);
        t.eq("CR4", got.ebp, 0u32);
    });
    case("registers.unknown_msr", |t| {
        if guests::platform::umbra() {
            bad(t, bad_msr(), GP, 7);
        } else {
            t.skip("the platform's own matter");
        }
    });
    case("registers.smsw_lmsw_clts", |t| {
        let got = good(t, cr0_ways(), NONE);
        t.eq("before", got.eax & 0xf, 0u32);
        t.eq("MP and TS", got.ebx & 0xf, 0xau32);
        t.eq("MP after CLTS", got.ecx & 0xf, 2u32);
        t.eq("PE, which LMSW cannot clear", got.edx & 0xf, 1u32);
        t.eq("after MOV", got.esi & 0xf, 0u32);
    });
    case("registers.cache_disable", |t| {
        let got = good(t, cache_bits(), NONE);
        t.eq("CD", got.ebx >> 29 & 3, 2u32);
        t.eq("CD and NW", got.ecx >> 29 & 3, 3u32);
    });
    case("registers.nw_without_cd", |t| {
        if !t.skip_on_tcg("CR0 is not checked") {
            bad(t, nw_alone(), GP, 9);
        }
    });
}

fn segments() {
    case("segments.stack_fault_at_the_end", |t| {
        if !t.skip_on_tcg("segment limits are not checked") {
            bad(t, stack_limit(), SS, 3);
        }
    });
    case("segments.dword_write_across_the_end", |t| {
        if !t.skip_on_tcg("segment limits are not checked") {
            bad(t, write_limit(), GP, 3);
        }
    });
    case("segments.offset_above_64k", |t| {
        if !t.skip_on_tcg("segment limits are not checked") {
            bad(t, wide_offset(), GP, 6);
        }
    });
    case("segments.last_byte_and_word", |t| {
        poke(0xfffe, 0x4321u16);
        let got = good(t, last_byte(), NONE);
        t.eq("the byte", got.eax & 0xff, 0x43u32);
        t.eq("the word", got.ecx & 0xffff, 0x4321u32);
    });
    case("segments.big_with_interrupts", |t| {
        let frame = guests::frames::page();
        pic::unmask(0);
        pit::program(0, 2, 5000);
        let got = good(t, big_segments(), Registers { esi: frame as u32, ..NONE });
        pit::stop();
        pic::mask_all();
        t.eq("words still to do", got.ecx, 0u32);
        t.within("ticks", u64::from(got.ebp & 0xffff), 3, 10_000);
    });
    case("segments.protected_mode_and_back", |t| {
        let frame = guests::frames::page();
        poke(frame, 3u32);
        let got = good(t, in_and_out(), Registers { esi: frame as u32, ..NONE });
        t.eq("the sum", got.ebx, 1200u32);
    });
    case("segments.base_of_protected_mode", |t| {
        machine::set_descriptor(machine::SCRATCH, 0x0040_9300_9800_ffff);
        poke(u64::from(SCRATCH) + 0x10, 0x1357_9bdfu32);
        let paragraph = u64::from(machine::SCRATCH) << 4;
        let there: u32 = peek(paragraph + 0x10);
        let got = good(t, stale_selector(), Registers { ecx: machine::SCRATCH.into(), ..NONE });
        t.eq("a dword at protected mode's base", got.eax, 0x1357_9bdfu32);
        t.eq("a dword at the paragraph", got.ebx, there);
    });
}

fn data() {
    case("data.strings", |t| {
        let at = u64::from(SCRATCH);
        (0..0x400).for_each(|offset| poke(at + offset, 0u8));
        let got = good(t, strings(), NONE);
        for part in [0, 0x100, 0x200] {
            t.eq("a copy", peek::<u64>(at + part), 0x5a5a_5a5a_5a5a_5a5au64);
            t.eq("a copy's second half", peek::<u64>(at + part + 8), 0x5a5a_5a5a_5a5a_5a5au64);
            t.eq("what is behind", peek::<u32>(at + part + 16), 0u32);
        }
        t.eq("EDI of 32-bit MOVS", got.eax, 0x9910u32);
        t.eq("DI, backwards", got.ebx & 0xffff, 0x99ffu32);
        t.eq("SI of OUTS, backwards", got.ebp & 0xffff, 0x97ffu32);
        t.eq("DI of INS", got.edi & 0xffff, 0x9b03u32);
        t.eq("what INS read", peek::<u32>(at + 0x300), 0xff_ffffu32);
    });
    case("data.self_modifying_code", |t| {
        let got = good(t, modifies(), NONE);
        t.eq("AX", got.eax & 0xffff, 0x1000u32 + 299);
        t.eq("BX", got.ebx & 0xffff, 1u32);
    });
    case("data.addresses_and_operands", |t| {
        let got = good(t, addresses(), NONE);
        t.eq("EBX", got.ebx, 0x89ab_cdefu32);
        t.eq("EDX", got.edx, 0xabu32);
        t.eq("ESI", got.esi, 0x4000 + 0x2c00 + 0x1_2345u32);
        t.eq("EDI by PUSHAD and POPAD", got.edi, 0x4000u32);
        t.eq("BP by ENTER and LEAVE", got.ebp & 0xffff, 0x1111u32);
    });
    case("data.undefined", |t| {
        // LLDT is no instruction of real mode.
        bad(t, lldt16(), UD, 1);
    });
}
