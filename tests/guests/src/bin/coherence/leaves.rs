//! Leaves against leaves.
use crate::view::{amd, bit, intel, leaf, Bit, A, B, C, D, EXT1, EXT8};
use guests::frames;
use guests::platform;
use guests::prelude::*;
use guests::report::{case, Case};

/// The first only with the second (SDM vol. 1, chapters 10 to 15; APM vol. 3, appendix D).
const NEEDS: &[(&str, Bit, Bit)] = &[
    ("SSE needs FXSR", (1, 0, D, 25), (1, 0, D, 24)),
    ("SSE2 needs SSE", (1, 0, D, 26), (1, 0, D, 25)),
    ("SSE3 needs SSE2", (1, 0, C, 0), (1, 0, D, 26)),
    ("SSSE3 needs SSE3", (1, 0, C, 9), (1, 0, C, 0)),
    ("SSE4.1 needs SSSE3", (1, 0, C, 19), (1, 0, C, 9)),
    ("SSE4.2 needs SSE4.1", (1, 0, C, 20), (1, 0, C, 19)),
    ("PCLMULQDQ needs SSE2", (1, 0, C, 1), (1, 0, D, 26)),
    ("AES needs SSE2", (1, 0, C, 25), (1, 0, D, 26)),
    ("SHA needs SSE2", (7, 0, B, 29), (1, 0, D, 26)),
    ("GFNI needs SSE2", (7, 0, C, 8), (1, 0, D, 26)),
    ("MCA needs MCE", (1, 0, D, 14), (1, 0, D, 7)),
    ("PSE-36 needs PSE", (1, 0, D, 17), (1, 0, D, 3)),
    ("x2APIC needs APIC", (1, 0, C, 21), (1, 0, D, 9)),
    ("TSC deadline needs APIC", (1, 0, C, 24), (1, 0, D, 9)),
    ("TSC deadline needs TSC", (1, 0, C, 24), (1, 0, D, 4)),
    ("ARAT needs APIC", (6, 0, A, 2), (1, 0, D, 9)),
    ("TSC_ADJUST needs TSC", (7, 0, B, 1), (1, 0, D, 4)),
    ("RDTSCP needs TSC", (EXT1, 0, D, 27), (1, 0, D, 4)),
    ("invariant TSC needs TSC", (0x8000_0007, 0, D, 8), (1, 0, D, 4)),
    ("CLFLUSHOPT needs CLFLUSH", (7, 0, B, 23), (1, 0, D, 19)),
    ("CLWB needs CLFLUSH", (7, 0, B, 24), (1, 0, D, 19)),
    ("NX needs PAE", (EXT1, 0, D, 20), (1, 0, D, 6)),
    ("long mode needs PAE", (EXT1, 0, D, 29), (1, 0, D, 6)),
    ("1 GiB pages need long mode", (EXT1, 0, D, 26), (EXT1, 0, D, 29)),
    ("CMPXCHG16B needs CMPXCHG8B", (1, 0, C, 13), (1, 0, D, 8)),
    ("INVPCID needs PCID", (7, 0, B, 10), (1, 0, C, 17)),
    ("PKU needs its state", (7, 0, C, 3), (0xd, 0, A, 9)),
    ("PKRU state needs PKU", (0xd, 0, A, 9), (7, 0, C, 3)),
    ("OSPKE needs PKU", (7, 0, C, 4), (7, 0, C, 3)),
    ("OSXSAVE needs XSAVE", (1, 0, C, 27), (1, 0, C, 26)),
    ("XSAVE needs x87 state", (1, 0, C, 26), (0xd, 0, A, 0)),
    ("XSAVE needs SSE state", (1, 0, C, 26), (0xd, 0, A, 1)),
    ("x87 state needs XSAVE", (0xd, 0, A, 0), (1, 0, C, 26)),
    ("XSAVEOPT needs XSAVE", (0xd, 1, A, 0), (1, 0, C, 26)),
    ("XSAVEC needs XSAVE", (0xd, 1, A, 1), (1, 0, C, 26)),
    ("XSAVES needs XSAVEC", (0xd, 1, A, 3), (0xd, 1, A, 1)),
    ("AVX needs XSAVE", (1, 0, C, 28), (1, 0, C, 26)),
    ("AVX needs SSE4.2", (1, 0, C, 28), (1, 0, C, 20)),
    ("AVX needs its state", (1, 0, C, 28), (0xd, 0, A, 2)),
    ("AVX state needs AVX", (0xd, 0, A, 2), (1, 0, C, 28)),
    ("FMA needs AVX", (1, 0, C, 12), (1, 0, C, 28)),
    ("F16C needs AVX", (1, 0, C, 29), (1, 0, C, 28)),
    ("XOP needs AVX", (EXT1, 0, C, 11), (1, 0, C, 28)),
    ("FMA4 needs AVX", (EXT1, 0, C, 16), (1, 0, C, 28)),
    ("AVX2 needs AVX", (7, 0, B, 5), (1, 0, C, 28)),
    ("VAES needs AVX", (7, 0, C, 9), (1, 0, C, 28)),
    ("VAES needs AES", (7, 0, C, 9), (1, 0, C, 25)),
    ("VPCLMULQDQ needs AVX", (7, 0, C, 10), (1, 0, C, 28)),
    ("VPCLMULQDQ needs PCLMULQDQ", (7, 0, C, 10), (1, 0, C, 1)),
    ("AVX-VNNI needs AVX2", (7, 1, A, 4), (7, 0, B, 5)),
    ("AVX512F needs AVX2", (7, 0, B, 16), (7, 0, B, 5)),
    ("AVX512F needs mask state", (7, 0, B, 16), (0xd, 0, A, 5)),
    ("AVX512F needs upper-half state", (7, 0, B, 16), (0xd, 0, A, 6)),
    ("AVX512F needs high-register state", (7, 0, B, 16), (0xd, 0, A, 7)),
    ("AVX-512 state needs AVX512F", (0xd, 0, A, 5), (7, 0, B, 16)),
    ("AVX512DQ needs AVX512F", (7, 0, B, 17), (7, 0, B, 16)),
    ("AVX512IFMA needs AVX512F", (7, 0, B, 21), (7, 0, B, 16)),
    ("AVX512CD needs AVX512F", (7, 0, B, 28), (7, 0, B, 16)),
    ("AVX512BW needs AVX512F", (7, 0, B, 30), (7, 0, B, 16)),
    ("AVX512VL needs AVX512F", (7, 0, B, 31), (7, 0, B, 16)),
    ("AVX512VBMI needs AVX512BW", (7, 0, C, 1), (7, 0, B, 30)),
    ("AVX512VNNI needs AVX512F", (7, 0, C, 11), (7, 0, B, 16)),
    ("3DNow needs MMX", (EXT1, 0, D, 31), (1, 0, D, 23)),
    ("3DNow's extensions need 3DNow", (EXT1, 0, D, 30), (EXT1, 0, D, 31)),
    ("FFXSR needs FXSR", (EXT1, 0, D, 25), (1, 0, D, 24)),
    ("SSE4A needs SSE3", (EXT1, 0, C, 6), (1, 0, C, 0)),
    ("a state of bound registers needs MPX", (0xd, 0, A, 3), (7, 0, B, 14)),
    ("MPX needs its state", (7, 0, B, 14), (0xd, 0, A, 3)),
];

pub(crate) fn run() {
    case("leaf.needs", |t| {
        for &(what, feature, needed) in NEEDS {
            t.yes(what, !bit(feature) || bit(needed));
        }
    });
    case("leaf.vendor_and_ranges", vendor_and_ranges);
    case("leaf.beyond_the_last", beyond_the_last);
    case("leaf.beyond_the_last_subleaf", |t| {
        for subleaf in [leaf(7, 0)[A] + 1, 0x40, !0] {
            t.check(
                leaf(7, subleaf) == [0; 4],
                format_args!("zeros in 7.{subleaf:x}, got {:x?}", leaf(7, subleaf)),
            );
        }
        if bit((1, 0, C, 26)) {
            t.check(leaf(0xd, 64) == [0; 4], format_args!("zeros in 0Dh.64, got {:x?}", leaf(0xd, 64)));
        }
    });
    case("leaf.reserved_by_the_vendor", reserved_by_the_vendor);
    case("leaf.topology", topology);
    case("leaf.caches", caches);
    case("leaf.state_areas", state_areas);
    case("leaf.addresses", |t| {
        let [widths, ..] = leaf(EXT8, 0);
        t.within("physical bits", u64::from(widths & 0xff), 32, 52);
        let linear = if bit((7, 0, C, 16)) { 57 } else { 48 };
        t.eq("linear bits as LA57 says", widths >> 8 & 0xff, linear as u32);
    });
    case("leaf.rates", rates);
    case("leaf.hypervisor", |t| {
        let name = platform::signature();
        t.eq("a signature and the hypervisor bit", name != [0; 12], bit((1, 0, C, 31)));
        if platform::umbra() {
            t.check(name == platform::UMBRA_SIGNATURE, format_args!("UmbraUmbraUm, got {name:?}"));
            t.eq("the range's last leaf", cpuid(0x4000_0000, 0).eax, 0x4000_0001u32);
            let beyond = cpuid(0x4000_0002, 0);
            t.eq("zeros beyond it", beyond.eax | beyond.ebx | beyond.ecx | beyond.edx, 0u32);
        }
    });
}

fn vendor_and_ranges(t: &mut Case) {
    let (basic, extended) = (cpuid(0, 0), cpuid(0x8000_0000, 0));
    t.yes("a vendor that is known", intel() || amd());
    let family = leaf(1, 0)[A] >> 8 & 15;
    if amd() {
        // APM vol. 3, E.4.1: the extended range repeats the name, and 8000_0001h the signature.
        t.yes(
            "the vendor again",
            (extended.ebx, extended.ecx, extended.edx) == (basic.ebx, basic.ecx, basic.edx),
        );
        t.eq("the signature again", leaf(EXT1, 0)[A], leaf(1, 0)[A]);
    } else {
        t.yes("family 6 or 15", family == 6 || family == 7 || family == 15);
        t.eq("signature in 8000_0001h", leaf(EXT1, 0)[A], 0u32);
    }
    t.yes(
        "AMD's topology leaves exist with their bit",
        !bit((EXT1, 0, C, 22)) || extended.eax >= 0x8000_001e,
    );
    t.yes("SVM's leaf exists with its bit", !bit((EXT1, 0, C, 2)) || extended.eax >= 0x8000_000a);
    t.yes("XSAVE's leaf exists with its bit", !bit((1, 0, C, 26)) || basic.eax >= 0xd);
}

/// Zeros on AMD; Intel repeats its highest basic leaf (SDM vol. 2, CPUID).
fn beyond_the_last(t: &mut Case) {
    if t.skip_on_bare_tcg("it repeats the highest basic leaf for every vendor") {
        return;
    }
    let max = cpuid(0, 0).eax;
    let zero = Cpuid { eax: 0, ebx: 0, ecx: 0, edx: 0 };
    let expected = if intel() { cpuid(max, 0) } else { zero };
    for beyond in [max + 1, max + 0x100, cpuid(0x8000_0000, 0).eax + 1, 0x8fff_ffff] {
        let got = cpuid(beyond, 0);
        t.check(got == expected, format_args!("{expected:x?} in {beyond:x}, got {got:x?}"));
    }
}

fn reserved_by_the_vendor(t: &mut Case) {
    if t.skip_on_bare_tcg("it shows every vendor's leaves") {
        return;
    }
    let absent: &[u32] = if intel() {
        &[3, 0x8000_0005, 0x8000_000a, 0x8000_0019, 0x8000_001d, 0x8000_001e, 0x8000_0021]
    } else {
        &[2, 3, 4, 9, 0xa, 0x12, 0x14, 0x15, 0x16, 0x18, 0x1a, 0x1c, 0x1f]
    };
    for &number in absent {
        t.check(leaf(number, 0) == [0; 4], format_args!("zeros in {number:x}, got {:x?}", leaf(number, 0)));
    }
    if intel() {
        t.masked("Intel's bits of 8000_0001h ECX", leaf(EXT1, 0)[C], 0u32, !0x121);
        t.masked("Intel's bits of 8000_0001h EDX", leaf(EXT1, 0)[D], 0u32, !0x2c10_0800);
    }
}

/// What levels of leaf 0Bh or 1Fh say: logical processors in the outermost, and the APIC id bits below the package.
fn levels(t: &mut Case, number: u32) -> (u32, u32) {
    let mut outermost = (1, 0);
    let mut last_shift = 0;
    for level in 0..8 {
        let [shift, count, kind, _] = leaf(number, level);
        t.eq("the subleaf in ECX", kind & 0xff, level);
        if kind >> 8 & 0xff == 0 {
            break;
        }
        t.yes("levels that grow", shift >= last_shift);
        last_shift = shift & 0x1f;
        outermost = (count & 0xffff, last_shift);
    }
    outermost
}

fn topology(t: &mut Case) {
    let [_, ebx, ..] = leaf(1, 0);
    let (htt, logical, id) = (bit((1, 0, D, 28)), ebx >> 16 & 0xff, ebx >> 24);
    t.yes("more than one logical processor only with HTT", htt || logical <= 1);
    let mut counts = None;
    for number in [0xb, 0x1f] {
        if leaf(number, 0)[C] >> 8 & 0xff == 0 {
            continue;
        }
        let (count, shift) = levels(t, number);
        t.yes("a count that fits its id bits", count <= 1 << shift);
        t.eq("an id in the first package", leaf(number, 0)[D] >> shift, id >> shift);
        t.eq("the low bits of the x2APIC id", leaf(number, 0)[D] & 0xff, id);
        if let Some(known) = counts {
            t.yes("leaf 1Fh as leaf 0Bh", known == (count, shift));
        }
        counts = Some((count, shift));
    }
    if let Some((count, shift)) = counts {
        if htt {
            // Intel counts ids, AMD processors.
            let expected = if intel() { 1 << shift } else { count };
            t.eq("logical processors in leaf 1", logical, expected);
        }
        if amd() {
            let cores = leaf(EXT8, 0)[C];
            t.eq("processors in 8000_0008h", (cores & 0xff) + 1, count);
            t.eq("id bits in 8000_0008h", cores >> 12 & 15, shift);
        }
    }
    if amd() && bit((EXT1, 0, C, 22)) {
        t.eq("the id in 8000_001Eh", leaf(0x8000_001e, 0)[A] & 0xff, id);
    }
}

fn caches(t: &mut Case) {
    let number = if intel() { 4 } else { 0x8000_001d };
    if leaf(number, 0)[A] & 0x1f == 0 {
        return t.skip("no leaf of cache parameters");
    }
    let [_, ebx, ..] = leaf(1, 0);
    let ids = if bit((1, 0, D, 28)) { (ebx >> 16 & 0xff).next_power_of_two().max(1) } else { 1 };
    for index in 0..16 {
        let [eax, shape, sets, _] = leaf(number, index);
        if eax & 0x1f == 0 {
            break;
        }
        t.within("cache level", u64::from(eax >> 5 & 7), 1, 4);
        // Emulators give the caches of the model, and their own number of processors.
        t.yes("not shared by more than the package has", !platform::umbra() || eax >> 14 & 0xfff < ids);
        t.eq("line size as CLFLUSH has it", (shape & 0xfff) + 1, (ebx >> 8 & 0xff) * 8);
        if intel() && platform::umbra() {
            t.eq("ids in the package", (eax >> 26) + 1, ids.min(64));
        }
        let bytes = u64::from((shape >> 22) + 1)
            * u64::from((shape >> 12 & 0x3ff) + 1)
            * u64::from((shape & 0xfff) + 1)
            * (u64::from(sets) + 1);
        if eax & 0x1f != 2 && eax >> 5 & 7 == 2 && platform::umbra() {
            t.eq("KiB of L2 in 8000_0006h", leaf(0x8000_0006, 0)[C] >> 16, (bytes >> 10) as u32);
        }
    }
}

/// Offsets and sizes of leaf 0Dh: outside the legacy region, not over each other, within the whole.
fn state_areas(t: &mut Case) {
    if !bit((1, 0, C, 26)) {
        return t.check(
            leaf(0xd, 0) == [0; 4],
            format_args!("an empty leaf without XSAVE, got {:x?}", leaf(0xd, 0)),
        );
    }
    let [low, current, all, high] = leaf(0xd, 0);
    t.eq("components above 31", high, 0u32);
    t.yes("not more than all", current <= all);
    let mut end = 576;
    for one in 2..32 {
        let [size, offset, flags, _] = leaf(0xd, one);
        if low >> one & 1 == 0 {
            // A supervisor state is announced by leaf 0Dh.1.
            let supervisor = leaf(0xd, 1)[C] >> one & 1 != 0;
            t.yes("nothing of a component that is not there", supervisor || [size, offset, flags] == [0; 3]);
            continue;
        }
        t.check(size != 0, format_args!("a size of component {one} in {low:#x}, got 0"));
        t.yes("a place behind the header", offset >= 576);
        t.eq("a user state", flags & 1, 0u32);
        end = end.max(offset + size);
        for other in (one + 1..32).filter(|other| low >> other & 1 != 0) {
            let [other_size, other_offset, ..] = leaf(0xd, other);
            t.yes(
                "places that do not overlap",
                offset + size <= other_offset || other_offset + other_size <= offset,
            );
        }
    }
    t.eq("the size of all", all, end);
}

/// The TSC's rate in kHz as KVM's clock has it: what Linux computes from the multiplier and the shift.
fn clock_khz(t: &mut Case) -> Option<u64> {
    let name = cpuid(0x4000_0100, 0);
    if name.ebx != u32::from_le_bytes(*b"KVMK") || cpuid(0x4000_0101, 0).eax & 8 == 0 {
        return None;
    }
    let page = frames::page();
    t.works("enabling the clock", try_wrmsr(0x4b56_4d01, page | 1));
    wrmsr(0x4b56_4d01, 0);
    let (mul, shift): (u32, i8) = (peek(page + 24), peek(page + 28));
    t.yes("a multiplier", mul != 0);
    let khz = (1_000_000u64 << 32) / u64::from(mul.max(1));
    Some(if shift < 0 { khz << -shift } else { khz >> shift })
}

fn rates(t: &mut Case) {
    t.yes("an invariant TSC under Umbra", !platform::umbra() || bit((0x8000_0007, 0, D, 8)));
    let [denominator, numerator, crystal, _] = leaf(0x15, 0);
    let exact = (denominator != 0 && crystal != 0)
        .then(|| u64::from(crystal) * u64::from(numerator) / u64::from(denominator) / 1000);
    let nominal = u64::from(leaf(0x16, 0)[A] & 0xffff) * 1000;
    let clock = clock_khz(t);
    if let (Some(exact), Some(clock)) = (exact, clock) {
        t.within("the clock's kHz as leaf 15h's", clock, exact - exact / 1000, exact + exact / 1000);
    }
    if let (Some(rate), true) = (clock.or(exact), nominal != 0 && platform::umbra()) {
        t.within("the nominal kHz of leaf 16h", nominal, rate.saturating_sub(1000), rate + 1000);
        t.yes("not above the highest", leaf(0x16, 0)[A] <= leaf(0x16, 0)[B]);
    }
    if denominator != 0 && platform::umbra() {
        t.eq(
            "the crystal is the APIC timer's clock, and the reference of leaf 16h",
            crystal / 1_000_000,
            leaf(0x16, 0)[C],
        );
    }
}
