//! System instructions: privileges, modes, control and debug registers, tables, system calls.
use super::fake::{FakeCpu, RAM};
use super::world::*;
use crate::hw::TableRegister;
use crate::vm::emulate::{Attributes, Exception, Gpr, Mode, Outcome, Seg};

const UD: Outcome = Outcome::Exception(Exception::INVALID_OPCODE);
const DB: Outcome = Outcome::Exception(Exception { vector: 1, error_code: None, cr2: None });

#[test]
fn privileged_instructions_need_level_0() {
    let cases: &[&[u8]] = &[
        &[0xf4],             // hlt
        &[0x0f, 0x06],       // clts
        &[0x0f, 0x08],       // invd
        &[0x0f, 0x09],       // wbinvd
        &[0x0f, 0x20, 0xc0], // mov eax, cr0
        &[0x0f, 0x22, 0xc0], // mov cr0, eax
        &[0x0f, 0x21, 0xc0], // mov eax, dr0
        &[0x0f, 0x23, 0xc0], // mov dr0, eax
        &[0x0f, 0x01, 0x13], // lgdt [ebx]
        &[0x0f, 0x01, 0x1b], // lidt [ebx]
        &[0x0f, 0x01, 0x3b], // invlpg [ebx]
        &[0x0f, 0x01, 0xf0], // lmsw ax
        &[0x0f, 0x32],       // rdmsr
        &[0x0f, 0x30],       // wrmsr
        &[0x0f, 0x33],       // rdpmc
        &[0x0f, 0x00, 0xd0], // lldt ax
        &[0x0f, 0x00, 0xd8], // ltr ax
    ];
    for mode in [Mode::Protected32, Mode::Long64] {
        for cpl in 1..4 {
            for bytes in cases {
                let mut cpu = world(mode, cpl);
                cpu[Gpr::Rbx] = RAM;
                cpu.faults(bytes, 13);
            }
        }
    }
}

#[test]
fn what_the_8086_modes_and_this_cpu_do_not_have() {
    for mode in [Mode::Real, Mode::Vm86] {
        // SLDT, STR, LLDT, LTR, VERR, VERW, LAR, LSL; ARPL.
        for reg in 0..6_u8 {
            assert_eq!(FakeCpu::new(mode).run(&[0x0f, 0x00, 0xc0 | reg << 3]), UD);
        }
        assert_eq!(FakeCpu::new(mode).run(&[0x0f, 0x02, 0xc3]), UD);
        assert_eq!(FakeCpu::new(mode).run(&[0x63, 0xc3]), UD);
    }
    let undefined: &[&[u8]] = &[
        &[0x0f, 0x01, 0xc8], // monitor
        &[0x0f, 0x01, 0xc9], // mwait
        &[0x0f, 0x01, 0xc1], // vmcall
        &[0x0f, 0x01, 0xc2], // vmlaunch
        &[0x0f, 0x01, 0xd8], // vmrun
        &[0x0f, 0x01, 0xd9], // vmmcall
        &[0x0f, 0x78, 0xc3], // vmread
        &[0x0f, 0xaa],       // rsm
        &[0x0f, 0x0b],       // ud2
        &[0x0f, 0x20, 0xc8], // mov eax, cr1
        &[0x0f, 0x20, 0xe8], // mov eax, cr5
        &[0x0f, 0x01, 0xd0], // xgetbv without CR4.OSXSAVE
        &[0x0f, 0x01, 0xd1], // xsetbv likewise
        &[0x0f, 0x05],       // syscall without EFER.SCE
    ];
    for mode in [Mode::Protected32, Mode::Long64] {
        for bytes in undefined {
            assert_eq!(world(mode, 0).run(bytes), UD, "{bytes:02x?}");
        }
    }
    assert_eq!(world(Mode::Protected32, 0).run(&[0x0f, 0x01, 0xf8, 0x90]), UD, "swapgs");
    assert_eq!(world(Mode::Protected32, 0).run(&[0x8e, 0xc8]), UD, "mov cs, ax");
}

#[test]
fn mov_ss_and_pop_ss_begin_a_shadow() {
    let mut cpu = world(Mode::Protected32, 0);
    (cpu.shadow, cpu.rflags) = (false, 0x1_0102);
    cpu[Gpr::Rax] = DATA0.into();
    assert_eq!(cpu.run(&[0x8e, 0xd0]), DONE, "no trap");
    assert!(cpu.shadow && cpu.rflags == 0x102);
    cpu.shadow = false;
    cpu.poke(STACK, 4, 0xffff_0000 | u64::from(DATA0));
    assert_eq!(cpu.run(&[0x17]), DONE);
    assert!(cpu.shadow && cpu[Gpr::Rsp] == STACK + 4);
    // Others trap and begin none.
    cpu[Gpr::Rax] = DATA3.into();
    assert_eq!(cpu.run(&[0x8e, 0xd8]), Outcome::Done { trap: true });
    assert!(!cpu.shadow);
    cpu[Gpr::Rbx] = RAM + 0x1000;
    cpu.poke(RAM + 0x1000, 8, u64::from(DATA0) << 32 | 0x1234_5678);
    assert_eq!(cpu.run(&[0x0f, 0xb2, 0x03]), Outcome::Done { trap: true }, "lss eax, [ebx]");
    assert!(!cpu.shadow && cpu[Gpr::Rax] == 0x1234_5678);
}

#[test]
fn segment_registers_are_stored_and_pushed() {
    let mut cpu = world(Mode::Protected32, 3);
    cpu[Gpr::Rax] = u64::MAX;
    cpu[Gpr::Rbx] = RAM + 0x1000;
    cpu.done(&[0x8c, 0xc8]); // mov eax, cs
    assert_eq!(cpu[Gpr::Rax], (CODE3 | 3).into());
    cpu.poke(RAM + 0x1000, 4, 0xffff_ffff);
    cpu.done(&[0x8c, 0x0b]); // mov [ebx], cs
    assert_eq!(cpu.peek(RAM + 0x1000, 4), 0xffff_0000 | u64::from(CODE3 | 3));
    cpu.done(&[0x0e]); // push cs
    assert_eq!((cpu[Gpr::Rsp], cpu.peek(STACK - 4, 2)), (STACK - 4, (CODE3 | 3).into()));
    cpu.done(&[0x1f]); // pop ds: not readable at this RPL? It is: readable code of level 3.
    assert_eq!(cpu.segments[Seg::Ds as usize].selector, CODE3 | 3);
    let mut cpu = world(Mode::Long64, 0);
    cpu.done(&[0x0f, 0xa0]); // push fs
    assert_eq!(cpu[Gpr::Rsp], STACK - 8);
    cpu.done(&[0x0f, 0xa9]); // pop gs
    assert_eq!((cpu[Gpr::Rsp], cpu.segments[Seg::Gs as usize].selector), (STACK, DATA3 | 3));
}

#[test]
fn table_registers() {
    let mut cpu = world(Mode::Protected32, 0);
    cpu[Gpr::Rbx] = RAM + 0x1000;
    cpu.poke(RAM + 0x1000, 8, 0xffff_8765_4321_0123);
    cpu.done(&[0x0f, 0x01, 0x13]);
    assert_eq!(cpu.gdtr, TableRegister { base: 0x8765_4321, limit: 0x123 });
    cpu.done(&[0x66, 0x0f, 0x01, 0x1b]);
    assert_eq!(cpu.idtr, TableRegister { base: 0x65_4321, limit: 0x123 }, "24 bits");
    cpu[Gpr::Rbx] = RAM + 0x1100;
    cpu.done(&[0x0f, 0x01, 0x03]);
    assert_eq!(cpu.peek(RAM + 0x1100, 8), 0x8765_4321_0123);
    cpu.cr4 = 1 << 11;
    cpu.cpl = 3;
    cpu.clone().faults(&[0x0f, 0x01, 0x03], 13); // UMIP
    cpu.clone().faults(&[0x0f, 0x00, 0xc8], 13);
    cpu.clone().faults(&[0x0f, 0x01, 0xe0], 13);

    let mut cpu = world(Mode::Long64, 0);
    cpu[Gpr::Rbx] = RAM + 0x1000;
    cpu.poke(RAM + 0x1000, 2, 0x7f);
    cpu.poke(RAM + 0x1002, 8, 0xffff_8000_0000_0000);
    cpu.done(&[0x0f, 0x01, 0x13]);
    assert_eq!(cpu.gdtr, TableRegister { base: 0xffff_8000_0000_0000, limit: 0x7f });
    cpu.poke(RAM + 0x1002, 8, 0x8000_0000_0000);
    cpu.clone().faults(&[0x0f, 0x01, 0x13], 13);
    cpu.done(&[0x0f, 0x01, 0x0b]);
    assert_eq!((cpu.peek(RAM + 0x1000, 2), cpu.peek(RAM + 0x1002, 8)), (0x7ff, IDT));
}

#[test]
fn ldtr_and_tr() {
    let mut cpu = world(Mode::Protected32, 0);
    put(&mut cpu, SLOT, system(0x82, 0x12_3456, 0x77));
    put(&mut cpu, SLOT2, system(0x89, 0x65_4321, 0x67));
    cpu[Gpr::Rax] = SLOT.into();
    cpu.done(&[0x0f, 0x00, 0xd0]);
    assert_eq!((cpu.ldtr.base, cpu.ldtr.limit, cpu.ldtr.selector), (0x12_3456, 0x77, SLOT));
    assert_eq!(cpu.clone().run(&[0x0f, 0x00, 0xd8]), exception(13, SLOT.into()), "an LDT is no task");
    cpu[Gpr::Rax] = SLOT2.into();
    cpu.done(&[0x0f, 0x00, 0xd8]);
    assert_eq!(cpu.segments[6].attributes, Attributes(0x8b));
    assert_eq!(cpu.peek(GDT + u64::from(SLOT2) + 5, 1), 0x8b, "busy");
    assert_eq!(cpu.clone().run(&[0x0f, 0x00, 0xd8]), exception(13, SLOT2.into()), "busy");
    cpu.done(&[0x0f, 0x00, 0xc9]); // str ecx
    assert_eq!(cpu[Gpr::Rcx], SLOT2.into());
    cpu[Gpr::Rax] = 0;
    assert_eq!(cpu.clone().run(&[0x0f, 0x00, 0xd8]), exception(13, 0));
    cpu.done(&[0x0f, 0x00, 0xd0]);
    assert!(!cpu.ldtr.attributes.present());
    for (descriptor, instruction, vector) in
        [(system(0x02, 0, 0), 0xd0, 11), (system(0x09, 0, 0), 0xd8, 11), (flat(0x93, 0), 0xd0, 13)]
    {
        put(&mut cpu, SLOT3, descriptor);
        cpu[Gpr::Rax] = SLOT3.into();
        assert_eq!(cpu.clone().run(&[0x0f, 0x00, instruction]), exception(vector, SLOT3.into()));
    }
    cpu[Gpr::Rax] = 0x54;
    assert_eq!(cpu.run(&[0x0f, 0x00, 0xd0]), exception(13, 0x54), "not out of the LDT");

    // Sixteen bytes in long mode.
    let mut cpu = world(Mode::Long64, 0);
    put(&mut cpu, SLOT, system(0x89, 0x1234_5678, 0x67));
    put(&mut cpu, SLOT + 8, 0xffff_8000);
    cpu[Gpr::Rax] = SLOT.into();
    cpu.clone().done(&[0x0f, 0x00, 0xd8]);
    put(&mut cpu, SLOT + 8, 0x8000);
    assert_eq!(cpu.run(&[0x0f, 0x00, 0xd8]), exception(13, SLOT.into()), "not canonical");
    put(&mut cpu, SLOT, system(0x81, 0, 0x67));
    assert_eq!(cpu.run(&[0x0f, 0x00, 0xd8]), exception(13, SLOT.into()), "no 16-bit tasks");
}

#[test]
fn from_real_to_protected_to_long_mode() {
    let mut cpu = FakeCpu::new(Mode::Real);
    cpu.cr0 = 0x10;
    cpu[Gpr::Rax] = 0x11;
    cpu.done(&[0x0f, 0x22, 0xc0]);
    assert_eq!((cpu.mode, cpu.cpl, cpu.cr0), (Mode::Protected16, 0, 0x11));
    cpu[Gpr::Rax] = 1 << 5;
    cpu.done(&[0x0f, 0x22, 0xe0]);
    cpu[Gpr::Rax] = 0x7000;
    cpu.done(&[0x0f, 0x22, 0xd8]);
    assert_eq!((cpu.cr3, cpu.flushes), (0x7000, 2));
    cpu.efer = 0x100;
    cpu[Gpr::Rax] = 0x8000_0011;
    cpu.done(&[0x0f, 0x22, 0xc0]);
    assert_eq!((cpu.efer, cpu.cr0, cpu.mode), (0x500, 0x8000_0011, Mode::Protected16));
    cpu.done(&[0x0f, 0x20, 0xc1]); // mov ecx, cr0
    assert_eq!(cpu[Gpr::Rcx], 0x8000_0011);
    cpu[Gpr::Rax] = 1 << 31;
    cpu.faults(&[0x0f, 0x22, 0xc0], 13);
    // PAE without long mode loads PDPTEs, and refuses bad ones.
    let mut cpu = world(Mode::Protected32, 0);
    (cpu.cr4, cpu.pdptes) = (1 << 5, [0x1001, 0, 0, 0]);
    cpu[Gpr::Rax] = 0x8000_0011;
    let mut bad = cpu.clone();
    cpu.done(&[0x0f, 0x22, 0xc0]);
    assert_eq!(cpu.loaded_pdptes, Some([0x1001, 0, 0, 0]));
    bad.pdptes[3] = 3;
    bad.faults(&[0x0f, 0x22, 0xc0], 13);
}

#[test]
fn task_priority_and_machine_status() {
    let mut cpu = world(Mode::Long64, 0);
    cpu[Gpr::Rax] = 9;
    cpu.done(&[0x44, 0x0f, 0x22, 0xc0]); // mov cr8, rax
    cpu.done(&[0x44, 0x0f, 0x20, 0xc1]); // mov rcx, cr8
    assert_eq!((cpu.cr8, cpu[Gpr::Rcx]), (9, 9));
    cpu[Gpr::Rax] = 0x10;
    cpu.faults(&[0x44, 0x0f, 0x22, 0xc0], 13);
    cpu.cr0 = 0x8000_0011;
    cpu[Gpr::Rax] = 0xe;
    cpu.done(&[0x0f, 0x01, 0xf0]); // lmsw ax
    assert_eq!(cpu.cr0, 0x8000_001f);
    cpu.done(&[0x0f, 0x06]); // clts
    cpu.done(&[0x0f, 0x01, 0xe1]); // smsw ecx
    assert_eq!(cpu[Gpr::Rcx], 0x8000_0017);
}

#[test]
fn debug_registers() {
    let mut cpu = world(Mode::Long64, 0);
    cpu[Gpr::Rax] = 0x1234_5678_9abc;
    cpu.done(&[0x0f, 0x23, 0xd8]); // mov dr3, rax
    cpu.done(&[0x0f, 0x21, 0xd9]); // mov rcx, dr3
    assert_eq!(cpu[Gpr::Rcx], 0x1234_5678_9abc);
    cpu.clone().faults(&[0x0f, 0x23, 0xf8], 13); // the high half of DR7
    cpu[Gpr::Rax] = 0xffff_ffff;
    cpu.done(&[0x0f, 0x23, 0xe0]); // DR4 is DR6
    assert_eq!(cpu.debug[6], 0xffff_eff0 & 0xffff_0ff0 | 0xe00f);
    cpu.cr4 = 8;
    assert_eq!(cpu.clone().run(&[0x0f, 0x23, 0xe0]), UD);
    cpu.done(&[0x0f, 0x23, 0xf8]);
    assert_eq!(cpu.debug[7], 0xffff_27ff);
    // Guarded: the next access traps, once.
    cpu.debug[6] = 0xffff_0ff0;
    assert_eq!(cpu.run(&[0x0f, 0x21, 0xc0]), DB);
    assert_eq!((cpu.debug[6], cpu.debug[7]), (0xffff_2ff0, 0xffff_07ff));
    cpu.done(&[0x0f, 0x21, 0xc0]);
}

#[test]
fn msrs_cpuid_halt_and_the_rest() {
    let mut cpu = world(Mode::Protected32, 0);
    cpu.msrs = vec![(0x10, 0x1_0000_0002)];
    (cpu.tsc, cpu.tsc_aux) = (0x7_0000_0002, Some(5));
    cpu[Gpr::Rcx] = 0x10;
    cpu.done(&[0x0f, 0x32]);
    assert_eq!((cpu[Gpr::Rax], cpu[Gpr::Rdx]), (2, 1));
    cpu[Gpr::Rdx] = 7;
    cpu.done(&[0x0f, 0x30]);
    assert_eq!(cpu.msrs[0], (0x10, 0x7_0000_0002));
    cpu.done(&[0x0f, 0x01, 0xf9]); // rdtscp
    assert_eq!((cpu[Gpr::Rdx], cpu[Gpr::Rcx]), (7, 5));
    cpu.clone().faults(&[0x0f, 0x32], 13); // MSR 5
    cpu.clone().faults(&[0x0f, 0x33], 13); // rdpmc
    cpu.cr4 = 4;
    cpu.done(&[0x0f, 0x31]);
    cpu.cpl = 3;
    cpu.clone().faults(&[0x0f, 0x31], 13); // TSD
    cpu[Gpr::Rax] = 0x1_0000_0003;
    cpu.done(&[0x0f, 0xa2]);
    assert_eq!(cpu.gprs[..4], [3, 5, 0xd, 0xb]);
    cpu.cpl = 0;
    cpu.done(&[0xf4]);
    assert!(cpu.halted);
    cpu.done(&[0x0f, 0x01, 0x3b]); // invlpg [ebx]
    assert_eq!(cpu.flushes, 1);
    // XCR0.
    cpu.cr4 = 1 << 18;
    (cpu[Gpr::Rcx], cpu[Gpr::Rax], cpu[Gpr::Rdx]) = (0, 7, 0);
    cpu.done(&[0x0f, 0x01, 0xd1]);
    assert_eq!(cpu.xcr0, 7);
    cpu[Gpr::Rax] = 6;
    cpu.clone().faults(&[0x0f, 0x01, 0xd1], 13);
    cpu.done(&[0x0f, 0x01, 0xd0]);
    assert_eq!(cpu[Gpr::Rax], 7);
    // INVPCID.
    cpu[Gpr::Rbx] = RAM + 0x1000;
    cpu[Gpr::Rax] = 2;
    cpu.done(&[0x66, 0x0f, 0x38, 0x82, 0x03]);
    assert_eq!(cpu.flushes, 2);
    cpu[Gpr::Rax] = 4;
    cpu.faults(&[0x66, 0x0f, 0x38, 0x82, 0x03], 13);
}

#[test]
fn questions_about_descriptors() {
    let mut cpu = world(Mode::Protected32, 3);
    put(&mut cpu, SLOT, system(0xe2, 0, 0x1234));
    put(&mut cpu, SLOT2, gate(0xec, CODE0, 0, 0));
    for (selector, rights, limit, reads, writes) in [
        (DATA3 | 3, Some(0xcf_f300), Some(0xffff_ffff), true, true),
        (CODE3, Some(0xcf_fb00), Some(0xffff_ffff), true, false),
        (DATA0, None, None, false, false),
        (CONFORMING | 3, Some(0xcf_9f00), Some(0xffff_ffff), true, false),
        (SLOT, Some(0xe200), Some(0x1234), false, false),
        (SLOT2, Some(0xec00), None, false, false),
        (0, None, None, false, false),
        (0x80, None, None, false, false),
    ] {
        cpu[Gpr::Rbx] = selector.into();
        let mut ask = |bytes: &[u8]| {
            cpu[Gpr::Rax] = 0x5555;
            cpu.done(bytes);
            (cpu[Gpr::Rax], cpu.rflags & 0x40 != 0)
        };
        let answer = |value: Option<u64>| (value.unwrap_or(0x5555), value.is_some());
        // Bits 19:16 of the access rights are undefined; here they are zero.
        assert_eq!(ask(&[0x0f, 0x02, 0xc3]), answer(rights.map(|r: u64| r & 0xf0_ff00)), "lar {selector:x}");
        assert_eq!(ask(&[0x0f, 0x03, 0xc3]), answer(limit), "lsl {selector:x}");
        assert_eq!(ask(&[0x0f, 0x00, 0xe3]).1, reads, "verr {selector:x}");
        assert_eq!(ask(&[0x0f, 0x00, 0xeb]).1, writes, "verw {selector:x}");
    }
    (cpu[Gpr::Rax], cpu[Gpr::Rbx]) = (0x10, 3);
    cpu.done(&[0x63, 0xd8]); // arpl ax, bx
    assert_eq!((cpu[Gpr::Rax], cpu.rflags & 0x40), (0x13, 0x40));
    cpu.done(&[0x63, 0xd8]);
    assert_eq!((cpu[Gpr::Rax], cpu.rflags & 0x40), (0x13, 0));
}

#[test]
fn fast_system_calls() {
    const LSTAR: u64 = 0xffff_8000_0000_1000;
    let msrs = vec![
        (0x174, 0x8),
        (0x175, 0xffff_8000_0000_2000),
        (0x176, LSTAR),
        (0xc000_0081, 0x0013_0008_0000_4000),
        (0xc000_0082, LSTAR),
        (0xc000_0083, LSTAR + 0x100),
        (0xc000_0084, 0x300),
    ];
    let mut cpu = world(Mode::Long64, 3);
    (cpu.msrs, cpu.efer, cpu.rflags) = (msrs.clone(), 0x501, 0x1_0302);
    let next = cpu.rip + 2;
    assert_eq!(cpu.run(&[0x0f, 0x05]), DONE, "SFMASK masks TF");
    assert_eq!((cpu.rip, cpu.cpl, cpu.rflags), (LSTAR, 0, 2));
    assert_eq!((cpu[Gpr::Rcx], cpu[Gpr::R11]), (next, 0x302));
    assert_eq!((cpu.segments[1].selector, cpu.segments[2].selector), (8, 0x10));
    assert_eq!(cpu.run(&[0x48, 0x0f, 0x07]), DONE);
    assert_eq!((cpu.rip, cpu.cpl, cpu.rflags, cpu.mode), (next, 3, 0x302, Mode::Long64));
    assert_eq!((cpu.segments[1].selector, cpu.segments[2].selector), (0x23, 0x1b));
    // To 32-bit code.
    cpu.cpl = 0;
    cpu[Gpr::Rcx] = 0x7_0000_1234;
    assert_eq!(cpu.run(&[0x0f, 0x07]), Outcome::Done { trap: true });
    assert_eq!((cpu.rip, cpu.segments[1].selector, cpu.mode), (0x1234, 0x13, Mode::Protected32));
    // Intel has neither outside 64-bit mode; AMD goes to CSTAR.
    assert_eq!(cpu.clone().run(&[0x0f, 0x05]), UD);
    cpu.limits.amd = true;
    assert_eq!(cpu.run(&[0x0f, 0x05]), DONE);
    assert_eq!(cpu.rip, LSTAR + 0x100);
    assert_eq!(cpu.run(&[0x0f, 0x34]), UD, "AMD has no SYSENTER in long mode");
    let mut cpu = world(Mode::Long64, 0);
    (cpu.msrs, cpu.efer) = (msrs.clone(), 0x501);
    cpu[Gpr::Rcx] = 1 << 47;
    cpu.faults(&[0x48, 0x0f, 0x07], 13);

    let mut cpu = world(Mode::Long64, 3);
    (cpu.msrs, cpu.rflags) = (msrs.clone(), 0x202);
    assert_eq!(cpu.run(&[0x0f, 0x34]), DONE);
    assert_eq!((cpu.rip, cpu[Gpr::Rsp], cpu.rflags), (LSTAR, 0xffff_8000_0000_2000, 2));
    (cpu[Gpr::Rdx], cpu[Gpr::Rcx]) = (0x1_0000_1000, 0x1_0000_2000);
    assert_eq!(cpu.run(&[0x48, 0x0f, 0x35]), DONE);
    assert_eq!((cpu.rip, cpu[Gpr::Rsp], cpu.cpl), (0x1_0000_1000, 0x1_0000_2000, 3));
    assert_eq!((cpu.segments[1].selector, cpu.segments[2].selector), (0x2b, 0x33));
    cpu.msrs[0].1 = 3;
    cpu.clone().faults(&[0x0f, 0x34], 13);

    let mut cpu = world(Mode::Long64, 0);
    cpu.msrs = vec![(0xc000_0102, 0x1234)];
    cpu.segments[Seg::Gs as usize].base = 0x5678;
    cpu.done(&[0x0f, 0x01, 0xf8]);
    assert_eq!((cpu.segments[Seg::Gs as usize].base, cpu.msrs[0].1), (0x1234, 0x5678));
}
