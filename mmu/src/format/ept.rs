//! The format of the extended page tables of VMX: Intel SDM vol. 3, 29.3.2 (entries), 29.3.3 (what is misconfigured), 29.3.5
//! (accessed and dirty flags) and 29.3.7 (memory types).
use super::{beyond, mmio, Entry, EntryFormat, Leaf, MemoryType, Mmio, Writability, FRAME};
use crate::access::AccessKind;
use crate::addr::{Hpa, Pfn, MAX_PHYSICAL_BITS, PAGE_SHIFT};
use crate::level::{Level, PageSize};
use crate::mutant::{self, Mutant};

/// Data reads.
const READ: u64 = 1 << 0;
/// Data writes.
const WRITE: u64 = 1 << 1;
/// Instruction fetches; with mode-based execute control those through supervisor-mode linear addresses.
const EXECUTE: u64 = 1 << 2;
/// Memory type of a leaf; reserved in a link.
const TYPE: u64 = 7 << TYPE_SHIFT;
const TYPE_SHIFT: u32 = 3;
/// Ignore PAT: the guest's PAT has no say. Reserved in a link.
const IGNORE_PAT: u64 = 1 << 6;
/// A page, in tables at level 2 and 3; ignored at level 1.
const LARGE: u64 = 1 << 7;
/// Accessed, if the pointer turns the flags on.
const ACCESSED: u64 = 1 << 8;
/// Dirty, likewise.
const DIRTY: u64 = 1 << 9;
/// Fetches through user-mode linear addresses, with mode-based execute control.
const EXECUTE_USER: u64 = 1 << 10;
/// Suppress #VE, if that control is on.
const SUPPRESS_VE: u64 = 1 << 63;

// What software may use: bit 11 and, above the address, bits 56:52, 59 and 62 are ignored in every kind of entry, whatever
// the controls are. The other high bits mean something in leaves as soon as a control is on: 57 verify guest paging, 58
// paging-write access, 60 supervisor shadow stack, 61 sub-page write permissions, 63 suppress #VE. So a bit taken there
// would be in the way of the control; nothing here sets one in an entry that is present.

/// Software: a link or a leaf; never set in an entry that only looks present, or only looks used.
const MMU_PRESENT: u64 = 1 << 11;
/// Software: the slot, and the host, permit writes.
const HOST_WRITABLE: u64 = 1 << 52;
/// Software: a write fault may set W without a lock.
const MMU_WRITABLE: u64 = 1 << 53;

/// Software: reads were permitted before the entry was access-tracked.
const SAVED_READ: u64 = 1 << 54;
/// Software: fetches were permitted before the entry was access-tracked.
const SAVED_EXECUTE: u64 = 1 << 55;
/// Software: W was taken away for access tracking, without a flush, so a TLB may still have it.
const CACHED_WRITABLE: u64 = 1 << 56;
/// Software: fetches through user-mode linear addresses were permitted before the entry was access-tracked.
const SAVED_EXECUTE_USER: u64 = 1 << 59;

/// What was put aside.
const SAVED: u64 = SAVED_READ | SAVED_EXECUTE | SAVED_EXECUTE_USER;

/// What permits anything.
const RIGHTS: u64 = READ | WRITE | EXECUTE | EXECUTE_USER;
/// Writes and fetches without reads: a misconfiguration on every CPU (29.3.3.1).
const MISCONFIGURED: u64 = WRITE | EXECUTE;

/// All but the frame field of a frozen entry. Bit 10 is clear: with mode-based execute control it would make the entry
/// present. An access to it would exit even if #VE were on.
const FROZEN: u64 = SUPPRESS_VE | 0x1a0;

const _: () = assert!(FROZEN & (READ | WRITE | EXECUTE | EXECUTE_USER | MMU_PRESENT | FRAME) == 0);

/// EPT pointer: accessed and dirty flags are on.
const POINTER_FLAGS: u64 = 1 << 6;
/// EPT pointer: page-walk length minus one.
const POINTER_LENGTH_SHIFT: u32 = 3;

/// Extended page tables, with four or five levels.
///
/// EPT-violation #VE is off, so zero, an entry that is not present, needs no bit that suppresses it and exits.
#[derive(Clone, Copy, Debug)]
pub struct Ept {
    top: Level,
    largest: PageSize,
    execute_only: bool,
    /// Bits that permit fetches: with mode-based execute control two.
    execute: u64,
    /// A and D; zero when the flags are off.
    accessed: u64,
    dirty: u64,
    /// Bits that must be zero, by level, in links and in leaves.
    reserved: [[u64; 2]; 5],
}

/// The host CPU and the controls, as far as the format depends on them.
///
/// Capabilities are bits of IA32_VMX_EPT_VPID_CAP (SDM vol. 3, A.10), where bit 6 (walks of four levels) and bit 14
/// (write-back tables) are taken for granted.
#[derive(Clone, Copy, Debug)]
pub struct EptHost {
    /// Five levels: needs capability bit 7.
    pub five_level: bool,
    /// Host physical address width, CPUID 8000_0008 EAX bits 7:0.
    pub max_phys_addr: u8,
    /// Largest page that leaves may have: 2 MiB only with capability bit 16, 1 GiB only with bit 17.
    pub largest: PageSize,
    /// Accessed and dirty flags: needs capability bit 21. With them, the processor's own accesses to the guest's page
    /// tables are writes (SDM vol. 3, 29.3.3.2), so tables in read-only memory cannot be walked.
    pub accessed_dirty: bool,
    /// Entries that permit fetches and no reads are legal: capability bit 0.
    pub execute_only: bool,
    /// Mode-based execute control is on: bit 22 of the secondary processor-based controls (SDM vol. 3, 25.6.2).
    pub mode_based_execute: bool,
}

impl Ept {
    /// The format on a CPU like `host`.
    pub const fn new(host: &EptHost) -> Self {
        let high = beyond(host.max_phys_addr);
        let link = high | TYPE | IGNORE_PAT;
        let no_leaf = u64::MAX;
        let l3_leaf = match host.largest {
            PageSize::Size1G => high | ((1 << 30) - (1 << PAGE_SHIFT)),
            PageSize::Size2M | PageSize::Size4K => no_leaf,
        };
        let l2_leaf = match host.largest {
            PageSize::Size1G | PageSize::Size2M => high | ((1 << 21) - (1 << PAGE_SHIFT)),
            PageSize::Size4K => no_leaf,
        };
        Self {
            top: if host.five_level { Level::L5 } else { Level::L4 },
            largest: host.largest,
            execute_only: host.execute_only,
            execute: if host.mode_based_execute { EXECUTE | EXECUTE_USER } else { EXECUTE },
            accessed: if host.accessed_dirty { ACCESSED } else { 0 },
            dirty: if host.accessed_dirty { DIRTY } else { 0 },
            // 29.3.2: above level 3 bit 7 is reserved as well; at the lowest level there is no link.
            reserved: [
                [no_leaf, high],
                [link, l2_leaf],
                [link, l3_leaf],
                [link | LARGE, no_leaf],
                [link | LARGE, no_leaf],
            ],
        }
    }

    /// The EPT pointer for the tables under `root`: write-back tables, the depth, and whether the processor keeps accessed
    /// and dirty flags (SDM vol. 3, 25.6.11).
    pub const fn pointer(&self, root: Hpa) -> u64 {
        self.pointer_to(root, self.top, true)
    }

    /// The EPT pointer for L2, on a root that shadows L1's tables: as deep as those are, and with accessed and dirty flags
    /// (if the processor keeps any) only if L1's pointer has them, as the root's role says
    /// ([`BaseRole::accessed_dirty`](crate::BaseRole::accessed_dirty)): they make walks of L2's own tables writes.
    pub const fn pointer_to(&self, root: Hpa, level: Level, accessed_dirty: bool) -> u64 {
        let length = (level as u64 - 1) << POINTER_LENGTH_SHIFT;
        let flags = if self.accessed != 0 && accessed_dirty { POINTER_FLAGS } else { 0 };
        (root.bits() & FRAME) | flags | length | type_number(MemoryType::WriteBack)
    }

    /// Permissions edited in an entry whose permissions may be put aside.
    #[inline]
    fn edit(&self, entry: u64, edit: impl FnOnce(u64) -> u64) -> u64 {
        if self.is_access_tracked(entry) {
            self.make_old(edit(self.restore(entry)))
        } else {
            edit(entry)
        }
    }

    #[inline]
    const fn is_leaf(entry: u64, level: Level) -> bool {
        matches!(level, Level::L1) || entry & LARGE != 0
    }

    /// What an entry says about writes. W without R is a misconfiguration, so an entry that hides reads never has W,
    /// nor the note that lets a fault set it: a write to it is nobody's upgrade.
    #[inline]
    const fn write_bits(&self, writability: Writability, read: bool) -> u64 {
        match writability {
            Writability::Writable if read => HOST_WRITABLE | MMU_WRITABLE | WRITE | self.dirty,
            Writability::Watched if read => HOST_WRITABLE | MMU_WRITABLE,
            Writability::Writable | Writability::Watched | Writability::Tracked => HOST_WRITABLE,
            Writability::ReadOnly => 0,
        }
    }
}

/// Memory types as entries and the pointer have them (SDM vol. 3, 29.3.7.2).
#[inline]
const fn type_number(memory_type: MemoryType) -> u64 {
    match memory_type {
        MemoryType::Uncacheable => 0,
        MemoryType::WriteCombining => 1,
        MemoryType::WriteThrough => 4,
        MemoryType::WriteProtected => 5,
        MemoryType::WriteBack => 6,
    }
}

/// The memory type of a leaf; `None` if its number is reserved.
#[inline]
const fn type_of(entry: u64) -> Option<MemoryType> {
    match (entry & TYPE) >> TYPE_SHIFT {
        0 => Some(MemoryType::Uncacheable),
        1 => Some(MemoryType::WriteCombining),
        4 => Some(MemoryType::WriteThrough),
        5 => Some(MemoryType::WriteProtected),
        6 => Some(MemoryType::WriteBack),
        _ => None,
    }
}

impl EntryFormat for Ept {
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
    fn can_hide_reads(&self) -> bool {
        self.execute_only
    }

    #[inline]
    fn can_forbid_fetches(&self) -> bool {
        true
    }

    #[inline]
    fn can_tell_user_fetches(&self) -> bool {
        self.execute & EXECUTE_USER != 0
    }

    #[inline]
    fn has_dirty_bits(&self) -> bool {
        self.dirty != 0
    }

    /// All five have a number.
    #[inline]
    fn nearest_memory_type(&self, wanted: MemoryType) -> MemoryType {
        wanted
    }

    #[inline]
    fn entry(&self, entry: u64, level: Level) -> Entry {
        if entry & MMU_PRESENT == 0 {
            if entry & !FRAME == FROZEN {
                Entry::Frozen
            } else if self.mmio(entry).is_some() {
                Entry::Mmio
            } else {
                Entry::Empty
            }
        } else if Self::is_leaf(entry, level) {
            Entry::Leaf
        } else {
            Entry::Table(Pfn::new_truncate((entry & FRAME) >> PAGE_SHIFT))
        }
    }

    #[inline]
    fn link(&self, entry: u64) -> Option<Pfn> {
        let link = entry & (MMU_PRESENT | LARGE) == MMU_PRESENT;
        link.then(|| Pfn::new_truncate((entry & FRAME) >> PAGE_SHIFT))
    }

    fn leaf(&self, entry: u64, level: Level) -> Option<Leaf> {
        if self.entry(entry, level) != Entry::Leaf {
            return None;
        }
        let entry = self.restore(entry);
        if !self.shadow_zero_check(entry, level) {
            return None;
        }
        let execute = entry & EXECUTE != 0;
        Some(Leaf {
            pfn: Pfn::new_truncate((entry & FRAME) >> PAGE_SHIFT),
            size: level.page_size()?,
            writability: self.writability(entry)?,
            read: entry & READ != 0,
            user: true,
            execute,
            execute_user: if self.can_tell_user_fetches() { entry & EXECUTE_USER != 0 } else { execute },
            memory_type: type_of(entry)?,
            ignore_pat: entry & IGNORE_PAT != 0,
            key: 0,
        })
    }

    #[inline]
    fn permits(&self, entry: u64, access: AccessKind) -> bool {
        match access {
            AccessKind::Read => entry & READ != 0,
            AccessKind::Write => entry & WRITE != 0,
            AccessKind::Execute => entry & self.execute == self.execute,
        }
    }

    /// A and D are set only if the processor would keep them.
    #[inline]
    fn make_leaf(&self, leaf: &Leaf) -> u64 {
        let mut execute = if leaf.execute { EXECUTE } else { 0 };
        if leaf.execute_user {
            execute |= self.execute & EXECUTE_USER;
        }
        // With neither R nor X the entry would not be present.
        let read = leaf.read || !self.execute_only || execute == 0;
        let mut entry = MMU_PRESENT | self.accessed | self.write_bits(leaf.writability, read);
        if read {
            entry |= READ;
        }
        entry |= execute;
        if leaf.ignore_pat {
            entry |= IGNORE_PAT;
        }
        if leaf.size != PageSize::Size4K {
            entry |= LARGE;
        }
        entry |= type_number(leaf.memory_type) << TYPE_SHIFT | leaf.pfn.hpa().bits();
        debug_assert!(self.shadow_zero_check(entry, leaf.size.level()), "{leaf:?}");
        entry
    }

    #[inline]
    fn make_table(&self, table: Pfn, _: Level) -> u64 {
        MMU_PRESENT | READ | WRITE | self.execute | self.accessed | table.hpa().bits()
    }

    fn make_small(&self, entry: u64, level: Level, index: usize) -> Option<u64> {
        let below = level.down()?;
        let offset = (index as u64 % 512) << below.shift();
        let small = |entry| (if below == Level::L1 { entry & !LARGE } else { entry }) + offset;
        Some(self.edit(entry, small))
    }

    /// D is history, not permission: it stays when W goes, and comes with W, if the flags are on. With the flags off
    /// neither is ever set.
    #[inline]
    fn with_writability(&self, entry: u64, writability: Writability) -> u64 {
        self.edit(entry, |entry| {
            let kept = entry & !(HOST_WRITABLE | MMU_WRITABLE | WRITE | CACHED_WRITABLE);
            kept | self.write_bits(writability, entry & READ != 0)
        })
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
    fn may_be_cached_writable(&self, entry: u64) -> bool {
        entry & (WRITE | CACHED_WRITABLE) != 0
    }

    #[inline]
    fn with_execute(&self, entry: u64, execute: bool) -> u64 {
        self.edit(entry, |entry| {
            let without = entry & !(EXECUTE | EXECUTE_USER);
            match (execute, entry & READ != 0) {
                (true, _) => without | self.execute,
                (false, true) => without,
                (false, false) => entry,
            }
        })
    }

    #[inline]
    fn is_young(&self, entry: u64) -> bool {
        if self.accessed != 0 {
            entry & self.accessed != 0
        } else {
            !self.is_access_tracked(entry)
        }
    }

    #[inline]
    fn make_old(&self, entry: u64) -> u64 {
        if self.accessed != 0 {
            return entry & !self.accessed;
        }
        if self.is_access_tracked(entry) {
            return entry;
        }
        let inverted = if mutant::is(Mutant::OldNamesMemory) { 0 } else { FRAME };
        let mut tracked = entry & !RIGHTS ^ inverted;
        if entry & READ != 0 {
            tracked |= SAVED_READ;
        }
        if entry & EXECUTE != 0 {
            tracked |= SAVED_EXECUTE;
        }
        if entry & EXECUTE_USER != 0 {
            tracked |= SAVED_EXECUTE_USER;
        }
        if entry & WRITE != 0 && !mutant::is(Mutant::OldForgetsW) {
            tracked |= CACHED_WRITABLE;
        }
        tracked
    }

    #[inline]
    fn is_access_tracked(&self, entry: u64) -> bool {
        entry & (MMU_PRESENT | RIGHTS) == MMU_PRESENT && entry & SAVED != 0
    }

    #[inline]
    fn restore(&self, entry: u64) -> u64 {
        if !self.is_access_tracked(entry) {
            return entry;
        }
        let inverted = if mutant::is(Mutant::OldNamesMemory) { 0 } else { FRAME };
        let mut restored = entry & !SAVED ^ inverted;
        if entry & CACHED_WRITABLE != 0 && mutant::is(Mutant::OldKeepsW) {
            restored |= WRITE;
        }
        if entry & SAVED_READ != 0 {
            restored |= READ;
        }
        if entry & SAVED_EXECUTE != 0 {
            restored |= EXECUTE;
        }
        if entry & SAVED_EXECUTE_USER != 0 {
            restored |= EXECUTE_USER;
        }
        restored
    }

    #[inline]
    fn is_dirty(&self, entry: u64) -> bool {
        entry & self.dirty != 0
    }

    #[inline]
    fn without_dirty(&self, entry: u64) -> u64 {
        entry & !self.dirty
    }

    /// A link is always writable, so the note about its slot is free.
    #[inline]
    fn with_split_note(&self, entry: u64) -> u64 {
        entry | HOST_WRITABLE
    }

    #[inline]
    fn has_split_note(&self, entry: u64) -> bool {
        entry & HOST_WRITABLE != 0
    }

    /// Misconfigured by its rights, so what the guest may do there has no room in it: in the second stage, everything.
    #[inline]
    fn make_mmio(&self, mmio: &Mmio) -> Option<u64> {
        Some(mmio::encode(mmio.gfn, mmio.generation)? | MISCONFIGURED)
    }

    #[inline]
    fn mmio(&self, entry: u64) -> Option<Mmio> {
        let marked = entry & (READ | MISCONFIGURED | MMU_PRESENT | mmio::MARK) == MISCONFIGURED | mmio::MARK;
        let (gfn, generation) = mmio::decode(entry);
        marked.then_some(Mmio { gfn, write: true, user: true, generation })
    }

    #[inline]
    fn make_frozen(&self, payload: u64) -> u64 {
        let payload = if mutant::is(Mutant::FrozenNamesMemory) { payload } else { !payload };
        FROZEN | (payload << PAGE_SHIFT) & FRAME
    }

    #[inline]
    fn frozen_payload(&self, entry: u64) -> u64 {
        let entry = if mutant::is(Mutant::FrozenNamesMemory) { entry } else { !entry };
        (entry & FRAME) >> PAGE_SHIFT
    }

    /// 29.3.3.1: an entry is misconfigured by W without R, by fetches without R where the CPU has no such thing, by a
    /// reserved bit, and a leaf by a reserved memory type.
    #[inline]
    fn shadow_zero_check(&self, entry: u64, level: Level) -> bool {
        let leaf = Self::is_leaf(entry, level);
        let rights = if entry & READ != 0 {
            true
        } else {
            (self.execute_only || mutant::is(Mutant::EptNoExecuteOnly))
                && entry & WRITE == 0
                && entry & self.execute != 0
        };
        rights
            && entry & self.reserved[level.ordinal()][usize::from(leaf)] == 0
            && (!leaf || type_of(entry).is_some())
    }
}

#[cfg(test)]
mod tests;
