//! Tests of the interrupt message bus: who is addressed, who is chosen, what arrives.
use super::*;
use proptest::prelude::*;
use std::vec::Vec;

fn message(destination: Destination, mode: DeliveryMode, vector: u8) -> ApicMessage {
    ApicMessage { destination, mode, trigger: Trigger::Edge, vector }
}

fn fixed(destination: Destination, vector: u8) -> ApicMessage {
    message(destination, DeliveryMode::Fixed, vector)
}

fn x2apic_ldr(id: usize) -> u32 {
    (id as u32 / 16) << 16 | 1 << (id % 16)
}

/// A bus whose APICs are all enabled, flat, with logical ID `1 << index`.
fn flat_bus(vcpus: usize) -> ApicBus {
    let bus = ApicBus::new(vcpus).unwrap();
    for (index, port) in bus.ports.iter().enumerate() {
        port.publish(Identity::new(false, true, true, 1 << (24 + index % 8), 0));
    }
    bus
}

fn set(indices: &[usize]) -> VcpuSet {
    VcpuSet(indices.iter().fold(0, |bits, index| bits | 1 << index))
}

fn taken(port: &ApicPort) -> (Requests, Vec<(u8, bool)>) {
    let mut vectors = Vec::new();
    let requests = port.take(|group, pending, level| {
        for bit in 0..64u8 {
            if pending >> bit & 1 != 0 {
                vectors.push((group as u8 * 64 + bit, level >> bit & 1 != 0));
            }
        }
    });
    (requests, vectors)
}

#[test]
fn shorthands_and_physical() {
    let bus = flat_bus(4);
    let accepted = |destination| bus.deliver(fixed(destination, 0x40)).accepted;
    assert_eq!(accepted(Destination::All), set(&[0, 1, 2, 3]));
    assert_eq!(accepted(Destination::AllBut(2)), set(&[0, 1, 3]));
    assert_eq!(accepted(Destination::One(3)), set(&[3]));
    assert_eq!(accepted(Destination::Physical(1)), set(&[1]));
    assert_eq!(accepted(Destination::Physical(4)), VcpuSet::EMPTY);
    assert_eq!(accepted(Destination::Physical(0xff)), VcpuSet::EMPTY, "32-bit ID 255 is nobody");
    assert_eq!(accepted(Destination::from_u8(0xff, false)), set(&[0, 1, 2, 3]));
    assert_eq!(accepted(Destination::from_u8(0xff, true)), set(&[0, 1, 2, 3]));
    assert_eq!(accepted(Destination::from_u32(u32::MAX, false)), set(&[0, 1, 2, 3]));
    assert_eq!(accepted(Destination::from_u8(0b1010, true)), set(&[1, 3]));
}

#[test]
fn a_mailbox_is_woken_once_and_keeps_trigger_modes() {
    let bus = flat_bus(2);
    let level = ApicMessage { trigger: Trigger::Level, ..fixed(Destination::One(1), 0x31) };
    assert_eq!(bus.deliver(level).woken, set(&[1]));
    assert_eq!(bus.deliver(fixed(Destination::One(1), 0xff)).woken, VcpuSet::EMPTY);
    assert_eq!(bus.deliver(level).accepted, set(&[1]), "merged with the one that waits");
    let port = bus.port(1).unwrap();
    assert!(!port.is_empty());
    assert_eq!(taken(port).1, [(0x31, true), (0xff, false)]);
    assert!(port.is_empty());
    assert_eq!(taken(port), (Requests::NONE, Vec::new()));
    // The same vector as an edge: the old level bit is gone.
    let _ = bus.deliver(fixed(Destination::One(1), 0x31));
    assert_eq!(taken(port).1, [(0x31, false)]);
}

#[test]
fn disabled_and_software_disabled_apics() {
    let bus = flat_bus(2);
    bus.port(0).unwrap().publish(Identity::DISABLED);
    bus.port(1).unwrap().publish(Identity::new(false, false, true, 0x0200_0000, 0));
    for mode in [0, 1, 2, 4, 5, 6, 7].map(|bits| DeliveryMode::from_bits(bits).unwrap()) {
        let vectored =
            matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority | DeliveryMode::ExtInt);
        let expected = if vectored { VcpuSet::EMPTY } else { set(&[1]) };
        assert_eq!(bus.deliver(message(Destination::All, mode, 0x80)).accepted, expected, "{mode:?}");
    }
    assert_eq!(Identity::DISABLED.with_priority(0xff), Identity::DISABLED);
}

#[test]
fn requests_of_every_kind_arrive() {
    let bus = flat_bus(1);
    let send = |mode, vector| bus.deliver(message(Destination::All, mode, vector));
    let port = bus.port(0).unwrap();
    let _ = send(DeliveryMode::Nmi, 0);
    let _ = send(DeliveryMode::Smi, 0);
    let (requests, _) = taken(port);
    assert!(requests.nmi() && requests.smi() && !requests.init() && requests.sipi().is_none());

    // INIT voids a SIPI before it, not one behind it.
    let _ = send(DeliveryMode::StartUp, 0x11);
    let _ = send(DeliveryMode::Init, 0);
    let (requests, _) = taken(port);
    assert!(requests.init() && requests.sipi().is_none());
    let _ = send(DeliveryMode::Init, 0);
    let _ = send(DeliveryMode::StartUp, 0x9f);
    let (requests, _) = taken(port);
    assert!(requests.init());
    assert_eq!(requests.sipi(), Some(0x9f));

    let _ = send(DeliveryMode::ExtInt, 0);
    assert_eq!(taken(port).0.bits(), Requests::EXTINT);
}

#[test]
fn illegal_vectors_are_not_accepted_but_noticed() {
    let bus = flat_bus(1);
    for vector in 0..16 {
        let delivery = bus.deliver(fixed(Destination::One(0), vector));
        assert!(delivery.accepted.is_empty());
        assert_eq!(delivery.woken, set(&[0]));
        let (requests, vectors) = taken(bus.port(0).unwrap());
        assert_eq!(requests.bits(), Requests::ILLEGAL_VECTOR);
        assert!(vectors.is_empty());
    }
    assert_eq!(bus.deliver(fixed(Destination::One(0), 16)).accepted, set(&[0]));
}

#[test]
fn lowest_priority_prefers_the_lowest_class_and_spreads_vectors() {
    let bus = flat_bus(4);
    let send = |vector| {
        let all = Destination::from_u8(0xff, true);
        bus.deliver(message(all, DeliveryMode::LowestPriority, vector)).accepted
    };
    for vector in 0x40..0x48 {
        assert_eq!(send(vector), set(&[usize::from(vector) % 4]));
    }
    for (index, priority) in [0x50, 0x21, 0x2f, 0x30].into_iter().enumerate() {
        bus.port(index).unwrap().publish(Identity::new(false, true, true, 1 << (24 + index), priority));
    }
    // Classes 5, 2, 2, 3: vCPUs 1 and 2 share.
    assert_eq!(send(0x40), set(&[1]));
    assert_eq!(send(0x41), set(&[2]));
    // Software-disabled ones do not take part.
    bus.port(1).unwrap().publish(Identity::new(false, false, true, 0x0200_0000, 0));
    assert_eq!(send(0x40), set(&[2]));
    for port in &*bus.ports {
        port.publish(Identity::DISABLED);
    }
    assert_eq!(send(0x40), VcpuSet::EMPTY);
}

#[test]
fn msi_fields() {
    let msi = |address, data| ApicMessage::from_msi(address, data);
    assert_eq!(msi(0xfee0_5000, 0x0041), Some(fixed(Destination::Physical(5), 0x41)));
    assert_eq!(msi(0xfee0_5004, 0x0041), Some(fixed(Destination::Logical(5), 0x41)));
    assert_eq!(
        msi(0xfee0_500c, 0x0041),
        Some(message(Destination::Logical(5), DeliveryMode::LowestPriority, 0x41))
    );
    assert_eq!(msi(0xfeef_f000, 0x0041), Some(fixed(Destination::All, 0x41)));
    assert_eq!(
        msi(0xfee0_1000, 0xc0f1),
        Some(ApicMessage { trigger: Trigger::Level, ..fixed(Destination::Physical(1), 0xf1) })
    );
    assert_eq!(msi(0xfee0_1008, 0x0400).map(|m| m.mode), Some(DeliveryMode::Nmi));
    assert_eq!(msi(0xfee0_1000, 0x0300), None, "reserved delivery mode");
    assert_eq!(msi(0xfed0_1000, 0x41), None);
    assert_eq!(msi(0x1_fee0_1000, 0x41), None);
}

#[test]
fn sizes_are_clamped() {
    assert_eq!(ApicBus::new(0).unwrap().ports.len(), 1);
    assert_eq!(ApicBus::new(1000).unwrap().ports.len(), MAX_VCPUS);
    assert!(ApicBus::new(4).unwrap().port(4).is_none());
    assert_eq!(set(&[3, 5, 63]).collect::<Vec<_>>(), [3, 5, 63]);
    assert!(set(&[3]).contains(3) && !set(&[3]).contains(64));
}

#[test]
fn concurrent_senders_lose_nothing() {
    let bus = flat_bus(1);
    let mut seen = std::collections::BTreeSet::new();
    std::thread::scope(|scope| {
        let senders = [0x20..0x60u8, 0x60..0xa0, 0xa0..0xe0].map(|vectors| {
            let bus = &bus;
            scope.spawn(move || {
                for vector in vectors {
                    let _ = bus.deliver(fixed(Destination::All, vector));
                    std::thread::yield_now();
                }
            })
        });
        while !senders.iter().all(|sender| sender.is_finished()) {
            seen.extend(taken(bus.port(0).unwrap()).1);
        }
    });
    seen.extend(taken(bus.port(0).unwrap()).1);
    assert_eq!(seen.len(), 0xe0 - 0x20);
}

/// An APIC as the model sees it.
#[derive(Clone, Copy, Debug)]
enum Mode {
    Off,
    Flat(u8),
    Cluster(u8),
    X2,
}

fn mode() -> impl Strategy<Value = Mode> {
    prop_oneof![
        Just(Mode::Off),
        any::<u8>().prop_map(Mode::Flat),
        any::<u8>().prop_map(Mode::Cluster),
        Just(Mode::X2),
    ]
}

fn destination() -> impl Strategy<Value = Destination> {
    prop_oneof![
        (any::<u8>(), any::<bool>()).prop_map(|(field, logical)| Destination::from_u8(field, logical)),
        (0u32..5, any::<u16>(), any::<bool>()).prop_map(|(cluster, bits, logical)| Destination::from_u32(
            cluster << 16 | u32::from(bits),
            logical
        )),
        (0u8..64).prop_map(Destination::AllBut),
        Just(Destination::All),
    ]
}

/// The manual's rules, spelled out case by case.
fn model_matches(index: usize, mode: Mode, destination: Destination) -> bool {
    if let Mode::Off = mode {
        return false;
    }
    match destination {
        Destination::All => true,
        Destination::AllBut(sender) => index != sender as usize,
        Destination::One(one) => index == one as usize,
        Destination::Physical(id) => index as u32 == id,
        Destination::Logical(mda) => match mode {
            Mode::Off => false,
            Mode::Flat(id) => (0..8).any(|bit| mda < 256 && mda >> bit & 1 == 1 && id >> bit & 1 == 1),
            Mode::Cluster(id) => {
                mda < 256
                    && u32::from(id / 16) == mda / 16
                    && (0..4).any(|bit| mda >> bit & 1 == 1 && id >> bit & 1 == 1)
            }
            Mode::X2 => mda / 65536 == index as u32 / 16 && mda >> (index % 16) & 1 == 1,
        },
    }
}

proptest! {
    #[test]
    fn destinations_match_as_the_manual_says(
        modes in prop::collection::vec(mode(), 1..=64),
        destinations in prop::collection::vec(destination(), 1..20),
    ) {
        let bus = ApicBus::new(modes.len()).unwrap();
        for (index, mode) in modes.iter().enumerate() {
            bus.port(index).unwrap().publish(match *mode {
                Mode::Off => Identity::DISABLED,
                Mode::Flat(id) => Identity::new(false, true, true, u32::from(id) << 24, 0),
                Mode::Cluster(id) => Identity::new(false, true, false, u32::from(id) << 24, 0),
                Mode::X2 => Identity::new(true, true, true, x2apic_ldr(index), 0),
            });
        }
        for destination in destinations {
            let expected: Vec<usize> =
                (0..modes.len()).filter(|&i| model_matches(i, modes[i], destination)).collect();
            prop_assert_eq!(bus.deliver(fixed(destination, 0x20)).accepted, set(&expected));
            // Arbitration picks one of the same, or none if there is none.
            let chosen = bus.deliver(message(destination, DeliveryMode::LowestPriority, 0x21)).accepted;
            prop_assert_eq!(chosen.count(), expected.len().min(1));
            prop_assert!(chosen.into_iter().all(|index| expected.contains(&index)));
        }
    }

    #[test]
    fn any_message_is_survived(address: u64, data: u32, index in 0usize..70) {
        let bus = flat_bus(5);
        if let Some(message) = ApicMessage::from_msi(0xfee0_0000 | address & 0xf_ffff, data) {
            let delivery = bus.deliver(message);
            prop_assert_eq!(delivery.accepted.0 >> 5, 0);
        }
        prop_assert_eq!(bus.port(index).is_some(), index < 5);
    }
}
