//! Decoding, instruction lengths and the soundness of the cache.
use super::fake::FakeCpu;
use crate::vm::emulate::{length, DecodeCache, DecodeError, DecodedInsn, Emulator, Gpr, Mode, Outcome};

fn pad(bytes: &[u8]) -> [u8; 15] {
    let mut padded = [0x90; 15];
    padded[..bytes.len()].copy_from_slice(bytes);
    padded
}

#[test]
fn lengths_of_intercepted_instructions() {
    let cases: &[(&[u8], u8)] = &[
        (&[0x0f, 0xa2], 2),             // cpuid
        (&[0xf4], 1),                   // hlt
        (&[0x0f, 0x30], 2),             // wrmsr
        (&[0x0f, 0x32], 2),             // rdmsr
        (&[0x0f, 0x01, 0xd1], 3),       // xsetbv
        (&[0xf3, 0x90], 2),             // pause
        (&[0x66, 0x0f, 0xa2], 3),       // cpuid with a redundant prefix
        (&[0x0f, 0x20, 0xc0], 3),       // mov eax, cr0
        (&[0x0f, 0x22, 0xd8], 3),       // mov cr3, eax
        (&[0x0f, 0x23, 0xc8], 3),       // mov dr1, eax
        (&[0x0f, 0x01, 0xf0], 3),       // lmsw ax
        (&[0x0f, 0x06], 2),             // clts
        (&[0x0f, 0x09], 2),             // wbinvd
        (&[0xe4, 0x70], 2),             // in al, 0x70
        (&[0xec], 1),                   // in al, dx
        (&[0xcc], 1),                   // int3
        (&[0xcd, 0x80], 2),             // int 0x80
        (&[0x0f, 0x01, 0xd8], 3),       // vmrun
        (&[0x0f, 0x01, 0xd9], 3),       // vmmcall
        (&[0x0f, 0x01, 0xdc], 3),       // stgi
        (&[0x0f, 0x01, 0xf9], 3),       // rdtscp
        (&[0x0f, 0xc7, 0xf0], 3),       // rdrand eax
        (&[0xf0, 0x0f, 0x22, 0xc0], 4), // mov cr8, eax
    ];
    let mut emulator = Emulator::new().unwrap();
    for mode in [Mode::Real, Mode::Protected16, Mode::Protected32, Mode::Long64] {
        for (bytes, len) in cases {
            assert_eq!(emulator.insn_len(mode, &pad(bytes)), Ok(*len), "{mode:?} {bytes:02x?}");
            // Exactly as many bytes as it has are enough, one fewer are not.
            assert_eq!(emulator.insn_len(mode, bytes), Ok(*len), "{mode:?} {bytes:02x?}");
            let short = emulator.insn_len(mode, &bytes[..bytes.len() - 1]);
            assert_eq!(short, Err(DecodeError::Truncated), "{mode:?} {bytes:02x?}");
        }
    }
    assert_eq!(emulator.insn_len(Mode::Long64, &pad(&[0x41, 0x0f, 0x22, 0xc0])), Ok(4)); // mov cr8, r8
    assert_eq!(emulator.insn_len(Mode::Long64, &pad(&[0x0f, 0x01, 0x38])), Ok(3)); // invlpg [rax]
    assert_eq!(emulator.insn_len(Mode::Real, &pad(&[0x0f, 0x01, 0x3e, 0x34, 0x12])), Ok(5));
    // invlpg [0x1234]
}

#[test]
fn plain_lengths_agree_with_the_general_decoder() {
    for first in 0..=255_u8 {
        for second in 0..=255_u8 {
            for third in 0..=255_u8 {
                if let Some(len) = length::plain(&[first, second, third]) {
                    for bitness in [16, 32, 64] {
                        let decoded = DecodedInsn::decode(bitness, &pad(&[first, second, third]));
                        assert_eq!(decoded.map(|d| d.len()), Ok(len), "{first:x} {second:x} {third:x}");
                    }
                } else if second != 0x01 {
                    break; // the third byte matters only behind 0F 01
                }
            }
        }
    }
}

#[test]
fn the_mode_is_part_of_the_key() {
    let mut cache = DecodeCache::new().unwrap();
    // 48 89 03: dec ax, then mov; or mov [rbx], rax.
    let bytes = pad(&[0x48, 0x89, 0x03]);
    assert_eq!(cache.lookup(32, &bytes).unwrap().len(), 1);
    assert_eq!(cache.lookup(64, &bytes).unwrap().len(), 3);
    assert_eq!(cache.lookup(16, &bytes).unwrap().len(), 1);
    assert_eq!(cache.lookup(32, &bytes).unwrap().len(), 1);
    assert_eq!(cache.lookup(64, &bytes).unwrap().len(), 3);
    // B8: imm16 or imm32.
    let bytes = pad(&[0xb8, 1, 2, 3, 4]);
    assert_eq!(cache.lookup(16, &bytes).unwrap().len(), 3);
    assert_eq!(cache.lookup(32, &bytes).unwrap().len(), 5);
}

#[test]
fn every_byte_is_part_of_the_key() {
    let mut cache = DecodeCache::new().unwrap();
    let bytes = pad(&[0x48, 0x8b, 0x03]);
    for position in 0..15 {
        for bit in 0..8 {
            let mut changed = bytes;
            changed[position] ^= 1 << bit;
            let _ = cache.lookup(64, &bytes);
            let expected = DecodedInsn::decode(64, &changed);
            assert_eq!(cache.lookup(64, &changed).copied(), expected);
            assert_eq!(cache.lookup(64, &bytes).copied(), DecodedInsn::decode(64, &bytes));
        }
    }
}

#[test]
fn a_shorter_fetch_does_not_alias_a_longer_one() {
    let mut cache = DecodeCache::new().unwrap();
    // mov eax, [rbx + disp32] with a displacement of zero: truncated it must not hit the whole one, whose bytes are
    // equal when padded with zeros.
    let whole = [0x8b, 0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(cache.lookup(64, &whole).unwrap().len(), 6);
    for len in 0..6 {
        assert_eq!(cache.lookup(64, &whole[..len]).err(), Some(DecodeError::Truncated), "{len}");
    }
    for len in 6..15 {
        assert_eq!(cache.lookup(64, &whole[..len]).unwrap().len(), 6);
    }
    // More than fifteen bytes are cut.
    let misses = cache.misses();
    let mut longer = [0; 16];
    longer[..15].copy_from_slice(&whole);
    longer[15] = 0xff;
    assert_eq!(cache.lookup(64, &longer).unwrap().len(), 6);
    assert_eq!(cache.misses(), misses);
}

#[test]
fn a_hit_does_not_decode() {
    let mut cache = DecodeCache::new().unwrap();
    let bytes = pad(&[0x8b, 0x03]);
    assert_eq!(cache.misses(), 0);
    for _ in 0..10 {
        assert_eq!(cache.lookup(64, &bytes).unwrap().len(), 2);
        assert_eq!(cache.misses(), 1);
    }
}

#[test]
fn cached_and_fresh_decodings_agree() {
    let mut cache = DecodeCache::new().unwrap();
    let mut random = super::hostile::Random::new(1);
    for _ in 0..50_000 {
        // Few different bytes make collisions of slots and repetitions likely.
        let mut bytes = [0; 15];
        for byte in &mut bytes {
            *byte = [0x0f, 0x8b, 0x48, 0x66, 0x03, 0x00, 0xf0, 0x83][random.below(8) as usize];
        }
        let len = random.below(16) as usize;
        let bitness = [16, 32, 64][random.below(3) as usize];
        let cached = cache.lookup(bitness, &bytes[..len]).copied();
        assert_eq!(cached, DecodedInsn::decode(bitness, &bytes[..len]));
    }
}

#[test]
fn fifteen_bytes_are_the_limit() {
    let mut emulator = Emulator::new().unwrap();
    let mut bytes = [0x66; 15];
    assert_eq!(emulator.insn_len(Mode::Long64, &bytes), Err(DecodeError::TooLong));
    bytes[14] = 0x90;
    assert_eq!(emulator.insn_len(Mode::Long64, &bytes), Ok(15));
    bytes[13..].copy_from_slice(&[0x8b, 0x03]);
    assert_eq!(emulator.insn_len(Mode::Long64, &bytes), Ok(15));
    bytes[13..].copy_from_slice(&[0x8b, 0x43]); // its displacement would be the sixteenth byte
    assert_eq!(emulator.insn_len(Mode::Long64, &bytes), Err(DecodeError::TooLong));
    assert_eq!(emulator.insn_len(Mode::Long64, &bytes[..14]), Err(DecodeError::Truncated));
    FakeCpu::long().faults(&bytes, 13);
    FakeCpu::new(Mode::Real).faults(&[0x66; 15], 13);
}

#[test]
fn invalid_unknown_and_truncated() {
    let cases: &[(&[u8], DecodeError)] = &[
        (&[0x0f, 0x0b], DecodeError::Invalid),       // ud2 decodes, see below
        (&[0x06], DecodeError::Invalid),             // push es
        (&[0xf0, 0x8b, 0x03], DecodeError::Invalid), // lock mov
        (&[0xf0, 0x01, 0xc3], DecodeError::Invalid), // lock add ebx, eax
        (&[0xf0, 0x39, 0x03], DecodeError::Invalid), // lock cmp
        (&[0xf0, 0x0f, 0xa3, 0x03], DecodeError::Invalid), // lock bt
        (&[0x62, 0xf1, 0x7c, 0x48, 0x10, 0x03], DecodeError::Unknown), // vmovups zmm0, [rbx]
        (&[0x0f, 0x0f, 0x03, 0x9e], DecodeError::Unknown), // 3DNow!
    ];
    let mut emulator = Emulator::new().unwrap();
    for (bytes, error) in &cases[1..] {
        assert_eq!(emulator.insn_len(Mode::Long64, &pad(bytes)), Err(*error), "{bytes:02x?}");
    }
    assert_eq!(emulator.insn_len(Mode::Long64, &pad(cases[0].0)), Ok(2));
    assert_eq!(emulator.insn_len(Mode::Long64, &[]), Err(DecodeError::Truncated));

    FakeCpu::long().faults(&pad(&[0x06]), 6);
    FakeCpu::long().faults(&pad(&[0xf0, 0x8b, 0x03]), 6);
    assert_eq!(FakeCpu::long().run(&[0x8b]), Outcome::Truncated);
    let unknown = FakeCpu::long().run(&pad(&[0x62, 0xf1, 0x7c, 0x48, 0x10, 0x03]));
    assert!(matches!(unknown, Outcome::Unsupported { .. }));
}

#[test]
fn what_is_not_emulated_says_so_and_changes_nothing() {
    let cases: &[&[u8]] = &[
        &[0x66, 0xff, 0x23],                   // jmp [rbx] with operand-size prefix
        &[0x66, 0xff, 0x13],                   // call [rbx] likewise
        &[0xc5, 0xf8, 0x10, 0x03],             // vmovups xmm0, [rbx]
        &[0x0f, 0x10, 0x03],                   // movups xmm0, [rbx] without vector registers
        &[0x0f, 0x6f, 0x03],                   // movq mm0, [rbx]
        &[0x66, 0x0f, 0x58, 0x03],             // addpd xmm0, [rbx]
        &[0xd9, 0x03],                         // fld dword [rbx]
        &[0x0f, 0xae, 0x03],                   // fxsave [rbx]
        &[0xc4, 0xe2, 0x75, 0x90, 0x04, 0x1b], // vpgatherdd
        &[0x66, 0xe8, 0, 0, 0, 0],             // call rel32 with operand-size prefix
        &[0x66, 0x74, 0x00],                   // je likewise
        &[0x66, 0xc3],                         // ret likewise
        &[0xd9, 0xe8],                         // fld1
    ];
    for bytes in cases {
        let mut cpu = FakeCpu::long();
        let before = cpu.clone();
        let outcome = cpu.run(&pad(bytes));
        assert!(
            matches!(outcome, Outcome::Unsupported { reason } if !reason.is_empty()),
            "{bytes:02x?} {outcome:?}"
        );
        cpu.assert_same_state(&before);
        assert!(cpu.log.is_empty());
    }
}

/// The translation recognises them by ranges of codes.
#[test]
fn condition_users_are_contiguous_codes() {
    use iced_x86::Code;
    assert_eq!(Code::Setg_rm8 as u32 - Code::Seto_rm8 as u32, 15);
    assert_eq!(Code::Cmovg_r64_rm64 as u32 - Code::Cmovo_r16_rm16 as u32, 47);
}

#[test]
fn modes_from_registers() {
    use crate::vm::emulate::Attributes;
    let (long, big) = (Attributes(0x29b), Attributes(0x49b));
    let small = Attributes(0x9b);
    assert_eq!(Mode::of(0, 0, 2, small), Mode::Real);
    assert_eq!(Mode::of(1, 0, 2, small), Mode::Protected16);
    assert_eq!(Mode::of(1, 0, 2, big), Mode::Protected32);
    assert_eq!(Mode::of(1, 0, 0x2_0002, small), Mode::Vm86);
    assert_eq!(Mode::of(0x8000_0001, 0x500, 2, big), Mode::Protected32); // compatibility mode
    assert_eq!(Mode::of(0x8000_0001, 0x500, 2, small), Mode::Protected16);
    assert_eq!(Mode::of(0x8000_0001, 0x500, 2, long), Mode::Long64);
    assert_eq!(Mode::of(0x8000_0001, 0, 2, long), Mode::Protected16); // L means nothing without LMA
}

#[test]
fn emulation_leaves_the_decoded_length_in_rip() {
    let mut cpu = FakeCpu::long();
    cpu.done(&[0x48, 0x8b, 0x84, 0x23, 0, 0, 0, 0]); // mov rax, [rbx + disp32] by SIB without index
    assert_eq!(cpu[Gpr::Rax], 0);
}
