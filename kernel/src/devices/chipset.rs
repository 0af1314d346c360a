//! The devices of a PC behind its ports: dispatch, interrupt lines and the next event.
//!
//! The chipset owns the devices and knows no vCPU, no local APIC and no I/O APIC. Whoever runs the VM
//! - forwards port accesses ([`Chipset::port_read`], [`Chipset::port_write`]) and memory accesses in the PCI hole,
//! - calls [`Chipset::advance`] when [`Chipset::next_event`] is reached (later is fine, only less punctual),
//! - after any call that takes `&mut self` feeds the I/O APIC: for each bit of [`Chipset::take_edges`] the pin goes
//!   low and high, then every pin takes its level from [`Chipset::lines`]; bit 0 (the PIT) is pin 2,
//! - asks [`Chipset::pic_intr`] whether the 8259s want the CPU (ExtINT) and acknowledges with [`Chipset::pic_ack`].
//!
//! No edge is lost: a line that rose and fell again between two looks, or fell and rose, still has its bit in
//! `take_edges` once. The 8259s are fed inside, in the same way.
//!
//! Accesses wider than a register are a row of byte accesses at ascending ports, as the bus splits them for 8-bit
//! devices. Registers that are wider by nature (PCI CONFIG_ADDRESS, fw_cfg selector and DMA address, exit port)
//! take their own size only. Ports that nobody claims read all ones and ignore writes.

use super::acpi_pm::{self, AcpiPm, AcpiPmState};
use super::fw_cfg::{self, FwCfg, FwCfgError, FwCfgState};
use super::pci::{self, Pci, PciState};
use super::pic::{self, Pic, PicState};
use super::pit::{self, Pit, PitState};
use super::rtc::{self, Memory, Rtc, RtcState};
use super::sysctl::{self, Sysctl, SysctlState};
use super::uart::{self, Uart, UartState};
use crate::vm::layout::{PM_TMR, SCI_IRQ};
use crate::vm::ram::GuestRam;
use alloc::boxed::Box;

/// First port of the serial port COM1.
pub const COM1: u16 = 0x3f8;
const COM1_LAST: u16 = COM1 + uart::PORTS - 1;

const IRQ_PIT: u8 = 0;
const IRQ_COM1: u8 = 4;
const IRQ_RTC: u8 = 8;
/// Shortest time between two interrupts of the PIT that nobody asks for by a port access. A counter can run out every
/// 1.7 us; the ticks in between are lost as interrupts, so that neither this guest nor another one is starved.
pub const MIN_PIT_INTERVAL_NS: u64 = 200_000;
/// The interrupt lines that there are.
const LINES: u32 = 1 << IRQ_PIT | 1 << IRQ_COM1 | 1 << IRQ_RTC | 1 << SCI_IRQ;

/// What a guest asked for by writing a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChipsetEvent {
    /// Reset the machine.
    Reset,
    /// ACPI S5: power off.
    PowerOff,
    /// The exit port was written with this value.
    Exit(u32),
}

/// What a chipset is made for.
#[derive(Clone, Copy, Debug)]
pub struct ChipsetConfig {
    /// RAM from address 0 to the PCI hole, in bytes.
    pub ram_below_4g: u64,
    /// RAM from 4 GiB up, in bytes.
    pub ram_above_4g: u64,
    /// Number of vCPUs.
    pub cpus: u16,
    /// What the real-time clock shows at time 0, in seconds since 1970.
    pub epoch_s: u64,
    /// Where the exit device is, for VMs that have one. Ports of other devices win.
    pub exit_port: Option<u16>,
}

/// Whose next event it is.
#[derive(Clone, Copy)]
enum Source {
    Pit,
    Com1,
    Rtc,
    Pm,
}

/// Everything that must be kept of a chipset to continue later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChipsetState {
    /// Interval timer.
    pub pit: PitState,
    /// Serial port.
    pub com1: UartState,
    /// Real-time clock and CMOS memory.
    pub rtc: RtcState,
    /// ACPI fixed hardware.
    pub pm: AcpiPmState,
    /// System control ports.
    pub sysctl: SysctlState,
    /// PCI configuration.
    pub pci: PciState,
    /// Firmware configuration.
    pub fw_cfg: FwCfgState,
    /// Interrupt controllers.
    pub pic: PicState,
    /// Levels of the interrupt lines.
    pub lines: u32,
    /// Edges that nobody has taken yet.
    pub edges: u32,
}

/// The devices of a PC.
#[derive(Clone, Debug)]
pub struct Chipset {
    pic: Pic,
    pit: Pit,
    com1: Uart,
    rtc: Rtc,
    pm: AcpiPm,
    sysctl: Sysctl,
    pci: Pci,
    fw_cfg: FwCfg,
    exit_port: Option<u16>,
    lines: u32,
    edges: u32,
    /// When each source wants to be looked at; `u64::MAX` is never.
    events: [u64; 4],
    /// The earliest of `events`.
    next: u64,
    /// The PIT is not looked at by itself before this, see [`MIN_PIT_INTERVAL_NS`].
    pit_rests_until: u64,
}

impl Chipset {
    /// A chipset as firmware would hand it over at time 0.
    pub fn new(config: &ChipsetConfig) -> Self {
        let memory = Memory { below_4g: config.ram_below_4g, above_4g: config.ram_above_4g };
        let ram = config.ram_below_4g.saturating_add(config.ram_above_4g);
        let mut chipset = Self {
            pic: Pic::new(1 << SCI_IRQ),
            pit: Pit::new(),
            com1: Uart::new(),
            rtc: Rtc::new(config.epoch_s, memory, config.cpus.into()),
            pm: AcpiPm::new(),
            sysctl: Sysctl::new(),
            pci: Pci::new(),
            fw_cfg: FwCfg::new(ram, config.cpus),
            exit_port: config.exit_port.filter(|&port| !is_device_port(port)),
            lines: 0,
            edges: 0,
            events: [u64::MAX; 4],
            next: u64::MAX,
            pit_rests_until: 0,
        };
        chipset.events = [0; 4];
        chipset.advance_due(0);
        // The level that an idle timer has from the start is no edge.
        chipset.edges = 0;
        chipset
    }

    /// Adds a fw_cfg file, before the VM runs.
    pub fn add_file(&mut self, name: &str, data: Box<[u8]>) -> Result<(), FwCfgError> {
        self.fw_cfg.add_file(name, data)
    }

    /// Reads `size` bytes (1, 2 or 4) at `port`.
    #[inline]
    pub fn port_read(&mut self, port: u16, size: u8, now_ns: u64) -> u32 {
        if size == 1 {
            self.read8(port, now_ns).into()
        } else {
            self.read_wide(port, size, now_ns)
        }
    }

    /// Writes a byte at `port`.
    #[inline]
    pub fn port_write_byte(&mut self, port: u16, value: u8, now_ns: u64) -> Option<ChipsetEvent> {
        self.write8(port, value, now_ns)
    }

    /// Writes `size` bytes (1, 2 or 4) at `port`. `ram` is where fw_cfg's DMA goes.
    #[inline]
    pub fn port_write(
        &mut self,
        port: u16,
        size: u8,
        value: u32,
        now_ns: u64,
        ram: &dyn GuestRam,
    ) -> Option<ChipsetEvent> {
        if size == 1 {
            self.write8(port, value as u8, now_ns)
        } else {
            self.write_wide(port, size, value, now_ns, ram)
        }
    }

    #[inline(always)]
    fn read8(&mut self, port: u16, now_ns: u64) -> u8 {
        match port {
            COM1..=COM1_LAST => {
                let value = self.com1.read(port - COM1, now_ns);
                self.sample_com1();
                value
            }
            pic::MASTER_CMD
            | pic::MASTER_DATA
            | pic::SLAVE_CMD
            | pic::SLAVE_DATA
            | pic::ELCR_MASTER
            | pic::ELCR_SLAVE => self.pic.read(port),
            pit::COUNTER0..=pit::CONTROL => {
                let value = self.pit.read(port, now_ns);
                self.sample_pit(now_ns);
                value
            }
            sysctl::PORT_B => {
                let out2 = self.pit.out2(now_ns);
                self.sysctl.read_port_b(out2, now_ns)
            }
            sysctl::KBD_DATA
            | sysctl::KBD_COMMAND
            | sysctl::POST
            | sysctl::PORT_A
            | sysctl::RESET_CONTROL => self.sysctl.read(port),
            rtc::INDEX | rtc::DATA => {
                let value = self.rtc.read(port, now_ns);
                self.sample_rtc(now_ns);
                value
            }
            acpi_pm::FIRST..=acpi_pm::LAST => {
                let value = self.pm.read(port, now_ns);
                self.sample_pm();
                value
            }
            pci::CONFIG_DATA..=pci::CONFIG_DATA_LAST => self.pci.read_data(port),
            fw_cfg::SELECTOR..=fw_cfg::LAST => self.fw_cfg.read(port),
            _ if self.exit_port == Some(port) => 0,
            _ => 0xff,
        }
    }

    fn read_wide(&mut self, port: u16, size: u8, now_ns: u64) -> u32 {
        match (port, size) {
            (PM_TMR, 4) => return AcpiPm::timer(now_ns),
            (pci::CONFIG_ADDRESS, 4) => return self.pci.address(),
            _ => {}
        }
        let mut bytes = [0; 4];
        for (i, byte) in (0u16..).zip(bytes.iter_mut().take(size.into())) {
            *byte = port.checked_add(i).map_or(0xff, |port| self.read8(port, now_ns));
        }
        u32::from_le_bytes(bytes)
    }

    #[inline(always)]
    fn write8(&mut self, port: u16, value: u8, now_ns: u64) -> Option<ChipsetEvent> {
        match port {
            COM1..=COM1_LAST => {
                self.com1.write(port - COM1, value, now_ns);
                self.sample_com1();
            }
            pic::MASTER_CMD
            | pic::MASTER_DATA
            | pic::SLAVE_CMD
            | pic::SLAVE_DATA
            | pic::ELCR_MASTER
            | pic::ELCR_SLAVE => self.pic.write(port, value),
            pit::COUNTER0..=pit::CONTROL => {
                self.pit.write(port, value, now_ns);
                self.sample_pit(now_ns);
            }
            sysctl::PORT_B => {
                let gate = self.sysctl.write_port_b(value);
                self.pit.set_gate2(gate, now_ns);
            }
            sysctl::KBD_DATA
            | sysctl::KBD_COMMAND
            | sysctl::POST
            | sysctl::PORT_A
            | sysctl::RESET_CONTROL => {
                return self.sysctl.write(port, value).then_some(ChipsetEvent::Reset);
            }
            rtc::INDEX | rtc::DATA => {
                self.rtc.write(port, value, now_ns);
                self.sample_rtc(now_ns);
            }
            acpi_pm::FIRST..=acpi_pm::LAST => {
                let power_off = self.pm.write(port, value, now_ns);
                self.sample_pm();
                return power_off.then_some(ChipsetEvent::PowerOff);
            }
            pci::CONFIG_DATA..=pci::CONFIG_DATA_LAST => self.pci.write_data(port, value),
            _ if self.exit_port == Some(port) => return Some(ChipsetEvent::Exit(value.into())),
            _ => {}
        }
        None
    }

    fn write_wide(
        &mut self,
        port: u16,
        size: u8,
        value: u32,
        now_ns: u64,
        ram: &dyn GuestRam,
    ) -> Option<ChipsetEvent> {
        match (port, size) {
            (pci::CONFIG_ADDRESS, 4) => self.pci.set_address(value),
            (fw_cfg::SELECTOR, 2) => self.fw_cfg.select(value as u16),
            (fw_cfg::DMA_HIGH | fw_cfg::DMA_LOW, 4) => self.fw_cfg.write_dma(port, value, ram),
            (_, 2) if self.exit_port == Some(port) => return Some(ChipsetEvent::Exit(value & 0xffff)),
            (_, 4) if self.exit_port == Some(port) => return Some(ChipsetEvent::Exit(value)),
            _ => {
                let mut event = None;
                for (i, byte) in (0u16..).zip(value.to_le_bytes().into_iter().take(size.into())) {
                    if let Some(port) = port.checked_add(i) {
                        event = event.or(self.write8(port, byte, now_ns));
                    }
                }
                return event;
            }
        }
        None
    }

    /// Reads `size` bytes (1 to 8) of device memory; `None` if nothing of the chipset is there.
    pub fn mmio_read(&mut self, gpa: u64, size: u8, _now_ns: u64) -> Option<u64> {
        self.pci.read_ecam(gpa, size)
    }

    /// Writes device memory; false if nothing of the chipset is there.
    pub fn mmio_write(&mut self, gpa: u64, size: u8, value: u64, _now_ns: u64) -> bool {
        self.pci.write_ecam(gpa, size, value)
    }

    /// Gives the guest a character on COM1; false if it has to wait.
    pub fn com1_push_input(&mut self, byte: u8, now_ns: u64) -> bool {
        let taken = self.com1.push_input(byte, now_ns);
        self.sample_com1();
        taken
    }

    /// Whether the guest has sent anything on COM1 that is not taken yet.
    #[inline]
    pub fn com1_has_output(&self) -> bool {
        self.com1.has_output()
    }

    /// Hands everything that the guest sent on COM1 to `sink`.
    pub fn com1_take_output(&mut self, sink: &mut impl FnMut(u8)) {
        self.com1.take_output(sink);
        self.sample_com1();
    }

    /// Brings every device that is due to `now_ns`.
    #[inline]
    pub fn advance(&mut self, now_ns: u64) {
        if now_ns >= self.next {
            self.advance_due(now_ns);
        }
    }

    fn advance_due(&mut self, now_ns: u64) {
        let [pit, com1, rtc, pm] = self.events.map(|at| at <= now_ns);
        if pit {
            self.pit.advance(now_ns);
            self.sample_pit(now_ns);
        }
        if com1 {
            self.com1.advance(now_ns);
            self.sample_com1();
        }
        if rtc {
            self.rtc.advance(now_ns);
            self.sample_rtc(now_ns);
        }
        if pm {
            self.pm.advance(now_ns);
            self.sample_pm();
        }
    }

    /// When the chipset next wants [`Chipset::advance`], in nanoseconds of the VM's clock. The time may be past.
    #[inline]
    pub fn next_event(&self, _now_ns: u64) -> Option<u64> {
        (self.next != u64::MAX).then_some(self.next)
    }

    /// Levels of the interrupt lines, bit n for ISA IRQ n: the PIT is bit 0, COM1 4, the RTC 8, the SCI 9.
    #[inline]
    pub fn lines(&self) -> u32 {
        self.lines
    }

    /// Whether [`take_edges`](Self::take_edges) has anything to take.
    #[inline]
    pub fn has_edges(&self) -> bool {
        self.edges != 0
    }

    /// Lines that rose since the last call, also if they fell again since.
    #[inline]
    pub fn take_edges(&mut self) -> u32 {
        core::mem::take(&mut self.edges)
    }

    /// Whether the 8259s request an interrupt.
    #[inline]
    pub fn pic_intr(&self) -> bool {
        self.pic.intr()
    }

    /// Acknowledges the 8259s' interrupt: the vector.
    pub fn pic_ack(&mut self) -> u8 {
        self.pic.ack()
    }

    #[inline]
    fn sample_pit(&mut self, now_ns: u64) {
        let edge = self.pit.take_edge();
        self.drive(IRQ_PIT, self.pit.irq(), edge);
        if edge {
            self.pit_rests_until = now_ns.saturating_add(MIN_PIT_INTERVAL_NS);
        }
        let next = self.pit.next_event().map(|at| at.max(self.pit_rests_until));
        self.schedule(Source::Pit, next);
    }

    #[inline]
    fn sample_com1(&mut self) {
        let pulse = self.com1.take_pulse();
        self.drive(IRQ_COM1, self.com1.irq(), pulse);
        self.schedule(Source::Com1, self.com1.next_event());
    }

    fn sample_rtc(&mut self, now_ns: u64) {
        self.drive(IRQ_RTC, self.rtc.irq(), false);
        self.schedule(Source::Rtc, self.rtc.next_event(now_ns));
    }

    #[inline]
    fn sample_pm(&mut self) {
        self.drive(SCI_IRQ, self.pm.irq(), false);
        self.schedule(Source::Pm, self.pm.next_event());
    }

    /// Sets a line to `level`; `pulse`: it rose since it was last looked at, whatever it is now and was then.
    #[inline]
    fn drive(&mut self, irq: u8, level: bool, pulse: bool) {
        let bit = 1 << irq;
        let was = self.lines & bit != 0;
        if level == was && !pulse {
            return;
        }
        if pulse && was {
            self.pic.set_irq(irq, false);
        }
        if pulse || level {
            self.edges |= bit;
            self.pic.set_irq(irq, true);
        }
        if !level {
            self.pic.set_irq(irq, false);
            self.lines &= !bit;
        } else {
            self.lines |= bit;
        }
    }

    #[inline]
    fn schedule(&mut self, source: Source, at: Option<u64>) {
        let at = at.unwrap_or(u64::MAX);
        let slot = &mut self.events[source as usize];
        if *slot != at {
            *slot = at;
            let [a, b, c, d] = self.events;
            self.next = a.min(b).min(c.min(d));
        }
    }

    /// What must be kept to continue later. fw_cfg's items and the exit port are configuration and not part of it.
    pub fn save(&self) -> ChipsetState {
        ChipsetState {
            pit: self.pit.save(),
            com1: self.com1.save(),
            rtc: self.rtc.save(),
            pm: self.pm.save(),
            sysctl: self.sysctl.save(),
            pci: self.pci.save(),
            fw_cfg: self.fw_cfg.save(),
            pic: self.pic.save(),
            lines: self.lines,
            edges: self.edges,
        }
    }

    /// Continues from `state`, whatever it holds, at `now_ns`.
    pub fn restore(&mut self, state: &ChipsetState, now_ns: u64) {
        self.pit.restore(&state.pit);
        self.com1.restore(&state.com1);
        self.rtc.restore(&state.rtc);
        self.pm.restore(&state.pm);
        self.sysctl.restore(&state.sysctl);
        self.pci.restore(&state.pci);
        self.fw_cfg.restore(&state.fw_cfg);
        self.pic.restore(&state.pic);
        self.lines = state.lines & LINES;
        self.edges = state.edges & LINES;
        self.events = [0; 4];
        self.advance_due(now_ns);
    }
}

/// Whether a device of every VM answers at `port`.
const fn is_device_port(port: u16) -> bool {
    matches!(
        port,
        pic::MASTER_CMD
            | pic::MASTER_DATA
            | pic::SLAVE_CMD
            | pic::SLAVE_DATA
            | pic::ELCR_MASTER
            | pic::ELCR_SLAVE
            | pit::COUNTER0..=pit::CONTROL
            | sysctl::KBD_DATA
            | sysctl::PORT_B
            | sysctl::KBD_COMMAND
            | sysctl::POST
            | sysctl::PORT_A
            | rtc::INDEX
            | rtc::DATA
            | COM1..=COM1_LAST
            | fw_cfg::SELECTOR..=fw_cfg::LAST
            | acpi_pm::FIRST..=acpi_pm::LAST
            | pci::CONFIG_ADDRESS..=pci::CONFIG_DATA_LAST
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::clock;
    use crate::devices::testing::Ram;
    use crate::vm::layout::{ECAM_START, EXIT_PORT, PM1A_CNT, PM1A_EVT, RESET_PORT};
    use proptest::prelude::*;

    const CONFIG: ChipsetConfig = ChipsetConfig {
        ram_below_4g: 512 << 20,
        ram_above_4g: 0,
        cpus: 2,
        epoch_s: 1_700_000_000,
        exit_port: Some(EXIT_PORT),
    };

    fn chipset() -> Chipset {
        Chipset::new(&CONFIG)
    }

    fn out(c: &mut Chipset, port: u16, value: u8, now: u64) -> Option<ChipsetEvent> {
        c.port_write(port, 1, value.into(), now, &Ram::new(0))
    }

    /// Both 8259s as Linux sets them up, `mask` unmasked.
    fn init_pics(c: &mut Chipset, mask: u16) {
        let writes = [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x38),
            (0xa1, 2),
            (0xa1, 1),
        ];
        for (port, value) in writes {
            out(c, port, value, 0);
        }
        let [low, high] = (!mask).to_le_bytes();
        out(c, 0x21, low, 0);
        out(c, 0xa1, high, 0);
    }

    fn program_pit(c: &mut Chipset, control: u8, count: u16, now: u64) {
        out(c, 0x43, control, now);
        out(c, 0x40, count as u8, now);
        out(c, 0x40, (count >> 8) as u8, now);
    }

    #[test]
    fn unclaimed_ports_read_all_ones() {
        let mut c = chipset();
        for port in (0..=0xffffu16).filter(|&port| !is_device_port(port) && port != EXIT_PORT) {
            assert_eq!(c.port_read(port, 1, 0), 0xff, "{port:#x}");
            assert_eq!(out(&mut c, port, 0xff, 0), None);
        }
        assert_eq!(c.port_read(0x2e8, 2, 0), 0xffff);
        assert_eq!(c.port_read(0x2e8, 4, 0), 0xffff_ffff);
        assert_eq!(c.port_read(0xffff, 4, 0), 0xffff_ffff, "does not wrap around");
        assert_eq!(c.port_write(0xffff, 4, 0, 0, &Ram::new(0)), None);
    }

    #[test]
    fn exit_port_yields_to_devices() {
        for port in 0..=0xffffu16 {
            let mut c = Chipset::new(&ChipsetConfig { exit_port: Some(port), ..CONFIG });
            let exits = !is_device_port(port);
            for (size, value) in [(1u8, 0x11), (2, 0x2211), (4, 0x4433_2211u32)] {
                let event = c.port_write(port, size, value, 0, &Ram::new(0));
                assert_eq!(event == Some(ChipsetEvent::Exit(value)), exits, "{port:#x} {size}");
            }
        }
        let mut c = Chipset::new(&ChipsetConfig { exit_port: None, ..CONFIG });
        assert_eq!(out(&mut c, EXIT_PORT, 3, 0), None);
        assert_eq!(c.port_read(EXIT_PORT, 1, 0), 0xff);
    }

    #[test]
    fn reset_and_power_off() {
        let mut c = chipset();
        assert_eq!(out(&mut c, RESET_PORT, 0x06, 0), Some(ChipsetEvent::Reset));
        assert_eq!(out(&mut c, 0x64, 0xfe, 0), Some(ChipsetEvent::Reset));
        assert_eq!(out(&mut c, 0x92, 0x01, 0), Some(ChipsetEvent::Reset));
        let s5 = 1 << 13 | 5 << 10;
        assert_eq!(c.port_write(PM1A_CNT, 2, s5, 0, &Ram::new(0)), Some(ChipsetEvent::PowerOff));
        assert_eq!(c.port_read(PM1A_CNT, 2, 0), 5 << 10 | 1);
    }

    #[test]
    fn wide_accesses_are_rows_of_bytes() {
        let mut c = chipset();
        let ram = Ram::new(0);
        c.port_write(COM1 + 3, 1, 0x83, 0, &ram);
        c.port_write(COM1, 2, 0x1234, 0, &ram); // divisor, low and high
        assert_eq!(c.port_read(COM1, 4, 0) & 0xff00_ffff, 0x8300_1234);
        let now = 5_000_000_000;
        let timer = c.port_read(PM_TMR, 4, now);
        assert_eq!(c.port_read(PM_TMR + 1, 2, now), timer >> 8 & 0xffff);
        assert_eq!(c.port_read(PM_TMR + 2, 4, now), timer >> 16 | 0xffff_0000);
        assert_eq!(c.port_read(PM1A_EVT + 2, 4, now), 0x0001_0000, "enable, then control");
    }

    #[test]
    fn pci_mechanism_one() {
        let mut c = chipset();
        let ram = Ram::new(0);
        out(&mut c, 0xcfb, 1, 0);
        c.port_write(0xcf8, 4, 0x8000_0000, 0, &ram);
        assert_eq!(c.port_read(0xcf8, 4, 0), 0x8000_0000);
        assert_eq!(c.port_read(0xcfc, 4, 0), 0x29c0_8086);
        assert_eq!(c.port_read(0xcfe, 2, 0), 0x29c0);
        assert_eq!(c.port_read(0xcff, 1, 0), 0x29);
        assert_eq!(c.port_read(0xcfe, 4, 0), 0xffff_29c0);
        c.port_write(0xcf8, 4, 0x8000_0008, 0, &ram);
        assert_eq!(c.port_read(0xcfe, 2, 0), 0x0600, "host bridge");
        assert_eq!(c.port_read(0xcf8, 1, 0), 0xff, "only doublewords reach the address");
        assert_eq!(c.mmio_read(ECAM_START, 4, 0), Some(0x29c0_8086));
        assert_eq!(c.mmio_read(0xfec0_0000, 4, 0), None);
        assert!(c.mmio_write(ECAM_START, 4, 0, 0) && !c.mmio_write(0, 4, 0, 0));
    }

    #[test]
    fn fw_cfg_by_port_and_by_dma() {
        let mut c = chipset();
        c.add_file("opt/x", b"xyz".as_slice().into()).unwrap();
        let ram = Ram::new(0x100);
        c.port_write(0x510, 2, 0, 0, &ram);
        assert_eq!([0; 4].map(|_: u8| c.port_read(0x511, 1, 0) as u8), *b"QEMU");
        assert_eq!(c.port_read(0x514, 4, 0), u32::from_le_bytes(*b"QEMU"));
        assert_eq!(c.port_read(0x518, 4, 0), u32::from_le_bytes(*b" CFG"));
        let mut descriptor = (0x20u32 << 16 | 0b1010).to_be_bytes().to_vec();
        descriptor.extend(3u32.to_be_bytes());
        descriptor.extend(0x80u64.to_be_bytes());
        ram.write(0x40, &descriptor).unwrap();
        c.port_write(0x518, 4, 0x40u32.to_be(), 0, &ram);
        assert_eq!(ram.0.borrow()[0x80..0x84], *b"xyz\xcc");
        assert_eq!(ram.0.borrow()[0x40..0x44], [0; 4]);
    }

    #[test]
    fn timer_ticks_reach_the_pic_and_the_edge_bitmap() {
        let mut c = chipset();
        init_pics(&mut c, 1);
        program_pit(&mut c, 0x34, 11_932, 0);
        assert_eq!(c.take_edges(), 0);
        let mut now = 0;
        for _ in 0..100 {
            now = c.next_event(now).unwrap();
            c.advance(now);
            assert!(c.pic_intr());
            assert_eq!(c.take_edges(), 1);
            assert_eq!(c.pic_ack(), 0x30);
            out(&mut c, 0x20, 0x20, now);
            assert!(!c.pic_intr());
        }
    }

    #[test]
    fn a_late_look_at_a_low_timer_line_still_shows_the_edge() {
        let mut c = chipset();
        init_pics(&mut c, 1);
        program_pit(&mut c, 0x36, 1000, 0); // square wave: low in the second half
        let late = clock::PIT.ns(1 + 3 * 1000 + 700);
        c.advance(late);
        assert_eq!((c.lines() & 1, c.take_edges(), c.take_edges()), (0, 1, 0));
        assert_eq!(c.pic_ack(), 0x30);
        assert!(!c.pic_intr(), "three missed ticks make one interrupt");
    }

    #[test]
    fn reading_the_counter_does_not_swallow_the_edge() {
        let mut c = chipset();
        init_pics(&mut c, 1);
        program_pit(&mut c, 0x30, 100, 0);
        let now = clock::PIT.ns(500);
        c.port_read(0x40, 1, now);
        assert_eq!((c.lines() & 1, c.take_edges()), (1, 1));
        assert!(c.pic_intr());
    }

    #[test]
    fn uart_rtc_and_sci_lines() {
        let mut c = chipset();
        init_pics(&mut c, 1 << 2 | 1 << 4 | 1 << 8 | 1 << 9);
        out(&mut c, COM1 + 4, 0x08, 0);
        out(&mut c, COM1 + 1, 0x02, 0);
        assert_eq!((c.lines(), c.take_edges()), (1 | 1 << 4, 1 << 4));
        assert_eq!(c.pic_ack(), 0x34);
        out(&mut c, COM1, b'u', 0); // without reading IIR: a pulse
        assert_eq!((c.lines(), c.take_edges()), (1 | 1 << 4, 1 << 4));
        let mut text = Vec::new();
        assert!(c.com1_has_output());
        c.com1_take_output(&mut |byte| text.push(byte));
        assert_eq!(text, b"u");

        out(&mut c, 0x70, 0x0b, 0);
        out(&mut c, 0x71, 0x12, 0);
        assert_eq!(c.next_event(0), Some(1_000_000_000));
        c.advance(1_000_000_000);
        assert_eq!((c.lines() >> 8 & 1, c.take_edges()), (1, 1 << 8));
        out(&mut c, 0x70, 0x0c, 1_000_000_000);
        c.port_read(0x71, 1, 1_000_000_000);
        assert_eq!(c.lines() >> 8 & 1, 0);

        c.port_write(PM1A_EVT + 2, 2, 1, 1_000_000_000, &Ram::new(0));
        out(&mut c, 0x70, 0x0b, 1_000_000_000);
        out(&mut c, 0x71, 0x02, 1_000_000_000);
        let carry = c.next_event(1_000_000_000).unwrap();
        c.advance(carry);
        assert_eq!((c.lines() >> 9 & 1, c.take_edges()), (1, 1 << 9));
        assert_eq!(c.port_read(0x4d1, 1, 0), 2, "the SCI is level triggered");
    }

    #[test]
    fn input_raises_com1_after_the_character_timeout() {
        let mut c = chipset();
        for (offset, value) in [(3, 0x80), (0, 1), (3, 3), (2, 0xc1), (4, 0x0b), (1, 1)] {
            out(&mut c, COM1 + offset, value, 0);
        }
        assert!(c.com1_push_input(b'q', 0));
        assert_eq!(c.lines() >> 4 & 1, 0);
        let due = c.next_event(0).unwrap();
        c.advance(due);
        assert_eq!(c.take_edges(), 1 << 4);
        assert_eq!(c.port_read(COM1, 1, due), u32::from(b'q'));
        assert_eq!((c.lines() >> 4 & 1, c.next_event(due)), (0, None));
    }

    #[test]
    fn port_61_drives_channel_2() {
        let mut c = chipset();
        out(&mut c, 0x61, 1, 0);
        out(&mut c, 0x43, 0xb0, 0);
        out(&mut c, 0x42, 100, 0);
        out(&mut c, 0x42, 0, 0);
        let (before, after) = (clock::PIT.ns(100), clock::PIT.ns(101));
        assert_eq!(c.port_read(0x61, 1, before) & 0x21, 0x01);
        assert_eq!(c.port_read(0x61, 1, after) & 0x21, 0x21);
        assert_eq!(c.next_event(after), None, "channel 2 needs no events");
    }

    #[test]
    fn save_restore_continues() {
        let mut c = chipset();
        init_pics(&mut c, 1);
        program_pit(&mut c, 0x34, 5000, 0);
        out(&mut c, COM1, b'a', 0);
        c.advance(clock::PIT.ns(6000));
        let saved = c.save();
        let mut other = chipset();
        other.restore(&saved, clock::PIT.ns(6000));
        // The clock's lazy flags are brought up to date by the restore.
        assert_eq!(other.save(), ChipsetState { rtc: other.rtc.save(), ..saved });
        assert_eq!(other.next_event(0), c.next_event(0));
        assert_eq!((other.pic_intr(), other.take_edges()), (true, 1));
    }

    proptest! {
        /// Whatever a guest does to whatever port at whatever time, nothing breaks and events stay in order.
        #[test]
        fn any_access_is_harmless(
            ops in prop::collection::vec(
                (prop_oneof![
                    Just(0x20u16..0x24), Just(0x40..0x44), Just(0x60..0x65), Just(0x70..0x72), Just(0xa0..0xa2),
                    Just(0x3f8..0x400), Just(0x4d0..0x4d2), Just(0x510..0x51c), Just(0x600..0x60c),
                    Just(0xcf8..0xd00), Just(0..0xffff),
                ].prop_flat_map(|range| range), 0..3usize, any::<u32>(), any::<bool>(), 0..100_000_000u64),
                1..120
            )
        ) {
            let mut c = chipset();
            let ram = Ram::new(0x100);
            let mut now = 0;
            for (port, size, value, write, wait) in ops {
                now += wait;
                let size = [1, 2, 4][size];
                if write {
                    c.port_write(port, size, value, now, &ram);
                } else {
                    let read = c.port_read(port, size, now);
                    prop_assert!(size == 4 || read >> (8 * size) == 0);
                }
                c.com1_push_input(value as u8, now);
                for _ in 0..3 {
                    let Some(event) = c.next_event(now) else { break };
                    now = now.max(event);
                    c.advance(now);
                    prop_assert!(c.next_event(now).is_none_or(|next| next > now), "an event is dealt with at once");
                }
                if c.pic_intr() {
                    c.pic_ack();
                }
                prop_assert_eq!(c.take_edges() & !LINES, 0);
            }
            let saved = c.save();
            c.restore(&saved, now);
        }
    }
}
