//! An access that L2's second stage refused: whose tables have caused it, and what becomes of it.
//!
//! ```text
//! exit of L2 ─> L2Exit ─> Tdp12::walk_exit ── L1's tables say no ──> ToL1: an exit for L1
//!                          guard: Shared   └─ they permit it ─> VcpuMmus::l2_fault ─> Here: mapped, or to emulate
//!                                                                guard: Exclusive
//! ```
use super::tables::Tdp12;
use crate::access::{Access, AccessKind, Agent, Prot};
use crate::addr::{Gpa, Gva, NGpa};
use crate::format::EntryFormat;
use crate::kind::{ShadowDone, ShadowFault, ShadowMmu};
use crate::memory::{Backing, Exclusive, Shared};
use crate::mutant::{self, FlushSite, Mutant};
use crate::tables::{TableCache, TableMemory};
use crate::vcpu::VcpuMmus;
use crate::walk::{
    EptViolation, FaultInfo, GuestWalk, Linear, MarkObserver, NpfInfo, Observed, PageFaultCode, Place,
    WalkError,
};

/// An access of L2 that the second stage refused, as the processor tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Exit {
    /// The address that was asked of the second stage.
    pub at: NGpa,
    /// The access that was asked of it.
    pub access: Access,
    /// Whether it was to an entry of L2's own tables.
    pub place: Place,
    /// The linear address behind it, if the processor tells.
    pub linear: Option<Linear>,
}

/// What L1's tables say about an [`L2Exit`].
#[derive(Clone, Copy, Debug)]
pub struct L2Walk {
    exit: L2Exit,
    found: Result<GuestWalk<Gpa>, WalkError>,
    /// PAE's pointers, as the walk may have found them.
    pdptes: [u64; 4],
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Fault {
    /// L1's tables do not permit the access: L1 gets this as an exit, as [`FaultInfo::ept_exit`] or [`FaultInfo::npf_info`]
    /// gives it.
    ToL1(FaultInfo),
    /// L1 gets the exit "page-modification log full". Nothing was changed.
    LogFull,
    /// L1's tables permit the access. This is between Umbra and its shadow, and L1 does not notice; where it says to emulate
    /// the access, that is L2's instruction.
    Here(ShadowFault),
}

impl L2Exit {
    /// An EPT violation with this exit qualification (Intel SDM vol. 3, table 28-7). An EPT misconfiguration, which so is a
    /// note about device memory, has none: zero is a read, and if L2's instruction did more, its emulation finds out.
    pub fn from_ept(at: NGpa, qualification: u64, linear: Gva) -> Self {
        let bits = EptViolation::from_bits_truncate(qualification);
        let kind = if bits.contains(EptViolation::WRITE) {
            AccessKind::Write
        } else if bits.contains(EptViolation::FETCH) {
            AccessKind::Execute
        } else {
            AccessKind::Read
        };
        let valid = bits.contains(EptViolation::LINEAR_VALID);
        let walk = valid && !bits.contains(EptViolation::LINEAR_FINAL);
        let mut prot = Prot::empty();
        if !walk {
            prot.insert(Prot::READ);
            prot.set(Prot::USER, bits.contains(EptViolation::LINEAR_USER));
            prot.set(Prot::WRITE, bits.contains(EptViolation::LINEAR_WRITABLE));
            prot.set(Prot::EXECUTE, !bits.contains(EptViolation::LINEAR_NO_EXECUTE));
        }
        // Fetches alone are told apart, and they by the linear address.
        let user = kind != AccessKind::Execute || prot.contains(Prot::USER);
        Self {
            at,
            access: Access { kind, agent: if user { Agent::User } else { Agent::Supervisor } },
            place: if walk && !mutant::is(Mutant::ExitAlwaysFinal) { Place::TableWalk } else { Place::Final },
            linear: valid.then_some(Linear { address: linear, prot }),
        }
    }

    /// A nested page fault with this EXITINFO1 (AMD APM vol. 2, 15.25.6).
    pub fn from_npf(at: NGpa, exit_info_1: u64) -> Self {
        let info = NpfInfo::from_bits(exit_info_1);
        let kind = info.access();
        // Guest mode execute trap shows a fetch of L2's supervisor as one.
        let user = kind != AccessKind::Execute || info.code.contains(PageFaultCode::USER);
        let agent = if user { Agent::User } else { Agent::Supervisor };
        Self { at, access: Access { kind, agent }, place: info.place, linear: None }
    }
}

impl Tdp12 {
    /// Walks L1's tables for an access that the second stage refused, as a processor walks them; `observer` hears of what
    /// that marks. What they do not permit is L1's to know, with what the processor said of the linear address.
    pub fn walk_exit<B: Backing, O: MarkObserver>(
        &self,
        guard: &Shared<'_, B>,
        exit: &L2Exit,
        observer: &O,
    ) -> L2Walk {
        let tables = Observed { memory: guard, observer };
        let found = self.context().walk(&tables, &self.regs(), exit.at, exit.access);
        L2Walk { exit: *exit, found, pdptes: self.pdptes(guard) }
    }
}

impl VcpuMmus {
    /// Makes of a walk what follows, for L2 that runs on `tdp12`: an exit to L1, if L1's tables have caused the fault, and
    /// only then; otherwise the shadow has not said yet what they say, or Umbra does not want it said, of device memory,
    /// read-only or logged slots, and tables that L2 can reach.
    ///
    /// An exit to L1 also ends what the shadow says of the address, in every root for the same table: L1 may rely on that the
    /// exit itself invalidates it (Intel SDM vol. 3, 29.4.3.1).
    pub fn l2_fault<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        tdp12: &Tdp12,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        walked: &L2Walk,
    ) -> ShadowDone<L2Fault> {
        let L2Exit { at, access, place, linear } = walked.exit;
        match &walked.found {
            Ok(walk) => {
                let done = self.tdp12_mmu.fault(kind, guard, cache, walk, at, access);
                if done.outcome == ShadowFault::NoRoot
                    && walk.pdpte.is_some()
                    && !mutant::is(Mutant::PointersOfPaeKept)
                {
                    // The pointers are memory, and others now.
                    self.tdp12_mmu.set_nested_pointers(walked.pdptes);
                }
                ShadowDone { outcome: L2Fault::Here(done.outcome), issued: done.issued }
            }
            Err(WalkError::Contended) => {
                ShadowDone { outcome: L2Fault::Here(ShadowFault::Retry), issued: None }
            }
            Err(WalkError::LogFull) => ShadowDone { outcome: L2Fault::LogFull, issued: None },
            Err(WalkError::Fault(fault)) => {
                let mut issued = None;
                let kept = mutant::drops(FlushSite::NestedViolation);
                for root in self.tdp12_mmu.roots_for(tdp12.table()).into_iter().flatten().filter(|_| !kept) {
                    issued = kind.forget_address(guard, root, at).issued.or(issued);
                }
                ShadowDone { outcome: L2Fault::ToL1(FaultInfo { place, linear, ..*fault }), issued }
            }
        }
    }
}
