//! The shadow kind under random sequences, in each paging mode: guests that write their tables in every way, flush as the
//! manuals say and switch between PCIDs; two vCPUs with TLBs; slots that change, a small quota. After each step the whole
//! kind and every TLB that a guest runs with are checked, and each access against the reference walk.
pub(crate) mod support;

use mmu::{Gfn, GfnRange, Gva, Invpcid, Tags};
use proptest::prelude::*;
use support::flat::FlatRam;
use support::manual::guest::BASE;
use support::manual::{Machine, What, Who};
use support::shadow::{How, Vcpu, World};

const PCIDE: u64 = 1 << 17;
const PGE: u64 = 1 << 7;

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Access {
        vcpu: usize,
        at: usize,
        what: What,
        who: Who,
        how: How,
    },
    /// Through the guest's own map.
    Store {
        vcpu: usize,
        table: u64,
        index: u64,
        entry: u64,
        how: How,
    },
    /// By a device, which is told of.
    Emulate {
        table: u64,
        offset: u64,
        len: usize,
        entry: u64,
    },
    MovToCr3 {
        vcpu: usize,
        root: usize,
        pcid: u64,
        no_flush: bool,
    },
    /// WP, or PG off and on again.
    MovToCr0 {
        vcpu: usize,
        wp: bool,
        pg: bool,
    },
    MovToCr4 {
        vcpu: usize,
        smep: bool,
        smap: bool,
        pge: bool,
        pcide: bool,
    },
    WrmsrEfer {
        vcpu: usize,
        nxe: bool,
    },
    Invlpg {
        vcpu: usize,
        at: usize,
    },
    /// Other flags for a page of a lowest table, and INVLPG of its address, if not forgotten.
    Rewrite {
        vcpu: usize,
        table: u64,
        index: u64,
        flags: u64,
        flush: bool,
        how: How,
    },
    /// Bits that kernels clear and set again: CR0.WP, or CR4.PGE.
    Toggle {
        vcpu: usize,
        pge: bool,
    },
    Invpcid {
        vcpu: usize,
        kind: u8,
        pcid: u16,
        at: usize,
    },
    Init {
        vcpu: usize,
    },
    /// From outside: all registers are as at the start.
    Restore {
        vcpu: usize,
    },
    Migrate {
        vcpu: usize,
        on: usize,
    },
    Slot(Option<bool>),
    Zap {
        gfn: u64,
        pages: u64,
    },
    Obsolete,
    ZapObsolete,
}

/// A guest: its registers, its memory, and what it uses.
pub(crate) struct Guest {
    m: Machine,
    roots: [u64; 2],
    entry_bytes: u64,
    /// Shifts of the indexes of an address, and how many of each are used.
    indexes: &'static [(u32, u64)],
    setup: fn(&FlatRam),
}

pub(crate) const FOUR: Guest = Guest {
    m: BASE,
    roots: [0x1000, 0x6000],
    entry_bytes: 8,
    indexes: &[(39, 2), (30, 2), (21, 3), (12, 11)],
    setup: four_levels,
};
pub(crate) const FIVE: Guest = Guest {
    m: Machine { la57: true, cr3: 0x8000, ..BASE },
    roots: [0x8000, 0x9000],
    entry_bytes: 8,
    indexes: &[(48, 2), (39, 2), (30, 1), (21, 3), (12, 11)],
    setup: |ram| {
        four_levels(ram);
        for (at, table) in [(0x8000, 0x1000), (0x8008, 0x6000), (0x9000, 0x6000)] {
            ram.set(at, table | 0x67);
        }
    },
};
pub(crate) const PAE: Guest = Guest {
    m: Machine { lma: false, cr3: 0xa000, ..BASE },
    roots: [0xa000, 0xa020],
    entry_bytes: 8,
    indexes: &[(30, 3), (21, 3), (12, 11)],
    setup: |ram| {
        four_levels(ram);
        for (at, table) in [(0xa000, 0x3000), (0xa008, 0x6000), (0xa020, 0x3000), (0xa028, 0x3000)] {
            ram.set(at, table | 1);
        }
        ram.set(0x6000, 0x5000 | 0x67);
    },
};
pub(crate) const TWO: Guest = Guest {
    m: Machine { lma: false, pae: false, pse: true, nxe: false, ..BASE },
    roots: [0x1000, 0x6000],
    entry_bytes: 4,
    indexes: &[(22, 3), (12, 11)],
    setup: |ram| {
        for root in [0x1000, 0x6000] {
            ram.set_u32(root, 0x4067);
            ram.set_u32(root + 4, 0x5067);
            ram.set_u32(root + 8, 0xe7);
        }
        for page in 0..11 {
            ram.set_u32(0x4000 + page * 4, (page as u32) << 12 | 0x67);
            ram.set_u32(0x5000 + page * 4, (16 + page as u32) << 12 | 0x67);
        }
    },
};

/// Tables in frames 1 to 9, the first one mapped one to one below 44 KiB.
fn four_levels(ram: &FlatRam) {
    for (top, upper) in [(0x1000, 0x2000), (0x6000, 0x2000)] {
        ram.set(top, upper | 0x67);
    }
    ram.set(0x2000, 0x3000 | 0x67);
    ram.set(0x3000, 0x4000 | 0x67);
    ram.set(0x3008, 0x5000 | 0x67);
    ram.set(0x3010, 0x20_0000 | 0xe7);
    for page in 0..11 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
        ram.set(0x5000 + page * 8, (16 + page) << 12 | 0x67);
    }
}

impl Guest {
    fn addresses(&self) -> Vec<u64> {
        let grow = |all: Vec<u64>, &(shift, count): &(u32, u64)| {
            all.iter().flat_map(|at| (0..count).map(move |index| at | index << shift)).collect()
        };
        self.indexes.iter().fold(vec![0x18], grow)
    }

    fn apply(&self, world: &mut World, op: &Op) {
        let place = |world: &World, at: usize| world.addresses[at % world.addresses.len()];
        match *op {
            Op::Access { vcpu, at, what, who, how } => {
                let at = place(world, at);
                let _ = world.access_as(vcpu, at, what, who, how);
            }
            Op::Store { vcpu, table, index, entry, how } => {
                let at = (table << 12) | (index * self.entry_bytes);
                // Frame 0 stands for the one that is there: only the rights change.
                let short = self.entry_bytes == 4;
                let found = if short { world.ram().get_u32(at).map(u64::from) } else { world.ram().get(at) };
                let entry =
                    if entry >> 12 & 0xffff == 0 { entry | found.unwrap_or(0) & 0xfff_f000 } else { entry };
                let _ = world.guest_store_as(vcpu, at, self.entry_bytes, entry, how);
            }
            Op::Emulate { table, offset, len, entry } => world.emulate(table << 12 | offset, len, entry),
            Op::MovToCr3 { vcpu, root, pcid, no_flush } => {
                let pcid = if world.vcpus[vcpu].cr4 & PCIDE != 0 { pcid } else { 0 };
                world.mov_to_cr3(vcpu, self.roots[root] | pcid, no_flush);
            }
            Op::MovToCr0 { vcpu, wp, pg } => {
                // PG is set only where the rest is as it needs it.
                let m = world.vcpus[vcpu].m;
                let can_page = m.cr3 != 0 && world.vcpus[vcpu].cr4 & PCIDE == 0;
                let pg = if can_page { pg } else { m.pg };
                world.mov_to_cr0(vcpu, pg, wp, self.m.lma);
            }
            Op::MovToCr4 { vcpu, smep, smap, pge, pcide } => {
                let m = world.vcpus[vcpu].m;
                let old = world.vcpus[vcpu].cr4;
                // PCIDE is set with PCID 0 in long mode alone (Intel SDM vol. 3, 4.10.1).
                let may = m.lma && (m.cr3 & 0xfff == 0 || old & PCIDE != 0);
                let cr4 = if pge { PGE } else { 0 } | if pcide && may { PCIDE } else { 0 };
                // Without PCIDs the low bits of CR3 are PWT, PCD and nothing.
                world.mov_to_cr4(vcpu, Machine { smep, smap, ..m }, cr4);
            }
            Op::WrmsrEfer { vcpu, nxe } => world.wrmsr_efer(vcpu, nxe),
            Op::Invlpg { vcpu, at } => world.invlpg(vcpu, place(world, at)),
            Op::Rewrite { vcpu, table, index, flags, flush, how } => {
                let at = ((4 + table) << 12) + index * 8;
                let frame = world.ram().get(at).unwrap_or(0) & 0xffff_f000;
                let _ = world.guest_store_as(vcpu, at, 8, frame | flags, how);
                if flush {
                    world.invlpg(vcpu, table << 21 | index << 12 | 0x18);
                }
            }
            Op::Toggle { vcpu, pge: true } => {
                let Vcpu { m, cr4, .. } = world.vcpus[vcpu];
                world.mov_to_cr4(vcpu, m, cr4 ^ PGE);
            }
            Op::Toggle { vcpu, pge: false } => {
                let m = world.vcpus[vcpu].m;
                world.mov_to_cr0(vcpu, m.pg, !m.wp, self.m.lma);
            }
            Op::Invpcid { vcpu, kind, pcid, at } => {
                let pcid = if world.vcpus[vcpu].cr4 & PCIDE != 0 { pcid } else { 0 };
                let address = Gva::new(place(world, at));
                let what = match kind {
                    0 => Invpcid::Address { pcid, address },
                    1 => Invpcid::Single { pcid },
                    2 => Invpcid::All,
                    _ => Invpcid::AllButGlobal,
                };
                world.invpcid(vcpu, what);
            }
            Op::Init { vcpu } => world.init(vcpu),
            Op::Restore { vcpu } => world.switch(vcpu, self.m),
            Op::Migrate { vcpu, on } => world.migrate(vcpu, on),
            Op::Slot(slot) => world.change_slot(slot),
            Op::Zap { gfn, pages } => world.zap(GfnRange::new(Gfn::new_truncate(gfn), pages).unwrap()),
            Op::Obsolete => world.invalidate_all(),
            Op::ZapObsolete => world.zap_obsolete(),
        }
        world.check();
    }

    pub(crate) fn run(&self, quota: usize, tags: Tags, ops: &[Op]) {
        let mut world = World::with(self.m, quota, self.addresses(), tags, self.setup);
        for op in ops {
            self.apply(&mut world, op);
        }
        world.finish();
    }
}

fn entries() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![
        8 => Just(0x67u64), 2 => Just(0x65), 1 => Just(0x63), 1 => Just(0x27), 1 => Just(7), 2 => Just(0),
        1 => Just(1 << 63 | 0x67), 1 => Just(0xe7), 1 => Just(1 << 50 | 0x67)
    ];
    let frame =
        prop_oneof![6 => Just(0u64), 6 => 1..10u64, 3 => 16..24u64, 1 => Just(512u64), 1 => Just(4096u64)];
    (flags, frame).prop_map(|(flags, frame)| frame << 12 | flags)
}

fn hows() -> impl Strategy<Value = How> {
    let ahead = prop_oneof![3 => Just(None), 1 => (0..120usize).prop_map(Some)];
    (any::<bool>(), any::<bool>(), any::<bool>(), ahead).prop_map(|(hit, resume, keep, ahead)| How {
        hit,
        resume,
        keep,
        ahead,
    })
}

fn ops() -> impl Strategy<Value = Op> {
    // Most accesses are below the lowest tables.
    let (vcpu, pcid) = (0..2usize, 0..3u64);
    let at = prop_oneof![3 => 0..22usize, 1 => 0..132usize].boxed();
    let whats = prop_oneof![Just(What::Read), Just(What::Write), Just(What::Fetch)];
    let whos = prop_oneof![Just(Who::User), Just(Who::Supervisor)];
    let mostly = || prop::bool::weighted(0.8);
    prop_oneof![
        16 => (vcpu.clone(), at.clone(), whats, whos, hows())
            .prop_map(|(vcpu, at, what, who, how)| Op::Access { vcpu, at, what, who, how }),
        // Most writes are to the lowest tables.
        8 => (vcpu.clone(), prop_oneof![1..11u64, 4..6u64], 0..10u64, entries(), hows())
            .prop_map(|(vcpu, table, index, entry, how)| Op::Store { vcpu, table, index, entry, how }),
        2 => (1..10u64, 0..80u64, prop_oneof![Just(1usize), Just(2), Just(4), Just(8)], entries())
            .prop_map(|(table, offset, len, entry)| Op::Emulate { table, offset, len, entry }),
        6 => (vcpu.clone(), 0..2usize, pcid.clone(), any::<bool>())
            .prop_map(|(vcpu, root, pcid, no_flush)| Op::MovToCr3 { vcpu, root, pcid, no_flush }),
        2 => (vcpu.clone(), any::<bool>(), mostly()).prop_map(|(vcpu, wp, pg)| Op::MovToCr0 { vcpu, wp, pg }),
        3 => (vcpu.clone(), any::<bool>(), any::<bool>(), mostly(), mostly())
            .prop_map(|(vcpu, smep, smap, pge, pcide)| Op::MovToCr4 { vcpu, smep, smap, pge, pcide }),
        1 => (vcpu.clone(), any::<bool>()).prop_map(|(vcpu, nxe)| Op::WrmsrEfer { vcpu, nxe }),
        3 => (vcpu.clone(), at.clone()).prop_map(|(vcpu, at)| Op::Invlpg { vcpu, at }),
        3 => (vcpu.clone(), 0..4u8, pcid, at)
            .prop_map(|(vcpu, kind, pcid, at)| Op::Invpcid { vcpu, kind, pcid: pcid as u16, at }),
        1 => prop_oneof![
            1 => vcpu.clone().prop_map(|vcpu| Op::Init { vcpu }),
            2 => vcpu.clone().prop_map(|vcpu| Op::Restore { vcpu })
        ],
        1 => (vcpu, 0..2usize).prop_map(|(vcpu, on)| Op::Migrate { vcpu, on }),
        1 => prop_oneof![Just(None), Just(Some(false)), Just(Some(true))].prop_map(Op::Slot),
        1 => (0..24u64, 1..600u64).prop_map(|(gfn, pages)| Op::Zap { gfn, pages }),
        1 => prop_oneof![2 => Just(Op::ZapObsolete), 1 => Just(Op::Obsolete)],
    ]
}

/// What kernels do all the time, which short ways are for: pages of two lowest tables change their rights.
fn kernel_ops() -> impl Strategy<Value = Op> {
    let vcpu = || prop_oneof![3 => Just(0usize), 1 => Just(1)];
    // The lowest tables of the first address space.
    let page = || (0..2u64, 0..11u64);
    let flags = prop_oneof![
        6 => Just(0x67u64), 6 => Just(0x65), 2 => Just(0x27), 1 => Just(0x25), 2 => Just(7), 1 => Just(0x61), 2 => Just(0),
        1 => Just(1 << 63 | 0x67)
    ];
    let whats = prop_oneof![2 => Just(What::Read), 3 => Just(What::Write), 1 => Just(What::Fetch)];
    let whos = prop_oneof![Just(Who::User), Just(Who::Supervisor)];
    prop_oneof![
        24 => (vcpu(), page(), whats, whos, hows()).prop_map(|(vcpu, (table, index), what, who, how)| {
            Op::Access { vcpu, at: (table * 11 + index) as usize, what, who, how }
        }),
        24 => (vcpu(), page(), flags, prop::bool::weighted(0.9), hows()).prop_map(
            |(vcpu, (table, index), flags, flush, how)| Op::Rewrite { vcpu, table, index, flags, flush, how }
        ),
        6 => (vcpu(), prop::bool::weighted(0.3)).prop_map(|(vcpu, pge)| Op::Toggle { vcpu, pge }),
        1 => (vcpu(), 0..2usize).prop_map(|(vcpu, root)| Op::MovToCr3 { vcpu, root, pcid: 0, no_flush: false }),
        1 => ops(),
    ]
}

fn tags() -> impl Strategy<Value = Tags> {
    prop_oneof![Just(Tags::One), Just(Tags::PerRoot)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_in_long_mode(quota in 16..40usize, tags in tags(), ops in prop::collection::vec(ops(), 1..120)) {
        FOUR.run(quota, tags, &ops);
    }

    #[test]
    fn any_sequence_of_what_kernels_do(quota in 24..40usize, ops in prop::collection::vec(kernel_ops(), 1..160)) {
        FOUR.run(quota, Tags::One, &ops);
    }

    #[test]
    fn any_sequence_with_five_levels(quota in 20..40usize, tags in tags(), ops in prop::collection::vec(ops(), 1..120)) {
        FIVE.run(quota, tags, &ops);
    }

    #[test]
    fn any_sequence_with_pae(quota in 16..40usize, tags in tags(), ops in prop::collection::vec(ops(), 1..120)) {
        PAE.run(quota, tags, &ops);
    }

    #[test]
    fn any_sequence_with_two_levels(quota in 16..40usize, tags in tags(), ops in prop::collection::vec(ops(), 1..120)) {
        TWO.run(quota, tags, &ops);
    }
}
