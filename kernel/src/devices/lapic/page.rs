//! The local APIC in a page, as hardware that delivers a guest's interrupts by itself wants to have it.
//!
//! Between two runs of a vCPU its [`LocalApic`] is the owner of the state. While the guest runs, a page may be: before the
//! entry [`LocalApic::export`] writes it, the processor works on it, and [`LocalApic::import`] reads what became of it.
//! In the page are task priority, requests, interrupts in service and what follows from them. All else, timer, LVT and ICR
//! among it, stays in the model, for the guest's accesses to them exit.
//!
//! Intel SDM vol. 3, 30.1.1 (virtual-APIC page); AMD APM vol. 2, 15.29 (AVIC backing page): both are the register page of
//! xAPIC mode.
use super::{ApicAction, LocalApic, VectorSet, LVT_LINT0, LVT_REMOTE_IRR, SVR_ENABLE, VERSION};
use core::mem::{offset_of, size_of};

/// A register: the low four bytes of its 16-byte slot. The others are zero, for RDMSR of a page reads eight bytes.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Register {
    value: u32,
    zero: [u32; 3],
}

/// The page. Registers that the hardware leaves to exits are not named.
#[repr(C, align(4096))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApicPage {
    reserved_0: [Register; 2],
    id: Register,
    version: Register,
    reserved_4: [Register; 4],
    tpr: Register,
    apr: Register,
    ppr: Register,
    eoi: Register,
    remote_read: Register,
    ldr: Register,
    dfr: Register,
    svr: Register,
    isr: [Register; 8],
    tmr: [Register; 8],
    irr: [Register; 8],
    others: [Register; 0x17],
    self_ipi: Register,
    beyond: [Register; 0xc0],
}

const _: () = {
    assert!(size_of::<ApicPage>() == 4096);
    assert!(offset_of!(ApicPage, id) == 0x20);
    assert!(offset_of!(ApicPage, version) == 0x30);
    assert!(offset_of!(ApicPage, tpr) == 0x80);
    assert!(offset_of!(ApicPage, ppr) == 0xa0);
    assert!(offset_of!(ApicPage, eoi) == 0xb0);
    assert!(offset_of!(ApicPage, ldr) == 0xd0);
    assert!(offset_of!(ApicPage, svr) == 0xf0);
    assert!(offset_of!(ApicPage, isr) == 0x100);
    assert!(offset_of!(ApicPage, tmr) == 0x180);
    assert!(offset_of!(ApicPage, irr) == 0x200);
    assert!(offset_of!(ApicPage, self_ipi) == 0x3f0);
};

/// What hardware wants to know of an exported APIC beside the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exported {
    /// The highest vector requested; 0 for none.
    pub requested: u8,
    /// The highest vector in service; 0 for none.
    pub in_service: u8,
    /// Vectors whose end of interrupt [`LocalApic::ended`] must hear of: the level-triggered ones.
    pub level: VectorSet,
}

impl LocalApic {
    /// Whether hardware can deliver this APIC's interrupts from a page: it is in x2APIC mode, and enabled by software. While
    /// it is not, it takes no IPI to itself (SDM 11.4.7.2), which the hardware does not know.
    #[inline]
    pub fn can_be_exported(&self) -> bool {
        self.is_x2apic() && self.state.svr & SVR_ENABLE != 0
    }

    /// Writes the registers that the hardware reads or changes by itself.
    pub fn export(&self, page: &mut ApicPage) -> Exported {
        page.id.value = u32::from(self.id);
        page.version.value = VERSION;
        page.ldr.value = self.ldr();
        page.tpr.value = self.state.tpr.into();
        page.ppr.value = self.ppr.into();
        write(&mut page.isr, &self.state.isr);
        write(&mut page.tmr, &self.state.tmr);
        write(&mut page.irr, &self.state.irr);
        Exported { requested: self.irr_top, in_service: self.isr_top, level: self.state.tmr }
    }

    /// Takes over what the guest and the hardware made of an exported page. The TMR is as it was: no hardware writes it, not
    /// even when the guest sends itself an interrupt.
    pub fn import(&mut self, page: &ApicPage) {
        self.state.tpr = page.tpr.value as u8;
        self.state.isr = read(&page.isr);
        self.state.irr = read(&page.irr);
        self.irr_top = self.state.irr.highest();
        self.isr_top = self.state.isr.highest();
        self.refresh_ppr();
    }

    /// The interrupt `vector`, a level-triggered one, has ended in hardware and is out of service: what is left of its EOI.
    pub fn ended(&mut self, vector: u8) -> ApicAction {
        if !self.state.tmr.contains(vector) {
            return ApicAction::None;
        }
        let lint0 = self.state.lvt[LVT_LINT0];
        if lint0 & LVT_REMOTE_IRR != 0 && lint0 as u8 == vector {
            self.state.lvt[LVT_LINT0] &= !LVT_REMOTE_IRR;
            self.poll_level_lint();
        }
        ApicAction::Eoi(vector)
    }
}

fn write(registers: &mut [Register; 8], set: &VectorSet) {
    for (index, register) in (0..).zip(registers) {
        register.value = set.word(index);
    }
}

/// A set without the vectors that no fixed interrupt can have.
fn read(registers: &[Register; 8]) -> VectorSet {
    let words = registers.map(|register| u64::from(register.value));
    let mut set = VectorSet(core::array::from_fn(|group| words[2 * group] | words[2 * group + 1] << 32));
    set.remove_illegal();
    set
}

#[cfg(test)]
mod tests {
    use super::super::{APIC_BASE_EN, APIC_BASE_EXTD, X2APIC_MSR_FIRST};
    use super::*;
    use crate::devices::apic_bus::{
        ApicBus, ApicMessage, ApicSink, BusSink, DeliveryMode, Destination, Trigger,
    };
    use crate::devices::lapic::Lint;
    use std::boxed::Box;

    const SVR: u32 = X2APIC_MSR_FIRST + 0xf;
    const TPR: u32 = X2APIC_MSR_FIRST + 8;
    const LINT0: u32 = X2APIC_MSR_FIRST + 0x35;
    const SELF_IPI: u32 = X2APIC_MSR_FIRST + 0x3f;

    fn page() -> Box<ApicPage> {
        // Every bit set, to see what an export leaves alone.
        let ones = Register { value: u32::MAX, zero: [0; 3] };
        Box::new(ApicPage {
            reserved_0: [ones; 2],
            id: ones,
            version: ones,
            reserved_4: [ones; 4],
            tpr: ones,
            apr: ones,
            ppr: ones,
            eoi: ones,
            remote_read: ones,
            ldr: ones,
            dfr: ones,
            svr: ones,
            isr: [ones; 8],
            tmr: [ones; 8],
            irr: [ones; 8],
            others: [ones; 0x17],
            self_ipi: ones,
            beyond: [ones; 0xc0],
        })
    }

    fn write_msr(apic: &mut LocalApic, msr: u32, value: u64) {
        assert_eq!(apic.msr_write(msr, value, 0, 0), Ok(ApicAction::None));
    }

    fn x2apic() -> LocalApic {
        let mut apic = LocalApic::new(3, true, 40);
        apic.set_base(apic.base() | APIC_BASE_EN | APIC_BASE_EXTD).unwrap();
        write_msr(&mut apic, SVR, 0x1ff);
        apic
    }

    /// An APIC with 0x31 (edge) in service and 0x52 (level) and 0xe1 (edge) requested, at priority 0x23.
    fn busy() -> LocalApic {
        let mut apic = x2apic();
        write_msr(&mut apic, SELF_IPI, 0x31);
        apic.accept(0x31);
        write_msr(&mut apic, SELF_IPI, 0xe1);
        write_msr(&mut apic, TPR, 0x23);
        let bus = ApicBus::new(4).unwrap();
        let port = bus.port(3).unwrap();
        assert!(apic.sync(port).is_empty());
        BusSink::new(&bus).send(ApicMessage {
            destination: Destination::One(3),
            mode: DeliveryMode::Fixed,
            trigger: Trigger::Level,
            vector: 0x52,
        });
        let requests = apic.sync(port);
        assert!(!requests.nmi() && !requests.init());
        apic
    }

    #[test]
    fn only_an_enabled_x2apic_goes_into_a_page() {
        let mut apic = LocalApic::new(0, true, 40);
        assert!(!apic.can_be_exported());
        assert_eq!(apic.mmio_write(0xf0, 4, 0x1ff, 0, 0), ApicAction::None);
        assert!(!apic.can_be_exported(), "xAPIC mode");
        apic = x2apic();
        assert!(apic.can_be_exported());
        write_msr(&mut apic, SVR, 0xff);
        assert!(!apic.can_be_exported(), "disabled by software");
    }

    #[test]
    fn registers_are_where_software_reads_them() {
        let (mut apic, mut page) = (busy(), page());
        let exported = apic.export(&mut page);
        assert_eq!((exported.requested, exported.in_service), (0xe1, 0x31));
        let mut level = VectorSet::EMPTY;
        level.insert(0x52);
        assert_eq!(exported.level, level);
        let registers = [(2, page.id), (3, page.version), (8, page.tpr), (0xa, page.ppr), (0xd, page.ldr)];
        let vectors = [(0x10, page.isr), (0x18, page.tmr), (0x20, page.irr)];
        let vectors = vectors.into_iter().flat_map(|(first, words)| (first..).zip(words));
        for (register, slot) in registers.into_iter().chain(vectors) {
            let read = apic.msr_read(X2APIC_MSR_FIRST + register, 0, 0).unwrap();
            assert_eq!((u64::from(slot.value), slot.zero), (read, [0; 3]), "register {register:#x}");
        }
    }

    #[test]
    fn a_page_that_nobody_touched_changes_nothing() {
        let (mut apic, mut page) = (busy(), page());
        apic.export(&mut page);
        let (before, pending) = (apic.save(), apic.pending_interrupt());
        apic.import(&page);
        assert_eq!((apic.save(), apic.pending_interrupt()), (before, pending));
    }

    #[test]
    fn what_the_hardware_did_is_as_if_the_model_had_done_it() {
        let (mut apic, mut page) = (busy(), page());
        let mut model = apic.clone();
        apic.export(&mut page);
        // The processor takes 0xe1, and the guest raises its priority and sends itself 0x71.
        page.irr[7].value = 0;
        page.isr[7].value = 1 << 1;
        page.tpr.value = 0x45;
        page.irr[3].value |= 1 << 0x11;
        apic.import(&page);
        model.accept(0xe1);
        write_msr(&mut model, TPR, 0x45);
        write_msr(&mut model, SELF_IPI, 0x71);
        assert_eq!(apic.save(), model.save());
        assert_eq!(apic.msr_read(X2APIC_MSR_FIRST + 0xa, 0, 0), Ok(0xe0));
        assert_eq!((apic.pending_interrupt(), apic.highest_request()), (None, Some(0x71)));
    }

    #[test]
    fn a_page_cannot_hold_what_no_apic_holds() {
        let mut apic = x2apic();
        apic.import(&page());
        let state = apic.save();
        assert_eq!((state.irr.0[0], state.isr.0[0]), (!0xffff, !0xffff));
    }

    #[test]
    fn the_end_of_a_level_interrupt_goes_on_to_the_io_apics() {
        let mut apic = busy();
        assert_eq!(apic.ended(0x52), ApicAction::Eoi(0x52));
        assert_eq!(apic.ended(0x31), ApicAction::None);
    }

    #[test]
    fn a_level_pin_that_is_still_asserted_asks_again() {
        let mut apic = x2apic();
        write_msr(&mut apic, LINT0, 1 << 15 | 0x61);
        apic.set_lint(Lint::Lint0, true);
        apic.accept(0x61);
        let mut page = page();
        apic.export(&mut page);
        page.isr[3].value = 0;
        apic.import(&page);
        assert_eq!(apic.pending_interrupt(), None);
        assert_eq!(apic.ended(0x61), ApicAction::Eoi(0x61));
        assert_eq!(apic.pending_interrupt(), Some(0x61));
    }
}
