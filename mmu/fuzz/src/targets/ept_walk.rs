//! L1's extended page tables as bytes, against the reference walk.
use crate::guest::{address, extended, tables, ADDRESS};
use crate::input::Input;
use crate::support::manual::ept::OPS;
use crate::support::manual::ept_guest::{compare, context};

/// Most accesses of one input.
const MAX_ACCESSES: usize = 64;

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let m = extended(&mut input);
    let memory = tables(&mut input);
    let context = context(&m);
    for _ in 0..MAX_ACCESSES {
        if input.is_empty() {
            break;
        }
        let op = input.pick(&OPS);
        compare(&memory, &context, &m, address(&mut input) & ADDRESS, op);
    }
}
