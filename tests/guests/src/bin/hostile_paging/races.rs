//! One processor writes entries while others walk them.
use crate::forms::FORMS;
use crate::{area, page_with, read};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use guests::dev::fw_cfg;
use guests::exec;
use guests::frames::{self, PAGE, PAGE_2M};
use guests::paging::{Space, A, D, P, W};
use guests::platform;
use guests::prelude::*;
use guests::report::{case, Case};
use guests::smp;

/// Where the walkers look.
static ADDRESS: AtomicU64 = AtomicU64::new(0);
/// What they may find there: no less and no more.
static LOW: AtomicU64 = AtomicU64::new(0);
static HIGH: AtomicU64 = AtomicU64::new(0);
/// What they found that they may not, or 0.
static WRONG: AtomicU64 = AtomicU64::new(0);
static LOOKS: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);
/// Numbers of the round that is asked for and of the one that is done.
static ASKED: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicU64 = AtomicU64::new(0);

const LONG: u64 = 20_000_000_000;

pub(crate) fn run() {
    let cpus = if fw_cfg::present() { usize::from(fw_cfg::cpus()) } else { 1 };
    // As the guest `smp` has it, spinning processors make no progress there.
    let alone = cpus == 1 || platform::bochs_svm() || platform::bochs_vmx();
    let others = if alone { 0 } else { smp::start(cpus - 1) };
    let with = |name: &str, run: &dyn Fn(&mut Case, usize)| {
        case(name, |t| {
            if others == 0 {
                return t.skip("one CPU, or one at a time");
            }
            STOP.store(false, SeqCst);
            WRONG.store(0, SeqCst);
            LOOKS.store(0, SeqCst);
            run(t, others);
            STOP.store(true, SeqCst);
            (1..=others).for_each(|index| t.yes("every processor back from its job", smp::finished(index)));
            t.eq("a word that no entry led to", WRONG.load(SeqCst), 0u64);
        });
    };
    for ([_, name], form) in FORMS {
        // Two pages with the same flags, so that no half-written entry leads anywhere else: the narrow forms differ from
        // each other in one byte only.
        with(name, &|t, others| {
            let (address, space) = (area(130), Space::current());
            let block = frames::untouched(16 * PAGE, 16 * PAGE);
            let pages = [block, block + PAGE];
            poke(pages[0], 1u64);
            poke(pages[1], 2u64);
            space.map(address, pages[0], 1, P | W | A | D);
            let entry = space.entry(address, 1);
            // Forms that pass through other values on their way would show those to the others.
            if name == "race.mov_immediate" || name == "race.not_twice_then_mov" {
                t.yes("only done by one processor", true);
                return;
            }
            watch(others, address, 1, 2);
            for round in 0..600 {
                form(entry, read(entry), pages[(round + 1) % 2] | P | W | A | D);
                invlpg(address);
                t.eq("the word", read(address), (round as u64 + 1) % 2 + 1);
            }
            wait_until(LONG, || LOOKS.load(SeqCst) > 1000);
            t.eq("the entry", read(entry), pages[0] | P | W | A | D);
        });
    }
    with("race.accessed_and_dirty_against_locked_stores", &|t, others| {
        let (address, space) = (area(131), Space::current());
        let frame = page_with(0);
        space.map(address, frame, 1, P | W);
        let entry = space.entry(address, 1);
        ASKED.store(0, SeqCst);
        DONE.store(0, SeqCst);
        ADDRESS.store(address, SeqCst);
        smp::give(others, touch);
        for round in 1..=1500u64 {
            exec!("lock and [{}], {}", in(reg) entry, in(reg) !(A | D));
            ASKED.store(round, SeqCst);
            // Software bits 9 to 11 count while the other processor's walk sets A and D.
            exec!("lock and [{}], {}", in(reg) entry, in(reg) !(7u64 << 9));
            for _ in 0..round % 8 {
                exec!("lock add qword ptr [{}], 0x200", in(reg) entry);
            }
            t.yes("the other processor is done", wait_until(LONG, || DONE.load(SeqCst) == round));
            t.eq("the entry", read(entry), frame | P | W | A | D | (round % 8) << 9);
        }
    });
    with("race.split_and_merge", &|t, others| {
        let (address, space) = (area(132), Space::current());
        let block = frames::untouched(PAGE_2M, PAGE_2M);
        (0..512).for_each(|page| poke(block + page * PAGE, 7u64));
        let table = frames::page();
        (0..512).for_each(|page| poke(table + page * 8, (block + page * PAGE) | P | W));
        space.map(address, block, 2, P | W);
        watch(others, address + 77 * PAGE, 7, 7);
        for _ in 0..400 {
            space.set(address, 2, table | P | W);
            t.eq("the word", read(address + 77 * PAGE), 7u64);
            space.map(address, block, 2, P | W);
            t.eq("the word", read(address + 78 * PAGE), 7u64);
        }
        wait_until(LONG, || LOOKS.load(SeqCst) > 1000);
    });
    with("race.tables_swapped", &|t, others| {
        let (address, space) = (area(133), Space::current());
        let tables = [frames::page(), frames::page()];
        poke(tables[0], page_with(1) | P | W);
        poke(tables[1], page_with(2) | P | W);
        space.set(address, 2, tables[0] | P | W);
        watch(others, address, 1, 2);
        for round in 0..600 {
            space.set(address, 2, tables[(round + 1) % 2] | P | W);
            t.eq("the word", read(address), (round as u64 + 1) % 2 + 1);
        }
        wait_until(LONG, || LOOKS.load(SeqCst) > 1000);
    });
}

/// Lets the others read at `address` all the time.
fn watch(others: usize, address: u64, low: u64, high: u64) {
    ADDRESS.store(address, SeqCst);
    LOW.store(low, SeqCst);
    HIGH.store(high, SeqCst);
    (1..=others).for_each(|index| smp::give(index, look));
}

/// Job: reads, sometimes with a flush before, and keeps what may not be there.
fn look(index: usize) {
    let mut count = index;
    while !STOP.load(SeqCst) {
        count += 1;
        let address = ADDRESS.load(SeqCst);
        if count.is_multiple_of(3) {
            invlpg(address);
        }
        let word = read(address);
        if word < LOW.load(SeqCst) || word > HIGH.load(SeqCst) {
            WRONG.store(word, SeqCst);
        }
        LOOKS.fetch_add(1, SeqCst);
    }
}

/// Job: at each request drops its translation and writes.
fn touch(_: usize) {
    while !STOP.load(SeqCst) {
        let asked = ASKED.load(SeqCst);
        if asked != DONE.load(SeqCst) {
            let address = ADDRESS.load(SeqCst);
            invlpg(address);
            poke(address, asked);
            DONE.store(asked, SeqCst);
        }
        exec!("pause");
    }
}
