//! The shadow kind's notes about device memory, case by case.
mod support;

use mmu::{CpuRole, Gfn, GfnRange, Gpa, Gva, PagingContext, ShadowFault, Slot, SlotFlags};
use support::flat::FlatRam;
use support::manual::guest::{access, registers, regs, BASE};
use support::manual::{Machine, What, Who};
use support::shadow::{sweep, Ended, World, CPU, PAGES};

/// The first page of device memory, and where the guest has it: a supervisor's page, a read-only one, a user's, and a huge one.
const DEVICE: u64 = 0x100_0000;
const SUPERVISOR: u64 = 0x3_0000;
const READ_ONLY: u64 = 0x3_1000;
const USER: u64 = 0x3_2000;
const HUGE: u64 = 0x20_0000;

fn guest(ram: &FlatRam) {
    ram.set(0x1000, 0x2067);
    ram.set(0x2000, 0x3067);
    ram.set(0x3000, 0x4067);
    ram.set(0x3008, DEVICE | 0xe3);
    for page in 0..64 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
    }
    ram.set(0x4000 + 0x30 * 8, DEVICE | 0x63);
    ram.set(0x4000 + 0x31 * 8, DEVICE | 0x1000 | 0x61);
    ram.set(0x4000 + 0x32 * 8, DEVICE | 0x2000 | 0x67);
}

fn addresses() -> Vec<u64> {
    let low = (0..64).map(|page| page << 12 | 8);
    low.chain([SUPERVISOR, READ_ONLY, USER, HUGE, HUGE + 0x5678]).collect()
}

fn world(m: Machine) -> World {
    let mut world = World::new(m, 64, addresses(), guest);
    world.kind.cache_mmio(&world.memory.exclusive(CPU));
    world
}

fn role(m: &Machine) -> CpuRole {
    let (paging, cpu) = registers(m);
    CpuRole::new(&paging, &cpu)
}

/// What is known from the entry alone, as the exit of the malformed entry asks.
fn known(world: &World, va: u64, what: What, who: Who) -> Option<u64> {
    let vcpu = &world.vcpus[0];
    let guard = world.memory.exclusive(CPU);
    let found = world.kind.mmio_at(&guard, vcpu.root, &role(&vcpu.m), Gva::new(va), access(what, who));
    found.map(Gpa::bits)
}

/// An access of the first vCPU: its fault, whatever the shadow says.
fn fault(world: &mut World, va: u64, what: What, who: Who) -> ShadowFault {
    let m = world.vcpus[0].m;
    let context = PagingContext::<Gva, Gpa>::new(role(&m));
    for _ in 0..8 {
        world.tables.fill(&mut world.cache);
        let walk =
            context.walk(&world.memory.shared(CPU), &regs(&m), Gva::new(va), access(what, who)).unwrap();
        let root = world.vcpus[0].root;
        let mut guard = world.memory.exclusive(CPU);
        let cache = &mut world.cache;
        let done = world.kind.fault(&mut guard, cache, root, &walk, Gva::new(va), access(what, who));
        drop(guard);
        if !matches!(done.outcome, ShadowFault::Retry | ShadowFault::NeedTables) {
            return done.outcome;
        }
    }
    panic!("A4");
}

fn device(gpa: u64) -> ShadowFault {
    ShadowFault::Mmio(Gpa::new_truncate(gpa))
}

fn insert(world: &World, gfn: u64, pages: u64, flags: SlotFlags) {
    let range = GfnRange::new(Gfn::new_truncate(gfn), pages).unwrap();
    world.memory.exclusive(CPU).insert_slot(&Slot::new(range, flags, 512 * 512)).unwrap();
}

/// I1: the second access is known from its entry, which the processor takes for malformed.
#[test]
fn i1_the_second_access_is_known_from_its_entry() {
    let mut world = world(BASE);
    for va in [SUPERVISOR | 0x123, HUGE | 0x5678] {
        let at = DEVICE | va & if va < HUGE { 0xfff } else { 0x1f_ffff };
        assert_eq!(known(&world, va, What::Read, Who::Supervisor), None);
        assert_eq!(fault(&mut world, va, What::Read, Who::Supervisor), device(at));
        for what in [What::Read, What::Write] {
            assert_eq!(known(&world, va, what, Who::Supervisor), Some(at), "{what:?}");
        }
        assert_eq!(known(&world, va, What::Fetch, Who::Supervisor), None, "a fetch is no device's matter");
        let (_, _, entry) = world.leaf(0, va).unwrap();
        assert!(entry & 1 == 1 && entry >> 51 & 1 == 1, "present, with a reserved bit");
        assert_eq!(world.kind.check(&world.memory.exclusive(CPU)).unwrap().leaves, 0);
    }
    let notes = world.kind.check(&world.memory.exclusive(CPU)).unwrap().notes;
    assert_eq!(notes, 2);
    assert_eq!(world.memory.shootdown().requested(), mmu::Generation::default(), "none is in a TLB");
    world.finish();
}

/// The guest's own rights are in the note, and where they are not all that counts there is no answer.
#[test]
fn i1_a_note_answers_only_what_the_guests_tables_permit() {
    let supervisor = |m, va, what| {
        let mut world = world(m);
        fault(&mut world, va, What::Read, Who::Supervisor);
        let found = known(&world, va, what, Who::Supervisor).is_some();
        assert_eq!(known(&world, va, what, Who::User), None, "the guest's page fault");
        world.finish();
        found
    };
    assert!(supervisor(BASE, SUPERVISOR, What::Write));
    assert!(supervisor(BASE, READ_ONLY, What::Read));
    assert!(!supervisor(BASE, READ_ONLY, What::Write));
    assert!(!supervisor(Machine { pks: true, ..BASE }, SUPERVISOR, What::Read), "protection keys");
    assert!(supervisor(Machine { pke: true, ..BASE }, SUPERVISOR, What::Read), "not a user's page");
    let user = |m, what| {
        let mut world = world(m);
        assert_eq!(fault(&mut world, USER, What::Read, Who::User), device(DEVICE | 0x2000));
        let by_supervisor = known(&world, USER, what, Who::Supervisor);
        assert_eq!(by_supervisor, None, "RFLAGS.AC has a say");
        let found = known(&world, USER, what, Who::User).is_some();
        world.finish();
        found
    };
    assert!(user(BASE, What::Write));
    assert!(!user(Machine { pke: true, ..BASE }, What::Read), "protection keys");
}

/// F4: a clean entry's note permits no write, so that the first one sets D.
#[test]
fn f4_a_clean_entry_has_a_note_for_reads_alone() {
    let mut world = world(BASE);
    world.store(0x4000 + 0x30 * 8, DEVICE | 3);
    fault(&mut world, SUPERVISOR, What::Read, Who::Supervisor);
    assert!(known(&world, SUPERVISOR, What::Read, Who::Supervisor).is_some());
    assert_eq!(known(&world, SUPERVISOR, What::Write, Who::Supervisor), None);
    fault(&mut world, SUPERVISOR, What::Write, Who::Supervisor);
    assert!(known(&world, SUPERVISOR, What::Write, Who::Supervisor).is_some());
    assert_eq!(world.ram().get(0x4000 + 0x30 * 8), Some(DEVICE | 0x63));
    world.finish();
}

/// I1, I2: a note of another generation of the slots counts for nothing, and RAM takes its place.
#[test]
fn i2_a_note_ends_with_its_generation() {
    let mut world = world(BASE);
    fault(&mut world, SUPERVISOR, What::Read, Who::Supervisor);
    assert!(known(&world, SUPERVISOR, What::Read, Who::Supervisor).is_some());
    insert(&world, DEVICE >> 12, 1, SlotFlags::empty());
    assert_eq!(known(&world, SUPERVISOR, What::Read, Who::Supervisor), None);
    assert_eq!(fault(&mut world, SUPERVISOR, What::Read, Who::Supervisor), ShadowFault::Mapped);
    world.check();
    let entry = world.leaf(0, SUPERVISOR).unwrap().2;
    assert_eq!(entry & 0x000f_ffff_ffff_f000, (DEVICE >> 12 | 1 << 20) << 12);
    assert_eq!(known(&world, READ_ONLY, What::Read, Who::Supervisor), None);
    world.finish();
}

/// CVE-2026-23401, I3: a slot is removed and its page becomes device memory while a leaf for it is there: the note takes the
/// place of the leaf together with its record in the reverse map.
#[test]
fn cve_2026_23401_a_note_never_takes_the_place_of_a_leaf_with_a_record() {
    let mut world = world(BASE);
    insert(&world, DEVICE >> 12, 1, SlotFlags::empty());
    assert_eq!(fault(&mut world, SUPERVISOR, What::Write, Who::Supervisor), ShadowFault::Mapped);
    let leaves = world.kind.page_counts().leaves[0];
    let range = world.memory.exclusive(CPU).remove_slot(Gfn::new_truncate(DEVICE >> 12)).unwrap().range();
    // The fault is faster than the zap.
    let before = world.memory.shootdown().requested();
    assert_eq!(fault(&mut world, SUPERVISOR, What::Write, Who::Supervisor), device(DEVICE));
    assert!(world.memory.shootdown().requested() > before, "the leaf may be in a TLB");
    assert_eq!(world.kind.page_counts().leaves[0], leaves - 1);
    world.check();
    world.zap_range(range);
    world.check();
    assert_eq!(known(&world, SUPERVISOR, What::Write, Who::Supervisor), Some(DEVICE));
    world.finish();
}

/// A note is brought up to date where a leaf would be: by INVLPG and by the flush of a lowest table that is unsync.
#[test]
fn i1_a_note_of_an_unsync_table_is_synced() {
    let mut world = world(BASE);
    fault(&mut world, SUPERVISOR, What::Read, Who::Supervisor);
    let at = 0x4000 + 0x30 * 8;
    let store = |world: &mut World, entry| {
        let ended = world.guest_store(0, at, entry);
        assert_eq!(ended, Ended::At(at));
        world.invlpg(0, SUPERVISOR);
        world.carry_out(0);
    };
    store(&mut world, DEVICE | 0x61);
    assert!(known(&world, SUPERVISOR, What::Read, Who::Supervisor).is_some());
    assert_eq!(known(&world, SUPERVISOR, What::Write, Who::Supervisor), None, "read-only now");
    store(&mut world, DEVICE | 0x5000 | 0x63);
    assert_eq!(known(&world, SUPERVISOR, What::Read, Who::Supervisor), None, "another frame");
    fault(&mut world, SUPERVISOR, What::Read, Who::Supervisor);
    store(&mut world, 0);
    assert_eq!(known(&world, SUPERVISOR, What::Read, Who::Supervisor), None, "not present");
    // Emulated writes are followed at once.
    world.emulate(at, 8, DEVICE | 0x63);
    fault(&mut world, SUPERVISOR, What::Read, Who::Supervisor);
    world.emulate(at, 8, DEVICE | 0x5000 | 0x63);
    assert_eq!(known(&world, SUPERVISOR, What::Read, Who::Supervisor), None);
    world.finish();
}

/// I1: when the number of the generation comes again, the notes of its first time are not honoured, nor any until the kind was
/// swept; a sweep leaves none.
#[test]
fn i1_notes_do_not_survive_a_wrap_of_the_generation() {
    let mut world = world(BASE);
    fault(&mut world, SUPERVISOR, What::Read, Who::Supervisor);
    assert!(known(&world, SUPERVISOR, What::Read, Who::Supervisor).is_some());
    {
        let mut guard = world.memory.exclusive(CPU);
        let range = GfnRange::new(Gfn::new_truncate(1 << 20), 1).unwrap();
        for _ in 0..1 << 18 {
            guard.insert_slot(&Slot::new(range, SlotFlags::empty(), 0)).unwrap();
            let _ = guard.remove_slot(Gfn::new_truncate(1 << 20)).unwrap();
        }
    }
    assert_eq!(known(&world, SUPERVISOR, What::Read, Who::Supervisor), None);
    assert!(!world.kind.caches_mmio(world.memory));
    fault(&mut world, READ_ONLY, What::Read, Who::Supervisor);
    assert_eq!(known(&world, READ_ONLY, What::Read, Who::Supervisor), None, "none is made");
    sweep(|progress| world.kind.forget_mmio(&world.memory.exclusive(CPU), progress));
    assert_eq!(world.kind.check(&world.memory.exclusive(CPU)).unwrap().notes, 0);
    world.kind.cache_mmio(&world.memory.exclusive(CPU));
    fault(&mut world, SUPERVISOR, What::Read, Who::Supervisor);
    assert!(known(&world, SUPERVISOR, What::Read, Who::Supervisor).is_some());
    world.kind.stop_caching_mmio();
    assert_eq!(known(&world, SUPERVISOR, What::Read, Who::Supervisor), None);
    world.finish();
}

/// A page that leads to RAM has no note, and an obsolete root has none that counts.
#[test]
fn i4_notes_are_of_a_root_that_is_current() {
    let mut world = world(BASE);
    fault(&mut world, SUPERVISOR, What::Read, Who::Supervisor);
    assert_eq!(fault(&mut world, 0x2_0008, What::Read, Who::User), ShadowFault::Mapped);
    assert_eq!(known(&world, 0x2_0008, What::Read, Who::User), None);
    let _ = world.kind.invalidate_all(&mut world.memory.exclusive(CPU));
    assert_eq!(known(&world, SUPERVISOR, What::Read, Who::Supervisor), None);
    let all = GfnRange::new(Gfn::default(), PAGES).unwrap();
    world.zap_range(all);
    world.finish();
}

/// Unpaged guests have device memory, too, below direct pages.
#[test]
fn i1_unpaged_guests_have_notes() {
    let mut world = world(Machine { pg: false, lma: false, ..BASE });
    let va = DEVICE | 0x44;
    assert_eq!(fault(&mut world, va, What::Write, Who::Supervisor), device(va));
    for who in [Who::Supervisor, Who::User] {
        assert_eq!(known(&world, va, What::Write, who), Some(va));
    }
    world.finish();
}
