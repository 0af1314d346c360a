//! A virtual machine: what its vCPUs share.

use super::clock::VmClock;
use super::cpuid::CpuidTable;
use super::output::Output;
use super::paging::GuestMemory;
use super::report::End;
use crate::cpu::tsc;
use crate::devices::apic_bus::{ApicBus, ApicSink, BusSink, VcpuSet};
use crate::devices::chipset::Chipset;
use crate::devices::ioapic::IoApic;
use crate::hw::Vendor;
use alloc::string::String;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Mutex;

/// The chipset with its I/O APIC, under one lock: an interrupt line goes to both kinds of controller.
pub struct Board {
    /// Everything behind ports, and ECAM.
    pub chipset: Chipset,
    /// The I/O APIC.
    pub ioapic: IoApic,
    /// Interrupt lines as the I/O APIC last saw them.
    lines: u32,
    /// What the chipset last looked like.
    outlook: Outlook,
    /// Interrupt request of the 8259 pair as vCPU 0 last saw it.
    pic_intr_shown: bool,
}

/// What a vCPU must look at again when it differs before and after an access: the interrupt that the 8259 pair
/// asks for, and when the chipset next does something by itself.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Outlook {
    pic_intr: bool,
    next_event: Option<u64>,
}

impl Board {
    /// A board in reset state.
    pub fn new(chipset: Chipset) -> Self {
        Self { chipset, ioapic: IoApic::new(), lines: 0, outlook: Outlook::default(), pic_intr_shown: false }
    }

    /// The interrupt request of the 8259 pair, for vCPU 0, whose LINT0 it is wired to.
    #[inline]
    pub fn show_pic_intr(&mut self) -> bool {
        self.pic_intr_shown = self.chipset.pic_intr();
        self.pic_intr_shown
    }

    /// Whether the 8259 pair requests an interrupt that vCPU 0 has not seen yet.
    #[inline]
    pub fn pic_intr_is_news(&self) -> bool {
        self.chipset.pic_intr() && !self.pic_intr_shown
    }

    /// Whether the chipset's [`Outlook`] has changed since this was last asked.
    #[inline]
    pub fn outlook_changed(&mut self, now_ns: u64) -> bool {
        let outlook =
            Outlook { pic_intr: self.chipset.pic_intr(), next_event: self.chipset.next_event(now_ns) };
        let changed = outlook != self.outlook;
        if changed {
            self.outlook = outlook;
        }
        changed
    }

    /// Whether [`update_lines`](Self::update_lines) has anything to do.
    #[inline]
    pub fn lines_changed(&self) -> bool {
        self.chipset.lines() != self.lines || self.chipset.has_edges()
    }

    /// Shows the I/O APIC the lines that changed, and the edges there were, since it last looked.
    #[inline]
    pub fn update_lines(&mut self, sink: &mut impl ApicSink) {
        let lines = self.chipset.lines();
        let edges = self.chipset.take_edges();
        let changed = (lines ^ self.lines) | edges;
        if changed != 0 {
            self.propagate(lines, edges, changed, sink);
        }
    }

    #[cold]
    fn propagate(&mut self, lines: u32, edges: u32, mut changed: u32, sink: &mut impl ApicSink) {
        self.lines = lines;
        while changed != 0 {
            let irq = changed.trailing_zeros() as usize;
            changed &= changed - 1;
            // ISA IRQ 0 is wired to pin 2, as the MADT says; ISA IRQ 2 is the cascade and has no pin.
            let pin = if irq == 0 { 2 } else { irq };
            if edges >> irq & 1 != 0 {
                self.ioapic.set_line(pin, false, sink);
                self.ioapic.set_line(pin, true, sink);
            }
            self.ioapic.set_line(pin, lines >> irq & 1 != 0, sink);
        }
    }
}

/// What the vCPUs of a VM share.
pub struct Guest<V: Vendor> {
    /// Name in umbra.toml.
    pub name: String,
    /// RAM and second-stage tables.
    pub memory: GuestMemory<V>,
    /// Devices.
    pub board: Mutex<Board>,
    /// Interrupt messages between vCPUs.
    pub bus: ApicBus,
    /// Time.
    pub clock: VmClock,
    /// What CPUID says.
    pub cpuid: CpuidTable,
    /// Wall-clock time at the VM's start, in seconds since 1970.
    pub epoch_s: u64,
    /// COM1's way to the console.
    pub output: Output,
    ended: AtomicBool,
    end: Mutex<Option<End>>,
}

/// What a VM is made of.
pub struct Parts<V: Vendor> {
    /// Name in umbra.toml.
    pub name: String,
    /// RAM and second-stage tables.
    pub memory: GuestMemory<V>,
    /// Devices.
    pub board: Board,
    /// Interrupt messages between vCPUs.
    pub bus: ApicBus,
    /// Time.
    pub clock: VmClock,
    /// What CPUID says.
    pub cpuid: CpuidTable,
    /// Wall-clock time at the VM's start, in seconds since 1970.
    pub epoch_s: u64,
    /// Whether COM1 is wired to the console.
    pub console: bool,
}

impl<V: Vendor> Guest<V> {
    /// A VM of these parts that has not ended.
    pub fn new(parts: Parts<V>) -> Self {
        let Parts { name, memory, board, bus, clock, cpuid, epoch_s, console } = parts;
        let output = Output::new(&name, console);
        let (board, end) = (Mutex::new(board), Mutex::new(None));
        Self { name, memory, board, bus, clock, cpuid, epoch_s, output, ended: AtomicBool::new(false), end }
    }

    /// Ends the VM. The first end counts.
    pub fn end(&self, end: End) {
        self.end.lock().get_or_insert(end);
        self.ended.store(true, Ordering::Release);
    }

    /// Whether the VM has ended.
    #[inline]
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// How the VM ended, if it has.
    pub fn how_it_ended(&self) -> Option<End> {
        *self.end.lock()
    }

    /// When, in the host's TSC, the chipset wants to be looked at.
    pub fn chipset_deadline(&self) -> Option<u64> {
        self.board.lock().chipset.next_event(0).map(|ns| self.clock.host_tsc_of_ns(ns))
    }

    /// Types a byte on COM1; false if there is no room for it now.
    pub fn type_byte(&self, byte: u8) -> bool {
        let now = self.clock.ns(tsc::read());
        let mut board = self.board.lock();
        let taken = board.chipset.com1_push_input(byte, now);
        // Whoever is woken finds its mailbox when the scheduler looks.
        board.update_lines(&mut BusSink::new(&self.bus));
        taken
    }

    /// Gives the console's focus to this VM or takes it away.
    pub fn set_focus(&self, focused: bool) {
        self.output.set_focus(focused);
    }

    /// Whether messages wait for vCPU `index`.
    #[inline]
    pub fn has_mail(&self, index: usize) -> bool {
        self.bus.port(index).is_some_and(|port| !port.is_empty())
    }

    /// Runs `send` with a sink onto the bus and adds the vCPUs that it woke to `woken`.
    #[inline]
    pub fn with_sink<R>(&self, woken: &mut VcpuSet, send: impl FnOnce(&mut BusSink<'_>) -> R) -> R {
        let mut sink = BusSink::new(&self.bus);
        let result = send(&mut sink);
        woken.0 |= sink.woken.0;
        result
    }
}
