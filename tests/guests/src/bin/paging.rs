//! The guest's own page tables: faults, permissions, accessed and dirty bits, and all of its memory.
#![no_std]
#![no_main]
// Cases execute code that they wrote into pages.
#![allow(unsafe_code)]
use guests::dev::fw_cfg;
use guests::frames::{self, PAGE, PAGE_2M};
use guests::multiboot::boot;
use guests::paging::{has_1g, Space, A, D, E_I, E_P, E_PK, E_U, E_W, G, NX, P, PLAYGROUND, PS, U, W};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{self, catch, Eoi, GP, PF, UD};
use guests::user::{self, Start};
use guests::{exec, machine, main};

main!(run);

/// Each case takes its own 16 MiB of the playground.
fn area(index: u64) -> u64 {
    PLAYGROUND + 0x1000_0000 + index * 0x100_0000
}

fn run() {
    error_codes();
    reserved_bits();
    permissions();
    accessed_and_dirty();
    features();
    contexts();
    translations();
    large_pages();
    memory();
}

/// Runs `RET` at `address` and returns.
fn execute(address: u64) {
    exec!("call {}", in(reg) address);
}

const RET: u8 = 0xc3;

fn error_codes() {
    let space = Space::current();
    for (name, level) in
        [("not_present.pml4e", 4), ("not_present.pdpte", 3), ("not_present.pde", 2), ("not_present.pte", 1)]
    {
        case(name, |t| {
            // An address whose walk ends at `level`.
            let address = match level {
                4 => 0x100_0000_0000,
                3 => PLAYGROUND + (5 << 30),
                2 => area(0) + PAGE_2M,
                _ => area(0),
            } + 0x123;
            space.entry(address, level);
            space.set(address, level, 0);
            let fault = t.faults("a read", catch(|| peek::<u8>(address)), PF, Some(0));
            t.eq("CR2", fault.cr2, address);
            let fault = t.faults("a write", catch(|| poke(address, 1u8)), PF, Some(E_W));
            t.eq("CR2", fault.cr2, address);
            let fault = t.faults("a fetch", catch(|| execute(address)), PF, Some(E_I));
            t.eq("CR2", fault.cr2, address);
            t.eq("RIP", fault.rip, address);
        });
    }
    case("not_present.other_bits_do_not_matter", |t| {
        let address = area(1);
        for value in [!1u64, W | U | A | D, 1 << 51, NX] {
            space.set(address, 1, value & !P);
            t.faults("a read", catch(|| peek::<u8>(address)), PF, Some(0));
        }
    });
    case("write.read_only_page", |t| {
        let address = area(2);
        space.map_new(address, P);
        t.works("a read", catch(|| peek::<u8>(address)));
        let fault = t.faults("a write", catch(|| poke(address + 7, 1u8)), PF, Some(E_P | E_W));
        t.eq("CR2", fault.cr2, address + 7);
    });
    case("write.every_writing_instruction", |t| {
        let address = area(2) + PAGE;
        space.map_new(address, P);
        t.faults("ADD", catch(|| exec!("add dword ptr [{}], 0", in(reg) address)), PF, Some(E_P | E_W));
        t.faults(
            "XCHG",
            catch(|| exec!("xchg [{}], eax", in(reg) address, out("eax") _)),
            PF,
            Some(E_P | E_W),
        );
        // CMPXCHG writes even when the comparison fails. AMD APM vol. 3, CMPXCHG.
        t.faults(
            "CMPXCHG that would not store",
            catch(|| exec!("cmpxchg [{}], ecx", in(reg) address, inout("eax") 1 => _)),
            PF,
            Some(E_P | E_W),
        );
        t.faults("STOS", catch(|| exec!("stosb", inout("rdi") address => _)), PF, Some(E_P | E_W));
        t.faults("BTS", catch(|| exec!("bts dword ptr [{}], 1", in(reg) address)), PF, Some(E_P | E_W));
        t.works("BT", catch(|| exec!("bt dword ptr [{}], 1", in(reg) address)));
    });
    case("fetch.no_execute_page", |t| {
        let address = area(3);
        let frame = space.map_new(address, P | W);
        poke(frame, RET);
        t.works("a call", catch(|| execute(address)));
        space.map(address, frame, 1, P | W | NX);
        t.works("a read", catch(|| peek::<u8>(address)));
        let fault = t.faults("a call", catch(|| execute(address)), PF, Some(E_P | E_I));
        t.eq("CR2", fault.cr2, address);
    });
    case("fetch.across_into_missing_page", |t| {
        let address = area(3) + 0x10_0000;
        let frame = space.map_new(address, P | W);
        space.set(address + PAGE, 1, 0);
        // The first byte of a two-byte instruction is the last of the page.
        poke(frame + PAGE - 1, 0x0fu8);
        let fault = t.faults("a call", catch(|| execute(address + PAGE - 1)), PF, Some(E_I));
        t.eq("CR2, in the second page", fault.cr2, address + PAGE);
        t.eq("RIP, in the first page", fault.rip, address + PAGE - 1);
    });
    case("access.across_into_missing_page", |t| {
        let address = area(3) + 0x20_0000;
        space.map_new(address, P | W);
        space.set(address + PAGE, 1, 0);
        for offset in 1..8u64 {
            let fault = t.faults("a read", catch(|| peek::<u64>(address + PAGE - offset)), PF, Some(0));
            t.eq("CR2", fault.cr2, address + PAGE);
        }
    });
}

fn reserved_bits() {
    let space = Space::current();
    // TCG leaves P out of the code although the entry is present.
    let code = guests::platform::reserved_bit_error();
    let wide = machine::physical_bits();
    for (name, level) in
        [("reserved.pml4e", 4), ("reserved.pdpte", 3), ("reserved.pde", 2), ("reserved.pte", 1)]
    {
        case(name, |t| {
            if wide == 52 {
                return t.skip("all 52 address bits exist");
            }
            let address = if level == 4 { 0x180_0000_0000 } else { PLAYGROUND + (6 << 30) };
            space.map_new(address, P | W);
            let good = space.get(address, level);
            space.set(address, level, good | 1 << 51);
            let got = catch(|| peek::<u8>(address));
            let write = catch(|| poke(address, 0u8));
            space.set(address, level, good);
            t.faults("a read", got, PF, Some(code));
            t.faults("a write", write, PF, Some(code | E_W));
            t.works("a read after the repair", catch(|| peek::<u8>(address)));
        });
    }
    case("reserved.large_page_low_bits", |t| {
        let address = area(4);
        let frame = frames::untouched(PAGE_2M, PAGE_2M);
        space.map(address, frame, 2, P | W);
        t.works("a read", catch(|| peek::<u8>(address)));
        // Bits 13 to 20 of a 2 MiB entry are reserved; bit 12 is PAT.
        space.map(address, frame | 1 << 12, 2, P | W);
        t.works("a read with the PAT bit", catch(|| peek::<u8>(address)));
        space.map(address, frame | 1 << 13, 2, P | W);
        t.faults("a read with bit 13", catch(|| peek::<u8>(address)), PF, Some(code));
        space.set(address, 2, 0);
    });
    case("reserved.large_pml4e", |t| {
        let address = 0x200_0000_0000;
        space.map_new(address, P | W);
        let good = space.get(address, 4);
        space.set(address, 4, good | PS);
        let got = catch(|| peek::<u8>(address));
        space.set(address, 4, good);
        t.faults("a read", got, PF, Some(code));
    });
    case("reserved.nx_without_nxe", |t| {
        let address = area(5);
        let frame = space.map_new(address, P | W);
        space.map(address, frame, 1, P | W | NX);
        wrmsr(MSR_EFER, rdmsr(MSR_EFER) & !EFER_NXE);
        set_cr3(cr3());
        let got = catch(|| peek::<u8>(address));
        wrmsr(MSR_EFER, rdmsr(MSR_EFER) | EFER_NXE);
        set_cr3(cr3());
        t.faults("a read", got, PF, Some(code));
        t.works("a read with NXE", catch(|| peek::<u8>(address)));
    });
}

fn permissions() {
    let space = Space::current();
    // mov al, [rax]; ud2 / mov [rax], al; ud2 / jmp rax
    const READ: &[u8] = &[0x8a, 0x00, 0x0f, 0x0b];
    const WRITE: &[u8] = &[0x88, 0x00, 0x0f, 0x0b];
    const JUMP: &[u8] = &[0xff, 0xe0];
    let user = |code: &[u8], rax: u64| user::run_mapped(code, Start { rax, ..Start::default() }).0;
    case("user.supervisor_page", |t| {
        user::map();
        let address = area(6);
        space.map_new(address, P | W);
        t.faults("a read", Err::<(), _>(user(READ, address)), PF, Some(E_P | E_U));
        t.faults("a write", Err::<(), _>(user(WRITE, address)), PF, Some(E_P | E_U | E_W));
        t.faults("a fetch", Err::<(), _>(user(JUMP, address)), PF, Some(E_P | E_U | E_I));
    });
    case("user.missing_page", |t| {
        user::map();
        let address = area(6) + 0x10_0000;
        space.entry(address, 1);
        t.faults("a read", Err::<(), _>(user(READ, address)), PF, Some(E_U));
        t.faults("a write", Err::<(), _>(user(WRITE, address)), PF, Some(E_U | E_W));
        t.faults("a fetch", Err::<(), _>(user(JUMP, address)), PF, Some(E_U | E_I));
    });
    case("user.allowed", |t| {
        user::map();
        let address = area(6) + 0x20_0000;
        let frame = space.map_new(address, P | W | U);
        t.faults("UD2 after a read", Err::<(), _>(user(READ, address)), UD, None);
        t.faults("UD2 after a write", Err::<(), _>(user(WRITE, address)), UD, None);
        poke(frame, [0x0fu8, 0x0b]);
        let fault = t.faults("UD2 after a jump", Err::<(), _>(user(JUMP, address)), UD, None).rip;
        t.eq("RIP", fault, address);
    });
    // A permission counts only when every level grants it.
    for (name, level) in [("levels.pml4e", 4), ("levels.pdpte", 3), ("levels.pde", 2)] {
        case(name, |t| {
            user::map();
            let address = 0x280_0000_0000 + (u64::from(level) << 39);
            let frame = space.map_new(address, P | W | U);
            poke(frame, [0x0fu8, 0x0b]);
            let good = space.get(address, level);
            space.set(address, level, good & !W);
            t.faults("a supervisor write", catch(|| poke(address + 8, 1u8)), PF, Some(E_P | E_W));
            t.faults("a user write", Err::<(), _>(user(WRITE, address + 8)), PF, Some(E_P | E_W | E_U));
            space.set(address, level, good & !U);
            t.faults("a user read", Err::<(), _>(user(READ, address)), PF, Some(E_P | E_U));
            space.set(address, level, good | NX);
            t.faults("a user fetch", Err::<(), _>(user(JUMP, address)), PF, Some(E_P | E_U | E_I));
            space.set(address, level, good);
            t.faults("UD2 after a jump", Err::<(), _>(user(JUMP, address)), UD, None);
        });
    }
    case("wp.clear_lets_supervisor_write", |t| {
        let address = area(7);
        let frame = space.map_new(address, P);
        set_cr0(cr0() & !CR0_WP);
        t.works("a write with WP clear", catch(|| poke(address, 0x5au8)));
        set_cr0(cr0() | CR0_WP);
        t.faults("a write with WP set", catch(|| poke(address, 0xa5u8)), PF, Some(E_P | E_W));
        t.eq("the byte", peek::<u8>(frame), 0x5au8);
    });
    case("wp.toggled_many_times", |t| {
        let address = area(7) + 0x10_0000;
        space.map_new(address, P);
        for _ in 0..100 {
            set_cr0(cr0() & !CR0_WP);
            t.works("a write with WP clear", catch(|| poke(address, 1u8)));
            set_cr0(cr0() | CR0_WP);
            t.faults("a write with WP set", catch(|| poke(address, 1u8)), PF, Some(E_P | E_W));
        }
    });
    case("wp.does_not_help_user_mode", |t| {
        user::map();
        let address = area(7) + 0x20_0000;
        space.map_new(address, P | U);
        set_cr0(cr0() & !CR0_WP);
        t.faults("a user write", Err::<(), _>(user(WRITE, address)), PF, Some(E_P | E_W | E_U));
    });
}

fn accessed_and_dirty() {
    let space = Space::current();
    case("ad.read_sets_accessed", |t| {
        let address = area(8);
        space.map_new(address, P | W);
        t.eq("A and D before", space.get(address, 1) & (A | D), 0u64);
        peek::<u8>(address);
        t.eq("A and D after a read", space.get(address, 1) & (A | D), A);
    });
    case("ad.write_sets_dirty", |t| {
        let address = area(8) + 0x10_0000;
        space.map_new(address, P | W);
        poke(address, 1u8);
        t.eq("A and D after a write", space.get(address, 1) & (A | D), A | D);
    });
    case("ad.write_after_read", |t| {
        let address = area(8) + 0x20_0000;
        space.map_new(address, P | W);
        peek::<u8>(address);
        poke(address, 1u8);
        t.eq("A and D", space.get(address, 1) & (A | D), A | D);
    });
    case("ad.fetch_sets_accessed", |t| {
        let address = area(8) + 0x30_0000;
        let frame = space.map_new(address, P | W);
        poke(frame, RET);
        execute(address);
        t.eq("A and D", space.get(address, 1) & (A | D), A);
    });
    case("ad.upper_levels", |t| {
        let address = 0x380_0000_0000;
        space.map_new(address, P | W);
        poke(address, 1u8);
        for level in 2..=4 {
            t.eq("A and D of a table entry", space.get(address, level) & (A | D), A);
        }
    });
    case("ad.cleared_and_set_again", |t| {
        let address = area(8) + 0x40_0000;
        let frame = space.map_new(address, P | W);
        for _ in 0..50 {
            space.map(address, frame, 1, P | W);
            peek::<u8>(address);
            t.eq("A and D after a read", space.get(address, 1) & (A | D), A);
            poke(address, 1u8);
            t.eq("A and D after a write", space.get(address, 1) & (A | D), A | D);
        }
    });
    case("ad.refused_write_sets_no_dirty", |t| {
        let address = area(8) + 0x50_0000;
        space.map_new(address, P);
        t.faults("a write", catch(|| poke(address, 1u8)), PF, Some(E_P | E_W));
        t.eq("D", space.get(address, 1) & D, 0u64);
    });
    case("ad.large_page", |t| {
        let address = area(9);
        space.map(address, frames::untouched(PAGE_2M, PAGE_2M), 2, P | W);
        peek::<u8>(address + 0x12345);
        t.eq("A and D after a read", space.get(address, 2) & (A | D), A);
        poke(address + 0x12345, 1u8);
        t.eq("A and D after a write", space.get(address, 2) & (A | D), A | D);
        space.set(address, 2, 0);
    });
    case("ad.push_sets_dirty", |t| {
        let address = area(9) + 0x40_0000;
        space.map_new(address, P | W);
        exec!("mov {s}, rsp", "mov rsp, {v}", "push 0", "mov rsp, {s}", s = out(reg) _, v = in(reg) address + 64);
        t.eq("A and D", space.get(address, 1) & (A | D), A | D);
    });
}

fn features() {
    let space = Space::current();
    let offered = |t: &mut Case, register: fn(&Cpuid) -> u32, bit: u32, name: &str| {
        let offered = has(7, 0, register, bit);
        if !offered {
            t.skip(name);
        }
        offered
    };
    case("smep.supervisor_fetch_from_user_page", |t| {
        if !offered(t, |r| r.ebx, 7, "no SMEP") {
            return;
        }
        let address = area(10);
        let frame = space.map_new(address, P | W | U);
        poke(frame, RET);
        t.works("a call without SMEP", catch(|| execute(address)));
        set_cr4(cr4() | CR4_SMEP);
        t.faults("a call with SMEP", catch(|| execute(address)), PF, Some(E_P | E_I));
        t.works("a read with SMEP", catch(|| peek::<u8>(address)));
        set_cr4(cr4() & !CR4_SMEP);
        t.works("a call without SMEP again", catch(|| execute(address)));
    });
    case("smap.supervisor_access_to_user_page", |t| {
        if !offered(t, |r| r.ebx, 20, "no SMAP") {
            return;
        }
        let address = area(10) + 0x10_0000;
        space.map_new(address, P | W | U);
        set_cr4(cr4() | CR4_SMAP);
        t.faults("a read", catch(|| peek::<u8>(address)), PF, Some(E_P));
        t.faults("a write", catch(|| poke(address, 1u8)), PF, Some(E_P | E_W));
        exec!("stac");
        let read = catch(|| peek::<u8>(address));
        let write = catch(|| poke(address, 1u8));
        exec!("clac");
        t.works("a read with AC", read);
        t.works("a write with AC", write);
        t.faults("a read after CLAC", catch(|| peek::<u8>(address)), PF, Some(E_P));
    });
    case("pku.access_and_write_disable", |t| {
        if !offered(t, |r| r.ecx, 3, "no protection keys") {
            return;
        }
        let address = area(11);
        // Protection key 5 in bits 59 to 62.
        let frame = space.map_new(address, P | W | U);
        space.map(address, frame, 1, P | W | U | 5 << 59);
        set_cr4(cr4() | CR4_PKE);
        let pkru = |value: u32| exec!("wrpkru", in("eax") value, in("ecx") 0, in("edx") 0);
        pkru(0);
        t.works("a write with PKRU 0", catch(|| poke(address, 1u8)));
        pkru(2 << 10);
        t.works("a read with WD", catch(|| peek::<u8>(address)));
        t.faults("a write with WD", catch(|| poke(address, 1u8)), PF, Some(E_P | E_W | E_PK));
        pkru(1 << 10);
        t.faults("a read with AD", catch(|| peek::<u8>(address)), PF, Some(E_P | E_PK));
        set_cr0(cr0() & !CR0_WP);
        pkru(2 << 10);
        t.works("a supervisor write with WD and WP clear", catch(|| poke(address, 1u8)));
        pkru(0);
    });
    case("pku.survives_exits", |t| {
        if !offered(t, |r| r.ecx, 3, "no protection keys") {
            return;
        }
        set_cr4(cr4() | CR4_PKE);
        exec!("wrpkru", in("eax") 0x5555_5550u32, in("ecx") 0, in("edx") 0);
        for _ in 0..50 {
            cpuid(0, 0);
            inb(0x21);
        }
        let value: u32;
        exec!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _);
        exec!("wrpkru", in("eax") 0, in("ecx") 0, in("edx") 0);
        t.eq("PKRU", value, 0x5555_5550u32);
    });
    case("pks.access_and_write_disable", |t| {
        if !offered(t, |r| r.ecx, 31, "no protection keys of supervisor pages") {
            return;
        }
        let (address, users) = (area(11) + 0x10_0000, area(11) + 0x20_0000);
        for (at, user) in [(address, 0), (users, U)] {
            let frame = space.map_new(at, P | W);
            space.map(at, frame, 1, P | W | user | 5 << 59);
        }
        set_cr4(cr4() | CR4_PKS);
        t.works("a write with PKRS 0", catch(|| poke(address, 1u8)));
        wrmsr(MSR_PKRS, 2 << 10);
        t.works("a read with WD", catch(|| peek::<u8>(address)));
        t.faults("a write with WD", catch(|| poke(address, 1u8)), PF, Some(E_P | E_W | E_PK));
        t.works("a write to a user page", catch(|| poke(users, 1u8)));
        wrmsr(MSR_PKRS, 1 << 10);
        t.faults("a read with AD", catch(|| peek::<u8>(address)), PF, Some(E_P | E_PK));
        t.works("a read of a user page", catch(|| peek::<u8>(users)));
        set_cr0(cr0() & !CR0_WP);
        t.faults("a read with AD and WP clear", catch(|| peek::<u8>(address)), PF, Some(E_P | E_PK));
        wrmsr(MSR_PKRS, 2 << 10);
        t.works("a write with WD and WP clear", catch(|| poke(address, 1u8)));
        wrmsr(MSR_PKRS, 0);
    });
    case("pks.register", |t| {
        if !offered(t, |r| r.ecx, 31, "no protection keys of supervisor pages") {
            return;
        }
        // With CR4.PKS clear the register is there all the same.
        for value in [0x5555_5550u64, 0xffff_fffc, 0] {
            wrmsr(MSR_PKRS, value);
            for _ in 0..50 {
                cpuid(0, 0);
                inb(0x21);
            }
            t.eq("PKRS", rdmsr(MSR_PKRS), value);
        }
        t.faults("a high bit", try_wrmsr(MSR_PKRS, 1 << 32), GP, Some(0));
    });
    case("keys.hold_for_emulated_accesses", |t| {
        // From a device to a page: what a hypervisor emulates is a read that a key has no part in, and the write.
        let move_to = |address: u64| {
            exec!("movsd", inout("rsi") 0xfec0_0000u64 => _, inout("rdi") address => _);
        };
        let (user, supervisor) = (area(11) + 0x30_0000, area(11) + 0x40_0000);
        for (at, flags) in [(user, U), (supervisor, 0)] {
            let frame = space.map_new(at, P | W);
            space.map(at, frame, 1, P | W | flags | 5 << 59);
            t.works("a write without keys", catch(|| move_to(at)));
        }
        let mut tried = 0;
        if has(7, 0, |r| r.ecx, 3) {
            tried += 1;
            set_cr4(cr4() | CR4_PKE);
            let pkru = |value: u32| exec!("wrpkru", in("eax") value, in("ecx") 0, in("edx") 0);
            pkru(2 << 10);
            let (kept, other) = (catch(|| move_to(user)), catch(|| move_to(supervisor)));
            pkru(0);
            t.faults("a write with PKRU's WD", kept, PF, Some(E_P | E_W | E_PK));
            t.works("a write to a supervisor page", other);
        }
        if has(7, 0, |r| r.ecx, 31) {
            tried += 1;
            set_cr4(cr4() | CR4_PKS);
            wrmsr(MSR_PKRS, 2 << 10);
            let (kept, other) = (catch(|| move_to(supervisor)), catch(|| move_to(user)));
            wrmsr(MSR_PKRS, 0);
            t.faults("a write with PKRS's WD", kept, PF, Some(E_P | E_W | E_PK));
            t.works("a write to a user page", other);
        }
        if tried == 0 {
            t.skip("no protection keys");
        }
    });
    case("global.pge_toggle_flushes", |t| {
        let address = area(12);
        let (first, second) = (frames::page(), frames::page());
        poke(first, 1u8);
        poke(second, 2u8);
        set_cr4(cr4() | CR4_PGE);
        space.map(address, first, 1, P | W | G);
        t.eq("the first frame", peek::<u8>(address), 1u8);
        poke(space.entry(address, 1), second | P | W | G);
        set_cr4(cr4() & !CR4_PGE);
        set_cr4(cr4() | CR4_PGE);
        t.eq("the second frame after toggling PGE", peek::<u8>(address), 2u8);
        poke(space.entry(address, 1), first | P | W | G);
        invlpg(address);
        t.eq("the first frame after INVLPG", peek::<u8>(address), 1u8);
    });
}

/// INVPCID of `kind`.
fn invpcid(kind: u64, pcid: u64, address: u64) {
    let descriptor = [pcid, address];
    exec!("invpcid {}, [{}]", in(reg) kind, in(reg) &descriptor);
}

/// MOV to CR3: keep the translations of the PCID.
const KEEP: u64 = 1 << 63;

/// Process-context identifiers and INVPCID.
fn contexts() {
    let space = Space::current();
    let pcids = |t: &mut Case, too_invpcid: bool| {
        let offered = has(1, 0, |r| r.ecx, 17) && (!too_invpcid || has(7, 0, |r| r.ebx, 10));
        if offered {
            set_cr3(space.root);
            set_cr4(cr4() | CR4_PCIDE);
        } else {
            t.skip("not offered");
        }
        offered
    };
    let done = || {
        set_cr3(space.root);
        set_cr4(cr4() & !CR4_PCIDE);
    };
    case("pcid.register", |t| {
        if !pcids(t, false) {
            return;
        }
        for pcid in [0u64, 1, 0x123, 0xfff] {
            for keep in [0, KEEP] {
                set_cr3(space.root | pcid | keep);
                t.eq("CR3, without the order", cr3(), space.root | pcid);
            }
        }
        t.faults("clearing PG", catch(|| set_cr0(cr0() & !(1 << 31))), GP, Some(0));
        set_cr3(space.root | 5);
        t.works("clearing PCIDE with a PCID", catch(|| set_cr4(cr4() & !CR4_PCIDE)));
        t.eq("CR3 keeps it, as flags", cr3(), space.root | 5);
        t.faults("setting PCIDE with one", catch(|| set_cr4(cr4() | CR4_PCIDE)), GP, Some(0));
        t.faults("the order without PCIDE", catch(|| set_cr3(space.root | KEEP)), GP, Some(0));
        done();
    });
    case("pcid.spaces_apart", |t| {
        if !pcids(t, false) {
            return;
        }
        // Two spaces, each with its PCID, are never flushed and never mixed up.
        let address = 0x1100_0000_0000;
        let spaces = [Space::fork(), Space::fork()];
        for (index, each) in spaces.iter().enumerate() {
            let frame = each.map_new(address, P | W);
            poke(frame, index as u64 + 7);
        }
        for _ in 0..200 {
            for (index, each) in spaces.iter().enumerate() {
                set_cr3(each.root | (index as u64 + 1) | KEEP);
                t.eq("the space's own word", peek::<u64>(address), index as u64 + 7);
            }
        }
        done();
    });
    case("pcid.kept_translations", |t| {
        if !pcids(t, false) {
            return;
        }
        let address = area(23);
        let frames = [1u64, 2].map(|word| {
            let frame = frames::page();
            poke(frame, word);
            frame
        });
        for round in 0..100 {
            let (old, new) = (frames[round % 2], frames[1 - round % 2]);
            set_cr3(space.root | 1);
            space.map(address, old, 1, P | W);
            peek::<u64>(address);
            poke(space.entry(address, 1), new | P | W);
            // Another PCID and back: what was cached may be there still, or not.
            set_cr3(space.root | 2);
            t.eq("under a PCID that is new", peek::<u64>(address), 2 - round as u64 % 2);
            set_cr3(space.root | 1 | KEEP);
            t.within("the old word or the new", peek::<u64>(address), 1, 2);
            set_cr3(space.root | 1);
            t.eq("after a flush", peek::<u64>(address), 2 - round as u64 % 2);
        }
        done();
    });
    case("invpcid.types", |t| {
        if !pcids(t, true) {
            return;
        }
        let address = area(24);
        let frames = [1u64, 2].map(|word| {
            let frame = frames::page();
            poke(frame, word);
            frame
        });
        // An entry changes, and its old translation goes by INVPCID: of this PCID and of another one, which comes back
        // with all that it had.
        for (kind, of) in [(0, 1u64), (1, 1), (2, 0), (3, 0), (0, 2), (1, 2), (2, 0), (3, 0)] {
            for round in 0..40 {
                let (old, new) = (frames[round % 2], frames[1 - round % 2]);
                for pcid in [1, 2] {
                    set_cr3(space.root | pcid);
                    space.map(address, old, 1, P | W);
                    t.eq("the word", peek::<u64>(address), 1 + round as u64 % 2);
                }
                set_cr3(space.root | 1 | KEEP);
                poke(space.entry(address, 1), new | P | W);
                invpcid(kind, of, address);
                if of != 1 {
                    set_cr3(space.root | 2 | KEEP);
                }
                t.eq("the word after INVPCID", peek::<u64>(address), 2 - round as u64 % 2);
            }
        }
        done();
    });
    case("invpcid.all_takes_global_pages", |t| {
        if !pcids(t, true) {
            return;
        }
        let address = area(24) + 0x10_0000;
        let (first, second) = (frames::page(), frames::page());
        poke(second, 2u64);
        set_cr4(cr4() | CR4_PGE);
        for _ in 0..20 {
            space.map(address, first, 1, P | W | G);
            t.eq("the first word", peek::<u64>(address), 0u64);
            poke(space.entry(address, 1), second | P | W | G);
            invpcid(2, 0, 0);
            t.eq("the second word", peek::<u64>(address), 2u64);
        }
        done();
    });
    case("invpcid.refused", |t| {
        if !pcids(t, true) {
            return;
        }
        for kind in [4u64, 5, !0] {
            t.faults("a type that is none", catch(|| invpcid(kind, 0, 0)), GP, Some(0));
        }
        for kind in 0..4 {
            t.faults("a reserved bit", catch(|| invpcid(kind, 1 << 12, 0)), GP, Some(0));
            t.faults("the highest bit", catch(|| invpcid(kind, 1 << 63, 0)), GP, Some(0));
            t.works("any PCID", catch(|| invpcid(kind, 0xfff, 0)));
        }
        t.faults("an address that is none", catch(|| invpcid(0, 0, 1 << 63)), GP, Some(0));
        t.works("which counts for type 0 alone", catch(|| invpcid(1, 0, 1 << 63)));
        let missing = area(24) + 0x20_0000;
        space.entry(missing, 1);
        let got = catch(|| exec!("invpcid {}, [{}]", in(reg) 2u64, in(reg) missing));
        t.faults("a descriptor on no page", got, PF, Some(0));
        // invpcid rax, [rbx]
        let user = user::run(&[0x66, 0x0f, 0x38, 0x82, 0x03], Start::default()).0;
        t.faults("in ring 3", Err::<(), _>(user), GP, Some(0));
        done();
        for kind in [0, 1] {
            t.faults("a PCID without PCIDE", catch(|| invpcid(kind, 1, 0)), GP, Some(0));
            t.works("PCID 0 without PCIDE", catch(|| invpcid(kind, 0, 0)));
        }
    });
}

fn translations() {
    let space = Space::current();
    case("invlpg.remap", |t| {
        let address = area(13);
        let (first, second) = (frames::page(), frames::page());
        poke(first, 0x1111u32);
        poke(second, 0x2222u32);
        for _ in 0..200 {
            space.map(address, first, 1, P | W);
            t.eq("the first frame", peek::<u32>(address), 0x1111u32);
            space.map(address, second, 1, P | W);
            t.eq("the second frame", peek::<u32>(address), 0x2222u32);
        }
    });
    case("cr3.reload_remaps", |t| {
        let address = area(13) + 0x10_0000;
        let (first, second) = (frames::page(), frames::page());
        poke(first, 0x1111u32);
        poke(second, 0x2222u32);
        for _ in 0..200 {
            poke(space.entry(address, 1), first | P | W);
            set_cr3(cr3());
            t.eq("the first frame", peek::<u32>(address), 0x1111u32);
            poke(space.entry(address, 1), second | P | W);
            set_cr3(cr3());
            t.eq("the second frame", peek::<u32>(address), 0x2222u32);
        }
    });
    case("cr3.two_spaces", |t| {
        let address = 0x1000_0000_0000;
        let spaces = [Space::fork(), Space::fork()];
        for (index, each) in spaces.iter().enumerate() {
            let frame = each.map_new(address, P | W);
            poke(frame, index as u32 + 7);
        }
        for _ in 0..500 {
            for (index, each) in spaces.iter().enumerate() {
                each.activate();
                t.eq("the space's own page", peek::<u32>(address), index as u32 + 7);
            }
        }
    });
    case("cr3.many_spaces", |t| {
        let address = 0x1080_0000_0000;
        let spaces: [Space; 16] = core::array::from_fn(|index| {
            let each = Space::fork();
            let frame = each.map_new(address, P | W);
            poke(frame, index as u32);
            each
        });
        for round in 0..20u32 {
            for (index, each) in spaces.iter().enumerate() {
                each.activate();
                t.eq("the space's own page", peek::<u32>(address), index as u32 + round);
                poke(address, index as u32 + round + 1);
            }
        }
    });
    case("walk.not_present_is_not_cached", |t| {
        // Making an entry present needs no flush. AMD APM vol. 2, 5.5.2.
        let address = area(14);
        space.entry(address, 1);
        for page in 0..100 {
            let at = address + page * PAGE;
            t.faults("a read", catch(|| peek::<u8>(at)), PF, Some(0));
            poke(space.entry(at, 1), frames::page() | P | W);
            t.works("a read", catch(|| peek::<u8>(at)));
        }
    });
    case("walk.table_changed_under_it", |t| {
        // A page directory entry that points at one table, then at another.
        let address = area(15);
        let frame = space.map_new(address, P | W);
        poke(frame, 1u32);
        let first = space.get(address, 2);
        space.set(address, 2, 0);
        let frame = space.map_new(address, P | W);
        poke(frame, 2u32);
        let second = space.get(address, 2);
        for _ in 0..100 {
            space.set(address, 2, first);
            t.eq("through the first table", peek::<u32>(address), 1u32);
            space.set(address, 2, second);
            t.eq("through the second table", peek::<u32>(address), 2u32);
        }
    });
    case("walk.demand_faults", |t| {
        trap::on(PF, Eoi::None, |_| {
            Space::current().map_new(cr2() & !(PAGE - 1), P | W);
        });
        let base = area(16);
        for page in 0..2000u64 {
            poke(base + page * PAGE + (page * 8) % PAGE, page);
        }
        t.eq("page faults", trap::count(PF), 2000u32);
        for page in 0..2000u64 {
            t.eq("the word stored", peek::<u64>(base + page * PAGE + (page * 8) % PAGE), page);
        }
    });
    case("walk.aliases", |t| {
        // One frame at 64 addresses: a write through one is seen through all.
        let base = area(17);
        let frame = frames::page();
        (0..64).for_each(|page| space.map(base + page * PAGE, frame, 1, P | W));
        for page in 0..64 {
            poke(base + page * PAGE + 0x100, page);
            t.eq("through the frame", peek::<u64>(frame + 0x100), page);
            t.eq("through another alias", peek::<u64>(base + (63 - page) * PAGE + 0x100), page);
        }
    });
    case("walk.split_pages_in_order", |t| {
        // An unaligned word over two frames that are not neighbours.
        let base = area(18);
        let (second, first) = (frames::page(), frames::page());
        space.map(base, first, 1, P | W);
        space.map(base + PAGE, second, 1, P | W);
        poke(base + PAGE - 3, 0x1122_3344_5566_7788u64);
        t.eq("the first part", peek::<u32>(first + PAGE - 4) >> 8, 0x66_7788u32);
        t.eq("the second part", peek::<u64>(second) & 0xff_ffff_ffff, 0x11_2233_4455u64);
        t.eq("the whole", peek::<u64>(base + PAGE - 3), 0x1122_3344_5566_7788u64);
    });
    case("walk.code_rewritten", |t| {
        let address = area(19);
        let frame = space.map_new(address, P | W);
        for value in 0..200u32 {
            // mov eax, value; ret, written through another address.
            poke(frame, 0xb8u8);
            value.to_le_bytes().iter().enumerate().for_each(|(at, &byte)| poke(frame + 1 + at as u64, byte));
            poke(frame + 5, RET);
            let got: u32;
            exec!("call {}", in(reg) address, out("eax") got);
            t.eq("EAX", got, value);
        }
    });
}

fn large_pages() {
    let space = Space::current();
    case("large.2m", |t| {
        let frame = frames::untouched(PAGE_2M, PAGE_2M);
        let address = area(20);
        space.map(address, frame, 2, P | W);
        for offset in (0..PAGE_2M).step_by(0x8000) {
            poke(address + offset, offset);
        }
        for offset in (0..PAGE_2M).step_by(0x8000) {
            t.eq("through the frame", peek::<u64>(frame + offset), offset);
        }
        space.set(address, 2, 0);
    });
    case("large.2m_split_and_back", |t| {
        let frame = frames::untouched(PAGE_2M, PAGE_2M);
        let address = area(21);
        poke(frame + 0x1_2345, 0x77u8);
        for _ in 0..20 {
            space.map(address, frame, 2, P | W);
            t.eq("through the large page", peek::<u8>(address + 0x1_2345), 0x77u8);
            space.set(address, 2, 0);
            for page in 0..512 {
                poke(space.entry(address + page * PAGE, 1), (frame + page * PAGE) | P | W);
            }
            set_cr3(cr3());
            t.eq("through small pages", peek::<u8>(address + 0x1_2345), 0x77u8);
        }
    });
    case("large.1g", |t| {
        if !has_1g() {
            return t.skip("no 1 GiB pages");
        }
        let frame = frames::page();
        poke(frame, 0x1234u32);
        let address = PLAYGROUND + (8 << 30);
        space.map(address, frame & !((1 << 30) - 1), 3, P | W);
        t.eq("through the large page", peek::<u32>(address + (frame & ((1 << 30) - 1))), 0x1234u32);
        t.eq("A and D", space.get(address, 3) & (A | D), A);
        poke(address + (frame & ((1 << 30) - 1)), 0x4321u32);
        t.eq("through the frame", peek::<u32>(frame), 0x4321u32);
        t.eq("A and D", space.get(address, 3) & (A | D), A | D);
        space.set(address, 3, 0);
    });
    case("large.read_only_2m", |t| {
        let address = area(22);
        space.map(address, frames::untouched(PAGE_2M, PAGE_2M), 2, P);
        let fault = t.faults("a write", catch(|| poke(address + 0x10_0000, 1u8)), PF, Some(E_P | E_W));
        t.eq("CR2", fault.cr2, address + 0x10_0000);
        space.set(address, 2, 0);
    });
}

/// Maps the 2 MiB around `physical` into a window and returns where it is.
fn window(physical: u64) -> u64 {
    let address = area(40);
    Space::current().map(address, physical & !(PAGE_2M - 1), 2, P | W);
    address + (physical & (PAGE_2M - 1))
}

fn memory() {
    case("memory.edges_of_every_range", |t| {
        for range in boot().ranges().iter().filter(|range| range.kind == 1 && range.len >= 2 * PAGE) {
            // The last whole word of the first page, and of the last.
            let end = (range.start + range.len) & !7;
            for address in [range.start.next_multiple_of(8) + PAGE - 8, end - 8, end - PAGE] {
                // The first page holds the interrupt vectors and BIOS data; put back what was there.
                let at = window(address);
                let old: u64 = peek(at);
                poke(at, 0x0123_4567_89ab_cdefu64 ^ address);
                let got: u64 = peek(at);
                poke(at, old);
                t.check(
                    got == 0x0123_4567_89ab_cdef ^ address,
                    format_args!("RAM at {address:#x}, got {got:#x} for what was stored"),
                );
            }
        }
    });
    case("memory.every_2m_is_distinct", |t| {
        // Above everything in use: a mark in each 2 MiB, all written before the first is checked.
        let ours = frames::untouched(0, PAGE_2M);
        let marks = || {
            boot().ranges().iter().filter(|range| range.kind == 1).flat_map(move |range| {
                let start = range.start.max(ours).next_multiple_of(PAGE_2M);
                (start..range.start + range.len).step_by(PAGE_2M as usize)
            })
        };
        marks().for_each(|address| poke(window(address), address ^ 0xa5a5));
        let mut count = 0;
        for address in marks() {
            let got: u64 = peek(window(address));
            t.check(got == address ^ 0xa5a5, format_args!("the mark of {address:#x}, got {got:#x}"));
            poke(window(address), 0u64);
            count += 1;
        }
        t.yes("some memory to mark", count > 0);
    });
    case("memory.first_touch_is_zero", |t| {
        let pages = (frames::left() / PAGE / 2).min(1024);
        let base = frames::untouched(pages * PAGE, PAGE);
        for page in 0..pages {
            for offset in [0, 0x808, PAGE - 8] {
                let got: u64 = peek(base + page * PAGE + offset);
                t.check(got == 0, format_args!("zero at {:#x}, got {got:#x}", base + page * PAGE + offset));
            }
        }
    });
    case("memory.hole_below_4g", |t| {
        // No RAM, no device.
        let hole = 0xd000_0000;
        poke(hole, 0x1234_5678u32);
        if !t.skip_on_bare_tcg("unclaimed memory reads 0") {
            t.eq("a read", peek::<u32>(hole), !0u32);
        }
    });
    case("memory.beyond_ram", |t| {
        let top =
            boot().ranges().iter().filter(|range| range.kind == 1).map(|range| range.start + range.len).max();
        let Some(top) = top else { return t.skip("no memory map") };
        // A GiB after the last RAM: outside everything, still within the physical address width.
        let beyond = (top.max(1 << 32) + (1 << 30)) & !(PAGE_2M - 1);
        let at = window(beyond);
        poke(at, 0x1234_5678u32);
        let got: u32 = peek(at);
        if !t.skip_on_bare_tcg("unclaimed memory reads 0") {
            t.eq("a read", got, !0u32);
        }
    });
    case("memory.size_as_fw_cfg_says", |t| {
        if !fw_cfg::present() {
            return t.skip("no fw_cfg");
        }
        let map: u64 = boot().ranges().iter().filter(|range| range.kind == 1).map(|range| range.len).sum();
        t.within("RAM of fw_cfg", fw_cfg::ram_size(), map, map + (2 << 20));
    });
}
