//! Decimal adjustment: AAA, AAS, DAA, DAS, AAM, AAD. Flags that the manuals leave undefined stay.
use super::cpu::{Cpu, Exception, Fault};
use super::decode::{Decimal, Gpr};
use super::execute::Execution;
use super::flags::{szp, AF, CF, PF, SF, ZF};

impl<C: Cpu> Execution<'_, C> {
    pub(super) fn decimal(&mut self, decimal: Decimal) -> Result<(), Fault> {
        let old = self.cpu.rflags();
        let ax = self.cpu.gpr(Gpr::Rax) & 0xffff;
        let (al, ah) = (ax & 0xff, ax >> 8);
        let low_digit = al & 0xf > 9 || old & AF != 0;
        let base = self.insn.imm & 0xff;
        let with_result = |al: u64| szp(al, 1) | old & !(SF | ZF | PF);
        let (ax, status) = match decimal {
            Decimal::Aaa | Decimal::Aas => {
                let adjusted = match decimal {
                    _ if !low_digit => ax,
                    Decimal::Aaa => ax.wrapping_add(0x106),
                    _ => ax.wrapping_sub(0x106),
                };
                (adjusted & 0xff0f, old & !(AF | CF) | if low_digit { AF | CF } else { 0 })
            }
            Decimal::Daa | Decimal::Das => {
                let high_digit = al > 0x99 || old & CF != 0;
                let step = if low_digit { 6 } else { 0 } + if high_digit { 0x60 } else { 0 };
                let (adjusted, wrapped) = if decimal == Decimal::Daa {
                    // The low digit's carry implies a high digit above 9.
                    (al + step, false)
                } else {
                    (al.wrapping_sub(step), low_digit && al < 6)
                };
                let carries = if low_digit { AF } else { 0 } | if high_digit || wrapped { CF } else { 0 };
                let adjusted = adjusted & 0xff;
                (ah << 8 | adjusted, with_result(adjusted) & !(AF | CF) | carries)
            }
            Decimal::Aam => {
                let (Some(tens), Some(ones)) = (al.checked_div(base), al.checked_rem(base)) else {
                    return Err(Exception::DIVIDE.into());
                };
                (tens << 8 | ones, with_result(ones))
            }
            Decimal::Aad => {
                let al = (al + ah * base) & 0xff;
                (al, with_result(al))
            }
        };
        self.set_register(Gpr::Rax, 2, ax);
        self.set_status(status);
        Ok(())
    }
}
