//! A guest of the reference walk as the crate sees it: its memory, its registers, and comparisons of the two walks.
use std::sync::atomic::Ordering;

use mmu::{
    Access, AccessKind, Agent, CpuId, CpuRole, Cr0, Cr4, Efer, Gfn, GfnRange, Gpa, GuestCpu, Gva,
    PagingContext, PagingRegs, Slot, SlotFlags, VmMemory, WalkError, WalkRegs,
};

use super::super::flat::FlatRam;
use super::{walk, Machine, What, Who};

pub const RAM_BYTES: u64 = 0x8000;
pub const BASE: Machine = Machine {
    pg: true,
    wp: true,
    pse: false,
    pae: true,
    la57: false,
    smep: false,
    smap: false,
    pke: false,
    pks: false,
    lma: true,
    nxe: true,
    maxphyaddr: 46,
    gib_pages: true,
    pse36: true,
    amd: true,
    cr3: 0x1000,
    ac: false,
    pkru: 0,
    pkrs: 0,
};

pub fn memory() -> VmMemory<FlatRam> {
    slotted(FlatRam::new(RAM_BYTES as usize), SlotFlags::empty())
}

pub fn slotted(ram: FlatRam, flags: SlotFlags) -> VmMemory<FlatRam> {
    let memory = VmMemory::new(ram);
    let range = GfnRange::new(Gfn::default(), RAM_BYTES / 4096).unwrap();
    memory.exclusive(CpuId::BOOT).insert_slot(&Slot::new(range, flags, 0)).unwrap();
    memory
}

pub fn context(m: &Machine) -> PagingContext<Gva, Gpa> {
    let (regs, cpu) = registers(m);
    PagingContext::new(CpuRole::new(&regs, &cpu))
}

pub fn registers(m: &Machine) -> (PagingRegs, GuestCpu) {
    let mut cr0 = Cr0::empty();
    cr0.set(Cr0::PG, m.pg);
    cr0.set(Cr0::WP, m.wp);
    let mut cr4 = Cr4::empty();
    for (bit, set) in [
        (Cr4::PSE, m.pse),
        (Cr4::PAE, m.pae),
        (Cr4::LA57, m.la57),
        (Cr4::SMEP, m.smep),
        (Cr4::SMAP, m.smap),
        (Cr4::PKE, m.pke),
        (Cr4::PKS, m.pks),
    ] {
        cr4.set(bit, set);
    }
    let mut efer = Efer::empty();
    efer.set(Efer::LMA, m.lma);
    efer.set(Efer::NXE, m.nxe);
    let cpu =
        GuestCpu { max_phys_addr: m.maxphyaddr as u8, gib_pages: m.gib_pages, pse36: m.pse36, amd: m.amd };
    (PagingRegs { cr0, cr4, efer }, cpu)
}

pub fn regs(m: &Machine) -> WalkRegs {
    WalkRegs { cr3: m.cr3, pkru: m.pkru, pkrs: m.pkrs, ac: m.ac, pdptes: None }
}

pub fn access(what: What, who: Who) -> Access {
    Access {
        kind: match what {
            What::Read => AccessKind::Read,
            What::Write => AccessKind::Write,
            What::Fetch => AccessKind::Execute,
        },
        agent: match who {
            Who::User => Agent::User,
            Who::Supervisor => Agent::Supervisor,
            Who::Implicit => Agent::Implicit,
        },
    }
}

pub fn accesses() -> impl Iterator<Item = (What, Who)> {
    let whats = [What::Read, What::Write, What::Fetch];
    let whos = [Who::User, Who::Supervisor, Who::Implicit];
    whats.into_iter().flat_map(move |what| whos.map(|who| (what, who)))
}

/// A1, A2, A5, F1: the same address, or the same error code; the same bits set, and none on a fault. Memory is put back.
pub fn compare(
    memory: &VmMemory<FlatRam>,
    context: &PagingContext<Gva, Gpa>,
    m: &Machine,
    va: u64,
    what: What,
    who: Who,
) {
    let ram = memory.backing();
    if let Some(result) = walk(m, &|at| ram.get(at), va, what, who).err() {
        // A fault writes nothing: it is enough that nothing was tried.
        let tried = ram.exchanges.load(Ordering::SeqCst);
        compare_fast(memory, context, m, va, what, who);
        assert_eq!(ram.exchanges.load(Ordering::SeqCst), tried, "error {result:#x}");
        return;
    }
    let before: Vec<u64> = (0..RAM_BYTES / 8).map(|word| ram.get(word * 8).unwrap()).collect();
    let expected = walk(m, &|at| ram.get(at).filter(|_| at < RAM_BYTES), va, what, who);
    let shared = memory.shared(CpuId::BOOT);
    let found = context.translate(&shared, &regs(m), Gva::new(va), access(what, who));
    let case = || format!("{m:?} va {va:#x} {what:?} {who:?}");
    let mut after = before.clone();
    match (&expected, &found) {
        (Ok(expected), Ok(found)) => {
            assert_eq!(found.address.bits(), expected.address, "{}", case());
            assert_eq!(found.page_bytes, expected.page_bytes, "{}", case());
            for &(at, entry) in &expected.marks {
                let word = &mut after[at as usize / 8];
                if m.lma || m.pae {
                    *word = entry;
                } else {
                    let shift = (at & 4) * 8;
                    *word = *word & !(0xffff_ffff << shift) | entry << shift;
                }
            }
        }
        _ => panic!("{}: expected {expected:x?}, found {found:x?}", case()),
    }
    for (word, (&old, &want)) in before.iter().zip(&after).enumerate() {
        let at = word as u64 * 8;
        assert_eq!(ram.get(at).unwrap(), want, "entry at {at:#x}: {}", case());
        ram.set(at, old);
    }
}

/// Compares without looking at all of memory: for entries whose accessed and dirty bits are set already.
pub fn compare_fast(
    memory: &VmMemory<FlatRam>,
    context: &PagingContext<Gva, Gpa>,
    m: &Machine,
    va: u64,
    what: What,
    who: Who,
) {
    let ram = memory.backing();
    let expected = walk(m, &|at| ram.get(at), va, what, who).map(|reached| {
        assert!(reached.marks.is_empty());
        (reached.address, reached.page_bytes)
    });
    let shared = memory.shared(CpuId::BOOT);
    let found = context.translate(&shared, &regs(m), Gva::new(va), access(what, who));
    // A7: the walk that says everything gives the same answer.
    let all = context.walk(&shared, &regs(m), Gva::new(va), access(what, who));
    assert_eq!(all.map(|all| all.translation), found);
    let found = match found {
        Ok(found) => Ok((found.address.bits(), found.page_bytes)),
        Err(WalkError::Fault(fault)) => {
            assert_eq!(fault.address, if m.lma { va } else { va & 0xffff_ffff });
            Err(fault.page_fault_code().bits())
        }
        Err(_) => panic!("nobody else is here"),
    };
    assert_eq!(found, expected, "{m:?} va {va:#x} {what:?} {who:?}");
}

pub fn roles(base: Machine) -> impl Iterator<Item = Machine> {
    (0..32u32).map(move |bits| Machine {
        wp: bits & 1 != 0,
        nxe: bits & 2 != 0,
        smep: bits & 4 != 0,
        smap: bits & 8 != 0,
        ac: bits & 16 != 0,
        ..base
    })
}

/// Present, write, user and no-execute of an 8-byte entry, from four bits.
pub fn flags(bits: u64) -> u64 {
    bits & 7 | (bits & 8) << 60 | 0x60
}

/// An address that uses another index at each level.
pub const VA: u64 = 1 << 48 | 3 << 39 | 5 << 30 | 7 << 21 | 9 << 12 | 0x123;

/// Where the entries for [`VA`] are, top first, when tables follow each other from 0x1000 on.
pub fn places(levels: u64) -> Vec<u64> {
    let indexes = [1u64, 3, 5, 7, 9];
    (0..levels).map(|step| (step + 1) * 0x1000 + indexes[(5 - levels + step) as usize] * 8).collect()
}

pub fn link(memory: &VmMemory<FlatRam>, places: &[u64], flags: &[u64]) {
    for (step, (&place, &flags)) in places.iter().zip(flags).enumerate() {
        memory.backing().set(place, ((step as u64 + 2) * 0x1000) | flags);
    }
}
