//! Guest registers of the VMCS that are read or written at many exits, each read once and written back at the entry.
use super::vmcs::{self, FieldNatural, Fields, Width};
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
    /// DR7.
    Dr7,
}

/// What the end of an instruction needs to know.
pub(super) const AT_COMPLETION: [Hot; 4] = [Hot::Rip, Hot::Rflags, Hot::CsRights, Hot::Interruptibility];
/// What emulation needs beside that.
pub(super) const IN_EMULATION: [Hot; 4] = [Hot::Cr0, Hot::Cr3, Hot::Cr4, Hot::SsRights];

/// A power of two, so that no index needs a check.
const SLOTS: usize = 16;

/// The fields' encodings, in the order of [`Hot`].
const ENCODINGS: [u32; SLOTS] = {
    let mut encodings = [vmcs::GUEST_RIP.encoding(); SLOTS];
    encodings[Hot::Rflags as usize] = vmcs::GUEST_RFLAGS.encoding();
    encodings[Hot::Cr0 as usize] = vmcs::GUEST_CR0.encoding();
    encodings[Hot::Cr3 as usize] = vmcs::GUEST_CR3.encoding();
    encodings[Hot::Cr4 as usize] = vmcs::GUEST_CR4.encoding();
    encodings[Hot::CsRights as usize] = vmcs::GUEST_CS_ACCESS_RIGHTS.encoding();
    encodings[Hot::SsRights as usize] = vmcs::GUEST_SS_ACCESS_RIGHTS.encoding();
    encodings[Hot::Interruptibility as usize] = vmcs::GUEST_INTERRUPTIBILITY.encoding();
    encodings[Hot::Dr7 as usize] = vmcs::GUEST_DR7.encoding();
    encodings
};

/// The field, as wide as a register: VMREAD and VMWRITE reach narrower ones with that, too.
#[inline(always)]
const fn field(index: usize) -> FieldNatural {
    FieldNatural::from_encoding(ENCODINGS[index % SLOTS])
}

/// Where fields are written, beside being read.
pub(super) trait FieldsMut: Fields {
    /// Sets `field`.
    fn set<W: Width>(&self, field: vmcs::Field<W>, value: W::Value);
}

/// The cache of one VMCS.
#[derive(Debug, Default)]
pub(super) struct Cache {
    values: [Cell<u64>; SLOTS],
    /// Fields whose value is known, one bit each.
    valid: Cell<u16>,
    /// Fields that were written since the last entry.
    dirty: Cell<u16>,
}

impl Cache {
    /// The field's value.
    #[inline(always)]
    pub(super) fn get(&self, hot: Hot, vmcs: &impl Fields) -> u64 {
        if self.valid.get() & 1 << hot as usize == 0 {
            self.read(hot, vmcs);
        }
        self.values[hot as usize].get()
    }

    #[cold]
    #[inline(never)]
    fn read(&self, hot: Hot, vmcs: &impl Fields) {
        self.values[hot as usize].set(vmcs.read(field(hot as usize)));
        self.valid.set(self.valid.get() | 1 << hot as usize);
    }

    /// Reads all of `hots` that are not known, for someone who will want most of them.
    #[inline(always)]
    pub(super) fn fill<const N: usize>(&self, hots: [Hot; N], vmcs: &impl Fields) {
        let mask = hots.iter().fold(0, |mask, &hot| mask | 1 << hot as usize);
        let known = self.valid.get() & mask;
        self.valid.set(self.valid.get() | mask);
        for hot in hots {
            // Mostly none is known.
            if known == 0 || known & 1 << hot as usize == 0 {
                self.values[hot as usize].set(vmcs.read(field(hot as usize)));
            }
        }
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

    /// Whether one of the fields was written since the last entry.
    #[inline(always)]
    pub(super) fn is_dirty<const N: usize>(&self, hots: [Hot; N]) -> bool {
        self.dirty.get() & hots.iter().fold(0, |mask, &hot| mask | 1 << hot as usize) != 0
    }

    /// Writes to the VMCS what was set.
    #[inline(always)]
    pub(super) fn write_back(&self, vmcs: &impl FieldsMut) {
        let mut dirty = self.dirty.replace(0);
        while dirty != 0 {
            let index = dirty.trailing_zeros() as usize % SLOTS;
            dirty &= dirty - 1;
            vmcs.set(field(index), self.values[index].get());
        }
    }

    /// The guest has run: nothing is known any more.
    #[inline(always)]
    pub(super) fn forget(&self) {
        debug_assert_eq!(self.dirty.get(), 0, "the guest runs with what was written back");
        self.valid.set(0);
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
        assert!(!cache.is_dirty([Hot::Rflags]));
        cache.set(Hot::Cr3, 0);
        assert!(cache.is_dirty([Hot::Rflags, Hot::Cr3]), "nobody knows what the VMCS has");
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
    fn what_was_set_is_not_read_over() {
        let (cache, table) = (Cache::default(), Table::default());
        cache.set(Hot::Rip, 5);
        cache.fill(AT_COMPLETION, &table);
        assert_eq!((cache.get(Hot::Rip, &table), cache.get(Hot::Rflags, &table)), (5, 0));
        assert_eq!(table.reads.get(), 3);
        cache.fill(IN_EMULATION, &table);
        cache.fill(IN_EMULATION, &table);
        assert_eq!(table.reads.get(), 7);
    }

    #[test]
    fn every_field_survives_a_round_trip() {
        const ALL: [(Hot, u32); 9] = [
            (Hot::Rip, vmcs::GUEST_RIP.encoding()),
            (Hot::Rflags, vmcs::GUEST_RFLAGS.encoding()),
            (Hot::Cr0, vmcs::GUEST_CR0.encoding()),
            (Hot::Cr3, vmcs::GUEST_CR3.encoding()),
            (Hot::Cr4, vmcs::GUEST_CR4.encoding()),
            (Hot::CsRights, vmcs::GUEST_CS_ACCESS_RIGHTS.encoding()),
            (Hot::SsRights, vmcs::GUEST_SS_ACCESS_RIGHTS.encoding()),
            (Hot::Interruptibility, vmcs::GUEST_INTERRUPTIBILITY.encoding()),
            (Hot::Dr7, vmcs::GUEST_DR7.encoding()),
        ];
        let (cache, table) = (Cache::default(), Table::default());
        for (n, (hot, _)) in ALL.into_iter().enumerate() {
            assert_eq!(n, hot as usize);
            cache.set(hot, 0x100 + n as u64);
        }
        cache.write_back(&table);
        cache.forget();
        for (n, (hot, encoding)) in ALL.into_iter().enumerate() {
            assert_eq!(table.fields.borrow()[&encoding], 0x100 + n as u64);
            assert_eq!(cache.get(hot, &table), 0x100 + n as u64);
        }
    }
}
