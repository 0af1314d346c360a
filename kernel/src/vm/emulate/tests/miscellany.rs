//! Decimal adjustment, BOUND, undefined opcodes, VEX by mode, the time-stamp counter, x87 control.
use super::fake::{Event, FakeCpu, RAM};
use crate::vm::emulate::flags::{AF, CF};
use crate::vm::emulate::{Gpr, Mode, Outcome};

fn real() -> FakeCpu {
    let mut cpu = FakeCpu::new(Mode::Real);
    cpu.base = 0;
    cpu
}

/// Packed and unpacked decimal digits, added and subtracted, come out as decimal arithmetic has them.
#[test]
fn decimal_arithmetic() {
    let bcd = |n: u64| (n / 10) * 16 + n % 10;
    for a in 0..100_u64 {
        for b in 0..100_u64 {
            let mut cpu = real();
            cpu[Gpr::Rax] = bcd(a);
            cpu[Gpr::Rcx] = bcd(b);
            let mut sum = cpu.clone();
            sum.done(&[0x00, 0xc8]); // add al, cl
            sum.done(&[0x27]); // daa
            assert_eq!((sum[Gpr::Rax], sum.rflags & CF), (bcd((a + b) % 100), (a + b) / 100), "{a} + {b}");
            let mut difference = cpu;
            difference.done(&[0x28, 0xc8]); // sub al, cl
            difference.done(&[0x2f]); // das
            let expected = (bcd((100 + a - b) % 100), u64::from(a < b));
            assert_eq!((difference[Gpr::Rax], difference.rflags & CF), expected, "{a} - {b}");
        }
    }
    for a in 0..10_u64 {
        for b in 0..10_u64 {
            let mut cpu = real();
            cpu[Gpr::Rax] = 0x500 | a;
            cpu[Gpr::Rcx] = b;
            let mut sum = cpu.clone();
            sum.done(&[0x00, 0xc8]);
            sum.done(&[0x37]); // aaa
            assert_eq!(sum[Gpr::Rax], (5 + (a + b) / 10) * 256 + (a + b) % 10);
            assert_eq!(sum.rflags & (AF | CF), if a + b > 9 { AF | CF } else { 0 });
            let mut difference = cpu.clone();
            difference.done(&[0x28, 0xc8]);
            difference.done(&[0x3f]); // aas
            assert_eq!(difference[Gpr::Rax], (5 - u64::from(a < b)) * 256 + (10 + a - b) % 10);
            assert_eq!(difference.rflags & (AF | CF), if a < b { AF | CF } else { 0 });
            let mut digits = cpu;
            digits[Gpr::Rax] = a << 8 | b;
            digits.done(&[0xd5, 10]); // aad
            assert_eq!(digits[Gpr::Rax], 10 * a + b);
            digits.done(&[0xd4, 10]); // aam
            assert_eq!(digits[Gpr::Rax], a << 8 | b);
        }
    }
    real().faults(&[0xd4, 0], 0); // aam 0
    for opcode in [0x27, 0x2f, 0x37, 0x3f, 0xd4, 0xd5, 0xd6, 0x62] {
        let outcome = FakeCpu::long().run(&[opcode, 0x0b, 0x90, 0x90, 0x90, 0x90]);
        assert!(!matches!(outcome, Outcome::Done { .. }), "{opcode:x}");
    }
}

#[test]
fn bounds_are_signed_and_inclusive() {
    let with = |index: u64, bytes: &[u8]| {
        let mut cpu = real();
        cpu.poke(0x200, 2, 0xfffe);
        cpu.poke(0x202, 2, 5);
        (cpu[Gpr::Rbx], cpu[Gpr::Rax]) = (0x200, index);
        cpu.run(bytes)
    };
    for (index, inside) in
        [(0xfffe_u64, true), (0, true), (5, true), (6, false), (0xfffd, false), (0x8000, false)]
    {
        let outcome = with(index, &[0x62, 0x07]);
        let exception = matches!(outcome, Outcome::Exception(exception) if exception.vector == 5);
        assert_eq!((outcome == Outcome::Done { trap: false }, exception), (inside, !inside), "{index:x}");
    }
    real().faults(&[0x62, 0xc0], 6); // a register operand
}

#[test]
fn undefined_opcodes() {
    for mode in [Mode::Real, Mode::Vm86, Mode::Protected16, Mode::Protected32, Mode::Long64] {
        for bytes in
            [&[0x0f, 0x0b][..], &[0x0f, 0xb9, 0xc0], &[0x0f, 0xff, 0xc0], &[0xf0, 0x90], &[0xf0, 0xeb, 0]]
        {
            FakeCpu::new(mode).faults(bytes, 6);
        }
        FakeCpu::new(mode).faults(&[0x8d, 0xc0], 6); // lea of a register
    }
}

#[test]
fn vex_is_undefined_in_8086_modes() {
    let andn = &[0xc4, 0xe2, 0x70, 0xf2, 0xc2]; // andn eax, ecx, edx
    let vmovups = &[0xc5, 0xf8, 0x10, 0xc1];
    let evex = &[0x62, 0xf1, 0x7c, 0x48, 0x10, 0xc1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for mode in [Mode::Real, Mode::Vm86] {
        for bytes in [&andn[..], vmovups, evex] {
            FakeCpu::new(mode).faults(bytes, 6);
        }
    }
    for mode in [Mode::Protected16, Mode::Protected32, Mode::Long64] {
        let mut cpu = FakeCpu::new(mode);
        (cpu[Gpr::Rcx], cpu[Gpr::Rdx]) = (0xf0, 0xff);
        cpu.done(andn);
        assert_eq!(cpu[Gpr::Rax], 0xf);
        assert!(matches!(FakeCpu::new(mode).run(vmovups), Outcome::Unsupported { .. }));
    }
}

#[test]
fn xlat_wraps_at_the_address_size() {
    let mut cpu = real();
    (cpu[Gpr::Rbx], cpu[Gpr::Rax]) = (0xfff0, 0x12_20);
    cpu.poke(0x10, 1, 0x99);
    cpu.done(&[0xd7]);
    assert_eq!(cpu[Gpr::Rax], 0x1299);
}

#[test]
fn cache_lines_are_checked_and_not_read() {
    for bytes in [&[0x0f, 0xae, 0x3b][..], &[0x66, 0x0f, 0xae, 0x3b], &[0x66, 0x0f, 0xae, 0x33]] {
        let mut cpu = FakeCpu::long();
        cpu.done(bytes); // clflush, clflushopt, clwb
        assert_eq!(cpu.log, [Event::Probe { linear: RAM, size: 1 }]);
        cpu[Gpr::Rbx] = 0x8000_0000_0000;
        cpu.faults(bytes, 13);
    }
    let mut cpu = FakeCpu::long();
    cpu[Gpr::Rbx] = 0x8000_0000_0000;
    cpu.done(&[0x0f, 0x18, 0x0b]); // a prefetch faults never
    cpu.done(&[0x0f, 0x1f, 0x03]);
}

#[test]
fn the_time_stamp_counter() {
    let mut cpu = FakeCpu::long();
    cpu.cpl = 3;
    cpu.gprs = [u64::MAX; 16];
    cpu.done(&[0x0f, 0x31]);
    assert_eq!((cpu[Gpr::Rax], cpu[Gpr::Rdx], cpu[Gpr::Rcx]), (0x5566_7788, 0x1122_3344, u64::MAX));
    cpu.done(&[0x0f, 0x01, 0xf9]);
    assert_eq!(cpu[Gpr::Rcx], 7);
    cpu.cr4 = 4; // TSD
    cpu.clone().faults(&[0x0f, 0x31], 13);
    cpu.clone().faults(&[0x0f, 0x01, 0xf9], 13);
    cpu.cpl = 0;
    cpu.done(&[0x0f, 0x31]);
    cpu.tsc_aux = None;
    cpu.faults(&[0x0f, 0x01, 0xf9], 6);
}

#[test]
fn random_numbers() {
    let mut cpu = FakeCpu::long();
    cpu.rflags |= 0x8d5;
    cpu.random = Some(Some(0x1234_5678_9abc_def0));
    cpu.done(&[0x0f, 0xc7, 0xf1]); // rdrand ecx
    assert_eq!((cpu[Gpr::Rcx], cpu.rflags), (0x9abc_def0, 2 | CF));
    cpu.done(&[0x48, 0x0f, 0xc7, 0xf9]); // rdseed rcx
    assert_eq!(cpu[Gpr::Rcx], !0x1234_5678_9abc_def0);
    cpu.random = Some(None);
    cpu.done(&[0x66, 0x0f, 0xc7, 0xf1]); // rdrand cx
    assert_eq!((cpu[Gpr::Rcx], cpu.rflags), (!0x1234_5678_9abc_def0 & !0xffff, 2));
    cpu.random = None;
    cpu.faults(&[0x0f, 0xc7, 0xf1], 6);
}

#[test]
fn x87_control() {
    let mut cpu = FakeCpu::long();
    cpu.x87 = Some((0x40, 0x3881));
    cpu.done(&[0xdf, 0xe0]); // fnstsw ax
    assert_eq!(cpu[Gpr::Rax], 0x3881);
    cpu.done(&[0xdb, 0xe2]); // fnclex
    cpu.done(&[0xdd, 0x3b]); // fnstsw [rbx]
    assert_eq!(cpu.peek(RAM, 2), 0x3800);
    cpu.done(&[0xdb, 0xe3]); // fninit
    assert_eq!(cpu.x87, Some((0x37f, 0)));
    cpu.poke(RAM, 2, 0x27f);
    cpu.done(&[0xd9, 0x2b]); // fldcw
    cpu.done(&[0xd9, 0x7b, 0x08]); // fnstcw
    assert_eq!(cpu.peek(RAM + 8, 2), 0x27f);
    // A pending exception is taken by those that wait, if CR0.NE says so.
    cpu.x87 = Some((0x37f, 0x80));
    cpu.done(&[0x9b]);
    cpu.cr0 |= 1 << 5;
    for bytes in [&[0x9b][..], &[0xd9, 0x2b]] {
        let outcome = cpu.clone().run(bytes);
        assert!(matches!(outcome, Outcome::Exception(exception) if exception.vector == 16), "{outcome:?}");
    }
    cpu.done(&[0xdb, 0xe3]);
    // (CR0 bits, who raises #NM): EM or TS, for FWAIT MP and TS.
    for (bits, wait, others) in [(4, false, true), (8, false, true), (2, false, false), (10, true, true)] {
        for bytes in [&[0x9b][..], &[0xdb, 0xe3], &[0xdb, 0xe2], &[0xdf, 0xe0], &[0xd9, 0x2b], &[0xd9, 0x3b]]
        {
            let mut cpu = FakeCpu::long();
            cpu.cr0 |= bits;
            let outcome = cpu.run(bytes);
            let expected = if bytes == [0x9b] { wait } else { others };
            let absent = matches!(outcome, Outcome::Exception(exception) if exception.vector == 7);
            assert_eq!(absent, expected, "{bits:x} {bytes:02x?}");
        }
    }
    // Out of reach: the emulator says so.
    let mut cpu = FakeCpu::long();
    cpu.x87 = None;
    assert!(matches!(cpu.run(&[0xdb, 0xe3]), Outcome::Unsupported { .. }));
}
