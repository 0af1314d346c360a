//! Where cases come from and where their outcomes go.
use core::fmt;
use guests::multiboot::boot;
use guests::paging::{E_P, E_PK, E_RSVD, E_U, E_W};
use guests::println;
use guests::trap::{Fault, PF};

/// FNV-1a, 64 bits: its first value and its factor.
const FNV: (u64, u64) = (0xcbf2_9ce4_8422_2325, 0x100_0000_01b3);

fn fold(hash: u64, value: u64) -> u64 {
    value.to_le_bytes().iter().fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(FNV.1))
}

/// A fixed sequence of numbers: xorshift64*.
pub(crate) struct Random(u64);

impl Random {
    /// The sequence that belongs to a name.
    pub(crate) fn new(name: &str) -> Random {
        Random(name.bytes().fold(FNV.0, |hash, byte| fold(hash, byte.into())) | 1)
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 32) % limit
    }

    /// True once in `times`.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// Each of the bits of `mask`, or not.
    pub(crate) fn bits(&mut self, mask: u64) -> u64 {
        self.next() & mask
    }
}

/// What of a page fault's error code does not count in a masked digest: P with RSVD, W of exchanges, and perhaps PK of a
/// user's accesses.
#[derive(Clone, Copy)]
pub(crate) struct Mask {
    /// As it is printed.
    pub(crate) name: &'static str,
    user_key: bool,
}

impl Mask {
    /// For groups without keys of supervisor pages.
    pub(crate) const USUAL: Mask = Mask { name: "reserved.p,exchange.w", user_key: false };
    /// For groups with them.
    pub(crate) const SUPERVISOR_KEYS: Mask = Mask { name: "reserved.p,exchange.w,user.pk", user_key: true };
}

/// The digests of a group's part so far.
pub(crate) struct Digest {
    /// Of everything.
    pub(crate) exact: u64,
    /// Without what the mask names.
    pub(crate) masked: u64,
    mask: Mask,
    good: u64,
    all: u64,
}

impl Digest {
    /// Of nothing.
    pub(crate) fn new(mask: Mask) -> Digest {
        Digest { exact: FNV.0, masked: FNV.0, mask, good: 0, all: 0 }
    }

    /// Adds a number.
    pub(crate) fn add(&mut self, value: u64) {
        self.exact = fold(self.exact, value);
        self.masked = fold(self.masked, value);
    }

    /// Adds how an access to `address`, an `exchange` or another, ended.
    pub(crate) fn access(&mut self, address: u64, exchange: bool, outcome: &Result<u64, Fault>) {
        self.all += 1;
        if boot().word("steps") {
            println!("access {address:#x}: {outcome:x?}");
        }
        match outcome {
            Ok(value) => {
                self.good += 1;
                self.add(*value);
            }
            Err(fault) => {
                self.add(0x100 | u64::from(fault.vector));
                let mask = match fault.vector {
                    PF => {
                        let by_user = self.mask.user_key && fault.error & E_U != 0;
                        (u64::from(fault.error & E_RSVD != 0) * E_P)
                            | (u64::from(exchange) * E_W)
                            | (u64::from(by_user) * E_PK)
                    }
                    _ => 0,
                };
                self.exact = fold(self.exact, fault.error);
                self.masked = fold(self.masked, fault.error & !mask);
                if fault.vector == PF {
                    self.add(fault.cr2.wrapping_sub(address));
                }
            }
        }
    }

    /// How many of a hundred accesses ended well.
    pub(crate) fn good_percent(&self) -> u64 {
        self.good * 100 / self.all.max(1)
    }

    /// With the word `steps` on the command line, says more about the case.
    pub(crate) fn explain(&self, what: fmt::Arguments<'_>) {
        if boot().word("steps") {
            println!("{what}");
        }
    }

    /// With the word `steps` on the command line, says what the digest is after this case, for finding the first that
    /// differs; its accesses come before.
    pub(crate) fn end_case(&self, number: u32) {
        if boot().word("steps") {
            println!("step {number} {:016x}", self.masked);
        }
    }
}
