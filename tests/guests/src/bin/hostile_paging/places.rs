//! Tables where no table should be: in devices, in read-only memory, at the end of memory and beyond it.
use crate::{area, page_with, read};
use guests::frames::PAGE;
use guests::multiboot::boot;
use guests::paging::{Space, A, D, P, PS, U, W};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{catch, GP, PF};
use guests::user::{self, Start};
use guests::{exec, machine};

/// Where there is no RAM: the local APIC, the I/O APIC, configuration space, the PCI hole, the VGA window, and addresses
/// beyond all memory.
fn elsewhere() -> [(&'static str, u64); 7] {
    [
        ("place.table_in_the_local_apic", 0xfee0_0000),
        ("place.table_in_the_io_apic", 0xfec0_0000),
        ("place.table_in_configuration_space", 0xe000_0000),
        ("place.table_in_the_pci_hole", 0xd000_0000),
        ("place.table_in_the_vga_window", 0xa_0000),
        ("place.table_beyond_ram", 1 << 36),
        ("place.table_at_the_last_address", (1 << machine::physical_bits()) - PAGE),
    ]
}

pub(crate) fn run() {
    for (name, place) in elsewhere() {
        case(name, |t| {
            let space = Space::current();
            for level in 2..=4 {
                // Its own PML4 entry, since that is what level 4 changes. Entries 0 and 1 of the table.
                let address = 6 << 39;
                space.set(address, 4, 0);
                space.set(address, level, place | P | W | U);
                ends(t, address);
                ends(t, address + PAGE);
                space.set(address, level, 0);
                t.faults("a read after it is gone", catch(|| read(address)), PF, Some(0));
            }
        });
    }
    case("place.pages_where_there_is_no_ram", |t| {
        let space = Space::current();
        for (_, place) in elsewhere() {
            // Plain reads of devices: their values are not this case's business.
            space.map(area(20), place, 1, P | W | U);
            t.works("a read", catch(|| peek::<u32>(area(20))));
            space.set(area(20), 1, 0);
        }
        // A large page of which one half is devices' and the other nobody's.
        space.map(area(20), 0xfee0_0000, 2, P | W);
        t.works("a read of the local APIC by a large page", catch(|| peek::<u32>(area(20) + 0x20)));
        t.works("a read beside it", catch(|| peek::<u32>(area(20) + 0x1_0000)));
        space.set(area(20), 2, 0);
    });
    case("place.table_in_read_only_memory", |t| {
        let space = Space::current();
        for place in [0xe_0000u64, 0xf_0000, 0xf_f000] {
            let before: [u64; 4] = core::array::from_fn(|slot| read(place + slot as u64 * 8));
            let address = area(21);
            space.set(address, 2, place | P | W | U);
            (0..4).for_each(|slot| ends(t, address + slot * PAGE));
            space.set(address, 2, 0);
            // Only accessed and dirty bits may have changed, where it can be written at all.
            for (slot, before) in before.into_iter().enumerate() {
                t.eq("an entry", read(place + slot as u64 * 8) & !(A | D), before & !(A | D));
            }
        }
    });
    end_of_memory();
}

fn end_of_memory() {
    // The end of the largest range below 4 GiB: nothing is allocated there for long.
    let ranges = boot().ranges().iter().filter(|range| range.kind == 1 && range.start < 1 << 32);
    let end = ranges.map(|range| (range.start + range.len).min(1 << 32)).max().unwrap_or(0) & !(PAGE - 1);
    case("end.last_page_is_a_table", |t| {
        let space = Space::current();
        let (address, table) = (area(22), end - PAGE);
        (0..512).for_each(|slot| poke(table + slot * 8, 0u64));
        space.set(address, 2, table | P | W);
        let frame = page_with(0xe4d);
        let last = address + 511 * PAGE;
        for round in 0..50u64 {
            poke(table + 511 * 8, frame | P | W);
            invlpg(last);
            t.eq("a word by the last entry of memory", read(last), 0xe4d + round);
            poke(last, 0xe4e + round);
            t.eq("A and D of it", read(table + 511 * 8), frame | P | W | A | D);
        }
        space.set(address, 2, 0);
    });
    case("end.last_page_is_every_table", |t| {
        // PML4 entry to PTE in one table, the last page: index 3 leads to itself, index 4 to a page.
        let (space, table) = (Space::current(), end - PAGE);
        (0..512).for_each(|slot| poke(table + slot * 8, 0u64));
        let frame = page_with(0xe4d);
        poke(table + 3 * 8, table | P | W);
        poke(table + 4 * 8, frame | P | W);
        let top = 7 << 39;
        space.set(top, 4, table | P | W);
        let address = top + (3 << 30) + (3 << 21) + (4 << 12);
        t.eq("the word", read(address), 0xe4du64);
        t.eq("the table by itself", read(top + (3 << 30) + (3 << 21) + (3 << 12) + 32), frame | P | W | A);
        space.set(top, 4, 0);
    });
    case("end.table_is_the_first_page_beyond", |t| {
        let space = Space::current();
        let address = area(23);
        space.set(address, 2, end | P | W | U);
        ends(t, address);
        space.set(address, 2, 0);
    });
    case("end.large_page_across_the_end", |t| {
        // RAM ends somewhere in it or right before it.
        let space = Space::current();
        let address = area(24);
        let frame = (end - PAGE) & !((2 << 20) - 1);
        space.set(address, 2, frame | P | W | PS);
        let last = address + (end - PAGE - frame);
        t.works("a write of the last page", catch(|| poke(last + 8, 7u64)));
        t.eq("what it wrote", read(end - PAGE + 8), 7u64);
        space.set(address, 2, (frame + (2 << 20)) | P | W | PS);
        ends(t, address);
        space.set(address, 2, 0);
    });
}

/// Reads and fetches of every kind come to an end there: a page fault, a wrong instruction or a value. No writes: what they
/// would change is a device.
fn ends(t: &mut Case, address: u64) {
    for _ in 0..2 {
        if let Err(fault) = catch(|| read(address)) {
            let known = fault.vector == PF || fault.vector == GP;
            t.check(known, format_args!("a value or #PF, got {fault}"));
        }
    }
    user::map();
    // mov al, [rax]; ud2
    let (fault, _) = user::run_mapped(&[0x8a, 0x00, 0x0f, 0x0b], Start { rax: address, ..Start::default() });
    t.check(fault.vector != 8, format_args!("an ordinary exception, got {fault}"));
    exec!("nop");
    t.yes("the program goes on", true);
}
