//! Control registers: every way to read and write them, in protected, paged and 64-bit mode, and what is refused. Real
//! mode's are in `real`.
#![no_std]
#![no_main]
// Payloads are assembled into statics whose addresses are taken.
#![allow(unsafe_code)]
use guests::frames;
use guests::modes::{self, Mode, Outcome, Payload, Registers, PAYLOAD, SCRATCH};
use guests::paging::{Space, P, PLAYGROUND, W};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{catch, GP};
use guests::{exec, main, payload, platform};

main!(run);

const NONE: Registers = Registers { eax: 0, ebx: 0, ecx: 0, edx: 0, esi: 0, edi: 0, ebp: 0 };
/// A word of low memory as the second GiB shows it.
const ALIAS: u32 = 0x4000_0000 + SCRATCH;
const CR0_BITS: [(&str, u32); 8] = [
    ("MP", 1 << 1),
    ("EM", 1 << 2),
    ("TS", 1 << 3),
    ("NE", 1 << 5),
    ("WP", 1 << 16),
    ("AM", 1 << 18),
    ("CD", 1 << 30),
    ("CD and NW", 3 << 29),
];

// Changes the bits of EBX: EDX before, ECX changed, ESI restored.
payload!(
    toggle_cr0,
    toggle_cr0_start,
    toggle_cr0_end,
    "32",
    "mov eax, cr0",
    "mov edx, eax",
    "xor eax, ebx",
    "mov cr0, eax",
    "mov ecx, cr0",
    "mov cr0, edx",
    "mov esi, cr0",
    "ret"
);
payload!(
    toggle_cr4,
    toggle_cr4_start,
    toggle_cr4_end,
    "32",
    "mov eax, cr4",
    "mov edx, eax",
    "xor eax, ebx",
    "mov cr4, eax",
    "mov ecx, cr4",
    "mov cr4, edx",
    "mov esi, cr4",
    "ret"
);
payload!(
    short_forms,
    short_forms_start,
    short_forms_end,
    "32",
    "smsw eax",
    "mov bx, 0xb",
    "lmsw bx",
    "smsw ebx",
    "clts",
    "smsw ecx",
    // PE cannot be cleared by it.
    "xor dx, dx",
    "lmsw dx",
    "smsw edx",
    // To and from memory.
    "smsw [0x9800]",
    "lmsw [0x9800]",
    "mov esi, cr0",
    "ret"
);
// EDI: a PDPTE; EBX: its new low half. Then a reload, by EBP: 0 MOV CR3, else CR4 bits to toggle twice.
payload!(
    reload,
    reload_start,
    reload_end,
    "32",
    "mov [edi], ebx",
    "test ebp, ebp",
    "jnz 1f",
    "mov eax, cr3",
    "mov cr3, eax",
    "jmp 2f",
    "1: mov eax, cr4",
    "xor eax, ebp",
    "mov cr4, eax",
    "xor eax, ebp",
    "mov cr4, eax",
    "2: mov eax, [esi]",
    "ret"
);
// MOV CR3 while a PDPTE is bad; the reload with a good one makes the end.
payload!(
    bad_pdpte,
    bad_pdpte_start,
    bad_pdpte_end,
    "32",
    "mov eax, cr3",
    "mov dword ptr [edi], ebx",
    "mov cr3, eax",
    "mov dword ptr [edi], 0",
    "mov cr3, eax",
    "ret"
);
payload!(
    paging_off_and_on,
    paging_off_start,
    paging_off_end,
    "32",
    "mov ecx, 100",
    "1: mov eax, cr0",
    "and eax, 0x7fffffff",
    "mov cr0, eax",
    "inc dword ptr [0x9800]",
    "or eax, 0x80000000",
    "mov cr0, eax",
    "inc dword ptr [0x9800]",
    "loop 1b",
    "mov eax, [0x9800]",
    "ret"
);
payload!(
    write_cr0,
    write_cr0_start,
    write_cr0_end,
    "32",
    "mov eax, cr0",
    "xor eax, ebx",
    "mov cr0, eax",
    "ret"
);

fn run() {
    cr0_cases();
    pae();
    long();
    code();
}

fn each(name: &str, run: impl Fn(&mut Case, Mode)) {
    for (mode, text) in [
        (Mode::Protected, "protected."),
        (Mode::Paged, "paged."),
        (Mode::Pse, "pse."),
        (Mode::Pae, "pae."),
        (Mode::Compat, "compat."),
    ] {
        let mut buffer = [0u8; 64];
        let len = text.len() + name.len();
        buffer[..text.len()].copy_from_slice(text.as_bytes());
        buffer[text.len()..len].copy_from_slice(name.as_bytes());
        case(core::str::from_utf8(&buffer[..len]).unwrap_or("mode"), |t| run(t, mode));
    }
}

fn good(t: &mut Case, mode: Mode, payload: Payload, registers: Registers) -> Registers {
    let outcome = modes::run(mode, payload, registers);
    t.check(outcome.fault.is_none(), format_args!("no fault in {mode:?} mode, got {:?}", outcome.fault));
    outcome.registers
}

fn refused(t: &mut Case, outcome: Outcome, eip: u32) {
    let fault = t.faults("the write", outcome.fault.map_or(Ok(()), Err), GP, Some(0));
    t.eq("EIP", fault.rip, PAYLOAD + eip);
}

fn cr0_cases() {
    each("cr0_bits", |t, mode| {
        for (name, bits) in CR0_BITS {
            let got = good(t, mode, toggle_cr0(), Registers { ebx: bits, ..NONE });
            t.eq(name, got.ecx, got.edx ^ bits);
            t.eq("CR0 restored", got.esi, got.edx);
        }
    });
    each("cr4_bits", |t, mode| {
        for bits in [CR4_DE, CR4_PSE, CR4_PGE, 1 << 2, 1 << 9] {
            // Without PSE the tables of that mode are no tables.
            if mode == Mode::Pse && bits == CR4_PSE {
                continue;
            }
            let bits = bits as u32;
            let got = good(t, mode, toggle_cr4(), Registers { ebx: bits, ..NONE });
            t.eq("CR4", got.ecx, got.edx ^ bits);
            t.eq("CR4 restored", got.esi, got.edx);
        }
    });
    each("smsw_lmsw_clts", |t, mode| {
        let got = good(t, mode, short_forms(), NONE);
        t.eq("before", got.eax & 0xf, 1u32);
        t.eq("MP and TS", got.ebx & 0xf, 0xbu32);
        t.eq("MP after CLTS", got.ecx & 0xf, 3u32);
        t.eq("PE, which LMSW cannot clear", got.edx & 0xf, 1u32);
        t.eq("CR0 afterwards", got.esi & 0xf, 1u32);
        t.eq("SMSW to memory", peek::<u8>(SCRATCH.into()) & 0xf, 1u8);
    });
    let go = |mode, bits| modes::run(mode, write_cr0(), Registers { ebx: bits, ..NONE });
    each("nw_without_cd", |t, mode| {
        if !t.skip_on_tcg("CR0 is not checked") {
            refused(t, go(mode, 1 << 29), 5);
        }
    });
    each("pg_without_pe", |t, mode| {
        if t.skip_on_tcg("CR0 is not checked") || t.skip_on_bochs_svm("PG can be set without PE") {
            return;
        }
        let paging = if mode == Mode::Protected { 1 << 31 } else { 0 };
        refused(t, go(mode, paging | 1), 5);
    });
    for (name, mode) in [
        ("paged.paging_off_and_on", Mode::Paged),
        ("pse.paging_off_and_on", Mode::Pse),
        ("pae.paging_off_and_on", Mode::Pae),
    ] {
        case(name, |t| {
            poke(SCRATCH.into(), 0u32);
            let got = good(t, mode, paging_off_and_on(), NONE);
            t.eq("the count", got.eax, 200u32);
        });
    }
}

/// A PDPTE that is not present is made one like the first: what a reload makes of it. Without one, both answers are
/// right, so that is not asked.
fn pae() {
    for (name, way) in
        [("pae.mov_cr3_reloads", 0), ("pae.pge_reloads", CR4_PGE as u32), ("pae.pse_reloads", CR4_PSE as u32)]
    {
        case(name, |t| {
            let cr3 = modes::prepare(Mode::Pae, reload());
            let first: u32 = peek(cr3);
            poke(cr3 + 8, 0u64);
            poke(SCRATCH.into(), 0x1357_9bdfu32);
            let registers = Registers { edi: cr3 as u32 + 8, ebx: first, esi: ALIAS, ebp: way, ..NONE };
            let outcome = modes::run_prepared(Mode::Pae, registers, cr3);
            t.check(outcome.fault.is_none(), format_args!("no fault, got {:?}", outcome.fault));
            t.eq("a word through the new PDPTE", outcome.registers.eax, 0x1357_9bdfu32);
        });
    }
    case("pae.bad_pdpte_at_mov_cr3", |t| {
        // P with R/W, which is reserved there. Intel's processors look when CR3 is loaded; AMD's with nested paging when
        // the entry is used, which it is not. AMD APM vol. 2, 15.25.10.
        let cr3 = modes::prepare(Mode::Pae, bad_pdpte());
        let registers = Registers { edi: cr3 as u32 + 8, ebx: 3, ..NONE };
        let outcome = modes::run_prepared(Mode::Pae, registers, cr3);
        if platform::bochs_vmx() || platform::shadow() {
            refused(t, outcome, 5);
        } else {
            t.check(outcome.fault.is_none(), format_args!("no fault, got {:?}", outcome.fault));
        }
    });
}

fn long() {
    case("long.cr0_bits", |t| {
        for (name, bits) in CR0_BITS {
            let before = cr0();
            set_cr0(before ^ u64::from(bits));
            t.eq(name, cr0(), before ^ u64::from(bits));
            set_cr0(before);
            t.eq("CR0 restored", cr0(), before);
        }
    });
    case("long.cr0_refused", |t| {
        if t.skip_on_tcg("CR0 is not checked") {
            return;
        }
        let before = cr0();
        if !platform::bochs_svm() {
            // That would let PG be without PE, and end itself.
            t.faults("PG without PE", catch(|| set_cr0(before & !1)), GP, Some(0));
        }
        for (what, value) in [
            ("NW without CD", before | 1 << 29),
            ("PG off in 64-bit mode", before & !(1 << 31)),
            ("a high bit", before | 1 << 32),
        ] {
            t.faults(what, catch(|| set_cr0(value)), GP, Some(0));
            t.eq("CR0", cr0(), before);
        }
    });
    case("long.cr4_keys_and_contexts", |t| {
        // Leaf 7 ECX has PKU and PKS, leaf 1 ECX PCID. Bits that are not offered are tried elsewhere.
        let mut tried = 0;
        for (leaf, number, bit) in [(7, 3, CR4_PKE), (7, 31, CR4_PKS), (1, 17, CR4_PCIDE)] {
            if has(leaf, 0, |leaf| leaf.ecx, number) {
                tried += 1;
                let before = cr4();
                (0..10).for_each(|_| {
                    set_cr4(before ^ bit);
                    t.eq("CR4", cr4(), before ^ bit);
                    set_cr4(before);
                    t.eq("CR4 restored", cr4(), before);
                });
            }
        }
        if tried == 0 {
            t.skip("CPUID offers none of them");
        }
    });
    case("long.cr4_refused", |t| {
        if t.skip_on_tcg("CR4 is not checked") {
            return;
        }
        let before = cr4();
        for (what, value) in [("PAE off", before & !CR4_PAE), ("a high bit", before | 1 << 40)] {
            t.faults(what, catch(|| set_cr4(value)), GP, Some(0));
            t.eq("CR4", cr4(), before);
        }
    });
    case("long.cr8", |t| {
        for priority in [0u64, 1, 8, 15, 0] {
            set_cr8(priority);
            t.eq("CR8", cr8(), priority);
        }
        if !platform::bad_cr_write_hangs() && !platform::tcg() {
            t.faults("a reserved bit", catch(|| set_cr8(16)), GP, Some(0));
        }
        t.eq("CR8 afterwards", cr8(), 0u64);
    });
    case("long.smsw_lmsw_clts", |t| {
        let (first, second, third, last): (u64, u64, u64, u64);
        exec!("smsw {0}", "mov {3}, 0xb", "lmsw {3:x}", "smsw {1}", "clts", "smsw {2}", "lmsw {0:x}", "smsw {3}",
            out(reg) first, out(reg) second, out(reg) third, out(reg) last);
        t.eq("SMSW of 64 bits", first, cr0());
        t.eq("MP and TS", second & 0xb, 0xbu64);
        t.eq("after CLTS", third & 8, 0u64);
        t.eq("CR0 afterwards", last, first);
    });
    case("long.unknown_registers", |t| {
        let undefined = |what, got, t: &mut Case| {
            t.faults(what, got, guests::trap::UD, None);
        };
        undefined("MOV from CR1", catch(|| exec!(".byte 0x0f, 0x20, 0xc8", out("rax") _)), t);
        undefined("MOV from CR7", catch(|| exec!(".byte 0x0f, 0x20, 0xf8", out("rax") _)), t);
        undefined("MOV to CR5", catch(|| exec!(".byte 0x0f, 0x22, 0xe8", in("rax") 0)), t);
    });
}

const RSP: u8 = 4;
const RDX: u8 = 2;
const RSI: u8 = 6;
const RET: u8 = 0xc3;
/// CR0: write protection.
const CR0_WP: u64 = 1 << 16;

/// Writes instructions to `at` and what follows.
fn assemble(at: u64, instructions: &[&[u8]]) {
    for (at, &byte) in (at..).zip(instructions.iter().copied().flatten()) {
        poke(at, byte);
    }
}

/// Runs the code at `at` with these values in RDI and RSI, and says what is in RAX then.
fn call(at: u64, rdi: u64, rsi: u64) -> u64 {
    let rax: u64;
    exec!("call {at}", at = in(reg) at, inout("rdi") rdi => _, inout("rsi") rsi => _, out("rax") rax, out("rdx") _);
    rax
}

// Where the instructions are: an exit may have to read them, and what it knows of their page may be out of date.
fn code() {
    case("code.each_register", |t| {
        let at = frames::page();
        for register in (0..16).filter(|&register| register != RSP) {
            let (b, low) = (register >> 3, register & 7);
            let other = if register == RDX { RSI } else { RDX };
            for (name, number, value) in [("CR0", 0, cr0()), ("CR3", 3, cr3()), ("CR4", 4, cr4())] {
                let with_rex = |code: [u8; 3]| [0x40 | b, code[0], code[1], code[2]];
                let write = with_rex([0x0f, 0x22, 0xc0 | number << 3 | low]);
                let read = with_rex([0x0f, 0x20, 0xc0 | number << 3 | low]);
                let skip = usize::from(b == 0);
                assemble(
                    at,
                    &[
                        &[0x40 | b, 0x50 | low],                         // push r
                        &[0x48 | b, 0x89, 0xf8 | low],                   // mov r, rdi
                        &write[skip..],                                  // mov cr, r
                        &[0x48 | b, 0xc7, 0xc0 | low, 0, 0, 0, 0],       // mov r, 0
                        &read[skip..],                                   // mov r, cr
                        &[0x48 | b << 2, 0x89, 0xc0 | low << 3 | other], // mov other, r
                        &[0x40 | b, 0x58 | low],                         // pop r
                        &[0x48, 0x89, 0xc0 | other << 3],                // mov rax, other
                        &[RET],
                    ],
                );
                for _ in 0..3 {
                    t.eq(name, call(at, value, 0), value);
                }
            }
        }
    });
    case("code.invlpg_of_each_register", |t| {
        let space = Space::current();
        let (at, address) = (frames::page(), PLAYGROUND + 0x1000);
        let frames = [frames::page(), frames::page()];
        poke(frames[1], 1u64);
        for register in (0..16).filter(|&register| register != RSP) {
            let (b, low) = (register >> 3, register & 7);
            // R12 takes a SIB byte, RBP and R13 a displacement.
            let operand: &[u8] = match low {
                RSP => &[0x3c, 0x24],
                5 => &[0x7d, 0],
                _ => &[0x38 | low],
            };
            let prefix = [0x40 | b];
            assemble(
                at,
                &[
                    &[0x40 | b, 0x50 | low],       // push r
                    &[0x48 | b, 0x89, 0xf8 | low], // mov r, rdi
                    &prefix[usize::from(b == 0)..],
                    &[0x0f, 0x01],
                    operand,                 // invlpg [r]
                    &[0x40 | b, 0x58 | low], // pop r
                    &[RET],
                ],
            );
            space.map(address, frames[0], 1, P | W);
            for round in 1..6 {
                peek::<u64>(address);
                poke(space.entry(address, 1), frames[round % 2] | P | W);
                call(at, address, 0);
                t.eq("the word", peek::<u64>(address), round as u64 % 2);
            }
        }
    });
    case("code.another_page", |t| {
        let space = Space::current();
        let address = PLAYGROUND + 0x20_0000;
        let frames = [space.map_new(address, P | W), frames::page()];
        let (on, off) = (cr0() | CR0_WP, cr0() & !CR0_WP);
        assemble(frames[0], &[&[0x0f, 0x22, 0xc7, RET]]); // mov cr0, rdi
        assemble(frames[1], &[&[0x0f, 0x22, 0xc6, RET]]); // mov cr0, rsi
        let mut check = |what, rdi| {
            call(address, if rdi { on } else { off }, if rdi { off } else { on });
            t.eq(what, cr0(), on);
            call(address, if rdi { off } else { on }, if rdi { on } else { off });
            t.eq(what, cr0(), off);
        };
        for round in 0..60 {
            space.map(address, frames[round % 2], 1, P | W);
            check("by another entry", round % 2 == 0);
        }
        space.map(address, frames[0], 1, P | W);
        for round in 0..60 {
            poke(frames[0] + 2, 0xc7 - (round % 2) as u8);
            check("by another byte", round % 2 == 0);
        }
        poke(frames[0] + 2, 0xc7u8);
        // Two tables that differ in one entry.
        let tables = [space.get(address, 2), frames::page() | P | W];
        poke(tables[1] & !0xfff, frames[1] | P | W);
        for round in 0..60 {
            space.set(address, 2, tables[round % 2]);
            check("by another table", round % 2 == 0);
        }
        space.set(address, 2, tables[0]);
        set_cr0(on);
    });
    case("code.across_pages", |t| {
        let space = Space::current();
        let end = PLAYGROUND + 0x40_1000;
        space.map_new(end - 0x1000, P | W);
        space.map_new(end, P | W);
        let (on, off) = (cr0() | CR0_WP, cr0() & !CR0_WP);
        for before in 1..=5 {
            for (name, code) in [
                ("mov cr0, rdi", &[0x0f, 0x22, 0xc7, RET][..]),
                ("with a prefix", &[0x66, 0x0f, 0x22, 0xc7, RET]),
            ] {
                assemble(end - before, &[code]);
                for value in [off, on, off, on] {
                    call(end - before, value, 0);
                    t.eq(name, cr0(), value);
                }
            }
            assemble(end - before, &[&[0x0f, 0x01, 0x3f, RET]]);
            t.works("invlpg [rdi]", catch(|| call(end - before, end, 0)));
        }
    });
}
