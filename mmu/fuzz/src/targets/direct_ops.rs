//! Sequences of operations on the direct kind, under the checks of its model.
use direct_model::support::machines::{AMD, INTEL, PLAIN_INTEL};
use direct_model::{run as run_model, Op, CPUS, GIB, LOGGED, SLOTS, VCPUS};
use mmu::{AccessKind, PageSize};

use crate::input::Input;

#[allow(dead_code, unreachable_pub)] // The model has its own test.
#[path = "../../../tests/direct_model.rs"]
mod direct_model;

/// Most operations of one input.
const MAX_OPS: usize = 120;

const KINDS: [AccessKind; 3] = [AccessKind::Read, AccessKind::Write, AccessKind::Execute];
const SIZES: [PageSize; 3] = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (machine, five_level, largest) = (input.index(3), input.any(), input.pick(&SIZES));
    let mut ops = vec![];
    while ops.len() < MAX_OPS && !input.is_empty() {
        ops.push(op(&mut input));
    }
    match machine {
        0 => run_model(AMD, five_level, largest, &ops),
        1 => run_model(INTEL, five_level, largest, &ops),
        _ => run_model(PLAIN_INTEL, five_level, largest, &ops),
    }
}

/// A frame: one of a few, at an end of a slot, in a slot, or anywhere.
fn gfn(input: &mut Input<'_>) -> u64 {
    let choice: u8 = input.any();
    let (start, pages, _) = SLOTS[usize::from(choice >> 4) % SLOTS.len()];
    match choice & 15 {
        0..=8 => start + [1, 600, 700][usize::from(choice & 15) % 3],
        9..=12 => start + input.below(1600) % pages,
        13 | 14 => start + pages - 2 + input.below(3),
        _ => input.below(6 * GIB),
    }
}

/// A number of frames.
fn span(input: &mut Input<'_>) -> u64 {
    match input.below(5) {
        0 => 1,
        1 => 512,
        2 => GIB,
        3 => 8 * GIB,
        _ => 1 + input.below(2000),
    }
}

fn op(input: &mut Input<'_>) -> Op {
    let (vcpu, cpu) = (input.index(VCPUS), input.index(CPUS));
    let slot = input.index(SLOTS.len());
    match input.below(35) {
        0..=2 => Op::Enter { vcpu, cpu },
        3 => Op::Exit { vcpu },
        4..=9 => Op::Access { vcpu, gfn: gfn(input), kind: input.pick(&KINDS), use_tlb: input.any() },
        10 => Op::Zap { gfn: gfn(input), pages: span(input), issue: input.any() },
        11 => Op::Protect { gfn: gfn(input), pages: span(input), issue: input.any() },
        12 => Op::Unprotect { gfn: gfn(input), pages: span(input) },
        13 => Op::Split { gfn: gfn(input), pages: 1 + input.below(2000), size: input.pick(&SIZES) },
        14 => Op::InsertSlot { slot, read_only: input.any() },
        15 => Op::RemoveSlot { slot },
        16 => Op::SetFlags { slot, read_only: input.any() },
        17 => Op::Grant { size: input.pick(&SIZES) },
        18 => Op::Invalidate { gfn: gfn(input) },
        19 => Op::LateInstall { gfn: gfn(input), invalidate: input.any() },
        20 => Op::Reclaim { limit: 1 + input.index(20) },
        21 => Op::StartLog {
            slot: LOGGED[slot % LOGGED.len()],
            dirty_bits: input.any(),
            all_set: input.any(),
            split: input.any(),
        },
        22 => Op::StopLog { slot },
        23 | 24 => Op::Harvest { slot: LOGGED[slot % LOGGED.len()] },
        25 => Op::Age { gfn: gfn(input), pages: span(input) },
        26 => Op::Collapse { gfn: gfn(input), pages: span(input) },
        27 => Op::Track { gfn: gfn(input) },
        28 => Op::Untrack { gfn: gfn(input), restore: input.any() },
        29 => Op::ForbidHugeExecute { forbid: input.any() },
        30 => Op::Recover { ratio: 1 + input.below(3) },
        31 => Op::InvalidateAll,
        32 => Op::ZapObsolete { batches: 1 + input.index(2) },
        33 => Op::Populate { vcpu, gfn: gfn(input), pages: 1 + input.below(2000) },
        _ => Op::CacheMmio { on: input.any() },
    }
}
