//! What belongs to one CPU, reached through the GS base.
// The GS base is a pointer that the type system does not see.
#![allow(unsafe_code)]

use super::descriptors::{Ist, Tables};
use super::mailbox::Mailbox;
use super::msr;
use alloc::vec::Vec;
use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::{offset_of, size_of};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicU8, Ordering};
use raw_cpuid::native_cpuid::cpuid_count;
use spin::Once;
use x86_64::VirtAddr;

/// Where a CPU is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Not started, or did not answer.
    Offline,
    /// Runs Umbra.
    Online,
    /// Halted for good by [`power`](crate::power).
    Stopped,
}

/// The area of one CPU. It is never moved or freed.
#[repr(C, align(64))]
pub struct PerCpu {
    /// Its own address, read through GS.
    this: AtomicPtr<PerCpu>,
    /// 0 for the boot CPU, then in the order of the MADT.
    index: u32,
    apic_id: AtomicU32,
    state: AtomicU8,
    /// Set by the timer's interrupt handler; whoever acts on it clears it.
    pub timer_fired: AtomicBool,
    /// Interrupts that nobody asked for.
    pub unexpected_interrupts: AtomicU64,
    pub(super) mailbox: Mailbox,
    pub(super) tables: Tables,
}

static BOOT_CPU: PerCpu = PerCpu::new(0, 0);
static CPUS: Once<Vec<&'static PerCpu>> = Once::new();
/// The area of the boot CPU before the MADT was read.
static BOOT_CPU_ONLY: [&PerCpu; 1] = [&BOOT_CPU];

impl PerCpu {
    /// The area of a CPU that was not started yet.
    pub(super) const fn new(index: u32, apic_id: u32) -> Self {
        Self {
            this: AtomicPtr::new(core::ptr::null_mut()),
            index,
            apic_id: AtomicU32::new(apic_id),
            state: AtomicU8::new(State::Offline as u8),
            timer_fired: AtomicBool::new(false),
            unexpected_interrupts: AtomicU64::new(0),
            mailbox: Mailbox::new(),
            tables: Tables::new(),
        }
    }

    /// Number of this CPU: 0 for the boot CPU, then in the order of the MADT.
    pub fn index(&self) -> usize {
        self.index as usize
    }

    /// Local APIC id.
    pub fn apic_id(&self) -> u32 {
        self.apic_id.load(Ordering::Relaxed)
    }

    /// Where this CPU's task-state segment is.
    pub fn task_state_address(&self) -> u64 {
        self.tables.task_state_address()
    }

    /// Where this CPU is in its life.
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            s if s == State::Online as u8 => State::Online,
            s if s == State::Stopped as u8 => State::Stopped,
            _ => State::Offline,
        }
    }

    pub(crate) fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Release);
    }

    /// Makes this the area and these the tables of the CPU that calls.
    ///
    /// # Safety
    /// No other CPU uses this area; its interrupt stacks are set.
    pub(super) unsafe fn install(&'static self) {
        self.this.store(core::ptr::from_ref(self).cast_mut(), Ordering::Relaxed);
        // SAFETY: promised by the caller. Loading GS clears its base, so the base comes second.
        unsafe {
            self.tables.load();
            msr::write(msr::GS_BASE, core::ptr::from_ref(self) as u64);
        }
    }
}

/// The area of the boot CPU.
pub fn boot_cpu() -> &'static PerCpu {
    &BOOT_CPU
}

/// Makes the boot CPU use its area and tables, so that exceptions are reported. Once, first of all.
pub fn init_boot_cpu() {
    /// For NMI, #DF and #MC until there is memory for one stack each.
    #[repr(align(16))]
    struct EarlyStack(UnsafeCell<[u8; 16384]>);
    // SAFETY: only the boot CPU's interrupts use it.
    unsafe impl Sync for EarlyStack {}
    static EARLY_STACK: EarlyStack = EarlyStack(UnsafeCell::new([0; 16384]));

    let top = VirtAddr::from_ptr(EARLY_STACK.0.get()) + size_of::<EarlyStack>() as u64;
    // SAFETY: only the boot CPU runs, and the stack is used by nothing else.
    unsafe {
        for ist in Ist::ALL {
            BOOT_CPU.tables.set_ist(ist, top);
        }
        BOOT_CPU.install();
    }
    BOOT_CPU.apic_id.store(current_apic_id(), Ordering::Relaxed);
}

/// Notes the local APIC id of the boot CPU.
pub(super) fn set_boot_apic_id(apic_id: u32) {
    BOOT_CPU.apic_id.store(apic_id, Ordering::Relaxed);
}

/// Makes known the areas of all CPUs; the first is the boot CPU's. Once.
pub(super) fn set_all(cpus: Vec<&'static PerCpu>) {
    CPUS.call_once(|| cpus);
}

/// The areas of all CPUs, the boot CPU's first, also of those that did not start.
pub fn all() -> &'static [&'static PerCpu] {
    CPUS.get().map_or(&BOOT_CPU_ONLY, |cpus| cpus.as_slice())
}

/// The area of the CPU that calls. After an exit from a guest, valid once the host's GS is loaded again.
#[inline]
pub fn this() -> &'static PerCpu {
    let this: *const PerCpu;
    // SAFETY: `install` let GS point to a `PerCpu` that lives for ever, and its first field to itself.
    unsafe {
        asm!("mov {}, gs:[{}]", out(reg) this, const offset_of!(PerCpu, this), options(nostack, readonly, preserves_flags));
        &*this
    }
}

/// The number of the CPU that calls, found through its APIC id: slow, but right whatever GS holds.
pub fn number() -> usize {
    let apic_id = current_apic_id();
    all().iter().position(|cpu| cpu.apic_id() == apic_id).unwrap_or(0)
}

/// The local APIC id of the CPU that calls, from CPUID. AMD APM vol. 3 appendix E.3.2 and E.3.7.
pub(crate) fn current_apic_id() -> u32 {
    let max = cpuid_count(0, 0).eax;
    if max >= 0xb {
        let topology = cpuid_count(0xb, 0);
        if topology.ebx != 0 {
            return topology.edx;
        }
    }
    cpuid_count(1, 0).ebx >> 24
}
