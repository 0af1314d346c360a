//! NMIs: sent to oneself, blocked until IRET, waking HLT.
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};
use guests::dev::{ioapic, lapic, pit};
use guests::exec;
use guests::prelude::*;
use guests::report::case;
use guests::trap::{self, Eoi, NMI};

const LONG: u64 = 4_000_000_000;

fn send() {
    lapic::ipi(lapic::id(), lapic::MODE_NMI | lapic::ASSERT);
}

pub(crate) fn run() {
    case("nmi.arrives_with_if_clear", |t| {
        trap::expect(NMI, Eoi::None);
        send();
        t.yes("an arrival", wait_until(LONG, || trap::count(NMI) == 1));
    });
    case("nmi.many", |t| {
        trap::expect(NMI, Eoi::None);
        for round in 1..=200 {
            send();
            if !wait_until(LONG, || trap::count(NMI) >= round) {
                break;
            }
        }
        t.eq("arrivals", trap::count(NMI), 200u32);
    });
    case("nmi.blocked_until_iret", |t| {
        static INSIDE: AtomicU32 = AtomicU32::new(0);
        trap::on(NMI, Eoi::None, |_| {
            if trap::count(NMI) == 1 {
                send();
                delay(1_000_000);
                INSIDE.store(trap::count(NMI), SeqCst);
            }
        });
        send();
        wait_until(LONG, || trap::count(NMI) >= 2);
        t.eq("arrivals inside the first handler", INSIDE.load(SeqCst), 1u32);
        t.eq("arrivals after its IRET", trap::count(NMI), 2u32);
    });
    case("nmi.several_blocked_become_one", |t| {
        trap::on(NMI, Eoi::None, |_| {
            if trap::count(NMI) == 1 {
                (0..5).for_each(|_| send());
                delay(1_000_000);
            }
        });
        send();
        delay(2_000_000);
        t.eq("arrivals", trap::count(NMI), 2u32);
    });
    case("nmi.iret_of_an_exception_unblocks", |t| {
        // Any IRET ends the blocking, also that of an exception inside the handler. AMD APM vol. 2, 8.2.3.
        static AFTER: AtomicU32 = AtomicU32::new(0);
        trap::expect(trap::BP, Eoi::None);
        trap::ist(NMI, 0);
        trap::on(NMI, Eoi::None, |_| {
            if trap::count(NMI) == 1 {
                send();
                exec!("int3");
                delay(1_000_000);
                AFTER.store(trap::count(NMI), SeqCst);
            }
        });
        send();
        wait_until(LONG, || AFTER.load(SeqCst) != 0);
        t.eq("arrivals inside the first handler after INT3's IRET", AFTER.load(SeqCst), 2u32);
    });
    case("nmi.wakes_hlt", |t| {
        trap::expect(NMI, Eoi::None);
        // From the PIT through the I/O APIC in NMI mode; HLT with IF clear ends by nothing else. Periodic, so that one
        // that comes before HLT is not the last.
        ioapic::set_entry(2, 4 << 8);
        pit::program(0, 2, 6000);
        for _ in 0..10 {
            exec!("hlt");
        }
        ioapic::set_entry(2, ioapic::MASKED);
        pit::stop();
        t.yes("ten wake-ups", trap::count(NMI) >= 10);
    });
    case("nmi.with_interrupt_pending", |t| {
        trap::expect(NMI, Eoi::None);
        trap::expect(0x50, Eoi::Lapic);
        lapic::self_ipi(0x50);
        send();
        wait_until(LONG, || trap::count(NMI) == 1);
        t.eq("NMIs with IF clear", trap::count(NMI), 1u32);
        t.eq("interrupts with IF clear", trap::count(0x50), 0u32);
        sti();
        exec!("nop");
        cli();
        t.eq("interrupts with IF set", trap::count(0x50), 1u32);
    });
    case("nmi.software_int_2", |t| {
        trap::expect(NMI, Eoi::None);
        exec!("int 2");
        exec!("int 2");
        t.eq("arrivals", trap::count(NMI), 2u32);
    });
}
