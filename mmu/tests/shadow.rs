//! The shadow kind, case by case, against the reference walk.
mod support;

use mmu::{
    Access, AccessKind, CpuId, CpuRole, Gfn, GfnRange, Gpa, Gva, Level, Mmu, NGpa, PagingContext, RootRole,
    ShadowFault, VcpuMode, WalkRegs, ZapProgress,
};
use support::flat::FlatRam;
use support::manual::guest::{access, registers, regs, BASE};
use support::manual::{Machine, What, Who};
use support::shadow::{Ended, World, CPU, PAGES};

const TABLES: u64 = 0x1000;

/// Four levels from 0x1000 on; the first 64 pages mapped one to one, a 2 MiB page after them, and another table at 4
/// MiB.
fn long_mode(ram: &FlatRam) {
    ram.set(TABLES, 0x2000 | 0x67);
    ram.set(0x2000, 0x3000 | 0x67);
    ram.set(0x3000, 0x4000 | 0x67);
    ram.set(0x3008, 0x20_0000 | 0xe7);
    ram.set(0x3010, 0x5000 | 0x67);
    for page in 0..64 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
    }
    for page in 0..4 {
        ram.set(0x5000 + page * 8, (0x20 + page) << 12 | 0x67);
    }
}

fn addresses() -> Vec<u64> {
    let low = (0..64).map(|page| page << 12 | 8);
    low.chain([0x20_0000, 0x23_4568]).chain((0..4).map(|page| 0x40_0000 | page << 12)).collect()
}

fn world(m: Machine) -> World {
    World::new(m, 64, addresses(), long_mode)
}

fn every_access(world: &mut World) {
    for va in world.addresses.clone() {
        for what in [What::Read, What::Write, What::Fetch] {
            for who in [Who::Supervisor, Who::User] {
                for vcpu in 0..2 {
                    world.access(vcpu, va, what, who);
                }
            }
        }
    }
}

#[test]
fn four_levels() {
    let mut world = world(BASE);
    every_access(&mut world);
    assert!(world.kind.page_counts().leaves[1] > 0, "a huge page is shadowed by one");
    world.finish();
}

/// D7: a fault that needs more pages than are left does not take those that it uses itself.
#[test]
fn d7_recycled_pages_are_not_those_in_use() {
    let mut world = World::new(BASE, 8, addresses(), long_mode);
    let (paging, cpu) = registers(&BASE);
    let role = CpuRole::new(&paging, &cpu);
    let root_role = RootRole::shadow(role, Level::L4, VcpuMode::default(), true);
    // With the two vCPUs' root, and the one that the fault is on, all of the quota but two pages.
    let roots: Vec<_> = [TABLES, 0x6000, 0x7000, 0x8000, 0x9000, 0xa000]
        .map(|cr3| {
            world.tables.fill(&mut world.cache);
            let mut guard = world.memory.exclusive(CPU);
            world.kind.get_root(&mut guard, &mut world.cache, root_role, cr3, [0; 4]).outcome.unwrap()
        })
        .into();
    world.tables.fill(&mut world.cache);
    let read = access(What::Read, Who::Supervisor);
    let context = PagingContext::<Gva, Gpa>::new(role);
    let walked = context.walk(&world.memory.shared(CPU), &regs(&BASE), Gva::new(0x1000), read).unwrap();
    let mut guard = world.memory.exclusive(CPU);
    let done =
        world.kind.fault(&mut guard, &mut world.cache, roots[0], &walked, Gva::new(0x1000), read).outcome;
    assert_eq!(done, ShadowFault::Full);
    for root in roots {
        world.kind.put_root(&mut guard, root);
    }
    drop(guard);
    world.finish();
}

/// F1: a guest that clears an accessed bit, and says so, finds it set by the next use.
#[test]
fn f1_a_cleared_accessed_bit_is_set_again_after_a_flush() {
    let mut world = world(BASE);
    world.access(0, 0x1000, What::Read, Who::Supervisor);
    assert!(matches!(world.guest_store(0, 0x4008, 0x1047), Ended::At(_)));
    world.invlpg(0, 0x1000);
    world.access(0, 0x1000, What::Read, Who::Supervisor);
    assert_eq!(world.ram().get(0x4008), Some(0x1067));
    world.finish();
}

/// C5: of two addresses that are invalidated before the next entry, both are.
#[test]
fn c5_two_invalidated_addresses_are_both_heard_of() {
    for walks in [false, true] {
        let mut world = world(BASE);
        world.walks = walks;
        for va in [0x1000, 0x2000] {
            world.access(0, va, What::Read, Who::Supervisor);
        }
        world.guest_store(0, 0x4008, 0x9067);
        world.guest_store(0, 0x4010, 0xa067);
        world.invlpg(0, 0x1000);
        world.invlpg(0, 0x2000);
        assert_eq!(world.access(0, 0x1000, What::Read, Who::Supervisor), Ended::At(0x9000));
        assert_eq!(world.access(0, 0x2000, What::Read, Who::Supervisor), Ended::At(0xa000));
        world.finish();
    }
}

/// F: an entry that the guest has changed and flushed may be mapped at once only if it is accessed, for else its next
/// use would not mark it.
#[test]
fn f1_a_flushed_entry_is_not_mapped_before_it_is_used() {
    let mut world = world(BASE);
    world.access(0, 0x1000, What::Read, Who::Supervisor);
    let mut mapped = 0;
    for frame in 8..16 {
        world.guest_store(0, 0x4008, frame << 12 | 0x67);
        world.invlpg(0, 0x1000);
        mapped += u32::from(world.hardware(0, 0x1000, What::Read, Who::Supervisor).is_some());
        world.guest_store(0, 0x4008, frame << 12 | 0x2_0007);
        world.invlpg(0, 0x1000);
        assert_eq!(world.hardware(0, 0x1000, What::Read, Who::Supervisor), None, "not used yet");
        let at = Ended::At(frame << 12 | 0x2_0000);
        assert_eq!(world.access(0, 0x1000, What::Read, Who::Supervisor), at);
        assert_eq!(world.ram().get(0x4008), Some(frame << 12 | 0x2_0027));
    }
    assert!(mapped > 0, "one that was used is");
    world.finish();
}

/// Protection keys are the processor's affair: it finds them where the guest has put them.
#[test]
fn shadows_have_the_guests_protection_keys() {
    let key = |entry: u64| entry >> 59 & 15;
    let mut world = world(BASE);
    world.ram().set(0x4008, 5 << 59 | 1 << 12 | 0x67);
    world.ram().set(0x3008, 9 << 59 | 0x20_0000 | 0xe7);
    for va in [0x1000, 0x2000, 0x20_0000] {
        assert!(matches!(world.access(0, va, What::Read, Who::User), Ended::At(_)));
    }
    assert_eq!([0x1000, 0x2000, 0x20_0000].map(|va| key(world.shadow_leaf(0, va))), [5, 0, 9]);
    // Another key, and INVLPG: the translation is the same.
    assert!(matches!(world.guest_store(0, 0x4008, 3 << 59 | 1 << 12 | 0x67), Ended::At(_)));
    world.invlpg(0, 0x1000);
    world.access(0, 0x1000, What::Read, Who::User);
    assert_eq!(key(world.shadow_leaf(0, 0x1000)), 3);
    world.finish();
}

#[test]
fn unpaged() {
    let mut world = World::new(Machine { pg: false, lma: false, ..BASE }, 64, addresses(), long_mode);
    every_access(&mut world);
    world.finish();
}

#[test]
fn pae_roots_are_keyed_by_their_pointers() {
    let m = Machine { lma: false, cr3: 0x1020, ..BASE };
    let mut world = World::new(m, 64, addresses(), |ram| {
        long_mode(ram);
        ram.set(0x1020, 0x3000 | 1);
    });
    every_access(&mut world);
    let before = world.vcpus[0].root;
    world.switch(0, m);
    assert_eq!(world.vcpus[0].root, before, "the same pointers, the same root");
    world.finish();
}

/// 32-bit guests: entries of four bytes, quadrants, 4 MiB pages.
#[test]
fn two_levels_are_shadowed_by_pae() {
    let m = Machine { lma: false, pae: false, pse: true, nxe: false, cr3: 0x1000, ..BASE };
    let places = [0u64, 0x8, 0x1008, 0x2008, 0x3f_f008, 0x40_0000, 0x60_1000, 0xc000_0000, 0xc020_0008];
    let mut world = World::new(m, 64, places.to_vec(), |ram| {
        ram.set_u32(0x1000, 0x2067);
        ram.set_u32(0x1004, 0x00e7);
        ram.set_u32(0x1c00, 0x2067);
        for page in 0..1024 {
            ram.set_u32(0x2000 + page * 4, (page as u32 % 64) << 12 | 0x67);
        }
    });
    every_access(&mut world);
    // Misaligned and overlong writes, at every offset of a shadowed table.
    for len in [1, 2, 4, 8] {
        for offset in 0..16 {
            world.emulate(0x1000 + offset, len, 0x2067_0000_2067);
            world.check();
            world.emulate(0x1000, 8, 0xe7_0000_2067);
            every_access(&mut world);
        }
    }
    world.finish();
}

/// 5fd5387c89ec, CVE-2021-38198: tables that are shared under entries with different rights have a shadow for each.
#[test]
fn cve_2021_38198_access_of_a_shared_table_is_that_of_its_parents() {
    let mut world = world(BASE);
    // The second gigabyte leads to the same directory, read-only and for the supervisor.
    world.ram().set(0x2008, 0x3000 | 0x21);
    world.addresses.extend([0x4000_0008, 0x4000_1008, 0x4020_0000, 0x4040_0000]);
    world.flush(0);
    world.flush(1);
    every_access(&mut world);
    world.finish();
}

/// The WP=0 case: a supervisor's write to a user's read-only page, then the user's read, again and again.
#[test]
fn without_wp_a_page_changes_hands() {
    for smep in [false, true] {
        let mut world = world(Machine { wp: false, smep, ..BASE });
        world.store(0x4000 + 0x30 * 8, 0x3_0000 | 0x65);
        world.flush(0);
        let write = |world: &mut World, who| world.access(0, 0x3_0008, What::Write, who);
        for _ in 0..3 {
            assert_eq!(write(&mut world, Who::Supervisor), Ended::At(0x3_0008));
            assert_eq!(world.access(0, 0x3_0008, What::Read, Who::User), Ended::At(0x3_0008));
            assert!(matches!(write(&mut world, Who::User), Ended::Fault(_)));
        }
        every_access(&mut world);
        world.finish();
    }
}

/// B4: a toggle of CR0.WP finds its root again.
#[test]
fn b4_a_role_is_a_key() {
    let mut world = world(BASE);
    let first = world.vcpus[0].root;
    world.access(0, 8, What::Read, Who::User);
    let pages = world.kind.page_counts().tables;
    world.switch(0, Machine { wp: false, ..BASE });
    assert_ne!(world.vcpus[0].root, first);
    world.access(0, 8, What::Read, Who::User);
    world.switch(0, BASE);
    assert_eq!(world.vcpus[0].root, first);
    assert!(world.hardware(0, 8, What::Read, Who::User).is_some(), "nothing was torn down");
    assert!(world.kind.page_counts().tables > pages);
    world.finish();
}

/// A lowest table is written without exits once it is unsync, and its shadow is right again after a flush.
#[test]
fn d5_unsync_tables_are_written_without_exits() {
    let mut world = world(BASE);
    world.access(0, 0x3_0008, What::Write, Who::Supervisor);
    // The lowest table, through its own map.
    for page in [0x31u64, 0x32, 0x33] {
        let at = 0x4000 + 0x30 * 8;
        assert_eq!(world.guest_store(0, at, page << 12 | 0x67), Ended::At(at));
    }
    assert_eq!(world.emulated, 0);
    assert_eq!(world.kind.unsync_pages(), 1);
    assert_eq!(world.hardware(0, 0x3_0008, What::Read, Who::User), Some(0x3_0008), "stale, as a TLB is");
    world.invlpg(0, 0x3_0008);
    assert_eq!(world.access(0, 0x3_0008, What::Read, Who::User), Ended::At(0x3_3008));
    world.flush(0);
    assert_eq!(world.kind.unsync_pages(), 0);
    world.check();
    // A directory is never unsync.
    assert_eq!(world.guest_store(0, 0x3010, 0x6000 | 0x67), Ended::Emulated(0x3010));
    world.finish();
}

/// 65855ed8b034: a table that became unsync is up to date when an entry that was not present links to it.
#[test]
fn commit_65855ed8b034_an_unsync_table_is_synced_when_it_is_linked() {
    let mut world = world(BASE);
    world.access(0, 0x40_0000, What::Write, Who::Supervisor);
    world.access(0, 0x40_1000, What::Write, Who::Supervisor);
    assert!(matches!(world.guest_store(0, 0x5000, 0x2_3000 | 0x67), Ended::At(_)));
    world.guest_store(0, 0x5008, 0x2_4000 | 0x67);
    world.guest_store(0, 0x3018, 0x5000 | 0x67);
    world.addresses.extend([0x60_0000, 0x60_1000]);
    assert_eq!(world.access(0, 0x60_0000, What::Read, Who::User), Ended::At(0x2_3000));
    assert_eq!(
        world.access(0, 0x60_1000, What::Read, Who::User),
        Ended::At(0x2_4000),
        "not by its own fault"
    );
    world.finish();
}

/// F4: a clean entry gives no writable leaf; the first write sets D.
#[test]
fn f4_a_clean_entry_is_not_writable() {
    let mut world = world(BASE);
    world.store(0x4000 + 0x30 * 8, 0x3_0000 | 0x07);
    world.flush(0);
    world.access(0, 0x3_0008, What::Read, Who::User);
    assert_eq!(world.hardware(0, 0x3_0008, What::Write, Who::User), None);
    world.access(0, 0x3_0008, What::Write, Who::User);
    assert_eq!(world.ram().get(0x4000 + 0x30 * 8), Some(0x3_0000 | 0x67));
    world.finish();
}

/// CVE-2026-46113, CVE-2026-53359: a table that changes its place and its part is not taken for what it was.
#[test]
fn cve_2026_53359_recursive_tables_are_told_apart() {
    let mut world = world(BASE);
    // Each entry leads back to the top: one frame is a table of every level.
    world.ram().set(TABLES + 8, TABLES | 0x67);
    let recursive =
        [1u64 << 39, 1 << 39 | 1 << 30, 1 << 39 | 1 << 30 | 1 << 21, 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12];
    world.addresses.extend(recursive);
    world.flush(0);
    world.flush(1);
    every_access(&mut world);
    for entry in [0x2000u64, 0x3000, 0x4000, TABLES, 0x5000] {
        world.guest_store(0, TABLES + 8, entry | 0x67);
        every_access(&mut world);
    }
    world.finish();
}

/// Recycling under the smallest quota, range zaps and obsolete generations.
#[test]
fn d7_recycled_zapped_and_obsolete() {
    let mut world = World::new(BASE, 12, addresses(), long_mode);
    every_access(&mut world);
    let mut progress = ZapProgress::default();
    let range = GfnRange::new(Gfn::default(), PAGES).unwrap();
    while !progress.is_done() {
        let _ = world.kind.zap(&mut world.memory.exclusive(CPU), range, &mut progress);
    }
    world.check();
    assert_eq!(world.kind.page_counts().leaves, [0; 3]);
    every_access(&mut world);
    let _ = world.kind.invalidate_all(&mut world.memory.exclusive(CPU));
    assert!(!matches!(world.access(0, 8, What::Read, Who::User), Ended::Fault(_)));
    every_access(&mut world);
    let mut progress = ZapProgress::default();
    while !progress.is_done() {
        let _ = world.kind.zap_obsolete(&mut world.memory.exclusive(CPU), &mut progress);
    }
    every_access(&mut world);
    world.finish();
}

/// C2: while another CPU is in the guest, and may write to a table that is to be shadowed, the fault waits for it.
#[test]
fn c2_a_fault_waits_until_no_cpu_can_write_to_the_table() {
    let mut world = world(BASE);
    world.ram().set(0x6000, 0x7000 | 0x67);
    world.ram().set(0x7000, 0x2_0000 | 0x67);
    for at in [0x6000, 0x7000] {
        assert_eq!(world.access(1, at, What::Write, Who::Supervisor), Ended::At(at));
    }
    // It becomes a directory.
    world.guest_store(0, 0x2008, 0x6000 | 0x67);
    world.addresses.push(0x4000_0000);
    world.flush(0);
    world.flush(1);
    let (paging, cpu) = registers(&BASE);
    let role = CpuRole::new(&paging, &cpu);
    let context = PagingContext::<Gva, Gpa>::new(role);
    let va = Gva::new(0x4000_0000);
    let read = access(What::Read, Who::User);
    let fault = |world: &mut World| {
        world.tables.fill(&mut world.cache);
        let walk = context.walk(&world.memory.shared(CPU), &regs(&BASE), va, read).unwrap();
        let mut guard = world.memory.exclusive(CPU);
        world.kind.fault(&mut guard, &mut world.cache, world.vcpus[0].root, &walk, va, read)
    };
    let other = CpuId::new(1).unwrap();
    let mut mmu = Mmu::new(role, world.vcpus[1].root);
    let memory = world.memory;
    let entered = mmu.enter(memory, other);
    let done = fault(&mut world);
    assert_eq!(done.outcome, ShadowFault::Wait);
    assert!(done.issued.unwrap().kick.contains(other));
    assert_eq!(fault(&mut world).outcome, ShadowFault::Wait, "and again");
    assert_eq!(world.hardware(0, 0x4000_0000, What::Read, Who::User), None);
    drop(entered);
    while fault(&mut world).outcome == ShadowFault::Wait {}
    assert_eq!(world.access(0, 0x4000_0000, What::Read, Who::User), Ended::At(0x2_0000));
    world.finish();
}

/// G1: nested tables are shadowed like others: what they permit, to L2's physical addresses.
#[test]
fn g1_nested_tables_of_svm() {
    let mut world = world(BASE);
    let (paging, cpu) = registers(&BASE);
    let role = CpuRole::nested(&paging, &cpu, false);
    let root_role = RootRole::shadow(role, Level::L4, VcpuMode { smm: false, nested: true }, true);
    let context = PagingContext::<NGpa, Gpa>::new(role);
    let walk_regs = WalkRegs { cr3: TABLES, ..WalkRegs::default() };
    world.ram().set(0x4000 + 0x30 * 8, 0x3_0000 | 0x65);
    world.ram().set(0x4000 + 0x31 * 8, 1 << 63 | 0x3_1000 | 0x67);
    world.tables.fill(&mut world.cache);
    let got = {
        let mut guard = world.memory.exclusive(CPU);
        world.kind.get_root(&mut guard, &mut world.cache, root_role, TABLES, [0; 4]).outcome
    };
    world.vcpus[0].root = got.unwrap();
    for (at, kind, what, leads) in [
        (0x3_0000u64, AccessKind::Read, What::Read, true),
        (0x3_0000, AccessKind::Write, What::Write, false),
        (0x3_1000, AccessKind::Write, What::Write, true),
        (0x3_1000, AccessKind::Execute, What::Fetch, false),
        (0x20_0000, AccessKind::Write, What::Write, true),
    ] {
        let (at, access) = (NGpa::new_truncate(at), Access::user(kind));
        world.tables.fill(&mut world.cache);
        let walk = context.walk(&world.memory.shared(CPU), &walk_regs, at, access);
        assert_eq!(walk.is_ok(), leads);
        if let Ok(walk) = walk {
            let root = world.vcpus[0].root;
            let mut guard = world.memory.exclusive(CPU);
            let done = world.kind.fault(&mut guard, &mut world.cache, root, &walk, at, access);
            assert!(matches!(done.outcome, ShadowFault::Mapped | ShadowFault::Spurious));
        }
        let found = world.hardware(0, at.bits(), what, Who::User);
        assert_eq!(found, leads.then_some(at.bits()));
        world.check();
    }
    world.finish();
}

/// 3ddf6c06e13e, B9: neighbours that the guest has used are mapped beforehand, as not accessed, and fault as they
/// should.
#[test]
fn commit_3ddf6c06e13e_prefetched_neighbours() {
    let mut world = world(BASE);
    world.ram().set(0x4000 + 0x31 * 8, 0x3_1000 | 0x65);
    world.ram().set(0x4000 + 0x32 * 8, 0x3_2000 | 0x07);
    world.flush(0);
    world.access(0, 0x3_0008, What::Read, Who::User);
    assert!(world.hardware(0, 0x3_1008, What::Read, Who::User).is_some());
    assert_eq!(world.hardware(0, 0x3_2008, What::Read, Who::User), None, "never used");
    assert_eq!(world.access(0, 0x3_1008, What::Write, Who::User), Ended::Fault(7));
    every_access(&mut world);
    world.finish();
}

/// d28c6cfbbc5e, 5fd5387c89ec, CVE-2026-53359: small pages for a huge one depend on its rights, and a link to those for
/// other rights is not followed.
#[test]
fn commit_d28c6cfbbc5e_huge_entries_with_other_rights_share_nothing() {
    let mut world = world(BASE);
    // Tables lie in the block, so it is shadowed by small pages. Clean at first, and read-only by the other entry.
    world.ram().set(0x3018, 0xa7);
    world.ram().set(0x3020, 0xe5);
    world.addresses.extend([0x63_0008, 0x83_0008]);
    world.flush(0);
    assert_eq!(world.access(0, 0x63_0008, What::Read, Who::User), Ended::At(0x3_0008));
    assert_eq!(world.access(0, 0x83_0008, What::Read, Who::User), Ended::At(0x3_0008));
    assert_eq!(world.access(0, 0x63_0008, What::Write, Who::User), Ended::At(0x3_0008));
    assert_eq!(world.access(0, 0x83_0008, What::Write, Who::User), Ended::Fault(7));
    world.finish();
}

/// F4, C5: a guest that clears D without an exit, and flushes, has its next write noticed.
#[test]
fn f4_a_cleared_dirty_bit_is_noticed_after_a_flush() {
    let mut world = world(BASE);
    let at = 0x4000 + 0x30 * 8;
    world.access(0, 0x3_0008, What::Write, Who::User);
    assert_eq!(world.guest_store(0, at, 0x3_0000 | 0x27), Ended::At(at));
    world.flush(0);
    assert_eq!(world.hardware(0, 0x3_0008, What::Write, Who::User), None);
    world.access(0, 0x3_0008, What::Write, Who::User);
    assert_eq!(world.ram().get(at), Some(0x3_0000 | 0x67));
    world.finish();
}
