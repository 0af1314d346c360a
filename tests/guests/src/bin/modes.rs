//! Every mode of the processor and the ways between them, with instructions that a hypervisor emulates in each.
#![no_std]
#![no_main]
// Payloads are assembled into statics whose addresses are taken.
#![allow(unsafe_code)]
use guests::dev::{fw_cfg, ioapic, pic, pit};
use guests::frames;
use guests::machine;
use guests::modes::{self, Mode, Outcome, Payload, Registers, PAYLOAD, SCRATCH};
use guests::paging::{Space, ADDRESS, P, W};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, catch, BP, DE, GP, OF, PF, UD};
use guests::{main, payload};

main!(run);

payload!(nop32, nop32_start, nop32_end, "32", "ret");
payload!(nop16, nop16_start, nop16_end, "16", "ret");
// INC EAX is a REX prefix in 64-bit mode; the immediate would be two bytes in 16-bit mode.
payload!(width32, width32_start, width32_end, "32", "mov eax, 0x12345678", "inc eax", "ret");
payload!(width16, width16_start, width16_end, "16", "mov eax, 0x12345678", "mov ax, 0x1111", "inc ax", "ret");
payload!(
    memory32,
    memory32_start,
    memory32_end,
    "32",
    "mov [edi], esi",
    "add dword ptr [edi], 1",
    "mov eax, [edi]",
    "ret"
);
payload!(
    stack32,
    stack32_start,
    stack32_end,
    "32",
    "push 0x11223344",
    "pushad",
    "mov ebx, [esp + 32]",
    "mov [esp + 28], ebx",
    "popad",
    "add esp, 4",
    "ret"
);
payload!(cpuid32, cpuid32_start, cpuid32_end, "32", "cpuid", "ret");
payload!(
    ports32,
    ports32_start,
    ports32_end,
    "32",
    "mov al, 0x5a",
    "out 0x21, al",
    "xor eax, eax",
    "in al, 0x21",
    "mov bl, al",
    "mov al, 0xff",
    "out 0x21, al",
    "ret"
);
payload!(
    ioapic32,
    ioapic32_start,
    ioapic32_end,
    "32",
    "mov dword ptr [0xfec00000], 1",
    "mov eax, [0xfec00010]",
    "mov ebx, [0xfec00000]",
    "movzx ecx, byte ptr [0xfec00000]",
    "ret"
);
payload!(
    insb32,
    insb32_start,
    insb32_end,
    "32",
    "mov edx, 0x510",
    "xor eax, eax",
    "out dx, ax",
    "inc edx",
    "mov ecx, 4",
    "rep insb",
    "ret"
);
payload!(
    outsb32,
    outsb32_start,
    outsb32_end,
    "32",
    "mov edx, 0x3ff",
    "mov ecx, 4",
    "rep outsb",
    "in al, dx",
    "ret"
);
payload!(ud32, ud32_start, ud32_end, "32", "nop", "ud2", "ret");
payload!(div32, div32_start, div32_end, "32", "xor edx, edx", "xor ecx, ecx", "div ecx", "ret");
payload!(into32, into32_start, into32_end, "32", "mov al, 0x7f", "inc al", "into", "ret");
payload!(gp32, gp32_start, gp32_end, "32", "mov eax, 0x1000", "mov es, eax", "ret");
payload!(read32, read32_start, read32_end, "32", "mov eax, [edi]", "ret");
payload!(write32, write32_start, write32_end, "32", "mov [edi], eax", "ret");
payload!(
    efer32,
    efer32_start,
    efer32_end,
    "32",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "mov ebx, cr0",
    "mov esi, cr4",
    "ret"
);
// A data segment in GS, its selector in ECX: base and limit count.
payload!(segment32, segment32_start, segment32_end, "32", "mov gs, ecx", "mov eax, gs:[edi]", "ret");
payload!(
    segment_mmio32,
    segment_mmio32_start,
    segment_mmio32_end,
    "32",
    "mov gs, ecx",
    "mov dword ptr gs:[0], 1",
    "mov eax, gs:[0x10]",
    "ret"
);
payload!(bcd32, bcd32_start, bcd32_end, "32", "mov al, 0x19", "add al, 0x28", "daa", "movzx eax, al", "ret");
// INVLPG, MOV CR3, CR0.WP toggles: things that matter to a hypervisor in paged modes.
payload!(
    cr32,
    cr32_start,
    cr32_end,
    "32",
    "mov eax, cr3",
    "mov cr3, eax",
    "invlpg [edi]",
    "mov eax, cr0",
    "xor eax, 0x10000",
    "mov cr0, eax",
    "xor eax, 0x10000",
    "mov cr0, eax",
    "mov eax, [edi]",
    "ret"
);
payload!(
    lme_without_pae32,
    lme_start,
    lme_end,
    "32",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "ret"
);
payload!(
    remap32,
    remap32_start,
    remap32_end,
    "32",
    // EDI: the PTE; EBX: its new value; ESI: the address. Read, change, flush, read.
    "mov eax, [esi]",
    "mov [edi], ebx",
    "invlpg [esi]",
    "mov ecx, [esi]",
    "ret"
);
payload!(
    far16_from_32,
    far16_start,
    far16_end,
    "32",
    // 16-bit protected mode and back, with CPUID and IN in it.
    ".byte 0x9a",
    ".long (1f - far16_start + 0x8000)",
    ".word 0x20",
    "ret",
    ".code16",
    "1: xor eax, eax",
    "cpuid",
    "mov esi, eax",
    "in al, 0x21",
    "mov bp, 0x1234",
    ".byte 0x66, 0xcb",
    ".code32"
);

payload!(cpuid16, cpuid16_start, cpuid16_end, "16", "cpuid", "ret");
payload!(
    ports16,
    ports16_start,
    ports16_end,
    "16",
    "mov al, 0x5a",
    "out 0x21, al",
    "xor ax, ax",
    "in al, 0x21",
    "mov bl, al",
    "mov al, 0xff",
    "out 0x21, al",
    "ret"
);
payload!(
    insb16,
    insb16_start,
    insb16_end,
    "16",
    // ES:DI with a segment: 0x0980:0 is 0x9800.
    "mov dx, 0x510",
    "xor ax, ax",
    "out dx, ax",
    "inc dx",
    "mov ax, 0x980",
    "mov es, ax",
    "xor di, di",
    "mov cx, 4",
    "rep insb",
    "xor ax, ax",
    "mov es, ax",
    "ret"
);
payload!(
    outsb16,
    outsb16_start,
    outsb16_end,
    "16",
    // ES:SI by an override.
    "mov ax, 0x980",
    "mov es, ax",
    "xor si, si",
    "mov dx, 0x3ff",
    "mov cx, 3",
    ".byte 0x26, 0xf3, 0x6e",
    "in al, dx",
    "ret"
);
payload!(
    memory16,
    memory16_start,
    memory16_end,
    "16",
    "mov ax, 0x980",
    "mov ds, ax",
    "mov word ptr [0x10], 0x1234",
    "add word ptr [0x10], 1",
    "mov ax, [0x10]",
    "mov bx, ds",
    "xor cx, cx",
    "mov ds, cx",
    "ret"
);
payload!(
    int16,
    int16_start,
    int16_end,
    "16",
    // A handler of INT 60h: adds one to AX.
    ".byte 0xc7, 0x06",
    ".word 0x60 * 4, (1f - int16_start + 0x8000)",
    "mov word ptr [0x60 * 4 + 2], 0",
    "mov ax, 41",
    "int 0x60",
    "ret",
    "1: inc ax",
    "iret"
);
payload!(
    far16,
    farcall16_start,
    farcall16_end,
    "16",
    // The same code by another segment: 0x0800:1f.
    ".byte 0x9a",
    ".word (1f - farcall16_start), 0x0800",
    "mov bx, cs",
    "ret",
    "1: mov ax, cs",
    ".byte 0xcb"
);
payload!(ud16, ud16_start, ud16_end, "16", "nop", "ud2", "ret");
payload!(div16, div16_start, div16_end, "16", "xor dx, dx", "xor cx, cx", "div cx", "ret");
payload!(limit16, limit16_start, limit16_end, "16", "mov bx, 0xffff", "mov ax, [bx]", "ret");
payload!(int3_16, int3_16_start, int3_16_end, "16", "nop", "int3", "ret");
payload!(
    unreal16,
    unreal16_start,
    unreal16_end,
    "16",
    // Protected mode for a moment, to give FS a limit of 4 GiB; then MMIO and memory above 1 MiB from real mode.
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    "jmp 1f",
    "1: mov bx, 0x10",
    "mov fs, bx",
    "and al, 0xfe",
    "mov cr0, eax",
    "jmp 2f",
    "2:",
    "mov edi, 0xfec00000",
    "mov dword ptr fs:[edi], 1",
    "mov eax, fs:[edi + 0x10]",
    "mov ebx, fs:[esi]",
    "xor cx, cx",
    "mov fs, cx",
    "ret"
);
payload!(
    hlt16,
    hlt16_start,
    hlt16_end,
    "16",
    // PIT on vector 20h, three ticks, each ending a HLT.
    ".byte 0xc7, 0x06",
    ".word 0x20 * 4, (1f - hlt16_start + 0x8000)",
    "mov word ptr [0x20 * 4 + 2], 0",
    "xor bx, bx",
    "2: sti",
    "hlt",
    "cli",
    "cmp bx, 3",
    "jb 2b",
    "ret",
    "1: inc bx",
    "push ax",
    "mov al, 0x20",
    "out 0x20, al",
    "pop ax",
    "iret"
);
payload!(
    step16,
    step16_start,
    step16_end,
    "16",
    // Single step over CPUID and IN; the handler keeps the IPs of the first two.
    ".byte 0xc7, 0x06",
    ".word 4, (1f - step16_start + 0x8000)",
    "mov word ptr [1 * 4 + 2], 0",
    "xor bp, bp",
    "xor esi, esi",
    "pushf",
    "pop ax",
    "or ax, 0x100",
    "push ax",
    "xor eax, eax",
    "popf",
    "cpuid",
    "3: in al, 0x21",
    "4: nop",
    "pushf",
    "pop ax",
    "and ax, 0xfeff",
    "push ax",
    "popf",
    ".byte 0x66, 0xb9",
    ".long (3b - step16_start + 0x8000)",
    ".byte 0x66, 0xba",
    ".long (4b - step16_start + 0x8000)",
    "ret",
    "1: push bx",
    "mov bx, sp",
    "cmp bp, 0",
    "jne 5f",
    "mov si, ss:[bx + 2]",
    "5: cmp bp, 1",
    "jne 6f",
    "mov di, ss:[bx + 2]",
    "6: inc bp",
    "pop bx",
    "iret"
);
payload!(
    pg_without_pe16,
    pg16_start,
    pg16_end,
    "16",
    "mov eax, cr0",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "ret"
);
payload!(
    a20_16,
    a20_16_start,
    a20_16_end,
    "16",
    // FFFF:8010 is 0x108000, not 0x8000, when A20 is on.
    "mov ax, 0xffff",
    "mov es, ax",
    "mov eax, es:[0x8010]",
    "mov ebx, [0x8000]",
    "ret"
);
payload!(
    vm86,
    vm86_start,
    vm86_end,
    "32",
    // A 32-bit TSS (selector in ECX), then IRETD to virtual-8086 mode at 0800:1f.
    "ltr cx",
    "push 0",
    "push 0",
    "push 0",
    "push 0",
    "push 0",
    "push 0x5000",
    "push 0x23002",
    "push 0x800",
    ".byte 0x68",
    ".long (1f - vm86_start)",
    "iretd",
    ".code16",
    "1: mov ax, 0x4321",
    "mov bx, cs",
    "mov cx, 0x980",
    "mov ds, cx",
    "mov word ptr [0x20], 0x7777",
    "in al, 0x21",
    "hlt",
    ".code32"
);

fn run() {
    in_every_32_bit_mode();
    exceptions_32();
    paging_32();
    segments_32();
    real();
    switching();
    long();
}

/// A case per 32-bit mode: `prefix.mode.NAME`.
fn each(name: &str, run: impl Fn(&mut Case, Mode)) {
    for (mode, text) in [
        (Mode::Protected, "protected."),
        (Mode::Paged, "paged."),
        (Mode::Pse, "pse."),
        (Mode::Pae, "pae."),
        (Mode::Compat, "compat."),
    ] {
        let mut buffer = [0u8; 48];
        let len = text.len() + name.len();
        buffer[..text.len()].copy_from_slice(text.as_bytes());
        buffer[text.len()..len].copy_from_slice(name.as_bytes());
        case(core::str::from_utf8(&buffer[..len]).unwrap_or("mode"), |t| run(t, mode));
    }
}

/// Runs a payload that must not fault.
fn good(t: &mut Case, mode: Mode, payload: Payload, registers: Registers) -> Outcome {
    let outcome = modes::run(mode, payload, registers);
    t.check(outcome.fault.is_none(), format_args!("no fault in {mode:?} mode, got {:?}", outcome.fault));
    outcome
}

/// Runs a payload that must end in `vector`.
fn bad(
    t: &mut Case,
    mode: Mode,
    payload: Payload,
    registers: Registers,
    vector: u8,
    error: Option<u64>,
) -> trap::Fault {
    let outcome = modes::run(mode, payload, registers);
    t.faults("the payload", outcome.fault.map_or(Ok(()), Err), vector, error)
}

const NONE: Registers = Registers { eax: 0, ebx: 0, ecx: 0, edx: 0, esi: 0, edi: 0, ebp: 0 };

fn in_every_32_bit_mode() {
    each("enter_and_leave", |t, mode| {
        good(t, mode, nop32(), NONE);
        t.yes("long mode afterwards", rdmsr(MSR_EFER) & 0x400 != 0);
    });
    each("registers_pass", |t, mode| {
        let registers =
            Registers { eax: 0x8000_0001, ebx: 2, ecx: 3, edx: 4, esi: 5, edi: 6, ebp: 0xffff_fff7 };
        let outcome = good(t, mode, nop32(), registers);
        t.check(outcome.registers == registers, format_args!("{registers:x?}, got {:x?}", outcome.registers));
    });
    each("operand_width", |t, mode| {
        let got = good(t, mode, width32(), NONE);
        t.eq("EAX", got.registers.eax, 0x1234_5679u32);
    });
    each("memory", |t, mode| {
        let registers = Registers { esi: 0xfeed_0001, edi: SCRATCH, ..NONE };
        let got = good(t, mode, memory32(), registers);
        t.eq("EAX", got.registers.eax, 0xfeed_0002u32);
        t.eq("the dword", peek::<u32>(SCRATCH.into()), 0xfeed_0002u32);
    });
    each("memory_above_1m", |t, mode| {
        // The first 4 MiB are mapped in all modes; the image ends below.
        let at = 0x3f_f000;
        let old: u32 = peek(at);
        let registers = Registers { esi: 0x77, edi: at as u32, ..NONE };
        let got = good(t, mode, memory32(), registers);
        t.eq("EAX", got.registers.eax, 0x78u32);
        t.eq("the dword", peek::<u32>(at), 0x78u32);
        poke(at, old);
    });
    each("stack", |t, mode| {
        let got = good(t, mode, stack32(), NONE);
        t.eq("EAX", got.registers.eax, 0x1122_3344u32);
    });
    each("cpuid", |t, mode| {
        let got = good(t, mode, cpuid32(), Registers { eax: 1, ..NONE }).registers;
        t.eq("EAX", got.eax, cpuid(1, 0).eax);
        t.eq("EDX", got.edx, cpuid(1, 0).edx);
    });
    each("ports", |t, mode| {
        let got = good(t, mode, ports32(), NONE);
        t.eq("BL", got.registers.ebx & 0xff, 0x5au32);
    });
    each("mmio", |t, mode| {
        poke(ioapic::REGSEL, 1u32);
        let version: u32 = peek(ioapic::WIN);
        poke(ioapic::REGSEL, 0u32);
        let got = good(t, mode, ioapic32(), NONE).registers;
        t.eq("the version register", got.eax, version);
        t.eq("the index register", got.ebx, 1u32);
    });
    each("rep_insb", |t, mode| {
        if !fw_cfg::present() {
            return t.skip("no fw_cfg");
        }
        let got = good(t, mode, insb32(), Registers { edi: SCRATCH, ..NONE }).registers;
        t.eq("the bytes", peek::<u32>(SCRATCH.into()), u32::from_le_bytes(*b"QEMU"));
        t.eq("ECX", got.ecx, 0u32);
        t.eq("EDI", got.edi, SCRATCH + 4);
    });
    each("rep_outsb", |t, mode| {
        poke(SCRATCH.into(), 0x4433_2211u32);
        let got = good(t, mode, outsb32(), Registers { esi: SCRATCH, ..NONE }).registers;
        t.eq("the last byte, in the scratch register", got.eax & 0xff, 0x44u32);
        t.eq("ESI", got.esi, SCRATCH + 4);
    });
    each("bcd", |t, mode| {
        let got = good(t, mode, bcd32(), NONE);
        t.eq("19 + 28 in decimal", got.registers.eax, 0x47u32);
    });
    each("efer_and_control_registers", |t, mode| {
        let got = good(t, mode, efer32(), NONE).registers;
        let compat = mode == Mode::Compat;
        t.eq("EFER.LMA", got.eax >> 10 & 1, compat);
        t.eq("CR0.PG", got.ebx >> 31, mode != Mode::Protected);
        t.eq("CR4.PAE", got.esi >> 5 & 1, compat || mode == Mode::Pae);
    });
    each("sixteen_bit_segment", |t, mode| {
        let got = good(t, mode, far16_from_32(), NONE).registers;
        t.eq("the highest CPUID leaf", got.esi, cpuid(0, 0).eax);
        t.eq("AL, the mask of the PIC", got.eax & 0xff, 0xffu32);
        t.eq("BP", got.ebp, 0x1234u32);
    });
}

fn exceptions_32() {
    each("ud", |t, mode| {
        let fault = bad(t, mode, ud32(), NONE, UD, None);
        t.eq("EIP", fault.rip, PAYLOAD + 1);
    });
    each("divide_error", |t, mode| {
        let fault = bad(t, mode, div32(), NONE, DE, None);
        t.eq("EIP", fault.rip, PAYLOAD + 4);
    });
    each("into", |t, mode| {
        let fault = bad(t, mode, into32(), NONE, OF, None);
        t.eq("EIP, behind INTO", fault.rip, PAYLOAD + 5);
    });
    each("gp_with_selector", |t, mode| {
        bad(t, mode, gp32(), NONE, GP, Some(0x1000));
    });
}

fn paging_32() {
    case("paged.page_fault_read", |t| {
        let fault = bad(t, Mode::Paged, read32(), Registers { edi: 0x4000_0123, ..NONE }, PF, Some(0));
        t.eq("CR2", fault.cr2, 0x4000_0123u64);
    });
    case("paged.page_fault_write", |t| {
        let fault = bad(t, Mode::Paged, write32(), Registers { edi: 0x8000_0000, ..NONE }, PF, Some(2));
        t.eq("CR2", fault.cr2, 0x8000_0000u64);
    });
    for (name, mode) in [
        ("paged.reload_and_flush", Mode::Paged),
        ("pse.reload_and_flush", Mode::Pse),
        ("pae.reload_and_flush", Mode::Pae),
    ] {
        case(name, |t| {
            poke(SCRATCH.into(), 0x1357_9bdfu32);
            let got = good(t, mode, cr32(), Registers { edi: SCRATCH, ..NONE }).registers;
            t.eq("EAX", got.eax, 0x1357_9bdfu32);
        });
    }
    case("paged.remap", |t| {
        // The page at 0x3ff000 moves to SCRATCH's page.
        good(t, Mode::Paged, nop32(), NONE);
        let entry = modes::page_directory() + 0x1000 + 0x3ff * 4;
        let target = u64::from(SCRATCH) & ADDRESS;
        let old: u32 = peek(0x3f_f000);
        poke(0x3f_f000, 0xaaaa_aaaau32);
        let first: u32 = peek(target);
        poke(target, 0xbbbb_bbbbu32);
        let registers = Registers { edi: entry as u32, ebx: target as u32 | 7, esi: 0x3f_f000, ..NONE };
        let got = good(t, Mode::Paged, remap32(), registers).registers;
        poke(target, first);
        poke(0x3f_f000, old);
        t.eq("before", got.eax, 0xaaaa_aaaau32);
        t.eq("after", got.ecx, 0xbbbb_bbbbu32);
    });
    case("pae.no_execute_ignored_data", |t| {
        // Data access through a page with NX works, with EFER.NXE left on from long mode.
        good(t, Mode::Pae, nop32(), NONE);
        let entry = modes::page_directory() + 0x1000 + 8;
        let old: u64 = peek(entry);
        poke(entry, old | 1 << 63);
        let outcome = modes::run_prepared(Mode::Pae, NONE, modes::page_directory());
        poke(entry, old);
        t.yes("no fault", outcome.fault.is_none());
    });
    case("pae.pdpte_not_present", |t| {
        let outcome = {
            good(t, Mode::Pae, read32(), Registers { edi: SCRATCH, ..NONE });
            poke(modes::page_directory() + 8, 0u64);
            modes::run_prepared(Mode::Pae, Registers { edi: 0x4000_0000, ..NONE }, modes::page_directory())
        };
        let fault = t.faults("a read in the second GiB", outcome.fault.map_or(Ok(()), Err), PF, Some(0));
        t.eq("CR2", fault.cr2, 0x4000_0000u64);
    });
    case("pse.above_ram_reads_do_not_fault", |t| {
        // 4 MiB pages reach all of the 32-bit space: the hole below 4 GiB answers somehow.
        good(t, Mode::Pse, read32(), Registers { edi: 0xd000_0000, ..NONE });
    });
}

fn segments_32() {
    // Base 0x9800, limit 0xff, byte granularity, writable data.
    let small = 0x0040_9300_9800_00ffu64;
    for (name, mode) in [
        ("protected.segment_base", Mode::Protected),
        ("paged.segment_base", Mode::Paged),
        ("compat.segment_base", Mode::Compat),
    ] {
        case(name, |t| {
            machine::set_descriptor(machine::SCRATCH, small);
            poke(u64::from(SCRATCH) + 0x10, 0x2468_ace0u32);
            let registers = Registers { ecx: machine::SCRATCH.into(), edi: 0x10, ..NONE };
            let got = good(t, mode, segment32(), registers);
            t.eq("a load through GS", got.registers.eax, 0x2468_ace0u32);
        });
    }
    case("protected.segment_limit", |t| {
        if t.skip_on_tcg("segment limits are not checked") {
            return;
        }
        machine::set_descriptor(machine::SCRATCH, small);
        let registers = Registers { ecx: machine::SCRATCH.into(), edi: 0xfd, ..NONE };
        bad(t, Mode::Protected, segment32(), registers, GP, Some(0));
    });
    for (name, mode) in [
        ("protected.segment_mmio", Mode::Protected),
        ("pse.segment_mmio", Mode::Pse),
        ("compat.segment_mmio", Mode::Compat),
    ] {
        case(name, |t| {
            // Base FEC00000: the emulated access has a segment base.
            machine::set_descriptor(machine::SCRATCH, 0xfe40_93c0_0000_ffff);
            poke(ioapic::REGSEL, 1u32);
            let version: u32 = peek(ioapic::WIN);
            let registers = Registers { ecx: machine::SCRATCH.into(), ..NONE };
            let got = good(t, mode, segment_mmio32(), registers);
            t.eq("the version register", got.registers.eax, version);
        });
    }
    case("protected.virtual_8086", |t| {
        if t.skip_on_bochs_svm("a #VMEXIT in virtual-8086 mode ends Bochs itself") {
            return;
        }
        // A 32-bit TSS at SCRATCH + 0x100 with ESP0 and SS0. AMD APM vol. 2, 12.2.2.
        let tss = u64::from(SCRATCH) + 0x100;
        (0..0x2100 / 4).for_each(|word| poke(tss + word * 4, 0u32));
        poke(tss + 4, 0x5800u32);
        poke(tss + 8, u32::from(machine::DATA));
        poke(tss + 0x64, 0x68u32 << 16);
        // The I/O permission map behind it is all zero: IN is allowed.
        machine::set_descriptor(machine::SCRATCH, 0x0000_8900_0000_0000 | 0x2100 | tss << 16);
        let registers = Registers { ecx: machine::SCRATCH.into(), ..NONE };
        let outcome = modes::run(Mode::Protected, vm86(), registers);
        machine::load_tss();
        t.faults("HLT in virtual-8086 mode", outcome.fault.map_or(Ok(()), Err), GP, Some(0));
        t.eq("AX, its low half the mask of the PIC", outcome.registers.eax & 0xffff, 0x43ffu32);
        t.eq("BX, its CS", outcome.registers.ebx & 0xffff, 0x800u32);
        t.eq("EFLAGS.VM", outcome.eflags >> 17 & 1, 1u32);
        t.eq("the word written through DS", peek::<u16>(u64::from(SCRATCH) + 0x20), 0x7777u16);
    });
}

fn real() {
    let go = |t: &mut Case, payload: Payload, registers: Registers| {
        good(t, Mode::Real, payload, registers).registers
    };
    case("real.enter_and_leave", |t| {
        let registers = Registers { eax: 1, ebx: 2, ecx: 3, edx: 4, esi: 5, edi: 6, ebp: 7 };
        let got = go(t, nop16(), registers);
        t.check(got == registers, format_args!("{registers:x?}, got {got:x?}"));
    });
    case("real.operand_width", |t| {
        let got = go(t, width16(), NONE);
        t.eq("EAX", got.eax, 0x1234_1112u32);
    });
    case("real.cpuid", |t| {
        let got = go(t, cpuid16(), Registers { eax: 1, ..NONE });
        t.eq("EAX", got.eax, cpuid(1, 0).eax);
        t.eq("EDX", got.edx, cpuid(1, 0).edx);
    });
    case("real.ports", |t| {
        let got = go(t, ports16(), NONE);
        t.eq("BL", got.ebx & 0xff, 0x5au32);
    });
    case("real.memory", |t| {
        let got = go(t, memory16(), NONE);
        t.eq("AX", got.eax & 0xffff, 0x1235u32);
        t.eq("BX, its DS", got.ebx & 0xffff, 0x980u32);
        t.eq("the word", peek::<u16>(u64::from(SCRATCH) + 0x10), 0x1235u16);
    });
    case("real.rep_insb", |t| {
        if !fw_cfg::present() {
            return t.skip("no fw_cfg");
        }
        let got = go(t, insb16(), NONE);
        t.eq("the bytes", peek::<u32>(SCRATCH.into()), u32::from_le_bytes(*b"QEMU"));
        t.eq("CX", got.ecx & 0xffff, 0u32);
        t.eq("DI", got.edi & 0xffff, 4u32);
    });
    case("real.rep_outsb_with_override", |t| {
        poke(SCRATCH.into(), 0x4433_2211u32);
        let got = go(t, outsb16(), NONE);
        t.eq("the last byte, in the scratch register", got.eax & 0xff, 0x33u32);
        t.eq("SI", got.esi & 0xffff, 3u32);
    });
    case("real.interrupt_vector_table", |t| {
        let got = go(t, int16(), NONE);
        t.eq("AX", got.eax & 0xffff, 42u32);
    });
    case("real.far_call", |t| {
        let got = go(t, far16(), NONE);
        t.eq("CS there", got.eax & 0xffff, 0x800u32);
        t.eq("CS here", got.ebx & 0xffff, 0u32);
    });
    case("real.ud", |t| {
        let fault = bad(t, Mode::Real, ud16(), NONE, UD, None);
        t.eq("IP", fault.rip, PAYLOAD + 1);
    });
    case("real.divide_error", |t| {
        let fault = bad(t, Mode::Real, div16(), NONE, DE, None);
        t.eq("IP", fault.rip, PAYLOAD + 4);
    });
    case("real.breakpoint", |t| {
        let fault = bad(t, Mode::Real, int3_16(), NONE, BP, None);
        t.eq("IP, behind INT3", fault.rip, PAYLOAD + 2);
    });
    case("real.word_at_the_segment_end", |t| {
        if !t.skip_on_tcg("segment limits are not checked") {
            bad(t, Mode::Real, limit16(), NONE, GP, None);
        }
    });
    case("real.unreal_mode", |t| {
        poke(ioapic::REGSEL, 1u32);
        let version: u32 = peek(ioapic::WIN);
        let frame = frames::page();
        poke(frame, 0x600d_cafeu32);
        let got = go(t, unreal16(), Registers { esi: frame as u32, ..NONE });
        t.eq("the I/O APIC's version", got.eax, version);
        t.eq("memory above 1 MiB", got.ebx, 0x600d_cafeu32);
    });
    case("real.interrupts_and_hlt", |t| {
        pic::unmask(0);
        pit::program(0, 2, 5000);
        let got = go(t, hlt16(), NONE);
        pit::stop();
        pic::mask_all();
        t.within("ticks", u64::from(got.ebx & 0xffff), 3, 100);
    });
    case("real.single_step_over_emulated", |t| {
        let got = go(t, step16(), NONE);
        t.eq("IP after CPUID", got.esi & 0xffff, got.ecx);
        t.eq("IP after IN", got.edi & 0xffff, got.edx);
    });
    case("real.a20_is_on", |t| {
        poke(0x10_8000, peek::<u32>(0x10_8000));
        let high: u32 = peek(0x10_8000);
        let got = go(t, a20_16(), NONE);
        t.eq("the dword at 1 MiB and 32 KiB", got.eax, high);
        t.check(got.eax != got.ebx, format_args!("not the payload's own bytes {:#x}, got them", got.ebx));
    });
    case("real.pg_without_pe", |t| {
        let skipped = t.skip_on_tcg("CR0 is not checked") || t.skip_on_bochs_svm("PG can be set without PE");
        if !skipped {
            bad(t, Mode::Real, pg_without_pe16(), NONE, GP, None);
        }
    });
}

fn switching() {
    case("switch.hundred_round_trips", |t| {
        for round in 0..100u32 {
            let registers = Registers { ecx: round, ..NONE };
            let got = good(t, Mode::Real, nop16(), registers);
            t.eq("ECX", got.registers.ecx, round);
            for mode in Mode::ALL_32 {
                let got = good(t, mode, nop32(), registers);
                t.eq("ECX", got.registers.ecx, round);
            }
        }
    });
    case("switch.control_registers_restored", |t| {
        let before = (cr0(), cr3(), cr4(), rdmsr(MSR_EFER));
        for mode in Mode::ALL_32 {
            good(t, mode, nop32(), NONE);
        }
        good(t, Mode::Real, nop16(), NONE);
        let after = (cr0(), cr3(), cr4(), rdmsr(MSR_EFER));
        t.check(before == after, format_args!("{before:x?}, got {after:x?}"));
    });
    case("switch.mmio_in_turns", |t| {
        // The same addresses decoded in 32-bit and 64-bit mode one after the other.
        poke(ioapic::REGSEL, 1u32);
        let version: u32 = peek(ioapic::WIN);
        for _ in 0..10 {
            for mode in Mode::ALL_32 {
                let got = good(t, mode, ioapic32(), NONE);
                t.eq("the version register", got.registers.eax, version);
            }
            t.eq("the version register in 64-bit mode", ioapic::read(1), version);
        }
    });
}

fn long() {
    case("long.lme_without_pae", |t| {
        // Setting PG with LME and without PAE is #GP. AMD APM vol. 2, 14.6.1.
        if !t.skip_on_tcg("CR0 is not checked") {
            bad(t, Mode::Protected, lme_without_pae32(), NONE, GP, Some(0));
        }
    });
    case("long.five_levels", |t| {
        if !has(7, 0, |r| r.ecx, 16) {
            return t.skip("no LA57");
        }
        let (cr3, cr4) = (cr3(), cr4());
        // A PML5 whose first entry is the PML4 in use; its entry 8 gets a page of its own.
        let root = frames::page();
        poke(root, (cr3 & ADDRESS) | P | W);
        let inner = Space { root: frames::page() };
        let address = 8u64 << 48 | 0x1234_5000;
        let frame = inner.map_new(address & 0xffff_ffff_ffff, P | W);
        poke(root + 8 * 8, inner.root | P | W);
        modes::switch_paging(root, cr4 | CR4_LA57);
        let inside = catch(|| {
            poke(address, 0x5555_aaaau32);
            (guests::cpu::cr4(), peek::<u32>(address), cpuid(0, 0).eax)
        });
        let missing = catch(|| peek::<u8>(9 << 48));
        let version = catch(|| ioapic::read(1));
        modes::switch_paging(cr3, cr4);
        if let Some((seen, value, leaf)) = t.works("access with 57-bit addresses", inside) {
            t.yes("CR4.LA57 set", seen & CR4_LA57 != 0);
            t.eq("the value there", value, 0x5555_aaaau32);
            t.eq("CPUID", leaf, cpuid(0, 0).eax);
        }
        t.faults("a missing PML5 entry", missing, PF, Some(0));
        if let Some(version) = t.works("MMIO with five levels", version) {
            t.eq("the version register", version, ioapic::read(1));
        }
        t.eq("the value through the frame", peek::<u32>(frame), 0x5555_aaaau32);
        t.eq("CR4 afterwards", guests::cpu::cr4(), cr4);
    });
    case("long.address_57_is_noncanonical_with_four_levels", |t| {
        t.faults("a read", catch(|| peek::<u8>(8 << 48)), GP, Some(0));
    });
}
