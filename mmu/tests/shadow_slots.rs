//! The shadow kind while the VM around it changes, under random sequences: slots that come, go and become read-only, backing that
//! is invalidated, logs, aging, tracking by others, the rule against executable huge pages, notes about device memory. After
//! each step the whole kind is checked, each access against the reference walk and the slots, and the log against what was
//! written.
mod support;

use std::collections::BTreeSet;

use mmu::{CpuRole, Gfn, GfnRange, Gva, LogBy, Slot, SlotFlags};
use proptest::prelude::*;
use support::flat::FlatRam;
use support::manual::guest::{access, registers, BASE};
use support::manual::{Machine, What, Who};
use support::shadow::{sweep, Ended, World, CPU, PAGES};

/// The slot that changes: the upper half of memory.
const UPPER: u64 = 512;

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
        wp: bool,
        nxe: bool,
    },
    Remove,
    Insert {
        read_only: bool,
    },
    Flags {
        read_only: bool,
    },
    /// Backing moves, as far as anybody but the backing can tell.
    Invalidate {
        gfn: u64,
        pages: u64,
    },
    Zap {
        gfn: u64,
        pages: u64,
    },
    Protect {
        gfn: u64,
        pages: u64,
    },
    StartLog {
        by: LogBy,
        all_set: bool,
    },
    Harvest,
    StopLog,
    Age {
        gfn: u64,
        pages: u64,
    },
    Track {
        gfn: u64,
    },
    Untrack,
    ForbidHuge {
        on: bool,
    },
    Recover,
    Collapse,
    Notes {
        on: bool,
    },
    Obsolete,
}

/// Two tables of ten pages, a 2 MiB page of the upper slot, one across the device memory above, and a second address for it.
fn guest(ram: &FlatRam) {
    ram.set(0x1000, 0x2067);
    ram.set(0x2000, 0x3067);
    ram.set(0x3000, 0x4067);
    ram.set(0x3008, 0x5067);
    ram.set(0x3010, 0x20_0000 | 0xe7);
    ram.set(0x3018, 0x40_0000 | 0xe7);
    for page in 0..10 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
        ram.set(0x5000 + page * 8, (UPPER - 5 + page) << 12 | 0x67);
    }
}

fn addresses() -> Vec<u64> {
    let pages = |directory: u64| (0..10u64).map(move |page| directory << 21 | page << 12 | 0x18);
    (0..4).flat_map(pages).collect()
}

fn entries() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![
        8 => Just(0x67u64), 1 => Just(0x65), 1 => Just(0x63), 1 => Just(0x27), 1 => Just(0),
        1 => Just(1 << 63 | 0x67), 2 => Just(0xe7)
    ];
    let frame = prop_oneof![3 => 1..10u64, 4 => UPPER - 4..UPPER + 8, 1 => Just(UPPER), 1 => Just(4096u64)];
    (flags, frame).prop_map(|(flags, frame)| frame << 12 | flags)
}

fn ops() -> impl Strategy<Value = Op> {
    let (vcpus, places) = (0..2usize, 0..addresses().len());
    let whats = prop_oneof![Just(What::Read), Just(What::Write), Just(What::Fetch)];
    let whos = prop_oneof![Just(Who::User), Just(Who::Supervisor)];
    let gfns = prop_oneof![0..12u64, UPPER - 6..UPPER + 12];
    let pages = prop_oneof![1..4u64, Just(512u64)];
    let range = (gfns.clone(), pages);
    prop_oneof![
        30 => (vcpus.clone(), places.clone(), whats, whos)
            .prop_map(|(vcpu, at, what, who)| Op::Access { vcpu, at, what, who }),
        10 => (vcpus.clone(), prop_oneof![Just(3u64), Just(4), Just(5), Just(5)], 0..10u64, entries())
            .prop_map(|(vcpu, table, index, entry)| Op::Store { vcpu, table, index, entry }),
        4 => (3..6u64, 0..80u64, prop_oneof![Just(1usize), Just(4), Just(8)], entries())
            .prop_map(|(table, offset, len, entry)| Op::Emulate { table, offset, len, entry }),
        2 => (vcpus.clone(), places).prop_map(|(vcpu, at)| Op::Invlpg { vcpu, at }),
        2 => vcpus.clone().prop_map(|vcpu| Op::Flush { vcpu }),
        1 => (vcpus, any::<bool>(), any::<bool>()).prop_map(|(vcpu, wp, nxe)| Op::Switch { vcpu, wp, nxe }),
        1 => Just(Op::Remove),
        2 => any::<bool>().prop_map(|read_only| Op::Insert { read_only }),
        2 => any::<bool>().prop_map(|read_only| Op::Flags { read_only }),
        1 => range.clone().prop_map(|(gfn, pages)| Op::Invalidate { gfn, pages }),
        1 => range.clone().prop_map(|(gfn, pages)| Op::Zap { gfn, pages }),
        1 => range.clone().prop_map(|(gfn, pages)| Op::Protect { gfn, pages }),
        3 => (prop_oneof![Just(LogBy::WriteProtection), Just(LogBy::DirtyBits)], any::<bool>())
            .prop_map(|(by, all_set)| Op::StartLog { by, all_set }),
        4 => Just(Op::Harvest),
        1 => Just(Op::StopLog),
        2 => range.prop_map(|(gfn, pages)| Op::Age { gfn, pages }),
        1 => gfns.prop_map(|gfn| Op::Track { gfn }),
        1 => Just(Op::Untrack),
        2 => any::<bool>().prop_map(|on| Op::ForbidHuge { on }),
        1 => Just(Op::Recover),
        1 => Just(Op::Collapse),
        2 => any::<bool>().prop_map(|on| Op::Notes { on }),
        1 => Just(Op::Obsolete),
    ]
}

struct Model {
    world: World,
    /// The flags of the upper slot, while there is one.
    upper: Option<SlotFlags>,
    /// How the upper slot is logged, and which of its pages were written since their bits were cleared.
    log: Option<LogBy>,
    written: BTreeSet<u64>,
    tracked: Vec<u64>,
}

fn range(gfn: u64, pages: u64) -> GfnRange {
    GfnRange::new(Gfn::new_truncate(gfn), pages).unwrap()
}

const ALL: GfnRange = GfnRange::ALL;

impl Model {
    fn new(quota: usize) -> Self {
        let slots = [(0, UPPER), (UPPER, PAGES - UPPER)];
        let world = World::over(&slots, BASE, quota, addresses(), mmu::Tags::One, guest);
        let upper = Some(SlotFlags::empty());
        Self { world, upper, log: None, written: BTreeSet::new(), tracked: vec![] }
    }

    fn insert(&mut self, flags: SlotFlags) {
        self.world.memory.backing().clear_notes(1);
        let slot = Slot::new(range(UPPER, PAGES - UPPER), flags, UPPER * 512);
        self.world.memory.exclusive(CPU).insert_slot(&slot).unwrap();
        self.upper = Some(flags);
        self.world.hidden = 0..0;
        self.fix(flags);
    }

    fn fix(&mut self, flags: SlotFlags) {
        self.world.fixed = if flags.is_empty() { 0..0 } else { UPPER << 12..PAGES << 12 };
        self.world.remember();
    }

    fn wrote(&mut self, address: u64) {
        if address >> 12 >= UPPER && self.log.is_some() {
            self.written.insert(address >> 12);
        }
    }

    fn visit(&mut self, vcpu: usize, va: u64, what: What, who: Who) -> Ended {
        self.ask_note(vcpu, va, what, who);
        let ended = self.world.use_page(vcpu, va, what, who);
        if let Ended::At(at) = ended {
            let write = what == What::Write;
            match self.upper {
                _ if at >> 12 < UPPER => {}
                Some(flags) => assert!(!write || flags.is_empty(), "a read-only slot is written at {at:#x}"),
                None => panic!("I2: {at:#x} has no slot"),
            }
            assert!(at >> 12 < PAGES, "I2: {at:#x}");
            if write {
                assert!(!self.tracked.contains(&(at >> 12)), "D6: a tracked page is written");
                self.wrote(at);
            }
        }
        ended
    }

    /// I1: what a note says, the guest's tables have said since the last flush, and no slot is there.
    fn ask_note(&self, vcpu: usize, va: u64, what: What, who: Who) {
        let at = &self.world.vcpus[vcpu];
        let (paging, cpu) = registers(&at.m);
        let role = CpuRole::new(&paging, &cpu);
        let guard = self.world.memory.exclusive(CPU);
        let known = self.world.kind.mmio_at(&guard, at.root, &role, Gva::new(va), access(what, who));
        if let Some(gpa) = known {
            let gfn = gpa.gfn().number();
            assert!(self.world.is_seen(vcpu, va, what, who, gfn), "I1: {gpa:?}");
            assert!(gfn >= UPPER && (gfn >= PAGES || self.upper.is_none()), "I1: RAM at {gpa:?}");
        }
    }

    fn harvest(&mut self) {
        let Some(by) = self.log else { return };
        let start = Gfn::new_truncate(UPPER);
        if by == LogBy::DirtyBits {
            sweep(|progress| {
                let _ = self.world.kind.collect_dirty(&mut self.world.memory.exclusive(CPU), ALL, progress);
            });
        }
        let mut found = BTreeSet::new();
        for index in 0..(PAGES - UPPER) / 64 {
            let mask =
                self.world.memory.shared(CPU).dirty_log(start).unwrap().clear(index as usize, u64::MAX);
            let first = UPPER + index * 64;
            let mut guard = self.world.memory.exclusive(CPU);
            let _ = self.world.kind.rearm_pages(&mut guard, Gfn::new_truncate(first), mask);
            found.extend((0..64).filter(|bit| mask >> bit & 1 != 0).map(|bit| first + bit));
        }
        for page in std::mem::take(&mut self.written) {
            assert!(found.contains(&page), "H1: {page:#x} was written, {by:?}");
        }
    }

    fn stop_log(&mut self) {
        if self.log.take().is_some() {
            let _ = self.world.memory.exclusive(CPU).stop_dirty_log(Gfn::new_truncate(UPPER)).unwrap();
            self.written.clear();
        }
    }

    fn untrack(&mut self) {
        for gfn in std::mem::take(&mut self.tracked) {
            let _ = self.world.memory.exclusive(CPU).untrack_writes(Gfn::new_truncate(gfn));
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Access { vcpu, at, what, who } => {
                self.visit(vcpu, self.world.addresses[at], what, who);
            }
            Op::Store { vcpu, table, index, entry } => {
                let va = (table << 12) | (index * 8);
                match self.visit(vcpu, va, What::Write, Who::Supervisor) {
                    Ended::At(at) => self.world.store(at & !7, entry),
                    Ended::Emulated(at) => {
                        self.world.emulate(at & !7, 8, entry);
                        self.wrote(at);
                    }
                    _ => {}
                }
            }
            Op::Emulate { table, offset, len, entry } => {
                self.world.emulate(table << 12 | offset, len, entry);
            }
            Op::Invlpg { vcpu, at } => self.world.invlpg(vcpu, self.world.addresses[at]),
            Op::Flush { vcpu } => self.world.flush(vcpu),
            Op::Switch { vcpu, wp, nxe } => self.world.switch(vcpu, Machine { wp, nxe, ..BASE }),
            Op::Remove if self.upper.take().is_some() => {
                self.untrack();
                self.stop_log();
                let start = Gfn::new_truncate(UPPER);
                self.world.hidden = UPPER << 12..PAGES << 12;
                let range = self.world.memory.exclusive(CPU).remove_slot(start).unwrap().range();
                self.world.zap_range(range);
            }
            Op::Insert { read_only } if self.upper.is_none() => {
                self.insert(if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() });
            }
            Op::Flags { read_only } if self.upper.is_some() => {
                let flags = if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
                let start = Gfn::new_truncate(UPPER);
                let mut guard = self.world.memory.exclusive(CPU);
                let range = guard.set_slot_flags(start, flags).unwrap().range();
                drop(guard);
                self.upper = Some(flags);
                self.world.zap_range(range);
                self.fix(flags);
            }
            Op::Remove | Op::Insert { .. } | Op::Flags { .. } => {}
            Op::Invalidate { gfn, pages } => {
                let range = range(gfn, pages);
                let invalidation = self.world.memory.exclusive(CPU).begin_invalidation(range);
                self.world.zap_range(range);
                self.world.check();
                drop(invalidation);
            }
            Op::Zap { gfn, pages } => self.world.zap_range(range(gfn, pages)),
            Op::Protect { gfn, pages } => sweep(|progress| {
                let mut guard = self.world.memory.exclusive(CPU);
                let _ = self.world.kind.write_protect(&mut guard, range(gfn, pages), progress);
            }),
            Op::StartLog { by, all_set } if self.upper.is_some() => {
                self.stop_log();
                let start = Gfn::new_truncate(UPPER);
                let mut guard = self.world.memory.exclusive(CPU);
                if all_set {
                    let _ = guard.start_dirty_log_all_set(start, by).unwrap();
                } else {
                    let slot = guard.start_dirty_log(start, by).unwrap();
                    sweep(|progress| {
                        let _ = self.world.kind.rearm(&mut guard, &slot, progress);
                    });
                }
                drop(guard);
                self.log = Some(by);
            }
            Op::StartLog { .. } => {}
            Op::Harvest => self.harvest(),
            Op::StopLog => self.stop_log(),
            Op::Age { gfn, pages } => {
                let before = self.world.memory.shootdown().requested();
                sweep(|progress| {
                    let mut guard = self.world.memory.exclusive(CPU);
                    self.world.kind.test_and_clear_young(&mut guard, range(gfn, pages), progress);
                });
                sweep(|progress| {
                    let mut guard = self.world.memory.exclusive(CPU);
                    let young = self.world.kind.test_young(&mut guard, range(gfn, pages), progress);
                    assert!(!young, "H5");
                });
                assert_eq!(self.world.memory.shootdown().requested(), before, "H5");
            }
            Op::Track { gfn } => {
                let mut guard = self.world.memory.exclusive(CPU);
                if let Ok(sweep) = guard.track_writes(Gfn::new_truncate(gfn)) {
                    self.tracked.push(gfn);
                    let _ = self.world.kind.track_range(&mut guard, sweep);
                }
            }
            Op::Untrack => self.untrack(),
            Op::ForbidHuge { on } => {
                let range = self.world.kind.forbid_huge_execute(&self.world.memory.exclusive(CPU), on);
                self.world.zap_range(range.unwrap());
            }
            Op::Recover => sweep(|progress| {
                let mut guard = self.world.memory.exclusive(CPU);
                let _ = self.world.kind.recover_huge_pages(&mut guard, 2, progress);
            }),
            Op::Collapse => sweep(|progress| {
                let _ = self.world.kind.collapse(&mut self.world.memory.exclusive(CPU), ALL, progress);
            }),
            Op::Notes { on } => {
                if on {
                    self.world.kind.cache_mmio(&self.world.memory.exclusive(CPU));
                } else {
                    self.world.kind.stop_caching_mmio();
                }
            }
            Op::Obsolete => {
                let _ = self.world.kind.invalidate_all(&mut self.world.memory.exclusive(CPU));
                sweep(|progress| {
                    let _ = self.world.kind.zap_obsolete(&mut self.world.memory.exclusive(CPU), progress);
                });
            }
        }
        self.world.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_changes(quota in 16..40usize, ops in prop::collection::vec(ops(), 1..120)) {
        let mut model = Model::new(quota);
        for op in &ops {
            model.apply(op);
        }
        model.world.finish();
    }
}
