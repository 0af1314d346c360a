//! Data movement: operand sizes, addressing modes, the device's view of each access, stack and branches.
use super::fake::{Event, FakeCpu, DEVICE, RAM, RIP};
use crate::vm::emulate::{Access, AccessKind, Exception, Gpr, Mode, Outcome, Seg};

fn device() -> FakeCpu {
    let mut cpu = FakeCpu::long();
    cpu[Gpr::Rbx] = DEVICE;
    cpu.gprs[0] = u64::MAX;
    cpu
}

#[test]
fn device_loads_of_every_size_are_one_read() {
    let cases: &[(&[u8], u8, u64)] = &[
        (&[0x8a, 0x43, 0x10], 1, 0xffff_ffff_ffff_ff11),       // mov al
        (&[0x66, 0x8b, 0x43, 0x10], 2, 0xffff_ffff_ffff_2211), // mov ax
        (&[0x8b, 0x43, 0x10], 4, 0x4433_2211),                 // mov eax
        (&[0x48, 0x8b, 0x43, 0x10], 8, 0x8877_6655_4433_2211), // mov rax
        (&[0x0f, 0xb6, 0x43, 0x10], 1, 0x11),                  // movzx eax, byte
        (&[0x48, 0x0f, 0xb7, 0x43, 0x10], 2, 0x2211),          // movzx rax, word
        (&[0x48, 0x63, 0x43, 0x10], 4, 0x4433_2211),           // movsxd
        (&[0x0f, 0x38, 0xf0, 0x43, 0x10], 4, 0x1122_3344),     // movbe
        (&[0x8a, 0x63, 0x10], 1, 0xffff_ffff_ffff_11ff),       // mov ah
    ];
    for (bytes, size, value) in cases {
        let mut cpu = device();
        cpu.done(bytes);
        assert_eq!(cpu[Gpr::Rax], *value, "{bytes:02x?}");
        let access = Access { kind: AccessKind::Read, sole: true };
        assert_eq!(cpu.log, [Event::Read { linear: DEVICE + 0x10, size: *size, access }]);
    }
    let mut cpu = device();
    cpu.device_value = 0x80;
    cpu.done(&[0x0f, 0xbe, 0x43, 0x10]); // movsx eax, byte: the upper half is zero, not sign
    assert_eq!(cpu[Gpr::Rax], 0xffff_ff80);
}

#[test]
fn device_stores_of_every_size_are_one_write() {
    let cases: &[(&[u8], u8, u64)] = &[
        (&[0x88, 0x4b, 0x20], 1, 0x88),
        (&[0x66, 0x89, 0x4b, 0x20], 2, 0x7788),
        (&[0x89, 0x4b, 0x20], 4, 0x5566_7788),
        (&[0x48, 0x89, 0x4b, 0x20], 8, 0x1122_3344_5566_7788),
        (&[0xc6, 0x43, 0x20, 0xfe], 1, 0xfe),
        (&[0x66, 0xc7, 0x43, 0x20, 0xfe, 0xff], 2, 0xfffe),
        (&[0xc7, 0x43, 0x20, 0xfe, 0xff, 0xff, 0xff], 4, 0xffff_fffe),
        (&[0x48, 0xc7, 0x43, 0x20, 0xfe, 0xff, 0xff, 0xff], 8, 0xffff_ffff_ffff_fffe),
        (&[0x0f, 0xc3, 0x4b, 0x20], 4, 0x5566_7788), // movnti
        (&[0x88, 0x6b, 0x20], 1, 0x77),              // mov [], ch
        (&[0x40, 0x88, 0x6b, 0x20], 1, 0x44),        // mov [], bpl
    ];
    for (bytes, size, value) in cases {
        let mut cpu = device();
        cpu[Gpr::Rcx] = 0x1122_3344_5566_7788;
        cpu[Gpr::Rbp] = 0x44;
        cpu.done(bytes);
        let access = Access { kind: AccessKind::Write, sole: true };
        assert_eq!(cpu.log, [Event::Write { linear: DEVICE + 0x20, size: *size, value: *value, access }]);
    }
}

#[test]
fn locked_and_plain_updates_of_a_device_are_one_read_and_one_write() {
    for (bytes, write) in [
        (&[0x83, 0x0b, 1][..], 'w'),      // or dword [rbx], 1
        (&[0xf0, 0x83, 0x0b, 1], 'x'),    // lock or
        (&[0x87, 0x0b], 'x'),             // xchg locks by itself
        (&[0xf0, 0x0f, 0xc1, 0x0b], 'x'), // lock xadd
        (&[0x0f, 0xb1, 0x0b], 'x'),       // cmpxchg, failing
        (&[0xff, 0x0b], 'w'),             // dec
        (&[0x0f, 0xba, 0x2b, 3], 'w'),    // bts
        (&[0xd1, 0x23], 'w'),             // shl
    ] {
        let mut cpu = device();
        cpu.done(bytes);
        assert_eq!(cpu.touched(), [('r', DEVICE, 4), (write, DEVICE, 4)], "{bytes:02x?}");
        let Event::Read { access, .. } = cpu.log[0] else { panic!("reads first") };
        assert_eq!(access, Access { kind: AccessKind::ReadModify, sole: true });
    }
    for bytes in [&[0x83, 0x3b, 1][..], &[0x85, 0x0b], &[0x0f, 0xba, 0x23, 3], &[0x3b, 0x0b]] {
        let mut cpu = device();
        cpu.done(bytes); // cmp, test, bt, cmp: no write
        let access = Access { kind: AccessKind::Read, sole: true };
        assert_eq!(cpu.log, [Event::Read { linear: DEVICE, size: 4, access }]);
    }
}

#[test]
fn addressing_in_64_bit_code() {
    let mut cpu = FakeCpu::long();
    cpu.poke(RAM + 0x123, 4, 0xdead_beef);
    cpu[Gpr::R12] = RAM;
    cpu[Gpr::R13] = 0x20;
    cpu.done(&[0x43, 0x8b, 0x44, 0xec, 0x23]); // mov eax, [r12 + r13*8 + 0x23]
    assert_eq!(cpu[Gpr::Rax], 0xdead_beef);

    // RIP-relative, with an immediate behind the displacement.
    let mut cpu = FakeCpu::long();
    let displacement = (RAM + 0x10).wrapping_sub(RIP + 10) as u32;
    let mut bytes = vec![0xc7, 0x05];
    bytes.extend(displacement.to_le_bytes());
    bytes.extend(0x1234_5678_u32.to_le_bytes());
    cpu.done(&bytes);
    assert_eq!(cpu.peek(RAM + 0x10, 4), 0x1234_5678);

    // EIP-relative: the address is cut to 32 bits.
    let mut cpu = FakeCpu::long();
    cpu.rip = 0xffff_8000_0000_1000;
    let displacement = (RAM as u32).wrapping_sub(0x1007);
    let mut bytes = vec![0x67, 0x8b, 0x05];
    bytes.extend(displacement.to_le_bytes());
    cpu.poke(RAM, 4, 7);
    cpu.done(&bytes);
    assert_eq!(cpu[Gpr::Rax], 7);

    // FS and GS have a base, other overrides none.
    let mut cpu = FakeCpu::long();
    cpu.segments[Seg::Gs as usize].base = RAM;
    cpu.segments[Seg::Ds as usize].base = 0x5000;
    cpu.segments[Seg::Es as usize].base = 0x5000;
    cpu.poke(RAM + 8, 8, 0x1111);
    cpu.done(&[0x65, 0x48, 0x8b, 0x04, 0x25, 8, 0, 0, 0]); // mov rax, gs:[8]
    assert_eq!(cpu[Gpr::Rax], 0x1111);
    cpu.done(&[0x26, 0x48, 0x8b, 0x43, 0x08]); // mov rax, es:[rbx + 8]
    assert_eq!(cpu[Gpr::Rax], 0x1111);

    // Sign-extended displacement at the top of memory.
    let mut cpu = FakeCpu::long();
    cpu.base = 0xffff_ffff_ff5f_d000;
    cpu.poke(0xffff_ffff_ff5f_d0b0, 4, 5);
    cpu.done(&[0x8b, 0x04, 0x25, 0xb0, 0xd0, 0x5f, 0xff]); // mov eax, [0xffffffffff5fd0b0], as Linux's apic_read
    assert_eq!(cpu[Gpr::Rax], 5);
}

#[test]
fn addressing_in_16_bit_code() {
    let mut cpu = FakeCpu::new(Mode::Real);
    cpu.base = 0;
    cpu.ram = vec![0; 0x20_0000];
    cpu.segments[Seg::Ds as usize].base = 0x1_0000;
    cpu.segments[Seg::Ss as usize].base = 0x2_0000;
    cpu.segments[Seg::Es as usize].base = 0xf_fff0;
    cpu[Gpr::Rbx] = 0xdead_fff0;
    cpu[Gpr::Rsi] = 0x30;
    cpu[Gpr::Rbp] = 0x100;
    cpu.poke(0x1_0020, 2, 0x1234);
    cpu.done(&[0x8b, 0x00]); // mov ax, [bx + si]: wraps at 64 KiB
    assert_eq!(cpu[Gpr::Rax], 0x1234);
    cpu.poke(0x2_0102, 1, 0x56);
    cpu.done(&[0x8a, 0x46, 0x02]); // mov al, [bp + 2]: SS
    assert_eq!(cpu[Gpr::Rax], 0x1256);
    cpu.poke(0x1_0102, 1, 0x57);
    cpu.done(&[0x3e, 0x8a, 0x46, 0x02]); // with DS override
    assert_eq!(cpu[Gpr::Rax], 0x1257);
    cpu.poke(0x1_4321, 4, 0x89ab_cdef);
    cpu.done(&[0x66, 0xa1, 0x21, 0x43]); // mov eax, [0x4321]
    assert_eq!(cpu[Gpr::Rax], 0x89ab_cdef);
    cpu.poke(0xf_fff0 + 0xfff0 - 0x10, 1, 0x77); // above 1 MiB through ES
    cpu[Gpr::Rdi] = 0xfff0;
    cpu.done(&[0x26, 0x8a, 0x45, 0xf0]); // mov al, es:[di - 0x10]
    assert_eq!(cpu[Gpr::Rax] & 0xff, 0x77);
    cpu[Gpr::Rsi] = 0x1000;
    cpu.poke(0x1_2004, 1, 0x99);
    cpu.done(&[0x67, 0x8a, 0x44, 0x36, 0x04]); // mov al, [esi*2 + 4] (base and index ESI)
    assert_eq!(cpu[Gpr::Rax] & 0xff, 0x99);
}

#[test]
fn ip_wraps_as_wide_as_the_code() {
    let mut cpu = FakeCpu::new(Mode::Real);
    cpu.base = 0;
    cpu.rip = 0xffff;
    assert_eq!(cpu.run(&[0x8b, 0x07]), Outcome::Done { trap: false }); // mov ax, [bx]
    assert_eq!(cpu.rip, 1);
    let mut cpu = FakeCpu::new(Mode::Protected16);
    cpu.rip = 0x1_ffff; // reached by a 32-bit branch
    cpu[Gpr::Rbx] = 0;
    assert_eq!(cpu.run(&[0x8b, 0x07]), Outcome::Done { trap: false });
    assert_eq!(cpu.rip, 0x2_0001);
    let mut cpu = FakeCpu::new(Mode::Protected32);
    cpu.rip = 0xffff_ffff;
    assert_eq!(cpu.run(&[0x8b, 0x03]), Outcome::Done { trap: false });
    assert_eq!(cpu.rip, 1);
    let mut cpu = FakeCpu::long();
    cpu.rip = 0xffff_ffff;
    assert_eq!(cpu.run(&[0x8b, 0x03]), Outcome::Done { trap: false });
    assert_eq!(cpu.rip, 0x1_0000_0001);
}

#[test]
fn conditional_move_reads_and_zero_extends_whatever_the_condition() {
    for (rflags, value) in [(2, 0xffff_ffff), (0x42, 0x4433_2211)] {
        let mut cpu = device();
        cpu.rflags = rflags;
        cpu.done(&[0x0f, 0x44, 0x03]); // cmove eax, [rbx]
        assert_eq!(cpu[Gpr::Rax], value);
        assert_eq!(cpu.touched(), [('r', DEVICE, 4)]);
    }
}

#[test]
fn push_pop_and_calls_move_two_pieces_of_memory() {
    let mut cpu = device();
    cpu[Gpr::Rsp] = RAM + 0x100;
    cpu.done(&[0xff, 0x33]); // push qword [rbx]
    assert_eq!(cpu[Gpr::Rsp], RAM + 0xf8);
    assert_eq!(cpu.peek(RAM + 0xf8, 8), cpu.device_value);
    // The exit's address must not be taken for both.
    assert!(cpu
        .log
        .iter()
        .all(|e| !matches!(e, Event::Read { access, .. } | Event::Write { access, .. } if access.sole)));

    cpu.done(&[0x8f, 0x44, 0x24, 0x08]); // pop [rsp + 8]: the RSP after the pop
    assert_eq!(cpu[Gpr::Rsp], RAM + 0x100);
    assert_eq!(cpu.peek(RAM + 0x108, 8), cpu.device_value);

    cpu[Gpr::Rbx] = RAM + 0x200;
    cpu.poke(RAM + 0x200, 8, 0x1234_5678);
    assert_eq!(cpu.run(&[0xff, 0x13]), Outcome::Done { trap: false }); // call [rbx]
    assert_eq!(cpu.rip, 0x1234_5678);
    assert_eq!(cpu.peek(RAM + 0xf8, 8), RIP + 2 + 4 + 2);
}

#[test]
fn stacks_of_16_bits_keep_the_upper_half_of_esp() {
    let mut cpu = FakeCpu::new(Mode::Protected16);
    cpu.base = 0;
    cpu[Gpr::Rsp] = 0x1234_0002;
    cpu[Gpr::Rbx] = 0x100;
    cpu.poke(0x100, 4, 0xaabb_ccdd);
    cpu.done(&[0xff, 0x37]); // push word [bx]
    assert_eq!(cpu[Gpr::Rsp], 0x1234_0000);
    assert_eq!(cpu.peek(0, 2), 0xccdd);
    cpu[Gpr::Rsp] = 0x1234_0000;
    cpu.poke(0x3ffc, 4, 0);
    cpu.ram.resize(0x1_0000, 0);
    cpu.done(&[0x66, 0xff, 0x37]); // push dword [bx]: SP wraps to 0xfffc
    assert_eq!(cpu[Gpr::Rsp], 0x1234_fffc);
    assert_eq!(cpu.peek(0xfffc, 4), 0xaabb_ccdd);
}

#[test]
fn branches_go_only_where_code_may_be() {
    let mut cpu = FakeCpu::long();
    cpu[Gpr::Rsp] = RAM + 0x100;
    cpu.poke(RAM, 8, 0x8000_0000_0000);
    cpu.faults(&[0xff, 0x23], 13); // jmp [rbx], not canonical
    cpu.rflags = 2;
    cpu.faults(&[0xff, 0x13], 13);
    cpu.rflags = 2;
    cpu.linear_bits = 57;
    assert_eq!(cpu.run(&[0xff, 0x23]), Outcome::Done { trap: false });
    assert_eq!(cpu.rip, 0x8000_0000_0000);

    let mut cpu = FakeCpu::new(Mode::Protected32);
    cpu[Gpr::Rbx] = RAM;
    cpu.segments[Seg::Cs as usize].limit = 0xfff;
    cpu.poke(RAM, 4, 0x1000);
    cpu.faults(&[0xff, 0x23], 13);
    cpu.rflags = 2;
    cpu.poke(RAM, 4, 0xfff);
    assert_eq!(cpu.run(&[0xff, 0x23]), Outcome::Done { trap: false });
    assert_eq!(cpu.rip, 0xfff);
}

#[test]
fn sse_loads_and_stores_where_the_registers_can_be_reached() {
    let mut cpu = FakeCpu::long();
    cpu.xmm = Some([0; 16]);
    cpu.poke(RAM, 8, 0x1111_2222_3333_4444);
    cpu.poke(RAM + 8, 8, 0x5555_6666_7777_8888);
    let whole = 0x5555_6666_7777_8888_1111_2222_3333_4444;
    let xmm = |cpu: &FakeCpu, index: usize| cpu.xmm.unwrap()[index];
    cpu.done(&[0x0f, 0x10, 0x0b]); // movups xmm1, [rbx]
    assert_eq!(xmm(&cpu, 1), whole);
    cpu.done(&[0x44, 0x0f, 0x28, 0x03]); // movaps xmm8, [rbx]
    assert_eq!(xmm(&cpu, 8), whole);
    cpu.done(&[0x66, 0x0f, 0x6e, 0x0b]); // movd xmm1, [rbx]: the rest is zero
    assert_eq!(xmm(&cpu, 1), 0x3333_4444);
    cpu.done(&[0xf3, 0x0f, 0x7e, 0x0b]); // movq xmm1, [rbx]
    assert_eq!(xmm(&cpu, 1), 0x1111_2222_3333_4444);
    cpu.done(&[0xf2, 0x0f, 0x10, 0x13]); // movsd xmm2, [rbx]
    assert_eq!(xmm(&cpu, 2), 0x1111_2222_3333_4444);
    cpu.done(&[0xf3, 0x0f, 0x10, 0x13]); // movss
    assert_eq!(xmm(&cpu, 2), 0x3333_4444);
    cpu.done(&[0x44, 0x0f, 0x11, 0x43, 0x21]); // movups [rbx + 0x21], xmm8
    assert_eq!((cpu.peek(RAM + 0x21, 8), cpu.peek(RAM + 0x29, 8)), (whole as u64, (whole >> 64) as u64));
    cpu.done(&[0x66, 0x0f, 0xd6, 0x4b, 0x40]); // movq [rbx + 0x40], xmm1
    assert_eq!(cpu.peek(RAM + 0x40, 8), 0x1111_2222_3333_4444);
    cpu.done(&[0x66, 0x0f, 0xe7, 0x43, 0x50]); // movntdq [rbx + 0x50], xmm0
    assert_eq!(cpu.peek(RAM + 0x58, 8), 0);
    cpu.faults(&[0x0f, 0x28, 0x43, 0x08], 13); // movaps, misaligned

    // A store whose second half faults leaves the first alone.
    cpu.rflags = 2;
    cpu[Gpr::Rbx] = RAM + 0xff8;
    cpu.absent = vec![(RAM >> 12) + 1];
    let before = cpu.clone();
    let outcome = cpu.run(&[0x44, 0x0f, 0x11, 0x03]);
    assert_eq!(outcome, Outcome::Exception(Exception::page_fault(2, RAM + 0x1000)));
    assert!(cpu.ram == before.ram);
}
