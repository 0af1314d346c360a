//! Instructions on RFLAGS: PUSHF and POPF, CLI and STI with virtual-8086 mode extensions and protected-mode virtual
//! interrupts, LAHF and SAHF, and those of one status flag. Intel SDM vol. 3, 21.3 and 21.4; AMD APM vol. 2, 8.10.
use super::cpu::{Cpu, Fault, Mode};
use super::decode::{FlagOp, Gpr};
use super::execute::Execution;
use super::flags::{iopl, mask, AC, AF, CF, DF, ID, IF, IOPL, NT, PF, RF, SF, STATUS, TF, VIF, VIP, VM, ZF};
use crate::vm::control_regs::{CR4_PVI, CR4_VME};

/// What POPF may always change.
const POPPED: u64 = STATUS | TF | DF | NT | AC | ID;
/// What LAHF and SAHF move; bit 1 is always set.
const LOW: u64 = SF | ZF | AF | PF | CF;

impl<C: Cpu> Execution<'_, C> {
    /// The image has RF and VM clear. Virtual-8086 mode below IOPL 3 needs its extensions, and then sees VIF as IF and
    /// its IOPL as 3.
    pub(super) fn push_flags(&mut self) -> Result<(), Fault> {
        let rflags = self.cpu.rflags();
        let image = if self.is_virtualized() {
            self.require_extensions()?;
            rflags & !IF | IOPL | if rflags & VIF != 0 { IF } else { 0 }
        } else {
            rflags & !(RF | VM)
        };
        self.push_value(self.insn.size, image)
    }

    pub(super) fn pop_flags(&mut self) -> Result<(), Fault> {
        let size = self.insn.size;
        let old = self.cpu.rflags();
        let virtualized = self.is_virtualized();
        if virtualized {
            self.require_extensions()?;
        }
        let (popped, top) = self.peek_value(size)?;
        let mut changed = POPPED;
        let mut new = popped;
        if virtualized {
            if popped & TF != 0 || popped & IF != 0 && old & VIP != 0 {
                return Err(self.general_protection().into());
            }
            new = popped & !VIF | if popped & IF != 0 { VIF } else { 0 };
        } else {
            // In virtual-8086 mode, where CPL is 3, IOPL is 3 here.
            let cpl = if self.mode == Mode::Real { 0 } else { self.cpu.cpl() };
            changed |= if cpl <= iopl(old) { IF } else { 0 };
            changed |= if cpl == 0 { IOPL } else { 0 };
        }
        changed &= mask(size);
        if virtualized {
            changed |= VIF;
        }
        self.set_register(Gpr::Rsp, self.stack_size(), top.wrapping_add(size.into()));
        self.traced = Some(old & TF != 0);
        self.cpu.set_rflags(old & !changed | new & changed);
        Ok(())
    }

    /// CLI, or STI, which holds interrupts off for one more instruction if they were.
    pub(super) fn change_interrupt_flag(&mut self, set: bool) -> Result<(), Fault> {
        let old = self.cpu.rflags();
        let cr4 = self.cpu.cr4();
        let real = match self.mode {
            Mode::Real => true,
            Mode::Vm86 => iopl(old) == 3,
            _ => self.cpu.cpl() <= iopl(old),
        };
        let flag = if real {
            IF
        } else {
            let enabled = match self.mode {
                Mode::Vm86 => cr4 & CR4_VME != 0,
                _ => self.cpu.cpl() == 3 && cr4 & CR4_PVI != 0,
            };
            if !enabled || set && old & VIP != 0 {
                return Err(self.general_protection().into());
            }
            VIF
        };
        if set {
            self.shadow = real && old & IF == 0;
            self.cpu.set_rflags(old | flag);
        } else {
            self.cpu.set_rflags(old & !flag);
        }
        Ok(())
    }

    pub(super) fn change_flag(&mut self, flag: FlagOp) {
        let old = self.cpu.rflags();
        self.cpu.set_rflags(match flag {
            FlagOp::ClearCarry => old & !CF,
            FlagOp::SetCarry => old | CF,
            FlagOp::ComplementCarry => old ^ CF,
            FlagOp::ClearDirection => old & !DF,
            FlagOp::SetDirection => old | DF,
        });
    }

    /// LAHF.
    pub(super) fn load_ah(&mut self) {
        let low = self.cpu.rflags() & LOW | 2;
        let rax = self.cpu.gpr(Gpr::Rax);
        self.cpu.set_gpr(Gpr::Rax, rax & !0xff00 | low << 8);
    }

    /// SAHF.
    pub(super) fn store_ah(&mut self) {
        let low = self.cpu.gpr(Gpr::Rax) >> 8 & LOW;
        let old = self.cpu.rflags();
        self.cpu.set_rflags(old & !LOW | low);
    }

    /// Virtual-8086 mode without the right to the real IF.
    fn is_virtualized(&self) -> bool {
        self.mode == Mode::Vm86 && iopl(self.cpu.rflags()) < 3
    }

    /// PUSHF and POPF below IOPL 3: only with CR4.VME, and then not in their 32-bit forms.
    fn require_extensions(&self) -> Result<(), Fault> {
        if self.cpu.cr4() & CR4_VME != 0 && self.insn.size == 2 {
            Ok(())
        } else {
            Err(self.general_protection().into())
        }
    }
}
