//! The long-mode format as nested paging uses it: AMD APM vol. 2, 5.3 (entries) and 15.25 (nested paging).
use super::{beyond, mmio, Entry, EntryFormat, Leaf, MemoryType, Mmio, Writability, FRAME};
use crate::access::AccessKind;
use crate::addr::{Pfn, MAX_PHYSICAL_BITS, PAGE_SHIFT};
use crate::level::{Level, PageSize};
use crate::mutant::{self, Mutant};

/// P: present.
const PRESENT: u64 = 1 << 0;
/// R/W: writable.
const WRITE: u64 = 1 << 1;
/// U/S: user. Nested walks are user accesses, so it is set at every level (APM 15.25.6).
const USER: u64 = 1 << 2;
/// PWT alone: entry 1 of the host's PAT, which is write-through (APM 7.8 and 15.25.8).
const WRITE_THROUGH: u64 = 1 << 3;
/// PWT and PCD: entry 3 of the host's PAT, uncacheable.
const UNCACHEABLE: u64 = 1 << 3 | 1 << 4;
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
/// Protection key, bits 62:59: of a guest's own page. A nested walk does not look at it.
const KEY_SHIFT: u32 = 59;
/// NX: no execute.
const NO_EXECUTE: u64 = 1 << 63;

/// PAT in tables at level 2 and 3.
const LARGE_PAT: u64 = 1 << 12;
/// All but the frame field of a frozen entry.
const FROZEN: u64 = 1 << 63 | 0x5a0;

const _: () = assert!(FROZEN & (PRESENT | MMU_PRESENT | FRAME) == 0);

/// Nested page tables of SVM, with four or five levels, and the long-mode tables that share the format.
#[derive(Clone, Copy, Debug)]
pub struct Npt {
    top: Level,
    no_execute: bool,
    largest: PageSize,
    /// The highest address bit is reserved, so an entry can be malformed on purpose.
    mmio_entries: bool,
    /// Bits that must be zero, by level, in links and in leaves.
    reserved: [[u64; 2]; 5],
}

/// The host CPU, as far as the format depends on it.
#[derive(Clone, Copy, Debug)]
pub struct NptHost {
    /// Five-level paging: the host's CR4.LA57 at VMRUN, which decides the depth (APM 15.25.3).
    pub five_level: bool,
    /// Host physical address width, CPUID 8000_0008 EAX bits 7:0.
    pub max_phys_addr: u8,
    /// The host's EFER.NXE at VMRUN: without it bit 63 is reserved.
    pub no_execute: bool,
    /// Largest page that leaves may have: 1 GiB only with CPUID 8000_0001 EDX bit 26.
    pub largest: PageSize,
}

impl Npt {
    /// The format on a CPU like `host`.
    pub const fn new(host: &NptHost) -> Self {
        let high = beyond(host.max_phys_addr) | if host.no_execute { 0 } else { NO_EXECUTE };
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
            mmio_entries: beyond(host.max_phys_addr) & mmio::MARK != 0,
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

    /// Legacy PAE tables (APM 5.2.3) have the same entries but for these: three levels, PDPTEs without rights, bits 62:52
    /// reserved, no page above 2 MiB. See [`Pae`](super::Pae).
    pub(super) const fn pae(max_phys_addr: u8) -> Self {
        let host = NptHost { five_level: false, max_phys_addr, no_execute: true, largest: PageSize::Size2M };
        let mut format = Self::new(&host);
        format.top = Level::L3;
        let high = 0x7ff << 52;
        let mut level = 0;
        while level < 2 {
            format.reserved[level][0] |= high;
            format.reserved[level][1] |= high;
            level += 1;
        }
        let pdpte = beyond(max_phys_addr) | high | NO_EXECUTE | WRITE | USER | 0xf << 5;
        format.reserved[2] = [pdpte, u64::MAX];
        format
    }

    /// The entry for a PDPTE of PAE tables, which has no rights of its own.
    pub(super) const fn make_pdpte(table: Pfn) -> u64 {
        MMU_PRESENT | PRESENT | table.hpa().bits()
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

    /// PWT and PCD for a type, by the PAT as it is after power-on, which whoever runs guests on these tables keeps for
    /// the host. The PAT bit is never needed.
    #[inline]
    const fn type_bits(memory_type: MemoryType) -> u64 {
        match memory_type {
            MemoryType::WriteBack => 0,
            MemoryType::WriteThrough => WRITE_THROUGH,
            MemoryType::Uncacheable | MemoryType::WriteCombining | MemoryType::WriteProtected => UNCACHEABLE,
        }
    }

    /// The type of a leaf; `None` for an index that no leaf made here has.
    const fn memory_type(entry: u64, level: Level) -> Option<MemoryType> {
        let pat = if matches!(level, Level::L1) { LARGE } else { LARGE_PAT };
        match entry & (UNCACHEABLE | pat) {
            0 => Some(MemoryType::WriteBack),
            WRITE_THROUGH => Some(MemoryType::WriteThrough),
            UNCACHEABLE => Some(MemoryType::Uncacheable),
            _ => None,
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

    /// Never: long-mode entries have no bit for it.
    #[inline]
    fn can_hide_reads(&self) -> bool {
        false
    }

    #[inline]
    fn can_forbid_fetches(&self) -> bool {
        self.no_execute
    }

    #[inline]
    fn has_dirty_bits(&self) -> bool {
        true
    }

    /// The PAT at power-on has neither write-combining nor write-protected.
    #[inline]
    fn nearest_memory_type(&self, wanted: MemoryType) -> MemoryType {
        match wanted {
            MemoryType::WriteBack | MemoryType::WriteThrough => wanted,
            MemoryType::Uncacheable | MemoryType::WriteCombining | MemoryType::WriteProtected => {
                MemoryType::Uncacheable
            }
        }
    }

    #[inline]
    fn entry(&self, entry: u64, level: Level) -> Entry {
        if entry & MMU_PRESENT == 0 {
            if entry & !FRAME == FROZEN {
                Entry::Frozen
            } else if entry & PRESENT != 0 && self.mmio(entry).is_some() {
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
        if self.entry(entry, level) != Entry::Leaf || !self.shadow_zero_check(entry, level) {
            return None;
        }
        Some(Leaf {
            pfn: Pfn::new_truncate((entry & FRAME) >> PAGE_SHIFT),
            size: level.page_size()?,
            writability: self.writability(entry)?,
            read: true,
            user: entry & USER != 0,
            execute: entry & NO_EXECUTE == 0,
            execute_user: entry & NO_EXECUTE == 0,
            memory_type: Self::memory_type(entry, level)?,
            ignore_pat: false,
            key: (entry >> KEY_SHIFT & 15) as u8,
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

    #[inline(always)]
    fn make_leaf(&self, leaf: &Leaf) -> u64 {
        let mut entry = MMU_PRESENT | PRESENT | ACCESSED | Self::write_bits(leaf.writability);
        if leaf.user {
            entry |= USER;
        }
        if leaf.size != PageSize::Size4K {
            entry |= LARGE;
        }
        if !leaf.execute && self.no_execute {
            entry |= NO_EXECUTE;
        }
        entry |= Self::type_bits(leaf.memory_type) | leaf.pfn.hpa().bits();
        entry |= u64::from(leaf.key & 15) << KEY_SHIFT;
        debug_assert!(self.shadow_zero_check(entry, leaf.size.level()), "{leaf:?}");
        entry
    }

    #[inline]
    fn make_table(&self, table: Pfn, _: Level) -> u64 {
        MMU_PRESENT | PRESENT | WRITE | USER | ACCESSED | table.hpa().bits()
    }

    fn make_small(&self, entry: u64, level: Level, index: usize) -> Option<u64> {
        let below = level.down()?;
        let offset = (index as u64 % 512) << below.shift();
        let large = if below == Level::L1 { entry & !LARGE } else { entry };
        let lost = if mutant::is(Mutant::SplitLosesDirty) { DIRTY } else { 0 };
        Some((large & !lost) + offset)
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

    /// W only goes with a flush.
    #[inline]
    fn may_be_cached_writable(&self, entry: u64) -> bool {
        entry & WRITE != 0
    }

    #[inline]
    fn with_execute(&self, entry: u64, execute: bool) -> u64 {
        let forbid = !execute && self.no_execute;
        entry & !NO_EXECUTE | if forbid { NO_EXECUTE } else { 0 }
    }

    #[inline]
    fn is_young(&self, entry: u64) -> bool {
        entry & ACCESSED != 0
    }

    #[inline]
    fn make_old(&self, entry: u64) -> u64 {
        entry & !ACCESSED
    }

    /// Never: the processor sets A.
    #[inline]
    fn is_access_tracked(&self, _: u64) -> bool {
        false
    }

    #[inline]
    fn restore(&self, entry: u64) -> u64 {
        entry
    }

    #[inline]
    fn is_dirty(&self, entry: u64) -> bool {
        entry & DIRTY != 0
    }

    #[inline]
    fn without_dirty(&self, entry: u64) -> u64 {
        entry & !DIRTY
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

    /// Present, with a reserved address bit: a fault with the RSV bit, whatever else is in it.
    #[inline]
    fn make_mmio(&self, mmio: &Mmio) -> Option<u64> {
        let body = mmio::encode(mmio.gfn, mmio.generation).filter(|_| self.mmio_entries)?;
        let rights = if mmio.write { WRITE } else { 0 } | if mmio.user { USER } else { 0 };
        Some(body | PRESENT | rights)
    }

    #[inline]
    fn mmio(&self, entry: u64) -> Option<Mmio> {
        let marked = entry & (PRESENT | MMU_PRESENT | mmio::MARK) == PRESENT | mmio::MARK;
        let (gfn, generation) = mmio::decode(entry);
        let mmio = Mmio { gfn, write: entry & WRITE != 0, user: entry & USER != 0, generation };
        (marked && self.mmio_entries).then_some(mmio)
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

    #[inline]
    fn shadow_zero_check(&self, entry: u64, level: Level) -> bool {
        entry & PRESENT != 0
            && (entry & self.reserved[level.ordinal()][usize::from(Self::is_leaf(entry, level))] == 0
                || mutant::is(Mutant::FormatLargeReserved) && Self::is_leaf(entry, level))
            && !(mutant::is(Mutant::FormatNxReserved) && entry & NO_EXECUTE != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [PageSize; 3] = [PageSize::Size4K, PageSize::Size2M, PageSize::Size1G];
    const ALL: [Writability; 4] =
        [Writability::Writable, Writability::Watched, Writability::Tracked, Writability::ReadOnly];
    const TYPES: [MemoryType; 5] = [
        MemoryType::Uncacheable,
        MemoryType::WriteCombining,
        MemoryType::WriteThrough,
        MemoryType::WriteProtected,
        MemoryType::WriteBack,
    ];

    fn formats() -> Vec<Npt> {
        let mut formats = vec![];
        for five_level in [false, true] {
            for max_phys_addr in [36, 46, 52] {
                for no_execute in [false, true] {
                    for largest in SIZES {
                        formats.push(Npt::new(&NptHost { five_level, max_phys_addr, no_execute, largest }));
                    }
                }
            }
        }
        formats
    }

    fn leaves(format: &Npt) -> Vec<Leaf> {
        let pfn = Pfn::new_truncate(0x00f4_0000);
        let mut leaves = vec![];
        for size in SIZES.into_iter().filter(|&size| format.has_size(size)) {
            for writability in ALL {
                for execute in [false, true] {
                    for memory_type in TYPES {
                        let ram = Leaf::ram(pfn, size, writability);
                        leaves.push(Leaf { memory_type, ..ram.with_execute(execute) });
                    }
                }
            }
        }
        leaves
    }

    /// What is read back of a leaf: what the format cannot say is lost.
    fn kept(format: &Npt, leaf: &Leaf) -> Leaf {
        let memory_type = format.nearest_memory_type(leaf.memory_type);
        Leaf { read: true, memory_type, ..leaf.with_execute(leaf.execute || !format.no_execute) }
    }

    /// B1, B2, B5: what a format makes passes its own check and says what went in.
    #[test]
    fn b5_leaves_round_trip_and_pass_the_zero_check() {
        for format in formats() {
            for leaf in leaves(&format) {
                let entry = format.make_leaf(&leaf);
                let level = leaf.size.level();
                assert!(format.shadow_zero_check(entry, level));
                assert_eq!(format.entry(entry, level), Entry::Leaf);
                let kept = kept(&format, &leaf);
                assert_eq!(format.leaf(entry, level), Some(kept));
                assert!(format.permits(entry, AccessKind::Read));
                assert_eq!(
                    format.permits(entry, AccessKind::Write),
                    leaf.writability == Writability::Writable
                );
                assert_eq!(format.permits(entry, AccessKind::Execute), kept.execute);
                for other in ALL {
                    let changed = format.with_writability(entry, other);
                    assert_eq!(format.writability(changed), Some(other));
                    let back = format.with_writability(changed, leaf.writability);
                    assert_eq!(back & !DIRTY, entry & !DIRTY, "only W, its two notes and D change");
                }
            }
        }
    }

    #[test]
    fn links_permit_everything_and_are_no_leaves() {
        let table = Pfn::new_truncate(0x1234);
        for format in formats() {
            let entry = format.make_table(table, Level::L2);
            assert_eq!(entry & 7, 7);
            for level in [Level::L2, Level::L3, Level::L4, Level::L5] {
                assert!(format.shadow_zero_check(entry, level));
                assert_eq!(format.entry(entry, level), Entry::Table(table));
                assert_eq!(format.leaf(entry, level), None);
            }
        }
    }

    /// B5: frozen is neither present nor empty, for any payload, and small payloads name no memory (L1TF).
    #[test]
    fn b5_frozen_entries_are_recognised_and_never_present() {
        for format in formats() {
            for payload in [0, 1, 0xff_ffff, 1 << 39, (1 << 40) - 1] {
                let frozen = format.make_frozen(payload);
                assert_eq!(format.frozen_payload(frozen), payload);
                assert_eq!(frozen & (PRESENT | MMU_PRESENT), 0);
                assert!(payload >= 1 << 39 || frozen & 1 << 51 != 0, "the top address bit is set");
                for level in [Level::L1, Level::L2, Level::L3, Level::L4, Level::L5] {
                    assert_eq!(format.entry(frozen, level), Entry::Frozen);
                    assert_eq!(format.entry(0, level), Entry::Empty);
                    assert!(!format.shadow_zero_check(frozen, level));
                }
            }
        }
    }

    /// B7: small pages lead where the huge page led, with its rights.
    #[test]
    fn b7_small_pages_equal_the_huge_page() {
        for format in formats() {
            for leaf in leaves(&format) {
                let entry = format.make_leaf(&leaf);
                let level = leaf.size.level();
                let Some(smaller) = leaf.size.smaller() else {
                    assert_eq!(format.make_small(entry, level, 0), None);
                    continue;
                };
                for index in [0usize, 1, 511] {
                    let small = format.make_small(entry, level, index).unwrap();
                    let pfn = Pfn::new_truncate(leaf.pfn.number() + index as u64 * smaller.pages());
                    let found = format.leaf(small, smaller.level()).unwrap();
                    assert_eq!(found, Leaf { pfn, size: smaller, ..kept(&format, &leaf) });
                    assert_eq!(small & LARGE != 0, smaller != PageSize::Size4K, "bit 7 of a PTE is PAT");
                }
            }
        }
    }

    /// 6c6ab524cfae: NX in NPT is reserved exactly when the host has EFER.NXE clear, and then never set.
    #[test]
    fn commit_6c6ab524cfae_nx_is_reserved_only_without_nxe() {
        for format in formats() {
            let ram = Leaf::ram(Pfn::new_truncate(1), PageSize::Size4K, Writability::Writable);
            let entry = format.make_leaf(&ram.with_execute(false));
            assert_eq!(entry & NO_EXECUTE != 0, format.no_execute);
            assert_eq!(format.shadow_zero_check(entry | NO_EXECUTE, Level::L1), format.no_execute);
        }
    }

    /// A type that the power-on PAT lacks becomes uncacheable; every entry of that PAT beside the three is no leaf of ours.
    #[test]
    fn memory_types_are_entries_of_the_power_on_pat() {
        let format = formats()[0];
        let at = |memory_type| {
            let ram = Leaf::ram(Pfn::new_truncate(1), PageSize::Size4K, Writability::Writable);
            format.make_leaf(&Leaf { memory_type, ..ram }) & 0x98
        };
        assert_eq!(TYPES.map(at), [0x18, 0x18, 0x08, 0x18, 0]);
        let ram = Leaf::ram(Pfn::new_truncate(512), PageSize::Size4K, Writability::Writable);
        let entry = format.make_leaf(&ram);
        for other in [0x10, 0x80, 0x88, 0x90, 0x98] {
            assert_eq!(format.leaf(entry | other, Level::L1), None);
        }
    }

    /// Reads cannot be hidden: asked for, they are permitted all the same.
    #[test]
    fn every_leaf_can_be_read() {
        for format in formats() {
            assert!(!format.can_hide_reads());
            let ram = Leaf::ram(Pfn::new_truncate(1), PageSize::Size4K, Writability::ReadOnly);
            let entry = format.make_leaf(&Leaf { read: false, ..ram });
            assert_eq!(format.leaf(entry, Level::L1), Some(ram));
        }
    }

    #[test]
    fn the_zero_check_finds_each_reserved_bit() {
        let host =
            NptHost { five_level: true, max_phys_addr: 46, no_execute: false, largest: PageSize::Size2M };
        let format = Npt::new(&host);
        let link = format.make_table(Pfn::new_truncate(0x1234), Level::L2);
        for bit in (46..52).chain([63]) {
            for level in [Level::L2, Level::L3, Level::L4, Level::L5] {
                assert!(!format.shadow_zero_check(link | 1 << bit, level), "{level:?} bit {bit}");
            }
        }
        for level in [Level::L3, Level::L4, Level::L5] {
            assert!(!format.shadow_zero_check(link | LARGE, level), "{level:?}: no leaves of that size");
        }
        let leaf = PRESENT | LARGE;
        assert!(format.shadow_zero_check(leaf | 1 << 12, Level::L2), "PAT");
        for bit in 13..21 {
            assert!(!format.shadow_zero_check(leaf | 1 << bit, Level::L2));
        }
    }
}
