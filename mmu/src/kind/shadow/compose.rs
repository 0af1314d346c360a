//! What a leaf says for an entry of the guest: two stages, or a guest's tables and the slots, in one entry.
//!
//! Of nested tables, a leaf has the rights that all of L1's entries permit, less what the slot and the log take away.
//! Its memory type is that of L1's entry: below it L1's memory is write-back, and a write-back type under another leaves
//! that as it is (Intel SDM vol. 3, 29.3.7.2 and table 12-7; AMD APM vol. 2, 15.25.8). L2's own PAT has its say after
//! that, by the processor, unless L1's entry says that it has none.
use super::ShadowMmu;
use crate::access::Prot;
use crate::addr::Pfn;
use crate::format::{EntryFormat, Leaf, MemoryType, Writability};
use crate::level::{Level, PageSize};
use crate::mutant::{self, Mutant};
use crate::role::{Caching, CpuRole, PagingMode, RoleFlags};
use crate::tables::TableMemory;

impl<F: EntryFormat, M: TableMemory> ShadowMmu<'_, F, M> {
    /// A leaf with the rights `prot` of `guest`'s entries. Rights that the format cannot tell apart are rounded down.
    #[inline(always)]
    pub(super) fn compose(
        &self,
        guest: Option<&CpuRole>,
        (prot, caching): (Prot, Caching),
        (pfn, size): (Pfn, PageSize),
        writability: Writability,
    ) -> Leaf {
        let ept = guest.is_some_and(CpuRole::is_ept);
        let mut execute = prot.contains(Prot::EXECUTE);
        let mut execute_user = execute;
        if guest.is_some_and(|guest| guest.flags().contains(RoleFlags::MODE_BASED_EXECUTE)) {
            execute_user =
                prot.contains(Prot::EXECUTE_USER) || execute && mutant::is(Mutant::UserFetchesAlike);
            if !self.format.can_tell_user_fetches() {
                (execute, execute_user) = (execute && execute_user, execute && execute_user);
            }
        }
        Leaf {
            user: ept || prot.contains(Prot::USER),
            read: prot.contains(Prot::READ),
            execute,
            execute_user,
            memory_type: self.format.nearest_memory_type(caching.memory_type),
            ignore_pat: caching.ignore_pat,
            key: caching.key,
            ..Leaf::ram(pfn, size, writability)
        }
    }

    /// Whether a leaf can have the rights of `leaf` and none beside them: one without reads has to permit fetches, and be of
    /// a format that has such leaves.
    pub(super) fn can_say(&self, leaf: &Leaf) -> bool {
        leaf.read || (self.format.can_hide_reads() && (leaf.execute || leaf.execute_user))
    }
}

/// How the leaf `entry` of `guest`'s tables at `level` wants its page cached, and its protection key. A guest's own tables
/// have their say on caching by the processor, and none here; their keys the processor finds in the shadow (the role does not
/// tell whether it heeds them).
#[inline(always)]
pub(super) fn caching(guest: Option<&CpuRole>, entry: u64, level: Level) -> Caching {
    const EPT_IGNORE_PAT: u64 = 1 << 6;
    const KEY_SHIFT: u32 = 59;
    let Some(guest) = guest.filter(|_| !mutant::is(Mutant::NestedTypeIgnored)) else {
        return Caching::WRITE_BACK;
    };
    if guest.is_ept() {
        // Reserved types are misconfigured, and never get here.
        let memory_type = match entry >> 3 & 7 {
            1 => MemoryType::WriteCombining,
            4 => MemoryType::WriteThrough,
            5 => MemoryType::WriteProtected,
            6 => MemoryType::WriteBack,
            _ => MemoryType::Uncacheable,
        };
        return Caching { memory_type, ignore_pat: entry & EPT_IGNORE_PAT != 0, key: 0 };
    }
    if !guest.flags().contains(RoleFlags::NESTED) {
        let long = matches!(guest.mode(), PagingMode::FourLevel | PagingMode::FiveLevel);
        let key = if long { (entry >> KEY_SHIFT & 15) as u8 } else { 0 };
        return Caching { key, ..Caching::WRITE_BACK };
    }
    // PWT and PCD are bits 3 and 4; PAT is bit 7 of a PTE and bit 12 of a large page (AMD APM vol. 2, 7.8.3).
    let pat = if level == Level::L1 { 7 } else { 12 };
    let index = entry >> 3 & 3 | (entry >> pat & 1) << 2;
    Caching { memory_type: guest.types().at(index as u32), ignore_pat: false, key: 0 }
}
