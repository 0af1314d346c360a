//! Virtual machines: memory, loading, vCPUs, exits, CPUID and MSR policy, instruction emulation.
pub mod acpi_tables;
pub mod layout;
pub mod ram;
