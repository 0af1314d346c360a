//! Guest registers of the VMCS that are read or written at many exits, each read once and written back at the entry.
use super::vmcs::{self, Fields, Width};
use core::cell::Cell;

/// A cached field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(super) enum Hot {
    /// RIP.
    Rip,
    /// RFLAGS.
    Rflags,
    /// CR0 as the hardware has it.
    Cr0,
    /// CR3 as the hardware has it.
    Cr3,
    /// CR4 as the hardware has it.
    Cr4,
    /// Access rights of CS.
    CsRights,
    /// Access rights of SS.
    SsRights,
    /// Interruptibility state.
    Interruptibility,
}

const COUNT: usize = 8;
const ALL: [Hot; COUNT] = [
    Hot::Rip,
    Hot::Rflags,
    Hot::Cr0,
    Hot::Cr3,
    Hot::Cr4,
    Hot::CsRights,
    Hot::SsRights,
    Hot::Interruptibility,
];

/// Where fields are written, beside being read.
pub(super) trait FieldsMut: Fields {
    /// Sets `field`.
    fn set<W: Width>(&self, field: vmcs::Field<W>, value: W::Value);
}

/// The cache of one VMCS.
#[derive(Debug, Default)]
pub(super) struct Cache {
    values: [Cell<u64>; COUNT],
    /// Fields whose value is known, one bit each.
    valid: Cell<u8>,
    /// Fields that were written since the last entry.
    dirty: Cell<u8>,
}

impl Cache {
    /// The field's value.
    #[inline]
    pub(super) fn get(&self, hot: Hot, vmcs: &impl Fields) -> u64 {
        let bit = 1 << hot as usize;
        if self.valid.get() & bit == 0 {
            self.values[hot as usize].set(read(hot, vmcs));
            self.valid.set(self.valid.get() | bit);
        }
        self.values[hot as usize].get()
    }

    /// Sets the field at the next entry.
    #[inline]
    pub(super) fn set(&self, hot: Hot, value: u64) {
        let bit = 1 << hot as usize;
        if self.valid.get() & bit == 0 || self.values[hot as usize].get() != value {
            self.values[hot as usize].set(value);
            self.valid.set(self.valid.get() | bit);
            self.dirty.set(self.dirty.get() | bit);
        }
    }

    /// Whether the field was written since the last entry.
    #[inline]
    pub(super) fn is_dirty(&self, hot: Hot) -> bool {
        self.dirty.get() & 1 << hot as usize != 0
    }

    /// Writes to the VMCS what was set.
    #[inline]
    pub(super) fn write_back(&self, vmcs: &impl FieldsMut) {
        let mut dirty = self.dirty.replace(0);
        while dirty != 0 {
            let index = dirty.trailing_zeros() as usize;
            dirty &= dirty - 1;
            write(ALL[index & (COUNT - 1)], self.values[index & (COUNT - 1)].get(), vmcs);
        }
    }

    /// The guest has run: nothing is known any more.
    #[inline]
    pub(super) fn forget(&self) {
        debug_assert_eq!(self.dirty.get(), 0, "the guest runs with what was written back");
        self.valid.set(0);
    }
}

#[inline]
fn read(hot: Hot, vmcs: &impl Fields) -> u64 {
    match hot {
        Hot::Rip => vmcs.read(vmcs::GUEST_RIP),
        Hot::Rflags => vmcs.read(vmcs::GUEST_RFLAGS),
        Hot::Cr0 => vmcs.read(vmcs::GUEST_CR0),
        Hot::Cr3 => vmcs.read(vmcs::GUEST_CR3),
        Hot::Cr4 => vmcs.read(vmcs::GUEST_CR4),
        Hot::CsRights => vmcs.read(vmcs::GUEST_CS_ACCESS_RIGHTS).into(),
        Hot::SsRights => vmcs.read(vmcs::GUEST_SS_ACCESS_RIGHTS).into(),
        Hot::Interruptibility => vmcs.read(vmcs::GUEST_INTERRUPTIBILITY).into(),
    }
}

#[inline]
fn write(hot: Hot, value: u64, vmcs: &impl FieldsMut) {
    match hot {
        Hot::Rip => vmcs.set(vmcs::GUEST_RIP, value),
        Hot::Rflags => vmcs.set(vmcs::GUEST_RFLAGS, value),
        Hot::Cr0 => vmcs.set(vmcs::GUEST_CR0, value),
        Hot::Cr3 => vmcs.set(vmcs::GUEST_CR3, value),
        Hot::Cr4 => vmcs.set(vmcs::GUEST_CR4, value),
        Hot::CsRights => vmcs.set(vmcs::GUEST_CS_ACCESS_RIGHTS, value as u32),
        Hot::SsRights => vmcs.set(vmcs::GUEST_SS_ACCESS_RIGHTS, value as u32),
        Hot::Interruptibility => vmcs.set(vmcs::GUEST_INTERRUPTIBILITY, value as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::RefCell;
    use std::collections::HashMap;

    #[derive(Default)]
    struct Table {
        fields: RefCell<HashMap<u32, u64>>,
        reads: Cell<u32>,
        writes: Cell<u32>,
    }

    impl Fields for Table {
        fn read<W: Width>(&self, field: vmcs::Field<W>) -> W::Value {
            self.reads.set(self.reads.get() + 1);
            W::truncate(self.fields.borrow().get(&field.encoding()).copied().unwrap_or_default())
        }
    }

    impl FieldsMut for Table {
        fn set<W: Width>(&self, field: vmcs::Field<W>, value: W::Value) {
            self.writes.set(self.writes.get() + 1);
            self.fields.borrow_mut().insert(field.encoding(), value.into());
        }
    }

    #[test]
    fn a_field_is_read_once_and_written_once() {
        let (cache, table) = (Cache::default(), Table::default());
        table.fields.borrow_mut().insert(vmcs::GUEST_RIP.encoding(), 0x1000);
        assert_eq!((cache.get(Hot::Rip, &table), cache.get(Hot::Rip, &table)), (0x1000, 0x1000));
        assert_eq!(table.reads.get(), 1);
        cache.set(Hot::Rip, 0x1002);
        cache.set(Hot::Rip, 0x1004);
        assert_eq!(cache.get(Hot::Rip, &table), 0x1004);
        cache.write_back(&table);
        cache.write_back(&table);
        assert_eq!((table.reads.get(), table.writes.get()), (1, 1));
        assert_eq!(table.fields.borrow()[&vmcs::GUEST_RIP.encoding()], 0x1004);
    }

    #[test]
    fn what_is_known_to_be_so_is_not_written() {
        let (cache, table) = (Cache::default(), Table::default());
        assert_eq!(cache.get(Hot::Rflags, &table), 0);
        cache.set(Hot::Rflags, 0);
        assert!(!cache.is_dirty(Hot::Rflags));
        cache.set(Hot::Cr3, 0);
        assert!(cache.is_dirty(Hot::Cr3), "nobody knows what the VMCS has");
        cache.write_back(&table);
        assert_eq!(table.writes.get(), 1);
    }

    #[test]
    fn nothing_is_known_after_the_guest_has_run() {
        let (cache, table) = (Cache::default(), Table::default());
        cache.set(Hot::Rip, 5);
        cache.write_back(&table);
        cache.forget();
        table.fields.borrow_mut().insert(vmcs::GUEST_RIP.encoding(), 9);
        assert_eq!(cache.get(Hot::Rip, &table), 9);
    }

    #[test]
    fn every_field_survives_a_round_trip() {
        let (cache, table) = (Cache::default(), Table::default());
        for (n, hot) in ALL.into_iter().enumerate() {
            assert_eq!(n, hot as usize);
            cache.set(hot, 0x100 + n as u64);
        }
        cache.write_back(&table);
        cache.forget();
        for (n, hot) in ALL.into_iter().enumerate() {
            assert_eq!(cache.get(hot, &table), 0x100 + n as u64);
        }
    }
}
