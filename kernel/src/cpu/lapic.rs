//! The local APIC of each CPU, in x2APIC mode where the processor has it, else through its memory-mapped registers.
//! Intel SDM vol. 3 chapter 11, AMD APM vol. 2 chapter 16.
// Device registers and MSRs.
#![allow(unsafe_code)]

use super::clock::{measured_khz, round_khz, Rate};
use super::features::Features;
use super::{msr, percpu, trap, tsc};
use crate::mm;
use core::arch::x86_64::_mm_mfence;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicU8, Ordering};
use x86_64::PhysAddr;

/// Register offsets of the memory-mapped form; an x2APIC MSR is 800h plus a sixteenth of it.
mod register {
    pub(super) const ID: u32 = 0x20;
    pub(super) const VERSION: u32 = 0x30;
    pub(super) const TPR: u32 = 0x80;
    pub(super) const EOI: u32 = 0xb0;
    pub(super) const SPURIOUS: u32 = 0xf0;
    pub(super) const ERROR_STATUS: u32 = 0x280;
    pub(super) const ICR: u32 = 0x300;
    pub(super) const ICR_HIGH: u32 = 0x310;
    pub(super) const LVT_TIMER: u32 = 0x320;
    pub(super) const LVT_THERMAL: u32 = 0x330;
    pub(super) const LVT_PERFORMANCE: u32 = 0x340;
    pub(super) const LVT_LINT0: u32 = 0x350;
    pub(super) const LVT_LINT1: u32 = 0x360;
    pub(super) const LVT_ERROR: u32 = 0x370;
    pub(super) const TIMER_INITIAL: u32 = 0x380;
    pub(super) const TIMER_CURRENT: u32 = 0x390;
    pub(super) const TIMER_DIVIDE: u32 = 0x3e0;
}

/// IA32_APIC_BASE.
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Local vector table entries.
const MASKED: u32 = 1 << 16;
const DELIVER_NMI: u32 = 4 << 8;
const TIMER_TSC_DEADLINE: u32 = 2 << 17;
/// Divide the timer's clock by 1.
const DIVIDE_BY_1: u32 = 0b1011;
/// Spurious vector register: APIC enabled.
const SOFTWARE_ENABLE: u32 = 1 << 8;

/// Interrupt command register.
const ICR_NMI: u32 = 4 << 8;
const ICR_INIT: u32 = 5 << 8;
const ICR_STARTUP: u32 = 6 << 8;
const ICR_PENDING: u32 = 1 << 12;
const ICR_ASSERT: u32 = 1 << 14;
const ICR_ALL_BUT_SELF: u32 = 3 << 18;

/// How the registers are reached. One for the machine.
const MODE_NONE: u8 = 0;
const MODE_XAPIC: u8 = 1;
const MODE_X2APIC: u8 = 2;
static MODE: AtomicU8 = AtomicU8::new(MODE_NONE);
/// The registers in xAPIC mode; each CPU sees its own there.
static REGISTERS: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
static HAS_TSC_DEADLINE: AtomicBool = AtomicBool::new(false);
/// Timer ticks per second in kHz, before any divider. 0 until calibrated, and in TSC-deadline mode.
static TIMER_KHZ: AtomicU64 = AtomicU64::new(0);

/// Why there is no usable local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Firmware switched it off. It is not switched on again: some processors cannot.
    Disabled,
    /// Its registers cannot be mapped.
    Unreachable(u64),
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Error::Disabled => {
                write!(f, "the firmware switched the local APIC off; switch it on in its setup")
            }
            Error::Unreachable(at) => write!(f, "the local APIC's registers at {at:#x} cannot be mapped"),
        }
    }
}

/// Chooses the mode and initialises the boot CPU's local APIC. Once.
pub fn init(features: &Features) -> Result<(), Error> {
    // SAFETY: every 64-bit processor has this register.
    let base = unsafe { msr::read(msr::APIC_BASE) };
    if base & BASE_ENABLE == 0 {
        return Err(Error::Disabled);
    }
    // It is in that mode already, or goes there where the processor lets it: some virtual ones say that they have it and do
    // not. Back from it leads no way that all processors have.
    let wanted = BASE_X2APIC | base;
    // SAFETY: from xAPIC to x2APIC mode (Intel SDM vol. 3 section 11.12.1), or what is there already.
    if base & BASE_X2APIC != 0 || features.x2apic && unsafe { msr::try_write(msr::APIC_BASE, wanted) } {
        MODE.store(MODE_X2APIC, Ordering::Release);
    } else {
        let at = base & BASE_ADDRESS;
        let registers = mm::map_mmio(PhysAddr::new(at), 4096).ok_or(Error::Unreachable(at))?;
        REGISTERS.store(registers, Ordering::Release);
        MODE.store(MODE_XAPIC, Ordering::Release);
    }
    HAS_TSC_DEADLINE.store(features.tsc_deadline, Ordering::Relaxed);
    init_this_cpu();
    percpu::set_boot_apic_id(id());
    Ok(())
}

/// Initialises the local APIC of the CPU that calls, with its timer stopped.
pub fn init_this_cpu() {
    if is_x2apic() {
        // SAFETY: from xAPIC to x2APIC mode, which the processor has (Intel SDM vol. 3 section 11.12.1).
        unsafe {
            let base = msr::read(msr::APIC_BASE);
            if base & BASE_X2APIC == 0 {
                msr::write(msr::APIC_BASE, base | BASE_X2APIC);
            }
        }
    }
    write(register::SPURIOUS, SOFTWARE_ENABLE | u32::from(trap::SPURIOUS));
    write(register::TPR, 0);
    let last_entry = read(register::VERSION) >> 16 & 0xff;
    write(register::LVT_LINT0, MASKED);
    write(register::LVT_LINT1, DELIVER_NMI);
    if last_entry >= 4 {
        write(register::LVT_PERFORMANCE, MASKED);
    }
    if last_entry >= 5 {
        write(register::LVT_THERMAL, MASKED);
    }
    write(register::LVT_ERROR, u32::from(trap::APIC_ERROR));
    clear_error();
    write(register::TIMER_DIVIDE, DIVIDE_BY_1);
    disarm();
    let mode = if HAS_TSC_DEADLINE.load(Ordering::Relaxed) { TIMER_TSC_DEADLINE } else { 0 };
    write(register::LVT_TIMER, mode | u32::from(trap::TIMER));
    // The mode has to be in force before the first deadline is written (Intel SDM vol. 3 section 11.5.4.1).
    fence();
    eoi();
}

/// Whether the registers are MSRs.
pub fn is_x2apic() -> bool {
    MODE.load(Ordering::Acquire) == MODE_X2APIC
}

/// Whether the timer takes TSC deadlines.
pub fn has_tsc_deadline() -> bool {
    HAS_TSC_DEADLINE.load(Ordering::Relaxed)
}

/// The id of the CPU that calls.
pub fn id() -> u32 {
    let id = read(register::ID);
    if is_x2apic() {
        id
    } else {
        id >> 24
    }
}

/// Ends the interrupt in service.
#[inline]
pub fn eoi() {
    write(register::EOI, 0);
}

/// Reads and clears the error status; the bits that were set.
pub fn clear_error() -> u32 {
    write(register::ERROR_STATUS, 0);
    read(register::ERROR_STATUS)
}

/// Lets the timer interrupt this CPU when the time-stamp counter reaches `deadline_tsc`; at once when that has
/// passed. Without TSC-deadline mode the interrupt comes early when the deadline is farther away than the timer
/// counts (seconds): then arm it again.
pub fn arm(deadline_tsc: u64) {
    if has_tsc_deadline() {
        // Zero would disarm. SAFETY: the processor has the register and the timer's mode is TSC-deadline.
        unsafe { msr::write(msr::TSC_DEADLINE, deadline_tsc.max(1)) };
        return;
    }
    let ns = tsc::rate().ns(deadline_tsc.saturating_sub(tsc::read()));
    let ticks = Rate::from_khz(TIMER_KHZ.load(Ordering::Relaxed)).ticks(ns);
    // Zero would disarm.
    write(register::TIMER_INITIAL, ticks.clamp(1, u64::from(u32::MAX)) as u32);
}

/// Stops the timer. An interrupt that is pending already still comes.
pub fn disarm() {
    if has_tsc_deadline() {
        // SAFETY: the processor has the register.
        unsafe { msr::write(msr::TSC_DEADLINE, 0) };
    }
    write(register::TIMER_INITIAL, 0);
}

/// Measures the timer against the time-stamp counter, if it is needed, and returns its rate in kHz. `None` with TSC
/// deadlines, and for a timer that does not count.
pub fn calibrate_timer() -> Option<u64> {
    const SPAN_NS: u64 = 20_000_000;
    if has_tsc_deadline() {
        return None;
    }
    write(register::LVT_TIMER, MASKED);
    write(register::TIMER_INITIAL, u32::MAX);
    let start = tsc::sample(|| read(register::TIMER_CURRENT));
    tsc::spin_ns(SPAN_NS);
    let end = tsc::sample(|| read(register::TIMER_CURRENT));
    write(register::TIMER_INITIAL, 0);
    write(register::LVT_TIMER, u32::from(trap::TIMER));
    let femtoseconds = tsc::rate().ns(end.0.saturating_sub(start.0)).saturating_mul(1_000_000);
    // It counts down.
    let khz = round_khz(measured_khz(u64::from(start.1.wrapping_sub(end.1)), 1, femtoseconds)?);
    TIMER_KHZ.store(khz, Ordering::Relaxed);
    Some(khz)
}

/// Sends interrupt `vector` to the CPU with this APIC id.
pub fn send(apic_id: u32, vector: u8) {
    command(apic_id, ICR_ASSERT | u32::from(vector));
}

/// Sends an NMI to the CPU with this APIC id.
pub fn send_nmi(apic_id: u32) {
    command(apic_id, ICR_ASSERT | ICR_NMI);
}

/// Sends INIT to the CPU with this APIC id: it waits for a start-up message.
pub fn send_init(apic_id: u32) {
    command(apic_id, ICR_ASSERT | ICR_INIT);
}

/// Lets a CPU that waits for it start in real mode in the page at `page` (below 1 MiB).
pub fn send_startup(apic_id: u32, page: PhysAddr) {
    command(apic_id, ICR_ASSERT | ICR_STARTUP | (page.as_u64() >> 12) as u32 & 0xff);
}

/// Sends an NMI to all other CPUs, if there is a local APIC yet.
pub fn nmi_to_others() {
    if MODE.load(Ordering::Acquire) != MODE_NONE {
        command(0, ICR_ALL_BUT_SELF | ICR_ASSERT | ICR_NMI);
    }
}

fn command(apic_id: u32, low: u32) {
    if is_x2apic() {
        // Earlier stores are visible to the target, as with the memory-mapped form.
        fence();
        // SAFETY: an interrupt to another CPU; its handlers are ready before its id is known.
        unsafe { msr::write(msr::X2APIC + (register::ICR >> 4), u64::from(apic_id) << 32 | u64::from(low)) };
        return;
    }
    wait_for_delivery();
    write(register::ICR_HIGH, apic_id << 24);
    write(register::ICR, low);
    wait_for_delivery();
}

/// Waits, not for ever, until the last command has left.
fn wait_for_delivery() {
    for _ in 0..100_000 {
        if read(register::ICR) & ICR_PENDING == 0 {
            return;
        }
        core::hint::spin_loop();
    }
}

fn fence() {
    // SAFETY: MFENCE is part of every 64-bit processor.
    unsafe { _mm_mfence() };
}

#[inline]
fn read(register: u32) -> u32 {
    match MODE.load(Ordering::Relaxed) {
        // SAFETY: a register of the local APIC in the mode it is in; reads of those used here have no effect.
        MODE_X2APIC => unsafe { msr::read(msr::X2APIC + (register >> 4)) as u32 },
        // SAFETY: mapped, uncached, by `init`.
        MODE_XAPIC => unsafe {
            REGISTERS.load(Ordering::Relaxed).add(register as usize).cast::<u32>().read_volatile()
        },
        _ => 0,
    }
}

#[inline]
fn write(register: u32, value: u32) {
    match MODE.load(Ordering::Relaxed) {
        // SAFETY: as in `read`; what is written makes sense for the register.
        MODE_X2APIC => unsafe { msr::write(msr::X2APIC + (register >> 4), u64::from(value)) },
        // SAFETY: as above.
        MODE_XAPIC => unsafe {
            REGISTERS.load(Ordering::Relaxed).add(register as usize).cast::<u32>().write_volatile(value)
        },
        _ => {}
    }
}
