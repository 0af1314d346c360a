//! Tests of the I/O APIC: registers, edges, levels and remote IRR.
use super::*;
use proptest::prelude::*;
use std::vec::Vec;

/// A sink that writes down what it gets.
#[derive(Default)]
struct Wire {
    sent: Vec<ApicMessage>,
    refuses: bool,
}

impl ApicSink for Wire {
    fn send(&mut self, message: ApicMessage) -> bool {
        self.sent.push(message);
        !self.refuses
    }
}

impl Wire {
    /// Vectors sent since the last call.
    fn vectors(&mut self) -> Vec<u8> {
        self.sent.drain(..).map(|message| message.vector).collect()
    }
}

/// What [`Wire::vectors`] gives if nothing was sent.
const NONE: [u8; 0] = [];
const LEVEL: u32 = 1 << 15;
const LOW: u32 = 1 << 13;
const MASKED: u32 = 1 << 16;
const REMOTE_IRR: u32 = 1 << 14;

fn write(apic: &mut IoApic, index: u8, value: u32, wire: &mut Wire) {
    apic.write(IOREGSEL, 4, index.into(), wire);
    apic.write(IOWIN, 4, value.into(), wire);
}

fn read(apic: &mut IoApic, index: u8) -> u32 {
    apic.write(IOREGSEL, 4, index.into(), &mut Wire::default());
    apic.read(IOWIN, 4) as u32
}

fn low(pin: u8) -> u8 {
    IOREDTBL + 2 * pin
}

fn program(apic: &mut IoApic, pin: u8, destination: u8, bits: u32, wire: &mut Wire) {
    write(apic, low(pin) + 1, u32::from(destination) << 24, wire);
    write(apic, low(pin), bits, wire);
}

#[test]
fn registers_after_reset() {
    let mut apic = IoApic::new();
    assert_eq!(read(&mut apic, IOAPICVER), 0x0017_0020);
    assert_eq!(read(&mut apic, IOAPICID), 0);
    for pin in 0..PINS as u8 {
        assert_eq!(read(&mut apic, low(pin)), MASKED);
        assert_eq!(read(&mut apic, low(pin) + 1), 0);
    }
    assert_eq!(read(&mut apic, low(24)), 0, "no 25th pin");
    assert_eq!(read(&mut apic, 0x05), 0);
}

#[test]
fn read_only_bits_and_the_id() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    write(&mut apic, IOAPICID, 0xffff_ffff, &mut wire);
    assert_eq!(read(&mut apic, IOAPICID), 0x0f00_0000);
    assert_eq!(read(&mut apic, IOAPICARB), 0x0f00_0000);
    write(&mut apic, IOAPICVER, 0xffff_ffff, &mut wire);
    assert_eq!(read(&mut apic, IOAPICVER), 0x0017_0020);
    write(&mut apic, low(3), 0xffff_ffff, &mut wire);
    write(&mut apic, low(3) + 1, 0xffff_ffff, &mut wire);
    assert_eq!(read(&mut apic, low(3)), 0x0001_afff, "delivery status and remote IRR are not writable");
    assert_eq!(read(&mut apic, low(3) + 1), 0xff00_0000);
}

#[test]
fn access_sizes() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    apic.write(IOREGSEL, 1, low(5).into(), &mut wire);
    assert_eq!(apic.read(IOREGSEL, 4), low(5).into());
    apic.write(IOWIN, 8, 0xdead_beef_0001_0000 | 0x8765, &mut wire);
    assert_eq!(apic.read(IOWIN, 4), 0x0001_8765 & 0x0001_afff);
    // Narrow writes leave the other bytes alone.
    apic.write(IOWIN, 1, 0x42, &mut wire);
    assert_eq!(apic.read(IOWIN, 4), 0x0001_8742 & 0x0001_afff);
    apic.write(IOWIN + 2, 1, 0, &mut wire);
    assert_eq!(apic.read(IOWIN, 4), 0x0000_8742 & 0x0001_afff);
    apic.write(IOWIN, 2, 0x0055, &mut wire);
    assert_eq!(apic.read(IOWIN, 2), 0x0055);
    assert_eq!(apic.read(IOWIN + 1, 1), 0);
    assert_eq!(apic.read(IOWIN + 4, 8), 0, "beside the register");
    apic.write(IOWIN + 4, 4, 0xffff_ffff, &mut wire);
    assert_eq!(apic.read(IOWIN, 8), 0x55);
    assert_eq!(apic.read(IOEOI, 4), 0, "write-only");
    assert_eq!(apic.read(0xff0, 4), 0);
}

#[test]
fn an_edge_sends_once_and_a_masked_edge_is_lost() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    program(&mut apic, 4, 3, 0x0834, &mut wire);
    apic.set_line(4, true, &mut wire);
    apic.set_line(4, true, &mut wire);
    let expected = ApicMessage {
        destination: Destination::Logical(3),
        mode: DeliveryMode::Fixed,
        trigger: Trigger::Edge,
        vector: 0x34,
    };
    assert_eq!(wire.sent, [expected]);
    wire.sent.clear();
    apic.set_line(4, false, &mut wire);
    assert_eq!(wire.vectors(), NONE);
    apic.set_line(4, true, &mut wire);
    assert_eq!(wire.vectors(), [0x34], "no EOI is awaited");

    apic.set_line(4, false, &mut wire);
    write(&mut apic, low(4), MASKED | 0x34, &mut wire);
    apic.set_line(4, true, &mut wire);
    write(&mut apic, low(4), 0x34, &mut wire);
    assert_eq!(wire.vectors(), NONE);
    assert_eq!(read(&mut apic, low(4)) & REMOTE_IRR, 0);
}

#[test]
fn active_low_edges_fall() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    apic.set_line(7, true, &mut wire);
    program(&mut apic, 7, 0, LOW | 0x40, &mut wire);
    assert_eq!(wire.vectors(), NONE);
    apic.set_line(7, false, &mut wire);
    assert_eq!(wire.vectors(), [0x40]);
    apic.set_line(7, true, &mut wire);
    assert_eq!(wire.vectors(), NONE);
}

#[test]
fn a_level_waits_for_its_eoi_and_comes_again_while_high() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    program(&mut apic, 9, 0, LEVEL | 0x50, &mut wire);
    apic.set_line(9, true, &mut wire);
    assert_eq!(wire.sent[0].trigger, Trigger::Level);
    assert_eq!(wire.vectors(), [0x50]);
    assert_eq!(read(&mut apic, low(9)) & REMOTE_IRR, REMOTE_IRR);

    // The line bounces while the CPU works: nothing.
    apic.set_line(9, false, &mut wire);
    apic.set_line(9, true, &mut wire);
    apic.eoi(0x51, &mut wire);
    assert_eq!(wire.vectors(), NONE, "not its vector");
    apic.eoi(0x50, &mut wire);
    assert_eq!(wire.vectors(), [0x50], "still high");
    apic.set_line(9, false, &mut wire);
    apic.eoi(0x50, &mut wire);
    assert_eq!(wire.vectors(), NONE);
    assert_eq!(read(&mut apic, low(9)) & REMOTE_IRR, 0);
    apic.set_line(9, true, &mut wire);
    assert_eq!(wire.vectors(), [0x50]);
    // The EOI register does what the broadcast does.
    apic.write(IOEOI, 4, 0x50, &mut wire);
    assert_eq!(wire.vectors(), [0x50]);
}

#[test]
fn unmasking_a_high_line_and_flipping_polarity() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    program(&mut apic, 10, 0, MASKED | LEVEL | 0x60, &mut wire);
    apic.set_line(10, true, &mut wire);
    assert_eq!(wire.vectors(), NONE);
    write(&mut apic, low(10), LEVEL | 0x60, &mut wire);
    assert_eq!(wire.vectors(), [0x60]);

    // Masked while in service: the EOI does not bring it back, unmasking does.
    write(&mut apic, low(10), MASKED | LEVEL | 0x60, &mut wire);
    assert_eq!(read(&mut apic, low(10)) & REMOTE_IRR, REMOTE_IRR, "masking keeps remote IRR");
    apic.eoi(0x60, &mut wire);
    assert_eq!(wire.vectors(), NONE);
    write(&mut apic, low(10), LEVEL | 0x60, &mut wire);
    assert_eq!(wire.vectors(), [0x60]);

    // Active low: the high line is idle; low again active high: it is idle too.
    write(&mut apic, low(10), LEVEL | LOW | 0x60, &mut wire);
    apic.eoi(0x60, &mut wire);
    assert_eq!(wire.vectors(), NONE);
    apic.set_line(10, false, &mut wire);
    assert_eq!(wire.vectors(), [0x60]);
    write(&mut apic, low(10), LEVEL | 0x60, &mut wire);
    apic.eoi(0x60, &mut wire);
    assert_eq!(wire.vectors(), NONE);
    write(&mut apic, low(10), LEVEL | LOW | 0x60, &mut wire);
    assert_eq!(wire.vectors(), [0x60], "the flip itself asserts a level");
}

#[test]
fn edge_mode_clears_remote_irr() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    program(&mut apic, 11, 0, LEVEL | 0x70, &mut wire);
    apic.set_line(11, true, &mut wire);
    assert_eq!(wire.vectors(), [0x70]);
    write(&mut apic, low(11), MASKED | 0x70, &mut wire);
    assert_eq!(read(&mut apic, low(11)), MASKED | 0x70);
    write(&mut apic, low(11), LEVEL | 0x70, &mut wire);
    assert_eq!(wire.vectors(), [0x70]);
}

#[test]
fn pins_that_share_a_vector_end_together() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    for pin in [16, 17] {
        program(&mut apic, pin, 0, LEVEL | 0x44, &mut wire);
        apic.set_line(pin.into(), true, &mut wire);
    }
    assert_eq!(wire.vectors(), [0x44, 0x44]);
    apic.set_line(16, false, &mut wire);
    apic.eoi(0x44, &mut wire);
    assert_eq!(wire.vectors(), [0x44], "pin 17 only");
}

#[test]
fn special_modes_are_edges() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    for (bits, mode) in [
        (0x200, Some(DeliveryMode::Smi)),
        (0x400, Some(DeliveryMode::Nmi)),
        (0x500, Some(DeliveryMode::Init)),
        (0x700, Some(DeliveryMode::ExtInt)),
        (0x300, None),
        (0x600, None),
    ] {
        program(&mut apic, 0, 0, LEVEL | bits, &mut wire);
        apic.set_line(0, true, &mut wire);
        assert_eq!(wire.sent.iter().map(|m| m.mode).collect::<Vec<_>>(), Vec::from_iter(mode));
        assert_eq!(read(&mut apic, low(0)) & REMOTE_IRR, 0);
        wire.sent.clear();
        apic.set_line(0, false, &mut wire);
    }
}

#[test]
fn what_nobody_takes_is_offered_again() {
    let (mut apic, mut wire) = (IoApic::new(), Wire { refuses: true, ..Wire::default() });
    program(&mut apic, 9, 0, LEVEL | 0x50, &mut wire);
    apic.set_line(9, true, &mut wire);
    assert_eq!(wire.vectors(), [0x50]);
    assert_eq!(read(&mut apic, low(9)) & REMOTE_IRR, 0);
    wire.refuses = false;
    apic.retry(&mut wire);
    apic.retry(&mut wire);
    assert_eq!(wire.vectors(), [0x50]);
}

#[test]
fn reset_keeps_the_lines() {
    let (mut apic, mut wire) = (IoApic::new(), Wire::default());
    program(&mut apic, 9, 0, LEVEL | 0x50, &mut wire);
    apic.set_line(9, true, &mut wire);
    apic.reset();
    assert_eq!(apic.save(), IoApicState { lines: 1 << 9, ..IoApic::new().save() });
    apic.eoi(0x50, &mut wire);
    assert_eq!(wire.vectors(), [0x50], "only the one before the reset");
}

/// One thing that can happen to an I/O APIC.
#[derive(Clone, Debug)]
enum Step {
    Line(usize, bool),
    Write(u32, u8, u64),
    Entry(u8, u32),
    Eoi(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0usize..26, any::<bool>()).prop_map(|(pin, level)| Step::Line(pin, level)),
        (0u32..0x1100, any::<u8>(), any::<u64>()).prop_map(|(o, s, v)| Step::Write(o, s, v)),
        (0x10u8..0x40, any::<u32>()).prop_map(|(index, bits)| Step::Entry(index, bits)),
        (0x10u8..0x14, 0u32..16).prop_map(|(index, bits)| Step::Entry(
            index,
            (bits & 1) << 16 | (bits & 2) << 14 | (bits & 4) << 11 | 0x20
        )),
        prop_oneof![Just(0x20u8), any::<u8>()].prop_map(Step::Eoi),
    ]
}

fn run(apic: &mut IoApic, step: &Step, wire: &mut Wire) {
    match *step {
        Step::Line(pin, level) => apic.set_line(pin, level, wire),
        Step::Write(offset, size, value) => apic.write(offset, size, value, wire),
        Step::Entry(index, value) => write(apic, index, value, wire),
        Step::Eoi(vector) => apic.eoi(vector, wire),
    }
}

proptest! {
    /// Whatever happens: no level pin that is asserted and unmasked is left without an interrupt under way, remote
    /// IRR is set nowhere else than on level pins, and a save restores to the same device.
    #[test]
    fn no_level_is_forgotten(steps in prop::collection::vec(step(), 0..80)) {
        let (mut apic, mut wire) = (IoApic::new(), Wire::default());
        for step in &steps {
            run(&mut apic, step, &mut wire);
            for (pin, entry) in apic.entries.iter().enumerate() {
                let high = apic.lines >> pin & 1 != 0;
                let asserted = high != entry.has(Entry::ACTIVE_LOW);
                if entry.is_level() && asserted && !entry.has(Entry::MASKED) {
                    prop_assert!(entry.has(Entry::REMOTE_IRR), "pin {} forgotten", pin);
                }
                prop_assert!(!entry.has(Entry::REMOTE_IRR) || entry.is_level());
                prop_assert_eq!(entry.has(Entry::REMOTE_IRR), apic.in_service >> pin & 1 != 0);
            }
        }
        let saved = apic.save();
        let mut other = IoApic::new();
        other.restore(&saved);
        prop_assert_eq!(other.save(), saved);
        prop_assert_eq!(other.in_service, apic.in_service);
    }

    #[test]
    fn any_state_restores_to_a_sound_one(select: u8, id: u32, redirection: [u64; PINS], lines: u32,
                                         steps in prop::collection::vec(step(), 0..20)) {
        let (mut apic, mut wire) = (IoApic::new(), Wire::default());
        apic.restore(&IoApicState { select, id, redirection, lines });
        let saved = apic.save();
        apic.restore(&saved);
        prop_assert_eq!(apic.save(), saved);
        for step in &steps {
            run(&mut apic, step, &mut wire);
            let _ = apic.read(id & 0xfff, select);
        }
    }
}
