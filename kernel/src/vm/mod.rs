//! Virtual machines: memory, loading, vCPUs, exits, CPUID and MSR policy, instruction emulation.
pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod ram;
