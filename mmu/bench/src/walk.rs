//! Walks of a guest's tables of four levels, A bits set.
use std::hint::black_box;

use mmu::{
    Access, AccessKind, CpuRole, Cr0, Cr4, Efer, Gpa, GuestCpu, Gva, PageSize, PagingContext, PagingRegs,
    TableSource, WalkRegs,
};

use crate::meter::Meter;
use crate::ram::{Ram, CPU};

/// The address that every walk is for, of any crate.
pub(crate) const VA: u64 = 3 << 39 | 5 << 30 | 7 << 21 | 9 << 12 | 0x123;

/// Walks in one measurement.
pub(crate) const WALKS: u64 = 1000;

fn tables() -> Ram {
    let ram = Ram::new(1 << 20, 8, PageSize::Size4K);
    for (at, entry) in [(0x1018, 0x2067), (0x2028, 0x3067), (0x3038, 0x4067), (0x4048, 0x5067)] {
        ram.set(at, entry);
    }
    ram
}

fn context() -> PagingContext<Gva, Gpa> {
    let regs = PagingRegs {
        cr0: Cr0::PG | Cr0::WP,
        cr4: Cr4::PAE | Cr4::SMEP | Cr4::SMAP,
        efer: Efer::LMA | Efer::NXE,
    };
    let cpu = GuestCpu { max_phys_addr: 46, gib_pages: true, pse36: true, amd: true };
    PagingContext::new(CpuRole::new(&regs, &cpu))
}

#[inline(always)]
fn walks(tables: &impl TableSource<Gpa>) {
    let (context, regs) = (context(), WalkRegs { cr3: 0x1000, ..WalkRegs::default() });
    // Nothing of a walk may be computed beforehand.
    let (context, regs) = black_box((&context, &regs));
    for _ in 0..WALKS {
        let access = Access::at_cpl(AccessKind::Execute, 3);
        let found = context.translate(tables, regs, black_box(Gva::new(VA)), access);
        assert!(found.is_ok_and(|found| found.address.bits() == 0x5123));
    }
}

/// Entries are read by way of the slots.
pub(crate) fn slots(meter: Meter<'_>) {
    meter.measure(WALKS, || tables().into_memory(), |memory| walks(&memory.shared(CPU)));
}

/// Entries are read out of an array.
pub(crate) fn flat(meter: Meter<'_>) {
    meter.measure(WALKS, tables, |ram| walks(ram));
}
