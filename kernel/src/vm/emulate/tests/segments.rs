//! Segmentation, canonical addresses and alignment checking.
use super::fake::{FakeCpu, RAM};
use crate::vm::emulate::{Access, AccessKind, Attributes, Exception, Gpr, KnownOperand, Mode, Outcome, Seg};

const LOAD: &[u8] = &[0x8b, 0x03]; // mov eax, [ebx]
const STORE: &[u8] = &[0x89, 0x03]; // mov [ebx], eax
const STACK_LOAD: &[u8] = &[0x8b, 0x45, 0x00]; // mov eax, [ebp]

fn protected() -> FakeCpu {
    let mut cpu = FakeCpu::new(Mode::Protected32);
    cpu[Gpr::Rbx] = RAM;
    cpu[Gpr::Rbp] = RAM;
    cpu
}

fn at(mut cpu: FakeCpu, offset: u64) -> FakeCpu {
    cpu[Gpr::Rbx] = offset;
    cpu[Gpr::Rbp] = offset;
    cpu
}

#[test]
fn limits() {
    let mut cpu = protected();
    cpu.segments[Seg::Ds as usize].limit = 0xffff;
    cpu.segments[Seg::Ss as usize].limit = 0xffff;
    at(cpu.clone(), 0xfffc).done(LOAD);
    at(cpu.clone(), 0xfffd).faults(LOAD, 13);
    at(cpu.clone(), 0xfffd).faults(STORE, 13);
    at(cpu.clone(), 0xffff_ffff).faults(LOAD, 13);
    at(cpu.clone(), 0xfffc).done(STACK_LOAD);
    at(cpu, 0xfffd).faults(STACK_LOAD, 12);
    // With a limit of 4 GiB an access that wraps faults.
    at(protected(), 0xffff_fffc).done(LOAD);
    at(protected(), 0xffff_fffd).faults(LOAD, 13);
    let mut cpu = at(protected(), 0xffff_effd);
    cpu.segments[Seg::Ds as usize].base = 0x1000;
    cpu.faults(LOAD, 13);
    // A base that wraps without the access wrapping is fine.
    let mut cpu = at(protected(), RAM + 0x1000);
    cpu.segments[Seg::Ds as usize].base = 0xffff_f000;
    cpu.poke(RAM, 4, 9);
    cpu.done(LOAD);
    assert_eq!(cpu[Gpr::Rax], 9);
}

#[test]
fn expand_down() {
    for (big, top) in [(0, 0xffff_u64), (1 << 10, 0xffff_ffff)] {
        let mut cpu = protected();
        let ds = &mut cpu.segments[Seg::Ds as usize];
        ds.attributes = Attributes(0x97 | big);
        ds.limit = 0xfff;
        at(cpu.clone(), 0x1000).done(LOAD);
        at(cpu.clone(), 0xfff).faults(LOAD, 13);
        at(cpu.clone(), 0).faults(LOAD, 13);
        at(cpu.clone(), top - 3).done(LOAD);
        at(cpu.clone(), (top - 2) & 0xffff_ffff).faults(LOAD, 13);
    }
}

#[test]
fn types() {
    let with = |attributes: u16| {
        let mut cpu = protected();
        cpu.segments[Seg::Ds as usize].attributes = Attributes(attributes);
        cpu.segments[Seg::Ss as usize].attributes = Attributes(attributes);
        cpu
    };
    with(0x491).done(LOAD); // read-only data
    with(0x491).faults(STORE, 13);
    with(0x491).faults(&[0x83, 0x0b, 1], 13); // or [ebx], 1 may not even read
    with(0x49b).done(LOAD); // readable code
    with(0x49b).faults(STORE, 13);
    with(0x499).faults(LOAD, 13); // execute-only code
    with(0).faults(LOAD, 13); // null selector
    with(0).faults(STACK_LOAD, 12);
    // Code segments are never written, except in real mode, where types do not matter.
    protected().faults(&[0x2e, 0x89, 0x03], 13);
    let mut cpu = FakeCpu::new(Mode::Real);
    cpu.base = 0;
    cpu.done(&[0x2e, 0x89, 0x07]);
}

#[test]
fn real_mode_faults_carry_no_error_code() {
    let mut cpu = FakeCpu::new(Mode::Real);
    cpu[Gpr::Rbx] = 0xffff;
    cpu[Gpr::Rbp] = 0xffff;
    let expect = |vector, error_code| Outcome::Exception(Exception { vector, error_code, cr2: None });
    assert_eq!(cpu.run(&[0x8b, 0x07]), expect(13, None));
    assert_eq!(cpu.run(&[0x8b, 0x46, 0x00]), expect(12, None));
    assert_eq!(cpu.run(&[0x67, 0x8b, 0x83, 0, 0, 1, 0]), expect(13, None));
    let mut cpu = FakeCpu::new(Mode::Vm86);
    cpu[Gpr::Rbx] = 0xffff;
    assert_eq!(cpu.run(&[0x8b, 0x07]), expect(13, Some(0)));
}

#[test]
fn canonical_addresses() {
    let long = |address| at(FakeCpu::long(), address);
    long(0x7fff_ffff_fffc).done(LOAD);
    long(0x7fff_ffff_fffd).faults(LOAD, 13); // its last byte is not canonical
    long(0x8000_0000_0000).faults(LOAD, 13);
    long(0x8000_0000_0000).faults(STACK_LOAD, 12);
    long(0xffff_7fff_ffff_ffff).faults(LOAD, 13);
    long(0xffff_8000_0000_0000).done(LOAD);
    long(0xffff_ffff_ffff_fffc).done(LOAD);
    long(0xffff_ffff_ffff_fffd).faults(LOAD, 13); // wraps around
                                                  // The override is ignored, the base register names the stack.
    long(0x8000_0000_0000).faults(&[0x3e, 0x8b, 0x45, 0x00], 12);
    // FS applies, and then it is not the stack.
    long(0x8000_0000_0000).faults(&[0x64, 0x8b, 0x45, 0x00], 13);
    let mut cpu = long(0x8000_0000_0000);
    cpu.linear_bits = 57;
    cpu.done(LOAD);
    cpu[Gpr::Rbx] = 1 << 56;
    cpu.faults(LOAD, 13);
    // With a 32-bit address size nothing can be out of range.
    long(0x8000_0000_0000).done(&[0x67, 0x8b, 0x03]);
}

#[test]
fn alignment_checking() {
    let aligned = |cpl, rflags, cr0| {
        let mut cpu = FakeCpu::long();
        (cpu.cpl, cpu.rflags, cpu.cr0) = (cpl, rflags, cr0);
        cpu[Gpr::Rbx] = RAM + 2;
        cpu
    };
    let (ac, am) = (0x4_0002, 0x4_0011);
    aligned(3, ac, am).faults(LOAD, 17);
    aligned(3, ac, am).faults(STORE, 17);
    aligned(3, ac, am).done(&[0x66, 0x8b, 0x03]); // two bytes at an even address
    aligned(0, ac, am).done(LOAD);
    aligned(3, 2, am).done(LOAD);
    aligned(3, ac, 0x11).done(LOAD);
}

#[test]
fn what_an_exit_knows_is_used_only_for_the_same_access() {
    let sole = |kind| Access { kind, sole: true };
    let read = sole(AccessKind::Read);
    let known = KnownOperand { gpa: 0xfee0_00b0, linear: None, write: false };
    assert_eq!(known.translate(0xffff_ffff_ff5f_c0b0, 4, read), Some(0xfee0_00b0));
    assert_eq!(known.translate(0xffff_ffff_ff5f_c0b4, 4, read), None);
    assert_eq!(known.translate(0x10b0, 4, Access { sole: false, ..read }), None);
    assert_eq!(known.translate(0x10b0, 4, sole(AccessKind::Write)), None);
    assert_eq!(known.translate(0x10b0, 4, sole(AccessKind::ReadModify)), None);
    assert_eq!(known.translate(0x10b0, 4, sole(AccessKind::System)), None);
    let known = KnownOperand { write: true, ..known };
    for kind in [AccessKind::Read, AccessKind::Write, AccessKind::ReadModify] {
        assert_eq!(known.translate(0x10b0, 4, sole(kind)), Some(0xfee0_00b0));
    }
    let known = KnownOperand { linear: Some(0x10b0), ..known };
    assert_eq!(known.translate(0x10b0, 4, read), Some(0xfee0_00b0));
    assert_eq!(known.translate(0x20b0, 4, read), None);
    let known = KnownOperand { gpa: 0x5ffe, linear: None, write: true };
    assert_eq!(known.translate(0x1ffe, 2, read), Some(0x5ffe));
    assert_eq!(known.translate(0x1ffe, 4, read), None); // crosses the page
}
