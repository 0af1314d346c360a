//! The guest-table walker against the reference walk, over small worlds that are enumerated completely.
mod support;

use support::manual::guest::{accesses, compare_fast, context, flags, link, memory, places, roles, BASE, VA};
use support::manual::Machine;

/// Protection keys, without them a role has one way to be walked: rights of key 5 in PKRU and IA32_PKRS.
const KEYS: [(bool, bool, u32, u32); 6] = [
    (false, false, u32::MAX, u32::MAX),
    (true, false, 1 << 10, u32::MAX),
    (true, false, 2 << 10, u32::MAX),
    (false, true, u32::MAX, 1 << 10),
    (false, true, u32::MAX, 2 << 10),
    (true, true, 2 << 10, 1 << 10),
];
const KEY: u64 = 5 << 59;

/// The full product of present, write, user and no-execute over the lower three levels in long mode: 4096 tables, every
/// access, every role, with each kind of protection key.
#[test]
fn four_levels_exhaustive() {
    let memory = memory();
    let places = places(4);
    for (pke, pks, pkru, pkrs) in KEYS {
        for m in roles(Machine { pke, pks, pkru, pkrs, ..BASE }) {
            let context = context(&m);
            for bits in 0..1u64 << 12 {
                let full = 7 | 0x60;
                link(&memory, &places, &[full, flags(bits), flags(bits >> 4), flags(bits >> 8) | KEY]);
                for (what, who) in accesses() {
                    compare_fast(&memory, &context, &m, VA, what, who);
                }
            }
        }
    }
}

/// The top entry varies too: against each, the leaf varies.
#[test]
fn five_levels_exhaustive_at_both_ends() {
    let memory = memory();
    let places = places(5);
    for m in roles(Machine { la57: true, ..BASE }) {
        let context = context(&m);
        for bits in 0..1u64 << 8 {
            let full = 7 | 0x60;
            link(&memory, &places, &[flags(bits), full, full, full, flags(bits >> 4)]);
            for (what, who) in accesses() {
                compare_fast(&memory, &context, &m, VA, what, who);
            }
        }
    }
}

#[test]
fn pae_exhaustive() {
    let memory = memory();
    let base = Machine { lma: false, cr3: 0x1000, ..BASE };
    let va = 2 << 30 | 7 << 21 | 9 << 12 | 0x123;
    for m in roles(base) {
        let context = context(&m);
        for bits in 0..1u64 << 9 {
            memory.backing().set(0x1000 + 2 * 8, 0x2000 | bits >> 8);
            memory.backing().set(0x2000 + 7 * 8, 0x3000 | flags(bits));
            memory.backing().set(0x3000 + 9 * 8, 0x4000 | flags(bits >> 4));
            for (what, who) in accesses() {
                compare_fast(&memory, &context, &m, va, what, who);
            }
        }
    }
}

#[test]
fn two_levels_exhaustive() {
    let memory = memory();
    let va = 7 << 22 | 9 << 12 | 0x123;
    for pse in [false, true] {
        for m in roles(Machine { lma: false, pae: false, pse, ..BASE }) {
            let context = context(&m);
            for bits in 0..1u64 << 7 {
                let large = bits >> 6 << 7;
                memory.backing().set_u32(0x1000 + 7 * 4, (0x2000 | bits & 7 | 0x60 | large) as u32);
                memory.backing().set_u32(0x2000 + 9 * 4, (0x4000 | bits >> 3 & 7 | 0x60) as u32);
                for (what, who) in accesses() {
                    compare_fast(&memory, &context, &m, va, what, who);
                }
            }
        }
    }
}

/// The same product where the middle level is a large page: its rights, its key, its place.
#[test]
fn large_pages_exhaustive() {
    let memory = memory();
    let places = places(4);
    for (pke, pks, pkru, pkrs) in KEYS {
        for m in roles(Machine { pke, pks, pkru, pkrs, ..BASE }) {
            let context = context(&m);
            for bits in 0..1u64 << 8 {
                let full = 7 | 0x60;
                link(&memory, &places, &[full, flags(bits), full, full]);
                memory.backing().set(places[2], 0x1_4020_0000 | 0x80 | flags(bits >> 4) | KEY);
                for (what, who) in accesses() {
                    compare_fast(&memory, &context, &m, VA, what, who);
                }
                link(&memory, &places, &[flags(bits), full, full, full]);
                memory.backing().set(places[1], 0x1_4000_0000 | 0x80 | flags(bits >> 4) | KEY);
                for (what, who) in accesses() {
                    compare_fast(&memory, &context, &m, VA, what, who);
                }
            }
        }
    }
}
