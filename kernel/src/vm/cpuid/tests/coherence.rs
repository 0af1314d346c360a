//! No leaf contradicts another: what needs what, what belongs to which vendor, and what follows the vCPU's state, as
//! plain lists from the manuals (SDM vol. 1, chapters 5 and 10 to 15, and vol. 2, "CPUID"; APM vol. 3, appendices D and E).
use super::*;

// ---- Hosts ----

/// A Nehalem: 36-bit family, no XSAVE, RDTSCP, caches in leaf 2 and leaf 4, basic leaves to 0Bh.
pub(super) const NEHALEM: Table = Table(&[
    (0, 0, [0xb, INTEL[0], INTEL[1], INTEL[2]]),
    (1, 0, [0x0001_06a5, 0x0010_0800, 0x009c_e3bd, 0xbfeb_fbff]),
    (2, 0, [0x5503_5a01, 0x00f0_b2e4, 0, 0x09ca_212c]),
    (4, 0, [0x1c00_4121, 0x01c0_003f, 0x3f, 0]),
    (4, 1, [0x1c00_4122, 0x00c0_003f, 0x7f, 0]),
    (4, 2, [0x1c00_4143, 0x01c0_003f, 0x1ff, 0]),
    (4, 3, [0x1c03_c163, 0x03c0_003f, 0x1fff, 2]),
    (5, 0, [0x40, 0x40, 3, 0x1120]),
    (6, 0, [3, 2, 1, 0]),
    (0xa, 0, [0x0730_0403, 0x4, 0, 0x603]),
    (0xb, 0, [1, 2, 0x100, 4]),
    (0xb, 1, [4, 8, 0x201, 4]),
    (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, 1, 0x2810_0800]),
    (0x8000_0002, 0, [0x6574_6e49, 0x2952_286c, 0x726f_4320, 0x4d54_2865]),
    (0x8000_0006, 0, [0, 0, 0x0100_6040, 0]),
    (0x8000_0007, 0, [0, 0, 0, 0x100]),
    (0x8000_0008, 0, [0x0000_3024, 0, 0, 0]),
]);

/// An Ice Lake server: five-level paging, 52 address bits, the TLBs in leaf 18h, topology in 1Fh, SGX, PT, PCONFIG.
pub(super) const ICELAKE: Table = Table(&[
    (0, 0, [0x1b, INTEL[0], INTEL[1], INTEL[2]]),
    (1, 0, [0x0006_06a6, 0x0040_0800, 0x7ffe_fbff, 0xbfeb_fbff]),
    (2, 0, [0x00fe_ff01, 0x0000_00f0, 0, 0]),
    (4, 0, [0xfc00_4121, 0x02c0_003f, 0x3f, 0]),
    (4, 1, [0xfc00_4122, 0x01c0_003f, 0x3f, 0]),
    (4, 2, [0xfc00_4143, 0x04c0_003f, 0x3ff, 0]),
    (4, 3, [0xfc0f_c163, 0x02c0_003f, 0xbfff, 4]),
    (5, 0, [0x40, 0x40, 3, 0x2020]),
    (6, 0, [0xdf77, 2, 9, 0]),
    (7, 0, [0, 0xf3bf_b7ef, 0x18c1_5f7e, 0xbc04_0412]),
    (0xa, 0, [0x0830_0805, 0, 0xf, 0x8604]),
    (0xb, 0, [1, 2, 0x100, 6]),
    (0xb, 1, [6, 0x38, 0x201, 6]),
    (0xd, 0, [0x2e7, 0xa88, 0xa88, 0]),
    (0xd, 1, [0xf, 0xa08, 0x100, 0]),
    (0xd, 2, [0x100, 0x240, 0, 0]),
    (0xd, 5, [0x40, 0x440, 0, 0]),
    (0xd, 6, [0x200, 0x480, 0, 0]),
    (0xd, 7, [0x400, 0x680, 0, 0]),
    (0xd, 8, [0x80, 0, 1, 0]),
    (0xd, 9, [0x8, 0xa80, 0, 0]),
    (0x12, 0, [0x63, 0, 0, 0x381f]),
    (0x14, 0, [1, 0x1f, 7, 0]),
    (0x15, 0, [2, 0xc0, 0x017d_7840, 0]),
    (0x16, 0, [0x960, 0xdac, 0x64, 0]),
    (0x18, 0, [8, 0, 0, 0]),
    (0x18, 1, [0, 0x0008_0001, 0x10, 0x0000_4022]),
    (0x18, 2, [0, 0x0004_0001, 0x10, 0x0000_4021]),
    (0x18, 4, [0, 0x0004_000e, 1, 0x0000_4124]),
    (0x18, 8, [0, 0x0008_0005, 0x80, 0x0000_4143]),
    (0x1b, 0, [1, 1, 0, 0]),
    (0x1f, 0, [0, 0, 0, 0]),
    (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
    (0x8000_0006, 0, [0, 0, 0x0500_7040, 0]),
    (0x8000_0007, 0, [0, 0, 0, 0x100]),
    (0x8000_0008, 0, [0x0000_3934, 0x200, 0, 0]),
]);

// ---- Rules ----

/// Registers by name.
const A: usize = 0;
const B: usize = 1;
const C: usize = 2;
const D: usize = 3;
/// Leaf 8000_0001h.
const EXT1: u32 = 0x8000_0001;

/// A bit: leaf, subleaf, register, number.
type Bit = (u32, u32, usize, u32);

/// The first only with the second.
const NEEDS: &[(Bit, Bit)] = &[
    ((1, 0, D, 25), (1, 0, D, 24)),         // SSE: FXSR
    ((1, 0, D, 26), (1, 0, D, 25)),         // SSE2: SSE
    ((1, 0, C, 0), (1, 0, D, 26)),          // SSE3: SSE2
    ((1, 0, C, 9), (1, 0, C, 0)),           // SSSE3: SSE3
    ((1, 0, C, 19), (1, 0, C, 9)),          // SSE4.1: SSSE3
    ((1, 0, C, 20), (1, 0, C, 19)),         // SSE4.2: SSE4.1
    ((1, 0, C, 1), (1, 0, D, 26)),          // PCLMULQDQ: SSE2
    ((1, 0, C, 25), (1, 0, D, 26)),         // AES: SSE2
    ((7, 0, B, 29), (1, 0, D, 26)),         // SHA: SSE2
    ((7, 0, C, 8), (1, 0, D, 26)),          // GFNI: SSE2
    ((1, 0, D, 14), (1, 0, D, 7)),          // MCA: MCE
    ((1, 0, D, 17), (1, 0, D, 3)),          // PSE-36: PSE
    ((1, 0, C, 21), (1, 0, D, 9)),          // x2APIC: APIC
    ((1, 0, C, 24), (1, 0, D, 9)),          // TSC deadline: APIC
    ((1, 0, C, 24), (1, 0, D, 4)),          // TSC deadline: TSC
    ((7, 0, B, 1), (1, 0, D, 4)),           // TSC_ADJUST: TSC
    ((7, 0, B, 1), (1, 0, D, 5)),           // TSC_ADJUST: MSR
    ((EXT1, 0, D, 27), (1, 0, D, 4)),       // RDTSCP: TSC
    ((0x8000_0007, 0, D, 8), (1, 0, D, 4)), // Invariant TSC: TSC
    ((7, 0, B, 23), (1, 0, D, 19)),         // CLFLUSHOPT: CLFLUSH
    ((7, 0, B, 24), (1, 0, D, 19)),         // CLWB: CLFLUSH
    ((EXT1, 0, D, 20), (1, 0, D, 6)),       // NX: PAE
    ((EXT1, 0, D, 29), (1, 0, D, 6)),       // Long mode: PAE
    ((EXT1, 0, D, 26), (EXT1, 0, D, 29)),   // 1 GiB pages: long mode
    ((EXT1, 0, C, 0), (EXT1, 0, D, 29)),    // LAHF: long mode
    ((1, 0, C, 13), (EXT1, 0, D, 29)),      // CMPXCHG16B: long mode
    ((1, 0, C, 17), (EXT1, 0, D, 29)),      // PCID: long mode
    ((7, 0, B, 10), (1, 0, C, 17)),         // INVPCID: PCID
    ((7, 0, B, 0), (EXT1, 0, D, 29)),       // FSGSBASE: long mode
    ((7, 0, C, 16), (EXT1, 0, D, 29)),      // LA57: long mode
    ((7, 0, C, 3), (EXT1, 0, D, 29)),       // PKU: long mode
    ((7, 0, C, 31), (EXT1, 0, D, 29)),      // PKS: long mode
    ((7, 0, C, 3), (0xd, 0, A, 9)),         // PKU: its state
    ((0xd, 0, A, 9), (7, 0, C, 3)),         // and back
    ((1, 0, C, 26), (1, 0, D, 24)),         // XSAVE: FXSR
    ((1, 0, C, 26), (0xd, 0, A, 0)),        // XSAVE: x87 state
    ((1, 0, C, 26), (0xd, 0, A, 1)),        // XSAVE: SSE state
    ((0xd, 0, A, 0), (1, 0, C, 26)),        // x87 state: XSAVE
    ((0xd, 1, A, 0), (1, 0, C, 26)),        // XSAVEOPT: XSAVE
    ((0xd, 1, A, 1), (1, 0, C, 26)),        // XSAVEC: XSAVE
    ((0xd, 1, A, 2), (1, 0, C, 26)),        // XGETBV of 1: XSAVE
    ((0xd, 1, A, 3), (0xd, 1, A, 1)),       // XSAVES: XSAVEC
    ((1, 0, C, 28), (1, 0, C, 26)),         // AVX: XSAVE
    ((1, 0, C, 28), (1, 0, C, 20)),         // AVX: SSE4.2
    ((1, 0, C, 28), (0xd, 0, A, 2)),        // AVX: its state
    ((0xd, 0, A, 2), (1, 0, C, 28)),        // and back
    ((1, 0, C, 12), (1, 0, C, 28)),         // FMA: AVX
    ((1, 0, C, 29), (1, 0, C, 28)),         // F16C: AVX
    ((EXT1, 0, C, 11), (1, 0, C, 28)),      // XOP: AVX
    ((EXT1, 0, C, 16), (1, 0, C, 28)),      // FMA4: AVX
    ((7, 0, B, 5), (1, 0, C, 28)),          // AVX2: AVX
    ((7, 0, C, 9), (1, 0, C, 28)),          // VAES: AVX
    ((7, 0, C, 9), (1, 0, C, 25)),          // VAES: AES
    ((7, 0, C, 10), (1, 0, C, 28)),         // VPCLMULQDQ: AVX
    ((7, 0, C, 10), (1, 0, C, 1)),          // VPCLMULQDQ: PCLMULQDQ
    ((7, 1, A, 4), (7, 0, B, 5)),           // AVX-VNNI: AVX2
    ((7, 1, A, 23), (7, 0, B, 5)),          // AVX-IFMA: AVX2
    ((7, 1, D, 4), (7, 0, B, 5)),           // AVX-VNNI-INT8: AVX2
    ((7, 1, D, 5), (7, 0, B, 5)),           // AVX-NE-CONVERT: AVX2
    ((7, 0, B, 16), (7, 0, B, 5)),          // AVX512F: AVX2
    ((7, 0, B, 16), (1, 0, C, 12)),         // AVX512F: FMA
    ((7, 0, B, 16), (0xd, 0, A, 5)),        // AVX512F: its states
    ((7, 0, B, 16), (0xd, 0, A, 6)),
    ((7, 0, B, 16), (0xd, 0, A, 7)),
    ((0xd, 0, A, 5), (7, 0, B, 16)), // and back
    ((0xd, 0, A, 6), (7, 0, B, 16)),
    ((0xd, 0, A, 7), (7, 0, B, 16)),
    ((7, 0, B, 17), (7, 0, B, 16)), // AVX512DQ
    ((7, 0, B, 21), (7, 0, B, 16)), // AVX512IFMA
    ((7, 0, B, 28), (7, 0, B, 16)), // AVX512CD
    ((7, 0, B, 30), (7, 0, B, 16)), // AVX512BW
    ((7, 0, B, 31), (7, 0, B, 16)), // AVX512VL
    ((7, 0, C, 1), (7, 0, B, 30)),  // AVX512VBMI: BW
    ((7, 0, C, 6), (7, 0, B, 30)),  // AVX512VBMI2: BW
    ((7, 0, C, 12), (7, 0, B, 30)), // AVX512BITALG: BW
    ((7, 0, C, 11), (7, 0, B, 16)), // AVX512VNNI
    ((7, 0, C, 14), (7, 0, B, 16)), // AVX512VPOPCNTDQ
    ((7, 0, D, 8), (7, 0, B, 16)),  // AVX512 VP2INTERSECT
    ((7, 0, D, 23), (7, 0, B, 30)), // AVX512FP16: BW, DQ, VL
    ((7, 0, D, 23), (7, 0, B, 17)),
    ((7, 0, D, 23), (7, 0, B, 31)),
    ((7, 1, A, 5), (7, 0, B, 30)),        // AVX512BF16: BW
    ((EXT1, 0, D, 31), (1, 0, D, 23)),    // 3DNow: MMX
    ((EXT1, 0, D, 30), (EXT1, 0, D, 31)), // its extensions
    ((EXT1, 0, D, 22), (1, 0, D, 23)),    // MMX extensions
    ((EXT1, 0, D, 25), (1, 0, D, 24)),    // FFXSR: FXSR
    ((EXT1, 0, C, 6), (1, 0, C, 0)),      // SSE4A: SSE3
];

/// Registers that Intel defines in part, with the bits that it does: the rest is zero.
const INTEL_DEFINED: &[(u32, [u32; 4])] = &[
    (0x8000_0001, [0, 0, 0x121, 0x2c10_0800]),
    (0x8000_0005, [0; 4]),
    (0x8000_0006, [0, 0, !0, 0]),
    (0x8000_0007, [0, 0, 0, 0x100]),
    (0x8000_0008, [0xffff, 0x200, 0, 0]),
];

/// Leaves that AMD reserves.
const RESERVED_BY_AMD: &[u32] =
    &[2, 3, 4, 9, 0xa, 0x12, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1f];

/// Leaves that an Intel guest does not see whatever the host has: MONITOR, DCA, counters, RDT, SGX, PT, SoC, key locker,
/// hybrid, PCONFIG, last branches, AMX.
const HIDDEN_ON_INTEL: &[u32] =
    &[3, 5, 8, 9, 0xa, 0xc, 0xe, 0xf, 0x10, 0x11, 0x12, 0x13, 0x14, 0x17, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e];

fn obeys(host: &impl HostCpuid, shape: &VmShape) {
    let table = CpuidTable::new(host, shape);
    let caps = *table.caps();
    let intel = caps.vendor == Vendor::Intel;
    let look = |leaf, subleaf| {
        let regs = table.lookup(leaf, subleaf, &cpu(0));
        [regs.eax, regs.ebx, regs.ecx, regs.edx]
    };
    let max = look(0, 0)[A];
    let max_extended = look(EXTENDED, 0)[A];
    // What is beyond the highest leaf is not a feature.
    let has = |(leaf, subleaf, register, number): Bit| {
        (leaf <= max || (EXTENDED..=max_extended).contains(&leaf))
            && look(leaf, subleaf)[register] >> number & 1 != 0
    };
    for &(feature, needed) in NEEDS {
        assert!(!has(feature) || has(needed), "{feature:x?} without {needed:x?}");
    }
    if intel {
        assert_eq!(max_extended, 0x8000_0008);
        for &(leaf, defined) in INTEL_DEFINED {
            for (value, mask) in look(leaf, 0).into_iter().zip(defined) {
                assert_eq!(value & !mask, 0, "{leaf:x}");
            }
        }
        for &leaf in HIDDEN_ON_INTEL {
            assert!(leaf >= max || look(leaf, 0) == [0; 4], "{leaf:x}");
        }
        check_l2(&look);
        check_rates(&look, shape.tsc_hz);
        let last = look(0x18, 0)[A];
        for subleaf in 0..=last {
            // A logical processor shares its TLBs with no other.
            assert!(max < 0x18 || look(0x18, subleaf)[D] >> 14 & 0xfff == 0, "{subleaf}");
        }
        assert!(max < 0x18 || (last <= 8 && look(0x18, last + 1) == [0; 4]));
        // SYSCALL is offered to 64-bit code alone.
        let outside = table.lookup(EXT1, 0, &CpuState { long64: false, ..cpu(0) });
        let mut inside = table.lookup(EXT1, 0, &cpu(0));
        inside.edx &= !(1 << 11);
        assert_eq!(outside, inside);
        assert!(caps.efer & 1 << 14 == 0, "FFXSR is AMD's");
    } else {
        for &leaf in RESERVED_BY_AMD {
            assert_eq!(look(leaf, 0), [0; 4], "{leaf:x}");
        }
        let outside = table.lookup(EXT1, 0, &CpuState { long64: false, ..cpu(0) });
        assert_eq!(outside, table.lookup(EXT1, 0, &cpu(0)));
    }
    // Registers follow CPUID.
    for (number, feature) in [
        (0, (EXT1, 0, D, 11)),
        (8, (EXT1, 0, D, 29)),
        (10, (EXT1, 0, D, 29)),
        (11, (EXT1, 0, D, 20)),
        (14, (EXT1, 0, D, 25)),
    ] {
        assert_eq!(caps.efer >> number & 1 != 0, has(feature), "EFER bit {number}");
    }
    assert_eq!(caps.efer & !0x4d01, 0);
    assert_eq!(caps.xsaves, has((0xd, 1, A, 3)));
    assert_eq!(caps.invpcid, has((7, 0, B, 10)));
    assert_eq!(caps.linear_bits() == 57, has((7, 0, C, 16)));
    assert_eq!(look(0x8000_0008, 0)[A] >> 8, u32::from(caps.linear_bits()));
    assert_eq!(look(0x8000_0008, 0)[A] & 0xff, u32::from(caps.phys_bits));
}

/// Leaf 8000_0006h has the L2 cache that leaf 4 has.
fn check_l2(look: &impl Fn(u32, u32) -> [u32; 4]) {
    let mut caches = (0..8).map(|index| look(4, index)).take_while(|cache| cache[A] & 0x1f != 0);
    let Some([_, shape, sets, _]) = caches.find(|cache| cache[A] >> 5 & 7 == 2 && cache[A] & 0x1f != 2)
    else {
        return;
    };
    let ways = u128::from((shape >> 22) + 1) * u128::from((shape >> 12 & 0x3ff) + 1);
    let bytes = ways * u128::from((shape & 0xfff) + 1) * (u128::from(sets) + 1);
    let ecx = look(0x8000_0006, 0)[C];
    assert_eq!(u128::from(ecx >> 16), (bytes >> 10).min(0xffff));
    assert_eq!(ecx & 0xff, ((shape & 0xfff) + 1) & 0xff);
}

/// Leaves 15h and 16h tell the rate at which the TSC counts, and the crystal is the local APIC's clock of 1 GHz.
fn check_rates(look: &impl Fn(u32, u32) -> [u32; 4], tsc_hz: u64) {
    let [denominator, numerator, crystal, _] = look(0x15, 0);
    if denominator != 0 {
        assert_eq!(crystal, 1_000_000_000);
        assert_eq!(u128::from(crystal) * u128::from(numerator), u128::from(tsc_hz) * u128::from(denominator));
    }
    let [base, highest, reference, _] = look(0x16, 0);
    assert_eq!(base, highest, "no turbo");
    if base != 0 {
        assert_eq!(reference, 1000);
        assert!((u64::from(base) * 1_000_000).abs_diff(tsc_hz) <= 500_000, "{base} MHz, {tsc_hz} Hz");
    }
}

// ---- Tests ----

#[test]
fn every_host_obeys_the_manuals() {
    for host in HOSTS {
        for tsc_hz in [1_000_000_000, 2_903_998_000, 65_535_499_999, 70_000_000_000, 0, u64::MAX] {
            obeys(host, &VmShape { tsc_hz, ..shape(4) });
        }
    }
}

#[test]
fn intel_generations() {
    let nehalem = CpuidTable::new(&NEHALEM, &shape(2));
    let icelake = CpuidTable::new(&ICELAKE, &VmShape { max_phys_bits: 52, ..shape(2) });
    let look = |table: &CpuidTable, leaf, subleaf| table.lookup(leaf, subleaf, &cpu(0));
    assert_eq!(look(&nehalem, 0, 0).eax, 0x16, "raised for the rates");
    assert_eq!(look(&nehalem, 2, 0), NEHALEM.cpuid(2, 0));
    assert_eq!(look(&nehalem, 4, 3).eax, 1 << 26 | 1 << 14 | 0x163);
    assert_eq!((look(&nehalem, 0xd, 0), nehalem.caps().xcr0), (CpuidLeaf::ZERO, 0));
    assert_eq!(nehalem.caps().cr4 & 1 << 18, 0, "no OSXSAVE");
    assert_eq!((nehalem.caps().phys_bits, nehalem.caps().linear_bits()), (36, 48));
    assert!(nehalem.caps().tsc_aux);

    assert_eq!(look(&icelake, 0, 0).eax, 0x1b);
    assert_eq!((icelake.caps().phys_bits, icelake.caps().linear_bits()), (52, 57));
    assert_eq!(icelake.caps().xcr0, 0x2e7);
    assert_eq!(look(&icelake, 0x18, 0).eax, 8);
    assert_eq!(look(&icelake, 0x18, 8), CpuidLeaf::new(0, 0x0008_0005, 0x80, 0x143));
    assert_eq!(look(&icelake, 0x18, 3), CpuidLeaf::ZERO);
    assert_eq!(look(&icelake, 0x8000_0008, 0), CpuidLeaf::new(0x3934, 0x200, 0, 0));
    assert_eq!(look(&icelake, 0x1b, 0), CpuidLeaf::ZERO);
    // 1 MiB in 16 ways, 512 KiB in 8, 1.25 MiB in 20.
    let skylake = CpuidTable::new(&SKYLAKE, &shape(2));
    assert_eq!(look(&skylake, 0x8000_0006, 0).ecx, 0x0400_8040);
    assert_eq!(look(&nehalem, 0x8000_0006, 0).ecx, 0x0100_6040);
    assert_eq!(look(&icelake, 0x8000_0006, 0).ecx, 0x0500_7040);
    // A state without a size is none, and its feature goes with it.
    let unsized_keys = Function(|leaf, subleaf| match (leaf, subleaf) {
        (0xd, 9) => CpuidLeaf::ZERO,
        _ => ICELAKE.cpuid(leaf, subleaf),
    });
    let table = CpuidTable::new(&unsized_keys, &shape(1));
    assert_eq!((table.caps().xcr0, look(&table, 7, 0).ecx & 8, table.caps().cr4 & 1 << 22), (0xe7, 0, 0));
    assert_eq!(look(&table, 0xd, 0).ecx, 0xa80);
    // Where four levels are all there is, the width says so.
    let four = Function(|leaf, subleaf| {
        let mut regs = ICELAKE.cpuid(leaf, subleaf);
        if leaf == 7 {
            regs.ecx &= !(1 << 16);
        }
        regs
    });
    assert_eq!(look(&CpuidTable::new(&four, &shape(1)), 0x8000_0008, 0).eax, 0x3030);
}

proptest! {
    /// Whatever a CPU claims, the guest's view obeys the manuals.
    #[test]
    fn coherence(
        seed: u64,
        intel: bool,
        dense: bool,
        max_basic in 0u32..0x30,
        max_extended in 0u32..0x30,
        tsc_khz in 0u64..80_000_000,
    ) {
        let host = Function(|leaf: u32, subleaf: u32| {
            let name = if intel { INTEL } else { AMD };
            let mut x = seed ^ (u64::from(leaf) << 32 | u64::from(subleaf)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut random = || {
                x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9).wrapping_add(0x94d0_49bb_1331_11eb);
                // A CPU that has nearly everything gets farther down the chains of needs.
                let word = (x >> 32) as u32;
                if dense { word | x as u32 | x.rotate_left(13) as u32 } else { word }
            };
            match leaf {
                0 => CpuidLeaf::new(max_basic, name[0], name[1], name[2]),
                EXTENDED => CpuidLeaf::new(EXTENDED + max_extended, name[0], name[1], name[2]),
                _ => CpuidLeaf::new(random(), random(), random(), random()),
            }
        });
        obeys(&host, &VmShape { tsc_hz: tsc_khz * 1000, ..shape(3) });
    }
}
