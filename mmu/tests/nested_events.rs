//! What L1 does to translations of L2, one event at a time: each with its scope, and no more than that.
mod support;

use mmu::{Gva, Invvpid, L2Request, L2Tag, Roots, TableAddress, TagFlush, TlbControl};
use support::l1::{belows, ept_setup, npt_setup, pae_setup, EPT, L2, L2_UNPAGED, NPT, ROOT_A, ROOT_B};
use support::machines::{Amd, Intel, AMD, INTEL};
use support::manual::{ept, Machine, What, Who};
use support::nested::{Ended, World};
use support::two_stage::{Below, Exit};

/// No mode-based execute control: a processor without.
const VMX: Intel = Intel { mode_based_execute: false, ..INTEL };

fn vmx(own_tags: bool) -> World<Intel> {
    let below = Below::Ept(EPT);
    let mut world = World::new(VMX, below, L2, own_tags, 64, ept_setup);
    world.belows = belows(below);
    world
}

fn svm(own_tags: bool) -> World<Amd> {
    let below = Below::Npt(NPT);
    let mut world = World::new(AMD, below, L2, own_tags, 64, npt_setup);
    world.belows = belows(below);
    world
}

/// L1's entry for page `page` of L2, in the tree A.
fn entry(page: u64) -> u64 {
    0x4000 + page * 8
}

const RW: u64 = 0x337 | 0x400;

/// L2 makes A's lowest table one that it writes to without exits.
fn unsync<H: support::machines::Machine>(world: &mut World<H>) {
    let kept = world.ram().get(entry(15)).unwrap();
    assert!(matches!(world.l2_store(0, (20 << 12) | (15 * 8), kept), Ended::At(_)));
    assert_ne!(world.kind.unsync_pages(), 0);
}

fn read<H: support::machines::Machine>(world: &mut World<H>, page: u64) -> Ended {
    world.access(0, page << 12, What::Read, Who::User, true)
}

fn at(frame: u64) -> Ended {
    Ended::At(frame << 12)
}

/// G5, B6: single-context INVEPT names a table, not a pointer; it syncs what it names, and frees nothing.
#[test]
fn g5_invept_names_a_table_whatever_else_the_pointer_says() {
    for (pointer, covered) in
        [(ROOT_A | 0x1e, true), (ROOT_A | 0x5e, true), (ROOT_A | 0x26, true), (ROOT_B | 0x5e, false)]
    {
        let mut world = vmx(true);
        unsync(&mut world);
        assert_eq!(read(&mut world, 1), at(65));
        let tables = world.kind.page_counts().tables;
        world.l1_store(0, entry(1), 8, 70 << 12 | RW);
        assert_eq!(read(&mut world, 1), at(65), "stale, as a TLB is");
        world.invept(0, Some(pointer));
        assert_eq!(read(&mut world, 1), at(if covered { 70 } else { 65 }));
        assert_eq!(world.kind.page_counts().tables, tables);
        world.invept(0, None);
        assert_eq!(read(&mut world, 1), at(70), "global");
        world.finish();
    }
}

/// G5: two EPT pointers with one table share the invalidation, in a root that is not the current one as well.
#[test]
fn g5_two_pointers_with_one_table_share_the_invalidation() {
    let mut world = vmx(true);
    // The same table without flags.
    world.switch(0, 2, 1);
    read(&mut world, 1);
    world.switch(0, 0, 1);
    unsync(&mut world);
    read(&mut world, 1);
    world.l1_store(0, entry(1), 8, 70 << 12 | RW);
    world.invept(0, Some(ROOT_A | 0x5e));
    assert_eq!(read(&mut world, 1), at(70));
    world.switch(0, 2, 1);
    assert_eq!(read(&mut world, 1), at(70));
    world.finish();
}

/// C5: INVEPT leaves what L2's own tables said.
#[test]
fn c5_invept_is_no_matter_of_linear_addresses() {
    let mut tag = L2Tag::new(true);
    let _ = tag.vm_entry(Some(3));
    let request = tag.invept_single(ROOT_A | 0x1e);
    assert_eq!(request, L2Request { roots: Roots::Of(TableAddress::new(ROOT_A)), ..L2Request::NONE });
    assert_eq!(tag.invept_global(), L2Request { roots: Roots::All, ..L2Request::NONE });
}

/// C5: INVVPID takes linear translations of the VPID that it names, if L2's tag holds that one's.
#[test]
fn c5_invvpid_of_each_type() {
    let address = Gva::new(0x5000);
    let l2 = |l2| L2Request { l2, ..L2Request::NONE };
    let mut tag = L2Tag::new(true);
    assert_eq!(tag.invvpid(Invvpid::All), L2Request::NONE, "nothing is held");
    assert_eq!(tag.vm_entry(Some(3)), l2(TagFlush::All), "C4: nobody knows what the tag has");
    assert_eq!(tag.vm_exit(Some(3)), L2Request::NONE);
    assert_eq!(tag.vm_entry(Some(3)), L2Request::NONE, "B9: a tag of its own");
    assert_eq!(tag.invvpid(Invvpid::Address { vpid: 3, address }), l2(TagFlush::Address(address)));
    assert_eq!(tag.invvpid(Invvpid::Address { vpid: 4, address }), L2Request::NONE);
    for (vpid, flush) in [(3, TagFlush::All), (4, TagFlush::None)] {
        assert_eq!(tag.invvpid(Invvpid::Single { vpid }), l2(flush));
        assert_eq!(tag.invvpid(Invvpid::SingleRetainingGlobals { vpid }), l2(flush));
    }
    assert_eq!(tag.invvpid(Invvpid::All), l2(TagFlush::All));
    assert_eq!(tag.vm_entry(Some(4)), l2(TagFlush::All), "another VPID");
}

/// C5: VPID 0000H is L1's, too: entries and exits of an L2 without VPID take the linear translations of both.
#[test]
fn c5_without_a_vpid_transitions_flush_both_sides() {
    let mut tag = L2Tag::new(true);
    let both = L2Request { l2: TagFlush::All, l1: TagFlush::All, ..L2Request::NONE };
    assert_eq!(tag.vm_entry(None), both);
    assert_eq!(tag.vm_exit(None), L2Request { l1: TagFlush::All, ..L2Request::NONE });
    assert_eq!(tag.vm_entry(None), both);
}

/// C6: with one tag for both, each transition flushes it; with two, none does.
#[test]
fn c6_one_tag_for_both_is_flushed_by_each_transition() {
    let mut tag = L2Tag::new(false);
    for _ in 0..2 {
        assert_eq!(tag.vm_entry(Some(3)).l2, TagFlush::All);
        assert_eq!(tag.vm_exit(Some(3)).l1, TagFlush::All);
        assert_eq!(tag.vmrun(3, TlbControl::Nothing).l2, TagFlush::All);
        assert_eq!(tag.vmexit().l1, TagFlush::All);
    }
    for own_tags in [false, true] {
        let mut world = vmx(own_tags);
        read(&mut world, 1);
        let before = world.flushes;
        for _ in 0..10 {
            world.leave_l2(0);
            read(&mut world, 1);
        }
        assert_eq!(world.flushes - before, if own_tags { 0 } else { 10 });
        world.finish();
    }
}

/// C5: TLB_CONTROL of VMRUN.
#[test]
fn c5_tlb_control_of_each_value() {
    let mut tag = L2Tag::new(true);
    let new = |l2, roots, l1| L2Request { roots, l2, l1 };
    let (none, all) = (TagFlush::None, TagFlush::All);
    assert_eq!(tag.vmrun(1, TlbControl::Nothing), new(all, Roots::None, none), "C4: a fresh tag");
    assert_eq!(tag.vmrun(1, TlbControl::Nothing), L2Request::NONE);
    assert_eq!(tag.vmrun(2, TlbControl::Nothing), new(all, Roots::None, none), "another ASID");
    assert_eq!(tag.vmrun(2, TlbControl::Asid), new(all, Roots::Asid(2), none));
    assert_eq!(tag.vmrun(2, TlbControl::AsidRetainingGlobals), new(all, Roots::Asid(2), none));
    assert_eq!(tag.vmrun(2, TlbControl::Everything), new(all, Roots::All, all));
    let known = [0, 1, 3, 7];
    assert!((0..=255).all(|value| TlbControl::new(value).is_some() == known.contains(&value)));
}

/// C5: INVLPGA takes an address of the ASID that it names: of L1 itself, of the last L2, or of one that the tag does not hold.
#[test]
fn c5_invlpga() {
    let mut tag = L2Tag::new(true);
    let _ = tag.vmrun(5, TlbControl::Nothing);
    let address = Gva::new(0x5000);
    let at = TagFlush::Address(address);
    assert_eq!(tag.invlpga(address, 0), L2Request { l1: at, ..L2Request::NONE });
    assert_eq!(tag.invlpga(address, 5), L2Request { l2: at, roots: Roots::Asid(5), ..L2Request::NONE });
    assert_eq!(tag.invlpga(address, 6), L2Request { roots: Roots::Asid(6), ..L2Request::NONE });
}

/// C5 on SVM: a flush of the ASID shows what L1 has changed; a VMRUN without one, or a flush of another, need not.
#[test]
fn c5_a_flush_of_the_asid_syncs_its_roots() {
    let mut world = svm(true);
    unsync(&mut world);
    assert_eq!(read(&mut world, 1), at(65));
    world.l1_store(0, entry(1), 8, 70 << 12 | 0x67);
    assert_eq!(read(&mut world, 1), at(65), "stale");
    world.leave_l2(0);
    world.enter_l2(0, TlbControl::Asid);
    assert_eq!(read(&mut world, 1), at(70));
    unsync(&mut world);
    world.l1_store(0, entry(1), 8, 71 << 12 | 0x67);
    world.invlpga(0, 1 << 12, 2);
    assert_eq!(read(&mut world, 1), at(70), "another ASID's");
    world.invlpga(0, 1 << 12, 1);
    assert_eq!(read(&mut world, 1), at(71));
    world.finish();
}

/// C6: an ASID that L1 has not used before has nothing old, although L2's tag is the same.
#[test]
fn c6_a_new_asid_starts_afresh() {
    let mut world = svm(true);
    unsync(&mut world);
    assert_eq!(read(&mut world, 1), at(65));
    world.l1_store(0, entry(1), 8, 70 << 12 | 0x67);
    world.switch(0, 0, 2);
    assert_eq!(read(&mut world, 1), at(70));
    world.finish();
}

/// C6: another VPID, or ASID, has nothing of what the tag holds of L2's linear addresses.
#[test]
fn c6_another_name_has_no_linear_translation_of_the_last() {
    fn check<H: support::machines::Machine>(mut world: World<H>) {
        assert_eq!(read(&mut world, 6), at(70));
        // L2 turns to another page without a word, and is known by another name.
        let leaf = (27 << 12) | (6 * 8);
        assert!(matches!(world.l2_store(0, leaf, 7 << 12 | 0x67), Ended::At(_)));
        assert_eq!(read(&mut world, 6), at(70), "stale");
        world.switch(0, 0, 2);
        assert_eq!(read(&mut world, 6), at(71));
        world.finish();
    }
    check(vmx(true));
    check(svm(true));
}

/// C8: an EPT violation that L1 sees invalidates what it was about, so L1 may make anything of the entry without INVEPT.
#[test]
fn c8_a_violation_invalidates_its_address() {
    let mut world = vmx(true);
    unsync(&mut world);
    world.l1_store(0, entry(1), 8, 65 << 12 | 0x335);
    world.invept(0, None);
    unsync(&mut world);
    assert_eq!(read(&mut world, 1), at(65));
    let write = world.access(0, 0x1000, What::Write, Who::User, true);
    assert_eq!(write, Ended::ToL1(0x1000, Exit::Violation(0x7aa)));
    // Copied on write, elsewhere.
    world.l1_store(0, entry(1), 8, 70 << 12 | RW);
    assert_eq!(read(&mut world, 1), at(70));
    world.finish();
}

/// C1: more rights, or an entry where was none, need no flush.
#[test]
fn c1_an_upgrade_needs_no_invept() {
    let mut world = vmx(true);
    world.l1_store(0, entry(1), 8, 65 << 12 | 0x335);
    world.l1_store(0, entry(2), 8, 0);
    world.invept(0, None);
    unsync(&mut world);
    assert_eq!(read(&mut world, 1), at(65));
    assert!(matches!(read(&mut world, 2), Ended::ToL1(..)));
    world.l1_store(0, entry(1), 8, 65 << 12 | RW);
    world.l1_store(0, entry(2), 8, 66 << 12 | RW);
    assert_eq!(world.access(0, 0x1000, What::Write, Who::User, true), at(65));
    assert_eq!(read(&mut world, 2), at(66));
    world.finish();
}

/// What L2 flushes of its own is the processor's matter: no exit, no sync.
#[test]
fn c5_flushes_by_l2_take_linear_translations_only() {
    let mut world = vmx(true);
    read(&mut world, 6);
    let leaf = (27 << 12) | (6 * 8);
    let _ = world.l2_store(0, leaf, 7 << 12 | 0x67);
    let here = world.here;
    world.l2_flush(0, Some(0x6000));
    assert_eq!(read(&mut world, 6), at(71));
    let _ = world.l2_store(0, leaf, 8 << 12 | 0x67);
    world.l2_flush(0, None);
    assert_eq!(read(&mut world, 6), at(72));
    assert!(world.here - here <= 2, "only new pages");
    world.finish();
}

/// B4, B5: a switch of EPT pointers finds its root again, with all that was mapped.
#[test]
fn b5_a_switch_of_pointers_finds_its_root_again() {
    let mut world = vmx(true);
    let roots = [0, 1, 0, 1].map(|below| {
        world.switch(0, below, 1);
        assert_eq!(read(&mut world, 1), at(if below == 0 { 65 } else { 97 }));
        world.vcpus[0].mmus.tdp12_mmu.root()
    });
    assert_eq!((roots[0], roots[1]), (roots[2], roots[3]));
    assert_ne!(roots[0], roots[1]);
    let here = world.here;
    for below in [0, 1, 0] {
        world.switch(0, below, 1);
        read(&mut world, 1);
    }
    assert_eq!(world.here, here, "no fault");
    world.finish();
}

/// CVE-2026-46032: a root that L1 has no memory for. L2 is entered, and its first access is L1's to know; once there is a
/// table, it counts.
#[test]
fn cve_2026_46032_a_root_outside_memory() {
    let nowhere = 0x430 << 12;
    let mut world = vmx(true);
    world.belows.push(Below::Ept(ept::Machine { root: nowhere, ..EPT }));
    world.switch(0, 3, 1);
    world.remember();
    for _ in 0..3 {
        assert_eq!(read(&mut world, 1), Ended::ToL1(0x18000, Exit::Violation(0x83)));
    }
    world.finish();
    let mut world = svm(true);
    for (index, root) in [(2, nowhere), (3, 1056 << 12)] {
        world.belows.push(Below::Npt(Machine { cr3: root, ..NPT }));
        if index == 3 {
            world.toggle_slot(2);
        }
        world.switch(0, index, 1);
        world.remember();
        assert_eq!(read(&mut world, 1), Ended::ToL1(0x18000, Exit::NestedPageFault(0x2_0000_0006)));
    }
    // The slot comes back, and with it a table.
    world.ram().set(1056 << 12, 0x2067);
    world.toggle_slot(2);
    assert_eq!(read(&mut world, 1), at(65));
    // And goes again, while L2 runs on it.
    world.toggle_slot(2);
    world.leave_l2(0);
    world.enter_l2(0, TlbControl::Everything);
    assert_eq!(read(&mut world, 1), Ended::ToL1(0x18000, Exit::NestedPageFault(0x2_0000_0006)));
    world.finish();
}

/// P8: PAE's pointers of an L1 are memory: one that appears is seen without a flush, one that changes by the next VMRUN that
/// flushes.
#[test]
fn commit_ee6268ba3a68_pointers_of_pae_change_under_l2() {
    let below = Below::Npt(Machine { lma: false, ..NPT });
    let mut world = World::new(AMD, below, L2_UNPAGED, true, 64, pae_setup);
    world.physical.push(1 << 30);
    world.remember();
    let high = |world: &mut World<Amd>| world.access(0, 1 << 30, What::Read, Who::User, true);
    assert_eq!(read(&mut world, 1), at(65));
    assert!(matches!(high(&mut world), Ended::ToL1(..)));
    world.linear.push(1 << 30);
    // By another vCPU, while this one stays in L2.
    read(&mut world, 1);
    world.l1_store(1, ROOT_A + 8, 8, 0x8001);
    world.l1_store(1, 0x8000, 8, 0x9067);
    world.l1_store(1, 0x9000, 8, 64 << 12 | 0x67);
    assert_eq!(high(&mut world), at(64));
    world.l1_store(0, ROOT_A, 8, 0x8001);
    world.leave_l2(0);
    world.enter_l2(0, TlbControl::Asid);
    assert_eq!(read(&mut world, 0), at(64));
    assert_eq!(read(&mut world, 1), at(97));
    world.finish();
}

/// G4, D6: L2 reaches tables of L1 and device memory, and read-only memory: L1 sees none of it.
#[test]
fn g4_what_umbra_has_caused_is_not_seen_by_l1() {
    let mut world = vmx(true);
    let access =
        |world: &mut World<Intel>, page: u64, what| world.access(0, page << 12, what, Who::Supervisor, true);
    assert_eq!(access(&mut world, 16, What::Write), Ended::ReadOnly(1040 << 12));
    assert_eq!(access(&mut world, 16, What::Read), at(1040));
    assert_eq!(access(&mut world, 23, What::Read), Ended::Device(1030 << 12));
    // A directory of L1's, which L2 can write to: emulated, and the shadow follows.
    assert_eq!(world.l2_store(0, 21 << 12 | 16, 0), Ended::Emulated(0x3010));
    assert!(matches!(read(&mut world, 30), Ended::ToL1(0x40_0000..=0x40_0fff, Exit::Violation(_))));
    assert_eq!(world.to_l1, 1);
    world.finish();
}

/// A root that is gone is no fault of L1's.
#[test]
fn d7_obsolete_roots_are_replaced() {
    let mut world = vmx(true);
    read(&mut world, 1);
    world.obsolete();
    assert_eq!(read(&mut world, 1), at(65));
    world.zap_obsolete();
    assert_eq!(read(&mut world, 2), at(66));
    world.finish();
}

/// C5: what a sync takes from a leaf is taken from the TLBs, too, be it but the right to fetch or to read.
#[test]
fn c5_invept_takes_every_right_that_l1_has_taken() {
    for (rights, what) in
        [(0x333u64, What::Fetch), (0x334, What::Read), (0x335, What::Write), (0x35f, What::Read)]
    {
        let mut world = vmx(true);
        world.l1_store(0, entry(20), 8, 4 << 12 | 0x333);
        unsync(&mut world);
        // L2 loses its own way to the table, so nothing has to be protected when that is synced.
        assert!(matches!(world.access(0, 20 << 12, What::Fetch, Who::Supervisor, true), Ended::ToL1(..)));
        let access = |world: &mut World<Intel>| world.access(0, 0x1000, what, Who::User, true);
        assert_eq!(access(&mut world), at(65));
        world.l1_store(0, entry(1), 8, 65 << 12 | rights);
        assert_eq!(access(&mut world), at(65), "stale");
        world.invept(0, None);
        assert!(matches!(access(&mut world), Ended::ToL1(0x1000, _)), "{rights:#x}");
        world.finish();
    }
}

/// C5: a table that L1 has unlinked is out of the TLBs after INVEPT, and so is the page of a direct shadow page.
#[test]
fn c5_invept_takes_a_whole_table() {
    for (link, page) in [(0x3010u64, 30u64), (0x3008, 28)] {
        let mut world = vmx(true);
        // The block of 2 MiB is mapped in pieces.
        world.move_frame(520);
        assert!(matches!(read(&mut world, page), Ended::At(_)));
        world.l1_store(0, link, 8, 0);
        world.invept(0, None);
        assert!(matches!(read(&mut world, page), Ended::ToL1(..)));
        world.finish();
    }
}
