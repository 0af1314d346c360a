//! Loads of segment registers and the targets of far transfers, over all descriptors, against the manual's rules
//! written down a second time. Intel SDM vol. 3, 5.5 to 5.8, and the pages of MOV, JMP, CALL and RET in vol. 2.
use super::fake::{FakeCpu, RAM};
use super::world::*;
use crate::vm::emulate::{Exception, Gpr, Mode, Outcome, Seg};

/// The fields of a descriptor byte, taken apart.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// S and type.
    kind: u8,
    dpl: u8,
    present: bool,
    rpl: u8,
    cpl: u8,
}

impl Case {
    fn access(self) -> u8 {
        self.kind | self.dpl << 5 | u8::from(self.present) << 7
    }
    fn selector(self) -> u16 {
        SLOT | u16::from(self.rpl)
    }
    fn is_code(self) -> bool {
        self.kind >= 0x18
    }
    fn is_conforming(self) -> bool {
        self.kind >= 0x1c
    }
}

fn cases() -> impl Iterator<Item = Case> {
    (0..0x20 * 128_u16).map(|n| Case {
        kind: (n & 0x1f) as u8,
        dpl: (n >> 5 & 3) as u8,
        rpl: (n >> 7 & 3) as u8,
        cpl: (n >> 9 & 3) as u8,
        present: n >> 11 & 1 != 0,
    })
}

fn prepared(mode: Mode, case: Case) -> FakeCpu {
    let mut cpu = world(mode, case.cpl);
    put(&mut cpu, SLOT, flat(case.access(), 0xc));
    cpu[Gpr::Rax] = case.selector().into();
    cpu
}

/// Runs a load of `seg` from AX and compares with the exception that the manual names, if any.
fn load(mode: Mode, case: Case, bytes: &[u8], seg: Seg, vector: Option<u8>) {
    let mut cpu = prepared(mode, case);
    let before = cpu.clone();
    let outcome = cpu.run(bytes);
    match vector {
        Some(vector) => {
            assert_eq!(outcome, exception(vector, SLOT.into()), "{mode:?} {case:?}");
            cpu.rflags &= !(1 << 16);
            cpu.assert_same_state(&before);
            assert_eq!(cpu.segments, before.segments);
        }
        None => {
            assert_eq!(outcome, DONE, "{mode:?} {case:?}");
            let segment = cpu.segments[seg as usize];
            assert_eq!(segment.selector, case.selector());
            assert_eq!(segment.attributes.0, u16::from(case.access() | 1) | 0xc00);
            assert_eq!((segment.base, segment.limit), (0, 0xffff_ffff));
            assert_eq!(cpu.peek(GDT + u64::from(SLOT) + 5, 1), u64::from(case.access() | 1));
        }
    }
}

#[test]
fn data_segments_over_all_descriptors() {
    for mode in [Mode::Protected32, Mode::Protected16, Mode::Long64] {
        for case in cases() {
            let data_or_readable = case.kind & 0x10 != 0 && (case.kind & 8 == 0 || case.kind & 2 != 0);
            let privileged = case.is_conforming() || (case.rpl <= case.dpl && case.cpl <= case.dpl);
            let vector = match (data_or_readable && privileged, case.present) {
                (false, _) => Some(13),
                (true, false) => Some(11),
                (true, true) => None,
            };
            load(mode, case, &[0x8e, 0xd8], Seg::Ds, vector);
            load(mode, case, &[0x8e, 0xe0], Seg::Fs, vector);
        }
    }
}

#[test]
fn stack_segments_over_all_descriptors() {
    for mode in [Mode::Protected32, Mode::Long64] {
        for case in cases() {
            let writable = matches!(case.kind, 0x12 | 0x13 | 0x16 | 0x17);
            let exact = case.rpl == case.cpl && case.dpl == case.cpl;
            let vector = match (writable && exact, case.present) {
                (false, _) => Some(13),
                (true, false) => Some(12),
                (true, true) => None,
            };
            load(mode, case, &[0x8e, 0xd0], Seg::Ss, vector);
        }
    }
}

/// JMP and CALL to every code segment; system descriptors and data apart.
#[test]
fn direct_transfers_over_all_code_segments() {
    for case in cases().filter(|case| case.kind >= 0x10) {
        let privileged = if case.is_conforming() {
            case.dpl <= case.cpl
        } else {
            case.dpl == case.cpl && case.rpl <= case.cpl
        };
        let expected = match (case.is_code() && privileged, case.present) {
            (false, _) => exception(13, SLOT.into()),
            (true, false) => exception(11, SLOT.into()),
            (true, true) => DONE,
        };
        for opcode in [0xea, 0x9a] {
            let mut cpu = prepared(Mode::Protected32, case);
            let selector = case.selector().to_le_bytes();
            let (cs, next) = (cpu.segments[1].selector, cpu.rip + 7);
            let outcome = cpu.run(&[opcode, 0x78, 0x56, 0x34, 0x12, selector[0], selector[1]]);
            assert_eq!(outcome, expected, "{opcode:x} {case:?}");
            if expected == DONE {
                assert_eq!((cpu.rip, cpu.cpl), (0x1234_5678, case.cpl));
                assert_eq!(cpu.segments[1].selector, SLOT | u16::from(case.cpl), "RPL becomes CPL");
                if opcode == 0x9a {
                    assert_eq!(cpu[Gpr::Rsp], STACK - 8);
                    assert_eq!((cpu.peek(STACK - 4, 4), cpu.peek(STACK - 8, 4)), (cs.into(), next));
                }
            } else {
                assert_eq!((cpu[Gpr::Rsp], cpu.peek(STACK - 8, 8)), (STACK, 0));
            }
        }
    }
}

/// RET and IRET to every code segment.
#[test]
fn returns_over_all_code_segments() {
    for case in cases() {
        let privileged = case.rpl >= case.cpl
            && if case.is_conforming() { case.dpl <= case.rpl } else { case.dpl == case.rpl };
        let mut expected = match (case.is_code() && privileged, case.present) {
            (false, _) => exception(13, SLOT.into()),
            (true, false) => exception(11, SLOT.into()),
            (true, true) => DONE,
        };
        // The only outer stack here is that of level 3.
        if expected == DONE && case.rpl > case.cpl && case.rpl != 3 {
            expected = exception(13, u32::from(DATA3));
        }
        for (iret, bytes) in [(false, &[0xcb][..]), (true, &[0xcf])] {
            let mut cpu = prepared(Mode::Protected32, case);
            let slots: &[u64] = if iret {
                &[0x1000, case.selector().into(), 0x202, 0x5000, (DATA3 | 3).into()]
            } else {
                &[0x1000, case.selector().into(), 0x5000, (DATA3 | 3).into()]
            };
            for (index, slot) in slots.iter().enumerate() {
                cpu.poke(STACK + 4 * index as u64, 4, *slot);
            }
            assert_eq!(cpu.run(bytes), expected, "{iret} {case:?}");
            if expected == DONE {
                assert_eq!((cpu.rip, cpu.cpl), (0x1000, case.rpl));
                let same = STACK + if iret { 12 } else { 8 };
                assert_eq!(cpu[Gpr::Rsp], if case.rpl > case.cpl { 0x5000 } else { same });
                assert_eq!(cpu.nmi_unblocked, iret);
            }
        }
    }
}

/// INT n through every kind of gate, and to every kind of code segment behind an interrupt gate.
#[test]
fn gates_over_all_descriptors() {
    const INT: &[u8] = &[0xcd, 0x21];
    for case in cases() {
        let mut cpu = world(Mode::Protected32, case.cpl);
        let access = case.access();
        cpu.poke(IDT + 8 * 0x21, 8, gate(access, CODE0, 0x1234, 0));
        let is_gate = matches!(case.kind, 6 | 7 | 0xe | 0xf | 5);
        let code = 0x21 * 8 + 2;
        let expected = match (is_gate && case.dpl >= case.cpl, case.present) {
            (false, _) => exception(13, code),
            (true, false) => exception(11, code),
            // A task gate with a code segment for a task.
            (true, true) if case.kind == 5 => exception(13, CODE0.into()),
            // The stacks of levels 1 and 2 do not exist, but CODE0 is of level 0.
            (true, true) => DONE,
        };
        assert_eq!(cpu.run(INT), expected, "{case:?}");

        let mut cpu = prepared(Mode::Protected32, case);
        cpu.poke(IDT + 8 * 0x21, 8, gate(0xee, SLOT | u16::from(case.rpl), 0x1234, 0));
        let valid = case.is_code() && case.dpl <= case.cpl;
        let inward = !case.is_conforming() && case.dpl < case.cpl;
        let expected = match (valid, case.present) {
            (false, _) => exception(13, SLOT.into()),
            (true, false) => exception(11, SLOT.into()),
            // No stack for levels 1 and 2: null selectors in the TSS.
            (true, true) if inward && case.dpl != 0 => exception(10, 0),
            (true, true) => DONE,
        };
        assert_eq!(cpu.run(INT), expected, "{case:?}");
        if expected == DONE {
            let level = if inward { 0 } else { case.cpl };
            assert_eq!((cpu.rip, cpu.cpl), (0x1234, level));
            assert_eq!(cpu[Gpr::Rsp], if inward { INNER - 20 } else { STACK - 12 });
        }
    }
}

#[test]
fn null_selectors() {
    for rpl in 0..4_u64 {
        let mut cpu = world(Mode::Protected32, 3);
        cpu[Gpr::Rax] = rpl;
        assert_eq!(cpu.run(&[0x8e, 0xd8]), DONE);
        let ds = cpu.segments[Seg::Ds as usize];
        assert!(u64::from(ds.selector) == rpl && !ds.attributes.present());
        assert_eq!(cpu.run(&[0x8e, 0xd0]), exception(13, 0), "SS");
        for cpl in [0, 3_u8] {
            let mut cpu = world(Mode::Long64, cpl);
            cpu[Gpr::Rax] = rpl;
            let allowed = cpl == 0 && rpl == 0;
            assert_eq!(cpu.run(&[0x8e, 0xd0]), if allowed { DONE } else { exception(13, 0) });
            assert_eq!(cpu.cpl, cpl);
        }
    }
    let mut cpu = world(Mode::Protected32, 0);
    assert_eq!(cpu.run(&[0xea, 0, 0, 0, 0, 3, 0]), exception(13, 0), "jmp 3:0");
}

#[test]
fn tables_end_at_their_limits() {
    let mut cpu = world(Mode::Protected32, 3);
    for (selector, vector) in [(DATA3 | 3, None), (0x83, Some(0x80)), (0xffff, Some(0xfffc)), (7, Some(4))] {
        cpu[Gpr::Rax] = selector.into();
        let expected = vector.map_or(DONE, |code| exception(13, code));
        assert_eq!(cpu.run(&[0x8e, 0xd8]), expected, "{selector:x}");
    }
    // The last byte of the descriptor counts.
    cpu.gdtr.limit = DATA3 + 6;
    cpu[Gpr::Rax] = (DATA3 | 3).into();
    assert_eq!(cpu.run(&[0x8e, 0xd8]), exception(13, DATA3.into()));
    // With an LDT.
    let mut cpu = world(Mode::Protected32, 3);
    cpu.poke(RAM + 0x400 + 8, 8, flat(0xf2, 0xc));
    cpu.ldtr.base = RAM + 0x400;
    cpu.ldtr.limit = 0xf;
    cpu.ldtr.attributes.0 = 0x82;
    cpu[Gpr::Rax] = 0xf;
    assert_eq!(cpu.run(&[0x8e, 0xd8]), DONE);
    assert_eq!(cpu.peek(RAM + 0x400 + 13, 1), 0xf3, "accessed");
    cpu[Gpr::Rax] = 0x17;
    assert_eq!(cpu.run(&[0x8e, 0xd8]), exception(13, 0x14));
}

#[test]
fn the_accessed_bit_is_set_by_an_exchange_or_faults_first() {
    let mut cpu = world(Mode::Protected32, 3);
    put(&mut cpu, SLOT, flat(0xf2, 0xc));
    cpu[Gpr::Rax] = (SLOT | 3).into();
    let mut disturbed = cpu.clone();
    disturbed.disturbed = 1;
    assert_eq!(disturbed.run(&[0x8e, 0xd8]), Outcome::Retry);
    let mut read_only = cpu.clone();
    read_only.read_only = vec![GDT >> 12];
    let fault = Exception::page_fault(3, GDT + u64::from(SLOT) + 5);
    assert_eq!(read_only.run(&[0x8e, 0xd8]), Outcome::Exception(fault), "a supervisor's write");
    assert_eq!(read_only.segments, cpu.segments);
    read_only.poke(GDT + u64::from(SLOT) + 5, 1, 0xf3);
    assert_eq!(read_only.run(&[0x8e, 0xd8]), DONE, "nothing to write");
}
