//! Random guest memory, random registers, random addresses: tables that refer to themselves and to anything else, against the
//! reference walks. What it finds becomes a test of its own in `walker.rs`.
mod support;

use mmu::{
    Access, AccessKind, Agent, CpuId, CpuRole, EptExit, Gpa, GuestEpt, NGpa, PagingContext, VmMemory,
    WalkError, WalkRegs,
};
use proptest::prelude::*;
use support::flat::FlatRam;
use support::manual::ept::{self, Failed, Op, OPS};
use support::manual::guest::{accesses, compare, context, memory, RAM_BYTES};
use support::manual::Machine;

/// A stream of numbers from a seed (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// True in one of `n` cases.
    fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    /// An entry of long mode or PAE, mostly sound.
    fn entry(&mut self) -> u64 {
        let frame = (self.next() % (RAM_BYTES >> 12)) << 12;
        let mut entry = frame | self.next() & 0x160 | 7;
        for (bit, n) in [(0, 16), (1, 4), (2, 4), (7, 8), (63, 8)] {
            entry ^= u64::from(self.one_in(n)) << bit;
        }
        entry ^= (self.next() & 15) << 59 & 0u64.wrapping_sub(u64::from(self.one_in(2)));
        if self.one_in(32) {
            entry ^= 1 << (self.next() % 64);
        }
        entry
    }

    /// An entry of EPT, mostly sound.
    fn ept_entry(&mut self) -> u64 {
        let frame = (self.next() % (RAM_BYTES >> 12)) << 12;
        let mut entry = frame | self.next() & 0x700 | 7;
        for (bit, n) in [(0, 16), (1, 4), (2, 4), (7, 8)] {
            entry ^= u64::from(self.one_in(n)) << bit;
        }
        if self.one_in(8) {
            entry |= 6 << 3;
        }
        if self.one_in(32) {
            entry ^= 1 << (self.next() % 64);
        }
        entry
    }
}

fn machine(numbers: &mut Numbers) -> Machine {
    let bits = numbers.next();
    let bit = |position: u32| bits >> position & 1 != 0;
    let (pg, lma, pae) = [(true, true, true), (true, true, true), (true, false, true), (true, false, false)]
        [(bits >> 32 & 3) as usize];
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
        nxe: !bit(7) || bit(8),
        maxphyaddr: [32, 36, 39, 40, 46, 52][(bits >> 40) as usize % 6],
        gib_pages: bit(9),
        pse36: bit(10),
        amd: bit(11),
        cr3: ((bits >> 48) % (RAM_BYTES >> 12)) << 12 | bits >> 20 & 0xfff,
        ac: bit(12),
        pkru: numbers.next() as u32,
        pkrs: numbers.next() as u32,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_tables_of_every_mode(seed: u64) {
        let mut numbers = Numbers(seed);
        let memory = memory();
        for at in (0..RAM_BYTES).step_by(8) {
            memory.backing().set(at, numbers.entry());
        }
        let m = machine(&mut numbers);
        let context = context(&m);
        for (what, who) in accesses() {
            compare(&memory, &context, &m, numbers.next(), what, who);
        }
    }

    #[test]
    fn random_extended_page_tables(seed: u64) {
        let mut numbers = Numbers(seed);
        let memory = memory();
        for at in (0..RAM_BYTES).step_by(8) {
            memory.backing().set(at, numbers.ept_entry());
        }
        let bits = numbers.next();
        let m = ept::Machine {
            levels: 4 + u32::from(bits & 1 != 0),
            execute_only: bits & 2 != 0,
            mode_based: bits & 4 != 0,
            accessed_dirty: bits & 8 != 0,
            mib_pages: bits & 0x30 != 0,
            gib_pages: bits & 0xc0 != 0,
            maxphyaddr: [39, 46, 52][(bits >> 8) as usize % 3],
            root: 0x1000,
        };
        for op in OPS {
            compare_ept(&memory, &m, numbers.next() & 0x7_ffff_ffff_ffff, op);
        }
    }
}

fn compare_ept(memory: &VmMemory<FlatRam>, m: &ept::Machine, gpa: u64, op: Op) {
    let cpu = GuestEpt {
        max_phys_addr: m.maxphyaddr as u8,
        execute_only: m.execute_only,
        five_level: true,
        mib_pages: m.mib_pages,
        gib_pages: m.gib_pages,
        accessed_dirty: true,
        advanced_info: true,
        mode_based_execute: m.mode_based,
    };
    let pointer = m.root | 6 | u64::from(m.levels - 1) << 3 | u64::from(m.accessed_dirty) << 6;
    let context = PagingContext::<NGpa, Gpa>::new(CpuRole::ept(pointer, &cpu).unwrap());
    let kind = match op {
        Op::Read => AccessKind::Read,
        Op::Write => AccessKind::Write,
        Op::Fetch { .. } => AccessKind::Execute,
    };
    let agent = if op == (Op::Fetch { user: false }) { Agent::Supervisor } else { Agent::User };
    let ram = memory.backing();
    let expected = ept::walk(m, &|at| ram.get(at).filter(|_| at < RAM_BYTES), gpa, op);
    let mut after: Vec<u64> = (0..RAM_BYTES / 8).map(|word| ram.get(word * 8).unwrap()).collect();
    for &(at, entry) in expected.as_ref().map_or(&[][..], |reached| &reached.marks) {
        after[at as usize / 8] = entry;
    }
    let shared = memory.shared(CpuId::BOOT);
    let regs = WalkRegs { cr3: pointer, ..WalkRegs::default() };
    let found = context.walk(&shared, &regs, NGpa::new_truncate(gpa), Access { kind, agent });
    match (expected, found) {
        (Ok(expected), Ok(found)) => {
            assert_eq!(found.translation.address.bits(), expected.address);
            assert_eq!(found.translation.page_bytes, expected.page_bytes);
        }
        (Err(expected), Err(WalkError::Fault(fault))) => match (expected, fault.ept_exit()) {
            (Failed::Misconfiguration, EptExit::Misconfiguration) => {}
            (Failed::Violation(rights), EptExit::Violation(info)) => assert_eq!(info.bits() & 0x78, rights),
            (expected, found) => panic!("{m:?} {gpa:#x} {op:?}: expected {expected:?}, found {found:?}"),
        },
        (expected, found) => panic!("{m:?} {gpa:#x} {op:?}: expected {expected:?}, found {found:?}"),
    }
    for (word, &want) in after.iter().enumerate() {
        assert_eq!(ram.get(word as u64 * 8), Some(want), "{m:?} {gpa:#x} {op:?}");
    }
}
