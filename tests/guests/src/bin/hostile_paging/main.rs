//! Page tables as nobody should make them: recursive, aliased, in devices, at the end of memory, changed under use, by
//! every instruction, with flushes left out, and by several processors at once.
//!
//! Where the architecture says what happens, that is what a case expects. Where it does not, the case only has to end.
#![no_std]
#![no_main]
// Page-table entries are written by instructions of every form.
#![allow(unsafe_code)]
mod forms;
mod places;
mod races;
mod tables;
mod toggles;

use guests::cpu::{peek, poke};
use guests::frames;
use guests::main;
use guests::paging::PLAYGROUND;

main!(run);

fn run() {
    tables::run();
    places::run();
    toggles::run();
    forms::run();
    races::run();
}

/// Each case takes its own GiB of the playground.
fn area(index: u64) -> u64 {
    PLAYGROUND + ((8 + index) << 30)
}

/// A fresh page that holds `value`.
fn page_with(value: u64) -> u64 {
    let page = frames::page();
    poke(page, value);
    page
}

/// Reads the word at `address`.
fn read(address: u64) -> u64 {
    peek(address)
}
