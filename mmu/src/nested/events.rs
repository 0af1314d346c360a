//! What L1 does to translations of L2, each event with its exact scope: Intel SDM vol. 3, 29.4.3; AMD APM vol. 2, 15.16.
//!
//! Two things may be behind: roots, which shadow L1's nested tables and so stand for translations of L2's physical addresses;
//! and the hardware tag that L2 runs with, which holds translations of L2's linear addresses. On VMX they have instructions of
//! their own. On SVM an ASID covers both.
//!
//! What L2 itself flushes (INVLPG, INVPCID, MOV to CR3, CR4.PGE) are linear translations of its own tag. The processor does
//! it without an exit, and nothing here follows from it.
use super::tables::{TableAddress, Tdp12};
use crate::addr::Gva;
use crate::mutant::{self, FlushSite};
use crate::vcpu::{Mmu, Requests, TagFlush, VcpuMmus};

/// Which of the roots that a vCPU keeps for L2 are behind L1's tables, and have to be synced before they are run on again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Roots {
    /// None.
    None,
    /// Those for this table, whatever the rest of the EPT pointer was.
    Of(TableAddress),
    /// Those that L2 ran on under this ASID of L1's.
    Asid(u16),
    /// All.
    All,
}

/// What an event asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "hand it to `VcpuMmus::apply`"]
pub struct L2Request {
    /// Roots to sync, and so to flush.
    pub roots: Roots,
    /// What must go from the tag of L2.
    pub l2: TagFlush,
    /// What must go from the tag of L1.
    pub l1: TagFlush,
}

impl L2Request {
    /// Nothing.
    pub const NONE: Self = Self { roots: Roots::None, l2: TagFlush::None, l1: TagFlush::None };
}

impl VcpuMmus {
    /// L2 runs from now on, with these nested tables. `asid` is its ASID under SVM; on VMX it is zero, for nothing that goes
    /// by VPIDs takes guest-physical translations. What [`L2Tag`] says of the entry is applied after this.
    pub fn enter_l2(&mut self, tdp12: &Tdp12, pdptes: [u64; 4], asid: u16) -> Requests {
        self.enter_nested(tdp12.context().role(), tdp12.pointer(), pdptes, asid)
    }

    /// Notes what an event asks for, until the next entries of L1 and L2; what has to be carried out before an entry of L2 is
    /// returned as well.
    pub fn apply(&mut self, request: L2Request) -> Requests {
        if !mutant::drops(FlushSite::NoteL1) {
            note(&mut self.root_mmu, request.l1);
        }
        if !mutant::drops(FlushSite::NoteL2) {
            note(&mut self.tdp12_mmu, request.l2);
        }
        let requests = match request.roots {
            Roots::None => self.tdp12_mmu.roots_behind(|_| false),
            Roots::Of(table) => self.tdp12_mmu.roots_behind(|key| TableAddress::new(key.pointer()) == table),
            Roots::Asid(asid) => self.tdp12_mmu.roots_behind(|key| key.tag().context == asid),
            Roots::All => self.tdp12_mmu.roots_behind(|_| true),
        };
        let flush = if requests.flush == TagFlush::All { TagFlush::All } else { request.l2 };
        Requests { flush, ..requests }
    }
}

/// `mmu` has to flush this at its next entry.
fn note(mmu: &mut Mmu, flush: TagFlush) {
    let _ = match flush {
        TagFlush::None => TagFlush::None,
        TagFlush::Address(address) => mmu.flush_address(address),
        TagFlush::All => mmu.flush(),
    };
}

/// INVVPID (Intel SDM vol. 3, 31.3), after its operands were checked: no VPID is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invvpid {
    /// Type 0.
    Address {
        /// The VPID.
        vpid: u16,
        /// The linear address.
        address: Gva,
    },
    /// Type 1.
    Single {
        /// The VPID.
        vpid: u16,
    },
    /// Type 2.
    All,
    /// Type 3.
    SingleRetainingGlobals {
        /// The VPID.
        vpid: u16,
    },
}

/// TLB_CONTROL of a VMCB (AMD APM vol. 2, 15.16.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbControl {
    /// 0.
    Nothing,
    /// 1: all entries of all ASIDs.
    Everything,
    /// 3: this guest's.
    Asid,
    /// 7: this guest's, but for global ones.
    AsidRetainingGlobals,
}

impl TlbControl {
    /// The field's value; `None` for those that are reserved, which VMRUN refuses.
    pub const fn new(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Nothing),
            1 => Some(Self::Everything),
            3 => Some(Self::Asid),
            7 => Some(Self::AsidRetainingGlobals),
            _ => None,
        }
    }
}

/// The hardware tag that a vCPU's L2s run with, one after the other, and whose translations it may hold.
///
/// L1 has names for them, VPIDs or ASIDs. An event that names another than the last L2 concerns nothing in the tag, for that
/// was flushed when the other came.
#[derive(Debug)]
pub struct L2Tag {
    own: bool,
    holds: Option<u16>,
}

impl L2Tag {
    /// `own` says that L1 runs with another tag; if not, each transition flushes the one they share.
    pub const fn new(own: bool) -> Self {
        Self { own, holds: None }
    }

    /// Whether L1 has another tag.
    pub const fn is_own(&self) -> bool {
        self.own
    }

    /// VM entry into an L2 of this VPID. Without one (VPID 0000H, which is also that of L1), entries and exits invalidate both
    /// sides' linear translations.
    pub fn vm_entry(&mut self, vpid: Option<u16>) -> L2Request {
        let flush = vpid.is_none() && !mutant::drops(FlushSite::VmEntry);
        let l1 = if flush { TagFlush::All } else { TagFlush::None };
        L2Request { l2: self.hold(vpid), l1, ..L2Request::NONE }
    }

    /// VM exit to L1 from an L2 of this VPID.
    pub fn vm_exit(&mut self, vpid: Option<u16>) -> L2Request {
        if vpid.is_none() {
            self.holds = None;
        }
        let flush = (vpid.is_none() || !self.own) && !mutant::drops(FlushSite::VmExit);
        L2Request { l1: if flush { TagFlush::All } else { TagFlush::None }, ..L2Request::NONE }
    }

    /// INVVPID by L1. It takes no translations of L2's physical addresses.
    pub fn invvpid(&mut self, what: Invvpid) -> L2Request {
        let l2 = match what {
            Invvpid::Address { .. } if mutant::drops(FlushSite::InvvpidAddress) => TagFlush::None,
            Invvpid::Single { .. } | Invvpid::SingleRetainingGlobals { .. }
                if mutant::drops(FlushSite::InvvpidSingle) =>
            {
                TagFlush::None
            }
            Invvpid::All if mutant::drops(FlushSite::InvvpidAll) => TagFlush::None,
            Invvpid::Address { vpid, address } if self.holds == Some(vpid) => TagFlush::Address(address),
            Invvpid::Single { vpid } | Invvpid::SingleRetainingGlobals { vpid }
                if self.holds == Some(vpid) =>
            {
                TagFlush::All
            }
            Invvpid::All if self.holds.is_some() => TagFlush::All,
            _ => TagFlush::None,
        };
        L2Request { l2, ..L2Request::NONE }
    }

    /// INVEPT by L1 of type 1, with this EPT pointer, which VM entry would accept.
    pub fn invept_single(&mut self, pointer: u64) -> L2Request {
        if mutant::drops(FlushSite::InveptSingle) {
            return L2Request::NONE;
        }
        L2Request { roots: Roots::Of(TableAddress::new(pointer)), ..L2Request::NONE }
    }

    /// INVEPT by L1 of type 2.
    pub fn invept_global(&mut self) -> L2Request {
        if mutant::drops(FlushSite::InveptAll) {
            return L2Request::NONE;
        }
        L2Request { roots: Roots::All, ..L2Request::NONE }
    }

    /// VMRUN of an L2 with this ASID.
    pub fn vmrun(&mut self, asid: u16, control: TlbControl) -> L2Request {
        let l2 = self.hold(Some(asid));
        match control {
            TlbControl::Everything if mutant::drops(FlushSite::TlbControlAll) => {
                L2Request { l2, ..L2Request::NONE }
            }
            TlbControl::Asid | TlbControl::AsidRetainingGlobals
                if mutant::drops(FlushSite::TlbControlAsid) =>
            {
                L2Request { l2, ..L2Request::NONE }
            }
            TlbControl::Nothing => L2Request { l2, ..L2Request::NONE },
            TlbControl::Everything => L2Request { roots: Roots::All, l2: TagFlush::All, l1: TagFlush::All },
            TlbControl::Asid | TlbControl::AsidRetainingGlobals => {
                L2Request { roots: Roots::Asid(asid), l2: TagFlush::All, l1: TagFlush::None }
            }
        }
    }

    /// #VMEXIT to L1.
    pub fn vmexit(&mut self) -> L2Request {
        let kept = self.own || mutant::drops(FlushSite::Vmexit);
        L2Request { l1: if kept { TagFlush::None } else { TagFlush::All }, ..L2Request::NONE }
    }

    /// INVLPGA by L1. ASID zero is L1's own. Which of L2's physical addresses lie behind a linear one is not known here, so
    /// whole roots are synced.
    pub fn invlpga(&mut self, address: Gva, asid: u16) -> L2Request {
        if mutant::drops(if asid == 0 { FlushSite::InvlpgaL1 } else { FlushSite::InvlpgaL2 }) {
            return L2Request::NONE;
        }
        if asid == 0 {
            return L2Request { l1: TagFlush::Address(address), ..L2Request::NONE };
        }
        let l2 = if self.holds == Some(asid) { TagFlush::Address(address) } else { TagFlush::None };
        L2Request { roots: Roots::Asid(asid), l2, l1: TagFlush::None }
    }

    /// The tag is L2's of this name from now on: whether what it holds must go.
    fn hold(&mut self, name: Option<u16>) -> TagFlush {
        let same = self.own && name.is_some() && self.holds == name;
        self.holds = if self.own { name } else { None };
        if same || mutant::drops(FlushSite::AnotherName) {
            TagFlush::None
        } else {
            TagFlush::All
        }
    }
}
