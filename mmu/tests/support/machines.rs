//! Processors, as far as second-stage tables go: how one reads an entry, written from its manual, and the format that the
//! crate has for it. Entries are numbers here, and levels too: nothing is taken from the crate's own masks.
use std::fmt;

use mmu::{EntryFormat, Ept, EptHost, Npt, NptHost, Pae, PaeHost, PageSize};

/// What machines of both vendors have.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    pub five_level: bool,
    pub max_phys_addr: u8,
    pub largest: PageSize,
}

pub const HOST: Host = Host { five_level: false, max_phys_addr: 46, largest: PageSize::Size1G };

impl Host {
    pub fn levels(&self) -> u32 {
        if self.five_level {
            5
        } else {
            4
        }
    }
}

/// What an entry permits, if all entries above it do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    pub read: bool,
    pub write: bool,
    /// Fetches in supervisor mode and in user mode.
    pub execute: [bool; 2],
}

impl Rights {
    pub const ALL: Self = Self { read: true, write: true, execute: [true; 2] };

    pub fn and(self, other: Self) -> Self {
        Self {
            read: self.read && other.read,
            write: self.write && other.write,
            execute: [0, 1].map(|mode| self.execute[mode] && other.execute[mode]),
        }
    }
}

/// What a processor makes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Not present.
    Absent,
    /// Present, and something in it is reserved: a nested page fault with the RSV bit, an EPT misconfiguration.
    Malformed,
    /// Refers to a table.
    Link(Rights),
    /// Maps a page of the level's size.
    Page(Rights),
}

/// A processor with second-stage tables.
pub trait Machine: Copy + fmt::Debug + Send + Sync + 'static {
    type Format: EntryFormat + 'static;

    fn host(&self) -> Host;
    /// Levels of its tables.
    fn levels(&self) -> u32 {
        self.host().levels()
    }
    /// The same machine, but for these.
    fn on(self, host: Host) -> Self;
    /// The format that the crate has for it.
    fn format(&self) -> Self::Format;
    /// What it makes of an entry of a table at `level`.
    fn read(&self, entry: u64, level: u32) -> Reading;
    /// Bits that it sets in each entry that a translation uses, and in the leaf of one for a write.
    fn flags(&self) -> (u64, u64);
    /// Whether a leaf at `level` has the type of ordinary memory.
    fn is_write_back(&self, entry: u64, level: u32) -> bool;
    /// The entry that an access-tracked one stands for: the rights that were put aside, and the frame as it is.
    fn aside(&self, entry: u64) -> Option<u64> {
        let _ = entry;
        None
    }
    /// Software's own: whether the slot permits writes, and whether a fault may set W.
    fn notes(&self, entry: u64) -> (bool, bool);
}

fn bit(entry: u64, at: u32) -> bool {
    entry >> at & 1 == 1
}

fn any(entry: u64, low: u32, high: u32) -> bool {
    (low..=high).any(|at| bit(entry, at))
}

/// Whether an entry at this level can map a page, by its size alone.
fn has_pages(host: &Host, level: u32) -> bool {
    match level {
        1 => true,
        2 => host.largest >= PageSize::Size2M,
        3 => host.largest >= PageSize::Size1G,
        _ => false,
    }
}

/// AMD APM vol. 2, 5.3 and 15.25.
#[derive(Clone, Copy, Debug)]
pub struct Amd {
    pub host: Host,
    /// EFER.NXE of the host.
    pub no_execute: bool,
}

pub const AMD: Amd = Amd { host: HOST, no_execute: true };

impl Machine for Amd {
    type Format = Npt;

    fn host(&self) -> Host {
        self.host
    }

    fn on(self, host: Host) -> Self {
        Self { host, ..self }
    }

    fn format(&self) -> Npt {
        let Host { five_level, max_phys_addr, largest } = self.host;
        Npt::new(&NptHost { five_level, max_phys_addr, no_execute: self.no_execute, largest })
    }

    fn read(&self, entry: u64, level: u32) -> Reading {
        if !bit(entry, 0) {
            return Reading::Absent;
        }
        // Bit 7 of a PTE is PAT.
        let page = level == 1 || bit(entry, 7);
        let reserved = match level {
            4 | 5 => any(entry, 7, 8),
            3 if page => any(entry, 13, 29),
            2 if page => any(entry, 13, 20),
            _ => false,
        };
        let malformed = reserved
            || page && !has_pages(&self.host, level)
            || any(entry, self.host.max_phys_addr.into(), 51)
            || bit(entry, 63) && !self.no_execute;
        // The whole walk is a user access (15.25.6): with U=0 nothing is permitted.
        let user = bit(entry, 2);
        let rights =
            Rights { read: user, write: user && bit(entry, 1), execute: [user && !bit(entry, 63); 2] };
        match (malformed, page) {
            (true, _) => Reading::Malformed,
            (false, false) => Reading::Link(rights),
            (false, true) => Reading::Page(rights),
        }
    }

    fn flags(&self) -> (u64, u64) {
        (0x20, 0x40)
    }

    /// PWT, PCD and PAT choose the first entry of the PAT.
    fn is_write_back(&self, entry: u64, level: u32) -> bool {
        let pat = if level == 1 { 0x80 } else { 0x1000 };
        entry & (0x18 | pat) == 0
    }

    fn notes(&self, entry: u64) -> (bool, bool) {
        (bit(entry, 9), bit(entry, 10))
    }
}

/// Intel SDM vol. 3, 29.3.
#[derive(Clone, Copy, Debug)]
pub struct Intel {
    pub host: Host,
    pub accessed_dirty: bool,
    pub execute_only: bool,
    pub mode_based_execute: bool,
}

/// A processor that has everything, and one that has nothing beside EPT.
pub const INTEL: Intel =
    Intel { host: HOST, accessed_dirty: true, execute_only: true, mode_based_execute: true };
pub const PLAIN_INTEL: Intel =
    Intel { accessed_dirty: false, execute_only: false, mode_based_execute: false, ..INTEL };

impl Machine for Intel {
    type Format = Ept;

    fn host(&self) -> Host {
        self.host
    }

    fn on(self, host: Host) -> Self {
        Self { host, ..self }
    }

    fn format(&self) -> Ept {
        let Host { five_level, max_phys_addr, largest } = self.host;
        let Self { accessed_dirty, execute_only, mode_based_execute, .. } = *self;
        Ept::new(&EptHost {
            five_level,
            max_phys_addr,
            largest,
            accessed_dirty,
            execute_only,
            mode_based_execute,
        })
    }

    fn read(&self, entry: u64, level: u32) -> Reading {
        let [read, write, execute] = [0, 1, 2].map(|at| bit(entry, at));
        // Bit 10 is ignored without the control; then bit 2 is for all fetches.
        let execute_user = if self.mode_based_execute { bit(entry, 10) } else { execute };
        // 29.3.2: present is an entry that permits anything.
        if !read && !write && !execute && !execute_user {
            return Reading::Absent;
        }
        // Tables of 29.3.2. Above level 3 bit 7 is reserved with bits 6:3; in a PTE it is ignored.
        let page = level == 1 || level < 4 && bit(entry, 7);
        let reserved = match (level, page) {
            (4 | 5, _) => any(entry, 3, 7),
            (2 | 3, false) => any(entry, 3, 6),
            (3, true) => any(entry, 12, 29),
            (2, true) => any(entry, 12, 20),
            _ => false,
        };
        // 29.3.3.1, one by one.
        let write_only = !read && write;
        let fetch_only = !read && (execute || execute_user) && !self.execute_only;
        let memory_type = page && matches!(entry >> 3 & 7, 2 | 3 | 7);
        let address = any(entry, self.host.max_phys_addr.into(), 51);
        let size = page && !has_pages(&self.host, level);
        let rights = Rights { read, write, execute: [execute, execute_user] };
        match (write_only || fetch_only || memory_type || address || size || reserved, page) {
            (true, _) => Reading::Malformed,
            (false, false) => Reading::Link(rights),
            (false, true) => Reading::Page(rights),
        }
    }

    /// 29.3.5: none without the pointer's bit 6.
    fn flags(&self) -> (u64, u64) {
        if self.accessed_dirty {
            (0x100, 0x200)
        } else {
            (0, 0)
        }
    }

    /// Type 6, and the guest's PAT has its say.
    fn is_write_back(&self, entry: u64, _: u32) -> bool {
        entry >> 3 & 15 == 6
    }

    /// Bits 54, 55 and 59 are R and both X, put aside; nothing is where the frame would be, which is inverted.
    fn aside(&self, entry: u64) -> Option<u64> {
        let absent = self.read(entry, 1) == Reading::Absent && bit(entry, 11);
        let rights = entry >> 54 & 1 | (entry >> 55 & 1) << 2 | (entry >> 59 & 1) << 10;
        (absent && !self.accessed_dirty && rights != 0)
            .then_some((entry ^ 0x000f_ffff_ffff_f000) & !(0x23 << 54) | rights)
    }

    fn notes(&self, entry: u64) -> (bool, bool) {
        (bit(entry, 52), bit(entry, 53))
    }
}

/// A processor in legacy PAE mode with EFER.NXE set: AMD APM vol. 2, 5.2.3. Its root has four entries.
#[derive(Clone, Copy, Debug)]
pub struct PaeCpu {
    pub host: Host,
}

pub const PAE: PaeCpu = PaeCpu { host: Host { largest: PageSize::Size2M, ..HOST } };

impl Machine for PaeCpu {
    type Format = Pae;

    fn host(&self) -> Host {
        self.host
    }

    fn levels(&self) -> u32 {
        3
    }

    fn on(self, host: Host) -> Self {
        Self { host: Host { largest: PageSize::Size2M, ..host } }
    }

    fn format(&self) -> Pae {
        Pae::new(&PaeHost { max_phys_addr: self.host.max_phys_addr })
    }

    fn read(&self, entry: u64, level: u32) -> Reading {
        if !bit(entry, 0) {
            return Reading::Absent;
        }
        let page = level == 1 || level == 2 && bit(entry, 7);
        // Figures 5-9 to 5-15: a PDPTE has P, PWT, PCD, the address and three bits for software.
        let reserved = match (level, page) {
            (3, _) => any(entry, 1, 2) || any(entry, 5, 8) || any(entry, 52, 63),
            (2, true) => any(entry, 13, 20) || any(entry, 52, 62),
            _ => any(entry, 52, 62),
        };
        if reserved || any(entry, self.host.max_phys_addr.into(), 51) {
            return Reading::Malformed;
        }
        if level == 3 {
            return Reading::Link(Rights::ALL);
        }
        // Every access here is a user access.
        let user = bit(entry, 2);
        let rights =
            Rights { read: user, write: user && bit(entry, 1), execute: [user && !bit(entry, 63); 2] };
        if page {
            Reading::Page(rights)
        } else {
            Reading::Link(rights)
        }
    }

    fn flags(&self) -> (u64, u64) {
        (0x20, 0x40)
    }

    fn is_write_back(&self, entry: u64, level: u32) -> bool {
        AMD.is_write_back(entry, level)
    }

    fn notes(&self, entry: u64) -> (bool, bool) {
        (bit(entry, 9), bit(entry, 10))
    }
}

/// Makes each of these functions, which take a machine, a test on every machine.
macro_rules! on_every_machine {
    ($($test:ident),* $(,)?) => {
        on_every_machine!(@on amd AMD $($test)*);
        on_every_machine!(@on intel INTEL $($test)*);
        on_every_machine!(@on plain_intel PLAIN_INTEL $($test)*);
    };
    (@on $module:ident $machine:ident $($test:ident)*) => {
        mod $module {
            $(
                #[test]
                fn $test() {
                    super::$test(super::support::machines::$machine);
                }
            )*
        }
    };
}
pub(crate) use on_every_machine;
