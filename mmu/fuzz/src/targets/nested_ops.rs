//! Sequences of what an L1, its L2s and the host do, in each format of L1's nested tables, under the checks of their model.
use mmu::LogBy;
use nested_model::support::l1::{
    ept5_setup, ept_setup, npt_setup, pae_setup, short_setup, EPT, L2, L2_UNPAGED, LOWEST, NPT, ROOT_A, ROOT_A5,
    ROOT_B,
};
use nested_model::support::machines::{Amd, Host, Intel, AMD, HOST, INTEL};
use nested_model::support::manual::{ept, Machine, What, Who};
use nested_model::support::two_stage::Below;
use nested_model::{run as run_model, Op};

use crate::input::Input;

#[allow(dead_code, unreachable_pub, unused_imports)] // The model has its own test.
#[path = "../../../tests/nested_model.rs"]
mod nested_model;

/// Most operations of one input.
const MAX_OPS: usize = 60;

const WHATS: [What; 3] = [What::Read, What::Write, What::Fetch];
const WHOS: [Who; 2] = [Who::User, Who::Supervisor];
const LOGS: [LogBy; 2] = [LogBy::DirtyBits, LogBy::WriteProtection];
/// An EPT host whose L1 cannot have mode-based execute control.
const PLAIN: Intel = Intel { mode_based_execute: false, ..INTEL };

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let format = input.below(9);
    let with = (input.any(), 24 + input.index(24));
    let mut ops = vec![];
    while ops.len() < MAX_OPS && !input.is_empty() {
        ops.push(op(&mut input, format < 4));
    }
    let ept = |machine: ept::Machine| Below::Ept(machine);
    let npt = |machine: Machine| Below::Npt(machine);
    match format {
        0 => run_model(PLAIN, (ept(EPT), L2), ept_setup, with, &ops),
        1 => run_model(PLAIN, (ept(ept::Machine { accessed_dirty: false, ..EPT }), L2), ept_setup, with, &ops),
        2 => run_model(INTEL, (ept(ept::Machine { mode_based: true, ..EPT }), L2), ept_setup, with, &ops),
        3 => {
            let five = ept::Machine { levels: 5, root: ROOT_A5, ..EPT };
            run_model(PLAIN, (ept(five), L2_UNPAGED), ept5_setup, with, &ops)
        }
        4 => run_model(AMD, (npt(NPT), L2), npt_setup, with, &ops),
        5 => {
            let host = Amd { host: Host { five_level: true, ..HOST }, ..AMD };
            run_model(host, (npt(NPT), L2_UNPAGED), npt_setup, with, &ops)
        }
        6 => run_model(AMD, (npt(Machine { smep: true, ..NPT }), L2), npt_setup, with, &ops),
        7 => {
            let short = Machine { lma: false, pae: false, pse: true, nxe: false, ..NPT };
            run_model(AMD, (npt(short), L2_UNPAGED), short_setup, with, &ops)
        }
        _ => run_model(AMD, (npt(Machine { lma: false, ..NPT }), L2_UNPAGED), pae_setup, with, &ops),
    }
}

/// A frame of an entry: mostly of the pages that L1 gives to L2.
fn frame(input: &mut Input<'_>) -> u64 {
    match input.below(12) {
        0..=5 => 64 + input.below(48),
        6 => 1 + input.below(9),
        7 => 512,
        8 => 1040,
        9 => 1056,
        10 => 1030,
        _ => 1 << 30,
    }
}

/// An entry of either kind of nested tables, most of them sound, some of them any.
fn entry(input: &mut Input<'_>, ept: bool) -> u64 {
    const EPT: [u64; 16] = [
        0x737, 0x737, 0x737, 0x737, 0x737, 0x731, 0x733, 0x437, 0x537, 0x734, 0x335, 0x331, 0x332, 0x300, 0, 0x7b7,
    ];
    const NPT: [u64; 16] = [
        0x67, 0x67, 0x67, 0x67, 0x67, 0x67, 0x65, 0x63, 0x27, 7, 0, 1 << 63 | 0x67, 0xe7, 1 << 50 | 0x67, 0x7f, 0x6f,
    ];
    let choice: u8 = input.any();
    if choice >> 4 == 15 {
        return input.any();
    }
    let flags = if ept { EPT } else { NPT }[usize::from(choice & 15)];
    frame(input) << 12 | flags
}

fn op(input: &mut Input<'_>, ept: bool) -> Op {
    let choice = input.below(48);
    let vcpu = input.index(2);
    let at = input.index(33);
    match choice {
        0..=13 => Op::Access {
            vcpu,
            at,
            what: input.pick(&WHATS),
            who: input.pick(&WHOS),
            cached: input.any(),
        },
        14 | 15 => Op::Speculate { vcpu },
        16..=21 => {
            let tables = [LOWEST[0], LOWEST[1], LOWEST[2], ROOT_A, ROOT_A + 0x2000, ROOT_B + 0x2000];
            let (table, index) = (input.pick(&tables), input.below(24));
            Op::Store { vcpu, table, index, entry: entry(input, ept) }
        }
        22..=24 => {
            let gfn = match input.below(3) {
                0 => input.below(32),
                1 => 64 + input.below(48),
                _ => 1040 + input.below(32),
            };
            Op::L1Access { vcpu, gfn, what: input.pick(&WHATS) }
        }
        25..=28 => {
            let (page, index) = (20 + input.below(2), input.below(24));
            Op::L2Store { vcpu, page, index, entry: entry(input, ept) }
        }
        29..=31 => Op::L2Table {
            vcpu,
            index: input.below(20),
            to: input.below(20),
            flags: input.pick(&[0x67, 0x67, 0x65, 0]),
        },
        32 => Op::L2Flush { vcpu, at: None },
        33 => Op::L2Flush { vcpu, at: Some(at) },
        34 => Op::Leave { vcpu },
        35..=37 => Op::Switch { vcpu, below: input.index(3), name: input.below(3) as u16 },
        38 | 39 => Op::Flush { vcpu, which: input.index(4) },
        40 | 41 => Op::FlushLinear { vcpu, which: input.index(4), name: 1 + input.below(2) as u16, at },
        42 => Op::Move {
            gfn: match input.below(3) {
                0 => 64 + input.below(48),
                1 => 512 + input.below(8),
                _ => 1 + input.below(9),
            },
        },
        43 => Op::Zap { gfn: input.below(1056), pages: 1 + input.below(63) },
        44 => Op::Slot { index: 1 + input.index(2) },
        45 => Op::Obsolete,
        46 => Op::ZapObsolete,
        _ => Op::Log { by: input.pick(&LOGS), end: input.below(4) == 0 },
    }
}
