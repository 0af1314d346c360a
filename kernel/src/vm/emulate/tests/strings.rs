//! String instructions: restart, bounds, faults between iterations, ports.
use super::fake::{Event, FakeCpu, DEVICE, RAM, RIP};
use crate::vm::emulate::{Exception, Fault, Gpr, Mode, Outcome, Seg};

const REP: u8 = 0xf3;
const DF: u64 = 0x400;
const RF: u64 = 0x1_0000;

fn copying(count: u64) -> FakeCpu {
    let mut cpu = FakeCpu::long();
    for at in 0..0x1000 {
        cpu.ram[at] = at as u8;
    }
    (cpu[Gpr::Rsi], cpu[Gpr::Rdi], cpu[Gpr::Rcx]) = (RAM, RAM + 0x2000, count);
    cpu
}

#[test]
fn a_long_copy_takes_several_calls() {
    let mut cpu = copying(0x1000);
    let mut calls = 0;
    loop {
        calls += 1;
        match cpu.run(&[REP, 0xa4]) {
            Outcome::Continue { trap: false } => {
                let copied = calls * 512;
                assert_eq!((cpu.rip, cpu[Gpr::Rcx]), (RIP, 0x1000 - copied));
                assert_eq!((cpu[Gpr::Rsi], cpu[Gpr::Rdi]), (RAM + copied, RAM + 0x2000 + copied));
                assert_eq!(cpu.rflags & RF, RF, "an instruction breakpoint does not hit again");
            }
            outcome => {
                assert_eq!(outcome, Outcome::Done { trap: false });
                break;
            }
        }
    }
    assert_eq!((calls, cpu.rip, cpu[Gpr::Rcx], cpu.rflags & RF), (8, RIP + 2, 0, 0));
    assert!(cpu.ram[..0x1000] == cpu.ram[0x2000..0x3000]);
}

#[test]
fn a_waiting_interrupt_pauses_after_one_iteration() {
    let mut cpu = copying(10);
    cpu.interrupt = true;
    assert_eq!(cpu.run(&[REP, 0xa5]), Outcome::Continue { trap: false });
    assert_eq!((cpu[Gpr::Rcx], cpu[Gpr::Rsi], cpu.rip), (9, RAM + 4, RIP));
    assert!(!cpu.shadow);
    cpu[Gpr::Rcx] = 1;
    assert_eq!(cpu.run(&[REP, 0xa5]), Outcome::Done { trap: false });
}

#[test]
fn single_steps_trap_after_each_iteration() {
    let mut cpu = copying(2);
    cpu.rflags |= 0x100;
    assert_eq!(cpu.run(&[REP, 0xa4]), Outcome::Continue { trap: true });
    assert_eq!((cpu.rip, cpu[Gpr::Rcx]), (RIP, 1));
    assert_eq!(cpu.run(&[REP, 0xa4]), Outcome::Done { trap: true });
    assert_eq!(cpu.rip, RIP + 2);
}

#[test]
fn a_fault_keeps_the_iterations_before_it() {
    let mut cpu = copying(0x200);
    cpu[Gpr::Rdi] = RAM + 0x2ff0;
    cpu.read_only = vec![(RAM + 0x3000) >> 12];
    let outcome = cpu.run(&[REP, 0x48, 0xa5]);
    assert_eq!(outcome, Outcome::Exception(Exception::page_fault(3, RAM + 0x3000)));
    assert_eq!((cpu[Gpr::Rcx], cpu[Gpr::Rsi], cpu[Gpr::Rdi]), (0x1fe, RAM + 0x10, RAM + 0x3000));
    assert_eq!(cpu.rip, RIP);
    assert!(cpu.ram[0x2ff0..0x3000] == cpu.ram[..0x10]);
    // The handler maps the page, the instruction goes on.
    cpu.read_only.clear();
    cpu[Gpr::Rcx] = 2;
    assert_eq!(cpu.run(&[REP, 0x48, 0xa5]), Outcome::Done { trap: false });
    assert!(cpu.ram[0x3000..0x3010] == cpu.ram[0x10..0x20]);
}

#[test]
fn directions_and_widths() {
    let mut cpu = copying(4);
    (cpu[Gpr::Rsi], cpu[Gpr::Rdi]) = (RAM + 3, RAM + 5);
    cpu.rflags |= DF;
    cpu.done(&[REP, 0xa4]); // overlapping, downwards
    assert_eq!(cpu.ram[..8], [0, 1, 0, 1, 2, 3, 6, 7]);
    assert_eq!((cpu[Gpr::Rsi], cpu[Gpr::Rdi]), (RAM - 1, RAM + 1));

    // 16-bit addresses: SI and DI wrap, the upper halves stay.
    let mut cpu = FakeCpu::new(Mode::Real);
    cpu.base = 0;
    cpu.ram = vec![0x5a; 0x1_0000];
    cpu.gprs[0] = 0x1234;
    (cpu[Gpr::Rdi], cpu[Gpr::Rcx]) = (0xaaaa_fffe, 0xbbbb_0002);
    cpu.done(&[REP, 0xab]); // rep stosw
    assert_eq!((cpu[Gpr::Rdi], cpu[Gpr::Rcx]), (0xaaaa_0002, 0xbbbb_0000));
    assert_eq!((cpu.peek(0xfffe, 2), cpu.peek(0, 2)), (0x1234, 0x1234));

    // A count of zero touches nothing.
    let mut cpu = copying(0);
    cpu.rflags |= 0x8d5;
    let before = cpu.clone();
    cpu.done(&[REP, 0xa6]);
    assert_eq!((cpu.gprs, cpu.rflags), (before.gprs, before.rflags));
    assert!(cpu.log.is_empty());
}

#[test]
fn only_the_first_iteration_may_use_the_exit_s_address() {
    let mut cpu = FakeCpu::long();
    (cpu[Gpr::Rdi], cpu[Gpr::Rcx]) = (DEVICE, 3);
    cpu.done(&[REP, 0xab]);
    let sole: Vec<_> =
        cpu.log.iter().map(|event| matches!(event, Event::Write { access, .. } if access.sole)).collect();
    assert_eq!(sole, [true, false, false]);
    let mut cpu = copying(1);
    cpu.done(&[0xa4]);
    assert!(cpu
        .log
        .iter()
        .all(|e| !matches!(e, Event::Read { access, .. } | Event::Write { access, .. } if access.sole)));
}

#[test]
fn scans_and_comparisons_end_by_condition() {
    let mut cpu = copying(100);
    cpu[Gpr::Rdi] = RAM;
    cpu.gprs[0] = 7;
    cpu.done(&[0xf2, 0xae]); // repne scasb
    assert_eq!((cpu[Gpr::Rcx], cpu[Gpr::Rdi]), (92, RAM + 8));
    assert_eq!(cpu.rflags & 0x40, 0x40);
    let mut cpu = copying(100);
    cpu.ram[0x2000..0x2010].copy_from_slice(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xff, 0, 0, 0, 0, 0]);
    cpu.done(&[REP, 0xa6]); // repe cmpsb
    assert_eq!((cpu[Gpr::Rcx], cpu[Gpr::Rsi]), (89, RAM + 11));
    assert_eq!(cpu.rflags & 0x41, 1); // 10 - 255 borrows
}

#[test]
fn string_sources_take_an_override_and_destinations_do_not() {
    let mut cpu = FakeCpu::new(Mode::Protected32);
    cpu.segments[Seg::Fs as usize].base = RAM;
    cpu.segments[Seg::Es as usize].base = RAM + 0x100;
    cpu.poke(RAM + 4, 4, 0x1122_3344);
    cpu[Gpr::Rsi] = 4;
    cpu.done(&[0x64, 0xa5]); // movsd es:[edi], fs:[esi]
    assert_eq!(cpu.peek(RAM + 0x100, 4), 0x1122_3344);
    cpu[Gpr::Rdi] = 0x10;
    cpu.gprs[0] = 5;
    cpu.done(&[0x64, 0xaa]); // stosb ignores it
    assert_eq!(cpu.peek(RAM + 0x110, 1), 5);
}

#[test]
fn ports_in_every_form() {
    let mut cpu = FakeCpu::long();
    cpu.gprs[0] = 0xffff_ffff_ffff_ffff;
    cpu[Gpr::Rdx] = 0x1_03f8;
    cpu.done(&[0xec]); // in al, dx
    assert_eq!(cpu[Gpr::Rax], 0xffff_ffff_ffff_ffd4);
    cpu.done(&[0x66, 0xe5, 0x70]); // in ax, 0x70
    assert_eq!(cpu[Gpr::Rax], 0xffff_ffff_ffff_c3d4);
    cpu.done(&[0xed]); // in eax, dx
    assert_eq!(cpu[Gpr::Rax], 0xa1b2_c3d4);
    cpu.done(&[0xe6, 0x80]); // out 0x80, al
    cpu.done(&[0xef]); // out dx, eax
    assert_eq!(
        cpu.log,
        [
            Event::In { port: 0x3f8, size: 1 },
            Event::In { port: 0x70, size: 2 },
            Event::In { port: 0x3f8, size: 4 },
            Event::Out { port: 0x80, size: 1, value: 0xd4 },
            Event::Out { port: 0x3f8, size: 4, value: 0xa1b2_c3d4 },
        ]
    );

    let mut cpu = copying(3);
    cpu[Gpr::Rdx] = 0x510;
    cpu.done(&[REP, 0x6e]); // rep outsb
    assert_eq!(cpu[Gpr::Rsi], RAM + 3);
    let out: Vec<_> = cpu.log.iter().filter(|e| matches!(e, Event::Out { .. })).copied().collect();
    assert_eq!(out, [0, 1, 2].map(|value| Event::Out { port: 0x510, size: 1, value }));
    cpu[Gpr::Rcx] = 2;
    cpu.done(&[REP, 0x6d]); // rep insd
    assert_eq!((cpu.peek(RAM + 0x2000, 8), cpu[Gpr::Rdi]), (0xa1b2_c3d4_a1b2_c3d4, RAM + 0x2008));
}

#[test]
fn a_port_is_not_read_when_its_value_cannot_be_stored() {
    let mut cpu = FakeCpu::long();
    (cpu[Gpr::Rdx], cpu[Gpr::Rdi], cpu[Gpr::Rcx]) = (0x60, RAM + 0xffe, 4);
    cpu.absent = vec![(RAM + 0x1000) >> 12];
    let outcome = cpu.run(&[REP, 0x6c]);
    assert_eq!(outcome, Outcome::Exception(Exception::page_fault(2, RAM + 0x1000)));
    assert_eq!(cpu.log.iter().filter(|e| matches!(e, Event::In { .. })).count(), 2);
    assert_eq!((cpu[Gpr::Rcx], cpu[Gpr::Rdi]), (2, RAM + 0x1000));
}

#[test]
fn a_port_that_stops_or_retries_leaves_the_iteration_undone() {
    for (fault, outcome) in [(Fault::Stop, Outcome::Stop), (Fault::Retry, Outcome::Retry)] {
        let mut cpu = copying(5);
        cpu.port_fault = Some((2, fault));
        assert_eq!(cpu.run(&[REP, 0x6e]), outcome);
        assert_eq!((cpu[Gpr::Rcx], cpu[Gpr::Rsi], cpu.rip), (3, RAM + 2, RIP));
    }
}

#[test]
fn port_permissions() {
    // TSS at RAM + 0x3000: map at offset 0x68, limit covers ports 0 to 0x3f and the byte of ones behind them.
    let task = |cpu: &mut FakeCpu| {
        cpu.cpl = 3;
        cpu.segments[Seg::Tr as usize].limit = 0x68 + 8;
        cpu.poke(RAM + 0x3066, 2, 0x68);
        cpu.poke(RAM + 0x3068, 8, !(0b1111 << 14));
        cpu.poke(RAM + 0x3070, 1, 0xff);
    };
    for mode in [Mode::Long64, Mode::Protected32, Mode::Vm86] {
        for (port, opcode, allowed) in [
            (14, 0xec, true),
            (13, 0xec, false),
            (17, 0xec, true),
            (18, 0xec, false),
            (14, 0xed, true),
            (15, 0xed, false), // four ports, the last is not allowed
            (0x3f, 0xec, false),
            (0x48, 0xec, false), // beyond the limit
            (0xffff, 0xec, false),
        ] {
            let mut cpu = FakeCpu::new(mode);
            task(&mut cpu);
            cpu[Gpr::Rdx] = port;
            let mut bytes = vec![opcode];
            if opcode == 0xed && mode == Mode::Vm86 {
                bytes.insert(0, 0x66);
            }
            if allowed {
                cpu.done(&bytes);
            } else {
                cpu.faults(&bytes, 13);
                assert!(!cpu.log.iter().any(|e| matches!(e, Event::In { .. })));
            }
            // IOPL 3 allows all, except in virtual-8086 mode.
            let mut cpu = FakeCpu::new(mode);
            task(&mut cpu);
            cpu[Gpr::Rdx] = port;
            cpu.rflags |= 0x3000;
            assert_eq!(cpu.run(&bytes) == Outcome::Done { trap: false }, allowed || mode != Mode::Vm86);
        }
    }
    // An unusable or short TSS allows nothing; real mode and CPL 0 need none.
    let mut cpu = FakeCpu::new(Mode::Long64);
    cpu.cpl = 3;
    cpu.segments[Seg::Tr as usize].limit = 0x66;
    cpu.faults(&[0x6c], 13);
    let mut cpu = FakeCpu::new(Mode::Real);
    cpu.segments[Seg::Tr as usize].limit = 0;
    cpu.done(&[0xec]);
}
