//! CPUID, MSRs, control registers and the instructions that a guest without virtualization must not have.
#![no_std]
#![no_main]
// Cases execute the instructions they are about.
#![allow(unsafe_code)]

mod areas;
mod control;
mod cpuid;
mod features;
mod msr;
mod virt;
mod xsave;

guests::main!(run);

fn run() {
    cpuid::run();
    features::run();
    xsave::run();
    areas::run();
    msr::run();
    virt::run();
    control::run();
}
