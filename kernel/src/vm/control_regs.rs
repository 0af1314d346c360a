//! What a write of a control register does: whether the processor takes the value, and what follows from it.
//!
//! Intel SDM vol. 3, 2.5 (registers), 4.1.2 (paging modes), 4.4.1 (PDPTEs), 4.10.1 (PCIDs), 4.10.4.1 (flushes),
//! 10.8.5 (long mode); AMD APM vol. 2, 3.1 and 14.6. Pure: who calls applies the [`Change`].

use super::msr::{EFER_LMA, EFER_LME};
use crate::hw::{CpuState, Segment, SegmentName};

/// CR0: protection enabled.
pub const CR0_PE: u64 = 1 << 0;
/// CR0: monitor coprocessor.
pub const CR0_MP: u64 = 1 << 1;
/// CR0: x87 emulation.
pub const CR0_EM: u64 = 1 << 2;
/// CR0: task switched.
pub const CR0_TS: u64 = 1 << 3;
/// CR0: extension type, always set.
pub const CR0_ET: u64 = 1 << 4;
/// CR0: numeric errors are exceptions.
pub const CR0_NE: u64 = 1 << 5;
/// CR0: write protection counts for the supervisor, too.
pub const CR0_WP: u64 = 1 << 16;
/// CR0: alignment checking.
pub const CR0_AM: u64 = 1 << 18;
/// CR0: not write-through.
pub const CR0_NW: u64 = 1 << 29;
/// CR0: cache disabled.
pub const CR0_CD: u64 = 1 << 30;
/// CR0: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4: virtual-8086 mode extensions.
pub const CR4_VME: u64 = 1 << 0;
/// CR4: protected-mode virtual interrupts.
pub const CR4_PVI: u64 = 1 << 1;
/// CR4: time stamp disabled at CPL 1 to 3.
pub const CR4_TSD: u64 = 1 << 2;
/// CR4: debugging extensions.
pub const CR4_DE: u64 = 1 << 3;
/// CR4: page size extensions.
pub const CR4_PSE: u64 = 1 << 4;
/// CR4: physical address extension.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4: global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// CR4: user-mode instruction prevention.
pub const CR4_UMIP: u64 = 1 << 11;
/// CR4: 57-bit linear addresses.
pub const CR4_LA57: u64 = 1 << 12;
/// CR4: process-context identifiers.
pub const CR4_PCIDE: u64 = 1 << 17;
/// CR4: XSAVE is enabled.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// CR4: supervisor-mode execution prevention.
pub const CR4_SMEP: u64 = 1 << 20;
/// CR4: control-flow enforcement.
pub const CR4_CET: u64 = 1 << 23;

const CR0_DEFINED: u64 =
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;
/// CR3: with CR4.PCIDE, the write keeps the translations of the PCID it switches to.
pub const CR3_NO_FLUSH: u64 = 1 << 63;
const CR3_PCID: u64 = 0xfff;
/// Type of a busy 16-bit TSS.
const BUSY_TSS_16: u16 = 3;

/// What the guest's CPU can do, as far as its control registers depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bits of CR4 that exist.
    pub cr4: u64,
    /// Physical-address width.
    pub phys_bits: u8,
    /// The guest was shown an AMD CPU.
    pub amd: bool,
}

/// The registers before the write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER as the guest sees it.
    pub efer: u64,
    /// CS.L.
    pub cs_long: bool,
    /// Attributes of TR.
    pub tr_attributes: u16,
}

impl From<&CpuState> for Now {
    fn from(state: &CpuState) -> Self {
        Self {
            cr0: state.cr0,
            cr3: state.cr3,
            cr4: state.cr4,
            efer: state.efer,
            cs_long: state.segments[SegmentName::Cs as usize].attributes & Segment::LONG != 0,
            tr_attributes: state.tr.attributes,
        }
    }
}

/// Which translations the write invalidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// None.
    None,
    /// Those of the PCID that is current afterwards, but for global pages.
    NonGlobal,
    /// All.
    All,
}

/// The registers after the write, and what else it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER, whose LMA follows CR0.PG.
    pub efer: u64,
    /// The PDPTE registers are loaded from where CR3 points; #GP if [`pdptes_are_valid`] says no.
    pub load_pdptes: bool,
    /// Translations that become invalid.
    pub flush: Flush,
    /// CR0.CD or CR0.NW changed.
    pub cache_control: bool,
}

/// The write raises #GP(0) and changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

impl Now {
    /// Nothing changed so far.
    fn unchanged(&self) -> Change {
        Change {
            cr0: self.cr0,
            cr3: self.cr3,
            cr4: self.cr4,
            efer: self.efer,
            load_pdptes: false,
            flush: Flush::None,
            cache_control: false,
        }
    }
}

/// PAE paging outside long mode.
#[must_use]
pub const fn uses_pdptes(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && efer & EFER_LMA == 0
}

/// MOV to CR0. Outside 64-bit mode `value` has 32 bits.
pub fn write_cr0(now: &Now, value: u64, limits: &Limits) -> Result<Change, GeneralProtection> {
    if value >> 32 != 0
        || value & (CR0_PG | CR0_PE) == CR0_PG
        || value & (CR0_NW | CR0_CD) == CR0_NW
        || (value & CR0_WP == 0 && now.cr4 & CR4_CET != 0)
    {
        return Err(GeneralProtection);
    }
    // Reserved bits of the low half are ignored.
    let cr0 = value & CR0_DEFINED | CR0_ET;
    let changed = cr0 ^ now.cr0;
    let mut efer = now.efer;
    if changed & CR0_PG != 0 {
        if cr0 & CR0_PG == 0 {
            let in_64_bit_mode = now.efer & EFER_LMA != 0 && now.cs_long;
            if in_64_bit_mode || now.cr4 & CR4_PCIDE != 0 {
                return Err(GeneralProtection);
            }
            efer &= !EFER_LMA;
        } else if now.efer & EFER_LME != 0 {
            // SDM vol. 3, 10.8.5.4: TR must not hold a 16-bit TSS. AMD does not look.
            let old_task = !limits.amd && now.tr_attributes & 0xf == BUSY_TSS_16;
            if now.cr4 & CR4_PAE == 0 || now.cs_long || old_task {
                return Err(GeneralProtection);
            }
            efer |= EFER_LMA;
        }
    }
    Ok(Change {
        cr0,
        efer,
        load_pdptes: changed & (CR0_PG | CR0_CD | CR0_NW) != 0 && uses_pdptes(cr0, now.cr4, efer),
        flush: if changed & CR0_PG != 0 { Flush::All } else { Flush::None },
        cache_control: changed & (CR0_CD | CR0_NW) != 0,
        ..now.unchanged()
    })
}

/// LMSW: bits 3:0 of CR0; PE can be set, but not cleared.
pub fn write_machine_status(now: &Now, value: u16, limits: &Limits) -> Result<Change, GeneralProtection> {
    const STATUS: u64 = CR0_PE | CR0_MP | CR0_EM | CR0_TS;
    let kept = now.cr0 & !STATUS | now.cr0 & CR0_PE;
    write_cr0(now, kept | u64::from(value) & STATUS, limits)
}

/// CLTS.
#[must_use]
pub fn clear_task_switched(now: &Now) -> Change {
    Change { cr0: now.cr0 & !CR0_TS, ..now.unchanged() }
}

/// MOV to CR3. Outside 64-bit mode `value` has 32 bits.
pub fn write_cr3(now: &Now, value: u64, limits: &Limits) -> Result<Change, GeneralProtection> {
    let pcids = now.cr4 & CR4_PCIDE != 0;
    let no_flush = pcids && value & CR3_NO_FLUSH != 0;
    let cr3 = if pcids { value & !CR3_NO_FLUSH } else { value };
    if cr3 & physical_reserved(limits.phys_bits) != 0 {
        return Err(GeneralProtection);
    }
    Ok(Change {
        cr3,
        load_pdptes: uses_pdptes(now.cr0, now.cr4, now.efer),
        flush: if no_flush { Flush::None } else { Flush::NonGlobal },
        ..now.unchanged()
    })
}

/// MOV to CR4. Outside 64-bit mode `value` has 32 bits.
pub fn write_cr4(now: &Now, value: u64, limits: &Limits) -> Result<Change, GeneralProtection> {
    const REMAPPING: u64 = CR4_PAE | CR4_PGE | CR4_PSE;
    let changed = value ^ now.cr4;
    let set = value & changed;
    let long = now.efer & EFER_LMA != 0;
    if value & !limits.cr4 != 0
        || (long && (value & CR4_PAE == 0 || changed & CR4_LA57 != 0))
        || (set & CR4_PCIDE != 0 && (!long || now.cr3 & CR3_PCID != 0))
        || (value & CR4_CET != 0 && now.cr0 & CR0_WP == 0)
    {
        return Err(GeneralProtection);
    }
    // The manuals ask for less in some cases (only the current PCID for PAE and SMEP): more is allowed.
    let flush = changed & REMAPPING != 0 || set & CR4_SMEP != 0 || changed & now.cr4 & CR4_PCIDE != 0;
    Ok(Change {
        cr4: value,
        load_pdptes: changed & (REMAPPING | CR4_SMEP) != 0 && uses_pdptes(now.cr0, value, now.efer),
        flush: if flush { Flush::All } else { Flush::None },
        ..now.unchanged()
    })
}

/// MOV to CR8: the new task priority.
pub fn write_cr8(value: u64) -> Result<u8, GeneralProtection> {
    if value & !0xf == 0 {
        Ok(value as u8)
    } else {
        Err(GeneralProtection)
    }
}

/// Where PAE's four PDPTEs lie. SDM vol. 3, table 4-7.
#[must_use]
pub fn pdpte_address(cr3: u64) -> u64 {
    cr3 & 0xffff_ffe0
}

/// Whether the PDPTE registers take these values: those that are present have no reserved bit set. SDM vol. 3,
/// table 4-8.
#[must_use]
pub fn pdptes_are_valid(pdptes: &[u64; 4], phys_bits: u8) -> bool {
    const PRESENT: u64 = 1;
    const RESERVED: u64 = 0x1e6;
    let reserved = RESERVED | physical_reserved(phys_bits);
    pdptes.iter().all(|pdpte| pdpte & PRESENT == 0 || pdpte & reserved == 0)
}

/// Bits from the physical-address width up.
pub const fn physical_reserved(phys_bits: u8) -> u64 {
    if phys_bits >= 64 {
        0
    } else {
        u64::MAX << phys_bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL_CR4: u64 = 0x00ff_ffff & !(1 << 15);
    const LIMITS: Limits = Limits { cr4: ALL_CR4, phys_bits: 40, amd: false };
    const LONG: u64 = EFER_LME | EFER_LMA;
    const ON: u64 = CR0_PE | CR0_ET | CR0_PG | CR0_WP;

    fn real() -> Now {
        let cr0 = CR0_ET | CR0_CD | CR0_NW;
        Now { cr0, cr3: 0, cr4: 0, efer: 0, cs_long: false, tr_attributes: 0x8b }
    }
    fn protected() -> Now {
        Now { cr0: CR0_PE | CR0_ET, ..real() }
    }
    fn pae() -> Now {
        Now { cr0: ON, cr4: CR4_PAE, ..real() }
    }
    fn long() -> Now {
        Now { efer: LONG, cs_long: true, ..pae() }
    }

    #[test]
    fn cr0_values_that_no_state_takes() {
        for now in [real(), protected(), pae(), long()] {
            for value in [CR0_PG, CR0_NW | CR0_PE, 1 << 32 | ON, 1 << 63 | ON] {
                assert_eq!(write_cr0(&now, value, &LIMITS), Err(GeneralProtection), "{value:x}");
            }
        }
    }

    #[test]
    fn reserved_bits_of_the_low_half_are_ignored_and_et_stays() {
        let change = write_cr0(&real(), 0x1ffa_ffc1 & !CR0_NW, &LIMITS).unwrap();
        assert_eq!(change.cr0, CR0_PE | CR0_ET);
        assert!(change.cache_control && change.flush == Flush::None && !change.load_pdptes);
    }

    #[test]
    fn paging_with_lme_enters_long_mode() {
        let now = Now { efer: EFER_LME, cr4: CR4_PAE, ..protected() };
        let change = write_cr0(&now, ON, &LIMITS).unwrap();
        assert_eq!((change.efer, change.flush, change.load_pdptes), (LONG, Flush::All, false));
        for bad in [Now { cr4: 0, ..now }, Now { cs_long: true, ..now }, Now { tr_attributes: 0x83, ..now }] {
            assert_eq!(write_cr0(&bad, ON, &LIMITS), Err(GeneralProtection), "{bad:?}");
        }
        let amd = Limits { amd: true, ..LIMITS };
        assert!(write_cr0(&Now { tr_attributes: 0x83, ..now }, ON, &amd).is_ok());
    }

    #[test]
    fn paging_off_leaves_long_mode_from_compatibility_mode_only() {
        assert_eq!(write_cr0(&long(), ON & !CR0_PG, &LIMITS), Err(GeneralProtection));
        let now = Now { cs_long: false, ..long() };
        let change = write_cr0(&now, ON & !CR0_PG, &LIMITS).unwrap();
        assert_eq!((change.efer, change.flush), (EFER_LME, Flush::All));
        let pcids = Now { cr4: CR4_PAE | CR4_PCIDE, ..now };
        assert_eq!(write_cr0(&pcids, ON & !CR0_PG, &LIMITS), Err(GeneralProtection));
    }

    #[test]
    fn pdptes_are_loaded_when_the_manual_says() {
        let now = Now { cr4: CR4_PAE, ..protected() };
        assert!(write_cr0(&now, ON, &LIMITS).unwrap().load_pdptes);
        assert!(write_cr0(&pae(), ON | CR0_CD, &LIMITS).unwrap().load_pdptes);
        assert!(!write_cr0(&pae(), ON | CR0_TS, &LIMITS).unwrap().load_pdptes);
        assert!(!write_cr0(&long(), ON | CR0_CD, &LIMITS).unwrap().load_pdptes);
        assert!(write_cr3(&pae(), 0x1000, &LIMITS).unwrap().load_pdptes);
        assert!(!write_cr3(&now, 0x1000, &LIMITS).unwrap().load_pdptes);
        assert!(!write_cr3(&long(), 0x1000, &LIMITS).unwrap().load_pdptes);
        for (bit, loads) in [(CR4_PGE, true), (CR4_PSE, true), (CR4_SMEP, true), (CR4_DE, false)] {
            assert_eq!(write_cr4(&pae(), CR4_PAE | bit, &LIMITS).unwrap().load_pdptes, loads, "{bit:x}");
            assert!(!write_cr4(&long(), CR4_PAE | bit, &LIMITS).unwrap().load_pdptes);
        }
        let legacy = Now { cr4: 0, ..pae() };
        assert!(write_cr4(&legacy, CR4_PAE, &LIMITS).unwrap().load_pdptes);
        assert!(!write_cr4(&pae(), 0, &LIMITS).unwrap().load_pdptes);
    }

    #[test]
    fn lmsw_sets_pe_and_never_clears_it() {
        let change = write_machine_status(&real(), 0xffff, &LIMITS).unwrap();
        assert_eq!(change.cr0, real().cr0 | 0xf);
        let change = write_machine_status(&pae(), 0xfff0, &LIMITS).unwrap();
        assert_eq!(change.cr0, ON);
        let now = Now { cr0: ON | CR0_TS | CR0_MP, ..pae() };
        assert_eq!(write_machine_status(&now, 4, &LIMITS).unwrap().cr0, ON | CR0_EM);
        assert_eq!(clear_task_switched(&now).cr0, ON | CR0_MP);
    }

    #[test]
    fn cr3_reserved_bits_and_pcids() {
        assert_eq!(write_cr3(&long(), 1 << 40, &LIMITS), Err(GeneralProtection));
        assert_eq!(write_cr3(&long(), 1 << 63, &LIMITS), Err(GeneralProtection));
        let change = write_cr3(&long(), (1 << 40) - 1, &LIMITS).unwrap();
        assert_eq!((change.cr3, change.flush), ((1 << 40) - 1, Flush::NonGlobal));
        let pcids = Now { cr4: CR4_PAE | CR4_PCIDE, ..long() };
        let change = write_cr3(&pcids, 1 << 63 | 0x5001, &LIMITS).unwrap();
        assert_eq!((change.cr3, change.flush), (0x5001, Flush::None));
        assert_eq!(write_cr3(&pcids, 0x5001, &LIMITS).unwrap().flush, Flush::NonGlobal);
        assert_eq!(write_cr3(&pcids, 1 << 63 | 1 << 45, &LIMITS), Err(GeneralProtection));
        assert!(write_cr3(&long(), u64::MAX, &Limits { phys_bits: 64, ..LIMITS }).is_ok());
    }

    #[test]
    fn cr4_in_long_mode() {
        assert_eq!(write_cr4(&long(), 0, &LIMITS), Err(GeneralProtection));
        assert_eq!(write_cr4(&long(), CR4_PAE | CR4_LA57, &LIMITS), Err(GeneralProtection));
        let pcids = CR4_PAE | CR4_PCIDE;
        assert!(write_cr4(&long(), pcids, &LIMITS).is_ok());
        assert_eq!(write_cr4(&Now { cr3: 1, ..long() }, pcids, &LIMITS), Err(GeneralProtection));
        assert!(write_cr4(&Now { cr3: 1, cr4: pcids, ..long() }, pcids | CR4_DE, &LIMITS).is_ok());
        assert_eq!(write_cr4(&pae(), pcids, &LIMITS), Err(GeneralProtection));
        let off = write_cr4(&Now { cr4: pcids, ..long() }, CR4_PAE, &LIMITS).unwrap();
        assert_eq!(off.flush, Flush::All);
        assert!(write_cr4(&pae(), CR4_LA57, &LIMITS).is_ok(), "LA57 is free outside long mode");
    }

    #[test]
    fn cr4_bits_that_do_not_exist() {
        for bit in 0..64 {
            let taken = write_cr4(&Now { cr0: ON, ..real() }, 1 << bit, &LIMITS).is_ok();
            assert_eq!(taken, ALL_CR4 >> bit & 1 != 0 && bit != 17, "{bit}");
        }
    }

    #[test]
    fn control_flow_enforcement_needs_write_protection() {
        let unprotected = Now { cr0: ON & !CR0_WP, ..pae() };
        assert_eq!(write_cr4(&unprotected, CR4_PAE | CR4_CET, &LIMITS), Err(GeneralProtection));
        let enforced = Now { cr4: CR4_PAE | CR4_CET, ..pae() };
        assert_eq!(write_cr0(&enforced, ON & !CR0_WP, &LIMITS), Err(GeneralProtection));
    }

    #[test]
    fn cr4_flushes() {
        for (old, new, flush) in [
            (0, CR4_PGE, Flush::All),
            (CR4_PGE, 0, Flush::All),
            (0, CR4_PSE, Flush::All),
            (0, CR4_SMEP, Flush::All),
            (CR4_SMEP, 0, Flush::None),
            (0, CR4_DE | CR4_TSD | CR4_OSXSAVE, Flush::None),
        ] {
            let now = Now { cr4: CR4_PAE | old, ..long() };
            assert_eq!(write_cr4(&now, CR4_PAE | new, &LIMITS).unwrap().flush, flush, "{old:x} {new:x}");
        }
    }

    #[test]
    fn task_priorities_and_pdptes() {
        assert_eq!(write_cr8(0xf), Ok(0xf));
        assert_eq!(write_cr8(0x10), Err(GeneralProtection));
        assert_eq!(pdpte_address(0xf_ffff_ffff), 0xffff_ffe0);
        for bit in 0..64 {
            let valid = matches!(bit, 0 | 3 | 4 | 9..=39);
            assert_eq!(pdptes_are_valid(&[0, 0, 1 | 1 << bit, 0], 40), valid, "{bit}");
            assert!(pdptes_are_valid(&[!1, 0, 0, 1 << bit & !1], 40), "absent entries may hold anything");
        }
    }
}
