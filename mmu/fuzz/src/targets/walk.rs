//! A guest's own tables as bytes, in every paging mode, against the reference walk.
use std::sync::atomic::Ordering;

use mmu::{CpuId, Gva, PdpteError, WalkRegs};

use crate::guest::{address, machine, tables};
use crate::input::Input;
use crate::support::manual::guest::{access, accesses, compare, context, regs};
use crate::support::manual::{Machine, What, Who};

/// Most accesses of one input.
const MAX_ACCESSES: usize = 64;

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let m = machine(&mut input);
    let memory = tables(&mut input);
    let context = context(&m);
    let accesses: Vec<(What, Who)> = accesses().collect();
    for _ in 0..MAX_ACCESSES {
        if input.is_empty() {
            break;
        }
        let (what, who) = input.pick(&accesses);
        let va = address(&mut input);
        compare(&memory, &context, &m, va, what, who);
        // The marks of this one stay.
        let shared = memory.shared(CpuId::BOOT);
        let (va, access) = (Gva::new(va), access(what, who));
        let words = pdptes(&m, |at| memory.backing().get(at));
        let walked = context.walk(&shared, &regs(&m), va, access);
        if m.pg && m.pae && !m.lma && pdptes(&m, |at| memory.backing().get(at)) != words {
            // The walk has marked PDPTEs as entries of a lower level, where other bits are reserved.
            continue;
        }
        let tried = memory.backing().exchanges.load(Ordering::SeqCst);
        let translated = context.translate(&shared, &regs(&m), va, access);
        assert_eq!(walked.map(|walk| walk.translation), translated, "A7: {m:?} {va:?} {what:?} {who:?}");
        assert_eq!(memory.backing().exchanges.load(Ordering::SeqCst), tried, "F1: all is marked");
        if m.pg && m.pae && !m.lma {
            let registers = context.load_pdptes(&shared, m.cr3);
            let good = words.iter().all(|&word| word & 1 == 0 || is_good(&m, word));
            match registers {
                Ok(registers) => {
                    assert!(good && registers == words, "A6: {registers:x?} from {words:x?}");
                    let regs = WalkRegs { pdptes: Some(registers), ..regs(&m) };
                    assert_eq!(context.translate(&shared, &regs, va, access), translated, "A6");
                }
                Err(PdpteError::Reserved(entry)) => assert!(words.contains(&entry) && !is_good(&m, entry)),
                Err(error) => panic!("A6: {error:?}"),
            }
        }
    }
}

/// The four PDPTEs; outside of memory there is nothing.
fn pdptes(m: &Machine, word: impl Fn(u64) -> Option<u64>) -> [u64; 4] {
    [0, 1, 2, 3].map(|index| word((m.cr3 & 0xffff_ffe0) + index * 8).unwrap_or(0))
}

/// Whether a PDPTE has no reserved bit set (Intel SDM vol. 3, table 4-8; bit 5 as the reference walk has it).
fn is_good(m: &Machine, entry: u64) -> bool {
    entry & 0x1c6 == 0 && entry >> m.maxphyaddr.min(52) == 0
}
