//! Virtual machines: memory, loading, vCPUs, exits, CPUID and MSR policy, instruction emulation.
pub mod layout;
pub mod load;
pub mod ram;
