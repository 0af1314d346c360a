//! A feature that CPUID advertises can be used.
use guests::paging::{Space, P, PLAYGROUND, W};
use guests::prelude::*;
use guests::report::case;
use guests::trap::catch;
use guests::{exec, frames};

/// CR4.OSFXSR and OSXMMEXCPT: SSE instructions work. AMD APM vol. 2, 3.1.3.
const CR4_SSE: u64 = 3 << 9;

struct Feature {
    name: &'static str,
    leaf: u32,
    subleaf: u32,
    register: fn(&Cpuid) -> u32,
    bit: u32,
    /// Bits of CR4 it needs.
    cr4: u64,
    /// Bits of XCR0 it needs.
    xcr0: u64,
    run: fn(),
}

const ECX: fn(&Cpuid) -> u32 = |leaf| leaf.ecx;
const EDX: fn(&Cpuid) -> u32 = |leaf| leaf.edx;
const EBX: fn(&Cpuid) -> u32 = |leaf| leaf.ebx;

macro_rules! feature {
    ($name:literal, $leaf:literal [$subleaf:literal] $register:ident[$bit:literal], cr4 $cr4:expr, xcr0 $xcr0:literal,
     $($asm:tt)*) => {
        Feature {
            name: $name, leaf: $leaf, subleaf: $subleaf, register: $register, bit: $bit, cr4: $cr4, xcr0: $xcr0,
            run: || exec!($($asm)*),
        }
    };
}

static BYTES: guests::Racy<[u64; 64]> = guests::Racy::new([0; 64]);

const FEATURES: &[Feature] = &[
    feature!("cmov", 1 [0] EDX[15], cr4 0, xcr0 0, "cmovz eax, ecx", out("eax") _),
    feature!("cx8", 1 [0] EDX[8], cr4 0, xcr0 0, "mov r8, rbx", "cmpxchg8b [rdi]", "mov rbx, r8", in("rdi") BYTES.get(),
        out("eax") _, out("edx") _, out("r8") _),
    feature!("cx16", 1 [0] ECX[13], cr4 0, xcr0 0, "mov r8, rbx", "cmpxchg16b [rdi]", "mov rbx, r8",
        in("rdi") BYTES.addr().next_multiple_of(16), out("rax") _, out("rdx") _, out("r8") _),
    feature!("clflush", 1 [0] EDX[19], cr4 0, xcr0 0, "clflush [rdi]", in("rdi") BYTES.get()),
    feature!("mmx", 1 [0] EDX[23], cr4 0, xcr0 0, "paddb mm0, mm1", "emms"),
    feature!("fxsr", 1 [0] EDX[24], cr4 CR4_SSE, xcr0 0, "fxsave [rdi]", "fxrstor [rdi]", in("rdi") FXAREA.get()),
    feature!("sse", 1 [0] EDX[25], cr4 CR4_SSE, xcr0 0, "xorps xmm0, xmm0", "addps xmm0, xmm0"),
    feature!("sse2", 1 [0] EDX[26], cr4 CR4_SSE, xcr0 0, "pxor xmm0, xmm0", "paddq xmm0, xmm0"),
    feature!("sse3", 1 [0] ECX[0], cr4 CR4_SSE, xcr0 0, "haddps xmm0, xmm0"),
    feature!("pclmulqdq", 1 [0] ECX[1], cr4 CR4_SSE, xcr0 0, "pclmulqdq xmm0, xmm0, 0"),
    feature!("ssse3", 1 [0] ECX[9], cr4 CR4_SSE, xcr0 0, "pshufb xmm0, xmm0"),
    feature!("sse4_1", 1 [0] ECX[19], cr4 CR4_SSE, xcr0 0, "ptest xmm0, xmm0"),
    feature!("sse4_2", 1 [0] ECX[20], cr4 CR4_SSE, xcr0 0, "pcmpgtq xmm0, xmm0"),
    feature!("movbe", 1 [0] ECX[22], cr4 0, xcr0 0, "movbe eax, [rdi]", in("rdi") BYTES.get(), out("eax") _),
    feature!("popcnt", 1 [0] ECX[23], cr4 0, xcr0 0, "popcnt eax, ecx", out("eax") _),
    feature!("aes", 1 [0] ECX[25], cr4 CR4_SSE, xcr0 0, "aesenc xmm0, xmm0"),
    feature!("avx", 1 [0] ECX[28], cr4 CR4_SSE | CR4_OSXSAVE, xcr0 7, "vxorps ymm0, ymm0, ymm0", "vzeroupper"),
    feature!("f16c", 1 [0] ECX[29], cr4 CR4_SSE | CR4_OSXSAVE, xcr0 7, "vcvtph2ps xmm0, xmm0"),
    feature!("rdrand", 1 [0] ECX[30], cr4 0, xcr0 0, "rdrand eax", out("eax") _),
    feature!("fsgsbase", 7 [0] EBX[0], cr4 CR4_FSGSBASE, xcr0 0, "rdfsbase rax", "wrfsbase rax", out("rax") _),
    feature!("bmi1", 7 [0] EBX[3], cr4 0, xcr0 0, "andn eax, ecx, edx", out("eax") _),
    feature!("avx2", 7 [0] EBX[5], cr4 CR4_SSE | CR4_OSXSAVE, xcr0 7, "vpxor ymm0, ymm0, ymm0", "vzeroupper"),
    feature!("smep", 7 [0] EBX[7], cr4 CR4_SMEP, xcr0 0, "nop"),
    feature!("bmi2", 7 [0] EBX[8], cr4 0, xcr0 0, "pdep eax, ecx, edx", out("eax") _),
    feature!("erms", 7 [0] EBX[9], cr4 0, xcr0 0, "rep stosb", inout("rcx") 8u64 => _, inout("rdi") BYTES.get() => _,
        in("al") 0u8),
    feature!("rdseed", 7 [0] EBX[18], cr4 0, xcr0 0, "rdseed eax", out("eax") _),
    feature!("adx", 7 [0] EBX[19], cr4 0, xcr0 0, "adcx eax, ecx", "adox eax, ecx", out("eax") _),
    feature!("smap", 7 [0] EBX[20], cr4 CR4_SMAP, xcr0 0, "stac", "clac"),
    feature!("clflushopt", 7 [0] EBX[23], cr4 0, xcr0 0, "clflushopt [rdi]", in("rdi") BYTES.get()),
    feature!("clwb", 7 [0] EBX[24], cr4 0, xcr0 0, "clwb [rdi]", in("rdi") BYTES.get()),
    feature!("sha", 7 [0] EBX[29], cr4 CR4_SSE, xcr0 0, "sha1nexte xmm0, xmm0"),
    feature!("umip", 7 [0] ECX[2], cr4 CR4_UMIP, xcr0 0, "smsw eax", out("eax") _),
    feature!("pku", 7 [0] ECX[3], cr4 CR4_PKE, xcr0 0, "rdpkru", "wrpkru", in("ecx") 0, out("eax") _, out("edx") _),
    feature!("pks", 7 [0] ECX[31], cr4 CR4_PKS, xcr0 0, "rdmsr", "wrmsr", in("ecx") MSR_PKRS, out("eax") _, out("edx") _),
    feature!("rdpid", 7 [0] ECX[22], cr4 0, xcr0 0, "rdpid rax", out("rax") _),
    feature!("lahf", 0x8000_0001 [0] ECX[0], cr4 0, xcr0 0, "lahf", "sahf", out("eax") _),
    feature!("lzcnt", 0x8000_0001 [0] ECX[5], cr4 0, xcr0 0, "lzcnt eax, ecx", out("eax") _),
    feature!("sse4a", 0x8000_0001 [0] ECX[6], cr4 CR4_SSE, xcr0 0, "extrq xmm0, xmm0"),
    feature!("prefetchw", 0x8000_0001 [0] ECX[8], cr4 0, xcr0 0, "prefetchw [rdi]", in("rdi") BYTES.get()),
    feature!("syscall", 0x8000_0001 [0] EDX[11], cr4 0, xcr0 0, "mov ecx, 0xc0000080", "rdmsr", "or eax, 1", "wrmsr",
        out("eax") _, out("ecx") _, out("edx") _),
    feature!("rdtscp", 0x8000_0001 [0] EDX[27], cr4 0, xcr0 0, "rdtscp", out("eax") _, out("ecx") _, out("edx") _),
    feature!("clzero", 0x8000_0008 [0] EBX[0], cr4 0, xcr0 0, "clzero", in("rax") BYTES.addr().next_multiple_of(64)),
    feature!("wbnoinvd", 0x8000_0008 [0] EBX[9], cr4 0, xcr0 0, "wbnoinvd"),
    feature!("xsaveopt", 0xd [1] EAX[0], cr4 CR4_OSXSAVE, xcr0 3, "xsaveopt [rdi]", in("rdi") FXAREA.get(),
        in("eax") 3, in("edx") 0),
    feature!("xsavec", 0xd [1] EAX[1], cr4 CR4_OSXSAVE, xcr0 3, "xsavec [rdi]", in("rdi") FXAREA.get(),
        in("eax") 3, in("edx") 0),
    feature!("xgetbv1", 0xd [1] EAX[2], cr4 CR4_OSXSAVE, xcr0 3, "xgetbv", in("ecx") 1, out("eax") _, out("edx") _),
];
const EAX: fn(&Cpuid) -> u32 = |leaf| leaf.eax;

#[repr(C, align(64))]
struct Area([u8; 1024]);
static FXAREA: guests::Racy<Area> = guests::Racy::new(Area([0; 1024]));

pub(crate) fn run() {
    for feature in FEATURES {
        let mut name = [0u8; 32];
        let name = join(&mut name, "feature.", feature.name);
        case(name, |t| {
            if !has(feature.leaf, feature.subleaf, feature.register, feature.bit) {
                return t.skip("not advertised");
            }
            // EM and TS clear, MP set: x87 and SSE instructions execute.
            set_cr0(cr0() & !0xc | 2);
            let got = catch(|| set_cr4(cr4() | feature.cr4));
            t.works("setting its CR4 bits", got);
            if feature.xcr0 != 0 {
                let got = catch(|| {
                    set_cr4(cr4() | CR4_OSXSAVE);
                    xsetbv(0, feature.xcr0);
                });
                t.works("setting its XCR0 bits", got);
            }
            // PKE must not meet a PKRU that forbids; SMEP and SMAP do not matter, the image is supervisor's.
            let got = catch(feature.run);
            t.works("using it", got);
            if feature.xcr0 != 0 {
                xsetbv(0, 1);
            }
        });
    }
    pages_1g();
    tsc_aux();
}

fn join<'a>(buffer: &'a mut [u8; 32], first: &str, second: &str) -> &'a str {
    let len = first.len() + second.len();
    buffer[..first.len()].copy_from_slice(first.as_bytes());
    buffer[first.len()..len].copy_from_slice(second.as_bytes());
    core::str::from_utf8(&buffer[..len]).unwrap_or("feature")
}

fn pages_1g() {
    case("feature.pages_1g", |t| {
        if !guests::paging::has_1g() {
            return t.skip("not advertised");
        }
        let frame = frames::page();
        poke(frame, 0x1234_5678u32);
        let space = Space::current();
        space.map(PLAYGROUND + (1 << 30), frame & !0x3fff_ffff, 3, P | W);
        let got = catch(|| peek::<u32>(PLAYGROUND + (1 << 30) + (frame & 0x3fff_ffff)));
        space.set(PLAYGROUND + (1 << 30), 3, 0);
        if let Some(got) = t.works("a read through a 1 GiB page", got) {
            t.eq("the value there", got, 0x1234_5678u32);
        }
    });
}

fn tsc_aux() {
    case("feature.tsc_aux", |t| {
        if !has(0x8000_0001, 0, EDX, 27) {
            return t.skip("no RDTSCP");
        }
        wrmsr(0xc000_0103, 0x1234_abcd);
        let aux: u32;
        exec!("rdtscp", out("eax") _, out("edx") _, out("ecx") aux);
        t.eq("ECX of RDTSCP", aux, 0x1234_abcdu32);
        t.eq("RDMSR of TSC_AUX", rdmsr(0xc000_0103), 0x1234_abcdu64);
        if has(7, 0, ECX, 22) {
            let aux: u64;
            exec!("rdpid {}", out(reg) aux);
            t.eq("RDPID", aux, 0x1234_abcdu64);
        }
    });
}
