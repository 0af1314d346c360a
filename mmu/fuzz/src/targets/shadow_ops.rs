//! Sequences of operations on the shadow kind and its vCPUs, in every paging mode, under the checks of its model.
use mmu::Tags;
use shadow_model::support::manual::{What, Who};
use shadow_model::support::shadow::How;
use shadow_model::{Op, FIVE, FOUR, PAE, TWO};

use crate::input::Input;

#[allow(dead_code, unreachable_pub)] // The model has its own test.
#[path = "../../../tests/shadow_model.rs"]
mod shadow_model;

/// Most operations of one input.
const MAX_OPS: usize = 120;

const WHATS: [What; 3] = [What::Read, What::Write, What::Fetch];
const WHOS: [Who; 2] = [Who::User, Who::Supervisor];

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let guest = input.index(4);
    let quota = 20 + input.index(20);
    let tags = if input.any() { Tags::One } else { Tags::PerRoot };
    let mut ops = vec![];
    while ops.len() < MAX_OPS && !input.is_empty() {
        ops.push(op(&mut input));
    }
    [FOUR, FIVE, PAE, TWO][guest].run(quota, tags, &ops);
}

/// An index of an address: most are below the lowest tables.
fn place(input: &mut Input<'_>) -> usize {
    let choice: u8 = input.any();
    match choice {
        0..=191 => usize::from(choice) % 22,
        _ => input.index(132),
    }
}

/// An entry, most of them sound.
fn entry(input: &mut Input<'_>) -> u64 {
    const FLAGS: [u64; 16] =
        [0x67, 0x67, 0x67, 0x67, 0x67, 0x67, 0x65, 0x65, 0x63, 0x27, 7, 0, 0, 1 << 63 | 0x67, 0xe7, 1 << 50 | 0x67];
    let choice: u8 = input.any();
    let flags = FLAGS[usize::from(choice & 15)];
    let frame = match choice >> 4 {
        0..=5 => 0,
        6..=11 => 1 + input.below(9),
        12 | 13 => 16 + input.below(8),
        14 => 512,
        // Any entry at all.
        _ => return input.any(),
    };
    frame << 12 | flags
}

fn how(input: &mut Input<'_>) -> How {
    let bits: u8 = input.any();
    let bit = |position: u32| bits >> position & 1 != 0;
    let ahead = (bits >> 6 == 0).then(|| input.index(120));
    How { hit: bit(0), resume: bit(1), keep: bit(2), ahead }
}

fn op(input: &mut Input<'_>) -> Op {
    let choice = input.below(40);
    let vcpu = input.index(2);
    match choice {
        0..=9 => {
            let (at, what, who) = (place(input), input.pick(&WHATS), input.pick(&WHOS));
            Op::Access { vcpu, at, what, who, how: how(input) }
        }
        10..=16 => {
            let table = if input.any() { 4 + input.below(2) } else { 1 + input.below(10) };
            Op::Store { vcpu, table, index: input.below(10), entry: entry(input), how: how(input) }
        }
        17 | 18 => Op::Emulate {
            table: 1 + input.below(9),
            offset: input.below(80),
            len: input.pick(&[1, 2, 4, 8]),
            entry: entry(input),
        },
        19..=22 => {
            let (root, pcid) = (input.index(2), input.below(3));
            Op::MovToCr3 { vcpu, root, pcid, no_flush: input.any() }
        }
        23 => Op::MovToCr0 { vcpu, wp: input.any(), pg: input.below(4) != 0 },
        24 | 25 => Op::MovToCr4 {
            vcpu,
            smep: input.any(),
            smap: input.any(),
            pge: input.any(),
            pcide: input.below(4) != 0,
        },
        26 => Op::WrmsrEfer { vcpu, nxe: input.any() },
        27 | 28 => Op::Invlpg { vcpu, at: place(input) },
        29 | 30 => Op::Invpcid {
            vcpu,
            kind: input.below(4) as u8,
            pcid: input.below(3) as u16,
            at: place(input),
        },
        31 => Op::Init { vcpu },
        32 | 33 => Op::Restore { vcpu },
        34 => Op::Migrate { vcpu, on: input.index(2) },
        35 => Op::Slot(input.pick(&[None, Some(false), Some(true)])),
        36 => Op::Zap { gfn: input.below(24), pages: 1 + input.below(600) },
        37 => Op::Obsolete,
        _ => Op::ZapObsolete,
    }
}
