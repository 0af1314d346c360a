//! The x87 instructions of start-up code: FNINIT, FNCLEX, FNSTSW, FNSTCW, FLDCW, FWAIT. The unit itself is the
//! processor's, see [`Cpu::x87`].
use super::cpu::{Cpu, Exception, Fault, X87Action};
use super::decode::{DecodedInsn, Unsupported, X87};
use super::execute::Execution;
use crate::vm::control_regs::{CR0_EM, CR0_MP, CR0_NE, CR0_TS};

/// Status word: an unmasked exception is pending.
const STATUS_ES: u16 = 1 << 7;

impl<C: Cpu> Execution<'_, C> {
    pub(super) fn x87(&mut self, x87: X87) -> Result<(), Fault> {
        let DecodedInsn { dst, .. } = *self.insn;
        let cr0 = self.cpu.cr0();
        // AMD APM vol. 2, 3.1.1; table "x87 and WAIT" of Intel SDM vol. 3, 2.5.
        let absent = match x87 {
            X87::Wait => cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS,
            _ => cr0 & (CR0_EM | CR0_TS) != 0,
        };
        if absent {
            return Err(Exception::DEVICE_NOT_AVAILABLE.into());
        }
        match x87 {
            X87::Init => self.act(X87Action::Initialize).map(|_| ()),
            X87::ClearExceptions => self.act(X87Action::ClearExceptions).map(|_| ()),
            X87::StoreStatus => {
                let status = self.act(X87Action::Status)?;
                self.write_operand(dst, 2, status.into())
            }
            X87::StoreControl => {
                let control = self.act(X87Action::Control)?;
                self.write_operand(dst, 2, control.into())
            }
            X87::LoadControl => {
                self.take_pending(cr0)?;
                let control = self.read_operand(dst, 2)?;
                self.act(X87Action::LoadControl(control as u16)).map(|_| ())
            }
            X87::Wait => self.take_pending(cr0),
        }
    }

    fn act(&mut self, action: X87Action) -> Result<u16, Fault> {
        self.cpu.x87(action).ok_or(Fault::Unsupported(Unsupported::Vector.reason()))
    }

    /// #MF for an exception of an earlier instruction. Without CR0.NE it would be an external interrupt, by a
    /// line (FERR#) that no guest's board has, as if it were ignored (IGNNE#).
    fn take_pending(&mut self, cr0: u64) -> Result<(), Fault> {
        if self.act(X87Action::Status)? & STATUS_ES != 0 && cr0 & CR0_NE != 0 {
            Err(Exception::X87_PENDING.into())
        } else {
            Ok(())
        }
    }
}
