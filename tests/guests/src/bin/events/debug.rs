//! Single step and hardware breakpoints, also over instructions that a hypervisor emulates.
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use guests::dev::{ioapic, lapic};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, Eoi, DB};
use guests::{exec, machine, Racy};

/// DR6 bits. AMD APM vol. 2, 13.1.1.3.
const B0: u64 = 1;
const BS: u64 = 1 << 14;

/// AMD APM vol. 2, 15.12.2, wants DR6 after the exit as the guest's handler would see it.
const DR6_IS_LOST: &str = "an intercepted #DB does not set DR6";

static STEPS: [AtomicU64; 32] = [const { AtomicU64::new(0) }; 32];
static STEP_COUNT: AtomicUsize = AtomicUsize::new(0);
static LAST_DR6: AtomicU64 = AtomicU64::new(0);
static WATCHED: Racy<[u32; 4]> = Racy::new([0; 4]);

pub(crate) fn run() {
    steps();
    breakpoints();
}

/// Records where each #DB arrived and what DR6 said.
fn record() {
    STEP_COUNT.store(0, SeqCst);
    LAST_DR6.store(0, SeqCst);
    trap::on(DB, Eoi::None, |frame| {
        let at = STEP_COUNT.fetch_add(1, SeqCst);
        if let Some(slot) = STEPS.get(at) {
            slot.store(frame.rip, SeqCst);
        }
        LAST_DR6.fetch_or(dr6(), SeqCst);
        set_dr6(0xffff_0ff0);
    });
}

fn check_steps(t: &mut Case, want: &[u64]) {
    t.check(
        STEP_COUNT.load(SeqCst) >= want.len(),
        format_args!("at least {} steps, got {}", want.len(), STEP_COUNT.load(SeqCst)),
    );
    for (index, &want) in want.iter().enumerate() {
        t.eq("RIP after a step", STEPS[index].load(SeqCst), want);
    }
    t.eq("DR6.BS", LAST_DR6.load(SeqCst) & BS, BS);
}

/// Steps over one instruction and two NOPs: the first #DB must be right behind the instruction.
macro_rules! step_over {
    ($t:expr, $asm:literal, $($operands:tt)*) => {{
        record();
        let (first, second): (u64, u64);
        exec!(
            "mov r8, rbx", "lea r12, [rip + 3f]", "lea r13, [rip + 4f]",
            "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            $asm,
            "3: nop", "4: nop",
            "pushfq", "and qword ptr [rsp], ~0x100", "popfq", "mov rbx, r8",
            out("r12") first, out("r13") second, out("r8") _, $($operands)*
        );
        check_steps($t, &[first, second]);
    }};
}

fn steps() {
    // Where the instruction exits, the hypervisor raises the #DB and sets DR6 itself.
    let without_exit = |name: &str, run: &dyn Fn(&mut Case)| {
        case(name, |t| {
            if !t.skip_on_bochs_svm(DR6_IS_LOST) {
                run(t)
            }
        });
    };
    without_exit("step.nop", &|t| step_over!(t, "nop", out("rax") _));
    case("step.cpuid", |t| step_over!(t, "cpuid", inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _));
    case("step.in", |t| step_over!(t, "in al, 0x21", out("rax") _));
    case("step.out", |t| step_over!(t, "out 0x80, al", in("rax") 0));
    case("step.rdmsr", |t| step_over!(t, "rdmsr", in("ecx") MSR_PAT, out("rax") _, out("rdx") _));
    case("step.wrmsr", |t| {
        let pat = rdmsr(MSR_PAT);
        step_over!(t, "wrmsr", in("ecx") MSR_PAT, in("rax") pat as u32, in("rdx") pat >> 32)
    });
    case("step.mmio_read", |t| step_over!(t, "mov eax, [rdi]", in("rdi") lapic::BASE + 0x20, out("rax") _));
    case("step.mmio_write", |t| step_over!(t, "mov [rdi], eax", in("rdi") ioapic::REGSEL, in("rax") 1));
    case("step.mmio_add", |t| step_over!(t, "add [rdi], eax", in("rdi") ioapic::REGSEL, in("rax") 0));
    without_exit("step.mov_cr3", &|t| step_over!(t, "mov cr3, rax", in("rax") machine::base_cr3()));
    without_exit("step.mov_cr8", &|t| step_over!(t, "mov cr8, rax", in("rax") 0));
    without_exit("step.xgetbv_or_rdtsc", &|t| step_over!(t, "rdtsc", out("rax") _, out("rdx") _));
    case("step.wbinvd", |t| step_over!(t, "wbinvd", out("rax") _));
    without_exit("step.invlpg", &|t| step_over!(t, "invlpg [rdi]", in("rdi") 0x1000));
    case("step.rep_outsb", |t| {
        // With TF every iteration of a string instruction traps, RIP on the instruction until the last.
        record();
        let bytes = [0u8; 3];
        let (instruction, after): (u64, u64);
        exec!("lea r12, [rip + 3f]", "lea r13, [rip + 4f]", "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            "3: rep outsb", "4: nop", "pushfq", "and qword ptr [rsp], ~0x100", "popfq",
            out("r12") instruction, out("r13") after, inout("rcx") 3u64 => _, inout("rsi") &bytes => _, in("dx") 0x80u16);
        // TCG with an instruction counter looks at RCX once more before it goes on.
        let extra = guests::platform::tcg() && STEPS[2].load(SeqCst) == instruction;
        if extra {
            check_steps(t, &[instruction, instruction, instruction, after]);
        } else {
            check_steps(t, &[instruction, instruction, after]);
        }
    });
    without_exit("step.mov_ss_holds_it_back", &|t| {
        record();
        let after: u64;
        exec!("lea r12, [rip + 3f]", "mov eax, ss", "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            "mov ss, eax", "nop", "3: nop", "pushfq", "and qword ptr [rsp], ~0x100", "popfq",
            out("r12") after, out("rax") _);
        check_steps(t, &[after]);
    });
}

fn breakpoints() {
    case("breakpoint.data_write", |t| {
        if t.skip_on_bochs_svm(DR6_IS_LOST) {
            return;
        }
        record();
        set_dr0(WATCHED.addr());
        set_dr7(0x400 | 2 | 0xd << 16); // G0, write, 4 bytes
        poke(WATCHED.addr(), 5u32);
        set_dr7(0x400);
        t.eq("#DBs", STEP_COUNT.load(SeqCst) as u64, 1u64);
        t.eq("DR6.B0", LAST_DR6.load(SeqCst) & B0, B0);
        t.eq("the value stored", peek::<u32>(WATCHED.addr()), 5u32);
    });
    case("breakpoint.data_read", |t| {
        if t.skip_on_bochs_svm(DR6_IS_LOST) {
            return;
        }
        record();
        set_dr1(WATCHED.addr() + 4);
        set_dr7(0x400 | 8 | 0xf << 20); // G1, read or write, 4 bytes
        peek::<u32>(WATCHED.addr() + 4);
        peek::<u32>(WATCHED.addr() + 8);
        set_dr7(0x400);
        t.eq("#DBs", STEP_COUNT.load(SeqCst) as u64, 1u64);
        t.eq("DR6.B1", LAST_DR6.load(SeqCst) >> 1 & 1, 1u64);
    });
    case("breakpoint.not_hit", |t| {
        record();
        set_dr0(WATCHED.addr());
        set_dr7(0x400 | 2 | 0xd << 16);
        poke(WATCHED.addr() + 4, 1u32);
        peek::<u32>(WATCHED.addr());
        set_dr7(0x400);
        t.eq("#DBs", STEP_COUNT.load(SeqCst) as u64, 0u64);
    });
    case("breakpoint.execution", |t| {
        if t.skip_on_bochs_svm(DR6_IS_LOST) {
            return;
        }
        STEP_COUNT.store(0, SeqCst);
        LAST_DR6.store(0, SeqCst);
        trap::on(DB, Eoi::None, |frame| {
            STEPS[0].store(frame.rip, SeqCst);
            STEP_COUNT.fetch_add(1, SeqCst);
            LAST_DR6.fetch_or(dr6(), SeqCst);
            set_dr6(0xffff_0ff0);
            frame.rflags |= FLAG_RF;
        });
        let (at, ran): (u64, u64);
        exec!("lea {at}, [rip + 2f]", "mov dr0, {at}", "xor {ran:e}, {ran:e}", "mov {tmp:e}, 0x402", "mov dr7, {tmp}",
            "2: inc {ran}", "mov {tmp:e}, 0x400", "mov dr7, {tmp}", at = out(reg) at, ran = out(reg) ran, tmp = out(reg) _);
        t.eq("#DBs", STEP_COUNT.load(SeqCst) as u64, 1u64);
        t.eq("RIP, the instruction itself", STEPS[0].load(SeqCst), at);
        t.eq("executions with RF set", ran, 1u64);
        t.eq("DR6.B0", LAST_DR6.load(SeqCst) & B0, B0);
    });
    case("breakpoint.execution_on_cpuid", |t| {
        trap::on(DB, Eoi::None, |frame| {
            STEPS[0].store(frame.rip, SeqCst);
            set_dr6(0xffff_0ff0);
            frame.rflags |= FLAG_RF;
        });
        let at: u64;
        exec!("mov r8, rbx", "lea r12, [rip + 2f]", "mov dr0, r12", "mov r13d, 0x402", "mov dr7, r13",
            "2: cpuid", "mov r13d, 0x400", "mov dr7, r13", "mov rbx, r8",
            out("r12") at, out("r13") _, out("r8") _, inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _);
        t.eq("RIP, the instruction itself", STEPS[0].load(SeqCst), at);
        t.eq("#DBs", trap::count(DB), 1u32);
    });
    case("breakpoint.io", |t| {
        record();
        set_cr4(cr4() | CR4_DE);
        set_dr0(0x21);
        set_dr7(0x400 | 2 | 2 << 16); // G0, I/O, 1 byte
        let after: u64;
        exec!("lea {0}, [rip + 2f]", "in al, 0x21", "2:", "nop", out(reg) after, out("al") _);
        set_dr7(0x400);
        t.eq("#DBs", STEP_COUNT.load(SeqCst) as u64, 1u64);
        t.eq("RIP behind the IN", STEPS[0].load(SeqCst), after);
        t.eq("DR6.B0", LAST_DR6.load(SeqCst) & B0, B0);
    });
}
