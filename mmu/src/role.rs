//! Roles: everything about a vCPU's registers that decides how its own page tables are read.
use bitflags::bitflags;

use crate::addr::{VaWidth, MAX_PHYSICAL_BITS};

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
        /// LA57: five levels in long mode.
        const LA57 = 1 << 12;
        /// SMEP: no supervisor fetch from user pages.
        const SMEP = 1 << 20;
        /// SMAP: no supervisor data access to user pages.
        const SMAP = 1 << 21;
        /// PKE: protection keys for user pages.
        const PKE = 1 << 22;
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
}

bitflags! {
    /// What, beside the mode, a role consists of.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct RoleFlags: u16 {
        /// CR0.WP. The low four bits index the permission tables.
        const WP = 1 << 0;
        /// EFER.NXE.
        const NX = 1 << 1;
        /// CR4.SMEP.
        const SMEP = 1 << 2;
        /// CR4.SMAP.
        const SMAP = 1 << 3;
        /// CR4.PKE, in long mode.
        const PKE = 1 << 4;
        /// CR4.PSE, with 4-byte entries.
        const PSE = 1 << 5;
        /// PSE-36, where PSE counts.
        const PSE36 = 1 << 6;
        /// 1 GiB pages, in long mode.
        const GIB_PAGES = 1 << 7;
        /// AMD's reserved bits, in long mode.
        const AMD = 1 << 8;
    }
}

/// What decides how a guest's page tables are read: equal roles read them alike, so a role is a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuRole {
    mode: PagingMode,
    flags: RoleFlags,
    max_phys_addr: u8,
}

impl CpuRole {
    /// The role of a vCPU with these registers.
    ///
    /// Total: combinations that a CPU refuses to enter (long mode without PAE) are read as the mode that the higher bit
    /// names. What a mode ignores is left out of its role.
    pub fn new(regs: &PagingRegs, cpu: &GuestCpu) -> Self {
        let PagingRegs { cr0, cr4, efer } = *regs;
        let long = efer.contains(Efer::LMA);
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
            flags.set(RoleFlags::WP, cr0.contains(Cr0::WP));
            // 4-byte entries have no bit 63, yet NXE still makes fetches show in the error code.
            flags.set(RoleFlags::NX, efer.contains(Efer::NXE));
            flags.set(RoleFlags::SMEP, cr4.contains(Cr4::SMEP));
            flags.set(RoleFlags::SMAP, cr4.contains(Cr4::SMAP));
        }
        match mode {
            PagingMode::FourLevel | PagingMode::FiveLevel => {
                flags.set(RoleFlags::PKE, cr4.contains(Cr4::PKE));
                flags.set(RoleFlags::GIB_PAGES, cpu.gib_pages);
                flags.set(RoleFlags::AMD, cpu.amd);
            }
            PagingMode::TwoLevel if cr4.contains(Cr4::PSE) => {
                flags.insert(RoleFlags::PSE);
                flags.set(RoleFlags::PSE36, cpu.pse36);
            }
            _ => {}
        }
        let max_phys_addr = cpu.max_phys_addr.clamp(32, MAX_PHYSICAL_BITS as u8);
        Self { mode, flags, max_phys_addr }
    }

    /// The role in which nested tables of L1 are read: the mode of L1 at VMRUN (`regs`, its host state), as user
    /// accesses that CR0.WP always restricts and SMAP, SMEP and protection keys never do (AMD APM vol. 2, 15.25.6).
    pub fn nested(regs: &PagingRegs, cpu: &GuestCpu) -> Self {
        let cr4 = regs.cr4.difference(Cr4::PKE | Cr4::SMAP | Cr4::SMEP);
        Self::new(&PagingRegs { cr0: regs.cr0 | Cr0::PG | Cr0::WP, cr4, efer: regs.efer }, cpu)
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

    /// Whether a page fault's error code says that the access was a fetch: only with NX or SMEP in effect (Intel SDM
    /// vol. 3, 4.7; AMD APM vol. 2, 8.4.2).
    #[inline]
    pub const fn reports_fetches(&self) -> bool {
        self.flags.intersects(RoleFlags::NX.union(RoleFlags::SMEP))
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
}
