//! What a shadow puts off, or does by a short way, and still does: flushes of other TLBs after a guest's own, CR0.WP, entries
//! that differ by W alone.
mod support;

use mmu::{CpuRole, Gpa, Gva, PagingContext, ShadowFault, Tags};
use support::flat::FlatRam;
use support::manual::guest::{access, registers, regs, BASE};
use support::manual::{Machine, What, Who};
use support::shadow::{Ended, How, World, CPU};

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
    let mut world = World::with(BASE, 64, addresses, Tags::One, guest);
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
