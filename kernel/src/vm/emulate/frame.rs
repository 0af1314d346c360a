//! Instructions that move several values to or from the stack: PUSHA and POPA, ENTER and LEAVE. All places are
//! checked before the first of them is written.
use super::cpu::{Access, AccessKind, Cpu, Fault};
use super::decode::{DecodedInsn, Gpr, Seg};
use super::execute::Execution;
use super::flags::mask;

/// What PUSHA pushes, first to last; POPA takes them in reverse.
const ALL: [Gpr; 8] = [Gpr::Rax, Gpr::Rcx, Gpr::Rdx, Gpr::Rbx, Gpr::Rsp, Gpr::Rbp, Gpr::Rsi, Gpr::Rdi];

impl<C: Cpu> Execution<'_, C> {
    pub(super) fn push_all(&mut self) -> Result<(), Fault> {
        let size = self.insn.size;
        let rsp = self.cpu.gpr(Gpr::Rsp);
        for n in 1..=8 {
            self.check_slot(rsp, n, AccessKind::Write)?;
        }
        for (n, gpr) in (1..).zip(ALL) {
            let linear = self.slot(rsp, n, AccessKind::Write)?;
            self.store(linear, size, self.cpu.gpr(gpr))?;
        }
        self.set_register(Gpr::Rsp, self.stack_size(), rsp.wrapping_sub(8 * u64::from(size)));
        Ok(())
    }

    /// POPA. What was pushed for the stack pointer is skipped.
    pub(super) fn pop_all(&mut self) -> Result<(), Fault> {
        let size = self.insn.size;
        let end = self.cpu.gpr(Gpr::Rsp).wrapping_add(8 * u64::from(size));
        let mut values = [0; 8];
        for n in (0..8).rev().filter(|&n| ALL[n] != Gpr::Rsp) {
            let linear = self.slot(end, n as u64 + 1, AccessKind::Read)?;
            values[n] = self.load(linear, size, AccessKind::Read)?;
        }
        for (gpr, value) in ALL.into_iter().zip(values).filter(|(gpr, _)| *gpr != Gpr::Rsp) {
            self.set_register(gpr, size, value);
        }
        self.set_register(Gpr::Rsp, self.stack_size(), end);
        Ok(())
    }

    /// ENTER: pushes RBP, the frame pointers of the enclosing levels and the new one, and reserves room.
    pub(super) fn enter(&mut self) -> Result<(), Fault> {
        let DecodedInsn { size, imm, .. } = *self.insn;
        let (room, level) = (imm & 0xffff, imm >> 16 & 31);
        let (rsp, rbp) = (self.cpu.gpr(Gpr::Rsp), self.cpu.gpr(Gpr::Rbp));
        let width = self.stack_size();
        let pushed = if level == 0 { 1 } else { level + 1 };
        self.check_slot(rsp, 1, AccessKind::Write)?;
        for n in 1..pushed {
            if n < level {
                self.check_slot(rbp, n, AccessKind::Read)?;
            }
            self.check_slot(rsp, n + 1, AccessKind::Write)?;
        }
        // The last check is for a write at the final stack pointer.
        let top = rsp.wrapping_sub(pushed * u64::from(size)).wrapping_sub(room);
        self.check_slot(top.wrapping_add(size.into()), 1, AccessKind::Write)?;

        let frame = rsp & !mask(width) | rsp.wrapping_sub(size.into()) & mask(width);
        let linear = self.slot(rsp, 1, AccessKind::Write)?;
        self.store(linear, size, rbp)?;
        for n in 1..pushed {
            let value = if n < level {
                let linear = self.slot(rbp, n, AccessKind::Read)?;
                self.load(linear, size, AccessKind::Read)?
            } else {
                frame
            };
            let linear = self.slot(rsp, n + 1, AccessKind::Write)?;
            self.store(linear, size, value)?;
        }
        // By operand size, as processors do; the manuals differ.
        self.set_register(Gpr::Rbp, size, frame);
        self.set_register(Gpr::Rsp, width, top);
        Ok(())
    }

    pub(super) fn leave(&mut self) -> Result<(), Fault> {
        let size = self.insn.size;
        let width = self.stack_size();
        let top = self.cpu.gpr(Gpr::Rbp) & mask(width);
        let linear = self.linear(Seg::Ss, top, size, AccessKind::Read)?;
        let value = self.load(linear, size, AccessKind::Read)?;
        self.set_register(Gpr::Rsp, width, top.wrapping_add(size.into()));
        self.set_register(Gpr::Rbp, size, value);
        Ok(())
    }

    /// Linear address of the `n`-th operand-sized slot below `pointer`.
    fn slot(&self, pointer: u64, n: u64, kind: AccessKind) -> Result<u64, Fault> {
        let size = self.insn.size;
        let offset = pointer.wrapping_sub(n * u64::from(size)) & mask(self.stack_size());
        Ok(self.linear(Seg::Ss, offset, size, kind)?)
    }

    /// The fault that an access to that slot would have.
    fn check_slot(&mut self, pointer: u64, n: u64, kind: AccessKind) -> Result<(), Fault> {
        let linear = self.slot(pointer, n, kind)?;
        let access = Access { kind, sole: false };
        if kind.is_write() {
            self.cpu.probe_write(linear, self.insn.size, access)
        } else {
            self.cpu.probe_read(linear, self.insn.size, access)
        }
    }
}
