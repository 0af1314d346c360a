//! The shadow kind under random sequences: guests that write their tables in every way, two vCPUs, roles that change, a
//! small quota. After each step the whole kind is checked, and each access against the reference walk.
mod support;

use mmu::{Gfn, GfnRange, ZapProgress};
use proptest::prelude::*;
use support::flat::FlatRam;
use support::manual::guest::BASE;
use support::manual::{Machine, What, Who};
use support::shadow::{World, CPU};

#[derive(Clone, Debug)]
enum Op {
    Access {
        vcpu: usize,
        at: usize,
        what: What,
        who: Who,
    },
    /// Through the guest's own map.
    Store {
        vcpu: usize,
        table: u64,
        index: u64,
        entry: u64,
    },
    /// By a device, which is told of.
    Emulate {
        table: u64,
        offset: u64,
        len: usize,
        entry: u64,
    },
    Invlpg {
        vcpu: usize,
        at: usize,
    },
    Flush {
        vcpu: usize,
    },
    Switch {
        vcpu: usize,
        root: u64,
        wp: bool,
        smep: bool,
        nxe: bool,
    },
    Zap {
        gfn: u64,
        pages: u64,
    },
    Obsolete,
    ZapObsolete,
}

fn addresses() -> Vec<u64> {
    let mut all = vec![];
    for top in 0..2u64 {
        for upper in 0..2u64 {
            for directory in 0..3u64 {
                for page in 0..10u64 {
                    all.push(top << 39 | upper << 30 | directory << 21 | page << 12 | 0x18);
                }
            }
        }
    }
    all
}

/// Tables in frames 1 to 9, the first one mapped one to one below 40 KiB.
fn guest(ram: &FlatRam) {
    for (top, upper) in [(0x1000, 0x2000), (0x6000, 0x2000)] {
        ram.set(top, upper | 0x67);
    }
    ram.set(0x2000, 0x3000 | 0x67);
    ram.set(0x3000, 0x4000 | 0x67);
    ram.set(0x3008, 0x5000 | 0x67);
    ram.set(0x3010, 0x20_0000 | 0xe7);
    for page in 0..10 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
        ram.set(0x5000 + page * 8, (16 + page) << 12 | 0x67);
    }
}

fn entries() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![
        6 => Just(0x67u64), 1 => Just(0x65), 1 => Just(0x63), 1 => Just(0x27), 1 => Just(7), 1 => Just(0),
        1 => Just(1 << 63 | 0x67), 1 => Just(0xe7), 1 => Just(1 << 50 | 0x67)
    ];
    let frame = prop_oneof![6 => 1..10u64, 2 => 16..24u64, 1 => Just(512u64), 1 => Just(4096u64)];
    (flags, frame).prop_map(|(flags, frame)| frame << 12 | flags)
}

fn ops() -> impl Strategy<Value = Op> {
    let (vcpus, places) = (0..2usize, 0..addresses().len());
    let whats = prop_oneof![Just(What::Read), Just(What::Write), Just(What::Fetch)];
    let whos = prop_oneof![Just(Who::User), Just(Who::Supervisor)];
    prop_oneof![
        12 => (vcpus.clone(), places.clone(), whats, whos)
            .prop_map(|(vcpu, at, what, who)| Op::Access { vcpu, at, what, who }),
        8 => (vcpus.clone(), 1..10u64, 0..10u64, entries())
            .prop_map(|(vcpu, table, index, entry)| Op::Store { vcpu, table, index, entry }),
        2 => (1..10u64, 0..80u64, prop_oneof![Just(1usize), Just(2), Just(4), Just(8)], entries())
            .prop_map(|(table, offset, len, entry)| Op::Emulate { table, offset, len, entry }),
        2 => (vcpus.clone(), places).prop_map(|(vcpu, at)| Op::Invlpg { vcpu, at }),
        2 => vcpus.clone().prop_map(|vcpu| Op::Flush { vcpu }),
        2 => (vcpus, prop_oneof![Just(1u64), Just(6)], any::<bool>(), any::<bool>(), any::<bool>())
            .prop_map(|(vcpu, root, wp, smep, nxe)| Op::Switch { vcpu, root, wp, smep, nxe }),
        1 => (0..24u64, 1..600u64).prop_map(|(gfn, pages)| Op::Zap { gfn, pages }),
        1 => Just(Op::Obsolete),
        1 => Just(Op::ZapObsolete),
    ]
}

fn apply(world: &mut World, op: &Op) {
    match *op {
        Op::Access { vcpu, at, what, who } => drop(world.access(vcpu, world.addresses[at], what, who)),
        Op::Store { vcpu, table, index, entry } => {
            let _ = world.guest_store(vcpu, (table << 12) | (index * 8), entry);
        }
        Op::Emulate { table, offset, len, entry } => world.emulate(table << 12 | offset, len, entry),
        Op::Invlpg { vcpu, at } => world.invlpg(vcpu, world.addresses[at]),
        Op::Flush { vcpu } => world.flush(vcpu),
        Op::Switch { vcpu, root, wp, smep, nxe } => {
            world.switch(vcpu, Machine { cr3: root << 12, wp, smep, nxe, ..BASE });
        }
        Op::Zap { gfn, pages } => {
            let range = GfnRange::new(Gfn::new_truncate(gfn), pages).unwrap();
            let mut progress = ZapProgress::default();
            while !progress.is_done() {
                let _ = world.kind.zap(&mut world.memory.exclusive(CPU), range, &mut progress);
            }
        }
        Op::Obsolete => drop(world.kind.invalidate_all(&mut world.memory.exclusive(CPU))),
        Op::ZapObsolete => {
            let mut progress = ZapProgress::default();
            while !progress.is_done() {
                let _ = world.kind.zap_obsolete(&mut world.memory.exclusive(CPU), &mut progress);
            }
        }
    }
    world.check();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_operations(quota in 16..40usize, ops in prop::collection::vec(ops(), 1..120)) {
        let mut world = World::new(BASE, quota, addresses(), guest);
        for op in &ops {
            apply(&mut world, op);
        }
        world.finish();
    }
}
