//! The local APIC against CPUID: its ids in each leaf and mode, the modes of its timer.
use crate::view::{amd, bit, leaf, A, B, C, D, EXT1};
use guests::dev::lapic;
use guests::platform;
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::GP;

const EXTD: u64 = 0x400;
const EN: u64 = 0x800;

pub(crate) fn run() {
    case("apic.ids_agree", |t| ids(t, lapic::id()));
    case("apic.enabled_shows", |t| {
        t.eq("IA32_APIC_BASE.EN", rdmsr(MSR_APIC_BASE) & EN, EN);
        t.yes("the bit", bit((1, 0, D, 9)));
        if amd() {
            t.yes("the bit in 8000_0001h", bit((EXT1, 0, D, 9)));
        }
        if !platform::umbra() {
            // Not every emulator enables it again.
            return;
        }
        let base = rdmsr(MSR_APIC_BASE);
        wrmsr(MSR_APIC_BASE, base & !EN);
        let (basic, extended) = (bit((1, 0, D, 9)), bit((EXT1, 0, D, 9)));
        wrmsr(MSR_APIC_BASE, base);
        lapic::quiet();
        t.yes("no APIC while it is disabled", !basic && !extended);
        t.yes("an APIC again", bit((1, 0, D, 9)));
    });
    case("apic.deadline_mode", |t| {
        const VECTOR: u8 = 0x71;
        if !bit((1, 0, C, 24)) {
            if !platform::umbra() {
                return t.skip("emulators answer MSRs that they do not offer");
            }
            t.faults("TSC_DEADLINE that is not offered", try_rdmsr(MSR_TSC_DEADLINE), GP, Some(0));
            return;
        }
        guests::trap::expect(VECTOR, guests::trap::Eoi::Lapic);
        lapic::write(lapic::LVT_TIMER, lapic::TSC_DEADLINE | u32::from(VECTOR));
        t.eq("the mode in LVT", lapic::read(lapic::LVT_TIMER) >> 17 & 3, 2u32);
        sti();
        wrmsr(MSR_TSC_DEADLINE, rdtsc() + 100_000);
        let arrived = wait_until(10_000_000_000, || guests::trap::count(VECTOR) == 1);
        cli();
        t.yes("an interrupt", arrived);
    });
    case("apic.x2apic_mode", |t| {
        let base = rdmsr(MSR_APIC_BASE);
        if !bit((1, 0, C, 21)) {
            if !t.skip_on_bare_tcg("the mode bits of IA32_APIC_BASE are not checked") {
                t.faults("EXTD that is not offered", try_wrmsr(MSR_APIC_BASE, base | EXTD), GP, Some(0));
            }
            return;
        }
        if !platform::umbra() {
            return t.skip("not every emulator enables the APIC again");
        }
        let version = lapic::read(lapic::VERSION);
        wrmsr(MSR_APIC_BASE, base | EXTD);
        let (id, got_version) = (try_rdmsr(0x802), try_rdmsr(0x803));
        let logical = try_rdmsr(0x80d);
        // Back to xAPIC mode goes through disabled (SDM vol. 3, 11.12.5).
        wrmsr(MSR_APIC_BASE, base & !(EN | EXTD));
        wrmsr(MSR_APIC_BASE, base);
        lapic::quiet();
        if let Some(id) = t.works("the id's register", id) {
            ids(t, id as u32);
            // Cluster and bit within it (SDM vol. 3, 11.12.10.2).
            t.eq("the logical id that follows from it", logical.unwrap_or(0), id >> 4 << 16 | 1 << (id & 15));
        }
        t.eq("the version", got_version.unwrap_or(0), version);
    });
}

/// Every leaf that names the APIC id says `id`.
fn ids(t: &mut Case, id: u32) {
    t.eq("leaf 1", leaf(1, 0)[B] >> 24, id & 0xff);
    for number in [0xb, 0x1f] {
        if leaf(number, 0)[C] >> 8 & 0xff != 0 {
            for level in 0..3 {
                t.eq("the x2APIC id of a topology leaf", leaf(number, level)[D], id);
            }
        }
    }
    if amd() && bit((EXT1, 0, C, 22)) {
        t.eq("8000_001Eh", leaf(0x8000_001e, 0)[A], id);
    }
}
