//! Cases in the 32-bit modes with paging: two levels with and without large pages, and three.
//!
//! The tables are made in 64-bit mode; then the processor changes modes, tries one access in ring 0 or ring 3, and
//! comes back.
use super::digest::{Digest, Random};
use guests::frames::{self, PAGE};
use guests::machine::{self, DATA};
use guests::modes::{self, Mode, Registers};
use guests::paging::{A, D, G, NX, P, PCD, PS, PWT, U, W};
use guests::payload;
use guests::prelude::*;
use guests::trap::{Fault, UD};

// EDI is an address, ESI the kind of access, EBX what to write, ECX whether ring 3 does it; EAX returns what was read.
// Ring 3 uses flat segments 0x3b and 0x33 and ends with UD2.
payload!(
    access,
    access_start,
    access_end,
    "32",
    "xor eax, eax",
    "test ecx, ecx",
    "jz 5f",
    "mov edx, 0x3b",
    "mov ds, edx",
    "mov es, edx",
    "push edx",
    "push 0x9f00",
    "pushfd",
    "push 0x33",
    ".byte 0x68",
    ".long (5f - access_start + 0x8000)",
    "iretd",
    "5: cmp esi, 1",
    "jb 6f",
    "je 7f",
    "cmp esi, 2",
    "je 8f",
    "test ecx, ecx",
    "jnz 9f",
    "call edi",
    "ret",
    "6: mov eax, [edi]",
    "jmp 4f",
    "7: mov [edi], ebx",
    "jmp 4f",
    "8: xchg [edi], ebx",
    "mov eax, ebx",
    "4: test ecx, ecx",
    "jnz 3f",
    "ret",
    "9: jmp edi",
    "3: ud2"
);

/// A mode with what is varied in it.
pub(crate) struct Group {
    /// Of its first part and of the rest.
    pub(crate) names: [&'static str; 2],
    mode: Mode,
    /// Bits of CR4 that the mode needs.
    cr4: u64,
}

/// All groups of this file.
pub(crate) fn groups() -> &'static [Group] {
    &[
        Group { names: ["legacy.two_levels", "legacy.two_levels.long"], mode: Mode::Paged, cr4: 0 },
        Group { names: ["legacy.pse", "legacy.pse.long"], mode: Mode::Pse, cr4: CR4_PSE },
        Group { names: ["legacy.pae", "legacy.pae.long"], mode: Mode::Pae, cr4: CR4_PAE },
    ]
}

/// Where pages of the cases are mapped: from 1 GiB.
const BASE: u64 = 1 << 30;
/// Size of the memory with the targets: what the largest page maps.
const BLOCK: u64 = 4 << 20;
/// PE, ET, NE, PG: as `modes` has them, without WP.
const CR0: u64 = 0x8000_0031;
/// The ring 0 stack of `modes` for the 32-bit modes.
const STACK: u64 = 0x5ff0;
/// Where in a page what lies.
const RET: u64 = 0;
const UD2: u64 = 0x10;
const READ: u64 = 0x40;
const WRITTEN: u64 = 0x48;

/// The memory of a group's cases.
pub(crate) struct World {
    group: &'static Group,
    root: u64,
    tables: [u64; 3],
    block: u64,
    ready: bool,
}

impl World {
    pub(crate) fn new(group: &'static Group) -> World {
        let block = frames::untouched(BLOCK, BLOCK);
        for page in (0..BLOCK / PAGE).map(|number| block + number * PAGE) {
            poke(page + RET, 0xc3u8);
            poke(page + UD2, 0x0b0fu16);
            poke(page + READ, (page - block) >> 12 | 0xa500_0000);
            poke(page + WRITTEN, 0u64);
        }
        World { group, root: 0, tables: core::array::from_fn(|_| frames::page()), block, ready: false }
    }

    /// Runs one case and adds what came of it.
    pub(crate) fn one(&mut self, random: &mut Random, digest: &mut Digest) {
        if !self.ready {
            self.root = modes::prepare(self.group.mode, access());
            self.ready = true;
        }
        let pae = self.group.mode == Mode::Pae;
        let page = self.block + random.below(BLOCK / PAGE) * PAGE;
        let large = if pae { 2 << 20 } else { BLOCK };
        // Directory entries from the second quarter's first on.
        let directory = if pae { self.root + 2 * PAGE } else { self.root + BASE / BLOCK * 4 };
        let slot = random.below(16);
        let address = BASE + slot * large + page % large;
        let table = self.tables[random.below(3) as usize];
        let is_large = random.once_in(3);
        let (width, index) = if pae { (8, address >> 12 & 511) } else { (4, address >> 12 & 1023) };
        let entries = [directory + slot * width, table + index * width];
        let upper = if is_large { page & !(large - 1) | PS } else { table };
        let values = [upper | self.flags(random, true, is_large), page | self.flags(random, false, true)];
        for (&entry, &value) in entries.iter().zip(&values) {
            if pae {
                poke(entry, value);
            } else {
                poke(entry, value as u32);
            }
        }
        let outcome = self.access(random, address);
        digest.access(outcome.0, outcome.1, &outcome.2);
        // As in 64-bit mode: accessed bits count where the access worked.
        let mask = if outcome.2.is_ok() { !0 } else { !A };
        for (&entry, &value) in entries.iter().zip(&values) {
            let (now, before): (u64, u64) =
                if pae { (peek(entry), value) } else { (peek::<u32>(entry).into(), value & 0xffff_ffff) };
            digest.add((now ^ before) & mask);
        }
        digest.add(peek::<u64>(page + WRITTEN));
    }

    fn access(&self, random: &mut Random, page: u64) -> (u64, bool, Result<u64, Fault>) {
        let (kind, user) = (random.below(4), random.once_in(2));
        let offset = match kind {
            0 => READ,
            1 | 2 => WRITTEN,
            _ if user => UD2,
            _ => RET,
        };
        let address = page + offset;
        let registers = Registers {
            ebx: random.next() as u32,
            ecx: user.into(),
            esi: kind as u32,
            edi: address as u32,
            ..Registers::default()
        };
        let cr0 = CR0 | random.bits(CR0_WP);
        let cr4 = self.group.cr4 | random.bits(CR4_PGE);
        wrmsr(MSR_EFER, rdmsr(MSR_EFER) & !EFER_NXE | random.bits(EFER_NXE));
        // Outside 64-bit mode the words of RSP0 are the ring 0 stack's pointer and selector. Intel SDM vol. 3, 8.2.1.
        machine::set_tss_stack(0, STACK | u64::from(DATA) << 32);
        let outcome = modes::run_controls(self.group.mode, registers, self.root, cr0, cr4);
        machine::set_tss_stack(0, machine::stack_top(0));
        let read = if kind == 0 || kind == 2 { outcome.registers.eax } else { 0 };
        match outcome.fault {
            Some(fault) if !(user && fault.vector == UD) => (address, kind == 2, Err(fault)),
            _ => (address, kind == 2, Ok(read.into())),
        }
    }

    /// Flags of an entry.
    fn flags(&self, random: &mut Random, directory: bool, leaf: bool) -> u64 {
        let pae = self.group.mode == Mode::Pae;
        let mut flags = P | W | U | random.bits(A | D | PWT | PCD | 7 << 9);
        if random.once_in(16) {
            flags &= !P;
        }
        if random.once_in(4) {
            flags &= !W;
        }
        if random.once_in(4) {
            flags &= !U;
        }
        if leaf {
            flags |= random.bits(G);
        }
        if pae && random.once_in(10) {
            flags |= NX;
        }
        if random.once_in(20) {
            flags |= match (pae, directory && leaf) {
                (true, _) => 1 << (52 + random.below(10)),
                // Bit 21 of a 4 MiB entry, which two-level paging without large pages ignores with PS: there it would
                // be part of the table's address.
                (false, true) if self.group.mode == Mode::Pse => 1 << 21,
                _ => 0,
            };
        }
        flags
    }
}
