//! Page tables against CPUID: widths, page sizes, NX, process-context identifiers, protection of user pages.
use crate::view::{bit, B, C, D, EXT1};
use guests::frames;
use guests::paging::{Space, E_I, E_P, E_PK, NX, P, PLAYGROUND, U, W};
use guests::prelude::*;
use guests::report::case;
use guests::trap::{catch, GP, PF};
use guests::{exec, machine, platform};

/// Where the cases map: far from what the library does.
const AREA: u64 = PLAYGROUND + (32 << 30);

pub(crate) fn run() {
    let space = Space::current();
    case("memory.physical_width", |t| {
        let wide = machine::physical_bits();
        for number in wide..52 {
            space.map(AREA, 1 << number, 1, P | W);
            t.faults(
                "a read by a bit beyond the width",
                catch(|| peek::<u8>(AREA)),
                PF,
                Some(platform::reserved_bit_error()),
            );
        }
        // Nothing is there, but it is an address.
        space.map(AREA, 1 << (wide - 1), 1, P | W);
        t.works("a read by the highest bit of the width", catch(|| peek::<u8>(AREA)));
        space.set(AREA, 1, 0);
    });
    case("memory.cr3_width", |t| {
        let wide = machine::physical_bits();
        if platform::bad_cr_write_hangs() {
            return t.skip("QEMU TCG stops at a MOV to CR3 with a reserved bit");
        }
        if wide == 52 {
            return t.skip("all 52 address bits exist");
        }
        for number in wide..52 {
            t.faults("CR3 with a bit beyond the width", catch(|| set_cr3(cr3() | 1 << number)), GP, Some(0));
        }
    });
    case("memory.pages_1g", |t| {
        let frame = frames::page();
        poke(frame, 0x5aa5u32);
        let address = AREA + (2 << 30);
        space.map(address, frame & !0x3fff_ffff, 3, P | W);
        let got = catch(|| peek::<u32>(address + (frame & 0x3fff_ffff)));
        space.set(address, 3, 0);
        if bit((EXT1, 0, D, 26)) {
            t.eq("the value there", got.unwrap_or(0), 0x5aa5u32);
        } else {
            t.faults(
                "a read where bit 7 of a PDPTE is reserved",
                got,
                PF,
                Some(platform::reserved_bit_error()),
            );
        }
    });
    case("memory.nx_follows_nxe", |t| {
        let address = AREA + (3 << 30);
        let frame = space.map_new(address, P | W);
        poke(frame, 0xc3u8);
        space.map(address, frame, 1, P | W | NX);
        let call = || exec!("call {}", in(reg) address);
        if bit((EXT1, 0, D, 20)) {
            t.faults("a call with NXE", catch(call), PF, Some(E_P | E_I));
            t.works("a read with NXE", catch(|| peek::<u8>(address)));
            wrmsr(MSR_EFER, rdmsr(MSR_EFER) & !EFER_NXE);
            set_cr3(cr3());
        }
        let got = catch(|| peek::<u8>(address));
        if bit((EXT1, 0, D, 20)) {
            wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_NXE);
            set_cr3(cr3());
        }
        t.faults("a read with NXE clear", got, PF, Some(platform::reserved_bit_error()));
    });
    case("memory.smep", |t| {
        let address = AREA + (4 << 30);
        let frame = space.map_new(address, P | W | U);
        poke(frame, 0xc3u8);
        let call = || exec!("call {}", in(reg) address);
        t.works("a call of a user page", catch(call));
        if bit((7, 0, B, 7)) {
            set_cr4(cr4() | CR4_SMEP);
            t.faults("the same with SMEP", catch(call), PF, Some(E_P | E_I));
        }
    });
    case("memory.smap", |t| {
        let address = AREA + (5 << 30);
        space.map_new(address, P | W | U);
        t.works("a read of a user page", catch(|| peek::<u8>(address)));
        if bit((7, 0, B, 20)) {
            set_cr4(cr4() | CR4_SMAP);
            t.faults("the same with SMAP", catch(|| peek::<u8>(address)), PF, Some(E_P));
            exec!("stac");
            let got = catch(|| peek::<u8>(address));
            exec!("clac");
            t.works("the same with AC", got);
        }
    });
    case("memory.pku", |t| {
        let address = AREA + (6 << 30);
        let frame = space.map_new(address, P | W | U);
        space.map(address, frame, 1, P | W | U | 3 << 59);
        t.works("a read of a page with a key, which is ignored", catch(|| peek::<u8>(address)));
        if bit((7, 0, C, 3)) {
            set_cr4(cr4() | CR4_PKE);
            // The translation that is cached may have been made without its key.
            invlpg(address);
            let pkru = |value: u32| exec!("wrpkru", in("eax") value, in("ecx") 0, in("edx") 0);
            pkru(1 << 6);
            t.faults("the same with PKE and AD", catch(|| peek::<u8>(address)), PF, Some(E_P | E_PK));
            pkru(0);
        }
    });
    case("memory.pks", |t| {
        let address = AREA + (7 << 30);
        let frame = space.map_new(address, P | W);
        space.map(address, frame, 1, P | W | 3 << 59);
        t.works("a read of a supervisor page with a key, which is ignored", catch(|| peek::<u8>(address)));
        if bit((7, 0, C, 31)) {
            set_cr4(cr4() | CR4_PKS);
            // The translation that is cached may have been made without its key.
            invlpg(address);
            wrmsr(MSR_PKRS, 1 << 6);
            let got = catch(|| peek::<u8>(address));
            wrmsr(MSR_PKRS, 0);
            t.faults("the same with PKS and AD", got, PF, Some(E_P | E_PK));
        }
    });
    case("memory.pcid", |t| {
        if !bit((1, 0, C, 17)) {
            if platform::bad_cr_write_hangs() {
                return t.skip("no PCID, and QEMU TCG stops at a MOV to CR4 with a reserved bit");
            }
            t.faults("PCIDE without PCID", catch(|| set_cr4(cr4() | CR4_PCIDE)), GP, Some(0));
            return;
        }
        set_cr3(cr3() & !0xfff);
        set_cr4(cr4() | CR4_PCIDE);
        let root = cr3();
        for pcid in [1u64, 0xfff, 0] {
            set_cr3(root | pcid);
            t.eq("CR3", cr3(), root | pcid);
        }
        t.works("CR3 with bit 63", catch(|| set_cr3(root | 1 << 63)));
        t.eq("CR3 without it", cr3(), root);
    });
    case("memory.canonical_width", |t| {
        // Four levels are in use, whatever LA57 says.
        t.faults("a read at 1 << 47", catch(|| peek::<u8>(1 << 47)), GP, Some(0));
        if bit((7, 0, C, 16)) {
            t.eq("CR4.LA57", cr4() & CR4_LA57, 0u64);
        }
    });
}
