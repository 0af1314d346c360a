//! Near branches: targets, limits, truncation of IP, counts.
use super::fake::{FakeCpu, RAM, RIP};
use crate::vm::emulate::flags::{CF, OF, PF, SF, ZF};
use crate::vm::emulate::{Gpr, Mode, Outcome, Seg};

const DONE: Outcome = Outcome::Done { trap: false };

/// RIP after one instruction that must complete.
fn after(mut cpu: FakeCpu, bytes: &[u8]) -> u64 {
    assert_eq!(cpu.run(bytes), DONE, "{bytes:02x?}");
    cpu.rip
}

fn at(mode: Mode, rip: u64) -> FakeCpu {
    let mut cpu = FakeCpu::new(mode);
    cpu.rip = rip;
    cpu
}

#[test]
fn conditions_by_definition() {
    for flags in 0..32_u64 {
        let is = |bit: u64| flags >> bit & 1 != 0;
        let (cf, pf, zf, sf, of) = (is(0), is(1), is(2), is(3), is(4));
        let holds = [of, cf, zf, cf || zf, sf, pf, sf != of, zf || sf != of];
        for code in 0..16_u8 {
            let mut cpu = FakeCpu::long();
            for (bit, flag) in [CF, PF, ZF, SF, OF].into_iter().enumerate() {
                cpu.rflags |= if is(bit as u64) { flag } else { 0 };
            }
            let taken = holds[usize::from(code >> 1)] != (code & 1 != 0);
            let expect = |len, distance: u64| RIP + len + if taken { distance } else { 0 };
            assert_eq!(after(cpu.clone(), &[0x70 + code, 0x7f]), expect(2, 0x7f), "{code:x} {flags:x}");
            assert_eq!(
                after(cpu, &[0x0f, 0x80 + code, 0, 0, 1, 0]),
                expect(6, 0x1_0000),
                "{code:x} {flags:x}"
            );
        }
    }
}

#[test]
fn distances_and_truncation() {
    assert_eq!(after(FakeCpu::long(), &[0xeb, 0xfe]), RIP); // to itself
    assert_eq!(after(FakeCpu::long(), &[0xe9, 0xfb, 0xff, 0xff, 0x7f]), RIP + 0x8000_0000);
    assert_eq!(after(at(Mode::Protected32, 0x10), &[0xeb, 0x80]), 0xffff_ff92);
    assert_eq!(after(at(Mode::Protected32, 0x1_0010), &[0x66, 0xeb, 0x00]), 0x13); // IP is cut to 16 bits
                                                                                   // 16-bit code wraps at 64 KiB.
    assert_eq!(after(at(Mode::Real, 0xfffc), &[0xeb, 0x10]), 0xe);
    assert_eq!(after(at(Mode::Real, 0x10), &[0xe9, 0x00, 0xff]), 0xff13);
    assert_eq!(after(at(Mode::Vm86, 2), &[0x75, 0xf0]), 0xfff4);
    assert_eq!(after(at(Mode::Protected16, 0x1_0000), &[0xeb, 0x10]), 0x12);
}

#[test]
fn targets_must_lie_within_the_code_segment() {
    for bytes in [&[0x66, 0xe9, 0, 0, 1, 0][..], &[0x66, 0xe8, 0, 0, 1, 0], &[0x66, 0x0f, 0x85, 0, 0, 1, 0]] {
        at(Mode::Real, 0x10).faults(bytes, 13);
        at(Mode::Vm86, 0x10).faults(bytes, 13);
    }
    // Not taken, nothing is checked.
    assert_eq!(after(at(Mode::Real, 0x10), &[0x66, 0x0f, 0x84, 0, 0, 1, 0]), 0x17);
    let mut cpu = at(Mode::Protected32, 0x100);
    cpu.segments[Seg::Cs as usize].limit = 0x17f;
    assert_eq!(after(cpu.clone(), &[0xeb, 0x7d]), 0x17f);
    cpu.faults(&[0xeb, 0x7e], 13);
    cpu.rflags = 2;
    cpu[Gpr::Rcx] = 2;
    cpu.faults(&[0xe2, 0x7e], 13); // the count stays, too
    let mut cpu = FakeCpu::long();
    cpu.rip = 0x7fff_ffff_fff0;
    cpu.faults(&[0xeb, 0x10], 13);
    cpu.rflags = 2;
    cpu[Gpr::Rsp] = RAM + 0x1000;
    cpu.faults(&[0xe8, 0x10, 0, 0, 0], 13);
}

#[test]
fn counts_have_the_address_size() {
    // (mode, bytes, RCX before, RCX after, taken)
    let cases: &[(Mode, &[u8], u64, u64, bool)] = &[
        (Mode::Real, &[0xe2, 0x10], 0x1_0001, 0x1_0000, false),
        (Mode::Real, &[0xe2, 0x10], 0x1_0000, 0x1_ffff, true),
        (Mode::Real, &[0x67, 0xe2, 0x10], 0x1_0001, 0x1_0000, true),
        (Mode::Protected32, &[0xe2, 0x10], 1, 0, false),
        (Mode::Protected32, &[0x67, 0xe2, 0x10], 0x1_0001, 0x1_0000, false),
        (Mode::Long64, &[0xe2, 0x10], 0, u64::MAX, true),
        (Mode::Long64, &[0x67, 0xe2, 0x10], 0, 0xffff_ffff, true),
        (Mode::Real, &[0xe3, 0x10], 0x1_0000, 0x1_0000, true),
        (Mode::Real, &[0x67, 0xe3, 0x10], 0x1_0000, 0x1_0000, false),
        (Mode::Long64, &[0xe3, 0x10], 1 << 32, 1 << 32, false),
        (Mode::Long64, &[0x67, 0xe3, 0x10], 1 << 32, 1 << 32, true),
        (Mode::Long64, &[0xe1, 0x10], 2, 1, false), // loope, ZF clear
        (Mode::Long64, &[0xe0, 0x10], 2, 1, true),
    ];
    for &(mode, bytes, before, after, taken) in cases {
        let mut cpu = at(mode, 0x100);
        cpu[Gpr::Rcx] = before;
        assert_eq!(cpu.run(bytes), DONE);
        assert_eq!(cpu[Gpr::Rcx], after, "{mode:?} {bytes:02x?}");
        assert_eq!(
            cpu.rip,
            0x100 + bytes.len() as u64 + if taken { 0x10 } else { 0 },
            "{mode:?} {bytes:02x?}"
        );
        assert_eq!(cpu.rflags & !0x2_0000, 2);
    }
}

#[test]
fn calls_and_returns() {
    let mut cpu = at(Mode::Real, 0x100);
    cpu.base = 0;
    cpu[Gpr::Rsp] = 0xaaaa_0002;
    assert_eq!(cpu.run(&[0xe8, 0x10, 0]), DONE);
    assert_eq!((cpu.rip, cpu[Gpr::Rsp], cpu.peek(0, 2)), (0x113, 0xaaaa_0000, 0x103));
    assert_eq!(cpu.run(&[0xc2, 4, 0]), DONE); // ret 4
    assert_eq!((cpu.rip, cpu[Gpr::Rsp]), (0x103, 0xaaaa_0006));
    // With a 32-bit operand the return address must lie within the limit.
    cpu.poke(6, 4, 0x1_0000);
    cpu.faults(&[0x66, 0xc3], 13);
    cpu.poke(6, 4, 0xfff0);
    assert_eq!(cpu.run(&[0x66, 0xc3]), DONE);
    assert_eq!((cpu.rip, cpu[Gpr::Rsp]), (0xfff0, 0xaaaa_000a));

    let mut cpu = FakeCpu::long();
    cpu[Gpr::Rsp] = RAM;
    cpu.poke(RAM, 8, 0x8000_0000_0000);
    cpu.faults(&[0xc3], 13);
}
