//! Just enough of each device's programming interface to test it.
pub mod acpi;
pub mod acpi_timer;
pub mod fw_cfg;
pub mod ioapic;
pub mod lapic;
pub mod pic;
pub mod pit;
pub mod rtc;
