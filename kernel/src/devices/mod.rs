//! Device models. Pure: no privileged instruction, no clock of their own, all tested on the host.
//!
//! A device gets the VM's clock as an argument (`now_ns`, nanoseconds since the VM's reset), says when it next
//! wants to be looked at (`next_event(now_ns) -> Option<u64>`, absolute nanoseconds) and shows its interrupt line
//! as a level (`irq(&self) -> bool`). The chipset samples lines after each access and each event.
//!
//! Each file has one order: registers, state, device, interrupt line and next event, save and restore, tests.
//! A restored state is a stranger's data: whatever it holds, a device stays memory-safe, panic-free and bounded.

pub mod acpi_pm;
pub mod apic_bus;
pub mod chipset;
pub mod clock;
pub mod fw_cfg;
pub mod ioapic;
pub mod lapic;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod ring;
pub mod rtc;
pub mod sysctl;
#[cfg(test)]
pub(crate) mod testing;
pub mod uart;
