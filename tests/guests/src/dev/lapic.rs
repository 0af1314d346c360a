//! The local APIC in xAPIC mode, or in x2APIC mode if the command line says `x2apic`. AMD APM vol. 2, chapter 16.
use crate::cpu::{self, has, peek, poke, rdmsr, wait_until, wrmsr, MSR_APIC_BASE};
use crate::multiboot;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// The page of registers.
pub const BASE: u64 = 0xfee0_0000;

/// Register offsets in the page; the x2APIC MSR is 0x800 + offset / 16.
pub const ID: u32 = 0x20;
/// Version.
pub const VERSION: u32 = 0x30;
/// Task priority.
pub const TPR: u32 = 0x80;
/// Processor priority.
pub const PPR: u32 = 0xa0;
/// End of interrupt.
pub const EOI: u32 = 0xb0;
/// Logical destination.
pub const LDR: u32 = 0xd0;
/// Destination format.
pub const DFR: u32 = 0xe0;
/// Spurious vector.
pub const SVR: u32 = 0xf0;
/// In-service, eight words.
pub const ISR: u32 = 0x100;
/// Trigger mode, eight words.
pub const TMR: u32 = 0x180;
/// Request, eight words.
pub const IRR: u32 = 0x200;
/// Error status.
pub const ESR: u32 = 0x280;
/// Interrupt command, low half.
pub const ICR: u32 = 0x300;
/// Interrupt command, high half.
pub const ICR_HIGH: u32 = 0x310;
/// Timer.
pub const LVT_TIMER: u32 = 0x320;
/// Pin LINT0.
pub const LVT_LINT0: u32 = 0x350;
/// Pin LINT1.
pub const LVT_LINT1: u32 = 0x360;
/// Error.
pub const LVT_ERROR: u32 = 0x370;
/// Initial count.
pub const TMICT: u32 = 0x380;
/// Current count.
pub const TMCCT: u32 = 0x390;
/// Divide configuration.
pub const TDCR: u32 = 0x3e0;
/// Self-IPI, in x2APIC mode.
pub const SELF_IPI: u32 = 0x3f0;

/// LVT: masked.
pub const MASKED: u32 = 1 << 16;
/// LVT timer: periodic.
pub const PERIODIC: u32 = 1 << 17;
/// LVT timer: TSC deadline.
pub const TSC_DEADLINE: u32 = 2 << 17;
/// ICR: delivery mode NMI.
pub const MODE_NMI: u32 = 4 << 8;
/// ICR: delivery mode INIT.
pub const MODE_INIT: u32 = 5 << 8;
/// ICR: delivery mode STARTUP.
pub const MODE_STARTUP: u32 = 6 << 8;
/// ICR: delivery mode lowest priority.
pub const MODE_LOWEST: u32 = 1 << 8;
/// ICR: logical destination.
pub const LOGICAL: u32 = 1 << 11;
/// ICR: assert.
pub const ASSERT: u32 = 1 << 14;
/// ICR: to self.
pub const SELF: u32 = 1 << 18;
/// ICR: to all including self.
pub const ALL: u32 = 2 << 18;
/// ICR: to all but self.
pub const OTHERS: u32 = 3 << 18;

/// Divide configuration values for 1 and 16.
pub const DIVIDE_1: u32 = 0b1011;
/// Divide by 16.
pub const DIVIDE_16: u32 = 0b0011;

/// The vector that `quiet` gives spurious interrupts.
pub const SPURIOUS: u8 = 0xff;

/// All processors are in x2APIC mode.
static X2APIC: AtomicBool = AtomicBool::new(false);

/// Whether registers are MSRs.
pub fn x2apic() -> bool {
    X2APIC.load(Relaxed)
}

/// The MSR of a register in x2APIC mode.
const fn msr(register: u32) -> u32 {
    0x800 + (register >> 4)
}

/// Reads a register.
pub fn read(register: u32) -> u32 {
    if x2apic() {
        rdmsr(msr(register)) as u32
    } else {
        peek(BASE + u64::from(register))
    }
}

/// Writes a register. x2APIC mode has no DFR, and its LDR cannot be written: they stay as they are.
pub fn write(register: u32, value: u32) {
    if !x2apic() {
        poke(BASE + u64::from(register), value);
    } else if !matches!(register, LDR | DFR) {
        wrmsr(msr(register), value.into());
    }
}

/// Enables the APIC of the first processor, in the mode that the command line asks for.
pub fn init() {
    X2APIC.store(multiboot::boot().word("x2apic") && x2apic_offered(), Relaxed);
    enable();
    quiet();
}

/// Enables the APIC of this processor.
pub fn enable() {
    let base = rdmsr(MSR_APIC_BASE);
    let wanted = base | 1 << 11 | u64::from(x2apic()) << 10;
    if base != wanted {
        wrmsr(MSR_APIC_BASE, wanted);
    }
}

/// Enabled, nothing armed, nothing in service, priority 0, LINT0 passing the 8259 through.
pub fn quiet() {
    write(SVR, 0x100 | u32::from(SPURIOUS));
    write(TPR, 0);
    write(LVT_TIMER, MASKED);
    write(TMICT, 0);
    write(LVT_LINT0, 0x700);
    write(LVT_LINT1, 0x400);
    write(LVT_ERROR, MASKED);
    if deadline_offered() {
        wrmsr(cpu::MSR_TSC_DEADLINE, 0);
    }
    // Pending requests that nobody will take now are taken by the counting handler, then acknowledged.
    for _ in 0..300 {
        if !(0..8).any(|word| read(ISR + word * 16) != 0) {
            break;
        }
        eoi();
    }
}

/// This CPU's id.
pub fn id() -> u32 {
    if x2apic() {
        read(ID)
    } else {
        read(ID) >> 24
    }
}

/// Acknowledges the highest interrupt in service.
pub fn eoi() {
    write(EOI, 0);
}

fn bit(bank: u32, vector: u8) -> bool {
    read(bank + u32::from(vector / 32) * 16) >> (vector % 32) & 1 != 0
}

/// Whether `vector` is in service.
pub fn in_service(vector: u8) -> bool {
    bit(ISR, vector)
}

/// Whether `vector` is requested.
pub fn requested(vector: u8) -> bool {
    bit(IRR, vector)
}

/// Whether `vector` is marked level-triggered.
pub fn level(vector: u8) -> bool {
    bit(TMR, vector)
}

/// Sends an IPI to the CPU with id `target`; 0xff is all of them.
pub fn ipi(target: u32, command: u32) {
    if x2apic() {
        let target = if target == 0xff { !0 } else { target };
        wrmsr(msr(ICR), u64::from(target) << 32 | u64::from(command));
        return;
    }
    write(ICR_HIGH, target << 24);
    write(ICR, command);
    wait_until(1_000_000_000, || read(ICR) & 1 << 12 == 0);
}

/// Sends `vector` to this CPU.
pub fn self_ipi(vector: u8) {
    if x2apic() {
        wrmsr(msr(SELF_IPI), vector.into());
    } else {
        write(ICR, SELF | ASSERT | u32::from(vector));
    }
}

/// Starts the timer.
pub fn timer(lvt: u32, divide: u32, count: u32) {
    write(TDCR, divide);
    write(LVT_TIMER, lvt);
    write(TMICT, count);
}

/// Whether CPUID offers TSC-deadline mode.
pub fn deadline_offered() -> bool {
    has(1, 0, |leaf| leaf.ecx, 24)
}

/// Whether CPUID offers x2APIC mode.
pub fn x2apic_offered() -> bool {
    has(1, 0, |leaf| leaf.ecx, 21)
}
