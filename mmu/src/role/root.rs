//! Roles of Umbra's own tables: which table pages and which roots can serve again.
use super::{CpuRole, PagingMode, RoleFlags};
use crate::access::Prot;
use crate::format::MemoryType;
use crate::level::Level;

/// What a vCPU is doing, as far as it decides which memory and which tables it sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct VcpuMode {
    /// System management mode: another address space.
    pub smm: bool,
    /// It runs L2.
    pub nested: bool,
}

/// What all table pages under one root have in common.
///
/// Everything it takes to bring a page up to date without its vCPU is in it: how the guest's entries are read (mode, NX,
/// PSE, PSE-36, page sizes, MAXPHYADDR), so a change of the guest's CPUID is another role, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BaseRole {
    /// How the guest's tables are read; `None` if the pages follow from slots alone.
    guest: Option<CpuRole>,
    /// Whose memory.
    vcpu: VcpuMode,
    /// The processor keeps accessed and dirty flags in these pages.
    accessed_dirty: bool,
}

/// The role of a root: with the guest's root pointer it is the key of the root cache.
///
/// A change of CR0.WP, CR4, EFER, SMM or the guest's CPUID makes another role, and so at most another root. What the
/// processor itself applies as it walks (SMEP and SMAP with CR0.WP set, protection keys) is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RootRole {
    base: BaseRole,
    level: Level,
    direct: bool,
    passthrough: bool,
}

/// The role of a table page: with the guest frame it shadows it is the page's key. A page serves again only if all of it is
/// equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageRole {
    /// What the whole tree has in common.
    pub base: BaseRole,
    /// Level of the table.
    pub level: Level,
    /// What the guest's entries above permit: those of the parents alone.
    pub access: Prot,
    /// Which part of a guest's table of 1024 four-byte entries this page of 512 shadows.
    pub quadrant: u8,
    /// The page shadows no table: it maps a run of guest frames.
    pub direct: bool,
    /// The page is a level that the guest's tables do not have, above their root.
    pub passthrough: bool,
    /// What the entry of a large page says beside rights, for a direct page below it.
    pub caching: Caching,
}

/// What a leaf of the guest's says beside rights: how an entry of L1's nested tables wants its page cached, and the protection
/// key of a page of the guest's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Caching {
    /// The type.
    pub memory_type: MemoryType,
    /// L2's own tables have no say: EPT's bit 6.
    pub ignore_pat: bool,
    /// The protection key.
    pub key: u8,
}

impl Caching {
    /// Ordinary memory, with key 0.
    pub const WRITE_BACK: Self = Self { memory_type: MemoryType::WriteBack, ignore_pat: false, key: 0 };
}

impl BaseRole {
    /// How the guest's tables are read.
    #[inline]
    pub const fn guest(&self) -> Option<CpuRole> {
        self.guest
    }

    /// Whose memory it is.
    #[inline]
    pub const fn vcpu(&self) -> VcpuMode {
        self.vcpu
    }

    /// Whether the processor keeps accessed and dirty flags in these pages.
    #[inline]
    pub const fn accessed_dirty(&self) -> bool {
        self.accessed_dirty
    }
}

impl RootRole {
    /// A root of the direct kind, with tables from `level` down: the same for all modes of the guest.
    pub const fn direct(level: Level, vcpu: VcpuMode, accessed_dirty: bool) -> Self {
        let base = BaseRole { guest: None, vcpu, accessed_dirty };
        Self { base, level, direct: true, passthrough: false }
    }

    /// A root that shadows the tables which `guest` reads: a guest's own, or L1's for L2. `host` is the number of levels
    /// that the CPU walks when it walks shadows of nested tables; guests' own tables are shadowed at their depth.
    ///
    /// A guest without paging has a direct root of three levels, for 32-bit addresses.
    pub fn shadow(guest: CpuRole, host: Level, vcpu: VcpuMode, accessed_dirty: bool) -> Self {
        let Some(top) = guest.top() else {
            return Self::direct(Level::L3, vcpu, accessed_dirty);
        };
        // The flags decide whether a walk of L2's tables is a write, so the processor keeps them for L2 if L1's pointer
        // says so (Intel SDM vol. 3, 29.3.3.2).
        let accessed_dirty = accessed_dirty && guest.keeps_accessed_dirty();
        let base = BaseRole { guest: Some(shadowed(guest)), vcpu, accessed_dirty };
        // Entries of four bytes are shadowed by PAE's tables.
        let depth = if guest.flags().contains(RoleFlags::NESTED) { host } else { top.max(Level::L3) };
        Self { base, level: depth, direct: false, passthrough: depth > top && top >= Level::L4 }
    }

    /// What all pages under the root have in common.
    #[inline]
    pub const fn base(&self) -> BaseRole {
        self.base
    }

    /// Level of the root's table.
    #[inline]
    pub const fn level(&self) -> Level {
        self.level
    }

    /// Whether the root depends on slots alone; if not, the guest's root pointer is part of the key.
    #[inline]
    pub const fn is_direct(&self) -> bool {
        self.direct
    }

    /// The role of the root's own page.
    pub const fn page(&self) -> PageRole {
        PageRole {
            base: self.base,
            level: self.level,
            access: match self.base.guest {
                Some(guest) => all_access(guest),
                None => Prot::all(),
            },
            quadrant: 0,
            direct: self.direct,
            passthrough: self.passthrough,
            caching: Caching::WRITE_BACK,
        }
    }
}

impl PageRole {
    /// Whether both are equal: what differs most often is looked at first.
    #[inline]
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        (self.level, self.access, self.quadrant) == (other.level, other.access, other.quadrant)
            && self == other
    }

    /// The role of the page that the entry at `index` refers to, given what the guest's entries down to this page's permit;
    /// `None` below the lowest level. `direct` pages stand in for a guest's large page.
    pub fn child(&self, index: usize, access: Prot, direct: bool) -> Option<Self> {
        let short = self.base.guest.is_some_and(|guest| guest.mode() == PagingMode::TwoLevel);
        let quadrant = match self.level {
            // A page directory of 1024 entries of 4 MiB takes four pages of 512 entries of 2 MiB.
            Level::L3 if short && !direct => index % 4,
            Level::L2 if short && !direct => index % 2,
            _ => 0,
        };
        Some(Self {
            level: self.level.down()?,
            access,
            quadrant: quadrant as u8,
            direct: self.direct || direct,
            passthrough: false,
            ..*self
        })
    }

    /// The role with what a large page's entry says of caching, if the page is direct.
    #[must_use]
    pub const fn cached(self, caching: Caching) -> Self {
        if self.direct {
            Self { caching, ..self }
        } else {
            self
        }
    }
}

/// Everything: what stands above a guest's root restricts nothing.
const fn all_access(guest: CpuRole) -> Prot {
    if !guest.is_ept() {
        return Prot::UNPAGED;
    }
    let all = Prot::READ.union(Prot::WRITE).union(Prot::EXECUTE);
    if guest.flags().contains(RoleFlags::MODE_BASED_EXECUTE) {
        all.union(Prot::EXECUTE_USER)
    } else {
        all
    }
}

/// `guest` without what does not change its shadow.
///
/// With CR0.WP the shadow has the guest's own rights, and the processor applies SMEP, SMAP and protection keys to them.
/// Without it, a page that a supervisor has written although it is read-only is shadowed as a supervisor's page, to which
/// those for user pages do not apply, and those for a supervisor's would: so they become part of the role.
fn shadowed(guest: CpuRole) -> CpuRole {
    let mut flags = guest.flags().difference(RoleFlags::ADVANCED_INFO);
    if flags.contains(RoleFlags::WP) || flags.contains(RoleFlags::NESTED) {
        flags.remove(RoleFlags::PKE | RoleFlags::PKS);
        if !flags.contains(RoleFlags::NESTED) {
            flags.remove(RoleFlags::SMEP | RoleFlags::SMAP);
        }
    }
    CpuRole { flags, ..guest }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::role::{Cr0, Cr4, Efer, GuestCpu, GuestEpt, PagingRegs};

    const CPU: GuestCpu = GuestCpu { max_phys_addr: 40, gib_pages: true, pse36: true, amd: true };
    const L1: VcpuMode = VcpuMode { smm: false, nested: false };

    fn guest(cr0: Cr0, cr4: Cr4, efer: Efer) -> CpuRole {
        CpuRole::new(&PagingRegs { cr0: cr0 | Cr0::PG, cr4, efer }, &CPU)
    }

    fn root(guest: CpuRole) -> RootRole {
        RootRole::shadow(guest, Level::L4, L1, true)
    }

    #[test]
    fn a_direct_root_depends_on_the_address_space_alone() {
        let direct = |smm, nested| RootRole::direct(Level::L4, VcpuMode { smm, nested }, true);
        assert_eq!(direct(false, false), direct(false, false));
        assert_ne!(direct(false, false), direct(true, false));
        assert_ne!(direct(false, false), direct(false, true));
        assert!(direct(false, false).is_direct());
    }

    #[test]
    fn what_the_processor_applies_itself_is_not_in_a_shadow_root() {
        let long = Cr4::PAE;
        let plain = guest(Cr0::WP, long, Efer::LMA | Efer::NXE);
        for cr4 in [Cr4::SMEP, Cr4::SMAP, Cr4::PKE, Cr4::PKS] {
            let other = guest(Cr0::WP, long | cr4, Efer::LMA | Efer::NXE);
            assert_ne!(other, plain, "walks differ");
            assert_eq!(root(other), root(plain), "shadows do not");
        }
        // Without WP, they differ.
        let no_wp = guest(Cr0::empty(), long, Efer::LMA | Efer::NXE);
        assert_ne!(root(no_wp), root(plain));
        for cr4 in [Cr4::SMEP, Cr4::SMAP, Cr4::PKE, Cr4::PKS] {
            assert_ne!(root(guest(Cr0::empty(), long | cr4, Efer::LMA | Efer::NXE)), root(no_wp));
        }
        assert_ne!(root(guest(Cr0::WP, long, Efer::LMA)), root(plain), "EFER.NXE");
        let la57 = guest(Cr0::WP, long | Cr4::LA57, Efer::LMA | Efer::NXE);
        assert_ne!(root(la57), root(plain));
        let short = |cr4| root(guest(Cr0::WP, cr4, Efer::empty()));
        assert_ne!(short(Cr4::PSE), short(Cr4::empty()));
    }

    /// B7: a change of the guest's CPUID is another key.
    #[test]
    fn the_guests_address_width_is_in_the_key() {
        let regs = PagingRegs { cr0: Cr0::PG, cr4: Cr4::PAE, efer: Efer::LMA };
        let wide = CpuRole::new(&regs, &GuestCpu { max_phys_addr: 52, ..CPU });
        assert_ne!(root(wide), root(CpuRole::new(&regs, &CPU)));
    }

    /// Roots of 32-bit guests are like any other: three levels, four pages below for the four GiB.
    #[test]
    fn a_page_directory_of_four_byte_entries_takes_four_pages() {
        let short = root(guest(Cr0::WP, Cr4::PSE, Efer::empty()));
        assert_eq!(short.level(), Level::L3);
        let directory = |index| short.page().child(index, Prot::UNPAGED, false).unwrap();
        assert_eq!([0, 1, 2, 3].map(|index| directory(index).quadrant), [0, 1, 2, 3]);
        let table = |index| directory(2).child(index, Prot::UNPAGED, false).unwrap();
        assert_eq!([4, 5].map(|index| table(index).quadrant), [0, 1]);
        assert_eq!(table(4).child(0, Prot::UNPAGED, false), None);
        let pae = root(guest(Cr0::WP, Cr4::PAE, Efer::empty()));
        assert_eq!(pae.page().child(3, Prot::UNPAGED, false).unwrap().quadrant, 0);
    }

    /// CVE-2026-46113, CVE-2026-53359: pages that differ in any part of the role are different pages.
    #[test]
    fn cve_2026_53359_a_page_is_reused_only_if_its_whole_role_is_equal() {
        let page = root(guest(Cr0::WP, Cr4::PAE, Efer::LMA)).page();
        let child = page.child(0, Prot::UNPAGED, false).unwrap();
        assert_eq!(page.child(7, Prot::UNPAGED, false), Some(child));
        assert_ne!(page.child(0, Prot::READ, false), Some(child));
        assert_ne!(page.child(0, Prot::UNPAGED, true), Some(child));
    }

    /// A shadow of nested tables with fewer levels than the CPU walks has a level on top, which leads on to the first.
    #[test]
    fn nested_tables_of_four_levels_under_five() {
        let regs = PagingRegs { cr0: Cr0::PG, cr4: Cr4::PAE, efer: Efer::LMA };
        let nested = CpuRole::nested(&regs, &CPU, false);
        let l2 = VcpuMode { smm: false, nested: true };
        let five = RootRole::shadow(nested, Level::L5, l2, true).page();
        assert!(five.passthrough && five.level == Level::L5);
        assert!(!five.child(0, Prot::UNPAGED, false).unwrap().passthrough);
        assert!(!RootRole::shadow(nested, Level::L4, l2, true).page().passthrough);
        let trapped = CpuRole::nested(&regs, &CPU, true);
        assert_ne!(
            RootRole::shadow(trapped, Level::L4, l2, true),
            RootRole::shadow(nested, Level::L4, l2, true)
        );
    }

    #[test]
    fn roots_of_extended_page_tables() {
        let cpu = GuestEpt {
            max_phys_addr: 40,
            execute_only: true,
            five_level: true,
            mib_pages: true,
            gib_pages: true,
            accessed_dirty: true,
            advanced_info: true,
            mode_based_execute: true,
        };
        let role = |pointer, cpu: &GuestEpt| root(CpuRole::ept(pointer, cpu).unwrap());
        assert_eq!(role(0x1e, &cpu).level(), Level::L4);
        assert_eq!(role(0x26, &cpu).level(), Level::L5);
        assert_ne!(role(0x1e, &cpu), role(0x5e, &cpu), "accessed and dirty flags");
        assert_ne!(role(0x1e, &cpu), role(0x1e, &GuestEpt { mode_based_execute: false, ..cpu }));
        assert_eq!(role(0x1e, &cpu), role(0x1e, &GuestEpt { advanced_info: false, ..cpu }));
        assert!(!role(0x1e, &cpu).page().access.contains(Prot::USER));
    }
}
