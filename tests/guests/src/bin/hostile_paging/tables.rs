//! Tables that map themselves, serve at two levels, are split and replaced under use, or are too many.
use crate::{area, page_with, read};
use guests::frames::{self, PAGE, PAGE_2M};
use guests::paging::{Space, A, D, E_P, E_W, P, PS, U, W};
use guests::platform;
use guests::prelude::*;
use guests::report::case;
use guests::trap::{catch, PF};

/// PML4 entry that points to its own table.
const SELF: u64 = 5;

/// The address at which the recursive entry shows the entry of `address` at `level`.
fn window(address: u64, level: u32) -> u64 {
    // Each time through the recursive entry, the walk ends one level higher.
    (0..level).fold(address, |at, _| SELF << 39 | at >> 9 & 0x7f_ffff_fff8)
}

pub(crate) fn run() {
    recursive();
    aliases();
    changes();
    flood();
}

fn recursive() {
    case("recursive.window_shows_each_level", |t| {
        let space = Space::fork();
        poke(space.root + SELF * 8, space.root | P | W);
        space.activate();
        let address = area(0) + 0x20_3000;
        space.map_new(address, P | W);
        t.works("a write of the page", catch(|| poke(address, 1u8)));
        // PML4 entry through PTE. Each is read twice: once walked, once cached.
        for level in 1..=4 {
            let entry = space.get(address, level);
            for _ in 0..2 {
                let got = catch(|| read(window(address, level)));
                if let Some(value) = t.works("a read through the window", got) {
                    t.eq("the entry", value, entry);
                }
            }
        }
    });
    case("recursive.writes_through_the_window", |t| {
        let space = Space::fork();
        poke(space.root + SELF * 8, space.root | P | W);
        space.activate();
        let address = area(0) + 0x40_0000;
        space.map_new(address, P | W);
        let frames: [u64; 4] = core::array::from_fn(|index| page_with(0x1000 + index as u64));
        for round in 0..200 {
            let frame = frames[round % 4];
            poke(window(address, 1), frame | P | W);
            invlpg(address);
            t.eq("the word of the new frame", read(address), 0x1000 + round as u64 % 4);
            t.eq("the entry, with A", read(window(address, 1)), frame | P | W | A);
        }
    });
    case("recursive.entry_rewrites_itself", |t| {
        let space = Space::fork();
        let own = window(SELF << 39, 4);
        poke(space.root + SELF * 8, space.root | P | W);
        space.activate();
        for _ in 0..20 {
            // The entry takes away its own right to be written.
            t.works("a write", catch(|| poke(own, space.root | P)));
            invlpg(own);
            t.faults("a write without W", catch(|| poke(own, space.root | P | W)), PF, Some(E_P | E_W));
            poke(space.root + SELF * 8, space.root | P | W);
            invlpg(own);
            t.works("a write with W again", catch(|| poke(own, space.root | P | W)));
            invlpg(own);
            t.eq("the entry", read(own) & !(A | D), space.root | P | W);
        }
    });
    case("recursive.entry_removes_itself", |t| {
        let space = Space::fork();
        let own = window(SELF << 39, 4);
        poke(space.root + SELF * 8, space.root | P | W);
        space.activate();
        t.works("a write of 0", catch(|| poke(own, 0u64)));
        invlpg(own);
        t.faults("a read without it", catch(|| read(own)), PF, Some(0));
    });
}

fn aliases() {
    case("alias.one_table_at_two_levels", |t| {
        // `table` is the page directory of `first` and the page table of `second`: its entry 7 is both a PDE, which leads
        // to `lower`, and a PTE, which maps `lower` as a page.
        let space = Space::current();
        let (first, second) = (area(1), area(2));
        let (table, lower) = (frames::page(), frames::page());
        space.set(first, 3, table | P | W | U);
        space.set(second, 2, table | P | W | U);
        poke(table + 7 * 8, lower | P | W | U);
        let (via_pde, via_pte) = (first + 7 * PAGE_2M + 9 * PAGE, second + 7 * PAGE);
        let pages = [page_with(0x11), page_with(0x22)];
        for round in 0..100 {
            poke(via_pte + 9 * 8, pages[round % 2] | P | W | U);
            invlpg(via_pde);
            t.eq("the page behind both", read(via_pde), [0x11u64, 0x22][round % 2]);
            t.masked("A of the lower entry", read(lower + 9 * 8), A, A);
        }
        t.masked("A and D of the entry that is both", read(table + 7 * 8), A | D, A | D);
        poke(table + 7 * 8, lower | P | U);
        invlpg(via_pte);
        t.faults("a write by the PTE", catch(|| poke(via_pte, 1u64)), PF, Some(E_P | E_W));
        invlpg(via_pde);
        t.faults("a write by the PDE", catch(|| poke(via_pde, 1u64)), PF, Some(E_P | E_W));
    });
    case("alias.page_table_maps_itself", |t| {
        let space = Space::current();
        let address = area(3);
        let table = frames::page();
        space.set(address, 2, table | P | W | U);
        poke(table, table | P | W);
        let pages = [page_with(0x33), page_with(0x44)];
        for round in 0..200 {
            poke(address + 8, pages[round % 2] | P | W);
            invlpg(address + PAGE);
            t.eq("the page that it maps", read(address + PAGE), [0x33u64, 0x44][round % 2]);
        }
        t.eq("its own entry", read(address), table | P | W | A | D);
    });
    case("alias.table_shared_with_other_rights", |t| {
        // The same page table below a writable and a read-only directory entry.
        let space = Space::current();
        let (writable, read_only) = (area(4), area(4) + PAGE_2M);
        let frame = space.map_new(writable, P | W);
        let table = space.get(writable, 2) & !0xfff & !(1 << 63);
        space.set(read_only, 2, table | P);
        for round in 0..50u64 {
            t.works("a write", catch(|| poke(writable, round)));
            t.eq("what the other sees", read(read_only), round);
            t.faults("a write there", catch(|| poke(read_only, 0u64)), PF, Some(E_P | E_W));
        }
        t.eq("the frame", read(frame), 49u64);
    });
    case("alias.large_page_over_tables_in_use", |t| {
        // A 2 MiB page through which the tables that map another page are written.
        let space = Space::current();
        let (big, small) = (area(5), area(5) + 4 * PAGE_2M);
        let block = frames::untouched(PAGE_2M, PAGE_2M);
        let table = block + 3 * PAGE;
        (0..512).for_each(|slot| poke(table + slot * 8, 0u64));
        space.map(big, block, 2, P | W);
        space.set(small, 2, table | P | W);
        let pages = [page_with(0x55), page_with(0x66)];
        for round in 0..100 {
            poke(big + 3 * PAGE, pages[round % 2] | P | W);
            invlpg(small);
            t.eq("the page", read(small), [0x55u64, 0x66][round % 2]);
        }
    });
}

fn changes() {
    case("change.split_and_merge_under_use", |t| {
        let space = Space::current();
        let address = area(6);
        let block = frames::untouched(PAGE_2M, PAGE_2M);
        (0..512).for_each(|page| poke(block + page * PAGE, page));
        let table = frames::page();
        for round in 0..40u64 {
            space.map(address, block, 2, P | W);
            for page in [0, 1, 255, 511] {
                t.eq("a word by the large page", read(address + page * PAGE), page);
            }
            (0..512).for_each(|page| poke(table + page * 8, (block + page * PAGE) | P | W));
            // One page of the split is read-only.
            poke(table + round * 8, (block + round * PAGE) | P);
            space.set(address, 2, table | P | W);
            for page in [0, 1, 255, 511] {
                t.eq("a word by small pages", read(address + page * PAGE), page);
            }
            let got = catch(|| poke(address + round * PAGE + 8, 1u64));
            t.faults("a write of the read-only one", got, PF, Some(E_P | E_W));
        }
    });
    case("change.large_page_becomes_table_of_same_frame", |t| {
        // The entry's frame stays, PS goes: what was the page's data is now its table.
        let space = Space::current();
        let address = area(7);
        let block = frames::untouched(PAGE_2M, PAGE_2M);
        let target = page_with(0x77);
        for _ in 0..50 {
            space.set(address, 2, block | P | W | PS);
            (0..512).for_each(|slot| poke(address + slot * 8, target | P | W));
            t.eq("the block's first word", read(address), target | P | W);
            space.set(address, 2, block | P | W);
            t.eq("the target's word", read(address + 5 * PAGE), 0x77u64);
        }
    });
    case("change.tables_swapped_at_every_level", |t| {
        let address = area(8);
        for level in 2..=4 {
            let (one, other) = (Space::fork(), Space::fork());
            for (space, value) in [(one, 1), (other, 2)] {
                // Own tables all the way.
                poke(space.entry(address, 4), 0u64);
                space.map(address, page_with(value), 1, P | W);
            }
            let both = [one.get(address, level), other.get(address, level)];
            one.activate();
            for round in 0..100 {
                one.set(address, level, both[round % 2]);
                t.eq("the page behind the table", read(address), 1 + round as u64 % 2);
            }
        }
    });
    case("change.missing_flush_not_present_to_present", |t| {
        // Not-present entries are cached nowhere. Intel SDM vol. 3, 4.10.2.3.
        let space = Space::current();
        let address = area(9);
        let entry = space.entry(address, 1);
        let frame = page_with(0x99);
        for round in 0..200 {
            poke(entry, 0u64);
            invlpg(address);
            t.faults("a read", catch(|| read(address)), PF, Some(0));
            poke(entry, frame | P | W);
            if let Some(value) = t.works("a read right after", catch(|| read(address))) {
                t.eq("the word", value, 0x99u64);
            }
            if round % 2 == 0 {
                t.works("a write", catch(|| poke(address, 0x99u64)));
            }
        }
    });
    case("change.missing_flush_more_rights", |t| {
        // A fault by an old right drops it: the second try must work. Intel SDM vol. 3, 4.10.4.3.
        let space = Space::current();
        let address = area(10);
        let frame = page_with(0xaa);
        let entry = space.entry(address, 1);
        for _ in 0..200 {
            space.set(address, 1, frame | P);
            t.eq("the word", read(address), 0xaau64);
            poke(entry, frame | P | W);
            if catch(|| poke(address, 0xaau64)).is_err() {
                t.works("the second write", catch(|| poke(address, 0xaau64)));
            }
        }
    });
    case("change.missing_flush_fewer_rights_or_other_frame", |t| {
        let space = Space::current();
        let address = area(11);
        let pages = [page_with(1), page_with(2)];
        let entry = space.entry(address, 1);
        for round in 0..200 {
            let (old, new) = (1 + round as u64 % 2, 2 - round as u64 % 2);
            space.set(address, 1, pages[round % 2] | P | W);
            t.eq("the old word", read(address), old);
            poke(entry, pages[1 - round % 2] | P | W);
            let seen = read(address);
            t.check(seen == old || seen == new, format_args!("the old word or the new, got {seen:#x}"));
            poke(entry, 0u64);
            if let Ok(seen) = catch(|| read(address)) {
                t.check(seen == old || seen == new, format_args!("one of the words, got {seen:#x}"));
            }
            invlpg(address);
            t.faults("a read after the flush", catch(|| read(address)), PF, Some(0));
        }
    });
    case("change.dirty_cleared_then_flushed", |t| {
        let space = Space::current();
        let address = area(12);
        let frame = page_with(0);
        for round in 0..200 {
            space.map(address, frame, 1, P | W);
            t.works("a write", catch(|| poke(address, 1u64)));
            t.eq("the entry", space.get(address, 1), frame | P | W | A | D);
            poke(space.entry(address, 1), frame | P | W | A);
            if round % 2 == 0 {
                // Without a flush D may stay clear or be set; the write works.
                t.works("a write without a flush", catch(|| poke(address, 2u64)));
            }
            invlpg(address);
            t.works("a write after the flush", catch(|| poke(address, 3u64)));
            t.eq("the entry again", space.get(address, 1), frame | P | W | A | D);
        }
    });
}

fn flood() {
    case("flood.more_tables_than_any_quota", |t| {
        // One frame below as many page tables as memory allows, each touched, three times over.
        let space = Space::current();
        let frame = page_with(0xf100d);
        let slow = platform::bochs_svm() || platform::bochs_vmx();
        let count = (frames::left() / PAGE / 2).min(if slow { 400 } else { 6000 });
        let base = area(64);
        for index in 0..count {
            space.map(base + index * PAGE_2M + index % 512 * PAGE, frame, 1, P | W);
        }
        for pass in 0..3 {
            for index in 0..count {
                let address = base + index * PAGE_2M + index % 512 * PAGE;
                let ok = catch(|| read(address)) == Ok(0xf100d);
                t.check(ok, format_args!("the word by table {index} in pass {pass}, got something else"));
            }
        }
        // And as many roots.
        for index in 0..count.min(300) {
            let other = Space::fork();
            other.activate();
            t.eq("the word in a new space", read(base + index * PAGE_2M + index % 512 * PAGE), 0xf100du64);
        }
    });
}
