//! Legacy PAE tables, as a 32-bit guest's shadow has them: AMD APM vol. 2, 5.2.3; Intel SDM vol. 3, 4.4.
use super::{Entry, EntryFormat, Leaf, MemoryType, Mmio, Npt, Writability};
use crate::access::AccessKind;
use crate::addr::Pfn;
use crate::level::{Level, PageSize};

/// Tables of three levels for 32-bit addresses: the root has four entries (PDPTEs), which the CPU reads when CR3 is loaded
/// and which have no rights, no accessed bit and no page size.
///
/// Below them the entries are those of long mode with bits 62:52 reserved. NX is taken for granted: a CPU with second-stage
/// tables or long mode has it, and a shadow runs with EFER.NXE set whatever its guest says.
#[derive(Clone, Copy, Debug)]
pub struct Pae(Npt);

/// The host CPU, as far as the format depends on it.
#[derive(Clone, Copy, Debug)]
pub struct PaeHost {
    /// Host physical address width, CPUID 8000_0008 EAX bits 7:0.
    pub max_phys_addr: u8,
}

/// Bits of the addresses that PAE translates.
const INPUT_BITS: u32 = 32;

impl Pae {
    /// The format on a CPU like `host`.
    pub const fn new(host: &PaeHost) -> Self {
        Self(Npt::pae(host.max_phys_addr))
    }
}

impl EntryFormat for Pae {
    #[inline]
    fn top(&self) -> Level {
        self.0.top()
    }

    #[inline]
    fn input_bits(&self) -> u32 {
        INPUT_BITS
    }

    /// A PDPTE links to a table and nothing else.
    #[inline]
    fn make_table(&self, table: Pfn, level: Level) -> u64 {
        if level == self.top() {
            Npt::make_pdpte(table)
        } else {
            self.0.make_table(table, level)
        }
    }

    /// Not in the root: what is there is read when CR3 is loaded, and a reserved bit would be the guest's #GP.
    #[inline]
    fn make_mmio(&self, mmio: &Mmio) -> Option<u64> {
        self.0.make_mmio(mmio)
    }

    #[inline]
    fn has_size(&self, size: PageSize) -> bool {
        self.0.has_size(size)
    }

    #[inline]
    fn can_hide_reads(&self) -> bool {
        self.0.can_hide_reads()
    }

    #[inline]
    fn can_forbid_fetches(&self) -> bool {
        self.0.can_forbid_fetches()
    }

    #[inline]
    fn has_dirty_bits(&self) -> bool {
        self.0.has_dirty_bits()
    }

    #[inline]
    fn nearest_memory_type(&self, wanted: MemoryType) -> MemoryType {
        self.0.nearest_memory_type(wanted)
    }

    #[inline]
    fn entry(&self, entry: u64, level: Level) -> Entry {
        self.0.entry(entry, level)
    }

    #[inline]
    fn link(&self, entry: u64) -> Option<Pfn> {
        self.0.link(entry)
    }

    #[inline]
    fn leaf(&self, entry: u64, level: Level) -> Option<Leaf> {
        self.0.leaf(entry, level)
    }

    #[inline]
    fn permits(&self, entry: u64, access: AccessKind) -> bool {
        self.0.permits(entry, access)
    }

    #[inline]
    fn make_leaf(&self, leaf: &Leaf) -> u64 {
        self.0.make_leaf(leaf)
    }

    #[inline]
    fn make_small(&self, entry: u64, level: Level, index: usize) -> Option<u64> {
        self.0.make_small(entry, level, index)
    }

    #[inline]
    fn with_writability(&self, entry: u64, writability: Writability) -> u64 {
        self.0.with_writability(entry, writability)
    }

    #[inline]
    fn writability(&self, entry: u64) -> Option<Writability> {
        self.0.writability(entry)
    }

    #[inline]
    fn may_be_cached_writable(&self, entry: u64) -> bool {
        self.0.may_be_cached_writable(entry)
    }

    #[inline]
    fn with_execute(&self, entry: u64, execute: bool) -> u64 {
        self.0.with_execute(entry, execute)
    }

    #[inline]
    fn is_young(&self, entry: u64) -> bool {
        self.0.is_young(entry)
    }

    #[inline]
    fn make_old(&self, entry: u64) -> u64 {
        self.0.make_old(entry)
    }

    #[inline]
    fn is_access_tracked(&self, entry: u64) -> bool {
        self.0.is_access_tracked(entry)
    }

    #[inline]
    fn restore(&self, entry: u64) -> u64 {
        self.0.restore(entry)
    }

    #[inline]
    fn is_dirty(&self, entry: u64) -> bool {
        self.0.is_dirty(entry)
    }

    #[inline]
    fn without_dirty(&self, entry: u64) -> u64 {
        self.0.without_dirty(entry)
    }

    #[inline]
    fn with_split_note(&self, entry: u64) -> u64 {
        self.0.with_split_note(entry)
    }

    #[inline]
    fn has_split_note(&self, entry: u64) -> bool {
        self.0.has_split_note(entry)
    }

    #[inline]
    fn mmio(&self, entry: u64) -> Option<Mmio> {
        self.0.mmio(entry)
    }

    #[inline]
    fn make_frozen(&self, payload: u64) -> u64 {
        self.0.make_frozen(payload)
    }

    #[inline]
    fn frozen_payload(&self, entry: u64) -> u64 {
        self.0.frozen_payload(entry)
    }

    #[inline]
    fn shadow_zero_check(&self, entry: u64, level: Level) -> bool {
        self.0.shadow_zero_check(entry, level)
    }
}
