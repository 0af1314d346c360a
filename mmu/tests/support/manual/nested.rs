//! Reference walk of L2 addresses through both stages, put together from the walks of each (Intel SDM vol. 3, 29.3.3; AMD APM
//! vol. 2, 15.25.6), and the crate's walk in the same terms.
use std::cell::RefCell;
use std::collections::HashSet;

use mmu::{
    CpuId, CpuRole, EptExit, Gpa, GuestEpt, Gva, NGpa, NestedTables, NestedWalk, PagingContext, Stage,
    VmMemory, WalkError, WalkRegs,
};

use super::super::flat::FlatRam;
use super::guest::{access, registers, regs};
use super::{ept, walk, Machine, Rights, What, Who};

/// How L1's tables are read.
#[derive(Clone, Copy, Debug)]
pub enum Below {
    Ept(ept::Machine),
    /// Nested tables of AMD, with guest mode execute trap or not.
    Npt(Machine),
}

/// What L1 is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// EPT violation with this exit qualification.
    Violation(u64),
    Misconfiguration,
    /// Nested page fault with this EXITINFO1.
    NestedPageFault(u64),
}

/// How an access of L2 ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At this address of L1.
    At(u64),
    /// L2 gets a page fault with this error code.
    PageFault(u32),
    /// L1 gets an exit for this L2 address.
    ToL1(u64, Exit),
}

/// An address of L1, and the entries that change on the way there.
type Located = (u64, Vec<(u64, u64)>);

/// Addresses of words.
type Words = RefCell<HashSet<u64>>;

impl Below {
    /// The reference: where the L2 address leads. `kind` is the access, `user` who fetches, in the sense of the format;
    /// `qualification` is bits 11:7 of an exit qualification.
    fn locate(
        &self,
        word: &dyn Fn(u64) -> Option<u64>,
        gpa: u64,
        (kind, user): (What, bool),
        (table_walk, qualification): (bool, u64),
    ) -> Result<Located, (u64, Exit)> {
        match self {
            Below::Ept(m) => {
                let (op, op_bits) = match kind {
                    What::Read => (ept::Op::Read, 1),
                    What::Write => (ept::Op::Write, if table_walk { 3 } else { 2 }),
                    What::Fetch => (ept::Op::Fetch { user }, 4),
                };
                match ept::walk(m, word, gpa, op) {
                    Ok(reached) => Ok((reached.address, reached.marks)),
                    Err(ept::Failed::Misconfiguration) => Err((gpa, Exit::Misconfiguration)),
                    Err(ept::Failed::Violation(rights)) => {
                        Err((gpa, Exit::Violation(op_bits | rights | qualification)))
                    }
                }
            }
            Below::Npt(m) => {
                let who = if user { Who::User } else { Who::Supervisor };
                let place = if table_walk { 2u64 << 32 } else { 1 << 32 };
                // There is no entry for an address that the tables have no bits for.
                let nothing = |_| None;
                let bits = if !m.lma {
                    32
                } else if m.la57 {
                    57
                } else {
                    48
                };
                let word = if gpa >> bits == 0 { word } else { &nothing };
                match walk(m, word, gpa, kind, who) {
                    Ok(reached) => Ok((reached.address, reached.marks)),
                    Err(code) => Err((gpa, Exit::NestedPageFault(place | u64::from(code)))),
                }
            }
        }
    }

    /// Sets entries of L1's tables.
    fn mark(&self, ram: &FlatRam, marks: &[(u64, u64)]) {
        let short = matches!(self, Below::Npt(m) if is_short(m));
        marks.iter().for_each(|&(at, entry)| set(ram, short, at, entry));
    }

    /// The reference: an access of L2, both stages. Marks memory.
    ///
    /// Says too whether a word has entries of both stages: then the order of marks decides, which is the processor's affair.
    pub fn end(&self, ram: &FlatRam, l2: &Machine, va: u64, what: What, who: Who) -> (End, bool) {
        let (of_l1, of_l2) = (RefCell::new(HashSet::new()), RefCell::new(HashSet::new()));
        let end = self.end_noting(ram, l2, va, (what, who), (&of_l1, &of_l2));
        (end, !of_l1.into_inner().is_disjoint(&of_l2.into_inner()))
    }

    /// The same; words with entries of L1 and of L2 are noted.
    fn end_noting(
        &self,
        ram: &FlatRam,
        l2: &Machine,
        va: u64,
        (what, who): (What, Who),
        (of_l1, of_l2): (&Words, &Words),
    ) -> End {
        let failed = RefCell::new(None);
        let below = |at| {
            of_l1.borrow_mut().insert(at);
            ram.get(at)
        };
        let reads_write = match self {
            Below::Ept(m) => m.accessed_dirty,
            Below::Npt(_) => true,
        };
        let table = |gpa: u64, kind| match self.locate(&below, gpa, (kind, true), (true, 1 << 7)) {
            Ok((at, marks)) => {
                self.mark(ram, &marks);
                of_l2.borrow_mut().insert(at & !7);
                Some(at)
            }
            Err(exit) => {
                failed.replace(Some(exit));
                None
            }
        };
        let word = |gpa: u64| ram.get(table(gpa, if reads_write { What::Write } else { What::Read })?);
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
            set(ram, is_short(l2), at, entry);
        }
        // Who fetches: by linear address under mode-based execute control, by privilege level under guest mode execute trap.
        let Rights { writable, user: user_address, executable } = reached.rights;
        let user = match self {
            _ if what != What::Fetch => true,
            Below::Ept(_) => user_address,
            Below::Npt(m) => !m.smep || who == Who::User,
        };
        let advanced =
            u64::from(user_address) << 9 | u64::from(writable) << 10 | u64::from(!executable) << 11;
        match self.locate(&below, reached.address, (what, user), (false, 3 << 7 | advanced)) {
            Ok((at, marks)) => {
                self.mark(ram, &marks);
                End::At(at)
            }
            Err((gpa, exit)) => End::ToL1(gpa, exit),
        }
    }

    /// The crate's context, and the root.
    pub fn context(&self) -> (PagingContext<NGpa, Gpa>, u64) {
        match self {
            Below::Ept(m) => {
                let cpu = GuestEpt {
                    max_phys_addr: m.maxphyaddr as u8,
                    execute_only: m.execute_only,
                    five_level: false,
                    mib_pages: m.mib_pages,
                    gib_pages: m.gib_pages,
                    accessed_dirty: true,
                    advanced_info: true,
                    mode_based_execute: m.mode_based,
                };
                let pointer = m.root | 0x1e | u64::from(m.accessed_dirty) << 6;
                (PagingContext::new(CpuRole::ept(pointer, &cpu).unwrap()), pointer)
            }
            Below::Npt(m) => {
                let (regs, cpu) = registers(m);
                (PagingContext::new(CpuRole::nested(&regs, &cpu, m.smep)), m.cr3)
            }
        }
    }
}

/// Whether entries have 4 bytes.
fn is_short(m: &Machine) -> bool {
    !m.lma && !m.pae
}

fn set(ram: &FlatRam, short: bool, at: u64, entry: u64) {
    match short {
        true => ram.set_u32(at, entry as u32),
        false => ram.set(at, entry),
    }
}

/// How the crate ends it.
pub fn found(memory: &VmMemory<FlatRam>, below: &Below, l2: &Machine, va: u64, what: What, who: Who) -> End {
    let (tables, root) = below.context();
    let l2_context = registers(l2);
    let l2_context = PagingContext::<Gva, NGpa>::new(CpuRole::new(&l2_context.0, &l2_context.1));
    let shared = memory.shared(CpuId::BOOT);
    let walk = NestedWalk {
        context: &l2_context,
        regs: regs(l2),
        tables: NestedTables {
            context: &tables,
            regs: WalkRegs { cr3: root, ..WalkRegs::default() },
            memory: &shared,
        },
    };
    match walk.translate(Gva::new(va), access(what, who)) {
        Ok(found) => End::At(found.address.bits()),
        Err(WalkError::Fault(fault)) if fault.stage == Stage::Gva => {
            assert_eq!(fault.address, if l2.lma { va } else { va & 0xffff_ffff });
            End::PageFault(fault.page_fault_code().bits())
        }
        Err(WalkError::Fault(fault)) => {
            let linear = if l2.lma { va } else { va & 0xffff_ffff };
            assert_eq!(fault.linear.unwrap().address, Gva::new(linear));
            let exit = match (below, fault.ept_exit()) {
                (Below::Npt(_), _) => Exit::NestedPageFault(fault.npf_info().bits()),
                (_, EptExit::Misconfiguration) => Exit::Misconfiguration,
                (_, EptExit::Violation(info)) => Exit::Violation(info.bits()),
            };
            End::ToL1(fault.address, exit)
        }
        Err(other) => panic!("{other:?}"),
    }
}
