//! Interrupts through the 8259s: PIT on line 0, UART on line 4, RTC on line 8. LINT0 passes them through.
use guests::dev::{lapic, pic, pit, rtc};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, Eoi};

const PIT: u8 = pic::BASE;
const UART: u8 = pic::BASE + 4;
const RTC: u8 = pic::BASE + 8;
/// Ticks of the TSC that no healthy case needs.
const LONG: u64 = 4_000_000_000;

/// Lets the UART's "transmitter empty" interrupt be pending: a line that stays high until its IIR is read.
pub(crate) fn raise_uart() {
    wait_until(LONG, || inb(0x3fd) & 0x40 != 0);
    outb(0x3fc, 0x0b);
    outb(0x3f9, 0);
    outb(0x3f9, 2);
}

/// Drops the UART's line and forbids it.
pub(crate) fn drop_uart() {
    inb(0x3fa);
    outb(0x3f9, 0);
    outb(0x3fc, 3);
}

pub(crate) fn run() {
    case("pic.pit_arrives", |t| {
        trap::expect(PIT, Eoi::Master);
        pic::unmask(0);
        pit::program(0, 2, 2000);
        sti();
        t.yes("ten ticks of the PIT", wait_until(LONG, || trap::count(PIT) >= 10));
        cli();
        pit::stop();
    });
    case("pic.masked_line_stays_pending", |t| {
        trap::expect(PIT, Eoi::Master);
        pit::program(0, 2, 2000);
        sti();
        let pending = wait_until(LONG, || pic::irr() & 1 != 0);
        t.yes("a pending request in IRR", pending);
        t.eq("arrivals while masked", trap::count(PIT), 0u32);
        pic::unmask(0);
        t.yes("arrival after unmasking", wait_until(LONG, || trap::count(PIT) > 0));
        cli();
        pit::stop();
    });
    case("pic.if_clear_holds_it_back", |t| {
        trap::expect(PIT, Eoi::Master);
        pic::unmask(0);
        pit::program(0, 2, 2000);
        t.yes("a pending request in IRR", wait_until(LONG, || pic::irr() & 1 != 0));
        t.eq("arrivals with IF clear", trap::count(PIT), 0u32);
        sti();
        t.yes("arrival with IF set", wait_until(LONG, || trap::count(PIT) > 0));
        cli();
        pit::stop();
    });
    case("pic.no_eoi_no_second", |t| {
        trap::expect(PIT, Eoi::None);
        pic::unmask(0);
        pit::program(0, 2, 2000);
        sti();
        t.yes("the first arrival", wait_until(LONG, || trap::count(PIT) == 1));
        t.yes("ISR bit 0 set", pic::isr() & 1 != 0);
        // Three more periods at least, by the PIT's own count.
        wait_until(LONG, || pit::read(0) < 1000);
        wait_until(LONG, || pit::read(0) > 1500);
        wait_until(LONG, || pit::read(0) < 1000);
        t.eq("arrivals without EOI", trap::count(PIT), 1u32);
        pic::eoi(0);
        t.yes("the second arrival after EOI", wait_until(LONG, || trap::count(PIT) >= 2));
        cli();
        pit::stop();
        pic::eoi(0);
    });
    case("pic.uart_arrives", |t| {
        trap::on(UART, Eoi::Master, |_| drop_uart());
        pic::unmask(4);
        sti();
        raise_uart();
        t.yes("the UART's interrupt", wait_until(LONG, || trap::count(UART) >= 1));
        delay(1_000_000);
        cli();
        t.eq("arrivals", trap::count(UART), 1u32);
    });
    case("pic.priority", |t| {
        trap::on(UART, Eoi::Master, |_| drop_uart());
        trap::on(PIT, Eoi::Master, |_| pit::stop());
        pic::set_mask(!0x11);
        raise_uart();
        pit::program(0, 2, 2000);
        t.yes("both pending", wait_until(LONG, || pic::irr() & 0x11 == 0x11));
        sti();
        wait_until(LONG, || trap::count(UART) > 0);
        cli();
        let (order, len) = trap::order();
        t.check(order[..len] == [PIT, UART], format_args!("line 0 before line 4, got {:x?}", &order[..len]));
    });
    case("pic.slave_line_8", |t| {
        trap::on(RTC, Eoi::Slave, |_| {
            rtc::read(rtc::C);
        });
        rtc_periodic(true);
        pic::unmask(8);
        sti();
        t.yes("five periodic interrupts of the RTC", wait_until(LONG, || trap::count(RTC) >= 5));
        cli();
        rtc_periodic(false);
    });
    case("pic.automatic_eoi", |t| {
        pic::init_with(pic::BASE, pic::BASE + 8, 3);
        trap::expect(PIT, Eoi::None);
        pic::unmask(0);
        pit::program(0, 2, 2000);
        sti();
        t.yes("five ticks without EOI", wait_until(LONG, || trap::count(PIT) >= 5));
        cli();
        pit::stop();
        pic::init();
    });
    case("pic.other_vectors", |t| {
        pic::init_with(0x70, 0x78, 1);
        trap::expect(0x70, Eoi::Master);
        pic::unmask(0);
        pit::program(0, 2, 2000);
        sti();
        t.yes("ticks at vector 70h", wait_until(LONG, || trap::count(0x70) >= 3));
        cli();
        pit::stop();
        t.eq("ticks at vector 20h", trap::count(PIT), 0u32);
        pic::init();
    });
    case("pic.poll_command", |t| {
        pic::unmask(0);
        pit::program(0, 2, 2000);
        t.yes("a pending request", wait_until(LONG, || pic::irr() & 1 != 0));
        outb(0x20, 0x0c);
        // Intel 8259A, poll mode: bit 7 says there is one, the low bits which; the read acknowledges it.
        t.eq("poll word", inb(0x20), 0x80u8);
        t.yes("ISR bit 0 set", pic::isr() & 1 != 0);
        pit::stop();
        pic::eoi(0);
    });
    case("pic.specific_eoi", |t| {
        trap::expect(PIT, Eoi::None);
        pic::unmask(0);
        pit::program(0, 2, 2000);
        sti();
        wait_until(LONG, || trap::count(PIT) == 1);
        cli();
        pit::stop();
        outb(0x20, 0x61); // the wrong line
        t.yes("line 0 still in service", pic::isr() & 1 != 0);
        outb(0x20, 0x60);
        t.yes("line 0 no longer in service", pic::isr() & 1 == 0);
    });
    case("pic.lint0_masked", |t| {
        trap::expect(PIT, Eoi::Master);
        lapic::write(lapic::LVT_LINT0, lapic::MASKED | 0x700);
        pic::unmask(0);
        pit::program(0, 2, 2000);
        sti();
        wait_until(LONG, || pic::irr() & 1 != 0);
        delay(3_000_000);
        t.eq("arrivals with LINT0 masked", trap::count(PIT), 0u32);
        cli();
        pit::stop();
    });
    case("pic.mask_reads_back", |t| {
        for mask in [0u16, 0x5aa5, 0xffff] {
            pic::set_mask(mask);
            t.eq("mask", pic::mask(), mask);
        }
    });
    case("pic.tpr_does_not_matter", external_ignores_tpr);
}

/// ExtINT goes past the local APIC's priorities. Intel SDM vol. 3, 11.5.1.
fn external_ignores_tpr(t: &mut Case) {
    trap::expect(PIT, Eoi::Master);
    lapic::write(lapic::TPR, 0xf0);
    pic::unmask(0);
    pit::program(0, 2, 2000);
    sti();
    t.yes("a tick with TPR 0xf0", wait_until(LONG, || trap::count(PIT) >= 2));
    cli();
    pit::stop();
}

/// Periodic interrupt at 1024 Hz on or off.
pub(crate) fn rtc_periodic(on: bool) {
    rtc::write(rtc::A, 0x26);
    let b = rtc::read(rtc::B) & !0x70;
    rtc::write(rtc::B, if on { b | 0x40 } else { b });
    rtc::read(rtc::C);
}
