//! What waits for the end of an instruction meets instructions that exit: single steps, INT1, NMIs, in the shadow of STI
//! and of MOV SS.
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::SeqCst};
use guests::dev::lapic;
use guests::exec;
use guests::platform;
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, catch, Eoi, DB, GP, NMI, UD};
use guests::user::{self, Start};

const LONG: u64 = 4_000_000_000;
const VECTOR: u8 = 0x51;
const DR6_IS_LOST: &str = "an intercepted #DB does not set DR6";

static STEPS: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];
static COUNT: AtomicUsize = AtomicUsize::new(0);

pub(crate) fn run() {
    steps();
    int1();
    nmis();
}

fn record() {
    COUNT.store(0, SeqCst);
    trap::on(DB, Eoi::None, |frame| {
        if let Some(slot) = STEPS.get(COUNT.fetch_add(1, SeqCst)) {
            slot.store(frame.rip, SeqCst);
        }
        set_dr6(0xffff_0ff0);
    });
}

fn expect(t: &mut Case, want: &[u64]) {
    for (index, &want) in want.iter().enumerate() {
        t.eq("RIP of a step", STEPS[index].load(SeqCst), want);
    }
}

/// Runs two instructions with TF, the second at 2 and the next at 3, and checks where the first steps arrive: behind
/// STI and behind what follows it; but MOV SS and what follows it are one step.
macro_rules! shadow {
    ($t:expr, $first:literal, $second:literal, $held:expr, $($operands:tt)*) => {{
        record();
        let (second, third): (u64, u64);
        exec!(
            "mov r8, rbx", "lea r12, [rip + 2f]", "lea r13, [rip + 3f]", "mov r9d, ss",
            "pushfq", "or qword ptr [rsp], 0x100", "popfq",
            $first, concat!("2: ", $second), "3: nop",
            "pushfq", "and qword ptr [rsp], ~0x300", "popfq", "mov rbx, r8",
            out("r12") second, out("r13") third, out("r8") _, out("r9") _, $($operands)*
        );
        // TCG holds a step back behind STI as well.
        if $held || guests::platform::tcg() {
            expect($t, &[third]);
        } else {
            expect($t, &[second, third]);
        }
    }};
}

fn steps() {
    let sti = |name: &str, run: &dyn Fn(&mut Case)| {
        case(name, |t| {
            if !t.skip_on_bochs_svm(DR6_IS_LOST) {
                run(t)
            }
        });
    };
    sti("shadow.step_sti_nop", &|t| shadow!(t, "sti", "nop", false, out("rax") _));
    sti(
        "shadow.step_sti_cpuid",
        &|t| shadow!(t, "sti", "cpuid", false, inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _),
    );
    sti("shadow.step_sti_in", &|t| shadow!(t, "sti", "in al, 0x21", false, out("rax") _));
    sti("shadow.step_mov_ss_nop", &|t| shadow!(t, "mov ss, r9d", "nop", true, out("rax") _));
    sti(
        "shadow.step_mov_ss_cpuid",
        &|t| shadow!(t, "mov ss, r9d", "cpuid", true, inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _),
    );
    sti("shadow.step_mov_ss_in", &|t| shadow!(t, "mov ss, r9d", "in al, 0x21", true, out("rax") _));
    sti(
        "shadow.step_mov_ss_mmio",
        &|t| shadow!(t, "mov ss, r9d", "mov eax, [rdi]", true, in("rdi") lapic::BASE + 0x20, out("rax") _),
    );
    case("shadow.interrupt_after_sti_cpuid", |t| {
        // An interrupt that waits comes behind the instruction that follows STI, also if that exits.
        static AT: AtomicU64 = AtomicU64::new(0);
        trap::on(VECTOR, Eoi::Lapic, |frame| AT.store(frame.rip, SeqCst));
        lapic::self_ipi(VECTOR);
        let after: u64;
        exec!("mov r8, rbx", "lea r12, [rip + 2f]", "sti", "cpuid", "2: nop", "cli", "mov rbx, r8",
            out("r12") after, out("r8") _, inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _);
        t.eq("arrivals", trap::count(VECTOR), 1u32);
        t.eq("RIP behind CPUID", AT.load(SeqCst), after);
    });
    case("shadow.interrupt_after_popf_mov_ss_cpuid", |t| {
        if platform::shadow() && t.skip_on_bochs_svm("a window that is open at VMRUN is not always noticed") {
            return;
        }
        trap::expect(VECTOR, Eoi::Lapic);
        lapic::self_ipi(VECTOR);
        exec!("mov r8, rbx", "mov r9d, ss", "sti", "mov ss, r9d", "cpuid", "nop", "cli", "mov rbx, r8",
            out("r9") _, out("r8") _, inout("eax") 0 => _, inout("ecx") 0 => _, out("edx") _);
        t.eq("arrivals", trap::count(VECTOR), 1u32);
    });
}

fn int1() {
    const INT1: &str = "INT1 is undefined";
    case("int1.return_address", |t| {
        if t.skip_on_tcg(INT1) {
            return;
        }
        record();
        let after: u64;
        exec!("lea {}, [rip + 2f]", ".byte 0xf1", "2: nop", out(reg) after);
        t.eq("#DBs", COUNT.load(SeqCst) as u64, 1u64);
        expect(t, &[after]);
    });
    case("int1.from_ring_3", |t| {
        if t.skip_on_tcg(INT1) {
            return;
        }
        // A gate of level 0 does not keep it out, unlike INT 1.
        let (fault, _) = user::run(&[0x90, 0xf1, 0x0f, 0x0b], Start::default());
        t.eq("vector", fault.vector, DB);
        t.eq("RIP", fault.rip, user::CODE + 2);
        let (fault, _) = user::run(&[0x90, 0xcd, 1, 0x0f, 0x0b], Start::default());
        t.eq("vector of INT 1", fault.vector, GP);
    });
    case("int1.in_the_shadow_of_mov_ss_with_tf", |t| {
        if t.skip_on_tcg(INT1) || t.skip_on_bochs_svm(DR6_IS_LOST) {
            return;
        }
        // mov ss, eax; int1; ud2
        let start = Start { rflags: 2 | FLAG_TF, rax: guests::machine::USER_DATA.into(), ..Start::default() };
        // The first step is behind MOV SS and INT1 together.
        let (fault, _) = user::run(&[0x8e, 0xd0, 0xf1, 0x0f, 0x0b], start);
        t.eq("vector", fault.vector, DB);
        t.eq("RIP", fault.rip, user::CODE + 3);
        let (fault, _) = user::run(&[0x8e, 0xd0, 0x0f, 0x0b], start);
        t.eq("vector of UD2 instead", fault.vector, UD);
        t.eq("its RIP", fault.rip, user::CODE + 2);
    });
}

fn send() {
    lapic::ipi(lapic::id(), lapic::MODE_NMI | lapic::ASSERT);
}

fn nmis() {
    case("shadow.nmi_sent_in_the_shadow_of_sti", |t| {
        trap::expect(NMI, Eoi::None);
        if lapic::x2apic() {
            return t.skip("sent through the memory-mapped registers");
        }
        for round in 1..=50 {
            exec!("sti", "mov [rdi], eax", "nop", "cli", in("rdi") lapic::BASE + 0x300, in("eax") 0x4400);
            t.yes("an arrival", wait_until(LONG, || trap::count(NMI) == round));
        }
    });
    case("shadow.nmi_sent_in_the_shadow_of_mov_ss", |t| {
        trap::expect(NMI, Eoi::None);
        if lapic::x2apic() {
            return t.skip("sent through the memory-mapped registers");
        }
        for round in 1..=50 {
            exec!("mov r8, rbx", "mov edx, ss", "mov ss, edx", "mov [rdi], eax", "mov ss, edx", "cpuid", "nop", "mov rbx, r8",
                in("rdi") lapic::BASE + 0x300, inout("eax") 0x4400 => _, out("edx") _, out("ecx") _, out("r8") _);
            t.yes("an arrival", wait_until(LONG, || trap::count(NMI) == round));
        }
    });
    case("nmi.while_exceptions_are_delivered", |t| {
        // Breakpoints in a row, NMIs among them: none is lost.
        trap::expect(trap::BP, Eoi::None);
        trap::expect(NMI, Eoi::None);
        for round in 1..=100 {
            send();
            exec!("int3", "int3");
            t.yes("an arrival", wait_until(LONG, || trap::count(NMI) == round));
        }
        t.eq("breakpoints", trap::count(trap::BP), 200u32);
    });
    case("nmi.spin_without_exits", |t| {
        if t.skip_on_bochs_svm("a guest that spins with IF clear is not interrupted") {
            return;
        }
        static SEEN: AtomicU32 = AtomicU32::new(0);
        SEEN.store(0, SeqCst);
        trap::on(NMI, Eoi::None, |_| SEEN.store(1, SeqCst));
        // From a timer, since the sender spins.
        guests::dev::ioapic::set_entry(2, 4 << 8);
        guests::dev::pit::program(0, 2, 6000);
        exec!("2: cmp dword ptr [{0}], 0", "je 2b", in(reg) &SEEN);
        guests::dev::ioapic::set_entry(2, guests::dev::ioapic::MASKED);
        guests::dev::pit::stop();
        t.eq("seen", SEEN.load(SeqCst), 1u32);
    });
    case("nmi.next_one_right_behind_iret", |t| {
        // The handler sends the next one; it comes at the first instruction boundary after IRET.
        static PLACES: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
        trap::on(NMI, Eoi::None, |frame| {
            let nth = trap::count(NMI) as usize;
            if let Some(place) = PLACES.get(nth - 1) {
                place.store(frame.rip, SeqCst);
            }
            if nth < 4 {
                send();
                delay(200_000);
            }
        });
        send();
        wait_until(LONG, || trap::count(NMI) >= 4);
        t.eq("arrivals", trap::count(NMI), 4u32);
        for place in &PLACES[2..] {
            t.eq("RIP", place.load(SeqCst), PLACES[1].load(SeqCst));
        }
    });
    case("nmi.iret_that_faults_in_the_handler", |t| {
        // IRET pops a frame whose CS is bad: #GP. After that and a good IRET, NMIs come again.
        trap::on(NMI, Eoi::None, |_| {
            if trap::count(NMI) == 1 {
                let _ = catch(|| exec!("push 0x10", "push rsp", "pushfq", "push 0x1000", "push 0", "iretq"));
            }
        });
        send();
        t.yes("the first", wait_until(LONG, || trap::count(NMI) == 1));
        t.eq("#GPs", trap::count(GP), 1u32);
        send();
        t.yes("the second", wait_until(LONG, || trap::count(NMI) == 2));
    });
}
