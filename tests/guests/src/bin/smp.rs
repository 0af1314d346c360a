//! Several processors: start-up, IPIs, shared memory, TLB shootdown.
#![no_std]
#![no_main]
// Locked instructions on shared memory.
#![allow(unsafe_code)]
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use guests::dev::{fw_cfg, ioapic, lapic, pit};
use guests::paging::{Space, P, PLAYGROUND, W};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, Eoi};
use guests::{exec, frames, main, platform, smp};

main!(run);

const VECTOR: u8 = 0x50;
const ANSWER: u8 = 0x51;
const LONG: u64 = 20_000_000_000;

/// What each processor counted, by index.
static HITS: [AtomicU32; smp::MAX] = [const { AtomicU32::new(0) }; smp::MAX];
static STOP: AtomicBool = AtomicBool::new(false);
static READY: AtomicUsize = AtomicUsize::new(0);
static SHARED: AtomicU64 = AtomicU64::new(0);
static LOCK: AtomicBool = AtomicBool::new(false);
static PLAIN: guests::Racy<u64> = guests::Racy::new(0);

fn run() {
    let cpus = if fw_cfg::present() { usize::from(fw_cfg::cpus()) } else { 1 };
    // Without its own processors each case would wait in vain.
    let uninterrupted = platform::bochs_svm() || platform::bochs_vmx() && platform::no_preemption_timer();
    let others = if cpus > 1 && !uninterrupted { smp::start(cpus - 1) } else { 0 };
    let with = |name: &str, run: &dyn Fn(&mut Case, usize)| {
        case(name, |t| {
            if cpus == 1 {
                return t.skip("one CPU");
            }
            let wrong = "a guest that spins with IF clear is not interrupted, nor can others run";
            if t.skip_on_bochs_svm(wrong) || t.skip_on_bochs_without_timer(wrong) {
                return;
            }
            reset();
            run(t, others);
            STOP.store(true, SeqCst);
            (1..=others).for_each(|index| t.yes("every processor back from its job", smp::finished(index)));
        });
    };
    with("smp.all_came_up", &|t, others| t.eq("other processors", others as u64, cpus as u64 - 1));
    with("smp.apic_ids_differ", &|t, others| {
        for index in 1..=others {
            t.check(
                smp::apic_id(index) != lapic::id(),
                format_args!("an id of its own, got the first one's"),
            );
            for other in 1..index {
                t.check(
                    smp::apic_id(index) != smp::apic_id(other),
                    format_args!("different ids, got {}", smp::apic_id(index)),
                );
            }
        }
    });
    with("smp.cpuid_says_the_apic_id", &|t, others| {
        all(others, |index| HITS[index].store(cpuid(1, 0).ebx >> 24, SeqCst));
        wait_all(t, others);
        (1..=others).for_each(|index| t.eq("initial APIC id", HITS[index].load(SeqCst), smp::apic_id(index)));
    });
    with("smp.not_the_bsp", &|t, others| {
        all(others, |index| HITS[index].store(rdmsr(MSR_APIC_BASE) as u32 >> 8 & 1, SeqCst));
        wait_all(t, others);
        (1..=others).for_each(|index| t.eq("IA32_APIC_BASE.BSP", HITS[index].load(SeqCst), 0u32));
    });
    ipis(&with);
    memory(&with);
    timing(&with);
    restart(&with);
}

type With<'a> = &'a dyn Fn(&str, &dyn Fn(&mut Case, usize));

fn reset() {
    HITS.iter().for_each(|hits| hits.store(0, SeqCst));
    STOP.store(false, SeqCst);
    READY.store(0, SeqCst);
    SHARED.store(0, SeqCst);
}

fn all(others: usize, job: smp::Job) {
    (1..=others).for_each(|index| smp::give(index, job));
}

fn wait_all(t: &mut Case, others: usize) {
    (1..=others).for_each(|index| t.yes("every processor done", smp::finished(index)));
}

/// Interrupts on until `STOP`, spinning.
fn spin_open(_: usize) {
    READY.fetch_add(1, SeqCst);
    sti();
    while !STOP.load(SeqCst) {
        exec!("pause");
    }
    cli();
}

/// Interrupts on until `STOP`, halted in between.
fn halt_open(_: usize) {
    READY.fetch_add(1, SeqCst);
    while !STOP.load(SeqCst) {
        sti_hlt();
        cli();
    }
}

fn counting() {
    trap::on(VECTOR, Eoi::Lapic, |_| _ = HITS[smp::index()].fetch_add(1, SeqCst));
}

fn ready(t: &mut Case, others: usize) {
    t.yes("all processors ready", wait_until(LONG, || READY.load(SeqCst) == others));
}

fn hits(index: usize) -> u32 {
    HITS[index].load(SeqCst)
}

/// The logical id of a processor whose LDR says `1 << index` in the flat model; x2APIC mode derives it from the APIC id.
fn flat_id(index: usize) -> u32 {
    1 << if lapic::x2apic() { smp::apic_id(index) } else { index as u32 }
}

fn ipis(with: With<'_>) {
    with("ipi.to_each", &|t, others| {
        counting();
        all(others, spin_open);
        ready(t, others);
        for index in 1..=others {
            lapic::ipi(smp::apic_id(index), lapic::ASSERT | u32::from(VECTOR));
            t.yes("an arrival", wait_until(LONG, || hits(index) == 1));
        }
        t.eq("arrivals at the sender", hits(0), 0u32);
    });
    with("ipi.wakes_hlt", &|t, others| {
        counting();
        all(others, halt_open);
        ready(t, others);
        for round in 1..=300 {
            for index in 1..=others {
                lapic::ipi(smp::apic_id(index), lapic::ASSERT | u32::from(VECTOR));
                t.yes("an arrival", wait_until(LONG, || hits(index) >= round));
            }
        }
        STOP.store(true, SeqCst);
        // Out of the last halt.
        lapic::ipi(0, lapic::OTHERS | lapic::ASSERT | u32::from(VECTOR));
    });
    with("ipi.back_and_forth", &|t, others| {
        // Each answers every interrupt with one to the first processor.
        trap::on(VECTOR, Eoi::Lapic, |_| {
            let bsp = SHARED.load(SeqCst) as u32;
            lapic::ipi(bsp, lapic::ASSERT | u32::from(ANSWER));
        });
        trap::expect(ANSWER, Eoi::Lapic);
        SHARED.store(lapic::id().into(), SeqCst);
        all(others, spin_open);
        ready(t, others);
        sti();
        for round in 1..=500u32 {
            lapic::ipi(smp::apic_id(1), lapic::ASSERT | u32::from(VECTOR));
            if !wait_until(LONG, || trap::count(ANSWER) >= round) {
                break;
            }
        }
        cli();
        t.eq("answers", trap::count(ANSWER), 500u32);
    });
    with("ipi.all_but_self", &|t, others| {
        counting();
        all(others, spin_open);
        ready(t, others);
        lapic::ipi(0, lapic::OTHERS | lapic::ASSERT | u32::from(VECTOR));
        (1..=others).for_each(|index| t.yes("an arrival", wait_until(LONG, || hits(index) == 1)));
        sti();
        exec!("nop");
        cli();
        t.eq("arrivals at the sender", hits(0), 0u32);
    });
    with("ipi.all_including_self", &|t, others| {
        counting();
        all(others, spin_open);
        ready(t, others);
        lapic::ipi(0, lapic::ALL | lapic::ASSERT | u32::from(VECTOR));
        (1..=others).for_each(|index| t.yes("an arrival", wait_until(LONG, || hits(index) == 1)));
        sti();
        exec!("nop");
        cli();
        t.eq("arrivals at the sender", hits(0), 1u32);
    });
    with("ipi.physical_broadcast", &|t, others| {
        counting();
        all(others, spin_open);
        ready(t, others);
        lapic::ipi(0xff, lapic::ASSERT | u32::from(VECTOR));
        (1..=others).for_each(|index| t.yes("an arrival", wait_until(LONG, || hits(index) == 1)));
        sti();
        exec!("nop");
        cli();
        t.eq("arrivals at the sender", hits(0), 1u32);
    });
    with("ipi.logical_flat", &|t, others| {
        counting();
        all(others.min(7), |index| {
            lapic::write(lapic::DFR, !0);
            lapic::write(lapic::LDR, 1 << (24 + index));
            spin_open(index);
        });
        let others = others.min(7);
        ready(t, others);
        // Each alone, then all.
        for index in 1..=others {
            lapic::ipi(flat_id(index), lapic::LOGICAL | lapic::ASSERT | u32::from(VECTOR));
            t.yes("an arrival", wait_until(LONG, || hits(index) == 1));
        }
        lapic::ipi(0xfe, lapic::LOGICAL | lapic::ASSERT | u32::from(VECTOR));
        (1..=others).for_each(|index| t.yes("a second arrival", wait_until(LONG, || hits(index) == 2)));
    });
    with("ipi.logical_cluster", &|t, others| {
        if t.skip_in_x2apic_mode("logical id that software chooses") {
            return;
        }
        counting();
        let others = others.min(4);
        all(others, |index| {
            lapic::write(lapic::DFR, 0x0fff_ffff);
            lapic::write(lapic::LDR, 0x10 << 24 | 1 << (24 + index - 1));
            spin_open(index);
            lapic::write(lapic::DFR, !0);
        });
        ready(t, others);
        lapic::write(lapic::DFR, 0x0fff_ffff);
        for index in 1..=others {
            lapic::ipi(0x10 | 1 << (index - 1), lapic::LOGICAL | lapic::ASSERT | u32::from(VECTOR));
            t.yes("an arrival", wait_until(LONG, || hits(index) == 1));
        }
        lapic::write(lapic::DFR, !0);
    });
    with("ipi.lowest_priority_goes_to_one", &|t, others| {
        counting();
        let others = others.min(7);
        all(others, |index| {
            lapic::write(lapic::DFR, !0);
            lapic::write(lapic::LDR, 1 << (24 + index));
            spin_open(index);
        });
        ready(t, others);
        let sum = || (1..=others).map(hits).sum::<u32>();
        for round in 1..=50 {
            lapic::ipi(0xfe, lapic::LOGICAL | lapic::MODE_LOWEST | lapic::ASSERT | u32::from(VECTOR));
            t.yes("an arrival", wait_until(LONG, || sum() >= round));
        }
        delay(2_000_000);
        t.eq("arrivals", sum(), 50u32);
    });
    with("ipi.nmi", &|t, others| {
        trap::on(trap::NMI, Eoi::None, |_| _ = HITS[smp::index()].fetch_add(1, SeqCst));
        // Interrupts stay off there.
        all(others, |_| {
            READY.fetch_add(1, SeqCst);
            while !STOP.load(SeqCst) {
                exec!("pause");
            }
        });
        ready(t, others);
        for index in 1..=others {
            lapic::ipi(smp::apic_id(index), lapic::MODE_NMI | lapic::ASSERT);
            t.yes("an NMI", wait_until(LONG, || hits(index) == 1));
        }
    });
    with("ipi.from_everyone_to_everyone", &|t, others| {
        counting();
        all(others, |_| {
            READY.fetch_add(1, SeqCst);
            sti();
            for _ in 0..50 {
                lapic::ipi(0, lapic::OTHERS | lapic::ASSERT | u32::from(VECTOR));
                delay(20_000);
            }
            while !STOP.load(SeqCst) {
                exec!("pause");
            }
            cli();
        });
        ready(t, others);
        sti();
        t.yes("arrivals at the first processor", wait_until(LONG, || hits(0) > 0));
        if others > 1 {
            (1..=others).for_each(|index| t.yes("arrivals everywhere", wait_until(LONG, || hits(index) > 0)));
        }
        cli();
    });
    with("ioapic.to_another_cpu", &|t, others| {
        counting();
        all(others, spin_open);
        ready(t, others);
        ioapic::set_entry(2, u64::from(smp::apic_id(1)) << 56 | u64::from(VECTOR));
        pit::program(0, 2, 3000);
        t.yes("ticks there", wait_until(LONG, || hits(1) >= 10));
        ioapic::set_entry(2, ioapic::MASKED);
        pit::stop();
        t.eq("ticks here", hits(0), 0u32);
    });
}

fn memory(with: With<'_>) {
    with("memory.locked_counter", &|t, others| {
        all(others, |_| (0..20_000).for_each(|_| _ = SHARED.fetch_add(1, SeqCst)));
        (0..20_000).for_each(|_| _ = SHARED.fetch_add(1, SeqCst));
        wait_all(t, others);
        t.eq("sum", SHARED.load(SeqCst), 20_000 * (others as u64 + 1));
    });
    with("memory.spin_lock", &|t, others| {
        fn work(_: usize) {
            for _ in 0..5_000 {
                while LOCK.compare_exchange(false, true, SeqCst, SeqCst).is_err() {
                    exec!("pause");
                }
                poke(PLAIN.addr(), peek::<u64>(PLAIN.addr()) + 1);
                LOCK.store(false, SeqCst);
            }
        }
        poke(PLAIN.addr(), 0u64);
        all(others, work);
        work(0);
        wait_all(t, others);
        t.eq("sum", peek::<u64>(PLAIN.addr()), 5_000 * (others as u64 + 1));
    });
    with("memory.rights_of_keys_are_each_cpus", &|t, others| {
        if !has(7, 0, |leaf| leaf.ecx, 31) {
            return t.skip("no protection keys of supervisor pages");
        }
        // The processors take turns while each has rights of its own; keys are off, so they keep nothing back.
        fn work(index: usize) {
            let rights = 0x1111_1110 * (index as u64 + 1);
            wrmsr(MSR_PKRS, rights);
            for _ in 0..500 {
                if rdmsr(MSR_PKRS) != rights {
                    SHARED.fetch_add(1, SeqCst);
                }
                exec!("pause");
                cpuid(0, 0);
            }
            wrmsr(MSR_PKRS, 0);
        }
        all(others, work);
        work(0);
        wait_all(t, others);
        t.eq("wrong rights", SHARED.load(SeqCst), 0u64);
    });
    with("memory.same_untouched_pages", &|t, others| {
        // All processors fault on the same pages at once; no increment may be lost.
        const PAGES: u64 = 512;
        fn work(_: usize) {
            let base = SHARED.load(SeqCst);
            for page in 0..PAGES {
                exec!("lock inc qword ptr [{}]", in(reg) base + page * 4096);
            }
        }
        let base = frames::untouched(PAGES * 4096, 4096);
        SHARED.store(base, SeqCst);
        all(others, work);
        work(0);
        wait_all(t, others);
        for page in 0..PAGES {
            t.eq("increments of a page", peek::<u64>(base + page * 4096), others as u64 + 1);
        }
    });
    with("memory.tlb_shootdown", &|t, others| {
        // The usual pattern: change an entry, tell all, wait, rely on it.
        static DONE: AtomicU32 = AtomicU32::new(0);
        const ADDRESS: u64 = PLAYGROUND + 0x100_0000;
        trap::on(VECTOR, Eoi::Lapic, |_| {
            invlpg(ADDRESS);
            HITS[smp::index()].store(peek(ADDRESS), SeqCst);
            DONE.fetch_add(1, SeqCst);
        });
        let pages = [frames::page(), frames::page()];
        poke(pages[0], 1u32);
        poke(pages[1], 2u32);
        let space = Space::current();
        space.map(ADDRESS, pages[0], 1, P | W);
        all(others, spin_open);
        ready(t, others);
        for round in 0..200usize {
            DONE.store(0, SeqCst);
            space.map(ADDRESS, pages[round & 1], 1, P | W);
            lapic::ipi(0, lapic::OTHERS | lapic::ASSERT | u32::from(VECTOR));
            t.yes("answers", wait_until(LONG, || DONE.load(SeqCst) as usize == others));
            (1..=others).for_each(|index| t.eq("what it sees", hits(index), (round & 1) as u32 + 1));
        }
    });
    with("memory.emulation_at_once", &|t, others| {
        fn work(index: usize) {
            let want = cpuid(0, 0);
            for _ in 0..300 {
                let good = cpuid(0, 0) == want && lapic::id() == HITS[index].load(SeqCst);
                if !good {
                    SHARED.fetch_add(1, SeqCst);
                }
                inb(0x21);
                peek::<u32>(ioapic::REGSEL);
            }
        }
        HITS[0].store(lapic::id(), SeqCst);
        (1..=others).for_each(|index| HITS[index].store(smp::apic_id(index), SeqCst));
        all(others, work);
        work(0);
        wait_all(t, others);
        t.eq("wrong answers", SHARED.load(SeqCst), 0u64);
    });
}

fn timing(with: With<'_>) {
    with("tsc.never_back_across_cpus", &|t, others| {
        // A token goes round; who holds it must not see an earlier time than the one before.
        static TOKEN: AtomicUsize = AtomicUsize::new(0);
        static LAST: AtomicU64 = AtomicU64::new(0);
        fn work(index: usize) {
            for _ in 0..500 {
                while TOKEN.load(SeqCst) != index {
                    exec!("pause");
                }
                let now = rdtsc();
                if now < LAST.swap(now, SeqCst) {
                    SHARED.fetch_add(1, SeqCst);
                }
                TOKEN.store(if index == READY.load(SeqCst) { 0 } else { index + 1 }, SeqCst);
            }
        }
        TOKEN.store(0, SeqCst);
        LAST.store(0, SeqCst);
        READY.store(others, SeqCst);
        all(others, work);
        work(0);
        wait_all(t, others);
        t.eq("steps back", SHARED.load(SeqCst), 0u64);
    });
    with("timer.one_on_each_cpu", &|t, others| {
        counting();
        all(others, |index| {
            lapic::timer(lapic::PERIODIC | u32::from(VECTOR), lapic::DIVIDE_1, 200_000);
            sti();
            wait_until(LONG, || hits(index) >= 20);
            cli();
            lapic::write(lapic::TMICT, 0);
            lapic::write(lapic::LVT_TIMER, lapic::MASKED);
        });
        wait_all(t, others);
        (1..=others).for_each(|index| t.yes("twenty ticks", hits(index) >= 20));
        t.eq("ticks here", hits(0), 0u32);
    });
    with("timer.halted_cpus", &|t, others| {
        counting();
        all(others, |index| {
            lapic::timer(lapic::PERIODIC | u32::from(VECTOR), lapic::DIVIDE_1, 200_000);
            while hits(index) < 50 {
                sti_hlt();
                cli();
            }
            lapic::write(lapic::TMICT, 0);
            lapic::write(lapic::LVT_TIMER, lapic::MASKED);
        });
        wait_all(t, others);
        (1..=others).for_each(|index| t.yes("fifty ticks", hits(index) >= 50));
    });
}

/// Last, because indices change.
fn restart(with: With<'_>) {
    with("start.init_and_sipi_again", &|t, others| {
        t.yes("a new arrival after INIT and SIPI", smp::restart(others));
        let new = smp::online();
        t.eq("its APIC id", smp::apic_id(new), smp::apic_id(others));
        smp::give(new, |index| HITS[index].store(77, SeqCst));
        t.yes("work done after the restart", smp::finished(new));
        t.eq("its result", hits(new), 77u32);
    });
    with("start.sipi_without_init_is_ignored", &|t, _| {
        let before = smp::online();
        lapic::ipi(smp::apic_id(before), lapic::MODE_STARTUP | lapic::ASSERT | 8);
        delay(20_000_000);
        t.eq("arrivals", smp::online() as u64, before as u64);
    });
}
