//! Virtual machines: memory, loading, vCPUs, exits, CPUID and MSR policy, instruction emulation.
pub mod events;
pub mod exceptions;
pub mod emulate;
pub mod layout;
pub mod ram;
