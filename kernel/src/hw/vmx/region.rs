//! A VMCS in memory: which CPU has it active, which VMCS each CPU works on, and safe access to the fields.
//!
//! A VMCS may be active on one CPU at a time (SDM vol. 3, 25.11.1). It moves lazily: the first access from another CPU
//! makes the CPU that has it write it back.
#![allow(unsafe_code)] // The region is shared with the processor.

use super::cache::FieldsMut;
use super::instructions::{vmclear, vmptrld, vmread, vmwrite, vmwrite_sure};
use super::vmcs::{Field, Fields, Natural, Width};
use crate::cpu::{self, smp};
use crate::hw::OutOfMemory;
use crate::mm::{self, FrameSize, Zone};
use core::cell::Cell;
use core::sync::atomic::{AtomicU64, Ordering};
use x86_64::PhysAddr;

/// A region that is active nowhere.
const NOWHERE: usize = usize::MAX;

/// The current VMCS of each CPU, 0 for none. Entry n is written by CPU n alone.
static CURRENT: [AtomicU64; mmu::MAX_CPUS] = [const { AtomicU64::new(0) }; mmu::MAX_CPUS];

/// The memory of one VMCS.
#[derive(Debug)]
pub(super) struct Region {
    address: PhysAddr,
    /// The CPU that has it active.
    home: Cell<usize>,
    launched: Cell<bool>,
}

impl Region {
    /// A region that no CPU has used, all its fields undefined.
    pub(super) fn new(revision: u32) -> Result<Self, OutOfMemory> {
        let address = mm::alloc_zeroed(FrameSize::Size4K, Zone::Any).ok_or(OutOfMemory)?;
        // SAFETY: the frame is ours and no processor knows it yet. Bits 30:0 of its first word are the revision.
        unsafe { mm::phys::write(address, &revision.to_le_bytes()) };
        Ok(Self { address, home: Cell::new(NOWHERE), launched: Cell::new(false) })
    }

    /// Whether the next entry is a VMRESUME.
    #[inline]
    pub(super) fn launched(&self) -> bool {
        self.launched.get()
    }

    /// Notes that a VMLAUNCH has succeeded.
    #[inline]
    pub(super) fn set_launched(&self) {
        self.launched.set(true);
    }

    /// Makes it the current VMCS of the CPU that runs this.
    #[inline]
    fn make_current(&self) {
        self.make_current_on(cpu::this().index());
    }

    #[inline]
    fn make_current_on(&self, this: usize) {
        if CURRENT[this].load(Ordering::Relaxed) != self.address.as_u64() {
            self.load(this);
        }
    }

    /// The fields without a look at each access whether this VMCS is the current one; `this` is the CPU's index.
    ///
    /// # Safety
    /// As long as the result is used, this CPU makes no other VMCS current, nor this one inactive: interrupts are off, and
    /// nobody touches another region.
    #[inline]
    pub(super) unsafe fn current_on(&self, this: usize) -> Current {
        self.make_current_on(this);
        Current(())
    }

    /// The same on the CPU that runs this.
    ///
    /// # Safety
    /// As for [`Self::current_on`].
    #[inline]
    pub(super) unsafe fn current(&self) -> Current {
        // SAFETY: promised by the caller.
        unsafe { self.current_on(cpu::this().index()) }
    }

    #[cold]
    #[inline(never)]
    fn load(&self, this: usize) {
        if self.home.get() != this {
            // Also the first time, when VMCLEAR initializes what the processor keeps in the region.
            self.clear();
        }
        // SAFETY: VMX is on wherever vCPUs are made or run, and the region is active on no other CPU.
        unsafe { vmptrld(self.address) }.expect("an aligned region with the processor's own revision");
        CURRENT[this].store(self.address.as_u64(), Ordering::Relaxed);
        self.home.set(this);
    }

    /// Writes a field by its encoding, which an entry is to refuse: see [`super::spoil`].
    #[cold]
    pub(super) fn spoil(&self, encoding: u32, value: u64) {
        self.make_current();
        // SAFETY: for tests alone, which ask for values that no processor enters a guest with.
        let outcome = unsafe { vmwrite(Field::<Natural>::from_encoding(encoding), value) };
        debug_assert!(outcome.is_ok(), "VMCS field {encoding:#x}: {outcome:?}");
    }

    /// Makes it active nowhere.
    fn clear(&self) {
        fn clear_here(address: usize) {
            let address = PhysAddr::new(address as u64);
            // SAFETY: VMX is on where a VMCS was active, and the region is one.
            unsafe { vmclear(address) }.expect("an aligned region that is not the VMXON region");
            let current = &CURRENT[cpu::this().index()];
            if current.load(Ordering::Relaxed) == address.as_u64() {
                current.store(0, Ordering::Relaxed);
            }
        }
        let address = self.address.as_u64() as usize;
        match self.home.replace(NOWHERE) {
            NOWHERE => clear_here(address),
            home => {
                // The other CPU takes calls between two entries at the latest.
                while smp::run_on_and_wait(home, clear_here, address).is_err() {
                    log::warn!("CPU {home} is slow to give up a VMCS");
                }
            }
        }
        self.launched.set(false);
    }
}

impl FieldsMut for Region {
    #[inline]
    fn set<W: Width>(&self, field: Field<W>, value: W::Value) {
        self.make_current();
        // SAFETY: this CPU is in VMX operation, for it has a current VMCS. The fields that name memory or decide what the
        // host runs after an exit are written by `setup.rs` alone, with what the vCPU owns.
        unsafe { vmwrite_sure(field, value) };
    }
}

impl Fields for Region {
    #[inline]
    fn read<W: Width>(&self, field: Field<W>) -> W::Value {
        self.make_current();
        // SAFETY: as in `set`.
        unsafe { vmread(field) }
    }
}

/// The VMCS that is known to be current; see [`Region::current_on`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Current(());

impl FieldsMut for Current {
    #[inline(always)]
    fn set<W: Width>(&self, field: Field<W>, value: W::Value) {
        // SAFETY: as in the region's own `set`; that the VMCS is current was promised when this was made.
        unsafe { vmwrite_sure(field, value) };
    }
}

impl Fields for Current {
    #[inline(always)]
    fn read<W: Width>(&self, field: Field<W>) -> W::Value {
        // SAFETY: as in `set`.
        unsafe { vmread(field) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.home.get() != NOWHERE {
            self.clear();
        }
        mm::free(self.address, FrameSize::Size4K);
    }
}
