//! Page-table entries written by every form of instruction while the table is in use.
use crate::{area, page_with, read};
use guests::exec;
use guests::frames;
use guests::paging::{Space, A, D, P, U, W};
use guests::prelude::*;
use guests::report::case;
use guests::trap::{catch, PF};

/// A way to write `value` over `old` at an entry.
pub(crate) type Form = fn(entry: u64, old: u64, value: u64);

/// Each form, by its names as a case for one processor and for several, for values of which at most the low 32 bits differ from the old ones; the narrow ones write the bytes one by one.
pub(crate) const FORMS: [([&str; 2], Form); 20] = [
    (["form.mov_8_bytes", "race.mov_8_bytes"], |entry, _, value| poke(entry, value)),
    (["form.mov_4_bytes", "race.mov_4_bytes"], |entry, _, value| {
        poke(entry, value as u32);
        poke(entry + 4, (value >> 32) as u32);
    }),
    (["form.mov_2_bytes", "race.mov_2_bytes"], |entry, _, value| {
        (0..4).for_each(|at| poke(entry + at * 2, (value >> (16 * at)) as u16));
    }),
    (["form.mov_1_byte", "race.mov_1_byte"], |entry, _, value| {
        (0..8).for_each(|at| poke(entry + at, (value >> (8 * at)) as u8))
    }),
    (["form.mov_immediate", "race.mov_immediate"], |entry, _, value| {
        // Only the low half: a sign-extended immediate would spoil the address.
        exec!("mov dword ptr [{}], 0", in(reg) entry);
        poke(entry, value);
    }),
    (
        ["form.xchg", "race.xchg"],
        |entry, _, value| exec!("xchg [{}], {}", in(reg) entry, inout(reg) value => _),
    ),
    (["form.xchg_4_bytes", "race.xchg_4_bytes"], |entry, _, value| {
        exec!("xchg [{}], {:e}", in(reg) entry, inout(reg) value => _);
        poke(entry + 4, (value >> 32) as u32);
    }),
    (["form.lock_cmpxchg", "race.lock_cmpxchg"], |entry, _, value| {
        // Accessed and dirty bits may come in between.
        exec!("2: mov rax, [{0}]", "lock cmpxchg [{0}], {1}", "jnz 2b",
            in(reg) entry, in(reg) value, out("rax") _);
    }),
    (["form.lock_cmpxchg8b", "race.lock_cmpxchg8b"], |entry, _, value| {
        exec!("push rbx", "mov rbx, {1}",
            "2: mov eax, [{0}]", "mov edx, [{0} + 4]", "lock cmpxchg8b [{0}]", "jnz 2b", "pop rbx",
            in(reg) entry, in(reg) value & 0xffff_ffff, out("eax") _, out("edx") _, in("ecx") (value >> 32) as u32);
    }),
    (
        ["form.lock_xor", "race.lock_xor"],
        |entry, old, value| exec!("lock xor [{}], {}", in(reg) entry, in(reg) old ^ value),
    ),
    (["form.lock_and_then_or", "race.lock_and_then_or"], |entry, old, value| {
        exec!("lock and [{}], {}", in(reg) entry, in(reg) !(old & !value));
        exec!("lock or [{}], {}", in(reg) entry, in(reg) value);
    }),
    (["form.lock_bts_btr", "race.lock_bts_btr"], |entry, old, value| {
        for bit in (0..64u64).filter(|bit| (old ^ value) >> bit & 1 != 0) {
            if value >> bit & 1 != 0 {
                exec!("lock bts qword ptr [{}], {}", in(reg) entry, in(reg) bit);
            } else {
                exec!("lock btr qword ptr [{}], {}", in(reg) entry, in(reg) bit);
            }
        }
    }),
    (["form.lock_xadd", "race.lock_xadd"], |entry, old, value| {
        exec!("lock xadd [{}], {}", in(reg) entry, inout(reg) value.wrapping_sub(old) => _);
    }),
    (
        ["form.add", "race.add"],
        |entry, old, value| exec!("add [{}], {}", in(reg) entry, in(reg) value.wrapping_sub(old)),
    ),
    (["form.not_twice_then_mov", "race.not_twice_then_mov"], |entry, _, value| {
        exec!("not qword ptr [{0}]", "not qword ptr [{0}]", in(reg) entry);
        poke(entry, value);
    }),
    (["form.rep_stosq", "race.rep_stosq"], |entry, _, value| {
        exec!("rep stosq", inout("rdi") entry => _, inout("rcx") 1u64 => _, in("rax") value);
    }),
    (["form.rep_movsq", "race.rep_movsq"], |entry, _, value| {
        let from = &raw const value as u64;
        exec!("rep movsq", inout("rdi") entry => _, inout("rsi") from => _, inout("rcx") 1u64 => _);
    }),
    (["form.push", "race.push"], |entry, _, value| {
        exec!("mov {tmp}, rsp", "lea rsp, [{at} + 8]", "push {value}", "mov rsp, {tmp}",
            tmp = out(reg) _, at = in(reg) entry, value = in(reg) value);
    }),
    (
        ["form.movnti", "race.movnti"],
        |entry, _, value| exec!("movnti [{}], {}", in(reg) entry, in(reg) value),
    ),
    (["form.cmov_free_store_by_pop", "race.cmov_free_store_by_pop"], |entry, _, value| {
        exec!("push {1}", "pop qword ptr [{0}]", in(reg) entry, in(reg) value);
    }),
];

pub(crate) fn run() {
    for (index, ([name, _], write)) in FORMS.into_iter().enumerate() {
        case_named(name, index as u64, write);
    }
    case("form.movaps_writes_two_entries", |t| {
        if has_sse() {
            let space = Space::current();
            let address = area(120);
            let pages = [page_with(1), page_with(2)];
            let entry = space.entry(address, 1);
            for round in 0..40 {
                let pair = Pair([pages[round % 2] | P | W, pages[1 - round % 2] | P | W]);
                exec!("movaps xmm0, [{}]", "movaps [{}], xmm0", in(reg) &pair, in(reg) entry);
                invlpg(address);
                invlpg(address + 0x1000);
                t.eq("the first word", read(address), 1 + round as u64 % 2);
                t.eq("the second word", read(address + 0x1000), 2 - round as u64 % 2);
            }
        } else {
            t.skip("SSE is off");
        }
    });
    case("form.whole_table_by_rep", |t| {
        let space = Space::current();
        let address = area(121);
        let (table, copy) = (frames::page(), frames::page());
        space.set(address, 2, table | P | W);
        let frame = page_with(0x7ab1e);
        (0..512).for_each(|slot| poke(copy + slot * 8, frame | P | W));
        for _ in 0..10 {
            exec!("rep movsq", inout("rdi") table => _, inout("rsi") copy => _, inout("rcx") 512u64 => _);
            set_cr3(cr3());
            for page in [0, 100, 511] {
                t.eq("a word", read(address + page * 0x1000), 0x7ab1eu64);
            }
            exec!("rep stosq", inout("rdi") table => _, inout("rcx") 512u64 => _, in("rax") 0u64);
            set_cr3(cr3());
            t.faults("a read of a cleared entry", catch(|| read(address + 0x6_4000)), PF, Some(0));
        }
    });
    case("form.code_clears_its_own_entry", |t| {
        // mov [rdi], rsi; ret, in a page whose entry it clears: the next fetch may find the old translation or fault.
        let space = Space::current();
        let address = area(122);
        for _ in 0..20 {
            let frame = space.map_new(address, P | W);
            [0x48u8, 0x89, 0x37, 0xc3]
                .iter()
                .enumerate()
                .for_each(|(at, &byte)| poke(frame + at as u64, byte));
            let entry = space.entry(address, 1);
            let got = catch(|| exec!("call {}", in(reg) address, in("rdi") entry, in("rsi") 0u64));
            if let Err(fault) = got {
                t.eq("the vector", fault.vector, PF);
                t.eq("CR2, behind the store", fault.cr2, address + 3);
            }
            t.eq("the entry", read(entry), 0u64);
            invlpg(address);
            t.faults("a fetch after the flush", catch(|| exec!("call {}", in(reg) address)), PF, None);
        }
    });
}

#[repr(align(16))]
struct Pair(#[allow(dead_code)] [u64; 2]);

/// CR4.OSFXSR, and neither CR0.EM nor CR0.TS.
fn has_sse() -> bool {
    set_cr4(cr4() | 1 << 9);
    set_cr0(cr0() & !(1 << 2 | 1 << 3));
    cr4() & 1 << 9 != 0
}

fn case_named(name: &str, index: u64, write: Form) {
    case(name, |t| {
        let space = Space::current();
        let address = area(90 + index);
        let values = [page_with(1) | P | W | U, page_with(2) | P | W | U, page_with(3) | P];
        let entry = space.entry(address, 1);
        space.set(address, 1, values[0]);
        for round in 0..60 {
            t.eq("the word before", read(address), round as u64 % 3 + 1);
            let value = values[(round + 1) % 3];
            write(entry, read(entry), value);
            t.eq("the entry", read(entry), value);
            invlpg(address);
            t.eq("the word after", read(address), (round as u64 + 1) % 3 + 1);
            t.eq("the entry after a read", read(entry) & !D, value | A);
            let written = catch(|| poke(address + 8, round));
            t.check(
                written.is_ok() == (value & W != 0),
                format_args!("a write as the entry permits, got {written:?}"),
            );
        }
    });
}
