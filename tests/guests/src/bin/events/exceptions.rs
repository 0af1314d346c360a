//! Every exception that software can raise, with its error code and the RIP it reports.
use guests::machine::{self, CODE32, CODE64, DATA, SCRATCH};
use guests::paging::{Space, E_P, E_U, E_W, P, PLAYGROUND, W};
use guests::prelude::*;
use guests::report::{case, fault_case};
use guests::trap::{self, catch, Eoi, Gate, AC, BP, DB, DE, GP, MF, NM, NP, OF, PF, SS, TS, UD, XM};
use guests::user::{self, Start};
use guests::{exec, frames};

/// A data segment descriptor that is not present, and a present one. AMD APM vol. 2, 4.7.
const NOT_PRESENT_DATA: u64 = 0x00cf_1300_0000_ffff;
const NOT_PRESENT_CODE: u64 = 0x00af_1b00_0000_ffff;

/// An address that no case maps.
const MISSING: u64 = PLAYGROUND + 0x7000_0000;

pub(crate) fn run() {
    divide();
    traps();
    invalid_opcodes();
    coprocessor();
    segments();
    protection();
    page_faults();
    user_mode();
    registers();
}

fn divide() {
    fault_case(
        "de.by_zero",
        DE,
        Some(0),
        || exec!("div {0:e}", in(reg) 0u32, inout("eax") 1 => _, inout("edx") 0 => _),
    );
    fault_case(
        "de.overflow",
        DE,
        Some(0),
        || exec!("div {0:e}", in(reg) 1u32, inout("eax") 0 => _, inout("edx") 1 => _),
    );
    fault_case(
        "de.idiv_overflow",
        DE,
        Some(0),
        || exec!("idiv {0}", in(reg) -1i64, inout("rax") i64::MIN => _, inout("rdx") -1i64 => _),
    );
    case("de.rip_is_the_instruction", |t| {
        let mut at = 0u64;
        let at = &raw mut at;
        let got = catch(|| {
            exec!("lea {tmp}, [rip + 2f]", "mov [{at}], {tmp}", "2: div {zero:e}", at = in(reg) at, tmp = out(reg) _,
                zero = in(reg) 0u32, inout("eax") 1 => _, inout("edx") 0 => _)
        });
        let fault = t.faults("DIV", got, DE, Some(0));
        t.eq("RIP", fault.rip, peek::<u64>(at as u64));
    });
}

fn traps() {
    case("bp.int3", |t| {
        let got = catch(|| exec!("int3"));
        t.faults("INT3", got, BP, Some(0));
    });
    case("bp.rip_is_behind", |t| {
        trap::expect(BP, Eoi::None);
        let after: u64;
        exec!("xor {0:e}, {0:e}", "int3", "inc {0}", out(reg) after);
        t.eq("arrivals", trap::count(BP), 1u32);
        t.eq("instructions after it", after, 1u64);
    });
    case("bp.int_3_long_form", |t| {
        trap::expect(BP, Eoi::None);
        exec!(".byte 0xcd, 3");
        t.eq("arrivals", trap::count(BP), 1u32);
    });
    case("db.int1", |t| {
        if t.skip_on_tcg("INT1 is #UD") {
            return;
        }
        trap::expect(DB, Eoi::None);
        exec!(".byte 0xf1");
        t.eq("arrivals", trap::count(DB), 1u32);
    });
    case("of.int_4", |t| {
        trap::expect(OF, Eoi::None);
        exec!("int 4");
        t.eq("arrivals", trap::count(OF), 1u32);
    });
    case("of.into_is_invalid_in_64_bit_mode", |t| {
        let got = catch(|| exec!(".byte 0xce"));
        t.faults("INTO", got, UD, None);
    });
    case("of.into_in_compat_mode", |t| {
        // mov al, 0x7f; inc al; into; ud2
        let (fault, _) = user::run_low(&[0xb0, 0x7f, 0xfe, 0xc0, 0xce, 0x0f, 0x0b], Start::compat());
        // A gate of ring 0 refuses INTO from ring 3; that it tried is what counts.
        t.faults("INTO with OF set", Err::<(), _>(fault), GP, Some(trap::idt_error(OF)));
        trap::gate(OF, Gate::interrupt(trap::stub(OF), 3, 0));
        let (fault, _) = user::run_low(&[0xb0, 0x7f, 0xfe, 0xc0, 0xce, 0x0f, 0x0b], Start::compat());
        t.faults("INTO with OF set", Err::<(), _>(fault), OF, Some(0));
        t.eq("RIP", fault.rip, user::LOW_CODE + 5);
    });
    case("br.bound_in_compat_mode", |t| {
        trap_bound(t);
    });
    case("int.every_vector_by_software", |t| {
        // INT n for 32 to 255 through a generated instruction.
        let space = Space::current();
        space.map_new(PLAYGROUND, P | W);
        for vector in 32..=255u8 {
            trap::expect(vector, Eoi::None);
            poke(PLAYGROUND, [0xcd, vector, 0xc3]);
            exec!("call {}", in(reg) PLAYGROUND);
            t.check(
                trap::count(vector) == 1,
                format_args!("one arrival of {vector:#x}, got {}", trap::count(vector)),
            );
        }
    });
    case("int.gate_not_present", |t| {
        trap::gate(0x50, Gate::new(trap::stub(0x50), 0x0e, 0, 0));
        let got = catch(|| exec!("int 0x50"));
        t.faults("INT 50h", got, NP, Some(trap::idt_error(0x50)));
    });
    case("int.beyond_the_idt", |t| {
        trap::load_idt(trap::idt(), 0x40 * 16 - 1);
        let got = catch(|| exec!("int 0x50"));
        t.faults("INT 50h", got, GP, Some(trap::idt_error(0x50)));
    });
    case("int.bad_gate_type", |t| {
        trap::gate(0x50, Gate::new(trap::stub(0x50), 0x85, 0, 0));
        let got = catch(|| exec!("int 0x50"));
        t.faults("INT 50h", got, GP, Some(trap::idt_error(0x50)));
    });
    case("int.trap_gate_keeps_if", |t| {
        trap::gate(0x51, Gate::new(trap::stub(0x51), 0x8f, 0, 0));
        trap::on(0x51, Eoi::None, |frame| frame.rax = rflags());
        let flags: u64;
        exec!("sti", "int 0x51", "cli", out("rax") flags);
        t.eq("IF in the handler", flags & FLAG_IF, FLAG_IF);
    });
    case("int.interrupt_gate_clears_if", |t| {
        trap::on(0x51, Eoi::None, |frame| frame.rax = rflags());
        let flags: u64;
        exec!("sti", "int 0x51", "cli", out("rax") flags);
        t.eq("IF in the handler", flags & FLAG_IF, 0u64);
    });
}

fn trap_bound(t: &mut guests::report::Case) {
    // push 20; push 10; mov eax, 5; bound eax, [esp]; ud2
    let code = [0x6a, 20, 0x6a, 10, 0xb8, 5, 0, 0, 0, 0x62, 0x04, 0x24, 0x0f, 0x0b];
    let (fault, _) = user::run_low(&code, Start::compat());
    t.faults("BOUND", Err::<(), _>(fault), trap::BR, Some(0));
}

fn invalid_opcodes() {
    fault_case("ud.ud2", UD, Some(0), || exec!("ud2"));
    fault_case("ud.undefined_opcode", UD, Some(0), || exec!(".byte 0x0f, 0x04"));
    fault_case("ud.lock_on_a_register", UD, Some(0), || exec!(".byte 0xf0, 0x01, 0xc0", out("eax") _));
    case("ud.lock_on_a_load", |t| {
        if !t.skip_on_tcg("LOCK is ignored on loads") {
            let got = catch(|| exec!(".byte 0xf0, 0x8b, 0x07", in("rdi") trap::idt(), out("eax") _));
            t.faults("LOCK MOV", got, UD, Some(0));
        }
    });
    fault_case("ud.push_cs_in_64_bit_mode", UD, Some(0), || exec!(".byte 0x0e"));
    fault_case("ud.daa_in_64_bit_mode", UD, Some(0), || exec!(".byte 0x27"));
    fault_case("ud.far_call_immediate", UD, Some(0), || exec!(".byte 0x9a, 0, 0, 0, 0, 0, 0"));
    fault_case("ud.mov_to_cs", UD, Some(0), || exec!(".byte 0x8e, 0xc8", in("eax") 8));
    case("ud.sysenter_ok_syscall_needs_sce", |t| {
        wrmsr(MSR_EFER, rdmsr(MSR_EFER) & !EFER_SCE);
        let (fault, _) = user::run(&[0x0f, 0x05], Start::default());
        t.faults("SYSCALL without EFER.SCE", Err::<(), _>(fault), UD, Some(0));
    });
}

fn coprocessor() {
    case("nm.ts_set", |t| {
        set_cr0(cr0() | 8);
        let got = catch(|| exec!("fninit"));
        t.faults("FNINIT", got, NM, Some(0));
    });
    case("nm.em_set", |t| {
        set_cr0(cr0() | 4);
        let got = catch(|| exec!("fnop"));
        t.faults("FNOP", got, NM, Some(0));
    });
    case("nm.wait_with_mp_and_ts", |t| {
        set_cr0(cr0() | 0xa);
        let got = catch(|| exec!("fwait"));
        t.faults("FWAIT", got, NM, Some(0));
    });
    case("ud.sse_with_em", |t| {
        set_cr4(cr4() | 3 << 9);
        set_cr0(cr0() | 4);
        let got = catch(|| exec!("xorps xmm0, xmm0"));
        t.faults("XORPS", got, UD, Some(0));
    });
    case("ud.sse_without_osfxsr", |t| {
        set_cr4(cr4() & !(3 << 9));
        let got = catch(|| exec!("xorps xmm0, xmm0"));
        t.faults("XORPS", got, UD, Some(0));
    });
    case("mf.unmasked_zero_divide", |t| {
        set_cr0(cr0() & !0xc | 0x22);
        let control = 0x037bu16; // zero divide unmasked
        let got = catch(|| exec!("fninit", "fldcw [{}]", "fld1", "fldz", "fdivp", "fwait", in(reg) &control));
        exec!("fnclex", "fninit");
        t.faults("FWAIT after 1/0", got, MF, Some(0));
    });
    case("xm.unmasked_zero_divide", |t| {
        if t.skip_on_tcg("SSE exceptions are never raised") {
            return;
        }
        set_cr4(cr4() | 3 << 9);
        let control = 0x1d80u32; // zero divide unmasked
        let one = 0x3f80_0000u32;
        let got = catch(|| {
            exec!("ldmxcsr [{c}]", "movd xmm0, {o:e}", "xorps xmm1, xmm1", "divss xmm0, xmm1",
                c = in(reg) &control, o = in(reg) one)
        });
        let quiet = 0x1f80u32;
        exec!("ldmxcsr [{}]", in(reg) &quiet);
        t.faults("DIVSS", got, XM, Some(0));
    });
}

fn segments() {
    case("np.data_segment", |t| {
        machine::set_descriptor(SCRATCH, NOT_PRESENT_DATA);
        let got = catch(|| exec!("mov ds, {0:e}", in(reg) u32::from(SCRATCH)));
        t.faults("loading DS", got, NP, Some(SCRATCH.into()));
    });
    case("np.code_segment", |t| {
        machine::set_descriptor(SCRATCH, NOT_PRESENT_CODE);
        let got = catch(
            || exec!("push {0}", "lea {0}, [rip + 2f]", "push {0}", "retfq", "2:", inout(reg) u64::from(SCRATCH) => _),
        );
        t.faults("far return", got, NP, Some(SCRATCH.into()));
    });
    case("ss.stack_segment_not_present", |t| {
        machine::set_descriptor(SCRATCH, NOT_PRESENT_DATA);
        let got = catch(|| exec!("mov ss, {0:e}", in(reg) u32::from(SCRATCH)));
        t.faults("loading SS", got, SS, Some(SCRATCH.into()));
    });
    case("gp.selector_beyond_the_gdt", |t| {
        let got = catch(|| exec!("mov ds, {0:e}", in(reg) 0x1000u32));
        t.faults("loading DS", got, GP, Some(0x1000));
    });
    case("gp.code_in_ss", |t| {
        let got = catch(|| exec!("mov ss, {0:e}", in(reg) u32::from(CODE64)));
        t.faults("loading SS with code", got, GP, Some(CODE64.into()));
    });
    case("gp.system_segment_in_ds", |t| {
        let got = catch(|| exec!("mov ds, {0:e}", in(reg) u32::from(machine::TSS)));
        t.faults("loading DS with a TSS", got, GP, Some(machine::TSS.into()));
    });
    case("gp.ldt_selector_without_ldt", |t| {
        exec!("lldt {0:x}", in(reg) 0u32);
        let got = catch(|| exec!("mov ds, {0:e}", in(reg) 0xcu32));
        t.faults("loading DS from the LDT", got, GP, Some(0xc));
    });
    case("gp.ltr_busy", |t| {
        let got = catch(|| exec!("ltr {0:x}", in(reg) u32::from(machine::TSS)));
        t.faults("LTR of a busy TSS", got, GP, Some(machine::TSS.into()));
    });
    case("ts.iret_with_nt", |t| {
        // IRET with NT set in long mode: #GP(0). AMD APM vol. 3, IRET.
        let got = catch(|| exec!("pushfq", "or qword ptr [rsp], 0x4000", "popfq", "iretq"));
        t.check(
            got.is_err_and(|f| (f.vector == GP || f.vector == TS) && f.error == 0),
            format_args!("#GP(0), got {got:?}"),
        );
    });
    case("segments.null_loads_work", |t| {
        let got = catch(|| {
            exec!("mov ds, {0:e}", "mov es, {0:e}", "mov fs, {0:e}", "mov gs, {0:e}", in(reg) 0u32);
            exec!("mov ds, {0:e}", "mov es, {0:e}", in(reg) u32::from(DATA));
        });
        t.works("null selectors in DS, ES, FS, GS", got);
    });
    case("segments.lar_lsl_verr", |t| {
        let (rights, limit): (u32, u32);
        exec!("lar {0:e}, {1:e}", out(reg) rights, in(reg) u32::from(CODE32));
        exec!("lsl {0:e}, {1:e}", out(reg) limit, in(reg) u32::from(CODE32));
        t.masked("access rights", rights, 0x00c0_9b00u32, 0x00f0_fe00);
        t.eq("limit", limit, !0u32);
    });
    case("segments.fs_base_used", |t| {
        let value = 0x1122_3344_5566_7788u64;
        let old = rdmsr(MSR_FS_BASE);
        wrmsr(MSR_FS_BASE, &raw const value as u64 - 0x100);
        let got: u64;
        exec!("mov {}, fs:[0x100]", out(reg) got);
        wrmsr(MSR_FS_BASE, old);
        t.eq("a load through FS", got, value);
    });
}

fn protection() {
    case("gp.noncanonical_load", |t| {
        let got = catch(|| peek::<u8>(0x8000_0000_0000));
        t.faults("the load", got, GP, Some(0));
    });
    case("gp.noncanonical_store", |t| {
        let got = catch(|| poke::<u8>(0xdead_0000_0000_0000, 1));
        t.faults("the store", got, GP, Some(0));
    });
    case("ss.noncanonical_stack", |t| {
        // Push with RSP non-canonical is #SS(0); the fault itself arrives on an IST stack.
        trap::ist(SS, 2);
        trap::ist(GP, 2);
        if t.skip_on_tcg("it raises #GP where #SS belongs") {
            return;
        }
        let got = catch(|| {
            exec!("mov {s}, rsp", "mov rsp, {v}", "push 0", "mov rsp, {s}",
            s = out(reg) _, v = in(reg) 0x8000_0000_1000u64)
        });
        t.faults("PUSH", got, SS, Some(0));
    });
    case("gp.noncanonical_jump", |t| {
        if t.skip_on_tcg("the branch target is not checked at the jump") {
            return;
        }
        let got = catch(|| exec!("jmp {}", in(reg) 0x8000_0000_0000u64));
        t.faults("the jump", got, GP, Some(0));
    });
    case("gp.instruction_too_long", |t| {
        // Sixteen bytes: fourteen prefixes, then a two-byte instruction.
        let got = catch(|| exec!(".fill 14, 1, 0x66", ".byte 0x0f, 0x0b"));
        t.check(got.is_err_and(|f| f.vector == GP && f.error == 0), format_args!("#GP(0), got {got:?}"));
    });
    case("gp.cli_in_ring_3", |t| {
        for code in [[0xfa, 0x90], [0xfb, 0x90], [0xf4, 0x90], [0x0f, 0x06], [0x0f, 0x08], [0x0f, 0x09]] {
            let (fault, _) = user::run(&code, Start::default());
            t.faults("CLI, STI, HLT, CLTS, INVD or WBINVD", Err::<(), _>(fault), GP, Some(0));
        }
    });
    case("gp.io_in_ring_3", |t| {
        for code in [[0xe4, 0x21], [0xe6, 0x80], [0xec, 0x90], [0x6c, 0x90], [0x6e, 0x90]] {
            let (fault, _) = user::run(&code, Start { rdx: 0x21, ..Start::default() });
            t.faults("a port access", Err::<(), _>(fault), GP, Some(0));
        }
    });
    case("io.in_ring_3_with_iopl", |t| {
        // in al, 0x21; ud2
        let (fault, frame) =
            user::run(&[0xe4, 0x21, 0x0f, 0x0b], Start { rflags: 0x3002, rax: 0x55, ..Start::default() });
        t.faults("UD2 after IN", Err::<(), _>(fault), UD, None);
        t.eq("AL, the mask of the PIC", frame.rax & 0xff, 0xffu64);
    });
    case("gp.cr_access_in_ring_3", |t| {
        for code in [
            [0x0f, 0x20, 0xc0],
            [0x0f, 0x22, 0xd8],
            [0x0f, 0x21, 0xc0],
            [0x0f, 0x01, 0x38],
            [0x0f, 0x01, 0xf0],
        ] {
            let (fault, _) = user::run(&code, Start::default());
            t.faults("MOV CR, MOV DR, INVLPG or LMSW", Err::<(), _>(fault), GP, Some(0));
        }
    });
    case("gp.int_n_dpl", |t| {
        let (fault, _) = user::run(&[0xcd, 0x55], Start::default());
        t.faults("INT 55h through a ring 0 gate", Err::<(), _>(fault), GP, Some(trap::idt_error(0x55)));
    });
    case("ud.umip_off_sidt_works", |t| {
        if !has(7, 0, |r| r.ecx, 2) {
            return t.skip("no UMIP");
        }
        // sidt [rax]; ud2
        let start = Start { rax: user::DATA, ..Start::default() };
        let (fault, _) = user::run(&[0x0f, 0x01, 0x08, 0x0f, 0x0b], start);
        t.faults("UD2 after SIDT", Err::<(), _>(fault), UD, None);
        set_cr4(cr4() | CR4_UMIP);
        let (fault, _) = user::run(&[0x0f, 0x01, 0x08, 0x0f, 0x0b], start);
        t.faults("SIDT with CR4.UMIP", Err::<(), _>(fault), GP, Some(0));
    });
    case("ac.misaligned_in_ring_3", |t| {
        if t.skip_on_tcg("alignment is never checked") {
            return;
        }
        set_cr0(cr0() | 1 << 18);
        let start = Start { rflags: 2 | FLAG_AC, rax: user::DATA + 1, ..Start::default() };
        let (fault, _) = user::run(&[0x8b, 0x00, 0x0f, 0x0b], start);
        t.faults("a misaligned load with AM and AC", Err::<(), _>(fault), AC, Some(0));
    });
    case("ac.aligned_or_disabled", |t| {
        set_cr0(cr0() | 1 << 18);
        for (rflags, rax) in [(2 | FLAG_AC, user::DATA + 4), (2, user::DATA + 1)] {
            let (fault, _) = user::run(&[0x8b, 0x00, 0x0f, 0x0b], Start { rflags, rax, ..Start::default() });
            t.faults("UD2 after the load", Err::<(), _>(fault), UD, None);
        }
    });
}

fn page_faults() {
    case("pf.read_not_present", |t| {
        let got = catch(|| peek::<u8>(MISSING + 0x123));
        let fault = t.faults("the load", got, PF, Some(0));
        t.eq("CR2", fault.cr2, MISSING + 0x123);
    });
    case("pf.write_not_present", |t| {
        let got = catch(|| poke::<u8>(MISSING + 0xfff, 0));
        let fault = t.faults("the store", got, PF, Some(E_W));
        t.eq("CR2", fault.cr2, MISSING + 0xfff);
    });
    case("pf.user_write_read_only", |t| {
        user::map();
        let space = Space::current();
        let entry = space.get(user::DATA, 1);
        space.set(user::DATA, 1, entry & !W);
        // mov [rax], al
        let (fault, _) = user::run_mapped(&[0x88, 0x00], Start { rax: user::DATA + 9, ..Start::default() });
        t.faults("the store", Err::<(), _>(fault), PF, Some(E_P | E_W | E_U));
        t.eq("CR2", fault.cr2, user::DATA + 9);
    });
    case("pf.cr2_survives_other_exceptions", |t| {
        set_cr2(0x1234_5000);
        let got = catch(|| exec!("ud2"));
        t.faults("UD2", got, UD, None);
        t.eq("CR2", cr2(), 0x1234_5000u64);
    });
    case("pf.store_across_two_pages", |t| {
        let space = Space::current();
        let frame = space.map_new(PLAYGROUND, P | W);
        space.set(PLAYGROUND + 0x1000, 1, 0);
        let got = catch(|| poke::<u64>(PLAYGROUND + 0xffc, !0));
        let fault = t.faults("the store", got, PF, Some(E_W));
        t.eq("CR2", fault.cr2, PLAYGROUND + 0x1000);
        t.eq("the first half, which must not be written", peek::<u32>(frame + 0xffc), 0u32);
    });
    case("pf.fixed_and_resumed", |t| {
        trap::on(PF, Eoi::None, |_| {
            let page = cr2() & !0xfff;
            Space::current().map_new(page, P | W);
        });
        for page in 0..100 {
            poke(PLAYGROUND + 0x20_0000 + page * 0x1000, page);
        }
        for page in 0..100 {
            t.eq("the value stored", peek::<u64>(PLAYGROUND + 0x20_0000 + page * 0x1000), page);
        }
        t.eq("page faults", trap::count(PF), 100u32);
    });
}

fn user_mode() {
    case("user.rsp0_is_used", |t| {
        let (fault, _) = user::run(&[0x0f, 0x0b], Start::default());
        t.faults("UD2", Err::<(), _>(fault), UD, Some(0));
        t.eq("CS", fault.cs, u64::from(machine::USER_CODE64));
        t.eq("RIP", fault.rip, user::CODE);
        t.eq("RSP", fault.rsp, user::STACK + frames::PAGE - 16);
    });
    case("user.int_gate_for_ring_3", |t| {
        trap::gate(0x80, Gate::interrupt(trap::stub(0x80), 3, 0));
        trap::on(0x80, Eoi::None, |frame| frame.rax += 1);
        // int 0x80; int 0x80; ud2
        let (fault, frame) =
            user::run(&[0xcd, 0x80, 0xcd, 0x80, 0x0f, 0x0b], Start { rax: 40, ..Start::default() });
        t.faults("UD2", Err::<(), _>(fault), UD, None);
        t.eq("RAX", frame.rax, 42u64);
    });
    case("user.syscall_sysret", |t| {
        syscall(t);
    });
    case("user.compat_mode_runs", |t| {
        // mov eax, 0x12345678; inc eax; ud2
        let (fault, frame) =
            user::run_low(&[0xb8, 0x78, 0x56, 0x34, 0x12, 0x40, 0x0f, 0x0b], Start::compat());
        t.faults("UD2", Err::<(), _>(fault), UD, None);
        // 0x40 is INC EAX in compatibility mode and a REX prefix in 64-bit mode.
        t.eq("EAX", frame.rax as u32, 0x1234_5679u32);
    });
    case("user.cpuid", |t| {
        let (fault, frame) = user::run(&[0x0f, 0xa2, 0x0f, 0x0b], Start { rax: 1, ..Start::default() });
        t.faults("UD2 after CPUID", Err::<(), _>(fault), UD, None);
        t.eq("EAX", frame.rax, cpuid(1, 0).eax);
    });
}

/// SYSCALL from ring 3 lands at LSTAR with flags masked; SYSRET goes back.
fn syscall(t: &mut guests::report::Case) {
    let landing: u64;
    // The landing pad: SYSCALL leaves the user's stack, which will do; count in RBX, then back by SYSRET.
    exec!("lea {0}, [rip + 2f]", "jmp 3f", "2:", "inc rbx", "sysretq", "3:", out(reg) landing);
    wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_SCE);
    wrmsr(MSR_STAR, u64::from(CODE64) << 32 | 0x33 << 48);
    wrmsr(MSR_LSTAR, landing);
    wrmsr(MSR_SFMASK, 0x600);
    // syscall; syscall; ud2
    let (fault, frame) =
        user::run(&[0x0f, 0x05, 0x0f, 0x05, 0x0f, 0x0b], Start { rbx: 7, ..Start::default() });
    t.faults("UD2", Err::<(), _>(fault), UD, None);
    t.eq("RBX", frame.rbx, 9u64);
    t.eq("RCX, the return address", frame.rcx, user::CODE + 4);
    t.eq("CS", frame.cs, u64::from(machine::USER_CODE64));
}

fn registers() {
    case("exceptions.registers_survive", |t| {
        trap::expect(BP, Eoi::None);
        let values: [u64; 6] = core::array::from_fn(|index| 0x0101_0101_0101_0101 * (index as u64 + 1));
        let mut got = [0u64; 6];
        exec!(
            "mov r8, [{v}]", "mov r9, [{v} + 8]", "mov r10, [{v} + 16]", "mov r11, [{v} + 24]", "mov r14, [{v} + 32]",
            "mov r15, [{v} + 40]", "int3",
            "mov [{g}], r8", "mov [{g} + 8], r9", "mov [{g} + 16], r10", "mov [{g} + 24], r11", "mov [{g} + 32], r14",
            "mov [{g} + 40], r15",
            v = in(reg) &values, g = in(reg) &mut got,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r14") _, out("r15") _
        );
        for index in 0..6 {
            t.eq("a register", got[index], values[index]);
        }
    });
}
