//! What the hot paths of `mmu` cost on the host, beside what other crates take for the same.
//!
//! `mmu-bench count CASE WHO` runs one case once, for `valgrind --tool=callgrind` to count what happens inside
//! [`measured_operations`](meter::measured_operations); `mmu-bench time FOLDER [CASE]` times cases by criterion, which keeps its
//! notes in the folder; `mmu-bench memory` says what tables a populated gigabyte needs, and `mmu-bench parallel` what more
//! threads gain. What comes out are lines that begin with `mmu-host`, for `cargo xtask bench mmu-host` to read.
#![allow(unsafe_code)] // It makes table pages and reads guest memory, as a kernel does.

mod direct;
mod log;
mod meter;
mod parallel;
mod peers;
mod pool;
mod ram;
mod shadow;
mod walk;

use std::process::ExitCode;

use meter::Meter;

/// One measurement: the case, whose code it measures, and how.
type Case = (&'static str, &'static str, fn(Meter<'_>));

/// All of them. The keys are those of `xtask`'s table.
const CASES: &[Case] = &[
    ("walk", "umbra", walk::slots),
    ("walk", "x86_64", peers::offset::walk),
    ("walk", "page_table_multiarch", peers::multiarch::walk),
    ("walk_flat", "umbra", walk::flat),
    ("fault_4k", "umbra", direct::fault),
    ("fault_4k", "x86_64", peers::offset::map),
    ("fault_4k", "page_table_multiarch", peers::multiarch::map),
    ("fault_spurious", "umbra", direct::spurious),
    ("fault_fast", "umbra", direct::fast),
    ("populate_4k", "umbra", direct::populate_4k),
    ("populate_4k", "x86_64", peers::offset::populate_4k),
    ("populate_4k", "page_table_multiarch", peers::multiarch::populate_4k),
    ("populate_2m", "umbra", direct::populate_2m),
    ("populate_2m", "x86_64", peers::offset::populate_2m),
    ("populate_2m", "page_table_multiarch", peers::multiarch::populate_2m),
    ("populate_1g", "umbra", direct::populate_1g),
    ("populate_1g", "x86_64", peers::offset::populate_1g),
    ("populate_1g", "page_table_multiarch", peers::multiarch::populate_1g),
    ("harvest", "umbra", log::harvest),
    ("shadow_fault", "umbra", shadow::fault),
    ("gpte_write", "umbra", shadow::entry_write),
    ("cr3_switch", "umbra", shadow::cr3_switch),
    ("cr3_flush", "umbra", shadow::cr3_flush),
    ("wp_toggle", "umbra", shadow::wp_toggle),
    ("nested_fault", "umbra", shadow::nested_fault),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["count", key, who] => {
            let Some((.., run)) = CASES.iter().find(|case| (case.0, case.1) == (key, who)) else {
                eprintln!("there is no case `{key}` of `{who}`");
                return ExitCode::FAILURE;
            };
            run(Meter::Count);
        }
        ["time", folder] => meter::time_all(CASES, folder.as_ref()),
        ["time", folder, key] => {
            let of_key: Vec<Case> = CASES.iter().filter(|case| case.0 == key).copied().collect();
            meter::time_all(&of_key, folder.as_ref());
        }
        ["memory"] => direct::table_bytes(),
        ["parallel"] => parallel::run(),
        _ => {
            eprintln!("usage: mmu-bench count CASE WHO | time FOLDER [CASE] | memory | parallel");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
