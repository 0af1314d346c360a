//! The time-stamp counter: Umbra's clock. Its rate is measured once against a timer of known frequency.
// Reads the counter, device registers and ports.
#![allow(unsafe_code)]

use super::clock::{measured_khz, Calibration, Rate};
use super::features::Features;
use crate::acpi::Acpi;
use crate::mm;
use core::arch::x86_64::{_mm_lfence, _rdtsc};
use spin::Once;
use x86_64::instructions::port::Port;
use x86_64::PhysAddr;

static RATE: Once<Rate> = Once::new();

/// How long the counter is measured.
const SPAN_US: u64 = 50_000;

/// Reads of a timer that does not move before it is given up. The slowest of them ticks every 840 ns, and a read takes
/// some nanoseconds at least; one of a port that is not there takes a microsecond.
const MAX_POLLS: u32 = 1_000_000;

/// The counter's value.
#[inline]
pub fn read() -> u64 {
    // SAFETY: RDTSC is allowed in Umbra itself.
    unsafe { _rdtsc() }
}

/// The counter's rate. 1 GHz before it was measured.
#[inline]
pub fn rate() -> Rate {
    const UNKNOWN: Rate = Rate::from_khz(1_000_000);
    RATE.get().copied().unwrap_or(UNKNOWN)
}

/// Thousand ticks a second.
pub fn khz() -> u64 {
    rate().khz()
}

/// Waits.
pub fn spin_ns(ns: u64) {
    let start = read();
    let ticks = rate().ticks(ns);
    while read().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

/// Measures the counter against the best timer there is: HPET, ACPI PM timer, PIT channel 2. Where none counts, what
/// CPUID tells has to do. Once.
pub fn calibrate(features: &Features, acpi: &Acpi) -> Option<Calibration> {
    let hpet = || Hpet::new(acpi.hpet?);
    let pm_timer = || {
        let fadt = acpi.fadt?;
        Some(PmTimer { port: Port::new(fadt.pm_timer?), bits: if fadt.pm_timer_32bit { 32 } else { 24 } })
    };
    let measured = hpet()
        .and_then(|mut t| Some(("HPET", measure(&mut t)?)))
        .or_else(|| Some(("the ACPI PM timer", measure(&mut pm_timer()?)?)))
        .or_else(|| Some(("PIT channel 2", measure(&mut Pit::new())?)));
    let calibration = Calibration::new(measured, features.cpuid_tsc_khz)?;
    RATE.call_once(|| calibration.rate);
    Some(calibration)
}

/// A counter of known frequency that counts up and wraps.
trait Reference {
    /// Its period.
    fn femtoseconds_per_tick(&self) -> u64;
    /// Significant bits of the value.
    fn bits(&self) -> u32;
    /// What it counts.
    fn value(&mut self) -> u64;
}

/// The counter's frequency in kHz. `None` if the timer stands still.
fn measure(timer: &mut impl Reference) -> Option<u64> {
    let mask = u64::MAX >> (64 - timer.bits());
    let span = SPAN_US * 1_000_000_000 / timer.femtoseconds_per_tick();
    // A counter this narrow wraps during the measurement: follow it.
    let (start_tsc, start) = sample(|| timer.value());
    let (mut last, mut elapsed, mut polls) = (start, 0u64, 0);
    while elapsed < span {
        let now = timer.value();
        let step = now.wrapping_sub(last) & mask;
        polls = if step == 0 { polls + 1 } else { 0 };
        if polls > MAX_POLLS {
            return None;
        }
        elapsed += step;
        last = now;
    }
    let (end_tsc, end) = sample(|| timer.value());
    elapsed += end.wrapping_sub(last) & mask;
    measured_khz(end_tsc.checked_sub(start_tsc)?, elapsed, timer.femtoseconds_per_tick())
}

/// The counter and a timer at nearly the same moment: of several tries the one that took least, for an emulator or
/// an SMI may come between.
pub(super) fn sample<T: Default>(mut timer: impl FnMut() -> T) -> (u64, T) {
    const TRIES: u32 = 10;
    let mut best = (u64::MAX, 0, T::default());
    for _ in 0..TRIES {
        let before = read_ordered();
        let value = timer();
        let after = read_ordered();
        let took = after.wrapping_sub(before);
        if took < best.0 {
            best = (took, before.wrapping_add(took / 2), value);
        }
    }
    (best.1, best.2)
}

fn read_ordered() -> u64 {
    // SAFETY: LFENCE is part of every 64-bit processor.
    unsafe {
        _mm_lfence();
        let tsc = _rdtsc();
        _mm_lfence();
        tsc
    }
}

/// IA-PC HPET specification 1.0a section 2.3.
struct Hpet {
    registers: *mut u8,
    femtoseconds_per_tick: u64,
}

impl Hpet {
    const CAPABILITIES: usize = 0;
    const CONFIGURATION: usize = 0x10;
    const COUNTER: usize = 0xf0;
    /// The specification's upper bound of the period, 100 ns.
    const MAX_PERIOD: u64 = 100_000_000;

    fn new(at: u64) -> Option<Self> {
        let registers = mm::map_mmio(PhysAddr::try_new(at).ok()?, 1024)?;
        let mut this = Self { registers, femtoseconds_per_tick: 0 };
        this.femtoseconds_per_tick = this.read(Self::CAPABILITIES) >> 32;
        if !(1..=Self::MAX_PERIOD).contains(&this.femtoseconds_per_tick) {
            return None;
        }
        let configuration = this.read(Self::CONFIGURATION);
        // SAFETY: starts the main counter; the comparators stay as they are.
        unsafe {
            this.registers.add(Self::CONFIGURATION).cast::<u32>().write_volatile(configuration as u32 | 1)
        };
        Some(this)
    }

    fn read(&self, register: usize) -> u64 {
        // SAFETY: mapped, uncached, by `new`. Two halves, since some take no 64-bit reads; only CAPABILITIES' is used.
        unsafe {
            let at = self.registers.add(register).cast::<u32>();
            u64::from(at.read_volatile()) | u64::from(at.add(1).read_volatile()) << 32
        }
    }
}

impl Reference for Hpet {
    fn femtoseconds_per_tick(&self) -> u64 {
        self.femtoseconds_per_tick
    }
    fn bits(&self) -> u32 {
        32
    }
    fn value(&mut self) -> u64 {
        // SAFETY: as in `read`; the low half alone, so that no carry comes between.
        u64::from(unsafe { self.registers.add(Self::COUNTER).cast::<u32>().read_volatile() })
    }
}

/// ACPI 6.5 section 4.8.3.3: 3.579545 MHz.
struct PmTimer {
    port: Port<u32>,
    bits: u32,
}

impl Reference for PmTimer {
    fn femtoseconds_per_tick(&self) -> u64 {
        1_000_000_000_000_000 / 3_579_545
    }
    fn bits(&self) -> u32 {
        self.bits
    }
    fn value(&mut self) -> u64 {
        // SAFETY: the port that the FADT names; reading it has no effect.
        u64::from(unsafe { self.port.read() })
    }
}

/// Channel 2 of the 8254 (Intel 82C54 data sheet) counting down from 65536 again and again, gated by port 61h.
struct Pit {
    control: Port<u8>,
    data: Port<u8>,
}

impl Pit {
    fn new() -> Self {
        let mut this = Self { control: Port::new(0x43), data: Port::new(0x42) };
        let mut gate = Port::<u8>::new(0x61);
        // SAFETY: the timer's and the speaker's ports; the speaker stays off.
        unsafe {
            let old = gate.read();
            gate.write(old & !2 | 1);
            // Channel 2, both bytes, mode 2, binary.
            this.control.write(0b1011_0100);
            this.data.write(0);
            this.data.write(0);
        }
        this
    }
}

impl Reference for Pit {
    fn femtoseconds_per_tick(&self) -> u64 {
        1_000_000_000_000_000 / 1_193_182
    }
    fn bits(&self) -> u32 {
        16
    }
    fn value(&mut self) -> u64 {
        // SAFETY: latches channel 2, then reads both bytes.
        let value = unsafe {
            self.control.write(0b1000_0000);
            u64::from(self.data.read()) | u64::from(self.data.read()) << 8
        };
        // It counts down.
        (0x1_0000 - value) & 0xffff
    }
}
