//! Bugs that others had with shadows, and what must not happen here: one test for each.
mod support;

use mmu::{
    Access, AccessKind, CpuRole, Cr0, Cr4, Efer, Gfn, GfnRange, Gpa, GuestCpu, Gva, Level, NGpa,
    PagingContext, PagingRegs, RootRole, ShadowFault, VcpuMode, WalkRegs,
};
use support::flat::FlatRam;
use support::manual::guest::{access, registers, regs, BASE};
use support::manual::{Machine, What, Who};
use support::shadow::{sweep, Ended, World, CPU};

/// Four levels from 0x1000 on; 64 pages one to one, other ones at 4 MiB, and a second directory like the first.
fn guest(ram: &FlatRam) {
    ram.set(0x1000, 0x2067);
    ram.set(0x2000, 0x3067);
    ram.set(0x3000, 0x4067);
    ram.set(0x3008, 0x20_0000 | 0xe7);
    ram.set(0x3010, 0x5067);
    for page in 0..64 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
        ram.set(0x5000 + page * 8, (0x40 + page) << 12 | 0x67);
    }
}

fn addresses() -> Vec<u64> {
    let low = (0..64).map(|page| page << 12 | 8);
    low.chain([0x20_0000, 0x23_4568]).chain((0..64).map(|page| 0x40_0000 | page << 12)).collect()
}

fn world(m: Machine) -> World {
    World::new(m, 64, addresses(), guest)
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

fn read(world: &mut World, va: u64) -> Ended {
    world.access(0, va, What::Read, Who::User)
}

/// CVE-2026-23402: the guest's entry is changed from outside, by nobody who says so. The leaf that a fault finds there goes as a
/// whole, with its record; it never becomes a leaf of the other page.
#[test]
fn cve_2026_23402_an_entry_that_was_changed_from_outside_is_mapped_anew() {
    let mut world = world(BASE);
    world.ram().set(0x4000 + 0x30 * 8, 0x3_0065);
    world.flush(0);
    assert_eq!(read(&mut world, 0x3_0008), Ended::At(0x3_0008));
    world.store(0x4000 + 0x30 * 8, 0x3_1067);
    let before = world.memory.shootdown().requested();
    assert_eq!(world.access(0, 0x3_0008, What::Write, Who::User), Ended::At(0x3_1008));
    assert!(world.memory.shootdown().requested() > before, "the page of before may be in a TLB");
    assert_eq!(read(&mut world, 0x3_0008), Ended::At(0x3_1008));
    world.finish();
}

/// CVE-2026-46113: a link that is there is not followed to the shadow of another table than the guest's entry names now.
#[test]
fn cve_2026_46113_a_link_to_another_table_is_not_followed() {
    let mut world = world(BASE);
    world.walks = true;
    assert_eq!(read(&mut world, 8), Ended::At(8));
    // The directory's first entry is changed by nobody who says so. (0x38008 is not mapped yet.)
    world.store(0x3000, 0x5067);
    assert_eq!(read(&mut world, 0x3_8008), Ended::At(0x7_8008));
    world.check();
    assert_eq!(read(&mut world, 8), Ended::At(0x4_0008), "and what hung below it is gone");
    world.zap_range(GfnRange::of(Gfn::new_truncate(0)));
    world.finish();
}

/// CVE-2026-53359 ("Januscape"): nor to a shadow of the table for other rights than the guest's entries give now.
#[test]
fn cve_2026_53359_a_link_for_other_rights_is_not_followed() {
    let mut world = world(BASE);
    world.walks = true;
    assert_eq!(world.access(0, 8, What::Write, Who::User), Ended::At(8));
    world.store(0x3000, 0x4065);
    assert_eq!(read(&mut world, 0x3_8008), Ended::At(0x3_8008));
    assert_eq!(world.access(0, 0x3_8008, What::Write, Who::User), Ended::Fault(7));
    assert_eq!(world.access(0, 8, What::Write, Who::User), Ended::Fault(7));
    world.zap_range(GfnRange::of(Gfn::new_truncate(0)));
    world.finish();
}

/// Follow-up to the above ("WARN and clear role.invalid on child"), D10: below a root that is obsolete nothing is made, so no
/// page is born obsolete.
#[test]
fn d10_nothing_is_made_below_an_obsolete_root() {
    let mut world = world(BASE);
    read(&mut world, 8);
    let root = world.vcpus[0].root;
    let (paging, cpu) = registers(&BASE);
    let context = PagingContext::<Gva, Gpa>::new(CpuRole::new(&paging, &cpu));
    let (va, how) = (Gva::new(0x40_0000), access(What::Read, Who::User));
    let walk = context.walk(&world.memory.shared(CPU), &regs(&BASE), va, how).unwrap();
    let tables = world.kind.page_counts().tables;
    let mut guard = world.memory.exclusive(CPU);
    let _ = world.kind.invalidate_all(&mut guard);
    let done = world.kind.fault(&mut guard, &mut world.cache, root, &walk, va, how);
    drop(guard);
    assert_eq!(done.outcome, ShadowFault::NoRoot);
    assert_eq!(world.kind.page_counts().tables, tables);
    assert_eq!(read(&mut world, 8), Ended::At(8), "on another root");
    sweep(|progress| {
        let _ = world.kind.zap_obsolete(&mut world.memory.exclusive(CPU), progress);
    });
    world.check();
    world.finish();
}

/// D7: the CPUs that run on obsolete roots are named, so that they can be kicked.
#[test]
fn d7_who_runs_on_an_obsolete_root_is_kicked() {
    let mut world = world(BASE);
    let (paging, cpu) = registers(&BASE);
    let mut mmu = mmu::Mmu::new(CpuRole::new(&paging, &cpu), world.vcpus[1].root);
    let other = mmu::CpuId::new(3).unwrap();
    let entered = mmu.enter(world.memory, other);
    let done = world.kind.invalidate_all(&mut world.memory.exclusive(CPU));
    assert!(done.issued.unwrap().kick.contains(other));
    drop(entered);
    world.access(1, 8, What::Read, Who::User);
    world.finish();
}

/// f7d9c7b7b902: an entry, of whatever level, that changes between the walk and the fault's protection of its table is not
/// shadowed as the walk saw it.
#[test]
fn commit_f7d9c7b7b902_a_stale_entry_is_not_shadowed() {
    for (at, entry) in
        [(0x1000, 0), (0x2000, 0x6067), (0x3010, 0x4067), (0x5000, 0x4_1067), (0x5000, 0x4_0065)]
    {
        let mut world = world(BASE);
        let (paging, cpu) = registers(&BASE);
        let context = PagingContext::<Gva, Gpa>::new(CpuRole::new(&paging, &cpu));
        let (va, how) = (Gva::new(0x40_0000), access(What::Write, Who::User));
        let walk = context.walk(&world.memory.shared(CPU), &regs(&BASE), va, how).unwrap();
        world.store(at, entry);
        let root = world.vcpus[0].root;
        for _ in 0..3 {
            world.tables.fill(&mut world.cache);
            let mut guard = world.memory.exclusive(CPU);
            let done = world.kind.fault(&mut guard, &mut world.cache, root, &walk, va, how);
            drop(guard);
            assert_eq!(done.outcome, ShadowFault::Retry, "{at:#x}");
            world.check();
            assert_eq!(world.hardware(0, va.bits(), What::Read, Who::User), None);
        }
        world.finish();
    }
}

/// 5f0b819995e1, 6c6ab524cfae: NX is legal in a shadow whatever the guest's EFER.NXE, CR0.WP and CR4.SMEP are, and needed where
/// a supervisor's write makes a user's page one that SMEP would not keep it from fetching.
#[test]
fn commit_5f0b819995e1_nx_is_no_reserved_bit_of_a_shadow() {
    for bits in 0..16 {
        let [wp, smep, nxe, smap] = [0, 1, 2, 3].map(|bit| bits >> bit & 1 == 1);
        let m = Machine { wp, smep, nxe, smap, ..BASE };
        let mut world = world(m);
        for (page, flags) in [(0x30u64, 0x65u64), (0x31, 0x61), (0x32, 0x25), (0x33, 1 << 63 | 0x67)] {
            world.store(0x4000 + page * 8, page << 12 | flags);
        }
        world.flush(0);
        world.flush(1);
        every_access(&mut world);
        every_access(&mut world);
        world.finish();
    }
}

/// A supervisor's write that only a suspended SMAP permits, without CR0.WP, leaves nothing that SMAP would not stop.
#[test]
fn a3_a_write_under_suspended_smap_leaves_no_hole() {
    let m = Machine { wp: false, smap: true, ac: true, ..BASE };
    let mut world = world(m);
    world.store(0x4000 + 0x30 * 8, 0x3_0065);
    world.flush(0);
    let ended = world.access(0, 0x3_0008, What::Write, Who::Supervisor);
    assert_eq!(ended, Ended::Emulated(0x3_0008));
    world.switch(0, Machine { ac: false, ..m });
    assert_eq!(world.access(0, 0x3_0008, What::Read, Who::Supervisor), Ended::Fault(1));
    assert_eq!(world.access(0, 0x3_0008, What::Write, Who::Supervisor), Ended::Fault(3));
    assert_eq!(read(&mut world, 0x3_0008), Ended::At(0x3_0008));
    world.finish();
}

/// A page that is the supervisor's in the shadow has its key in another register than the guest's tables say: IA32_PKRS would
/// guard a page of the user, or PKRU no longer would.
#[test]
fn a3_a_write_without_wp_leaves_a_users_page_its_keys() {
    for (pke, pks) in [(true, false), (false, true)] {
        let mut world = world(Machine { wp: false, pke, pks, ..BASE });
        world.store(0x4000 + 0x30 * 8, 5 << 59 | 0x3_0065);
        world.flush(0);
        for _ in 0..2 {
            let write = world.access(0, 0x3_0008, What::Write, Who::Supervisor);
            assert_eq!(write, Ended::Emulated(0x3_0008), "PKE {pke}, PKS {pks}");
            assert_eq!(read(&mut world, 0x3_0008), Ended::At(0x3_0008));
        }
        world.finish();
    }
}

/// ee6268ba3a68: an L1 of 32 bits keeps nested tables of two levels, or PAE's, for an L2 of any kind. Their shadow has as many
/// levels as the processor walks.
#[test]
fn commit_ee6268ba3a68_nested_tables_of_a_32_bit_l1() {
    for pae in [false, true] {
        let mut world = world(BASE);
        for page in 0..64u64 {
            world.ram().set_u32(0x7000 + page * 4, (page as u32) << 12 | 0x67);
        }
        // Two levels from 0x6000 on; PAE's from 0x8000 on, with the directory of the other guest.
        world.ram().set_u32(0x6000, 0x7067);
        world.ram().set_u32(0x6004, 0xe7);
        world.ram().set(0x8000, 0x3001);
        let mut cr4 = Cr4::PSE;
        cr4.set(Cr4::PAE, pae);
        let cr3 = if pae { 0x8000 } else { 0x6000 };
        let cpu = GuestCpu { max_phys_addr: 40, gib_pages: false, pse36: true, amd: true };
        let role = CpuRole::nested(&PagingRegs { cr0: Cr0::PG, cr4, efer: Efer::NXE }, &cpu, false);
        let root_role = RootRole::shadow(role, Level::L4, VcpuMode { smm: false, nested: true }, true);
        assert_eq!(root_role.level(), Level::L4);
        let context = PagingContext::<NGpa, Gpa>::new(role);
        let pdptes = if pae { [0x3001, 0, 0, 0] } else { [0; 4] };
        world.tables.fill(&mut world.cache);
        let got = {
            let mut guard = world.memory.exclusive(CPU);
            world.kind.get_root(&mut guard, &mut world.cache, root_role, cr3, pdptes).outcome
        };
        world.vcpus[0].root = got.unwrap();
        let walk_regs = WalkRegs { cr3, ..WalkRegs::default() };
        let huge = if pae { 0x20_5000 } else { 0x40_5000 };
        for (at, leads) in [(0x2_0000u64, 0x2_0000u64), (0x2_1000, 0x2_1000), (huge, huge & 0x3f_ffff)] {
            let leads = if at == huge && pae { 0x20_5000 } else { leads };
            let (at, access) = (NGpa::new_truncate(at), Access::user(AccessKind::Write));
            let mut outcome = ShadowFault::Retry;
            for _ in 0..4 {
                world.tables.fill(&mut world.cache);
                let walk = context.walk(&world.memory.shared(CPU), &walk_regs, at, access).unwrap();
                assert_eq!(walk.translation.address.bits(), leads);
                let root = world.vcpus[0].root;
                let mut guard = world.memory.exclusive(CPU);
                outcome = world.kind.fault(&mut guard, &mut world.cache, root, &walk, at, access).outcome;
                drop(guard);
                world.check();
            }
            if leads >> 12 > 8 {
                assert_eq!(outcome, ShadowFault::Spurious);
                assert_eq!(world.hardware(0, at.bits(), What::Write, Who::User), Some(leads));
            }
        }
        world.finish();
    }
}

/// Misaligned and overlong emulated writes: of each length at each offset of a page that is a table of every level.
#[test]
fn misaligned_writes_at_every_offset_of_a_shadowed_table() {
    let long = BASE;
    let short = Machine { lma: false, pae: false, pse: true, nxe: false, cr3: 0x6000, ..BASE };
    for (m, tables) in [(long, vec![0x1000u64, 0x3000, 0x4000]), (short, vec![0x6000, 0x7000])] {
        let setup = |ram: &FlatRam| {
            guest(ram);
            ram.set_u32(0x6000, 0x7067);
            for page in 0..1024 {
                ram.set_u32(0x7000 + page * 4, (page as u32 % 64) << 12 | 0x67);
            }
        };
        let mut world = World::new(m, 64, vec![8, 0x1008, 0x3_f008, 0x20_0000, 0x3f_f008, 0x40_0000], setup);
        for table in tables {
            for len in [1usize, 2, 4, 8, 16] {
                let near = (0..12).chain(2044..2052).chain(4096 - 12..4096 + 2);
                for offset in near {
                    let at = Gpa::new_truncate(table + offset);
                    let mut before = vec![0; len];
                    world.memory.shared(CPU).read(at, &mut before).unwrap();
                    for data in [vec![0x67; len], before] {
                        world.memory.shared(CPU).write(at, &data).unwrap();
                        let _ = world.kind.track_write(&mut world.memory.exclusive(CPU), at, len);
                        for va in world.addresses.clone() {
                            world.invlpg(0, va);
                            world.access(0, va, What::Read, Who::User);
                        }
                        world.check();
                    }
                }
            }
        }
        world.finish();
    }
}

/// The new entry of an emulated write to a lowest table is mapped at once if the guest has used it, and a write to an upper table
/// only takes away.
#[test]
fn an_emulated_write_maps_the_new_entry() {
    let mut world = world(BASE);
    read(&mut world, 0x3_0008);
    let at = 0x4000 + 0x30 * 8;
    world.emulate(at, 8, 0x3_1067);
    assert_eq!(world.hardware(0, 0x3_0008, What::Write, Who::User), Some(0x3_1008));
    let entry = world.leaf(0, 0x3_0008).unwrap().2;
    assert_eq!(entry >> 5 & 1, 0, "B9: not accessed");
    for entry in [0x3_1047u64, 0x3_1066, 1 << 50 | 0x3_1067, 0x100_0067] {
        world.emulate(at, 8, entry);
        assert_eq!(world.hardware(0, 0x3_0008, What::Read, Who::User), None, "{entry:#x}");
    }
    world.emulate(at, 8, 0x3_1027);
    assert!(world.hardware(0, 0x3_0008, What::Read, Who::User).is_some());
    assert_eq!(world.hardware(0, 0x3_0008, What::Write, Who::User), None, "F4: clean");
    world.emulate(at, 4, 0x3_2067);
    assert_eq!(world.hardware(0, 0x3_0008, What::Read, Who::User), None, "half an entry");
    world.emulate(at, 8, 0x1067);
    assert_eq!(world.hardware(0, 0x3_0008, What::Write, Who::User), None, "D6: a table");
    world.emulate(0x3010, 8, 0x4067);
    assert_eq!(world.hardware(0, 0x43_0000, What::Read, Who::User), None);
    world.finish();
}

/// A table that is written again and again without being used is not one any more; one that is used stays.
#[test]
fn a_flood_of_writes_drops_the_shadow() {
    let mut world = world(BASE);
    read(&mut world, 0x40_0000);
    let tables = world.kind.page_counts().tables;
    for round in 0..8 {
        world.emulate(0x3000 + 100 * 8, 8, 0);
        read(&mut world, 0x40_0000 | ((round + 1) * 8) << 12);
    }
    assert_eq!(world.kind.page_counts().tables, tables, "it is in use");
    for _ in 0..8 {
        world.emulate(0x3000 + 100 * 8, 8, 0);
    }
    assert!(world.kind.page_counts().tables < tables);
    every_access(&mut world);
    world.finish();
}

/// CVE-2022-45869, its side here: recycling in the middle of faults, under the smallest quota. (That a fault of the direct kind
/// cannot recycle is a matter of types.)
#[test]
fn cve_2022_45869_recycling_under_faults() {
    for quota in [8, 9, 10, 12] {
        let mut world = World::new(BASE, quota, addresses(), guest);
        for round in 0..3 {
            every_access(&mut world);
            world.guest_store(round % 2, 0x3010, if round == 1 { 0x4067 } else { 0x5067 });
        }
        world.finish();
    }
}

/// D6: a root whose table's slot is taken away is not run on, and tracked anew when the table is back.
#[test]
fn d6_a_root_whose_table_went_is_taken_anew() {
    let mut world = world(BASE);
    read(&mut world, 8);
    let all = world.memory.exclusive(CPU).remove_slot(Gfn::default()).unwrap().range();
    world.zap_range(all);
    world.check();
    world.memory.backing().clear_notes(0);
    let slot = mmu::Slot::new(all, mmu::SlotFlags::empty(), 0);
    world.memory.exclusive(CPU).insert_slot(&slot).unwrap();
    world.check();
    assert!(!world.memory.shared(CPU).is_write_tracked(Gfn::new_truncate(1)));
    assert_eq!(read(&mut world, 8), Ended::At(8));
    assert!(world.memory.shared(CPU).is_write_tracked(Gfn::new_truncate(1)));
    assert_eq!(world.guest_store(0, 0x1000, 0x2067), Ended::Emulated(0x1000));
    world.finish();
}

/// C1, C2: whatever takes a right from a leaf, or the leaf away, names the CPU that may have it in its TLB; what gives permission,
/// or takes none, names nobody.
#[test]
fn c2_every_loss_of_a_writable_leaf_kicks_who_may_have_it() {
    let other = mmu::CpuId::new(2).unwrap();
    let page = GfnRange::of(Gfn::new_truncate(0x30));
    type Step = fn(&mut World, GfnRange) -> Option<mmu::Issued>;
    let steps: [(&str, bool, Step); 8] = [
        ("drop", true, |world, page| {
            let mut progress = mmu::ZapProgress::default();
            world.kind.zap(&mut world.memory.exclusive(CPU), page, &mut progress).issued
        }),
        ("protect", true, |world, page| {
            let mut progress = mmu::ZapProgress::default();
            world.kind.write_protect(&mut world.memory.exclusive(CPU), page, &mut progress).issued
        }),
        ("track", true, |world, page| {
            let mut guard = world.memory.exclusive(CPU);
            let sweep = guard.track_writes(Gfn::new_truncate(page.start())).unwrap();
            world.kind.track_range(&mut guard, sweep).issued
        }),
        ("rearm", true, |world, page| {
            let mut guard = world.memory.exclusive(CPU);
            let _ = guard.start_dirty_log(Gfn::default(), mmu::LogBy::WriteProtection).unwrap();
            let issued = world.kind.rearm_pages(&mut guard, Gfn::new_truncate(page.start()), 1).issued;
            let _ = guard.stop_dirty_log(Gfn::default()).unwrap();
            issued
        }),
        ("clean", true, |world, page| {
            let mut guard = world.memory.exclusive(CPU);
            let _ = guard.start_dirty_log(Gfn::default(), mmu::LogBy::DirtyBits).unwrap();
            let issued = world.kind.rearm_pages(&mut guard, Gfn::new_truncate(page.start()), 1).issued;
            let _ = guard.stop_dirty_log(Gfn::default()).unwrap();
            issued
        }),
        // A guest's own flush asks for none of others; what comes after it does.
        ("sync", true, |world, page| {
            world.store(0x4000 + 0x30 * 8, 0x3_0065);
            let (root, mut progress) = (world.vcpus[0].root, mmu::ZapProgress::default());
            let mut guard = world.memory.exclusive(CPU);
            let before = world.memory.shootdown().requested();
            world.kind.sync_address(&mut guard, root, Gva::new(0x3_0008));
            assert_eq!(world.memory.shootdown().requested(), before);
            world.kind.write_unprotect(&mut guard, page, &mut progress).issued
        }),
        ("sync of fetches", false, |world, page| {
            world.store(0x4000 + 0x30 * 8, 1 << 63 | 0x3_0067);
            let (root, mut progress) = (world.vcpus[0].root, mmu::ZapProgress::default());
            let mut guard = world.memory.exclusive(CPU);
            world.kind.sync_address(&mut guard, root, Gva::new(0x3_0008));
            world.kind.write_unprotect(&mut guard, page, &mut progress).issued
        }),
        ("age", false, |world, page| {
            let mut progress = mmu::ZapProgress::default();
            let mut guard = world.memory.exclusive(CPU);
            world.kind.test_and_clear_young(&mut guard, page, &mut progress);
            world.kind.write_unprotect(&mut guard, page, &mut progress).issued
        }),
    ];
    for (name, loses, step) in steps {
        let mut world = world(BASE);
        let ended = world.access(0, 0x3_0008, What::Write, Who::User);
        assert_eq!(ended, Ended::At(0x3_0008));
        // The table is unsync, so that a sync has something to do.
        world.guest_store(0, 0x4000 + 0x3f * 8, 0x3_f067);
        assert_eq!(world.kind.unsync_pages(), 1);
        let (paging, cpu) = registers(&BASE);
        let mut mmu = mmu::Mmu::new(CpuRole::new(&paging, &cpu), world.vcpus[1].root);
        let entered = mmu.enter(world.memory, other);
        let issued = step(&mut world, page);
        assert_eq!(issued.is_some_and(|issued| issued.kick.contains(other)), loses, "{name}");
        drop(entered);
        world.finish();
    }
}

/// A3: SMEP and SMAP make a user's page less than the same page of the supervisor. After a flush, one that became the user's is
/// not the supervisor's by what was mapped before.
#[test]
fn a3_a_page_that_becomes_the_users_is_no_longer_mapped_as_the_supervisors() {
    let mut world = world(Machine { smep: true, smap: true, ..BASE });
    let fetch = |world: &mut World| world.access(0, 0x3_0008, What::Fetch, Who::Supervisor);
    let read = |world: &mut World| world.access(0, 0x3_0008, What::Read, Who::Supervisor);
    world.emulate(0x4000 + 4 * 8, 8, 0x4063);
    world.emulate(0x4000 + 0x30 * 8, 8, 0x3_0063);
    assert_eq!((fetch(&mut world), read(&mut world)), (Ended::At(0x3_0008), Ended::At(0x3_0008)));
    // By a store of its own: the table is unsync.
    assert_eq!(world.guest_store(0, 0x4000 + 0x3f * 8, 0x3_f063), Ended::At(0x4000 + 0x3f * 8));
    assert_eq!(world.guest_store(0, 0x4000 + 0x30 * 8, 0x3_0067), Ended::At(0x4000 + 0x30 * 8));
    world.flush(0);
    assert_eq!((fetch(&mut world), read(&mut world)), (Ended::Fault(0x11), Ended::Fault(1)));
    world.finish();
}

/// C2: where one leaf takes another's place for the same page, W goes with a flush.
#[test]
fn c2_a_page_that_changes_hands_is_flushed_when_w_goes() {
    let mut world = world(Machine { wp: false, ..BASE });
    world.store(0x4000 + 0x30 * 8, 0x3_0065);
    world.flush(0);
    assert_eq!(world.access(0, 0x3_0008, What::Write, Who::Supervisor), Ended::At(0x3_0008));
    let before = world.memory.shootdown().requested();
    assert_eq!(read(&mut world, 0x3_0008), Ended::At(0x3_0008));
    assert!(
        world.memory.shootdown().requested() > before,
        "the supervisor's W may be in a TLB, and the page a table one day"
    );
    world.finish();
}
