//! The guest-table walker against the reference walk, bit by bit and case by case. Complete products are in
//! `walker_worlds.rs`.
mod support;

use std::sync::atomic::Ordering;

use mmu::{Access, AccessKind, BelowError, CpuId, Gva, PdpteError, SlotFlags, WalkError, WalkRegs};
use support::flat::FlatRam;
use support::manual::guest::{
    accesses, compare, compare_fast, context, link, memory, places, regs, roles, slotted, BASE, RAM_BYTES, VA,
};
use support::manual::{Machine, What, Who};

fn widths(base: Machine) -> impl Iterator<Item = Machine> {
    [32, 39, 52].into_iter().flat_map(move |maxphyaddr| {
        (0..16u32).map(move |bits| Machine {
            maxphyaddr,
            nxe: bits & 1 != 0,
            gib_pages: bits & 2 != 0,
            pse36: bits & 4 != 0,
            amd: bits & 8 != 0,
            ..base
        })
    })
}

/// CVE-2017-12188: every level, the large bit or not, every other bit one at a time; each CPU width and feature.
#[test]
fn cve_2017_12188_every_level_large_and_reserved_bit() {
    let memory = memory();
    for levels in [4, 5] {
        let places = places(levels);
        for m in widths(Machine { la57: levels == 5, ..BASE }) {
            let context = context(&m);
            for level in 0..levels as usize {
                for large in [0, 0x80] {
                    for bit in 0..64 {
                        let full = [7 | 0x60; 5];
                        link(&memory, &places, &full[..levels as usize]);
                        let entry = memory.backing().get(places[level]).unwrap();
                        let entry = if large != 0 { entry & 0xfff } else { entry };
                        memory.backing().set(places[level], (entry | large) ^ 1 << bit);
                        compare(&memory, &context, &m, VA, What::Read, Who::User);
                    }
                }
            }
        }
    }
}

#[test]
fn pae_every_bit() {
    let memory = memory();
    let va = 2 << 30 | 7 << 21 | 9 << 12 | 0x123;
    for m in widths(Machine { lma: false, ..BASE }) {
        let context = context(&m);
        for level in 0..3 {
            for large in [0, 0x80] {
                for bit in 0..64 {
                    let entries = [(0x1010, 0x2001), (0x2038, 0x3067), (0x3048, 0x4067)];
                    for (at, entry) in entries {
                        memory.backing().set(at, entry);
                    }
                    let (at, entry) = entries[level];
                    let entry = if large != 0 { entry & 0xfff } else { entry };
                    memory.backing().set(at, (entry | large) ^ 1 << bit);
                    compare(&memory, &context, &m, va, What::Write, Who::Supervisor);
                }
            }
        }
    }
}

#[test]
fn two_levels_every_bit_with_and_without_pse36() {
    let memory = memory();
    let va = 7 << 22 | 9 << 12 | 0x123;
    for pse in [false, true] {
        for m in widths(Machine { lma: false, pae: false, pse, ..BASE }) {
            let context = context(&m);
            for bit in 0..32 {
                for entry in [0x2067u32, 0x0040_00e7] {
                    memory.backing().set_u32(0x101c, entry ^ 1 << bit);
                    memory.backing().set_u32(0x2024, 0x4067);
                    compare(&memory, &context, &m, va, What::Write, Who::User);
                    memory.backing().set_u32(0x101c, 0x2067);
                    memory.backing().set_u32(0x2024, entry ^ 1 << bit);
                    compare(&memory, &context, &m, va, What::Fetch, Who::User);
                }
            }
        }
    }
}

/// F1, F4: which accessed and dirty bits are set, for every combination of those that were, with and without permission.
#[test]
fn accessed_and_dirty_bits_of_every_mode() {
    let memory = memory();
    for levels in [4u64, 5] {
        let places = places(levels);
        let m = Machine { la57: levels == 5, ..BASE };
        let context = context(&m);
        for bits in 0..1u64 << (levels + 1) {
            for rights in [7, 5, 3] {
                let entries: Vec<u64> = (0..levels)
                    .map(|step| {
                        let leaf = step + 1 == levels;
                        let dirty = if leaf { (bits >> levels & 1) << 6 } else { 0 };
                        (if leaf { rights } else { 7 }) | (bits >> step & 1) << 5 | dirty
                    })
                    .collect();
                link(&memory, &places, &entries);
                for (what, who) in accesses() {
                    compare(&memory, &context, &m, VA, what, who);
                }
            }
        }
    }
    let m = Machine { lma: false, pae: false, pse: true, ..BASE };
    let context = context(&m);
    for bits in 0..8u32 {
        for large in [0, 0x80] {
            memory
                .backing()
                .set_u32(0x101c, 0x7 | (bits & 3) << 5 | large | if large == 0 { 0x2000 } else { 0 });
            memory.backing().set_u32(0x2024, 0x4007 | (bits >> 1 & 3) << 5);
            for (what, who) in accesses() {
                compare(&memory, &context, &m, 7 << 22 | 9 << 12 | 0x123, what, who);
            }
        }
    }
}

/// Protection keys: every right of the key, and of no other, for every access.
#[test]
fn protection_keys() {
    let memory = memory();
    let places = places(4);
    for key in [0u64, 1, 15] {
        for rights in 0..4u32 {
            for other in [0, u32::MAX] {
                for role in 0..8 {
                    let pkru = other & !(3 << (2 * key)) | rights << (2 * key);
                    let m =
                        Machine { pkru, pke: role & 1 != 0, wp: role & 2 != 0, smap: role & 4 != 0, ..BASE };
                    let context = context(&m);
                    for leaf in [7u64, 5, 3, 1] {
                        link(&memory, &places, &[0x67, 0x67, 0x67, leaf | 0x60 | key << 59]);
                        for (what, who) in accesses() {
                            compare_fast(&memory, &context, &m, VA, what, who);
                        }
                    }
                }
            }
        }
    }
}

/// Large pages: the address inside the page, for each size; the key is the large leaf's.
#[test]
fn large_pages() {
    let memory = memory();
    let places = places(4);
    let m = Machine { pke: true, pkru: 1 << 10, ..BASE };
    let context = context(&m);
    for level in [1usize, 2] {
        for key in [0u64, 5] {
            link(&memory, &places, &[0x67, 0x67, 0x67, 0x67]);
            memory.backing().set(places[level], 0x3_4000_0000 | 0xe7 | key << 59);
            for (what, who) in accesses() {
                compare(&memory, &context, &m, VA, what, who);
            }
        }
    }
}

/// Unpaged addresses are 32 bits wide, whatever CR3 and CR4 hold.
#[test]
fn unpaged() {
    let memory = memory();
    let m = Machine { pg: false, lma: false, smep: true, smap: true, ..BASE };
    let context = context(&m);
    for va in [0, 0xffff_ffff, 0x1_2345_6789] {
        for (what, who) in accesses() {
            compare(&memory, &context, &m, va, what, who);
        }
    }
}

/// A6: a table outside RAM reads as not present.
#[test]
fn a6_a_table_outside_ram_is_not_present() {
    let memory = memory();
    for (levels, m) in [(4, BASE), (5, Machine { la57: true, ..BASE })] {
        let context = context(&m);
        let places = places(levels);
        for level in 0..levels as usize - 1 {
            link(&memory, &places, &[0x67; 5][..levels as usize]);
            memory.backing().set(places[level], RAM_BYTES | 0x67);
            for (what, who) in accesses() {
                compare(&memory, &context, &m, VA, what, who);
            }
        }
        let m = Machine { cr3: RAM_BYTES, ..m };
        compare(&memory, &context, &m, VA, What::Read, Who::User);
    }
}

/// The PDPTE registers of VMX, where they exist, are used instead of memory.
#[test]
fn pae_with_pdpte_registers() {
    let memory = memory();
    let m = Machine { lma: false, ..BASE };
    let context = context(&m);
    memory.backing().set(0x2038, 0x3067);
    memory.backing().set(0x3048, 0x4067);
    let shared = memory.shared(CpuId::BOOT);
    let va = Gva::new(2 << 30 | 7 << 21 | 9 << 12 | 0x123);
    let read = Access::at_cpl(AccessKind::Read, 3);
    let regs = WalkRegs { cr3: 0x1000, pdptes: Some([0, 0, 0x2001, 0]), ..WalkRegs::default() };
    assert_eq!(context.translate(&shared, &regs, va, read).unwrap().address.bits(), 0x4123);
    let from_memory = context.translate(&shared, &WalkRegs { pdptes: None, ..regs }, va, read);
    assert!(matches!(from_memory, Err(WalkError::Fault(fault)) if fault.page_fault_code().bits() == 4));
}

/// kut vmx_pae_test: PDPTE registers are checked as they are loaded, the present ones alone.
#[test]
fn pdpte_registers_are_checked_when_they_are_loaded() {
    let memory = memory();
    let m = Machine { lma: false, maxphyaddr: 39, ..BASE };
    let context = context(&m);
    for bit in 0..64 {
        let pdptes = [0x2001, 0, 0x3001 ^ 1 << bit, 1 << bit & !1];
        for (at, pdpte) in (0x1020..).step_by(8).zip(pdptes) {
            memory.backing().set(at, pdpte);
        }
        let loaded = context.load_pdptes(&memory.shared(CpuId::BOOT), 0x1020 | 0x1f);
        // Bit 5 is let through, as QEMU's TCG sets it.
        let reserved = matches!(bit, 1 | 2 | 6..=8 | 39..=63);
        let expected = if reserved { Err(PdpteError::Reserved(pdptes[2])) } else { Ok(pdptes) };
        assert_eq!(loaded, expected, "bit {bit}");
    }
    let outside = context.load_pdptes(&memory.shared(CpuId::BOOT), RAM_BYTES);
    assert_eq!(outside, Err(PdpteError::Unreachable(BelowError::NotRam)));
}

/// F2: a store of the guest between the walk and the marking of an entry is not lost, and the walk follows it.
#[test]
fn f2_a_guest_store_during_the_walk_is_never_lost() {
    let mut ram = FlatRam::new(RAM_BYTES as usize);
    ram.interfere = Some(|ram, count| {
        if count == 0 {
            ram.set(0x4048, 0x6007); // The guest maps another frame while its tables are walked.
        }
    });
    let memory = slotted(ram, SlotFlags::empty());
    let places = places(4);
    link(&memory, &places, &[7; 4]);
    let shared = memory.shared(CpuId::BOOT);
    let write = Access::at_cpl(AccessKind::Write, 3);
    let found = context(&BASE).translate(&shared, &regs(&BASE), Gva::new(VA), write).unwrap();
    assert_eq!(found.address.bits(), 0x6123);
    assert_eq!(memory.backing().get(0x4048), Some(0x6067));
}

/// A guest that changes its entry before every compare-exchange cannot hold the walker: bounded restarts.
#[test]
fn restarts_are_bounded() {
    let mut ram = FlatRam::new(RAM_BYTES as usize);
    ram.interfere = Some(|ram, count| ram.set(0x1018, 0x2007 | (count as u64 & 1) << 9));
    let memory = slotted(ram, SlotFlags::empty());
    link(&memory, &places(4), &[7 | 1 << 9, 7, 7, 7]);
    let shared = memory.shared(CpuId::BOOT);
    let read = Access::at_cpl(AccessKind::Read, 0);
    let found = context(&BASE).translate(&shared, &regs(&BASE), Gva::new(VA), read);
    assert_eq!(found, Err(WalkError::Contended));
    assert!(memory.backing().exchanges.load(Ordering::SeqCst) <= 16);
}

/// Tables in a read-only slot are walked, and their bits left alone.
#[test]
fn tables_in_a_read_only_slot() {
    let memory = slotted(FlatRam::new(RAM_BYTES as usize), SlotFlags::READ_ONLY);
    link(&memory, &places(4), &[7; 4]);
    let shared = memory.shared(CpuId::BOOT);
    let write = Access::at_cpl(AccessKind::Write, 3);
    let found = context(&BASE).translate(&shared, &regs(&BASE), Gva::new(VA), write).unwrap();
    assert_eq!(found.address.bits(), 0x5123);
    assert_eq!(memory.backing().get(places(4)[3]), Some(0x5007));
}

/// kut check_toggle_cr0_wp: a context is immutable; with another CR0.WP the walk is another one, at once.
#[test]
fn toggled_cr0_wp_is_seen_by_the_next_walk() {
    let memory = memory();
    link(&memory, &places(4), &[0x67, 0x67, 0x67, 0x65]);
    for wp in [true, false, true] {
        let m = Machine { wp, ..BASE };
        compare(&memory, &context(&m), &m, VA, What::Write, Who::Supervisor);
    }
}

/// 5f0b819995e1: NX is a reserved bit exactly when EFER.NXE is clear, in all combinations with WP and SMEP.
#[test]
fn commit_5f0b819995e1_nx_is_reserved_only_without_nxe() {
    let memory = memory();
    let places = places(4);
    for m in roles(BASE) {
        link(&memory, &places, &[0x67, 0x67, 0x67, 0x67 | 1 << 63]);
        for (what, who) in accesses() {
            compare(&memory, &context(&m), &m, VA, what, who);
        }
    }
}

/// A fetch shows in the error code with SMEP, or with NXE and eight-byte entries: not with NXE alone. Intel SDM vol. 3, 4.7.
#[test]
fn fetches_show_in_the_error_code_without_pae_only_by_smep() {
    let memory = memory();
    for (nxe, smep) in [(false, false), (true, false), (false, true), (true, true)] {
        let m = Machine { lma: false, pae: false, pse: true, nxe, smep, ..BASE };
        // An entry that is not present.
        compare(&memory, &context(&m), &m, 0x0040_0000, What::Fetch, Who::Supervisor);
        assert_eq!(context(&m).role().reports_fetches(), smep, "{m:?}");
    }
}

/// CVE-2021-38198: rights are those of the walk that was made, also when two walks share the lower tables.
#[test]
fn cve_2021_38198_shared_tables_keep_the_rights_of_each_path() {
    let memory = memory();
    // Two PDPTEs, one read-only and one for supervisors, share a page directory.
    let ram = memory.backing();
    ram.set(0x1000 + 3 * 8, 0x2067);
    ram.set(0x2000 + 5 * 8, 0x3065);
    ram.set(0x2000 + 6 * 8, 0x3063);
    ram.set(0x3000 + 7 * 8, 0x4067);
    ram.set(0x4000 + 9 * 8, 0x5067);
    for _ in 0..2 {
        for index in [5u64, 6] {
            let va = VA & !(511 << 30) | index << 30;
            for (what, who) in accesses() {
                compare(&memory, &context(&BASE), &BASE, va, what, who);
            }
        }
    }
}
