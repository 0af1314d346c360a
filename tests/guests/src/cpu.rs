//! Privileged instructions, one thin function each.
use crate::exec;
use crate::trap::{catch, Fault};

/// CR0.WP: supervisor writes honour read-only pages. AMD APM vol. 2, 3.1.1.
pub const CR0_WP: u64 = 1 << 16;
/// CR4.PAE and its neighbours. AMD APM vol. 2, 3.1.3; Intel SDM vol. 3, 2.5.
pub const CR4_DE: u64 = 1 << 3;
/// 4 MiB pages in 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// Physical-address extension.
pub const CR4_PAE: u64 = 1 << 5;
/// Global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// SGDT, SIDT, SLDT, SMSW and STR fault outside ring 0.
pub const CR4_UMIP: u64 = 1 << 11;
/// 57-bit linear addresses.
pub const CR4_LA57: u64 = 1 << 12;
/// RDFSBASE and its family.
pub const CR4_FSGSBASE: u64 = 1 << 16;
/// Process-context identifiers.
pub const CR4_PCIDE: u64 = 1 << 17;
/// XSAVE and XSETBV.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// No supervisor execution of user pages.
pub const CR4_SMEP: u64 = 1 << 20;
/// No supervisor access to user pages unless RFLAGS.AC.
pub const CR4_SMAP: u64 = 1 << 21;
/// Protection keys for user pages.
pub const CR4_PKE: u64 = 1 << 22;
/// Protection keys for supervisor pages.
pub const CR4_PKS: u64 = 1 << 24;

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// Time-stamp counter.
pub const MSR_TSC: u32 = 0x10;
/// IA32_TSC_ADJUST.
pub const MSR_TSC_ADJUST: u32 = 0x3b;
/// IA32_PAT.
pub const MSR_PAT: u32 = 0x277;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_PKRS: rights of the keys of supervisor pages.
pub const MSR_PKRS: u32 = 0x6e1;
/// EFER.
pub const MSR_EFER: u32 = 0xc000_0080;
/// SYSCALL selectors.
pub const MSR_STAR: u32 = 0xc000_0081;
/// SYSCALL target in long mode.
pub const MSR_LSTAR: u32 = 0xc000_0082;
/// SYSCALL flag mask.
pub const MSR_SFMASK: u32 = 0xc000_0084;
/// FS base.
pub const MSR_FS_BASE: u32 = 0xc000_0100;
/// GS base.
pub const MSR_GS_BASE: u32 = 0xc000_0101;
/// GS base after SWAPGS.
pub const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// EFER.NXE.
pub const EFER_NXE: u64 = 1 << 11;
/// EFER.SCE.
pub const EFER_SCE: u64 = 1;

/// RFLAGS bits. AMD APM vol. 2, 3.1.6.
pub const FLAG_CF: u64 = 1;
/// Parity.
pub const FLAG_PF: u64 = 1 << 2;
/// Auxiliary carry.
pub const FLAG_AF: u64 = 1 << 4;
/// Zero.
pub const FLAG_ZF: u64 = 1 << 6;
/// Sign.
pub const FLAG_SF: u64 = 1 << 7;
/// Single step.
pub const FLAG_TF: u64 = 1 << 8;
/// Interrupts.
pub const FLAG_IF: u64 = 1 << 9;
/// Direction.
pub const FLAG_DF: u64 = 1 << 10;
/// Overflow.
pub const FLAG_OF: u64 = 1 << 11;
/// Resume.
pub const FLAG_RF: u64 = 1 << 16;
/// Alignment check.
pub const FLAG_AC: u64 = 1 << 18;

/// What CPUID returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpuid {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// CPUID with a leaf and a subleaf.
pub fn cpuid(leaf: u32, subleaf: u32) -> Cpuid {
    let (eax, ebx, ecx, edx);
    exec!("mov r8, rbx", "cpuid", "xchg r8, rbx",
        inout("eax") leaf => eax, out("r8") ebx, inout("ecx") subleaf => ecx, out("edx") edx);
    // The 64-bit exchange leaves EBX's value in R8.
    let ebx: u64 = ebx;
    Cpuid { eax, ebx: ebx as u32, ecx, edx }
}

/// The time-stamp counter, after everything before it has completed.
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    exec!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nomem, nostack));
    u64::from(high) << 32 | u64::from(low)
}

macro_rules! ports {
    ($in:ident, $out:ident, $type:ty, $reg:tt) => {
        /// Reads a port.
        pub fn $in(port: u16) -> $type {
            let value: $type;
            exec!(concat!("in ", $reg, ", dx"), in("dx") port, out($reg) value, options(nomem, nostack));
            value
        }

        /// Writes a port.
        pub fn $out(port: u16, value: $type) {
            exec!(concat!("out dx, ", $reg), in("dx") port, in($reg) value, options(nostack));
        }
    };
}
ports!(inw, outw, u16, "ax");
ports!(inl, outl, u32, "eax");

/// Reads a byte from a port.
pub fn inb(port: u16) -> u8 {
    let value: u8;
    exec!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack));
    value
}

/// Writes a byte to a port.
pub fn outb(port: u16, value: u8) {
    exec!("out dx, al", in("dx") port, in("al") value, options(nostack));
}

/// Reads a model-specific register; faults when it does not exist.
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    exec!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack));
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register; faults when it does not exist or the value is invalid.
pub fn wrmsr(msr: u32, value: u64) {
    exec!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
}

/// RDMSR whose fault is a value.
pub fn try_rdmsr(msr: u32) -> Result<u64, Fault> {
    catch(|| rdmsr(msr))
}

/// WRMSR whose fault is a value.
pub fn try_wrmsr(msr: u32, value: u64) -> Result<(), Fault> {
    catch(|| wrmsr(msr, value))
}

macro_rules! registers {
    ($($read:ident, $write:ident, $name:tt;)*) => {$(
        /// Reads the register.
        pub fn $read() -> u64 {
            let value: u64;
            exec!(concat!("mov {}, ", $name), out(reg) value, options(nostack));
            value
        }

        /// Writes the register.
        pub fn $write(value: u64) {
            exec!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack));
        }
    )*};
}
registers! {
    cr0, set_cr0, "cr0"; cr2, set_cr2, "cr2"; cr3, set_cr3, "cr3"; cr4, set_cr4, "cr4"; cr8, set_cr8, "cr8";
    dr0, set_dr0, "dr0"; dr1, set_dr1, "dr1"; dr2, set_dr2, "dr2"; dr3, set_dr3, "dr3";
    dr6, set_dr6, "dr6"; dr7, set_dr7, "dr7";
}

/// RFLAGS.
pub fn rflags() -> u64 {
    let value: u64;
    exec!("pushfq", "pop {}", out(reg) value);
    value
}

/// Replaces RFLAGS.
pub fn set_rflags(value: u64) {
    exec!("push {}", "popfq", in(reg) value);
}

/// XCR0.
pub fn xgetbv() -> u64 {
    let (low, high): (u32, u32);
    exec!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nostack));
    u64::from(high) << 32 | u64::from(low)
}

/// Writes extended control register `index`.
pub fn xsetbv(index: u32, value: u64) {
    exec!("xsetbv", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack));
}

/// Allows interrupts.
pub fn sti() {
    exec!("sti", "nop");
}

/// Forbids interrupts.
pub fn cli() {
    exec!("cli");
}

/// Allows interrupts and halts, in that order with nothing in between.
pub fn sti_hlt() {
    exec!("sti", "hlt");
}

/// Drops the translations of one address.
pub fn invlpg(address: u64) {
    exec!("invlpg [{}]", in(reg) address, options(nostack));
}

/// Reads memory at `address` exactly once.
pub fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: as in `exec!`; the address is the case's own choice and a fault is an outcome.
    unsafe { (address as *const T).read_volatile() }
}

/// Writes memory at `address` exactly once.
pub fn poke<T: Copy>(address: u64, value: T) {
    // SAFETY: as in `exec!`; the address is memory of the case, or a fault is the outcome it wants.
    unsafe { (address as *mut T).write_volatile(value) }
}

/// Whether CPUID `leaf`/`subleaf` exists and has `bit` set in the register that `pick` chooses.
pub fn has(leaf: u32, subleaf: u32, pick: fn(&Cpuid) -> u32, bit: u32) -> bool {
    let base = leaf & 0x8000_0000;
    cpuid(base, 0).eax >= leaf && pick(&cpuid(leaf, subleaf)) >> bit & 1 != 0
}

/// Spins until `done` or `ticks` of the TSC have passed; says whether `done` came.
pub fn wait_until(ticks: u64, mut done: impl FnMut() -> bool) -> bool {
    let start = rdtsc();
    loop {
        if done() {
            return true;
        }
        if rdtsc().wrapping_sub(start) > ticks {
            return done();
        }
        exec!("pause", options(nomem, nostack));
    }
}

/// Spins for `ticks` of the TSC.
pub fn delay(ticks: u64) {
    wait_until(ticks, || false);
}
