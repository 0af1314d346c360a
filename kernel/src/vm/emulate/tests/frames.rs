//! PUSHA, POPA, ENTER, LEAVE and segment pushes: wrap-around, faults without traces.
use super::fake::{FakeCpu, RAM};
use crate::vm::emulate::{Attributes, Exception, Gpr, Mode, Outcome, Seg};

/// A real-mode CPU whose RAM begins at 0.
fn real() -> FakeCpu {
    let mut cpu = FakeCpu::new(Mode::Real);
    cpu.base = 0;
    cpu.ram = vec![0; 0x1_0000];
    for (n, gpr) in cpu.gprs.iter_mut().enumerate().take(8) {
        *gpr = 0x1111_0101 * (n as u64 + 1);
    }
    cpu
}

#[test]
fn all_registers_there_and_back() {
    for (bytes, back, size) in [(&[0x60][..], &[0x61][..], 2_u8), (&[0x66, 0x60], &[0x66, 0x61], 4)] {
        let mut cpu = real();
        cpu[Gpr::Rsp] = 0xabcd_0008; // wraps
        let before = cpu.gprs;
        cpu.done(bytes);
        let width = u64::from(size);
        assert_eq!(cpu[Gpr::Rsp], 0xabcd_0000 | (8_u64.wrapping_sub(8 * width) & 0xffff));
        for (n, gpr) in before.iter().enumerate().take(8) {
            let at = 8_u64.wrapping_sub(width * (n as u64 + 1)) & 0xffff;
            assert_eq!(cpu.peek(at, size), gpr & (u64::MAX >> (64 - 8 * size)), "{n}");
        }
        let mut other = cpu.clone();
        for gpr in 0..8 {
            if gpr != 4 {
                other.gprs[gpr] = 0x5555_5555;
            }
        }
        other.done(back);
        for (n, value) in before.iter().enumerate().take(8) {
            let expected = if size == 2 && n != 4 { 0x5555_0000 | value & 0xffff } else { *value };
            assert_eq!(other.gprs[n], expected, "{n}");
        }
    }
    // No such instructions in 64-bit mode.
    FakeCpu::long().faults(&[0x60, 0x90], 6);
    FakeCpu::long().faults(&[0x61, 0x90], 6);
}

#[test]
fn a_frame_that_crosses_into_an_absent_page_leaves_no_trace() {
    for bytes in [&[0x60][..], &[0xc8, 0, 0, 5], &[0xc8, 0x80, 0, 0]] {
        let mut cpu = FakeCpu::new(Mode::Protected32);
        cpu.gprs = [0x77; 16];
        cpu[Gpr::Rsp] = RAM + 0x2010;
        cpu[Gpr::Rbp] = RAM + 0x3000;
        cpu.absent = vec![(RAM >> 12) + 1];
        let mut before = cpu.clone();
        let outcome = cpu.run(bytes);
        assert!(
            matches!(outcome, Outcome::Exception(Exception { vector: 14, error_code: Some(2), .. })),
            "{outcome:?}"
        );
        before.rflags |= 1 << 16;
        cpu.assert_same_state(&before);
    }
    // The enclosing frame's pointers are read.
    let mut cpu = FakeCpu::new(Mode::Protected32);
    cpu[Gpr::Rsp] = RAM + 0x3000;
    cpu[Gpr::Rbp] = RAM + 0x2004;
    cpu.absent = vec![(RAM >> 12) + 1];
    let outcome = cpu.run(&[0xc8, 0, 0, 3]);
    assert_eq!(outcome, Outcome::Exception(Exception::page_fault(0, RAM + 0x1ffc)));
    assert!(cpu.ram.iter().all(|byte| *byte == 0));
    // So is room that only the final stack pointer reaches.
    let mut cpu = FakeCpu::new(Mode::Protected32);
    cpu[Gpr::Rsp] = RAM + 0x3000;
    cpu.segments[Seg::Ss as usize].attributes = Attributes(0x497);
    cpu.segments[Seg::Ss as usize].limit = (RAM + 0x2000) as u32;
    cpu.faults(&[0xc8, 0, 0x10, 0], 12);
}

/// ENTER by the manual's own steps, on a stack of words.
#[test]
fn enter_by_the_book() {
    for level in 0..40_u8 {
        let mut cpu = real();
        cpu[Gpr::Rsp] = 0x9999_0040; // the deep ones wrap
        cpu[Gpr::Rbp] = 0x8888_4000;
        for at in (0x3f00..0x4000).step_by(2) {
            cpu.poke(at, 2, at ^ 0x5a5a);
        }
        let mut model = cpu.clone();
        let push = |model: &mut FakeCpu, value: u64| {
            let sp = model[Gpr::Rsp].wrapping_sub(2) & 0xffff;
            model[Gpr::Rsp] = 0x9999_0000 | sp;
            model.poke(sp, 2, value & 0xffff);
        };
        let bp = model[Gpr::Rbp];
        push(&mut model, bp);
        let frame = model[Gpr::Rsp] & 0xffff;
        let level_used = level % 32;
        for _ in 1..level_used {
            let bp = model[Gpr::Rbp].wrapping_sub(2);
            model[Gpr::Rbp] = bp;
            let value = model.peek(bp & 0xffff, 2);
            push(&mut model, value);
        }
        if level_used > 0 {
            push(&mut model, frame);
        }
        model[Gpr::Rbp] = 0x8888_0000 | frame;
        model[Gpr::Rsp] = 0x9999_0000 | (model[Gpr::Rsp].wrapping_sub(0x10) & 0xffff);
        cpu.done(&[0xc8, 0x10, 0, level]);
        assert_eq!(cpu.gprs, model.gprs, "{level}");
        assert!(cpu.ram == model.ram, "{level}");
        cpu.done(&[0xc9]);
        assert_eq!((cpu[Gpr::Rsp], cpu[Gpr::Rbp]), (0x9999_0040, 0x8888_4000), "{level}");
    }
}

#[test]
fn stack_width_is_the_stack_segment_s() {
    let mut cpu = FakeCpu::new(Mode::Protected16);
    cpu.base = 0;
    cpu[Gpr::Rsp] = 0x1_0000;
    cpu.segments[Seg::Ss as usize].attributes = Attributes(0x93);
    cpu.done(&[0x66, 0x68, 1, 2, 3, 4]); // push dword: SP wraps
    assert_eq!(cpu[Gpr::Rsp], 0x1_fffc);
    cpu.segments[Seg::Ss as usize].attributes = Attributes(0x493);
    cpu[Gpr::Rsp] = 0x1004;
    cpu.done(&[0x66, 0x68, 1, 2, 3, 4]);
    assert_eq!((cpu[Gpr::Rsp], cpu.peek(0x1000, 4)), (0x1000, 0x0403_0201));
}

#[test]
fn selectors_are_pushed_and_stored() {
    let mut cpu = real();
    cpu[Gpr::Rsp] = 0x100;
    cpu.segments[Seg::Ss as usize].selector = 0xbeef;
    cpu.poke(0xfc, 4, 0xffff_ffff);
    cpu.done(&[0x16]); // push ss
    assert_eq!(cpu.peek(0xfe, 2), 0xbeef);
    cpu[Gpr::Rsp] = 0x100;
    cpu.done(&[0x66, 0x16]);
    assert_eq!(cpu.peek(0xfc, 4), 0xbeef);
    cpu.done(&[0x8c, 0xd0]); // mov ax, ss: the upper half stays
    assert_eq!(cpu[Gpr::Rax], 0x1111_beef);
    cpu.done(&[0x66, 0x8c, 0xd0]);
    assert_eq!(cpu[Gpr::Rax], 0xbeef);
    cpu.done(&[0x66, 0x8c, 0x16, 0, 2]); // mov [0x200], ss: two bytes whatever the prefix
    assert_eq!(cpu.peek(0x200, 4), 0xbeef);
    let mut cpu = FakeCpu::long();
    cpu[Gpr::Rsp] = RAM + 8;
    cpu.segments[Seg::Fs as usize].selector = 0x63;
    cpu.done(&[0x0f, 0xa0]); // push fs
    assert_eq!((cpu[Gpr::Rsp], cpu.peek(RAM, 8)), (RAM, 0x63));
}
