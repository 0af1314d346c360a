//! The direct kind: guest-physical to host-physical, straight from the slots.
use super::counters::Counters;
use super::flush::Freed;
use super::roots::Roots;
use super::MmuKind;
use crate::addr::{Gpa, Pfn};
use crate::cpu::CpuId;
use crate::format::{Entry, EntryFormat};
use crate::level::{Level, PageSize, ENTRIES};
use crate::memory::{Quiescent, VmMemory};
use crate::sync::{AtomicBool, AtomicU64};
use crate::tables::{EntryCell, TableFrame, TableMemory, TablePage};

/// What the direct kind has beside a format and tables: roots, the limits of its guest, and what was switched on.
#[derive(Debug)]
pub struct Direct {
    pub(super) roots: Roots,
    largest: PageSize,
    guest_bits: u32,
    /// Huge pages are not executable.
    pub(super) no_huge_execute: AtomicBool,
    /// Links with the note of a split for that reason.
    pub(super) splits: AtomicU64,
    /// The epoch that MMIO entries are of, plus one; zero while none are made.
    pub(super) mmio_epoch: AtomicU64,
}

/// The direct kind: the sketch's `direct_mmu`.
pub type DirectMmu<F, M> = MmuKind<F, M, Direct>;

impl<F: EntryFormat, M: TableMemory> DirectMmu<F, M> {
    /// A direct kind for the VM whose memory is `memory`, with nothing mapped.
    ///
    /// `guest_bits` is the guest's physical address width (CPUID 8000_0008 EAX bits 7:0 as the guest sees it); `largest` is
    /// the largest page to map, further limited by what the format has.
    pub fn new<B>(
        memory: &VmMemory<B>,
        format: F,
        tables: M,
        root: TablePage,
        guest_bits: u32,
        largest: PageSize,
    ) -> Self {
        memory.count_direct_kind();
        let guest_bits = guest_bits.min(format.input_bits());
        let mut largest = largest;
        while !format.has_size(largest) {
            match largest.smaller() {
                Some(smaller) => largest = smaller,
                None => break,
            }
        }
        let counters = Counters::new();
        counters.tables(CpuId::BOOT, 1);
        let ops = Direct {
            roots: Roots::new(root, memory.root_generation()),
            largest,
            guest_bits,
            no_huge_execute: AtomicBool::new(false),
            splits: AtomicU64::new(0),
            mmio_epoch: AtomicU64::new(0),
        };
        Self { vm: memory.id(), format, tables, freed: Freed::new(), counters, ops }
    }

    /// The largest page that is mapped.
    pub const fn largest(&self) -> PageSize {
        self.ops.largest
    }

    /// Whether the guest's physical address space holds `gpa`.
    #[inline]
    pub(super) fn reaches(&self, gpa: Gpa) -> bool {
        gpa.bits() >> self.ops.guest_bits == 0
    }

    /// Takes the kind apart and gives every table page to `free`.
    ///
    /// The kind is consumed, so no operation runs. The caller sees to it that no CPU is in the guest on its roots, and
    /// that each CPU flushes the tags it used with it before they are used again.
    pub fn dismantle(self, mut free: impl FnMut(TablePage)) {
        self.release_freed(&mut free);
        for root in self.ops.roots.all() {
            self.release(root.pfn(), self.format.top(), &mut free);
        }
    }

    fn release(&self, table: Pfn, level: Level, free: &mut impl FnMut(TablePage)) {
        if let Some(below) = level.down() {
            for index in 0..ENTRIES {
                let entry = self.cell(&TableFrame::linked(table), index).load();
                if let Entry::Table(child) = self.format.entry(entry, level) {
                    self.release(child, below, free);
                }
            }
        }
        free(self.zeroed(table, &Quiescent::dismantled()));
    }
}
