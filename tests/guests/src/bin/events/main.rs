//! Exceptions, interrupts, NMIs and what happens when several meet.
#![no_std]
#![no_main]
// Cases execute the instructions they are about.
#![allow(unsafe_code)]

mod debug;
mod delivery;
mod exceptions;
mod hlt;
mod ioapic;
mod lapic;
mod nmi;
mod pic;
mod shadow;

guests::main!(run);

fn run() {
    exceptions::run();
    delivery::run();
    debug::run();
    pic::run();
    ioapic::run();
    lapic::run();
    nmi::run();
    hlt::run();
    shadow::run();
}
