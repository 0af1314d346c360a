//! All processors: brings them up one after the other, and lets a CPU run a function on another.
//! Intel SDM vol. 3 section 9.4.4, AMD APM vol. 2 section 16.6.
// Start-up code, new stacks, and areas shared between CPUs.
#![allow(unsafe_code)]

use super::descriptors::Ist;

use super::mailbox::Call;
use super::percpu::{self, PerCpu, State};
use super::{control, lapic, trap, tsc};
use crate::acpi::Madt;
use crate::mm;
use crate::mm::ranges::{Range, RangeSet, PAGE_SIZE};
use crate::sync::IrqMutex;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::arch::global_asm;
use core::mem::{offset_of, size_of};
use spin::Once;
use x86_64::instructions::{interrupts, tlb};
use x86_64::registers::control::{Cr0, Cr3, Cr4};
use x86_64::{PhysAddr, VirtAddr};

global_asm!(include_str!("trampoline.s"), options(att_syntax));

extern "C" {
    static umbra_trampoline: u8;
    static umbra_trampoline_data: u8;
    static umbra_trampoline_end: u8;
}

/// Size of the stack that a CPU runs on.
pub const STACK_BYTES: u64 = 256 << 10;
/// Size of the stacks for NMI, #DF and #MC.
const IST_STACK_BYTES: u64 = 16 << 10;
/// How long a CPU may take to start. A tenth of a millisecond in hardware, but emulators share a host.
const START_TIMEOUT_NS: u64 = 5_000_000_000;
/// How long a function on another CPU may take when [`run_on_and_wait`] waits for it.
const CALL_TIMEOUT_NS: u64 = 10_000_000_000;

/// The part of the trampoline that is patched; the assembly has the same order.
#[repr(C, packed)]
struct Data {
    gdt_limit: u16,
    gdt_base: u32,
    _pad: u16,
    jump32: u32,
    jump32_selector: u32,
    jump64: u32,
    jump64_selector: u32,
    cr0: u32,
    cr3: u32,
    cr4: u32,
    efer: u32,
    stack: u64,
    cpu: u64,
    entry: u64,
}

const _: () =
    assert!(offset_of!(Data, jump32) == 8 && offset_of!(Data, cr0) == 24 && offset_of!(Data, stack) == 40);
const _: () = assert!(size_of::<Data>() == 64);

/// What every CPU does before it takes work.
static PER_CPU_INIT: Once<fn(&'static PerCpu)> = Once::new();

/// Gives the boot CPU stacks of its own for NMI, #DF and #MC.
pub fn init_boot_cpu_stacks() -> Option<()> {
    // SAFETY: the boot CPU's own tables.
    unsafe { set_interrupt_stacks(percpu::boot_cpu()) }
}

/// # Safety
/// See [`Tables::set_ist`](super::descriptors::Tables::set_ist).
unsafe fn set_interrupt_stacks(cpu: &PerCpu) -> Option<()> {
    for ist in Ist::ALL {
        let top = mm::alloc_stack(IST_STACK_BYTES)?;
        // SAFETY: promised by the caller; a new stack.
        unsafe { cpu.tables.set_ist(ist, top) };
    }
    Some(())
}

/// Starts all CPUs that the MADT calls enabled and returns how many run, this one included. `low` is free memory;
/// one page of it below 1 MiB is used while CPUs start. `per_cpu_init` runs once on each CPU, also on this one.
pub fn start_all(madt: Option<&Madt>, low: &RangeSet, per_cpu_init: fn(&'static PerCpu)) -> usize {
    let boot = percpu::boot_cpu();
    boot.set_state(State::Online);
    PER_CPU_INIT.call_once(|| per_cpu_init);
    per_cpu_init(boot);

    let enabled = madt.map_or(&[][..], |madt| &madt.processors).iter().filter(|p| p.enabled);
    let others: Vec<u32> = enabled.map(|p| p.apic_id).filter(|id| *id != boot.apic_id()).collect();
    let mut cpus = Vec::from([boot]);
    for apic_id in others {
        let index = cpus.len() as u32;
        cpus.push(Box::leak(Box::new(PerCpu::new(index, apic_id))));
    }
    percpu::set_all(cpus);
    let others = &percpu::all()[1..];
    if others.is_empty() {
        return 1;
    }

    let Some(trampoline) = Trampoline::new(low) else {
        log::warn!("no usable page below 1 MiB, so only one processor is used");
        return 1;
    };
    for cpu in others {
        if let Err(why) = start(cpu, &trampoline) {
            log::warn!("processor with APIC id {} {why}; going on without it", cpu.apic_id());
        }
    }
    trampoline.remove();
    percpu::all().iter().filter(|cpu| cpu.state() == State::Online).count()
}

fn start(cpu: &'static PerCpu, trampoline: &Trampoline) -> Result<(), &'static str> {
    const NO_MEMORY: &str = "has no memory for its stacks";
    if !lapic::is_x2apic() && cpu.apic_id() >= 0xff {
        return Err("cannot be reached without x2APIC");
    }
    // SAFETY: the CPU does not run yet.
    unsafe { set_interrupt_stacks(cpu) }.ok_or(NO_MEMORY)?;
    let stack = mm::alloc_stack(STACK_BYTES).ok_or(NO_MEMORY)?;
    trampoline.prepare(cpu, stack);

    lapic::send_init(cpu.apic_id());
    tsc::spin_ns(10_000_000);
    for _ in 0..2 {
        lapic::send_startup(cpu.apic_id(), trampoline.page);
        if online_within(cpu, 200_000) {
            return Ok(());
        }
    }
    if online_within(cpu, START_TIMEOUT_NS) {
        return Ok(());
    }
    // Back to waiting, so that it cannot come alive later on a page and a stack that are used otherwise.
    lapic::send_init(cpu.apic_id());
    Err("did not answer")
}

fn online_within(cpu: &PerCpu, ns: u64) -> bool {
    let (start, ticks) = (tsc::read(), tsc::rate().ticks(ns));
    loop {
        if cpu.state() == State::Online {
            return true;
        }
        if tsc::read().wrapping_sub(start) >= ticks {
            return false;
        }
        core::hint::spin_loop();
    }
}

/// Where the trampoline brings a new CPU: on its own stack, in Umbra's page tables.
extern "C" fn enter(cpu: &'static PerCpu) -> ! {
    control::init(super::features());
    // SAFETY: this CPU's area alone.
    unsafe { cpu.install() };
    lapic::init_this_cpu();
    if let Some(per_cpu_init) = PER_CPU_INIT.get() {
        per_cpu_init(cpu);
    }
    cpu.set_state(State::Online);
    idle()
}

/// Runs what other CPUs ask for and sleeps in between.
fn idle() -> ! {
    let cpu = percpu::this();
    loop {
        interrupts::disable();
        if !cpu.mailbox.run() {
            // STI takes effect after HLT has begun, so no wake-up is lost.
            interrupts::enable_and_hlt();
        }
    }
}

/// Runs the function that another CPU has asked this one for, if any. For CPUs that do not idle.
pub fn poll_mailbox() -> bool {
    percpu::this().mailbox.run()
}

/// Why a function did not run on another CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallError {
    /// There is no such CPU, or it does not run.
    Offline,
    /// Another call waits for this CPU.
    Busy,
    /// It was posted but did not return in time; it may yet run.
    Timeout,
}

/// Lets CPU number `index` run a function soon, interrupts off, and returns at once. On the CPU that calls, it runs
/// before this returns.
pub fn run_on(index: usize, run: fn(usize), arg: usize) -> Result<(), CallError> {
    post(index, Call { run, arg }).map(|_| ())
}

/// Like [`run_on`], and waits until the function has returned.
pub fn run_on_and_wait(index: usize, run: fn(usize), arg: usize) -> Result<(), CallError> {
    let Some((cpu, ticket)) = post(index, Call { run, arg })? else { return Ok(()) };
    let (start, ticks) = (tsc::read(), tsc::rate().ticks(CALL_TIMEOUT_NS));
    while !cpu.mailbox.is_done(ticket) {
        // The other CPU may wait for this one.
        poll_mailbox();
        if tsc::read().wrapping_sub(start) >= ticks {
            return Err(CallError::Timeout);
        }
        core::hint::spin_loop();
    }
    Ok(())
}

/// Runs `run` with `arg` on CPU number `index`, interrupts off, and returns what it returns.
pub fn call<T: Copy + Send + Sync + 'static, R: Send + 'static>(
    index: usize,
    arg: &T,
    run: fn(&T) -> R,
) -> Result<R, CallError> {
    struct Frame<T, R> {
        arg: T,
        run: fn(&T) -> R,
        result: IrqMutex<Option<R>>,
    }
    fn receive<T, R>(frame: usize) {
        // SAFETY: `call` made the pointer from an `Arc` of these types and gave this function one reference.
        let frame = unsafe { Arc::from_raw(frame as *const Frame<T, R>) };
        let result = (frame.run)(&frame.arg);
        *frame.result.lock() = Some(result);
    }
    let frame = Arc::new(Frame { arg: *arg, run, result: IrqMutex::new(None) });
    let given = Arc::into_raw(frame.clone());
    let outcome = run_on_and_wait(index, receive::<T, R>, given as usize);
    if matches!(outcome, Err(CallError::Offline | CallError::Busy)) {
        // SAFETY: it was not posted, so the reference made above is still ours.
        drop(unsafe { Arc::from_raw(given) });
    }
    outcome?;
    let result = frame.result.lock().take();
    result.ok_or(CallError::Timeout)
}

fn post(index: usize, call: Call) -> Result<Option<(&'static PerCpu, u64)>, CallError> {
    let cpu = *percpu::all().get(index).ok_or(CallError::Offline)?;
    if cpu.index() == percpu::this().index() {
        interrupts::without_interrupts(|| (call.run)(call.arg));
        return Ok(None);
    }
    if cpu.state() != State::Online {
        return Err(CallError::Offline);
    }
    let ticket = cpu.mailbox.post(call).ok_or(CallError::Busy)?;
    lapic::send(cpu.apic_id(), trap::WAKE);
    Ok(Some((cpu, ticket)))
}

/// The start-up code in its page.
struct Trampoline {
    page: PhysAddr,
}

impl Trampoline {
    /// Copies the code to a free page below 1 MiB and maps that page.
    fn new(low: &RangeSet) -> Option<Self> {
        // Not the first page, which holds the BIOS's data, and below the video memory.
        let window = Range::new(PAGE_SIZE, 0xa_0000);
        let mut free = low.iter().map(|range| range.intersect(window).shrink_to_pages());
        let page = PhysAddr::new(free.rfind(|range| !range.is_empty())?.end - PAGE_SIZE);
        let code = &raw const umbra_trampoline;
        // SAFETY: the linker's symbols bound the code; the page is free memory in the physical map.
        unsafe {
            let len = (&raw const umbra_trampoline_end).offset_from(code) as usize;
            mm::phys::write(page, core::slice::from_raw_parts(code, len));
        }
        mm::map_low_page(page).ok()?;
        let this = Self { page };
        let base = page.as_u64() as u32;
        // SAFETY: see `data`. The code was linked at zero: make its addresses those of the page.
        unsafe {
            let data = this.data();
            (*data).gdt_base += base;
            (*data).jump32 += base;
            (*data).jump64 += base;
            (*data).cr0 = Cr0::read_raw() as u32;
            (*data).cr3 = Cr3::read().0.start_address().as_u64() as u32;
            // Only what paging needs; the rest is set once the CPU is there. PAE, and PGE as on this CPU.
            (*data).cr4 = (Cr4::read_raw() & (1 << 5 | 1 << 7)) as u32;
            // LME and NXE.
            (*data).efer = 1 << 8 | 1 << 11;
            (*data).entry = enter as *const () as u64;
        }
        Some(this)
    }

    /// The patched part, through the physical map. Only one CPU reads it at a time, after it was written.
    fn data(&self) -> *mut Data {
        let offset = (&raw const umbra_trampoline_data as usize) - (&raw const umbra_trampoline as usize);
        mm::phys_to_virt(self.page + offset as u64).cast()
    }

    /// Makes the code bring up `cpu` on `stack`.
    fn prepare(&self, cpu: &'static PerCpu, stack: VirtAddr) {
        // SAFETY: see `data`; the CPU that was started before has left the page, or waits for another message.
        unsafe {
            (*self.data()).stack = stack.as_u64();
            (*self.data()).cpu = core::ptr::from_ref(cpu) as u64;
        }
    }

    /// Unmaps the page everywhere; it is free memory again.
    fn remove(self) {
        fn flush(_: usize) {
            tlb::flush_all();
        }
        mm::unmap_low_page(self.page);
        for cpu in percpu::all().iter().filter(|cpu| cpu.state() == State::Online) {
            if let Err(error) = run_on_and_wait(cpu.index(), flush, 0) {
                log::warn!("CPU {} did not flush its TLB: {error:?}", cpu.index());
            }
        }
    }
}
