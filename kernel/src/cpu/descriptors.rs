//! Segments, task state and the interrupt descriptor table. AMD APM vol. 2 sections 4.8, 12.2.5, 8.9.3.
// Loads the tables that the processor itself reads.
#![allow(unsafe_code)]

use super::trap;
use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::{offset_of, size_of};
use spin::Once;
use x86_64::instructions::tables::{lgdt, lidt, load_tss};
use x86_64::structures::gdt::SegmentSelector;
use x86_64::structures::DescriptorTablePointer;
use x86_64::{PrivilegeLevel, VirtAddr};

/// Selector of Umbra's code.
pub const CODE: u16 = 1 << 3;
/// Selector of Umbra's data and stack.
pub const DATA: u16 = 2 << 3;
/// Selector of the CPU's task state.
pub const TASK: u16 = 3 << 3;

/// 64-bit code, present, accessed: nothing writes to the table when it is loaded.
pub(super) const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
/// Writable data, present, accessed.
pub(super) const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// The stacks that the processor switches to by itself, by index into the IST, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ist {
    /// NMI.
    Nmi = 1,
    /// #DF.
    DoubleFault = 2,
    /// #MC.
    MachineCheck = 3,
}

impl Ist {
    /// All of them.
    pub const ALL: [Ist; 3] = [Ist::Nmi, Ist::DoubleFault, Ist::MachineCheck];
}

/// 64-bit task-state segment. AMD APM vol. 2 section 12.2.5.
#[repr(C, packed(4))]
struct TaskState {
    _reserved0: u32,
    rsp: [u64; 3],
    _reserved1: u64,
    ist: [u64; 7],
    _reserved2: u64,
    _reserved3: u16,
    io_map: u16,
}

const _: () = assert!(size_of::<TaskState>() == 104);
const _: () = assert!(offset_of!(TaskState, ist) == 0x24);

/// The tables of one CPU.
#[repr(C, align(16))]
pub struct Tables {
    gdt: UnsafeCell<[u64; 5]>,
    task: UnsafeCell<TaskState>,
}

// SAFETY: written only by `load` and `set_ist`, on the one CPU that uses them and with interrupts off.
unsafe impl Sync for Tables {}

impl Default for Tables {
    fn default() -> Self {
        Self::new()
    }
}

impl Tables {
    /// Tables without stacks.
    pub const fn new() -> Self {
        Self {
            gdt: UnsafeCell::new([0, CODE_DESCRIPTOR, DATA_DESCRIPTOR, 0, 0]),
            task: UnsafeCell::new(TaskState {
                _reserved0: 0,
                rsp: [0; 3],
                _reserved1: 0,
                ist: [0; 7],
                _reserved2: 0,
                _reserved3: 0,
                // Beyond the limit: no I/O permission map.
                io_map: size_of::<TaskState>() as u16,
            }),
        }
    }

    /// Linear address of the task-state segment.
    pub fn task_state_address(&self) -> u64 {
        self.task.get() as u64
    }

    /// Sets the top of one stack of the IST.
    ///
    /// # Safety
    /// Called by the CPU that uses the tables, or before any does; `top` is the top of a stack of its own.
    pub unsafe fn set_ist(&self, ist: Ist, top: VirtAddr) {
        // SAFETY: exclusive as promised; a raw write, since the processor may read the table at any time.
        unsafe { (&raw mut (*self.task.get()).ist[ist as usize - 1]).write_unaligned(top.as_u64()) };
    }

    /// Makes this CPU use these tables and the interrupt descriptor table.
    ///
    /// # Safety
    /// No other CPU uses these tables, and their IST is set.
    pub unsafe fn load(&'static self) {
        // SAFETY: exclusive as promised.
        let gdt = unsafe { &mut *self.gdt.get() };
        let base = self.task.get() as u64;
        // Available 64-bit TSS (type 9), present. AMD APM vol. 2 section 4.8.3.
        gdt[3] = (size_of::<TaskState>() as u64 - 1)
            | (base & 0xff_ffff) << 16
            | 0x89 << 40
            | (base >> 24 & 0xff) << 56;
        gdt[4] = base >> 32;
        let pointer = DescriptorTablePointer {
            limit: size_of::<[u64; 5]>() as u16 - 1,
            base: VirtAddr::from_ptr(self.gdt.get()),
        };
        // SAFETY: the descriptors are valid for as long as the machine runs; the far return goes to the next line
        // with the same flat code segment.
        unsafe {
            lgdt(&pointer);
            asm!(
                "push {code}",
                "lea {scratch}, [rip + 2f]",
                "push {scratch}",
                "retfq",
                "2:",
                "mov ss, {data:x}",
                "mov ds, {data:x}",
                "mov es, {data:x}",
                "mov fs, {null:x}",
                "mov gs, {null:x}",
                code = const CODE as u64,
                data = in(reg) u64::from(DATA),
                null = in(reg) 0u64,
                scratch = out(reg) _,
            );
            load_tss(SegmentSelector::new(TASK >> 3, PrivilegeLevel::Ring0));
            lidt(&idt_pointer());
        }
    }
}

/// A gate. AMD APM vol. 2 section 4.8.4.
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    ist: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    _reserved: u32,
}

const _: () = assert!(size_of::<Gate>() == 16);

impl Gate {
    /// An interrupt gate: interrupts are off in the handler.
    fn interrupt(handler: u64, ist: u8) -> Self {
        Self {
            offset_low: handler as u16,
            selector: CODE,
            ist,
            kind: 0x8e,
            offset_middle: (handler >> 16) as u16,
            offset_high: (handler >> 32) as u32,
            _reserved: 0,
        }
    }
}

/// One table for all CPUs, never written once it is made: what differs is the stacks, and those are in the IST.
static IDT: Once<[Gate; 256]> = Once::new();

fn idt_pointer() -> DescriptorTablePointer {
    let idt = IDT.call_once(|| {
        core::array::from_fn(|vector| {
            let ist = match vector as u8 {
                trap::NMI => Ist::Nmi as u8,
                trap::DOUBLE_FAULT => Ist::DoubleFault as u8,
                trap::MACHINE_CHECK => Ist::MachineCheck as u8,
                _ => 0,
            };
            Gate::interrupt(trap::stub(vector as u8), ist)
        })
    });
    DescriptorTablePointer { limit: size_of::<[Gate; 256]>() as u16 - 1, base: VirtAddr::from_ptr(idt) }
}
