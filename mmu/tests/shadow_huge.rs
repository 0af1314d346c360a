//! Huge pages of the shadow kind: what forbids them, what brings them back, and the rule against executable ones.
mod support;

use mmu::{Gfn, GfnRange};
use support::flat::FlatRam;
use support::manual::guest::BASE;
use support::manual::{Machine, What, Who};
use support::shadow::{sweep, Ended, World, CPU, PAGES};

const HUGE: u64 = 0x20_0000;
/// The same block by an entry that is read-only, and by one that is clean.
const READ_ONLY: u64 = 0x40_0000;
const CLEAN: u64 = 0x60_0000;

fn guest(ram: &FlatRam) {
    ram.set(0x1000, 0x2067);
    ram.set(0x2000, 0x3067);
    ram.set(0x3000, 0x4067);
    ram.set(0x3008, HUGE | 0xe7);
    ram.set(0x3010, HUGE | 0xe5);
    ram.set(0x3018, HUGE | 0xa7);
    for page in 0..64 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
    }
}

fn addresses() -> Vec<u64> {
    let inside = [HUGE, READ_ONLY, CLEAN].into_iter().flat_map(|at| [at, at + 0x5008, at + 0x1f_f000]);
    (0..64).map(|page| page << 12 | 8).chain(inside).collect()
}

fn world(m: Machine) -> World {
    World::new(m, 64, addresses(), guest)
}

fn all() -> GfnRange {
    GfnRange::new(Gfn::default(), PAGES).unwrap()
}

fn forbid(world: &mut World, on: bool) {
    let range = world.kind.forbid_huge_execute(&world.memory.exclusive(CPU), on).unwrap();
    world.zap_range(range);
    world.check();
}

fn at(world: &mut World, va: u64, what: What) {
    assert_eq!(world.access(0, va, what, Who::User), Ended::At(HUGE | va & 0x1f_ffff), "{va:#x} {what:?}");
}

fn collapse(world: &mut World) {
    sweep(|progress| {
        let _ = world.kind.collapse(&mut world.memory.exclusive(CPU), all(), progress);
    });
    world.check();
}

fn huge(world: &World) -> u64 {
    world.kind.page_counts().leaves[1]
}

/// B6, CVE-2018-12207: with the rule no huge page is executable; fetches get small pages, which data accesses leave alone.
#[test]
fn b6_cve_2018_12207_no_huge_page_is_executable() {
    let mut world = world(BASE);
    at(&mut world, HUGE, What::Fetch);
    assert_eq!(huge(&world), 1);
    forbid(&mut world, true);
    assert!(world.kind.forbids_huge_execute());
    at(&mut world, HUGE, What::Write);
    assert_eq!((huge(&world), world.hardware(0, HUGE, What::Fetch, Who::User)), (1, None));
    at(&mut world, HUGE + 0x5008, What::Fetch);
    assert_eq!((huge(&world), world.kind.execute_splits()), (0, 1));
    for what in [What::Write, What::Read, What::Fetch] {
        at(&mut world, HUGE, what);
        assert_eq!((huge(&world), world.kind.execute_splits()), (0, 1), "{what:?}");
    }
    // The others of the block are their own pages, with their own rule.
    at(&mut world, READ_ONLY, What::Read);
    assert_eq!(huge(&world), 1);
    at(&mut world, READ_ONLY, What::Fetch);
    assert_eq!((huge(&world), world.kind.execute_splits()), (0, 2));
    collapse(&mut world);
    assert_eq!(world.kind.execute_splits(), 2, "recovery is what takes them");
    forbid(&mut world, false);
    assert_eq!(huge(&world), 0);
    world.finish();
}

/// Recovery takes a bounded number at a time, and the blocks are huge again until the next fetch.
#[test]
fn b6_recovery_brings_huge_pages_back() {
    let mut world = world(BASE);
    forbid(&mut world, true);
    for va in [HUGE, READ_ONLY] {
        at(&mut world, va, What::Fetch);
    }
    assert_eq!(world.kind.execute_splits(), 2);
    let recover = |world: &mut World| {
        let mut progress = mmu::ZapProgress::default();
        let _ = world.kind.recover_huge_pages(&mut world.memory.exclusive(CPU), 2, &mut progress);
        world.check();
    };
    recover(&mut world);
    assert_eq!(world.kind.execute_splits(), 1);
    recover(&mut world);
    assert_eq!(world.kind.execute_splits(), 0);
    at(&mut world, HUGE, What::Write);
    assert_eq!(huge(&world), 1);
    at(&mut world, HUGE, What::Fetch);
    assert_eq!((huge(&world), world.kind.execute_splits()), (0, 1));
    world.finish();
}

/// Recovery leaves the small pages of a logged slot alone: they would have to be made again at once.
#[test]
fn b6_recovery_spares_logged_slots() {
    let mut world = world(BASE);
    forbid(&mut world, true);
    at(&mut world, HUGE, What::Fetch);
    assert_eq!(world.kind.execute_splits(), 1);
    let start = mmu::Gfn::default();
    let mut guard = world.memory.exclusive(CPU);
    let _ = guard.start_dirty_log(start, mmu::LogBy::WriteProtection).unwrap();
    let mut progress = mmu::ZapProgress::default();
    while !progress.is_done() {
        let _ = world.kind.recover_huge_pages(&mut guard, 1, &mut progress);
    }
    drop(guard);
    assert_eq!(world.kind.execute_splits(), 1);
}

/// An unpaged guest's memory is one run of direct pages: the rule holds there, too.
#[test]
fn b6_unpaged_guests_have_no_executable_huge_page() {
    let mut world = world(Machine { pg: false, lma: false, ..BASE });
    forbid(&mut world, true);
    at(&mut world, HUGE, What::Write);
    assert_eq!(huge(&world), 1);
    at(&mut world, HUGE + 0x5008, What::Fetch);
    at(&mut world, HUGE, What::Write);
    assert_eq!((huge(&world), world.kind.execute_splits()), (0, 1));
    world.finish();
}

/// B7, D4: a table in a block makes it small, and when the table is none any more the block can be huge again.
#[test]
fn d4_a_block_is_huge_again_when_no_table_is_left_in_it() {
    let mut world = world(BASE);
    at(&mut world, HUGE, What::Write);
    assert_eq!(huge(&world), 1);
    // A directory at the end of the block.
    world.ram().set(0x3f_f000, 0x4067);
    world.guest_store(0, 0x2008, 0x3f_f067);
    world.addresses.push(0x4000_0008);
    world.flush(0);
    world.access(0, 0x4000_0008, What::Read, Who::User);
    assert_eq!(huge(&world), 0);
    at(&mut world, HUGE, What::Write);
    assert_eq!(huge(&world), 0);
    collapse(&mut world);
    at(&mut world, HUGE, What::Read);
    assert_eq!(huge(&world), 0, "not yet");
    world.guest_store(0, 0x2008, 0);
    world.zap_range(GfnRange::of(Gfn::new_truncate(0x3ff)));
    collapse(&mut world);
    at(&mut world, HUGE, What::Read);
    assert_eq!(huge(&world), 1);
    world.finish();
}

/// The same, with small pages that the end of tracking leaves behind.
#[test]
fn collapse_drops_small_pages_that_nothing_needs() {
    let mut world = world(BASE);
    let gfn = Gfn::new_truncate(0x3ff);
    let range = world.memory.exclusive(CPU).track_writes(gfn).unwrap();
    let _ = world.kind.track_range(&mut world.memory.exclusive(CPU), range);
    at(&mut world, HUGE, What::Write);
    assert_eq!(
        (huge(&world), world.access(0, HUGE + 0x1f_f000, What::Write, Who::User)),
        (0, Ended::Emulated(0x3f_f000))
    );
    let _ = world.memory.exclusive(CPU).untrack_writes(gfn).unwrap();
    collapse(&mut world);
    at(&mut world, HUGE + 0x1f_f000, What::Write);
    assert_eq!(huge(&world), 1);
    world.finish();
}

/// d28c6cfbbc5e, 5fd5387c89ec, kut `corrupt_hugepage_trigger` (e09e90a5): entries of one frame with different rights have
/// different small pages, whatever order they are used in.
#[test]
fn commit_e09e90a5_small_pages_for_a_huge_one_have_its_rights() {
    for order in [[HUGE, READ_ONLY, CLEAN], [READ_ONLY, CLEAN, HUGE], [CLEAN, HUGE, READ_ONLY]] {
        let mut world = world(BASE);
        let gfn = Gfn::new_truncate(0x3ff);
        let range = world.memory.exclusive(CPU).track_writes(gfn).unwrap();
        let _ = world.kind.track_range(&mut world.memory.exclusive(CPU), range);
        for round in 0..2 {
            for va in order {
                at(&mut world, va + 0x5008, What::Read);
                at(&mut world, va, What::Fetch);
                if va == READ_ONLY {
                    let ended = world.access(0, va + 0x5008, What::Write, Who::User);
                    assert_eq!(ended, Ended::Fault(7), "{round}");
                } else {
                    at(&mut world, va + 0x5008, What::Write);
                }
            }
        }
        assert_eq!(huge(&world), 0);
        world.finish();
    }
}

/// kut `check_large_pte_dirty_for_nowp`: without CR0.WP a supervisor's write to a read-only huge page sets D of that entry, and
/// of no other; a later user's write still faults.
#[test]
fn commit_5fd5387c89ec_large_entries_get_dirty_without_wp() {
    let mut world = world(Machine { wp: false, ..BASE });
    world.store(0x3010, HUGE | 0xa5);
    world.store(0x3018, HUGE | 0xa5);
    world.flush(0);
    world.flush(1);
    for va in [READ_ONLY, CLEAN] {
        at(&mut world, va, What::Read);
    }
    assert_eq!(world.access(0, READ_ONLY, What::Write, Who::Supervisor), Ended::At(HUGE));
    assert_eq!(world.ram().get(0x3010), Some(HUGE | 0xe5));
    assert_eq!(world.ram().get(0x3018), Some(HUGE | 0xa5));
    assert_eq!(world.access(0, CLEAN, What::Write, Who::Supervisor), Ended::At(HUGE));
    assert_eq!(world.ram().get(0x3018), Some(HUGE | 0xe5));
    for va in [READ_ONLY, CLEAN] {
        assert_eq!(world.access(0, va, What::Write, Who::User), Ended::Fault(7));
        at(&mut world, va, What::Read);
    }
    world.finish();
}

/// Small quotas and huge pages that come and go.
#[test]
fn d7_direct_pages_are_recycled() {
    let mut world = World::new(BASE, 9, addresses(), guest);
    forbid(&mut world, true);
    for _ in 0..3 {
        for va in [HUGE, READ_ONLY, CLEAN] {
            for what in [What::Fetch, What::Read] {
                at(&mut world, va, what);
            }
        }
        for page in 0..64u64 {
            world.access(1, page << 12 | 8, What::Read, Who::User);
        }
    }
    world.finish();
}
