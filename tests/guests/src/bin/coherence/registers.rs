//! CR4, EFER, XCR0 and the MSRs against CPUID.
use crate::view::{amd, any, bit, intel, leaf, Bit, A, B, C, D, EXT1, EXT8};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{catch, GP, UD};
use guests::{machine, platform};

pub(crate) fn run() {
    cr4_bits();
    case("efer.bits", efer_bits);
    xcr0();
    case("msr.what_cpuid_promises", promised);
    case("msr.what_cpuid_hides", hidden);
    case("msr.misc_enable", misc_enable);
    case("msr.microcode_revision", |t| {
        if !intel() {
            return t.skip("Intel's");
        }
        if !platform::umbra() {
            return t.skip("emulators have no microcode");
        }
        // SDM vol. 3, 10.11.7.1: write 0, CPUID of leaf 1, read.
        t.works("writing 0", try_wrmsr(0x8b, 0));
        cpuid(1, 0);
        t.yes("a revision in the high half", rdmsr(0x8b) >> 32 != 0);
    });
    case("mtrr.count_and_width", mtrrs);
    case("pat.exists_with_its_bit", |t| {
        let pat = t.works("reading it", try_rdmsr(MSR_PAT)).unwrap_or(0);
        t.yes("the bit", bit((1, 0, D, 16)));
        t.works("writing it back", try_wrmsr(MSR_PAT, pat));
    });
    case("msr.canonical_addresses", canonical);
}

/// CR4 bit and the CPUID bits of which one must be set (SDM vol. 3, 2.5; APM vol. 2, 3.1.3).
const CR4: &[(u32, &[Bit])] = &[
    (0, &[(1, 0, D, 1)]),
    (1, &[(1, 0, D, 1)]),
    (2, &[(1, 0, D, 4)]),
    (3, &[(1, 0, D, 2)]),
    (4, &[(1, 0, D, 3)]),
    (6, &[(1, 0, D, 7)]),
    (7, &[(1, 0, D, 13)]),
    (9, &[(1, 0, D, 24)]),
    (10, &[(1, 0, D, 25)]),
    (11, &[(7, 0, C, 2)]),
    (13, &[(1, 0, C, 5)]),
    (14, &[(1, 0, C, 6)]),
    (15, &[]),
    (16, &[(7, 0, B, 0)]),
    (17, &[(1, 0, C, 17)]),
    (18, &[(1, 0, C, 26)]),
    (19, &[(7, 0, C, 23)]),
    (20, &[(7, 0, B, 7)]),
    (21, &[(7, 0, B, 20)]),
    (22, &[(7, 0, C, 3)]),
    (23, &[(7, 0, C, 7), (7, 0, D, 20)]),
    (24, &[(7, 0, C, 31)]),
    (25, &[(7, 0, D, 5)]),
    (27, &[(7, 1, A, 6)]),
    (28, &[(7, 1, A, 26)]),
    (31, &[]),
    (32, &[(7, 1, A, 17)]),
    (33, &[]),
    (63, &[]),
];

fn cr4_bits() {
    case("cr4.what_cpuid_offers_can_be_set", |t| {
        set_cr3(cr3() & !0xfff);
        for &(number, bits) in CR4 {
            if !any(bits) {
                continue;
            }
            let base = cr4();
            let got = catch(|| set_cr4(base ^ 1 << number));
            t.check(got.is_ok(), format_args!("CR4 bit {number} toggled, got {got:?}"));
            t.eq("CR4", cr4(), base ^ 1 << number);
            set_cr4(base);
        }
    });
    case("cr4.what_cpuid_hides_faults", |t| {
        if platform::bad_cr_write_hangs() {
            return t.skip("QEMU TCG stops at a MOV to CR4 with a reserved bit");
        }
        for &(number, bits) in CR4 {
            if any(bits) {
                continue;
            }
            let base = cr4();
            let got = catch(|| set_cr4(base | 1 << number));
            t.check(
                got.is_err_and(|f| f.vector == GP),
                format_args!("#GP for CR4 bit {number}, got {got:?}"),
            );
            t.eq("CR4 afterwards", cr4(), base);
        }
    });
    case("cr4.bits_show_in_cpuid", |t| {
        for (number, feature, shown) in [(18, (1, 0, C, 26), (1, 0, C, 27)), (22, (7, 0, C, 3), (7, 0, C, 4))]
        {
            if bit(feature) {
                set_cr4(cr4() | 1 << number);
                t.yes("the bit that follows CR4, set", bit(shown));
                set_cr4(cr4() & !(1 << number));
            }
            t.yes("the bit that follows CR4, clear", !bit(shown));
        }
    });
}

/// EFER bit and the CPUID bits of which one must be set (APM vol. 2, 3.1.7; SDM vol. 3, table 2-1).
const EFER: &[(u32, &[Bit])] = &[
    (0, &[(EXT1, 0, D, 11)]),
    (1, &[]),
    (9, &[]),
    (11, &[(EXT1, 0, D, 20)]),
    (12, &[(EXT1, 0, C, 2)]),
    (14, &[(EXT1, 0, D, 25)]),
    (15, &[(EXT1, 0, C, 17)]),
    (17, &[(EXT8, 0, B, 8)]),
    (18, &[(EXT8, 0, B, 13)]),
    (20, &[(0x8000_0021, 0, A, 7)]),
    (21, &[(0x8000_0021, 0, A, 8)]),
    (32, &[]),
    (63, &[]),
];

fn efer_bits(t: &mut Case) {
    if t.skip_on_bare_tcg("EFER's reserved bits are dropped, not refused") {
        return;
    }
    let base = rdmsr(MSR_EFER);
    for &(number, bits) in EFER {
        let got = try_wrmsr(MSR_EFER, base ^ 1 << number);
        if any(bits) {
            t.check(got.is_ok(), format_args!("EFER bit {number} toggled, got {got:?}"));
            t.eq("EFER", rdmsr(MSR_EFER), base ^ 1 << number);
        } else {
            t.check(
                got.is_err_and(|f| f.vector == GP),
                format_args!("#GP for EFER bit {number}, got {got:?}"),
            );
            t.eq("EFER afterwards", rdmsr(MSR_EFER), base);
        }
        wrmsr(MSR_EFER, base);
    }
    if platform::umbra() {
        t.faults("LMSLE, which is hidden", try_wrmsr(MSR_EFER, base | 1 << 13), GP, Some(0));
    }
}

/// Whether XSETBV must take `value` where leaf 0Dh offers `offered` (SDM vol. 1, 13.3).
fn is_valid(value: u64, offered: u64) -> bool {
    let group = |mask: u64| value & mask == 0 || value & mask == mask;
    value & !offered == 0
        && value & 1 != 0
        && (value & 4 == 0 || value & 2 != 0)
        && group(0x18)
        && group(0xe0)
        && (value & 0xe0 == 0 || value & 4 != 0)
        && group(0x6_0000)
}

fn xcr0() {
    case("xcr0.every_combination", |t| {
        if !bit((1, 0, C, 26)) {
            set_cr4(cr4() | 3 << 9);
            let got = catch(|| xsetbv(0, 1));
            t.faults("XSETBV without XSAVE", got, UD, None);
            return;
        }
        set_cr4(cr4() | CR4_OSXSAVE | 3 << 9);
        xsetbv(0, 1);
        let offered = u64::from(leaf(0xd, 0)[A]);
        let mut value = 0;
        loop {
            let before = xgetbv();
            // TCG executes XSETBV without the exit that was asked for, and checks less.
            if is_valid(value, offered) || !platform::tcg() {
                let got = catch(|| xsetbv(0, value));
                if is_valid(value, offered) {
                    t.check(got.is_ok(), format_args!("XCR0 {value:#x} accepted, got {got:?}"));
                    t.eq("XCR0", xgetbv(), value);
                    sizes(t, value);
                } else {
                    t.check(
                        got.is_err_and(|f| f.vector == GP),
                        format_args!("#GP for XCR0 {value:#x}, got {got:?}"),
                    );
                    t.eq("XCR0 afterwards", xgetbv(), before);
                }
            }
            // The next subset of what is offered.
            value = value.wrapping_sub(offered) & offered;
            if value == 0 {
                break;
            }
        }
        xsetbv(0, 1);
        if !platform::tcg() {
            for other in (0..64).filter(|other| offered >> other & 1 == 0) {
                let got = catch(|| xsetbv(0, 3 | 1 << other));
                t.faults("a component that is not offered", got, GP, Some(0));
            }
        }
    });
}

/// Leaf 0Dh says how large the areas for the enabled components are.
fn sizes(t: &mut Case, enabled: u64) {
    let (mut standard, mut compacted) = (576, 576);
    for one in (2..32).filter(|one| enabled >> one & 1 != 0) {
        let [size, offset, flags, _] = leaf(0xd, one);
        standard = standard.max(offset + size);
        compacted = if flags & 2 != 0 { (compacted + 63) & !63 } else { compacted } + size;
    }
    t.eq("bytes for XSAVE", leaf(0xd, 0)[B], standard);
    if bit((0xd, 1, A, 1)) && platform::umbra() {
        t.eq("bytes for XSAVEC", leaf(0xd, 1)[B], compacted);
    }
}

/// An MSR that can be read, and the CPUID bits of which any promises it.
const MSRS: &[(u32, &[Bit])] = &[
    (0x10, &[(1, 0, D, 4)]),
    (0x1b, &[(1, 0, D, 9)]),
    (0x3b, &[(7, 0, B, 1)]),
    (
        0x48,
        &[(7, 0, D, 26), (7, 0, D, 27), (7, 0, D, 31), (EXT8, 0, B, 14), (EXT8, 0, B, 15), (EXT8, 0, B, 24)],
    ),
    (0x8c, &[(7, 0, C, 30)]),
    (0xcf, &[(7, 0, D, 30)]),
    (0xe1, &[(7, 0, C, 5)]),
    (0xe7, &[(6, 0, C, 0)]),
    (0xe8, &[(6, 0, C, 0)]),
    (0xfe, &[(1, 0, D, 12)]),
    (0x10a, &[(7, 0, D, 29)]),
    (0x174, &[(1, 0, D, 11)]),
    (0x175, &[(1, 0, D, 11)]),
    (0x176, &[(1, 0, D, 11)]),
    (0x179, &[(1, 0, D, 14)]),
    (0x17a, &[(1, 0, D, 14)]),
    (0x199, &[(1, 0, C, 7)]),
    (0x19b, &[(1, 0, D, 22)]),
    (0x19c, &[(1, 0, D, 22)]),
    (0x1b0, &[(6, 0, C, 3)]),
    (0x277, &[(1, 0, D, 16)]),
    (0x2ff, &[(1, 0, D, 12)]),
    (0x345, &[(1, 0, C, 15)]),
    (0x480, &[(1, 0, C, 5)]),
    (0x570, &[(7, 0, B, 25)]),
    (0x600, &[(1, 0, D, 21)]),
    (0x6a0, &[(7, 0, C, 7), (7, 0, D, 20)]),
    (0x6a2, &[(7, 0, C, 7), (7, 0, D, 20)]),
    (0x6e0, &[(1, 0, C, 24)]),
    (0x6e1, &[(7, 0, C, 31)]),
    (0x770, &[(6, 0, A, 7)]),
    (0xc8f, &[(7, 0, B, 12), (7, 0, B, 15)]),
    (0xd90, &[(7, 0, B, 14)]),
    (0xda0, &[(0xd, 1, A, 3)]),
    (0x14ce, &[(7, 0, D, 19)]),
    (0xc000_0080, &[(EXT1, 0, D, 20), (EXT1, 0, D, 29)]),
    (0xc000_0081, &[(EXT1, 0, D, 11)]),
    (0xc000_0082, &[(EXT1, 0, D, 11)]),
    (0xc000_0083, &[(EXT1, 0, D, 11)]),
    (0xc000_0084, &[(EXT1, 0, D, 11)]),
    (0xc000_0100, &[(EXT1, 0, D, 29)]),
    (0xc000_0101, &[(EXT1, 0, D, 29)]),
    (0xc000_0102, &[(EXT1, 0, D, 29)]),
    (0xc000_0103, &[(EXT1, 0, D, 27), (7, 0, C, 22)]),
    (0xc000_0104, &[(0x8000_000a, 0, D, 4)]),
    (0xc000_0108, &[(0x8000_0021, 0, A, 13)]),
    (0xc001_0117, &[(EXT1, 0, C, 2)]),
    (0xc001_0140, &[(EXT1, 0, C, 9)]),
    (0xc001_0200, &[(EXT1, 0, C, 23)]),
    (0xc001_011f, &[(EXT8, 0, B, 25)]),
    (0xc001_1030, &[(EXT1, 0, C, 10)]),
];

fn promised(t: &mut Case) {
    for &(msr, bits) in MSRS {
        if any(bits) {
            let got = try_rdmsr(msr);
            t.check(got.is_ok(), format_args!("MSR {msr:#x} there, got {got:?}"));
        }
    }
    if bit((1, 0, D, 14)) && platform::umbra() {
        let banks = rdmsr(0x179) & 0xff;
        t.faults("a bank beyond the last", try_rdmsr(0x400 + 4 * banks as u32), GP, Some(0));
    }
}

fn hidden(t: &mut Case) {
    if !platform::umbra() {
        // Emulators answer more than they promise.
        return t.skip("this is Umbra's policy");
    }
    for &(msr, bits) in MSRS {
        if !any(bits) {
            for got in [try_rdmsr(msr).map(|_| ()), try_wrmsr(msr, 0)] {
                t.check(got.is_err_and(|f| f.vector == GP), format_args!("#GP for {msr:#x}, got {got:?}"));
            }
        }
    }
    // Commands, which cannot be read in any case: PRED_CMD, FLUSH_CMD.
    for msr in [0x49, 0x10b] {
        t.faults("a command that is not offered", try_wrmsr(msr, 0), GP, Some(0));
    }
    let other: &[u32] = if intel() { &[0xc001_0010, 0xc001_0015, 0xc001_1029] } else { &[0x17, 0x3a, 0x1a0] };
    for &msr in other {
        t.faults("an MSR of the other vendor", try_rdmsr(msr), GP, Some(0));
    }
}

/// IA32_MISC_ENABLE repeats, or takes away, what CPUID says (SDM vol. 4, table 2-2).
fn misc_enable(t: &mut Case) {
    if !intel() {
        return t.skip("Intel's");
    }
    if !platform::umbra() {
        return t.skip("emulators have a constant there");
    }
    let Some(value) = t.works("reading it", try_rdmsr(0x1a0)) else { return };
    let on = |number: u32| value >> number & 1 != 0;
    t.eq("counters as leaf 0Ah", on(7), leaf(0xa, 0)[A] & 0xff != 0);
    t.yes("branch trace and PEBS off without debug stores", bit((1, 0, D, 21)) || (on(11) && on(12)));
    t.yes("EIST only with its bit", !on(16) || bit((1, 0, C, 7)));
    t.eq("MONITOR as its bit", on(18), bit((1, 0, C, 3)));
    t.yes("leaves beyond 2 only with no limit", !on(22) || leaf(0, 0)[A] <= 3);
    t.yes("NX only where it is not taken away", !on(34) || !bit((EXT1, 0, D, 20)));
    t.works("writing it back", try_wrmsr(0x1a0, value));
    for number in [18, 22, 34] {
        t.faults("a switch of what is fixed", try_wrmsr(0x1a0, value | 1 << number), GP, Some(0));
    }
    t.eq("FEATURE_CONTROL: locked with nothing on", rdmsr(0x3a), 1u64);
    t.works("PLATFORM_ID", try_rdmsr(0x17));
}

fn mtrrs(t: &mut Case) {
    if !bit((1, 0, D, 12)) {
        t.faults("MTRRcap without the bit", try_rdmsr(0xfe), GP, Some(0));
        return;
    }
    let cap = rdmsr(0xfe);
    let count = (cap & 0xff) as u32;
    for index in 0..2 * count {
        t.works("a register of a range that is counted", try_rdmsr(0x200 + index));
    }
    for msr in [0x250, 0x258, 0x259, 0x268, 0x26f] {
        t.eq("a fixed range as MTRRcap says", try_rdmsr(msr).is_ok(), cap >> 8 & 1 != 0);
    }
    if !platform::umbra() {
        // Emulators answer more than they count.
        return;
    }
    t.faults("a register beyond the count", try_rdmsr(0x200 + 2 * count), GP, Some(0));
    let wide = machine::physical_bits();
    let (base, mask) = (rdmsr(0x200), rdmsr(0x201));
    t.works("the highest bit of a mask", try_wrmsr(0x201, 1 << (wide - 1)));
    t.works("the highest bit of a base", try_wrmsr(0x200, 1 << (wide - 1)));
    t.works("its old mask", try_wrmsr(0x201, mask));
    t.works("its old base", try_wrmsr(0x200, base));
    t.faults("a bit of a mask beyond the width", try_wrmsr(0x201, mask | 1 << wide), GP, Some(0));
    t.faults("a bit of a base beyond the width", try_wrmsr(0x200, base | 1 << wide), GP, Some(0));
    t.eq("write-combining as MTRRcap says", try_wrmsr(0x200, base & !0xff | 1).is_ok(), cap >> 10 & 1 != 0);
    t.works("its old base again", try_wrmsr(0x200, base));
    t.eq("SMRRs as MTRRcap says", try_rdmsr(0x1f2).is_ok(), cap >> 11 & 1 != 0);
}

fn canonical(t: &mut Case) {
    if t.skip_on_tcg("bases need not be canonical") {
        return;
    }
    let wide = leaf(EXT8, 0)[A] >> 8 & 0xff;
    let msrs = [MSR_LSTAR, 0xc000_0083, MSR_FS_BASE, MSR_GS_BASE, MSR_KERNEL_GS_BASE, 0x175, 0x176];
    // AMD's SYSENTER has 32-bit targets.
    let count = if amd() { 5 } else { 7 };
    for &msr in &msrs[..count] {
        let before = rdmsr(msr);
        let got = try_wrmsr(msr, 1 << (wide - 1));
        t.check(got.is_err_and(|f| f.vector == GP), format_args!("#GP for {msr:#x}, got {got:?}"));
        t.eq("the value afterwards", rdmsr(msr), before);
        t.works("the highest half", try_wrmsr(msr, u64::MAX << (wide - 1)));
        wrmsr(msr, before);
    }
}
