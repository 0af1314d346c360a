//! Where a guest finds things: guest-physical addresses and ports that the devices, the ACPI tables and the
//! loaders agree on.

/// First guest-physical address of the PCI hole; RAM that does not fit below it continues at 4 GiB.
pub const PCI_HOLE_START: u64 = 0xc000_0000;
/// End of the PCI hole, where RAM above 4 GiB begins.
pub const PCI_HOLE_END: u64 = 0x1_0000_0000;
/// Conventional memory ends here; the last KiB below 640 KiB is the extended BIOS data area.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// Start of the read-only-memory window below 1 MiB (reserved in the memory map).
pub const ROM_START: u64 = 0xa_0000;
/// ACPI tables live here, RAM that the memory map calls reserved; the RSDP is first.
pub const ACPI_START: u64 = 0xe_0000;
/// End of the ACPI area.
pub const ACPI_END: u64 = 0x10_0000;

/// PCI Express configuration space (MCFG), buses 0 to 255.
pub const ECAM_START: u64 = 0xe000_0000;
/// Size of the ECAM window in bytes: 1 MiB a bus, one bus.
pub const ECAM_SIZE: u64 = 1 << 20;
/// First I/O APIC. Intel 82093AA.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Local APIC at reset (IA32_APIC_BASE).
pub const LAPIC_START: u64 = 0xfee0_0000;

/// ACPI PM1a event block (status, enable), 4 bytes.
pub const PM1A_EVT: u16 = 0x600;
/// ACPI PM1a control block, 2 bytes.
pub const PM1A_CNT: u16 = 0x604;
/// ACPI power-management timer, 4 bytes, 3.579545 MHz, 32 bits wide.
pub const PM_TMR: u16 = 0x608;
/// Value of SLP_TYP that means S5, as the DSDT's \_S5_ says.
pub const S5_SLP_TYP: u8 = 5;
/// Reset control register (FADT RESET_REG): writing 6 resets the machine.
pub const RESET_PORT: u16 = 0xcf9;
/// Interrupt of the ACPI SCI, level triggered, active high.
pub const SCI_IRQ: u8 = 9;
/// fw_cfg selector port; data at +1, DMA address at +4 (high half) and +8 (low half).
pub const FW_CFG_PORT: u16 = 0x510;
/// Default port of the exit device, for VMs that ask for it.
pub const EXIT_PORT: u16 = 0xf4;
