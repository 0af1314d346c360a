//! Entries of Umbra's own four-level page tables. AMD APM vol. 2 section 5.3, Intel SDM vol. 3 section 4.5.

/// Entries of one table.
pub const ENTRIES: usize = 512;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const WRITE_THROUGH: u64 = 1 << 3;
const CACHE_DISABLE: u64 = 1 << 4;
/// Set by Umbra from the start, so that the processor need not.
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// PS in an entry of level 2 or 3: a page, not a table.
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// The PAT bit of a large page lies where the address begins, that of a small page where PS is otherwise.
const LARGE_PAT: u64 = 1 << 12;
const SMALL_PAT: u64 = 1 << 7;

/// What may be done with a mapping. There is no value that is both writable and executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write.
    ReadWrite,
    /// Read and execute.
    ReadExecute,
}

/// How a mapping is cached. The values index the PAT as `cpu::control` sets it: as it is after reset
/// (AMD APM vol. 2 section 7.8.2), but for entry 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// PAT entry 0, write-back.
    WriteBack,
    /// PAT entry 3, uncacheable, whatever the MTRRs say.
    Uncached,
    /// PAT entry 5, write-combining: writes are gathered, reads are uncached. For framebuffers.
    WriteCombining,
}

/// Access and caching of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// What may be done with it.
    pub access: Access,
    /// How it is cached.
    pub caching: Caching,
}

impl Attributes {
    /// Write-back memory.
    pub const fn memory(access: Access) -> Self {
        Self { access, caching: Caching::WriteBack }
    }

    /// Device registers.
    pub const DEVICE: Self = Self { access: Access::ReadWrite, caching: Caching::Uncached };

    /// A framebuffer.
    pub const FRAMEBUFFER: Self = Self { access: Access::ReadWrite, caching: Caching::WriteCombining };
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

impl Entry {
    /// Nothing is mapped.
    pub const EMPTY: Entry = Entry(0);

    /// A page of `level` (1: 4 KiB, 2: 2 MiB, 3: 1 GiB) at `phys`.
    pub fn page(phys: u64, level: u32, attributes: Attributes) -> Self {
        let access = match attributes.access {
            Access::Read => NO_EXECUTE,
            Access::ReadWrite => NO_EXECUTE | WRITABLE,
            Access::ReadExecute => 0,
        };
        let caching = match attributes.caching {
            Caching::WriteBack => 0,
            Caching::Uncached => CACHE_DISABLE | WRITE_THROUGH,
            Caching::WriteCombining if level == 1 => SMALL_PAT | WRITE_THROUGH,
            Caching::WriteCombining => LARGE_PAT | WRITE_THROUGH,
        };
        let size = if level == 1 { 0 } else { LARGE };
        Entry(phys & ADDRESS | PRESENT | ACCESSED | DIRTY | access | caching | size)
    }

    /// A reference to the next lower table; it grants everything, the page decides.
    pub fn table(phys: u64) -> Self {
        Entry(phys & ADDRESS | PRESENT | ACCESSED | WRITABLE)
    }

    /// Whether the entry is used at all.
    pub fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// Whether a present entry of `level` maps a page.
    pub fn is_page(self, level: u32) -> bool {
        level == 1 || (level <= 3 && self.0 & LARGE != 0)
    }

    /// Physical address of the table or of the page of `level`.
    pub fn addr(self, level: u32) -> u64 {
        let pat = if level > 1 && self.is_page(level) { LARGE_PAT } else { 0 };
        self.0 & ADDRESS & !pat
    }

    /// Whether this entry allows writes.
    pub fn allows_write(self) -> bool {
        self.0 & WRITABLE != 0
    }

    /// Whether this entry allows instruction fetches.
    pub fn allows_execute(self) -> bool {
        self.0 & NO_EXECUTE == 0
    }

    /// Whether this entry allows user mode.
    pub fn allows_user(self) -> bool {
        self.0 & USER != 0
    }

    /// Caching and access of a page, for comparison.
    pub fn attributes(self) -> Attributes {
        let access = match (self.allows_write(), self.allows_execute()) {
            (true, _) => Access::ReadWrite,
            (false, true) => Access::ReadExecute,
            (false, false) => Access::Read,
        };
        let caching = match (self.0 & CACHE_DISABLE != 0, self.0 & WRITE_THROUGH != 0) {
            (true, _) => Caching::Uncached,
            (false, true) => Caching::WriteCombining,
            (false, false) => Caching::WriteBack,
        };
        Attributes { access, caching }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_say_what_they_were_made_for() {
        for level in 1..=3 {
            for access in [Access::Read, Access::ReadWrite, Access::ReadExecute] {
                for caching in [Caching::WriteBack, Caching::Uncached, Caching::WriteCombining] {
                    let attributes = Attributes { access, caching };
                    let entry = Entry::page(0x40_0000_0000, level, attributes);
                    assert!(entry.is_present() && entry.is_page(level) && !entry.allows_user());
                    assert_eq!(entry.addr(level), 0x40_0000_0000);
                    assert_eq!(entry.attributes(), attributes);
                    assert!(!(entry.allows_write() && entry.allows_execute()));
                }
            }
        }
    }

    /// PAT, PCD and PWT make the index of the PAT's entry (AMD APM vol. 2 section 7.8.3).
    #[test]
    fn write_combining_is_entry_5() {
        for (level, pat) in [(1, 7), (2, 12), (3, 12)] {
            let Entry(entry) = Entry::page(0x4000_0000, level, Attributes::FRAMEBUFFER);
            assert_eq!((entry >> pat & 1) << 2 | (entry >> 4 & 1) << 1 | entry >> 3 & 1, 5);
        }
    }

    #[test]
    fn the_pat_bit_of_a_large_page_is_no_address() {
        assert_eq!(Entry(0x20_0000 | LARGE_PAT | LARGE | PRESENT).addr(2), 0x20_0000);
        assert!(!Entry::table(0x1000).is_page(2));
        assert!(!Entry(LARGE | PRESENT).is_page(4), "PS is reserved at level 4");
    }
}
