//! HLT and what ends it.
use guests::dev::{ioapic, lapic, pic, pit};
use guests::exec;
use guests::prelude::*;
use guests::report::case;
use guests::trap::{self, Eoi};

const VECTOR: u8 = 0x55;

pub(crate) fn run() {
    case("hlt.wakes_by_pending_interrupt", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        for round in 1..=100u32 {
            lapic::self_ipi(VECTOR);
            // STI's shadow covers HLT: the interrupt comes out of the halt, not before it.
            sti_hlt();
            cli();
            t.eq("arrivals", trap::count(VECTOR), round);
        }
    });
    case("hlt.wakes_by_timer", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        lapic::timer(VECTOR.into(), lapic::DIVIDE_1, 1_000_000);
        sti_hlt();
        cli();
        t.eq("arrivals", trap::count(VECTOR), 1u32);
    });
    case("hlt.rip_is_behind", |t| {
        trap::on(VECTOR, Eoi::Lapic, |frame| frame.r15 = frame.rip);
        lapic::timer(VECTOR.into(), lapic::DIVIDE_1, 500_000);
        let (want, got): (u64, u64);
        exec!("lea {0}, [rip + 2f]", "sti", "hlt", "2: cli", out(reg) want, out("r15") got);
        t.eq("RIP", got, want);
    });
    case("hlt.idle_loop_with_periodic_timer", |t| {
        const ROUNDS: u32 = 3000;
        trap::expect(VECTOR, Eoi::Lapic);
        lapic::timer(lapic::PERIODIC | u32::from(VECTOR), lapic::DIVIDE_1, 100_000);
        while trap::count(VECTOR) < ROUNDS {
            sti_hlt();
            cli();
        }
        lapic::write(lapic::TMICT, 0);
        t.yes("thousands of wake-ups", trap::count(VECTOR) >= ROUNDS);
    });
    case("hlt.idle_loop_with_one_shots", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        for round in 1..=1000 {
            lapic::timer(VECTOR.into(), lapic::DIVIDE_1, 20_000);
            while trap::count(VECTOR) < round {
                sti_hlt();
                cli();
            }
        }
        t.eq("arrivals", trap::count(VECTOR), 1000u32);
    });
    case("hlt.wakes_by_pit_through_pic", |t| {
        trap::expect(pic::BASE, Eoi::Master);
        pic::unmask(0);
        pit::program(0, 2, 5000);
        while trap::count(pic::BASE) < 50 {
            sti_hlt();
            cli();
        }
        pit::stop();
        t.yes("fifty wake-ups", trap::count(pic::BASE) >= 50);
    });
    case("hlt.wakes_by_pit_through_ioapic", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        ioapic::set_entry(2, VECTOR.into());
        pit::program(0, 2, 5000);
        while trap::count(VECTOR) < 50 {
            sti_hlt();
            cli();
        }
        pit::stop();
        t.yes("fifty wake-ups", trap::count(VECTOR) >= 50);
    });
    case("hlt.masked_interrupt_does_not_wake", |t| {
        // A low request that the TPR masks, and a timer above it: only the timer ends the halt.
        trap::expect(VECTOR, Eoi::Lapic);
        trap::expect(0x45, Eoi::Lapic);
        set_cr8(4);
        lapic::self_ipi(0x45);
        lapic::timer(VECTOR.into(), lapic::DIVIDE_1, 500_000);
        sti_hlt();
        cli();
        t.eq("arrivals of the timer", trap::count(VECTOR), 1u32);
        t.eq("arrivals of the masked one", trap::count(0x45), 0u32);
        set_cr8(0);
        sti();
        exec!("nop");
        cli();
        t.eq("arrivals of the masked one afterwards", trap::count(0x45), 1u32);
    });
}
