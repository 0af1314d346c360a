//! What an exit costs: `bench KEY instructions=N exits=N` per operation, averaged over 256 rounds.
//!
//! Instructions are RDTSC differences; with QEMU's `-icount shift=0` the TSC counts retired instructions exactly, else
//! they are ticks. Each loop also runs with a NOP in place of the operation; the difference, plus one for the
//! operation itself, is the figure. Exits come from Umbra's counter MSR, without those of the measuring itself.
#![no_std]
#![no_main]
// The operations are instructions.
#![allow(unsafe_code)]
use core::arch::global_asm;
use guests::dev::{ioapic, lapic};
use guests::machine;
use guests::platform::MSR_EXIT_COUNT;
use guests::prelude::*;
use guests::report;
use guests::trap::{self, Gate};
use guests::{exec, frames, main, println, Racy};

main!(run);

const ROUNDS: u64 = 256;
const VECTOR: u8 = 0x50;

fn exits() -> u64 {
    try_rdmsr(MSR_EXIT_COUNT).unwrap_or(0)
}

/// Ticks and exits of `run`, without those of reading the counters.
fn measure(run: &dyn Fn()) -> (u64, u64) {
    let idle = {
        let first = exits();
        exits() - first
    };
    let exits_before = exits();
    let before = rdtsc();
    run();
    let after = rdtsc();
    let exits_after = exits();
    (after - before, (exits_after - exits_before).saturating_sub(idle))
}

fn print(key: &str, instructions: u64, exits: u64) {
    println!("bench {key} instructions={instructions} exits={exits}");
}

fn rounded(sum: u64) -> u64 {
    (sum + ROUNDS / 2) / ROUNDS
}

/// Measures `operation` against `empty`, the same loop with a NOP.
fn bench(key: &str, operation: impl Fn(), empty: impl Fn()) {
    // Once for whatever is set up on first use.
    operation();
    let (ticks, exits) = measure(&operation);
    let (base, _) = measure(&empty);
    print(key, rounded(ticks.saturating_sub(base)) + 1, rounded(exits));
}

/// A loop of `ROUNDS` rounds around some assembly; R9 counts and R8 keeps RBX.
macro_rules! rounds {
    ($asm:literal, $($operands:tt)*) => {
        || exec!("mov r8, rbx", "mov r9d, 256", "2:", $asm, "dec r9d", "jnz 2b", "mov rbx, r8",
            out("r8") _, out("r9") _, $($operands)*)
    };
}
const _: () = assert!(ROUNDS == 256);

fn run() {
    cli();
    bench(
        "cpuid",
        rounds!("xor eax, eax\n xor ecx, ecx\n cpuid", out("eax") _, out("ecx") _, out("edx") _),
        rounds!("xor eax, eax\n xor ecx, ecx\n nop", out("eax") _, out("ecx") _, out("edx") _),
    );
    let adjust = try_rdmsr(MSR_TSC_ADJUST);
    if let Ok(adjust) = adjust {
        bench(
            "rdmsr",
            rounds!("rdmsr", in("ecx") MSR_TSC_ADJUST, out("eax") _, out("edx") _),
            rounds!("nop", in("ecx") MSR_TSC_ADJUST, out("eax") _, out("edx") _),
        );
        let (low, high) = (adjust as u32, (adjust >> 32) as u32);
        bench(
            "wrmsr",
            rounds!("wrmsr", in("ecx") MSR_TSC_ADJUST, in("eax") low, in("edx") high),
            rounds!("nop", in("ecx") MSR_TSC_ADJUST, in("eax") low, in("edx") high),
        );
    } else {
        println!("skip rdmsr, wrmsr: no TSC_ADJUST");
    }
    bench("port_in", rounds!("in al, 0x21", out("al") _), rounds!("nop", out("al") _));
    bench("port_out", rounds!("out 0x21, al", in("al") 0xffu8), rounds!("nop", in("al") 0xffu8));
    bench(
        "mmio_read",
        rounds!("mov eax, [rdi]", in("rdi") ioapic::WIN, out("eax") _),
        rounds!("nop", in("rdi") ioapic::WIN, out("eax") _),
    );
    bench(
        "mmio_write",
        rounds!("mov [rdi], eax", in("rdi") ioapic::REGSEL, in("eax") 1),
        rounds!("nop", in("rdi") ioapic::REGSEL, in("eax") 1),
    );
    hlt_wake();
    npf_4k();
    println!("done");
    report::exit(0)
}

static WOKEN: Racy<u64> = Racy::new(0);

extern "C" {
    fn bench_woken();
}

// The shortest handler that can tell the time: nothing before RDTSC but two pushes.
global_asm!(
    r#"
    .global bench_woken
bench_woken:
    push rax
    push rdx
    rdtsc
    shl rdx, 32
    or rax, rdx
    mov [{woken}], rax
    mov edx, 0xfee000b0
    mov dword ptr [rdx], 0
    pop rdx
    pop rax
    iretq
    "#,
    woken = sym WOKEN,
);

/// TSC ticks per 1024 ticks of the LAPIC timer with divider 1.
fn timer_ratio() -> u64 {
    const COUNT: u32 = 20_000_000;
    lapic::timer(lapic::MASKED, lapic::DIVIDE_1, COUNT);
    let (start, first) = (rdtsc(), lapic::read(lapic::TMCCT));
    while lapic::read(lapic::TMCCT) > COUNT / 2 {}
    let (end, last) = (rdtsc(), lapic::read(lapic::TMCCT));
    lapic::write(lapic::TMICT, 0);
    (end - start) * 1024 / u64::from(first.wrapping_sub(last)).max(1)
}

/// From the programmed deadline to the handler's RDTSC, the CPU halted in between.
fn hlt_wake() {
    trap::gate(VECTOR, Gate::interrupt(bench_woken as *const () as u64, 0, 0));
    let deadline_mode = lapic::deadline_offered();
    let ratio = if deadline_mode { 0 } else { timer_ratio() };
    if deadline_mode {
        lapic::write(lapic::LVT_TIMER, lapic::TSC_DEADLINE | u32::from(VECTOR));
    } else {
        lapic::write(lapic::TDCR, lapic::DIVIDE_1);
        lapic::write(lapic::LVT_TIMER, VECTOR.into());
    }
    let (mut late, mut rounds) = (0, 0);
    let before = exits();
    for _ in 0..ROUNDS {
        const AHEAD: u64 = 200_000;
        poke(WOKEN.addr(), 0u64);
        let deadline = if deadline_mode {
            let deadline = rdtsc() + AHEAD;
            wrmsr(MSR_TSC_DEADLINE, deadline);
            deadline
        } else {
            let start = rdtsc();
            lapic::write(lapic::TMICT, AHEAD as u32);
            start + AHEAD * ratio / 1024
        };
        sti_hlt();
        cli();
        let woken: u64 = peek(WOKEN.addr());
        // A handler before the deadline is a clock that disagrees with the TSC, not a fast wake-up.
        if woken != 0 {
            late += woken.saturating_sub(deadline);
            rounds += 1;
        }
    }
    let exits = exits() - before;
    if rounds != ROUNDS {
        return println!("FAIL hlt_wake: expected {ROUNDS} wake-ups, got {rounds}");
    }
    print("hlt_wake", rounded(late), rounded(exits));
    machine::baseline();
}

/// The first write to a page that the second stage does not map yet, its tables being there.
fn npf_4k() {
    let base = frames::untouched(frames::PAGE_2M, frames::PAGE_2M);
    poke(base, 1u32);
    let first = base + frames::PAGE;
    let touch = || {
        exec!("2: mov [rdi], eax", "add rdi, 4096", "dec ecx", "jnz 2b",
        inout("rdi") first => _, inout("ecx") 256 => _, in("eax") 1)
    };
    let (ticks, exits) = measure(&touch);
    let (again, _) = measure(&touch);
    print("npf_4k", rounded(ticks.saturating_sub(again)) + 1, rounded(exits));
}
