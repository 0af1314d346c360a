//! Hostile input: any bytes in any state neither panic nor touch memory that the instruction does not address.

use super::fake::{Event, FakeCpu, RAM};
use crate::vm::emulate::{Attributes, DecodedInsn, Emulator, Fault, Mode, Outcome};
use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, Register};
use proptest::prelude::*;

/// A small deterministic generator (xorshift64*), so that a failing case can be repeated from its seed.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }

    pub(super) fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// A form of an instruction whose operand is at [rbx], or that uses the string registers.
pub(super) struct Form {
    pub(super) bytes: &'static [u8],
    /// Bytes of the memory operand.
    pub(super) size: u8,
    /// It writes memory.
    pub(super) writes: bool,
}

const fn reads(size: u8, bytes: &'static [u8]) -> Form {
    Form { bytes, size, writes: false }
}

const fn writes(size: u8, bytes: &'static [u8]) -> Form {
    Form { bytes, size, writes: true }
}

/// One of each kind.
pub(super) const FORMS: &[Form] = &[
    reads(4, &[0x8b, 0x03]),
    reads(8, &[0x48, 0x8b, 0x03]),
    reads(8, &[0x48, 0x0f, 0x38, 0xf0, 0x03]),
    reads(2, &[0x0f, 0xb7, 0x03]),
    reads(4, &[0x48, 0x63, 0x03]),
    reads(8, &[0x48, 0x03, 0x03]),
    reads(8, &[0x48, 0x3b, 0x03]),
    reads(8, &[0x48, 0x85, 0x03]),
    reads(8, &[0x48, 0x0f, 0xaf, 0x03]),
    reads(8, &[0x48, 0xf7, 0x23]),
    reads(8, &[0x48, 0x0f, 0xbc, 0x03]),
    reads(8, &[0x48, 0x0f, 0x44, 0x03]),
    reads(8, &[0x48, 0x0f, 0xba, 0x23, 3]),
    reads(8, &[0x48, 0xad]),
    reads(8, &[0x48, 0xaf]),
    reads(8, &[0x48, 0xa7]),
    reads(4, &[0xf3, 0x6f]),
    writes(4, &[0x89, 0x03]),
    writes(8, &[0x48, 0x89, 0x03]),
    writes(8, &[0x48, 0xc7, 0x03, 1, 0, 0, 0]),
    writes(1, &[0x0f, 0x94, 0x03]),
    writes(8, &[0x48, 0x01, 0x03]),
    writes(8, &[0xf0, 0x48, 0x01, 0x03]),
    writes(8, &[0x48, 0xff, 0x03]),
    writes(8, &[0x48, 0xf7, 0x1b]),
    writes(8, &[0x48, 0xd3, 0x23]),
    writes(8, &[0x48, 0x0f, 0xa5, 0x03]),
    writes(8, &[0x48, 0x0f, 0xba, 0x2b, 3]),
    writes(8, &[0x48, 0x87, 0x03]),
    writes(8, &[0x48, 0x0f, 0xc1, 0x03]),
    writes(8, &[0x48, 0x0f, 0xb1, 0x13]),
    writes(8, &[0x0f, 0xc7, 0x0b]),
    writes(8, &[0x48, 0xab]),
    writes(4, &[0x6d]),
];

/// Any bytes, often beginning like an instruction that is emulated.
fn instructions() -> impl Strategy<Value = Vec<u8>> {
    let likely = prop::sample::select(vec![
        0x88, 0x89, 0x8a, 0x8b, 0xa4, 0xa5, 0xaa, 0xab, 0xa6, 0xaf, 0x6c, 0x6f, 0xc7, 0x81, 0x83, 0xf7, 0xff,
        0xd3, 0x8f, 0x87, 0xed, 0xef, 0xa1, 0xa3, 0x01, 0x03, 0x69, 0x60, 0x61, 0x62, 0x8c, 0x8d, 0x9b, 0x9c,
        0x9d, 0xc2, 0xc3, 0xc4, 0xc5, 0xc8, 0xc9, 0xd7, 0xd9, 0xdb, 0xdf, 0xe0, 0xe3, 0xe8, 0xe9, 0xeb, 0xfa,
        0xfb, 0x75, 0xd4, 0x27, 0x37,
    ]);
    let second = prop::sample::select(vec![
        0xb6, 0xbe, 0xa3, 0xab, 0xba, 0xb1, 0xc1, 0xc7, 0xa5, 0xac, 0x94, 0x44, 0xaf, 0xc3, 0x10, 0x11, 0x28,
        0x7f, 0x38, 0xbc, 0x6e, 0x01, 0x31, 0x84, 0xae, 0xc8, 0x0b, 0xb9, 0xff, 0x1f, 0x0d,
    ]);
    let prefix = prop::sample::select(vec![0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x36, 0x64, 0x65]);
    let prefixes = prop::collection::vec(prefix, 0..3);
    let rex = prop::option::of(0x40..0x50_u8);
    let opcode = prop_oneof![
        likely.prop_map(|op| vec![op]),
        second.prop_map(|op| vec![0x0f, op]),
        any::<u8>().prop_map(|op| vec![op]),
    ];
    let tail = prop::collection::vec(any::<u8>(), 0..15);
    (prefixes, rex, opcode, tail).prop_map(|(prefixes, rex, opcode, tail)| {
        let mut bytes = prefixes;
        bytes.extend(rex);
        bytes.extend(opcode);
        bytes.extend(tail);
        bytes.truncate(15);
        bytes
    })
}

fn register() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0..0x4000_u64).prop_map(|offset| RAM + offset),
        2 => any::<u64>(),
        1 => any::<u32>().prop_map(u64::from),
        1 => 0..64_u64,
        1 => (0..64_u64).prop_map(u64::wrapping_neg),
        1 => (0..64_u64).prop_map(|n| 0x8000_0000_0000_u64.wrapping_sub(32).wrapping_add(n)),
        1 => (0..64_u64).prop_map(|n| 0xffff_ffe0 + n),
    ]
}

fn cpus() -> impl Strategy<Value = FakeCpu> {
    let mode = prop::sample::select(vec![
        Mode::Real,
        Mode::Vm86,
        Mode::Protected16,
        Mode::Protected32,
        Mode::Long64,
        Mode::Long64,
    ]);
    let segments = prop::array::uniform7((any::<u16>(), register(), any::<u32>(), any::<bool>()));
    let gprs = prop::array::uniform16(register());
    let control =
        (any::<u64>(), 0..8_u64, prop::option::of(any::<(u16, u16)>()), prop::option::of(any::<u32>()));
    let rest = (register(), any::<u32>(), 0..4_u8, control, any::<bool>(), 0..4_u32, any::<bool>());
    (mode, gprs, segments, rest).prop_map(|(mode, gprs, segments, rest)| {
        let (rip, rflags, cpl, (cr0, cr4, x87, tsc_aux), interrupt, disturbed, vector) = rest;
        let mut cpu = FakeCpu::new(mode);
        cpu.gprs = gprs;
        cpu.rip = rip;
        cpu.rflags = u64::from(rflags) & !0x2_0000 | 2;
        cpu.cpl = cpl;
        (cpu.cr0, cpu.cr4, cpu.x87, cpu.tsc_aux) = (cr0, cr4, x87, tsc_aux);
        cpu.interrupt = interrupt;
        cpu.disturbed = disturbed;
        cpu.xmm = vector.then_some([0; 16]);
        cpu.absent = vec![(RAM >> 12) + 1];
        cpu.read_only = vec![(RAM >> 12) + 2];
        for (segment, (attributes, base, limit, odd)) in cpu.segments.iter_mut().zip(segments) {
            if odd {
                segment.attributes = Attributes(attributes);
                segment.base = if mode == Mode::Long64 { base } else { base & 0xffff_ffff };
                segment.limit = limit;
            }
        }
        cpu
    })
}

/// The linear addresses (with sizes) that the decoder's own operand information gives for the instruction in 64-bit
/// mode, for the first iteration; `None` where it does not say.
fn addressed(cpu: &FakeCpu, bytes: &[u8]) -> Option<Vec<(u64, u64)>> {
    let mut decoder = Decoder::with_ip(64, bytes, cpu.rip, DecoderOptions::NONE);
    let insn = decoder.decode();
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&insn);
    let mut places = Vec::new();
    for memory in info.used_memory() {
        if memory.access() == OpAccess::NoMemAccess {
            continue;
        }
        // Of a repeated instruction only the first element is looked at.
        let size = memory.memory_size().size().max(insn.memory_size().size()) as u64;
        let address = memory.virtual_address(0, |register, _, _| match register {
            Register::FS => Some(cpu.segments[4].base),
            Register::GS => Some(cpu.segments[5].base),
            r if r.is_segment_register() => Some(0),
            r if r.is_gpr32() => Some(cpu.gprs[r.full_register().number()] & 0xffff_ffff),
            r if r.is_gpr64() => Some(cpu.gprs[r.number()]),
            Register::AL => Some(cpu.gprs[0] & 0xff),
            Register::RIP | Register::EIP => Some(0),
            _ => None,
        })?;
        places.push((address, size));
    }
    Some(places)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..ProptestConfig::default() })]

    /// No panic (the fake CPU asserts its contract), a bounded number of accesses, registers kept on a fault.
    #[test]
    fn any_bytes_in_any_state(bytes in instructions(), cpu in cpus()) {
        let mut emulator = Emulator::new().unwrap();
        let mut after = cpu.clone();
        let outcome = emulator.emulate(&mut after, &bytes);
        prop_assert!(after.log.len() <= 4 * 512 + 256);
        let decoded = DecodedInsn::decode(cpu.mode.bitness(), &bytes);
        match outcome {
            Outcome::Done { trap } | Outcome::Continue { trap } => {
                prop_assert!(decoded.is_ok());
                if decoded.is_ok_and(|insn| insn.is_system()) {
                    // MOV SS begins a shadow, INT clears TF, IRET loads RF: the tests of those say when.
                    return Ok(());
                }
                prop_assert_eq!(trap, cpu.rflags & 0x100 != 0);
                let sets_if = after.rflags & !cpu.rflags & 0x200 != 0;
                prop_assert!(!after.shadow || sets_if);
                prop_assert_eq!(matches!(outcome, Outcome::Continue { .. }) , after.rip == cpu.rip && after.rflags & 0x1_0000 != 0);
            }
            Outcome::Truncated => prop_assert!(bytes.len() < 15 && after.log.is_empty()),
            Outcome::Unsupported { reason } => {
                prop_assert!(!reason.is_empty());
                prop_assert_eq!(after.gprs, cpu.gprs);
            }
            Outcome::Exception(_) | Outcome::Retry | Outcome::Stop => {
                prop_assert_eq!(after.rip, cpu.rip);
                let repeats = decoded.is_ok_and(|insn| insn.repeats());
                prop_assert!(repeats || after.gprs == cpu.gprs);
                prop_assert!(repeats || after.rflags | 0x1_0000 == cpu.rflags | 0x1_0000);
                if outcome != Outcome::Retry && !repeats {
                    prop_assert!(after.ram == cpu.ram, "memory changed by an instruction that faulted");
                }
            }
        }
    }

    /// In 64-bit mode the first accesses are within what the decoder says the instruction addresses.
    #[test]
    fn only_addressed_memory_is_touched(bytes in instructions(), cpu in cpus()) {
        let mut cpu = cpu;
        cpu.mode = Mode::Long64;
        cpu.cpl = 0;
        cpu.absent.clear();
        cpu.read_only.clear();
        cpu.disturbed = 0;
        cpu.interrupt = true; // one iteration
        let Some(places) = addressed(&cpu, &bytes) else { return Ok(()) };
        let bit_offset = DecodedInsn::decode(64, &bytes)
            .is_ok_and(|insn| insn.has_bit_offset() || insn.is_system());
        let mut after = cpu.clone();
        let _ = Emulator::new().unwrap().emulate(&mut after, &bytes);
        for (_, linear, size) in after.touched() {
            let inside = places.iter().any(|(start, len)| {
                linear.wrapping_sub(*start).checked_add(size.into()).is_some_and(|end| end <= *len)
            });
            prop_assert!(inside || bit_offset, "{linear:x}+{size} not in {places:x?}");
        }
    }
}

#[test]
fn every_first_byte_and_modrm_in_every_mode() {
    let mut emulator = Emulator::new().unwrap();
    for mode in [Mode::Real, Mode::Vm86, Mode::Protected16, Mode::Protected32, Mode::Long64] {
        let mut fresh = FakeCpu::new(mode);
        fresh.ram = Vec::new();
        fresh.gprs[1] = 3;
        for map in [&[][..], &[0x0f], &[0x66], &[0xf3, 0x0f], &[0x67, 0x66], &[0xf0], &[0xf2]] {
            // Behind prefixes a sample of ModRM bytes will do.
            let step = if map.len() == 1 && map[0] == 0x0f || map.is_empty() { 1 } else { 11 };
            for opcode in 0..=255 {
                for modrm in (0..=255).step_by(step) {
                    let mut bytes = [0x11; 15];
                    bytes[..map.len()].copy_from_slice(map);
                    bytes[map.len()] = opcode;
                    bytes[map.len() + 1] = modrm;
                    let mut cpu = fresh.clone();
                    let outcome = emulator.emulate(&mut cpu, &bytes);
                    let len = emulator.insn_len(mode, &bytes);
                    match outcome {
                        Outcome::Done { .. } => assert!(len.is_ok()),
                        Outcome::Truncated => panic!("fifteen bytes are enough"),
                        _ => assert!(!cpu.log.iter().any(|e| matches!(e, Event::Write { .. }))),
                    }
                }
            }
        }
    }
}

#[test]
fn an_endless_count_is_bounded() {
    let mut cpu = FakeCpu::long();
    cpu.gprs[1] = u64::MAX;
    cpu.gprs[7] = super::fake::DEVICE;
    assert_eq!(cpu.run(&[0xf3, 0xaa]), Outcome::Continue { trap: false });
    assert_eq!(cpu.log.len(), 512);
}

#[test]
fn a_cpu_s_refusal_is_handed_on() {
    for fault in [Fault::Stop, Fault::Retry, Fault::Unsupported("no such device")] {
        let mut cpu = FakeCpu::long();
        cpu.port_fault = Some((0, fault));
        let expected = match fault {
            Fault::Stop => Outcome::Stop,
            Fault::Retry => Outcome::Retry,
            _ => Outcome::Unsupported { reason: "no such device" },
        };
        let before = cpu.clone();
        assert_eq!(cpu.run(&[0xec]), expected);
        cpu.assert_same_state(&before);
    }
}

/// Random code, one instruction after another on one CPU: each ends, and touches no more than a bounded number of
/// places, wherever the ones before it have led the registers.
#[test]
fn random_programs_in_every_mode() {
    let mut emulator = Emulator::new().unwrap();
    for (seed, mode) in
        (1..).zip([Mode::Real, Mode::Vm86, Mode::Protected16, Mode::Protected32, Mode::Long64])
    {
        let mut random = Random::new(seed);
        let mut cpu = FakeCpu::new(mode);
        if mode.is_8086() {
            cpu.base = 0;
        }
        let mut done = 0;
        for step in 0..60_000_u32 {
            if step % 64 == 0 {
                for gpr in &mut cpu.gprs {
                    *gpr = if random.chance(4) { random.next() } else { cpu.base + random.below(0x4000) };
                }
                cpu.rflags = cpu.rflags & 0x2_0000 | random.next() & 0x3c_7fd5 | 2;
                cpu.cpl = if mode == Mode::Vm86 { 3 } else { random.below(4) as u8 };
                (cpu.cr0, cpu.cr4) = (random.next(), random.next());
            }
            let mut bytes = random.next().to_le_bytes().to_vec();
            bytes.extend(random.next().to_le_bytes());
            bytes.truncate(15);
            cpu.log.clear();
            done += u32::from(matches!(emulator.emulate(&mut cpu, &bytes), Outcome::Done { .. }));
            assert!(cpu.log.len() <= 4 * 512 + 256);
        }
        assert!(done > 10_000, "{mode:?}: only {done} completed");
    }
}

/// Instructions that read descriptor tables, stacks and task states, and the registers of the system.
#[rustfmt::skip]
const SYSTEM: &[&[u8]] = &[
    &[0x8e, 0xd8], &[0x8e, 0xd0], &[0x8e, 0xe0], &[0x8e, 0x1b], &[0x8c, 0xd8], &[0x8c, 0x13], &[0x07], &[0x17],
    &[0x1f], &[0x0f, 0xa1], &[0x0f, 0xa9], &[0x0f, 0xa0], &[0x06], &[0xc4, 0x03], &[0xc5, 0x03],
    &[0x0f, 0xb2, 0x03], &[0x0f, 0xb4, 0x03], &[0xff, 0x2b], &[0xff, 0x1b], &[0xea, 0, 0, 0, 0, 0x50, 0],
    &[0x9a, 0, 0, 0, 0, 0x60, 0], &[0x9a, 0x50, 0, 0x50, 0], &[0xcb], &[0xca, 9, 0x80], &[0xcf], &[0xcd, 0x21],
    &[0xcd, 0xff], &[0xcc], &[0xce], &[0xf1], &[0x0f, 0x01, 0x13], &[0x0f, 0x01, 0x1b], &[0x0f, 0x01, 0x03],
    &[0x0f, 0x01, 0x0b], &[0x0f, 0x00, 0xd0], &[0x0f, 0x00, 0xd8], &[0x0f, 0x00, 0xc0], &[0x0f, 0x00, 0x0b],
    &[0x0f, 0x00, 0xe0], &[0x0f, 0x00, 0xe8], &[0x0f, 0x01, 0xe0], &[0x0f, 0x01, 0xf0], &[0x0f, 0x06],
    &[0x0f, 0x20, 0xc0], &[0x0f, 0x22, 0xc0], &[0x0f, 0x22, 0xd8], &[0x0f, 0x22, 0xe0], &[0x0f, 0x21, 0xf8],
    &[0x0f, 0x23, 0xf8], &[0x0f, 0x01, 0x3b], &[0x66, 0x0f, 0x38, 0x82, 0x03], &[0x0f, 0x09], &[0xf4],
    &[0x0f, 0xa2], &[0x0f, 0x32], &[0x0f, 0x30], &[0x0f, 0x31], &[0x0f, 0x01, 0xd0], &[0x0f, 0x01, 0xd1],
    &[0x0f, 0x01, 0xf8], &[0x0f, 0x34], &[0x0f, 0x35], &[0x0f, 0x05], &[0x0f, 0x07], &[0x0f, 0x02, 0xc3],
    &[0x0f, 0x03, 0xc3], &[0x63, 0xc3], &[0x63, 0x03],
];

/// A selector, most often of a descriptor that exists.
fn selector(random: &mut Random) -> u64 {
    if random.chance(8) {
        random.next() & 0xffff
    } else {
        random.below(16) << 3 | random.below(4) | if random.chance(8) { 4 } else { 0 }
    }
}

/// A CPU whose tables, stacks and task states are noise that looks like descriptors, selectors and addresses.
fn noise(random: &mut Random) -> FakeCpu {
    let modes = [Mode::Real, Mode::Vm86, Mode::Protected16, Mode::Protected32, Mode::Long64];
    let mode = modes[random.below(5) as usize];
    let cpl = match mode {
        Mode::Real => 0,
        Mode::Vm86 => 3,
        _ => random.below(4) as u8,
    };
    let mut cpu = super::world::world(mode, cpl);
    for at in (0..0x4000).step_by(4) {
        let value = match random.below(4) {
            0 => RAM + random.below(0x4000),
            1 => random.next() & 0xffff_ffff,
            _ => selector(random),
        };
        cpu.poke(RAM + at, 4, value);
    }
    let access =
        [0x9a, 0x92, 0xfa, 0xf2, 0x9e, 0x89, 0x8b, 0x82, 0x81, 0xec, 0xe4, 0xe5, 0xee, 0x8f, 0x86, 0x0e];
    for slot in 0..0x100_u64 {
        let kind = access[random.below(16) as usize] ^ if random.chance(4) { random.next() as u8 } else { 0 };
        let descriptor = if kind & 0x10 != 0 {
            super::world::flat(kind, random.below(16) as u8)
        } else if matches!(kind & 0xf, 1 | 2 | 3 | 9 | 0xb) {
            super::world::system(kind, RAM + random.below(0x4000), random.below(0x100) as u32)
        } else {
            super::world::gate(kind, selector(random) as u16, random.next(), random.below(32) as u8)
        };
        // The GDT below, the IDT from 0x800.
        let at = if slot < 16 { slot * 8 } else { 0x800 + slot * 8 };
        cpu.poke(RAM + at, 8, descriptor);
    }
    for gpr in 0..16 {
        cpu.gprs[gpr] = if random.chance(2) { selector(random) } else { RAM + random.below(0x4000) };
    }
    cpu.gprs[4] = RAM + random.below(0x4000);
    if mode == Mode::Long64 && random.chance(3) {
        cpu.gprs[random.below(16) as usize] = random.next();
    }
    cpu.rflags = random.next() & 0x3d_7fd5 | 2 | if mode == Mode::Vm86 { 0x2_0000 } else { 0 };
    cpu.cr0 = random.next() & 0x6005_002e | 0x11 | if mode == Mode::Real { 0 } else { random.below(2) << 31 };
    cpu.cr4 = random.next() & 0x37_0fff;
    cpu.efer |= random.below(2);
    cpu.limits.amd = random.chance(2);
    cpu.msrs = [0x10, 0x174, 0x175, 0x176, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102]
        .map(|msr| {
            (msr, if random.chance(2) { selector(random) << 32 | selector(random) } else { random.next() })
        })
        .to_vec();
    if mode == Mode::Long64 {
        for table in [&mut cpu.gdtr, &mut cpu.idtr] {
            if random.chance(8) {
                table.base = random.next();
            }
        }
    }
    cpu.ldtr.attributes.0 = if random.chance(2) { 0x82 } else { 0 };
    (cpu.ldtr.base, cpu.ldtr.limit) = (RAM + random.below(0x4000), random.below(0x200) as u32);
    cpu.segments[6].limit = random.below(0x100) as u32;
    cpu.segments[6].selector = selector(random) as u16;
    cpu.segments[6].attributes.0 = if random.chance(2) { 0x8b } else { 0x83 };
    cpu.debug[7] |= if random.chance(8) { 1 << 13 } else { 0 };
    cpu.absent = if random.chance(3) { vec![(RAM >> 12) + random.below(4)] } else { vec![] };
    cpu.read_only = if random.chance(3) { vec![(RAM >> 12) + random.below(4)] } else { vec![] };
    cpu.disturbed = random.below(3) as u32;
    cpu
}

/// Noise in every table, on every stack: no panic, bounded work, and a fault leaves no trace but accessed bits and RF,
/// unless it is one of the new task.
#[test]
fn system_instructions_over_noise() {
    use crate::hw::{Event as Delivered, TaskSwitchCause};
    use crate::vm::emulate::TaskSwitch;
    let mut random = Random::new(7);
    let mut emulator = Emulator::new().unwrap();
    let (mut done, mut refused) = (0, 0);
    for round in 0..60_000 {
        let cpu = noise(&mut random);
        let mut after = cpu.clone();
        let outcome = match random.below(8) {
            0 => {
                let vector = random.next() as u8;
                let event = match random.below(3) {
                    0 => Delivered::Interrupt(vector),
                    1 => Delivered::Nmi,
                    _ => Delivered::Exception(vector & 31, random.chance(2).then_some(random.next() as u32)),
                };
                emulator.deliver(&mut after, event)
            }
            1 => {
                let causes = [
                    TaskSwitchCause::Call,
                    TaskSwitchCause::Iret,
                    TaskSwitchCause::Jump,
                    TaskSwitchCause::Gate,
                ];
                let switch = TaskSwitch {
                    selector: selector(&mut random) as u16,
                    cause: causes[random.below(4) as usize],
                    next_rip: random.next(),
                    error_code: random.chance(2).then_some(random.next() as u32),
                    external: random.chance(2),
                };
                emulator.task_switch(&mut after, switch)
            }
            _ => {
                let mut bytes = [0x90; 15];
                let prefix: &[u8] = [&[][..], &[], &[0x66], &[0x48], &[0x67]][random.below(5) as usize];
                let insn = SYSTEM[random.below(SYSTEM.len() as u64) as usize];
                bytes[..prefix.len()].copy_from_slice(prefix);
                bytes[prefix.len()..prefix.len() + insn.len()].copy_from_slice(insn);
                emulator.emulate(&mut after, &bytes)
            }
        };
        assert!(after.log.len() < 400, "{round}");
        match outcome {
            Outcome::Done { .. } => done += 1,
            Outcome::Exception(_) | Outcome::Retry if after.segments[6] == cpu.segments[6] => {
                refused += 1;
                assert_eq!((after.rip, after.gprs, after.cpl), (cpu.rip, cpu.gprs, cpu.cpl), "{round}");
                assert_eq!(after.segments, cpu.segments, "{round}");
                assert_eq!(after.rflags | 0x1_0000, cpu.rflags | 0x1_0000, "{round}");
                assert!(!after.log.iter().any(|e| matches!(e, Event::Write { .. })), "{round}");
            }
            Outcome::Exception(_) | Outcome::Unsupported { .. } => {}
            outcome => panic!("{round}: {outcome:?}"),
        }
    }
    assert!(done > 5_000 && refused > 5_000, "{done} {refused}");
}
