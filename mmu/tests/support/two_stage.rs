//! Both stages of an L2 from the manuals: the reference over L1's own tables, and the processor over a shadow of them. The
//! processor keeps what it has used in a TLB, by tag, until it is told to flush.
use std::cell::RefCell;
use std::collections::HashMap;

use super::flat::FlatRam;
use super::machines::{Machine as Host, Reading};
use super::manual::{ept, walk, Machine, What, Who};
use super::tables::HostTables;

/// How L1's tables for L2 are read.
#[derive(Clone, Copy, Debug)]
pub enum Below {
    Ept(ept::Machine),
    /// Nested tables of AMD; `smep` is guest mode execute trap.
    Npt(Machine),
}

/// An access as the second stage sees it. `user` tells fetches apart, in the sense of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Op {
    pub what: What,
    pub user: bool,
}

pub const OPS: [Op; 4] = [
    Op { what: What::Read, user: true },
    Op { what: What::Write, user: true },
    Op { what: What::Fetch, user: false },
    Op { what: What::Fetch, user: true },
];

/// What an exit says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// EPT violation with this exit qualification.
    Violation(u64),
    Misconfiguration,
    /// Nested page fault with this EXITINFO1.
    NestedPageFault(u64),
}

/// How an access ends, by L1's tables alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At this address of L1, through this one of L2.
    At(u64, u64, Op),
    /// L2 gets a page fault.
    PageFault(u32),
    /// L1 gets an exit for this L2 address.
    ToL1(u64, Exit),
}

/// What the second stage says of an address: where it leads, or bits of an exit.
type Second<'a> = &'a dyn Fn(u64, Op, Told) -> Result<u64, Exit>;

/// What is told of the linear address.
#[derive(Clone, Copy, Debug)]
pub struct Told {
    pub table_walk: bool,
    /// Bits 11:7 of an exit qualification.
    pub bits: u64,
}

impl Below {
    /// Whether the processor's reads of L2's tables are writes.
    pub fn reads_write(&self) -> bool {
        match self {
            Self::Ept(m) => m.accessed_dirty,
            Self::Npt(_) => true,
        }
    }

    pub fn root(&self) -> u64 {
        match self {
            Self::Ept(m) => m.root,
            Self::Npt(m) => m.cr3,
        }
    }

    /// The reference: where an address of L2 leads, and what is marked on the way.
    pub fn locate(
        &self,
        word: &dyn Fn(u64) -> Option<u64>,
        gpa: u64,
        op: Op,
        told: Told,
    ) -> Result<super::manual::Reached, Exit> {
        match self {
            Self::Ept(m) => {
                let (by, bits) = match op.what {
                    What::Read => (ept::Op::Read, 1),
                    What::Write => (ept::Op::Write, if told.table_walk { 3 } else { 2 }),
                    What::Fetch => (ept::Op::Fetch { user: op.user }, 4),
                };
                ept::walk(m, word, gpa, by).map_err(|failed| match failed {
                    ept::Failed::Misconfiguration => Exit::Misconfiguration,
                    ept::Failed::Violation(rights) => Exit::Violation(bits | rights | told.bits),
                })
            }
            Self::Npt(m) => {
                let who = if op.user { Who::User } else { Who::Supervisor };
                if gpa >> if m.lma { 48 } else { 32 } != 0 {
                    let code = u64::from(op.what == What::Write) << 1 | 4;
                    return Err(npf(told, code));
                }
                walk(m, word, gpa, op.what, who).map_err(|code| npf(told, u64::from(code)))
            }
        }
    }

    /// Who fetches: by linear address under mode-based execute control, by privilege level under guest mode execute trap.
    fn fetches_as_user(&self, user_address: bool, who: Who) -> bool {
        match self {
            Self::Ept(m) if m.mode_based => user_address,
            Self::Ept(_) => true,
            Self::Npt(m) => !m.smep || who == Who::User,
        }
    }

    /// An access of L2, both stages: its own tables are read through `second` from `ram`.
    pub fn both(
        &self,
        ram: &FlatRam,
        l2: &Machine,
        second: Second<'_>,
        va: u64,
        what: What,
        who: Who,
    ) -> End {
        let failed = RefCell::new(None);
        let entries = RefCell::new(vec![]);
        let table = |gpa: u64, what| {
            let told = Told { table_walk: true, bits: 1 << 7 };
            match second(gpa, Op { what, user: true }, told) {
                Ok(at) => Some(at),
                Err(exit) => {
                    failed.replace(Some((gpa, exit)));
                    None
                }
            }
        };
        let kind = if self.reads_write() { What::Write } else { What::Read };
        let word = |gpa: u64| {
            let entry = ram.get(table(gpa, kind)?)?;
            entries.borrow_mut().push(entry);
            Some(entry)
        };
        let reached = walk(l2, &word, va, what, who);
        if let Some((gpa, exit)) = failed.take() {
            return End::ToL1(gpa, exit);
        }
        let reached = match reached {
            Ok(reached) => reached,
            Err(code) => return End::PageFault(code),
        };
        for (gpa, entry) in reached.marks {
            let Some(at) = table(gpa, What::Write) else {
                let (gpa, exit) = failed.take().unwrap();
                return End::ToL1(gpa, exit);
            };
            ram.set(at, entry);
        }
        // Without paging the address is a user's.
        let entries = entries.into_inner();
        let all = |bit: u32| entries.iter().all(|entry| entry >> bit & 1 == 1);
        let (user, writable) = (all(2), all(1));
        let no_execute = l2.nxe && entries.iter().any(|entry| entry >> 63 != 0);
        let bits = 3 << 7 | u64::from(user) << 9 | u64::from(writable) << 10 | u64::from(no_execute) << 11;
        let user = what != What::Fetch || self.fetches_as_user(user, who);
        let op = Op { what, user };
        match second(reached.address, op, Told { table_walk: false, bits }) {
            Ok(at) => End::At(at, reached.address, op),
            Err(exit) => End::ToL1(reached.address, exit),
        }
    }
}

fn npf(told: Told, code: u64) -> Exit {
    Exit::NestedPageFault(code | if told.table_walk { 2 << 32 } else { 1 << 32 })
}

/// The processor's second stage over a root of Umbra's.
#[derive(Clone, Copy)]
pub struct Shadowed<'a, H> {
    pub host: H,
    pub tables: &'a HostTables,
    pub root: u64,
    pub level: u32,
    /// Flags are on in the pointer: they are set.
    pub flags: bool,
    /// Guest mode execute trap, or mode-based execute control, is on.
    pub told_apart: bool,
}

impl<H: Host> Shadowed<'_, H> {
    /// The frame behind an address, if the access is permitted; otherwise whether an entry is malformed.
    pub fn frame(&self, gpa: u64, op: Op) -> Result<u64, bool> {
        if self.level == 4 && gpa >> 48 != 0 {
            return Err(false);
        }
        let (mut table, mut steps) = (self.root, vec![]);
        let [mut read, mut write, mut user] = [true; 3];
        let mut execute = [true; 2];
        for level in (1..=self.level).rev() {
            let index = (gpa >> (12 + 9 * (level - 1)) & 511) as usize;
            let entry = self.tables.peek(table, index).expect("C3: a walk stays in table memory");
            steps.push((table, index));
            // The machine's own reading finds what is absent or malformed; rights are read once more, for U counts here.
            let (page, rights) = match self.host.read(entry, level) {
                Reading::Absent => return Err(false),
                Reading::Malformed => return Err(true),
                Reading::Link(rights) => (false, rights),
                Reading::Page(rights) => (true, rights),
            };
            if self.is_npt() {
                user &= entry >> 2 & 1 == 1;
                write &= entry >> 1 & 1 == 1;
                execute = execute.map(|x| x && entry >> 63 == 0);
            } else {
                read &= rights.read;
                write &= rights.write;
                execute = [0, 1].map(|mode| execute[mode] && rights.execute[mode]);
            }
            if !page {
                table = (entry & 0x000f_ffff_ffff_f000) >> 12;
                continue;
            }
            let fetch_user = usize::from(op.user && self.told_apart);
            let permitted = match op.what {
                What::Read => read && user,
                What::Write => write && user,
                What::Fetch if self.is_npt() && self.told_apart => execute[0] && user == op.user,
                What::Fetch => execute[fetch_user] && user,
            };
            if !permitted {
                return Err(false);
            }
            if self.flags {
                let (accessed, dirty) = self.host.flags();
                let last = steps.len() - 1;
                for (at, &(table, index)) in steps.iter().enumerate() {
                    let dirty = if at == last && op.what == What::Write { dirty } else { 0 };
                    self.tables.mark(table, index, accessed | dirty);
                }
            }
            let pages = 1u64 << (9 * (level - 1));
            return Ok(((entry & 0x000f_ffff_ffff_f000) >> 12) + (gpa >> 12 & (pages - 1)));
        }
        unreachable!("the lowest level has no links")
    }

    fn is_npt(&self) -> bool {
        self.host.flags().0 == 0x20
    }
}

/// Whose translations: L1's or L2's, if they have tags of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tag {
    L1,
    L2,
    Shared,
}

type Combined = (Tag, u64, u64, What, Who);

/// A TLB of one CPU. What it holds of a linear address is combined, of both stages.
#[derive(Default)]
pub struct Tlb {
    /// By tag, EPT root (zero on AMD), page, access.
    combined: HashMap<Combined, (u64, Op)>,
    /// By tag (on AMD), EPT root, page, access.
    guest_physical: HashMap<(Tag, u64, u64, Op), u64>,
}

impl Tlb {
    pub fn combined(&self, tag: Tag, root: u64, page: u64, what: What, who: Who) -> Option<(u64, Op)> {
        self.combined.get(&(tag, root, page, what, who)).copied()
    }

    pub fn guest_physical(&self, tag: Tag, root: u64, page: u64, op: Op) -> Option<u64> {
        self.guest_physical.get(&(tag, root, page, op)).copied()
    }

    pub fn keep(&mut self, tag: Tag, root: u64, page: u64, (what, who): (What, Who), found: (u64, Op)) {
        self.combined.insert((tag, root, page, what, who), found);
    }

    pub fn keep_guest_physical(&mut self, tag: Tag, root: u64, page: u64, op: Op, frame: u64) {
        self.guest_physical.insert((tag, root, page, op), frame);
    }

    /// All of a tag, of every root.
    pub fn flush(&mut self, tag: Tag) {
        self.combined.retain(|key, _| key.0 != tag);
        self.guest_physical.retain(|key, _| key.0 != tag);
    }

    /// The linear translations of one page.
    pub fn flush_page(&mut self, tag: Tag, page: u64) {
        self.combined.retain(|key, _| key.0 != tag || key.2 != page);
    }

    /// An exit by a violation drops what it concerns.
    pub fn violated(&mut self, tag: Tag, root: u64, page: u64, linear: u64) {
        self.guest_physical.retain(|key, _| (key.0, key.1, key.2) != (tag, root, page));
        self.combined.retain(|key, _| (key.0, key.1, key.2) != (tag, root, linear));
    }

    pub fn len(&self) -> usize {
        self.combined.len() + self.guest_physical.len()
    }
}
