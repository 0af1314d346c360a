//! Which CPUID bits a guest may see. An allow-list: what is not named here is hidden, so that a feature of
//! tomorrow's host never reaches a guest before Umbra knows what it needs.
//!
//! Hidden on purpose, because the MSRs or exits behind them are not modelled: MONITOR and MWAITX, SVM and VMX, SMX
//! and SKINIT, TSX, MPX, SGX, CET, AMX, WAITPKG, ENQCMD, key locker, uintr, FRED, LAM; performance counters,
//! LBR, PT, IBS, LWP, DS and 64-bit DS, PDCM, SDBG; RDT and QoS; thermal, EIST, turbo, HWP; OSVW, node ID, TCE;
//! SEV and SME. MCE and MCA are offered with no banks (MCG_CAP = 0), as kernels insist on the bits.
//!
//! Speculation control (IBRS, IBPB, STIBP, SSBD in either vendor's place, ARCH_CAPABILITIES, L1D flush, virtual
//! SSBD, automatic IBRS) is hidden as a whole: the guest sees a CPU of before 2018 and uses retpolines. MD_CLEAR,
//! which is a property of VERW, passes.
use crate::vm::pvclock;

use super::{xsave, CpuidLeaf, CpuidTable, GuestCaps, HostCpuid, Kind, Slot, Vendor, VmShape};
use super::{BASIC_SLOTS, ENTRIES, EXTENDED, EXTENDED_SLOTS, HYPERVISOR, HYPERVISOR_SLOTS, SIGNATURE};

/// A mask of the bits named by number.
const fn bits(numbers: &[u32]) -> u32 {
    let mut mask = 0;
    let mut index = 0;
    while index < numbers.len() {
        mask |= 1 << numbers[index];
        index += 1;
    }
    mask
}

// ---- Bits with a name of their own ----

const SSE3: u32 = 1 << 0; // 1.ECX
const PCLMULQDQ: u32 = 1 << 1; // 1.ECX
const SSSE3: u32 = 1 << 9; // 1.ECX
const FMA: u32 = 1 << 12; // 1.ECX
const CMPXCHG16B: u32 = 1 << 13; // 1.ECX
const PCID: u32 = 1 << 17; // 1.ECX
const SSE4_1: u32 = 1 << 19; // 1.ECX
const SSE4_2: u32 = 1 << 20; // 1.ECX
const X2APIC: u32 = 1 << 21; // 1.ECX
const TSC_DEADLINE: u32 = 1 << 24; // 1.ECX
const AES: u32 = 1 << 25; // 1.ECX
const XSAVE: u32 = 1 << 26; // 1.ECX
pub(super) const OSXSAVE: u32 = 1 << 27; // 1.ECX
const AVX: u32 = 1 << 28; // 1.ECX
const F16C: u32 = 1 << 29; // 1.ECX
const HYPERVISOR_PRESENT: u32 = 1 << 31; // 1.ECX
const PSE: u32 = 1 << 3; // 1.EDX
const TSC: u32 = 1 << 4; // 1.EDX
const MSR: u32 = 1 << 5; // 1.EDX
const PAE: u32 = 1 << 6; // 1.EDX
const MCE: u32 = 1 << 7; // 1.EDX
pub(super) const APIC: u32 = 1 << 9; // 1.EDX, and 8000_0001.EDX of AMD
const MCA: u32 = 1 << 14; // 1.EDX
const PSE36: u32 = 1 << 17; // 1.EDX
const CLFLUSH: u32 = 1 << 19; // 1.EDX
const MMX: u32 = 1 << 23; // 1.EDX
const FXSR: u32 = 1 << 24; // 1.EDX
const SSE: u32 = 1 << 25; // 1.EDX
const SSE2: u32 = 1 << 26; // 1.EDX
const HTT: u32 = 1 << 28; // 1.EDX
const ARAT: u32 = 1 << 2; // 6.EAX
const FSGSBASE: u32 = 1 << 0; // 7.EBX
const TSC_ADJUST: u32 = 1 << 1; // 7.EBX
const AVX2: u32 = 1 << 5; // 7.EBX
const SMEP: u32 = 1 << 7; // 7.EBX
const INVPCID: u32 = 1 << 10; // 7.EBX
const AVX512F: u32 = 1 << 16; // 7.EBX
const AVX512DQ: u32 = 1 << 17; // 7.EBX
const SMAP: u32 = 1 << 20; // 7.EBX
const CLFLUSHOPT_CLWB: u32 = bits(&[23, 24]); // 7.EBX
const SHA: u32 = 1 << 29; // 7.EBX
const AVX512BW: u32 = 1 << 30; // 7.EBX
const AVX512VL: u32 = 1 << 31; // 7.EBX
const UMIP: u32 = 1 << 2; // 7.ECX
const PKU: u32 = 1 << 3; // 7.ECX
pub(super) const OSPKE: u32 = 1 << 4; // 7.ECX
const GFNI: u32 = 1 << 8; // 7.ECX
const VAES: u32 = 1 << 9; // 7.ECX
const VPCLMULQDQ: u32 = 1 << 10; // 7.ECX
const LA57: u32 = 1 << 16; // 7.ECX
const RDPID: u32 = 1 << 22; // 7.ECX
const PKS: u32 = 1 << 31; // 7.ECX
const XSAVEC: u32 = 1 << 1; // D.1.EAX
const XSAVES: u32 = 1 << 3; // D.1.EAX
const LAHF: u32 = 1 << 0; // 8000_0001.ECX
const CMP_LEGACY: u32 = 1 << 1; // 8000_0001.ECX
const SSE4A_MISALIGNED: u32 = bits(&[6, 7]); // 8000_0001.ECX
const XOP_FMA4: u32 = bits(&[11, 16]); // 8000_0001.ECX
const TOPOEXT: u32 = 1 << 22; // 8000_0001.ECX
pub(super) const SYSCALL: u32 = 1 << 11; // 8000_0001.EDX
const NX: u32 = 1 << 20; // 8000_0001.EDX
const MMX_EXTENSIONS: u32 = 1 << 22; // 8000_0001.EDX
const FFXSR: u32 = 1 << 25; // 8000_0001.EDX
const PAGES_1G: u32 = 1 << 26; // 8000_0001.EDX
const RDTSCP: u32 = 1 << 27; // 8000_0001.EDX
const LONG_MODE: u32 = 1 << 29; // 8000_0001.EDX
const THREEDNOW_EXTENSIONS: u32 = 1 << 30; // 8000_0001.EDX
const THREEDNOW: u32 = 1 << 31; // 8000_0001.EDX
const INVARIANT_TSC: u32 = 1 << 8; // 8000_0007.EDX
const LFENCE_SERIALIZING: u32 = 1 << 2; // 8000_0021.EAX

// ---- Allow-lists ----

/// SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, PCID, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX, F16C, RDRAND.
const LEAF_1_ECX: u32 = bits(&[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
/// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE,
/// SSE2, SS.
const LEAF_1_EDX: u32 =
    bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27]);
/// FSGSBASE, BMI1, AVX2, FDP exceptions only, SMEP, BMI2, ERMS, INVPCID, zero FCS/FDS, AVX512F/DQ, RDSEED, ADX, SMAP,
/// AVX512IFMA, CLFLUSHOPT, CLWB, AVX512PF/ER/CD, SHA, AVX512BW/VL.
const LEAF_7_EBX: u32 =
    bits(&[0, 3, 5, 6, 7, 8, 9, 10, 13, 16, 17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 31]);
/// AVX512VBMI, UMIP, PKU, AVX512VBMI2, GFNI, VAES, VPCLMULQDQ, AVX512VNNI/BITALG/VPOPCNTDQ, LA57, RDPID, CLDEMOTE,
/// MOVDIRI, MOVDIR64B, PKS.
const LEAF_7_ECX: u32 = bits(&[1, 2, 3, 6, 8, 9, 10, 11, 12, 14, 16, 22, 25, 27, 28, 31]);
/// AVX512 4VNNIW and 4FMAPS, FSRM, AVX512 VP2INTERSECT, MD_CLEAR, SERIALIZE, AVX512FP16.
const LEAF_7_EDX: u32 = bits(&[2, 3, 4, 8, 10, 14, 23]);
/// AVX-VNNI, AVX512BF16, CMPccXADD, fast zero-length and short REPs, AVX-IFMA.
const LEAF_7_1_EAX: u32 = bits(&[4, 5, 7, 10, 11, 12, 23]);
/// AVX-VNNI-INT8, AVX-NE-CONVERT, PREFETCHI.
const LEAF_7_1_EDX: u32 = bits(&[4, 5, 14]);
/// XSAVEOPT, XSAVEC, XGETBV of 1, XSAVES.
const LEAF_D_1_EAX: u32 = bits(&[0, 1, 2, 3]);
/// LAHF, CMP legacy, ABM, SSE4A, misaligned SSE, 3DNow prefetch, XOP, FMA4, TBM, topology extensions.
const LEAF_8000_0001_ECX: u32 = bits(&[0, 1, 5, 6, 7, 8, 11, 16, 21, 22]);
/// SYSCALL, NX, MMX extensions, FFXSR, 1 GiB pages, RDTSCP, long mode, 3DNow extensions, 3DNow.
const LEAF_8000_0001_EDX: u32 = bits(&[11, 20, 22, 25, 26, 27, 29, 30, 31]);
/// What Intel defines of leaf 8000_0001h: LAHF, LZCNT and PREFETCHW; SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
const INTEL_8000_0001_ECX: u32 = bits(&[0, 5, 8]);
const INTEL_8000_0001_EDX: u32 = bits(&[11, 20, 26, 27, 29]);
/// What Intel defines of 8000_0008h EBX: WBNOINVD.
const INTEL_8000_0008_EBX: u32 = bits(&[9]);
/// What AMD repeats of leaf 1 in 8000_0001h EDX.
const AMD_REPEATED_EDX: u32 = bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24]);
/// CLZERO, XSAVE error pointers, WBNOINVD, not vulnerable to branch type confusion.
const LEAF_8000_0008_EBX: u32 = bits(&[0, 2, 9, 29]);
/// No nested data breakpoints, LFENCE is serializing, a null selector clears the base.
const LEAF_8000_0021_EAX: u32 = bits(&[0, 2, 6]);

/// 7.EBX, 7.ECX, 7.EDX, 7.1.EAX: all of AVX-512 besides AVX512F itself.
const AVX512_7_EBX: u32 = bits(&[17, 21, 26, 27, 28, 30, 31]);
const AVX512_7_ECX: u32 = bits(&[1, 6, 11, 12, 14]);
const AVX512_7_EDX: u32 = bits(&[2, 3, 8, 23]);
const AVX512_7_1_EAX: u32 = bits(&[5]);
/// 7.ECX: what of AVX-512 works on bytes and words: VBMI, VBMI2, BITALG.
const AVX512_BYTES_7_ECX: u32 = bits(&[1, 6, 12]);
/// 7.EDX: AVX-512's FP16.
const AVX512FP16: u32 = 1 << 23;
/// What of leaf 7.1 needs AVX2.
const AVX_7_1_EAX: u32 = bits(&[4, 23]);
const AVX_7_1_EDX: u32 = bits(&[4, 5]);

/// The bits of XCR0 as leaf 0Dh EAX has them.
const STATE_LEGACY: u32 = (xsave::X87 | xsave::SSE) as u32;
const STATE_AVX: u32 = xsave::AVX as u32;
const STATE_AVX512: u32 = xsave::AVX512 as u32;
const STATE_PKRU: u32 = xsave::PKRU as u32;

/// Lowest and highest "highest leaf" that guests see. The topology leaf 0Bh is always there, on Intel the rates in
/// leaves 15h and 16h as well. Intel has no extended leaf beyond 8000_0008h.
const MIN_BASIC: u32 = 0x0b;
const MIN_BASIC_INTEL: u32 = 0x16;
const MAX_BASIC: u32 = BASIC_SLOTS as u32 - 1;
const MIN_EXTENDED: u32 = EXTENDED + 8;
const MAX_EXTENDED: u32 = EXTENDED + EXTENDED_SLOTS as u32 - 1;

/// The local APIC's bus clock, which leaf 15h must name as the crystal, for guests derive their APIC timer from it.
const CRYSTAL_HZ: u64 = 1_000_000_000;
/// Subleaves of leaf 18h that are passed on; no CPU has more.
const TLB_SUBLEAVES: u32 = 9;

// ---- Feature words ----

/// The feature words of all leaves, made consistent with each other.
#[derive(Clone, Copy, Debug, Default)]
struct Features {
    leaf1_ecx: u32,
    leaf1_edx: u32,
    leaf7_ebx: u32,
    leaf7_ecx: u32,
    leaf7_edx: u32,
    leaf7_1_eax: u32,
    leaf7_1_edx: u32,
    /// Low half of XCR0; nothing above is supported.
    xcr0: u32,
    xsave_eax: u32,
    ext1_ecx: u32,
    ext1_edx: u32,
    ext8_ebx: u32,
    ext21_eax: u32,
}

/// A feature word that takes part in dependencies.
#[derive(Clone, Copy, Debug)]
enum Word {
    Leaf1Ecx,
    Leaf1Edx,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    Leaf71Eax,
    Leaf71Edx,
    Xcr0,
    XsaveEax,
    Ext1Ecx,
    Ext1Edx,
}

/// What needs what: (word, bits) go unless all of (word, bits) are there. What is needed stands first, so that one
/// pass in order leaves nothing without its needs (SDM vol. 1, chapters 11 to 15; APM vol. 3, appendix D).
const NEEDS: &[(Word, u32, Word, u32)] = {
    use Word::*;
    &[
        (Leaf1Edx, SSE, Leaf1Edx, FXSR),
        (Leaf1Edx, SSE2, Leaf1Edx, SSE),
        (Leaf1Edx, PSE36, Leaf1Edx, PSE),
        (Leaf1Edx, MCA, Leaf1Edx, MCE),
        (Leaf7Ebx, CLFLUSHOPT_CLWB, Leaf1Edx, CLFLUSH),
        (Leaf1Ecx, SSE3 | PCLMULQDQ | AES, Leaf1Edx, SSE2),
        (Leaf7Ebx, SHA, Leaf1Edx, SSE2),
        (Leaf7Ecx, GFNI, Leaf1Edx, SSE2),
        (Leaf1Ecx, SSSE3, Leaf1Ecx, SSE3),
        (Leaf1Ecx, SSE4_1, Leaf1Ecx, SSSE3),
        (Leaf1Ecx, SSE4_2, Leaf1Ecx, SSE4_1),
        (Ext1Ecx, SSE4A_MISALIGNED, Leaf1Ecx, SSE3),
        (Ext1Edx, THREEDNOW | MMX_EXTENSIONS, Leaf1Edx, MMX),
        (Ext1Edx, THREEDNOW_EXTENSIONS, Ext1Edx, THREEDNOW),
        (Ext1Edx, FFXSR, Leaf1Edx, FXSR),
        (Ext1Edx, NX | LONG_MODE, Leaf1Edx, PAE),
        (Ext1Edx, PAGES_1G, Ext1Edx, LONG_MODE),
        (Ext1Ecx, LAHF, Ext1Edx, LONG_MODE),
        (Leaf1Ecx, CMPXCHG16B | PCID, Ext1Edx, LONG_MODE),
        (Leaf7Ebx, FSGSBASE, Ext1Edx, LONG_MODE),
        (Leaf7Ecx, LA57 | PKU | PKS, Ext1Edx, LONG_MODE),
        (Leaf7Ebx, INVPCID, Leaf1Ecx, PCID),
        // XSAVE and the states that XCR0 enables.
        (Leaf1Ecx, XSAVE, Leaf1Edx, FXSR),
        (Leaf1Ecx, XSAVE, Xcr0, STATE_LEGACY),
        (Xcr0, u32::MAX, Leaf1Ecx, XSAVE),
        (XsaveEax, u32::MAX, Leaf1Ecx, XSAVE),
        (XsaveEax, XSAVES, XsaveEax, XSAVEC),
        (Leaf7Ecx, PKU, Xcr0, STATE_PKRU),
        (Xcr0, STATE_PKRU, Leaf7Ecx, PKU),
        (Leaf1Ecx, AVX, Xcr0, STATE_AVX),
        (Leaf1Ecx, AVX, Leaf1Ecx, SSE4_2),
        (Xcr0, STATE_AVX, Leaf1Ecx, AVX),
        (Leaf1Ecx, FMA | F16C, Leaf1Ecx, AVX),
        (Ext1Ecx, XOP_FMA4, Leaf1Ecx, AVX),
        (Leaf7Ebx, AVX2, Leaf1Ecx, AVX),
        (Leaf7Ecx, VAES, Leaf1Ecx, AVX | AES),
        (Leaf7Ecx, VPCLMULQDQ, Leaf1Ecx, AVX | PCLMULQDQ),
        (Leaf71Eax, AVX_7_1_EAX, Leaf7Ebx, AVX2),
        (Leaf71Edx, AVX_7_1_EDX, Leaf7Ebx, AVX2),
        // AVX-512 is one state in three parts.
        (Leaf7Ebx, AVX512F, Xcr0, STATE_AVX512),
        (Leaf7Ebx, AVX512F, Leaf7Ebx, AVX2),
        (Leaf7Ebx, AVX512F, Leaf1Ecx, FMA | F16C),
        (Xcr0, STATE_AVX512, Leaf7Ebx, AVX512F),
        (Leaf7Ebx, AVX512_7_EBX, Leaf7Ebx, AVX512F),
        (Leaf7Ecx, AVX512_7_ECX, Leaf7Ebx, AVX512F),
        (Leaf7Edx, AVX512_7_EDX, Leaf7Ebx, AVX512F),
        (Leaf7Ecx, AVX512_BYTES_7_ECX, Leaf7Ebx, AVX512BW),
        (Leaf71Eax, AVX512_7_1_EAX, Leaf7Ebx, AVX512BW),
        (Leaf7Edx, AVX512FP16, Leaf7Ebx, AVX512BW | AVX512DQ | AVX512VL),
    ]
};

impl Features {
    fn new(host: &Host<'_, impl HostCpuid>, shape: &VmShape) -> Self {
        let leaf1 = host.leaf(1, 0);
        let leaf7 = host.leaf(7, 0);
        let leaf7_1 = if leaf7.eax >= 1 { host.leaf(7, 1) } else { CpuidLeaf::ZERO };
        let xsave = host.leaf(0xd, 0);
        let ext1 = host.leaf(EXTENDED + 1, 0);
        // A component without a size (some emulators' PKRU) has no place in an area: it cannot be switched.
        let sized = (2..xsave::SUBLEAVES).filter(|&component| host.leaf(0xd, component).eax != 0);
        let states = sized.fold(STATE_LEGACY, |states, component| states | 1 << component);
        let mut features = Self {
            leaf1_ecx: leaf1.ecx & LEAF_1_ECX | X2APIC | TSC_DEADLINE | HYPERVISOR_PRESENT,
            // Without the first two Umbra would not be here.
            leaf1_edx: leaf1.edx & LEAF_1_EDX | TSC | MSR | APIC,
            leaf7_ebx: leaf7.ebx & LEAF_7_EBX | TSC_ADJUST,
            leaf7_ecx: leaf7.ecx & LEAF_7_ECX,
            leaf7_edx: leaf7.edx & LEAF_7_EDX,
            leaf7_1_eax: leaf7_1.eax & LEAF_7_1_EAX,
            leaf7_1_edx: leaf7_1.edx & LEAF_7_1_EDX,
            xcr0: xsave.eax & xsave::SUPPORTED as u32 & states,
            xsave_eax: host.leaf(0xd, 1).eax & LEAF_D_1_EAX,
            ext1_ecx: ext1.ecx & LEAF_8000_0001_ECX & !CMP_LEGACY,
            ext1_edx: ext1.edx & LEAF_8000_0001_EDX,
            ext8_ebx: host.leaf(EXTENDED + 8, 0).ebx & LEAF_8000_0008_EBX,
            ext21_eax: host.leaf(EXTENDED + 0x21, 0).eax & LEAF_8000_0021_EAX,
        };
        if host.vendor == Vendor::Intel {
            features.ext1_ecx &= INTEL_8000_0001_ECX;
            features.ext1_edx &= INTEL_8000_0001_EDX;
            features.ext8_ebx &= INTEL_8000_0008_EBX;
            features.ext21_eax = 0;
        }
        if shape.vcpus > 1 {
            features.leaf1_edx |= HTT;
            if host.vendor == Vendor::Amd {
                features.ext1_ecx |= CMP_LEGACY;
            }
        }
        if !shape.sound_compaction {
            features.xsave_eax &= !(XSAVEC | XSAVES);
        }
        let has_amd_leaves = host.vendor == Vendor::Amd && host.max_extended >= EXTENDED + 0x1e;
        if !has_amd_leaves || caches(host, EXTENDED + 0x1d).next().is_none() {
            features.ext1_ecx &= !TOPOEXT;
        }
        features.drop_unsupported();
        if host.vendor == Vendor::Amd {
            features.ext1_edx |= features.leaf1_edx & AMD_REPEATED_EDX;
        }
        features
    }

    /// Takes away what needs something that is not there.
    fn drop_unsupported(&mut self) {
        for &(dependent, bits, needed, mask) in NEEDS {
            if *self.word(needed) & mask != mask {
                *self.word(dependent) &= !bits;
            }
        }
    }

    fn word(&mut self, word: Word) -> &mut u32 {
        match word {
            Word::Leaf1Ecx => &mut self.leaf1_ecx,
            Word::Leaf1Edx => &mut self.leaf1_edx,
            Word::Leaf7Ebx => &mut self.leaf7_ebx,
            Word::Leaf7Ecx => &mut self.leaf7_ecx,
            Word::Leaf7Edx => &mut self.leaf7_edx,
            Word::Leaf71Eax => &mut self.leaf7_1_eax,
            Word::Leaf71Edx => &mut self.leaf7_1_edx,
            Word::Xcr0 => &mut self.xcr0,
            Word::XsaveEax => &mut self.xsave_eax,
            Word::Ext1Ecx => &mut self.ext1_ecx,
            Word::Ext1Edx => &mut self.ext1_edx,
        }
    }

    /// Bits of CR4 that go with the features (SDM vol. 3, 2.5).
    fn cr4(&self) -> u64 {
        // PCE, OSFXSR and OSXMMEXCPT stand for what every 64-bit CPU has.
        let always = bits(&[8, 9, 10]);
        let from_leaf1 = [(1 << 1, 0b11), (1 << 4, 1 << 2), (1 << 2, 1 << 3), (1 << 3, 1 << 4)]
            .into_iter()
            .chain([(1 << 6, 1 << 5), (1 << 7, 1 << 6), (1 << 13, 1 << 7)])
            .filter(|(feature, _)| self.leaf1_edx & feature != 0)
            .fold(0, |mask, (_, cr4)| mask | cr4);
        let others = [
            (self.leaf7_ecx & UMIP, 11),
            (self.leaf7_ecx & LA57, 12),
            (self.leaf7_ebx & FSGSBASE, 16),
            (self.leaf1_ecx & PCID, 17),
            (self.leaf1_ecx & XSAVE, 18),
            (self.leaf7_ebx & SMEP, 20),
            (self.leaf7_ebx & SMAP, 21),
            (self.leaf7_ecx & PKU, 22),
            (self.leaf7_ecx & PKS, 24),
        ]
        .into_iter()
        .filter(|(feature, _)| *feature != 0)
        .fold(0, |mask, (_, bit)| mask | 1u64 << bit);
        u64::from(always | from_leaf1) | others
    }

    /// Bits of EFER that go with the features (APM vol. 2, 3.1.7).
    fn efer(&self) -> u64 {
        [(SYSCALL, 1 << 0), (LONG_MODE, 1 << 8 | 1 << 10), (NX, 1 << 11), (FFXSR, 1 << 14)]
            .into_iter()
            .filter(|(feature, _)| self.ext1_edx & feature != 0)
            .fold(0, |mask, (_, efer)| mask | efer)
    }
}

// ---- The table ----

/// The host's leaves; those beyond its highest ones read zero.
struct Host<'a, H> {
    cpuid: &'a H,
    vendor: Vendor,
    max_basic: u32,
    max_extended: u32,
}

impl<'a, H: HostCpuid> Host<'a, H> {
    fn new(cpuid: &'a H) -> Self {
        let leaf0 = cpuid.cpuid(0, 0);
        let max_extended = cpuid.cpuid(EXTENDED, 0).eax;
        Self {
            cpuid,
            vendor: Vendor::of(leaf0),
            max_basic: leaf0.eax,
            // A CPU without extended leaves answers something else.
            max_extended: if max_extended >> 16 == EXTENDED >> 16 { max_extended } else { 0 },
        }
    }

    fn leaf(&self, leaf: u32, subleaf: u32) -> CpuidLeaf {
        let max = if leaf >= EXTENDED { self.max_extended } else { self.max_basic };
        if leaf <= max {
            self.cpuid.cpuid(leaf, subleaf)
        } else {
            CpuidLeaf::ZERO
        }
    }
}

/// APIC ID bits that number the cores of the one package.
const fn core_id_bits(vcpus: u8) -> u32 {
    (vcpus as u32).next_power_of_two().trailing_zeros()
}

/// Computes a VM's table.
pub(super) fn build(cpuid: &impl HostCpuid, shape: &VmShape) -> CpuidTable {
    let shape = &VmShape { vcpus: shape.vcpus.clamp(1, 64), ..*shape };
    let host = &Host::new(cpuid);
    let features = &Features::new(host, shape);
    let tsc_ratio = match host.vendor {
        Vendor::Intel => tsc_ratio(shape.tsc_hz),
        Vendor::Amd => None,
    };
    let (min_basic, max_extended) = match host.vendor {
        Vendor::Intel => (MIN_BASIC_INTEL, MIN_EXTENDED),
        Vendor::Amd => (MIN_BASIC, MAX_EXTENDED),
    };
    let addresses = host.leaf(EXTENDED + 8, 0).eax;
    let host_phys_bits = if addresses as u8 == 0 { 36 } else { addresses as u8 };
    let mut table = CpuidTable {
        basic: [Slot::default(); BASIC_SLOTS],
        extended: [Slot::default(); EXTENDED_SLOTS],
        hypervisor: [Slot::default(); HYPERVISOR_SLOTS],
        entries: [CpuidLeaf::ZERO; ENTRIES],
        len: 1,
        max_basic: host.max_basic.clamp(min_basic, MAX_BASIC),
        max_extended: host.max_extended.clamp(MIN_EXTENDED, max_extended),
        compacted_xsave: features.xsave_eax & (XSAVEC | XSAVES) != 0,
        caps: GuestCaps {
            vendor: host.vendor,
            phys_bits: host_phys_bits.min(shape.max_phys_bits).clamp(32, 52),
            efer: features.efer(),
            cr4: features.cr4(),
            xcr0: features.xcr0.into(),
            tsc_aux: features.ext1_edx & RDTSCP != 0 || features.leaf7_ecx & RDPID != 0,
            xsaves: features.xsave_eax & XSAVES != 0,
            invpcid: features.leaf7_ebx & INVPCID != 0,
            lfence_serializing: features.ext21_eax & LFENCE_SERIALIZING != 0,
        },
    };
    table.add_basic(host, features, shape, tsc_ratio);
    table.add_hypervisor();
    table.add_extended(host, features, shape);
    table
}

/// EAX, EBX and ECX of leaf 15h, if the TSC's rate can be told exactly. Kernels multiply the crystal's kHz by the
/// numerator in 32 bits and then trust the result blindly: rather no rate than a wrong one.
fn tsc_ratio(tsc_hz: u64) -> Option<CpuidLeaf> {
    let (mut a, mut b) = (tsc_hz, CRYSTAL_HZ);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    let numerator = u32::try_from(tsc_hz.checked_div(a)?).ok()?;
    let denominator = u32::try_from(CRYSTAL_HZ.checked_div(a)?).ok()?;
    numerator.checked_mul((CRYSTAL_HZ / 1000) as u32)?;
    (numerator != 0).then_some(CpuidLeaf::new(denominator, numerator, CRYSTAL_HZ as u32, 0))
}

/// ECX of Intel's leaf 8000_0006h as leaf 4 has the L2 cache: KiB, associativity, line size. Emulators are known to
/// say different things in the two.
fn l2_of_leaf_4(host: &Host<'_, impl HostCpuid>) -> Option<u32> {
    let l2 = caches(host, 4).find(|cache| cache.eax >> 5 & 7 == 2 && cache.eax & 0x1f != 2)?;
    let (ways, partitions, line) = ((l2.ebx >> 22) + 1, (l2.ebx >> 12 & 0x3ff) + 1, (l2.ebx & 0xfff) + 1);
    let bytes =
        [ways, partitions, line].map(u64::from).iter().product::<u64>().saturating_mul(u64::from(l2.ecx) + 1);
    let associativity = match ways {
        1 | 2 | 4 => ways,
        8 => 6,
        16 => 8,
        // "See leaf 4".
        _ => 7,
    };
    let kib = (bytes >> 10).min(0xffff) as u32;
    Some(kib << 16 | associativity << 12 | line & 0xff)
}

/// Leaf 16h: the base, highest and reference rates in MHz. The TSC counts at the base rate, there is no turbo, and the
/// reference is the crystal of leaf 15h.
fn rates(tsc_hz: u64) -> Option<CpuidLeaf> {
    let mhz = u32::from(u16::try_from(tsc_hz.saturating_add(500_000) / 1_000_000).ok()?);
    (mhz != 0).then_some(CpuidLeaf::new(mhz, mhz, (CRYSTAL_HZ / 1_000_000) as u32, 0))
}

/// Leaf 18h, the translation caches, which descriptor FEh of leaf 2 points to. Each belongs to one logical processor.
fn tlbs<'a>(host: &'a Host<'_, impl HostCpuid>) -> impl Iterator<Item = CpuidLeaf> + 'a {
    let last = host.leaf(0x18, 0).eax.min(TLB_SUBLEAVES - 1);
    let count = if host.max_basic >= 0x18 { last + 1 } else { 0 };
    (0..count).map(move |subleaf| {
        let tlb = host.leaf(0x18, subleaf);
        let exists = tlb.edx & 0x1f != 0;
        let eax = if subleaf == 0 { last } else { 0 };
        CpuidLeaf { eax, edx: tlb.edx & 0x1ff, ..if exists { tlb } else { CpuidLeaf::ZERO } }
    })
}

impl CpuidTable {
    /// Stores the entries of a leaf. A leaf without any points at the zeros.
    fn push(&mut self, kind: Kind, entries: impl IntoIterator<Item = CpuidLeaf>) -> Slot {
        let first = self.len;
        for entry in entries {
            if let Some(place) = self.entries.get_mut(usize::from(self.len)) {
                *place = entry;
                self.len += 1;
            }
        }
        let count = self.len - first;
        Slot { first: if count == 0 { 0 } else { first }, count, kind }
    }

    fn set_basic(&mut self, leaf: u32, kind: Kind, entries: impl IntoIterator<Item = CpuidLeaf>) {
        if leaf <= self.max_basic {
            self.basic[leaf as usize & (BASIC_SLOTS - 1)] = self.push(kind, entries);
        }
    }

    fn set_extended(&mut self, leaf: u32, kind: Kind, entries: impl IntoIterator<Item = CpuidLeaf>) {
        if EXTENDED + leaf <= self.max_extended && (leaf as usize) < EXTENDED_SLOTS {
            self.extended[leaf as usize] = self.push(kind, entries);
        }
    }

    fn add_basic(
        &mut self,
        host: &Host<'_, impl HostCpuid>,
        features: &Features,
        shape: &VmShape,
        tsc_ratio: Option<CpuidLeaf>,
    ) {
        let vcpus = u32::from(shape.vcpus);
        let package_ids = vcpus.next_power_of_two();
        let vendor = host.leaf(0, 0);
        self.set_basic(0, Kind::Plain, [CpuidLeaf { eax: self.max_basic, ..vendor }]);
        let logical = if host.vendor == Vendor::Intel { package_ids } else { vcpus };
        let leaf1 = host.leaf(1, 0);
        self.set_basic(
            1,
            Kind::Features,
            [CpuidLeaf {
                eax: leaf1.eax,
                ebx: leaf1.ebx & 0xffff | logical << 16,
                ecx: features.leaf1_ecx,
                edx: features.leaf1_edx,
            }],
        );
        if host.vendor == Vendor::Intel {
            self.set_basic(2, Kind::Plain, [host.leaf(2, 0)]);
            let caches = caches(host, 4).map(|cache| CpuidLeaf {
                eax: with_sharing(cache.eax, package_ids) | (package_ids - 1) << 26,
                ..cache
            });
            self.set_basic(4, Kind::Indexed, caches);
            self.set_basic(0x15, Kind::Plain, tsc_ratio);
            self.set_basic(0x16, Kind::Plain, rates(shape.tsc_hz));
            self.set_basic(0x18, Kind::Indexed, tlbs(host));
        }
        self.set_basic(6, Kind::Plain, [CpuidLeaf::new(ARAT, 0, 0, 0)]);
        let has_7_1 = features.leaf7_1_eax | features.leaf7_1_edx != 0;
        let leaf7 = [
            CpuidLeaf::new(has_7_1.into(), features.leaf7_ebx, features.leaf7_ecx, features.leaf7_edx),
            CpuidLeaf::new(features.leaf7_1_eax, 0, 0, features.leaf7_1_edx),
        ];
        self.set_basic(7, Kind::StructuredFeatures, leaf7.into_iter().take(1 + usize::from(has_7_1)));
        // One thread a core (level type 1), all cores in the package (level type 2).
        let levels =
            [CpuidLeaf::new(0, 1, 1 << 8, 0), CpuidLeaf::new(core_id_bits(shape.vcpus), vcpus, 2 << 8, 0)];
        self.set_basic(0xb, Kind::Topology, levels);
        if host.vendor == Vendor::Intel {
            self.set_basic(0x1f, Kind::Topology, levels);
        }
        self.add_xsave(host, features);
    }

    fn add_xsave(&mut self, host: &Host<'_, impl HostCpuid>, features: &Features) {
        if features.xcr0 == 0 {
            return;
        }
        let components = (0..xsave::SUBLEAVES).map(|subleaf| match subleaf {
            0 => CpuidLeaf::new(features.xcr0, 0, 0, 0),
            1 => CpuidLeaf::new(features.xsave_eax, 0, 0, 0),
            // Nothing supported is a supervisor state, so bit 0 of ECX is clear.
            n if features.xcr0 >> n & 1 != 0 => {
                let component = host.leaf(0xd, n);
                CpuidLeaf { ecx: component.ecx & 0b10, edx: 0, ..component }
            }
            _ => CpuidLeaf::ZERO,
        });
        self.set_basic(0xd, Kind::Xsave, components);
        let slot = self.basic[0xd];
        let size = self.components(slot).standard_size(features.xcr0.into());
        if let Some(entry) = self.entries.get_mut(usize::from(slot.first)) {
            entry.ecx = size;
        }
    }

    fn add_hypervisor(&mut self) {
        let signed = |base: u32, signature: [u8; 12]| {
            let [ebx, ecx, edx] =
                [0, 4, 8].map(|at| u32::from_le_bytes(core::array::from_fn(|byte| signature[at + byte])));
            CpuidLeaf::new(base + 1, ebx, ecx, edx)
        };
        self.hypervisor[0] = self.push(Kind::Plain, [signed(HYPERVISOR, SIGNATURE)]);
        self.hypervisor[1] = self.push(Kind::Plain, [CpuidLeaf::new(1, 0, 0, 0)]);
        self.hypervisor[2] = self.push(Kind::Plain, [signed(pvclock::CPUID_BASE, pvclock::SIGNATURE)]);
        self.hypervisor[3] = self.push(Kind::Plain, [CpuidLeaf::new(pvclock::FEATURES, 0, 0, 0)]);
    }

    fn add_extended(&mut self, host: &Host<'_, impl HostCpuid>, features: &Features, shape: &VmShape) {
        let amd = host.vendor == Vendor::Amd;
        let vcpus = u32::from(shape.vcpus);
        let leaf0 = host.leaf(EXTENDED, 0);
        self.set_extended(0, Kind::Plain, [CpuidLeaf { eax: self.max_extended, ..leaf0 }]);
        let leaf1 = host.leaf(EXTENDED + 1, 0);
        self.set_extended(
            1,
            Kind::ExtendedFeatures,
            [CpuidLeaf {
                ecx: features.ext1_ecx,
                edx: features.ext1_edx,
                ..if amd { leaf1 } else { CpuidLeaf::ZERO }
            }],
        );
        // Brand string, caches and TLBs: the host's. Of the latter two, Intel has the L2 cache alone.
        for leaf in 2..=4 {
            self.set_extended(leaf, Kind::Plain, [host.leaf(EXTENDED + leaf, 0)]);
        }
        let (l1, l2) = (host.leaf(EXTENDED + 5, 0), host.leaf(EXTENDED + 6, 0));
        self.set_extended(5, Kind::Plain, amd.then_some(l1));
        self.set_extended(
            6,
            Kind::Plain,
            [if amd { l2 } else { CpuidLeaf::new(0, 0, l2_of_leaf_4(host).unwrap_or(l2.ecx), 0) }],
        );
        self.set_extended(7, Kind::Plain, [CpuidLeaf::new(0, 0, 0, INVARIANT_TSC)]);
        let linear = u32::from(self.caps.linear_bits());
        let cores = if amd { core_id_bits(shape.vcpus) << 12 | (vcpus - 1) } else { 0 };
        let physical = u32::from(self.caps.phys_bits);
        self.set_extended(
            8,
            Kind::Plain,
            [CpuidLeaf::new(linear << 8 | physical, features.ext8_ebx, cores, 0)],
        );
        if !amd {
            return;
        }
        for leaf in [0x19, 0x1a] {
            self.set_extended(leaf, Kind::Plain, [host.leaf(EXTENDED + leaf, 0)]);
        }
        if features.ext1_ecx & TOPOEXT != 0 {
            let ids = vcpus.next_power_of_two();
            let caches = caches(host, EXTENDED + 0x1d)
                .map(|cache| CpuidLeaf { eax: with_sharing(cache.eax, ids), ..cache });
            self.set_extended(0x1d, Kind::Indexed, caches);
            self.set_extended(0x1e, Kind::AmdTopology, []);
        }
        self.set_extended(0x21, Kind::Plain, [CpuidLeaf::new(features.ext21_eax, 0, 0, 0)]);
    }
}

/// The subleaves of a deterministic cache leaf, up to the first that names no cache.
fn caches<'a>(host: &'a Host<'_, impl HostCpuid>, leaf: u32) -> impl Iterator<Item = CpuidLeaf> + 'a {
    (0..8).map(move |subleaf| host.leaf(leaf, subleaf)).take_while(|cache| cache.eax & 0x1f != 0)
}

/// EAX of a cache leaf with the sharing of this topology: levels 1 and 2 belong to one core, level 3 to all.
/// Bits 31:26, core IDs in the package, are left clear.
const fn with_sharing(eax: u32, package_ids: u32) -> u32 {
    let sharing = if eax >> 5 & 7 >= 3 { package_ids - 1 } else { 0 };
    eax & 0x3fff | sharing << 14
}
