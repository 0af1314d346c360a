//! How a case is measured: run once for callgrind, or many times by criterion.
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use criterion::Criterion;

use crate::Case;

/// What to do with the operations of a case.
pub(crate) enum Meter<'c> {
    /// Run them once, where callgrind counts.
    Count,
    /// Time them; the name is the case and whose it is.
    Time(&'c mut Criterion, &'static str, &'static str),
}

impl Meter<'_> {
    /// Measures `operate`, which does `batch` operations on a state that `prepare` makes anew each time.
    pub(crate) fn measure<S>(
        self,
        batch: u64,
        mut prepare: impl FnMut() -> S,
        mut operate: impl FnMut(&mut S),
    ) {
        match self {
            Self::Count => {
                // What is done once in a program's life is over afterwards.
                operate(&mut prepare());
                let mut state = prepare();
                measured_operations(&mut || operate(&mut state));
            }
            Self::Time(criterion, key, who) => {
                criterion.benchmark_group(key).bench_function(who, |bencher| {
                    bencher.iter_custom(|times| {
                        let mut total = Duration::ZERO;
                        for _ in 0..times {
                            let mut state = prepare();
                            let start = Instant::now();
                            operate(&mut state);
                            total += start.elapsed();
                        }
                        total
                    });
                });
            }
        }
        println!("mmu-host operations {batch}");
    }
}

/// Where callgrind counts: its name is known to `xtask`.
#[inline(never)]
pub(crate) fn measured_operations(operations: &mut dyn FnMut()) {
    operations();
}

/// Times all cases, and prints a line for each: `mmu-host operations N` and `mmu-host time CASE WHO NANOSECONDS`, of which the
/// latter is for all operations.
pub(crate) fn time_all(cases: &[Case], folder: &Path) {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800))
        .output_directory(folder);
    for &(key, who, run) in cases {
        run(Meter::Time(&mut criterion, key, who));
        match median(&folder.join(key).join(who).join("new/estimates.json")) {
            Some(nanoseconds) => println!("mmu-host time {key} {who} {nanoseconds}"),
            None => eprintln!("criterion left no estimate for `{key}` of `{who}`"),
        }
    }
}

/// The median in criterion's file of estimates.
fn median(file: &Path) -> Option<f64> {
    let estimates: serde_json::Value = serde_json::from_str(&fs::read_to_string(file).ok()?).ok()?;
    estimates["median"]["point_estimate"].as_f64()
}
