//! Which event a vCPU takes next: interrupted deliveries, exceptions, NMIs, interrupts, in that order.
//!
//! AMD APM vol. 2, 8.5 (priorities), 15.20 (injection), 15.21.4 (interrupt window); Intel SDM vol. 3, 6.9 (priorities).
//! Whether an NMI handler runs is for the hardware's side to know: [`HwVcpu::nmis_blocked`].
use super::exceptions::{combine, DB};
use crate::hw::{Event, HwVcpu};

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
}

impl Events {
    /// Forgets everything, as INIT does.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Whether something waits that needs no acknowledgement from an interrupt controller.
    pub fn any<H: HwVcpu>(&self, hw: &H) -> bool {
        self.next.is_some() || self.later.is_some() || (self.nmi_pending && !hw.nmis_blocked())
    }

    /// Whether nothing waits, and no delivery was interrupted.
    #[inline]
    pub fn is_idle(&self) -> bool {
        self.next.is_none() && self.later.is_none() && !self.interrupted && !self.nmi_pending
    }

    /// Latches an NMI. More than one cannot wait.
    pub fn raise_nmi(&mut self) {
        self.nmi_pending = true;
    }

    /// Keeps an event whose delivery the last exit interrupted.
    pub fn interrupted(&mut self, event: Event) {
        // What was not delivered yet goes after it.
        if let Some(waiting @ Event::Interrupt(_)) = self.next.replace(event) {
            self.later.get_or_insert(waiting);
        }
        self.interrupted = true;
    }

    /// Takes back the event whose delivery the last exit interrupted: it is delivered another way.
    pub fn take_interrupted(&mut self) -> Option<Event> {
        if core::mem::take(&mut self.interrupted) {
            self.next.take()
        } else {
            None
        }
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

    /// Sets up what the next entry delivers, or what must exit so that it can be delivered.
    #[inline]
    pub fn prepare_entry<H: HwVcpu>(&mut self, hw: &mut H, interrupts: &mut impl InterruptSource) {
        self.interrupted = false;
        if let Some(event) = self.next.take() {
            hw.inject(event);
        } else if self.later.is_some() && hw.interrupts_open() {
            if let Some(event) = self.later.take() {
                hw.inject(event);
            }
        } else if self.nmi_pending && !hw.nmis_blocked() && !hw.in_shadow() {
            self.nmi_pending = false;
            hw.inject(Event::Nmi);
        }
        let mut window = self.later.is_some();
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
        hw.request_nmi_window(self.nmi_pending);
        hw.intercept_cr8_writes(interrupts.held_by_tpr());
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
    fn what_is_delivered_another_way_is_not_delivered_again() {
        let (mut events, mut hw) = (Events::default(), open());
        events.raise(6, None).unwrap();
        assert_eq!(
            events.take_interrupted(),
            None,
            "an exception that only waits is no interrupted delivery"
        );
        events.prepare_entry(&mut hw, &mut Source::default());
        hw.injected = None;
        events.interrupted(Event::Exception(6, None));
        assert_eq!(events.take_interrupted(), Some(Event::Exception(6, None)));
        assert!(!events.delivery_was_interrupted() && !events.any(&hw));
        assert_eq!(events.take_interrupted(), None);
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, None);
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
    fn nmis_wait_for_the_end_of_the_handler() {
        let (mut events, mut hw) = (Events::default(), open());
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected.take(), Some(Event::Nmi));
        assert!(!hw.nmi_window);
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, None, "blocked while the handler runs");
        assert!(hw.nmi_window && !events.any(&hw));
        hw.nmis_blocked = false;
        assert!(events.any(&hw), "an NMI wakes a CPU that halted right after the handler");
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, Some(Event::Nmi));
    }

    #[test]
    fn no_nmi_in_the_shadow_of_mov_ss() {
        let (mut events, mut hw) = (Events::default(), open());
        hw.shadow = true;
        events.raise_nmi();
        events.prepare_entry(&mut hw, &mut Source::default());
        assert_eq!(hw.injected, None);
        assert!(hw.nmi_window);
    }
}
