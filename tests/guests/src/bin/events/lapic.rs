//! The local APIC: self-IPIs, priorities, the interrupt shadow, the timer as an interrupt source.
use guests::dev::lapic::{self, IRR, PPR, TPR};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, catch, Eoi, GP};
use guests::{exec, multiboot, platform, Racy};

const LOW: u8 = 0x50;
const MIDDLE: u8 = 0x70;
const HIGH: u8 = 0x90;
const LONG: u64 = 4_000_000_000;

static RIP: Racy<u64> = Racy::new(0);
static REP_BYTES: Racy<[u8; 4096]> = Racy::new([0; 4096]);

fn check_order(t: &mut Case, want: &[u8]) {
    let (order, len) = trap::order();
    t.check(order[..len] == *want, format_args!("arrivals {want:x?}, got {:x?}", &order[..len]));
}

fn expect_all() {
    for vector in [LOW, MIDDLE, HIGH] {
        trap::expect(vector, Eoi::Lapic);
    }
}

/// Opens interrupts for a moment; everything deliverable arrives.
fn window() {
    exec!("sti", "nop", "nop", "cli");
}

pub(crate) fn run() {
    basics();
    priorities();
    shadows();
    strings();
    case("lapic.timer_one_shot_arrives", |t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::timer(LOW.into(), lapic::DIVIDE_1, 100_000);
        sti();
        t.yes("an arrival", wait_until(LONG, || trap::count(LOW) >= 1));
        delay(1_000_000);
        cli();
        t.eq("arrivals", trap::count(LOW), 1u32);
        t.eq("current count afterwards", lapic::read(lapic::TMCCT), 0u32);
    });
    case("lapic.timer_masked", |t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::timer(lapic::MASKED | u32::from(LOW), lapic::DIVIDE_1, 100_000);
        sti();
        wait_until(LONG, || lapic::read(lapic::TMCCT) == 0);
        delay(1_000_000);
        cli();
        t.eq("arrivals", trap::count(LOW), 0u32);
    });
    case("lapic.timer_periodic_arrives", |t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::timer(lapic::PERIODIC | u32::from(LOW), lapic::DIVIDE_1, 200_000);
        sti();
        t.yes("fifty arrivals", wait_until(LONG, || trap::count(LOW) >= 50));
        cli();
        lapic::write(lapic::TMICT, 0);
    });
    x2apic();
    x2apic_registers();
}

fn basics() {
    case("lapic.registers", |t| {
        t.within("version", u64::from(lapic::read(lapic::VERSION) & 0xff), 0x10, 0x1f);
        t.within("highest LVT", u64::from(lapic::read(lapic::VERSION) >> 16 & 0xff), 3, 7);
        for value in [0u32, 0x10, 0xff] {
            lapic::write(TPR, value);
            t.eq("TPR", lapic::read(TPR), value);
        }
        lapic::write(TPR, 0);
        if !lapic::x2apic() {
            for value in [0x0100_0000u32, 0xff00_0000] {
                lapic::write(lapic::LDR, value);
                t.eq("LDR", lapic::read(lapic::LDR), value);
            }
            lapic::write(lapic::LDR, 0);
        }
        lapic::write(lapic::LVT_TIMER, 0x1_00ab);
        t.eq("LVT timer", lapic::read(lapic::LVT_TIMER), 0x1_00abu32);
    });
    case("lapic.self_ipi", |t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::self_ipi(LOW);
        t.yes("requested while IF is clear", lapic::requested(LOW));
        window();
        t.eq("arrivals", trap::count(LOW), 1u32);
        t.yes("IRR and ISR clear", !lapic::requested(LOW) && !lapic::in_service(LOW));
    });
    case("lapic.self_ipi_by_id", |t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::ipi(lapic::id(), lapic::ASSERT | u32::from(LOW));
        window();
        t.eq("arrivals", trap::count(LOW), 1u32);
    });
    case("lapic.self_ipi_by_logical_id", |t| {
        if t.skip_in_x2apic_mode("logical id of 8 bits") {
            return;
        }
        lapic::write(lapic::DFR, !0);
        lapic::write(lapic::LDR, 0x04 << 24);
        trap::expect(LOW, Eoi::Lapic);
        lapic::ipi(0x06, lapic::LOGICAL | lapic::ASSERT | u32::from(LOW));
        window();
        t.eq("arrivals for a set with this CPU", trap::count(LOW), 1u32);
        lapic::ipi(0x03, lapic::LOGICAL | lapic::ASSERT | u32::from(LOW));
        window();
        t.eq("arrivals for a set without it", trap::count(LOW), 1u32);
        lapic::write(lapic::LDR, 0);
    });
    case("lapic.all_including_self", |t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::ipi(0, lapic::ALL | lapic::ASSERT | u32::from(LOW));
        window();
        t.eq("arrivals", trap::count(LOW), 1u32);
    });
    case("lapic.all_but_self", |t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::ipi(0, lapic::OTHERS | lapic::ASSERT | u32::from(LOW));
        window();
        t.eq("arrivals", trap::count(LOW), 0u32);
    });
    case("lapic.every_vector", |t| {
        for vector in 32..255u8 {
            trap::expect(vector, Eoi::Lapic);
            lapic::self_ipi(vector);
            window();
            t.check(
                trap::count(vector) == 1,
                format_args!("one arrival of {vector:#x}, got {}", trap::count(vector)),
            );
        }
    });
    case("lapic.requests_collapse", |t| {
        trap::expect(LOW, Eoi::Lapic);
        (0..5).for_each(|_| lapic::self_ipi(LOW));
        window();
        t.eq("arrivals of five requests at once", trap::count(LOW), 1u32);
    });
    case("lapic.one_pending_behind_one_in_service", |t| {
        trap::expect(LOW, Eoi::None);
        lapic::self_ipi(LOW);
        window();
        lapic::self_ipi(LOW);
        lapic::self_ipi(LOW);
        t.yes("both in service and requested", lapic::in_service(LOW) && lapic::requested(LOW));
        window();
        t.eq("arrivals before EOI", trap::count(LOW), 1u32);
        lapic::eoi();
        window();
        t.eq("arrivals after EOI", trap::count(LOW), 2u32);
        lapic::eoi();
    });
    case("lapic.thousand_self_ipis", |t| {
        trap::expect(LOW, Eoi::Lapic);
        sti();
        for round in 1..=1000 {
            lapic::self_ipi(LOW);
            if !wait_until(LONG, || trap::count(LOW) >= round) {
                break;
            }
        }
        cli();
        t.eq("arrivals", trap::count(LOW), 1000u32);
    });
    case("lapic.software_disable", |t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::write(lapic::SVR, u32::from(lapic::SPURIOUS));
        t.eq("LVT timer mask while disabled", lapic::read(lapic::LVT_TIMER) & lapic::MASKED, lapic::MASKED);
        lapic::write(lapic::SVR, 0x100 | u32::from(lapic::SPURIOUS));
        lapic::self_ipi(LOW);
        window();
        t.eq("arrivals after enabling", trap::count(LOW), 1u32);
    });
    case("lapic.software_disable_keeps_lvt_masked", |t| {
        if t.skip_on_bare_tcg("LVT masks can be cleared while the APIC is disabled") {
            return;
        }
        // Intel SDM vol. 3, 11.4.7.2.
        lapic::write(lapic::SVR, u32::from(lapic::SPURIOUS));
        lapic::write(lapic::LVT_TIMER, LOW.into());
        t.eq("LVT timer mask", lapic::read(lapic::LVT_TIMER) & lapic::MASKED, lapic::MASKED);
    });
    case("lapic.interrupted_rip", |t| {
        trap::on(LOW, Eoi::Lapic, |frame| poke(RIP.addr(), frame.rip));
        lapic::self_ipi(LOW);
        let want: u64;
        exec!("lea {0}, [rip + 2f]", "sti", "nop", "2: nop", "cli", out(reg) want);
        t.eq("RIP", peek::<u64>(RIP.addr()), want);
    });
}

fn priorities() {
    case("priority.highest_first", |t| {
        expect_all();
        for vector in [MIDDLE, LOW, HIGH] {
            lapic::self_ipi(vector);
        }
        sti();
        cli();
        check_order(t, &[HIGH, MIDDLE, LOW]);
    });
    case("priority.tpr_masks_classes", |t| {
        expect_all();
        lapic::write(TPR, 0x70);
        for vector in [LOW, MIDDLE, HIGH] {
            lapic::self_ipi(vector);
        }
        window();
        check_order(t, &[HIGH]);
        lapic::write(TPR, 0x60);
        window();
        check_order(t, &[HIGH, MIDDLE]);
        lapic::write(TPR, 0);
        window();
        check_order(t, &[HIGH, MIDDLE, LOW]);
    });
    case("priority.cr8_masks_classes", |t| {
        expect_all();
        set_cr8(9);
        for vector in [LOW, MIDDLE, HIGH] {
            lapic::self_ipi(vector);
        }
        window();
        check_order(t, &[]);
        set_cr8(8);
        window();
        check_order(t, &[HIGH]);
        set_cr8(0);
        window();
        check_order(t, &[HIGH, MIDDLE, LOW]);
    });
    case("priority.lowering_cr8_with_if_set", |t| {
        expect_all();
        set_cr8(15);
        lapic::self_ipi(HIGH);
        sti();
        exec!("nop");
        t.eq("arrivals with CR8 15", trap::count(HIGH), 0u32);
        set_cr8(0);
        exec!("nop");
        t.eq("arrivals with CR8 0", trap::count(HIGH), 1u32);
        cli();
    });
    case("priority.cr8_toggle_many", |t| {
        expect_all();
        sti();
        for round in 1..=200u32 {
            set_cr8(10);
            lapic::self_ipi(HIGH);
            exec!("nop");
            if trap::count(HIGH) != round - 1 {
                break;
            }
            set_cr8(0);
            wait_until(LONG, || trap::count(HIGH) >= round);
        }
        cli();
        t.eq("arrivals", trap::count(HIGH), 200u32);
    });
    case("priority.nesting", |t| {
        expect_all();
        trap::on(MIDDLE, Eoi::Lapic, |_| {
            lapic::self_ipi(LOW);
            lapic::self_ipi(HIGH);
            sti();
            exec!("nop");
            cli();
        });
        lapic::self_ipi(MIDDLE);
        window();
        check_order(t, &[MIDDLE, HIGH, LOW]);
    });
    case("priority.ppr", |t| {
        trap::on(MIDDLE, Eoi::Lapic, |_| poke(RIP.addr(), u64::from(lapic::read(PPR))));
        t.eq("PPR when idle", lapic::read(PPR), 0u32);
        lapic::write(TPR, 0x35);
        t.eq("PPR from TPR", lapic::read(PPR), 0x35u32);
        lapic::self_ipi(MIDDLE);
        window();
        t.eq("PPR in the handler", peek::<u64>(RIP.addr()), 0x70u64);
    });
    case("priority.same_class_waits", |t| {
        expect_all();
        trap::expect(MIDDLE + 1, Eoi::Lapic);
        trap::on(MIDDLE, Eoi::Lapic, |_| {
            lapic::self_ipi(MIDDLE + 1);
            sti();
            exec!("nop");
            cli();
            poke(RIP.addr(), u64::from(trap::count(MIDDLE + 1)));
        });
        lapic::self_ipi(MIDDLE);
        window();
        t.eq("arrivals of the same class inside the handler", peek::<u64>(RIP.addr()), 0u64);
        t.eq("arrivals afterwards", trap::count(MIDDLE + 1), 1u32);
    });
    case("priority.irr_holds_what_tpr_masks", |t| {
        lapic::write(TPR, 0xf0);
        lapic::self_ipi(0x45);
        sti();
        exec!("nop");
        cli();
        t.eq("IRR word 2", lapic::read(IRR + 0x20), 1u32 << 5);
        trap::expect(0x45, Eoi::Lapic);
        lapic::write(TPR, 0);
        window();
        t.eq("arrivals", trap::count(0x45), 1u32);
    });
}

fn shadows() {
    case("shadow.sti_protects_one_instruction", |t| {
        trap::on(LOW, Eoi::Lapic, |frame| poke(RIP.addr(), frame.rip));
        lapic::self_ipi(LOW);
        let (want, ran): (u64, u64);
        exec!("lea {0}, [rip + 2f]", "xor {1:e}, {1:e}", "sti", "inc {1}", "2: inc {1}", "cli",
            out(reg) want, out(reg) ran);
        t.eq("RIP", peek::<u64>(RIP.addr()), want);
        t.eq("instructions run", ran, 2u64);
    });
    case("shadow.sti_cli_lets_nothing_in", |t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::self_ipi(LOW);
        (0..100).for_each(|_| exec!("sti", "cli"));
        t.eq("arrivals", trap::count(LOW), 0u32);
        window();
        t.eq("arrivals afterwards", trap::count(LOW), 1u32);
    });
    case("shadow.sti_over_emulated_instruction", |t| {
        // The instruction in the shadow exits; the shadow must still end right after it.
        if t.skip_on_bochs_svm("a virtual interrupt may stay masked if host and guest have IF set at VMRUN") {
            return;
        }
        trap::on(LOW, Eoi::Lapic, |frame| poke(RIP.addr(), frame.rip));
        lapic::self_ipi(LOW);
        let want: u64;
        exec!("lea {0}, [rip + 2f]", "sti", "in al, 0x21", "2: nop", "cli", out(reg) want, out("al") _);
        t.eq("RIP", peek::<u64>(RIP.addr()), want);
        t.eq("arrivals", trap::count(LOW), 1u32);
    });
    case("shadow.second_sti_has_none", |t| {
        // IF was set already: STI casts no shadow.
        trap::on(LOW, Eoi::Lapic, |frame| poke(RIP.addr(), frame.rip));
        sti();
        lapic::self_ipi(LOW);
        exec!("sti", "nop", "cli");
        t.eq("arrivals", trap::count(LOW), 1u32);
    });
    case("shadow.mov_ss", |t| {
        trap::on(LOW, Eoi::Lapic, |frame| poke(RIP.addr(), frame.rip));
        lapic::self_ipi(LOW);
        let (first, second): (u64, u64);
        exec!("lea {0}, [rip + 2f]", "lea {1}, [rip + 3f]", "mov eax, ss", "sti", "mov ss, eax", "2: nop", "3: nop", "cli",
            out(reg) first, out(reg) second, out("rax") _);
        // After STI the shadow of MOV SS may or may not add to it. Intel SDM vol. 3, 6.8.3.
        let rip = peek::<u64>(RIP.addr());
        t.check(rip == first || rip == second, format_args!("RIP {first:#x} or {second:#x}, got {rip:#x}"));
    });
    case("shadow.popf_has_none", |t| {
        trap::on(LOW, Eoi::Lapic, |frame| poke(RIP.addr(), frame.rip));
        lapic::self_ipi(LOW);
        let want: u64;
        exec!("lea {0}, [rip + 2f]", "pushfq", "or qword ptr [rsp], 0x200", "popfq", "2: nop", "cli", out(reg) want);
        t.eq("RIP", peek::<u64>(RIP.addr()), want);
    });
    case("shadow.iret_has_none", |t| {
        trap::on(LOW, Eoi::Lapic, |frame| poke(RIP.addr(), frame.rip));
        trap::on(0x61, Eoi::None, |frame| frame.rflags |= FLAG_IF);
        lapic::self_ipi(LOW);
        let want: u64;
        exec!("lea {0}, [rip + 2f]", "int 0x61", "2: nop", "cli", out(reg) want);
        t.eq("RIP", peek::<u64>(RIP.addr()), want);
    });
}

/// String instructions with a timer firing into them: nothing lost, nothing done twice.
fn strings() {
    fn with_timer(run: impl FnOnce()) -> u32 {
        trap::expect(LOW, Eoi::Lapic);
        lapic::timer(lapic::PERIODIC | u32::from(LOW), lapic::DIVIDE_1, 20_000);
        sti();
        run();
        wait_until(LONG, || trap::count(LOW) >= 2);
        cli();
        lapic::write(lapic::TMICT, 0);
        // One that is requested already must not arrive in another case.
        window();
        trap::count(LOW)
    }
    case("strings.rep_outsb_with_interrupts", |t| {
        let (mut rcx, mut rsi) = (4096u64, REP_BYTES.addr());
        let arrivals =
            with_timer(|| exec!("rep outsb", inout("rcx") rcx, inout("rsi") rsi, in("dx") 0x80u16));
        t.eq("RCX", rcx, 0u64);
        t.eq("RSI", rsi, REP_BYTES.addr() + 4096);
        t.yes("interrupts in the meantime", arrivals >= 2);
    });
    case("strings.rep_insb_with_interrupts", |t| {
        (0..4096).for_each(|at| poke(REP_BYTES.addr() + at, 0x5au8));
        let (mut rcx, mut rdi) = (4000u64, REP_BYTES.addr());
        with_timer(|| exec!("rep insb", inout("rcx") rcx, inout("rdi") rdi, in("dx") 0x21u16));
        t.eq("RCX", rcx, 0u64);
        t.eq("RDI", rdi, REP_BYTES.addr() + 4000);
        // The PIC's mask: all ones.
        t.yes("every byte read", (0..4000).all(|at| peek::<u8>(REP_BYTES.addr() + at) == 0xff));
        t.yes("nothing behind them", (4000..4096).all(|at| peek::<u8>(REP_BYTES.addr() + at) == 0x5a));
    });
    case("strings.movs_mmio_with_interrupts", |t| {
        // RAM to the I/O APIC's index register; the register behind it is none, so one MOVS at a time.
        let mut done = 0u64;
        let arrivals = with_timer(|| {
            for index in 0..512u64 {
                let source = (index & 0x0f) as u32;
                exec!("movsd", inout("rsi") &source => _, inout("rdi") guests::dev::ioapic::REGSEL => _);
                done += 1;
            }
        });
        t.eq("moves", done, 512u64);
        t.yes("interrupts in the meantime", arrivals >= 2);
        t.eq("the index register", peek::<u32>(guests::dev::ioapic::REGSEL) & 0xff, 0x0fu32);
    });
}

fn x2apic() {
    case("x2apic.mode", |t| {
        if !lapic::x2apic_offered() {
            return t.skip("CPUID does not offer x2APIC");
        }
        if lapic::x2apic() {
            return t.skip("the other cases are in that mode");
        }
        let base = rdmsr(MSR_APIC_BASE);
        let id = lapic::id();
        wrmsr(MSR_APIC_BASE, base | 0x400);
        let mut good = rdmsr(0x802) == u64::from(id);
        // The counting handler's EOI by MMIO does not work in this mode, so each handler acknowledges by MSR.
        trap::on(LOW, Eoi::None, |_| wrmsr(0x80b, 0));
        wrmsr(0x83f, LOW.into());
        window();
        let self_ipi = trap::count(LOW);
        wrmsr(0x830, u64::from(id) << 32 | u64::from(lapic::ASSERT) | u64::from(LOW));
        window();
        let by_id = trap::count(LOW) - self_ipi;
        good &= rdmsr(0x808) == 0;
        // Back to xAPIC mode goes through disabled. Intel SDM vol. 3, 11.12.5.
        wrmsr(MSR_APIC_BASE, base & !0xc00);
        wrmsr(MSR_APIC_BASE, base);
        lapic::quiet();
        t.yes("ID and TPR by MSR", good);
        t.eq("arrivals by the SELF IPI register", self_ipi, 1u32);
        t.eq("arrivals by ICR", by_id, 1u32);
        t.eq("IA32_APIC_BASE afterwards", rdmsr(MSR_APIC_BASE), base);
    });
}

/// Registers by MSR, where the other cases are in x2APIC mode, too.
fn x2apic_registers() {
    let by_msr = |name: &str, run: &dyn Fn(&mut Case)| {
        case(name, |t| if lapic::x2apic() { run(t) } else { t.skip("the APIC is in xAPIC mode") });
    };
    by_msr("x2apic.reserved_bits_fault", &|t| {
        for (register, value) in [(TPR, 0x100u64), (lapic::EOI, 1), (lapic::SELF_IPI, 0x100), (TPR, 1 << 32)]
        {
            let got = catch(|| wrmsr(0x800 + (register >> 4), value)).map_err(|fault| fault.vector);
            t.yes("#GP for a reserved bit", got == Err(GP));
        }
        for register in [PPR, lapic::VERSION, lapic::ISR, lapic::TMR, IRR] {
            let got = catch(|| wrmsr(0x800 + (register >> 4), 0)).map_err(|fault| fault.vector);
            t.yes("#GP for a write of a read-only register", got == Err(GP));
        }
        for register in [lapic::EOI, lapic::SELF_IPI] {
            let got = catch(|| rdmsr(0x800 + (register >> 4))).map_err(|fault| fault.vector);
            t.yes("#GP for a read of a write-only register", got.map(|_| ()) == Err(GP));
        }
    });
    by_msr("x2apic.illegal_vector", &|t| {
        lapic::write(lapic::ESR, 0);
        lapic::self_ipi(0x0f);
        lapic::self_ipi(LOW);
        lapic::write(lapic::ESR, 0);
        // Intel SDM vol. 3, 11.5.3: send illegal vector.
        t.eq("ESR", lapic::read(lapic::ESR) & 1 << 5, 1u32 << 5);
        trap::expect(LOW, Eoi::Lapic);
        window();
        t.eq("arrivals of the legal one", trap::count(LOW), 1u32);
    });
    by_msr("x2apic.disabled_takes_no_self_ipi", &|t| {
        trap::expect(LOW, Eoi::Lapic);
        lapic::write(lapic::SVR, u32::from(lapic::SPURIOUS));
        lapic::self_ipi(LOW);
        lapic::write(lapic::SVR, 0x100 | u32::from(lapic::SPURIOUS));
        window();
        t.eq("arrivals", trap::count(LOW), 0u32);
    });
    by_msr("x2apic.priority_keeps_its_sub_class", &|t| {
        for value in [0x35u32, 0x3f, 0x31, 0] {
            lapic::write(TPR, value);
            t.eq("TPR", lapic::read(TPR), value);
            inb(0x80);
            t.eq("TPR after an exit", lapic::read(TPR), value);
            t.eq("CR8", cr8(), u64::from(value >> 4));
            t.eq("PPR", lapic::read(PPR), value);
        }
    });
    by_msr("x2apic.service_survives_disabling", &|t| {
        // Disabling by software takes the APIC from the processor; what is in service must survive that.
        trap::expect(LOW, Eoi::None);
        lapic::self_ipi(LOW);
        window();
        for _ in 0..10 {
            lapic::write(lapic::SVR, u32::from(lapic::SPURIOUS));
            t.yes("in service while disabled", lapic::in_service(LOW));
            lapic::write(lapic::SVR, 0x100 | u32::from(lapic::SPURIOUS));
            t.yes("in service again", lapic::in_service(LOW));
        }
        lapic::eoi();
        t.yes("out of service", !lapic::in_service(LOW));
    });
    by_msr("x2apic.interrupts_take_no_exit", &|t| {
        if !platform::umbra() || !multiboot::boot().word("virtual-apic") {
            return t.skip("the processor does not deliver interrupts by itself");
        }
        trap::expect(LOW, Eoi::Lapic);
        // The exits of the timer and the host are few.
        let exits = || rdmsr(platform::MSR_EXIT_COUNT);
        let best = (0..10).map(|_| {
            let before = exits();
            for _ in 0..20 {
                lapic::write(TPR, 0x60);
                lapic::self_ipi(LOW);
                lapic::write(TPR, 0x20);
                window();
                exec!("nop");
            }
            exits() - before
        });
        t.within("exits of 20 interrupts", best.min().unwrap_or(0), 1, 5);
        t.eq("arrivals", trap::count(LOW), 200u32);
    });
}
