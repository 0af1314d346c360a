//! Call gates, returns, interrupts and their returns, in all modes. Intel SDM vol. 2 (CALL, INT n, IRET, RET) and vol. 3,
//! 5.8, 6.12 to 6.14, 21.
use super::fake::{FakeCpu, RAM};
use super::world::*;
use crate::hw::{Event, TableRegister};
use crate::vm::emulate::{Attributes, Emulator, Exception, Gpr, Mode, Outcome, Seg};
use crate::vm::exceptions::combine;

const IF: u64 = 0x200;
const NT: u64 = 1 << 14;

fn deliver(cpu: &mut FakeCpu, event: Event) -> Outcome {
    Emulator::new().unwrap().deliver(cpu, event)
}

/// Values of `size` bytes on the stack from its top.
fn stack<const N: usize>(cpu: &FakeCpu, size: u8) -> [u64; N] {
    let base = cpu.segments[Seg::Ss as usize].base;
    core::array::from_fn(|index| {
        cpu.peek(base + (cpu[Gpr::Rsp] & 0xffff_ffff) + index as u64 * u64::from(size), size)
    })
}

/// A real- or virtual-8086-mode CPU whose segments and IVT lie in the fake RAM.
fn old_mode(mode: Mode) -> FakeCpu {
    let mut cpu = FakeCpu::new(mode);
    cpu.base = 0;
    cpu.ram = vec![0; 0x2_0000];
    cpu.idtr = TableRegister { base: 0, limit: 0x3ff };
    for segment in &mut cpu.segments[..6] {
        (segment.selector, segment.base) = (0x1000, 0x1_0000);
        segment.attributes = Attributes(if mode == Mode::Vm86 { 0xf3 } else { 0x93 });
    }
    cpu[Gpr::Rsp] = 0x8000;
    cpu
}

#[test]
fn real_mode_interrupts_and_returns() {
    let mut cpu = old_mode(Mode::Real);
    cpu.poke(4 * 0x21, 4, 0x0800_1234);
    cpu.rflags = 0x4_0302;
    assert_eq!(cpu.run(&[0xcd, 0x21]), DONE, "no trap: INT clears TF");
    assert_eq!((cpu.rip, cpu.rflags), (0x1234, 2));
    let cs = cpu.segments[Seg::Cs as usize];
    assert_eq!((cs.selector, cs.base, cs.limit), (0x800, 0x8000, 0xffff));
    assert_eq!(stack(&cpu, 2), [0x4002, 0x1000, 0x302]);
    assert_eq!(cpu.run(&[0xcf]), DONE);
    assert_eq!((cpu.rip, cpu.rflags, cpu[Gpr::Rsp]), (0x4002, 0x302, 0x8000));
    assert_eq!(cpu.segments[Seg::Cs as usize].base, 0x1_0000);

    // INTO only with OF.
    cpu.rflags = 2;
    cpu.rip = 0x4000;
    cpu.done(&[0xce]);
    cpu.rflags = 0x802;
    cpu.poke(4 * 4, 4, 0x0800_0001);
    assert_eq!(cpu.run(&[0xce]), DONE);
    assert_eq!(cpu.rip, 1);
}

#[test]
fn real_mode_delivery() {
    for event in [Event::Interrupt(0x40), Event::Nmi, Event::Exception(13, Some(5))] {
        let mut cpu = old_mode(Mode::Real);
        for vector in [2, 13, 0x40] {
            cpu.poke(4 * vector, 4, 0x0900_0000 + vector);
        }
        assert_eq!(deliver(&mut cpu, event), DONE);
        assert!(!cpu.shadow && cpu.rflags == 2);
        assert!(matches!(cpu.rip, 2 | 13 | 0x40));
        assert_eq!(stack(&cpu, 2), [0x4000, 0x1000, 2], "no error code");
    }
    // Beyond the table's limit: a #GP while the interrupt waits; then a #DF; then the end.
    let mut cpu = old_mode(Mode::Real);
    cpu.idtr.limit = 0x1f;
    let fault = Outcome::Exception(Exception { vector: 13, error_code: None, cr2: None });
    let first = Event::Interrupt(0x40);
    assert_eq!(deliver(&mut cpu, first), fault);
    let (second, kept) = combine(first, (13, None)).unwrap();
    assert_eq!(kept, Some(first));
    assert_eq!(deliver(&mut cpu, second), fault);
    let (third, _) = combine(second, (13, None)).unwrap();
    assert_eq!(third, Event::Exception(8, Some(0)));
    assert_eq!(deliver(&mut cpu, third), fault);
    assert_eq!(combine(third, (13, None)), None, "shutdown");
    // A stack that has no room for all: nothing is pushed.
    let mut cpu = old_mode(Mode::Real);
    cpu.segments[Seg::Ss as usize].limit = 0x7ffb;
    let before = cpu.clone();
    let fault = Outcome::Exception(Exception { vector: 12, error_code: None, cr2: None });
    assert_eq!(deliver(&mut cpu, Event::Nmi), fault);
    cpu.assert_same_state(&before);
}

#[test]
fn real_mode_far_transfers() {
    let mut cpu = old_mode(Mode::Real);
    assert_eq!(cpu.run(&[0xea, 0x34, 0x12, 0x00, 0x20]), DONE);
    assert_eq!((cpu.rip, cpu.segments[1].selector, cpu.segments[1].base), (0x1234, 0x2000, 0x2_0000));
    assert_eq!(cpu.run(&[0x9a, 0x78, 0x56, 0x00, 0x10]), DONE);
    assert_eq!(stack(&cpu, 2), [0x1239, 0x2000]);
    assert_eq!(cpu.run(&[0xca, 6, 0]), DONE);
    assert_eq!((cpu.rip, cpu.segments[1].selector, cpu[Gpr::Rsp]), (0x1239, 0x2000, 0x8006));
    // Through memory, with a 32-bit offset beyond the limit.
    cpu[Gpr::Rbx] = 0x10;
    cpu.poke(0x1_0010, 8, 0x3000_0001_0000);
    let fault = Outcome::Exception(Exception { vector: 13, error_code: None, cr2: None });
    assert_eq!(cpu.run(&[0x66, 0xff, 0x2f]), fault);
    assert_eq!(cpu.run(&[0xff, 0x2f]), DONE, "16 bits: 1:0");
    assert_eq!((cpu.rip, cpu.segments[1].selector), (0, 1));
    // Limits that protected mode left stay.
    cpu.segments[Seg::Ds as usize].limit = 0xffff_ffff;
    cpu[Gpr::Rax] = 0x1234;
    assert_eq!(cpu.run(&[0x8e, 0xd8]), DONE);
    assert_eq!((cpu.segments[3].limit, cpu.segments[3].base), (0xffff_ffff, 0x1_2340));
    cpu.segments[Seg::Es as usize].attributes = Attributes(0);
    assert_eq!(cpu.run(&[0x8e, 0xc0]), DONE);
    assert_eq!((cpu.segments[0].limit, cpu.segments[0].attributes), (0xffff, Attributes(0x93)));
}

#[test]
fn call_gates_inward_and_back() {
    for (kind, size) in [(0xec_u8, 4_u8), (0xe4, 2)] {
        let mut cpu = world(Mode::Protected32, 3);
        put(&mut cpu, SLOT, gate(kind, CODE0, 0x1234, 3));
        for index in 0..3 {
            cpu.poke(STACK + index * u64::from(size), size, 0x70 + index);
        }
        let next = cpu.rip + 7;
        assert_eq!(cpu.run(&[0x9a, 0xff, 0xff, 0xff, 0xff, SLOT as u8, 0]), DONE);
        assert_eq!((cpu.rip, cpu.cpl, cpu.segments[1].selector), (0x1234, 0, CODE0));
        assert_eq!((cpu.segments[2].selector, cpu[Gpr::Rsp]), (DATA0, INNER - 7 * u64::from(size)));
        let mask = u64::MAX >> (64 - 8 * u32::from(size));
        let expected = [next & mask, (CODE3 | 3).into(), 0x70, 0x71, 0x72, STACK & mask, (DATA3 | 3).into()];
        assert_eq!(stack(&cpu, size), expected);
        // Back, releasing the parameters on both stacks; DS is of level 3 and stays, ES of level 0 goes.
        if size == 4 {
            cpu.segments[Seg::Es as usize].attributes = Attributes(0xc93);
            assert_eq!(cpu.run(&[0xca, 12, 0]), DONE);
            assert_eq!((cpu.rip, cpu.cpl, cpu[Gpr::Rsp]), (next, 3, STACK + 12));
            assert!(cpu.segments[Seg::Ds as usize].attributes.present());
            assert!(!cpu.segments[Seg::Es as usize].attributes.present());
        }
        // JMP may not go inward.
        let mut cpu = world(Mode::Protected32, 3);
        put(&mut cpu, SLOT, gate(kind, CODE0, 0x1234, 0));
        assert_eq!(cpu.run(&[0xea, 0, 0, 0, 0, SLOT as u8, 0]), exception(13, CODE0.into()));
    }
}

#[test]
fn call_gates_that_fault() {
    let call = [0x9a, 0, 0, 0, 0, SLOT as u8, 0];
    let cases: &[(u64, Outcome)] = &[
        (gate(0xac, CODE0, 0, 0), exception(13, SLOT.into())), // DPL 1
        (gate(0x6c, CODE0, 0, 0), exception(11, SLOT.into())),
        (gate(0xec, 0, 0, 0), exception(13, 0)),
        (gate(0xec, DATA0, 0, 0), exception(13, DATA0.into())),
        (gate(0xec, 0x80, 0, 0), exception(13, 0x80)),
        (gate(0xee, CODE0, 0, 0), exception(13, SLOT.into())), // an interrupt gate
    ];
    for (descriptor, expected) in cases {
        let mut cpu = world(Mode::Protected32, 3);
        put(&mut cpu, SLOT, *descriptor);
        assert_eq!(cpu.run(&call), *expected, "{descriptor:x}");
    }
    // What is wrong with the inner stack is #TS, or #SS where it is absent or too small.
    let inner = |selector: u16, descriptor: u64, expected: Outcome| {
        let mut cpu = world(Mode::Protected32, 3);
        put(&mut cpu, SLOT, gate(0xec, CODE0, 0, 0));
        put(&mut cpu, SLOT2, descriptor);
        cpu.poke(TSS + 8, 2, selector.into());
        let before = cpu.clone();
        assert_eq!(cpu.run(&call), expected, "{selector:x} {descriptor:x}");
        cpu.rflags &= !(1 << 16);
        cpu.assert_same_state(&before);
    };
    inner(0, 0, exception(10, 0));
    inner(SLOT2 | 1, flat(0x93, 0xc), exception(10, SLOT2.into()));
    inner(SLOT2, flat(0xb3, 0xc), exception(10, SLOT2.into()));
    inner(SLOT2, flat(0x91, 0xc), exception(10, SLOT2.into()));
    inner(0x80, 0, exception(10, 0x80));
    inner(SLOT2, flat(0x13, 0xc), exception(12, SLOT2.into()));
    inner(SLOT2, system(0x93, 0, 0x1000) | 4 << 52, exception(12, SLOT2.into()));
    let mut cpu = world(Mode::Protected32, 3);
    put(&mut cpu, SLOT, gate(0xec, CODE0, 0, 0));
    cpu.segments[Seg::Tr as usize].limit = 8;
    assert_eq!(cpu.run(&call), exception(10, TASK.into()));
}

#[test]
fn long_mode_call_gates() {
    let call = [0xff, 0x1b]; // call far [rbx]
    let prepared = |cpl: u8, access: u8, selector: u16| {
        let mut cpu = world(Mode::Long64, cpl);
        put(&mut cpu, SLOT, gate(access, selector, 0x8765_4321, 0));
        put(&mut cpu, SLOT + 8, 0x0000_7654);
        cpu[Gpr::Rbx] = RAM + 0x1000;
        cpu.poke(RAM + 0x1004, 2, (SLOT | 3).into());
        cpu
    };
    let mut cpu = prepared(3, 0xec, LONG0);
    let next = cpu.rip + 2;
    assert_eq!(cpu.run(&call), DONE);
    assert_eq!((cpu.rip, cpu.cpl, cpu[Gpr::Rsp]), (0x7654_8765_4321, 0, INNER - 32));
    assert!(!cpu.segments[2].attributes.present() && cpu.segments[2].selector == 0);
    assert_eq!(stack(&cpu, 8), [next, (LONG3 | 3).into(), STACK, (DATA3 | 3).into()]);
    assert_eq!(cpu.run(&[0x48, 0xcb]), DONE);
    assert_eq!((cpu.rip, cpu.cpl, cpu[Gpr::Rsp]), (next, 3, STACK));
    // Only to 64-bit code, only by 64-bit gates, whose upper half is zero where a type would be.
    assert_eq!(prepared(3, 0xec, CODE0).run(&call), exception(13, CODE0.into()));
    assert_eq!(prepared(3, 0xe4, LONG0).run(&call), exception(13, SLOT.into()));
    let mut cpu = prepared(3, 0xec, LONG0);
    cpu.poke(GDT + u64::from(SLOT) + 13, 1, 0x10);
    assert_eq!(cpu.run(&call), exception(13, SLOT.into()));
    // A target or stack that is not canonical.
    let mut cpu = prepared(3, 0xec, LONG0);
    cpu.poke(GDT + u64::from(SLOT) + 8, 4, 0x8000);
    assert_eq!(cpu.run(&call), exception(13, 0));
    let mut cpu = prepared(3, 0xec, LONG0);
    cpu.poke(TSS + 4, 8, 1 << 47 | 8);
    assert_eq!(cpu.run(&call), exception(12, 0));
}

#[test]
fn protected_mode_interrupts() {
    // Inward, with an error code, through a 32-bit trap gate of level 0: hardware does not ask for the level.
    let mut cpu = world(Mode::Protected32, 3);
    cpu.poke(IDT + 8 * 13, 8, gate(0x8f, CODE0, 0x5_4321, 0));
    cpu.rflags = IF | NT | 0x1_0102;
    let rip = cpu.rip;
    assert_eq!(deliver(&mut cpu, Event::Exception(13, Some(0x50))), DONE);
    assert_eq!((cpu.rip, cpu.cpl, cpu.rflags), (0x5_4321, 0, IF | 2));
    let pushed = [0x50, rip, (CODE3 | 3).into(), IF | NT | 0x1_0102, STACK, (DATA3 | 3).into()];
    assert_eq!(stack(&cpu, 4), pushed);
    // And back, without the error code.
    cpu[Gpr::Rsp] += 4;
    assert_eq!(cpu.run(&[0xcf]), DONE);
    assert_eq!((cpu.rip, cpu.cpl, cpu[Gpr::Rsp]), (rip, 3, STACK));
    assert_eq!(cpu.rflags, IF | NT | 0x1_0102, "RF, too");

    // The same level, through a 16-bit interrupt gate.
    let mut cpu = world(Mode::Protected32, 0);
    cpu.poke(IDT + 8 * 0x33, 8, gate(0x86, CODE0, 0xffff_1234, 0));
    cpu.rflags = IF | 2;
    let rip = cpu.rip;
    assert_eq!(deliver(&mut cpu, Event::Interrupt(0x33)), DONE);
    assert_eq!((cpu.rip, cpu.rflags, cpu[Gpr::Rsp]), (0x1234, 2, STACK - 6));
    assert_eq!(stack(&cpu, 2), [rip & 0xffff, CODE0.into(), IF | 2]);
}

#[test]
fn error_codes_of_a_delivery_have_ext() {
    let code = 0x20 * 8 + 2;
    let run = |gate: u64, software: bool| {
        let mut cpu = world(Mode::Protected32, 0);
        cpu.poke(IDT + 8 * 0x20, 8, gate);
        if software {
            cpu.run(&[0xcd, 0x20])
        } else {
            deliver(&mut cpu, Event::Interrupt(0x20))
        }
    };
    for (external, software) in [(1, false), (0, true)] {
        assert_eq!(run(0, software), exception(13, code | external));
        assert_eq!(run(gate(0x0e, CODE0, 0, 0), software), exception(11, code | external));
        assert_eq!(run(gate(0x8e, 0, 0, 0), software), exception(13, external));
        assert_eq!(run(gate(0x8e, DATA0, 0, 0), software), exception(13, u32::from(DATA0) | external));
        assert_eq!(run(gate(0x85, SLOT, 0, 0), software), exception(13, u32::from(SLOT) | external));
    }
    let mut cpu = world(Mode::Protected32, 3);
    cpu.idtr.limit = 8 * 0x20 + 6;
    assert_eq!(cpu.run(&[0xcd, 0x20]), exception(13, code));
    // INT1 asks for no rights.
    let mut cpu = world(Mode::Protected32, 3);
    cpu.poke(IDT + 8, 8, gate(0x8e, CODE0, 0x10, 0));
    cpu.poke(IDT + 24, 8, gate(0x8e, CODE0, 0x10, 0));
    assert_eq!(cpu.clone().run(&[0xcc]), exception(13, 3 * 8 + 2));
    assert_eq!(cpu.run(&[0xf1]), DONE);
}

#[test]
fn long_mode_interrupts() {
    let prepared = |cpl: u8, access: u8, ist: u8| {
        let mut cpu = world(Mode::Long64, cpl);
        cpu.poke(IDT + 16 * 14, 8, gate(access, LONG0, 0x8000_1000, ist));
        cpu.poke(IDT + 16 * 14 + 8, 8, 0xffff_ffff);
        cpu.poke(TSS + 0x24, 8, INNER - 0x403);
        cpu[Gpr::Rsp] = STACK - 4;
        cpu
    };
    let fault = Event::Exception(14, Some(6));
    for (cpl, ist, top) in [(3, 0, INNER), (0, 0, STACK - 16), (0, 1, INNER - 0x410), (3, 1, INNER - 0x410)] {
        let mut cpu = prepared(cpl, 0x8e, ist);
        let (cs, ss, rip) = (cpu.segments[1].selector, cpu.segments[2].selector, cpu.rip);
        assert_eq!(deliver(&mut cpu, fault), DONE);
        assert_eq!((cpu.rip, cpu.cpl, cpu[Gpr::Rsp]), (0xffff_ffff_8000_1000, 0, top - 48));
        assert_eq!(stack(&cpu, 8), [6, rip, cs.into(), 2, STACK - 4, ss.into()]);
        assert_eq!(cpu.segments[2].attributes.present(), cpl == 0, "null on the way inward");
        cpu[Gpr::Rsp] += 8;
        assert_eq!(cpu.run(&[0x48, 0xcf]), DONE);
        assert_eq!((cpu.rip, cpu.cpl, cpu[Gpr::Rsp]), (rip, cpl, STACK - 4));
        assert_eq!((cpu.segments[1].selector, cpu.segments[2].selector), (cs, ss));
    }
    for access in [0x85, 0x86, 0x87, 0x8c] {
        assert_eq!(deliver(&mut prepared(0, access, 0), fault), exception(13, 14 * 8 + 3), "{access:x}");
    }
    // From compatibility mode.
    let mut cpu = prepared(3, 0x8e, 0);
    cpu.segments[1].attributes = Attributes(0xcfb);
    cpu.mode = Mode::Protected32;
    assert_eq!(deliver(&mut cpu, fault), DONE);
    assert_eq!((cpu.mode, cpu[Gpr::Rsp]), (Mode::Long64, INNER - 48));
}

#[test]
fn virtual_8086_mode_is_left_and_entered() {
    let mut cpu = world(Mode::Protected32, 0);
    for (index, value) in [0x100, 0x1000, 0x2_3202, 0x8000, 0x2000, 1, 2, 3, 4].into_iter().enumerate() {
        cpu.poke(STACK + 4 * index as u64, 4, value);
    }
    assert_eq!(cpu.run(&[0xcf]), DONE);
    assert_eq!((cpu.mode, cpu.cpl, cpu.rip, cpu.rflags), (Mode::Vm86, 3, 0x100, 0x2_3202));
    assert_eq!(cpu.segments.map(|s| s.selector)[..6], [1, 0x1000, 0x2000, 2, 3, 4]);
    assert_eq!((cpu.segments[2].base, cpu[Gpr::Rsp]), (0x2_0000, 0x8000));

    cpu.poke(IDT + 8 * 0x21, 8, gate(0xee, CODE0, 0x1234, 0));
    assert_eq!(cpu.run(&[0xcd, 0x21]), DONE);
    assert_eq!((cpu.mode, cpu.cpl, cpu.rip, cpu.rflags), (Mode::Protected32, 0, 0x1234, 0x3002));
    assert_eq!(stack(&cpu, 4), [0x102, 0x1000, 0x2_3202, 0x8000, 0x2000, 1, 2, 3, 4]);
    for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
        assert!(!cpu.segments[seg as usize].attributes.present());
    }
    // The handler must be of level 0 and not conforming.
    for selector in [CODE3, CONFORMING] {
        let mut cpu = old_vm86();
        cpu.poke(IDT + 8 * 0x21, 8, gate(0xee, selector, 0x1234, 0));
        assert_eq!(cpu.run(&[0xcd, 0x21]), exception(13, selector.into()));
    }
}

/// A virtual-8086-mode CPU, IOPL 3, with the tables of a world.
fn old_vm86() -> FakeCpu {
    let mut cpu = world(Mode::Vm86, 3);
    cpu.rflags = 0x2_3002;
    cpu
}

#[test]
fn virtual_8086_mode_is_sensitive_to_iopl() {
    let mut cpu = old_vm86();
    cpu.rflags = 0x2_0002;
    assert_eq!(cpu.clone().run(&[0xcd, 0x21]), exception(13, 0));
    assert_eq!(cpu.clone().run(&[0xcf]), exception(13, 0));
    cpu.poke(IDT + 8 * 3, 8, gate(0xee, CODE0, 0x1234, 0));
    assert_eq!(cpu.run(&[0xcc]), DONE, "INT3 is not");
    // IRET with IOPL 3 changes neither IOPL nor VM.
    let mut cpu = old_mode(Mode::Vm86);
    cpu.rflags = 0x2_3002;
    for (index, value) in [0x55, 0x1234, 0x0ed7].into_iter().enumerate() {
        cpu.poke(0x1_8000 + 2 * index as u64, 2, value);
    }
    assert_eq!(cpu.run(&[0xcf]), DONE);
    assert_eq!((cpu.rip, cpu.segments[1].base, cpu.rflags), (0x55, 0x1_2340, 0x2_3ed7));
}

#[test]
fn virtual_interrupts_of_virtual_8086_mode() {
    let mut cpu = old_mode(Mode::Vm86);
    cpu.cr4 = 1; // VME
    cpu.rflags = 0xa_0002; // VIF, IOPL 0
    (cpu.segments[6].base, cpu.segments[6].limit) = (0x1_9000, 0x100);
    cpu.poke(0x1_9066, 2, 0x88);
    cpu.poke(4 * 0x21, 4, 0x0800_1234);
    let mut redirected = cpu.clone();
    assert_eq!(redirected.run(&[0xcd, 0x21]), DONE);
    assert_eq!((redirected.rip, redirected.rflags), (0x1234, 0x2_0002));
    assert_eq!(stack(&redirected, 2), [0x4002, 0x1000, 0x3202], "IF shows VIF, IOPL shows 3");
    assert_eq!(redirected.run(&[0xcf]), DONE);
    assert_eq!((redirected.rip, redirected.rflags), (0x4002, 0xa_0002));
    // With the bit set it is the monitor's.
    cpu.poke(0x1_9000 + 0x68 + 4, 1, 2);
    assert_eq!(cpu.run(&[0xcd, 0x21]), exception(13, 0));
    // IRET may set neither TF, nor IF while VIP.
    redirected[Gpr::Rsp] = 0x8000;
    redirected.poke(0x1_8004, 2, 0x102);
    assert_eq!(redirected.clone().run(&[0xcf]), exception(13, 0));
    redirected.poke(0x1_8004, 2, 0x202);
    redirected.rflags |= 1 << 20;
    assert_eq!(redirected.run(&[0xcf]), exception(13, 0));
}

#[test]
fn flags_that_iret_may_change() {
    let all = 0x3d_7fd7_u64; // without VM
    for (cpl, iopl, size, changed) in [
        (0, 0, 4, 0x3d_7fd5),
        (3, 0, 4, 0x25_4dd5_u64),
        (3, 3, 4, 0x25_4fd5),
        (3, 0, 2, 0x4dd5),
        (0, 0, 2, 0x7fd5),
    ] {
        let mut cpu = world(Mode::Protected32, cpl);
        cpu.rflags = 2 | iopl << 12;
        let selector = cpu.segments[1].selector;
        for (index, value) in [0x1000, selector.into(), all].into_iter().enumerate() {
            cpu.poke(STACK + u64::from(size) * index as u64, size, value & (u64::MAX >> (64 - 8 * size)));
        }
        let bytes: &[u8] = if size == 2 { &[0x66, 0xcf] } else { &[0xcf] };
        assert_eq!(cpu.run(bytes), DONE);
        let expected = (2 | iopl << 12) & !changed | all & changed;
        assert_eq!(cpu.rflags, expected, "{cpl} {iopl} {size}");
    }
}

#[test]
fn a_far_transfer_traps_as_tf_was() {
    let mut cpu = world(Mode::Protected32, 0);
    cpu.rflags = 0x102;
    let jump = [0xea, 0, 0, 0, 0, CODE0 as u8, 0];
    assert_eq!(cpu.run(&jump), Outcome::Done { trap: true });
    assert!(!cpu.shadow);
}

#[test]
fn pushes_across_an_absent_page_have_no_effect() {
    for bytes in [&[0xcd, 0x21][..], &[0x9a, 0, 0, 0, 0, CODE0 as u8, 0]] {
        let mut cpu = world(Mode::Protected32, 0);
        cpu.poke(IDT + 8 * 0x21, 8, gate(0x8e, CODE0, 0, 0));
        cpu[Gpr::Rsp] = STACK + 4;
        cpu.absent = vec![(STACK >> 12) - 1];
        let before = cpu.clone();
        let outcome = cpu.run(bytes);
        assert!(matches!(outcome, Outcome::Exception(Exception { vector: 14, .. })), "{outcome:?}");
        cpu.rflags &= !(1 << 16);
        cpu.assert_same_state(&before);
    }
}
