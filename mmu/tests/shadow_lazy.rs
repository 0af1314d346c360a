//! What a shadow puts off, or does by a short way, and still does: flushes of other TLBs after a guest's own, CR0.WP, entries
//! that differ by W alone.
mod support;

use std::cell::Cell;

use mmu::{CpuRole, Gfn, GfnRange, Gpa, Gva, Invpcid, LogBy, PagingContext, ShadowFault};
use support::flat::FlatRam;
use support::manual::guest::{access, registers, regs, BASE};
use support::manual::{Machine, What, Who};
use support::shadow::{sweep, Ended, How, World, CPU};

/// Pages that [`guest`] maps, and the entry of one.
const VA: u64 = 0x1_0008;
const OTHER: u64 = 0x2_0008;
const THIRD: u64 = 0x3_0008;
const CACHING: How = How { hit: true, resume: true, keep: true, ahead: None };

const fn entry_of(va: u64) -> u64 {
    0x4000 + (va >> 12) * 8
}

/// Four levels, of which the lowest table maps 64 pages one to one.
fn guest(ram: &FlatRam) {
    ram.set(0x1000, 0x2067);
    ram.set(0x2000, 0x3067);
    ram.set(0x3000, 0x4067);
    for page in 0..64 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
    }
}

fn world() -> World {
    let addresses = (0..64).map(|page| page << 12 | 8).chain([entry_of(VA)]).collect();
    let mut world = World::new(BASE, 64, addresses, guest);
    // The lowest table is written without exits.
    world.guest_store(0, entry_of(VA), VA & !0xfff | 0x67);
    assert_eq!(world.kind.unsync_pages(), 1);
    world
}

/// A4: a vCPU that maps a page and flushes it, over and over, keeps no fault of another one from coming to an end.
#[test]
fn a4_a_guest_that_flushes_all_the_time_holds_up_no_fault_of_another_vcpu() {
    let mut world = world();
    let m = world.vcpus[0].m;
    let (paging, cpu) = registers(&m);
    let context = PagingContext::<Gva, Gpa>::new(CpuRole::new(&paging, &cpu));
    let user = access(What::Read, Who::User);
    let walk = context.walk(&world.memory.shared(CPU), &regs(&m), Gva::new(VA), user).unwrap();
    let outcomes = [(); 4].map(|()| {
        world.store(entry_of(OTHER), OTHER & !0xfff | 0x67);
        assert_eq!(world.access(1, OTHER, What::Write, Who::User), Ended::At(OTHER));
        world.store(entry_of(OTHER), 0);
        world.invlpg(1, OTHER);
        // It is in the guest meanwhile.
        assert_eq!(world.access_as(1, THIRD, What::Read, Who::User, CACHING), Ended::At(THIRD));
        world.tables.fill(&mut world.cache);
        let World { kind, cache, vcpus, memory, .. } = &mut world;
        let mut guard = memory.exclusive(CPU);
        let done = vcpus[0].mmu.fault(kind, &mut guard, cache, &walk, Gva::new(VA), user);
        drop(guard);
        world.kick(done.issued);
        done.outcome
    });
    assert!(outcomes.contains(&ShadowFault::Mapped), "{outcomes:?}");
    world.finish();
}

/// With PAE's pointers in registers, MOV to CR4 that changes PGE loads them (Intel SDM vol. 3, 4.4.1).
#[test]
fn c5_mov_to_cr4_of_pge_loads_the_pointers_of_pae() {
    let m = Machine { lma: false, cr3: 0xa000, ..BASE };
    let mut world = World::new(m, 64, vec![VA], |ram| {
        guest(ram);
        for (at, entry) in [(0xa000, 0x3001), (0xb000, 0x5067), (0x5000 + 0x10 * 8, OTHER & !0xfff | 0x67)] {
            ram.set(at, entry);
        }
    });
    assert_eq!(world.access(0, VA, What::Read, Who::User), Ended::At(VA));
    world.store(0xa000, 0xb001);
    assert_eq!(world.access(0, VA, What::Read, Who::User), Ended::At(VA), "they are in registers");
    world.mov_to_cr4(0, m, 1 << 7);
    assert_eq!(world.access(0, VA, What::Read, Who::User), Ended::At(OTHER));
    world.finish();
}

/// Writes the entry for `va` with these flags, and flushes the address.
fn rewrite(world: &mut World, va: u64, flags: u64) {
    assert_eq!(world.kind.unsync_pages(), 1, "nobody has to be told");
    world.store(entry_of(va), va & 0xf_f000 | flags);
    world.invlpg(0, va);
    world.carry_out(0);
}

/// Whether the shadow permits the guest's user to write to `va`.
fn writable(world: &World, va: u64) -> bool {
    world.hardware(0, va, What::Write, Who::User).is_some()
}

fn write(world: &mut World, va: u64) -> Ended {
    world.access(0, va, What::Write, Who::User)
}

/// What is tried before the whole way is so two times of three: calls `test` with a world for each of the three.
fn each_way(test: impl Fn(&mut World)) {
    for before in 0..3 {
        let mut world = world();
        for _ in 0..before {
            world.invlpg(0, THIRD);
            world.carry_out(0);
        }
        test(&mut world);
        world.finish();
    }
}

/// W that the guest gives and takes, with INVLPG after it, is in the leaf at once: no fault brings it.
#[test]
fn invlpg_gives_and_takes_w() {
    let given = Cell::new(0);
    each_way(|world| {
        assert_eq!(write(world, VA), Ended::At(VA));
        rewrite(world, VA, 0x65);
        assert!(!writable(world, VA) && world.hardware(0, VA, What::Read, Who::User).is_some());
        rewrite(world, VA, 0x67);
        given.set(given.get() + usize::from(writable(world, VA)));
        assert_eq!(write(world, VA), Ended::At(VA));
    });
    assert_eq!(given.get(), 2, "two times of three");
}

/// An entry that permits writes and is clean is to be marked by the first one.
#[test]
fn invlpg_gives_no_w_to_a_clean_entry() {
    each_way(|world| {
        rewrite(world, VA, 0x25);
        assert_eq!(world.access(0, VA, What::Read, Who::User), Ended::At(VA));
        for _ in 0..3 {
            rewrite(world, VA, 0x27);
            assert!(!writable(world, VA));
            assert_eq!(write(world, VA), Ended::At(VA));
            assert_eq!(world.ram().get(entry_of(VA)), Some(VA & !0xfff | 0x67), "A5: D");
            // W with D taken away: the next write is to be noticed.
            rewrite(world, VA, 0x27);
            assert!(!writable(world, VA));
            rewrite(world, VA, 0x25);
        }
    });
}

/// C2: nor for a page whose writes are emulated.
#[test]
fn invlpg_gives_no_w_for_a_tracked_page() {
    const DIRECTORY: u64 = 0x3008;
    each_way(|world| {
        assert_eq!(world.access(0, DIRECTORY, What::Read, Who::User), Ended::At(DIRECTORY));
        for _ in 0..3 {
            rewrite(world, DIRECTORY, 0x65);
            rewrite(world, DIRECTORY, 0x67);
            assert!(!writable(world, DIRECTORY));
            assert_eq!(write(world, DIRECTORY), Ended::Emulated(DIRECTORY));
        }
    });
}

/// A3: nor where the directory forbids writes.
#[test]
fn invlpg_gives_no_w_below_a_read_only_directory() {
    each_way(|world| {
        world.emulate(0x3000, 8, 0x4065);
        world.flush(0);
        assert_eq!(world.access(0, VA, What::Read, Who::User), Ended::At(VA));
        world.guest_store(0, entry_of(VA), VA & !0xfff | 0x67);
        for _ in 0..3 {
            rewrite(world, VA, 0x65);
            rewrite(world, VA, 0x67);
            assert!(!writable(world, VA));
            assert_eq!(write(world, VA), Ended::Fault(7));
        }
    });
}

/// A write after INVLPG has given W is in the log.
#[test]
fn invlpg_gives_no_w_that_the_log_does_not_hear_of() {
    for by in [LogBy::WriteProtection, LogBy::DirtyBits] {
        each_way(|world| {
            assert_eq!(write(world, VA), Ended::At(VA));
            rewrite(world, VA, 0x65);
            world.start_log(by);
            world.harvest(by);
            rewrite(world, VA, 0x67);
            world.harvest(by);
            assert_eq!(world.use_page(0, VA, What::Write, Who::User), Ended::At(VA));
            assert!(world.harvest(by).contains(&(VA >> 12)), "{by:?}");
        });
    }
}

/// The host's watch for writes ends: what it had taken comes back, but not to a page that the guest has protected meanwhile.
#[test]
fn a_watched_page_that_the_guest_protects_is_not_watched_any_more() {
    each_way(|world| {
        let range = GfnRange::of(Gfn::new_truncate(VA >> 12));
        assert_eq!(write(world, VA), Ended::At(VA));
        sweep(|progress| {
            let _ = world.kind.write_protect(&mut world.memory.exclusive(CPU), range, progress);
        });
        rewrite(world, VA, 0x65);
        sweep(|progress| {
            let _ = world.kind.write_unprotect(&mut world.memory.exclusive(CPU), range, progress);
        });
        assert!(!writable(world, VA));
        assert_eq!(write(world, VA), Ended::Fault(7));
    });
}

/// C3: while memory is being taken away, INVLPG maps none of it.
#[test]
fn invlpg_maps_nothing_while_memory_goes() {
    each_way(|world| {
        assert_eq!(write(world, VA), Ended::At(VA));
        world.store(entry_of(VA), OTHER & !0xfff | 0x67);
        let range = GfnRange::of(Gfn::new_truncate(OTHER >> 12));
        let going = world.memory.exclusive(CPU).begin_invalidation(range);
        world.zap(range);
        world.invlpg(0, VA);
        world.carry_out(0);
        assert_eq!(world.hardware(0, VA, What::Read, Who::User), None);
        drop(going);
        assert_eq!(write(world, VA), Ended::At(OTHER));
    });
}

/// CR0.WP was cleared, and the root is that for WP set: whatever then selects a root selects one for WP clear, which is left
/// when WP is set.
#[test]
fn cr0_wp_cleared_is_followed_by_whatever_selects_a_root() {
    type Way = fn(&mut World);
    let ways: [Way; 8] = [
        |world| world.mov_to_cr3(0, 0x1000, false),
        |world| world.flush(0),
        |world| world.mov_to_cr4(0, Machine { smep: true, wp: false, ..BASE }, 0),
        |world| world.wrmsr_efer(0, false),
        |world| {
            world.invalidate_all();
            world.carry_out(0);
        },
        |world| world.invlpg(0, OTHER),
        |world| world.mov_to_cr4(0, Machine { wp: false, ..BASE }, 1 << 7),
        |world| world.invpcid(0, Invpcid::All),
    ];
    let by_supervisor = |world: &mut World| world.access(0, VA, What::Write, Who::Supervisor);
    for way in ways {
        each_way(|world| {
            rewrite(world, VA, 0x65);
            world.mov_to_cr0(0, true, false, true);
            assert_eq!(by_supervisor(world), Ended::At(VA));
            // For nothing, until that is no longer switched for.
            for _ in 0..40 {
                world.mov_to_cr0(0, true, true, true);
                world.carry_out(0);
                world.mov_to_cr0(0, true, false, true);
                world.carry_out(0);
            }
            way(world);
            world.carry_out(0);
            world.mov_to_cr0(0, true, true, true);
            assert_eq!(by_supervisor(world), Ended::Fault(3));
            world.mov_to_cr0(0, true, false, true);
            assert_eq!(by_supervisor(world), Ended::At(VA));
            assert_eq!(world.access(0, VA, What::Write, Who::User), Ended::Fault(7));
            world.mov_to_cr0(0, true, true, true);
            assert_eq!(by_supervisor(world), Ended::Fault(3));
        });
    }
}
