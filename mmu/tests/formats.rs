//! The entry formats against processors that are written from the manuals.
mod support;

use mmu::{
    AccessKind, Entry, EntryFormat, Gfn, Leaf, Level, MemoryType, Mmio, MmioGeneration, PageSize, Pfn,
    Writability,
};
use support::hardware::{Exit, Hit, Walker};
use support::machines::{
    Amd, Host, Intel, Machine, PaeCpu, Reading, Rights, AMD, HOST, INTEL, PAE, PLAIN_INTEL,
};
use support::tables::HostTables;

const LEVELS: [Level; 5] = [Level::L1, Level::L2, Level::L3, Level::L4, Level::L5];
const SIZES: [PageSize; 3] = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];

fn hosts() -> impl Iterator<Item = Host> {
    [39, 52].into_iter().flat_map(|max_phys_addr| {
        SIZES.into_iter().map(move |largest| Host { five_level: true, max_phys_addr, largest })
    })
}

fn amd() -> impl Iterator<Item = Amd> {
    hosts().flat_map(|host| [false, true].map(|no_execute| Amd { host, no_execute }))
}

fn intel() -> impl Iterator<Item = Intel> {
    hosts().flat_map(|host| {
        [0, 1, 2, 3].map(|flags| Intel {
            host,
            accessed_dirty: flags == 3,
            execute_only: flags & 1 != 0,
            mode_based_execute: flags & 2 != 0,
        })
    })
}

/// Every combination of the low twelve bits (rights, memory type, large bit and the rest) at every level, alone and with
/// each of the other bits: the zero check, and what the format takes the entry for, are what the processor makes of it.
fn compare<M: Machine>(machine: M) {
    let format = machine.format();
    let others = std::iter::once(0).chain((12..64).map(|bit| 1u64 << bit));
    let levels = || LEVELS.into_iter().filter(|&level| level as u32 <= machine.levels());
    for (other, level) in others.flat_map(|other| levels().map(move |level| (other, level))) {
        for low in 0..1 << 12 {
            let entry = other | low;
            let reading = machine.read(entry, level as u32);
            let sound = matches!(reading, Reading::Link(_) | Reading::Page(_));
            assert_eq!(
                format.shadow_zero_check(entry, level),
                sound,
                "{machine:?}: {entry:#x} at {level:?} is {reading:?}"
            );
            // What does not carry the software's mark is nothing, whatever it looks like.
            let marked = low & 1 << 11 != 0;
            match (format.entry(entry, level), reading) {
                (Entry::Empty, _) => assert!(!marked),
                (Entry::Mmio, _) => assert_eq!((marked, reading), (false, Reading::Malformed)),
                (Entry::Frozen, _) => assert_eq!(reading, Reading::Absent),
                (Entry::Table(_), Reading::Link(_)) | (Entry::Leaf, Reading::Page(_)) => assert!(marked),
                (_, Reading::Link(_) | Reading::Page(_)) => panic!("{entry:#x} at {level:?} is {reading:?}"),
                (_, Reading::Absent | Reading::Malformed) => assert!(marked),
            }
            if let Some(leaf) = format.leaf(entry, level) {
                let rights = match reading {
                    Reading::Page(rights) => rights,
                    Reading::Absent if format.is_access_tracked(entry) => continue,
                    _ => panic!("{entry:#x} at {level:?}: {leaf:?}"),
                };
                // NPT entries without U permit nothing; none is ever made.
                if rights.read || rights.execute != [false; 2] {
                    assert_eq!([leaf.execute, leaf.execute_user], rights.execute, "{entry:#x}");
                    check_rights(&format, entry, rights);
                }
            }
        }
    }
}

fn check_rights<F: EntryFormat>(format: &F, entry: u64, rights: Rights) {
    assert_eq!(format.permits(entry, AccessKind::Read), rights.read, "{entry:#x}");
    assert_eq!(format.permits(entry, AccessKind::Write), rights.write, "{entry:#x}");
    assert_eq!(format.permits(entry, AccessKind::Execute), rights.execute == [true; 2], "{entry:#x}");
}

#[test]
fn cve_2017_12188_every_level_large_bit_and_reserved_bit_npt() {
    amd().for_each(compare);
}

#[test]
fn cve_2017_12188_every_level_large_bit_and_reserved_bit_ept() {
    intel().for_each(compare);
}

fn pae() -> impl Iterator<Item = PaeCpu> {
    hosts().map(|host| PAE.on(host))
}

#[test]
fn cve_2017_12188_every_level_large_bit_and_reserved_bit_pae() {
    pae().for_each(compare);
}

/// B1, B3: the processor reads out of a leaf what was put in, no right more.
fn leaves<M: Machine>(machine: M, fetches_always: bool) {
    let format = machine.format();
    let pfn = Pfn::new_truncate(0x00f4_0000);
    for size in SIZES.into_iter().filter(|&size| format.has_size(size)) {
        for flags in 0..4 {
            let (read, execute) = (flags & 1 != 0, flags & 2 != 0);
            for writability in [Writability::Writable, Writability::Watched, Writability::ReadOnly] {
                let leaf = Leaf { read, ..Leaf::ram(pfn, size, writability).with_execute(execute) };
                let entry = format.make_leaf(&leaf);
                let readable = read || !execute || !format.can_hide_reads();
                let expected = Rights {
                    read: readable,
                    write: readable && writability == Writability::Writable,
                    execute: [execute || fetches_always; 2],
                };
                let level = size.level() as u32;
                assert_eq!(machine.read(entry, level), Reading::Page(expected), "{machine:?}: {leaf:?}");
                assert!(machine.is_write_back(entry, level));
                check_rights(&format, entry, expected);
            }
            for memory_type in [MemoryType::Uncacheable, MemoryType::WriteThrough] {
                let entry =
                    format.make_leaf(&Leaf { memory_type, ..Leaf::ram(pfn, size, Writability::ReadOnly) });
                assert!(!machine.is_write_back(entry, size.level() as u32));
            }
        }
    }
}

#[test]
fn b3_leaves_permit_what_they_say_npt() {
    amd().for_each(|machine| leaves(machine, !machine.no_execute));
}

#[test]
fn b3_leaves_permit_what_they_say_pae() {
    pae().for_each(|machine| leaves(machine, false));
}

#[test]
fn b3_leaves_permit_what_they_say_ept() {
    intel().for_each(|machine| leaves(machine, false));
}

/// B5: neither an empty nor a frozen entry is present on any machine, at any level.
#[test]
fn b5_empty_and_frozen_are_absent_everywhere() {
    fn check<M: Machine>(machine: M) {
        let format = machine.format();
        for entry in [0, format.make_frozen(0), format.make_frozen(0x1234), format.make_frozen(u64::MAX)] {
            for level in 1..=5 {
                assert_eq!(machine.read(entry, level), Reading::Absent, "{machine:?}: {entry:#x}");
            }
        }
    }
    amd().for_each(check);
    intel().for_each(check);
    pae().for_each(check);
}

/// Makes each of these functions, which take a machine, a test on every machine of every vendor.
macro_rules! on_all {
    ($($test:ident($check:ident)),* $(,)?) => {
        $(
            #[test]
            fn $test() {
                amd().for_each($check);
                intel().for_each($check);
                pae().for_each($check);
            }
        )*
    };
}

on_all! {
    b8_an_old_leaf_keeps_reads_and_fetches_and_never_w(old_leaves),
    cve_2018_3620_no_entry_that_is_not_present_names_memory(names_no_memory),
    b5_mmio_entries_round_trip_and_are_malformed(mmio_entries),
}

fn sizes<F: EntryFormat>(format: &F) -> impl Iterator<Item = PageSize> + '_ {
    SIZES.into_iter().filter(|&size| format.has_size(size))
}

const WRITABILITIES: [Writability; 4] =
    [Writability::Writable, Writability::Watched, Writability::Tracked, Writability::ReadOnly];

/// B8, B3: an old leaf is not young, and what comes back of it is all it permitted but W. Whoever protects it then
/// knows of the W that a TLB may still have.
fn old_leaves<M: Machine>(machine: M) {
    let format = machine.format();
    let read = |entry, level| machine.read(entry, level);
    for size in sizes(&format) {
        let level = size.level();
        for (writability, execute) in WRITABILITIES.into_iter().flat_map(|w| [(w, false), (w, true)]) {
            let ram = Leaf::ram(Pfn::new_truncate(0x00f4_0000), size, writability);
            let young = format.make_leaf(&ram.with_execute(execute));
            let old = format.make_old(young);
            assert!(format.is_young(young) && !format.is_young(old));
            assert_eq!(format.make_old(old), old);
            assert_eq!(format.entry(old, level), Entry::Leaf);
            assert_eq!(format.may_be_cached_writable(old), writability == Writability::Writable);
            let restored = format.restore(old);
            assert_eq!(format.restore(restored), restored);
            let mut expected = format.leaf(young, level).unwrap();
            if format.is_access_tracked(old) {
                assert_eq!(read(old, level as u32), Reading::Absent);
                if writability == Writability::Writable {
                    expected.writability = Writability::Watched;
                }
                // Edits reach what was put aside.
                let tracked = format.with_writability(old, Writability::Tracked);
                assert!(format.is_access_tracked(tracked) && !format.may_be_cached_writable(tracked));
                let leaf = format.leaf(tracked, level).unwrap();
                assert_eq!(leaf, Leaf { writability: Writability::Tracked, ..expected });
                if let Some(small) = format.make_small(old, level, 3) {
                    assert!(format.is_access_tracked(small));
                    let below = level.down().unwrap();
                    let leaf = format.leaf(small, below).unwrap();
                    assert_eq!(leaf.pfn.number(), 0x00f4_0000 + 3 * below.pages());
                }
            }
            assert_eq!(format.leaf(old, level), Some(expected));
            assert_eq!(format.leaf(restored, level), Some(expected));
        }
    }
}

/// CVE-2018-3620, CVE-2018-3646 (L1TF): what is not present, or malformed on purpose, leads speculation to no memory: its
/// address is in the upper half of what 52 bits can name.
fn names_no_memory<M: Machine>(machine: M) {
    let format = machine.format();
    let read = |entry, level| machine.read(entry, level);
    for pfn in [0, 1, 0x1234_5600, (1 << 39) - 512].map(|pfn: u64| Pfn::new_truncate(pfn & !511)) {
        for size in sizes(&format).filter(|size| *size != PageSize::Size1G) {
            let leaf = Leaf::ram(Pfn::new_truncate(pfn.number() & 0x3ff_fe00), size, Writability::Writable);
            let old = format.make_old(format.make_leaf(&leaf));
            let absent = read(old, size.level() as u32) == Reading::Absent;
            assert!(!absent || old & 1 << 51 != 0, "{old:#x}");
        }
        assert!(format.make_frozen(pfn.number()) & 1 << 51 != 0, "the payload may be a frame");
        let gfn = Gfn::new_truncate(pfn.number());
        let mmio = Mmio { gfn, write: true, user: true, generation: MmioGeneration::default() };
        assert!(format.make_mmio(&mmio).is_none_or(|entry| entry & 1 << 51 != 0));
    }
}

/// B5: MMIO entries round-trip over frames and generations, are malformed for the processor at every level, and nothing
/// else is taken for one.
fn mmio_entries<M: Machine>(machine: M) {
    let format = machine.format();
    let read = |entry, level| machine.read(entry, level);
    let frames = (0..40).map(|bit| 1 << bit).chain([0, (1 << 39) - 1, (1 << 40) - 1, 0xfee00]);
    let frames: Vec<u64> = frames.collect();
    let rights = [(true, true), (true, false), (false, true), (false, false)];
    for &frame in &frames {
        for (number, (write, user)) in
            (0..19).map(|bit| 1 << bit).chain([0, 0x7_ffff]).zip(rights.into_iter().cycle())
        {
            let (gfn, generation) = (Gfn::new_truncate(frame), MmioGeneration::new_truncate(number));
            let Some(entry) = format.make_mmio(&Mmio { gfn, write, user, generation }) else {
                let full = format.make_mmio(&Mmio { gfn: Gfn::default(), write, user, generation }).is_none();
                assert!(full || frame >> 39 != 0);
                continue;
            };
            let found = format.mmio(entry).unwrap();
            assert_eq!((found.gfn, found.generation), (gfn, generation));
            assert!(found.write && found.user || (found.write, found.user) == (write, user));
            for level in [Level::L1, Level::L2, Level::L3] {
                assert_eq!(read(entry, level as u32), Reading::Malformed, "{entry:#x}");
                assert_eq!(format.entry(entry, level), Entry::Mmio);
                assert_eq!(format.leaf(entry, level), None);
            }
        }
    }
    assert_eq!(MmioGeneration::new_truncate(1 << 19), MmioGeneration::default(), "it wraps");
}

/// Tables with one path, to the entry for frame 0 at `level`, which is `entry`; the links on the way lose `without`.
fn walk<M: Machine>(
    machine: M,
    level: u32,
    entry: u64,
    without: u64,
    access: [bool; 2],
) -> Result<Hit, Exit> {
    let tables = HostTables::new(5);
    let format = machine.format();
    let mut at = tables.allocate().into_frame();
    let root = at.number();
    for _ in level + 1..=machine.host().levels() {
        let below = tables.allocate().into_frame();
        tables.mark(at.number(), 0, format.make_table(below, Level::L2) & !without);
        at = below;
    }
    tables.mark(at.number(), 0, entry);
    Walker { tables: &tables, root, machine }.try_walk(0, access[0], access[1])
}

const READ: [bool; 2] = [false, false];
const WRITE: [bool; 2] = [true, false];
const FETCH: [bool; 2] = [false, true];

/// What the model processor makes of entries that are not as they should be: a misconfiguration counts before a missing
/// right, wherever each of them is, and an entry that is not present ends the walk before either.
#[test]
fn a_misconfiguration_is_told_from_a_violation() {
    let (violation, misconfiguration) = (Err(Exit::Violation), Err(Exit::Misconfiguration));
    for machine in [INTEL, PLAIN_INTEL] {
        let format = machine.format();
        let leaf = |size| format.make_leaf(&Leaf::ram(Pfn::default(), size, Writability::Writable));
        let small = leaf(PageSize::Size4K);
        for access in [READ, WRITE, FETCH] {
            assert!(walk(machine, 1, small, 0, access).is_ok());
            for level in 1..=4 {
                // Not present, however much is in the other bits.
                assert_eq!(walk(machine, level, 0xffff_ffff_ffff_f8f8 & !(1 << 10), 0, access), violation);
                // Write-only, write and execute, beyond the physical width.
                for wrong in [0b010, 0b110, 0b111 | 1 << 46] {
                    assert_eq!(walk(machine, level, wrong, 0, access), misconfiguration, "{wrong:#b}");
                }
            }
            for reserved in [2, 3, 7] {
                assert_eq!(walk(machine, 1, small & !0x38 | reserved << 3, 0, access), misconfiguration);
            }
            assert_eq!(walk(machine, 2, leaf(PageSize::Size2M) | 1 << 12, 0, access), misconfiguration);
            assert_eq!(walk(machine, 4, small | 1 << 7, 0, access), misconfiguration, "512 GiB");
        }
        // W is missing above, and the leaf is malformed: the leaf counts.
        assert_eq!(walk(machine, 1, small, 0b10, WRITE), violation);
        assert_eq!(walk(machine, 1, small & !0x38 | 0x38, 0b10, WRITE), misconfiguration);
        // Execute-only links and leaves.
        let allowed = machine.execute_only;
        assert_eq!(walk(machine, 1, small & !3, 0, FETCH).is_ok(), allowed);
        assert_eq!(walk(machine, 1, small, 0b11, FETCH).is_ok(), allowed);
        let refused = if allowed { violation.clone() } else { misconfiguration.clone() };
        assert_eq!(walk(machine, 1, small & !3, 0, READ), refused);
        assert_eq!(walk(machine, 1, small, 0b11, READ), refused);
    }
    // The same on the other vendor's machine.
    let format = AMD.on(HOST).format();
    let small = format.make_leaf(&Leaf::ram(Pfn::default(), PageSize::Size4K, Writability::ReadOnly));
    assert!(walk(AMD, 1, small, 0, READ).is_ok());
    assert_eq!(walk(AMD, 1, small, 0, WRITE), violation);
    assert_eq!(walk(AMD, 1, small | 1 << 46, 0, WRITE), misconfiguration);
    assert_eq!(walk(AMD, 1, small & !1, 0, READ), violation);
}

/// 29.3.5: A in every entry on the way, D in the leaf on a write, neither without the flags.
#[test]
fn the_processor_sets_flags_only_when_they_are_on() {
    for machine in [INTEL, PLAIN_INTEL] {
        let tables = HostTables::new(5);
        let format = machine.format();
        let [root, below] = [0, 0].map(|_| tables.allocate().into_frame());
        let leaf = Leaf::ram(Pfn::default(), PageSize::Size1G, Writability::Writable);
        let (link, page) = (format.make_table(below, Level::L4) & !0x300, format.make_leaf(&leaf) & !0x300);
        tables.mark(root.number(), 0, link);
        tables.mark(below.number(), 0, page);
        let walker = Walker { tables: &tables, root: root.number(), machine };
        let on = machine.accessed_dirty;
        for (write, flags) in [(false, 0x100), (true, 0x300)] {
            assert!(walker.walk(5, write, false).is_some());
            let expected = [link | if on { 0x100 } else { 0 }, page | if on { flags } else { 0 }];
            let found = [root, below].map(|table| tables.peek(table.number(), 0).unwrap());
            assert_eq!(found, expected);
        }
    }
}
