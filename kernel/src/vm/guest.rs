//! A virtual machine: what its vCPUs share.
#![cfg(target_os = "none")]

use super::clock::VmClock;
use super::paging::GuestMemory;
use super::report::End;
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
}

/// What a vCPU must look at again when it differs before and after an access: the interrupt that the 8259 pair
/// asks for, and when the chipset next does something by itself.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Outlook {
    pic_intr: bool,
    next_event: Option<u64>,
}

impl Board {
    /// A board in reset state.
    pub fn new(chipset: Chipset) -> Self {
        Self { chipset, ioapic: IoApic::new(), lines: 0 }
    }

    /// See [`Outlook`].
    #[inline]
    pub fn outlook(&self, now_ns: u64) -> Outlook {
        Outlook { pic_intr: self.chipset.pic_intr(), next_event: self.chipset.next_event(now_ns) }
    }

    /// Shows the I/O APIC the lines that changed since it last looked.
    #[inline]
    pub fn update_lines(&mut self, sink: &mut impl ApicSink) {
        let lines = self.chipset.lines();
        let changed = lines ^ self.lines;
        if changed != 0 {
            self.propagate(lines, changed, sink);
        }
    }

    #[cold]
    fn propagate(&mut self, lines: u32, mut changed: u32, sink: &mut impl ApicSink) {
        self.lines = lines;
        while changed != 0 {
            let irq = changed.trailing_zeros() as u8;
            changed &= changed - 1;
            // ISA IRQ 0 is wired to pin 2, as the MADT says; ISA IRQ 2 is the cascade and has no pin.
            match irq {
                0 => self.ioapic.set_line(2, lines & 1 != 0, sink),
                2 => {}
                _ => self.ioapic.set_line(irq, lines >> irq & 1 != 0, sink),
            }
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
    ended: AtomicBool,
    end: Mutex<Option<End>>,
}

impl<V: Vendor> Guest<V> {
    /// A VM of these parts that has not ended.
    pub fn new(name: String, memory: GuestMemory<V>, board: Board, bus: ApicBus, clock: VmClock) -> Self {
        let (board, end) = (Mutex::new(board), Mutex::new(None));
        Self { name, memory, board, bus, clock, ended: AtomicBool::new(false), end }
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
