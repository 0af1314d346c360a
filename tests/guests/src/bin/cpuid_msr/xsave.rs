//! XCR0, XSETBV and the XSAVE leaf.
use guests::exec;
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{catch, GP, UD};
use guests::user;

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
        for bit in (2..64).filter(|bit| offered >> bit & 1 == 0) {
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
fn enable(t: &mut Case) -> bool {
    if !has(1, 0, |r| r.ecx, 26) {
        t.skip("no XSAVE");
        return false;
    }
    set_cr4(cr4() | CR4_OSXSAVE | 3 << 9);
    xsetbv(0, 1);
    true
}

fn offered() -> u64 {
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
