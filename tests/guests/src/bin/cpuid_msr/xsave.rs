//! XCR0, XSETBV and the XSAVE leaf.
use guests::platform;
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{catch, GP, UD};
use guests::user;
use guests::{exec, Racy};

/// PKRU's bit of XCR0.
const PKRU: u32 = 9;

pub(crate) fn run() {
    case("xsave.leaf_d", leaf_d);
    case("xsave.each_component_can_be_enabled", each_component);
    case("xsave.size_follows_xcr0", |t| {
        if !enable(t) {
            return;
        }
        t.eq("size with x87 only", cpuid(0xd, 0).ebx, 576u32);
        let offered = offered();
        for bit in 2..32u32 {
            let Some(value) = closure(offered, 1 << bit) else { continue };
            xsetbv(0, value);
            let component = cpuid(0xd, bit);
            t.check(
                cpuid(0xd, 0).ebx >= component.ebx + component.eax,
                format_args!("leaf 0Dh EBX of at least component {bit}'s end, got {:#x}", cpuid(0xd, 0).ebx),
            );
        }
        xsetbv(0, 1);
        t.eq("size with x87 only again", cpuid(0xd, 0).ebx, 576u32);
    });
    case("xsave.reads_back", |t| {
        if enable(t) {
            xsetbv(0, 3);
            t.eq("XCR0", xgetbv(), 3u64);
            xsetbv(0, 1);
            t.eq("XCR0", xgetbv(), 1u64);
        }
    });
    case("xsave.state_survives_exits", state_survives);
    case("xsave.avx512_survives_exits", avx512_survives);
    case("xsave.avx512_survives_xsave", avx512_survives_xsave);
    case("xsave.optimised_saves_what_is_in_use", optimised);
    case("xsave.avx512_across_pages", across_pages);
    for (name, value, why) in [
        ("xsave.no_x87_faults", 2u64, "bit 0 clear"),
        ("xsave.zero_faults", 0, "zero"),
        ("xsave.avx_without_sse_faults", 5, "AVX without SSE"),
        ("xsave.bit_63_faults", 1 | 1 << 63, "bit 63 set"),
        ("xsave.bit_62_faults", 3 | 1 << 62, "bit 62 set"),
        ("xsave.half_avx512_faults", 7 | 1 << 5, "one of the three AVX-512 bits"),
    ] {
        case(name, |t| {
            if enable(t) {
                let got = catch(|| xsetbv(0, value));
                t.faults(why, got, GP, Some(0));
                t.eq("XCR0 afterwards", xgetbv(), 1u64);
            }
        });
    }
    case("xsave.unsupported_bits_fault", |t| {
        if !enable(t) {
            return;
        }
        let offered = offered();
        // TCG executes XSETBV without the exit that was asked for, and has PKRU itself, be it hidden from the guest.
        let known = |bit: &u32| platform::tcg() && *bit == PKRU;
        for bit in (2..64).filter(|bit| offered >> bit & 1 == 0 && !known(bit)) {
            let got = catch(|| xsetbv(0, 3 | 1 << bit));
            t.faults("a bit that leaf 0Dh does not have", got, GP, Some(0));
        }
    });
    case("xsave.xcr1_faults", |t| {
        if enable(t) {
            let got = catch(|| xsetbv(1, 1));
            t.faults("XSETBV of register 1", got, GP, Some(0));
        }
    });
    case("xsave.xgetbv_bad_index_faults", |t| {
        if enable(t) {
            let got = catch(|| exec!("xgetbv", in("ecx") 7, out("eax") _, out("edx") _));
            t.faults("XGETBV of register 7", got, GP, Some(0));
        }
    });
    case("xsave.xsetbv_without_osxsave", |t| {
        set_cr4(cr4() & !CR4_OSXSAVE);
        let got = catch(|| xsetbv(0, 1));
        t.faults("XSETBV", got, UD, None);
    });
    case("xsave.xgetbv_without_osxsave", |t| {
        set_cr4(cr4() & !CR4_OSXSAVE);
        let got = catch(xgetbv);
        t.faults("XGETBV", got, UD, None);
    });
    case("xsave.xsetbv_in_ring_3", |t| {
        if enable(t) {
            // xsetbv; ud2
            let (fault, _) =
                user::run(&[0x0f, 0x01, 0xd1, 0x0f, 0x0b], user::Start { rax: 1, ..user::Start::default() });
            t.faults("XSETBV", Err::<(), _>(fault), GP, Some(0));
        }
    });
}

/// Sets CR4.OSXSAVE and the x87-only XCR0; skips without XSAVE.
pub(crate) fn enable(t: &mut Case) -> bool {
    if !has(1, 0, |r| r.ecx, 26) {
        t.skip("no XSAVE");
        return false;
    }
    set_cr4(cr4() | CR4_OSXSAVE | 3 << 9);
    xsetbv(0, 1);
    true
}

pub(crate) fn offered() -> u64 {
    let leaf = cpuid(0xd, 0);
    u64::from(leaf.eax) | u64::from(leaf.edx) << 32
}

/// The smallest valid XCR0 with `bit`, or nothing when it is not offered. Intel SDM vol. 1, 13.3.
fn closure(offered: u64, bit: u64) -> Option<u64> {
    let mut value = bit | 1;
    if value & 0xe4 != 0 {
        value |= 7;
    }
    for group in [0x18, 0xe0, 0x6_0000] {
        if value & group != 0 {
            value |= group;
        }
    }
    (offered & value == value).then_some(value)
}

fn leaf_d(t: &mut Case) {
    if !has(1, 0, |r| r.ecx, 26) {
        return t.skip("no XSAVE");
    }
    let leaf = cpuid(0xd, 0);
    t.masked("x87 and SSE in EAX", leaf.eax, 3u32, 3);
    t.yes("an area of at least 576 bytes", leaf.ecx >= 576);
    t.yes("the current size is not larger than the maximum", leaf.ebx <= leaf.ecx);
    let offered = offered();
    let mut end = 576;
    for bit in 2..63u32 {
        let component = cpuid(0xd, bit);
        if offered >> bit & 1 != 0 {
            t.yes("a component with a size", component.eax != 0);
            t.yes("a component outside the legacy area", component.ebx >= 576);
            end = end.max(component.ebx + component.eax);
        }
    }
    t.eq("maximum size in ECX", leaf.ecx, end);
}

fn each_component(t: &mut Case) {
    if !enable(t) {
        return;
    }
    let offered = offered();
    for bit in 0..63u32 {
        if offered >> bit & 1 == 0 {
            continue;
        }
        let Some(value) = closure(offered, 1 << bit) else {
            t.check(false, format_args!("component {bit} with all that it needs, got a part of its group"));
            continue;
        };
        let got = catch(|| xsetbv(0, value));
        t.check(got.is_ok(), format_args!("XCR0 {value:#x} accepted, got {got:?}"));
        t.eq("XCR0", xgetbv(), value);
    }
    xsetbv(0, 1);
}

/// Vector registers keep their values over instructions that exit.
fn state_survives(t: &mut Case) {
    set_cr4(cr4() | 3 << 9);
    set_cr0(cr0() & !0xc | 2);
    let (low, high): (u64, u64);
    exec!(
        "movq xmm7, {a}", "movq xmm15, {b}",
        "mov r8, rbx", "mov r9d, 200",
        "2:", "xor eax, eax", "cpuid", "in al, 0x21", "dec r9d", "jnz 2b",
        "mov rbx, r8",
        "movq {x}, xmm7", "movq {y}, xmm15",
        a = in(reg) 0x0123_4567_89ab_cdefu64, b = in(reg) 0xfedc_ba98_7654_3210u64,
        x = out(reg) low, y = out(reg) high,
        out("rax") _, out("rcx") _, out("rdx") _, out("r8") _, out("r9") _
    );
    t.eq("XMM7", low, 0x0123_4567_89ab_cdefu64);
    t.eq("XMM15", high, 0xfedc_ba98_7654_3210u64);
}

/// Storage for all of AVX-512's registers, and for XSAVE.
static BEFORE: Racy<Lines> = Racy::new(Lines::ZERO);
static AFTER: Racy<Lines> = Racy::new(Lines::ZERO);
static AREA: Racy<Lines> = Racy::new(Lines::ZERO);

/// A page, aligned as XSAVE wants its area.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; 64]);
#[derive(Clone, Copy)]
struct Lines(#[allow(dead_code)] [Line; 64]);

impl Lines {
    const ZERO: Self = Self([Line([0; 64]); 64]);
}

/// Enables AVX-512; skips without.
fn enable_avx512(t: &mut Case) -> bool {
    if !enable(t) {
        return false;
    }
    if offered() & 0xe7 != 0xe7 || !has(7, 0, |r| r.ebx, 16) {
        t.skip("no AVX-512");
        return false;
    }
    set_cr0(cr0() & !0xc | 2);
    xsetbv(0, 0xe7);
    for word in 0..32 * 8u64 {
        poke(BEFORE.addr() + 8 * word, word.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    }
    true
}

/// Whether what was stored is what was loaded.
fn same_vectors(t: &mut Case) {
    for word in 0..32 * 8u64 {
        let (before, after): (u64, u64) = (peek(BEFORE.addr() + 8 * word), peek(AFTER.addr() + 8 * word));
        t.check(
            before == after,
            format_args!("ZMM{} word {} {before:#x}, got {after:#x}", word / 8, word % 8),
        );
    }
}

/// The 512-bit registers and the masks keep their values over instructions that exit, and while the guest just runs.
fn avx512_survives(t: &mut Case) {
    if !enable_avx512(t) {
        return;
    }
    let masks: u64;
    exec!(
        "vmovdqu64 zmm0, [rsi + 0]", "vmovdqu64 zmm1, [rsi + 64]", "vmovdqu64 zmm2, [rsi + 128]",
            "vmovdqu64 zmm3, [rsi + 192]", "vmovdqu64 zmm4, [rsi + 256]", "vmovdqu64 zmm5, [rsi + 320]",
            "vmovdqu64 zmm6, [rsi + 384]", "vmovdqu64 zmm7, [rsi + 448]", "vmovdqu64 zmm8, [rsi + 512]",
            "vmovdqu64 zmm9, [rsi + 576]", "vmovdqu64 zmm10, [rsi + 640]", "vmovdqu64 zmm11, [rsi + 704]",
            "vmovdqu64 zmm12, [rsi + 768]", "vmovdqu64 zmm13, [rsi + 832]", "vmovdqu64 zmm14, [rsi + 896]",
            "vmovdqu64 zmm15, [rsi + 960]", "vmovdqu64 zmm16, [rsi + 1024]", "vmovdqu64 zmm17, [rsi + 1088]",
            "vmovdqu64 zmm18, [rsi + 1152]", "vmovdqu64 zmm19, [rsi + 1216]", "vmovdqu64 zmm20, [rsi + 1280]",
            "vmovdqu64 zmm21, [rsi + 1344]", "vmovdqu64 zmm22, [rsi + 1408]", "vmovdqu64 zmm23, [rsi + 1472]",
            "vmovdqu64 zmm24, [rsi + 1536]", "vmovdqu64 zmm25, [rsi + 1600]", "vmovdqu64 zmm26, [rsi + 1664]",
            "vmovdqu64 zmm27, [rsi + 1728]", "vmovdqu64 zmm28, [rsi + 1792]", "vmovdqu64 zmm29, [rsi + 1856]",
            "vmovdqu64 zmm30, [rsi + 1920]", "vmovdqu64 zmm31, [rsi + 1984]",
        "mov eax, 0xa5a5", "kmovw k1, eax", "mov eax, 0x5a5a", "kmovw k7, eax",
        "mov r10, rbx", "mov r9d, 200",
        "2:", "xor eax, eax", "cpuid", "in al, 0x21", "mov ecx, 20000", "3:", "dec ecx", "jnz 3b", "dec r9d", "jnz 2b",
        "mov rbx, r10",
        "kmovw eax, k1", "kmovw r9d, k7", "shl r9, 16", "or rax, r9",
        "vmovdqu64 [rdi + 0], zmm0", "vmovdqu64 [rdi + 64], zmm1", "vmovdqu64 [rdi + 128], zmm2",
            "vmovdqu64 [rdi + 192], zmm3", "vmovdqu64 [rdi + 256], zmm4", "vmovdqu64 [rdi + 320], zmm5",
            "vmovdqu64 [rdi + 384], zmm6", "vmovdqu64 [rdi + 448], zmm7", "vmovdqu64 [rdi + 512], zmm8",
            "vmovdqu64 [rdi + 576], zmm9", "vmovdqu64 [rdi + 640], zmm10", "vmovdqu64 [rdi + 704], zmm11",
            "vmovdqu64 [rdi + 768], zmm12", "vmovdqu64 [rdi + 832], zmm13", "vmovdqu64 [rdi + 896], zmm14",
            "vmovdqu64 [rdi + 960], zmm15", "vmovdqu64 [rdi + 1024], zmm16", "vmovdqu64 [rdi + 1088], zmm17",
            "vmovdqu64 [rdi + 1152], zmm18", "vmovdqu64 [rdi + 1216], zmm19", "vmovdqu64 [rdi + 1280], zmm20",
            "vmovdqu64 [rdi + 1344], zmm21", "vmovdqu64 [rdi + 1408], zmm22", "vmovdqu64 [rdi + 1472], zmm23",
            "vmovdqu64 [rdi + 1536], zmm24", "vmovdqu64 [rdi + 1600], zmm25", "vmovdqu64 [rdi + 1664], zmm26",
            "vmovdqu64 [rdi + 1728], zmm27", "vmovdqu64 [rdi + 1792], zmm28", "vmovdqu64 [rdi + 1856], zmm29",
            "vmovdqu64 [rdi + 1920], zmm30", "vmovdqu64 [rdi + 1984], zmm31",
        in("rsi") BEFORE.addr(), in("rdi") AFTER.addr(),
        out("rax") masks, out("rcx") _, out("rdx") _, out("r9") _, out("r10") _
    );
    t.eq("masks k1 and k7", masks, 0x5a5a_a5a5u64);
    same_vectors(t);
}

/// XSAVE and XRSTOR carry all of AVX-512.
fn avx512_survives_xsave(t: &mut Case) {
    if !enable_avx512(t) {
        return;
    }
    let masks: u64;
    exec!(
        "vmovdqu64 zmm0, [rsi + 0]", "vmovdqu64 zmm1, [rsi + 64]", "vmovdqu64 zmm2, [rsi + 128]",
            "vmovdqu64 zmm3, [rsi + 192]", "vmovdqu64 zmm4, [rsi + 256]", "vmovdqu64 zmm5, [rsi + 320]",
            "vmovdqu64 zmm6, [rsi + 384]", "vmovdqu64 zmm7, [rsi + 448]", "vmovdqu64 zmm8, [rsi + 512]",
            "vmovdqu64 zmm9, [rsi + 576]", "vmovdqu64 zmm10, [rsi + 640]", "vmovdqu64 zmm11, [rsi + 704]",
            "vmovdqu64 zmm12, [rsi + 768]", "vmovdqu64 zmm13, [rsi + 832]", "vmovdqu64 zmm14, [rsi + 896]",
            "vmovdqu64 zmm15, [rsi + 960]", "vmovdqu64 zmm16, [rsi + 1024]", "vmovdqu64 zmm17, [rsi + 1088]",
            "vmovdqu64 zmm18, [rsi + 1152]", "vmovdqu64 zmm19, [rsi + 1216]", "vmovdqu64 zmm20, [rsi + 1280]",
            "vmovdqu64 zmm21, [rsi + 1344]", "vmovdqu64 zmm22, [rsi + 1408]", "vmovdqu64 zmm23, [rsi + 1472]",
            "vmovdqu64 zmm24, [rsi + 1536]", "vmovdqu64 zmm25, [rsi + 1600]", "vmovdqu64 zmm26, [rsi + 1664]",
            "vmovdqu64 zmm27, [rsi + 1728]", "vmovdqu64 zmm28, [rsi + 1792]", "vmovdqu64 zmm29, [rsi + 1856]",
            "vmovdqu64 zmm30, [rsi + 1920]", "vmovdqu64 zmm31, [rsi + 1984]",
        "mov eax, 0xa5a5", "kmovw k1, eax", "mov eax, 0x5a5a", "kmovw k7, eax",
        "mov eax, 0xe7", "xor edx, edx", "xsave64 [r8]", "kxorw k1, k1, k1", "kxorw k7, k7, k7",
        "vpxorq zmm0, zmm0, zmm0", "vpxorq zmm1, zmm1, zmm1", "vpxorq zmm2, zmm2, zmm2",
            "vpxorq zmm3, zmm3, zmm3", "vpxorq zmm4, zmm4, zmm4", "vpxorq zmm5, zmm5, zmm5",
            "vpxorq zmm6, zmm6, zmm6", "vpxorq zmm7, zmm7, zmm7", "vpxorq zmm8, zmm8, zmm8",
            "vpxorq zmm9, zmm9, zmm9", "vpxorq zmm10, zmm10, zmm10", "vpxorq zmm11, zmm11, zmm11",
            "vpxorq zmm12, zmm12, zmm12", "vpxorq zmm13, zmm13, zmm13", "vpxorq zmm14, zmm14, zmm14",
            "vpxorq zmm15, zmm15, zmm15", "vpxorq zmm16, zmm16, zmm16", "vpxorq zmm17, zmm17, zmm17",
            "vpxorq zmm18, zmm18, zmm18", "vpxorq zmm19, zmm19, zmm19", "vpxorq zmm20, zmm20, zmm20",
            "vpxorq zmm21, zmm21, zmm21", "vpxorq zmm22, zmm22, zmm22", "vpxorq zmm23, zmm23, zmm23",
            "vpxorq zmm24, zmm24, zmm24", "vpxorq zmm25, zmm25, zmm25", "vpxorq zmm26, zmm26, zmm26",
            "vpxorq zmm27, zmm27, zmm27", "vpxorq zmm28, zmm28, zmm28", "vpxorq zmm29, zmm29, zmm29",
            "vpxorq zmm30, zmm30, zmm30", "vpxorq zmm31, zmm31, zmm31",
        "mov r10, rbx", "xor eax, eax", "cpuid", "mov rbx, r10",
        "mov eax, 0xe7", "xor edx, edx", "xrstor64 [r8]",
        "kmovw eax, k1", "kmovw r9d, k7", "shl r9, 16", "or rax, r9",
        "vmovdqu64 [rdi + 0], zmm0", "vmovdqu64 [rdi + 64], zmm1", "vmovdqu64 [rdi + 128], zmm2",
            "vmovdqu64 [rdi + 192], zmm3", "vmovdqu64 [rdi + 256], zmm4", "vmovdqu64 [rdi + 320], zmm5",
            "vmovdqu64 [rdi + 384], zmm6", "vmovdqu64 [rdi + 448], zmm7", "vmovdqu64 [rdi + 512], zmm8",
            "vmovdqu64 [rdi + 576], zmm9", "vmovdqu64 [rdi + 640], zmm10", "vmovdqu64 [rdi + 704], zmm11",
            "vmovdqu64 [rdi + 768], zmm12", "vmovdqu64 [rdi + 832], zmm13", "vmovdqu64 [rdi + 896], zmm14",
            "vmovdqu64 [rdi + 960], zmm15", "vmovdqu64 [rdi + 1024], zmm16", "vmovdqu64 [rdi + 1088], zmm17",
            "vmovdqu64 [rdi + 1152], zmm18", "vmovdqu64 [rdi + 1216], zmm19", "vmovdqu64 [rdi + 1280], zmm20",
            "vmovdqu64 [rdi + 1344], zmm21", "vmovdqu64 [rdi + 1408], zmm22", "vmovdqu64 [rdi + 1472], zmm23",
            "vmovdqu64 [rdi + 1536], zmm24", "vmovdqu64 [rdi + 1600], zmm25", "vmovdqu64 [rdi + 1664], zmm26",
            "vmovdqu64 [rdi + 1728], zmm27", "vmovdqu64 [rdi + 1792], zmm28", "vmovdqu64 [rdi + 1856], zmm29",
            "vmovdqu64 [rdi + 1920], zmm30", "vmovdqu64 [rdi + 1984], zmm31",
        in("rsi") BEFORE.addr(), in("rdi") AFTER.addr(), in("r8") AREA.addr(),
        out("rax") masks, out("rcx") _, out("rdx") _, out("r9") _, out("r10") _
    );
    t.eq("masks k1 and k7", masks, 0x5a5a_a5a5u64);
    same_vectors(t);
}

/// XSAVEOPT leaves out what is in its initial configuration, and nothing else. Intel SDM vol. 1, 13.6 and 13.9.
fn optimised(t: &mut Case) {
    if !enable_avx512(t) {
        return;
    }
    if cpuid(0xd, 1).eax & 1 == 0 {
        return t.skip("no XSAVEOPT");
    }
    // The header's XSTATE_BV after a save with one register in use.
    macro_rules! in_use {
        ($($insn:literal),+) => {{
            let area = AREA.addr();
            (0..512u64).for_each(|word| poke(area + 8 * word, 0u64));
            exec!(
                "mov eax, 0xe7", "xor edx, edx", "xrstor64 [r8]",
                "mov rax, -1", $($insn,)+
                "mov eax, 0xe7", "xor edx, edx", "xsaveopt64 [r8]",
                in("r8") area, out("rax") _, out("rdx") _
            );
            peek::<u64>(area + 512) & 0xe4
        }};
    }
    t.eq("nothing", in_use!("nop"), 0u64);
    t.eq("bits 127:0 of ZMM16", in_use!("vmovq xmm16, rax"), 1u64 << 7);
    t.eq("bits 511:0 of ZMM31", in_use!("vpbroadcastq zmm31, rax"), 1u64 << 7);
    t.eq("bits 255:0 of ZMM1", in_use!("vpbroadcastq ymm1, rax"), 1u64 << 2);
    t.eq("bits 511:0 of ZMM1", in_use!("vpbroadcastq zmm1, rax"), 1u64 << 2 | 1 << 6);
    t.eq("K3", in_use!("kmovw k3, eax"), 1u64 << 5);
}

/// Two pages for accesses that cross from one to the other.
static PAGES: Racy<[Lines; 3]> = Racy::new([Lines::ZERO; 3]);

/// Loads and stores of all lengths across a page boundary move every byte.
fn across_pages(t: &mut Case) {
    if !enable_avx512(t) {
        return;
    }
    macro_rules! moves {
        ($name:literal, $bytes:literal, $load:literal, $store:literal) => {
            for before in (1..$bytes as u64).step_by(5) {
                let boundary = (PAGES.addr() + 0x1fff) & !0xfff;
                let at = boundary - before;
                (0..$bytes as u64 / 8).for_each(|word| poke(at + 8 * word, !0u64));
                exec!($load, $store, in("rsi") BEFORE.addr(), in("rdi") at);
                let stored = (0..$bytes as u64 / 8)
                    .all(|word| peek::<u64>(at + 8 * word) == peek::<u64>(BEFORE.addr() + 8 * word));
                t.check(stored, format_args!("{} stored {before} bytes before a page's end", $name));
                (0..8u64).for_each(|word| poke(AFTER.addr() + 8 * word, 0u64));
                exec!($load, $store, in("rsi") at, in("rdi") AFTER.addr());
                let loaded = (0..$bytes as u64 / 8)
                    .all(|word| peek::<u64>(AFTER.addr() + 8 * word) == peek::<u64>(BEFORE.addr() + 8 * word));
                t.check(loaded, format_args!("{} loaded {before} bytes before a page's end", $name));
            }
        };
    }
    moves!("XMM16", 16, "vmovdqu64 xmm16, [rsi]", "vmovdqu64 [rdi], xmm16");
    moves!("YMM16", 32, "vmovdqu64 ymm16, [rsi]", "vmovdqu64 [rdi], ymm16");
    moves!("ZMM16", 64, "vmovdqu64 zmm16, [rsi]", "vmovdqu64 [rdi], zmm16");
    moves!("YMM1", 32, "vmovdqu ymm1, [rsi]", "vmovdqu [rdi], ymm1");
    moves!("ZMM1 by dwords", 64, "vmovups zmm1, [rsi]", "vmovups [rdi], zmm1");
}
