//! The format by itself. `tests/formats.rs` compares the zero check with the manual's tables, exhaustively.
use super::*;

const SIZES: [PageSize; 3] = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];
const LEVELS: [Level; 5] = Level::ALL;
const ALL: [Writability; 4] =
    [Writability::Writable, Writability::Watched, Writability::Tracked, Writability::ReadOnly];
const TYPES: [MemoryType; 5] = [
    MemoryType::Uncacheable,
    MemoryType::WriteCombining,
    MemoryType::WriteThrough,
    MemoryType::WriteProtected,
    MemoryType::WriteBack,
];
const HOST: EptHost = EptHost {
    five_level: false,
    max_phys_addr: 46,
    largest: PageSize::Size1G,
    accessed_dirty: true,
    execute_only: true,
    mode_based_execute: true,
};

fn hosts() -> Vec<EptHost> {
    let mut hosts = vec![];
    for flags in 0..16u32 {
        let [five_level, accessed_dirty, execute_only, mode_based_execute] =
            [0, 1, 2, 3].map(|bit| flags >> bit & 1 == 1);
        for max_phys_addr in [36, 46, 52] {
            for largest in SIZES {
                hosts.push(EptHost {
                    five_level,
                    max_phys_addr,
                    largest,
                    accessed_dirty,
                    execute_only,
                    mode_based_execute,
                });
            }
        }
    }
    hosts
}

fn formats() -> Vec<Ept> {
    hosts().iter().map(Ept::new).collect()
}

fn leaves(format: &Ept) -> Vec<Leaf> {
    let pfn = Pfn::new_truncate(0x00f4_0000);
    let mut leaves = vec![];
    for size in SIZES.into_iter().filter(|&size| format.has_size(size)) {
        for writability in ALL {
            for memory_type in TYPES {
                for flags in 0..16 {
                    let [read, execute, execute_user, ignore_pat] = [1, 2, 4, 8].map(|bit| flags & bit != 0);
                    let ram = Leaf::ram(pfn, size, writability);
                    leaves.push(Leaf { read, execute, execute_user, memory_type, ignore_pat, ..ram });
                }
            }
        }
    }
    leaves
}

/// What is read back of a leaf: what the format cannot say is lost.
fn kept(format: &Ept, leaf: &Leaf) -> Leaf {
    let told_apart = format.can_tell_user_fetches();
    let execute_user = if told_apart { leaf.execute_user } else { leaf.execute };
    let read = leaf.read || !(leaf.execute || execute_user) || !format.execute_only;
    Leaf { read, execute_user, writability: held(leaf.writability, read), ..*leaf }
}

fn held(writability: Writability, read: bool) -> Writability {
    match writability {
        Writability::Writable | Writability::Watched if !read => Writability::Tracked,
        other => other,
    }
}

/// B1, B2, B5: what a format makes passes its own check and says what went in.
#[test]
fn b5_leaves_round_trip_and_pass_the_zero_check() {
    for format in formats() {
        for leaf in leaves(&format) {
            let entry = format.make_leaf(&leaf);
            let level = leaf.size.level();
            assert!(format.shadow_zero_check(entry, level));
            assert_eq!(format.entry(entry, level), Entry::Leaf);
            let kept = kept(&format, &leaf);
            assert_eq!(format.leaf(entry, level), Some(kept));
            assert_eq!(format.permits(entry, AccessKind::Read), kept.read);
            let writable = kept.writability == Writability::Writable;
            assert_eq!(format.permits(entry, AccessKind::Write), writable);
            assert_eq!(format.permits(entry, AccessKind::Execute), kept.execute && kept.execute_user);
            for other in ALL {
                let changed = format.with_writability(entry, other);
                assert!(format.shadow_zero_check(changed, level));
                assert_eq!(format.writability(changed), Some(held(other, kept.read)));
                let back = format.with_writability(changed, leaf.writability);
                assert_eq!(back & !DIRTY, entry & !DIRTY, "only W, its two notes and D change");
            }
        }
    }
}

#[test]
fn links_permit_everything_and_are_no_leaves() {
    let table = Pfn::new_truncate(0x1234);
    for format in formats() {
        let entry = format.make_table(table, Level::L2);
        assert_eq!(entry & 7, 7);
        assert_eq!(entry & EXECUTE_USER != 0, format.execute & EXECUTE_USER != 0);
        assert_eq!(format.link(entry), Some(table));
        for level in [Level::L2, Level::L3, Level::L4, Level::L5] {
            assert!(format.shadow_zero_check(entry, level));
            assert_eq!(format.entry(entry, level), Entry::Table(table));
            assert_eq!(format.leaf(entry, level), None);
        }
    }
}

/// B5: frozen is neither present nor empty, for any payload, and small payloads name no memory (CVE-2018-3646, L1TF).
#[test]
fn b5_frozen_entries_are_recognised_and_never_present() {
    for format in formats() {
        for payload in [0, 1, 0xff_ffff, 1 << 39, (1 << 40) - 1] {
            let frozen = format.make_frozen(payload);
            assert_eq!(format.frozen_payload(frozen), payload);
            assert_eq!(frozen & (READ | WRITE | EXECUTE | EXECUTE_USER | MMU_PRESENT), 0);
            assert!(payload >= 1 << 39 || frozen & 1 << 51 != 0, "the top address bit is set");
            for level in LEVELS {
                assert_eq!(format.entry(frozen, level), Entry::Frozen);
                assert_eq!(format.entry(0, level), Entry::Empty);
                assert!(!format.shadow_zero_check(frozen, level) && !format.shadow_zero_check(0, level));
            }
        }
    }
}

/// B7: small pages lead where the huge page led, with its rights.
#[test]
fn b7_small_pages_equal_the_huge_page() {
    for format in formats() {
        for leaf in leaves(&format) {
            let entry = format.make_leaf(&leaf);
            let level = leaf.size.level();
            let Some(smaller) = leaf.size.smaller() else {
                assert_eq!(format.make_small(entry, level, 0), None);
                continue;
            };
            for index in [0usize, 1, 511] {
                let small = format.make_small(entry, level, index).unwrap();
                let pfn = Pfn::new_truncate(leaf.pfn.number() + index as u64 * smaller.pages());
                let found = format.leaf(small, smaller.level()).unwrap();
                assert_eq!(found, Leaf { pfn, size: smaller, ..kept(&format, &leaf) });
                assert_eq!(small & LARGE != 0, smaller != PageSize::Size4K);
            }
        }
    }
}

/// d95c55687e11: an entry that permits fetches only is made, and legal, exactly where the CPU has such entries; it lets no
/// data access through, and a write is never granted on top of it.
#[test]
fn commit_d95c55687e11_execute_only_hides_reads_only_where_the_cpu_can() {
    for format in formats() {
        let ram = Leaf::ram(Pfn::new_truncate(0x1234), PageSize::Size4K, Writability::Writable);
        let entry = format.make_leaf(&Leaf { read: false, ..ram });
        assert_eq!(format.can_hide_reads(), format.execute_only);
        assert_eq!(format.permits(entry, AccessKind::Read), !format.execute_only);
        assert_eq!(format.permits(entry, AccessKind::Write), !format.execute_only);
        assert!(format.permits(entry, AccessKind::Execute));
        let bare = entry & !(READ | WRITE);
        for level in LEVELS {
            let expected = format.execute_only && level == Level::L1;
            assert_eq!(format.shadow_zero_check(bare, level), expected, "its memory type is no link's");
            assert!(!format.shadow_zero_check(bare | WRITE, level));
        }
        let table = format.make_table(Pfn::new_truncate(0x1234), Level::L2) & !(READ | WRITE);
        assert_eq!(format.shadow_zero_check(table, Level::L2), format.execute_only);
    }
}

/// G1: with mode-based execute control either kind of fetch can be permitted alone, without it both go together.
#[test]
fn g1_supervisor_and_user_fetches_are_told_apart_by_the_control() {
    for host in hosts() {
        let format = Ept::new(&host);
        let ram = Leaf::ram(Pfn::new_truncate(0x1234), PageSize::Size4K, Writability::Writable);
        let entry = format.make_leaf(&ram);
        assert_eq!(entry & EXECUTE_USER != 0, host.mode_based_execute);
        let halves = [
            (entry & !EXECUTE, Leaf { execute: false, ..ram }),
            (entry & !EXECUTE_USER, Leaf { execute_user: false, ..ram }),
        ];
        for (half, leaf) in halves {
            assert!(format.shadow_zero_check(half, Level::L1));
            if host.mode_based_execute {
                assert_eq!(format.leaf(half, Level::L1), Some(leaf));
                assert_eq!(format.make_leaf(&leaf), half);
                assert!(!format.permits(half, AccessKind::Execute));
            }
        }
        // Bit 10 alone makes an entry present only with the control, and legal only with execute-only entries.
        let alone = entry & !(READ | WRITE | EXECUTE) | EXECUTE_USER;
        let legal = host.mode_based_execute && host.execute_only;
        assert_eq!(format.shadow_zero_check(alone, Level::L1), legal);
    }
}

/// Without the flags bits 8 and 9 are nobody's: neither set on the way in nor by a change of writability.
#[test]
fn accessed_and_dirty_are_set_only_where_the_processor_keeps_them() {
    for host in hosts() {
        let format = Ept::new(&host);
        let ram = Leaf::ram(Pfn::new_truncate(0x1234), PageSize::Size4K, Writability::Writable);
        let flags = if host.accessed_dirty { ACCESSED | DIRTY } else { 0 };
        assert_eq!(format.make_leaf(&ram) & (ACCESSED | DIRTY), flags);
        let watched = format.make_leaf(&Leaf { writability: Writability::Watched, ..ram });
        assert_eq!(watched & (ACCESSED | DIRTY), flags & ACCESSED);
        let writable = format.with_writability(watched, Writability::Writable);
        assert_eq!(writable & (ACCESSED | DIRTY), flags);
        let again = format.with_writability(writable, Writability::Watched);
        assert_eq!(again & (ACCESSED | DIRTY), flags, "D is history");
        assert_eq!(format.make_table(ram.pfn, Level::L2) & (ACCESSED | DIRTY), flags & ACCESSED);
    }
}

/// Every bit that a control could give a meaning stays clear in what is present, and the notes are where none can.
#[test]
fn software_bits_are_ignored_whatever_the_controls() {
    let controlled = [57, 58, 60, 61, 63].map(|bit| 1u64 << bit).iter().sum::<u64>();
    for format in formats() {
        assert_eq!(format.make_table(Pfn::new_truncate(0x1234), Level::L2) & controlled, 0);
        for leaf in leaves(&format) {
            assert_eq!(format.make_leaf(&leaf) & controlled, 0);
        }
    }
}

#[test]
fn memory_types_have_the_numbers_of_the_manual() {
    let format = Ept::new(&HOST);
    let ram = Leaf::ram(Pfn::new_truncate(0x1234), PageSize::Size4K, Writability::Writable);
    let at = |memory_type| format.make_leaf(&Leaf { memory_type, ..ram }) >> 3 & 15;
    assert_eq!(TYPES.map(at), [0, 1, 4, 5, 6], "and the guest's PAT counts: bit 6 is clear");
    let entry = format.make_leaf(&ram);
    let ignored = Leaf { ignore_pat: true, ..ram };
    assert_eq!(format.make_leaf(&ignored), entry | IGNORE_PAT);
    assert_eq!(format.leaf(entry | IGNORE_PAT, Level::L1), Some(ignored));
    for reserved in [2, 3, 7] {
        let entry = entry & !TYPE | reserved << TYPE_SHIFT;
        assert!(!format.shadow_zero_check(entry, Level::L1));
        assert_eq!(format.leaf(entry, Level::L1), None);
    }
}

#[test]
fn the_zero_check_finds_each_reserved_bit() {
    let format = Ept::new(&EptHost { five_level: true, largest: PageSize::Size2M, ..HOST });
    let link = format.make_table(Pfn::new_truncate(0x1234), Level::L2);
    for bit in (46..52).chain(3..7) {
        for level in [Level::L2, Level::L3, Level::L4, Level::L5] {
            assert!(!format.shadow_zero_check(link | 1 << bit, level), "{level:?} bit {bit}");
        }
    }
    for level in [Level::L3, Level::L4, Level::L5] {
        assert!(!format.shadow_zero_check(link | LARGE, level), "{level:?}: no leaves of that size");
    }
    let leaf = READ | LARGE;
    for bit in (12..21).chain(46..52) {
        assert!(format.shadow_zero_check(leaf, Level::L2));
        assert!(!format.shadow_zero_check(leaf | 1 << bit, Level::L2), "bit {bit}");
    }
    for bit in 46..52 {
        assert!(!format.shadow_zero_check(leaf | 1 << bit, Level::L1), "bit {bit}");
    }
}

/// Whole values, as the manual's tables give them.
#[test]
fn golden_entries() {
    let full = Ept::new(&HOST);
    let plain = Ept::new(&EptHost {
        accessed_dirty: false,
        execute_only: false,
        mode_based_execute: false,
        max_phys_addr: 39,
        largest: PageSize::Size2M,
        ..HOST
    });
    let pfn = Pfn::new_truncate(0x1200);
    let small = Leaf::ram(pfn, PageSize::Size4K, Writability::Writable);
    let large = Leaf::ram(pfn, PageSize::Size2M, Writability::ReadOnly);
    let hidden = Leaf { read: false, writability: Writability::ReadOnly, ..small };
    assert_eq!(full.make_leaf(&small), 0x0030_0000_0120_0f37);
    assert_eq!(full.make_leaf(&large), 0x0120_0db5);
    assert_eq!(full.make_leaf(&hidden), 0x0120_0d34);
    assert_eq!(full.make_table(pfn, Level::L2), 0x0120_0d07);
    assert_eq!(plain.make_leaf(&small), 0x0030_0000_0120_0837);
    assert_eq!(plain.make_leaf(&large), 0x0120_08b5);
    assert_eq!(plain.make_leaf(&hidden), 0x0120_0835);
    assert_eq!(plain.make_table(pfn, Level::L2), 0x0120_0807);
}

/// The pointer: memory type in bits 2:0, length minus one in bits 5:3, flags in bit 6.
#[test]
fn golden_pointers() {
    let root = Pfn::new_truncate(0x12_3456).hpa();
    let pointer =
        |five_level, accessed_dirty| Ept::new(&EptHost { five_level, accessed_dirty, ..HOST }).pointer(root);
    assert_eq!(pointer(false, false), 0x1_2345_601e);
    assert_eq!(pointer(false, true), 0x1_2345_605e);
    assert_eq!(pointer(true, false), 0x1_2345_6026);
    assert_eq!(pointer(true, true), 0x1_2345_6066);
    // For L2: L1's depth, and its flags.
    let format = Ept::new(&EptHost { five_level: true, accessed_dirty: true, ..HOST });
    assert_eq!(format.pointer_to(root, Level::L4, false), 0x1_2345_601e);
    assert_eq!(format.pointer_to(root, Level::L4, true), 0x1_2345_605e);
}
