//! Arithmetic whose faults and corners real execution cannot show safely; the differential tests cover the rest.
use super::fake::{Event, FakeCpu, RAM};
use crate::vm::emulate::flags::{self, AF, CF, OF, PF, SF, ZF};
use crate::vm::emulate::{Gpr, Outcome};

const STATUS: u64 = flags::STATUS;

#[test]
fn division_errors_change_nothing() {
    // (rax, rdx, divisor)
    for (rax, rdx, divisor) in [(1, 0, 0), (0, 5, 5), (u64::MAX, 4, 4)] {
        let mut cpu = FakeCpu::long();
        (cpu[Gpr::Rax], cpu[Gpr::Rdx]) = (rax, rdx);
        cpu.poke(RAM, 8, divisor);
        cpu.faults(&[0x48, 0xf7, 0x33], 0); // div qword [rbx]
    }
    for (rax, rdx, divisor) in [(1, 0, 0), (0, 1 << 63, u64::MAX), (1 << 63, 0, 1), (0, 1 << 63, 1)] {
        let mut cpu = FakeCpu::long();
        (cpu[Gpr::Rax], cpu[Gpr::Rdx]) = (rax, rdx);
        cpu.poke(RAM, 8, divisor);
        cpu.faults(&[0x48, 0xf7, 0x3b], 0); // idiv qword [rbx]
    }
    let mut cpu = FakeCpu::long();
    cpu[Gpr::Rax] = 0x8000;
    cpu.poke(RAM, 1, 0xff);
    cpu.faults(&[0xf6, 0x3b], 0); // idiv byte: -32768 / -1
    cpu.rflags = 2;
    cpu[Gpr::Rax] = 0xff80;
    cpu.poke(RAM, 1, 1);
    cpu.done(&[0xf6, 0x3b]); // -128 / 1 fits
    assert_eq!(cpu[Gpr::Rax], 0x0080);
}

#[test]
fn flags_of_addition_and_subtraction_by_definition() {
    for size in [1_u8, 2] {
        let modulus = 1_i64 << (8 * size);
        let signed = |v: i64| if v >= modulus / 2 { v - modulus } else { v };
        let operands = || (0..modulus).step_by(if size == 1 { 1 } else { 769 });
        for a in operands() {
            for b in operands() {
                for carry in [0, 1] {
                    let expect = |whole: i64, whole_signed: i64, nibbles: i64| {
                        let result = whole.rem_euclid(modulus);
                        let mut expected = 0;
                        expected |= if (0..modulus).contains(&whole) { 0 } else { CF };
                        expected |= if (result as u8).count_ones() & 1 == 0 { PF } else { 0 };
                        expected |= if (0..16).contains(&nibbles) { 0 } else { AF };
                        expected |= if result == 0 { ZF } else { 0 };
                        expected |= if signed(result) < 0 { SF } else { 0 };
                        expected |= if signed(result) == whole_signed { 0 } else { OF };
                        (result as u64, expected)
                    };
                    let sum =
                        expect(a + b + carry, signed(a) + signed(b) + carry, (a & 15) + (b & 15) + carry);
                    assert_eq!(flags::add(a as u64, b as u64, carry == 1, size), sum, "{a} + {b} + {carry}");
                    let difference =
                        expect(a - b - carry, signed(a) - signed(b) - carry, (a & 15) - (b & 15) - carry);
                    assert_eq!(
                        flags::sub(a as u64, b as u64, carry == 1, size),
                        difference,
                        "{a} - {b} - {carry}"
                    );
                }
            }
        }
    }
}

#[test]
fn rotates_step_by_step() {
    use flags::Shift::{Rcl, Rcr, Rol, Ror, Sar, Shl, Shr};
    // A shift by n is n shifts by one, as far as result and CF go.
    for size in [1_u8, 2, 4, 8] {
        let largest = if size == 8 { 63 } else { 31 };
        for op in [Rol, Ror, Rcl, Rcr, Shl, Shr, Sar] {
            for value in [0x8000_0000_8000_8081, 0x1234_5678_9abc_def0, 1, u64::MAX, 0x7fff_7fff_7fff_7f7f] {
                for carry in [0, CF] {
                    let value = value & flags::mask(size);
                    let (mut stepped, mut status) = (value, carry);
                    for count in 1..=largest {
                        (stepped, status) = flags::shift(op, stepped, 1, size, status);
                        let (result, all) = flags::shift(op, value, count, size, carry);
                        assert_eq!(result, stepped, "{op:?} {value:x} by {count}, {size} bytes");
                        assert_eq!(all & CF, status & CF, "{op:?} {value:x} by {count}, {size} bytes");
                    }
                    assert_eq!(flags::shift(op, value, 0, size, STATUS), (value, STATUS));
                    assert_eq!(flags::shift(op, value, largest + 1, size, STATUS), (value, STATUS));
                }
            }
        }
    }
}

#[test]
fn a_disturbed_exchange_is_tried_again() {
    let mut cpu = FakeCpu::long();
    cpu.disturbed = 3;
    cpu.done(&[0xf0, 0xff, 0x03]); // lock inc dword [rbx], others increment three times
    assert_eq!(cpu.peek(RAM, 4), 4);
    assert_eq!(cpu.log.iter().filter(|e| matches!(e, Event::Exchange { .. })).count(), 4);

    // For ever disturbed, the guest is entered again with nothing changed.
    let mut cpu = FakeCpu::long();
    cpu.disturbed = u32::MAX;
    let before = cpu.clone();
    assert_eq!(cpu.run(&[0xf0, 0xff, 0x03]), Outcome::Retry);
    assert_eq!((cpu.gprs, cpu.rip, cpu.rflags), (before.gprs, before.rip, before.rflags));

    let mut cpu = FakeCpu::long();
    cpu.disturbed = 1;
    assert_eq!(cpu.run(&[0xf0, 0x0f, 0xb1, 0x0b]), Outcome::Retry); // lock cmpxchg
    cpu.done(&[0x3e, 0xf0, 0x0f, 0xb1, 0x0b]);
    assert_eq!(cpu[Gpr::Rax], 1);
}

#[test]
fn compare_exchange_of_page_table_entries() {
    let mut cpu = FakeCpu::long();
    cpu.poke(RAM, 8, 0x8000_0000_1234_5067);
    cpu[Gpr::Rax] = 0x8000_0000_1234_5067;
    cpu[Gpr::Rcx] = 0x25;
    cpu.done(&[0xf0, 0x48, 0x0f, 0xb1, 0x0b]); // lock cmpxchg [rbx], rcx
    assert_eq!(cpu.peek(RAM, 8), 0x25);
    assert_eq!(cpu.rflags & ZF, ZF);
    cpu.done(&[0xf0, 0x48, 0x0f, 0xb1, 0x0b]); // now different
    assert_eq!(cpu[Gpr::Rax], 0x25);
    assert_eq!(cpu.rflags & ZF, 0);
    // The failing one wrote back what it had read.
    let last = cpu.log.last().copied();
    assert_eq!(last, Some(Event::Exchange { linear: RAM, size: 8, old: 0x25, new: 0x25 }));

    cpu.poke(RAM + 0x10, 8, 1);
    cpu.poke(RAM + 0x18, 8, 2);
    (cpu[Gpr::Rax], cpu[Gpr::Rdx], cpu[Gpr::Rcx]) = (1, 2, 4);
    cpu.rflags |= STATUS;
    cpu.done(&[0xf0, 0x48, 0x0f, 0xc7, 0x4b, 0x10]); // lock cmpxchg16b [rbx + 0x10]
    assert_eq!((cpu.peek(RAM + 0x10, 8), cpu.peek(RAM + 0x18, 8)), (RAM, 4));
    assert_eq!(cpu.rflags & STATUS, STATUS);
    cpu.faults(&[0xf0, 0x48, 0x0f, 0xc7, 0x4b, 0x18], 13); // must be aligned
}

#[test]
fn bit_offsets_reach_beyond_the_operand() {
    let mut cpu = FakeCpu::long();
    cpu[Gpr::Rbx] = RAM + 0x1000;
    cpu[Gpr::Rcx] = 0x1_0005; // bit 65541
    cpu.done(&[0x48, 0x0f, 0xab, 0x0b]); // bts [rbx], rcx
    assert_eq!(cpu.peek(RAM + 0x1000 + 0x2000, 1), 0x20);
    cpu[Gpr::Rcx] = -1_i64 as u64;
    cpu.done(&[0x48, 0x0f, 0xab, 0x0b]);
    assert_eq!(cpu.peek(RAM + 0xff8, 8), 1 << 63);
    cpu[Gpr::Rcx] = 0xffff_ffff;
    cpu.done(&[0x0f, 0xa3, 0x0b]); // bt dword: signed too
    assert_eq!(cpu.rflags & CF, CF);
    assert_eq!(cpu.touched().last(), Some(&('r', RAM + 0xffc, 4)));
    cpu.done(&[0x0f, 0xba, 0x23, 0xff]); // bt dword [rbx], 255: an immediate stays inside
    assert_eq!(cpu.touched().last(), Some(&('r', RAM + 0x1000, 4)));
}
