//! The paging context: how a guest's page tables are read, as follows from its registers.
use core::marker::PhantomData;

use super::fault::{Cause, FaultInfo, Place, WalkError};
use super::permission::{forbids, index, permissions, Permissions};
use super::reserved::{reserved, Reserved};
use super::result::{GuestWalk, Trail};
use super::source::{BelowError, LogFull, TableSource, Update};
use super::walker::{self, Full, Quick, Walker};
use crate::access::{Access, AccessKind, Agent, Prot};
use crate::addr::{Address, NGpa, Stage, PAGE_SIZE};
use crate::level::Level;
use crate::mutant::{self, Mutant};
use crate::role::{CpuRole, PagingMode, RoleFlags};

/// Times a walk starts again because the guest changed an entry under it.
const MAX_RESTARTS: usize = 8;

/// How page tables that translate `In` to `Out` are read: the sketch's `kvm_paging_context`.
///
/// Immutable: a change of CR0, CR4, EFER or of the guest's CPUID is another context. CR3, PKRU, IA32_PKRS and RFLAGS.AC
/// change without an exit under nested paging, so they are arguments of a walk, as is the access.
///
/// The sketch's `root_walk` and `walk01` are both `PagingContext<Gva, Gpa>`: they never differ. `walk12` is
/// `PagingContext<Gva, NGpa>`, and `tdp12_walk`, for L1's nested tables, `PagingContext<NGpa, Gpa>`.
#[derive(Clone, Debug)]
pub struct PagingContext<In, Out> {
    role: CpuRole,
    permissions: &'static Permissions,
    /// Reserved bits, and bit 0 for entries that are not present, both of entries in positive form.
    pub(super) wrong: Reserved,
    /// An entry XOR this is its positive form: one AND over all levels says what they permit. Turned around are NX, if it has
    /// a meaning, and P, which so is an error where it is set. Not for EPT.
    pub(super) flip: u64,
    /// What is permitted whatever the entries say.
    pub(super) implied: Prot,
    stages: PhantomData<fn(In) -> Out>,
}

/// Registers that a walk reads as they are at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WalkRegs {
    /// CR3, NCR3, or the EPT pointer.
    pub cr3: u64,
    /// PKRU.
    pub pkru: u32,
    /// IA32_PKRS.
    pub pkrs: u32,
    /// RFLAGS.AC.
    pub ac: bool,
    /// PAE: the PDPTE registers, where the CPU has them (VMX). Under nested paging it has none, and each walk reads the
    /// PDPTE from memory (AMD APM vol. 2, 15.25.10).
    pub pdptes: Option<[u64; 4]>,
}

/// PDPTE registers that cannot be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PdpteError {
    /// This entry is present and has a reserved bit set: the instruction gets #GP.
    Reserved(u64),
    /// An entry cannot be read. A fault of L1's tables goes back to no linear address.
    Unreachable(BelowError),
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

/// What makes an entry its positive form, and what is permitted whatever entries say.
#[inline]
pub(super) const fn positive_form(role: &CpuRole) -> (u64, Prot) {
    if role.flags().contains(RoleFlags::NX) {
        (walker::PRESENT | walker::NO_EXECUTE, Prot::READ)
    } else {
        (walker::PRESENT, Prot::READ.union(Prot::EXECUTE))
    }
}

impl<In: Address, Out: Address> PagingContext<In, Out> {
    /// The context of a role.
    pub const fn new(role: CpuRole) -> Self {
        let (flip, implied) = positive_form(&role);
        let mut wrong = reserved(&role);
        if matches!(role.mode(), PagingMode::Pae | PagingMode::FourLevel | PagingMode::FiveLevel) {
            // The walk meets large pages where it meets what is wrong with a link.
            wrong[Level::L2.ordinal()][0] |= walker::LARGE;
            if !matches!(role.mode(), PagingMode::Pae) {
                wrong[Level::L3.ordinal()][0] |= walker::LARGE;
            }
        }
        Self { role, permissions: permissions(&role), wrong, flip, implied, stages: PhantomData }
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
    ///
    /// Four levels with all bits set are walked on the spot; everything else is rare and far away.
    #[inline]
    pub fn translate<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
    ) -> Result<Translation<Out>, WalkError> {
        if self.role.mode() == PagingMode::FourLevel {
            let mut walker = Walker::<Quick, _, _, _, _>::new(self, tables, regs, address, access, |_, _| {});
            if let Ok(translation) = walker.four_levels() {
                if !walker.unmarked {
                    return Ok(translation);
                }
            }
        }
        self.translate_and_mark(tables, regs, address, access)
    }

    /// The same walk, with all that a shadow of the tables is made from.
    #[inline]
    pub fn walk<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
    ) -> Result<GuestWalk<Out>, WalkError> {
        if self.role.mode() == PagingMode::FourLevel && matches!(In::STAGE, Stage::Gva) {
            if let Some(walk) = self.quick_walk(tables, regs, address, access) {
                return Ok(walk);
            }
        }
        self.whole_walk(tables, regs, address, access)
    }

    /// The same in any mode, from the start.
    #[inline(never)]
    fn whole_walk<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
    ) -> Result<GuestWalk<Out>, WalkError> {
        let (translation, trail) = self.walk_and_mark(tables, regs, address, access)?;
        Ok(GuestWalk::new(self, translation, &trail, access))
    }

    /// Loads the PDPTE registers, as a MOV to CR0, CR3 or CR4 that leads to PAE paging does on a CPU that has them (Intel SDM
    /// vol. 3, 4.4.1).
    pub fn load_pdptes<S: TableSource<Out>>(&self, tables: &S, cr3: u64) -> Result<[u64; 4], PdpteError> {
        let mut pdptes = [0; 4];
        for (at, pdpte) in walker::pdpte_addresses(cr3).zip(&mut pdptes) {
            *pdpte = tables.read_pdpte(Out::from_bits_truncate(at)).map_err(PdpteError::Unreachable)?;
            if *pdpte & walker::PRESENT != 0 && self.pdpte_is_wrong(*pdpte) {
                return Err(PdpteError::Reserved(*pdpte));
            }
        }
        Ok(pdptes)
    }

    /// Whether a PDPTE is not present or has a reserved bit set.
    #[inline]
    pub(super) fn pdpte_is_wrong(&self, pdpte: u64) -> bool {
        (pdpte ^ walker::PRESENT) & self.wrong[Level::L3.ordinal()][0] != 0
    }

    /// The access that L1's nested tables see when L2 makes `access` to an address that its own tables permit `linear` at.
    ///
    /// All are a user's, but for fetches. Under guest mode execute trap those are by privilege level; under mode-based
    /// execute control they go by the linear address, which is a user's if all of L2's entries say so, or if L2 has no
    /// paging (Intel SDM vol. 3, 29.3.3.2).
    #[inline]
    pub fn final_access(&self, access: Access, linear: Prot) -> Access {
        let flags = self.role.flags();
        let user = if access.kind != AccessKind::Execute {
            true
        } else if flags.contains(RoleFlags::MODE_BASED_EXECUTE) {
            linear.contains(Prot::USER)
        } else if flags.contains(RoleFlags::NESTED.union(RoleFlags::SMEP)) {
            access.agent == Agent::User
        } else {
            true
        };
        Access { kind: access.kind, agent: if user { Agent::User } else { Agent::Supervisor } }
    }

    /// The general case of [`translate`](Self::translate): any mode, bits to be set.
    #[inline(never)]
    fn translate_and_mark<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
    ) -> Result<Translation<Out>, WalkError> {
        self.walk_and_mark(tables, regs, address, access).map(|(translation, _)| translation)
    }

    fn walk_and_mark<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
    ) -> Result<(Translation<Out>, Trail), WalkError> {
        let address = self.linear(address);
        for _ in 0..MAX_RESTARTS {
            let mut trail = Trail::new();
            let mut walker =
                Walker::<Full, _, _, _, _>::new(self, tables, regs, address, access, |at, entry| {
                    trail.push(at, entry)
                });
            let found = walker.any_mode();
            let (leaf, pdpte, unmarked) = (walker.leaf, walker.pdpte, walker.unmarked);
            trail.end(leaf, pdpte);
            if found.is_err() && mutant::is(Mutant::MarkFailedWalks) {
                self.mark(tables, &mut trail, address, access)?;
            }
            let translation = found?;
            if !unmarked || self.mark(tables, &mut trail, address, access)? {
                return Ok((translation, trail));
            }
        }
        Err(WalkError::Contended)
    }

    /// Sets the bits in the entries of `trail`, from the top; `false` if one has changed since.
    fn mark<S: TableSource<Out>>(
        &self,
        tables: &S,
        trail: &mut Trail,
        address: In,
        access: Access,
    ) -> Result<bool, WalkError> {
        let write = access.kind == AccessKind::Write;
        let (accessed, dirty) = self.mark_bits();
        let newly_dirty = write && trail.leaf_entry().is_some_and(|entry| entry & dirty == 0);
        if newly_dirty && self.role.is_ept() && !mutant::is(Mutant::NestedLogAfterDirty) {
            let page = NGpa::new_truncate(address.bits() & !(PAGE_SIZE - 1));
            tables.log_dirty(page).map_err(|LogFull| WalkError::LogFull)?;
        }
        let leaf = trail.leaf();
        let never = mutant::is(Mutant::LargeNeverDirty)
            && leaf > Level::L1
            && !self.role.flags().contains(RoleFlags::WP);
        for (level, step) in trail.steps_mut() {
            let leaf = level == leaf;
            let dirties =
                (leaf || mutant::is(Mutant::DirtyLinks)) && (write || mutant::is(Mutant::DirtyOnReads));
            let marked = step.entry | accessed | if dirties && !never { dirty } else { 0 };
            if marked == step.entry || !leaf && mutant::is(Mutant::AccessedLeavesOnly) {
                continue;
            }
            let at = Out::from_bits_truncate(step.at);
            let update = match self.role.mode() {
                PagingMode::TwoLevel => tables.update_u32(at, step.entry as u32, marked as u32),
                _ => tables.update_u64(at, step.entry, marked),
            };
            let failed = || self.fault_at(address, access, level, Prot::empty());
            if update.is_err() && mutant::is(Mutant::MarkGoneMemory) {
                continue;
            }
            match update.map_err(|error| error.into_walk(failed()))? {
                Update::Done => step.entry = marked,
                Update::ReadOnly => {}
                Update::Changed if mutant::is(Mutant::GuestStoreIgnored) => {}
                Update::Changed => return Ok(false),
            }
        }
        Ok(true)
    }

    /// The accessed and the dirty bit.
    const fn mark_bits(&self) -> (u64, u64) {
        if self.role.is_ept() {
            (walker::EPT_ACCESSED, walker::EPT_DIRTY)
        } else {
            (walker::ACCESSED, walker::DIRTY)
        }
    }

    /// Whether a translation with `prot` forbids the access, protection keys aside.
    #[inline(always)]
    pub(super) fn forbids(&self, regs: &WalkRegs, access: Access, prot: Prot) -> bool {
        forbids(self.permissions, index(access, regs.ac), prot)
    }

    /// Protection keys restrict data accesses: those to user pages by PKRU, those to supervisor pages by IA32_PKRS; a
    /// supervisor's writes only with CR0.WP (Intel SDM vol. 3, 4.6.2).
    #[inline(always)]
    pub(super) fn key_denies(&self, regs: &WalkRegs, access: Access, prot: Prot, key: u32) -> bool {
        self.role.flags().intersects(RoleFlags::PKE.union(RoleFlags::PKS))
            && self.key_in_use_denies(regs, access, prot, key)
    }

    /// On the spot, for a call would cost the hot path its registers, whether keys are on or not.
    #[inline(always)]
    fn key_in_use_denies(&self, regs: &WalkRegs, access: Access, prot: Prot, key: u32) -> bool {
        let (on, rights) =
            if prot.contains(Prot::USER) { (RoleFlags::PKE, regs.pkru) } else { (RoleFlags::PKS, regs.pkrs) };
        let fetch = access.kind == AccessKind::Execute && !mutant::is(Mutant::KeyForFetches);
        if fetch || !self.role.flags().contains(on) {
            return false;
        }
        let rights = rights >> (2 * key);
        let no_access = rights & 1 != 0;
        let no_write = rights & 2 != 0
            && access.kind == AccessKind::Write
            && (access.agent == Agent::User
                || self.role.flags().contains(RoleFlags::WP)
                || mutant::is(Mutant::KeyIgnoresWp));
        no_access || no_write
    }

    /// The address that is meant: a linear one outside long mode has 32 bits.
    #[inline]
    pub(super) fn linear(&self, address: In) -> In {
        match (In::STAGE, self.role.mode()) {
            (Stage::Gva, PagingMode::Unpaged | PagingMode::TwoLevel | PagingMode::Pae) => {
                In::from_bits_truncate(address.bits() & 0xffff_ffff)
            }
            _ => address,
        }
    }

    /// A fault at `level`, of an entry that is not present unless the caller knows better.
    #[cold]
    pub(super) fn fault_at(&self, address: In, access: Access, level: Level, found: Prot) -> FaultInfo {
        FaultInfo {
            stage: In::STAGE,
            address: address.bits(),
            level,
            access,
            place: Place::Final,
            cause: Cause::NotPresent,
            found,
            key_denied: false,
            linear: None,
            role: self.role,
        }
    }
}
