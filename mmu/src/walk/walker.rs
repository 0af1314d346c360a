//! One walk through a guest's tables: reads and checks entries, changes nothing.
use core::marker::PhantomData;

use super::context::{PagingContext, Translation, WalkRegs};
use super::fault::{Cause, FaultInfo, WalkError};
use super::source::{BelowError, TableSource};
use crate::access::{Access, AccessKind, Prot};
use crate::addr::{Address, Stage, MAX_PHYSICAL_BITS, PAGE_SHIFT};
use crate::level::Level;
use crate::mutant::{self, Mutant};
use crate::role::{CpuRole, PagingMode, RoleFlags};

/// P: present.
pub(super) const PRESENT: u64 = 1 << 0;
/// R/W: writable.
pub(super) const WRITE: u64 = 1 << 1;
/// U/S: user.
const USER: u64 = 1 << 2;
/// A: accessed.
pub(super) const ACCESSED: u64 = 1 << 5;
/// D: dirty.
pub(super) const DIRTY: u64 = 1 << 6;
/// PS: page size, of EPT as well.
pub(super) const LARGE: u64 = 1 << 7;
/// G: global.
pub(super) const GLOBAL: u64 = 1 << 8;
/// NX: no execute.
pub(super) const NO_EXECUTE: u64 = 1 << 63;
/// Frame number field of an 8-byte entry.
pub(super) const FRAME: u64 = ((1 << MAX_PHYSICAL_BITS) - 1) & !((1 << PAGE_SHIFT) - 1);
/// Lowest bit of the protection key in a leaf.
pub(super) const KEY_SHIFT: u32 = 59;

/// EPT: data reads.
const EPT_READ: u64 = 1 << 0;
/// EPT: data writes.
const EPT_WRITE: u64 = 1 << 1;
/// EPT: fetches.
const EPT_EXECUTE: u64 = 1 << 2;
/// EPT: lowest bit of a leaf's memory type.
const EPT_TYPE_SHIFT: u32 = 3;
/// EPT: accessed.
pub(super) const EPT_ACCESSED: u64 = 1 << 8;
/// EPT: dirty.
pub(super) const EPT_DIRTY: u64 = 1 << 9;
/// EPT: fetches through user-mode addresses, with mode-based execute control.
const EPT_EXECUTE_USER: u64 = 1 << 10;

/// Frame number field of a 4-byte entry, and of CR3 with those.
const FRAME32: u64 = 0xffff_f000;
/// Address of the four PDPTEs in CR3.
const PDPTES: u64 = 0xffff_ffe0;

/// Where the four PDPTEs are.
pub(super) fn pdpte_addresses(cr3: u64) -> impl Iterator<Item = u64> {
    (0..4).map(move |index| (cr3 & PDPTES) + index * 8)
}

/// How much a walk says of its failure.
pub(super) trait Detail {
    /// What it says.
    type Error;
    /// The error that `full` is all of.
    fn error(full: impl FnOnce() -> WalkError) -> Self::Error;
}

/// Says nothing: the walk only finds out whether all is as usual, and is repeated if not. So the hot path holds no fault, and
/// stays in registers.
pub(super) struct Quick;

/// Says everything.
pub(super) struct Full;

impl Detail for Quick {
    type Error = ();
    #[inline(always)]
    fn error(_: impl FnOnce() -> WalkError) {}
}

impl Detail for Full {
    type Error = WalkError;
    #[inline(always)]
    fn error(full: impl FnOnce() -> WalkError) -> WalkError {
        full()
    }
}

/// A walk: what it is for, where it is, and what it has seen.
pub(super) struct Walker<'w, D, In, Out, S, V> {
    context: &'w PagingContext<In, Out>,
    tables: &'w S,
    regs: &'w WalkRegs,
    address: In,
    access: Access,
    /// Called with address and value of each entry that has an accessed bit, from the top.
    visit: V,
    table: u64,
    /// AND of the entries, in the positive form of [`PagingContext::flip`]: what all levels permit, and whether all were
    /// accessed.
    all: u64,
    /// The walk succeeded, and a bit that the access sets is not set yet.
    pub(super) unmarked: bool,
    /// Level of the leaf, once it has succeeded.
    pub(super) leaf: Level,
    /// PAE: the PDPTE.
    pub(super) pdpte: Option<u64>,
    detail: PhantomData<D>,
}

impl<'w, D, In, Out, S, V> Walker<'w, D, In, Out, S, V>
where
    D: Detail,
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
        let (all, unmarked, leaf) = (u64::MAX, false, Level::L1);
        Self {
            context,
            tables,
            regs,
            address,
            access,
            visit,
            table,
            all,
            unmarked,
            leaf,
            pdpte: None,
            detail: PhantomData,
        }
    }

    /// A walk in whatever mode the context is for.
    pub(super) fn any_mode(&mut self) -> Result<Translation<Out>, D::Error> {
        match self.context.role().mode() {
            PagingMode::FiveLevel => {
                let (at, entry) = self.read(Level::L5)?;
                if self.is_unusual(Level::L5, entry) {
                    return Err(self.bad_entry(Level::L5, entry));
                }
                self.descend(at, entry);
                self.lower_four_levels()
            }
            PagingMode::FourLevel => self.four_levels(),
            PagingMode::Pae => {
                self.fit(32, Level::L3)?;
                let pdpte = self.pdpte()?;
                self.pdpte = Some(pdpte);
                self.table = pdpte & FRAME;
                self.two_levels()
            }
            PagingMode::TwoLevel => {
                self.fit(32, Level::L2)?;
                self.short_entries()
            }
            PagingMode::Unpaged => {
                self.fit(32, Level::L1)?;
                let address = Out::from_bits_truncate(self.address.bits());
                Ok(Translation { address, page_bytes: 1 << 32, prot: Prot::UNPAGED })
            }
            PagingMode::EptFourLevel => {
                self.fit(48, Level::L4)?;
                self.ept_levels(Level::L4)
            }
            PagingMode::EptFiveLevel => self.ept_levels(Level::L5),
        }
    }

    /// A walk of four levels of 8-byte entries.
    #[inline(always)]
    pub(super) fn four_levels(&mut self) -> Result<Translation<Out>, D::Error> {
        if In::STAGE != Stage::Gva {
            self.fit(48, Level::L4)?;
        }
        self.lower_four_levels()
    }

    /// 8-byte entries, from level 4 on.
    #[inline(always)]
    fn lower_four_levels(&mut self) -> Result<Translation<Out>, D::Error> {
        let (at, entry) = self.read(Level::L4)?;
        if self.is_unusual(Level::L4, entry) {
            return Err(self.bad_entry(Level::L4, entry));
        }
        self.descend(at, entry);
        let (at, entry) = self.read(Level::L3)?;
        if self.is_unusual(Level::L3, entry) {
            return self.large_page(Level::L3, at, entry);
        }
        self.descend(at, entry);
        self.two_levels()
    }

    /// 8-byte entries, from level 2 on.
    #[inline(always)]
    fn two_levels(&mut self) -> Result<Translation<Out>, D::Error> {
        let (at, entry) = self.read(Level::L2)?;
        if self.is_unusual(Level::L2, entry) {
            return self.large_page(Level::L2, at, entry);
        }
        self.descend(at, entry);
        let (at, entry) = self.read(Level::L1)?;
        if self.is_unusual(Level::L1, entry) {
            return Err(self.bad_entry(Level::L1, entry));
        }
        self.finish(Level::L1, at, entry)
    }

    /// Reads the 8-byte entry in the walk's table, which is at `level`: where it is, and its positive form.
    #[inline(always)]
    fn read(&self, level: Level) -> Result<(u64, u64), D::Error> {
        let at = self.table | (level.index(self.address.bits() >> PAGE_SHIFT) as u64) << 3;
        match self.tables.read_u64(Out::from_bits_truncate(at)) {
            Ok(entry) => Ok((at, entry ^ self.context.flip)),
            Err(error) => Err(self.unreachable_entry(level, error)),
        }
    }

    /// Whether the entry is no link, or at the lowest level no page: in positive form one test finds what is not present,
    /// reserved, or a large page.
    #[inline(always)]
    fn is_unusual(&self, level: Level, entry: u64) -> bool {
        let no_execute = NO_EXECUTE & self.context.flip;
        entry & self.context.wrong[level.ordinal()][0] != 0
            || mutant::is(Mutant::NxAlwaysReserved) && no_execute & !entry != 0
    }

    /// `entry` is a link: on to its table.
    #[inline(always)]
    fn descend(&mut self, at: u64, entry: u64) {
        self.pass(at, entry);
        self.table = entry & FRAME;
    }

    #[inline(always)]
    fn pass(&mut self, at: u64, entry: u64) {
        self.all = if mutant::is(Mutant::LeafRightsOnly) { entry } else { self.all & entry };
        (self.visit)(at, entry ^ self.context.flip);
    }

    /// `entry` is a large page, or wrong.
    #[inline(always)]
    fn large_page(&mut self, level: Level, at: u64, entry: u64) -> Result<Translation<Out>, D::Error> {
        let unchecked = mutant::is(Mutant::LargeReservedBits);
        if entry & LARGE == 0 || entry & self.context.wrong[level.ordinal()][1] != 0 && !unchecked {
            return Err(self.bad_entry(level, entry));
        }
        self.finish(level, at, entry)
    }

    /// The end of a walk of 8-byte entries: `entry` is the leaf.
    #[inline(always)]
    fn finish(&mut self, level: Level, at: u64, entry: u64) -> Result<Translation<Out>, D::Error> {
        self.pass(at, entry);
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
    ) -> Result<Translation<Out>, D::Error> {
        let prot = self.context.prot(self.all);
        self.check(level, prot, key)?;
        let address = Out::from_bits_truncate(start | self.address.bits() & (page_bytes - 1));
        let clean = self.access.kind == AccessKind::Write && entry & DIRTY == 0;
        self.unmarked = clean || self.all & ACCESSED == 0;
        self.leaf = level;
        Ok(Translation { address, page_bytes, prot })
    }

    /// Whether the leaf at `level` permits the access.
    #[inline(always)]
    fn check(&self, level: Level, prot: Prot, key: u32) -> Result<(), D::Error> {
        let (context, access) = (self.context, self.access);
        let key_denied = context.key_denies(self.regs, access, prot, key);
        if !key_denied && !context.forbids(self.regs, access, prot) {
            return Ok(());
        }
        Err(D::error(|| {
            let fault = context.fault_at(self.address, access, level, prot);
            WalkError::Fault(FaultInfo { cause: Cause::Protection, key_denied, ..fault })
        }))
    }

    /// Extended page tables, from level `top` on.
    fn ept_levels(&mut self, top: Level) -> Result<Translation<Out>, D::Error> {
        let mut level = top;
        loop {
            let at = self.table | (level.index(self.address.bits() >> PAGE_SHIFT) as u64) << 3;
            let entry = match self.tables.read_u64(Out::from_bits_truncate(at)) {
                Ok(entry) => entry,
                Err(error) => return Err(self.unreachable_entry(level, error)),
            };
            self.all &= entry;
            if entry & self.ept_rights() == 0 {
                return Err(D::error(|| WalkError::Fault(self.fault(level))));
            }
            let below = level.down();
            let large = matches!(level, Level::L2 | Level::L3) && entry & LARGE != 0;
            if self.misconfigured(level, entry, large) {
                return Err(D::error(|| {
                    WalkError::Fault(FaultInfo { cause: Cause::Reserved, ..self.fault(level) })
                }));
            }
            (self.visit)(at, entry);
            match below {
                Some(below) if !large => {
                    self.table = entry & FRAME;
                    level = below;
                }
                _ => return self.reach_by_ept(level, entry),
            }
        }
    }

    /// Bits that make an entry of EPT present.
    fn ept_rights(&self) -> u64 {
        let rights = EPT_READ | EPT_WRITE | EPT_EXECUTE;
        if self.context.role().flags().contains(RoleFlags::MODE_BASED_EXECUTE) {
            rights | EPT_EXECUTE_USER
        } else {
            rights
        }
    }

    /// Whether the entry of EPT is misconfigured (Intel SDM vol. 3, 29.3.3.1).
    fn misconfigured(&self, level: Level, entry: u64, large: bool) -> bool {
        let leaf = large || level == Level::L1;
        let as_large = large && !mutant::is(Mutant::EptLargeReservedBits);
        let reserved = entry & self.context.wrong[level.ordinal()][usize::from(as_large)] != 0;
        let hides_reads = entry & EPT_READ == 0
            && (entry & EPT_WRITE != 0 && !mutant::is(Mutant::EptWriteOnly)
                || !self.context.role().flags().contains(RoleFlags::EXECUTE_ONLY));
        let checked = !mutant::is(Mutant::EptTypeUnchecked);
        let unknown_type = checked && leaf && matches!(entry >> EPT_TYPE_SHIFT & 7, 2 | 3 | 7);
        reserved || hides_reads || unknown_type
    }

    /// The end of a walk of EPT: `entry` is the leaf.
    fn reach_by_ept(&mut self, level: Level, entry: u64) -> Result<Translation<Out>, D::Error> {
        let prot = self.context.prot_by_ept(self.all);
        self.check(level, prot, 0)?;
        let page_bytes = 1 << level.shift();
        let inside = page_bytes - 1;
        let address = Out::from_bits_truncate(entry & FRAME & !inside | self.address.bits() & inside);
        let clean = self.access.kind == AccessKind::Write && entry & EPT_DIRTY == 0;
        let keeps = self.context.role().keeps_accessed_dirty() || mutant::is(Mutant::EptIgnoresFlagsOff);
        self.unmarked = keeps && (clean || self.all & EPT_ACCESSED == 0);
        self.leaf = level;
        Ok(Translation { address, page_bytes, prot })
    }

    /// PAE's first step: a PDPTE, which restricts nothing and has no accessed bit.
    fn pdpte(&self) -> Result<u64, D::Error> {
        let index = (self.address.bits() >> Level::L3.shift()) & 3;
        let pdpte = match self.regs.pdptes {
            Some(pdptes) => pdptes[index as usize],
            None => {
                let at = Out::from_bits_truncate((self.regs.cr3 & PDPTES) + index * 8);
                self.tables.read_u64(at).map_err(|error| self.unreachable_entry(Level::L3, error))?
            }
        };
        if self.context.pdpte_is_wrong(pdpte) {
            let cause = if pdpte & PRESENT == 0 { Cause::NotPresent } else { Cause::Reserved };
            return Err(D::error(|| WalkError::Fault(FaultInfo { cause, ..self.fault(Level::L3) })));
        }
        Ok(pdpte)
    }

    /// Two levels of 4-byte entries.
    fn short_entries(&mut self) -> Result<Translation<Out>, D::Error> {
        self.table &= FRAME32;
        let entry = self.short_entry(Level::L2, 22)?;
        if entry & LARGE != 0 && self.context.role().flags().contains(RoleFlags::PSE) {
            // PSE-36: bits 20:13 are address bits 39:32. Without it they are reserved, so here they are zero.
            let high = if mutant::is(Mutant::Pse36Ignored) { 0 } else { entry >> 13 & 0xff };
            let start = entry & 0xffc0_0000 | high << 32;
            return self.reach(Level::L2, entry, 0, start, 1 << 22);
        }
        self.table = entry & FRAME32;
        let entry = self.short_entry(Level::L1, 12)?;
        self.reach(Level::L1, entry, 0, entry & FRAME32, 1 << 12)
    }

    /// Reads and checks the 4-byte entry in the walk's table, whose index starts at address bit `shift`; in positive form.
    fn short_entry(&mut self, level: Level, shift: u32) -> Result<u64, D::Error> {
        let at = self.table | ((self.address.bits() >> shift) & 0x3ff) << 2;
        let entry = self.tables.read_u32(Out::from_bits_truncate(at));
        let entry = u64::from(entry.map_err(|error| self.unreachable_entry(level, error))?);
        let positive = entry ^ self.context.flip;
        if positive & self.context.wrong[level.ordinal()][usize::from(entry & LARGE != 0)] != 0 {
            return Err(self.bad_entry(level, positive));
        }
        self.all &= positive;
        (self.visit)(at, entry);
        Ok(positive)
    }

    /// Linear addresses have `width` bits here; a second stage that is asked for more has no entry for them, in its table at
    /// level `top`.
    #[inline(always)]
    fn fit(&mut self, width: u32, top: Level) -> Result<(), D::Error> {
        let address = self.address.bits();
        if address >> width == 0 {
            return Ok(());
        }
        if In::STAGE == Stage::Gva || mutant::is(Mutant::WideNestedAddress) {
            self.address = In::from_bits_truncate(address & ((1 << width) - 1));
            return Ok(());
        }
        self.all = 0;
        Err(D::error(|| WalkError::Fault(self.fault(top))))
    }

    /// The error for an entry, in positive form, that is not present or has a reserved bit set.
    #[inline(always)]
    fn bad_entry(&self, level: Level, entry: u64) -> D::Error {
        D::error(|| self.context.bad_entry(self.address, self.access, level, self.all, entry))
    }

    /// The error for an entry that cannot be read.
    #[inline(always)]
    fn unreachable_entry(&self, level: Level, error: BelowError) -> D::Error {
        D::error(|| error.into_walk(self.fault(level)))
    }

    /// A fault at `level`, of an entry that is not present unless the caller knows better.
    fn fault(&self, level: Level) -> FaultInfo {
        self.context.fault_after(self.address, self.access, level, self.all)
    }
}

/// What entries permit, given the AND of their positive forms and what is permitted whatever they say.
#[inline(always)]
pub(super) fn prot(all: u64, implied: Prot) -> Prot {
    let rights = all & (WRITE | USER | NO_EXECUTE);
    Prot::from_bits_retain(rights.rotate_left(2) as u8 | implied.bits())
}

/// What entries of EPT permit, given their AND.
pub(super) fn prot_by_ept(role: &CpuRole, all: u64) -> Prot {
    let read = all & EPT_READ | u64::from(mutant::is(Mutant::FetchableIsReadable) && all & EPT_EXECUTE != 0);
    let write = (all & EPT_WRITE) << 2;
    let execute = (all & EPT_EXECUTE) >> 1;
    let mode_based = role.flags().contains(RoleFlags::MODE_BASED_EXECUTE);
    let by_user = if mode_based { (all & EPT_EXECUTE_USER) >> 8 } else { 0 };
    Prot::from_bits_truncate((read | write | execute | by_user) as u8)
}

impl<In: Address, Out: Address> PagingContext<In, Out> {
    /// What entries permit, given the AND of their positive forms.
    #[inline(always)]
    pub(super) fn prot(&self, all: u64) -> Prot {
        prot(all, self.implied)
    }

    /// What entries of EPT permit, given their AND.
    pub(super) fn prot_by_ept(&self, all: u64) -> Prot {
        prot_by_ept(&self.role(), all)
    }

    #[cold]
    #[inline(never)]
    fn bad_entry(&self, address: In, access: Access, level: Level, all: u64, entry: u64) -> WalkError {
        if entry & PRESENT != 0 {
            return WalkError::Fault(self.fault_after(address, access, level, all));
        }
        let fault = self.fault_after(address, access, level, all & entry);
        WalkError::Fault(FaultInfo { cause: Cause::Reserved, ..fault })
    }

    /// A fault after entries with this AND.
    #[cold]
    #[inline(never)]
    fn fault_after(&self, address: In, access: Access, level: Level, all: u64) -> FaultInfo {
        let found = if self.role().is_ept() { self.prot_by_ept(all) } else { self.prot(all) };
        self.fault_at(address, access, level, found)
    }
}

const _: () = assert!(
    Prot::WRITE.bits() as u64 == WRITE << 2
        && Prot::USER.bits() as u64 == USER << 2
        && Prot::EXECUTE.bits() as u64 == NO_EXECUTE.rotate_left(2)
        && Prot::READ.bits() as u64 == EPT_READ
        && Prot::WRITE.bits() as u64 == EPT_WRITE << 2
        && Prot::EXECUTE.bits() as u64 == EPT_EXECUTE >> 1
        && Prot::EXECUTE_USER.bits() as u64 == EPT_EXECUTE_USER >> 8
);
