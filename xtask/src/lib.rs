//! Every developer command, as a library that the emulator tests share.
pub mod elf32;
