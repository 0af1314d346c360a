//! Control bits that change what entries mean, toggled between accesses.
use crate::{area, page_with, read};
use guests::modes::{self, Mode, Registers};
use guests::paging::{Space, E_I, E_P, E_PK, E_W, G, NX, P, U, W};
use guests::platform::{self, reserved_bit_error};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{catch, Fault, GP, PF};
use guests::{exec, payload};

payload!(load, load_start, load_end, "32", "mov eax, [edi]", "ret");

pub(crate) fn run() {
    case("toggle.wp", |t| {
        let space = Space::current();
        let address = area(30);
        space.map(address, page_with(0), 1, P);
        rounds(cr0, set_cr0, CR0_WP, |on| {
            check(t, "a write", catch(|| poke(address, 1u64)), on, E_P | E_W);
        });
    });
    case("toggle.nx", |t| {
        let space = Space::current();
        let address = area(31);
        space.map(address, page_with(0xc3), 1, P | NX);
        let (get, set) = (|| rdmsr(MSR_EFER), |value| wrmsr(MSR_EFER, value));
        rounds(get, set, EFER_NXE, |on| {
            // Without NXE the bit is reserved; what the TLB has of before goes first.
            invlpg(address);
            let error = if on { E_P | E_I } else { reserved_bit_error() };
            let fetch = catch(|| exec!("call {}", in(reg) address));
            check(t, "a fetch", fetch, true, error & !E_I | if on { E_I } else { 0 });
            check(t, "a read", catch(|| read(address)), !on, error);
        });
    });
    case("toggle.smep", |t| {
        if !has(7, 0, |leaf| leaf.ebx, 7) {
            return t.skip("no SMEP");
        }
        let address = area(32);
        Space::current().map(address, page_with(0xc3), 1, P | U);
        rounds(cr4, set_cr4, CR4_SMEP, |on| {
            check(t, "a fetch", catch(|| exec!("call {}", in(reg) address)), on, E_P | E_I);
        });
    });
    case("toggle.smap_and_ac", |t| {
        if !has(7, 0, |leaf| leaf.ebx, 20) {
            return t.skip("no SMAP");
        }
        let address = area(33);
        Space::current().map(address, page_with(1), 1, P | U | W);
        rounds(cr4, set_cr4, CR4_SMAP, |on| {
            for ac in [0, FLAG_AC] {
                set_rflags(2 | ac);
                let got = catch(|| read(address));
                set_rflags(2);
                check(t, "a read", got, on && ac == 0, E_P);
            }
        });
    });
    case("toggle.pke", |t| {
        if !has(7, 0, |leaf| leaf.ecx, 3) {
            return t.skip("no protection keys");
        }
        let address = area(34);
        Space::current().map(address, page_with(1), 1, P | U | W | 5 << 59);
        rounds(cr4, set_cr4, CR4_PKE, |on| {
            if on {
                // Access to key 5 is disabled.
                exec!("wrpkru", in("eax") 1u32 << 10, in("ecx") 0, in("edx") 0);
            }
            check(t, "a read", catch(|| read(address)), on, E_P | E_PK);
        });
    });
    case("toggle.pks", |t| {
        if !has(7, 0, |leaf| leaf.ecx, 31) {
            return t.skip("no protection keys of supervisor pages");
        }
        let address = area(37);
        Space::current().map(address, page_with(1), 1, P | W | 5 << 59);
        // Access to key 5 is disabled.
        wrmsr(MSR_PKRS, 1 << 10);
        rounds(cr4, set_cr4, CR4_PKS, |on| {
            // What is cached of before may have no key.
            invlpg(address);
            check(t, "a read", catch(|| read(address)), on, E_P | E_PK);
        });
        wrmsr(MSR_PKRS, 0);
    });
    case("toggle.wp_under_keys", |t| {
        if !has(7, 0, |leaf| leaf.ecx, 3) {
            return t.skip("no protection keys");
        }
        // Without CR0.WP neither W nor a key's WD holds a supervisor's write back, but AD does.
        let (space, address) = (Space::current(), area(38));
        let frame = page_with(1);
        set_cr4(cr4() | CR4_PKE);
        let pkru = |value: u32| exec!("wrpkru", in("eax") value, in("ecx") 0, in("edx") 0);
        for (writable, flags) in [(false, P | U), (true, P | W | U)] {
            space.map(address, frame, 1, flags | 5 << 59);
            for (rights, with_wp, always) in
                [(0, false, false), (2 << 10, true, false), (1 << 10, true, true)]
            {
                pkru(rights);
                rounds(cr0, set_cr0, CR0_WP, |on| {
                    let by_key = always || with_wp && on;
                    let error = E_P | E_W | if by_key { E_PK } else { 0 };
                    check(t, "a write", catch(|| poke(address, 1u64)), by_key || on && !writable, error);
                });
                pkru(0);
            }
        }
    });
    case("toggle.pge", |t| {
        let space = Space::current();
        let address = area(35);
        let pages = [page_with(1), page_with(2)];
        for round in 0..100 {
            poke(space.entry(address, 1), pages[round % 2] | P | W | G);
            set_cr4(cr4() ^ CR4_PGE);
            t.eq("the word after the toggle", read(address), 1 + round as u64 % 2);
        }
    });
    case("toggle.pcide", |t| {
        if !has(1, 0, |leaf| leaf.ecx, 17) {
            return t.skip("no PCID");
        }
        let space = Space::current();
        let address = area(36);
        let pages = [page_with(1), page_with(2)];
        for round in 0..60 {
            space.map(address, pages[round % 2] | P, 1, P | W);
            set_cr4(cr4() | CR4_PCIDE);
            for pcid in 0..3 {
                set_cr3(space.root | pcid);
                t.eq("the word", read(address), 1 + round as u64 % 2);
                // Kept translations of another PCID are no use for this entry, which was flushed before.
                set_cr3(space.root | 3 | 1 << 63);
                invlpg(address);
                t.eq("the word under PCID 3", read(address), 1 + round as u64 % 2);
            }
            set_cr3(space.root);
            set_cr4(cr4() & !CR4_PCIDE);
        }
    });
    case("toggle.pae_in_long_mode_is_refused", |t| {
        if platform::bad_cr_write_hangs() {
            return t.skip("QEMU TCG is known wrong here: a bad write of CR4 stops the processor");
        }
        t.faults("CR4 without PAE", catch(|| set_cr4(cr4() & !CR4_PAE)), GP, Some(0));
    });
    case("toggle.pae_over_the_same_table", |t| {
        // Each mode finds its tables at the same place, made anew; an access in each, and no flush but the switch.
        let word = page_with(0x1234_5678);
        for round in 0..12 {
            let mode = [Mode::Pae, Mode::Pse, Mode::Paged, Mode::Pse][round % 4];
            let cr3 = modes::prepare(mode, load());
            // Two-level tables without large pages map the first 4 MiB only.
            let edi = if mode == Mode::Paged { modes::PAYLOAD } else { word as u32 };
            let cr4 = match mode {
                Mode::Pae => CR4_PAE,
                Mode::Pse => CR4_PSE,
                _ => 0,
            };
            let registers = Registers { edi, ..Registers::default() };
            let outcome = modes::run_controls(mode, registers, cr3, 0x8001_0031, cr4);
            t.check(outcome.fault.is_none(), format_args!("no fault, got {:?}", outcome.fault));
            if mode != Mode::Paged {
                t.eq("the word", outcome.registers.eax, 0x1234_5678u32);
            }
        }
    });
}

/// Sets and clears `bit` many times and tries what depends on it.
fn rounds(get: impl Fn() -> u64, set: impl Fn(u64), bit: u64, mut attempt: impl FnMut(bool)) {
    for round in 0..60 {
        let on = round % 2 == 0;
        set(if on { get() | bit } else { get() & !bit });
        attempt(on);
    }
}

/// `got` is a page fault with this error code, or is none.
fn check<R>(t: &mut Case, what: &str, got: Result<R, Fault>, faults: bool, error: u64) {
    if faults {
        t.faults(what, got, PF, Some(error));
    } else {
        t.works(what, got);
    }
}
