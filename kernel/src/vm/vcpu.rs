//! One virtual CPU: its state, and the loop that runs it.

use super::cpuid::{CpuState as CpuidState, CpuidTable, Vendor as CpuVendor};
use super::emulate::Emulator;
use super::events::{Events, InterruptSource};
use super::exits::ATTENTION_INTERVAL;
use super::guest::Guest;
use super::load::{self, EntryState};
use super::msr::MsrState;
use super::paging::Paging;
use super::report::{End, Stop, StopReason};
use crate::cpu::tsc;
use crate::devices::apic_bus::VcpuSet;
use crate::devices::lapic::{Lint, LocalApic};
use crate::hw::extended::{ExtendedState, XsaveFacts};
use crate::hw::{gpr, CpuState, HwVcpu, OutOfMemory, Segment, TableRegister, Vendor};
use crate::sched::HostTimer;
use mmu::GuestCpu;

const RFLAGS_IF: u64 = 1 << 9;
/// How long a vCPU runs at most before Umbra looks again, if it was entered in the shadow of STI or MOV SS and not just
/// before.
const SHADOW_NS: u64 = 20_000;
/// Entries after which a guest that does not move is taken to be out of the shadow.
const SHADOW_TRIES: u8 = 8;

/// What a vCPU is doing when it is not stopped by its VM's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Executing instructions.
    Running,
    /// In HLT.
    Halted,
    /// After INIT, or a processor that was never started.
    WaitForSipi,
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Its time is up, or it gives the rest away.
    Preempted,
    /// It waits for an interrupt.
    Idle,
    /// Its VM ended.
    Ended,
}

/// Everything of a vCPU but its emulator, so that the emulator can be given the rest.
pub struct Core<V: Vendor> {
    /// Index in the VM; also the APIC ID.
    pub index: usize,
    /// The part that the hardware runs.
    pub hw: V::Vcpu,
    /// Local APIC.
    pub lapic: LocalApic,
    /// MSRs that the hardware does not switch.
    pub msrs: MsrState,
    /// State that is switched only with the vCPU.
    pub extended: ExtendedState,
    /// Second-stage faults and walks of the guest's own tables.
    pub paging: Paging,
    /// Events that wait for delivery.
    pub(super) events: Events,
    /// What it is doing.
    pub activity: Activity,
    /// Exits since reset before the last look whether its time is up, and those until the next.
    pub(super) exits_before: u64,
    pub(super) exits_left: u64,
    /// Something may be due before the next entry: an event, a timer, a request.
    pub(super) attention: bool,
    /// The hardware has the local APIC's interrupt state: what `lapic` says of it is out of date.
    pub(super) apic_lent: bool,
    /// Its local APIC may have been enabled since the last entry.
    pub(super) apic_enabled: bool,
    /// MSR_SYSTEM_TIME and MSR_WALL_CLOCK of the paravirtual clock.
    pub(super) system_time: u64,
    pub(super) wall_clock: u64,
    /// RIP of the last entry in a shadow, and how many more entries there count as in it.
    pub(super) shadow: (u64, u8),
    /// RIP and guest-physical address of the last write to a shadowed table that was left to the guest.
    pub(super) unshadowed: (u64, u64),
    /// It spins: let others run.
    pub(super) gives_way: bool,
    /// Other vCPUs of the VM that this one woke and that have not run since.
    pub(super) woken: VcpuSet,
}

/// A vCPU.
pub struct Vcpu<V: Vendor> {
    /// Everything but the emulator.
    pub core: Core<V>,
    pub(super) emulator: Emulator,
}

/// CPUID 8000_0001h EDX bit 26. No vCPU state changes it.
fn has_1g_pages(cpuid: &CpuidTable) -> bool {
    let state = CpuidState { apic_id: 0, apic_enabled: true, cr4: 0, xcr0: 1, long64: true };
    cpuid.lookup(0x8000_0001, 0, &state).edx & 1 << 26 != 0
}

/// Interrupts of one vCPU: its local APIC, and for vCPU 0 the 8259 pair.
struct Interrupts<'a, V: Vendor> {
    index: usize,
    lapic: &'a mut LocalApic,
    /// The hardware delivers the local APIC's interrupts; those of the 8259 pair are left.
    lapic_delivers: bool,
    guest: &'a Guest<V>,
}

impl<V: Vendor> InterruptSource for Interrupts<'_, V> {
    #[inline]
    fn pending(&mut self) -> bool {
        self.lapic.extint_pending() || !self.lapic_delivers && self.lapic.pending_interrupt().is_some()
    }

    #[inline]
    fn held_by_tpr(&mut self) -> bool {
        !self.lapic_delivers
            && self.lapic.highest_request().is_some()
            && self.lapic.pending_interrupt().is_none()
    }

    fn acknowledge(&mut self) -> Option<u8> {
        // An ExtINT has no priority class; the processor takes it first.
        if self.lapic.extint_pending() {
            let mut board = self.guest.board.lock();
            let vector = board.chipset.pic_ack();
            self.lapic.accept_extint();
            if self.index == 0 {
                self.lapic.set_lint(Lint::Lint0, board.show_pic_intr());
            }
            return Some(vector);
        }
        if self.lapic_delivers {
            return None;
        }
        let vector = self.lapic.pending_interrupt()?;
        self.lapic.accept(vector);
        Some(vector)
    }
}

impl<V: Vendor> Vcpu<V> {
    /// A vCPU in reset state; the first of a VM runs when it is started, the others wait for a start-up message.
    pub fn new(vendor: &V, guest: &Guest<V>, index: usize, facts: XsaveFacts) -> Result<Self, OutOfMemory> {
        let caps = guest.cpuid.caps();
        let cpu = GuestCpu {
            max_phys_addr: caps.phys_bits,
            gib_pages: has_1g_pages(&guest.cpuid),
            pse36: true,
            amd: caps.vendor == CpuVendor::Amd,
        };
        let (top_mem, top_mem2) = guest.memory.ram().tops();
        let msrs = MsrState::new(top_mem, top_mem2);
        let mut hw = vendor.new_vcpu(guest.memory.translation(), caps.cr4)?;
        hw.set_tsc_offset(guest.clock.tsc_offset(0));
        let core = Core {
            index,
            hw,
            lapic: LocalApic::new(index as u8, index == 0, caps.phys_bits),
            msrs,
            extended: ExtendedState::new(facts)?,
            paging: Paging::new(&guest.memory, cpu)?,
            events: Events::default(),
            activity: Activity::WaitForSipi,
            exits_before: 0,
            exits_left: ATTENTION_INTERVAL,
            attention: false,
            apic_lent: false,
            apic_enabled: false,
            system_time: 0,
            wall_clock: 0,
            shadow: (0, 0),
            unshadowed: (0, 0),
            gives_way: false,
            woken: VcpuSet::EMPTY,
        };
        let mut core = core;
        if let Some(port) = guest.bus.port(index) {
            // From now on the others can reach it: an INIT and a start-up message are what it waits for.
            let _ = core.lapic.sync(port);
        }
        let emulator = Emulator::new().map_err(|_| OutOfMemory)?;
        Ok(Self { core, emulator })
    }

    /// Starts the vCPU as a boot loader would: with the registers that the kernel's boot protocol asks for.
    pub fn start(&mut self, entry: &EntryState) {
        let segment = |segment: load::entry::Segment| {
            let load::entry::Segment { selector, attributes, limit, base } = segment;
            Segment { selector, attributes, limit, base }
        };
        let data = segment(entry.data);
        let state = CpuState {
            segments: [data, segment(entry.cs), data, data, data, data],
            ldtr: Segment::default(),
            tr: segment(entry.tr),
            gdtr: TableRegister { base: entry.gdtr.base, limit: entry.gdtr.limit },
            idtr: TableRegister { base: 0, limit: 0 },
            cr0: entry.cr0,
            cr3: entry.cr3,
            cr4: entry.cr4,
            efer: entry.efer,
            rflags: entry.rflags,
            rip: entry.rip,
            ..CpuState::reset()
        };
        self.core.load_state(&state);
        let gprs = self.core.hw.gprs_mut();
        *gprs = [0; 16];
        (gprs[gpr::RAX], gprs[gpr::RBX]) = (entry.rax, entry.rbx);
        (gprs[gpr::RSP], gprs[gpr::RSI]) = (entry.rsp, entry.rsi);
        self.core.activity = Activity::Running;
    }

    /// Whether the vCPU has a reason to run, or to look whether it has one.
    pub fn is_runnable(&self, guest: &Guest<V>) -> bool {
        self.core.activity == Activity::Running
            || self.core.attention
            || guest.bus.port(self.core.index).is_some_and(|port| !port.is_empty())
    }

    /// Whether nothing but an NMI, INIT or SIPI can ever make this vCPU run again.
    pub fn is_dead(&self, guest: &Guest<V>) -> bool {
        let halted_for_good = match self.core.activity {
            Activity::Running => false,
            Activity::Halted => self.core.hw.rflags() & RFLAGS_IF == 0,
            Activity::WaitForSipi => true,
        };
        halted_for_good
            && !self.core.lapic.lint0_is_nmi()
            && !self.core.events.any(&self.core.hw)
            && !guest.has_mail(self.core.index)
    }

    /// When, in the host's TSC, this vCPU's timer is due, seen from `now`.
    pub fn deadline(&self, guest: &Guest<V>, now: u64) -> Option<u64> {
        let adjust = self.core.msrs.tsc_adjust;
        self.core.lapic.next_event().map(|deadline| guest.clock.host_tsc_of(deadline, adjust, now))
    }

    /// Puts its state that only a change of vCPUs switches into this CPU's registers.
    pub fn switch_in(&mut self) {
        self.core.extended.load();
        self.core.hw.switch_in();
    }

    /// Takes that state out of this CPU's registers.
    pub fn switch_out(&mut self) {
        self.core.extended.save();
        self.core.hw.switch_out();
    }

    /// Makes the vCPU look at its timers and interrupts before it goes on.
    pub fn kick(&mut self) {
        self.core.attention = true;
    }

    /// Vcpus that this one woke since the last call.
    pub fn take_woken(&mut self) -> VcpuSet {
        core::mem::take(&mut self.core.woken)
    }

    /// Runs the vCPU on this CPU until it has to wait, its VM ends, or the host's TSC reaches `until`.
    /// Host interrupts are off.
    pub fn run(&mut self, guest: &Guest<V>, timer: &mut HostTimer, until: u64) -> Pause {
        // Each vCPU of a VM has one.
        let Some(mailbox) = guest.bus.port(self.core.index) else { return Pause::Idle };
        self.core.attention = true;
        self.core.paging.move_here();
        loop {
            if self.core.attention || !mailbox.is_empty() {
                if let Some(pause) = self.attend(guest, timer, until) {
                    return pause;
                }
            }
            let exit = self.core.enter(guest);
            self.handle(guest, exit);
        }
    }

    /// Does what is due before the guest goes on: requests from other CPUs, timers, events.
    fn attend(&mut self, guest: &Guest<V>, timer: &mut HostTimer, until: u64) -> Option<Pause> {
        let core = &mut self.core;
        core.reclaim_apic();
        core.attention = false;
        let now = tsc::read();
        let ns = guest.clock.ns(now);
        core.lapic.advance(ns, guest.clock.guest_tsc(now, core.msrs.tsc_adjust));
        let chipset_deadline = {
            let mut board = guest.board.lock();
            board.chipset.advance(ns);
            guest.with_sink(&mut core.woken, |sink| board.update_lines(sink));
            if core.index == 0 {
                core.lapic.set_lint(Lint::Lint0, board.show_pic_intr());
            } else if board.pic_intr_is_news() {
                core.woken.0 |= 1;
            }
            board.chipset.next_event(ns)
        };
        // What woke this vCPU itself is in its mailbox.
        core.woken.0 &= !(1 << core.index);
        if let Some(port) = guest.bus.port(core.index) {
            let requests = core.lapic.sync(port);
            if !requests.is_empty() {
                core.obey(guest, requests);
            }
        }
        if core::mem::take(&mut core.apic_enabled) {
            // A level interrupt that no APIC took may find one now.
            let mut board = guest.board.lock();
            guest.with_sink(&mut core.woken, |sink| board.ioapic.retry(sink));
        }
        if guest.has_ended() {
            return Some(Pause::Ended);
        }
        let mut interrupts =
            Interrupts { index: core.index, lapic: &mut core.lapic, lapic_delivers: false, guest };
        match core.activity {
            Activity::Running => {}
            Activity::WaitForSipi => return Some(Pause::Idle),
            Activity::Halted => {
                let open = core.hw.rflags() & RFLAGS_IF != 0;
                if !(core.events.any(&core.hw) || open && interrupts.pending()) {
                    return Some(Pause::Idle);
                }
                core.activity = Activity::Running;
            }
        }
        let gives_way = core::mem::take(&mut core.gives_way);
        if now >= until || gives_way || !core.woken.is_empty() {
            core.attention = true;
            return Some(Pause::Preempted);
        }
        // QEMU's TCG forgets the shadow at VMRUN. If the guest has not moved since it was entered in one, it still is in
        // it; not more than a few times, for it may be in a loop of one instruction.
        if core.shadow.0 == core.hw.rip() && core.shadow.1 > 0 && !core.hw.in_shadow() {
            core.shadow.1 -= 1;
            core.hw.restore_shadow();
        } else {
            core.shadow = (core.hw.rip(), if core.hw.in_shadow() { SHADOW_TRIES } else { 0 });
        }
        let lend = core.hw.has_virtual_apic() && interrupts.lapic.can_be_exported();
        interrupts.lapic_delivers = lend;
        core.events.prepare_entry(&mut core.hw, &mut interrupts);
        if lend {
            core.hw.lend_apic(&core.lapic);
            core.apic_lent = true;
        } else {
            core.hw.set_cr8(core.lapic.cr8());
        }
        if let Some(event) = core.hw.take_undeliverable() {
            if !self.deliver(guest, event) {
                // What came of it is looked at in the next round, from the beginning.
                return Some(Pause::Preempted);
            }
        }
        let core = &mut self.core;
        let mut deadline = until;
        if core.hw.in_shadow() {
            // QEMU's TCG forgets the shadow at VMRUN, so a window would open before the instruction behind STI: with
            // `sti; hlt` the interrupt would come first and HLT wait for ever. The next exit, soon, is window enough.
            core.hw.request_interrupt_window(false);
            core.attention = true;
            // A slow processor may not get anywhere in so little time: it has twice as much each time it has not moved.
            let patience = SHADOW_NS << SHADOW_TRIES.saturating_sub(core.shadow.1);
            deadline = deadline.min(now.saturating_add(guest.clock.rate().ticks(patience)));
        }
        if let Some(at) = chipset_deadline {
            deadline = deadline.min(guest.clock.host_tsc_of_ns(at));
        }
        if let Some(at) = core.lapic.next_event() {
            deadline = deadline.min(guest.clock.host_tsc_of(at, core.msrs.tsc_adjust, now));
        }
        if !core.hw.set_deadline(deadline) {
            timer.arm(deadline);
        }
        None
    }

    /// Ends the VM because of what this vCPU did.
    pub(super) fn stop(&mut self, guest: &Guest<V>, reason: StopReason) {
        let (bytes, bytes_len) = self.core.fetch_for_report(guest);
        let stop = Stop { reason, vcpu: self.core.index, rip: self.core.hw.rip(), bytes, bytes_len };
        guest.end(End::Stopped(stop));
        self.core.attention = true;
    }
}
