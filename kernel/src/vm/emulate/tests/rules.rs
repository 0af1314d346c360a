//! What holds for all instructions: faults change nothing, completion ends RF and the interrupt shadow, TF traps.
use super::fake::{FakeCpu, RAM};
use super::hostile::FORMS;
use crate::vm::emulate::{AccessKind, Emulator, Exception, Gpr, Outcome};

#[test]
fn completion_clears_rf_and_the_interrupt_shadow() {
    let mut cpu = FakeCpu::long();
    cpu.rflags |= 1 << 16;
    assert!(cpu.shadow);
    cpu.done(&[0x8b, 0x03]);
    assert_eq!(cpu.rflags, 2);
    assert!(!cpu.shadow);
}

#[test]
fn a_set_trap_flag_is_reported() {
    let mut cpu = FakeCpu::long();
    cpu.rflags |= 0x100;
    assert_eq!(cpu.run(&[0x8b, 0x03]), Outcome::Done { trap: true });
    assert_eq!(cpu.rflags, 0x102);
}

/// Every form, with an operand whose page is absent or read-only: registers and memory stay as they were.
#[test]
fn faults_leave_no_trace() {
    let mut emulator = Emulator::new().unwrap();
    for form in FORMS {
        for absent in [true, false] {
            let mut cpu = FakeCpu::long();
            cpu.gprs = [3; 16];
            cpu[Gpr::Rbx] = RAM + 0x1ffc; // operands lie on two pages
            (cpu[Gpr::Rsi], cpu[Gpr::Rdi]) = (RAM + 0x1ffc, RAM + 0x1ffc);
            cpu[Gpr::Rsp] = RAM + 0x2800;
            cpu[Gpr::Rcx] = 1;
            let bytes = form.bytes;
            if form.size <= 4 {
                for gpr in [Gpr::Rbx, Gpr::Rsi, Gpr::Rdi] {
                    cpu[gpr] += 4; // or on the second one
                }
            }
            let page = (RAM + 0x2000) >> 12;
            if absent {
                cpu.absent = vec![page];
            } else {
                cpu.read_only = vec![page];
            }
            let before = cpu.clone();
            match emulator.emulate(&mut cpu, bytes) {
                Outcome::Exception(Exception { vector: 14, error_code: Some(code), cr2: Some(cr2) }) => {
                    assert!(absent || form.writes, "{bytes:02x?}");
                    assert_eq!(code & 2 != 0, form.writes, "{bytes:02x?}");
                    assert!(cr2 >> 12 == page, "{bytes:02x?}: {cr2:x}");
                    cpu.rflags &= !(1 << 16);
                    cpu.assert_same_state(&before);
                }
                Outcome::Done { .. } => assert!(!absent && !form.writes, "{bytes:02x?}"),
                outcome => panic!("{bytes:02x?}: {outcome:?}"),
            }
        }
    }
}

#[test]
fn a_read_that_will_be_written_faults_as_a_write() {
    assert!(AccessKind::ReadModify.is_write() && AccessKind::Write.is_write());
    assert!(!AccessKind::Read.is_write() && !AccessKind::System.is_write());
    let mut cpu = FakeCpu::long();
    cpu.cpl = 3;
    cpu.read_only = vec![RAM >> 12];
    let outcome = cpu.run(&[0x83, 0x0b, 1]); // or [rbx], 1
    assert_eq!(outcome, Outcome::Exception(Exception::page_fault(7, RAM)));
    assert!(cpu.log.is_empty(), "not even read");
}
