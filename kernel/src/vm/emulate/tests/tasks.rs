//! Hardware task switches. Intel SDM vol. 3, chapter 7.
use super::fake::{FakeCpu, RAM};
use super::world::*;
use crate::hw::{Event, TaskSwitchCause};
use crate::vm::emulate::{Emulator, Exception, Gpr, Mode, Outcome, Seg, TaskSwitch};

/// The new TSS.
const NEW: u64 = RAM + 0x1000;
const NT: u64 = 1 << 14;
const BUSY_AT: u64 = GDT + SLOT as u64 + 5;
const OLD_BUSY_AT: u64 = GDT + TASK as u64 + 5;

/// A CPU at `cpl` and in SLOT an available 32-bit task at level 3.
fn tasks(cpl: u8) -> FakeCpu {
    let mut cpu = world(Mode::Protected32, cpl);
    put(&mut cpu, SLOT, system(0x89, NEW, 0x67));
    for (index, value) in (0..8).map(|index| (index, 0x1111_0000 + index)) {
        cpu.poke(NEW + 0x28 + 4 * index, 4, value);
    }
    cpu.poke(NEW + 0x38, 4, RAM + 0x1800); // ESP
    cpu.poke(NEW + 0x20, 4, 0x1234); // EIP
    cpu.poke(NEW + 0x24, 4, 0x202);
    for (offset, selector) in [(0x48, DATA3), (0x4c, CODE3), (0x50, DATA3), (0x54, DATA3)] {
        cpu.poke(NEW + offset, 2, (selector | 3).into());
    }
    cpu
}

fn switch(cpu: &mut FakeCpu, cause: TaskSwitchCause) -> Outcome {
    let next_rip = cpu.rip + 7;
    let switch = TaskSwitch { selector: SLOT, cause, next_rip, error_code: None, external: false };
    Emulator::new().unwrap().task_switch(cpu, switch)
}

#[test]
fn a_call_nests() {
    let mut cpu = tasks(0);
    cpu[Gpr::Rcx] = 0xc0;
    cpu.debug[7] = 0x5ff;
    let old = cpu.clone();
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Call), DONE);
    assert_eq!((cpu.rip, cpu.cpl, cpu.rflags), (0x1234, 3, 0x202 | NT));
    assert_eq!(cpu[Gpr::Rbx], 0x1111_0003);
    assert_eq!(cpu[Gpr::Rsp], RAM + 0x1800);
    assert_eq!(cpu.segments[Seg::Tr as usize].selector, SLOT);
    assert_eq!(cpu.segments[Seg::Tr as usize].attributes.0 & 0xf, 0xb);
    assert_eq!(cpu.segments[Seg::Cs as usize].selector, CODE3 | 3);
    assert!(!cpu.segments[Seg::Fs as usize].attributes.present());
    assert_eq!(cpu.peek(NEW, 2), TASK.into(), "back link");
    assert_eq!((cpu.peek(BUSY_AT, 1), cpu.peek(OLD_BUSY_AT, 1)), (0x8b, 0x8b), "both are busy");
    assert_eq!(cpu.cr0 & 8, 8, "TS");
    assert_eq!(cpu.debug[7], 0x4aa, "no local breakpoints");
    assert_eq!(cpu.peek(TSS + 0x20, 4), old.rip + 7);
    assert_eq!(cpu.peek(TSS + 0x24, 4), old.rflags);
    assert_eq!(cpu.peek(TSS + 0x2c, 4), 0xc0);
    assert_eq!(cpu.peek(TSS + 0x4c, 2), CODE0.into());

    // And back.
    cpu[Gpr::Rcx] = 1;
    assert_eq!(cpu.run(&[0xcf]), DONE);
    assert_eq!((cpu.rip, cpu.cpl, cpu.rflags), (old.rip + 7, 0, old.rflags));
    assert_eq!((cpu[Gpr::Rcx], cpu[Gpr::Rsp]), (0xc0, STACK));
    assert_eq!((cpu.peek(BUSY_AT, 1), cpu.peek(OLD_BUSY_AT, 1)), (0x89, 0x8b));
    assert_eq!(cpu.peek(NEW + 0x24, 4), 0x202, "NT is not saved");
    assert!(cpu.nmi_unblocked);
}

#[test]
fn a_jump_does_not_nest() {
    let mut cpu = tasks(0);
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Jump), DONE);
    assert_eq!(cpu.rflags, 0x202);
    assert_eq!(cpu.peek(NEW, 2), 0, "no back link");
    assert_eq!((cpu.peek(BUSY_AT, 1), cpu.peek(OLD_BUSY_AT, 1)), (0x8b, 0x89));
}

#[test]
fn instructions_lead_to_tasks() {
    let jump = [0xea, 0, 0, 0, 0, SLOT as u8, 0];
    let call = [0x9a, 0, 0, 0, 0, SLOT as u8, 0];
    for (bytes, flags) in [(jump, 0x202), (call, 0x202 | NT)] {
        let mut cpu = tasks(0);
        let next = cpu.rip + 7;
        assert_eq!(cpu.run(&bytes), DONE);
        assert_eq!((cpu.rip, cpu.rflags, cpu.peek(TSS + 0x20, 4)), (0x1234, flags, next));
        // The TSS is of level 0; a task gate of level 3 leads there nevertheless.
        let mut cpu = tasks(3);
        assert_eq!(cpu.run(&bytes), exception(13, SLOT.into()));
        put(&mut cpu, SLOT2, gate(0xe5, SLOT, 0, 0));
        let mut through_gate = bytes;
        through_gate[5] = SLOT2 as u8;
        assert_eq!(cpu.run(&through_gate), DONE);
        put(&mut cpu, SLOT3, gate(0x65, SLOT, 0, 0));
        through_gate[5] = SLOT3 as u8;
        assert_eq!(cpu.run(&through_gate), exception(11, SLOT3.into()));
    }
    let mut cpu = tasks(3);
    cpu.poke(IDT + 8 * 0x30, 8, gate(0xe5, SLOT, 0, 0));
    let next = cpu.rip + 2;
    assert_eq!(cpu.run(&[0xcd, 0x30]), DONE);
    assert_eq!((cpu.rip, cpu.rflags, cpu.peek(TSS + 0x20, 4)), (0x1234, 0x202 | NT, next));
}

#[test]
fn an_exception_s_error_code_goes_to_the_new_stack() {
    let mut cpu = tasks(3);
    let rip = cpu.rip;
    cpu.poke(IDT + 8 * 8, 8, gate(0x85, SLOT, 0, 0));
    let mut emulator = Emulator::new().unwrap();
    assert_eq!(emulator.deliver(&mut cpu, Event::Exception(8, Some(0x77))), DONE);
    assert_eq!(cpu[Gpr::Rsp], RAM + 0x17fc);
    assert_eq!((cpu.peek(RAM + 0x17fc, 4), cpu.peek(TSS + 0x20, 4)), (0x77, rip));
}

#[test]
fn faults_before_the_commit_point_belong_to_the_old_task() {
    let code = u32::from(SLOT);
    let cases: &[(TaskSwitchCause, u64, u8)] = &[
        (TaskSwitchCause::Call, system(0x8b, NEW, 0x67), 13), // busy
        (TaskSwitchCause::Gate, system(0x83, NEW, 0x67), 13), // busy
        (TaskSwitchCause::Iret, system(0x89, NEW, 0x67), 10), // not busy
        (TaskSwitchCause::Jump, system(0x82, NEW, 0x67), 13), // an LDT
        (TaskSwitchCause::Iret, flat(0x93, 0xc), 10),         // data
        (TaskSwitchCause::Call, system(0x09, NEW, 0x67), 11), // not present
        (TaskSwitchCause::Iret, system(0x0b, NEW, 0x67), 11),
        (TaskSwitchCause::Call, system(0x89, NEW, 0x66), 10), // too short
        (TaskSwitchCause::Jump, system(0x81, NEW, 0x2a), 10),
    ];
    for (cause, descriptor, vector) in cases {
        let mut cpu = tasks(0);
        put(&mut cpu, SLOT, *descriptor);
        let before = cpu.clone();
        assert_eq!(switch(&mut cpu, *cause), exception(*vector, code), "{cause:?} {descriptor:x}");
        cpu.rflags &= !(1 << 16);
        cpu.assert_same_state(&before);
    }
    for (selector, cause, expected) in [
        (SLOT | 4, TaskSwitchCause::Call, exception(13, u32::from(SLOT | 4))),
        (0x80, TaskSwitchCause::Jump, exception(13, 0x80)),
        (0x80, TaskSwitchCause::Iret, exception(10, 0x80)),
        (0, TaskSwitchCause::Iret, exception(10, 0)),
    ] {
        let mut cpu = tasks(0);
        let switch = TaskSwitch { selector, cause, next_rip: 0, error_code: None, external: false };
        assert_eq!(Emulator::new().unwrap().task_switch(&mut cpu, switch), expected);
    }
    // An old TSS that cannot be written.
    let mut cpu = tasks(0);
    cpu.read_only = vec![TSS >> 12];
    let before = cpu.clone();
    let outcome = switch(&mut cpu, TaskSwitchCause::Call);
    assert!(matches!(outcome, Outcome::Exception(Exception { vector: 14, error_code: Some(3), .. })));
    cpu.rflags &= !(1 << 16);
    cpu.assert_same_state(&before);
}

#[test]
fn faults_behind_it_belong_to_the_new_task() {
    let at = |offset: u64, value: u64| (NEW + offset, value);
    let cases: &[((u64, u64), u8, u32)] = &[
        (at(0x60, 0x84), 10, 0x84),                 // LDT selector in an LDT
        (at(0x60, DATA0.into()), 10, DATA0.into()), // data as LDT
        (at(0x4c, 0), 10, 0),                       // null CS
        (at(0x4c, (CODE0 | 3).into()), 10, CODE0.into()),
        (at(0x4c, (DATA3 | 3).into()), 10, DATA3.into()),
        (at(0x50, 0), 10, 0),                       // null SS
        (at(0x50, DATA3.into()), 10, DATA3.into()), // RPL
        (at(0x50, (DATA0 | 3).into()), 10, DATA0.into()),
        (at(0x54, (DATA0 | 3).into()), 10, DATA0.into()),
        (at(0x48, 0x83), 10, 0x80), // beyond the GDT
        (at(0x58, (SLOT2 | 3).into()), 11, SLOT2.into()),
    ];
    for ((address, value), vector, code) in cases {
        let mut cpu = tasks(0);
        put(&mut cpu, SLOT2, flat(0x73, 0xc));
        cpu.segments[Seg::Cs as usize].attributes.0 |= 1 << 11;
        cpu.poke(*address, 2, *value);
        assert_eq!(
            switch(&mut cpu, TaskSwitchCause::Call),
            exception(*vector, *code),
            "{address:x} {value:x}"
        );
        assert_eq!(cpu.rip, 0x1234);
        assert_eq!(cpu.segments[Seg::Tr as usize].selector, SLOT);
        assert_eq!(cpu.cpl, if *address == NEW + 0x4c && *value == 0 { 0 } else { 3 });
        let code = cpu.segments[Seg::Cs as usize];
        let granular = code.attributes.0 & 1 << 11 != 0;
        let fits = if granular { code.limit & 0xfff == 0xfff } else { code.limit >> 20 == 0 };
        assert!(fits, "a CS with which the processor can be entered: {code:x?}");
    }
    let mut cpu = tasks(0);
    put(&mut cpu, SLOT2, system(0xfb, 0, 0x1000));
    cpu.poke(GDT + u64::from(SLOT2) + 5, 1, 0xfb);
    cpu.poke(NEW + 0x4c, 2, (SLOT2 | 3).into());
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Call), exception(13, 0), "EIP beyond the limit");
}

#[test]
fn the_t_flag_traps_in_the_new_task() {
    let mut cpu = tasks(0);
    cpu.poke(NEW + 0x64, 2, 1);
    let trap = Outcome::Exception(Exception { vector: 1, error_code: None, cr2: None });
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Jump), trap);
    assert_eq!((cpu.rip, cpu.debug[6]), (0x1234, 0xffff_8ff0));
}

#[test]
fn cr3_and_ldtr() {
    let mut cpu = tasks(0);
    cpu.cr0 |= 1 << 31;
    put(&mut cpu, SLOT2, system(0x82, RAM + 0x400, 0xf));
    cpu.poke(NEW + 0x60, 2, SLOT2.into());
    cpu.poke(NEW + 0x1c, 4, 0x7000);
    cpu.poke(RAM + 0x408, 8, flat(0xf2, 0xc));
    cpu.poke(NEW + 0x54, 2, 0xf);
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Jump), DONE);
    assert_eq!((cpu.cr3, cpu.flushes), (0x7000, 1));
    assert_eq!((cpu.ldtr.base, cpu.segments[Seg::Ds as usize].selector), (RAM + 0x400, 0xf));
    assert_eq!(cpu.peek(RAM + 0x40d, 1), 0xf3, "accessed");

    let mut cpu = tasks(0);
    cpu.poke(NEW + 0x1c, 4, 0x7000);
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Jump), DONE);
    assert_eq!((cpu.cr3, cpu.flushes), (0, 0), "not without paging");

    let mut cpu = tasks(0);
    (cpu.cr0, cpu.cr4) = (cpu.cr0 | 1 << 31, 1 << 5);
    cpu.pdptes = [1 | 1 << 39, 0, 0, 0];
    let mut reserved = cpu.clone();
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Jump), DONE);
    assert_eq!(cpu.loaded_pdptes, Some(cpu.pdptes));
    reserved.pdptes[0] |= 2;
    assert_eq!(switch(&mut reserved, TaskSwitchCause::Jump), exception(10, SLOT.into()));
}

#[test]
fn virtual_8086_tasks() {
    let mut cpu = tasks(0);
    cpu.poke(NEW + 0x24, 4, 0x2_0202);
    cpu.poke(NEW + 0x4c, 2, 0x1000);
    cpu.poke(NEW + 0x50, 2, 0x2000);
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Jump), DONE);
    assert_eq!((cpu.mode, cpu.cpl, cpu.rip), (Mode::Vm86, 3, 0x1234));
    assert_eq!((cpu.segments[1].base, cpu.segments[2].base), (0x1_0000, 0x2_0000));
}

#[test]
fn sixteen_bit_tasks() {
    let mut cpu = tasks(0);
    put(&mut cpu, SLOT, system(0x81, NEW, 0x2b));
    for offset in (0..0x2c).step_by(2) {
        cpu.poke(NEW + offset, 2, 0x100 + offset);
    }
    for (offset, selector) in [(0x22, DATA3), (0x24, CODE3), (0x26, DATA3), (0x28, DATA3)] {
        cpu.poke(NEW + offset, 2, (selector | 3).into());
    }
    cpu.poke(NEW + 0x2a, 2, 0);
    cpu.poke(NEW + 0x10, 2, 0x202);
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Call), DONE);
    assert_eq!((cpu.rip, cpu.rflags), (0x10e, 0x202 | NT));
    assert_eq!((cpu[Gpr::Rax], cpu[Gpr::Rsp], cpu[Gpr::Rdi]), (0x112, 0x11a, 0x120));
    assert_eq!((cpu.peek(NEW, 2), cpu.peek(BUSY_AT, 1)), (TASK.into(), 0x83));
    cpu[Gpr::Rax] = 0x5_4321;
    // Its own registers go where it keeps them.
    assert_eq!(cpu.run(&[0xcf]), DONE);
    assert_eq!((cpu.peek(NEW + 0xe, 2), cpu.peek(NEW + 0x12, 2)), (0x10f, 0x4321));
    assert_eq!((cpu.peek(NEW + 0x24, 2), cpu.peek(NEW + 0x2a, 2)), ((CODE3 | 3).into(), 0));
}

#[test]
fn there_are_no_tasks_in_long_mode() {
    let mut cpu = world(Mode::Long64, 0);
    put(&mut cpu, SLOT, system(0x89, NEW, 0x67));
    assert_eq!(switch(&mut cpu, TaskSwitchCause::Call), exception(13, SLOT.into()));
    cpu.rflags |= NT;
    assert_eq!(cpu.run(&[0x48, 0xcf]), exception(13, 0));
}
