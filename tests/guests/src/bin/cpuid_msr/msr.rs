//! Model-specific registers: what is modelled reads and writes as documented, all else is #GP.
use guests::dev::lapic;
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::GP;
use guests::{exec, machine, platform};

const NONCANONICAL: u64 = 0x8000_0000_0000;

pub(crate) fn run() {
    efer();
    pat();
    apic_base();
    plain_registers();
    tsc();
    mtrr();
    machine_check();
    unknown();
    registers();
    exit_counter();
}

fn restores(msr: u32, run: impl FnOnce(u64)) {
    let before = rdmsr(msr);
    run(before);
    wrmsr(msr, before);
}

fn efer() {
    case("msr.efer_value", |t| {
        let efer = rdmsr(MSR_EFER);
        t.masked("LME and LMA", efer, 0x500u64, 0x500);
        if platform::umbra() {
            t.eq("SVME, which the host needs set and the guest must not see", efer >> 12 & 1, 0u64);
        }
    });
    case("msr.efer_sce_toggles", |t| {
        restores(MSR_EFER, |efer| {
            wrmsr(MSR_EFER, efer | EFER_SCE);
            t.eq("EFER with SCE", rdmsr(MSR_EFER), efer | EFER_SCE);
            wrmsr(MSR_EFER, efer & !EFER_SCE);
            t.eq("EFER without SCE", rdmsr(MSR_EFER), efer & !EFER_SCE);
        });
    });
    case("msr.efer_nxe_toggles", |t| {
        restores(MSR_EFER, |efer| {
            wrmsr(MSR_EFER, efer & !EFER_NXE);
            t.eq("EFER without NXE", rdmsr(MSR_EFER), efer & !EFER_NXE);
            wrmsr(MSR_EFER, efer | EFER_NXE);
            t.eq("EFER with NXE", rdmsr(MSR_EFER), efer | EFER_NXE);
        });
    });
    case("msr.efer_reserved_bits_fault", |t| {
        if t.skip_on_bare_tcg("EFER's reserved bits are dropped, not refused") {
            return;
        }
        let efer = rdmsr(MSR_EFER);
        for bit in [1u32, 2, 5, 7, 9, 16, 22, 31, 32, 47, 63] {
            let got = try_wrmsr(MSR_EFER, efer | 1 << bit);
            t.check(got.is_err_and(|f| f.vector == GP), format_args!("#GP for EFER bit {bit}, got {got:?}"));
        }
        t.eq("EFER afterwards", rdmsr(MSR_EFER), efer);
    });
    case("msr.efer_lme_change_while_paging", |t| {
        if t.skip_on_bare_tcg("LME can be cleared while paging is on") {
            return;
        }
        let efer = rdmsr(MSR_EFER);
        t.faults("clearing LME", try_wrmsr(MSR_EFER, efer & !0x100), GP, Some(0));
        t.eq("EFER afterwards", rdmsr(MSR_EFER), efer);
    });
    case("msr.efer_svme_without_svm", |t| {
        if has(0x8000_0001, 0, |r| r.ecx, 2) {
            return t.skip("CPUID offers SVM");
        }
        t.faults("setting SVME", try_wrmsr(MSR_EFER, rdmsr(MSR_EFER) | 1 << 12), GP, Some(0));
    });
}

fn pat() {
    case("msr.pat_at_reset", |t| {
        // AMD APM vol. 2, 7.8.1. Firmware leaves it alone.
        t.eq("PAT", rdmsr(MSR_PAT), 0x0007_0406_0007_0406u64);
    });
    case("msr.pat_holds_valid_types", |t| {
        restores(MSR_PAT, |_| {
            for value in [
                0x0706_0504_0100_0706u64,
                0x0007_0406_0007_0406,
                0x0001_0406_0105_0406,
                0x0606_0606_0606_0606,
            ] {
                wrmsr(MSR_PAT, value);
                t.eq("PAT", rdmsr(MSR_PAT), value);
            }
        });
    });
    case("msr.pat_refuses_bad_types", |t| {
        if t.skip_on_bare_tcg("any PAT value is taken") {
            return;
        }
        let before = rdmsr(MSR_PAT);
        for index in 0..8 {
            for bad in [2u64, 3, 8, 0x10, 0xff] {
                let value = before & !(0xff << (8 * index)) | bad << (8 * index);
                let got = try_wrmsr(MSR_PAT, value);
                t.check(
                    got.is_err_and(|f| f.vector == GP),
                    format_args!("#GP for PAT {value:#x}, got {got:?}"),
                );
            }
        }
        t.eq("PAT afterwards", rdmsr(MSR_PAT), before);
    });
}

fn apic_base() {
    case("msr.apic_base_value", |t| {
        let base = rdmsr(MSR_APIC_BASE);
        t.eq("address", base & !0xfff, lapic::BASE);
        t.eq("BSP and EN", base & 0xb00, 0x900u64);
    });
    case("msr.apic_base_same_value", |t| {
        let base = rdmsr(MSR_APIC_BASE);
        t.works("writing the same value", try_wrmsr(MSR_APIC_BASE, base));
        t.eq("IA32_APIC_BASE", rdmsr(MSR_APIC_BASE), base);
    });
    case("msr.apic_base_reserved_bits_fault", |t| {
        if t.skip_on_bare_tcg("reserved bits of IA32_APIC_BASE are dropped") {
            return;
        }
        let base = rdmsr(MSR_APIC_BASE);
        for bit in [0u32, 1, 7, 9, 52, 63] {
            let got = try_wrmsr(MSR_APIC_BASE, base | 1 << bit);
            t.check(got.is_err_and(|f| f.vector == GP), format_args!("#GP for bit {bit}, got {got:?}"));
        }
        let wide = machine::physical_bits();
        if wide < 52 {
            t.faults("an address too wide", try_wrmsr(MSR_APIC_BASE, base | 1 << wide), GP, Some(0));
        }
        t.eq("IA32_APIC_BASE afterwards", rdmsr(MSR_APIC_BASE), base);
    });
    case("msr.apic_base_x2apic_without_enable", |t| {
        if t.skip_on_bare_tcg("the mode bits of IA32_APIC_BASE are not checked") {
            return;
        }
        let base = rdmsr(MSR_APIC_BASE);
        t.faults("EXTD without EN", try_wrmsr(MSR_APIC_BASE, base & !0x800 | 0x400), GP, Some(0));
        if !lapic::x2apic_offered() {
            t.faults("EXTD that CPUID does not offer", try_wrmsr(MSR_APIC_BASE, base | 0x400), GP, Some(0));
        }
    });
    case("msr.x2apic_registers_in_xapic_mode", |t| {
        if t.skip_on_bare_tcg("x2APIC registers read as 0 in xAPIC mode") {
            return;
        }
        for msr in [0x802, 0x803, 0x808, 0x80f, 0x830, 0x838] {
            let got = try_rdmsr(msr);
            t.check(got.is_err_and(|f| f.vector == GP), format_args!("#GP for MSR {msr:#x}, got {got:?}"));
        }
        t.faults("a write of the EOI register", try_wrmsr(0x80b, 0), GP, Some(0));
    });
}

fn plain_registers() {
    for (name, msr) in [
        ("msr.lstar", MSR_LSTAR),
        ("msr.cstar", 0xc000_0083),
        ("msr.kernel_gs_base", MSR_KERNEL_GS_BASE),
        ("msr.fs_base", MSR_FS_BASE),
        ("msr.gs_base", MSR_GS_BASE),
        ("msr.star", MSR_STAR),
        ("msr.sysenter_esp", 0x175),
        ("msr.sysenter_eip", 0x176),
    ] {
        case(name, |t| {
            restores(msr, |_| {
                for value in [0u64, 0x7fff_ffff_f000, 0xffff_8000_0000_0000, !0] {
                    wrmsr(msr, value);
                    t.eq("the value written", rdmsr(msr), value);
                }
            });
        });
    }
    case("msr.sfmask", |t| {
        restores(MSR_SFMASK, |_| {
            wrmsr(MSR_SFMASK, 0x4_7700);
            t.eq("SFMASK", rdmsr(MSR_SFMASK), 0x4_7700u64);
        });
    });
    case("msr.sysenter_cs", |t| {
        restores(0x174, |_| {
            wrmsr(0x174, 0x10);
            t.eq("SYSENTER_CS", rdmsr(0x174), 0x10u64);
        });
    });
    for (name, msr) in [
        ("msr.lstar_noncanonical", MSR_LSTAR),
        ("msr.cstar_noncanonical", 0xc000_0083),
        ("msr.fs_base_noncanonical", MSR_FS_BASE),
        ("msr.gs_base_noncanonical", MSR_GS_BASE),
        ("msr.kernel_gs_base_noncanonical", MSR_KERNEL_GS_BASE),
    ] {
        case(name, |t| {
            // Umbra lets the processor execute these, so the processor's error shows through.
            if !t.skip_on_tcg("bases need not be canonical") {
                t.faults("the write", try_wrmsr(msr, NONCANONICAL), GP, Some(0));
            }
        });
    }
    case("msr.swapgs", |t| {
        let (gs, kernel) = (rdmsr(MSR_GS_BASE), rdmsr(MSR_KERNEL_GS_BASE));
        wrmsr(MSR_GS_BASE, 0x1111);
        wrmsr(MSR_KERNEL_GS_BASE, 0x2222);
        exec!("swapgs");
        t.eq("GS_BASE", rdmsr(MSR_GS_BASE), 0x2222u64);
        t.eq("KERNEL_GS_BASE", rdmsr(MSR_KERNEL_GS_BASE), 0x1111u64);
        wrmsr(MSR_GS_BASE, gs);
        wrmsr(MSR_KERNEL_GS_BASE, kernel);
    });
    case("msr.bases_survive_exits", |t| {
        let (fs, gs, kernel) = (rdmsr(MSR_FS_BASE), rdmsr(MSR_GS_BASE), rdmsr(MSR_KERNEL_GS_BASE));
        let values =
            [(MSR_FS_BASE, 0xaaaa_0000u64), (MSR_GS_BASE, 0xbbbb_0000), (MSR_KERNEL_GS_BASE, 0xcccc_0000)];
        values.iter().for_each(|&(msr, value)| wrmsr(msr, value));
        for _ in 0..50 {
            cpuid(0, 0);
            inb(0x21);
        }
        values.iter().for_each(|&(msr, value)| t.eq("the base", rdmsr(msr), value));
        wrmsr(MSR_FS_BASE, fs);
        wrmsr(MSR_GS_BASE, gs);
        wrmsr(MSR_KERNEL_GS_BASE, kernel);
    });
}

fn tsc() {
    case("tsc.monotonic", |t| {
        let mut last = rdtsc();
        for _ in 0..10_000 {
            let now = rdtsc();
            t.check(now >= last, format_args!("at least {last}, got {now}"));
            last = now;
        }
    });
    case("tsc.monotonic_over_exits", |t| {
        let mut last = rdtsc();
        for _ in 0..500 {
            cpuid(0, 0);
            let now = rdtsc();
            t.check(now > last, format_args!("more than {last}, got {now}"));
            last = now;
        }
    });
    case("tsc.rdmsr_agrees_with_rdtsc", |t| {
        if t.skip_on_bare_tcg("RDMSR of the TSC reads 0") {
            return;
        }
        for _ in 0..50 {
            let before = rdtsc();
            let middle = rdmsr(MSR_TSC);
            let after = rdtsc();
            t.within("RDMSR between two RDTSC", middle, before, after);
        }
    });
    case("tsc.high_halves_zero", |t| {
        let (rax, rdx): (u64, u64);
        exec!("rdtsc", inout("rax") !0u64 => rax, inout("rdx") !0u64 => rdx);
        t.eq("high halves of RAX and RDX", (rax | rdx) >> 32, 0u64);
    });
    case("tsc.write_moves_it", |t| {
        if t.skip_on_bare_tcg("writes of the TSC are dropped") {
            return;
        }
        let adjust = try_rdmsr(MSR_TSC_ADJUST);
        let before = rdtsc();
        wrmsr(MSR_TSC, before + (1 << 40));
        let after = rdtsc();
        t.within("the TSC after adding 1 << 40", after, before + (1 << 40), before + (1 << 40) + (1 << 34));
        if let (Ok(old), Ok(new)) = (adjust, try_rdmsr(MSR_TSC_ADJUST)) {
            // Intel SDM vol. 3, 18.17.3: a write of the TSC adds the same to TSC_ADJUST.
            t.within("TSC_ADJUST", new.wrapping_sub(old), (1 << 40) - (1 << 34), 1 << 40);
            wrmsr(MSR_TSC_ADJUST, old);
            t.within("the TSC with the old TSC_ADJUST", rdtsc(), before, before + (1 << 34));
        } else {
            wrmsr(MSR_TSC, rdtsc() - (1 << 40));
        }
    });
    case("tsc.adjust_moves_it", |t| {
        if !has(7, 0, |r| r.ebx, 1) {
            return t.skip("no TSC_ADJUST");
        }
        let old = rdmsr(MSR_TSC_ADJUST);
        let before = rdtsc();
        wrmsr(MSR_TSC_ADJUST, old + (1 << 42));
        t.eq("TSC_ADJUST", rdmsr(MSR_TSC_ADJUST), old + (1 << 42));
        t.within("the TSC", rdtsc(), before + (1 << 42), before + (1 << 42) + (1 << 34));
        wrmsr(MSR_TSC_ADJUST, old);
        t.within("the TSC afterwards", rdtsc(), before, before + (1 << 34));
    });
    case("tsc.adjust_negative", |t| {
        if !has(7, 0, |r| r.ebx, 1) {
            return t.skip("no TSC_ADJUST");
        }
        let old = rdmsr(MSR_TSC_ADJUST);
        let before = rdtsc();
        wrmsr(MSR_TSC_ADJUST, old.wrapping_sub(before / 2));
        t.yes("an earlier TSC", rdtsc() < before);
        wrmsr(MSR_TSC_ADJUST, old);
        t.yes("the old TSC again", rdtsc() >= before);
    });
    case("tsc.cr4_tsd_in_ring_3", |t| {
        set_cr4(cr4() | 4);
        // rdtsc; ud2
        let (fault, _) = guests::user::run(&[0x0f, 0x31, 0x0f, 0x0b], Default::default());
        t.faults("RDTSC", Err::<(), _>(fault), GP, Some(0));
    });
    case("tsc.in_ring_3", |t| {
        let (fault, frame) = guests::user::run(&[0x0f, 0x31, 0x0f, 0x0b], Default::default());
        t.faults("UD2 after RDTSC", Err::<(), _>(fault), guests::trap::UD, None);
        t.within("the TSC", frame.rdx << 32 | frame.rax, 1, rdtsc());
    });
}

fn mtrr() {
    if !has(1, 0, |r| r.edx, 12) {
        return case("mtrr.present", |t| t.skip("no MTRRs"));
    }
    let cap = rdmsr(0xfe);
    case("mtrr.cap_is_read_only", |t| {
        if !t.skip_on_bare_tcg("writes of read-only MSRs are dropped") {
            t.faults("a write of MTRRcap", try_wrmsr(0xfe, cap), GP, Some(0));
        }
    });
    case("mtrr.def_type", |t| {
        let value = t.works("reading MTRRdefType", try_rdmsr(0x2ff)).unwrap_or(0);
        t.yes("a valid default type", matches!(value & 0xff, 0 | 1 | 4 | 5 | 6));
        t.works("writing it back", try_wrmsr(0x2ff, value));
        t.eq("MTRRdefType", rdmsr(0x2ff), value);
        if platform::umbra() {
            t.eq("MTRRdefType: enabled, write-back", value, 0x806u64);
        }
    });
    case("mtrr.def_type_bad_value", |t| {
        if !t.skip_on_bare_tcg("any MTRRdefType is taken") {
            t.faults("memory type 2", try_wrmsr(0x2ff, 0x802), GP, Some(0));
            t.faults("a reserved bit", try_wrmsr(0x2ff, 0x1_0806), GP, Some(0));
        }
    });
    case("mtrr.variable_ranges", |t| {
        t.within("number of ranges", cap & 0xff, 0, 32);
        for index in 0..(cap & 0xff) as u32 {
            let old = t.works("reading a base", try_rdmsr(0x200 + 2 * index)).unwrap_or(0);
            t.works("writing it", try_wrmsr(0x200 + 2 * index, 0x4000_0006));
            t.eq("the base written", rdmsr(0x200 + 2 * index), 0x4000_0006u64);
            t.works("writing it back", try_wrmsr(0x200 + 2 * index, old));
            t.works("reading a mask", try_rdmsr(0x201 + 2 * index));
        }
    });
    case("mtrr.fixed_ranges", |t| {
        if cap >> 8 & 1 == 0 {
            return t.skip("no fixed ranges");
        }
        for msr in [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f) {
            let old = t.works("reading a fixed range", try_rdmsr(msr)).unwrap_or(0);
            t.works("writing it", try_wrmsr(msr, 0x0606_0606_0606_0606));
            t.eq("the value written", rdmsr(msr), 0x0606_0606_0606_0606u64);
            t.works("writing it back", try_wrmsr(msr, old));
        }
    });
}

fn machine_check() {
    case("mca.registers_exist", |t| {
        if !has(1, 0, |r| r.edx, 14) {
            return t.skip("no machine-check architecture");
        }
        let cap = t.works("reading MCG_CAP", try_rdmsr(0x179)).unwrap_or(0);
        t.works("reading MCG_STATUS", try_rdmsr(0x17a));
        t.works("clearing MCG_STATUS", try_wrmsr(0x17a, 0));
        for bank in 0..(cap & 0xff) as u32 {
            t.works("reading a bank's CTL", try_rdmsr(0x400 + 4 * bank));
            t.works("reading a bank's STATUS", try_rdmsr(0x401 + 4 * bank));
            t.works("clearing a bank's STATUS", try_wrmsr(0x401 + 4 * bank, 0));
            t.eq("the STATUS", rdmsr(0x401 + 4 * bank), 0u64);
        }
    });
}

fn unknown() {
    const UNKNOWN: [u32; 11] = [
        0x0000_0fff,
        0x0000_1fff,
        0x0000_2000,
        0x1234_5678,
        0x4000_0000,
        0x4000_0001,
        0x8000_0000,
        0xbfff_ffff,
        0xc000_2000,
        0xdead_beef,
        0xffff_ffff,
    ];
    case("msr.unknown_read_faults", |t| {
        if t.skip_on_bare_tcg("unknown MSRs read as 0") {
            return;
        }
        for msr in UNKNOWN {
            let got = try_rdmsr(msr);
            t.check(
                got.is_err_and(|f| f.vector == GP && f.error == 0),
                format_args!("#GP for {msr:#x}, got {got:?}"),
            );
        }
    });
    case("msr.unknown_write_faults", |t| {
        if t.skip_on_bare_tcg("writes of unknown MSRs are dropped") {
            return;
        }
        for msr in UNKNOWN {
            let got = try_wrmsr(msr, 0);
            t.check(
                got.is_err_and(|f| f.vector == GP && f.error == 0),
                format_args!("#GP for {msr:#x}, got {got:?}"),
            );
        }
    });
    case("msr.virtualization_hidden", |t| {
        if !platform::umbra() {
            return t.skip("this is Umbra's policy");
        }
        // VM_HSAVE_PA, IA32_VMX_BASIC to _VMFUNC.
        for msr in [0xc001_0117].into_iter().chain(0x480..=0x491) {
            let got = try_rdmsr(msr);
            t.check(got.is_err_and(|f| f.vector == GP), format_args!("#GP for {msr:#x}, got {got:?}"));
        }
        // VM_CR may exist, but then it says that SVM is disabled. AMD APM vol. 2, 15.30.1.
        if let Ok(value) = try_rdmsr(0xc001_0114) {
            t.eq("VM_CR.SVMDIS", value >> 4 & 1, 1u64);
        }
    });
    case("msr.sweep_never_hangs", |t| {
        // Reads only: whatever exists answers, whatever does not is #GP, nothing else happens.
        let mut answered = 0u64;
        for msr in (0..0x2000).chain(0xc000_0000..0xc000_0400).chain(0xc001_0000..0xc001_0400) {
            match try_rdmsr(msr) {
                Ok(_) => answered += 1,
                Err(fault) => t.check(fault.vector == GP, format_args!("#GP for {msr:#x}, got {fault}")),
            }
        }
        t.yes("some registers answer", answered > 10);
    });
}

fn registers() {
    case("msr.rdmsr_high_halves_zero", |t| {
        let (rax, rdx): (u64, u64);
        exec!("rdmsr", in("ecx") MSR_PAT, inout("rax") !0u64 => rax, inout("rdx") !0u64 => rdx);
        t.eq("high halves of RAX and RDX", (rax | rdx) >> 32, 0u64);
    });
    case("msr.wrmsr_ignores_high_halves", |t| {
        if platform::umbra() && t.skip_on_tcg("it indexes the MSR permission map by all of RCX") {
            return;
        }
        let old = rdmsr(MSR_PAT);
        exec!("wrmsr", in("rcx") 0xffff_ffff_0000_0000u64 | u64::from(MSR_PAT),
            in("rax") 0xdead_beef_0007_0406u64, in("rdx") 0xdead_beef_0007_0506u64);
        t.eq("PAT", rdmsr(MSR_PAT), 0x0007_0506_0007_0406u64);
        wrmsr(MSR_PAT, old);
    });
    case("msr.ring_3_faults", |t| {
        for code in [[0x0f, 0x32, 0x0f, 0x0b], [0x0f, 0x30, 0x0f, 0x0b]] {
            let start = guests::user::Start { rcx: MSR_PAT.into(), ..Default::default() };
            let (fault, _) = guests::user::run(&code, start);
            t.faults("RDMSR or WRMSR in ring 3", Err::<(), _>(fault), GP, Some(0));
        }
    });
}

fn exit_counter() {
    let under_umbra = |t: &mut Case| {
        if !platform::umbra() {
            t.skip("Umbra's own MSR");
        }
        platform::umbra()
    };
    case("msr.exit_counter_counts", |t| {
        if under_umbra(t) {
            let first = rdmsr(platform::MSR_EXIT_COUNT);
            (0..100).for_each(|_| _ = cpuid(0, 0));
            let second = rdmsr(platform::MSR_EXIT_COUNT);
            // 100 CPUIDs and one of the two reads; anything more is an interrupt of the host's.
            t.within("exits", second - first, 101, 200);
        }
    });
    case("msr.exit_counter_is_read_only", |t| {
        if under_umbra(t) {
            t.faults("a write", try_wrmsr(platform::MSR_EXIT_COUNT, 0), GP, Some(0));
        }
    });
}
