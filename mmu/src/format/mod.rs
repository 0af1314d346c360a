//! Entry formats of Umbra's own tables: what the bits of an entry mean.
//!
//! A format is a value: its masks follow from the CPU it was made for, and two formats, or two CPUs' worth of one, live
//! side by side. Nothing here knows a vCPU.
mod ept;
mod mmio;
mod npt;
mod pae;

use core::fmt;

pub use ept::{Ept, EptHost};
pub use mmio::{Mmio, MmioGeneration};
pub use npt::{Npt, NptHost};
pub use pae::{Pae, PaeHost};

use crate::access::AccessKind;
use crate::addr::{Pfn, MAX_PHYSICAL_BITS, PAGE_SHIFT};
use crate::level::{Level, PageSize};

/// Why a leaf can or cannot be written: the legal combinations of the bits host-writable, MMU-writable and W.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Writability {
    /// Writable.
    Writable,
    /// Write-protected so that the next write is noticed; that write makes it writable again without a lock.
    Watched,
    /// Write-protected because the guest frame is shadowed: a write must be emulated.
    Tracked,
    /// The slot is read-only.
    ReadOnly,
}

/// How memory is cached (AMD APM vol. 2, 7.4; Intel SDM vol. 3, 12.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryType {
    /// Every access goes to memory, in order.
    Uncacheable,
    /// Not cached; writes are gathered.
    WriteCombining,
    /// Reads are cached, writes go to memory as well.
    WriteThrough,
    /// Reads are cached, writes go to memory and not to the cache.
    WriteProtected,
    /// Reads and writes are cached: ordinary memory.
    WriteBack,
}

/// What a leaf says: where it leads, and what is permitted there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First frame of the page.
    pub pfn: Pfn,
    /// Size of the page.
    pub size: PageSize,
    /// Whether, and why not, it can be written.
    pub writability: Writability,
    /// Whether data can be read. Only some formats can say no, and only of a page that is executable and not writable:
    /// [`EntryFormat::can_hide_reads`].
    pub read: bool,
    /// Whether user-mode accesses are permitted. Extended page tables do not ask; a nested walk of SVM is one.
    pub user: bool,
    /// Whether instructions can be fetched; with mode-based execute control, through supervisor-mode linear addresses.
    pub execute: bool,
    /// Whether instructions can be fetched through user-mode linear addresses. Where no control tells the two apart,
    /// `execute` alone counts, and is read back as both.
    pub execute_user: bool,
    /// How the page is cached, before the guest's own tables have their say.
    pub memory_type: MemoryType,
    /// The guest's own tables have no say in how the page is cached. Only extended page tables can tell.
    pub ignore_pat: bool,
    /// Protection key, 0 to 15, of a guest's own page (Intel SDM vol. 3, 4.6.2). Only tables of long mode have keys.
    pub key: u8,
}

impl Leaf {
    /// Ordinary memory: readable, executable, write-back.
    #[inline]
    pub const fn ram(pfn: Pfn, size: PageSize, writability: Writability) -> Self {
        Self {
            pfn,
            size,
            writability,
            read: true,
            user: true,
            execute: true,
            execute_user: true,
            memory_type: MemoryType::WriteBack,
            ignore_pat: false,
            key: 0,
        }
    }

    /// The leaf with or without permission to fetch, by whomever.
    #[inline]
    pub const fn with_execute(self, execute: bool) -> Self {
        Self { execute, execute_user: execute, ..self }
    }
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing.
    Empty,
    /// An entry of a table that was taken out of its tree: nothing may be put here any more.
    Frozen,
    /// A note that there was no RAM here; [`EntryFormat::mmio`] says more. The processor takes it for malformed.
    Mmio,
    /// A link to the table below.
    Table(Pfn),
    /// A page of the level's size; [`EntryFormat::leaf`] says more.
    Leaf,
}

/// Frame number field, the same in every 64-bit format.
const FRAME: u64 = ((1 << MAX_PHYSICAL_BITS) - 1) & !((1 << PAGE_SHIFT) - 1);

/// The bits of the frame field that a CPU with physical addresses of `max_phys_addr` bits reserves.
const fn beyond(max_phys_addr: u8) -> u64 {
    let bits = max_phys_addr as u32;
    let bits = if bits > MAX_PHYSICAL_BITS {
        MAX_PHYSICAL_BITS
    } else if bits < 32 {
        32
    } else {
        bits
    };
    FRAME & !((1 << bits) - 1)
}

/// An entry format. Zero is an empty entry, so a zeroed page is an empty table. Every value it makes passes its own
/// [`shadow_zero_check`](Self::shadow_zero_check).
pub trait EntryFormat: Copy + fmt::Debug + Send + Sync {
    /// Level of the root.
    fn top(&self) -> Level;
    /// Bits of the addresses that the format can translate.
    fn input_bits(&self) -> u32;
    /// Whether a leaf of this size exists.
    fn has_size(&self, size: PageSize) -> bool;
    /// Whether a leaf can permit fetches and no reads. Where not, every leaf can be read.
    fn can_hide_reads(&self) -> bool;
    /// Whether a leaf can forbid fetches.
    fn can_forbid_fetches(&self) -> bool;
    /// Whether a leaf can tell fetches by the mode of the linear address.
    #[inline]
    fn can_tell_user_fetches(&self) -> bool {
        false
    }
    /// Whether the processor notes in a leaf that it was written (D).
    fn has_dirty_bits(&self) -> bool;
    /// The memory type of a leaf that asks for `wanted`: the same, or a stricter one if the format has no such type.
    fn nearest_memory_type(&self, wanted: MemoryType) -> MemoryType;

    /// What `entry` is in a table at `level`.
    fn entry(&self, entry: u64, level: Level) -> Entry;
    /// The table that `entry`, in a table above the lowest level, links to.
    fn link(&self, entry: u64) -> Option<Pfn>;
    /// What the leaf `entry` in a table at `level` says; `None` if it is no leaf, or not one that
    /// [`make_leaf`](Self::make_leaf) makes.
    fn leaf(&self, entry: u64, level: Level) -> Option<Leaf>;
    /// Whether the leaf `entry` permits the access; fetches only if by whomever.
    fn permits(&self, entry: u64, access: AccessKind) -> bool;

    /// The entry for a leaf, accessed and (if writable) dirty bits set.
    fn make_leaf(&self, leaf: &Leaf) -> u64;
    /// The entry, in a table at `level`, for a link to the table in frame `table`: all permissions, restrictions are the
    /// leaves' matter.
    fn make_table(&self, table: Pfn, level: Level) -> u64;
    /// The entry for 4 KiB frame `index` times the smaller page size inside the huge leaf `entry` of a table at
    /// `level`; same permissions and state. `None` at the lowest level.
    fn make_small(&self, entry: u64, level: Level, index: usize) -> Option<u64>;
    /// The leaf `entry` with another writability.
    fn with_writability(&self, entry: u64, writability: Writability) -> u64;
    /// The writability of the leaf `entry`; `None` for a combination of bits that is not legal.
    fn writability(&self, entry: u64) -> Option<Writability>;
    /// Whether some TLB may permit writes by the leaf `entry`: W is set, or was taken away without a flush
    /// ([`make_old`](Self::make_old)). Whoever protects such a leaf has to flush.
    fn may_be_cached_writable(&self, entry: u64) -> bool;
    /// The leaf `entry` with or without permission to fetch. One that would permit nothing stays as it is.
    fn with_execute(&self, entry: u64, execute: bool) -> u64;

    /// Whether the leaf `entry` was used since it was last made old.
    fn is_young(&self, entry: u64) -> bool;
    /// The leaf `entry` as one that was not used. Without an accessed bit its permissions are put aside, so that the next
    /// access faults and [`restore`](Self::restore)s them: it is *access-tracked*, not present for the processor, and
    /// without a frame that speculation past a non-present entry (L1TF) could reach. W is not put aside: a write that
    /// follows makes the leaf writable by the way of [`Writability::Watched`]. Needs no flush.
    fn make_old(&self, entry: u64) -> u64;
    /// Whether the leaf `entry` is access-tracked.
    fn is_access_tracked(&self, entry: u64) -> bool;
    /// The leaf `entry` with the permissions that were put aside; one that is not access-tracked as it is.
    fn restore(&self, entry: u64) -> u64;
    /// Whether D is set in the leaf `entry`.
    fn is_dirty(&self, entry: u64) -> bool;
    /// The leaf `entry` without D: the processor notes the next write, once the TLBs are flushed.
    fn without_dirty(&self, entry: u64) -> u64;

    /// The link `entry` with the note that it is there only because a huge page must not be executable.
    fn with_split_note(&self, entry: u64) -> u64;
    /// Whether the link `entry` has that note.
    fn has_split_note(&self, entry: u64) -> bool;

    /// The entry that says "no RAM at this frame, as of that generation": the processor takes it for malformed, so the
    /// exit is told from others, and no TLB keeps it. `None` if the format has no room: AMD APM vol. 2, 5.4.1, lets a
    /// CPU with 52 address bits have no reserved one.
    fn make_mmio(&self, mmio: &Mmio) -> Option<u64>;
    /// What an entry of [`make_mmio`](Self::make_mmio) says; `None` for any other.
    fn mmio(&self, entry: u64) -> Option<Mmio>;

    /// A frozen entry that carries `payload`, of which 40 bits are kept. Never present, and (payloads below 2^39) never
    /// naming a frame that memory has, so speculation past a non-present entry (L1TF) finds nothing.
    fn make_frozen(&self, payload: u64) -> u64;
    /// The payload of a frozen entry.
    fn frozen_payload(&self, entry: u64) -> u64;

    /// Checks that `entry`, in a table at `level`, is present and that the hardware reserves nothing of what it says.
    fn shadow_zero_check(&self, entry: u64, level: Level) -> bool;
}
