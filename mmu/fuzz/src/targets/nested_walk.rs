//! L2's tables and L1's tables for L2 in the same bytes, against the reference walk of both stages.
use crate::guest::{address, extended, machine, tables};
use crate::input::Input;
use crate::support::manual::guest::{accesses, memory, RAM_BYTES};
use crate::support::manual::nested::{found, Below};
use crate::support::manual::{ept, Machine, What, Who};

/// Most accesses of one input.
const MAX_ACCESSES: usize = 16;

/// Bit 2 of each index of an address.
const UPPER_HALF: u64 = 4 << 12 | 4 << 21 | 4 << 30 | 4 << 39 | 4 << 48;

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let below = match input.any() {
        true => Below::Ept(ept::Machine { levels: 4, ..extended(&mut input) }),
        false => {
            // How nested tables are read (AMD APM vol. 2, 15.25.5).
            Below::Npt(Machine { pg: true, wp: true, smap: false, pke: false, pks: false, ..machine(&mut input) })
        }
    };
    let l2 = machine(&mut input);
    let (expected, got) = (tables(&mut input), memory());
    let words = || (0..RAM_BYTES).step_by(8);
    for at in words() {
        let entry = expected.backing().get(at).unwrap_or(0);
        // Most words are of one stage: the upper half of what is used of a table is L2's, and refers to pages that the lower
        // half of L1's tables maps.
        let entry = if at & 0x20 != 0 { entry & !0x4000 } else { entry };
        expected.backing().set(at, entry);
        got.backing().set(at, entry);
    }
    let accesses: Vec<(What, Who)> = accesses().collect();
    for _ in 0..MAX_ACCESSES {
        if input.is_empty() {
            break;
        }
        let (what, who) = input.pick(&accesses);
        let va = address(&mut input) | UPPER_HALF;
        let (end, entangled) = below.end(expected.backing(), &l2, va, what, who);
        let found = found(&got, &below, &l2, va, what, who);
        if entangled {
            // The memories may differ from here on.
            break;
        }
        assert_eq!(found, end, "{below:?} {l2:?} {va:#x} {what:?} {who:?}");
        for at in words() {
            assert_eq!(got.backing().get(at), expected.backing().get(at), "{below:?} {l2:?} {va:#x} {what:?} {at:#x}");
        }
    }
}
