//! The paging differential: generated cases of page tables, control bits and accesses, one digest of all that came of
//! them for each group.
//!
//! Every case comes from a fixed sequence, so two machines that translate alike print the same digests: this program
//! judges nothing itself, it is run on several machines whose lines are compared. Addresses do not count, since
//! memory lies elsewhere on each of them; outcomes, error codes, CR2, data and accessed and dirty bits do.
//!
//! A group prints `digest NAME HEX mask=none`, where everything counts, and `digest NAME HEX mask=reserved.p,exchange.w`,
//! where two bits of error codes do not: P with RSVD, and W of an XCHG. QEMU's TCG leaves out the one, and the other where the
//! page may not even be read. In the group with keys of supervisor pages the mask ends in `,user.pk`: of a user's access to
//! such a page QEMU does not say whether its key is in the way, too. The first cases of a group have their own digest;
//! the many more behind them, `NAME.long`, run only with the word `long` on the command line.
//! A group whose features the processor lacks prints nothing.
#![no_std]
#![no_main]
// A payload is assembled into a static whose address is taken.
#![allow(unsafe_code)]
mod digest;
mod legacy;
mod long;

use digest::{Digest, Mask, Random};
use guests::multiboot::boot;
use guests::platform::bare_tcg;
use guests::report::case;
use guests::{main, println};

main!(run);

/// Cases in the first part of each group of four-level paging, and in the rest.
const LONG_MODE_CASES: (u32, u32) = (400, 6000);
/// The same for the 32-bit modes, each of whose cases leaves long mode and comes back.
const LEGACY_CASES: (u32, u32) = (60, 1200);

fn run() {
    long::prepare();
    for group in long::groups() {
        if (group.offered)() {
            let mut world = long::World::new(group);
            measure(group.names, LONG_MODE_CASES, group.mask, |random, digest| world.one(random, digest));
        }
    }
    for group in legacy::groups() {
        let mut world = legacy::World::new(group);
        measure(group.names, LEGACY_CASES, Mask::USUAL, |random, digest| world.one(random, digest));
    }
}

/// Runs both parts of a group and prints their digests.
fn measure(
    names: [&str; 2],
    (first, rest): (u32, u32),
    mask: Mask,
    mut one: impl FnMut(&mut Random, &mut Digest),
) {
    // Bare, nobody passes a command line; there everything runs.
    let long = bare_tcg() || boot().word("long");
    for (name, count) in [(names[0], first), (names[1], rest)] {
        if name == names[0] || long {
            case(name, |t| {
                let mut random = Random::new(name);
                let mut digest = Digest::new(mask);
                (0..count).for_each(|number| {
                    one(&mut random, &mut digest);
                    digest.end_case(number);
                });
                println!("digest {name} {:016x} mask=none", digest.exact);
                println!("digest {name} {:016x} mask={}", digest.masked, mask.name);
                // Neither all accesses nor none come to a good end, or the cases show little.
                t.within("percent of accesses that end well", digest.good_percent(), 10, 90);
            });
        }
    }
}
