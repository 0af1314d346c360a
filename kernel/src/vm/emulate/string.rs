//! String instructions and their repeat prefixes.
use super::cpu::{Access, AccessKind, Cpu, Fault};
use super::decode::{DecodedInsn, Gpr, Repeat, Seg, StringOp};
use super::execute::{Execution, Flow};
use super::flags::{self, mask, DF, TF, ZF};

/// Iterations that one call executes at most: a page of quadwords.
pub(super) const MAX_ITERATIONS: u32 = 512;

impl<C: Cpu> Execution<'_, C> {
    /// Executes iterations until the count or the condition ends them, an interrupt or single-stepping asks for a
    /// pause, or the bound is reached. Each iteration commits its registers.
    pub(super) fn string(&mut self, op: StringOp) -> Result<Flow, Fault> {
        let DecodedInsn { repeat, size, .. } = *self.insn;
        let width = self.insn.mem.size;
        if matches!(op, StringOp::Ins | StringOp::Outs) {
            self.check_port(self.string_port(), size)?;
        }
        if repeat == Repeat::Once {
            self.iterate(op)?;
            return Ok(Flow::Next);
        }
        for _ in 0..MAX_ITERATIONS {
            let count = self.cpu.gpr(Gpr::Rcx) & mask(width);
            if count == 0 {
                return Ok(Flow::Next);
            }
            self.iterate(op)?;
            self.set_register(Gpr::Rcx, width, count - 1);
            // What the exit told was about the first iteration.
            self.sole = false;
            let rflags = self.cpu.rflags();
            let ended = matches!(op, StringOp::Scas | StringOp::Cmps)
                && (repeat == Repeat::Equal) != (rflags & ZF != 0);
            if count == 1 || ended {
                return Ok(Flow::Next);
            }
            if rflags & TF != 0 || self.cpu.interrupt_pending() {
                break;
            }
        }
        Ok(Flow::Again)
    }

    /// One iteration: memory first, then the index registers.
    fn iterate(&mut self, op: StringOp) -> Result<(), Fault> {
        let size = self.insn.size;
        match op {
            StringOp::Movs => {
                let value = self.load_source(size)?;
                self.store_destination(size, value)?;
                self.advance(Gpr::Rsi);
                self.advance(Gpr::Rdi);
            }
            StringOp::Stos => {
                self.store_destination(size, self.cpu.gpr(Gpr::Rax))?;
                self.advance(Gpr::Rdi);
            }
            StringOp::Lods => {
                let value = self.load_source(size)?;
                self.set_register(Gpr::Rax, size, value);
                self.advance(Gpr::Rsi);
            }
            StringOp::Scas => {
                let value = self.load_destination(size)?;
                let accumulator = self.cpu.gpr(Gpr::Rax) & mask(size);
                self.set_status(flags::sub(accumulator, value, false, size).1);
                self.advance(Gpr::Rdi);
            }
            StringOp::Cmps => {
                let left = self.load_source(size)?;
                let right = self.load_destination(size)?;
                self.set_status(flags::sub(left, right, false, size).1);
                self.advance(Gpr::Rsi);
                self.advance(Gpr::Rdi);
            }
            StringOp::Ins => {
                // What a port gives up must have a place to go.
                let linear = self.string_address(Seg::Es, Gpr::Rdi, size, AccessKind::Write)?;
                let access = Access { kind: AccessKind::Write, sole: self.sole };
                self.cpu.probe_write(linear, size, access)?;
                let value = self.cpu.port_in(self.string_port(), size)?;
                self.store(linear, size, value.into())?;
                self.advance(Gpr::Rdi);
            }
            StringOp::Outs => {
                let value = self.load_source(size)?;
                self.cpu.port_out(self.string_port(), size, value as u32)?;
                self.advance(Gpr::Rsi);
            }
        }
        Ok(())
    }

    fn string_address(&self, seg: Seg, index: Gpr, size: u8, kind: AccessKind) -> Result<u64, Fault> {
        let offset = self.cpu.gpr(index) & mask(self.insn.mem.size);
        Ok(self.linear(seg, offset, size, kind)?)
    }

    fn load_source(&mut self, size: u8) -> Result<u64, Fault> {
        let linear = self.string_address(self.insn.mem.seg, Gpr::Rsi, size, AccessKind::Read)?;
        self.load(linear, size, AccessKind::Read)
    }

    fn load_destination(&mut self, size: u8) -> Result<u64, Fault> {
        let linear = self.string_address(Seg::Es, Gpr::Rdi, size, AccessKind::Read)?;
        self.load(linear, size, AccessKind::Read)
    }

    fn store_destination(&mut self, size: u8, value: u64) -> Result<(), Fault> {
        let linear = self.string_address(Seg::Es, Gpr::Rdi, size, AccessKind::Write)?;
        self.store(linear, size, value)
    }

    /// Moves an index register by one element, in the direction of DF.
    fn advance(&mut self, index: Gpr) {
        let DecodedInsn { size, .. } = *self.insn;
        let step = u64::from(size);
        let step = if self.cpu.rflags() & DF != 0 { step.wrapping_neg() } else { step };
        self.set_register(index, self.insn.mem.size, self.cpu.gpr(index).wrapping_add(step));
    }
}
