//! The targets on random bytes: `fuzz-random TARGET SECONDS FILE`, for hosts where libFuzzer cannot be built. An input that
//! makes the target panic, or run for a minute, is written to FILE.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, fs, panic, process, thread};

/// The longest input.
const MAX_BYTES: u64 = 2048;
/// An input that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// What is under way, for whoever has to report it.
struct Current {
    file: PathBuf,
    input: Mutex<Vec<u8>>,
    runs: AtomicU64,
}

impl Current {
    /// Ends the process with the input in the file.
    fn report(&self, what: &str) -> ! {
        let input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        match fs::write(&self.file, &*input) {
            Ok(()) => eprintln!("{what}; the input is {}", self.file.display()),
            Err(error) => eprintln!("{what}; cannot write {}: {error}", self.file.display()),
        }
        process::exit(1)
    }
}

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    let [name, seconds, file] = &args[..] else { usage() };
    let (Some(target), Ok(seconds)) = (mmu_fuzz::target(name), seconds.parse()) else { usage() };
    let current = Arc::new(Current { file: file.into(), input: Mutex::default(), runs: AtomicU64::new(0) });
    let (of_hook, of_watch) = (Arc::clone(&current), Arc::clone(&current));
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        hook(info);
        of_hook.report("the target panicked");
    }));
    thread::spawn(move || watch(&of_watch));
    let start = Instant::now();
    let mut numbers =
        Numbers(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64));
    while start.elapsed() < Duration::from_secs(seconds) {
        let input = numbers.input();
        current.input.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&input);
        (target.run)(&input);
        let runs = current.runs.fetch_add(1, Ordering::Relaxed) + 1;
        if runs.is_power_of_two() {
            eprintln!("#{runs} after {} s", start.elapsed().as_secs());
        }
    }
    eprintln!("runs: {}", current.runs.load(Ordering::Relaxed));
}

fn usage() -> ! {
    let names: Vec<_> = mmu_fuzz::TARGETS.iter().map(|target| target.name).collect();
    eprintln!("usage: fuzz-random TARGET SECONDS FILE\ntargets: {}", names.join(", "));
    process::exit(2)
}

/// Reports an input that does not come to its end.
fn watch(current: &Current) {
    let mut before = u64::MAX;
    loop {
        let now = current.runs.load(Ordering::Relaxed);
        if now == before {
            current.report("the target hangs");
        }
        before = now;
        thread::sleep(LIMIT);
    }
}

/// A stream of numbers (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn input(&mut self) -> Vec<u8> {
        let words = self.next() % (MAX_BYTES / 8);
        (0..words).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}
