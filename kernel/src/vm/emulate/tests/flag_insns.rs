//! Instructions on RFLAGS, by mode, privilege level and IOPL.
use super::fake::{FakeCpu, RAM};
use crate::vm::emulate::flags::{AC, CF, DF, ID, IF, IOPL, NT, RF, STATUS, TF, VIF, VIP, VM, ZF};
use crate::vm::emulate::{Gpr, Mode, Outcome};

const PUSHF: &[u8] = &[0x9c];
const POPF: &[u8] = &[0x9d];
const CLI: &[u8] = &[0xfa];
const STI: &[u8] = &[0xfb];

/// A CPU at `cpl` with `iopl` and a stack.
fn cpu(mode: Mode, cpl: u8, iopl: u64) -> FakeCpu {
    let mut cpu = FakeCpu::new(mode);
    cpu.cpl = cpl;
    cpu.rflags |= iopl << 12;
    if mode.is_8086() {
        cpu.base = 0;
    }
    cpu[Gpr::Rsp] = cpu.base + 0x1000;
    cpu
}

/// RFLAGS after popping `image`, given what they were before.
fn popped(mut cpu: FakeCpu, bytes: &[u8], image: u64) -> u64 {
    let top = cpu[Gpr::Rsp];
    cpu.poke(top, 8, image);
    cpu.done(bytes);
    cpu.rflags
}

#[test]
fn popf_changes_what_the_privilege_level_allows() {
    let all = STATUS | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
    let always = STATUS | TF | DF | NT | AC | ID | 2;
    let low = 0xffff;
    // (mode, CPL, IOPL before, POPF of 16 bits): what an image of ones leaves.
    let cases = [
        (Mode::Real, 0, 0, always | IF | IOPL),
        (Mode::Protected32, 0, 0, always | IF | IOPL),
        (Mode::Protected32, 1, 0, always),
        (Mode::Protected32, 1, 1, always | IF | 1 << 12),
        (Mode::Protected32, 3, 2, always | 2 << 12),
        (Mode::Long64, 0, 0, always | IF | IOPL),
        (Mode::Long64, 3, 3, always | IF | IOPL),
        (Mode::Long64, 3, 0, always),
        (Mode::Vm86, 3, 3, always | IF | IOPL | VM),
    ];
    for (mode, cpl, iopl, expected) in cases {
        let wide: &[u8] = if mode.bitness() == 16 { &[0x66, 0x9d] } else { POPF };
        let narrow: &[u8] = if mode.bitness() == 16 { POPF } else { &[0x66, 0x9d] };
        assert_eq!(popped(cpu(mode, cpl, iopl), wide, all), expected, "{mode:?} {cpl} {iopl}");
        let kept = expected & low | (if mode == Mode::Vm86 { VM } else { 0 });
        assert_eq!(popped(cpu(mode, cpl, iopl), narrow, all), kept, "{mode:?} {cpl} {iopl}");
        // An image of zeros clears the same flags, and RF, but leaves VIF and VIP.
        let mut full = cpu(mode, cpl, iopl);
        full.rflags |= (all & !(VM | TF | IOPL)) | iopl << 12;
        let changed = always & !2 | if cpl == 0 { IF | IOPL } else { 0 };
        let changed = changed | if cpl > 0 && u64::from(cpl) <= iopl { IF } else { 0 };
        let before = full.rflags;
        assert_eq!(popped(full, wide, 0), before & !(changed | RF), "{mode:?} {cpl} {iopl}");
    }
}

#[test]
fn a_trap_is_owed_by_the_trap_flag_before_popf() {
    let mut cpu = cpu(Mode::Long64, 0, 0);
    cpu.poke(RAM + 0x1000, 8, 2 | TF);
    assert_eq!(cpu.run(POPF), Outcome::Done { trap: false });
    assert_eq!(cpu.rflags, 2 | TF);
    cpu.poke(RAM + 0x1008, 8, 2);
    assert_eq!(cpu.run(POPF), Outcome::Done { trap: true });
    assert_eq!(cpu.rflags, 2);
}

#[test]
fn pushf_images() {
    let mut long = cpu(Mode::Long64, 3, 0);
    long.rflags |= RF | CF | IF | VIF;
    long.done(PUSHF);
    assert_eq!(long.peek(RAM + 0xff8, 8), 2 | CF | IF | VIF);
    let mut vm86 = cpu(Mode::Vm86, 3, 3);
    vm86.done(&[0x66, 0x9c]);
    assert_eq!(vm86.peek(0xffc, 4), 2 | IOPL);
}

#[test]
fn virtual_8086_mode_below_iopl_3() {
    let plain = cpu(Mode::Vm86, 3, 2);
    for bytes in [PUSHF, POPF, CLI, STI, &[0x66, 0x9c], &[0x66, 0x9d]] {
        plain.clone().faults(bytes, 13);
    }
    // With the extensions (CR4.VME) the 16-bit forms work on VIF.
    let mut extended = plain;
    extended.cr4 = 1;
    for bytes in [&[0x66, 0x9c][..], &[0x66, 0x9d]] {
        extended.clone().faults(bytes, 13);
    }
    let mut cpu = extended.clone();
    cpu.rflags |= VIF | CF;
    cpu.done(PUSHF);
    assert_eq!(cpu.peek(0xffe, 2), 2 | CF | IF | IOPL);
    cpu.rflags = extended.rflags | IF;
    cpu.done(POPF);
    assert_eq!(cpu.rflags, extended.rflags | CF | VIF | IF); // IF and IOPL are the real ones
    cpu.done(CLI);
    assert_eq!(cpu.rflags, extended.rflags | CF | IF);
    cpu.done(STI); // no shadow: the real IF did not change
    assert_eq!(cpu.rflags, extended.rflags | CF | VIF | IF);
    // A pending virtual interrupt, and single-stepping, are for the monitor.
    cpu.rflags |= VIP;
    cpu.poke(0x1000, 2, IF);
    cpu.faults(POPF, 13);
    cpu.faults(STI, 13);
    cpu.rflags = extended.rflags;
    cpu.poke(0x1000, 2, TF);
    cpu.faults(POPF, 13);
}

#[test]
fn cli_and_sti_by_privilege() {
    for (cpl, iopl, allowed) in [(0, 0, true), (1, 0, false), (1, 1, true), (3, 2, false), (3, 3, true)] {
        for mode in [Mode::Protected16, Mode::Protected32, Mode::Long64] {
            let mut cpu = cpu(mode, cpl, iopl);
            cpu.rflags |= IF;
            let before = cpu.rflags;
            if allowed {
                cpu.done(CLI);
                assert_eq!(cpu.rflags, before & !IF);
                assert_eq!(cpu.run(STI), Outcome::Done { trap: false });
                assert_eq!(cpu.rflags, before);
                assert!(cpu.shadow);
                cpu.done(STI); // already set: no shadow
            } else {
                cpu.clone().faults(CLI, 13);
                cpu.faults(STI, 13);
            }
        }
    }
    let mut real = cpu(Mode::Real, 0, 0);
    assert_eq!(real.run(STI), Outcome::Done { trap: false });
    assert!(real.shadow && real.rflags & IF != 0);
    // Protected-mode virtual interrupts, at CPL 3 only.
    for (cpl, works) in [(3, true), (2, false)] {
        let mut cpu = cpu(Mode::Protected32, cpl, 1);
        cpu.cr4 = 2;
        let before = cpu.rflags;
        if !works {
            cpu.faults(STI, 13);
            continue;
        }
        cpu.done(STI);
        assert_eq!(cpu.rflags, before | VIF);
        cpu.rflags |= VIP;
        cpu.done(CLI);
        assert_eq!(cpu.rflags, before | VIP);
        cpu.faults(STI, 13);
    }
}

#[test]
fn single_flags() {
    let mut cpu = FakeCpu::long();
    for (opcode, rflags) in [(0xf9, 2 | CF), (0xf5, 2), (0xf5, 2 | CF), (0xf8, 2), (0xfd, 2 | DF), (0xfc, 2)]
    {
        cpu.done(&[opcode]);
        assert_eq!(cpu.rflags, rflags, "{opcode:x}");
    }
    cpu.rflags = 2 | ZF;
    cpu[Gpr::Rax] = u64::MAX;
    cpu.done(&[0x9f]);
    assert_eq!(cpu[Gpr::Rax], 0xffff_ffff_ffff_42ff);
    cpu[Gpr::Rax] = 0xff00;
    cpu.done(&[0x9e]);
    assert_eq!(cpu.rflags, 0xd7);
}
