//! Addressing modes: every way to name the same device register.
use guests::dev::lapic;
use guests::exec;
use guests::paging::{Space, P, PCD, PLAYGROUND, W};
use guests::prelude::*;
use guests::report::{case, Case};

const REGISTER: u64 = lapic::BASE + lapic::TMICT as u64;
const VALUE: u32 = 0x0c0f_fee0;

/// One load of the register by some operand; RAX must be the value.
macro_rules! loads {
    ($t:expr, $what:literal, $asm:literal, $($operands:tt)*) => {{
        let value: u64;
        exec!($asm, out("rax") value, $($operands)*);
        $t.eq($what, value, VALUE);
    }};
}

fn prepare() {
    lapic::write(lapic::LVT_TIMER, lapic::MASKED);
    lapic::write(lapic::TMICT, VALUE);
}

fn addressing(name: &str, run: impl FnOnce(&mut Case)) {
    case(name, |t| {
        prepare();
        run(t);
    });
}

pub(crate) fn run() {
    let base = lapic::BASE;
    addressing("addressing.base", |t| {
        loads!(t, "[rdi]", "mov eax, [rdi]", in("rdi") REGISTER);
        loads!(t, "[r12]", "mov eax, [r12]", in("r12") REGISTER);
        loads!(t, "[r13]", "mov eax, [r13]", in("r13") REGISTER);
        loads!(t, "[r15]", "mov eax, [r15]", in("r15") REGISTER);
        let value: u64;
        exec!("mov eax, [rax]", inout("rax") REGISTER => value);
        t.eq("[rax]", value, VALUE);
    });
    addressing("addressing.displacement", |t| {
        loads!(t, "[rdi + disp8]", "mov eax, [rdi + 0x20]", in("rdi") REGISTER - 0x20);
        loads!(t, "[rdi - disp8]", "mov eax, [rdi - 0x20]", in("rdi") REGISTER + 0x20);
        loads!(t, "[rdi + disp32]", "mov eax, [rdi + 0x12345678]", in("rdi") REGISTER - 0x1234_5678);
        loads!(t, "[rdi - disp32]", "mov eax, [rdi - 0x12345678]", in("rdi") REGISTER + 0x1234_5678);
    });
    addressing("addressing.index", |t| {
        loads!(t, "[rdi + rsi]", "mov eax, [rdi + rsi]", in("rdi") base, in("rsi") 0x380u64);
        loads!(t, "[rdi + rsi * 2]", "mov eax, [rdi + rsi * 2]", in("rdi") base, in("rsi") 0x1c0u64);
        loads!(t, "[rdi + rsi * 4 + 8]", "mov eax, [rdi + rsi * 4 + 8]", in("rdi") base - 8, in("rsi") 0xe0u64);
        loads!(t, "[rdi + rsi * 8]", "mov eax, [rdi + rsi * 8]", in("rdi") base, in("rsi") 0x70u64);
        loads!(t, "[r13 + r14 * 8 + disp32]", "mov eax, [r13 + r14 * 8 + 0x1000]", in("r13") base - 0x1000,
            in("r14") 0x70u64);
        loads!(t, "[rsi * 8 + disp32] without a base", "mov eax, [rsi * 8 + 0x80]", in("rsi") (REGISTER - 0x80) / 8);
        loads!(t, "a negative index", "mov eax, [rdi + rsi * 4]", in("rdi") REGISTER + 0x400, in("rsi") -0x100i64);
    });
    addressing("addressing.stack_pointer_base", |t| {
        // RSP as the base, for one instruction.
        loads!(t, "[rsp]", "mov r8, rsp\n mov rsp, rdi\n mov eax, [rsp]\n mov rsp, r8", in("rdi") REGISTER, out("r8") _);
        loads!(t, "[rsp + disp8]", "mov r8, rsp\n mov rsp, rdi\n mov eax, [rsp + 16]\n mov rsp, r8",
            in("rdi") REGISTER - 16, out("r8") _);
        loads!(t, "[rbp + disp8]", "mov r8, rbp\n mov rbp, rdi\n mov eax, [rbp + 16]\n mov rbp, r8",
            in("rdi") REGISTER - 16, out("r8") _);
    });
    addressing("addressing.absolute", |t| {
        // MOV AL/eAX with a 64-bit offset.
        let value: u64;
        exec!("movabs eax, [0xfee00380]", out("rax") value);
        t.eq("a 64-bit offset", value, VALUE);
        let low: u64;
        exec!(".byte 0x67, 0xa1", ".long 0xfee00380", out("rax") low);
        t.eq("a 32-bit offset with 67h", low, VALUE);
        exec!("mov eax, 0x00112233", "movabs [0xfee00380], eax", out("rax") _);
        t.eq("a store with a 64-bit offset", lapic::read(lapic::TMICT), 0x0011_2233u32);
    });
    addressing("addressing.address_size_32", |t| {
        loads!(t, "[edi]", "mov eax, [edi]", in("rdi") 0xdead_0000_0000_0000u64 | REGISTER);
        loads!(t, "[edi + esi] wrapping at 32 bits", "mov eax, [edi + esi]", in("rdi") 0xffff_ff00u64,
            in("rsi") REGISTER + 0x100);
    });
    addressing("addressing.rip_relative", |t| {
        // Code in one page, the registers in the next.
        let space = Space::current();
        let code = PLAYGROUND + 0xb0_0000;
        space.map_new(code, P | W);
        space.map(code + 0x1000, lapic::BASE, 1, P | W | PCD);
        // The displacement counts from the end of the whole instruction, immediates included.
        let run = |opcode: &[u8], immediate: &[u8]| -> u64 {
            let end = code + (opcode.len() + 4 + immediate.len()) as u64;
            let displacement = (code + 0x1380 - end) as u32;
            let displacement = displacement.to_le_bytes();
            let bytes = opcode.iter().chain(&displacement).chain(immediate).chain(&[0xc3]);
            for (at, &byte) in (code..).zip(bytes) {
                poke(at, byte);
            }
            let value: u64;
            exec!("call {code}", code = in(reg) code, inout("rax") 0u64 => value);
            value
        };
        t.eq("mov eax, [rip + disp32]", run(&[0x8b, 0x05], &[]), VALUE);
        run(&[0xc7, 0x05], &0x7777_7777u32.to_le_bytes());
        t.eq("mov dword ptr [rip + disp32], imm32", lapic::read(lapic::TMICT), 0x7777_7777u32);
        run(&[0x83, 0x25], &[0x0f]);
        t.eq("and dword ptr [rip + disp32], imm8", lapic::read(lapic::TMICT), 7u32);
    });
    addressing("addressing.segment_bases", |t| {
        let (fs, gs) = (rdmsr(MSR_FS_BASE), rdmsr(MSR_GS_BASE));
        wrmsr(MSR_FS_BASE, base);
        wrmsr(MSR_GS_BASE, base - 0x1000);
        let (by_fs, by_gs): (u64, u64);
        exec!("mov eax, fs:[0x380]", out("rax") by_fs);
        exec!("mov eax, gs:[rdi + 0x1000]", in("rdi") 0x380u64, out("rax") by_gs);
        wrmsr(MSR_FS_BASE, fs);
        wrmsr(MSR_GS_BASE, gs);
        t.eq("FS:[disp32]", by_fs, VALUE);
        t.eq("GS:[rdi + disp32]", by_gs, VALUE);
        loads!(t, "ES: and DS:, without effect", ".byte 0x26\n mov eax, [rdi]", in("rdi") REGISTER);
    });
    addressing("addressing.other_mappings", |t| {
        let space = Space::current();
        space.map(PLAYGROUND + 0x40_0000, lapic::BASE, 1, P | W | PCD);
        loads!(t, "through a 4 KiB page", "mov eax, [rdi]", in("rdi") PLAYGROUND + 0x40_0380);
        space.map(PLAYGROUND + 0x80_0000, lapic::BASE & !0x1f_ffff, 2, P | W | PCD);
        loads!(t, "through a 2 MiB page", "mov eax, [rdi]",
            in("rdi") PLAYGROUND + 0x80_0000 + (REGISTER & 0x1f_ffff));
        // A high canonical address.
        let high = 0xffff_ff80_0000_0000u64;
        space.map(high, lapic::BASE, 1, P | W | PCD);
        loads!(t, "through a negative address", "mov eax, [rdi]", in("rdi") high + 0x380);
        if guests::paging::has_1g() {
            let window = PLAYGROUND + (2 << 30);
            space.map(window, lapic::BASE & !0x3fff_ffff, 3, P | W | PCD);
            loads!(t, "through a 1 GiB page", "mov eax, [rdi]", in("rdi") window + (REGISTER & 0x3fff_ffff));
        }
    });
    addressing("addressing.remapped_page", |t| {
        // The same linear address names the APIC, then RAM, then the APIC again: no stale decoding or translation.
        let space = Space::current();
        let at = PLAYGROUND + 0x60_0000;
        let frame = guests::frames::page();
        poke(frame + 0x380, 0x1111_2222u32);
        for _ in 0..20 {
            space.map(at, lapic::BASE, 1, P | W | PCD);
            t.eq("the register", peek::<u32>(at + 0x380), VALUE);
            space.map(at, frame, 1, P | W);
            t.eq("the RAM", peek::<u32>(at + 0x380), 0x1111_2222u32);
        }
    });
    addressing("addressing.changed_code", |t| {
        // The same code address holds different instructions one after the other: no stale decode.
        let code = PLAYGROUND + 0x70_0000;
        Space::current().map_new(code, P | W);
        let run = |bytes: &[u8]| -> u64 {
            bytes.iter().enumerate().for_each(|(at, &byte)| poke(code + at as u64, byte));
            let value: u64;
            exec!("call {code}", code = in(reg) code, inout("rax") 0u64 => value, in("rdi") REGISTER);
            value
        };
        for _ in 0..10 {
            t.eq("MOV", run(&[0x8b, 0x07, 0xc3]), VALUE);
            t.eq("ADD", run(&[0x03, 0x07, 0xc3]), VALUE);
            t.eq("MOV with a displacement", run(&[0x8b, 0x47, 0x00, 0xc3]), VALUE);
        }
    });
    addressing("addressing.instruction_across_pages", |t| {
        let code = PLAYGROUND + 0x90_0000;
        let space = Space::current();
        space.map_new(code, P | W);
        guests::frames::page();
        space.map_new(code + 0x1000, P | W);
        // mov eax, [rdi + 0x00000000]; ret, with the boundary after each of its bytes.
        let bytes = [0x8bu8, 0x87, 0, 0, 0, 0, 0xc3];
        for before in 1..=6u64 {
            let start = code + 0x1000 - before;
            bytes.iter().enumerate().for_each(|(at, &byte)| poke(start + at as u64, byte));
            let value: u64;
            exec!("call {code}", code = in(reg) start, inout("rax") 0u64 => value, in("rdi") REGISTER);
            t.eq("the register", value, VALUE);
        }
    });
}
