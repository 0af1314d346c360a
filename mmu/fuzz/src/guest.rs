//! Guest memory and registers from an input, for the targets that walk.
use mmu::VmMemory;

use crate::input::Input;
use crate::support::flat::FlatRam;
use crate::support::manual::guest::{memory, RAM_BYTES};
use crate::support::manual::{ept, Machine};

/// Frames of guest memory.
pub(crate) const FRAMES: u64 = RAM_BYTES / 4096;
/// Entries of a table that addresses use: few, so that a short input is all of memory.
const USED: u64 = 8;
/// Bits of a guest-physical address.
pub(crate) const ADDRESS: u64 = (1 << 52) - 1;
/// Frame number field of an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// The used entries of every frame. Most refer to guest memory, others are left as they come.
pub(crate) fn tables(input: &mut Input<'_>) -> VmMemory<FlatRam> {
    let memory = memory();
    for frame in 0..FRAMES {
        let anywhere: u8 = input.any();
        for index in 0..USED {
            let entry: u64 = input.any();
            let inside = entry & !FRAME | (((entry >> 12) % FRAMES) << 12);
            let entry = if anywhere >> index & 1 != 0 { entry } else { inside };
            memory.backing().set((frame << 12) + index * 8, entry);
        }
    }
    memory
}

/// An address of which each level has one of the used entries, or any.
pub(crate) fn address(input: &mut Input<'_>) -> u64 {
    let indexes: u16 = input.any();
    if indexes >> 15 != 0 {
        return input.any();
    }
    (0..5).fold(0x123, |address, level| address | u64::from(indexes >> (3 * level) & 7) << (12 + 9 * level))
}

/// Registers and CPUID of a guest in any paging mode.
pub(crate) fn machine(input: &mut Input<'_>) -> Machine {
    let bits: u32 = input.any();
    let bit = |position: u32| bits >> position & 1 != 0;
    let (pg, lma, pae) =
        input.pick(&[(true, true, true), (true, false, true), (true, false, false), (false, false, false)]);
    Machine {
        pg,
        lma,
        pae,
        wp: bit(0),
        pse: bit(1),
        la57: bit(2),
        smep: bit(3),
        smap: bit(4),
        pke: bit(5),
        pks: bit(6),
        nxe: bit(7),
        gib_pages: bit(8),
        pse36: bit(9),
        amd: bit(10),
        ac: bit(11),
        maxphyaddr: input.pick(&[32, 36, 39, 40, 46, 52]),
        cr3: input.below(FRAMES) << 12 | u64::from(bits >> 20),
        pkru: input.any(),
        pkrs: input.any(),
    }
}

/// An L1 that has extended page tables for L2.
pub(crate) fn extended(input: &mut Input<'_>) -> ept::Machine {
    let bits: u8 = input.any();
    let bit = |position: u32| bits >> position & 1 != 0;
    ept::Machine {
        levels: if bit(0) { 5 } else { 4 },
        execute_only: bit(1),
        mode_based: bit(2),
        accessed_dirty: bit(3),
        mib_pages: bit(4),
        gib_pages: bit(5),
        maxphyaddr: input.pick(&[36, 39, 46, 52]),
        root: input.below(FRAMES) << 12,
    }
}
