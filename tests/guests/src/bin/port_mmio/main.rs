//! Port and memory-mapped I/O in every operand size and addressing mode.
//!
//! Most MMIO cases are differential: the same instruction runs on RAM, where the processor executes it, and on a
//! device register, where a hypervisor emulates it; results and flags must agree.
#![no_std]
#![no_main]
// Cases execute the instructions they are about.
#![allow(unsafe_code)]

mod addressing;
mod mmio;
mod ports;
mod strings;

guests::main!(run);

fn run() {
    ports::run();
    strings::run();
    mmio::run();
    addressing::run();
}
