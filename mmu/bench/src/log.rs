//! The dirty log of a gigabyte, every page of which was written.
use mmu::{Flush, Gfn, LogBy, Npt, PageSize, PhysTables};

use crate::direct::Vm;
use crate::meter::Meter;
use crate::ram::{CPU, GIB};

/// A gigabyte in 4 KiB pages, all of them writable and logged as written.
fn all_written() -> Vm {
    let mut vm = Vm::new(PageSize::Size4K);
    vm.populate();
    let started = vm.memory.exclusive(CPU).start_dirty_log_all_set(Gfn::default(), LogBy::WriteProtection);
    // Everything is logged already: nothing is to be armed.
    let _ = started.expect("there is memory for notes");
    vm
}

/// Words of the log that are taken under one guard.
const WORDS: usize = 64;

/// Takes the whole log, arms its pages again and requests the flush.
pub(crate) fn harvest(meter: Meter<'_>) {
    meter.measure(1, all_written, |vm| {
        let mut all: Option<Flush<'_, Npt, PhysTables>> = None;
        let (mut word, mut found) = (0, 0);
        loop {
            let shared = vm.memory.shared(CPU);
            let log = shared.dirty_log(Gfn::default()).expect("logged");
            let end = log.words().min(word + WORDS);
            for word in word..end {
                let mask = log.clear(word, u64::MAX);
                found += mask.count_ones();
                let first = Gfn::new_truncate(word as u64 * 64);
                let flush = vm.kind.rearm_pages(&shared, first, mask);
                all = Some(match all {
                    Some(joined) => joined.join(flush),
                    None => flush,
                });
            }
            word = end;
            if word == log.words() {
                break;
            }
        }
        assert_eq!(u64::from(found), GIB);
        let issued = all.and_then(Flush::issue);
        assert!(issued.is_some_and(|issued| issued.kick.is_empty()));
    });
}
