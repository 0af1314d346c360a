//! IN and OUT, and the permission to use a port.
use super::cpu::{Access, AccessKind, Cpu, Fault, Mode};
use super::decode::{DecodedInsn, Gpr, Operand, Seg};
use super::execute::Execution;
use super::flags::{iopl, mask};

/// Offset in the TSS of the 16-bit offset of its I/O permission map, the same in both 32- and 64-bit TSSs.
const IO_MAP_BASE: u64 = 0x66;

impl<C: Cpu> Execution<'_, C> {
    pub(super) fn input(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, size, .. } = *self.insn;
        let port = self.port(src)?;
        self.check_port(port, size)?;
        let value = self.cpu.port_in(port, size)?;
        self.write_operand(dst, size, value.into())
    }

    pub(super) fn output(&mut self) -> Result<(), Fault> {
        let DecodedInsn { dst, src, src_size, .. } = *self.insn;
        let port = self.port(dst)?;
        self.check_port(port, src_size)?;
        let value = self.read_operand(src, src_size)?;
        self.cpu.port_out(port, src_size, value as u32)
    }

    /// The port number: DX or an 8-bit immediate.
    fn port(&mut self, operand: Operand) -> Result<u16, Fault> {
        let size = if operand == Operand::Imm { 1 } else { 2 };
        Ok(self.read_operand(operand, size)? as u16)
    }

    /// #GP(0) unless IOPL or the TSS's permission map lets the guest use `size` ports from `port`. AMD APM vol. 2,
    /// 12.2.4. The map is read whole words at a time, so its last byte must lie one before the limit.
    pub(super) fn check_port(&mut self, port: u16, size: u8) -> Result<(), Fault> {
        let privileged = match self.mode {
            Mode::Real => true,
            Mode::Vm86 => false,
            _ => self.cpu.cpl() <= iopl(self.cpu.rflags()),
        };
        if privileged {
            return Ok(());
        }
        let map = self.task_state(IO_MAP_BASE)?;
        let bits = self.task_state(map + u64::from(port >> 3))?;
        let wanted = mask_of(size) << (port & 7);
        if bits & wanted == 0 {
            Ok(())
        } else {
            Err(self.general_protection().into())
        }
    }

    /// Sixteen bits of the TSS.
    fn task_state(&mut self, offset: u64) -> Result<u64, Fault> {
        let tss = self.cpu.segment(Seg::Tr);
        if !tss.attributes.present() || offset + 1 > u64::from(tss.limit) {
            return Err(self.general_protection().into());
        }
        let mut linear = tss.base.wrapping_add(offset);
        if self.mode != Mode::Long64 {
            linear &= mask(4);
        }
        if !self.canonical(linear) || linear.checked_add(1).is_none_or(|end| !self.canonical(end)) {
            return Err(self.general_protection().into());
        }
        self.cpu.read(linear, 2, Access { kind: AccessKind::System, sole: false })
    }

    /// The string forms of [`Self::input`] and [`Self::output`] take the port from DX.
    pub(super) fn string_port(&self) -> u16 {
        self.cpu.gpr(Gpr::Rdx) as u16
    }
}

/// One bit for each of `size` ports.
fn mask_of(size: u8) -> u64 {
    (1 << size.min(4)) - 1
}
