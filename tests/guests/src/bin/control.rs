//! Control registers: every way to read and write them, in protected, paged and 64-bit mode, and what is refused. Real
//! mode's are in `real`.
#![no_std]
#![no_main]
// Payloads are assembled into statics whose addresses are taken.
#![allow(unsafe_code)]
use guests::modes::{self, Mode, Outcome, Payload, Registers, PAYLOAD, SCRATCH};
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
