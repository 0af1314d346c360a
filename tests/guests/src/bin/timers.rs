//! Clocks against clocks: PIT, local APIC timer, ACPI timer, RTC and TSC must agree with one another. Nothing here knows
//! what a second of the outside world is.
#![no_std]
#![no_main]
use guests::dev::{acpi_timer, lapic, pic, pit, rtc};
use guests::main;
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, Eoi};

main!(run);

const VECTOR: u8 = 0x50;
/// Ticks of the TSC that no healthy wait needs.
const LONG: u64 = 20_000_000_000;

fn run() {
    pit_cases();
    acpi_timer_cases();
    lapic_cases();
    deadline_cases();
    rtc_cases();
    hlt_cases();
}

/// Measures until `attempt` is within `percent` of `want`, twenty times at most: an emulator's host may be busy.
fn close(t: &mut Case, what: &str, want: u64, percent: u64, mut attempt: impl FnMut() -> Option<u64>) {
    let slack = want * percent / 100;
    let mut last = 0;
    for _ in 0..20 {
        let Some(got) = attempt() else {
            return t.check(false, format_args!("{what}, got no end of the wait"));
        };
        last = got;
        if got.abs_diff(want) <= slack {
            break;
        }
    }
    t.within(what, last, want - slack, want + slack);
}

/// ACPI timer ticks while `wait` runs; nothing when it gave up.
fn acpi_ticks(wait: impl FnOnce() -> bool) -> Option<u64> {
    let start = acpi_timer::read();
    wait().then(|| u64::from(acpi_timer::elapsed(start, acpi_timer::read())))
}

/// Spins for `ticks` of the ACPI timer.
fn acpi_wait(ticks: u32) -> bool {
    let start = acpi_timer::read();
    wait_until(LONG, || acpi_timer::elapsed(start, acpi_timer::read()) >= ticks)
}

fn pit_cases() {
    case("pit.channel_2_mode_0", |t| {
        // The ACPI timer runs three times as fast as the PIT, by the crystal.
        pit::gate2(true);
        close(t, "ACPI ticks for 50000 of the PIT", 150_000, 10, || {
            pit::program(2, 0, 50_000);
            acpi_ticks(|| wait_until(LONG, pit::out2))
        });
        pit::gate2(false);
    });
    case("pit.channel_2_out_starts_low", |t| {
        pit::gate2(true);
        pit::program(2, 0, 0xffff);
        t.yes("OUT low while counting in mode 0", !pit::out2());
        pit::gate2(false);
    });
    case("pit.port_61_gate_reads_back", |t| {
        pit::gate2(true);
        t.eq("gate", inb(0x61) & 1, 1u8);
        pit::gate2(false);
        t.eq("gate", inb(0x61) & 1, 0u8);
    });
    case("pit.channel_2_mode_3_toggles", |t| {
        pit::gate2(true);
        pit::program(2, 3, 20_000);
        t.yes("OUT high", wait_until(LONG, pit::out2));
        t.yes("OUT low", wait_until(LONG, || !pit::out2()));
        t.yes("OUT high again", wait_until(LONG, pit::out2));
        pit::gate2(false);
    });
    case("pit.gate_edge_starts_mode_1", |t| {
        if t.skip_on_bare_tcg("OUT is inverted in mode 1") {
            return;
        }
        // One-shot: OUT goes low when the gate rises. Intel 8254, mode 1.
        pit::gate2(false);
        pit::program(2, 1, 30_000);
        t.yes("OUT high before the trigger", wait_until(LONG, pit::out2));
        pit::gate2(true);
        t.yes("OUT low after it", wait_until(LONG, || !pit::out2()));
        t.yes("OUT high at the end", wait_until(LONG, pit::out2));
        pit::gate2(false);
    });
    case("pit.counts_down", |t| {
        pit::program(0, 2, 0xffff);
        let first = pit::read(0);
        acpi_wait(3000);
        let second = pit::read(0);
        t.check(second < first || first < 3000, format_args!("less than {first}, got {second}"));
        pit::stop();
    });
    case("pit.count_stays_in_range", |t| {
        pit::program(0, 2, 1000);
        for _ in 0..2000 {
            t.within("count", pit::read(0).into(), 1, 1000);
        }
        pit::stop();
    });
    case("pit.latch_holds", |t| {
        pit::program(0, 2, 0xffff);
        outb(0x43, 0);
        acpi_wait(2000);
        // A second latch command before the read is ignored. Intel 8254, counter latch command.
        outb(0x43, 0);
        let latched = u16::from(inb(0x40)) | u16::from(inb(0x40)) << 8;
        let now = pit::read(0);
        t.check(latched > now, format_args!("an older count than {now}, got {latched}"));
        pit::stop();
    });
    case("pit.read_back_status", |t| {
        pit::program(0, 2, 0x1234);
        t.eq("status without OUT and null count", pit::status(0) & 0x3f, 0x34u8);
        pit::program(0, 3, 0x1234);
        t.eq("status in mode 3", pit::status(0) & 0x3f, 0x36u8);
        pit::stop();
    });
    case("pit.low_byte_only", |t| {
        outb(0x43, 0x14); // channel 0, low byte, mode 2
        outb(0x40, 200);
        for _ in 0..100 {
            outb(0x43, 0);
            t.within("count", inb(0x40).into(), 1, 200);
        }
        pit::stop();
    });
    case("pit.rate_of_mode_2", |t| {
        let ticks = periods(2, 6000, 20);
        close(t, "ACPI ticks for 20 periods of 6000", 360_000, 10, || ticks.or_else(|| periods(2, 6000, 20)));
    });
    case("pit.rate_of_mode_3", |t| {
        close(t, "ACPI ticks for 20 periods of 6000", 360_000, 10, || periods(3, 6000, 20));
    });
    case("pit.mode_0_interrupts_once", |t| {
        trap::expect(pic::BASE, Eoi::Master);
        pic::unmask(0);
        pit::program(0, 0, 5000);
        sti();
        t.yes("an interrupt", wait_until(LONG, || trap::count(pic::BASE) >= 1));
        acpi_wait(60_000);
        cli();
        t.eq("interrupts", trap::count(pic::BASE), 1u32);
    });
    case("pit.count_65536", |t| {
        close(t, "ACPI ticks for 3 periods of 65536", 589_824, 10, || periods(2, 0, 3));
    });
}

/// ACPI ticks for `count` periods of PIT channel 0, by its interrupts.
fn periods(mode: u8, reload: u16, count: u32) -> Option<u64> {
    trap::reset();
    trap::expect(pic::BASE, Eoi::Master);
    pic::unmask(0);
    pit::program(0, mode, reload);
    sti();
    // From the first interrupt on, so that programming does not count.
    wait_until(LONG, || trap::count(pic::BASE) >= 1);
    let got = acpi_ticks(|| wait_until(LONG, || trap::count(pic::BASE) > count));
    cli();
    pit::stop();
    pic::mask_all();
    got
}

fn acpi_timer_cases() {
    case("acpi_timer.advances", |t| {
        let first = acpi_timer::read();
        t.yes("another value", wait_until(LONG, || acpi_timer::read() != first));
    });
    case("acpi_timer.never_back", |t| {
        let mut last = acpi_timer::read();
        for _ in 0..3000 {
            let now = acpi_timer::read();
            t.yes("a step of less than half the range", acpi_timer::elapsed(last, now) < 0x80_0000);
            last = now;
        }
    });
    case("acpi_timer.steady_against_the_tsc", |t| {
        let rate = || {
            let start = rdtsc();
            acpi_wait(200_000);
            rdtsc() - start
        };
        let first = rate();
        close(t, "TSC ticks for 200000 of the ACPI timer", first, 10, || Some(rate()));
    });
}

/// Local APIC timer ticks in 100000 of the ACPI timer.
fn lapic_rate() -> u32 {
    lapic::timer(lapic::MASKED, lapic::DIVIDE_1, !0);
    let start = lapic::read(lapic::TMCCT);
    acpi_wait(100_000);
    start - lapic::read(lapic::TMCCT)
}

fn lapic_cases() {
    case("lapic_timer.counts_down_to_zero", |t| {
        lapic::timer(lapic::MASKED, lapic::DIVIDE_1, 5_000_000);
        let first = lapic::read(lapic::TMCCT);
        t.within("current count", first.into(), 1, 5_000_000);
        let second = lapic::read(lapic::TMCCT);
        t.check(second < first, format_args!("less than {first}, got {second}"));
        t.yes("zero in the end", wait_until(LONG, || lapic::read(lapic::TMCCT) == 0));
        t.eq("initial count", lapic::read(lapic::TMICT), 5_000_000u32);
    });
    case("lapic_timer.steady_against_the_acpi_timer", |t| {
        let first = u64::from(lapic_rate());
        close(t, "timer ticks for 100000 of the ACPI timer", first, 10, || Some(lapic_rate().into()));
    });
    case("lapic_timer.divide_configurations", |t| {
        // Intel SDM vol. 3, figure 11-10: 2, 4, 8, 16, 32, 64, 128, 1.
        let ticks = |divide: u32| {
            lapic::timer(lapic::MASKED, divide, !0);
            let start = lapic::read(lapic::TMCCT);
            acpi_wait(50_000);
            u64::from(start - lapic::read(lapic::TMCCT))
        };
        for (divide, by) in [
            (0b0000, 2u64),
            (0b0001, 4),
            (0b0010, 8),
            (0b0011, 16),
            (0b1000, 32),
            (0b1001, 64),
            (0b1010, 128),
        ] {
            close(t, "a hundred times the divider", 100 * by, 15, || {
                let base = ticks(lapic::DIVIDE_1);
                Some(base * 100 / ticks(divide).max(1))
            });
            t.eq("TDCR", lapic::read(lapic::TDCR), divide);
        }
    });
    case("lapic_timer.one_shot_duration", |t| {
        close(t, "ACPI ticks for a shot of 100000 of them", 100_000, 10, || {
            let rate = lapic_rate();
            trap::reset();
            trap::expect(VECTOR, Eoi::Lapic);
            sti();
            let got = acpi_ticks(|| {
                lapic::timer(VECTOR.into(), lapic::DIVIDE_1, rate);
                wait_until(LONG, || trap::count(VECTOR) >= 1)
            });
            cli();
            got
        });
    });
    case("lapic_timer.periodic_rate", |t| {
        close(t, "ACPI ticks for 20 periods of 10000 of them", 200_000, 10, || {
            let rate = lapic_rate();
            trap::reset();
            trap::expect(VECTOR, Eoi::Lapic);
            lapic::timer(lapic::PERIODIC | u32::from(VECTOR), lapic::DIVIDE_1, rate / 10);
            sti();
            let got = acpi_ticks(|| wait_until(LONG, || trap::count(VECTOR) >= 20));
            cli();
            lapic::write(lapic::TMICT, 0);
            got
        });
    });
    case("lapic_timer.periodic_reloads", |t| {
        lapic::timer(lapic::MASKED | lapic::PERIODIC, lapic::DIVIDE_1, 300_000);
        let mut seen_up = false;
        let mut last = lapic::read(lapic::TMCCT);
        wait_until(LONG, || {
            let now = lapic::read(lapic::TMCCT);
            seen_up |= now > last;
            last = now;
            seen_up
        });
        t.yes("a count that starts again", seen_up);
        lapic::write(lapic::TMICT, 0);
    });
    case("lapic_timer.zero_stops", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        lapic::timer(VECTOR.into(), lapic::DIVIDE_1, 3_000_000);
        lapic::write(lapic::TMICT, 0);
        sti();
        acpi_wait(100_000);
        cli();
        t.eq("interrupts", trap::count(VECTOR), 0u32);
        t.eq("current count", lapic::read(lapic::TMCCT), 0u32);
    });
    case("lapic_timer.restart_replaces", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        sti();
        for _ in 0..20 {
            lapic::timer(VECTOR.into(), lapic::DIVIDE_1, 500_000_000);
        }
        lapic::timer(VECTOR.into(), lapic::DIVIDE_1, 100_000);
        t.yes("the last shot", wait_until(LONG, || trap::count(VECTOR) >= 1));
        acpi_wait(50_000);
        cli();
        t.eq("interrupts", trap::count(VECTOR), 1u32);
    });
    case("lapic_timer.vector_change_while_running", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        trap::expect(VECTOR + 1, Eoi::Lapic);
        lapic::timer(VECTOR.into(), lapic::DIVIDE_1, 10_000_000);
        lapic::write(lapic::LVT_TIMER, u32::from(VECTOR) + 1);
        sti();
        t.yes("an interrupt", wait_until(LONG, || trap::count(VECTOR) + trap::count(VECTOR + 1) >= 1));
        cli();
        t.eq("interrupts with the new vector", trap::count(VECTOR + 1), 1u32);
    });
}

fn deadline_cases() {
    let offered = |t: &mut Case| {
        if !lapic::deadline_offered() {
            t.skip("CPUID does not offer TSC-deadline mode");
        }
        lapic::deadline_offered()
    };
    case("tsc_deadline.arrives_on_time", |t| {
        if !offered(t) {
            return;
        }
        trap::expect(VECTOR, Eoi::Lapic);
        lapic::write(lapic::LVT_TIMER, lapic::TSC_DEADLINE | u32::from(VECTOR));
        sti();
        for round in 1..=20u32 {
            let deadline = rdtsc() + 2_000_000;
            wrmsr(MSR_TSC_DEADLINE, deadline);
            t.yes("an interrupt", wait_until(LONG, || trap::count(VECTOR) >= round));
            t.yes("not before the deadline", rdtsc() >= deadline);
            t.eq("IA32_TSC_DEADLINE afterwards", rdmsr(MSR_TSC_DEADLINE), 0u64);
        }
        cli();
    });
    case("tsc_deadline.in_the_past_is_now", |t| {
        if !offered(t) {
            return;
        }
        trap::expect(VECTOR, Eoi::Lapic);
        lapic::write(lapic::LVT_TIMER, lapic::TSC_DEADLINE | u32::from(VECTOR));
        sti();
        wrmsr(MSR_TSC_DEADLINE, 1);
        t.yes("an interrupt", wait_until(LONG, || trap::count(VECTOR) >= 1));
        cli();
        t.eq("interrupts", trap::count(VECTOR), 1u32);
    });
    case("tsc_deadline.zero_disarms", |t| {
        if !offered(t) {
            return;
        }
        trap::expect(VECTOR, Eoi::Lapic);
        lapic::write(lapic::LVT_TIMER, lapic::TSC_DEADLINE | u32::from(VECTOR));
        wrmsr(MSR_TSC_DEADLINE, rdtsc() + 5_000_000);
        wrmsr(MSR_TSC_DEADLINE, 0);
        sti();
        delay(20_000_000);
        cli();
        t.eq("interrupts", trap::count(VECTOR), 0u32);
    });
    case("tsc_deadline.ignored_in_other_modes", |t| {
        if !offered(t) {
            return;
        }
        trap::expect(VECTOR, Eoi::Lapic);
        lapic::write(lapic::LVT_TIMER, VECTOR.into());
        wrmsr(MSR_TSC_DEADLINE, rdtsc() + 1000);
        t.eq("IA32_TSC_DEADLINE in one-shot mode", rdmsr(MSR_TSC_DEADLINE), 0u64);
        sti();
        delay(10_000_000);
        cli();
        t.eq("interrupts", trap::count(VECTOR), 0u32);
    });
    case("tsc_deadline.count_registers_are_off", |t| {
        if !offered(t) {
            return;
        }
        lapic::write(lapic::LVT_TIMER, lapic::TSC_DEADLINE | lapic::MASKED);
        lapic::write(lapic::TMICT, 1000);
        t.eq("current count", lapic::read(lapic::TMCCT), 0u32);
    });
    case("tsc_deadline.follows_tsc_adjust", |t| {
        if !offered(t) || !has(7, 0, |r| r.ebx, 1) {
            return t.skip("no TSC-deadline mode or no TSC_ADJUST");
        }
        trap::expect(VECTOR, Eoi::Lapic);
        lapic::write(lapic::LVT_TIMER, lapic::TSC_DEADLINE | u32::from(VECTOR));
        let old = rdmsr(MSR_TSC_ADJUST);
        wrmsr(MSR_TSC_DEADLINE, rdtsc() + (1 << 44));
        sti();
        delay(1_000_000);
        t.eq("interrupts before the jump", trap::count(VECTOR), 0u32);
        wrmsr(MSR_TSC_ADJUST, old + (1 << 45));
        let arrived = wait_until(LONG, || trap::count(VECTOR) >= 1);
        cli();
        wrmsr(MSR_TSC_ADJUST, old);
        t.yes("an interrupt after the TSC jumped over the deadline", arrived);
    });
}

fn rtc_cases() {
    case("rtc.register_d_valid", |t| t.eq("register D", rtc::read(rtc::D), 0x80u8));
    case("rtc.time_is_plausible", |t| {
        let now = rtc::seconds_of_day();
        t.within("seconds of the day", now.unwrap_or(u32::MAX).into(), 0, 86_399);
        let number = |index| {
            let raw = rtc::read(index);
            if rtc::read(rtc::B) & 4 != 0 {
                raw
            } else {
                (raw >> 4) * 10 + (raw & 15)
            }
        };
        t.within("day", number(7).into(), 1, 31);
        t.within("month", number(8).into(), 1, 12);
        t.within("year", number(9).into(), 0, 99);
    });
    case("rtc.second_against_the_acpi_timer", |t| {
        let next = || {
            let now = rtc::read(0);
            wait_until(LONG, || rtc::read(0) != now)
        };
        next();
        close(t, "ACPI ticks for one second", acpi_timer::HZ, 5, || acpi_ticks(next));
    });
    case("rtc.update_in_progress", |t| {
        t.yes("UIP set once in a second", wait_until(LONG, rtc::updating));
        t.yes("UIP clear again", wait_until(LONG, || !rtc::updating()));
    });
    case("rtc.update_ended_flag", |t| {
        rtc::read(rtc::C);
        t.yes("UF in register C", wait_until(LONG, || rtc::read(rtc::C) & 0x10 != 0));
        t.eq("register C after reading it", rtc::read(rtc::C) & 0x10, 0u8);
    });
    case("rtc.periodic_flag_without_interrupt", |t| {
        rtc::write(rtc::A, 0x26);
        let b = rtc::read(rtc::B);
        rtc::write(rtc::B, b & !0x70 | 0x40);
        rtc::read(rtc::C);
        t.yes("PF in register C", wait_until(LONG, || rtc::read(rtc::C) & 0x40 != 0));
        rtc::write(rtc::B, b & !0x70);
        rtc::read(rtc::C);
    });
    case("rtc.periodic_rate", |t| {
        let b = rtc::read(rtc::B) & !0x70;
        // 1024 Hz; 64 periods are a sixteenth of a second.
        close(t, "ACPI ticks for 64 periods", acpi_timer::HZ / 16, 10, || {
            trap::reset();
            trap::on(pic::BASE + 8, Eoi::Slave, |_| _ = rtc::read(rtc::C));
            pic::unmask(8);
            rtc::write(rtc::A, 0x26);
            rtc::write(rtc::B, b | 0x40);
            rtc::read(rtc::C);
            sti();
            wait_until(LONG, || trap::count(pic::BASE + 8) >= 1);
            let got = acpi_ticks(|| wait_until(LONG, || trap::count(pic::BASE + 8) > 64));
            cli();
            rtc::write(rtc::B, b);
            rtc::read(rtc::C);
            got
        });
    });
    case("rtc.no_second_interrupt_before_register_c", |t| {
        trap::expect(pic::BASE + 8, Eoi::Slave);
        pic::unmask(8);
        let b = rtc::read(rtc::B) & !0x70;
        rtc::write(rtc::A, 0x26);
        rtc::write(rtc::B, b | 0x40);
        rtc::read(rtc::C);
        sti();
        wait_until(LONG, || trap::count(pic::BASE + 8) >= 1);
        // One more may be latched in the 8259: the periodic flag may have been set before its enable bit was.
        acpi_wait(10_000);
        let settled = trap::count(pic::BASE + 8);
        acpi_wait(50_000);
        cli();
        t.yes("at most the latched interrupt and one more", settled <= 2);
        t.eq("interrupts while register C is not read", trap::count(pic::BASE + 8), settled);
        rtc::write(rtc::B, b);
        rtc::read(rtc::C);
    });
    case("rtc.update_interrupt", |t| {
        trap::on(pic::BASE + 8, Eoi::Slave, |_| _ = rtc::read(rtc::C));
        pic::unmask(8);
        let b = rtc::read(rtc::B) & !0x70;
        rtc::write(rtc::B, b | 0x10);
        rtc::read(rtc::C);
        sti();
        t.yes("an interrupt within a second or two", wait_until(LONG, || trap::count(pic::BASE + 8) >= 1));
        cli();
        rtc::write(rtc::B, b);
        rtc::read(rtc::C);
    });
}

fn hlt_cases() {
    case("hlt.until_pit_tick", |t| {
        trap::expect(pic::BASE, Eoi::Master);
        pic::unmask(0);
        pit::program(0, 2, 12_000);
        let round = || {
            let before = trap::count(pic::BASE);
            acpi_ticks(|| {
                while trap::count(pic::BASE) < before + 10 {
                    sti_hlt();
                    cli();
                }
                true
            })
        };
        round();
        close(t, "ACPI ticks for 10 halts of 12000", 360_000, 10, round);
        pit::stop();
    });
    case("hlt.tsc_runs_on", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        let spin = {
            let start = rdtsc();
            acpi_wait(100_000);
            rdtsc() - start
        };
        // The same time asleep: the TSC must not have stopped.
        close(t, "TSC ticks while halted for 100000 of the ACPI timer", spin, 25, || {
            lapic::timer(lapic::MASKED, lapic::DIVIDE_1, !0);
            let start = lapic::read(lapic::TMCCT);
            acpi_wait(100_000);
            let count = start - lapic::read(lapic::TMCCT);
            let start = rdtsc();
            lapic::timer(VECTOR.into(), lapic::DIVIDE_1, count);
            sti_hlt();
            cli();
            Some(rdtsc() - start)
        });
    });
}
