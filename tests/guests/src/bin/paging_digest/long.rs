//! Cases in 64-bit mode with four levels.
use super::digest::{Digest, Mask, Random};
use guests::frames::{self, PAGE, PAGE_2M};
use guests::paging::{has_1g, Space, A, ADDRESS, D, G, NX, P, PCD, PS, PWT, U, W};
use guests::prelude::*;
use guests::trap::{catch, Fault, UD};
use guests::user::{self, Start};
use guests::{exec, machine};

/// What a group varies beside W, U, NX, A and D, large pages, reserved bits, CR0.WP, EFER.NXE and CR4.PGE.
pub(crate) struct Group {
    /// Of its first part and of the rest.
    pub(crate) names: [&'static str; 2],
    pub(crate) offered: fn() -> bool,
    /// Bits of CR4.
    cr4: u64,
    /// 1 GiB pages.
    huge: bool,
    pub(crate) mask: Mask,
}

const PLAIN: Group =
    Group { names: ["long", "long.long"], offered: || true, cr4: CR4_PGE, huge: false, mask: Mask::USUAL };

/// All groups of this file. CPUID leaves: Intel SDM vol. 2, CPUID.
pub(crate) fn groups() -> &'static [Group] {
    &[
        PLAIN,
        Group { names: ["long.1g", "long.1g.long"], offered: has_1g, huge: true, ..PLAIN },
        Group {
            names: ["long.smep_smap", "long.smep_smap.long"],
            offered: || has(7, 0, |leaf| leaf.ebx, 7) && has(7, 0, |leaf| leaf.ebx, 20),
            cr4: CR4_PGE | CR4_SMEP | CR4_SMAP,
            ..PLAIN
        },
        Group {
            names: ["long.keys", "long.keys.long"],
            offered: || has(7, 0, |leaf| leaf.ecx, 3),
            cr4: CR4_PGE | CR4_PKE,
            ..PLAIN
        },
        Group {
            names: ["long.supervisor_keys", "long.supervisor_keys.long"],
            offered: || has(7, 0, |leaf| leaf.ecx, 31),
            cr4: CR4_PGE | CR4_PKE | CR4_PKS,
            mask: Mask::SUPERVISOR_KEYS,
            ..PLAIN
        },
        Group {
            names: ["long.pcid", "long.pcid.long"],
            offered: || has(1, 0, |leaf| leaf.ecx, 17),
            cr4: CR4_PGE | CR4_PCIDE,
            ..PLAIN
        },
    ]
}

/// PML4 entries that cases use; nothing else does.
const TOP: [u64; 4] = [2, 3, 300, 510];
/// Tables, each of which serves at any level.
const TABLES: usize = 6;
/// Where in a page what lies: supervisor code, user code, data to read, data to write.
const RET: u64 = 0;
const UD2: u64 = 0x10;
const READ: u64 = 0x40;
const WRITTEN: u64 = 0x48;

/// `mov al, [rax]; ud2`, `mov [rax], bl; ud2`, `xchg [rax], bl; ud2` and `jmp rax`, 16 bytes each.
const USER_CODE: [[u8; 4]; 4] =
    [[0x8a, 0x00, 0x0f, 0x0b], [0x88, 0x18, 0x0f, 0x0b], [0x86, 0x18, 0x0f, 0x0b], [0xff, 0xe0, 0x0f, 0x0b]];

/// The memory of a group's cases.
pub(crate) struct World {
    group: &'static Group,
    space: Space,
    tables: [u64; TABLES],
    /// 2 MiB whose pages are the targets.
    block: u64,
}

/// Kinds of access, as indices of `USER_CODE`.
const READS: u64 = 0;
const WRITES: u64 = 1;
const EXCHANGES: u64 = 2;

impl World {
    pub(crate) fn new(group: &'static Group) -> World {
        let block = frames::untouched(PAGE_2M, PAGE_2M);
        for page in (0..PAGE_2M / PAGE).map(|number| block + number * PAGE) {
            poke(page + RET, 0xc3u8);
            poke(page + UD2, 0x0b0fu16);
            poke(page + READ, (page - block) >> 12 | 0xa500_0000_0000_0000);
            poke(page + WRITTEN, 0u64);
        }
        let space = Space::fork();
        World { group, space, tables: core::array::from_fn(|_| frames::page()), block }
    }

    /// Runs one case and adds what came of it.
    pub(crate) fn one(&mut self, random: &mut Random, digest: &mut Digest) {
        let page = self.block + random.below(PAGE_2M / PAGE) * PAGE;
        let (top, third) = (TOP[random.below(4) as usize], random.below(512));
        // The low 30 bits are those of the frame, so that a page of any size leads to it.
        let low = page & ((1 << 30) - 1);
        let address = ((top << 39 | third << 30 | low) << 16) as i64 >> 16;
        let address = address as u64;
        let values = self.tables_for(random, address, page);
        self.controls(random);
        let entries = values.map(|(entry, value)| {
            poke(entry, value);
            entry
        });
        self.flush(random, address);
        digest.explain(format_args!(
            "CR0 {:x} CR4 {:x} EFER {:x} entries {values:x?}",
            cr0(),
            cr4(),
            rdmsr(MSR_EFER)
        ));
        let (mut worked, accesses) = (false, 1 + random.below(3));
        for _ in 0..accesses {
            let outcome = access(random, address);
            worked |= outcome.2.is_ok();
            digest.access(outcome.0, outcome.1, &outcome.2);
        }
        // Whether a walk that ends in a fault sets accessed bits on its way is up to the processor. Intel SDM vol. 3, 4.8.
        let mask = if worked { !ADDRESS } else { !ADDRESS & !A };
        entries.iter().for_each(|&entry| digest.add(peek::<u64>(entry) & mask));
        digest.add(peek::<u64>(page + WRITTEN));
        self.rest();
    }

    /// The four entries of a walk to `page` and their values, of which some are never reached.
    fn tables_for(&self, random: &mut Random, address: u64, page: u64) -> [(u64, u64); 4] {
        let index = |level: u32| (address >> (12 + 9 * (level - 1)) & 511) * 8;
        let mut used = [0; 3];
        for level in 1..=3 {
            // One table may serve at several levels of one walk, as long as its entries are different ones.
            loop {
                let table = self.tables[random.below(TABLES as u64) as usize];
                let entry = table + index(level as u32);
                if !used.contains(&entry) {
                    used[level - 1] = entry;
                    break;
                }
            }
        }
        let leaf = match random.below(6) {
            0 if self.group.huge => 3,
            1 | 2 => 2,
            _ => 1,
        };
        core::array::from_fn(|at| {
            let level = at as u32 + 1;
            let entry = if level == 4 { self.space.root + index(4) } else { used[at] };
            let target = match level {
                1 => page,
                _ if level == leaf => page & !((1 << (12 + 9 * (level - 1))) - 1),
                _ => used[at - 1] & !(PAGE - 1),
            };
            (entry, target | flags(random, level, leaf, self.group))
        })
    }

    /// Sometimes changes what the group changes of the control registers.
    fn controls(&self, random: &mut Random) {
        if random.once_in(3) {
            set_cr0(machine::base_cr0() & !CR0_WP | random.bits(CR0_WP));
        }
        if random.once_in(3) {
            let kept = cr4() & !self.group.cr4;
            let root = self.space.root;
            let wanted = kept | random.bits(self.group.cr4);
            // PCIDE may be set only while CR3's low bits are clear. Intel SDM vol. 3, 4.10.1.
            set_cr3(root);
            set_cr4(wanted);
        }
        if random.once_in(3) {
            wrmsr(MSR_EFER, rdmsr(MSR_EFER) & !EFER_NXE | random.bits(EFER_NXE));
        }
        let pcid = if cr4() & CR4_PCIDE != 0 { random.below(4) | random.bits(1 << 63) } else { 0 };
        set_cr3(self.space.root | pcid);
        let keys = random.bits(0xffff_fffc);
        if cr4() & CR4_PKE != 0 {
            // Key 0 stays free: it is that of the user's own code and stack.
            exec!("wrpkru", in("eax") keys as u32, in("ecx") 0, in("edx") 0);
        }
        if self.group.cr4 & CR4_PKS != 0 {
            // Key 0 is that of everything of the supervisor's own.
            wrmsr(MSR_PKRS, random.bits(0xffff_fffc));
        }
    }

    /// Drops the translation of `address` in one of the ways there are.
    fn flush(&self, random: &mut Random, address: u64) {
        let (way, controls) = (random.below(4), cr4());
        match way {
            0 if controls & (CR4_PGE | CR4_PCIDE) == 0 => set_cr3(self.space.root),
            1 if controls & CR4_PGE != 0 => {
                set_cr4(controls & !CR4_PGE);
                set_cr4(controls);
            }
            _ => invlpg(address),
        }
    }

    /// Leaves the control registers as the rest of the program wants them, outside a case's own.
    fn rest(&self) {
        set_rflags(2);
    }
}

/// Flags of an entry at `level`, `leaf` being the level of the one that maps the page.
fn flags(random: &mut Random, level: u32, leaf: u32, group: &Group) -> u64 {
    let mut flags = P | W | U | random.bits(A | D | PWT | PCD | 7 << 9 | 0x7f << 52);
    if random.once_in(20) {
        flags &= !P;
    }
    if random.once_in(4) {
        flags &= !W;
    }
    if random.once_in(4) {
        flags &= !U;
    }
    if random.once_in(10) {
        flags |= NX;
    }
    let reserved = random.once_in(32);
    let which = random.next();
    if level == leaf {
        flags |= random.bits(G);
        if group.cr4 & (CR4_PKE | CR4_PKS) != 0 {
            flags |= random.below(16) << 59;
        }
    }
    if level > 1 && level == leaf {
        flags |= PS | random.bits(1 << 12);
    }
    if reserved {
        flags |= match level {
            4 if which & 1 != 0 => PS,
            // Bits between the page's PAT bit and its frame number.
            2 | 3 if level == leaf && which & 1 != 0 => 1 << (13 + which / 2 % (u64::from(level) * 9 - 10)),
            _ => 1 << 51,
        };
    }
    flags
}

/// One access: its address, whether it is an exchange, and its outcome: what was read or 0.
fn access(random: &mut Random, page: u64) -> (u64, bool, Result<u64, Fault>) {
    let (kind, user, ac) = (random.below(4), random.once_in(2), random.bits(FLAG_AC));
    let value = random.next();
    let offset = match kind {
        READS => READ,
        WRITES | EXCHANGES => WRITTEN,
        _ if user => UD2,
        _ => RET,
    };
    let address = page + offset;
    if user {
        let code = user::CODE + kind * 16;
        let start = Start { rax: address, rbx: value & 0xff, ..Start::default() };
        let (fault, frame) = user::enter(code, user::STACK + PAGE - 16, start);
        // What ends well ends with UD2.
        let read = if kind == READS { frame.rax & 0xff } else { 0 };
        return (address, kind == EXCHANGES, if fault.vector == UD { Ok(read) } else { Err(fault) });
    }
    set_rflags(2 | ac);
    let outcome = catch(|| match kind {
        READS => peek::<u64>(address),
        WRITES => {
            poke(address, value);
            0
        }
        EXCHANGES => {
            let old: u64;
            exec!("xchg [{}], {}", in(reg) address, inout(reg) value => old);
            old
        }
        _ => {
            exec!("call {}", in(reg) address);
            0
        }
    });
    set_rflags(2);
    (address, kind == EXCHANGES, outcome)
}

/// Maps the user's code and stack into the boot tables, from which each group's space is forked.
pub(crate) fn prepare() {
    user::map();
    for (index, code) in USER_CODE.iter().enumerate() {
        code.iter().enumerate().for_each(|(at, &byte)| poke(user::CODE + (index * 16 + at) as u64, byte));
    }
}
