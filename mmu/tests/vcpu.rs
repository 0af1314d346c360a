//! A vCPU's roots: what each event asks for, how exactly, and that what was asked for is enough.
mod support;

use mmu::{
    BadInvpcid, CpuRole, Cr0, Cr4, Efer, Gfn, GfnRange, Gpa, GuestCpu, Gva, Invpcid, Level, Mmu,
    PagingContext, PagingRegs, PagingState, Requests, RoleFlags, RootSet, Running, ShadowFault, Sync,
    TagFlush, Tags, VcpuMmus, Walk,
};
use support::flat::FlatRam;
use support::machines::AMD;
use support::manual::guest::{access, registers, regs, BASE};
use support::manual::{Machine, What, Who};
use support::shadow::{Ended, How, World, CPU};
use support::vm::{Vm, RW};

const PCIDE: u64 = 1 << 17;
const NO_FLUSH: u64 = 1 << 63;
/// A page that [`guest`] maps, and its entry.
const VA: u64 = 0x1_0008;
const ENTRY: u64 = 0x4000 + 0x10 * 8;

/// Two trees of four levels that share their lowest table, which maps 64 pages one to one.
fn guest(ram: &FlatRam) {
    for (top, upper, directory) in [(0x1000, 0x2000, 0x3000), (0x6000, 0x7000, 0x8000)] {
        ram.set(top, upper | 0x67);
        ram.set(upper, directory | 0x67);
        ram.set(directory, 0x4000 | 0x67);
    }
    for page in 0..64 {
        ram.set(0x4000 + page * 8, page << 12 | 0x67);
    }
}

fn world_with(tags: Tags) -> World {
    let addresses = (0..64).map(|page| page << 12 | 8).chain([ENTRY]).collect();
    World::with(BASE, 64, addresses, tags, guest)
}

fn world() -> World {
    world_with(Tags::One)
}

/// PCIDs on; the roots kept are of 0x6001, 0x1002, 0x1001 and 0x1000, the current one first.
fn with_pcids(tags: Tags) -> World {
    let mut world = world_with(tags);
    world.mov_to_cr4(0, BASE, PCIDE);
    for cr3 in [0x1001, 0x1002, 0x6001] {
        world.mov_to_cr3(0, cr3, false);
        world.carry_out(0);
    }
    drop(world.vcpus[0].mmu.enter(world.memory, CPU));
    world
}

/// A sync of these roots, and the flush of what the tag has of the current one.
fn sync(how: Sync, roots: RootSet) -> Requests {
    let flush = match how {
        _ if !roots.contains(RootSet::CURRENT) => TagFlush::None,
        Sync::Address(address) => TagFlush::Address(address),
        Sync::All => TagFlush::All,
    };
    Requests { sync: Some((how, roots)), flush, ..Requests::NONE }
}

fn regs_with(world: &World, change: impl Fn(&mut PagingState)) -> PagingState {
    let mut state = *world.vcpus[0].mmu.state();
    change(&mut state);
    state
}

const ALL: RootSet = RootSet::all();

#[test]
fn d9_mov_to_cr3_keeping_translations_finds_its_root_and_rebuilds_nothing() {
    let mut world = with_pcids(Tags::One);
    let before = world.kind.page_counts().tables;
    let mmu = &mut world.vcpus[0].mmu;
    let first = mmu.root();
    let switched = Requests { flush: TagFlush::All, ..Requests::NONE };
    assert_eq!(mmu.mov_to_cr3(0x1002 | NO_FLUSH, [0; 4]), switched);
    assert!(!switched.is_work() && !mmu.has_work());
    assert_ne!(mmu.root(), first);
    assert_eq!(mmu.mov_to_cr3(0x6001 | NO_FLUSH, [0; 4]), switched);
    assert_eq!(mmu.root(), first);
    assert_eq!(mmu.mov_to_cr3(0x6001 | NO_FLUSH, [0; 4]), Requests::NONE, "the same");
    assert_eq!(world.kind.page_counts().tables, before);
    world.finish();
}

/// A root that owns a tag is switched to for nothing.
#[test]
fn d9_a_root_with_a_tag_of_its_own_needs_no_flush() {
    let mut world = with_pcids(Tags::PerRoot);
    world.access(0, VA, What::Read, Who::User);
    let mmu = &mut world.vcpus[0].mmu;
    let slot = mmu.slot();
    assert_eq!(mmu.mov_to_cr3(0x1002 | NO_FLUSH, [0; 4]), Requests::NONE);
    assert_ne!(mmu.slot(), slot);
    assert_eq!(mmu.enter(world.memory, CPU).flush(), TagFlush::All, "C4: its tag is fresh");
    assert_eq!(mmu.mov_to_cr3(0x6001 | NO_FLUSH, [0; 4]), Requests::NONE);
    assert_eq!(mmu.slot(), slot);
    assert_eq!(mmu.enter(world.memory, CPU).flush(), TagFlush::None);
    assert_eq!(mmu.mov_to_cr3(0x1002 | NO_FLUSH, [0; 4]), Requests::NONE);
    assert_eq!(mmu.enter(world.memory, CPU).flush(), TagFlush::None);
}

/// C5: a flush of a PCID that is not the current one reaches the tag of its root.
#[test]
fn c5_a_previous_root_that_was_flushed_has_its_own_tag_flushed() {
    let mut world = with_pcids(Tags::PerRoot);
    let mmu = &mut world.vcpus[0].mmu;
    for what in [Invpcid::Single { pcid: 1 }, Invpcid::Address { pcid: 1, address: Gva::new(VA) }] {
        let _ = mmu.mov_to_cr3(0x1002 | NO_FLUSH, [0; 4]);
        drop(mmu.enter(world.memory, CPU));
        assert_eq!(mmu.invpcid(what).flush, TagFlush::None);
        let _ = mmu.mov_to_cr3(0x6001 | NO_FLUSH, [0; 4]);
        world.tables.fill(&mut world.cache);
        let mut guard = world.memory.exclusive(CPU);
        assert_eq!(mmu.carry_out(&mut world.kind, &mut guard, &mut world.cache).outcome, Ok(()));
        drop(guard);
        assert_eq!(mmu.enter(world.memory, CPU).flush(), TagFlush::All);
    }
}

/// C2: W that one vCPU's flush takes away is flushed everywhere, for later nobody looks for it any more.
#[test]
fn c2_a_right_that_a_sync_takes_away_is_flushed_on_every_cpu() {
    let mut world = world();
    let (page, entry) = (0x9000, 0x4000 + 9 * 8);
    world.ram().set(page, 0x20_0000 | 0xe7);
    world.addresses.extend([page, 0x4000_0008]);
    assert_eq!(world.access_as(1, page, What::Write, Who::Supervisor, CACHING), Ended::At(page));
    assert_eq!(world.access_as(0, page, What::Write, Who::Supervisor, CACHING), Ended::At(page));
    assert_eq!(world.guest_store(0, entry, page | 0x65), Ended::At(entry));
    world.access_as(1, page, What::Read, Who::Supervisor, CACHING);
    world.access_as(1, page, What::Write, Who::Supervisor, CACHING);
    world.invlpg(0, page);
    world.carry_out(0);
    // Now it becomes a directory, while the other vCPU runs.
    world.guest_store(0, 0x2008, page | 0x67);
    world.access_as(0, 0x4000_0008, What::Read, Who::User, CACHING);
    world.check();
    world.finish();
}

/// Intel SDM vol. 3, 4.10.4.1: the PCID that is loaded.
#[test]
fn c5_mov_to_cr3_flushes_the_pcid_that_it_loads() {
    let mut world = with_pcids(Tags::One);
    let mmu = &mut world.vcpus[0].mmu;
    assert_eq!(mmu.mov_to_cr3(0x6001, [0; 4]), sync(Sync::All, RootSet::CURRENT | RootSet::PREVIOUS_1));
    let to_two = mmu.mov_to_cr3(0x1002, [0; 4]);
    assert_eq!(to_two, Requests { flush: TagFlush::All, ..sync(Sync::All, RootSet::CURRENT) });
    assert!(mmu.has_work());
    // Another table in the PCID that is flushed.
    let miss = mmu.mov_to_cr3(0x9001, [0; 4]);
    let roots = RootSet::PREVIOUS_1 | RootSet::PREVIOUS_2;
    assert_eq!(miss, Requests { load: true, flush: TagFlush::All, ..sync(Sync::All, roots) });
}

#[test]
fn c5_without_pcids_bit_63_of_cr3_is_no_order() {
    let mut world = world();
    let mmu = &mut world.vcpus[0].mmu;
    assert_eq!(mmu.mov_to_cr3(0x1000 | NO_FLUSH, [0; 4]), sync(Sync::All, RootSet::CURRENT));
    assert_eq!(mmu.state().cr3, 0x1000);
}

#[test]
fn c5_invlpg_concerns_every_root_for_its_page_may_be_global() {
    let mut world = with_pcids(Tags::One);
    let mmu = &mut world.vcpus[0].mmu;
    let at = Gva::new(VA);
    assert_eq!(mmu.invlpg(at), sync(Sync::Address(at), ALL));
    assert_eq!(mmu.invlpg(Gva::new(1 << 50)), Requests::NONE, "not canonical");
    world.carry_out(0);
    assert_eq!(world.vcpus[0].mmu.enter(world.memory, CPU).flush(), TagFlush::Address(at));
    let done = world.vcpus[0].mmu.mov_to_cr3(0x1002 | NO_FLUSH, [0; 4]);
    assert_eq!(done.sync, None, "previous roots were brought up to date, too");
}

#[test]
fn c5_invpcid_of_each_type() {
    let mut world = with_pcids(Tags::One);
    let mmu = &mut world.vcpus[0].mmu;
    let address = Gva::new(VA);
    let of_one = RootSet::CURRENT | RootSet::PREVIOUS_1;
    assert_eq!(mmu.invpcid(Invpcid::Address { pcid: 1, address }), sync(Sync::Address(address), of_one));
    assert_eq!(mmu.invpcid(Invpcid::Single { pcid: 2 }), sync(Sync::All, RootSet::PREVIOUS_0));
    assert!(!mmu.invpcid(Invpcid::Single { pcid: 2 }).is_work(), "a previous root has time");
    assert_eq!(mmu.invpcid(Invpcid::Single { pcid: 9 }), Requests::NONE);
    assert_eq!(mmu.invpcid(Invpcid::All), sync(Sync::All, ALL));
    assert_eq!(mmu.invpcid(Invpcid::AllButGlobal), sync(Sync::All, ALL));
}

/// Intel SDM vol. 2, INVPCID: what is #GP(0).
#[test]
fn invpcid_operands() {
    let role = CpuRole::new(&registers(&BASE).0, &registers(&BASE).1);
    let new = |kind, low, high, cr4| Invpcid::new(kind, [low, high], &role, cr4);
    let on = Cr4::PCIDE;
    assert_eq!(new(0, 5, 0x1000, on), Ok(Invpcid::Address { pcid: 5, address: Gva::new(0x1000) }));
    assert_eq!(new(1, 5, 1 << 50, on), Ok(Invpcid::Single { pcid: 5 }));
    assert_eq!(new(2, 0, 0, Cr4::empty()), Ok(Invpcid::All));
    assert_eq!(new(3, 7, 0, Cr4::empty()), Ok(Invpcid::AllButGlobal));
    assert_eq!(new(4, 0, 0, on), Err(BadInvpcid::Type(4)));
    assert_eq!(new(2, 1 << 12, 0, on), Err(BadInvpcid::Descriptor(1 << 12)));
    assert_eq!(new(1, 5, 0, Cr4::empty()), Err(BadInvpcid::Descriptor(5)));
    assert_eq!(new(1, 0, 0, Cr4::empty()), Ok(Invpcid::Single { pcid: 0 }));
    assert!(matches!(new(0, 5, 1 << 50, on), Err(BadInvpcid::Address(_))));
}

/// Intel SDM vol. 3, 4.10.4.1; AMD APM vol. 2, 5.5.2.
#[test]
fn c5_mov_to_cr4_by_what_it_changes() {
    let of_one = RootSet::CURRENT | RootSet::PREVIOUS_1;
    let with = |before: Cr4, change: Cr4| {
        let mut world = with_pcids(Tags::One);
        let mmu = &mut world.vcpus[0].mmu;
        let base = Cr4::PAE | Cr4::PCIDE;
        let _ = mmu.mov_to_cr4(base | before, [0; 4]);
        world.carry_out(0);
        // Every previous root is up to date as well.
        for cr3 in [0x1000, 0x1001, 0x1002, 0x6001] {
            let _ = world.vcpus[0].mmu.mov_to_cr3(cr3 | NO_FLUSH, [0; 4]);
            world.carry_out(0);
        }
        let requests = world.vcpus[0].mmu.mov_to_cr4((base | before) ^ change, [0; 4]);
        assert!(!requests.load || change.intersects(Cr4::PAE | Cr4::PCIDE));
        requests.sync
    };
    let all = Some((Sync::All, ALL));
    let none = Cr4::empty();
    assert_eq!(with(none, Cr4::PGE), all);
    assert_eq!(with(Cr4::PGE, Cr4::PGE), all);
    assert_eq!(with(none, Cr4::PSE), all);
    assert_eq!(with(Cr4::PSE, Cr4::PSE), all);
    assert_eq!(with(none, Cr4::PKE), all);
    assert_eq!(with(Cr4::PKE, Cr4::PKE), None);
    assert_eq!(with(none, Cr4::SMEP), Some((Sync::All, of_one)));
    assert_eq!(with(Cr4::SMEP, Cr4::SMEP), None);
    assert_eq!(with(none, Cr4::SMAP), None);
    assert_eq!(with(none, Cr4::LA57 & none), None);
    assert_eq!(with(none, none), None);
    // PCID 1 is no name any more: the root for 000H is another one.
    assert_eq!(with(none, Cr4::PCIDE).map(|(how, _)| how), Some(Sync::All));
    let mut world = world();
    assert_eq!(world.vcpus[0].mmu.mov_to_cr4(Cr4::PAE | Cr4::PCIDE, [0; 4]), Requests::NONE, "PCIDE set");
}

/// C5: what changes CR0.PG leaves no translation of before, and so does INIT. CR0.WP is another role.
#[test]
fn c5_mov_to_cr0_and_init_by_what_they_change() {
    let change = |event: fn(&mut Mmu, PagingRegs) -> Requests| {
        let mut world = with_pcids(Tags::One);
        let regs = world.vcpus[0].mmu.state().regs;
        event(&mut world.vcpus[0].mmu, regs).sync.map(|(how, _)| how)
    };
    let paging = change(|mmu, regs| {
        mmu.mov_to_cr0(regs.cr0.difference(Cr0::PG), regs.efer.difference(Efer::LMA), [0; 4])
    });
    assert_eq!(paging, Some(Sync::All));
    assert_eq!(change(|mmu, regs| mmu.mov_to_cr0(regs.cr0 ^ Cr0::WP, regs.efer, [0; 4])), None);
    assert_eq!(change(|mmu, _| mmu.init()), Some(Sync::All));
}

/// B4, B5, B7, B8: another role is another key, and the root of before is found again with nothing to do.
#[test]
fn b4_roles_are_keys() {
    type Change = fn(&mut Mmu, bool) -> Requests;
    let regs = registers(&BASE).0;
    assert!(regs.cr0.contains(Cr0::WP) && regs.efer.contains(Efer::NXE));
    let changes: [Change; 3] = [
        |mmu, back| {
            let regs = registers(&Machine { wp: back, ..BASE }).0;
            mmu.mov_to_cr0(regs.cr0, regs.efer, [0; 4])
        },
        |mmu, back| mmu.wrmsr_efer(registers(&Machine { nxe: back, ..BASE }).0.efer),
        |mmu, back| {
            let (state, mut cpu) = (*mmu.state(), registers(&BASE).1);
            cpu.max_phys_addr -= u8::from(!back);
            mmu.set_from_outside(state, cpu)
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut world = world();
        world.access(0, VA, What::Write, Who::User);
        let first = world.vcpus[0].mmu.root();
        assert!(change(&mut world.vcpus[0].mmu, false).load);
        world.carry_out(0);
        assert_ne!(world.vcpus[0].mmu.root(), first);
        let back = change(&mut world.vcpus[0].mmu, true);
        assert!(!back.load);
        if number != 2 {
            assert_eq!(back, Requests { flush: TagFlush::All, ..Requests::NONE });
        }
        world.carry_out(0);
        assert_eq!(world.vcpus[0].mmu.root(), first);
        assert!(world.hardware(0, VA, What::Write, Who::User).is_some(), "nothing was torn down");
        world.finish();
    }
}

/// CR0.WP cleared and set again, and nothing that would need another root in between: the vCPU runs on.
#[test]
fn cr0_wp_cleared_for_nothing_switches_no_root() {
    let mut world = world();
    world.access(0, VA, What::Read, Who::User);
    let mmu = &mut world.vcpus[0].mmu;
    let (root, cr0) = (mmu.root(), mmu.state().regs.cr0);
    drop(mmu.enter(world.memory, CPU));
    for _ in 0..100 {
        for wp in [false, true] {
            assert!(mmu.mov_to_cr0_wp(if wp { cr0 | Cr0::WP } else { cr0.difference(Cr0::WP) }));
            assert_eq!((mmu.root(), mmu.role().flags().contains(RoleFlags::WP)), (root, wp));
            assert_eq!(mmu.enter(world.memory, CPU).flush(), TagFlush::None);
        }
    }
    assert!(!mmu.mov_to_cr0_wp(cr0.difference(Cr0::PG | Cr0::WP)), "that is more than WP");
    world.finish();
}

/// CR0.WP cleared, and a supervisor's write to a read-only page: the first one switches roots, and for a while each time WP
/// is cleared does. Set again, the page is read-only again.
#[test]
fn cr0_wp_cleared_lets_the_supervisor_write() {
    for walks in [false, true] {
        let mut world = world();
        world.walks = walks;
        world.store(ENTRY, 0x1_0000 | 0x65);
        world.flush(0);
        assert_eq!(world.access_as(0, VA, What::Write, Who::Supervisor, CACHING), Ended::Fault(3));
        for _ in 0..20 {
            world.mov_to_cr0(0, true, false, true);
            assert_eq!(world.access_as(0, VA, What::Write, Who::Supervisor, CACHING), Ended::At(VA));
            assert_eq!(world.access_as(0, VA, What::Write, Who::User, CACHING), Ended::Fault(7));
            world.mov_to_cr0(0, true, true, true);
            assert_eq!(world.access_as(0, VA, What::Write, Who::Supervisor, CACHING), Ended::Fault(3));
        }
        world.finish();
    }
}

/// CR0.WP cleared where it was needed before: the root is switched at once, and found again.
#[test]
fn cr0_wp_cleared_to_write_switches_at_once_from_then_on() {
    let mut world = world();
    world.store(ENTRY, 0x1_0000 | 0x65);
    world.flush(0);
    let (first, cr0) = (world.vcpus[0].mmu.root(), world.vcpus[0].mmu.state().regs.cr0);
    let off = cr0.difference(Cr0::WP);
    world.vcpus[0].m.wp = false;
    assert!(world.vcpus[0].mmu.mov_to_cr0_wp(off));
    assert_eq!(world.access(0, VA, What::Write, Who::Supervisor), Ended::At(VA));
    let second = world.vcpus[0].mmu.root();
    assert_ne!(second, first);
    let efer = world.vcpus[0].mmu.state().regs.efer;
    let World { kind, vcpus, memory, .. } = &mut world;
    let (mmu, mut guard) = (&mut vcpus[0].mmu, memory.exclusive(CPU));
    for wp in [true, false].repeat(3) {
        let new = if wp { cr0 } else { off };
        assert!(!mmu.mov_to_cr0_wp(new), "the root is another");
        assert!(mmu.mov_to_seen_cr0(kind, &mut guard, new, efer).is_some());
        assert_eq!(mmu.root(), if wp { first } else { second });
    }
    drop(guard);
    world.finish();
}

/// SMEP and SMAP are applied by the processor as it walks, so with CR0.WP they change no root.
#[test]
fn b4_smep_and_smap_change_no_root() {
    let mut world = world();
    let root = world.vcpus[0].mmu.root();
    let done = world.vcpus[0].mmu.mov_to_cr4(Cr4::PAE | Cr4::SMAP, [0; 4]);
    assert_eq!((done, world.vcpus[0].mmu.root()), (Requests::NONE, root));
}

/// SMI and RSM: another address space, and back to the root of before.
#[test]
fn smm_has_roots_of_its_own() {
    let mut world = world();
    let first = world.vcpus[0].mmu.root();
    let inside = PagingState { smm: true, ..PagingState::RESET };
    let outside = *world.vcpus[0].mmu.state();
    assert!(world.vcpus[0].mmu.switch_smm(inside).load);
    world.carry_out(0);
    assert!(world.vcpus[0].mmu.root_role().base().vcpu().smm);
    let back = world.vcpus[0].mmu.switch_smm(outside);
    assert_eq!((back.load, back.sync), (false, Some((Sync::All, RootSet::CURRENT))));
    world.carry_out(0);
    assert_eq!(world.vcpus[0].mmu.root(), first);
    world.finish();
}

/// Intel SDM vol. 3, 4.10.4.1: a fault by what is present takes the address away by itself, so a guest that changes the entry
/// in its handler need not flush.
#[test]
fn c5_a_delivered_page_fault_takes_its_address_away() {
    let mut world = world();
    world.store(ENTRY, 0x1_0000 | 0x65);
    world.flush(0);
    assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(VA));
    world.guest_store(0, 0x4000 + 0x20 * 8, 0x2_0000 | 0x67);
    assert_eq!(world.access_as(0, VA, What::Write, Who::User, CACHING), Ended::Fault(7));
    world.guest_store(0, ENTRY, 0x1_1000 | 0x65);
    let _ = world.access_as(0, VA, What::Read, Who::User, CACHING);
    assert_eq!(world.access_as(0, VA, What::Write, Who::User, CACHING), Ended::Fault(7));
    assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(0x1_1008));
    let mmu = &mut world.vcpus[0].mmu;
    let at = Gva::new(VA);
    assert_eq!(mmu.page_fault(at).sync, Some((Sync::Address(at), RootSet::CURRENT)));
    world.finish();
}

/// The same of a fault by what is not present: what was there before may be in a TLB.
#[test]
fn c5_a_page_fault_takes_away_what_was_there_before() {
    for walks in [false, true] {
        let mut world = world();
        world.walks = walks;
        world.store(ENTRY, 0x1_0000 | 0x27);
        world.flush(0);
        assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(VA), "clean");
        world.guest_store(0, 0x4000 + 0x20 * 8, 0x2_0000 | 0x67);
        world.guest_store(0, ENTRY, 0);
        assert_eq!(world.access_as(0, VA, What::Write, Who::User, CACHING), Ended::Fault(6));
        world.guest_store(0, ENTRY, 0x1_1000 | 0x67);
        assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(0x1_1008));
        world.finish();
    }
}

/// A root that is gone has no successor in the tag: whichever the vCPU goes back to, the tag is flushed.
#[test]
fn c4_a_root_in_the_place_of_one_that_is_gone_is_flushed_for() {
    let mut world = with_pcids(Tags::One);
    world.access(0, VA, What::Read, Who::Supervisor);
    world.zap_range(GfnRange::of(Gfn::new_truncate(6)));
    drop(world.vcpus[0].mmu.enter(world.memory, CPU));
    let m = world.vcpus[0].m;
    let (paging, cpu) = registers(&m);
    let context = PagingContext::<Gva, Gpa>::new(CpuRole::new(&paging, &cpu));
    let (va, how) = (Gva::new(VA), access(What::Read, Who::Supervisor));
    let walk = context.walk(&world.memory.shared(CPU), &regs(&m), va, how).unwrap();
    let World { kind, cache, vcpus, memory, .. } = &mut world;
    let (mmu, mut guard) = (&mut vcpus[0].mmu, memory.exclusive(CPU));
    assert_eq!(mmu.fault(kind, &mut guard, cache, &walk, va, how).outcome, ShadowFault::NoRoot);
    assert!(mmu.mov_to_seen_cr3(kind, &mut guard, 0x1002 | NO_FLUSH).is_some());
    drop(guard);
    assert_eq!(mmu.enter(memory, CPU).flush(), TagFlush::All);
}

/// The fifth root takes the place of the one used least lately.
#[test]
fn d9_the_least_recently_used_root_goes() {
    let mut world = with_pcids(Tags::One);
    let _ = world.vcpus[0].mmu.mov_to_cr3(0x1000 | NO_FLUSH, [0; 4]);
    world.mov_to_cr3(0, 0x6002, false);
    world.carry_out(0);
    // Of 0x6002, 0x1000, 0x6001, 0x1002 and 0x1001, the last is gone.
    for (cr3, kept) in [(0x1000, true), (0x6001, true), (0x1002, true), (0x6002, true), (0x1001, false)] {
        assert_eq!(world.vcpus[0].mmu.mov_to_cr3(cr3 | NO_FLUSH, [0; 4]).load, !kept, "{cr3:#x}");
    }
    world.finish();
}

/// Two keys never share what is up to date: the same table under another PCID is another root of the cache.
#[test]
fn d9_a_table_under_two_pcids_is_two_roots() {
    let mut world = with_pcids(Tags::One);
    world.mov_to_cr3(0, 0x1001, true);
    world.access(0, VA, What::Write, Who::User);
    world.guest_store(0, ENTRY, 0x1_1000 | 0x67);
    assert_eq!(world.hardware(0, VA, What::Read, Who::User), Some(VA), "PCID 1 has not flushed");
    world.mov_to_cr3(0, 0x1003, true);
    assert_eq!(world.access(0, VA, What::Read, Who::User), Ended::At(0x1_1008), "PCID 3 has nothing old");
    world.finish();
}

/// Where every translation is cached, and used, as often as possible.
const CACHING: How = How { hit: true, resume: true, keep: true, ahead: None };

/// Stale translations in previous roots, after a flush of everything: "stale guest flush with TDP off".
#[test]
fn stale_guest_flush_with_tdp_off_a_previous_root_is_synced_before_it_is_used() {
    for what in [Invpcid::All, Invpcid::AllButGlobal, Invpcid::Single { pcid: 1 }] {
        let mut world = with_pcids(Tags::PerRoot);
        assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(VA));
        world.mov_to_cr3(0, 0x1002, false);
        world.guest_store(0, ENTRY, 0x1_1000 | 0x67);
        world.invpcid(0, what);
        world.mov_to_cr3(0, 0x6001, true);
        assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(0x1_1008));
        world.finish();
    }
}

/// "PCIDE toggle": roots from before PCIDs were on, or from when they were last on, are not taken for current.
#[test]
fn pcide_toggle_leaves_no_stale_previous_root() {
    let mut world = with_pcids(Tags::One);
    assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(VA));
    // Off, which flushes all PCIDs; CR3 has low bits that mean nothing.
    world.mov_to_cr4(0, BASE, 0);
    world.mov_to_cr3(0, 0x1018, false);
    assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(VA));
    world.mov_to_cr3(0, 0x6000, false);
    world.guest_store(0, ENTRY, 0x1_1000 | 0x67);
    world.mov_to_cr4(0, BASE, PCIDE);
    for cr3 in [0x6001, 0x1018] {
        world.mov_to_cr3(0, cr3, true);
        assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(0x1_1008), "{cr3:#x}");
    }
    world.finish();
}

/// CVE-2022-1789: every invalidation instruction in every paging mode, CR0.PG = 0 included.
#[test]
fn cve_2022_1789_invalidations_in_every_mode() {
    let address = Gva::new(VA);
    let modes = [
        BASE,
        Machine { la57: true, ..BASE },
        Machine { lma: false, ..BASE },
        Machine { lma: false, pae: false, nxe: false, ..BASE },
        Machine { lma: false, pg: false, ..BASE },
    ];
    for m in modes {
        let mut world = World::new(m, 64, vec![VA], |ram| {
            guest(ram);
            ram.set(0x1000, if m.lma { 0x2067 } else { 0x2001 });
        });
        for what in [
            Invpcid::Address { pcid: 0, address },
            Invpcid::Single { pcid: 0 },
            Invpcid::All,
            Invpcid::AllButGlobal,
        ] {
            world.invpcid(0, what);
            world.access(0, VA, What::Read, Who::Supervisor);
        }
        world.invlpg(0, VA);
        world.invlpg(0, u64::MAX);
        world.mov_to_cr3(0, m.cr3, true);
        world.access(0, VA, What::Read, Who::Supervisor);
        if !m.pg {
            let mmu = &mut world.vcpus[0].mmu;
            for requests in [mmu.invlpg(address), mmu.flush_guest(), mmu.mov_to_cr3(0x5000, [0; 4])] {
                assert_eq!(requests, Requests::NONE, "a direct root ignores the pointer");
            }
        }
        world.finish();
    }
}

/// "CR0.WP passthrough stale metadata": a toggled WP is seen by the walk and by the shadow alike, at once and both ways.
#[test]
fn cr0_wp_passthrough_stale_metadata() {
    let mut world = world();
    world.store(ENTRY, 0x1_0000 | 0x65);
    world.flush(0);
    for _ in 0..3 {
        world.mov_to_cr0(0, true, false, true);
        assert_eq!(world.access_as(0, VA, What::Write, Who::Supervisor, CACHING), Ended::At(VA));
        world.mov_to_cr0(0, true, true, true);
        assert_eq!(world.access_as(0, VA, What::Write, Who::Supervisor, CACHING), Ended::Fault(3));
    }
    world.finish();
}

/// 4346db6e6e7a: registers that are set from outside leave no translation of before, in the tag either.
#[test]
fn commit_4346db6e6e7a_registers_set_from_outside_flush() {
    let mut world = world();
    assert_eq!(world.access_as(0, VA, What::Write, Who::User, CACHING), Ended::At(VA));
    world.guest_store(0, ENTRY, 0x1_1000 | 0x67);
    let state = regs_with(&world, |_| ());
    let done = world.vcpus[0].mmu.set_from_outside(state, registers(&BASE).1);
    assert_eq!(done, Requests { flush: TagFlush::All, ..sync(Sync::All, RootSet::CURRENT) });
    world.switch(0, BASE);
    assert_eq!(world.access_as(0, VA, What::Read, Who::User, CACHING), Ended::At(0x1_1008));
    world.finish();
    // With a direct kind the tag has the guest's own translations.
    let vm = Vm::new(AMD, &[(0, 1024, RW, 0)]);
    let mut mmu = Mmu::direct(state, registers(&BASE).1, vm.kind.root());
    drop(mmu.enter(&vm.memory, CPU));
    assert_eq!(mmu.set_from_outside(state, registers(&BASE).1).flush, TagFlush::All);
    assert_eq!(mmu.enter(&vm.memory, CPU).flush(), TagFlush::All);
}

/// 03a6e84069d1: INIT leads out of every mode, and nothing of before is left.
#[test]
fn commit_03a6e84069d1_init_in_each_paging_mode() {
    for m in [
        BASE,
        Machine { wp: false, ..BASE },
        Machine { la57: true, ..BASE },
        Machine { lma: false, ..BASE },
        Machine { lma: false, pae: false, nxe: false, ..BASE },
        Machine { lma: false, pg: false, ..BASE },
    ] {
        let mut world = World::new(m, 64, vec![VA], guest);
        world.access(0, VA, What::Read, Who::Supervisor);
        world.init(0);
        let mmu = &world.vcpus[0].mmu;
        assert_eq!(*mmu.state(), PagingState::RESET);
        assert!(mmu.root_role().is_direct());
        assert_eq!(world.access(0, VA, What::Write, Who::Supervisor), Ended::At(VA));
        world.finish();
    }
    let mut world = with_pcids(Tags::One);
    let left = RootSet::PREVIOUS_0 | RootSet::PREVIOUS_1 | RootSet::PREVIOUS_2;
    assert_eq!(world.vcpus[0].mmu.init().sync, Some((Sync::All, left)), "no root is taken for current later");
}

/// A CR3 outside RAM is legal: every access is a page fault until the guest loads another, or there is RAM.
#[test]
fn invalid_cr3() {
    let mut world = world();
    for cr3 in [0x4000_0000, 0x3f_ffff_f000] {
        world.mov_to_cr3(0, cr3, false);
        assert_eq!(world.access(0, VA, What::Read, Who::User), Ended::Fault(4));
        assert_eq!(world.access(0, VA, What::Write, Who::Supervisor), Ended::Fault(2));
        world.mov_to_cr3(0, 0x1000, false);
        assert_eq!(world.access(0, VA, What::Read, Who::User), Ended::At(VA));
    }
    world.finish();
}

/// The slot with the top table goes and comes back: the vCPU notices, in either state, and the table is shadowed anew.
#[test]
fn invalid_cr3_where_the_root_tables_slot_comes_and_goes() {
    let mut world = world();
    let top = 0x1_2000;
    world.store(top, 0x2000 | 0x67);
    for vcpu in 0..2 {
        world.mov_to_cr3(vcpu, top, false);
        assert_eq!(world.access(vcpu, VA & 0xff, What::Read, Who::User), Ended::At(VA & 0xff));
    }
    for _ in 0..2 {
        world.change_slot(None);
        world.check();
        assert_eq!(world.access(0, 8, What::Read, Who::User), Ended::Fault(4));
        world.mov_to_cr3(1, top, false);
        assert_eq!(world.access(1, 8, What::Read, Who::User), Ended::Fault(4));
        world.change_slot(Some(false));
        world.check();
        for vcpu in 0..2 {
            assert_eq!(world.access(vcpu, 8, What::Read, Who::User), Ended::At(8));
        }
        // The table's writes are seen.
        assert_eq!(world.guest_store(0, 0x1_2000, 0x7000 | 0x67), Ended::Emulated(0x1_2000));
        world.guest_store(0, 0x1_2000, 0x2000 | 0x67);
        world.flush(0);
    }
    world.finish();
}

/// Roots that are kept for later give their pages up when the quota is used up.
#[test]
fn full_previous_roots_go_first() {
    let addresses = (0..64).map(|page| page << 12 | 8).collect();
    let mut world = World::new(BASE, 8, addresses, guest);
    world.mov_to_cr4(0, BASE, PCIDE);
    for cr3 in [0x1001, 0x6002, 0x1003, 0x6004, 0x2001, 0x3001] {
        world.mov_to_cr3(0, cr3, false);
        world.access(0, VA, What::Write, Who::User);
    }
    world.mov_to_cr3(0, 0x1001, true);
    assert_eq!(world.access(0, VA, What::Write, Who::User), Ended::At(VA));
    world.finish();
}

/// ee6268ba3a68, B5: roots for L2 over 32-bit nested tables are kept and found like all others.
#[test]
fn commit_ee6268ba3a68_roots_of_32_bit_nested_tables_are_kept() {
    let mut world = world();
    let cpu = registers(&BASE).1;
    let of = |m: &Machine| CpuRole::nested(&registers(m).0, &cpu, false);
    let short = of(&Machine { lma: false, pae: false, ..BASE });
    let pae = of(&Machine { lma: false, ..BASE });
    let mut tdp12 = Mmu::shadow(PagingState::RESET, cpu, Level::L4, true, Tags::One);
    let mut roots = vec![];
    for (role, pdptes) in [(short, [0; 4]), (pae, [0x2001, 0, 0, 0]), (of(&BASE), [0; 4])] {
        assert!(tdp12.set_nested(role, 0x1000, pdptes, 1).load);
        world.tables.fill(&mut world.cache);
        let mut guard = world.memory.exclusive(CPU);
        assert_eq!(tdp12.carry_out(&mut world.kind, &mut guard, &mut world.cache).outcome, Ok(()));
        assert_eq!(tdp12.root().level, Level::L4, "the CPU walks its own depth");
        roots.push((role, pdptes, tdp12.root()));
    }
    for (role, pdptes, root) in roots {
        assert!(!tdp12.set_nested(role, 0x1000, pdptes, 1).is_work());
        assert_eq!(tdp12.root(), root);
        assert!(tdp12.set_nested(role, 0x1000, pdptes, 2).load, "another ASID has flushed nothing");
        assert!(!tdp12.set_nested(role, 0x1000, pdptes, 1).is_work());
    }
    let _ = tdp12.unload(&mut world.kind, &mut world.memory.exclusive(CPU));
    world.finish();
}

/// With a direct kind all of this is the processor's, and there is one root for all.
#[test]
fn a_direct_vcpu_has_one_root_and_no_requests() {
    let mut vm = Vm::new(AMD, &[(0, 1024, RW, 0)]);
    let (state, cpu) = (PagingState { cr3: 0x1000, ..PagingState::RESET }, registers(&BASE).1);
    let mut mmu = Mmu::direct(state, cpu, vm.kind.root());
    drop(mmu.enter(&vm.memory, CPU));
    let regs = registers(&BASE).0;
    let requests = [
        mmu.mov_to_cr4(regs.cr4 | Cr4::PGE | Cr4::PCIDE, [0; 4]),
        mmu.mov_to_cr0(regs.cr0, regs.efer, [0; 4]),
        mmu.mov_to_cr3(0x5000, [0; 4]),
        mmu.wrmsr_efer(Efer::LMA),
        mmu.invlpg(Gva::new(VA)),
        mmu.invpcid(Invpcid::All),
        mmu.flush_guest(),
        mmu.init(),
    ];
    assert!(requests.iter().all(|&requests| requests == Requests::NONE));
    assert_eq!(mmu.enter(&vm.memory, CPU).flush(), TagFlush::None);
    // Another address space is another root.
    assert!(mmu.switch_smm(PagingState { smm: true, ..PagingState::RESET }).load);
    assert!(mmu.enter(&vm.memory, CPU).is_obsolete());
    vm.tables.fill(&mut vm.cache);
    let done = mmu.carry_out_direct(&vm.kind, &mut vm.memory.exclusive(CPU), &mut vm.cache);
    assert_eq!(done, Ok(()));
    assert_ne!(mmu.root(), vm.kind.root());
    assert_eq!(mmu.enter(&vm.memory, CPU).flush(), TagFlush::All);
    assert_eq!(mmu.switch_smm(PagingState::RESET), Requests { flush: TagFlush::All, ..Requests::NONE });
    assert_eq!(mmu.root(), vm.kind.root());
}

/// C6: L1 and L2 have tags and roots of their own, so entries and exits of L2 ask for nothing.
#[test]
fn c6_l1_and_l2_have_an_mmu_each() {
    let mut world = world();
    let vm = Vm::new(AMD, &[(0, 1024, RW, 0)]);
    let cpu: GuestCpu = registers(&BASE).1;
    let l1 = CpuRole::new(&registers(&BASE).0, &cpu);
    let nested = CpuRole::nested(&registers(&BASE).0, &cpu, false);
    let root_mmu = Mmu::direct(PagingState::RESET, cpu, vm.kind.root());
    let tdp12_mmu = Mmu::shadow(PagingState::RESET, cpu, Level::L4, true, Tags::One);
    let mut mmus = VcpuMmus::new(root_mmu, tdp12_mmu, l1, l1, nested);
    drop(mmus.mmu_mut().enter(&vm.memory, CPU));
    assert_eq!(mmus.running(), Running::Root);
    assert!(matches!(mmus.walk(), Walk::L1(_)));
    assert!(mmus.enter_nested(nested, 0x1000, [0; 4], 1).load);
    assert_eq!(mmus.running(), Running::Tdp12);
    assert!(matches!(mmus.walk(), Walk::L2(_)));
    world.tables.fill(&mut world.cache);
    let mut guard = world.memory.exclusive(CPU);
    let done = mmus.mmu_mut().carry_out(&mut world.kind, &mut guard, &mut world.cache);
    assert_eq!(done.outcome, Ok(()));
    drop(guard);
    drop(mmus.mmu_mut().enter(world.memory, CPU));
    for _ in 0..2 {
        assert_eq!(mmus.leave_nested(), Requests::NONE);
        assert_eq!(mmus.mmu_mut().enter(&vm.memory, CPU).flush(), TagFlush::None);
        assert_eq!(mmus.enter_nested(nested, 0x1000, [0; 4], 1), Requests::NONE);
        assert_eq!(mmus.mmu_mut().enter(world.memory, CPU).flush(), TagFlush::None);
    }
    let _ = mmus.tdp12_mmu.unload(&mut world.kind, &mut world.memory.exclusive(CPU));
    world.finish();
}
