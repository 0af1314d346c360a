//! Random sequences of what an L1, its L2s and the host do, in each format, against the reference.
pub(crate) mod support;

use mmu::{Gfn, GfnRange, Gva, Invvpid, LogBy, TlbControl};
use proptest::prelude::*;
use support::flat::FlatRam;
use support::l1::{
    belows, ept5_setup, ept_setup, npt_setup, pae_setup, short_setup, EPT, L2, L2_UNPAGED, LOWEST, NPT,
    ROOT_A, ROOT_A5, ROOT_B,
};
use support::machines::{Amd, Host, Intel, Machine as HostMachine, AMD, HOST, INTEL};
use support::manual::{ept, Machine, What, Who};
use support::nested::World;
use support::two_stage::Below;

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Access {
        vcpu: usize,
        at: usize,
        what: What,
        who: Who,
        cached: bool,
    },
    Speculate {
        vcpu: usize,
    },
    /// L1 stores an entry, emulated or not.
    Store {
        vcpu: usize,
        table: u64,
        index: u64,
        entry: u64,
    },
    L1Access {
        vcpu: usize,
        gfn: u64,
        what: What,
    },
    /// L2 stores to a table of L1 that it can reach.
    L2Store {
        vcpu: usize,
        page: u64,
        index: u64,
        entry: u64,
    },
    /// L2 changes its own tables.
    L2Table {
        vcpu: usize,
        index: u64,
        to: u64,
        flags: u64,
    },
    L2Flush {
        vcpu: usize,
        at: Option<usize>,
    },
    Leave {
        vcpu: usize,
    },
    Switch {
        vcpu: usize,
        below: usize,
        name: u16,
    },
    /// INVEPT, or VMRUN with a TLB_CONTROL.
    Flush {
        vcpu: usize,
        which: usize,
    },
    /// INVVPID or INVLPGA.
    FlushLinear {
        vcpu: usize,
        which: usize,
        name: u16,
        at: usize,
    },
    Move {
        gfn: u64,
    },
    Zap {
        gfn: u64,
        pages: u64,
    },
    Slot {
        index: usize,
    },
    Obsolete,
    ZapObsolete,
    /// The log begins, is harvested, or ends.
    Log {
        by: LogBy,
        end: bool,
    },
}

fn ops(entries: fn() -> BoxedStrategy<u64>) -> impl Strategy<Value = Op> {
    let vcpus = 0..2usize;
    let places = 0..33usize;
    let whats = prop_oneof![Just(What::Read), Just(What::Write), Just(What::Fetch)];
    let whats2 = whats.clone();
    let whos = prop_oneof![Just(Who::User), Just(Who::Supervisor)];
    let tables = prop_oneof![
        3 => Just(LOWEST[0]), 2 => Just(LOWEST[1]), 2 => Just(LOWEST[2]),
        1 => Just(ROOT_A), 1 => Just(ROOT_A + 0x2000), 1 => Just(ROOT_B + 0x2000)
    ];
    prop_oneof![
        14 => (vcpus.clone(), places.clone(), whats, whos, any::<bool>())
            .prop_map(|(vcpu, at, what, who, cached)| Op::Access { vcpu, at, what, who, cached }),
        2 => vcpus.clone().prop_map(|vcpu| Op::Speculate { vcpu }),
        6 => (vcpus.clone(), tables, prop_oneof![2 => 0..24u64, 1 => 0..3u64], entries())
            .prop_map(|(vcpu, table, index, entry)| Op::Store { vcpu, table, index, entry }),
        3 => (vcpus.clone(), prop_oneof![0..32u64, 64..112u64, 1040..1072u64], whats2)
            .prop_map(|(vcpu, gfn, what)| Op::L1Access { vcpu, gfn, what }),
        4 => (vcpus.clone(), 20..22u64, 0..24u64, entries())
            .prop_map(|(vcpu, page, index, entry)| Op::L2Store { vcpu, page, index, entry }),
        3 => (vcpus.clone(), 0..20u64, 0..20u64, prop_oneof![4 => Just(0x67u64), 1 => Just(0x65), 1 => Just(0)])
            .prop_map(|(vcpu, index, to, flags)| Op::L2Table { vcpu, index, to, flags }),
        2 => (vcpus.clone(), prop::option::of(places.clone()))
            .prop_map(|(vcpu, at)| Op::L2Flush { vcpu, at }),
        1 => vcpus.clone().prop_map(|vcpu| Op::Leave { vcpu }),
        3 => (vcpus.clone(), 0..3usize, 0..3u16)
            .prop_map(|(vcpu, below, name)| Op::Switch { vcpu, below, name }),
        4 => (vcpus.clone(), 0..4usize).prop_map(|(vcpu, which)| Op::Flush { vcpu, which }),
        3 => (vcpus, 0..4usize, 1..3u16, places)
            .prop_map(|(vcpu, which, name, at)| Op::FlushLinear { vcpu, which, name, at }),
        1 => prop_oneof![64..112u64, 512..520u64, 1..10u64].prop_map(|gfn| Op::Move { gfn }),
        1 => (0..1056u64, 1..64u64).prop_map(|(gfn, pages)| Op::Zap { gfn, pages }),
        1 => (1..3usize).prop_map(|index| Op::Slot { index }),
        1 => Just(Op::Obsolete),
        1 => Just(Op::ZapObsolete),
        2 => (prop_oneof![Just(LogBy::DirtyBits), Just(LogBy::WriteProtection)], prop::bool::weighted(0.3))
            .prop_map(|(by, end)| Op::Log { by, end }),
    ]
}

fn frames() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 64..112u64, 1 => 1..10u64, 1 => Just(512u64), 1 => Just(1040u64), 1 => Just(1056u64), 1 => Just(1030u64),
        1 => Just(1u64 << 30)
    ]
}

fn ept_entries() -> BoxedStrategy<u64> {
    let rights = prop_oneof![
        8 => Just(0x407u64), 2 => Just(0x401), 2 => Just(0x403), 1 => Just(4), 1 => Just(0x400), 1 => Just(5),
        1 => Just(1), 1 => Just(2), 2 => Just(0)
    ];
    let flags = prop_oneof![6 => Just(0x300u64), 1 => Just(0x100), 1 => Just(0)];
    let kind = prop_oneof![
        8 => Just(0x30u64), 1 => Just(0), 1 => Just(0x20), 1 => Just(0x70), 1 => Just(0x18), 1 => Just(0xb0),
        1 => Just(1 << 50)
    ];
    (rights, flags, kind, frames())
        .prop_map(|(rights, flags, kind, frame)| frame << 12 | rights | flags | kind)
        .boxed()
}

fn npt_entries() -> BoxedStrategy<u64> {
    let flags = prop_oneof![
        8 => Just(0x67u64), 1 => Just(0x65), 1 => Just(0x63), 1 => Just(0x27), 1 => Just(7), 1 => Just(0),
        1 => Just(1 << 63 | 0x67), 1 => Just(0xe7), 1 => Just(1 << 50 | 0x67), 1 => Just(0x7f), 1 => Just(0x6f)
    ];
    (flags, frames()).prop_map(|(flags, frame)| frame << 12 | flags).boxed()
}

fn apply<H: HostMachine>(world: &mut World<H>, op: &Op) {
    let ept = matches!(world.belows[0], Below::Ept(_));
    let short = matches!(world.belows[0], Below::Npt(m) if !m.pae);
    let place = |world: &World<H>, at: usize| world.linear[at % world.linear.len()];
    match *op {
        Op::Access { vcpu, at, what, who, cached } => {
            let _ = world.access(vcpu, place(world, at), what, who, cached);
        }
        Op::Speculate { vcpu } => world.speculate(vcpu),
        Op::Store { vcpu, table, index, entry } => {
            let (len, index) = if short { (4, index * 4) } else { (8, index * 8) };
            world.l1_store(vcpu, table + index, len, entry);
        }
        Op::L1Access { vcpu, gfn, what } => {
            let _ = world.l1_access(vcpu, gfn << 12, what, gfn % 2 == 0);
        }
        Op::L2Store { vcpu, page, index, entry } => {
            let _ = world.l2_store(vcpu, (page << 12) | (index * 8), entry);
        }
        Op::L2Table { vcpu, index, to, flags } => {
            let _ = world.l2_store(vcpu, (27 << 12) | (index * 8), to << 12 | flags);
        }
        Op::L2Flush { vcpu, at } => {
            let va = at.map(|at| place(world, at));
            world.l2_flush(vcpu, va);
        }
        Op::Leave { vcpu } => world.leave_l2(vcpu),
        Op::Switch { vcpu, below, name } => {
            let name = if ept { name } else { name.max(1) };
            world.switch(vcpu, below % world.belows.len(), name);
        }
        Op::Flush { vcpu, which } if ept => {
            let pointer = world.belows[which % world.belows.len()].root();
            // The rest of the pointer does not count.
            world.invept(vcpu, (which != 3).then_some(pointer | 0x1e | (which as u64 & 1) << 6));
        }
        Op::Flush { vcpu, which } => {
            let control = [
                TlbControl::Nothing,
                TlbControl::Everything,
                TlbControl::Asid,
                TlbControl::AsidRetainingGlobals,
            ];
            world.leave_l2(vcpu);
            world.enter_l2(vcpu, control[which]);
        }
        Op::FlushLinear { vcpu, which, name, at } if ept => {
            let address = Gva::new(place(world, at));
            let what = match which {
                0 => Invvpid::Address { vpid: name, address },
                1 => Invvpid::Single { vpid: name },
                2 => Invvpid::All,
                _ => Invvpid::SingleRetainingGlobals { vpid: name },
            };
            world.invvpid(vcpu, what);
        }
        Op::FlushLinear { vcpu, name, at, .. } => world.invlpga(vcpu, place(world, at), name),
        Op::Move { gfn } => world.move_frame(gfn),
        Op::Zap { gfn, pages } => world.zap(GfnRange::new(Gfn::new_truncate(gfn), pages).unwrap()),
        Op::Slot { index } => world.toggle_slot(index),
        Op::Obsolete => world.obsolete(),
        Op::ZapObsolete => world.zap_obsolete(),
        Op::Log { by, end } => match (world.logs(), end) {
            (false, _) => world.start_log(by),
            (true, false) => drop(world.harvest()),
            (true, true) => world.stop_log(),
        },
    }
    world.check();
}

pub(crate) fn run<H: HostMachine>(
    host: H,
    (below, l2): (Below, Machine),
    setup: fn(&FlatRam),
    (own_tags, quota): (bool, usize),
    ops: &[Op],
) {
    let mut world = World::new(host, below, l2, own_tags, quota, setup);
    world.belows = belows(below);
    world.remember();
    for op in ops {
        apply(&mut world, op);
    }
    world.finish();
}

fn sequence(entries: fn() -> BoxedStrategy<u64>) -> impl Strategy<Value = (bool, usize, Vec<Op>)> {
    (any::<bool>(), 24..48usize, prop::collection::vec(ops(entries), 1..60))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn extended_page_tables_with_flags((own, quota, ops) in sequence(ept_entries)) {
        run(Intel { mode_based_execute: false, ..INTEL }, (Below::Ept(EPT), L2), ept_setup, (own, quota), &ops);
    }

    #[test]
    fn extended_page_tables_without_flags((own, quota, ops) in sequence(ept_entries)) {
        let below = ept::Machine { accessed_dirty: false, ..EPT };
        run(Intel { mode_based_execute: false, ..INTEL }, (Below::Ept(below), L2), ept_setup, (own, quota), &ops);
    }

    #[test]
    fn extended_page_tables_with_mode_based_execute_control((own, quota, ops) in sequence(ept_entries)) {
        let below = ept::Machine { mode_based: true, ..EPT };
        run(INTEL, (Below::Ept(below), L2), ept_setup, (own, quota), &ops);
    }

    #[test]
    fn g7_extended_page_tables_of_five_levels((own, quota, ops) in sequence(ept_entries)) {
        let host = Intel { mode_based_execute: false, ..INTEL };
        let below = ept::Machine { levels: 5, root: ROOT_A5, ..EPT };
        run(host, (Below::Ept(below), L2_UNPAGED), ept5_setup, (own, quota), &ops);
    }

    #[test]
    fn nested_tables_of_svm((own, quota, ops) in sequence(npt_entries)) {
        run(AMD, (Below::Npt(NPT), L2), npt_setup, (own, quota), &ops);
    }

    #[test]
    fn nested_tables_of_svm_under_five_levels((own, quota, ops) in sequence(npt_entries)) {
        let host = Amd { host: Host { five_level: true, ..HOST }, ..AMD };
        run(host, (Below::Npt(NPT), L2_UNPAGED), npt_setup, (own, quota), &ops);
    }

    #[test]
    fn nested_tables_of_svm_with_guest_mode_execute_trap((own, quota, ops) in sequence(npt_entries)) {
        run(AMD, (Below::Npt(Machine { smep: true, ..NPT }), L2), npt_setup, (own, quota), &ops);
    }

    #[test]
    fn commit_ee6268ba3a68_a_32_bit_l1((own, quota, ops) in sequence(npt_entries)) {
        let below = Machine { lma: false, pae: false, pse: true, nxe: false, ..NPT };
        run(AMD, (Below::Npt(below), L2_UNPAGED), short_setup, (own, quota), &ops);
    }

    #[test]
    fn commit_ee6268ba3a68_a_32_bit_l1_with_pae((own, quota, ops) in sequence(npt_entries)) {
        let below = Machine { lma: false, ..NPT };
        run(AMD, (Below::Npt(below), L2_UNPAGED), pae_setup, (own, quota), &ops);
    }
}
