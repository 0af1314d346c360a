//! Tests of the CPUID policy: synthetic hosts of both vendors, and rules that every guest's view obeys.
use super::*;
use proptest::prelude::*;
use std::vec::Vec;

mod coherence;

// ---- Hosts ----

/// A CPU as a list of leaves: (leaf, subleaf, [EAX, EBX, ECX, EDX]).
struct Table(&'static [(u32, u32, [u32; 4])]);

impl HostCpuid for Table {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> CpuidLeaf {
        let found = self.0.iter().find(|(l, s, _)| (*l, *s) == (leaf, subleaf));
        found.map_or(CpuidLeaf::ZERO, |(_, _, [a, b, c, d])| CpuidLeaf::new(*a, *b, *c, *d))
    }
}

/// A CPU as a function.
struct Function<F>(F);

impl<F: Fn(u32, u32) -> CpuidLeaf> HostCpuid for Function<F> {
    fn cpuid(&self, leaf: u32, subleaf: u32) -> CpuidLeaf {
        self.0(leaf, subleaf)
    }
}

/// "AuthenticAMD" in EBX, ECX, EDX order.
const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];
const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];

/// A full emulation that calls itself AMD, with SVM, MONITOR, AVX2, MPX and protection keys; no NRIPS, no topology
/// extensions, basic leaves to 0Dh.
const EMULATED_AMD: Table = Table(&[
    (0, 0, [0xd, AMD[0], AMD[1], AMD[2]]),
    (1, 0, [0x0006_0fb1, 0x0004_0800, 0xfffa_320b, 0x178b_fbff]),
    (4, 0, [0x0c00_0121, 0x01c0_003f, 0x3f, 1]),
    (5, 0, [0, 0, 3, 0]),
    (6, 0, [4, 0, 0, 0]),
    (7, 0, [0, 0x219c_47ab, 0x8041_801c, 0x0000_0010]),
    (0xd, 0, [0x21f, 0x240, 0xa88, 0]),
    (0xd, 1, [0x1, 0, 0, 0]),
    (0xd, 2, [0x100, 0x240, 0, 0]),
    (0xd, 3, [0x40, 0x3c0, 0, 0]),
    (0xd, 4, [0x40, 0x400, 0, 0]),
    (0xd, 9, [0x8, 0xa80, 0, 0]),
    (0x8000_0000, 0, [0x8000_000a, AMD[0], AMD[1], AMD[2]]),
    (0x8000_0001, 0, [0x0006_0fb1, 0, 0x0000_02f7, 0xefd3_fbff]),
    (0x8000_0002, 0, [0x554d_4551, 0x7269_5620, 0x6c61_7574, 0x5550_4320]),
    (0x8000_0005, 0, [0x01ff_01ff, 0x01ff_01ff, 0x4002_0140, 0x4002_0140]),
    (0x8000_0006, 0, [0, 0x4200_4200, 0x0200_8140, 0x0080_8140]),
    (0x8000_0008, 0, [0x0000_3928, 0x0000_0200, 0x0000_3003, 0]),
    (0x8000_000a, 0, [1, 0x10, 0, 0x1000_0005]),
]);

/// A Zen: topology extensions, SMT, XSAVES, speculation control, everything that AMD has.
const ZEN: Table = Table(&[
    (0, 0, [0x10, AMD[0], AMD[1], AMD[2]]),
    (1, 0, [0x0083_0f10, 0x0710_0800, 0x7ef8_320b, 0x178b_fbff]),
    (5, 0, [0x40, 0x40, 3, 0x11]),
    (6, 0, [4, 0, 1, 0]),
    (7, 0, [0, 0x219c_91a9, 0x0040_0004, 0]),
    (0xb, 0, [1, 2, 0x100, 7]),
    (0xb, 1, [7, 0x20, 0x201, 7]),
    (0xd, 0, [0x207, 0x988, 0x988, 0]),
    (0xd, 1, [0xf, 0x348, 0x1800, 0]),
    (0xd, 2, [0x100, 0x240, 0, 0]),
    (0xd, 9, [0x8, 0x980, 0, 0]),
    (0xd, 0xb, [0x10, 0, 1, 0]),
    (0xf, 0, [0, 0xff, 0, 2]),
    (0x10, 0, [0, 2, 0, 0]),
    (0x8000_0000, 0, [0x8000_0021, AMD[0], AMD[1], AMD[2]]),
    (0x8000_0001, 0, [0x0083_0f10, 0x4000_0000, 0x75c2_37ff, 0x2fd3_fbff]),
    (0x8000_0007, 0, [0, 0x1b, 0, 0x6599]),
    (0x8000_0008, 0, [0x0000_3030, 0x118e_f757, 0x0000_707f, 0x0001_0000]),
    (0x8000_000a, 0, [1, 0x8000, 0, 0x013b_bcff]),
    (0x8000_001a, 0, [6, 0, 0, 0]),
    (0x8000_001b, 0, [0x3ff, 0, 0, 0]),
    (0x8000_001d, 0, [0x0000_4121, 0x01c0_003f, 0x3f, 0]),
    (0x8000_001d, 1, [0x0000_4122, 0x01c0_003f, 0x3f, 0]),
    (0x8000_001d, 2, [0x0000_4143, 0x01c0_003f, 0x3ff, 2]),
    (0x8000_001d, 3, [0x0001_c163, 0x03c0_003f, 0x3fff, 1]),
    (0x8000_001e, 0, [7, 0x0000_0103, 0, 0]),
    (0x8000_001f, 0, [0x0001_780f, 0x16f, 0x1fd, 1]),
    (0x8000_0021, 0, [0x0000_004d, 0, 0, 0]),
]);

/// A Skylake server: AVX-512, MPX, TSX, HT, PT, RDT, all the monitors.
const SKYLAKE: Table = Table(&[
    (0, 0, [0x16, INTEL[0], INTEL[1], INTEL[2]]),
    (1, 0, [0x0005_0654, 0x0220_0800, 0x7ffe_fbff, 0xbfeb_fbff]),
    (2, 0, [0x7603_6301, 0x00f0_b5ff, 0, 0x00c3_0000]),
    (4, 0, [0x7c00_4121, 0x01c0_003f, 0x3f, 0]),
    (4, 1, [0x7c00_4122, 0x01c0_003f, 0x3f, 0]),
    (4, 2, [0x7c00_4143, 0x03c0_003f, 0x3ff, 0]),
    (4, 3, [0x7c07_c163, 0x0280_003f, 0x8fff, 4]),
    (5, 0, [0x40, 0x40, 3, 0x2020]),
    (6, 0, [0xef7, 2, 9, 0]),
    (7, 0, [0, 0xd39f_fffb, 0x0000_0008, 0x9c00_2400]),
    (0xa, 0, [0x0730_0404, 0, 0, 0x603]),
    (0xb, 0, [1, 2, 0x100, 2]),
    (0xb, 1, [6, 0x28, 0x201, 2]),
    (0xd, 0, [0x2ff, 0xa88, 0xa88, 0]),
    (0xd, 1, [0xf, 0xa08, 0x100, 0]),
    (0xd, 2, [0x100, 0x240, 0, 0]),
    (0xd, 3, [0x40, 0x3c0, 0, 0]),
    (0xd, 4, [0x40, 0x400, 0, 0]),
    (0xd, 5, [0x40, 0x440, 0, 0]),
    (0xd, 6, [0x200, 0x480, 0, 0]),
    (0xd, 7, [0x400, 0x680, 0, 0]),
    (0xd, 8, [0x80, 0, 1, 0]),
    (0xd, 9, [0x8, 0xa80, 0, 0]),
    (0xf, 0, [0, 0x9f, 0, 2]),
    (0x14, 0, [1, 0xf, 7, 0]),
    (0x15, 0, [2, 0xa8, 0, 0]),
    (0x16, 0, [0x834, 0xe74, 0x64, 0]),
    (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
    (0x8000_0006, 0, [0, 0, 0x0100_6040, 0]),
    (0x8000_0007, 0, [0, 0, 0, 0x100]),
    (0x8000_0008, 0, [0x0000_302e, 0, 0, 0]),
]);

/// The least that runs: no XSAVE, no RDTSCP, few leaves.
const OLD_INTEL: Table = Table(&[
    (0, 0, [5, INTEL[0], INTEL[1], INTEL[2]]),
    (1, 0, [0x0000_06f6, 0x0002_0800, 0x0000_e3bd, 0xbfeb_fbff]),
    (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, 1, 0x2010_0800]),
    (0x8000_0008, 0, [0x0000_3024, 0, 0, 0]),
]);

const HOSTS: [&Table; 6] =
    [&EMULATED_AMD, &ZEN, &SKYLAKE, &OLD_INTEL, &coherence::NEHALEM, &coherence::ICELAKE];

fn shape(vcpus: u8) -> VmShape {
    VmShape { vcpus, max_phys_bits: 48, tsc_hz: 1_000_000_000, sound_compaction: true }
}

fn cpu(apic_id: u8) -> CpuState {
    CpuState { apic_id, apic_enabled: true, cr4: 0, xcr0: 1, long64: true }
}

// ---- Rules ----

/// Bits that no guest may see: (leaf, subleaf, [EAX, EBX, ECX, EDX]).
fn hidden() -> Vec<(u32, u32, [u32; 4])> {
    let bits = |numbers: &[u32]| numbers.iter().fold(0u32, |mask, n| mask | 1 << n);
    [
        // DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, SDBG, PDCM, DCA; DS, ACPI, TM, PBE.
        (1, 0, 0, bits(&[2, 3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 18]), bits(&[18, 21, 22, 29, 31])),
        (5, !0, !0, !0, !0),
        (3, !0, !0, !0, !0),
        (9, !0, !0, !0, !0),
        (0xa, !0, !0, !0, !0),
        (0xf, !0, !0, !0, !0),
        (0x10, !0, !0, !0, !0),
        (0x12, !0, !0, !0, !0),
        (0x14, !0, !0, !0, !0),
        // Thermal, turbo, HWP; APERF and EPB.
        (6, !4, !0, !0, !0),
        // SVM, IBS, LWP, memory encryption, QoS.
        (0x8000_000a, !0, !0, !0, !0),
        (0x8000_001b, !0, !0, !0, !0),
        (0x8000_001c, !0, !0, !0, !0),
        (0x8000_001f, !0, !0, !0, !0),
        (0x8000_0020, !0, !0, !0, !0),
        // SVM, extended APIC, CR8 by LOCK, OSVW, IBS, SKINIT, WDT, LWP, TCE, node ID, counters, MWAITX.
        (0x8000_0001, 0, 0, bits(&[2, 3, 4, 9, 10, 12, 13, 15, 17, 19, 23, 24, 26, 27, 28, 29, 30]), 0),
        (0x8000_0007, !0, !0, !0, !0x100),
        // IRPERF, INVLPGB, RDPRU, MCOMMIT, IBPB, IBRS, STIBP, SSBD and relatives.
        (
            0x8000_0008,
            0,
            bits(&[1, 3, 4, 6, 8, 12, 13, 14, 15, 16, 17, 18, 19, 23, 24, 25, 26, 27, 28]),
            0,
            !0,
        ),
        // Automatic IBRS and the rest.
        (0x8000_0021, !0x45, !0, !0, !0),
        // SGX, HLE, RTM, PQM, MPX, PQE, PT; WAITPKG, CET, TME, keys, enclaves; hybrid, RTM abort, PCONFIG, LBR, IBT,
        // AMX, speculation control.
        (
            7,
            0,
            bits(&[2, 4, 11, 12, 14, 15, 22, 25]),
            bits(&[5, 7, 13, 15, 23, 24, 29, 30]),
            bits(&[5, 9, 11, 13, 15, 16, 18, 19, 20, 22, 24, 25, 26, 27, 28, 29, 30, 31]),
        ),
    ]
    .into_iter()
    .map(|(leaf, eax, ebx, ecx, edx)| (leaf, 0, [eax, ebx, ecx, edx]))
    // XFD and supervisor states; FRED, LKGS and LAM.
    .chain([(0xd, 1, [!0xf, 0, !0, !0]), (7, 1, [bits(&[17, 18, 26]), !0, !0, 0])])
    .collect()
}

fn bit(word: u32, number: u32) -> bool {
    word >> number & 1 != 0
}

/// What must hold for every guest on every host.
fn check(host: &impl HostCpuid, shape: &VmShape) {
    let table = CpuidTable::new(host, shape);
    let caps = table.caps();
    let look = |leaf, subleaf| table.lookup(leaf, subleaf, &cpu(0));
    let (max_basic, max_extended) = (look(0, 0).eax, look(EXTENDED, 0).eax);
    assert!((0xb..=0x1f).contains(&max_basic), "{max_basic:#x}");
    assert!((0x8000_0008..=0x8000_0021).contains(&max_extended), "{max_extended:#x}");
    let (leaf1, leaf7, leaf71) = (look(1, 0), look(7, 0), look(7, 1));
    let (ext1, ext8) = (look(EXTENDED + 1, 0), look(EXTENDED + 8, 0));

    for (leaf, subleaf, mask) in hidden() {
        let regs = look(leaf, subleaf);
        let in_range = leaf <= max_basic || (EXTENDED..=max_extended).contains(&leaf);
        for (value, mask) in [regs.eax, regs.ebx, regs.ecx, regs.edx].into_iter().zip(mask) {
            assert!(value & mask == 0 || !in_range, "{leaf:x}.{subleaf}: {:#x}", value & mask);
        }
    }

    // Always there.
    assert!(bit(leaf1.ecx, 21) && bit(leaf1.ecx, 24) && bit(leaf1.ecx, 31) && bit(leaf1.edx, 9));
    assert!(bit(leaf7.ebx, 1) && look(6, 0).eax == 4 && bit(look(EXTENDED + 7, 0).edx, 8));
    let name = look(HYPERVISOR, 0);
    let bytes = [name.ebx, name.ecx, name.edx].map(u32::to_le_bytes);
    assert_eq!((name.eax, bytes.as_flattened()), (HYPERVISOR + 1, &SIGNATURE[..]));
    assert_eq!(look(HYPERVISOR + 1, 0).eax, 1);
    assert_eq!(look(HYPERVISOR + 2, 0), CpuidLeaf::ZERO);

    // Dependencies.
    let needs = |feature: bool, other: bool, what: &str| assert!(!feature || other, "{what}");
    let (xsave, avx, avx2) = (bit(leaf1.ecx, 26), bit(leaf1.ecx, 28), bit(leaf7.ebx, 5));
    let avx512f = bit(leaf7.ebx, 16);
    needs(avx, xsave && caps.xcr0 & 4 != 0, "AVX");
    needs(caps.xcr0 & 4 != 0, avx, "AVX state");
    needs(bit(leaf1.ecx, 12) || bit(leaf1.ecx, 29) || avx2, avx, "FMA, F16C, AVX2");
    needs(leaf7.ecx & 0x600 != 0 || ext1.ecx & 0x1_0800 != 0, avx, "VAES, XOP");
    needs(avx512f, avx2 && caps.xcr0 & 0xe0 == 0xe0, "AVX512F");
    needs(leaf7.ebx & 0xdc22_0000 != 0 || leaf7.ecx & 0x5842 != 0 || bit(leaf71.eax, 5), avx512f, "AVX512*");
    needs(leaf7.edx & 0x0080_010c != 0, avx512f, "AVX512*");
    needs(caps.xcr0 & 0xe0 != 0, avx512f, "AVX-512 state");
    assert_eq!(bit(leaf7.ecx, 3), caps.xcr0 & 0x200 != 0, "PKU");
    needs(bit(leaf7.ebx, 10), bit(leaf1.ecx, 17), "INVPCID");
    assert_eq!(xsave, caps.xcr0 != 0);
    assert!(!xsave || caps.xcr0_is_valid(caps.xcr0));
    needs(leaf7.eax == 0, leaf71 == CpuidLeaf::ZERO, "7.1");

    // Control registers follow the bits.
    for (cr4, feature) in [
        (5, bit(leaf1.edx, 6)),
        (11, bit(leaf7.ecx, 2)),
        (12, bit(leaf7.ecx, 16)),
        (13, false),
        (14, false),
        (16, bit(leaf7.ebx, 0)),
        (17, bit(leaf1.ecx, 17)),
        (18, xsave),
        (20, bit(leaf7.ebx, 7)),
        (21, bit(leaf7.ebx, 20)),
        (22, bit(leaf7.ecx, 3)),
        (23, false),
        (24, bit(leaf7.ecx, 31)),
    ] {
        assert_eq!(caps.cr4 >> cr4 & 1 != 0, feature, "CR4 bit {cr4}");
    }
    assert_eq!(caps.efer >> 11 & 1 != 0, bit(ext1.edx, 20));
    assert_eq!(caps.efer >> 12 & 1, 0, "SVME");
    assert_eq!(caps.tsc_aux, bit(ext1.edx, 27) || bit(leaf7.ecx, 22));
    assert_eq!(ext8.eax & 0xff, u32::from(caps.phys_bits));
    assert!(caps.phys_bits <= shape.max_phys_bits.clamp(32, 52));

    // XSAVE sizes.
    if xsave {
        let size = |xcr0, subleaf| table.lookup(0xd, subleaf, &CpuState { xcr0, ..cpu(0) });
        assert_eq!(size(1, 0).ebx, 576);
        assert_eq!(size(caps.xcr0, 0).ebx, size(caps.xcr0, 0).ecx);
        assert_eq!(u64::from(size(1, 0).eax) | u64::from(size(1, 0).edx) << 32, caps.xcr0);
        let compacted = size(1, 1).eax & 0b1010 != 0;
        assert_eq!(size(1, 1).ebx, if compacted { 576 } else { 0 });
        for component in 2..64 {
            assert!(size(1, component) == CpuidLeaf::ZERO || caps.xcr0 >> component & 1 == 1);
        }
    } else if max_basic >= 0xd {
        assert_eq!(look(0xd, 0), CpuidLeaf::ZERO);
    }

    check_topology(&table, shape);
}

fn check_topology(table: &CpuidTable, shape: &VmShape) {
    let vcpus = u32::from(shape.vcpus);
    let amd = table.caps().vendor == Vendor::Amd;
    for id in 0..shape.vcpus {
        let look = |leaf, subleaf| table.lookup(leaf, subleaf, &cpu(id));
        let leaf1 = look(1, 0);
        assert_eq!(leaf1.ebx >> 24, u32::from(id));
        assert_eq!(bit(leaf1.edx, 28), vcpus > 1, "HTT");
        let logical = leaf1.ebx >> 16 & 0xff;
        assert_eq!(logical, if amd { vcpus } else { vcpus.next_power_of_two() });
        let max_basic = look(0, 0).eax;
        for leaf in [0xb, 0x1f] {
            if leaf > max_basic {
                continue;
            }
            if leaf == 0x1f && amd {
                assert_eq!(look(leaf, 0), CpuidLeaf::ZERO, "Intel's alone");
                continue;
            }
            let (smt, core, end) = (look(leaf, 0), look(leaf, 1), look(leaf, 2));
            assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, 0x100));
            assert_eq!((core.ebx, core.ecx), (vcpus, 0x201));
            assert_eq!(1 << core.eax, vcpus.next_power_of_two());
            assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
            assert!([smt, core, end, look(leaf, 77)].iter().all(|level| level.edx == u32::from(id)));
            assert_eq!(u32::from(id) >> core.eax, 0, "one package");
        }
        let cache_leaf = if amd { 0x8000_001d } else { 4 };
        for subleaf in 0..8 {
            let cache = look(cache_leaf, subleaf);
            if cache.eax & 0x1f == 0 {
                break;
            }
            let sharing = (cache.eax >> 14 & 0xfff) + 1;
            let shared = cache.eax >> 5 & 7 >= 3;
            assert_eq!(sharing, if shared { vcpus.next_power_of_two() } else { 1 });
            if !amd {
                assert_eq!((cache.eax >> 26) + 1, vcpus.next_power_of_two());
            }
        }
        let cores = look(0x8000_0008, 0).ecx;
        let ext1 = look(0x8000_0001, 0);
        if amd {
            assert_eq!((cores & 0xff) + 1, vcpus);
            assert_eq!(1 << (cores >> 12 & 0xf), vcpus.next_power_of_two());
            assert_eq!(bit(ext1.ecx, 1), vcpus > 1, "CMP legacy");
            assert_eq!(ext1.edx & 0x0183_f3ff, leaf1.edx & 0x0183_f3ff, "repeated bits");
        } else {
            assert_eq!(cores, 0);
            assert!(!bit(ext1.ecx, 1));
        }
        if bit(ext1.ecx, 22) {
            let node = look(0x8000_001e, 0);
            assert_eq!((node.eax, node.ebx, node.ecx), (id.into(), id.into(), 0));
            assert_ne!(look(0x8000_001d, 0), CpuidLeaf::ZERO);
        }
    }
}

// ---- Tests ----

#[test]
fn every_host_gives_a_coherent_guest() {
    for host in HOSTS {
        for vcpus in [1, 2, 3, 4, 5, 8, 33, 64] {
            check(host, &shape(vcpus));
            check(host, &VmShape { max_phys_bits: 40, ..shape(vcpus) });
        }
    }
}

#[test]
fn this_machine_gives_a_coherent_guest() {
    let live = Function(|leaf, subleaf| {
        let regs = raw_cpuid::native_cpuid::cpuid_count(leaf, subleaf);
        CpuidLeaf::new(regs.eax, regs.ebx, regs.ecx, regs.edx)
    });
    check(&live, &shape(4));
}

#[test]
fn absurd_hosts_are_survived() {
    for fill in [0, 1, 0x8000_0000, !0] {
        let host = Function(|_, _| CpuidLeaf::new(fill, fill, fill, fill));
        check(&host, &shape(3));
        check(&host, &VmShape { vcpus: 7, max_phys_bits: 255, tsc_hz: u64::MAX, ..shape(1) });
    }
    let table = CpuidTable::new(&ZEN, &VmShape { vcpus: 0, ..shape(1) });
    assert_eq!(table.lookup(0xb, 1, &cpu(0)).ebx, 1);
    let table = CpuidTable::new(&ZEN, &VmShape { vcpus: 255, tsc_hz: 0, ..shape(1) });
    assert_eq!(table.lookup(0xb, 1, &cpu(0)).ebx, 64);
}

#[test]
fn the_family_vendor_and_caches_are_the_hosts() {
    let table = CpuidTable::new(&SKYLAKE, &shape(4));
    let look = |leaf, subleaf| table.lookup(leaf, subleaf, &cpu(0));
    assert_eq!((look(0, 0).ebx, look(0, 0).ecx, look(0, 0).edx), (INTEL[0], INTEL[1], INTEL[2]));
    assert_eq!(look(1, 0).eax, 0x0005_0654);
    assert_eq!(look(2, 0), SKYLAKE.cpuid(2, 0));
    assert_eq!(look(4, 3).eax, 3 << 26 | 3 << 14 | 0x163);
    assert_eq!(look(4, 4), CpuidLeaf::ZERO);
    assert_eq!(look(EXTENDED + 2, 0), SKYLAKE.cpuid(EXTENDED + 2, 0));
    // AVX-512 came through, MPX and TSX did not.
    assert_eq!(table.caps().xcr0, 0x2e7);
    assert_eq!(look(0xd, 0).ecx, 0xa88);
    let table = CpuidTable::new(&EMULATED_AMD, &shape(4));
    assert_eq!(table.caps().xcr0, 0x207);
    assert_eq!(table.lookup(4, 0, &cpu(0)), CpuidLeaf::ZERO, "no leaf 4 on AMD");
    assert_eq!(table.caps().phys_bits, 40);
}

#[test]
fn bits_that_follow_registers() {
    let table = CpuidTable::new(&SKYLAKE, &shape(2));
    let off = cpu(1);
    let on = CpuState { cr4: 1 << 18 | 1 << 22, ..off };
    assert!(!bit(table.lookup(1, 0, &off).ecx, 27) && bit(table.lookup(1, 0, &on).ecx, 27));
    assert!(!bit(table.lookup(7, 0, &off).ecx, 4) && bit(table.lookup(7, 0, &on).ecx, 4));
    let without_apic = CpuState { apic_enabled: false, ..off };
    assert!(!bit(table.lookup(1, 0, &without_apic).edx, 9));
    assert_eq!(table.lookup(EXTENDED + 1, 0, &without_apic), table.lookup(EXTENDED + 1, 0, &off));
    let zen = CpuidTable::new(&ZEN, &shape(2));
    assert!(!bit(zen.lookup(EXTENDED + 1, 0, &without_apic).edx, 9));
    assert!(bit(zen.lookup(EXTENDED + 1, 0, &off).edx, 9));

    let size = |xcr0, subleaf| table.lookup(0xd, subleaf, &CpuState { xcr0, ..off }).ebx;
    assert_eq!([1, 3, 7, 0xe7, 0x2e7].map(|xcr0| size(xcr0, 0)), [576, 576, 832, 0xa80, 0xa88]);
    assert_eq!(
        [3, 7, 0x207, 0x2e7].map(|xcr0| size(xcr0, 1)),
        [576, 832, 840, 576 + 256 + 64 + 512 + 1024 + 8]
    );
    assert_eq!(size(!0, 0), 0xa88, "unknown components do not count");
    // Without XSAVEC there is no compacted size.
    let emulated = CpuidTable::new(&EMULATED_AMD, &shape(1));
    assert_eq!(emulated.lookup(0xd, 1, &CpuState { xcr0: 7, ..off }).ebx, 0);
}

#[test]
fn unsound_compaction_is_hidden() {
    let on = CpuState { xcr0: 7, ..cpu(0) };
    for host in [&SKYLAKE, &ZEN] {
        let table = CpuidTable::new(host, &VmShape { sound_compaction: false, ..shape(1) });
        check(host, &VmShape { sound_compaction: false, ..shape(1) });
        // XSAVEOPT and XGETBV of 1 stay; without the compacted format it has no size.
        assert_eq!(table.lookup(0xd, 1, &on), CpuidLeaf::new(0b101, 0, 0, 0));
        assert_eq!(table.lookup(0xd, 0, &on), CpuidTable::new(host, &shape(1)).lookup(0xd, 0, &on));
        assert!(!table.caps().xsaves, "no IA32_XSS");
    }
}

#[test]
fn out_of_range_leaves() {
    let state = CpuState { xcr0: 7, ..cpu(1) };
    let intel = CpuidTable::new(&SKYLAKE, &shape(2));
    let highest = intel.lookup(0x16, 0, &state);
    for leaf in [0x17, 0x20, 0x100, 0x3fff_ffff, 0x5000_0000, 0x8000_0009, 0x8000_ffff, !0] {
        assert_eq!(intel.lookup(leaf, 0, &state), highest, "{leaf:#x}");
    }
    let amd = CpuidTable::new(&ZEN, &shape(2));
    for leaf in [0x11, 0x20, 0x100, 0x3fff_ffff, 0x5000_0000, 0x8000_0022, 0x8fff_ffff, !0] {
        assert_eq!(amd.lookup(leaf, 0, &state), CpuidLeaf::ZERO, "{leaf:#x}");
    }
    for table in [&intel, &amd] {
        for leaf in [0x4000_0002, 0x4000_00ff, 0x4000_0102, 0x4000_0200, 0x4fff_ffff] {
            assert_eq!(table.lookup(leaf, 0, &state), CpuidLeaf::ZERO);
        }
    }
    // On an old Intel the highest leaf is that of the rates, raised to be readable.
    let old = CpuidTable::new(&OLD_INTEL, &shape(1));
    assert_eq!(old.lookup(0x1234, 9, &state), CpuidLeaf::new(1000, 1000, 1000, 0));
    // Subleaves of a leaf without any are all the same.
    assert_eq!(amd.lookup(1, 7, &state), amd.lookup(1, 0, &state));
    assert_eq!(amd.lookup(EXTENDED + 1, 7, &state), amd.lookup(EXTENDED + 1, 0, &state));
    assert_eq!(amd.lookup(EXTENDED + 0x1e, 7, &state), amd.lookup(EXTENDED + 0x1e, 0, &state));
}

#[test]
fn the_tsc_ratio_is_exact_or_absent() {
    for (hz, expected) in [
        (1_000_000_000, Some((1, 1))),
        (3_000_000_000, Some((1, 3))),
        (2_500_000_000, Some((2, 5))),
        (2_994_373_000, None),
        (0, None),
        (u64::MAX, None),
    ] {
        let table = CpuidTable::new(&SKYLAKE, &VmShape { tsc_hz: hz, ..shape(1) });
        let leaf = table.lookup(0x15, 0, &cpu(0));
        match expected {
            None => assert_eq!(leaf, CpuidLeaf::ZERO),
            Some((denominator, numerator)) => {
                assert_eq!(leaf, CpuidLeaf::new(denominator, numerator, 1_000_000_000, 0));
                assert_eq!(u64::from(leaf.ecx) * u64::from(numerator) / u64::from(denominator), hz);
            }
        }
        let amd = CpuidTable::new(&ZEN, &VmShape { tsc_hz: hz, ..shape(1) });
        assert_eq!(amd.lookup(0x15, 0, &cpu(0)), CpuidLeaf::ZERO, "Intel's alone");
    }
}

#[test]
fn xcr0_values() {
    let caps = *CpuidTable::new(&SKYLAKE, &shape(1)).caps();
    for (value, valid) in [
        (0, false),
        (1, true),
        (2, false),
        (3, true),
        (5, false),
        (7, true),
        (0x27, false),
        (0xe7, true),
        (0xe3, false),
        (0x201, true),
        (0x2e7, true),
        (0x1f, false),
        (1 << 63 | 1, false),
    ] {
        assert_eq!(caps.xcr0_is_valid(value), valid, "{value:#x}");
    }
    assert!(!CpuidTable::new(&OLD_INTEL, &shape(1)).caps().xcr0_is_valid(1));
}

proptest! {
    /// Whatever a CPU claims to be able to do, the guest's view is coherent and shows nothing hidden.
    #[test]
    fn random_hosts_give_coherent_guests(
        seed: u64,
        intel: bool,
        max_basic in 0u32..0x30,
        max_extended in 0u32..0x30,
        vcpus in 1u8..=64,
        tsc_hz: u64,
    ) {
        let host = Function(|leaf: u32, subleaf: u32| {
            let name = if intel { INTEL } else { AMD };
            let random = |lane: u64| {
                let mut x = seed ^ (u64::from(leaf) << 32 | u64::from(subleaf)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ lane;
                x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                (x ^ x >> 31) as u32
            };
            match leaf {
                0 => CpuidLeaf::new(max_basic, name[0], name[1], name[2]),
                EXTENDED => CpuidLeaf::new(EXTENDED + max_extended, name[0], name[1], name[2]),
                0xd if subleaf >= 2 => CpuidLeaf::new(random(1) & 0xfff, random(2) & 0xffff, random(3) & 3, 0),
                _ => CpuidLeaf::new(random(1), random(2), random(3), random(4)),
            }
        });
        check(&host, &VmShape { vcpus, max_phys_bits: 52, tsc_hz, ..shape(1) });
    }

    #[test]
    fn any_lookup_is_survived(leaf: u32, subleaf: u32, apic_id: u8, cr4: u64, xcr0: u64, near in 0u32..0x40) {
        for host in HOSTS {
            let table = CpuidTable::new(host, &shape(4));
            let state = CpuState { apic_id, apic_enabled: leaf & 1 != 0, cr4, xcr0, long64: apic_id & 1 != 0 };
            for leaf in [leaf, near, EXTENDED + near, HYPERVISOR + near] {
                let _ = table.lookup(leaf, subleaf, &state);
                let _ = table.lookup(leaf, subleaf & 0x3f, &state);
            }
        }
    }
}

#[test]
fn the_clocks_leaves_carry_kvms_signature_and_nothing_but_the_clock() {
    use crate::vm::pvclock;
    let table = CpuidTable::new(&ZEN, &shape(1));
    let state = CpuState { apic_id: 0, apic_enabled: true, cr4: 0, xcr0: 1, long64: true };
    let leaf = table.lookup(pvclock::CPUID_BASE, 0, &state);
    assert_eq!((leaf.eax, leaf.ebx), (pvclock::CPUID_BASE + 1, u32::from_le_bytes(*b"KVMK")));
    assert_eq!(table.lookup(pvclock::CPUID_BASE + 1, 0, &state), CpuidLeaf::new(1 << 3 | 1 << 24, 0, 0, 0));
}
