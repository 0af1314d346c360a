//! A coherent CPU: no leaf of CPUID contradicts another, and CR4, EFER, XCR0, the MSRs, the local APIC, the page tables
//! and the instructions behave as CPUID says, on both vendors.
#![no_std]
#![no_main]
// Cases execute the instructions they are about.
#![allow(unsafe_code)]

mod apic;
mod instructions;
mod leaves;
mod memory;
mod registers;
mod view;

guests::main!(run);

fn run() {
    leaves::run();
    registers::run();
    instructions::run();
    memory::run();
    apic::run();
}
