//! One walk through a guest's tables: reads and checks entries, changes nothing.
use super::context::{PagingContext, Translation, WalkRegs};
use super::fault::{Cause, Fault, WalkError};
use super::source::TableSource;
use crate::access::{Access, AccessKind, Prot};
use crate::addr::{Address, MAX_PHYSICAL_BITS, PAGE_SHIFT};
use crate::level::Level;
use crate::role::{PagingMode, RoleFlags};

/// P: present.
const PRESENT: u64 = 1 << 0;
/// R/W: writable.
const WRITE: u64 = 1 << 1;
/// U/S: user.
const USER: u64 = 1 << 2;
/// A: accessed.
const ACCESSED: u64 = 1 << 5;
/// D: dirty.
const DIRTY: u64 = 1 << 6;
/// PS: page size.
const LARGE: u64 = 1 << 7;
/// NX: no execute.
const NO_EXECUTE: u64 = 1 << 63;
/// Frame number field of an 8-byte entry.
const FRAME: u64 = ((1 << MAX_PHYSICAL_BITS) - 1) & !((1 << PAGE_SHIFT) - 1);
/// Lowest bit of the protection key in a leaf.
const KEY_SHIFT: u32 = 59;

/// Frame number field of a 4-byte entry, and of CR3 with those.
const FRAME32: u64 = 0xffff_f000;
/// Address of the four PDPTEs in CR3.
const PDPTES: u64 = 0xffff_ffe0;

/// A walk: what it is for, where it is, and what it has seen.
pub(super) struct Walker<'w, In, Out, S, V> {
    context: &'w PagingContext<In, Out>,
    tables: &'w S,
    regs: &'w WalkRegs,
    address: In,
    access: Access,
    /// Called with address and value of each entry that has an accessed bit, from the top.
    visit: V,
    table: u64,
    /// AND of the entries: what all levels permit, and whether all were accessed.
    all: u64,
    /// OR of the entries: whether any level forbids fetches.
    any: u64,
    /// The walk succeeded, and a bit that the access sets is not set yet.
    pub(super) unmarked: bool,
}

/// `entry` after it was used.
pub(super) const fn marked(entry: u64, written: bool) -> u64 {
    entry | ACCESSED | if written { DIRTY } else { 0 }
}

impl<'w, In, Out, S, V> Walker<'w, In, Out, S, V>
where
    In: Address,
    Out: Address,
    S: TableSource<Out>,
    V: FnMut(u64, u64),
{
    #[inline(always)]
    pub(super) fn new(
        context: &'w PagingContext<In, Out>,
        tables: &'w S,
        regs: &'w WalkRegs,
        address: In,
        access: Access,
        visit: V,
    ) -> Self {
        let table = regs.cr3 & FRAME;
        let (all, any, unmarked) = (u64::MAX, 0, false);
        Self { context, tables, regs, address, access, visit, table, all, any, unmarked }
    }

    /// A walk in whatever mode the context is for.
    pub(super) fn any_mode(&mut self) -> Result<Translation<Out>, WalkError> {
        match self.context.role().mode() {
            PagingMode::FiveLevel => {
                self.table = self.entry(Level::L5)? & FRAME;
                self.four_levels()
            }
            PagingMode::FourLevel => self.four_levels(),
            PagingMode::Pae => {
                self.cut_address();
                self.table = self.pdpte()? & FRAME;
                self.two_levels()
            }
            PagingMode::TwoLevel => {
                self.cut_address();
                self.short_entries()
            }
            PagingMode::Unpaged => {
                self.cut_address();
                let address = Out::from_bits_truncate(self.address.bits());
                Ok(Translation { address, page_bytes: 1 << 32, prot: Prot::all() })
            }
        }
    }

    /// 8-byte entries, from level 4 on.
    #[inline(always)]
    pub(super) fn four_levels(&mut self) -> Result<Translation<Out>, WalkError> {
        self.table = self.entry(Level::L4)? & FRAME;
        let entry = self.entry(Level::L3)?;
        if entry & LARGE != 0 {
            return self.finish(Level::L3, entry);
        }
        self.table = entry & FRAME;
        self.two_levels()
    }

    /// 8-byte entries, from level 2 on.
    #[inline(always)]
    fn two_levels(&mut self) -> Result<Translation<Out>, WalkError> {
        let entry = self.entry(Level::L2)?;
        if entry & LARGE != 0 {
            return self.finish(Level::L2, entry);
        }
        self.table = entry & FRAME;
        let entry = self.entry(Level::L1)?;
        self.finish(Level::L1, entry)
    }

    /// Reads and checks the 8-byte entry in the walk's table, which is at `level`.
    #[inline(always)]
    fn entry(&mut self, level: Level) -> Result<u64, WalkError> {
        let at = self.table | (level.index(self.address.bits() >> PAGE_SHIFT) as u64) << 3;
        let entry = match self.tables.read_u64(Out::from_bits_truncate(at)) {
            Ok(entry) => entry,
            Err(error) => return Err(error.into_walk(self.fault(level))),
        };
        // Not present and reserved are one test: the masks have bit 0 set. Only at levels 2 and 3 does bit 7 decide what
        // else is reserved.
        let [link, leaf] = self.context.wrong[level.ordinal()];
        let large = matches!(level, Level::L2 | Level::L3) && entry & LARGE != 0;
        let wrong = if large { leaf } else { link };
        if (entry ^ PRESENT) & wrong != 0 {
            return Err(self.bad_entry(level, entry));
        }
        self.meet(entry);
        (self.visit)(at, entry);
        Ok(entry)
    }

    /// The end of a walk of 8-byte entries: `entry` is the leaf.
    #[inline(always)]
    fn finish(&mut self, level: Level, entry: u64) -> Result<Translation<Out>, WalkError> {
        let key = (entry >> KEY_SHIFT & 15) as u32;
        let page_bytes = 1 << level.shift();
        self.reach(level, entry, key, entry & FRAME & !(page_bytes - 1), page_bytes)
    }

    /// The leaf `entry` maps the page at `start`: may it be accessed, and where does the address lead?
    #[inline(always)]
    fn reach(
        &mut self,
        level: Level,
        entry: u64,
        key: u32,
        start: u64,
        page_bytes: u64,
    ) -> Result<Translation<Out>, WalkError> {
        let prot = self.prot();
        self.context.check(self.regs, self.address, self.access, level, (prot, key))?;
        let address = Out::from_bits_truncate(start | self.address.bits() & (page_bytes - 1));
        let clean = self.access.kind == AccessKind::Write && entry & DIRTY == 0;
        self.unmarked = clean || self.all & ACCESSED == 0;
        Ok(Translation { address, page_bytes, prot })
    }

    /// PAE's first step: a PDPTE, which restricts nothing and has no accessed bit.
    fn pdpte(&self) -> Result<u64, WalkError> {
        let index = (self.address.bits() >> Level::L3.shift()) & 3;
        let pdpte = match self.regs.pdptes {
            Some(pdptes) => pdptes[index as usize],
            None => {
                let at = Out::from_bits_truncate((self.regs.cr3 & PDPTES) + index * 8);
                self.tables.read_u64(at).map_err(|error| error.into_walk(self.fault(Level::L3)))?
            }
        };
        if (pdpte ^ PRESENT) & self.context.wrong[Level::L3.ordinal()][0] != 0 {
            let cause = if pdpte & PRESENT == 0 { Cause::NotPresent } else { Cause::Reserved };
            return Err(WalkError::Fault(Fault { cause, ..self.fault(Level::L3) }));
        }
        Ok(pdpte)
    }

    /// Two levels of 4-byte entries.
    fn short_entries(&mut self) -> Result<Translation<Out>, WalkError> {
        self.table &= FRAME32;
        let entry = self.short_entry(Level::L2, 22)?;
        if entry & LARGE != 0 && self.context.role().flags().contains(RoleFlags::PSE) {
            // PSE-36: bits 20:13 are address bits 39:32. Without it they are reserved, so here they are zero.
            let start = entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
            return self.reach(Level::L2, entry, 0, start, 1 << 22);
        }
        self.table = entry & FRAME32;
        let entry = self.short_entry(Level::L1, 12)?;
        self.reach(Level::L1, entry, 0, entry & FRAME32, 1 << 12)
    }

    /// Reads and checks the 4-byte entry in the walk's table, whose index starts at address bit `shift`.
    fn short_entry(&mut self, level: Level, shift: u32) -> Result<u64, WalkError> {
        let at = self.table | ((self.address.bits() >> shift) & 0x3ff) << 2;
        let entry = self.tables.read_u32(Out::from_bits_truncate(at));
        let entry = u64::from(entry.map_err(|error| error.into_walk(self.fault(level)))?);
        let wrong = self.context.wrong[level.ordinal()][usize::from(entry & LARGE != 0)];
        if (entry ^ PRESENT) & wrong != 0 {
            return Err(self.bad_entry(level, entry));
        }
        self.meet(entry);
        (self.visit)(at, entry);
        Ok(entry)
    }

    /// Outside long mode addresses have 32 bits.
    fn cut_address(&mut self) {
        self.address = In::from_bits_truncate(self.address.bits() & u64::from(u32::MAX));
    }

    #[inline(always)]
    fn meet(&mut self, entry: u64) {
        self.all &= entry;
        self.any |= entry;
    }

    /// What the entries so far permit.
    #[inline(always)]
    fn prot(&self) -> Prot {
        let data = (self.all & (WRITE | USER)) >> 1;
        let execute = (!self.any & NO_EXECUTE) >> 61;
        Prot::from_bits_truncate((data | execute) as u8)
    }

    /// The error for an entry that is not present or has a reserved bit set.
    #[inline(always)]
    fn bad_entry(&mut self, level: Level, entry: u64) -> WalkError {
        if entry & PRESENT == 0 {
            return WalkError::Fault(self.fault(level));
        }
        self.meet(entry);
        WalkError::Fault(Fault { cause: Cause::Reserved, ..self.fault(level) })
    }

    /// A fault at `level`, of an entry that is not present unless the caller knows better.
    #[inline(always)]
    fn fault(&self, level: Level) -> Fault {
        self.context.fault_at(self.address, self.access, level, self.prot())
    }
}

const _: () = assert!(
    Prot::WRITE.bits() as u64 == WRITE >> 1
        && Prot::USER.bits() as u64 == USER >> 1
        && Prot::EXECUTE.bits() as u64 == NO_EXECUTE >> 61
);
