//! The paging context: how a guest's page tables are read, as follows from its registers.
use core::marker::PhantomData;

use super::fault::{Cause, Fault, Place, WalkError};
use super::permission::{forbids, index, permissions, Permissions};
use super::reserved::{reserved, Reserved};
use super::source::TableSource;
use crate::access::{Access, AccessKind, Agent, Prot};
use crate::addr::{Address, MAX_PHYSICAL_BITS, PAGE_SHIFT};
use crate::level::Level;
use crate::role::{CpuRole, PagingMode, RoleFlags};

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

/// Times a walk starts again because the guest changed an entry under it.
const MAX_RESTARTS: usize = 8;

/// How page tables that translate `In` to `Out` are read: the sketch's `kvm_paging_context`.
///
/// Immutable: a change of CR0, CR4, EFER or of the guest's CPUID is another context. CR3, PKRU and RFLAGS.AC change
/// without an exit under nested paging, so they are arguments of a walk, as is the access.
///
/// The sketch's `root_walk` and `walk01` are both `PagingContext<Gva, Gpa>`: they never differ. `walk12` is
/// `PagingContext<Gva, NGpa>`, and `tdp12_walk`, for L1's nested tables, `PagingContext<NGpa, Gpa>`.
#[derive(Clone, Debug)]
pub struct PagingContext<In, Out> {
    role: CpuRole,
    permissions: &'static Permissions,
    /// Reserved bits, and bit 0 for entries that are not present.
    wrong: Reserved,
    stages: PhantomData<fn(In) -> Out>,
}

/// Registers that a walk reads as they are at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WalkRegs {
    /// CR3, or NCR3.
    pub cr3: u64,
    /// PKRU.
    pub pkru: u32,
    /// RFLAGS.AC.
    pub ac: bool,
    /// PAE: the PDPTE registers, where the CPU has them (VMX). Under nested paging it has none, and each walk reads the
    /// PDPTE from memory (AMD APM vol. 2, 15.25.10).
    pub pdptes: Option<[u64; 4]>,
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation<Out> {
    /// The address.
    pub address: Out,
    /// Bytes in the page it lies in: 4 KiB to 1 GiB; without paging all of the 32-bit address space.
    pub page_bytes: u64,
    /// What the translation permits.
    pub prot: Prot,
}

/// A walk: where it is, and what it has seen.
struct Walk {
    table: u64,
    /// AND of the entries: what all levels permit, and whether all were accessed.
    all: u64,
    /// OR of the entries: whether any level forbids fetches.
    any: u64,
}

impl<In: Address, Out: Address> PagingContext<In, Out> {
    /// The context of a role.
    pub const fn new(role: CpuRole) -> Self {
        Self { role, permissions: permissions(role.flags()), wrong: reserved(&role), stages: PhantomData }
    }

    /// The role the context was made for: while it stays the same, so does the context.
    #[inline]
    pub const fn role(&self) -> CpuRole {
        self.role
    }

    /// Translates `address` for `access`, and sets accessed and dirty bits as the processor does: only when the access
    /// is permitted, by compare-exchange, starting again when the guest was faster.
    ///
    /// Canonical form is the caller's matter (a violation is #GP or #SS, not #PF); in long mode bits above the width are
    /// ignored, in the other modes bits 63:32.
    #[inline]
    pub fn translate<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
    ) -> Result<Translation<Out>, WalkError> {
        let mut unmarked = false;
        let translation = self.walk(tables, regs, address, access, &mut |_, _| {}, &mut unmarked);
        if unmarked {
            self.translate_and_mark(tables, regs, address, access)
        } else {
            translation
        }
    }

    /// Repeats the walk, this time setting accessed and dirty bits.
    #[cold]
    fn translate_and_mark<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
    ) -> Result<Translation<Out>, WalkError> {
        for _ in 0..MAX_RESTARTS {
            let mut trail = Trail::default();
            let mut visit = |at, entry| trail.push(at, entry);
            let translation = self.walk(tables, regs, address, access, &mut visit, &mut false)?;
            if self.mark(tables, &trail, address, access)? {
                return Ok(translation);
            }
        }
        Err(WalkError::Contended)
    }

    /// Sets the bits in the entries of `trail`, from the top; `false` if one has changed since.
    fn mark<S: TableSource<Out>>(
        &self,
        tables: &S,
        trail: &Trail,
        address: In,
        access: Access,
    ) -> Result<bool, WalkError> {
        let steps = trail.steps();
        for (position, &(at, entry)) in steps.iter().enumerate() {
            let leaf = position + 1 == steps.len();
            let dirty = if leaf && access.kind == AccessKind::Write { DIRTY } else { 0 };
            let marked = entry | ACCESSED | dirty;
            if marked == entry {
                continue;
            }
            let at = Out::from_bits_truncate(at);
            let done = match self.role.mode() {
                PagingMode::TwoLevel => tables.update_u32(at, entry as u32, marked as u32),
                _ => tables.update_u64(at, entry, marked),
            };
            let level = Level::ALL[(steps.len() - 1 - position) % Level::ALL.len()];
            let done = done.map_err(|error| {
                error.into_walk(address, access, level, Prot::all(), self.role.reports_fetches())
            })?;
            if !done {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Walks without changing anything. Calls `visit` with address and value of each entry that has an accessed bit, from
    /// the top. Sets `unmarked` if the walk succeeds and one of the bits that the access sets is not set yet.
    ///
    /// Four levels are inlined where the walk is made; the other modes are rare and far away.
    #[inline(always)]
    fn walk<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
        visit: &mut impl FnMut(u64, u64),
        unmarked: &mut bool,
    ) -> Result<Translation<Out>, WalkError> {
        if self.role.mode() == PagingMode::FourLevel {
            self.walk_long(Walk::from(regs.cr3 & FRAME), tables, regs, address, access, visit, unmarked)
        } else {
            self.walk_rare(tables, regs, address, access, visit, unmarked)
        }
    }

    #[inline(never)]
    fn walk_rare<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
        visit: &mut impl FnMut(u64, u64),
        unmarked: &mut bool,
    ) -> Result<Translation<Out>, WalkError> {
        let short = In::from_bits_truncate(address.bits() & u64::from(u32::MAX));
        match self.role.mode() {
            PagingMode::FiveLevel => {
                let mut walk = Walk::from(regs.cr3 & FRAME);
                let entry = self.entry(&mut walk, Level::L5, tables, address, access, visit)?;
                walk.table = entry & FRAME;
                self.walk_long(walk, tables, regs, address, access, visit, unmarked)
            }
            PagingMode::FourLevel => {
                self.walk_long(Walk::from(regs.cr3 & FRAME), tables, regs, address, access, visit, unmarked)
            }
            PagingMode::Pae => {
                let walk = self.pae_directory(tables, regs, short, access)?;
                self.walk_directory(walk, tables, regs, short, access, visit, unmarked)
            }
            PagingMode::TwoLevel => self.walk_short(tables, regs, short, access, visit, unmarked),
            PagingMode::Unpaged => {
                let address = Out::from_bits_truncate(short.bits());
                Ok(Translation { address, page_bytes: 1 << 32, prot: Prot::all() })
            }
        }
    }

    /// 8-byte entries, from level 4 on.
    #[inline(always)]
    fn walk_long<S: TableSource<Out>>(
        &self,
        mut walk: Walk,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
        visit: &mut impl FnMut(u64, u64),
        unmarked: &mut bool,
    ) -> Result<Translation<Out>, WalkError> {
        let entry = self.entry(&mut walk, Level::L4, tables, address, access, visit)?;
        walk.table = entry & FRAME;
        let entry = self.entry(&mut walk, Level::L3, tables, address, access, visit)?;
        if entry & LARGE != 0 {
            return self.finish(&walk, Level::L3, entry, regs, address, access, unmarked);
        }
        walk.table = entry & FRAME;
        self.walk_directory(walk, tables, regs, address, access, visit, unmarked)
    }

    /// 8-byte entries, from level 2 on.
    #[inline(always)]
    fn walk_directory<S: TableSource<Out>>(
        &self,
        mut walk: Walk,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
        visit: &mut impl FnMut(u64, u64),
        unmarked: &mut bool,
    ) -> Result<Translation<Out>, WalkError> {
        let entry = self.entry(&mut walk, Level::L2, tables, address, access, visit)?;
        if entry & LARGE != 0 {
            return self.finish(&walk, Level::L2, entry, regs, address, access, unmarked);
        }
        walk.table = entry & FRAME;
        let entry = self.entry(&mut walk, Level::L1, tables, address, access, visit)?;
        self.finish(&walk, Level::L1, entry, regs, address, access, unmarked)
    }

    /// Reads and checks the 8-byte entry for `address` in the walk's table, which is at `level`.
    #[inline(always)]
    fn entry<S: TableSource<Out>>(
        &self,
        walk: &mut Walk,
        level: Level,
        tables: &S,
        address: In,
        access: Access,
        visit: &mut impl FnMut(u64, u64),
    ) -> Result<u64, WalkError> {
        let at = walk.table | (level.index(address.bits() >> PAGE_SHIFT) as u64) << 3;
        let entry = match tables.read_u64(Out::from_bits_truncate(at)) {
            Ok(entry) => entry,
            Err(error) => {
                let reports_fetches = self.role.reports_fetches();
                return Err(error.into_walk(address, access, level, walk.prot(), reports_fetches));
            }
        };
        // Not present and reserved are one test: the masks have bit 0 set. Only at levels 2 and 3 does bit 7 decide what
        // else is reserved.
        let [link, leaf] = self.wrong[level.ordinal()];
        let large = matches!(level, Level::L2 | Level::L3) && entry & LARGE != 0;
        let wrong = if large { (entry ^ PRESENT) & leaf } else { (entry ^ PRESENT) & link };
        if wrong != 0 {
            return Err(self.bad_entry(walk, entry, address, access, level));
        }
        walk.meet(entry);
        visit(at, entry);
        Ok(entry)
    }

    /// The end of a walk of 8-byte entries: `entry` is the leaf.
    #[inline(always)]
    fn finish(
        &self,
        walk: &Walk,
        level: Level,
        entry: u64,
        regs: &WalkRegs,
        address: In,
        access: Access,
        unmarked: &mut bool,
    ) -> Result<Translation<Out>, WalkError> {
        let prot = walk.prot();
        self.check(regs, address, access, level, prot, (entry >> KEY_SHIFT & 15) as u32)?;
        let page_bytes = 1 << level.shift();
        let inside = page_bytes - 1;
        let out = Out::from_bits_truncate((entry & FRAME & !inside) | (address.bits() & inside));
        let dirty = access.kind != AccessKind::Write || entry & DIRTY != 0;
        *unmarked = walk.all & ACCESSED == 0 || !dirty;
        Ok(Translation { address: out, page_bytes, prot })
    }

    /// PAE's first step: the PDPTE, which restricts nothing and has no accessed bit.
    fn pae_directory<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
    ) -> Result<Walk, WalkError> {
        let index = (address.bits() >> Level::L3.shift()) & 3;
        let pdpte = match regs.pdptes {
            Some(pdptes) => pdptes[index as usize],
            None => {
                let at = (regs.cr3 & 0xffff_ffe0) + index * 8;
                tables.read_u64(Out::from_bits_truncate(at)).map_err(|error| {
                    let reports_fetches = self.role.reports_fetches();
                    error.into_walk(address, access, Level::L3, Prot::all(), reports_fetches)
                })?
            }
        };
        let walk = Walk::from(pdpte & FRAME);
        if (pdpte ^ PRESENT) & self.wrong[Level::L3.ordinal()][0] != 0 {
            let cause = if pdpte & PRESENT == 0 { Cause::NotPresent } else { Cause::Reserved };
            return Err(self.fault(address, access, Level::L3, cause, walk.prot()));
        }
        Ok(walk)
    }

    /// Two levels of 4-byte entries.
    fn walk_short<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
        visit: &mut impl FnMut(u64, u64),
        unmarked: &mut bool,
    ) -> Result<Translation<Out>, WalkError> {
        let bits = address.bits();
        let mut walk = Walk::from(regs.cr3 & 0xffff_f000);
        let mut level = Level::L2;
        loop {
            let shift = if level == Level::L2 { 22 } else { 12 };
            let at = walk.table | ((bits >> shift) & 0x3ff) << 2;
            let entry = match tables.read_u32(Out::from_bits_truncate(at)) {
                Ok(entry) => u64::from(entry),
                Err(error) => {
                    let reports_fetches = self.role.reports_fetches();
                    return Err(error.into_walk(address, access, level, walk.prot(), reports_fetches));
                }
            };
            if entry & PRESENT == 0 {
                return Err(self.fault(address, access, level, Cause::NotPresent, walk.prot()));
            }
            walk.meet(entry);
            let pse = self.role.flags().contains(RoleFlags::PSE);
            let large = level == Level::L2 && pse && entry & LARGE != 0;
            if large && (entry ^ PRESENT) & self.wrong[Level::L2.ordinal()][1] != 0 {
                return Err(self.fault(address, access, level, Cause::Reserved, walk.prot()));
            }
            visit(at, entry);
            if level == Level::L2 && !large {
                walk.table = entry & 0xffff_f000;
                level = Level::L1;
                continue;
            }
            let prot = walk.prot();
            self.check(regs, address, access, level, prot, 0)?;
            let page_bytes: u64 = 1 << shift;
            let frame = if large {
                // PSE-36: bits 20:13 are address bits 39:32; without it they were found to be zero.
                entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
            } else {
                entry & 0xffff_f000
            };
            let out = Out::from_bits_truncate(frame | bits & (page_bytes - 1));
            let dirty = access.kind != AccessKind::Write || entry & DIRTY != 0;
            *unmarked = walk.all & ACCESSED == 0 || !dirty;
            return Ok(Translation { address: out, page_bytes, prot });
        }
    }

    /// Whether a translation with `prot` and protection key `key` permits the access.
    #[inline(always)]
    fn check(
        &self,
        regs: &WalkRegs,
        address: In,
        access: Access,
        level: Level,
        prot: Prot,
        key: u32,
    ) -> Result<(), WalkError> {
        let forbidden = forbids(self.permissions, index(access, regs.ac), prot);
        let key_denied =
            self.role.flags().contains(RoleFlags::PKE) && self.key_denies(regs, access, prot, key);
        if !forbidden && !key_denied {
            return Ok(());
        }
        let WalkError::Fault(fault) = self.fault(address, access, level, Cause::Protection, prot) else {
            return Err(WalkError::Contended);
        };
        Err(WalkError::Fault(Fault { key_denied, ..fault }))
    }

    /// Protection keys restrict data accesses to user pages, supervisor writes only with CR0.WP (Intel SDM vol. 3,
    /// 4.6.2).
    fn key_denies(&self, regs: &WalkRegs, access: Access, prot: Prot, key: u32) -> bool {
        if access.kind == AccessKind::Execute || !prot.contains(Prot::USER) {
            return false;
        }
        let rights = regs.pkru >> (2 * key);
        let no_access = rights & 1 != 0;
        let no_write = rights & 2 != 0
            && access.kind == AccessKind::Write
            && (access.agent == Agent::User || self.role.flags().contains(RoleFlags::WP));
        no_access || no_write
    }

    /// The error for an entry that is not present or has a reserved bit set.
    #[cold]
    fn bad_entry(&self, walk: &Walk, entry: u64, address: In, access: Access, level: Level) -> WalkError {
        let (cause, found) = if entry & PRESENT == 0 {
            (Cause::NotPresent, walk.prot())
        } else {
            (Cause::Reserved, Walk { table: 0, all: walk.all & entry, any: walk.any | entry }.prot())
        };
        self.fault(address, access, level, cause, found)
    }

    #[cold]
    fn fault(&self, address: In, access: Access, level: Level, cause: Cause, found: Prot) -> WalkError {
        WalkError::Fault(Fault {
            stage: In::STAGE,
            address: address.bits(),
            level,
            access,
            place: Place::Final,
            cause,
            found,
            key_denied: false,
            reports_fetches: self.role.reports_fetches(),
        })
    }
}

impl Walk {
    #[inline(always)]
    const fn from(table: u64) -> Self {
        Self { table, all: u64::MAX, any: 0 }
    }

    #[inline(always)]
    const fn meet(&mut self, entry: u64) {
        self.all &= entry;
        self.any |= entry;
    }

    /// What the entries so far permit.
    #[inline(always)]
    const fn prot(&self) -> Prot {
        let data = (self.all & (WRITE | USER)) >> 1;
        let execute = (!self.any & NO_EXECUTE) >> 61;
        Prot::from_bits_truncate((data | execute) as u8)
    }
}

const _: () = assert!(
    Prot::WRITE.bits() as u64 == WRITE >> 1
        && Prot::USER.bits() as u64 == USER >> 1
        && Prot::EXECUTE.bits() as u64 == NO_EXECUTE >> 61
);

/// The entries of a walk, top first.
#[derive(Default)]
struct Trail {
    steps: [(u64, u64); 5],
    len: usize,
}

impl Trail {
    fn push(&mut self, at: u64, entry: u64) {
        if let Some(step) = self.steps.get_mut(self.len) {
            *step = (at, entry);
            self.len += 1;
        }
    }

    fn steps(&self) -> &[(u64, u64)] {
        self.steps.get(..self.len).unwrap_or(&self.steps)
    }
}
