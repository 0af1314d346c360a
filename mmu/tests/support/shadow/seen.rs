//! What a processor without a hypervisor could have in its TLB and its paging-structure caches: every translation that the
//! guest's tables made at some moment since the guest flushed it last, and every one that begins with entries of such a
//! moment. An access through a shadow may use no other.
use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use super::super::manual::{walk, Machine, What, Who};

/// A translation of one page, with the rights of its entries as such: CR0.WP, SMEP and SMAP are applied when it is used
/// (Intel SDM vol. 3, 4.10.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seen {
    pub frame: u64,
    writable: bool,
    user: bool,
    executable: bool,
    dirty: bool,
}

impl Seen {
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

/// Of one page in one PCID.
#[derive(Clone, Debug, Default)]
struct Known {
    translations: HashSet<Seen>,
    /// Entries that walks of the page began with, as the words they were read in, without the last one.
    begins: HashSet<Vec<u64>>,
}

/// Everything, by PCID and page.
#[derive(Clone, Debug, Default)]
pub struct Remembered(HashMap<(u16, u64), Known>);

impl Remembered {
    /// Notes what the tables say of `va`. Bits of entries that `fixed` says cannot be written do not count.
    pub fn look(
        &mut self,
        m: &Machine,
        word: &dyn Fn(u64) -> Option<u64>,
        fixed: &dyn Fn(u64) -> bool,
        pcid: u16,
        va: u64,
    ) {
        let known = self.0.entry((pcid, page(m, va))).or_default();
        let mut begins: Vec<Vec<u64>> = known.begins.iter().cloned().collect();
        begins.push(vec![]);
        for begin in begins {
            let count = Cell::new(0);
            let read = Cell::new(vec![]);
            let resumed = |at| {
                let number = count.get();
                count.set(number + 1);
                let found = begin.get(number).copied().or_else(|| word(at))?;
                let mut all = read.take();
                all.push(found);
                read.set(all);
                Some(found)
            };
            let again = |m: &Machine, what, who| {
                count.set(0);
                walk(m, &resumed, va, what, who)
            };
            let plain = Machine { smap: false, smep: false, pke: false, pks: false, wp: true, ..*m };
            let marked =
                |reached: &super::super::manual::Reached| !reached.marks.iter().all(|&(at, _)| fixed(at));
            let found = again(&plain, What::Read, Who::Supervisor);
            let entries = read.take();
            if m.pg {
                // All that were used and lead on: the last one is the leaf, or what is not there.
                let used = |entry: &&u64| **entry & 0x20 != 0 || (!m.lma && m.pae);
                let upper = entries.len().saturating_sub(1);
                for length in 1..=entries[..upper].iter().take_while(used).count() {
                    known.begins.insert(entries[..length].to_vec());
                }
            }
            let Some(found) = found.ok().filter(|found| !marked(found)) else { continue };
            let write = again(&Machine { wp: false, ..plain }, What::Write, Who::Supervisor);
            let seen = Seen {
                frame: found.address >> 12,
                writable: again(&plain, What::Write, Who::Supervisor).is_ok(),
                user: again(&plain, What::Read, Who::User).is_ok(),
                executable: again(&plain, What::Fetch, Who::Supervisor).is_ok(),
                dirty: write.is_ok_and(|write| !marked(&write)),
            };
            known.translations.insert(seen);
        }
    }

    /// Whether an access that reaches `frame` uses something that was seen.
    pub fn permit(&self, m: &Machine, pcid: u16, page: u64, frame: u64, what: What, who: Who) -> bool {
        let known = self.0.get(&(pcid, page));
        known.is_some_and(|known| {
            known.translations.iter().any(|seen| seen.frame == frame && seen.permits(m, what, who))
        })
    }

    /// Flushes the PCIDs that `covers` names.
    pub fn flush(&mut self, covers: impl Fn(u16) -> bool) {
        self.0.retain(|&(pcid, _), _| !covers(pcid));
    }

    /// Flushes an address, and all paging structures of its PCID.
    pub fn flush_page(&mut self, pcid: u16, page: u64) {
        self.0.remove(&(pcid, page));
        for (_, known) in self.0.iter_mut().filter(|&(&(of, _), _)| of == pcid) {
            known.begins.clear();
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
