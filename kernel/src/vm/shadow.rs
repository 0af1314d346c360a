//! A VM's shadow kind, for VMs whose addresses are translated by shadow tables alone: its memory, and what its vCPUs and
//! devices do with it.
//!
//! Every operation has the VM's exclusive guard; the lock around the kind is taken under it and so never waits.
#![allow(unsafe_code)] // Frames become table pages, and leaked slices are taken back.

use super::memory::HostMemory;
use crate::hw::shadowed::ShadowFormat;
use crate::hw::OutOfMemory;
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr::NonNull;
use mmu::{
    CpuId, Exclusive, Npt, PhysTables, ShadowBucket, ShadowMmu, ShadowPage, ShadowStore, TablePage, VmMemory,
};
use spin::Mutex;

/// The shadow kind as the kernel has it: guests' own tables are shadowed in the format of long mode, or of PAE.
pub(super) type Kind = ShadowMmu<'static, Npt, PhysTables>;

/// Shadow pages that a VM has for each 1,000 pages of its RAM, as KVM has them, and bounds for that.
const PAGES_PER_THOUSAND: u64 = 20;
const MIN_PAGES: u64 = 256;
const MAX_PAGES: u64 = 1 << 16;

/// The shadow kind of a VM, and the memory that it keeps its notes in.
pub(super) struct Shadow {
    /// Taken out only to be dismantled, before the store is given back.
    kind: Mutex<Option<Kind>>,
    store: Store,
}

/// Owns what the kind has slices of.
struct Store {
    pages: NonNull<[ShadowPage]>,
    buckets: NonNull<[ShadowBucket]>,
}

// SAFETY: the slices belong to this value, and nobody uses them through it but `Drop`.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: both come from `Box::leak`, and the kind that had the slices is gone: `Shadow` drops it first.
        unsafe {
            drop(Box::from_raw(self.pages.as_ptr()));
            drop(Box::from_raw(self.buckets.as_ptr()));
        }
    }
}

/// A boxed slice of `count` values, without a panic where there is no memory.
fn boxed<T>(count: usize, value: impl FnMut() -> T) -> Result<Box<[T]>, OutOfMemory> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|_| OutOfMemory)?;
    values.resize_with(count, value);
    Ok(values.into_boxed_slice())
}

impl Shadow {
    /// A shadow kind for `memory`, with `ram_bytes` of RAM, whose tables are made of the frames of `tables`.
    pub(super) fn new(
        memory: &VmMemory<HostMemory>,
        format: &ShadowFormat,
        tables: PhysTables,
        ram_bytes: u64,
    ) -> Result<Self, OutOfMemory> {
        let count = (ram_bytes / 4096 * PAGES_PER_THOUSAND / 1000).clamp(MIN_PAGES, MAX_PAGES) as usize;
        let pages = boxed(count, || ShadowPage::UNUSED)?;
        let buckets = boxed(count, || ShadowBucket::EMPTY)?;
        let (pages, buckets) = (Box::leak(pages), Box::leak(buckets));
        let store = Store { pages: NonNull::from(&mut *pages), buckets: NonNull::from(&mut *buckets) };
        let slices = ShadowStore { pages, buckets };
        let kind = Kind::new(memory, format.long, format.pae, tables, slices).ok_or(OutOfMemory)?;
        Ok(Self { kind: Mutex::new(Some(kind)), store })
    }

    /// Does `work` with the kind, and the VM for itself.
    #[inline(always)]
    pub(super) fn with<'m, R>(
        &self,
        memory: &'m VmMemory<HostMemory>,
        cpu: CpuId,
        work: impl FnOnce(&mut Kind, &mut Exclusive<'m, HostMemory>) -> R,
    ) -> R {
        let mut guard = memory.exclusive(cpu);
        let mut kind = self.kind.lock();
        work(kind.as_mut().expect("taken out by `dismantle` only"), &mut guard)
    }

    /// Gives every table page to `free`. No vCPU of the VM runs any more.
    pub(super) fn dismantle(self, free: impl FnMut(TablePage)) {
        let Self { kind, store } = self;
        if let Some(kind) = kind.into_inner() {
            kind.dismantle(free);
        }
        drop(store);
    }
}
