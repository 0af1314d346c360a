//! Instructions on device registers against the same instructions on RAM.
use guests::dev::{acpi, ioapic, lapic};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::{exec, Racy};

/// Flags an instruction defines. The rest may differ between executed and emulated.
const ALL: u64 = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF;
const LOGIC: u64 = ALL & !FLAG_AF;
const CARRY: u64 = FLAG_CF;

/// Registers and flags after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    rax: u64,
    rcx: u64,
    flags: u64,
}

type Run = fn(address: u64, rax: u64, rcx: u64, flags: u64) -> State;

struct Form {
    name: &'static str,
    flags: u64,
    run: Run,
}

macro_rules! form {
    ($flags:expr, $($asm:expr),+) => {
        Form {
            name: concat!($($asm),+),
            flags: $flags,
            run: |address, rax, rcx, flags| {
                let (mut rax, mut rcx, mut flags) = (rax, rcx, flags);
                exec!("push r10", "popfq", concat!($($asm),+), "pushfq", "pop r10", "cld",
                    in("rdi") address, inout("rax") rax, inout("rcx") rcx, inout("r10") flags);
                State { rax, rcx, flags }
            },
        }
    };
}

/// All the forms for one operand size: its pointer word, RAX and RCX at that size.
macro_rules! forms {
    ($pointer:literal, $rax:literal, $rcx:literal) => {
        &[
            form!(0, "mov ", $rax, ", ", $pointer, " [rdi]"),
            form!(0, "mov ", $pointer, " [rdi], ", $rax),
            form!(0, "mov ", $pointer, " [rdi], 0x27"),
            form!(0, "mov ", $rcx, ", ", $pointer, " [rdi]"),
            form!(ALL, "add ", $pointer, " [rdi], ", $rax),
            form!(ALL, "add ", $rax, ", ", $pointer, " [rdi]"),
            form!(ALL, "add ", $pointer, " [rdi], 3"),
            form!(ALL, "lock add ", $pointer, " [rdi], ", $rax),
            form!(ALL, "adc ", $pointer, " [rdi], ", $rax),
            form!(ALL, "adc ", $rax, ", ", $pointer, " [rdi]"),
            form!(ALL, "sub ", $pointer, " [rdi], ", $rax),
            form!(ALL, "sub ", $rax, ", ", $pointer, " [rdi]"),
            form!(ALL, "sub ", $pointer, " [rdi], 1"),
            form!(ALL, "sbb ", $pointer, " [rdi], ", $rax),
            form!(ALL, "sbb ", $rax, ", ", $pointer, " [rdi]"),
            form!(LOGIC, "and ", $pointer, " [rdi], ", $rax),
            form!(LOGIC, "and ", $rax, ", ", $pointer, " [rdi]"),
            form!(LOGIC, "and ", $pointer, " [rdi], 0x0f"),
            form!(LOGIC, "or ", $pointer, " [rdi], ", $rax),
            form!(LOGIC, "or ", $rax, ", ", $pointer, " [rdi]"),
            form!(LOGIC, "or ", $pointer, " [rdi], 0x40"),
            form!(LOGIC, "lock or ", $pointer, " [rdi], ", $rax),
            form!(LOGIC, "xor ", $pointer, " [rdi], ", $rax),
            form!(LOGIC, "xor ", $rax, ", ", $pointer, " [rdi]"),
            form!(LOGIC, "xor ", $pointer, " [rdi], 0x11"),
            form!(ALL, "cmp ", $pointer, " [rdi], ", $rax),
            form!(ALL, "cmp ", $rax, ", ", $pointer, " [rdi]"),
            form!(ALL, "cmp ", $pointer, " [rdi], 0x35"),
            form!(LOGIC, "test ", $pointer, " [rdi], ", $rax),
            form!(LOGIC, "test ", $pointer, " [rdi], 0x21"),
            form!(0, "xchg ", $pointer, " [rdi], ", $rax),
            form!(ALL, "xadd ", $pointer, " [rdi], ", $rax),
            form!(ALL, "cmpxchg ", $pointer, " [rdi], ", $rcx),
            form!(ALL, "lock cmpxchg ", $pointer, " [rdi], ", $rcx),
            form!(ALL & !CARRY, "inc ", $pointer, " [rdi]"),
            form!(ALL & !CARRY, "dec ", $pointer, " [rdi]"),
        ]
    };
}

const BYTE: &[Form] = forms!("byte ptr", "al", "cl");
const WORD: &[Form] = forms!("word ptr", "ax", "cx");
const DWORD: &[Form] = forms!("dword ptr", "eax", "ecx");
const QWORD: &[Form] = forms!("qword ptr", "rax", "rcx");

/// Forms whose results have high bits, for registers that hold all of them.
const BYTE_FULL: &[Form] = &[form!(0, "not byte ptr [rdi]"), form!(ALL, "neg byte ptr [rdi]")];
const DWORD_FULL: &[Form] = &[
    form!(0, "not dword ptr [rdi]"),
    form!(ALL, "neg dword ptr [rdi]"),
    form!(0, "mov dword ptr [rdi], 0x89abcdef"),
    form!(LOGIC, "or dword ptr [rdi], 0x80000000"),
    form!(ALL, "add dword ptr [rdi], -1"),
    form!(CARRY, "bt dword ptr [rdi], 5"),
    form!(CARRY, "bts dword ptr [rdi], 6"),
    form!(CARRY, "btr dword ptr [rdi], 5"),
    form!(CARRY, "btc dword ptr [rdi], 4"),
    form!(CARRY, "lock bts dword ptr [rdi], 7"),
    // A register operand below 32 stays in the same dword.
    form!(CARRY, "and ecx, 31\n bt dword ptr [rdi], ecx"),
    form!(CARRY, "and ecx, 31\n bts dword ptr [rdi], ecx"),
    form!(CARRY, "and ecx, 31\n btr dword ptr [rdi], ecx"),
    form!(CARRY, "and ecx, 31\n btc dword ptr [rdi], ecx"),
    form!(0, "movsxd rax, dword ptr [rdi]"),
    form!(0, "cmovz eax, dword ptr [rdi]"),
    form!(0, "cmovnz ecx, dword ptr [rdi]"),
    form!(0, "push rcx\n mov ecx, 0x5a\n mov dword ptr [rdi], ecx\n pop rcx"),
];

/// Widening loads, on sources that all sizes can read.
const WIDEN: &[Form] = &[
    form!(0, "movzx eax, byte ptr [rdi]"),
    form!(0, "movzx rax, byte ptr [rdi]"),
    form!(0, "movzx ax, byte ptr [rdi]"),
    form!(0, "movzx eax, word ptr [rdi]"),
    form!(0, "movzx rax, word ptr [rdi]"),
    form!(0, "movsx eax, byte ptr [rdi]"),
    form!(0, "movsx rax, byte ptr [rdi]"),
    form!(0, "movsx ax, byte ptr [rdi]"),
    form!(0, "movsx eax, word ptr [rdi]"),
    form!(0, "movsx rax, word ptr [rdi]"),
    form!(0, "movsxd rax, dword ptr [rdi]"),
    form!(0, "mov ah, byte ptr [rdi]"),
    form!(0, "mov ch, byte ptr [rdi]"),
    form!(ALL, "cmp ah, byte ptr [rdi]"),
];

/// Forms that compilers do not use on device memory but that are legal.
const RARE: &[Form] = &[
    form!(CARRY | FLAG_ZF | FLAG_SF, "shl dword ptr [rdi], 3"),
    form!(CARRY | FLAG_ZF | FLAG_SF, "shr dword ptr [rdi], 2"),
    form!(CARRY | FLAG_ZF | FLAG_SF, "sar dword ptr [rdi], 1"),
    form!(CARRY, "rol dword ptr [rdi], 4"),
    form!(CARRY, "ror dword ptr [rdi], 4"),
    form!(CARRY, "imul eax, dword ptr [rdi]"),
    form!(FLAG_ZF, "bsf eax, dword ptr [rdi]"),
    form!(FLAG_ZF, "bsr eax, dword ptr [rdi]"),
    form!(0, "movnti dword ptr [rdi], eax"),
];

/// CPUID 1 ECX bit 22: MOVBE.
const MOVBE_BIT: u32 = 1 << 22;
const MOVBE: &[Form] = &[form!(0, "movbe eax, dword ptr [rdi]")];

static RAM: Racy<[u64; 2]> = Racy::new([0; 2]);

/// Where a form runs: how to read and write the register behind the address.
struct Site {
    address: u64,
    get: fn(u64) -> u64,
    set: fn(u64, u64),
}

fn dword(address: u64) -> Site {
    Site { address, get: |at| peek::<u32>(at).into(), set: |at, value| poke(at, value as u32) }
}

fn byte(address: u64) -> Site {
    Site { address, get: |at| peek::<u8>(at).into(), set: |at, value| poke(at, value as u8) }
}

/// Runs one form on RAM and on the device, from the same start.
fn compare(t: &mut Case, form: &Form, site: &Site, start: u64, rax: u64, rcx: u64) {
    for flags in [2, 2 | ALL] {
        poke(RAM.addr(), 0u64);
        (site.set)(RAM.addr(), start);
        (site.set)(site.address, start);
        // Bits around the register that the device has and RAM would not.
        let want = (form.run)(RAM.addr(), rax, rcx, flags);
        let got = (form.run)(site.address, rax, rcx, flags);
        let (memory_want, memory_got) = ((site.get)(RAM.addr()), (site.get)(site.address));
        let name = form.name;
        t.check(got.rax == want.rax, format_args!("`{name}` RAX {:#x}, got {:#x}", want.rax, got.rax));
        t.check(got.rcx == want.rcx, format_args!("`{name}` RCX {:#x}, got {:#x}", want.rcx, got.rcx));
        t.check(
            memory_got == memory_want,
            format_args!("`{name}` register {memory_want:#x}, got {memory_got:#x}"),
        );
        let mask = if form.flags == 0 { ALL } else { form.flags };
        t.check(
            got.flags & mask == want.flags & mask,
            format_args!("`{name}` flags {:#x}, got {:#x}", want.flags & mask, got.flags & mask),
        );
    }
}

fn operands(t: &mut Case, forms: &[Form], site: &Site, start: u64, values: &[(u64, u64)]) {
    for form in forms {
        for &(rax, rcx) in values {
            compare(t, form, site, start, rax, rcx);
        }
    }
}

/// A 32-bit register that holds all its bits: the timer's initial count, the timer being masked.
fn timer() -> Site {
    lapic::write(lapic::LVT_TIMER, lapic::MASKED);
    dword(lapic::BASE + u64::from(lapic::TMICT))
}

/// One case for a group of forms.
fn group(name: &str, forms: &[Form], site: impl FnOnce() -> Option<Site>, start: u64, values: &[(u64, u64)]) {
    case(name, |t| match site() {
        Some(site) => operands(t, forms, &site, start, values),
        None => t.skip("no MCFG"),
    });
}

/// Name parts of the cases, by slices of the tables: a case per mnemonic group keeps a failure near its cause.
fn grouped(prefix: &str, forms: &[Form], site: fn() -> Option<Site>, start: u64, values: &[(u64, u64)]) {
    const GROUPS: [(&str, core::ops::Range<usize>); 8] = [
        ("mov", 0..4),
        ("add_adc", 4..10),
        ("sub_sbb", 10..15),
        ("and_or", 15..22),
        ("xor", 22..25),
        ("cmp_test", 25..30),
        ("xchg_xadd_cmpxchg", 30..34),
        ("inc_dec", 34..36),
    ];
    for (name, range) in GROUPS {
        let mut text = [0u8; 40];
        let len = prefix.len() + name.len();
        text[..prefix.len()].copy_from_slice(prefix.as_bytes());
        text[prefix.len()..len].copy_from_slice(name.as_bytes());
        group(core::str::from_utf8(&text[..len]).unwrap_or("mmio"), &forms[range], site, start, values);
    }
}

/// The host bridge's interrupt line: eight bits that software owns.
fn line() -> Option<Site> {
    acpi::ecam().map(|ecam| byte(ecam + 0x3c))
}

/// The dword with the interrupt line: its upper bits are not writable, so start and operands leave them alone.
fn line_dword() -> Option<Site> {
    acpi::ecam().map(|ecam| {
        let upper: u32 = peek(ecam + 0x3c);
        // RAM gets the same read-only upper bits.
        poke(UPPER.addr(), upper & !0xff);
        Site {
            address: ecam + 0x3c,
            get: |at| peek::<u8>(at).into(),
            set: |at, value| {
                if at == RAM.addr() {
                    poke(at, u64::from(peek::<u32>(UPPER.addr()) | value as u32));
                } else {
                    poke(at, value as u8);
                }
            },
        }
    })
}
static UPPER: Racy<u32> = Racy::new(0);

/// The qword with the interrupt line in byte 4.
fn line_qword() -> Option<Site> {
    acpi::ecam().map(|ecam| Site {
        address: ecam + 0x38,
        get: |at| peek::<u8>(at + 4).into(),
        set: |at, value| {
            if at == RAM.addr() {
                let ecam = acpi::ecam().unwrap_or(0);
                poke(at, peek::<u32>(ecam + 0x38));
                poke(at + 4, peek::<u32>(ecam + 0x3c) & !0xff);
            }
            poke(at + 4, value as u8);
        },
    })
}

pub(crate) fn run() {
    // Operands keep results within eight bits where the register has no more.
    const SMALL: &[(u64, u64)] = &[(0x0a, 0x42), (0x35, 0x42), (0, 0)];
    const WIDE: &[(u64, u64)] =
        &[(0x1234_5678_0000_0010, 0x55), (0x35, 0x8000_0001), (0xffff_ffff, 7), (0x7fff_ffcb, 3)];
    grouped("mmio.byte.", BYTE, line, 0x35, &[(0x0a, 0x42), (0x35, 0x42), (0xff, 0), (0x1234_56cb, 0x80)]);
    grouped("mmio.word.", WORD, line_dword, 0x35, SMALL);
    grouped("mmio.dword.", DWORD, || Some(timer()), 0x35, WIDE);
    grouped("mmio.dword_ecam.", DWORD, line_dword, 0x35, SMALL);
    group("mmio.byte.not_neg", BYTE_FULL, line, 0x35, SMALL);
    group("mmio.dword.not_neg_bits_cmov", DWORD_FULL, || Some(timer()), 0x8000_0035, WIDE);
    group("mmio.widening_loads", WIDEN, line_dword, 0xb5, WIDE);
    group("mmio.rare_forms", RARE, || Some(timer()), 0x1234_5680, WIDE);
    if cpuid(1, 0).ecx & MOVBE_BIT != 0 {
        group("mmio.movbe", MOVBE, || Some(timer()), 0x1234_5680, WIDE);
    } else {
        case("mmio.movbe", |t| t.skip("not advertised"));
    }
    qwords();
    strings();
    stack();
    protection();
    devices();
}

fn qwords() {
    // The interrupt line is byte 4 of the qword, so that byte moves and the others must survive.
    const VALUES: &[(u64, u64)] = &[(0x0a_0000_0000, 0x42_0000_0000), (0x35_0000_0000, 0x11_0000_0000)];
    group("mmio.qword.mov_load", &QWORD[..1], line_qword, 0x35, VALUES);
    group("mmio.qword.arithmetic_loads", &[form_at(QWORD, 5), form_at(QWORD, 11)], line_qword, 0x35, VALUES);
    group("mmio.qword.or_xor", &[form_at(QWORD, 18), form_at(QWORD, 22)], line_qword, 0x35, VALUES);
    group("mmio.qword.cmp_test", &QWORD[25..30], line_qword, 0x35, VALUES);
    case("mmio.qword.mov_store", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let low: u32 = peek(ecam + 0x38);
        exec!("mov [{}], {}", in(reg) ecam + 0x38, in(reg) 0x77_0000_0000u64 | u64::from(low));
        t.eq("interrupt line", peek::<u8>(ecam + 0x3c), 0x77u8);
        t.eq("the lower half", peek::<u32>(ecam + 0x38), low);
    });
    case("mmio.qword.is_two_dwords", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let want = u64::from(peek::<u32>(ecam)) | u64::from(peek::<u32>(ecam + 4)) << 32;
        t.eq("identification, command and status", peek::<u64>(ecam), want);
    });
}

fn form_at(forms: &[Form], index: usize) -> Form {
    Form { name: forms[index].name, flags: forms[index].flags, run: forms[index].run }
}

fn strings() {
    static BUFFER: Racy<[u32; 16]> = Racy::new([0; 16]);
    case("mmio.movs_ram_to_mmio", |t| {
        let site = timer();
        poke(BUFFER.addr(), 0x00ab_cdefu32);
        let (rsi, rdi): (u64, u64);
        exec!("movsd", inout("rsi") BUFFER.addr() => rsi, inout("rdi") site.address => rdi);
        t.eq("the register", peek::<u32>(site.address), 0x00ab_cdefu32);
        t.eq("RSI", rsi, BUFFER.addr() + 4);
        t.eq("RDI", rdi, site.address + 4);
    });
    case("mmio.movs_mmio_to_ram", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        exec!("rep movsd", inout("rcx") 16u64 => _, inout("rsi") ecam => _, inout("rdi") BUFFER.addr() => _);
        for index in [0u64, 2, 3, 11, 15] {
            t.eq("a dword", peek::<u32>(BUFFER.addr() + 4 * index), peek::<u32>(ecam + 4 * index));
        }
    });
    case("mmio.movs_mmio_to_ram_bytes_words_qwords", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let want = u64::from(peek::<u32>(ecam)) | u64::from(peek::<u32>(ecam + 4)) << 32;
        exec!("rep movsb", inout("rcx") 8u64 => _, inout("rsi") ecam => _, inout("rdi") BUFFER.addr() => _);
        t.eq("eight bytes", peek::<u64>(BUFFER.addr()), want);
        poke(BUFFER.addr(), 0u64);
        exec!("rep movsw", inout("rcx") 4u64 => _, inout("rsi") ecam => _, inout("rdi") BUFFER.addr() => _);
        t.eq("four words", peek::<u64>(BUFFER.addr()), want);
        poke(BUFFER.addr(), 0u64);
        exec!("movsq", inout("rsi") ecam => _, inout("rdi") BUFFER.addr() => _);
        t.eq("a qword", peek::<u64>(BUFFER.addr()), want);
    });
    case("mmio.movs_downward", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let (rsi, rdi): (u64, u64);
        exec!("std", "rep movsd", "cld", inout("rcx") 2u64 => _, inout("rsi") ecam + 4 => rsi,
            inout("rdi") BUFFER.addr() + 4 => rdi);
        t.eq("identification", peek::<u32>(BUFFER.addr()), peek::<u32>(ecam));
        t.eq("RSI", rsi, ecam - 4);
        t.eq("RDI", rdi, BUFFER.addr() - 4);
    });
    case("mmio.movs_mmio_to_mmio", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let site = timer();
        exec!("movsd", inout("rsi") ecam => _, inout("rdi") site.address => _);
        t.eq("the register", peek::<u32>(site.address), peek::<u32>(ecam));
    });
    case("mmio.stos", |t| {
        let site = timer();
        let rdi: u64;
        exec!("stosd", in("eax") 0x0bad_cafe, inout("rdi") site.address => rdi);
        t.eq("the register", peek::<u32>(site.address), 0x0bad_cafeu32);
        t.eq("RDI", rdi, site.address + 4);
    });
    case("mmio.stosb", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        exec!("stosb", in("al") 0x3cu8, inout("rdi") ecam + 0x3c => _);
        t.eq("interrupt line", peek::<u8>(ecam + 0x3c), 0x3cu8);
        exec!("rep stosb", in("al") 0xc3u8, inout("rcx") 2u64 => _, inout("rdi") ecam + 0x3c => _);
        t.eq("interrupt line", peek::<u8>(ecam + 0x3c), 0xc3u8);
    });
    case("mmio.lods", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let id: u32 = peek(ecam);
        let (rax, rsi): (u64, u64);
        exec!("lodsd", inout("rax") !0u64 => rax, inout("rsi") ecam => rsi);
        t.eq("RAX after LODSD", rax, id);
        t.eq("RSI", rsi, ecam + 4);
        let rax: u64;
        exec!("lodsb", inout("rax") !0u64 => rax, inout("rsi") ecam => _);
        t.eq("RAX after LODSB", rax, !0xffu64 | u64::from(id & 0xff));
        let rax: u64;
        exec!("lodsw", inout("rax") !0u64 => rax, inout("rsi") ecam + 2 => _);
        t.eq("RAX after LODSW", rax, !0xffffu64 | u64::from(id >> 16));
    });
    case("mmio.movs_source_fault", |t| {
        let site = timer();
        poke(site.address, 0x55u32);
        let missing = guests::paging::PLAYGROUND + 0x10_0000;
        let got =
            guests::trap::catch(|| exec!("movsd", inout("rsi") missing => _, inout("rdi") site.address => _));
        let fault = t.faults("MOVSD from a page that is not there", got, guests::trap::PF, Some(0));
        t.eq("CR2", fault.cr2, missing);
        t.eq("the register, not written", peek::<u32>(site.address), 0x55u32);
    });
    case("mmio.movs_destination_fault", |t| {
        let site = timer();
        let missing = guests::paging::PLAYGROUND + 0x10_0000;
        let got =
            guests::trap::catch(|| exec!("movsd", inout("rsi") site.address => _, inout("rdi") missing => _));
        let fault = t.faults("MOVSD to a page that is not there", got, guests::trap::PF, Some(2));
        t.eq("CR2", fault.cr2, missing);
    });
    case("mmio.cmps_scas", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let id: u32 = peek(ecam);
        let flags: u64;
        exec!("scasd", "pushfq", "pop {f}", in("eax") id, inout("rdi") ecam => _, f = out(reg) flags);
        t.eq("ZF after SCASD of the same", flags & FLAG_ZF, FLAG_ZF);
        poke(BUFFER.addr(), id ^ 1);
        let flags: u64;
        exec!("cmpsd", "pushfq", "pop {f}", inout("rsi") BUFFER.addr() => _, inout("rdi") ecam => _, f = out(reg) flags);
        t.eq("ZF after CMPSD of another", flags & FLAG_ZF, 0u64);
    });
}

fn stack() {
    case("mmio.push_from", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let value: u64;
        exec!("push qword ptr [{0}]", "pop {1}", in(reg) ecam, out(reg) value);
        t.eq("the value pushed", value, peek::<u64>(ecam));
    });
    case("mmio.pop_to", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let low: u32 = peek(ecam + 0x38);
        exec!("push {1}", "pop qword ptr [{0}]", in(reg) ecam + 0x38, in(reg) 0x5c_0000_0000u64 | u64::from(low));
        t.eq("interrupt line", peek::<u8>(ecam + 0x3c), 0x5cu8);
    });
    case("mmio.push_word", |t| {
        let Some(ecam) = acpi::ecam() else { return t.skip("no MCFG") };
        let value: u64;
        exec!("push 0", "pop {1}", "push word ptr [{0}]", "pop {1:x}", in(reg) ecam, out(reg) value);
        t.eq("the value pushed", value & 0xffff, peek::<u16>(ecam));
    });
}

fn protection() {
    use guests::paging::{Space, A, D, P, PCD, PLAYGROUND, U, W};
    use guests::trap::{catch, PF};
    use guests::user;
    let alias = PLAYGROUND + 0x20_0000;
    case("mmio.read_only_mapping", |t| {
        let site = timer();
        poke(site.address, 0x99u32);
        Space::current().map(alias, lapic::BASE, 1, P | PCD);
        let register = alias + u64::from(lapic::TMICT);
        t.eq("a read", peek::<u32>(register), 0x99u32);
        let got = catch(|| poke(register, 1u32));
        let fault = t.faults("a write", got, PF, Some(3));
        t.eq("CR2", fault.cr2, register);
        let got = catch(|| exec!("or dword ptr [{}], 2", in(reg) register));
        t.faults("a read-modify-write", got, PF, Some(3));
        t.eq("the register, not written", peek::<u32>(site.address), 0x99u32);
    });
    case("mmio.accessed_and_dirty", |t| {
        let space = Space::current();
        space.map(alias + 0x1000, lapic::BASE, 1, P | W | PCD);
        t.eq("A and D at first", space.get(alias + 0x1000, 1) & (A | D), 0u64);
        peek::<u32>(alias + 0x1000 + 0x20);
        t.eq("A and D after a read", space.get(alias + 0x1000, 1) & (A | D), A);
        poke(alias + 0x1000 + u64::from(lapic::TMICT), 0u32);
        t.eq("A and D after a write", space.get(alias + 0x1000, 1) & (A | D), A | D);
    });
    case("mmio.from_ring_3", |t| {
        user::map();
        timer();
        lapic::write(lapic::TMICT, 0x1234);
        Space::current().map(alias + 0x2000, lapic::BASE, 1, P | W | U | PCD);
        // mov eax, [rcx]; add dword ptr [rcx], 1; ud2
        let start = user::Start { rcx: alias + 0x2000 + u64::from(lapic::TMICT), ..user::Start::default() };
        let (fault, frame) = user::run_mapped(&[0x8b, 0x01, 0x83, 0x01, 0x01, 0x0f, 0x0b], start);
        t.faults("UD2 after them", Err::<(), _>(fault), guests::trap::UD, None);
        t.eq("EAX", frame.rax, 0x1234u64);
        t.eq("the register", lapic::read(lapic::TMICT), 0x1235u32);
    });
    case("mmio.supervisor_page_from_ring_3", |t| {
        user::map();
        Space::current().map(alias + 0x3000, lapic::BASE, 1, P | W | PCD);
        let start = user::Start { rcx: alias + 0x3020, ..user::Start::default() };
        let (fault, _) = user::run_mapped(&[0x8b, 0x01, 0x0f, 0x0b], start);
        t.faults("the load", Err::<(), _>(fault), PF, Some(5));
    });
    case("mmio.compat_mode", |t| {
        // mov eax, [0xfec00000]; ud2: absolute 32-bit address, needs a user mapping of the page.
        let space = Space::current().isolated();
        space.activate();
        space.map(ioapic::BASE, ioapic::BASE, 1, P | W | U | PCD);
        poke(ioapic::REGSEL, 1u32);
        let (fault, frame) =
            user::run_low(&[0xa1, 0x10, 0x00, 0xc0, 0xfe, 0x0f, 0x0b], user::Start::compat());
        // `run_low` makes its own space from the current one, which has the user mapping.
        t.faults("UD2 after the load", Err::<(), _>(fault), guests::trap::UD, None);
        guests::machine::baseline();
        poke(ioapic::REGSEL, 1u32);
        t.eq("the version register", frame.rax, peek::<u32>(ioapic::WIN));
    });
}

fn devices() {
    case("mmio.ioapic_index_and_window", |t| {
        for index in [0u32, 1, 0x10, 0x3f] {
            poke(ioapic::REGSEL, index);
            t.eq("index", peek::<u32>(ioapic::REGSEL), index);
        }
        for pin in 0..24 {
            ioapic::write(0x11 + 2 * pin, pin << 24);
        }
        for pin in 0..24 {
            t.eq("destination", ioapic::read(0x11 + 2 * pin), pin << 24);
            ioapic::write(0x11 + 2 * pin, 0);
        }
    });
    case("mmio.lapic_reserved_reads", |t| {
        // No fault, no exit to a stop; the value is not defined.
        for offset in (0..0x400).step_by(16) {
            lapic::read(offset);
        }
        t.yes("all of the page can be read", true);
        lapic::write(lapic::ESR, 0);
    });
    case("mmio.hole_reads_ones", |t| {
        // Nothing claims the PCI hole there. Reads of nothing give ones.
        if t.skip_on_bare_tcg("unclaimed memory reads 0") {
            return;
        }
        let hole = 0xd800_0000;
        t.eq("a byte", peek::<u8>(hole), 0xffu8);
        t.eq("a word", peek::<u16>(hole), 0xffffu16);
        t.eq("a dword", peek::<u32>(hole), !0u32);
        t.eq("a qword", peek::<u64>(hole), !0u64);
        poke(hole, 0x1234_5678u32);
        t.eq("a dword after a write", peek::<u32>(hole), !0u32);
    });
}
