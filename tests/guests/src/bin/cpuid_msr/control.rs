//! Control and debug registers: what reads back, and what is #GP.
use guests::dev::lapic;
use guests::prelude::*;
use guests::report::{case, fault_case};
use guests::trap::{catch, DB, GP, UD};
use guests::{exec, machine, platform};

/// CR0 bits. AMD APM vol. 2, 3.1.1.
const CR0_MP: u64 = 1 << 1;
const CR0_TS: u64 = 1 << 3;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;

pub(crate) fn run() {
    cr0_cases();
    cr3_cases();
    cr4_cases();
    cr8_cases();
    debug_registers();
    fault_case("cr.cr1_does_not_exist", UD, None, || exec!(".byte 0x0f, 0x20, 0xc8", out("rax") _));
    fault_case("cr.cr5_does_not_exist", UD, None, || exec!(".byte 0x0f, 0x22, 0xe8", in("rax") 0));
    fault_case("cr.cr7_does_not_exist", UD, None, || exec!(".byte 0x0f, 0x20, 0xf8", out("rax") _));
    case("cr.cr2_reads_back", |t| {
        for value in [0u64, 0x1234_5678_9abc, !0] {
            set_cr2(value);
            t.eq("CR2", cr2(), value);
        }
    });
}

fn cr0_cases() {
    case("cr0.toggles_read_back", |t| {
        let base = cr0();
        for bit in [CR0_MP, CR0_TS, CR0_WP, CR0_CD] {
            set_cr0(base ^ bit);
            t.eq("CR0", cr0(), base ^ bit);
            set_cr0(base);
            t.eq("CR0", cr0(), base);
        }
    });
    case("cr0.clts", |t| {
        set_cr0(cr0() | CR0_TS);
        exec!("clts");
        t.eq("TS", cr0() & CR0_TS, 0u64);
    });
    case("cr0.lmsw", |t| {
        let base = cr0();
        // LMSW sets TS, EM, MP and can set PE but not clear it. AMD APM vol. 3, LMSW.
        exec!("lmsw {0:x}", in(reg) 0x000eu32 & !4);
        t.eq("CR0 after setting TS and MP, with PE clear in the operand", cr0(), base | CR0_TS | CR0_MP);
        exec!("lmsw {0:x}", in(reg) 0u32);
        t.eq("CR0 after clearing them", cr0(), base & !0xe);
    });
    case("cr0.lmsw_memory_operand", |t| {
        let base = cr0();
        let value = 9u16;
        exec!("lmsw word ptr [{}]", in(reg) &value);
        t.eq("CR0", cr0(), base | CR0_TS);
        exec!("clts");
    });
    case("cr0.smsw", |t| {
        let value: u64;
        exec!("smsw {}", out(reg) value);
        t.eq("SMSW's low word", value & 0xffff, cr0() & 0xffff);
    });
    case("cr0.pg_clear_in_64_bit_mode", |t| {
        // Leaving long mode goes through compatibility mode. AMD APM vol. 2, 14.8.
        if !t.skip_on_tcg("paging can be switched off in 64-bit mode") {
            let got = catch(|| set_cr0(cr0() & !CR0_PG));
            t.faults("clearing PG", got, GP, Some(0));
        }
    });
    case("cr0.pg_without_pe", |t| {
        // Paged real mode is a state of its own for VMRUN (AMD APM vol. 2, 15.5.1), but not for MOV to CR0.
        let skipped = t.skip_on_tcg("CR0 is not checked")
            || t.skip_on_bochs_svm("PE can be cleared under paging, which then ends Bochs itself");
        if !skipped {
            let got = catch(|| set_cr0(cr0() & !1));
            t.faults("clearing PE", got, GP, Some(0));
        }
    });
    case("cr0.nw_without_cd", |t| {
        if !t.skip_on_tcg("CR0 is not checked") {
            let got = catch(|| set_cr0(cr0() | CR0_NW));
            t.faults("NW without CD", got, GP, Some(0));
        }
    });
    case("cr0.high_half", |t| {
        if !t.skip_on_tcg("CR0 is not checked") {
            let got = catch(|| set_cr0(cr0() | 1 << 32));
            t.faults("bit 32", got, GP, Some(0));
        }
    });
    case("cr0.et_stays_set", |t| {
        set_cr0(cr0() & !0x10);
        t.eq("ET", cr0() >> 4 & 1, 1u64);
    });
}

fn cr3_cases() {
    case("cr3.reads_back", |t| {
        let base = cr3();
        set_cr3(base);
        t.eq("CR3", cr3(), base);
        set_cr3(base | 0x18);
        t.eq("CR3 with PCD and PWT", cr3(), base | 0x18);
        set_cr3(base);
    });
    case("cr3.reserved_bits", |t| {
        if platform::bad_cr_write_hangs() {
            return t.skip("QEMU TCG stops at a MOV to CR3 with a reserved bit");
        }
        let wide = machine::physical_bits();
        if wide < 52 {
            // AMD and Intel agree: address bits beyond the physical width are reserved.
            let got = catch(|| set_cr3(cr3() | 1 << 51));
            t.faults("bit 51", got, GP, Some(0));
        } else {
            t.skip("all 52 bits are address bits");
        }
    });
    case("cr3.reload_loop", |t| {
        let base = cr3();
        (0..1000).for_each(|_| set_cr3(base));
        t.eq("CR3", cr3(), base);
    });
}

fn cr4_cases() {
    case("cr4.toggles_read_back", |t| {
        let base = cr4();
        for bit in [2u64, 3, 4, 7, 8, 9, 10] {
            set_cr4(base ^ 1 << bit);
            t.eq("CR4", cr4(), base ^ 1 << bit);
            set_cr4(base);
        }
    });
    case("cr4.reserved_bits", |t| {
        if platform::bad_cr_write_hangs() {
            return t.skip("QEMU TCG stops at a MOV to CR4 with a reserved bit");
        }
        for bit in [19u32, 31, 32, 47, 63] {
            let got = catch(|| set_cr4(cr4() | 1 << bit));
            t.check(got.is_err_and(|f| f.vector == GP), format_args!("#GP for bit {bit}, got {got:?}"));
        }
    });
    case("cr4.unsupported_features", |t| {
        if platform::bad_cr_write_hangs() {
            return t.skip("QEMU TCG stops at a MOV to CR4 with a reserved bit");
        }
        // CR4 bit, CPUID leaf, register, bit.
        let seven_b: fn(&Cpuid) -> u32 = |r| r.ebx;
        let seven_c: fn(&Cpuid) -> u32 = |r| r.ecx;
        let mut tried = 0;
        for (bit, leaf, register, cpuid_bit) in [
            (11u32, 7, seven_c, 2),
            (12, 7, seven_c, 16),
            (13, 1, seven_c, 5),
            (14, 1, seven_c, 6),
            (16, 7, seven_b, 0),
            (17, 1, seven_c, 17),
            (18, 1, seven_c, 26),
            (20, 7, seven_b, 7),
            (21, 7, seven_b, 20),
            (22, 7, seven_c, 3),
            (23, 7, seven_c, 7),
            (24, 7, seven_c, 31),
        ] {
            if !has(leaf, 0, register, cpuid_bit) {
                tried += 1;
                let got = catch(|| set_cr4(cr4() | 1 << bit));
                t.check(got.is_err_and(|f| f.vector == GP), format_args!("#GP for bit {bit}, got {got:?}"));
            }
        }
        if tried == 0 {
            t.skip("CPUID offers all of them");
        }
    });
    case("cr4.pae_clear_in_long_mode", |t| {
        if !t.skip_on_tcg("PAE can be cleared in long mode") {
            let got = catch(|| set_cr4(cr4() & !CR4_PAE));
            t.faults("clearing PAE", got, GP, Some(0));
        }
    });
    case("cr4.la57_in_long_mode", |t| {
        if !t.skip_on_tcg("LA57 can change in long mode") {
            let got = catch(|| set_cr4(cr4() ^ CR4_LA57));
            t.faults("changing LA57", got, GP, Some(0));
        }
    });
    case("cr4.pcide_needs_zero_pcid", |t| {
        if !has(1, 0, |r| r.ecx, 17) {
            return t.skip("no PCID");
        }
        if platform::bad_cr_write_hangs() {
            return t.skip("QEMU TCG stops at a refused MOV to CR4");
        }
        set_cr3(cr3() | 0x18);
        let got = catch(|| set_cr4(cr4() | CR4_PCIDE));
        t.faults("PCIDE with a PCID in CR3", got, GP, Some(0));
    });
}

fn cr8_cases() {
    case("cr8.is_the_tpr", |t| {
        for value in 0..16u64 {
            set_cr8(value);
            t.eq("CR8", cr8(), value);
            t.eq("TPR", lapic::read(lapic::TPR), value << 4);
        }
    });
    case("cr8.follows_the_tpr", |t| {
        for value in [0u32, 0x10, 0x5f, 0xf0, 0x0f] {
            lapic::write(lapic::TPR, value);
            t.eq("CR8", cr8(), value >> 4);
            t.eq("TPR", lapic::read(lapic::TPR), value);
        }
    });
    case("cr8.reserved_bits", |t| {
        // The write is intercepted on some processors and not on others; TCG's is lax.
        if !t.skip_on_tcg("CR8 is cut to four bits") {
            let got = catch(|| set_cr8(16));
            t.faults("CR8 = 16", got, GP, Some(0));
        }
    });
}

fn debug_registers() {
    case("dr.addresses_read_back", |t| {
        let values = [0x1000u64, 0x7fff_ffff_f000, 0xffff_8000_0000_0000, 0x1234];
        set_dr0(values[0]);
        set_dr1(values[1]);
        set_dr2(values[2]);
        set_dr3(values[3]);
        for _ in 0..20 {
            cpuid(0, 0);
        }
        t.eq("DR0", dr0(), values[0]);
        t.eq("DR1", dr1(), values[1]);
        t.eq("DR2", dr2(), values[2]);
        t.eq("DR3", dr3(), values[3]);
    });
    case("dr.dr6_dr7_fixed_bits", |t| {
        set_dr6(0);
        t.masked("DR6's fixed ones", dr6(), 0xffff_0ff0u64 & !(1 << 11), 0xffff_0ff0 & !(1 << 11));
        set_dr7(0);
        t.eq("DR7's fixed one", dr7(), 0x400u64);
    });
    case("dr.high_halves_fault", |t| {
        if !t.skip_on_tcg("DR6 and DR7 are not checked") {
            let got = catch(|| set_dr7(1 << 32));
            t.faults("DR7 bit 32", got, GP, Some(0));
            let got = catch(|| set_dr6(1 << 32));
            t.faults("DR6 bit 32", got, GP, Some(0));
        }
    });
    case("dr.dr4_dr5_with_de", |t| {
        set_cr4(cr4() | CR4_DE);
        let got = catch(|| exec!(".byte 0x0f, 0x21, 0xe0", out("rax") _));
        t.faults("reading DR4", got, UD, None);
        let got = catch(|| exec!(".byte 0x0f, 0x23, 0xe8", in("rax") 0));
        t.faults("writing DR5", got, UD, None);
    });
    case("dr.dr4_is_dr6_without_de", |t| {
        set_cr4(cr4() & !CR4_DE);
        let value: u64;
        exec!(".byte 0x0f, 0x21, 0xe0", out("rax") value);
        t.eq("DR4", value, dr6());
    });
    case("dr.general_detect", |t| {
        let skipped = t.skip_on_tcg("DR7.GD is ignored")
            || t.skip_on_bochs_svm("an intercepted #DB neither sets DR6.BD nor clears DR7.GD");
        if !skipped {
            set_dr7(0x400 | 1 << 13);
            let got = catch(dr0);
            t.faults("reading DR0 with GD set", got, DB, None);
            t.eq("DR6.BD", dr6() >> 13 & 1, 1u64);
            t.eq("DR7.GD after the #DB", dr7() >> 13 & 1, 0u64);
        }
    });
}
