//! What happens to a vCPU's registers and translations: each event names its exact scope and says what follows from it.
//!
//! Scopes are those of Intel SDM vol. 3, 4.10.4.1 and AMD APM vol. 2, 5.5.2, both together where they differ. Global
//! pages are not told apart: what spares them covers them, too. With a direct kind the processor does all of this by
//! itself.
use super::key::{GuestTag, PagingState};
use super::requests::{Requests, Sync, TagFlush};
use super::Mmu;
use crate::addr::{Gva, NonCanonical};
use crate::mutant::{self, FlushSite, Mutant};
use crate::role::{CpuRole, Cr0, Cr4, Efer, GuestCpu, PagingMode, PagingRegs};

/// Bit 63 of the operand of MOV to CR3: keep the translations of the PCID.
pub(super) const NO_FLUSH: u64 = 1 << 63;

/// What INVPCID takes away (Intel SDM vol. 2, INVPCID; AMD APM vol. 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invpcid {
    /// Type 0: one address of a PCID, but not if its page is global.
    Address {
        /// The PCID.
        pcid: u16,
        /// The address.
        address: Gva,
    },
    /// Type 1: a PCID, without global pages.
    Single {
        /// The PCID.
        pcid: u16,
    },
    /// Type 2: everything.
    All,
    /// Type 3: everything but global pages.
    AllButGlobal,
}

/// An INVPCID that is #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadInvpcid {
    /// There is no such type.
    Type(u64),
    /// Reserved bits of the descriptor are set, or it names a PCID that cannot be.
    Descriptor(u64),
    /// The address is not canonical.
    Address(NonCanonical),
}

impl Invpcid {
    /// The instruction with this register operand and this descriptor, low half first, in a vCPU with this role and CR4.
    pub fn new(kind: u64, descriptor: [u64; 2], role: &CpuRole, cr4: Cr4) -> Result<Self, BadInvpcid> {
        let [low, high] = descriptor;
        let pcid = low as u16 & 0xfff;
        if kind > 3 {
            return Err(BadInvpcid::Type(kind));
        }
        if low >> 12 != 0 || (kind < 2 && pcid != 0 && !cr4.contains(Cr4::PCIDE)) {
            return Err(BadInvpcid::Descriptor(low));
        }
        let address = Gva::new(high);
        Ok(match kind {
            0 => {
                role.check_canonical(address).map_err(BadInvpcid::Address)?;
                Self::Address { pcid, address }
            }
            1 => Self::Single { pcid },
            2 => Self::All,
            _ => Self::AllButGlobal,
        })
    }
}

/// Whose translations an event takes, of the roots of whoever runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flushed {
    /// Nobody's.
    Nothing,
    /// Those of a PCID.
    Pcid(u16),
    /// All.
    All,
}

impl Flushed {
    /// Whether they are those of this PCID.
    #[inline]
    pub(super) const fn covers(self, pcid: u16) -> bool {
        match self {
            Self::Nothing => false,
            Self::Pcid(flushed) => flushed == pcid,
            Self::All => true,
        }
    }
}

/// What a MOV of `value` to CR3 takes while CR4 is `cr4`.
#[inline]
pub(super) fn flushed_by_cr3(value: u64, cr4: Cr4) -> Flushed {
    let pcids = cr4.contains(Cr4::PCIDE);
    if value & NO_FLUSH != 0 && pcids || mutant::drops(FlushSite::MovToCr3) {
        Flushed::Nothing
    } else {
        Flushed::Pcid(if pcids { value as u16 & 0xfff } else { 0 })
    }
}

/// What a MOV to CR0 takes.
#[inline]
pub(super) fn flushed_by_cr0(old: Cr0, new: Cr0) -> Flushed {
    if (old ^ new).contains(Cr0::PG) && !mutant::drops(FlushSite::MovToCr0) {
        Flushed::All
    } else {
        Flushed::Nothing
    }
}

/// What a MOV to CR4 takes, in the PCID that is current after it.
#[inline]
pub(super) fn flushed_by_cr4(old: Cr4, new: Cr4, pcid: u16) -> Flushed {
    let (set, cleared) = (new.difference(old), old.difference(new));
    let all = (set | cleared).intersects(Cr4::PGE.union(Cr4::PAE).union(Cr4::PSE))
        || cleared.contains(Cr4::PCIDE) && !mutant::is(Mutant::PcideKept)
        || set.contains(Cr4::PKE);
    if all && !mutant::drops(FlushSite::MovToCr4) {
        Flushed::All
    } else if set.contains(Cr4::SMEP) && !mutant::drops(FlushSite::MovToCr4Smep) {
        Flushed::Pcid(pcid)
    } else {
        Flushed::Nothing
    }
}

impl Mmu {
    /// MOV to CR3, or the load of CR3 by a task switch, with the PDPTEs that it loads under PAE.
    ///
    /// The translations of the PCID that is loaded go (without PCIDs: of 000H), unless bit 63 says to keep them,
    /// which is an order only with CR4.PCIDE.
    pub fn mov_to_cr3(&mut self, value: u64, pdptes: [u64; 4]) -> Requests {
        let flushed = flushed_by_cr3(value, self.state.regs.cr4);
        (self.state.cr3, self.state.pdptes) = (value & !NO_FLUSH, pdptes);
        self.then(Sync::All, |of| flushed.covers(of.pcid))
    }

    /// MOV to CR0, CLTS or LMSW, with the EFER.LMA that follows and the PDPTEs that it loads. A change of PG takes all
    /// translations; one of WP takes none.
    pub fn mov_to_cr0(&mut self, cr0: Cr0, efer: Efer, pdptes: [u64; 4]) -> Requests {
        let flushed = flushed_by_cr0(self.state.regs.cr0, cr0);
        let regs = PagingRegs { cr0, efer, ..self.state.regs };
        self.change(PagingState { regs, pdptes, ..self.state });
        self.then(Sync::All, |of| flushed.covers(of.pcid))
    }

    /// MOV to CR4, with the PDPTEs that it loads. A change of PGE, PAE or PSE takes all translations, as do clearing
    /// PCIDE and setting PKE; setting SMEP takes those of the current PCID, setting PCIDE none.
    pub fn mov_to_cr4(&mut self, cr4: Cr4, pdptes: [u64; 4]) -> Requests {
        let old = self.state.regs.cr4;
        let regs = PagingRegs { cr4, ..self.state.regs };
        self.change(PagingState { regs, pdptes, ..self.state });
        let flushed = flushed_by_cr4(old, cr4, self.state.pcid());
        self.then(Sync::All, |of| flushed.covers(of.pcid))
    }

    /// WRMSR to EFER. It takes no translations; with another NXE the vCPU runs on another root.
    pub fn wrmsr_efer(&mut self, efer: Efer) -> Requests {
        let regs = PagingRegs { efer, ..self.state.regs };
        self.change(PagingState { regs, ..self.state });
        self.flush_nothing()
    }

    /// INVLPG: the address in the current PCID, and global pages there in all, so all roots are concerned. An address
    /// that is not canonical is no matter.
    pub fn invlpg(&mut self, address: Gva) -> Requests {
        let canonical = self.role.check_canonical(address).is_ok();
        self.then(Sync::Address(address), |_| canonical && !mutant::drops(FlushSite::Invlpg))
    }

    /// INVPCID, in any mode.
    pub fn invpcid(&mut self, what: Invpcid) -> Requests {
        assert!(!mutant::is(Mutant::NoHookUnpaged) || self.role.mode() != PagingMode::Unpaged);
        match what {
            Invpcid::Address { pcid, address } => self.then(Sync::Address(address), |of| {
                of.pcid == pcid && !mutant::drops(FlushSite::InvpcidAddress)
            }),
            Invpcid::Single { pcid } => {
                self.then(Sync::All, |of| of.pcid == pcid && !mutant::drops(FlushSite::InvpcidSingle))
            }
            Invpcid::All | Invpcid::AllButGlobal => self.flush_guest(),
        }
    }

    /// A page fault is delivered to the guest: by itself it takes away what the TLB has of the address, so the guest
    /// may change the entry in any way without another word (Intel SDM vol. 3, 4.10.4.1). Of an entry that is not
    /// present, or has reserved bits set, it may have what was there before.
    pub fn page_fault(&mut self, address: Gva) -> Requests {
        self.then(Sync::Address(address), |_| !mutant::drops(FlushSite::PageFault))
    }

    /// All translations of whoever runs go: whatever else has that effect, like a flush that the guest asked another
    /// vCPU for.
    pub fn flush_guest(&mut self) -> Requests {
        self.then(Sync::All, |_| !mutant::drops(FlushSite::FlushGuest))
    }

    /// RESET or INIT: no paging from now on, and no translation is left.
    pub fn init(&mut self) -> Requests {
        let role = self.role;
        self.change(PagingState::RESET);
        if mutant::is(Mutant::InitKeepsRole) {
            self.role = role;
        }
        self.context = 0;
        self.mode.nested = false;
        self.and_then(Sync::All, |_| !mutant::drops(FlushSite::Init))
    }

    /// SMI or RSM, with the registers as they are after it: no translation is left, and it is another address space.
    pub fn switch_smm(&mut self, state: PagingState) -> Requests {
        self.change(state);
        self.and_then(Sync::All, |_| !mutant::drops(FlushSite::SwitchSmm))
    }

    /// The registers, or the CPU that the guest sees, were set from outside: nothing is known of what the TLB holds,
    /// so it is flushed, too.
    pub fn set_from_outside(&mut self, state: PagingState, cpu: GuestCpu) -> Requests {
        self.guest_cpu = cpu;
        self.roots.forget_seen();
        self.change(state);
        let requests = self.and_then(Sync::All, |_| !mutant::is(Mutant::SetFromOutsideKeeps));
        let kept = mutant::is(Mutant::SetFromOutsideKeeps) || mutant::drops(FlushSite::SetFromOutside);
        let flush = if kept { TagFlush::None } else { self.flush() };
        Requests { flush, ..requests }
    }

    /// Takes over registers: another role, and so another key.
    fn change(&mut self, state: PagingState) {
        self.state = state;
        self.role = CpuRole::new(&state.regs, &self.guest_cpu);
        self.mode.smm = state.smm;
    }

    /// Another name of L1's for who runs from now on, or L1 itself (zero): its flushes take no other's translations.
    ///
    /// For an L2 whose own tables are shadowed. One that L1 gives nested tables has [`set_nested`](Self::set_nested).
    pub fn set_context(&mut self, context: u16) -> Requests {
        self.context = context;
        self.mode.nested = context != 0;
        self.flush_nothing()
    }

    /// The root for what the vCPU is now is selected, and no translation goes.
    pub(super) fn flush_nothing(&mut self) -> Requests {
        self.and_then(Sync::All, |_| false)
    }

    /// What follows: roots whose tag `covers` names are behind by `how`, and the root for the registers of now is
    /// selected. Whoever runs, L1 or L2, flushes its own translations only.
    fn then(&mut self, how: Sync, covers: impl Fn(GuestTag) -> bool) -> Requests {
        let context = self.context;
        self.and_then(how, |tag| tag.context == context && covers(tag))
    }

    fn and_then(&mut self, how: Sync, covers: impl Fn(GuestTag) -> bool) -> Requests {
        let key = self.key_of_now();
        let (load, switch) = self.select(key);
        self.note_seen();
        let (marked, flush) = self.fall_behind(how, |key| covers(key.tag()));
        self.settle_root();
        let sync = (!marked.is_empty()).then_some((how, marked));
        Requests { load, sync, flush: if switch == TagFlush::All { switch } else { flush } }
    }
}
