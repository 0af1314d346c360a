//! Runs a few instructions in ring 3.
use crate::cpu::{poke, rflags};
use crate::exec;
use crate::frames::PAGE;
use crate::machine::{USER_CODE32, USER_CODE64, USER_DATA};
use crate::paging::{Space, P, PLAYGROUND, U, W};
use crate::trap::{catch, last_frame, Fault, Frame};

/// Where the code is mapped.
pub const CODE: u64 = PLAYGROUND + 0x10_0000;
/// A page of data.
pub const DATA: u64 = CODE + 2 * PAGE;
/// A page of stack.
pub const STACK: u64 = CODE + 4 * PAGE;

/// Code of `run_low`: an address in the PCI hole that nothing else uses.
pub const LOW_CODE: u64 = 0xd000_0000;
/// Stack of `run_low`.
pub const LOW_STACK: u64 = LOW_CODE + 4 * PAGE;

/// Ring 3 context to start with; `rip` is at the first byte of the code.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Start {
    pub cs: u16,
    pub rflags: u64,
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
}

impl Default for Start {
    fn default() -> Start {
        Start { cs: USER_CODE64, rflags: 2, rax: 0, rbx: 0, rcx: 0, rdx: 0 }
    }
}

impl Start {
    /// The same in a 32-bit segment: compatibility mode.
    pub fn compat() -> Start {
        Start { cs: USER_CODE32, ..Start::default() }
    }
}

/// Maps code, data and stack pages for ring 3.
pub fn map() {
    let space = Space::current();
    for page in [CODE, DATA, STACK] {
        space.map_new(page, P | W | U);
    }
}

/// Runs `code` in ring 3 until the first exception, which it returns with the registers of that moment. Code that
/// has nothing better to end with ends with UD2.
pub fn run(code: &[u8], start: Start) -> (Fault, Frame) {
    map();
    run_mapped(code, start)
}

/// The same in pages that `map` made before.
pub fn run_mapped(code: &[u8], start: Start) -> (Fault, Frame) {
    for (offset, &byte) in code.iter().enumerate() {
        poke(CODE + offset as u64, byte);
    }
    enter(CODE, STACK + PAGE - 16, start)
}

/// The same with code and stack below 4 GiB, where 32-bit code can reach its stack and data.
pub fn run_low(code: &[u8], start: Start) -> (Fault, Frame) {
    let space = Space::current().isolated();
    space.activate();
    for page in [LOW_CODE, LOW_STACK] {
        space.map_new(page, P | W | U);
    }
    for (offset, &byte) in code.iter().enumerate() {
        poke(LOW_CODE + offset as u64, byte);
    }
    enter(LOW_CODE, LOW_STACK + PAGE - 16, start)
}

/// Enters ring 3 at `rip` with stack `rsp`.
pub fn enter(rip: u64, rsp: u64, start: Start) -> (Fault, Frame) {
    let flags = rflags();
    let got = catch(|| {
        let frame = [rip, start.cs.into(), start.rflags, rsp, USER_DATA.into()];
        exec!(
            "push [rdi + 32]", "push [rdi + 24]", "push [rdi + 16]", "push [rdi + 8]", "push [rdi]",
            "mov rbx, rsi",
            // IRET to ring 3 makes data segments of ring 0 unusable, which counts in compatibility mode.
            "mov ds, r8d",
            "mov es, r8d",
            "iretq",
            in("rdi") &frame, in("rax") start.rax, in("rsi") start.rbx, in("rcx") start.rcx, in("rdx") start.rdx,
            in("r8") u64::from(USER_DATA),
            options(noreturn)
        )
    });
    crate::cpu::set_rflags(flags);
    let fault: Fault = match got {
        Err(fault) => fault,
        Ok(never) => never,
    };
    (fault, last_frame())
}
