//! The paging context: how a guest's page tables are read, as follows from its registers.
use core::marker::PhantomData;

use super::fault::{Cause, Fault, Place, WalkError};
use super::permission::{forbids, index, permissions, Permissions};
use super::reserved::{reserved, Reserved};
use super::source::TableSource;
use super::walker::{marked, Walker};
use crate::access::{Access, AccessKind, Agent, Prot};
use crate::addr::Address;
use crate::level::Level;
use crate::role::{CpuRole, PagingMode, RoleFlags};

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
    pub(super) wrong: Reserved,
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
            let mut walker = Walker::new(self, tables, regs, address, access, |_, _| {});
            let translation = walker.four_levels();
            if !walker.unmarked {
                return translation;
            }
        }
        self.translate_and_mark(tables, regs, address, access)
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
        for _ in 0..MAX_RESTARTS {
            let mut trail = Trail::default();
            let mut walker =
                Walker::new(self, tables, regs, address, access, |at, entry| trail.push(at, entry));
            let translation = walker.any_mode()?;
            if !walker.unmarked || self.mark(tables, &trail, address, access)? {
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
            let below = steps.len() - 1 - position;
            let marked = marked(entry, below == 0 && access.kind == AccessKind::Write);
            if marked == entry {
                continue;
            }
            let at = Out::from_bits_truncate(at);
            let done = match self.role.mode() {
                PagingMode::TwoLevel => tables.update_u32(at, entry as u32, marked as u32),
                _ => tables.update_u64(at, entry, marked),
            };
            let level = Level::ALL[below % Level::ALL.len()];
            let failed = self.fault_at(address, access, level, Prot::all());
            if !done.map_err(|error| error.into_walk(failed))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether a translation with `prot` and protection key `key`, from a leaf at `level`, permits the access.
    #[inline(always)]
    pub(super) fn check(
        &self,
        regs: &WalkRegs,
        address: In,
        access: Access,
        level: Level,
        (prot, key): (Prot, u32),
    ) -> Result<(), WalkError> {
        let forbidden = forbids(self.permissions, index(access, regs.ac), prot);
        let key_denied =
            self.role.flags().contains(RoleFlags::PKE) && self.key_denies(regs, access, prot, key);
        if forbidden || key_denied {
            let fault = self.fault_at(address, access, level, prot);
            return Err(WalkError::Fault(Fault { cause: Cause::Protection, key_denied, ..fault }));
        }
        Ok(())
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

    /// A fault at `level`, of an entry that is not present unless the caller knows better.
    #[cold]
    pub(super) fn fault_at(&self, address: In, access: Access, level: Level, found: Prot) -> Fault {
        Fault {
            stage: In::STAGE,
            address: address.bits(),
            level,
            access,
            place: Place::Final,
            cause: Cause::NotPresent,
            found,
            key_denied: false,
            reports_fetches: self.role.reports_fetches(),
        }
    }
}

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
