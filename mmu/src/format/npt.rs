//! The long-mode format as nested paging uses it: AMD APM vol. 2, 5.3 (entries) and 15.25 (nested paging).
use super::{Entry, EntryFormat, Leaf, Writability};
use crate::access::AccessKind;
use crate::addr::{Pfn, MAX_PHYSICAL_BITS, PAGE_SHIFT};
use crate::level::{Level, PageSize};

/// P: present.
const PRESENT: u64 = 1 << 0;
/// R/W: writable.
const WRITE: u64 = 1 << 1;
/// U/S: user. Nested walks are user accesses, so it is set at every level (APM 15.25.6).
const USER: u64 = 1 << 2;
/// A: accessed.
const ACCESSED: u64 = 1 << 5;
/// D: dirty.
const DIRTY: u64 = 1 << 6;
/// PS: page size, in tables at level 2 and 3; PAT at level 1.
const LARGE: u64 = 1 << 7;
/// Software: the slot, and the host, permit writes.
const HOST_WRITABLE: u64 = 1 << 9;
/// Software: a write fault may set W without a lock.
const MMU_WRITABLE: u64 = 1 << 10;
/// Software: a link or a leaf; never set in an entry that only looks present, or only looks used.
const MMU_PRESENT: u64 = 1 << 11;
/// NX: no execute.
const NO_EXECUTE: u64 = 1 << 63;

/// Frame number field.
const FRAME: u64 = ((1 << MAX_PHYSICAL_BITS) - 1) & !((1 << PAGE_SHIFT) - 1);
/// All but the frame field of a frozen entry.
const FROZEN: u64 = 1 << 63 | 0x5a0;

const _: () = assert!(FROZEN & (PRESENT | MMU_PRESENT | FRAME) == 0);

/// Nested page tables of SVM, with four or five levels, and the long-mode tables that share the format.
#[derive(Clone, Copy, Debug)]
pub struct Npt {
    top: Level,
    no_execute: bool,
    largest: PageSize,
    /// Bits that must be zero, by level, in links and in leaves.
    reserved: [[u64; 2]; 5],
}

/// The host CPU, as far as the format depends on it.
#[derive(Clone, Copy, Debug)]
pub struct NptHost {
    /// Five-level paging: the host's CR4.LA57 at VMRUN, which decides the depth (APM 15.25.3).
    pub five_level: bool,
    /// Host physical address width, CPUID 8000_0008 EAX[7:0].
    pub max_phys_addr: u8,
    /// The host's EFER.NXE at VMRUN: without it bit 63 is reserved.
    pub no_execute: bool,
    /// Largest page that leaves may have: 1 GiB only with CPUID 8000_0001 EDX[26].
    pub largest: PageSize,
}

impl Npt {
    /// The format on a CPU like `host`.
    pub const fn new(host: &NptHost) -> Self {
        let bits = if host.max_phys_addr as u32 > MAX_PHYSICAL_BITS {
            MAX_PHYSICAL_BITS
        } else if (host.max_phys_addr as u32) < 32 {
            32
        } else {
            host.max_phys_addr as u32
        };
        let high = (FRAME & !((1 << bits) - 1)) | if host.no_execute { 0 } else { NO_EXECUTE };
        let no_leaf = u64::MAX;
        let l3_leaf = match host.largest {
            PageSize::Size1G => high | ((1 << 30) - (1 << 13)),
            PageSize::Size2M | PageSize::Size4K => no_leaf,
        };
        let l2_leaf = match host.largest {
            PageSize::Size1G | PageSize::Size2M => high | ((1 << 21) - (1 << 13)),
            PageSize::Size4K => no_leaf,
        };
        Self {
            top: if host.five_level { Level::L5 } else { Level::L4 },
            no_execute: host.no_execute,
            largest: host.largest,
            // Figures 5-18 to 5-27: PS is reserved above level 3, bit 8 as well; at the lowest level there is no link.
            reserved: [
                [no_leaf, high],
                [high | LARGE, l2_leaf],
                [high | LARGE, l3_leaf],
                [high | LARGE | 1 << 8, no_leaf],
                [high | LARGE | 1 << 8, no_leaf],
            ],
        }
    }

    #[inline]
    const fn is_leaf(entry: u64, level: Level) -> bool {
        matches!(level, Level::L1) || entry & LARGE != 0
    }

    #[inline]
    const fn write_bits(writability: Writability) -> u64 {
        match writability {
            Writability::Writable => HOST_WRITABLE | MMU_WRITABLE | WRITE | DIRTY,
            Writability::Watched => HOST_WRITABLE | MMU_WRITABLE,
            Writability::Tracked => HOST_WRITABLE,
            Writability::ReadOnly => 0,
        }
    }
}

impl EntryFormat for Npt {
    #[inline]
    fn top(&self) -> Level {
        self.top
    }

    #[inline]
    fn input_bits(&self) -> u32 {
        // Five levels translate 57 bits, more than an address can have.
        if matches!(self.top, Level::L5) {
            MAX_PHYSICAL_BITS
        } else {
            48
        }
    }

    #[inline]
    fn has_size(&self, size: PageSize) -> bool {
        size <= self.largest
    }

    #[inline]
    fn entry(&self, entry: u64, level: Level) -> Entry {
        if entry & MMU_PRESENT == 0 {
            if entry & !FRAME == FROZEN {
                Entry::Frozen
            } else {
                Entry::Empty
            }
        } else if Self::is_leaf(entry, level) {
            Entry::Leaf
        } else {
            Entry::Table(Pfn::new_truncate((entry & FRAME) >> PAGE_SHIFT))
        }
    }

    fn leaf(&self, entry: u64, level: Level) -> Option<Leaf> {
        if self.entry(entry, level) != Entry::Leaf || !self.shadow_zero_check(entry, level) {
            return None;
        }
        Some(Leaf {
            pfn: Pfn::new_truncate((entry & FRAME) >> PAGE_SHIFT),
            size: level.page_size()?,
            writability: self.writability(entry)?,
            execute: entry & NO_EXECUTE == 0,
        })
    }

    #[inline]
    fn permits(&self, entry: u64, access: AccessKind) -> bool {
        match access {
            AccessKind::Read => true,
            AccessKind::Write => entry & WRITE != 0,
            AccessKind::Execute => entry & NO_EXECUTE == 0,
        }
    }

    #[inline]
    fn make_leaf(&self, leaf: &Leaf) -> u64 {
        let mut entry = MMU_PRESENT | PRESENT | USER | ACCESSED | Self::write_bits(leaf.writability);
        if leaf.size != PageSize::Size4K {
            entry |= LARGE;
        }
        if !leaf.execute && self.no_execute {
            entry |= NO_EXECUTE;
        }
        entry |= leaf.pfn.hpa().bits();
        debug_assert!(self.shadow_zero_check(entry, leaf.size.level()), "{leaf:?}");
        entry
    }

    #[inline]
    fn make_table(&self, table: Pfn) -> u64 {
        MMU_PRESENT | PRESENT | WRITE | USER | ACCESSED | table.hpa().bits()
    }

    fn make_small(&self, entry: u64, level: Level, index: usize) -> Option<u64> {
        let below = level.down()?;
        let offset = (index as u64 % 512) << below.shift();
        let large = if below == Level::L1 { entry & !LARGE } else { entry };
        Some(large + offset)
    }

    #[inline]
    fn with_writability(&self, entry: u64, writability: Writability) -> u64 {
        // D is history, not permission: it stays.
        let kept = entry & !(HOST_WRITABLE | MMU_WRITABLE | WRITE);
        kept | Self::write_bits(writability)
    }

    #[inline]
    fn writability(&self, entry: u64) -> Option<Writability> {
        match (entry & HOST_WRITABLE != 0, entry & MMU_WRITABLE != 0, entry & WRITE != 0) {
            (true, true, true) => Some(Writability::Writable),
            (true, true, false) => Some(Writability::Watched),
            (true, false, false) => Some(Writability::Tracked),
            (false, false, false) => Some(Writability::ReadOnly),
            _ => None,
        }
    }

    #[inline]
    fn make_frozen(&self, payload: u64) -> u64 {
        FROZEN | (!payload << PAGE_SHIFT) & FRAME
    }

    #[inline]
    fn frozen_payload(&self, entry: u64) -> u64 {
        (!entry & FRAME) >> PAGE_SHIFT
    }

    #[inline]
    fn shadow_zero_check(&self, entry: u64, level: Level) -> bool {
        entry & PRESENT != 0
            && entry & self.reserved[level.ordinal()][usize::from(Self::is_leaf(entry, level))] == 0
    }
}
