//! XSAVE areas: where each component lies in the standard and in the compacted format, what of an area is written, what
//! comes back. Intel SDM vol. 1, 13.4 to 13.12.
//!
//! No compiled code uses the vector registers here, so values stay in them from one `exec!` to the next.
use crate::xsave::{enable, offered};
use guests::prelude::*;
use guests::report::{case, Case};
use guests::trap::{catch, Fault, GP};
use guests::user;
use guests::{exec, Racy};

/// Components whose registers the cases fill: AVX and AVX-512's three.
const FILLED: u64 = 0xe4;
/// XSTATE_BV and XCOMP_BV in the header, and the header's end.
const STATE_BV: u64 = 512;
const COMP_BV: u64 = 520;
const HEADER_END: u64 = 576;
/// XCOMP_BV: the compacted format.
const COMPACTED: u64 = 1 << 63;
/// What is in an area before a save.
const UNTOUCHED: u64 = 0xaaaa_aaaa_aaaa_aaaa;
const AREA_BYTES: u64 = 4096;

/// The instructions that save.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Save {
    Standard,
    Optimised,
    Compacted,
    Supervisor,
}

impl Save {
    fn exists(self) -> bool {
        match self {
            Self::Standard => true,
            Self::Optimised => has(0xd, 1, |leaf| leaf.eax, 0),
            Self::Compacted => has(0xd, 1, |leaf| leaf.eax, 1),
            Self::Supervisor => has(0xd, 1, |leaf| leaf.eax, 3),
        }
    }

    fn compacts(self) -> bool {
        matches!(self, Self::Compacted | Self::Supervisor)
    }

    fn save(self, mask: u64) {
        let (area, low) = (AREA.addr(), mask as u32);
        match self {
            Self::Standard => exec!("xsave64 [rdi]", in("rdi") area, in("eax") low, in("edx") 0),
            Self::Optimised => exec!("xsaveopt64 [rdi]", in("rdi") area, in("eax") low, in("edx") 0),
            Self::Compacted => exec!("xsavec64 [rdi]", in("rdi") area, in("eax") low, in("edx") 0),
            Self::Supervisor => exec!("xsaves64 [rdi]", in("rdi") area, in("eax") low, in("edx") 0),
        }
    }

    fn restore(self, mask: u64) {
        let (area, low) = (AREA.addr(), mask as u32);
        if self == Self::Supervisor {
            exec!("xrstors64 [rdi]", in("rdi") area, in("eax") low, in("edx") 0);
        } else {
            exec!("xrstor64 [rdi]", in("rdi") area, in("eax") low, in("edx") 0);
        }
    }
}

pub(crate) fn run() {
    for (save, [layout, restored, part]) in [
        (Save::Standard, ["area.xsave_layout", "area.xsave_is_restored", "area.xsave_is_restored_in_part"]),
        (
            Save::Optimised,
            ["area.xsaveopt_layout", "area.xsaveopt_is_restored", "area.xsaveopt_is_restored_in_part"],
        ),
        (
            Save::Compacted,
            ["area.xsavec_layout", "area.xsavec_is_restored", "area.xsavec_is_restored_in_part"],
        ),
        (
            Save::Supervisor,
            ["area.xsaves_layout", "area.xsaves_is_restored", "area.xsaves_is_restored_in_part"],
        ),
    ] {
        with(layout, save, layouts);
        with(restored, save, is_restored);
        with(part, save, is_restored_in_part);
    }
    with("area.bad_compacted_headers_fault", Save::Compacted, bad_headers);
    with("area.xrstors_wants_the_compacted_format", Save::Supervisor, |t, save| {
        fill_area(0);
        t.faults("XRSTORS of the standard format", catch(|| save.restore(3)), GP, Some(0));
    });
    with("area.xsaves_in_ring_3", Save::Supervisor, |t, _| {
        // With an operand at zero: the privilege is checked before the address. UD2 follows.
        for (name, code) in
            [("XSAVES", [0x0f, 0xc7, 0x2f, 0x0f, 0x0b]), ("XRSTORS", [0x0f, 0xc7, 0x1f, 0x0f, 0x0b])]
        {
            let (fault, _) = user::run(&code, user::Start { rax: 3, ..user::Start::default() });
            t.faults(name, Err::<(), _>(fault), GP, Some(0));
        }
    });
}

/// A case with all components enabled and all of AVX's registers filled; skipped without AVX or the instruction.
fn with(name: &str, save: Save, run: impl FnOnce(&mut Case, Save)) {
    case(name, |t| {
        if !enable(t) {
            return;
        }
        if offered() & 7 != 7 {
            return t.skip("no AVX");
        }
        if !save.exists() {
            return t.skip("the processor has no such instruction, or it is hidden");
        }
        set_cr0(cr0() & !0xc | 2);
        xsetbv(0, offered());
        fill_registers();
        run(t, save);
    });
}

/// Registers as stored: 32 of 64 bytes, then the masks.
#[repr(C, align(64))]
struct Registers([u64; 32 * 8 + 8]);
static BEFORE: Racy<Registers> = Racy::new(Registers([0; 32 * 8 + 8]));
static AFTER: Racy<Registers> = Racy::new(Registers([0; 32 * 8 + 8]));

#[repr(C, align(64))]
struct Area([u8; AREA_BYTES as usize]);
static AREA: Racy<Area> = Racy::new(Area([0; AREA_BYTES as usize]));

fn has_avx512() -> bool {
    offered() & 0xe0 == 0xe0
}

fn load(registers: u64) {
    if has_avx512() {
        exec!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, \
             16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
            "vmovdqu64 zmm\\n, [rsi + 64 * \\n]",
            ".endr",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7",
            "kmovw k\\n, word ptr [rsi + 2048 + 8 * \\n]",
            ".endr",
            in("rsi") registers
        );
    } else {
        exec!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "vmovdqu ymm\\n, [rsi + 64 * \\n]",
            ".endr",
            in("rsi") registers
        );
    }
}

fn store(registers: u64) {
    if has_avx512() {
        exec!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, \
             16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
            "vmovdqu64 [rdi + 64 * \\n], zmm\\n",
            ".endr",
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7",
            "kmovw word ptr [rdi + 2048 + 8 * \\n], k\\n",
            ".endr",
            in("rdi") registers
        );
    } else {
        exec!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "vmovdqu [rdi + 64 * \\n], ymm\\n",
            ".endr",
            in("rdi") registers
        );
    }
}

/// No two words of all registers are the same, and none is zero.
fn fill_registers() {
    for word in 0..32 * 8 {
        poke(BEFORE.addr() + 8 * word, word.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    }
    for mask in 0..8 {
        poke(BEFORE.addr() + 2048 + 8 * mask, 0x5a01 + 0x101 * mask);
    }
    load(BEFORE.addr());
}

/// All registers in their initial state.
fn clear_registers() {
    (0..32 * 8 + 8).for_each(|word| poke(AFTER.addr() + 8 * word, 0u64));
    load(AFTER.addr());
}

/// Each word outside the header becomes `value`, the header zeros.
fn fill_area(value: u64) {
    for at in (0..AREA_BYTES).step_by(8) {
        poke(AREA.addr() + at, if (STATE_BV..HEADER_END).contains(&at) { 0 } else { value });
    }
    // MXCSR and its mask, which every restore may load.
    poke(AREA.addr() + 24, 0x1f80u64);
}

/// Word `word` of component `component`, as stored registers have it.
fn word_of(registers: u64, component: u32, word: u64) -> u64 {
    peek(
        registers
            + match component {
                2 => 64 * (word / 2) + 16 + 8 * (word % 2),
                5 => 2048 + 8 * word,
                6 => 64 * (word / 4) + 32 + 8 * (word % 4),
                _ => 1024 + 8 * word,
            },
    )
}

/// Where the components of `mask` beyond the legacy region start, and where they all end.
fn places(mask: u64, compacted: bool) -> ([u64; 32], u64) {
    let (mut places, mut end) = ([0; 32], HEADER_END);
    for component in (2..32).filter(|component| mask >> component & 1 != 0) {
        let leaf = cpuid(0xd, component);
        let aligned = if leaf.ecx & 2 != 0 { end.next_multiple_of(64) } else { end };
        let start = if compacted { aligned } else { leaf.ebx.into() };
        places[component as usize] = start;
        end = end.max(start + u64::from(leaf.eax));
    }
    (places, end)
}

fn filled(mask: u64) -> impl Iterator<Item = u32> {
    let components = mask & FILLED & offered();
    (2..32).filter(move |component| components >> component & 1 != 0)
}

/// Sets of components to save: all, the first ones, and sets with gaps.
fn masks() -> impl Iterator<Item = u64> {
    let all = offered();
    [all, 7, 6, 5, 4, all & !1, all & !2, all & !4, all & !(1 << 5), all & !(1 << 6)].into_iter()
}

/// Each component is where leaf 0Dh says, and nothing is written behind the last.
fn layouts(t: &mut Case, save: Save) {
    for mask in masks() {
        fill_area(UNTOUCHED);
        fill_registers();
        save.save(mask);
        let (places, end) = places(mask, save.compacts());
        let area = AREA.addr();
        let comp_bv = if save.compacts() { COMPACTED | mask } else { 0 };
        t.eq("XCOMP_BV", peek::<u64>(area + COMP_BV), comp_bv);
        t.eq("XSTATE_BV's filled components", peek::<u64>(area + STATE_BV) & FILLED, mask & FILLED);
        for component in filled(mask) {
            let start = area + places[component as usize];
            let words = u64::from(cpuid(0xd, component).eax) / 8;
            let wrong = (0..words)
                .filter(|&word| peek::<u64>(start + 8 * word) != word_of(BEFORE.addr(), component, word));
            let wrong = wrong.count();
            t.check(
                wrong == 0,
                format_args!("component {component} of {mask:#x} in its place, got {wrong} wrong words"),
            );
        }
        let written = (end..AREA_BYTES).step_by(8).find(|at| peek::<u64>(area + at) != UNTOUCHED);
        t.check(
            written.is_none(),
            format_args!("nothing of {mask:#x} behind {end}, got a write at {written:?}"),
        );
    }
}

/// Checks which components came back and which are in their initial state.
fn came_back(t: &mut Case, what: &str, mask: u64) {
    store(AFTER.addr());
    for component in filled(!0) {
        let words = u64::from(cpuid(0xd, component).eax) / 8;
        let restored = mask >> component & 1 != 0;
        let wrong = (0..words).filter(|&word| {
            let want = if restored { word_of(BEFORE.addr(), component, word) } else { 0 };
            word_of(AFTER.addr(), component, word) != want
        });
        let wrong = wrong.count();
        t.check(
            wrong == 0,
            format_args!("component {component} after {what} of {mask:#x}, got {wrong} wrong words"),
        );
    }
}

/// What was saved comes back, with exits between and also when it is saved again from the restored registers.
fn is_restored(t: &mut Case, save: Save) {
    for mask in masks() {
        fill_registers();
        fill_area(0);
        for _ in 0..2 {
            save.save(mask);
            cpuid(0, 0);
            clear_registers();
            inb(0x21);
            let got = catch(|| save.restore(mask));
            if t.works("restoring", got).is_none() {
                break;
            }
        }
        came_back(t, "a restore", mask);
    }
}

/// One component of an area of all is restored, from its place in that area.
fn is_restored_in_part(t: &mut Case, save: Save) {
    fill_area(0);
    save.save(offered());
    for component in filled(!0) {
        clear_registers();
        t.works("restoring", catch(|| save.restore(1 << component)));
        came_back(t, "a restore of a part", 1 << component);
    }
}

/// What XRSTOR refuses in the compacted format. Intel SDM vol. 1, 13.8.2.
fn bad_headers(t: &mut Case, save: Save) {
    fill_area(0);
    save.save(7);
    let area = AREA.addr();
    let mut refused = |what: &str, at: u64, value: u64| {
        let good: u64 = peek(area + at);
        poke(area + at, value);
        let got: Result<(), Fault> = catch(|| save.restore(7));
        t.faults(what, got, GP, Some(0));
        poke(area + at, good);
    };
    refused("a state outside the format", COMP_BV, COMPACTED | 3);
    refused("a component that XCR0 does not enable", COMP_BV, COMPACTED | 7 | 1 << 62);
    refused("XCOMP_BV without its bit 63", COMP_BV, 7);
    refused("a reserved byte of the header", COMP_BV + 8, 1);
    refused("the last reserved byte of the header", HEADER_END - 8, 1 << 63);
}
