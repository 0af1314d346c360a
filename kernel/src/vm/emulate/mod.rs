//! The instruction emulator: one instruction of a guest, because its memory is a device's or write-protected, or
//! because the processor cannot run the guest's code as it is: real mode where VMX has no unrestricted guest. It
//! also delivers events and switches tasks where the hardware does not.
//!
//! # Interface
//!
//! One [`Emulator`] per vCPU (it holds the decode cache, and allocates only when made):
//!
//! - [`Emulator::emulate`]`(&mut cpu, bytes) -> `[`Outcome`]: executes the instruction at the vCPU's RIP, of which
//!   `bytes` are up to fifteen bytes, as many as could be fetched.
//! - [`Emulator::insn_len`]`(mode, bytes) -> Result<u8, `[`DecodeError`]`>`: only the length, to skip an intercepted
//!   instruction where the processor does not report the next RIP.
//! - [`Emulator::deliver`]`(&mut cpu, event)`: an interrupt or exception through the IVT or IDT.
//! - [`Emulator::task_switch`]`(&mut cpu, `[`TaskSwitch`]`)`: a hardware task switch.
//! - [`Cpu`]: the trait through which the emulator sees a vCPU: registers, segments, paged memory, ports.
//!   [`Mode::of`] computes the mode; [`KnownOperand`] is the optional shortcut past the guest walk.
//! - [`Exception`], [`Fault`]: how a [`Cpu`] refuses an access.
//!
//! # Rules
//!
//! - Nothing of an instruction takes effect before its last possible fault, except device accesses that the
//!   processor would make before it, too. Repeated instructions commit each iteration.
//! - Everything is done with the guest's own rights at its CPL, checked here (segmentation, canonical form, alignment,
//!   I/O permission) and in the [`Cpu`] (paging): the bytes may have been changed by another vCPU since the exit and
//!   are not trusted to be what caused it.
//! - A segment load, far transfer or event is put together as one change (`change`): translations are tried, accessed
//!   bits set by locked exchanges, the stack written, and then the whole state is replaced. A task switch has its
//!   commit point in the middle, as in the processor: what fails behind it is an exception of the new task.
//! - A repeated instruction runs a bounded number of iterations, then RIP stays and [`Outcome::Continue`] is returned.
//! - On completion RF ends, and the interrupt shadow unless the instruction begins one; TF, as it was before the
//!   instruction, is reported as an owed #DB.
//!
//! # Limits
//!
//! Instruction and data breakpoints (DR7) are not matched. Not emulated: transactional memory, FXSAVE and XSAVE; of
//! x87 all but FNINIT, FNCLEX, FNSTSW, FNSTCW, FLDCW and FWAIT; MMX and AVX; SSE but for loads and stores where the
//! [`Cpu`] gives access to the vector registers. VMX, SVM, SMX, MONITOR and MWAIT raise #UD, RDPMC #GP. There are
//! no shadow stacks and no FRED.
//!
//! A near branch with operand-size prefix in 64-bit mode is refused, for AMD's and Intel's processors differ.
//! Whether the guest's CPUID offers an extension (POPCNT, BMI, ADX) is not looked at, but for RDTSCP, RDRAND,
//! RDSEED and INVPCID. PUSHA, ENTER and the like raise #SS where the stack segment ends, also in real mode, where
//! for some stack pointers the manual has #GP or a shutdown. INVPCID and INVLPG may flush more than they name. A
//! 16-bit task begins with zeros in the upper halves of its registers, which the manuals leave open. A second
//! MOV SS right behind the first extends the interrupt shadow.
mod address;
mod alu;
mod atomic;
mod branch;
pub mod cache;
mod change;
pub mod cpu;
mod decimal;
pub mod decode;
mod deliver;
mod execute;
mod extensions;
mod far;
mod flag_insns;
pub mod flags;
mod frame;
mod io;
mod length;
mod miscellany;
mod segment;
mod stack;
mod string;
mod system;
mod task;
#[cfg(test)]
mod tests;
mod translate;
mod translate_system;
mod x87;

pub use cache::DecodeCache;
pub use cpu::{
    Access, AccessKind, Attributes, Cpu, Exception, Fault, KnownOperand, Mode, Segment, X87Action,
};
pub use decode::{DecodeError, DecodedInsn, Gpr, Seg};
pub use task::TaskSwitch;

use crate::hw::Event;

use alloc::collections::TryReserveError;

/// What became of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It completed and RIP is behind it. `trap`: RFLAGS.TF was set, a #DB with DR6.BS is owed.
    Done {
        /// A single-step trap is owed.
        trap: bool,
    },
    /// A repeated instruction has iterations left: RIP is still at it, the registers stand between two
    /// iterations, RF is set as it is when an interrupt comes here. Enter the guest again, which goes on with it
    /// (by another exit). `trap` as for `Done`: TF traps after each iteration.
    Continue {
        /// A single-step trap is owed.
        trap: bool,
    },
    /// The guest takes this exception at this RIP; RF is set for the pushed image, as for every fault.
    Exception(Exception),
    /// Nothing happened; enter the guest again.
    Retry,
    /// The instruction continues behind `bytes`. If fewer than fifteen were given because the next page could not
    /// be fetched, the guest takes the fault of that fetch.
    Truncated,
    /// The [`Cpu`] wants the VM stopped.
    Stop,
    /// Not emulated. The VM is stopped with a report; for code at CPL 3 a #UD serves the guest better.
    Unsupported {
        /// What it was, for the report.
        reason: &'static str,
    },
}

/// Emulator of one vCPU.
pub struct Emulator {
    cache: DecodeCache,
}

impl Emulator {
    /// An emulator with an empty decode cache.
    pub fn new() -> Result<Self, TryReserveError> {
        Ok(Self { cache: DecodeCache::new()? })
    }

    /// The decode cache, for its statistics.
    #[must_use]
    pub fn cache(&self) -> &DecodeCache {
        &self.cache
    }

    /// Length of the instruction that `bytes` begin with, whether it could be emulated or not.
    #[inline(always)]
    pub fn insn_len(&mut self, mode: Mode, bytes: &[u8]) -> Result<u8, DecodeError> {
        match length::plain(bytes) {
            Some(len) => Ok(len),
            None => self.cache.lookup(mode.bitness(), bytes).map(DecodedInsn::len),
        }
    }

    /// Emulates the instruction at `cpu`'s RIP. `bytes` are its first bytes, up to fifteen.
    pub fn emulate<C: Cpu>(&mut self, cpu: &mut C, bytes: &[u8]) -> Outcome {
        let mode = cpu.mode();
        match self.cache.lookup(mode.bitness(), bytes) {
            Ok(insn) => execute::execute(cpu, insn, mode),
            Err(error) => execute::rejected(cpu, mode, error),
        }
    }

    /// Delivers `event` in the processor's place, before the instruction at RIP: through the IVT in real mode, through
    /// the IDT elsewhere. [`Outcome::Done`]: the CPU is at the handler's first instruction.
    /// [`Outcome::Exception`]: nothing happened but this exception during the delivery; what comes of the two is
    /// what [`combine`](crate::vm::exceptions::combine) says. If a task gate was used, the exception may also be the
    /// first one of the new task, which is told by TR. DR6 and CR2 have been set before, NMIs are blocked by
    /// the caller.
    pub fn deliver<C: Cpu>(&mut self, cpu: &mut C, event: Event) -> Outcome {
        match deliver::deliver(cpu, event) {
            Ok(outcome) => outcome,
            // The pushed image of RFLAGS is the interrupted program's: RF is not touched.
            Err(Fault::Exception(exception)) => Outcome::Exception(exception),
            Err(Fault::Retry) => Outcome::Retry,
            Err(Fault::Stop) => Outcome::Stop,
            Err(Fault::Unsupported(reason)) => Outcome::Unsupported { reason },
        }
    }

    /// Switches tasks in the processor's place. [`Outcome::Exception`]: in the old task, if RIP is still there; else
    /// in the new one, as is the #DB of a TSS with its T flag set.
    pub fn task_switch<C: Cpu>(&mut self, cpu: &mut C, switch: TaskSwitch) -> Outcome {
        match task::switch(cpu, &switch) {
            Ok(outcome) => outcome,
            Err(fault) => execute::failed(cpu, fault),
        }
    }
}
