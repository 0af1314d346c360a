//! Tests of the local APIC: registers in both modes, priorities against a model, IPIs, local interrupts, timer.
use super::super::apic_bus::{ApicBus, VcpuSet};
use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;

const EN: u64 = APIC_BASE_EN;
const EXTD: u64 = APIC_BASE_EXTD;
const BASE: u64 = 0xfee0_0000;

fn rd(apic: &mut LocalApic, offset: u32) -> u32 {
    apic.mmio_read(offset, 4, 0, 0) as u32
}

fn wr(apic: &mut LocalApic, offset: u32, value: u32) -> ApicAction {
    apic.mmio_write(offset, 4, value.into(), 0, 0)
}

fn set(apic: &mut LocalApic, offset: u32, value: u32) {
    assert_eq!(wr(apic, offset, value), ApicAction::None);
}

/// An APIC as a kernel leaves it: software-enabled, error vector 0xfe.
fn enabled() -> LocalApic {
    let mut apic = LocalApic::new(1, false, 40);
    set(&mut apic, 0xf0, 0x1ff);
    set(&mut apic, 0x370, 0xfe);
    apic
}

fn x2apic() -> LocalApic {
    let mut apic = LocalApic::new(37, false, 40);
    apic.set_base(BASE | EN | EXTD).unwrap();
    apic.msr_write(0x80f, 0x1ff, 0, 0).map(drop).unwrap();
    apic
}

fn msr_wr(apic: &mut LocalApic, msr: u32, value: u64) -> Result<(), Gp> {
    apic.msr_write(msr, value, 0, 0).map(drop)
}

fn drop(_: ApicAction) {}

fn self_ipi(apic: &mut LocalApic, vector: u8) {
    set(apic, 0x300, 0x4_0000 | u32::from(vector));
}

// ---- Registers ----

#[test]
fn power_up_values() {
    let mut apic = LocalApic::new(5, true, 40);
    assert_eq!(apic.base(), BASE | EN | APIC_BASE_BSP);
    assert_eq!(apic.mmio_base(), Some(BASE));
    for (offset, value) in [
        (0x20, 5 << 24),
        (0x30, 0x0005_0014),
        (0x80, 0),
        (0xa0, 0),
        (0xd0, 0),
        (0xe0, 0xffff_ffff),
        (0xf0, 0xff),
        (0x280, 0),
        (0x300, 0),
        (0x380, 0),
        (0x390, 0),
        (0x3e0, 0),
    ] {
        assert_eq!(rd(&mut apic, offset), value, "{offset:#x}");
    }
    for offset in (0x320..=0x370).step_by(16) {
        assert_eq!(rd(&mut apic, offset), 0x1_0000);
    }
    assert_eq!(apic.pending_interrupt(), None);
    assert_eq!(apic.next_event(), None);
}

#[test]
fn writable_bits() {
    let mut apic = enabled();
    for (offset, value) in [
        (0x20, 1 << 24),
        (0x30, 0x0005_0014),
        (0x80, 0xff),
        (0xd0, 0xff00_0000),
        (0xe0, 0xffff_ffff),
        (0x310, 0xff00_0000),
        (0x320, 0x7_00ff),
        (0x330, 0x1_07ff),
        (0x340, 0x1_07ff),
        (0x350, 0x1_a7ff),
        (0x360, 0x1_a7ff),
        (0x370, 0x1_00ff),
        (0x3e0, 0xb),
    ] {
        set(&mut apic, offset, 0xffff_ffff);
        assert_eq!(rd(&mut apic, offset), value, "{offset:#x}");
    }
    set(&mut apic, 0xe0, 0);
    assert_eq!(rd(&mut apic, 0xe0), 0x0fff_ffff);
    set(&mut apic, 0xf0, 0xffff_ffff);
    assert_eq!(rd(&mut apic, 0xf0), 0x3ff);
}

#[test]
fn access_sizes() {
    let mut apic = enabled();
    set(&mut apic, 0x350, 0x1_87ff);
    let mut read = |offset, size| apic.mmio_read(offset, size, 0, 0);
    assert_eq!(read(0x350, 1), 0xff);
    assert_eq!(read(0x351, 1), 0x87);
    assert_eq!(read(0x352, 2), 0x1);
    assert_eq!(read(0x350, 8), 0x1_87ff);
    assert_eq!(read(0x354, 4), 0, "beside the register");
    assert_eq!(read(0x35c, 8), 0);
    // Narrow and misaligned writes do nothing, wide ones are cut.
    for (offset, size) in [(0x80, 1), (0x80, 2), (0x84, 4), (0x8c, 8)] {
        assert_eq!(apic.mmio_write(offset, size, 0x30, 0, 0), ApicAction::None);
    }
    assert_eq!(rd(&mut apic, 0x80), 0);
    assert_eq!(apic.mmio_write(0x80, 8, 0xffff_ffff_0000_0042, 0, 0), ApicAction::None);
    assert_eq!(rd(&mut apic, 0x80), 0x42);
}

#[test]
fn reserved_registers_are_errors() {
    let mut apic = enabled();
    assert_eq!(rd(&mut apic, 0x40), 0);
    assert_eq!(apic.pending_interrupt(), Some(0xfe), "error interrupt");
    assert_eq!(rd(&mut apic, 0x280), 0, "not latched yet");
    set(&mut apic, 0x280, 0);
    assert_eq!(rd(&mut apic, 0x280), ESR_ILLEGAL_REGISTER);
    assert_eq!(rd(&mut apic, 0x280), ESR_ILLEGAL_REGISTER, "reading does not clear");
    set(&mut apic, 0x280, 0);
    assert_eq!(rd(&mut apic, 0x280), 0);
    set(&mut apic, 0x3f0, 0x40);
    set(&mut apic, 0x280, 0);
    assert_eq!(rd(&mut apic, 0x280), ESR_ILLEGAL_REGISTER, "self IPI is x2APIC's");
}

#[test]
fn base_transitions() {
    let (disabled, xapic, x2, invalid) = (0, EN, EN | EXTD, EXTD);
    let reach = |mode| {
        let mut apic = LocalApic::new(0, true, 40);
        let path: &[u64] = match mode {
            m if m == disabled => &[disabled],
            m if m == xapic => &[],
            _ => &[EN | EXTD],
        };
        for step in path {
            apic.set_base(BASE | step).unwrap();
        }
        apic
    };
    for (from, to, allowed) in [
        (disabled, disabled, true),
        (disabled, xapic, true),
        (disabled, x2, false),
        (disabled, invalid, false),
        (xapic, disabled, true),
        (xapic, xapic, true),
        (xapic, x2, true),
        (xapic, invalid, false),
        (x2, disabled, true),
        (x2, xapic, false),
        (x2, x2, true),
        (x2, invalid, false),
    ] {
        let mut apic = reach(from);
        let before = apic.base();
        assert_eq!(apic.set_base(BASE | to).is_ok(), allowed, "{from:#x} to {to:#x}");
        assert_eq!(apic.base(), if allowed { BASE | to } else { before });
        assert_eq!(apic.mmio_base().is_some(), apic.base() & (EN | EXTD) == EN);
    }
    let mut apic = reach(xapic);
    for bit in (0..8).chain([9]).chain(40..64) {
        assert_eq!(apic.set_base(BASE | EN | 1 << bit), Err(Gp), "bit {bit}");
    }
    apic.set_base(0x80_0000_0000 | EN).unwrap();
    assert_eq!(apic.mmio_base(), Some(0x80_0000_0000));
}

#[test]
fn disabling_forgets_and_init_keeps_the_mode() {
    let mut apic = x2apic();
    msr_wr(&mut apic, 0x83f, 0x55).unwrap();
    msr_wr(&mut apic, 0x808, 0x20).unwrap();
    apic.init_reset();
    assert!(apic.is_x2apic());
    assert_eq!(apic.msr_read(0x808, 0, 0), Ok(0));
    assert_eq!(apic.msr_read(0x80f, 0, 0), Ok(0xff));
    assert_eq!(apic.pending_interrupt(), None);
    msr_wr(&mut apic, 0x80f, 0x1ff).unwrap();
    apic.set_base(BASE).unwrap();
    apic.set_base(BASE | EN).unwrap();
    assert_eq!(rd(&mut apic, 0xf0), 0xff);
    let mut bsp = LocalApic::new(0, true, 40);
    bsp.set_base(BASE | APIC_BASE_BSP | EN | EXTD).unwrap();
    bsp.reset();
    assert_eq!(bsp.base(), BASE | APIC_BASE_BSP | EN);
}

#[test]
fn x2apic_msrs() {
    let mut apic = x2apic();
    assert_eq!(apic.msr_read(0x802, 0, 0), Ok(37));
    assert_eq!(apic.msr_read(0x80d, 0, 0), Ok(2 << 16 | 1 << 5));
    for msr in 0x800..=0x83fu32 {
        let readable = matches!(msr,
            0x802 | 0x803 | 0x808 | 0x80a | 0x80d | 0x80f..=0x828 | 0x830 | 0x832..=0x839 | 0x83e);
        assert_eq!(apic.msr_read(msr, 0, 0).is_ok(), readable, "read {msr:#x}");
        let writable = matches!(msr, 0x808 | 0x80b | 0x80f | 0x828 | 0x830 | 0x832..=0x838 | 0x83e | 0x83f);
        assert_eq!(msr_wr(&mut apic, msr, 0).is_ok(), writable, "write {msr:#x}");
    }
    for (msr, reserved) in [
        (0x808, !0xffu64),
        (0x80b, !0),
        (0x80f, !0x3ff),
        (0x828, !0),
        (0x830, 0xfff3_2000),
        (0x832, !0x7_50ff),
        (0x833, !0x1_57ff),
        (0x835, !0x1_f7ff),
        (0x837, !0x1_50ff),
        (0x838, !0xffff_ffff),
        (0x83e, !0xb),
        (0x83f, !0xff),
    ] {
        for bit in 0..64 {
            let expected = reserved >> bit & 1 == 0;
            assert_eq!(msr_wr(&mut apic, msr, 1 << bit).is_ok(), expected, "{msr:#x} bit {bit}");
        }
    }
    let mut xapic = enabled();
    assert_eq!(xapic.msr_read(0x802, 0, 0), Err(Gp));
    assert_eq!(msr_wr(&mut xapic, 0x80b, 0), Err(Gp));
    assert_eq!(apic.msr_read(0x7ff, 0, 0), Err(Gp));
    assert_eq!(apic.msr_read(0x840, 0, 0), Err(Gp));
}

// ---- Priorities ----

#[test]
fn nested_interrupts_and_eoi() {
    let mut apic = enabled();
    self_ipi(&mut apic, 0x41);
    self_ipi(&mut apic, 0x4f);
    assert_eq!(apic.pending_interrupt(), Some(0x4f));
    apic.accept(0x4f);
    assert_eq!(rd(&mut apic, 0xa0), 0x40);
    assert_eq!(apic.pending_interrupt(), None, "same class");
    self_ipi(&mut apic, 0x51);
    assert_eq!(apic.pending_interrupt(), Some(0x51));
    apic.accept(0x51);
    assert_eq!(rd(&mut apic, 0xa0), 0x50);
    set(&mut apic, 0xb0, 0);
    assert_eq!(rd(&mut apic, 0xa0), 0x40);
    set(&mut apic, 0xb0, 0);
    assert_eq!(apic.pending_interrupt(), Some(0x41));
    set(&mut apic, 0xb0, 0);
    assert_eq!(apic.pending_interrupt(), Some(0x41), "an EOI too many is nothing");
}

#[test]
fn tpr_and_cr8() {
    let mut apic = enabled();
    self_ipi(&mut apic, 0x41);
    set(&mut apic, 0x80, 0x4e);
    assert_eq!((apic.cr8(), apic.pending_interrupt()), (4, None));
    apic.set_cr8(4);
    assert_eq!(rd(&mut apic, 0x80), 0x4e, "the same class: untouched");
    apic.set_cr8(3);
    assert_eq!(rd(&mut apic, 0x80), 0x30);
    assert_eq!(apic.pending_interrupt(), Some(0x41));
    assert_eq!(apic.highest_request(), Some(0x41));
    apic.set_cr8(0xff);
    assert_eq!(rd(&mut apic, 0x80), 0xf0);
    assert_eq!(rd(&mut apic, 0x90), 0xf0, "APR");
}

#[test]
fn level_interrupts_broadcast_their_eoi() {
    let bus = ApicBus::new(2).unwrap();
    let port = bus.port(1).unwrap();
    let mut apic = enabled();
    assert_eq!(apic.sync(port), Requests::NONE);
    let message = |trigger| ApicMessage {
        destination: Destination::Physical(1),
        mode: DeliveryMode::Fixed,
        trigger,
        vector: 0x61,
    };
    for (trigger, action) in [(Trigger::Level, ApicAction::Eoi(0x61)), (Trigger::Edge, ApicAction::None)] {
        assert!(bus.deliver(message(trigger)).woken.contains(1));
        let requests = apic.sync(port);
        assert!(!requests.nmi() && !requests.init());
        assert_eq!(apic.pending_interrupt(), Some(0x61));
        assert_eq!(rd(&mut apic, 0x180 + 0x30), u32::from(trigger == Trigger::Level) << 1);
        apic.accept(0x61);
        assert_eq!(wr(&mut apic, 0xb0, 0), action);
    }
}

#[test]
fn accepting_what_is_not_requested_does_nothing() {
    let mut apic = enabled();
    self_ipi(&mut apic, 0x30);
    let before = apic.save();
    for vector in (0..=255).filter(|v| *v != 0x30) {
        apic.accept(vector);
    }
    assert_eq!(apic.save(), before);
}

/// The manual's rules on plain sets, without caches.
#[derive(Default)]
struct Model {
    irr: BTreeSet<u8>,
    isr: BTreeSet<u8>,
    tmr: BTreeSet<u8>,
    tpr: u8,
}

impl Model {
    fn ppr(&self) -> u8 {
        let isrv = self.isr.last().copied().unwrap_or(0);
        if self.tpr / 16 >= isrv / 16 {
            self.tpr
        } else {
            isrv / 16 * 16
        }
    }

    fn pending(&self) -> Option<u8> {
        self.irr.iter().rev().copied().find(|vector| vector / 16 > self.ppr() / 16)
    }

    fn request(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            return;
        }
        self.irr.insert(vector);
        if level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(&vector);
        }
    }

    fn eoi(&mut self) -> ApicAction {
        match self.isr.pop_last() {
            Some(vector) if self.tmr.contains(&vector) => ApicAction::Eoi(vector),
            _ => ApicAction::None,
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Message(u8, bool),
    SelfIpi(u8),
    Tpr(u8),
    Cr8(u8),
    Accept,
    Eoi,
    SaveRestore,
}

fn op() -> impl Strategy<Value = Op> {
    // Vectors crowd into few classes, so that they meet.
    let vector = || prop_oneof![0x10u8..0x60, any::<u8>()];
    prop_oneof![
        3 => (vector(), any::<bool>()).prop_map(|(v, l)| Op::Message(v, l)),
        2 => vector().prop_map(Op::SelfIpi),
        1 => prop_oneof![Just(0u8), any::<u8>()].prop_map(Op::Tpr),
        1 => any::<u8>().prop_map(Op::Cr8),
        4 => Just(Op::Accept),
        4 => Just(Op::Eoi),
        1 => Just(Op::SaveRestore),
    ]
}

fn words(apic: &mut LocalApic, offset: u32) -> BTreeSet<u8> {
    (0..=255u8).filter(|v| rd(apic, offset + u32::from(v / 32) * 16) >> (v % 32) & 1 != 0).collect()
}

proptest! {
    #[test]
    fn priorities_as_the_manual_says(ops in prop::collection::vec(op(), 0..120)) {
        let bus = ApicBus::new(2).unwrap();
        let port = bus.port(1).unwrap();
        let mut apic = enabled();
        set(&mut apic, 0x370, 0x1_0000);
        let mut model = Model::default();
        for op in ops {
            prop_assert_eq!(apic.sync(port).nmi(), false);
            match op {
                Op::Message(vector, level) => {
                    let trigger = if level { Trigger::Level } else { Trigger::Edge };
                    let destination = Destination::Physical(1);
                    let _ = bus.deliver(ApicMessage { destination, mode: DeliveryMode::Fixed, trigger, vector });
                    model.request(vector, level);
                    apic.sync(port);
                }
                Op::SelfIpi(vector) => {
                    self_ipi(&mut apic, vector);
                    model.request(vector, false);
                }
                Op::Tpr(tpr) => {
                    set(&mut apic, 0x80, tpr.into());
                    model.tpr = tpr;
                }
                Op::Cr8(cr8) => {
                    apic.set_cr8(cr8);
                    if model.tpr / 16 != cr8 % 16 {
                        model.tpr = cr8 % 16 * 16;
                    }
                }
                Op::Accept => if let Some(vector) = apic.pending_interrupt() {
                    apic.accept(vector);
                    prop_assert!(model.irr.remove(&vector));
                    model.isr.insert(vector);
                },
                Op::Eoi => prop_assert_eq!(wr(&mut apic, 0xb0, 0), model.eoi()),
                Op::SaveRestore => {
                    let saved = apic.save();
                    apic = LocalApic::new(1, false, 40);
                    apic.restore(&saved);
                    prop_assert_eq!(apic.save(), saved);
                }
            }
            prop_assert_eq!(apic.pending_interrupt(), model.pending());
            prop_assert_eq!(apic.highest_request(), model.irr.last().copied());
            prop_assert_eq!(rd(&mut apic, 0xa0), u32::from(model.ppr()));
        }
        prop_assert_eq!(words(&mut apic, 0x100), model.isr);
        prop_assert_eq!(words(&mut apic, 0x180), model.tmr);
        prop_assert_eq!(words(&mut apic, 0x200), model.irr);
    }

    /// Any sequence of accesses is survived, and leaves a state that a save and restore reproduces.
    #[test]
    fn garbage_is_survived(
        start_x2apic: bool,
        steps in prop::collection::vec((0u8..9, any::<u32>(), any::<u64>(), any::<u8>()), 0..200),
    ) {
        let bus = ApicBus::new(3).unwrap();
        let port = bus.port(2).unwrap();
        let mut apic = LocalApic::new(2, false, 48);
        if start_x2apic {
            apic.set_base(BASE | EN | EXTD).unwrap();
        }
        let mut now = 0u64;
        for (kind, where_, value, size) in steps {
            now = now.saturating_add(value >> (size & 63));
            let tsc = now.wrapping_mul(3);
            match kind {
                0 => drop(apic.mmio_write(where_ & 0xff0, 4, value, now, tsc)),
                1 => drop(apic.mmio_write(where_, size, value, now, tsc)),
                2 => { apic.mmio_read(where_, size, now, tsc); }
                3 => { let _ = apic.msr_write(0x800 + (where_ & 0x3f), value & 0xffff, now, tsc); }
                4 => { let _ = apic.msr_read(0x800 + (where_ & 0x3f), now, tsc); }
                5 => { let _ = apic.set_base(BASE | value & (EN | EXTD)); }
                6 => { apic.set_tsc_deadline(value, now, tsc); apic.tsc_deadline(now, tsc); }
                7 => apic.set_lint(if size & 1 == 0 { Lint::Lint0 } else { Lint::Lint1 }, value & 1 != 0),
                _ => {
                    let _ = bus.deliver(ApicMessage {
                        destination: Destination::All,
                        mode: DeliveryMode::from_bits(where_).unwrap_or(DeliveryMode::Fixed),
                        trigger: Trigger::Edge,
                        vector: size,
                    });
                    apic.sync(port);
                    apic.set_cr8(size);
                }
            }
            apic.advance(now, tsc);
            if let Some(Deadline::Ns(at)) = apic.next_event() {
                prop_assert!(at > now || now == u64::MAX);
            }
            apic.extint_pending();
            if let Some(vector) = apic.pending_interrupt() {
                prop_assert!(vector >= 16);
                apic.accept(vector);
            }
        }
        let saved = apic.save();
        apic.restore(&saved);
        prop_assert_eq!(apic.save(), saved);
    }
}

// ---- Error status ----

#[test]
fn illegal_vectors() {
    let mut apic = enabled();
    self_ipi(&mut apic, 5);
    set(&mut apic, 0x300, 0x0000_000f);
    set(&mut apic, 0x280, 0);
    assert_eq!(rd(&mut apic, 0x280), ESR_SEND_ILLEGAL);

    let bus = ApicBus::new(2).unwrap();
    let port = bus.port(1).unwrap();
    apic.sync(port);
    let (destination, trigger) = (Destination::Physical(1), Trigger::Edge);
    let mode = DeliveryMode::Fixed;
    assert!(bus.deliver(ApicMessage { destination, mode, trigger, vector: 15 }).woken.contains(1));
    apic.sync(port);
    // A local interrupt with an illegal vector is received too; the error entry's own does not recurse.
    set(&mut apic, 0x370, 3);
    set(&mut apic, 0x320, 7);
    set(&mut apic, 0x280, 0);
    assert_eq!(rd(&mut apic, 0x280), ESR_RECEIVE_ILLEGAL);
    let _ = apic.mmio_write(0x380, 4, 10, 0, 0);
    apic.advance(1000, 0);
    set(&mut apic, 0x280, 0);
    assert_eq!(rd(&mut apic, 0x280), ESR_RECEIVE_ILLEGAL);
    let mut x2 = x2apic();
    msr_wr(&mut x2, 0x83f, 3).unwrap();
    msr_wr(&mut x2, 0x828, 0).unwrap();
    assert_eq!(x2.msr_read(0x828, 0, 0), Ok(ESR_SEND_ILLEGAL.into()));
}

// ---- IPIs ----

fn sent(action: ApicAction) -> ApicMessage {
    match action {
        ApicAction::Send(message) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn xapic_ipis() {
    let mut apic = enabled();
    set(&mut apic, 0x310, 0x0300_0000);
    let message = sent(wr(&mut apic, 0x300, 0x4031));
    let expected = ApicMessage {
        destination: Destination::Physical(3),
        mode: DeliveryMode::Fixed,
        trigger: Trigger::Edge,
        vector: 0x31,
    };
    assert_eq!(message, expected);
    assert_eq!(rd(&mut apic, 0x300), 0x4031);
    assert_eq!(sent(wr(&mut apic, 0x300, 0x4831)).destination, Destination::Logical(3));
    assert_eq!(sent(wr(&mut apic, 0x300, 0x8_4031)).destination, Destination::All);
    assert_eq!(sent(wr(&mut apic, 0x300, 0xc_4031)).destination, Destination::AllBut(1));
    for (bits, mode) in [
        (0x100, DeliveryMode::LowestPriority),
        (0x200, DeliveryMode::Smi),
        (0x400, DeliveryMode::Nmi),
        (0x4500, DeliveryMode::Init),
        (0xc500, DeliveryMode::Init),
        (0x600, DeliveryMode::StartUp),
        (0x700, DeliveryMode::ExtInt),
    ] {
        let message = sent(wr(&mut apic, 0x300, bits | 0x9a));
        assert_eq!((message.mode, message.vector), (mode, 0x9a));
        assert_eq!(message.trigger, Trigger::Edge);
    }
    set(&mut apic, 0x300, 0x8500); // INIT level de-assert
    set(&mut apic, 0x300, 0x0331); // reserved delivery mode
    set(&mut apic, 0x300, 0x4_0500); // INIT to self
    set(&mut apic, 0x300, 0x8_0610); // SIPI to all including self
    set(&mut apic, 0x310, 0xff00_0000);
    assert_eq!(sent(wr(&mut apic, 0x300, 0x31)).destination, Destination::All);
    assert_eq!(sent(wr(&mut apic, 0x300, 0x4_0400)).destination, Destination::One(1));
}

#[test]
fn x2apic_ipis() {
    let mut apic = x2apic();
    let mut send = |value| sent(apic.msr_write(0x830, value, 0, 0).unwrap());
    assert_eq!(send(0x0000_0007_0000_0031).destination, Destination::Physical(7));
    assert_eq!(send(0x0001_0003_0000_0831).destination, Destination::Logical(0x1_0003));
    assert_eq!(send(0xffff_ffff_0000_0031).destination, Destination::All);
    assert_eq!(send(0x0000_00ff_0000_0031).destination, Destination::Physical(0xff));
    assert_eq!(send(0x000c_0031).destination, Destination::AllBut(37));
    assert_eq!(apic.msr_read(0x830, 0, 0), Ok(0x000c_0031));
    msr_wr(&mut apic, 0x83f, 0x44).unwrap();
    assert_eq!(apic.pending_interrupt(), Some(0x44));
}

#[test]
fn software_disabled() {
    let mut apic = enabled();
    set(&mut apic, 0x320, 0x40);
    self_ipi(&mut apic, 0x30);
    set(&mut apic, 0xf0, 0xff);
    for offset in (0x320..=0x370).step_by(16) {
        assert_eq!(rd(&mut apic, offset) & 0x1_0000, 0x1_0000);
        set(&mut apic, offset, 0x40);
        assert_eq!(rd(&mut apic, offset), 0x1_0040, "stays masked");
    }
    self_ipi(&mut apic, 0x50);
    assert_eq!(apic.pending_interrupt(), Some(0x30), "held, but nothing new");
    set(&mut apic, 0x310, 0x0200_0000);
    assert_eq!(sent(wr(&mut apic, 0x300, 0x4600)).mode, DeliveryMode::StartUp);
    set(&mut apic, 0xf0, 0x1ff);
    assert_eq!(rd(&mut apic, 0x320), 0x1_0040, "unmasking is software's");
}

#[test]
fn published_identity_follows_the_registers() {
    let bus = ApicBus::new(2).unwrap();
    let port = bus.port(1).unwrap();
    let mut apic = enabled();
    let logical = |mda| {
        let destination = Destination::from_u8(mda, true);
        let (mode, trigger, vector) = (DeliveryMode::Fixed, Trigger::Edge, 0x20);
        bus.deliver(ApicMessage { destination, mode, trigger, vector }).accepted == VcpuSet(2)
    };
    apic.sync(port);
    assert!(!logical(0x22));
    set(&mut apic, 0xd0, 0x2200_0000);
    assert!(!logical(0x02), "published by sync");
    apic.sync(port);
    assert!(logical(0x02) && logical(0x20));
    set(&mut apic, 0xe0, 0x0fff_ffff);
    apic.sync(port);
    assert!(!logical(0x02) && logical(0x22));
    apic.set_base(BASE | EN | EXTD).unwrap();
    apic.sync(port);
    assert!(logical(0x02), "x2APIC ID 1: cluster 0, bit 1");
    apic.set_base(BASE).unwrap();
    apic.sync(port);
    assert!(!logical(0xff));
    apic.set_base(BASE | EN).unwrap();
    set(&mut apic, 0xf0, 0x1ff);
    apic.republish();
    apic.sync(port);
    assert!(logical(0xff));
}

// ---- Local interrupts ----

#[test]
fn virtual_wire() {
    let mut apic = LocalApic::new(0, true, 40);
    apic.set_lint(Lint::Lint0, true);
    assert!(!apic.extint_pending(), "masked after reset");
    set(&mut apic, 0xf0, 0x1ff);
    set(&mut apic, 0x350, 0x700);
    assert!(apic.extint_pending());
    apic.accept_extint();
    assert!(apic.extint_pending(), "the line is still high");
    apic.set_lint(Lint::Lint0, false);
    assert!(!apic.extint_pending());
    set(&mut apic, 0x350, 0x2700);
    assert!(apic.extint_pending(), "active low");
    set(&mut apic, 0x350, 0x1_2700);
    assert!(!apic.extint_pending());
    apic.set_base(BASE).unwrap();
    assert!(!apic.extint_pending());
    apic.set_lint(Lint::Lint0, true);
    assert!(apic.extint_pending(), "a disabled APIC passes INTR through");
    assert_eq!(apic.pending_interrupt(), None);
}

#[test]
fn extint_messages() {
    let bus = ApicBus::new(2).unwrap();
    let mut apic = enabled();
    apic.sync(bus.port(1).unwrap());
    let (destination, trigger) = (Destination::All, Trigger::Edge);
    let message = ApicMessage { destination, mode: DeliveryMode::ExtInt, trigger, vector: 0 };
    assert!(bus.deliver(message).accepted.contains(1));
    apic.sync(bus.port(1).unwrap());
    assert!(apic.extint_pending());
    apic.accept_extint();
    assert!(!apic.extint_pending());
}

#[test]
fn nmi_by_lint1() {
    let bus = ApicBus::new(2).unwrap();
    let mut apic = enabled();
    let port = bus.port(1).unwrap();
    set(&mut apic, 0x360, 0x400);
    apic.set_lint(Lint::Lint1, true);
    assert!(apic.sync(port).nmi());
    assert!(!apic.sync(port).nmi(), "an edge");
    apic.set_lint(Lint::Lint1, false);
    set(&mut apic, 0x360, 0x1_0400);
    apic.set_lint(Lint::Lint1, true);
    assert!(!apic.sync(port).nmi());
    set(&mut apic, 0x360, 0x8055);
    apic.set_lint(Lint::Lint1, false);
    apic.set_lint(Lint::Lint1, true);
    assert_eq!(apic.pending_interrupt(), Some(0x55));
    apic.accept(0x55);
    assert_eq!(wr(&mut apic, 0xb0, 0), ApicAction::None, "LINT1 is an edge whatever its trigger bit");
}

#[test]
fn fixed_lint0_edge_and_level() {
    let mut apic = enabled();
    set(&mut apic, 0x350, 0x45);
    apic.set_lint(Lint::Lint0, true);
    assert_eq!(apic.pending_interrupt(), Some(0x45));
    apic.accept(0x45);
    assert_eq!(wr(&mut apic, 0xb0, 0), ApicAction::None);

    set(&mut apic, 0x350, 0x8045);
    assert_eq!(rd(&mut apic, 0x350), 0xc045, "remote IRR: the line is high");
    apic.accept(0x45);
    assert_eq!(wr(&mut apic, 0xb0, 0), ApicAction::Eoi(0x45));
    assert_eq!(apic.pending_interrupt(), Some(0x45), "and again");
    apic.set_lint(Lint::Lint0, false);
    apic.accept(0x45);
    assert_eq!(wr(&mut apic, 0xb0, 0), ApicAction::Eoi(0x45));
    assert_eq!(apic.pending_interrupt(), None);
    assert_eq!(rd(&mut apic, 0x350), 0x8045);
}

// ---- Timer ----

#[test]
fn one_shot() {
    let mut apic = enabled();
    set(&mut apic, 0x320, 0x40);
    set(&mut apic, 0x3e0, 0b0011); // divide by 16
    assert_eq!(apic.mmio_write(0x380, 4, 100, 1000, 0), ApicAction::None);
    assert_eq!(apic.next_event(), Some(Deadline::Ns(2600)));
    let count = |apic: &mut LocalApic, now| apic.mmio_read(0x390, 4, now, 0);
    assert_eq!(count(&mut apic, 1000), 100);
    assert_eq!(count(&mut apic, 1015), 100);
    assert_eq!(count(&mut apic, 1016), 99);
    assert_eq!(count(&mut apic, 2599), 1);
    assert_eq!(apic.pending_interrupt(), None);
    assert_eq!(count(&mut apic, 2600), 0);
    assert_eq!(apic.pending_interrupt(), Some(0x40), "a read at zero is enough");
    assert_eq!(apic.next_event(), None);
    assert_eq!(rd(&mut apic, 0x380), 100);
    apic.accept(0x40);
    apic.advance(1 << 40, 0);
    assert_eq!(apic.pending_interrupt(), None, "once");
}

#[test]
fn divider_codes() {
    for (code, divider) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let mut apic = enabled();
        set(&mut apic, 0x320, 0x40);
        set(&mut apic, 0x3e0, code);
        set(&mut apic, 0x380, 7);
        assert_eq!(apic.next_event(), Some(Deadline::Ns(7 * divider)));
    }
    // A running counter keeps its count when the divider changes.
    let mut apic = enabled();
    set(&mut apic, 0x320, 0x40);
    set(&mut apic, 0x3e0, 0b1011);
    set(&mut apic, 0x380, 1000);
    let _ = apic.mmio_write(0x3e0, 4, 0, 400, 0);
    assert_eq!(apic.mmio_read(0x390, 4, 400, 0), 600);
    assert_eq!(apic.next_event(), Some(Deadline::Ns(400 + 1200)));
}

#[test]
fn periodic_catches_up_with_one_interrupt() {
    let mut apic = enabled();
    set(&mut apic, 0x3e0, 0b1011);
    set(&mut apic, 0x320, 0x2_0040);
    set(&mut apic, 0x380, 1_000_000);
    assert_eq!(apic.next_event(), Some(Deadline::Ns(1_000_000)));
    apic.advance(1_000_010, 0);
    apic.accept(0x40);
    set(&mut apic, 0xb0, 0);
    assert_eq!(apic.next_event(), Some(Deadline::Ns(2_000_000)), "no drift");
    assert_eq!(apic.mmio_read(0x390, 4, 1_000_010, 0), 999_990);
    apic.advance(1_000_000 * 1_000_000 + 7, 0);
    assert_eq!(apic.pending_interrupt(), Some(0x40));
    apic.accept(0x40);
    assert_eq!(apic.next_event(), Some(Deadline::Ns(1_000_000 * 1_000_001)));
    apic.advance(u64::MAX, 0);
    apic.advance(u64::MAX, 0);
    let _ = apic.mmio_write(0x380, 4, 0, 5, 0);
    assert_eq!(apic.next_event(), None, "a count of 0 stops it");
}

#[test]
fn a_tiny_period_does_not_storm() {
    let mut apic = enabled();
    set(&mut apic, 0x3e0, 0b1011);
    set(&mut apic, 0x320, 0x2_0040);
    set(&mut apic, 0x380, 3);
    let (mut now, mut events) = (0, 0);
    while let Some(Deadline::Ns(at)) = apic.next_event() {
        if at > 1_000_000 {
            break;
        }
        assert!(at > now);
        now = at;
        events += 1;
        apic.advance(now, 0);
        assert!((1..=3).contains(&apic.mmio_read(0x390, 4, now + 1, 0)), "the counter goes round");
    }
    assert!(events <= 1 + 1_000_000 / MIN_PERIODIC_INTERVAL_NS, "{events}");
}

#[test]
fn masked_timer_counts_in_silence() {
    let mut apic = enabled();
    set(&mut apic, 0x3e0, 0b1011);
    set(&mut apic, 0x320, 0x1_0040);
    set(&mut apic, 0x380, 100);
    assert_eq!(apic.next_event(), None);
    assert_eq!(apic.mmio_read(0x390, 4, 40, 0), 60);
    let _ = apic.mmio_write(0x320, 4, 0x40, 50, 0);
    assert_eq!(apic.next_event(), Some(Deadline::Ns(100)));
    let _ = apic.mmio_write(0x320, 4, 0x1_0040, 60, 0);
    let _ = apic.mmio_write(0x320, 4, 0x40, 200, 0);
    assert_eq!((apic.next_event(), apic.pending_interrupt()), (None, None), "expired while masked: lost");
}

#[test]
fn tsc_deadline() {
    let mut apic = enabled();
    apic.set_tsc_deadline(500, 0, 100);
    assert_eq!(apic.tsc_deadline(0, 100), 0, "ignored in other modes");
    set(&mut apic, 0x320, 0x4_0040);
    apic.set_tsc_deadline(500, 0, 100);
    assert_eq!(apic.next_event(), Some(Deadline::Tsc(500)));
    assert_eq!(apic.tsc_deadline(1 << 50, 499), 500);
    apic.advance(1 << 50, 500);
    assert_eq!(apic.pending_interrupt(), Some(0x40));
    assert_eq!(apic.tsc_deadline(0, 500), 0, "disarmed");
    apic.accept(0x40);
    let _ = wr(&mut apic, 0xb0, 0);
    apic.set_tsc_deadline(3, 0, 600);
    assert_eq!(apic.pending_interrupt(), Some(0x40), "in the past: at once");
    apic.accept(0x40);
    apic.set_tsc_deadline(700, 0, 600);
    apic.set_tsc_deadline(0, 0, 600);
    assert_eq!(apic.next_event(), None);
    // The counter is out of use.
    set(&mut apic, 0x380, 100);
    assert_eq!((rd(&mut apic, 0x380), rd(&mut apic, 0x390)), (0, 0));
    // Another mode disarms, in both directions.
    apic.set_tsc_deadline(700, 0, 600);
    set(&mut apic, 0x320, 0x40);
    assert_eq!((apic.next_event(), apic.tsc_deadline(0, 600)), (None, 0));
    set(&mut apic, 0x380, 100);
    set(&mut apic, 0x320, 0x4_0040);
    assert_eq!(apic.next_event(), None);
}

#[test]
fn mode_changes_keep_the_counter() {
    let mut apic = enabled();
    set(&mut apic, 0x3e0, 0b1011);
    set(&mut apic, 0x320, 0x40);
    set(&mut apic, 0x380, 1_000_000);
    let _ = apic.mmio_write(0x320, 4, 0x2_0040, 400_000, 0);
    assert_eq!(apic.next_event(), Some(Deadline::Ns(1_000_000)));
    apic.advance(1_000_000, 0);
    assert_eq!(apic.next_event(), Some(Deadline::Ns(2_000_000)));
    let _ = apic.mmio_write(0x320, 4, 0x40, 1_500_000, 0);
    apic.advance(2_000_000, 0);
    assert_eq!(apic.next_event(), None);
    // The reserved mode runs nothing.
    let _ = apic.mmio_write(0x320, 4, 0x6_0040, 0, 0);
    set(&mut apic, 0x380, 100);
    assert_eq!(apic.next_event(), None);
}

#[test]
fn a_wild_state_is_made_sound() {
    let mut apic = enabled();
    let mut state = apic.save();
    state.base = !0;
    state.irr = VectorSet([!0; 4]);
    state.isr = VectorSet([0xffff, 0, 0, 0]);
    state.lvt = [!0; 6];
    state.svr = !0;
    state.requests = Requests::from_bits(!0);
    apic.restore(&state);
    assert_eq!(apic.base() >> 40, 0);
    assert_eq!(apic.pending_interrupt(), Some(0xff));
    for vector in (16..=255).rev() {
        apic.accept(vector);
    }
    assert_eq!(apic.highest_request(), None);
    let saved = apic.save();
    apic.restore(&saved);
    assert_eq!(apic.save(), saved);
    state.base = EXTD;
    apic.restore(&state);
    assert!(!apic.is_enabled() && !apic.is_x2apic());
}
