//! The direct kind: guest-physical to host-physical, straight from the slots.
use super::counters::Counters;
use super::flush::Freed;
use super::MmuKind;
use crate::addr::{Gpa, Hpa, Pfn};
use crate::cpu::CpuId;
use crate::format::{Entry, EntryFormat};
use crate::level::{Level, PageSize, ENTRIES};
use crate::memory::VmMemory;
use crate::tables::{EntryCell, TableFrame, TableMemory, TablePage};

/// What the direct kind has beside a format and tables: one root, and the limits of its guest.
#[derive(Debug)]
pub struct Direct {
    root: Pfn,
    largest: PageSize,
    guest_bits: u32,
}

/// The direct kind: the sketch's `direct_mmu`.
pub type DirectMmu<F, M> = MmuKind<F, M, Direct>;

/// A root that the CPU can be pointed at: NCR3, an EPT pointer, or CR3 without its low bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// Address of the root table.
    pub hpa: Hpa,
    /// Level of the root table: how deep the CPU walks.
    pub level: Level,
}

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
        let ops = Direct { root: root.into_frame(), largest, guest_bits };
        Self { vm: memory.id(), format, tables, freed: Freed::new(), counters, ops }
    }

    /// What the CPU is pointed at.
    #[inline]
    pub fn root(&self) -> Root {
        Root { hpa: self.ops.root.hpa(), level: self.format.top() }
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

    #[inline]
    pub(super) fn root_table(&self) -> TableFrame {
        TableFrame::linked(self.ops.root)
    }

    /// Takes the kind apart and gives every table page to `free`.
    ///
    /// The kind is consumed, so no operation runs. The caller sees to it that no CPU is in the guest on this root, and
    /// that each CPU flushes the tags it used with it before they are used again.
    pub fn dismantle(self, mut free: impl FnMut(TablePage)) {
        self.release_freed(&mut free);
        self.release(self.ops.root, self.format.top(), &mut free);
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
        free(self.zeroed(table));
    }
}
