//! The end of a run: the last line of the log, then the machine goes off or halts.
// Ports that switch the machine off, and CPUs that stop for good.
#![allow(unsafe_code)]

use crate::acpi::{PowerOff, SleepType};
use crate::console;
use crate::cpu::{self, lapic, percpu::State};
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use spin::Once;
use x86_64::instructions::port::Port;
use x86_64::instructions::{hlt, interrupts};

/// All virtual machines powered off.
pub const OK: u8 = 0;
/// A virtual machine was stopped because of an error.
pub const VM_ERROR: u8 = 64;
/// Umbra refused to boot.
pub const REFUSED: u8 = 65;
/// A panic or an exception in Umbra itself.
pub const PANIC: u8 = 66;

/// No CPU; what [`ENDING`] holds until the end begins.
const NOBODY: u32 = u32::MAX;
/// The APIC id of the CPU that ends the run.
static ENDING: AtomicU32 = AtomicU32::new(NOBODY);
/// An exception or a panic is being reported.
static EMERGENCY: AtomicBool = AtomicBool::new(false);
/// Set once NMIs mean "stop".
static STOP: AtomicBool = AtomicBool::new(false);
/// `at_end = "halt"`.
static HALT_AT_END: AtomicBool = AtomicBool::new(false);
static POWER_OFF: Once<PowerOff> = Once::new();

/// How this machine is switched off, once ACPI has told.
pub fn set_power_off(how: PowerOff) {
    POWER_OFF.call_once(|| how);
}

/// Whether the machine halts at the end instead of going off.
pub fn set_halt_at_end(halt: bool) {
    HALT_AT_END.store(halt, Ordering::Relaxed);
}

/// Ends the run: stops the other CPUs, logs `umbra: end: status N` as the last line, powers off or halts.
pub fn end(status: u8) -> ! {
    interrupts::disable();
    claim_end();
    stop_others();
    // SAFETY: the other CPUs have stopped or have had their chance.
    unsafe { console::break_lock() };
    console::print(format_args!("end: status {status}"));
    console::flush();
    if !HALT_AT_END.load(Ordering::Relaxed) {
        acpi_off();
        bochs_off();
    }
    halt()
}

/// Ends the run with `umbra: error: SENTENCE` and status 65: Umbra cannot or will not run here.
pub fn halt_with_error(sentence: fmt::Arguments<'_>) -> ! {
    log::error!("{sentence}");
    end(REFUSED)
}

/// Prepares for a report of an exception or panic: the other CPUs stop and the console is made usable. Where this
/// CPU fails again while it reports, the run ends at once.
pub fn begin_emergency() {
    interrupts::disable();
    claim_end();
    if EMERGENCY.swap(true, Ordering::SeqCst) {
        // SAFETY: the other CPUs have been stopped, and this one does not go back to what it was printing.
        unsafe { console::break_lock() };
        console::print(format_args!("failed again while reporting a failure"));
        end(PANIC);
    }
    stop_others();
    // SAFETY: as above.
    unsafe { console::break_lock() };
}

/// Stops this CPU for good if another one ends the run. Called by the NMI handler; touches nothing but atomics.
pub fn stop_if_asked() {
    if STOP.load(Ordering::Acquire) && ENDING.load(Ordering::Acquire) != cpu::percpu::current_apic_id() {
        stop_here();
    }
}

/// Only one CPU ends the run; another that wants to stops.
fn claim_end() {
    let me = cpu::percpu::current_apic_id();
    match ENDING.compare_exchange(NOBODY, me, Ordering::SeqCst, Ordering::SeqCst) {
        Err(other) if other != me => stop_here(),
        _ => {}
    }
}

fn stop_here() -> ! {
    cpu::all()[cpu::number()].set_state(State::Stopped);
    halt()
}

/// Tells all other CPUs to stop, and waits a little until they have.
fn stop_others() {
    if STOP.swap(true, Ordering::SeqCst) || cpu::all().len() == 1 {
        return;
    }
    lapic::nmi_to_others();
    let me = cpu::number();
    // About a tenth of a second; a CPU that is stuck does not keep the run from ending.
    for _ in 0..1_000_000 {
        let running = |cpu: &&&cpu::PerCpu| cpu.index() != me && cpu.state() == State::Online;
        if cpu::all().iter().filter(running).count() == 0 {
            return;
        }
        core::hint::spin_loop();
    }
}

fn halt() -> ! {
    interrupts::disable();
    loop {
        hlt();
    }
}

/// Enters S5. ACPI 6.5 sections 4.8.3.2.1 and 16.1.7.
fn acpi_off() {
    const SLEEP_ENABLE: u16 = 1 << 13;
    const SCI_ENABLE: u16 = 1;
    let Some(how) = POWER_OFF.get() else { return };
    let SleepType { a, b } = how.sleep_type;
    let mut control_a = Port::<u16>::new(how.pm1a_control);
    // SAFETY: these are the registers that the firmware's tables name for this purpose.
    unsafe {
        if let (Some((port, value)), 0) = (how.acpi_enable, control_a.read() & SCI_ENABLE) {
            Port::<u8>::new(port).write(value);
            wait_until(|| control_a.read() & SCI_ENABLE != 0);
        }
        let command =
            |old: u16, sleep_type: u8| old & !(7 << 10) | u16::from(sleep_type & 7) << 10 | SLEEP_ENABLE;
        if let Some(port) = how.pm1b_control {
            let mut control_b = Port::<u16>::new(port);
            let old = control_b.read();
            control_b.write(command(old, b));
        }
        let old = control_a.read();
        control_a.write(command(old, a));
    }
    // The machine takes a moment to go off.
    wait_until(|| false);
}

/// Bochs's shutdown port; other machines have nothing there.
fn bochs_off() {
    let mut port = Port::<u8>::new(0x8900);
    for byte in *b"Shutdown" {
        // SAFETY: an unclaimed port everywhere but in Bochs.
        unsafe { port.write(byte) };
    }
}

/// Waits for `done`, a second or so at most. A port read takes about a microsecond.
fn wait_until(mut done: impl FnMut() -> bool) {
    let mut delay = Port::<u8>::new(0x80);
    for _ in 0..500_000 {
        if done() {
            return;
        }
        // SAFETY: the POST code port, read to pass time.
        unsafe { delay.read() };
    }
}
