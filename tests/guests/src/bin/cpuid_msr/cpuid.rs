//! Is CPUID coherent with itself and with the machine?
use guests::dev::{fw_cfg, lapic};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::{exec, platform};

pub(crate) fn run() {
    case("cpuid.vendor", vendor);
    case("cpuid.max_leaves", |t| {
        t.within("highest basic leaf", cpuid(0, 0).eax.into(), 1, 0xff);
        t.within("highest extended leaf", cpuid(0x8000_0000, 0).eax.into(), 0x8000_0008, 0x8000_00ff);
    });
    case("cpuid.brand_string", brand_string);
    case("cpuid.family", |t| {
        t.yes("a family of at least 6", cpuid(1, 0).eax >> 8 & 15 >= 6);
    });
    case("cpuid.apic_id", |t| {
        t.eq("initial APIC id", cpuid(1, 0).ebx >> 24, lapic::id());
    });
    case("cpuid.topology_leaf", topology_leaf);
    case("cpuid.logical_count", logical_count);
    case("cpuid.amd_core_count", amd_core_count);
    case("cpuid.baseline_features", |t| {
        // What the x86-64 baseline needs: FPU, TSC, MSR, PAE, CX8, APIC, CMOV, FXSR, SSE, SSE2; SYSCALL, NX, LM.
        let (basic, extended) = (cpuid(1, 0).edx, cpuid(0x8000_0001, 0).edx);
        t.masked("leaf 1 EDX", basic, 0x0700_8371u32, 0x0700_8371);
        t.masked("leaf 8000_0001 EDX", extended, 0x2010_0800u32, 0x2010_0800);
    });
    case("cpuid.amd_mirrors_leaf_1", |t| {
        let (basic, extended) = (cpuid(1, 0), cpuid(0x8000_0001, 0));
        if basic_vendor() != *b"AuthenticAMD" {
            return t.skip("the vendor is not AMD");
        }
        // AMD APM vol. 3, E.4.2: these bits repeat leaf 1's.
        t.masked("leaf 8000_0001 EDX", extended.edx, basic.edx, 0x0183_f3ff);
        t.eq("leaf 8000_0001 EAX", extended.eax, basic.eax);
    });
    case("cpuid.osxsave_follows_cr4", |t| {
        if !has(1, 0, |r| r.ecx, 26) {
            return t.skip("no XSAVE");
        }
        let seen = |bit: u64| {
            set_cr4(cr4() & !CR4_OSXSAVE | bit);
            cpuid(1, 0).ecx >> 27 & 1
        };
        t.eq("OSXSAVE with CR4.OSXSAVE clear", seen(0), 0u32);
        t.eq("OSXSAVE with CR4.OSXSAVE set", seen(CR4_OSXSAVE), 1u32);
        t.eq("OSXSAVE after clearing again", seen(0), 0u32);
    });
    case("cpuid.ospke_follows_cr4", |t| {
        if !has(7, 0, |r| r.ecx, 3) {
            return t.skip("no protection keys");
        }
        let seen = |bit: u64| {
            set_cr4(cr4() & !CR4_PKE | bit);
            cpuid(7, 0).ecx >> 4 & 1
        };
        t.eq("OSPKE with CR4.PKE clear", seen(0), 0u32);
        t.eq("OSPKE with CR4.PKE set", seen(CR4_PKE), 1u32);
        t.eq("OSPKE after clearing again", seen(0), 0u32);
    });
    case("cpuid.apic_present", |t| t.yes("leaf 1 EDX bit 9 set", has(1, 0, |r| r.edx, 9)));
    case("cpuid.physical_bits", |t| {
        let leaf = cpuid(0x8000_0008, 0).eax;
        t.within("physical address bits", u64::from(leaf & 0xff), 32, 52);
        let linear = if has(7, 0, |r| r.ecx, 16) { 57 } else { 48 };
        t.eq("linear address bits", leaf >> 8 & 0xff, linear as u32);
    });
    case("cpuid.clflush_line", |t| t.eq("line size in bytes", (cpuid(1, 0).ebx >> 8 & 0xff) * 8, 64u32));
    case("cpuid.beyond_basic_max", |t| {
        // Zeros on AMD; Intel repeats its highest basic leaf. Intel SDM vol. 2, CPUID.
        let max = cpuid(0, 0).eax;
        let got = cpuid(max + 0x100, 0);
        let zero = Cpuid { eax: 0, ebx: 0, ecx: 0, edx: 0 };
        let last = cpuid(max, 0);
        t.check(got == zero || got == last, format_args!("zeros or {last:x?}, got {got:x?}"));
    });
    case("cpuid.beyond_extended_max", |t| {
        let got = cpuid(cpuid(0x8000_0000, 0).eax + 0x1000, 0);
        let last = cpuid(cpuid(0, 0).eax, 0);
        let zero = Cpuid { eax: 0, ebx: 0, ecx: 0, edx: 0 };
        t.check(got == zero || got == last, format_args!("zeros or {last:x?}, got {got:x?}"));
    });
    case("cpuid.hypervisor_leaf", |t| {
        if cpuid(1, 0).ecx >> 31 == 0 {
            return t.skip("no hypervisor shows itself");
        }
        let name = platform::signature();
        t.check(
            name == platform::UMBRA_SIGNATURE || name == *b"TCGTCGTCGTCG" || name.starts_with(b"KVMKVMKVM"),
            format_args!("a known signature, got {name:?}"),
        );
        t.within("highest hypervisor leaf", cpuid(0x4000_0000, 0).eax.into(), 0x4000_0000, 0x4000_ffff);
    });
    case("cpuid.registers", |t| {
        // CPUID writes 32-bit registers, so the high halves are zero; it leaves all others alone.
        let (rax, rbx, rcx, rdx, rsi, r15): (u64, u64, u64, u64, u64, u64);
        exec!("mov r8, rbx", "mov rbx, -1", "mov rax, 0xffffffff00000001", "mov rcx, 0xffffffff00000000",
            "mov rdx, -1", "mov rsi, 0x1122334455667788", "mov r15, -2", "cpuid", "xchg rbx, r8",
            out("rax") rax, out("r8") rbx, out("rcx") rcx, out("rdx") rdx, out("rsi") rsi, out("r15") r15);
        t.eq("high halves", (rax | rbx | rcx | rdx) >> 32, 0u64);
        t.eq("leaf 1 EAX", rax, cpuid(1, 0).eax);
        t.eq("RSI", rsi, 0x1122_3344_5566_7788u64);
        t.eq("R15", r15, !1u64);
    });
    case("cpuid.flags_unchanged", |t| {
        let (before, after): (u64, u64);
        exec!("mov r8, rbx", "stc", "std", "pushfq", "cpuid", "pushfq", "cld", "pop r9", "pop r10", "mov rbx, r8",
            inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _, out("r8") _, out("r9") after, out("r10") before);
        t.eq("RFLAGS", after, before);
    });
    case("cpuid.stable", |t| {
        let last = cpuid(0, 0).eax;
        for leaf in 0..=last {
            let first = cpuid(leaf, 0);
            for _ in 0..20 {
                let again = cpuid(leaf, 0);
                t.check(again == first, format_args!("leaf {leaf:#x} {first:x?}, got {again:x?}"));
            }
        }
    });
    case("cpuid.prefixed", |t| {
        // The instruction is longer with prefixes; the next one must still be found.
        let mark: u64;
        exec!("mov r8, rbx", "xor r9d, r9d", ".byte 0x66, 0x2e, 0x48, 0x0f, 0xa2", "inc r9", ".byte 0xf3, 0x0f, 0xa2",
            "inc r9", "mov rbx, r8",
            inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _, out("r8") _, out("r9") mark);
        t.eq("instructions after it", mark, 2u64);
    });
    case("cpuid.across_page_boundary", across_page_boundary);
    case("cpuid.hidden_under_umbra", hidden_under_umbra);
    case("cpuid.invariant_tsc", |t| {
        if !platform::umbra() {
            return t.skip("only Umbra promises it");
        }
        t.yes("leaf 8000_0007 EDX bit 8 set", has(0x8000_0007, 0, |r| r.edx, 8));
    });
    case("cpuid.arat", |t| {
        if !platform::umbra() {
            return t.skip("only Umbra promises it");
        }
        t.yes("leaf 6 EAX bit 2 set: the local APIC timer always runs", has(6, 0, |r| r.eax, 2));
    });
}

fn basic_vendor() -> [u8; 12] {
    vendor_of(0)
}

fn vendor_of(leaf: u32) -> [u8; 12] {
    let got = cpuid(leaf, 0);
    let words = [got.ebx, got.edx, got.ecx];
    core::array::from_fn(|index| words[index / 4].to_le_bytes()[index % 4])
}

fn vendor(t: &mut Case) {
    let vendor = basic_vendor();
    t.check(vendor.iter().all(u8::is_ascii_alphanumeric), format_args!("twelve letters, got {vendor:?}"));
    if vendor == *b"AuthenticAMD" {
        let extended = vendor_of(0x8000_0000);
        t.check(extended == vendor, format_args!("the same vendor in 8000_0000, got {extended:?}"));
    }
}

fn brand_string(t: &mut Case) {
    if cpuid(0x8000_0000, 0).eax < 0x8000_0004 {
        return t.skip("no brand string");
    }
    let mut text = [0u8; 48];
    for leaf in 0..3 {
        let got = cpuid(0x8000_0002 + leaf, 0);
        for (word, value) in [got.eax, got.ebx, got.ecx, got.edx].into_iter().enumerate() {
            let at = leaf as usize * 16 + word * 4;
            text[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    t.yes("a brand string that is not empty", end > 0);
    t.yes("printable characters", text[..end].iter().all(|byte| (0x20..0x7f).contains(byte)));
    t.yes("zeros after its end", text[end..].iter().all(|&byte| byte == 0));
}

fn topology_leaf(t: &mut Case) {
    if cpuid(0, 0).eax < 0xb || cpuid(0xb, 0).ebx == 0 {
        return t.skip("no leaf 0Bh");
    }
    // Intel SDM vol. 2, CPUID leaf 0Bh: level 0 is SMT, level 1 is core, then an invalid level; shifts only grow.
    let mut shift = 0;
    for level in 0..8 {
        let got = cpuid(0xb, level);
        t.eq("level number in ECX", got.ecx & 0xff, level);
        t.eq("x2APIC id in EDX", got.edx, lapic::id());
        let kind = got.ecx >> 8 & 0xff;
        if kind == 0 {
            t.yes("at least one level before the invalid one", level > 0);
            return;
        }
        t.check(got.eax & 31 >= shift, format_args!("a shift of at least {shift}, got {}", got.eax & 31));
        shift = got.eax & 31;
        t.yes("logical processors at this level", got.ebx & 0xffff != 0);
    }
    t.yes("an invalid level that ends the list", false);
}

fn logical_count(t: &mut Case) {
    if !fw_cfg::present() {
        return t.skip("no fw_cfg to compare with");
    }
    let cpus = fw_cfg::cpus();
    let leaf = cpuid(1, 0);
    let htt = leaf.edx >> 28 & 1 != 0;
    if cpus == 1 {
        t.check(!htt || leaf.ebx >> 16 & 0xff >= 1, format_args!("a count of at least 1 with HTT, got 0"));
    } else {
        t.yes("HTT set with more than one CPU", htt);
        t.within("logical processors", u64::from(leaf.ebx >> 16 & 0xff), u64::from(cpus), 255);
    }
}

fn amd_core_count(t: &mut Case) {
    if basic_vendor() != *b"AuthenticAMD" || !fw_cfg::present() {
        return t.skip("not AMD, or no fw_cfg to compare with");
    }
    // AMD APM vol. 3, E.4.7: NC is the number of cores minus 1.
    t.eq("cores", (cpuid(0x8000_0008, 0).ecx & 0xff) + 1, u32::from(fw_cfg::cpus()));
}

fn across_page_boundary(t: &mut Case) {
    use guests::frames::PAGE;
    use guests::paging::{Space, P, PLAYGROUND, W};
    let space = Space::current();
    space.map_new(PLAYGROUND, P | W);
    space.map_new(PLAYGROUND + PAGE, P | W);
    // CPUID in the last byte of one page and the first of the next, then RET.
    let code = PLAYGROUND + PAGE - 1;
    for (offset, byte) in [0x0f, 0xa2, 0xc3].into_iter().enumerate() {
        poke::<u8>(code + offset as u64, byte);
    }
    let eax: u32;
    exec!("mov r8, rbx", "call {code}", "mov rbx, r8", code = in(reg) code,
        inout("eax") 1 => eax, inout("ecx") 0 => _, out("edx") _, out("r8") _);
    t.eq("leaf 1 EAX", eax, cpuid(1, 0).eax);
}

fn hidden_under_umbra(t: &mut Case) {
    if !platform::umbra() {
        return t.skip("this is Umbra's policy");
    }
    t.yes("MONITOR hidden", !has(1, 0, |r| r.ecx, 3));
    t.yes("VMX hidden", !has(1, 0, |r| r.ecx, 5));
    t.yes("SMX hidden", !has(1, 0, |r| r.ecx, 6));
    t.yes("SVM hidden", !has(0x8000_0001, 0, |r| r.ecx, 2));
    t.yes("SKINIT hidden", !has(0x8000_0001, 0, |r| r.ecx, 12));
    t.yes("performance counter extensions hidden", !has(0x8000_0001, 0, |r| r.ecx, 23));
    let pmu = if cpuid(0, 0).eax >= 10 { cpuid(10, 0).eax & 0xff } else { 0 };
    t.eq("architectural PMU version", pmu, 0u32);
    // Beyond the highest leaf the vendors answer differently; the guest `coherence` holds that against the manuals.
    if cpuid(0x8000_0000, 0).eax >= 0x8000_000a {
        let svm = cpuid(0x8000_000a, 0);
        t.eq("SVM leaf", svm.eax | svm.ebx | svm.edx, 0u32);
    }
}
