//! What a guest's own paging costs: `bench KEY instructions=N exits=N` per operation, averaged over 256 or 512 rounds.
//!
//! Instructions are RDTSC differences, of the whole loop with its two or three own instructions; with QEMU's `-icount shift=0`
//! the TSC counts retired instructions exactly. Exits come from Umbra's counter MSR, without those of the measuring itself.
//! Tables and frames are prepared and touched outside the measured part.
#![no_std]
#![no_main]
// The operations are instructions.
#![allow(unsafe_code)]
use core::arch::global_asm;
use guests::frames::{self, PAGE, PAGE_2M};
use guests::paging::{Space, A, D, P, PLAYGROUND, W};
use guests::platform::MSR_EXIT_COUNT;
use guests::prelude::*;
use guests::report;
use guests::trap::{self, Gate};
use guests::{exec, main, println};

main!(run);

const ROUNDS: u64 = 256;
const PAGES: u64 = 512;
/// CR0.WP and CR4.PGE.
const WP: u64 = 1 << 16;
const PGE: u64 = 1 << 7;

fn exits() -> u64 {
    try_rdmsr(MSR_EXIT_COUNT).unwrap_or(0)
}

/// Measures `run`, which does `rounds` operations.
fn bench(key: &str, rounds: u64, run: impl Fn()) {
    let idle = {
        let first = exits();
        exits() - first
    };
    let exits_before = exits();
    let before = rdtsc();
    run();
    let ticks = rdtsc() - before;
    let exits = (exits() - exits_before).saturating_sub(idle);
    let rounded = |sum: u64| (sum + rounds / 2) / rounds;
    println!("bench {key} instructions={} exits={}", rounded(ticks), rounded(exits));
}

extern "C" {
    fn bench_fault();
}

// Puts the bits of R10 into the entry at R11 and invalidates the page at RDI.
global_asm!(
    r#"
    .global bench_fault
bench_fault:
    or [r11], r10
    invlpg [rdi]
    add rsp, 8
    iretq
    "#
);

/// Pages of memory, mapped one after the other from a 2 MiB boundary, and their entries.
struct Pages {
    address: u64,
    entries: u64,
    frames: u64,
}

impl Pages {
    /// Maps `PAGES` pages in an area of their own; each frame has been written, by another address.
    fn new(space: &Space, area: u64, flags: u64) -> Self {
        let address = PLAYGROUND + area * PAGE_2M;
        let entries = space.entry(address, 1);
        let frames = frames::pages(PAGES);
        for page in 0..PAGES {
            poke(frames + page * PAGE, page);
            poke(entries + page * 8, (frames + page * PAGE) | flags);
        }
        Self { address, entries, frames }
    }

    /// Reads every page.
    fn touch(&self) {
        for page in 0..PAGES {
            peek::<u64>(self.address + page * PAGE);
        }
    }
}

fn run() {
    cli();
    trap::gate(trap::PF, Gate::interrupt(bench_fault as *const () as u64, 0, 0));
    let space = Space::current();
    let used = P | W | A | D;

    let pages = Pages::new(&space, 1, P | W);
    bench("first_touch", ROUNDS, || {
        exec!("2: mov [rdi], eax", "add rdi, 4096", "dec ecx", "jnz 2b",
            inout("rdi") pages.address => _, inout("ecx") 256 => _, in("eax") 1);
    });

    let pages = Pages::new(&space, 2, used);
    pages.touch();
    let (one, other) = (pages.frames | used, (pages.frames + PAGE) | used);
    let remap = || {
        exec!("2: mov [rsi], rax", "invlpg [rdi]", "mov r8, [rdi]", "xchg rax, rdx", "dec ecx", "jnz 2b",
            in("rsi") pages.entries, in("rdi") pages.address, inout("rax") other => _, inout("rdx") one => _,
            inout("ecx") 256 => _, out("r8") _);
    };
    remap();
    bench("remap_invlpg_touch", ROUNDS, remap);

    let invlpg = || {
        exec!("2: invlpg [rdi]", "dec ecx", "jnz 2b", in("rdi") pages.address, inout("ecx") 256 => _);
    };
    invlpg();
    bench("invlpg", ROUNDS, invlpg);

    let root = cr3();
    let reload = || exec!("2: mov cr3, rax", "dec ecx", "jnz 2b", in("rax") root, inout("ecx") 256 => _);
    reload();
    bench("cr3_reload", ROUNDS, reload);

    let second = frames::page();
    for entry in 0..512 {
        poke(second + entry * 8, peek::<u64>((root & !0xfff) + entry * 8));
    }
    let switch = || {
        exec!("2: mov cr3, rdx", "mov r8, [rdi]", "mov cr3, rax", "mov r8, [rdi]", "dec ecx", "jnz 2b",
            in("rax") root, in("rdx") second, in("rdi") pages.address, inout("ecx") 256 => _, out("r8") _);
    };
    switch();
    bench("cr3_switch_pair", ROUNDS, switch);

    for (key, bit) in [("guest_pf", P), ("cow", W)] {
        let entry = pages.frames | used;
        let fault = || {
            exec!("2: mov [r11], rdx", "invlpg [rdi]", "mov [rdi], eax", "dec ecx", "jnz 2b",
                in("rdx") entry & !bit, in("r10") bit, in("r11") pages.entries, in("rdi") pages.address,
                in("eax") 1, inout("ecx") 256 => _);
        };
        fault();
        bench(key, ROUNDS, fault);
    }

    let pages = Pages::new(&space, 3, used);
    pages.touch();
    let fork = || {
        exec!("2: and qword ptr [r11], -3", "add r11, 8", "dec ecx", "jnz 2b",
            inout("r11") pages.entries => _, inout("ecx") PAGES => _);
        exec!("mov cr3, rax", in("rax") root);
        exec!("2: mov [rdi], eax", "add rdi, 4096", "add r11, 8", "dec ecx", "jnz 2b",
            inout("rdi") pages.address => _, inout("r11") pages.entries => _, in("r10") W, in("eax") 1,
            inout("ecx") PAGES => _);
    };
    fork();
    bench("fork_page", PAGES, fork);

    let pages = Pages::new(&space, 4, 0);
    let map = || {
        exec!("2: mov [r11], rdx", "add rdx, 4096", "add r11, 8", "dec ecx", "jnz 2b",
            inout("r11") pages.entries => _, inout("rdx") pages.frames | P | W => _, inout("ecx") PAGES => _);
        exec!("2: mov r8, [rdi]", "add rdi, 4096", "dec ecx", "jnz 2b",
            inout("rdi") pages.address => _, inout("ecx") PAGES => _, out("r8") _);
        exec!("2: mov qword ptr [r11], 0", "invlpg [rdi]", "add rdi, 4096", "add r11, 8", "dec ecx", "jnz 2b",
            inout("rdi") pages.address => _, inout("r11") pages.entries => _, inout("ecx") PAGES => _);
    };
    map();
    bench("map_touch_unmap_page", PAGES, map);

    let cr0 = cr0();
    let toggle = || {
        exec!("2: mov cr0, rdx", "mov cr0, rax", "dec ecx", "jnz 2b",
            in("rax") cr0, in("rdx") cr0 ^ WP, inout("ecx") 256 => _);
    };
    toggle();
    bench("cr0_wp_toggle", ROUNDS, toggle);

    let cr4 = cr4();
    let toggle = || {
        exec!("2: mov cr4, rdx", "mov cr4, rax", "dec ecx", "jnz 2b",
            in("rax") cr4, in("rdx") cr4 ^ PGE, inout("ecx") 256 => _);
    };
    toggle();
    bench("cr4_pge_toggle", ROUNDS, toggle);

    println!("done");
    report::exit(0)
}
