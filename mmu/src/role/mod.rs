//! Roles: everything about a vCPU's registers that decides how its own page tables are read.
use bitflags::bitflags;

mod pat;
mod root;

pub use pat::PatTypes;
pub use root::{BaseRole, Caching, PageRole, RootRole, VcpuMode};

use crate::addr::{Gva, NonCanonical, VaWidth, MAX_PHYSICAL_BITS};
use crate::level::Level;
use crate::mutant::{self, Mutant};

bitflags! {
    /// CR0 bits that concern paging (AMD APM vol. 2, 3.1.1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr0: u64 {
        /// WP: supervisor writes honour read-only pages.
        const WP = 1 << 16;
        /// PG: paging.
        const PG = 1 << 31;
        const _ = !0;
    }

    /// CR4 bits that concern paging (AMD APM vol. 2, 3.1.3).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Cr4: u64 {
        /// PSE: 4 MiB pages with 32-bit paging.
        const PSE = 1 << 4;
        /// PAE: 64-bit entries.
        const PAE = 1 << 5;
        /// PGE: global pages.
        const PGE = 1 << 7;
        /// LA57: five levels in long mode.
        const LA57 = 1 << 12;
        /// PCIDE: process-context identifiers.
        const PCIDE = 1 << 17;
        /// SMEP: no supervisor fetch from user pages.
        const SMEP = 1 << 20;
        /// SMAP: no supervisor data access to user pages.
        const SMAP = 1 << 21;
        /// PKE: protection keys for user pages.
        const PKE = 1 << 22;
        /// PKS: protection keys for supervisor pages.
        const PKS = 1 << 24;
        const _ = !0;
    }

    /// EFER bits that concern paging (AMD APM vol. 2, 3.1.7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Efer: u64 {
        /// LMA: long mode is active.
        const LMA = 1 << 10;
        /// NXE: bit 63 of an entry forbids fetches.
        const NXE = 1 << 11;
        const _ = !0;
    }
}

/// One snapshot of the registers that decide the paging mode. Every bit of a role comes from the same one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingRegs {
    /// CR0.
    pub cr0: Cr0,
    /// CR4.
    pub cr4: Cr4,
    /// EFER.
    pub efer: Efer,
}

/// The CPU that the guest's page tables are written for, as far as the registers do not tell: what they switch on (NX,
/// SMEP, SMAP, PKU, LA57) they can only switch on if the CPU has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCpu {
    /// MAXPHYADDR, CPUID 8000_0008 EAX bits 7:0: higher address bits are reserved.
    pub max_phys_addr: u8,
    /// 1 GiB pages, CPUID 8000_0001 EDX bits 26: without them bit 7 of a PDPTE is reserved.
    pub gib_pages: bool,
    /// PSE-36, CPUID 1 EDX bits 17: a 4 MiB page can lie above 4 GiB.
    pub pse36: bool,
    /// AMD reserves bit 8 of a PML4E and PML5E (APM vol. 2, figure 5-20); Intel ignores it.
    pub amd: bool,
}

/// How many levels, of what entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PagingMode {
    /// CR0.PG is clear: linear addresses are physical.
    Unpaged,
    /// Two levels of 4-byte entries.
    TwoLevel,
    /// Three levels of 8-byte entries, 32-bit addresses.
    Pae,
    /// Long mode, four levels.
    FourLevel,
    /// Long mode, five levels.
    FiveLevel,
    /// Extended page tables, four levels.
    EptFourLevel,
    /// Extended page tables, five levels.
    EptFiveLevel,
}

bitflags! {
    /// What, beside the mode, a role consists of.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct RoleFlags: u16 {
        /// CR0.WP. The low four bits index the permission tables.
        const WP = 1 << 0;
        /// EFER.NXE.
        const NX = 1 << 1;
        /// CR4.SMEP; of nested tables, that guest mode execute trap is on.
        const SMEP = 1 << 2;
        /// CR4.SMAP.
        const SMAP = 1 << 3;
        /// CR4.PKE, in long mode.
        const PKE = 1 << 4;
        /// CR4.PKS, in long mode.
        const PKS = 1 << 5;
        /// CR4.PSE, with 4-byte entries.
        const PSE = 1 << 6;
        /// PSE-36, where PSE counts.
        const PSE36 = 1 << 7;
        /// 1 GiB pages, in long mode and EPT.
        const GIB_PAGES = 1 << 8;
        /// AMD's reserved bits, in long mode.
        const AMD = 1 << 9;
        /// Nested tables: accesses are a user's, but for fetches under guest mode execute trap.
        const NESTED = 1 << 10;
        /// EPT: 2 MiB pages.
        const MIB_PAGES = 1 << 11;
        /// EPT: entries that permit fetches and no reads.
        const EXECUTE_ONLY = 1 << 12;
        /// EPT: mode-based execute control.
        const MODE_BASED_EXECUTE = 1 << 13;
        /// EPT: accessed and dirty flags, bit 6 of the pointer.
        const ACCESSED_DIRTY = 1 << 14;
        /// EPT: violations tell what the linear address permits.
        const ADVANCED_INFO = 1 << 15;
    }
}

/// What a virtual CPU offers L1 for its extended page tables: bits of IA32_VMX_EPT_VPID_CAP (Intel SDM vol. 3, A.10), and a
/// control of the VMCS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestEpt {
    /// MAXPHYADDR of L1: higher address bits are reserved.
    pub max_phys_addr: u8,
    /// Bit 0.
    pub execute_only: bool,
    /// Bit 7. Walks of four levels are taken for granted.
    pub five_level: bool,
    /// Bit 16.
    pub mib_pages: bool,
    /// Bit 17.
    pub gib_pages: bool,
    /// Bit 21.
    pub accessed_dirty: bool,
    /// Bit 22.
    pub advanced_info: bool,
    /// Mode-based execute control, bit 22 of the secondary processor-based controls, is on.
    pub mode_based_execute: bool,
}

/// An EPT pointer that VM entry refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadEptPointer(
    /// The rejected value.
    pub u64,
);

/// What decides how a guest's page tables are read: equal roles read them alike, so a role is a key.
///
/// CR3, CPL, RFLAGS.AC, PKRU and IA32_PKRS are no part of it: they change without an exit and are arguments of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuRole {
    mode: PagingMode,
    flags: RoleFlags,
    max_phys_addr: u8,
    /// Of nested tables of AMD: what their PWT, PCD and PAT bits choose from.
    types: PatTypes,
}

impl CpuRole {
    /// A role without paging, of a CPU with the narrowest addresses: of nobody in particular.
    pub(crate) const UNPAGED: Self = Self {
        mode: PagingMode::Unpaged,
        flags: RoleFlags::empty(),
        max_phys_addr: clamped(0),
        types: PatTypes::WRITE_BACK,
    };

    /// The role of a vCPU with these registers.
    ///
    /// Total: combinations that a CPU refuses to enter (long mode without PAE) are read as the mode that the higher bit
    /// names. What a mode ignores is left out of its role.
    pub fn new(regs: &PagingRegs, cpu: &GuestCpu) -> Self {
        let PagingRegs { cr0, cr4, efer } = *regs;
        let long = efer.contains(Efer::LMA) && (cr4.contains(Cr4::PAE) || !mutant::is(Mutant::LongNeedsPae));
        let mode = if !cr0.contains(Cr0::PG) {
            PagingMode::Unpaged
        } else if long && cr4.contains(Cr4::LA57) {
            PagingMode::FiveLevel
        } else if long {
            PagingMode::FourLevel
        } else if cr4.contains(Cr4::PAE) {
            PagingMode::Pae
        } else {
            PagingMode::TwoLevel
        };
        let mut flags = RoleFlags::empty();
        if mode != PagingMode::Unpaged {
            flags.set(RoleFlags::WP, cr0.contains(Cr0::WP) && !mutant::is(Mutant::WpForgotten));
            // 4-byte entries have no bit 63, and without PAE fetches do not show in the error code either (Intel SDM vol. 3,
            // 4.7; AMD APM vol. 2, 8.4.2).
            flags.set(RoleFlags::NX, efer.contains(Efer::NXE) && mode != PagingMode::TwoLevel);
            flags.set(RoleFlags::SMEP, cr4.contains(Cr4::SMEP));
            flags.set(RoleFlags::SMAP, cr4.contains(Cr4::SMAP));
        }
        match mode {
            PagingMode::FourLevel | PagingMode::FiveLevel => {
                flags.set(RoleFlags::PKE, cr4.contains(Cr4::PKE));
                flags.set(RoleFlags::PKS, cr4.contains(Cr4::PKS));
                flags.set(RoleFlags::GIB_PAGES, cpu.gib_pages);
                flags.set(RoleFlags::AMD, cpu.amd);
            }
            PagingMode::TwoLevel if cr4.contains(Cr4::PSE) => {
                flags.insert(RoleFlags::PSE);
                flags.set(RoleFlags::PSE36, cpu.pse36);
            }
            _ => {}
        }
        Self { mode, flags, max_phys_addr: clamped(cpu.max_phys_addr), types: PatTypes::WRITE_BACK }
    }

    /// The same with another CR0.WP.
    #[inline]
    pub(crate) fn with_write_protect(self, on: bool) -> Self {
        let mut flags = self.flags;
        flags.set(RoleFlags::WP, on && self.mode != PagingMode::Unpaged && !mutant::is(Mutant::WpForgotten));
        Self { flags, ..self }
    }

    /// The role in which nested tables of L1 are read: the mode of L1 at VMRUN (`regs`, its host state), as user
    /// accesses that CR0.WP always restricts and SMAP, SMEP and protection keys never do (AMD APM vol. 2, 15.25.6).
    ///
    /// With guest mode execute trap (`execute_trap`), a fetch of L2's supervisor from a user page faults, as if under SMEP.
    pub fn nested(regs: &PagingRegs, cpu: &GuestCpu, execute_trap: bool) -> Self {
        let mut cr4 = regs.cr4.difference(Cr4::PKE | Cr4::PKS | Cr4::SMAP);
        cr4.set(Cr4::SMEP, execute_trap);
        let long = if mutant::is(Mutant::NestedAlwaysLong) { Efer::LMA } else { Efer::empty() };
        let efer = regs.efer | long;
        let role = Self::new(&PagingRegs { cr0: regs.cr0 | Cr0::PG | Cr0::WP, cr4, efer }, cpu);
        Self { flags: role.flags | RoleFlags::NESTED, ..role }
    }

    /// The same for an L1 whose PAT register was `pat` at VMRUN: nested tables choose their memory types from the host's
    /// PAT, and the guest's G_PAT has its say after that (AMD APM vol. 2, 15.25.8). Without this, all is write-back.
    pub const fn with_host_pat(self, pat: u64) -> Self {
        if self.flags.contains(RoleFlags::NESTED) {
            Self { types: PatTypes::new(pat), ..self }
        } else {
            self
        }
    }

    /// The role in which the extended page tables of L1 under `pointer` are read, if VM entry accepts the pointer (Intel
    /// SDM vol. 3, 25.6.11 and 27.2.1.1).
    pub const fn ept(pointer: u64, cpu: &GuestEpt) -> Result<Self, BadEptPointer> {
        const ACCESSED_DIRTY: u64 = 1 << 6;
        const RESERVED: u64 = 0xf80;
        let max_phys_addr = clamped(cpu.max_phys_addr);
        // Uncacheable or write-back.
        let type_known = matches!(pointer & 7, 0 | 6);
        let mode = match pointer >> 3 & 7 {
            3 => PagingMode::EptFourLevel,
            4 if cpu.five_level => PagingMode::EptFiveLevel,
            _ => return Err(BadEptPointer(pointer)),
        };
        let flags_on = pointer & ACCESSED_DIRTY != 0;
        let reserved = pointer & RESERVED != 0 || pointer >> max_phys_addr != 0;
        if !type_known || reserved || (flags_on && !cpu.accessed_dirty) {
            return Err(BadEptPointer(pointer));
        }
        let mut flags = RoleFlags::empty();
        let on = [
            (RoleFlags::MIB_PAGES, cpu.mib_pages),
            (RoleFlags::GIB_PAGES, cpu.gib_pages),
            (RoleFlags::EXECUTE_ONLY, cpu.execute_only),
            (RoleFlags::MODE_BASED_EXECUTE, cpu.mode_based_execute),
            (RoleFlags::ADVANCED_INFO, cpu.advanced_info),
            (RoleFlags::ACCESSED_DIRTY, flags_on),
        ];
        let mut index = 0;
        while index < on.len() {
            if on[index].1 {
                flags = flags.union(on[index].0);
            }
            index += 1;
        }
        Ok(Self { mode, flags, max_phys_addr, types: PatTypes::WRITE_BACK })
    }

    /// The paging mode.
    #[inline]
    pub const fn mode(&self) -> PagingMode {
        self.mode
    }

    /// What else counts.
    #[inline]
    pub const fn flags(&self) -> RoleFlags {
        self.flags
    }

    /// Of nested tables of AMD: the memory types that L1's PAT register gave their entries to choose from.
    #[inline]
    pub const fn types(&self) -> PatTypes {
        self.types
    }

    /// Physical address width that reserved bits follow from: 32 to 52.
    #[inline]
    pub const fn max_phys_addr(&self) -> u32 {
        self.max_phys_addr as u32
    }

    /// Width of linear addresses that paging translates, in long mode; other modes cut addresses to 32 bits.
    #[inline]
    pub const fn va_width(&self) -> Option<VaWidth> {
        match self.mode {
            PagingMode::FourLevel => Some(VaWidth::Bits48),
            PagingMode::FiveLevel => Some(VaWidth::Bits57),
            _ => None,
        }
    }

    /// Whether `address` is one that the guest's CPU takes: canonical in long mode, anything else otherwise. A violation is
    /// #GP, or #SS for the stack (AMD APM vol. 2, 5.3.1; Intel SDM vol. 1, 3.3.7.1), and comes before any walk.
    #[inline]
    pub const fn check_canonical(&self, address: Gva) -> Result<(), NonCanonical> {
        match self.va_width() {
            Some(width) if !address.is_canonical(width) => Err(NonCanonical(address.bits())),
            _ => Ok(()),
        }
    }

    /// Whether a page fault's error code says that the access was a fetch: only with NX or SMEP in effect (Intel SDM
    /// vol. 3, 4.7; AMD APM vol. 2, 8.4.2).
    #[inline]
    pub const fn reports_fetches(&self) -> bool {
        self.flags.intersects(RoleFlags::NX.union(RoleFlags::SMEP))
    }

    /// The tables are extended page tables.
    #[inline]
    pub const fn is_ept(&self) -> bool {
        matches!(self.mode, PagingMode::EptFourLevel | PagingMode::EptFiveLevel)
    }

    /// Whether walks keep accessed and dirty bits: all do, but EPT only on request.
    #[inline]
    pub const fn keeps_accessed_dirty(&self) -> bool {
        !self.is_ept() || self.flags.contains(RoleFlags::ACCESSED_DIRTY)
    }

    /// Level of the top table; `None` without paging. PAE's four PDPTEs are a table of level 3.
    #[inline]
    pub const fn top(&self) -> Option<Level> {
        match self.mode {
            PagingMode::Unpaged => None,
            PagingMode::TwoLevel => Some(Level::L2),
            PagingMode::Pae => Some(Level::L3),
            PagingMode::FourLevel | PagingMode::EptFourLevel => Some(Level::L4),
            PagingMode::FiveLevel | PagingMode::EptFiveLevel => Some(Level::L5),
        }
    }
}

/// A physical address width that a CPU can have.
const fn clamped(max_phys_addr: u8) -> u8 {
    if max_phys_addr < 32 {
        32
    } else if max_phys_addr > MAX_PHYSICAL_BITS as u8 {
        MAX_PHYSICAL_BITS as u8
    } else {
        max_phys_addr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: GuestCpu = GuestCpu { max_phys_addr: 40, gib_pages: true, pse36: true, amd: true };

    fn role(cr0: Cr0, cr4: Cr4, efer: Efer) -> CpuRole {
        CpuRole::new(&PagingRegs { cr0, cr4, efer }, &CPU)
    }

    #[test]
    fn the_mode_follows_from_one_snapshot() {
        let mode = |cr0, cr4, efer| role(cr0, cr4, efer).mode();
        assert_eq!(mode(Cr0::empty(), Cr4::PAE, Efer::empty()), PagingMode::Unpaged);
        assert_eq!(mode(Cr0::PG, Cr4::PSE, Efer::empty()), PagingMode::TwoLevel);
        assert_eq!(mode(Cr0::PG, Cr4::PAE, Efer::empty()), PagingMode::Pae);
        assert_eq!(mode(Cr0::PG, Cr4::PAE, Efer::LMA), PagingMode::FourLevel);
        assert_eq!(mode(Cr0::PG, Cr4::PAE | Cr4::LA57, Efer::LMA), PagingMode::FiveLevel);
        assert_eq!(mode(Cr0::PG, Cr4::PAE | Cr4::LA57, Efer::empty()), PagingMode::Pae);
    }

    /// CVE-2023-30456: long mode without PAE is not trusted to be impossible.
    #[test]
    fn cve_2023_30456_long_mode_without_pae_is_still_one_mode() {
        assert_eq!(role(Cr0::PG, Cr4::empty(), Efer::LMA).mode(), PagingMode::FourLevel);
    }

    #[test]
    fn what_a_mode_ignores_is_not_in_its_role() {
        let unpaged = role(Cr0::WP, Cr4::SMEP | Cr4::PSE | Cr4::PKE, Efer::NXE);
        assert_eq!(unpaged, role(Cr0::empty(), Cr4::empty(), Efer::empty()));
        let pae = Cr4::PAE;
        assert_eq!(role(Cr0::PG, pae | Cr4::PKE | Cr4::PSE, Efer::NXE), role(Cr0::PG, pae, Efer::NXE));
    }

    #[test]
    fn widths_that_no_cpu_has_are_clamped() {
        let cpu = |bits| GuestCpu { max_phys_addr: bits, ..CPU };
        let regs = PagingRegs { cr0: Cr0::PG, cr4: Cr4::PAE, efer: Efer::LMA };
        assert_eq!(CpuRole::new(&regs, &cpu(255)).max_phys_addr(), 52);
        assert_eq!(CpuRole::new(&regs, &cpu(0)).max_phys_addr(), 32);
    }

    #[test]
    fn canonical_form_follows_the_mode() {
        let long = role(Cr0::PG, Cr4::PAE, Efer::LMA);
        let long57 = role(Cr0::PG, Cr4::PAE | Cr4::LA57, Efer::LMA);
        let (low, high) = (Gva::new(0x8000_0000_0000), Gva::new(1 << 56));
        assert_eq!(long.check_canonical(low), Err(NonCanonical(low.bits())));
        assert_eq!(long57.check_canonical(low), Ok(()));
        assert_eq!(long57.check_canonical(high), Err(NonCanonical(high.bits())));
        assert_eq!(role(Cr0::PG, Cr4::PAE, Efer::empty()).check_canonical(high), Ok(()));
        assert_eq!(long.check_canonical(Gva::new(u64::MAX)), Ok(()));
    }

    const EPT: GuestEpt = GuestEpt {
        max_phys_addr: 40,
        execute_only: true,
        five_level: false,
        mib_pages: true,
        gib_pages: false,
        accessed_dirty: true,
        advanced_info: false,
        mode_based_execute: false,
    };

    #[test]
    fn ept_pointers_as_vm_entry_checks_them() {
        let role = |pointer| CpuRole::ept(pointer, &EPT);
        let plain = role(0x1000 | 3 << 3 | 6).unwrap();
        assert_eq!((plain.mode(), plain.keeps_accessed_dirty()), (PagingMode::EptFourLevel, false));
        assert!(role(0x1000 | 3 << 3 | 6 | 1 << 6).unwrap().keeps_accessed_dirty());
        assert_eq!(role(3 << 3), role(0x1000 | 3 << 3 | 6), "neither root nor memory type is in the role");
        for pointer in [0x1e | 1 << 7, 0x1e | 1 << 11, 0x1e | 1 << 40, 0x1e | 1 << 63, 0x26, 0x16, 0x1b, 0x1f]
        {
            assert_eq!(role(pointer), Err(BadEptPointer(pointer)), "{pointer:#x}");
        }
        let no_flags = GuestEpt { accessed_dirty: false, ..EPT };
        assert_eq!(CpuRole::ept(0x5e, &no_flags), Err(BadEptPointer(0x5e)));
        let five = GuestEpt { five_level: true, ..EPT };
        assert_eq!(CpuRole::ept(0x26, &five).unwrap().top(), Some(Level::L5));
    }

    /// ee6268ba3a68: an L1 with 32-bit paging has nested tables like any other.
    #[test]
    fn commit_ee6268ba3a68_nested_tables_of_a_32_bit_l1_have_a_role() {
        let nested = |cr4, efer| CpuRole::nested(&PagingRegs { cr0: Cr0::empty(), cr4, efer }, &CPU, false);
        assert_eq!(nested(Cr4::PSE, Efer::empty()).mode(), PagingMode::TwoLevel);
        assert_eq!(nested(Cr4::PAE, Efer::empty()).mode(), PagingMode::Pae);
        assert_eq!(nested(Cr4::PAE, Efer::LMA).mode(), PagingMode::FourLevel);
        assert!(nested(Cr4::PSE, Efer::empty()).flags().contains(RoleFlags::WP | RoleFlags::NESTED));
    }

    /// 03a6e84069d1: after INIT nothing is left of the mode before, for a role follows from registers alone.
    #[test]
    fn commit_03a6e84069d1_init_leads_to_the_same_role_from_every_mode() {
        let reset = PagingRegs { cr0: Cr0::empty(), cr4: Cr4::empty(), efer: Efer::empty() };
        for (cr4, efer) in [
            (Cr4::empty(), Efer::empty()),
            (Cr4::PAE, Efer::NXE),
            (Cr4::PAE | Cr4::SMEP, Efer::LMA),
            (Cr4::PAE | Cr4::LA57 | Cr4::PKE, Efer::LMA | Efer::NXE),
        ] {
            let before = role(Cr0::PG | Cr0::WP, cr4, efer);
            // INIT keeps the caches' bits of CR0, and clears the rest.
            let after = CpuRole::new(&PagingRegs { cr0: Cr0::from_bits_retain(0x6000_0010), ..reset }, &CPU);
            assert_ne!(before, after);
            assert_eq!(after, CpuRole::new(&reset, &CPU));
            assert_eq!((after.mode(), after.flags()), (PagingMode::Unpaged, RoleFlags::empty()));
        }
    }
}
