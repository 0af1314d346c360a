//! Which event a vCPU takes next: interrupted deliveries, exceptions, NMIs, interrupts, in that order.
//!
//! AMD APM vol. 2, 8.5 (priorities), 15.20 (injection), 15.21.4 and 15.21.9 (interrupt window and NMI). Without
//! virtual NMIs the end of an NMI handler is found by intercepting IRET, and an NMI that waits for it is
//! delivered by stepping over that one instruction.
use super::exceptions::{combine, DB};
use crate::hw::{Event, HwVcpu};

const RFLAGS_TF: u64 = 1 << 8;
/// DR6.BS: single step.
pub const DR6_BS: u64 = 1 << 14;

/// Where a vCPU's maskable interrupts come from: its local APIC and, through LINT0, the 8259 pair.
pub trait InterruptSource {
    /// Whether an interrupt could be taken if the CPU were open to it.
    fn pending(&mut self) -> bool;
    /// Whether an interrupt waits that only the task priority holds back.
    fn held_by_tpr(&mut self) -> bool;
    /// Acknowledges the interrupt with the highest priority; None if it went away.
    fn acknowledge(&mut self) -> Option<u8>;
}

/// How far the current NMI handler is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum NmiBlock {
    /// No NMI handler runs.
    #[default]
    Open,
    /// An NMI was delivered and no IRET executed since.
    Blocked,
    /// The IRET at `rip` is about to execute; `step` if TF was set to stop right after it, with the guest's own
    /// TF in `guest_tf`.
    AtIret { rip: u64, step: bool, guest_tf: bool },
}

/// More went wrong than an event can say: the vCPU shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TripleFault;

/// Events of one vCPU that wait for delivery.
#[derive(Debug, Default)]
pub struct Events {
    /// What the next entry delivers before anything else: an interrupted delivery, or an exception.
    next: Option<Event>,
    /// An interrupt, acknowledged already, that an exception overtook.
    later: Option<Event>,
    /// `next` is an event whose delivery the last exit interrupted.
    interrupted: bool,
    nmi_pending: bool,
    nmi_block: NmiBlock,
}

impl Events {
    /// Forgets everything, as INIT does.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Whether something waits that needs no acknowledgement from an interrupt controller.
    pub fn any(&self) -> bool {
        self.next.is_some() || self.later.is_some() || (self.nmi_pending && self.nmi_block == NmiBlock::Open)
    }

    /// Latches an NMI. More than one cannot wait.
    pub fn raise_nmi(&mut self) {
        self.nmi_pending = true;
    }

    /// Keeps an event whose delivery the last exit interrupted.
    pub fn interrupted(&mut self, event: Event) {
        if event == Event::Nmi {
            // It will block again when it is injected again.
            self.nmi_block = NmiBlock::Open;
        }
        // What was not delivered yet goes after it.
        if let Some(waiting @ Event::Interrupt(_)) = self.next.replace(event) {
            self.later.get_or_insert(waiting);
        }
        self.interrupted = true;
    }

    /// Whether an event's delivery was interrupted by the last exit.
    pub fn delivery_was_interrupted(&self) -> bool {
        self.interrupted
    }

    /// Whether an exception waits for the next entry.
    pub fn exception_waits(&self) -> bool {
        matches!(self.next, Some(Event::Exception(..)))
    }

    /// Raises an exception, which may meet an interrupted delivery.
    pub fn raise(&mut self, vector: u8, error_code: Option<u32>) -> Result<(), TripleFault> {
        let event = match self.next.take() {
            None => Event::Exception(vector, error_code),
            Some(first) => {
                let (now, later) = combine(first, (vector, error_code)).ok_or(TripleFault)?;
                match later {
                    Some(Event::Nmi) => self.nmi_pending = true,
                    Some(overtaken) => self.later = Some(overtaken),
                    None => {}
                }
                now
            }
        };
        self.next = Some(event);
        Ok(())
    }

    /// The guest is about to execute IRET, which ends its NMI handler.
    pub fn at_iret<H: HwVcpu>(&mut self, hw: &mut H) {
        hw.intercept_iret(false);
        self.nmi_block = NmiBlock::AtIret { rip: hw.rip(), step: false, guest_tf: false };
    }

    /// An IRET that did not run on the hardware has completed.
    pub fn unblock_nmi<H: HwVcpu>(&mut self, hw: &mut H) {
        hw.intercept_iret(false);
        self.nmi_block = NmiBlock::Open;
    }

    /// A debug exception exited. True if it was our own step over an IRET, which the guest must not see.
    pub fn swallows_debug<H: HwVcpu>(&mut self, hw: &mut H) -> bool {
        let NmiBlock::AtIret { step: true, guest_tf, .. } = self.nmi_block else { return false };
        self.nmi_block = NmiBlock::Open;
        let dr6 = hw.dr6();
        if guest_tf || dr6 & 0xf != 0 {
            return false;
        }
        hw.set_dr6(dr6 & !DR6_BS);
        true
    }

    /// Sets up what the next entry delivers, or what must exit so that it can be delivered.
    #[inline]
    pub fn prepare_entry<H: HwVcpu>(&mut self, hw: &mut H, interrupts: &mut impl InterruptSource) {
        self.settle(hw);
        self.interrupted = false;
        if let Some(event) = self.next.take() {
            if event == Event::Nmi {
                self.block_nmi(hw);
            }
            hw.inject(event);
        } else if self.later.is_some() && hw.interrupts_open() {
            if let Some(event) = self.later.take() {
                hw.inject(event);
            }
        } else if self.nmi_pending && self.nmi_block == NmiBlock::Open && !hw.in_shadow() {
            self.nmi_pending = false;
            self.block_nmi(hw);
            hw.inject(Event::Nmi);
        }
        let mut window = self.later.is_some() || (self.nmi_pending && self.nmi_block == NmiBlock::Open);
        if interrupts.pending() {
            if hw.interrupts_open() && self.later.is_none() {
                if let Some(vector) = interrupts.acknowledge() {
                    hw.inject(Event::Interrupt(vector));
                }
                window |= interrupts.pending();
            } else {
                window = true;
            }
        }
        hw.request_interrupt_window(window);
        hw.intercept_cr8_writes(interrupts.held_by_tpr());
    }

    fn block_nmi<H: HwVcpu>(&mut self, hw: &mut H) {
        self.nmi_block = NmiBlock::Blocked;
        hw.intercept_iret(true);
    }

    /// Notices that an IRET that ends an NMI handler has executed, or makes sure that the guest stops right after it.
    /// To be called before [`any`](Self::any) counts.
    #[inline]
    pub fn settle<H: HwVcpu>(&mut self, hw: &mut H) {
        let NmiBlock::AtIret { rip, step, .. } = self.nmi_block else { return };
        if hw.rip() != rip {
            self.nmi_block = NmiBlock::Open;
        } else if self.nmi_pending && !step {
            let rflags = hw.rflags();
            hw.set_rflags(rflags | RFLAGS_TF);
            self.nmi_block = NmiBlock::AtIret { rip, step: true, guest_tf: rflags & RFLAGS_TF != 0 };
        }
    }
}

/// The trap that single-stepping owes after an instruction that Umbra completed in the guest's place.
pub const SINGLE_STEP: (u8, Option<u32>) = (DB, None);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hw::fake::FakeVcpu;

    #[derive(Default)]
    struct Source {
        waiting: std::vec::Vec<u8>,
        held: bool,
    }
    impl InterruptSource for Source {
        fn pending(&mut self) -> bool {
            !self.held && !self.waiting.is_empty()
        }
        fn held_by_tpr(&mut self) -> bool {
            self.held && !self.waiting.is_empty()
        }
        fn acknowledge(&mut self) -> Option<u8> {
            (!self.waiting.is_empty()).then(|| self.waiting.remove(0))
        }
    }

    fn open() -> FakeVcpu {
        FakeVcpu { rflags: 0x202, ..FakeVcpu::default() }
    }

    #[test]
    fn an_interrupt_goes_in_when_the_guest_is_open() {
        let (mut events, mut hw) = (Events::default(), open());
        events.prepare_entry(&mut hw, &mut Source { waiting: vec![0x31], held: false });
        assert_eq!(hw.injected, Some(Event::Interrupt(0x31)));
        assert!(!hw.window);
    }

    #[test]
    fn a_second_interrupt_asks_for_a_window() {
        let (mut events, mut hw) = (Events::default(), open());
        events.prepare_entry(&mut hw, &mut Source { waiting: vec![0x31, 0x32], held: false });
        assert_eq!(hw.injected, Some(Event::Interrupt(0x31)));
        assert!(hw.window);
    }

    #[test]
    fn a_closed_guest_gets_a_window_instead() {
        for (rflags, shadow) in [(0x2, false), (0x202, true)] {
            let mut hw = FakeVcpu { rflags, shadow, ..FakeVcpu::default() };
            let mut source = Source { waiting: vec![0x40], held: false };
            Events::default().prepare_entry(&mut hw, &mut source);
            assert_eq!(hw.injected, None);
            assert!(hw.window);
            assert_eq!(source.waiting, [0x40], "not acknowledged before it can be delivered");
        }
    }

    #[test]
    fn an_interrupt_held_by_the_tpr_watches_cr8() {
        let mut hw = open();
        Events::default().prepare_entry(&mut hw, &mut Source { waiting: vec![0x40], held: true });
        assert!(hw.cr8_exits && !hw.window && hw.injected.is_none());
        Events::default().prepare_entry(&mut hw, &mut Source::default());
        assert!(!hw.cr8_exits);
    }

    #[test]
    fn an_interrupted_delivery_comes_before_everything() {
        let (mut events, mut hw) = (Events::default(), open());
        events.interrupted(Event::Interrupt(0x50));
        events.raise_nmi();
        let mut source = Source { waiting: vec![0x60], held: false };
        events.prepare_entry(&mut hw, &mut source);
        assert_eq!(hw.injected, Some(Event::Interrupt(0x50)));
        assert!(hw.window && source.waiting == [0x60]);
    }

    #[test]
    fn a_fault_during_a_fault_doubles_and_then_shuts_down() {
        let (mut events, mut hw) = (Events::default(), open());
        events.interrupted(Event::Exception(14, Some(0)));
        events.raise(14, Some(2)).unwrap();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, Some(Event::Exception(8, Some(0))));
        events.interrupted(Event::Exception(8, Some(0)));
        assert_eq!(events.raise(14, Some(2)), Err(TripleFault));
    }

    #[test]
    fn an_exception_during_an_interrupt_goes_first_and_the_interrupt_is_kept() {
        let (mut events, mut hw) = (Events::default(), open());
        events.interrupted(Event::Interrupt(0x44));
        events.raise(14, Some(2)).unwrap();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected.take(), Some(Event::Exception(14, Some(2))));
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, Some(Event::Interrupt(0x44)));
    }

    #[test]
    fn an_overtaken_interrupt_waits_until_the_handler_opens() {
        let (mut events, mut hw) = (Events::default(), open());
        events.interrupted(Event::Interrupt(0x44));
        events.raise(17, Some(0)).unwrap();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected.take(), Some(Event::Exception(17, Some(0))));
        assert!(!events.delivery_was_interrupted(), "an MMIO access of the handler is no delivery");
        hw.rflags = 2;
        events.prepare_entry(&mut hw, &mut Source::default());
        assert!(hw.injected.is_none() && hw.window);
        hw.rflags = 0x202;
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, Some(Event::Interrupt(0x44)));
    }

    #[test]
    fn an_overtaken_interrupt_survives_an_interrupted_exception() {
        let (mut events, mut hw) = (Events::default(), open());
        events.interrupted(Event::Interrupt(0x44));
        events.raise(17, Some(0)).unwrap();
        events.prepare_entry(&mut hw, &mut Source::default());
        hw.injected = None;
        events.interrupted(Event::Exception(17, Some(0)));
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected.take(), Some(Event::Exception(17, Some(0))));
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, Some(Event::Interrupt(0x44)));
    }

    #[test]
    fn nmis_wait_for_iret_and_then_come_at_once() {
        let (mut events, mut hw) = (Events::default(), open());
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected.take(), Some(Event::Nmi));
        assert!(hw.iret_exits);
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, None, "blocked while the handler runs");

        hw.rip = 0x1234;
        events.at_iret(&mut hw);
        events.prepare_entry(&mut hw, &mut Source::default());
        assert!(!hw.iret_exits && hw.injected.is_none());
        assert_eq!(hw.rflags & RFLAGS_TF, RFLAGS_TF, "one step over the IRET");
        hw.rip = 0x5678;
        hw.dr6 = 0xffff_0ff0 | DR6_BS;
        assert!(events.swallows_debug(&mut hw));
        assert_eq!(hw.dr6, 0xffff_0ff0);
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, Some(Event::Nmi));
    }

    #[test]
    fn an_emulated_iret_ends_the_handler_at_once() {
        let (mut events, mut hw) = (Events::default(), open());
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        hw.injected = None;
        events.raise_nmi();
        events.unblock_nmi(&mut hw);
        assert!(!hw.iret_exits);
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, Some(Event::Nmi));
        assert_eq!(hw.rflags & RFLAGS_TF, 0);
    }

    #[test]
    fn an_iret_without_a_waiting_nmi_needs_no_step() {
        let (mut events, mut hw) = (Events::default(), open());
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        hw.injected = None;
        events.at_iret(&mut hw);
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.rflags & RFLAGS_TF, 0);
        hw.rip += 2;
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, Some(Event::Nmi));
    }

    #[test]
    fn an_nmi_wakes_a_cpu_that_halted_right_after_the_handler() {
        let (mut events, mut hw) = (Events::default(), open());
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        events.at_iret(&mut hw);
        hw.rip += 0x100;
        events.raise_nmi();
        events.settle(&mut hw);
        assert!(events.any());
    }

    #[test]
    fn a_guest_that_steps_itself_sees_its_own_trap() {
        let (mut events, mut hw) = (Events::default(), open());
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        hw.rflags |= RFLAGS_TF;
        events.raise_nmi();
        events.at_iret(&mut hw);
        events.prepare_entry(&mut hw, &mut Source::default());
        assert!(!events.swallows_debug(&mut hw));
    }

    #[test]
    fn no_nmi_in_the_shadow_of_mov_ss() {
        let (mut events, mut hw) = (Events::default(), open());
        hw.shadow = true;
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, None);
        assert!(hw.window);
    }
}
