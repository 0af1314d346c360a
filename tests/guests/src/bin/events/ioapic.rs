//! Interrupts through the I/O APIC, edge and level.
use crate::pic::{drop_uart, raise_uart, rtc_periodic};
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};
use guests::dev::ioapic::{self, LEVEL, MASKED, REMOTE_IRR};
use guests::dev::{lapic, pit, rtc};
use guests::prelude::*;
use guests::report::case;
use guests::trap::{self, Eoi};

/// ISA interrupt 0 is on pin 2. MADT, interrupt source override.
const PIT_PIN: u32 = 2;
const UART_PIN: u32 = 4;
const RTC_PIN: u32 = 8;
const VECTOR: u8 = 0x41;
const LONG: u64 = 4_000_000_000;

pub(crate) fn run() {
    case("ioapic.registers", |t| {
        t.eq("pins", ioapic::pins(), 24u32);
        t.within("version", u64::from(ioapic::read(1) & 0xff), 0x11, 0x20);
        for pin in 0..24 {
            let value = 0x0000_0000_0001_a7fcu64 & !0x5000 | u64::from(pin) << 56;
            ioapic::set_entry(pin, value);
            t.masked("redirection entry", ioapic::entry(pin), value, !(REMOTE_IRR | 1 << 12));
            ioapic::set_entry(pin, MASKED);
        }
    });
    case("ioapic.id_register", |t| {
        let old = ioapic::read(0);
        ioapic::write(0, 0x0500_0000);
        t.masked("id", ioapic::read(0), 0x0500_0000u32, 0x0f00_0000);
        ioapic::write(0, old);
    });
    case("ioapic.pit_edge", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        ioapic::set_entry(PIT_PIN, VECTOR.into());
        pit::program(0, 2, 2000);
        sti();
        t.yes("ten ticks", wait_until(LONG, || trap::count(VECTOR) >= 10));
        cli();
        pit::stop();
    });
    case("ioapic.masked_pin", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        ioapic::set_entry(PIT_PIN, MASKED | u64::from(VECTOR));
        pit::program(0, 2, 2000);
        sti();
        delay(5_000_000);
        t.eq("arrivals while masked", trap::count(VECTOR), 0u32);
        ioapic::set_entry(PIT_PIN, VECTOR.into());
        t.yes("arrivals after unmasking", wait_until(LONG, || trap::count(VECTOR) >= 1));
        cli();
        pit::stop();
    });
    case("ioapic.uart_edge_once", |t| {
        trap::expect(VECTOR, Eoi::Lapic);
        ioapic::set_entry(UART_PIN, VECTOR.into());
        sti();
        raise_uart();
        t.yes("an arrival", wait_until(LONG, || trap::count(VECTOR) >= 1));
        // The line is still high, but an edge-triggered pin reports it once.
        delay(2_000_000);
        cli();
        t.eq("arrivals", trap::count(VECTOR), 1u32);
        drop_uart();
    });
    case("ioapic.level_repeats_until_dropped", |t| {
        static LEFT: AtomicU32 = AtomicU32::new(0);
        LEFT.store(3, SeqCst);
        trap::on(VECTOR, Eoi::Lapic, |_| {
            // The third arrival drops the line; each EOI before it brings the next.
            if LEFT.fetch_sub(1, SeqCst) == 1 {
                drop_uart();
            }
        });
        ioapic::set_entry(UART_PIN, LEVEL | u64::from(VECTOR));
        sti();
        raise_uart();
        t.yes("three arrivals", wait_until(LONG, || trap::count(VECTOR) >= 3));
        delay(2_000_000);
        cli();
        t.eq("arrivals", trap::count(VECTOR), 3u32);
        t.eq("remote IRR afterwards", ioapic::entry(UART_PIN) & REMOTE_IRR, 0u64);
    });
    case("ioapic.remote_irr_until_eoi", |t| {
        trap::on(VECTOR, Eoi::None, |_| drop_uart());
        ioapic::set_entry(UART_PIN, LEVEL | u64::from(VECTOR));
        sti();
        raise_uart();
        t.yes("an arrival", wait_until(LONG, || trap::count(VECTOR) >= 1));
        cli();
        t.eq("remote IRR before EOI", ioapic::entry(UART_PIN) & REMOTE_IRR, REMOTE_IRR);
        t.yes("TMR says level", lapic::level(VECTOR));
        t.yes("in service", lapic::in_service(VECTOR));
        lapic::eoi();
        t.eq("remote IRR after EOI", ioapic::entry(UART_PIN) & REMOTE_IRR, 0u64);
        t.yes("not in service after EOI", !lapic::in_service(VECTOR));
    });
    case("ioapic.level_unmasked_while_high", |t| {
        trap::on(VECTOR, Eoi::Lapic, |_| drop_uart());
        ioapic::set_entry(UART_PIN, LEVEL | MASKED | u64::from(VECTOR));
        raise_uart();
        sti();
        delay(1_000_000);
        t.eq("arrivals while masked", trap::count(VECTOR), 0u32);
        ioapic::set_entry(UART_PIN, LEVEL | u64::from(VECTOR));
        t.yes("an arrival when unmasked", wait_until(LONG, || trap::count(VECTOR) >= 1));
        cli();
        drop_uart();
    });
    case("ioapic.rtc", |t| {
        trap::on(VECTOR, Eoi::Lapic, |_| {
            rtc::read(rtc::C);
        });
        ioapic::set_entry(RTC_PIN, VECTOR.into());
        rtc_periodic(true);
        sti();
        t.yes("five periodic interrupts", wait_until(LONG, || trap::count(VECTOR) >= 5));
        cli();
        rtc_periodic(false);
    });
    case("ioapic.logical_destination", |t| {
        lapic::write(lapic::DFR, !0);
        lapic::write(lapic::LDR, 1 << 24);
        trap::expect(VECTOR, Eoi::Lapic);
        ioapic::set_entry(PIT_PIN, 1 << 56 | 1 << 11 | u64::from(VECTOR));
        pit::program(0, 2, 2000);
        sti();
        t.yes("ticks", wait_until(LONG, || trap::count(VECTOR) >= 3));
        cli();
        ioapic::set_entry(PIT_PIN, MASKED);
        // A destination that does not include this CPU.
        ioapic::set_entry(PIT_PIN, 2 << 56 | 1 << 11 | u64::from(VECTOR));
        delay(1_000_000);
        sti();
        cli();
        trap::reset();
        trap::expect(VECTOR, Eoi::Lapic);
        sti();
        delay(5_000_000);
        cli();
        t.eq("ticks for another CPU", trap::count(VECTOR), 0u32);
        pit::stop();
        lapic::write(lapic::LDR, 0);
    });
    case("ioapic.lowest_priority_mode", |t| {
        lapic::write(lapic::DFR, !0);
        lapic::write(lapic::LDR, 1 << 24);
        trap::expect(VECTOR, Eoi::Lapic);
        ioapic::set_entry(PIT_PIN, 1 << 56 | 1 << 11 | 1 << 8 | u64::from(VECTOR));
        pit::program(0, 2, 2000);
        sti();
        t.yes("ticks", wait_until(LONG, || trap::count(VECTOR) >= 3));
        cli();
        pit::stop();
        lapic::write(lapic::LDR, 0);
    });
    case("ioapic.nmi_mode", |t| {
        if t.skip_on_bochs_svm(
            "a guest that spins with IF clear is not interrupted, so no device's time passes",
        ) || t.skip_on_bochs_without_timer("a guest that spins with IF clear is not interrupted")
        {
            return;
        }
        trap::expect(trap::NMI, Eoi::None);
        ioapic::set_entry(PIT_PIN, 4 << 8);
        pit::program(0, 2, 4000);
        t.yes("NMIs from the PIT with IF clear", wait_until(LONG, || trap::count(trap::NMI) >= 3));
        ioapic::set_entry(PIT_PIN, MASKED);
        pit::stop();
    });
}
