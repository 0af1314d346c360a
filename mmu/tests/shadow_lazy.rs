//! What a shadow puts off, or does by a short way, and still does: flushes of other TLBs after a guest's own, CR0.WP, entries
//! that differ by W alone.
mod support;

use std::cell::Cell;

use mmu::{
    CpuId, CpuRole, Cr0, Cr4, Gfn, GfnRange, Gpa, Gva, Invpcid, Issued, LogBy, Mmu, NearFault, PagingContext,
    PagingRegs, ShadowFault, Tags,
};
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

/// Four levels, of which the lowest table maps 64 pages one to one, and others, whose lowest table maps one page.
fn guest(ram: &FlatRam) {
    let links = [
        (0x1000, 0x2067),
        (0x2000, 0x3067),
        (0x3000, 0x4067),
        (0x6000, 0x7067),
        (0x7000, 0x8067),
        (0x8000, 0x5067),
    ];
    for (at, entry) in links {
        ram.set(at, entry);
    }
    ram.set(0x5000 + (VA >> 12) * 8, OTHER & !0xfff | 0x67);
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
        world.tries = before;
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
    const BELOW: u64 = 0x20_0000 | VA;
    let addresses = vec![VA, BELOW, entry_of(VA)];
    let mut world = World::new(BASE, 64, addresses, |ram| {
        guest(ram);
        ram.set(0x3008, 0x4065);
    });
    assert_eq!(world.access(0, BELOW, What::Read, Who::User), Ended::At(VA));
    for _ in 0..6 {
        for flags in [0x65, 0x67] {
            world.guest_store(0, entry_of(VA), VA & !0xfff | flags);
            world.invlpg(0, BELOW);
            world.carry_out(0);
        }
        assert!(!writable(&world, BELOW));
        assert_eq!(write(&mut world, BELOW), Ended::Fault(7));
        assert_eq!(write(&mut world, VA), Ended::At(VA));
    }
    world.finish();
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
            world.carry_out(1);
        },
        |world| world.invlpg(0, OTHER),
        |world| world.mov_to_cr4(0, Machine { wp: false, ..BASE }, 1 << 7),
        |world| world.invpcid(0, Invpcid::All),
    ];
    let by_supervisor = |world: &mut World, vcpu| world.access(vcpu, VA, What::Write, Who::Supervisor);
    for way in ways {
        each_way(|world| {
            // The first of these is tried, or the first two, or (by zero each time) all.
            let tries = world.tries;
            let step = |world: &mut World, act: &dyn Fn(&mut World)| {
                if tries == 0 {
                    world.tries = 0;
                }
                act(world);
                world.carry_out(0);
            };
            world.mov_to_cr0(1, true, false, true);
            rewrite(world, VA, 0x65);
            step(world, &|world| world.mov_to_cr0(0, true, false, true));
            assert_eq!(by_supervisor(world, 0), Ended::At(VA));
            // For nothing, until that is no longer switched for.
            for _ in 0..40 {
                step(world, &|world| world.mov_to_cr0(0, true, true, true));
                step(world, &|world| world.mov_to_cr0(0, true, false, true));
            }
            step(world, &way);
            // What only WP clear permits is in the shadow.
            assert_eq!(by_supervisor(world, 1), Ended::At(VA));
            step(world, &|world| world.mov_to_cr0(0, true, true, true));
            assert_eq!(by_supervisor(world, 0), Ended::Fault(3));
            step(world, &|world| world.mov_to_cr0(0, true, false, true));
            assert_eq!(by_supervisor(world, 0), Ended::At(VA));
            assert_eq!(world.access(0, VA, What::Write, Who::User), Ended::Fault(7));
            step(world, &|world| world.mov_to_cr0(0, true, true, true));
            assert_eq!(by_supervisor(world, 0), Ended::Fault(3));
        });
    }
}

/// CR0.WP is cleared for nothing after it was needed: sixteen times with a switch of roots, then without.
#[test]
fn cr0_wp_cleared_for_nothing_long_enough_switches_no_root_again() {
    let mut world = world();
    rewrite(&mut world, VA, 0x65);
    let wp = |world: &mut World, on| {
        world.tries = 0;
        world.mov_to_cr0(0, true, on, true);
        world.carry_out(0);
        world.vcpus[0].mmu.root()
    };
    let first = world.vcpus[0].mmu.root();
    assert_eq!(wp(&mut world, false), first);
    assert_eq!(world.access(0, VA, What::Write, Who::Supervisor), Ended::At(VA));
    assert_eq!(wp(&mut world, true), first);
    let switched: Vec<bool> = (0..20)
        .map(|_| {
            let switched = wp(&mut world, false) != first;
            assert_eq!(wp(&mut world, true), first);
            switched
        })
        .collect();
    assert_eq!(switched, [vec![true; 16], vec![false; 4]].concat());
    world.finish();
}

/// CR0.WP and CR4.PGE go the short way only on a root that is there, in a guest whose registers alone decide on it.
#[test]
fn cr0_wp_and_cr4_pge_are_left_to_others_without_a_root() {
    let mut world = world();
    world.tables.fill(&mut world.cache);
    let World { kind, cache, vcpus, memory, .. } = &mut world;
    let (mmu, mut guard) = (&mut vcpus[0].mmu, memory.exclusive(CPU));
    let PagingRegs { cr0, cr4, .. } = mmu.state().regs;
    let refuses = |mmu: &mut Mmu, kind: &mut _, guard: &mut _| {
        !mmu.mov_to_cr0_wp(cr0.difference(Cr0::WP))
            && mmu.mov_to_seen_cr4(kind, guard, cr4 ^ Cr4::PGE).is_none()
    };
    let _ = mmu.set_context(1);
    let _ = mmu.carry_out(kind, &mut guard, cache);
    assert!(!mmu.has_work() && refuses(mmu, kind, &mut guard));
    let _ = mmu.set_context(0);
    assert!(!mmu.has_work() && !refuses(mmu, kind, &mut guard));
    let _ = mmu.unload(kind, &mut guard);
    assert!(mmu.has_work() && refuses(mmu, kind, &mut guard));
    drop(guard);
    world.finish();
}

/// C5: CR4.PGE takes everything: what the TLB has, and what other roots have. (No right but W is flushed from all TLBs when it
/// goes.)
#[test]
fn c5_cr4_pge_takes_all_translations_of_every_root() {
    const NX: u64 = 1 << 63;
    const OTHERS: u64 = 0x5000 + (VA >> 12) * 8;
    each_way(|world| {
        let fetch = |world: &mut World, va| world.access_as(0, va, What::Fetch, Who::User, CACHING);
        world.mov_to_cr4(0, BASE, 1 << 17);
        world.mov_to_cr3(0, 0x6001, false);
        assert_eq!(fetch(world, VA), Ended::At(OTHER));
        world.mov_to_cr3(0, 0x1000, false);
        for pge in [1 << 7, 0] {
            for (entry, to) in [(OTHERS, OTHER), (entry_of(THIRD), THIRD)] {
                assert_eq!(world.guest_store(0, entry, to & !0xfff | 0x67), Ended::At(entry));
            }
            world.invlpg(0, THIRD);
            assert_eq!(fetch(world, THIRD), Ended::At(THIRD));
            world.mov_to_cr3(0, 0x6001, true);
            assert_eq!(fetch(world, VA), Ended::At(OTHER));
            assert_eq!(world.kind.unsync_pages(), 2);
            world.store(entry_of(THIRD), NX | THIRD & !0xfff | 0x67);
            world.store(OTHERS, NX | OTHER & !0xfff | 0x67);
            world.mov_to_cr4(0, world.vcpus[0].m, 1 << 17 | pge);
            assert_eq!(world.vcpus[0].mmu.state().regs.cr4.contains(Cr4::PGE), pge != 0);
            assert_eq!(fetch(world, VA), Ended::Fault(0x15));
            world.mov_to_cr3(0, 0x1000, true);
            assert_eq!(fetch(world, THIRD), Ended::Fault(0x15));
        }
    });
}

/// Another CPU that runs a guest with whatever it has in its TLB.
fn elsewhere(world: &World) -> Mmu {
    let (paging, cpu) = registers(&BASE);
    Mmu::new(CpuRole::new(&paging, &cpu), world.vcpus[1].root)
}

/// C2: while another CPU may still write to what is protected, no fault maps anything: neither by a walk nor near the last one.
#[test]
fn c2_no_fault_maps_anything_while_a_protection_is_not_everywhere() {
    let mut world = world();
    let m = world.vcpus[0].m;
    let (paging, cpu) = registers(&m);
    let context = PagingContext::<Gva, Gpa>::new(CpuRole::new(&paging, &cpu));
    let user = access(What::Read, Who::User);
    assert_eq!(write(&mut world, OTHER), Ended::At(OTHER));
    assert_eq!(write(&mut world, THIRD), Ended::At(THIRD));
    let walk = context.walk(&world.memory.shared(CPU), &regs(&m), Gva::new(VA), user).unwrap();
    world.carry_out(0);
    let mut other = elsewhere(&world);
    let entered = other.enter(world.memory, CpuId::new(2).unwrap());
    let range = GfnRange::of(Gfn::new_truncate(OTHER >> 12));
    sweep(|progress| {
        let _ = world.kind.write_protect(&mut world.memory.exclusive(CPU), range, progress);
    });
    world.tables.fill(&mut world.cache);
    let World { kind, cache, vcpus, memory, .. } = &mut world;
    let (mmu, mut guard) = (&mut vcpus[0].mmu, memory.exclusive(CPU));
    assert_eq!(mmu.fault_near(kind, &mut guard, &context, &regs(&m), Gva::new(VA), user), None);
    assert_eq!(mmu.fault(kind, &mut guard, cache, &walk, Gva::new(VA), user).outcome, ShadowFault::Wait);
    drop(entered);
    let near = mmu.fault_near(kind, &mut guard, &context, &regs(&m), Gva::new(VA), user);
    assert_eq!(near, Some(NearFault::Mapped));
    drop(guard);
    world.finish();
}

/// C1, C2: what a guest's own flush has taken away is owed to other CPUs. Whatever the host relies on names them.
#[test]
fn c2_what_a_guests_own_flush_took_is_flushed_when_the_host_relies_on_it() {
    let page = GfnRange::of(Gfn::new_truncate(VA >> 12));
    type Step = fn(&mut World, GfnRange) -> Option<Issued>;
    let steps: [Step; 5] = [
        |world, page| world.kind.zap(&mut world.memory.exclusive(CPU), page, &mut Default::default()).issued,
        |world, page| {
            world.kind.write_protect(&mut world.memory.exclusive(CPU), page, &mut Default::default()).issued
        },
        |world, page| {
            world.kind.collect_dirty(&mut world.memory.exclusive(CPU), page, &mut Default::default()).issued
        },
        |world, page| {
            let mut guard = world.memory.exclusive(CPU);
            let sweep = guard.track_writes(Gfn::new_truncate(page.start())).unwrap();
            world.kind.track_range(&mut guard, sweep).issued
        },
        |world, page| {
            let mut guard = world.memory.exclusive(CPU);
            world.kind.rearm_pages(&mut guard, Gfn::new_truncate(page.start()), 1).issued
        },
    ];
    for step in steps {
        let mut world = world();
        assert_eq!(write(&mut world, VA), Ended::At(VA));
        let mut other = elsewhere(&world);
        let on = CpuId::new(2).unwrap();
        let entered = other.enter(world.memory, on);
        let before = world.memory.shootdown().requested();
        world.tries = 0;
        world.store(entry_of(VA), 0);
        world.invlpg(0, VA);
        assert_eq!(world.memory.shootdown().requested(), before, "nobody is kicked yet");
        assert!(step(&mut world, page).is_some_and(|issued| issued.kick.contains(on)));
        drop(entered);
        world.finish();
    }
}

/// C2: a table that the guest could write to until it took the right away itself, by INVLPG, is not in sync before other CPUs
/// have flushed that, too.
#[test]
fn c2_a_table_is_in_sync_only_when_what_is_owed_is_flushed() {
    let mut world = world();
    let table = entry_of(VA);
    assert_eq!(world.guest_store(0, table, VA & !0xfff | 0x67), Ended::At(table));
    let mut other = elsewhere(&world);
    let entered = other.enter(world.memory, CpuId::new(2).unwrap());
    rewrite(&mut world, table, 0x65);
    world.flush(0);
    assert_eq!(world.kind.unsync_pages(), 1, "it may still be written to");
    drop(entered);
    world.flush(0);
    assert_eq!(world.kind.unsync_pages(), 0);
    world.finish();
}

/// C2: a page becomes a table. What could write to it until the guest's own INVLPG is flushed before the table is read.
#[test]
fn c2_a_page_becomes_a_table_only_when_what_is_owed_is_flushed() {
    const BELOW: u64 = 0x40_0000 | VA;
    let mut world = world();
    world.emulate(0x3010, 8, OTHER & !0xfff | 0x67);
    assert_eq!(write(&mut world, OTHER), Ended::At(OTHER));
    world.store((OTHER & !0xfff) + (VA >> 12) * 8, THIRD & !0xfff | 0x67);
    let m = world.vcpus[0].m;
    let (paging, cpu) = registers(&m);
    let context = PagingContext::<Gva, Gpa>::new(CpuRole::new(&paging, &cpu));
    let user = access(What::Read, Who::User);
    let walk = context.walk(&world.memory.shared(CPU), &regs(&m), Gva::new(BELOW), user).unwrap();
    let mut other = elsewhere(&world);
    let entered = other.enter(world.memory, CpuId::new(2).unwrap());
    world.tries = 0;
    rewrite(&mut world, OTHER, 0);
    world.tables.fill(&mut world.cache);
    let World { kind, cache, vcpus, memory, .. } = &mut world;
    let mut guard = memory.exclusive(CPU);
    let mut fault = || vcpus[0].mmu.fault(kind, &mut guard, cache, &walk, Gva::new(BELOW), user).outcome;
    assert_eq!(fault(), ShadowFault::Wait);
    assert_eq!(fault(), ShadowFault::Wait);
    drop(entered);
    assert_eq!(fault(), ShadowFault::Mapped);
    drop(guard);
    world.finish();
}

/// A table in a read-only slot is not marked, near the last fault as little as by a walk.
#[test]
fn a_table_in_a_read_only_slot_is_not_marked() {
    const ENTRY: u64 = 0x1_4000 + 0x30 * 8;
    for before in 0..3 {
        let mut world = World::with(BASE, 64, vec![OTHER, THIRD], Tags::One, |ram| {
            guest(ram);
            ram.set(0x3000, 0x1_4067);
            ram.set(0x1_4000 + 0x20 * 8, OTHER & !0xfff | 0x67);
            ram.set(ENTRY, THIRD & !0xfff | 7);
        });
        world.change_slot(Some(true));
        assert_eq!(world.access(0, OTHER, What::Read, Who::User), Ended::At(OTHER));
        world.tries = before;
        assert_eq!(world.access(0, THIRD, What::Read, Who::User), Ended::At(THIRD));
        assert_eq!(world.ram().get(ENTRY), Some(THIRD & !0xfff | 7));
        world.finish();
    }
}
