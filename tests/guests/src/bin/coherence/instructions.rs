//! Instructions of features that CPUID hides raise #UD; those of features that it shows, and whose switch is on, work.
use crate::view::{any, bit, Bit, A, B, C, D, EXT1, EXT8};
use guests::exec;
use guests::platform;
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{catch, GP, UD};
use guests::user::{self, Start};

/// CR4.OSFXSR and OSXMMEXCPT.
const CR4_SSE: u64 = 3 << 9;

#[repr(C, align(64))]
struct Area([u8; 4096]);
static AREA: guests::Racy<Area> = guests::Racy::new(Area([0; 4096]));

/// An instruction that exists with any of some CPUID bits.
struct Instruction {
    name: &'static str,
    bits: &'static [Bit],
    /// It can be tried where it exists, with these bits of CR4; otherwise trying it would change the machine.
    works_with: Option<u64>,
    /// QEMU's TCG does not look whether the feature is there.
    lax_on_tcg: bool,
    /// Umbra hides it where it is unsound, and on these platforms nothing makes it fault then.
    unsound_on: fn() -> bool,
    run: fn(),
}

macro_rules! instruction {
    ($name:literal, $bits:expr, $works:expr, lax, $($asm:tt)*) => {
        Instruction {
            name: $name, bits: $bits, works_with: $works, lax_on_tcg: true, unsound_on: || false, run: || exec!($($asm)*)
        }
    };
    ($name:literal, $bits:expr, $works:expr, unsound $on:expr, $($asm:tt)*) => {
        Instruction {
            name: $name, bits: $bits, works_with: $works, lax_on_tcg: false, unsound_on: $on, run: || exec!($($asm)*)
        }
    };
    ($name:literal, $bits:expr, $works:expr, $($asm:tt)*) => {
        Instruction {
            name: $name, bits: $bits, works_with: $works, lax_on_tcg: false, unsound_on: || false, run: || exec!($($asm)*)
        }
    };
}

const SVM: &[Bit] = &[(EXT1, 0, C, 2)];
const VMX: &[Bit] = &[(1, 0, C, 5)];
const SGX: &[Bit] = &[(7, 0, B, 2)];
const WAITPKG: &[Bit] = &[(7, 0, C, 5)];

const INSTRUCTIONS: &[Instruction] = &[
    instruction!("MONITOR", &[(1, 0, C, 3)], Some(0), "monitor", in("rax") AREA.get(), in("ecx") 0, in("edx") 0),
    instruction!("MWAIT", &[(1, 0, C, 3)], None, "mwait", in("eax") 0, in("ecx") 0),
    instruction!("MONITORX", &[(EXT1, 0, C, 29)], Some(0), ".byte 0x0f, 0x01, 0xfa", in("rax") AREA.get(), in("ecx") 0,
        in("edx") 0),
    instruction!("VMCALL", VMX, None, ".byte 0x0f, 0x01, 0xc1"),
    instruction!("VMXON", VMX, None, ".byte 0xf3, 0x0f, 0xc7, 0x37", in("rdi") AREA.get()),
    instruction!("VMFUNC", VMX, None, ".byte 0x0f, 0x01, 0xd4", in("eax") 0, in("ecx") 0),
    instruction!("GETSEC", &[(1, 0, C, 6)], None, ".byte 0x0f, 0x37", inout("eax") 0 => _, out("rdx") _),
    instruction!("VMRUN", SVM, None, "vmrun", in("rax") 0x1000),
    instruction!("VMMCALL", SVM, None, "vmmcall", inout("rax") 0u64 => _),
    instruction!("CLGI", SVM, None, "clgi"),
    instruction!("SKINIT", &[(EXT1, 0, C, 12)], None, "skinit", in("eax") 0),
    instruction!("ENCLS", SGX, None, ".byte 0x0f, 0x01, 0xcf", inout("rax") 0 => _, out("rdx") _),
    instruction!("ENCLU", SGX, None, ".byte 0x0f, 0x01, 0xd7", inout("rax") 0 => _, out("rdx") _),
    instruction!("PCONFIG", &[(7, 0, D, 18)], None, ".byte 0x0f, 0x01, 0xc5", inout("rax") !0 => _),
    instruction!("TPAUSE", WAITPKG, Some(0), lax, ".byte 0x66, 0x0f, 0xae, 0xf1", in("ecx") 0, in("eax") 0, in("edx") 0),
    instruction!("UMONITOR", WAITPKG, Some(0), lax, ".byte 0xf3, 0x0f, 0xae, 0xf0", in("rax") AREA.get()),
    instruction!("UMWAIT", WAITPKG, Some(0), lax, ".byte 0xf2, 0x0f, 0xae, 0xf1", in("ecx") 0, in("eax") 0, in("edx") 0),
    instruction!("RDPRU", &[(EXT8, 0, B, 4)], Some(0), ".byte 0x0f, 0x01, 0xfd", in("ecx") 0, out("eax") _, out("edx") _),
    instruction!("MCOMMIT", &[(EXT8, 0, B, 8)], None, ".byte 0xf3, 0x0f, 0x01, 0xfa",
        // What MONITORX wants, for those who take it for that.
        in("rax") AREA.get(), in("ecx") 0, in("edx") 0),
    instruction!("INVLPGB", &[(EXT8, 0, B, 3)], None, ".byte 0x0f, 0x01, 0xfe", in("rax") 0, in("ecx") 0, in("edx") 0),
    instruction!("SERIALIZE", &[(7, 0, D, 14)], Some(0), ".byte 0x0f, 0x01, 0xe8"),
    instruction!("MOVDIRI", &[(7, 0, C, 27)], Some(0), ".byte 0x0f, 0x38, 0xf9, 0x07", in("rdi") AREA.get(), in("eax") 0),
    instruction!("MOVDIR64B", &[(7, 0, C, 28)], Some(0), ".byte 0x66, 0x0f, 0x38, 0xf8, 0x07", in("rdi") AREA.get(),
        in("rax") AREA.get()),
    instruction!("ENQCMD", &[(7, 0, C, 29)], None, ".byte 0xf2, 0x0f, 0x38, 0xf8, 0x07", in("rdi") AREA.get(),
        in("rax") AREA.get()),
    instruction!("PTWRITE", &[(0x14, 0, B, 4)], Some(0), ".byte 0xf3, 0x0f, 0xae, 0xe0", in("eax") 0),
    instruction!("RDPID", &[(7, 0, C, 22)], Some(0), "rdpid rax", out("rax") _),
    instruction!("RDTSCP", &[(EXT1, 0, D, 27)], Some(0), "rdtscp", out("eax") _, out("ecx") _, out("edx") _),
    instruction!("INVPCID", &[(7, 0, B, 10)], Some(0), "invpcid {0}, [{1}]", in(reg) 2u64, in(reg) AREA.get()),
    instruction!("CLZERO", &[(EXT8, 0, B, 0)], Some(0), "clzero", in("rax") AREA.get()),
    instruction!("CLAC", &[(7, 0, B, 20)], Some(0), "clac"),
    instruction!("STAC", &[(7, 0, B, 20)], Some(0), "stac", "clac"),
    instruction!("XSAVE", &[(1, 0, C, 26)], Some(CR4_OSXSAVE), "xsave [rdi]", in("rdi") AREA.get(), in("eax") 1, in("edx") 0),
    instruction!("XSAVEOPT", &[(0xd, 1, A, 0)], Some(CR4_OSXSAVE), "xsaveopt [rdi]", in("rdi") AREA.get(), in("eax") 1,
        in("edx") 0),
    instruction!("XSAVEC", &[(0xd, 1, A, 1)], Some(CR4_OSXSAVE), unsound || platform::bochs_vmx() || platform::bochs_svm(),
        "xsavec [rdi]", in("rdi") AREA.get(), in("eax") 1, in("edx") 0),
    instruction!("XSAVES", &[(0xd, 1, A, 3)], Some(CR4_OSXSAVE), unsound platform::bochs_svm, "xsaves [rdi]",
        in("rdi") AREA.get(), in("eax") 1, in("edx") 0),
    instruction!("POPCNT", &[(1, 0, C, 23)], Some(0), "popcnt eax, ecx", out("eax") _),
    instruction!("MOVBE", &[(1, 0, C, 22)], Some(0), "movbe eax, [rdi]", in("rdi") AREA.get(), out("eax") _),
    instruction!("CMPXCHG16B", &[(1, 0, C, 13)], Some(0), "mov r8, rbx", "cmpxchg16b [rdi]", "mov rbx, r8",
        in("rdi") AREA.get(), out("rax") _, out("rdx") _, out("r8") _),
    instruction!("RDRAND", &[(1, 0, C, 30)], Some(0), "rdrand eax", out("eax") _),
    instruction!("RDSEED", &[(7, 0, B, 18)], Some(0), lax, "rdseed eax", out("eax") _),
    instruction!("ADCX", &[(7, 0, B, 19)], Some(0), "adcx eax, ecx", out("eax") _),
    instruction!("ANDN", &[(7, 0, B, 3)], Some(CR4_OSXSAVE), "andn eax, ecx, edx", out("eax") _),
    instruction!("PDEP", &[(7, 0, B, 8)], Some(CR4_OSXSAVE), "pdep eax, ecx, edx", out("eax") _),
    instruction!("CRC32", &[(1, 0, C, 20)], Some(0), "crc32 eax, ecx", inout("eax") 0 => _),
    instruction!("AESENC", &[(1, 0, C, 25)], Some(CR4_SSE), "aesenc xmm0, xmm0"),
    instruction!("PCLMULQDQ", &[(1, 0, C, 1)], Some(CR4_SSE), "pclmulqdq xmm0, xmm0, 0"),
    instruction!("SHA1NEXTE", &[(7, 0, B, 29)], Some(CR4_SSE), "sha1nexte xmm0, xmm0"),
    instruction!("GF2P8MULB", &[(7, 0, C, 8)], Some(CR4_SSE), "gf2p8mulb xmm0, xmm0"),
    instruction!("EXTRQ", &[(EXT1, 0, C, 6)], Some(CR4_SSE), "extrq xmm0, xmm0"),
    instruction!("PFADD", &[(EXT1, 0, D, 31)], Some(0), ".byte 0x0f, 0x0f, 0xc1, 0x9e", "emms"),
    instruction!("LAHF", &[(EXT1, 0, C, 0)], Some(0), "lahf", out("eax") _),
];

pub(crate) fn run() {
    for instruction in INSTRUCTIONS {
        let mut name = [0u8; 40];
        case(join(&mut name, "instruction.", instruction.name), |t| one(t, instruction));
    }
    switches();
    case("instruction.wbnoinvd_always_works", |t| {
        // Without the feature the prefix is ignored: it is WBINVD (APM vol. 3, WBNOINVD).
        t.works("WBNOINVD", catch(|| exec!(".byte 0xf3, 0x0f, 0x09")));
    });
}

fn join<'a>(buffer: &'a mut [u8; 40], first: &str, second: &str) -> &'a str {
    let len = first.len() + second.len();
    buffer[..first.len()].copy_from_slice(first.as_bytes());
    buffer[first.len()..len].copy_from_slice(second.as_bytes());
    buffer[..len].make_ascii_lowercase();
    core::str::from_utf8(&buffer[..len]).unwrap_or("instruction")
}

/// SSE and x87 instructions can be executed.
fn vectors_on() {
    set_cr0(cr0() & !0xc | 2);
    set_cr4(cr4() | CR4_SSE);
}

fn one(t: &mut Case, instruction: &Instruction) {
    vectors_on();
    if any(instruction.bits) {
        let Some(cr4_bits) = instruction.works_with else {
            return t.skip("offered, and trying it would change the machine");
        };
        t.works("setting its CR4 bits", catch(|| set_cr4(cr4() | cr4_bits)));
        t.works(instruction.name, catch(instruction.run));
    } else {
        if instruction.lax_on_tcg && t.skip_on_tcg("it executes this whatever CPUID says") {
            return;
        }
        if (instruction.unsound_on)() && bit((1, 0, C, 26)) {
            return t.skip("Bochs's compacted format is wrong, so it is hidden, but executes");
        }
        if bit((1, 0, C, 26)) {
            // What needs CR4.OSXSAVE must not fault for want of it.
            set_cr4(cr4() | CR4_OSXSAVE);
        }
        t.faults(instruction.name, catch(instruction.run), UD, None);
    }
}

/// Instructions that a control register or MSR turns on and off.
fn switches() {
    case("switch.rdpkru_follows_pke", |t| {
        let rdpkru = || exec!("rdpkru", in("ecx") 0, out("eax") _, out("edx") _);
        t.faults("RDPKRU with PKE clear", catch(rdpkru), UD, None);
        if bit((7, 0, C, 3)) {
            set_cr4(cr4() | CR4_PKE);
            t.works("RDPKRU with PKE set", catch(rdpkru));
        }
    });
    case("switch.rdfsbase_follows_fsgsbase", |t| {
        let rdfsbase = || exec!("rdfsbase rax", out("rax") _);
        set_cr4(cr4() & !CR4_FSGSBASE);
        t.faults("RDFSBASE with FSGSBASE clear", catch(rdfsbase), UD, None);
        // rdfsbase rax; hlt
        const USER: &[u8] = &[0xf3, 0x48, 0x0f, 0xae, 0xc0, 0xf4];
        t.faults("RDFSBASE in ring 3", Err::<(), _>(user::run(USER, Start::default()).0), UD, None);
        if bit((7, 0, B, 0)) {
            set_cr4(cr4() | CR4_FSGSBASE);
            t.works("RDFSBASE with FSGSBASE set", catch(rdfsbase));
            let fault = user::run(USER, Start::default()).0;
            t.faults("HLT after RDFSBASE in ring 3", Err::<(), _>(fault), GP, Some(0));
        }
    });
    case("switch.syscall_follows_sce", |t| {
        wrmsr(MSR_EFER, rdmsr(MSR_EFER) & !EFER_SCE);
        let (fault, _) = user::run(&[0x0f, 0x05], Start::default());
        t.faults("SYSCALL with SCE clear", Err::<(), _>(fault), UD, None);
        t.faults("SYSRET with SCE clear", catch(|| exec!(".byte 0x48, 0x0f, 0x07", out("rcx") _)), UD, None);
        if bit((EXT1, 0, D, 11)) {
            // The target's first instruction, UD2, runs in ring 0.
            let target = AREA.addr() + 64;
            poke(target, 0x0b0fu16);
            wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
            let (star, lstar) = (rdmsr(MSR_STAR), rdmsr(MSR_LSTAR));
            wrmsr(MSR_STAR, u64::from(guests::machine::CODE64) << 32);
            wrmsr(MSR_LSTAR, target);
            let (fault, _) = user::run(&[0x0f, 0x05], Start::default());
            wrmsr(MSR_STAR, star);
            wrmsr(MSR_LSTAR, lstar);
            let fault = t.faults("UD2 behind SYSCALL", Err::<(), _>(fault), UD, None);
            t.eq("its RIP", fault.rip, target);
            t.eq("its CS", fault.cs, u64::from(guests::machine::CODE64));
        }
    });
    case("switch.swapgs_is_ring_0s", |t| {
        t.works("SWAPGS", catch(|| exec!("swapgs", "swapgs")));
        let (fault, _) = user::run(&[0x0f, 0x01, 0xf8], Start::default());
        t.faults("SWAPGS in ring 3", Err::<(), _>(fault), GP, Some(0));
    });
    case("switch.xgetbv_follows_osxsave", |t| {
        set_cr4(cr4() & !CR4_OSXSAVE);
        t.faults("XGETBV with OSXSAVE clear", catch(xgetbv), UD, None);
        if bit((1, 0, C, 26)) {
            set_cr4(cr4() | CR4_OSXSAVE);
            t.works("XGETBV with OSXSAVE set", catch(xgetbv));
        }
    });
    case("switch.sse_follows_osfxsr", |t| {
        set_cr4(cr4() & !CR4_SSE);
        t.faults("an SSE instruction with OSFXSR clear", catch(|| exec!("xorps xmm0, xmm0")), UD, None);
        vectors_on();
        t.works("with OSFXSR set", catch(|| exec!("xorps xmm0, xmm0")));
    });
    case("switch.avx_follows_xcr0", |t| {
        vectors_on();
        let avx = || exec!("vxorps ymm0, ymm0, ymm0");
        t.faults("an AVX instruction with OSXSAVE clear", catch(avx), UD, None);
        if !bit((1, 0, C, 26)) {
            return;
        }
        set_cr4(cr4() | CR4_OSXSAVE);
        xsetbv(0, 3);
        t.faults("with XCR0.AVX clear", catch(avx), UD, None);
        if bit((1, 0, C, 28)) {
            xsetbv(0, 7);
            t.works("with XCR0.AVX set", catch(avx));
        }
        xsetbv(0, 1);
    });
    case("switch.avx512_follows_xcr0", |t| {
        // vpxord zmm0, zmm0, zmm0
        let avx512 = || exec!(".byte 0x62, 0xf1, 0x7d, 0x48, 0xef, 0xc0");
        vectors_on();
        t.faults("an AVX-512 instruction with OSXSAVE clear", catch(avx512), UD, None);
        if !bit((1, 0, C, 28)) {
            return;
        }
        set_cr4(cr4() | CR4_OSXSAVE);
        xsetbv(0, 7);
        t.faults("with XCR0's AVX-512 bits clear", catch(avx512), UD, None);
        if bit((7, 0, B, 16)) {
            xsetbv(0, 0xe7);
            t.works("with them set", catch(avx512));
        }
        xsetbv(0, 1);
    });
    case("switch.sgdt_follows_umip", |t| {
        // sub rsp, 16; sgdt [rsp]; hlt, and the same with SMSW to a register
        const SGDT: &[u8] = &[0x48, 0x83, 0xec, 0x10, 0x0f, 0x01, 0x04, 0x24, 0xf4];
        const SMSW: &[u8] = &[0x0f, 0x01, 0xe0, 0xf4];
        for code in [SGDT, SMSW] {
            set_cr4(cr4() & !CR4_UMIP);
            let (fault, _) = user::run(code, Start::default());
            t.faults("HLT behind SGDT or SMSW in ring 3", Err::<(), _>(fault), GP, Some(0));
            t.yes("it was reached", fault.rip == user::CODE + code.len() as u64 - 1);
            if bit((7, 0, C, 2)) {
                set_cr4(cr4() | CR4_UMIP);
                let (fault, _) = user::run(code, Start::default());
                t.faults("SGDT or SMSW with UMIP", Err::<(), _>(fault), GP, Some(0));
                t.yes("it was not passed", fault.rip < user::CODE + code.len() as u64 - 1);
            }
        }
    });
    case("switch.rdtsc_follows_tsd", |t| {
        // rdtsc; hlt
        const CODE: &[u8] = &[0x0f, 0x31, 0xf4];
        for (tsd, reached) in [(0, 2), (4, 0)] {
            set_cr4(cr4() & !4 | tsd);
            let (fault, _) = user::run(CODE, Start::default());
            t.faults("RDTSC or the HLT behind it", Err::<(), _>(fault), GP, Some(0));
            t.eq("where", fault.rip - user::CODE, reached as u64);
        }
    });
    case("switch.rdpmc_needs_counters", |t| {
        let rdpmc = catch(|| exec!("rdpmc", in("ecx") 0, out("eax") _, out("edx") _));
        if platform::umbra() {
            t.check(
                rdpmc.is_err_and(|fault| fault.vector == GP || fault.vector == UD),
                format_args!("#GP or #UD where no counter is offered, got {rdpmc:?}"),
            );
        } else {
            t.skip("this is Umbra's policy");
        }
    });
}
