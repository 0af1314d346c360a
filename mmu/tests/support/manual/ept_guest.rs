//! L1's extended page tables as the crate sees them, and comparisons of the two walks.
use mmu::{
    Access, AccessKind, Agent, CpuId, CpuRole, EptExit, Gpa, GuestEpt, NGpa, PagingContext, VmMemory,
    WalkError, WalkRegs,
};

use super::super::flat::FlatRam;
use super::ept::{walk, Failed, Machine, Op};
use super::guest::RAM_BYTES;

pub fn pointer(m: &Machine) -> u64 {
    m.root | 6 | u64::from(m.levels - 1) << 3 | u64::from(m.accessed_dirty) << 6
}

pub fn context(m: &Machine) -> PagingContext<NGpa, Gpa> {
    let cpu = GuestEpt {
        max_phys_addr: m.maxphyaddr as u8,
        execute_only: m.execute_only,
        five_level: true,
        mib_pages: m.mib_pages,
        gib_pages: m.gib_pages,
        accessed_dirty: true,
        advanced_info: false,
        mode_based_execute: m.mode_based,
    };
    PagingContext::new(CpuRole::ept(pointer(m), &cpu).unwrap())
}

pub fn access(op: Op) -> Access {
    let kind = match op {
        Op::Read => AccessKind::Read,
        Op::Write => AccessKind::Write,
        Op::Fetch { .. } => AccessKind::Execute,
    };
    let supervisor = op == Op::Fetch { user: false };
    Access { kind, agent: if supervisor { Agent::Supervisor } else { Agent::User } }
}

/// The walk's result as the reference gives it: an address and its page, or an exit.
pub fn found(
    memory: &VmMemory<FlatRam>,
    context: &PagingContext<NGpa, Gpa>,
    m: &Machine,
    gpa: u64,
    op: Op,
) -> Result<(u64, u64), EptExit> {
    let shared = memory.shared(CpuId::BOOT);
    let regs = WalkRegs { cr3: pointer(m), ..WalkRegs::default() };
    match context.walk(&shared, &regs, NGpa::new_truncate(gpa), access(op)) {
        Ok(walk) => Ok((walk.translation.address.bits(), walk.translation.page_bytes)),
        Err(WalkError::Fault(fault)) => {
            assert_eq!(fault.address, gpa);
            Err(fault.ept_exit())
        }
        Err(other) => panic!("{other:?}"),
    }
}

/// The same address or the same exit, and the same marks. Memory is put back.
pub fn compare(
    memory: &VmMemory<FlatRam>,
    context: &PagingContext<NGpa, Gpa>,
    m: &Machine,
    gpa: u64,
    op: Op,
) {
    let ram = memory.backing();
    let expected = walk(m, &|at| ram.get(at), gpa, op);
    let marks = expected.as_ref().map(|reached| reached.marks.clone()).unwrap_or_default();
    let before: Vec<(u64, u64)> = (0..RAM_BYTES / 8)
        .map(|word| word * 8)
        .map(|at| (at, ram.get(at).unwrap()))
        .filter(|&(_, word)| word != 0)
        .collect();
    let found = found(memory, context, m, gpa, op);
    for &(at, word) in &before {
        let want = marks.iter().rfind(|mark| mark.0 == at).map_or(word, |mark| mark.1);
        assert_eq!(ram.get(at), Some(want), "{m:?} {gpa:#x} {op:?}: entry at {at:#x} was {word:#x}");
        ram.set(at, word);
    }
    match (&expected, &found) {
        (Ok(reached), Ok(found)) => assert_eq!(*found, (reached.address, reached.page_bytes), "{m:?} {op:?}"),
        (Err(Failed::Misconfiguration), Err(EptExit::Misconfiguration)) => {}
        (Err(Failed::Violation(rights)), Err(EptExit::Violation(info))) => {
            let op_bit = match op {
                Op::Read => 1,
                Op::Write => 2,
                Op::Fetch { .. } => 4,
            };
            assert_eq!(info.bits(), rights | op_bit, "{m:?} {gpa:#x} {op:?}");
        }
        _ => panic!("{m:?} {gpa:#x} {op:?}: expected {expected:x?}, found {found:x?}"),
    }
}
