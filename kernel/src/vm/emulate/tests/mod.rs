//! Tests of the emulator: by group on a fake CPU, against the host's processor, and with hostile input.
mod arithmetic;
mod branches;
mod decoding;
mod descriptors;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod differential;
mod fake;
mod flag_insns;
mod frames;
mod hostile;
mod miscellany;
mod moves;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod native;
mod rules;
mod segments;
mod strings;
mod system;
mod tasks;
mod transfers;
mod world;
