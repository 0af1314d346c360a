//! Faults while an event is being delivered: pages missing under the stack or the IDT, and memory that a hypervisor has
//! not backed yet.
use guests::dev::lapic;
use guests::exec;
use guests::frames::{self, PAGE};
use guests::machine;
use guests::paging::{Space, E_P, E_W, P, PLAYGROUND, W};
use guests::platform;
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, catch, Eoi, Fault, Gate, DF, GP, NMI, NP, PF, UD};

const VECTOR: u8 = 0x60;
const STACK: u64 = PLAYGROUND + 0x40_0000;

pub(crate) fn run() {
    missing_pages();
    double_faults();
    untouched();
}

/// Whether a software interrupt whose delivery faults is told wrong to a hypervisor that takes page faults.
fn loses_its_interrupt(t: &mut Case) -> bool {
    platform::shadow() && t.skip_on_bochs_svm("EXITINTINFO tells of the event before INT n")
}

/// Page faults arrive on IST3 and map whatever page was missing.
fn fix_page_faults() {
    trap::ist(PF, 3);
    trap::on(PF, Eoi::None, |_| {
        Space::current().map_new(cr2() & !0xfff, P | W);
    });
}

fn expect_order(t: &mut Case, want: &[u8]) {
    let (order, len) = trap::order();
    t.check(order[..len] == *want, format_args!("arrivals {want:x?}, got {:x?}", &order[..len]));
}

fn missing_pages() {
    case("delivery.int_n_stack_not_present", |t| {
        if loses_its_interrupt(t) {
            return;
        }
        fix_page_faults();
        machine::set_tss_stack(2, STACK + PAGE);
        trap::expect(VECTOR, Eoi::None);
        trap::ist(VECTOR, 2);
        exec!("int 0x60");
        // INT n faults before it is done and starts again after the repair.
        expect_order(t, &[PF, VECTOR]);
    });
    case("delivery.exception_stack_not_present", |t| {
        fix_page_faults();
        machine::set_tss_stack(2, STACK + 0x10_0000 + PAGE);
        trap::on(UD, Eoi::None, |frame| frame.rip += 2);
        trap::ist(UD, 2);
        exec!("ud2");
        expect_order(t, &[PF, UD]);
    });
    case("delivery.gp_stack_not_present", |t| {
        // A contributory exception, then a page fault: handled one after the other, no double fault.
        fix_page_faults();
        machine::set_tss_stack(2, STACK + 0x20_0000 + PAGE);
        trap::ist(GP, 2);
        let got = catch(|| peek::<u8>(0x8000_0000_0000));
        t.faults("the load", got, GP, Some(0));
        expect_order(t, &[PF, GP]);
    });
    case("delivery.pushed_error_code_of_the_pf", |t| {
        if loses_its_interrupt(t) {
            return;
        }
        trap::ist(PF, 3);
        machine::set_tss_stack(2, STACK + 0x30_0000 + PAGE);
        trap::ist(VECTOR, 2);
        let got = catch(|| exec!("int 0x60"));
        let fault = t.faults("INT 60h", got, PF, Some(E_W));
        t.eq("CR2", fault.cr2 & !0xfff, STACK + 0x30_0000);
    });
    case("delivery.idt_page_not_present", |t| {
        if loses_its_interrupt(t) {
            return;
        }
        // The gates up to 127 in a page that is there, the others in one that is not.
        let space = Space::current();
        let low = frames::pages(2);
        for offset in (0..4096).step_by(8) {
            poke(low + 0x800 + offset, peek::<u64>(trap::idt() + offset));
        }
        let base = PLAYGROUND + 0x80_0000;
        space.map(base, low, 1, P | W);
        space.set(base + PAGE, 1, 0);
        trap::load_idt(base + 0x800, 4095);
        trap::on(PF, Eoi::None, |_| {
            let (base, space) = (PLAYGROUND + 0x80_0000, Space::current());
            let frame = space.get(base, 1) & guests::paging::ADDRESS;
            space.map(base + PAGE, frame + PAGE, 1, P | W);
        });
        trap::expect(0x90, Eoi::None);
        exec!("int 0x90");
        expect_order(t, &[PF, 0x90]);
        trap::load();
    });
    case("delivery.idt_read_error_code", |t| {
        if loses_its_interrupt(t) {
            return;
        }
        trap::load_idt(PLAYGROUND + 0xa0_0000 - 0x800, 4095);
        let space = Space::current();
        let frame = frames::page();
        for offset in (0..2048).step_by(8) {
            poke(frame + 0x800 + offset, peek::<u64>(trap::idt() + offset));
        }
        space.map(PLAYGROUND + 0xa0_0000 - PAGE, frame, 1, P | W);
        space.set(PLAYGROUND + 0xa0_0000, 1, 0);
        let got = catch(|| exec!("int 0xa0"));
        let fault = t.faults("INT A0h", got, PF, Some(0));
        t.eq("CR2, the address of the gate", fault.cr2, PLAYGROUND + 0xa0_0000 - 0x800 + 0xa0 * 16);
        trap::load();
    });
    case("delivery.iret_from_missing_stack", |t| {
        // IRET reads its frame from a page that is not there: a plain page fault on the IRET.
        let got = catch(
            || exec!("mov {s}, rsp", "mov rsp, {v}", "iretq", "mov rsp, {s}", s = out(reg) _, v = in(reg) STACK + 0x50_0000),
        );
        trap::ist(PF, 3);
        let again = catch(
            || exec!("mov {s}, rsp", "mov rsp, {v}", "iretq", "mov rsp, {s}", s = out(reg) _, v = in(reg) STACK + 0x50_0000),
        );
        // Without an IST stack the page fault finds no stack either: double fault.
        t.faults("IRETQ without a stack for the fault", got, DF, Some(0));
        t.faults("IRETQ with a stack for the fault", again, PF, Some(0));
    });
}

fn double_faults() {
    case("df.page_fault_in_page_fault", |t| {
        machine::set_tss_stack(2, STACK + 0x60_0000 + PAGE);
        trap::ist(PF, 2);
        let got = catch(|| peek::<u8>(PLAYGROUND + 0x700_0000));
        t.faults("the load", got, DF, Some(0));
    });
    case("df.contributory_twice", |t| {
        trap::gate(GP, Gate::new(trap::stub(GP), 0x0e, 0, 0));
        let got = catch(|| peek::<u8>(0x8000_0000_0000));
        t.faults("#GP without a gate", got, DF, Some(0));
    });
    case("df.benign_then_contributory_is_none", |t| {
        trap::gate(UD, Gate::new(trap::stub(UD), 0x0e, 0, 0));
        let got = catch(|| exec!("ud2"));
        // Whether an exception is external to its own delivery is answered differently: AMD APM vol. 2, 8.4.1; Intel SDM
        // vol. 3, 6.13.
        const EXT: u64 = 1;
        let got = got.map_err(|fault| Fault { error: fault.error & !EXT, ..fault });
        t.faults("#UD without a gate", got, NP, Some(trap::idt_error(UD)));
    });
    case("df.push_without_stack", |t| {
        let got = catch(
            || exec!("mov {s}, rsp", "mov rsp, {v}", "push 0", "mov rsp, {s}", s = out(reg) _, v = in(reg) STACK + 0x70_0000),
        );
        t.faults("PUSH", got, DF, Some(0));
    });
}

/// Stacks in memory that nobody touched before: under a hypervisor that populates on demand, each delivery is
/// interrupted by a second-level fault and must be taken up again, exactly once.
fn untouched() {
    const ROUNDS: u64 = 64;
    let fresh = |count: u64| frames::untouched(count * PAGE, PAGE);
    case("delivery.ipi_on_untouched_stacks", |t| {
        let base = fresh(ROUNDS);
        trap::expect(VECTOR, Eoi::Lapic);
        trap::ist(VECTOR, 2);
        for round in 0..ROUNDS {
            machine::set_tss_stack(2, base + (round + 1) * PAGE);
            lapic::self_ipi(VECTOR);
            sti();
            cli();
            t.eq("arrivals", trap::count(VECTOR), round as u32 + 1);
        }
        t.yes("nothing left in service", !lapic::in_service(VECTOR) && !lapic::requested(VECTOR));
    });
    case("delivery.int_n_on_untouched_stacks", |t| {
        if loses_its_interrupt(t) {
            return;
        }
        let base = fresh(ROUNDS);
        trap::expect(VECTOR, Eoi::None);
        trap::ist(VECTOR, 2);
        for round in 0..ROUNDS {
            machine::set_tss_stack(2, base + (round + 1) * PAGE);
            let after: u64;
            exec!("xor {0:e}, {0:e}", "int 0x60", "inc {0}", out(reg) after);
            t.eq("instructions after INT", after, 1u64);
            t.eq("arrivals", trap::count(VECTOR), round as u32 + 1);
        }
    });
    case("delivery.pf_on_untouched_stacks", |t| {
        let base = fresh(ROUNDS);
        trap::ist(PF, 2);
        for round in 0..ROUNDS {
            machine::set_tss_stack(2, base + (round + 1) * PAGE);
            let address = PLAYGROUND + 0x800_0000 + round * 0x1234;
            let got = catch(|| poke::<u8>(address, 1));
            let fault = t.faults("the store", got, PF, Some(E_W));
            t.eq("CR2", fault.cr2, address);
        }
    });
    case("delivery.gp_on_untouched_stacks", |t| {
        let base = fresh(ROUNDS);
        trap::ist(GP, 2);
        for round in 0..ROUNDS {
            machine::set_tss_stack(2, base + (round + 1) * PAGE);
            let got = catch(|| exec!("mov ds, {0:e}", in(reg) 0x1000u32));
            t.faults("loading DS", got, GP, Some(0x1000));
        }
    });
    case("delivery.breakpoint_on_untouched_stacks", |t| {
        if loses_its_interrupt(t) {
            return;
        }
        let base = fresh(ROUNDS);
        trap::expect(trap::BP, Eoi::None);
        trap::ist(trap::BP, 2);
        for round in 0..ROUNDS {
            machine::set_tss_stack(2, base + (round + 1) * PAGE);
            let after: u64;
            exec!("xor {0:e}, {0:e}", "int3", "inc {0}", out(reg) after);
            t.eq("instructions after INT3", after, 1u64);
            t.eq("arrivals", trap::count(trap::BP), round as u32 + 1);
        }
    });
    case("delivery.nmi_on_untouched_stacks", |t| {
        let base = fresh(ROUNDS);
        trap::expect(NMI, Eoi::None);
        trap::ist(NMI, 2);
        for round in 0..ROUNDS {
            machine::set_tss_stack(2, base + (round + 1) * PAGE);
            lapic::ipi(lapic::id(), lapic::MODE_NMI | lapic::ASSERT);
            wait_until(1_000_000_000, || trap::count(NMI) > round as u32);
            t.eq("arrivals", trap::count(NMI), round as u32 + 1);
        }
    });
    case("delivery.write_protected_stack", |t| {
        if loses_its_interrupt(t) {
            return;
        }
        let frame = frames::page();
        Space::current().map(STACK + 0x90_0000, frame, 1, P);
        trap::ist(PF, 3);
        trap::ist(VECTOR, 2);
        machine::set_tss_stack(2, STACK + 0x90_0000 + PAGE);
        let got = catch(|| exec!("int 0x60"));
        t.faults("INT 60h", got, PF, Some(E_P | E_W));
    });
}
