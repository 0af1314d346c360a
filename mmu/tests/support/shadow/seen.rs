//! What a processor without a hypervisor could have in its TLB: every translation that the guest's tables made at some
//! moment since the guest flushed it last. An access through a shadow may use no other.
use super::super::manual::{walk, Machine, What, Who};

/// A translation of one page, with the rights of its entries as such: CR0.WP, SMEP and SMAP are applied when it is used
/// (Intel SDM vol. 3, 4.10.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seen {
    pub pcid: u16,
    pub page: u64,
    pub frame: u64,
    writable: bool,
    user: bool,
    executable: bool,
    dirty: bool,
}

impl Seen {
    /// What the tables say of `va`, if a processor may cache it: all accessed bits are set. Bits of entries that `fixed` says
    /// cannot be written do not count.
    pub fn look(
        m: &Machine,
        word: &dyn Fn(u64) -> Option<u64>,
        fixed: &dyn Fn(u64) -> bool,
        pcid: u16,
        va: u64,
    ) -> Option<Self> {
        let plain = Machine { smap: false, smep: false, pke: false, pks: false, wp: true, ..*m };
        let marked =
            |reached: &super::super::manual::Reached| !reached.marks.iter().all(|&(at, _)| fixed(at));
        let read = walk(&plain, word, va, What::Read, Who::Supervisor).ok().filter(|read| !marked(read))?;
        let is = |what, who| walk(&plain, word, va, what, who).is_ok();
        let write = walk(&Machine { wp: false, ..plain }, word, va, What::Write, Who::Supervisor);
        Some(Self {
            pcid,
            page: page(m, va),
            frame: read.address >> 12,
            writable: is(What::Write, Who::Supervisor),
            user: is(What::Read, Who::User),
            executable: is(What::Fetch, Who::Supervisor),
            dirty: write.is_ok_and(|write| !marked(&write)),
        })
    }

    /// Intel SDM vol. 3, 4.6.1.
    pub fn permits(&self, m: &Machine, what: What, who: Who) -> bool {
        if !m.pg {
            return true;
        }
        let of_user = who == Who::User;
        match what {
            What::Read if of_user => self.user,
            What::Write if of_user => self.user && self.writable && self.dirty,
            What::Fetch if of_user => self.user && self.executable,
            What::Read => !(self.user && m.smap),
            What::Write => (self.writable || !m.wp) && self.dirty && !(self.user && m.smap),
            What::Fetch => self.executable && !(self.user && m.smep),
        }
    }
}

pub fn page(m: &Machine, va: u64) -> u64 {
    if m.lma {
        va >> 12
    } else {
        (va & 0xffff_ffff) >> 12
    }
}
