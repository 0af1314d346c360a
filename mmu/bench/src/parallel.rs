//! What more threads gain: faults on ranges of their own in one VM, beside a loop over memory of their own.
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use mmu::{AccessKind, CpuId, FaultOutcome, Gfn, PageSize, TableCache, VmMemory};

use crate::direct::{kind, Kind};
use crate::pool::Pool;
use crate::ram::{Ram, GIB};

/// Rounds, of which the best counts: whatever else the machine does only adds.
const ROUNDS: usize = 300;

/// Passes of the loop over private memory: it takes about as long as the faults.
const PASSES: usize = 5;

/// A time for each number of threads.
const THREADS: [usize; 3] = [1, 2, 4];

/// Runs `work` on `threads` threads at once; the time from the first start to the last end. Each gets its number.
fn together(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let barrier = Barrier::new(threads);
    let (work, barrier) = (&work, &barrier);
    let times: Vec<(Instant, Instant)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|number| {
                scope.spawn(move || {
                    barrier.wait();
                    let start = Instant::now();
                    work(number);
                    (start, Instant::now())
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("the work ends well")).collect()
    });
    let start = times.iter().map(|&(start, _)| start).min().expect("there are threads");
    let end = times.iter().map(|&(_, end)| end).max().expect("there are threads");
    end - start
}

/// Every page of the gigabyte faults, each thread having its part of it, its CPU and its pages for tables.
fn populate(memory: &VmMemory<Ram>, kind: &Kind, pools: &[Pool], threads: usize) -> Duration {
    together(threads, |number| {
        let (cpu, pool) = (CpuId::new(number).expect("few threads"), &pools[number]);
        let mut cache = TableCache::new();
        let part = GIB / threads as u64;
        for gfn in number as u64 * part..(number as u64 + 1) * part {
            if cache.missing() > 0 {
                pool.fill(&mut cache);
            }
            let gpa = Gfn::new_truncate(gfn).gpa();
            let outcome = kind.fault(&memory.shared(cpu), &mut cache, gpa, AccessKind::Write);
            assert_eq!(outcome, FaultOutcome::Mapped);
        }
    })
}

/// As many compare-exchanges in private memory as there are entries in the tables of a gigabyte, over and over.
fn private(memory: &[Vec<AtomicU64>], threads: usize) -> Duration {
    together(threads, |number| {
        let part = GIB as usize / threads;
        for pass in 0..PASSES as u64 {
            for word in &memory[number][..part] {
                let _ = black_box(word.compare_exchange(pass, pass + 1, Ordering::AcqRel, Ordering::Acquire));
            }
        }
    })
}

/// Prints the time that all pages take together: `mmu-host parallel umbra|private THREADS NANOSECONDS`.
pub(crate) fn run() {
    let most = THREADS[THREADS.len() - 1];
    let root = Pool::new(1);
    let pools: Vec<Pool> = (0..most).map(|_| Pool::new(600)).collect();
    let words: Vec<Vec<AtomicU64>> =
        (0..most).map(|_| (0..GIB).map(|_| AtomicU64::new(0)).collect()).collect();
    let mut times = [const { Vec::new() }; THREADS.len()];
    let mut private_times = [const { Vec::new() }; THREADS.len()];
    // In turns, so that what else the machine does meets all of them.
    for _ in 0..ROUNDS {
        for (at, &threads) in THREADS.iter().enumerate() {
            pools.iter().chain([&root]).for_each(Pool::reset);
            let memory = Ram::new(GIB, 0, PageSize::Size4K).into_memory();
            let kind = kind(&memory, &root);
            times[at].push(populate(&memory, &kind, &pools, threads));
            words.iter().flatten().for_each(|word| word.store(0, Ordering::Relaxed));
            private_times[at].push(private(&words, threads));
        }
    }
    for (who, all) in [("umbra", times), ("private", private_times)] {
        for (threads, times) in THREADS.into_iter().zip(all) {
            let best = times.into_iter().min().expect("there are rounds");
            println!("mmu-host parallel {who} {threads} {}", best.as_nanos());
        }
    }
}
